//! [`Digest`]: a fingerprint of a whole map that is kept up to date change by change.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

/// The wrapping sum of a 128-bit hash of every pair, and their number. Independent of order, so
/// that a pair can be taken out again.
///
/// It finds accidents (lost, doubled, torn or flipped pairs), not forgery: whoever can write the
/// files can write the digest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    pub pairs: u64,
    pub sum: u128,
}

impl Digest {
    pub fn add(&mut self, hash: PairHash) {
        self.pairs = self.pairs.wrapping_add(1);
        self.sum = self.sum.wrapping_add(hash.0);
    }

    pub fn subtract(&mut self, hash: PairHash) {
        self.pairs = self.pairs.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(hash.0);
    }
}

/// The hash of one pair.
#[derive(Debug, Clone, Copy)]
pub struct PairHash(u128);

/// Hashes pairs, with a buffer that it keeps: one contiguous input is several times faster than a
/// streamed one for small pairs.
#[derive(Default)]
pub struct PairHasher {
    buffer: Vec<u8>,
}

impl PairHasher {
    /// The key's length goes first, so that no two pairs have the same input.
    pub fn hash(&mut self, key: &[u8], value: &[u8]) -> PairHash {
        self.buffer.clear();
        self.buffer
            .extend_from_slice(&(key.len() as u64).to_le_bytes());
        self.buffer.extend_from_slice(key);
        self.buffer.extend_from_slice(value);
        PairHash(xxh3_128(&self.buffer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_forgets_order_and_what_was_taken_out_but_not_where_a_key_ends() {
        let mut hasher = PairHasher::default();
        let (mut one, mut other) = (Digest::default(), Digest::default());
        one.add(hasher.hash(b"a", b"1"));
        one.add(hasher.hash(b"b", b"2"));
        other.add(hasher.hash(b"b", b"2"));
        other.add(hasher.hash(b"c", b"3"));
        other.add(hasher.hash(b"a", b"1"));
        assert_ne!(one, other);
        other.subtract(hasher.hash(b"c", b"3"));
        assert_eq!(one, other);
        assert_ne!(hasher.hash(b"ab", b"c").0, hasher.hash(b"a", b"bc").0);
        // Part of the disk format.
        assert_eq!(
            hasher.hash(b"key", b"value").0,
            xxh3_128(b"\x03\0\0\0\0\0\0\0keyvalue")
        );
    }
}
