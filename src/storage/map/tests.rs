//! The map against a model: what it answers while it runs, and what its files hold.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::sm::ports::{Direction, KeyRange, Read, WriteBatch};
use crate::storage::ReplicaKey;
use crate::storage::disk::Disk;
use crate::storage::mem_trees::MemTrees;
use crate::storage::sim_disk::SimDisk;
use crate::types::{GroupId, ReplicaId};

pub const KEY: ReplicaKey = ReplicaKey {
    group: GroupId(1),
    replica: ReplicaId(5),
};

/// A log whose durable end a test moves by hand.
#[derive(Default)]
pub struct TestLog {
    inner: Mutex<TestLogInner>,
}

#[derive(Default)]
struct TestLogInner {
    synced: u64,
    failed: bool,
    waiting: Vec<(u64, OnSynced)>,
}

impl TestLog {
    /// One that is always durable.
    pub fn durable() -> Arc<Self> {
        let log = Self::default();
        log.sync_through(u64::MAX);
        Arc::new(log)
    }

    pub fn sync_through(&self, index: u64) {
        let ready: Vec<_> = {
            let mut inner = self.inner.lock();
            inner.synced = inner.synced.max(index);
            let synced = inner.synced;
            inner
                .waiting
                .extract_if(.., |(index, _)| *index <= synced)
                .collect()
        };
        for (_, done) in ready {
            done(Ok(()));
        }
    }

    pub fn fail(&self) {
        let waiting = {
            let mut inner = self.inner.lock();
            inner.failed = true;
            std::mem::take(&mut inner.waiting)
        };
        for (_, done) in waiting {
            done(Err(io::Error::other("no space")));
        }
    }
}

impl Synced for TestLog {
    fn on_synced(&self, log_id: LogId, done: OnSynced) {
        {
            let mut inner = self.inner.lock();
            if !inner.failed && log_id.index > inner.synced {
                inner.waiting.push((log_id.index, done));
                return;
            }
        }
        done(Ok(()));
    }
}

pub fn applied(index: u64) -> Applied {
    Applied {
        log_id: Some(LogId { term: 1, index }),
        membership: Bytes::from(format!("members at {}", index / 10)),
    }
}

pub fn small_options() -> MapOptions {
    MapOptions {
        table_bytes_max: 4000,
        frozen_bytes_max: 20_000,
        node_bytes_max: 1 << 20,
        garbage_bytes_max: 50_000,
        copy_page_pairs: 5,
        cache_bytes: 64 << 20,
    }
}

/// A random batch over few keys, so that they meet again.
pub fn random_batch(random: &mut StdRng) -> WriteBatch {
    let mut batch = WriteBatch::default();
    for _ in 0..random.random_range(0..6) {
        let key = format!("k{:03}", random.random_range(0..300));
        if random.random_bool(0.3) {
            batch.delete(key);
        } else {
            let len = if random.random_bool(0.02) {
                3000
            } else {
                random.random_range(0..40)
            };
            batch.put(key, vec![random.random::<u8>(); len]);
        }
    }
    batch
}

pub type Model = BTreeMap<Bytes, Bytes>;

pub fn apply_to_model(model: &mut Model, batch: &WriteBatch) {
    for (key, change) in batch.iter() {
        match change {
            Some(value) => model.insert(key.clone(), value.clone()),
            None => model.remove(key),
        };
    }
}

pub fn pairs(read: &impl Read, range: &KeyRange, direction: Direction) -> Vec<(Bytes, Bytes)> {
    read.scan(range, direction)
        .map(|pair| pair.expect("readable"))
        .collect()
}

