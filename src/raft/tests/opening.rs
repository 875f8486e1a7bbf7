//! What a replica finds when it opens: log and map that a crash, or whoever copied files, left as
//! they are.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use openraft::storage::RaftLogStorage;

use super::cluster::{Disks, TestCluster, key};
use crate::raft::OpenError;
use crate::raft::log_store::LogStore;
use crate::storage::disk::{Disk, Open};
use crate::storage::log::{Log, LogEntry, LogOptions, LogPayload, LogWriter, ReplicaLog, Vote};
use crate::storage::map::{Applied, MapOptions, MapStore, OnSynced, Synced};
use crate::storage::mem_trees::MemTrees;
use crate::storage::sim_disk::SimDisk;
use crate::storage::snapshot::Snapshot;
use crate::types::{LogId, NodeId, ReplicaId};

const LOG: &str = "/log";

fn id(term: u64, index: u64) -> LogId {
    LogId { term, index }
}

fn entries(term: u64, indexes: std::ops::Range<u64>) -> Vec<LogEntry> {
    indexes
        .map(|index| LogEntry {
            id: id(term, index),
            payload: LogPayload::Blank,
        })
        .collect()
}

fn open_log(disk: &SimDisk) -> (Log, LogWriter) {
    let options = LogOptions {
        segment_bytes: 64 << 10,
        grow_bytes: 16 << 10,
        ..LogOptions::default()
    };
    Log::open(Arc::new(disk.clone()), Path::new(LOG), options).expect("a log")
}

fn drain(writer: &mut LogWriter) {
    while writer.pump() {}
}

fn issued() -> crate::storage::log::Done {
    Box::new(|done| done.expect("done"))
}

/// A log with a replica of group 1 that has voted, and holds `entries`.
fn filled(disk: &SimDisk, entries: Vec<LogEntry>) -> (LogWriter, ReplicaLog) {
    let (log, mut writer) = open_log(disk);
    log.create(key(1, 1), issued());
    let replica = log.replica(key(1, 1)).expect("it was created");
    replica.save_vote(
        Vote {
            term: 9,
            voted_for: Some(ReplicaId(1)),
            committed: false,
        },
        issued(),
    );
    replica.append(entries, issued()).expect("an append");
    drain(&mut writer);
    (writer, replica)
}

#[tokio::test]
async fn a_truncation_is_durable_before_what_rests_on_it() {
    let disk = SimDisk::new(1);
    let (writer, replica) = filled(&disk, entries(1, 0..10));
    let writing = tokio::spawn(writer.run_in_task());
    let mut store = LogStore::new(replica);
    let last = crate::raft::types::to_raft(id(1, 4));
    store.truncate_after(Some(last)).await.expect("truncated");
    writing.abort();
    drop((writing.await, store));
    disk.crash();

    let (log, _writer) = open_log(&disk);
    assert_eq!(
        log.replica(key(1, 1)).expect("it was created").state().last,
        Some(id(1, 4))
    );
}

/// The log of a replica is durable through everything.
struct AlwaysSynced;

impl Synced for AlwaysSynced {
    fn on_synced(&self, _log_id: LogId, done: OnSynced) {
        done(Ok(()));
    }
}

fn maps(disk: &SimDisk, trees: &MemTrees) -> MapStore {
    let (trees, disk) = (Arc::new(trees.clone()), Arc::new(disk.clone()));
    MapStore::open(trees, disk, Path::new("/"), MapOptions::default())
        .expect("maps")
        .0
}

/// A map as of `at`, in a store whose disk the caller must keep.
fn snapshot_of(store: &MapStore, replica: u64, at: LogId) -> Snapshot {
    let state = store
        .replica(key(1, replica), Arc::new(AlwaysSynced))
        .expect("a map");
    let applied = Applied {
        log_id: Some(at),
        membership: Bytes::new(),
    };
    state.apply(Default::default(), applied).expect("applied");
    state.build_snapshot().expect("built")
}

/// Gives the map of replica 1 a snapshot of another replica, and leaves its log as it is.
fn install(disk: &SimDisk, trees: &MemTrees, at: LogId) {
    let donor = maps(&SimDisk::new(2), &MemTrees::new());
    let donated = snapshot_of(&donor, 2, at);
    let store = maps(disk, trees);
    let state = store
        .replica(key(1, 1), Arc::new(AlwaysSynced))
        .expect("a map");
    let mut receiver = state.begin_receive().expect("begun");
    let mut bytes = vec![0; usize::try_from(donated.bytes_len()).expect("small")];
    donated.read_at(0, &mut bytes).expect("readable");
    receiver.write_at(0, &bytes).expect("written");
    state
        .install(&receiver.finish().expect("whole"))
        .expect("installed");
}

async fn reopened(disks: &Disks) -> (TestCluster, Vec<OpenError>) {
    let mut cluster = TestCluster::new(0);
    cluster.disks.insert(NodeId(1), disks.clone());
    cluster.start(NodeId(1));
    let failed = cluster.nodes[&NodeId(1)].registry.open_all().await;
    (
        cluster,
        failed.into_iter().map(|(_, error)| error).collect(),
    )
}

