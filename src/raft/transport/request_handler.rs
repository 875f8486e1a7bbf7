//! How a replica handles the requests of others: from the frame to openraft and back.
//!
//! A frame is charged to the node's budget for frames while it is being handled. If its lane breaks
//! meanwhile, what openraft was given of it waits in the log's queue, and is counted there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::future::{BoxFuture, Either, select};
use openraft::errors::RaftError;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderError, TransferLeaderRequest,
    VoteRequest, VoteResponse,
};

use crate::blocking;
use crate::raft::replica::Replica;
use crate::raft::replica_store::ReplicaStore;
use crate::raft::transport::Lane;
use crate::raft::transport::snapshots;
use crate::raft::transport::wire::{
    self, AppendReply, PeerRefusal, PeerReply, PeerRequest, TransferReply,
};
use crate::raft::types::{Types, entry_to_raft, from_raft, to_raft, vote_from_raft, vote_to_raft};
use crate::sm::disk_level::DiskLevel;
use crate::storage::log::{LogEntry, Vote};
use crate::storage::map::ReplicaMap;
use crate::types::{LogId, ReplicaId};

/// Frames of one group that may be handled at a time: a few windows, because appends that were
/// given up there may be sent again.
const FRAMES_MAX: usize = 64;

type Handled = Result<PeerReply, PeerRefusal>;

impl Replica {
    /// Begins to handle a request for this replica. An append has its place in openraft's queue
    /// once the future was polled, if that poll was not subject to tokio's budget.
    pub(in crate::raft) fn handle(
        self: Arc<Self>,
        lane: Lane,
        sender: ReplicaId,
        request: PeerRequest,
        tail: Bytes,
    ) -> Result<BoxFuture<'static, PeerReply>, PeerRefusal> {
        // Charged before it is read, and held until it is answered.
        let slot = FrameSlot::take(&self.frames)?;
        let place = self
            .context
            .budgets
            .frames
            .take(&self.frame_bytes, tail.len())
            .ok_or(PeerRefusal::Busy)?;

        if self.is_behind_disk(&request) {
            return Err(PeerRefusal::Busy);
        }

