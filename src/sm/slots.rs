//! Which slot a key is in, how the map of a shard is laid out, and what a shard knows of each slot.
//!
//! Every key of a shard's map begins with a one-byte tag, most go on with the slot (two bytes,
//! big-endian), so that all of a slot lies together and a move can copy and clear it range by
//! range:
//!
//! | tag | key | value |
//! | --- | --- | --- |
//! | 0x00 | reserved for the storage layer's own bookkeeping: the core never writes here | |
//! | 0x01 | group time, and where the sweep of expired requests is | `requests::RequestClock` |
//! | 0x02 | slot | [`SlotState`] |
//! | 0x03 | slot, idempotency key | `requests::RequestRecord` |
//! | 0x04 | slot, group time in ms, idempotency key | what the record costs in bytes |
//! | 0x05 | move id, log index, a key that the entry changed under it | the change's bytes |
//! | 0x06 | move id | `moves::OpenMove` |
//! | 0x07 | why nothing is written to the shard, if nothing is | text |
//! | 0x10 | slot, user key | `kv::Record` |
//!
//! In keys, group times, move ids and log indexes are eight bytes, big-endian.
//!
//! Kept out: what is done with any of it (`kv`, `requests`). The hash, the layout and [`SlotState`]
//! are part of the disk format.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::codec;
use super::ports::{Direction, KeyRange, Read, StoreError, after_prefix};
use crate::mutants::{self, Mutant};
use crate::types::{GroupId, MoveId, Revision, SLOTS, Slot};

/// Keys with this first byte are the storage layer's own.
pub const TAG_RESERVED: u8 = 0x00;
const TAG_CLOCK: u8 = 0x01;
const TAG_STATE: u8 = 0x02;
const TAG_REQUEST: u8 = 0x03;
const TAG_EXPIRY: u8 = 0x04;
const TAG_CHANGE: u8 = 0x05;
const TAG_MOVE: u8 = 0x06;
const TAG_READ_ONLY: u8 = 0x07;
const TAG_DATA: u8 = 0x10;

/// Key under which a shard keeps its clock.
pub const CLOCK_KEY: &[u8] = &[TAG_CLOCK];

/// Key under which a shard keeps the reason why nothing is written.
pub const READ_ONLY_KEY: &[u8] = &[TAG_READ_ONLY];

/// Length of a tag and a slot.
const HEAD: usize = 3;

/// The slot of a key: `xxh3_64` of the key, or of its hash tag where it has one, modulo the number
/// of slots.
pub fn slot_of(key: &[u8]) -> Slot {
    let hash = xxh3_64(hash_tag(key).unwrap_or(key)) % u64::from(SLOTS);
    let number = u16::try_from(hash).ok().and_then(Slot::new);
    number.expect("a remainder is below its divisor")
}

/// Returns the text between the first `{` and the first `}` after it, if not empty: the rule of
/// Redis Cluster. Keys with the same tag are in the same slot, and so can be written together in
/// one entry.
fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    let open = key.iter().position(|byte| *byte == b'{')?;
    let rest = &key[open + 1..];
    let close = rest.iter().position(|byte| *byte == b'}')?;
    (close > 0).then(|| &rest[..close])
}

/// State of a slot at a shard. Part of the disk format. Absent from the map means the default: not
/// owned, never owned before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    pub ownership: Ownership,
    /// The highest move id that the shard ever held for the slot; it outlives the drop of the slot.
    /// 0: no move ever touched it.
    pub generation: MoveId,
    /// The shard that got it by the last move seen here: a hint for callers.
    pub moved_to: Option<(MoveId, GroupId)>,
    pub contents: SlotContents,
    pub requests: RequestsUsed,
}

/// A shard's hold on a slot. Owned and leaving slots are read and written, frozen ones are read,
/// the others neither.
///
/// A leaving, frozen or arriving slot is in a move that is open in this shard: its id is the slot's
/// generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ownership {
    #[default]
    NotOwned,
    Owned,
    /// A move holds writes back.
    Frozen,
    /// As owned, but a move copies it, and its changes are marked.
    Leaving,
    /// A move installs it here.
    Arriving,
}

/// Exact counts of what is in a slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotContents {
    /// The revision of the last change, deletions included: the next change gets the next one, so
    /// none is ever used twice.
    pub revision: Revision,
    pub keys: u64,
    /// Bytes of all user keys and stored records.
    pub bytes: u64,
}

/// Space that the remembered requests of a slot take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestsUsed {
    pub bytes: u64,
    /// No record of the slot is older than this group time.
    pub since_ms: u64,
}

