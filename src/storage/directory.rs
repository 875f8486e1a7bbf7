//! [`DataDirectory`]: who a node is, and that it is alone with its data: the lock, the random
//! identity and the stamp.
//!
//! Both are [`sealed`] files. The stamp is written before the identity, so a directory with an
//! identity always has a stamp: one that is missing or damaged is an error and never taken for a
//! fresh start, because a node that forgot its cluster could found a second one. Files that are not
//! ours are left alone.

use parking_lot::Mutex;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::disk::{Disk, RealDisk, ensure_dir};
use super::sealed::{self, SealedError};
use super::sled_database::numbered;
use super::starts::{STARTS, StartBook};
use crate::sm::cluster::view::View;
use crate::types::{Address, ClusterId, DirectoryId, NodeId, ReplicaId, StartId};

const LOCK: &str = "LOCK";
const IDENTITY: &str = "identity";
const STAMP: &str = "stamp";
/// A mark beside them: the level of the cluster is not to be raised while this node is in it.
const HOLD: &str = "level-hold";
/// The format of all files but one:
const FORMAT: u64 = 1;
/// The stamp of a member of a cluster of a level above 0. Programs that know no levels refuse it as
/// of a newer version, where a field more in the first format would be damage to them.
const LEVELED_FORMAT: u64 = 2;
/// Says that this directory is an old copy, which its node may not go on with.
const OUTDATED: &str = "outdated";
/// Subdirectory that keeps the replicas of a refused directory until their cluster goes on without
/// them.
const ASIDE: &str = "set-aside";
/// Entries that are moved there, besides all map databases. The stamp stays, as that of a retired
/// node.
const PUT_ASIDE: [&str; 5] = ["log", "redo", "snapshots", "witnesses", STARTS];
/// The first database of maps.
const MAPS: &str = "state";

/// Records why a directory is an old copy.
#[derive(Serialize, Deserialize)]
struct Outdated {
    reason: String,
}

/// Records which cluster a data directory belongs to. Part of the disk format.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stamp {
    /// It never belonged to a cluster, nor promised itself to one.
    #[default]
    Fresh,
    /// It answered a founder: it helps to found with no other.
    Promised {
        view: Vec<Address>,
        founder: DirectoryId,
    },
    /// The founder, before the meta group has the view.
    Founding { view: Box<View> },
    Member {
        cluster: ClusterId,
        node: NodeId,
        meta_replica: ReplicaId,
        /// As it was last known.
        view: Box<View>,
    },
    /// It left its cluster, and still says where that is.
    Retired {
        cluster: ClusterId,
        node: NodeId,
        members: Vec<Address>,
    },
}

impl Stamp {
    /// Returns the level of the cluster that it is a member of.
    pub fn level(&self) -> u16 {
        match self {
            Stamp::Founding { view } | Stamp::Member { view, .. } => view.level,
            Stamp::Fresh | Stamp::Promised { .. } | Stamp::Retired { .. } => 0,
        }
    }
}

/// The reason why a data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the data directory {path} is in use by {}",
        pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Locked { path: PathBuf, pid: Option<u32> },
    #[error(
        "{path} is damaged: {reason}. Restore it, or give this node an empty data directory; it \
        then joins as a new node"
    )]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "{path} was written by a newer version of this program ({reason}): start this node with \
         that version. Nothing is wrong with its data"
    )]
    Newer { path: PathBuf, reason: String },
}

impl From<SealedError> for DirectoryError {
    fn from(error: SealedError) -> Self {
        match error {
            SealedError::Io { path, source } => Self::Io { path, source },
            SealedError::Damaged { path, reason } => Self::Damaged { path, reason },
            SealedError::Newer { path, reason } => Self::Newer { path, reason },
        }
    }
}

