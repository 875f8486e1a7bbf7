//! [`PeerClient`]: sends the requests of one group to one other replica over one lane, and waits
//! for each reply until a deadline.
//!
//! A failure to reach the peer is `Unreachable`, which makes openraft pause; a lost or late reply
//! is `Network` or `Timeout`, after which it tries again soon.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use openraft::AnyError;
use openraft::errors::{NetworkError, RPCError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteResponse};
use tokio::time::Instant;

use super::lanes::{Lanes, read_reply};
use super::snapshot_transfers::SnapshotTransfers;
use super::wire::{
    self, AppendReply, FrameHeader, PeerRefusal, PeerReply, PeerRequest, UnsealedFrame,
};
use super::{Lane, LaneError};
use crate::raft::fair_budget::RaftBudgets;
use crate::raft::log_store::Tip;
use crate::raft::timings::RaftTimings;
use crate::raft::types::{
    RaftLogId, RaftVoteOf, Types, entry_from_raft, from_raft, to_raft, vote_from_raft, vote_to_raft,
};
use crate::storage::ReplicaKey;
use crate::types::{NodeId, ReplicaId};

/// Number of times in a row that a follower must lack what it has acknowledged before it is
/// believed.
const MISSING_TIMES: u32 = 3;

/// The result of a request that openraft made.
pub type RpcResult<T> = Result<T, RPCError<Types>>;

/// Makes the clients of one group, and holds what they share.
#[derive(Clone)]
pub struct Network {
    pub key: ReplicaKey,
    pub lanes: Arc<Lanes>,
    /// The end of the group's log on this node.
    pub tip: Arc<Tip>,
    pub transfers: SnapshotTransfers,
    /// Time that an append may be without a reply, on top of the time that its bytes and those
    /// before them take on a slow connection. A follower that syncs slowly is not a follower that
    /// is gone.
    pub append_timeout: Duration,
    /// Time that one step of a snapshot transfer may take.
    pub snapshot_step_timeout: Duration,
    /// Length of a lease, where reads rest on leases.
    pub lease: Option<Duration>,
}

impl Network {
    /// Returns the network of a group whose log ends at `tip`.
    pub fn new(key: ReplicaKey, lanes: Arc<Lanes>, tip: Arc<Tip>, timings: &RaftTimings) -> Self {
        Self {
            key,
            lanes,
            tip,
            transfers: SnapshotTransfers::default(),
            append_timeout: timings.append_timeout(),
            snapshot_step_timeout: timings.snapshot_step_timeout(),
            lease: timings.lease(),
        }
    }

    /// Returns a client for requests that openraft has no part in.
    pub fn log_client(&self, target: ReplicaId, node: NodeId) -> PeerClient {
        self.client(target, node, Lane::Log)
    }

    /// Returns a client for a snapshot that openraft does not know of.
    pub fn snapshot_client(&self, target: ReplicaId, node: NodeId) -> PeerClient {
        self.client(target, node, Lane::Snapshot)
    }

    /// Returns the client of one replica over one lane.
    pub fn client(&self, target: ReplicaId, to: NodeId, lane: Lane) -> PeerClient {
        let header = FrameHeader {
            group: self.key.group,
            sender: self.key.replica,
            target,
        };
        PeerClient {
            lanes: self.lanes.clone(),
            to,
            lane,
            header,
            network: self.clone(),
            acked: AckedLog::default(),
        }
    }
}

/// The entries that a follower has acknowledged to this leader, over all streams of one client.
/// They are on the follower's disk, and only another leader could have had them truncated, whose
/// vote the follower would answer with. If they are missing, the disk is an older copy.
#[derive(Default)]
pub struct AckedLog {
    /// Term of the vote under which they were acknowledged.
    term: AtomicU64,
    /// Index after the last acknowledged entry.
    end: AtomicU64,
    /// Number of times in a row that they were missing.
    missing: AtomicU32,
}

impl AckedLog {
    /// Returns true if the entry at `previous` is known to be on the follower's disk.
    pub fn has(&self, term: u64, previous: Option<RaftLogId>) -> bool {
        let end = self.end.load(Ordering::Relaxed);
        self.term.load(Ordering::Relaxed) == term
            && previous.is_some_and(|previous| previous.index < end)
    }

    /// Notes that the follower has acknowledged everything through `matching`.
    pub fn note(&self, term: u64, matching: Option<RaftLogId>) {
        let Some(matching) = matching else { return };
        self.missing.store(0, Ordering::Relaxed);

        // Another leader may have replaced what was acknowledged in an earlier term.
        if self.term.swap(term, Ordering::Relaxed) == term {
            self.end.fetch_max(matching.index + 1, Ordering::Relaxed);
        } else {
            self.end.store(matching.index + 1, Ordering::Relaxed);
        }
    }
}

/// Sends the requests of one group to one other replica, over one lane.
pub struct PeerClient {
    pub(super) lanes: Arc<Lanes>,
    pub(super) to: NodeId,
    pub(super) lane: Lane,
    pub(super) header: FrameHeader,
    pub(super) network: Network,
    pub(super) acked: AckedLog,
}

impl PeerClient {
    /// Returns the memory budgets that its requests are charged to.
    pub fn budgets(&self) -> &RaftBudgets {
        self.lanes.budgets()
    }