impl SlotContents {
    /// Counts a key whose record had `before` bytes and will have `after`. None where less was
    /// counted than there was.
    pub fn recount(
        &mut self,
        key_bytes: usize,
        before: Option<usize>,
        after: Option<usize>,
    ) -> Option<()> {
        // A count below zero means a damaged map, which must come to light.
        if let Some(before) = before {
            self.keys = self.keys.checked_sub(1)?;
            self.bytes = self.bytes.checked_sub((key_bytes + before) as u64)?;
        }
        if let Some(after) = after {
            self.keys += 1;
            self.bytes += (key_bytes + after) as u64;
        }
        Some(())
    }
}

impl SlotState {
    /// Returns true if the shard answers reads of the slot.
    pub fn serves_reads(&self) -> bool {
        if self.moved_to.is_some() && mutants::is_on(Mutant::ReleasedSlotServed) {
            return true;
        }
        match self.ownership {
            Ownership::Owned | Ownership::Leaving | Ownership::Frozen => true,
            Ownership::NotOwned | Ownership::Arriving => false,
        }
    }

    /// The move for which changes of the slot are marked.
    pub fn marked_for(&self) -> Option<MoveId> {
        match self.ownership {
            Ownership::Leaving | Ownership::Frozen => Some(self.generation),
            Ownership::NotOwned | Ownership::Owned | Ownership::Arriving => None,
        }
    }

    /// Asserts what holds of every state that an entry has written.
    ///
    /// Not for a state that was only read: a damaged disk may hold anything.
    pub fn check_invariants(&self, slot: Slot) {
        assert!(
            self.moved_to.is_none_or(|(by, _)| by <= self.generation),
            "slot {slot} was moved by a later move than it ever saw"
        );
        assert!(
            self.contents.keys > 0 || self.contents.bytes == 0,
            "slot {slot} counts bytes and no keys"
        );
        assert!(
            self.contents.bytes >= self.contents.keys,
            "slot {slot} counts more keys than bytes"
        );
    }

    pub fn encode(&self) -> Bytes {
        codec::encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode(bytes, "a slot state")
    }

    /// The state of `slot` in a shard's map.
    pub fn read(read: &impl Read, slot: Slot) -> Result<Self, StoreError> {
        read.get(&state_key(slot))?
            .map_or(Ok(Self::default()), |bytes| Self::decode(&bytes))
    }

    /// Every state in a shard's map, in slot order, by one scan. Slots that the shard never held
    /// are left out.
    pub fn read_all(read: &impl Read) -> Result<Vec<(Slot, SlotState)>, StoreError> {
        let pairs = read.scan(&KeyRange::prefix(&[TAG_STATE]), Direction::Forward);
        let states = pairs.map(|pair| {
            let (key, value) = pair?;
            let slot = parse_state_key(&key).ok_or_else(|| misplaced(&key))?;
            Ok((slot, Self::decode(&value)?))
        });
        states.collect()
    }
}

/// The error for a key that is not laid out as its tag says.
pub(super) fn misplaced(key: &[u8]) -> StoreError {
    StoreError::Damaged(format!(
        "the map holds a key of unknown form: {}",
        key.escape_ascii()
    ))
}

fn head(tag: u8, slot: Slot) -> [u8; HEAD] {
    // Big-endian, so that keys lie in the order of their slots.
    let [high, low] = slot.number().to_be_bytes();
    [tag, high, low]
}

fn joined(tag: u8, slot: Slot, tail: &[u8]) -> Bytes {
    let mut key = BytesMut::with_capacity(HEAD + tail.len());
    key.put_slice(&head(tag, slot));
    key.put_slice(tail);
    key.freeze()
}

/// The slot of a key with this tag, if it has one.
fn parse_head(tag: u8, key: &[u8]) -> Option<Slot> {
    match key {
        [first, high, low, ..] if *first == tag => Slot::new(u16::from_be_bytes([*high, *low])),
        _ => None,
    }
}

/// Returns the key under which a shard keeps the record of a user key.
pub fn data_key(slot: Slot, user_key: &[u8]) -> Bytes {
    joined(TAG_DATA, slot, user_key)
}

/// The slot and user key of a [`data_key`]; shares its bytes.
pub fn parse_data_key(key: &Bytes) -> Option<(Slot, Bytes)> {
    parse_head(TAG_DATA, key).map(|slot| (slot, key.slice(HEAD..)))
}

/// Every data key of a shard's map.
pub fn all_data() -> KeyRange {
    KeyRange::prefix(&[TAG_DATA])
}

/// The data keys of `slot` whose user keys are in `range`.
pub fn data_range(slot: Slot, range: &KeyRange) -> KeyRange {
    let end = range
        .end
        .as_ref()
        .map(|end| data_key(slot, end))
        .or_else(|| after_prefix(&head(TAG_DATA, slot)));
    KeyRange {
        start: data_key(slot, &range.start),
        end,
    }
}

