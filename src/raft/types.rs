//! openraft's type config, [`Types`], and the conversions between its values and ours.
//!
//! A proposal travels as the bytes of its encoded command: the log and the peers carry them as they
//! are, and only apply decodes them. Members name a node by its id, never by its address, because
//! addresses change and memberships are a disk format.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;
use openraft::raft::responder::Responder;
use openraft::vote::{RaftLeaderId, RaftVote};
use openraft::{EntryPayload, OptionalSend, RaftTypeConfig};
use serde::{Deserialize, Serialize};

use super::runtime::Runtime;
use crate::sm::cluster::meta;
use crate::sm::ports::StoreError;
use crate::sm::{codec, kv};
use crate::storage::log::{self, LogPayload};
use crate::types::{LogId, NodeId, ReplicaId, ReplicaKind};

/// The types that openraft is instantiated with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Types;

impl RaftTypeConfig for Types {
    type D = Proposal;
    type R = ApplyOutcome;
    type NodeId = ReplicaId;
    type Node = GroupMember;
    type Term = u64;
    type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, ReplicaId>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = EntryPayload<Proposal, ReplicaId, GroupMember>;
    type Entry = openraft::Entry<<Self::LeaderId as RaftLeaderId>::Committed, Self::Payload>;
    type AsyncRuntime = Runtime;
    type Responder<T>
        = ResponderFn<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub type RaftLogId = openraft::type_config::alias::LogIdOf<Types>;
pub type RaftVoteOf = openraft::type_config::alias::VoteOf<Types>;
pub type RaftEntry = openraft::type_config::alias::EntryOf<Types>;
pub type RaftPayload = EntryPayload<Proposal, ReplicaId, GroupMember>;
pub type RaftMembership = openraft::Membership<ReplicaId, GroupMember>;
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<Types>;
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<Types>;

/// An encoded command of the group.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal(pub Bytes);

impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The result of applying an entry. Stays in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ApplyOutcome {
    /// The entry was Raft's own.
    Nothing,
    Shard(kv::KvOutcome),
    Meta(meta::MetaOutcome),
}

/// The node of a replica, and the kind of the replica.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMember {
    pub node: NodeId,
    pub kind: ReplicaKind,
}

impl GroupMember {
    /// Returns the node that clients should be sent to if this member leads; None for a witness,
    /// which serves nobody.
    pub fn serving_node(&self) -> Option<NodeId> {
        match self.kind {
            ReplicaKind::Data => Some(self.node),
            ReplicaKind::Witness => None,
        }
    }
}

/// Calls a function with the result: an answer wakes its caller without a task or channel in
/// between.
pub struct ResponderFn<T>(pub Box<dyn FnOnce(T) + Send>);

impl<T: OptionalSend + 'static> Responder<Types, T> for ResponderFn<T> {
    fn on_complete(self, result: T) {
        (self.0)(result);
    }
}

/// Converts a log id of openraft's.
pub fn from_raft(id: &RaftLogId) -> LogId {
    LogId {
        term: id.committed_leader_id().term,
        index: id.index(),
    }
}

/// Converts a log id to openraft's.
pub fn to_raft(id: LogId) -> RaftLogId {
    RaftLogId::new_term_index(id.term, id.index)
}

/// Converts a vote of openraft's.
pub fn vote_from_raft(vote: &RaftVoteOf) -> log::Vote {
    let leader = vote.leader_id();
    log::Vote {
        term: leader.term,
        voted_for: Some(leader.voted_for),
        committed: RaftVote::is_committed(vote),
    }
}

/// Converts a vote to openraft's. Returns None for a vote without a candidate; such votes are never
/// persisted.
pub fn vote_to_raft(vote: &log::Vote) -> Option<RaftVoteOf> {
    let candidate = vote.voted_for?;
    Some(match vote.committed {
        true => RaftVoteOf::new_committed(vote.term, candidate),
        false => RaftVoteOf::new(vote.term, candidate),
    })
}

