//! Gives back the space that overwritten and deleted values leave in the trees: what is left of the
//! trees is copied to a fresh place, and the old place goes with its last tree.
//!
//! One replica after another, while it serves and is written to:
//! 1. A new generation of its tree is begun in the fresh place.
//! 2. Pages of pairs are copied to it, each with the writer locked, so that the tree stands still;
//!    between two pages others have their turn. A checkpoint meanwhile writes to both trees what is
//!    before the place that the copy has come to.
//! 3. With the last page the copy has the digest of the tree, or one of them is damaged. It gets
//!    its record and is flushed; then it takes the tree's place under the same tables, and the old
//!    generation is dropped.
//!
//! A crash leaves a copy without a record, which nobody believes, or two true generations, of which
//! the higher counts. Whoever puts another tree in place meanwhile, as an installation does, ends
//! the copy.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::digest::{Digest, PairHasher};
use super::open;
use super::record::{CORE_KEYS_START, RECORD_KEY, TreeRecord, tree_name};
use super::replica::{ReplicaMapInner, TreeWriter};
use super::store::{MapStore, MapStoreInner};
use super::tree_walks::TreeCopy;
use crate::sm::ports::StoreError;
use crate::storage::ReplicaKey;

/// Of what a place takes, so many parts may be garbage for one that is not. Copying then costs a
/// fraction of what was written since the last time.
const GARBAGE_FACTOR: u64 = 3;
/// Pages between two flushes of the copy: the trees keep in memory what is not flushed. Then it is
/// seen, too, whether there is still room for the rest.
const PAGES_UNFLUSHED_MAX: u32 = 32;

/// The outcome of copying a tree.
#[derive(Debug, PartialEq, Eq)]
enum Copied {
    /// It is in the tree's place.
    Switched,
    /// Another tree took its place first, or it was told to end.
    Ended,
}

impl MapStore {
    /// Returns whether [`MapStore::compact`] has something to do.
    pub fn wants_compaction(&self) -> Result<bool, StoreError> {
        Ok(is_due(self.shared()) || !self.shared().trees.outdated()?.is_empty())
    }

    /// Copies all trees to a fresh place where they take far more space than what is in them, and
    /// goes on with what an earlier call has left. `stored` are the replicas that this node has: a
    /// tree of another was to be dropped and is. Blocking, and long; returns early once `keep_on`
    /// says no more. An error leaves the trees in use where they were.
    pub fn compact(
        &self,
        stored: &[ReplicaKey],
        keep_on: &dyn Fn() -> bool,
    ) -> Result<(), StoreError> {
        let shared = self.shared();
        let trees = &*shared.trees;
        if trees.outdated()?.is_empty() {
            if !is_due(shared) {
                return Ok(());
            }
            drop_orphans(shared, stored)?;
            let open: BTreeSet<String> = shared
                .open_replicas()
                .iter()
                .map(|replica| replica.key.to_string())
                .collect();
            if !trees
                .names()?
                .iter()
                .all(|name| open.contains(owner_of(name)))
            {
                // The old place would stay for the tree that nobody can copy.
                return Ok(());
            }
            trees.begin_fresh(shared.live_bytes())?;
        }

        // An orphan left in the old place would keep all of it on the disk.
        drop_orphans(shared, stored)?;
        let before = trees.disk_bytes();
        for replica in shared.weak_replicas() {
            // One that was closed meanwhile must not wait for its turn with its tables and its
            // name.
            let Some(replica) = replica.upgrade().filter(|replica| replica.check().is_ok()) else {
                continue;
            };
            if keep_on() && copy_if_outdated(&replica, keep_on)? == Some(Copied::Switched) {
                shared.counters.trees_copied.fetch_add(1, Ordering::Relaxed);
            }
        }
        if trees.outdated()?.is_empty() {
            let after = trees.disk_bytes();
            shared.compacted_bytes.store(after, Ordering::Relaxed);
            tracing::info!(
                before,
                after,
                "the trees of the maps were copied to give back the space of what was overwritten \
                and deleted"
            );
        }
        Ok(())
    }
}

/// Returns true if the trees take so much more than their contents that copying pays. They must
/// also have grown to twice their size after the last copy.
fn is_due(shared: &MapStoreInner) -> bool {
    let disk = shared.trees.disk_bytes();
    shared.trees_disk_bytes.store(disk, Ordering::Relaxed);
    let allowed = GARBAGE_FACTOR
        .saturating_mul(shared.live_bytes())
        .saturating_add(shared.options.garbage_bytes_max);
    disk > allowed && disk / 2 > shared.compacted_bytes.load(Ordering::Relaxed)
}

/// The replica that a tree of this name is of, as its key is shown.
fn owner_of(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(owner, _)| owner)
}

/// Drops the trees of replicas that are gone: a crash may have brought one back that was dropped.
fn drop_orphans(shared: &MapStoreInner, stored: &[ReplicaKey]) -> Result<(), StoreError> {
    // The names first: a tree that is there by now is of a replica that was claimed before.
    let names = shared.trees.names()?;
    let claimed = shared.claimed();
    let known: BTreeSet<String> = stored
        .iter()
        .chain(&claimed)
        .map(ToString::to_string)
        .collect();
    for name in names.iter().filter(|name| !known.contains(owner_of(name))) {
        tracing::info!(tree = %name, "the tree of a replica that is gone was dropped");
        shared.trees.drop_tree(name)?;
    }
    Ok(())
}