        Ok(Box::pin(async move {
            let _held = (slot, place);
            self.answer(lane, sender, request, tail)
                .await
                .unwrap_or_else(PeerReply::Refused)
        }))
    }

    /// Returns true if more entries would only pile up in front of a disk that does not keep up, or
    /// is full. A group that has nothing unsynced may add some, unless the disk is full.
    fn is_behind_disk(&self, request: &PeerRequest) -> bool {
        let has_entries =
            matches!(request, PeerRequest::Append { entries, .. } if !entries.is_empty());
        let log = &self.context.log;
        let is_full = || log.disk_level() == DiskLevel::Spent && !self.key().group.is_meta();
        has_entries && (log.is_overloaded() && self.has_unsynced() || is_full())
    }

    async fn answer(
        &self,
        lane: Lane,
        sender: ReplicaId,
        request: PeerRequest,
        tail: Bytes,
    ) -> Handled {
        match request {
            PeerRequest::Append {
                vote,
                previous,
                commit,
                entries,
            } => {
                let entries = wire::entries(&entries, tail).map_err(|_| PeerRefusal::Unreadable)?;
                self.append(lane, vote, previous, commit, entries).await
            }
            PeerRequest::Vote {
                vote,
                last,
                leadership_transfer,
            } => self.vote(vote, last, leadership_transfer).await,
            PeerRequest::PreVote { vote, last } => self.pre_vote(vote, last).await,
            PeerRequest::TransferLeader { from, to, last } => self.take_over(from, to, last).await,
            request @ (PeerRequest::SnapshotOpen { .. }
            | PeerRequest::SnapshotChunk { .. }
            | PeerRequest::SnapshotInstall { .. }
            | PeerRequest::Watermark { .. }) => {
                // A witness has no snapshot: one in its name would replace this map with nothing.
                if self.watch.borrow().membership.is_witness(sender) {
                    return Err(PeerRefusal::Failed("a witness has no snapshot".into()));
                }

                let reply = match &self.apply_state.store {
                    ReplicaStore::Map(state) => self.take_snapshot(state, request, &tail).await?,
                    ReplicaStore::Witness(_) => self.take_watermark(request).await?,
                };
                self.with_vote(reply).await
            }
            PeerRequest::Rebuild { vote } => self.hold_map(&vote),
            PeerRequest::PurgeIndex { index } => match &self.apply_state.store {
                ReplicaStore::Witness(state) => {
                    state.raise_purge_index(index);
                    Ok(PeerReply::Noted)
                }
                ReplicaStore::Map(_) => Err(other_kind()),
            },
        }
    }

    /// Replaces the vote in the answer to a snapshot by the current one, because the snapshot may
    /// have been installed long ago: the sender takes the answer for a message of a follower, and
    /// confirms reads by it.
    async fn with_vote(&self, reply: PeerReply) -> Handled {
        let PeerReply::SnapshotInstalled { .. } = reply else {
            return Ok(reply);
        };
        let vote = self
            .raft
            .with_raft_state(|state| *state.vote_ref())
            .await
            .map_err(|_| PeerRefusal::Stopped)?;
        Ok(PeerReply::SnapshotInstalled {
            vote: vote_from_raft(&vote),
        })
    }

    async fn take_snapshot(
        &self,
        state: &ReplicaMap,
        request: PeerRequest,
        tail: &Bytes,
    ) -> Handled {
        match request {
            PeerRequest::SnapshotOpen { snapshot, .. } => {
                let is_news = snapshot.applied > state.applied().log_id;
                if !self.apply_state.hold.note_arriving(snapshot, is_news) {
                    // Openraft would find nothing in it to install, and the leader would be told
                    // that the map is rebuilt.
                    return Err(PeerRefusal::Failed("the map is held no more".into()));
                }
                self.inbox.open(state, snapshot)
            }
            PeerRequest::SnapshotChunk { snapshot, offset } => {
                let (inbox, tail) = (self.inbox.clone(), tail.clone());
                let written = blocking::start(move || inbox.write(snapshot, offset, &tail)).await;
                self.apply_state.hold.renew();
                written.unwrap_or_else(|error| {
                    Err(PeerRefusal::Failed(format!(
                        "taking a snapshot panicked: {error}"
                    )))
                })
            }
            PeerRequest::SnapshotInstall { vote, snapshot } => {
                let (raft, state) = (self.raft.clone(), state.clone());
                let install = |receiver, done: snapshots::InstallSender| {
                    let ordinary = self.take_rebuilt(snapshot, receiver, vote, done);
                    let Some((receiver, done)) = ordinary else {
                        return;
                    };
                    self.supervise(async move {
                        let result = snapshots::install(raft, &state, receiver, vote).await;
                        done.send_replace(Some(result));
                        snapshots::tidy(state).await;
                    });
                };
                self.inbox.install(snapshot, vote, install).await
            }
            _ => Err(other_kind()),
        }
    }

    /// Takes the watermark of a snapshot, which is all that a witness needs. Keeps its log if that
    /// holds the entry, and so everything after it.
    async fn take_watermark(&self, request: PeerRequest) -> Handled {
        match request {
            PeerRequest::SnapshotOpen { .. } => Ok(PeerReply::WatermarkWanted),
            PeerRequest::Watermark { vote, applied } => {
                let upto = applied.log_id.ok_or(PeerRefusal::Unreadable)?;

                // It may be the only one that has the entries after it, so it keeps them where it
                // can.
                if self.log.entry_id(upto.index) == Some(upto) && self.log.synced() >= Some(upto) {
                    return Ok(PeerReply::SnapshotInstalled { vote });
                }
                let installed =
                    snapshots::install_watermark(self.raft.clone(), applied, vote).await;
                installed
                    .map(|vote| PeerReply::SnapshotInstalled { vote })
                    .map_err(PeerRefusal::Failed)
            }
            _ => Err(other_kind()),
        }
    }

    async fn append(
        &self,
        lane: Lane,
        vote: Vote,
        previous: Option<LogId>,
        commit: Option<LogId>,
        entries: Vec<LogEntry>,
    ) -> Handled {
        // Noted before the append, which takes a sync: a slow disk is no reason to campaign.
        if self.is_current(&vote) {
            self.timer.on_leader_message(vote.term);
        }

        if !follows(previous, &entries) {
            return Err(PeerRefusal::Unreadable);
        }
        let entries = entries
            .into_iter()
            .map(entry_to_raft)
            .collect::<Result<Vec<_>, _>>();
        let request = AppendEntriesRequest::<Types> {
            vote: read(&vote)?,
            prev_log_id: previous.map(to_raft),
            entries: entries.map_err(|_| PeerRefusal::Unreadable)?,
            leader_commit: commit.map(to_raft),
        };

        let is_heartbeat = lane == Lane::Heartbeat && request.entries.is_empty();
        let waits = self.has_unsynced() || self.apply_state.is_installing();

        let reply = match is_heartbeat && waits {
            true => self.heartbeat(request).await?,
            false => append_reply(self.raft.append_entries(request).await)?,
        };

        // Only the leader's appends are accepted, so only these tell what is committed.
        if matches!(reply, AppendReply::Success) {
            self.freshness.note_append(
                commit.map_or(0, |id| id.index),
                *self.apply_state.applied.borrow(),
            );
        }
        Ok(PeerReply::Append(reply))
    }

    /// Answers a heartbeat without waiting for what is being synced or installed, as openraft
    /// would. To the leader the answer only says that this replica follows it; for that it is
    /// enough that openraft has taken the heartbeat, and that its vote for this leader is durable.
    /// Otherwise reads would wait for the disks of followers, and a disk that stalls for a while
    /// would cost a leader its lease.
    async fn heartbeat(
        &self,
        request: AppendEntriesRequest<Types>,
    ) -> Result<AppendReply, PeerRefusal> {
        let (vote, log) = (request.vote, self.log.clone());
        let append = std::pin::pin!(self.raft.append_entries(request));
        // openraft runs this after the heartbeat. It saves a vote before it does anything else, so
        // the vote in the log is durable then.
        let follows = self.raft.with_raft_state(move |state| {
            let saved = log.state().vote.as_ref().and_then(vote_to_raft);
            *state.vote_ref() == vote && saved == Some(vote)
        });
        match select(append, std::pin::pin!(follows)).await {
            Either::Left((response, _)) => append_reply(response),
            Either::Right((Ok(true), _)) => Ok(AppendReply::Success),
            Either::Right((Ok(false), append)) => append_reply(append.await),
            Either::Right((Err(_), _)) => Err(PeerRefusal::Stopped),
        }
    }

    async fn vote(&self, vote: Vote, last: Option<LogId>, leadership_transfer: bool) -> Handled {
        // A leader may read by its lease without a quorum, so nobody else may be elected until it
        // ends.
        if self.may_be_leased() || (!self.end_lease_if_disconnected() && !leadership_transfer) {
            return Err(PeerRefusal::Leased);
        }

        let request = VoteRequest::<Types> {
            vote: read(&vote)?,
            last_log_id: last.map(to_raft),
            leadership_transfer,
        };

        let response = self
            .raft
            .vote(request)
            .await
            .map_err(|_| PeerRefusal::Stopped)?;

        // The candidate gets time to win before this replica campaigns itself.
        if response.vote_granted {
            self.timer.on_vote_granted();
        }
        Ok(self.vote_reply(&response, last))
    }

    async fn pre_vote(&self, vote: Vote, last: Option<LogId>) -> Handled {
        // Refused already here, so that a candidate without a chance does not raise the term.
        if self.may_be_leased() || !self.end_lease_if_disconnected() {
            return Err(PeerRefusal::Leased);
        }
        let request = VoteRequest::<Types>::new(read(&vote)?, last.map(to_raft));
        let response = self
            .raft
            .pre_vote(request)
            .await
            .map_err(|_| PeerRefusal::Stopped)?;
        Ok(self.vote_reply(&response, last))
    }

    /// Returns what a candidate, whose log ends at `last`, is answered. Tells the election timer if
    /// it was refused for an older log.
    fn vote_reply(&self, response: &VoteResponse<Types>, last: Option<LogId>) -> PeerReply {
        let own_last = response.last_log_id.as_ref().map(from_raft);
        if !response.vote_granted && last < own_last {
            self.timer.on_older_log_refused();
        }
        PeerReply::Vote {
            vote: vote_from_raft(&response.vote),
            last: own_last,
            granted: response.vote_granted,
        }
    }

    async fn take_over(&self, from: Vote, to: ReplicaId, last: Option<LogId>) -> Handled {
        // Before its restart this replica may have granted a lease that still holds.
        if self.may_be_leased() {
            return Err(PeerRefusal::Leased);
        }

        let request = TransferLeaderRequest::<Types>::new(read(&from)?, to, last.map(to_raft));

        let response = self
            .raft
            .handle_transfer_leader(request)
            .await
            .map_err(|_| PeerRefusal::Stopped)?;
        Ok(PeerReply::TransferLeader(match response {
            Ok(()) => TransferReply::Accepted,
            Err(TransferLeaderError::VoteChanged { expected, actual }) => {
                TransferReply::VoteChanged {
                    expected: vote_from_raft(&expected),
                    actual: vote_from_raft(&actual),
                }
            }
            Err(TransferLeaderError::LogNotFlushed { expected, actual }) => {
                TransferReply::LogNotFlushed {
                    expected: expected.as_ref().map(from_raft),
                    actual: actual.as_ref().map(from_raft),
                }
            }
        }))
    }
}

