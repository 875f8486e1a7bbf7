//! What has rotted in a snapshot file is found, and mended from what is whole.

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::tests::{
    KEY, Model, TestLog, applied, apply_to_model, open, random_batch, snapshot_pairs,
};
use super::*;
use crate::storage::Checked;
use crate::storage::disk::Disk;
use crate::storage::mem_trees::MemTrees;
use crate::storage::sim_disk::SimDisk;

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
