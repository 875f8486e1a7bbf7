//! Opening a replica's map: which tree is believed, or what it is rebuilt from.

use std::sync::Arc;

use super::Applied;
use super::digest::{Digest, PairHasher};
use super::errors::is_about_machine;
use super::record::{RECORD_KEY, RESERVED, TreeRecord, generation_of, tree_name};
use super::redo::{Redo, RedoFiles};
use crate::sm::ports::StoreError;
use crate::storage::ReplicaKey;
use crate::storage::snapshot::Snapshot;
use crate::storage::snapshot::files::SnapshotFiles;
use crate::storage::tree::{Tree, Trees, Walk};

/// Bytes that are not flushed while a generation is filled: sled keeps them in memory.
const FILL_FLUSH_BYTES: usize = 8 << 20;

/// Describes how a replica's map was found. The caller, who knows where the log begins, decides
/// whether the replica is lost: it is if the log was purged past what is applied now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    pub origin: Origin,
    /// The reason why the newest snapshot file is not trusted, if there is one and it is not. The
    /// file stays until the next snapshot is durable.
    pub damaged_snapshot: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// There was nothing.
    New,
    /// The tree passed its check.
    Tree,
    /// The tree was missing, damaged or older than the snapshot file, and was filled anew.
    Rebuilt { reason: String, from_snapshot: bool },
}

/// A map that is ready to serve.
pub(super) struct ReadyMap {
    pub tree: Arc<dyn Tree>,
    pub record: TreeRecord,
    /// Of the keys and values in it.
    pub map_bytes: u64,
    pub snapshot: Option<Snapshot>,
    pub opened: Opened,
}

/// A tree, what it says of itself, and the bytes of its keys and values.
pub(super) type Believed = (Arc<dyn Tree>, TreeRecord, u64);

/// The result of checking a tree.
enum TreeVerdict {
    /// With the bytes of keys and values.
    Good(TreeRecord, u64),
    /// No pairs, no record.
    Empty,
    Bad(String),
}

/// Opens the map of `key`: the tree if it is believed, else one rebuilt.
pub(super) fn open_map(
    trees: &dyn Trees,
    files: &SnapshotFiles,
    redo: &RedoFiles,
    key: ReplicaKey,
) -> Result<ReadyMap, StoreError> {
    let (mut snapshots, mut damaged_snapshot) = open_snapshots(files, key)?;
    let mut generations = generations(trees, key)?;
    let redo = redo.read(key)?;
    let (good, reason) = newest_good(trees, key, &generations, redo.as_ref())?;
    let snapshot_log_id = snapshots
        .first()
        .and_then(|snapshot| snapshot.applied().log_id);

    let reason = match (good, reason) {
        // A tree older than the snapshot will not do: the log may be purged up to the snapshot.
        (Some((tree, record, map_bytes)), _) if record.applied.log_id >= snapshot_log_id => {
            drop_others(trees, key, &generations, record.generation);
            let snapshot = (!snapshots.is_empty()).then(|| snapshots.remove(0));
            let opened = Opened {
                origin: Origin::Tree,
                damaged_snapshot,
            };
            return Ok(ReadyMap {
                tree,
                record,
                map_bytes,
                snapshot,
                opened,
            });
        }
        (Some((_, record, _)), _) => format!(
            "it is at {} and older than the snapshot file",
            describe(&record.applied)
        ),
        (None, Some(reason)) => reason,
        (None, None) if snapshots.is_empty() => {
            let generation = generations.first().copied().unwrap_or(1);
            let (tree, record, map_bytes) = empty_generation(trees, key, generation)?;
            let opened = Opened {
                origin: Origin::New,
                damaged_snapshot,
            };
            return Ok(ReadyMap {
                tree,
                record,
                map_bytes,
                snapshot: None,
                opened,
            });
        }
        (None, None) => "it is missing".to_owned(),
    };

    // Always a fresh generation: a crash in the middle then leaves the old tree as it was.
    let generation = generations.first().map_or(1, |newest| newest + 1);
    generations.insert(0, generation);
    let rebuilt = rebuild(
        trees,
        key,
        generation,
        &mut snapshots,
        &mut damaged_snapshot,
    );
    let rebuilt = rebuilt.and_then(|rebuilt| match rebuilt {
        Some(rebuilt) => Ok((rebuilt, true)),
        // With no snapshot left to believe, a true older tree is worth more than nothing: the log
        // may reach back to it.
        None => match newest_good(trees, key, &generations[1..], redo.as_ref())?.0 {
            Some(older) => Ok((older, false)),
            None => Ok((empty_generation(trees, key, generation)?, false)),
        },
    });
    let ((tree, record, map_bytes), from_snapshot) = rebuilt.inspect_err(|error| {
        // The trees are not to blame for a full disk: without them all maps would be filled anew,
        // which takes still more room.
        if !is_about_machine(error) && trees.given_up().is_none() {
            trees.condemn(&error.to_string());
        }
    })?;
    let applied = describe(&record.applied);
    tracing::warn!(replica = %key, %reason, from_snapshot, %applied, "the \
        tree of a replica was rebuilt");
    drop_others(trees, key, &generations, record.generation);
    let snapshot = (!snapshots.is_empty()).then(|| snapshots.remove(0));
    let opened = Opened {
        origin: Origin::Rebuilt {
            reason,
            from_snapshot,
        },
        damaged_snapshot,
    };
    Ok(ReadyMap {
        tree,
        record,
        map_bytes,
        snapshot,
        opened,
    })
}

