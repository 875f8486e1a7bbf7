//! [`StateMachine`]: the map of a replica as openraft sees it. Decodes entries, applies them by the
//! core, and answers. That of a witness notes only how far it is, and the membership.
//!
//! Each entry is applied on its own: its changes, its log id and the membership go into the map in
//! one step, and the next entry sees them. Openraft holds the answers until the whole stream is
//! read; here each goes out as soon as its entry is applied. While what entries change must be read
//! from the disk, they are applied on threads that hold up nobody else.
//!
//! An error is final: the replica has met a broken disk or an entry that it can't decode, and going
//! on would make replicas differ.

use parking_lot::Mutex;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::type_config::alias::SnapshotOf;
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::{MutexGuard as TurnGuard, watch};
use tokio::time::Instant;

use super::election::step_down::{ApplyProgress, ProgressRead};
use super::rebuild::MapHold;
use super::types::{
    ApplyOutcome, Proposal, RaftLogId, RaftPayload, SnapshotMeta, StoredMembership, Types,
    decode_stored_membership, encode_stored_membership, from_raft, to_raft,
};
use super::witness::WitnessState;
use crate::sm::ports::{StoreError, WriteBatch};
use crate::sm::{kv, meta, requests};
use crate::storage::ReplicaKey;
use crate::storage::background;
use crate::storage::snapshot::Snapshot;
use crate::storage::state::{Applied, MapRead, ReadKind, ReplicaMap};
use crate::supervisor;
use crate::types::LogId;

/// After this many entries others get a turn on the thread: an entry holds up to a few hundred
/// writes.
const ENTRIES_PER_TURN: usize = 8;

/// What a replica keeps of what it applies.
pub enum ReplicaStore {
    Map(ReplicaMap),
    /// Nothing but how far it is.
    Witness(WitnessState),
}

impl ReplicaStore {
    fn key(&self) -> ReplicaKey {
        match self {
            ReplicaStore::Map(state) => state.key(),
            ReplicaStore::Witness(state) => state.key(),
        }
    }

    pub fn applied(&self) -> Applied {
        match self {
            ReplicaStore::Map(state) => state.applied(),
            ReplicaStore::Witness(state) => state.applied(),
        }
    }

    pub fn map(&self) -> Option<&ReplicaMap> {
        match self {
            ReplicaStore::Map(state) => Some(state),
            ReplicaStore::Witness(_) => None,
        }
    }

    pub fn witness(&self) -> Option<&WitnessState> {
        match self {
            ReplicaStore::Map(_) => None,
            ReplicaStore::Witness(state) => Some(state),
        }
    }
}

/// What replicas give each other in place of a log.
#[derive(Debug, Clone)]
pub enum SnapshotData {
    Map(Snapshot),
    /// Of a witness, or for one: it holds no data.
    Watermark(Applied),
}

/// What the rest of a group sees of its state machine.
pub struct ApplyState {
    pub store: ReplicaStore,
    /// Index of the last applied entry.
    pub applied: watch::Sender<u64>,
    pub clock: GroupClock,
    /// Nothing is applied while it is set.
    pub hold: MapHold,
    /// HoldState while an entry is applied, and while another map takes the place of one that is
    /// held.
    pub turns: tokio::sync::Mutex<()>,
    /// How often another map took the place of this one's, which differed. Changed with the turn.
    pub rebuilt: AtomicU64,
    /// Since when an entry is being applied and has read nothing more of the map.
    applying: Mutex<Option<Instant>>,
    is_installing: AtomicBool,
    /// The term of the last applied entry.
    applied_term: AtomicU64,
    /// Why nothing is written, as the map says.
    read_only: Mutex<Option<String>>,
    is_read_only: AtomicBool,
    failure: Mutex<Option<String>>,
}

impl ApplyState {
    pub fn new(store: ReplicaStore) -> Result<Self, StoreError> {
        let applied = store.applied().log_id;
        let apply_state = Self {
            store,
            applied: watch::Sender::new(applied.map_or(0, |id| id.index)),
            clock: GroupClock::new(),
            hold: MapHold::default(),
            turns: tokio::sync::Mutex::default(),
            rebuilt: AtomicU64::new(0),
            applying: Mutex::new(None),
            is_installing: AtomicBool::new(false),
            applied_term: AtomicU64::new(applied.map_or(0, |id| id.term)),
            read_only: Mutex::default(),
            is_read_only: AtomicBool::new(false),
            failure: Mutex::new(None),
        };
        apply_state.read_map()?;
        Ok(apply_state)
    }