fn append_reply(
    response: Result<AppendEntriesResponse<Types>, RaftError<Types>>,
) -> Result<AppendReply, PeerRefusal> {
    Ok(match response.map_err(|_| PeerRefusal::Stopped)? {
        AppendEntriesResponse::Success => AppendReply::Success,
        AppendEntriesResponse::PartialSuccess(last) => {
            AppendReply::Partial(last.as_ref().map(from_raft))
        }
        AppendEntriesResponse::Conflict => AppendReply::Conflict,
        AppendEntriesResponse::HigherVote(vote) => AppendReply::HigherVote(vote_from_raft(&vote)),
    })
}

fn other_kind() -> PeerRefusal {
    PeerRefusal::Failed("that is for another kind of replica".into())
}

fn read(vote: &Vote) -> Result<crate::raft::types::RaftVoteOf, PeerRefusal> {
    vote_to_raft(vote).ok_or(PeerRefusal::Unreadable)
}

/// A place among the frames of a group that are being handled.
struct FrameSlot(Arc<AtomicUsize>);

impl FrameSlot {
    fn take(frames: &Arc<AtomicUsize>) -> Result<Self, PeerRefusal> {
        // Made before the check, so that a refused one is given back by its drop.
        let slot = FrameSlot(frames.clone());
        if frames.fetch_add(1, Ordering::Relaxed) < FRAMES_MAX {
            Ok(slot)
        } else {
            Err(PeerRefusal::Busy)
        }
    }
}

