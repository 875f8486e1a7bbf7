//! What openraft is told of the answers to its appends.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::channel::mpsc::UnboundedReceiver;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt, stream};
use openraft::errors::RPCError;
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{AppendEntriesRequest, StreamAppendError};

use super::cluster::{CLUSTER, PACE, TestCluster, directory, key};
use crate::raft::log_store::Tip;
use crate::raft::replica_store::SnapshotData;
use crate::raft::state_machine::with_meta;
use crate::raft::transport::lanes::{Lanes, LanesParts};
use crate::raft::transport::peer_client::Network;
use crate::raft::transport::snapshot_transfers::SnapshotTransfers;
use crate::raft::transport::wire::{
    self, AppendReply, FrameReader, PeerReply, PeerRequest, ReceivedFrame,
};
use crate::raft::transport::{
    Dial, Incoming, Lane, LaneError, NodeIdentity, Outgoing, Peer, Resolver,
};
use crate::raft::types::{GroupMember, Types, entry_to_raft, to_raft, vote_to_raft};
use crate::storage::log::{LogEntry, LogPayload, Vote};
use crate::supervisor::Supervisor;
use crate::types::{LogId, NodeId, ReplicaId, ReplicaKind};

/// A peer that gives these answers, one to each frame.
struct Scripted(Arc<Mutex<VecDeque<AppendReply>>>);

impl Dial for Scripted {
    fn dial(
        &self,
        _: NodeId,
        _: Peer,
        _: Lane,
        outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<Incoming, LaneError>> {
        let (script, mut reader, mut is_greeted) = (self.0.clone(), FrameReader::default(), false);
        let replies = outgoing.map(move |chunk| {
            reader.push(chunk);
            let mut out = BytesMut::new();
            while let Some(frame) = reader.next()? {
                if std::mem::replace(&mut is_greeted, true)
                    && let Some(reply) = script.lock().pop_front()
                {
                    wire::encode_reply(&mut out, frame.sequence, &PeerReply::Append(reply));
                }
            }
            Ok(out.freeze())
        });
        Box::pin(async move { Ok(Box::pin(replies) as Incoming) })
    }
}

/// A peer that has everything that it is sent, over a way that carries so many bytes in a second.
struct Far {
    bytes_per_second: u64,
}

impl Dial for Far {
    fn dial(
        &self,
        _: NodeId,
        _: Peer,
        _: Lane,
        outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<Incoming, LaneError>> {
        let millis = 1000.0 / self.bytes_per_second as f64;
        let (mut reader, mut is_greeted) = (FrameReader::default(), false);
        let carried = outgoing.then(move |chunk| async move {
            let takes = chunk.len() as f64 * millis;
            tokio::time::sleep(Duration::from_micros((takes * 1000.0) as u64)).await;
            chunk
        });
        let replies = carried.map(move |chunk| {
            reader.push(chunk);
            let mut out = BytesMut::new();
            while let Some(frame) = reader.next()? {
                if std::mem::replace(&mut is_greeted, true) {
                    let reply = PeerReply::Append(AppendReply::Success);
                    wire::encode_reply(&mut out, frame.sequence, &reply);
                }
            }
            Ok(out.freeze())
        });
        Box::pin(async move { Ok(Box::pin(replies) as Incoming) })
    }
}

/// A witness that takes any mark, and answers at once.
struct Marked;

impl Dial for Marked {
    fn dial(
        &self,
        _: NodeId,
        _: Peer,
        _: Lane,
        outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<Incoming, LaneError>> {
        let (mut reader, mut is_greeted) = (FrameReader::default(), false);
        let replies = outgoing.map(move |chunk| {
            reader.push(chunk);
            let mut out = BytesMut::new();
            while let Some(frame) = reader.next()? {
                if !std::mem::replace(&mut is_greeted, true) {
                    continue;
                }
                let reply = match frame.request()?.1 {
                    PeerRequest::Watermark { vote, .. } => PeerReply::SnapshotInstalled { vote },
                    _ => PeerReply::WatermarkWanted,
                };
                wire::encode_reply(&mut out, frame.sequence, &reply);
            }
            Ok(out.freeze())
        });
        Box::pin(async move { Ok(Box::pin(replies) as Incoming) })
    }
}

/// A peer that takes every frame, and answers when it is told to.
struct Patient {
    /// The sequences of the appends that came, and what they say.
    seen: Arc<Mutex<Vec<(u64, String)>>>,
    replies: Mutex<Option<UnboundedReceiver<Bytes>>>,
}

impl Dial for Patient {
    fn dial(
        &self,
        _: NodeId,
        _: Peer,
        _: Lane,
        mut outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<Incoming, LaneError>> {
        let (seen, mut reader, mut is_greeted) = (self.seen.clone(), FrameReader::default(), false);
        tokio::spawn(async move {
            while let Some(chunk) = outgoing.next().await {
                reader.push(chunk);
                while let Some(frame) = reader.next().expect("frames") {
                    if std::mem::replace(&mut is_greeted, true) {
                        seen.lock().push((frame.sequence, said(&frame)));
                    }
                }
            }
        });
        let replies = self.replies.lock().take().expect("one lane");
        Box::pin(async move { Ok(Box::pin(replies.map(Ok)) as Incoming) })
    }
}

/// What an append says, in words.
fn said(frame: &ReceivedFrame) -> String {
    match frame.request().expect("a request") {
        (
            _,
            PeerRequest::Append {
                commit, entries, ..
            },
            tail,
        ) => {
            let entries = wire::entries(&entries, tail)
                .expect("readable entries")
                .len();
            format!(
                "{entries} entries, {} committed",
                commit.map_or(0, |id| id.index)
            )
        }
        (_, other, _) => format!("{other:?}"),
    }
}

/// Knows every node.
struct Anywhere;

impl Resolver for Anywhere {
    fn level(&self) -> u16 {
        0
    }

