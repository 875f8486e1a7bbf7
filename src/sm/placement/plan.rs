//! [`plan`]: the view that is to follow another.

use std::collections::BTreeSet;

use super::sizes::{Sizes, meta_voters};
use super::{PlacementError, roster, shards, targets, witnesses};
use crate::sm::cluster::view::{NodeSpec, PlacementSpec, View};
use crate::types::{GroupId, NodeId, ReplicaId};

/// The view that is to follow another, as `MetaCommand::InstallPlan` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub view: View,
    /// It differs from the one before in its numbers alone: there is nothing to install.
    pub is_same: bool,
}

/// The view that follows `view` when `asked` is asked for on the `wanted` nodes, with the fewest
/// changes.
///
/// Nodes are known by their data directories; one that the view knows stays as the view has it,
/// whatever address it is given here, and one that is not wanted leaves. `out` are the nodes of the
/// view that are out of reach for good: they get no replicas if there are others enough, and no
/// vote in the meta group. A shard that is to end keeps its replicas, but for those on nodes that
/// are `out` or lost.
///
/// # Errors
///
/// Why it can't be done.
pub fn plan(
    view: &View,
    spec: PlacementSpec,
    wanted: &[NodeSpec],
    out: &BTreeSet<NodeId>,
) -> Result<Planned, PlacementError> {
    let mut next = view.clone();
    next.placement = spec;
    let lost = roster::add_nodes(&mut next, wanted)?;
    let sizes = Sizes::for_nodes(next.staying().count(), spec)?;
    let working = roster::working_nodes(&next, out, sizes.needed);
    next.evicted = next
        .staying()
        .map(|(id, _)| id)
        .filter(|id| !working.contains(id))
        .collect();

    // Replicas before homes and witnesses: both are chosen among, or around, the replicas.
    let staying = shards::choose_shards(&mut next, sizes.shards, &working);
    shards::assign_replicas(&mut next, &staying, sizes, &working);
    shards::settle_homes(view, &mut next, &staying, &working);
    let dead: BTreeSet<NodeId> = out
        .union(&lost)
        .filter(|id| !working.contains(id))
        .copied()
        .collect();
    witnesses::retire_dead_witnesses(&mut next, &dead);
    shards::replace_dead_replicas(&mut next, &dead, &working);
    witnesses::assign_witnesses(&mut next, &staying, &working);
    place_meta_replicas(&mut next, &working);
    next.targets = targets::even_targets(&next, &staying);

    // Compared before the numbers are raised, which every plan does.
    let is_same = next == *view;
    next.epoch.0 += 1;
    next.version.0 += 1;
    debug_assert_eq!(next.check(), Ok(()), "a plan is a sound view");
    Ok(Planned {
        view: next,
        is_same,
    })
}

/// Every node that stays has a replica of the meta group, and one that leaves keeps its own until
/// the last of its others is retired. Up to five of those at work vote, rather those that do.
fn place_meta_replicas(next: &mut View, working: &BTreeSet<NodeId>) {
    let staying: Vec<NodeId> = next.staying().map(|(id, _)| id).collect();
    let Some(meta) = next.groups.get_mut(&GroupId::META) else {
        return;
    };
    let voted = meta.voters();
    let meta_hosts: BTreeSet<NodeId> = meta.replicas.values().copied().collect();
    for node in staying
        .into_iter()
        .filter(|node| !meta_hosts.contains(node))
    {
        meta.add_replica_on(node, &mut next.next_replica);
    }

    // Those that vote already come first: a plan that changes nothing must move no vote.
    let mut able: Vec<ReplicaId> = meta
        .replicas
        .iter()
        .filter(|(_, node)| working.contains(node))
        .map(|(id, _)| *id)
        .collect();
    able.sort_by_key(|replica| (!voted.contains(replica), *replica));
    able.truncate(meta_voters(able.len()));
    meta.learners = meta
        .replicas
        .keys()
        .filter(|replica| !able.contains(replica))
        .copied()
        .collect();
    let homes: Vec<NodeId> = able
        .iter()
        .filter_map(|replica| meta.replicas.get(replica))
        .copied()
        .collect();
    if !homes.contains(&meta.home) {
        meta.home = homes.first().copied().unwrap_or(meta.home);
    }
}
