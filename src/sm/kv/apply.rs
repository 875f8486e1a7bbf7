//! What an entry does to a shard's map.
//!
//! Each write of an entry sees what the earlier ones did. Within a write everything is decided
//! before anything is done, in this order:
//! 1. ownership: the shard owns the slots of all operations, or the write is rejected;
//! 2. the memory of requests: slots in which the write was answered before are answered again, and
//!    take no part in what follows;
//! 3. freeze: no move holds back writes to the other slots, or the write is rejected;
//! 4. conditions: all of them hold of the map as it is before the write, or none of the operations
//!    is done;
//! 5. room for the answers in the memory of requests, or the write is rejected.
//!
//! Then the operations are done in order, each seeing the earlier ones of its write. What was
//! decided by (4) or done is remembered for a write with a key; rejections by (1), (3) and (5) are
//! not, since the same write may well be accepted later.
//!
//! Of what is stored under the keys of a write only revision and length are looked at. Values are
//! read for gets alone, and no more of them than fit into the answers of an entry (`answers`): what
//! is overwritten or deleted may be larger than memory.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::answers::{AnswerBudget, Audience, PendingGets, REVISION_BYTES, START_BYTES};
use super::command::{
    Action, KvCommand, KvOutcome, Operation, OperationOutcome, Record, Write, WriteOutcome,
    WriteRejection,
};
use super::entry::EntryTransaction;
use super::record::{encode_record, stored_revision};
use crate::mutants::{self, Mutant};
use crate::sm::codec;
use crate::sm::moves::command::{MoveCommand, MoveOutcome};
use crate::sm::moves::{clear, destination, source};
use crate::sm::ports::{Read, StoreError, ValueStart, WriteBatch};
use crate::sm::requests::{
    Fingerprint, REQUESTS_BYTES_MAX, RequestAnswer, RequestMemory, RequestRecord, fingerprint,
};
use crate::sm::slots::{Ownership, READ_ONLY_KEY, SlotContents, data_key, slot_of};
use crate::types::{MoveId, Revision, Slot};

/// Returns the outcome of `command` at `index` of the log, and the changes that it makes to a
/// shard's map. The index only goes into the change marks of slots that a move copies.
///
/// A rejection is an answer, the same on every replica; an error is a broken disk or an undecodable
/// map and stops the group.
pub fn apply(
    read: &impl Read,
    index: u64,
    command: KvCommand,
) -> Result<(KvOutcome, WriteBatch), StoreError> {
    apply_for(read, index, command, Audience::Caller)
}

/// As [`apply`]. The batch is the same whoever waits; where nobody does, no value is read for the
/// outcome.
pub fn apply_for(
    read: &impl Read,
    index: u64,
    command: KvCommand,
    audience: Audience,
) -> Result<(KvOutcome, WriteBatch), StoreError> {
    let mut entry = EntryTransaction::new(read);
    let outcome = match command {
        // At level 0 older programs apply it too, and do it whatever its gets return: so must this
        // one.
        KvCommand::Write { time_ms, writes } => apply_writes(
            &mut entry,
            AnswerBudget::lenient(audience),
            time_ms,
            &writes,
        )?,
        KvCommand::BoundedWrite { time_ms, writes } => {
            apply_writes(&mut entry, AnswerBudget::strict(audience), time_ms, &writes)?
        }
        KvCommand::Claim { slots } => claim(&mut entry, &slots)?,
        KvCommand::Compare => KvOutcome::Compared,
        KvCommand::SetReadOnly { reason } => set_read_only(&mut entry, reason),
        KvCommand::Move { id, slots, step } => {
            KvOutcome::Moved(apply_step(&mut entry, id, slots, step)?)
        }
        KvCommand::Install { time_ms, install } => {
            KvOutcome::Moved(destination::install(&mut entry, time_ms, install)?)
        }
    };

    // The index is needed only here: it orders the marks of changes that a move copies.
    Ok((outcome, entry.into_batch(index)?))
}

fn apply_writes<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    mut room: AnswerBudget,
    time_ms: u64,
    writes: &[Write],
) -> Result<KvOutcome, StoreError> {
    let mut memory = RequestMemory::open(entry, time_ms)?;
    let outcomes = writes
        .iter()
        .map(|write| apply_write(entry, &mut memory, &mut room, write))
        .collect::<Result<_, _>>()?;
    memory.close(entry);
    Ok(KvOutcome::Written(outcomes))
}

