//! Decides when a replica writes a snapshot, and when it purges its log, so that what is
//! overwritten or deleted gives its space back.
//!
//! A snapshot is due when the log since the last outweighs it, or when the replica holds back old
//! segments of the log. One that holds them back must also let them go: of what a snapshot covers
//! openraft keeps thousands of entries, however large they are. How much it may hold back is
//! decided for the node ([`LogSpace`]), whatever the number of its replicas.
//!
//! A replica that nobody writes to gives back the rest: its table is written down, the log since
//! its snapshot and behind it is let go of where it is worth a snapshot, and a snapshot file of
//! a map that has shrunk since is written anew.
//!
//! One snapshot at a time on a node: it reads the whole map, and the log is purged behind it.
//!
//! Witnesses have no snapshot: each purges what the leader of its group says that every replica
//! with a map has. When one of those stays away, the log of the witness grows until it is back, or
//! a plan has replaced it (`node_replacement`); past a limit that is said.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::node::context::NodeContext;
use crate::node::pause;
use crate::raft::{RaftStatus, Replica, WitnessReplica};
use crate::rare::{self, RareBranch};
use crate::sm::log_space::{LOG_BYTES_MIN, LogSpace};
use crate::storage::ReplicaKey;
use crate::storage::log::Log;
use crate::telemetry::{Rarely, rarely};
use crate::types::LogId;

const TICK: Duration = Duration::from_secs(1);
/// The same while the log is larger than it should be.
const TICK_UNDER_PRESSURE: Duration = Duration::from_millis(200);
/// Less log than this is never worth a snapshot.
const LOG_BYTES_FLOOR: u64 = 64 << 20;
/// More log than this always is: it is what a restart may have to replay.
const LOG_BYTES_CEILING: u64 = 512 << 20;
/// Log behind the snapshot that is kept for replicas that were away for a moment. Past this, and
/// past an eighth of the snapshot that they would be sent instead, it is purged.
const TAIL_BYTES_FLOOR: u64 = 32 << 20;

/// A replica that has applied nothing for this long is quiet. Not sooner: what was just written is
/// likely to be read, and is read faster from the table than from the tree.
const QUIET_AFTER: Duration = Duration::from_secs(10);
/// Less log than this is not worth a snapshot or a purge of a quiet replica either.
const QUIET_BYTES_FLOOR: u64 = 1 << 20;
/// Between two times that the table of one replica is written down because it is quiet: a replica
/// that is written to now and then must not write its few changes each time.
const WRITE_DOWN_EVERY: Duration = Duration::from_secs(20);

/// A witness that keeps more log than this is waiting for a replica that has been away for too
/// long.
const WITNESS_LOG_BYTES_MAX: u64 = 1 << 30;
/// Between two words about that.
const COMPLAIN_EVERY: Duration = Duration::from_secs(600);

/// For a node that was heard of within this the log is kept: it comes by itself. For one that is
/// gone longer it isn't.
const HEARD_WITHIN: Duration = Duration::from_secs(10);

/// Triggers snapshots and purges.
pub struct LogCompactor {
    context: Arc<NodeContext>,
    log: Log,
    /// Size that the log is kept to.
    log_bytes: u64,
    quiet: HashMap<ReplicaKey, Quiet>,
    /// Time of the last warning that a witness keeps too much.
    complained: HashMap<ReplicaKey, Instant>,
    no_room: Rarely,
}

