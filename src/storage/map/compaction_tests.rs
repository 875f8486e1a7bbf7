//! Copying trees to a fresh place: under writes, crashes, installations and wipes, and that it
//! gives space back.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::crash_tests::{ModelLog, donated, index_of};
use super::tests::{KEY, Model, TestLog, applied, apply_to_model, assert_is, open};
use super::*;
use crate::sm::ports::WriteBatch;
use crate::storage::ReplicaKey;
use crate::storage::disk::Disk;
use crate::storage::mem_trees::{Crash, MemTrees};
use crate::storage::sim_disk::SimDisk;
use crate::storage::tree::Trees;
use crate::types::ReplicaId;

const OTHER: ReplicaKey = ReplicaKey {
    replica: ReplicaId(6),
    ..KEY
};

fn keep_on() -> bool {
    true
}

/// Another kilobyte for one of five keys.
fn overwrite(index: u64) -> WriteBatch {
    let mut batch = WriteBatch::default();
    batch.put(format!("k{:03}", index % 5), vec![index as u8; 1000]);
    batch
}

#[test]
fn what_is_overwritten_and_deleted_gives_its_space_back() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let mut write = |from: u64, to: u64| {
        for index in from..to {
            state
                .apply(overwrite(index), applied(index))
                .expect("applied");
            while checkpointer.pump() {}
        }
    };
    write(1, 20);
    store.compact(&[KEY], &keep_on).expect("not due");
    assert_eq!(
        store.metrics().trees_copied,
        0,
        "there is little garbage yet"
    );

    write(20, 300);
    let before = trees.disk_bytes();
    store.compact(&[KEY], &keep_on).expect("copied");
    assert_eq!(store.metrics().trees_copied, 1);
    assert_eq!(trees.outdated().expect("listed"), Vec::<String>::new());
    assert!(
        trees.disk_bytes() < 10_000 && before > 100_000,
        "{before} became {}",
        trees.disk_bytes()
    );
    store.compact(&[KEY], &keep_on).expect("not due");
    assert_eq!(store.metrics().trees_copied, 1, "it was just copied");

    let mut model = Model::new();
    (1..300).for_each(|index| apply_to_model(&mut model, &overwrite(index)));
    let mut random = StdRng::seed_from_u64(1);
    assert_is(&state, &model, &mut random, "after the copy");
    drop((state, store));
    let (store, _) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    assert_eq!(state.opened().origin, Origin::Tree);
    assert_eq!(state.map_bytes(), 5 * 1004);
}

/// The log grows and tables are written down between any two pages.
#[test]
fn a_map_that_is_written_to_meanwhile_is_copied_true() {
    for seed in 0..30 {
        let mut random = StdRng::seed_from_u64(seed);
        let log = ModelLog::random(&mut random, 800);
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(seed)));
        let (store, checkpointer) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        log.replay(&state, 300).expect("applied");
        let checkpointer = RefCell::new(checkpointer);
        let pump = || while checkpointer.borrow_mut().pump() {};
        pump();
        trees.begin_fresh(0).expect("begun");
        let end = Cell::new(300);
        let write = || {
            end.set((end.get() + 7).min(800));
            log.replay(&state, end.get()).expect("applied");
            pump();
            true
        };
        store.compact(&[KEY], &write).expect("copied");
        assert_eq!(store.metrics().trees_copied, 1);
        assert!(end.get() > 350, "nothing was written meanwhile");
        assert_eq!(trees.outdated().expect("listed"), Vec::<String>::new());
        assert_is(
            &state,
            &log.map_at(end.get()),
            &mut random,
            &format!("seed {seed}"),
        );
        state.build_snapshot().expect("the digest holds");

        drop((state, store));
        let (store, _) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        assert_eq!(state.opened().origin, Origin::Tree);
        log.assert_true(&state, &mut random, &format!("seed {seed}, opened again"));
    }
}

