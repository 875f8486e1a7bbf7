//! Which shards there are, which node has a replica of what, where each shard is at home, and which
//! slots it owns.
//!
//! Pure and deterministic: the same asking and the same nodes give the same view, whatever the
//! order in which the nodes are listed. What is even is even to ±1: replicas per node, homes per
//! node, slots per shard; witnesses per node where that can be. No node has two replicas of one
//! group. [`first_view`] is the view with which a cluster is founded, [`plan`] the one that follows
//! another. A plan only says where everything is to come to; the way there (`membership`, `moves`)
//! is not planned, but found step by step.

mod even;
mod first;
mod plan;
mod roster;
mod shards;
mod sizes;
mod targets;
mod witnesses;

pub use first::first_view;
pub use plan::{Planned, plan};

use crate::types::{Address, DirectoryId, SLOTS};

/// Most replicas of a shard that can be asked for: seven voters survive the loss of three, and each
/// costs every write a copy.
pub const REPLICATION_FACTOR_MAX: u8 = 7;

/// The reason why no placement satisfies the request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    #[error("there are no nodes")]
    NoNodes,
    #[error("the address {0} is there twice")]
    DuplicateAddress(Address),
    #[error("the data directory {0} is there twice")]
    DuplicateDirectory(DirectoryId),
    #[error("the replication factor {0} is not from 1 to {REPLICATION_FACTOR_MAX}")]
    ReplicationFactorOutOfRange(u8),
    #[error("the number of shards {0} is not from 1 to {SLOTS}")]
    ShardsOutOfRange(u16),
    #[error("{needed} nodes are needed, there are {nodes}")]
    TooFewNodes { needed: usize, nodes: usize },
}

#[cfg(test)]
mod tests;