impl LogCompactor {
    pub fn new(context: Arc<NodeContext>, log: Log, log_bytes: u64) -> Self {
        Self {
            context,
            log,
            log_bytes,
            quiet: HashMap::new(),
            complained: HashMap::new(),
            no_room: Rarely::new(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        let mut pause = TICK;
        while pause::waited(shutdown, pause).await {
            pause = if self.tick().await {
                TICK_UNDER_PRESSURE
            } else {
                TICK
            };
        }
    }

    /// Returns whether replicas hold back more of the log than they should.
    async fn tick(&mut self) -> bool {
        let groups = self.context.registry.groups();
        // On a full disk the log is what can be given back.
        let log_bytes = if self.log.lacks_room().is_some() {
            LOG_BYTES_MIN
        } else {
            self.log_bytes
        };

        let space =
            LogSpace::for_snapshots(log_bytes, groups.iter().map(|group| group.snapshot_bytes()));
        let pinned: HashMap<ReplicaKey, LogBacklog> = self
            .log
            .segments_pinned_by()
            .into_iter()
            .map(|pin| (pin.key, LogBacklog::of(space, pin.held_bytes)))
            .collect();
        let backlog = |key: ReplicaKey| pinned.get(&key).copied().unwrap_or(LogBacklog::Little);

        // Witnesses hold no snapshot: they purge what all others have.
        join_all(groups.iter().map(|group| group.advertise_purge_index())).await;
        for witness in self.context.registry.witnesses() {
            if let Err(error) = witness
                .release_log(backlog(witness.key()) != LogBacklog::Little)
                .await
            {
                rarely!(
                    warn,
                    "the log of witness {} was not purged: {error}",
                    witness.key()
                );
            }
            self.complain(&witness);
        }

        self.quiet
            .retain(|key, _| groups.iter().any(|group| group.key() == *key));
        for group in groups {
            let now = Instant::now();
            let quiet = self
                .quiet
                .entry(group.key())
                .or_insert_with(|| Quiet::new(now));
            let is_quiet = quiet.observe(group.state().applied().log_id, now);
            if is_quiet && quiet.is_to_be_written_down(now) {
                group.state().write_down();
            }
            let backlog = backlog(group.key());

            match self.step(&group, is_quiet, backlog) {
                CompactionStep::Nothing => {}
                CompactionStep::Purge(upto) => purge(&group, upto, backlog).await,
                CompactionStep::Snapshot => {
                    self.snapshot(&group).await;
                    // What is behind it is what was in the way. If openraft has not taken note of
                    // it yet, the next look finds it.
                    if let (true, CompactionStep::Purge(upto)) = (
                        backlog != LogBacklog::Little,
                        self.step(&group, is_quiet, backlog),
                    ) {
                        purge(&group, upto, backlog).await;
                    }
                }
            }
        }
        pinned
            .values()
            .any(|backlog| *backlog != LogBacklog::Little)
    }

    fn step(&self, group: &Replica, is_quiet: bool, backlog: LogBacklog) -> CompactionStep {
        let pins = backlog != LogBacklog::Little;
        let weights = Weights::of(group);
        if weights.want_snapshot(is_quiet) {
            return CompactionStep::Snapshot;
        }
        if !pins && !weights.want_purge(is_quiet) {
            return CompactionStep::Nothing;
        }

        // A member that is heard of catches up by the log; one that is away is sent a snapshot
        // later.
        let is_kept_for =
            |node| backlog != LogBacklog::TooMuch && self.context.heard_within(node, HEARD_WITHIN);
        let status = group.status();
        match release_log(&status, status.purgeable(is_kept_for)) {
            // A snapshot would only move what is behind it.
            CompactionStep::Snapshot if !pins => CompactionStep::Nothing,
            step => step,
        }
    }

    fn complain(&mut self, witness: &WitnessReplica) {
        let (key, bytes) = (witness.key(), witness.log_bytes());
        if is_to_be_logged(bytes, self.complained.get(&key).map(Instant::elapsed)) {
            // Said once in a while, of each witness.
            tracing::warn!(
                "witness {key} keeps {} MiB of log for a replica that has been away for long: \
                bring its node back, or replace it",
                bytes >> 20
            );
            self.complained.insert(key, Instant::now());
        }
    }

    async fn snapshot(&self, group: &Replica) {
        // The log needs what is left more than a file does that will not be whole.
        let (free, reserve) = self.log.free_bytes();
        let map = group.state().map_bytes();
        if free < reserve / 4 + map + map / 8 {
            if let Some(left_out) = self.no_room.due() {
                let (group, free_mib, map_mib) = (group.key().group, free >> 20, map >> 20);
                tracing::warn!(%group, free_mib, map_mib, left_out, "a snapshot waits for room on \
                    the disk");
            }
            return;
        }
        let started = tokio::time::Instant::now();
        match group.build_snapshot().await {
            Ok(()) => tracing::debug!(
                "snapshot of {} written in {:?}",
                group.key(),
                started.elapsed()
            ),
            Err(error) => rarely!(warn, "snapshot of {} was not written: {error}", group.key()),
        }
    }
}

async fn purge(group: &Replica, upto: u64, backlog: LogBacklog) {
    match backlog {
        LogBacklog::Little | LogBacklog::Much => group.purge_log(upto).await,
        LogBacklog::TooMuch => group.purge_log_of_all(upto).await,
    }
}

/// Part of the log that a replica holds back, from the oldest entry that it needs to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LogBacklog {
    Little,
    /// More than it should.
    Much,
    /// So much that members that are behind are sent a snapshot rather than the log.
    TooMuch,
}

impl LogBacklog {
    fn of(space: LogSpace, bytes: u64) -> Self {
        match bytes {
            bytes if space.is_spent_by(bytes) => Self::TooMuch,
            bytes if bytes > space.pinned_bytes_max => Self::Much,
            _ => Self::Little,
        }
    }
}

/// The next thing to do for a replica.
#[derive(Debug, PartialEq, Eq)]
enum CompactionStep {
    Nothing,
    Snapshot,
    Purge(u64),
}

/// Decides how a replica comes to let go of old segments: it purges what its snapshot covers, or
/// writes a snapshot that covers more. While others need what it has (`purgeable` is less than its
/// snapshot), another snapshot would not help.
fn release_log(status: &RaftStatus, purgeable: Option<u64>) -> CompactionStep {
    match purgeable {
        Some(upto) => CompactionStep::Purge(upto),
        None if status.snapshot > status.purged || status.applied <= status.snapshot => {
            CompactionStep::Nothing
        }
        None => CompactionStep::Snapshot,
    }
}

/// Returns true if so large a log of a witness is to be logged again. `last`: how long ago
/// somebody was.
fn is_to_be_logged(bytes: u64, last: Option<Duration>) -> bool {
    bytes > WITNESS_LOG_BYTES_MAX && last.is_none_or(|ago| ago >= COMPLAIN_EVERY)
}

/// Returns a floor in bytes, which is next to nothing where snapshots are eager.
fn floor(usual: u64) -> u64 {
    rare::or(RareBranch::EagerSnapshots, 2 << 10, usual)
}

/// Sizes of what a replica has on the disk, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Weights {
    /// Log that no snapshot covers.
    log_since: u64,
    /// Log that the snapshot covers.
    log_behind: u64,
    /// The snapshot file.
    snapshot: u64,
    /// Keys and values of the map, as far as its tables are written down.
    map: u64,
}