/// Compares everything that can be asked of a map.
pub fn assert_is(state: &ReplicaMap, model: &Model, random: &mut StdRng, context: &str) {
    let guard = state.read();
    let all = KeyRange::all();
    for direction in [Direction::Forward, Direction::Reverse] {
        assert_eq!(
            pairs(&guard, &all, direction),
            pairs(model, &all, direction),
            "{context}"
        );
        let bytes_max = random.random_range(0..9);
        let starts: Vec<_> = guard
            .scan_starts(&all, direction, bytes_max)
            .map(|item| item.expect("readable"))
            .collect();
        let expected: Vec<_> = model
            .scan_starts(&all, direction, bytes_max)
            .map(|item| item.expect("readable"))
            .collect();
        assert_eq!(starts, expected, "{context}");
        for (key, start) in starts {
            assert_eq!(
                guard.start_of(&key, bytes_max).expect("readable"),
                Some(start),
                "{context}"
            );
        }
        let mut bound = || Bytes::from(format!("k{:03}", random.random_range(0..300)));
        let range = KeyRange {
            start: bound(),
            end: Some(bound()),
        };
        assert_eq!(
            pairs(&guard, &range, direction),
            pairs(model, &range, direction),
            "{context}"
        );
    }
    for _ in 0..20 {
        let key = format!("k{:03}", random.random_range(0..300));
        assert_eq!(
            guard.get(key.as_bytes()).expect("readable"),
            model.get(key.as_bytes()).cloned(),
            "{context}"
        );
    }
    assert_eq!(guard.get(b"").expect("readable"), None);
    assert_eq!(
        guard.get(record::RECORD_KEY).expect("readable"),
        None,
        "a reserved key was shown"
    );
}

pub fn open(trees: &MemTrees, disk: &Arc<dyn Disk>) -> (MapStore, Checkpointer) {
    let trees = Arc::new(trees.clone());
    MapStore::open(trees, disk.clone(), Path::new("/data"), small_options()).expect("opened")
}

#[test]
fn a_map_is_what_a_model_is_through_freezes_and_checkpoints() {
    for seed in 0..20 {
        let mut random = StdRng::seed_from_u64(seed);
        let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(seed));
        let (store, mut checkpointer) = open(&MemTrees::new(), &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        assert_eq!(state.opened().origin, Origin::New);
        let mut model = Model::new();
        for index in 1..400 {
            let batch = random_batch(&mut random);
            apply_to_model(&mut model, &batch);
            state.apply(batch, applied(index)).expect("applied");
            match random.random_range(0..30) {
                0 => while checkpointer.pump() {},
                1 => {
                    checkpointer.pump();
                }
                2 => {
                    let snapshot = state.build_snapshot().expect("built");
                    assert_eq!(*snapshot.applied(), applied(index), "seed {seed}");
                    assert_eq!(snapshot_pairs(&snapshot), model, "seed {seed}");
                }
                3..6 => assert_is(
                    &state,
                    &model,
                    &mut random,
                    &format!("seed {seed} index {index}"),
                ),
                _ => {}
            }
        }
        assert_is(&state, &model, &mut random, &format!("seed {seed}"));
        assert!(store.metrics().checkpoints > 0);
        drop(state);
        let empty = store.metrics();
        assert_eq!(
            (empty.active_bytes, empty.frozen_bytes, empty.replicas),
            (0, 0, 0)
        );
    }
}

