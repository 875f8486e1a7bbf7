//! The clean table: gets of quiet data do not ask the tree, and what it says is what the tree says,
//! whatever happens to the map.

use std::path::Path;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::crash_tests::{ModelLog, donated, index_of};
use super::tests::{
    KEY, Model, TestLog, applied, apply_to_model, assert_is, open, small_options, step,
};
use super::*;
use crate::sm::ports::{KeyRange, Read, WriteBatch};
use crate::storage::ReplicaKey;
use crate::storage::disk::Disk;
use crate::storage::mem_trees::{Crash, MemTrees};
use crate::storage::sim_disk::SimDisk;
use crate::storage::tree::Trees;
use crate::types::{GroupId, ReplicaId};

fn put(state: &ReplicaMap, index: u64, pairs: &[(&str, usize)]) {
    let mut batch = WriteBatch::default();
    pairs
        .iter()
        .for_each(|(key, len)| batch.put(key.to_string(), vec![index as u8; *len]));
    state.apply(batch, applied(index)).expect("applied");
}

/// Writes all tables to the tree, and leaves no tree to read from: its handles are dead.
fn write_down_and_lose_the_tree(
    state: &ReplicaMap,
    checkpointer: &mut Checkpointer,
    trees: &MemTrees,
) {
    state.write_down();
    while checkpointer.pump() {}
    assert_eq!(
        state.bytes(),
        MemtableBytes::default(),
        "all of it is in the tree"
    );
    trees.crash(Crash::Kill, 1);
}

#[test]
fn a_get_of_what_was_written_down_does_not_ask_the_tree() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store_replica(&store);
    put(&state, 1, &[("a", 9), ("b", 9)]);
    let mut batch = WriteBatch::default();
    batch.delete("b");
    state.apply(batch, applied(2)).expect("applied");
    write_down_and_lose_the_tree(&state, &mut checkpointer, &trees);

    let guard = state.read();
    assert_eq!(
        guard.get(b"a").expect("in memory").as_deref(),
        Some(&[1; 9][..])
    );
    assert_eq!(
        guard
            .start_of(b"a", 2)
            .expect("in memory")
            .map(|start| start.len),
        Some(9)
    );
    assert_eq!(guard.get(b"b").expect("in memory"), None);
    guard.get(b"c").expect_err("only the tree could tell");
}

fn store_replica(store: &MapStore) -> ReplicaMap {
    store.replica(KEY, TestLog::durable()).expect("opened")
}

#[test]
fn a_small_table_leaves_the_gets_of_other_keys_in_memory() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store_replica(&store);
    put(&state, 1, &[("a", 900), ("b", 900)]);
    state.write_down();
    while checkpointer.pump() {}
    put(&state, 2, &[("b", 7)]);
    write_down_and_lose_the_tree(&state, &mut checkpointer, &trees);

    let guard = state.read();
    assert_eq!(
        guard.get(b"a").expect("in memory").as_deref(),
        Some(&[1; 900][..])
    );
    assert_eq!(
        guard.get(b"b").expect("in memory").as_deref(),
        Some(&[2; 7][..])
    );
}

#[test]
fn a_clean_table_that_is_full_forgets_what_it_has_no_room_for() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store_replica(&store);
    put(&state, 1, &[("a", 2300), ("b", 1500)]);
    state.write_down();
    while checkpointer.pump() {}
    put(&state, 2, &[("b", 1700)]);
    write_down_and_lose_the_tree(&state, &mut checkpointer, &trees);

    assert!(state.read().get(b"a").expect("in memory").is_some());
    state
        .read()
        .get(b"b")
        .expect_err("an old value stayed, or more than a table may have");
}

