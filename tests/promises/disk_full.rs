//! A node whose disk is full takes no writes, and says so; it ends nothing, the others serve, and
//! with room again it goes on by itself.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::cluster::{Cluster, Setup};
use crate::common::http::Request;
use crate::common::load::Load;
use crate::common::mounts::Mount;
use crate::common::{eventually, say};

/// Room for a log and a map that have just begun. A quarter of it is kept free.
const SMALL_BYTES: u64 = 160 << 20;
/// Less than that, and more than half of it.
const LOW_BYTES: u64 = 30 << 20;

/// How long a stuck cluster is waited for.
const LIMIT: Duration = Duration::from_secs(60);
/// How long the disk is full to the last byte.
const FULL_FOR: Duration = Duration::from_secs(10);

/// A file that takes what a node would need.
struct Filler(PathBuf);

impl Filler {
    /// Leaves so many bytes.
    fn leaving(disk: &Path, bytes: u64) -> Self {
        let filler = Self(disk.join("filler"));
        let mut file = File::create(&filler.0).expect("a file");
        let piece = vec![b'f'; 1 << 20];
        while free_bytes(disk) > bytes {
            if file.write_all(&piece).is_err() {
                break;
            }
        }
        filler
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn free_bytes(disk: &Path) -> u64 {
    let room = rustix::fs::statvfs(disk).expect("a mounted disk");
    room.f_bavail * room.f_frsize
}

fn mount(place: &Path) -> Option<Mount> {
    match Mount::tmpfs(place, SMALL_BYTES) {
        Ok(small) => Some(small),
        Err(reason) => {
            say(&format!("disk_full: left out, can't mount: {reason}"));
            None
        }
    }
}

/// Waits until a node says of itself that it takes writes, or that it takes none.
async fn wait_takes_writes(cluster: &Cluster, id: usize, takes: bool) {
    let said = eventually(LIMIT, async || {
        let answer = cluster
            .client
            .ask_only(&cluster.nodes[id].address, &Request::get("/readyz"))
            .await
            .ok()?;
        let is_so = answer.status == 200 && answer.text().contains("takes no writes") != takes;
        is_so.then_some(())
    });
    assert!(
        said.await.is_some(),
        "node {id} never says that it {}",
        if takes { "takes writes" } else { "takes none" }
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_ends_no_node_and_the_others_serve() {
    // The home of the only shard, which leads it, and another.
    for victim in [0, 1] {
        let place = tempfile::TempDir::with_prefix_in("small-", env!("CARGO_TARGET_TMPDIR"))
            .expect("a directory");
        let Some(small) = mount(place.path()) else {
            return;
        };
        let setup = Setup {
            data: vec![(victim, small.path.join("data"))],
            ..Setup::nodes(3).arguments(&["--shards", "1"])
        };
        let mut cluster = Cluster::start(setup).await;
        let load = Load::new("disk").start(&cluster);
        load.writes(100).await;

        let low = Filler::leaving(&small.path, LOW_BYTES);
        wait_takes_writes(&cluster, victim, false).await;
        let led_elsewhere = eventually(LIMIT, async || {
            (cluster.leader(0).await != victim).then_some(())
        });
        assert!(
            led_elsewhere.await.is_some(),
            "node {victim} keeps the lead of a shard that it takes no writes to"
        );
        load.next_write(LIMIT).await;
        load.writes(100).await;
        assert_eq!(
            cluster.metric(victim, "quorate_disk_takes_writes").await,
            0.0
        );
        assert!(cluster.metric(victim, "quorate_disk_free_bytes").await < 2.0 * LOW_BYTES as f64);

        drop(low);
        let full = Filler::leaving(&small.path, 0);
        let began = Instant::now();
        while began.elapsed() < FULL_FOR {
            load.writes(20).await;
        }
        for node in &mut cluster.nodes {
            assert_eq!(node.exited(), None, "{} ended", node.address);
        }
        let log = cluster.nodes[victim].log_text();
        assert!(!log.contains("panicked"), "a full disk is no panic:\n{log}");

        drop(full);
        wait_takes_writes(&cluster, victim, true).await;
        load.writes(100).await;
        let history = load.stop().await;
        let lost = history.acknowledged_ledger().lost(&cluster, victim).await;
        assert!(
            lost.is_empty(),
            "not in the map of node {victim}: {lost:#?}"
        );
        history.judge(&cluster).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_disk_has_room_writes_are_refused_with_the_reason_and_go_on_by_themselves() {
    let place = tempfile::TempDir::with_prefix_in("small-", env!("CARGO_TARGET_TMPDIR"))
        .expect("a directory");
    let Some(small) = mount(place.path()) else {
        return;
    };
    let setup = Setup {
        data: vec![(0, small.path.join("data"))],
        no_view: true,
        ..Setup::nodes(1)
    };
    let cluster = Cluster::start(setup).await;
    let ask = async |request: Request| {
        let answer = cluster
            .client
            .ask_only(&cluster.nodes[0].address, &request.timeout(LIMIT))
            .await
            .expect("an answer");
        (answer.status, answer.text())
    };
    let put = || Request::put("/v1/kv/a?timeout=1s", b"1".to_vec());
    assert_eq!(ask(put()).await.0, 201);

    let low = Filler::leaving(&small.path, LOW_BYTES);
    wait_takes_writes(&cluster, 0, false).await;
    let (status, told) = ask(put()).await;
    assert!(
        status == 503 && told.contains("MiB left") && told.contains("40 MiB are kept free"),
        "{status} {told}"
    );
    let kvs = Request {
        body: r#"{"value":1}"#.into(),
        ..Request::put("/kvs/keys/a", Vec::new())
    };
    let (status, told) = ask(kvs).await;
    assert_eq!(
        (status, told.trim()),
        (
            503,
            r#"{"error":"Unable to satisfy request","message":"Error in PUT"}"#
        )
    );
    assert_eq!(
        ask(Request::get("/v1/kv/a")).await,
        (200, "1".to_owned()),
        "reads go on"
    );

    drop(low);
    let written = eventually(LIMIT, async || (ask(put()).await.0 == 200).then_some(()));
    assert!(written.await.is_some(), "writes never go on");
}
