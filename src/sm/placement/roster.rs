//! Which nodes a view is to have: those wanted, known by their data directories, and those on their
//! way out.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::PlacementError;
use super::sizes::check_nodes;
use crate::sm::cluster::view::{NodeSpec, View};
use crate::types::NodeId;

/// Makes the nodes of `next` the wanted ones and those that leave, and returns the leaving ones
/// that are lost: another data directory is wanted under the address of each.
///
/// A node that the view knows keeps its id and is called as the view calls it; others get ids in
/// the order of their addresses.
pub fn add_nodes(next: &mut View, wanted: &[NodeSpec]) -> Result<BTreeSet<NodeId>, PlacementError> {
    check_nodes(wanted)?;

    // By its directory: an address may have changed, or be another node's by now.
    let known_id = |node: &NodeSpec| {
        next.nodes
            .iter()
            .find(|(_, known)| known.directory == node.directory)
            .map(|(id, _)| *id)
    };
    let mut staying: BTreeSet<NodeId> = wanted.iter().filter_map(known_id).collect();
    let mut newcomers: Vec<&NodeSpec> = wanted
        .iter()
        .filter(|node| known_id(node).is_none())
        .collect();

    // The order in which nodes were named must not decide about their ids.
    newcomers.sort_by(|a, b| a.address.cmp(&b.address));
    for node in newcomers {
        staying.insert(next.next_node);
        next.nodes.insert(next.next_node, node.clone());
        next.next_node.0 += 1;
    }

    // Those that are not wanted stay in the view until their last replica is retired.
    next.leaving = next
        .nodes
        .keys()
        .filter(|id| !staying.contains(id))
        .copied()
        .collect();

    // A known node is called as the view calls it, which may be what a newcomer is called too.
    let mut addresses = BTreeSet::new();
    if let Some((_, node)) = next
        .staying()
        .find(|(_, node)| !addresses.insert(&node.address))
    {
        return Err(PlacementError::DuplicateAddress(node.address.clone()));
    }
    let is_lost = |id: &NodeId| {
        next.nodes
            .get(id)
            .is_some_and(|node| addresses.contains(&node.address))
    };
    Ok(next.leaving.iter().copied().filter(is_lost).collect())
}

/// The nodes that are given work: those that stay and are not out of reach; and of the others,
/// those with most replicas first, as many as it takes to be `needed`.
pub fn working_nodes(next: &View, out: &BTreeSet<NodeId>, needed: usize) -> BTreeSet<NodeId> {
    let replicas = |id: NodeId| {
        next.shards()
            .filter(|(_, group)| group.replicas.values().any(|node| *node == id))
            .count()
    };
    let (resting, here): (Vec<NodeId>, Vec<NodeId>) = next
        .staying()
        .map(|(id, _)| id)
        .partition(|id| out.contains(id));

    // A node that has many replicas already has the fewest to be made anew when it comes back.
    let mut working: BTreeSet<NodeId> = here.into_iter().collect();
    let mut resting: Vec<(Reverse<usize>, NodeId)> = resting
        .into_iter()
        .map(|id| (Reverse(replicas(id)), id))
        .collect();
    resting.sort();
    let missing = needed.saturating_sub(working.len());
    working.extend(resting.into_iter().take(missing).map(|(_, id)| id));
    working
}
