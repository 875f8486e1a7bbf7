//! The shared log: entries, votes, truncations and purges of every group of the node, in one
//! sequence of segments with one fsync for all that waits. It knows nothing of Raft beyond the
//! words; the adapter in `raft/` speaks to it.
//!
//! How an append travels: [`ReplicaLog::append`] checks it, keeps the entries readable in memory
//! and queues them (`queue`) → the writer thread ([`LogWriter::run`]) takes all that waits,
//! encodes it into one buffer of records (`record`), notes in the replica what the disk now holds
//! (`written`), writes, syncs, and calls every [`Done`] → when a segment is full the next one,
//! prepared ahead, begins with a head that restates what came before (`segment`) → segments in
//! which no live entry is left are used again. [`Log::open`] reads it all back (`replay`).
//!
//! What holds:
//! - A `Done` gets `Ok` only after the fsync. The operations of one replica happen, and are found
//!   after a crash, in their order.
//! - After one failed write or fsync nothing is retried: all that waits and all that follows gets
//!   the error, [`Log::failed`] tells. A full disk is no failure where the node says so
//!   ([`LogOptions::waits_for_room`]): it shows when bytes are pre-written, before there is a
//!   record in them, and the writer waits until there is room.
//! - A segment has its name only once its head is synced, and its bytes are pre-written and synced
//!   before records are written into them. So a file that ends too early is damage, wherever it was
//!   cut.
//! - Every batch begins with a mark: all before it was synced. A bad record below a mark is damage
//!   and refuses to open, one above the last mark is a tail that was never acknowledged and is cut.
//!   The cut is durable and what lies behind it can't come back: every opening begins a new
//!   segment, whose head says where the last one ended, and checksums are bound to segment and
//!   offset.
//! - What replay found valid behind the last mark is written again and synced before anything
//!   builds on it: it may have been left in the page cache by a sync that failed.
//!
//! What a flipped bit may do behind the last mark, and only there: the last batch looks like an
//! unacknowledged tail and is cut, or cut short. An idle log writes a closing mark
//! ([`LogOptions::idle_ms`] after the last batch, and on close), which ends that.

mod activity;
mod change;
mod disk_room;
mod free_space;
#[cfg(test)]
pub(crate) mod fuzz;
mod handle;
mod index;
mod queue;
mod record;
mod replay;
mod replica;
mod replica_state;
mod scrub;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::storage::disk::Disk;
use crate::types::{LogId, ReplicaId};

pub use activity::{WriterActivity, WriterPhase};
pub use handle::{Log, LogMetrics, Pin, SYNC_BUCKETS_US};
pub use replica::{LogState, ReplicaLog};
pub use writer::LogWriter;

/// Removes the log in `dir`, with all that it holds of every replica, durably. What is cut short
/// here must be done again before the log is opened.
///
/// # Errors
///
/// When the disk fails.
pub fn discard(disk: Arc<dyn Disk>, dir: &Path) -> io::Result<()> {
    segment::remove_all(disk, dir)
}

/// An entry of a group's log. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub id: LogId,
    pub payload: LogPayload,
}

/// Contents of an entry; opaque to the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogPayload {
    Blank,
    Normal(Bytes),
    Membership(Bytes),
}

impl LogPayload {
    /// The bytes in it; none for a blank one.
    pub fn bytes(&self) -> &[u8] {
        match self {
            LogPayload::Blank => &[],
            LogPayload::Normal(bytes) | LogPayload::Membership(bytes) => bytes,
        }
    }
}

/// A replica's vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    pub term: u64,
    pub voted_for: Option<ReplicaId>,
    pub committed: bool,
}

/// Called once with the outcome of an operation: on the writer thread after the fsync, or on the
/// caller's where the operation is refused. It must be quick and must not block.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Tells whether an empty directory is a new log or a lost one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Nothing there: a new log is begun.
    NewOrExisting,
    /// Nothing there: [`OpenLogError::Missing`].
    Existing,
}