    /// The map knows the time of the last entry, and whether anything is written.
    pub fn read_map(&self) -> Result<(), StoreError> {
        if let Some(state) = self
            .store
            .map()
            .filter(|state| !state.key().group.is_meta())
        {
            self.clock.observe(requests::group_time_ms(&state.read())?);
            self.set_read_only(kv::read_only(&state.read())?);
        }
        Ok(())
    }

    /// Tells what the map says that was put in the place of another.
    pub fn follow_map(&self) -> Result<(), StoreError> {
        self.read_map()?;
        let Some(id) = self.store.applied().log_id else {
            return Ok(());
        };
        self.applied_term.fetch_max(id.term, Ordering::AcqRel);
        self.applied.send_if_modified(|index| {
            let is_further = id.index > *index;
            *index = id.index.max(*index);
            is_further
        });
        Ok(())
    }

    /// Returns for how long one entry has been applied that is not done, since its last read of the
    /// map.
    pub fn applying(&self) -> Option<Duration> {
        self.applying.lock().map(|since| since.elapsed())
    }

    /// Returns whether a snapshot is being installed: openraft answers nothing that comes after it.
    pub fn is_installing(&self) -> bool {
        self.is_installing.load(Ordering::Acquire)
    }

    /// Returns why nothing is written, as the map says.
    pub fn read_only(&self) -> Option<String> {
        self.read_only.lock().clone()
    }

    pub fn is_read_only(&self) -> bool {
        self.is_read_only.load(Ordering::Acquire)
    }

    fn set_read_only(&self, reason: Option<String>) {
        let mut now = self.read_only.lock();
        self.is_read_only.store(reason.is_some(), Ordering::Release);
        *now = reason;
    }

    /// Returns the term of the last applied entry: what came before it is in the map.
    pub fn applied_term(&self) -> u64 {
        self.applied_term.load(Ordering::Acquire)
    }

    /// Tells that all through this entry is applied.
    fn note_applied(&self, id: LogId) {
        self.applied_term.store(id.term, Ordering::Release);
        self.applied.send_replace(id.index);
    }

    /// Why nothing more is applied.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    /// ReplicaStore the first reason.
    pub fn fail(&self, reason: String) {
        self.failure.lock().get_or_insert(reason);
    }

    fn fatal(&self, error: StoreError) -> io::Error {
        self.fail(error.to_string());
        io::Error::other(error)
    }

    /// Waits until the map is not held, and keeps it from being exchanged until the turn is given
    /// back.
    async fn take_turn(&self) -> TurnGuard<'_, ()> {
        loop {
            self.hold.wait().await;
            let turn = self.turns.lock().await;
            if !self.hold.is_set() {
                return turn;
            }
        }
    }

    /// Applies an entry: where it holds up nobody, if what it changes may have to be read from the
    /// disk.
    ///
    /// One that panics would do so at every replica of the group, and again after each start: so it
    /// stops this replica, like one that can't be decoded, and not the process with all its others.
    async fn apply(self: &Arc<Self>, work: EntryWork) -> Result<ApplyOutcome, StoreError> {
        let id = work.applied.log_id;
        match self
            .store
            .map()
            .filter(|state| state.reads_wait(ReadKind::Entry))
        {
            Some(state) => {
                let (apply_state, map) = (self.clone(), state.clone());
                let apply = move || {
                    // It has begun only now: threads to read on may have been waited for.
                    let applying = ApplyProgress::begin(&apply_state.applying);
                    // What can't be decoded is told below.
                    if let Ok(Some(command)) = work.command() {
                        map.preview(|read| command.clone().decide(read, &work, &applying));
                    }
                    apply_state.apply_now(work, &applying)
                };
                state
                    .elsewhere(ReadKind::Entry, move || guarded(id, apply))
                    .await
            }
            None => guarded(id, || {
                self.apply_now(work, &ApplyProgress::begin(&self.applying))
            }),
        }
    }

    fn apply_now(
        &self,
        work: EntryWork,
        applying: &ApplyProgress<'_>,
    ) -> Result<ApplyOutcome, StoreError> {
        let state = match &self.store {
            ReplicaStore::Map(state) => state,
            ReplicaStore::Witness(witness) => {
                witness.apply(work.applied);
                return Ok(ApplyOutcome::Nothing);
            }
        };
        let Some(command) = work.command()? else {
            state.apply(Default::default(), work.applied)?;
            return Ok(ApplyOutcome::Nothing);
        };

        if let Some(time_ms) = command.time_ms() {
            self.clock.observe(time_ms);
        }
        let notes = command.notes_digest();
        let read_only = command.read_only();
        let (outcome, batch) = state.read_here(|read| command.decide(read, &work, applying))?;
        if let Some(log_id) = work.applied.log_id.filter(|_| notes) {
            state.want_digest(log_id);
        }
        state.apply(batch, work.applied)?;
        if let Some(reason) = read_only {
            self.set_read_only(reason);
        }
        if notes {
            state.write_down();
        }
        Ok(outcome)
    }
}

