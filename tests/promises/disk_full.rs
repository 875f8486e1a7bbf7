//! A node whose disk is full stops, and says so; the others serve; with room again it comes back.

use std::time::Duration;

use crate::common::cluster::{Cluster, Setup};
use crate::common::http::Request;
use crate::common::load::Load;
use crate::common::mounts::Mount;
use crate::common::say;

/// Room for a log and a map that have just begun.
const SMALL_BYTES: u64 = 160 << 20;

/// How long a stuck cluster is waited for.
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_what_it_touches_and_nothing_else() {
    // The home of the only shard, which leads it, and another.
    for victim in [0, 1] {
        let place = tempfile::TempDir::with_prefix_in("small-", env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let small = match Mount::tmpfs(place.path(), SMALL_BYTES) {
            Ok(small) => small,
            Err(reason) => return say(&format!("disk_full: left out, can't mount: {reason}")),
        };
        let setup = Setup { data: vec![(victim, small.path.join("data"))], ..Setup::nodes(3).arguments(&["--shards", "1"]) };
        let mut cluster = Cluster::start(setup).await;
        let load = Load::new("disk").start(&cluster);
        load.writes(100).await;
        let written = fill_up(&mut cluster, victim).await;
        let log = cluster.nodes[victim].log_text();
        let told = log.lines().find(|line| line.contains("No space left"));
        say(&format!("disk_full: node {victim} full after {} MB: {}", written >> 20, told.unwrap_or("nothing said")));
        assert!(told.is_some(), "the log does not say that the disk is full");
        assert!(!log.contains("panicked"), "a full disk is no panic:\n{log}");
        load.next_write(LIMIT).await;
        load.writes(100).await;

        small.resize_tmpfs(4 * SMALL_BYTES);
        cluster.nodes[victim].restart().await;
        cluster.wait_ready().await;
        load.writes(100).await;
        let history = load.stop().await;
        let lost = history.acknowledged_ledger().lost(&cluster, victim).await;
        assert!(lost.is_empty(), "not in the map of node {victim}: {lost:#?}");
        history.judge(&cluster).await;
    }
}

/// Writes until the node with little room has ended, or says that it is not ready. Returns how many bytes that took.
async fn fill_up(cluster: &mut Cluster, victim: usize) -> u64 {
    let mut written = 0;
    while written < 4 * SMALL_BYTES {
        let body = vec![b'f'; 1 << 20];
        let request = Request::put(format!("/v1/kv/filler-{}?proxy=true", written >> 20), body).timeout(Duration::from_secs(10));
        // Any answer is fine: the node that fills up may be the leader.
        let _ = cluster.client.ask(&cluster.nodes[(victim + 1) % 3].address, &request).await;
        written += 1 << 20;
        let ready = Request::get("/readyz").timeout(Duration::from_secs(5));
        let ready = cluster.client.ask_only(&cluster.nodes[victim].address, &ready).await;
        let has_stopped = ready.is_ok_and(|answer| answer.status == 503 && answer.text().contains("No space left"));
        if has_stopped || cluster.nodes[victim].exited().is_some() {
            return written;
        }
    }
    panic!("{written} bytes written, and the node with {SMALL_BYTES} bytes of disk says that it is ready");
}
