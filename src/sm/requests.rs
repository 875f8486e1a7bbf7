//! The memory of answered requests: a write with an idempotency key is done once, however often it
//! is sent.
//!
//! For each slot that such a write touched, the map holds a [`RequestRecord`]: a fingerprint of
//! what the request asked of that slot, and the answer of the slot's operations. Per slot, because
//! a slot moves with its memory: a batch that was one write at the first try may be cut otherwise
//! at the next, when its slots are in other shards. For the same reason neither fingerprint nor
//! answer holds a position in the write.
//!
//! A record is forgotten [`REMEMBERED_MS`] of group time after it was written, and counts as absent
//! from that moment, even while it is still in the map. Group time is the highest time that an
//! applied entry carried; it never goes back. Expired records are deleted while entries are
//! applied, a bounded number each: some of a slot that gets a new record, and some by a sweep that
//! goes around all slots.
//!
//! A slot's records take at most [`REQUESTS_BYTES_MAX`]. A full slot refuses requests with keys,
//! and forgets none early.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::codec;
use super::kv::command::{Operation, OperationOutcome};
use super::kv::entry::EntryTransaction;
use super::ports::{Read, StoreError};
use super::slots::{
    CLOCK_KEY, RequestsUsed, expiry_key, expiry_range, expiry_range_from, misplaced,
    parse_expiry_key, request_key,
};
use crate::mutants::{self, Mutant};
use crate::types::{Revision, Slot};

/// For how long, in group time, an answer is remembered: longer than any client of ours goes on
/// retrying.
pub const REMEMBERED_MS: u64 = 10 * 60 * 1000;

/// Most bytes that the records of one slot may take. A small record takes about 130, so one slot
/// remembers some 8,000 requests, 13 a second for as long as they are remembered; all slots
/// together, 55,000 a second, which is more than a cluster of this kind writes. The worst case is 4
/// GiB in the maps of a whole cluster: disk, not memory, and no more than the writes that brought
/// it about. A move carries a slot's records over while the slot is frozen: one MiB is a chunk or
/// two.
pub const REQUESTS_BYTES_MAX: u64 = 1 << 20;

/// Most expired records deleted for the sake of one new one, unless more are needed to make room
/// for it: two, so that deletion is faster than what it follows.
const FORGET_PER_RECORD_MAX: usize = 2;

/// Interval, in group time, at which the clock is stored when nothing else asks for it, and the
/// sweep goes on.
const SWEEP_EVERY_MS: u64 = 1000;

/// Most slots that a sweep looks at. Each costs a seek of some microseconds, and at 64 the whole
/// shard is seen in about a minute.
const SWEEP_SLOTS_MAX: usize = 64;

/// Most records that a sweep deletes, so that no entry stalls its group.
const SWEEP_RECORDS_MAX: usize = 256;

/// A shard's clock. Part of the disk format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct RequestClock {
    time_ms: u64,
    /// The slot that the sweep goes on from.
    sweep: Slot,
}

impl RequestClock {
    fn read(get: Option<Bytes>) -> Result<Self, StoreError> {
        get.map_or(Ok(Self::default()), |bytes| {
            codec::decode(&bytes, "the clock of a shard")
        })
    }
}

/// The group time that a shard's map has stored. A new leader goes on from here. Entries that wrote
/// no record may have carried a later one, by less than a second of applied entries: then records
/// live that much longer, never shorter.
pub fn group_time_ms(read: &impl Read) -> Result<u64, StoreError> {
    RequestClock::read(read.get(CLOCK_KEY)?).map(|clock| clock.time_ms)
}

/// Tells one request from another under the same key: `xxh3_128` of the encoding of the slot's
/// operations, in order.
pub type Fingerprint = [u8; 16];

pub(super) fn fingerprint<'a>(operations: impl IntoIterator<Item = &'a Operation>) -> Fingerprint {
    let encoded = operations
        .into_iter()
        .fold(Vec::new(), |buffer, operation| {
            postcard::to_extend(operation, buffer)
                .expect("encoding into memory fails for no type of the core")
        });
    xxh3_128(&encoded).to_be_bytes()
}

/// The remembered answer to a request in one slot. Part of the disk format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Group time at which it was written.
    pub time_ms: u64,
    pub fingerprint: Fingerprint,
    pub answer: RequestAnswer,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestAnswer {
    /// One per operation of the slot, in order.
    Applied(Vec<OperationOutcome>),
    /// A condition did not hold: that of the `nth` operation of `slot`, which need not be the slot
    /// of the record.
    ConditionFailed {
        slot: Slot,
        nth: usize,
        current: Option<Revision>,
    },
}

