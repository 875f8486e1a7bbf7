//! [`ReplicaMap`]: the map of one replica while it runs.
//!
//! Two locks, always taken in this order: the writer (whoever locks it writes the tree, or keeps
//! others from writing it), then the memtables. The current snapshot is locked last and
//! never held while another is waited for.

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::digest::{Digest, PairHasher};
use super::memtables::{ImmutableMemtable, Memtables, ReadGuard};
use super::open::{Opened, PreparedMap, ReadyMap, pair_bytes};
use super::record::{RESERVED, TreeRecord};
use super::redo::{Redo, RedoFile};
use super::store::{CheckpointJob, MapClaim, MapStoreInner};
use super::tree_walks::{TreeCheck, TreeCopy};
use super::{Applied, Synced};
use crate::mutants::{self, Mutant};
use crate::sm::ports::{StoreError, WriteBatch};
use crate::storage::ReplicaKey;
use crate::storage::snapshot::{Snapshot, SnapshotReceiver};
use crate::storage::tree::Tree;
use crate::types::LogId;

/// The map of one replica. Clones share it.
#[derive(Clone)]
pub struct ReplicaMap {
    pub(super) replica: Arc<ReplicaMapInner>,
}

/// Bytes that a replica holds in memory of what its tree does not have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemtableBytes {
    pub active: usize,
    pub frozen: usize,
}

pub(super) struct ReplicaMapInner {
    pub key: ReplicaKey,
    pub shared: Arc<MapStoreInner>,
    synced: Arc<dyn Synced>,
    memtables: RwLock<Memtables>,
    writer: Mutex<TreeWriter>,
    pub current_snapshot: Mutex<Option<Snapshot>>,
    /// Bytes of the keys and values in the tree. Changed by whoever has the writer locked.
    map_bytes: AtomicU64,
    /// Number of waiters that go before a snapshot scan.
    waiting: Mutex<usize>,
    none_waiting: Condvar,
    /// A checkpoint of it is queued.
    queued: AtomicBool,
    /// Set by a checkpoint that found the writer locked: whoever unlocks it queues another.
    checkpoint_missed: AtomicBool,
    /// The reason why nothing more is applied. Final.
    failure: OnceLock<String>,
    wiped: AtomicBool,
    digests: Mutex<Digests>,
    opened: Opened,
    /// Given back when the last handle goes.
    _claim: MapClaim,
}

/// Digests of the whole map that were asked for.
#[derive(Default)]
struct Digests {
    /// As of this entry, whose table waits for a checkpoint.
    wanted: Option<LogId>,
    noted: Option<(LogId, Digest)>,
}

/// State of the tree, owned by whoever may write to it.
pub(super) struct TreeWriter {
    pub record: TreeRecord,
    /// Opened by the first checkpoint.
    redo: Option<RedoFile>,
    /// The copy of the tree that is being made.
    pub copy: Option<TreeCopy>,
    /// The check of the tree that is under way.
    pub check: Option<TreeCheck>,
    /// The map that is about to take the tree's place.
    pub prepared: Option<PreparedMap>,
}

/// A locked [`TreeWriter`]. A checkpoint that was passed over meanwhile is queued when it is
/// unlocked.
pub(super) struct WriterGuard<'a> {
    /// None once it is given back.
    writer: Option<MutexGuard<'a, TreeWriter>>,
    replica: &'a Arc<ReplicaMapInner>,
}

impl Deref for WriterGuard<'_> {
    type Target = TreeWriter;

    fn deref(&self) -> &TreeWriter {
        self.writer.as_deref().expect("it is held until the end")
    }
}

impl DerefMut for WriterGuard<'_> {
    fn deref_mut(&mut self) -> &mut TreeWriter {
        self.writer
            .as_deref_mut()
            .expect("it is held until the end")
    }
}

impl Drop for WriterGuard<'_> {
    fn drop(&mut self) {
        self.writer = None;
        if self.replica.checkpoint_missed.swap(false, Ordering::AcqRel) {
            self.replica.queue();
        }
    }
}

/// Stops a map whose change is broken off by a panic: its tables may hold half of an entry, which
/// must not be written down as if it were the state before, and applied once more at the next
/// start. The lock says nothing of it.
struct StopIfPanicking<'a>(&'a ReplicaMapInner);