    fn resolve(&self, node: NodeId) -> Option<Peer> {
        Some(Peer {
            address: "a:1".parse().expect("an address"),
            directory: directory(node),
        })
    }
}

fn log_id(index: u64) -> LogId {
    LogId { term: 1, index }
}

/// An append of one entry, which follows the one before it.
fn append(index: u64) -> AppendEntriesRequest<Types> {
    let vote = Vote {
        term: 1,
        voted_for: Some(ReplicaId(1)),
        committed: true,
    };
    let entry = LogEntry {
        id: log_id(index),
        payload: LogPayload::Blank,
    };
    AppendEntriesRequest {
        vote: vote_to_raft(&vote).expect("a vote for somebody"),
        prev_log_id: index.checked_sub(1).map(log_id).map(to_raft),
        entries: vec![entry_to_raft(entry).expect("a readable entry")],
        leader_commit: None,
    }
}

/// What is told of a commit when there are no entries to go with it.
fn commit(index: u64) -> AppendEntriesRequest<Types> {
    let last = Some(to_raft(log_id(index)));
    AppendEntriesRequest {
        prev_log_id: last,
        entries: Vec::new(),
        leader_commit: last,
        ..append(index)
    }
}

/// The way to a peer.
fn network_to(peer: impl Dial) -> (Network, Arc<Lanes>) {
    let identity = Arc::new(NodeIdentity::member(
        directory(NodeId(1)),
        CLUSTER,
        NodeId(1),
    ));
    let lanes = Arc::new(Lanes::new(LanesParts {
        identity,
        resolver: Arc::new(Anywhere),
        dial: Arc::new(peer),
        liveness: Arc::default(),
        reachability: Arc::default(),
        budgets: Arc::default(),
        lease_timings: PACE,
        supervisor: Supervisor::noting().0,
    }));
    let second = Duration::from_secs(1);
    let tip = Tip::new(None);
    let network = Network {
        key: key(1, 1),
        lanes: lanes.clone(),
        tip,
        transfers: SnapshotTransfers::default(),
        append_timeout: second,
        snapshot_step_timeout: second,
        lease: None,
    };
    (network, lanes)
}

/// What openraft is told, in a word for each append, when these are answered so.
async fn told(lane: Lane, appends: &[u64], script: &[AppendReply]) -> Vec<String> {
    let (mut network, lanes) = network_to(Scripted(Arc::new(Mutex::new(
        script.iter().cloned().collect(),
    ))));
    network.tip.set(appends.iter().max().copied());
    let member = GroupMember {
        node: NodeId(2),
        kind: ReplicaKind::Data,
    };
    let mut client = match lane {
        Lane::Log => network.new_client(ReplicaId(2), &member).await,
        Lane::Heartbeat => network.new_heartbeat_client(ReplicaId(2), &member).await,
        Lane::Snapshot => network.new_snapshot_client(ReplicaId(2), &member).await,
    };
    let input = stream::iter(appends.iter().copied().map(append).collect::<Vec<_>>());
    let output = client
        .stream_append(input, RPCOption::new(Duration::from_secs(1)))
        .await
        .expect("a stream");
    let words = output.map(|result| match result {
        Ok(Ok(matching)) => format!("matches {}", matching.map_or(0, |id| id.index)),
        Ok(Err(StreamAppendError::Conflict(at))) => format!("conflict {}", at.index),
        Ok(Err(StreamAppendError::HigherVote(_))) => "higher vote".to_owned(),
        Err(RPCError::Network(_)) => "network".to_owned(),
        Err(error) => format!("{error}"),
    });
    let words = words.collect().await;
    lanes.close().await;
    words
}

/// A follower comes back with the disk that it had before it acknowledged something.
#[tokio::test]
async fn what_was_acknowledged_is_not_missing_later() {
    use AppendReply::{Conflict, Success};
    let script = [Success, Conflict, Conflict, Conflict, Success];
    let (mut network, lanes) =
        network_to(Scripted(Arc::new(Mutex::new(script.into_iter().collect()))));
    network.tip.set(Some(9));
    let member = GroupMember {
        node: NodeId(2),
        kind: ReplicaKind::Data,
    };
    let mut client = network.new_client(ReplicaId(2), &member).await;
    let mut told = Vec::new();
    for index in [5, 6, 4, 8, 8] {
        let input = stream::iter(vec![append(index)]);
        let output = client
            .stream_append(input, RPCOption::new(Duration::from_secs(1)))
            .await
            .expect("a stream");
        let words = output.map(|result| match result {
            Ok(Ok(_)) => "matches",
            Ok(Err(StreamAppendError::Conflict(_))) => "conflict",
            Ok(Err(StreamAppendError::HigherVote(_))) => "higher vote",
            Err(_) => "error",
        });
        told.extend(words.collect::<Vec<_>>().await);
    }
    assert_eq!(
        told,
        ["matches", "error", "error", "conflict", "matches"],
        "only what follows what it has can't conflict"
    );
    lanes.close().await;
}

#[tokio::test]
async fn only_a_conflict_that_can_be_is_told() {
    use AppendReply::{Conflict, Success};
    assert_eq!(
        told(Lane::Log, &[5, 6], &[Success, Success]).await,
        ["matches 5", "matches 6"]
    );
    assert_eq!(told(Lane::Log, &[5], &[Conflict]).await, ["conflict 4"]);
    assert_eq!(
        told(Lane::Log, &[5, 8], &[Success, Conflict]).await,
        ["matches 5", "conflict 7"]
    );
    // The follower has just said that it has it.
    assert_eq!(
        told(Lane::Log, &[5, 6], &[Success, Conflict]).await,
        ["matches 5", "network"]
    );
    assert_eq!(
        told(Lane::Log, &[5, 4], &[Success, Conflict]).await,
        ["matches 5", "network"]
    );
    // Every log begins alike.
    assert_eq!(told(Lane::Log, &[0], &[Conflict]).await, ["network"]);
    // A heartbeat follows what was acknowledged.
    assert_eq!(told(Lane::Heartbeat, &[5], &[Conflict]).await, ["network"]);
}

/// What openraft would give next when asked.
#[derive(Clone, Default)]
struct Source(Arc<Mutex<Next>>);

#[derive(Default)]
struct Next {
    requests: VecDeque<AppendEntriesRequest<Types>>,
    waker: Option<Waker>,
}

impl Source {
    fn give(&self, request: AppendEntriesRequest<Types>) {
        let mut state = self.0.lock();
        state.requests.push_back(request);
        state.waker.take().into_iter().for_each(Waker::wake);
    }

