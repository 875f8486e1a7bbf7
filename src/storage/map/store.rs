//! [`MapStore`]: the maps of a node, and [`Checkpointer`], which writes their frozen tables down.

use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use super::disk_waits::{DiskWaits, Readers};
use super::errors::is_about_machine;
use super::open;
use super::record::{owner_of, tree_name};
use super::redo::RedoFiles;
use super::replica::{ReplicaMap, ReplicaMapInner};
use super::{MapOptions, Synced};
use crate::sm::ports::StoreError;
use crate::storage::ReplicaKey;
use crate::storage::disk::Disk;
use crate::storage::snapshot::files::SnapshotFiles;
use crate::storage::tree::Trees;
use crate::storage::witness::WitnessFiles;
use crate::supervisor::Beat;

/// The maps of all replicas of a node. When it is dropped, its checkpointer ends.
pub struct MapStore {
    shared: Arc<MapStoreInner>,
    witnesses: WitnessFiles,
}

/// State shared by the replicas of a node.
pub(super) struct MapStoreInner {
    pub options: MapOptions,
    pub trees: Arc<dyn Trees>,
    pub files: SnapshotFiles,
    pub redo: RedoFiles,
    pub queue: JobQueue,
    /// Told when a table was synced, written or dropped, and when a replica failed.
    pub changed: Notify,
    pub active_bytes: Gauge,
    pub frozen_bytes: Gauge,
    pub clean_bytes: Gauge,
    pub counters: Counters,
    pub readers: Readers,
    pub disk_waits: DiskWaits,
    /// Bytes that the trees took on the disk when they were last copied; zero before.
    pub compacted_bytes: AtomicU64,
    /// Bytes that they took at the last look.
    pub trees_disk_bytes: AtomicU64,
    /// A table is not written down, because the disk is full.
    pub lacks_room: AtomicBool,
    /// Counts the steps of the checkpointer, for the watchdog.
    pub beat: Beat,
    /// The checkpointer has a job.
    at_work: AtomicBool,
    /// A relief is queued.
    relieving: AtomicBool,
    replicas: Mutex<BTreeMap<ReplicaKey, Weak<ReplicaMapInner>>>,
}

/// Sizes of the maps of a node, and counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MapMetrics {
    pub replicas: usize,
    pub active_bytes: usize,
    pub frozen_bytes: usize,
    /// Of tables that are written down, and are kept for gets.
    pub clean_bytes: usize,
    pub checkpoints: u64,
    pub checkpoint_us_total: u64,
    pub checkpoint_us_max: u64,
    pub snapshots_built: u64,
    pub snapshots_installed: u64,
    pub scans_given_up: u64,
    pub trees_copied: u64,
    /// Reads of single keys, and of what entries change, that were done where they hold up nobody.
    pub reads_elsewhere: u64,
    /// Keys and values that are written down.
    pub map_bytes: u64,
    /// Bytes that the trees took on the disk when [`MapStore::wants_compaction`] last looked.
    pub trees_disk_bytes: u64,
    pub snapshots_disk_bytes: u64,
}

impl MapStore {
    /// Opens the maps of a node over `trees`; snapshot files are in `dir/snapshots`, what witnesses
    /// have instead in `dir/witnesses`, and what checkpoints are about in `dir/redo`. The
    /// [`Checkpointer`] must be run, or pumped.
    pub fn open(
        trees: Arc<dyn Trees>,
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: MapOptions,
    ) -> Result<(Self, Checkpointer), StoreError> {
        let files = SnapshotFiles::open(disk.clone(), &dir.join("snapshots"))?;
        let witnesses = WitnessFiles::open(disk.clone(), &dir.join("witnesses"))?;
        let redo = RedoFiles::open(disk, &dir.join("redo"))?;
        let shared = Arc::new(MapStoreInner {
            options,
            trees,
            files,
            redo,
            queue: JobQueue::default(),
            changed: Notify::new(),
            active_bytes: Gauge::default(),
            frozen_bytes: Gauge::default(),
            clean_bytes: Gauge::default(),
            counters: Counters::default(),
            readers: Readers::default(),
            disk_waits: DiskWaits::default(),
            compacted_bytes: AtomicU64::new(0),
            trees_disk_bytes: AtomicU64::new(0),
            lacks_room: AtomicBool::new(false),
            beat: Beat::default(),
            at_work: AtomicBool::new(false),
            relieving: AtomicBool::new(false),
            replicas: Mutex::default(),
        });
        Ok((
            Self {
                shared: shared.clone(),
                witnesses,
            },
            Checkpointer { shared },
        ))
    }

