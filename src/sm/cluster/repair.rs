//! Which nodes are given up, and taken back: from how each was seen to the plan that follows, if
//! one is due.
//!
//! Decided where the meta group is led, from what that node sees; the meta group then agrees on the
//! plan like on any other. Kept out: looking at nodes, and time. What always holds: a node is given
//! up only while others enough are left for what is asked, and never when most are away at once,
//! since then it is rather the deciding node that is cut off.
//!
//! Which replicas are replaced is decided here too: those that their nodes say have failed for
//! long. The new one comes to the same node, under another id. Where it is the node that fails, it
//! counts as away instead. A replica is replaced only while the voters of its group that are left
//! can change who its members are, and one at a time in each group.

use std::collections::{BTreeMap, BTreeSet};

use super::view::{GroupSpec, NodeSpec, View, WitnessSpec};
use crate::sm::placement::{Planned, plan};
use crate::types::{DirectoryId, GroupId, NodeId, ReplicaId};

/// Reachability of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodePresence {
    /// It has been in reach for so long.
    Here { for_ms: u64 },
    /// It has been out of reach for so long.
    Away { for_ms: u64 },
    /// A fresh data directory, one of no cluster, answers under its address: what it held is lost.
    Lost { to: DirectoryId },
}

/// The nodes that a plan should not count on: those away for `replace_after_ms`, and those already
/// out that are still away.
pub fn out_of_reach(
    view: &View,
    seen: &BTreeMap<NodeId, NodePresence>,
    replace_after_ms: u64,
) -> BTreeSet<NodeId> {
    let is_out = |id: &NodeId| match seen.get(id) {
        // Out already: whoever decides now may have begun to count anew, and must not take it back
        // for that.
        Some(NodePresence::Away { for_ms }) => {
            *for_ms >= replace_after_ms || view.evicted.contains(id)
        }
        // A directory that the view knows belongs to a node that has moved: nothing is lost.
        Some(NodePresence::Lost { to }) => is_fresh(view, *to),
        Some(NodePresence::Here { .. }) => false,
        None => view.evicted.contains(id),
    };
    view.nodes.keys().filter(|id| is_out(id)).copied().collect()
}

/// The plan by which lost nodes are replaced at once, nodes that were away for `replace_after_ms`
/// give up their work, and those that have been back as long get some; none if there is nothing to
/// do, or when that should be left to people.
pub fn next_plan(
    view: &View,
    seen: &BTreeMap<NodeId, NodePresence>,
    replace_after_ms: u64,
) -> Option<Planned> {
    // With most of them away it is rather this node that is cut off.
    if are_most_away(view, seen) {
        return None;
    }
    let mut out = out_of_reach(view, seen, replace_after_ms);

    // Back for as long as it takes to be given up: a node that comes and goes would move data each
    // time.
    let is_back = |id: &NodeId| {
        matches!(
            seen.get(id),
            Some(NodePresence::Here { for_ms }) if *for_ms >= replace_after_ms
        )
    };
    out.extend(view.evicted.iter().filter(|id| !is_back(id)));
    let wanted: Vec<NodeSpec> = view
        .staying()
        .map(|(id, node)| successor(view, node, seen.get(&id)))
        .collect();

    // Without enough nodes for what is asked there is no plan: that is left to people.
    let planned = plan(view, view.placement, &wanted, &out).ok()?;
    (!planned.is_same).then_some(planned)
}

/// A replica that has failed on a node that is in reach, as that node tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failing {
    /// It has not run for so long, but perhaps for moments.
    pub for_ms: u64,
    /// Any replica there would meet the same.
    pub is_of_the_node: bool,
}

/// A replica and the one that takes its place on the same node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replacement {
    pub group: GroupId,
    pub node: NodeId,
    pub failed: ReplicaId,
    pub new: ReplicaId,
}

