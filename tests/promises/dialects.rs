//! The fixed dialects through every node of a real cluster: to the letter, one key space, large
//! batches, and an answer without a quorum.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::cluster::{Cluster, Setup};
use crate::common::http::{Answer, Request};
use crate::common::{eventually, memory_peak_bytes, say};

/// The contracts promise a word within 5 s; the rest is for the machine.
const WORD_LIMIT: Duration = Duration::from_millis(6000);

/// As plain `curl -d` sends it.
async fn ask(cluster: &Cluster, node: usize, line: &str, body: &str) -> Answer {
    let (method, path) = line.split_once(' ').expect("a method and a path");
    let method = Method::from_bytes(method.as_bytes()).expect("a method");
    let request = Request {
        body: body.as_bytes().to_vec(),
        ..Request::new(method, path)
    };
    let request = request
        .header("content-type", "application/x-www-form-urlencoded")
        .timeout(Duration::from_secs(120));
    let answer = cluster
        .client
        .ask_only(&cluster.nodes[node].address, &request)
        .await;
    answer.unwrap_or_else(|failure| panic!("{line} at node {node}: {failure:?}"))
}

/// A request and its whole answer.
struct Step {
    line: &'static str,
    body: &'static str,
    status: u16,
    answer: &'static str,
}

const fn step(line: &'static str, body: &'static str, status: u16, answer: &'static str) -> Step {
    Step {
        line,
        body,
        status,
        answer,
    }
}

