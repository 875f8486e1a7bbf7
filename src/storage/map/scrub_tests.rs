//! What has rotted in a snapshot file or a tree is found, and mended from what is whole.

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::crash_tests::ModelLog;
use super::record::tree_name;
use super::tests::{
    KEY, Model, TestLog, applied, apply_to_model, assert_is, open, random_batch, snapshot_pairs,
};
use super::*;
use crate::storage::Checked;
use crate::storage::disk::Disk;
use crate::storage::mem_trees::MemTrees;
use crate::storage::sim_disk::SimDisk;
use crate::storage::tree::Trees;

struct Map {
    disk: SimDisk,
    state: ReplicaMap,
    model: Model,
    /// Checkpoints are written, and the store lives, as long as this.
    _store: (MapStore, Checkpointer),
}

fn filled() -> Map {
    let (disk, trees) = (SimDisk::new(1), MemTrees::new());
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let store = open(&trees, &shared);
    let state = store.0.replica(KEY, TestLog::durable()).expect("opened");
    let (mut random, mut model) = (StdRng::seed_from_u64(3), Model::new());
    for index in 1..=200 {
        let batch = random_batch(&mut random);
        apply_to_model(&mut model, &batch);
        state.apply(batch, applied(index)).expect("applied");
    }
    Map {
        disk,
        state,
        model,
        _store: store,
    }
}

#[test]
fn a_flipped_bit_in_a_snapshot_file_is_found_and_the_file_written_anew() {
    let Map {
        disk,
        state,
        model,
        _store,
    } = filled();
    assert_eq!(
        state.check_snapshot(&mut |_| true),
        Checked::Unread,
        "there is none yet"
    );
    let path = state.build_snapshot().expect("built").path();
    assert_eq!(state.check_snapshot(&mut |_| true), Checked::Whole);
    assert_eq!(
        state.check_snapshot(&mut |_| false),
        Checked::Unread,
        "it was broken off"
    );
    let bytes = disk.contents(&path).expect("it is there").len() as u64;
    for at in 0..bytes {
        let bit = (at % 8) as u8;
        assert!(disk.flip_bit(&path, at, bit));
        let checked = state.check_snapshot(&mut |_| true);
        let told = matches!(&checked, Checked::Damaged(what) if what.contains(&KEY.to_string()));
        assert!(told, "byte {at}: {checked:?}");
        assert!(disk.flip_bit(&path, at, bit));
    }

    assert!(disk.flip_bit(&path, bytes / 2, 3));
    state
        .build_snapshot()
        .expect("the one that is there will do");
    assert!(
        matches!(state.check_snapshot(&mut |_| true), Checked::Damaged(_)),
        "nothing is mended by that"
    );
    state.rewrite_snapshot().expect("written anew");
    assert_eq!(state.check_snapshot(&mut |_| true), Checked::Whole);
    let again = state.current_snapshot().expect("there is one");
    assert_eq!((again.path(), snapshot_pairs(&again)), (path, model));
}

#[test]
fn a_flipped_bit_in_a_tree_is_found_and_the_replica_opened_again_rebuilds_it() {
    let (disk, trees): (Arc<dyn Disk>, _) = (Arc::new(SimDisk::new(1)), MemTrees::new());
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    assert_eq!(
        state.check_tree(&mut |_| true),
        Checked::Whole,
        "nothing is in it yet"
    );
    let mut random = StdRng::seed_from_u64(3);
    let log = ModelLog::random(&mut random, 400);
    log.replay(&state, 300).expect("applied");
    state.build_snapshot().expect("built");
    log.replay(&state, 400).expect("applied");
    while checkpointer.pump() {}
    let mut bytes = 0;
    let checked = state.check_tree(&mut |read| {
        bytes += read;
        true
    });
    assert_eq!((checked, bytes), (Checked::Whole, state.map_bytes()));
    assert_eq!(
        state.check_tree(&mut |_| false),
        Checked::Unread,
        "it was broken off"
    );

    let name = tree_name(KEY, 1);
    let mut flipped = 0;
    for at in 0..1000 {
        // The record is among them.
        if !trees.flip(&name, at) {
            continue;
        }
        flipped += 1;
        let checked = state.check_tree(&mut |_| true);
        let told = matches!(&checked, Checked::Damaged(what) if what.contains(&KEY.to_string()));
        assert!(told, "{at}: {checked:?}");
        assert!(trees.flip(&name, at));
    }
    assert!(flipped > 300, "{flipped} values were not empty");
    assert_eq!(state.check_tree(&mut |_| true), Checked::Whole);

    // More of them than the last checkpoint wrote, whose redo file would mend those.
    let flipped = (1..200).filter(|at| trees.flip(&name, *at)).count();
    assert!(flipped > 100, "{flipped}");
    state.give_up("a scrub has found damage");
    assert_eq!(
        state.check_tree(&mut |_| true),
        Checked::Unread,
        "it has stopped"
    );
    drop(state);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    assert!(
        matches!(
            state.opened().origin,
            Origin::Rebuilt {
                from_snapshot: true,
                ..
            }
        ),
        "{:?}",
        state.opened()
    );
    log.replay(&state, 400).expect("applied");
    assert_is(&state, &log.map_at(400), &mut random, "rebuilt");
    assert_eq!(state.check_tree(&mut |_| true), Checked::Whole);
}

/// The log grows and tables are written down between any two pages.
#[test]
fn a_tree_that_is_written_to_meanwhile_is_found_whole_or_damaged_as_it_is() {
    for seed in 0..30 {
        let mut random = StdRng::seed_from_u64(seed);
        let log = ModelLog::random(&mut random, 800);
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(seed)));
        let (store, mut checkpointer) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        log.replay(&state, 300).expect("applied");
        state.write_down();
        while checkpointer.pump() {}
        let mut pages = 0;
        let mut end = 300;
        let checked = state.check_tree(&mut |_| {
            pages += 1;
            end = (end + 17).min(800);
            log.replay(&state, end).expect("applied");
            while checkpointer.pump() {}
            true
        });
        assert_eq!(checked, Checked::Whole, "seed {seed}");
        assert!(pages > 20, "seed {seed}: {pages}");

        // A pair of which no checkpoint hears is put behind what was read.
        let tree = trees.open(&tree_name(KEY, 1)).expect("opened");
        let mut is_first = true;
        let checked = state.check_tree(&mut |_| {
            if std::mem::take(&mut is_first) {
                tree.write(b"z", Some(b"strange")).expect("written");
            }
            true
        });
        assert!(matches!(checked, Checked::Damaged(_)), "seed {seed}");
    }
}

#[test]
fn a_tree_that_another_takes_the_place_of_is_not_judged() {
    let (disk, trees): (Arc<dyn Disk>, _) = (Arc::new(SimDisk::new(1)), MemTrees::new());
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let log = ModelLog::random(&mut StdRng::seed_from_u64(3), 300);
    log.replay(&state, 300).expect("applied");
    while checkpointer.pump() {}
    let mut is_first = true;
    let checked = state.check_tree(&mut |_| {
        if std::mem::take(&mut is_first) {
            trees.begin_fresh(0).expect("begun");
            store.compact(&[KEY], &|| true).expect("copied");
        }
        true
    });
    assert_eq!(store.metrics().trees_copied, 1);
    assert_eq!(checked, Checked::Unread);
    assert_eq!(state.check_tree(&mut |_| true), Checked::Whole);
}
