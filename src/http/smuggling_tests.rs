//! Requests that two readers could take for different ones: what is made of each, byte for byte. A
//! proxy before this server may read them otherwise, and must not be led to take a part of one
//! client's request for another's.

use std::time::Duration;

use super::Limits;
use super::testing::{Site, Wire};

/// Returns what was answered to `sent` by the time at which the connection ended.
async fn answers(site: &Site, sent: &str) -> (Vec<u16>, String) {
    let mut wire = site.connect().await;
    wire.send(sent.as_bytes()).await;
    wire.close_sending().await;
    let text = wire.rest().await;
    let status = |line: &str| line.get(..3).and_then(|status| status.parse().ok());
    (
        text.split("HTTP/1.1 ").skip(1).filter_map(status).collect(),
        text,
    )
}

#[tokio::test]
async fn a_head_that_leaves_open_whom_it_is_for_or_where_it_ends_is_refused() {
    let site = Site::start().await;
    for (head, expected) in [
        // The host that it is for.
        ("GET /healthz HTTP/1.1\r\nhost: a\r\n", 200),
        ("GET /healthz HTTP/1.1\r\nHOST: a:80\r\n", 200),
        ("GET /healthz HTTP/1.1\r\nhost: [::1]:80\r\n", 200),
        ("GET /healthz HTTP/1.1\r\nhost:\r\n", 200),
        ("GET /healthz HTTP/1.1\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a\r\nhost: a\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a\r\nhost: b\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a/b\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a, b\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: u@a\r\n", 400),
        ("GET http://b/healthz HTTP/1.1\r\nhost: a\r\n", 200),
        ("GET http://b/healthz HTTP/1.1\r\n", 400),
        // The form of a head.
        ("\r\nGET /healthz HTTP/1.1\r\nhost: a\r\n", 200),
        ("GET /healthz HTTP/1.1\nhost: a\n", 200),
        ("GET  /healthz HTTP/1.1\r\nhost: a\r\n", 400),
        (" GET /healthz HTTP/1.1\r\nhost: a\r\n", 400),
        ("GET /healthz HTTP/1.2\r\nhost: a\r\n", 400),
        ("GET /healthz HTTP/2.0\r\nhost: a\r\n", 400),
        ("GET /healthz\r\nhost: a\r\n", 400),
        ("GET /heal\u{1}thz HTTP/1.1\r\nhost: a\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a\r\nb: c\r\n d\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a\r\n b: c\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost : a\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a\r\nb\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a\r\n: c\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a\r\nb: c\rd\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nhost: a\r\nb: c\0d\r\n", 400),
        // The length of its body.
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\ncontent-length: 0\r\n",
            201,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\ncontent-length: 1\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 0, 0\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: +0\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 0x0\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551616\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: identity\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n",
            400,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n",
            501,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n",
            501,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\ntransfer-encoding: \
            chunked\r\n",
            501,
        ),
        (
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\u{b}chunked\r\n",
            400,
        ),
    ] {
        let site_before = site.store.requests();
        let (found, text) = answers(&site, &format!("{head}\r\n")).await;
        assert_eq!(found, [expected], "{head:?}: {text:.300}");
        assert!(
            expected < 300 || site.store.requests() == site_before,
            "{head:?} reached the store"
        );
        assert!(
            expected < 300 || text.contains("connection: close"),
            "{head:?} leaves it open: {text:.300}"
        );
    }
    let (_, old) = answers(&site, "GET /healthz HTTP/1.0\r\n\r\n").await;
    assert!(old.starts_with("HTTP/1.0 200"), "{old}");
    let (_, old) = answers(
        &site,
        "PUT /v1/kv/a HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    )
    .await;
    assert!(old.contains(" 400 "), "{old}");
    site.stop().await;
}

#[tokio::test]
async fn chunks_win_over_a_length_and_nothing_is_read_behind_them() {
    let site = Site::start().await;
    let (chunked, length) = ("transfer-encoding: chunked\r\n", "content-length: 200\r\n");
    let behind = "GET /v1/kv/a HTTP/1.1\r\nhost: a\r\n\r\n";
    for headers in [format!("{chunked}{length}"), format!("{length}{chunked}")] {
        let sent = format!(
            "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\n{headers}\r\n3\r\nabc\r\n0\r\n\r\n{behind}"
        );
        let (found, text) = answers(&site, &sent).await;
        assert_eq!(found.len(), 1, "{text}");
        assert!(
            matches!(found[..], [200 | 201]) && text.contains("connection: close"),
            "{text}"
        );
        assert_eq!(site.store.record(b"a").expect("it was stored").value, "abc");
    }
    site.stop().await;
}

