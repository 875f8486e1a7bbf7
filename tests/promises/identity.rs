//! Data directories are who they say they are: nobody is declared dead by mistake, and none is taken for another.

use crate::common::cluster::{Cluster, READY_LIMIT, Setup};
use crate::common::eventually;
use crate::common::load::Load;

/// Waits until the log of one of these nodes has a line with this in it.
async fn wait_logged(cluster: &Cluster, ids: &[usize], what: &str) {
    let found = async || ids.iter().any(|id| cluster.nodes[*id].log_text().contains(what)).then_some(());
    let found = eventually(READY_LIMIT, found).await;
    assert!(found.is_some(), "no node of {ids:?} has said '{what}'");
}

/// A start with the disk not mounted, say: the node comes back with its data a moment later, and nothing was done to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_directory_for_a_moment_is_no_lost_disk() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("mistaken").start(&cluster);
    load.writes(50).await;
    let before = cluster.status().await;

    cluster.nodes[2].kill();
    let (data, aside) = (cluster.nodes[2].data.clone(), cluster.nodes[2].data.with_extension("aside"));
    std::fs::rename(&data, &aside).expect("its data is put aside");
    cluster.nodes[2].start();
    wait_logged(&cluster, &[0, 1], "an empty data directory").await;

    cluster.nodes[2].kill();
    std::fs::remove_dir_all(&data).expect("the empty directory is removed");
    std::fs::rename(&aside, &data).expect("its data is put back");
    cluster.nodes[2].start();
    cluster.wait_ready().await;
    load.writes(50).await;
    let after = cluster.status().await;
    assert_eq!(after.epoch, before.epoch, "a node was given up");
    load.stop().await.judge(&cluster).await;
}

/// Whoever starts them need not know that they had data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_only_join_found_nothing_where_all_data_is_gone() {
    let mut cluster = Cluster::prepare(Setup::nodes(2)).await;
    for node in &mut cluster.nodes {
        node.set_environment("JOIN_ONLY", "true");
        node.start();
    }
    for id in 0..2 {
        cluster.wait_code(id, "no-cluster").await;
    }

    for node in &mut cluster.nodes {
        node.kill();
        assert!(!node.data.join("log").exists(), "{} has founded", node.address);
        node.set_environment("JOIN_ONLY", "");
        node.start();
    }
    cluster.wait_ready().await;

    // With a cluster there, it holds nobody up.
    for node in &mut cluster.nodes {
        node.kill();
        node.set_environment("JOIN_ONLY", "true");
        node.start();
    }
    cluster.wait_ready().await;
}
