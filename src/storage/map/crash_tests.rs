//! The map through crashes: random ones, one at every step of its writing, and damage of its files.
//! Whatever happens, a map that opens is exactly what the log says as of its applied id, no older
//! than the last snapshot file, and goes on from there.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::tests::{
    KEY, Model, TestLog, applied, apply_to_model, assert_is, open, random_batch, send,
    small_options, snapshot_pairs,
};
use super::*;
use crate::sm::ports::{StoreError, WriteBatch};
use crate::storage::ReplicaKey;
use crate::storage::disk::{Disk, DiskFile, Open};
use crate::storage::mem_trees::{Crash, MemTrees};
use crate::storage::sim_disk::SimDisk;
use crate::storage::snapshot::Snapshot;
use crate::storage::tree::Trees;
use crate::types::ReplicaId;

/// Every entry of a group's log, of which replicas are made: entry `n` is at index `n + 1`.
pub struct ModelLog {
    pub entries: Vec<WriteBatch>,
}

impl ModelLog {
    pub fn random(random: &mut StdRng, entries: usize) -> Self {
        Self {
            entries: (0..entries).map(|_| random_batch(random)).collect(),
        }
    }

    pub fn map_at(&self, index: u64) -> Model {
        let mut model = Model::new();
        self.entries[..index as usize]
            .iter()
            .for_each(|batch| apply_to_model(&mut model, batch));
        model
    }

    /// Applies what is missing through `last`.
    pub fn replay(&self, state: &ReplicaMap, last: u64) -> Result<(), StoreError> {
        for index in index_of(&state.applied()) + 1..=last {
            state.apply(self.entries[index as usize - 1].clone(), applied(index))?;
        }
        Ok(())
    }

    /// The map is that of its applied index, and stays so to the end of the log.
    pub fn assert_true(&self, state: &ReplicaMap, random: &mut StdRng, context: &str) {
        let now = state.applied();
        if let Some(id) = now.log_id {
            assert_eq!(now, applied(id.index), "{context}");
        }
        assert_is(state, &self.map_at(index_of(&now)), random, context);
        let last = self.entries.len() as u64;
        self.replay(state, last).expect("a map that opened applies");
        assert_is(state, &self.map_at(last), random, context);
    }
}

pub fn index_of(applied: &Applied) -> u64 {
    applied.log_id.map_or(0, |id| id.index)
}

/// A donor's snapshot of `log` at `index`, and what keeps it.
pub fn donated(log: &ModelLog, index: u64) -> (Snapshot, MapStore) {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(99));
    let (store, _) = open(&MemTrees::new(), &disk);
    let donor = store
        .replica(
            ReplicaKey {
                replica: ReplicaId(9),
                ..KEY
            },
            TestLog::durable(),
        )
        .expect("opened");
    log.replay(&donor, index).expect("applied");
    (donor.build_snapshot().expect("built"), store)
}