/// A membership as it is written to logs, snapshots and frames. The format is ours, so that it
/// stays when openraft's changes.
#[derive(Serialize, Deserialize)]
struct MembershipRecord {
    /// One set of voters; two while a change is in progress (joint consensus).
    voters: Vec<BTreeSet<ReplicaId>>,
    /// Every member, including learners.
    members: BTreeMap<ReplicaId, NodeId>,
}

/// Format of memberships that are followed by their witnesses. Memberships without witnesses are
/// written in the first format.
const WITH_WITNESSES: u8 = 2;

type Witnesses = BTreeSet<ReplicaId>;

/// Encodes a membership in our format.
pub fn encode_membership(membership: &RaftMembership) -> Bytes {
    let (record, witnesses) = record(membership);
    if witnesses.is_empty() {
        codec::encode(&record)
    } else {
        codec::encode_as(WITH_WITNESSES, &(record, witnesses))
    }
}

/// Decodes a membership.
pub fn decode_membership(bytes: &[u8]) -> Result<RaftMembership, StoreError> {
    let what = "a membership";
    let (record, witnesses) = match codec::split(bytes, WITH_WITNESSES, what)? {
        (codec::FORMAT, body) => (codec::decode_body(body, what)?, Witnesses::new()),
        (_, body) => codec::decode_body(body, what)?,
    };
    membership(record, &witnesses)
}

/// Encodes a membership with the log id under which it was written. Empty bytes stand for the
/// membership of a group that has none yet.
pub fn encode_stored_membership(stored: &StoredMembership) -> Bytes {
    let Some(id) = stored.log_id() else {
        return Bytes::new();
    };
    let (id, (record, witnesses)) = (from_raft(id), record(stored.membership()));
    if witnesses.is_empty() {
        codec::encode(&(id, record))
    } else {
        codec::encode_as(WITH_WITNESSES, &(id, record, witnesses))
    }
}

/// Decodes a membership with its log id.
pub fn decode_stored_membership(bytes: &[u8]) -> Result<StoredMembership, StoreError> {
    if bytes.is_empty() {
        return Ok(StoredMembership::default());
    }
    let what = "a stored membership";
    let (id, record, witnesses): (LogId, MembershipRecord, Witnesses) =
        match codec::split(bytes, WITH_WITNESSES, what)? {
            (codec::FORMAT, body) => {
                let (id, record) = codec::decode_body(body, what)?;
                (id, record, Witnesses::new())
            }
            (_, body) => codec::decode_body(body, what)?,
        };
    Ok(StoredMembership::new(
        Some(to_raft(id)),
        membership(record, &witnesses)?,
    ))
}

fn record(membership: &RaftMembership) -> (MembershipRecord, Witnesses) {
    let witnesses = membership
        .nodes()
        .filter(|(_, member)| member.kind == ReplicaKind::Witness)
        .map(|(replica, _)| *replica)
        .collect();
    let record = MembershipRecord {
        voters: membership.get_joint_config().clone(),
        members: membership
            .nodes()
            .map(|(replica, member)| (*replica, member.node))
            .collect(),
    };
    (record, witnesses)
}

fn membership(
    record: MembershipRecord,
    witnesses: &Witnesses,
) -> Result<RaftMembership, StoreError> {
    let member = |(id, node)| {
        (
            id,
            GroupMember {
                node,
                kind: match witnesses.contains(&id) {
                    true => ReplicaKind::Witness,
                    false => ReplicaKind::Data,
                },
            },
        )
    };
    let members: BTreeMap<ReplicaId, GroupMember> =
        record.members.into_iter().map(member).collect();
    let undecodable = |reason: String| StoreError::Undecodable {
        what: "a membership",
        reason,
    };
    RaftMembership::new(record.voters, members).map_err(|error| undecodable(error.to_string()))
}