/// Returns the key under which a shard keeps the [`SlotState`] of a slot.
pub fn state_key(slot: Slot) -> [u8; HEAD] {
    head(TAG_STATE, slot)
}

pub fn parse_state_key(key: &[u8]) -> Option<Slot> {
    parse_head(TAG_STATE, key).filter(|_| key.len() == HEAD)
}

/// Returns the key under which a shard keeps the record of an answered request.
pub fn request_key(slot: Slot, idempotency_key: &[u8]) -> Bytes {
    joined(TAG_REQUEST, slot, idempotency_key)
}

/// The slot and idempotency key of a [`request_key`]; shares its bytes.
pub fn parse_request_key(key: &Bytes) -> Option<(Slot, Bytes)> {
    parse_head(TAG_REQUEST, key).map(|slot| (slot, key.slice(HEAD..)))
}

/// The records of every request answered in `slot`.
pub fn request_range(slot: Slot) -> KeyRange {
    KeyRange::prefix(&head(TAG_REQUEST, slot))
}

/// The entry of a request's record in the index by age.
pub fn expiry_key(slot: Slot, time_ms: u64, idempotency_key: &[u8]) -> Bytes {
    let mut key = BytesMut::with_capacity(HEAD + 8 + idempotency_key.len());
    key.put_slice(&head(TAG_EXPIRY, slot));

    // Big-endian, so that the oldest come first.
    key.put_u64(time_ms);
    key.put_slice(idempotency_key);
    key.freeze()
}

/// The slot, group time and idempotency key of an [`expiry_key`]; shares its bytes.
pub fn parse_expiry_key(key: &Bytes) -> Option<(Slot, u64, Bytes)> {
    let slot = parse_head(TAG_EXPIRY, key)?;
    let (time, _) = key[HEAD..].split_first_chunk::<8>()?;
    Some((slot, u64::from_be_bytes(*time), key.slice(HEAD + 8..)))
}

/// The index by age of the requests answered in `slot`, oldest first.
pub fn expiry_range(slot: Slot) -> KeyRange {
    KeyRange::prefix(&head(TAG_EXPIRY, slot))
}

/// The index by age of the requests answered in `slot` and those after it.
pub fn expiry_range_from(slot: Slot) -> KeyRange {
    KeyRange {
        start: Bytes::copy_from_slice(&head(TAG_EXPIRY, slot)),
        end: after_prefix(&[TAG_EXPIRY]),
    }
}

/// The mark that `map_key` was changed by the entry at `index`, for a move. The marks of a move are
/// in the order of its log.
pub fn change_key(id: MoveId, index: u64, map_key: &[u8]) -> Bytes {
    let mut key = BytesMut::with_capacity(17 + map_key.len());
    key.put_u8(TAG_CHANGE);
    key.put_u64(id.0);
    key.put_u64(index);
    key.put_slice(map_key);
    key.freeze()
}

/// The move and the changed key of a [`change_key`]; shares its bytes.
pub fn parse_change_key(key: &Bytes) -> Option<(MoveId, Bytes)> {
    let (id, rest) = key.strip_prefix(&[TAG_CHANGE])?.split_first_chunk::<8>()?;
    (rest.len() > 8).then(|| (MoveId(u64::from_be_bytes(*id)), key.slice(17..)))
}

/// Encodes the value of a change mark: the bytes of the changed key and its value.
pub fn change_value(bytes: usize) -> Bytes {
    codec::encode(&(bytes as u64))
}

/// Approximate bytes that a mark costs besides the change itself.
const CHANGE_OVERHEAD_BYTES: u64 = 64;

/// Returns the weight of copying the change of a mark: its bytes and an overhead, so that many
/// small changes count too.
pub fn change_weight(value: &[u8]) -> Result<u64, StoreError> {
    codec::decode(value, "the mark of a change")
        .map(|bytes: u64| bytes.saturating_add(CHANGE_OVERHEAD_BYTES))
}

/// The marks of a move.
pub fn change_range(id: MoveId) -> KeyRange {
    let mut prefix = [TAG_CHANGE; 9];
    prefix[1..].copy_from_slice(&id.0.to_be_bytes());
    KeyRange::prefix(&prefix)
}

/// The marks of this move and of those with higher ids.
pub fn change_range_from(id: MoveId) -> KeyRange {
    KeyRange {
        start: change_range(id).start,
        end: after_prefix(&[TAG_CHANGE]),
    }
}

/// Returns the key under which a shard keeps an open move.
pub fn move_key(id: MoveId) -> Bytes {
    let mut key = BytesMut::with_capacity(9);
    key.put_u8(TAG_MOVE);
    key.put_u64(id.0);
    key.freeze()
}

pub fn parse_move_key(key: &[u8]) -> Option<MoveId> {
    let id = key.strip_prefix(&[TAG_MOVE])?;
    id.try_into().ok().map(|id| MoveId(u64::from_be_bytes(id)))
}