/// Returns the view in which replicas that have failed for `replace_after_ms` are replaced, and
/// which those are; none if there is nothing to do, or when that could do harm.
pub fn replace_failed(
    view: &View,
    seen: &BTreeMap<NodeId, NodePresence>,
    failing: &BTreeMap<(GroupId, ReplicaId), Failing>,
    replace_after_ms: u64,
) -> Option<(View, Vec<Replacement>)> {
    if are_most_away(view, seen) {
        return None;
    }
    let is_due = |id: GroupId, group: &GroupSpec, replica: ReplicaId, node: NodeId| {
        let has_failed = failing
            .get(&(id, replica))
            .is_some_and(|failing| !failing.is_of_the_node && failing.for_ms >= replace_after_ms);
        // Another step of this group is under way: it ends first.
        has_failed && is_reachable(seen, node) && group.leaving.is_empty() && !group.draining
    };

    // One replica at a time in each group, so that the rest stays a majority through the change.
    let mut next = view.clone();
    let mut replaced = Vec::new();
    for (id, group) in &view.groups {
        let due = group
            .wanted()
            .find(|(replica, node)| is_due(*id, group, *replica, *node));
        let Some((failed, node)) = due.filter(|_| has_able_majority(*id, group, seen, failing))
        else {
            continue;
        };
        let new = next.next_replica;
        next.next_replica.0 += 1;
        if let Some(group) = next.groups.get_mut(id) {
            replace(group, failed, new, node);
        }
        replaced.push(Replacement {
            group: *id,
            node,
            failed,
            new,
        });
    }
    next.epoch.0 += 1;
    next.version.0 += 1;
    (!replaced.is_empty()).then_some((next, replaced))
}

fn replace(group: &mut GroupSpec, failed: ReplicaId, new: ReplicaId, node: NodeId) {
    // The new one is of the same kind: which replicas have a map must not change by a replacement.
    if group.is_witness(failed) {
        group.witness = Some(WitnessSpec { replica: new, node });
    } else {
        group.replicas.remove(&failed);
        group.replicas.insert(new, node);
        if group.learners.remove(&failed) {
            group.learners.insert(new);
        }
    }
    group.leaving.insert(failed, node);
}

/// Returns whether the voters of a group that are here and have not failed are a majority of all.
fn has_able_majority(
    id: GroupId,
    group: &GroupSpec,
    seen: &BTreeMap<NodeId, NodePresence>,
    failing: &BTreeMap<(GroupId, ReplicaId), Failing>,
) -> bool {
    // What the group has committed counts, not what is planned: only its voters can agree to the
    // change.
    let voters = match &group.reported {
        Some(reported) => reported.voters.clone(),
        None => group.creation.keys().copied().collect(),
    };
    let nodes: BTreeMap<ReplicaId, NodeId> = group.hosted().collect();
    let is_able = |voter: &&ReplicaId| {
        nodes
            .get(voter)
            .is_some_and(|node| is_reachable(seen, *node))
            && !failing.contains_key(&(id, **voter))
    };
    voters.iter().filter(is_able).count() * 2 > voters.len()
}

fn is_reachable(seen: &BTreeMap<NodeId, NodePresence>, node: NodeId) -> bool {
    matches!(seen.get(&node), Some(NodePresence::Here { .. }))
}

/// Returns true if more than half of the nodes that host replicas are away or lost.
fn are_most_away(view: &View, seen: &BTreeMap<NodeId, NodePresence>) -> bool {
    let working: Vec<NodeId> = view
        .staying()
        .map(|(id, _)| id)
        .filter(|id| !view.evicted.contains(id))
        .collect();
    let is_away = |id: &&NodeId| match seen.get(id) {
        Some(NodePresence::Away { .. }) => true,
        Some(NodePresence::Lost { to }) => is_fresh(view, *to),
        Some(NodePresence::Here { .. }) | None => false,
    };
    working.iter().filter(is_away).count() * 2 > working.len()
}

/// The node that is to be in the place of `node`.
fn successor(view: &View, node: &NodeSpec, seen: Option<&NodePresence>) -> NodeSpec {
    match seen {
        Some(NodePresence::Lost { to })
            if !view.nodes.values().any(|known| known.directory == *to) =>
        {
            NodeSpec {
                directory: *to,
                ..node.clone()
            }
        }
        Some(NodePresence::Lost { .. } | NodePresence::Here { .. } | NodePresence::Away { .. })
        | None => node.clone(),
    }
}

