//! Witnesses: replicas that vote and keep the log, and have no map. A group of two replicas with a
//! witness survives the loss of any one of the three.
//!
//! What holds, so that a witness may vote for entries that it could never serve:
//! - It is in a group only while it has, or a majority of the replicas with a map has, every entry
//!   that one of those may lack: it becomes a voter, and others become voters beside it, only when
//!   each replica with a map has all that is committed (`sm::membership`), and it purges only what
//!   each has durably ([`Replica::tell_witnesses`] says how far that is).
//! - It never sends a snapshot, having none: a replica that lacks what the witness no longer has
//!   must be brought up to date by another that has a map, and refuses a witness's snapshot. A
//!   witness that lacks what its leader no longer has is told how far that is, and what the
//!   membership was; that is its snapshot.
//! - When it leads, which it does only when no other voter can (see
//!   [`ElectionTimer`](super::pulse::ElectionTimer)), it takes no requests, changes nothing, brings the others up
//!   to date and hands over to the first that is ([`hand_over_soon`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::group::Replica;
use super::status::{ReplicaStatus, Role};
use super::wire::Request;
use crate::sm::ports::StoreError;
use crate::storage::state::{Applied, Synced};
use crate::storage::witness::WitnessFiles;
use crate::storage::{Checked, ReplicaKey};
use crate::types::ReplicaId;

/// Between two looks of a witness that leads at whether another is up to date.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// How long another is given to take over.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a witness is given to answer what it is told.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);
/// Less than this is not worth writing the file anew for.
const PURGE_BYTES_MIN: u64 = 4 << 20;

/// What a witness has instead of a map.
pub struct WitnessState {
    key: ReplicaKey,
    files: WitnessFiles,
    synced: Arc<dyn Synced>,
    applied: Mutex<Applied>,
    /// What its file says.
    marked: Mutex<Applied>,
    /// Through where it need not keep the log.
    held: AtomicU64,
}

impl WitnessState {
    /// A witness as its file says, from which openraft goes on. `synced` is the log of the same
    /// replica.
    pub fn new(
        key: ReplicaKey,
        files: WitnessFiles,
        synced: Arc<dyn Synced>,
        marked: Applied,
    ) -> Self {
        Self {
            key,
            files,
            synced,
            applied: Mutex::new(marked.clone()),
            marked: Mutex::new(marked),
            held: AtomicU64::new(0),
        }
    }

    pub fn key(&self) -> ReplicaKey {
        self.key
    }

    pub fn applied(&self) -> Applied {
        self.applied.lock().expect("no holder panics").clone()
    }

    pub fn marked(&self) -> Applied {
        self.marked.lock().expect("no holder panics").clone()
    }

    /// Moves on. In memory: the log makes it durable.
    pub fn apply(&self, applied: Applied) {
        *self.applied.lock().expect("no holder panics") = applied;
    }

    /// What is applied, once the log holds it durably.
    pub async fn settled(&self) -> Result<Applied, StoreError> {
        let applied = self.applied();
        let Some(log_id) = applied.log_id else {
            return Ok(applied);
        };
        let (done, synced) = oneshot::channel();
        self.synced
            .on_synced(log_id, Box::new(move |result| drop(done.send(result))));
        let failed = |source| StoreError::Io {
            context: "waiting for the log of a witness".into(),
            source,
        };
        synced
            .await
            .map_err(|_| failed(std::io::Error::other("it was closed")))?
            .map_err(failed)?;
        Ok(applied)
    }

    /// Has the file say this, unless it says something newer. The log must be synced through it, or
    /// begin after it. Blocking.
    pub fn mark(&self, applied: &Applied) -> Result<(), StoreError> {
        let mut marked = self.marked.lock().expect("no holder panics");
        if marked.log_id < applied.log_id {
            self.files.write(self.key, applied)?;
            *marked = applied.clone();
        }
        Ok(())
    }

    /// Reads the file again, and compares it with what it should say. Blocking.
    pub(super) fn check_file(&self) -> Checked {
        let marked = self.marked.lock().expect("no holder panics");
        match self.files.read(self.key) {
            Ok(Some(found)) if found == *marked => Checked::Whole,
            Ok(found) => Checked::Damaged(format!(
                "the file of witness {} says {found:?}, not {:?}",
                self.key, *marked
            )),
            // Not of the file: the process may have no descriptor for it.
            Err(StoreError::Io { .. }) => Checked::Unread,
            Err(error) => Checked::Damaged(format!("witness {}: {error}", self.key)),
        }
    }

    /// Has the file say again what it says. Blocking.
    pub(super) fn rewrite_file(&self) -> Result<(), StoreError> {
        let marked = self.marked.lock().expect("no holder panics");
        self.files.write(self.key, &marked)
    }