/// Copies the tree of a replica, if it is in an old place, and drops what else the replica has
/// there. None: there was nothing to copy.
fn copy_if_outdated(
    replica: &Arc<ReplicaMapInner>,
    keep_on: &dyn Fn() -> bool,
) -> Result<Option<Copied>, StoreError> {
    let trees = &*replica.shared.trees;
    let outdated = trees.outdated()?;
    let is_outdated = |generation: u64| outdated.contains(&tree_name(replica.key, generation));
    let generation = replica.lock_writer_last().record.generation;
    let copied = match is_outdated(generation) {
        true => Some(copy(replica, keep_on)?),
        false => None,
    };
    if copied != Some(Copied::Ended) {
        // Listed before the lock, so one that is begun from here on is not taken for garbage.
        let generations = open::generations(trees, replica.key)?;
        let writer = replica.lock_writer_last();
        let (current, is_prepared) = (writer.record.generation, writer.prepared.is_some());
        drop(writer);
        // One that is to take the tree's place has no record yet; whoever prepared it removes the
        // rest.
        if !is_prepared {
            open::drop_others(trees, replica.key, &generations, current);
        }
    }
    Ok(copied)
}

fn copy(replica: &Arc<ReplicaMapInner>, keep_on: &dyn Fn() -> bool) -> Result<Copied, StoreError> {
    let generation = begin(replica)?;
    let mut pages = 0;
    let copied = loop {
        if !keep_on() {
            break Ok(Copied::Ended);
        }
        let mut writer = replica.lock_writer_last();
        // What waits to be written would else wait for the end of the copy: whoever finds the
        // writer taken goes away.
        if let Err(error) = replica.checkpoint_ready(&mut writer) {
            break if replica.is_wiped() {
                Ok(Copied::Ended)
            } else {
                Err(error)
            };
        }
        match step(replica, &mut writer, generation, &mut pages) {
            Ok(None) => {}
            Ok(Some(copied)) => break Ok(copied),
            Err(error) => break Err(error),
        }
    };

    // Only if it is still this copy: an installation may have ended it, and another may have begun.
    if !matches!(copied, Ok(Copied::Switched)) {
        let mut writer = replica.lock_writer_last();
        if writer
            .copy
            .take_if(|copy| copy.generation == generation)
            .is_some()
        {
            replica
                .shared
                .trees
                .drop_tree(&tree_name(replica.key, generation))?;
        }
    }
    copied
}

/// Begins a copy as a new generation, which it returns.
fn begin(replica: &Arc<ReplicaMapInner>) -> Result<u64, StoreError> {
    let trees = &*replica.shared.trees;
    let mut writer = replica.lock_writer_last();
    replica.check()?;
    // The place may have been begun long ago, when there was more.
    trees.ensure_room(replica.map_bytes())?;
    let newest = open::generations(trees, replica.key)?
        .first()
        .copied()
        .unwrap_or(0);
    let generation = newest.max(writer.record.generation) + 1;
    let tree = trees.open(&tree_name(replica.key, generation))?;
    let next = Bytes::from_static(CORE_KEYS_START);
    let (digest, hasher) = (Digest::default(), PairHasher::default());
    writer.copy = Some(TreeCopy {
        tree,
        generation,
        next,
        bytes: 0,
        digest,
        hasher,
    });
    Ok(generation)
}

/// Copies one page, and ends the copy after the last. None: there is more.
fn step(
    replica: &Arc<ReplicaMapInner>,
    writer: &mut TreeWriter,
    generation: u64,
    pages: &mut u32,
) -> Result<Option<Copied>, StoreError> {
    // An installation may have put another tree in place between two pages.
    let Some(copy) = writer
        .copy
        .as_mut()
        .filter(|copy| copy.generation == generation)
    else {
        return Ok(Some(Copied::Ended));
    };
    let tree = replica.read_memtables().tree.clone();
    let is_more = copy.copy_page(&*tree, replica.shared.options.copy_page_pairs)?;
    *pages += 1;
    if pages.is_multiple_of(PAGES_UNFLUSHED_MAX) {
        copy.tree.flush()?;
        replica
            .shared
            .trees
            .ensure_room(replica.map_bytes().saturating_sub(copy.bytes))?;
    }
    if is_more {
        return Ok(None);
    }

    // All pages together are the whole tree. If they differ from its digest, one of both is
    // damaged.
    if copy.digest != writer.record.digest {
        let error = StoreError::Damaged(format!(
            "the tree of {} no longer matches its digest",
            replica.key
        ));
        replica.fail(&error.to_string());
        return Err(error);
    }

    // The record comes last and is flushed before the switch: until then nobody believes the copy.
    let record = TreeRecord {
        generation,
        ..writer.record.clone()
    };
    copy.tree.write(RECORD_KEY, Some(&record.encode()))?;
    copy.tree.flush()?;
    replica.write_memtables().tree = copy.tree.clone();
    writer.record = record;
    writer.copy = None;
    Ok(Some(Copied::Switched))
}
