//! The server and what all dialects share, over real connections: hostile heads and bodies, limits,
//! shutdown, health, peers.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc::UnboundedSender;
use http_body_util::{BodyDataStream, BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::testing::{PATIENCE, Site, identity, request};
use super::{Limits, NotReady};
use crate::api::peer::{Announcement, PromiseReply, PromiseRequest, Standing};
use crate::api::protocol::{ShardBody, ShardReply, ShardRequest};
use crate::api::store::{Consistency, Failure};
use crate::routing::peer_caller::{PeerCaller, PeerError};
use crate::sm::cluster::meta;
use crate::sm::cluster::view::NodeSpec;
use crate::sm::codec;
use crate::types::{Address, ClusterId, DirectoryId, GroupId, NodeId};

/// Small, and quick to run out.
fn tight() -> Limits {
    Limits {
        value_bytes_max: 1000,
        body_bytes_max: 2000,
        body_chunk_timeout: Duration::from_millis(50),
        ..Limits::default()
    }
}

#[tokio::test]
async fn health_is_told() {
    let site = Site::start().await;
    assert_eq!(site.get("/healthz").await.text(), "ok\n");
    assert_eq!(site.get("/readyz").await.status, 200);
    *site.readiness.0.lock() = Some(NotReady {
        code: "spare",
        reason: "waits for a view".into(),
    });
    let not_ready = site.get("/readyz").await;
    assert_eq!(
        (not_ready.verdict(), not_ready.json()["detail"].as_str()),
        ((503, "spare".into()), Some("waits for a view"))
    );
    assert!(
        site.ask("GET /\naccept: text/html", "")
            .await
            .text()
            .starts_with("Quorate ")
    );
    site.put("/v1/kv/a", "1").await;
    let metrics = site.get("/metrics").await;
    assert!(
        metrics.header("content-type").starts_with("text/plain"),
        "{metrics:?}"
    );
    let metrics = metrics.text();
    for line in [
        r#"quorate_http_requests_total{dialect="native",method="PUT",status="2xx"} 1"#,
        "quorate_http_connections 1",
    ] {
        assert!(metrics.contains(line), "{line}\nis not in\n{metrics}");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_body_too_large_is_refused_before_it_is_read() {
    let site = Site::with(tight()).await;
    let mut wire = site.connect().await;
    wire.send(b"PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\ncontent-length: 1001\r\n\r\n")
        .await;
    let refused = wire.reply().await;
    assert_eq!(
        (refused.verdict(), refused.json()["limit_bytes"].as_u64()),
        ((413, "too_large".into()), Some(1000))
    );
    // The body that comes now is thrown away, and the connection goes on.
    wire.send(&[b'x'; 1001]).await;
    wire.send(&request("PUT /v1/kv/a", &[b'x'; 1000])).await;
    assert_eq!(wire.reply().await.status, 201);
    wire.send(b"POST /v1/batch HTTP/1.1\r\nhost: test\r\ncontent-length: 99999999999999\r\n\r\n")
        .await;
    assert_eq!(wire.reply().await.verdict(), (413, "too_large".into()));
    drop(wire);
    site.stop().await;
}

#[tokio::test]
async fn a_body_too_large_without_a_length_is_refused_on_the_way() {
    let site = Site::with(tight()).await;
    let mut wire = site.connect().await;
    wire.send(b"PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    for _ in 0..3 {
        wire.send(format!("190\r\n{}\r\n", "x".repeat(400)).as_bytes())
            .await;
    }
    assert_eq!(wire.reply().await.verdict(), (413, "too_large".into()));
    wire.send(b"0\r\n\r\n").await;
    wire.send(&request("GET /v1/kv/a", b"")).await;
    assert_eq!(wire.reply().await.status, 404);
    site.stop().await;
}

#[tokio::test]
async fn a_client_that_asks_before_it_sends_is_answered() {
    let site = Site::with(tight()).await;
    let head = |length: usize| {
        format!(
            "PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: \
            {length}\r\n\r\n"
        )
    };
    let mut wire = site.connect().await;
    wire.send(head(3).as_bytes()).await;
    assert_eq!(wire.reply().await.status, 100);
    wire.send(b"abc").await;
    assert_eq!(wire.reply().await.status, 201);
    wire.send(head(1001).as_bytes()).await;
    assert_eq!(wire.reply().await.verdict(), (413, "too_large".into()));
    site.stop().await;
}

#[tokio::test]
async fn a_client_is_sent_elsewhere_before_its_body() {
    let site = Site::start().await;
    site.store.fail(
        1,
        Failure::Elsewhere {
            shard: GroupId(1),
            address: "b:2".parse().expect("an address"),
        },
    );
    for framing in ["transfer-encoding: chunked", "content-length: 1000000"] {
        for expectation in ["expect: 100-continue\r\n", ""] {
            let mut wire = site.connect().await;
            wire.send(
                format!("PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\n{framing}\r\n{expectation}\r\n")
                    .as_bytes(),
            )
            .await;
            let sent = wire.reply().await;
            let (status, location) = (sent.status, sent.header("location"));
            assert_eq!(
                (status, location),
                (307, "http://b:2/v1/kv/a"),
                "{framing} {expectation}"
            );
        }
    }
    assert_eq!(site.store.requests(), 0);

    // A body that is sent to the end all the same is read over.
    let mut wire = site.connect().await;
    wire.send(&request("PUT /v1/kv/a", &[b'x'; 1 << 20])).await;
    assert_eq!(wire.reply().await.status, 307);
    wire.send(&request("GET /healthz", b"")).await;
    assert_eq!(wire.reply().await.status, 200);
    site.stop().await;
}

#[tokio::test]
async fn a_body_that_stops_coming_is_given_up() {
    let site = Site::with(tight()).await;
    for head in [
        "content-length: 5\r\n\r\nab",
        "transfer-encoding: chunked\r\n\r\n2\r\nab\r\n",
    ] {
        let mut wire = site.connect().await;
        wire.send(format!("PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\n{head}").as_bytes())
            .await;
        assert_eq!(wire.reply().await.verdict(), (408, "body_timeout".into()));
    }
    assert_eq!(site.store.requests(), 0);
    site.stop().await;
}

#[tokio::test]
async fn a_body_cut_short_changes_nothing() {
    let site = Site::start().await;
    for head in [
        "content-length: 5\r\n\r\nab",
        "transfer-encoding: chunked\r\n\r\n2\r\nab\r\n",
        "transfer-encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let mut wire = site.connect().await;
        wire.send(format!("PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\n{head}").as_bytes())
            .await;
        wire.close_sending().await;
        let answer = wire.rest().await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
            "{answer}"
        );
    }
    assert_eq!(site.store.requests(), 0);
    site.stop().await;
}

#[tokio::test]
async fn bodies_in_flight_are_bounded_together() {
    let site = Site::with(Limits {
        bodies_bytes_max: 1000,
        body_bytes_max: 2000,
        ..Limits::default()
    })
    .await;
    let mut holder = site.connect().await;
    holder
        .send(b"PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\n")
        .await;
    holder.send(&[b'x'; 900]).await;
    while !site
        .get("/metrics")
        .await
        .text()
        .contains("quorate_http_body_bytes_in_flight 1000")
    {
        tokio::task::yield_now().await;
    }
    let refused = site.put("/v1/kv/b", [b'x'; 101]).await;
    assert_eq!(
        (refused.verdict(), refused.header("retry-after")),
        ((429, "overloaded".into()), "1")
    );
    holder.send(&[b'x'; 100]).await;
    assert_eq!(holder.reply().await.status, 201);
    assert_eq!(site.put("/v1/kv/b", [b'x'; 101]).await.status, 201);
    site.stop().await;
}

#[tokio::test]
async fn hostile_heads_are_refused() {
    let site = Site::with(Limits {
        head_bytes_max: 8 << 10,
        ..Limits::default()
    })
    .await;
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(150));
    let huge = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(9000));
    let long = format!("GET /v1/kv/{} HTTP/1.1\r\n\r\n", "k".repeat(9000));
    for (head, statuses) in [
        (huge.as_str(), "431"),
        (many.as_str(), "431"),
        (long.as_str(), "414 431"),
        ("GET / HTTP/1.1\r\na b: c\r\n\r\n", "400"),
        ("GET /v1/kv/a b HTTP/1.1\r\n\r\n", "400"),
        ("\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}nonsense\r\n\r\n", "400"),
        (
            "GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            "400",
        ),
        ("PUT /v1/kv/a HTTP/1.1\r\ncontent-length: -1\r\n\r\n", "400"),
    ] {
        let mut wire = site.connect().await;
        wire.send(head.as_bytes()).await;
        let answer = wire.rest().await;
        let status = answer.split(' ').nth(1).unwrap_or_default();
        assert!(
            statuses.split(' ').any(|expected| expected == status),
            "{statuses} expected: {answer:.200}"
        );
    }
    assert_eq!(site.get("/healthz").await.status, 200);
    site.stop().await;
}

