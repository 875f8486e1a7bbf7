//! What the gets of an entry return, and how much of it there may be.
//!
//! An entry is a small thing that may ask for gigabytes. So what gets find is first only measured;
//! values are read when it is clear that they fit, and that somebody wants them.

use bytes::Bytes;

use super::command::{OperationOutcome, WriteRejection};
use super::entry::EntryTransaction;
use super::record::decode_record;
use crate::sm::ports::{Read, StoreError, ValueStart};
use crate::types::Slot;

/// Bytes of stored records that the gets of one entry, or of one batch that is a read, return at
/// most: two of the largest values. Part of what an entry means: replicas must agree on it.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;

/// A format byte and a revision are no longer than this.
pub(super) const REVISION_BYTES: usize = 11;

/// A record up to this size is copied when it is first looked at: most are, and to look twice would
/// cost more.
pub(super) const START_BYTES: usize = 512;

/// Tells who waits for the outcome of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    Caller,
    /// As on followers, and at a start.
    Nobody,
}

/// Bytes that the gets of an entry may still return.
pub(super) struct AnswerBudget {
    left: usize,
    audience: Audience,
    is_strict: bool,
}

impl AnswerBudget {
    /// Room for an entry of which gets never keep a write from being done: what they found beyond
    /// it is not told.
    pub fn lenient(audience: Audience) -> Self {
        Self {
            left: ANSWER_BYTES_MAX,
            audience,
            is_strict: false,
        }
    }

    /// Room for an entry in which writes are rejected whose gets return more.
    pub fn strict(audience: Audience) -> Self {
        Self {
            is_strict: true,
            ..Self::lenient(audience)
        }
    }

    /// Returns whether there is room for `bytes`, and takes it. The same on every replica.
    pub fn take(&mut self, bytes: usize) -> bool {
        let fits = bytes <= self.left;
        self.left -= if fits { bytes } else { 0 };
        fits
    }

    pub fn is_strict(&self) -> bool {
        self.is_strict
    }

    pub fn is_wanted(&self) -> bool {
        self.audience == Audience::Caller
    }
}

/// The gets of a write that found something.
#[derive(Default)]
pub(super) struct PendingGets {
    found: Vec<FoundValue>,
    bytes: usize,
}

struct FoundValue {
    /// Its place among the outcomes.
    at: usize,
    bytes: usize,
    source: ValueSource,
}

enum ValueSource {
    /// The record, or what the write itself has put there.
    Here(Bytes),
    /// It is in the map under this key, until the write is committed.
    Map(Bytes),
}

impl PendingGets {
    /// Adds what the operation at a place among the outcomes found under `key`.
    pub fn add(&mut self, at: usize, key: Bytes, stored: &ValueStart) {
        let source = stored.whole().map_or(ValueSource::Map(key), |record| {
            ValueSource::Here(record.clone())
        });
        self.found.push(FoundValue {
            at,
            bytes: stored.len,
            source,
        });
        self.bytes += stored.len;
    }

    /// Returns the bytes of all records that were found.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub fn too_large(&self) -> WriteRejection {
        WriteRejection::AnswerTooLarge {
            bytes: self.bytes as u64,
        }
    }

    /// Returns the first slot, in their order, in which more than `bytes_max` were found. `slot_of`
    /// knows that of an outcome's place.
    pub fn first_beyond(&self, bytes_max: u64, slot_of: impl Fn(usize) -> Slot) -> Option<Slot> {
        // Mostly the sum is small already, and no slot need be looked at.
        if self.bytes as u64 <= bytes_max {
            return None;
        }
        let mut bytes = std::collections::BTreeMap::<Slot, u64>::new();
        for found in &self.found {
            *bytes.entry(slot_of(found.at)).or_default() += found.bytes as u64;
        }
        bytes
            .into_iter()
            .find_map(|(slot, bytes)| (bytes > bytes_max).then_some(slot))
    }

    /// Reads what was found at the places that are `wanted`, and puts it among the outcomes. Before
    /// the write is committed.
    pub fn load<R: Read>(
        &self,
        entry: &EntryTransaction<'_, R>,
        wanted: impl Fn(usize) -> bool,
        outcomes: &mut [OperationOutcome],
    ) -> Result<(), StoreError> {
        for found in self.found.iter().filter(|found| wanted(found.at)) {
            let record = match &found.source {
                ValueSource::Here(record) => Some(decode_record(record)?),
                ValueSource::Map(key) => entry.get(key)?.as_ref().map(decode_record).transpose()?,
            };
            outcomes[found.at] = OperationOutcome::Got(record);
        }
        Ok(())
    }
}