impl Drop for FrameSlot {
    fn drop(&mut self) {
        let before = self.0.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "a frame ends that never began");
    }
}

/// Returns true if the entries of an append go on after `previous` without a gap, and no term
/// falls. openraft looks at this in debug builds only, and the log would take it for an error of
/// its own.
pub(in crate::raft) fn follows(previous: Option<LogId>, entries: &[LogEntry]) -> bool {
    let mut last = previous;
    entries.iter().map(|entry| entry.id).all(|id| {
        let fits = match last {
            Some(last) => last.index.checked_add(1) == Some(id.index) && id.term >= last.term,
            None => id.index == 0,
        };
        last = Some(id);
        fits
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::log::LogPayload;

    fn entries(ids: &[(u64, u64)]) -> Vec<LogEntry> {
        let ids = ids.iter().map(|(term, index)| LogId {
            term: *term,
            index: *index,
        });
        let entry = |id| LogEntry {
            id,
            payload: LogPayload::Blank,
        };
        ids.map(entry).collect()
    }

    #[test]
    fn an_append_with_a_gap_or_a_term_that_falls_is_not_taken() {
        let previous = Some(LogId { term: 2, index: 7 });
        for (ids, fits) in [
            (&[][..], true),
            (&[(2, 8), (2, 9), (3, 10)], true),
            (&[(2, 9)], false),
            (&[(2, 7)], false),
            (&[(1, 8)], false),
            (&[(2, 8), (2, 10)], false),
            (&[(3, 8), (2, 9)], false),
        ] {
            assert_eq!(follows(previous, &entries(ids)), fits, "{ids:?}");
        }
        assert!(follows(None, &entries(&[(0, 0), (1, 1)])));
        assert!(!follows(None, &entries(&[(1, 1)])));
        let end = Some(LogId {
            term: 2,
            index: u64::MAX,
        });
        assert!(
            !follows(end, &entries(&[(2, 0)])),
            "nothing follows the end"
        );
    }
}