impl RequestRecord {
    pub fn encode(&self) -> Bytes {
        codec::encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode(bytes, "the record of a request")
    }

    fn expired(&self, now_ms: u64) -> bool {
        expired(self.time_ms, now_ms)
    }
}

/// A remembered request without its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct FoundRequest {
    time_ms: u64,
    pub fingerprint: Fingerprint,
    /// Of the record.
    pub bytes: usize,
}

impl FoundRequest {
    /// A format byte, a time and a fingerprint are no longer than this.
    const START_BYTES: usize = 1 + 10 + size_of::<Fingerprint>();

    fn read<R: Read>(
        entry: &EntryTransaction<'_, R>,
        slot: Slot,
        key: &[u8],
    ) -> Result<Option<Self>, StoreError> {
        let Some(record) = entry.start_of(&request_key(slot, key), Self::START_BYTES)? else {
            return Ok(None);
        };
        let ((time_ms, fingerprint), _) =
            codec::decode_first(&record.start, "the record of a request")?;
        Ok(Some(Self {
            time_ms,
            fingerprint,
            bytes: record.len,
        }))
    }
}

fn expired(time_ms: u64, now_ms: u64) -> bool {
    time_ms.saturating_add(REMEMBERED_MS) <= now_ms
}

/// Returns the bytes that a record counts for: its key and value, and its key in the index.
fn cost(idempotency_key: &[u8], value_bytes: usize) -> u64 {
    // A tag and a slot before each key, and eight bytes of time in the index.
    (2 * (3 + idempotency_key.len()) + 8 + value_bytes) as u64
}

/// Deletes the record of a request, if there is one.
pub(super) fn forget<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    slot: Slot,
    key: &[u8],
) -> Result<(), StoreError> {
    let Some(record) = FoundRequest::read(entry, slot, key)? else {
        return Ok(());
    };
    entry.delete(request_key(slot, key));
    entry.delete(expiry_key(slot, record.time_ms, key));
    let used = &mut entry.state_mut(slot)?.requests;
    used.bytes = used.bytes.saturating_sub(cost(key, record.bytes));
    Ok(())
}

/// The memory of a shard's requests while an entry is applied.
pub(super) struct RequestMemory {
    clock: RequestClock,
    changed: bool,
}

impl RequestMemory {
    /// Lets group time go on to `time_ms`, if that is later. Every so often, goes on with the
    /// sweep.
    pub fn open<R: Read>(
        entry: &mut EntryTransaction<'_, R>,
        time_ms: u64,
    ) -> Result<Self, StoreError> {
        let mut clock = RequestClock::read(entry.get(CLOCK_KEY)?)?;

        // Expired records of slots without writes are found by nobody: they are swept now and then.
        let due = time_ms >= clock.time_ms.saturating_add(SWEEP_EVERY_MS);
        clock.time_ms = clock.time_ms.max(time_ms);
        let mut memory = Self {
            clock,
            changed: due,
        };
        if due {
            memory.sweep(entry)?;
        }
        Ok(memory)
    }

    /// Stores the clock where that is needed.
    pub fn close<R: Read>(self, entry: &mut EntryTransaction<'_, R>) {
        if self.changed {
            entry.put(CLOCK_KEY, codec::encode(&self.clock));
        }
    }

    pub fn now_ms(&self) -> u64 {
        self.clock.time_ms
    }

    /// Returns the remembered request with this key in `slot`, without its answer. Deletes an
    /// expired record on the way.
    pub fn find<R: Read>(
        &self,
        entry: &mut EntryTransaction<'_, R>,
        slot: Slot,
        key: &[u8],
    ) -> Result<Option<FoundRequest>, StoreError> {
        let Some(found) = FoundRequest::read(entry, slot, key)? else {
            return Ok(None);
        };
        if !expired(found.time_ms, self.now_ms()) {
            return Ok(Some(found));
        }
        forget(entry, slot, key)?;
        Ok(None)
    }

    /// Reads the answer that [`RequestMemory::find`] has found.
    pub fn answer<R: Read>(
        entry: &EntryTransaction<'_, R>,
        slot: Slot,
        key: &[u8],
    ) -> Result<Option<RequestAnswer>, StoreError> {
        let record = entry.get(&request_key(slot, key))?;
        record
            .map(|bytes| RequestRecord::decode(&bytes).map(|record| record.answer))
            .transpose()
    }