/// A generation that was filled from a snapshot and has no record yet: until it has, it is not
/// believed.
pub(super) struct TreeFilling {
    tree: Arc<dyn Tree>,
    record: TreeRecord,
    map_bytes: u64,
}

impl TreeFilling {
    pub fn generation(&self) -> u64 {
        self.record.generation
    }

    /// Gives it its record.
    pub fn finish(self) -> Result<Believed, StoreError> {
        self.tree.write(RECORD_KEY, Some(&self.record.encode()))?;
        self.tree.flush()?;
        Ok((self.tree, self.record, self.map_bytes))
    }
}

/// A generation that holds what a snapshot does, and waits to become the map.
pub(super) struct PreparedMap {
    pub snapshot: Snapshot,
    pub filling: TreeFilling,
}

impl PreparedMap {
    pub fn is_of(&self, snapshot: &Snapshot) -> bool {
        self.snapshot.path() == snapshot.path() && self.snapshot.applied() == snapshot.applied()
    }
}

/// Fills `generation` from a snapshot.
pub(super) fn fill_generation(
    trees: &dyn Trees,
    key: ReplicaKey,
    generation: u64,
    snapshot: &Snapshot,
) -> Result<TreeFilling, StoreError> {
    let name = tree_name(key, generation);

    // An earlier attempt that a crash cut short may have left a part.
    trees.drop_tree(&name)?;
    let tree = trees.open(&name)?;
    let (mut unflushed, mut map_bytes) = (0, 0);
    snapshot.for_each(&mut |pair_key, value| {
        if pair_key.first().is_none_or(|byte| *byte == RESERVED) {
            return Err(StoreError::Damaged(
                "a snapshot file holds a key that is no map's".into(),
            ));
        }
        tree.write(pair_key, Some(value))?;
        unflushed += pair_key.len() + value.len();
        map_bytes += pair_bytes(pair_key, value);
        if unflushed >= FILL_FLUSH_BYTES {
            unflushed = 0;
            tree.flush()?;
        }
        Ok(())
    })?;
    tree.flush()?;

    // The digest comes from the file, so a check finds what was lost on the way into the tree.
    let record = TreeRecord {
        key,
        generation,
        applied: snapshot.applied().clone(),
        digest: snapshot.trailer().digest,
    };
    Ok(TreeFilling {
        tree,
        record,
        map_bytes,
    })
}

/// Returns what a pair counts for in [`ReadyMap::map_bytes`].
pub(super) fn pair_bytes(key: &[u8], value: &[u8]) -> u64 {
    (key.len() + value.len()) as u64
}

/// The generations that there are trees of, the newest first.
pub(super) fn generations(trees: &dyn Trees, key: ReplicaKey) -> Result<Vec<u64>, StoreError> {
    let mut generations: Vec<u64> = trees
        .names()?
        .iter()
        .filter_map(|name| generation_of(key, name))
        .collect();
    generations.sort_unstable_by_key(|generation| std::cmp::Reverse(*generation));
    Ok(generations)
}

/// Drops the trees of all generations but `keep`. One that can't be dropped is only in the way: it
/// is tried again at the next start.
pub(super) fn drop_others(trees: &dyn Trees, key: ReplicaKey, generations: &[u64], keep: u64) {
    for generation in generations.iter().filter(|generation| **generation != keep) {
        drop_one(trees, key, *generation);
    }
}

pub(super) fn drop_one(trees: &dyn Trees, key: ReplicaKey, generation: u64) {
    if let Err(error) = trees.drop_tree(&tree_name(key, generation)) {
        tracing::warn!(replica = %key, generation, %error, "an old tree could not be dropped");
    }
}

