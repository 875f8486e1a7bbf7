//! The map as an entry sees it while it is applied: what was there, and over it what the entry has done so far.
//!
//! The state of each slot that the entry touches is read once, changed here, and written once, by [`Entry::into_batch`].

use std::collections::BTreeMap;
use std::collections::btree_map;

use bytes::Bytes;

use crate::sm::ports::{Direction, KeyRange, Overlay, Read, StoreError, WriteBatch};
use crate::sm::slots::{SlotState, state_key};
use crate::types::Slot;

pub(in crate::sm) struct Entry<'a, R> {
    read: &'a R,
    batch: WriteBatch,
    states: BTreeMap<Slot, Touched>,
}

#[derive(Default)]
struct Touched {
    state: SlotState,
    changed: bool,
}

impl<'a, R: Read> Entry<'a, R> {
    pub fn new(read: &'a R) -> Self {
        Self { read, batch: WriteBatch::default(), states: BTreeMap::new() }
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Overlay { base: self.read, batch: &self.batch }.get(key)
    }

    /// Up to `limit` pairs of `range`, in key order, for as long as `take` says so.
    pub fn scan(
        &self,
        range: &KeyRange,
        mut take: impl FnMut(Bytes, Bytes) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        let overlay = Overlay { base: self.read, batch: &self.batch };
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

    fn touch(&mut self, slot: Slot) -> Result<&mut Touched, StoreError> {
        match self.states.entry(slot) {
            btree_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            btree_map::Entry::Vacant(entry) => {
                let state = SlotState::read(self.read, slot)?;
                Ok(entry.insert(Touched { state, changed: false }))
            }
        }
    }

    /// All that the entry did.
    pub fn into_batch(self) -> WriteBatch {
        let mut batch = self.batch;
        for (slot, touched) in self.states {
            if touched.changed {
                batch.put(Bytes::copy_from_slice(&state_key(slot)), touched.state.encode());
            }
        }
        batch
    }
}