fn apply_step<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: BTreeSet<Slot>,
    step: MoveCommand,
) -> Result<MoveOutcome, StoreError> {
    match step {
        MoveCommand::Begin { to } => source::begin(entry, id, slots, to),
        MoveCommand::Freeze => source::freeze(entry, id, &slots),
        MoveCommand::Release => source::release(entry, id, &slots),
        MoveCommand::Abort => source::abort(entry, id, &slots),
        MoveCommand::Prepare { from } => destination::prepare(entry, id, slots, from),
        MoveCommand::Complete { chunk, contents } => {
            destination::complete(entry, id, &slots, chunk, &contents)
        }
        MoveCommand::Activate => destination::activate(entry, id, &slots),
        MoveCommand::Cancel => destination::cancel(entry, id, &slots),
        MoveCommand::Clear { limit } => clear::clear(entry, id, &slots, limit),
    }
}

/// First ownership of `slots`: all of them, or none if a move has ever touched one that is not
/// owned. What is owned already stays so.
fn claim<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    slots: &[Slot],
) -> Result<KvOutcome, StoreError> {
    // Checked for all slots before any is changed: a claim is all or nothing.
    for slot in slots {
        let state = entry.state(*slot)?;
        if !state.serves_reads() && state.generation.0 > 0 {
            return Ok(KvOutcome::ClaimRejected {
                slot: *slot,
                generation: state.generation,
            });
        }
    }
    for slot in slots {
        if entry.state(*slot)?.ownership == Ownership::NotOwned {
            entry.state_mut(*slot)?.ownership = Ownership::Owned;
        }
    }
    Ok(KvOutcome::Claimed)
}

fn set_read_only<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    reason: Option<String>,
) -> KvOutcome {
    match reason {
        Some(reason) => entry.put(READ_ONLY_KEY, codec::encode(&reason)),
        None => entry.delete(READ_ONLY_KEY),
    }
    KvOutcome::ReadOnlySet
}

/// An operation, its position in its write, and its slot.
#[derive(Clone, Copy)]
struct PlacedOperation<'a> {
    position: usize,
    slot: Slot,
    operation: &'a Operation,
}

fn place(write: &Write) -> Vec<PlacedOperation<'_>> {
    let operations = write.operations.iter().enumerate();
    operations
        .map(|(position, operation)| PlacedOperation {
            position,
            slot: slot_of(&operation.key),
            operation,
        })
        .collect()
}

/// Returns why the shard may not answer for all of the slots, if so.
fn wrong_owner<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    placed: &[PlacedOperation<'_>],
) -> Result<Option<WriteRejection>, StoreError> {
    for PlacedOperation { slot, .. } in placed {
        let state = entry.state(*slot)?;
        if !state.serves_reads() {
            return Ok(Some(WriteRejection::WrongOwner {
                slot: *slot,
                moved_to: state.moved_to,
            }));
        }
    }
    Ok(None)
}

/// Returns why the map as it is refuses a write because of where its slots are, or are going: an
/// entry with it would be answered so, and need not be made. None says nothing: whether the write
/// is done is for [`apply`] to decide.
pub fn refused_by_place(
    read: &impl Read,
    write: &Write,
) -> Result<Option<WriteRejection>, StoreError> {
    let mut entry = EntryTransaction::new(read);
    let placed = place(write);
    if let Some(rejection) = wrong_owner(&mut entry, &placed)? {
        return Ok(Some(rejection));
    }

    // The common case: nothing is frozen, and the memory of requests need not be read.
    if frozen(&mut entry, &placed)?.is_none() {
        return Ok(None);
    }
    // What was answered before is answered again, also from a slot that is frozen.
    match recall_if_keyed(&mut entry, write, &placed)? {
        Ok(parts) => frozen(&mut entry, &fresh_of(&parts, &placed)),
        Err(_) => Ok(None),
    }
}

/// Returns that a move holds back writes to one of the slots, if so.
fn frozen<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    placed: &[PlacedOperation<'_>],
) -> Result<Option<WriteRejection>, StoreError> {
    for PlacedOperation { slot, .. } in placed {
        if entry.state(*slot)?.ownership == Ownership::Frozen
            && !mutants::is_on(Mutant::FreezeNotObeyed)
        {
            return Ok(Some(WriteRejection::Frozen { slot: *slot }));
        }
    }
    Ok(None)
}

