//! The tables over a tree, and [`ReadGuard`], which reads through them.
//!
//! Order of belief: the active table, the frozen ones from the newest to the oldest, the tree. While a frozen table is being written
//! to the tree it stays above it, so a reader sees the same whether a key is written yet or not. A table leaves only under the write
//! lock, after its whole batch is in the tree; so within one guard nothing changes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLockReadGuard};

use bytes::Bytes;

use super::Applied;
use super::record::{CORE_KEYS_START, RESERVED};
use crate::sm::ports::{Changes, Direction, KeyRange, Layered, Pairs, Read, StoreError, WriteBatch};
use crate::storage::tree::Tree;

/// What a change costs in memory beyond its bytes: two handles, their allocations, its share of a node of the map.
const CHANGE_OVERHEAD_BYTES: usize = 160;

/// Changes in key order that are not in the tree yet.
#[derive(Default)]
pub struct Table {
    changes: BTreeMap<Bytes, Option<Bytes>>,
    bytes: usize,
}

impl Table {
    pub fn apply(&mut self, batch: WriteBatch) {
        for (key, change) in batch {
            let key_bytes = key.len();
            self.bytes += change.as_ref().map_or(0, Bytes::len);
            match self.changes.insert(key, change) {
                None => self.bytes += key_bytes + CHANGE_OVERHEAD_BYTES,
                Some(old) => self.bytes -= old.map_or(0, |value| value.len()),
            }
        }
    }

    /// What it costs in memory, nearly.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Bytes, &Option<Bytes>)> {
        self.changes.iter()
    }

    fn range<'a>(&'a self, range: &KeyRange, direction: Direction) -> Changes<'a> {
        let changes = self.changes.range::<[u8], _>(range.bounds()).map(|(key, change)| (key.clone(), change.clone()));
        match direction {
            Direction::Forward => Box::new(changes),
            Direction::Reverse => Box::new(changes.rev()),
        }
    }
}

/// A table that takes no more changes, on its way to the tree.
pub struct Frozen {
    pub table: Table,
    /// What was applied when it was frozen.
    pub applied: Applied,
    /// The log is durable through `applied`: from now on the table may be written.
    pub synced: AtomicBool,
}

impl Frozen {
    pub fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }
}

/// A replica's whole map.
pub struct Tables {
    pub active: Table,
    /// Oldest first.
    pub frozen: VecDeque<Arc<Frozen>>,
    pub frozen_bytes: usize,
    pub tree: Arc<dyn Tree>,
    /// What the tree has.
    pub tree_applied: Applied,
    /// What the map has: the tree, the frozen tables and the active one.
    pub applied: Applied,
}

impl Tables {
    pub fn new(tree: Arc<dyn Tree>, applied: Applied) -> Self {
        let tree_applied = applied.clone();
        Self { active: Table::default(), frozen: VecDeque::new(), frozen_bytes: 0, tree, tree_applied, applied }
    }

    /// Freezes the active table, also an empty one: it still carries what was applied.
    pub fn freeze(&mut self) -> Arc<Frozen> {
        let table = std::mem::take(&mut self.active);
        self.frozen_bytes += table.bytes();
        let frozen = Arc::new(Frozen { table, applied: self.applied.clone(), synced: AtomicBool::new(false) });
        self.frozen.push_back(frozen.clone());
        frozen
    }

    /// Takes the oldest frozen table away: it is in the tree.
    pub fn retire_oldest(&mut self) -> Option<Arc<Frozen>> {
        let frozen = self.frozen.pop_front()?;
        self.frozen_bytes -= frozen.table.bytes();
        self.tree_applied = frozen.applied.clone();
        Some(frozen)
    }
}

/// The map at one point in time. While it lives nothing is applied: read what is wanted and let go.
/// Never take two on one thread: a writer waiting between them blocks both.
pub struct ReadGuard<'a> {
    pub(super) tables: RwLockReadGuard<'a, Tables>,
}

impl ReadGuard<'_> {
    /// What the map that it shows has applied.
    pub fn applied(&self) -> &Applied {
        &self.tables.applied
    }
}

impl Read for ReadGuard<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        if key.first().is_none_or(|byte| *byte == RESERVED) {
            return Ok(None);
        }
        let tables = &*self.tables;
        let frozen = tables.frozen.iter().rev().map(|frozen| &frozen.table);
        for table in std::iter::once(&tables.active).chain(frozen) {
            if let Some(change) = table.changes.get(key) {
                return Ok(change.clone());
            }
        }
        tables.tree.get(key)
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        let start = range.start.clone().max(Bytes::from_static(CORE_KEYS_START));
        let range = KeyRange { start, end: range.end.clone() };
        if range.is_empty() {
            return Box::new(std::iter::empty());
        }
        let tables = &*self.tables;
        let above = tables.frozen.iter().map(|frozen| &frozen.table).chain(std::iter::once(&tables.active));
        let mut pairs = tables.tree.scan(&range, direction);
        for table in above.filter(|table| !table.is_empty()) {
            pairs = Box::new(Layered::new(table.range(&range, direction), pairs, direction));
        }
        pairs
    }
}