impl Drop for StopIfPanicking<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail("applying an entry panicked");
        }
    }
}

impl ReplicaMap {
    pub(super) fn new(
        shared: Arc<MapStoreInner>,
        claim: MapClaim,
        synced: Arc<dyn Synced>,
        key: ReplicaKey,
        found: ReadyMap,
    ) -> Self {
        let ReadyMap {
            tree,
            record,
            map_bytes,
            snapshot,
            opened,
        } = found;
        let replica = ReplicaMapInner {
            key,
            shared,
            synced,
            memtables: RwLock::new(Memtables::new(tree, record.applied.clone())),
            writer: Mutex::new(TreeWriter {
                record,
                redo: None,
                copy: None,
                check: None,
                prepared: None,
            }),
            current_snapshot: Mutex::new(snapshot),
            map_bytes: AtomicU64::new(map_bytes),
            waiting: Mutex::new(0),
            none_waiting: Condvar::new(),
            queued: AtomicBool::new(false),
            checkpoint_missed: AtomicBool::new(false),
            failure: OnceLock::new(),
            wiped: AtomicBool::new(false),
            digests: Mutex::default(),
            opened,
            _claim: claim,
        };
        Self {
            replica: Arc::new(replica),
        }
    }

    pub fn key(&self) -> ReplicaKey {
        self.replica.key
    }

    /// Returns how the map was found when it was opened.
    pub fn opened(&self) -> &Opened {
        &self.replica.opened
    }

    pub fn applied(&self) -> Applied {
        self.replica.read_memtables().applied.clone()
    }