/// Converts an entry of openraft's to one of the log.
pub fn entry_from_raft(entry: RaftEntry) -> log::LogEntry {
    let payload = match entry.payload {
        EntryPayload::Blank => LogPayload::Blank,
        EntryPayload::Normal(proposal) => LogPayload::Normal(proposal.0),
        EntryPayload::Membership(membership) => {
            LogPayload::Membership(encode_membership(&membership))
        }
    };
    log::LogEntry {
        id: from_raft(&entry.log_id),
        payload,
    }
}

/// Converts an entry of the log to one of openraft's.
pub fn entry_to_raft(entry: log::LogEntry) -> Result<RaftEntry, StoreError> {
    let payload = match entry.payload {
        LogPayload::Blank => EntryPayload::Blank,
        LogPayload::Normal(bytes) => EntryPayload::Normal(Proposal(bytes)),
        LogPayload::Membership(bytes) => EntryPayload::Membership(decode_membership(&bytes)?),
    };
    Ok(RaftEntry {
        log_id: to_raft(entry.id),
        payload,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memberships_keep_their_encoding() {
        let member = |(replica, node)| {
            (
                ReplicaId(replica),
                GroupMember {
                    node: NodeId(node),
                    kind: ReplicaKind::Data,
                },
            )
        };
        let members = [(1, 10), (2, 20), (3, 30)].map(member);
        let voters = vec![
            BTreeSet::from([ReplicaId(1), ReplicaId(2)]),
            BTreeSet::from([ReplicaId(2)]),
        ];
        let membership =
            RaftMembership::new(voters, BTreeMap::from(members)).expect("a valid membership");
        let bytes = encode_membership(&membership);
        assert_eq!(&bytes[..], [1, 2, 2, 1, 2, 1, 2, 3, 1, 10, 2, 20, 3, 30]);
        assert_eq!(decode_membership(&bytes).expect("own encoding"), membership);

        let stored = StoredMembership::new(Some(to_raft(LogId { term: 3, index: 4 })), membership);
        let bytes = encode_stored_membership(&stored);
        assert_eq!(&bytes[..5], [1, 3, 4, 2, 2]);
        assert_eq!(
            decode_stored_membership(&bytes).expect("own encoding"),
            stored
        );
        assert_eq!(
            decode_stored_membership(b"").expect("no membership"),
            StoredMembership::default()
        );
        assert!(decode_stored_membership(b"\x01").is_err());
    }

    #[test]
    fn memberships_with_a_witness_keep_theirs() {
        let member = |(replica, node)| {
            (
                ReplicaId(replica),
                GroupMember {
                    node: NodeId(node),
                    kind: match replica {
                        3 => ReplicaKind::Witness,
                        _ => ReplicaKind::Data,
                    },
                },
            )
        };
        let members = [(1, 10), (2, 20), (3, 30)].map(member);
        let voters = vec![BTreeSet::from([ReplicaId(1), ReplicaId(2), ReplicaId(3)])];
        let membership =
            RaftMembership::new(voters, BTreeMap::from(members)).expect("a valid membership");
        let bytes = encode_membership(&membership);
        assert_eq!(&bytes[..], [2, 1, 3, 1, 2, 3, 3, 1, 10, 2, 20, 3, 30, 1, 3]);
        assert_eq!(decode_membership(&bytes).expect("own encoding"), membership);
        let stored = StoredMembership::new(Some(to_raft(LogId { term: 3, index: 4 })), membership);
        let bytes = encode_stored_membership(&stored);
        assert_eq!(&bytes[..5], [2, 3, 4, 1, 3]);
        assert_eq!(
            decode_stored_membership(&bytes).expect("own encoding"),
            stored
        );
        assert!(
            decode_membership(&[3, 1, 0, 0, 0])
                .expect_err("a newer one")
                .to_string()
                .contains("format 3")
        );
    }
}
