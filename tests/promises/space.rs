//! What is overwritten or deleted gives its space back: of log, maps and snapshots.

use std::time::Duration;

use crate::common::cluster::{Cluster, Setup};
use crate::common::damage::files;
use crate::common::http::Request;
use crate::common::{eventually, say};

const KEYS: usize = 20;
/// The largest value; the others are smaller, the least a kilobyte.
const VALUE_BYTES_MAX: usize = 2_000_000;
/// 10 MB each, on three nodes.
const ROUNDS: usize = 30;

/// What all nodes may take once nobody writes, with 10 MB of values on each.
const OVERWRITTEN_BYTES_MAX: u64 = 500 << 20;
/// The same with nothing in them.
const DELETED_BYTES_MAX: u64 = 300 << 20;

/// Bounds a broken test: it takes half a minute on an idle machine.
const LIMIT: Duration = Duration::from_secs(240);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overwritten_and_deleted_values_give_their_space_back() {
    let cluster = Cluster::start(Setup::nodes(3)).await;
    for round in 0..ROUNDS {
        for key in 0..KEYS {
            ask(&cluster, Request::put(path(key), value(round, key))).await;
        }
    }
    let written = disk_bytes(&cluster);
    let kept = wait_below(&cluster, OVERWRITTEN_BYTES_MAX).await;
    for key in 0..KEYS {
        let answer = ask(&cluster, Request::get(path(key))).await;
        assert!(
            answer == value(ROUNDS - 1, key),
            "key {key} is not what was written last"
        );
    }

    for key in 0..KEYS {
        ask(&cluster, Request::new(reqwest::Method::DELETE, path(key))).await;
    }
    let left = wait_below(&cluster, DELETED_BYTES_MAX).await;
    say(&format!(
        "space: {} MB after {ROUNDS} rounds, then {} MB, and {} MB with all deleted",
        written >> 20,
        kept >> 20,
        left >> 20
    ));
}

fn path(key: usize) -> String {
    format!("/v1/kv/space-{key}")
}

/// Few large values and many small ones.
fn value(round: usize, key: usize) -> Vec<u8> {
    let cubed = VALUE_BYTES_MAX * (key + 1).pow(3) / KEYS.pow(3);
    vec![(round + key) as u8; cubed.max(1000)]
}

async fn ask(cluster: &Cluster, request: Request) -> Vec<u8> {
    let request = request.timeout(Duration::from_secs(60));
    let answered = eventually(LIMIT, async || {
        let answer = cluster
            .client
            .ask(&cluster.nodes[0].address, &request)
            .await
            .ok()?;
        (200..300).contains(&answer.status).then_some(answer.body)
    });
    answered
        .await
        .unwrap_or_else(|| panic!("{} {} was never answered", request.method, request.path))
}

/// Waits until all nodes take less than that, and returns what they take.
async fn wait_below(cluster: &Cluster, bytes_max: u64) -> u64 {
    let below = eventually(LIMIT, async || {
        Some(disk_bytes(cluster)).filter(|bytes| *bytes < bytes_max)
    })
    .await;
    below.unwrap_or_else(|| {
        panic!(
            "the nodes still take {} MB, more than {}",
            disk_bytes(cluster) >> 20,
            bytes_max >> 20
        )
    })
}

fn disk_bytes(cluster: &Cluster) -> u64 {
    let of_node = |data| {
        files(data)
            .iter()
            .filter_map(|file| file.metadata().ok())
            .map(|file| file.len())
            .sum::<u64>()
    };
    cluster.nodes.iter().map(|node| of_node(&node.data)).sum()
}

/// Shards of the node whose log is looked at, and what that may take: each shard alone takes less.
const SHARDS: &str = "16";
const LOG_MIB: u64 = 16;
/// A mebibyte of live data, overwritten.
const LOG_KEYS: usize = 16;
const LOG_VALUE_BYTES: usize = 64 << 10;
const LOG_ROUNDS: usize = 96;
/// How long the log may stay too large while it is written to.
const LOG_LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_of_a_node_is_bounded_however_many_shards_it_has() {
    let setup = Setup {
        no_view: true,
        ..Setup::nodes(1)
    };
    let cluster =
        Cluster::start(setup.arguments(&["--shards", SHARDS, "--log-mib", &LOG_MIB.to_string()]))
            .await;
    let write = async |len: usize| {
        for key in 0..LOG_KEYS {
            ask(&cluster, Request::put(path(key), vec![key as u8; len])).await;
        }
    };
    let log_mib =
        async || cluster.metric(0, "quorate_disk_bytes{kind=\"log\"}").await / f64::from(1 << 20);
    let mut most = 0.0;

    for round in 0..LOG_ROUNDS {
        write(LOG_VALUE_BYTES).await;
        most = log_mib().await.max(most);
        if round % 8 == 7 {
            // No shard is quiet meanwhile: it is the bound that holds, not what is given back
            // afterwards.
            let below = eventually(LOG_LIMIT, async || {
                write(1).await;
                (log_mib().await <= LOG_MIB as f64).then_some(())
            });
            assert!(
                below.await.is_some(),
                "the log takes {} MiB and more than {LOG_MIB}",
                log_mib().await
            );
        }
    }
    say(&format!(
        "space: at most {most:.0} MiB of log for {SHARDS} shards that were to keep {LOG_MIB}"
    ));
}
