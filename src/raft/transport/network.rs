//! openraft's network: turns its calls into requests of a [`PeerClient`], one per group, target and
//! lane.
//!
//! Every wait has a deadline here, because openraft sets none on streams.

use std::future::Future;

use futures::Stream;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use openraft::{AnyError, OptionalSend};
use tokio::time::Instant;

use super::append_stream::AppendStream;
use super::peer_client::{
    Network, PeerClient, RpcResult, read_append_reply, read_vote, rpc_error, unexpected,
};
use crate::raft::replica_store::SnapshotData;
use crate::raft::transport::Lane;
use crate::raft::transport::snapshot_sender;
use crate::raft::transport::wire::{PeerReply, PeerRequest, TransferReply};
use crate::raft::types::{GroupMember, RaftVoteOf, Types, from_raft, to_raft, vote_from_raft};
use crate::types::ReplicaId;

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
        // Heartbeats are streamed too, and openraft gives those up after its own timeout.
        let timeout = if self.lane == Lane::Log {
            self.network.append_timeout
        } else {
            option.soft_ttl()
        };
        let stream = AppendStream::new(self, input, timeout);
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
            // Makes openraft pause before it tries again. By then this witness has handed over to a
            // replica that has a snapshot.
            let reason = AnyError::error("a witness has no snapshot");
            return Err(StreamingError::Unreachable(Unreachable::new(&reason)));
        };

        // Keeps the log after the snapshot until the follower has caught up.
        let index = snapshot.applied().log_id.map_or(0, |id| id.index);
        let _guard = self
            .network
            .transfers
            .begin(self.header.target, index, snapshot.bytes_len());

        let send = async {
            let began = Instant::now();
            let sent =
                snapshot_sender::send(self, vote_from_raft(&vote), &snapshot, step_timeout).await;
            // openraft takes the result for a message of the follower as of the beginning, and
            // leases run from such messages; but a follower that answers about a snapshot grants no
            // lease. So the result is held back until a lease as of then would have expired.
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
