//! Which step of a slot move comes next. Decided from what is observed of source and destination, and from nothing else: whoever leads
//! the source can take a move up at any point.
//!
//! The driver observes both, asks [`next_step`], takes the step, and observes again; it goes on from the outcome of a step, never from the
//! fact that it was proposed. What the driver saw may be old, of the source because its own replica is behind, of the destination because
//! the answer was under way. Then a step comes too late, is rejected or changes nothing, and the next look is better. Where the two
//! contradict each other, one of them is behind, and the driver waits.
//!
//! Never is a slot given up at the source before everything is at the destination, nor served there before: a release follows on
//! [`DestinationState::Installing`] that is complete, an activation on [`SourceState::Released`], and a cancellation on
//! [`SourceState::Aborted`], each as it was applied.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::kv::{Command, DestinationState, MoveStep, Progress, Remaining, SourceState};
use crate::types::{GroupId, MoveId, Slot};

/// A move as it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    pub id: MoveId,
    pub slots: BTreeSet<Slot>,
    pub from: GroupId,
    pub to: GroupId,
}

/// How long the driver has been patient, by its own clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// With changes of so many bytes left, or fewer, the slots are frozen. Below [`super::kv::CHANGES_BYTES_MAX`]; a chunk's worth.
    pub freeze_bytes_max: u64,
    /// Freeze as soon as the pairs are read, however many changes are left: they come as fast as they are copied.
    pub freeze_now: bool,
    /// The slots have been frozen for too long.
    pub freeze_overdue: bool,
    /// The move is not wanted any more, or takes too long as a whole.
    pub give_up: bool,
}

/// What to do next for a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Destination: delete what is left in the slots.
    Clear,
    Prepare,
    Begin,
    /// Read the source from this cursor on, and install what was read as the next chunk.
    Copy(Progress),
    Freeze,
    /// Tell the destination what the frozen source counts, after this many chunks.
    Complete {
        chunk: u64,
    },
    Release,
    Activate,
    /// Meta: the slots are the destination's.
    Commit,
    Abort(AbortReason),
    /// Destination: give up the install.
    Cancel,
    /// Meta: the move has ended, and the slots are the source's as before.
    End,
    Wait(Waiting),
    /// A later move has had the slots: the meta group knows that this one is over.
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbortReason {
    FrozenTooLong,
    GivenUp,
    /// The destination has given up the install.
    Cancelled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// The destination did not answer just now.
    Destination,
    /// The source does not own the slots yet.
    Source,
    /// Source and destination contradict each other: the map of one is behind.
    Behind,
}

/// Whose log an entry goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

/// The next step. `destination` is what it answered just now; none: it did not.
pub fn next_step(source: &SourceState, destination: Option<&DestinationState>, budget: Budget) -> Step {
    match source {
        SourceState::Ready | SourceState::NotReady | SourceState::Copying(_) if budget.give_up => {
            Step::Abort(AbortReason::GivenUp)
        }
        SourceState::Ready => before_begin(destination),
        SourceState::NotReady => Step::Wait(Waiting::Source),
        SourceState::Copying(left) => while_copying(*left, destination, budget),
        SourceState::Frozen(left) => while_frozen(*left, destination, budget),
        SourceState::Released => after_release(destination),
        SourceState::Aborted => after_abort(destination),
        SourceState::Overtaken => Step::Over,
    }
}

fn before_begin(destination: Option<&DestinationState>) -> Step {
    match destination {
        Some(DestinationState::Installing(progress)) if *progress == Progress::default() => Step::Begin,
        other => prepared(other).unwrap_or(Step::Wait(Waiting::Behind)),
    }
}

/// What has to be done, or awaited, before the destination installs anything; none where it does, or has done so.
fn prepared(destination: Option<&DestinationState>) -> Option<Step> {
    match destination {
        None => Some(Step::Wait(Waiting::Destination)),
        Some(DestinationState::Free) => Some(Step::Prepare),
        Some(DestinationState::Leftovers) => Some(Step::Clear),
        Some(DestinationState::StillOwned) => Some(Step::Wait(Waiting::Behind)),
        Some(DestinationState::Cancelled) => Some(Step::Abort(AbortReason::Cancelled)),
        Some(DestinationState::Overtaken) => Some(Step::Over),
        Some(DestinationState::Installing(_) | DestinationState::Active) => None,
    }
}

