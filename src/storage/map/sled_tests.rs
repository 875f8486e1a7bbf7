//! The map over the real trees: kills, and files damaged in every way that a disk or a power cut
//! may. What opens is exactly what the log says, or is rebuilt; never a wrong answer, and no test
//! waits for a hang longer than it allows.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::crash_tests::{ModelLog, index_of};
use super::tests::{KEY, TestLog, assert_is, small_options};
use super::*;
use crate::storage::disk::RealDisk;
use crate::storage::sled_tree::{SledError, SledOptions, SledTrees};

/// Long for files this small, short for a test that meets a hang.
const PATIENCE: Duration = Duration::from_secs(5);

fn open_trees(dir: &Path) -> Result<SledTrees, SledError> {
    SledTrees::open(
        &dir.join("trees"),
        &SledOptions {
            cache_bytes: 1 << 20,
            patience: PATIENCE,
            ..SledOptions::default()
        },
    )
}

fn open(dir: &Path) -> (MapStore, Checkpointer) {
    let trees = Arc::new(open_trees(dir).expect("opened"));
    MapStore::open(trees, Arc::new(RealDisk), dir, small_options()).expect("opened")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("created");
    for entry in std::fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(self::files(&path))
        } else {
            files.push(path)
        }
    }
    files.sort();
    files
}

/// Lives until `last`, with snapshots on the way, and calls `at_times` while all is open.
fn live(dir: &Path, log: &ModelLog, last: u64, mut at_times: impl FnMut(u64)) {
    let (store, mut checkpointer) = open(dir);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    for index in index_of(&state.applied()) + 1..=last {
        log.replay(&state, index).expect("applied");
        while checkpointer.pump() {}
        if index % 200 == 0 {
            state.build_snapshot().expect("built");
        }
        if index % 50 == 0 {
            at_times(index);
        }
    }
}

/// Opens what is there after damage of the trees: true, or rebuilt and true. Returns what became of
/// it.
fn assert_true_after_damage(
    dir: &Path,
    log: &ModelLog,
    least: u64,
    random: &mut StdRng,
    context: &str,
) -> &'static str {
    let trees = match open_trees(dir) {
        Ok(trees) => trees,
        Err(SledError::Hangs { .. }) => {
            assert!(
                !dir.join("trees").exists(),
                "{context}: the hanging files are still in the way"
            );
            open_trees(dir).expect("a fresh one opens")
        }
        Err(error) => panic!("{context}: {error}"),
    };
    let moved = dir.join("trees.damaged").exists();
    let (store, mut checkpointer) =
        MapStore::open(Arc::new(trees), Arc::new(RealDisk), dir, small_options()).expect("opened");
    let state = match store.replica(KEY, TestLog::durable()) {
        Ok(state) => state,
        Err(error) => {
            // Even replacing the tree failed. The next start, without these files, does it.
            drop(store);
            assert!(
                dir.join("trees/CONDEMNED").exists(),
                "{context}: {error}, and it will not heal"
            );
            assert_ne!(
                assert_true_after_damage(dir, log, least, random, context),
                "condemned"
            );
            return "condemned";
        }
    };
    let found = index_of(&state.applied());
    assert!(
        found >= least,
        "{context}: {found} is older than the snapshot at {least}"
    );
    let truly = log.map_at(found);
    assert_is(&state, &truly, random, context);
    let rebuilt = matches!(state.opened().origin, Origin::Rebuilt { .. });
    // It goes on: an error stops it, a wrong answer is never given.
    for index in found + 1..=log.entries.len() as u64 {
        if log.replay(&state, index).is_err() {
            return "stopped";
        }
        while checkpointer.pump() {}
        if index % 40 == 0 {
            assert_is(&state, &log.map_at(index), random, context);
        }
    }
    if moved {
        "moved aside"
    } else if rebuilt {
        "rebuilt"
    } else {
        "true"
    }
}

