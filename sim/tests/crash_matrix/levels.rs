//! Two levels in one cluster: it is upgraded node by node under load, goes back where it still can,
//! and takes no program any more that knows less once its level is raised.

use std::sync::Arc;
use std::time::Duration;

use futures::future::ready;
use tokio_util::sync::CancellationToken;

use super::case::{accept, settle, until};
use super::history::{History, options};
use super::host::{Host, addresses};
use super::machine::End;
use quorate::api::peer::HoldRequest;
use quorate::api::protocol::ClusterStatus;
use quorate::api::store::Store;
use quorate::api::view_change::ViewChange;
use quorate::client::remote::RemoteStore;
use quorate::routing::peer_caller::PeerCaller;
use quorate::sm::cluster::view::PlacementSpec;
use quorate::sm::level::{LEVEL, TooOld};
use quorate::types::{Address, GroupId};

/// What the first programs spoke, which knew no levels.
const OLD: Option<u16> = Some(0);

/// Ends the node and starts it again as a program that speaks so.
fn restart(host: &Host, level_max: Option<u16>) {
    host.end(End::Kill);
    host.bury();
    host.speak(level_max);
    host.start();
}

async fn status_when(
    store: &RemoteStore,
    what: &str,
    holds: impl Fn(&ClusterStatus) -> bool,
) -> ClusterStatus {
    let mut last = None;
    let found = until(what, async || {
        last = store.status().await.ok();
        last.as_ref().is_some_and(&holds)
    });
    let found = found.await;
    found.unwrap_or_else(|error| panic!("{error}: {last:#?}"));
    last.expect("it was just there")
}

fn speaking(status: &ClusterStatus) -> Vec<Option<u16>> {
    status.nodes.iter().map(|node| node.speaks).collect()
}

fn naming(nodes: &[Address]) -> ViewChange {
    ViewChange {
        nodes: Some(nodes.to_vec()),
        ..ViewChange::default()
    }
}

/// Writes and reads until it is over.
async fn load(store: Arc<RemoteStore>, history: Arc<History>, over: CancellationToken) {
    let mut n = 0u64;
    while !over.is_cancelled() {
        n += 1;
        let key = format!("key-{}", n % 7);
        history.put(&*store, &key, &n.to_string()).await;
        history.get(&*store, &key).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_upgraded_node_by_node_under_load_and_goes_back_until_its_level_is_raised() {
    let all = addresses(4);
    // One shard, whose slots move nowhere: what is looked at here is who may be in the cluster.
    let asked = PlacementSpec {
        shards: Some(1),
        ..PlacementSpec::default()
    };
    let host =
        |(n, address): (u64, &Address)| Host::new(address.clone(), all[..3].to_vec(), asked, n);
    let hosts: Vec<Arc<Host>> = (1..).zip(&all).map(host).collect();
    for host in &hosts {
        host.watch(Arc::new(|_| Box::pin(ready(()))));
        host.speak(OLD);
        host.start();
    }
    let store = Arc::new(RemoteStore::connect(all[..3].to_vec()).expect("a client"));
    let (history, over) = (Arc::new(History::default()), CancellationToken::new());
    let founded = status_when(&store, "it is founded", |status| {
        speaking(status) == [Some(0); 3]
    })
    .await;
    assert_eq!(founded.level, 0);
    let loading = tokio::spawn(load(store.clone(), history.clone(), over.clone()));

    restart(&hosts[0], None);
    status_when(&store, "one is new", |status| {
        speaking(status).contains(&Some(LEVEL))
    })
    .await;
    let peers = PeerCaller::new().expect("a client");
    let hold = async |hold| {
        let request = HoldRequest {
            cluster: founded.cluster,
            hold,
        };
        let held = async || {
            peers
                .hold_level(&all[0], &request, Duration::from_secs(2))
                .await
                .is_ok()
        };
        until("the node takes it", held).await.expect("taken");
    };
    hold(true).await;
    for level_max in [None, OLD, None] {
        restart(&hosts[1], level_max);
        let speaks = level_max.unwrap_or(LEVEL);
        status_when(&store, "it is back", |status| {
            status
                .nodes
                .iter()
                .any(|node| node.address == all[1] && node.speaks == Some(speaks))
        })
        .await;
    }
    restart(&hosts[2], None);
    let held = status_when(&store, "all are new", |status| {
        speaking(status) == [Some(LEVEL); 3]
    })
    .await;
    assert!(
        held.level == 0 && held.nodes.iter().any(|node| node.holds_level),
        "{held:#?}"
    );

    // As long as the level is not raised, an older program can still be added.
    let epoch = accept(&store, &naming(&all)).await.expect("accepted");
    settle(&store, epoch).await.expect("settled");
    let four = status_when(&store, "all answer", |status| {
        !speaking(status).contains(&None)
    })
    .await;
    assert_eq!(
        (
            four.level,
            speaking(&four)
                .iter()
                .filter(|speaks| **speaks == OLD)
                .count()
        ),
        (0, 1)
    );
    let epoch = accept(&store, &naming(&all[..3])).await.expect("accepted");
    settle(&store, epoch).await.expect("settled");

    hold(false).await;
    status_when(&store, "the level is raised", |status| {
        status.level == LEVEL
    })
    .await;
    let sentence = TooOld::new(LEVEL, 0).to_string();
    let refused = until("an older program is refused", async || {
        match store.change_view(naming(&all), None, options()).await {
            Ok(accepted) => panic!("it was accepted: {accepted:?}"),
            Err(error) => error
                .to_string()
                .contains(&format!("{} can't be added: {sentence}", all[3])),
        }
    });
    refused.await.expect("refused");

    until("the stamp is of the level", async || {
        hosts[2]
            .node()
            .is_some_and(|node| node.identity().level == LEVEL)
    })
    .await
    .expect("stamped");
    restart(&hosts[2], OLD);
    let said = || hosts[2].failed.lock().clone();
    until("it does not start any more", async || said().is_some())
        .await
        .expect("it ended");
    assert_eq!(said(), Some(sentence));
    hosts[2].end(End::Kill);
    restart(&hosts[2], None);

    status_when(&store, "all are back", |status| {
        speaking(status) == [Some(LEVEL); 3]
    })
    .await;
    over.cancel();
    loading.await.expect("no panic");
    assert!(history.acknowledged() > 0);
    until("a write is taken", async || {
        history.put(&*store, "last", "one").await
    })
    .await
    .expect("written");
    for n in 0..7 {
        let key = format!("key-{n}");
        until("it is read", async || history.get(&*store, &key).await)
            .await
            .expect("read");
    }
    history.check().expect("nothing lost, nothing stale");
    assert!(
        hosts[0]
            .groups()
            .iter()
            .any(|group| group.key().group != GroupId::META)
    );
    for host in &hosts {
        host.end(End::Kill);
        host.bury();
    }
}
