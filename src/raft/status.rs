//! What a replica reports: [`RaftStatus`] at one moment, [`ReplicaWatch`] as it changes, and the
//! [`Freshness`] of its map.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::types::{StoredMembership, from_raft};
use crate::storage::ReplicaKey;
use crate::types::{LogId, NodeId, ReplicaId, ReplicaKind};

/// The role of a replica in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Leader,
    Follower,
    /// Asks for votes.
    Candidate,
    /// Applies, and has no vote.
    Learner,
    Stopped,
}

/// The leader, as a replica knows it. It may have been deposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    pub replica: ReplicaId,
    /// None if the membership known here does not name it, or it is a witness, which serves nobody.
    pub node: Option<NodeId>,
}

/// The state of a replica at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct RaftStatus {
    pub key: ReplicaKey,
    pub role: Role,
    pub leader: Option<NodeId>,
    pub leader_replica: Option<ReplicaId>,
    pub term: u64,
    pub last_log: Option<LogId>,
    pub committed: Option<LogId>,
    pub applied: Option<LogId>,
    pub snapshot: Option<LogId>,
    pub purged: Option<LogId>,
    /// The membership in effect, which may not be committed.
    pub membership: GroupMembership,
    /// The reason why the replica has stopped, if it was not asked to.
    pub failed: Option<String>,
    /// For a leader, how long ago a quorum answered what it had sent then.
    pub quorum_acked: Option<Duration>,
    /// Time since the leader was heard from; zero for the leader itself, None if never since the
    /// start.
    pub leader_heard: Option<Duration>,
    /// For a leader, the last entry of each replica's log that is known to match its own.
    pub matched: BTreeMap<ReplicaId, Option<LogId>>,
}

impl RaftStatus {
    /// Asserts what holds of a replica at any moment.
    pub(super) fn check(&self) {
        assert!(
            self.committed <= self.last_log.max(self.snapshot),
            "{} has committed {:?} past the end of its log {:?}",
            self.key,
            self.committed,
            self.last_log
        );
        // In debug builds alone: a snapshot file of an earlier index may take the place of one that
        // has rotted, and a disk must not end the process here.
        debug_assert!(
            self.snapshot.is_none() || self.purged <= self.snapshot,
            "{} has purged {:?} past its snapshot {:?}",
            self.key,
            self.purged,
            self.snapshot
        );
    }

    /// Returns the index through which the log may be purged at no cost to others, if that is
    /// further than it is. That is the snapshot; but a leader keeps what a member for which
    /// `is_near` holds still lacks, because only a whole snapshot would bring it up to date
    /// otherwise.
    pub fn purgeable(&self, is_near: impl Fn(NodeId) -> bool) -> Option<u64> {
        let snapshot = self.snapshot?.index;
        let members = self
            .membership
            .voters
            .iter()
            .chain(&self.membership.learners);
        let kept_for = members.filter(|(replica, node)| {
            self.role == Role::Leader && **replica != self.key.replica && is_near(**node)
        });
        let matched = |replica| {
            self.matched
                .get(replica)
                .copied()
                .flatten()
                .map_or(0, |id| id.index)
        };
        let index = kept_for
            .map(|(replica, _)| matched(replica))
            .fold(snapshot, u64::min);
        assert!(index <= snapshot, "only a snapshot replaces the log");
        (index > self.purged.map_or(0, |id| id.index)).then_some(index)
    }

    /// Returns the index through which everything is committed, and durable on every member that
    /// has a map: a witness need not keep the log up to there. None if that is not known, as for a
    /// member not heard from in this term.
    pub fn matched_by_all(&self) -> Option<u64> {
        let members = self
            .membership
            .voters
            .keys()
            .chain(self.membership.learners.keys());
        let mut upto = self.committed?.index;
        for replica in members.filter(|replica| !self.membership.is_witness(**replica)) {
            upto = upto.min(self.matched.get(replica).copied().flatten()?.index);
        }
        (self.role == Role::Leader).then_some(upto)
    }
}

