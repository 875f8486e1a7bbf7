//! What is durable: the shared log and the snapshot files; and the map of each replica, a memtable
//! over sled, which is rebuilt from them. Of a witness, which has no map, a file that says how far
//! its log was applied.

pub mod background;
pub mod directory;
pub mod disk;
#[cfg(test)]
pub(crate) mod fuzz;
pub mod log;
pub mod map;
#[cfg(any(test, feature = "testing"))]
pub mod mem_trees;
mod pieces;
pub mod sealed;
#[cfg(any(test, feature = "testing"))]
pub mod sim_disk;
mod sled_database;
pub mod sled_tree;
pub mod snapshot;
pub mod starts;
#[cfg(test)]
pub mod testing;
pub mod tree;
#[cfg(test)]
pub mod watched_disk;
pub mod witness;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::types::{GroupId, ReplicaId};

/// Keys every record, tree and snapshot file: a group that comes back to a node never meets the
/// data of an earlier replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReplicaKey {
    pub group: GroupId,
    pub replica: ReplicaId,
}

/// The result of reading something again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checked {
    Whole,
    /// Names the file or the replica, and says why.
    Damaged(String),
    /// It is not there any more, another has taken its place, or reading it was broken off.
    Unread,
}

/// Is told of bytes that were read, and rests. Returns whether to go on.
pub type ReadPace<'a> = dyn FnMut(u64) -> bool + Send + 'a;

impl ReplicaKey {
    /// Reads what [`fmt::Display`] wrote, and nothing else.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (group, replica) = text.strip_prefix('g')?.split_once("-r")?;
        let key = Self {
            group: GroupId(group.parse().ok()?),
            replica: ReplicaId(replica.parse().ok()?),
        };
        (key.to_string() == text).then_some(key)
    }
}

impl fmt::Display for ReplicaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.group, self.replica)
    }
}
