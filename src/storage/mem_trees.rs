//! [`MemTrees`]: trees in memory that forget like sled does, for tests and simulation.
//!
//! A crash takes back the last changes, a seeded number of them, over all trees in the order in
//! which they were written: never more than [`Trees::sync`] made durable, and after the mere end of
//! the process never more than a flush did. [`Crash::Torn`] also takes single pairs, as a power cut
//! does to sled's unsynced files; only the digest tells. A handle from before a crash is dead: it
//! can neither read nor write what came after.

use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::tree::{Tree, Trees, Walk};
use crate::sm::ports::{Direction, KeyRange, Pairs, Read, StoreError};

/// Changes that can be taken back. Older ones count as synced, so that a long simulation does not
/// keep every value it ever wrote.
const UNDO_MAX: usize = 16 << 10;

/// Tells how a crash treats what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// The process ends: what was flushed stays.
    Kill,
    /// The power fails: anything since the last sync may be gone, from the end.
    Power,
    /// The power fails and leaves holes.
    Torn,
    /// The power fails, and everything since the last sync is gone.
    Worst,
}

/// Something that counts the steps of a store and says when they fail: the knife of crash tests.
pub type StepFault = Arc<dyn Fn(&str) -> io::Result<()> + Send + Sync>;

/// A gate at which a test holds up readers and writers.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    is_closed: bool,
    waiting: usize,
}

impl Gate {
    /// Waits until it is open.
    pub fn pass(&self) {
        let mut state = self.state.lock();
        state.waiting += 1;
        self.changed.wait_while(&mut state, |state| state.is_closed);
        state.waiting -= 1;
    }

    /// Lets nobody through from now on, or whoever waits and comes.
    pub fn close(&self, is_closed: bool) {
        self.state.lock().is_closed = is_closed;
        self.changed.notify_all();
    }

    pub fn is_closed(&self) -> bool {
        self.state.lock().is_closed
    }

    /// Returns how many wait here.
    pub fn waiting(&self) -> usize {
        self.state.lock().waiting
    }
}

/// Trees in memory. Clones share them.
#[derive(Default, Clone)]
pub struct MemTrees {
    inner: Arc<Mutex<MemTreesInner>>,
    /// Gate that reads and writes of pairs pass, as they would a disk.
    pub reads: Arc<Gate>,
    pub writes: Arc<Gate>,
}

#[derive(Clone, Default)]
struct MemTreesInner {
    trees: BTreeMap<String, BTreeMap<Bytes, Bytes>>,
    /// The place that new trees go to, and those that are in older ones.
    place: u64,
    outdated: BTreeMap<String, u64>,
    /// Bytes that were ever written to each place: none is given back before the place is empty.
    written: BTreeMap<u64, u64>,
    /// Values to put back to undo each step, oldest first.
    undo: VecDeque<UndoStep>,
    /// Steps at the beginning of `undo` that the end of the process leaves.
    flushed: usize,
    condemned: bool,
    epoch: u64,
    fault: Option<StepFault>,
    /// Bytes that the disk has room for; None if unlimited.
    room: Option<u64>,
    /// Reason why nothing is written until the trees are opened anew.
    given_up: Option<String>,
}

#[derive(Clone)]
enum UndoStep {
    Written {
        tree: Arc<str>,
        key: Bytes,
        before: Option<Bytes>,
    },
    Created {
        tree: String,
    },
    Dropped {
        tree: String,
        pairs: BTreeMap<Bytes, Bytes>,
    },
}

impl MemTrees {
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a copy of these trees as they are now, that goes its own way from here.
    pub fn fork(&self) -> Self {
        let mut inner = self.lock().clone();
        inner.fault = None;
        inner.room = None;
        inner.given_up = None;
        // No handle of the original is one of the copy.
        inner.epoch += 1;
        Self {
            inner: Arc::new(Mutex::new(inner)),
            reads: Arc::default(),
            writes: Arc::default(),
        }
    }

