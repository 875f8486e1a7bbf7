//! A node that was ended between the stamp that says that it is retired and the wipe of what it
//! had.

use std::path::Path;
use std::sync::Arc;

use futures::future::ready;

use super::case::until;
use super::host::{Host, addresses};
use super::machine::End;
use quorate::sm::cluster::view::PlacementSpec;
use quorate::storage::ReplicaKey;
use quorate::storage::directory::{DataDirectory, Stamp};
use quorate::storage::disk::Disk;
use quorate::storage::log::{Log, LogOptions, LogWriter};
use quorate::storage::map::{Applied, MapOptions, MapStore};
use quorate::types::{ClusterId, GroupId, NodeId, ReplicaId};

const META: ReplicaKey = ReplicaKey {
    group: GroupId(0),
    replica: ReplicaId(1),
};

fn open_log(disk: &Arc<dyn Disk>, host: &Host) -> (Log, LogWriter) {
    let options = LogOptions {
        binding: host.directory().0,
        ..LogOptions::default()
    };
    Log::open(disk.clone(), Path::new("/node/log"), options).expect("a log")
}

/// It is never asked to join a cluster, which would have it look as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retirement_that_was_cut_short_is_finished_by_the_next_start() {
    let all = addresses(2);
    let host = Host::new(
        all[0].clone(),
        all[1..].to_vec(),
        PlacementSpec::default(),
        1,
    );
    let disk: Arc<dyn Disk> = Arc::new(host.disks().disk.clone());
    {
        let directory =
            DataDirectory::open_unlocked(disk.clone(), Path::new("/node"), host.directory())
                .expect("a directory");
        let stamp = Stamp::Retired {
            cluster: ClusterId(7),
            node: NodeId(3),
            members: all[1..].to_vec(),
        };
        directory.set_stamp(stamp).expect("stamped");
        let (log, mut writer) = open_log(&disk, &host);
        log.create(META, Box::new(|created| created.expect("created")));
        while writer.pump() {}
        let trees = Arc::new(host.disks().trees.clone());
        let (states, _) = MapStore::open(
            trees,
            disk.clone(),
            Path::new("/node"),
            MapOptions::default(),
        )
        .expect("maps");
        states
            .witnesses()
            .write(META, &Applied::default())
            .expect("a file beside the log");
    }

    host.watch(Arc::new(|_| Box::pin(ready(()))));
    host.start();
    let is_spare = || {
        host.node()
            .and_then(|node| node.ready().err())
            .is_some_and(|unready| unready.code == "spare")
    };
    let is_cleared = || {
        host.disks()
            .disk
            .contents(Path::new("/node/owner"))
            .is_some()
    };
    until("it waits as a spare, with nothing left", async || {
        is_spare() && is_cleared()
    })
    .await
    .expect("cleared");
    assert!(host.end(End::Kill));
    host.bury();
    assert_eq!(
        disk.list(Path::new("/node/witnesses")).expect("listed"),
        Vec::<String>::new()
    );
    let (log, _writer) = open_log(&disk, &host);
    assert!(log.replicas().is_empty(), "{:?}", log.replicas());
    assert_eq!(*host.failed.lock(), None);
}
