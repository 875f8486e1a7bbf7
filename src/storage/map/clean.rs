//! The clean table of a replica: what was last written to its tree, kept in memory for gets.
//!
//! A get costs a look into the tree once its table is written down, and that is several times as
//! long as one into a table. So a table that has been written stays, as a cache, below the frozen
//! ones. It never says anything else than the tree, for any key that no table above it hides: a
//! table that is written later takes its place or is put into it before it leaves the tables
//! above, and whoever puts another map in place of this one drops it.
//!
//! Its memory is part of what the tables of the node may have together
//! ([`MapOptions::node_bytes_max`](super::MapOptions)): tables that are not written down yet
//! take it first. Scans do not look at it, because they have to read the tree anyway.

use std::cmp::Reverse;
use std::sync::Arc;

use super::memtables::{ImmutableMemtable, Memtable};
use super::replica::ReplicaMapInner;
use super::store::MapStoreInner;

/// Changes that are put into a clean table before readers get their turn.
const CHANGES_PER_TURN: usize = 64;

impl ReplicaMapInner {
    /// Takes the oldest frozen table, which the tree has now, away from the tables above it. It
    /// becomes the clean table. One that is much smaller than the clean table is put into that
    /// instead: a single write must not make the gets of all other keys slow.
    ///
    /// Only for whoever has the writer locked.
    pub(super) fn retire_oldest(&self) {
        let Some(oldest) = self.read_memtables().frozen.front().cloned() else {
            return;
        };
        let is_merged = self.merge_into_clean(&oldest.table);
        drop(oldest);

        let mut tables = self.write_memtables();
        let clean_before = tables.clean_bytes();
        let Some(retired) = tables.retire_oldest() else {
            return;
        };
        let retired_bytes = retired.table.bytes();
        let mut dropped = None;
        if !is_merged {
            let is_kept = !retired.table.is_empty() && self.shared.has_room_for_clean();
            dropped = std::mem::replace(&mut tables.clean, is_kept.then_some(retired));
        }
        self.shared
            .clean_bytes
            .replace(clean_before, tables.clean_bytes());
        self.shared.frozen_bytes.replace(retired_bytes, 0);
        drop(tables);

        // Freeing thousands of values takes a while, which is nobody's to wait for.
        drop(dropped);
    }

    /// Puts the changes of a table that was just written to the tree into the clean table, if it is
    /// far smaller than that. False: they are not, or not all of them, and another table has to
    /// take its place. Readers see no difference meanwhile, because `written` is still above.
    fn merge_into_clean(&self, written: &Memtable) -> bool {
        // A large table is cheaper to keep as it is than to merge key by key.
        if 2 * written.bytes() > self.read_memtables().clean_bytes() {
            return false;
        }
        let bytes_max = self.shared.options.table_bytes_max;
        let mut changes = written.iter().peekable();

        while changes.peek().is_some() {
            let mut tables = self.write_memtables();
            // It may have been dropped between two turns, or somebody else holds it for a moment.
            let Some(clean) = tables.clean.as_mut().and_then(Arc::get_mut) else {
                return false;
            };
            let before = clean.table.bytes();
            for (key, change) in changes.by_ref().take(CHANGES_PER_TURN) {
                clean.table.refresh(key, change, bytes_max);
            }
            self.shared.clean_bytes.replace(before, clean.table.bytes());
        }
        true
    }

    /// Lets go of the clean table.
    pub(super) fn drop_clean(&self) {
        let dropped: Option<Arc<ImmutableMemtable>> = {
            let mut tables = self.write_memtables();
            self.shared.clean_bytes.replace(tables.clean_bytes(), 0);
            tables.clean.take()
        };
        drop(dropped);
    }

    /// Returns what the clean table takes.
    pub(super) fn clean_bytes(&self) -> usize {
        self.read_memtables().clean_bytes()
    }
}

impl MapStoreInner {
    /// Returns whether the tables, clean ones among them, have outgrown what they may have
    /// together.
    pub(super) fn wants_clean_dropped(&self) -> bool {
        self.clean_bytes.get() > 0 && !self.has_room_for_clean()
    }

    /// A table that becomes clean was counted before: so what there is decides.
    fn has_room_for_clean(&self) -> bool {
        let unclean = self
            .active_bytes
            .get()
            .saturating_add(self.frozen_bytes.get());
        let tables = unclean.saturating_add(self.clean_bytes.get());
        tables <= self.options.node_bytes_max
    }

    /// Drops clean tables, the largest first, until an eighth of what tables may have is free.
    pub(super) fn relieve_clean(&self) {
        if !self.wants_clean_dropped() {
            return;
        }
        let unclean = self
            .active_bytes
            .get()
            .saturating_add(self.frozen_bytes.get());

        // Some room is left free, or the next table would bring this about again.
        let goal = (self.options.node_bytes_max / 8 * 7).saturating_sub(unclean);
        let mut replicas = self.open_replicas();
        replicas.sort_by_cached_key(|replica| Reverse(replica.clean_bytes()));

        for replica in replicas {
            if self.clean_bytes.get() <= goal {
                break;
            }
            replica.drop_clean();
        }
    }
}
