//! Which step of a slot move comes next. Decided from what is observed of source and destination,
//! and from nothing else: whoever leads the source can take a move up at any point.
//!
//! The driver observes both, asks [`next_step`], takes the step, and observes again; it goes on
//! from the outcome of a step, never from the fact that it was proposed. What the driver saw may be
//! old, of the source because its own replica is behind, of the destination because the answer was
//! under way. Then a step comes too late, is rejected or changes nothing, and the next look is
//! better. Where the two contradict each other, one of them is behind, and the driver waits.
//!
//! Never is a slot given up at the source before everything is at the destination, nor served there
//! before: a release follows on [`DestinationState::Installing`] that is complete, an activation on
//! [`SourceState::Released`], and a cancellation on [`SourceState::Aborted`], each as it was
//! applied.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::command::{InstallProgress, MoveCommand};
use super::observed::{CHANGES_BYTES_MAX, DestinationState, Remaining, SourceState};
use crate::sm::kv::command::KvCommand;
use crate::types::{GroupId, MoveId, Slot};

/// A move as it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    pub id: MoveId,
    pub slots: BTreeSet<Slot>,
    pub from: GroupId,
    pub to: GroupId,
}

/// Limits on the driver's patience, by its own clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveLimits {
    /// With changes of so many bytes left, or fewer, the slots are frozen. Below
    /// [`CHANGES_BYTES_MAX`]; a chunk's worth.
    pub freeze_bytes_max: u64,
    /// Freeze with a few chunks' worth of changes left: they come about as fast as they are copied.
    /// With more than can be counted ([`CHANGES_BYTES_MAX`]) writes would wait for too long, and in
    /// vain.
    pub freeze_now: bool,
    /// The slots have been frozen for too long.
    pub freeze_overdue: bool,
    /// The move is not wanted any more, or takes too long as a whole.
    pub give_up: bool,
}

/// The next step of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MoveStep {
    /// Destination: delete what is left in the slots.
    Clear,
    Prepare,
    Begin,
    /// Read the source from this cursor on, and install what was read as the next chunk.
    Copy(InstallProgress),
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
    Wait(MoveWait),
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
pub enum MoveWait {
    /// The destination did not answer just now.
    Destination,
    /// The source does not own the slots yet.
    Source,
    /// Source and destination contradict each other: the map of one is behind.
    Behind,
}

/// The shard whose log an entry goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveSide {
    Source,
    Destination,
}

/// The next step. `destination` is what it answered just now; none: it did not.
pub fn next_step(
    source: &SourceState,
    destination: Option<&DestinationState>,
    budget: MoveLimits,
) -> MoveStep {
    // A frozen source is not given up here: if the install is complete, going on is as fast.
    let step = match source {
        SourceState::Ready | SourceState::NotReady | SourceState::Copying(_) if budget.give_up => {
            MoveStep::Abort(AbortReason::GivenUp)
        }
        SourceState::Ready => before_begin(destination),
        SourceState::NotReady => MoveStep::Wait(MoveWait::Source),
        SourceState::Copying(left) => while_copying(*left, destination, budget),
        SourceState::Frozen(left) => while_frozen(*left, destination, budget),
        SourceState::Released => after_release(destination),
        SourceState::Aborted => after_abort(destination),
        SourceState::Overtaken => MoveStep::Over,
    };
    assert!(
        is_safe(&step, source, destination),
        "{step:?} with a source {source:?} and a destination {destination:?}"
    );
    step
}

/// Returns true unless the step would give the slots up before everything is at the destination,
/// or have two shards serve them, or none.
fn is_safe(step: &MoveStep, source: &SourceState, destination: Option<&DestinationState>) -> bool {
    let is_complete =
        matches!(destination, Some(DestinationState::Installing(progress)) if progress.complete);
    match step {
        MoveStep::Freeze => matches!(source, SourceState::Copying(_)),
        MoveStep::Release => matches!(source, SourceState::Frozen(_)) && is_complete,
        MoveStep::Activate => *source == SourceState::Released && is_complete,
        MoveStep::Commit => {
            *source == SourceState::Released && destination == Some(&DestinationState::Active)
        }
        MoveStep::Cancel | MoveStep::End => *source == SourceState::Aborted,
        MoveStep::Abort(_) => *source != SourceState::Released,
        MoveStep::Clear
        | MoveStep::Prepare
        | MoveStep::Begin
        | MoveStep::Copy(_)
        | MoveStep::Complete { .. }
        | MoveStep::Wait(_)
        | MoveStep::Over => true,
    }
}

fn before_begin(destination: Option<&DestinationState>) -> MoveStep {
    match destination {
        Some(DestinationState::Installing(progress)) if *progress == InstallProgress::default() => {
            MoveStep::Begin
        }
        other => prepared(other).unwrap_or(MoveStep::Wait(MoveWait::Behind)),
    }
}

