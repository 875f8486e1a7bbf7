//! Decides when a replica writes a snapshot: when the log since its last outweighs it, or when it holds back old segments of the log.
//! One that holds them back must also let them go: of what a snapshot covers openraft keeps thousands of entries.
//!
//! One snapshot at a time on a node: it reads the whole map, and the log is purged behind it.
//!
//! Witnesses have no snapshot: each purges what the leader of its group says that every replica with a map has. When one of those stays away,
//! the log of the witness grows until it is back, or a plan has replaced it (`repair`); past a limit that is said.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::member::Member;
use crate::raft::{Group, GroupStatus, Witness};
use crate::storage::ReplicaKey;
use crate::storage::log::Log;

const TICK: Duration = Duration::from_secs(1);
/// Less log than this is never worth a snapshot.
const LOG_BYTES_FLOOR: u64 = 64 << 20;
/// More log than this always is: it is what a restart may have to replay.
const LOG_BYTES_CEILING: u64 = 512 << 20;
/// A replica that holds back this much of the log that others have no more need of is snapshotted, however little of it is its own.
const PINNED_BYTES_MAX: u64 = 256 << 20;

/// A witness that keeps more log than this is waiting for a replica that has been away for too long.
const WITNESS_LOG_BYTES_MAX: u64 = 1 << 30;
/// Between two words about that.
const COMPLAIN_EVERY: Duration = Duration::from_secs(600);

/// For a node that was heard of within this the log is kept: it comes by itself. For one that is gone longer it isn't.
const HEARD_WITHIN: Duration = Duration::from_secs(10);

/// Triggers snapshots and purges.
pub struct Janitor {
    member: Arc<Member>,
    log: Log,
    /// When it was last said that a witness keeps too much.
    complained: HashMap<ReplicaKey, Instant>,
}

impl Janitor {
    pub fn new(member: Arc<Member>, log: Log) -> Self {
        Self { member, log, complained: HashMap::new() }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        while super::waited(shutdown, TICK).await {
            self.tick().await;
        }
    }

    async fn tick(&mut self) {
        let pinned = self.log.pinning();
        let pins = |key: ReplicaKey| pinned.iter().any(|pin| pin.key == key && pin.held_bytes > PINNED_BYTES_MAX);
        let groups = self.member.registry.groups();
        join_all(groups.iter().map(|group| group.tell_witnesses())).await;
        for witness in self.member.registry.witnesses() {
            if let Err(error) = witness.let_go(pins(witness.key())).await {
                tracing::warn!("the log of witness {} was not purged: {error}", witness.key());
            }
            self.complain(&witness);
        }
        for group in groups {
            let pins = pins(group.key());
            let step = match is_due(group.log_bytes_since_snapshot(), group.snapshot_bytes()) {
                true => Step::Snapshot,
                false if pins => self.let_go(&group.status()),
                false => Step::Nothing,
            };
            match step {
                Step::Nothing => {}
                Step::Snapshot => self.snapshot(&group).await,
                Step::Purge(upto) => group.purge_log(upto).await,
            }
        }
    }

    fn complain(&mut self, witness: &Witness) {
        let (key, bytes) = (witness.key(), witness.log_bytes());
        if is_to_be_told(bytes, self.complained.get(&key).map(Instant::elapsed)) {
            tracing::warn!(
                "witness {key} keeps {} MiB of log for a replica that has been away for long: bring its node back, or replace it",
                bytes >> 20
            );
            self.complained.insert(key, Instant::now());
        }
    }

    fn let_go(&self, status: &GroupStatus) -> Step {
        let_go(status, status.purgeable(|node| self.member.heard_within(node, HEARD_WITHIN)))
    }

    async fn snapshot(&self, group: &Group) {
        let started = tokio::time::Instant::now();
        match group.build_snapshot().await {
            Ok(()) => tracing::debug!("snapshot of {} written in {:?}", group.key(), started.elapsed()),
            Err(error) => tracing::warn!("snapshot of {} was not written: {error}", group.key()),
        }
    }
}

/// What to do for a replica.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Snapshot,
    Purge(u64),
}

/// How a replica comes to let go of old segments: it purges what its snapshot covers, or writes a snapshot that covers more. While others
/// need what it has (`purgeable` is less than its snapshot), another snapshot would not help.
fn let_go(status: &GroupStatus, purgeable: Option<u64>) -> Step {
    match purgeable {
        Some(upto) => Step::Purge(upto),
        None if status.snapshot > status.purged || status.applied <= status.snapshot => Step::Nothing,
        None => Step::Snapshot,
    }
}

/// Whether somebody is to be told, again, of so large a log of a witness. `last`: how long ago somebody was.
fn is_to_be_told(bytes: u64, last: Option<Duration>) -> bool {
    bytes > WITNESS_LOG_BYTES_MAX && last.is_none_or(|ago| ago >= COMPLAIN_EVERY)
}

/// Whether the log since the last snapshot, in bytes, outweighs that snapshot.
fn is_due(log_bytes: u64, snapshot_bytes: u64) -> bool {
    log_bytes > snapshot_bytes.clamp(LOG_BYTES_FLOOR, LOG_BYTES_CEILING)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::raft::{GroupMembership, Role};
    use crate::types::{GroupId, LogId, ReplicaId};

    #[test]
    fn a_snapshot_is_due_when_the_log_outweighs_it() {
        assert!(!is_due(LOG_BYTES_FLOOR, 0));
        assert!(is_due(LOG_BYTES_FLOOR + 1, 0));
        assert!(!is_due(100 << 20, 200 << 20));
        assert!(is_due(201 << 20, 200 << 20));
        assert!(is_due(LOG_BYTES_CEILING + 1, 1 << 40));
    }

    #[test]
    fn a_large_log_of_a_witness_is_told_of_now_and_then() {
        assert!(!is_to_be_told(WITNESS_LOG_BYTES_MAX, None));
        assert!(is_to_be_told(WITNESS_LOG_BYTES_MAX + 1, None));
        assert!(!is_to_be_told(WITNESS_LOG_BYTES_MAX + 1, Some(COMPLAIN_EVERY - Duration::from_secs(1))));
        assert!(is_to_be_told(WITNESS_LOG_BYTES_MAX + 1, Some(COMPLAIN_EVERY)));
    }

    #[test]
    fn a_replica_lets_go_of_what_its_snapshot_covers_or_writes_another() {
        let step = |snapshot: Option<u64>, purged: Option<u64>, applied: Option<u64>, purgeable| {
            let id = |index| LogId { term: 1, index };
            let (snapshot, purged, applied) = (snapshot.map(id), purged.map(id), applied.map(id));
            let_go(&GroupStatus { snapshot, purged, applied, ..status() }, purgeable)
        };
        assert_eq!(step(None, None, Some(9), None), Step::Snapshot);
        assert_eq!(step(Some(9), None, Some(9), Some(9)), Step::Purge(9));
        assert_eq!(step(Some(9), Some(3), Some(12), Some(5)), Step::Purge(5));
        assert_eq!(step(Some(9), Some(5), Some(12), None), Step::Nothing, "a follower needs what is left");
        assert_eq!(step(Some(9), Some(9), Some(12), None), Step::Snapshot);
        assert_eq!(step(Some(9), Some(9), Some(9), None), Step::Nothing, "nothing more is applied");
    }

    fn status() -> GroupStatus {
        GroupStatus {
            key: ReplicaKey { group: GroupId(1), replica: ReplicaId(1) },
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
