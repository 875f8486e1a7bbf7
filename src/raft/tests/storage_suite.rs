//! openraft's own suite for stores, over the real log and maps on a real directory, and over their
//! doubles.
//!
//! The suite begins logs at index 1, as no group ever does, and our log refuses a hole. [`Hiding`]
//! fills it and hides what it filled in; [`Contiguous`] does so for the state machine.

use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use futures::{Stream, TryStreamExt, stream};
use openraft::entry::RaftEntry as _;
use openraft::storage::{EntryResponder, IOFlushed, RaftLogStorage, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::alias::SnapshotOf;
use openraft::{EntryPayload, LogState, OptionalSend, RaftLogReader, StorageError};

use super::cluster::{Disks, key};
use crate::raft::apply_state::ApplyState;
use crate::raft::log_store::LogStore;
use crate::raft::replica_store::{ReplicaStore, SnapshotData};
use crate::raft::state_machine::{SnapshotBuilder, StateMachine};
use crate::raft::types::{RaftEntry, RaftLogId, RaftVoteOf, SnapshotMeta, StoredMembership, Types};
use crate::raft::witness_store::WitnessStore;
use crate::storage::disk::{Disk, RealDisk};
use crate::storage::log::{Log, LogOptions};
use crate::storage::map::{Applied, MapOptions, MapStore, OnSynced, Synced};
use crate::storage::sled_tree::{SledOptions, SledTrees};
use crate::storage::tree::Trees;
use crate::types::{LogId, ReplicaId};

/// The suite makes its ids of numbers.
impl From<u64> for ReplicaId {
    fn from(id: u64) -> Self {
        Self(id)
    }
}

/// Keeps what a store stands on until the store is gone.
struct Guard {
    log: Log,
    states: Arc<MapStore>,
    threads: Vec<JoinHandle<()>>,
    _directory: Option<tempfile::TempDir>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.log.close();
        self.states.close().expect("a clean stop");
        self.threads
            .drain(..)
            .for_each(|thread| thread.join().expect("it ended well"));
    }
}

fn store(
    disk: Arc<dyn Disk>,
    trees: Arc<dyn Trees>,
    directory: &Path,
    keep: Option<tempfile::TempDir>,
    is_witness: bool,
) -> (Guard, Hiding, Contiguous) {
    let options = LogOptions {
        segment_bytes: 64 << 10,
        grow_bytes: 16 << 10,
        ..LogOptions::default()
    };
    let (log, writer) = Log::open(disk.clone(), &directory.join("log"), options).expect("a log");
    let (states, checkpointer) =
        MapStore::open(trees, disk, directory, MapOptions::default()).expect("maps");
    let threads = vec![
        std::thread::spawn(move || writer.run()),
        std::thread::spawn(move || checkpointer.run()),
    ];
    log.create(key(1, 1), Box::new(|created| created.expect("created")));
    let replica = log.replica(key(1, 1)).expect("it was created");
    let store = match is_witness {
        false => ReplicaStore::Map(
            states
                .replica(key(1, 1), Arc::new(AlwaysSynced))
                .expect("a map"),
        ),
        true => {
            let files = states.witnesses().clone();
            ReplicaStore::Witness(WitnessStore::new(
                key(1, 1),
                files,
                Arc::new(AlwaysSynced),
                Applied::default(),
            ))
        }
    };
    let apply_state = Arc::new(ApplyState::new(store).expect("a readable map"));
    let guard = Guard {
        log,
        states: Arc::new(states),
        threads,
        _directory: keep,
    };
    (
        guard,
        Hiding {
            store: LogStore::new(replica),
            first_seen: Arc::default(),
        },
        Contiguous(StateMachine::new(apply_state)),
    )
}

/// The suite applies what it never appended.
struct AlwaysSynced;

impl Synced for AlwaysSynced {
    fn on_synced(&self, _log_id: LogId, done: OnSynced) {
        done(Ok(()));
    }
}

/// A log whose first entries, which the suite knows nothing of, can't be seen.
#[derive(Clone)]
struct Hiding {
    store: LogStore,
    first_seen: Arc<AtomicU64>,
}

impl Hiding {
    fn first_seen(&self) -> u64 {
        self.first_seen.load(Ordering::Relaxed)
    }

    fn seen(&self, id: Option<RaftLogId>) -> Option<RaftLogId> {
        id.filter(|id| id.index() >= self.first_seen())
    }

    /// Makes room for this first entry, if the log looks empty.
    async fn make_room(&mut self, first: RaftLogId) {
        let (index, id) = (first.index(), |index| {
            RaftLogId::new(*first.committed_leader_id(), index)
        });
        let state = self.store.get_log_state().await.expect("a state");
        if state.last_purged_log_id.is_some() || self.seen(state.last_log_id).is_some() {
            return;
        }
        let last = state.last_log_id.map_or(0, |id| id.index() + 1);
        if last > index {
            let keep = index.checked_sub(1).map(id);
            self.store.truncate_after(keep).await.expect("truncated");
        }
        let fill: Vec<RaftEntry> = (last..index)
            .map(|index| RaftEntry::new(id(index), EntryPayload::Blank))
            .collect();
        if !fill.is_empty() {
            self.store
                .append(fill, IOFlushed::noop())
                .await
                .expect("appended");
        }
        self.first_seen.store(index, Ordering::Relaxed);
    }
}

