//! The versioned encodings of everything that the core writes to disk or log: one format-version
//! byte, then postcard.
//!
//! What is written once is read for ever: a new version adds an arm to the reader of its type and
//! keeps the old one. Golden-bytes tests beside each type hold its encoding.

use bytes::Bytes;
use postcard::de_flavors::Flavor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::level::{LEVEL, TooOld};
use super::ports::StoreError;

/// The format of every encoding in the core that has had no other yet.
pub const FORMAT: u8 = 1;

/// The first format that begins with a level, and with it all later ones: behind the format byte
/// stands the level that a program must know to read the rest. One that knows less can say that.
pub const LEVELED: u8 = 3;

/// Room that most small values fit in, so that their encoding is allocated once.
const SMALL_BYTES: usize = 64;

/// `value` behind its format byte.
pub fn encode<T: Serialize>(value: &T) -> Bytes {
    encode_sized(value, SMALL_BYTES)
}

/// As [`encode`], for a value whose encoding takes about `capacity` bytes.
pub fn encode_sized<T: Serialize>(value: &T, capacity: usize) -> Bytes {
    let mut buffer = Vec::with_capacity(capacity);
    buffer.push(FORMAT);
    let bytes = postcard::to_extend(value, buffer)
        .expect("encoding into memory fails for no type of the core");
    Bytes::from(bytes)
}

/// As [`encode`], in a later format of this type.
pub fn encode_as<T: Serialize>(format: u8, value: &T) -> Bytes {
    let mut bytes = Vec::from(encode(value));
    bytes[0] = format;
    Bytes::from(bytes)
}

/// Encodes `value`, which programs of a level below `level` cannot read, in the format [`LEVELED`].
pub fn encode_leveled<T: Serialize>(level: u16, value: &T, capacity: usize) -> Bytes {
    let mut buffer = Vec::with_capacity(capacity + 4);
    buffer.push(LEVELED);
    let encoded =
        postcard::to_extend(&level, buffer).and_then(|buffer| postcard::to_extend(value, buffer));
    Bytes::from(encoded.expect("encoding into memory fails for no type of the core"))
}

/// Returns the level of an encoding in the format [`LEVELED`], and what follows it. None: it has
/// none.
///
/// # Errors
///
/// When it is of a level or a format that this program does not know.
pub fn split_leveled<'a>(
    bytes: &'a [u8],
    what: &'static str,
) -> Result<Option<(u16, &'a [u8])>, StoreError> {
    // Later formats have their level in this place too: so a newer program is told from damage.
    let Some((&format, body)) = bytes
        .split_first()
        .filter(|(format, _)| **format >= LEVELED)
    else {
        return Ok(None);
    };
    let (uses, rest): (u16, _) = take_body(body, what)?;
    ensure_known(what, uses)?;
    if format > LEVELED {
        let reason = format!("format {format} is unknown to this version");
        return Err(StoreError::Undecodable { what, reason });
    }
    Ok(Some((uses, rest)))
}

/// Returns an error if what says that it is of level `uses` may not be readable here.
fn ensure_known(what: &'static str, uses: u16) -> Result<(), StoreError> {
    if uses <= LEVEL {
        Ok(())
    } else {
        Err(StoreError::TooOld {
            what,
            too_old: TooOld::new(uses, LEVEL),
        })
    }
}

/// The format of an encoding, and what it is without its format byte: for a type whose newest
/// format is `newest`.
pub fn split<'a>(
    bytes: &'a [u8],
    newest: u8,
    what: &'static str,
) -> Result<(u8, &'a [u8]), StoreError> {
    let undecodable = |reason: String| StoreError::Undecodable { what, reason };
    match bytes.split_first() {
        Some((&format, body)) if (FORMAT..=newest).contains(&format) => Ok((format, body)),
        Some((format, _)) => Err(undecodable(format!(
            "format {format} is unknown to this version"
        ))),
        None => Err(undecodable("it is empty".into())),
    }
}

/// Reads the whole of what [`split`] has cut off.
pub fn decode_body<'a, T: Deserialize<'a>>(
    body: &'a [u8],
    what: &'static str,
) -> Result<T, StoreError> {
    let (value, rest) = take_body(body, what)?;

    // Bytes that nobody has read are damage, or of a newer program: never passed over.
    if rest.is_empty() {
        return Ok(value);
    }
    Err(StoreError::Undecodable {
        what,
        reason: format!("{} bytes too many", rest.len()),
    })
}

/// Reads what [`encode`] wrote. `what` names it in the error.
pub fn decode<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
    what: &'static str,
) -> Result<T, StoreError> {
    decode_body(split(bytes, FORMAT, what)?.1, what)
}

/// Bytes of memory that one encoded byte (a length, a variant or a number) can turn into: list
/// elements take few encoded bytes, and lists grow by doubling.
const MADE_PER_BYTE: usize = 96;

/// Bytes are paid for in such steps, and what is small not at all.
const CHARGE_STEP_BYTES: usize = 16 << 10;