/// Returns the step to take, or the wait, before the destination installs anything; None if it does
/// so already, or has done so.
fn prepared(destination: Option<&DestinationState>) -> Option<MoveStep> {
    match destination {
        None => Some(MoveStep::Wait(MoveWait::Destination)),
        Some(DestinationState::Free) => Some(MoveStep::Prepare),
        Some(DestinationState::Leftovers) => Some(MoveStep::Clear),
        Some(DestinationState::StillOwned) => Some(MoveStep::Wait(MoveWait::Behind)),
        Some(DestinationState::Cancelled) => Some(MoveStep::Abort(AbortReason::Cancelled)),
        Some(DestinationState::Overtaken) => Some(MoveStep::Over),
        Some(DestinationState::Installing(_) | DestinationState::Active) => None,
    }
}

fn while_copying(
    left: Remaining,
    destination: Option<&DestinationState>,
    budget: MoveLimits,
) -> MoveStep {
    match (destination, left) {
        // Only a frozen source is compared and completed: so the source's map is behind.
        (Some(DestinationState::Installing(progress)), _) if progress.complete => {
            MoveStep::Wait(MoveWait::Behind)
        }
        // A freeze with pairs left would hold back writes for as long as they take to copy.
        (Some(DestinationState::Installing(progress)), Remaining::Pairs) => {
            MoveStep::Copy(progress.clone())
        }
        // Few changes are left: the freeze that writes wait for will be short.
        (Some(DestinationState::Installing(_)), Remaining::Changes { bytes })
            if bytes <= budget.freeze_bytes_max
                || budget.freeze_now && bytes < CHANGES_BYTES_MAX =>
        {
            MoveStep::Freeze
        }
        (Some(DestinationState::Installing(progress)), Remaining::Changes { .. }) => {
            MoveStep::Copy(progress.clone())
        }
        (other, _) => prepared(other).unwrap_or(MoveStep::Wait(MoveWait::Behind)),
    }
}

fn while_frozen(
    left: Remaining,
    destination: Option<&DestinationState>,
    budget: MoveLimits,
) -> MoveStep {
    match (destination, left) {
        // Going on ends the freeze as soon as going back.
        (Some(DestinationState::Installing(progress)), _) if progress.complete => MoveStep::Release,
        // It serves the slots, so they were released: the source's map is behind.
        (Some(DestinationState::Active), _) => MoveStep::Wait(MoveWait::Behind),
        _ if budget.give_up => MoveStep::Abort(AbortReason::GivenUp),
        _ if budget.freeze_overdue => MoveStep::Abort(AbortReason::FrozenTooLong),
        // Nothing is left to copy and nothing is written: now both sides must count the same.
        (Some(DestinationState::Installing(progress)), Remaining::Changes { bytes: 0 }) => {
            MoveStep::Complete {
                chunk: progress.chunk,
            }
        }
        (Some(DestinationState::Installing(progress)), _) => MoveStep::Copy(progress.clone()),
        (other, _) => prepared(other).unwrap_or(MoveStep::Wait(MoveWait::Behind)),
    }
}

fn after_release(destination: Option<&DestinationState>) -> MoveStep {
    match destination {
        // After the release there is no way back: the destination is waited for as long as it
        // takes.
        None => MoveStep::Wait(MoveWait::Destination),
        Some(DestinationState::Installing(progress)) if progress.complete => MoveStep::Activate,
        Some(DestinationState::Active) => MoveStep::Commit,
        Some(DestinationState::Overtaken) => MoveStep::Over,
        Some(
            DestinationState::Installing(_)
            | DestinationState::Free
            | DestinationState::Leftovers
            | DestinationState::StillOwned
            | DestinationState::Cancelled,
        ) => MoveStep::Wait(MoveWait::Behind),
    }
}

/// A destination that does not answer keeps no move open: a later move of the slots clears there
/// what this one left.
fn after_abort(destination: Option<&DestinationState>) -> MoveStep {
    match destination {
        // Without it the destination would hold its slots as arriving until a later move clears
        // them.
        Some(DestinationState::Installing(_)) => MoveStep::Cancel,
        Some(DestinationState::Overtaken) => MoveStep::Over,
        None
        | Some(
            DestinationState::Free
            | DestinationState::Leftovers
            | DestinationState::StillOwned
            | DestinationState::Cancelled
            | DestinationState::Active,
        ) => MoveStep::End,
    }
}

/// Most keys deleted by one entry, so that none stalls its group.
pub const CLEAR_KEYS_MAX: u32 = 1000;

