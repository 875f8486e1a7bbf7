//! Which nodes are given up, and taken back: from how each was seen to the plan that follows, if one is due.
//!
//! Decided where the meta group is led, from what that node sees; the meta group then agrees on the plan like on any other. Kept out: looking
//! at nodes, and time. What always holds: a node is given up only while others enough are left for what is asked, and never when most are
//! away at once, since then it is rather the deciding node that is cut off.

use std::collections::{BTreeMap, BTreeSet};

use super::placement::{Planned, plan};
use super::view::{Node, View};
use crate::types::{DirectoryId, NodeId};

/// How a node is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It has been in reach for so long.
    Here { for_ms: u64 },
    /// It has been out of reach for so long.
    Away { for_ms: u64 },
    /// A fresh data directory, one of no cluster, answers under its address: what it held is lost.
    Lost { to: DirectoryId },
}

/// The nodes that a plan should not count on: those away for `replace_after_ms`, and those already out that are still away.
pub fn out_of_reach(view: &View, seen: &BTreeMap<NodeId, Seen>, replace_after_ms: u64) -> BTreeSet<NodeId> {
    let is_out = |id: &NodeId| match seen.get(id) {
        Some(Seen::Away { for_ms }) => *for_ms >= replace_after_ms || view.out.contains(id),
        Some(Seen::Lost { to }) => is_fresh(view, *to),
        Some(Seen::Here { .. }) => false,
        None => view.out.contains(id),
    };
    view.nodes.keys().filter(|id| is_out(id)).copied().collect()
}

/// The plan by which lost nodes are replaced at once, nodes that were away for `replace_after_ms` give up their work, and those that have
/// been back as long get some; none if there is nothing to do, or when that should be left to people.
pub fn next_plan(view: &View, seen: &BTreeMap<NodeId, Seen>, replace_after_ms: u64) -> Option<Planned> {
    if are_most_away(view, seen) {
        return None;
    }
    let mut out = out_of_reach(view, seen, replace_after_ms);
    let is_back = |id: &NodeId| matches!(seen.get(id), Some(Seen::Here { for_ms }) if *for_ms >= replace_after_ms);
    out.extend(view.out.iter().filter(|id| !is_back(id)));
    let wanted: Vec<Node> = view.staying().map(|(id, node)| successor(view, node, seen.get(&id))).collect();
    let planned = plan(view, view.asked, &wanted, &out).ok()?;
    (!planned.is_same).then_some(planned)
}

/// Whether more than half of the nodes that have work are away or lost.
fn are_most_away(view: &View, seen: &BTreeMap<NodeId, Seen>) -> bool {
    let working: Vec<NodeId> = view.staying().map(|(id, _)| id).filter(|id| !view.out.contains(id)).collect();
    let is_away = |id: &&NodeId| match seen.get(id) {
        Some(Seen::Away { .. }) => true,
        Some(Seen::Lost { to }) => is_fresh(view, *to),
        Some(Seen::Here { .. }) | None => false,
    };
    working.iter().filter(is_away).count() * 2 > working.len()
}

/// The node that is to be in the place of `node`.
fn successor(view: &View, node: &Node, seen: Option<&Seen>) -> Node {
    match seen {
        Some(Seen::Lost { to }) if !view.nodes.values().any(|known| known.directory == *to) => {
            Node { directory: *to, ..node.clone() }
        }
        Some(Seen::Lost { .. } | Seen::Here { .. } | Seen::Away { .. }) | None => node.clone(),
    }
}