/// A process that ends between an installed snapshot and the purge of the log leaves these.
#[tokio::test]
async fn a_log_that_an_installed_snapshot_replaces_makes_way_for_it() {
    let logs = [
        ("it ends before", entries(1, 0..3)),
        ("it ends before, in a later term", entries(5, 0..3)),
        ("it holds what was to be cut", entries(1, 0..30)),
        (
            "it holds what was to be cut, in a later term",
            entries(5, 0..30),
        ),
        ("it is empty", Vec::new()),
    ];
    for (what, entries) in logs {
        let disks = Disks::new(1);
        drop(filled(&disks.disk.disk, entries));
        install(&disks.disk.disk, &disks.trees, id(2, 10));
        let (cluster, failed) = reopened(&disks).await;
        assert!(failed.is_empty(), "{what}: {failed:?}");
        let group = cluster.nodes[&NodeId(1)]
            .registry
            .get(key(1, 1).group)
            .expect("it is open");
        assert_eq!(
            (group.status().applied, group.log.state().last),
            (Some(id(2, 10)), Some(id(2, 10))),
            "{what}"
        );
        drop(group);
        cluster.stop_all().await;
        let (log, _writer) = open_log(&disks.disk.disk);
        let found = log.replica(key(1, 1)).expect("it was created").state();
        assert_eq!(
            (found.purged, found.last),
            (Some(id(2, 10)), Some(id(2, 10))),
            "{what}"
        );
        assert!(
            found.vote.is_some_and(|vote| vote.term >= 9),
            "{what}: {:?}",
            found.vote
        );
    }
}

/// What follows the snapshot stays, if it follows it.
#[tokio::test]
async fn a_log_that_holds_what_an_installed_snapshot_ends_with_stays() {
    let disks = Disks::new(1);
    let log = [entries(1, 0..5), entries(2, 5..15)].concat();
    drop(filled(&disks.disk.disk, log));
    install(&disks.disk.disk, &disks.trees, id(2, 10));
    let (cluster, failed) = reopened(&disks).await;
    assert!(failed.is_empty(), "{failed:?}");
    let group = cluster.nodes[&NodeId(1)]
        .registry
        .get(key(1, 1).group)
        .expect("it is open");
    assert_eq!(group.log.state().last, Some(id(2, 14)));
    drop(group);
    cluster.stop_all().await;
}

/// A map is never ahead of its log by itself: somebody has put an older log there, or the disk has
/// lost its end.
#[tokio::test]
async fn a_replica_whose_log_ends_before_its_map_takes_no_part() {
    let logs = [
        ("its log ends at 1.2", entries(1, 0..3)),
        ("its log ends at nothing", Vec::new()),
        ("its log has 1.10", entries(1, 0..30)),
    ];
    for (what, entries) in logs {
        let disks = Disks::new(1);
        drop(filled(&disks.disk.disk, entries));
        snapshot_of(&maps(&disks.disk.disk, &disks.trees), 1, id(2, 10));
        let (cluster, failed) = reopened(&disks).await;
        let [error] = &failed[..] else {
            panic!("{what}: it was opened")
        };
        let text = error.to_string();
        assert!(
            text.contains(what) && text.contains("has applied 2.10"),
            "{what}: {text}"
        );
        assert!(
            cluster.nodes[&NodeId(1)]
                .registry
                .get(key(1, 1).group)
                .is_none(),
            "{what}"
        );
        cluster.stop_all().await;
    }
}

/// The same by way of a whole group: its log of yesterday is put back under its map of today.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_log_under_a_newer_map_is_refused() {
    let mut cluster = TestCluster::new(1);
    let node = NodeId(1);
    cluster.found(1).await;
    cluster.put(1, "k", "before").await;
    let old = cluster.disks[&node].disk.disk.fork();
    cluster.put(1, "k", "after").await;
    let group = cluster.group(1, 1);
    crate::raft::state_machine::build(group.state())
        .await
        .expect("the map is written down");
    drop(group);
    cluster.nodes.remove(&node).expect("it runs").close().await;

    let disk = &cluster.disks[&node].disk.disk;
    for (path, _) in disk
        .files()
        .into_iter()
        .filter(|(path, _)| path.starts_with(LOG))
    {
        disk.remove(&path).expect("removed");
    }
    for (path, _) in old
        .files()
        .into_iter()
        .filter(|(path, _)| path.starts_with(LOG))
    {
        let file = disk.open(&path, Open::New).expect("a new file");
        file.write_at(&old.contents(&path).expect("it is listed"), 0)
            .expect("written");
    }
    cluster.start(node);
    let failed = cluster.nodes[&node].registry.open_all().await;
    assert!(
        failed
            .iter()
            .any(|(_, error)| error.to_string().contains("has applied")),
        "{failed:?}"
    );
    cluster.stop_all().await;
}

/// A wipe that the end of the process cuts short is done again. Until then a witness stays what it
/// is.
#[tokio::test(flavor = "multi_thread")]
async fn a_witness_that_is_half_wiped_does_not_open_as_another_kind() {
    let mut cluster = TestCluster::new(3);
    cluster.found_with_witness(1).await;
    let (node, witness) = (NodeId(3), key(1, 3));
    cluster.nodes[&node].registry.close_replica(witness).await;
    cluster.nodes[&node]
        .states
        .wipe(witness)
        .expect("its map, which it has not, is wiped");
    cluster.stop(node).await;

    cluster.restart(node).await;
    let registry = cluster.nodes[&node].registry.clone();
    assert!(registry.witness(witness.group).is_some() && registry.get(witness.group).is_none());
    registry.wipe_replica(witness).await.expect("wiped");
    assert_eq!(
        cluster.nodes[&node]
            .states
            .witnesses()
            .read(witness)
            .expect("readable"),
        None
    );
    drop(registry);
    cluster.stop_all().await;
}
