//! Failover: a leader whose process has ended is replaced at once, one that lives is not deposed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::cluster::*;
use crate::raft::transport::Lane;
use crate::raft::transport::wire::{FrameHeader, PeerRefusal, PeerReply, PeerRequest};
use crate::raft::{LeaseReads, ProposeError, RaftTimings, Registry};
use crate::storage::log::Vote;
use crate::types::{GroupId, LogId, NodeId, ReplicaId};

/// An hour: whoever waits for silence waits for longer than any test. The heirs of a leader have
/// one attempt each in that time, so they are given seconds between them (see `Timer::leader_cut`):
/// on a busy machine two at once would split the votes for good.
fn long_election() -> RaftTimings {
    RaftTimings {
        heartbeat_ms: 2000,
        election_ms_min: 3_600_000,
        election_ms_max: 7_200_000,
        ..RaftTimings::default()
    }
}

/// Timings at which a machine that does not come round to heartbeats for seconds deposes no leader.
pub fn patient() -> RaftTimings {
    RaftTimings::default().slower(20)
}

/// The nodes besides this one.
fn others(cluster: &TestCluster, than: NodeId) -> Vec<&Arc<Registry>> {
    cluster
        .nodes
        .iter()
        .filter(|(id, _)| **id != than)
        .map(|(_, node)| &node.registry)
        .collect()
}

#[tokio::test]
async fn a_leader_that_has_ended_is_replaced_without_waiting_for_its_silence() {
    let mut cluster = TestCluster::with_timings(3, long_election());
    cluster.found(1).await;
    for value in ["v", "w"] {
        cluster.put(1, "k", value).await;
        let leader = cluster.leader(1).await;
        cluster.stop(leader).await;
        assert_eq!(cluster.get(1, "k").await.as_deref(), Some(value));
        cluster.restart(leader).await;
        let replica = cluster.group(leader.0, 1);
        until("it follows again", || replica.status().leader.is_some()).await;
    }
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_leader_that_lives_though_its_lanes_broke_costs_nothing_acknowledged() {
    let cluster = TestCluster::new(3);
    cluster.found(1).await;
    let mut acknowledged = Vec::new();
    for n in 0..10 {
        let leader = cluster.leader(1).await;
        let key = format!("k{n}");
        match cluster
            .group(leader.0, 1)
            .propose(put(&key, "v"), soon())
            .await
        {
            Ok(outcome) => {
                assert_put(&outcome);
                acknowledged.push(key);
            }
            // It was deposed just then.
            Err(ProposeError::NotLeader { .. } | ProposeError::Unknown { .. }) => {}
            Err(error) => panic!("the put of {key} failed: {error}"),
        }
        cluster.hub.isolate(leader);
        let others = others(&cluster, leader);
        until("the others miss it", || {
            others
                .iter()
                .all(|registry| registry.is_disconnected(leader))
        })
        .await;
        cluster.hub.heal();
    }
    assert!(!acknowledged.is_empty());
    for key in acknowledged {
        assert_eq!(cluster.get(1, &key).await.as_deref(), Some("v"), "{key}");
    }
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_leader_is_not_deposed_for_one_lane_of_several_nor_for_a_short_break() {
    let cluster = TestCluster::with_timings(
        3,
        RaftTimings {
            heartbeat_ms: 60_000,
            ..long_election()
        },
    );
    cluster.found(1).await;
    cluster.put(1, "k", "v").await;
    let leader = cluster.leader(1).await;
    let term = cluster.group(leader.0, 1).status().term;
    let others = others(&cluster, leader);
    for registry in &others {
        let liveness = registry.liveness();
        liveness.on_lane_up(leader);
        assert!(
            !liveness.on_lane_down(leader),
            "the lanes of the group are up"
        );
        assert!(!registry.is_disconnected(leader));
    }
    cluster.hub.isolate(leader);
    until("the others miss it", || {
        others
            .iter()
            .all(|registry| registry.is_disconnected(leader))
    })
    .await;
    for registry in &others {
        let group = registry.get(GroupId(1)).expect("an open replica");
        assert!(
            group.end_lease_if_disconnected(),
            "the leader of {} holds no lease while it is missed",
            group.key()
        );
    }
    cluster.hub.heal();
    // It is heard of before the first transfer_target's time, which is a quarter of a heartbeat.
    let deadline = soon();
    while others
        .iter()
        .any(|registry| registry.is_disconnected(leader))
    {
        assert!(Instant::now() < deadline, "it is never heard of");
        cluster
            .group(leader.0, 1)
            .raft
            .trigger()
            .heartbeat()
            .await
            .expect("a running replica");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.put(1, "k", "w").await;
    for registry in others {
        let group = registry.get(GroupId(1)).expect("an open replica");
        until("it follows again", || !group.end_lease_if_disconnected()).await;
        let me = group.key().replica;
        let vote = Vote {
            term: term + 1,
            voted_for: Some(ReplicaId(6 - leader.0 - me.0)),
            committed: false,
        };
        let header = FrameHeader {
            group: GroupId(1),
            sender: ReplicaId(6 - leader.0 - me.0),
            target: me,
        };
        let request = PeerRequest::PreVote {
            vote,
            last: Some(LogId {
                term: term + 1,
                index: 1000,
            }),
        };
        let reply = registry
            .handle(Lane::Log, header, request, Bytes::new())
            .expect("a replica that is up")
            .await;
        assert_eq!(
            reply,
            PeerReply::Refused(PeerRefusal::Leased),
            "what was missed once holds a lease again"
        );
    }
    assert_eq!(
        (
            cluster.leader(1).await,
            cluster.group(leader.0, 1).status().term
        ),
        (leader, term)
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn where_reads_rest_on_leases_a_broken_lane_ends_none() {
    let timings = RaftTimings {
        election_ms_min: 2000,
        election_ms_max: 2500,
        lease: LeaseReads::On { drift_ms: 1 },
        ..RaftTimings::default()
    };
    let mut cluster = TestCluster::with_timings(3, timings);
    cluster.found(1).await;
    cluster.put(1, "k", "v").await;
    let leader = cluster.leader(1).await;
    cluster.stop(leader).await;
    // Many times longer than an election took that did not respect it.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(
        (1..=3)
            .filter(|node| *node != leader.0)
            .all(|node| cluster.group(node, 1).status().leader == Some(leader))
    );
    cluster.put(1, "k", "w").await;
    cluster.stop_all().await;
}

#[tokio::test]
async fn with_lease_reads_a_restarted_replica_waits_before_it_votes() {
    let timings = RaftTimings {
        lease: LeaseReads::On { drift_ms: 100 },
        ..RaftTimings::default()
    };
    let mut cluster = TestCluster::with_timings(3, timings);
    cluster.found(1).await;
    cluster.put(1, "k", "v").await;
    let leader = cluster.leader(1).await;
    let group = cluster.group(leader.0, 1);
    for _ in 0..50 {
        group.read_barrier(soon()).await.expect("confirmed");
        assert_eq!(read(&group, "k").as_deref(), Some("v"));
    }
    let other = NodeId(1 + leader.0 % 3);
    cluster.stop(other).await;
    cluster.restart(other).await;
    assert!(cluster.group(other.0, 1).may_be_leased());
    let replica = cluster.group(other.0, 1);
    until("the wait is over", || !replica.may_be_leased()).await;
    // Without the leader it is one of the two that must elect.
    cluster.stop(leader).await;
    cluster.put(1, "k", "w").await;
    cluster.stop_all().await;
}
