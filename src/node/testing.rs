//! Helps to test the parts of a node: one without replicas, among nodes whose answers a test makes
//! up.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use tempfile::TempDir;

use super::context::NodeContext;
use super::join::Joining;
use super::platform::RealPlatform;
use super::views::Views;
use crate::api::protocol::ShardReply;
use crate::config::NodeConfig;
use crate::raft::transport::NodeIdentity;
use crate::raft::transport::lanes::memory::MemoryHub;
use crate::raft::{RaftBudgets, RaftTimings, Registry, RegistryParts};
use crate::routing::call::ShardCaller;
use crate::routing::peer_caller::PeerCaller;
use crate::routing::transport::{NodeCall, NodeReply, SendError, SendErrorKind, Transport};
use crate::sm::cluster::view::{NodeSpec, PlacementSpec, View};
use crate::sm::codec;
use crate::sm::placement::first_view;
use crate::storage::directory::DataDirectory;
use crate::storage::log::{Log, LogOptions, LogWriter};
use crate::storage::map::{Checkpointer, MapOptions, MapStore};
use crate::storage::mem_trees::MemTrees;
use crate::storage::sim_disk::SimDisk;
use crate::supervisor::Supervisor;
use crate::types::{Address, ClusterId, DirectoryId, GroupId, NodeId};

/// The answer to a call.
pub type Answer = BoxFuture<'static, Result<NodeReply, SendError>>;

/// Answers calls as a test says, and remembers them.
pub struct ScriptedTransport {
    script: Box<dyn Fn(&NodeCall) -> Answer + Send + Sync>,
    calls: Mutex<Vec<NodeCall>>,
}

impl ScriptedTransport {
    pub fn new(script: impl Fn(&NodeCall) -> Answer + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            script: Box::new(script),
            calls: Mutex::default(),
        })
    }

    /// Returns all calls, in their order.
    pub fn calls(&self) -> Vec<NodeCall> {
        self.calls.lock().clone()
    }

    /// Returns how many calls went to that node.
    pub fn calls_to(&self, address: &Address) -> usize {
        let calls = self.calls.lock();
        calls.iter().filter(|call| call.address == *address).count()
    }
}

impl fmt::Debug for ScriptedTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedTransport").finish_non_exhaustive()
    }
}

impl Transport for ScriptedTransport {
    fn send(&self, call: NodeCall) -> Answer {
        self.calls.lock().push(call.clone());
        let answer = tokio::time::timeout(call.timeout, (self.script)(&call));
        Box::pin(async move {
            let late = || SendError::new(SendErrorKind::Late, "no answer in time");
            answer.await.map_err(|_| late())?
        })
    }

    fn connects(&self, _: Address, _: Duration) -> BoxFuture<'static, bool> {
        Box::pin(ready(true))
    }
}

/// Nobody listens there.
pub fn refused() -> Answer {
    let error = SendError::new(SendErrorKind::NotConnected, "connection refused");
    Box::pin(ready(Err(error)))
}

/// Takes the request and says nothing.
pub fn silent() -> Answer {
    Box::pin(std::future::pending())
}

/// Answers so after a while.
pub fn reply_after(delay: Duration, reply: &ShardReply) -> Answer {
    let body = codec::encode(reply);
    Box::pin(async move {
        tokio::time::sleep(delay).await;
        Ok(http::Response::new(body).into())
    })
}

/// Answers with this status and body.
pub fn respond(status: u16, body: impl Into<Bytes>) -> Answer {
    let response = crate::client::testing::answer(status, body);
    Box::pin(ready(Ok(response.into())))
}

/// A node without replicas, whose calls a [`ScriptedTransport`] answers.
pub struct TestContext {
    pub context: Arc<NodeContext>,
    pub joining: Arc<Joining>,
    pub log: Log,
    pub states: Arc<MapStore>,
    // Kept, and not run: nothing is written.
    _threads: (LogWriter, Checkpointer),
    _directory: TempDir,
}

impl TestContext {
    /// Returns a node of a cluster of so many with one shard, of which it has no open replica.
    pub fn new(nodes: u8, transport: &Arc<ScriptedTransport>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let data = DataDirectory::open(&directory.path().join("data")).expect("a data directory");
        let view = view(nodes, data.id());
        let own = |(id, node): (&NodeId, &NodeSpec)| (node.directory == data.id()).then_some(*id);
        let node = view.nodes.iter().find_map(own).expect("this node");

        let peers = PeerCaller::over(transport.clone());
        let config = NodeConfig::for_tests(view.nodes[&node].address.clone());
        let joining = Joining::new(config, Arc::new(RealPlatform), data, peers.clone());
        let joining = Arc::new(joining);

        let disk = Arc::new(SimDisk::new(1));
        let (log, writer) =
            Log::open(disk.clone(), Path::new("/log"), LogOptions::default()).expect("a log");
        let trees = Arc::new(MemTrees::new());
        let (states, checkpointer) =
            MapStore::open(trees, disk, Path::new("/"), MapOptions::default()).expect("maps");
        let (states, views) = (Arc::new(states), Arc::new(Views::new(view.clone())));
        let registry = Registry::new(RegistryParts {
            identity: Arc::new(NodeIdentity::member(
                joining.directory_id(),
                view.cluster,
                node,
            )),
            resolver: views.clone(),
            dial: MemoryHub::new().dial_from(node),
            timings: RaftTimings::default(),
            log: log.clone(),
            states: states.clone(),
            budgets: RaftBudgets::default(),
            supervisor: Supervisor::noting().0,
        });
        let caller = ShardCaller::over(transport.clone(), 1000);
        let context = NodeContext::new(node, joining.clone(), views, registry, caller, peers);
        Self {
            context: Arc::new(context.expect("a node of the view")),
            joining,
            log,
            states,
            _threads: (writer, checkpointer),
            _directory: directory,
        }
    }

    /// Returns the nodes with a replica of a shard.
    pub fn replicas_of(&self, shard: GroupId) -> Vec<(NodeId, Address)> {
        let view = self.context.view();
        let group = view.groups.get(&shard).expect("a shard");
        group
            .hosted()
            .map(|(_, node)| (node, view.nodes[&node].address.clone()))
            .collect()
    }
}

/// Returns the first view of so many nodes, the last of which has this directory.
fn view(nodes: u8, last: DirectoryId) -> View {
    let node = |at: u8| NodeSpec {
        address: format!("10.0.0.{at}:1").parse().expect("an address"),
        public_address: None,
        directory: match at == nodes {
            true => last,
            false => DirectoryId(u128::from(at)),
        },
    };
    let asked = PlacementSpec::from_flags(Some(3), Some(1));
    first_view(ClusterId(7), asked, (1..=nodes).map(node).collect()).expect("a view")
}