/// An open data directory. The lock is held while it lives.
pub struct DataDirectory {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    id: DirectoryId,
    stamp: Mutex<Stamp>,
    /// Held while a file is replaced, which takes as long as the disk does: who reads what is in it
    /// waits for none.
    writing: Mutex<()>,
    /// The cluster whose level is not to be raised.
    held: Mutex<Option<ClusterId>>,
    /// None in a simulation, where no other process is.
    _lock: Option<File>,
}

impl DataDirectory {
    /// Opens the directory, creating it with a new identity where there is none, and locks it.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        if !path.is_dir() {
            ensure_dir(&RealDisk, path).map_err(|source| DirectoryError::Io {
                path: path.to_owned(),
                source,
            })?;
        }
        // As an absolute path, so that messages can be acted on.
        let path = std::fs::canonicalize(path).map_err(|source| DirectoryError::Io {
            path: path.to_owned(),
            source,
        })?;
        let lock = lock(&path)?;
        set_aside_if_outdated(&path)?;
        Self::open_on(
            Arc::new(RealDisk),
            &path,
            DirectoryId(rand::random()),
            Some(lock),
        )
    }

    /// Opens the directory on any disk, without a lock. `id_if_new` is its identity if it has none
    /// yet.
    pub fn open_unlocked(
        disk: Arc<dyn Disk>,
        path: &Path,
        id_if_new: DirectoryId,
    ) -> Result<Self, DirectoryError> {
        Self::open_on(disk, path, id_if_new, None)
    }

    fn open_on(
        disk: Arc<dyn Disk>,
        path: &Path,
        id_if_new: DirectoryId,
        lock: Option<File>,
    ) -> Result<Self, DirectoryError> {
        let io_error = |source| DirectoryError::Io {
            path: path.to_owned(),
            source,
        };
        match disk.list(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                ensure_dir(&*disk, path).map_err(io_error)?
            }
            listed => drop(listed.map_err(io_error)?),
        }
        let identity: Option<DirectoryId> = sealed::read(&*disk, &path.join(IDENTITY), FORMAT)?;
        let stamp: Option<Stamp> = sealed::read(&*disk, &path.join(STAMP), LEVELED_FORMAT)?;
        let held: Option<ClusterId> = sealed::read(&*disk, &path.join(HOLD), FORMAT)?;
        let missing = |name: &str| DirectoryError::Damaged {
            path: path.join(name),
            reason: "it is missing".into(),
        };
        let (id, stamp) = match (identity, stamp) {
            (Some(id), Some(stamp)) => (id, stamp),
            (Some(_), None) => return Err(missing(STAMP)),
            // New, or its creation was interrupted: nobody has heard of it.
            (None, None | Some(Stamp::Fresh)) => {
                if let Some(parent) = path
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty())
                {
                    disk.sync_dir(parent).map_err(|source| DirectoryError::Io {
                        path: parent.to_owned(),
                        source,
                    })?;
                }

                // The stamp first: a directory with an identity and no stamp counts as damaged.
                sealed::write(&*disk, path, STAMP, FORMAT, &Stamp::Fresh)?;
                sealed::write(&*disk, path, IDENTITY, FORMAT, &id_if_new)?;
                (id_if_new, Stamp::Fresh)
            }
            (None, Some(_)) => return Err(missing(IDENTITY)),
        };
        Ok(Self {
            disk,
            path: path.to_owned(),
            id,
            stamp: Mutex::new(stamp),
            writing: Mutex::new(()),
            held: Mutex::new(held),
            _lock: lock,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn id(&self) -> DirectoryId {
        self.id
    }

    pub fn stamp(&self) -> Stamp {
        self.stamp.lock().clone()
    }

    /// Replaces the stamp; durable when it returns. After an error the next start may find the old
    /// one or the new. Blocking.
    pub fn set_stamp(&self, stamp: Stamp) -> Result<(), DirectoryError> {
        self.update_stamp(|_| Some(stamp)).map(|_| ())
    }

    /// Replaces the stamp by what `change` makes of it, if anything, with nobody between; durable
    /// when it returns. Returns the stamp as it is then. Blocking.
    pub fn update_stamp(
        &self,
        change: impl FnOnce(&Stamp) -> Option<Stamp>,
    ) -> Result<Stamp, DirectoryError> {
        // Two changes must not both start from the same stamp.
        let _writing = self.writing.lock();
        let mut current = self.stamp();
        if let Some(stamp) = change(&current).filter(|stamp| *stamp != current) {
            // Level 0 is written as the first programs wrote it, so that a node can go back to
            // them.
            match stamp.level() {
                0 => sealed::write(&*self.disk, &self.path, STAMP, FORMAT, &stamp)?,
                level => sealed::write_leveled(
                    &*self.disk,
                    &self.path,
                    STAMP,
                    (LEVELED_FORMAT, level),
                    &stamp,
                )?,
            }

            // Only once it is durable: nobody may act on a stamp that a crash takes back.
            self.stamp.lock().clone_from(&stamp);
            current = stamp;
        }
        Ok(current)
    }

    /// Returns whether this node holds the level of this cluster where it is.
    pub fn holds_level(&self, cluster: ClusterId) -> bool {
        *self.held.lock() == Some(cluster)
    }

    /// Holds the level of this cluster where it is, or does so no more; durable when it returns.
    /// Blocking.
    pub fn hold_level(&self, cluster: ClusterId, holds: bool) -> Result<(), DirectoryError> {
        let _writing = self.writing.lock();
        let is_held = self.held.lock().is_some();
        if holds {
            sealed::write(&*self.disk, &self.path, HOLD, FORMAT, &cluster)?;
            *self.held.lock() = Some(cluster);
        } else if is_held {
            let path = self.path.join(HOLD);
            let removed = self
                .disk
                .remove(&path)
                .and_then(|()| self.disk.sync_dir(&self.path));
            removed.map_err(|source| DirectoryError::Io { path, source })?;
            *self.held.lock() = None;
        }
        Ok(())
    }
}

impl DataDirectory {
    /// Begins another start of this directory's node. Durable when it returns. Blocking.
    ///
    /// # Errors
    ///
    /// When that can't be written: then the node may not say anything.
    pub fn begin_start(&self, id: StartId) -> Result<StartBook, DirectoryError> {
        Ok(StartBook::open(self.disk.clone(), &self.path, id)?)
    }

    /// Says on disk that this directory is an old copy: what opens it next puts its replicas aside.
    /// Durable when it returns. Blocking.
    ///
    /// # Errors
    ///
    /// When that can't be written.
    pub fn mark_outdated(&self, reason: &str) -> Result<(), DirectoryError> {
        let outdated = Outdated {
            reason: reason.to_owned(),
        };
        Ok(sealed::write(
            &*self.disk,
            &self.path,
            OUTDATED,
            FORMAT,
            &outdated,
        )?)
    }

    /// Returns whether anything was put aside of old copies.
    pub fn has_aside(&self) -> bool {
        self.path.join(ASIDE).exists()
    }

    /// Deletes what was put aside of directories that this view, which is that of their cluster,
    /// has no more: every group has committed a membership without them. Blocking.
    pub fn clear_aside(&self, view: &View) {
        let aside = self.path.join(ASIDE);
        for (id, _) in asides(&aside, view.cluster)
            .into_iter()
            .filter(|(id, _)| is_gone(view, *id))
        {
            let path = aside.join(aside_name(view.cluster, id));
            match std::fs::remove_dir_all(&path) {
                Ok(()) => tracing::info!(
                    "the cluster goes on without the old copy in {}: it is deleted",
                    path.display()
                ),
                Err(error) => tracing::warn!("{} cannot be deleted: {error}", path.display()),
            }
        }
        // Others may be in it: then it stays.
        let is_left = std::fs::remove_dir(&aside).is_err();
        tracing::trace!(
            "{} {}",
            aside.display(),
            if is_left { "stays" } else { "is gone" }
        );
    }
}

fn is_gone(view: &View, directory: DirectoryId) -> bool {
    view.nodes.values().all(|node| node.directory != directory)
}

fn aside_name(cluster: ClusterId, directory: DirectoryId) -> String {
    format!("{cluster}-{directory}")
}

/// The directories of this cluster that were put aside.
fn asides(aside: &Path, cluster: ClusterId) -> Vec<(DirectoryId, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(aside) else {
        return Vec::new();
    };
    let of_cluster = entries.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let id = name.strip_prefix(&format!("{cluster}-"))?.parse().ok()?;
        Some((id, entry.path()))
    });
    of_cluster.collect()
}

