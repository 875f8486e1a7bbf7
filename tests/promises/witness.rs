//! Two copies of everything and a witness: the store goes on without any one node, also when it is
//! another one the next time, and with nothing lost. The witness's node has none of the data.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use quorate::api::protocol::{ClusterStatus, ReplicaHealth, ShardStatus};
use quorate::sm::slots::slot_of;
use quorate::types::NodeId;

use crate::common::cluster::{Cluster, Node, READY_LIMIT, Setup, operate};
use crate::common::damage::files;
use crate::common::http::{Answer, Request};
use crate::common::load::Load;
use crate::common::{eventually, say};

/// Enough for every shard to own some.
const KEYS: usize = 64;
/// What a client waits for a write, retries included. Far beyond what an election takes: a bound
/// for one that is stuck.
const DEADLINE: Duration = Duration::from_secs(30);

fn key(number: usize) -> String {
    format!("witnessed-{number}")
}

/// How a value begins, by which it is found among the bytes of a file.
const MARKER: &str = "<this is the value of witnessed-";
/// Of all keys together, far more than a witness keeps besides its log.
const VALUE_BYTES: usize = 100 << 10;

fn value(number: usize) -> String {
    format!("{MARKER}{number}>{}", "x".repeat(VALUE_BYTES))
}

/// What a node that runs tells of the cluster, once the plan is carried out and everyone has
/// answered for their replicas.
async fn settled(cluster: &Cluster, node: usize) -> ClusterStatus {
    let mut last = String::new();
    let found = eventually(READY_LIMIT, async || {
        let answer = cluster
            .client
            .ask_only(&cluster.nodes[node].address, &Request::get("/v1/cluster"))
            .await
            .ok()?;
        last = answer.text();
        let status: ClusterStatus =
            serde_json::from_str(&last).unwrap_or_else(|error| panic!("{error}: {last}"));
        let is_led = status.shards.iter().all(|shard| shard.leader.is_some());
        // One that was away may lack much of what was written meanwhile.
        let mut witnesses = status
            .shards
            .iter()
            .filter_map(|shard| shard.witness.as_ref());
        let is_level = witnesses.all(|witness| matches!(witness.health, ReplicaHealth::Following));
        (status.settled && is_led && is_level).then_some(status)
    });
    found
        .await
        .unwrap_or_else(|| panic!("not settled after {READY_LIMIT:?}: {last}"))
}

/// The position in the cluster of a node of the status.
fn place(cluster: &Cluster, status: &ClusterStatus, id: NodeId) -> usize {
    let address = status
        .nodes
        .iter()
        .find(|node| node.id == id)
        .map(|node| node.address.to_string());
    cluster
        .nodes
        .iter()
        .position(|node| Some(&node.address) == address.as_ref())
        .expect("a node of the cluster")
}

/// Every shard has two replicas on two nodes, and a witness on a third.
fn assert_witnessed(status: &ClusterStatus) {
    for shard in &status.shards {
        let witness = shard
            .witness
            .as_ref()
            .unwrap_or_else(|| panic!("a shard without a witness: {shard:#?}"));
        let on: Vec<NodeId> = shard.replicas.iter().map(|replica| replica.node).collect();
        assert!(
            on.len() == 2 && on[0] != on[1] && !on.contains(&witness.node),
            "{shard:#?}"
        );
        assert!(
            matches!(witness.health, ReplicaHealth::Following),
            "{shard:#?}"
        );
        assert_ne!(shard.leader, Some(witness.node));
    }
    let mut held: BTreeMap<NodeId, usize> = status.nodes.iter().map(|node| (node.id, 0)).collect();
    let witnesses = status
        .shards
        .iter()
        .filter_map(|shard| shard.witness.as_ref());
    witnesses.for_each(|witness| *held.entry(witness.node).or_default() += 1);
    let (most, least) = (
        held.values().max().copied().unwrap_or(0),
        held.values().min().copied().unwrap_or(0),
    );
    assert!(most - least <= 1, "witnesses are uneven: {held:?}");
}