    /// Opens or creates the map of a replica, reading through its tree to check it;
    /// [`ReplicaMap::opened`] says what was found. `synced` is the log of the same replica. An
    /// error if it is open already. Blocking.
    pub fn replica(
        &self,
        key: ReplicaKey,
        synced: Arc<dyn Synced>,
    ) -> Result<ReplicaMap, StoreError> {
        // Claimed before anything is read: two openings would drop each other's trees.
        let claim = MapClaim::new(&self.shared, key)?;
        let found = open::open_map(
            &*self.shared.trees,
            &self.shared.files,
            &self.shared.redo,
            key,
        )?;
        let state = ReplicaMap::new(self.shared.clone(), claim, synced, key, found);
        self.shared
            .lock_replicas()
            .insert(key, Arc::downgrade(&state.replica));
        Ok(state)
    }

    /// Returns the files of witnesses, which have no map.
    pub fn witnesses(&self) -> &WitnessFiles {
        &self.witnesses
    }

    /// Forgets all that is here of replicas that are not among `known`, those that the log has:
    /// what a wipe left that was cut short, or a power cut brought back. Before any map is opened.
    /// Blocking.
    ///
    /// A tree that came back without all of its pages may not even let itself be dropped. None must
    /// stay, since ids begin anew in another cluster, so the next start then begins without any
    /// tree.
    pub fn keep_only(&self, known: &BTreeSet<ReplicaKey>) -> Result<(), StoreError> {
        for name in self.shared.trees.names()? {
            if owner_of(&name).is_some_and(|key| !known.contains(&key)) {
                let dropped = self.shared.trees.drop_tree(&name);
                dropped.inspect_err(|error| {
                    if !is_about_machine(error) {
                        self.shared.trees.condemn(&format!(
                            "the tree {name} of a replica that is gone: {error}"
                        ));
                    }
                })?;
            }
        }
        self.shared.files.remove_unknown(known)?;
        self.shared.redo.remove_unknown(known)?;
        self.witnesses.remove_unknown(known)
    }

    /// Forgets the map of a replica, tree and snapshot file, also one that is open: its handles
    /// then only fail. That a replica is a witness stays known: its mark goes when the log has
    /// forgotten it. Blocking.
    pub fn wipe(&self, key: ReplicaKey) -> Result<(), StoreError> {
        let open = self
            .shared
            .lock_replicas()
            .get(&key)
            .and_then(Weak::upgrade);

        // Locked to the end, so that no checkpoint writes to a tree that is being dropped.
        let _pen = open.as_ref().map(|replica| {
            replica.retire();
            replica.lock_writer_first()
        });

        // Also to the end: a scan that is under way publishes under this lock, and finds it wiped.
        let mut current_snapshot = open.as_ref().map(|replica| replica.lock_current_snapshot());
        if let Some(current_snapshot) = &mut current_snapshot {
            **current_snapshot = None;
        }
        for generation in open::generations(&*self.shared.trees, key)? {
            self.shared.trees.drop_tree(&tree_name(key, generation))?;
        }
        self.shared.files.remove_others(key, None)?;
        self.shared.redo.remove(key)
    }

    /// The maps that are open now. Whoever wants them written down by [`MapStore::close`] keeps
    /// them so until then.
    pub fn open_maps(&self) -> Vec<ReplicaMap> {
        self.shared
            .open_replicas()
            .into_iter()
            .map(|replica| ReplicaMap { replica })
            .collect()
    }

    /// The clean stop: writes down what the log holds durably of the maps that are open, ends the
    /// checkpointer and makes the trees survive a power cut. Not needed for anything to be kept,
    /// only for a quick start. Blocking.
    pub fn close(&self) -> Result<(), StoreError> {
        for replica in self.shared.weak_replicas() {
            let Some(replica) = replica.upgrade() else {
                continue;
            };
            let mut writer = replica.lock_writer_first();
            replica.freeze_rest();

            // Nothing is lost: the next start applies it again from the log.
            if let Err(error) = replica.checkpoint_ready(&mut writer) {
                tracing::debug!(replica = %replica.key, %error, "a map was not written down at the \
                    stop");
            }
        }
        self.stop();
        self.shared.trees.sync()
    }

    /// Has tables written down that had to wait for room on the disk. Cheap where none did.
    pub fn write_what_waited_for_room(&self) {
        if self.shared.lacks_room.swap(false, Ordering::AcqRel) {
            self.shared
                .open_replicas()
                .iter()
                .for_each(ReplicaMapInner::queue);
        }
    }

