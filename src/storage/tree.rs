//! The seam behind which the durable half of each map stands: [`Trees`] and [`Tree`].
//!
//! The real one is sled (`sled_tree`), the double that forgets like sled does is in `mem_trees`. A
//! tree is *not* trusted: it may come back from a crash as it was at any earlier moment, or
//! damaged. What makes it believable is the digest that the `state` module keeps in it. Kept out:
//! what the pairs mean, and every promise of durability beyond [`Trees::sync`].

use std::sync::Arc;

use bytes::Bytes;

use crate::sm::ports::{Direction, Items, KeyRange, Pairs, StoreError, ValueStart, starts};

/// A set of named trees.
pub trait Trees: Send + Sync + 'static {
    /// Opens the tree, or creates an empty one.
    fn open(&self, name: &str) -> Result<Arc<dyn Tree>, StoreError>;

    /// Forgets the tree and its pairs. Fine if there is none of that name.
    fn drop_tree(&self, name: &str) -> Result<(), StoreError>;

    /// Names of all trees, sorted.
    fn names(&self) -> Result<Vec<String>, StoreError>;

    /// Begins a fresh place for trees: those that are created from now on go there. The others stay
    /// where they are until they are dropped; the space that they take is given back with the last
    /// of them. An error where there is no room for `live_bytes` more.
    fn begin_fresh(&self, live_bytes: u64) -> Result<(), StoreError>;

    /// Refuses where there is no room on the disk for a copy of `bytes`.
    fn ensure_room(&self, bytes: u64) -> Result<(), StoreError>;

    /// Names of the trees that are in older places, sorted.
    fn outdated(&self) -> Result<Vec<String>, StoreError>;

    /// Returns what all trees take on the disk, with what is left in it of values that were
    /// overwritten or deleted.
    fn disk_bytes(&self) -> u64;

    /// Makes everything written so far survive a power cut. For a clean stop: slow.
    fn sync(&self) -> Result<(), StoreError>;

    /// Has the next start throw all trees away unread: even emptying a damaged one failed.
    fn condemn(&self, reason: &str);

    /// Returns why this process writes to some of the trees no more; none as long as it does. Only
    /// another process can then: no tree is damaged by it.
    fn given_up(&self) -> Option<String> {
        None
    }
}

/// An ordered map of bytes that changes pair by pair.
pub trait Tree: Send + Sync {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError>;

    /// Returns the first `bytes_max` bytes of a value, and its length. A tree that has values on
    /// disk reads no more than it must.
    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        Ok(self
            .get(key)?
            .map(|value| ValueStart::from_value(&value, bytes_max)))
    }

    /// The pairs of `range`, lazily. Not a point in time: what is written meanwhile may show in
    /// parts.
    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a>;

    /// As [`Tree::scan`], with no more of each value than [`Tree::start_of`] gives.
    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        starts(self.scan(range, direction), bytes_max)
    }

    /// Gives a key its value, or none. After a crash, changes of one set of trees are lost from the
    /// end only.
    fn write(&self, key: &[u8], change: Option<&[u8]>) -> Result<(), StoreError>;

    /// Makes what was written survive the end of the process (not a power cut).
    fn flush(&self) -> Result<(), StoreError>;

    /// Visits every pair in key order, until `visit` says no more. A store that hangs on damaged
    /// files fails here instead.
    fn walk(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> Walk) -> Result<(), StoreError>;
}

/// Tells whether a walk goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    On,
    Stop,
}
