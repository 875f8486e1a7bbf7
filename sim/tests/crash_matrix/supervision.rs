//! Nodes of which a part panics or hangs, and nodes whose disk hangs or is slow: it is noticed, by
//! what is said here, and nothing that others need stays with them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::ready;
use tokio::time::{Instant, sleep, timeout};

use super::case::{hosts, until};
use super::history::options;
use super::host::{Host, addresses};
use super::machine::{End, Trouble};
use quorate::api::store::{Options, Routing, Store};
use quorate::client::remote::RemoteStore;
use quorate::sm::kv::{Action, Condition, Media, Operation};
use quorate::sm::slots::slot_of;
use quorate::supervisor::testing::PartFault;
use quorate::types::GroupId;

const KEY: &str = "key";
/// Far beyond what it takes on any machine: only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

struct Cluster {
    hosts: Vec<Arc<Host>>,
    store: RemoteStore,
    /// The shard of the key.
    shard: GroupId,
}

impl Cluster {
    async fn start(seed: u64) -> Self {
        let all = addresses(3);
        let hosts = hosts(&all, &all, seed);
        for host in &hosts {
            host.watch(Arc::new(|_| Box::pin(ready(()))));
            host.start();
        }
        let store = RemoteStore::connect(all).expect("a client");
        until("it is founded", async || store.status().await.is_ok())
            .await
            .expect("founded");
        let slots = store.status().await.expect("a status").slots;
        let cluster = Self {
            hosts,
            store,
            shard: slots.owner(slot_of(KEY.as_bytes())),
        };
        cluster.write(PATIENCE).await;
        cluster
    }

    async fn try_write(&self, store: &impl Store, options: Options) -> bool {
        let action = Action::Put {
            media: Media::Text,
            value: Bytes::from_static(b"value"),
        };
        let put = Operation {
            key: KEY.into(),
            condition: Condition::None,
            action,
        };
        store
            .write(vec![put], None, options)
            .await
            .remove(0)
            .is_ok()
    }

    /// Writes until it is acknowledged. Returns how long that took.
    async fn write(&self, patience: Duration) -> Duration {
        let began = Instant::now();
        let written = async {
            while !self.try_write(&self.store, options()).await {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(patience, written)
            .await
            .expect("a write is acknowledged");
        began.elapsed()
    }

    async fn leader(&self) -> Arc<Host> {
        let leads = || {
            self.hosts
                .iter()
                .find(|host| host.leads(self.shard))
                .cloned()
        };
        until("it is led", async || leads().is_some())
            .await
            .expect("led");
        leads().expect("it was just led")
    }

    fn end(self) {
        for host in &self.hosts {
            host.set_disk_fault(None);
            host.end(End::Kill);
            host.bury();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_any_part_of_a_node_ends_it_with_the_name_of_the_part() {
    let cluster = Cluster::start(31).await;
    let tasks = [
        "agreement",
        "balancer",
        "compactor",
        "disk-watch",
        "election timer",
        "greeter",
        "janitor",
        "lane",
        "levels",
        "memberships",
        "migrator",
        "monitor of a replica",
        "news",
        "openraft",
        "proposer",
        "reads",
        "reconciler",
        "repair",
        "watchdog",
    ];
    let threads = [("log-writer", "log"), ("checkpointer", "redo")];
    let victim = &cluster.hosts[0];
    for part in tasks.into_iter().chain(threads.map(|(thread, _)| thread)) {
        until("it takes part", async || {
            victim.group(cluster.shard).is_some()
        })
        .await
        .expect("a replica");
        let mut ended = victim.ended();
        match threads.iter().find(|(thread, _)| *thread == part) {
            Some((_, directory)) => victim.set_disk_fault(Some((Trouble::Panics, directory))),
            None => victim.supervisor().put_in(part, PartFault::Panics),
        }
        // Some of what is to panic has nothing to do else.
        let noticed = async {
            while ended.borrow_and_update().is_none() {
                drop(
                    timeout(
                        Duration::from_secs(1),
                        cluster.try_write(&cluster.store, options()),
                    )
                    .await,
                );
            }
        };
        timeout(PATIENCE, noticed)
            .await
            .unwrap_or_else(|_| panic!("the panic of {part} is not noticed"));
        assert_eq!(ended.borrow().as_ref().map(|ended| ended.part), Some(part));

        // As the process does.
        victim.end(End::Kill);
        victim.bury();
        victim.set_disk_fault(None);
        victim.start();
    }
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_hangs_steps_down_and_is_not_given_the_lead_back() {
    let cluster = Cluster::start(32).await;
    let victim = cluster.leader().await;
    victim.set_disk_fault(Some((Trouble::Hangs, "log")));
    let began = Instant::now();
    until("another leads", async || {
        cluster.write(PATIENCE).await;
        cluster
            .hosts
            .iter()
            .any(|host| !Arc::ptr_eq(host, &victim) && host.leads(cluster.shard))
    })
    .await
    .expect("it steps down");
    let gone_after = began.elapsed();
    let next = cluster.write(PATIENCE).await;
    println!("it stepped down after {gone_after:?}, and the next write took {next:?}");
    assert!(!victim.leads(cluster.shard), "it says that it leads");
    let said = victim
        .node()
        .expect("it is up")
        .ready()
        .expect_err("it is not ready")
        .reason;
    assert!(said.contains("log-writer"), "{said}");

    // Who asks it is sent away, and need not wait for a disk.
    let node = victim.node().expect("it is up");
    let redirect = Options {
        routing: Routing::Redirect,
        timeout: Duration::from_secs(5),
        ..options()
    };
    let answer = timeout(PATIENCE, cluster.try_write(&*node, redirect)).await;
    assert!(
        answer.is_ok_and(|is_written| !is_written),
        "it has not answered that it does not lead"
    );

    // The balancer has had time to bring it home.
    for _ in 0..8 {
        sleep(Duration::from_secs(1)).await;
        cluster.write(PATIENCE).await;
        assert!(!victim.leads(cluster.shard), "it leads again");
    }
    assert_eq!(*victim.ended().borrow(), None, "a disk may come back");

    victim.set_disk_fault(None);
    until("it is ready again", async || {
        victim.node().is_some_and(|node| node.ready().is_ok())
    })
    .await
    .expect("ready");
    cluster.write(PATIENCE).await;
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_slow_steps_down() {
    let cluster = Cluster::start(33).await;
    let victim = cluster.leader().await;
    victim.set_disk_fault(Some((Trouble::IsSlow, "log")));
    until("another leads", async || {
        cluster.write(PATIENCE).await;
        cluster
            .hosts
            .iter()
            .any(|host| !Arc::ptr_eq(host, &victim) && host.leads(cluster.shard))
    })
    .await
    .expect("it steps down");
    cluster.write(PATIENCE).await;
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpointer_that_hangs_is_told() {
    let cluster = Cluster::start(34).await;
    let victim = cluster.leader().await;
    victim.set_disk_fault(Some((Trouble::Hangs, "redo")));
    until("it is told", async || {
        cluster.write(PATIENCE).await;
        let unready = victim.node().and_then(|node| node.ready().err());
        unready.is_some_and(|unready| unready.reason.contains("checkpointer"))
    })
    .await
    .expect("told");
    cluster.end();
}
