//! The kvs dialects (C, C4 and D) through every node of real clusters: the tables of the contract
//! to the letter, addresses, counts that add up, what other dialects wrote, a home that is down, no
//! quorum, a spare, and changes of the view.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::common::cluster::{Cluster, READY_LIMIT, Setup};
use crate::common::http::{Answer, Request};
use crate::common::{eventually, say};

/// Within this time there is an answer, whatever fails.
const ANSWERED_LIMIT: Duration = Duration::from_secs(5);

/// A view change of few keys is done within this time, on a machine that does much else.
const CHANGED_LIMIT: Duration = Duration::from_secs(90);

const ADDED: &str = r#"{"message":"Added successfully","replaced":false}"#;
const UPDATED: &str = r#"{"message":"Updated successfully","replaced":true}"#;
const DELETED: &str = r#"{"doesExist":true,"message":"Deleted successfully"}"#;

async fn ask(cluster: &Cluster, node: usize, method: &str, path: &str, body: &str) -> Answer {
    let method = method.parse::<Method>().expect("a method");
    let request = Request {
        body: body.as_bytes().to_vec(),
        ..Request::new(method, path)
    };
    let answer = cluster
        .client
        .ask_only(&cluster.nodes[node].address, &request)
        .await;
    answer.unwrap_or_else(|error| panic!("node {node}, {} {path}: {error:?}", request.method))
}

fn json_of(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body)
        .unwrap_or_else(|error| panic!("{error}: {}", answer.text()))
}

/// The address that an answer names.
fn address(answer: &Answer) -> Option<String> {
    json_of(answer)["address"].as_str().map(str::to_owned)
}