fn while_copying(left: Remaining, destination: Option<&DestinationState>, budget: Budget) -> Step {
    match (destination, left) {
        (Some(DestinationState::Installing(progress)), _) if progress.complete => Step::Wait(Waiting::Behind),
        (Some(DestinationState::Installing(progress)), Remaining::Pairs) => Step::Copy(progress.clone()),
        (Some(DestinationState::Installing(_)), Remaining::Changes { bytes })
            if budget.freeze_now || bytes <= budget.freeze_bytes_max =>
        {
            Step::Freeze
        }
        (Some(DestinationState::Installing(progress)), Remaining::Changes { .. }) => Step::Copy(progress.clone()),
        (other, _) => prepared(other).unwrap_or(Step::Wait(Waiting::Behind)),
    }
}

fn while_frozen(left: Remaining, destination: Option<&DestinationState>, budget: Budget) -> Step {
    match (destination, left) {
        // Going on ends the freeze as soon as going back.
        (Some(DestinationState::Installing(progress)), _) if progress.complete => Step::Release,
        (Some(DestinationState::Active), _) => Step::Wait(Waiting::Behind),
        _ if budget.give_up => Step::Abort(AbortReason::GivenUp),
        _ if budget.freeze_overdue => Step::Abort(AbortReason::FrozenTooLong),
        (Some(DestinationState::Installing(progress)), Remaining::Changes { bytes: 0 }) => {
            Step::Complete { chunk: progress.chunk }
        }
        (Some(DestinationState::Installing(progress)), _) => Step::Copy(progress.clone()),
        (other, _) => prepared(other).unwrap_or(Step::Wait(Waiting::Behind)),
    }
}

fn after_release(destination: Option<&DestinationState>) -> Step {
    match destination {
        None => Step::Wait(Waiting::Destination),
        Some(DestinationState::Installing(progress)) if progress.complete => Step::Activate,
        Some(DestinationState::Active) => Step::Commit,
        Some(DestinationState::Overtaken) => Step::Over,
        Some(
            DestinationState::Installing(_)
            | DestinationState::Free
            | DestinationState::Leftovers
            | DestinationState::StillOwned
            | DestinationState::Cancelled,
        ) => Step::Wait(Waiting::Behind),
    }
}

/// A destination that does not answer keeps no move open: a later move of the slots clears there what this one left.
fn after_abort(destination: Option<&DestinationState>) -> Step {
    match destination {
        Some(DestinationState::Installing(_)) => Step::Cancel,
        Some(DestinationState::Overtaken) => Step::Over,
        None
        | Some(
            DestinationState::Free
            | DestinationState::Leftovers
            | DestinationState::StillOwned
            | DestinationState::Cancelled
            | DestinationState::Active,
        ) => Step::End,
    }
}

/// Most keys deleted by one entry, so that none stalls its group.
pub const CLEAR_KEYS_MAX: u32 = 1000;

impl Step {
    /// The entry that takes the step, and whose it is. None for the steps that first need to read something, that are the meta group's, or
    /// that are no step.
    pub fn command(&self, of: &Move) -> Option<(Side, Command)> {
        let (side, step) = match self {
            Step::Clear => (Side::Destination, MoveStep::Clear { limit: CLEAR_KEYS_MAX }),
            Step::Prepare => (Side::Destination, MoveStep::Prepare { from: of.from }),
            Step::Activate => (Side::Destination, MoveStep::Activate),
            Step::Cancel => (Side::Destination, MoveStep::Cancel),
            Step::Begin => (Side::Source, MoveStep::Begin { to: of.to }),
            Step::Freeze => (Side::Source, MoveStep::Freeze),
            Step::Release => (Side::Source, MoveStep::Release),
            Step::Abort(_) => (Side::Source, MoveStep::Abort),
            Step::Copy(_) | Step::Complete { .. } | Step::Commit | Step::End | Step::Wait(_) | Step::Over => return None,
        };
        Some((side, step.of(of.id, &of.slots)))
    }
}
