//! [`TreeRecord`]: what a tree says of itself, under a reserved key, in the same batch as the pairs
//! that it speaks of.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::Applied;
use super::digest::Digest;
use crate::sm::codec;
use crate::sm::ports::{KeyRange, StoreError};
use crate::storage::ReplicaKey;

/// The first byte of the keys that are the tree's own. The core's keys never begin with it, and
/// nobody above sees one that does.
pub const RESERVED: u8 = 0;

/// Key of the record.
pub const RECORD_KEY: &[u8] = b"\0record";

/// The least key that the core may use.
pub const CORE_KEYS_START: &[u8] = &[RESERVED + 1];

/// Returns the part of `range` in which the map's keys are: those before are the tree's own
/// records, and no part of the map.
pub fn core_keys(range: &KeyRange) -> KeyRange {
    KeyRange {
        start: range.start.clone().max(Bytes::from_static(CORE_KEYS_START)),
        end: range.end.clone(),
    }
}

/// The state of the tree as of its last batch. A tree without one is empty, or was never finished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeRecord {
    pub key: ReplicaKey,
    pub generation: u64,
    pub applied: Applied,
    /// Of the core's pairs: the reserved ones are not in it.
    pub digest: Digest,
}

impl TreeRecord {
    pub fn encode(&self) -> Bytes {
        let mut bytes = codec::encode(self).to_vec();
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        Bytes::from(bytes)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        let damaged =
            || StoreError::Damaged("the record of a tree does not match its checksum".into());
        let (body, checksum) = bytes.split_last_chunk::<8>().ok_or_else(damaged)?;
        if xxh3_64(body) != u64::from_le_bytes(*checksum) {
            return Err(damaged());
        }
        codec::decode(body, "the record of a tree")
    }
}

/// The name of a replica's tree.
pub fn tree_name(key: ReplicaKey, generation: u64) -> String {
    format!("{key}.{generation}")
}

/// The generation that a tree of this name is, if it is one of this replica's.
pub fn generation_of(key: ReplicaKey, name: &str) -> Option<u64> {
    let generation = name
        .strip_prefix(&key.to_string())?
        .strip_prefix('.')?
        .parse()
        .ok()?;
    (tree_name(key, generation) == name).then_some(generation)
}

/// The replica whose tree has this name, whatever the generation.
pub fn owner_of(name: &str) -> Option<ReplicaKey> {
    let key = ReplicaKey::parse(name.split_once('.')?.0)?;
    generation_of(key, name).map(|_| key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::testing::{hex, unhex};
    use crate::types::{GroupId, LogId, ReplicaId};

    /// Of the first format, as it was written first and is read for ever.
    const GOLDEN: &str = "01010503010209016d0107f1519962bbdbb399";

    #[test]
    fn a_record_reads_back_and_any_flipped_bit_is_seen() {
        let key = ReplicaKey {
            group: GroupId(1),
            replica: ReplicaId(5),
        };
        let applied = Applied {
            log_id: Some(LogId { term: 2, index: 9 }),
            membership: Bytes::from_static(b"m"),
        };
        let record = TreeRecord {
            key,
            generation: 3,
            applied,
            digest: Digest { pairs: 1, sum: 7 },
        };
        let bytes = record.encode();
        assert_eq!(
            hex(&bytes),
            GOLDEN,
            "the disk format has changed: write a new one beside the old"
        );
        assert_eq!(
            TreeRecord::decode(&unhex(GOLDEN)).expect("the first format"),
            record
        );
        assert_eq!(TreeRecord::decode(&bytes).expect("own encoding"), record);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(TreeRecord::decode(&flipped).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(TreeRecord::decode(&bytes[..len]).is_err());
        }
    }

    #[test]
    fn tree_names_name_one_replica() {
        let key = ReplicaKey {
            group: GroupId(1),
            replica: ReplicaId(5),
        };
        assert_eq!(tree_name(key, 12), "g1-r5.12");
        assert_eq!(generation_of(key, "g1-r5.12"), Some(12));
        for other in [
            "g1-r51.2",
            "g11-r5.2",
            "g1-r5.",
            "g1-r5.+1",
            "g1-r5.01",
            "__sled__default",
        ] {
            assert_eq!(generation_of(key, other), None, "{other}");
        }
    }
}
