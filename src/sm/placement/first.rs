//! [`first_view`], with which a cluster is founded.

use std::collections::{BTreeMap, BTreeSet};

use super::sizes::{Sizes, check_nodes, exclusive_voters, meta_voters};
use super::{PlacementError, witnesses};
use crate::sm::cluster::view::{GroupSpec, Layout, NodeSpec, PlacementSpec, SlotTable, View};
use crate::types::{
    ClusterId, GroupId, MapVersion, MoveId, NodeId, PlanEpoch, ReplicaId, SLOTS, Slot,
};

/// The view with which a cluster begins: nodes are numbered from 1 in the order of their addresses,
/// shards and replicas from 1.
///
/// The meta group has a replica on every node; a shard's creation record names the replicas that
/// are voters from the start, which is all of them but where exclusive leaves an even number over.
/// A witness is none of those: it joins the group that has begun.
pub fn first_view(
    cluster: ClusterId,
    spec: PlacementSpec,
    mut nodes: Vec<NodeSpec>,
) -> Result<View, PlacementError> {
    // In order, so that ids depend on the set of nodes and not on how somebody wrote it.
    nodes.sort_by(|a, b| a.address.cmp(&b.address));
    check_nodes(&nodes)?;
    let sizes = Sizes::for_nodes(nodes.len(), spec)?;
    let shards = match spec.layout {
        Layout::Spread => spread(nodes.len(), sizes),
        Layout::Exclusive => exclusive(nodes.len(), sizes),
    };
    let meta = FirstMembers {
        nodes: (0..nodes.len()).collect(),
        home: 0,
        voters: meta_voters(nodes.len()),
    };
    let slots = even_slots(shards.len());

    // The meta group is group 0, so it comes before the shards.
    let mut next_replica = ReplicaId(1);
    let mut groups = BTreeMap::new();
    for (id, members) in (0..).map(GroupId).zip(std::iter::once(meta).chain(shards)) {
        groups.insert(id, members.into_group(&mut next_replica));
    }
    let next_group = GroupId(groups.len() as u64);
    let next_node = node_id(nodes.len());
    let nodes = nodes
        .into_iter()
        .enumerate()
        .map(|(index, node)| (node_id(index), node))
        .collect();
    let (epoch, version) = (PlanEpoch(1), MapVersion(1));
    let (leaving, out, moves) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    let (targets, next_move) = (slots.clone(), MoveId(1));
    let mut view = View {
        level: 0,
        cluster,
        epoch,
        version,
        placement: spec,
        nodes,
        leaving,
        evicted: out,
        groups,
        slots,
        targets,
        moves,
        next_node,
        next_group,
        next_replica,
        next_move,
    };

    // A witness goes where its group has no replica, so replicas are placed before it.
    let (shards, working) = (
        view.shards().map(|(id, _)| id).collect(),
        view.nodes.keys().copied().collect(),
    );
    witnesses::assign_witnesses(&mut view, &shards, &working);
    Ok(view)
}

/// The members of a group; nodes as positions in the sorted list.
struct FirstMembers {
    nodes: Vec<usize>,
    home: usize,
    /// Number of nodes, from the first, that vote from the start.
    voters: usize,
}

impl FirstMembers {
    fn into_group(self, next_replica: &mut ReplicaId) -> GroupSpec {
        let ids = next_replica.0..;
        let replicas: BTreeMap<ReplicaId, NodeId> = ids
            .map(ReplicaId)
            .zip(self.nodes.iter().map(|index| node_id(*index)))
            .collect();
        next_replica.0 += replicas.len() as u64;
        let voters = replicas.keys().take(self.voters).copied().collect();
        GroupSpec::new(node_id(self.home), replicas, &voters)
    }
}

fn node_id(index: usize) -> NodeId {
    NodeId(index as u64 + 1)
}

