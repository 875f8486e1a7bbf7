//! Walks over a tree that is written to meanwhile: a copy of it, and a check of it. Both go page by
//! page, and follow what a checkpoint changes in the part that they have passed.

use std::sync::Arc;

use bytes::Bytes;

use super::digest::{Digest, PairHasher};
use super::open::pair_bytes;
use super::record::CORE_KEYS_START;
use crate::sm::ports::{Direction, KeyRange, StoreError};
use crate::storage::tree::Tree;

/// A page ends once this much is walked, if not sooner: the writer is locked for that long.
const PAGE_BYTES: u64 = 256 << 10;

/// A copy of a tree on its way.
pub(super) struct TreeCopy {
    pub tree: Arc<dyn Tree>,
    pub generation: u64,
    /// Every key before this one is in the copy as it is in the tree.
    pub next: Bytes,
    /// Of the pairs that were copied.
    pub bytes: u64,
    pub digest: Digest,
    pub hasher: PairHasher,
}

impl TreeCopy {
    /// Has the copy follow what a checkpoint changed in the tree.
    pub fn follow(&mut self, changes: &[(Bytes, Option<Bytes>)]) -> Result<(), StoreError> {
        // Later keys are copied with their own page, as they are then.
        for (key, change) in changes.iter().filter(|(key, _)| *key < self.next) {
            if let Some(old) = self.tree.get(key)? {
                self.digest.subtract(self.hasher.hash(key, &old));
            }
            if let Some(value) = change {
                self.digest.add(self.hasher.hash(key, value));
            }
            self.tree.write(key, change.as_deref())?;
        }
        Ok(())
    }

    /// Copies the next page. False at the end.
    pub fn copy_page(&mut self, from: &dyn Tree, pairs_max: usize) -> Result<bool, StoreError> {
        let (mut pairs, mut bytes) = (0, 0);
        for pair in from.scan(
            &KeyRange {
                start: self.next.clone(),
                end: None,
            },
            Direction::Forward,
        ) {
            if pairs >= pairs_max || bytes >= PAGE_BYTES {
                return Ok(true);
            }
            let (key, value) = pair?;
            self.tree.write(&key, Some(&value))?;
            self.digest.add(self.hasher.hash(&key, &value));
            pairs += 1;
            bytes += pair_bytes(&key, &value);
            self.bytes += pair_bytes(&key, &value);

            // The key right after this one.
            self.next = [&key[..], &[0]].concat().into();
        }
        Ok(false)
    }
}

/// A check on its way.
pub(super) struct TreeCheck {
    /// Every key before this one is in the digest as it is in the tree.
    pub next: Bytes,
    pub digest: Digest,
    hasher: PairHasher,
}

impl TreeCheck {
    pub fn new() -> Self {
        Self {
            next: Bytes::from_static(CORE_KEYS_START),
            digest: Digest::default(),
            hasher: PairHasher::default(),
        }
    }

    /// Has the check follow what a checkpoint is about to change in the tree.
    pub fn follow(
        &mut self,
        tree: &dyn Tree,
        changes: &[(Bytes, Option<Bytes>)],
    ) -> Result<(), StoreError> {
        for (key, change) in changes.iter().filter(|(key, _)| *key < self.next) {
            if let Some(old) = tree.get(key)? {
                self.digest.subtract(self.hasher.hash(key, &old));
            }
            if let Some(value) = change {
                self.digest.add(self.hasher.hash(key, value));
            }
        }
        Ok(())
    }

    /// Reads the next page.
    pub fn read_page(
        &mut self,
        tree: &dyn Tree,
        pairs_max: usize,
    ) -> Result<CheckedPage, StoreError> {
        // Begun anew for each page: the writer is unlocked in between, and the tree may change.
        let rest = KeyRange {
            start: self.next.clone(),
            end: None,
        };
        let (mut pairs, mut bytes) = (0, 0);
        for pair in tree.scan(&rest, Direction::Forward) {
            let (key, value) = pair?;
            self.digest.add(self.hasher.hash(&key, &value));
            pairs += 1;
            bytes += pair_bytes(&key, &value);
            self.next = [&key[..], &[0]].concat().into();
            if pairs >= pairs_max || bytes >= PAGE_BYTES {
                return Ok(CheckedPage {
                    bytes,
                    is_last: false,
                });
            }
        }
        Ok(CheckedPage {
            bytes,
            is_last: true,
        })
    }
}

/// A page that a check has read.
pub(super) struct CheckedPage {
    pub bytes: u64,
    pub is_last: bool,
}
