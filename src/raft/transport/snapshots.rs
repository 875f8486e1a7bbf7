//! [`SnapshotInbox`]: receives a snapshot of another replica, and installs it.
//!
//! Chunks are written as they arrive, and the transfer may be resumed. Installing may take any
//! time; the sender asks again until it is done. A sender of another term than the one that began
//! an installation is not told of its result, because it must never take another's installation for
//! its own.

use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use crate::blocking;
use crate::raft::replica_store::SnapshotData;
use crate::raft::state_machine::{RaftHandle, with_meta};
use crate::raft::transport::wire::{PeerRefusal, PeerReply, SnapshotName};
use crate::raft::types::{RaftVoteOf, vote_from_raft, vote_to_raft};
use crate::sm::ports::StoreError;
use crate::storage::log::Vote;
use crate::storage::map::{Applied, ReplicaMap};
use crate::storage::snapshot::SnapshotReceiver;
use crate::storage::{ReplicaKey, background};
/// Time that a request to install waits before it answers "not yet". Shorter than every deadline
/// for a step.
const INSTALL_PATIENCE: Duration = Duration::from_millis(500);

/// Pause between looks for a leader, and their number, before a received snapshot is given up.
const VOTE_PAUSE: Duration = Duration::from_millis(50);
const VOTE_LOOKS_MAX: usize = 200;

/// Receives a snapshot for one replica, one at a time.
#[derive(Clone, Default)]
pub struct SnapshotInbox(Arc<Mutex<IncomingSnapshot>>);

#[derive(Default)]
enum IncomingSnapshot {
    #[default]
    Nothing,
    Some {
        name: SnapshotName,
        receiver: SnapshotReceiver,
    },
    Installing {
        name: SnapshotName,
        vote: Vote,
        /// None until the installation is done.
        result: InstallResult,
    },
}

impl SnapshotInbox {
    /// Begins to receive a snapshot, or resumes it. Another one that was arriving is given up.
    pub fn open(&self, state: &ReplicaMap, name: SnapshotName) -> Result<PeerReply, PeerRefusal> {
        let mut arriving = self.try_lock()?;
        match &*arriving {
            IncomingSnapshot::Some {
                name: current,
                receiver,
            } if *current == name => {
                return Ok(PeerReply::SnapshotHas {
                    bytes_len: receiver.bytes_len(),
                });
            }
            IncomingSnapshot::Installing {
                name: current,
                result,
                ..
            } if *current == name && !has_failed(result) => {
                return Ok(PeerReply::SnapshotHas {
                    bytes_len: name.bytes_len,
                });
            }
            IncomingSnapshot::Installing { result, .. } if is_running(result) => {
                return Err(PeerRefusal::Busy);
            }
            IncomingSnapshot::Nothing
            | IncomingSnapshot::Some { .. }
            | IncomingSnapshot::Installing { .. } => {}
        }
        // Deletes the file of the one before first: the disk might not have room for both.
        *arriving = IncomingSnapshot::Nothing;

        let receiver = state
            .begin_receive()
            .map_err(|error| PeerRefusal::Failed(error.to_string()))?;
        *arriving = IncomingSnapshot::Some { name, receiver };
        Ok(PeerReply::SnapshotHas { bytes_len: 0 })
    }

    /// Writes a piece of the snapshot at `offset`. Blocking.
    pub fn write(
        &self,
        name: SnapshotName,
        offset: u64,
        chunk: &Bytes,
    ) -> Result<PeerReply, PeerRefusal> {
        let mut arriving = self.lock();
        let IncomingSnapshot::Some {
            name: current,
            receiver,
        } = &mut *arriving
        else {
            return Err(not_arriving());
        };

        if *current != name {
            return Err(not_arriving());
        }

        // After a failed write the bytes on the disk are unknown: the sender begins anew.
        match receiver.write_at(offset, chunk) {
            Ok(()) => Ok(PeerReply::SnapshotHas {
                bytes_len: receiver.bytes_len(),
            }),
            Err(error) => {
                *arriving = IncomingSnapshot::Nothing;
                Err(PeerRefusal::Failed(error.to_string()))
            }
        }
    }

    /// Begins to install what has arrived, or waits a moment for the installation to end. `start`
    /// runs it.
    pub async fn install(
        &self,
        name: SnapshotName,
        vote: Vote,
        start: impl FnOnce(SnapshotReceiver, InstallSender),
    ) -> Result<PeerReply, PeerRefusal> {
        let mut result = self.begin_install(name, vote, start)?;

        let done =
            match tokio::time::timeout(INSTALL_PATIENCE, result.wait_for(Option::is_some)).await {
                Err(_) => {
                    return Ok(PeerReply::SnapshotHas {
                        bytes_len: name.bytes_len,
                    });
                }
                Ok(done) => done.ok().and_then(|done| done.clone()),
            };

        match done {
            Some(Ok(vote)) => Ok(PeerReply::SnapshotInstalled { vote }),
            Some(Err(reason)) => Err(PeerRefusal::Failed(reason)),
            None => Err(PeerRefusal::Stopped),
        }
    }