/// One shard per node at home on it, or as many as asked; replicas dealt out round and round like
/// cards, which is even to ±1.
///
/// The hand of shard k begins at node k·R mod N. That is a multiple of g = gcd(R, N), and the same
/// one again N/g shards later, so the home is the card whose place in the hand is the number of
/// such rounds, modulo g: any N shards in a row have N different homes.
fn spread(
    nodes: usize,
    Sizes {
        factor,
        shards: count,
        ..
    }: Sizes,
) -> Vec<FirstMembers> {
    let step = gcd(factor, nodes);
    let mut shards: Vec<FirstMembers> = (0..count)
        .map(|shard| {
            let hand: Vec<usize> = (0..factor)
                .map(|card| (shard * factor + card) % nodes)
                .collect();
            let home = hand[shard / (nodes / step) % step];
            FirstMembers {
                nodes: hand,
                home,
                voters: factor,
            }
        })
        .collect();
    // Shard k is at home on node k, and again after each N shards.
    for round in shards.chunks_mut(nodes) {
        round.sort_by_key(|members| members.home);
    }
    shards
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Each node in exactly one shard, in runs of the sorted list; those left over make some shards
/// larger.
fn exclusive(
    nodes: usize,
    Sizes {
        factor,
        shards: count,
        ..
    }: Sizes,
) -> Vec<FirstMembers> {
    let shards = (0..count).map(|shard| {
        let run = shard * nodes / count..(shard + 1) * nodes / count;
        let voters = exclusive_voters(run.len(), factor);
        FirstMembers {
            home: run.start,
            nodes: run.collect(),
            voters,
        }
    });
    shards.collect()
}

/// Shards from 1, each with one run of slots.
fn even_slots(shards: usize) -> SlotTable {
    let slots = usize::from(SLOTS);
    // Shard i begins at ⌊i·slots/shards⌋; the last shard that begins at or before a slot is
    // ⌊((slot+1)·shards − 1) / slots⌋.
    SlotTable::new(|slot: Slot| GroupId((((slot.index() + 1) * shards - 1) / slots) as u64 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DirectoryId;

    fn node(number: usize) -> NodeSpec {
        let address = format!("node-{number:02}:13800")
            .parse()
            .expect("an address");
        NodeSpec {
            address,
            public_address: None,
            directory: DirectoryId(number as u128),
        }
    }

    fn nodes(count: usize) -> Vec<NodeSpec> {
        (1..=count).map(node).collect()
    }

    fn plan(count: usize, asked: PlacementSpec) -> Result<View, PlacementError> {
        first_view(ClusterId(9), asked, nodes(count))
    }

    fn asked(replication_factor: Option<u8>, shards: Option<u16>) -> PlacementSpec {
        PlacementSpec::from_flags(replication_factor, shards)
    }

    /// Returns true if no count is more than one above another. Members of `of` that never come
    /// count as zero.
    fn even<T: Ord>(of: impl IntoIterator<Item = T>, seen: impl IntoIterator<Item = T>) -> bool {
        let mut counts: BTreeMap<T, usize> = of.into_iter().map(|item| (item, 0)).collect();
        for item in seen {
            *counts.entry(item).or_default() += 1;
        }
        let (min, max) = (
            counts.values().min().expect("some"),
            counts.values().max().expect("some"),
        );
        max - min <= 1
    }

    fn assert_sound(view: &View, count: usize) {
        view.check().expect("a consistent view");
        assert_eq!(
            view.nodes.keys().copied().collect::<Vec<_>>(),
            (0..count).map(node_id).collect::<Vec<_>>()
        );
        let replicas = || {
            view.shards()
                .flat_map(|(_, group)| group.replicas.values().copied())
        };
        let nodes = || view.nodes.keys().copied();
        assert!(even(nodes(), replicas()), "replicas: {view:?}");
        assert!(
            even(nodes(), view.shards().map(|(_, group)| group.home)),
            "homes: {view:?}"
        );
        let shards = view.shards().map(|(id, _)| id);
        assert!(
            even(shards, Slot::all().map(|slot| view.slots.owner(slot))),
            "slots: {view:?}"
        );
        for group in view.groups.values() {
            assert!(
                group
                    .creation
                    .iter()
                    .all(|(replica, node)| group.replicas.get(replica) == Some(node))
            );
            assert!(
                group.creation.values().any(|node| *node == group.home),
                "the home votes"
            );
        }
        let ids: BTreeSet<ReplicaId> = view
            .groups
            .values()
            .flat_map(|group| group.hosted().map(|(id, _)| id))
            .collect();
        assert_eq!(ids.first(), Some(&ReplicaId(1)));
        assert_eq!(ids.last().map(|id| id.0 + 1), Some(view.next_replica.0));
    }

    #[test]
    fn spread_is_even_for_every_size() {
        for count in 1..=30 {
            for factor in [None].into_iter().chain((1..=7).map(Some)) {
                for shards in [1, 2, 3, 7, 16, 31, 64].map(Some).into_iter().chain([None]) {
                    let asked = PlacementSpec {
                        layout: Layout::Spread,
                        replication_factor: factor,
                        shards,
                    };
                    let Ok(view) = plan(count, asked) else {
                        assert!(usize::from(factor.unwrap_or(1)) > count);
                        continue;
                    };
                    assert_sound(&view, count);
                    assert_eq!(view.shards().count(), shards.map_or(count, usize::from));
                    let expected = factor.map_or(count.min(3), usize::from);
                    assert!(
                        view.shards()
                            .all(|(_, group)| group.replicas.len() == expected)
                    );
                    assert!(
                        view.shards()
                            .all(|(_, group)| group.creation == group.replicas)
                    );
                }
            }
        }
    }

    #[test]
    fn one_shard_per_node_is_at_home_on_it() {
        for count in 1..=30 {
            for factor in 1..=7u8.min(count as u8) {
                let asked = PlacementSpec {
                    layout: Layout::Spread,
                    replication_factor: Some(factor),
                    shards: None,
                };
                let view = plan(count, asked).expect("a view");
                assert!(
                    view.shards().all(|(id, group)| group.home.0 == id.0),
                    "{count} nodes, {factor} replicas"
                );
            }
        }
    }

    #[test]
    fn exclusive_puts_each_node_into_one_shard() {
        for count in 1..=30 {
            for factor in 1..=7 {
                let Ok(view) = plan(count, asked(Some(factor), None)) else {
                    assert!(usize::from(factor) > count);
                    continue;
                };
                assert_sound(&view, count);
                let factor = usize::from(factor);
                assert_eq!(view.shards().count(), (count / factor).max(1));
                let members: Vec<NodeId> = view
                    .shards()
                    .flat_map(|(_, group)| group.replicas.values().copied())
                    .collect();
                let distinct: BTreeSet<NodeId> = members.iter().copied().collect();
                assert_eq!(
                    (members.len(), distinct.len()),
                    (count, count),
                    "each node once"
                );
                assert!(
                    view.shards()
                        .all(|(_, group)| group.replicas.len() >= factor)
                );
                assert!(
                    view.shards()
                        .all(|(_, group)| group.creation.len() >= factor)
                );
            }
        }
    }

    #[test]
    fn voters_are_odd_where_that_costs_no_survivor() {
        let meta: Vec<usize> = (1..=7)
            .map(|count| {
                plan(count, PlacementSpec::default())
                    .expect("a view")
                    .groups[&GroupId::META]
                    .creation
                    .len()
            })
            .collect();
        assert_eq!(meta, [1, 2, 3, 3, 5, 5, 5]);
        let shard = |count, factor| {
            plan(count, asked(Some(factor), None))
                .expect("a view")
                .groups[&GroupId(1)]
                .creation
                .len()
        };
        assert_eq!(
            [
                shard(2, 2),
                shard(3, 2),
                shard(4, 3),
                shard(5, 3),
                shard(4, 4),
                shard(13, 7)
            ],
            [2, 3, 3, 5, 4, 7]
        );
    }

    #[test]
    fn the_meta_group_has_a_replica_on_every_node() {
        let view = plan(9, PlacementSpec::default()).expect("a view");
        let meta = &view.groups[&GroupId::META];
        assert_eq!(
            meta.replicas.values().copied().collect::<Vec<_>>(),
            (1..=9).map(NodeId).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_order_of_the_nodes_does_not_matter() {
        let mut turned = nodes(7);
        turned.reverse();
        turned.swap(1, 4);
        assert_eq!(
            first_view(ClusterId(9), PlacementSpec::default(), turned),
            plan(7, PlacementSpec::default())
        );
    }

    #[test]
    fn what_cannot_be_placed_says_why() {
        assert_eq!(
            plan(0, PlacementSpec::default()),
            Err(PlacementError::NoNodes)
        );
        assert_eq!(
            plan(2, asked(Some(3), None)),
            Err(PlacementError::TooFewNodes {
                needed: 3,
                nodes: 2
            })
        );
        assert_eq!(
            plan(9, asked(Some(0), None)),
            Err(PlacementError::ReplicationFactorOutOfRange(0))
        );
        assert_eq!(
            plan(9, asked(Some(8), Some(1))),
            Err(PlacementError::ReplicationFactorOutOfRange(8))
        );
        assert_eq!(
            plan(9, asked(None, Some(0))),
            Err(PlacementError::ShardsOutOfRange(0))
        );
        assert_eq!(
            plan(9, asked(None, Some(4097))),
            Err(PlacementError::ShardsOutOfRange(4097))
        );
        assert!(plan(3, asked(None, Some(4096))).is_ok());
        let crowded = PlacementSpec {
            layout: Layout::Exclusive,
            replication_factor: Some(2),
            shards: Some(3),
        };
        assert_eq!(
            plan(5, crowded),
            Err(PlacementError::TooFewNodes {
                needed: 6,
                nodes: 5
            })
        );
        let twice = vec![node(1), node(2), node(1)];
        let error =
            first_view(ClusterId(9), PlacementSpec::default(), twice).expect_err("a node twice");
        assert_eq!(error, PlacementError::DuplicateAddress(node(1).address));
        let moved = NodeSpec {
            directory: DirectoryId(1),
            ..node(2)
        };
        let error = first_view(ClusterId(9), PlacementSpec::default(), vec![node(1), moved])
            .expect_err("a directory twice");
        assert_eq!(error, PlacementError::DuplicateDirectory(DirectoryId(1)));
    }

    #[test]
    fn an_explicit_replication_factor_alone_means_exclusive() {
        assert_eq!(asked(None, None).layout, Layout::Spread);
        assert_eq!(asked(None, Some(5)).layout, Layout::Spread);
        assert_eq!(asked(Some(2), Some(5)).layout, Layout::Spread);
        assert_eq!(asked(Some(2), None).layout, Layout::Exclusive);
    }
}
