//! [`Heard`]: when each peer was last heard of, on any lane and from either side, and whether a lane broke since.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use tokio::time::Instant;

use crate::types::NodeId;

/// Bounded by the number of nodes that proved to be of our cluster.
#[derive(Debug, Default)]
pub struct Heard(Mutex<HashMap<NodeId, Last>>);

/// The last sign of a peer.
#[derive(Debug)]
struct Last {
    at: Instant,
    /// A lane broke after it.
    is_cut: bool,
}

impl Heard {
    pub fn note(&self, node: NodeId) {
        self.lock().insert(node, Last { at: Instant::now(), is_cut: false });
    }

    /// A lane with a peer broke. A process that ends breaks all of its lanes at once; one that lives is soon heard on another.
    pub fn note_cut(&self, node: NodeId) {
        if let Some(last) = self.lock().get_mut(&node) {
            last.is_cut = true;
        }
    }

    pub fn last(&self, node: NodeId) -> Option<Instant> {
        self.lock().get(&node).map(|last| last.at)
    }

    /// Whether the last that was seen of a peer is that a lane broke: it has probably just ended.
    pub fn is_cut(&self, node: NodeId) -> bool {
        self.lock().get(&node).is_some_and(|last| last.is_cut)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Last>> {
        self.0.lock().expect("no holder panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_cut_off_from_when_a_lane_breaks_until_it_is_heard_again() {
        let (heard, peer) = (Heard::default(), NodeId(2));
        heard.note_cut(peer);
        assert!(!heard.is_cut(peer), "it was never heard of");
        heard.note(peer);
        assert!(!heard.is_cut(peer));
        heard.note_cut(peer);
        assert!(heard.is_cut(peer) && heard.last(peer).is_some() && !heard.is_cut(NodeId(3)));
        heard.note(peer);
        assert!(!heard.is_cut(peer));
    }
}
