//! What a leader must not do that goes by an old view, or that nobody follows any more: add a
//! replica that was retired since, or tell the meta group who the members are.

use std::sync::Arc;

use futures::future::ready;

use super::case::{accept, hosts, settle, until};
use super::host::{Host, addresses};
use super::machine::End;
use quorate::api::peer::Standing;
use quorate::api::view_change::ViewChange;
use quorate::client::remote::RemoteStore;
use quorate::sm::cluster::view::View;
use quorate::types::{Address, GroupId, NodeId, ReplicaId};

/// The view that a node goes by.
fn view_of(host: &Host) -> Option<View> {
    match host.node()?.identity().standing {
        Standing::Member { view } => Some(*view),
        Standing::Fresh { .. } | Standing::Promised { .. } | Standing::Retired { .. } => None,
    }
}

/// What the leaders answer that are asked to add the replicas of `node`, by `view`, while it has
/// them.
async fn add_all(hosts: &[Arc<Host>], view: &View, node: NodeId) -> Vec<Result<(), String>> {
    let mut answers = Vec::new();
    let replicas: Vec<(GroupId, ReplicaId)> = view
        .groups
        .iter()
        .flat_map(|(id, of)| {
            of.replicas
                .iter()
                .filter(|(_, at)| **at == node)
                .map(|(r, _)| (*id, *r))
        })
        .collect();
    for (group, replica) in replicas {
        let leader = hosts
            .iter()
            .find(|host| host.leads(group))
            .and_then(|host| host.node());
        if let Some(leader) = leader {
            answers.push(leader.add_by(view, group, replica).await);
        }
    }
    answers
}

/// A fourth node is added, stops, and is taken out again meanwhile. It comes back, and has its
/// replicas until it has put down that they are retired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retired_replica_is_not_added_by_a_leader_that_has_not_heard() {
    let all = addresses(4);
    let hosts = hosts(&all, &all[..3], 1);
    for host in &hosts {
        host.watch(Arc::new(|_| Box::pin(ready(()))));
        host.start();
    }
    let store = RemoteStore::connect(all[..3].to_vec()).expect("a client");
    let change = async |nodes: &[Address]| {
        let change = ViewChange {
            nodes: Some(nodes.to_vec()),
            ..ViewChange::default()
        };
        let epoch = accept(&store, &change).await.expect("accepted");
        settle(&store, epoch).await.expect("settled");
    };
    change(&all).await;
    // Also to the fourth, which must have nothing to put down when it starts again.
    let known = async || {
        let views = [view_of(&hosts[0]), view_of(&hosts[3])];
        views[0] == views[1]
            && views[0]
                .as_ref()
                .is_some_and(|view| view.is_settled() && view.node_at(&all[3]).is_some())
    };
    until("the view is known", known).await.expect("known");
    let old = view_of(&hosts[3]).expect("it is a member");
    let node = old.node_at(&all[3]).expect("it is in the view");
    hosts[3].end(End::Kill);
    hosts[3].bury();
    change(&all[..3]).await;
    hosts[3].hold();
    hosts[3].start();
    let mut told = Vec::new();
    let looked = until("a leader has looked for it", async || {
        told = add_all(&hosts[..3], &old, node).await;
        told.iter().any(|answer| {
            answer
                .as_ref()
                .err()
                .is_none_or(|reason| reason.contains("not wanted any more"))
        })
    });
    looked
        .await
        .unwrap_or_else(|error| panic!("{error}: {told:?}"));
    assert!(told.iter().all(Result::is_err), "{told:?}");
    for host in &hosts {
        host.end(End::Kill);
        host.bury();
    }
}

/// Others may lead by now, with other members.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_no_quorum_follows_reports_nothing() {
    let all = addresses(5);
    let hosts = hosts(&all, &all, 1);
    for host in &hosts {
        host.watch(Arc::new(|_| Box::pin(ready(()))));
        host.start();
    }
    let mut known = None;
    let founded = until("every group is led", async || {
        let is_led = |group: &GroupId| hosts.iter().any(|host| host.leads(*group));
        known = view_of(&hosts[0]).filter(|view| view.groups.keys().all(is_led));
        known.is_some()
    });
    founded.await.expect("founded");
    let view = known.expect("it was known");
    // Not the meta group's majority: that is still there to be told.
    let (group, of) = view.shards().next().expect("a shard");
    let leader = hosts
        .iter()
        .position(|host| host.leads(group))
        .expect("it was led");
    let node = hosts[leader].node().expect("it is up");
    until("with a quorum it tells", async || {
        node.report(&view, group).await.is_ok()
    })
    .await
    .expect("told");
    let others = of.replicas.values().filter_map(|node| {
        hosts
            .iter()
            .position(|host| view.node_at(host.address()) == Some(*node))
    });
    let others: Vec<usize> = others.filter(|n| *n != leader).collect();
    assert_eq!(others.len(), 2);
    for n in others {
        hosts[n].end(End::Kill);
        hosts[n].bury();
    }
    let told = node.report(&view, group).await;
    assert!(told.is_err(), "it told, with nobody behind it");
    drop(node);
    for host in &hosts {
        host.end(End::Kill);
        host.bury();
    }
}