#[tokio::test]
async fn heads_on_their_way_are_bounded_together() {
    let site = Site::with(Limits {
        heads_bytes_max: 100 << 10,
        ..Limits::default()
    })
    .await;
    let large = format!(
        "GET /healthz HTTP/1.1\r\nhost: test\r\na: {}",
        "b".repeat(40 << 10)
    );
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut wire = site.connect().await;
        wire.send(large.as_bytes()).await;
        slow.push(wire);
    }

    // The two are read sooner or later. Then there is no room for a third.
    let ask = async || {
        let mut stream = TcpStream::connect(site.address).await.expect("it listens");
        let mut answer = String::new();
        // It may be cut before all of it is sent, or reset before its end is read.
        let _ = stream
            .write_all(format!("{large}\r\nconnection: close\r\n\r\n").as_bytes())
            .await;
        let _ = stream.read_to_string(&mut answer).await;
        answer.contains("HTTP/1.1 200")
    };
    let refused = async { while ask().await {} };
    tokio::time::timeout(PATIENCE, refused)
        .await
        .expect("nothing bounds the heads");
    assert_eq!(
        site.get("/healthz").await.status,
        200,
        "small ones need no room"
    );

    for wire in &mut slow {
        wire.send(b"\r\n\r\n").await;
        assert_eq!(
            wire.reply().await.status,
            200,
            "what is read is charged, and goes on"
        );
        wire.send(&request("GET /healthz", b"")).await;
        assert_eq!(wire.reply().await.status, 200);
    }
    let served = async { while !ask().await {} };
    tokio::time::timeout(PATIENCE, served)
        .await
        .expect("the room is not given back");
    site.stop().await;
}

