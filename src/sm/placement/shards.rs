//! Which shards there are to be, which nodes have their replicas, and where they are at home.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::even::{BinTaker, assign};
use super::sizes::{Sizes, exclusive_voters};
use crate::sm::cluster::view::{GroupSpec, Layout, View};
use crate::types::{GroupId, NodeId, ReplicaId, SLOTS, Slot};

/// Cost of putting something where it is not: more than all finer costs below can add up to.
pub(super) const CHANGE: i64 = 1 << 16;
/// A replica that is still on its way out is called back: cheaper than a new one.
const CALL_BACK: i64 = CHANGE - 1;
/// A new replica where one of its group is still on its way out and can't be called back, or its
/// witness is; a home whose replica is new.
pub(super) const AWKWARD: i64 = CHANGE + 1;
/// Cost of staying: for what is there already, and for a replica at home, which should stay rather
/// than others.
pub(super) const STAY: i64 = 0;
const STAY_HOME: i64 = -1;

/// Has as many shards stay as are wanted: those too many are to end, those that are missing get
/// ids. Returns which stay or begin.
///
/// Those end whose slots, times the replicas of them that could have stayed, are fewest; then those
/// that are at home nowhere any more, then the youngest.
pub fn choose_shards(
    next: &mut View,
    count: usize,
    working: &BTreeSet<NodeId>,
) -> BTreeSet<GroupId> {
    let mut slots: BTreeMap<GroupId, usize> = BTreeMap::new();
    for slot in Slot::all() {
        *slots.entry(next.slots.owner(slot)).or_default() += 1;
    }
    let share = usize::from(SLOTS) / next.shards().count().max(1);
    let worth = |(id, group): (GroupId, &GroupSpec)| {
        let kept = group
            .replicas
            .values()
            .filter(|node| working.contains(node))
            .count();
        // What some own above an even share is chance, and not worth a home.
        let owned = slots.get(&id).copied().unwrap_or(0).min(share);
        (
            Reverse(owned * kept),
            Reverse(working.contains(&group.home)),
            Reverse(kept),
            id,
        )
    };
    let mut present: Vec<_> = next
        .shards()
        .filter(|(_, group)| !group.draining)
        .map(worth)
        .collect();
    present.sort();
    let mut chosen: BTreeSet<GroupId> = present.iter().take(count).map(|(.., id)| *id).collect();

    // It goes only with its last slot, which has to move away first.
    for (.., id) in present.iter().skip(count) {
        if let Some(group) = next.groups.get_mut(id) {
            group.draining = true;
        }
    }
    while chosen.len() < count {
        chosen.insert(next.next_group);
        next.next_group.0 += 1;
    }
    chosen
}

/// Gives each of the shards its replicas and voters. Homes are left where they were, if they can
/// be.
pub fn assign_replicas(
    next: &mut View,
    shards: &BTreeSet<GroupId>,
    sizes: Sizes,
    working: &BTreeSet<NodeId>,
) {
    let nodes: Vec<NodeId> = working.iter().copied().collect();
    let ids: Vec<GroupId> = shards.iter().copied().collect();

    // What is there already is cheapest, so that a plan makes the fewest changes.
    let standing: Vec<BTreeMap<NodeId, i64>> = ids
        .iter()
        .map(|id| next.groups.get(id).map(placement_costs).unwrap_or_default())
        .collect();
    let cost = |shard: usize, node: usize| {
        Some(standing[shard].get(&nodes[node]).copied().unwrap_or(CHANGE))
    };
    let mut members: BTreeMap<GroupId, BTreeSet<NodeId>> = BTreeMap::new();

    // One call deals out all shards at once: dealt one by one, the nodes could not be filled
    // evenly.
    match next.placement.layout {
        Layout::Spread => {
            let costs = |shard| (0..nodes.len()).map(|node| cost(shard, node)).collect();
            let items: Vec<BinTaker> = (0..ids.len())
                .map(|shard| BinTaker {
                    takes: sizes.factor,
                    costs: costs(shard),
                })
                .collect();
            for (id, taken) in ids.iter().zip(assign(&items, nodes.len())) {
                members.insert(*id, taken.into_iter().map(|index| nodes[index]).collect());
            }
        }
        Layout::Exclusive => {
            let costs = |node| (0..ids.len()).map(|shard| cost(shard, node)).collect();
            let items: Vec<BinTaker> = (0..nodes.len())
                .map(|node| BinTaker {
                    takes: 1,
                    costs: costs(node),
                })
                .collect();
            for (node, taken) in nodes.iter().zip(assign(&items, ids.len())) {
                members.entry(ids[taken[0]]).or_default().insert(*node);
            }
        }
    }
    for (id, nodes) in members {
        let voters = match next.placement.layout {
            Layout::Spread => nodes.len(),
            Layout::Exclusive => exclusive_voters(nodes.len(), sizes.factor),
        };
        seat(next, id, &nodes, voters);
    }
}

/// Returns the cost of a replica of the group on nodes where it has, or had, one; elsewhere the
/// cost is a [`CHANGE`].
fn placement_costs(group: &GroupSpec) -> BTreeMap<NodeId, i64> {
    let stay = |node: &NodeId| if group.home == *node { STAY_HOME } else { STAY };
    let cost = |replica: &ReplicaId| {
        if group.can_return(*replica) {
            CALL_BACK
        } else {
            AWKWARD
        }
    };
    let leaving = group
        .leaving
        .iter()
        .map(|(replica, node)| (*node, cost(replica)));

    // Of a node that is named twice the later entry counts: a replica that stays is the cheapest.
    let leaving = leaving.chain(group.witness.map(|witness| (witness.node, AWKWARD)));
    leaving
        .chain(group.replicas.values().map(|node| (*node, stay(node))))
        .collect()
}

