//! How many: shards, replicas, voters. And whether there are nodes enough for it.

use std::collections::BTreeSet;

use super::{PlacementError, REPLICATION_FACTOR_MAX};
use crate::sm::cluster::view::{Layout, NodeSpec, PlacementSpec};
use crate::types::SLOTS;

/// Replicas of a shard where no number is asked for and there are nodes enough.
const REPLICATION_FACTOR_DEFAULT: usize = 3;

/// Most voters of the meta group: five survive the loss of two, and more would only make its writes
/// slower.
const META_VOTERS_MAX: usize = 5;

/// The sizes that a [`PlacementSpec`] comes to with a number of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Replicas of each shard; in the exclusive layout the least of them.
    pub factor: usize,
    pub shards: usize,
    /// Nodes without which it can't be had.
    pub needed: usize,
}

impl Sizes {
    pub fn for_nodes(nodes: usize, spec: PlacementSpec) -> Result<Self, PlacementError> {
        let factor = replication_factor(nodes, spec)?;
        let (shards, needed) = match spec.layout {
            Layout::Spread => (shard_count(spec, nodes)?, factor),
            Layout::Exclusive => {
                let shards = shard_count(spec, nodes / factor)?;
                (shards, shards * factor)
            }
        };
        if needed > nodes {
            Err(PlacementError::TooFewNodes { needed, nodes })
        } else {
            Ok(Self {
                factor,
                shards,
                needed,
            })
        }
    }
}

/// The number of replicas asked for, or the default for this many nodes.
fn replication_factor(nodes: usize, spec: PlacementSpec) -> Result<usize, PlacementError> {
    match spec.replication_factor {
        None => Ok(nodes.min(REPLICATION_FACTOR_DEFAULT)),
        Some(factor) if (1..=REPLICATION_FACTOR_MAX).contains(&factor) => Ok(usize::from(factor)),
        Some(factor) => Err(PlacementError::ReplicationFactorOutOfRange(factor)),
    }
}

/// The number of shards asked for, or `default`.
fn shard_count(spec: PlacementSpec, default: usize) -> Result<usize, PlacementError> {
    match spec.shards {
        None => Ok(default.clamp(1, usize::from(SLOTS))),
        Some(count) if (1..=SLOTS).contains(&count) => Ok(usize::from(count)),
        Some(count) => Err(PlacementError::ShardsOutOfRange(count)),
    }
}

/// Returns how many of `nodes` vote in the meta group: an odd number, since one more adds a copy to
/// wait for without surviving another loss. Two nodes are the exception, and both vote: if a lone
/// voter lost its disk, acknowledged entries would be lost.
pub fn meta_voters(nodes: usize) -> usize {
    match nodes.min(META_VOTERS_MAX) {
        2 => 2,
        even if even % 2 == 0 => even - 1,
        odd => odd,
    }
}

/// Voters of a shard with `size` replicas of which `factor` were asked for: all, but never more
/// than [`REPLICATION_FACTOR_MAX`], and of an even number with one left over the odd one below,
/// which survives as many losses.
pub fn exclusive_voters(size: usize, factor: usize) -> usize {
    let odd = if size > factor && size.is_multiple_of(2) {
        size - 1
    } else {
        size
    };
    odd.min(usize::from(REPLICATION_FACTOR_MAX))
}

/// That there are nodes, and none of them twice.
pub fn check_nodes(nodes: &[NodeSpec]) -> Result<(), PlacementError> {
    if nodes.is_empty() {
        return Err(PlacementError::NoNodes);
    }
    let (mut addresses, mut directories) = (BTreeSet::new(), BTreeSet::new());
    for node in nodes {
        if !addresses.insert(&node.address) {
            return Err(PlacementError::DuplicateAddress(node.address.clone()));
        }
        if !directories.insert(node.directory) {
            return Err(PlacementError::DuplicateDirectory(node.directory));
        }
    }
    Ok(())
}
