//! What a shard understands: its commands, what it answers, and [`apply`], which turns an entry into an answer and a batch.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::types::{GroupId, MoveId, Revision, Slot};

/// One entry of a shard's log. Part of the disk format: variants are only ever added, at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Independent writes that were proposed together: each is applied, or rejected, on its own, in order.
    Write { time_ms: u64, writes: Vec<Write> },
    /// First ownership of slots that no move has ever touched (generation 0), from the group's creation record.
    Claim { slots: Vec<Slot> },
}

/// Operations that happen all in one entry or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    pub operations: Vec<Operation>,
    /// Remembered with the answer, per slot, so that a retry is answered and not done again.
    pub idempotency_key: Option<Bytes>,
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

/// What must hold of a key, before any operation of its write is done, for the write to happen.
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

/// What became of a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// One per write, in order.
    Written(Vec<WriteOutcome>),
    Claimed,
    /// A slot of the claim was once moved: nothing was claimed.
    ClaimRejected {
        slot: Slot,
        generation: MoveId,
    },
}

/// What became of a [`Write`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WriteOutcome {
    /// One per operation, in order.
    Applied(Vec<OperationOutcome>),
    /// This write changed nothing.
    Rejected(Rejection),
    /// Only of a retry: operations of some slots are answered from the memory of requests, the others were decided now, and not all of
    /// them alike. It comes about when slots that were in different shards at the first try are in one shard now. One per operation.
    Mixed(Vec<Result<OperationOutcome, Rejection>>),
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

/// Why a write changed nothing. The same on every replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rejection {
    /// This shard does not own the slot. `moved_to`: who got it by the last move seen here.
    WrongOwner { slot: Slot, moved_to: Option<(MoveId, GroupId)> },
    /// A move holds writes to the slot back.
    Frozen { slot: Slot },
    /// The condition of the operation at this position did not hold; `current` is the key's revision, if it exists.
    ConditionFailed { operation: usize, current: Option<Revision> },
    /// The idempotency key was used for another request.
    KeyReused { slot: Slot },
    /// The memory of answered requests is full: try again when some have expired.
    RequestsFull { slot: Slot },
}
