//! A crash of all nodes at once, and files that come back damaged: everything acknowledged is
//! there, or the node says why not.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::common::cluster::{Cluster, Setup, operate};
use crate::common::fill::Fill;
use crate::common::http::Request;
use crate::common::load::Load;
use crate::common::{damage, eventually, from_environment, say, seed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_all_nodes_at_once_loses_nothing() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("crash").start(&cluster);
    for _ in 0..from_environment("QUORATE_TEST_ROUNDS").unwrap_or(3) {
        load.writes(200).await;
        for node in &mut cluster.nodes {
            node.kill();
        }
        for node in &mut cluster.nodes {
            node.start();
        }
        cluster.wait_ready().await;
    }
    load.writes(50).await;
    load.stop().await.judge(&cluster).await;
}

/// So that the next start has nothing to apply again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_stop_writes_the_maps_down() {
    let mut cluster = Cluster::start(Setup {
        no_view: true,
        ..Setup::nodes(1)
    })
    .await;
    let value = "what is written down at the stop";
    let answer = cluster
        .client
        .ask(
            &cluster.nodes[0].address,
            &Request::put("/v1/kv/key".to_owned(), value),
        )
        .await
        .expect("an answer");
    assert_eq!(answer.status, 201);
    let status = cluster.nodes[0].stop().await;
    assert!(status.success(), "{status}");
    let files = damage::files(&cluster.nodes[0].data.join("state"));
    let holds = |path: &std::path::PathBuf| {
        let bytes =
            std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        bytes
            .windows(value.len())
            .any(|part| part == value.as_bytes())
    };
    assert!(files.iter().any(holds), "the value is in none of {files:?}");
}

/// The map is a copy of what the log and the snapshot files hold: a node that lost it, or finds it
/// damaged, makes it anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_or_damaged_map_is_rebuilt() {
    let mut random = StdRng::seed_from_u64(seed());
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("state").start(&cluster);
    load.writes(300).await;
    let history = load.stop().await;
    for (id, name) in ["deleted", "truncated", "rotten"].into_iter().enumerate() {
        // A clean stop writes the map out, so that there is something to damage.
        let status = cluster.nodes[id].stop().await;
        assert!(status.success(), "node {id} did not stop cleanly: {status}");
        let state = cluster.nodes[id].data.join("state");
        match name {
            "deleted" => std::fs::remove_dir_all(state).expect("a directory to delete"),
            "truncated" => damage::truncate(&state),
            _ => damage::rot(&state, &mut random),
        }
        let before = cluster.nodes[id].log_text().len();
        cluster.nodes[id].start();
        cluster.wait_ready().await;
        let lost = history.acknowledged_ledger().lost(&cluster, id).await;
        assert!(lost.is_empty(), "not in the map of node {}: {lost:#?}", id);
        let log = cluster.nodes[id].log_text();
        let lines: Vec<&str> = log[before..]
            .lines()
            .filter(|line| line.to_lowercase().contains("rebuil"))
            .collect();
        say(&format!("crash: map {name}: {lines:#?}"));
        // sled may take rot for the end of its file, and then there is no map left to speak of: the
        // log has it all.
        let silent = lines.is_empty() && name != "rotten";
        assert!(
            !silent,
            "node {id} says nothing of its map ({name}), which it rebuilt:\n{}",
            &log[before..]
        );
    }
    history.judge(&cluster).await;
}

