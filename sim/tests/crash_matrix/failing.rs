//! Replicas that stop, or cannot be opened: they are opened again, or replaced, and told of
//! meanwhile. A node whose map database gives up starts again by itself.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::ready;
use tokio::time::Instant;

use super::case::{hosts, until};
use super::history::options;
use super::host::{Host, addresses};
use super::machine::End;
use quorate::api::protocol::{ClusterStatus, ReplicaHealth};
use quorate::api::store::Store;
use quorate::client::remote::RemoteStore;
use quorate::metrics::{Registry, page};
use quorate::node::Node;
use quorate::raft::ProposeError;
use quorate::sm::cluster::view::PlacementSpec;
use quorate::sm::kv::{Action, Condition, Media, Operation, Write};
use quorate::sm::recovery::FailureCause;
use quorate::storage::ReplicaKey;
use quorate::storage::tree::Trees;
use quorate::types::{Address, GroupId, NodeId, SLOTS};
use quorate_sim::exposition::{Family, check};

/// Three nodes, with a shard on each of them.
struct Cluster {
    hosts: Vec<Arc<Host>>,
    store: RemoteStore,
}

const SHARD: GroupId = GroupId(1);

impl Cluster {
    async fn start(replace_after: Duration) -> Self {
        let all = addresses(3);
        let hosts = hosts(&all, &all, 1);
        for host in &hosts {
            host.watch(Arc::new(|_| Box::pin(ready(()))));
            host.replace_after(replace_after);
            host.start();
        }
        let store = RemoteStore::connect(all).expect("a client");
        let cluster = Self { hosts, store };
        // Replicas compare from then on, and have their tables written down for it.
        cluster
            .status_when("it is founded", |status| status.level > 0)
            .await;
        cluster.write(0).await;
        cluster
    }

    async fn status_when(
        &self,
        what: &str,
        holds: impl Fn(&ClusterStatus) -> bool,
    ) -> ClusterStatus {
        let mut last = None;
        let found = until(what, async || {
            last = self.store.status().await.ok();
            last.as_ref().is_some_and(&holds)
        });
        found
            .await
            .unwrap_or_else(|error| panic!("{error}: {last:?}"));
        last.expect("it was just there")
    }

    /// Writes to every shard.
    async fn write(&self, round: u32) {
        for n in 0..30 {
            let value = Bytes::from(format!("{round}"));
            let action = Action::Put {
                media: Media::Text,
                value,
            };
            let key = Bytes::from(format!("key {n}"));
            let put = Operation {
                key,
                condition: Condition::None,
                action,
            };
            let write = async || {
                let written = self.store.write(vec![put.clone()], None, options()).await;
                written.iter().all(Result::is_ok)
            };
            until("it is written", write).await.expect("written");
        }
    }

    /// Every key has what was written in that round.
    async fn assert_holds(&self, round: u32) {
        for n in 0..30 {
            let key = Bytes::from(format!("key {n}"));
            let mut got = None;
            until("it is read", async || {
                got = self.store.get(key.clone(), options()).await.ok();
                got.is_some()
            })
            .await
            .expect("read");
            let record = got.and_then(|found| found.record);
            assert_eq!(
                record.map(|record| record.value),
                Some(Bytes::from(format!("{round}"))),
                "key {n}"
            );
        }
    }

    /// A host that does not lead the group, with its replica there.
    async fn follower(&self, id: GroupId) -> (&Arc<Host>, ReplicaKey) {
        let mut found = None;
        let all = until("all have a replica", async || {
            found = self
                .hosts
                .iter()
                .find(|host| !host.leads(id) && host.group(id).is_some());
            found.is_some() && self.hosts.iter().any(|host| host.leads(id))
        });
        all.await.expect("replicas");
        let host = found.expect("it was just there");
        (host, host.group(id).expect("a replica").key())
    }

    fn end(&self) {
        for host in &self.hosts {
            let failed = host.failed.lock();
            assert_eq!(*failed, None, "{} has stopped", host.address());
            host.end(End::Kill);
            host.bury();
        }
    }
}

/// What a status says of the replica.
fn health(status: &ClusterStatus, key: ReplicaKey) -> Option<ReplicaHealth> {
    let shard = status.shards.iter().find(|shard| shard.id == key.group)?;
    shard
        .replicas
        .iter()
        .find(|replica| replica.id == key.replica)
        .map(|replica| replica.health)
}

