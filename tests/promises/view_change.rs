//! The view changes while the store serves: nodes come, go and are replaced, shards and their
//! replicas become more and fewer. No client with a deadline sees an error; and through kills,
//! nothing that was acknowledged is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::common::cluster::{Cluster, READY_LIMIT, Setup, Status, operate};
use crate::common::fill::Fill;
use crate::common::http::{Answer, Request};
use crate::common::load::{Load, Running};
use crate::common::{eventually, say, seed};

/// What a client waits for an answer, retries included.
const DEADLINE: Duration = Duration::from_secs(5);

/// Far beyond what a change takes: a bound for one that is stuck.
const CHANGE_LIMIT: Duration = Duration::from_secs(90);

fn addresses(cluster: &Cluster, nodes: &[usize]) -> Vec<String> {
    nodes
        .iter()
        .map(|node| cluster.nodes[*node].address.clone())
        .collect()
}

/// Has `quorate cluster` carry out a change, asking these nodes.
async fn carry_out(cluster: &Cluster, servers: &[usize], words: &[&str]) {
    let start = Instant::now();
    let words = [words, &["--yes"]].concat();
    let ran =
        tokio::time::timeout(CHANGE_LIMIT, operate(&addresses(cluster, servers), &words)).await;
    match ran {
        Ok((0, _)) => say(&format!("{}: {:?}", words.join(" "), start.elapsed())),
        Ok((code, text)) => panic!("{}: exit code {code}: {text}", words.join(" ")),
        Err(_) => {
            panic!(
                "{} is not done after {CHANGE_LIMIT:?}: {}",
                words.join(" "),
                at(cluster, servers[0], "/v1/cluster").await
            )
        }
    }
}

async fn at(cluster: &Cluster, node: usize, path: &str) -> String {
    let answer = cluster
        .client
        .ask(&cluster.nodes[node].address, &Request::get(path))
        .await;
    answer.map_or_else(|failure| format!("{failure:?}"), |answer| answer.text())
}

