//! The tables over a tree, and [`ReadGuard`], which reads through them.
//!
//! Order of belief: the active table, the frozen ones from the newest to the oldest, the tree.
//! While a frozen table is being written to the tree it stays above it, so a reader sees the same
//! whether a key is written yet or not. A table leaves only under the write lock, after its whole
//! batch is in the tree; so within one guard nothing changes. The clean table (`clean`) lies
//! between: it says what the tree says, and is asked first because it is in memory.

use parking_lot::RwLockReadGuard;
use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{self, AtomicBool};

use bytes::Bytes;

use super::Applied;
use super::record::{RESERVED, core_keys};
use crate::sm::ports::{
    Changes, Direction, Items, KeyRange, Layered, Pairs, Read, StoreError, ValueStart, WriteBatch,
};
use crate::storage::tree::Tree;

/// Bytes of memory that a change takes beyond its own: two handles, their allocations, its share of
/// a node of the map.
const CHANGE_OVERHEAD_BYTES: usize = 160;

/// Changes in key order that are not in the tree yet, or that a clean table remembers.
#[derive(Default)]
pub struct Memtable {
    changes: BTreeMap<MemtableKey, Option<Bytes>>,
    bytes: usize,
}

impl Memtable {
    pub fn apply(&mut self, batch: WriteBatch) {
        for (key, change) in batch {
            let key_bytes = key.len();
            self.bytes += change.as_ref().map_or(0, Bytes::len);

            // A key that is replaced keeps its place, so only its value counts anew.
            match self.changes.insert(MemtableKey::new(key), change) {
                None => self.bytes += key_bytes + CHANGE_OVERHEAD_BYTES,
                Some(old) => self.bytes -= old.map_or(0, |value| value.len()),
            }
        }
    }

    /// Has a clean table say of `key` what a later one says. Where there is no room for that, it
    /// says nothing of the key any more.
    pub fn refresh(&mut self, key: &Bytes, change: &Option<Bytes>, bytes_max: usize) {
        let cost = |change: &Option<Bytes>| {
            let value_bytes = change.as_ref().map_or(0, Bytes::len);
            key.len() + CHANGE_OVERHEAD_BYTES + value_bytes
        };

        // Out first: without room for the new value, the old one would be wrong.
        if let Some(old) = self.changes.remove(&Probe::new(key) as &dyn Keyed) {
            self.bytes -= cost(&old);
        }
        if self.bytes + cost(change) <= bytes_max {
            self.bytes += cost(change);
            self.changes
                .insert(MemtableKey::new(key.clone()), change.clone());
        }
    }

    /// Returns approximately the bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Bytes, &Option<Bytes>)> {
        self.changes
            .iter()
            .map(|(key, change)| (&key.bytes, change))
    }

    fn get(&self, probe: &Probe<'_>) -> Option<&Option<Bytes>> {
        self.changes.get(probe as &dyn Keyed)
    }

    /// The changes in `range`. `seen` makes of a value what the caller is to see of it.
    pub fn range<'a, V: 'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        seen: impl Fn(&Bytes) -> V + 'a,
    ) -> Changes<'a, V> {
        let (start, end) = range.bounds();
        let (start, end) = (start.map(Probe::new), end.map(Probe::new));
        let bounds = (
            start.as_ref().map(Probe::as_keyed),
            end.as_ref().map(Probe::as_keyed),
        );
        let changes = self
            .changes
            .range::<dyn Keyed, _>(bounds)
            .map(move |(key, change)| (key.bytes.clone(), change.as_ref().map(&seen)));
        match direction {
            Direction::Forward => Box::new(changes),
            Direction::Reverse => Box::new(changes.rev()),
        }
    }
}

/// A key with its first eight bytes at hand. They hold tag, slot and the beginning of the user's
/// key, so most comparisons on the way through the map need not follow the pointer to the rest,
/// which is nearly always a miss of the processor's cache.
struct MemtableKey {
    head: u64,
    bytes: Bytes,
}

impl MemtableKey {
    fn new(bytes: Bytes) -> Self {
        Self {
            head: head(&bytes),
            bytes,
        }
    }
}