/// The log does not reach back to the beginning any more: the map comes from the snapshot file.
/// Where that is gone too, a new replica takes the place of the lost one, and no person is needed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_is_rebuilt_from_its_snapshot_and_without_one_the_replica_is_replaced() {
    let mut random = StdRng::seed_from_u64(seed());
    // Long enough to see that it is told.
    let arguments = ["--shards", "1", "--replace-after", "30"];
    let mut cluster = Cluster::start(Setup::nodes(3).arguments(&arguments)).await;
    let fills = Fill::write_past_a_purge(&cluster, 0).await;
    for id in 0..3 {
        cluster.wait_for_snapshot(id).await;
    }
    cluster.nodes[1].kill();
    std::fs::remove_dir_all(cluster.nodes[1].data.join("state")).expect("a directory to delete");
    cluster.nodes[1].start();
    cluster.wait_ready().await;
    for fill in &fills {
        fill.assert_at(&cluster, 1).await;
    }
    let log = cluster.nodes[1].log_text();
    let line = log
        .lines()
        .find(|line| line.contains("the tree of a replica was rebuilt"));
    say(&format!(
        "crash: map lost: {}",
        line.expect("a word about the tree")
    ));

    // With the snapshot file damaged too, nothing is left to rebuild it from. It is not guessed at,
    // and the others serve.
    cluster.nodes[2].kill();
    std::fs::remove_dir_all(cluster.nodes[2].data.join("state")).expect("a directory to delete");
    for path in damage::files(&cluster.nodes[2].data.join("snapshots")) {
        let middle = damage::written(&path) / 2;
        damage::flip(&path, middle, &mut random);
    }
    cluster.nodes[2].start();
    let said = eventually(Duration::from_secs(60), async || {
        let log = cluster.nodes[2].log_text();
        log.contains("a snapshot file is damaged").then_some(())?;
        log.lines()
            .find(|line| line.contains("cannot be opened"))
            .map(str::to_owned)
    });
    say(&format!(
        "crash: map and snapshot lost: {}",
        said.await.expect("a word about the lost replica")
    ));
    let address = &cluster.nodes[2].address;
    let ready = cluster
        .client
        .ask_only(address, &Request::get("/readyz"))
        .await
        .expect("an answer");
    assert_eq!(
        ready.status, 503,
        "a node with a lost replica says that it is ready"
    );
    assert!(
        cluster.metric(2, "quorate_replicas_failed").await > 0.0,
        "and counts none"
    );
    let (_, status) = operate(&cluster.addresses(), &["status"]).await;
    assert!(status.contains("HAS FAILED"), "and is not named:\n{status}");
    let read = cluster
        .client
        .ask_only(
            address,
            &Request::get("/v1/kv/entry-00000000?consistency=stale"),
        )
        .await
        .expect("an answer");
    // Its own map is empty, so that a read of it would be a 404. It may fetch the value elsewhere.
    assert!(
        matches!(read.status, 200 | 307 | 503),
        "a lost replica was read: {} {}",
        read.status,
        read.text()
    );
    let load = Load::new("lost").start(&cluster);
    load.writes(100).await;
    cluster.wait_node_ready(2).await;
    for fill in &fills {
        fill.assert_at(&cluster, 2).await;
    }
    let history = load.stop().await;
    let lost = history.acknowledged_ledger().lost(&cluster, 2).await;
    assert!(lost.is_empty(), "not in the map of node 2: {lost:#?}");
    assert_eq!(cluster.metric(2, "quorate_replicas_failed").await, 0.0);
    history.judge(&cluster).await;
}

/// A log that is gone has taken the votes of its replicas with it: the node does not begin a new
/// one under its old name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_its_log_does_not_start() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    cluster.nodes[0].kill();
    let log_dir = cluster.nodes[0].data.join("log");
    std::fs::remove_dir_all(&log_dir).expect("a directory to delete");
    let before = cluster.nodes[0].log_text().len();
    cluster.nodes[0].start();
    let status = cluster.nodes[0].end(Duration::from_secs(60)).await;
    let log = cluster.nodes[0].log_text();
    say(&format!(
        "crash: the log deleted: {status}: {}",
        log[before..].trim()
    ));
    assert!(
        !status.success(),
        "a member without its log ended as if all were well"
    );
    assert!(
        log[before..].contains(&log_dir.display().to_string()),
        "the message does not name {}",
        log_dir.display()
    );
    assert!(
        !log_dir.exists()
            || std::fs::read_dir(&log_dir)
                .expect("readable")
                .next()
                .is_none(),
        "a new log was begun"
    );
    let load = Load::new("no-log").start(&cluster);
    load.writes(50).await;
    load.stop().await.judge_at(&cluster.addresses()[1..]).await;
}

/// What a crash leaves of a record that was being written is cut without a word to anybody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_end_of_the_log_is_cut() {
    let mut random = StdRng::seed_from_u64(seed());
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("torn").start(&cluster);
    load.writes(300).await;
    for node in &mut cluster.nodes {
        node.kill();
    }
    for node in &mut cluster.nodes {
        damage::tear(&damage::last_segment(&node.data), &mut random);
        node.start();
    }
    cluster.wait_ready().await;
    load.writes(50).await;
    load.stop().await.judge(&cluster).await;
}

/// Damage of what was synced is never guessed around: that node does not start and says what to do,
/// and the others serve.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_stops_its_node_and_nothing_else() {
    let mut random = StdRng::seed_from_u64(seed());
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("bitrot").start(&cluster);
    load.writes(300).await;
    cluster.nodes[0].kill();
    load.writes(50).await;
    let segment = damage::last_segment(&cluster.nodes[0].data);
    let end = damage::written(&segment);
    // The second quarter: behind the head, and well before the last mark.
    let offset = random.random_range(end / 4..end / 2);
    let sound = std::fs::read(&segment).expect("a readable file");
    damage::flip(&segment, offset, &mut random);
    let before = cluster.nodes[0].log_text().len();
    cluster.nodes[0].start();
    let status = cluster.nodes[0].end(Duration::from_secs(60)).await;
    assert!(
        !status.success(),
        "a node with a damaged log ended as if all were well"
    );
    let log = cluster.nodes[0].log_text();
    let name = segment
        .file_name()
        .and_then(|name| name.to_str())
        .expect("a readable name");
    say(&format!(
        "crash: a bit of the log flipped at {offset} of {end}: {}",
        log[before..].trim()
    ));
    assert!(
        log[before..].contains(name),
        "the message does not name the damaged file {name}"
    );
    load.writes(50).await;
    let history = load.stop().await;
    // The refusal has changed nothing: with the file as it was, the node comes back.
    std::fs::write(&segment, sound).expect("a writable file");
    cluster.nodes[0].start();
    cluster.wait_ready().await;
    history.judge(&cluster).await;
}
