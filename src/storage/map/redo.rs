//! [`RedoFile`]: what a checkpoint is about to write, so that one that the end of the process cuts
//! short is finished at the next start.
//!
//! A tree takes its changes one after another (see `sled_tree` for why not as one batch). Between
//! the first and the last of them it is no true state of the map; but with all of them in this file
//! it can be made one, as each says what a key is to be in the end. One file per replica,
//! `<group>-<replica>.redo`, written over by each checkpoint, after the tree was flushed that the
//! last one wrote. From then on nobody needs it: a large one is emptied, or each replica would keep
//! as much as its largest table on the disk.
//!
//! It is never synced: it outlives the process, and need not outlive the machine. Nothing is
//! believed because of it: a tree that it was written to is checked against the digest like any
//! other, and rebuilt where that does not hold.
//!
//! ```text
//! magic "QRTREDO\0" · length of the rest from here · xxh3_64 of it · redo (versioned postcard)
//! ```
//! Numbers are eight bytes, little-endian.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::record::{RECORD_KEY, TreeRecord};
use crate::sm::codec;
use crate::sm::ports::StoreError;
use crate::storage::ReplicaKey;
use crate::storage::disk::{Disk, DiskFile, Open, ensure_dir, io_error};
use crate::storage::tree::Tree;

const MAGIC: &[u8; 8] = b"QRTREDO\0";
const HEADER_BYTES: usize = 24;
const ENDING: &str = ".redo";
/// A file up to this size is left as it is: small ones are written too often to be emptied each
/// time.
const LEFT_BYTES_MAX: u64 = 64 << 10;

/// Completes a tree that a checkpoint has begun to write: the value that each changed key is to
/// have, and the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redo {
    pub record: TreeRecord,
    pub changes: Vec<(Bytes, Option<Bytes>)>,
}

impl Redo {
    /// Writes it to the tree, the record last. May be done again. Not flushed.
    pub fn carry_out(&self, tree: &dyn Tree) -> Result<(), StoreError> {
        for (key, change) in &self.changes {
            tree.write(key, change.as_deref())?;
        }
        tree.write(RECORD_KEY, Some(&self.record.encode()))
    }
}

/// The directory of the redo files of a node.
pub struct RedoFiles {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
}

impl RedoFiles {
    /// Opens the directory, creating it where needed.
    pub fn open(disk: Arc<dyn Disk>, directory: &Path) -> Result<Self, StoreError> {
        ensure_dir(&*disk, directory).map_err(|source| io_error("creating", directory, source))?;
        Ok(Self {
            disk,
            directory: directory.to_owned(),
        })
    }

    /// The file of a replica, to be written: created where it is not there.
    pub fn file(&self, key: ReplicaKey) -> Result<RedoFile, StoreError> {
        let path = self.path(key);
        let opened = match self.disk.open(&path, Open::Existing) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.disk.open(&path, Open::New)
            }
            opened => opened,
        };
        let file = opened.map_err(|source| io_error("opening", &path, source))?;
        let bytes_len = file
            .len()
            .map_err(|source| io_error("measuring", &path, source))?;
        Ok(RedoFile {
            file,
            path,
            bytes_len,
        })
    }

    /// Returns what the last checkpoint of a replica wrote, or was about to write. None if there
    /// was none, or if its file was cut short.
    pub fn read(&self, key: ReplicaKey) -> Result<Option<Redo>, StoreError> {
        let path = self.path(key);
        let file = match self.disk.open(&path, Open::Existing) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|source| io_error("opening", &path, source))?,
        };
        let read = |file: &dyn DiskFile| {
            let mut bytes = vec![0; usize::try_from(file.len()?).map_err(io::Error::other)?];
            let filled = file.read_at(&mut bytes, 0)?;
            bytes.truncate(filled);
            Ok(bytes)
        };
        let bytes = read(&*file).map_err(|source| io_error("reading", &path, source))?;

        // One that can't be read counts as none: the digest alone decides what is believed.
        let redo = whole(&bytes).and_then(|body| codec::decode::<Redo>(body, "a redo file").ok());
        Ok(redo.filter(|redo| redo.record.key == key))
    }

    /// Forgets it; fine if there is none.
    pub fn remove(&self, key: ReplicaKey) -> Result<(), StoreError> {
        let path = self.path(key);
        match self.disk.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("removing", &path, error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Forgets those of every replica that is not among `known`.
    pub fn remove_unknown(&self, known: &BTreeSet<ReplicaKey>) -> Result<(), StoreError> {
        let names = self
            .disk
            .list(&self.directory)
            .map_err(|source| io_error("listing", &self.directory, source))?;
        let keys = names
            .iter()
            .filter_map(|name| ReplicaKey::parse(name.strip_suffix(ENDING)?));
        keys.filter(|key| !known.contains(key))
            .try_for_each(|key| self.remove(key))
    }

    fn path(&self, key: ReplicaKey) -> PathBuf {
        self.directory.join(format!("{key}{ENDING}"))
    }
}

/// An open redo file.
pub struct RedoFile {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    bytes_len: u64,
}

impl RedoFile {
    /// Writes over what it said.
    pub fn write(&mut self, redo: &Redo) -> Result<(), StoreError> {
        let body = codec::encode(redo);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&xxh3_64(&body).to_le_bytes());
        bytes.extend_from_slice(&body);

        // The end of a longer one stays behind a shorter, so the file never gets smaller here.
        self.bytes_len = self.bytes_len.max(bytes.len() as u64);
        self.file
            .write_at(&bytes, 0)
            .map_err(|source| io_error("writing", &self.path, source))
    }

    /// Gives the space of a large file back. For when the tree was flushed, and what the file says
    /// is in it.
    pub fn empty(&mut self) -> Result<(), StoreError> {
        if self.bytes_len <= LEFT_BYTES_MAX {
            return Ok(());
        }
        self.file
            .set_len(0)
            .map_err(|source| io_error("emptying", &self.path, source))?;
        self.bytes_len = 0;
        Ok(())
    }
}

