//! Reasons why a node does not start, or stops by itself: [`NodeError`] and [`StartError`].

use crate::config::ConfigError;
use crate::raft::OpenError;
use crate::routing::transport::SetUpError;
use crate::sm::level::TooOld;
use crate::sm::ports::StoreError;
use crate::storage::directory::DirectoryError;
use crate::storage::log::OpenLogError;
use crate::storage::sled_tree::SledError;

use super::bootstrap::NoStart;
use super::join::JoinError;

/// A reason why a node does not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("the HTTP client for peers can't be set up: {0}")]
    Client(#[source] SetUpError),
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    NoStart(#[from] NoStart),
    /// The process must be started again: the directory is that of a lost disk by then, and the
    /// node waits as a spare.
    #[error(
        "this data directory is an old copy: {reason}, so it lacks what its node has said since. \
         It counts as a lost disk: its replicas are put aside, and rebuilt from the others once \
         the cluster has noticed"
    )]
    Outdated { reason: String },
    /// People have to say which of the two is right.
    #[error(
        "another process runs with a copy of this data directory: {by} is in contact with it. Stop \
         that one first, or give this node an empty directory; it then joins as a new node"
    )]
    Doubled { by: String },
    /// Every group of the node has stopped: nothing is acknowledged any more.
    #[error(
        "the log has failed, so this node stops: {0}; what it acknowledged is kept. Free or mend \
        the disk, then start it again"
    )]
    LogFailed(String),
    /// The level of the cluster was raised past what this program knows.
    #[error(transparent)]
    TooOld(#[from] TooOld),
    /// The process must be started again: the damaged database is out of the way by then.
    #[error("the map database is damaged; it is set aside and rebuilt by a start of the process")]
    MapsDamaged,
    /// The process must be started again: it can write to the maps then.
    #[error("a replica has failed, and this process cannot write to the maps any more: {0}")]
    MapsFailed(String),
    /// The process must be started again: it waits as a spare then.
    #[error("this node is not in the view any more: it becomes a spare")]
    Retired,
}

impl NodeError {
    /// Returns whether a start of the process may well meet the same again.
    pub(super) fn may_come_back(&self) -> bool {
        matches!(
            self,
            NodeError::MapsDamaged
                | NodeError::MapsFailed(_)
                | NodeError::Start(StartError::Maps(SledError::Hangs { .. }))
        )
    }

    /// Returns true if starting the process again, and nothing else, mends it.
    pub fn wants_restart(&self) -> bool {
        matches!(
            self,
            NodeError::MapsDamaged
                | NodeError::MapsFailed(_)
                | NodeError::Retired
                | NodeError::Outdated { .. }
                | NodeError::Start(StartError::Maps(SledError::Hangs { .. }))
        )
    }
}

/// A reason why a node that knows where it belongs does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Log(#[from] OpenLogError),
    #[error(transparent)]
    Maps(#[from] SledError),
    #[error("the maps cannot be opened: {0}")]
    State(#[from] StoreError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("the view names no replica of the meta group for this node: its stamp is damaged")]
    NoMetaReplica,
    #[error("the replica of the meta group cannot be opened: {0}")]
    Meta(#[source] OpenError),
    #[error("the HTTP client can't be set up: {0}")]
    Client(String),
    #[error("a thread can't be started: {0}")]
    Thread(#[source] std::io::Error),
    #[error("opening the data directory was broken off: {0}")]
    BrokenOff(String),
}
