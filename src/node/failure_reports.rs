//! [`FailureReports`]: the nodes that have said lately that replicas have failed there.
//!
//! A node with failed replicas tells every node that votes in the meta group, again and again
//! (`controllers::failure_reporter`). On the one that leads it, `controllers::node_replacement`
//! asks that node what has failed, and believes only its answer. No other node is asked, so a
//! healthy cluster pays nothing.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::api::peer::FailedReplica;
use crate::sm::cluster::repair::Failing;
use crate::sm::cluster::view::View;
use crate::types::{Address, DirectoryId, GroupId, NodeId, ReplicaId};

/// A report that was not repeated for so long counts no more.
const REPORT_LASTS: Duration = Duration::from_secs(10);

/// Times at which nodes have last said that replicas have failed there.
#[derive(Default)]
pub struct FailureReports(Mutex<BTreeMap<NodeId, Instant>>);

impl FailureReports {
    /// Takes the report of the node with that directory. Returns false if the view has none.
    pub fn take(&self, view: &View, directory: DirectoryId) -> bool {
        let mut nodes = view.nodes.iter();
        let Some((node, _)) = nodes.find(|(_, node)| node.directory == directory) else {
            return false;
        };
        let mut reports = self.0.lock();
        reports.retain(|node, at| view.nodes.contains_key(node) && at.elapsed() < REPORT_LASTS);
        reports.insert(*node, Instant::now());
        true
    }

    /// Returns the nodes that have said so lately.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        let reports = self.0.lock();
        let recent = reports.iter().filter(|(_, at)| at.elapsed() < REPORT_LASTS);
        recent.map(|(node, _)| *node).collect()
    }
}

/// Answers of nodes to the question which of their replicas have failed.
pub type FailedByNode = BTreeMap<NodeId, Vec<FailedReplica>>;

/// Returns what was told of replicas that the view has where they were told of.
pub fn failing_replicas(
    view: &View,
    told: &FailedByNode,
) -> BTreeMap<(GroupId, ReplicaId), Failing> {
    let all = told
        .iter()
        .flat_map(|(node, failed)| failed.iter().map(|replica| (*node, replica)));

    // A node speaks for the replicas that the view has on it, and for no others.
    let here =
        all.filter(|(node, replica)| view.node_of(replica.group, replica.replica) == Some(*node));
    let failing = here.map(|(_, replica)| {
        let is_of_the_node = replica.cause.is_node_failure();
        let failing = Failing {
            for_ms: replica.for_ms,
            is_of_the_node,
        };
        ((replica.group, replica.replica), failing)
    });
    failing.collect()
}

/// Returns the nodes on which replicas fail for a reason that is the node's.
pub fn failing_nodes(told: &FailedByNode) -> BTreeSet<NodeId> {
    let fails =
        |failed: &Vec<FailedReplica>| failed.iter().any(|replica| replica.cause.is_node_failure());
    told.iter()
        .filter(|(_, failed)| fails(failed))
        .map(|(node, _)| *node)
        .collect()
}

/// Returns where the other nodes are that may lead the meta group.
pub fn meta_voters(view: &View, but: NodeId) -> Vec<Address> {
    let meta = view.groups.get(&GroupId::META);
    let voters = meta.into_iter().flat_map(|meta| {
        let voters = meta.voters();
        meta.replicas
            .iter()
            .filter(move |(replica, _)| voters.contains(replica))
    });
    let nodes = voters.map(|(_, node)| *node).filter(|node| *node != but);
    nodes
        .filter_map(|node| Some(view.nodes.get(&node)?.address.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::recovery::FailureCause;
    use crate::sm::testing::view_of;

    const SHARD: GroupId = GroupId(1);

    fn failed(replica: ReplicaId, cause: FailureCause) -> FailedReplica {
        FailedReplica {
            group: SHARD,
            replica,
            cause,
            for_ms: 7,
            reason: "why".to_owned(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_repeated_counts_no_more_and_a_stranger_is_not_heard() {
        let (view, reports) = (view_of(3), FailureReports::default());
        assert!(!reports.take(&view, DirectoryId(77)));
        assert!(reports.nodes().is_empty());
        assert!(reports.take(&view, DirectoryId(2)));
        assert_eq!(reports.nodes(), BTreeSet::from([NodeId(2)]));
        tokio::time::advance(REPORT_LASTS).await;
        assert!(reports.nodes().is_empty());
    }

    #[test]
    fn a_node_can_tell_only_of_its_own_replicas() {
        let view = view_of(3);
        let on = |node| view.replica_on(SHARD, NodeId(node)).expect("it has one");
        let all = vec![
            failed(on(2), FailureCause::Damaged),
            failed(on(3), FailureCause::Damaged),
        ];
        let told = FailedByNode::from([(NodeId(2), all)]);
        let expected = Failing {
            for_ms: 7,
            is_of_the_node: false,
        };
        let failing = failing_replicas(&view, &told);
        assert_eq!(failing, BTreeMap::from([((SHARD, on(2)), expected)]));
        assert!(failing_nodes(&told).is_empty());
        let full = FailedByNode::from([(NodeId(2), vec![failed(on(2), FailureCause::DiskFull)])]);
        assert_eq!(failing_nodes(&full), BTreeSet::from([NodeId(2)]));
    }

    #[test]
    fn every_other_voter_of_the_meta_group_is_told() {
        assert_eq!(meta_voters(&view_of(3), NodeId(2)).len(), 2);
    }
}
