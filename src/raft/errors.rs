//! Why a group did not do what was asked. Each error says whether it certainly did nothing.

use std::time::Duration;

use crate::descriptors;
use crate::sm::level::Feature;
use crate::sm::ports::StoreError;
use crate::sm::recovery::FailureCause;
use crate::types::{NodeId, ReplicaId};

/// Why a proposal was not answered. Only [`ProposeError::Unknown`] leaves open whether it was, or
/// will yet be, applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another replica leads, if any.
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    #[error("overloaded: {limit}")]
    Overloaded { limit: String },
    /// The deadline passed before it was proposed.
    #[error("its time ran out before it was proposed")]
    Expired,
    /// The replica stopped before it was proposed.
    #[error("this replica has stopped: {reason}")]
    Stopped { reason: String },
    /// Not every node of the cluster may be able to read it: nothing was proposed.
    #[error(
        "a {} needs level {}, which this cluster has not reached: upgrade all of its nodes",
        .needs.name(),
        .needs.level()
    )]
    NotYet { needs: Feature },
    /// The replicas of the shard are not of one mind: nothing is written until they are.
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

/// Why a read could not be confirmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    #[error("overloaded: {limit}")]
    Overloaded { limit: String },
    /// No quorum confirmed in time that this replica still leads, or what is committed could not be
    /// applied in time.
    #[error("no quorum confirmed it in time")]
    Expired,
    #[error("this replica has stopped: {reason}")]
    Stopped { reason: String },
}

/// What a replica that was asked to stop says to those who still wait.
pub(super) const SHUT_DOWN: &str = "it was shut down";

/// Why leadership was not handed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    #[error("{0} is no voter of the group, or one that cannot serve it")]
    NoVoter(ReplicaId),
    #[error("{replica} is {entries} entries behind")]
    Behind { replica: ReplicaId, entries: u64 },
    /// The group may be without a leader for a moment.
    #[error("{to} did not take over within {timeout:?}")]
    Late { to: ReplicaId, timeout: Duration },
    #[error("this replica has stopped")]
    Stopped,
}

/// Why a membership was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    /// An earlier change is under way, or the membership is not the expected one any more.
    #[error("another change is under way or was made: {0}")]
    Conflict(String),
    #[error("it can't be done: {0}")]
    Invalid(String),
    /// It may have been done in part: look at the committed membership.
    #[error("its outcome is unknown: {0}")]
    Unknown(String),
    #[error("this replica has stopped")]
    Stopped,
}

/// Why a replica does not open, or a group does not begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its map can't be rebuilt here. The other replicas of the group have all of it.
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
    /// Its log is not the one that its map was applied from.
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
    /// A replica that has a map is to be opened as a witness, or the other way round.
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
    /// The log does not know it, and it was not to be created.
    #[error("{0} is not on this node")]
    Missing(crate::storage::ReplicaKey),
    /// What the log and the map hold does not fit together, or the replica has stopped.
    #[error("raft: {0}")]
    Raft(String),
}

impl OpenError {
    /// Whether there was no descriptor left to open a file by: that passes, and nothing is wrong
    /// with what was to be opened.
    pub fn lacks_descriptors(&self) -> bool {
        match self {
            OpenError::Log(source) | OpenError::State(StoreError::Io { source, .. }) => {
                descriptors::are_exhausted(source)
            }
            _ => false,
        }
    }
    /// Returns what kept the replica from being opened, as far as that decides what is done about
    /// it.
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
