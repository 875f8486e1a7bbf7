//! A map that is rebuilt holds entries of which openraft here does not know yet that they are
//! committed: they are not applied to it again, whenever openraft begins with them.

use std::sync::Arc;

use bytes::Bytes;

use super::cluster::*;
use crate::raft::Replica;
use crate::raft::transport::Lane;
use crate::raft::transport::wire::{
    AppendReply, EntryHead, FrameHeader, PayloadKind, PeerReply, PeerRequest, SnapshotName,
};
use crate::raft::types::vote_from_raft;
use crate::sm::kv::{self, Media, Record};
use crate::sm::ports::WriteBatch;
use crate::sm::slots::{data_key, slot_of};
use crate::storage::log::{LogPayload, Vote};
use crate::storage::snapshot::Snapshot;
use crate::types::{GroupId, LogId, NodeId, Revision};

/// A follower that nobody reaches but by hand.
struct CutOff<'a> {
    cluster: &'a TestCluster,
    leader: Arc<Replica>,
    follower: Arc<Replica>,
    node: NodeId,
    vote: Vote,
}

impl<'a> CutOff<'a> {
    async fn of(cluster: &'a TestCluster) -> Self {
        let leading = cluster.leader(1).await;
        let node = NodeId(1 + leading.0 % 3);
        let (leader, follower) = (cluster.group(leading.0, 1), cluster.group(node.0, 1));
        let vote = leader
            .raft
            .with_raft_state(|state| *state.vote_ref())
            .await
            .expect("it runs");
        until("it has applied all", || {
            applied(&follower) == applied(&leader)
        })
        .await;
        cluster.hub.isolate(node);
        Self {
            cluster,
            leader,
            follower,
            node,
            vote: vote_from_raft(&vote),
        }
    }

    async fn ask(&self, lane: Lane, request: PeerRequest, tail: Vec<u8>) -> PeerReply {
        let (sender, target) = (self.leader.key().replica, self.follower.key().replica);
        let header = FrameHeader {
            group: GroupId(1),
            sender,
            target,
        };
        let registry = &self.cluster.nodes[&self.node].registry;
        match registry.handle(lane, header, request, Bytes::from(tail)) {
            Ok(reply) => reply.await,
            Err(refusal) => PeerReply::Refused(refusal),
        }
    }

    /// Gives it the entries that it lacks, and does not say that they are committed.
    async fn append(&self) {
        let upto = applied(&self.leader).expect("entries").index;
        let previous = self.follower.log.state().last;
        let first = previous.map_or(0, |id| id.index + 1);
        let missing = self
            .leader
            .log
            .read_elsewhere(first..upto + 1, 1 << 20)
            .await
            .expect("entries");
        let (mut entries, mut tail) = (Vec::new(), Vec::new());
        for entry in missing {
            let LogPayload::Normal(bytes) = &entry.payload else {
                panic!("no write: {entry:?}")
            };
            let bytes_len = u32::try_from(bytes.len()).expect("short");
            entries.push(EntryHead {
                id: entry.id,
                kind: PayloadKind::Normal,
                bytes_len,
            });
            tail.extend_from_slice(bytes);
        }
        let append = PeerRequest::Append {
            vote: self.vote,
            previous,
            commit: None,
            entries,
        };
        assert_eq!(
            self.ask(Lane::Log, append, tail).await,
            PeerReply::Append(AppendReply::Success)
        );
    }

    /// Sends it the map of the leader as it is now.
    async fn send_map(&self) -> (SnapshotName, PeerReply) {
        self.leader.build_snapshot().await.expect("a snapshot");
        let snapshot = self.leader.state().current_snapshot().expect("it is there");
        let name = name_of(&snapshot);
        let mut file = vec![0; usize::try_from(name.bytes_len).expect("small")];
        assert_eq!(
            snapshot.read_at(0, &mut file).expect("readable"),
            file.len()
        );
        let open = PeerRequest::SnapshotOpen {
            vote: self.vote,
            snapshot: name,
        };
        let opened = self.ask(Lane::Snapshot, open, Vec::new()).await;
        assert_eq!(opened, PeerReply::SnapshotHas { bytes_len: 0 });
        let chunk = PeerRequest::SnapshotChunk {
            snapshot: name,
            offset: 0,
        };
        let written = self.ask(Lane::Snapshot, chunk, file).await;
        (name, written)
    }

    async fn install(&self, name: SnapshotName) -> PeerReply {
        let deadline = soon();
        loop {
            let install = PeerRequest::SnapshotInstall {
                vote: self.vote,
                snapshot: name,
            };
            match self.ask(Lane::Snapshot, install, Vec::new()).await {
                PeerReply::SnapshotHas { .. } => assert!(tokio::time::Instant::now() < deadline),
                other => return other,
            }
        }
    }

    async fn hold(&self) {
        let rebuild = PeerRequest::Rebuild { vote: self.vote };
        assert_eq!(
            self.ask(Lane::Snapshot, rebuild, Vec::new()).await,
            PeerReply::Noted
        );
    }
}

