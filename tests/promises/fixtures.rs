//! Data directories of every release, as a kill left them: today's program opens each, holds what
//! was written, and goes on with what was under way. `tests/fixtures/make.sh` writes those of a new
//! release.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use quorate::api::protocol::{ClusterStatus, ReplicaHealth};
use tempfile::TempDir;

use crate::common::cluster::{Cluster, READY_LIMIT, Setup};
use crate::common::eventually;
use crate::common::http::{Answer, Failure, Request};

/// The port of `make.sh`: addresses are part of what is written.
const PORT: u16 = 24077;

/// The nodes of one archive. The addresses are locked among all test processes of this machine.
struct Opened {
    cluster: Cluster,
    _data: TempDir,
    _addresses: File,
}

/// The archives of this kind, one of every release.
fn archives(kind: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let entries = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let paths = entries.map(|entry| entry.expect("a directory entry").path());
    let is_one = |path: &PathBuf| path.to_string_lossy().ends_with(&format!("-{kind}.tar.gz"));
    let mut archives: Vec<PathBuf> = paths.filter(is_one).collect();
    assert!(
        !archives.is_empty(),
        "no archive of '{kind}' in {}",
        directory.display()
    );
    archives.sort();
    archives
}

async fn open(archive: &Path, nodes: usize) -> Opened {
    let locking = || {
        let lock =
            File::create(std::env::temp_dir().join("quorate-test-fixtures")).expect("a lock");
        lock.lock().expect("the lock of the addresses");
        lock
    };
    let lock = tokio::task::spawn_blocking(locking).await.expect("locked");
    let data =
        TempDir::with_prefix_in("fixture-", env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let unpacked = Command::new("tar")
        .arg("-xzf")
        .arg(archive)
        .arg("-C")
        .arg(data.path())
        .status()
        .expect("tar runs");
    assert!(unpacked.success(), "{}", archive.display());

    let mut setup = Setup::nodes(nodes);
    setup.addresses = (1..=nodes)
        .map(|node| format!("127.0.77.{node}:{PORT}"))
        .collect();
    setup.data = (0..nodes)
        .map(|node| (node, data.path().join((node + 1).to_string())))
        .collect();
    let cluster = Cluster::start(setup).await;
    Opened {
        cluster,
        _data: data,
        _addresses: lock,
    }
}

/// What the cluster answers. While a slot is on its way, neither side may serve it for a moment,
/// and each sends clients to the other.
async fn ask(cluster: &Cluster, node: usize, request: &Request) -> Answer {
    let mut last = None;
    let answered = eventually(READY_LIMIT, async || {
        match cluster
            .client
            .ask(&cluster.nodes[node].address, request)
            .await
        {
            Ok(answer) if answer.status != 503 => Some(answer),
            Err(Failure::Lost(reason)) => panic!("{}: {reason}", request.path),
            not_done => {
                last = Some(format!("{not_done:?}"));
                None
            }
        }
    });
    answered.await.unwrap_or_else(|| {
        panic!(
            "{}: no answer after {READY_LIMIT:?}: {last:?}",
            request.path
        )
    })
}

async fn get(cluster: &Cluster, node: usize, key: &str) -> Answer {
    ask(cluster, node, &Request::get(format!("/v1/kv/{key}"))).await
}

/// Returns what `make.sh` has written, with so many large values.
fn expected(large: usize) -> Vec<(String, Option<String>)> {
    let plain = (1..=60).map(|n| {
        let value = match n {
            50.. => None,
            _ if n % 3 == 1 => Some(format!("value-{n}")),
            _ => Some(format!("first-{n}")),
        };
        (format!("key-{n}"), value)
    });
    let once = (1..=10).map(|n| (format!("once-{n}"), Some(format!("once-{n}"))));
    let tagged = (1..=20).map(|n| (format!("%7Btag%7D-{n}"), Some(format!("tagged-{n}"))));
    let large = (1..=large).map(|n| (format!("large-{n}"), Some("x".repeat(200_000))));
    plain.chain(once).chain(tagged).chain(large).collect()
}

async fn assert_holds(cluster: &Cluster, large: usize) {
    for (n, (key, value)) in expected(large).into_iter().enumerate() {
        let answer = get(cluster, n % cluster.nodes.len(), &key).await;
        match value {
            Some(value) => assert!(
                answer.status == 200 && answer.text() == value,
                "{key}: {answer:?}"
            ),
            None => assert_eq!(answer.status, 404, "{key} was deleted"),
        }
    }
}

/// Writes, and repeats a request that was answered before: it must be remembered, and not be done
/// again.
async fn assert_goes_on(cluster: &Cluster) {
    let put = |key: &str, value: &str| Request::put(format!("/v1/kv/{key}"), value);
    let repeated = put("once-1", "once-1").header("idempotency-key", "fixture-1");
    let answer = ask(cluster, 0, &repeated).await;
    assert_eq!(
        answer.status, 201,
        "it was created by that request: {answer:?}"
    );
    let answer = ask(cluster, 0, &put("new", "after")).await;
    assert!([200, 201].contains(&answer.status), "{answer:?}");
    assert_eq!(get(cluster, 1, "new").await.text(), "after");
}

/// Waits for the end of what was planned, with every copy there.
async fn whole(cluster: &Cluster, replicas: usize, has_witness: bool) -> ClusterStatus {
    let mut last = String::new();
    let is_well = |health: &ReplicaHealth| {
        matches!(health, ReplicaHealth::Leading | ReplicaHealth::Following)
    };
    let found = eventually(READY_LIMIT, async || {
        let answer = cluster
            .client
            .ask_only(&cluster.nodes[0].address, &Request::get("/v1/cluster"))
            .await
            .ok()?;
        last = answer.text();
        let status: ClusterStatus =
            serde_json::from_str(&last).unwrap_or_else(|error| panic!("{error}: {last}"));
        let is_whole = status.shards.iter().all(|shard| {
            let all_well = shard
                .replicas
                .iter()
                .all(|replica| is_well(&replica.health));
            let witnessed = shard
                .witness
                .as_ref()
                .is_some_and(|witness| is_well(&witness.health));
            shard.replicas.len() == replicas && all_well && witnessed == has_witness
        });
        (status.settled && status.moves.is_empty() && status.slots_astray == 0 && is_whole)
            .then_some(status)
    });
    found
        .await
        .unwrap_or_else(|| panic!("not whole after {READY_LIMIT:?}: {last}"))
}

/// Kills every node and starts it again: now from what today's program has written beside the rest.
async fn start_again(cluster: &mut Cluster) {
    for node in &mut cluster.nodes {
        node.kill();
    }
    for node in &mut cluster.nodes {
        node.start();
    }
    cluster.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_with_witnesses_of_every_release_open() {
    for archive in archives("witnesses") {
        let mut opened = open(&archive, 3).await;
        let cluster = &mut opened.cluster;
        assert_holds(cluster, 4).await;
        assert_goes_on(cluster).await;
        whole(cluster, 2, true).await;

        start_again(cluster).await;
        assert_holds(cluster, 4).await;
        whole(cluster, 2, true).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_change_that_a_release_left_half_done_goes_on_to_its_end() {
    for archive in archives("moving") {
        let mut opened = open(&archive, 4).await;
        let cluster = &mut opened.cluster;
        assert_holds(cluster, 60).await;
        assert_goes_on(cluster).await;
        let status = whole(cluster, 3, false).await;
        assert_eq!(status.shards.len(), 4, "the change was to bring a shard");
        assert!(
            status.shards.iter().all(|shard| shard.slots == 1024),
            "{:?}",
            status.shards
        );

        start_again(cluster).await;
        assert_holds(cluster, 60).await;
        whole(cluster, 3, false).await;
    }
}
