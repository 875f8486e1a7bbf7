//! The map of each replica: tables in memory over a tree, written down by checkpoints, and rebuilt
//! from a snapshot file when the tree is not what it should be.
//!
//! One change, step by step:
//! 1. [`ReplicaMap::apply`] puts a batch into the active table (`tables`) and moves `applied` on.
//!    Reads go through the tables to the tree.
//! 2. A full table is frozen, and waits until the log is durable through what was applied
//!    ([`Synced`]): a tree must never be ahead of the log, which may yet lose its unsynced end.
//! 3. The [`Checkpointer`] writes it to the tree pair by pair, and then the tree's record
//!    (`record`): applied log id, membership, and the digest (`digest`) of all pairs, kept up by
//!    taking the hashes of old pairs out and putting those of new ones in. Before the first pair
//!    all of it goes to a file (`redo`), by which a start finishes a checkpoint that was cut short.
//!    The table then stays for gets (`clean`).
//! 4. [`ReplicaMap::build_snapshot`] holds the replica's writer locked, so that the tree stands
//!    still, and copies it to a snapshot file. Past a limit of tables waiting meanwhile it gives
//!    up, lets them be written, and begins anew; the third time the writers wait instead.
//! 5. [`ReplicaMap::prepare`] fills a new generation of the tree from a received file, and
//!    [`ReplicaMap::install`] publishes the file and switches in one step: the record comes last,
//!    and the highest generation with a true record is the tree.
//! 6. [`ReplicaMap::check_tree`] reads the tree again, page by page, and finds what has rotted in
//!    it (`tree_check`).
//! 7. Trees that take far more space than what is in them are copied to a fresh place by
//!    [`MapStore::compact`] (`compaction`).
//!
//! # Why a tree is believed
//! Durable are the log and the snapshot file. The tree is believed at a start only if all its pairs
//! add up to the digest in its record and it is no older than the snapshot file; else it is
//! rebuilt. That covers a crash of the process (the tree comes back as it was when a checkpoint had
//! ended: a true older state, and the log still holds what follows, because it is purged only up to
//! the snapshot file; or in the middle of the last checkpoint, which the redo file then finishes),
//! and also a power cut, which may tear the unsynced files in any way: either it comes back like
//! that all the same, or the digest does not hold (by accident: one in 2^128). So no mark of the
//! machine's boot is needed to tell the two crashes apart.
//!
//! Kept out: the log, and when a snapshot is due (both the caller's); what the pairs mean (the
//! core's).

mod clean;
mod compaction;
pub mod digest;
mod disk_waits;
mod errors;
#[cfg(test)]
pub(crate) mod fuzz;
mod install;
mod memtables;
mod open;
mod reading;
mod record;
mod redo;
mod replica;
mod scan;
mod scrub;
mod store;
mod tree_check;
mod tree_walks;

#[cfg(test)]
mod clean_tests;
#[cfg(test)]
mod compaction_tests;
#[cfg(test)]
mod concurrency_tests;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod reading_tests;
#[cfg(test)]
mod scrub_tests;
#[cfg(test)]
mod sled_tests;
#[cfg(test)]
mod tests;

use std::io;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::disk_waits::ReadKind;
pub use self::memtables::ReadGuard;
pub use self::open::{Opened, Origin};
pub use self::reading::MapRead;
pub use self::replica::{MemtableBytes, ReplicaMap};
pub use self::store::{Checkpointer, MapMetrics, MapStore};
use crate::types::LogId;

/// Through where the log was applied, and what the last membership in that part was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub log_id: Option<LogId>,
    /// Opaque here.
    pub membership: Bytes,
}

/// Called once the log is durable through an id, or never will be.
pub type OnSynced = Box<dyn FnOnce(io::Result<()>) + Send>;

/// The log's side of a checkpoint.
pub trait Synced: Send + Sync {
    /// Calls `done` once the log is durable through `log_id`: at once if it is. An error says that
    /// the log has failed.
    fn on_synced(&self, log_id: LogId, done: OnSynced);
}

/// Limits on memory and disk space. All limits are in bytes of keys, values and their overhead.
#[derive(Debug, Clone)]
pub struct MapOptions {
    /// A table this large is frozen: what a checkpoint writes, and at most what a start applies
    /// again from the log per replica.
    pub table_bytes_max: usize,
    /// Frozen tables of one replica past which [`ReplicaMap::wait_room`] waits; past half of it a
    /// snapshot scan gives up.
    pub frozen_bytes_max: usize,
    /// Tables of all replicas. Past half of it in active tables, the largest are frozen before they
    /// are full. Clean tables have what the others leave.
    pub node_bytes_max: usize,
    /// Bytes that the trees of the node may take on the disk beyond a multiple of their contents,
    /// before they are copied to a fresh place.
    pub garbage_bytes_max: u64,
    /// Pairs that are copied there, or read again, at a time.
    pub copy_page_pairs: usize,
    /// Memory that the trees use as a cache.
    pub cache_bytes: u64,
}

impl Default for MapOptions {
    fn default() -> Self {
        Self {
            table_bytes_max: 16 << 20,
            frozen_bytes_max: 128 << 20,
            node_bytes_max: 256 << 20,
            garbage_bytes_max: 32 << 20,
            copy_page_pairs: 512,
            cache_bytes: 64 << 20,
        }
    }
}
