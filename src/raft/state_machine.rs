//! [`StateMachine`]: a replica's map as openraft sees it. Hands entries to [`ApplyState`], and
//! answers their callers. The state machine of a witness records only how far it is, and the
//! membership.
//!
//! Each entry is applied by itself: its changes, its log id and the membership go into the map in
//! one step, and the next entry sees them. openraft would hold the answers until the whole stream
//! is read; here each goes out as soon as its entry is applied. While entries have to read the
//! disk, they are applied on threads that hold up nobody else.
//!
//! An error is final: the replica has met a broken disk or an entry that it can't decode, and going
//! on would make replicas differ.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::type_config::alias::SnapshotOf;
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};

use super::apply_state::{ApplyState, EntryWork};
use super::replica_store::{ReplicaStore, SnapshotData};
use super::types::{
    ApplyOutcome, RaftLogId, RaftPayload, SnapshotMeta, StoredMembership, Types,
    decode_stored_membership, encode_stored_membership, from_raft, to_raft,
};
use crate::blocking;
use crate::sm::kv;
use crate::sm::ports::StoreError;
use crate::storage::background;
use crate::storage::map::{Applied, ReplicaMap};
use crate::storage::snapshot::Snapshot;

/// openraft over our log, network and state machine.
pub type RaftHandle = openraft::Raft<Types, StateMachine>;

/// Entries that are applied before other tasks get a turn on the thread; an entry holds up to a few
/// hundred writes.
const ENTRIES_PER_TURN: usize = 8;

/// Marks that a snapshot is being installed, until it is dropped.
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

/// The state machine as openraft's worker owns it. Clones share the [`ApplyState`].
#[derive(Clone)]
pub struct StateMachine {
    apply_state: Arc<ApplyState>,
    is_meta: bool,
    /// Kept encoded, because it is written with every entry.
    membership: bytes::Bytes,
    /// The count of [`ApplyState::rebuilt`] that was seen last.
    rebuilt_seen: u64,
    /// The last entry that is in a map which took the place of this one.
    rebuilt_upto: Option<u64>,
}

impl StateMachine {
    /// Returns the state machine over `apply_state`.
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

    /// Returns what has to be done with the map for an entry.
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

    /// Goes on from the map that took the place of the one that was held.
    fn take_over_map(&mut self) -> io::Result<()> {
        let applied = self.apply_state.store.applied();
        self.membership = applied.membership;
        self.rebuilt_upto = applied.log_id.map(|id| id.index);
        self.apply_state
            .follow_map()
            .map_err(|error| self.apply_state.fatal(error))
    }

    /// Returns true if the map has the effects of an entry already, because it took the place of
    /// another.
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
            // Memtables that wait for the disk are bounded, so entries wait here before they add to
            // them.
            if let (0, Some(state)) = (in_turn, self.apply_state.store.map()) {
                state.wait_room().await;
            }

            let apply_state = self.apply_state.clone();
            let turn = apply_state.take_turn().await;

            // Another map may have taken the place of this one since the last entry.
            let rebuilt = apply_state.rebuilt.load(Ordering::Acquire);
            if rebuilt != self.rebuilt_seen {
                self.take_over_map()?;
                self.rebuilt_seen = rebuilt;
            }

            let (entry_id, index) = (entry.log_id, entry.log_id.index());

            // Its effects are in the map that took the place of this one.
            if self.is_in_map(index) {
                if let Some(responder) = responder {
                    responder.send(ApplyOutcome::Nothing);
                }
                continue;
            }

            // Nobody reads the outcome of an entry that was proposed elsewhere, so the core need
            // not build it.
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

    /// Gives openraft the snapshot that `Replica::build_snapshot` has made: the node decides when
    /// to build one, and a failure must not stop the group.
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

    /// Installs a snapshot. openraft answers nobody until this is done, so what takes long was done
    /// before, by `snapshots::install`.
    async fn install_snapshot(
        &mut self,
        _meta: &SnapshotMeta,
        data: SnapshotData,
    ) -> io::Result<()> {
        let _installing = InstallGuard::begin(self.apply_state.clone());

        let apply_state = self.apply_state.clone();
        let installed = blocking::start(move || match (&apply_state.store, &data) {
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

        // What was remembered of the old map no longer holds.
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

/// Returns what is durable in place of the beginning of the log.
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
    let built = blocking::start(move || state.build_snapshot()).await;
    built.map_err(|error| StoreError::Io {
        context: "building a snapshot".into(),
        source: io::Error::other(error),
    })?
}

/// Writes what a witness has applied to its file, once the log holds that durably: otherwise a
/// power cut could leave a file that claims entries which the log has lost.
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
    let watermark = blocking::start(move || match &apply_state.store {
        ReplicaStore::Witness(state) => state.write_watermark(&applied).map(|()| state.watermark()),
        ReplicaStore::Map(_) => Ok(applied),
    });
    watermark.await.map_err(|error| StoreError::Io {
        context: "marking a witness".into(),
        source: io::Error::other(error),
    })?
}

/// Returns a snapshot with the metadata that openraft needs.
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
