//! Names what a group lacks that has no leader or no quorum: the voters that this node hears
//! nothing of.
//!
//! For people, in the texts of failures: that "the meta group has no leader" helps nobody who does
//! not know whom to bring back.

use std::time::Duration;

use super::context::NodeContext;
use crate::api::store::Failure;
use crate::sm::cluster::view::{GroupSpec, View};
use crate::types::{GroupId, NodeId};

/// Time for which a node may be silent and still pass for one that is there. Longer than an
/// election.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// Addresses in one text.
const NAMES_MAX: usize = 8;

impl NodeContext {
    /// Returns who is missing of a group, to be put behind what follows from it; nothing where all
    /// are there.
    pub fn missing_of(&self, group: GroupId) -> String {
        let view = self.view();
        let is_there =
            |node| self.is_in_reach(node, SILENCE_MAX) && !self.registry.is_disconnected(node);
        view.groups
            .get(&group)
            .map(|of| missing(&view, group, of, is_there))
            .unwrap_or_default()
    }

    /// Returns the failure with who is missing of the meta group, if it says that something was not
    /// to be had.
    pub fn for_want_of_meta(&self, failure: Failure) -> Failure {
        let missing = self.missing_of(GroupId::META);
        match failure {
            Failure::Unavailable {
                reason,
                retry_after_ms,
            } => Failure::Unavailable {
                reason: format!("the meta group: {reason}{missing}"),
                retry_after_ms,
            },
            Failure::Unknown { reason } => Failure::Unknown {
                reason: format!("the meta group: {reason}{missing}"),
            },
            other => other,
        }
    }
}

/// Names the voters of a group that are not there, and says how many of the others a majority
/// takes.
fn missing(
    view: &View,
    id: GroupId,
    group: &GroupSpec,
    is_there: impl Fn(NodeId) -> bool,
) -> String {
    // What is committed counts: voters of the plan that are not members yet are not missed.
    let voters = match &group.reported {
        Some(reported) => reported.voters.clone(),
        None => group.creation.keys().copied().collect(),
    };
    let nodes: Vec<NodeId> = voters
        .iter()
        .filter_map(|voter| view.node_of(id, *voter))
        .collect();
    let silent: Vec<NodeId> = nodes
        .iter()
        .copied()
        .filter(|node| !is_there(*node))
        .collect();
    if silent.is_empty() {
        return String::new();
    }

    let address = |node: &NodeId| {
        view.nodes
            .get(node)
            .map_or_else(|| node.to_string(), |node| node.address.to_string())
    };

    // The line stays short, however large the group is.
    let mut names: Vec<String> = silent.iter().take(NAMES_MAX).map(address).collect();
    if silent.len() > NAMES_MAX {
        names.push(format!("{} more", silent.len() - NAMES_MAX));
    }
    let (there, all) = (voters.len() - silent.len(), voters.len());
    format!(
        ": no sign of {}; {there} of its {all} voters left, {} needed",
        names.join(", "),
        all / 2 + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::testing::view_of;

    #[test]
    fn who_is_missing_is_named_and_whether_the_others_are_enough() {
        let view = view_of(3);
        let told = |there: &[u64]| {
            let of = view.groups.get(&GroupId::META).expect("there is one");
            missing(&view, GroupId::META, of, |node| there.contains(&node.0))
        };
        let ids: Vec<u64> = view.nodes.keys().map(|id| id.0).collect();
        assert_eq!(told(&ids), "");
        assert_eq!(
            told(&ids[..1]),
            ": no sign of n2:1, n3:1; 1 of its 3 voters left, 2 needed"
        );
        assert_eq!(
            told(&ids[..2]),
            ": no sign of n3:1; 2 of its 3 voters left, 2 needed"
        );
    }
}
