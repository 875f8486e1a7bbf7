//! [`Ways`]: which peers this node can't connect to, and which of them said that of this node.
//!
//! A lane runs over a connection that one side made, so two nodes can have lanes in one direction
//! and none in the other. Who can't connect to a peer says so on the lanes that it serves for that
//! peer: there is no other way to tell it. Programs that do not know the frame pass over it.
//!
//! Nothing is looked for here. Who meets a peer that does not answer raises a doubt, and whoever
//! takes the doubts finds out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::types::NodeId;

/// How long it counts that a peer said it can't connect to this node. It says so with every reply.
const TOLD_FOR: Duration = Duration::from_secs(1);

/// Bounded by the number of nodes of the view, and those that proved to be of the cluster.
#[derive(Debug, Default)]
pub struct Ways {
    state: Mutex<State>,
    /// How many are closed: replies ask.
    closed: AtomicUsize,
    doubted: Notify,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    doubts: BTreeSet<NodeId>,
    /// Peers that this node can't connect to.
    closed: BTreeSet<NodeId>,
    /// When a peer last said that it can't connect to this node.
    told: BTreeMap<NodeId, Instant>,
}

impl Ways {
    /// Notes that a peer does not answer as it should: it may be out of reach.
    pub fn doubt(&self, node: NodeId) {
        let mut state = self.lock();
        // That one is looked for anyway.
        if !state.closed.contains(&node) && state.doubts.insert(node) {
            self.doubted.notify_one();
        }
    }

    /// Resolves when there may be doubts to take.
    pub async fn doubted(&self) {
        self.doubted.notified().await;
    }

    /// Returns the peers to be looked for: those in doubt, and those that can't be connected to.
    pub fn take_doubts(&self) -> BTreeSet<NodeId> {
        let mut state = self.lock();
        let doubts = std::mem::take(&mut state.doubts);
        doubts.union(&state.closed).copied().collect()
    }

    /// Notes whether this node can connect to a peer. Returns whether that is news.
    pub fn set_closed(&self, node: NodeId, is_closed: bool) -> bool {
        let mut state = self.lock();
        let is_news = match is_closed {
            true => state.closed.insert(node),
            false => state.closed.remove(&node),
        };
        self.closed.store(state.closed.len(), Ordering::Relaxed);
        if is_news {
            self.changed.notify_waiters();
        }
        is_news
    }

    /// Resolves when this node can't connect to a peer.
    pub async fn closed(&self, node: NodeId) {
        loop {
            // Before the look: what changes after it is not missed.
            let changed = self.changed.notified();
            if self.is_closed(node) {
                return;
            }
            changed.await;
        }
    }

    /// Returns whether this node can't connect to a peer.
    pub fn is_closed(&self, node: NodeId) -> bool {
        self.closed.load(Ordering::Relaxed) > 0 && self.lock().closed.contains(&node)
    }

    /// A peer said that it can't connect to this node.
    pub fn note_told(&self, node: NodeId) {
        self.lock().told.insert(node, Instant::now());
    }

    /// Returns the peers that said a moment ago that they can't connect to this node.
    pub fn telling(&self) -> BTreeSet<NodeId> {
        let mut state = self.lock();
        state.told.retain(|_, at| at.elapsed() < TOLD_FOR);
        state.told.keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_looked_for_once_after_a_doubt_and_again_while_it_is_closed() {
        let (ways, peer) = (Ways::default(), NodeId(2));
        assert!(ways.take_doubts().is_empty() && !ways.is_closed(peer));
        ways.doubt(peer);
        ways.doubted().await;
        assert_eq!(ways.take_doubts(), [peer].into());
        assert!(ways.take_doubts().is_empty());

        let mut closed = std::pin::pin!(ways.closed(peer));
        assert!(futures::poll!(closed.as_mut()).is_pending());
        assert!(ways.set_closed(peer, true) && !ways.set_closed(peer, true));
        closed.await;
        assert!(ways.is_closed(peer) && !ways.is_closed(NodeId(3)));
        assert_eq!(ways.take_doubts(), [peer].into());
        assert!(ways.set_closed(peer, false) && !ways.set_closed(peer, false));
        assert!(!ways.is_closed(peer) && ways.take_doubts().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_peer_said_counts_for_a_moment() {
        let ways = Ways::default();
        ways.note_told(NodeId(2));
        assert_eq!(ways.telling(), [NodeId(2)].into());
        tokio::time::advance(TOLD_FOR).await;
        assert!(ways.telling().is_empty());
    }
}