fn apply_write<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    memory: &mut RequestMemory,
    room: &mut AnswerBudget,
    write: &Write,
) -> Result<WriteOutcome, StoreError> {
    let placed = place(write);
    if let Some(rejection) = wrong_owner(entry, &placed)? {
        return Ok(WriteOutcome::Rejected(rejection));
    }
    if let Some(key) = &write.idempotency_key {
        return apply_once(entry, memory, room, key, &placed);
    }

    // Nothing is remembered of a write without a key: it is decided and done at once.
    let mut draft = match decide(entry, &placed)? {
        Ok(draft) => draft,
        Err(rejection) => return Ok(WriteOutcome::Rejected(rejection)),
    };

    // Counted on every replica, also where nobody waits: a rejection must be the same on all.
    let fits = room.take(draft.gets.bytes());
    if !fits && room.is_strict() {
        return Ok(WriteOutcome::Rejected(draft.gets.too_large()));
    }
    let is_answered = draft.gets.is_empty() || (fits && room.is_wanted());
    if is_answered {
        draft.gets.load(entry, |_| true, &mut draft.outcomes)?;
    }
    let outcomes = draft.commit(entry)?;
    Ok(if is_answered {
        WriteOutcome::Applied(outcomes)
    } else {
        WriteOutcome::Unanswered
    })
}

/// Answers gets alone from the map as it is, as their write would be answered in an entry; but what
/// a move holds back can be read, and nothing is remembered: a read may be done again. What was
/// remembered of it is answered again, as is a key that was used otherwise.
///
/// `charge` is told how many bytes of records the answer holds, before any of them is read; where
/// it says no, there is no answer.
pub fn answer_gets(
    read: &impl Read,
    write: &Write,
    charge: impl FnOnce(usize) -> bool,
) -> Result<Option<WriteOutcome>, StoreError> {
    // Of this one nothing is kept but the answer.
    let mut entry = EntryTransaction::new(read);
    let placed = place(write);
    if let Some(rejection) = wrong_owner(&mut entry, &placed)? {
        return Ok(Some(WriteOutcome::Rejected(rejection)));
    }
    let mut parts = match recall_if_keyed(&mut entry, write, &placed)? {
        Ok(parts) => parts,
        Err(rejection) => return Ok(Some(WriteOutcome::Rejected(rejection))),
    };

    let fresh = fresh_of(&parts, &placed);
    let mut decided = match look_up(&mut entry, &fresh)? {
        Ok(draft) => Ok(draft),
        // Without a key nothing is remembered, so the first failed condition is the whole answer.
        Err((position, current)) if parts.is_empty() => {
            let rejection = WriteRejection::ConditionFailed {
                operation: position,
                current,
            };
            return Ok(Some(WriteOutcome::Rejected(rejection)));
        }
        Err(failed) => Err(failed),
    };

    // Charged before a value is read: with the remembered answers it may be more than there is room
    // for.
    let remembered: usize = parts.values().filter_map(SlotPart::stored_bytes).sum();
    if !charge(remembered + decided.as_ref().map_or(0, |draft| draft.gets.bytes())) {
        return Ok(None);
    }
    if let Ok(draft) = &mut decided {
        draft.gets.load(&entry, |_| true, &mut draft.outcomes)?;
    }

    let key = match (&write.idempotency_key, decided) {
        (None, Ok(draft)) => return Ok(Some(WriteOutcome::Applied(draft.outcomes))),
        (None, Err((operation, current))) => {
            return Ok(Some(WriteOutcome::Rejected(
                WriteRejection::ConditionFailed { operation, current },
            )));
        }
        // With a key, slots that were answered before are joined with those that are read now.
        (Some(key), decided) => {
            for (slot, answer) in fresh_answers(&parts, &fresh, &decided) {
                if let Some(part) = parts.get_mut(&slot) {
                    part.remembered = Some(RememberedAnswer::Here(answer));
                }
            }
            key
        }
    };
    load_remembered(&entry, key, &mut parts)?;
    merge_answers(&parts, placed.len()).map(Some)
}

/// Bytes of records that the gets of a write would return.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GetsWeight {
    pub bytes: usize,
    /// The most that the memory of requests would have to keep of it in any one slot. Zero for a
    /// write that is not remembered.
    pub remembered_bytes_max: usize,
}