/// Asks a node for a change of the view.
async fn put_view(
    cluster: &Cluster,
    node: usize,
    query: &str,
    change: &Value,
    headers: &[(&'static str, &str)],
) -> Answer {
    let mut request =
        Request::put(format!("/v1/cluster/view{query}"), change.to_string()).timeout(CHANGE_LIMIT);
    for (name, value) in headers {
        request = request.header(name, *value);
    }
    cluster
        .client
        .ask(&cluster.nodes[node].address, &request)
        .await
        .unwrap_or_else(|failure| panic!("{change}: {failure:?}"))
}

fn code(answer: &Answer) -> (u16, String) {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    (
        answer.status,
        body["code"].as_str().unwrap_or_default().to_owned(),
    )
}

async fn status(cluster: &Cluster, node: usize) -> Status {
    let text = at(cluster, node, "/v1/cluster").await;
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("node {node}: {error}: {text}"))
}

/// Panics unless these are the nodes, each of so many shards has so many replicas on different
/// ones, and everything is spread evenly.
async fn assert_view(cluster: &Cluster, nodes: &[usize], shards: usize, replicas: usize) {
    let expected: BTreeSet<String> = addresses(cluster, nodes).into_iter().collect();
    for node in nodes {
        let settled = eventually(READY_LIMIT, async || {
            Some(status(cluster, *node).await).filter(|status| status.settled)
        })
        .await;
        let status =
            settled.unwrap_or_else(|| panic!("node {node} does not see the end of the change"));
        let found: BTreeSet<String> = status
            .nodes
            .iter()
            .map(|node| node.address.clone())
            .collect();
        assert_eq!(found, expected, "the nodes, as node {node} tells");
        let mut held: BTreeMap<u64, usize> = status.nodes.iter().map(|node| (node.id, 0)).collect();
        assert_eq!(status.shards.len(), shards, "{status:#?}");
        for shard in &status.shards {
            let on: BTreeSet<u64> = shard.replicas.iter().map(|replica| replica.node).collect();
            assert!(
                on.len() == replicas && shard.replicas.len() == replicas,
                "{shard:#?}"
            );
            on.iter()
                .for_each(|node| *held.entry(*node).or_default() += 1);
        }
        let slots = status.shards.iter().map(|shard| shard.slots);
        assert_eq!(slots.clone().sum::<u64>(), 4096);
        assert!(
            slots.clone().max().unwrap_or(0) - slots.min().unwrap_or(0) <= 1,
            "slots are uneven: {status:#?}"
        );
        let (most, least) = (
            held.values().max().copied().unwrap_or(0),
            held.values().min().copied().unwrap_or(0),
        );
        assert!(most - least <= 1, "replicas are uneven: {held:?}");
    }
}

/// The threads that fill a map step back behind others; those that write the files of all maps must
/// not have become like them.
#[cfg(target_os = "linux")]
fn assert_io_keeps_its_priority(pid: u32) {
    /// What sled keeps; when there is much to do it has more for a moment.
    const THREADS: usize = 7;
    let of = |path: &str| {
        let pid = rustix::process::Pid::from_raw(path.parse().ok()?)?;
        rustix::process::getpriority_process(Some(pid)).ok()
    };
    let own = of(&pid.to_string()).expect("it runs");
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("its threads")
        .filter_map(Result::ok);
    let io = tasks.filter(|task| {
        std::fs::read_to_string(task.path().join("comm"))
            .is_ok_and(|name| name.starts_with("sled-io"))
    });
    let priorities: Vec<i32> = io
        .filter_map(|task| of(task.file_name().to_str()?))
        .collect();
    let unchanged = priorities
        .iter()
        .filter(|priority| **priority == own)
        .count();
    assert!(
        unchanged >= THREADS,
        "the process has {own}, its threads for files {priorities:?}"
    );
}

/// Load of clients with a deadline.
fn start_load(name: &'static str, cluster: &Cluster) -> Running {
    Load::new(name).deadline(DEADLINE).start(cluster)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_grows_and_shrinks_under_load() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = start_load("grow", &cluster);
    load.writes(200).await;
    for _ in 0..2 {
        cluster.add_spare().await;
    }
    let new = addresses(&cluster, &[3, 4]);
    carry_out(&cluster, &[0, 1, 2], &["add", &new[0], &new[1]]).await;
    assert_view(&cluster, &[0, 1, 2, 3, 4], 5, 3).await;
    #[cfg(target_os = "linux")]
    for node in [3, 4] {
        assert_io_keeps_its_priority(cluster.nodes[node].pid());
    }
    load.use_nodes(cluster.addresses());
    load.writes(200).await;
    load.use_nodes(addresses(&cluster, &[2, 3, 4]));
    let old = addresses(&cluster, &[0, 1]);
    carry_out(&cluster, &[2, 3, 4], &["remove", &old[0], &old[1]]).await;
    assert_view(&cluster, &[2, 3, 4], 3, 3).await;
    for node in [0, 1] {
        cluster.wait_spare(node).await;
    }
    load.writes(200).await;
    let history = load.stop().await;
    history.assert_no_errors();
    history.judge_at(&addresses(&cluster, &[2, 3, 4])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_is_replaced_in_turn_under_load() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = start_load("replace", &cluster);
    let mut nodes = [0, 1, 2];
    for place in 0..3 {
        load.writes(100).await;
        let new = cluster.add_spare().await;
        let old = std::mem::replace(&mut nodes[place], new);
        let stay: Vec<usize> = nodes.into_iter().filter(|node| *node != new).collect();
        load.use_nodes(addresses(&cluster, &stay));
        let named = addresses(&cluster, &[old, new]);
        carry_out(&cluster, &stay, &["replace", &named[0], &named[1]]).await;
        assert_view(&cluster, &nodes, 3, 3).await;
        load.use_nodes(addresses(&cluster, &nodes));
        // What has left is of no use any more.
        cluster.wait_spare(old).await;
        cluster.nodes[old].kill();
    }
    load.writes(100).await;
    let history = load.stop().await;
    history.assert_no_errors();
    history.judge_at(&addresses(&cluster, &nodes)).await;
}

/// The new view shares no node with the old one. The wait is at a node that leaves: it learns the
/// end all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_are_replaced_at_once_under_load() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let fill = Fill::small("moved", 20_000);
    fill.write(&cluster, 0).await;
    let load = start_load("exchange", &cluster);
    load.writes(200).await;
    for _ in 0..3 {
        cluster.add_spare().await;
    }
    let start = Instant::now();
    let change = json!({ "nodes": addresses(&cluster, &[3, 4, 5]) });
    let accepted = put_view(&cluster, 0, "", &change, &[]).await;
    assert_eq!(accepted.status, 202, "{}", accepted.text());
    // Clients of the old nodes go over to the new ones in their own time.
    load.writes(50).await;
    load.use_nodes(addresses(&cluster, &[3, 4, 5]));
    let location = accepted
        .headers
        .get("location")
        .and_then(|value| value.to_str().ok())
        .expect("where the operation is");
    let over = eventually(CHANGE_LIMIT, async || {
        let text = at(&cluster, 3, &format!("{location}?wait=5s")).await;
        let operation: Value = serde_json::from_str(&text).ok()?;
        (operation["phase"] == "done").then_some(())
    });
    assert!(
        over.await.is_some(),
        "not done after {CHANGE_LIMIT:?}: {}",
        at(&cluster, 3, "/v1/cluster").await
    );
    say(&format!(
        "three nodes for three others: {:?}",
        start.elapsed()
    ));
    assert_view(&cluster, &[3, 4, 5], 3, 3).await;
    for node in 0..3 {
        cluster.wait_spare(node).await;
        cluster.nodes[node].kill();
    }
    load.writes(100).await;
    for node in 3..6 {
        fill.assert_at(&cluster, node).await;
    }
    let history = load.stop().await;
    history.assert_no_errors();
    history.judge_at(&addresses(&cluster, &[3, 4, 5])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_and_shards_become_more_and_fewer_under_load() {
    let cluster = Cluster::start(Setup::nodes(4).arguments(&["--shards", "3"])).await;
    let load = start_load("resize", &cluster);
    let all = [0, 1, 2, 3];
    for (words, shards, replicas) in [
        (["set-replication", "1"], 3, 1),
        (["set-shards", "8"], 8, 1),
        (["set-replication", "4"], 8, 4),
        (["set-shards", "2"], 2, 4),
        (["set-replication", "auto"], 2, 3),
        (["set-shards", "per-node"], 4, 3),
    ] {
        carry_out(&cluster, &all, &words).await;
        assert_view(&cluster, &all, shards, replicas).await;
        load.writes(50).await;
    }
    let history = load.stop().await;
    history.assert_no_errors();
    history.judge(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_go_through_kills_and_lose_nothing() {
    let mut random = StdRng::seed_from_u64(seed());
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("kills").start(&cluster);
    load.writes(100).await;
    let (d, e) = (cluster.add_spare().await, cluster.add_spare().await);
    for (words, nodes) in [
        (["add", "", ""], vec![0, 1, 2, 3, 4]),
        (["remove", "", ""], vec![0, 1, 2]),
    ] {
        let named = addresses(&cluster, &[d, e]);
        let words = [words[0], &named[0], &named[1], "--yes"].map(str::to_owned);
        let servers = addresses(&cluster, &[0, 1, 2]);
        let start = Instant::now();
        let change =
            tokio::spawn(
                async move { operate(&servers, &words.each_ref().map(String::as_str)).await },
            );
        while !change.is_finished() && start.elapsed() < CHANGE_LIMIT {
            tokio::time::sleep(Duration::from_millis(random.random_range(100..1500))).await;
            let victim = random.random_range(0..cluster.nodes.len());
            cluster.nodes[victim].kill();
            tokio::time::sleep(Duration::from_millis(random.random_range(0..800))).await;
            cluster.nodes[victim].start();
            cluster.wait_up(victim).await;
        }
        assert!(
            change.is_finished(),
            "not done after {CHANGE_LIMIT:?}: {}",
            at(&cluster, 0, "/v1/cluster").await
        );
        let (exit, text) = change.await.expect("a process that ran");
        say(&format!(
            "a change through kills: {:?}, exit code {exit}: {}",
            start.elapsed(),
            text.lines().last().unwrap_or("")
        ));
        // A newcomer that is dead just then is refused; and who is killed while it accepts a change
        // leaves it open whether it did.
        assert!([0, 1, 3].contains(&exit), "exit code {exit}: {text}");
        if exit != 0 {
            let change = json!({ "nodes": addresses(&cluster, &nodes) });
            let again = put_view(&cluster, 0, "?wait=60s", &change, &[]).await;
            assert_eq!(again.status, 200, "{}", again.text());
        }
        assert_view(&cluster, &nodes, nodes.len(), 3).await;
    }
    load.use_nodes(addresses(&cluster, &[0, 1, 2]));
    load.writes(100).await;
    load.stop()
        .await
        .judge_at(&addresses(&cluster, &[0, 1, 2]))
        .await;
}

/// A node that is gone for good is replaced, and one that comes back with an empty disk takes its
/// own place by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_nodes_and_lost_disks_are_replaced() {
    let mut cluster = Cluster::start(Setup::nodes(3).arguments(&["--lost-disk-after", "2"])).await;
    let load = Load::new("dead").start(&cluster);
    load.writes(200).await;
    cluster.nodes[0].kill();
    let new = cluster.add_spare().await;
    load.use_nodes(addresses(&cluster, &[1, 2]));
    let named = addresses(&cluster, &[0, new]);
    carry_out(&cluster, &[1, 2], &["replace", &named[0], &named[1]]).await;
    assert_view(&cluster, &[1, 2, new], 3, 3).await;
    cluster.nodes[1].kill();
    std::fs::remove_dir_all(&cluster.nodes[1].data).expect("a directory to delete");
    let start = Instant::now();
    cluster.nodes[1].start();
    cluster.wait_node_ready(1).await;
    say(&format!(
        "a lost disk, until its node is ready again: {:?}",
        start.elapsed()
    ));
    assert_view(&cluster, &[1, 2, new], 3, 3).await;
    let nodes = addresses(&cluster, &[1, 2, new]);
    load.use_nodes(nodes.clone());
    load.writes(100).await;
    load.stop().await.judge_at(&nodes).await;
}

/// Nobody has to ask: what a node had that stays away is given to others, its vote in the meta
/// group too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stays_away_is_replaced_by_itself() {
    let mut cluster = Cluster::start(Setup::nodes(6).arguments(&["--replace-after", "3"])).await;
    let load = Load::new("away").start(&cluster);
    load.writes(100).await;
    // With six nodes five vote in the meta group: the leader is one of them.
    let before = status(&cluster, 0).await;
    let gone_id = before.meta_leader.expect("a leader");
    let gone = before
        .nodes
        .iter()
        .find(|node| node.id == gone_id)
        .map(|node| node.address.clone())
        .expect("its address");
    let gone = cluster
        .nodes
        .iter()
        .position(|node| node.address == gone)
        .expect("a node of ours");
    let stay: Vec<usize> = (0..6).filter(|node| *node != gone).collect();
    let start = Instant::now();
    cluster.nodes[gone].kill();
    load.use_nodes(addresses(&cluster, &stay));
    let replaced = eventually(CHANGE_LIMIT, async || {
        let status = status(&cluster, stay[0]).await;
        let is_free = status
            .shards
            .iter()
            .all(|shard| shard.replicas.iter().all(|replica| replica.node != gone_id));
        (status.settled && is_free && status.epoch > before.epoch).then_some(())
    });
    assert!(
        replaced.await.is_some(),
        "not replaced: {}",
        at(&cluster, stay[0], "/v1/cluster").await
    );
    say(&format!(
        "a node that stays away, until all of it is elsewhere: {:?}",
        start.elapsed()
    ));
    load.writes(100).await;
    // Another can go now: every shard has all its replicas again.
    cluster.nodes[stay[0]].kill();
    load.use_nodes(addresses(&cluster, &stay[1..]));
    load.writes(100).await;
    cluster.nodes[stay[0]].start();
    cluster.nodes[gone].start();
    for node in [stay[0], gone] {
        cluster.wait_node_ready(node).await;
    }
    load.use_nodes(cluster.addresses());
    load.writes(50).await;
    load.stop().await.judge(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_changes_nothing() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let before = status(&cluster, 0).await;
    let epoch = format!("\"{}\"", before.epoch);
    let spare = cluster.add_spare().await;
    let all = cluster.addresses();
    let silent = all[0].replace("127.0.0.1", "127.0.0.99");
    for (change, expected) in [
        (json!({ "nodes": [] }), (409, "view_refused")),
        (json!({ "nodes": [all[0], all[0]] }), (409, "view_refused")),
        (json!({ "replication_factor": 4 }), (409, "view_refused")),
        (json!({ "replication_factor": 0 }), (409, "view_refused")),
        (json!({ "shards": 0 }), (409, "view_refused")),
        (json!({ "shards": 4097 }), (409, "view_refused")),
        (
            json!({ "nodes": [all[0], all[1], all[2], silent] }),
            (503, "node_not_ready"),
        ),
        (json!({ "nodes": "all" }), (400, "invalid_body")),
    ] {
        for query in ["", "?dry_run=true"] {
            let answer = put_view(&cluster, 1, query, &change, &[]).await;
            assert_eq!(
                code(&answer),
                (expected.0, expected.1.to_owned()),
                "{change}: {}",
                answer.text()
            );
        }
    }
    // A dry run and a late guard change nothing either.
    let grown = json!({ "nodes": all });
    let planned = put_view(
        &cluster,
        2,
        "?dry_run=true",
        &grown,
        &[("if-match", &epoch)],
    )
    .await;
    let planned: Value = serde_json::from_slice(&planned.body).expect("a plan");
    assert_eq!(planned["nodes_added"], json!([all[spare]]));
    assert!(planned["slots_moved"].as_u64() > Some(0), "{planned}");
    let late = put_view(&cluster, 0, "", &grown, &[("if-match", "\"77\"")]).await;
    assert_eq!(
        code(&late),
        (412, "epoch_changed".into()),
        "{}",
        late.text()
    );
    let after = status(&cluster, 0).await;
    assert_eq!(
        (after.epoch, after.nodes.len(), after.settled),
        (before.epoch, 3, true)
    );
    let unconfirmed = operate(&all, &["add", &all[spare]]).await;
    assert!(
        unconfirmed.0 == 2 && unconfirmed.1.contains("--yes"),
        "{unconfirmed:?}"
    );

    // Of two who have seen the same plan, one is accepted.
    let guard = [("if-match", epoch.as_str())];
    let (fewer, more) = (json!({ "replication_factor": 1 }), json!({ "shards": 6 }));
    let answers = tokio::join!(
        put_view(&cluster, 0, "", &fewer, &guard),
        put_view(&cluster, 1, "", &more, &guard)
    );
    let mut codes = [code(&answers.0), code(&answers.1)];
    codes.sort();
    assert_eq!(codes, [(202, String::new()), (412, "epoch_changed".into())]);
    let again = put_view(
        &cluster,
        2,
        "?wait=60s",
        &json!({ "replication_factor": "auto", "shards": "per-node" }),
        &[],
    )
    .await;
    assert_eq!(again.status, 200, "{}", again.text());
    assert_view(&cluster, &[0, 1, 2], 3, 3).await;
    // Nobody takes a node of another cluster.
    let other = cluster.add_stranger().await;
    let change = json!({ "nodes": [all[0], all[1], cluster.nodes[other].address] });
    let stranger = put_view(&cluster, 0, "", &change, &[]).await;
    assert_eq!(
        code(&stranger),
        (503, "node_not_ready".into()),
        "{}",
        stranger.text()
    );
}
