//! Bad input of every kind gets an answer that says why, and changes nothing; greedy, slow and
//! broken clients take nothing from others.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use crate::common::cluster::{Cluster, Setup};
use crate::common::http::Request;
use crate::common::{eventually, say};

/// What other clients may wait while a crowd is connected. Generous: it tells a stuck server from a
/// busy machine.
const SERVED_LIMIT: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_and_changes_nothing() {
    let cluster = Cluster::start(Setup {
        no_view: true,
        ..Setup::nodes(1)
    })
    .await;
    let address = &cluster.nodes[0].address;
    put(&cluster, "kept", "value").await;
    for (request, expected) in bad_requests() {
        let (shown, answer) = refused(address, &request, expected);
        let told = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        assert!(
            told.contains("detail") || told.contains("error"),
            "{shown:?} was refused without a reason: {answer}"
        );
        assert_holds_only_kept(&cluster).await;
    }
    for (request, expected) in not_http() {
        refused(address, &request, expected);
        assert_holds_only_kept(&cluster).await;
    }
}

/// Panics unless the answer has one of these statuses. Returns the beginning of the request, and
/// the answer.
fn refused(address: &str, request: &[u8], expected: &[u16]) -> (String, String) {
    let shown = String::from_utf8_lossy(&request[..request.len().min(100)]).into_owned();
    let answer = exchange(address, request).unwrap_or_else(|error| panic!("{shown:?}: {error}"));
    let status = status(&answer);
    assert!(
        expected.contains(&status),
        "{shown:?} was answered {status}, not {expected:?}: {answer}"
    );
    (shown, answer)
}

