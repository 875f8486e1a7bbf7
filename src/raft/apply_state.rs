//! [`ApplyState`]: applies entries to what a replica keeps, and shows the rest of the replica how
//! far that is.
//!
//! Kept out: openraft, which [`StateMachine`](super::state_machine::StateMachine) adapts.
//!
//! Entries are applied strictly one after another, which is asserted.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::{MutexGuard as TurnGuard, watch};
use tokio::time::Instant;

use super::apply_progress::{ApplyProgress, ProgressRead};
use super::map_hold::MapHold;
use super::replica_store::ReplicaStore;
use super::types::{ApplyOutcome, Proposal};
use crate::mutants::{self, Mutant};
use crate::sm::cluster::meta;
use crate::sm::ports::{StoreError, WriteBatch};
use crate::sm::{kv, requests};
use crate::storage::background;
use crate::storage::map::{Applied, MapRead, ReadKind};
use crate::storage::snapshot::Snapshot;
use crate::supervisor;
use crate::types::LogId;

/// Applies entries to what a replica keeps, and shows the rest of the replica how far that is.
pub struct ApplyState {
    pub store: ReplicaStore,
    /// Publishes the index of the last applied entry.
    pub applied: watch::Sender<u64>,
    pub clock: GroupClock,
    /// Keeps entries from being applied while it is set.
    pub hold: MapHold,
    /// Locked while an entry is applied, and while a snapshot takes the place of a map that is
    /// held.
    pub turns: tokio::sync::Mutex<()>,
    /// Counts how often a snapshot took the place of this map because it differed. Changed under
    /// `turns`.
    pub rebuilt: AtomicU64,
    /// The time of the last read of the map by the entry that is being applied; None between
    /// entries.
    applying: Mutex<Option<Instant>>,
    pub(super) is_installing: AtomicBool,
    /// Term of the last applied entry.
    applied_term: AtomicU64,
    /// The reason why writes are refused, if the map says that they are.
    read_only: Mutex<Option<String>>,
    is_read_only: AtomicBool,
    failure: Mutex<Option<String>>,
}

impl ApplyState {
    /// Returns the state of a replica that has applied what its store says.
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

    /// Takes the group time and the read-only state from the map.
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

    /// Publishes how far the map is after a snapshot took its place.
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

    /// Returns how long the entry that is being applied has gone without a read of the map; None if
    /// no entry is being applied.
    pub fn applying(&self) -> Option<Duration> {
        self.applying.lock().map(|since| since.elapsed())
    }

    /// Returns true while a snapshot is being installed; openraft answers nothing else meanwhile.
    pub fn is_installing(&self) -> bool {
        self.is_installing.load(Ordering::Acquire)
    }

    /// Returns the reason why writes are refused, if the map says that they are.
    pub fn read_only(&self) -> Option<String> {
        self.read_only.lock().clone()
    }