impl RaftLogReader<Types> for Hiding {
    async fn try_get_log_entries<R>(&mut self, range: R) -> io::Result<Vec<RaftEntry>>
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let mut entries = self.store.try_get_log_entries(range).await?;
        entries.retain(|entry| entry.log_id.index() >= self.first_seen());
        Ok(entries)
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVoteOf>> {
        self.store.read_vote().await
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> io::Result<Vec<RaftEntry>> {
        self.store.limited_get_log_entries(start, end).await
    }

    async fn entries_stream<R>(
        &mut self,
        range: R,
    ) -> impl Stream<Item = io::Result<RaftEntry>> + OptionalSend
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.store.entries_stream(range).await
    }
}

impl RaftLogStorage<Types> for Hiding {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let state = self.store.get_log_state().await?;
        let last = if state.last_purged_log_id.is_some() {
            state.last_log_id
        } else {
            self.seen(state.last_log_id)
        };
        Ok(LogState {
            last_log_id: last,
            ..state
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVoteOf) -> io::Result<()> {
        self.store.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> io::Result<()> {
        self.store.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> io::Result<Option<RaftLogId>> {
        self.store.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<RaftEntry> = entries.into_iter().collect();
        if let Some(first) = entries.first() {
            self.make_room(first.log_id).await;
        }
        self.store.append(entries, callback).await
    }

    async fn truncate_after(&mut self, last: Option<RaftLogId>) -> io::Result<()> {
        self.store.truncate_after(last).await
    }

    async fn purge(&mut self, log_id: RaftLogId) -> io::Result<()> {
        self.store.purge(log_id).await
    }
}

/// A state machine that is given the entries which the suite leaves out: ours takes no gap.
struct Contiguous(StateMachine);

impl RaftStateMachine<Types> for Contiguous {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<RaftLogId>, StoredMembership)> {
        self.0.applied_state().await
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let (last, _) = self.0.applied_state().await?;
            let next = last.map_or(0, |id| id.index() + 1);
            let id = |index| RaftLogId::new(*entry.log_id.committed_leader_id(), index);
            let blanks = (next..entry.log_id.index())
                .map(|index| Ok((RaftEntry::new(id(index), EntryPayload::Blank), None)));
            let filled: Vec<_> = blanks.chain([Ok((entry.clone(), responder))]).collect();
            self.0.apply(stream::iter(filled)).await?;
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<SnapshotBuilder> {
        self.0.try_create_snapshot_builder(force).await
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        self.0.get_snapshot_builder().await
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> io::Result<()> {
        self.0.install_snapshot(meta, snapshot).await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<SnapshotOf<Types, SnapshotData>>> {
        self.0.get_current_snapshot().await
    }
}

struct InMemory;

impl StoreBuilder<Types, Hiding, Contiguous, Guard> for InMemory {
    async fn build(&self) -> Result<(Guard, Hiding, Contiguous), StorageError<Types>> {
        let disks = Disks::new(1);
        Ok(store(
            Arc::new(disks.disk),
            Arc::new(disks.trees),
            Path::new("/"),
            None,
            false,
        ))
    }
}

struct OnDisk;

impl StoreBuilder<Types, Hiding, Contiguous, Guard> for OnDisk {
    async fn build(&self) -> Result<(Guard, Hiding, Contiguous), StorageError<Types>> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().to_owned();
        let trees = SledTrees::open(&path.join("sled"), &SledOptions::default()).expect("sled");
        Ok(store(
            Arc::new(RealDisk),
            Arc::new(trees),
            &path,
            Some(directory),
            false,
        ))
    }
}

struct OfWitness;

impl StoreBuilder<Types, Hiding, Contiguous, Guard> for OfWitness {
    async fn build(&self) -> Result<(Guard, Hiding, Contiguous), StorageError<Types>> {
        let disks = Disks::new(1);
        Ok(store(
            Arc::new(disks.disk),
            Arc::new(disks.trees),
            Path::new("/"),
            None,
            true,
        ))
    }
}

// Paused, as the suite sleeps for seconds.
#[tokio::test(start_paused = true)]
async fn openrafts_suite_holds_for_a_witness() {
    Suite::test_all(OfWitness).await.expect("the suite holds");
}

// Paused, as the suite sleeps for seconds.
#[tokio::test(start_paused = true)]
async fn openrafts_suite_holds_in_memory() {
    Suite::test_all(InMemory).await.expect("the suite holds");
}

// Paused, as the suite sleeps for seconds.
#[tokio::test(start_paused = true)]
async fn openrafts_suite_holds_on_a_disk() {
    Suite::test_all(OnDisk).await.expect("the suite holds");
}
