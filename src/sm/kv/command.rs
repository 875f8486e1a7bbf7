//! The commands of a shard and what becomes of them: its log entries, writes and their conditions,
//! outcomes and rejections.
//!
//! Part of the disk format and of what nodes say to each other. Kept out: what a command does,
//! which is in `apply`, and the commands of slot moves, which are in `sm::moves`.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::sm::codec;
use crate::sm::level::Feature;
use crate::sm::moves::command::{Install, MoveCommand, MoveOutcome};
use crate::sm::ports::StoreError;
use crate::types::{GroupId, MoveId, Revision, Slot};

/// One entry of a shard's log. Part of the disk format: variants are only ever added, at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvCommand {
    /// Independent writes that were proposed together: each is applied, or rejected, on its own, in
    /// order.
    Write { time_ms: u64, writes: Vec<Write> },
    /// First ownership of slots that no move has ever touched (generation 0), from the group's
    /// creation record.
    Claim { slots: Vec<Slot> },
    /// A step of a move of slots between two shards.
    Move {
        id: MoveId,
        slots: BTreeSet<Slot>,
        step: MoveCommand,
    },
    /// A chunk of a move, for its destination. `time_ms` is the destination's own group time, from
    /// the leader that proposes it.
    Install { time_ms: u64, install: Install },
    /// As [`KvCommand::Write`], but a write whose gets return more than is left of
    /// `ANSWER_BYTES_MAX` for the entry is rejected. From level 1 on.
    BoundedWrite { time_ms: u64, writes: Vec<Write> },
    /// Changes nothing: replicas note the digest of their maps as of this entry. From level 1 on.
    Compare,
    /// Leaders let nothing be written from here on, for that reason; with none, it is written
    /// again. The map says so, for the leaders to come: apply refuses nothing. From level 2 on.
    SetReadOnly { reason: Option<String> },
}

/// Operations that happen all in one entry or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    pub operations: Vec<Operation>,
    /// Remembered with the answer, per slot, so that a retry is answered and not done again.
    pub idempotency_key: Option<Bytes>,
}

impl Write {
    /// Returns whether it does nothing but delete, which gives space back in the end.
    pub fn frees(&self) -> bool {
        let deletes = |operation: &Operation| matches!(operation.action, Action::Delete);
        !self.operations.is_empty() && self.operations.iter().all(deletes)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    pub key: Bytes,
    pub condition: Condition,
    pub action: Action,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    Get,
    Put { media: Media, value: Bytes },
    Delete,
}

/// Requirement on a key that is checked before any operation of its write is done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Condition {
    #[default]
    None,
    Absent,
    Present,
    /// The key exists at one of these revisions.
    RevisionIn(Vec<Revision>),
    /// The key is absent, or at none of these revisions.
    RevisionNotIn(Vec<Revision>),
}

/// The media type of a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Media {
    /// `text/plain`
    Text,
    /// `application/octet-stream`
    Octets,
    /// `application/json`
    Json,
    /// Any other, as it was given.
    Other(String),
}

/// A stored value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub revision: Revision,
    pub media: Media,
    pub value: Bytes,
}

/// The outcome of applying a [`KvCommand`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvOutcome {
    /// One per write, in order.
    Written(Vec<WriteOutcome>),
    Claimed,
    /// A slot of the claim was once moved: nothing was claimed.
    ClaimRejected {
        slot: Slot,
        generation: MoveId,
    },
    /// Of a step or a chunk of a move.
    Moved(MoveOutcome),
    /// Of [`KvCommand::Compare`].
    Compared,
    /// Of [`KvCommand::SetReadOnly`].
    ReadOnlySet,
}

/// The outcome of applying a [`Write`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WriteOutcome {
    /// One per operation, in order.
    Applied(Vec<OperationOutcome>),
    /// This write changed nothing.
    Rejected(WriteRejection),
    /// Only of a retry: operations of some slots are answered from the memory of requests, the
    /// others were decided now, and not all of them alike. It comes about when slots that were in
    /// different shards at the first try are in one shard now. One per operation.
    Mixed(Vec<Result<OperationOutcome, WriteRejection>>),
    /// It was done, now or before, and what its gets return is not at hand: nobody waits for it, or
    /// it is too large. Never sent.
    Unanswered,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperationOutcome {
    /// The value before the write's own operations on later positions, after those on earlier ones.
    Got(Option<Record>),
    Put {
        revision: Revision,
        created: bool,
    },
    /// `revision` is that of the deletion; none: there was nothing to delete.
    Deleted {
        revision: Option<Revision>,
    },
}

/// The reason why a write changed nothing. The same on every replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WriteRejection {
    /// This shard does not own the slot. `moved_to`: who got it by the last move seen here.
    WrongOwner {
        slot: Slot,
        moved_to: Option<(MoveId, GroupId)>,
    },
    /// A move holds writes to the slot back.
    Frozen { slot: Slot },
    /// The condition of the operation at this position did not hold; `current` is the key's
    /// revision, if it exists.
    ConditionFailed {
        operation: usize,
        current: Option<Revision>,
    },
    /// The idempotency key was used for another request.
    KeyReused { slot: Slot },
    /// The memory of answered requests is full: try again when some have expired.
    RequestsFull { slot: Slot },
    /// Its gets return so many bytes: more than `ANSWER_BYTES_MAX`, or than other writes of its
    /// entry have left of them. Never sent.
    AnswerTooLarge { bytes: u64 },
}

