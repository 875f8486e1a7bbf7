//! How a leader hands its group to another voter, and which voter it chooses.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::raft::errors::TransferError;
use crate::raft::replica::Replica;
use crate::raft::status::{RaftStatus, Role};
use crate::types::{LogId, NodeId, ReplicaId};

/// Largest lag of a target of a transfer: openraft lets it catch up while nothing is written.
const TRANSFER_LAG_MAX: u64 = 256;

/// Default time that a transfer may take.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(2);

impl Replica {
    /// Returns true if this replica leads, and knows that `replica` has the same log, except for a
    /// few entries.
    pub fn is_caught_up(&self, replica: ReplicaId) -> bool {
        let status = self.status();
        let is_known = replica == self.key.replica
            || status.matched.get(&replica).is_some_and(Option::is_some);
        status.role == Role::Leader && is_known && lag(&status, replica) <= TRANSFER_LAG_MAX
    }

    /// Returns the members that have all that is committed, if this replica leads.
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

    /// Hands the leadership to a voter with a map that has nearly all of this log, and waits until
    /// it leads. Nothing is written here from the moment the transfer begins.
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), TransferError> {
        self.transfer_leader_within(to, TRANSFER_TIMEOUT).await
    }

    /// Hands over the leadership like [`Replica::transfer_leader`], within `timeout`.
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

        // A witness could win the election, and then serve nobody.
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

        // Subscribed before the transfer begins, so that its end is not missed.
        let mut watch = self.watch();
        self.raft
            .trigger()
            .transfer_leader(to)
            .await
            .map_err(|_| TransferError::Stopped)?;
        let took_over = watch.wait_for(|now| {
            now.failure.is_some() || now.leader.is_some_and(|leader| leader.replica == to)
        });

        match tokio::time::timeout(timeout, took_over).await {
            Ok(Ok(now)) if now.failure.is_none() => Ok(()),
            Ok(_) => Err(TransferError::Stopped),
            Err(_) => Err(TransferError::Late { to, timeout }),
        }
    }

    /// Returns the best target of a transfer, if any voter will do.
    pub fn best_successor(&self) -> Option<ReplicaId> {
        self.best_successor_among(|_| true)
    }

    /// Returns the best target of a transfer among voters with a map on nodes that `may_lead`: one
    /// that has all that is committed, then the one heard from last, then the one with most of the
    /// log.
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
        // A replica whose disk hangs lags little in an idle group, but cannot be elected.
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