/// Makes a failure of the replica of a panic.
fn guarded(
    id: Option<crate::types::LogId>,
    apply: impl FnOnce() -> Result<ApplyOutcome, StoreError>,
) -> Result<ApplyOutcome, StoreError> {
    catch_unwind(AssertUnwindSafe(apply)).unwrap_or_else(|panic| {
        let id = id.map(|id| id.to_string()).unwrap_or_default();
        let reason = format!(
            "applying entry {id} panicked: {}",
            supervisor::message(&*panic)
        );
        Err(StoreError::Damaged(reason))
    })
}

/// For as long as it lives a snapshot is being installed.
struct InstallGuard(Arc<ApplyState>);

impl InstallGuard {
    fn begin(apply_state: Arc<ApplyState>) -> Self {
        apply_state.is_installing.store(true, Ordering::Release);
        Self(apply_state)
    }
}

impl Drop for InstallGuard {
    fn drop(&mut self) {
        self.0.is_installing.store(false, Ordering::Release);
    }
}

/// An entry that is to be applied.
struct EntryWork {
    index: u64,
    /// How far the map is with it.
    applied: Applied,
    /// None: it says nothing to the map.
    proposal: Option<Proposal>,
    is_meta: bool,
    audience: kv::Audience,
}

impl EntryWork {
    fn command(&self) -> Result<Option<GroupCommand>, StoreError> {
        let Some(Proposal(bytes)) = &self.proposal else {
            return Ok(None);
        };
        Ok(Some(match self.is_meta {
            true => GroupCommand::Meta(meta::MetaCommand::decode(bytes)?),
            false => GroupCommand::Shard(kv::KvCommand::decode(bytes)?),
        }))
    }
}

/// What an entry says to the map.
#[derive(Clone)]
enum GroupCommand {
    Meta(meta::MetaCommand),
    Shard(kv::KvCommand),
}

impl GroupCommand {
    fn time_ms(&self) -> Option<u64> {
        match self {
            GroupCommand::Meta(_) => None,
            GroupCommand::Shard(command) => command.time_ms(),
        }
    }

    /// Returns whether the digest of the map is to be noted after it.
    fn notes_digest(&self) -> bool {
        matches!(self, GroupCommand::Shard(kv::KvCommand::Compare))
    }

    /// Returns whether it is said that nothing is written any more, and why, or that it is again.
    fn read_only(&self) -> Option<Option<String>> {
        match self {
            GroupCommand::Shard(kv::KvCommand::SetReadOnly { reason }) => Some(reason.clone()),
            GroupCommand::Shard(_) | GroupCommand::Meta(_) => None,
        }
    }

    /// Returns its outcome, and what it changes in the map.
    fn decide(
        self,
        read: &MapRead<'_>,
        work: &EntryWork,
        applying: &ApplyProgress<'_>,
    ) -> Result<(ApplyOutcome, WriteBatch), StoreError> {
        let read = &ProgressRead { read, applying };
        match self {
            GroupCommand::Meta(command) => {
                let (outcome, batch) = meta::apply(read, work.index, command)?;
                Ok((ApplyOutcome::Meta(outcome), batch))
            }
            GroupCommand::Shard(command) => {
                let (outcome, batch) = kv::apply_for(read, work.index, command, work.audience)?;
                Ok((ApplyOutcome::Shard(outcome), batch))
            }
        }
    }
}

/// Group time in milliseconds: that of the last applied entry plus what has passed here since. No
/// wall clock is read; while every replica is down it stands still.
pub struct GroupClock(Mutex<(u64, Instant)>);

impl GroupClock {
    fn new() -> Self {
        Self(Mutex::new((0, Instant::now())))
    }

    pub fn now_ms(&self) -> u64 {
        let (time_ms, at) = *self.0.lock();
        time_ms + u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX - time_ms)
    }

    fn observe(&self, time_ms: u64) {
        let mut last = self.0.lock();
        if time_ms > last.0 {
            *last = (time_ms, Instant::now());
        }
    }
}

