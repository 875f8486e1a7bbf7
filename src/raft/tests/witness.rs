//! Groups of two replicas and a witness: what they survive, and what a witness never does.

use std::path::Path;

use bytes::Bytes;

use super::cluster::*;
use super::failover::patient;
use crate::raft::transport::Lane;
use crate::raft::transport::wire::{
    AppendReply, EntryHead, FrameHeader, PayloadKind, PeerRefusal, PeerReply, PeerRequest,
    SnapshotName,
};
use crate::raft::{
    MembershipError, OpenError, ProposeError, RaftTimings, ReadError, Role, TransferError,
};
use crate::sm::kv;
use crate::storage::disk::Disk;
use crate::storage::log::Vote;
use crate::storage::map::Applied;
use crate::storage::mem_trees::Crash;
use crate::storage::tree::Trees;
use crate::types::{GroupId, LogId, NodeId, ReplicaId};

/// The three nodes: two with a map, and the witness.
const FIRST: NodeId = NodeId(1);
const SECOND: NodeId = NodeId(2);
const THIRD: NodeId = NodeId(3);

async fn founded() -> TestCluster {
    let cluster = TestCluster::new(3);
    cluster.found_with_witness(1).await;
    cluster
}

/// What is on the disk of the witness's node besides its log: a file that says how far it is, and
/// nothing of a map.
fn assert_no_map(cluster: &TestCluster) {
    let disks = &cluster.disks[&THIRD];
    assert_eq!(
        disks.trees.names().expect("readable"),
        Vec::<String>::new(),
        "trees"
    );
    assert_eq!(
        disks
            .disk
            .list(Path::new("/snapshots"))
            .expect("a directory"),
        Vec::<String>::new(),
        "snapshots"
    );
    let marks = disks
        .disk
        .list(Path::new("/witnesses"))
        .expect("a directory");
    assert!(marks.contains(&format!("{}.mark", key(1, 3))), "{marks:?}");
}

fn other(node: NodeId) -> NodeId {
    if node == FIRST { SECOND } else { FIRST }
}

async fn assert_all_there(cluster: &TestCluster, keys: &[&str]) {
    for key in keys {
        assert_eq!(cluster.get(1, key).await.as_deref(), Some("v"), "{key}");
    }
}

