//! [`PeerLiveness`]: when this node last heard from each peer, on any lane and from either side,
//! and whether the peer's process has probably died.

use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::types::NodeId;

/// TTL of a disconnection: a peer counts as disconnected this long after its last lane broke,
/// unless it speaks again. By then a group has elected another leader, or has no quorum.
const DISCONNECTED_FOR: Duration = Duration::from_secs(5);

/// Holds one record per node that has proved to be of our cluster, which bounds it.
#[derive(Debug, Default)]
pub struct PeerLiveness(Mutex<HashMap<NodeId, PeerSigns>>);

/// Records the signs of life of one peer.
#[derive(Debug, Default)]
struct PeerSigns {
    last_heard: Option<Instant>,
    /// Number of lanes from it that are up.
    lanes: usize,
    /// Time at which the last of them broke; None once the peer has spoken since.
    disconnected_at: Option<Instant>,
}

impl PeerLiveness {
    /// Notes that a frame arrived on a lane from a peer.
    pub fn note_frame(&self, node: NodeId) {
        let mut peers = self.lock();
        let signs = peers.entry(node).or_default();
        signs.last_heard = Some(Instant::now());
        signs.disconnected_at = None;
    }

    /// Notes that a peer has replied. Does not revoke a disconnection: the reply may have been sent
    /// before the peer's own lanes broke, and be read late.
    pub fn note_reply(&self, node: NodeId) {
        self.lock().entry(node).or_default().last_heard = Some(Instant::now());
    }

    /// Notes that a lane from a peer is up, and used.
    pub fn on_lane_up(&self, node: NodeId) {
        self.lock().entry(node).or_default().lanes += 1;
    }

    /// Notes that a lane from a peer broke. Returns true if it was the last one: a single lane may
    /// break for many reasons, but a process that dies breaks all of its lanes at once.
    pub fn on_lane_down(&self, node: NodeId) -> bool {
        let mut peers = self.lock();
        let signs = peers.entry(node).or_default();
        assert!(
            signs.lanes > 0,
            "a lane from {node} broke that was never up"
        );
        signs.lanes -= 1;
        if signs.lanes == 0 {
            signs.disconnected_at = Some(Instant::now());
        }
        signs.lanes == 0
    }

    /// Returns when the peer last sent a frame or a reply.
    pub fn last_heard(&self, node: NodeId) -> Option<Instant> {
        self.lock().get(&node)?.last_heard
    }

    /// Returns true if the process of the peer has probably just died.
    pub fn is_disconnected(&self, node: NodeId) -> bool {
        self.lock()
            .get(&node)
            .and_then(|signs| signs.disconnected_at)
            .is_some_and(|at| at.elapsed() < DISCONNECTED_FOR)
    }

    /// Returns true if the peer was heard of within this time, and its process has not died since,
    /// as far as can be seen from here.
    pub fn is_up(&self, node: NodeId, within: Duration) -> bool {
        let heard = self.last_heard(node);
        heard.is_some_and(|at| at.elapsed() < within) && !self.is_disconnected(node)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, PeerSigns>> {
        self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_was_heard_of_just_now_is_not_up_once_its_lanes_broke() {
        let (liveness, peer) = (PeerLiveness::default(), NodeId(2));
        let within = Duration::from_millis(1500);
        assert!(!liveness.is_up(peer, within), "nothing was heard of it");
        liveness.on_lane_up(peer);
        liveness.note_frame(peer);
        assert!(liveness.is_up(peer, within));
        assert!(liveness.on_lane_down(peer));
        assert!(!liveness.is_up(peer, within), "its process has died");
        liveness.note_frame(peer);
        assert!(liveness.is_up(peer, within), "it is back");
        tokio::time::advance(within).await;
        assert!(!liveness.is_up(peer, within), "it is silent");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_cut_when_its_last_lane_breaks_until_it_is_heard_again_or_for_a_while() {
        let (liveness, peer) = (PeerLiveness::default(), NodeId(2));
        for _ in 0..2 {
            liveness.on_lane_up(peer);
            liveness.note_frame(peer);
        }
        assert!(
            !liveness.on_lane_down(peer) && !liveness.is_disconnected(peer),
            "another lane is up"
        );
        assert!(liveness.on_lane_down(peer) && liveness.is_disconnected(peer));
        assert!(liveness.last_heard(peer).is_some() && !liveness.is_disconnected(NodeId(3)));
        liveness.note_reply(peer);
        assert!(liveness.is_disconnected(peer), "it may have replied before");
        liveness.note_frame(peer);
        assert!(!liveness.is_disconnected(peer), "it was heard of");
        liveness.on_lane_up(peer);
        assert!(liveness.on_lane_down(peer) && liveness.is_disconnected(peer));
        tokio::time::advance(DISCONNECTED_FOR).await;
        assert!(
            !liveness.is_disconnected(peer),
            "nobody waits for ever for what it may never say to this node"
        );
    }
}