/// Owned by openraft's worker; clones share the machine.
#[derive(Clone)]
pub struct StateMachine {
    apply_state: Arc<ApplyState>,
    is_meta: bool,
    /// Kept encoded as it is written with every entry.
    membership: bytes::Bytes,
    /// How often the map was another since, of what [`ApplyState::rebuilt`] counts.
    rebuilt_seen: u64,
    /// The last entry that is in a map which took the place of another.
    rebuilt_upto: Option<u64>,
}

impl StateMachine {
    pub fn new(apply_state: Arc<ApplyState>) -> Self {
        let membership = apply_state.store.applied().membership;
        let is_meta = apply_state.store.key().group.is_meta();
        let rebuilt_seen = apply_state.rebuilt.load(Ordering::Acquire);
        Self {
            apply_state,
            is_meta,
            membership,
            rebuilt_seen,
            rebuilt_upto: None,
        }
    }

    /// Makes of an entry what is to be done with the map.
    fn work(&mut self, id: RaftLogId, payload: RaftPayload, audience: kv::Audience) -> EntryWork {
        let proposal = match payload {
            EntryPayload::Normal(proposal) => Some(proposal),
            EntryPayload::Blank => None,
            EntryPayload::Membership(membership) => {
                let membership = StoredMembership::new(Some(id), membership);
                self.membership = encode_stored_membership(&membership);
                None
            }
        };
        let applied = Applied {
            log_id: Some(from_raft(&id)),
            membership: self.membership.clone(),
        };
        EntryWork {
            index: id.index(),
            applied,
            proposal,
            is_meta: self.is_meta,
            audience,
        }
    }

    /// Goes on from the map that was put in the place of the one that was held.
    fn take_over_map(&mut self) -> io::Result<()> {
        let applied = self.apply_state.store.applied();
        self.membership = applied.membership;
        self.rebuilt_upto = applied.log_id.map(|id| id.index);
        self.apply_state
            .follow_map()
            .map_err(|error| self.apply_state.fatal(error))
    }

    /// Returns whether an entry has its effects in the map already: it is in one that was put in
    /// the place of another.
    fn is_in_map(&self, index: u64) -> bool {
        self.rebuilt_upto.is_some_and(|upto| index <= upto)
    }

    fn builder(&self, made: Option<SnapshotData>) -> SnapshotBuilder {
        SnapshotBuilder {
            apply_state: self.apply_state.clone(),
            made,
        }
    }
}

