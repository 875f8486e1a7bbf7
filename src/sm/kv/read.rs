//! What is read of a shard's map outside of its log. Ownership and data come from the same
//! [`Read`], so both are of one point in time.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

use bytes::Bytes;

use super::answers::START_BYTES;
use super::command::Record;
use super::record::{decode_head, decode_record};
use crate::sm::codec;
use crate::sm::ports::{Direction, Items, KeyRange, Read, StoreError, ValueStart};
use crate::sm::slots::{
    READ_ONLY_KEY, SlotState, data_key, data_range, misplaced, parse_data_key, slot_of,
};
use crate::types::{GroupId, MoveId, Slot};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadOutcome {
    /// `moved_to`: who got the slot by the last move seen here.
    NotOwned {
        slot: Slot,
        moved_to: Option<(MoveId, GroupId)>,
    },
    /// The key's record, if there is one.
    Owned(Option<Record>),
}

/// Returns why nothing is written to the shard, if its map says so.
pub fn read_only(read: &impl Read) -> Result<Option<String>, StoreError> {
    let stored = read.get(READ_ONLY_KEY)?;
    stored
        .map(|stored| codec::decode(&stored, "why a shard is read-only"))
        .transpose()
}

/// The record of `key`, if the shard owns its slot.
pub fn read(read: &impl Read, key: &[u8]) -> Result<ReadOutcome, StoreError> {
    Ok(match find(read, key)? {
        FindOutcome::NotOwned { slot, moved_to } => ReadOutcome::NotOwned { slot, moved_to },
        FindOutcome::Owned(found) => {
            ReadOutcome::Owned(found.map(|found| found.load(read, false)).transpose()?)
        }
    })
}

/// As [`ReadOutcome`], before a value is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FindOutcome {
    NotOwned {
        slot: Slot,
        moved_to: Option<(MoveId, GroupId)>,
    },
    Owned(Option<FoundKey>),
}

/// A key that exists. To be loaded from the map in which it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundKey {
    data_key: Bytes,
    stored: ValueStart,
}

impl FoundKey {
    /// Returns the bytes of its record.
    pub fn bytes(&self) -> usize {
        self.stored.len
    }

    /// Reads the record; without its value if the key is all that is asked for.
    pub fn load(&self, read: &impl Read, keys_only: bool) -> Result<Record, StoreError> {
        record(read, &self.data_key, &self.stored, keys_only)
    }
}

/// A record up to this size is copied when it is found: to look for it twice would cost more.
const FIND_BYTES: usize = 4 << 10;

/// Looks for `key`, if the shard owns its slot.
pub fn find(read: &impl Read, key: &[u8]) -> Result<FindOutcome, StoreError> {
    let slot = slot_of(key);
    let state = SlotState::read(read, slot)?;

    // In the same look as the data: between two looks the slot could have changed hands.
    if !state.serves_reads() {
        return Ok(FindOutcome::NotOwned {
            slot,
            moved_to: state.moved_to,
        });
    }
    let data_key = data_key(slot, key);
    let stored = read.start_of(&data_key, FIND_BYTES)?;
    Ok(FindOutcome::Owned(
        stored.map(|stored| FoundKey { data_key, stored }),
    ))
}

/// Counts of what a shard holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyCounts {
    pub keys: u64,
    /// Bytes of all user keys and stored records.
    pub bytes: u64,
    /// The slots that the shard owns: only what is in them is counted.
    pub slots: Vec<Slot>,
}

/// Counts the keys in the slots that the shard owns, by the counters it keeps.
pub fn count(read: &impl Read) -> Result<KeyCounts, StoreError> {
    let owned = owned_states(read)?;
    let keys = owned.iter().map(|(_, state)| state.contents.keys).sum();
    let bytes = owned.iter().map(|(_, state)| state.contents.bytes).sum();
    let slots = owned.into_iter().map(|(slot, _)| slot).collect();
    Ok(KeyCounts { keys, bytes, slots })
}

fn owned_states(read: &impl Read) -> Result<Vec<(Slot, SlotState)>, StoreError> {
    let mut states = SlotState::read_all(read)?;
    states.retain(|(_, state)| state.serves_reads());
    Ok(states)
}

/// Selects a page of a shard's keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// Of user keys.
    pub range: KeyRange,
    pub direction: Direction,
    /// At most this many items; none counts as one.
    pub limit: usize,
    /// Its keys and values have at most this many bytes, or it has one item alone.
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

/// A page of the keys in the slots that the shard owns: a merge of the slots that have any, each
/// read as far as the page reaches.
///
/// Of a slot whose turn has not come the next key is known, and the beginning of what is stored
/// there; a value is read only when it is certain that the page has room for it.
pub fn scan_page(read: &impl Read, request: &PageRequest) -> Result<ScanPage, StoreError> {
    scan_page_charged(read, request, |_| true)
}

