//! A leader that is paused, and goes on believing that it leads, serves nothing stale and loses
//! nothing.

use std::time::Duration;

use crate::common::cluster::{Cluster, Setup};
use crate::common::from_environment;
use crate::common::load::Load;

/// Longer than every election timeout and lease.
const PAUSE: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_wakes_up_serves_nothing_stale() {
    let mut cluster = Cluster::start(Setup::nodes(3).arguments(&["--shards", "2"])).await;
    let load = Load::new("pause").start(&cluster);
    for round in 0..from_environment("QUORATE_TEST_ROUNDS").unwrap_or(3) {
        load.writes(50).await;
        let leader = cluster.leader((round % 2) as usize).await;
        cluster.nodes[leader].pause();
        load.next_write(Duration::from_secs(30)).await;
        tokio::time::sleep(PAUSE).await;
        cluster.nodes[leader].resume();
        load.writes(50).await;
        cluster.wait_ready().await;
    }
    load.stop().await.judge(&cluster).await;
}