/// The metrics of the node, as its page tells them.
fn families(node: &Arc<Node>) -> Vec<Family> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(node.clone()));
    let text = page(&registry);
    check(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
}

/// The value of a metric of the node, all samples together.
fn metric(node: &Arc<Node>, name: &str) -> f64 {
    let families = families(node);
    let family = families
        .iter()
        .find(|family| family.name == name)
        .expect("there is such a metric");
    family.samples.iter().map(|sample| sample.value).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_stopped_is_told_of_and_opened_again() {
    let cluster = Cluster::start(Duration::from_secs(600)).await;
    let (host, key) = cluster.follower(SHARD).await;
    let is_broken = Arc::new(AtomicBool::new(true));
    let fault = {
        let is_broken = is_broken.clone();
        move |_: &str| match is_broken.load(Ordering::Relaxed) {
            true => Err(io::Error::from_raw_os_error(5)),
            false => Ok(()),
        }
    };
    host.disks().trees.set_fault(Arc::new(fault));
    let node = host.node().expect("it is up");
    let mut round = 1;
    let stopped = until("its replica has stopped", async || {
        cluster.write(round).await;
        round += 1;
        node.hosting()
            .await
            .failed
            .iter()
            .any(|failed| failed.group == SHARD)
    });
    stopped.await.expect("stopped");
    let unready = until("it says that it is not ready", async || {
        node.ready()
            .is_err_and(|unready| unready.code == "replica-failed")
    });
    unready.await.expect("not ready");
    // It runs for moments.
    let counted = until("it is counted", async || {
        metric(&node, "quorate_replicas_failed") > 0.0
    });
    counted.await.expect("counted");
    cluster
        .status_when("the status tells", |status| {
            health(status, key) == Some(ReplicaHealth::Failed)
                && status.nodes.iter().any(|node| !node.failed.is_empty())
        })
        .await;

    is_broken.store(false, Ordering::Relaxed);
    until("it is well again", async || node.ready().is_ok())
        .await
        .expect("ready");
    assert!(metric(&node, "quorate_replicas_recovered_total") > 0.0);
    assert_eq!(metric(&node, "quorate_replicas_failed"), 0.0);
    cluster
        .status_when("the status tells", |status| {
            let health = health(status, key);
            health == Some(ReplicaHealth::Following) || health == Some(ReplicaHealth::Leading)
        })
        .await;
    assert!(
        Arc::ptr_eq(&node, &host.node().expect("it is up")),
        "the node has not started again"
    );
    cluster.write(round).await;
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cannot_be_opened_is_replaced_on_its_node_under_a_new_id() {
    let cluster = Cluster::start(Duration::from_secs(3)).await;
    let (host, key) = cluster.follower(SHARD).await;
    host.end(End::Kill);
    host.bury();
    host.damage(Some(key));
    host.start();
    let told = cluster.status_when("it is told", |status| {
        status.nodes.iter().any(|node| {
            node.failed.iter().any(|failed| {
                failed.replica == key.replica && failed.cause == FailureCause::Damaged
            })
        })
    });
    told.await;
    let node = told_node(&cluster, host).await;
    let after = cluster.status_when("another takes its place", |status| {
        let replica = status.shards.iter().find(|shard| shard.id == SHARD);
        let here =
            replica.and_then(|shard| shard.replicas.iter().find(|replica| replica.node == node));
        status.settled
            && here.is_some_and(|here| {
                here.id > key.replica && here.health == ReplicaHealth::Following
            })
    });
    let after = after.await;
    let shard = after
        .shards
        .iter()
        .find(|shard| shard.id == SHARD)
        .expect("the shard");
    assert_eq!(shard.replicas.len(), 3);
    assert!(
        after.nodes.iter().all(|node| node.failed.is_empty()),
        "{after:?}"
    );
    assert_eq!(
        after.shards.iter().map(|shard| shard.slots).sum::<u64>(),
        u64::from(SLOTS)
    );
    until("it is ready", async || {
        host.node().is_some_and(|node| node.ready().is_ok())
    })
    .await
    .expect("ready");
    let stored = host
        .node()
        .and_then(|node| node.registry())
        .expect("its replicas")
        .stored();
    assert!(!stored.contains(&key), "what it had is gone");
    cluster.write(1).await;
    cluster.end();
}

/// Its node goes on without it, serves its shards, and hears from others that it has another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_the_meta_group_that_cannot_be_opened_is_replaced_too() {
    let cluster = Cluster::start(Duration::from_secs(3)).await;
    let (host, key) = cluster.follower(GroupId::META).await;
    host.end(End::Kill);
    host.bury();
    host.damage(Some(key));
    host.start();
    let is_told = async || {
        let Some(node) = host.node() else {
            return false;
        };
        node.hosting()
            .await
            .failed
            .iter()
            .any(|failed| failed.replica == key.replica)
    };
    until("it is told", is_told).await.expect("told");
    let is_replaced = async || {
        host.group(GroupId::META)
            .is_some_and(|group| group.key() != key)
    };
    until("another takes its place", is_replaced)
        .await
        .expect("replaced");
    until("it is ready", async || {
        host.node().is_some_and(|node| node.ready().is_ok())
    })
    .await
    .expect("ready");
    cluster
        .status_when("all is settled", |status| status.settled)
        .await;
    cluster.write(1).await;
    cluster.end();
}

async fn told_node(cluster: &Cluster, host: &Host) -> NodeId {
    let status = cluster.status_when("it is known", |_| true).await;
    let of = |node: &&quorate::api::protocol::NodeStatus| node.address == *host.address();
    status.nodes.iter().find(of).expect("a node of the view").id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_maps_take_no_more_writes_starts_again_by_itself() {
    let cluster = Cluster::start(Duration::from_secs(600)).await;
    let host = cluster
        .hosts
        .iter()
        .find(|host| host.leads(SHARD))
        .unwrap_or(&cluster.hosts[0]);
    let before = host.node().expect("it is up");
    host.disks().trees.give_up("I/O error");
    let mut round = 1;
    let again = until("it starts again", async || {
        cluster.write(round).await;
        round += 1;
        host.node().is_some_and(|node| !Arc::ptr_eq(&node, &before))
    });
    again.await.expect("again");
    until("it is ready", async || {
        host.node().is_some_and(|node| node.ready().is_ok())
    })
    .await
    .expect("ready");
    cluster.write(round).await;
    cluster.end();
}

/// The value of a metric of the node, of one kind of what is scrubbed.
fn scrubbed(node: &Arc<Node>, name: &str, kind: &str) -> f64 {
    let families = families(node);
    let family = families
        .iter()
        .find(|family| family.name == name)
        .expect("there is such a metric");
    let of_kind = family
        .samples
        .iter()
        .filter(|sample| sample.labels.iter().any(|(_, value)| value == kind));
    of_kind.map(|sample| sample.value).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rots_on_a_disk_is_found_by_a_scrub_and_mended() {
    let cluster = Cluster::start(Duration::from_secs(600)).await;
    let (host, key) = cluster.follower(SHARD).await;
    let disks = host.disks();
    // What was written before is in a sealed segment then.
    host.end(End::Kill);
    host.bury();
    host.scrub_every(Duration::from_millis(300));
    host.start();
    until("its replica is there again", async || {
        host.group(SHARD)
            .is_some_and(|group| group.status().leader.is_some())
    })
    .await
    .expect("it is");
    let node = host.node().expect("it is up");
    let mended = async |kind: &str| {
        let name = "quorate_scrub_mended_total";
        until(kind, async || scrubbed(&node, name, kind) >= 1.0)
            .await
            .unwrap_or_else(|error| {
                panic!(
                    "{error}: {:?}",
                    families(&node)
                        .iter()
                        .filter(|family| family.name.contains("scrub"))
                        .collect::<Vec<_>>()
                )
            });
        assert!(scrubbed(&node, "quorate_scrub_damaged_total", kind) >= 1.0);
    };

    let files = || disks.disk.files().into_iter().map(|(path, _)| path);
    let segment = files()
        .find(|path| path.extension().is_some_and(|kind| kind == "segment"))
        .expect("a sealed one");
    assert!(disks.disk.flip_bit(&segment, 40, 1));
    mended("segment").await;
    assert_eq!(disks.disk.contents(&segment), None, "it is gone");

    host.group(SHARD)
        .expect("a replica")
        .build_snapshot()
        .await
        .expect("a snapshot");
    let prefix = format!("{key}-");
    let is_its = |path: &std::path::PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
    };
    let snapshot =
        files().find(|path| is_its(path) && path.extension().is_some_and(|kind| kind == "snap"));
    assert!(
        disks
            .disk
            .flip_bit(&snapshot.expect("it was just written"), 60, 1)
    );
    mended("snapshot").await;

    cluster.write(7).await;
    cluster.end();
}

/// Nothing is lost, and the replica is there again with a tree that is whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_that_rots_is_found_by_a_scrub_and_the_replica_rebuilt() {
    let cluster = Cluster::start(Duration::from_secs(600)).await;
    let (host, key) = cluster.follower(SHARD).await;
    let disks = host.disks();
    host.end(End::Kill);
    host.bury();
    // Only the scrub can find it.
    host.compare_every(Duration::from_secs(600));
    host.scrub_every(Duration::from_millis(300));
    host.start();
    until("its replica is there again", async || {
        host.group(SHARD)
            .is_some_and(|group| group.status().leader.is_some())
    })
    .await
    .expect("it is");
    let node = host.node().expect("it is up");
    until("it is scrubbed", async || {
        metric(&node, "quorate_scrubs_total") >= 1.0
    })
    .await
    .expect("scrubbed");
    assert_eq!(metric(&node, "quorate_scrub_damaged_total"), 0.0);

    let prefix = format!("{key}.");
    let flipped = until("there is a tree with something in it", async || {
        let names = disks.trees.names().expect("listed");
        let mut its = names.iter().filter(|name| name.starts_with(&prefix));
        // The first is its record, which each checkpoint writes anew.
        its.any(|name| (1..20).any(|at| disks.trees.flip(name, at)))
    });
    flipped.await.expect("flipped");
    let mended = until("it is mended", async || {
        scrubbed(&node, "quorate_scrub_mended_total", "tree") >= 1.0
    });
    mended.await.expect("mended");
    assert!(scrubbed(&node, "quorate_scrub_damaged_total", "tree") >= 1.0);
    until("it is well again", async || node.ready().is_ok())
        .await
        .expect("ready");
    assert_eq!(host.group(SHARD).expect("a replica").key(), key);

    let scrubs = metric(&node, "quorate_scrubs_total");
    let damaged = metric(&node, "quorate_scrub_damaged_total");
    until("it is scrubbed again", async || {
        metric(&node, "quorate_scrubs_total") >= scrubs + 2.0
    })
    .await
    .expect("scrubbed");
    assert_eq!(metric(&node, "quorate_scrub_damaged_total"), damaged);
    cluster.assert_holds(0).await;
    cluster.write(7).await;
    cluster.assert_holds(7).await;
    cluster.end();
}

/// Nobody scrubs by the clock here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_that_is_asked_for_begins_at_once_and_tells_what_it_found() {
    let cluster = Cluster::start(Duration::from_secs(600)).await;
    let (host, key) = cluster.follower(SHARD).await;
    let disks = host.disks();
    let node = host.node().expect("it is up");
    let scrub = async || {
        let begun = node.begin_scrub().expect("a member");
        assert!(begun.is_running);
        let mut last = begun.clone();
        let ended = until("it has ended", async || {
            last = node.scrub_status().expect("a member");
            last.number == begun.number && !last.is_running
        });
        ended
            .await
            .unwrap_or_else(|error| panic!("{error}: {last:?}"));
        last
    };
    assert_eq!(node.scrub_status().expect("a member").number, 0);
    let first = scrub().await;
    assert_eq!((first.number, first.damaged), (1, 0), "{first:?}");

    host.group(SHARD)
        .expect("a replica")
        .build_snapshot()
        .await
        .expect("a snapshot");
    let snapshot = disks.disk.files().into_iter().map(|(path, _)| path);
    let prefix = format!("{key}-");
    let snapshot = snapshot.into_iter().find(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy());
        name.is_some_and(|name| name.starts_with(&prefix) && name.ends_with(".snap"))
    });
    assert!(
        disks
            .disk
            .flip_bit(&snapshot.expect("it was just written"), 60, 1)
    );
    let second = scrub().await;
    assert_eq!(
        (second.number, second.damaged, second.mended),
        (2, 1, 1),
        "{second:?}"
    );
    assert_eq!(second.damages[0].kind, "snapshot");
    assert_eq!(second.damages[0].not_mended, None);
    let third = scrub().await;
    assert_eq!((third.number, third.damaged), (3, 0), "{third:?}");
    cluster.end();
}

