//! What comes from a node of another cluster, at an address that was somebody else's, changes
//! nothing and is answered by nothing.

use std::sync::Arc;

use futures::future::ready;

use super::case::{hosts, until};
use super::host::{Host, addresses};
use super::machine::End;
use quorate::api::peer::Announcement;
use quorate::api::protocol::{Hop, ShardBody, ShardReply, ShardRequest};
use quorate::api::store::{Consistency, Failure};
use quorate::node::Node;
use quorate::routing::peer_caller::{PeerCaller, PeerError};
use quorate::sm::cluster::meta;
use quorate::sm::cluster::view::View;
use quorate::types::{ClusterId, DirectoryId, GroupId};

/// What the node says the view is, once it leads the meta group.
async fn led_view(host: &Arc<Host>) -> View {
    let mut view = None;
    let led = until("it leads", async || {
        let Some(node) = host.node() else {
            return false;
        };
        view = node.view().await.ok();
        view.is_some()
    });
    led.await.expect("it leads");
    view.expect("it was led")
}

async fn ask(node: &Node, cluster: ClusterId, shard: GroupId) -> ShardReply {
    let body = ShardBody::Get {
        key: "k".into(),
        consistency: Consistency::Linearizable,
    };
    node.answer(
        ShardRequest {
            cluster,
            shard,
            timeout_ms: 5000,
            body,
        },
        Hop::Answer,
    )
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_changes_nothing_and_is_told_nothing() {
    let all = addresses(1);
    let hosts = hosts(&all, &all, 1);
    hosts[0].watch(Arc::new(|_| Box::pin(ready(()))));
    hosts[0].start();
    let (ours, stranger) = (led_view(&hosts[0]).await, ClusterId(7));
    let node = hosts[0].node().expect("it is up");
    let shard = ours.shards().map(|(id, _)| id).next().expect("a shard");
    let id = *ours.nodes.keys().next().expect("a node");
    until("it serves", async || {
        matches!(ask(&node, ours.cluster, shard).await, ShardReply::Got(_))
    })
    .await
    .expect("it serves");
    let answer = ask(&node, stranger, shard).await;
    assert!(
        matches!(
            &answer,
            ShardReply::Failed(Failure::Invalid { reason }) if reason.contains("cluster")
        ),
        "{answer:?}"
    );

    // What the cluster itself may say, in the name of another.
    let command = meta::MetaCommand::Announce {
        node: id,
        directory: ours.nodes[&id].directory,
        address: "elsewhere:1".parse().expect("an address"),
        public_address: None,
    };
    let answer = node
        .announce(Announcement {
            cluster: stranger,
            command: command.clone(),
        })
        .await;
    assert!(
        matches!(&answer, Err(Failure::Invalid { reason }) if reason.contains("cluster")),
        "{answer:?}"
    );
    assert_eq!(node.view().await.expect("it leads").nodes, ours.nodes);
    assert_eq!(
        node.announce(Announcement {
            cluster: ours.cluster,
            command
        })
        .await,
        Ok(meta::MetaOutcome::Done)
    );

    let (caller, wait) = (
        PeerCaller::new().expect("a client"),
        super::history::options().timeout,
    );
    assert_eq!(
        caller
            .view(&all[0], ours.cluster, wait)
            .await
            .expect("an answer")
            .cluster,
        ours.cluster
    );
    let view = caller.view(&all[0], stranger, wait).await;
    assert!(
        matches!(view, Err(PeerError::AnotherNode { .. })),
        "{view:?}"
    );
    let mut there = ours.nodes[&id].clone();
    assert!(
        !caller
            .replicas(&there, wait)
            .await
            .expect("an answer")
            .is_empty()
    );
    there.directory = DirectoryId(7);
    let replicas = caller.replicas(&there, wait).await;
    assert!(
        matches!(replicas, Err(PeerError::AnotherNode { .. })),
        "{replicas:?}"
    );
    hosts[0].end(End::Kill);
    hosts[0].bury();
}