/// A key that is looked for.
struct Probe<'a> {
    head: u64,
    bytes: &'a [u8],
}

impl<'a> Probe<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            head: head(bytes),
            bytes,
        }
    }

    fn as_keyed(&self) -> &dyn Keyed {
        self
    }
}

/// The first eight bytes as a number, padded with zeros: where two differ, the keys are in the same
/// order.
fn head(key: &[u8]) -> u64 {
    match key.first_chunk() {
        Some(chunk) => u64::from_be_bytes(*chunk),
        None => key
            .iter()
            .zip([56, 48, 40, 32, 24, 16, 8])
            .fold(0, |head, (byte, shift)| head | u64::from(*byte) << shift),
    }
}

/// Compares keys in a table by their bytes, whoever owns them.
trait Keyed {
    fn parts(&self) -> (u64, &[u8]);
}

impl Keyed for MemtableKey {
    fn parts(&self) -> (u64, &[u8]) {
        (self.head, &self.bytes)
    }
}

impl Keyed for Probe<'_> {
    fn parts(&self) -> (u64, &[u8]) {
        (self.head, self.bytes)
    }
}

impl Ord for dyn Keyed + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl PartialOrd for dyn Keyed + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for dyn Keyed + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for dyn Keyed + '_ {}

impl Ord for MemtableKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl PartialOrd for MemtableKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for MemtableKey {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for MemtableKey {}

impl<'a> Borrow<dyn Keyed + 'a> for MemtableKey {
    fn borrow(&self) -> &(dyn Keyed + 'a) {
        self
    }
}

/// A table that takes no more changes, on its way to the tree.
pub struct ImmutableMemtable {
    pub table: Memtable,
    /// The position applied when it was frozen.
    pub applied: Applied,
    /// The log is durable through `applied`: from now on the table may be written.
    pub synced: AtomicBool,
}

impl ImmutableMemtable {
    pub fn is_synced(&self) -> bool {
        self.synced.load(atomic::Ordering::Acquire)
    }
}

/// A replica's whole map.
pub struct Memtables {
    pub active: Memtable,
    /// Oldest first.
    pub frozen: VecDeque<Arc<ImmutableMemtable>>,
    pub frozen_bytes: usize,
    /// The table last written to the tree, kept for gets.
    pub clean: Option<Arc<ImmutableMemtable>>,
    pub tree: Arc<dyn Tree>,
    /// The position that the tree contains.
    pub tree_applied: Applied,
    /// The position of the map: the tree, the frozen tables and the active one together.
    pub applied: Applied,
}

impl Memtables {
    pub fn new(tree: Arc<dyn Tree>, applied: Applied) -> Self {
        let tree_applied = applied.clone();
        let (active, frozen) = (Memtable::default(), VecDeque::new());
        Self {
            active,
            frozen,
            frozen_bytes: 0,
            clean: None,
            tree,
            tree_applied,
            applied,
        }
    }

    /// Returns what the clean table takes.
    pub fn clean_bytes(&self) -> usize {
        self.clean.as_ref().map_or(0, |clean| clean.table.bytes())
    }

    /// Returns the tables over the tree, the lowest first.
    pub fn above(&self) -> impl Iterator<Item = &Memtable> {
        self.frozen
            .iter()
            .map(|frozen| &frozen.table)
            .chain(std::iter::once(&self.active))
    }

    /// Asserts that the applied positions only grow from the tree to the active table, and that
    /// the bytes add up.
    pub fn check_invariants(&self) {
        let mut below = self.tree_applied.log_id;
        for frozen in &self.frozen {
            assert!(
                frozen.applied.log_id >= below,
                "a newer immutable memtable is behind an older one"
            );
            below = frozen.applied.log_id;
        }
        assert!(
            self.applied.log_id >= below,
            "the map is behind its own tables"
        );

        let frozen_bytes: usize = self.frozen.iter().map(|frozen| frozen.table.bytes()).sum();
        assert_eq!(
            self.frozen_bytes, frozen_bytes,
            "bytes of immutable memtables"
        );
        assert!(
            !self.active.is_empty() || self.active.bytes() == 0,
            "an empty table takes bytes"
        );
    }

