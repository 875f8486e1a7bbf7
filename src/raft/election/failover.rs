//! How a replica does what its election timer says, and how it campaigns early when the process of
//! its leader has died (the fast failover).
//!
//! A leader's process is taken for dead when all of its lanes have broken
//! ([`PeerLiveness`](super::liveness::PeerLiveness)). Where reads rest on leases there is no fast
//! failover: a lease must never be ended on a guess.

use futures::FutureExt;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::TransferLeaderRequest;
use tokio::task::coop::unconstrained;

use super::timer::{ElectionRole, TimerAction};
use crate::raft::replica::Replica;
use crate::raft::status::GroupMembership;
use crate::raft::timings::LeaseReads;
use crate::raft::types::Types;
use crate::storage::log::Vote;
use crate::types::NodeId;

impl Replica {
    /// Reacts to the loss of all lanes from `node`: if it leads this group, its process has
    /// probably died, and this replica campaigns soon unless the leader is heard from before. Does
    /// nothing where reads rest on leases.
    pub(in crate::raft) fn on_leader_disconnected(&self, node: NodeId) {
        if self.timings.lease != LeaseReads::Off {
            return;
        }
        let watch = self.watch.borrow();
        let leader = watch
            .leader
            .filter(|leader| leader.replica != self.key.replica);
        if let Some(leader) =
            leader.filter(|leader| watch.membership.node_of(leader.replica) == Some(node))
        {
            self.timer
                .on_leader_disconnected(watch.membership.rank_after(leader.replica, self.key));
        }
    }

    /// Ends the lease of a leader whose process has probably died, so that this replica may
    /// campaign and vote. If the leader is alive after all, the election costs the group a moment,
    /// and nothing that was acknowledged.
    ///
    /// Returns false if the leader still holds a lease: no vote may be given to others then.
    /// openraft checks leases too, but never renews one that it was told to end.
    pub(in crate::raft) fn end_lease_if_disconnected(&self) -> bool {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = GroupMembership::from(&*metrics.membership_config);
        let Some(leader) = metrics
            .current_leader
            .filter(|leader| *leader != self.key.replica)
        else {
            return true;
        };
        let is_disconnected = membership
            .node_of(leader)
            .is_some_and(|node| self.context.lanes.is_disconnected(node));
        if is_disconnected && self.timings.lease == LeaseReads::Off {
            // openraft takes this as a transfer to another replica, and does no more than end the
            // lease.
            let request = TransferLeaderRequest::<Types>::new(metrics.vote, leader, None);
            let _ = unconstrained(self.raft.handle_transfer_leader(request)).now_or_never();
            return true;
        }
        !self.timer.is_leased()
    }

    /// Returns true if the replica may have promised a leader, before a restart, not to vote for
    /// another yet.
    pub(in crate::raft) fn may_be_leased(&self) -> bool {
        self.opened.elapsed() < self.timings.forgotten_lease()
    }

    /// Does what the election timer says is due. If openraft is too busy to take the message, it is
    /// not needed, or will be due again.
    pub(in crate::raft) fn tick(&self) {
        let due = {
            let watch = self.watch.borrow();
            let is_voter =
                |membership: &GroupMembership| membership.voters.contains_key(&self.key.replica);
            let is_voter = is_voter(&watch.membership) || is_voter(&watch.committed_membership);
            self.timer.take_action(ElectionRole::of(
                watch.role,
                is_voter,
                watch.membership.voters.len(),
            ))
        };
        match due {
            TimerAction::Nothing => {}
            TimerAction::Heartbeat => {
                drop(unconstrained(self.raft.trigger().heartbeat()).now_or_never())
            }
            TimerAction::Campaign => {
                self.context.elections.count_campaign();
                self.end_lease_if_disconnected();
                drop(unconstrained(self.raft.trigger().elect(true)).now_or_never());
            }
        }
    }

    /// Returns true if `vote` may be that of the current leader, as far as this replica knows.
    pub(in crate::raft) fn is_current(&self, vote: &Vote) -> bool {
        vote.committed && vote.term >= self.watch.borrow().term
    }
}
