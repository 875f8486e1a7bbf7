//! What openraft calls its network: one [`PeerClient`] per group, target and lane, which turns
//! openraft's calls into frames.
//!
//! Every wait has a deadline here, because openraft sets none on streams. A failure to reach the
//! peer is `Unreachable`, which makes openraft pause; a lost or late reply is `Network` or
//! `Timeout`, after which it tries again soon.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use openraft::{AnyError, OptionalSend};
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep};

use crate::raft::fair_budget::RaftBudgets;
use crate::raft::log_store::Tip;
use crate::raft::state_machine::SnapshotData;
use crate::raft::transport::lanes::{Lanes, read_reply};
use crate::raft::transport::snapshot_transfers::SnapshotTransfers;
use crate::raft::transport::snapshots;
use crate::raft::transport::wire::{
    self, AppendReply, FrameHeader, PeerRefusal, PeerReply, PeerRequest, TransferReply,
    UnsealedFrame,
};
use crate::raft::transport::{Lane, LaneError};
use crate::raft::types::{
    GroupMember, RaftLogId, RaftVoteOf, Types, entry_from_raft, from_raft, to_raft, vote_from_raft,
    vote_to_raft,
};
use crate::storage::ReplicaKey;
use crate::telemetry::rarely;
use crate::types::{NodeId, ReplicaId};

/// AppendStream of one group to one peer that may be without a reply: enough to fill the way to the
/// peer while its disk syncs.
const WINDOW: usize = 16;
/// How often a follower must say that it lacks what it has acknowledged.
const MISSING_TIMES: u32 = 3;
/// Bytes of them. One larger append may always go alone.
const WINDOW_BYTES: usize = 4 << 20;
type RpcResult<T> = Result<T, RPCError<Types>>;

/// Makes the clients of one group.
#[derive(Clone)]
pub struct Network {
    pub key: ReplicaKey,
    pub lanes: Arc<Lanes>,
    /// The end of the group's log here.
    pub tip: Arc<Tip>,
    pub transfers: SnapshotTransfers,
    /// How long an append may be without a reply, beside the time that its bytes and those before
    /// them take on a slow way. A follower that syncs slowly is not a follower that is gone.
    pub append_timeout: Duration,
    /// How long one step of a snapshot transfer may take.
    pub snapshot_step_timeout: Duration,
    /// How long a lease is, where reads rest on leases.
    pub lease: Option<Duration>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = PeerClient;

    async fn new_client(&mut self, target: ReplicaId, member: &GroupMember) -> PeerClient {
        self.client(target, member.node, Lane::Log)
    }

    async fn new_heartbeat_client(
        &mut self,
        target: ReplicaId,
        member: &GroupMember,
    ) -> PeerClient {
        self.client(target, member.node, Lane::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, target: ReplicaId, member: &GroupMember) -> PeerClient {
        self.client(target, member.node, Lane::Snapshot)
    }
}

impl Network {
    /// The way to a replica for what openraft has no part in.
    pub fn log_client(&self, target: ReplicaId, node: NodeId) -> PeerClient {
        self.client(target, node, Lane::Log)
    }

    /// The way to a replica for a snapshot that openraft does not know of.
    pub fn snapshot_client(&self, target: ReplicaId, node: NodeId) -> PeerClient {
        self.client(target, node, Lane::Snapshot)
    }