    /// Takes what a move brings of a request: its record at the source, where it was `source_ms`,
    /// or that there is none any more. The record keeps its age, as far as this shard's time goes
    /// back: it may live longer here, and never shorter.
    pub fn adopt<R: Read>(
        &mut self,
        entry: &mut EntryTransaction<'_, R>,
        slot: Slot,
        key: &[u8],
        brought: Option<RequestRecord>,
        source_ms: u64,
    ) -> Result<(), StoreError> {
        // A later chunk may bring a newer record of the same request, or that it is gone.
        forget(entry, slot, key)?;
        let Some(mut record) = brought else {
            return Ok(());
        };
        if mutants::is_on(Mutant::RequestsNotMoved) {
            return Ok(());
        }
        if record.expired(source_ms) {
            return Ok(());
        }

        // Clocks of two groups can't be compared, ages can.
        record.time_ms = self
            .now_ms()
            .saturating_sub(source_ms.saturating_sub(record.time_ms));
        self.store(entry, slot, key, record.time_ms, record.encode())
    }

    /// Returns true if `slot` has room for a record of `value_bytes`. Deletes expired records where
    /// it has not.
    pub fn make_room<R: Read>(
        &self,
        entry: &mut EntryTransaction<'_, R>,
        slot: Slot,
        key: &[u8],
        value_bytes: usize,
    ) -> Result<bool, StoreError> {
        let needed = cost(key, value_bytes);

        // It would not fit into an empty slot either: nothing is deleted for it.
        if needed > REQUESTS_BYTES_MAX {
            return Ok(false);
        }
        self.forget_expired(
            entry,
            slot,
            FORGET_PER_RECORD_MAX,
            REQUESTS_BYTES_MAX - needed,
        )?;
        Ok(entry.state(slot)?.requests.bytes <= REQUESTS_BYTES_MAX - needed)
    }

    /// Puts the record of a request, of which there must be none; [`RequestMemory::make_room`] said
    /// that it fits.
    pub fn remember<R: Read>(
        &mut self,
        entry: &mut EntryTransaction<'_, R>,
        slot: Slot,
        key: &[u8],
        record: Bytes,
    ) -> Result<(), StoreError> {
        if mutants::is_on(Mutant::RequestsNotRemembered) {
            return Ok(());
        }
        self.store(entry, slot, key, self.now_ms(), record)?;
        assert!(
            entry.state(slot)?.requests.bytes <= REQUESTS_BYTES_MAX,
            "room was made for the record of a request"
        );
        Ok(())
    }

    fn store<R: Read>(
        &mut self,
        entry: &mut EntryTransaction<'_, R>,
        slot: Slot,
        key: &[u8],
        time_ms: u64,
        record: Bytes,
    ) -> Result<(), StoreError> {
        debug_assert!(
            entry.start_of(&request_key(slot, key), 0)?.is_none(),
            "a request is remembered once"
        );
        let cost = cost(key, record.len());

        // A lower bound of the oldest age is enough: by it a slot is passed over without a scan.
        let used = &mut entry.state_mut(slot)?.requests;
        used.since_ms = if used.bytes == 0 {
            time_ms
        } else {
            used.since_ms.min(time_ms)
        };
        used.bytes += cost;
        entry.put(request_key(slot, key), record);
        entry.put(expiry_key(slot, time_ms, key), codec::encode(&cost));
        self.changed = true;
        Ok(())
    }