#[test]
fn a_killed_database_comes_back_true() {
    let mut random = StdRng::seed_from_u64(1);
    let log = ModelLog::random(&mut random, 500);
    let home = tempfile::tempdir().expect("a directory");
    let dir = home.path().join("live");
    let copies = home.path().join("copies");
    // A copy of the files while it is open is what a kill leaves.
    live(&dir, &log, 450, |index| {
        copy(&dir, &copies.join(index.to_string()))
    });
    for index in (50..=450).step_by(50) {
        let found = assert_true_after_damage(
            &copies.join(index.to_string()),
            &log,
            index / 200 * 200,
            &mut random,
            "killed",
        );
        assert_eq!(found, "true", "killed at {index}");
    }
    let (store, _) = open(&dir);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    store.close().expect("closed");
    assert_eq!(state.opened().origin, Origin::Tree);
}

/// Damages one file of the trees.
fn damage(dir: &Path, random: &mut StdRng) -> String {
    let files = files(&dir.join("trees"));
    let path = &files[random.random_range(0..files.len())];
    let mut bytes = std::fs::read(path).expect("there");
    let used = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    let at = random.random_range(0..=used.saturating_sub(1));
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let what = match random.random_range(0..5) {
        0 => {
            std::fs::remove_file(path).expect("removed");
            return format!("removed {name}");
        }
        1 => {
            bytes.truncate(at);
            format!("cut {name} to {at}")
        }
        2 => {
            let len = random.random_range(1..5000).min(bytes.len() - at);
            bytes[at..at + len].fill(0);
            format!("zeroed {len} of {name} at {at}")
        }
        _ => {
            let flips = random.random_range(1..4);
            for _ in 0..flips {
                let at = random
                    .random_range(0..used.max(1))
                    .min(bytes.len().saturating_sub(1));
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.random_range(0..8);
                }
            }
            format!("flipped {flips} bits of {name}")
        }
    };
    std::fs::write(path, bytes).expect("written");
    what
}

#[test]
fn damaged_database_files_never_make_a_wrong_answer() {
    let rounds: u64 = std::env::var("SLED_DAMAGE_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(40);
    let mut random = StdRng::seed_from_u64(2);
    let log = ModelLog::random(&mut random, 480);
    let home = tempfile::tempdir().expect("a directory");
    let (dir, killed, stopped) = (
        home.path().join("live"),
        home.path().join("killed"),
        home.path().join("stopped"),
    );
    live(&dir, &log, 250, |index| {
        if index == 250 {
            copy(&dir, &killed);
        }
    });
    copy(&dir, &stopped);
    let mut outcomes = std::collections::BTreeMap::<_, u32>::new();
    for seed in 0..rounds {
        let mut random = StdRng::seed_from_u64(seed);
        let dir = home.path().join(seed.to_string());
        copy(if seed % 2 == 0 { &killed } else { &stopped }, &dir);
        let context = format!("seed {seed}: {}", damage(&dir, &mut random));
        let outcome = assert_true_after_damage(&dir, &log, 200, &mut random, &context);
        *outcomes.entry(outcome).or_default() += 1;
        let _ = std::fs::remove_dir_all(&dir);
    }
    println!("{outcomes:?}");
    assert!(outcomes.len() > 1, "the damage does nothing: {outcomes:?}");
}

#[test]
fn large_values_and_batches_survive() {
    let home = tempfile::tempdir().expect("a directory");
    let dir = home.path().join("live");
    let (store, mut checkpointer) = open(&dir);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let mut batch = crate::sm::ports::WriteBatch::default();
    for n in 0..20u8 {
        batch.put(vec![b'k', n], vec![n; 1 << 20]);
    }
    let mut model = super::tests::Model::new();
    super::tests::apply_to_model(&mut model, &batch);
    state
        .apply(batch, super::tests::applied(1))
        .expect("applied");
    while checkpointer.pump() {}
    assert_eq!(state.bytes(), MemtableBytes::default());
    copy(&dir, &home.path().join("copy"));
    let (store, _) = open(&home.path().join("copy"));
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    assert_eq!(index_of(&state.applied()), 1);
    let all = crate::sm::ports::KeyRange::all();
    let direction = crate::sm::ports::Direction::Forward;
    assert!(
        super::tests::pairs(&state.read(), &all, direction)
            == super::tests::pairs(&model, &all, direction)
    );
}