/// Upper bound of the bytes that an operation takes in the record of an answered request, besides
/// the value that it got.
const REMEMBERED_PER_OPERATION: usize = 32;

/// Returns what the gets of a write would return by the map as it is, without those of slots in
/// which the write was answered before.
pub fn weigh_gets(read: &impl Read, write: &Write) -> Result<GetsWeight, StoreError> {
    let mut entry = EntryTransaction::new(read);
    let placed = place(write);
    let fresh = match recall_if_keyed(&mut entry, write, &placed)? {
        Ok(parts) => fresh_of(&parts, &placed),
        // It will be rejected.
        Err(_) => return Ok(GetsWeight::default()),
    };

    // Only lengths are looked at: the caller charges the values before they are read.
    let mut weight = GetsWeight::default();
    let mut slot_weights = BTreeMap::<Slot, usize>::new();
    // A get finds what an operation before it has written.
    let mut written = BTreeMap::<&Bytes, usize>::new();
    for PlacedOperation {
        slot, operation, ..
    } in &fresh
    {
        let bytes = match &operation.action {
            Action::Get => match written.get(&operation.key) {
                Some(bytes) => *bytes,
                None => read
                    .start_of(&data_key(*slot, &operation.key), 0)?
                    .map_or(0, |stored| stored.len),
            },
            Action::Put { value, .. } => {
                written.insert(&operation.key, value.len() + REVISION_BYTES);
                0
            }
            Action::Delete => {
                written.insert(&operation.key, 0);
                0
            }
        };
        weight.bytes += bytes;
        *slot_weights.entry(*slot).or_default() += bytes + REMEMBERED_PER_OPERATION;
    }

    // An answer is remembered per slot, so the fullest slot decides whether it fits.
    if write.idempotency_key.is_some() {
        weight.remembered_bytes_max = slot_weights.into_values().max().unwrap_or_default();
    }
    Ok(weight)
}

/// A slot of a write with a key.
struct SlotPart {
    /// Positions of the slot's operations, ascending.
    positions: Vec<usize>,
    fingerprint: Fingerprint,
    /// The answer in the memory of requests, if there is one.
    remembered: Option<RememberedAnswer>,
}

/// An answer that was given before.
enum RememberedAnswer {
    /// It is in the map, in a record of so many bytes.
    Stored(usize),
    Here(RequestAnswer),
}

impl SlotPart {
    fn stored_bytes(&self) -> Option<usize> {
        match self.remembered {
            Some(RememberedAnswer::Stored(bytes)) => Some(bytes),
            Some(RememberedAnswer::Here(_)) | None => None,
        }
    }
}

/// The operations in slots in which the write was not answered before.
fn fresh_of<'a>(
    parts: &BTreeMap<Slot, SlotPart>,
    placed: &[PlacedOperation<'a>],
) -> Vec<PlacedOperation<'a>> {
    let is_remembered = |slot: &Slot| {
        parts
            .get(slot)
            .is_some_and(|part| part.remembered.is_some())
    };
    placed
        .iter()
        .filter(|item| !is_remembered(&item.slot))
        .copied()
        .collect()
}