/// Fills `generation` from the newest snapshot that can be read through, dropping from the list
/// those that can't. None: none can.
fn rebuild(
    trees: &dyn Trees,
    key: ReplicaKey,
    generation: u64,
    snapshots: &mut Vec<Snapshot>,
    damaged: &mut Option<String>,
) -> Result<Option<Believed>, StoreError> {
    while let Some(snapshot) = snapshots.first() {
        match fill_generation(trees, key, generation, snapshot).and_then(TreeFilling::finish) {
            Ok(filled) => return Ok(Some(filled)),
            // The file may be whole: an older one would throw away what only the newer one has.
            Err(error @ (StoreError::Io { .. } | StoreError::TooOld { .. })) => return Err(error),
            Err(error @ (StoreError::Damaged(_) | StoreError::Undecodable { .. })) => {
                damaged.get_or_insert(error.to_string());
                tracing::error!(replica = %key, %error, "a snapshot file is damaged");
                snapshots.remove(0);
                trees.drop_tree(&tree_name(key, generation))?;
            }
        }
    }
    Ok(None)
}

fn empty_generation(
    trees: &dyn Trees,
    key: ReplicaKey,
    generation: u64,
) -> Result<Believed, StoreError> {
    let tree = trees.open(&tree_name(key, generation))?;
    Ok((
        tree,
        TreeRecord {
            key,
            generation,
            applied: Applied::default(),
            digest: Digest::default(),
        },
        0,
    ))
}

/// The snapshots whose head and trailer hold, the newest first, and why the newest file is not
/// among them.
fn open_snapshots(
    files: &SnapshotFiles,
    key: ReplicaKey,
) -> Result<(Vec<Snapshot>, Option<String>), StoreError> {
    let (mut snapshots, mut damaged) = (Vec::new(), None);
    for published in files.list_of(key)? {
        match Snapshot::open(files, &published.path) {
            Ok(snapshot)
                if snapshot.written_by().group == key.group
                    && snapshot.applied().log_id == published.log_id =>
            {
                snapshots.push(snapshot);
            }
            Ok(_) => note_damaged(
                key,
                &snapshots,
                &mut damaged,
                format!("{} is another's file", published.path.display()),
            ),
            Err(StoreError::Damaged(reason)) => note_damaged(key, &snapshots, &mut damaged, reason),
            // Unreachable, or of a newer version of the program: not ours to pass over.
            Err(
                error @ (StoreError::Io { .. }
                | StoreError::TooOld { .. }
                | StoreError::Undecodable { .. }),
            ) => {
                return Err(error);
            }
        }
    }
    Ok((snapshots, damaged))
}

fn note_damaged(key: ReplicaKey, newer: &[Snapshot], damaged: &mut Option<String>, reason: String) {
    tracing::error!(replica = %key, %reason, "a snapshot file is damaged");
    if newer.is_empty() {
        damaged.get_or_insert(reason);
    }
}

/// The newest generation whose check holds, or why the newest that had anything in it does not.
fn newest_good(
    trees: &dyn Trees,
    key: ReplicaKey,
    generations: &[u64],
    redo: Option<&Redo>,
) -> Result<(Option<Believed>, Option<String>), StoreError> {
    let mut reason = None;
    for generation in generations {
        let verdict = match trees.open(&tree_name(key, *generation)) {
            Ok(tree) => {
                check_or_finish(&*tree, key, *generation, redo).map(|verdict| (tree, verdict))
            }
            Err(error) => Err(error),
        };
        match verdict {
            Ok((tree, TreeVerdict::Good(record, map_bytes))) => {
                return Ok((Some((tree, record, map_bytes)), reason));
            }
            Ok((_, TreeVerdict::Empty)) => {}
            Ok((_, TreeVerdict::Bad(bad))) => {
                reason.get_or_insert(bad);
            }
            // Its thread still turns: only a restart, without these files, helps.
            Err(error @ StoreError::Io { .. }) if is_hang(&error) => {
                trees.condemn(&error.to_string());
                return Err(error);
            }
            Err(error) => {
                reason.get_or_insert(error.to_string());
            }
        }
    }
    Ok((None, reason))
}

fn is_hang(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::TimedOut)
}

fn is_about_data(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::InvalidData
    )
}

/// Checks a tree; one that does not hold is looked at again after the checkpoint that may have been
/// cut short was carried out on it.
fn check_or_finish(
    tree: &dyn Tree,
    key: ReplicaKey,
    generation: u64,
    redo: Option<&Redo>,
) -> Result<TreeVerdict, StoreError> {
    // A redo file may be older than the tree, and its changes belong to one generation only.
    let redo = redo.filter(|redo| redo.record.generation == generation);
    let verdict = match check(tree, key, generation) {
        // A value that has lost its pieces: it may be one of those that were being written.
        Err(error @ StoreError::Io { .. }) if redo.is_some() && is_about_data(&error) => {
            TreeVerdict::Bad(error.to_string())
        }
        checked => checked?,
    };
    match (&verdict, redo) {
        (TreeVerdict::Bad(reason), Some(redo)) => {
            // Each change says what its key is to be in the end, so doing it twice does no harm.
            tracing::info!(replica = %key, %reason, changes = redo.changes.len(), "a checkpoint \
                that was cut short is carried out again");
            redo.carry_out(tree)?;
            tree.flush()?;
            check(tree, key, generation)
        }
        (TreeVerdict::Good(..) | TreeVerdict::Empty | TreeVerdict::Bad(_), _) => Ok(verdict),
    }
}