/// Every open move of a shard's map.
pub fn all_moves() -> KeyRange {
    KeyRange::prefix(&[TAG_MOVE])
}

/// The slot of a key that holds data or the record of a request: what a move copies.
pub fn slot_of_copied(map_key: &[u8]) -> Option<Slot> {
    parse_head(TAG_DATA, map_key).or_else(|| parse_head(TAG_REQUEST, map_key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(number: u16) -> Slot {
        Slot::new(number).expect("a slot number")
    }

    #[test]
    fn the_hash_is_part_of_the_disk_format() {
        let table: [(&[u8], u16); 5] = [
            (b"", 1218),
            (b"a", 3615),
            (b"k1", 1733),
            (b"hello", 3325),
            ("ключ".as_bytes(), 3806),
        ];
        let found = table.map(|(key, _)| (key, slot_of(key).number()));
        assert_eq!(found, table);
    }

    #[test]
    fn keys_with_one_hash_tag_share_a_slot() {
        let same = |a: &str, b: &str| slot_of(a.as_bytes()) == slot_of(b.as_bytes());
        assert!(same("{user1}.name", "{user1}.mail"));
        assert!(same("x{user1}y", "user1"));
        assert!(same("{a}{b}", "a"));
        assert!(same("{{a}", "{a"), "the tag runs from the first brace");
        assert!(
            same("}{a}", "a"),
            "a closing brace before the opening one is not its end"
        );
        for whole in ["{}a", "{a", "a}", "}a{"] {
            assert_eq!(hash_tag(whole.as_bytes()), None, "{whole} has no tag");
        }
    }

    #[test]
    fn keys_parse_as_they_are_built_and_keep_to_their_range() {
        for number in [0, 1, 255, 256, SLOTS - 1] {
            let s = slot(number);
            for user in [&b""[..], b"k", b"\xff\xff", b"\x00"] {
                let data = data_key(s, user);
                assert_eq!(
                    parse_data_key(&data),
                    Some((s, Bytes::copy_from_slice(user)))
                );
                let range = data_range(s, &KeyRange::all());
                assert!(range.start <= data && range.end.is_some_and(|end| data < end));
                let request = request_key(s, user);
                assert_eq!(
                    parse_request_key(&request),
                    Some((s, Bytes::copy_from_slice(user)))
                );
                let expiry = expiry_key(s, 7, user);
                assert_eq!(
                    parse_expiry_key(&expiry),
                    Some((s, 7, Bytes::copy_from_slice(user)))
                );
                assert!(parse_data_key(&request).is_none() && parse_request_key(&expiry).is_none());
            }
            assert_eq!(parse_state_key(&state_key(s)), Some(s));
        }
        assert_eq!(
            parse_state_key(&[TAG_STATE, 0x10, 0x00]),
            None,
            "past the last slot"
        );
        assert_eq!(
            parse_expiry_key(&Bytes::from_static(&[TAG_EXPIRY, 0, 0, 1])),
            None,
            "cut short"
        );
        assert!(
            expiry_key(slot(1), 255, b"z") < expiry_key(slot(1), 256, b"a"),
            "older ones come first"
        );
    }

    #[test]
    fn the_encoding_of_a_slot_state_stands() {
        let state = SlotState {
            ownership: Ownership::Frozen,
            generation: MoveId(5),
            moved_to: Some((MoveId(6), GroupId(7))),
            contents: SlotContents {
                revision: Revision(300),
                keys: 2,
                bytes: 3,
            },
            requests: RequestsUsed {
                bytes: 4,
                since_ms: 1,
            },
        };
        assert_eq!(
            &state.encode()[..],
            b"\x01\x02\x05\x01\x06\x07\xac\x02\x02\x03\x04\x01"
        );
        assert_eq!(
            SlotState::decode(&state.encode()).expect("own encoding"),
            state
        );
        assert_eq!(
            &SlotState::default().encode()[..],
            b"\x01\x00\x00\x00\x00\x00\x00\x00\x00"
        );
        assert!(SlotState::decode(b"\x02").is_err());
        let table = [
            (Ownership::NotOwned, 0, false, None),
            (Ownership::Owned, 1, true, None),
            (Ownership::Frozen, 2, true, Some(MoveId(5))),
            (Ownership::Leaving, 3, true, Some(MoveId(5))),
            (Ownership::Arriving, 4, false, None),
        ];
        for (ownership, byte, serves_reads, marked_for) in table {
            let state = SlotState { ownership, ..state };
            assert_eq!(state.encode()[1], byte);
            assert_eq!(
                (state.serves_reads(), state.marked_for()),
                (serves_reads, marked_for)
            );
        }
    }
}