    /// Goes on from what a leader told, with nothing of the log before it. Durable when it returns.
    /// Blocking.
    pub fn install(&self, applied: &Applied) -> Result<(), StoreError> {
        self.mark(applied)?;
        self.apply(applied.clone());
        Ok(())
    }

    /// Every replica with a map has the entries through `index` durably, and they are committed.
    pub fn note_held(&self, index: u64) {
        self.held.fetch_max(index, Ordering::Relaxed);
    }

    fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }
}

/// A witness of this node.
#[derive(Clone)]
pub struct Witness(pub(super) Arc<Replica>);

impl Witness {
    pub fn key(&self) -> ReplicaKey {
        self.0.key()
    }

    pub fn status(&self) -> ReplicaStatus {
        self.0.status()
    }

    /// Bytes of the log that it keeps: many, when a replica with a map has been away for long.
    pub fn log_bytes(&self) -> u64 {
        self.0
            .log
            .bytes_since(self.0.log.state().purged.map_or(0, |id| id.index))
    }

    /// Takes one step towards purging what it need not keep: first its file must say that that was
    /// applied. `is_pressed`: also if it is little. Something that is no voter keeps everything: it
    /// is measured by its log's beginning whether it may become one.
    pub async fn let_go(&self, is_pressed: bool) -> Result<(), StoreError> {
        let group = &self.0;
        let Some(state) = group.machine.keeps.witness() else {
            return Ok(());
        };
        let status = group.status();
        let is_voter = group
            .watch
            .borrow()
            .committed_membership
            .voters
            .contains_key(&self.key().replica);
        let upto = state.held().min(status.applied.map_or(0, |id| id.index));
        let purged = status.purged.map_or(0, |id| id.index);
        let freed = group
            .log
            .bytes_since(purged)
            .saturating_sub(group.log.bytes_since(upto));
        if !is_voter || upto <= purged || !(is_pressed || freed >= PURGE_BYTES_MIN) {
            return Ok(());
        }
        if status.snapshot.is_none_or(|marked| marked.index < upto) {
            super::state_machine::mark(&group.machine).await?;
            // It takes the file that was just written.
            let _ = group.raft.trigger().snapshot().await;
            return Ok(());
        }
        group.purge_log(upto).await;
        Ok(())
    }
}

impl Replica {
    /// Tells the witnesses of the group how much of the log every replica with a map has durably,
    /// so that they need not keep it. Does nothing unless this replica leads and there is something
    /// new to tell. Whoever is not told now is told later.
    pub async fn tell_witnesses(&self) {
        if self.is_witness() || self.watch.borrow().membership.witnesses.is_empty() || !self.leads()
        {
            return;
        }
        let status = self.status();
        let Some(upto) = status
            .held_by_all()
            .filter(|upto| *upto > self.told.load(Ordering::Relaxed))
        else {
            return;
        };
        let members = status
            .membership
            .voters
            .iter()
            .chain(&status.membership.learners);
        let witnesses = members.filter(|(replica, _)| status.membership.is_witness(**replica));
        let told = witnesses.map(|(replica, node)| {
            let client = self.network.log_client(*replica, *node);
            async move {
                client
                    .ask(
                        &Request::Held { index: upto },
                        &[],
                        Instant::now() + TELL_TIMEOUT,
                    )
                    .await
            }
        });
        match join_all(told).await.into_iter().find_map(Result::err) {
            None => self.told.store(upto, Ordering::Relaxed),
            Some(error) => {
                tracing::debug!(group = %self.key().group, %error, "a witness was not told what it \
                    need not keep");
            }
        }
    }

    /// The voter with a map that has all of the log of this replica, if it leads.
    fn heir(&self) -> Option<ReplicaId> {
        let status = self.status();
        let last = status.last_log;
        let is_heir = |replica: &ReplicaId| {
            !status.membership.is_witness(*replica)
                && status
                    .matched
                    .get(replica)
                    .is_some_and(|matched| *matched == last)
        };
        let mut voters = status
            .membership
            .voters
            .keys()
            .copied()
            .filter(|_| status.role == Role::Leader);
        voters.find(is_heir)
    }
}

/// Whenever the witness leads, hands over to the first voter with a map that has all that it has.
/// Ends with the group.
pub async fn hand_over_soon(group: Weak<Replica>) {
    let Some(mut watch) = group.upgrade().map(|group| group.watch()) else {
        return;
    };
    loop {
        if watch
            .wait_for(|now| now.role == Role::Leader)
            .await
            .is_err()
        {
            return;
        }
        let Some(group) = group.upgrade() else { return };
        if let Some(heir) = group.heir() {
            let handed = group.transfer_leader_within(heir, HAND_OVER_TIMEOUT).await;
            tracing::info!(group = %group.key().group, to = %heir, ?handed, "a witness that led \
                hands over");
        }
        drop(group);
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