/// Whether the view does not know this directory. One that it knows is a node that runs elsewhere than it last said.
fn is_fresh(view: &View, directory: DirectoryId) -> bool {
    !view.nodes.values().any(|known| known.directory == directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::placement::first_view;
    use crate::sm::view::Asked;
    use crate::types::ClusterId;

    const REPLACE_AFTER_MS: u64 = 300_000;
    const LONG: Seen = Seen::Away { for_ms: REPLACE_AFTER_MS };
    const SHORT: Seen = Seen::Away { for_ms: REPLACE_AFTER_MS - 1 };

    fn cluster(count: u32, asked: Asked) -> View {
        let node = |number: u32| {
            let address = format!("n{number}:1").parse().expect("an address");
            Node { address, public_address: None, directory: DirectoryId(u128::from(number)) }
        };
        first_view(ClusterId(1), asked, (1..=count).map(node).collect()).expect("a view")
    }

    /// All nodes are here, but for these.
    fn seen(view: &View, others: &[(u64, Seen)]) -> BTreeMap<NodeId, Seen> {
        let here = view.nodes.keys().map(|id| (*id, Seen::Here { for_ms: 1000 }));
        here.chain(others.iter().map(|(id, seen)| (NodeId(*id), *seen))).collect()
    }

    fn next(view: &View, others: &[(u64, Seen)]) -> Option<View> {
        let planned = next_plan(view, &seen(view, others), REPLACE_AFTER_MS)?;
        planned.view.check().expect("the parts fit together");
        Some(planned.view)
    }

    fn out(view: &View) -> Vec<u64> {
        view.out.iter().map(|id| id.0).collect()
    }

    fn works(view: &View, node: u64) -> bool {
        view.shards().any(|(_, group)| group.replicas.values().any(|at| *at == NodeId(node)))
    }

    #[test]
    fn a_node_away_for_long_gives_up_its_work() {
        let view = cluster(5, Asked::default());
        assert_eq!(next(&view, &[]), None);
        assert_eq!(next(&view, &[(2, SHORT)]), None);
        let after = next(&view, &[(2, LONG), (3, SHORT)]).expect("a plan");
        assert_eq!(out(&after), [2]);
        assert!(!works(&after, 2) && works(&after, 3));
        assert_eq!(next(&after, &[(2, LONG)]), None, "once");
        assert_eq!(next(&after, &[(2, SHORT)]), None, "also after whoever decides has begun to count anew");
    }

    #[test]
    fn a_node_is_kept_when_there_are_not_others_enough() {
        assert_eq!(next(&cluster(3, Asked::default()), &[(2, LONG)]), None, "three replicas need three nodes");
        assert_eq!(next(&cluster(6, Asked::from_flags(Some(3), None)), &[(2, LONG)]), None, "two shards of three need six");
        let view = cluster(4, Asked::default());
        let after = next(&view, &[(2, LONG)]).expect("a plan");
        assert_eq!(next(&after, &[(2, LONG), (3, LONG)]), None, "nor does the second go");
        let both = next(&view, &[(2, LONG), (3, LONG)]).expect("a plan");
        assert_eq!(both.out.len(), 1, "one of the two is counted on");
    }

    #[test]
    fn when_most_are_away_nothing_is_done() {
        let asked = Asked::from_flags(Some(1), Some(5));
        let view = cluster(5, asked);
        assert_eq!(next(&view, &[(1, LONG), (2, LONG), (3, SHORT)]), None);
        let after = next(&view, &[(1, LONG), (2, LONG)]).expect("a plan");
        assert_eq!(out(&after), [1, 2]);
        let after = next(&after, &[(1, LONG), (2, LONG), (3, LONG)]).expect("one of three at work is not most of them");
        assert_eq!(out(&after), [1, 2, 3]);
    }

    #[test]
    fn a_node_that_came_back_to_stay_gets_work_again() {
        let view = next(&cluster(5, Asked::default()), &[(2, LONG)]).expect("a plan");
        assert_eq!(next(&view, &[]), None, "it may go again");
        assert_eq!(
            out_of_reach(&view, &seen(&view, &[]), REPLACE_AFTER_MS),
            BTreeSet::new(),
            "a plan of the operator's takes it"
        );
        let back = Seen::Here { for_ms: REPLACE_AFTER_MS };
        let after = next(&view, &[(2, back)]).expect("a plan");
        assert!(after.out.is_empty() && works(&after, 2));
    }

    #[test]
    fn a_lost_directory_is_replaced_at_once() {
        let view = cluster(3, Asked::default());
        let lost = [(2, Seen::Lost { to: DirectoryId(22) })];
        let after = next(&view, &lost).expect("a plan");
        assert_eq!(after.leaving, BTreeSet::from([NodeId(2)]));
        assert_eq!(after.nodes[&NodeId(4)].directory, DirectoryId(22));
        assert!(after.shards().all(|(_, group)| group.ends || (group.replicas.len() == 3 && !works(&after, 2))));
        assert_eq!(after.node_at(&view.nodes[&NodeId(2)].address), Some(NodeId(4)));
        assert_eq!(next(&after, &lost), None, "once");
        let swapped = [(2, Seen::Lost { to: DirectoryId(3) })];
        assert_eq!(next(&view, &swapped), None, "node 3 runs there, and has not said so yet");
        assert_eq!(next(&cluster(5, Asked::default()), &swapped), None);
    }

    #[test]
    fn a_node_that_dies_on_its_way_out_is_not_waited_for() {
        let view = cluster(5, Asked::default());
        let wanted: Vec<Node> = view.nodes.values().take(4).cloned().collect();
        let leaving = plan(&view, view.asked, &wanted, &BTreeSet::new()).expect("a plan").view;
        let held = |view: &View| view.shards().any(|(_, group)| group.replicas.values().any(|node| *node == NodeId(5)));
        assert!(held(&leaving), "its shard goes where it is");
        assert_eq!(next(&leaving, &[]), None);
        let after = next(&leaving, &[(5, LONG)]).expect("a plan");
        assert!(!held(&after) && after.out.is_empty());
    }
}
