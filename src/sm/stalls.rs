//! Decides what is to be done about a part of a node that does not get any further. Who looks is
//! `node/controllers/watchdog`.
//!
//! A leader needs its own disk for nothing while a quorum of others has synced what it proposed: so
//! a disk that hangs is noticed by nobody until the log's queue is full and every write is refused.
//! The rules:
//! - A leader steps down when others have had committed entries on their disks for
//!   [`DISK_BEHIND_MS`] that its own has not, or when it has applied nothing of what is committed
//!   for [`MAP_STUCK_MS`]; of a group at most once in [`STEP_DOWN_EVERY_MS`].
//! - A process ends when a part of it hangs by itself. A disk that hangs is mended by no new start:
//!   then it ends late, and only where the others have committed something without it, so that a
//!   disk which all share ends none of them.
//!
//! Times are those while the node ran: one that was suspended has not hung.

use std::collections::BTreeMap;

use crate::types::GroupId;

/// For how long the disk of a leader may lack what is committed. Longer than a busy disk takes, and
/// short enough that the log's queue seldom fills up before.
pub const DISK_BEHIND_MS: u64 = 2_000;
/// For how long a replica may apply nothing while there is something to apply.
pub const MAP_STUCK_MS: u64 = 5_000;
/// A group is handed over for such a reason once in this time, so that slow nodes do not play ball
/// with it.
pub const STEP_DOWN_EVERY_MS: u64 = 60_000;

/// Limits per part: when a stall is logged, and when it ends the process.
const WRITER_TOLD_MS: u64 = 2_000;
const WRITER_HANGS_MS: u64 = 30_000;
const DISK_HANGS_MS: u64 = 60_000;
const CHECKPOINTER_TOLD_MS: u64 = 8_000;
const CHECKPOINTER_HANGS_MS: u64 = 120_000;
const APPLY_HANGS_MS: u64 = 60_000;
const RUNTIME_TOLD_S: u64 = 4;
const RUNTIME_HANGS_S: u64 = 60;

/// For how long something that should get further has not.
#[derive(Debug, Default, Clone, Copy)]
pub struct Still(Option<(u64, u64)>);

impl Still {
    /// Notes that it is at `value` now, and whether it `should_move`. Returns for how long it
    /// should have and did not, in milliseconds.
    pub fn observe(&mut self, now_ms: u64, value: u64, should_move: bool) -> u64 {
        match self.0 {
            Some((before, since)) if should_move && before == value => now_ms.saturating_sub(since),
            _ => {
                self.0 = should_move.then_some((value, now_ms));
                0
            }
        }
    }
}

/// For how long something has been behind where another thing was.
#[derive(Debug, Default, Clone, Copy)]
pub struct Behind(Option<(u64, u64)>);

impl Behind {
    /// Notes that it has `reached` what it has now, of what is `wanted`. Returns the age of what it
    /// lacks, in milliseconds.
    pub fn observe(&mut self, now_ms: u64, wanted: u64, reached: u64) -> u64 {
        // Measured by what was wanted at first, not now: a busy disk is always a little behind.
        if let Some((index, since)) = self.0
            && reached < index
        {
            return now_ms.saturating_sub(since);
        }
        self.0 = (reached < wanted).then_some((wanted, now_ms));
        0
    }
}

/// Progress of a replica, as log indexes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaProgress {
    pub committed: u64,
    /// On this node's disk.
    pub synced: u64,
    pub applied: u64,
    /// Nothing is to be applied now: another map takes the place of this one, or it has failed.
    pub is_held: bool,
}

/// The reason why a leader steps down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepDownCause {
    /// Its disk lacks what others have synced.
    Disk,
    /// It does not apply what is committed.
    Map,
}

/// Tracks what holds a replica up.
#[derive(Debug, Default, Clone, Copy)]
pub struct ReplicaStalls {
    disk: Behind,
    map: Still,
    /// For how long its disk has lacked what is committed.
    pub disk_ms: u64,
    /// For how long it has applied nothing of what is committed.
    pub map_ms: u64,
}