impl RaftStateMachine<Types> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<RaftLogId>, StoredMembership)> {
        let applied = self.apply_state.store.applied();
        let membership = decode_stored_membership(&applied.membership).map_err(io::Error::other)?;
        Ok((applied.log_id.map(to_raft), membership))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        let mut in_turn = 0;
        while let Some((entry, responder)) = entries.try_next().await? {
            if let (0, Some(state)) = (in_turn, self.apply_state.store.map()) {
                state.wait_room().await;
            }
            let apply_state = self.apply_state.clone();
            let turn = apply_state.take_turn().await;
            let rebuilt = apply_state.rebuilt.load(Ordering::Acquire);
            if rebuilt != self.rebuilt_seen {
                self.take_over_map()?;
                self.rebuilt_seen = rebuilt;
            }
            let (entry_id, index) = (entry.log_id, entry.log_id.index());
            if self.is_in_map(index) {
                if let Some(responder) = responder {
                    responder.send(ApplyOutcome::Nothing);
                }
                continue;
            }
            let audience = if responder.is_some() {
                kv::Audience::Caller
            } else {
                kv::Audience::Nobody
            };
            let work = self.work(entry.log_id, entry.payload, audience);
            let outcome = apply_state
                .apply(work)
                .await
                .map_err(|error| apply_state.fatal(error))?;
            drop(turn);
            self.apply_state.note_applied(from_raft(&entry_id));
            if let Some(responder) = responder {
                responder.send(outcome);
            }
            in_turn += 1;
            if in_turn == ENTRIES_PER_TURN {
                in_turn = 0;
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Openraft is given the snapshot that `Replica::build_snapshot` has made: building is ours to
    /// decide, and an error of it must not stop the group.
    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<SnapshotBuilder> {
        let made = if force {
            None
        } else {
            current(&self.apply_state.store)
        };
        (force || made.is_some()).then(|| self.builder(made))
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        self.builder(None)
    }

    /// Openraft answers nobody until it is done: what takes long was done before, by
    /// `snapshots::install`.
    async fn install_snapshot(
        &mut self,
        _meta: &SnapshotMeta,
        data: SnapshotData,
    ) -> io::Result<()> {
        let _installing = InstallGuard::begin(self.apply_state.clone());
        let apply_state = self.apply_state.clone();
        let installed = tokio::task::spawn_blocking(move || match (&apply_state.store, &data) {
            (ReplicaStore::Map(state), SnapshotData::Map(snapshot)) => {
                let filled = background::run("fill-map", || state.install(snapshot));
                filled.unwrap_or_else(|source| {
                    Err(StoreError::Io {
                        context: "installing a snapshot".into(),
                        source,
                    })
                })
            }
            (ReplicaStore::Witness(state), SnapshotData::Watermark(applied)) => {
                state.install(applied)
            }
            (ReplicaStore::Map(_), SnapshotData::Watermark(_))
            | (ReplicaStore::Witness(_), SnapshotData::Map(_)) => Err(StoreError::Damaged(
                "a snapshot for another kind of replica was to be installed".into(),
            )),
        });
        installed
            .await
            .map_err(io::Error::other)?
            .map_err(|error| self.apply_state.fatal(error))?;
        let applied = self.apply_state.store.applied();
        self.membership = applied.membership;
        self.apply_state
            .read_map()
            .map_err(|error| self.apply_state.fatal(error))?;
        if let Some(id) = applied.log_id {
            self.apply_state.note_applied(id);
        }
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<SnapshotOf<Types, SnapshotData>>> {
        current(&self.apply_state.store).map(with_meta).transpose()
    }
}

/// What there is in place of the beginning of the log, if it is durable.
fn current(store: &ReplicaStore) -> Option<SnapshotData> {
    match store {
        ReplicaStore::Map(state) => state.current_snapshot().map(SnapshotData::Map),
        ReplicaStore::Witness(state) => Some(state.watermark())
            .filter(|watermark| watermark.log_id.is_some())
            .map(SnapshotData::Watermark),
    }
}

/// Hands openraft a snapshot.
pub struct SnapshotBuilder {
    apply_state: Arc<ApplyState>,
    made: Option<SnapshotData>,
}

impl RaftSnapshotBuilder<Types> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<Types, SnapshotData>> {
        let data = match (self.made.take(), &self.apply_state.store) {
            (Some(made), _) => made,
            (None, ReplicaStore::Map(state)) => {
                SnapshotData::Map(build(state).await.map_err(io::Error::other)?)
            }
            (None, ReplicaStore::Witness(_)) => SnapshotData::Watermark(
                write_watermark(&self.apply_state)
                    .await
                    .map_err(io::Error::other)?,
            ),
        };
        with_meta(data)
    }
}

/// Writes a snapshot file of all that is applied.
pub async fn build(state: &ReplicaMap) -> Result<Snapshot, StoreError> {
    state.settle().await;
    let state = state.clone();
    let built = tokio::task::spawn_blocking(move || state.build_snapshot()).await;
    built.map_err(|error| StoreError::Io {
        context: "building a snapshot".into(),
        source: io::Error::other(error),
    })?
}

/// Has the file of a witness say what it has applied, once its log holds that durably: else a power
/// cut could leave a file that claims entries which the log has lost.
pub async fn write_watermark(apply_state: &Arc<ApplyState>) -> Result<Applied, StoreError> {
    let applied = match &apply_state.store {
        ReplicaStore::Witness(state) => state.settled().await?,
        ReplicaStore::Map(state) => {
            return Err(StoreError::Damaged(format!(
                "{} is no witness",
                state.key()
            )));
        }
    };
    let apply_state = apply_state.clone();
    let watermark = tokio::task::spawn_blocking(move || match &apply_state.store {
        ReplicaStore::Witness(state) => state.write_watermark(&applied).map(|()| state.watermark()),
        ReplicaStore::Map(_) => Ok(applied),
    });
    watermark.await.map_err(|error| StoreError::Io {
        context: "marking a witness".into(),
        source: io::Error::other(error),
    })?
}

/// A snapshot with what openraft wants to know of it.
pub fn with_meta(data: SnapshotData) -> io::Result<SnapshotOf<Types, SnapshotData>> {
    let applied = match &data {
        SnapshotData::Map(snapshot) => snapshot.applied(),
        SnapshotData::Watermark(applied) => applied,
    };
    let last_membership =
        decode_stored_membership(&applied.membership).map_err(io::Error::other)?;
    let meta = SnapshotMeta {
        last_log_id: applied.log_id.map(to_raft),
        last_membership,
    };
    Ok(SnapshotOf::<Types, SnapshotData> {
        meta,
        snapshot: data,
    })
}
