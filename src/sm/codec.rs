//! The versioned encodings of everything that the core writes to disk or log: one format-version byte, then postcard.
//!
//! What is written once is read for ever: a new version adds an arm to the reader of its type and keeps the old one. Golden-bytes
//! tests beside each type hold its encoding.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::ports::StoreError;

/// The format written today, by every encoding in the core.
pub const FORMAT: u8 = 1;

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
    let bytes = postcard::to_extend(value, buffer).expect("encoding into memory fails for no type of the core");
    Bytes::from(bytes)
}

/// Reads what [`encode`] wrote. `what` names it in the error.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &'static str) -> Result<T, StoreError> {
    let (value, rest) = decode_first(bytes, what)?;
    if rest.is_empty() {
        return Ok(value);
    }
    Err(StoreError::Undecodable { what, reason: format!("{} bytes too many", rest.len()) })
}

/// Reads the first fields of what [`encode`] wrote, as many as `T` has, and returns the bytes after them.
pub fn decode_first<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &'static str) -> Result<(T, &'a [u8]), StoreError> {
    let undecodable = |reason: String| StoreError::Undecodable { what, reason };
    match bytes.split_first() {
        Some((&FORMAT, body)) => postcard::take_from_bytes(body).map_err(|error| undecodable(error.to_string())),
        Some((version, _)) => Err(undecodable(format!("format {version} is unknown to this version"))),
        None => Err(undecodable("it is empty".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_decodes_and_nothing_else_does() {
        let bytes = encode(&(7u32, "seven"));
        assert_eq!(&bytes[..], b"\x01\x07\x05seven");
        assert_eq!(decode::<(u32, String)>(&bytes, "a pair").expect("own encoding"), (7, "seven".to_owned()));
        let error = |bytes: &[u8]| decode::<(u32, String)>(bytes, "a pair").expect_err("not an encoding").to_string();
        assert!(error(b"").contains("empty"));
        assert!(error(b"\x02\x07\x05seven").contains("format 2"));
        assert!(error(b"\x01\x07\x05seve").contains("cannot decode a pair"));
        assert!(error(b"\x01\x07\x05sevens").contains("too many"));
    }
}
