//! A gateway serves the whole store from one address, keeps nothing, and outlives the loss of any
//! member, of itself, and of all the members that it was started with.

use std::time::Duration;

use serde_json::{Value, json};

use crate::common::cluster::{Cluster, Node, READY_LIMIT, Setup};
use crate::common::http::{Answer, Request};
use crate::common::load::Load;
use crate::common::{eventually, say};

/// Enough for every shard to have some.
const KEYS: usize = 60;

/// Far beyond what a failover takes: a bound for a gateway that is stuck.
const FAILOVER_LIMIT: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_serves_the_whole_store_and_redirects_nobody() {
    let cluster = Cluster::start(Setup::nodes(3)).await;
    let mut gateway = cluster.gateway(0, &[&cluster.nodes[1].address]);
    gateway.start();
    wait_ready(&cluster, &mut gateway).await;
    let port = gateway.address.rsplit_once(':').expect("a port").1;
    assert!(
        gateway
            .log_text()
            .contains(&format!("Listening on port {port}...")),
        "{}",
        gateway.log_text()
    );
    fill(&cluster, &gateway).await;
    assert_whole(&cluster, &gateway).await;
    let listed = ask(
        &cluster,
        &gateway,
        Request::get("/v1/kv?prefix=gateway-&limit=1000&keys_only=true"),
    )
    .await;
    let listed: Value = serde_json::from_str(&listed.text()).expect("JSON");
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(KEYS));
    let operations: Vec<Value> = (0..KEYS)
        .map(|n| json!({"op": "get", "key": key(n)}))
        .collect();
    let body = json!({ "operations": operations }).to_string();
    let batch = Request {
        body: body.into_bytes(),
        ..Request::new(reqwest::Method::POST, "/v1/batch")
    };
    let batch = ask(
        &cluster,
        &gateway,
        batch.header("content-type", "application/json"),
    )
    .await;
    assert_eq!(batch.status, 200, "{}", batch.text());
    assert!(
        (0..KEYS).all(|n| batch.text().contains(&format!("\"{}\"", value(n)))),
        "{}",
        batch.text()
    );
    assert_speaks_every_dialect(&cluster, &gateway).await;
    for (path, part) in [
        ("/healthz", "ok"),
        ("/metrics", "quorate_gateway_ready 1"),
        ("/v1/cluster", "\"shards\""),
    ] {
        let answer = ask(&cluster, &gateway, Request::get(path)).await;
        assert!(
            answer.status == 200 && answer.text().contains(part),
            "{path}: {}",
            answer.text()
        );
    }
    // Nobody takes a gateway for a node.
    assert_eq!(
        ask(&cluster, &gateway, Request::get("/peer/identity"))
            .await
            .status,
        404
    );
    let mut second = cluster.gateway(0, &[&cluster.nodes[0].address]);
    second.start();
    assert_eq!(second.end(Duration::from_secs(30)).await.code(), Some(3));
    let told = second.log_text();
    assert!(
        told.contains(&format!("it is held by process {}", gateway.pid())),
        "{told}"
    );
    assert!(gateway.stop().await.success(), "{}", gateway.log_text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_members_and_gateways_cost_a_moment_and_nothing_else() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let addresses = cluster.addresses();
    let members: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let mut gateways = [cluster.gateway(0, &members), cluster.gateway(1, &members)];
    for gateway in &mut gateways {
        gateway.start();
        wait_ready(&cluster, gateway).await;
    }
    let addresses: Vec<String> = gateways
        .iter()
        .map(|gateway| gateway.address.clone())
        .collect();
    let load = Load::new("gateway").start_at(addresses.clone(), cluster.client.clone());
    let mut gaps = Vec::new();
    for victim in 0..3 {
        load.writes(100).await;
        cluster.nodes[victim].kill();
        gaps.push(load.next_write(FAILOVER_LIMIT).await);
        // The load goes on through the other.
        gateways[victim % 2].kill();
        load.next_write(FAILOVER_LIMIT).await;
        gateways[victim % 2].start();
        wait_ready(&cluster, &mut gateways[victim % 2]).await;
        cluster.nodes[victim].start();
        cluster.wait_ready().await;
    }
    load.writes(100).await;
    load.stop().await.judge_at(&addresses).await;
    say(&format!(
        "gateway: to the next acknowledged write after a member was killed: {gaps:?}"
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_outlives_all_the_members_that_it_was_started_with() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let originals = cluster.addresses();
    let members: Vec<&str> = originals.iter().map(String::as_str).collect();
    let mut gateway = cluster.gateway(0, &members);
    gateway.start();
    wait_ready(&cluster, &mut gateway).await;
    fill(&cluster, &gateway).await;
    for _ in 0..originals.len() {
        cluster.add_spare().await;
    }
    let change = json!({ "nodes": cluster.addresses()[originals.len()..] }).to_string();
    let changed =
        Request::put("/v1/cluster/view?wait=60s", change).timeout(Duration::from_secs(90));
    let changed = ask(&cluster, &gateway, changed).await;
    assert_eq!(changed.status, 200, "{}", changed.text());
    for original in 0..originals.len() {
        cluster.wait_spare(original).await;
    }
    // One that begins with those who have left is told by them who stayed.
    let mut late = cluster.gateway(1, &members);
    late.start();
    wait_ready(&cluster, &mut late).await;
    assert_whole(&cluster, &late).await;
    for original in 0..originals.len() {
        cluster.nodes[original].kill();
    }
    for gateway in [&mut gateway, &mut late] {
        assert_whole(&cluster, gateway).await;
        wait_ready(&cluster, gateway).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_it_says_so_in_time_and_recovers() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let mut gateway = cluster.gateway(0, &[&cluster.nodes[0].address]);
    gateway.start();
    wait_ready(&cluster, &mut gateway).await;
    fill(&cluster, &gateway).await;
    cluster.nodes[0].kill();
    cluster.nodes[1].kill();
    let code = eventually(FAILOVER_LIMIT, async || {
        let answer = ask(&cluster, &gateway, Request::get("/readyz")).await;
        (answer.status == 503).then(|| answer.text())
    });
    let told = code
        .await
        .expect("a gateway to a cluster without a quorum is not ready");
    assert!(
        told.contains("no-leader") || told.contains("unreachable"),
        "{told}"
    );
    let write = ask(
        &cluster,
        &gateway,
        Request::put("/v1/kv/gateway-late?timeout=1s", "late"),
    )
    .await;
    assert!([503, 504].contains(&write.status), "{write:?}");
    assert_eq!(
        ask(&cluster, &gateway, Request::get("/healthz"))
            .await
            .status,
        200
    );
    cluster.nodes[0].start();
    cluster.nodes[1].start();
    cluster.wait_ready().await;
    wait_ready(&cluster, &mut gateway).await;
    assert_whole(&cluster, &gateway).await;
}

async fn assert_speaks_every_dialect(cluster: &Cluster, gateway: &Node) {
    let steps = [
        ("GET /fetch", "", r#""value 7""#),
        (
            "POST /fetch",
            r#"[{"encoding":"string","data":"gateway-008"}]"#,
            r#""value 8""#,
        ),
        (
            "POST /query",
            r#"[{"encoding":"string","data":"gateway-008"}]"#,
            r#""value":true"#,
        ),
        (
            "PUT /set",
            concat!(
                r#"[{"key":{"encoding":"string","data":"a"},"#,
                r#""value":{"encoding":"string","data":"of A"}}]"#
            ),
            r#""keys_added":1"#,
        ),
        ("GET /get/a", "", "value is of A"),
        ("POST /set/b", r#"{"of":"B"}"#, "value is {'of': 'B'}"),
        ("GET /kvs/keys/b", "", r#""value":{"of":"B"}"#),
        // A gateway is nobody's home.
        (
            "PUT /kvs/keys/c",
            r#"{"value":"of C"}"#,
            r#""address":"127.0.0.1:"#,
        ),
        ("GET /kvs/key-count", "", r#""key-count""#),
        (
            "POST /set",
            r#"[{"key":"e","value":"of E"}]"#,
            "Success to set key",
        ),
        (
            "POST /get",
            r#"[{"key":"c"},{"key":"none"}]"#,
            r#""existedKey":[{"key":"c","value":"of C"}]"#,
        ),
    ];
    for (line, body, part) in steps {
        let (method, path) = line.split_once(' ').expect("a method and a path");
        let method = method.parse().expect("a method");
        let answer = ask(
            cluster,
            gateway,
            Request {
                body: body.into(),
                ..Request::new(method, path)
            },
        )
        .await;
        assert!(
            (200..300).contains(&answer.status) && answer.text().contains(part),
            "{line}: {answer:?}: {}",
            answer.text()
        );
    }
}

fn key(n: usize) -> String {
    format!("gateway-{n:03}")
}

fn value(n: usize) -> String {
    format!("value {n}")
}

/// One answer of the gateway itself: a redirect would be one too.
async fn ask(cluster: &Cluster, gateway: &Node, request: Request) -> Answer {
    let answer = cluster.client.ask_only(&gateway.address, &request).await;
    answer.unwrap_or_else(|failure| {
        panic!(
            "{} {}: {failure:?}\n{}",
            request.method,
            request.path,
            gateway.log_text()
        )
    })
}

async fn wait_ready(cluster: &Cluster, gateway: &mut Node) {
    let mut last = String::new();
    let ready = eventually(READY_LIMIT, async || {
        assert_eq!(
            gateway.exited(),
            None,
            "the gateway ended: {}",
            gateway.log_text()
        );
        let answer = cluster
            .client
            .ask_only(
                &gateway.address,
                &Request::get("/readyz").timeout(Duration::from_secs(2)),
            )
            .await;
        last = format!("{answer:?}");
        answer
            .is_ok_and(|answer| answer.status == 200)
            .then_some(())
    });
    ready
        .await
        .unwrap_or_else(|| panic!("the gateway is not ready: {last}\n{}", gateway.log_text()));
}

async fn fill(cluster: &Cluster, gateway: &Node) {
    for n in 0..KEYS {
        let put = ask(
            cluster,
            gateway,
            Request::put(format!("/v1/kv/{}", key(n)), value(n)),
        )
        .await;
        assert_eq!(put.status, 201, "{}", put.text());
    }
}

async fn assert_whole(cluster: &Cluster, gateway: &Node) {
    for n in 0..KEYS {
        let got = ask(cluster, gateway, Request::get(format!("/v1/kv/{}", key(n)))).await;
        assert_eq!((got.status, got.text()), (200, value(n)));
    }
}