/// Wrong requests, raw, and the statuses that are right for them.
fn bad_requests() -> Vec<(Vec<u8>, &'static [u16])> {
    let get = |path: &str| {
        format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").into_bytes()
    };
    let head = |method: &str, path: &str, headers: &str, length: usize| {
        format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: \
            {length}\r\n\r\n"
        )
    };
    let with_body = |method: &str, path: &str, headers: &str, body: &[u8]| {
        [
            head(method, path, headers, body.len()).into_bytes(),
            body.to_vec(),
        ]
        .concat()
    };
    let put = |headers: &str| with_body("PUT", "/v1/kv/bad", headers, b"bad");
    let batch = |body: &str| {
        with_body(
            "POST",
            "/v1/batch",
            "content-type: application/json\r\n",
            body.as_bytes(),
        )
    };
    let long_key = format!("/v1/kv/{}", "k".repeat(4097));
    let many = vec![r#"{"op":"put","key":"bad","value":"bad"}"#; 10_001].join(",");
    vec![
        (get("/no/such/path"), &[404]),
        (get("/v1/kv/%zz"), &[400]),
        (get("/v1/kv/%4"), &[400]),
        (get(&long_key), &[400]),
        (with_body("PUT", &long_key, "", b"bad"), &[400]),
        (with_body("PUT", "/v1/kv/", "", b"bad"), &[400, 404, 405]),
        (with_body("POST", "/v1/kv/kept", "", b"bad"), &[405]),
        (with_body("PATCH", "/v1/kv/kept", "", b"bad"), &[405]),
        (get("/v1/batch"), &[405]),
        (get("/v1/kv/kept?consistency=maybe"), &[400]),
        (get("/v1/kv/kept?proxy=perhaps"), &[400]),
        (get("/v1/kv/kept?proxy=true&proxy=true"), &[400]),
        (get("/v1/kv/kept?nonsense=1"), &[400]),
        (get("/v1/kv?prefix=a&limit=abc"), &[400]),
        (get("/v1/kv?prefix=a&limit=0"), &[400]),
        (get("/v1/kv?prefix=a&limit=99999999999999999999"), &[400]),
        (get("/v1/kv?prefix=a&cursor=%ff"), &[400]),
        (put("if-match: 1\r\n"), &[400]),
        (put("if-match: \"x\"\r\n"), &[400, 412]),
        (put("if-match: \"1\r\n"), &[400]),
        (put("if-match: \"1\"\r\nif-none-match: *\r\n"), &[400, 412]),
        (put("idempotency-key: \r\n"), &[400]),
        (
            put(&format!("idempotency-key: {}\r\n", "k".repeat(5000))),
            &[400],
        ),
        (batch(""), &[400]),
        (batch("{"), &[400]),
        (batch("[]"), &[400]),
        (batch(r#"{"operations": {}}"#), &[400]),
        (
            batch(r#"{"operations": [{"op": "put", "key": "bad", "value": "x"}], "more": 1}"#),
            &[400],
        ),
        (
            batch(concat!(
                r#"{"operations": [{"op": "put", "key": "bad", "value": "x"}, "#,
                r#"{"op": "steal", "key": "bad"}]}"#
            )),
            &[400],
        ),
        (
            batch(concat!(
                r#"{"operations": [{"op": "put", "key": "bad", "value": "x"}, "#,
                r#"{"op": "put", "key": "bad"}]}"#
            )),
            &[400],
        ),
        (
            batch(concat!(
                r#"{"operations": [{"op": "put", "key": "bad", "value": "x"}, "#,
                r#"{"op": "put", "key": "", "value": "x"}]}"#
            )),
            &[400],
        ),
        (
            batch(r#"{"operations": [{"op": "put", "key": "bad", "value": 5}]}"#),
            &[400],
        ),
        (
            batch(concat!(
                r#"{"operations": [{"op": "put", "key": "bad", "#,
                r#""value": "!", "encoding": "base64"}]}"#
            )),
            &[400],
        ),
        (batch(&format!(r#"{{"operations": [{many}]}}"#)), &[413]),
        (batch(&"[".repeat(100_000)), &[400]),
        (with_body("POST", "/v1/batch", "", b"\xff\xfe\x00"), &[400]),
        // The sizes are only announced: the refusal must not wait for the bytes.
        (head("PUT", "/v1/kv/bad", "", 65 << 20).into_bytes(), &[413]),
        (head("PUT", "/v1/kv/bad", "", 9 << 20).into_bytes(), &[413]),
        (head("POST", "/v1/batch", "", 1 << 40).into_bytes(), &[413]),
        (
            b"PUT /v1/kv/bad HTTP/1.1\r\nhost: x\r\ntransfer-encoding: \
            chunked\r\n\r\nzz\r\nbad\r\n0\r\n\r\n"
                .to_vec(),
            &[400],
        ),
    ]
}

/// What the HTTP parser itself refuses, with a status and no more.
fn not_http() -> Vec<(Vec<u8>, &'static [u16])> {
    vec![
        (
            format!(
                "GET /v1/kv?prefix={} HTTP/1.1\r\nhost: x\r\n\r\n",
                "a".repeat(100_000)
            )
            .into_bytes(),
            &[400, 414, 431],
        ),
        (
            format!(
                "GET /v1/kv/kept HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n",
                "h".repeat(200_000)
            )
            .into_bytes(),
            &[400, 431],
        ),
        (b"nonsense\r\n\r\n".to_vec(), &[400]),
        (b"GET /v1/kv/kept HTTP/9.9\r\n\r\n".to_vec(), &[400, 505]),
        (
            b"PUT /v1/kv/bad HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n".to_vec(),
            &[400],
        ),
        (
            b"PUT /v1/kv/bad HTTP/1.1\r\nhost: x\r\n\
              content-length: 3\r\ncontent-length: 4\r\n\r\nbad"
                .to_vec(),
            &[400],
        ),
        (vec![0; 2000], &[400]),
    ]
}

/// A request that is cut anywhere is not done; a client that hangs up anywhere harms nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_cut_in_the_middle_change_nothing() {
    let cluster = Cluster::start(Setup {
        no_view: true,
        ..Setup::nodes(1)
    })
    .await;
    let address = &cluster.nodes[0].address;
    put(&cluster, "kept", "value").await;
    let whole = b"PUT /v1/kv/bad HTTP/1.1\r\nhost: x\r\ncontent-length: 12\r\n\r\nwhole value!";
    for cut in 0..whole.len() {
        let mut stream = TcpStream::connect(address).expect("a connection");
        stream.write_all(&whole[..cut]).expect("a part sent");
        let how = if cut % 2 == 0 {
            Shutdown::Write
        } else {
            Shutdown::Both
        };
        let _ = stream.shutdown(how);
    }
    let chunked =
        b"PUT /v1/kv/bad HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nwhole\r\n";
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.write_all(chunked).expect("a part sent");
    drop(stream);
    assert_holds_only_kept(&cluster).await;
}

/// Thousands of connections that say nothing, or something very slowly, and others are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_silent_and_slow_clients_takes_nothing_from_others() {
    let wanted = 10_000;
    let limit = raise_open_files();
    let crowd_size = wanted.min(
        usize::try_from(limit)
            .unwrap_or(usize::MAX)
            .saturating_sub(500),
    );
    let cluster = Cluster::start(Setup {
        no_view: true,
        ..Setup::nodes(1)
    })
    .await;
    let address = &cluster.nodes[0].address;
    put(&cluster, "kept", "value").await;
    let start = Instant::now();
    let mut crowd = Vec::new();
    for n in 0..crowd_size {
        let mut stream = TcpStream::connect(address)
            .unwrap_or_else(|error| panic!("connection {n} of {crowd_size}: {error}"));
        let said: &[u8] = match n % 4 {
            0 => b"",
            1 => b"G",
            2 => b"GET /v1/kv/kept HTTP/1.1\r\nhost: x\r\nx-slow: ",
            _ => b"PUT /v1/kv/bad HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nslow",
        };
        stream.write_all(said).expect("a few bytes sent");
        crowd.push(stream);
    }
    let connected = start.elapsed();
    let start = Instant::now();
    for n in 0..100 {
        put(&cluster, "kept", "value").await;
        // A crowd that trickles is a crowd that is read.
        crowd[(n * 4 + 2) % crowd_size]
            .write_all(b"x")
            .expect("a byte more");
    }
    let served = start.elapsed() / 100;
    say(&format!(
        "limits: {crowd_size} connections in {connected:.1?}; meanwhile a write takes {served:.1?}"
    ));
    assert!(served < SERVED_LIMIT, "writes took {served:?} each");
    drop(crowd);
    assert_holds_only_kept(&cluster).await;
}

async fn put(cluster: &Cluster, key: &str, value: &str) {
    let request = Request::put(format!("/v1/kv/{key}"), value).timeout(SERVED_LIMIT);
    let answer = cluster
        .client
        .ask(&cluster.nodes[0].address, &request)
        .await
        .expect("an answer");
    assert!(
        matches!(answer.status, 200 | 201),
        "{}: {}",
        answer.status,
        answer.text()
    );
}

/// The node lives, and nothing but the key `kept` is in it.
async fn assert_holds_only_kept(cluster: &Cluster) {
    let address = &cluster.nodes[0].address;
    let answer = cluster
        .client
        .ask(address, &Request::get("/v1/kv/kept"))
        .await
        .expect("an answer");
    assert_eq!((answer.status, answer.text()), (200, "value".to_owned()));
    let answer = cluster
        .client
        .ask(address, &Request::get("/v1/kv/bad"))
        .await
        .expect("an answer");
    assert_eq!(
        answer.status,
        404,
        "a refused request was done: {}",
        answer.text()
    );
    let counted = eventually(Duration::from_secs(10), async || {
        let shards = cluster.status().await.shards;
        (shards.iter().filter_map(|shard| shard.keys).sum::<u64>() == 1).then_some(())
    });
    counted.await.expect("one key in all");
}

/// Sends raw bytes, and reads until the server closes or says no more.
fn exchange(address: &str, request: &[u8]) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    // The server may refuse and close before it has read all.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    while !complete(&answer) {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&piece[..n]),
            Err(_) if !answer.is_empty() => break,
            Err(error) => return Err(error),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Whether an answer with a known length is there in full.
fn complete(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .and_then(|length| length.trim().parse::<usize>().ok());
    length.is_some_and(|length| body.len() >= length)
}

fn status(answer: &str) -> u16 {
    answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or(0)
}

/// As many open files as this process may have; the nodes inherit it.
fn raise_open_files() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    );
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
