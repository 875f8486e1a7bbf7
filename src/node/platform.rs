//! [`Platform`]: what a node stands on. The real one is [`RealPlatform`]; a simulated one lets a
//! test end a node at any step of a view change, and start it again from what its disk had kept by
//! then.

use std::path::Path;
use std::sync::Arc;

use futures::future::{BoxFuture, ready};

use crate::raft::transport::Dial;
use crate::raft::transport::lanes::http::HttpDial;
use crate::routing::call::ShardCaller;
use crate::routing::peer_caller::PeerCaller;
use crate::routing::transport::SetUpError;
use crate::sm::cluster::membership;
use crate::sm::moves::{self, Move};
use crate::storage::directory::{DataDirectory, DirectoryError};
use crate::storage::disk::{Disk, RealDisk};
use crate::storage::sled_tree::{SledError, SledOptions, SledTrees, is_there};
use crate::storage::tree::Trees;
use crate::supervisor::Supervisor;
use crate::types::GroupId;

/// Disk and database of a node, and who watches it change the view.
pub trait Platform: Send + Sync + 'static {
    /// Opens the data directory, for this node alone.
    fn open_directory(&self, path: &Path) -> Result<DataDirectory, DirectoryError>;

    /// Returns the disk of the log and the snapshot files.
    fn disk(&self) -> Arc<dyn Disk>;

    /// Opens the map database. `is_expected`: there were replicas, so it should be there.
    fn open_trees(
        &self,
        path: &Path,
        options: SledOptions,
        is_expected: bool,
    ) -> Result<Arc<dyn Trees>, SledError>;

    /// Returns what calls other nodes.
    ///
    /// # Errors
    ///
    /// When the HTTP client can't be set up.
    fn peer_caller(&self) -> Result<PeerCaller, SetUpError> {
        PeerCaller::new()
    }

    /// Returns what calls the leaders of shards.
    ///
    /// # Errors
    ///
    /// When the HTTP client can't be set up.
    fn shard_caller(&self) -> Result<ShardCaller, SetUpError> {
        ShardCaller::new()
    }

    /// Returns what opens lanes to other nodes.
    fn dial(&self) -> Arc<dyn Dial> {
        Arc::new(HttpDial)
    }

    /// Returns the supervisor, which is told when a part of the node panics or hangs.
    fn supervisor(&self) -> Supervisor;

    /// Told of each step of a view change that this node has taken; the next one waits for the end
    /// of what this returns.
    fn stepped(&self, _step: Stepped<'_>) -> BoxFuture<'static, ()> {
        Box::pin(ready(()))
    }
}

/// A step that a leader has taken.
#[derive(Debug, Clone, Copy)]
pub enum Stepped<'a> {
    /// Towards the members that the view wants.
    Members {
        group: GroupId,
        step: &'a membership::MembershipStep,
    },
    /// A move was opened.
    Opened { from: GroupId, to: GroupId },
    /// Of a move that is open.
    Moved {
        slot_move: &'a Move,
        step: &'a moves::MoveStep,
    },
    /// Some of what moves have left over was deleted.
    Cleared { shard: GroupId },
}

/// The machine that this process runs on.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealPlatform;

impl Platform for RealPlatform {
    fn open_directory(&self, path: &Path) -> Result<DataDirectory, DirectoryError> {
        DataDirectory::open(path)
    }

    fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(RealDisk)
    }

    fn supervisor(&self) -> Supervisor {
        Supervisor::of_the_process()
    }

    fn open_trees(
        &self,
        path: &Path,
        options: SledOptions,
        is_expected: bool,
    ) -> Result<Arc<dyn Trees>, SledError> {
        if is_expected && !is_there(path) {
            tracing::warn!(
                "the map database {} is missing: every map is rebuilt from its snapshot and the \
                log",
                path.display()
            );
        }
        Ok(Arc::new(SledTrees::open(path, &options)?))
    }
}
