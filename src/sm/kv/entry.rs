//! The map as an entry sees it while it is applied: what was there, and over it what the entry has
//! done so far.
//!
//! The state of each slot that the entry touches is read once, changed here, and written once, by
//! [`EntryTransaction::into_batch`]. There too every change in a slot that a move copies is marked,
//! whoever made it.

use std::collections::{BTreeMap, BTreeSet, btree_map};

use bytes::Bytes;

use crate::sm::moves::command::{MovePhase, OpenMove};
use crate::sm::ports::{Direction, KeyRange, Overlay, Read, StoreError, ValueStart, WriteBatch};
use crate::sm::slots::{
    Ownership, SlotState, change_key, change_value, move_key, parse_request_key, slot_of_copied,
    state_key,
};
use crate::types::{MoveId, Slot};

pub(in crate::sm) struct EntryTransaction<'a, R> {
    read: &'a R,
    batch: WriteBatch,
    states: BTreeMap<Slot, TouchedSlot>,
}

#[derive(Default)]
struct TouchedSlot {
    state: SlotState,
    /// Ownership before the entry.
    was: Ownership,
    changed: bool,
}

impl<'a, R: Read> EntryTransaction<'a, R> {
    pub fn new(read: &'a R) -> Self {
        Self {
            read,
            batch: WriteBatch::default(),
            states: BTreeMap::new(),
        }
    }

    /// The map as it was before the entry.
    pub fn map(&self) -> &'a R {
        self.read
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Overlay {
            base: self.read,
            batch: &self.batch,
        }
        .get(key)
    }

    /// Returns the first bytes of a value, and its length.
    pub fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        Overlay {
            base: self.read,
            batch: &self.batch,
        }
        .start_of(key, bytes_max)
    }

    /// Visits the keys of `range` in their order, with the length of each value, for as long as
    /// `take` says so.
    pub fn scan_lengths(
        &self,
        range: &KeyRange,
        mut take: impl FnMut(Bytes, usize) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        let overlay = Overlay {
            base: self.read,
            batch: &self.batch,
        };
        for item in overlay.scan_starts(range, Direction::Forward, 0) {
            let (key, value) = item?;
            if !take(key, value.len)? {
                break;
            }
        }
        Ok(())
    }

    /// Visits the pairs of `range`, in key order, for as long as `take` says so.
    pub fn scan(
        &self,
        range: &KeyRange,
        mut take: impl FnMut(Bytes, Bytes) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        let overlay = Overlay {
            base: self.read,
            batch: &self.batch,
        };
        for pair in overlay.scan(range, Direction::Forward) {
            let (key, value) = pair?;
            if !take(key, value)? {
                break;
            }
        }
        Ok(())
    }

    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.batch.put(key, value);
    }

    pub fn delete(&mut self, key: impl Into<Bytes>) {
        self.batch.delete(key);
    }

    /// Puts `changes` over what the entry has done so far. They must not hold slot states.
    pub fn merge(&mut self, changes: WriteBatch) {
        self.batch.merge(changes);
    }

    pub fn state(&mut self, slot: Slot) -> Result<SlotState, StoreError> {
        self.touch(slot).map(|touched| touched.state)
    }

    /// The state of `slot`, to be changed.
    pub fn state_mut(&mut self, slot: Slot) -> Result<&mut SlotState, StoreError> {
        let touched = self.touch(slot)?;
        touched.changed = true;
        Ok(&mut touched.state)
    }

    fn touch(&mut self, slot: Slot) -> Result<&mut TouchedSlot, StoreError> {
        match self.states.entry(slot) {
            btree_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            btree_map::Entry::Vacant(entry) => {
                let state = SlotState::read(self.read, slot)?;
                Ok(entry.insert(TouchedSlot {
                    state,
                    was: state.ownership,
                    changed: false,
                }))
            }
        }
    }

    /// The move with this id, if it is open here.
    pub fn open_move(&self, id: MoveId) -> Result<Option<OpenMove>, StoreError> {
        OpenMove::read(
            &Overlay {
                base: self.read,
                batch: &self.batch,
            },
            id,
        )
    }

    pub fn put_move(&mut self, id: MoveId, open: &OpenMove) {
        self.put(move_key(id), open.encode());
    }

    pub fn close_move(&mut self, id: MoveId) {
        self.delete(move_key(id));
    }

    /// Marks what the entry changes in slots that a move copies.
    ///
    /// The mark holds the index of the entry: marks are in the order of the log, and one that was
    /// read is never behind a new one. That a request's record was deleted is not marked: only
    /// expired ones are, and the destination forgets them by the ages it was given.
    fn mark_changes(&mut self, index: u64) -> Result<(), StoreError> {
        let slots: BTreeSet<Slot> = self
            .batch
            .iter()
            .filter_map(|(key, _)| slot_of_copied(key))
            .collect();
        let mut copied = BTreeMap::new();
        for slot in slots {
            copied.extend(self.state(slot)?.marked_for().map(|id| (slot, id)));
        }

        // The common case: no move copies any of these slots.
        if copied.is_empty() {
            return Ok(());
        }
        let marks = self.batch.iter().filter_map(|(key, value)| {
            let id = copied.get(&slot_of_copied(key)?)?;
            let forgotten = value.is_none() && parse_request_key(key).is_some();
            let bytes = key.len() + value.as_ref().map_or(0, Bytes::len);
            (!forgotten).then(|| (change_key(*id, index, key), change_value(bytes)))
        });
        for (mark, value) in marks.collect::<Vec<_>>() {
            self.put(mark, value);
        }
        Ok(())
    }

    /// Asserts that the slots which the entry changed fit the moves that are open here: a slot is
    /// in at most one move, and owned, frozen or arriving as that move's phase says.
    fn check_invariants(&self) -> Result<(), StoreError> {
        for (slot, touched) in self.states.iter().filter(|(_, touched)| touched.changed) {
            let state = touched.state;
            state.check_invariants(*slot);

            // Only a change of ownership is a step of a move; writes change the rest at any time.
            if state.ownership == touched.was {
                continue;
            }

            let open = self.open_move(state.generation)?;
            let phase = open
                .filter(|open| open.slots.contains(slot))
                .map(|open| open.phase);
            let fits = match state.ownership {
                Ownership::NotOwned | Ownership::Owned => phase.is_none(),
                Ownership::Leaving => matches!(phase, Some(MovePhase::Copying { .. })),
                Ownership::Frozen => matches!(phase, Some(MovePhase::Frozen { .. })),
                Ownership::Arriving => matches!(phase, Some(MovePhase::Installing { .. })),
            };
            assert!(
                fits,
                "slot {slot} is {:?} while its move is {phase:?}",
                state.ownership
            );
        }
        Ok(())
    }

    /// All that the entry at `index` did.
    pub fn into_batch(mut self, index: u64) -> Result<WriteBatch, StoreError> {
        // Last of all, so that nothing that the entry changes is left without a mark.
        self.mark_changes(index)?;
        if cfg!(debug_assertions) {
            self.check_invariants()?;
        }

        let mut batch = self.batch;
        for (slot, touched) in self.states {
            if touched.changed {
                batch.put(
                    Bytes::copy_from_slice(&state_key(slot)),
                    touched.state.encode(),
                );
            }
        }
        Ok(batch)
    }
}