/// The rows of the contract about one key, through one node. `address`: what each answer is to
/// name.
async fn check_rows(cluster: &Cluster, node: usize, key: &str, address: Option<&str>) {
    let error = |error: &str, method: &str| {
        format!(r#"{{"error":"{error}","message":"Error in {method}"}}"#)
    };
    let missing = |method: &str| {
        format!(
            r#"{{"doesExist":false,"error":"Key does not exist","message":"Error in {method}"}}"#
        )
    };
    let found = |value: &str| {
        format!(r#"{{"doesExist":true,"message":"Retrieved successfully","value":{value}}}"#)
    };
    let rows = [
        ("GET", "", 404, missing("GET")),
        ("DELETE", "", 404, missing("DELETE")),
        ("PUT", "", 400, error("Bad json format", "PUT")),
        ("PUT", r#"{"value":"#, 400, error("Bad json format", "PUT")),
        ("PUT", "{}", 400, error("Value is missing", "PUT")),
        ("PUT", r#"["value"]"#, 400, error("Value is missing", "PUT")),
        ("GET", "", 404, missing("GET")),
        ("PUT", r#"{"value":"a \"string\""}"#, 201, ADDED.to_owned()),
        ("GET", "", 200, found(r#""a \"string\"""#)),
        (
            "PUT",
            r#"{"value":"a \"string\""}"#,
            200,
            UPDATED.to_owned(),
        ),
        (
            "PUT",
            r#"{"value":{"z":1.50,"a":[null, true]}}"#,
            200,
            UPDATED.to_owned(),
        ),
        ("GET", "", 200, found(r#"{"z":1.50,"a":[null, true]}"#)),
        ("PUT", "{}", 400, error("Value is missing", "PUT")),
        ("GET", "", 200, found(r#"{"z":1.50,"a":[null, true]}"#)),
        ("DELETE", "", 200, DELETED.to_owned()),
        ("GET", "", 404, missing("GET")),
    ];
    for (method, body, status, text) in rows {
        let answer = ask(cluster, node, method, &format!("/kvs/keys/{key}"), body).await;
        let text = match address {
            None => text,
            Some(address) => format!(
                r#"{},"address":"{address}"}}"#,
                text.strip_suffix('}').expect("an object")
            ),
        };
        assert_eq!(
            (answer.status, answer.text()),
            (status, text),
            "node {node}: {method} {key} {body}"
        );
    }
    let context = r#"{"at":[1,2]}"#;
    let answer = ask(
        cluster,
        node,
        "GET",
        &format!("/kvs/keys/{key}"),
        &format!(r#"{{"causal-context":{context}}}"#),
    )
    .await;
    assert!(
        answer.status == 404
            && answer
                .text()
                .ends_with(&format!(r#","causal-context":{context}}}"#)),
        "{}",
        answer.text()
    );
}

/// Who answers for a key without naming another, and who else is named.
async fn whereabouts(cluster: &Cluster, key: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut own, mut named) = (BTreeSet::new(), BTreeSet::new());
    for node in 0..cluster.nodes.len() {
        match address(&ask(cluster, node, "GET", &format!("/kvs/keys/{key}"), "").await) {
            None => own.insert(cluster.nodes[node].address.clone()),
            Some(address) => named.insert(address),
        };
    }
    (own, named)
}

fn keys(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("some%2Fkey%20{n}")).collect()
}

/// How many keys each node counts, with what else it tells.
async fn key_counts(cluster: &Cluster) -> Vec<Value> {
    let mut counts = Vec::new();
    for node in 0..cluster.nodes.len() {
        let answer = ask(cluster, node, "GET", "/kvs/key-count", "").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let mut count = json_of(&answer);
        let message = count
            .as_object_mut()
            .and_then(|count| count.remove("message"));
        assert_eq!(message, Some(json!("Key count retrieved successfully")));
        counts.push(count);
    }
    counts
}

fn number(count: &Value) -> u64 {
    count["key-count"]
        .as_u64()
        .unwrap_or_else(|| panic!("no count: {count}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_through_every_node() {
    let cluster = Cluster::start(Setup::nodes(3)).await;
    let mut homes = BTreeSet::new();
    for key in keys(8) {
        let (own, named) = whereabouts(&cluster, &key).await;
        assert_eq!(
            (own.len(), &own),
            (1, &named),
            "{key} has one home, which the others name"
        );
        let home = own.first().expect("one").as_str();
        for node in 0..3 {
            let address = (cluster.nodes[node].address != home).then_some(home);
            check_rows(&cluster, node, &key, address).await;
        }
        homes.insert(home.to_owned());
    }
    assert!(homes.len() > 1, "eight keys at home on one node: {homes:?}");
    for node in 0..3 {
        let long = |length: usize| format!("/kvs/keys/{}", "%C3%BC".repeat(length));
        let refused = ask(&cluster, node, "PUT", &long(51), r#"{"value":1}"#).await;
        assert_eq!(
            (refused.status, &json_of(&refused)["error"]),
            (400, &json!("Key is too long"))
        );
        let refused = ask(&cluster, node, "PUT", &long(51), "{}").await;
        assert_eq!(
            (refused.status, &json_of(&refused)["error"]),
            (400, &json!("Value is missing"))
        );
        assert!(matches!(
            ask(&cluster, node, "PUT", &long(50), r#"{"value":1}"#)
                .await
                .status,
            200 | 201
        ));
    }
    let counts = key_counts(&cluster).await;
    assert_eq!(counts.iter().map(number).sum::<u64>(), 1, "{counts:?}");
    assert!(
        counts
            .iter()
            .all(|count| count.as_object().is_some_and(|fields| fields.len() == 1)),
        "{counts:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_replicated_contract_holds_through_every_node() {
    let cluster = Cluster::start(Setup::nodes(4).arguments(&["--repl-factor", "2"])).await;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for id in ["1", "2"] {
        let shard = json_of(&ask(&cluster, 0, "GET", &format!("/kvs/shards/{id}"), "").await);
        let replicas = shard["replicas"].as_array().expect("a list").iter();
        shards.insert(
            id.to_owned(),
            replicas
                .map(|replica| replica.as_str().expect("an address").to_owned())
                .collect(),
        );
        let told = json!({
            "message": "Shard information retrieved successfully",
            "shard-id": id,
            "key-count": 0,
            "replicas": shard["replicas"],
        });
        assert_eq!(shard, told);
    }
    assert!(
        shards.values().all(|replicas| replicas.len() == 2)
            && shards["1"].is_disjoint(&shards["2"]),
        "{shards:?}"
    );
    for key in keys(6) {
        let (own, named) = whereabouts(&cluster, &key).await;
        assert!(
            shards.values().any(|replicas| *replicas == own),
            "{key}: {own:?} is no shard of {shards:?}"
        );
        assert!(
            named.len() == 1 && named.is_subset(&own),
            "{key}: {named:?} are named, of {own:?}"
        );
        let named = named.first().expect("one").as_str();
        for node in 0..4 {
            let address = (!own.contains(&cluster.nodes[node].address)).then_some(named);
            check_rows(&cluster, node, &key, address).await;
        }
    }
    for (n, key) in keys(60).iter().enumerate() {
        let answer = ask(
            &cluster,
            n % 4,
            "PUT",
            &format!("/kvs/keys/{key}"),
            &format!(r#"{{"value":{n}}}"#),
        )
        .await;
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    let counts = key_counts(&cluster).await;
    let mut sum = 0;
    for (id, replicas) in &shards {
        let mut of_shard = Vec::new();
        for (node, count) in cluster.nodes.iter().zip(&counts) {
            if replicas.contains(&node.address) {
                assert_eq!(count["shard-id"], json!(id), "{}", node.address);
                of_shard.push(number(count));
            }
        }
        assert!(
            of_shard.len() == 2 && of_shard[0] == of_shard[1],
            "shard {id}: {of_shard:?}"
        );
        sum += of_shard[0];
    }
    assert_eq!(sum, 60);
    for node in 0..4 {
        let listed = ask(&cluster, node, "GET", "/kvs/shards", "").await;
        assert_eq!(
            listed.text(),
            r#"{"message":"Shard membership retrieved successfully","shards":["1","2"]}"#
        );
        let unknown = ask(&cluster, node, "GET", "/kvs/shards/9", "").await;
        assert_eq!(
            (unknown.status, unknown.text().as_str()),
            (
                404,
                r#"{"error":"Shard does not exist","message":"Error in GET"}"#
            )
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_dialect_writes_another_reads() {
    let cluster = Cluster::start(Setup::nodes(3)).await;
    let native = async |node: usize, request: Request| {
        let answer = cluster
            .client
            .ask(&cluster.nodes[node].address, &request)
            .await
            .expect("an answer");
        (answer.status, answer.text())
    };
    for node in 0..3 {
        let other = (node + 1) % 3;
        let key = format!("shared{node}");
        let path = format!("/kvs/keys/{key}");
        for (given, raw, kind) in [
            (r#""ünï \"q\"""#, "ünï \"q\"", "text/plain"),
            (r#"{"b": 1e2}"#, r#"{"b": 1e2}"#, "application/json"),
        ] {
            let put = ask(
                &cluster,
                node,
                "PUT",
                &path,
                &format!(r#"{{"value":{given}}}"#),
            )
            .await;
            assert!(matches!(put.status, 200 | 201), "{}", put.text());
            let request = Request::get(format!("/v1/kv/{key}"));
            let got = cluster
                .client
                .ask(&cluster.nodes[other].address, &request)
                .await
                .expect("an answer");
            assert_eq!(
                (
                    got.status,
                    got.text().as_str(),
                    got.headers["content-type"].to_str().ok()
                ),
                (200, raw, Some(kind))
            );
            let got = ask(&cluster, other, "GET", &format!("/get/{key}"), "").await;
            assert_eq!(got.status, 200, "{}", got.text());
        }
        let written = [
            (
                Request::put(format!("/v1/kv/{key}"), "plain \"text\""),
                r#""plain \"text\"""#,
            ),
            (
                Request::put(format!("/v1/kv/{key}"), "[1, 2]")
                    .header("content-type", "application/json"),
                "[1, 2]",
            ),
            (
                Request::put(format!("/v1/kv/{key}"), vec![0xff, 0]),
                r#""/wA=""#,
            ),
            (
                Request {
                    body: br#"{"by": "B"}"#.to_vec(),
                    ..Request::new(Method::POST, format!("/set/{key}"))
                },
                r#"{"by": "B"}"#,
            ),
        ];
        for (request, shown) in written {
            assert_eq!(native(node, request).await.0, 200);
            let got = ask(&cluster, other, "GET", &path, "").await;
            assert!(
                got.text().contains(&format!(r#""value":{shown}"#)),
                "{shown}: {}",
                got.text()
            );
        }
        let deleted = ask(&cluster, other, "DELETE", &path, "").await;
        assert_eq!(deleted.status, 200, "{}", deleted.text());
        assert_eq!(
            native(node, Request::get(format!("/v1/kv/{key}"))).await.0,
            404
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_that_is_down_is_not_named_and_no_quorum_is_told() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let key = "some%20key";
    let path = format!("/kvs/keys/{key}");
    assert_eq!(
        ask(&cluster, 0, "PUT", &path, r#"{"value":1}"#)
            .await
            .status,
        201
    );
    let (own, _) = whereabouts(&cluster, key).await;
    let home = cluster
        .nodes
        .iter()
        .position(|node| own.contains(&node.address))
        .expect("a home");
    let others = [(home + 1) % 3, (home + 2) % 3];
    let living = others.map(|node| cluster.nodes[node].address.clone());
    cluster.nodes[home].kill();
    for node in others {
        let got = ask(&cluster, node, "GET", &path, "").await;
        assert_eq!(
            (got.status, &json_of(&got)["value"]),
            (200, &json!(1)),
            "{}",
            got.text()
        );
        assert!(
            address(&got).is_some_and(|address| living.contains(&address)),
            "{}",
            got.text()
        );
    }
    cluster.nodes[home].start();
    cluster.wait_node_ready(home).await;
    let named = eventually(READY_LIMIT, async || {
        (whereabouts(&cluster, key).await.1 == own).then_some(())
    })
    .await;
    named.expect("a home that is back is named again");
    cluster.nodes[others[0]].kill();
    cluster.nodes[others[1]].kill();
    let begun = Instant::now();
    for (method, body) in [("PUT", r#"{"value":2}"#), ("GET", ""), ("DELETE", "")] {
        let start = Instant::now();
        let answer = ask(&cluster, home, method, &path, body).await;
        let text =
            format!(r#"{{"error":"Unable to satisfy request","message":"Error in {method}"}}"#);
        assert_eq!((answer.status, answer.text()), (503, text));
        assert!(
            start.elapsed() < ANSWERED_LIMIT,
            "{method} took {:?}",
            start.elapsed()
        );
    }
    assert!(
        begun.elapsed() > Duration::from_secs(1),
        "a quorum is waited for"
    );
    assert_eq!(
        ask(&cluster, home, "GET", "/kvs/key-count", "")
            .await
            .status,
        503
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spare_says_so_at_once_and_names_the_members() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let members = cluster.addresses();
    assert_eq!(cluster.add_spare().await, 3);
    assert_eq!(ask(&cluster, 3, "GET", "/healthz", "").await.status, 200);
    for (method, path, body) in [
        ("PUT", "/kvs/keys/a", r#"{"value":1}"#),
        ("GET", "/kvs/keys/a", ""),
        ("DELETE", "/kvs/a", ""),
        ("GET", "/kvs/key-count", ""),
        ("GET", "/kvs/shards", ""),
        ("GET", "/kvs/shards/1", ""),
    ] {
        let start = Instant::now();
        let answer = ask(&cluster, 3, method, path, body).await;
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "{method} {path} took {:?}",
            start.elapsed()
        );
        let told = json_of(&answer);
        assert_eq!(
            (answer.status, &told["message"]),
            (503, &json!(format!("Error in {method}")))
        );
        let error = told["error"].as_str().expect("a text");
        assert!(error.starts_with("Unable to satisfy request"), "{error}");
        assert!(
            members.iter().all(|member| error.contains(member)),
            "{error} does not name {members:?}"
        );
    }
    let told = async || {
        cluster.nodes[3]
            .log_text()
            .matches("spare: waiting")
            .count()
    };
    let before = told().await;
    let repeated = eventually(Duration::from_secs(30), async || {
        (told().await > before).then_some(())
    })
    .await;
    repeated.expect("what a spare waits for is logged again and again");
}

/// The view of these nodes, as a view change is asked for.
fn view(cluster: &Cluster, nodes: &[usize]) -> String {
    let addresses: Vec<&str> = nodes
        .iter()
        .map(|node| cluster.nodes[*node].address.as_str())
        .collect();
    addresses.join(",")
}

/// Puts this many keys.
async fn fill(cluster: &Cluster, count: usize) {
    for n in 0..count {
        let answer = ask(
            cluster,
            0,
            "PUT",
            &format!("/kvs/keys/fill-{n}"),
            &format!(r#"{{"value":{n}}}"#),
        )
        .await;
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
}

/// Every key of [`fill`] is there, through this node.
async fn check_filled(cluster: &Cluster, node: usize, count: usize) {
    for n in 0..count {
        let got = ask(cluster, node, "GET", &format!("/kvs/keys/fill-{n}"), "").await;
        assert_eq!(
            (got.status, &json_of(&got)["value"]),
            (200, &json!(n)),
            "through node {node}: {}",
            got.text()
        );
    }
}

/// Changes the view, asking this node. What the answer says of each part.
async fn change(cluster: &Cluster, node: usize, nodes: &[usize], more: &str) -> Vec<Value> {
    let body = format!(r#"{{"view":"{}"{more}}}"#, view(cluster, nodes));
    let request = Request::put("/kvs/view-change", body).timeout(CHANGED_LIMIT);
    let start = Instant::now();
    let answer = cluster
        .client
        .ask_only(&cluster.nodes[node].address, &request)
        .await;
    let answer = answer.unwrap_or_else(|error| panic!("a change asked of node {node}: {error:?}"));
    say(&format!(
        "kvs: a view change to nodes {nodes:?}{more} in {:.1?}",
        start.elapsed()
    ));
    let mut told = json_of(&answer);
    let shards = told.as_object_mut().and_then(|told| told.remove("shards"));
    assert_eq!(
        (answer.status, told),
        (200, json!({"message": "View change successful"})),
        "{shards:?}"
    );
    shards
        .as_ref()
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_else(|| panic!("no list: {shards:?}"))
}

/// Each node of the view is named once, and counts by itself what the answer says of it.
async fn check_nodes(cluster: &Cluster, parts: &[Value], nodes: &[usize], count: usize) {
    let mut sum = 0;
    for node in nodes {
        let of_node: Vec<&Value> = parts
            .iter()
            .filter(|part| part["address"] == json!(cluster.nodes[*node].address))
            .collect();
        assert_eq!(of_node.len(), 1, "node {node} in {parts:?}");
        let counted = ask(cluster, *node, "GET", "/kvs/key-count", "").await;
        assert_eq!(
            number(&json_of(&counted)),
            number(of_node[0]),
            "node {node}"
        );
        sum += number(of_node[0]);
    }
    assert_eq!((parts.len(), sum), (nodes.len(), count as u64), "{parts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_grows_is_replaced_and_shrinks() {
    let mut cluster = Cluster::start(Setup::nodes(2)).await;
    fill(&cluster, 60).await;
    for _ in 0..2 {
        cluster.add_spare().await;
    }
    let parts = change(&cluster, 0, &[0, 1, 2], "").await;
    check_nodes(&cluster, &parts, &[0, 1, 2], 60).await;
    check_filled(&cluster, 2, 60).await;
    let again = change(&cluster, 2, &[0, 1, 2], "").await;
    assert_eq!(again, parts);
    // Nodes that are not there, or belong elsewhere, change nothing.
    let stranger = cluster.add_stranger().await;
    let unable = r#"{"error":"Unable to satisfy request","message":"Error in PUT"}"#;
    for newcomer in [
        cluster.nodes[stranger].address.clone(),
        "127.0.0.1:1".to_owned(),
    ] {
        let body = format!(r#"{{"view":"{},{newcomer}"}}"#, view(&cluster, &[0, 1, 2]));
        for path in ["/kvs/view-change", "/proxy/view-change"] {
            let refused = ask(&cluster, 0, "PUT", path, &body).await;
            assert_eq!(
                (refused.status, refused.text().as_str()),
                (503, unable),
                "{newcomer}"
            );
        }
    }
    check_nodes(&cluster, &parts, &[0, 1, 2], 60).await;
    // A spare has the others carry it out, though it leaves some of them out.
    let parts = change(&cluster, 3, &[2, 3], "").await;
    check_nodes(&cluster, &parts, &[2, 3], 60).await;
    check_filled(&cluster, 3, 60).await;
    for node in [0, 1] {
        cluster.wait_spare(node).await;
    }
    // Every node is another one, and the node asked is among those that leave.
    let parts = change(&cluster, 2, &[0, 1], "").await;
    check_nodes(&cluster, &parts, &[0, 1], 60).await;
    check_filled(&cluster, 0, 60).await;
    let proxied = Request::put(
        "/proxy/view-change",
        format!(r#"{{"view":"{}"}}"#, view(&cluster, &[1, 0])),
    )
    .timeout(CHANGED_LIMIT);
    let proxied = cluster
        .client
        .ask_only(&cluster.nodes[1].address, &proxied)
        .await
        .expect("an answer");
    assert_eq!((proxied.status, proxied.text().as_str()), (200, "{}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replication_factor_changes_with_the_view() {
    let cluster = Cluster::start(Setup::nodes(4).arguments(&["--repl-factor", "2"])).await;
    fill(&cluster, 60).await;
    for (factor, node) in [(1, 0), (4, 1), (2, 2)] {
        let parts = change(
            &cluster,
            node,
            &[0, 1, 2, 3],
            &format!(r#","repl-factor":{factor}"#),
        )
        .await;
        assert_eq!(parts.len(), 4 / factor, "{parts:?}");
        assert_eq!(parts.iter().map(number).sum::<u64>(), 60, "{parts:?}");
        let mut replicas = BTreeSet::new();
        for part in &parts {
            let of_part = part["replicas"].as_array().expect("a list");
            assert_eq!(of_part.len(), factor, "{parts:?}");
            replicas.extend(
                of_part
                    .iter()
                    .map(|replica| replica.as_str().expect("an address").to_owned()),
            );
            let id = part["shard-id"].as_str().expect("an id");
            let told = json_of(&ask(&cluster, 3, "GET", &format!("/kvs/shards/{id}"), "").await);
            assert_eq!(
                (&told["key-count"], &told["replicas"]),
                (&part["key-count"], &part["replicas"]),
                "shard {id}"
            );
        }
        assert_eq!(
            replicas,
            cluster.addresses().into_iter().collect(),
            "each node is in one shard: {parts:?}"
        );
        for node in 0..4 {
            check_filled(&cluster, node, 60).await;
        }
    }
    let too_few = format!(
        r#"{{"view":"{}","repl-factor":3}}"#,
        view(&cluster, &[0, 1])
    );
    assert_eq!(
        ask(&cluster, 0, "PUT", "/kvs/view-change", &too_few)
            .await
            .status,
        400
    );
}
