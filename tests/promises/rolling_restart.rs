//! Every node is stopped and started again, one after another, and no client with a deadline sees
//! an error.

use std::time::Duration;

use crate::common::cluster::{Cluster, Setup};
use crate::common::load::Load;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_restarted_in_turn_and_nobody_notices() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("rolling")
        .deadline(Duration::from_secs(5))
        .start(&cluster);
    for node in 0..3 {
        load.writes(100).await;
        let status = cluster.nodes[node].stop().await;
        assert!(
            status.success(),
            "node {node} did not stop cleanly: {status}"
        );
        cluster.nodes[node].start();
        cluster.wait_node_ready(node).await;
    }
    load.writes(100).await;
    let history = load.stop().await;
    history.assert_no_errors();
    history.judge(&cluster).await;
}