    fn client(&self, target: ReplicaId, to: NodeId, lane: Lane) -> PeerClient {
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

/// What a follower has acknowledged to this leader, over all the streams of one client. It is on
/// the follower's disk, and only another leader could have had it cut off, whose vote the follower
/// would answer with: where it is missing, the disk is an older one.
#[derive(Default)]
struct AckedLog {
    /// Of the vote under which it was acknowledged.
    term: AtomicU64,
    /// The index after the last acknowledged one.
    end: AtomicU64,
    /// Times in a row that it was missing.
    missing: AtomicU32,
}

impl AckedLog {
    /// Returns whether the entry at this place is known to be on the follower's disk.
    fn has(&self, term: u64, previous: Option<RaftLogId>) -> bool {
        let end = self.end.load(Ordering::Relaxed);
        self.term.load(Ordering::Relaxed) == term
            && previous.is_some_and(|previous| previous.index < end)
    }

    fn note(&self, term: u64, matching: Option<RaftLogId>) {
        let Some(matching) = matching else { return };
        self.missing.store(0, Ordering::Relaxed);
        if self.term.swap(term, Ordering::Relaxed) == term {
            self.end.fetch_max(matching.index + 1, Ordering::Relaxed);
        } else {
            self.end.store(matching.index + 1, Ordering::Relaxed);
        }
    }
}

/// The way of one group to one other replica, over one lane.
pub struct PeerClient {
    lanes: Arc<Lanes>,
    to: NodeId,
    lane: Lane,
    header: FrameHeader,
    network: Network,
    acked: AckedLog,
}

impl PeerClient {
    /// The memory that what is sent shares with what others send.
    pub fn budgets(&self) -> &RaftBudgets {
        self.lanes.budgets()
    }

    /// The follower lacks what it has acknowledged. It is believed when it has said so several
    /// times.
    fn note_missing(&self) {
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

    async fn wait(&self, frame: UnsealedFrame, deadline: Instant) -> Result<PeerReply, LaneError> {
        let call = self.lanes.call(self.to, self.lane, frame)?;
        let deadline = match self.lane {
            Lane::Snapshot => deadline + call.allowance(),
            // A vote that comes late is of no use.
            Lane::Log | Lane::Heartbeat => deadline,
        };
        let timeout = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout_at(deadline, call.answer).await {
            Ok(Ok(frame)) => read_reply(&frame?),
            Ok(Err(_)) => Err(LaneError::Closed),
            Err(_) => Err(LaneError::Late(timeout)),
        }
    }

    async fn ask_raft(&self, request: PeerRequest, option: &RPCOption) -> RpcResult<PeerReply> {
        self.ask(&request, &[], Instant::now() + option.soft_ttl())
            .await
            .map_err(rpc_error)
    }

    fn append_frame(&self, request: &mut AppendEntriesRequest<Types>) -> UnsealedFrame {
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

    async fn ask_vote(
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

impl RaftNetworkV2<Types> for PeerClient {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        mut request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<Types>> {
        let frame = self.append_frame(&mut request);
        let reply = self
            .wait(frame, Instant::now() + option.soft_ttl())
            .await
            .map_err(rpc_error)?;
        read_append_reply(&reply)
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<Types>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        // Heartbeats come this way too, and openraft gives those up after its own time.
        let timeout = if self.lane == Lane::Log {
            self.network.append_timeout
        } else {
            option.soft_ttl()
        };
        let stream = AppendStream {
            client: self,
            input: Some(input),
            window: VecDeque::with_capacity(WINDOW),
            window_bytes: 0,
            timeout,
            timer: Box::pin(tokio::time::sleep(timeout)),
            grown: Box::pin(self.network.tip.grown()),
            taken: None,
            failed: None,
            acknowledged: None,
        };
        Box::pin(async move { Ok(Box::pin(stream) as BoxStream<'s, _>) })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<Types>> {
        let last = request.last_log_id.as_ref().map(from_raft);
        let vote = vote_from_raft(&request.vote);
        self.ask_vote(
            PeerRequest::Vote {
                vote,
                last,
                leadership_transfer: request.leadership_transfer,
            },
            &option,
        )
        .await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<Types>> {
        let last = request.last_log_id.as_ref().map(from_raft);
        self.ask_vote(
            PeerRequest::PreVote {
                vote: vote_from_raft(&request.vote),
                last,
            },
            &option,
        )
        .await
    }

    async fn full_snapshot(
        &mut self,
        vote: RaftVoteOf,
        snapshot: SnapshotOf<Types, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let step_timeout = self.network.snapshot_step_timeout;
        let SnapshotData::Map(snapshot) = snapshot.snapshot else {
            // Pauses before it is tried again. By then this witness has handed over to a replica
            // that has one.
            let reason = AnyError::error("a witness has no snapshot");
            return Err(StreamingError::Unreachable(Unreachable::new(&reason)));
        };
        let index = snapshot.applied().log_id.map_or(0, |id| id.index);
        let _guard = self
            .network
            .transfers
            .begin(self.header.target, index, snapshot.bytes_len());
        let send = async {
            let began = Instant::now();
            let sent = snapshots::send(self, vote_from_raft(&vote), &snapshot, step_timeout).await;
            // openraft takes it for a word of the follower as of the beginning, and leases run from
            // such words; but a follower that answers about a snapshot gives no lease. So it is
            // told when a lease as of then has run out.
            if let (Ok(_), Some(lease)) = (&sent, self.network.lease) {
                tokio::time::sleep_until(began + lease).await;
            }
            sent
        };
        tokio::select! {
            biased;
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = send => {
                let vote = sent.map_err(|error| StreamingError::from(rpc_error(error)))?;
                Ok(SnapshotResponse::new(read_vote(&vote).map_err(StreamingError::from)?))
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> RpcResult<TransferLeaderResponse<Types>> {
        use openraft::raft::TransferLeaderError::{LogNotFlushed, VoteChanged};
        let last = request.last_log_id().map(from_raft);
        let from = vote_from_raft(request.from_leader());
        let request = PeerRequest::TransferLeader {
            from,
            to: *request.to_node_id(),
            last,
        };
        match self.ask_raft(request, &option).await? {
            PeerReply::TransferLeader(TransferReply::Accepted) => Ok(Ok(())),
            PeerReply::TransferLeader(TransferReply::VoteChanged { expected, actual }) => {
                Ok(Err(VoteChanged {
                    expected: read_vote(&expected)?,
                    actual: read_vote(&actual)?,
                }))
            }
            PeerReply::TransferLeader(TransferReply::LogNotFlushed { expected, actual }) => {
                Ok(Err(LogNotFlushed {
                    expected: expected.map(to_raft),
                    actual: actual.map(to_raft),
                }))
            }
            other => Err(unexpected(&other)),
        }
    }
}

/// Pipelined appends: requests leave as they come, up to a window; results are handed back in the
/// order of the requests.
///
/// openraft notes when it made a request, and takes that for the time of the follower's answer once
/// a result says that the follower has all up to the end of the request. A request without entries
/// ends where the one before it does: that one's answer, given perhaps before, would pass for the
/// answer to it, and a leader that was paused and deposed would confirm a read by what a follower
/// said before it voted for another. So none is asked for while others are on their way, which also
/// saves as many frames as there are entries: the next one with entries tells what is committed as
/// well. And where one slips through, a result waits until everything is answered that it would
/// speak for.
struct AppendStream<'s, S> {
    client: &'s PeerClient,
    input: Option<S>,
    window: VecDeque<InFlightAppend>,
    window_bytes: usize,
    /// Of a request that is small and alone on its way.
    timeout: Duration,
    /// Of the oldest request.
    timer: Pin<Box<Sleep>>,
    /// Done when an entry was appended since it was made.
    grown: Pin<Box<OwnedNotified>>,
    /// Where the last request ended that was taken from the input.
    taken: Option<RaftLogId>,
    /// A request could not be sent; said once the earlier ones are answered.
    failed: Option<LaneError>,
    /// The last that the follower is known to have.
    acknowledged: Option<RaftLogId>,
}

struct InFlightAppend {
    answer: crate::raft::transport::lanes::PendingReply,
    bytes: usize,
    /// How long its answer is waited for.
    timeout: Duration,
    due: Instant,
    previous: Option<RaftLogId>,
    last: Option<RaftLogId>,
    /// Of the leader's vote.
    term: u64,
    /// What it follows had been acknowledged when it was sent.
    follows_acked: bool,
}

impl<S> AppendStream<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Unpin,
{
    fn send(&mut self, mut request: AppendEntriesRequest<Types>) {
        let previous = request.prev_log_id;
        let last = request
            .entries
            .last()
            .map(|entry| entry.log_id)
            .or(previous);
        self.taken = last;
        let term = vote_from_raft(&request.vote).term;
        let follows_acked = match self.client.lane {
            Lane::Log => self.client.acked.has(term, previous),
            // openraft has them follow what was acknowledged to this leader.
            Lane::Heartbeat => previous.is_some(),
            Lane::Snapshot => false,
        };
        let frame = self.client.append_frame(&mut request);
        let bytes = frame.bytes_len();
        match self
            .client
            .lanes
            .call(self.client.to, self.client.lane, frame)
        {
            Ok(call) => {
                let allowance = match self.client.lane {
                    Lane::Log => call.allowance(),
                    Lane::Heartbeat | Lane::Snapshot => Duration::ZERO,
                };
                let timeout = self.timeout + allowance;
                let due = Instant::now() + timeout;
                if self.window.is_empty() {
                    self.timer.as_mut().reset(due);
                }
                self.window_bytes += bytes;
                let answer = call.answer;
                self.window.push_back(InFlightAppend {
                    answer,
                    bytes,
                    timeout,
                    due,
                    previous,
                    last,
                    term,
                    follows_acked,
                });
            }
            Err(error) => {
                self.failed = Some(error);
                self.input = None;
            }
        }
    }

    fn fill_window(&mut self, context: &mut Context<'_>) {
        while self.window.len() < WINDOW && self.window_bytes < WINDOW_BYTES {
            if !self.window.is_empty() && !self.has_entries(context) {
                return;
            }
            let Some(input) = &mut self.input else { return };
            match input.poll_next_unpin(context) {
                Poll::Ready(Some(request)) => self.send(request),
                Poll::Ready(None) => self.input = None,
                Poll::Pending => return,
            }
        }
    }

    /// Whether the log has entries that were not taken yet. If not, this is polled again when it
    /// has.
    fn has_entries(&mut self, context: &mut Context<'_>) -> bool {
        while self.grown.as_mut().poll(context).is_ready() {
            self.grown = Box::pin(self.client.network.tip.grown());
        }
        self.client.network.tip.last() > self.taken.map(|id| id.index)
    }

    /// Whether openraft would take a result that the follower matches up to here for the answer to
    /// a request that it has not answered.
    fn speaks_for_others(&self, matching: Option<RaftLogId>) -> bool {
        let is_failed = self.failed.is_some() && self.taken <= matching;
        is_failed || self.window.iter().any(|later| later.last <= matching)
    }

    /// The oldest request is done with; the timer is now the next one's.
    fn pop(&mut self) -> Option<InFlightAppend> {
        let done = self.window.pop_front()?;
        self.window_bytes -= done.bytes;
        if let Some(next) = self.window.front() {
            self.timer.as_mut().reset(next.due);
        }
        Some(done)
    }

    /// The result of an append that was answered. A conflict where the follower is known to match
    /// can't be: nothing that was acknowledged is lost, and a lane keeps the order of its frames.
    /// openraft does not look: it would search below what matches, and where the log is purged up
    /// to there, send snapshots without end. So it is an error, and tried again.
    fn read(
        &mut self,
        done: &InFlightAppend,
        reply: &PeerReply,
    ) -> RpcResult<StreamAppendResult<Types>> {
        let response = read_append_reply(reply)?;
        // Heartbeats follow what was acknowledged.
        let is_known = self.client.lane == Lane::Heartbeat || done.previous <= self.acknowledged;
        if matches!(response, AppendEntriesResponse::Conflict) && (is_known || done.follows_acked) {
            rarely!(
                warn,
                to = %self.client.to,
                group = %self.client.header.group,
                previous = ?done.previous,
                "a conflict that can't be"
            );
            if done.follows_acked {
                self.client.note_missing();
            }
            return Err(network_error(
                "a conflict where the logs are known to match",
            ));
        }
        let result = response.into_stream_result(done.previous, done.last);
        if let Ok(matching) = &result {
            self.acknowledged = self.acknowledged.max(*matching);
            self.client.acked.note(done.term, *matching);
        }
        Ok(result)
    }
}

impl<S> Stream for AppendStream<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Unpin,
{
    type Item = RpcResult<StreamAppendResult<Types>>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            this.fill_window(context);
            let Some(oldest) = this.window.front_mut() else {
                return match (this.failed.take(), &this.input) {
                    (Some(error), _) => Poll::Ready(Some(Err(rpc_error(error)))),
                    (None, None) => Poll::Ready(None),
                    (None, Some(_)) => Poll::Pending,
                };
            };
            let reply = match oldest.answer.poll_unpin(context) {
                Poll::Ready(Ok(frame)) => frame.and_then(|frame| read_reply(&frame)),
                Poll::Ready(Err(_)) => Err(LaneError::Closed),
                Poll::Pending => match this.timer.poll_unpin(context) {
                    Poll::Ready(()) => Err(LaneError::Late(oldest.timeout)),
                    Poll::Pending => return Poll::Pending,
                },
            };
            let done = this.pop().expect("the window was not empty");
            let result = reply
                .map_err(rpc_error)
                .and_then(|reply| this.read(&done, &reply));
            if matches!(result, Ok(Ok(matching)) if this.speaks_for_others(matching)) {
                continue;
            }
            if result.is_err() {
                // openraft ends the stream at an error; what is still under way is given up.
                this.input = None;
                this.window.clear();
            }
            return Poll::Ready(Some(result));
        }
    }
}

fn read_append_reply(reply: &PeerReply) -> RpcResult<AppendEntriesResponse<Types>> {
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

fn read_vote(vote: &crate::storage::log::Vote) -> RpcResult<RaftVoteOf> {
    vote_to_raft(vote).ok_or_else(|| network_error("a vote for nobody"))
}

fn unexpected(reply: &PeerReply) -> RPCError<Types> {
    network_error(&format!("a reply of another kind: {reply:?}"))
}

fn network_error(reason: &str) -> RPCError<Types> {
    RPCError::Network(NetworkError::new(&AnyError::error(reason)))
}

fn rpc_error(error: LaneError) -> RPCError<Types> {
    match error {
        LaneError::Broken(_) | LaneError::Late(_) => RPCError::Network(NetworkError::new(&error)),
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
