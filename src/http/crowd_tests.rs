//! Crowds and greedy clients, over real connections: who gets in when all places are taken, and
//! what becomes of those who ask and do not read, or open and say nothing.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::Limits;
use super::testing::{PATIENCE, Site, Wire, request};

type Client = SendRequest<Empty<Bytes>>;

/// A connection over HTTP/2, whose streams may each be sent so much at first; and what ends with
/// it.
async fn connect_http2(site: &Site, window_bytes: u32) -> (Client, JoinHandle<()>) {
    let stream = TcpStream::connect(site.address).await.expect("it listens");
    let mut builder = Builder::new(TokioExecutor::new());
    builder.initial_stream_window_size(window_bytes);
    let (client, connection) = builder
        .handshake(TokioIo::new(stream))
        .await
        .expect("it speaks HTTP/2");
    let ended = tokio::spawn(async move {
        let _ = connection.await;
    });
    (client, ended)
}

fn get(path: &str) -> hyper::Request<Empty<Bytes>> {
    let uri = format!("http://test{path}");
    hyper::Request::get(uri)
        .body(Empty::new())
        .expect("a request")
}

async fn ask(client: &mut Client, path: &str) -> hyper::Response<Incoming> {
    timeout(PATIENCE, client.send_request(get(path)))
        .await
        .expect("an answer in time")
        .expect("an answer")
}

/// A client that has a place.
async fn client(site: &Site) -> Wire {
    let mut wire = site.connect().await;
    wire.send(&request("GET /healthz", b"")).await;
    assert_eq!(wire.reply().await.status, 200);
    wire
}

#[tokio::test]
async fn peers_and_watchers_get_in_when_clients_have_taken_all_places() {
    let site = Site::with(Limits {
        connections_max: 1,
        ..Limits::default()
    })
    .await;
    let held = client(&site).await;

    assert_eq!(site.get("/peer/identity").await.status, 200);
    let watcher = site.get("/readyz").await;
    assert_eq!(
        (watcher.status, watcher.header("connection")),
        (200, "close")
    );
    let refused = site.get("/v1/kv/a").await;
    assert_eq!(
        (refused.verdict(), refused.header("connection")),
        ((503, "unavailable".into()), "close")
    );

    // Silent ones stand in nobody's way.
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(site.connect().await);
    }
    let (mut peer, _) = connect_http2(&site, 1 << 20).await;
    assert_eq!(ask(&mut peer, "/peer/identity").await.status(), 200);
    assert_eq!(ask(&mut peer, "/v1/kv/a").await.status(), 503);
    drop((held, crowd));
    site.stop().await;
}

