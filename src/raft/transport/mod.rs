//! The transport between replicas: frames, the lanes that carry them, and openraft's network on
//! top. This file is the seam to the byte streams below.
//!
//! [`Dial`] opens a stream of bytes each way to a peer: over HTTP/2 (`lanes::http`) or within the
//! process (`lanes::memory`, for tests and simulation). [`Resolver`] finds a node's address in the
//! newest view. [`NodeIdentity`] is who we are. What flows over the streams is left to `lanes`.

mod append_stream;
pub mod lanes;
pub(super) mod network;
pub(super) mod peer_client;
mod request_handler;
pub(super) mod snapshot_sender;
pub(super) mod snapshot_transfers;
pub(super) mod snapshots;
pub(super) mod wire;

use parking_lot::RwLock;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

#[cfg(test)]
pub(super) use self::request_handler::follows;
use crate::raft::transport::lanes::PeerDirectories;
use crate::raft::transport::wire::{PeerRefusal, WireError};
use crate::types::{Address, ClusterId, DirectoryId, NodeId};

/// The kinds of traffic that must not queue behind one another: each lane is a connection of its
/// own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Entries, votes, and leadership transfers.
    Log,
    /// Heartbeats of all groups, which also confirm reads.
    Heartbeat,
    /// Snapshots, which are large.
    Snapshot,
}

impl Lane {
    pub const ALL: [Lane; 3] = [Lane::Log, Lane::Heartbeat, Lane::Snapshot];

    /// Returns its name in the path `POST /peer/lane/{lane}`.
    pub fn name(self) -> &'static str {
        match self {
            Lane::Log => "log",
            Lane::Heartbeat => "heartbeat",
            Lane::Snapshot => "snapshot",
        }
    }

    /// Returns the lane of this name.
    pub fn from_name(name: &str) -> Option<Lane> {
        Lane::ALL.into_iter().find(|lane| lane.name() == name)
    }
}

/// The address of a peer, and the data directory that must be found there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub address: Address,
    pub directory: DirectoryId,
}

/// Resolves nodes to addresses. Asked for every frame, so it must be quick.
pub trait Resolver: Send + Sync + 'static {
    /// Returns the address of a node; None if the newest view known here has no such node.
    fn resolve(&self, node: NodeId) -> Option<Peer>;

    /// Returns the level of that view, which decides what leaders may propose.
    fn level(&self) -> u16;
}

/// The bytes that come in over a lane. An error ends it.
pub type Incoming = BoxStream<'static, Result<Bytes, LaneError>>;
/// The bytes that go out over a lane.
pub type Outgoing = BoxStream<'static, Bytes>;

/// Opens lanes.
pub trait Dial: Send + Sync + 'static {
    /// Opens a lane: sends `outgoing` to the peer, and returns what the peer sends back. The caller
    /// bounds the time.
    fn dial(
        &self,
        to: NodeId,
        peer: Peer,
        lane: Lane,
        outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<Incoming, LaneError>>;
}

/// The reason why a frame got no reply. It may have arrived, except after `Refused`, `Unresolved`
/// and `Down`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    #[error("no address is known of {0}")]
    Unresolved(NodeId),
    /// The peer could not be reached a moment ago.
    #[error("out of reach: {0}")]
    Down(String),
    #[error("refused: {0}")]
    Refused(PeerRefusal),
    #[error("more than {0} bytes wait for the peer already")]
    Full(usize),
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("no reply within {0:?}")]
    Late(Duration),
    #[error(transparent)]
    Unreadable(#[from] WireError),
    #[error("it is shutting down")]
    Closed,
}

/// The identity of this node. It learns its cluster and its id once, when it founds or joins a
/// cluster.
#[derive(Debug)]
pub struct NodeIdentity {
    pub directory: DirectoryId,
    member: RwLock<Option<(ClusterId, NodeId)>>,
    /// None for a node that announces no starts, as programs of the first release.
    peer_directories: Option<Arc<PeerDirectories>>,
}

impl NodeIdentity {
    /// Returns the identity of a node that belongs to no cluster yet.
    pub fn new(directory: DirectoryId) -> Self {
        Self {
            directory,
            member: RwLock::new(None),
            peer_directories: None,
        }
    }

    /// Returns the identity of a node that belongs to a cluster.
    pub fn member(directory: DirectoryId, cluster: ClusterId, node: NodeId) -> Self {
        Self {
            directory,
            member: RwLock::new(Some((cluster, node))),
            peer_directories: None,
        }
    }

    /// Returns this identity, for a node that announces its starts and checks those of others.
    pub fn with_peer_directories(self, peer_directories: Arc<PeerDirectories>) -> Self {
        Self {
            peer_directories: Some(peer_directories),
            ..self
        }
    }

    /// Returns the starts that peers announced, if this node announces its own.
    pub fn peer_directories(&self) -> Option<&Arc<PeerDirectories>> {
        self.peer_directories.as_ref()
    }

    /// Binds the node to a cluster and an id.
    ///
    /// # Panics
    ///
    /// If it is bound to another cluster, or another id: a directory never changes either.
    pub fn join(&self, cluster: ClusterId, node: NodeId) {
        let mut member = self.member.write();
        assert!(
            member.is_none_or(|known| known == (cluster, node)),
            "a directory never changes its cluster or its node"
        );
        *member = Some((cluster, node));
    }

    /// Returns the cluster and the id of this node, once it has them.
    pub fn get(&self) -> Option<(ClusterId, NodeId)> {
        *self.member.read()
    }
}