/// The others tell its leader, which proposes nothing that they could not take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_disks_of_the_followers_are_full_writes_are_certainly_not_done() {
    let cluster = Cluster::start(Duration::from_secs(600)).await;
    cluster.follower(SHARD).await;
    let is_leader = |host: &&Arc<Host>| host.leads(SHARD);
    let (leaders, followers): (Vec<_>, Vec<_>) = cluster.hosts.iter().partition(is_leader);
    let group = leaders[0].group(SHARD).expect("it leads");
    let set_room = |has_room: bool| {
        for host in &followers {
            let disk = &host.disks().disk;
            let used: u64 = disk.files().iter().map(|(_, len)| *len).sum();
            disk.set_capacity((!has_room).then_some(used + (4 << 10)));
        }
    };
    set_room(false);
    let write = || Write {
        operations: vec![Operation {
            key: Bytes::from_static(b"none"),
            condition: Condition::None,
            action: Action::Delete,
        }],
        idempotency_key: None,
    };
    let refused = until("it is refused", async || {
        let deadline = Instant::now() + Duration::from_millis(200);
        let proposed = group.propose(write(), deadline).await;
        matches!(proposed, Err(ProposeError::NoRoom { .. }))
    });
    refused.await.expect("refused");
    drop(group);
    set_room(true);
    cluster.write(3).await;
    cluster.assert_holds(3).await;
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_of_a_witness_that_rots_is_found_by_a_scrub_and_written_anew() {
    let all = addresses(3);
    let asked = PlacementSpec {
        replication_factor: Some(2),
        shards: Some(1),
        ..PlacementSpec::default()
    };
    let host = |(n, address): (u64, &Address)| Host::new(address.clone(), all.clone(), asked, n);
    let hosts: Vec<Arc<Host>> = (1..).zip(&all).map(host).collect();
    for host in &hosts {
        host.watch(Arc::new(|_| Box::pin(ready(()))));
        host.start();
    }
    let store = RemoteStore::connect(all.clone()).expect("a client");
    let cluster = Cluster { hosts, store };
    cluster.write(1).await;
    let witness = |host: &Arc<Host>| {
        let registry = host.node().and_then(|node| node.registry())?;
        registry.witness(SHARD).map(|witness| witness.key())
    };
    let mut found = None;
    until("there is a witness", async || {
        found = cluster
            .hosts
            .iter()
            .find_map(|host| Some((host, witness(host)?)));
        found.is_some()
    })
    .await
    .expect("a witness");
    let (host, key) = found.expect("it was just there");

    let node = host.node().expect("it is up");
    let scrub = async || {
        let number = node.begin_scrub().expect("a member").number;
        let mut last = node.scrub_status().expect("a member");
        until("it has ended", async || {
            last = node.scrub_status().expect("a member");
            last.number == number && !last.is_running
        })
        .await
        .unwrap_or_else(|error| panic!("{error}: {last:?}"));
        last
    };
    assert_eq!(scrub().await.damaged, 0);
    let path = PathBuf::from(format!("/node/witnesses/{key}.mark"));
    assert!(host.disks().disk.flip_bit(&path, 12, 3), "{path:?}");
    let scrubbed = scrub().await;
    assert_eq!((scrubbed.damaged, scrubbed.mended), (1, 1), "{scrubbed:?}");
    assert_eq!(scrubbed.damages[0].kind, "witness");
    assert_eq!(scrub().await.damaged, 0);

    // A start believes the file, and finds a witness.
    drop(node);
    host.end(End::Kill);
    host.bury();
    host.start();
    until("it is a witness again", async || witness(host) == Some(key))
        .await
        .expect("a witness");
    cluster.write(2).await;
    cluster.assert_holds(2).await;
    cluster.end();
}
