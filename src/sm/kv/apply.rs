//! What an entry does to a shard's map.
//!
//! Each write of an entry sees what the earlier ones did. Within a write everything is decided before anything is done, in this order:
//! 1. ownership: the shard owns the slots of all operations, or the write is rejected;
//! 2. the memory of requests: slots in which the write was answered before are answered again, and take no part in what follows;
//! 3. freeze: no move holds back writes to the other slots, or the write is rejected;
//! 4. conditions: all of them hold of the map as it is before the write, or none of the operations is done;
//! 5. room for the answers in the memory of requests, or the write is rejected.
//!
//! Then the operations are done in order, each seeing the earlier ones of its write. What was decided by (4) or done is remembered for a
//! write with a key; rejections by (1), (3) and (5) are not, since the same write may well be accepted later.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::entry::Entry;
use super::record::{decode_record, encode_record, stored_revision};
use super::{
    Action, Command, MoveOutcome, MoveStep, Operation, OperationOutcome, Outcome, Record, Rejection, Write, WriteOutcome,
};
use super::{clear, destination, source};
use crate::sm::ports::{Read, StoreError, WriteBatch};
use crate::sm::requests::{Answer, Fingerprint, Memory, RequestRecord, fingerprint};
use crate::sm::slots::{Contents, Ownership, data_key, slot_of};
use crate::types::{MoveId, Revision, Slot};

/// What `command` at `index` of the log does to the map of a shard, and what it answers. The index has a part only in the marks of
/// changes in slots that a move copies.
///
/// A rejection is an answer, the same on every replica; an error is a broken disk or an undecodable map and stops the group.
pub fn apply(read: &impl Read, index: u64, command: Command) -> Result<(Outcome, WriteBatch), StoreError> {
    let mut entry = Entry::new(read);
    let outcome = match command {
        Command::Write { time_ms, writes } => {
            let mut memory = Memory::open(&mut entry, time_ms)?;
            let outcomes = writes.iter().map(|write| apply_write(&mut entry, &mut memory, write)).collect::<Result<_, _>>()?;
            memory.close(&mut entry);
            Outcome::Written(outcomes)
        }
        Command::Claim { slots } => claim(&mut entry, &slots)?,
        Command::Move { id, slots, step } => Outcome::Moved(apply_step(&mut entry, id, slots, step)?),
        Command::Install { time_ms, install } => Outcome::Moved(destination::install(&mut entry, time_ms, install)?),
    };
    Ok((outcome, entry.into_batch(index)?))
}

fn apply_step<R: Read>(
    entry: &mut Entry<'_, R>,
    id: MoveId,
    slots: BTreeSet<Slot>,
    step: MoveStep,
) -> Result<MoveOutcome, StoreError> {
    match step {
        MoveStep::Begin { to } => source::begin(entry, id, slots, to),
        MoveStep::Freeze => source::freeze(entry, id, &slots),
        MoveStep::Release => source::release(entry, id, &slots),
        MoveStep::Abort => source::abort(entry, id, &slots),
        MoveStep::Prepare { from } => destination::prepare(entry, id, slots, from),
        MoveStep::Complete { chunk, contents } => destination::complete(entry, id, &slots, chunk, &contents),
        MoveStep::Activate => destination::activate(entry, id, &slots),
        MoveStep::Cancel => destination::cancel(entry, id, &slots),
        MoveStep::Clear { limit } => clear::clear(entry, id, &slots, limit),
    }
}

/// First ownership of `slots`: all of them, or none if a move has ever touched one that is not owned. What is owned already stays so.
fn claim<R: Read>(entry: &mut Entry<'_, R>, slots: &[Slot]) -> Result<Outcome, StoreError> {
    for slot in slots {
        let state = entry.state(*slot)?;
        if !state.serves_reads() && state.generation.0 > 0 {
            return Ok(Outcome::ClaimRejected { slot: *slot, generation: state.generation });
        }
    }
    for slot in slots {
        if entry.state(*slot)?.ownership == Ownership::NotOwned {
            entry.state_mut(*slot)?.ownership = Ownership::Owned;
        }
    }
    Ok(Outcome::Claimed)
}

