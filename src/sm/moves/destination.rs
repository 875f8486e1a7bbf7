//! What the steps of a move do at its destination: the slots are prepared, filled chunk by chunk,
//! compared with the source, served; or given up, after an abort.
//!
//! Chunks are taken strictly in turn, each with the cursor from which the source goes on. So
//! whoever drives, and however often it is sent, what is installed is one unbroken reading of the
//! source; a driver that comes late is told where the install stands.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::command::{Install, InstallProgress, MoveOutcome, MovePhase, MoveRejection, OpenMove};
use super::decision::{
    MoveDecision, OTHER_SLOTS, change_all, done_before, every, not_open, refusal_to_open, unfit,
};
use super::observed::holds_anything;
use crate::mutants::{self, Mutant};
use crate::sm::kv::entry::EntryTransaction;
use crate::sm::kv::record::decode_record;
use crate::sm::ports::{Read, StoreError};
use crate::sm::requests::{RequestMemory, RequestRecord};
use crate::sm::slots::{
    Ownership, RequestsUsed, SlotContents, parse_data_key, parse_request_key, slot_of,
};
use crate::types::{GroupId, MoveId, Slot};

const NOT_THE_DESTINATION: &str = "this shard is the source of the move";

pub(in crate::sm) fn prepare<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: BTreeSet<Slot>,
    from: GroupId,
) -> MoveDecision {
    // A driver may send the step again, and so may the driver after it.
    if let Some(open) = entry.open_move(id)? {
        return Ok(match open.phase {
            MovePhase::Installing {
                from: begun,
                progress,
            } if begun == from && open.slots == slots => MoveOutcome::Installing(progress),
            _ => unfit("another move was opened here under this id"),
        });
    }

    // The slots must be empty: leftovers of an older move would be counted as this one's.
    let refusal = refusal_to_open(entry, id, &slots, |entry, slot, state| {
        Ok(match state.ownership {
            Ownership::Owned | Ownership::Leaving | Ownership::Frozen => {
                Some(MoveRejection::Owned { slot })
            }
            Ownership::Arriving => Some(MoveRejection::Leftovers { slot }),
            Ownership::NotOwned => {
                holds_anything(entry.map(), slot)?.then_some(MoveRejection::Leftovers { slot })
            }
        })
    })?;
    if let Some(refusal) = refusal {
        return Ok(refusal);
    }

    // From here on a later move of a slot meets this generation, and an earlier one is refused.
    change_all(entry, &slots, |state| {
        state.ownership = Ownership::Arriving;
        state.generation = id;
        state.contents = SlotContents::default();
        state.requests = RequestsUsed::default();
    })?;
    Ok(keep(entry, id, slots, from, InstallProgress::default()))
}

/// Stores how far the install is, and answers with it.
fn keep<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: BTreeSet<Slot>,
    from: GroupId,
    progress: InstallProgress,
) -> MoveOutcome {
    let phase = MovePhase::Installing {
        from,
        progress: progress.clone(),
    };
    entry.put_move(id, &OpenMove { slots, phase });
    MoveOutcome::Installing(progress)
}

pub(in crate::sm) fn install<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    time_ms: u64,
    install: Install,
) -> MoveDecision {
    let Some(open) = entry.open_move(install.id)? else {
        return Ok(MoveRejection::NotOpen.into());
    };
    let MovePhase::Installing { from, mut progress } = open.phase else {
        return Ok(unfit(NOT_THE_DESTINATION));
    };

    // A chunk that came before, or out of turn, changes nothing; the answer says where to go on.
    if progress.complete || install.chunk != progress.chunk {
        return Ok(MoveOutcome::Installing(progress));
    }

    // All pairs are read before the first is stored: a chunk is installed whole or not at all.
    let pairs: Result<Vec<Brought>, String> = install
        .pairs
        .iter()
        .map(|pair| read_pair(&open.slots, pair))
        .collect();
    let pairs = match pairs {
        Ok(pairs) => pairs,
        Err(why) => return Ok(MoveRejection::Unfit { why }.into()),
    };
    let mut memory = RequestMemory::open(entry, time_ms)?;
    for pair in pairs {
        match pair {
            Brought::Data {
                slot,
                user_key,
                map_key,
                value,
            } => put_data(entry, slot, &user_key, map_key, value)?,
            Brought::Request { slot, key, record } => {
                memory.adopt(entry, slot, &key, record, install.source_ms)?
            }
        }
    }
    memory.close(entry);

    // The cursor is stored with the data, so the next driver goes on exactly here.
    progress.chunk += 1;
    progress.cursor = install.cursor;
    Ok(keep(entry, install.id, open.slots, from, progress))
}

/// A pair of a chunk, understood.
enum Brought {
    Data {
        slot: Slot,
        user_key: Bytes,
        map_key: Bytes,
        value: Option<Bytes>,
    },
    Request {
        slot: Slot,
        key: Bytes,
        record: Option<RequestRecord>,
    },
}