/// Has the group `id` consist of one replica on each of these nodes, of which so many vote: rather
/// those that did, the home's first.
fn seat(next: &mut View, id: GroupId, nodes: &BTreeSet<NodeId>, voters: usize) {
    let Some(group) = next.groups.get_mut(&id) else {
        // A new group: what it begins with is its creation record, which never changes.
        let replicas: BTreeMap<ReplicaId, NodeId> = (next.next_replica.0..)
            .map(ReplicaId)
            .zip(nodes.iter().copied())
            .collect();
        next.next_replica.0 += replicas.len() as u64;
        let voters = replicas.keys().take(voters).copied().collect();
        let home = nodes.first().copied().unwrap_or_default();
        next.groups
            .insert(id, GroupSpec::new(home, replicas, &voters));
        return;
    };
    let voted = group.voters();

    // Those that go may still vote: they are on their way out until a report retires them.
    let (kept, leaving) = std::mem::take(&mut group.replicas)
        .into_iter()
        .partition(|(_, node)| nodes.contains(node));
    group.replicas = kept;
    let leaving: BTreeMap<ReplicaId, NodeId> = leaving;
    group.leaving.extend(leaving);
    let hosts: BTreeSet<NodeId> = group.replicas.values().copied().collect();
    for node in nodes.difference(&hosts) {
        group.add_replica_on(*node, &mut next.next_replica);
    }

    // Who votes already goes on voting: each exchange of a voter is a change of membership.
    let mut ranked: Vec<ReplicaId> = group.replicas.keys().copied().collect();
    ranked.sort_by_key(|replica| {
        let votes = voted.contains(replica);
        (
            !(votes && group.replicas.get(replica) == Some(&group.home)),
            !votes,
            *replica,
        )
    });
    group.learners = ranked.into_iter().skip(voters).collect();
    move_home(group);
}

/// Has the home be a node of a voter.
fn move_home(group: &mut GroupSpec) {
    let voters = group.voters();
    let mut at = group
        .replicas
        .iter()
        .filter(|(replica, _)| voters.contains(replica))
        .map(|(_, node)| *node);
    if !at.clone().any(|node| node == group.home) {
        group.home = at.next().unwrap_or(group.home);
    }
}

/// Spreads the homes of the shards over the nodes. `before` is the view that is planned from.
pub fn settle_homes(
    before: &View,
    next: &mut View,
    shards: &BTreeSet<GroupId>,
    working: &BTreeSet<NodeId>,
) {
    let nodes: Vec<NodeId> = working.iter().copied().collect();
    let costs = |id: &GroupId| {
        let (now, was) = (next.groups.get(id), before.groups.get(id));

        // Only a voter can lead, so only its node can be a home.
        let voters = now.iter().flat_map(|group| {
            group
                .replicas
                .iter()
                .filter(|(replica, _)| !group.learners.contains(replica))
        });
        let cost = |replica: &ReplicaId, node: &NodeId| match was {
            Some(was) if was.home == *node => STAY,
            // A replica that is new has to be filled before it can lead.
            Some(was) if !was.replicas.contains_key(replica) => AWKWARD,
            Some(_) | None => CHANGE,
        };
        let by_node: BTreeMap<NodeId, i64> = voters
            .map(|(replica, node)| (*node, cost(replica, node)))
            .collect();
        nodes
            .iter()
            .map(|node| by_node.get(node).copied())
            .collect()
    };
    let items: Vec<BinTaker> = shards
        .iter()
        .map(|id| BinTaker {
            takes: 1,
            costs: costs(id),
        })
        .collect();
    for (id, taken) in shards.iter().zip(assign(&items, nodes.len())) {
        if let (Some(group), Some(index)) = (next.groups.get_mut(id), taken.first()) {
            group.home = nodes[*index];
        }
    }
}

/// Gives others the replicas that `dead` nodes have of shards that end: they serve until their last
/// slot has moved away. What is on a node that only leaves stays there so long.
pub fn replace_dead_replicas(next: &mut View, dead: &BTreeSet<NodeId>, working: &BTreeSet<NodeId>) {
    let mut loads: BTreeMap<NodeId, usize> = working.iter().map(|node| (*node, 0)).collect();
    for (_, node) in next.shards().flat_map(|(_, group)| group.hosted()) {
        loads.entry(node).and_modify(|load| *load += 1);
    }
    for group in next.groups.values_mut().filter(|group| group.draining) {
        let lost: Vec<(ReplicaId, NodeId)> = group
            .replicas
            .iter()
            .filter(|(_, node)| dead.contains(node))
            .map(|(replica, node)| (*replica, *node))
            .collect();
        for (replica, node) in lost {
            // One on its way out is in the way as well: a node runs one replica of a group at a
            // time.
            let hosts: BTreeSet<NodeId> = group.hosted().map(|(_, node)| node).collect();
            let free = loads
                .iter_mut()
                .filter(|(node, _)| !hosts.contains(node))
                .min_by_key(|(node, load)| (**load, **node));
            let Some((by, load)) = free else { break };
            *load += 1;

            // Under a new id: what the dead node has under the old one may come back.
            group.replicas.remove(&replica);
            group.leaving.insert(replica, node);
            group.replicas.insert(next.next_replica, *by);
            if group.learners.remove(&replica) {
                group.learners.insert(next.next_replica);
            }
            next.next_replica.0 += 1;
        }

        // The home may have been a dead node.
        move_home(group);
    }
}
