//! What is read of a shard's map outside of its log. Ownership and data come from the same [`Read`], so both are of one point in time.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use bytes::Bytes;

use super::Record;
use super::record::decode_record;
use crate::sm::ports::{Direction, KeyRange, Pairs, Read, StoreError};
use crate::sm::slots::{SlotState, data_key, data_range, misplaced, parse_data_key, slot_of};
use crate::types::{GroupId, MoveId, Slot};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadOutcome {
    /// `moved_to`: who got the slot by the last move seen here.
    NotOwned { slot: Slot, moved_to: Option<(MoveId, GroupId)> },
    /// The key's record, if there is one.
    Owned(Option<Record>),
}

/// The record of `key`, if the shard owns its slot.
pub fn read(read: &impl Read, key: &[u8]) -> Result<ReadOutcome, StoreError> {
    let slot = slot_of(key);
    let state = SlotState::read(read, slot)?;
    if !state.serves_reads() {
        return Ok(ReadOutcome::NotOwned { slot, moved_to: state.moved_to });
    }
    let record = read.get(&data_key(slot, key))?;
    record.as_ref().map(decode_record).transpose().map(ReadOutcome::Owned)
}

/// What a shard holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    pub keys: u64,
    /// Bytes of all user keys and stored records.
    pub bytes: u64,
    /// The slots that the shard owns: only what is in them is counted.
    pub slots: Vec<Slot>,
}

/// Counts the keys in the slots that the shard owns, by the counters it keeps.
pub fn count(read: &impl Read) -> Result<Counts, StoreError> {
    let owned = owned_states(read)?;
    let keys = owned.iter().map(|(_, state)| state.contents.keys).sum();
    let bytes = owned.iter().map(|(_, state)| state.contents.bytes).sum();
    let slots = owned.into_iter().map(|(slot, _)| slot).collect();
    Ok(Counts { keys, bytes, slots })
}

fn owned_states(read: &impl Read) -> Result<Vec<(Slot, SlotState)>, StoreError> {
    let mut states = SlotState::read_all(read)?;
    states.retain(|(_, state)| state.serves_reads());
    Ok(states)
}

/// Which page of a shard's keys is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// Of user keys.
    pub range: KeyRange,
    pub direction: Direction,
    /// At most this many items; none counts as one.
    pub limit: usize,
    /// The page ends with the item that brings its keys and values to this many bytes. It has one item at least, if there is any.
    pub bytes_max: usize,
    /// Leave the values out.
    pub keys_only: bool,
}

/// A page of a shard's keys, in the order of user keys (or its reverse).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanPage {
    /// With an empty value where only keys were asked for.
    pub items: Vec<(Bytes, Record)>,
    /// There is more in the range, after the last item in the direction of the scan.
    pub more: bool,
    /// The slots that the shard owns: keys of others are not in the page.
    pub slots: Vec<Slot>,
}

/// A page of the keys in the slots that the shard owns: a merge of the slots that have any, each read as far as the page reaches.
pub fn scan_page(read: &impl Read, request: &PageRequest) -> Result<ScanPage, StoreError> {
    let owned = owned_states(read)?;
    let mut heads = BinaryHeap::new();
    let filled = owned.iter().filter(|(_, state)| state.contents.keys > 0 && !request.range.is_empty());
    for (slot, _) in filled {
        let pairs = read.scan(&data_range(*slot, &request.range), request.direction);
        heads.extend(Head::next_of(pairs, request.direction)?);
    }
    let mut items = Vec::new();
    let mut bytes = 0;
    while items.len() < request.limit.max(1) && (items.is_empty() || bytes < request.bytes_max) {
        let Some(head) = heads.pop() else { break };
        let mut record = decode_record(&head.value)?;
        if request.keys_only {
            record.value = Bytes::new();
        }
        bytes += head.user_key.len() + record.value.len();
        items.push((head.user_key, record));
        heads.extend(Head::next_of(head.pairs, request.direction)?);
    }
    let slots = owned.into_iter().map(|(slot, _)| slot).collect();
    Ok(ScanPage { items, more: !heads.is_empty(), slots })
}

/// The next pair of a slot in a merge, and where the ones after it come from. The greatest comes first.
struct Head<'a> {
    user_key: Bytes,
    value: Bytes,
    pairs: Pairs<'a>,
    direction: Direction,
}

impl<'a> Head<'a> {
    fn next_of(mut pairs: Pairs<'a>, direction: Direction) -> Result<Option<Self>, StoreError> {
        let Some((key, value)) = pairs.next().transpose()? else { return Ok(None) };
        let (_, user_key) = parse_data_key(&key).ok_or_else(|| misplaced(&key))?;
        Ok(Some(Self { user_key, value, pairs, direction }))
    }
}

impl Ord for Head<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        match self.direction {
            Direction::Forward => other.user_key.cmp(&self.user_key),
            Direction::Reverse => self.user_key.cmp(&other.user_key),
        }
    }
}

impl PartialOrd for Head<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head<'_> {}