    /// Has `fault` asked before each changing step. Taken away by a crash.
    pub fn set_fault(&self, fault: StepFault) {
        self.lock().fault = Some(fault);
    }

    /// Leaves room on the disk for so many bytes, or for any.
    pub fn set_room(&self, room: Option<u64>) {
        self.lock().room = room;
    }

    /// Has everything that writes fail from now on, as sled does after an error of the disk.
    pub fn give_up(&self, reason: &str) {
        self.lock().given_up = Some(reason.to_owned());
    }

    /// Takes writes again, as for a process that has just begun.
    pub fn begin(&self) {
        self.lock().given_up = None;
    }

    /// Forgets a seeded part of what was not made durable, and kills every handle.
    pub fn crash(&self, crash: Crash, seed: u64) {
        let mut inner = self.lock();
        let mut random = StdRng::seed_from_u64(seed);
        let least = if crash == Crash::Kill {
            inner.flushed
        } else {
            0
        };
        let most = if crash == Crash::Worst {
            0
        } else {
            inner.undo.len()
        };
        let kept = random.random_range(least..=most);
        while inner.undo.len() > kept {
            let undo = inner
                .undo
                .pop_back()
                .expect("the loop holds while there is one");
            inner.take_back(undo);
        }
        if crash == Crash::Torn {
            inner.tear(&mut random);
        }
        if std::mem::take(&mut inner.condemned) {
            inner.trees.clear();
        }
        inner.undo.clear();
        inner.flushed = 0;
        inner.epoch += 1;
        inner.fault = None;
    }

    /// Flips a bit of one value, as a disk might. `at` picks pair and bit. False if there is
    /// nothing to flip.
    pub fn flip(&self, tree: &str, at: usize) -> bool {
        let mut inner = self.lock();
        let Some(pairs) = inner.trees.get_mut(tree).filter(|pairs| !pairs.is_empty()) else {
            return false;
        };
        let nth = at % pairs.len();
        let Some(value) = pairs
            .values_mut()
            .nth(nth)
            .filter(|value| !value.is_empty())
        else {
            return false;
        };
        let mut bytes = value.to_vec();
        let byte = (at / 8) % bytes.len();
        bytes[byte] ^= 1 << (at % 8);
        *value = Bytes::from(bytes);
        true
    }

    fn lock(&self) -> MutexGuard<'_, MemTreesInner> {
        self.inner.lock()
    }
}

impl MemTreesInner {
    fn take_back(&mut self, undo: UndoStep) {
        match undo {
            UndoStep::Created { tree } => {
                self.trees.remove(&tree);
            }
            UndoStep::Dropped { tree, pairs } => {
                self.trees.insert(tree, pairs);
            }
            UndoStep::Written { tree, key, before } => {
                let pairs = self.trees.entry(tree.to_string()).or_default();
                match before {
                    Some(value) => pairs.insert(key, value),
                    None => pairs.remove(&key),
                };
            }
        }
    }

    /// Loses some pairs of some trees.
    fn tear(&mut self, random: &mut StdRng) {
        for pairs in self.trees.values_mut() {
            if random.random_bool(0.5) {
                let one_in = random.random_range(1..20);
                pairs.retain(|_, _| random.random_range(0..one_in) != 0);
            }
        }
    }

    fn place_of(&self, tree: &str) -> u64 {
        self.outdated.get(tree).copied().unwrap_or(self.place)
    }

    fn step(&mut self, undo: UndoStep) {
        self.undo.push_back(undo);
        if self.undo.len() > UNDO_MAX {
            self.undo.pop_front();
            self.flushed = self.flushed.saturating_sub(1);
        }
    }

    fn fault(&self, step: &str) -> Result<(), StoreError> {
        if let Some(reason) = &self.given_up {
            let source = io::Error::other(reason.clone());
            return Err(StoreError::Io {
                context: format!("{step} of a tree"),
                source,
            });
        }
        let Some(fault) = &self.fault else {
            return Ok(());
        };
        fault(step).map_err(|source| StoreError::Io {
            context: format!("{step} of a tree"),
            source,
        })
    }
}