/// As [`scan_page`]. `charge` is told the bytes of each item before it is read; where it says no,
/// the page ends, with more to come.
pub fn scan_page_charged(
    read: &impl Read,
    request: &PageRequest,
    charge: impl FnMut(usize) -> bool,
) -> Result<ScanPage, StoreError> {
    let mut scan = PageScan::new(request);
    scan.step(read, charge, || false)?;
    Ok(scan.into_page())
}

/// A page that is read step by step, each step of the map as it is then: so nobody need keep the
/// map still for all of it.
///
/// An item is as it was at some moment of the scan, and what was there all the time is in the page.
/// The slots are the shard's from the first step on; whether they still are is for
/// [`PageScan::still_owns`] to say after the last.
pub struct PageScan<'a> {
    request: &'a PageRequest,
    /// None before the first step.
    owned: Option<Vec<(Slot, SlotState)>>,
    /// Number of owned slots that the scan has entered.
    entered: usize,
    /// The next key of each slot that has one.
    heads: BinaryHeap<MergeHead>,
    items: Vec<(Bytes, Record)>,
    bytes_left: usize,
    steps: u32,
}

impl<'a> PageScan<'a> {
    /// Begins a page.
    pub fn new(request: &'a PageRequest) -> Self {
        let bytes_left = request.bytes_max;
        Self {
            request,
            owned: None,
            entered: 0,
            heads: BinaryHeap::new(),
            items: Vec::new(),
            bytes_left,
            steps: 0,
        }
    }

