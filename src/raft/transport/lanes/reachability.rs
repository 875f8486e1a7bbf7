//! [`Reachability`]: records which peers this node can't connect to, and which of them can't
//! connect to this node.
//!
//! A lane runs over a connection that one side made, so two nodes can have lanes in one direction
//! and none in the other. A node that can't connect to a peer says so on the lanes that it serves
//! for that peer, because there is no other way to tell it. Programs that do not know the frame
//! ignore it.
//!
//! Nothing is probed here. A caller that meets a peer which does not answer makes it a suspect, and
//! whoever takes the suspects probes them.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::types::NodeId;

/// TTL of a report that a peer can't connect to this node. The peer repeats it with every reply.
const REPORT_TTL: Duration = Duration::from_secs(1);

/// Records which peers can't be connected to, and by which peers this node can't be. Bounded by the
/// number of nodes of the view, and those that proved to be of the cluster.
#[derive(Debug, Default)]
pub struct Reachability {
    state: Mutex<ReachabilityState>,
    /// Number of unreachable peers, read for every reply.
    unreachable: AtomicUsize,
    suspected: Notify,
    changed: Notify,
}

#[derive(Debug, Default)]
struct ReachabilityState {
    suspects: BTreeSet<NodeId>,
    /// Peers that this node can't connect to.
    unreachable: BTreeSet<NodeId>,
    /// Time at which each peer last said that it can't connect to this node.
    unreachable_from: BTreeMap<NodeId, Instant>,
}

impl Reachability {
    /// Notes that a peer does not answer as it should: it may be unreachable.
    pub fn suspect(&self, node: NodeId) {
        let mut state = self.lock();
        // An unreachable peer is probed anyway.
        if !state.unreachable.contains(&node) && state.suspects.insert(node) {
            self.suspected.notify_one();
        }
    }

    /// Resolves when there may be suspects to take.
    pub async fn suspected(&self) {
        self.suspected.notified().await;
    }

    /// Returns the peers to be probed: the suspects, and those that can't be connected to.
    pub fn take_suspects(&self) -> BTreeSet<NodeId> {
        let mut state = self.lock();
        let suspects = std::mem::take(&mut state.suspects);
        suspects.union(&state.unreachable).copied().collect()
    }

    /// Notes whether this node can connect to a peer. Returns true if that has changed.
    pub fn set_unreachable(&self, node: NodeId, is_unreachable: bool) -> bool {
        let mut state = self.lock();
        let is_news = match is_unreachable {
            true => state.unreachable.insert(node),
            false => state.unreachable.remove(&node),
        };
        self.unreachable
            .store(state.unreachable.len(), Ordering::Relaxed);
        if is_news {
            self.changed.notify_waiters();
        }
        is_news
    }

    /// Resolves when this node can't connect to a peer.
    pub async fn until_unreachable(&self, node: NodeId) {
        loop {
            // Subscribed before the check, so that a change in between is not missed.
            let changed = self.changed.notified();
            if self.is_unreachable(node) {
                return;
            }
            changed.await;
        }
    }

    /// Returns true if this node can't connect to a peer.
    pub fn is_unreachable(&self, node: NodeId) -> bool {
        self.unreachable.load(Ordering::Relaxed) > 0 && self.lock().unreachable.contains(&node)
    }

    /// Notes that a peer said it can't connect to this node.
    pub fn note_unreachable_from(&self, node: NodeId) {
        self.lock().unreachable_from.insert(node, Instant::now());
    }

    /// Returns the peers that said recently that they can't connect to this node.
    pub fn unreachable_from(&self) -> BTreeSet<NodeId> {
        let mut state = self.lock();
        state
            .unreachable_from
            .retain(|_, at| at.elapsed() < REPORT_TTL);
        state.unreachable_from.keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, ReachabilityState> {
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_looked_for_once_after_a_doubt_and_again_while_it_is_closed() {
        let (reachability, peer) = (Reachability::default(), NodeId(2));
        assert!(reachability.take_suspects().is_empty() && !reachability.is_unreachable(peer));
        reachability.suspect(peer);
        reachability.suspected().await;
        assert_eq!(reachability.take_suspects(), [peer].into());
        assert!(reachability.take_suspects().is_empty());

        let mut until = std::pin::pin!(reachability.until_unreachable(peer));
        assert!(futures::poll!(until.as_mut()).is_pending());
        assert!(
            reachability.set_unreachable(peer, true) && !reachability.set_unreachable(peer, true)
        );
        until.await;
        assert!(reachability.is_unreachable(peer) && !reachability.is_unreachable(NodeId(3)));
        assert_eq!(reachability.take_suspects(), [peer].into());
        assert!(
            reachability.set_unreachable(peer, false) && !reachability.set_unreachable(peer, false)
        );
        assert!(!reachability.is_unreachable(peer) && reachability.take_suspects().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_peer_said_counts_for_a_moment() {
        let reachability = Reachability::default();
        reachability.note_unreachable_from(NodeId(2));
        assert_eq!(reachability.unreachable_from(), [NodeId(2)].into());
        tokio::time::advance(REPORT_TTL).await;
        assert!(reachability.unreachable_from().is_empty());
    }
}
