//! What a replica does with the requests of others: from frame to openraft and back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderError, TransferLeaderRequest, VoteRequest};

use super::group::Group;
use super::snapshots;
use super::types::{Types, entry_to_raft, from_raft, to_raft, vote_from_raft, vote_to_raft};
use super::wire::{self, AppendReply, Refusal, Reply, Request, TransferReply};
use crate::storage::log::{Entry, Vote};
use crate::types::{LogId, ReplicaId};

/// Frames of one group that may be worked on at a time: a few windows, as what was given up there may be sent again.
const FRAMES_MAX: usize = 64;

type Handled = Result<Reply, Refusal>;

impl Group {
    /// Begins to work on a request for this replica. An append is in openraft's queue when the future was polled once.
    pub(super) fn handle(self: Arc<Self>, request: Request, tail: Bytes) -> Result<BoxFuture<'static, Reply>, Refusal> {
        let turn = Turn::take(&self.frames)?;
        Ok(Box::pin(async move {
            let _turn = turn;
            self.answer(request, tail).await.unwrap_or_else(Reply::Refused)
        }))
    }

    async fn answer(&self, request: Request, tail: Bytes) -> Handled {
        match request {
            Request::Append { vote, previous, commit, entries } => {
                let entries = wire::entries(&entries, tail).map_err(|_| Refusal::Unreadable)?;
                self.append(vote, previous, commit, entries).await
            }
            Request::Vote { vote, last, leadership_transfer } => self.vote(vote, last, leadership_transfer).await,
            Request::PreVote { vote, last } => self.pre_vote(vote, last).await,
            Request::TransferLeader { from, to, last } => self.take_over(from, to, last).await,
            Request::SnapshotOpen { snapshot, .. } => self.inbox.open(self.state(), snapshot),
            Request::SnapshotChunk { snapshot, offset } => self.inbox.write(snapshot, offset, &tail),
            Request::SnapshotInstall { vote, snapshot } => {
                let raft = self.raft.clone();
                let install = |receiver, done: snapshots::InstallSender| {
                    self.spawn(async move {
                        let result = snapshots::install(raft, receiver, vote).await;
                        done.send_replace(Some(result));
                    });
                };
                self.inbox.install(snapshot, vote, install).await
            }
        }
    }

    async fn append(&self, vote: Vote, previous: Option<LogId>, commit: Option<LogId>, entries: Vec<Entry>) -> Handled {
        // Before it is appended, which takes a sync: a slow disk is no reason to campaign.
        if self.is_current(&vote) {
            self.timer.heard_leader();
        }
        let entries = entries.into_iter().map(entry_to_raft).collect::<Result<Vec<_>, _>>();
        let request = AppendEntriesRequest::<Types> {
            vote: read(&vote)?,
            prev_log_id: previous.map(to_raft),
            entries: entries.map_err(|_| Refusal::Unreadable)?,
            leader_commit: commit.map(to_raft),
        };
        let response = self.raft.append_entries(request).await.map_err(|_| Refusal::Stopped)?;
        let reply = match response {
            AppendEntriesResponse::Success => AppendReply::Success,
            AppendEntriesResponse::PartialSuccess(last) => AppendReply::Partial(last.as_ref().map(from_raft)),
            AppendEntriesResponse::Conflict => AppendReply::Conflict,
            AppendEntriesResponse::HigherVote(vote) => AppendReply::HigherVote(vote_from_raft(&vote)),
        };
        if matches!(reply, AppendReply::Success) {
            self.freshness.heard(commit.map_or(0, |id| id.index), *self.machine.applied.borrow());
        }
        Ok(Reply::Append(reply))
    }

    async fn vote(&self, vote: Vote, last: Option<LogId>, leadership_transfer: bool) -> Handled {
        if self.may_be_leased() {
            return Err(Refusal::Leased);
        }
        let request = VoteRequest::<Types> { vote: read(&vote)?, last_log_id: last.map(to_raft), leadership_transfer };
        let response = self.raft.vote(request).await.map_err(|_| Refusal::Stopped)?;
        if response.vote_granted {
            self.timer.granted_vote();
        }
        let last = response.last_log_id.as_ref().map(from_raft);
        Ok(Reply::Vote { vote: vote_from_raft(&response.vote), last, granted: response.vote_granted })
    }

    async fn pre_vote(&self, vote: Vote, last: Option<LogId>) -> Handled {
        if self.may_be_leased() {
            return Err(Refusal::Leased);
        }
        let request = VoteRequest::<Types>::new(read(&vote)?, last.map(to_raft));
        let response = self.raft.pre_vote(request).await.map_err(|_| Refusal::Stopped)?;
        let last = response.last_log_id.as_ref().map(from_raft);
        Ok(Reply::Vote { vote: vote_from_raft(&response.vote), last, granted: response.vote_granted })
    }

    async fn take_over(&self, from: Vote, to: ReplicaId, last: Option<LogId>) -> Handled {
        if self.may_be_leased() {
            return Err(Refusal::Leased);
        }
        let request = TransferLeaderRequest::<Types>::new(read(&from)?, to, last.map(to_raft));
        let response = self.raft.handle_transfer_leader(request).await.map_err(|_| Refusal::Stopped)?;
        Ok(Reply::TransferLeader(match response {
            Ok(()) => TransferReply::Accepted,
            Err(TransferLeaderError::VoteChanged { expected, actual }) => {
                TransferReply::VoteChanged { expected: vote_from_raft(&expected), actual: vote_from_raft(&actual) }
            }
            Err(TransferLeaderError::LogNotFlushed { expected, actual }) => TransferReply::LogNotFlushed {
                expected: expected.as_ref().map(from_raft),
                actual: actual.as_ref().map(from_raft),
            },
        }))
    }
}

fn read(vote: &Vote) -> Result<super::types::RaftVoteOf, Refusal> {
    vote_to_raft(vote).ok_or(Refusal::Unreadable)
}

/// One frame's share of what a group may hold.
struct Turn(Arc<AtomicUsize>);

impl Turn {
    fn take(frames: &Arc<AtomicUsize>) -> Result<Self, Refusal> {
        let turn = Turn(frames.clone());
        if frames.fetch_add(1, Ordering::Relaxed) < FRAMES_MAX { Ok(turn) } else { Err(Refusal::Busy) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