pub fn snapshot_pairs(snapshot: &crate::storage::snapshot::Snapshot) -> Model {
    let mut pairs = Model::new();
    let read = snapshot.for_each(&mut |key, value| {
        pairs.insert(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        Ok(())
    });
    read.expect("a true snapshot");
    pairs
}

/// Applies a random batch to both.
pub fn step(state: &ReplicaMap, model: &mut Model, random: &mut StdRng, index: u64) {
    let batch = random_batch(random);
    apply_to_model(model, &batch);
    state.apply(batch, applied(index)).expect("applied");
}

pub fn send(
    from: &crate::storage::snapshot::Snapshot,
    to: &ReplicaMap,
) -> crate::storage::snapshot::Snapshot {
    let mut receiver = to.begin_receive().expect("begun");
    let mut buffer = vec![0; 1000];
    while receiver.bytes_len() < from.bytes_len() {
        let offset = receiver.bytes_len();
        let read = from.read_at(offset, &mut buffer).expect("readable");
        receiver
            .write_at(offset, &buffer[..read])
            .expect("in order");
    }
    receiver.finish().expect("whole")
}

#[test]
fn a_checkpoint_is_never_ahead_of_the_log() {
    let mut random = StdRng::seed_from_u64(1);
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let trees = MemTrees::new();
    let (store, mut checkpointer) = open(&trees, &disk);
    let log = Arc::new(TestLog::default());
    let state = store.replica(KEY, log.clone()).expect("opened");
    let mut model = Model::new();
    for index in 1..200 {
        step(&state, &mut model, &mut random, index);
        log.sync_through(index / 2);
        while checkpointer.pump() {}
        let tree_applied = state
            .replica
            .read_memtables()
            .tree_applied
            .log_id
            .map_or(0, |id| id.index);
        assert!(
            tree_applied <= index / 2,
            "the tree is at {tree_applied}, the log at {}",
            index / 2
        );
        if index % 50 == 0 {
            let snapshot = state.build_snapshot().expect("built");
            assert!(
                snapshot.applied().log_id.map_or(0, |id| id.index) <= index / 2,
                "a snapshot is ahead of the log"
            );
        }
    }
    assert!(store.metrics().checkpoints > 3);
    log.sync_through(199);
    assert_eq!(
        *state.build_snapshot().expect("built").applied(),
        applied(199)
    );
}

#[test]
fn a_failed_log_stops_the_replica() {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let (store, _checkpointer) = open(&MemTrees::new(), &disk);
    let log = Arc::new(TestLog::default());
    let state = store.replica(KEY, log.clone()).expect("opened");
    let mut batch = WriteBatch::default();
    batch.put("k", vec![0; 5000]);
    state.apply(batch, applied(1)).expect("applied");
    log.fail();
    let error = state
        .apply(WriteBatch::default(), applied(2))
        .expect_err("the log has failed");
    assert!(format!("{error:?}").contains("no space"), "{error:?}");
    assert!(state.build_snapshot().is_err());
}

#[test]
fn an_installed_snapshot_is_the_whole_map_and_survives_at_once() {
    for seed in 0..10 {
        let mut random = StdRng::seed_from_u64(seed);
        let (from_disk, to_disk): (Arc<dyn Disk>, Arc<dyn Disk>) =
            (Arc::new(SimDisk::new(1)), Arc::new(SimDisk::new(2)));
        let (from_store, _) = open(&MemTrees::new(), &from_disk);
        let from = from_store
            .replica(
                ReplicaKey {
                    replica: ReplicaId(6),
                    ..KEY
                },
                TestLog::durable(),
            )
            .expect("opened");
        let mut model = Model::new();
        (1..200).for_each(|index| step(&from, &mut model, &mut random, index));
        let snapshot = from.build_snapshot().expect("built");

        let trees = MemTrees::new();
        let (store, mut checkpointer) = open(&trees, &to_disk);
        let to = store.replica(KEY, TestLog::durable()).expect("opened");
        let mut other = Model::new();
        (1..100).for_each(|index| step(&to, &mut other, &mut random, index));
        checkpointer.pump();
        let received = send(&snapshot, &to);
        let dropped = send(&snapshot, &to).path();
        assert!(
            to_disk
                .open(&dropped, crate::storage::disk::Open::Existing)
                .is_err(),
            "what was not installed stays"
        );
        to.install(&received).expect("installed");
        assert_eq!(to.applied(), *snapshot.applied());
        assert_is(&to, &model, &mut random, "installed");
        assert!(to.install(&received).is_ok(), "again changes nothing");
        step(&to, &mut model, &mut random, 200);
        assert_is(&to, &model, &mut random, "goes on");
        assert!(to.install(&received).is_err(), "a map went backwards");

        drop((to, store));
        trees.crash(crate::storage::mem_trees::Crash::Power, seed);
        let (store, _) = open(&trees, &to_disk);
        let to = store
            .replica(KEY, TestLog::durable())
            .expect("opened again");
        assert!(to.applied().log_id >= snapshot.applied().log_id);
        assert!(to.current_snapshot().is_some());
    }
}

/// There is one checkpointer for all replicas of a node.
#[test]
fn a_replica_whose_tree_is_in_use_holds_up_no_other_and_gets_its_checkpoint_afterwards() {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let (store, mut checkpointer) = open(&MemTrees::new(), &disk);
    let other_key = ReplicaKey {
        replica: ReplicaId(6),
        ..KEY
    };
    let busy = store.replica(KEY, TestLog::durable()).expect("opened");
    let other = store
        .replica(other_key, TestLog::durable())
        .expect("opened");
    let writer = busy.replica.lock_writer_first();
    for state in [&busy, &other] {
        let mut batch = WriteBatch::default();
        batch.put("k", vec![0; 5000]);
        state.apply(batch, applied(1)).expect("applied");
        assert!(state.bytes().frozen > 0, "a checkpoint is due");
    }
    // In this thread: if it waited for the writer, it would for ever.
    while checkpointer.pump() {}
    assert_eq!(other.bytes().frozen, 0);
    assert!(busy.bytes().frozen > 0, "its tree was written to by two");
    drop(writer);
    while checkpointer.pump() {}
    assert_eq!(busy.bytes().frozen, 0);
}

/// The root of a tree that was dropped may come back from a power cut without all of its pages.
#[test]
fn a_tree_of_nobody_that_cannot_be_dropped_keeps_no_node_from_starting() {
    use crate::storage::mem_trees::Crash;
    use crate::storage::tree::Trees;
    let outcomes = [
        (io::ErrorKind::InvalidData, true),
        (io::ErrorKind::Other, true),
        (io::ErrorKind::StorageFull, false),
    ];
    for (kind, is_given_up) in outcomes {
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
        trees
            .open("g9-r9.1")
            .expect("left by a replica that is gone");
        trees.sync().expect("synced");
        let (store, _) = open(&trees, &disk);
        trees.set_fault(Arc::new(move |step| {
            if step == "drop" {
                Err(kind.into())
            } else {
                Ok(())
            }
        }));
        store
            .keep_only(&std::collections::BTreeSet::new())
            .expect_err("it cannot be dropped");
        drop(store);
        trees.crash(Crash::Kill, 1);
        assert_eq!(
            trees.names().expect("listed").is_empty(),
            is_given_up,
            "{kind}: the next start meets the tree again"
        );
    }
}

/// Without any tree the node would fill all of its maps anew. That takes still more room, and meets
/// the same again.
#[test]
fn a_full_disk_takes_no_tree_along_while_a_map_is_rebuilt() {
    use crate::storage::mem_trees::Crash;
    use crate::storage::tree::Trees;
    let outcomes = [
        (io::ErrorKind::InvalidData, true),
        (io::ErrorKind::StorageFull, false),
    ];
    for (kind, are_given_up) in outcomes {
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
        let (store, mut checkpointer) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        let mut batch = WriteBatch::default();
        batch.put("k", vec![0; 5000]);
        state.apply(batch, applied(1)).expect("applied");
        while checkpointer.pump() {}
        state.build_snapshot().expect("built");
        drop((state, store, checkpointer));
        trees.open("g9-r9.1").expect("of another replica");
        trees.drop_tree(&record::tree_name(KEY, 1)).expect("lost");
        trees.sync().expect("synced");

        let fault = move |step: &str| {
            if step == "write" {
                Err(kind.into())
            } else {
                Ok(())
            }
        };
        trees.set_fault(Arc::new(fault));
        let (store, _) = open(&trees, &disk);
        store
            .replica(KEY, TestLog::durable())
            .err()
            .expect("it cannot be rebuilt");
        drop(store);
        trees.crash(Crash::Kill, 1);
        let has_other = trees
            .names()
            .expect("listed")
            .contains(&"g9-r9.1".to_owned());
        assert_eq!(has_other, !are_given_up, "{kind}");
    }
}

#[test]
fn a_digest_is_noted_however_soon_the_table_of_its_entry_is_written_down() {
    for len in [1, 5000] {
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
        let (store, mut checkpointer) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        let (mut batch, asked) = (WriteBatch::default(), LogId { term: 1, index: 1 });
        batch.put("k", vec![7; len]);
        state.want_digest(asked);
        state.apply(batch, applied(1)).expect("applied");
        while checkpointer.pump() {}
        state.write_down();
        while checkpointer.pump() {}
        let noted = state.noted_digest().map(|(at, digest)| (at, digest.pairs));
        assert_eq!(noted, Some((asked, 1)), "{len} bytes");
    }
}

/// A lock says nothing of a panic of who held it.
#[test]
#[cfg(debug_assertions)]
fn a_map_in_which_a_change_panicked_takes_no_other_and_is_not_written_down() {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let trees = MemTrees::new();
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let put = |key: &'static str| {
        let mut batch = WriteBatch::default();
        batch.put(key, vec![1]);
        batch
    };
    state.apply(put("a"), applied(1)).expect("applied");

    state.replica.write_memtables().frozen_bytes += 1;
    let change = || state.apply(put("b"), applied(2));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(change));
    assert!(panicked.is_err(), "the bytes don't add up");
    state.replica.write_memtables().frozen_bytes -= 1;

    assert!(state.failure().is_some());
    assert!(state.apply(put("c"), applied(3)).is_err());
    while checkpointer.pump() {}
    store.close().expect("closed");
    drop((state, store, checkpointer));
    let (store, _checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let kept = state.applied().log_id;
    assert!(
        kept.is_none_or(|id| id.index < 2),
        "{kept:?} was written down"
    );
}
