//! [`SnapshotFiles`]: the directory of the snapshot files of a node.
//!
//! A published file is `<group>-<replica>-<term>-<index>.snap`; one that is being written ends in
//! `.part`, and such leftovers of a crash are removed when the directory is opened. Publishing is:
//! the file synced (by whoever wrote it), renamed, the directory synced.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sm::ports::StoreError;
use crate::storage::ReplicaKey;
use crate::storage::disk::{Disk, DiskFile, Open, ensure_dir, io_error};
use crate::storage::map::Applied;
use crate::types::LogId;

const PUBLISHED: &str = ".snap";
const TEMPORARY: &str = ".part";

/// Names and moves snapshot files. Clones share the directory.
#[derive(Clone)]
pub struct SnapshotFiles {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    next_temporary: Arc<AtomicU64>,
}

/// A published file as its name tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub path: PathBuf,
    pub log_id: Option<LogId>,
}

impl SnapshotFiles {
    /// Opens the directory, creating it where needed, and removes what a crash left half written.
    pub fn open(disk: Arc<dyn Disk>, directory: &Path) -> Result<Self, StoreError> {
        ensure_dir(&*disk, directory).map_err(|source| io_error("creating", directory, source))?;
        let files = Self {
            disk,
            directory: directory.to_owned(),
            next_temporary: Arc::default(),
        };
        for name in files
            .names()?
            .iter()
            .filter(|name| name.ends_with(TEMPORARY))
        {
            let path = directory.join(name);
            files
                .disk
                .remove(&path)
                .map_err(|source| io_error("removing the leftover", &path, source))?;
        }
        Ok(files)
    }

    pub(super) fn open_file(&self, path: &Path) -> Result<Box<dyn DiskFile>, StoreError> {
        self.disk
            .open(path, Open::Existing)
            .map_err(|source| io_error("opening", path, source))
    }

    /// An empty file under a temporary name of its own.
    pub(crate) fn create_temporary(
        &self,
        key: ReplicaKey,
    ) -> Result<(PathBuf, Box<dyn DiskFile>), StoreError> {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.join(format!("{key}.{number}{TEMPORARY}"));
        let file = self
            .disk
            .open(&path, Open::Truncated)
            .map_err(|source| io_error("creating", &path, source))?;
        Ok((path, file))
    }

    /// Gives a synced file its final name, durably.
    pub(super) fn publish(
        &self,
        temporary: &Path,
        key: ReplicaKey,
        applied: &Applied,
    ) -> Result<PathBuf, StoreError> {
        let path = self.directory.join(file_name(key, applied.log_id));

        // Renamed after its sync, so a final name always has a whole file.
        self.disk
            .rename(temporary, &path)
            .map_err(|source| io_error("publishing", &path, source))?;
        self.disk
            .sync_dir(&self.directory)
            .map_err(|source| io_error("syncing", &self.directory, source))?;
        Ok(path)
    }

    /// Removes a temporary file. What can't be removed now is removed at the next start.
    pub(crate) fn discard(&self, temporary: &Path) {
        if let Err(error) = self.disk.remove(temporary)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(path = %temporary.display(), %error, "a temporary snapshot file stays \
                until the next start");
        }
    }

    /// The published files of a replica, the newest first.
    pub fn list_of(&self, key: ReplicaKey) -> Result<Vec<Published>, StoreError> {
        let mut published: Vec<Published> = self
            .names()?
            .iter()
            .filter_map(|name| {
                Some(Published {
                    log_id: log_id_of(key, name)?,
                    path: self.directory.join(name),
                })
            })
            .collect();
        published.sort_by_key(|published| std::cmp::Reverse(published.log_id));
        Ok(published)
    }

    /// Removes the published files of a replica but `keep`.
    pub fn remove_others(&self, key: ReplicaKey, keep: Option<&Path>) -> Result<(), StoreError> {
        let mut removed = false;
        for published in self
            .list_of(key)?
            .iter()
            .filter(|published| Some(&*published.path) != keep)
        {
            self.disk
                .remove(&published.path)
                .map_err(|source| io_error("removing", &published.path, source))?;
            removed = true;
        }
        if removed {
            self.disk
                .sync_dir(&self.directory)
                .map_err(|source| io_error("syncing", &self.directory, source))?;
        }
        Ok(())
    }

    /// Removes the published files of every replica that is not among `known`.
    pub(crate) fn remove_unknown(&self, known: &BTreeSet<ReplicaKey>) -> Result<(), StoreError> {
        let owner = |name: &str| {
            let (group, rest) = name.split_once('-')?;
            let key = ReplicaKey::parse(&format!("{group}-{}", rest.split_once('-')?.0))?;
            log_id_of(key, name).map(|_| key)
        };
        let unknown: BTreeSet<ReplicaKey> = self
            .names()?
            .iter()
            .filter_map(|name| owner(name))
            .filter(|key| !known.contains(key))
            .collect();
        unknown
            .into_iter()
            .try_for_each(|key| self.remove_others(key, None))
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        self.disk
            .list(&self.directory)
            .map_err(|source| io_error("listing", &self.directory, source))
    }
}

