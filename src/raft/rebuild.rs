//! Rebuilding the map of a replica that differs from the others: it stops applying, takes a
//! snapshot of the leader's map in place of its own, and goes on from there. Its log and its votes
//! stay: they were not in doubt.
//!
//! openraft has no part in it, and does not install what a replica has applied already. While the
//! map is held ([`MapHold`]), entries are appended and acknowledged as ever; those that the new map
//! holds are passed over then. After an end in the middle the old map is still there, and the next
//! comparison finds it again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::select;
use tokio::sync::watch;
use tokio::time::Instant;

use super::replica::Replica;
use super::state_machine::ApplyState;
use super::transport::snapshots;
use super::transport::wire::{PeerRefusal, PeerReply, PeerRequest, SnapshotName};
use super::types::vote_from_raft;
use crate::storage::background;
use crate::storage::log::Vote;
use crate::storage::snapshot::{Snapshot, SnapshotReceiver};
use crate::types::{NodeId, ReplicaId};

/// How long a replica waits for another map, or for the next piece of it, before it goes on with
/// its own.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often it is asked for more patience while its leader still writes the snapshot.
const ASK_EVERY: Duration = Duration::from_secs(30);
/// How long one request is waited for, and how long the log of a replica may be behind a snapshot.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
const LOG_PAUSE: Duration = Duration::from_millis(5);

/// Why a replica was not rebuilt. It is tried again after another comparison.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RebuildError(String);

/// Whether the map is held as it is, for another to take its place.
pub struct MapHold(watch::Sender<HoldState>);

#[derive(Default)]
struct HoldState {
    /// Of the last hold: whoever waited for one before it must not end it.
    number: u64,
    deadline: Option<HoldDeadline>,
    /// The last snapshot that began to arrive, if that was for a map that was held.
    arriving: Option<SnapshotName>,
}

#[derive(Clone, Copy)]
enum HoldDeadline {
    Until(Instant),
    /// All of another map is here, and takes its place as soon as it can.
    Exchanging,
}

impl Default for MapHold {
    fn default() -> Self {
        Self(watch::Sender::new(HoldState::default()))
    }
}

impl MapHold {
    /// Holds the map. Returns the number of a hold that begins; none if it was held already, and
    /// then has new patience.
    pub fn set(&self) -> Option<u64> {
        if self.renew() {
            return None;
        }
        let mut number = 0;
        self.0.send_modify(|hold| {
            hold.number += 1;
            hold.deadline = Some(HoldDeadline::Until(Instant::now() + PATIENCE));
            number = hold.number;
        });
        Some(number)
    }

    /// Something came of what is waited for. Returns whether the map is held.
    pub fn renew(&self) -> bool {
        let mut is_held = false;
        self.0.send_if_modified(|hold| {
            is_held = hold.deadline.is_some();
            if let Some(HoldDeadline::Until(until)) = &mut hold.deadline {
                *until = Instant::now() + PATIENCE;
            }
            false
        });
        is_held
    }

    /// A snapshot begins to arrive.
    pub fn note_arriving(&self, name: SnapshotName) {
        let is_held = self.renew();
        self.0.send_if_modified(|hold| {
            hold.arriving = is_held.then_some(name);
            false
        });
    }

    /// Returns whether this snapshot began to arrive for a map that was held.
    pub fn expects(&self, name: SnapshotName) -> bool {
        self.0.borrow().arriving == Some(name)
    }

    /// Has the hold last for as long as another map takes the place of this one. Returns its
    /// number; none if the map is not held.
    fn begin_exchange(&self) -> Option<u64> {
        let mut number = None;
        self.0.send_if_modified(|hold| {
            if hold.deadline.is_some() {
                hold.deadline = Some(HoldDeadline::Exchanging);
                number = Some(hold.number);
            }
            false
        });
        number
    }

    /// Ends that hold, and no later one.
    fn end(&self, number: u64) {
        self.0
            .send_if_modified(|hold| hold.number == number && hold.deadline.take().is_some());
    }

    /// Ends whatever hold there is.
    pub fn clear(&self) {
        self.0
            .send_if_modified(|hold| hold.deadline.take().is_some());
    }

    pub fn is_set(&self) -> bool {
        self.0.borrow().deadline.is_some()
    }

    /// Waits until the map is not held.
    pub async fn wait(&self) {
        if self.is_set() {
            // The sender lives as long as this: it can't be gone.
            drop(
                self.0
                    .subscribe()
                    .wait_for(|hold| hold.deadline.is_none())
                    .await,
            );
        }
    }

    /// Waits until that hold is over, and ends it when its patience does. Returns whether it did.
    async fn outlast(&self, number: u64) -> bool {
        let mut seen = self.0.subscribe();
        let over = seen.wait_for(|hold| hold.number != number || hold.deadline.is_none());
        select(std::pin::pin!(over), std::pin::pin!(self.run_out(number))).await;
        let mut ran_out = false;
        self.0.send_if_modified(|hold| {
            let is_due = matches!(
                hold.deadline,
                Some(HoldDeadline::Until(until)) if until <= Instant::now()
            );
            ran_out = hold.number == number && is_due;
            if ran_out {
                hold.deadline = None;
            }
            ran_out
        });
        ran_out
    }