    pub fn metrics(&self) -> MapMetrics {
        let counters = &self.shared.counters;
        let replicas = self.shared.open_replicas();
        MapMetrics {
            replicas: self.shared.lock_replicas().len(),
            active_bytes: self.shared.active_bytes.get(),
            frozen_bytes: self.shared.frozen_bytes.get(),
            clean_bytes: self.shared.clean_bytes.get(),
            checkpoints: counters.checkpoints.load(Ordering::Relaxed),
            checkpoint_us_total: counters.checkpoint_us_total.load(Ordering::Relaxed),
            checkpoint_us_max: counters.checkpoint_us_max.load(Ordering::Relaxed),
            snapshots_built: counters.snapshots_built.load(Ordering::Relaxed),
            snapshots_installed: counters.snapshots_installed.load(Ordering::Relaxed),
            scans_given_up: counters.scans_given_up.load(Ordering::Relaxed),
            trees_copied: counters.trees_copied.load(Ordering::Relaxed),
            reads_elsewhere: self.shared.readers.count(),
            map_bytes: replicas.iter().map(|replica| replica.map_bytes()).sum(),
            trees_disk_bytes: self.shared.trees_disk_bytes.load(Ordering::Relaxed),
            snapshots_disk_bytes: replicas
                .iter()
                .map(|replica| replica.snapshot_bytes())
                .sum(),
        }
    }

    /// Returns how many steps the checkpointer has taken, and whether it should take another: it
    /// hangs where it does not.
    pub fn checkpointer_activity(&self) -> (u64, bool) {
        let has_work = self.shared.at_work.load(Ordering::Relaxed) || !self.shared.queue.is_idle();
        (self.shared.beat.steps(), has_work)
    }

    /// Returns why this process writes to maps no more; none as long as it does. No map is damaged
    /// by that, and a process that starts anew can write again.
    pub fn given_up(&self) -> Option<String> {
        self.shared.trees.given_up()
    }

    /// Returns whether the disk has room for trees of so many bytes.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.shared.trees.ensure_room(bytes).is_ok()
    }

    pub(super) fn shared(&self) -> &MapStoreInner {
        &self.shared
    }

    fn stop(&self) {
        self.shared.queue.stop();
        self.shared.changed.notify_waiters();
    }
}

impl Drop for MapStore {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Writes frozen tables to their trees, one at a time, for all replicas of a node.
pub struct Checkpointer {
    shared: Arc<MapStoreInner>,
}

impl Checkpointer {
    /// Works until the store is closed or dropped. For a thread of its own.
    pub fn run(self) {
        while let Some(job) = self.shared.queue.wait() {
            self.work(job);
        }
    }

    /// The same as a task: for a simulation. Its writes and syncs block the thread.
    pub async fn run_in_task(mut self) {
        while !self.shared.queue.is_stopped() {
            if !self.pump() {
                self.shared.queue.wait_in_task().await;
            }
        }
    }

    /// Does one job, if there is one: for a simulation in one thread.
    pub fn pump(&mut self) -> bool {
        let Some(job) = self.shared.queue.try_pop() else {
            return false;
        };
        self.work(job);
        true
    }

    fn work(&self, job: CheckpointJob) {
        self.shared.beat.step();

        // A watchdog tells from this whether a job hangs or there is none.
        self.shared.at_work.store(true, Ordering::Relaxed);
        match job {
            CheckpointJob::Checkpoint(replica) => {
                if let Some(replica) = replica.upgrade() {
                    replica.checkpoint();
                }
            }
            CheckpointJob::Relieve => self.shared.relieve(),
        }
        self.shared.at_work.store(false, Ordering::Relaxed);
        self.shared.beat.step();
    }
}

impl MapStoreInner {
    fn lock_replicas(
        &self,
    ) -> parking_lot::MutexGuard<'_, BTreeMap<ReplicaKey, Weak<ReplicaMapInner>>> {
        self.replicas.lock()
    }

    /// The replicas that are open, or about to be.
    pub fn claimed(&self) -> Vec<ReplicaKey> {
        self.lock_replicas().keys().copied().collect()
    }

