//! [`WitnessFiles`]: what a witness has instead of a map. A witness keeps its group's log and no
//! data; all that it applies is how far the log was committed, and what the membership was then.
//! Its file says both, so that the log before it can be purged.
//!
//! The file is there before the log knows the replica, and as long as it does: that is how a node
//! tells, when it starts, which of its replicas are witnesses. Named `<group>-<replica>.mark`, it
//! is replaced by one that was written beside it, synced and renamed.
//!
//! ```text
//! magic "QRTMARK\0" · mark (versioned postcard) · CRC-32 of all before, little-endian
//! ```

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::ReplicaKey;
use super::disk::{Disk, Open, ensure_dir, io_error};
use super::map::Applied;
use crate::sm::codec;
use crate::sm::ports::StoreError;

const MAGIC: &[u8; 8] = b"QRTMARK\0";
const CRC_BYTES: usize = 4;
/// A membership of hundreds of nodes is a few tens of KiB.
const FILE_BYTES_MAX: u64 = 16 << 20;
const MARK: &str = ".mark";
const TEMPORARY: &str = ".part";

/// Contents of a witness's file: the replica it belongs to and its applied position.
#[derive(Serialize, Deserialize)]
struct Watermark {
    key: ReplicaKey,
    applied: Applied,
}

/// The files of the witnesses of a node. Clones share the directory.
#[derive(Clone)]
pub struct WitnessFiles {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
}

impl WitnessFiles {
    /// Opens the directory, creating it where needed. What a crash left half written is overwritten
    /// by the next.
    pub fn open(disk: Arc<dyn Disk>, directory: &Path) -> Result<Self, StoreError> {
        ensure_dir(&*disk, directory).map_err(|source| io_error("creating", directory, source))?;
        Ok(Self {
            disk,
            directory: directory.to_owned(),
        })
    }