    /// Returns how many steps were taken.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// Goes on with the page, until `pauses` says that it is enough for now; it is asked between
    /// any two keys. Returns whether the page is complete. `charge`: see [`scan_page_charged`].
    pub fn step(
        &mut self,
        read: &impl Read,
        mut charge: impl FnMut(usize) -> bool,
        mut pauses: impl FnMut() -> bool,
    ) -> Result<bool, StoreError> {
        self.steps += 1;
        if self.owned.is_none() {
            self.owned = Some(owned_states(read)?);
        }
        let owned = self.owned.as_deref().unwrap_or_default();
        let mut merge = SlotMerge {
            read,
            request: self.request,
            heads: &mut self.heads,
            last: None,
            step: self.steps,
        };

        // Thousands of slots take thousands of seeks: a pause may come between any two.
        while let Some((slot, state)) = owned.get(self.entered) {
            self.entered += 1;
            if state.contents.keys == 0 {
                continue;
            }
            merge.enter(*slot)?;
            if pauses() {
                return Ok(false);
            }
        }

        while self.items.len() < self.request.limit.max(1) {
            if !merge.refresh()? {
                break;
            }
            let Some(head) = merge.heads.peek() else {
                break;
            };

            // A first item is taken whatever its size: else a large value would end every listing
            // before it.
            let bytes = merge.bytes_of(head);
            if (bytes > self.bytes_left && !self.items.is_empty()) || !charge(bytes) {
                break;
            }
            self.bytes_left = self.bytes_left.saturating_sub(bytes);
            self.items.extend(merge.next()?);
            if pauses() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns whether the shard owns the slots of the page as it did when it was begun: none has
    /// been elsewhere in between.
    pub fn still_owns(&self, read: &impl Read) -> Result<bool, StoreError> {
        let now: BTreeMap<Slot, SlotState> = owned_states(read)?.into_iter().collect();

        // A slot that went away and came back has a later generation: writes in between were
        // missed.
        let is_as_before = |(slot, before): &(Slot, SlotState)| {
            now.get(slot)
                .is_some_and(|state| state.generation == before.generation)
        };
        Ok(self.owned.iter().flatten().all(is_as_before))
    }

    /// Returns the page, which is complete.
    pub fn into_page(self) -> ScanPage {
        let slots = self
            .owned
            .into_iter()
            .flatten()
            .map(|(slot, _)| slot)
            .collect();
        ScanPage {
            items: self.items,
            more: !self.heads.is_empty(),
            slots,
        }
    }
}

/// A merge of slots.
struct SlotMerge<'a, 'h, R> {
    read: &'a R,
    request: &'a PageRequest,
    heads: &'h mut BinaryHeap<MergeHead>,
    /// Iterator over the slot that the last key came from. Only one is kept: a scan may hold a page
    /// of its tree, as large as many values.
    last: Option<(Slot, Items<'a, ValueStart>)>,
    step: u32,
}

impl<'a, R: Read> SlotMerge<'a, '_, R> {
    fn scan(&self, range: &KeyRange) -> Items<'a, ValueStart> {
        let read = self.read;
        read.scan_starts(range, self.request.direction, START_BYTES)
    }

    /// Looks for the first key of a slot.
    fn enter(&mut self, slot: Slot) -> Result<(), StoreError> {
        if !self.request.range.is_empty() {
            let mut items = self.scan(&data_range(slot, &self.request.range));
            self.heads.extend(self.next_of(slot, &mut items)?);
        }
        Ok(())
    }

    /// Has the first of the heads be as it is now: the key may have been written or deleted since
    /// it was found. Returns false when there is none.
    fn refresh(&mut self) -> Result<bool, StoreError> {
        while let Some(head) = self.heads.peek().filter(|head| head.step != self.step) {
            // Found in an earlier step: since then the map was not held still.
            let (slot, user_key) = (head.slot, head.user_key.clone());
            let stored = self
                .read
                .start_of(&data_key(slot, &user_key), START_BYTES)?;
            let Some(head) = self.heads.pop() else { break };
            match stored {
                Some(stored) => self.heads.push(MergeHead {
                    stored,
                    step: self.step,
                    ..head
                }),
                None => {
                    let range =
                        rest_of(slot, &self.request.range, &user_key, self.request.direction);
                    let mut rest = self.scan(&range);
                    self.heads.extend(self.next_of(slot, &mut rest)?);
                }
            }
        }
        Ok(!self.heads.is_empty())
    }

    /// The bytes of an item.
    fn bytes_of(&self, head: &MergeHead) -> usize {
        let value = if self.request.keys_only {
            0
        } else {
            head.stored.len
        };
        head.user_key.len() + value
    }

    /// Takes the next item, and looks for the one after it in its slot.
    fn next(&mut self) -> Result<Option<(Bytes, Record)>, StoreError> {
        let Some(MergeHead {
            slot,
            user_key,
            stored,
            direction,
            ..
        }) = self.heads.pop()
        else {
            return Ok(None);
        };

        // As long as keys come from one slot, its iterator goes on, and costs no new seek.
        let mut rest = match self.last.take() {
            Some((last, rest)) if last == slot => rest,
            Some(_) | None => self.scan(&rest_of(slot, &self.request.range, &user_key, direction)),
        };
        self.heads.extend(self.next_of(slot, &mut rest)?);
        self.last = Some((slot, rest));
        let record = record(
            self.read,
            &data_key(slot, &user_key),
            &stored,
            self.request.keys_only,
        )?;
        Ok(Some((user_key, record)))
    }

    fn next_of(
        &self,
        slot: Slot,
        items: &mut Items<'_, ValueStart>,
    ) -> Result<Option<MergeHead>, StoreError> {
        let Some((key, stored)) = items.next().transpose()? else {
            return Ok(None);
        };
        let (_, user_key) = parse_data_key(&key).ok_or_else(|| misplaced(&key))?;
        Ok(Some(MergeHead {
            slot,
            user_key,
            stored,
            direction: self.request.direction,
            step: self.step,
        }))
    }
}

/// Returns what comes after a key of a slot, in the direction of the scan.
fn rest_of(slot: Slot, range: &KeyRange, user_key: &Bytes, direction: Direction) -> KeyRange {
    match direction {
        Direction::Forward => {
            // A zero byte behind a key makes the very next key.
            let after = Bytes::from([user_key, &[0][..]].concat());
            data_range(
                slot,
                &KeyRange {
                    start: after,
                    end: range.end.clone(),
                },
            )
        }
        Direction::Reverse => data_range(
            slot,
            &KeyRange {
                start: range.start.clone(),
                end: Some(user_key.clone()),
            },
        ),
    }
}

/// The record that begins so, read as far as it is wanted.
fn record(
    read: &impl Read,
    data_key: &[u8],
    stored: &ValueStart,
    keys_only: bool,
) -> Result<Record, StoreError> {
    if let Some(record) = stored.whole() {
        let record = decode_record(record)?;
        return Ok(if keys_only {
            Record {
                value: Bytes::new(),
                ..record
            }
        } else {
            record
        });
    }

    // A listing of keys needs the start alone: the value may be large, and is not read.
    if keys_only && let Some(head) = decode_head(&stored.start)? {
        return Ok(head);
    }
    let whole = read.get(data_key)?.ok_or_else(|| misplaced(data_key))?;
    let record = decode_record(&whole)?;
    Ok(if keys_only {
        Record {
            value: Bytes::new(),
            ..record
        }
    } else {
        record
    })
}

/// The next key of a slot in a merge. The greatest comes first.
struct MergeHead {
    slot: Slot,
    user_key: Bytes,
    stored: ValueStart,
    direction: Direction,
    /// In which step of the scan it was found.
    step: u32,
}

impl Ord for MergeHead {
    fn cmp(&self, other: &Self) -> Ordering {
        match self.direction {
            Direction::Forward => other.user_key.cmp(&self.user_key),
            Direction::Reverse => self.user_key.cmp(&other.user_key),
        }
    }
}

impl PartialOrd for MergeHead {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for MergeHead {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for MergeHead {}