impl ReplicaStalls {
    pub fn observe(&mut self, now_ms: u64, progress: &ReplicaProgress) {
        self.disk_ms = self
            .disk
            .observe(now_ms, progress.committed, progress.synced);
        let should_apply = progress.applied < progress.committed && !progress.is_held;
        self.map_ms = self.map.observe(now_ms, progress.applied, should_apply);
    }

    /// Returns why it should not lead, if it does.
    pub fn cause(&self) -> Option<StepDownCause> {
        match self {
            _ if self.disk_ms >= DISK_BEHIND_MS => Some(StepDownCause::Disk),
            _ if self.map_ms >= MAP_STUCK_MS => Some(StepDownCause::Map),
            _ => None,
        }
    }
}

/// Remembers when groups were handed over because they stalled here.
#[derive(Debug, Default)]
pub struct StepDowns(BTreeMap<GroupId, u64>);

impl StepDowns {
    /// Returns whether the group may be handed over now, which is then taken for done.
    pub fn take(&mut self, now_ms: u64, group: GroupId) -> bool {
        let is_due = self
            .0
            .get(&group)
            .is_none_or(|last| now_ms.saturating_sub(*last) >= STEP_DOWN_EVERY_MS);
        if is_due {
            self.0.insert(group, now_ms);
        }
        is_due
    }
}

/// The reaction to a part's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StallVerdict {
    Works,
    /// It is to be told.
    Stalls,
    /// The process ends.
    Hangs,
}

fn verdict(ms: u64, told_ms: u64, hangs_ms: u64, may_end: bool) -> StallVerdict {
    match ms {
        _ if ms >= hangs_ms && may_end => StallVerdict::Hangs,
        _ if ms >= told_ms => StallVerdict::Stalls,
        _ => StallVerdict::Works,
    }
}

/// Judges the writer of the log, which has come no further for so long.
///
/// `is_at_disk`: it writes or syncs. `others_go_on`: something is committed that this node's disk
/// lacks.
pub fn judge_writer(ms: u64, is_at_disk: bool, others_go_on: bool) -> StallVerdict {
    // A new start mends no disk: at the disk it ends only where the others go on without it.
    match is_at_disk {
        true => verdict(ms, WRITER_TOLD_MS, DISK_HANGS_MS, others_go_on),
        false => verdict(ms, WRITER_TOLD_MS, WRITER_HANGS_MS, true),
    }
}

/// Judges the checkpointer. Where the log hangs at the same disk, that says what there is to say.
pub fn judge_checkpointer(ms: u64, log_hangs: bool) -> StallVerdict {
    verdict(ms, CHECKPOINTER_TOLD_MS, CHECKPOINTER_HANGS_MS, !log_hangs)
}

/// Judges the threads of the tasks, on which none has run for so many seconds; for `own_s` of them
/// the log did not hang at the disk, which may be what they wait for.
pub fn judge_runtime(s: u64, own_s: u64) -> StallVerdict {
    verdict(
        s.max(own_s),
        RUNTIME_TOLD_S,
        RUNTIME_HANGS_S,
        own_s >= RUNTIME_HANGS_S,
    )
}