/// The members of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupMembership {
    /// The entry that set it; None before the group has begun.
    pub log_id: Option<LogId>,
    pub voters: BTreeMap<ReplicaId, NodeId>,
    pub learners: BTreeMap<ReplicaId, NodeId>,
    /// The voters and learners that keep the log and no map.
    pub witnesses: BTreeSet<ReplicaId>,
    /// False in the middle of a change of voters, while `voters` are those of both sides.
    pub is_uniform: bool,
}

impl GroupMembership {
    /// Returns the rank of `key` among the voters that may lead after `leader`, in an order that
    /// all of them know. The order starts with another voter in each group, so that not all groups
    /// of a node that died go to the same successor.
    pub fn rank_after(&self, leader: ReplicaId, key: ReplicaKey) -> u32 {
        let mut heirs: Vec<ReplicaId> = self
            .voters
            .keys()
            .copied()
            .filter(|id| *id != leader && !self.is_witness(*id))
            .collect();
        let first = key.group.0 % (heirs.len() as u64).max(1);
        heirs.rotate_left(usize::try_from(first).unwrap_or(0));
        let place = heirs.iter().position(|id| *id == key.replica);
        place
            .and_then(|place| u32::try_from(place).ok())
            .unwrap_or(0)
    }

    /// Returns the node of a member.
    pub fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        self.voters
            .get(&replica)
            .or_else(|| self.learners.get(&replica))
            .copied()
    }

    /// Returns all voters and learners.
    pub fn members(&self) -> BTreeSet<ReplicaId> {
        self.voters
            .keys()
            .chain(self.learners.keys())
            .copied()
            .collect()
    }

    pub fn is_member(&self, replica: ReplicaId) -> bool {
        self.voters.contains_key(&replica) || self.learners.contains_key(&replica)
    }

    pub fn is_witness(&self, replica: ReplicaId) -> bool {
        self.witnesses.contains(&replica)
    }
}

impl From<&StoredMembership> for GroupMembership {
    fn from(stored: &StoredMembership) -> Self {
        let voter_ids: BTreeSet<ReplicaId> = stored.voter_ids().collect();
        let witnesses = stored
            .nodes()
            .filter(|(_, member)| member.kind == ReplicaKind::Witness)
            .map(|(replica, _)| *replica)
            .collect();
        let members = stored
            .nodes()
            .map(|(replica, member)| (*replica, member.node));
        let (voters, learners) = members.partition(|(replica, _)| voter_ids.contains(replica));
        let is_uniform = stored.get_joint_config().len() <= 1;
        Self {
            log_id: stored.log_id().as_ref().map(from_raft),
            voters,
            learners,
            witnesses,
            is_uniform,
        }
    }
}

/// The part of a replica's state that changes seldom, and that watchers wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaWatch {
    pub role: Role,
    pub leader: Option<Leader>,
    pub term: u64,
    pub membership: GroupMembership,
    /// The last membership that is committed, as far as this replica knows.
    pub committed_membership: GroupMembership,
    /// The reason why the replica has stopped, if it was not asked to.
    pub failure: Option<String>,
}

/// Records how fresh a follower's map is: when it was last known to hold all that its leader had
/// committed.
#[derive(Debug, Default)]
pub struct Freshness(Mutex<FreshnessState>);

#[derive(Debug, Default)]
struct FreshnessState {
    /// Time at which an append of a leader was last accepted.
    last: Option<Instant>,
    /// A commit that the leader has announced, and when. Kept until it is applied; replacing it
    /// with later ones would mean that it never is.
    awaited: Option<(Instant, u64)>,
    /// Time at which the map held all that was committed.
    fresh: Option<Instant>,
}

impl Freshness {
    /// Notes that an append of a leader was accepted, which had committed through `commit`.
    pub fn note_append(&self, commit: u64, applied: u64) {
        let now = Instant::now();
        let mut state = self.0.lock();
        state.last = Some(now);
        state.advance(applied);
        state.awaited.get_or_insert((now, commit));
        state.advance(applied);
    }

    /// Returns when the leader was last heard from.
    pub fn last_heard(&self) -> Option<Instant> {
        self.0.lock().last
    }

