//! [`Heard`]: when each peer was last heard of, on any lane and from either side.

use std::collections::HashMap;
use std::sync::Mutex;

use tokio::time::Instant;

use crate::types::NodeId;

/// Bounded by the number of nodes that proved to be of our cluster.
#[derive(Debug, Default)]
pub struct Heard(Mutex<HashMap<NodeId, Instant>>);

impl Heard {
    pub fn note(&self, node: NodeId) {
        self.0.lock().expect("no holder panics").insert(node, Instant::now());
    }

    pub fn last(&self, node: NodeId) -> Option<Instant> {
        self.0.lock().expect("no holder panics").get(&node).copied()
    }
}