#[test]
fn a_copy_that_any_step_cuts_short_leaves_a_true_map_and_is_done_again() {
    let mut random = StdRng::seed_from_u64(2);
    let log = ModelLog::random(&mut random, 320);
    for cut in 0.. {
        let crash = [Crash::Kill, Crash::Power, Crash::Torn, Crash::Worst][cut as usize % 4];
        let context = format!("step {cut} {crash:?}");
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(cut)));
        let (store, checkpointer) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        log.replay(&state, 250).expect("applied");
        state.build_snapshot().expect("built");
        let steps = AtomicU64::new(0);
        trees.set_fault(Arc::new(move |_| {
            let is_cut = steps.fetch_add(1, Ordering::Relaxed) >= cut;
            if is_cut {
                Err(io::Error::other("cut"))
            } else {
                Ok(())
            }
        }));
        let checkpointer = RefCell::new(checkpointer);
        let write = || {
            let next = (index_of(&state.applied()) + 3).min(320);
            // It fails once the knife has fallen.
            let _ = log.replay(&state, next);
            while checkpointer.borrow_mut().pump() {}
            true
        };
        let copied = trees
            .begin_fresh(0)
            .and_then(|()| store.compact(&[KEY], &write));
        drop((state, store));
        trees.crash(crash, cut);

        let (store, _) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        assert!(
            index_of(&state.applied()) >= 250,
            "{context}: older than its snapshot"
        );
        if crash == Crash::Kill {
            assert_eq!(state.opened().origin, Origin::Tree, "{context}");
        }
        log.assert_true(&state, &mut random, &context);
        store.compact(&[KEY], &keep_on).expect("copied");
        assert_eq!(
            trees.outdated().expect("listed"),
            Vec::<String>::new(),
            "{context}"
        );
        log.assert_true(&state, &mut random, &context);
        if copied.is_ok() && crash == Crash::Kill {
            assert!(cut > 100, "the copy has no steps");
            return;
        }
    }
}

/// A full disk: the copy fails, and the map goes on where it is.
#[test]
fn a_copy_that_fails_harms_no_map() {
    let mut random = StdRng::seed_from_u64(3);
    let log = ModelLog::random(&mut random, 400);
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    log.replay(&state, 300).expect("applied");
    while checkpointer.pump() {}
    trees.begin_fresh(0).expect("begun");
    let steps = AtomicU64::new(0);
    let full = move |step: &str| match step {
        "write" if steps.fetch_add(1, Ordering::Relaxed) > 40 => {
            Err(io::Error::from(io::ErrorKind::StorageFull))
        }
        _ => Ok(()),
    };
    trees.set_fault(Arc::new(full));
    store.compact(&[KEY], &keep_on).expect_err("full");
    trees.set_fault(Arc::new(|_| Ok(())));
    log.replay(&state, 400).expect("applied");
    while checkpointer.pump() {}
    assert_is(&state, &log.map_at(400), &mut random, "after the failure");
    assert_eq!(
        trees.names().expect("listed").len(),
        1,
        "what was copied is left"
    );
    store.compact(&[KEY], &keep_on).expect("copied");
    assert_eq!(trees.outdated().expect("listed"), Vec::<String>::new());
    assert_is(&state, &log.map_at(400), &mut random, "after the copy");
}

#[test]
fn an_installation_and_a_wipe_end_a_copy() {
    let mut random = StdRng::seed_from_u64(4);
    let log = ModelLog::random(&mut random, 400);
    let (snapshot, _donor) = donated(&log, 350);
    for wipes in [false, true] {
        let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
        let (store, mut checkpointer) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        let other = store.replica(OTHER, TestLog::durable()).expect("opened");
        log.replay(&state, 300).expect("applied");
        log.replay(&other, 300).expect("applied");
        while checkpointer.pump() {}
        trees.begin_fresh(0).expect("begun");
        let pages = Cell::new(0);
        let interfere = || {
            pages.set(pages.get() + 1);
            if pages.get() == 5 && wipes {
                store.wipe(KEY).expect("wiped");
            } else if pages.get() == 5 {
                let mut receiver = state.begin_receive().expect("begun");
                let mut bytes = vec![0; snapshot.bytes_len() as usize];
                snapshot.read_at(0, &mut bytes).expect("read");
                receiver.write_at(0, &bytes).expect("taken");
                state
                    .install(&receiver.finish().expect("whole"))
                    .expect("installed");
                state.tidy().expect("tidied");
            }
            true
        };
        store
            .compact(&[KEY, OTHER], &interfere)
            .expect("the other is copied");
        assert_eq!(
            trees.outdated().expect("listed"),
            Vec::<String>::new(),
            "wipes: {wipes}"
        );
        assert_is(&other, &log.map_at(300), &mut random, "the other");
        let mine = trees
            .names()
            .expect("listed")
            .iter()
            .filter(|name| name.starts_with("g1-r5."))
            .count();
        assert_eq!(mine, usize::from(!wipes));
        if !wipes {
            assert_is(&state, &log.map_at(350), &mut random, "the installed one");
        }
    }
}

