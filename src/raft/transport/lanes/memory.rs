//! [`MemoryHub`]: lanes between registries of one process, for tests and simulation. Connections
//! between nodes can be cut and healed, and nodes removed.
//!
//! A lane in memory is the serving side's stream itself, polled by the caller's delivery task: the
//! same bytes as over HTTP, no sockets, and no task or clock of its own, so a seeded
//! single-threaded run is repeatable.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::serve_lane;
use crate::raft::registry::Registry;
use crate::raft::transport::{Dial, Incoming, Lane, LaneError, Outgoing, Peer, Resolver};
use crate::sm::level::LEVEL;
use crate::types::{Address, DirectoryId, NodeId};

/// The nodes of a process, and the connections between them that are cut.
pub struct MemoryHub {
    state: Mutex<HubState>,
    /// Counts the changes, for those that wait for one.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct HubState {
    nodes: BTreeMap<NodeId, (DirectoryId, Arc<Registry>)>,
    cut: BTreeSet<(NodeId, NodeId)>,
}

impl MemoryHub {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        })
    }

    /// Adds a node, in place of whatever had its id.
    pub fn add(&self, node: NodeId, registry: Arc<Registry>) {
        let directory = registry.identity().directory;
        self.change(|state| state.nodes.insert(node, (directory, registry)));
    }

    /// Removes a node; its lanes break.
    pub fn remove(&self, node: NodeId) {
        self.change(|state| state.nodes.remove(&node));
    }

    /// Breaks the lanes dialled by `from` to `to`, and refuses new ones.
    pub fn cut(&self, from: NodeId, to: NodeId) {
        self.change(|state| state.cut.insert((from, to)));
    }

    /// Cuts every connection between this node and the others.
    pub fn isolate(&self, node: NodeId) {
        self.change(|state| {
            let others: Vec<NodeId> = state
                .nodes
                .keys()
                .copied()
                .filter(|other| *other != node)
                .collect();
            state.cut.extend(
                others
                    .iter()
                    .flat_map(|other| [(node, *other), (*other, node)]),
            );
        });
    }

    /// Restores every connection.
    pub fn heal(&self) {
        self.change(|state| state.cut.clear());
    }

    /// Returns the dialer of `from`.
    pub fn dial_from(self: &Arc<Self>, from: NodeId) -> Arc<dyn Dial> {
        Arc::new(MemoryDial {
            hub: self.clone(),
            from,
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut HubState) -> T) {
        change(&mut self.state.lock());
        self.changed.send_modify(|epoch| *epoch += 1);
    }

    fn target(&self, from: NodeId, to: NodeId) -> Option<Arc<Registry>> {
        let state = self.state.lock();
        let open = !state.cut.contains(&(from, to));
        open.then(|| state.nodes.get(&to).map(|(_, registry)| registry.clone()))
            .flatten()
    }

    /// Returns when the connection to this very registry is no longer open.
    async fn broken(self: Arc<Self>, from: NodeId, to: NodeId, registry: Arc<Registry>) {
        let mut changed = self.changed.subscribe();
        while self
            .target(from, to)
            .is_some_and(|now| Arc::ptr_eq(&now, &registry))
        {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Resolver for MemoryHub {
    fn level(&self) -> u16 {
        LEVEL
    }

    fn resolve(&self, node: NodeId) -> Option<Peer> {
        let state = self.state.lock();
        let (directory, _) = state.nodes.get(&node)?;
        let address: Address = format!("node-{}:1", node.0)
            .parse()
            .expect("a valid address");
        Some(Peer {
            address,
            directory: *directory,
        })
    }
}

struct MemoryDial {
    hub: Arc<MemoryHub>,
    from: NodeId,
}

impl Dial for MemoryDial {
    fn dial(
        &self,
        to: NodeId,
        _peer: Peer,
        lane: Lane,
        outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<Incoming, LaneError>> {
        let (hub, from) = (self.hub.clone(), self.from);
        Box::pin(async move {
            let Some(registry) = hub.target(from, to) else {
                return Err(LaneError::Down("the way is cut".into()));
            };
            let replies =
                serve_lane(registry.clone(), lane, outgoing.map(Ok::<_, LaneError>)).map(Ok);
            Ok(Box::pin(replies.take_until(Box::pin(hub.broken(from, to, registry)))) as Incoming)
        })
    }
}
