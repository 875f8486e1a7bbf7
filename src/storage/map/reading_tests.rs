//! Reads of a map whose tree waits for the disk, beside all that must not wait for it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::disk_waits::DiskWaits;
use super::tests::{
    KEY, Model, TestLog, applied, apply_to_model, open, pairs, random_batch, small_options,
};
use super::*;
use crate::sm::ports::{Direction, KeyRange, Read, WriteBatch};
use crate::storage::disk::Disk;
use crate::storage::mem_trees::{Gate, MemTrees};
use crate::storage::sim_disk::SimDisk;

/// Longer than anything takes on a busy machine that waits for nothing.
const PATIENCE: Duration = Duration::from_secs(20);

/// Opens a gate in the end: what waits for it on the thread of the test would never tell.
struct Watchdog {
    gate: Arc<Gate>,
    is_over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<bool>>,
}

impl Watchdog {
    fn close(gate: &Arc<Gate>) -> Self {
        gate.close(true);
        let (gate, is_over) = (gate.clone(), Arc::new(AtomicBool::new(false)));
        let (to_open, told) = (gate.clone(), is_over.clone());
        let watch = move || {
            let end = std::time::Instant::now() + PATIENCE;
            while !told.load(Ordering::Acquire) && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            to_open.close(false);
            told.load(Ordering::Acquire)
        };
        Self {
            gate,
            is_over,
            thread: Some(std::thread::spawn(watch)),
        }
    }

    /// Lets everybody pass. Returns whether nobody had to be helped before.
    fn open(mut self) -> bool {
        self.is_over.store(true, Ordering::Release);
        self.gate.close(false);
        self.thread
            .take()
            .is_some_and(|thread| thread.join().expect("it ends well"))
    }
}

fn one(key: &str, value: &str) -> WriteBatch {
    let mut batch = WriteBatch::default();
    batch.put(key.to_owned(), value.to_owned());
    batch
}

/// A map with `cold` in its tree alone.
fn with_cold_key() -> (MemTrees, MapStore, Checkpointer, ReplicaMap) {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let options = MapOptions {
        cache_bytes: 0,
        ..small_options()
    };
    let opened = MapStore::open(Arc::new(trees.clone()), disk, Path::new("/"), options);
    let (store, mut checkpointer) = opened.expect("opened");
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    state
        .apply(one("cold", "value"), applied(1))
        .expect("applied");
    state.write_down();
    while checkpointer.pump() {}
    // No table of the one before is kept for gets.
    drop(state);
    let state = store
        .replica(KEY, TestLog::durable())
        .expect("opened again");
    (trees, store, checkpointer, state)
}

#[tokio::test]
async fn a_read_that_waits_for_the_disk_holds_up_neither_its_thread_nor_an_entry() {
    for kind in [ReadKind::Keys, ReadKind::Page, ReadKind::Entry] {
        let (trees, store, _checkpointer, state) = with_cold_key();
        state.expect_waits();
        let watchdog = Watchdog::close(&trees.reads);
        let reading = tokio::spawn({
            let state = state.clone();
            async move {
                state
                    .read_in(kind, |read| read.get(b"cold").expect("readable"))
                    .await
            }
        });
        while trees.reads.waiting() == 0 && trees.reads.is_closed() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        state
            .apply(one("hot", "value"), applied(2))
            .expect("applied");
        let hot = state.read().get(b"hot").expect("readable");
        assert!(watchdog.open(), "{kind:?}: somebody waited for the disk");
        assert_eq!(hot.as_deref(), Some(&b"value"[..]));
        assert_eq!(reading.await.expect("read").as_deref(), Some(&b"value"[..]));
        assert_eq!(
            store.metrics().reads_elsewhere,
            u64::from(kind != ReadKind::Page)
        );
    }
}

#[test]
fn reads_go_elsewhere_only_when_the_disk_takes_much_of_the_time() {
    let waits = DiskWaits::default();
    let count = |took: Duration, times: usize| (0..times).filter(|_| waits.note(took)).count();
    assert_eq!(
        count(Duration::from_micros(400), 100_000),
        0,
        "as quick as they are in memory"
    );
    assert_eq!(
        count(Duration::from_millis(1), 5),
        0,
        "a few were put off by something else"
    );
    assert!(count(Duration::from_millis(1), 1000) > 0);
    assert!(count(Duration::from_millis(200), 1) > 0);
}

#[test]
fn nothing_goes_elsewhere_while_the_cache_holds_all_trees() {
    for (cache_bytes, expected) in [(64 << 20, false), (0, true)] {
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
        let options = MapOptions {
            cache_bytes,
            ..small_options()
        };
        let opened = MapStore::open(Arc::new(trees), disk, Path::new("/"), options);
        let (store, mut checkpointer) = opened.expect("opened");
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        state
            .apply(one("cold", "value"), applied(1))
            .expect("applied");
        state.write_down();
        while checkpointer.pump() {}
        for _ in 0..5 {
            state.read_here(|_| std::thread::sleep(Duration::from_millis(40)));
        }
        let kinds = [ReadKind::Keys, ReadKind::Entry, ReadKind::Page];
        assert_eq!(kinds.map(|kind| state.reads_wait(kind)), [expected; 3]);
    }
}

#[test]
fn a_look_ahead_sees_what_a_guard_does_while_nothing_is_applied() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let (mut random, mut model) = (StdRng::seed_from_u64(7), Model::new());
    for index in 1..=600 {
        let batch = random_batch(&mut random);
        apply_to_model(&mut model, &batch);
        state.apply(batch, applied(index)).expect("applied");
        if index % 7 == 0 {
            checkpointer.pump();
        }
        if index % 20 != 0 {
            continue;
        }
        state.preview(|read| {
            for direction in [Direction::Forward, Direction::Reverse] {
                for range in ranges(index) {
                    let context = format!("entry {index}, {range:?}, {direction:?}");
                    assert_eq!(
                        pairs(read, &range, direction),
                        pairs(&model, &range, direction),
                        "{context}"
                    );
                    let seen: Result<Vec<_>, _> = read.scan_starts(&range, direction, 3).collect();
                    let known: Result<Vec<_>, _> =
                        model.scan_starts(&range, direction, 3).collect();
                    assert_eq!(
                        seen.expect("readable"),
                        known.expect("readable"),
                        "{context}"
                    );
                }
            }
            for key in (0..300).map(|n| format!("k{n:03}")) {
                let expected = model.get(key.as_bytes());
                assert_eq!(
                    read.get(key.as_bytes()).expect("readable").as_ref(),
                    expected
                );
                let start = read.start_of(key.as_bytes(), 2).expect("readable");
                let expected = Read::start_of(&model, key.as_bytes(), 2).expect("readable");
                assert_eq!(start, expected);
            }
        });
    }
    drop(store);
}

fn ranges(index: u64) -> [KeyRange; 3] {
    let bound = |n: u64| Bytes::from(format!("k{:03}", n % 300));
    [
        KeyRange::all(),
        KeyRange {
            start: bound(index * 7),
            end: Some(bound(index * 7 + 40)),
        },
        KeyRange {
            start: bound(index),
            end: None,
        },
    ]
}