impl Trees for MemTrees {
    fn open(&self, name: &str) -> Result<Arc<dyn Tree>, StoreError> {
        let mut inner = self.lock();
        if !inner.trees.contains_key(name) {
            inner.fault("create")?;
            inner.outdated.remove(name);
            inner.trees.insert(name.to_owned(), BTreeMap::new());
            inner.step(UndoStep::Created {
                tree: name.to_owned(),
            });
        }
        Ok(Arc::new(MemTree {
            trees: self.clone(),
            name: name.into(),
            epoch: inner.epoch,
        }))
    }

    fn drop_tree(&self, name: &str) -> Result<(), StoreError> {
        let mut inner = self.lock();
        inner.fault("drop")?;
        if let Some(pairs) = inner.trees.remove(name) {
            inner.step(UndoStep::Dropped {
                tree: name.to_owned(),
                pairs,
            });
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.lock().trees.keys().cloned().collect())
    }

    fn begin_fresh(&self, _live_bytes: u64) -> Result<(), StoreError> {
        let mut inner = self.lock();
        inner.fault("fresh")?;
        let place = inner.place;
        let names: Vec<String> = inner.trees.keys().cloned().collect();
        for name in names {
            inner.outdated.entry(name).or_insert(place);
        }
        inner.place += 1;
        Ok(())
    }

    fn ensure_room(&self, bytes: u64) -> Result<(), StoreError> {
        if self.lock().room.is_none_or(|room| room >= bytes) {
            return Ok(());
        }
        let source = io::ErrorKind::StorageFull.into();
        Err(StoreError::Io {
            context: "looking for room".to_owned(),
            source,
        })
    }

    fn outdated(&self) -> Result<Vec<String>, StoreError> {
        let inner = self.lock();
        Ok(inner
            .outdated
            .keys()
            .filter(|name| inner.trees.contains_key(*name))
            .cloned()
            .collect())
    }

    fn disk_bytes(&self) -> u64 {
        let inner = self.lock();
        let is_used = |place: u64| {
            place == inner.place || inner.trees.keys().any(|name| inner.place_of(name) == place)
        };
        inner
            .written
            .iter()
            .filter(|(place, _)| is_used(**place))
            .map(|(_, bytes)| bytes)
            .sum()
    }

    fn sync(&self) -> Result<(), StoreError> {
        let mut inner = self.lock();
        inner.fault("sync")?;
        inner.undo.clear();
        inner.flushed = 0;
        Ok(())
    }

    fn condemn(&self, _reason: &str) {
        self.lock().condemned = true;
    }

    fn given_up(&self) -> Option<String> {
        self.lock().given_up.clone()
    }
}

struct MemTree {
    trees: MemTrees,
    name: Arc<str>,
    epoch: u64,
}

impl MemTree {
    fn lock(&self) -> Result<MutexGuard<'_, MemTreesInner>, StoreError> {
        let inner = self.trees.lock();
        if inner.epoch == self.epoch && inner.trees.contains_key(&*self.name) {
            return Ok(inner);
        }
        let source = io::Error::other("the tree was dropped, or its process is dead");
        Err(StoreError::Io {
            context: format!("tree {}", self.name),
            source,
        })
    }
}

/// Pairs copied at once by a scan: it is lazy, but must not hold the lock between two items.
const SCAN_PAGE_PAIRS: usize = 64;