#[test]
fn a_map_comes_back_true_from_random_crashes() {
    for seed in 0..60 {
        let mut random = StdRng::seed_from_u64(seed);
        let log = ModelLog::random(&mut random, 600);
        let disk = SimDisk::new(seed);
        let trees = MemTrees::new();
        let (mut reached, mut durable, mut synced, mut torn) = (0, 0, 0, false);
        for round in 0..8 {
            let shared: Arc<dyn Disk> = Arc::new(disk.clone());
            let (store, mut checkpointer) = open(&trees, &shared);
            let test_log = Arc::new(TestLog::default());
            test_log.sync_through(synced);
            let state = store.replica(KEY, test_log.clone()).expect("opened");
            let context = format!("seed {seed} round {round}");
            let found = index_of(&state.applied());
            assert!(
                (durable..=reached).contains(&found),
                "{context}: {found} is not in {durable}..={reached}"
            );
            assert!(found <= synced, "{context}: ahead of the log");
            if let Origin::Rebuilt { reason, .. } = &state.opened().origin {
                // A kill leaves a true state, or one that the redo file makes true: only that the
                // snapshot is newer makes a tree useless.
                assert!(
                    torn || reason.contains("older than") || reason.contains("missing"),
                    "{context}: {reason}"
                );
            }
            assert_is(&state, &log.map_at(found), &mut random, &context);
            let goal = (reached + random.random_range(0..100)).min(600);
            for index in found + 1..=goal {
                log.replay(&state, index).expect("applied");
                match random.random_range(0..20) {
                    0..4 => {
                        synced = synced.max(random.random_range(0..=index));
                        test_log.sync_through(synced);
                    }
                    4..8 => {
                        checkpointer.pump();
                    }
                    8 => {
                        durable =
                            durable.max(index_of(state.build_snapshot().expect("built").applied()))
                    }
                    _ => {}
                }
            }
            assert_is(
                &state,
                &log.map_at(index_of(&state.applied())),
                &mut random,
                &context,
            );
            reached = reached.max(goal);
            drop((state, store, checkpointer));
            let kinds = if seed % 3 == 0 { 1 } else { 4 };
            let crash = [Crash::Kill, Crash::Power, Crash::Torn, Crash::Worst]
                [random.random_range(0..kinds)];
            torn |= crash != Crash::Kill;
            trees.crash(crash, random.random());
            if crash != Crash::Kill {
                disk.crash();
            }
        }
    }
}

/// Counts the changing steps of disk and trees together, and fails all from a given one on.
struct Knife {
    steps: AtomicU64,
    fails_from: u64,
}

impl Knife {
    fn cut(&self) -> io::Result<()> {
        if self.steps.fetch_add(1, Ordering::Relaxed) >= self.fails_from {
            return Err(io::Error::other("the power is gone"));
        }
        Ok(())
    }
}

struct CutDisk {
    disk: SimDisk,
    knife: Arc<Knife>,
}

struct CutFile {
    file: Box<dyn DiskFile>,
    knife: Arc<Knife>,
}

