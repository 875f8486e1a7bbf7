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

use super::kv::{
    CHANGES_BYTES_MAX, Command, DestinationState, MoveStep, Progress, Remaining, SourceState,
};
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
pub struct Budget {
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

/// The shard whose log an entry goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

/// The next step. `destination` is what it answered just now; none: it did not.
pub fn next_step(
    source: &SourceState,
    destination: Option<&DestinationState>,
    budget: Budget,
) -> Step {
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
        Some(DestinationState::Installing(progress)) if *progress == Progress::default() => {
            Step::Begin
        }
        other => prepared(other).unwrap_or(Step::Wait(Waiting::Behind)),
    }
}

/// Returns the step to take, or the wait, before the destination installs anything; None if it does
/// so already, or has done so.
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
        (Some(DestinationState::Installing(progress)), _) if progress.complete => {
            Step::Wait(Waiting::Behind)
        }
        (Some(DestinationState::Installing(progress)), Remaining::Pairs) => {
            Step::Copy(progress.clone())
        }
        (Some(DestinationState::Installing(_)), Remaining::Changes { bytes })
            if bytes <= budget.freeze_bytes_max
                || budget.freeze_now && bytes < CHANGES_BYTES_MAX =>
        {
            Step::Freeze
        }
        (Some(DestinationState::Installing(progress)), Remaining::Changes { .. }) => {
            Step::Copy(progress.clone())
        }
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
            Step::Complete {
                chunk: progress.chunk,
            }
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