/// A write with an idempotency key: what it was answered before, it is answered again; the rest is
/// done, and remembered.
fn apply_once<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    memory: &mut RequestMemory,
    room: &mut AnswerBudget,
    key: &[u8],
    placed: &[PlacedOperation<'_>],
) -> Result<WriteOutcome, StoreError> {
    let mut parts = match recall(entry, memory, key, placed)? {
        Ok(parts) => parts,
        Err(rejection) => return Ok(WriteOutcome::Rejected(rejection)),
    };
    let fresh = fresh_of(&parts, placed);

    // Slots that were answered before take no part: doing their operations again would apply the
    // write twice.
    let mut fits = true;
    if !fresh.is_empty() {
        let mut decided = match decide(entry, &fresh)? {
            Err(WriteRejection::ConditionFailed { operation, current }) => {
                Err((operation, current))
            }
            Err(rejection) => return Ok(WriteOutcome::Rejected(rejection)),
            Ok(draft) => Ok(draft),
        };
        // A record that is larger than the memory of its slot is never made. That of a slot before
        // it is, because room is made for it.
        let mut unfit = None;
        if let Ok(draft) = &mut decided {
            fits = room.take(draft.gets.bytes());
            if !fits && room.is_strict() {
                return Ok(WriteOutcome::Rejected(draft.gets.too_large()));
            }
            unfit = draft
                .gets
                .first_beyond(REQUESTS_BYTES_MAX, |at| fresh[at].slot);
            draft.gets.load(
                entry,
                |at| unfit.is_none_or(|slot| fresh[at].slot < slot),
                &mut draft.outcomes,
            )?;
        }

        let answers = fresh_answers(&parts, &fresh, &decided);
        let mut records = Vec::with_capacity(answers.len());
        for (slot, answer) in answers {
            let Some(part) = parts.get_mut(&slot) else {
                continue;
            };
            let (time_ms, fingerprint) = (memory.now_ms(), part.fingerprint);
            let record = RequestRecord {
                time_ms,
                fingerprint,
                answer,
            };
            let bytes = record.encode();
            if unfit == Some(slot) || !memory.make_room(entry, slot, key, bytes.len())? {
                return Ok(WriteOutcome::Rejected(WriteRejection::RequestsFull {
                    slot,
                }));
            }
            part.remembered = Some(RememberedAnswer::Here(record.answer));
            records.push((slot, bytes));
        }

        // Committed only now: until every slot had room for its answer, the write could still be
        // rejected.
        if let Ok(draft) = decided {
            draft.commit(entry)?;
        }
        for (slot, bytes) in records {
            memory.remember(entry, slot, key, bytes)?;
        }
    }

    // Remembered answers are charged too: read again, they take as much memory as when they were
    // new.
    let stored: usize = parts.values().filter_map(SlotPart::stored_bytes).sum();
    fits &= room.take(stored);
    if !room.is_wanted() || !fits {
        return Ok(WriteOutcome::Unanswered);
    }
    load_remembered(entry, key, &mut parts)?;
    merge_answers(&parts, placed.len())
}

/// As [`recall`], for a write that may have no key.
fn recall_if_keyed<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    write: &Write,
    placed: &[PlacedOperation<'_>],
) -> Result<Result<BTreeMap<Slot, SlotPart>, WriteRejection>, StoreError> {
    match &write.idempotency_key {
        Some(key) => {
            let memory = RequestMemory::open(entry, 0)?;
            recall(entry, &memory, key, placed)
        }
        None => Ok(Ok(BTreeMap::new())),
    }
}

/// The slots of the write, each with what is remembered of it; a rejection if the key was used for
/// something else.
fn recall<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    memory: &RequestMemory,
    key: &[u8],
    placed: &[PlacedOperation<'_>],
) -> Result<Result<BTreeMap<Slot, SlotPart>, WriteRejection>, StoreError> {
    let mut positions: BTreeMap<Slot, Vec<usize>> = BTreeMap::new();
    for item in placed {
        positions.entry(item.slot).or_default().push(item.position);
    }

    // The fingerprint is of one slot's operations: after a move, another set of slots may come
    // together.
    let mut parts = BTreeMap::new();
    for (slot, positions) in positions {
        let fingerprint = fingerprint(positions.iter().map(|position| placed[*position].operation));
        let found = memory.find(entry, slot, key)?;

        // Another request under this key: its answer would be wrong for this one.
        if found.is_some_and(|found| found.fingerprint != fingerprint) {
            return Ok(Err(WriteRejection::KeyReused { slot }));
        }
        let remembered = found.map(|found| RememberedAnswer::Stored(found.bytes));
        parts.insert(
            slot,
            SlotPart {
                positions,
                fingerprint,
                remembered,
            },
        );
    }
    Ok(Ok(parts))
}

fn load_remembered<R: Read>(
    entry: &EntryTransaction<'_, R>,
    key: &[u8],
    parts: &mut BTreeMap<Slot, SlotPart>,
) -> Result<(), StoreError> {
    for (slot, part) in parts {
        if let Some(RememberedAnswer::Stored(_)) = part.remembered {
            part.remembered = RequestMemory::answer(entry, *slot, key)?.map(RememberedAnswer::Here);
        }
    }
    Ok(())
}