    /// Returns the position that the witness had applied when its file was last written; None if
    /// `key` is not a witness. Blocking.
    pub fn read(&self, key: ReplicaKey) -> Result<Option<Applied>, StoreError> {
        let path = self.path(key, MARK);
        let file = match self.disk.open(&path, Open::Existing) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error("opening", &path, source)),
        };
        let damaged = |reason: &str| StoreError::Damaged(format!("{}: {reason}", path.display()));

        // The scrub reads the file to find what has rotted, which the page cache would hide.
        file.forget_cached();
        let length = file
            .len()
            .map_err(|source| io_error("reading", &path, source))?;
        let length =
            usize::try_from(length.min(FILE_BYTES_MAX)).map_err(|_| damaged("it is too long"))?;
        let mut bytes = vec![0; length];
        let read = file
            .read_at(&mut bytes, 0)
            .map_err(|source| io_error("reading", &path, source))?;
        bytes.truncate(read);
        let (checked, checksum) = bytes
            .split_last_chunk::<CRC_BYTES>()
            .ok_or_else(|| damaged("it is too short"))?;
        if crc32fast::hash(checked) != u32::from_le_bytes(*checksum) {
            return Err(damaged("it does not match its checksum"));
        }
        let body = checked
            .strip_prefix(MAGIC)
            .ok_or_else(|| damaged("it does not begin like one"))?;
        let mark: Watermark = codec::decode(body, "the file of a witness")?;
        if mark.key != key {
            return Err(damaged("it is another's"));
        }
        Ok(Some(mark.applied))
    }

    /// Replaces what the file says; durable when it returns. Blocking.
    pub fn write(&self, key: ReplicaKey, applied: &Applied) -> Result<(), StoreError> {
        let (path, temporary) = (self.path(key, MARK), self.path(key, TEMPORARY));
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&codec::encode(&Watermark {
            key,
            applied: applied.clone(),
        }));
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        let written = self
            .disk
            .open(&temporary, Open::Truncated)
            .and_then(|file| {
                file.write_at(&bytes, 0)?;
                file.sync()
            });
        written.map_err(|source| io_error("writing", &temporary, source))?;
        self.disk
            .rename(&temporary, &path)
            .map_err(|source| io_error("publishing", &path, source))?;
        self.sync_directory()
    }

    /// Forgets it; fine if there is none. Blocking.
    pub fn remove(&self, key: ReplicaKey) -> Result<(), StoreError> {
        let path = self.path(key, MARK);
        match self.disk.remove(&path) {
            Ok(()) => self.sync_directory(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(io_error("removing", &path, source)),
        }
    }

    /// Forgets every witness that is not among `known`. Blocking.
    pub(crate) fn remove_unknown(&self, known: &BTreeSet<ReplicaKey>) -> Result<(), StoreError> {
        let names = self
            .disk
            .list(&self.directory)
            .map_err(|source| io_error("listing", &self.directory, source))?;
        let keys = names
            .iter()
            .filter_map(|name| ReplicaKey::parse(name.strip_suffix(MARK)?));
        keys.filter(|key| !known.contains(key))
            .try_for_each(|key| self.remove(key))
    }

    fn sync_directory(&self) -> Result<(), StoreError> {
        self.disk
            .sync_dir(&self.directory)
            .map_err(|source| io_error("syncing", &self.directory, source))
    }

    fn path(&self, key: ReplicaKey, ending: &str) -> PathBuf {
        self.directory.join(format!("{key}{ending}"))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::storage::sim_disk::SimDisk;
    use crate::storage::testing::{hex, unhex};
    use crate::types::{GroupId, LogId, ReplicaId};

    const KEY: ReplicaKey = ReplicaKey {
        group: GroupId(3),
        replica: ReplicaId(7),
    };

    fn applied(index: u64) -> Applied {
        Applied {
            log_id: Some(LogId { term: 2, index }),
            membership: Bytes::from_static(b"members"),
        }
    }

    fn open(disk: &SimDisk) -> WitnessFiles {
        WitnessFiles::open(Arc::new(disk.clone()), Path::new("/witnesses")).expect("a directory")
    }

    #[test]
    fn what_was_written_survives_a_crash_and_is_forgotten_when_it_is_removed() {
        let disk = SimDisk::new(1);
        let files = open(&disk);
        assert_eq!(files.read(KEY).expect("readable"), None);
        for index in [4, 9] {
            files.write(KEY, &applied(index)).expect("written");
            disk.crash();
            assert_eq!(
                open(&disk).read(KEY).expect("readable"),
                Some(applied(index))
            );
        }
        let other = ReplicaKey {
            replica: ReplicaId(8),
            ..KEY
        };
        assert_eq!(files.read(other).expect("readable"), None);
        for _ in 0..2 {
            files.remove(KEY).expect("removed");
            assert_eq!(files.read(KEY).expect("readable"), None);
        }
    }

    /// A file of the first format, as it was written first and is read for ever.
    const GOLDEN: &str = "5152544d41524b000103070102ac02076d656d62657273169db059";

    #[test]
    fn the_file_format_stands_still() {
        let disk = SimDisk::new(1);
        let files = open(&disk);
        files.write(KEY, &applied(300)).expect("written");
        let path = files.path(KEY, MARK);
        assert_eq!(
            hex(&disk.contents(&path).expect("it is there")),
            GOLDEN,
            "write a new format beside the old one"
        );

        let file = disk.open(&path, Open::Truncated).expect("opened");
        file.write_at(&unhex(GOLDEN), 0).expect("written");
        assert_eq!(files.read(KEY).expect("readable"), Some(applied(300)));
    }

    #[test]
    fn a_file_with_a_flipped_bit_is_damaged() {
        let disk = SimDisk::new(1);
        let files = open(&disk);
        files.write(KEY, &applied(4)).expect("written");
        let path = files.path(KEY, MARK);
        let file = disk.open(&path, Open::Existing).expect("it is there");
        let length = file.len().expect("its length");
        for offset in 0..length {
            let mut byte = [0];
            file.read_at(&mut byte, offset).expect("a byte");
            file.write_at(&[byte[0] ^ 4], offset).expect("another");
            assert!(
                matches!(files.read(KEY), Err(StoreError::Damaged(_))),
                "byte {offset}"
            );
            file.write_at(&byte, offset).expect("as before");
        }
        assert_eq!(files.read(KEY).expect("readable"), Some(applied(4)));
    }
}