/// Makes a directory that was found to be an old copy that of a node which lost its disk: with
/// another identity, and the replicas put aside. Each step may be the last before a crash, and is
/// done again by the next start: the mark goes last.
fn set_aside_if_outdated(path: &Path) -> Result<(), DirectoryError> {
    let disk = RealDisk;
    let Some(outdated) = sealed::read::<Outdated>(&disk, &path.join(OUTDATED), FORMAT)? else {
        return Ok(());
    };
    let stamp: Option<Stamp> = sealed::read(&disk, &path.join(STAMP), LEVELED_FORMAT)?;
    let id: Option<DirectoryId> = sealed::read(&disk, &path.join(IDENTITY), FORMAT)?;

    // Retired and not fresh: it still knows its cluster and where the members are.
    let retired = match stamp {
        Some(Stamp::Member {
            cluster,
            node,
            view,
            ..
        }) => {
            let members = view
                .staying()
                .map(|(_, node)| node.address.clone())
                .collect();
            Some(Stamp::Retired {
                cluster,
                node,
                members,
            })
        }
        Some(Stamp::Retired {
            cluster,
            node,
            members,
        }) => Some(Stamp::Retired {
            cluster,
            node,
            members,
        }),
        Some(Stamp::Fresh | Stamp::Promised { .. } | Stamp::Founding { .. }) | None => None,
    };
    if let (Some(stamp @ Stamp::Retired { cluster, .. }), Some(id)) = (&retired, id) {
        tracing::warn!(
            "{} is an old copy ({}): its replicas are put aside, and rebuilt from the others",
            path.display(),
            outdated.reason
        );
        sealed::write(&disk, path, STAMP, FORMAT, stamp)?;
        let aside = path.join(ASIDE).join(aside_name(*cluster, id));
        put_aside(path, &aside).map_err(|source| DirectoryError::Io {
            path: aside.clone(),
            source,
        })?;

        // The identity last: its old value names the place aside, and a crash must find that again.
        sealed::write(&disk, path, IDENTITY, FORMAT, &DirectoryId(rand::random()))?;
    }
    let removed = disk
        .remove(&path.join(OUTDATED))
        .and_then(|()| disk.sync_dir(path));
    removed.map_err(|source| DirectoryError::Io {
        path: path.join(OUTDATED),
        source,
    })
}