/// An operation, its position in its write, and its slot.
#[derive(Clone, Copy)]
struct Placed<'a> {
    position: usize,
    slot: Slot,
    operation: &'a Operation,
}

fn apply_write<R: Read>(entry: &mut Entry<'_, R>, memory: &mut Memory, write: &Write) -> Result<WriteOutcome, StoreError> {
    let placed: Vec<Placed<'_>> = write
        .operations
        .iter()
        .enumerate()
        .map(|(position, operation)| Placed { position, slot: slot_of(&operation.key), operation })
        .collect();
    for Placed { slot, .. } in &placed {
        let state = entry.state(*slot)?;
        if !state.serves_reads() {
            return Ok(WriteOutcome::Rejected(Rejection::WrongOwner { slot: *slot, moved_to: state.moved_to }));
        }
    }
    match &write.idempotency_key {
        Some(key) => apply_once(entry, memory, key, &placed),
        None => match decide(entry, &placed)? {
            Err(rejection) => Ok(WriteOutcome::Rejected(rejection)),
            Ok(draft) => {
                let outcomes = draft.commit(entry)?;
                Ok(WriteOutcome::Applied(outcomes))
            }
        },
    }
}

/// A slot of a write with a key.
struct Part {
    /// Positions of the slot's operations, ascending.
    positions: Vec<usize>,
    fingerprint: Fingerprint,
    /// What the memory of requests has of it.
    remembered: Option<Answer>,
}