    /// Freezes the active table, also an empty one: it still carries what was applied.
    pub fn freeze(&mut self) -> Arc<ImmutableMemtable> {
        let table = std::mem::take(&mut self.active);
        self.frozen_bytes += table.bytes();
        let frozen = Arc::new(ImmutableMemtable {
            table,
            applied: self.applied.clone(),
            synced: AtomicBool::new(false),
        });
        self.frozen.push_back(frozen.clone());
        frozen
    }

    /// Takes the oldest frozen table away: it is in the tree.
    pub fn retire_oldest(&mut self) -> Option<Arc<ImmutableMemtable>> {
        let frozen = self.frozen.pop_front()?;
        assert!(frozen.is_synced(), "the tree is ahead of the durable log");
        self.frozen_bytes -= frozen.table.bytes();
        self.tree_applied = frozen.applied.clone();
        Some(frozen)
    }
}

/// The map at one point in time. While it lives nothing is applied: read what is wanted and let go.
/// Never take two on one thread: a writer waiting between them blocks both.
pub struct ReadGuard<'a> {
    pub(super) tables: RwLockReadGuard<'a, Memtables>,
}

impl ReadGuard<'_> {
    /// Returns the position applied in the map that it shows.
    pub fn applied(&self) -> &Applied {
        &self.tables.applied
    }
}

impl ReadGuard<'_> {
    /// Returns what the tables say of `key`: nothing (`None`), deleted (`Some(None)`) or a value.
    pub(super) fn change_of(&self, key: &[u8]) -> Option<&Option<Bytes>> {
        let frozen = self
            .tables
            .frozen
            .iter()
            .rev()
            .chain(&self.tables.clean)
            .map(|frozen| &frozen.table);
        let probe = Probe::new(key);
        std::iter::once(&self.tables.active)
            .chain(frozen)
            .find_map(|table| table.get(&probe))
    }

    fn scan_as<'a, V: 'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        seen: impl Fn(&Bytes) -> V + Copy + 'a,
        of_tree: impl FnOnce(&'a dyn Tree, &KeyRange) -> Items<'a, V>,
    ) -> Items<'a, V> {
        let range = core_keys(range);
        if range.is_empty() {
            return Box::new(std::iter::empty());
        }

        // The clean table is left out: it says what the tree says, which is read anyway.
        let tables = &*self.tables;
        let mut items = of_tree(&*tables.tree, &range);
        for table in tables.above().filter(|table| !table.is_empty()) {
            items = Box::new(Layered::new(
                table.range(&range, direction, seen),
                items,
                direction,
            ));
        }
        items
    }
}

impl Read for ReadGuard<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        if key.first().is_none_or(|byte| *byte == RESERVED) {
            return Ok(None);
        }
        match self.change_of(key) {
            Some(change) => Ok(change.clone()),
            None => self.tables.tree.get(key),
        }
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        if key.first().is_none_or(|byte| *byte == RESERVED) {
            return Ok(None);
        }
        match self.change_of(key) {
            Some(change) => Ok(change
                .as_ref()
                .map(|value| ValueStart::from_value(value, bytes_max))),
            None => self.tables.tree.start_of(key, bytes_max),
        }
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        self.scan_as(range, direction, Bytes::clone, |tree, range| {
            tree.scan(range, direction)
        })
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        let start = move |value: &Bytes| ValueStart::from_value(value, bytes_max);
        self.scan_as(range, direction, start, |tree, range| {
            tree.scan_starts(range, direction, bytes_max)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_the_order_of_their_bytes() {
        let parts: [&[u8]; 7] = [b"", b"\0", b"\0\0", b"a", b"\xff", b"1234567", b"12345678"];
        let keys: Vec<Vec<u8>> = parts
            .iter()
            .flat_map(|a| parts.iter().map(move |b| [*a, *b].concat()))
            .collect();
        for a in &keys {
            for b in &keys {
                let (left, right) = (MemtableKey::new(Bytes::copy_from_slice(a)), Probe::new(b));
                assert_eq!(
                    left.parts().cmp(&right.parts()),
                    a.cmp(b),
                    "{a:?} and {b:?}"
                );
            }
        }
    }
}