    /// What it was not asked for.
    fn take_back(&self) -> Option<AppendEntriesRequest<Types>> {
        self.0.lock().requests.pop_front()
    }

    fn stream(&self) -> impl Stream<Item = AppendEntriesRequest<Types>> + Unpin + Send + 'static {
        let source = self.clone();
        stream::poll_fn(move |context| {
            let mut state = source.0.lock();
            state.waker = Some(context.waker().clone());
            state
                .requests
                .pop_front()
                .map_or(Poll::Pending, |request| Poll::Ready(Some(request)))
        })
    }
}

#[tokio::test(start_paused = true)]
async fn no_result_speaks_for_a_request_that_is_not_answered() {
    let (answers, replies) = futures::channel::mpsc::unbounded();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (mut network, lanes) = network_to(Patient {
        seen: seen.clone(),
        replies: Mutex::new(Some(replies)),
    });
    let (source, tip) = (Source::default(), network.tip.clone());
    let mut client = network
        .new_client(
            ReplicaId(2),
            &GroupMember {
                node: NodeId(2),
                kind: ReplicaKind::Data,
            },
        )
        .await;
    let option = RPCOption::new(Duration::from_secs(1));
    let mut output = client
        .stream_append(source.stream(), option)
        .await
        .expect("a stream");
    // What openraft is told within a moment, and what the peer was sent until then.
    let mut after_a_moment = async || {
        let told = tokio::time::timeout(Duration::from_millis(5), output.next()).await;
        let told = told.ok().map(|result| match result {
            Some(Ok(Ok(matching))) => matching.map_or(0, |id| id.index),
            other => panic!("told {other:?}"),
        });
        let sent: Vec<(u64, String)> = std::mem::take(&mut *seen.lock());
        (
            told,
            sent.first().map(|(sequence, _)| *sequence),
            sent.into_iter().map(|(_, says)| says).collect::<Vec<_>>(),
        )
    };
    let answer = |sequence: Option<u64>| {
        let mut out = BytesMut::new();
        wire::encode_reply(
            &mut out,
            sequence.expect("it was sent"),
            &PeerReply::Append(AppendReply::Success),
        );
        answers
            .unbounded_send(out.freeze())
            .expect("the lane is up");
    };

    // Nothing is on its way: the news of a commit goes at once.
    source.give(commit(4));
    let (told, first, says) = after_a_moment().await;
    assert_eq!(
        (told, says),
        (None, vec!["0 entries, 4 committed".to_owned()])
    );
    answer(first);
    assert_eq!(after_a_moment().await.0, Some(4));

    // An entry is: such news is not even asked for. Another entry is, as soon as the log has it.
    tip.set(Some(5));
    source.give(append(5));
    let (_, fifth, says) = after_a_moment().await;
    assert_eq!(says, ["1 entries, 0 committed"]);
    source.give(commit(5));
    assert_eq!(after_a_moment().await, (None, None, vec![]));
    assert!(source.take_back().is_some(), "nobody asked");
    tip.set(Some(6));
    source.give(AppendEntriesRequest {
        leader_commit: Some(to_raft(log_id(5))),
        ..append(6)
    });
    let (_, sixth, says) = after_a_moment().await;
    assert_eq!(says, ["1 entries, 5 committed"]);

    // Openraft may not know yet of an entry that the log has, and give such news instead: results
    // wait for the answer to it.
    tip.set(Some(7));
    source.give(commit(6));
    let (_, news, says) = after_a_moment().await;
    assert_eq!(says, ["0 entries, 6 committed"]);
    answer(fifth);
    assert_eq!(after_a_moment().await.0, Some(5));
    answer(sixth);
    assert_eq!(after_a_moment().await.0, None);
    answer(news);
    assert_eq!(after_a_moment().await.0, Some(6));
    lanes.close().await;
}

/// An append of one entry with so many bytes.
fn large_append(index: u64, bytes: usize) -> AppendEntriesRequest<Types> {
    let payload = LogPayload::Normal(Bytes::from(vec![b'v'; bytes]));
    let entry = LogEntry {
        id: log_id(index),
        payload,
    };
    AppendEntriesRequest {
        entries: vec![entry_to_raft(entry).expect("a readable entry")],
        ..append(index)
    }
}

/// Returns whether a follower over a way of `megabits` per second is seen to have entries of these
/// mebibytes.
async fn gets_through(megabits: u64, mebibytes: &[usize]) -> bool {
    let (mut network, lanes) = network_to(Far {
        bytes_per_second: megabits * 1_000_000 / 8,
    });
    let last = 4 + mebibytes.len() as u64;
    network.tip.set(Some(last));
    let member = GroupMember {
        node: NodeId(2),
        kind: ReplicaKind::Data,
    };
    let mut client = network.new_client(ReplicaId(2), &member).await;
    let appends: Vec<_> = (5..)
        .zip(mebibytes)
        .map(|(index, mebibytes)| large_append(index, mebibytes << 20))
        .collect();
    let output = client
        .stream_append(
            stream::iter(appends),
            RPCOption::new(Duration::from_secs(1)),
        )
        .await;
    let results: Vec<_> = output.expect("a stream").collect().await;
    lanes.close().await;
    let matches =
        |result: &Result<_, _>| matches!(result, Ok(Ok(Some(id))) if *id == to_raft(log_id(last)));
    results.last().is_some_and(matches)
}

#[tokio::test(start_paused = true)]
async fn what_is_large_has_the_time_that_a_slow_way_takes() {
    assert!(gets_through(30, &[8]).await, "8 MiB at 30 Mbit/s");
    assert!(gets_through(30, &[1; 16]).await, "a whole window of it");
    assert!(
        gets_through(10, &[32]).await,
        "longer than a lane may be silent"
    );
    assert!(
        !gets_through(1, &[8]).await,
        "a way that nobody can live on"
    );
}

/// A follower gives leases to those that it hears heartbeats and entries from.
#[tokio::test]
async fn an_answer_about_a_snapshot_is_told_when_it_can_renew_no_lease_any_more() {
    let cluster = TestCluster::new(1);
    cluster.found(1).await;
    cluster.put(1, "k", "v").await;
    let group = cluster.group(1, 1);
    group.build_snapshot().await.expect("a snapshot");
    let snapshot = group.state().current_snapshot().expect("it is there");
    drop(group);

    let member = GroupMember {
        node: NodeId(2),
        kind: ReplicaKind::Witness,
    };
    let vote = vote_to_raft(&Vote {
        term: 1,
        voted_for: Some(ReplicaId(1)),
        committed: true,
    })
    .expect("a vote for somebody");
    for lease in [None, Some(Duration::from_millis(500))] {
        let (network, lanes) = network_to(Marked);
        let mut network = Network { lease, ..network };
        let mut client = network.new_snapshot_client(ReplicaId(2), &member).await;
        let snapshot = with_meta(SnapshotData::Map(snapshot.clone())).expect("a readable one");
        let (began, option) = (
            tokio::time::Instant::now(),
            RPCOption::new(Duration::from_secs(20)),
        );
        let answered = client
            .full_snapshot(vote, snapshot, std::future::pending(), option)
            .await;
        assert_eq!(answered.expect("an answer").vote, vote);
        assert!(
            began.elapsed() >= lease.unwrap_or_default(),
            "after {:?}",
            began.elapsed()
        );
        lanes.close().await;
    }
    cluster.stop_all().await;
}