/// As [`decode`], for what others sent: a byte of it can become many in memory. `charge` is asked
/// for these before they are taken, at least for as many as they are.
///
/// # Errors
///
/// Also when `charge` refuses.
pub fn decode_charged<T: DeserializeOwned>(
    bytes: &[u8],
    what: &'static str,
    charge: &mut dyn FnMut(usize) -> bool,
) -> Result<T, StoreError> {
    let undecodable = |error: postcard::Error| StoreError::Undecodable {
        what,
        reason: error.to_string(),
    };
    let metered = MeteredBytes {
        rest: split(bytes, FORMAT, what)?.1,
        uncharged_bytes: 0,
        charge,
    };
    let mut deserializer = postcard::Deserializer::from_flavor(metered);
    let value = T::deserialize(&mut deserializer).map_err(undecodable)?;
    match deserializer.finalize().map_err(undecodable)? {
        0 => Ok(value),
        left => Err(StoreError::Undecodable {
            what,
            reason: format!("{left} bytes too many"),
        }),
    }
}

/// Bytes that are paid for while they are read.
struct MeteredBytes<'de> {
    rest: &'de [u8],
    /// Bytes that may have been allocated and are not charged yet.
    uncharged_bytes: usize,
    charge: &'de mut dyn FnMut(usize) -> bool,
}

impl MeteredBytes<'_> {
    fn owe(&mut self, bytes: usize) -> postcard::Result<()> {
        self.uncharged_bytes += bytes;
        if self.uncharged_bytes < CHARGE_STEP_BYTES {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.uncharged_bytes);
        if (self.charge)(bytes) {
            Ok(())
        } else {
            Err(postcard::Error::SerdeDeCustom)
        }
    }
}

impl<'de> Flavor<'de> for MeteredBytes<'de> {
    type Remainder = usize;
    type Source = &'de [u8];

    fn pop(&mut self) -> postcard::Result<u8> {
        let (first, rest) = self
            .rest
            .split_first()
            .ok_or(postcard::Error::DeserializeUnexpectedEnd)?;
        self.rest = rest;

        // It may be the length of a list: it is charged for what it can turn into.
        self.owe(MADE_PER_BYTE)?;
        Ok(*first)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.rest.len())
    }

    fn try_take_n(&mut self, count: usize) -> postcard::Result<&'de [u8]> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(postcard::Error::DeserializeUnexpectedEnd)?;
        self.rest = rest;

        // Taken as they are, bytes cost no more than themselves.
        self.owe(count)?;
        Ok(taken)
    }

    fn finalize(self) -> postcard::Result<usize> {
        Ok(self.rest.len())
    }
}

/// Reads the first fields of what [`encode`] wrote, as many as `T` has, and returns the bytes after
/// them.
pub fn decode_first<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
    what: &'static str,
) -> Result<(T, &'a [u8]), StoreError> {
    take_body(split(bytes, FORMAT, what)?.1, what)
}

fn take_body<'a, T: Deserialize<'a>>(
    body: &'a [u8],
    what: &'static str,
) -> Result<(T, &'a [u8]), StoreError> {
    postcard::take_from_bytes(body).map_err(|error| StoreError::Undecodable {
        what,
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_decodes_and_nothing_else_does() {
        let bytes = encode(&(7u32, "seven"));
        assert_eq!(&bytes[..], b"\x01\x07\x05seven");
        assert_eq!(
            decode::<(u32, String)>(&bytes, "a pair").expect("own encoding"),
            (7, "seven".to_owned())
        );
        let error = |bytes: &[u8]| {
            decode::<(u32, String)>(bytes, "a pair")
                .expect_err("not an encoding")
                .to_string()
        };
        assert!(error(b"").contains("empty"));
        assert!(error(b"\x02\x07\x05seven").contains("format 2"));
        assert!(error(b"\x01\x07\x05seve").contains("cannot decode a pair"));
        assert!(error(b"\x01\x07\x05sevens").contains("too many"));
    }

    #[test]
    fn what_is_made_of_a_byte_is_paid_for_before_it_is_there() {
        let mut paid = 0;
        let mut decode = |bytes: &[u8], room: usize| {
            paid = 0;
            let decoded = decode_charged::<Vec<Bytes>>(bytes, "a list", &mut |bytes| {
                paid += bytes;
                paid <= room
            });
            (decoded, paid)
        };
        let empty = vec![Bytes::new(); 10_000];
        let (decoded, paid) = decode(&encode(&empty), usize::MAX);
        assert_eq!(decoded.expect("own encoding"), empty);
        assert!(
            paid + CHARGE_STEP_BYTES > 10_000 * 2 * size_of::<Bytes>(),
            "{paid}"
        );
        let (decoded, paid) = decode(&encode(&empty), 100_000);
        assert!(
            decoded.is_err() && paid < 100_000 + 2 * CHARGE_STEP_BYTES,
            "{paid}"
        );

        let few = vec![Bytes::from(vec![1; 100]); 3];
        let (decoded, paid) = decode(&encode(&few), 0);
        assert_eq!((decoded.expect("it is small"), paid), (few.clone(), 0));
        let whole = encode(&few);
        assert!(
            decode(&whole[..whole.len() - 1], 0).0.is_err()
                && decode(&[&whole[..], b"x"].concat(), 0).0.is_err()
        );
    }
}