#[tokio::test]
async fn a_client_that_asks_and_does_not_read_loses_its_connection() {
    let site = Site::with(Limits {
        write_timeout: Duration::from_millis(100),
        ..Limits::default()
    })
    .await;
    assert_eq!(site.put("/v1/kv/a", vec![b'v'; 8 << 20]).await.status, 201);
    let mut greedy = site.connect().await;
    for _ in 0..10 {
        greedy.send(&request("GET /v1/kv/a", b"")).await;
    }
    site.wait_for_metric("quorate_http_connections_stalled_total 1")
        .await;
    drop(greedy);
    site.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_take_one_stream_loses_its_connection() {
    let site = Site::with(Limits {
        write_timeout: Duration::from_millis(100),
        ..Limits::default()
    })
    .await;
    for (key, bytes) in [("small", 100), ("large", 1 << 20)] {
        assert_eq!(
            site.put(&format!("/v1/kv/{key}"), vec![b'v'; bytes])
                .await
                .status,
            201
        );
    }
    for (count, (key, window)) in [
        ("small", 10),
        ("large", 10),
        ("large", 65_536),
        ("small", 0),
    ]
    .into_iter()
    .enumerate()
    {
        let (mut client, ended) = connect_http2(&site, window).await;
        let response = ask(&mut client, &format!("/v1/kv/{key}")).await;
        timeout(PATIENCE, ended)
            .await
            .expect("it is cut in time")
            .expect("no panic");
        assert!(
            response.into_body().collect().await.is_err(),
            "{key} with a window of {window} came all the same"
        );
        site.wait_for_metric(&format!(
            "quorate_http_connections_stalled_total {}",
            count + 1
        ))
        .await;
    }
    site.stop().await;
}

#[tokio::test]
async fn a_large_answer_comes_whole_over_http_2() {
    let site = Site::start().await;
    let value: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(site.put("/v1/kv/a", &value).await.status, 201);
    let (mut client, _) = connect_http2(&site, 1 << 20).await;
    let response = ask(&mut client, "/v1/kv/a").await;
    assert_eq!(response.headers()["content-length"], "3000000");
    assert!(
        response
            .into_body()
            .collect()
            .await
            .expect("all of it")
            .to_bytes()
            == value
    );
    assert_eq!(ask(&mut client, "/v1/kv/b").await.status(), 404);
    site.stop().await;
}

#[tokio::test]
async fn an_idle_connection_over_http_2_ends_and_one_with_a_lane_does_not() {
    let site = Site::with(Limits {
        head_timeout: Duration::from_millis(50),
        ..Limits::default()
    })
    .await;
    let stream = TcpStream::connect(site.address).await.expect("it listens");
    let (mut peer, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("it speaks HTTP/2");
    let driver = tokio::spawn(connection);
    let (frames, received) = futures::channel::mpsc::unbounded::<Bytes>();
    let body = StreamBody::new(received.map(|data| Ok::<_, std::io::Error>(Frame::data(data))));
    let lane = hyper::Request::post("http://test/peer/lane/raft-1")
        .body(body)
        .expect("a request");
    let mut answers = peer
        .send_request(lane)
        .await
        .expect("an answer")
        .into_body()
        .into_data_stream();
    assert_eq!(
        answers.next().await.expect("a frame").expect("no error"),
        "lane raft-1\n"
    );

    // Several times as long as a silent connection may last.
    for used in [true, false, true, false] {
        let (mut client, ended) = connect_http2(&site, 1 << 20).await;
        if used {
            assert_eq!(ask(&mut client, "/healthz").await.status(), 200);
        }
        timeout(PATIENCE, ended)
            .await
            .expect("it ends in time")
            .expect("no panic");
    }
    frames
        .unbounded_send(Bytes::from("still there"))
        .expect("the lane is open");
    assert_eq!(
        answers.next().await.expect("a frame").expect("no error"),
        "STILL THERE"
    );
    drop((frames, peer));
    driver.abort();
    site.stop().await;
}

#[tokio::test]
async fn streams_that_are_reset_at_once_leave_nothing_behind() {
    let site = Site::start().await;
    site.store.slow_down_reads(Duration::from_secs(3600));
    let (mut client, ended) = connect_http2(&site, 1 << 20).await;
    for _ in 0..3000 {
        if client.ready().await.is_err() {
            break;
        }
        let mut begun = Box::pin(client.send_request(get("/v1/kv/a")));
        let _ = futures::poll!(&mut begun);
        tokio::task::yield_now().await;
        // That resets it.
        drop(begun);
    }
    assert!(site.store.requests() > 0, "nothing has come");
    site.wait_for_metric("quorate_http_requests_in_flight 0")
        .await;
    assert_eq!(site.get("/healthz").await.status, 200);
    ended.abort();
    site.stop().await;
}

#[tokio::test]
async fn an_upgrade_is_not_taken_up() {
    let site = Site::start().await;
    for protocol in ["h2c", "websocket"] {
        let head = format!(
            "GET /healthz\nconnection: upgrade, http2-settings\nupgrade: \
            {protocol}\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA"
        );
        assert_eq!(site.ask(&head, "").await.status, 200, "{protocol}");
    }
    site.stop().await;
}