    /// The map at this point in time, for several reads. Nothing is applied while the guard lives,
    /// so long scans go in pages.
    pub fn read(&self) -> ReadGuard<'_> {
        ReadGuard {
            tables: self.replica.read_memtables(),
        }
    }

    /// Puts a batch into the map, as of `applied`. In memory: the log is what makes it durable.
    /// Never waits for the disk; the caller awaits [`ReplicaMap::wait_room`] first, so that
    /// memory is bounded. An error is final: this replica has stopped.
    ///
    /// `applied` must go forward: an entry that is in the map already is an error like any other.
    ///
    /// # Panics
    /// If a key begins with a zero byte or is empty: going on would make replicas differ.
    pub fn apply(&self, batch: WriteBatch, applied: Applied) -> Result<(), StoreError> {
        let replica = &self.replica;
        replica.check()?;

        // Keys are in order, so the first one tells for all.
        let reserved = batch
            .iter()
            .next()
            .is_some_and(|(key, _)| key.first().is_none_or(|byte| *byte == RESERVED));
        assert!(!reserved, "{}: a change of a reserved key", replica.key);
        let frozen = {
            let mut tables = replica.write_memtables();
            // Before the lock is given back.
            let _stop = StopIfPanicking(replica);
            if applied.log_id <= tables.applied.log_id {
                return Err(StoreError::Damaged(format!(
                    "{}: an entry that is in the map was to be applied",
                    replica.key
                )));
            }

            // Table and position change under one lock, so a frozen table ends exactly at its
            // position.
            let before = tables.active.bytes();
            tables.active.apply(batch);
            tables.applied = applied;
            replica
                .shared
                .active_bytes
                .replace(before, tables.active.bytes());
            let full = tables.active.bytes() >= replica.shared.options.table_bytes_max;
            let frozen = full.then(|| replica.freeze(&mut tables));
            if cfg!(debug_assertions) {
                tables.check_invariants();
            }
            frozen
        };

        // Outside of the lock: queueing may call back at once, and relief looks at other replicas.
        match frozen {
            Some(frozen) => replica.queue_when_synced(frozen),
            None => replica.shared.relieve_if_needed(),
        }
        Ok(())
    }

    /// Changes the map behind the back of the log, as a fault of program, machine or disk would.
    #[cfg(any(test, feature = "testing"))]
    pub fn corrupt(&self, batch: WriteBatch) {
        let mut tables = self.replica.write_memtables();
        let before = tables.active.bytes();
        tables.active.apply(batch);
        self.replica
            .shared
            .active_bytes
            .replace(before, tables.active.bytes());
    }

    /// Has the digest of the map noted as it is after this entry, which is to be applied next: a
    /// table that the entry fills may be written down at once. The checkpoint makes the digest;
    /// [`ReplicaMap::write_down`] has one begun.
    pub fn want_digest(&self, after: LogId) {
        self.replica.digests.lock().wanted = Some(after);
    }

    /// Returns the last digest that was noted, and of which entry it is.
    pub fn noted_digest(&self) -> Option<(LogId, Digest)> {
        self.replica.digests.lock().noted
    }

    /// Returns true if its data is no longer wanted, so that a failure to read it is not worth
    /// reporting.
    pub fn is_wiped(&self) -> bool {
        self.replica.is_wiped()
    }

    /// Returns why nothing more is applied, if that is so. A map of which nothing was wanted any
    /// more has not failed.
    pub fn failure(&self) -> Option<String> {
        self.replica
            .failure
            .get()
            .filter(|_| !self.is_wiped())
            .cloned()
    }

    /// Waits while too many tables wait for the disk. Returns also when the replica has failed:
    /// [`ReplicaMap::apply`] then says so.
    pub async fn wait_room(&self) {
        self.wait_until(|replica| replica.has_room()).await;
    }

    /// Waits while many tables wait for the disk: before changes that can wait, so that others find
    /// room.
    pub async fn wait_ample_room(&self) {
        self.wait_until(|replica| replica.has_ample_room()).await;
    }

    /// Freezes what is applied now, and waits until the log is durable through it. A snapshot built
    /// then holds at least that.
    pub async fn settle(&self) {
        let last = self.replica.freeze_rest();
        let last = last.or_else(|| self.replica.read_memtables().frozen.back().cloned());
        let Some(last) = last else { return };
        // Another map may be installed meanwhile: then the table waits for nothing more.
        let gone = |replica: &ReplicaMapInner| {
            !replica
                .read_memtables()
                .frozen
                .iter()
                .any(|frozen| Arc::ptr_eq(frozen, &last))
        };
        self.wait_until(|replica| last.is_synced() || gone(replica))
            .await;
    }

    async fn wait_until(&self, done: impl Fn(&ReplicaMapInner) -> bool) {
        loop {
            // Registered before the look, or a change in between would be missed.
            let changed = self.replica.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if done(&self.replica)
                || self.replica.failure.get().is_some()
                || self.replica.shared.queue.is_stopped()
            {
                return;
            }
            changed.await;
        }
    }

    /// The newest durable snapshot file.
    pub fn current_snapshot(&self) -> Option<Snapshot> {
        self.replica.lock_current_snapshot().clone()
    }

    /// A file for a snapshot that arrives from another replica.
    pub fn begin_receive(&self) -> Result<SnapshotReceiver, StoreError> {
        self.replica.check()?;
        SnapshotReceiver::begin(&self.replica.shared.files, self.replica.key)
    }

    /// Bytes of the keys and values of the map, as far as its tables are written down.
    pub fn map_bytes(&self) -> u64 {
        self.replica.map_bytes()
    }

    /// Has what is in memory written down once the log is durable through it: nobody else may come
    /// by for long, and what was deleted takes its space until then.
    pub fn write_down(&self) {
        self.replica.freeze_rest();
    }

    pub fn bytes(&self) -> MemtableBytes {
        let tables = self.replica.read_memtables();
        MemtableBytes {
            active: tables.active.bytes(),
            frozen: tables.frozen_bytes,
        }
    }
}

