//! Options of a request, and the values that a store takes and returns.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::sm::kv::{OperationOutcome, Record, WriteRejection};
use crate::sm::ports::KeyRange;

/// Outcome of one operation of a write.
pub type Written = Result<OperationOutcome, WriteFailure>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum WriteFailure {
    /// Certainly nothing was changed by the operations of this shard. Positions in it are those of
    /// the caller's list.
    #[error("rejected: {0:?}")]
    Rejected(WriteRejection),
    #[error(transparent)]
    Failed(Failure),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    pub consistency: Consistency,
    pub routing: Routing,
    /// Time for which the caller waits, from now.
    pub timeout: Duration,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    #[default]
    Linearizable,
    /// Reads the replica at hand, however old its state is.
    Stale,
}

/// Says what a node does with a request for a shard that it does not lead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Routing {
    /// Fails with [`Failure::Elsewhere`], naming the leader.
    #[default]
    Redirect,
    /// Fetches the answer.
    Proxy,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetOutcome {
    pub record: Option<Record>,
    /// Only of a stale read.
    pub staleness: Option<Staleness>,
}

/// Age of a replica's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Staleness {
    /// Its leader has not been heard of since the start.
    Unknown,
    /// It was up to date this long ago.
    AtMost { age_ms: u64 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetManyRequest {
    pub keys: Vec<Bytes>,
    /// About how many bytes the answer may hold, values above all.
    pub bytes_max: usize,
    /// Leave the values out.
    pub keys_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanRequest {
    pub range: ScanRange,
    pub reverse: bool,
    /// At most this many items, at least one.
    pub limit: usize,
    /// Leave the values out.
    pub keys_only: bool,
}

/// A half-open range of keys, start included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanRange {
    pub start: Bytes,
    pub end: Option<Bytes>,
}

impl From<ScanRange> for KeyRange {
    fn from(range: ScanRange) -> KeyRange {
        KeyRange {
            start: range.start,
            end: range.end,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergedPage {
    pub items: Vec<Item>,
    /// There may be more in the range, after (or, in reverse, before) the last item.
    pub more: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    pub key: Bytes,
    /// With an empty value where only keys were asked for.
    pub record: Record,
}