/// Parses a pair, if it belongs to a move of `slots`. A peer's mistake is rejected: it must not
/// become an error of this shard.
fn read_pair(
    slots: &BTreeSet<Slot>,
    (map_key, value): &(Bytes, Option<Bytes>),
) -> Result<Brought, String> {
    let unfit = |why: &str| format!("{why}: {}", map_key.escape_ascii());
    if let Some((slot, user_key)) = parse_data_key(map_key) {
        if !slots.contains(&slot) || slot_of(&user_key) != slot {
            return Err(unfit("a key of another slot"));
        }
        if value
            .as_ref()
            .is_some_and(|value| decode_record(value).is_err())
        {
            return Err(unfit("an undecodable record"));
        }
        return Ok(Brought::Data {
            slot,
            user_key,
            map_key: map_key.clone(),
            value: value.clone(),
        });
    }

    // Not data, so it must be the record of a remembered request.
    let (slot, key) =
        parse_request_key(map_key).ok_or_else(|| unfit("neither data nor a request"))?;
    if !slots.contains(&slot) {
        return Err(unfit("a request of another slot"));
    }
    let record = value
        .as_ref()
        .map(|value| RequestRecord::decode(value))
        .transpose();
    Ok(Brought::Request {
        slot,
        key,
        record: record.map_err(|_| unfit("an undecodable request"))?,
    })
}

fn put_data<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    slot: Slot,
    user_key: &[u8],
    map_key: Bytes,
    value: Option<Bytes>,
) -> Result<(), StoreError> {
    let old_len = entry.start_of(&map_key, 0)?.map(|stored| stored.len);
    let contents = &mut entry.state_mut(slot)?.contents;
    contents
        .recount(user_key.len(), old_len, value.as_ref().map(Bytes::len))
        .ok_or_else(|| miscounted(slot))?;
    match value {
        Some(value) => entry.put(map_key, value),
        None => entry.delete(map_key),
    }
    Ok(())
}

pub(super) fn miscounted(slot: Slot) -> StoreError {
    StoreError::Damaged(format!("slot {slot} holds more than was counted in it"))
}

/// Compares what was installed with what the frozen source counts. Then nothing is installed any
/// more, and the slots go on counting revisions where the source stopped.
pub(in crate::sm) fn complete<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
    chunk: u64,
    contents: &BTreeMap<Slot, SlotContents>,
) -> MoveDecision {
    let Some(open) = entry.open_move(id)? else {
        return not_open(entry, id, slots);
    };
    let MovePhase::Installing { from, mut progress } = open.phase else {
        return Ok(unfit(NOT_THE_DESTINATION));
    };
    if open.slots != *slots || !contents.keys().eq(slots) {
        return Ok(unfit(OTHER_SLOTS));
    }
    if progress.complete || chunk != progress.chunk {
        return Ok(MoveOutcome::Installing(progress));
    }

    // The last check before the source may forget the slots.
    for (slot, source) in contents {
        let local = entry.state(*slot)?.contents;
        if (local.keys, local.bytes) != (source.keys, source.bytes) {
            return Ok(MoveRejection::Differs {
                slot: *slot,
                source: *source,
                here: local,
            }
            .into());
        }
    }

    // Revisions go on where the source stopped, so that none is ever used twice.
    for (slot, source) in contents {
        if mutants::is_on(Mutant::RevisionsBeginAnew) {
            break;
        }
        entry.state_mut(*slot)?.contents.revision = source.revision;
    }
    progress.complete = true;
    Ok(keep(entry, id, open.slots, from, progress))
}

pub(in crate::sm) fn activate<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
) -> MoveDecision {
    let Some(open) = entry.open_move(id)? else {
        if mutants::is_on(Mutant::OlderMoveActivates) {
            change_all(entry, slots, |state| state.ownership = Ownership::Owned)?;
            return Ok(MoveOutcome::Done);
        }
        return done_before(entry, id, slots, |state| {
            state.generation == id && state.ownership == Ownership::Owned
        });
    };
    match open.phase {
        _ if open.slots != *slots => Ok(unfit(OTHER_SLOTS)),
        MovePhase::Copying { .. } | MovePhase::Frozen { .. } => Ok(unfit(NOT_THE_DESTINATION)),
        // Not compared with the source yet: to serve now could lose what is missing here.
        MovePhase::Installing { progress, .. } if !progress.complete => {
            Ok(MoveRejection::Incomplete.into())
        }
        MovePhase::Installing { .. } => {
            debug_assert!(every(entry, slots, |state| {
                state.ownership == Ownership::Arriving && state.generation == id
            })?);
            change_all(entry, slots, |state| {
                state.ownership = Ownership::Owned;

                // A slot that comes back must not send readers to where it once went.
                state.moved_to = None;
            })?;
            entry.close_move(id);
            Ok(MoveOutcome::Done)
        }
    }
}

/// Gives up an install. What it brought is left to be cleared.
pub(in crate::sm) fn cancel<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
) -> MoveDecision {
    let Some(open) = entry.open_move(id)? else {
        // A slot that is served here was activated: then it is too late to give the install up.
        for slot in slots {
            let state = entry.state(*slot)?;
            if state.generation == id && state.serves_reads() {
                return Ok(MoveRejection::Owned { slot: *slot }.into());
            }
        }
        return Ok(MoveOutcome::Done);
    };
    match open.phase {
        MovePhase::Copying { .. } | MovePhase::Frozen { .. } => Ok(unfit(NOT_THE_DESTINATION)),
        MovePhase::Installing { .. } => {
            give_up(entry, id, &open.slots)?;
            Ok(MoveOutcome::Done)
        }
    }
}

/// Closes the install of `slots`.
pub(super) fn give_up<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
) -> Result<(), StoreError> {
    // The generation stays, so that no late chunk or step of this move is taken any more.
    change_all(entry, slots, |state| state.ownership = Ownership::NotOwned)?;
    entry.close_move(id);
    Ok(())
}