impl Weights {
    fn of(group: &Replica) -> Self {
        Self {
            log_since: group.log_bytes_since_snapshot(),
            log_behind: group.log_bytes_behind_snapshot(),
            snapshot: group.snapshot_bytes(),
            map: group.state().map_bytes(),
        }
    }

    /// Returns whether the log since the last snapshot outweighs that snapshot, or would be worth
    /// one on a quiet replica, or the map that it is of is not half as large any more.
    ///
    /// A quiet replica weighs the snapshot against four times the log: one that was away is sent
    /// the snapshot where the log is gone.
    fn want_snapshot(self, is_quiet: bool) -> bool {
        let outweighs = self.log_since
            > self
                .snapshot
                .clamp(floor(LOG_BYTES_FLOOR), LOG_BYTES_CEILING);
        let quiet_floor = floor(QUIET_BYTES_FLOOR);
        let is_worth_it = self.log_since > quiet_floor.max(self.snapshot / 4);
        let has_shrunk = self.snapshot > 2 * self.map + quiet_floor;
        outweighs || is_quiet && (is_worth_it || self.log_since > 0 && has_shrunk)
    }

    /// Returns whether more log is kept behind the snapshot than helps replicas that were away.
    fn want_purge(self, is_quiet: bool) -> bool {
        let least = match is_quiet {
            true => QUIET_BYTES_FLOOR,
            false => TAIL_BYTES_FLOOR,
        };
        self.log_behind > (self.snapshot / 8).clamp(floor(least), LOG_BYTES_CEILING)
    }
}