    /// Returns true if the map says that writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only.load(Ordering::Acquire)
    }

    fn set_read_only(&self, reason: Option<String>) {
        let mut now = self.read_only.lock();
        self.is_read_only.store(reason.is_some(), Ordering::Release);
        *now = reason;
    }

    /// Returns the term of the last applied entry. Everything before that entry is in the map.
    pub fn applied_term(&self) -> u64 {
        self.applied_term.load(Ordering::Acquire)
    }

    /// Publishes that everything through this entry is applied.
    pub fn note_applied(&self, id: LogId) {
        self.applied_term.store(id.term, Ordering::Release);
        self.applied.send_replace(id.index);
    }

    /// Returns the reason why nothing more is applied, if something failed.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    /// Stops applying, for this reason. The first reason is kept.
    pub fn fail(&self, reason: String) {
        self.failure.lock().get_or_insert(reason);
    }

    /// Stops applying because of `error`, and returns it for openraft.
    pub fn fatal(&self, error: StoreError) -> io::Error {
        self.fail(error.to_string());
        io::Error::other(error)
    }

    /// Waits until the map is not held, and locks it against an exchange until the guard is
    /// dropped.
    pub async fn take_turn(&self) -> TurnGuard<'_, ()> {
        loop {
            self.hold.wait().await;
            let turn = self.turns.lock().await;
            if !self.hold.is_set() {
                return turn;
            }
        }
    }

    /// Applies an entry; on another thread if it may have to read the disk, so that it holds up
    /// nobody.
    ///
    /// A panic stops this replica and not the process with all of its others: it would recur at
    /// every replica of the group, and after each restart.
    pub async fn apply(self: &Arc<Self>, work: EntryWork) -> Result<ApplyOutcome, StoreError> {
        let id = work.applied.log_id;
        match self
            .store
            .map()
            .filter(|state| state.reads_wait(ReadKind::Entry))
        {
            Some(state) => {
                let (apply_state, map) = (self.clone(), state.clone());
                let apply = move || {
                    // Begins only here, because the entry may have waited for a thread to read on.
                    let applying = ApplyProgress::begin(&apply_state.applying);
                    // A command that can't be decoded is reported by `apply_now` below.
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
        let next = self.store.applied().log_id.map_or(0, |id| id.index + 1);
        assert_eq!(work.index, next, "entries are applied without a gap");

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

        // Taken now, because deciding consumes the command.
        let notes = command.notes_digest();
        let read_only = command.read_only();
        let (outcome, mut batch) = state.read_here(|read| command.decide(read, &work, applying))?;
        if self.store.key().replica.0 % 2 == 1 && mutants::is_on(Mutant::ApplyDiffersBetweenBuilds)
        {
            let mut others = WriteBatch::default();
            for (key, value) in batch {
                if let Some(value) = value {
                    others.put(key, value);
                }
            }
            batch = others;
        }

        // Asked for before the entry is applied, so that the digest is taken right after it.
        if let Some(log_id) = work.applied.log_id.filter(|_| notes) {
            state.want_digest(log_id);
        }
        state.apply(batch, work.applied)?;

        // Only once the map says so: a failed apply must not open the group for writes.
        if let Some(reason) = read_only {
            self.set_read_only(reason);
        }
        if notes {
            state.write_down();
        }
        Ok(outcome)
    }

    /// Replaces the map with a snapshot. The caller has locked `turns`. Blocking.
    ///
    /// The exchange is counted at once, and whoever applies the next entry looks at the count,
    /// because a hold may begin and end without being seen.
    pub fn exchange_map(&self, snapshot: &Snapshot) -> Result<(), String> {
        let state = self.store.map().ok_or("a witness has no map")?;
        let filled = background::run("fill-map", || state.install(snapshot));
        filled
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
        self.rebuilt.fetch_add(1, Ordering::Release);
        self.follow_map().map_err(|error| error.to_string())?;

        if let Err(error) = state.tidy() {
            tracing::warn!(replica = %state.key(), %error, "an old map stays until the next start");
        }
        Ok(())
    }
}

/// Turns a panic of `apply` into a failure of the replica.
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

/// An entry to be applied, and what applying it needs to know.
pub struct EntryWork {
    pub index: u64,
    /// The state of the map once it is applied.
    pub applied: Applied,
    /// None for entries that do not change the map.
    pub proposal: Option<Proposal>,
    pub is_meta: bool,
    pub audience: kv::Audience,
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

/// A decoded command of either kind of group.
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

    /// Returns true if the digest of the map is to be recorded after it.
    fn notes_digest(&self) -> bool {
        matches!(self, GroupCommand::Shard(kv::KvCommand::Compare))
    }

    /// Returns the new read-only reason if the command sets or clears one.
    fn read_only(&self) -> Option<Option<String>> {
        match self {
            GroupCommand::Shard(kv::KvCommand::SetReadOnly { reason }) => Some(reason.clone()),
            GroupCommand::Shard(_) | GroupCommand::Meta(_) => None,
        }
    }

    /// Returns its outcome and the changes that it makes to the map.
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

/// Keeps the group time in milliseconds: that of the last applied entry, plus the time that has
/// passed here since. Reads no wall clock; the time stands still while every replica is down.
pub struct GroupClock(Mutex<(u64, Instant)>);

impl GroupClock {
    fn new() -> Self {
        Self(Mutex::new((0, Instant::now())))
    }

    /// Returns the group time.
    pub fn now_ms(&self) -> u64 {
        if mutants::is_on(Mutant::GroupTimeByWallClock) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            return now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        }
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
