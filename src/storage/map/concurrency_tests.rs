//! The map while several things go on at once: readers beside checkpoints, writers beside a
//! snapshot scan, a full node.

use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use futures::FutureExt;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::crash_tests::{ModelLog, donated};
use super::scan::{Scanned, SnapshotTrust, publish, scan};
use super::tests::{
    KEY, Model, TestLog, applied, apply_to_model, assert_is, open, pairs, send, small_options,
    snapshot_pairs,
};
use super::*;
use crate::sm::ports::{Direction, KeyRange, Pairs, StoreError, WriteBatch};
use crate::storage::ReplicaKey;
use crate::storage::disk::{Disk, RealDisk};
use crate::storage::mem_trees::{Crash, MemTrees};
use crate::storage::sim_disk::SimDisk;
use crate::storage::sled_tree::{SledOptions, SledTrees};
use crate::storage::tree::{Tree, Trees, Walk};
use crate::storage::watched_disk::{DiskChange, WatchedDisk};
use crate::types::{GroupId, ReplicaId};

/// Every key gets the same value in each batch, so any tear shows.
#[test]
fn readers_and_snapshots_see_one_point_in_time_while_checkpoints_go_on() {
    let home = tempfile::tempdir().expect("a directory");
    let trees =
        SledTrees::open(&home.path().join("trees"), &SledOptions::default()).expect("opened");
    let (store, checkpointer) = MapStore::open(
        Arc::new(trees),
        Arc::new(RealDisk),
        home.path(),
        small_options(),
    )
    .expect("opened");
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let checkpoints = std::thread::spawn(|| checkpointer.run());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .expect("a runtime");
            for index in 1..=400u64 {
                let mut batch = WriteBatch::default();
                for key in 0..60u8 {
                    // Some keys go and come back, so that nodes of the tree split and merge.
                    match key % 3 == 0 && index % 2 == 0 {
                        true => batch.delete(vec![b'k', key]),
                        false => batch.put(vec![b'k', key], index.to_string()),
                    }
                }
                runtime.block_on(state.wait_room());
                state.apply(batch, applied(index)).expect("applied");
            }
            done.store(true, Ordering::Release);
        });
        scope.spawn(|| {
            for direction in [Direction::Forward, Direction::Reverse].into_iter().cycle() {
                if done.load(Ordering::Acquire) {
                    break;
                }
                let guard = state.read();
                let index = guard.applied().log_id.map_or(0, |id| id.index);
                assert_one_point(pairs(&guard, &KeyRange::all(), direction), index);
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let snapshot = state.build_snapshot().expect("built");
                let index = snapshot.applied().log_id.map_or(0, |id| id.index);
                assert_one_point(snapshot_pairs(&snapshot), index);
            }
        });
    });
    assert!(store.metrics().checkpoints > 50);
    store.close().expect("closed");
    checkpoints
        .join()
        .expect("the checkpointer ends when the store closes");
}

/// The log is purged behind either of them, so one must be there at every moment, also after a
/// power cut.
#[test]
fn a_snapshot_that_is_built_while_another_is_installed_takes_no_file_away() {
    let log = ModelLog::random(&mut StdRng::seed_from_u64(9), 300);
    let (donated, _donor) = donated(&log, 200);
    let (disk, trees) = (WatchedDisk::new(SimDisk::new(1)), MemTrees::new());
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let (store, _checkpointer) = open(&trees, &shared);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    log.replay(&state, 100).expect("applied");
    let Ok(Scanned::New(built)) = scan(&state.replica, SnapshotTrust::Current) else {
        panic!("there is none yet")
    };
    let received = send(&donated, &state);

    // What is built is published as soon as the other lets it, which is once the other is under its
    // name.
    let waiting = Arc::new(Mutex::new(Some(built)));
    let (also_waiting, publisher) = (waiting.clone(), state.clone());
    disk.watch(move |change| {
        let is_free = || publisher.replica.current_snapshot.try_lock().is_some();
        if matches!(change, DiskChange::SyncDir(_))
            && is_free()
            && let Some(built) = also_waiting.lock().take()
        {
            publish(&publisher.replica, built).expect("published");
        }
    });
    state.install(&received).expect("installed");
    if let Some(built) = waiting.lock().take() {
        publish(&state.replica, built).expect("published");
    }

    assert_eq!(
        state.current_snapshot().expect("installed").applied(),
        donated.applied()
    );
    drop((state, store));
    trees.crash(Crash::Worst, 1);
    disk.disk.crash();
    let (store, _checkpointer) = open(&trees, &shared);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    assert_eq!(state.applied(), applied(200), "no file is left of either");
    log.assert_true(&state, &mut StdRng::seed_from_u64(1), "from the file");
}

