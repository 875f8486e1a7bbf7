//! [`MapRead`]: reading a map whose tree may have to wait for the disk, without holding up anybody
//! else.
//!
//! Two things must not wait for the disk: the threads that serve, which carry the heartbeats of all
//! groups, and the lock of the tables, which apply needs. So
//! - a read that may wait runs on a thread of its own, of which there are a bounded number
//!   ([`Readers`]);
//! - before it takes the lock it is done once without ([`Preview`]), and its result thrown away:
//!   what it looks at is in the tree's cache then, and what is read under the lock waits for
//!   nothing.
//!
//! Whether single keys may wait is measured ([`DiskWaits`]): while what they need is in memory they
//! are read where they are asked for. Nothing is said of the results here: those come of one guard,
//! as if there was no disk.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::disk_waits::ReadKind;
use super::memtables::{Memtables, ReadGuard};
use super::record::{RESERVED, core_keys};
use super::replica::{ReplicaMap, ReplicaMapInner};
use super::store::MapStoreInner;
use crate::sm::ports::{Direction, Items, KeyRange, Layered, Pairs, Read, StoreError, ValueStart};
use crate::storage::tree::Tree;

/// Most pairs that are read from the tree at once without the lock.
const PREVIEW_PAIRS_MAX: usize = 64;
const PREVIEW_BYTES_MAX: usize = 64 << 10;

impl MapStoreInner {
    /// Returns whether the cache of the trees may not hold all of them.
    fn outgrows_cache(&self) -> bool {
        // A pair costs the cache more than its bytes.
        self.live_bytes() > self.options.cache_bytes / 2
    }

    fn note_read(&self, took: Duration) {
        // While the cache holds all maps, a slow read was held up by something else than the disk.
        if self.disk_waits.note(took) && self.outgrows_cache() {
            if !self.disk_waits.is_elsewhere() {
                tracing::debug!(
                    "reads of the maps wait for the disk, and do so off the threads that serve"
                );
            }
            self.disk_waits.go_elsewhere();
        }
    }
}

impl ReplicaMap {
    /// Returns whether reads of this kind may wait for the disk: those are to be done by
    /// [`ReplicaMap::read_elsewhere`].
    pub fn reads_wait(&self, kind: ReadKind) -> bool {
        let shared = &self.replica.shared;
        match kind {
            ReadKind::Keys | ReadKind::Entry => shared.disk_waits.is_elsewhere(),
            ReadKind::Page => shared.outgrows_cache(),
        }
    }

    /// Reads the map here, under one guard, and notes how long that took.
    pub fn read_here<T>(&self, work: impl FnOnce(&MapRead<'_>) -> T) -> T {
        let started = Instant::now();
        let done = work(&MapRead::Pinned(self.read()));
        self.replica.shared.note_read(started.elapsed());
        done
    }

    /// Reads the map on another thread, where it may wait for the disk. `work` is called twice, and
    /// what it returns first is dropped: it must change nothing.
    pub async fn read_elsewhere<T: Send + 'static>(
        &self,
        kind: ReadKind,
        work: impl Fn(&MapRead<'_>) -> T + Send + 'static,
    ) -> T {
        let state = self.clone();
        let read = move || {
            state.preview(&work);
            work(&MapRead::Pinned(state.read()))
        };
        self.replica.shared.readers.run(kind, read).await
    }

    /// Reads the map under one guard: here if nothing is waited for, else on another thread. See
    /// [`ReplicaMap::read_elsewhere`] for what is asked of `work`.
    pub async fn read_in<T: Send + 'static>(
        &self,
        kind: ReadKind,
        work: impl Fn(&MapRead<'_>) -> T + Send + 'static,
    ) -> T {
        if self.reads_wait(kind) {
            self.read_elsewhere(kind, work).await
        } else {
            self.read_here(work)
        }
    }

    /// Brings what `work` looks at into the cache of the tree, with no lock held while the disk is
    /// waited for. Blocking.
    pub fn preview<T>(&self, work: impl FnOnce(&MapRead<'_>) -> T) {
        let started = Instant::now();
        drop(work(&MapRead::Preview(Preview {
            replica: self.replica.clone(),
        })));
        self.replica.shared.note_read(started.elapsed());
    }

    /// Does `work` where it may wait for the disk. Of each kind a bounded number runs at a time.
    pub async fn elsewhere<T: Send + 'static>(
        &self,
        kind: ReadKind,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.replica.shared.readers.run(kind, work).await
    }

    /// Has reads wait for the disk, as far as anybody knows.
    #[cfg(test)]
    pub fn expect_waits(&self) {
        self.replica.shared.disk_waits.go_elsewhere();
    }
}

/// A map that is read.
pub enum MapRead<'a> {
    /// As it is at one moment.
    Pinned(ReadGuard<'a>),
    /// As it is while it is read: for a look ahead.
    Preview(Preview),
}

/// The map with no lock held but for moments. Each value is one that the map had, of a moment
/// between the beginning of the read and its end; where nothing is applied meanwhile, all of it is
/// as under one guard.
pub struct Preview {
    replica: Arc<ReplicaMapInner>,
}

impl Preview {
    fn tables<T>(&self, look: impl FnOnce(&ReadGuard<'_>) -> T) -> T {
        look(&ReadGuard {
            tables: self.replica.read_memtables(),
        })
    }

    /// Returns what the tables say of `key`, or where else to look.
    fn find<V>(
        &self,
        key: &[u8],
        seen: impl FnOnce(&Bytes) -> V,
    ) -> Result<Option<V>, Arc<dyn Tree>> {
        self.tables(|guard| match guard.change_of(key) {
            Some(change) => Ok(change.as_ref().map(seen)),
            None => Err(guard.tables.tree.clone()),
        })
    }

    /// `seen` makes of a value of the tables what the caller is to see of it; `of_tree` scans the
    /// tree; `weigh` says how many bytes an item has.
    fn scan_as<'a, V: 'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        seen: impl Fn(&Bytes) -> V + Copy + 'a,
        of_tree: impl for<'t> Fn(&'t dyn Tree, &KeyRange) -> Items<'t, V> + 'a,
        weigh: fn(&V) -> usize,
    ) -> Items<'a, V> {
        let range = core_keys(range);
        if range.is_empty() {
            return Box::new(std::iter::empty());
        }