/// A write with an idempotency key: what it was answered before, it is answered again; the rest is done, and remembered.
fn apply_once<R: Read>(
    entry: &mut Entry<'_, R>,
    memory: &mut Memory,
    key: &[u8],
    placed: &[Placed<'_>],
) -> Result<WriteOutcome, StoreError> {
    let mut parts = match recall(entry, memory, key, placed)? {
        Ok(parts) => parts,
        Err(rejection) => return Ok(WriteOutcome::Rejected(rejection)),
    };
    let is_fresh = |item: &&Placed<'_>| parts.get(&item.slot).is_some_and(|part| part.remembered.is_none());
    let fresh: Vec<Placed<'_>> = placed.iter().filter(is_fresh).copied().collect();
    if !fresh.is_empty() {
        let decided = match decide(entry, &fresh)? {
            Err(Rejection::ConditionFailed { operation, current }) => Err((operation, current)),
            Err(rejection) => return Ok(WriteOutcome::Rejected(rejection)),
            Ok(draft) => Ok(draft),
        };
        let answers = fresh_answers(&parts, &fresh, &decided);
        let mut records = Vec::with_capacity(answers.len());
        for (slot, answer) in answers {
            let Some(part) = parts.get_mut(&slot) else { continue };
            let (time_ms, fingerprint) = (memory.now_ms(), part.fingerprint);
            let record = RequestRecord { time_ms, fingerprint, answer };
            let bytes = record.encode();
            if !memory.make_room(entry, slot, key, bytes.len())? {
                return Ok(WriteOutcome::Rejected(Rejection::RequestsFull { slot }));
            }
            part.remembered = Some(record.answer);
            records.push((slot, bytes));
        }
        if let Ok(draft) = decided {
            draft.commit(entry)?;
        }
        for (slot, bytes) in records {
            memory.remember(entry, slot, key, bytes)?;
        }
    }
    merge_answers(&parts, placed.len())
}

/// The slots of the write, each with what is remembered of it; a rejection if the key was used for something else.
fn recall<R: Read>(
    entry: &mut Entry<'_, R>,
    memory: &Memory,
    key: &[u8],
    placed: &[Placed<'_>],
) -> Result<Result<BTreeMap<Slot, Part>, Rejection>, StoreError> {
    let mut positions: BTreeMap<Slot, Vec<usize>> = BTreeMap::new();
    for item in placed {
        positions.entry(item.slot).or_default().push(item.position);
    }
    let mut parts = BTreeMap::new();
    for (slot, positions) in positions {
        let fingerprint = fingerprint(positions.iter().map(|position| placed[*position].operation));
        let record = memory.find(entry, slot, key)?;
        if record.as_ref().is_some_and(|record| record.fingerprint != fingerprint) {
            return Ok(Err(Rejection::KeyReused { slot }));
        }
        parts.insert(slot, Part { positions, fingerprint, remembered: record.map(|record| record.answer) });
    }
    Ok(Ok(parts))
}

/// What is to be remembered for each slot of `fresh`: its outcomes, or the operation whose condition failed and that key's revision.
fn fresh_answers(
    parts: &BTreeMap<Slot, Part>,
    fresh: &[Placed<'_>],
    decided: &Result<Draft, (usize, Option<Revision>)>,
) -> BTreeMap<Slot, Answer> {
    let mut answers = BTreeMap::new();
    match decided {
        Ok(draft) => {
            for (item, outcome) in fresh.iter().zip(&draft.outcomes) {
                let answer = answers.entry(item.slot).or_insert_with(|| Answer::Applied(Vec::new()));
                if let Answer::Applied(outcomes) = answer {
                    outcomes.push(outcome.clone());
                }
            }
        }
        Err((operation, current)) => {
            let failed = parts.iter().find_map(|(slot, part)| Some((*slot, part.positions.binary_search(operation).ok()?)));
            let (slot, nth) = failed.expect("the operation that failed is one of a part");
            let answer = Answer::ConditionFailed { slot, nth, current: *current };
            answers.extend(fresh.iter().map(|item| (item.slot, answer.clone())));
        }
    }
    answers
}

/// One outcome of the whole write from the answers of its slots.
fn merge_answers(parts: &BTreeMap<Slot, Part>, operations: usize) -> Result<WriteOutcome, StoreError> {
    let mut results: Vec<Option<Result<OperationOutcome, Rejection>>> = vec![None; operations];
    for (slot, part) in parts {
        match &part.remembered {
            Some(Answer::Applied(outcomes)) if outcomes.len() == part.positions.len() => {
                for (position, outcome) in part.positions.iter().zip(outcomes) {
                    results[*position] = Some(Ok(outcome.clone()));
                }
            }
            Some(Answer::ConditionFailed { slot, nth, current }) => {
                // The operation may now be in another shard's part of the batch: then the first of this slot stands for it.
                let named = parts.get(slot).and_then(|part| part.positions.get(*nth));
                let rejection = Rejection::ConditionFailed { operation: *named.unwrap_or(&part.positions[0]), current: *current };
                for position in &part.positions {
                    results[*position] = Some(Err(rejection.clone()));
                }
            }
            Some(Answer::Applied(_)) | None => {
                return Err(StoreError::Damaged(format!("the record of a request in slot {slot} does not fit the request")));
            }
        }
    }
    let results: Vec<_> = results.into_iter().flatten().collect();
    let outcomes: Option<Vec<OperationOutcome>> = results.iter().map(|result| result.as_ref().ok().cloned()).collect();
    Ok(match (outcomes, results.first()) {
        (Some(outcomes), _) => WriteOutcome::Applied(outcomes),
        (None, Some(Err(first))) if results.iter().all(|result| result.as_ref() == Err(first)) => {
            WriteOutcome::Rejected(first.clone())
        }
        (None, _) => WriteOutcome::Mixed(results),
    })
}

/// What operations will do, once committed.
struct Draft {
    /// One per operation, in order.
    outcomes: Vec<OperationOutcome>,
    /// To the data of the map.
    changes: WriteBatch,
    contents: BTreeMap<Slot, Contents>,
}

impl Draft {
    fn commit<R: Read>(self, entry: &mut Entry<'_, R>) -> Result<Vec<OperationOutcome>, StoreError> {
        entry.merge(self.changes);
        for (slot, contents) in self.contents {
            entry.state_mut(slot)?.contents = contents;
        }
        Ok(self.outcomes)
    }
}

/// What the operations will do, or why nothing may be done. Ownership is the caller's to check.
fn decide<R: Read>(entry: &mut Entry<'_, R>, placed: &[Placed<'_>]) -> Result<Result<Draft, Rejection>, StoreError> {
    for Placed { slot, .. } in placed {
        if entry.state(*slot)?.ownership == Ownership::Frozen {
            return Ok(Err(Rejection::Frozen { slot: *slot }));
        }
    }
    let mut found = Vec::with_capacity(placed.len());
    for item in placed {
        let data_key = data_key(item.slot, &item.operation.key);
        let stored = entry.get(&data_key)?;
        let current = stored.as_deref().map(stored_revision).transpose()?;
        if !item.operation.condition.holds(current) {
            return Ok(Err(Rejection::ConditionFailed { operation: item.position, current }));
        }
        found.push((data_key, stored));
    }
    let mut draft =
        Draft { outcomes: Vec::with_capacity(placed.len()), changes: WriteBatch::default(), contents: BTreeMap::new() };
    for (item, (data_key, stored)) in placed.iter().zip(found) {
        let stored = draft.changes.get(&data_key).cloned().unwrap_or(stored);
        let outcome = draft.perform(entry, *item, data_key, stored)?;
        draft.outcomes.push(outcome);
    }
    Ok(Ok(draft))
}

impl Draft {
    /// Does one operation on the key that is `stored` so.
    fn perform<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        item: Placed<'_>,
        data_key: Bytes,
        stored: Option<Bytes>,
    ) -> Result<OperationOutcome, StoreError> {
        let user_key = &item.operation.key;
        let (after, outcome) = match (&item.operation.action, &stored) {
            (Action::Get, _) => {
                let record = stored.as_ref().map(decode_record).transpose()?;
                return Ok(OperationOutcome::Got(record));
            }
            (Action::Delete, None) => return Ok(OperationOutcome::Deleted { revision: None }),
            (Action::Delete, Some(_)) => {
                let revision = self.next_revision(entry, item.slot)?;
                (None, OperationOutcome::Deleted { revision: Some(revision) })
            }
            (Action::Put { media, value }, _) => {
                let revision = self.next_revision(entry, item.slot)?;
                let record = Record { revision, media: media.clone(), value: value.clone() };
                (Some(encode_record(&record)), OperationOutcome::Put { revision, created: stored.is_none() })
            }
        };
        let contents = self.contents_mut(entry, item.slot)?;
        contents
            .recount(user_key.len(), stored.as_ref(), after.as_ref())
            .ok_or_else(|| StoreError::Damaged(format!("slot {} holds more than was counted in it", item.slot)))?;
        match after {
            Some(bytes) => self.changes.put(data_key, bytes),
            None => self.changes.delete(data_key),
        }
        Ok(outcome)
    }

    fn contents_mut<R: Read>(&mut self, entry: &mut Entry<'_, R>, slot: Slot) -> Result<&mut Contents, StoreError> {
        use std::collections::btree_map::Entry as Place;
        match self.contents.entry(slot) {
            Place::Occupied(place) => Ok(place.into_mut()),
            Place::Vacant(place) => Ok(place.insert(entry.state(slot)?.contents)),
        }
    }

    fn next_revision<R: Read>(&mut self, entry: &mut Entry<'_, R>, slot: Slot) -> Result<Revision, StoreError> {
        let contents = self.contents_mut(entry, slot)?;
        contents.revision.0 += 1;
        Ok(contents.revision)
    }
}