#[tokio::test]
async fn chunks_that_are_none_store_nothing() {
    let site = Site::start().await;
    let behind = "GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n";
    for chunks in [
        "z\r\nabc\r\n0\r\n\r\n",
        "-3\r\nabc\r\n0\r\n\r\n",
        "+3\r\nabc\r\n0\r\n\r\n",
        "0x3\r\nabc\r\n0\r\n\r\n",
        " 3\r\nabc\r\n0\r\n\r\n",
        "\r\nabc\r\n0\r\n\r\n",
        "10000000000000003\r\nabc\r\n0\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "3\r\nab\r\n0\r\n\r\n",
        "3\nabc\r\n0\r\n\r\n",
        "3;a\nb\r\nabc\r\n0\r\n\r\n",
        "3\r\nabc\r\n0\r\nb c: d\r\n\r\n",
    ] {
        let head = "PUT /v1/kv/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        let (found, text) = answers(&site, &format!("{head}{chunks}{behind}")).await;
        assert!(found.is_empty() || found == [400], "{chunks:?}: {text}");
        assert!(site.store.record(b"a").is_none(), "{chunks:?} was stored");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_body_is_never_read_as_a_request() {
    let site = Site::start().await;
    let inner = "PUT /v1/kv/inner HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx";
    let (length, last) = (
        inner.len(),
        "GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    );
    for line in [
        "GET /healthz",
        "GET /v1/kv",
        "GET /v1/kv/a",
        "DELETE /v1/kv/a",
        "POST /v1/kv/a",
        "CONNECT a:1",
        "GET /x",
    ] {
        let head = format!("{line} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
        let (found, text) = answers(&site, &format!("{head}{inner}{last}")).await;
        assert!((1..=2).contains(&found.len()), "{line}: {text}");
        assert!(
            site.store.record(b"inner").is_none(),
            "the body of {line} was read as a request"
        );
    }
    site.stop().await;
}

#[tokio::test]
async fn requests_in_a_row_are_answered_in_their_order_also_when_the_client_has_said_all() {
    let site = Site::start().await;
    let mut sent = String::new();
    for (value, path) in [("1", "a"), ("2", "b"), ("3", "a")] {
        sent.push_str(&format!(
            "PUT /v1/kv/{path} HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n{value}"
        ));
        sent.push_str(&format!("GET /v1/kv/{path} HTTP/1.1\r\nhost: a\r\n\r\n"));
    }
    site.store.slow_down_writes(Duration::from_millis(20));
    let (found, text) = answers(&site, &sent).await;
    assert_eq!(found, [201, 200, 201, 200, 200, 200], "{text}");
    site.stop().await;
}

/// A client that has sent all and closed its sending side, as `nc -N` does.
async fn half_closed(site: &Site, head: &str) -> Wire {
    let mut wire = site.connect().await;
    wire.send(format!("{head}\r\nhost: a\r\n\r\n").as_bytes())
        .await;
    wire.close_sending().await;
    wire
}

#[tokio::test]
async fn a_client_that_has_closed_its_sending_side_is_answered() {
    let site = Site::start().await;
    site.store.slow_down_reads(Duration::from_millis(200));
    let answer = half_closed(&site, "GET /v1/kv/a HTTP/1.1")
        .await
        .rest()
        .await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");

    // It is asked whether it is there, in a way that clients pass over.
    site.store.slow_down_reads(Duration::from_millis(2500));
    let answer = half_closed(&site, "GET /v1/kv/a HTTP/1.1")
        .await
        .rest()
        .await;
    let (interim, last) = answer
        .rsplit_once("\r\n\r\nHTTP/1.1 ")
        .expect("more than one answer");
    assert!(
        interim
            .split("\r\n\r\n")
            .all(|answer| answer == "HTTP/1.1 100 Continue"),
        "{answer}"
    );
    assert!(last.starts_with("404"), "{answer}");

    let old = half_closed(&site, "GET /v1/kv/a HTTP/1.0")
        .await
        .rest()
        .await;
    assert!(old.starts_with("HTTP/1.0 404"), "{old}");
    site.stop().await;
}

#[tokio::test]
async fn a_client_that_is_gone_is_noticed_whether_it_says_so_or_not() {
    let site = Site::start().await;
    site.store.slow_down_reads(Duration::from_secs(3600));
    let waits = half_closed(&site, "GET /v1/kv/a?timeout=60s HTTP/1.1").await;
    let mut resets = site.connect().await;
    resets
        .send(b"GET /v1/kv/a?timeout=60s HTTP/1.1\r\nhost: a\r\n\r\n")
        .await;
    site.wait_for_metric("quorate_http_requests_in_flight 2")
        .await;
    drop(waits);
    resets.reset();
    site.wait_for_metric("quorate_http_requests_in_flight 0")
        .await;
    site.stop().await;
}

#[tokio::test]
async fn a_head_that_comes_byte_by_byte_has_a_total_time() {
    let limits = Limits {
        head_arrival_timeout: Duration::from_millis(300),
        ..Limits::default()
    };
    let site = Site::with(limits).await;
    for beginning in ["", "GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"] {
        let mut wire = site.connect().await;
        wire.send(beginning.as_bytes()).await;
        if !beginning.is_empty() {
            assert_eq!(wire.reply().await.status, 200);
        }
        let sending = async {
            loop {
                wire.send(b"P").await;
                tokio::time::sleep(Duration::from_millis(20)).await;
                if wire.is_closed() {
                    return;
                }
            }
        };
        tokio::time::timeout(super::testing::PATIENCE, sending)
            .await
            .expect("it is cut in time");
    }
    site.stop().await;
}