    pub fn open_replicas(&self) -> Vec<Arc<ReplicaMapInner>> {
        self.lock_replicas()
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// The same for whoever is with each of them for long: they may be closed meanwhile.
    pub fn weak_replicas(&self) -> Vec<Weak<ReplicaMapInner>> {
        self.lock_replicas().values().cloned().collect()
    }

    /// Returns the bytes of the keys and values of all maps, as far as they are written down.
    pub fn live_bytes(&self) -> u64 {
        self.open_replicas()
            .iter()
            .map(|replica| replica.map_bytes())
            .sum()
    }

    /// Many small active tables are as large as a few great ones: past a limit the largest are
    /// written down before they are full. Clean tables make room for others.
    pub fn relieve_if_needed(&self) {
        let is_full = self.active_bytes.get() > self.options.node_bytes_max / 2;
        if (is_full || self.wants_clean_dropped()) && !self.relieving.swap(true, Ordering::AcqRel) {
            self.queue.push(CheckpointJob::Relieve);
        }
    }

    fn relieve(&self) {
        // Cleared first, so that whoever outgrows the limit from here on asks again.
        self.relieving.store(false, Ordering::Release);
        self.relieve_clean();
        if self.active_bytes.get() <= self.options.node_bytes_max / 2 {
            return;
        }
        let active_bytes = |replica: &Arc<ReplicaMapInner>| replica.read_memtables().active.bytes();
        let mut by_bytes: Vec<_> = self
            .open_replicas()
            .into_iter()
            .map(|replica| (active_bytes(&replica), replica))
            .collect();
        by_bytes.sort_by_key(|(bytes, replica)| (std::cmp::Reverse(*bytes), replica.key));
        for (_, replica) in by_bytes {
            // Well below the limit, or the next change would ask for relief again.
            if self.active_bytes.get() <= self.options.node_bytes_max / 4 {
                break;
            }
            replica.freeze_rest();
        }
    }
}

/// The right to be the one open map of a replica.
pub(super) struct MapClaim {
    shared: Arc<MapStoreInner>,
    key: ReplicaKey,
}

impl MapClaim {
    fn new(shared: &Arc<MapStoreInner>, key: ReplicaKey) -> Result<Self, StoreError> {
        let mut replicas = shared.lock_replicas();
        if replicas.contains_key(&key) {
            let source =
                std::io::Error::new(std::io::ErrorKind::ResourceBusy, "it is open already");
            return Err(StoreError::Io {
                context: format!("opening the map of {key}"),
                source,
            });
        }

        // Taken at once. Nobody finds the map before it is open.
        replicas.insert(key, Weak::new());
        Ok(Self {
            shared: shared.clone(),
            key,
        })
    }
}

impl Drop for MapClaim {
    fn drop(&mut self) {
        self.shared.lock_replicas().remove(&self.key);
    }
}

/// Jobs of the checkpointer.
pub(super) enum CheckpointJob {
    Checkpoint(Weak<ReplicaMapInner>),
    /// Drop clean tables, or freeze what is large.
    Relieve,
}

/// The jobs of the checkpointer. Bounded: each replica has at most one in it, and there is at most
/// one relief.
#[derive(Default)]
pub(super) struct JobQueue {
    state: Mutex<JobQueueState>,
    wake_thread: Condvar,
    wake_task: Notify,
}

#[derive(Default)]
struct JobQueueState {
    jobs: VecDeque<CheckpointJob>,
    stopped: bool,
}

impl JobQueue {
    pub fn push(&self, job: CheckpointJob) {
        self.lock().jobs.push_back(job);
        self.wake_thread.notify_one();
        self.wake_task.notify_one();
    }

    /// The next job, or none when stopped.
    fn wait(&self) -> Option<CheckpointJob> {
        let mut state = self.lock();
        self.wake_thread
            .wait_while(&mut state, |state| state.jobs.is_empty() && !state.stopped);
        if state.stopped {
            None
        } else {
            state.jobs.pop_front()
        }
    }

    /// Waits as a task until something was pushed, or it was stopped. May return early.
    async fn wait_in_task(&self) {
        self.wake_task.notified().await;
    }

    fn try_pop(&self) -> Option<CheckpointJob> {
        let mut state = self.lock();
        if state.stopped {
            None
        } else {
            state.jobs.pop_front()
        }
    }

    fn stop(&self) {
        self.lock().stopped = true;
        self.wake_thread.notify_all();
        self.wake_task.notify_one();
    }

    /// Returns whether nothing waits, or nothing more is done.
    fn is_idle(&self) -> bool {
        let state = self.lock();
        state.jobs.is_empty() || state.stopped
    }

    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, JobQueueState> {
        self.state.lock()
    }
}

/// A sum that many replicas add their part to.
#[derive(Default)]
pub(super) struct Gauge(AtomicUsize);

impl Gauge {
    /// A part of it was `before` and is now `after`.
    pub fn replace(&self, before: usize, after: usize) {
        // It never wraps: a part that was not counted would make a full node of an empty one.
        let replaced = |sum: usize| Some(sum.saturating_add(after).saturating_sub(before));
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, replaced);
    }

    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters since the start.
#[derive(Default)]
pub(super) struct Counters {
    checkpoints: AtomicU64,
    checkpoint_us_total: AtomicU64,
    checkpoint_us_max: AtomicU64,
    pub snapshots_built: AtomicU64,
    pub snapshots_installed: AtomicU64,
    pub scans_given_up: AtomicU64,
    pub trees_copied: AtomicU64,
}

impl Counters {
    pub fn count_checkpoint(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.checkpoints.fetch_add(1, Ordering::Relaxed);
        self.checkpoint_us_total.fetch_add(us, Ordering::Relaxed);
        self.checkpoint_us_max.fetch_max(us, Ordering::Relaxed);
    }
}