#[tokio::test]
async fn the_rest_of_a_body_that_was_answered_early_is_no_head() {
    let limits = Limits {
        heads_bytes_max: 4 << 10,
        value_bytes_max: 1 << 10,
        ..Limits::default()
    };
    let site = Site::with(limits).await;
    let mut wire = site.connect().await;
    wire.send(b"PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\ncontent-length: 262144\r\n\r\n")
        .await;
    assert_eq!(wire.reply().await.status, 413);
    wire.send(&[b'x'; 256 << 10]).await;
    wire.send(&request("GET /healthz", b"")).await;
    assert_eq!(wire.reply().await.status, 200, "the connection was cut");
    site.stop().await;
}

#[tokio::test]
async fn slow_heads_and_silent_connections_are_closed() {
    let site = Site::with(Limits {
        head_timeout: Duration::from_millis(50),
        ..Limits::default()
    })
    .await;
    for beginning in [
        "",
        "P",
        "PRI",
        "GET / HTTP/1.1\r\na:",
        "GET /healthz HTTP/1.1\r\n\r\n",
    ] {
        let mut wire = site.connect().await;
        wire.send(beginning.as_bytes()).await;
        let answer = wire.rest().await;
        assert!(
            !answer.contains("HTTP/1.1 200") || beginning.ends_with("\r\n\r\n"),
            "{answer}"
        );
    }
    site.stop().await;
}

