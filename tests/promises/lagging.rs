//! A follower that missed much comes back while the cluster serves; a node that lost its disk harms
//! nobody.

use std::time::{Duration, Instant};

use crate::common::cluster::{Cluster, Setup};
use crate::common::fill::Fill;
use crate::common::http::Request;
use crate::common::load::Load;
use crate::common::{from_environment, say};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_missed_much_comes_back_by_the_log() {
    let (cluster, leader, follower) = without_a_follower().await;
    let missed = Fill::small(
        "missed",
        from_environment("QUORATE_TEST_WRITES").unwrap_or(20_000),
    );
    missed.write(&cluster, leader).await;
    come_back(cluster, follower, &[missed]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_missed_more_than_the_log_holds_comes_back_by_a_snapshot() {
    let (cluster, leader, follower) = without_a_follower().await;
    let missed = Fill::write_past_a_purge(&cluster, leader).await;
    cluster.wait_for_purge(leader).await;
    let cluster = come_back(cluster, follower, &missed).await;
    let installed = cluster
        .metric(follower, "quorate_snapshots_installed_total")
        .await;
    assert!(
        installed >= 1.0,
        "the follower has caught up without a snapshot: the log still had all of it"
    );
}

async fn without_a_follower() -> (Cluster, usize, usize) {
    let mut cluster = Cluster::start(Setup::nodes(3).arguments(&["--shards", "1"])).await;
    let leader = cluster.leader(0).await;
    let follower = (leader + 1) % 3;
    cluster.nodes[follower].kill();
    (cluster, leader, follower)
}

/// Starts the follower again while the cluster serves.
async fn come_back(mut cluster: Cluster, follower: usize, missed: &[Fill]) -> Cluster {
    let load = Load::new("lagging").start(&cluster);
    load.writes(20).await;
    let start = Instant::now();
    cluster.nodes[follower].start();
    cluster.wait_node_ready(follower).await;
    let keys: u64 = missed.iter().map(|fill| fill.keys).sum();
    say(&format!(
        "lagging: {keys} missed keys caught up in {:?}",
        start.elapsed()
    ));
    load.writes(20).await;
    let history = load.stop().await;
    let lost = history.acknowledged_ledger().lost(&cluster, follower).await;
    assert!(
        lost.is_empty(),
        "not in the map of node {follower}: {lost:#?}"
    );
    for fill in missed {
        fill.assert_at(&cluster, follower).await;
    }
    history.judge(&cluster).await;
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_disk_harms_nobody() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("wiped").start(&cluster);
    load.writes(200).await;
    let victim = cluster.leader(0).await;
    cluster.nodes[victim].kill();
    std::fs::remove_dir_all(&cluster.nodes[victim].data).expect("a data directory to delete");
    cluster.nodes[victim].start();
    // It has no vote that it could give twice: the others go on with or without it.
    load.next_write(Duration::from_secs(30)).await;
    load.writes(200).await;
    for id in (0..3).filter(|id| *id != victim) {
        cluster.wait_node_ready(id).await;
    }
    let answer = cluster
        .client
        .ask_only(&cluster.nodes[victim].address, &Request::get("/healthz"))
        .await;
    say(&format!(
        "lagging: a wiped node answers /healthz with {:?}",
        answer.map(|answer| (answer.status, answer.text()))
    ));
    // Only the nodes that kept their disks are asked: the stranger may not answer for the cluster
    // it does not belong to.
    let mut addresses = cluster.addresses();
    addresses.remove(victim);
    load.stop().await.judge_at(&addresses).await;
}
