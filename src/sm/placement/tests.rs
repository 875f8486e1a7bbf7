//! Changes of views, planned and driven through the meta group's own commands.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};

use super::sizes::{Sizes, meta_voters};
use super::{PlacementError, Planned, REPLICATION_FACTOR_MAX, first_view, plan};
use crate::sm::cluster::view::{GroupSpec, Layout, NodeSpec, PlacementSpec, View, WitnessSpec};
use crate::sm::testing::Meta;
use crate::types::{ClusterId, DirectoryId, GroupId, NodeId, ReplicaId, Slot};

fn node(address: usize, directory: u128) -> NodeSpec {
    let address = format!("node-{address:03}:13800")
        .parse()
        .expect("an address");
    NodeSpec {
        address,
        public_address: None,
        directory: DirectoryId(directory),
    }
}

fn nodes(numbers: std::ops::RangeInclusive<usize>) -> Vec<NodeSpec> {
    numbers.map(|number| node(number, number as u128)).collect()
}

fn spread(factor: u8, shards: Option<u16>) -> PlacementSpec {
    PlacementSpec {
        layout: Layout::Spread,
        replication_factor: Some(factor),
        shards,
    }
}

fn exclusive(factor: u8) -> PlacementSpec {
    PlacementSpec::from_flags(Some(factor), None)
}

fn found(asked: PlacementSpec, wanted: Vec<NodeSpec>) -> Meta {
    Meta::founded(first_view(ClusterId(9), asked, wanted).expect("a first view"))
}

fn planned(view: &View, asked: PlacementSpec, wanted: &[NodeSpec]) -> Planned {
    plan(view, asked, wanted, &BTreeSet::new()).expect("a plan")
}

/// The difference between the highest and the lowest count; every one of `of` is counted, also
/// those that never come.
fn unevenness<T: Ord>(of: impl IntoIterator<Item = T>, seen: impl IntoIterator<Item = T>) -> usize {
    let mut counts: BTreeMap<T, usize> = of.into_iter().map(|item| (item, 0)).collect();
    seen.into_iter()
        .for_each(|item| *counts.entry(item).or_default() += 1);
    counts.values().max().expect("some") - counts.values().min().expect("some")
}

fn shards_that_stay(view: &View) -> impl Iterator<Item = (GroupId, &GroupSpec)> {
    view.shards().filter(|(_, group)| !group.draining)
}

/// Asserts what holds of every plan.
fn assert_plan(view: &View, out: &BTreeSet<NodeId>) {
    view.check().expect("the parts fit together");
    let staying: BTreeSet<NodeId> = view.staying().map(|(id, _)| id).collect();
    let working: BTreeSet<NodeId> = staying.difference(&view.evicted).copied().collect();
    let sizes = Sizes::for_nodes(staying.len(), view.placement).expect("sizes");
    let live = || shards_that_stay(view);
    assert_eq!(live().count(), sizes.shards, "shards");

    let placed = || live().flat_map(|(_, group)| group.replicas.values().copied());
    assert!(
        placed().all(|node| working.contains(&node)),
        "a replica on a node that leaves or is out"
    );
    match view.placement.layout {
        Layout::Spread => {
            assert!(live().all(
                |(_, group)| group.replicas.len() == sizes.factor && group.learners.is_empty()
            ));
            assert!(
                unevenness(working.clone(), placed()) <= 1,
                "replicas: {view:?}"
            );
        }
        Layout::Exclusive => {
            assert_eq!(placed().count(), working.len(), "each node once");
            assert_eq!(placed().collect::<BTreeSet<_>>(), working, "each node once");
            assert!(live().all(|(_, group)| group.replicas.len() >= sizes.factor
                && group.voters().len() >= sizes.factor));
            let sizes: BTreeSet<usize> = live().map(|(_, group)| group.replicas.len()).collect();
            assert!(sizes.last().expect("some") - sizes.first().expect("some") <= 1);
        }
    }
    assert!(
        unevenness(working.clone(), live().map(|(_, group)| group.home)) <= 1,
        "homes: {view:?}"
    );
    assert!(
        unevenness(
            live().map(|(id, _)| id),
            Slot::all().map(|slot| view.targets.owner(slot))
        ) <= 1,
        "slots"
    );
    for (id, group) in &view.groups {
        assert!(
            group
                .voters()
                .iter()
                .any(|voter| group.replicas[voter] == group.home),
            "the home of {id} votes"
        );
    }

    assert_witnesses(view, &working);
    let enough = staying.iter().filter(|id| !out.contains(id)).count() >= sizes.needed;
    let resting: BTreeSet<NodeId> = staying.intersection(out).copied().collect();
    assert!(view.evicted.is_subset(&resting));
    assert!(
        view.evicted == resting || !enough,
        "who is out has no work: {:?} of {out:?}",
        view.evicted
    );

    let meta = &view.groups[&GroupId::META];
    assert!(
        staying
            .iter()
            .all(|node| meta.replicas.values().any(|at| at == node)),
        "the meta group is everywhere"
    );
    assert_eq!(meta.voters().len(), meta_voters(working.len()));
    assert!(
        meta.voters()
            .iter()
            .all(|voter| working.contains(&meta.replicas[voter]))
    );
}