/// Asks one of the nodes after the other until the answer is one of these: a node that was just
/// lost may still be named as the leader.
async fn ask(cluster: &Cluster, running: &[usize], request: &Request, accepted: &[u16]) -> Answer {
    let start = Instant::now();
    let mut attempts = running.iter().cycle();
    loop {
        let node = attempts.next().expect("a node that runs");
        let last = match cluster
            .client
            .ask(&cluster.nodes[*node].address, request)
            .await
        {
            Ok(answer) if accepted.contains(&answer.status) => return answer,
            other => format!("{other:?}"),
        };
        assert!(
            start.elapsed() < DEADLINE,
            "{} has no answer after {DEADLINE:?}: {last:.300}",
            request.path
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes every key, asking the nodes that run until each has been acknowledged.
async fn write_all(cluster: &Cluster, running: &[usize]) {
    for number in 0..KEYS {
        let request = Request::put(format!("/v1/kv/{}", key(number)), value(number))
            .timeout(Duration::from_secs(5));
        ask(cluster, running, &request, &[200, 201]).await;
    }
}

async fn read_all(cluster: &Cluster, node: usize) {
    for number in 0..KEYS {
        let request = Request::get(format!("/v1/kv/{}", key(number)));
        let answer = ask(cluster, &[node], &request, &[200, 404]).await;
        assert!(
            answer.status == 200 && answer.body == value(number).as_bytes(),
            "{}: {}",
            key(number),
            answer.status
        );
    }
}

/// The numbers of the keys whose values are among the bytes of the files below these directories.
fn values_below(directories: &[PathBuf]) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    for path in directories.iter().flat_map(|directory| files(directory)) {
        let bytes =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let text = String::from_utf8_lossy(&bytes);
        let numbers = text
            .split(MARKER)
            .skip(1)
            .filter_map(|rest| rest.split_once('>')?.0.parse::<usize>().ok());
        found.extend(numbers);
    }
    found
}

/// All nodes being stopped, looks for the values of each shard among the bytes of every node's maps
/// and snapshots: those of a replica have some, those of the witness's node, and of any other,
/// none. There is the file that says how far the witness's log was applied.
fn assert_disks(cluster: &Cluster, status: &ClusterStatus) {
    let maps = |node: &Node| values_below(&["state", "snapshots"].map(|maps| node.data.join(maps)));
    let held: Vec<BTreeSet<usize>> = cluster.nodes.iter().map(maps).collect();
    for shard in &status.shards {
        let owned: BTreeSet<usize> = (0..KEYS)
            .filter(|number| status.slots.owner(slot_of(key(*number).as_bytes())) == shard.id)
            .collect();
        for (node, held) in held.iter().enumerate() {
            let has_replica = shard
                .replicas
                .iter()
                .any(|replica| place(cluster, status, replica.node) == node);
            let found: Vec<&usize> = held.intersection(&owned).collect();
            assert_eq!(
                !found.is_empty(),
                has_replica,
                "node {node}, shard {}: {found:?} of {owned:?}",
                shard.id
            );
        }
        let ShardStatus {
            witness: Some(witness),
            ..
        } = shard
        else {
            panic!("no witness: {shard:#?}")
        };
        let data = &cluster.nodes[place(cluster, status, witness.node)].data;
        let mark = data
            .join("witnesses")
            .join(format!("{}-{}.mark", shard.id, witness.id));
        assert!(mark.exists(), "{} is not there", mark.display());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_copies_and_a_witness_go_on_without_any_one_node() {
    let mut cluster =
        Cluster::start(Setup::nodes(4).arguments(&["--repl-factor", "2", "--shards", "4"])).await;
    let status = settled(&cluster, 0).await;
    assert_witnessed(&status);
    write_all(&cluster, &[0, 1, 2, 3]).await;
    let load = Load::new("witness").start(&cluster);
    load.writes(100).await;
    // Each in turn: for every shard its leader, the other replica, its witness, and one that has no
    // part in it.
    for lost in 0..4 {
        cluster.nodes[lost].kill();
        let others: Vec<usize> = (0..4).filter(|node| *node != lost).collect();
        let start = Instant::now();
        write_all(&cluster, &others).await;
        say(&format!(
            "witness: all {KEYS} keys written {:?} after node {lost} was killed",
            start.elapsed()
        ));
        for node in others {
            read_all(&cluster, node).await;
        }
        load.writes(50).await;
        cluster.nodes[lost].start();
        cluster.wait_ready().await;
    }
    let status = settled(&cluster, 0).await;
    assert_witnessed(&status);
    let history = load.stop().await;
    for node in &mut cluster.nodes {
        let end = node.stop().await;
        assert!(
            end.success(),
            "{} did not stop cleanly: {end}",
            node.address
        );
    }
    assert_disks(&cluster, &status);
    for node in &mut cluster.nodes {
        node.start();
    }
    cluster.wait_ready().await;
    read_all(&cluster, 0).await;
    history.judge(&cluster).await;
}

/// The leader is killed while the other replica is away: what it had acknowledged since is with the
/// witness alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_the_witness_still_has_is_not_lost() {
    let mut cluster =
        Cluster::start(Setup::nodes(3).arguments(&["--repl-factor", "2", "--shards", "1"])).await;
    let status = settled(&cluster, 0).await;
    assert_witnessed(&status);
    let replicas: Vec<usize> = status.shards[0]
        .replicas
        .iter()
        .map(|replica| place(&cluster, &status, replica.node))
        .collect();
    let witness = (0..3)
        .find(|node| !replicas.contains(node))
        .expect("the third");
    write_all(&cluster, &[0, 1, 2]).await;
    let load = Load::new("longest").start(&cluster);
    for round in 0..2 {
        load.writes(50).await;
        let (ahead, behind) = (replicas[round % 2], replicas[(round + 1) % 2]);
        cluster.nodes[behind].kill();
        write_all(&cluster, &[ahead, witness]).await;
        load.writes(100).await;
        cluster.nodes[ahead].kill();
        let start = Instant::now();
        cluster.nodes[behind].start();
        write_all(&cluster, &[behind, witness]).await;
        say(&format!(
            "witness: written {:?} after the one that was behind was started again",
            start.elapsed()
        ));
        read_all(&cluster, behind).await;
        load.writes(50).await;
        cluster.nodes[ahead].start();
        cluster.wait_ready().await;
    }
    load.stop().await.judge(&cluster).await;
}

/// Another number of replicas is asked for while the store serves: a witness comes and goes with an
/// even one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_comes_and_goes_with_the_number_of_replicas() {
    let cluster =
        Cluster::start(Setup::nodes(4).arguments(&["--repl-factor", "3", "--shards", "4"])).await;
    write_all(&cluster, &[0, 1, 2, 3]).await;
    let load = Load::new("even")
        .deadline(Duration::from_secs(10))
        .start(&cluster);
    for (factor, witnesses) in [
        (2, true),
        (3, false),
        (2, true),
        (4, false),
        (1, false),
        (2, true),
    ] {
        load.writes(100).await;
        let words = ["set-replication", &factor.to_string(), "--yes"];
        let (code, text) = operate(&cluster.addresses(), &words).await;
        assert_eq!(code, 0, "{text}");
        let status = settled(&cluster, 0).await;
        for shard in &status.shards {
            assert_eq!(
                (shard.replicas.len(), shard.witness.is_some()),
                (factor, witnesses),
                "{shard:#?}"
            );
        }
        let (code, text) = operate(&cluster.addresses(), &["status"]).await;
        assert_eq!((code, text.contains("(witness)")), (0, witnesses), "{text}");
        read_all(&cluster, 3).await;
    }
    let history = load.stop().await;
    history.assert_no_errors();
    history.judge(&cluster).await;
}
