//! Which shards are to have a witness, and where.
//!
//! One with an even number of voters has one, if a node that is at work has no replica of it: that
//! many voters and a witness survive the loss of half of them, not only of fewer. Witnesses are
//! dealt out evenly, by themselves: they cost a log and little else.

use std::collections::BTreeSet;

use super::even::{BinTaker, assign};
use super::shards::{AWKWARD, CHANGE, STAY};
use crate::sm::cluster::view::{GroupSpec, View, WitnessSpec};
use crate::types::{GroupId, NodeId};

/// Gives each of the shards its witness, or none. One that is there stays if it may, and where that
/// is even.
pub fn assign_witnesses(next: &mut View, shards: &BTreeSet<GroupId>, working: &BTreeSet<NodeId>) {
    let nodes: Vec<NodeId> = working.iter().copied().collect();
    let (mut ids, mut items) = (Vec::new(), Vec::new());
    for id in shards {
        let Some(group) = next.groups.get(id) else {
            continue;
        };
        let costs: Vec<Option<i64>> = nodes.iter().map(|node| cost(group, *node)).collect();
        if group.voters().len().is_multiple_of(2) && costs.iter().any(Option::is_some) {
            ids.push(*id);
            items.push(BinTaker { takes: 1, costs });
        }
    }

    // Shards that need none are listed too: their old witness has to go.
    let mut places: Vec<(GroupId, Option<NodeId>)> = shards
        .iter()
        .filter(|id| !ids.contains(id))
        .map(|id| (*id, None))
        .collect();
    let assignment = assign(&items, nodes.len());
    places.extend(
        ids.into_iter()
            .zip(assignment)
            .map(|(id, taken)| (id, taken.first().map(|index| nodes[*index]))),
    );
    places.sort();
    for (id, node) in places {
        set_witness(next, id, node);
    }
}

/// Returns the cost of a witness on a node; None where it may not be.
fn cost(group: &GroupSpec, node: NodeId) -> Option<i64> {
    let is_taken = group.replicas.values().any(|at| *at == node);
    let stays = group.witness.is_some_and(|witness| witness.node == node);
    let leaves = group.leaving.values().any(|at| *at == node);
    match (is_taken, stays, leaves) {
        (true, _, _) => None,
        (false, true, _) => Some(STAY),
        (false, false, true) => Some(AWKWARD),
        (false, false, false) => Some(CHANGE),
    }
}

/// Has the witness of a group be on this node, or there be none.
fn set_witness(next: &mut View, id: GroupId, node: Option<NodeId>) {
    let Some(group) = next.groups.get_mut(&id) else {
        return;
    };
    if group.witness.map(|witness| witness.node) == node {
        return;
    }

    // A witness keeps its node for life: on another node it is a new replica, under a new id.
    retire_witness(group);
    if let Some(node) = node {
        group.witness = Some(WitnessSpec {
            replica: next.next_replica,
            node,
        });
        next.next_replica.0 += 1;
    }
}

/// Takes the witnesses from the shards that end whose nodes are dead: those last only until their
/// slots have moved.
pub fn retire_dead_witnesses(next: &mut View, dead: &BTreeSet<NodeId>) {
    for group in next.groups.values_mut().filter(|group| group.draining) {
        if group
            .witness
            .is_some_and(|witness| dead.contains(&witness.node))
        {
            retire_witness(group);
        }
    }
}

fn retire_witness(group: &mut GroupSpec) {
    let old_witness = group.witness.take();
    group
        .leaving
        .extend(old_witness.map(|witness| (witness.replica, witness.node)));
}
