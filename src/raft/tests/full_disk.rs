//! What a group does where a disk is nearly full: its leader takes no writes, a follower no
//! entries, and both go on by themselves.

use std::path::Path;
use std::time::Duration;

use super::cluster::{TestCluster, assert_put, put, read, soon, until};
use crate::raft::{ProposeError, RaftTimings};
use crate::sm::disk_level::DiskLevel;
use crate::sm::kv::{Action, Condition, Operation, Write};
use crate::storage::disk::{Disk, Open};
use crate::types::{NodeId, ReplicaId};

/// What else is on the disk, so that a part of it is enough for what the log has on its way.
const FILLER_BYTES: usize = 8 << 20;

/// Leaves `part` of what is in use on the disk of a node, or takes its limit away, and has the node
/// look.
fn leave(cluster: &TestCluster, node: NodeId, part: Option<u64>) {
    let disk = &cluster.disks[&node].disk.disk;
    disk.set_capacity(None);
    let filler = disk
        .open(Path::new("/filler"), Open::Truncated)
        .expect("a file");
    filler.write_at(&vec![0; FILLER_BYTES], 0).expect("written");
    let used: u64 = disk.files().iter().map(|(_, len)| *len).sum();
    disk.set_capacity(part.map(|part| used + used / part));
    cluster.nodes[&node]
        .log
        .look_for_room()
        .expect("a simulated disk");
}

/// A sixth of what is used is a seventh of the disk: less than a quarter, and more than an eighth.
const LOW: Option<u64> = Some(6);
const SPENT: Option<u64> = Some(100);

#[tokio::test]
async fn a_leader_whose_disk_is_nearly_full_takes_no_writes_and_reads_go_on() {
    let cluster = TestCluster::new(1);
    cluster.found(1).await;
    cluster.put(1, "k", "1").await;
    let leader = cluster.leader(1).await;
    let group = cluster.group(leader.0, 1);

    leave(&cluster, leader, LOW);
    let refused = group.propose(put("k", "2"), soon()).await;
    assert!(
        matches!(refused, Err(ProposeError::NoRoom { .. })),
        "{refused:?}"
    );
    group
        .read_barrier(soon())
        .await
        .expect("reads need no room");
    assert_eq!(read(&group, "k").as_deref(), Some("1"));

    leave(&cluster, leader, None);
    assert_put(
        &group
            .propose(put("k", "3"), soon())
            .await
            .expect("there is room again"),
    );
    assert_eq!(read(&group, "k").as_deref(), Some("3"));
    drop(group);
    cluster.stop_all().await;
}

