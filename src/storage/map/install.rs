//! Putting a snapshot of another replica in the place of a map: [`ReplicaMap::prepare`] does what
//! takes long, [`ReplicaMap::install`] the rest.
//!
//! While it is prepared the map serves on, and takes entries. What is prepared is a generation
//! without a record, which nobody believes: a crash leaves the map as it was.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::memtables::Memtables;
use super::open::{self, PreparedMap, TreeFilling};
use super::replica::{ReplicaMap, ReplicaMapInner, TreeWriter};
use crate::sm::ports::StoreError;
use crate::storage::snapshot::Snapshot;

impl ReplicaMap {
    /// Fills a generation with a snapshot that is about to be installed, so that
    /// [`ReplicaMap::install`] takes no time. At most one is prepared: another takes its place.
    /// Does nothing where the map is further. Blocking.
    ///
    /// # Errors
    ///
    /// The map serves on as if nothing had been begun.
    pub fn prepare(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        let replica = &self.replica;
        let mut writer = replica.lock_writer_first();
        replica.check()?;

        // Each prepared map takes the room of a whole one.
        discard(replica, &mut writer);
        if snapshot.applied().log_id <= replica.read_memtables().applied.log_id {
            return Ok(());
        }

        let trees = &*replica.shared.trees;
        let generation = next_generation(replica, &writer)?;
        let filling = open::fill_generation(trees, replica.key, generation, snapshot);
        // What was begun is no good to anybody.
        let filling = filling.inspect_err(|_| open::drop_one(trees, replica.key, generation))?;
        writer.prepared = Some(PreparedMap {
            snapshot: snapshot.clone(),
            filling,
        });
        Ok(())
    }

    /// Makes a received snapshot the map: its file durable under its name, a generation filled from
    /// it unless one is prepared, and one switch. Nothing of the old map is seen any more;
    /// [`ReplicaMap::tidy`] has it removed. Blocking.
    ///
    /// # Errors
    ///
    /// The old map serves on, unless the replica has failed.
    pub fn install(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        let replica = &self.replica;
        let mut writer = replica.lock_writer_first();
        replica.check()?;

        // What was applied is not applied again, so a map that goes back would lack entries.
        if snapshot.applied().log_id < replica.read_memtables().applied.log_id {
            return Err(StoreError::Damaged(format!(
                "{}: a snapshot older than what is applied was to be installed",
                replica.key
            )));
        }
        // In one step for whoever has just built one: it would take this file for an older one, and
        // remove it.
        {
            let mut current_snapshot = replica.lock_current_snapshot();
            snapshot.publish(replica.key)?;
            *current_snapshot = Some(snapshot.clone());
        }

        // A prepared map makes the switch quick; without one the voter is silent while it is
        // filled.
        let filled = match writer.prepared.take_if(|prepared| prepared.is_of(snapshot)) {
            Some(prepared) => Ok(prepared.filling),
            None => {
                discard(replica, &mut writer);
                let generation = next_generation(replica, &writer)?;
                open::fill_generation(&*replica.shared.trees, replica.key, generation, snapshot)
            }
        };
        let finished = filled.and_then(TreeFilling::finish);
        let (tree, record, map_bytes) = finished
            .inspect_err(|error| replica.fail(&format!("installing a snapshot: {error}")))?;
        assert_eq!(
            record.applied,
            *snapshot.applied(),
            "{}: a tree was filled from another snapshot",
            replica.key
        );

        // A copy of the old tree is of no use any more.
        writer.record = record.clone();
        writer.copy = None;
        replica.set_map_bytes(map_bytes);
        drop(replica.switch(Memtables::new(tree, record.applied)));
        replica
            .shared
            .counters
            .snapshots_installed
            .fetch_add(1, Ordering::Relaxed);
        replica.shared.changed.notify_waiters();
        Ok(())
    }

    /// Removes what an installation has left: the old map, older snapshot files, and what was
    /// prepared and not installed. What remains is found by the next start. Blocking.
    pub fn tidy(&self) -> Result<(), StoreError> {
        let replica = &self.replica;
        let mut writer = replica.lock_writer_last();
        replica.check()?;
        discard(replica, &mut writer);
        let trees = &*replica.shared.trees;

        // A copy that is being made is a generation of its own, and must not be dropped.
        if writer.copy.is_none() {
            let generations = open::generations(trees, replica.key)?;
            open::drop_others(trees, replica.key, &generations, writer.record.generation);
        }
        replica.remove_old_snapshots()
    }
}

/// Drops what was prepared, if anything was.
fn discard(replica: &ReplicaMapInner, writer: &mut TreeWriter) {
    if let Some(prepared) = writer.prepared.take() {
        let generation = prepared.filling.generation();
        drop(prepared);
        open::drop_one(&*replica.shared.trees, replica.key, generation);
    }
}

/// Returns a generation that there is no tree of.
fn next_generation(replica: &Arc<ReplicaMapInner>, writer: &TreeWriter) -> Result<u64, StoreError> {
    let generations = open::generations(&*replica.shared.trees, replica.key)?;
    Ok(generations
        .first()
        .copied()
        .unwrap_or(0)
        .max(writer.record.generation)
        + 1)
}
