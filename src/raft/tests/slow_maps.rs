//! Replicas whose maps wait for their disk: what is applied, read or installed there holds up no
//! heartbeat, and so changes no leader.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use openraft::RaftLogReader;
use tokio::time::Instant;

use super::cluster::*;
use super::stalling_disk::StallingDisk;
use crate::raft::Replica;
use crate::raft::log_store::LogStore;
use crate::storage::log::{Log, LogEntry, LogOptions, LogPayload};
use crate::storage::mem_trees::Gate;
use crate::types::{LogId, NodeId};

/// Several elections long.
const FOR_A_WHILE: Duration = Duration::from_secs(3);

/// Opens a gate in the end: a thread that all tasks share would wait there for ever.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn of(gate: &Arc<Gate>) -> Self {
        let (gate, was_needed) = (gate.clone(), Arc::new(AtomicBool::new(false)));
        let told = was_needed.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(15));
            if gate.is_closed() {
                told.store(true, Ordering::Release);
                gate.close(false);
            }
        });
        Self(was_needed)
    }

    fn was_needed(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Reads from the leader for a while: each read takes a round to a majority.
async fn read_for_a_while(leader: &Replica) {
    let end = Instant::now() + FOR_A_WHILE;
    while Instant::now() < end {
        leader
            .read_barrier(soon())
            .await
            .expect("a majority follows");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Has the log begin behind a new snapshot, as far as that may be.
async fn compact(group: &Replica) -> LogId {
    group.build_snapshot().await.expect("a snapshot");
    until("openraft knows of the snapshot", || {
        group.status().snapshot.is_some()
    })
    .await;
    let snapshot = group.status().snapshot.expect("it is there");
    group.purge_log(snapshot.index).await;
    snapshot
}

#[tokio::test]
async fn an_entry_that_waits_for_the_disk_of_its_map_holds_up_no_heartbeat() {
    let cluster = TestCluster::new(3);
    cluster.found(1).await;
    let leader = cluster.leader(1).await;
    let group = cluster.group(leader.0, 1);
    let term = group.status().term;
    let reads = cluster.disks[&leader].trees.reads.clone();

    group.state().expect_waits();
    reads.close(true);
    let watchdog = Watchdog::of(&reads);
    let writing = tokio::spawn({
        let group = group.clone();
        async move { group.propose(put("never seen before", "v"), soon()).await }
    });
    while reads.waiting() == 0 && !watchdog.was_needed() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(FOR_A_WHILE).await;
    assert!(
        !watchdog.was_needed(),
        "the thread that all share waited for the disk"
    );
    let follower = cluster.group(1 + leader.0 % 3, 1);
    let seen = [group.status().term, follower.status().term];
    assert_eq!(
        (seen, group.leads()),
        ([term; 2], true),
        "the leader has changed"
    );

    reads.close(false);
    assert_put(&writing.await.expect("it ends").expect("written"));
    cluster.stop_all().await;
}

/// A follower that was away for long is sent entries that no cache has any more.
#[tokio::test]
async fn old_entries_are_read_where_they_hold_up_nobody() {
    let disk = StallingDisk::new(1);
    let options = LogOptions {
        cache_bytes: 0,
        ..LogOptions::default()
    };
    let opened = Log::open(Arc::new(disk.clone()), Path::new("/log"), options);
    let (log, writer) = opened.expect("a log");
    let writing = std::thread::spawn(move || writer.run());
    log.create(key(1, 1), Box::new(|_| ()));
    let replica = log.replica(key(1, 1)).expect("it was created");
    let entry = |index| LogEntry {
        id: LogId { term: 1, index },
        payload: LogPayload::Blank,
    };
    for index in 0..20 {
        let (done, ended) = tokio::sync::oneshot::channel();
        let done = Box::new(move |_| {
            let _ = done.send(());
        });
        replica.append(vec![entry(index)], done).expect("appended");
        ended.await.expect("synced");
    }

    disk.reads.close(true);
    let watchdog = Watchdog::of(&disk.reads);
    let mut store = LogStore::new(replica.clone());
    let reading = tokio::spawn(async move { store.limited_get_log_entries(0, 5).await });
    let is_waited_for = || disk.reads.waiting() > 0 || watchdog.was_needed();
    until("the disk is waited for", is_waited_for).await;
    assert!(
        !watchdog.was_needed(),
        "the thread that all share waited for the disk"
    );
    disk.reads.close(false);
    assert_eq!(reading.await.expect("it ends").expect("readable").len(), 5);
    log.close();
    drop((replica, log));
    writing.join().expect("it ended well");
}

#[tokio::test]
async fn a_voter_that_installs_a_snapshot_answers_its_leader() {
    let cluster = TestCluster::new(3);
    cluster.found(1).await;
    let leader = cluster.leader(1).await;
    let away = NodeId(1 + leader.0 % 3);
    let other = NodeId(1 + away.0 % 3);
    cluster.hub.isolate(away);
    for n in 0..20 {
        cluster.put(1, &format!("k{n}"), "v").await;
    }
    for id in [leader, other] {
        let group = cluster.group(id.0, 1);
        let snapshot = compact(&group).await;
        until("the log is purged", || {
            group.status().purged == Some(snapshot)
        })
        .await;
    }

    let writes = cluster.disks[&away].trees.writes.clone();
    writes.close(true);
    cluster.hub.heal();
    until("the map is being filled", || writes.waiting() > 0).await;
    // From now on it takes the one that installs to make a majority.
    let leader = cluster.leader(1).await;
    let other = [leader, other]
        .into_iter()
        .find(|id| *id != leader)
        .unwrap_or(other);
    let group = cluster.group(leader.0, 1);
    let term = group.status().term;
    cluster.hub.isolate(other);
    read_for_a_while(&group).await;
    assert!(writes.waiting() > 0, "it is still being filled");
    assert_eq!(
        (group.status().term, group.leads()),
        (term, true),
        "the leader has changed"
    );

    writes.close(false);
    let installed = cluster.group(away.0, 1);
    until("the snapshot is installed", || {
        read(&installed, "k19").as_deref() == Some("v")
    })
    .await;
    cluster.hub.heal();
    cluster.put(1, "after", "v").await;
    until("the log goes on after it", || {
        read(&installed, "after").as_deref() == Some("v")
    })
    .await;
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_follower_that_installs_slowly_finds_the_log_that_follows() {
    let cluster = TestCluster::new(3);
    cluster.found(1).await;
    let leader = cluster.leader(1).await;
    let away = NodeId(1 + leader.0 % 3);
    cluster.hub.isolate(away);
    cluster.put(1, "before", "v").await;
    for id in cluster.nodes.keys().filter(|id| **id != away) {
        let group = cluster.group(id.0, 1);
        let snapshot = compact(&group).await;
        until("the log is purged", || {
            group.status().purged == Some(snapshot)
        })
        .await;
    }
    let writes = cluster.disks[&away].trees.writes.clone();
    writes.close(true);
    cluster.hub.heal();
    until("the map is being filled", || writes.waiting() > 0).await;

    // Writers go on meanwhile and after it, and so do snapshots and purges.
    let installed = cluster.group(away.0, 1);
    let deadline = soon();
    for round in 0.. {
        let group = cluster.group(cluster.leader(1).await.0, 1);
        cluster.put(1, &format!("during {round}"), "v").await;
        compact(&group).await;
        if round == 10 {
            writes.close(false);
        }
        if round > 10 && read(&installed, "during 10").is_some() {
            break;
        }
        assert!(Instant::now() < deadline, "it never catches up");
    }
    let metrics = cluster.nodes[&away].states.metrics();
    assert_eq!(
        metrics.snapshots_installed, 1,
        "the log was purged from under it"
    );
    cluster.stop_all().await;
}
