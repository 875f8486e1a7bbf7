//! How a leader hands its group to another voter, and to which.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::raft::errors::TransferError;
use crate::raft::replica::Replica;
use crate::raft::status::{RaftStatus, Role};
use crate::types::{LogId, NodeId, ReplicaId};

/// A target this close to the end of the log may be handed the leadership: openraft lets it catch
/// up while nothing is written.
const TRANSFER_LAG_MAX: u64 = 256;

/// How long a transfer is waited for by default.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(2);

impl Replica {
    /// Whether this replica leads and knows of the other that it has, but for a few entries, the
    /// same log.
    pub fn is_caught_up(&self, replica: ReplicaId) -> bool {
        let status = self.status();
        let is_known = replica == self.key.replica
            || status.matched.get(&replica).is_some_and(Option::is_some);
        status.role == Role::Leader && is_known && lag(&status, replica) <= TRANSFER_LAG_MAX
    }

    /// The members that have all that is committed, as far as this replica knows, which leads.
    pub fn complete(&self) -> BTreeSet<ReplicaId> {
        let status = self.status();
        let has_all =
            |matched: &Option<LogId>| status.role == Role::Leader && *matched >= status.committed;
        status
            .matched
            .iter()
            .filter(|(_, matched)| has_all(matched))
            .map(|(replica, _)| *replica)
            .collect()
    }

    /// Hands the leadership to a voter with a map that has, but for a few entries, what this
    /// replica has, and waits until it leads. From the first moment on nothing is written here.
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), TransferError> {
        self.transfer_leader_within(to, TRANSFER_TIMEOUT).await
    }

    pub async fn transfer_leader_within(
        &self,
        to: ReplicaId,
        timeout: Duration,
    ) -> Result<(), TransferError> {
        let status = self.status();
        if status.role != Role::Leader {
            return Err(TransferError::NotLeader {
                leader: status.leader,
            });
        }
        if to == self.key.replica {
            return Ok(());
        }
        if !status.membership.voters.contains_key(&to) || status.membership.is_witness(to) {
            return Err(TransferError::NoVoter(to));
        }
        let entries = lag(&status, to);
        if entries > TRANSFER_LAG_MAX {
            return Err(TransferError::Behind {
                replica: to,
                entries,
            });
        }
        let mut watch = self.watch();
        self.raft
            .trigger()
            .transfer_leader(to)
            .await
            .map_err(|_| TransferError::Stopped)?;
        let taken = watch.wait_for(|now| {
            now.failure.is_some() || now.leader.is_some_and(|leader| leader.replica == to)
        });
        match tokio::time::timeout(timeout, taken).await {
            Ok(Ok(now)) if now.failure.is_none() => Ok(()),
            Ok(_) => Err(TransferError::Stopped),
            Err(_) => Err(TransferError::Late { to, timeout }),
        }
    }

    /// Returns whom to hand over to when it does not matter to whom.
    pub fn best_successor(&self) -> Option<ReplicaId> {
        self.best_successor_among(|_| true)
    }

    /// Returns the voter with a map that has what is committed, was heard of most lately and has
    /// most of the log, among those on nodes that `may_lead`.
    pub fn best_successor_among(&self, may_lead: impl Fn(NodeId) -> bool) -> Option<ReplicaId> {
        let status = self.status();
        let others = status
            .membership
            .voters
            .iter()
            .filter(|(replica, _)| {
                **replica != self.key.replica && !status.membership.is_witness(**replica)
            })
            .filter(|(_, node)| may_lead(**node));
        let candidates = others.filter(|(replica, _)| lag(&status, **replica) <= TRANSFER_LAG_MAX);
        // One whose disk hangs lacks little of a group that is idle, and can't be elected.
        let has_all = |replica: &ReplicaId| {
            status
                .matched
                .get(replica)
                .is_some_and(|matched| *matched >= status.committed)
        };
        let best = candidates.max_by_key(|(replica, node)| {
            (
                has_all(replica),
                self.context.lanes.last_heard(**node),
                std::cmp::Reverse(lag(&status, **replica)),
            )
        });
        best.map(|(replica, _)| *replica)
    }
}

fn lag(status: &RaftStatus, replica: ReplicaId) -> u64 {
    let last = status.last_log.map_or(0, |id| id.index);
    let matched = status.matched.get(&replica).copied().flatten();
    last.saturating_sub(matched.map_or(0, |id| id.index))
}
