//! How the map of a replica that differs from the others is rebuilt: the replica stops applying,
//! takes a snapshot of the leader's map in place of its own, and goes on from there. Its log and
//! its votes stay, because they were not in doubt.
//!
//! openraft has no part in this: it does not install what a replica has applied already. While the
//! map is held ([`MapHold`](super::map_hold::MapHold)), entries are appended and acknowledged as
//! usual; those that are in the new map are skipped afterwards. If the process ends in the middle,
//! the old map is still there, and the next comparison finds the difference again.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::apply_state::ApplyState;
use super::map_hold::PATIENCE;
use super::replica::Replica;
use super::transport::snapshot_sender;
use super::transport::snapshots;
use super::transport::wire::{PeerRefusal, PeerReply, PeerRequest, SnapshotName};
use super::types::vote_from_raft;
use crate::blocking;
use crate::storage::log::Vote;
use crate::storage::snapshot::SnapshotReceiver;
use crate::telemetry::rarely;
use crate::types::{NodeId, ReplicaId};
/// Interval at which the leader extends the hold while it still writes the snapshot.
const ASK_EVERY: Duration = Duration::from_secs(30);
/// Time that one request may take, and that the log of a replica may lag behind the snapshot.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
const LOG_PAUSE: Duration = Duration::from_millis(5);

/// An error of a rebuild. It is tried again after the next comparison.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RebuildError(String);

/// Keeps the map held while another takes its place; ends the hold when dropped.
struct ExchangeGuard {
    apply_state: Arc<ApplyState>,
    number: u64,
}

impl Drop for ExchangeGuard {
    fn drop(&mut self) {
        self.apply_state.hold.end(self.number);
    }
}

impl Replica {
    /// Makes `replica` on `node`, which does not lead, take this replica's map in place of its own.
    ///
    /// # Errors
    ///
    /// If it did not. It then goes on with its own map, at the latest when its hold ends.
    pub async fn rebuild(&self, replica: ReplicaId, node: NodeId) -> Result<(), RebuildError> {
        let failed = |reason: String| RebuildError(reason);
        if !self.leads() {
            return Err(failed("this replica does not lead".into()));
        }

        let vote = self
            .raft
            .with_raft_state(|state| *state.vote_ref())
            .await
            .map_err(|error| failed(error.to_string()))?;
        let vote = vote_from_raft(&vote);

        // The follower holds its map before the snapshot is written; otherwise it would apply
        // entries that the snapshot lacks.
        let client = self.network.snapshot_client(replica, node);
        let deadline = Instant::now() + ASK_TIMEOUT;
        match client
            .ask(&PeerRequest::Rebuild { vote }, &[], deadline)
            .await
        {
            Ok(PeerReply::Noted) => {}
            Ok(other) => return Err(failed(format!("it answered {other:?}"))),
            Err(error) => return Err(failed(error.to_string())),
        }

        let mut building = std::pin::pin!(self.build_snapshot());
        let built = loop {
            match tokio::time::timeout(ASK_EVERY, &mut building).await {
                Ok(built) => break built,
                // The hold must outlast a snapshot of any size. If this message is lost, the
                // replica refuses the snapshot.
                Err(_) => drop(
                    client
                        .ask(
                            &PeerRequest::Rebuild { vote },
                            &[],
                            Instant::now() + ASK_TIMEOUT,
                        )
                        .await,
                ),
            }
        };

        built.map_err(|error| failed(error.to_string()))?;
        let snapshot = self
            .state()
            .current_snapshot()
            .ok_or_else(|| failed("there is no snapshot".into()))?;
        let sent =
            snapshot_sender::send(&client, vote, &snapshot, self.network.snapshot_step_timeout)
                .await;
        sent.map(|_| ()).map_err(|error| failed(error.to_string()))
    }

    /// Holds the map of this replica, for the map of its leader to take its place.
    pub(super) fn hold_map(&self, vote: &Vote) -> Result<PeerReply, PeerRefusal> {
        // Only its leader may have a replica throw its map away.
        if self.leads() || !self.is_current(vote) {
            return Err(PeerRefusal::Failed("it does not follow who asks".into()));
        }

        if self.apply_state.store.map().is_none() {
            return Err(PeerRefusal::Failed("a witness has no map".into()));
        }

        // A repeated request only extends the hold.
        let Some(number) = self.apply_state.hold.set() else {
            return Ok(PeerReply::Noted);
        };
        tracing::error!(
            "replica {} differs from a majority of its shard: its map is thrown away and rebuilt \
            from its leader",
            self.key()
        );

        // Ends the hold if no other map comes, so that the replica does not lag forever.
        let apply_state = self.apply_state.clone();
        self.supervise(async move {
            if apply_state.hold.outlast(number).await {
                rarely!(
                    error,
                    "no other map came within {PATIENCE:?}: the replica goes on with its own"
                );
            }
        });
        Ok(PeerReply::Noted)
    }

    /// Replaces a map that is held with a snapshot, once the log holds all that is in the snapshot.
    /// Returns the snapshot if no map is held: it is then installed in the ordinary way.
    ///
    /// Refuses a snapshot that was sent for a map that is no longer held: openraft would find
    /// nothing in it to install, and the leader would be told that the map is rebuilt.
    pub(super) fn take_rebuilt(
        &self,
        name: SnapshotName,
        receiver: SnapshotReceiver,
        vote: Vote,
        done: snapshots::InstallSender,
    ) -> Option<(SnapshotReceiver, snapshots::InstallSender)> {
        let (apply_state, log, key) = (self.apply_state.clone(), self.log.clone(), self.key());
        let Some(number) = apply_state.hold.begin_exchange() else {
            if !apply_state.hold.expects(name) {
                return Some((receiver, done));
            }
            done.send_replace(Some(Err("the map is held no more".into())));
            return None;
        };
        let guard = ExchangeGuard {
            apply_state: apply_state.clone(),
            number,
        };
        self.supervise(async move {
            let received = blocking::start(move || receiver.finish()).await;
            let result = async {
                let snapshot = received
                    .map_err(|error| error.to_string())?
                    .map_err(|error| error.to_string())?;
                let upto = snapshot.applied().log_id.ok_or("a snapshot of nothing")?;
                let deadline = Instant::now() + ASK_TIMEOUT;

                // A map is never ahead of its log.
                while log.state().last < Some(upto) {
                    if Instant::now() > deadline {
                        return Err(format!("the log here ends before {upto}"));
                    }
                    tokio::time::sleep(LOG_PAUSE).await;
                }

                let filling = apply_state.clone();
                // Waits for an entry that is just being applied to the held map.
                let _turn = apply_state.turns.lock().await;
                // Moved in, so that the hold ends before the turn does: the next to lock the turn
                // must not find a hold without a purpose.
                let _taking = guard;
                let filled = blocking::start(move || filling.exchange_map(&snapshot));
                filled.await.map_err(|error| error.to_string())??;
                Ok(vote)
            }
            .await;

            match &result {
                Ok(_) => tracing::error!("replica {key} is rebuilt from its leader"),
                Err(reason) => rarely!(error, "replica {key} was not rebuilt: {reason}"),
            }
            done.send_replace(Some(result));
        });
        None
    }
}