#[test]
fn a_tree_that_nobody_may_copy_keeps_the_others_where_they_are_and_one_of_nobody_is_dropped() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    drop(
        store
            .replica(OTHER, TestLog::durable())
            .expect("opened, and closed again"),
    );
    trees
        .open("g9-r9.1")
        .expect("left by a replica that is gone");
    for index in 1..300 {
        state
            .apply(overwrite(index), applied(index))
            .expect("applied");
        while checkpointer.pump() {}
    }
    store.compact(&[KEY, OTHER], &keep_on).expect("not begun");
    assert_eq!(trees.names().expect("listed"), ["g1-r5.1", "g1-r6.1"]);
    let _other = store.replica(OTHER, TestLog::durable()).expect("opened");
    store.compact(&[KEY, OTHER], &keep_on).expect("copied");
    assert_eq!(trees.names().expect("listed"), ["g1-r5.2", "g1-r6.2"]);
}

/// The one database may have been begun when there was room, before a start.
#[test]
fn a_copy_that_goes_on_wants_room_again() {
    let mut random = StdRng::seed_from_u64(6);
    let log = ModelLog::random(&mut random, 600);
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    log.replay(&state, 600).expect("applied");
    while checkpointer.pump() {}
    trees.begin_fresh(0).expect("begun");
    let pages = Cell::new(0);
    let fills_up_at = |page: u32| {
        pages.set(0);
        let (pages, trees) = (&pages, &trees);
        move || {
            pages.set(pages.get() + 1);
            if pages.get() == page {
                trees.set_room(Some(0));
            }
            true
        }
    };
    for page in [1, 3] {
        store
            .compact(&[KEY], &fills_up_at(page))
            .expect_err("there is no room");
        assert!(pages.get() < 40, "it was copied all the same");
        assert_eq!(
            trees.names().expect("listed"),
            ["g1-r5.1"],
            "what was copied is left"
        );
        trees.set_room(None);
    }
    store.compact(&[KEY], &keep_on).expect("copied");
    assert_eq!(trees.outdated().expect("listed"), Vec::<String>::new());
    assert_is(&state, &log.map_at(600), &mut random, "after the copy");
}

/// One that waits for its turn would keep its tables, and its name.
#[test]
fn a_copy_keeps_no_other_replica_open() {
    let (trees, disk): (_, Arc<dyn Disk>) = (MemTrees::new(), Arc::new(SimDisk::new(1)));
    let (store, mut checkpointer) = open(&trees, &disk);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let other = store.replica(OTHER, TestLog::durable()).expect("opened");
    for state in [&state, &other] {
        state.apply(overwrite(1), applied(1)).expect("applied");
        state.write_down();
    }
    while checkpointer.pump() {}
    trees.begin_fresh(0).expect("begun");
    let other = Cell::new(Some(other));
    let close = || {
        if other.take().is_some() {
            store.wipe(OTHER).expect("wiped");
            drop(
                store
                    .replica(OTHER, TestLog::durable())
                    .expect("nobody has it open"),
            );
        }
        true
    };
    store.compact(&[KEY, OTHER], &close).expect("copied");
    assert!(other.take().is_none(), "nothing was asked");
}