/// Played from the first to the last, each at whichever node: what one dialect writes the others
/// read.
const TABLE: [Step; 24] = [
    step(
        "PUT /set",
        "[]",
        200,
        r#"[{"keys_added":0,"keys_failed":[]}]"#,
    ),
    step("POST /set", "[]", 200, ""),
    step(
        "PUT /set",
        r#"[{"key":{"encoding":"string","data":"a1"},"value":{"encoding":"string","data":"one"}},
            {"key":{"encoding":"binary","data":"0110"},
             "value":{"encoding":"binary","data":"00101"}},
            {"key":{"encoding":"morse","data":".-"},"value":{"encoding":"string","data":"x"}}]"#,
        206,
        r#"[{"keys_added":2,"keys_failed":[{"encoding":"morse","data":".-"}]}]"#,
    ),
    step(
        "POST /fetch",
        r#"[{"encoding":"binary","data":"0110"},{"encoding":"string","data":"nothing"}]"#,
        200,
        concat!(
            r#"[{"key":{"encoding":"binary","data":"0110"},"#,
            r#""value":{"encoding":"binary","data":"00101"}},"#,
            r#"{"key":{"encoding":"string","data":"nothing"},"value":{"encoding":"","data":""}}]"#
        ),
    ),
    step(
        "POST /query",
        r#"[{"encoding":"string","data":"a1"},{"encoding":"string","data":"0110"}]"#,
        200,
        concat!(
            r#"[{"key":{"encoding":"string","data":"a1"},"value":true},"#,
            r#"{"key":{"encoding":"string","data":"0110"},"value":false}]"#
        ),
    ),
    step(
        "GET /get/a1",
        "",
        200,
        r#"response from server:"retrived key value is one""#,
    ),
    step(
        "POST /get",
        r#"[{"key":"a1"}]"#,
        200,
        r#"{"existedKey":[{"key":"a1","value":"one"}]}"#,
    ),
    step("GET /v1/kv/a1?proxy=true", "", 200, "one"),
    step(
        "POST /set/b1",
        r#"{"n": [1, null, true]}"#,
        200,
        r#"response from server:"stored key:value is {'n': [1, None, True]}""#,
    ),
    step(
        "GET /get/b1",
        "",
        200,
        r#"response from server:"retrived key value is {'n': [1, None, True]}""#,
    ),
    step(
        "GET /v1/kv/b1?proxy=true",
        "",
        200,
        r#"{"n": [1, null, true]}"#,
    ),
    step(
        "POST /fetch",
        r#"[{"encoding":"string","data":"b1"}]"#,
        200,
        concat!(
            r#"[{"key":{"encoding":"string","data":"b1"},"#,
            r#""value":{"encoding":"string","data":"{\"n\": [1, null, true]}"}}]"#
        ),
    ),
    step(
        "POST /get",
        r#"[{"key":"b1"},{"key":"no"}]"#,
        200,
        concat!(
            r#"{"existedKey":[{"key":"b1","value":"{\"n\": [1, null, true]}"}],"#,
            r#""notExistedKey":[{"key":"no","value":""}]}"#
        ),
    ),
    step(
        "POST /set",
        r#"[{"key":"e1","value":"plain"}]"#,
        200,
        "Success to set key",
    ),
    step(
        "GET /get/e1",
        "",
        200,
        r#"response from server:"retrived key value is plain""#,
    ),
    step(
        "GET /get/none",
        "",
        200,
        r#"response from server:"No such key on any server""#,
    ),
    step(
        "POST /get",
        r#"[{"key":"none"}]"#,
        200,
        r#"{"existedKey":null,"notExistedKey":[{"key":"none","value":""}]}"#,
    ),
    step(
        "POST /set/b-1",
        "1",
        422,
        concat!(
            r#"{"error":"A key is letters and digits, at most 4096 bytes of them","#,
            r#""message":"Error in POST"}"#
        ),
    ),
    step(
        "POST /set/b1",
        "[]",
        422,
        r#"{"error":"The value is empty","message":"Error in POST"}"#,
    ),
    step(
        "GET /set/b1",
        "",
        403,
        r#"{"error":"Use POST to set a key","message":"Error in GET"}"#,
    ),
    step("DELETE /v1/kv/a1?proxy=true", "", 200, ""),
    step("DELETE /v1/kv/b1?proxy=true", "", 200, ""),
    step("DELETE /v1/kv/e1?proxy=true", "", 200, ""),
    step(
        "GET /fetch",
        "",
        200,
        concat!(
            r#"[{"key":{"encoding":"binary","data":"0110"},"#,
            r#""value":{"encoding":"binary","data":"00101"}}]"#
        ),
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_answers_every_dialect_to_the_letter() {
    let cluster = Cluster::start(Setup::nodes(3)).await;
    for round in 0..cluster.nodes.len() {
        for (
            at,
            Step {
                line,
                body,
                status,
                answer,
            },
        ) in TABLE.iter().enumerate()
        {
            let node = (round + at) % cluster.nodes.len();
            let got = ask(&cluster, node, line, body).await;
            assert_eq!(
                got.status,
                *status,
                "{line} {body} at node {node}: {}",
                got.text()
            );
            if !line.starts_with("DELETE") {
                assert_eq!(got.text(), *answer, "{line} {body} at node {node}");
            }
        }
    }
    let servers: Vec<String> = cluster
        .addresses()
        .iter()
        .map(|address| format!("'{address}'"))
        .collect();
    let front = ask(&cluster, 1, "GET /", "").await;
    assert_eq!(
        front.text(),
        format!("servers are [{}]", servers.join(", "))
    );
}

fn encoded(data: &str) -> String {
    format!(r#"{{"encoding":"string","data":"{data}"}}"#)
}

/// Stores so many pairs by one request. On a machine that is too busy a leader may be lost on the
/// way: what is not known to be stored is sent again, as a client would.
async fn store_all(cluster: &Cluster, node: usize, name: &str, count: usize) {
    let mut keys: Vec<String> = (0..count)
        .map(|n| encoded(&format!("{name}-{n:06}")))
        .collect();
    for _ in 0..10 {
        let answer = ask(cluster, node, "PUT /set", &pairs(&keys)).await;
        let [outcome]: [Outcome; 1] = serde_json::from_slice(&answer.body)
            .unwrap_or_else(|error| panic!("{error}: {answer:?}"));
        assert_eq!(outcome.keys_added + outcome.keys_failed.len(), keys.len());
        assert_eq!(
            answer.status,
            if outcome.keys_failed.is_empty() {
                200
            } else {
                206
            }
        );
        if outcome.keys_failed.is_empty() {
            return;
        }
        say(&format!(
            "dialects: {} of {} pairs are not known to be stored",
            outcome.keys_failed.len(),
            keys.len()
        ));
        keys = outcome.keys_failed.iter().map(Value::to_string).collect();
    }
    panic!("ten requests do not store {count} pairs");
}

/// What `PUT /set` answers.
#[derive(Deserialize)]
struct Outcome {
    keys_added: usize,
    keys_failed: Vec<Value>,
}

/// Pairs of about 190 bytes in JSON.
fn pairs(keys: &[String]) -> String {
    let value = encoded(&"v".repeat(100));
    let pairs: Vec<String> = keys
        .iter()
        .map(|key| format!(r#"{{"key":{key},"value":{value}}}"#))
        .collect();
    format!("[{}]", pairs.join(","))
}

/// A node's buffers at their limits; what is read, held back and on its way; the log's and the
/// tables' caches.
const MEMORY_BYTES_MAX: u64 = 1 << 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_batches_and_listings_are_whole_and_take_bounded_memory() {
    const COUNT: usize = 100_000;
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let mut took = Vec::new();
    for (node, name) in ["first", "second"].into_iter().enumerate() {
        let start = Instant::now();
        store_all(&cluster, node, name, COUNT).await;
        took.push(start.elapsed());
    }
    let keys: Vec<String> = (0..COUNT)
        .map(|n| encoded(&format!("first-{n:06}")))
        .collect();
    let start = Instant::now();
    let queried: Value = serde_json::from_slice(
        &ask(&cluster, 2, "POST /query", &format!("[{}]", keys.join(",")))
            .await
            .body,
    )
    .expect("JSON");
    took.push(start.elapsed());
    let queried = queried.as_array().expect("a list");
    assert!(queried.len() == COUNT && queried.iter().all(|element| element["value"] == true));

    let before: Vec<u64> = cluster
        .nodes
        .iter()
        .map(|node| memory_peak_bytes(node.pid()))
        .collect();
    for node in 0..3 {
        let start = Instant::now();
        let all: Value = serde_json::from_slice(&ask(&cluster, node, "GET /fetch", "").await.body)
            .expect("JSON");
        took.push(start.elapsed());
        let all = all.as_array().expect("a list");
        assert_eq!(all.len(), 2 * COUNT);
        let ordered = all
            .windows(2)
            .all(|pair| pair[0]["key"]["data"].as_str() < pair[1]["key"]["data"].as_str());
        assert!(ordered, "each key once, in order");
    }
    let after: Vec<u64> = cluster
        .nodes
        .iter()
        .map(|node| memory_peak_bytes(node.pid()))
        .collect();
    say(&format!(
        "dialects: two PUT /set of {COUNT} pairs, POST /query of {COUNT}, three GET /fetch of {}: \
         {took:.1?}; peak memory in MB before the listings {:?}, after them {:?}",
        2 * COUNT,
        before.iter().map(|bytes| bytes >> 20).collect::<Vec<_>>(),
        after.iter().map(|bytes| bytes >> 20).collect::<Vec<_>>()
    ));
    assert!(
        after.iter().all(|bytes| *bytes < MEMORY_BYTES_MAX),
        "more memory than {} MB",
        MEMORY_BYTES_MAX >> 20
    );
    a_listing_without_a_quorum_breaks_off(&mut cluster).await;
}

/// Begins to read a listing, kills the other nodes, and reads on.
async fn a_listing_without_a_quorum_breaks_off(cluster: &mut Cluster) {
    let mut stream = TcpStream::connect(&cluster.nodes[0].address)
        .await
        .expect("the node listens");
    stream
        .write_all(b"GET /fetch HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .expect("the request is sent");
    let mut begun = vec![0; 64 << 10];
    stream
        .read_exact(&mut begun)
        .await
        .expect("the answer begins");
    assert!(begun.starts_with(b"HTTP/1.1 200"));
    cluster.nodes[1].kill();
    cluster.nodes[2].kill();
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut rest))
        .await
        .expect("it ends in time");
    assert!(
        !rest.ends_with(b"0\r\n\r\n"),
        "a listing that failed on the way ended well-formed: {ended:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_each_dialect_says_so_in_time() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    cluster.nodes[1].kill();
    cluster.nodes[2].kill();
    let k = encoded("k");
    let unable = |method: &str| {
        format!(r#"{{"error":"Unable to satisfy request","message":"Error in {method}"}}"#)
    };
    let failed = format!(r#"[{{"keys_added":0,"keys_failed":[{k}]}}]"#);
    for (line, body, status, expected) in [
        (
            "PUT /set",
            format!(r#"[{{"key":{k},"value":{k}}}]"#),
            206,
            failed,
        ),
        ("POST /fetch", format!("[{k}]"), 503, unable("POST")),
        ("POST /query", format!("[{k}]"), 503, unable("POST")),
        ("GET /fetch", String::new(), 503, unable("GET")),
        (
            "POST /set/k",
            "1".to_owned(),
            503,
            "No server is available".to_owned(),
        ),
        (
            "GET /get/k",
            String::new(),
            503,
            "No server is available".to_owned(),
        ),
        (
            "POST /set",
            r#"[{"key":"k","value":"v"}]"#.to_owned(),
            503,
            unable("POST"),
        ),
        (
            "POST /get",
            r#"[{"key":"k"}]"#.to_owned(),
            503,
            unable("POST"),
        ),
    ] {
        let start = Instant::now();
        let answer = ask(&cluster, 0, line, &body).await;
        assert!(
            start.elapsed() < WORD_LIMIT,
            "{line} took {:?}",
            start.elapsed()
        );
        assert_eq!(
            (answer.status, answer.text()),
            (status, expected),
            "{line} {body}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_of_two_nodes_answers_the_load_balancer_from_its_copy() {
    let mut cluster = Cluster::start(Setup::nodes(2)).await;
    for n in 0..10 {
        let answer = ask(&cluster, n % 2, &format!("POST /set/k{n}"), &n.to_string()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let mut slowest = Duration::ZERO;
    for down in [0, 1] {
        // Both have everything before one goes.
        cluster.wait_ready().await;
        cluster.nodes[down].kill();
        for n in 0..10 {
            let start = Instant::now();
            let answer = ask(&cluster, 1 - down, &format!("GET /get/k{n}"), "").await;
            slowest = slowest.max(start.elapsed());
            assert_eq!(
                (answer.status, answer.text()),
                (
                    200,
                    format!(r#"response from server:"retrived key value is {n}""#)
                )
            );
            assert!(
                answer.headers.contains_key("quorate-staleness"),
                "{:?}",
                answer.headers
            );
        }
        cluster.nodes[down].start();
        let fresh = eventually(Duration::from_secs(60), async || {
            let answer = ask(&cluster, 1 - down, "GET /get/k1", "").await;
            (!answer.headers.contains_key("quorate-staleness")).then_some(())
        });
        fresh
            .await
            .expect("with both nodes the answer is linearizable again");
    }
    say(&format!(
        "dialects: with one of two nodes down the slowest of 20 reads took {slowest:.1?}"
    ));
    assert!(
        slowest < Duration::from_millis(2500),
        "promised within 2 s, took {slowest:?}"
    );
}