fn put_aside(path: &Path, aside: &Path) -> io::Result<()> {
    let mut found: Vec<PathBuf> = PUT_ASIDE
        .iter()
        .map(|name| path.join(name))
        .filter(|path| path.exists())
        .collect();
    found.extend(numbered(&path.join(MAPS)).into_iter().map(|(_, path)| path));
    if found.is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(aside)?;
    for (from, name) in found
        .iter()
        .filter_map(|from| Some((from, from.file_name()?)))
    {
        std::fs::rename(from, aside.join(name))?;
    }

    // Durable before the identity changes, or the old replicas could appear under the new one.
    for changed in [aside, &path.join(ASIDE), path] {
        RealDisk.sync_dir(changed)?;
    }
    Ok(())
}

/// Takes the lock file, and writes the process id into it for whoever meets it.
fn lock(path: &Path) -> Result<File, DirectoryError> {
    let lock_path = path.join(LOCK);
    let io_error = |source| DirectoryError::Io {
        path: lock_path.clone(),
        source,
    };
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock_path);
    let mut file = opened.map_err(io_error)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut text = String::new();
            // Only for the message: what can't be read is left out of it.
            let pid = file
                .read_to_string(&mut text)
                .ok()
                .and_then(|_| text.trim().parse().ok());
            return Err(DirectoryError::Locked {
                path: path.to_owned(),
                pid,
            });
        }
        Err(std::fs::TryLockError::Error(source)) => return Err(io_error(source)),
    }

    // Not emptied before it is locked: whoever is refused reads the holder's process id in it.
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(io_error)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::cluster::view::{NodeSpec, PlacementSpec};
    use crate::sm::placement::first_view;
    use crate::storage::disk::Open;
    use crate::storage::sim_disk::SimDisk;
    use crate::types::GroupId;

    /// As commit 0bbd823 and the versions before it wrote them. They open for ever.
    const IDENTITY_GOLDEN: &[u8] = include_bytes!("goldens/identity.json");
    const BEFORE_WITNESSES: &[u8] = include_bytes!("goldens/stamp-before-witnesses.json");
    const MEMBER: &[u8] = include_bytes!("goldens/stamp-member.json");
    const RETIRED: &[u8] = include_bytes!("goldens/stamp-retired.json");

    fn member() -> Stamp {
        let address: Address = "127.0.0.1:1".parse().expect("an address");
        let (node, replica) = (NodeId(1), ReplicaId(u64::MAX));
        let of = NodeSpec {
            address,
            public_address: None,
            directory: DirectoryId(7),
        };
        let view = first_view(ClusterId(u128::MAX), PlacementSpec::default(), vec![of])
            .expect("a view of one node");
        Stamp::Member {
            cluster: view.cluster,
            node,
            meta_replica: replica,
            view: Box::new(view),
        }
    }

    fn stamps() -> Vec<Stamp> {
        let address: Address = "127.0.0.1:1".parse().expect("an address");
        let Stamp::Member {
            view,
            cluster,
            node,
            ..
        } = member()
        else {
            unreachable!("it is one")
        };
        vec![
            Stamp::Promised {
                view: vec![address.clone()],
                founder: DirectoryId(3),
            },
            Stamp::Founding { view },
            member(),
            Stamp::Retired {
                cluster,
                node,
                members: vec![address],
            },
            Stamp::Fresh,
        ]
    }

    #[test]
    fn a_directory_keeps_its_identity_and_its_stamp() {
        let temporary = tempfile::tempdir().expect("a directory");
        let path = temporary.path().join("a/b");
        let first = DataDirectory::open(&path).expect("created");
        let id = first.id();
        assert_eq!(first.stamp(), Stamp::Fresh);
        drop(first);
        for stamp in stamps() {
            let directory = DataDirectory::open(&path).expect("opened");
            directory.set_stamp(stamp.clone()).expect("stamped");
            assert_eq!(directory.stamp(), stamp);
            drop(directory);
            let again = DataDirectory::open(&path).expect("opened again");
            assert_eq!((again.id(), again.stamp()), (id, stamp));
        }
        let other = DataDirectory::open(&temporary.path().join("c")).expect("another");
        assert_ne!(other.id(), id);
    }

    #[test]
    fn a_stamp_of_a_level_is_of_another_format_and_a_hold_is_of_one_cluster() {
        let disk = SimDisk::new(1);
        let open = || {
            DataDirectory::open_unlocked(Arc::new(disk.clone()), Path::new("/data"), DirectoryId(7))
        };
        let directory = open().expect("created");
        let Stamp::Member {
            cluster,
            node,
            meta_replica,
            view,
        } = member()
        else {
            unreachable!("it is one")
        };
        let view = Box::new(View { level: 1, ..*view });
        let stamp = Stamp::Member {
            cluster,
            node,
            meta_replica,
            view,
        };
        directory.set_stamp(stamp.clone()).expect("stamped");
        let text = String::from_utf8(disk.contents(Path::new("/data/stamp")).expect("there"))
            .expect("text");
        assert!(
            text.starts_with("{\n  \"format\": 2,\n  \"level\": 1,\n"),
            "{text}"
        );
        assert_eq!(open().expect("opened").stamp(), stamp);
        directory.set_stamp(member()).expect("stamped");
        let text = String::from_utf8(disk.contents(Path::new("/data/stamp")).expect("there"))
            .expect("text");
        assert!(
            text.starts_with("{\n  \"format\": 1,\n  \"checksum\""),
            "{text}"
        );

        let holds =
            || [cluster, ClusterId(5)].map(|cluster| open().expect("opened").holds_level(cluster));
        directory.hold_level(cluster, false).expect("nothing to do");
        assert_eq!(holds(), [false, false]);
        directory.hold_level(cluster, true).expect("held");
        assert_eq!(holds(), [true, false]);
        directory.hold_level(cluster, false).expect("released");
        assert_eq!(holds(), [false, false]);
    }

    #[test]
    fn an_update_sees_the_stamp_and_may_leave_it() {
        let temporary = tempfile::tempdir().expect("a directory");
        let directory = DataDirectory::open(temporary.path()).expect("created");
        let promised = |founder| Stamp::Promised {
            view: Vec::new(),
            founder: DirectoryId(founder),
        };
        let promise = |founder| {
            directory.update_stamp(|now| (*now == Stamp::Fresh).then(|| promised(founder)))
        };
        assert_eq!(promise(1).expect("stamped"), promised(1));
        assert_eq!(promise(2).expect("left"), promised(1));
    }

    #[test]
    fn a_directory_in_use_is_refused_by_name_and_process() {
        let temporary = tempfile::tempdir().expect("a directory");
        let directory = DataDirectory::open(temporary.path()).expect("created");
        let error = DataDirectory::open(temporary.path())
            .err()
            .expect("it is locked")
            .to_string();
        assert!(
            error.contains(&directory.path().display().to_string()),
            "{error}"
        );
        assert!(
            error.contains(&format!("process {}", std::process::id())),
            "{error}"
        );
        drop(directory);
        DataDirectory::open(temporary.path()).expect("the lock went with its holder");
    }

    /// As often as it may be broken off.
    #[test]
    fn an_old_copy_becomes_a_lost_disk_and_is_kept_until_its_cluster_goes_without_it() {
        let temporary = tempfile::tempdir().expect("a directory");
        let path = temporary.path();
        let directory = DataDirectory::open(path).expect("created");
        let (
            id,
            Stamp::Member {
                cluster,
                node,
                view,
                ..
            },
        ) = (directory.id(), member())
        else {
            unreachable!("it is one")
        };
        directory.set_stamp(member()).expect("stamped");
        for name in ["log", "state", "state.1"] {
            std::fs::create_dir(path.join(name)).expect("created");
            std::fs::write(path.join(name).join("file"), name).expect("written");
        }
        directory.begin_start(StartId(1)).expect("begun");
        directory
            .mark_outdated("a later start is known")
            .expect("marked");
        drop(directory);

        let mut ids = vec![id];
        for _ in 0..3 {
            let directory = DataDirectory::open(path).expect("opened");
            assert!(
                !ids.contains(&directory.id()),
                "it is the old directory still"
            );
            ids.push(directory.id());
            let members = view
                .staying()
                .map(|(_, node)| node.address.clone())
                .collect();
            assert_eq!(
                directory.stamp(),
                Stamp::Retired {
                    cluster,
                    node,
                    members
                }
            );
            assert!(
                numbered(&path.join("state")).is_empty(),
                "a database was left"
            );
            assert!(!path.join("log").exists() && !path.join(STARTS).exists());
            // As if it had been broken off before the end.
            directory.mark_outdated("again").expect("marked");
        }
        let directory = DataDirectory::open(path).expect("opened");
        let kept = path
            .join(ASIDE)
            .join(aside_name(cluster, id))
            .join("log/file");
        let mut view = *view;
        view.nodes.get_mut(&node).expect("a node").directory = id;
        directory.clear_aside(&view);
        assert_eq!(std::fs::read(&kept).expect("still there"), b"log");
        view.nodes.get_mut(&node).expect("a node").directory = directory.id();
        directory.clear_aside(&View {
            cluster: ClusterId(1),
            ..view.clone()
        });
        assert!(kept.exists(), "another cluster does not decide");
        directory.clear_aside(&view);
        assert!(!path.join(ASIDE).exists());
    }

    #[test]
    fn foreign_files_are_left_alone() {
        let temporary = tempfile::tempdir().expect("a directory");
        let foreign = temporary.path().join("lost+found.txt");
        std::fs::write(&foreign, "mine").expect("written");
        DataDirectory::open(temporary.path()).expect("created beside it");
        assert_eq!(std::fs::read(&foreign).expect("still there"), b"mine");
    }

    /// A bit that changes nothing of what is read (in white space, say) is no damage; any other is
    /// an error.
    #[test]
    fn damage_is_an_error_and_never_a_fresh_start() {
        let disk = SimDisk::new(1);
        let path = Path::new("/data");
        let open = || {
            let directory =
                DataDirectory::open_unlocked(Arc::new(disk.clone()), path, DirectoryId(7))?;
            Ok::<_, DirectoryError>((directory.id(), directory.stamp(), directory))
        };
        let (_, _, directory) = open().expect("created");
        directory.set_stamp(member()).expect("stamped");
        let whole = (directory.id(), directory.stamp());
        let rewrite = |file: &Path, bytes: &[u8]| {
            let written = disk
                .open(file, Open::Truncated)
                .and_then(|file| file.write_at(bytes, 0));
            written.expect("written");
        };
        for name in [STAMP, IDENTITY] {
            let file = path.join(name);
            let good = disk.contents(&file).expect("there");
            for bit in 0..good.len() * 8 {
                let mut bytes = good.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                rewrite(&file, &bytes);
                if let Ok((id, stamp, _)) = open() {
                    assert_eq!(
                        (id, stamp),
                        whole,
                        "bit {bit} of {name} changed what is read"
                    );
                }
            }
            for len in 0..good.len() - 1 {
                rewrite(&file, &good[..len]);
                assert!(open().is_err(), "{name} cut to {len} bytes was believed");
            }
            disk.remove(&file).expect("removed");
            assert!(
                open().is_err(),
                "a directory without its {name} was believed"
            );
            let newer = String::from_utf8(good.clone()).expect("text").replacen(
                "\"format\": 1",
                "\"format\": 3",
                1,
            );
            rewrite(&file, newer.as_bytes());
            let error = open().err().expect("of a newer version");
            assert!(
                matches!(error, DirectoryError::Newer { .. })
                    && error.to_string().contains("format is 3"),
                "{error}"
            );
            rewrite(&file, &good);
        }
        let (id, stamp, _) = open().expect("whole again");
        assert_eq!((id, stamp), whole);
    }

    /// Every crash leaves the old stamp or the new one, and one identity.
    #[test]
    fn a_power_cut_while_stamping_leaves_the_old_stamp_or_the_new_one() {
        for seed in 0..100 {
            let disk = SimDisk::new(seed);
            let path = Path::new("/data");
            let open =
                |id| DataDirectory::open_unlocked(Arc::new(disk.clone()), path, DirectoryId(id));
            disk.fail_sync_after(seed % 7);
            let created = open(1).is_ok();
            disk.crash();
            let directory = open(2).expect("opened, or created anew");
            assert!(directory.id() == DirectoryId(1) || !created, "seed {seed}");
            disk.fail_sync_after(seed % 3);
            let stamped = directory.set_stamp(member()).is_ok();
            let id = directory.id();
            disk.crash();
            let directory = open(3).expect("opened");
            assert_eq!(directory.id(), id, "seed {seed}");
            match directory.stamp() {
                Stamp::Fresh => assert!(!stamped, "seed {seed}: a stamp was lost"),
                stamp => assert_eq!(stamp, member(), "seed {seed}"),
            }
        }
    }

    /// A disk with a data directory of these files.
    fn written(stamp: &[u8]) -> SimDisk {
        let (disk, path) = (SimDisk::new(1), Path::new("/data"));
        disk.create_dir(path).expect("created");
        for (name, bytes) in [(IDENTITY, IDENTITY_GOLDEN), (STAMP, stamp)] {
            disk.open(&path.join(name), Open::Truncated)
                .and_then(|file| file.write_at(bytes, 0))
                .expect("written");
        }
        disk
    }

    fn opened(disk: &SimDisk) -> Result<DataDirectory, DirectoryError> {
        DataDirectory::open_unlocked(Arc::new(disk.clone()), Path::new("/data"), DirectoryId(9))
    }

    #[test]
    fn what_earlier_versions_wrote_opens_and_says_what_it_said() {
        for (golden, nodes, has_witness) in [(BEFORE_WITNESSES, 2, false), (MEMBER, 3, true)] {
            let directory = opened(&written(golden)).expect("it opens");
            assert_eq!(
                directory.id().to_string(),
                "4c6628cc4df64c97f91b094c3118373e"
            );
            let Stamp::Member {
                node,
                meta_replica,
                view,
                ..
            } = directory.stamp()
            else {
                panic!("no member")
            };
            assert_eq!(
                (node, meta_replica, view.nodes.len()),
                (NodeId(1), ReplicaId(1), nodes)
            );
            assert_eq!(view.groups[&GroupId(1)].witness.is_some(), has_witness);
            assert_eq!(view.check(), Ok(()));
        }
        let Stamp::Retired { node, members, .. } =
            opened(&written(RETIRED)).expect("it opens").stamp()
        else {
            panic!("not retired")
        };
        assert_eq!((node, members.len()), (NodeId(2), 2));
    }

    /// Commit 0bbd823 sums up what it would write itself, so that a byte more would be damage to
    /// it.
    #[test]
    fn what_is_written_is_what_the_version_before_reads() {
        for golden in [MEMBER, RETIRED] {
            let disk = written(golden);
            let directory = opened(&disk).expect("it opens");
            let stamp = directory.stamp();
            directory.set_stamp(Stamp::Fresh).expect("stamped");
            directory.set_stamp(stamp).expect("stamped back");
            let bytes = disk
                .contents(&Path::new("/data").join(STAMP))
                .expect("there");
            assert_eq!(
                String::from_utf8_lossy(&bytes),
                String::from_utf8_lossy(golden)
            );
        }
        let disk = written(MEMBER);
        let directory = opened(&disk).expect("it opens");
        let Stamp::Member {
            cluster,
            node,
            meta_replica,
            mut view,
        } = directory.stamp()
        else {
            panic!("no member")
        };
        view.level = 1;
        directory
            .set_stamp(Stamp::Member {
                cluster,
                node,
                meta_replica,
                view,
            })
            .expect("stamped");
        let bytes = disk
            .contents(&Path::new("/data").join(STAMP))
            .expect("there");
        assert!(
            String::from_utf8_lossy(&bytes).contains("\"format\": 2"),
            "the version before would call it damaged"
        );
        assert_eq!(opened(&disk).expect("it opens").stamp(), directory.stamp());
        assert_eq!(
            written(MEMBER)
                .contents(&Path::new("/data").join(IDENTITY))
                .expect("there"),
            IDENTITY_GOLDEN
        );
    }
}
