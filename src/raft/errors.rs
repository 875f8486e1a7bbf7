//! The errors of a group. Each says whether it certainly did nothing.

use std::time::Duration;

use crate::descriptors;
use crate::sm::level::Feature;
use crate::sm::ports::StoreError;
use crate::sm::recovery::FailureCause;
use crate::types::{NodeId, ReplicaId};

/// An error of a proposal. Only [`ProposeError::Unknown`] leaves open whether the proposal was, or
/// will be, applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another replica leads, or none.
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    #[error("overloaded: {limit}")]
    Overloaded { limit: String },
    /// The deadline passed before the proposal was made.
    #[error("its time ran out before it was proposed")]
    Expired,
    /// The replica stopped before the proposal was made.
    #[error("this replica has stopped: {reason}")]
    Stopped { reason: String },
    /// Nothing was proposed, because some node of the cluster may not be able to read it.
    #[error(
        "a {} needs level {}, which this cluster has not reached: upgrade all of its nodes",
        .needs.name(),
        .needs.level()
    )]
    NotYet { needs: Feature },
    /// The replicas of the shard differ: nothing is written until they agree.
    #[error("it is read-only: {reason}")]
    ReadOnly { reason: String },
    /// The disk of this node is nearly full.
    #[error("no room: {reason}")]
    NoRoom { reason: String },
    #[error("its outcome is unknown: {reason}")]
    Unknown { reason: String },
}

impl ProposeError {
    pub(super) fn unknown(reason: impl Into<String>) -> Self {
        Self::Unknown {
            reason: reason.into(),
        }
    }
}

/// An error of a linearizable read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    #[error("overloaded: {limit}")]
    Overloaded { limit: String },
    /// No quorum confirmed in time that this replica still leads, or what is committed was not
    /// applied in time.
    #[error("no quorum confirmed it in time")]
    Expired,
    #[error("this replica has stopped: {reason}")]
    Stopped { reason: String },
}

/// Reason that a stopped replica gives to callers that still wait.
pub(super) const SHUT_DOWN: &str = "it was shut down";

/// An error of a transfer of leadership.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    #[error("{0} is no voter of the group, or one that cannot serve it")]
    NoVoter(ReplicaId),
    #[error("{replica} is {entries} entries behind")]
    Behind { replica: ReplicaId, entries: u64 },
    /// The target did not take over in time; the group may be without a leader for a moment.
    #[error("{to} did not take over within {timeout:?}")]
    Late { to: ReplicaId, timeout: Duration },
    #[error("this replica has stopped")]
    Stopped,
}

/// An error of a change of a group's members.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    /// An earlier change is in progress, or the membership has changed since it was read.
    #[error("another change is under way or was made: {0}")]
    Conflict(String),
    #[error("it can't be done: {0}")]
    Invalid(String),
    /// The change may have been made in part: look at the committed membership.
    #[error("its outcome is unknown: {0}")]
    Unknown(String),
    #[error("this replica has stopped")]
    Stopped,
}

/// An error of opening a replica, or of beginning a group.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The map cannot be rebuilt here. The other replicas of the group have all of it.
    #[error(
        "replica {key} is lost: what it had cannot be rebuilt, because the log begins behind \
         {purged} and the snapshot before that is not usable ({reason}); the other replicas of the \
         group serve on"
    )]
    Lost {
        key: crate::storage::ReplicaKey,
        purged: crate::types::LogId,
        reason: String,
    },
    /// The log is not the one that the map was applied from.
    #[error(
        "replica {key} does not open: its log {log}, and its map has applied {applied}. The log \
         was replaced by an older copy, or has lost its end, and with it what this replica had \
         promised: it takes no part. Put the whole data directory back as it was, or give this \
         node an empty one, so that the cluster replaces its replicas"
    )]
    OtherLog {
        key: crate::storage::ReplicaKey,
        log: String,
        applied: crate::types::LogId,
    },
    /// A replica with a map is to be opened as a witness, or the other way round.
    #[error("{0} is on this node as another kind of replica than it should be")]
    OtherKind(crate::storage::ReplicaKey),
    #[error("{0} is open already")]
    AlreadyOpen(crate::storage::ReplicaKey),
    #[error("the node is shutting down")]
    ShuttingDown,
    #[error("invalid timings: {0}")]
    Timings(String),
    #[error("the log: {0}")]
    Log(#[source] std::io::Error),
    #[error("the map: {0}")]
    State(#[from] StoreError),
    /// The log has no such replica, and it was not to be created.
    #[error("{0} is not on this node")]
    Missing(crate::storage::ReplicaKey),
    /// The log and the map do not fit together, or the replica has stopped.
    #[error("raft: {0}")]
    Raft(String),
}

impl OpenError {
    /// Returns true if there was no file descriptor left. That passes, and nothing is wrong with
    /// what was to be opened.
    pub fn lacks_descriptors(&self) -> bool {
        match self {
            OpenError::Log(source) | OpenError::State(StoreError::Io { source, .. }) => {
                descriptors::are_exhausted(source)
            }
            _ => false,
        }
    }
    /// Returns the cause, as far as it decides what is done about it.
    pub fn cause(&self) -> FailureCause {
        use std::io::ErrorKind::{InvalidData, QuotaExceeded, StorageFull, UnexpectedEof};
        match self {
            error if error.lacks_descriptors() => FailureCause::Descriptors,
            OpenError::Log(source) | OpenError::State(StoreError::Io { source, .. }) => {
                match source.kind() {
                    StorageFull | QuotaExceeded => FailureCause::DiskFull,
                    InvalidData | UnexpectedEof => FailureCause::Damaged,
                    _ => FailureCause::Other,
                }
            }
            OpenError::State(StoreError::TooOld { .. } | StoreError::Undecodable { .. }) => {
                FailureCause::Program
            }
            OpenError::State(StoreError::Damaged(_))
            | OpenError::Lost { .. }
            | OpenError::OtherLog { .. }
            | OpenError::OtherKind(_)
            | OpenError::Missing(_) => FailureCause::Damaged,
            OpenError::AlreadyOpen(_)
            | OpenError::ShuttingDown
            | OpenError::Timings(_)
            | OpenError::Raft(_) => FailureCause::Other,
        }
    }
}