        // Changes in memory are copied under the lock. The tree is read without it, as that may
        // wait.
        let (layers, tree) = self.tables(|guard| {
            let tables: &Memtables = &guard.tables;
            let changes = tables
                .above()
                .map(|table| table.range(&range, direction, seen).collect());
            (changes.collect::<Vec<Vec<_>>>(), tables.tree.clone())
        });
        let batches = Batches {
            tree,
            of_tree,
            weigh,
            rest: Some(range),
            direction,
            pairs_max: 1,
        };
        let mut items: Items<'a, V> = Box::new(batches.flatten());
        for layer in layers.into_iter().filter(|layer| !layer.is_empty()) {
            items = Box::new(Layered::new(Box::new(layer.into_iter()), items, direction));
        }
        items
    }
}

/// The pairs of a tree, a few at a time.
struct Batches<V, F> {
    tree: Arc<dyn Tree>,
    of_tree: F,
    weigh: fn(&V) -> usize,
    rest: Option<KeyRange>,
    direction: Direction,
    pairs_max: usize,
}

impl<V, F> Iterator for Batches<V, F>
where
    F: for<'t> Fn(&'t dyn Tree, &KeyRange) -> Items<'t, V>,
{
    type Item = VecDeque<Result<(Bytes, V), StoreError>>;

    fn next(&mut self) -> Option<Self::Item> {
        let range = self.rest.take()?;
        let (mut batch, mut bytes) = (VecDeque::new(), 0);
        for item in (self.of_tree)(&*self.tree, &range) {
            let Ok((key, value)) = &item else {
                // Nothing comes after an error.
                batch.push_back(item);
                return Some(batch);
            };
            bytes += key.len() + (self.weigh)(value);
            let is_last = batch.len() + 1 >= self.pairs_max || bytes >= PREVIEW_BYTES_MAX;
            if is_last {
                self.rest = Some(match self.direction {
                    Direction::Forward => {
                        let start = [&key[..], &[0]].concat().into();
                        KeyRange {
                            start,
                            end: range.end.clone(),
                        }
                    }
                    Direction::Reverse => KeyRange {
                        start: range.start.clone(),
                        end: Some(key.clone()),
                    },
                });
            }
            batch.push_back(item);
            if is_last {
                break;
            }
        }

        // Small at first, because most readers stop after a pair or two.
        self.pairs_max = (self.pairs_max * 4).min(PREVIEW_PAIRS_MAX);
        self.rest = self.rest.take().filter(|rest| !rest.is_empty());
        (!batch.is_empty()).then_some(batch)
    }
}

fn is_reserved(key: &[u8]) -> bool {
    key.first().is_none_or(|byte| *byte == RESERVED)
}

impl Read for Preview {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        if is_reserved(key) {
            return Ok(None);
        }
        self.find(key, Bytes::clone).or_else(|tree| tree.get(key))
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        if is_reserved(key) {
            return Ok(None);
        }
        self.find(key, |value| ValueStart::from_value(value, bytes_max))
            .or_else(|tree| tree.start_of(key, bytes_max))
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        self.scan_as(
            range,
            direction,
            Bytes::clone,
            move |tree, range| tree.scan(range, direction),
            Bytes::len,
        )
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        let start = move |value: &Bytes| ValueStart::from_value(value, bytes_max);
        self.scan_as(
            range,
            direction,
            start,
            move |tree, range| tree.scan_starts(range, direction, bytes_max),
            |value| value.start.len(),
        )
    }
}

impl Read for MapRead<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        match self {
            MapRead::Pinned(guard) => guard.get(key),
            MapRead::Preview(preview) => preview.get(key),
        }
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        match self {
            MapRead::Pinned(guard) => guard.start_of(key, bytes_max),
            MapRead::Preview(preview) => preview.start_of(key, bytes_max),
        }
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        match self {
            MapRead::Pinned(guard) => guard.scan(range, direction),
            MapRead::Preview(preview) => preview.scan(range, direction),
        }
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        match self {
            MapRead::Pinned(guard) => guard.scan_starts(range, direction, bytes_max),
            MapRead::Preview(preview) => preview.scan_starts(range, direction, bytes_max),
        }
    }
}