    fn begin_install(
        &self,
        name: SnapshotName,
        vote: Vote,
        start: impl FnOnce(SnapshotReceiver, InstallSender),
    ) -> Result<InstallResult, PeerRefusal> {
        let mut arriving = self.try_lock()?;

        match std::mem::take(&mut *arriving) {
            IncomingSnapshot::Some {
                name: current,
                receiver,
            } if current == name && receiver.bytes_len() == name.bytes_len => {
                let (sender, result) = watch::channel(None);
                *arriving = IncomingSnapshot::Installing {
                    name,
                    vote,
                    result: result.clone(),
                };
                start(receiver, sender);
                Ok(result)
            }
            IncomingSnapshot::Installing {
                name: current,
                vote: current_vote,
                result,
            } => {
                // A request under another vote does not disturb the installation, and is not given
                // its result.
                let same = (current, current_vote) == (name, vote);
                if same || is_running(&result) {
                    *arriving = IncomingSnapshot::Installing {
                        name: current,
                        vote: current_vote,
                        result: result.clone(),
                    };
                }
                if same {
                    Ok(result)
                } else {
                    Err(not_arriving())
                }
            }
            other => {
                *arriving = other;
                Err(not_arriving())
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, IncomingSnapshot> {
        self.0.lock()
    }

    /// Locks for a caller that must not block: a piece may just be written, and wait for the disk.
    fn try_lock(&self) -> Result<MutexGuard<'_, IncomingSnapshot>, PeerRefusal> {
        self.0.try_lock().ok_or(PeerRefusal::Busy)
    }
}

/// Reports the result of an installation: the vote that it happened under, or why it failed.
pub type InstallSender = watch::Sender<Option<Result<Vote, String>>>;
type InstallResult = watch::Receiver<Option<Result<Vote, String>>>;

fn is_running(result: &InstallResult) -> bool {
    result.borrow().is_none() && result.has_changed().is_ok()
}

/// Returns true if the installation failed, or was dropped without a result.
fn has_failed(result: &InstallResult) -> bool {
    !is_running(result) && !matches!(*result.borrow(), Some(Ok(_)))
}

fn not_arriving() -> PeerRefusal {
    PeerRefusal::Failed("another snapshot, or none, is arriving: begin anew".into())
}

/// Verifies a snapshot that has arrived, fills a map with it, and hands it to openraft, which
/// decides whether it is needed.
///
/// openraft answers nobody from then on until it is installed: not its leader, which would take the
/// follower for gone, nor a candidate. So what takes long is done before.
pub async fn install(
    raft: RaftHandle,
    state: &ReplicaMap,
    receiver: SnapshotReceiver,
    vote: Vote,
) -> Result<Vote, String> {
    let (key, state) = (state.key(), state.clone());
    let prepare = move || {
        let snapshot = receiver.finish()?;
        let prepared = background::run("fill-map", || state.prepare(&snapshot));
        let failed = |source| StoreError::Io {
            context: "filling a map".into(),
            source,
        };
        prepared.unwrap_or_else(|source| Err(failed(source)))?;
        Ok::<_, StoreError>(snapshot)
    };
    let prepared = blocking::start(prepare)
        .await
        .map_err(|error| error.to_string())?;
    let snapshot = prepared.map_err(|error| error.to_string())?;
    let vote = vote_now(&raft, key, vote).await?;
    hand_over(raft, vote, SnapshotData::Map(snapshot)).await
}

/// Returns the vote of the leader that this replica follows now; another may have been elected
/// since the sender's `vote`. The new leader has everything that was committed, and so all that the
/// snapshot holds: it might have sent it.
async fn vote_now(raft: &RaftHandle, key: ReplicaKey, vote: Vote) -> Result<RaftVoteOf, String> {
    for _ in 0..VOTE_LOOKS_MAX {
        let now = raft.with_raft_state(|state| *state.vote_ref()).await;
        let now = now.map_err(|error| error.to_string())?;
        match vote_from_raft(&now) {
            Vote { term, .. } if term <= vote.term => {
                return vote_to_raft(&vote).ok_or_else(|| "a vote for nobody".to_owned());
            }
            // It campaigns or leads itself, and takes nobody's snapshot then.
            Vote { voted_for, .. } if voted_for == Some(key.replica) => break,
            Vote {
                committed: true, ..
            } => return Ok(now),
            Vote { .. } => tokio::time::sleep(VOTE_PAUSE).await,
        }
    }
    Err("there is no leader to follow".into())
}

/// Removes the leftovers of an installation.
pub async fn tidy(state: ReplicaMap) {
    let key = state.key();
    match blocking::start(move || state.tidy()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::debug!(replica = %key, %error, "an old map stays until the next start")
        }
        Err(error) => {
            tracing::debug!(replica = %key, %error, "an old map stays until the next start")
        }
    }
}

/// Hands a watermark to openraft, likewise.
pub async fn install_watermark(
    raft: RaftHandle,
    applied: Applied,
    vote: Vote,
) -> Result<Vote, String> {
    let vote = vote_to_raft(&vote).ok_or("a vote for nobody")?;
    hand_over(raft, vote, SnapshotData::Watermark(applied)).await
}

async fn hand_over(raft: RaftHandle, vote: RaftVoteOf, data: SnapshotData) -> Result<Vote, String> {
    let snapshot = with_meta(data).map_err(|error| error.to_string())?;
    let response = raft
        .install_full_snapshot(vote, snapshot)
        .await
        .map_err(|error| error.to_string())?;
    Ok(vote_from_raft(&response.vote))
}