/// Every clean entry is that of the tree, unless a table above hides it; and the sums are right.
fn assert_clean_is_true(store: &MapStore, state: &ReplicaMap, context: &str) {
    let tables = state.replica.read_memtables();
    assert_eq!(
        store.metrics().clean_bytes,
        tables.clean_bytes(),
        "{context}"
    );
    let Some(clean) = &tables.clean else { return };
    let mut bytes = 0;
    for (key, change) in clean.table.iter() {
        bytes += key.len() + 160 + change.as_ref().map_or(0, |value| value.len());
        let is_hidden = tables
            .frozen
            .iter()
            .any(|frozen| frozen.table.iter().any(|(hidden, _)| hidden == key));
        let stored = tables.tree.get(key).expect("readable");
        assert!(
            is_hidden || stored == *change,
            "{context}: {key:?} is stale"
        );
    }
    assert_eq!(clean.table.bytes(), bytes, "{context}");
    // A table is frozen with the batch that fills it.
    assert!(
        bytes <= small_options().table_bytes_max + 16_000,
        "{context}: {bytes}"
    );
}

/// Deletes a whole range, as moves do when slots have left.
fn clear(state: &ReplicaMap, model: &mut Model, random: &mut StdRng, index: u64) {
    let from = random.random_range(0..250);
    let range = KeyRange {
        start: format!("k{from:03}").into(),
        end: Some(format!("k{:03}", from + 50).into()),
    };
    let mut batch = WriteBatch::default();
    let keys: Vec<_> = state
        .read()
        .scan(&range, crate::sm::ports::Direction::Forward)
        .collect();
    keys.into_iter()
        .for_each(|pair| batch.delete(pair.expect("readable").0));
    apply_to_model(model, &batch);
    state.apply(batch, applied(index)).expect("applied");
}

#[test]
fn a_map_with_a_clean_table_is_what_a_model_is_whatever_happens_to_it() {
    let mut kept = 0;
    for seed in 0..30 {
        let mut random = StdRng::seed_from_u64(seed);
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(seed)));
        let (mut store, mut checkpointer) = open(&trees, &disk);
        let mut state = store_replica(&store);
        let mut model = Model::new();
        let mut index = 0;

        for turn in 0..500 {
            let context = format!("seed {seed} turn {turn}");
            index += 1;
            step(&state, &mut model, &mut random, index);
            match random.random_range(0..40) {
                0..6 => state.write_down(),
                6..12 => while checkpointer.pump() {},
                12 => {
                    state.build_snapshot().expect("built");
                }
                13 => {
                    index += 1;
                    clear(&state, &mut model, &mut random, index);
                }
                14 => {
                    trees.begin_fresh(0).expect("begun");
                    let checkpointer = std::cell::RefCell::new(&mut checkpointer);
                    let meanwhile = || {
                        checkpointer.borrow_mut().pump();
                        true
                    };
                    store.compact(&[KEY], &meanwhile).expect("copied");
                }
                15 => {
                    let log = ModelLog::random(&mut random, index as usize + 20);
                    let (donated, _donor) = donated(&log, index + 20);
                    state
                        .install(&super::tests::send(&donated, &state))
                        .expect("installed");
                    index = index_of(&state.applied());
                    model = log.map_at(index);
                }
                16 => {
                    store.close().expect("closed");
                    drop((state, store));
                    trees.crash(Crash::Kill, seed);
                    (store, checkpointer) = open(&trees, &disk);
                    state = store_replica(&store);
                    assert_eq!(index_of(&state.applied()), index, "{context}");
                }
                17 => state.replica.drop_clean(),
                _ => {}
            }
            kept += usize::from(state.replica.clean_bytes() > small_options().table_bytes_max / 2);
            assert_clean_is_true(&store, &state, &context);
            if turn % 7 == 0 {
                assert_is(&state, &model, &mut random, &context);
            }
        }
        assert_is(&state, &model, &mut random, &format!("seed {seed}"));
        drop(state);
        assert_eq!(store.metrics().clean_bytes, 0);
    }
    assert!(kept > 500, "clean tables are hardly there: {kept}");
}

#[test]
fn clean_tables_make_room_for_the_others() {
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
    let mut clean_max = 0;

    for index in 1..=20 {
        for state in &states {
            put(state, index, &[(&format!("k{index}"), 1000)]);
            while checkpointer.pump() {}
            let metrics = store.metrics();
            clean_max = clean_max.max(metrics.clean_bytes);
            let tables = metrics.active_bytes + metrics.frozen_bytes + metrics.clean_bytes;
            assert!(tables <= 410_000, "{metrics:?}");
        }
    }
    assert!(
        clean_max > 200_000,
        "what nobody needs is not used: {clean_max}"
    );
}
