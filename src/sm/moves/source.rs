//! What the steps of a move do at its source: the slots are marked, frozen, released; or stay,
//! after an abort.
//!
//! Before the release this shard serves the slots, after it no more: there is no state between, and
//! the release comes only out of the freeze. A move that has ended here, whichever way, never
//! begins again: its id stays as the generation of its slots.

use std::collections::BTreeSet;

use super::command::{MoveOutcome, MovePhase, MoveRejection, OpenMove};
use super::decision::{
    MoveDecision, OTHER_SLOTS, change_all, done_before, every, not_open, refusal_to_open, unfit,
};
use crate::sm::kv::entry::EntryTransaction;
use crate::sm::ports::Read;
use crate::sm::slots::{Ownership, SlotState};
use crate::types::{GroupId, MoveId, Slot};

pub(in crate::sm) fn begin<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: BTreeSet<Slot>,
    to: GroupId,
) -> MoveDecision {
    if let Some(open) = entry.open_move(id)? {
        // The driver may send the step again, and so may the driver after it.
        let same = match open.phase {
            MovePhase::Copying { to: begun } | MovePhase::Frozen { to: begun } => begun == to,
            MovePhase::Installing { .. } => false,
        };
        return Ok(if same && open.slots == slots {
            MoveOutcome::Done
        } else {
            unfit("another move began here under this id")
        });
    }

    let refusal = refusal_to_open(entry, id, &slots, |_, slot, state| {
        Ok(match state.ownership {
            Ownership::NotOwned => Some(MoveRejection::NotOwned { slot }),
            Ownership::Leaving | Ownership::Frozen | Ownership::Arriving => {
                Some(MoveRejection::Open {
                    id: state.generation,
                })
            }
            Ownership::Owned => None,
        })
    })?;
    if let Some(refusal) = refusal {
        return Ok(refusal);
    }

    change_all(entry, &slots, |state| {
        state.generation = id;
        state.ownership = Ownership::Leaving;
    })?;
    entry.put_move(
        id,
        &OpenMove {
            slots,
            phase: MovePhase::Copying { to },
        },
    );
    Ok(MoveOutcome::Done)
}

pub(in crate::sm) fn freeze<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
) -> MoveDecision {
    let Some(open) = entry.open_move(id)? else {
        return not_open(entry, id, slots);
    };
    match open.phase {
        _ if open.slots != *slots => Ok(unfit(OTHER_SLOTS)),
        MovePhase::Installing { .. } => Ok(unfit(NOT_THE_SOURCE)),
        // Sent again: the answer to the first try was lost.
        MovePhase::Frozen { .. } => Ok(MoveOutcome::Done),
        MovePhase::Copying { to } => {
            debug_assert!(every(entry, slots, |state| {
                state.ownership == Ownership::Leaving && state.generation == id
            })?);
            change_all(entry, slots, |state| state.ownership = Ownership::Frozen)?;
            entry.put_move(
                id,
                &OpenMove {
                    slots: open.slots,
                    phase: MovePhase::Frozen { to },
                },
            );
            Ok(MoveOutcome::Done)
        }
    }
}

pub(in crate::sm) fn release<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
) -> MoveDecision {
    let Some(open) = entry.open_move(id)? else {
        return done_before(entry, id, slots, |state| is_released(state, id));
    };
    match open.phase {
        _ if open.slots != *slots => Ok(unfit(OTHER_SLOTS)),
        MovePhase::Installing { .. } => Ok(unfit(NOT_THE_SOURCE)),
        // While writes still come, what comes after the last chunk would be lost.
        MovePhase::Copying { .. } => Ok(MoveRejection::NotFrozen.into()),
        MovePhase::Frozen { to } => {
            // From here on the destination alone may serve the slots: no write may still come.
            debug_assert!(every(entry, slots, |state| {
                state.ownership == Ownership::Frozen && state.generation == id
            })?);
            change_all(entry, slots, |state| {
                state.ownership = Ownership::NotOwned;
                state.moved_to = Some((id, to));
            })?;
            entry.close_move(id);
            Ok(MoveOutcome::Done)
        }
    }
}

/// Ends the move before its release. One that never began here is kept from ever beginning.
pub(in crate::sm) fn abort<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
) -> MoveDecision {
    if let Some(open) = entry.open_move(id)? {
        return match open.phase {
            _ if open.slots != *slots => Ok(unfit(OTHER_SLOTS)),
            MovePhase::Installing { .. } => Ok(unfit(NOT_THE_SOURCE)),
            MovePhase::Copying { .. } | MovePhase::Frozen { .. } => {
                change_all(entry, slots, |state| state.ownership = Ownership::Owned)?;
                entry.close_move(id);
                Ok(MoveOutcome::Done)
            }
        };
    }

    // Not open: it never began, was aborted before, or was released. After a release there is no
    // way back.
    for slot in slots {
        let state = entry.state(*slot)?;
        if is_released(&state, id) {
            return Ok(MoveRejection::Released.into());
        }
        let older = state.generation < id;
        match state.ownership {
            // First ownership may be on its way, and is only accepted where no move ever was.
            Ownership::NotOwned if state.generation == MoveId(0) => {
                return Ok(MoveRejection::NotOwned { slot: *slot }.into());
            }
            Ownership::Leaving | Ownership::Frozen | Ownership::Arriving if older => {
                return Ok(MoveRejection::Open {
                    id: state.generation,
                }
                .into());
            }
            _ => {}
        }
    }

    // The generation keeps this move from beginning later, when its entry arrives behind the abort.
    change_all(entry, slots, |state| {
        state.generation = state.generation.max(id)
    })?;
    Ok(MoveOutcome::Done)
}

const NOT_THE_SOURCE: &str = "this shard is the destination of the move";

/// Returns true if this very move gave the slot up and no later move has touched it.
pub(super) fn is_released(state: &SlotState, id: MoveId) -> bool {
    let given_up = state.moved_to.is_some_and(|(by, _)| by == id);
    state.ownership == Ownership::NotOwned && state.generation == id && given_up
}