/// An error of the disk with what was being done to which file.
fn file_name(key: ReplicaKey, log_id: Option<LogId>) -> String {
    match log_id {
        Some(LogId { term, index }) => format!("{key}-{term}-{index}{PUBLISHED}"),
        None => format!("{key}-none{PUBLISHED}"),
    }
}

/// Parses a name made by [`file_name`]; None if the file is not this replica's.
fn log_id_of(key: ReplicaKey, name: &str) -> Option<Option<LogId>> {
    let id = name
        .strip_prefix(&key.to_string())?
        .strip_prefix('-')?
        .strip_suffix(PUBLISHED)?;
    let log_id = match id.split_once('-') {
        Some((term, index)) => Some(LogId {
            term: term.parse().ok()?,
            index: index.parse().ok()?,
        }),
        None => None,
    };
    (file_name(key, log_id) == name).then_some(log_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::map::Applied;
    use crate::storage::sim_disk::SimDisk;
    use crate::storage::snapshot::format::{SnapshotHead, SnapshotWriter, UNSYNCED_BYTES_MAX};
    use crate::storage::snapshot::{Snapshot, SnapshotReceiver};
    use crate::storage::testing::{hex, unhex};
    use crate::types::{GroupId, ReplicaId};

    #[test]
    fn a_large_file_is_synced_while_it_grows() {
        let key = ReplicaKey {
            group: GroupId(1),
            replica: ReplicaId(5),
        };
        let disk = SimDisk::new(1);
        let files =
            SnapshotFiles::open(Arc::new(disk.clone()), Path::new("/snapshots")).expect("opened");
        let syncs = |before: u64| disk.counts().syncs - before;
        let applied = Applied {
            log_id: Some(LogId { term: 1, index: 9 }),
            ..Applied::default()
        };
        let (path, file) = files.create_temporary(key).expect("created");
        let mut writer =
            SnapshotWriter::begin(file, &SnapshotHead { key, applied }).expect("begun");
        let before = disk.counts().syncs;
        for n in 0..3 * UNSYNCED_BYTES_MAX / 1024 {
            writer.add(&n.to_be_bytes(), &[7; 1024]).expect("added");
        }
        assert!(
            (2..=4).contains(&syncs(before)),
            "{} syncs of a file that grows",
            syncs(before)
        );
        writer.finish().expect("finished");

        let bytes = disk.contents(&path).expect("it is there");
        let mut receiver = SnapshotReceiver::begin(&files, key).expect("begun");
        let before = disk.counts().syncs;
        for (n, chunk) in bytes.chunks(512 << 10).enumerate() {
            receiver
                .write_at((n as u64) * (512 << 10), chunk)
                .expect("taken");
        }
        assert!(
            (2..=4).contains(&syncs(before)),
            "{} syncs of a file that arrives",
            syncs(before)
        );
        assert_eq!(
            receiver.finish().expect("whole").trailer().digest.pairs,
            3 * UNSYNCED_BYTES_MAX as u64 / 1024
        );
    }

    /// A file of format 1 with two pairs, as it was written first and is read for ever.
    const GOLDEN: &str = "\
        515254534e415000010000000f00000001010501028407076d656d6265727334207022011400000002000000\
        da7b55f10100000001000000613102000000000000006263f82488a20202000000000000001167a3fb6c3c16\
        31ffefabc3639957d57100000000000000342070227b4c1ea1";

    #[test]
    fn the_file_format_stands_still() {
        let disk = SimDisk::new(1);
        let key = ReplicaKey {
            group: GroupId(1),
            replica: ReplicaId(5),
        };
        let membership = bytes::Bytes::from_static(b"members");
        let applied = Applied {
            log_id: Some(LogId {
                term: 2,
                index: 900,
            }),
            membership,
        };
        let head = SnapshotHead { key, applied };
        let files =
            SnapshotFiles::open(Arc::new(disk.clone()), Path::new("/snapshots")).expect("opened");
        let (path, file) = files.create_temporary(key).expect("created");
        let mut writer = SnapshotWriter::begin(file, &head).expect("begun");
        writer
            .add(b"a", b"1")
            .and_then(|()| writer.add(b"bc", b""))
            .expect("added");
        writer.finish().expect("finished");
        assert_eq!(
            hex(&disk.contents(&path).expect("it is there")),
            GOLDEN,
            "write a new format beside the old one"
        );

        let path = Path::new("/snapshots/g1-r5-2-900.snap");
        disk.open(path, Open::New)
            .expect("a file")
            .write_at(&unhex(GOLDEN), 0)
            .expect("written");
        let snapshot = Snapshot::open(&files, path).expect("its head and trailer hold");
        assert_eq!(
            (snapshot.written_by(), snapshot.applied()),
            (key, &head.applied)
        );
        let mut pairs = Vec::new();
        let mut note = |key: &[u8], value: &[u8]| {
            pairs.push((key.to_vec(), value.to_vec()));
            Ok(())
        };
        snapshot.for_each(&mut note).expect("its pairs hold");
        assert_eq!(
            pairs,
            [(b"a".to_vec(), b"1".to_vec()), (b"bc".to_vec(), Vec::new())]
        );
    }

    #[test]
    fn a_published_file_in_a_new_directory_survives_a_power_cut() {
        let key = ReplicaKey {
            group: GroupId(1),
            replica: ReplicaId(5),
        };
        for seed in 0..32 {
            let disk = SimDisk::new(seed);
            let files = SnapshotFiles::open(Arc::new(disk.clone()), Path::new("/data/snapshots"))
                .expect("opened");
            let applied = Applied {
                log_id: Some(LogId { term: 1, index: 9 }),
                ..Applied::default()
            };
            let (path, file) = files.create_temporary(key).expect("created");
            let writer = SnapshotWriter::begin(
                file,
                &SnapshotHead {
                    key,
                    applied: applied.clone(),
                },
            )
            .expect("begun");
            writer.finish().expect("finished");
            let path = files.publish(&path, key, &applied).expect("published");
            disk.crash();
            assert!(disk.contents(&path).is_some(), "seed {seed}");
        }
    }

    #[test]
    fn only_the_files_of_unknown_replicas_are_removed() {
        let disk = SimDisk::new(1);
        let files =
            SnapshotFiles::open(Arc::new(disk.clone()), Path::new("/snapshots")).expect("opened");
        let kept = [
            "g1-r5-2-900.snap",
            "g1-r5-none.snap",
            "g1-r51.snap",
            "g1-r6-2-09.snap",
            "mine",
        ];
        for name in kept.iter().chain(&["g1-r51-2-900.snap", "g2-r5-none.snap"]) {
            disk.open(&Path::new("/snapshots").join(name), Open::New)
                .expect("a file");
        }
        files
            .remove_unknown(&BTreeSet::from([ReplicaKey {
                group: GroupId(1),
                replica: ReplicaId(5),
            }]))
            .expect("removed");
        assert_eq!(disk.list(Path::new("/snapshots")).expect("listed"), kept);
    }

    #[test]
    fn file_names_name_one_replica_and_log_id() {
        let key = ReplicaKey {
            group: GroupId(1),
            replica: ReplicaId(5),
        };
        for log_id in [
            None,
            Some(LogId {
                term: 2,
                index: 900,
            }),
        ] {
            assert_eq!(log_id_of(key, &file_name(key, log_id)), Some(log_id));
        }
        for other in [
            "g1-r51-2-900.snap",
            "g1-r5-2.snap",
            "g1-r5-02-1.snap",
            "g1-r5-2-900.snap.part",
            "g1-r5.0.part",
            "LOCK",
        ] {
            assert_eq!(log_id_of(key, other), None, "{other}");
        }
    }
}