fn name_of(snapshot: &Snapshot) -> SnapshotName {
    let (written_by, applied) = (snapshot.written_by().replica, snapshot.applied().log_id);
    SnapshotName {
        written_by,
        applied,
        bytes_len: snapshot.bytes_len(),
    }
}

fn applied(group: &Replica) -> Option<LogId> {
    group.state().applied().log_id
}

fn odd_value() -> WriteBatch {
    let record = Record {
        revision: Revision(1),
        media: Media::Text,
        value: Bytes::from_static(b"odd"),
    };
    let mut batch = WriteBatch::default();
    batch.put(
        data_key(slot_of(b"odd"), b"odd"),
        kv::encode_record(&record),
    );
    batch
}

#[tokio::test]
async fn entries_that_a_rebuilt_map_holds_are_not_applied_again() {
    for entries in [1, 3] {
        let cluster = TestCluster::new(3);
        cluster.found(1).await;
        cluster.put(1, "before", "v").await;
        let cut_off = CutOff::of(&cluster).await;
        let follower = &cut_off.follower;
        follower.state().corrupt(odd_value());
        cut_off.hold().await;

        for n in 0..entries {
            cluster.put(1, &format!("during {n}"), "v").await;
        }
        cut_off.append().await;
        let (name, _) = cut_off.send_map().await;
        let installed = cut_off.install(name).await;
        assert!(
            matches!(installed, PeerReply::SnapshotInstalled { .. }),
            "{installed:?}"
        );
        assert_eq!(
            (follower.rebuilt(), applied(follower)),
            (1, applied(&cut_off.leader))
        );
        assert_eq!(
            *follower.apply_state.applied.borrow(),
            name.applied.expect("entries").index
        );

        cluster.hub.heal();
        cluster.put(1, "after", "v").await;
        let leader = cluster.group(cluster.leader(1).await.0, 1);
        let compared = leader.propose_command(kv::KvCommand::Compare, soon()).await;
        assert!(
            matches!(compared, Ok(kv::KvOutcome::Compared)),
            "{compared:?}"
        );
        until("both have told their digests", || {
            let told = [&leader, follower].map(|group| group.state().noted_digest());
            assert_eq!(follower.apply_state.failure(), None, "{entries} entries");
            told[0].is_some() && told[0].map(|(id, _)| id) == told[1].map(|(id, _)| id)
        })
        .await;
        let digests = [&leader, follower].map(|group| group.state().noted_digest());
        assert_eq!(digests[0], digests[1], "{entries} entries");
        drop((leader, cut_off));
        cluster.stop_all().await;
    }
}

#[tokio::test]
async fn a_map_that_arrives_for_a_hold_that_is_over_is_refused() {
    let cluster = TestCluster::new(3);
    cluster.found(1).await;
    let cut_off = CutOff::of(&cluster).await;
    cut_off.hold().await;
    cluster.put(1, "during", "v").await;
    cut_off.append().await;
    let (name, _) = cut_off.send_map().await;
    cut_off.follower.apply_state.hold.clear();
    let refused = cut_off.install(name).await;
    assert!(matches!(refused, PeerReply::Refused(_)), "{refused:?}");
    assert_eq!(cut_off.follower.rebuilt(), 0);

    // A snapshot of the same name that openraft sends is its own affair.
    let (name, _) = cut_off.send_map().await;
    let installed = cut_off.install(name).await;
    assert!(
        matches!(installed, PeerReply::SnapshotInstalled { .. }),
        "{installed:?}"
    );
    drop(cut_off);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_hold_that_is_over_before_the_map_is_sent_is_not_told_as_a_rebuild() {
    let cluster = TestCluster::new(3);
    cluster.found(1).await;
    cluster.put(1, "before", "v").await;
    let cut_off = CutOff::of(&cluster).await;
    cut_off.hold().await;
    // As if its patience had ended while the leader still wrote the snapshot.
    cut_off.follower.apply_state.hold.clear();
    cut_off.leader.build_snapshot().await.expect("a snapshot");
    let snapshot = cut_off.leader.state().current_snapshot();
    let name = name_of(&snapshot.expect("it is there"));
    let open = || {
        let open = PeerRequest::SnapshotOpen {
            vote: cut_off.vote,
            snapshot: name,
        };
        cut_off.ask(Lane::Snapshot, open, Vec::new())
    };
    let refused = open().await;
    assert!(matches!(refused, PeerReply::Refused(_)), "{refused:?}");

    // Whoever sends it for another reason is heard the next time.
    assert_eq!(open().await, PeerReply::SnapshotHas { bytes_len: 0 });
    // One that is asked for anew is awaited again.
    cut_off.hold().await;
    let (name, _) = cut_off.send_map().await;
    let installed = cut_off.install(name).await;
    assert!(
        matches!(installed, PeerReply::SnapshotInstalled { .. }),
        "{installed:?}"
    );
    assert_eq!(cut_off.follower.rebuilt(), 1);
    drop(cut_off);
    cluster.stop_all().await;
}
