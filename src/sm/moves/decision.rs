//! Decides what the steps of a move decide alike at its source and at its destination: whether a
//! move may open, and what a step is answered whose move is not open here.
//!
//! `source` and `destination` have what differs between the two sides. All of it reads and changes
//! the map through the entry alone, so that every replica decides the same.

use std::collections::BTreeSet;

use super::command::{MoveOutcome, MoveRejection};
use crate::sm::kv::entry::EntryTransaction;
use crate::sm::ports::{Read, StoreError};
use crate::sm::slots::SlotState;
use crate::types::{MoveId, Slot};

/// Answer to a step, or the error of a map that can't be read.
pub(super) type MoveDecision = Result<MoveOutcome, StoreError>;

pub(super) const OTHER_SLOTS: &str = "the move is open here with other slots";

pub(super) fn unfit(why: &str) -> MoveOutcome {
    MoveRejection::Unfit {
        why: why.to_owned(),
    }
    .into()
}

pub(super) fn overtaken(slot: Slot, state: &SlotState) -> MoveRejection {
    MoveRejection::Overtaken {
        slot,
        generation: state.generation,
    }
}

/// Returns why a move of `slots` may not open here, or None if it may. `refuse` says what one side
/// has against the state of a slot.
pub(super) fn refusal_to_open<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
    refuse: impl Fn(
        &EntryTransaction<'_, R>,
        Slot,
        &SlotState,
    ) -> Result<Option<MoveRejection>, StoreError>,
) -> Result<Option<MoveOutcome>, StoreError> {
    if slots.is_empty() {
        return Ok(Some(unfit("a move of no slots")));
    }

    // All slots are checked before any is changed: the step is all or nothing.
    for slot in slots {
        let state = entry.state(*slot)?;
        let refused = if state.generation >= id {
            Some(overtaken(*slot, &state))
        } else {
            refuse(entry, *slot, &state)?
        };
        if let Some(rejection) = refused {
            return Ok(Some(rejection.into()));
        }
    }
    Ok(None)
}

/// Answers a step of a move that is not open here: it is done if every slot is as the step leaves
/// it.
pub(super) fn done_before<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
    is_done: impl Fn(&SlotState) -> bool,
) -> MoveDecision {
    // An earlier try of this step was applied and its answer was lost: the driver may go on.
    if every(entry, slots, is_done)? {
        Ok(MoveOutcome::Done)
    } else {
        not_open(entry, id, slots)
    }
}

/// Returns the rejection of a step of a move that is not open here.
pub(super) fn not_open<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
) -> MoveDecision {
    for slot in slots {
        // Told apart, because a driver that was overtaken has nothing left to do.
        let state = entry.state(*slot)?;
        if state.generation > id {
            return Ok(overtaken(*slot, &state).into());
        }
    }
    Ok(MoveRejection::NotOpen.into())
}

/// Returns true if `holds` does of each of the slots.
pub(super) fn every<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    slots: &BTreeSet<Slot>,
    holds: impl Fn(&SlotState) -> bool,
) -> Result<bool, StoreError> {
    for slot in slots {
        if !holds(&entry.state(*slot)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(super) fn change_all<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    slots: &BTreeSet<Slot>,
    change: impl Fn(&mut SlotState),
) -> Result<(), StoreError> {
    for slot in slots {
        change(entry.state_mut(*slot)?);
    }
    Ok(())
}