    /// Deletes expired records of `slot`, oldest first: `count_max` of them, and on while the rest
    /// takes more than `bytes_max`. Returns how many it deleted.
    fn forget_expired<R: Read>(
        &self,
        entry: &mut EntryTransaction<'_, R>,
        slot: Slot,
        count_max: usize,
        bytes_max: u64,
    ) -> Result<usize, StoreError> {
        let used = entry.state(slot)?.requests;

        // Even the oldest has not expired: most writes end here without a scan.
        if used.bytes == 0 || !expired(used.since_ms, self.now_ms()) {
            return Ok(0);
        }
        let mut old = Vec::new();
        let mut left = used;
        let mut oldest = None;
        entry.scan(&expiry_range(slot), |index_key, cost| {
            let (_, time_ms, key) =
                parse_expiry_key(&index_key).ok_or_else(|| misplaced(&index_key))?;
            if !expired(time_ms, self.now_ms())
                || (old.len() >= count_max && left.bytes <= bytes_max)
            {
                oldest = Some(time_ms);
                return Ok(false);
            }
            let cost: u64 = codec::decode(&cost, "the cost of a record")?;
            left.bytes = left.bytes.saturating_sub(cost);
            old.push((index_key, key));
            Ok(true)
        })?;

        // The oldest record that stays bounds the age of the rest, and saves the next scan.
        let left = match oldest {
            Some(since_ms) => RequestsUsed { since_ms, ..left },
            None => RequestsUsed::default(),
        };
        entry.state_mut(slot)?.requests = left;
        let count = old.len();
        for (index_key, key) in old {
            entry.delete(request_key(slot, &key));
            entry.delete(index_key);
        }
        Ok(count)
    }

    /// Goes on around the slots that have records, and deletes expired ones.
    fn sweep<R: Read>(&mut self, entry: &mut EntryTransaction<'_, R>) -> Result<(), StoreError> {
        let mut left = SWEEP_RECORDS_MAX;
        for _ in 0..SWEEP_SLOTS_MAX {
            // One seek finds the next slot with records: those without any cost nothing.
            let mut next = None;
            entry.scan(&expiry_range_from(self.clock.sweep), |key, _| {
                next = Some(parse_expiry_key(&key).ok_or_else(|| misplaced(&key))?);
                Ok(false)
            })?;
            let Some((slot, _, _)) = next else {
                // Nothing from here on: the next sweep begins at the first slot.
                self.clock.sweep = Slot::default();
                break;
            };
            left -= self.forget_expired(entry, slot, left, u64::MAX)?;
            if left == 0 {
                // This slot may have more: the next sweep goes on here.
                self.clock.sweep = slot;
                break;
            }
            self.clock.sweep = Slot::new(slot.number() + 1).unwrap_or_default();
            if self.clock.sweep == Slot::default() {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::kv::{Action, Condition};

    #[test]
    fn the_encodings_of_a_request_record_and_the_clock_stand() {
        let slot = Slot::new(300).expect("a slot");
        let applied = RequestRecord {
            time_ms: 300,
            fingerprint: *b"0123456789abcdef",
            answer: RequestAnswer::Applied(vec![
                OperationOutcome::Got(None),
                OperationOutcome::Put {
                    revision: Revision(1),
                    created: true,
                },
                OperationOutcome::Deleted {
                    revision: Some(Revision(2)),
                },
            ]),
        };
        assert_eq!(
            &applied.encode()[..],
            b"\x01\xac\x020123456789abcdef\x00\x03\x00\x00\x01\x01\x01\x02\x01\x02"
        );
        assert_eq!(
            RequestRecord::decode(&applied.encode()).expect("own encoding"),
            applied
        );
        let failed = RequestRecord {
            answer: RequestAnswer::ConditionFailed {
                slot,
                nth: 1,
                current: None,
            },
            ..applied
        };
        assert_eq!(
            &failed.encode()[..],
            b"\x01\xac\x020123456789abcdef\x01\xac\x02\x01\x00"
        );
        assert_eq!(
            RequestRecord::decode(&failed.encode()).expect("own encoding"),
            failed
        );
        assert_eq!(
            &codec::encode(&RequestClock {
                time_ms: 5,
                sweep: slot
            })[..],
            b"\x01\x05\xac\x02"
        );
    }

    #[test]
    fn a_fingerprint_tells_operations_apart() {
        let operation = |key: &str, value: &str| Operation {
            key: Bytes::copy_from_slice(key.as_bytes()),
            condition: Condition::None,
            action: Action::Put {
                media: crate::sm::kv::Media::Text,
                value: Bytes::copy_from_slice(value.as_bytes()),
            },
        };
        let (ab, a_b) = (operation("a", "b"), operation("", "ab"));
        assert_ne!(fingerprint([&ab]), fingerprint([&a_b]));
        assert_ne!(fingerprint([&ab, &a_b]), fingerprint([&a_b, &ab]));
        assert_eq!(fingerprint([&ab, &a_b]), fingerprint(&[ab, a_b]));
        let empty: [&Operation; 0] = [];
        assert_eq!(
            fingerprint(empty),
            0x99aa_06d3_0147_98d8_6001_c324_468d_497f_u128.to_be_bytes(),
            "part of the disk format"
        );
    }
}