/// The body of a file that is whole. What is behind it is left of a longer one.
fn whole(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
    let (checksum, rest) = rest.split_first_chunk::<8>()?;
    let body = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    (xxh3_64(body) == u64::from_le_bytes(*checksum)).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::super::Applied;
    use super::super::digest::Digest;
    use super::*;
    use crate::storage::sim_disk::SimDisk;
    use crate::types::{GroupId, LogId, ReplicaId};

    const KEY: ReplicaKey = ReplicaKey {
        group: GroupId(1),
        replica: ReplicaId(5),
    };

    fn redo(changes: &[(&'static str, Option<&'static str>)]) -> Redo {
        let applied = Applied {
            log_id: Some(LogId { term: 2, index: 9 }),
            membership: Bytes::from_static(b"m"),
        };
        let record = TreeRecord {
            key: KEY,
            generation: 3,
            applied,
            digest: Digest { pairs: 1, sum: 7 },
        };
        let changes = changes
            .iter()
            .map(|(key, value)| ((*key).into(), value.map(Into::into)))
            .collect();
        Redo { record, changes }
    }

    #[test]
    fn a_file_says_what_was_last_written_or_nothing() {
        let disk = SimDisk::new(1);
        let files = RedoFiles::open(Arc::new(disk.clone()), Path::new("/redo")).expect("opened");
        assert_eq!(files.read(KEY).expect("none yet"), None);
        let (longer, shorter) = (
            redo(&[("key", Some("value")), ("gone", None)]),
            redo(&[("k", Some("v"))]),
        );
        for next in [&longer, &shorter, &longer] {
            files
                .file(KEY)
                .expect("opened")
                .write(next)
                .expect("written");
            assert_eq!(files.read(KEY).expect("read").as_ref(), Some(next));
        }
        let path = Path::new("/redo/g1-r5.redo");
        let bytes = disk.contents(path).expect("there");
        assert_eq!(
            bytes[24..],
            *b"\x01\x01\x05\x03\x01\x02\x09\x01m\x01\x07\x02\x03key\x01\x05value\x04gone\0",
            "the disk format has changed"
        );
        let rewrite = |bytes: &[u8]| {
            disk.open(path, Open::Truncated)
                .expect("opened")
                .write_at(bytes, 0)
                .expect("written")
        };
        for at in 0..bytes.len() {
            rewrite(&bytes[..at]);
            assert_eq!(files.read(KEY).expect("read"), None, "cut to {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            rewrite(&flipped);
            assert_eq!(files.read(KEY).expect("read"), None, "a bit of byte {at}");
        }
        rewrite(&bytes);
        assert_eq!(files.read(KEY).expect("read"), Some(longer));
        let other = ReplicaKey {
            replica: ReplicaId(6),
            ..KEY
        };
        disk.rename(path, Path::new("/redo/g1-r6.redo"))
            .expect("renamed");
        assert_eq!(files.read(other).expect("read"), None, "another's");
        files.remove(other).expect("removed");
        files.remove(other).expect("removed again");
        assert!(disk.list(Path::new("/redo")).expect("listed").is_empty());
    }

    #[test]
    fn a_large_file_gives_its_space_back_and_a_small_one_stays() {
        let disk = SimDisk::new(1);
        let files = RedoFiles::open(Arc::new(disk.clone()), Path::new("/redo")).expect("opened");
        let bytes = || {
            disk.contents(Path::new("/redo/g1-r5.redo"))
                .expect("there")
                .len()
        };
        let small = redo(&[("key", Some("value"))]);
        let mut file = files.file(KEY).expect("opened");
        file.write(&small).expect("written");
        file.empty().expect("left");
        assert_eq!(files.read(KEY).expect("read").as_ref(), Some(&small));

        let large = Redo {
            changes: vec![("key".into(), Some(vec![7; LEFT_BYTES_MAX as usize].into()))],
            ..small.clone()
        };
        file.write(&large).expect("written");
        file.write(&small).expect("written");
        assert!(bytes() > LEFT_BYTES_MAX as usize, "it is written over");
        file.empty().expect("emptied");
        assert_eq!((bytes(), files.read(KEY).expect("read")), (0, None));

        file.write(&large).expect("written");
        drop(file);
        files
            .file(KEY)
            .expect("one that an earlier process left")
            .empty()
            .expect("emptied");
        assert_eq!(bytes(), 0);
    }
}