/// Reads the whole tree and compares it with its record.
fn check(tree: &dyn Tree, key: ReplicaKey, generation: u64) -> Result<TreeVerdict, StoreError> {
    let (mut digest, mut hasher, mut unknown) = (Digest::default(), PairHasher::default(), false);
    let (mut record, mut map_bytes) = (None, 0);
    tree.walk(&mut |pair_key, value| {
        if pair_key == RECORD_KEY {
            record = Some(TreeRecord::decode(value));
        } else if pair_key.first().is_none_or(|byte| *byte == RESERVED) {
            unknown = true;
        } else {
            digest.add(hasher.hash(pair_key, value));
            map_bytes += pair_bytes(pair_key, value);
        }
        Walk::On
    })?;
    Ok(match record {
        None if digest.pairs == 0 && !unknown => TreeVerdict::Empty,
        // The record is written last, so pairs without one were cut short.
        None => TreeVerdict::Bad("it was never finished".into()),
        Some(Err(error)) => TreeVerdict::Bad(error.to_string()),
        // A tree under another's name would pass its own digest.
        Some(Ok(record)) if (record.key, record.generation) != (key, generation) => {
            TreeVerdict::Bad(format!(
                "it says that it is {}",
                tree_name(record.key, record.generation)
            ))
        }
        Some(Ok(record)) if record.digest != digest || unknown => TreeVerdict::Bad(format!(
            "its {} pairs do not match the digest of {}",
            digest.pairs, record.digest.pairs
        )),
        Some(Ok(record)) => TreeVerdict::Good(record, map_bytes),
    })
}

fn describe(applied: &Applied) -> String {
    applied
        .log_id
        .map_or_else(|| "the beginning".to_owned(), |log_id| log_id.to_string())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::sm::ports::{Direction, KeyRange, Pairs};
    use crate::storage::mem_trees::MemTrees;
    use crate::types::{GroupId, ReplicaId};

    const KEY: ReplicaKey = ReplicaKey {
        group: GroupId(1),
        replica: ReplicaId(5),
    };

    /// A tree in which one value cannot be read until it is written anew.
    struct TornTree(Arc<dyn Tree>);

    impl TornTree {
        fn is_whole(&self) -> bool {
            self.0.get(b"torn").is_ok_and(|value| value.is_some())
        }
    }

    impl Tree for TornTree {
        fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
            self.0.get(key)
        }

        fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
            self.0.scan(range, direction)
        }

        fn write(&self, key: &[u8], change: Option<&[u8]>) -> Result<(), StoreError> {
            self.0.write(key, change)
        }

        fn flush(&self) -> Result<(), StoreError> {
            self.0.flush()
        }

        fn walk(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> Walk) -> Result<(), StoreError> {
            if self.is_whole() {
                return self.0.walk(visit);
            }
            let source = std::io::ErrorKind::InvalidData.into();
            Err(StoreError::Io {
                context: "walking a tree".into(),
                source,
            })
        }
    }

    /// A kill between the pieces of a value and those of the one before, say.
    #[test]
    fn a_value_that_cannot_be_read_is_written_again_by_the_checkpoint_that_was_cut_short() {
        let (key, value) = (Bytes::from_static(b"torn"), Bytes::from_static(b"whole"));
        let mut digest = Digest::default();
        digest.add(PairHasher::default().hash(&key, &value));
        let record = TreeRecord {
            key: KEY,
            generation: 1,
            applied: Applied::default(),
            digest,
        };
        let redo = Redo {
            record: record.clone(),
            changes: vec![(key, Some(value))],
        };
        let tree = TornTree(MemTrees::new().open("g1-r5.1").expect("opened"));
        check_or_finish(&tree, KEY, 1, None)
            .err()
            .expect("it cannot be read");
        check_or_finish(&tree, KEY, 2, Some(&redo))
            .err()
            .expect("that was another generation");
        let verdict =
            check_or_finish(&tree, KEY, 1, Some(&redo)).expect("it was carried out again");
        assert!(matches!(verdict, TreeVerdict::Good(found, 9) if found == record));
    }
}
