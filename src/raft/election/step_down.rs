//! How a leader that is held up by its own node gives its group to a replica that is not.
//!
//! openraft saves its vote before it does anything else, and a disk that hangs never saves it: once
//! another replica asks for its vote, the core waits for the disk, and what it reports is out of
//! date. So a leader that steps down reports that it no longer leads, from the moment it has asked
//! another to lead, as long as its term stays the same. Clients are then sent away at once instead
//! of waiting for a core that does not answer.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::task::coop::unconstrained;

use crate::raft::errors::TransferError;
use crate::raft::replica::Replica;
use crate::raft::status::{ReplicaWatch, Role};
use crate::raft::types::from_raft;
use crate::storage::ReplicaKey;
use crate::types::{LogId, ReplicaId};

/// Time that the next leader may take to be elected.
const STEP_DOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// A successor must have been heard from within this time.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// Time until watchers see what the core of openraft has just done.
const SEEN_AFTER: Duration = Duration::from_millis(200);

/// The positions of a replica, by which a watchdog sees whether it makes progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaPosition {
    pub key: ReplicaKey,
    pub leads: bool,
    pub committed: u64,
    /// Last index that is durable on this node.
    pub synced: u64,
    pub applied: u64,
    /// True while nothing is to be applied, because another map takes the place of this one, or the
    /// replica has failed, which is reported elsewhere.
    pub is_held: bool,
    /// Time that the entry being applied has gone without a read of the map.
    pub applying: Option<Duration>,
}

impl Replica {
    pub(in crate::raft) fn progress(&self) -> ReplicaPosition {
        let index = |id: Option<LogId>| id.map_or(0, |id| id.index);
        let committed = self
            .raft
            .data_metrics()
            .borrow_watched()
            .local_committed
            .as_ref()
            .map(from_raft);
        ReplicaPosition {
            key: self.key(),
            leads: self.leads(),
            committed: index(committed),
            synced: index(self.log.synced()),
            applied: index(self.apply_state.store.applied().log_id),
            is_held: self.apply_state.hold.is_set()
                || self.apply_state.is_installing()
                || self.apply_state.failure().is_some(),
            applying: self.apply_state.applying(),
        }
    }

    /// Returns true if this replica has given up its lead in the term of `watch`.
    pub(in crate::raft) fn has_stepped_down(&self, watch: &ReplicaWatch) -> bool {
        watch.role == Role::Leader && self.stepped_down.load(Ordering::Relaxed) == watch.term
    }

    /// Returns the voter with a map that has synced all that is committed and was heard from last,
    /// if one was heard from recently.
    pub fn faster_successor(&self) -> Option<ReplicaId> {
        let complete = self.complete();
        let (key, watch) = (self.key(), self.watch.borrow());
        let membership = &watch.membership;
        let candidates = membership.voters.iter().filter(|(replica, _)| {
            **replica != key.replica
                && !membership.is_witness(**replica)
                && complete.contains(replica)
        });
        let by_recency = candidates
            .filter_map(|(replica, node)| Some((self.context.lanes.last_heard(*node)?, *replica)));
        by_recency
            .filter(|(at, _)| at.elapsed() < HEARD_WITHIN)
            .max()
            .map(|(_, replica)| replica)
    }

    /// Hands the lead to replica `to`, and reports from now on that this one no longer leads.
    ///
    /// # Errors
    ///
    /// If `to` is not known to lead in time. This replica then leads on, if its core still answers.
    pub async fn step_down(&self, to: ReplicaId) -> Result<(), TransferError> {
        let term = self.watch.borrow().term;
        let mut transfer = pin!(self.transfer_leader_within(to, STEP_DOWN_TIMEOUT));
        // The first poll checks that this replica leads, and starts the transfer.
        if let Some(ended) = unconstrained(transfer.as_mut()).now_or_never() {
            return ended;
        }
        self.stepped_down.store(term, Ordering::Relaxed);
        let Err(error) = transfer.await else {
            return Ok(());
        };

        // Either the core waits for the disk, or the transfer failed. In the first case nothing is
        // heard from it until the disk is back.
        let _ = self.raft.with_raft_state(|_| ()).await;
        tokio::time::sleep(SEEN_AFTER).await;
        let now = self.watch.borrow().clone();
        if now.term == term && now.role == Role::Leader {
            self.stepped_down.store(0, Ordering::Relaxed);
            return Err(error);
        }
        Ok(())
    }
}