/// Every shard that needs a witness and can have one has one, and no other does; and none could go
/// from a node to one with two fewer.
fn assert_witnesses(view: &View, working: &BTreeSet<NodeId>) {
    let mut witnesses: BTreeMap<NodeId, usize> = BTreeMap::new();
    for witness in shards_that_stay(view).filter_map(|(_, group)| group.witness) {
        *witnesses.entry(witness.node).or_default() += 1;
    }
    let load = |node: NodeId| witnesses.get(&node).copied().unwrap_or_default();
    for (id, group) in shards_that_stay(view) {
        let held: BTreeSet<NodeId> = group.replicas.values().copied().collect();
        let free: BTreeSet<NodeId> = working.difference(&held).copied().collect();
        let is_due = group.voters().len() % 2 == 0 && !free.is_empty();
        assert_eq!(group.witness.is_some(), is_due, "{id}: {group:?}");
        let Some(WitnessSpec { replica, node }) = group.witness else {
            continue;
        };
        assert!(
            free.contains(&node) && !group.replicas.contains_key(&replica),
            "{id}: {group:?}"
        );
        assert!(
            free.iter().all(|other| load(node) <= load(*other) + 1),
            "the witness of {id} belongs elsewhere: {view:?}"
        );
    }
    assert_eq!(view.groups[&GroupId::META].witness, None);
}