/// Measures for how long a replica has applied nothing.
#[derive(Debug)]
struct Quiet {
    applied: Option<LogId>,
    since: Instant,
    /// Nothing was applied since its table was written down.
    is_written_down: bool,
    written_down: Option<Instant>,
}

impl Quiet {
    fn new(now: Instant) -> Self {
        Self {
            applied: None,
            since: now,
            is_written_down: false,
            written_down: None,
        }
    }

    /// Returns whether the replica, which has applied through `applied` now, is quiet.
    fn observe(&mut self, applied: Option<LogId>, now: Instant) -> bool {
        if self.applied != applied {
            (self.applied, self.since, self.is_written_down) = (applied, now, false);
        }
        let quiet_after = rare::or(RareBranch::EagerSnapshots, TICK, QUIET_AFTER);
        now - self.since >= quiet_after
    }

    /// Returns whether the table of a quiet replica is to be written down now, which is then noted.
    fn is_to_be_written_down(&mut self, now: Instant) -> bool {
        let is_due = self
            .written_down
            .is_none_or(|last| now - last >= WRITE_DOWN_EVERY);
        if self.is_written_down || !is_due {
            return false;
        }
        (self.is_written_down, self.written_down) = (true, Some(now));
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::raft::{GroupMembership, Role};
    use crate::types::{GroupId, ReplicaId};

    #[test]
    fn a_snapshot_is_due_when_the_log_outweighs_it() {
        let is_due = |log_since, snapshot| {
            Weights {
                log_since,
                snapshot,
                map: snapshot,
                ..Weights::default()
            }
            .want_snapshot(false)
        };
        assert!(!is_due(LOG_BYTES_FLOOR, 0));
        assert!(is_due(LOG_BYTES_FLOOR + 1, 0));
        assert!(!is_due(100 << 20, 200 << 20));
        assert!(is_due(201 << 20, 200 << 20));
        assert!(is_due(LOG_BYTES_CEILING + 1, 1 << 40));
    }

    #[test]
    fn a_quiet_replica_is_snapshotted_for_less_log_and_when_its_map_has_shrunk() {
        let wants = |log_since, snapshot, map| {
            let weights = Weights {
                log_since,
                snapshot,
                map,
                ..Weights::default()
            };
            assert!(
                !weights.want_snapshot(false),
                "a busy one waits: {weights:?}"
            );
            weights.want_snapshot(true)
        };
        assert!(!wants(QUIET_BYTES_FLOOR, 0, 0));
        assert!(wants(QUIET_BYTES_FLOOR + 1, 0, 0));
        assert!(!wants(25 << 20, 100 << 20, 100 << 20));
        assert!(wants(26 << 20, 100 << 20, 100 << 20));
        assert!(wants(2000, 100 << 20, 10 << 20));
        assert!(!wants(2000, 100 << 20, 60 << 20));
        assert!(!wants(0, 100 << 20, 0), "what it holds was never more");
        assert!(!wants(2000, 1 << 20, 0), "too little to be given back");
    }

    #[test]
    fn what_is_kept_behind_a_snapshot_is_bounded_in_bytes() {
        let wants = |log_behind, snapshot, is_quiet| {
            Weights {
                log_behind,
                snapshot,
                ..Weights::default()
            }
            .want_purge(is_quiet)
        };
        assert!(!wants(TAIL_BYTES_FLOOR, 1 << 20, false));
        assert!(wants(TAIL_BYTES_FLOOR + 1, 1 << 20, false));
        assert!(
            !wants(TAIL_BYTES_FLOOR + 1, 1 << 30, false),
            "sending the snapshot would be far more"
        );
        assert!(!wants(QUIET_BYTES_FLOOR, 1 << 20, true));
        assert!(wants(QUIET_BYTES_FLOOR + 1, 1 << 20, true));
        assert!(wants(LOG_BYTES_CEILING + 1, 1 << 50, true));
    }

    #[test]
    fn a_replica_is_quiet_a_while_after_its_last_entry_and_written_down_once() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let id = |index| Some(LogId { term: 1, index });
        let mut quiet = Quiet::new(start);
        assert!(!quiet.observe(id(1), at(0)));
        assert!(!quiet.observe(id(1), at(9)));
        assert!(quiet.observe(id(1), at(10)));
        assert!(quiet.is_to_be_written_down(at(10)));
        assert!(
            !quiet.is_to_be_written_down(at(60)),
            "nothing has come since"
        );

        assert!(!quiet.observe(id(2), at(61)));
        assert!(quiet.observe(id(2), at(71)));
        assert!(quiet.is_to_be_written_down(at(71)));

        assert!(!quiet.observe(id(3), at(72)));
        assert!(quiet.observe(id(3), at(82)));
        assert!(
            !quiet.is_to_be_written_down(at(82)),
            "the last time was just now"
        );
        assert!(quiet.is_to_be_written_down(at(91)));
    }