fn assert_one_point(pairs: impl IntoIterator<Item = (Bytes, Bytes)>, index: u64) {
    let pairs: Vec<_> = pairs.into_iter().collect();
    let keys = if index == 0 {
        0
    } else {
        60 - if index.is_multiple_of(2) { 20 } else { 0 }
    };
    assert_eq!(pairs.len(), keys, "at {index}");
    assert!(
        pairs.iter().all(|(_, value)| *value == index.to_string()),
        "torn at {index}: {pairs:?}"
    );
}

type Hook = Box<dyn Fn(u32) + Send + Sync>;

/// Trees that call back at the first pair of each walk, with the number of the walk.
struct HookedTrees {
    trees: MemTrees,
    hook: Arc<Mutex<Option<Hook>>>,
    walks: Arc<Mutex<u32>>,
    walking: Arc<AtomicBool>,
}

struct HookedTree {
    tree: Arc<dyn Tree>,
    hook: Arc<Mutex<Option<Hook>>>,
    walks: Arc<Mutex<u32>>,
    walking: Arc<AtomicBool>,
}

impl Trees for HookedTrees {
    fn open(&self, name: &str) -> Result<Arc<dyn Tree>, StoreError> {
        let tree = self.trees.open(name)?;
        let (hook, walks, walking) = (self.hook.clone(), self.walks.clone(), self.walking.clone());
        Ok(Arc::new(HookedTree {
            tree,
            hook,
            walks,
            walking,
        }))
    }
    fn drop_tree(&self, name: &str) -> Result<(), StoreError> {
        self.trees.drop_tree(name)
    }
    fn names(&self) -> Result<Vec<String>, StoreError> {
        self.trees.names()
    }
    fn begin_fresh(&self, live_bytes: u64) -> Result<(), StoreError> {
        self.trees.begin_fresh(live_bytes)
    }
    fn ensure_room(&self, bytes: u64) -> Result<(), StoreError> {
        self.trees.ensure_room(bytes)
    }
    fn outdated(&self) -> Result<Vec<String>, StoreError> {
        self.trees.outdated()
    }
    fn disk_bytes(&self) -> u64 {
        self.trees.disk_bytes()
    }
    fn sync(&self) -> Result<(), StoreError> {
        self.trees.sync()
    }
    fn condemn(&self, reason: &str) {
        self.trees.condemn(reason);
    }
}

impl Tree for HookedTree {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.tree.get(key)
    }
    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        self.tree.scan(range, direction)
    }
    fn write(&self, key: &[u8], change: Option<&[u8]>) -> Result<(), StoreError> {
        assert!(
            !self.walking.load(Ordering::Acquire),
            "the tree does not stand still"
        );
        self.tree.write(key, change)
    }
    fn flush(&self) -> Result<(), StoreError> {
        self.tree.flush()
    }
    fn walk(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> Walk) -> Result<(), StoreError> {
        let walk = {
            let mut walks = self.walks.lock();
            *walks += 1;
            *walks
        };
        self.walking.store(true, Ordering::Release);
        if let Some(hook) = &*self.hook.lock() {
            hook(walk);
        }
        let walked = self.tree.walk(visit);
        self.walking.store(false, Ordering::Release);
        walked
    }
}

/// The checkpointer has work throughout the scan, and does it before or after.
#[test]
fn the_tree_stands_still_while_it_is_scanned() {
    let (store, checkpointer, state, _) = hooked(|state| {
        Box::new(move |_walk| {
            let mut batch = WriteBatch::default();
            batch.put("n", vec![7; 4000]);
            state
                .apply(
                    batch,
                    applied(state.applied().log_id.map_or(0, |id| id.index) + 1),
                )
                .expect("applied");
            (0..50).for_each(|_| std::thread::yield_now());
        })
    });
    let checkpoints = std::thread::spawn(|| checkpointer.run());
    for _ in 0..4 {
        let snapshot = state.build_snapshot().expect("built");
        assert!(
            snapshot.applied().log_id < state.applied().log_id,
            "what came during the scan is not in it"
        );
    }
    store.close().expect("closed");
    checkpoints
        .join()
        .expect("the checkpointer never met a scan");
}

