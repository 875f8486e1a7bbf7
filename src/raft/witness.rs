//! Witnesses: replicas that vote and keep the log, and have no map. A group of two replicas with a
//! witness survives the loss of any one of the three.
//!
//! So that a witness may vote for entries that it could never serve:
//! - It is a voter only while it, or a majority of the replicas with a map, has every entry that
//!   one of those may lack. It becomes a voter, and others become voters beside it, only when each
//!   replica with a map has all that is committed (`sm::membership`). And it purges only what each
//!   of them has durably; [`Replica::advertise_purge_index`] tells it how far that is.
//! - It never sends a snapshot, because it has none. A replica that lacks what the witness no
//!   longer has must be brought up to date by another that has a map, and refuses a witness's
//!   snapshot. A witness that lacks what its leader no longer has is sent a watermark in place of a
//!   snapshot: how far that is, and the membership then.
//! - It leads only when no other voter can (see
//!   [`ElectionTimer`](super::election::timer::ElectionTimer)). Then it takes no requests, changes
//!   nothing, brings the others up to date and hands over to the first that is
//!   ([`transfer_leadership_when_ready`]).

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;

use super::replica::Replica;
use super::status::{RaftStatus, Role};
use super::transport::wire::PeerRequest;
use crate::mutants::{self, Mutant};
use crate::sm::ports::StoreError;
use crate::storage::ReplicaKey;
#[cfg(any(test, feature = "testing"))]
use crate::storage::log::ReplicaLog;
use crate::types::ReplicaId;

/// Interval at which a witness that leads checks whether another is up to date.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Time that another replica may take to take over.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that a witness may take to answer.
const ADVERTISE_TIMEOUT: Duration = Duration::from_secs(1);
/// Log that is not worth rewriting the file for.
const PURGE_BYTES_MIN: u64 = 4 << 20;

/// A witness that lives on this node.
#[derive(Clone)]
pub struct WitnessReplica(pub(super) Arc<Replica>);

impl WitnessReplica {
    pub fn key(&self) -> ReplicaKey {
        self.0.key()
    }

    /// Returns the log.
    #[cfg(any(test, feature = "testing"))]
    pub fn log(&self) -> &ReplicaLog {
        self.0.log()
    }

    /// Returns the state of this witness at this moment.
    pub fn status(&self) -> RaftStatus {
        self.0.status()
    }

    /// Returns the bytes of the log that it keeps. They are many if a replica with a map has been
    /// away for long.
    pub fn log_bytes(&self) -> u64 {
        self.0
            .log
            .bytes_since(self.0.log.state().purged.map_or(0, |id| id.index))
    }

    /// Takes one step towards purging the log that it need not keep: first its file must say that
    /// the entries were applied, then they are purged. `under_pressure` purges even little. A
    /// witness that is not a voter keeps everything, because whether it may become one is decided
    /// by where its log begins.
    pub async fn release_log(&self, under_pressure: bool) -> Result<(), StoreError> {
        let group = &self.0;
        let Some(state) = group.apply_state.store.witness() else {
            return Ok(());
        };

        let status = group.status();
        let is_voter = group
            .watch
            .borrow()
            .committed_membership
            .voters
            .contains_key(&self.key().replica);

        let purges_all = mutants::is_on(Mutant::WitnessPurgesWhatOthersLack);
        let promised = if purges_all {
            u64::MAX
        } else {
            state.purge_index()
        };
        let upto = promised.min(status.applied.map_or(0, |id| id.index));
        let purged = status.purged.map_or(0, |id| id.index);
        let freed = group
            .log
            .bytes_since(purged)
            .saturating_sub(group.log.bytes_since(upto));

        if !is_voter
            || upto <= purged
            || !(under_pressure || purges_all || freed >= PURGE_BYTES_MIN)
        {
            return Ok(());
        }

        // The file must say that the entries were applied before they are purged, or a restart
        // would find neither.
        if status
            .snapshot
            .is_none_or(|watermark| watermark.index < upto)
        {
            super::state_machine::write_watermark(&group.apply_state).await?;
            // openraft takes the file that was just written.
            let _ = group.raft.trigger().snapshot().await;
            return Ok(());
        }

        group.purge_log(upto).await;
        Ok(())
    }
}

impl Replica {
    /// Tells the witnesses of the group how much of the log every replica with a map has durably,
    /// so that they need not keep it. Does nothing unless this replica leads and the index has
    /// grown. Witnesses that do not answer are told later.
    pub async fn advertise_purge_index(&self) {
        if self.is_witness() || self.watch.borrow().membership.witnesses.is_empty() || !self.leads()
        {
            return;
        }

        let status = self.status();
        let Some(upto) = status
            .matched_by_all()
            .filter(|upto| *upto > self.advertised_purge_index.load(Ordering::Relaxed))
        else {
            return;
        };

        let members = status
            .membership
            .voters
            .iter()
            .chain(&status.membership.learners);
        let witnesses = members.filter(|(replica, _)| status.membership.is_witness(**replica));

        let sent = witnesses.map(|(replica, node)| {
            let client = self.network.log_client(*replica, *node);
            async move {
                client
                    .ask(
                        &PeerRequest::PurgeIndex { index: upto },
                        &[],
                        Instant::now() + ADVERTISE_TIMEOUT,
                    )
                    .await
            }
        });

        // Remembered only if every witness has it; otherwise it is sent again.
        match join_all(sent).await.into_iter().find_map(Result::err) {
            None => self.advertised_purge_index.store(upto, Ordering::Relaxed),
            Some(error) => {
                tracing::debug!(group = %self.key().group, %error, "a witness was not told what it \
                    need not keep");
            }
        }
    }

    /// Returns the first voter with a map that has all of this replica's log, if this replica
    /// leads.
    fn transfer_target(&self) -> Option<ReplicaId> {
        let status = self.status();
        let last = status.last_log;
        let is_eligible = |replica: &ReplicaId| {
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
        voters.find(is_eligible)
    }
}

/// Transfers the lead to the first voter with a map that has all of the witness's log, whenever the
/// witness leads. Ends with the replica.
pub async fn transfer_leadership_when_ready(group: Weak<Replica>) {
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
        if let Some(transfer_target) = group.transfer_target() {
            let handed = group
                .transfer_leader_within(transfer_target, HAND_OVER_TIMEOUT)
                .await;
            tracing::info!(group = %group.key().group, to = %transfer_target, ?handed, "a witness \
                that led hands over");
        }

        // Not held while waiting, so that the replica can end.
        drop(group);
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