    /// Waits until that hold has no patience left.
    async fn run_out(&self, number: u64) {
        loop {
            let until = match *self.0.borrow() {
                HoldState {
                    number: now,
                    deadline: Some(HoldDeadline::Until(until)),
                    ..
                } if now == number => until,
                HoldState { .. } => Instant::now() + PATIENCE,
            };
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

/// For as long as it lives the map stays held, while another takes its place.
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
    /// Has the replica on that node, which is not the one that leads, take this replica's map in
    /// place of its own.
    ///
    /// # Errors
    ///
    /// When it did not; it goes on with its own map then, or when its patience ends.
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
                // Its patience must outlast a snapshot of any size. If it does not hear of it, it
                // refuses what is sent.
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
            snapshots::send(&client, vote, &snapshot, self.network.snapshot_step_timeout).await;
        sent.map(|_| ()).map_err(|error| failed(error.to_string()))
    }

    /// Holds the map of this replica, for that of its leader to take its place.
    pub(super) fn hold_map(&self, vote: &Vote) -> Result<PeerReply, PeerRefusal> {
        if self.leads() || !self.is_current(vote) {
            return Err(PeerRefusal::Failed("it does not follow who asks".into()));
        }
        if self.apply_state.store.map().is_none() {
            return Err(PeerRefusal::Failed("a witness has no map".into()));
        }
        let Some(number) = self.apply_state.hold.set() else {
            return Ok(PeerReply::Noted);
        };
        tracing::error!(
            "replica {} differs from a majority of its shard: its map is thrown away and rebuilt \
            from its leader",
            self.key()
        );
        let apply_state = self.apply_state.clone();
        self.supervise(async move {
            if apply_state.hold.outlast(number).await {
                tracing::error!(
                    "no other map came within {PATIENCE:?}: the replica goes on with its own"
                );
            }
        });
        Ok(PeerReply::Noted)
    }

    /// Has a snapshot take the place of a map that is held, once the log holds all that is in it.
    /// Returns it where no map is held: it is to be installed in the ordinary way.
    ///
    /// One that was sent for a map which is held no more is refused: openraft would find nothing in
    /// it to install, and the leader would be told that the map is rebuilt.
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
            let received = tokio::task::spawn_blocking(move || receiver.finish()).await;
            let result = async {
                let snapshot = received
                    .map_err(|error| error.to_string())?
                    .map_err(|error| error.to_string())?;
                let upto = snapshot.applied().log_id.ok_or("a snapshot of nothing")?;
                let deadline = Instant::now() + ASK_TIMEOUT;
                while log.state().last < Some(upto) {
                    if Instant::now() > deadline {
                        return Err(format!("the log here ends before {upto}"));
                    }
                    tokio::time::sleep(LOG_PAUSE).await;
                }

                let filling = apply_state.clone();
                // An entry may just be applied to the one that is held.
                let _turn = apply_state.turns.lock().await;
                // It goes first: whoever has the turn next must not find a hold without a purpose.
                let _taking = guard;
                let filled = tokio::task::spawn_blocking(move || filling.exchange_map(&snapshot));
                filled.await.map_err(|error| error.to_string())??;
                Ok(vote)
            }
            .await;

            match &result {
                Ok(_) => tracing::error!("replica {key} is rebuilt from its leader"),
                Err(reason) => tracing::error!("replica {key} was not rebuilt: {reason}"),
            }
            done.send_replace(Some(result));
        });
        None
    }
}

impl ApplyState {
    /// Puts a snapshot in the place of the map, whose turn the caller has. Blocking.
    ///
    /// It is counted as soon as it is so, and whoever applies the next entry looks at the count: a
    /// hold may begin and end without being seen.
    fn exchange_map(&self, snapshot: &Snapshot) -> Result<(), String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_lasts_while_pieces_arrive_and_ends_no_other_hold() {
        let hold = Arc::new(MapHold::default());
        let outlast = |number| {
            let hold = hold.clone();
            tokio::spawn(async move { hold.outlast(number).await })
        };
        let first = outlast(hold.set().expect("a hold"));
        for _ in 0..5 {
            tokio::time::sleep(PATIENCE / 2).await;
            assert!(hold.renew(), "a piece came in time");
        }
        tokio::time::sleep(PATIENCE * 2).await;
        assert!(!hold.is_set(), "no piece came any more");
        assert!(first.await.expect("it ends"));

        let second = outlast(hold.set().expect("a hold"));
        tokio::time::sleep(PATIENCE / 2).await;
        // Nobody sees that it is not held for a moment.
        hold.clear();
        let number = hold.set().expect("another hold");
        tokio::time::sleep(PATIENCE / 4 * 3).await;
        assert!(hold.is_set(), "the patience of another hold has ended it");
        assert!(!second.await.expect("it ends"));

        let third = outlast(number);
        assert_eq!(hold.begin_exchange(), Some(number));
        tokio::time::sleep(PATIENCE * 5).await;
        assert!(hold.is_set(), "it is being filled");
        hold.end(number - 1);
        assert!(hold.is_set(), "another has ended it");
        hold.end(number);
        assert!(!hold.is_set() && !third.await.expect("it ends"));
        assert_eq!(hold.begin_exchange(), None);
    }
}
