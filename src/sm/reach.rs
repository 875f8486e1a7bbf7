//! Decides whether a leader that its peers can't connect to should hand over.
//!
//! What is proxied at the other nodes goes to the leader by a connection of theirs. A leader that
//! reaches them and that they do not reach could lead for ever, and answer nobody but its own
//! clients.

use std::collections::BTreeSet;

use crate::types::NodeId;

/// Returns whether a leader should hand over: most of the other voters said that they can't connect
/// to its node, and those that it hears of are a quorum without it.
///
/// `others` are the nodes of the other voters. A node that only some can't connect to goes on: the
/// others pass on what is asked of it.
pub fn should_hand_over(
    others: &[NodeId],
    cannot_connect: &BTreeSet<NodeId>,
    is_heard: impl Fn(NodeId) -> bool,
) -> bool {
    let cut_off = others
        .iter()
        .filter(|node| cannot_connect.contains(node))
        .count();
    let heard = others.iter().filter(|node| is_heard(**node)).count();
    let voters = others.len() + 1;
    let quorum = voters / 2 + 1;

    // It can't be sent anything afterwards: the others have to be enough.
    2 * cut_off > others.len() && heard >= quorum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(others: &[u64], cannot_connect: &[u64], heard: &[u64]) -> bool {
        let nodes = |ids: &[u64]| ids.iter().copied().map(NodeId).collect::<Vec<_>>();
        let cannot_connect = nodes(cannot_connect).into_iter().collect();
        should_hand_over(&nodes(others), &cannot_connect, |node| {
            heard.contains(&node.0)
        })
    }

    #[test]
    fn a_leader_hands_over_when_most_of_the_others_cannot_connect_to_it() {
        assert!(decide(&[2, 3], &[2, 3], &[2, 3]));
        assert!(
            !decide(&[2, 3], &[2], &[2, 3]),
            "the other one passes requests on"
        );
        assert!(decide(&[2, 3, 4, 5], &[2, 3, 4], &[2, 3, 4, 5]));
        assert!(!decide(&[2, 3, 4, 5], &[2, 3], &[2, 3, 4, 5]));
        assert!(
            !decide(&[2, 3], &[7, 8, 9], &[2, 3]),
            "those are of other groups"
        );
    }

    #[test]
    fn a_leader_that_the_others_need_for_a_quorum_stays() {
        assert!(!decide(&[2], &[2], &[2]), "one of two");
        assert!(!decide(&[2, 3], &[2, 3], &[2]), "the third is away");
        assert!(!decide(&[], &[], &[]), "the only voter");
    }
}
