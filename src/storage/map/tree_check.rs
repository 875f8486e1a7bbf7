//! Reading the tree of a replica again while it serves and is written to, to find what has rotted
//! while it can still be had from elsewhere.
//!
//! Pages of pairs are read, each with the writer locked, so that the tree stands still; between two
//! pages others have their turn. A checkpoint meanwhile tells the check what it changes before the
//! place that the check has come to. After the last page the check has the digest that the tree is
//! to have, or one of the pairs is damaged.
//!
//! The trees hold in memory a part of what is in them, and the system another: of those parts the
//! check sees what readers are given, which may be better than what is on the disk.

use std::sync::Arc;

use super::ReplicaMap;
use super::digest::Digest;
use super::errors::is_about_machine;
use super::record::{RECORD_KEY, TreeRecord};
use super::replica::{ReplicaMapInner, TreeWriter};
use super::tree_walks::{CheckedPage, TreeCheck};
use crate::sm::ports::StoreError;
use crate::storage::tree::Tree;
use crate::storage::{Checked, ReadPace};

impl ReplicaMap {
    /// Reads every pair of the tree, and compares all of them with the record of the tree. The map
    /// serves on, and takes entries. Blocking, and long.
    pub fn check_tree(&self, pace: &mut ReadPace<'_>) -> Checked {
        let replica = &self.replica;
        let generation = begin(replica);
        let checked = loop {
            match step(replica, generation) {
                Ok(Some(page)) if page.is_last => {
                    pace(page.bytes);
                    break Checked::Whole;
                }
                Ok(Some(page)) if pace(page.bytes) => {}
                Ok(Some(_) | None) => break Checked::Unread,
                Err(error) if is_of_the_tree(replica, &error) => {
                    break Checked::Damaged(format!("the tree of {}: {error}", replica.key));
                }
                Err(_) => break Checked::Unread,
            }
        };

        // Otherwise each checkpoint would go on reading old values for it.
        replica.lock_writer_last().check = None;
        checked
    }

    /// Stops the replica for that reason: what it had is damaged, and whoever opens it again
    /// rebuilds it.
    pub fn give_up(&self, reason: &str) {
        self.replica.fail(reason);
    }
}

/// Begins a check of the tree. Returns its generation.
fn begin(replica: &Arc<ReplicaMapInner>) -> u64 {
    let mut writer = replica.lock_writer_last();
    let generation = writer.record.generation;
    writer.check = Some(TreeCheck::new());
    generation
}

/// Reads a page, and compares the whole with the record after the last. None: another tree has
/// taken the place of this one, or the replica has stopped.
fn step(
    replica: &Arc<ReplicaMapInner>,
    generation: u64,
) -> Result<Option<CheckedPage>, StoreError> {
    let mut writer = replica.lock_writer_last();

    // What was read so far says nothing of another tree.
    if replica.check().is_err() || writer.record.generation != generation {
        return Ok(None);
    }
    let tree = replica.read_memtables().tree.clone();
    let TreeWriter { check, record, .. } = &mut *writer;
    let Some(check) = check.as_mut() else {
        return Ok(None);
    };
    let page = check.read_page(&*tree, replica.shared.options.copy_page_pairs)?;
    if page.is_last {
        compare(&*tree, record, check.digest)?;
    }
    Ok(Some(page))
}

/// Compares what a tree says of itself with what is known of it, and with what was read.
fn compare(tree: &dyn Tree, known: &TreeRecord, read: Digest) -> Result<(), StoreError> {
    let damaged = |reason: String| Err(StoreError::Damaged(reason));
    match tree.get(RECORD_KEY)? {
        Some(bytes) if TreeRecord::decode(&bytes)? != *known => {
            return damaged("its record is not what was written last".into());
        }
        // It was never written to.
        None if known.applied.log_id.is_some() => return damaged("its record is gone".into()),
        Some(_) | None => {}
    }
    if read != known.digest {
        return damaged(format!(
            "its {} pairs do not match the digest of {}",
            read.pairs, known.digest.pairs
        ));
    }
    Ok(())
}

/// Returns whether an error says something of the tree, and not of the machine, nor of a process
/// that can't use any tree any more.
fn is_of_the_tree(replica: &ReplicaMapInner, error: &StoreError) -> bool {
    !is_about_machine(error) && replica.shared.trees.given_up().is_none()
}
