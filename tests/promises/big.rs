//! One node with many keys starts again, counts them right, and stays within bounded memory.

use std::time::Instant;

use crate::common::cluster::{Cluster, Setup};
use crate::common::fill::Fill;
use crate::common::{from_environment, memory_peak_bytes, say};

/// What a node may use however many keys it holds: its caches, tables and buffers at their limits,
/// and room for the allocator.
const MEMORY_BYTES_MAX: u64 = 1 << 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_keys_on_one_node() {
    let keys = from_environment("QUORATE_TEST_KEYS").unwrap_or(100_000);
    let mut cluster = Cluster::start(Setup {
        no_view: true,
        ..Setup::nodes(1)
    })
    .await;
    let start = Instant::now();
    let fill = Fill::small("big", keys);
    fill.write(&cluster, 0).await;
    let (filled, peak_filling) = (start.elapsed(), memory_peak_bytes(cluster.nodes[0].pid()));
    assert_holds(&cluster, fill).await;

    let status = cluster.nodes[0].stop().await;
    assert!(status.success(), "the node did not stop cleanly: {status}");
    let start = Instant::now();
    cluster.nodes[0].start();
    cluster.wait_ready().await;
    let restarted = start.elapsed();
    assert_holds(&cluster, fill).await;
    let peak_restarted = memory_peak_bytes(cluster.nodes[0].pid());

    cluster.nodes[0].kill();
    let start = Instant::now();
    cluster.nodes[0].start();
    cluster.wait_ready().await;
    let recovered = start.elapsed();
    assert_holds(&cluster, fill).await;
    say(&format!(
        "big: {keys} keys of 256 bytes in {filled:.1?}, ready after a stop in {restarted:.1?}, \
         after kill -9 in {recovered:.1?}; peak memory {} MB filling, {} MB after the stop",
        peak_filling >> 20,
        peak_restarted >> 20
    ));
    assert!(
        peak_filling.max(peak_restarted) < MEMORY_BYTES_MAX,
        "more memory than {} MB",
        MEMORY_BYTES_MAX >> 20
    );
}

async fn assert_holds(cluster: &Cluster, fill: Fill) {
    let shards = cluster.status().await.shards;
    let counted: u64 = shards
        .iter()
        .map(|shard| shard.keys.expect("the node has every shard"))
        .sum();
    assert_eq!(counted, fill.keys, "keys counted");
    fill.assert_at(cluster, 0).await;
}