    /// Notes that the follower lacks what it has acknowledged. It is believed when it has said so
    /// several times.
    pub fn note_missing(&self) {
        if self.acked.missing.fetch_add(1, Ordering::Relaxed) + 1 >= MISSING_TIMES {
            self.lanes.lost_acknowledged(self.to);
        }
    }

    /// Sends a request and waits for its reply until `deadline`.
    pub async fn ask(
        &self,
        request: &PeerRequest,
        tail: &[u8],
        deadline: Instant,
    ) -> Result<PeerReply, LaneError> {
        self.wait(wire::encode_request(self.header, request, tail), deadline)
            .await
    }

    /// Sends a frame and waits for its reply until `deadline`.
    pub async fn wait(
        &self,
        frame: UnsealedFrame,
        deadline: Instant,
    ) -> Result<PeerReply, LaneError> {
        let call = self.lanes.call(self.to, self.lane, frame)?;
        let deadline = match self.lane {
            Lane::Snapshot => deadline + call.allowance(),
            // A late vote is useless, so the deadline is not extended.
            Lane::Log | Lane::Heartbeat => deadline,
        };
        let timeout = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout_at(deadline, call.answer).await {
            Ok(Ok(frame)) => read_reply(&frame?),
            Ok(Err(_)) => Err(LaneError::Closed),
            Err(_) => Err(LaneError::Late(timeout)),
        }
    }

    /// Sends a request of openraft's and waits for its reply until openraft's deadline.
    pub async fn ask_raft(&self, request: PeerRequest, option: &RPCOption) -> RpcResult<PeerReply> {
        self.ask(&request, &[], Instant::now() + option.soft_ttl())
            .await
            .map_err(rpc_error)
    }

    /// Encodes an append, and takes its entries out of `request`.
    pub fn append_frame(&self, request: &mut AppendEntriesRequest<Types>) -> UnsealedFrame {
        let entries: Vec<_> = std::mem::take(&mut request.entries)
            .into_iter()
            .map(entry_from_raft)
            .collect();
        let previous = request.prev_log_id.as_ref().map(from_raft);
        let commit = request.leader_commit.as_ref().map(from_raft);
        wire::encode_append(
            self.header,
            vote_from_raft(&request.vote),
            previous,
            commit,
            &entries,
        )
    }

    /// Asks for a vote or a pre-vote.
    pub async fn ask_vote(
        &self,
        request: PeerRequest,
        option: &RPCOption,
    ) -> RpcResult<VoteResponse<Types>> {
        match self.ask_raft(request, option).await? {
            PeerReply::Vote {
                vote,
                last,
                granted,
            } => Ok(VoteResponse::new(
                read_vote(&vote)?,
                last.map(to_raft),
                granted,
            )),
            other => Err(unexpected(&other)),
        }
    }
}

/// Translates the reply to an append.
pub fn read_append_reply(reply: &PeerReply) -> RpcResult<AppendEntriesResponse<Types>> {
    match reply {
        PeerReply::Append(AppendReply::Success) => Ok(AppendEntriesResponse::Success),
        PeerReply::Append(AppendReply::Partial(last)) => {
            Ok(AppendEntriesResponse::PartialSuccess(last.map(to_raft)))
        }
        PeerReply::Append(AppendReply::Conflict) => Ok(AppendEntriesResponse::Conflict),
        PeerReply::Append(AppendReply::HigherVote(vote)) => {
            Ok(AppendEntriesResponse::HigherVote(read_vote(vote)?))
        }
        other => Err(unexpected(other)),
    }
}

/// Translates a vote of a reply.
pub fn read_vote(vote: &crate::storage::log::Vote) -> RpcResult<RaftVoteOf> {
    vote_to_raft(vote).ok_or_else(|| network_error("a vote for nobody"))
}

/// Returns the error of a reply of another kind.
pub fn unexpected(reply: &PeerReply) -> RPCError<Types> {
    network_error(&format!("a reply of another kind: {reply:?}"))
}

/// Returns an error after which openraft tries again soon.
pub fn network_error(reason: &str) -> RPCError<Types> {
    RPCError::Network(NetworkError::new(&AnyError::error(reason)))
}

/// Translates an error of a lane.
pub fn rpc_error(error: LaneError) -> RPCError<Types> {
    match error {
        // The peer may be well, so openraft tries again soon.
        LaneError::Broken(_) | LaneError::Late(_) => RPCError::Network(NetworkError::new(&error)),
        // Another attempt now would fail as well, so openraft pauses.
        LaneError::Unresolved(_)
        | LaneError::Down(_)
        | LaneError::Full(_)
        | LaneError::Unreadable(_)
        | LaneError::Closed
        | LaneError::Refused(
            PeerRefusal::OtherCluster
            | PeerRefusal::OtherNode(_)
            | PeerRefusal::OtherDirectory(_)
            | PeerRefusal::NoCluster
            | PeerRefusal::NoReplica(_)
            | PeerRefusal::OtherReplica(_)
            | PeerRefusal::Stopped
            | PeerRefusal::Busy
            | PeerRefusal::Leased
            | PeerRefusal::Failed(_)
            | PeerRefusal::Unreadable
            | PeerRefusal::Outdated { .. }
            | PeerRefusal::Doubled
            | PeerRefusal::OtherTimings(_),
        ) => RPCError::Unreachable(Unreachable::new(&error)),
    }
}