impl Tree for MemTree {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.trees.reads.pass();
        Ok(self.lock()?.trees[&*self.name].get(key).cloned())
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        let mut rest = Some(range.clone());
        let pages = std::iter::from_fn(move || {
            let range = rest.take()?;
            self.trees.reads.pass();
            let page = self.lock().and_then(|inner| {
                let pairs = Read::scan(&inner.trees[&*self.name], &range, direction);
                pairs.take(SCAN_PAGE_PAIRS).collect::<Result<Vec<_>, _>>()
            });
            if let Ok(pairs) = &page
                && pairs.len() == SCAN_PAGE_PAIRS
                && let Some((last, _)) = pairs.last()
            {
                rest = Some(match direction {
                    Direction::Forward => KeyRange {
                        start: [last, &[0][..]].concat().into(),
                        end: range.end,
                    },
                    Direction::Reverse => KeyRange {
                        start: range.start,
                        end: Some(last.clone()),
                    },
                });
            }
            Some(page)
        });
        Box::new(pages.flat_map(|page| match page {
            Ok(pairs) => pairs.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        }))
    }

    fn write(&self, key: &[u8], change: Option<&[u8]>) -> Result<(), StoreError> {
        self.trees.writes.pass();
        let mut inner = self.lock()?;
        inner.fault("write")?;
        let place = inner.place_of(&self.name);
        *inner.written.entry(place).or_default() +=
            (key.len() + change.map_or(0, <[u8]>::len)) as u64;
        let pairs = inner.trees.get_mut(&*self.name).expect("looked up by lock");
        let key = Bytes::copy_from_slice(key);
        let before = match change {
            Some(value) => pairs.insert(key.clone(), Bytes::copy_from_slice(value)),
            None => pairs.remove(&key),
        };
        inner.step(UndoStep::Written {
            tree: self.name.clone(),
            key,
            before,
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        let mut inner = self.lock()?;
        inner.fault("flush")?;
        inner.flushed = inner.undo.len();
        Ok(())
    }

    fn walk(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> Walk) -> Result<(), StoreError> {
        for pair in self.scan(&KeyRange::all(), Direction::Forward) {
            let (key, value) = pair?;
            if visit(&key, &value) == Walk::Stop {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(tree: &Arc<dyn Tree>, key: &'static str, value: &'static str) {
        tree.write(key.as_bytes(), Some(value.as_bytes()))
            .expect("written");
    }

    #[test]
    fn a_crash_takes_changes_back_from_the_end_and_no_further_than_was_made_durable() {
        for seed in 0..50 {
            let trees = MemTrees::new();
            let tree = trees.open("t").expect("opened");
            put(&tree, "a", "1");
            trees.sync().expect("synced");
            put(&tree, "b", "1");
            tree.flush().expect("flushed");
            put(&tree, "c", "1");
            let crash = if seed % 2 == 0 {
                Crash::Kill
            } else {
                Crash::Power
            };
            trees.crash(crash, seed);
            assert!(tree.get(b"a").is_err(), "a handle outlived its process");
            let tree = trees.open("t").expect("opened again");
            let has = |key: &str| tree.get(key.as_bytes()).expect("readable").is_some();
            assert!(has("a"), "seed {seed}");
            assert!(
                has("b") || (crash == Crash::Power && !has("c")),
                "seed {seed}"
            );
        }
    }

    #[test]
    fn scans_page_through_in_both_directions() {
        let trees = MemTrees::new();
        let tree = trees.open("t").expect("opened");
        for n in 0..1000u32 {
            tree.write(&n.to_be_bytes(), Some(b"v")).expect("written");
        }
        let keys = |direction| {
            let range = KeyRange {
                start: 5u32.to_be_bytes().to_vec().into(),
                end: Some(900u32.to_be_bytes().to_vec().into()),
            };
            let keys = tree
                .scan(&range, direction)
                .map(|pair| pair.expect("readable").0);
            keys.map(|key| u32::from_be_bytes(key[..].try_into().expect("four bytes")))
                .collect::<Vec<_>>()
        };
        assert_eq!(keys(Direction::Forward), (5..900).collect::<Vec<_>>());
        assert_eq!(keys(Direction::Reverse), (5..900).rev().collect::<Vec<_>>());
    }
}
