//! [`Heard`]: when each peer was last heard of, on any lane and from either side, and whether it
//! has probably just ended.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::types::NodeId;

/// How long a peer whose lanes broke passes for ended, unless it is heard of. By then a group has
/// another leader or none.
const CUT_FOR: Duration = Duration::from_secs(5);

/// Bounded by the number of nodes that proved to be of our cluster.
#[derive(Debug, Default)]
pub struct Heard(Mutex<HashMap<NodeId, Signs>>);

/// What was seen of a peer.
#[derive(Debug, Default)]
struct Signs {
    last: Option<Instant>,
    /// Lanes from it that are up.
    lanes: usize,
    /// When the last of them broke, if it was not heard of since.
    cut: Option<Instant>,
}

impl Heard {
    /// A frame came on a lane from a peer.
    pub fn note(&self, node: NodeId) {
        let mut peers = self.lock();
        let signs = peers.entry(node).or_default();
        signs.last = Some(Instant::now());
        signs.cut = None;
    }

    /// A peer has replied. If its own lanes broke before, this may be the last that it said, and be
    /// read late.
    pub fn note_reply(&self, node: NodeId) {
        self.lock().entry(node).or_default().last = Some(Instant::now());
    }

    /// A lane from a peer is up, and used.
    pub fn lane_began(&self, node: NodeId) {
        self.lock().entry(node).or_default().lanes += 1;
    }

    /// A lane from a peer broke. True if it was the last: one alone may break for many reasons, but
    /// a process that ends breaks all of its lanes at once.
    pub fn lane_ended(&self, node: NodeId) -> bool {
        let mut peers = self.lock();
        let signs = peers.entry(node).or_default();
        signs.lanes = signs.lanes.saturating_sub(1);
        if signs.lanes == 0 {
            signs.cut = Some(Instant::now());
        }
        signs.lanes == 0
    }

    pub fn last(&self, node: NodeId) -> Option<Instant> {
        self.lock().get(&node)?.last
    }

    /// Whether a peer has probably just ended.
    pub fn is_cut(&self, node: NodeId) -> bool {
        self.lock()
            .get(&node)
            .and_then(|signs| signs.cut)
            .is_some_and(|cut| cut.elapsed() < CUT_FOR)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Signs>> {
        self.0.lock().expect("no holder panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_cut_when_its_last_lane_breaks_until_it_is_heard_again_or_for_a_while() {
        let (heard, peer) = (Heard::default(), NodeId(2));
        for _ in 0..2 {
            heard.lane_began(peer);
            heard.note(peer);
        }
        assert!(
            !heard.lane_ended(peer) && !heard.is_cut(peer),
            "another lane is up"
        );
        assert!(heard.lane_ended(peer) && heard.is_cut(peer));
        assert!(heard.last(peer).is_some() && !heard.is_cut(NodeId(3)));
        heard.note_reply(peer);
        assert!(heard.is_cut(peer), "it may have replied before");
        heard.note(peer);
        assert!(!heard.is_cut(peer), "it was heard of");
        heard.lane_began(peer);
        assert!(heard.lane_ended(peer) && heard.is_cut(peer));
        tokio::time::advance(CUT_FOR).await;
        assert!(
            !heard.is_cut(peer),
            "nobody waits for ever for what it may never say to this node"
        );
    }
}