#[tokio::test]
async fn connections_past_the_limit_are_told() {
    let site = Site::with(Limits {
        connections_max: 1,
        ..Limits::default()
    })
    .await;
    let mut first = site.connect().await;
    first.send(&request("GET /healthz", b"")).await;
    assert_eq!(first.reply().await.status, 200);
    let refused = site.connect().await.reply().await;
    assert_eq!(
        (refused.verdict(), refused.header("retry-after")),
        ((503, "unavailable".into()), "1")
    );
    drop(first);
    while site.get("/v1/kv/a").await.status != 404 {
        tokio::task::yield_now().await;
    }
    site.stop().await;
}

#[tokio::test]
async fn a_stopping_server_finishes_what_it_began() {
    let site = Site::start().await;
    let idle = site.connect().await;
    let mut busy = site.connect().await;
    busy.send(
        b"PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n",
    )
    .await;
    assert_eq!(busy.reply().await.status, 100);
    site.begin_stop();
    assert_eq!(idle.rest().await, "");
    busy.send(b"abc").await;
    assert_eq!(busy.reply().await.status, 201);
    site.stop().await;
}

#[tokio::test]
async fn a_stopping_server_answers_who_has_just_connected() {
    let site = Site::start().await;
    // Connections that were accepted, and such that the kernel has made and nobody has accepted.
    let mut wires = Vec::new();
    for _ in 0..20 {
        wires.push(site.connect().await);
    }
    // They are taken, and wait.
    site.wait_for_metric("quorate_http_connections 21").await;
    for _ in 0..20 {
        wires.push(site.connect_at_once());
    }
    site.begin_stop();
    for wire in &mut wires {
        wire.send(&request("GET /healthz", b"")).await;
    }
    for mut wire in wires {
        let last = wire.reply().await;
        assert_eq!((last.status, last.header("connection")), (200, "close"));
    }
    site.stop().await;
}