/// A map of 2000 pairs at index 1, whose next walks call `hook`.
fn hooked(hook: impl FnOnce(ReplicaMap) -> Hook) -> (MapStore, Checkpointer, ReplicaMap, Model) {
    let (slot, walks) = (Arc::new(Mutex::new(None)), Arc::default());
    let trees = HookedTrees {
        trees: MemTrees::new(),
        hook: slot.clone(),
        walks,
        walking: Arc::default(),
    };
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let opened = MapStore::open(Arc::new(trees), disk, Path::new("/data"), small_options());
    let (store, mut checkpointer) = opened.expect("opened");
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let mut batch = WriteBatch::default();
    (0..2000).for_each(|n| batch.put(format!("k{n:04}"), "v"));
    let mut model = Model::new();
    apply_to_model(&mut model, &batch);
    state.apply(batch, applied(1)).expect("applied");
    while checkpointer.pump() {}
    *slot.lock() = Some(hook(state.clone()));
    (store, checkpointer, state, model)
}

#[test]
fn a_scan_that_writers_crowd_gives_up_twice_and_then_goes_through() {
    let (store, mut checkpointer, state, model) = hooked(|state| {
        Box::new(move |_walk| {
            for n in 0..5u64 {
                let mut batch = WriteBatch::default();
                batch.put(format!("n{n}"), vec![7; 4000]);
                state
                    .apply(
                        batch,
                        applied(state.applied().log_id.map_or(0, |id| id.index) + 1),
                    )
                    .expect("applied");
            }
        })
    });
    let snapshot = state.build_snapshot().expect("built in the end");
    assert_eq!(store.metrics().scans_given_up, 2);
    assert_eq!(
        *snapshot.applied(),
        applied(11),
        "what the third scan began with"
    );
    assert_eq!(snapshot_pairs(&snapshot).len(), model.len() + 5);
    assert_eq!(state.applied(), applied(16), "writers were held back");
    assert!(
        state.wait_room().now_or_never().is_none(),
        "there is room for more than the limit"
    );
    while checkpointer.pump() {}
    assert!(state.wait_room().now_or_never().is_some());
}

/// Trees at whose every change the map is given one more table to write down, up to so many:
/// writers who are as fast as the disk.
fn fed_while_written(trees: &MemTrees, state: &ReplicaMap, tables_max: u64) -> Arc<AtomicU64> {
    let tables = Arc::new(AtomicU64::new(0));
    let (count, state) = (tables.clone(), state.clone());
    trees.set_fault(Arc::new(move |step| {
        if step == "write" && count.fetch_add(1, Ordering::Relaxed) < tables_max {
            fill_table(&state);
        }
        Ok(())
    }));
    tables
}

fn fill_table(state: &ReplicaMap) {
    let next = state.applied().log_id.map_or(0, |id| id.index) + 1;
    let mut batch = WriteBatch::default();
    batch.put(format!("n{next:04}"), vec![7; 4000]);
    state.apply(batch, applied(next)).expect("applied");
}

/// Tables of writers who go on: more than whoever must not follow them for ever may write.
const TABLES_MAX: u64 = 300;

#[test]
fn a_snapshot_is_built_though_writers_are_as_fast_as_the_disk() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    fill_table(&state);
    let tables = fed_while_written(&trees, &state, TABLES_MAX);
    state.build_snapshot().expect("built");
    let written = tables.load(Ordering::Relaxed);
    assert!(written < TABLES_MAX, "it was built when the writers ended");

    // Those that came meanwhile are not forgotten.
    tables.store(TABLES_MAX, Ordering::Relaxed);
    while checkpointer.pump() {}
    assert_eq!(state.bytes().frozen, 0);
}

#[test]
fn a_map_whose_writers_are_as_fast_as_the_disk_leaves_others_their_turn() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let fed = store.replica(KEY, TestLog::durable()).expect("opened");
    let other = ReplicaKey {
        replica: ReplicaId(KEY.replica.0 + 1),
        ..KEY
    };
    let other = store.replica(other, TestLog::durable()).expect("opened");
    fill_table(&fed);
    fill_table(&other);
    let tables = fed_while_written(&trees, &fed, TABLES_MAX);
    while other.bytes().frozen > 0 {
        assert!(checkpointer.pump(), "it is not queued any more");
    }
    let written = tables.load(Ordering::Relaxed);
    assert!(
        written < TABLES_MAX,
        "it had its turn when the writers ended"
    );
}

