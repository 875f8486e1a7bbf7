//! A node that has no descriptor for its maps: it goes on without them, sends nobody back to
//! itself, and opens them by itself once it has.

use std::sync::Arc;

use futures::future::ready;

use super::case::{hosts, until};
use super::host::addresses;
use super::machine::End;
use quorate::api::store::{Failure, Options, Routing, Store};
use quorate::types::GroupId;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_found_no_descriptor_is_opened_once_there_is_one() {
    let all = addresses(3);
    let hosts = hosts(&all, &all, 1);
    for host in &hosts {
        host.watch(Arc::new(|_| Box::pin(ready(()))));
        host.start();
    }
    let shard = GroupId(1);
    until("a shard is led", async || {
        hosts.iter().any(|host| host.leads(shard))
    })
    .await
    .expect("a leader");
    until("all have it", async || {
        hosts.iter().all(|host| host.group(shard).is_some())
    })
    .await
    .expect("all");
    let victim = hosts
        .iter()
        .find(|host| host.leads(shard))
        .expect("a leader");

    victim.end(End::Kill);
    victim.bury();
    victim.take_descriptors(true);
    victim.start();
    let others: Vec<_> = hosts
        .iter()
        .filter(|host| host.address() != victim.address())
        .collect();
    until("another leads", async || {
        others.iter().any(|host| host.leads(shard))
    })
    .await
    .expect("a leader");
    until("it is back", async || victim.group(GroupId::META).is_some())
        .await
        .expect("it is back");
    let options = Options {
        routing: Routing::Redirect,
        ..super::history::options()
    };
    let mut asked = 0;
    until("it sends clients to another", async || {
        let node = victim.node().expect("it is up");
        match node.get("k".into(), options).await {
            Err(Failure::Elsewhere { address, .. }) => {
                assert_ne!(address, *victim.address(), "it sends them back");
                asked += 1;
            }
            Err(Failure::Unavailable { .. }) => {}
            other => panic!("it has no map to answer from: {other:?}"),
        }
        asked > 5
    })
    .await
    .expect("a redirect");
    assert!(
        victim.group(shard).is_none(),
        "there was no descriptor for it"
    );

    victim.take_descriptors(false);
    until("it opens its map", async || victim.group(shard).is_some())
        .await
        .expect("the map");
    for host in &hosts {
        assert_eq!(*host.failed.lock(), None, "{} has stopped", host.address());
        host.end(End::Kill);
        host.bury();
    }
}