impl Disk for CutDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>> {
        if how != Open::Existing {
            self.knife.cut()?;
        }
        Ok(Box::new(CutFile {
            file: self.disk.open(path, how)?,
            knife: self.knife.clone(),
        }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.knife.cut()?;
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.knife.cut()?;
        self.disk.remove(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.knife.cut()?;
        self.disk.sync_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.disk.list(path)
    }
}

impl DiskFile for CutFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.knife.cut()?;
        self.file.write_at(bytes, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.knife.cut()?;
        self.file.set_len(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn sync(&self) -> io::Result<()> {
        self.knife.cut()?;
        self.file.sync()
    }
}

/// Through every kind of step, noting which index is durable. Ends at the first error.
fn life(
    trees: &MemTrees,
    disk: Arc<dyn Disk>,
    log: &ModelLog,
    donated: &Snapshot,
    durable: &mut u64,
) -> Result<(), StoreError> {
    let (store, mut checkpointer) = MapStore::open(
        Arc::new(trees.clone()),
        disk,
        Path::new("/data"),
        small_options(),
    )?;
    let state = store.replica(KEY, TestLog::durable())?;
    let mut snapshot = |state: &ReplicaMap| -> Result<(), StoreError> {
        *durable = index_of(state.build_snapshot()?.applied());
        Ok(())
    };
    log.replay(&state, 100)?;
    while checkpointer.pump() {}
    snapshot(&state)?;
    log.replay(&state, 150)?;
    while checkpointer.pump() {}
    log.replay(&state, 160)?;
    snapshot(&state)?;
    let mut receiver = state.begin_receive()?;
    let mut bytes = vec![0; donated.bytes_len() as usize];
    donated.read_at(0, &mut bytes)?;
    for (n, chunk) in bytes.chunks(3000).enumerate() {
        receiver.write_at(n as u64 * 3000, chunk)?;
    }
    let received = receiver.finish()?;
    log.replay(&state, 170)?;
    state.install(&received)?;
    *durable = index_of(received.applied());
    drop(received);
    log.replay(&state, 250)?;
    while checkpointer.pump() {}
    *durable = index_of(state.build_snapshot()?.applied());
    store.close()
}

#[test]
fn a_map_comes_back_true_from_a_crash_between_any_two_steps() {
    let mut random = StdRng::seed_from_u64(1);
    let log = ModelLog::random(&mut random, 260);
    let (donated, _donor) = donated(&log, 200);
    let mut whole_lives = 0;
    for fails_from in 0.. {
        let powerless = [Crash::Power, Crash::Torn, Crash::Worst][fails_from as usize % 3];
        for crash in [Crash::Kill, powerless] {
            let context = format!("step {fails_from} {crash:?}");
            let (disk, trees) = (SimDisk::new(fails_from), MemTrees::new());
            let knife = Arc::new(Knife {
                steps: AtomicU64::new(0),
                fails_from,
            });
            let cut = knife.clone();
            trees.set_fault(Arc::new(move |_| cut.cut()));
            let mut durable = 0;
            let lived = life(
                &trees,
                Arc::new(CutDisk {
                    disk: disk.clone(),
                    knife,
                }),
                &log,
                &donated,
                &mut durable,
            );
            trees.crash(crash, fails_from);
            if crash != Crash::Kill {
                disk.crash();
            }
            let disk: Arc<dyn Disk> = Arc::new(disk);
            let (store, _) = open(&trees, &disk);
            let state = store.replica(KEY, TestLog::durable()).expect("opened");
            assert!(
                index_of(&state.applied()) >= durable,
                "{context}: older than its snapshot"
            );
            assert_eq!(state.opened().damaged_snapshot, None, "{context}");
            if let (Crash::Kill, Origin::Rebuilt { reason, .. }) = (crash, &state.opened().origin) {
                assert!(
                    reason.contains("older than") || reason.contains("missing"),
                    "{context}: {reason}"
                );
            }
            log.assert_true(&state, &mut random, &context);
            let names = disk.list(Path::new("/data/snapshots")).expect("listed");
            assert!(
                names.iter().all(|name| name.ends_with(".snap")),
                "{context}: leftovers in {names:?}"
            );
            whole_lives += u32::from(lived.is_ok());
        }
        if whole_lives > 0 {
            assert!(fails_from > 50, "the life has no steps");
            return;
        }
    }
}

/// A published snapshot file of a small map, its bytes, and the log that it is of.
fn published(disk: &SimDisk) -> (PathBuf, Vec<u8>, ModelLog) {
    let mut random = StdRng::seed_from_u64(3);
    let mut log = ModelLog::random(&mut random, 8);
    log.entries[0].put("k001", "v");
    log.entries
        .iter_mut()
        .for_each(|batch| batch.delete("k002"));
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let (store, _) = open(&MemTrees::new(), &shared);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    log.replay(&state, 8).expect("applied");
    let path = state.build_snapshot().expect("built").path();
    let bytes = disk.contents(&path).expect("there");
    assert!(bytes.len() < 5000, "a small one was meant");
    (path, bytes, log)
}

fn rewrite(disk: &SimDisk, path: &Path, bytes: &[u8]) {
    let file = disk.open(path, Open::Truncated).expect("opened");
    file.write_at(bytes, 0).expect("written");
    file.sync().expect("synced");
}

/// Opens with no tree, so that all rests on the snapshot file, and receives the same bytes too.
/// Neither may believe them.
fn assert_disbelieved(disk: &SimDisk, path: &Path, bytes: &[u8], context: &str) {
    rewrite(disk, path, bytes);
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let trees = MemTrees::new();
    for _again in 0..2 {
        let (store, _) = open(&trees, &shared);
        match store.replica(KEY, TestLog::durable()) {
            Ok(state) => {
                assert_eq!(state.applied(), Applied::default(), "{context}: believed");
                assert!(
                    state.opened().damaged_snapshot.is_some(),
                    "{context}: passed over in silence"
                );
                assert!(state.current_snapshot().is_none(), "{context}: offered");
            }
            Err(error) => panic!("{context}: {error}"),
        }
    }
    let (store, _) = open(&trees, &shared);
    let state = store
        .replica(
            ReplicaKey {
                replica: ReplicaId(77),
                ..KEY
            },
            TestLog::durable(),
        )
        .expect("opened");
    let mut receiver = state.begin_receive().expect("begun");
    receiver.write_at(0, bytes).expect("written");
    assert!(receiver.finish().is_err(), "{context}: received");
}

#[test]
fn a_flipped_bit_anywhere_in_a_snapshot_file_is_found() {
    let disk = SimDisk::new(1);
    let (path, bytes, log) = published(&disk);
    let mut random = StdRng::seed_from_u64(4);
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << random.random_range(0..8);
        assert_disbelieved(
            &disk,
            &path,
            &flipped,
            &format!("byte {at} of {}", bytes.len()),
        );
    }
    rewrite(&disk, &path, &bytes);
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let (store, _) = open(&MemTrees::new(), &shared);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    assert_eq!(state.opened().damaged_snapshot, None);
    assert_eq!(index_of(&state.applied()), 8);
    log.assert_true(&state, &mut random, "restored");
}

#[test]
fn a_snapshot_file_of_another_length_is_found() {
    let disk = SimDisk::new(1);
    let (path, bytes, _) = published(&disk);
    for len in (0..bytes.len()).step_by(7) {
        assert_disbelieved(&disk, &path, &bytes[..len], &format!("cut to {len}"));
    }
    for more in [1, 41, 500] {
        let longer = [&bytes[..], &vec![0; more][..]].concat();
        assert_disbelieved(&disk, &path, &longer, &format!("{more} bytes longer"));
    }
    let doubled = [&bytes[..], &bytes[..]].concat();
    assert_disbelieved(&disk, &path, &doubled, "twice itself");
}

#[test]
fn a_snapshot_file_of_many_blocks_is_read_as_written_and_misses_none() {
    let disk = SimDisk::new(1);
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let (store, mut checkpointer) = open(&MemTrees::new(), &shared);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    let mut batch = WriteBatch::default();
    for n in 0..400 {
        batch.put(
            format!("k{n:03}"),
            vec![n as u8; if n == 7 { 1 << 20 } else { 3000 }],
        );
    }
    let mut model = Model::new();
    apply_to_model(&mut model, &batch);
    state.apply(batch, applied(1)).expect("applied");
    while checkpointer.pump() {}
    let snapshot = state.build_snapshot().expect("built");
    assert!(snapshot_pairs(&snapshot) == model);
    let bytes = disk.contents(&snapshot.path()).expect("there");
    let mut random = StdRng::seed_from_u64(5);
    for _ in 0..40 {
        let mut damaged = bytes.clone();
        let at = random.random_range(0..bytes.len());
        if random.random_bool(0.5) {
            damaged[at] ^= 1 << random.random_range(0..8);
        } else {
            let len = random.random_range(1..400_000).min(bytes.len() - at);
            damaged.drain(at..at + len);
        }
        let mut receiver = state.begin_receive().expect("begun");
        receiver.write_at(0, &damaged).expect("written");
        assert!(receiver.finish().is_err(), "damage at {at}");
    }
    // Still readable by whoever sends it, after a newer one has replaced it.
    state
        .apply(WriteBatch::default(), applied(2))
        .expect("applied");
    let newer = state.build_snapshot().expect("built");
    assert!(disk.contents(&snapshot.path()).is_none() && disk.contents(&newer.path()).is_some());
    assert!(snapshot_pairs(&snapshot) == model);
}

#[test]
fn a_rotten_tree_makes_no_snapshot_and_is_rebuilt() {
    let mut random = StdRng::seed_from_u64(6);
    let log = ModelLog::random(&mut random, 300);
    for at in 0..300 {
        let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
        let trees = MemTrees::new();
        let (store, mut checkpointer) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        log.replay(&state, 100).expect("applied");
        state.build_snapshot().expect("built");
        log.replay(&state, 200).expect("applied");
        while checkpointer.pump() {}
        if !trees.flip("g1-r5.1", at * 13) {
            continue;
        }
        log.replay(&state, 201).expect("applied");
        // A rotten record is written anew by the checkpoint; a rotten pair is found, also if the
        // checkpoint replaces it.
        if let Ok(snapshot) = state.build_snapshot() {
            assert!(snapshot_pairs(&snapshot) == log.map_at(201), "flip {at}");
        }
        drop((state, store));
        let (store, _) = open(&trees, &disk);
        let state = store.replica(KEY, TestLog::durable()).expect("opened");
        assert!(index_of(&state.applied()) >= 100);
        log.assert_true(&state, &mut random, &format!("flip {at}"));
    }
}

#[test]
fn with_its_snapshot_damaged_a_true_older_tree_is_kept_and_the_damage_told() {
    let mut random = StdRng::seed_from_u64(7);
    let log = ModelLog::random(&mut random, 300);
    let disk = SimDisk::new(1);
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let trees = MemTrees::new();
    let (store, mut checkpointer) = open(&trees, &shared);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    log.replay(&state, 50).expect("applied");
    while checkpointer.pump() {}
    trees.sync().expect("synced");
    let tree_at = index_of(&state.replica.read_memtables().tree_applied);
    assert!(tree_at > 0);
    let (donated, _donor) = donated(&log, 200);
    let received = send(&donated, &state);
    state.install(&received).expect("installed");
    let path = received.path();
    drop((state, store, received));
    // Everything of the trees that was not synced is gone, and a block of the snapshot file has
    // rotted.
    trees.crash(Crash::Worst, 0);
    assert!(disk.flip_bit(&path, 200, 1));
    let (store, _) = open(&trees, &shared);
    let state = store.replica(KEY, TestLog::durable()).expect("opened");
    assert_eq!(index_of(&state.applied()), tree_at);
    assert!(matches!(
        state.opened().origin,
        Origin::Rebuilt {
            from_snapshot: false,
            ..
        }
    ));
    assert!(
        state
            .opened()
            .damaged_snapshot
            .as_ref()
            .is_some_and(|why| why.contains("checksum"))
    );
    log.assert_true(&state, &mut random, "from the older tree");
    state.build_snapshot().expect("built");
    assert!(
        disk.contents(&path).is_none(),
        "the damaged file goes when a new one is durable"
    );
}

#[test]
fn a_wiped_replica_leaves_nothing_and_its_neighbours_everything() {
    let mut random = StdRng::seed_from_u64(8);
    let log = ModelLog::random(&mut random, 200);
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    let trees = MemTrees::new();
    let (store, mut checkpointer) = open(&trees, &disk);
    let near = ReplicaKey {
        replica: ReplicaId(51),
        ..KEY
    };
    let states = [KEY, near].map(|key| store.replica(key, TestLog::durable()).expect("opened"));
    for state in &states {
        log.replay(state, 200).expect("applied");
        state.build_snapshot().expect("built");
    }
    assert!(
        store.replica(KEY, TestLog::durable()).is_err(),
        "a map was opened twice"
    );
    store.wipe(KEY).expect("wiped");
    store.wipe(KEY).expect("wiped again");
    assert!(
        states[0]
            .apply(WriteBatch::default(), applied(201))
            .is_err(),
        "a wiped map still applies"
    );
    assert!(states[0].is_wiped());
    assert!(states[0].build_snapshot().is_err() && states[0].current_snapshot().is_none());
    while checkpointer.pump() {}
    assert_eq!(trees.names().expect("names"), ["g1-r51.1"]);
    assert_eq!(
        disk.list(Path::new("/data/snapshots"))
            .expect("listed")
            .len(),
        1
    );
    log.assert_true(&states[1], &mut random, "the neighbour");
    drop(states);
    let fresh = store.replica(KEY, TestLog::durable()).expect("opened");
    assert_eq!(
        (fresh.applied(), &fresh.opened().origin),
        (Applied::default(), &Origin::New)
    );
}