impl ReplicaMapInner {
    pub fn read_memtables(&self) -> RwLockReadGuard<'_, Memtables> {
        self.memtables.read()
    }

    pub fn write_memtables(&self) -> RwLockWriteGuard<'_, Memtables> {
        self.memtables.write()
    }

    pub fn lock_current_snapshot(&self) -> MutexGuard<'_, Option<Snapshot>> {
        self.current_snapshot.lock()
    }

    /// Removes every snapshot file of this replica but the current one.
    pub fn remove_old_snapshots(&self) -> Result<(), StoreError> {
        let current_snapshot = self.lock_current_snapshot();
        let current = current_snapshot.as_ref().map(Snapshot::path);
        self.shared
            .files
            .remove_others(self.key, current.as_deref())
    }

    pub fn map_bytes(&self) -> u64 {
        self.map_bytes.load(Ordering::Relaxed)
    }

    pub fn set_map_bytes(&self, bytes: u64) {
        self.map_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Of its snapshot file.
    pub fn snapshot_bytes(&self) -> u64 {
        self.lock_current_snapshot()
            .as_ref()
            .map_or(0, Snapshot::bytes_len)
    }

    /// Locks the writer, after those who go first.
    pub fn lock_writer_last(self: &Arc<Self>) -> WriterGuard<'_> {
        let mut waiting = self.waiting.lock();
        self.none_waiting
            .wait_while(&mut waiting, |waiting| *waiting > 0);
        drop(waiting);
        self.lock_writer()
    }

    /// Locks the writer before a snapshot scan that has it: the scan gives up.
    pub fn lock_writer_first(self: &Arc<Self>) -> WriterGuard<'_> {
        *self.waiting.lock() += 1;
        let writer = self.lock_writer();
        *self.waiting.lock() -= 1;
        self.none_waiting.notify_all();
        writer
    }

    pub fn is_writer_wanted(&self) -> bool {
        *self.waiting.lock() > 0
    }

    fn lock_writer(self: &Arc<Self>) -> WriterGuard<'_> {
        WriterGuard {
            writer: Some(self.writer.lock()),
            replica: self,
        }
    }

    /// Locks the writer, if it is free. Otherwise whoever has it queues a checkpoint when it is
    /// unlocked back.
    fn try_lock_writer(self: &Arc<Self>) -> Option<WriterGuard<'_>> {
        let free = || {
            self.writer.try_lock().map(|writer| WriterGuard {
                writer: Some(writer),
                replica: self,
            })
        };
        free().or_else(|| {
            // The one thread for checkpoints must not wait for a scan, which may take long.
            self.checkpoint_missed.store(true, Ordering::Release);
            // It may have been given back just before that was said.
            free()
        })
    }

    pub fn is_wiped(&self) -> bool {
        self.wiped.load(Ordering::Relaxed)
    }

    /// An error if the replica has stopped.
    pub fn check(&self) -> Result<(), StoreError> {
        match self.failure.get() {
            None => Ok(()),
            Some(why) => {
                let source = std::io::Error::other(why.clone());
                Err(StoreError::Io {
                    context: format!("the map of {} has stopped", self.key),
                    source,
                })
            }
        }
    }

    /// Stops the replica. The first reason stays.
    pub fn fail(&self, why: &str) {
        if self.failure.set(why.to_owned()).is_ok() {
            tracing::error!(replica = %self.key, %why, "the map of a replica has stopped");
        }
        self.shared.changed.notify_waiters();
    }

    /// Stops the replica without complaint, as its data is wanted no more.
    pub fn retire(&self) {
        self.wiped.store(true, Ordering::Relaxed);
        let _ = self.failure.set("it was wiped".into());
        self.shared.changed.notify_waiters();
    }

    fn has_room(&self) -> bool {
        let options = &self.shared.options;
        self.read_memtables().frozen_bytes <= options.frozen_bytes_max
            && self.shared.frozen_bytes.get() <= options.node_bytes_max / 2
    }

    fn has_ample_room(&self) -> bool {
        let options = &self.shared.options;
        self.read_memtables().frozen_bytes <= options.frozen_bytes_max / 4
            && self.shared.frozen_bytes.get() <= options.node_bytes_max / 8
    }

    /// Returns true if too many tables wait for a snapshot scan.
    pub fn is_crowded(&self) -> bool {
        let options = &self.shared.options;
        self.read_memtables().frozen_bytes > options.frozen_bytes_max / 2
            || self.shared.frozen_bytes.get() > options.node_bytes_max / 4
    }

    fn freeze(&self, tables: &mut Memtables) -> Arc<ImmutableMemtable> {
        let bytes = tables.active.bytes();
        let frozen = tables.freeze();
        self.shared.active_bytes.replace(bytes, 0);
        self.shared.frozen_bytes.replace(0, bytes);
        frozen
    }

    /// Freezes the active table if it says anything that the tree and the frozen tables do not. The
    /// frozen one is queued.
    pub fn freeze_rest(self: &Arc<Self>) -> Option<Arc<ImmutableMemtable>> {
        let frozen = {
            let mut tables = self.write_memtables();
            let said = tables
                .frozen
                .back()
                .map_or(&tables.tree_applied, |frozen| &frozen.applied);
            (*said != tables.applied).then(|| self.freeze(&mut tables))
        };
        if let Some(frozen) = &frozen {
            self.queue_when_synced(frozen.clone());
        }
        frozen
    }

    fn queue_when_synced(self: &Arc<Self>, frozen: Arc<ImmutableMemtable>) {
        // Nothing was applied, so the log has nothing to sync.
        let Some(log_id) = frozen.applied.log_id else {
            frozen.synced.store(true, Ordering::Release);
            return self.queue();
        };

        // Weak, because a log that waits for its disk must not keep a closed map alive.
        let replica = Arc::downgrade(self);
        let done = move |result: std::io::Result<()>| {
            let replica = replica.upgrade();
            match result {
                Ok(()) => {
                    frozen.synced.store(true, Ordering::Release);
                    if let Some(replica) = replica {
                        replica.queue();
                        replica.shared.changed.notify_waiters();
                    }
                }
                Err(error) => {
                    if let Some(replica) = replica {
                        replica.fail(&format!("the log failed: {error}"));
                    }
                }
            }
        };

        // openraft applies what a quorum has synced. This disk may not have it yet, and may lose
        // it.
        self.synced.on_synced(log_id, Box::new(done));
    }

    pub fn queue(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.shared
                .queue
                .push(CheckpointJob::Checkpoint(Arc::downgrade(self)));
        }
    }

    /// Does the queued checkpoint, unless another has it locked: there is one thread for the
    /// checkpoints of all replicas, which waits for none of them.
    pub fn checkpoint(self: &Arc<Self>) {
        // Cleared first, so that a table frozen from here on queues another checkpoint.
        self.queued.store(false, Ordering::Release);
        let Some(mut writer) = self.try_lock_writer() else {
            return;
        };
        // Its caller can do nothing about an error; the next apply meets it.
        let _ = self.checkpoint_ready(&mut writer);
    }

    /// Writes the frozen tables that may be written to the tree, the oldest first.
    ///
    /// Only those that are frozen now: writers may be as fast as the disk, and then a snapshot, a
    /// copy, a stop or another map would wait for them for ever. Who holds the writer meanwhile
    /// need not care for later ones: each is queued once it may be written.
    pub fn checkpoint_ready(&self, writer: &mut TreeWriter) -> Result<(), StoreError> {
        let tables = self.read_memtables().frozen.len();
        for _ in 0..tables {
            self.check()?;
            let (frozen, tree) = {
                let tables = self.read_memtables();
                match tables.frozen.front() {
                    Some(frozen) if frozen.is_synced() => (frozen.clone(), tables.tree.clone()),
                    Some(_) | None => return Ok(()),
                }
            };
            if self.waits_for_room(&frozen) {
                return Ok(());
            }

            // The redo file is emptied only after the flush: until then it is what repairs a torn
            // tree.
            let started = Instant::now();
            let written = self.flush_memtable(&*tree, &frozen, writer).and_then(|()| {
                self.retire_oldest();
                tree.flush()?;
                writer.redo.as_mut().map_or(Ok(()), RedoFile::empty)
            });
            written.inspect_err(|error| self.fail(&format!("a checkpoint failed: {error}")))?;
            self.shared.beat.step();
            self.shared.counters.count_checkpoint(started.elapsed());
            self.shared.changed.notify_waiters();
        }
        self.check()
    }

    /// Returns whether the disk is too full for a table to be written down. It stays in memory
    /// then, where the tables have a bound, and is looked at again by
    /// [`super::MapStore::write_what_waited_for_room`].
    fn waits_for_room(&self, frozen: &ImmutableMemtable) -> bool {
        // The tree's own factor is that of a whole copy.
        let bytes = (frozen.table.bytes() / 2) as u64;
        let is_full = self
            .shared
            .trees
            .ensure_room(bytes)
            .is_err_and(|error| is_full(&error));
        if is_full {
            self.shared.lacks_room.store(true, Ordering::Release);
        }
        is_full
    }

    /// Writes a table and the record that goes with it. Until the tree is flushed, the redo file
    /// says what was written.
    fn flush_memtable(
        &self,
        tree: &dyn Tree,
        frozen: &ImmutableMemtable,
        writer: &mut TreeWriter,
    ) -> Result<(), StoreError> {
        assert!(
            frozen.is_synced(),
            "{}: a checkpoint of what is not durable in the log",
            self.key
        );
        assert!(
            writer.record.applied.log_id <= frozen.applied.log_id,
            "{}: a checkpoint would take the tree back",
            self.key
        );
        let (redo, map_bytes) = redo_of(
            tree,
            frozen,
            &writer.record,
            self.map_bytes.load(Ordering::Relaxed),
        )?;
        let file = match &mut writer.redo {
            Some(file) => file,
            none => none.insert(self.shared.redo.file(self.key)?),
        };
        file.write(&redo)?;

        // Before the tree changes, because the check subtracts the old values.
        if let Some(check) = &mut writer.check
            && let Err(error) = check.follow(tree, &redo.changes)
        {
            // Nothing is said of the tree then; another check begins anew.
            tracing::warn!(replica = %self.key, %error, "a check of a tree was given up");
            writer.check = None;
        }

        // The redo file says what is meant: if the process ends from here on, the next start
        // carries it out.
        redo.carry_out(tree)?;
        if let Some(copy) = &mut writer.copy
            && let Err(error) = copy.follow(&redo.changes)
        {
            // The tree is as it should be: it goes on without the copy.
            tracing::warn!(replica = %self.key, %error, "a copy of a tree was given up");
            writer.copy = None;
        }
        writer.record = redo.record;
        self.map_bytes.store(map_bytes, Ordering::Relaxed);
        self.note_digest(&writer.record);
        Ok(())
    }

    /// Notes the digest of the tree if it is that which was asked for.
    fn note_digest(&self, record: &TreeRecord) {
        let mut digests = self.digests.lock();

        // Digests are compared at one entry only: one of a later state says nothing.
        if let Some(wanted) = digests
            .wanted
            .filter(|wanted| record.applied.log_id == Some(*wanted))
        {
            *digests = Digests {
                wanted: None,
                noted: Some((wanted, record.digest)),
            };
        }
    }

    /// Puts other tables in the place of these, and gives the old ones back.
    pub fn switch(&self, tables: Memtables) -> Memtables {
        let old = std::mem::replace(&mut *self.write_memtables(), tables);
        self.shared.active_bytes.replace(old.active.bytes(), 0);
        self.shared.frozen_bytes.replace(old.frozen_bytes, 0);
        self.shared.clean_bytes.replace(old.clean_bytes(), 0);
        old
    }
}

