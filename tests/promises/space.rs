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
        assert!(answer == value(ROUNDS - 1, key), "key {key} is not what was written last");
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
        let answer = cluster.client.ask(&cluster.nodes[0].address, &request).await.ok()?;
        (200..300).contains(&answer.status).then_some(answer.body)
    });
    answered.await.unwrap_or_else(|| panic!("{} {} was never answered", request.method, request.path))
}

/// Waits until all nodes take less than that, and returns what they take.
async fn wait_below(cluster: &Cluster, bytes_max: u64) -> u64 {
    let below = eventually(LIMIT, async || Some(disk_bytes(cluster)).filter(|bytes| *bytes < bytes_max)).await;
    below.unwrap_or_else(|| panic!("the nodes still take {} MB, more than {}", disk_bytes(cluster) >> 20, bytes_max >> 20))
}

fn disk_bytes(cluster: &Cluster) -> u64 {
    let of_node = |data| files(data).iter().filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum::<u64>();
    cluster.nodes.iter().map(|node| of_node(&node.data)).sum()
}