    /// Returns when the map was last known to hold all that its leader had committed; None if never
    /// since the start.
    pub fn fresh_at(&self, applied: u64) -> Option<Instant> {
        let mut state = self.0.lock();
        state.advance(applied);
        state.fresh
    }
}

impl FreshnessState {
    fn advance(&mut self, applied: u64) {
        if let Some((at, _)) = self.awaited.take_if(|(_, commit)| *commit <= applied) {
            self.fresh = Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::GroupId;

    #[test]
    fn each_heir_has_a_rank_of_its_own_and_groups_begin_with_different_ones() {
        let voters = (1..=5).map(|id| (ReplicaId(id), NodeId(id))).collect();
        let witnesses = [ReplicaId(4)].into();
        let membership = GroupMembership {
            voters,
            witnesses,
            ..GroupMembership::default()
        };
        let ranks = |group| {
            [1, 3, 5].map(|id| {
                membership.rank_after(
                    ReplicaId(2),
                    ReplicaKey {
                        group,
                        replica: ReplicaId(id),
                    },
                )
            })
        };
        assert_eq!(
            [0, 1, 2, 3].map(|group| ranks(GroupId(group))),
            [[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 1, 2]]
        );
        let alone = GroupMembership {
            voters: [(ReplicaId(2), NodeId(2))].into(),
            ..GroupMembership::default()
        };
        assert_eq!(
            alone.rank_after(
                ReplicaId(2),
                ReplicaKey {
                    group: GroupId(1),
                    replica: ReplicaId(9)
                }
            ),
            0
        );
    }

    #[test]
    fn a_leader_keeps_what_members_that_are_near_still_lack() {
        let at = |index| Some(LogId { term: 1, index });
        let members =
            [(1, 10), (2, 20), (3, 30)].map(|(replica, node)| (ReplicaId(replica), NodeId(node)));
        let matched = [(1, at(90)), (2, at(50)), (3, None)]
            .map(|(replica, matched)| (ReplicaId(replica), matched));
        let status = |role, purged| RaftStatus {
            key: ReplicaKey {
                group: GroupId(1),
                replica: ReplicaId(1),
            },
            role,
            leader: None,
            leader_replica: None,
            term: 1,
            last_log: at(90),
            committed: at(90),
            applied: at(90),
            snapshot: at(70),
            purged,
            membership: GroupMembership {
                voters: members.into(),
                ..GroupMembership::default()
            },
            failed: None,
            quorum_acked: None,
            leader_heard: None,
            matched: matched.into(),
        };
        let leader = status(Role::Leader, at(10));
        assert_eq!(
            leader.purgeable(|_| false),
            Some(70),
            "nobody is near: up to the snapshot"
        );
        assert_eq!(leader.purgeable(|node| node == NodeId(20)), Some(50));
        assert_eq!(
            leader.purgeable(|_| true),
            None,
            "of one it is not known what it has"
        );
        assert_eq!(
            status(Role::Leader, at(50)).purgeable(|node| node == NodeId(20)),
            None
        );
        assert_eq!(
            status(Role::Follower, at(10)).purgeable(|_| true),
            Some(70),
            "a follower sends nobody its log"
        );
        assert_eq!(status(Role::Follower, at(70)).purgeable(|_| true), None);
        assert_eq!(
            RaftStatus {
                snapshot: None,
                ..status(Role::Follower, None)
            }
            .purgeable(|_| true),
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_map_is_as_fresh_as_the_last_commit_that_it_caught_up_with() {
        let freshness = Freshness::default();
        assert_eq!(freshness.fresh_at(0), None);
        let start = Instant::now();
        freshness.note_append(5, 3);
        assert_eq!(freshness.fresh_at(3), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        freshness.note_append(9, 4);
        assert_eq!(
            freshness.fresh_at(5),
            Some(start),
            "what was committed a second ago is applied now"
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        freshness.note_append(9, 9);
        assert_eq!(freshness.fresh_at(9), Some(Instant::now()));
        assert_eq!(freshness.last_heard(), Some(Instant::now()));
    }
}