/// A destination that does not answer keeps no move open: a later move of the slots clears there
/// what this one left.
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
    /// The entry that takes the step, and whose it is. None for the steps that first need to read
    /// something, that are the meta group's, or that are no step.
    pub fn command(&self, of: &Move) -> Option<(Side, Command)> {
        let (side, step) = match self {
            Step::Clear => (
                Side::Destination,
                MoveStep::Clear {
                    limit: CLEAR_KEYS_MAX,
                },
            ),
            Step::Prepare => (Side::Destination, MoveStep::Prepare { from: of.from }),
            Step::Activate => (Side::Destination, MoveStep::Activate),
            Step::Cancel => (Side::Destination, MoveStep::Cancel),
            Step::Begin => (Side::Source, MoveStep::Begin { to: of.to }),
            Step::Freeze => (Side::Source, MoveStep::Freeze),
            Step::Release => (Side::Source, MoveStep::Release),
            Step::Abort(_) => (Side::Source, MoveStep::Abort),
            Step::Copy(_)
            | Step::Complete { .. }
            | Step::Commit
            | Step::End
            | Step::Wait(_)
            | Step::Over => return None,
        };
        Some((side, step.of(of.id, &of.slots)))
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
        DestinationState::Installing(Progress {
            chunk,
            cursor: Bytes::from_static(b"c"),
            complete,
        })
    }

    fn destinations() -> Vec<Option<DestinationState>> {
        let fresh = DestinationState::Installing(Progress::default());
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

    fn budgets() -> Vec<Budget> {
        let flags = [false, true];
        let mut all = Vec::new();
        for freeze_now in flags {
            for freeze_overdue in flags {
                for give_up in flags {
                    all.push(Budget {
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
        step: &Step,
        source: &SourceState,
        destination: Option<&DestinationState>,
        budget: Budget,
    ) -> bool {
        use DestinationState as D;
        use SourceState as S;
        let before_release = matches!(
            source,
            S::Ready | S::NotReady | S::Copying(_) | S::Frozen(_)
        );
        match step {
            Step::Clear => before_release && destination == Some(&D::Leftovers),
            Step::Prepare => before_release && destination == Some(&D::Free),
            Step::Begin => *source == S::Ready && matches!(destination, Some(D::Installing(_))),
            Step::Copy(progress) => {
                let left = matches!(
                    source,
                    S::Copying(Remaining::Pairs | Remaining::Changes { bytes: 501.. })
                        | S::Frozen(Remaining::Pairs | Remaining::Changes { bytes: 1.. })
                );
                left && !progress.complete && destination == Some(&D::Installing(progress.clone()))
            }
            Step::Freeze => {
                let enough = if budget.freeze_now {
                    CHANGES_BYTES_MAX - 1
                } else {
                    500
                };
                let few =
                    matches!(source, S::Copying(Remaining::Changes { bytes }) if *bytes <= enough);
                few && matches!(destination, Some(D::Installing(_)))
            }
            Step::Complete { chunk } => {
                let here = matches!(
                    destination,
                    Some(D::Installing(progress))
                        if progress.chunk == *chunk && !progress.complete
                );
                here && *source == S::Frozen(Remaining::Changes { bytes: 0 })
            }
            Step::Release => {
                matches!(source, S::Frozen(_)) && destination == Some(&installing(3, true))
            }
            Step::Activate => *source == S::Released && destination == Some(&installing(3, true)),
            Step::Commit => *source == S::Released && destination == Some(&D::Active),
            Step::Abort(AbortReason::FrozenTooLong) => {
                matches!(source, S::Frozen(_)) && budget.freeze_overdue
            }
            Step::Abort(AbortReason::GivenUp) => before_release && budget.give_up,
            Step::Abort(AbortReason::Cancelled) => {
                before_release && destination == Some(&D::Cancelled)
            }
            Step::Cancel => *source == S::Aborted && matches!(destination, Some(D::Installing(_))),
            Step::End => *source == S::Aborted && !matches!(destination, Some(D::Installing(_))),
            Step::Wait(Waiting::Destination) => destination.is_none(),
            Step::Wait(Waiting::Source) => *source == S::NotReady,
            Step::Wait(Waiting::Behind) => destination.is_some(),
            Step::Over => *source == S::Overtaken || destination == Some(&D::Overtaken),
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
                        matches!(step, Step::Abort(_))
                    }
                    SourceState::Frozen(_) if !patient => matches!(step, Step::Abort(_)),
                    SourceState::Ready
                    | SourceState::Copying(_)
                    | SourceState::Frozen(_)
                    | SourceState::Released => step == Step::Wait(Waiting::Destination),
                    SourceState::NotReady => {
                        matches!(step, Step::Wait(Waiting::Source) | Step::Abort(_))
                    }
                    SourceState::Aborted => step == Step::End,
                    SourceState::Overtaken => step == Step::Over,
                };
                assert!(right, "{step:?} of {source:?} with {budget:?}");
            }
        }
    }

    #[test]
    fn a_freeze_past_its_time_ends() {
        let budget = Budget {
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
            assert_eq!(step, Step::Abort(AbortReason::FrozenTooLong));
            assert_eq!(
                next_step(&frozen, Some(&installing(3, true)), budget),
                Step::Release,
                "as soon done as an abort"
            );
        }
        let copying = SourceState::Copying(Remaining::Pairs);
        assert!(
            matches!(
                next_step(&copying, Some(&installing(3, false)), budget),
                Step::Copy(_)
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
                Step::Clear,
                Side::Destination,
                MoveStep::Clear {
                    limit: CLEAR_KEYS_MAX,
                },
            ),
            (
                Step::Prepare,
                Side::Destination,
                MoveStep::Prepare { from: GroupId(1) },
            ),
            (
                Step::Begin,
                Side::Source,
                MoveStep::Begin { to: GroupId(2) },
            ),
            (Step::Freeze, Side::Source, MoveStep::Freeze),
            (Step::Release, Side::Source, MoveStep::Release),
            (Step::Activate, Side::Destination, MoveStep::Activate),
            (
                Step::Abort(AbortReason::GivenUp),
                Side::Source,
                MoveStep::Abort,
            ),
            (Step::Cancel, Side::Destination, MoveStep::Cancel),
        ];
        for (step, side, command) in table {
            assert_eq!(
                step.command(&of),
                Some((side, command.of(MoveId(5), &slots)))
            );
        }
        assert_eq!(Step::Commit.command(&of), None);
    }
}
