//! Lanes: what they refuse, and that they carry groups over real HTTP/2.

use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use http_body_util::{BodyExt, BodyStream, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

use super::cluster::*;
use crate::raft::election::leases::LeaseTimings;
use crate::raft::transport::lanes::http::HttpDial;
use crate::raft::transport::lanes::{Lanes, LanesParts, serve_lane};
use crate::raft::transport::wire::{
    self, AppendReply, FrameHeader, FrameReader, Hello, PeerRefusal, PeerReply, PeerRequest,
};
use crate::raft::transport::{
    Dial, Incoming as FromPeer, Lane, LaneError, NodeIdentity, Outgoing, Peer, Resolver,
};
use crate::raft::{LeaseReads, RaftTimings, Registry};
use crate::sm::starts::Starts;
use crate::storage::log::{LogEntry, LogPayload, Vote};
use crate::supervisor::Supervisor;
use crate::types::{Address, ClusterId, DirectoryId, GroupId, LogId, NodeId, ReplicaId, StartId};

fn hello() -> Hello {
    let (from, to) = (NodeId(9), NodeId(1));
    Hello {
        cluster: CLUSTER,
        from,
        from_directory: directory(from),
        to,
        to_directory: directory(to),
    }
}

/// The first reply to what is sent, if there is one before the lane ends.
async fn replies(registry: &Arc<Registry>, sent: Vec<Bytes>) -> Vec<PeerReply> {
    first_replies(registry, sent, 1).await
}

/// So many replies to what is sent, in the order in which they come; fewer if the lane ends before.
async fn first_replies(registry: &Arc<Registry>, sent: Vec<Bytes>, count: usize) -> Vec<PeerReply> {
    let incoming = stream::iter(sent)
        .map(Ok::<_, Infallible>)
        .chain(stream::pending());
    let mut outgoing = Box::pin(serve_lane(registry.clone(), Lane::Log, incoming));
    let mut reader = FrameReader::default();
    let mut found = Vec::new();
    while found.len() < count {
        let Some(chunk) = outgoing.next().await else {
            break;
        };
        reader.push(chunk);
        while let Some(frame) = reader.next().expect("frames") {
            found.push(frame.reply().expect("a reply"));
        }
    }
    found
}

#[tokio::test]
async fn frames_for_another_cluster_node_directory_group_or_replica_are_refused() {
    let cluster = TestCluster::new(1);
    cluster.found(1).await;
    let registry = cluster.nodes[&NodeId(1)].registry.clone();
    let refused_hello = [
        (
            Hello {
                cluster: ClusterId(8),
                ..hello()
            },
            PeerRefusal::OtherCluster,
        ),
        (
            Hello {
                to: NodeId(2),
                ..hello()
            },
            PeerRefusal::OtherNode(NodeId(1)),
        ),
        (
            Hello {
                to_directory: DirectoryId(5),
                ..hello()
            },
            PeerRefusal::OtherDirectory(directory(NodeId(1))),
        ),
    ];
    for (hello, refusal) in refused_hello {
        let found = replies(&registry, vec![wire::encode_hello(&hello)]).await;
        assert_eq!(found, [PeerReply::Refused(refusal)]);
    }
    let header = FrameHeader {
        group: GroupId(1),
        sender: ReplicaId(2),
        target: ReplicaId(1),
    };
    let refused_frames = [
        (
            FrameHeader {
                group: GroupId(2),
                ..header
            },
            PeerRefusal::NoReplica(GroupId(2)),
        ),
        (
            FrameHeader {
                target: ReplicaId(3),
                ..header
            },
            PeerRefusal::OtherReplica(ReplicaId(1)),
        ),
    ];
    let vote = Vote {
        term: 0,
        voted_for: Some(ReplicaId(2)),
        committed: false,
    };
    let request = PeerRequest::PreVote { vote, last: None };
    for (header, refusal) in refused_frames {
        let frame = wire::encode_request(header, &request, &[]).seal(1);
        let found = replies(&registry, vec![wire::encode_hello(&hello()), frame]).await;
        assert_eq!(found, [PeerReply::Refused(refusal)]);
    }
    assert!(
        registry.get(GroupId(2)).is_none(),
        "no frame creates a replica"
    );
    let frame = wire::encode_request(header, &request, &[]).seal(1);
    let found = replies(&registry, vec![wire::encode_hello(&hello()), frame]).await;
    assert!(matches!(found[..], [PeerReply::Vote { .. }]), "{found:?}");
    assert!(registry.last_heard(NodeId(9)).is_some());
    drop(registry);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_peer_with_other_leases_is_refused_and_one_that_tells_none_is_not() {
    let starts = Starts::first(StartId(6));
    let leased = LeaseTimings {
        lease_drift_ms: Some(50),
        ..PACE
    };
    let timings = RaftTimings {
        lease: LeaseReads::On { drift_ms: 50 },
        ..RaftTimings::default()
    };
    for (timings, own) in [(RaftTimings::default(), PACE), (timings, leased)] {
        let cluster = TestCluster::with_timings(1, timings);
        cluster.nodes[&NodeId(1)]
            .registry
            .open_replica(key(1, 1), true)
            .await
            .expect("a replica");
        let registry = cluster.nodes[&NodeId(1)].registry.clone();
        let header = FrameHeader {
            group: GroupId(1),
            sender: ReplicaId(2),
            target: ReplicaId(9),
        };
        let frame =
            || wire::encode_request(header, &PeerRequest::PurgeIndex { index: 1 }, &[]).seal(1);
        let taken = [PeerReply::Refused(PeerRefusal::OtherReplica(ReplicaId(1)))];
        for lease_timings in [
            PACE,
            leased,
            LeaseTimings {
                lease_drift_ms: Some(60),
                ..PACE
            },
            LeaseTimings {
                election_ms_max: 840,
                ..leased
            },
        ] {
            let greeting = wire::encode_greeting(&hello(), &starts, &lease_timings);
            let found = replies(&registry, vec![greeting, frame()]).await;
            match lease_timings == own {
                true => assert_eq!(found, taken),
                false => assert_eq!(
                    found,
                    [PeerReply::Refused(PeerRefusal::OtherTimings(own))],
                    "{lease_timings}"
                ),
            }
        }
        assert_eq!(
            replies(&registry, vec![wire::encode_hello(&hello()), frame()]).await,
            taken
        );
        let slower = wire::encode_greeting(
            &hello(),
            &starts,
            &LeaseTimings {
                election_ms_max: 840,
                ..PACE
            },
        );
        let found = replies(&registry, vec![slower, frame()]).await;
        assert_eq!(
            found == taken,
            own == PACE,
            "without leases other times are taken: {found:?}"
        );
        drop(registry);
        cluster.stop_all().await;
    }
}

/// The dialling side has no other way to know.
#[tokio::test]
async fn a_peer_that_can_not_be_connected_to_is_told_so_with_every_reply() {
    let cluster = TestCluster::new(2);
    cluster.found(1).await;
    let leader = cluster.leader(1).await;
    let follower = NodeId(3 - leader.0);
    let (leading, following) = (
        cluster.nodes[&leader].registry.clone(),
        cluster.nodes[&follower].registry.clone(),
    );
    assert!(leading.reachability().unreachable_from().is_empty());
    following.reachability().set_unreachable(leader, true);
    until("the leader is told", || {
        leading.reachability().unreachable_from() == [follower].into()
    })
    .await;
    following.reachability().set_unreachable(leader, false);
    until("it is told no more", || {
        leading.reachability().unreachable_from().is_empty()
    })
    .await;
    drop((leading, following));
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_lane_ends_at_what_is_no_frame() {
    let cluster = TestCluster::new(1);
    let registry = cluster.nodes[&NodeId(1)].registry.clone();
    let mut garbage = BytesMut::from(&wire::encode_hello(&hello())[..]);
    garbage.extend_from_slice(&[0xff; 64]);
    assert!(replies(&registry, vec![garbage.freeze()]).await.is_empty());
    drop(registry);
    cluster.stop_all().await;
}

/// A lane that has not said whose it is has nothing more read than a hello takes, however much it
/// announces and sends.
#[tokio::test(start_paused = true)]
async fn before_the_hello_only_a_hello_is_read() {
    let cluster = TestCluster::new(1);
    let registry = cluster.nodes[&NodeId(1)].registry.clone();
    let sent = Arc::new(AtomicUsize::new(0));
    let serve = |announced: u32| {
        sent.store(0, Ordering::Relaxed);
        let count = sent.clone();
        let pieces = stream::iter(0..).map(move |_| {
            count.fetch_add(1 << 10, Ordering::Relaxed);
            Ok::<_, Infallible>(Bytes::from(vec![1; 1 << 10]))
        });
        let header = stream::iter([Ok(Bytes::copy_from_slice(&announced.to_le_bytes()))]);
        serve_lane(
            registry.clone(),
            Lane::Log,
            header.chain(pieces).take(1 << 10),
        )
    };
    let replies: Vec<Bytes> = serve(70 << 20).collect().await;
    assert!(
        replies.is_empty() && sent.load(Ordering::Relaxed) <= 1 << 10,
        "{} bytes were read",
        sent.load(Ordering::Relaxed)
    );
    let refused: Vec<Bytes> = serve(1 << 10).collect().await;
    assert!(!refused.is_empty(), "it is told that this was no hello");

    // Who says nothing at all is not waited for.
    let silent = serve_lane(
        registry.clone(),
        Lane::Log,
        stream::pending::<Result<Bytes, Infallible>>(),
    );
    assert_eq!(registry.lane_limiter().used(), 1);
    assert!(silent.collect::<Vec<_>>().await.is_empty());
    assert_eq!(registry.lane_limiter().used(), 0);
    drop(registry);
    cluster.stop_all().await;
}

/// Frames of tens of mebibytes, of which each is sent but for its end: as many are received as have
/// room together.
#[tokio::test]
async fn large_frames_are_received_a_few_at_a_time() {
    const LARGE: usize = 60 << 20;
    let cluster = TestCluster::new(1);
    let registry = cluster.nodes[&NodeId(1)].registry.clone();
    let taken = Arc::new(AtomicUsize::new(0));
    let lanes = (0..8).map(|from| {
        let from = NodeId(10 + from);
        let hello = wire::encode_hello(&Hello {
            from,
            from_directory: directory(from),
            ..hello()
        });
        let header = Bytes::copy_from_slice(&u32::try_from(LARGE).expect("small").to_le_bytes());
        let count = taken.clone();
        let piece = stream::iter([()]).map(move |()| {
            count.fetch_add(1, Ordering::Relaxed);
            Bytes::from_static(&[0; 1 << 10])
        });
        let incoming = stream::iter([hello, header])
            .chain(piece)
            .map(Ok::<_, Infallible>)
            .chain(stream::pending());
        Box::pin(serve_lane(registry.clone(), Lane::Log, incoming))
    });
    let mut lanes: Vec<_> = lanes.collect();
    for lane in &mut lanes {
        assert!(lane.next().now_or_never().is_none(), "it goes on");
    }
    assert_eq!(taken.load(Ordering::Relaxed), 2, "of eight");
    drop(lanes.remove(0));
    for lane in &mut lanes {
        assert!(lane.next().now_or_never().is_none(), "it goes on");
    }
    assert_eq!(taken.load(Ordering::Relaxed), 3, "one has made room");
    drop((lanes, registry));
    cluster.stop_all().await;
}

/// Addresses of nodes by id.
#[derive(Default)]
struct Addresses(Mutex<HashMap<NodeId, Address>>);

impl Resolver for Addresses {
    fn level(&self) -> u16 {
        0
    }

    fn resolve(&self, node: NodeId) -> Option<Peer> {
        let address = self.0.lock().get(&node).cloned()?;
        Some(Peer {
            address,
            directory: directory(node),
        })
    }
}

/// Serves the lanes of a node as its HTTP side does.
async fn serve_http(listener: TcpListener, registry: Arc<Registry>) {
    loop {
        let (socket, _) = listener.accept().await.expect("a connection");
        socket.set_nodelay(true).expect("nodelay");
        let registry = registry.clone();
        let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
            let lane = request
                .uri()
                .path()
                .strip_prefix("/peer/lane/")
                .and_then(Lane::from_name)
                .expect("a lane");
            let incoming = BodyStream::new(request.into_body().map_frame(|frame| frame))
                .filter_map(|frame| async move {
                    match frame {
                        Ok(frame) => frame.into_data().ok().map(Ok),
                        Err(error) => Some(Err(error)),
                    }
                });
            let outgoing = serve_lane(registry.clone(), lane, incoming)
                .map(|chunk| Ok::<_, Infallible>(Frame::data(chunk)));
            async move { Ok::<_, Infallible>(http::Response::new(StreamBody::new(outgoing))) }
        });
        tokio::spawn(
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(socket), service),
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_work_over_http_2() {
    let addresses = Arc::new(Addresses::default());
    let mut nodes = BTreeMap::new();
    let mut servers = Vec::new();
    for id in (1..=3).map(NodeId) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener
            .local_addr()
            .expect("bound")
            .to_string()
            .parse()
            .expect("an address");
        addresses.0.lock().insert(id, address);
        let node = TestNode::start(
            id,
            &Disks::new(id.0),
            addresses.clone(),
            Arc::new(HttpDial),
            RaftTimings::default(),
        );
        servers.push(tokio::spawn(serve_http(listener, node.registry.clone())));
        nodes.insert(id, node);
    }
    let mut cluster = TestCluster::new(0);
    cluster.nodes = nodes;
    for group in 1..=4 {
        cluster.found(group).await;
        cluster.put(group, "k", "v").await;
        cluster.put(group, "large", &"x".repeat(3 << 20)).await;
        assert_eq!(cluster.get(group, "k").await.as_deref(), Some("v"));
    }
    for id in 1..=3 {
        let replica = cluster.group(id, 2);
        until("every replica has it", || {
            read(&replica, "large").is_some_and(|value| value.len() == 3 << 20)
        })
        .await;
    }
    servers.iter().for_each(|server| server.abort());
    for (_, node) in std::mem::take(&mut cluster.nodes) {
        node.close().await;
    }
}

/// Frames as the serving side gets them, one after another, while others are worked on.
#[tokio::test]
async fn a_group_that_stalls_holds_up_no_other_and_can_not_fill_the_lane() {
    let cluster = TestCluster::new(1);
    cluster.found(1).await;
    cluster.found(2).await;
    let registry = cluster.nodes[&NodeId(1)].registry.clone();
    let vote = Vote {
        term: 0,
        voted_for: Some(ReplicaId(2)),
        committed: false,
    };
    let request = |group| {
        let header = FrameHeader {
            group: GroupId(group),
            sender: ReplicaId(2),
            target: ReplicaId(1),
        };
        wire::encode_request(header, &PeerRequest::PreVote { vote, last: None }, &[])
    };
    // Group 1 looks as if so many of its frames were being worked on that it takes no more.
    let stalled = registry.get(GroupId(1)).expect("open");
    stalled
        .frames
        .fetch_add(1000, std::sync::atomic::Ordering::Relaxed);
    let found = replies(
        &registry,
        vec![wire::encode_hello(&hello()), request(1).seal(1)],
    )
    .await;
    assert_eq!(found, [PeerReply::Refused(PeerRefusal::Busy)]);
    let found = replies(
        &registry,
        vec![wire::encode_hello(&hello()), request(2).seal(1)],
    )
    .await;
    assert!(matches!(found[..], [PeerReply::Vote { .. }]), "{found:?}");
    stalled
        .frames
        .fetch_sub(1000, std::sync::atomic::Ordering::Relaxed);
    let found = replies(
        &registry,
        vec![wire::encode_hello(&hello()), request(1).seal(1)],
    )
    .await;
    assert!(matches!(found[..], [PeerReply::Vote { .. }]), "{found:?}");
    drop((registry, stalled));
    cluster.stop_all().await;
}

/// More than tokio lets a task do in one go: what is then put off must not overtake what came
/// before it.
#[tokio::test]
async fn appends_that_arrive_together_are_taken_in_their_order() {
    const GROUPS: u64 = 8;
    const APPENDS: u64 = 50;
    let cluster = TestCluster::new(1);
    let registry = cluster.nodes[&NodeId(1)].registry.clone();
    for group in 1..=GROUPS {
        registry
            .open_replica(key(group, 1), true)
            .await
            .expect("a replica");
    }
    let vote = Vote {
        term: 1,
        voted_for: Some(ReplicaId(2)),
        committed: true,
    };
    let append = |group, index| {
        let header = FrameHeader {
            group: GroupId(group),
            sender: ReplicaId(2),
            target: ReplicaId(1),
        };
        let id = |index| LogId { term: 1, index };
        let entry = LogEntry {
            id: id(index),
            payload: LogPayload::Blank,
        };
        wire::encode_append(header, vote, index.checked_sub(1).map(id), None, &[entry])
            .seal(group * APPENDS + index)
    };
    let mut sent = BytesMut::from(&wire::encode_hello(&hello())[..]);
    for (index, group) in
        (0..APPENDS).flat_map(|index| (1..=GROUPS).map(move |group| (index, group)))
    {
        sent.extend_from_slice(&append(group, index));
    }
    let count = (GROUPS * APPENDS) as usize;
    let found = first_replies(&registry, vec![sent.freeze()], count).await;
    assert_eq!(found, vec![PeerReply::Append(AppendReply::Success); count]);
    drop(registry);
    cluster.stop_all().await;
}

/// A peer that takes everything and says nothing.
struct Silent;

impl Dial for Silent {
    fn dial(
        &self,
        _: NodeId,
        _: Peer,
        _: Lane,
        outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<FromPeer, LaneError>> {
        let silence = outgoing.filter_map(|_| async { None::<Result<Bytes, LaneError>> });
        Box::pin(async move { Ok(Box::pin(silence) as FromPeer) })
    }
}

#[tokio::test(start_paused = true)]
async fn a_lane_on_which_nothing_is_heard_is_cut_and_what_waits_is_told() {
    let addresses = Arc::new(Addresses::default());
    addresses
        .0
        .lock()
        .insert(NodeId(2), "b:1".parse().expect("an address"));
    let identity = Arc::new(NodeIdentity::member(
        directory(NodeId(1)),
        CLUSTER,
        NodeId(1),
    ));
    let lanes = Lanes::new(LanesParts {
        identity,
        resolver: addresses.clone(),
        dial: Arc::new(Silent),
        liveness: Arc::default(),
        reachability: Arc::default(),
        budgets: Arc::default(),
        lease_timings: PACE,
        supervisor: Supervisor::noting().0,
    });
    let vote = Vote {
        term: 0,
        voted_for: Some(ReplicaId(2)),
        committed: false,
    };
    let header = FrameHeader {
        group: GroupId(1),
        sender: ReplicaId(1),
        target: ReplicaId(2),
    };
    let frame = || wire::encode_request(header, &PeerRequest::PreVote { vote, last: None }, &[]);
    let call = lanes.call(NodeId(2), Lane::Log, frame()).expect("queued");
    let answer = call.answer.await.expect("it is told");
    assert!(matches!(answer, Err(LaneError::Late(_))), "{answer:?}");
    // For a while calls fail at once, and then the lane is tried again.
    assert!(matches!(
        lanes.call(NodeId(2), Lane::Log, frame()),
        Err(LaneError::Down(_))
    ));
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let call = lanes.call(NodeId(2), Lane::Log, frame()).expect("queued");
    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    // The peer moves: what was sent to its old place is given up.
    addresses
        .0
        .lock()
        .insert(NodeId(2), "c:1".parse().expect("an address"));
    let second = lanes.call(NodeId(2), Lane::Log, frame()).expect("queued");
    assert!(matches!(
        call.answer.await.expect("it is told"),
        Err(LaneError::Broken(_))
    ));
    lanes.close().await;
    assert_eq!(
        second
            .answer
            .await
            .expect("it is told")
            .expect_err("closed"),
        LaneError::Closed
    );
    assert!(matches!(
        lanes.call(NodeId(2), Lane::Log, frame()),
        Err(LaneError::Closed)
    ));
    assert!(matches!(
        lanes.call(NodeId(3), Lane::Log, frame()),
        Err(LaneError::Unresolved(_))
    ));
}