#[tokio::test]
async fn log_is_kept_for_whom_a_snapshot_was_sent_only_where_there_is_room() {
    let cluster = TestCluster::new(1);
    cluster.found(1).await;
    cluster.put(1, "k", "1").await;
    let leader = cluster.leader(1).await;
    let group = cluster.group(leader.0, 1);
    let mut purged = group.status().purged;
    let guard = group.network.transfers.begin(ReplicaId(9), 1, 10);

    for is_low in [false, true] {
        cluster.put(1, "k", "2").await;
        group.build_snapshot().await.expect("written");
        let applied = group.status().applied.expect("it has applied something");
        until("the snapshot is known", || {
            group.status().snapshot >= Some(applied)
        })
        .await;
        leave(&cluster, leader, if is_low { LOW } else { None });
        group.purge_log(applied.index).await;
        if is_low {
            until("nothing is kept", || group.status().purged == Some(applied)).await;
        } else {
            purged = purged.max(group.status().purged);
            assert!(purged.is_none_or(|id| id.index <= 1), "{purged:?}");
        }
    }

    // At the bound of the log it is the same.
    leave(&cluster, leader, None);
    cluster.put(1, "k", "3").await;
    group.build_snapshot().await.expect("written");
    let applied = group.status().applied.expect("it has applied something");
    until("the snapshot is known", || {
        group.status().snapshot >= Some(applied)
    })
    .await;
    group.purge_log_of_all(applied.index).await;
    until("nothing is kept", || group.status().purged == Some(applied)).await;
    drop((guard, group));
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_follower_whose_disk_is_full_takes_no_entries_until_there_is_room() {
    // Nobody is to campaign because the machine is busy.
    let timings = RaftTimings::default().slower(5);
    let heartbeat = Duration::from_millis(timings.heartbeat_ms);
    let cluster = TestCluster::with_timings(3, timings);
    cluster.found(1).await;
    cluster.put(1, "k", "1").await;
    let leader = cluster.leader(1).await;
    let full = NodeId(1 + leader.0 % 3);
    let (group, follower) = (cluster.group(leader.0, 1), cluster.group(full.0, 1));
    until("the follower has everything", || {
        follower.status().last_log == group.status().last_log
    })
    .await;

    leave(&cluster, full, LOW);
    cluster.put(1, "k", "2").await;
    until("a follower goes on for a while", || {
        follower.status().last_log == group.status().last_log
    })
    .await;

    leave(&cluster, full, SPENT);
    let before = follower.status().last_log;
    cluster.put(1, "k", "3").await;
    // The other two acknowledge it at once: this one is sent it again and again meanwhile.
    tokio::time::sleep(heartbeat * 5).await;
    assert!(group.status().last_log > before, "it was not written");
    assert_eq!(follower.status().last_log, before, "it took an entry");

    leave(&cluster, full, None);
    until("the follower catches up", || {
        read(&follower, "k").as_deref() == Some("3")
    })
    .await;
    drop((group, follower));
    cluster.stop_all().await;
}

fn delete(key: &'static str) -> Write {
    Write {
        operations: vec![Operation {
            key: key.into(),
            condition: Condition::None,
            action: Action::Delete,
        }],
        idempotency_key: None,
    }
}

#[tokio::test]
async fn what_is_deleted_is_deleted_below_the_reserve_until_half_of_it_is_gone() {
    let cluster = TestCluster::new(1);
    cluster.found(1).await;
    cluster.put(1, "k", "1").await;
    cluster.put(1, "l", "1").await;
    let leader = cluster.leader(1).await;
    let group = cluster.group(leader.0, 1);

    leave(&cluster, leader, LOW);
    group
        .propose(delete("k"), soon())
        .await
        .expect("it frees space");
    assert_eq!(read(&group, "k"), None);
    let mut mixed = delete("l");
    mixed.operations.extend(put("m", "1").operations);
    let refused = group.propose(mixed, soon()).await;
    assert!(
        matches!(refused, Err(ProposeError::NoRoom { .. })),
        "{refused:?}"
    );

    leave(&cluster, leader, SPENT);
    let refused = group.propose(delete("l"), soon()).await;
    assert!(
        matches!(refused, Err(ProposeError::NoRoom { .. })),
        "{refused:?}"
    );
    assert_eq!(read(&group, "l").as_deref(), Some("1"));
    drop(group);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_leader_takes_no_writes_that_most_of_its_voters_have_no_room_for() {
    let cluster = TestCluster::new(1);
    cluster.found(1).await;
    cluster.put(1, "k", "1").await;
    let leader = cluster.leader(1).await;
    let group = cluster.group(leader.0, 1);
    let is_refused = async |write: Write| match group.propose(write, soon()).await {
        Ok(_) => false,
        Err(ProposeError::NoRoom { .. }) => true,
        Err(error) => panic!("{error}"),
    };
    for (level, refused) in [
        (DiskLevel::Ample, [false, false]),
        (DiskLevel::Low, [true, false]),
        (DiskLevel::Spent, [true, true]),
        (DiskLevel::Ample, [false, false]),
    ] {
        group.set_voters_disk_level(level);
        let seen = [
            is_refused(put("k", "2")).await,
            is_refused(delete("x")).await,
        ];
        assert_eq!(seen, refused, "{level:?}");
    }
    drop(group);
    cluster.stop_all().await;
}