#[tokio::test]
async fn either_replica_may_be_lost_and_the_other_later() {
    let mut cluster = founded().await;
    cluster.put(1, "before", "v").await;
    for (lost, written) in [
        (FIRST, "without 1"),
        (SECOND, "without 2"),
        (FIRST, "without 1 again"),
    ] {
        cluster.stop(lost).await;
        cluster.put(1, written, "v").await;
        cluster.restart(lost).await;
        let replica = cluster.group(lost.0, 1);
        until("the one that was away catches up", || {
            read(&replica, written).is_some()
        })
        .await;
    }
    cluster.stop(THIRD).await;
    cluster.put(1, "without the witness", "v").await;
    cluster.restart(THIRD).await;
    assert_all_there(
        &cluster,
        &[
            "before",
            "without 1",
            "without 2",
            "without 1 again",
            "without the witness",
        ],
    )
    .await;
    assert_no_map(&cluster);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_witness_with_the_longest_log_leads_until_the_other_has_it() {
    // It does not wait for its patience to end: the others need it, and it has noticed.
    let timings = RaftTimings {
        witness_patience_ms: 3_600_000,
        ..RaftTimings::default()
    };
    let mut cluster = TestCluster::with_timings(3, timings);
    cluster.found_with_witness(1).await;
    for round in 0..3 {
        let (ahead, behind) = (cluster.leader(1).await, other(cluster.leader(1).await));
        cluster.stop(behind).await;
        let key = format!("round {round}");
        for n in 0..300 {
            cluster.put(1, &key, &n.to_string()).await;
        }
        cluster.put(1, &key, "v").await;
        // Only the witness still has what was acknowledged.
        cluster.stop(ahead).await;
        let term = cluster.witness(1).status().term;
        cluster.restart(behind).await;
        assert_eq!(cluster.leader(1).await, behind);
        assert_eq!(cluster.get(1, &key).await.as_deref(), Some("v"));
        // In one term the witness led, in a later one the replica.
        assert!(
            cluster.group(behind.0, 1).status().term >= term + 2,
            "the witness had to win first"
        );
        cluster.put(1, "after", "v").await;
        cluster.restart(ahead).await;
        let replica = cluster.group(ahead.0, 1);
        until("the other catches up", || read(&replica, "after").is_some()).await;
    }
    assert_no_map(&cluster);
    cluster.stop_all().await;
}

#[tokio::test]
async fn acknowledged_writes_survive_a_power_cut_of_all_three() {
    let mut cluster = founded().await;
    for round in 0..3 {
        cluster.put(1, &format!("{round}"), "v").await;
        for id in [FIRST, SECOND, THIRD] {
            cluster.stop(id).await;
            cluster.disks[&id].disk.disk.crash();
            cluster.disks[&id].trees.crash(Crash::Power, round);
        }
        for id in [FIRST, SECOND, THIRD] {
            cluster.restart(id).await;
        }
    }
    assert_all_there(&cluster, &["0", "1", "2"]).await;
    assert_no_map(&cluster);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_witness_is_given_no_requests_and_takes_none() {
    let cluster = founded().await;
    let registry = &cluster.nodes[&THIRD].registry;
    assert!(
        registry.get(GroupId(1)).is_none() && registry.groups().is_empty(),
        "the registry gives none out"
    );
    let witness = &cluster.witness(1).0;
    until("it knows its leader", || witness.status().leader.is_some()).await;
    let nobody = ProposeError::NotLeader { leader: None };
    assert_eq!(
        witness
            .propose(put("k", "v"), soon())
            .await
            .expect_err("refused"),
        nobody
    );
    let claim = kv::KvCommand::Claim { slots: Vec::new() };
    assert_eq!(
        witness
            .propose_command(claim, soon())
            .await
            .expect_err("refused"),
        nobody
    );
    assert_eq!(
        witness.read_barrier(soon()).await,
        Err(ReadError::NotLeader { leader: None })
    );
    let refused = Err(MembershipError::NotLeader { leader: None });
    assert_eq!(witness.add_learner(ReplicaId(9), NodeId(9)).await, refused);
    assert_eq!(witness.add_witness(ReplicaId(9), NodeId(9)).await, refused);
    assert_eq!(witness.change_voters([ReplicaId(1)].into()).await, refused);
    assert_eq!(
        witness.remove_learners([ReplicaId(1)].into()).await,
        refused
    );
    let leader = cluster.leader(1).await;
    let to_witness = cluster
        .group(leader.0, 1)
        .transfer_leader(ReplicaId(3))
        .await;
    assert_eq!(to_witness, Err(TransferError::NoVoter(ReplicaId(3))));
    assert_ne!(
        cluster.group(leader.0, 1).best_successor(),
        Some(ReplicaId(3))
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_witness_that_came_to_lead_hands_over() {
    let cluster = founded().await;
    for _ in 0..5 {
        let witness = cluster.witness(1);
        let (term, leader) = (witness.status().term, cluster.leader(1).await);
        // Nobody does that but openraft, when a leader is taken out of the group.
        cluster
            .group(leader.0, 1)
            .raft
            .trigger()
            .transfer_leader(ReplicaId(3))
            .await
            .expect("it runs");
        until("it has led, and another leads", || {
            witness.status().term >= term + 2
        })
        .await;
        let leader = cluster.leader(1).await;
        assert_ne!(leader, THIRD);
        until("it follows", || {
            witness.status().role == Role::Follower && witness.status().leader == Some(leader)
        })
        .await;
        cluster.put(1, "k", "v").await;
    }
    cluster.stop_all().await;
}

/// A request to replica `to` of group 1, and its reply.
async fn ask(cluster: &TestCluster, sender: u64, to: u64, request: PeerRequest) -> PeerReply {
    let header = FrameHeader {
        group: GroupId(1),
        sender: ReplicaId(sender),
        target: ReplicaId(to),
    };
    match cluster.nodes[&NodeId(to)]
        .registry
        .handle(Lane::Snapshot, header, request, Bytes::new())
    {
        Ok(reply) => reply.await,
        Err(refusal) => PeerReply::Refused(refusal),
    }
}

#[tokio::test]
async fn no_snapshot_comes_from_a_witness_and_no_data_goes_to_one() {
    let cluster = founded().await;
    cluster.put(1, "k", "v").await;
    let vote = Vote {
        term: 1,
        voted_for: Some(ReplicaId(2)),
        committed: true,
    };
    let snapshot = SnapshotName {
        written_by: ReplicaId(3),
        applied: Some(LogId { term: 1, index: 9 }),
        bytes_len: 10,
    };
    let open = || PeerRequest::SnapshotOpen { vote, snapshot };
    until("they know the witness", || {
        (1..=2).all(|id| {
            cluster
                .group(id, 1)
                .status()
                .membership
                .is_witness(ReplicaId(3))
        })
    })
    .await;
    for (from, to) in [(3, 1), (3, 2)] {
        let reply = ask(&cluster, from, to, open()).await;
        assert_eq!(
            reply,
            PeerReply::Refused(PeerRefusal::Failed("a witness has no snapshot".into()))
        );
    }
    assert_eq!(
        ask(&cluster, 2, 1, open()).await,
        PeerReply::SnapshotHas { bytes_len: 0 }
    );
    assert_eq!(
        ask(&cluster, 2, 3, open()).await,
        PeerReply::WatermarkWanted
    );
    for request in [
        PeerRequest::SnapshotChunk {
            snapshot,
            offset: 0,
        },
        PeerRequest::SnapshotInstall { vote, snapshot },
    ] {
        let reply = ask(&cluster, 2, 3, request).await;
        assert!(
            matches!(reply, PeerReply::Refused(PeerRefusal::Failed(_))),
            "{reply:?}"
        );
    }
    let watermark = PeerRequest::Watermark {
        vote,
        applied: Default::default(),
    };
    for request in [watermark, PeerRequest::PurgeIndex { index: 1 }] {
        let reply = ask(&cluster, 2, 1, request).await;
        assert!(
            matches!(reply, PeerReply::Refused(PeerRefusal::Failed(_))),
            "{reply:?}"
        );
    }
    assert_no_map(&cluster);
    cluster.stop_all().await;
}

/// Has a replica write a snapshot, and purges its log behind it.
async fn snapshot_and_purge(cluster: &TestCluster, node: NodeId) -> LogId {
    let group = cluster.group(node.0, 1);
    group.build_snapshot().await.expect("a snapshot");
    until("openraft knows of the snapshot", || {
        group.status().snapshot.is_some()
    })
    .await;
    let snapshot = group.status().snapshot.expect("it is there");
    group.purge_log(snapshot.index).await;
    until("the log is purged", || {
        group.status().purged == Some(snapshot)
    })
    .await;
    snapshot
}

#[tokio::test]
async fn a_witness_purges_only_what_both_replicas_hold() {
    let mut cluster = founded().await;
    cluster.put(1, "old", "v").await;
    let (ahead, behind) = (cluster.leader(1).await, other(cluster.leader(1).await));
    cluster.stop(behind).await;
    for n in 0..50 {
        cluster.put(1, &format!("{n}"), "v").await;
    }
    // Also where the leader needs it no more.
    snapshot_and_purge(&cluster, ahead).await;
    let leader = cluster.group(ahead.0, 1);
    for _ in 0..5 {
        leader.advertise_purge_index().await;
        cluster
            .witness(1)
            .release_log(true)
            .await
            .expect("it lets go of what it may");
    }
    let reached = leader.status().matched[&ReplicaId(behind.0)].map_or(0, |id| id.index);
    let purged = cluster.witness(1).status().purged.map_or(0, |id| id.index);
    assert!(
        purged <= reached,
        "purged {purged}, and the one that is away reached {reached}"
    );
    // So it can bring it up to date, without a snapshot.
    drop(leader);
    cluster.stop(ahead).await;
    cluster.restart(behind).await;
    assert_eq!(cluster.get(1, "49").await.as_deref(), Some("v"));
    cluster.restart(ahead).await;

    let deadline = soon();
    while cluster
        .witness(1)
        .status()
        .purged
        .is_none_or(|id| id.index <= reached)
    {
        assert!(
            tokio::time::Instant::now() < deadline,
            "what both hold is not purged"
        );
        let leader = cluster.group(cluster.leader(1).await.0, 1);
        leader.advertise_purge_index().await;
        cluster
            .witness(1)
            .release_log(true)
            .await
            .expect("it lets go of what both have");
    }
    let purged = cluster.witness(1).status().purged;
    cluster.stop(THIRD).await;
    cluster.restart(THIRD).await;
    let witness = cluster.witness(1);
    until("it goes on where it was", || {
        witness.status().purged == purged
    })
    .await;
    drop(witness);
    assert!(
        cluster
            .witness(1)
            .0
            .watch
            .borrow()
            .membership
            .voters
            .contains_key(&ReplicaId(3)),
        "its file tells the members"
    );
    cluster.stop(FIRST).await;
    cluster.put(1, "without 1", "v").await;
    cluster.restart(FIRST).await;
    assert_all_there(&cluster, &["old", "0", "49", "without 1"]).await;
    assert_no_map(&cluster);
    cluster.stop_all().await;
}

/// Where its log begins decides whether it may vote: until it does, that stays.
#[tokio::test]
async fn a_witness_without_a_vote_purges_nothing() {
    let cluster = founded().await;
    let leader = cluster.group(cluster.leader(1).await.0, 1);
    leader
        .change_voters([ReplicaId(1), ReplicaId(2)].into())
        .await
        .expect("without the witness");
    cluster.put(1, "k", "v").await;
    let last = leader.status().last_log;
    until("all have it", || {
        leader
            .status()
            .matched
            .values()
            .all(|matched| *matched >= last)
    })
    .await;
    let witness = cluster.witness(1);
    until("it has no vote", || witness.status().role == Role::Learner).await;
    for _ in 0..5 {
        leader.advertise_purge_index().await;
        witness.release_log(true).await.expect("nothing to let go");
    }
    assert_eq!(
        (witness.status().snapshot, witness.status().purged),
        (None, None)
    );
    drop((leader, witness));
    cluster.stop_all().await;
}

/// The leader may take it for one that lacks much, and it may hold what others lack.
#[tokio::test]
async fn a_witness_that_has_what_it_is_told_to_begin_after_keeps_it() {
    // Patient, so that the witness does not campaign either while it is all alone.
    let mut cluster = TestCluster::with_timings(3, patient());
    cluster.found_with_witness(1).await;
    cluster.put(1, "k", "v").await;
    let membership = cluster.group(1, 1).state().applied().membership;
    for node in [FIRST, SECOND] {
        cluster.stop(node).await;
    }
    let witness = cluster.witness(1);

    // Of a leader after those that are stopped: when the first of them ended, the other may have
    // asked for votes, and a vote that was given is not one of a leader.
    let given = witness.0.log.state().vote.expect("it followed");
    let vote = Vote {
        term: given.term + 1,
        committed: true,
        ..given
    };
    let previous = witness.0.log.state().last.expect("its log has entries");
    // An entry of which it does not know that it is committed.
    let id = LogId {
        index: previous.index + 1,
        ..previous
    };
    let entries = vec![EntryHead {
        id,
        kind: PayloadKind::Blank,
        bytes_len: 0,
    }];
    let leader = vote.voted_for.expect("it followed somebody").0;
    let append = PeerRequest::Append {
        vote,
        previous: Some(previous),
        commit: None,
        entries,
    };
    assert_eq!(
        ask(&cluster, leader, 3, append).await,
        PeerReply::Append(AppendReply::Success)
    );
    let applied = Applied {
        log_id: Some(id),
        membership,
    };
    let watermark = PeerRequest::Watermark {
        vote,
        applied: applied.clone(),
    };
    assert_eq!(
        ask(&cluster, leader, 3, watermark).await,
        PeerReply::SnapshotInstalled { vote }
    );
    // One that led before is told with whom it goes now: else it might take this for a word of a
    // follower.
    let watermark = PeerRequest::Watermark {
        vote: Vote {
            term: vote.term - 1,
            ..vote
        },
        applied,
    };
    assert_eq!(
        ask(&cluster, leader, 3, watermark).await,
        PeerReply::SnapshotInstalled { vote }
    );
    assert_eq!(
        (witness.0.log.state().purged, witness.0.log.state().last),
        (None, Some(id))
    );
    drop(witness);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_witness_comes_to_a_group_whose_log_has_lost_its_beginning() {
    let mut cluster = founded().await;
    for n in 0..20 {
        cluster.put(1, &format!("{n}"), "v").await;
    }
    cluster.stop(THIRD).await;
    cluster.put(1, "without the witness", "v").await;
    let leader = cluster.leader(1).await;
    for id in [FIRST, SECOND] {
        snapshot_and_purge(&cluster, id).await;
    }
    let snapshot = cluster
        .group(leader.0, 1)
        .status()
        .snapshot
        .expect("it was written");
    // The one that was away is told how far its leader's log has been purged.
    cluster.restart(THIRD).await;
    let witness = cluster.witness(1);
    until("it goes on after the mark", || {
        witness.status().purged >= Some(snapshot)
    })
    .await;
    drop(witness);
    assert_no_map(&cluster);
    cluster.stop(FIRST).await;
    cluster.put(1, "without 1", "v").await;
    cluster.restart(FIRST).await;
    cluster.stop(SECOND).await;
    cluster.put(1, "without 2", "v").await;
    cluster.restart(SECOND).await;
    assert_all_there(
        &cluster,
        &["0", "19", "without the witness", "without 1", "without 2"],
    )
    .await;
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_replica_is_opened_as_what_it_was_created_as() {
    let mut cluster = founded().await;
    cluster.stop(THIRD).await;
    cluster.start(THIRD);
    let registry = cluster.nodes[&THIRD].registry.clone();
    let as_replica = registry.open_replica(key(1, 3), true).await.err();
    assert!(
        matches!(as_replica, Some(OpenError::OtherKind(_))),
        "{as_replica:?}"
    );
    registry
        .open_witness(key(1, 3), false)
        .await
        .expect("a witness");
    registry.wipe_replica(key(1, 3)).await.expect("wiped");
    assert!(registry.witness(GroupId(1)).is_none() && registry.stored().is_empty());
    let marks = cluster.disks[&THIRD]
        .disk
        .list(Path::new("/witnesses"))
        .expect("a directory");
    assert_eq!(marks, Vec::<String>::new());
    drop(registry);
    cluster.stop_all().await;
}
