//! Targets for `fuzzing`: what replicas are sent.

use bytes::{Bytes, BytesMut};

use super::transport::wire::{
    self, AppendReply, FrameHeader, FrameReader, Hello, PeerRefusal, PeerReply, PeerRequest,
    SnapshotName, TransferReply,
};
use super::types::{
    decode_membership, decode_stored_membership, encode_membership, encode_stored_membership,
    entry_to_raft, vote_to_raft,
};
use crate::raft::election::leases::LeaseTimings;
use crate::sm::codec;
use crate::sm::starts::Starts;
use crate::storage::log::{LogEntry, LogPayload, Vote};
use crate::storage::map::Applied;
use crate::types::{ClusterId, DirectoryId, GroupId, LogId, NodeId, ReplicaId, StartId};

fn id(term: u64, index: u64) -> LogId {
    LogId { term, index }
}

/// Bytes of a lane: frames, in one piece or two.
pub mod frames {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let header = FrameHeader {
            group: GroupId(3),
            sender: ReplicaId(1),
            target: ReplicaId(2),
        };
        let vote = Vote {
            term: 2,
            voted_for: Some(ReplicaId(1)),
            committed: true,
        };
        let name = SnapshotName {
            written_by: ReplicaId(1),
            applied: Some(id(2, 9)),
            bytes_len: 300,
        };
        let hello = Hello {
            cluster: ClusterId(1),
            from: NodeId(4),
            from_directory: DirectoryId(2),
            to: NodeId(5),
            to_directory: DirectoryId(3),
        };
        let starts = Starts::first(StartId(6)).followed_by(StartId(300));
        let timings = LeaseTimings {
            lease_drift_ms: Some(50),
            election_ms_max: 420,
        };
        let entries = [
            LogPayload::Blank,
            LogPayload::Normal(Bytes::from_static(b"six")),
            LogPayload::Membership(Bytes::from_static(b"seven")),
        ];
        let entries: Vec<LogEntry> = (5..)
            .zip(entries)
            .map(|(index, payload)| LogEntry {
                id: id(2, index),
                payload,
            })
            .collect();
        let last = Some(id(1, 4));
        let applied = Applied {
            log_id: last,
            membership: "m".into(),
        };
        let requests = [
            PeerRequest::Vote {
                vote,
                last,
                leadership_transfer: true,
            },
            PeerRequest::PreVote { vote, last },
            PeerRequest::TransferLeader {
                from: vote,
                to: ReplicaId(2),
                last,
            },
            PeerRequest::SnapshotOpen {
                vote,
                snapshot: name,
            },
            PeerRequest::SnapshotChunk {
                snapshot: name,
                offset: 7,
            },
            PeerRequest::SnapshotInstall {
                vote,
                snapshot: name,
            },
            PeerRequest::Watermark { vote, applied },
            PeerRequest::PurgeIndex { index: 9 },
            PeerRequest::Rebuild { vote },
        ];
        let replies = [
            PeerReply::Append(AppendReply::Success),
            PeerReply::Append(AppendReply::Partial(last)),
            PeerReply::Append(AppendReply::HigherVote(vote)),
            PeerReply::Vote {
                vote,
                last,
                granted: true,
            },
            PeerReply::TransferLeader(TransferReply::LogNotFlushed {
                expected: last,
                actual: None,
            }),
            PeerReply::SnapshotHas { bytes_len: 9 },
            PeerReply::SnapshotInstalled { vote },
            PeerReply::Refused(PeerRefusal::Failed("why".into())),
            PeerReply::Refused(PeerRefusal::OtherTimings(timings)),
            PeerReply::WatermarkWanted,
        ];
        let append = wire::encode_append(header, vote, last, last, &entries).seal(77);
        let greeting = wire::encode_greeting(&hello, &starts, &timings);
        let mut samples = vec![append, greeting, wire::encode_hello(&hello)];
        samples.extend(requests.iter().map(|request| {
            let tail: &[u8] = match request {
                PeerRequest::SnapshotChunk { .. } => b"a part",
                _ => b"",
            };
            wire::encode_request(header, request, tail).seal(5)
        }));
        let mut buffer = BytesMut::new();
        for reply in &replies {
            wire::encode_reply(&mut buffer, 9, reply);
            samples.push(buffer.split().freeze());
        }
        wire::encode_welcome(&mut buffer, 9, &starts);
        samples.push(buffer.freeze());
        // With a byte before that says where the stream is cut.
        let framed = samples.iter().map(|frame| [&[3], &frame[..]].concat());
        let unframed = samples.iter().map(|frame| [&[3], &frame[4..]].concat());
        let two = [&[30], &samples[0][..], &samples[1][..]].concat();
        framed.chain(unframed).chain([two]).collect()
    }

    pub fn read(bytes: &[u8]) {
        let Some((cut, stream)) = bytes.split_first() else {
            return;
        };
        read_stream(*cut, stream);
        // The same with the length that it has.
        let mut sealed = (stream.len() as u32).to_le_bytes().to_vec();
        sealed.extend_from_slice(stream);
        read_stream(*cut, &sealed);
    }

    fn read_stream(cut: u8, stream: &[u8]) {
        let (first, second) = stream.split_at(usize::from(cut).min(stream.len()));
        let mut reader = FrameReader::default();
        for part in [first, second] {
            reader.push(Bytes::copy_from_slice(part));
            while let Ok(Some(frame)) = reader.next() {
                read_frame(&frame);
            }
            let _ = reader.awaited_bytes();
        }
    }

    fn read_frame(frame: &wire::ReceivedFrame) {
        let _ = (frame.hello(), frame.welcome());
        if let Ok(reply) = frame.reply() {
            let mut buffer = BytesMut::new();
            wire::encode_reply(&mut buffer, frame.sequence, &reply);
            assert_eq!(read_back(buffer.freeze()).reply(), Ok(reply));
        }
        let Ok((header, request, tail)) = frame.request() else {
            return;
        };
        let again = wire::encode_request(header, &request, &tail).seal(frame.sequence);
        assert_eq!(
            read_back(again).request(),
            Ok((header, request.clone(), tail.clone()))
        );
        if let PeerRequest::Append {
            vote,
            previous,
            entries: heads,
            ..
        } = request
        {
            let _ = vote_to_raft(&vote);
            if let Ok(entries) = wire::entries(&heads, tail) {
                let _ = super::super::transport::follows(previous, &entries);
                for entry in entries {
                    let _ = entry_to_raft(entry);
                }
            }
        }
    }

    fn read_back(bytes: Bytes) -> wire::ReceivedFrame {
        let mut reader = FrameReader::default();
        reader.push(bytes);
        reader.next().expect("own encoding").expect("a whole frame")
    }
}

/// Memberships, as entries of the log and as snapshots have them.
pub mod memberships {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        use std::collections::{BTreeMap, BTreeSet};
        let voters = vec![BTreeSet::from([ReplicaId(1), ReplicaId(2)])];
        let members = BTreeMap::from([
            (ReplicaId(1), NodeId(1)),
            (ReplicaId(2), NodeId(2)),
            (ReplicaId(3), NodeId(3)),
        ]);
        let record = (voters, members);
        let witnesses = BTreeSet::from([ReplicaId(2)]);
        vec![
            codec::encode(&record).to_vec(),
            codec::encode_as(2, &(&record, &witnesses)).to_vec(),
            codec::encode(&(id(2, 9), &record)).to_vec(),
            codec::encode_as(2, &(id(2, 9), &record, &witnesses)).to_vec(),
        ]
    }

    pub fn read(bytes: &[u8]) {
        if let Ok(membership) = decode_membership(bytes) {
            let again = decode_membership(&encode_membership(&membership));
            assert_eq!(again.expect("own encoding"), membership);
        }
        if let Ok(stored) = decode_stored_membership(bytes) {
            let again = decode_stored_membership(&encode_stored_membership(&stored));
            assert_eq!(again.expect("own encoding"), stored);
        }
    }
}