#[tokio::test]
async fn a_lane_lasts_as_long_as_a_request_is_under_way_when_the_server_stops() {
    let site = Site::start().await;
    let mut busy = site.connect().await;
    busy.send(
        b"PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n",
    )
    .await;
    assert_eq!(busy.reply().await.status, 100);
    let mut lane = Lane::open(&site).await;
    site.begin_stop();
    while TcpStream::connect(site.address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(
        lane.echo("news").await.as_deref(),
        Some("NEWS"),
        "who waits may wait for what it brings"
    );
    busy.send(b"abc").await;
    assert_eq!(busy.reply().await.status, 201);
    assert_eq!(lane.next().await, None, "it ends with the last request");
    site.stop().await;
}

#[tokio::test]
async fn a_stopping_server_cuts_what_does_not_end() {
    let site = Site::with(Limits {
        drain_timeout: Duration::from_millis(20),
        ..Limits::default()
    })
    .await;
    let mut stuck = site.connect().await;
    stuck
        .send(
            b"PUT /v1/kv/a HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: \
        3\r\n\r\n",
        )
        .await;
    assert_eq!(stuck.reply().await.status, 100);
    site.stop().await;
    assert_eq!(stuck.rest().await, "");
}

#[tokio::test]
async fn a_stopping_server_still_answers_on_a_connection_in_use_and_says_that_it_is_the_last_time()
{
    let site = Site::start().await;
    let mut wire = site.connect().await;
    wire.send(&request("GET /healthz", b"")).await;
    assert_eq!(wire.reply().await.header("connection"), "");
    site.begin_stop();
    tokio::time::sleep(Duration::from_millis(50)).await;
    wire.send(&request("GET /healthz", b"")).await;
    let last = wire.reply().await;
    assert_eq!((last.status, last.header("connection")), (200, "close"));
    assert_eq!(wire.rest().await, "");
    site.stop().await;
}

#[tokio::test]
async fn peers_ask_in_json_and_frames() {
    let site = Site::start().await;
    let address: Address = site.address.to_string().parse().expect("an address");
    let (caller, wait) = (
        PeerCaller::new().expect("a client"),
        Duration::from_secs(20),
    );
    assert_eq!(
        caller.identity(&address, wait).await.expect("an answer"),
        identity()
    );
    let request = PromiseRequest {
        view: vec![],
        founder: DirectoryId(1),
        founder_address: address.clone(),
    };
    let refused = PromiseReply::Refused {
        reason: format!("not to {address}"),
    };
    assert_eq!(
        caller
            .promise(&address, &request, wait)
            .await
            .expect("an answer"),
        refused
    );
    let node = |directory| NodeSpec {
        address: address.clone(),
        public_address: None,
        directory,
    };
    assert_eq!(
        caller
            .replicas(&node(identity().directory), wait)
            .await
            .expect("an answer"),
        []
    );
    // Somebody else's are not taken for those of the node that had the address.
    let stranger = caller.replicas(&node(DirectoryId(6)), wait).await;
    assert!(
        matches!(&stranger, Err(PeerError::AnotherNode { address: told }) if *told == address),
        "{stranger:?}"
    );
    let announce = |command| {
        serde_json::to_value(Announcement {
            cluster: ClusterId(7),
            command,
        })
        .expect("JSON")
    };
    let command = meta::MetaCommand::Announce {
        node: NodeId(1),
        directory: DirectoryId(5),
        address: address.clone(),
        public_address: None,
    };
    let announced = site.post_json("/peer/announce", announce(command)).await;
    assert_eq!(
        (announced.status, announced.text().as_str()),
        (200, "\"Done\"")
    );
    let Standing::Member { view } = identity().standing else {
        unreachable!("it is a member's")
    };
    let found = meta::MetaCommand::Found { view };
    assert_eq!(
        site.post_json("/peer/announce", announce(found))
            .await
            .verdict(),
        (503, "unavailable".into())
    );
    for bad in ["", "{", "1", "{}"] {
        assert_eq!(
            site.ask("POST /peer/promise", bad).await.verdict(),
            (400, "invalid_body".into()),
            "{bad}"
        );
        assert_eq!(
            site.ask("POST /peer/announce", bad).await.verdict(),
            (400, "invalid_body".into()),
            "{bad}"
        );
    }
    let asked = ShardRequest {
        cluster: ClusterId(1),
        shard: GroupId(1),
        timeout_ms: 42,
        body: ShardBody::Count,
    };
    let reply = site.ask("POST /peer/shard", codec::encode(&asked)).await;
    let reply: ShardReply = codec::decode(&reply.body, "a reply").expect("our own encoding");
    assert_eq!(
        reply,
        ShardReply::Counted {
            keys: 42,
            slots: vec![]
        }
    );
    for bad in [&b""[..], b"\x02", b"\x01\xff\xff", b"GET"] {
        assert_eq!(
            site.ask("POST /peer/shard", bad).await.verdict(),
            (400, "invalid_body".into())
        );
    }
    assert_eq!(site.get("/peer/shard").await.header("allow"), "POST");
    site.stop().await;
}

/// A lane of a peer, on a connection of its own.
struct Lane {
    frames: Option<UnboundedSender<Bytes>>,
    answers: BodyDataStream<Incoming>,
    _driver: AbortOnDropHandle<()>,
}

impl Lane {
    async fn open(site: &Site) -> Self {
        let stream = TcpStream::connect(site.address).await.expect("it listens");
        let handshake =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (mut client, connection) = handshake.await.expect("it speaks HTTP/2");
        let driver = tokio::spawn(async move { drop(connection.await) });
        let (frames, received) = futures::channel::mpsc::unbounded::<Bytes>();
        let body = StreamBody::new(received.map(|data| Ok::<_, std::io::Error>(Frame::data(data))));
        let request =
            http::Request::post(format!("http://{}/peer/lane/raft-1", site.address)).body(body);
        let response = client.send_request(request.expect("a request")).await;
        let response = response.expect("an answer before the body ends");
        assert_eq!(response.status(), 200);
        let answers = response.into_body().into_data_stream();
        let mut lane = Self {
            frames: Some(frames),
            answers,
            _driver: AbortOnDropHandle::new(driver),
        };
        assert_eq!(lane.next().await.as_deref(), Some("lane raft-1\n"));
        lane
    }

    /// Sends a frame. Returns what comes back, unless the lane has ended.
    async fn echo(&mut self, frame: &'static str) -> Option<String> {
        let frames = self.frames.as_ref().expect("the lane is open");
        frames.unbounded_send(Bytes::from(frame)).ok()?;
        self.next().await
    }

    async fn next(&mut self) -> Option<String> {
        loop {
            let next = timeout(PATIENCE, self.answers.next())
                .await
                .expect("something comes in time");
            let data = next?.expect("no error");
            // HTTP/2 may end a body with an empty frame.
            if !data.is_empty() {
                return Some(String::from_utf8_lossy(&data).into_owned());
            }
        }
    }
}

#[tokio::test]
async fn a_lane_streams_both_ways_over_http_2() {
    let site = Site::start().await;
    let mut lane = Lane::open(&site).await;
    for frame in ["one", "two"] {
        assert_eq!(lane.echo(frame).await, Some(frame.to_uppercase()));
    }
    lane.frames = None;
    assert_eq!(
        lane.next().await,
        None,
        "the lane ends when its client does"
    );
    site.stop().await;
}

#[tokio::test]
async fn pieces_of_an_answer_are_charged_also_while_they_are_joined() {
    let site = Site::start().await;
    assert_eq!(site.put("/v1/kv/a", "v".repeat(50_000)).await.status, 201);
    let other = site
        .store
        .answers
        .take(site.store.answers.bytes_max() - 200_000)
        .expect("nothing is used");
    let key = r#"{"encoding":"string","data":"a"}"#;

    let fetch = |count: usize| (format!("[{}]", vec![key; count].join(",")), count);
    for (body, count) in [1, 3].map(fetch) {
        let status = site.ask("POST /fetch", body).await.status;
        assert_eq!(
            status,
            if count == 1 { 200 } else { 503 },
            "three take 150 kB, and as much again when they are joined"
        );
    }
    drop(other);
    assert_eq!(site.ask("POST /fetch", fetch(3).0).await.status, 200);
    let metrics = site.get("/metrics").await.text();
    assert!(
        metrics.contains("quorate_answer_bytes_in_flight 0\n"),
        "all is given back: {metrics}"
    );
    site.stop().await;
}

#[tokio::test]
async fn what_is_made_of_a_request_of_a_peer_is_bounded_and_paid_for() {
    let site = Site::with(Limits {
        bodies_bytes_max: 64 << 20,
        ..Limits::default()
    })
    .await;
    let of_keys = |count: usize| {
        let consistency = Consistency::Stale;
        let keys = vec![Bytes::new(); count];
        let body = ShardBody::GetMany {
            keys,
            bytes_max: 1,
            keys_only: false,
            consistency,
        };
        codec::encode(&ShardRequest {
            cluster: ClusterId(1),
            shard: GroupId(1),
            timeout_ms: 7,
            body,
        })
    };
    assert_eq!(
        site.ask("POST /peer/shard", of_keys(10_000)).await.status,
        200
    );
    let crowd = site.ask("POST /peer/shard", of_keys(800_000)).await;
    assert_eq!(
        crowd.verdict(),
        (429, "overloaded".into()),
        "a byte of these becomes a hundred"
    );
    let metrics = site.get("/metrics").await.text();
    assert!(
        metrics.contains("quorate_http_body_bytes_in_flight 0\n"),
        "all is given back: {metrics}"
    );
    site.stop().await;

    let site = Site::start().await;
    assert_eq!(
        site.ask("POST /peer/shard", of_keys(1_500_000))
            .await
            .verdict(),
        (413, "too_large".into())
    );
    site.stop().await;
}

#[tokio::test]
async fn an_answer_without_room_is_refused_in_the_words_of_its_dialect() {
    let site = Site::start().await;
    let value = "v".repeat(50_000);
    assert_eq!(site.put("/v1/kv/a", value.clone()).await.status, 201);
    let other = site
        .store
        .answers
        .take(site.store.answers.bytes_max() - 10_000)
        .expect("nothing is used");

    for head in ["GET /v1/kv", "GET /v1/kv?limit=1", "POST /v1/batch"] {
        let answer = site
            .ask(head, r#"{"operations":[{"op":"get","key":"a"}]}"#)
            .await;
        assert_eq!(
            (answer.verdict(), answer.header("retry-after")),
            ((429, "overloaded".into()), "1"),
            "{head}"
        );
    }
    let mixed = r#"{"operations":[{"op":"get","key":"a"},{"op":"put","key":"b","value":"1"}]}"#;
    let told = site.ask("POST /v1/batch", mixed).await;
    assert_eq!(
        told.verdict(),
        (504, "unknown_outcome".into()),
        "it was done, and what it returns can't be told"
    );
    for (head, expected) in [
        (
            "GET /kvs/keys/a",
            r#"{"error":"Unable to satisfy request","message":"Error in GET"}"#,
        ),
        (
            "GET /fetch",
            r#"{"error":"Unable to satisfy request","message":"Error in GET"}"#,
        ),
        ("GET /get/a", "No server is available"),
    ] {
        let answer = site.ask(head, "").await;
        assert_eq!(
            (answer.status, answer.text().trim_end()),
            (503, expected),
            "{head}"
        );
    }
    assert_eq!(
        site.get("/healthz").await.status,
        200,
        "what is small is always told"
    );

    drop(other);
    assert_eq!(site.get("/v1/kv").await.status, 200);
    assert_eq!(site.get("/kvs/keys/a").await.status, 200);
    let metrics = site.get("/metrics").await.text();
    assert!(
        metrics.contains("quorate_answer_bytes_in_flight 0\n"),
        "all is given back: {metrics}"
    );
    assert!(
        metrics.contains("quorate_answer_refusals_total 7\n"),
        "{metrics}"
    );
    site.stop().await;
}

#[tokio::test]
async fn who_knows_a_node_already_is_not_sent_its_view_again() {
    let site = Site::start().await;
    let first = site.get("/peer/identity").await;
    let etag = first.header("etag").to_owned();
    assert!(first.status == 200 && first.text().len() > 50, "{first:?}");
    let again = format!("GET /peer/identity\nif-none-match: {etag}");
    let again = site.ask(&again, "").await;
    assert_eq!((again.status, again.text().len()), (304, 0), "{again:?}");
    let other = "GET /peer/identity\nif-none-match: \"0\"";
    let other = site.ask(other, "").await;
    assert_eq!((other.status, other.text()), (200, first.text()));

    let caller = PeerCaller::new().expect("a client");
    let address: Address = site.address.to_string().parse().expect("an address");
    let asked = async || {
        let asked = caller.identity(&address, Duration::from_secs(20));
        asked.await.expect("an answer")
    };
    assert_eq!(asked().await, asked().await);
    site.stop().await;
}
