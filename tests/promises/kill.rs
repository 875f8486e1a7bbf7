//! A leader that is killed costs the cluster a moment and nothing else: no acknowledged write, no
//! order of operations.

use std::time::Duration;

use crate::common::cluster::{Cluster, Setup};
use crate::common::http::Request;
use crate::common::load::Load;
use crate::common::{from_environment, say};

/// Far beyond what a failover takes on any machine: a bound for a cluster that is stuck. What it
/// does take is printed.
const FAILOVER_LIMIT: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_leaders_under_load_loses_nothing() {
    let mut cluster = Cluster::start(Setup::nodes(3).arguments(&["--shards", "1"])).await;
    let load = Load::new("kill").start(&cluster);
    let mut gaps = Vec::new();
    for _ in 0..from_environment("QUORATE_TEST_ROUNDS").unwrap_or(10) {
        load.writes(50).await;
        let leader = cluster.leader(0).await;
        cluster.nodes[leader].kill();
        gaps.push(load.next_write(FAILOVER_LIMIT).await);
        cluster.nodes[leader].start();
        cluster.wait_ready().await;
    }
    load.writes(50).await;
    load.stop().await.judge(&cluster).await;
    gaps.sort_unstable();
    let (median, longest) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    say(&format!(
        "kill: to the next acknowledged write: median {median:?}, longest {longest:?} of {}",
        gaps.len()
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_sent_to_a_leader_that_was_killed() {
    // Silence alone would tell that it is gone after more than four seconds.
    let slow = ["--shards", "1", "--timing-factor", "10"];
    let mut cluster = Cluster::start(Setup::nodes(3).arguments(&slow)).await;
    let leader = cluster.leader(0).await;
    cluster.nodes[leader].kill();
    // The others learn of it by the end of their connections.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let put = async |n: usize| {
        let follower = &cluster.nodes[(leader + 1 + n % 2) % 3].address;
        cluster
            .client
            .ask(follower, &Request::put(format!("/v1/kv/{n}"), "value"))
            .await
    };
    let answers = futures::future::join_all((0..20).map(put)).await;
    let statuses: Vec<_> = answers
        .iter()
        .map(|answer| answer.as_ref().map(|answer| answer.status))
        .collect();
    assert!(
        statuses.iter().all(|status| matches!(status, Ok(201))),
        "{statuses:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_sent_to_a_dead_home_by_a_node_that_has_no_replica() {
    let mut cluster =
        Cluster::start(Setup::nodes(5).arguments(&["--repl-factor", "3", "--shards", "5"])).await;
    cluster.nodes[4].kill();
    // All shards of it have other leaders.
    let survivor = cluster.nodes[0].address.clone();
    for n in 0..40 {
        let put = Request::put(format!("/v1/kv/{n}?proxy=true"), "value")
            .timeout(Duration::from_secs(20));
        let answer = cluster
            .client
            .ask(&survivor, &put)
            .await
            .expect("an answer");
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    for node in 0..4 {
        for n in 0..40 {
            let answer = cluster
                .client
                .ask(
                    &cluster.nodes[node].address,
                    &Request::get(format!("/v1/kv/{n}")),
                )
                .await;
            let answer =
                answer.unwrap_or_else(|failure| panic!("by node {node}, key {n}: {failure:?}"));
            assert_eq!(
                answer.status,
                200,
                "by node {node}, key {n}: {}",
                answer.text()
            );
        }
    }
}
