//! How a large value lies in a tree of sled: cut into pieces, under keys of their own, with a stub
//! in its place.
//!
//! sled writes a page that outgrows an eighth of a mebibyte to a file of its own, and counts it in
//! its cache for the few bytes of that file's name: large values stayed in memory for ever, all of
//! them. Sixteen values make a page, so no value in a tree is larger than [`PIECE_BYTES`].
//!
//! Each value that is cut gets a set of pieces of its own, written before its stub; those of the
//! value that was there before are deleted after it. So whatever sled loses from the end of its
//! log, a stub has all of its pieces. A reader that finds a piece gone looks at the stub again:
//! there is a newer one. Values that were written whole by earlier programs are read as they are.
//! Kept out: what reads and writes trees (`sled_tree`).

use bytes::Bytes;

/// Larger values are cut. Sixteen of these with their keys are less than an eighth of a mebibyte.
pub const PIECE_BYTES: usize = 6 << 10;

/// No value of the core, and none of the storage layer, begins so: they begin with a format.
const MARK: u8 = 0xff;
const FORMAT: u8 = 1;

/// Bytes from the beginning of a value that its stub holds.
const START_BYTES: usize = 512;

/// Mark, format, set and length.
const HEAD_BYTES: usize = 2 + 8 + 8;

/// Keys with this prefix are pieces. The storage layer has the first byte to itself.
const PIECES: [u8; 2] = [0, 0xfe];
/// The first key after all pieces.
pub const AFTER_PIECES: [u8; 2] = [0, 0xff];

/// Stands in the place of a value that is cut into pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stub {
    set: u64,
    pub len: usize,
    /// The beginning of the value.
    pub start: Bytes,
}

/// Returns whether a value is to be cut: it is large, or would be taken for a stub.
pub fn is_split(value: &[u8]) -> bool {
    value.len() > PIECE_BYTES || value.first() == Some(&MARK)
}

/// Returns whether a key is that of a piece.
pub fn is_piece(key: &[u8]) -> bool {
    key.starts_with(&PIECES)
}

/// Returns the first key that a piece could have.
pub fn first_piece() -> &'static [u8] {
    &PIECES
}

impl Stub {
    pub fn new(set: u64, value: &[u8]) -> Self {
        let start = Bytes::copy_from_slice(&value[..value.len().min(START_BYTES)]);
        Self {
            set,
            len: value.len(),
            start,
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.start.len());
        bytes.extend([MARK, FORMAT]);
        bytes.extend(self.set.to_be_bytes());
        bytes.extend((self.len as u64).to_be_bytes());
        bytes.extend_from_slice(&self.start);
        bytes
    }

    /// None: it is a value.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (set, rest) = bytes
            .strip_prefix(&[MARK, FORMAT])?
            .split_first_chunk::<8>()?;
        let (len, start) = rest.split_first_chunk::<8>()?;
        let len = usize::try_from(u64::from_be_bytes(*len)).ok()?;
        let is_whole = start.len() == len.min(START_BYTES);
        is_whole.then(|| Self {
            set: u64::from_be_bytes(*set),
            len,
            start: Bytes::copy_from_slice(start),
        })
    }

    /// Returns the keys of its pieces, in the order of the value.
    pub fn piece_keys(&self) -> impl Iterator<Item = Vec<u8>> + use<> {
        let set = self.set;
        let count = u32::try_from(self.len.div_ceil(PIECE_BYTES)).unwrap_or(u32::MAX);
        (0..count).map(move |n| [&PIECES[..], &set.to_be_bytes(), &n.to_be_bytes()].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_of_a_stub_stands() {
        let value = [b"start".repeat(2000), vec![7; 5000]].concat();
        let stub = Stub::new(0x0102_0304_0506_0708, &value);
        let bytes = stub.encode();
        assert_eq!(
            bytes[..18],
            *b"\xff\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x3a\x98"
        );
        assert_eq!(bytes[18..], value[..512]);
        assert_eq!(Stub::decode(&bytes).as_ref(), Some(&stub));
        let keys: Vec<Vec<u8>> = stub.piece_keys().collect();
        assert_eq!(keys.len(), 3);
        assert_eq!(keys[1], b"\0\xfe\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x01");
        assert!(
            keys.iter()
                .all(|key| is_piece(key) && key[..] < AFTER_PIECES[..])
        );
    }

    #[test]
    fn a_value_is_taken_for_no_stub() {
        for value in [
            &b""[..],
            b"v",
            b"\x01record",
            b"\xff",
            b"\xff\x01",
            &[0xff; 600],
        ] {
            assert_eq!(Stub::decode(value), None, "{value:?}");
        }
        let small = Stub::new(1, b"\xff").encode();
        assert!(
            is_split(b"\xff")
                && is_split(&small)
                && is_split(&[0; PIECE_BYTES + 1])
                && !is_split(&[0; PIECE_BYTES])
        );
        assert_eq!(
            Stub::decode(&small).map(|stub| (stub.len, stub.piece_keys().count())),
            Some((1, 1))
        );
    }
}