#[test]
fn an_even_number_of_replicas_has_a_witness_where_there_is_a_node_for_it() {
    for count in 1..=12 {
        for factor in 1..=REPLICATION_FACTOR_MAX.min(count as u8) {
            for asked in [
                spread(factor, None),
                spread(factor, Some(30)),
                exclusive(factor),
            ] {
                let view = first_view(ClusterId(9), asked, nodes(1..=count)).expect("a view");
                assert_plan(&view, &BTreeSet::new());
                let places: Vec<NodeId> = view
                    .shards()
                    .filter_map(|(_, group)| Some(group.witness?.node))
                    .collect();
                let is_even = factor % 2 == 0 && usize::from(factor) < count;
                if asked.layout == Layout::Spread {
                    assert_eq!(
                        places.len(),
                        if is_even { view.shards().count() } else { 0 },
                        "{count} nodes, {asked:?}"
                    );
                    assert!(
                        !is_even || unevenness(view.nodes.keys().copied(), places) <= 1,
                        "{count} nodes, {asked:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_witness_comes_and_goes_with_an_even_number_and_never_as_another_replica() {
    let mut meta = found(spread(3, Some(8)), nodes(1..=4));
    let mut seen: BTreeSet<ReplicaId> = meta
        .view()
        .groups
        .values()
        .flat_map(|group| group.hosted().map(|(id, _)| id))
        .collect();
    for factor in [2, 3, 2, 4, 2, 1, 2, 3] {
        let before = meta.view();
        let next = planned(&before, spread(factor, Some(8)), &nodes(1..=4)).view;
        assert_plan(&next, &BTreeSet::new());
        for (id, group) in next.shards() {
            if let Some(witness) = group.witness {
                assert_eq!(factor, 2);
                assert!(
                    seen.insert(witness.replica),
                    "the witness of {id} has an id that was used"
                );
            }
            let gone = before.groups[&id].witness;
            assert!(
                gone.is_none_or(|gone| group.leaving.get(&gone.replica) == Some(&gone.node)),
                "a witness that goes is retired"
            );
            seen.extend(group.replicas.keys());
        }
        meta.install(next);
        meta.settle();
    }
}

#[test]
fn a_node_more_takes_its_share_of_the_witnesses_and_no_more() {
    for count in 4..=12_usize {
        let before = found(spread(2, Some(60)), nodes(1..=count)).view();
        let after = planned(&before, before.placement, &nodes(1..=count + 1)).view;
        assert_plan(&after, &BTreeSet::new());
        let is_new = |group: &&GroupSpec| {
            group
                .witness
                .is_some_and(|witness| witness.replica >= before.next_replica)
        };
        let moved = after
            .shards()
            .map(|(_, group)| group)
            .filter(is_new)
            .count();
        // Those in the way of a replica that comes to their node go too.
        let displaced = new_replicas(&before, &after);
        assert!(
            moved <= 60_usize.div_ceil(count + 1) + displaced,
            "{moved} of 60, {displaced} replicas are new"
        );
    }
}

#[test]
fn planning_a_first_view_again_changes_nothing() {
    for count in 1..=30 {
        for factor in 1..=REPLICATION_FACTOR_MAX.min(count as u8) {
            for asked in [
                spread(factor, None),
                spread(factor, Some(16)),
                exclusive(factor),
                PlacementSpec::default(),
            ] {
                let view = first_view(ClusterId(9), asked, nodes(1..=count)).expect("a view");
                let again = planned(&view, asked, &nodes(1..=count));
                assert!(again.is_same, "{count} nodes, {asked:?}");
                assert_eq!(
                    View {
                        epoch: view.epoch,
                        version: view.version,
                        ..again.view
                    },
                    view
                );
            }
        }
    }
}

/// Replicas of `after` that `before` has not; the meta group's aside.
fn new_replicas(before: &View, after: &View) -> usize {
    let replicas = after.shards().flat_map(|(_, group)| group.replicas.keys());
    replicas
        .filter(|replica| **replica >= before.next_replica)
        .count()
}

fn changed_homes(before: &View, after: &View) -> usize {
    let changed = |(id, group): &(GroupId, &GroupSpec)| {
        before
            .groups
            .get(id)
            .is_some_and(|was| was.home != group.home)
    };
    shards_that_stay(after).filter(changed).count()
}

#[test]
fn a_node_more_takes_its_share_and_no_more() {
    for count in 3..=20_usize {
        for factor in 1..=3 {
            let shards = 60;
            let mut meta = found(spread(factor, Some(shards)), nodes(1..=count));
            let before = meta.view();
            let after = planned(&before, before.placement, &nodes(1..=count + 1)).view;
            assert_plan(&after, &BTreeSet::new());
            let share = (usize::from(shards) * usize::from(factor)).div_ceil(count + 1);
            assert!(
                new_replicas(&before, &after) <= share,
                "{count} nodes, {factor} replicas"
            );
            assert!(changed_homes(&before, &after) <= usize::from(shards).div_ceil(count + 1));
            assert_eq!(after.slots, after.targets, "as many shards as before");
            meta.install(after);
            meta.settle();
            assert!(planned(&meta.view(), before.placement, &nodes(1..=count + 1)).is_same);

            // A shard more per node: the node and the shard get their replicas, nobody else gets
            // any.
            let before =
                first_view(ClusterId(9), spread(factor, None), nodes(1..=count)).expect("a view");
            let after = planned(&before, before.placement, &nodes(1..=count + 1)).view;
            assert_plan(&after, &BTreeSet::new());
            assert_eq!(new_replicas(&before, &after), 2 * usize::from(factor) - 1);
            assert_eq!(changed_homes(&before, &after), 0);
            assert!(after.misplaced_slots().count() <= 4096_usize.div_ceil(count + 1));
        }
    }
}

#[test]
fn a_change_that_is_taken_back_moves_back_only_what_had_moved() {
    let mut meta = found(spread(3, None), nodes(1..=5));
    let first = meta.view();
    meta.install(planned(&first, first.placement, &nodes(1..=6)).view);
    let astray = meta.view().misplaced_slots().count();
    assert!(astray > 600);
    meta.move_slots(100);
    let moved = Slot::all()
        .filter(|slot| meta.view().slots.owner(*slot) != first.slots.owner(*slot))
        .count();
    assert_eq!(moved, 100);
    let back = planned(&meta.view(), first.placement, &nodes(1..=5)).view;
    assert_plan(&back, &BTreeSet::new());
    assert_eq!(back.misplaced_slots().count(), 100);
    meta.install(back);
    meta.settle();
    assert_eq!(meta.view().slots, first.slots);
    assert_eq!(meta.view().nodes, first.nodes);
}

#[test]
fn a_view_that_shares_no_node_with_the_one_before() {
    for asked in [PlacementSpec::default(), spread(5, Some(11)), exclusive(3)] {
        let mut meta = found(asked, nodes(1..=7));
        meta.install(planned(&meta.view(), asked, &nodes(8..=15)).view);
        assert_plan(&meta.view(), &BTreeSet::new());
        assert_eq!(meta.view().leaving.len(), 7);
        meta.settle();
        let ids: Vec<NodeId> = meta.view().nodes.keys().copied().collect();
        assert_eq!(ids, (8..=15).map(NodeId).collect::<Vec<_>>());
    }
}

#[test]
fn another_directory_under_an_address_is_another_node() {
    let asked = PlacementSpec::default();
    let mut meta = found(asked, nodes(1..=4));
    let mut wanted = nodes(1..=4);
    wanted[1].directory = DirectoryId(77);
    let next = planned(&meta.view(), asked, &wanted).view;
    assert_plan(&next, &BTreeSet::new());
    assert_eq!(next.leaving, BTreeSet::from([NodeId(2)]));
    assert_eq!(next.node_at(&wanted[1].address), Some(NodeId(5)));
    assert!(
        next.shards()
            .all(|(_, group)| !group.replicas.values().any(|node| *node == NodeId(2))),
        "it is lost"
    );
    meta.install(next);
    meta.settle();
    assert!(!meta.view().nodes.contains_key(&NodeId(2)));
}

#[test]
fn a_node_out_of_reach_rests_while_there_are_others_enough() {
    let out = BTreeSet::from([NodeId(2)]);
    let settled = |asked, count| found(asked, nodes(1..=count)).view();
    let view = settled(PlacementSpec::default(), 4);
    let next = plan(&view, view.placement, &nodes(1..=4), &out)
        .expect("a plan")
        .view;
    assert_plan(&next, &out);
    assert_eq!((next.evicted.clone(), next.leaving.len()), (out.clone(), 0));
    assert!(shards_that_stay(&next).all(|(_, group)| group.home != NodeId(2)));
    let back = planned(&next, view.placement, &nodes(1..=4)).view;
    assert_plan(&back, &BTreeSet::new());
    assert!(
        back.evicted.is_empty()
            && back
                .shards()
                .any(|(_, group)| group.replicas.values().any(|node| *node == NodeId(2)))
    );

    let view = settled(PlacementSpec::default(), 3);
    assert!(
        plan(&view, view.placement, &nodes(1..=3), &out)
            .expect("a plan")
            .is_same,
        "three replicas need three nodes"
    );
    let view = settled(exclusive(3), 6);
    assert!(
        plan(&view, view.placement, &nodes(1..=6), &out)
            .expect("a plan")
            .is_same,
        "two shards of three need six"
    );
    let view = settled(exclusive(3), 7);
    let next = plan(&view, view.placement, &nodes(1..=7), &out)
        .expect("a plan")
        .view;
    assert_plan(&next, &out);
    assert_eq!(
        (new_replicas(&view, &next), next.evicted.len()),
        (1, 1),
        "the seventh stands in"
    );
}

#[test]
fn a_shard_that_ends_stays_where_it_is_but_for_dead_nodes() {
    let view = found(PlacementSpec::default(), nodes(1..=6)).view();
    let next = planned(&view, view.placement, &nodes(1..=5)).view;
    let ending: Vec<&GroupSpec> = next
        .shards()
        .map(|(_, group)| group)
        .filter(|group| group.draining)
        .collect();
    let [group] = ending[..] else {
        panic!("one shard ends: {ending:?}")
    };
    assert_eq!(
        group.home,
        NodeId(6),
        "the one at home on the node that leaves"
    );
    assert!(group.leaving.is_empty() && group.replicas.values().any(|node| *node == NodeId(6)));
    let dead = BTreeSet::from([NodeId(6)]);
    let next = plan(&next, view.placement, &nodes(1..=5), &dead)
        .expect("a plan")
        .view;
    assert_plan(&next, &dead);
    let group = next
        .shards()
        .map(|(_, group)| group)
        .find(|group| group.draining)
        .expect("it still ends");
    assert!(
        group.replicas.len() == 3
            && group.leaving.values().eq([&NodeId(6)])
            && group.home != NodeId(6)
    );
}

#[test]
fn replicas_on_their_way_out_are_called_back_rather_than_new_ones() {
    for factor in 1..=3 {
        let view = found(spread(factor, None), nodes(1..=3)).view();
        let away = planned(&view, view.placement, &nodes(4..=6)).view;
        let back = planned(&away, view.placement, &nodes(1..=3)).view;
        assert_plan(&back, &BTreeSet::new());
        for (id, group) in view.shards() {
            assert_eq!(back.groups[&id].replicas, group.replicas, "factor {factor}");
        }
    }
}

#[test]
fn what_cannot_be_planned_says_why() {
    let view = found(PlacementSpec::default(), nodes(1..=5)).view();
    let refused = |asked, wanted: &[NodeSpec]| {
        plan(&view, asked, wanted, &BTreeSet::new()).expect_err("refused")
    };
    assert_eq!(
        refused(PlacementSpec::default(), &[]),
        PlacementError::NoNodes
    );
    assert_eq!(
        refused(exclusive(3), &nodes(4..=5)),
        PlacementError::TooFewNodes {
            needed: 3,
            nodes: 2
        }
    );
    assert_eq!(
        refused(exclusive(0), &nodes(1..=5)),
        PlacementError::ReplicationFactorOutOfRange(0)
    );
    assert_eq!(
        refused(spread(8, Some(2)), &nodes(1..=9)),
        PlacementError::ReplicationFactorOutOfRange(8)
    );
    assert_eq!(
        refused(spread(3, Some(4097)), &nodes(1..=9)),
        PlacementError::ShardsOutOfRange(4097)
    );
    assert_eq!(
        refused(spread(3, Some(0)), &nodes(1..=9)),
        PlacementError::ShardsOutOfRange(0)
    );
    let crowded = PlacementSpec {
        layout: Layout::Exclusive,
        replication_factor: Some(2),
        shards: Some(3),
    };
    assert_eq!(
        refused(crowded, &nodes(1..=5)),
        PlacementError::TooFewNodes {
            needed: 6,
            nodes: 5
        }
    );
    let address = refused(PlacementSpec::default(), &[node(1, 1), node(1, 2)]);
    assert_eq!(
        address,
        PlacementError::DuplicateAddress(node(1, 1).address)
    );
    let directory = refused(PlacementSpec::default(), &[node(1, 1), node(2, 1)]);
    assert_eq!(
        directory,
        PlacementError::DuplicateDirectory(DirectoryId(1))
    );
    // Node 1 is still called by its old address, which another has taken.
    let taken = refused(PlacementSpec::default(), &[node(9, 1), node(1, 9)]);
    assert_eq!(taken, PlacementError::DuplicateAddress(node(1, 1).address));
}

/// An asking at random that these many nodes can meet.
fn random_asked(rng: &mut StdRng, nodes: usize) -> PlacementSpec {
    let factor = rng
        .random_bool(0.7)
        .then(|| rng.random_range(1..=REPLICATION_FACTOR_MAX.min(nodes as u8)));
    let shards = rng.random_bool(0.5).then(|| rng.random_range(1..=40));
    let layout = if rng.random_bool(0.4) {
        Layout::Exclusive
    } else {
        Layout::Spread
    };
    let asked = PlacementSpec {
        layout,
        replication_factor: factor,
        shards,
    };
    if Sizes::for_nodes(nodes, asked).is_ok() {
        asked
    } else {
        PlacementSpec {
            shards: None,
            ..asked
        }
    }
}

#[test]
fn any_sequence_of_changes_can_be_planned_and_carried_out() {
    for seed in 0..12 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let count = rng.random_range(1..=12);
        let mut wanted = nodes(1..=count);
        let mut asked = random_asked(&mut rng, count);
        let mut meta = found(asked, wanted.clone());
        let mut directory = 1000;
        for _ in 0..12 {
            for _ in 0..rng.random_range(0..3) {
                directory += 1;
                match rng.random_range(0..4) {
                    0 => wanted.push(node(directory as usize, directory)),
                    1 if wanted.len() > 1 => drop(wanted.remove(rng.random_range(0..wanted.len()))),
                    2 => {
                        wanted
                            .iter_mut()
                            .choose(&mut rng)
                            .expect("a node")
                            .directory = DirectoryId(directory)
                    }
                    _ => {}
                }
            }
            if rng.random_bool(0.3) || Sizes::for_nodes(wanted.len(), asked).is_err() {
                asked = random_asked(&mut rng, wanted.len());
            }
            let view = meta.view();
            let out: BTreeSet<NodeId> = view
                .nodes
                .keys()
                .filter(|_| rng.random_bool(0.1))
                .copied()
                .collect();
            let next = plan(&view, asked, &wanted, &out).expect("a plan").view;
            assert_plan(&next, &out);
            meta.install(next);
            match rng.random_range(0..3) {
                0 => meta.settle(),
                1 => meta.move_slots(rng.random_range(0..600)),
                _ => drop(meta.open_moves(rng.random_range(0..600))),
            }
            let again = plan(&meta.view(), asked, &wanted, &meta.view().evicted).expect("a plan");
            assert!(
                again.is_same,
                "planned in the middle of a change: {:?}\n{:?}",
                meta.view(),
                again.view
            );
        }
        let last = planned(&meta.view(), asked, &wanted).view;
        meta.install(last);
        meta.settle();
        assert_plan(&meta.view(), &BTreeSet::new());
        assert_eq!(meta.view().nodes.len(), wanted.len());
    }
}

#[test]
fn large_views_are_planned_at_once() {
    let timed = |view: &View, asked, wanted: &[NodeSpec]| {
        let started = std::time::Instant::now();
        let next = planned(view, asked, wanted).view;
        let took = started.elapsed();
        println!("{} nodes, {asked:?}: {took:?}", wanted.len());
        assert_plan(&next, &BTreeSet::new());
        next
    };
    let view = first_view(ClusterId(9), PlacementSpec::default(), nodes(1..=100)).expect("a view");
    let view = carried_out(timed(&view, spread(5, None), &nodes(1..=100)));
    timed(&view, spread(5, None), &nodes(3..=120));
    timed(&view, exclusive(3), &nodes(1..=100));
    let view = first_view(ClusterId(9), spread(1, Some(4096)), nodes(1..=30)).expect("a view");
    let asked = spread(3, Some(4096));
    let view = carried_out(timed(&view, asked, &nodes(1..=30)));
    timed(&view, asked, &nodes(1..=31));
    timed(&view, asked, &nodes(2..=30));
    timed(&view, spread(2, Some(4096)), &nodes(1..=30));
    timed(&view, spread(3, Some(30)), &nodes(5..=35));
    timed(&view, spread(7, Some(4096)), &nodes(10..=40));
}

/// As the view is when all of it is done: what the meta group's commands would take long for with
/// thousands of groups.
fn carried_out(mut view: View) -> View {
    view.slots = view.targets.clone();
    view.groups.retain(|_, group| !group.draining);
    view.groups
        .values_mut()
        .for_each(|group| group.leaving.clear());
    view
}