    #[test]
    fn a_large_log_of_a_witness_is_told_of_now_and_then() {
        assert!(!is_to_be_logged(WITNESS_LOG_BYTES_MAX, None));
        assert!(is_to_be_logged(WITNESS_LOG_BYTES_MAX + 1, None));
        assert!(!is_to_be_logged(
            WITNESS_LOG_BYTES_MAX + 1,
            Some(COMPLAIN_EVERY - Duration::from_secs(1))
        ));
        assert!(is_to_be_logged(
            WITNESS_LOG_BYTES_MAX + 1,
            Some(COMPLAIN_EVERY)
        ));
    }

    #[test]
    fn a_replica_lets_go_of_what_its_snapshot_covers_or_writes_another() {
        let step = |snapshot: Option<u64>, purged: Option<u64>, applied: Option<u64>, purgeable| {
            let id = |index| LogId { term: 1, index };
            let (snapshot, purged, applied) = (snapshot.map(id), purged.map(id), applied.map(id));
            release_log(
                &RaftStatus {
                    snapshot,
                    purged,
                    applied,
                    ..status()
                },
                purgeable,
            )
        };
        assert_eq!(step(None, None, Some(9), None), CompactionStep::Snapshot);
        assert_eq!(
            step(Some(9), None, Some(9), Some(9)),
            CompactionStep::Purge(9)
        );
        assert_eq!(
            step(Some(9), Some(3), Some(12), Some(5)),
            CompactionStep::Purge(5)
        );
        assert_eq!(
            step(Some(9), Some(5), Some(12), None),
            CompactionStep::Nothing,
            "a follower needs what is left"
        );
        assert_eq!(
            step(Some(9), Some(9), Some(12), None),
            CompactionStep::Snapshot
        );
        assert_eq!(
            step(Some(9), Some(9), Some(9), None),
            CompactionStep::Nothing,
            "nothing more is applied"
        );
    }

    fn status() -> RaftStatus {
        RaftStatus {
            key: ReplicaKey {
                group: GroupId(1),
                replica: ReplicaId(1),
            },
            role: Role::Follower,
            leader: None,
            leader_replica: None,
            term: 1,
            last_log: None,
            committed: None,
            applied: None,
            snapshot: None,
            purged: None,
            membership: GroupMembership::default(),
            failed: None,
            quorum_acked: None,
            leader_heard: None,
            matched: BTreeMap::new(),
        }
    }
}
