//! A snapshot that arrives in pieces: what is kept when the way breaks, and whose installation it
//! is.

use bytes::Bytes;

use super::cluster::*;
use crate::raft::transport::Lane;
use crate::raft::transport::wire::{
    FrameHeader, PeerRefusal, PeerReply, PeerRequest, SnapshotName,
};
use crate::storage::log::Vote;
use crate::types::{GroupId, LogId, NodeId, ReplicaId};

/// A request to replica 1 of group 1, and its reply.
async fn ask(cluster: &TestCluster, request: PeerRequest, tail: &[u8]) -> PeerReply {
    let header = FrameHeader {
        group: GroupId(1),
        sender: ReplicaId(2),
        target: ReplicaId(1),
    };
    let registry = &cluster.nodes[&NodeId(1)].registry;
    match registry.handle(
        Lane::Snapshot,
        header,
        request,
        Bytes::copy_from_slice(tail),
    ) {
        Ok(reply) => reply.await,
        Err(refusal) => PeerReply::Refused(refusal),
    }
}

#[tokio::test]
async fn a_transfer_goes_on_where_it_broke_and_another_snapshot_takes_its_place() {
    let cluster = TestCluster::new(1);
    cluster.found(1).await;
    let vote = Vote {
        term: 1,
        voted_for: Some(ReplicaId(2)),
        committed: true,
    };
    let name = |written_by| SnapshotName {
        written_by: ReplicaId(written_by),
        applied: Some(LogId { term: 1, index: 9 }),
        bytes_len: 10,
    };
    let open = |name| PeerRequest::SnapshotOpen {
        vote,
        snapshot: name,
    };
    let chunk = |name, offset| PeerRequest::SnapshotChunk {
        snapshot: name,
        offset,
    };
    let install = |name| PeerRequest::SnapshotInstall {
        vote,
        snapshot: name,
    };
    let has = |bytes_len| PeerReply::SnapshotHas { bytes_len };
    assert_eq!(ask(&cluster, open(name(2)), b"").await, has(0));
    assert_eq!(ask(&cluster, chunk(name(2), 0), b"12345").await, has(5));
    assert_eq!(
        ask(&cluster, open(name(2)), b"").await,
        has(5),
        "it goes on where it broke"
    );
    assert_eq!(
        ask(&cluster, chunk(name(2), 3), b"4567").await,
        has(7),
        "what came twice is passed over"
    );
    let early = ask(&cluster, install(name(2)), b"").await;
    assert!(
        matches!(early, PeerReply::Refused(PeerRefusal::Failed(_))),
        "it is not whole: {early:?}"
    );
    let gap = ask(&cluster, chunk(name(2), 9), b"0").await;
    assert!(
        matches!(gap, PeerReply::Refused(PeerRefusal::Failed(_))),
        "a gap: {gap:?}"
    );
    assert_eq!(
        ask(&cluster, open(name(3)), b"").await,
        has(0),
        "another one"
    );
    let old = ask(&cluster, chunk(name(2), 0), b"1").await;
    assert!(
        matches!(old, PeerReply::Refused(PeerRefusal::Failed(_))),
        "the one before is given up: {old:?}"
    );
    assert_eq!(
        ask(&cluster, chunk(name(3), 0), b"1234567890").await,
        has(10)
    );
    let damaged = ask(&cluster, install(name(3)), b"").await;
    assert!(
        matches!(damaged, PeerReply::Refused(PeerRefusal::Failed(_))),
        "it is no snapshot: {damaged:?}"
    );
    assert_eq!(
        ask(&cluster, open(name(3)), b"").await,
        has(0),
        "and is sent anew"
    );
    cluster.put(1, "k", "v").await;
    cluster.stop_all().await;
}