impl Drop for ReplicaMapInner {
    fn drop(&mut self) {
        let tables = self.memtables.get_mut();
        self.shared.active_bytes.replace(tables.active.bytes(), 0);
        self.shared.frozen_bytes.replace(tables.frozen_bytes, 0);
        self.shared.clean_bytes.replace(tables.clean_bytes(), 0);
    }
}

fn is_full(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull
    )
}

/// Returns what a checkpoint of a table changes in the tree, and what then is in it in place of
/// `map_bytes`.
fn redo_of(
    tree: &dyn Tree,
    frozen: &ImmutableMemtable,
    record: &TreeRecord,
    mut map_bytes: u64,
) -> Result<(Redo, u64), StoreError> {
    let before = record.applied.clone();
    let mut record = TreeRecord {
        applied: frozen.applied.clone(),
        ..record.clone()
    };
    let (mut changes, mut hasher) = (Vec::new(), PairHasher::default());
    for (key, change) in frozen.table.iter() {
        let old = tree.get(key)?;

        // Left out: a write that changes nothing still costs the tree and the redo file.
        if old == *change {
            continue;
        }

        // The digest is a sum, so the old pair has to be taken out of it.
        if let Some(old) = old {
            record.digest.subtract(hasher.hash(key, &old));
            map_bytes = map_bytes.saturating_sub(pair_bytes(key, &old));
        }
        if let Some(value) = change {
            record.digest.add(hasher.hash(key, value));
            map_bytes += pair_bytes(key, value);
        }
        changes.push((key.clone(), change.clone()));
    }
    if mutants::is_on(Mutant::AppliedBehindData) {
        record.applied = before;
    }
    Ok((Redo { record, changes }, map_bytes))
}
