//! What openraft is told of the answers to its appends.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use openraft::errors::RPCError;
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{AppendEntriesRequest, StreamAppendError};

use super::cluster::{CLUSTER, directory, key};
use crate::raft::lanes::Lanes;
use crate::raft::network::Network;
use crate::raft::transport::{Dial, Identity, Incoming, Lane, LaneError, Outgoing, Peer, Resolver};
use crate::raft::types::{Member, Types, entry_to_raft, to_raft, vote_to_raft};
use crate::raft::wire::{self, AppendReply, Arrived, FrameReader, Reply, Request};
use crate::storage::log::{Entry, Payload, Vote};
use crate::types::{LogId, NodeId, ReplicaId};

/// A peer that gives these answers, one to each frame, and remembers what each append said.
#[derive(Default)]
struct Scripted {
    script: Arc<Mutex<VecDeque<AppendReply>>>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Dial for Scripted {
    fn dial(&self, _: NodeId, _: Peer, _: Lane, outgoing: Outgoing) -> BoxFuture<'static, Result<Incoming, LaneError>> {
        let (script, seen, mut reader, mut is_greeted) = (self.script.clone(), self.seen.clone(), FrameReader::default(), false);
        let replies = outgoing.map(move |chunk| {
            reader.push(chunk);
            let mut out = BytesMut::new();
            while let Some(arrived) = reader.next()? {
                if !std::mem::replace(&mut is_greeted, true) {
                    continue;
                }
                seen.lock().expect("no holder panics").push(said(&arrived));
                if let Some(reply) = script.lock().expect("no holder panics").pop_front() {
                    wire::encode_reply(&mut out, arrived.sequence, &Reply::Append(reply));
                }
            }
            Ok(out.freeze())
        });
        Box::pin(async move { Ok(Box::pin(replies) as Incoming) })
    }
}

/// What an append says, in words.
fn said(arrived: &Arrived) -> String {
    match arrived.request().expect("a request") {
        (_, Request::Append { commit, entries, .. }, tail) => {
            let entries = wire::entries(&entries, tail).expect("readable entries").len();
            format!("{entries} entries, {} committed", commit.map_or(0, |id| id.index))
        }
        (_, other, _) => format!("{other:?}"),
    }
}

/// Knows every node.
struct Anywhere;

impl Resolver for Anywhere {
    fn resolve(&self, node: NodeId) -> Option<Peer> {
        Some(Peer { address: "a:1".parse().expect("an address"), directory: directory(node) })
    }
}

fn log_id(index: u64) -> LogId {
    LogId { term: 1, index }
}

/// An append of one entry, which follows the one before it.
fn append(index: u64) -> AppendEntriesRequest<Types> {
    let vote = Vote { term: 1, voted_for: Some(ReplicaId(1)), committed: true };
    let entry = Entry { id: log_id(index), payload: Payload::Blank };
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
    AppendEntriesRequest { prev_log_id: last, entries: Vec::new(), leader_commit: last, ..append(index) }
}

/// The way to a peer that answers so.
fn network_to(peer: Scripted) -> (Network, Arc<Lanes>) {
    let identity = Arc::new(Identity::member(directory(NodeId(1)), CLUSTER, NodeId(1)));
    let lanes = Arc::new(Lanes::new(identity, Arc::new(Anywhere), Arc::new(peer), Arc::default()));
    let second = Duration::from_secs(1);
    let network = Network { key: key(1, 1), lanes: lanes.clone(), append_timeout: second, snapshot_step_timeout: second };
    (network, lanes)
}

/// What openraft is told, in a word for each append, when these are answered so.
async fn told(lane: Lane, appends: &[u64], script: &[AppendReply]) -> Vec<String> {
    let script = Arc::new(Mutex::new(script.iter().cloned().collect()));
    let (mut network, lanes) = network_to(Scripted { script, ..Scripted::default() });
    let member = Member { node: NodeId(2), is_witness: false };
    let mut client = match lane {
        Lane::Log => network.new_client(ReplicaId(2), &member).await,
        Lane::Heartbeat => network.new_heartbeat_client(ReplicaId(2), &member).await,
        Lane::Snapshot => network.new_snapshot_client(ReplicaId(2), &member).await,
    };
    let input = stream::iter(appends.iter().copied().map(append).collect::<Vec<_>>());
    let output = client.stream_append(input, RPCOption::new(Duration::from_secs(1))).await.expect("a stream");
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

#[tokio::test]
async fn only_a_conflict_that_can_be_is_told() {
    use AppendReply::{Conflict, Success};
    assert_eq!(told(Lane::Log, &[5, 6], &[Success, Success]).await, ["matches 5", "matches 6"]);
    assert_eq!(told(Lane::Log, &[5], &[Conflict]).await, ["conflict 4"]);
    assert_eq!(told(Lane::Log, &[5, 8], &[Success, Conflict]).await, ["matches 5", "conflict 7"]);
    // The follower has just said that it has it.
    assert_eq!(told(Lane::Log, &[5, 6], &[Success, Conflict]).await, ["matches 5", "network"]);
    assert_eq!(told(Lane::Log, &[5, 4], &[Success, Conflict]).await, ["matches 5", "network"]);
    // Every log begins alike.
    assert_eq!(told(Lane::Log, &[0], &[Conflict]).await, ["network"]);
    // A heartbeat follows what was acknowledged.
    assert_eq!(told(Lane::Heartbeat, &[5], &[Conflict]).await, ["network"]);
}

#[tokio::test(start_paused = true)]
async fn a_commit_travels_with_the_next_entry_or_alone_after_a_while() {
    // It answers the first frame, and no other.
    let peer = Scripted { script: Arc::new(Mutex::new(vec![AppendReply::Success].into())), ..Scripted::default() };
    let seen = peer.seen.clone();
    let (mut network, lanes) = network_to(peer);
    let mut client = network.new_client(ReplicaId(2), &Member { node: NodeId(2), is_witness: false }).await;
    let (requests, input) = futures::channel::mpsc::unbounded();
    let option = RPCOption::new(Duration::from_secs(1));
    let mut output = client.stream_append(input, option).await.expect("a stream");
    let send = |request| requests.unbounded_send(request).expect("the stream reads");
    let mut after_ms = async |ms| {
        let answer = tokio::time::timeout(Duration::from_millis(ms), output.next()).await;
        (std::mem::take(&mut *seen.lock().expect("no holder panics")), answer.is_ok_and(|answer| answer.is_some()))
    };
    let says = |entries, committed| vec![format!("{entries} entries, {committed} committed")];

    // Nothing is on its way: it goes at once.
    send(commit(4));
    assert_eq!(after_ms(1).await, (says(0, 4), true));

    // An entry is, and another comes in time.
    send(append(5));
    assert_eq!(after_ms(1).await, (says(1, 0), false));
    send(commit(5));
    assert_eq!(after_ms(1).await, (vec![], false));
    send(AppendEntriesRequest { leader_commit: Some(to_raft(log_id(5))), ..append(6) });
    assert_eq!(after_ms(5).await, (says(1, 5), false));

    // None comes: the last commit is told when the first has waited for long enough.
    send(commit(5));
    assert_eq!(after_ms(2).await, (vec![], false));
    send(commit(6));
    assert_eq!(after_ms(2).await, (says(0, 6), false));

    // The end of the stream waits for nothing.
    send(commit(7));
    drop(requests);
    assert_eq!(after_ms(1).await, (says(0, 7), false));
    lanes.close().await;
}
