//! Rebuilding the map of a replica that differs from the others: it stops applying, takes a snapshot of the
//! leader's map in place of its own, and goes on from there. Its log and its votes stay: they were not in doubt.
//!
//! openraft has no part in it, and does not install what a replica has applied already. While the map is held
//! ([`Hold`]), entries are appended and acknowledged as ever; those that the new map holds are passed over then.
//! After an end in the middle the old map is still there, and the next comparison finds it again.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::group::Group;
use super::snapshots;
use super::state_machine::Machine;
use super::types::vote_from_raft;
use super::wire::{Refusal, Reply, Request};
use crate::storage::background;
use crate::storage::log::Vote;
use crate::storage::snapshot::SnapshotReceiver;
use crate::types::{NodeId, ReplicaId};

/// How long a replica waits for another map before it goes on with its own.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long one request is waited for, and how long the log of a replica may be behind a snapshot.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
const LOG_PAUSE: Duration = Duration::from_millis(5);

/// Why a replica was not rebuilt. It is tried again after another comparison.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RebuildError(String);

/// Whether the map is held as it is, for another to take its place.
pub struct Hold(watch::Sender<bool>);

impl Default for Hold {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Hold {
    pub fn set(&self, is_held: bool) {
        self.0.send_replace(is_held);
    }

    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until the map is not held. Returns whether it was.
    pub async fn wait(&self) -> bool {
        if !self.is_set() {
            return false;
        }
        // The sender lives as long as this: it can't be gone.
        drop(self.0.subscribe().wait_for(|is_held| !is_held).await);
        true
    }
}

impl Group {
    /// Has the replica on that node, which is not the one that leads, take this replica's map in place of its own.
    ///
    /// # Errors
    ///
    /// When it did not; it goes on with its own map then, or when its patience ends.
    pub async fn rebuild(&self, replica: ReplicaId, node: NodeId) -> Result<(), RebuildError> {
        let failed = |reason: String| RebuildError(reason);
        if !self.leads() {
            return Err(failed("this replica does not lead".into()));
        }
        let vote = self.raft.with_raft_state(|state| *state.vote_ref()).await.map_err(|error| failed(error.to_string()))?;
        let vote = vote_from_raft(&vote);
        let client = self.network.snapshot_client(replica, node);
        let deadline = Instant::now() + ASK_TIMEOUT;
        match client.ask(&Request::Rebuild { vote }, &[], deadline).await {
            Ok(Reply::Noted) => {}
            Ok(other) => return Err(failed(format!("it answered {other:?}"))),
            Err(error) => return Err(failed(error.to_string())),
        }
        self.build_snapshot().await.map_err(|error| failed(error.to_string()))?;
        let snapshot = self.state().current_snapshot().ok_or_else(|| failed("there is no snapshot".into()))?;
        let sent = snapshots::send(&client, vote, &snapshot, self.network.snapshot_step_timeout).await;
        sent.map(|_| ()).map_err(|error| failed(error.to_string()))
    }

    /// Holds the map of this replica, for that of its leader to take its place.
    pub(super) fn hold_map(&self, vote: &Vote) -> Result<Reply, Refusal> {
        if self.leads() || !self.is_current(vote) {
            return Err(Refusal::Failed("it does not follow who asks".into()));
        }
        if self.machine.keeps.map().is_none() {
            return Err(Refusal::Failed("a witness has no map".into()));
        }
        tracing::error!(
            "replica {} differs from a majority of its shard: its map is thrown away and rebuilt from its leader",
            self.key()
        );
        self.machine.hold.set(true);
        let machine = self.machine.clone();
        self.supervise(async move {
            if tokio::time::timeout(PATIENCE, machine.hold.wait()).await.is_err() {
                tracing::error!("no other map came within {PATIENCE:?}: the replica goes on with its own");
                machine.hold.set(false);
            }
        });
        Ok(Reply::Noted)
    }

    /// Puts what has arrived in the place of the map that is held, once the log holds all that is in it.
    pub(super) fn take_rebuilt(&self, receiver: SnapshotReceiver, vote: Vote, done: snapshots::InstallSender) {
        let (machine, log, key) = (self.machine.clone(), self.log.clone(), self.key());
        self.supervise(async move {
            let received = tokio::task::spawn_blocking(move || receiver.finish()).await;
            let result = async {
                let snapshot = received.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
                let upto = snapshot.applied().log_id.ok_or("a snapshot of nothing")?;
                let deadline = Instant::now() + ASK_TIMEOUT;
                while log.state().last < Some(upto) {
                    if Instant::now() > deadline {
                        return Err(format!("the log here ends before {upto}"));
                    }
                    tokio::time::sleep(LOG_PAUSE).await;
                }
                let filling = machine.clone();
                // An entry may just be applied to the one that is held.
                let _turn = machine.turns.lock().await;
                let filled = tokio::task::spawn_blocking(move || {
                    let state = filling.keeps.map().ok_or("a witness has no map")?;
                    let installed = background::run("fill-map", || state.install(&snapshot).and_then(|()| state.tidy()));
                    installed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
                });
                filled.await.map_err(|error| error.to_string())??;
                Ok(vote)
            }
            .await;
            match &result {
                Ok(_) => {
                    machine.count_rebuilt();
                    tracing::error!("replica {key} is rebuilt from its leader");
                }
                Err(reason) => tracing::error!("replica {key} was not rebuilt: {reason}"),
            }
            machine.hold.set(false);
            done.send_replace(Some(result));
        });
    }
}

impl Machine {
    fn count_rebuilt(&self) {
        self.rebuilt.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}