/// Returns true if the view does not know this directory. A known one belongs to a node that now
/// runs elsewhere.
fn is_fresh(view: &View, directory: DirectoryId) -> bool {
    !view
        .nodes
        .values()
        .any(|known| known.directory == directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::cluster::view::PlacementSpec;
    use crate::sm::placement::first_view;
    use crate::sm::testing::node;
    use crate::types::ClusterId;

    const REPLACE_AFTER_MS: u64 = 300_000;
    const LONG: NodePresence = NodePresence::Away {
        for_ms: REPLACE_AFTER_MS,
    };
    const SHORT: NodePresence = NodePresence::Away {
        for_ms: REPLACE_AFTER_MS - 1,
    };

    fn cluster(count: u32, asked: PlacementSpec) -> View {
        first_view(ClusterId(1), asked, (1..=count).map(node).collect()).expect("a view")
    }

    /// All nodes are here, but for these.
    fn seen(view: &View, others: &[(u64, NodePresence)]) -> BTreeMap<NodeId, NodePresence> {
        let here = view
            .nodes
            .keys()
            .map(|id| (*id, NodePresence::Here { for_ms: 1000 }));
        here.chain(others.iter().map(|(id, seen)| (NodeId(*id), *seen)))
            .collect()
    }

    fn next(view: &View, others: &[(u64, NodePresence)]) -> Option<View> {
        let planned = next_plan(view, &seen(view, others), REPLACE_AFTER_MS)?;
        planned.view.check().expect("the parts fit together");
        Some(planned.view)
    }

    fn out(view: &View) -> Vec<u64> {
        view.evicted.iter().map(|id| id.0).collect()
    }

    fn works(view: &View, node: u64) -> bool {
        view.shards()
            .any(|(_, group)| group.replicas.values().any(|at| *at == NodeId(node)))
    }

    #[test]
    fn a_node_away_for_long_gives_up_its_work() {
        let view = cluster(5, PlacementSpec::default());
        assert_eq!(next(&view, &[]), None);
        assert_eq!(next(&view, &[(2, SHORT)]), None);
        let after = next(&view, &[(2, LONG), (3, SHORT)]).expect("a plan");
        assert_eq!(out(&after), [2]);
        assert!(!works(&after, 2) && works(&after, 3));
        assert_eq!(next(&after, &[(2, LONG)]), None, "once");
        assert_eq!(
            next(&after, &[(2, SHORT)]),
            None,
            "also after whoever decides has begun to count anew"
        );
    }

    #[test]
    fn a_node_is_kept_when_there_are_not_others_enough() {
        assert_eq!(
            next(&cluster(3, PlacementSpec::default()), &[(2, LONG)]),
            None,
            "three replicas need three nodes"
        );
        assert_eq!(
            next(
                &cluster(6, PlacementSpec::from_flags(Some(3), None)),
                &[(2, LONG)]
            ),
            None,
            "two shards of three need six"
        );
        let view = cluster(4, PlacementSpec::default());
        let after = next(&view, &[(2, LONG)]).expect("a plan");
        assert_eq!(
            next(&after, &[(2, LONG), (3, LONG)]),
            None,
            "nor does the second go"
        );
        let both = next(&view, &[(2, LONG), (3, LONG)]).expect("a plan");
        assert_eq!(both.evicted.len(), 1, "one of the two is counted on");
    }

    #[test]
    fn when_most_are_away_nothing_is_done() {
        let asked = PlacementSpec::from_flags(Some(1), Some(5));
        let view = cluster(5, asked);
        assert_eq!(next(&view, &[(1, LONG), (2, LONG), (3, SHORT)]), None);
        let after = next(&view, &[(1, LONG), (2, LONG)]).expect("a plan");
        assert_eq!(out(&after), [1, 2]);
        let after = next(&after, &[(1, LONG), (2, LONG), (3, LONG)])
            .expect("one of three at work is not most of them");
        assert_eq!(out(&after), [1, 2, 3]);
    }

    #[test]
    fn a_node_that_came_back_to_stay_gets_work_again() {
        let view = next(&cluster(5, PlacementSpec::default()), &[(2, LONG)]).expect("a plan");
        assert_eq!(next(&view, &[]), None, "it may go again");
        assert_eq!(
            out_of_reach(&view, &seen(&view, &[]), REPLACE_AFTER_MS),
            BTreeSet::new(),
            "a plan of the operator's takes it"
        );
        let back = NodePresence::Here {
            for_ms: REPLACE_AFTER_MS,
        };
        let after = next(&view, &[(2, back)]).expect("a plan");
        assert!(after.evicted.is_empty() && works(&after, 2));
    }

    #[test]
    fn a_lost_directory_is_replaced_at_once() {
        let view = cluster(3, PlacementSpec::default());
        let lost = [(
            2,
            NodePresence::Lost {
                to: DirectoryId(22),
            },
        )];
        let after = next(&view, &lost).expect("a plan");
        assert_eq!(after.leaving, BTreeSet::from([NodeId(2)]));
        assert_eq!(after.nodes[&NodeId(4)].directory, DirectoryId(22));
        assert!(
            after.shards().all(
                |(_, group)| group.draining || (group.replicas.len() == 3 && !works(&after, 2))
            )
        );
        assert_eq!(
            after.node_at(&view.nodes[&NodeId(2)].address),
            Some(NodeId(4))
        );
        assert_eq!(next(&after, &lost), None, "once");
        let swapped = [(2, NodePresence::Lost { to: DirectoryId(3) })];
        assert_eq!(
            next(&view, &swapped),
            None,
            "node 3 runs there, and has not said so yet"
        );
        assert_eq!(next(&cluster(5, PlacementSpec::default()), &swapped), None);
    }

    #[test]
    fn a_node_that_dies_on_its_way_out_is_not_waited_for() {
        let view = cluster(5, PlacementSpec::default());
        let wanted: Vec<NodeSpec> = view.nodes.values().take(4).cloned().collect();
        let leaving = plan(&view, view.placement, &wanted, &BTreeSet::new())
            .expect("a plan")
            .view;
        let held = |view: &View| {
            view.shards()
                .any(|(_, group)| group.replicas.values().any(|node| *node == NodeId(5)))
        };
        assert!(held(&leaving), "its shard goes where it is");
        assert_eq!(next(&leaving, &[]), None);
        let after = next(&leaving, &[(5, LONG)]).expect("a plan");
        assert!(!held(&after) && after.evicted.is_empty());
    }

    const SHARD: GroupId = GroupId(1);

    fn failing(of: &[(GroupId, ReplicaId, u64, bool)]) -> BTreeMap<(GroupId, ReplicaId), Failing> {
        let failing =
            |(group, replica, for_ms, is_of_the_node): &(GroupId, ReplicaId, u64, bool)| {
                (
                    (*group, *replica),
                    Failing {
                        for_ms: *for_ms,
                        is_of_the_node: *is_of_the_node,
                    },
                )
            };
        of.iter().map(failing).collect()
    }

    /// The replica of the shard on that node.
    fn on(view: &View, node: u64) -> ReplicaId {
        view.replica_on(SHARD, NodeId(node)).expect("it has one")
    }

    fn replaced(
        view: &View,
        others: &[(u64, NodePresence)],
        of: &[(GroupId, ReplicaId, u64, bool)],
    ) -> Option<View> {
        let seen = seen(view, others);
        let (next, replaced) = replace_failed(view, &seen, &failing(of), REPLACE_AFTER_MS)?;
        next.check().expect("the parts fit together");
        assert!(!replaced.is_empty());
        Some(next)
    }

    #[test]
    fn a_replica_that_has_failed_for_long_is_replaced_on_its_node_under_a_new_id() {
        let view = cluster(3, PlacementSpec::default());
        let failed = on(&view, 2);
        assert_eq!(replaced(&view, &[], &[]), None);
        assert_eq!(
            replaced(&view, &[], &[(SHARD, failed, REPLACE_AFTER_MS - 1, false)]),
            None
        );
        let of = [(SHARD, failed, REPLACE_AFTER_MS, false)];
        let after = replaced(&view, &[], &of).expect("a plan");
        let group = &after.groups[&SHARD];
        assert_eq!(on(&after, 2), view.next_replica, "never given out before");
        assert_eq!(group.leaving, BTreeMap::from([(failed, NodeId(2))]));
        assert!(group.voters().contains(&view.next_replica));
        assert_eq!(
            (after.epoch.0, after.version.0),
            (view.epoch.0 + 1, view.version.0 + 1)
        );
        assert_eq!(replaced(&after, &[], &of), None, "once");
        let mut others = (after.groups.clone(), view.groups.clone());
        others.0.remove(&SHARD);
        others.1.remove(&SHARD);
        assert_eq!(others.0, others.1, "and nothing else changes");
    }

    #[test]
    fn a_replica_is_replaced_only_while_a_majority_of_its_group_is_able() {
        let view = cluster(3, PlacementSpec::default());
        let (one, two) = (on(&view, 1), on(&view, 2));
        let of = [
            (SHARD, one, REPLACE_AFTER_MS, false),
            (SHARD, two, 0, false),
        ];
        assert_eq!(replaced(&view, &[], &of), None, "two of three have failed");
        assert_eq!(
            replaced(&view, &[(3, SHORT)], &of[..1]),
            None,
            "one has failed, one is away"
        );
        let of_one = PlacementSpec::from_flags(Some(1), Some(1));
        let alone = cluster(3, of_one);
        let (replica, _) = alone.groups[&SHARD].wanted().next().expect("a replica");
        assert_eq!(
            replaced(&alone, &[], &[(SHARD, replica, REPLACE_AFTER_MS, false)]),
            None
        );
    }

    #[test]
    fn one_replica_of_a_group_is_replaced_at_a_time_and_several_groups_at_once() {
        let view = cluster(5, PlacementSpec::from_flags(Some(5), Some(2)));
        let of = view.groups.iter().flat_map(|(id, group)| {
            let failed = group.replicas.iter().filter(|(_, node)| node.0 <= 2);
            failed.map(|(replica, _)| (*id, *replica, REPLACE_AFTER_MS, false))
        });
        let of: Vec<_> = of.collect();
        let after = replaced(&view, &[], &of).expect("a plan");
        assert!(after.groups.values().all(|group| group.leaving.len() == 1));
        assert!(
            after.groups[&GroupId::META].leaving.len() == 1,
            "the meta group's too"
        );
    }

    #[test]
    fn a_node_that_fails_itself_is_given_no_new_replica() {
        let view = cluster(3, PlacementSpec::default());
        let of = [(SHARD, on(&view, 2), REPLACE_AFTER_MS, true)];
        assert_eq!(replaced(&view, &[], &of), None);
    }

    #[test]
    fn a_witness_and_a_replica_without_a_vote_stay_what_they_are() {
        let view = cluster(3, PlacementSpec::from_flags(Some(2), Some(1)));
        let witness = view.groups[&SHARD].witness.expect("a witness");
        let mut view = view;
        let reported = crate::sm::cluster::view::ReportedMembership {
            log_id: crate::types::LogId { term: 1, index: 5 },
            voters: view.groups[&SHARD].electorate(),
            learners: BTreeSet::new(),
        };
        view.groups.get_mut(&SHARD).expect("a shard").reported = Some(reported);
        let of = [(SHARD, witness.replica, REPLACE_AFTER_MS, false)];
        let after = replaced(&view, &[], &of).expect("a plan");
        let new = after.groups[&SHARD].witness.expect("a witness");
        assert_eq!((new.node, new.replica), (witness.node, view.next_replica));

        let many = cluster(6, PlacementSpec::default());
        let meta = &many.groups[&GroupId::META];
        let learner = *meta.learners.first().expect("five of six vote");
        let of = [(GroupId::META, learner, REPLACE_AFTER_MS, false)];
        let after = replaced(&many, &[], &of).expect("a plan");
        let learners = &after.groups[&GroupId::META].learners;
        assert!(!learners.contains(&learner) && learners.contains(&many.next_replica));
    }
}