impl KvCommand {
    /// Returns what a view must allow before it is proposed; none: every program reads it.
    pub fn needs(&self) -> Option<Feature> {
        match self {
            KvCommand::Write { .. }
            | KvCommand::Claim { .. }
            | KvCommand::Move { .. }
            | KvCommand::Install { .. } => None,
            KvCommand::BoundedWrite { .. } => Some(Feature::BoundedAnswers),
            KvCommand::Compare => Some(Feature::CompareDigests),
            KvCommand::SetReadOnly { .. } => Some(Feature::ReadOnlyEntries),
        }
    }

    /// Encodes it; one that older programs do not read, with the level that must be known.
    pub fn encode(&self) -> Bytes {
        match self.needs() {
            None => codec::encode_sized(self, self.size_hint()),
            Some(feature) => codec::encode_leveled(feature.level(), self, self.size_hint()),
        }
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        let what = "a command of a shard";
        match codec::split_leveled(bytes, what)? {
            Some((_, body)) => codec::decode_body(body, what),
            None => codec::decode(bytes, what),
        }
    }

    /// About as many bytes as the encoding takes.
    pub fn size_hint(&self) -> usize {
        match self {
            KvCommand::Write { writes, .. } | KvCommand::BoundedWrite { writes, .. } => {
                16 + writes.iter().map(Write::size_hint).sum::<usize>()
            }
            KvCommand::Claim { slots } => 8 + 2 * slots.len(),
            KvCommand::Compare => 8,
            KvCommand::SetReadOnly { reason } => 8 + reason.as_ref().map_or(0, String::len),
            KvCommand::Move { slots, step, .. } => 16 + 2 * slots.len() + step.size_hint(),
            KvCommand::Install { install, .. } => 8 + install.size_hint(),
        }
    }

    /// Returns whether it is about whether anything is written: a leader may propose it while
    /// nothing is.
    pub fn is_of_agreement(&self) -> bool {
        match self {
            KvCommand::Compare | KvCommand::SetReadOnly { .. } => true,
            KvCommand::Write { .. }
            | KvCommand::BoundedWrite { .. }
            | KvCommand::Claim { .. }
            | KvCommand::Move { .. }
            | KvCommand::Install { .. } => false,
        }
    }

    /// The group time that it carries, if it does.
    pub fn time_ms(&self) -> Option<u64> {
        match self {
            KvCommand::Write { time_ms, .. }
            | KvCommand::BoundedWrite { time_ms, .. }
            | KvCommand::Install { time_ms, .. } => Some(*time_ms),
            KvCommand::Claim { .. }
            | KvCommand::Move { .. }
            | KvCommand::Compare
            | KvCommand::SetReadOnly { .. } => None,
        }
    }
}

impl Write {
    /// Returns whether it changes nothing: a read, which needs no entry.
    pub fn is_read(&self) -> bool {
        self.operations
            .iter()
            .all(|operation| operation.action == Action::Get)
    }

    /// Returns whether it reads any values.
    pub fn has_gets(&self) -> bool {
        self.operations
            .iter()
            .any(|operation| operation.action == Action::Get)
    }

    /// About as many bytes as the encoding takes.
    pub fn size_hint(&self) -> usize {
        let key = self.idempotency_key.as_ref().map_or(0, Bytes::len);
        8 + key
            + self
                .operations
                .iter()
                .map(Operation::size_hint)
                .sum::<usize>()
    }
}

impl Operation {
    /// About as many bytes as the encoding takes.
    pub fn size_hint(&self) -> usize {
        let condition = match &self.condition {
            Condition::None | Condition::Absent | Condition::Present => 0,
            Condition::RevisionIn(revisions) | Condition::RevisionNotIn(revisions) => {
                1 + 4 * revisions.len()
            }
        };
        let action = match &self.action {
            Action::Get | Action::Delete => 0,
            Action::Put { media, value } => media.size_hint() + value.len(),
        };
        16 + self.key.len() + condition + action
    }
}

impl Media {
    pub(super) fn size_hint(&self) -> usize {
        match self {
            Media::Text | Media::Octets | Media::Json => 1,
            Media::Other(name) => 2 + name.len(),
        }
    }
}

impl KvOutcome {
    pub fn encode(&self) -> Bytes {
        codec::encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode(bytes, "an outcome of a shard")
    }
}

impl MoveCommand {
    /// The entry that takes this step.
    pub fn into_command(self, id: MoveId, slots: &BTreeSet<Slot>) -> KvCommand {
        KvCommand::Move {
            id,
            slots: slots.clone(),
            step: self,
        }
    }
}