impl MoveStep {
    /// The entry that takes the step, and whose it is. None for the steps that first need to read
    /// something, that are the meta group's, or that are no step.
    pub fn command(&self, opened: &Move) -> Option<(MoveSide, KvCommand)> {
        let (side, step) = match self {
            MoveStep::Clear => (
                MoveSide::Destination,
                MoveCommand::Clear {
                    limit: CLEAR_KEYS_MAX,
                },
            ),
            MoveStep::Prepare => (
                MoveSide::Destination,
                MoveCommand::Prepare { from: opened.from },
            ),
            MoveStep::Activate => (MoveSide::Destination, MoveCommand::Activate),
            MoveStep::Cancel => (MoveSide::Destination, MoveCommand::Cancel),
            MoveStep::Begin => (MoveSide::Source, MoveCommand::Begin { to: opened.to }),
            MoveStep::Freeze => (MoveSide::Source, MoveCommand::Freeze),
            MoveStep::Release => (MoveSide::Source, MoveCommand::Release),
            MoveStep::Abort(_) => (MoveSide::Source, MoveCommand::Abort),
            MoveStep::Copy(_)
            | MoveStep::Complete { .. }
            | MoveStep::Commit
            | MoveStep::End
            | MoveStep::Wait(_)
            | MoveStep::Over => return None,
        };
        Some((side, step.into_command(opened.id, &opened.slots)))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn sources() -> Vec<SourceState> {
        let changes = |bytes| Remaining::Changes { bytes };
        let left = [
            Remaining::Pairs,
            changes(CHANGES_BYTES_MAX),
            changes(900),
            changes(0),
        ];
        let mut all = vec![
            SourceState::Ready,
            SourceState::NotReady,
            SourceState::Aborted,
            SourceState::Released,
            SourceState::Overtaken,
        ];
        all.extend(left.map(SourceState::Copying));
        all.extend(left.map(SourceState::Frozen));
        all
    }

    fn installing(chunk: u64, complete: bool) -> DestinationState {
        DestinationState::Installing(InstallProgress {
            chunk,
            cursor: Bytes::from_static(b"c"),
            complete,
        })
    }

    fn destinations() -> Vec<Option<DestinationState>> {
        let fresh = DestinationState::Installing(InstallProgress::default());
        let all = [
            DestinationState::Free,
            DestinationState::Leftovers,
            DestinationState::StillOwned,
            fresh,
            installing(3, false),
            installing(3, true),
            DestinationState::Active,
            DestinationState::Cancelled,
            DestinationState::Overtaken,
        ];
        all.into_iter().map(Some).chain([None]).collect()
    }

    fn budgets() -> Vec<MoveLimits> {
        let flags = [false, true];
        let mut all = Vec::new();
        for freeze_now in flags {
            for freeze_overdue in flags {
                for give_up in flags {
                    all.push(MoveLimits {
                        freeze_bytes_max: 500,
                        freeze_now,
                        freeze_overdue,
                        give_up,
                    });
                }
            }
        }
        all
    }

    /// Returns true if a step may be taken at all in the observed state.
    fn allowed(
        step: &MoveStep,
        source: &SourceState,
        destination: Option<&DestinationState>,
        budget: MoveLimits,
    ) -> bool {
        use DestinationState as D;
        use SourceState as S;
        let before_release = matches!(
            source,
            S::Ready | S::NotReady | S::Copying(_) | S::Frozen(_)
        );
        match step {
            MoveStep::Clear => before_release && destination == Some(&D::Leftovers),
            MoveStep::Prepare => before_release && destination == Some(&D::Free),
            MoveStep::Begin => *source == S::Ready && matches!(destination, Some(D::Installing(_))),
            MoveStep::Copy(progress) => {
                let left = matches!(
                    source,
                    S::Copying(Remaining::Pairs | Remaining::Changes { bytes: 501.. })
                        | S::Frozen(Remaining::Pairs | Remaining::Changes { bytes: 1.. })
                );
                left && !progress.complete && destination == Some(&D::Installing(progress.clone()))
            }
            MoveStep::Freeze => {
                let enough = if budget.freeze_now {
                    CHANGES_BYTES_MAX - 1
                } else {
                    500
                };
                let few =
                    matches!(source, S::Copying(Remaining::Changes { bytes }) if *bytes <= enough);
                few && matches!(destination, Some(D::Installing(_)))
            }
            MoveStep::Complete { chunk } => {
                let here = matches!(
                    destination,
                    Some(D::Installing(progress))
                        if progress.chunk == *chunk && !progress.complete
                );
                here && *source == S::Frozen(Remaining::Changes { bytes: 0 })
            }
            MoveStep::Release => {
                matches!(source, S::Frozen(_)) && destination == Some(&installing(3, true))
            }
            MoveStep::Activate => {
                *source == S::Released && destination == Some(&installing(3, true))
            }
            MoveStep::Commit => *source == S::Released && destination == Some(&D::Active),
            MoveStep::Abort(AbortReason::FrozenTooLong) => {
                matches!(source, S::Frozen(_)) && budget.freeze_overdue
            }
            MoveStep::Abort(AbortReason::GivenUp) => before_release && budget.give_up,
            MoveStep::Abort(AbortReason::Cancelled) => {
                before_release && destination == Some(&D::Cancelled)
            }
            MoveStep::Cancel => {
                *source == S::Aborted && matches!(destination, Some(D::Installing(_)))
            }
            MoveStep::End => {
                *source == S::Aborted && !matches!(destination, Some(D::Installing(_)))
            }
            MoveStep::Wait(MoveWait::Destination) => destination.is_none(),
            MoveStep::Wait(MoveWait::Source) => *source == S::NotReady,
            MoveStep::Wait(MoveWait::Behind) => destination.is_some(),
            MoveStep::Over => *source == S::Overtaken || destination == Some(&D::Overtaken),
        }
    }

    #[test]
    fn every_step_is_allowed_where_it_is_chosen() {
        for source in sources() {
            for destination in destinations() {
                for budget in budgets() {
                    let step = next_step(&source, destination.as_ref(), budget);
                    let right = allowed(&step, &source, destination.as_ref(), budget);
                    assert!(
                        right,
                        "{step:?} of {source:?} and {destination:?} with {budget:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_destination_that_does_not_answer_is_neither_waited_for_in_a_freeze_nor_trusted() {
        for source in sources() {
            for budget in budgets() {
                let step = next_step(&source, None, budget);
                let patient = !budget.give_up && !budget.freeze_overdue;
                let right = match &source {
                    SourceState::Ready | SourceState::Copying(_) if budget.give_up => {
                        matches!(step, MoveStep::Abort(_))
                    }
                    SourceState::Frozen(_) if !patient => matches!(step, MoveStep::Abort(_)),
                    SourceState::Ready
                    | SourceState::Copying(_)
                    | SourceState::Frozen(_)
                    | SourceState::Released => step == MoveStep::Wait(MoveWait::Destination),
                    SourceState::NotReady => {
                        matches!(step, MoveStep::Wait(MoveWait::Source) | MoveStep::Abort(_))
                    }
                    SourceState::Aborted => step == MoveStep::End,
                    SourceState::Overtaken => step == MoveStep::Over,
                };
                assert!(right, "{step:?} of {source:?} with {budget:?}");
            }
        }
    }

    #[test]
    fn a_freeze_past_its_time_ends() {
        let budget = MoveLimits {
            freeze_bytes_max: 500,
            freeze_now: false,
            freeze_overdue: true,
            give_up: false,
        };
        for left in [
            Remaining::Pairs,
            Remaining::Changes { bytes: 9 },
            Remaining::Changes { bytes: 0 },
        ] {
            let frozen = SourceState::Frozen(left);
            let step = next_step(&frozen, Some(&installing(3, false)), budget);
            assert_eq!(step, MoveStep::Abort(AbortReason::FrozenTooLong));
            assert_eq!(
                next_step(&frozen, Some(&installing(3, true)), budget),
                MoveStep::Release,
                "as soon done as an abort"
            );
        }
        let copying = SourceState::Copying(Remaining::Pairs);
        assert!(
            matches!(
                next_step(&copying, Some(&installing(3, false)), budget),
                MoveStep::Copy(_)
            ),
            "nothing is frozen"
        );
    }

    #[test]
    fn steps_go_to_the_side_that_takes_them() {
        let slots = BTreeSet::from([Slot::default()]);
        let of = Move {
            id: MoveId(5),
            slots: slots.clone(),
            from: GroupId(1),
            to: GroupId(2),
        };
        let table = [
            (
                MoveStep::Clear,
                MoveSide::Destination,
                MoveCommand::Clear {
                    limit: CLEAR_KEYS_MAX,
                },
            ),
            (
                MoveStep::Prepare,
                MoveSide::Destination,
                MoveCommand::Prepare { from: GroupId(1) },
            ),
            (
                MoveStep::Begin,
                MoveSide::Source,
                MoveCommand::Begin { to: GroupId(2) },
            ),
            (MoveStep::Freeze, MoveSide::Source, MoveCommand::Freeze),
            (MoveStep::Release, MoveSide::Source, MoveCommand::Release),
            (
                MoveStep::Activate,
                MoveSide::Destination,
                MoveCommand::Activate,
            ),
            (
                MoveStep::Abort(AbortReason::GivenUp),
                MoveSide::Source,
                MoveCommand::Abort,
            ),
            (MoveStep::Cancel, MoveSide::Destination, MoveCommand::Cancel),
        ];
        for (step, side, command) in table {
            assert_eq!(
                step.command(&of),
                Some((side, command.into_command(MoveId(5), &slots)))
            );
        }
        assert_eq!(MoveStep::Commit.command(&of), None);
    }
}