#[test]
fn a_clean_stop_does_not_wait_for_writers_who_go_on() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, _checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    fill_table(&state);
    let tables = fed_while_written(&trees, &state, TABLES_MAX);
    store.close().expect("closed");
    let written = tables.load(Ordering::Relaxed);
    assert!(written < TABLES_MAX, "it was closed when the writers ended");
}

#[test]
fn a_scan_gives_way_to_an_install() {
    let log = ModelLog::random(&mut StdRng::seed_from_u64(1), 100);
    let (donated, _donor) = donated(&log, 100);
    let (store, _checkpointer, state, _) = hooked(|state| {
        let installing = Mutex::new(None);
        Box::new(move |_walk| {
            let mut installing = installing.lock();
            if installing.is_none() {
                let (installer, donated) = (state.clone(), donated.clone());
                *installing = Some(std::thread::spawn(move || {
                    let received = send(&donated, &installer);
                    installer.install(&received).expect("installed");
                }));
                while !state.replica.is_writer_wanted() {
                    std::thread::yield_now();
                }
            }
        })
    });
    let snapshot = state.build_snapshot().expect("built");
    assert_eq!(*snapshot.applied(), applied(100));
    assert_eq!(store.metrics().scans_given_up, 1);
    assert_is(
        &state,
        &log.map_at(100),
        &mut StdRng::seed_from_u64(2),
        "installed",
    );
}

#[test]
fn writers_wait_for_room_until_the_log_is_synced_and_tables_are_written() {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let (store, mut checkpointer) = open(&MemTrees::new(), &disk);
    let log = Arc::new(TestLog::default());
    let state = store.replica(KEY, log.clone()).expect("opened");
    let mut index = 0;
    while state.wait_room().now_or_never().is_some() {
        index += 1;
        let mut batch = WriteBatch::default();
        batch.put(format!("k{index}"), vec![0; 1000]);
        state.apply(batch, applied(index)).expect("applied");
        checkpointer.pump();
        assert!(index < 1000, "nothing bounds the tables");
    }
    assert!(state.bytes().frozen < 2 * small_options().frozen_bytes_max);
    assert!(
        state.settle().now_or_never().is_none(),
        "settled before the log was"
    );
    log.sync_through(index);
    assert!(state.settle().now_or_never().is_some());
    assert!(
        state.wait_room().now_or_never().is_none(),
        "nothing was written yet"
    );
    while checkpointer.pump() {}
    assert!(state.wait_room().now_or_never().is_some());
    assert_eq!(state.bytes(), MemtableBytes::default());
}

#[test]
fn what_can_wait_finds_no_room_before_others_do() {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let (store, mut checkpointer) = open(&MemTrees::new(), &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let mut index = 0;
    while state.wait_ample_room().now_or_never().is_some() {
        index += 1;
        let mut batch = WriteBatch::default();
        batch.put(format!("k{index}"), vec![0; 1000]);
        state.apply(batch, applied(index)).expect("applied");
        assert!(index < 1000, "nothing bounds the tables");
    }
    assert!(
        state.wait_room().now_or_never().is_some(),
        "nothing is left for what cannot wait"
    );
    while checkpointer.pump() {}
    assert!(state.wait_ample_room().now_or_never().is_some());
}

#[test]
fn many_small_tables_are_written_down_before_they_fill_the_node() {
    let options = MapOptions {
        table_bytes_max: 1 << 20,
        frozen_bytes_max: 1 << 20,
        node_bytes_max: 400_000,
        ..MapOptions::default()
    };
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let opened = MapStore::open(Arc::new(MemTrees::new()), disk, Path::new("/data"), options);
    let (store, mut checkpointer) = opened.expect("opened");
    let keys = (1..=100).map(|n| ReplicaKey {
        group: GroupId(n),
        replica: ReplicaId(n),
    });
    let states: Vec<_> = keys
        .map(|key| store.replica(key, TestLog::durable()).expect("opened"))
        .collect();
    for index in 1..=20 {
        for state in &states {
            let mut batch = WriteBatch::default();
            batch.put(format!("k{index}"), vec![0; 1000]);
            state.apply(batch, applied(index)).expect("applied");
            while checkpointer.pump() {}
            let metrics = store.metrics();
            assert!(
                metrics.active_bytes + metrics.frozen_bytes <= 210_000,
                "{metrics:?}"
            );
        }
    }
    assert!(store.metrics().checkpoints > 0);
}