/// Judges a replica that applies nothing. `still_ms`: for how long the entry that it has begun has
/// not even read anything of the map; a disk may be slow, and is no faster after a new start.
pub fn judge_apply(ms: u64, still_ms: u64, log_hangs: bool) -> StallVerdict {
    verdict(
        ms,
        MAP_STUCK_MS,
        APPLY_HANGS_MS,
        still_ms >= APPLY_HANGS_MS && !log_hangs,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: ReplicaProgress = ReplicaProgress {
        committed: 10,
        synced: 10,
        applied: 10,
        is_held: false,
    };

    #[test]
    fn a_leader_steps_down_when_others_have_long_synced_what_it_has_not() {
        let mut stalls = ReplicaStalls::default();
        let mut at = |now_ms, committed, synced| {
            stalls.observe(
                now_ms,
                &ReplicaProgress {
                    committed,
                    synced,
                    applied: committed,
                    ..FINE
                },
            );
            stalls.cause()
        };
        assert_eq!(at(0, 10, 10), None);
        assert_eq!(at(1_000, 11, 10), None, "it has just come");
        assert_eq!(at(2_999, 50, 10), None);
        assert_eq!(at(3_000, 60, 10), Some(StepDownCause::Disk));
        // A disk that is always a little behind, and keeps up, is good enough.
        for now_s in 4..100 {
            assert_eq!(at(now_s * 1_000, now_s * 100 + 50, now_s * 100), None);
        }
        // One that takes three seconds for what others take milliseconds for is not.
        assert_eq!(at(100_000, 10_100, 10_099), None);
        assert_eq!(at(102_000, 10_300, 10_099), Some(StepDownCause::Disk));
        assert_eq!(
            at(103_000, 10_400, 10_300),
            None,
            "it has what it lacked then"
        );
    }

    #[test]
    fn a_leader_steps_down_when_it_applies_nothing_unless_another_map_is_coming() {
        let mut stalls = ReplicaStalls::default();
        let mut at = |now_ms, applied, is_held| {
            stalls.observe(
                now_ms,
                &ReplicaProgress {
                    applied,
                    is_held,
                    ..FINE
                },
            );
            stalls.cause()
        };
        assert_eq!(at(0, 5, false), None);
        assert_eq!(at(4_900, 6, false), None, "it is slow, and gets further");
        assert_eq!(at(9_800, 6, false), None);
        assert_eq!(at(9_900, 6, false), Some(StepDownCause::Map));
        assert_eq!(at(10_000, 6, true), None);
        assert_eq!(at(90_000, 6, true), None);
        assert_eq!(at(90_001, 10, false), None);
    }

    #[test]
    fn a_group_is_handed_over_at_most_once_a_minute() {
        let mut downs = StepDowns::default();
        assert!(downs.take(5, GroupId(1)) && downs.take(6, GroupId(2)));
        assert!(!downs.take(60_004, GroupId(1)));
        assert!(downs.take(60_005, GroupId(1)) && !downs.take(60_006, GroupId(1)));
    }

    #[test]
    fn what_hangs_by_itself_ends_the_process_and_a_disk_only_where_the_others_go_on() {
        use StallVerdict::{Hangs, Stalls, Works};
        let mut writer = Still::default();
        assert_eq!(writer.observe(0, 7, true), 0);
        assert_eq!(writer.observe(9_000, 7, true), 9_000);
        assert_eq!(writer.observe(9_500, 8, true), 0, "it has come further");
        assert_eq!(writer.observe(99_500, 8, false), 0, "it has nothing to do");
        assert_eq!(
            [0, 2_000, 30_000].map(|ms| judge_writer(ms, false, false)),
            [Works, Stalls, Hangs]
        );
        assert_eq!(
            [1_999, 2_000, 59_999, 60_000].map(|ms| judge_writer(ms, true, true)),
            [Works, Stalls, Stalls, Hangs]
        );
        assert_eq!(
            judge_writer(600_000, true, false),
            Stalls,
            "of all disks, perhaps"
        );
        assert_eq!(
            [7_999, 8_000, 120_000].map(|ms| judge_checkpointer(ms, false)),
            [Works, Stalls, Hangs]
        );
        assert_eq!(judge_checkpointer(600_000, true), Stalls);
        assert_eq!(
            [4_999, 5_000, 60_000].map(|ms| judge_apply(ms, ms, false)),
            [Works, Stalls, Hangs]
        );
        assert_eq!(judge_apply(90_000, 90_000, true), Stalls);
        assert_eq!(
            [3, 4, 60].map(|s| judge_runtime(s, s)),
            [Works, Stalls, Hangs]
        );
        assert_eq!(
            [judge_runtime(600, 59), judge_runtime(600, 60)],
            [Stalls, Hangs],
            "the disk hangs too"
        );
        assert_eq!(
            judge_apply(900_000, 10_000, false),
            Stalls,
            "its map is read, slowly"
        );
    }
}
