//! A leader whose disk hangs, or is so slow that it might as well, loses its leads to nodes whose
//! disks answer, also while values are large. When the disk is well again nothing is lost.
//!
//! Each node has a file system of its own in an image file. A frozen one (`fsfreeze`) takes no
//! write and ends no sync, as a disk does that hangs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::common::cluster::{Cluster, Setup, Status};
use crate::common::http::{Client, Request};
use crate::common::load::{Load, Running};
use crate::common::mounts::{Frozen, Mount, format_image};
use crate::common::{eventually, say};

const IMAGE_BYTES: u64 = 4 << 30;
const NODES: usize = 3;

/// Writers of large values beside the load, and their sizes.
const LARGE_WRITERS: usize = 8;
const LARGE_BYTES: usize = 1 << 20;
const LARGE_TIMEOUT: Duration = Duration::from_secs(10);

/// For how long a disk hangs after another node leads.
const HANG_ON: Duration = Duration::from_secs(8);
/// Of a slow disk: how long nothing is done, and how long something is.
const SLOW_FOR: Duration = Duration::from_secs(1);
const FAST_FOR: Duration = Duration::from_millis(30);

/// Bounds the wait for a stuck cluster; it measures nothing.
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_disk_of_a_leader_hangs_under_large_values() {
    let Some(world) = World::start("hang").await else {
        return;
    };
    let leader = world.cluster.leader(0).await;
    let frozen = Frozen::freeze(&world.mounts[leader]).expect("a mounted disk can be frozen");
    let first = world.load.next_write(LIMIT).await;
    world.wait_for_another_leader(leader).await;
    sleep(HANG_ON).await;
    let later = world.load.next_write(LIMIT).await;
    world.load.writes(50).await;
    say(&format!(
        "disk_hang: the next write after {first:.1?}, one some seconds later took {later:.1?}"
    ));

    drop(frozen);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_disk_of_a_leader_is_slow_under_large_values() {
    let Some(world) = World::start("slow").await else {
        return;
    };
    let leader = world.cluster.leader(0).await;
    let is_slow = async {
        loop {
            let frozen =
                Frozen::freeze(&world.mounts[leader]).expect("a mounted disk can be frozen");
            sleep(SLOW_FOR).await;
            drop(frozen);
            sleep(FAST_FOR).await;
        }
    };
    let writes = async {
        world.wait_for_another_leader(leader).await;
        world.load.writes(50).await;
        world.load.next_write(LIMIT).await
    };
    tokio::select! {
        () = is_slow => unreachable!("a disk that is slow for ever"),
        next = writes => say(&format!("disk_hang: beside a slow disk a write took {next:.1?}")),
    }
    world.end().await;
}

/// A cluster of one shard, each node on a disk of its own, under small and large writes.
struct World {
    load: Running,
    large: JoinSet<()>,
    cluster: Cluster,
    mounts: Vec<Mount>,
    _place: tempfile::TempDir,
}

impl World {
    /// Starts it. Where images can't be mounted or frozen it says so, and is none.
    async fn start(name: &'static str) -> Option<Self> {
        let place = tempfile::TempDir::with_prefix_in("disks-", env!("CARGO_TARGET_TMPDIR"))
            .expect("a directory");
        let mounts = match mount_all(place.path()) {
            Ok(mounts) => mounts,
            Err(reason) => {
                say(&format!("disk_hang: left out: {reason}"));
                return None;
            }
        };
        let data = mounts.iter().enumerate();
        let setup = Setup {
            data: data
                .map(|(id, disk)| (id, disk.path.join("data")))
                .collect(),
            ..Setup::nodes(NODES).arguments(&["--shards", "1"])
        };
        let cluster = Cluster::start(setup).await;
        let load = Load::new(name).start(&cluster);
        let mut large = JoinSet::new();
        for writer in 0..LARGE_WRITERS {
            large.spawn(write_large(
                cluster.client.clone(),
                cluster.addresses(),
                writer,
            ));
        }
        load.writes(50).await;
        Some(Self {
            load,
            large,
            cluster,
            mounts,
            _place: place,
        })
    }

    async fn wait_for_another_leader(&self, than: usize) {
        let other: Vec<&str> = (self.cluster.nodes.iter().enumerate())
            .filter(|(id, _)| *id != than)
            .map(|(_, node)| node.address.as_str())
            .collect();
        // The node whose disk hangs may not know, so the others are asked.
        let changed = eventually(LIMIT, async || {
            let request = Request::get("/v1/cluster").timeout(Duration::from_secs(2));
            let answer = self
                .cluster
                .client
                .ask_only(other[0], &request)
                .await
                .ok()?;
            let status: Status = serde_json::from_slice(&answer.body).ok()?;
            let leader = status.shards.first()?.leader?;
            let node = status.nodes.iter().find(|node| node.id == leader)?;
            other.contains(&node.address.as_str()).then_some(())
        });
        changed.await.expect("another node leads");
    }

    /// Ends the writes, and judges what clients were told.
    async fn end(mut self) {
        self.large.abort_all();
        self.cluster.wait_ready().await;
        self.load.writes(50).await;
        self.load.stop().await.judge(&self.cluster).await;
    }
}

fn mount_all(place: &Path) -> Result<Vec<Mount>, String> {
    let mounts = (0..NODES).map(|id| {
        let image = place.join(format!("image-{id}"));
        format_image(&image, IMAGE_BYTES)?;
        let mount = Mount::image(&place.join(format!("disk-{id}")), &image)?;
        // Tried here, before a test relies on it.
        Frozen::freeze(&mount).map(drop)?;
        fs::create_dir_all(mount.path.join("data")).map_err(|error| error.to_string())?;
        Ok(mount)
    });
    mounts.collect()
}

/// Overwrites one key with large values, at any node. What becomes of them is of no matter.
async fn write_large(client: Client, addresses: Vec<String>, writer: usize) {
    for round in 0_usize.. {
        let address = &addresses[(writer + round) % addresses.len()];
        let body = vec![round as u8; LARGE_BYTES];
        let request = Request::put(format!("/v1/kv/large-{writer}"), body).timeout(LARGE_TIMEOUT);
        if !matches!(client.ask(address, &request).await, Ok(answer) if answer.status < 400) {
            sleep(Duration::from_millis(50)).await;
        }
    }
}