/// Returns the answer to remember for each slot of `fresh`: its outcomes, or the operation whose
/// condition failed and that key's revision.
fn fresh_answers(
    parts: &BTreeMap<Slot, SlotPart>,
    fresh: &[PlacedOperation<'_>],
    decided: &Result<WriteDraft, (usize, Option<Revision>)>,
) -> BTreeMap<Slot, RequestAnswer> {
    let mut answers = BTreeMap::new();
    match decided {
        Ok(draft) => {
            for (item, outcome) in fresh.iter().zip(&draft.outcomes) {
                let answer = answers
                    .entry(item.slot)
                    .or_insert_with(|| RequestAnswer::Applied(Vec::new()));
                if let RequestAnswer::Applied(outcomes) = answer {
                    outcomes.push(outcome.clone());
                }
            }
        }
        // The failed condition rejects the whole write. Each slot remembers it, so that no retry
        // does a part.
        Err((operation, current)) => {
            let failed = parts.iter().find_map(|(slot, part)| {
                Some((*slot, part.positions.binary_search(operation).ok()?))
            });
            let (slot, nth) = failed.expect("the operation that failed is one of a part");
            let answer = RequestAnswer::ConditionFailed {
                slot,
                nth,
                current: *current,
            };
            answers.extend(fresh.iter().map(|item| (item.slot, answer.clone())));
        }
    }
    answers
}

/// One outcome of the whole write from the answers of its slots.
fn merge_answers(
    parts: &BTreeMap<Slot, SlotPart>,
    operations: usize,
) -> Result<WriteOutcome, StoreError> {
    let mut results: Vec<Option<Result<OperationOutcome, WriteRejection>>> = vec![None; operations];
    for (slot, part) in parts {
        match &part.remembered {
            Some(RememberedAnswer::Here(RequestAnswer::Applied(outcomes)))
                if outcomes.len() == part.positions.len() =>
            {
                for (position, outcome) in part.positions.iter().zip(outcomes) {
                    results[*position] = Some(Ok(outcome.clone()));
                }
            }
            Some(RememberedAnswer::Here(RequestAnswer::ConditionFailed { slot, nth, current })) => {
                // The operation may now be in another shard's part of the batch: then the first of
                // this slot stands for it.
                let named = parts.get(slot).and_then(|part| part.positions.get(*nth));
                let rejection = WriteRejection::ConditionFailed {
                    operation: *named.unwrap_or(&part.positions[0]),
                    current: *current,
                };
                for position in &part.positions {
                    results[*position] = Some(Err(rejection.clone()));
                }
            }
            Some(
                RememberedAnswer::Here(RequestAnswer::Applied(_)) | RememberedAnswer::Stored(_),
            )
            | None => {
                return Err(StoreError::Damaged(format!(
                    "the record of a request in slot {slot} does not fit the request"
                )));
            }
        }
    }

    // All operations alike make one answer for the write; anything else is told one by one.
    let results: Vec<_> = results.into_iter().flatten().collect();
    let outcomes: Option<Vec<OperationOutcome>> = results
        .iter()
        .map(|result| result.as_ref().ok().cloned())
        .collect();
    Ok(match (outcomes, results.first()) {
        (Some(outcomes), _) => WriteOutcome::Applied(outcomes),
        (None, Some(Err(first))) if results.iter().all(|result| result.as_ref() == Err(first)) => {
            WriteOutcome::Rejected(first.clone())
        }
        (None, _) => WriteOutcome::Mixed(results),
    })
}

/// Collects what operations will do once they are committed.
struct WriteDraft {
    /// One per operation, in order. What gets found is left out until it is loaded.
    outcomes: Vec<OperationOutcome>,
    gets: PendingGets,
    /// To the data of the map.
    changes: WriteBatch,
    contents: BTreeMap<Slot, SlotContents>,
}

impl WriteDraft {
    fn commit<R: Read>(
        self,
        entry: &mut EntryTransaction<'_, R>,
    ) -> Result<Vec<OperationOutcome>, StoreError> {
        entry.merge(self.changes);
        for (slot, contents) in self.contents {
            entry.state_mut(slot)?.contents = contents;
        }
        Ok(self.outcomes)
    }
}

/// Returns what the operations will do, or the reason why nothing may be done. The caller has
/// checked ownership.
fn decide<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    placed: &[PlacedOperation<'_>],
) -> Result<Result<WriteDraft, WriteRejection>, StoreError> {
    if let Some(rejection) = frozen(entry, placed)? {
        return Ok(Err(rejection));
    }
    let decided = look_up(entry, placed)?;
    Ok(decided
        .map_err(|(operation, current)| WriteRejection::ConditionFailed { operation, current }))
}

/// Returns what the operations will do, or the position of the first whose condition does not hold,
/// and the revision of its key.
fn look_up<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    placed: &[PlacedOperation<'_>],
) -> Result<Result<WriteDraft, (usize, Option<Revision>)>, StoreError> {
    let mut found = Vec::with_capacity(placed.len());
    for item in placed {
        let data_key = data_key(item.slot, &item.operation.key);
        // A small value that is asked for is had at once.
        let start_bytes = if item.operation.action == Action::Get {
            START_BYTES
        } else {
            REVISION_BYTES
        };
        let stored = entry.start_of(&data_key, start_bytes)?;
        let current = stored
            .as_ref()
            .map(|stored| stored_revision(&stored.start))
            .transpose()?;
        if !item.operation.condition.holds(current) {
            return Ok(Err((item.position, current)));
        }
        found.push((data_key, stored));
    }

    // Every condition holds. The operations follow, each seeing the ones before it in the draft.
    let mut draft = WriteDraft {
        outcomes: Vec::with_capacity(placed.len()),
        gets: PendingGets::default(),
        changes: WriteBatch::default(),
        contents: BTreeMap::new(),
    };
    for (item, (data_key, stored)) in placed.iter().zip(found) {
        let stored = match draft.changes.get(&data_key) {
            Some(change) => change
                .as_ref()
                .map(|value| ValueStart::from_value(value, usize::MAX)),
            None => stored,
        };
        let outcome = draft.perform(entry, *item, data_key, stored)?;
        draft.outcomes.push(outcome);
    }
    Ok(Ok(draft))
}

impl WriteDraft {
    /// Does one operation on the key that is `stored` so.
    fn perform<R: Read>(
        &mut self,
        entry: &mut EntryTransaction<'_, R>,
        item: PlacedOperation<'_>,
        data_key: Bytes,
        stored: Option<ValueStart>,
    ) -> Result<OperationOutcome, StoreError> {
        let (after, outcome) = match (&item.operation.action, &stored) {
            (Action::Get, None) => return Ok(OperationOutcome::Got(None)),
            (Action::Get, Some(stored)) => {
                self.gets.add(self.outcomes.len(), data_key, stored);
                return Ok(OperationOutcome::Got(None));
            }
            (Action::Delete, None) => return Ok(OperationOutcome::Deleted { revision: None }),
            (Action::Delete, Some(_)) => {
                let revision = self.next_revision(entry, item.slot)?;
                (
                    None,
                    OperationOutcome::Deleted {
                        revision: Some(revision),
                    },
                )
            }
            (Action::Put { media, value }, _) => {
                let revision = self.next_revision(entry, item.slot)?;
                let record = Record {
                    revision,
                    media: media.clone(),
                    value: value.clone(),
                };
                (
                    Some(encode_record(&record)),
                    OperationOutcome::Put {
                        revision,
                        created: stored.is_none(),
                    },
                )
            }
        };

        // The counters move with the data: a move compares them to prove that nothing was lost.
        let (before, now) = (
            stored.map(|stored| stored.len),
            after.as_ref().map(Bytes::len),
        );
        let contents = self.contents_mut(entry, item.slot)?;
        contents
            .recount(item.operation.key.len(), before, now)
            .ok_or_else(|| {
                StoreError::Damaged(format!(
                    "slot {} holds more than was counted in it",
                    item.slot
                ))
            })?;
        match after {
            Some(bytes) => self.changes.put(data_key, bytes),
            None => self.changes.delete(data_key),
        }
        Ok(outcome)
    }

    fn contents_mut<R: Read>(
        &mut self,
        entry: &mut EntryTransaction<'_, R>,
        slot: Slot,
    ) -> Result<&mut SlotContents, StoreError> {
        use std::collections::btree_map::Entry as Place;
        match self.contents.entry(slot) {
            Place::Occupied(place) => Ok(place.into_mut()),
            Place::Vacant(place) => Ok(place.insert(entry.state(slot)?.contents)),
        }
    }

    fn next_revision<R: Read>(
        &mut self,
        entry: &mut EntryTransaction<'_, R>,
        slot: Slot,
    ) -> Result<Revision, StoreError> {
        let contents = self.contents_mut(entry, slot)?;
        contents.revision.0 += 1;
        Ok(contents.revision)
    }
}