/// Sizes and times of a log. They may change from one opening to the next; only `binding` may not.
#[derive(Debug, Clone)]
pub struct LogOptions {
    pub expect: Expect,
    /// Seeds every checksum: the random id of the data directory, so that a log of another
    /// directory is damage and not data.
    pub binding: u128,
    /// A segment of this size is followed by the next. A batch larger than this makes a larger one.
    /// Space is given back by whole segments, so an idle log keeps a few of them: they are small.
    pub segment_bytes: u64,
    /// By how much a segment is pre-written at least.
    pub grow_bytes: u64,
    /// Recent entries kept in memory, of all replicas together. What is not yet synced is kept
    /// besides.
    pub cache_bytes: usize,
    /// Past this [`Log::is_overloaded`] asks proposers to wait. Appends are not refused: Raft could
    /// not bear it.
    pub queue_bytes_max: usize,
    /// At most so much is written in one batch, unless one operation alone is larger.
    pub batch_bytes_max: usize,
    /// A replica whose live entries are at most this is rewritten at the end of the log when it
    /// pins old segments.
    pub rebase_bytes_max: u64,
    /// An idle log writes its closing mark after this.
    pub idle_ms: u64,
    /// Below so many free bytes of its disk [`Log::lacks_room`] says so; none: as the disk is
    /// large.
    pub reserve_bytes: Option<u64>,
    /// Makes the writer wait for room on a full disk instead of failing. Nothing is lost: space is
    /// pre-written before records go there, and no waiting record was acknowledged.
    pub waits_for_room: bool,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            expect: Expect::NewOrExisting,
            binding: 0,
            segment_bytes: 16 << 20,
            grow_bytes: 1 << 20,
            cache_bytes: 64 << 20,
            queue_bytes_max: 64 << 20,
            batch_bytes_max: 8 << 20,
            rebase_bytes_max: 1 << 20,
            idle_ms: 20,
            reserve_bytes: None,
            waits_for_room: false,
        }
    }
}

/// The reason why a log does not open. Nothing was changed by the attempt, except after
/// [`OpenLogError::Io`].
#[derive(Debug, thiserror::Error)]
pub enum OpenLogError {
    #[error("cannot open the log: {context}: {source}")]
    Io {
        context: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "the log is damaged: {} at byte {offset}: {reason}. What it held can no longer be trusted, \
         so this node does not start from it. Check the disk, move this node's data directory away \
         and start the node with an empty one: the cluster then replaces its replicas from the \
         other nodes. Do not edit or delete files of the log",
        segment.display()
    )]
    Damaged {
        segment: PathBuf,
        offset: u64,
        reason: String,
    },
    #[error(
        "the log is gone: {} holds no segment, but this node had a log. Put it back, or move this \
         node's data directory away and start the node with an empty one: the cluster then \
         replaces its replicas from the other nodes",
        dir.display()
    )]
    Missing { dir: PathBuf },
    #[error("{} was written by a newer version of this program (record format {format}): start \
        that version", segment.display())]
    UnknownFormat { segment: PathBuf, format: u8 },
}

/// The reason why the log takes no more operations.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reason}")]
pub struct LogFailure {
    pub kind: io::ErrorKind,
    pub reason: Arc<str>,
}

impl LogFailure {
    fn new(error: &io::Error) -> Self {
        Self {
            kind: error.kind(),
            reason: format!("the log failed and takes nothing more: {error}").into(),
        }
    }

    fn closed() -> Self {
        Self {
            kind: io::ErrorKind::BrokenPipe,
            reason: "the log is closed".into(),
        }
    }

    fn to_io(&self) -> io::Error {
        io::Error::new(self.kind, self.clone())
    }
}

/// Says of an I/O error what was attempted.
fn with_context(error: io::Error, context: impl std::fmt::Display) -> io::Error {
    io::Error::new(error.kind(), format!("{context}: {error}"))
}
