//! [`Database`]: one sled database and its directory: how it is opened, trusted, set aside and
//! removed.
//!
//! Which trees are in which database is the business of `sled_tree`, which also says what is known
//! about sled.

use std::any::Any;
use std::fs::File;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::disk::{RealDisk, ensure_dir};
use super::sealed::{self, SealedError};
use crate::descriptors::{self, patiently};
use crate::sm::ports::StoreError;
use crate::types::ClusterId;

/// The file in the database's directory that has the next start move it aside.
const CONDEMNED: &str = "CONDEMNED";

/// The file in the directory of a database that was begun beside another: the cluster whose maps
/// are in it. Programs that know of one database pass over it, and may have served another cluster
/// meanwhile, in which the ids of replicas begin anew.
const OWNER: &str = "owner";
const OWNER_FORMAT: u64 = 1;

/// sled's own tree, which it always has.
const DEFAULT_TREE: &str = "__sled__default";

/// The file that sled keeps its log in.
const SLED_FILE: &str = "db";

/// Configures sled.
#[derive(Debug, Clone)]
pub struct SledOptions {
    pub cache_bytes: u64,
    /// Time that opening, or one step of a walk, may take; opening has a second more for every 16
    /// MiB of files.
    pub patience: Duration,
    /// The cluster whose maps are in it.
    pub cluster: ClusterId,
}

impl Default for SledOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            patience: Duration::from_secs(60),
            cluster: ClusterId(0),
        }
    }
}

/// The reason why there is no database.
#[derive(Debug, thiserror::Error)]
pub enum SledError {
    #[error("the map database {path} cannot be used: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// A thread of this process still hangs in the damaged files, which are out of the way now:
    /// start the process again.
    #[error(
        "the map database did not open in time and was moved to {moved_to}, or removed for want of \
        room; the process must be started again"
    )]
    Hangs { moved_to: PathBuf },
    #[error("a fresh map database {path} does not open: {reason}")]
    Fresh { path: PathBuf, reason: String },
}

/// Returns whether the next start will set the databases at `path` aside.
pub fn is_condemned(path: &Path) -> bool {
    numbered(path)
        .iter()
        .any(|(_, path)| path.join(CONDEMNED).exists())
}

/// Returns whether there is a database at `path`.
pub fn is_there(path: &Path) -> bool {
    !numbered(path).is_empty()
}

/// An open database.
pub(super) struct Database {
    pub db: sled::Db,
    pub path: PathBuf,
    /// The higher, the newer.
    pub number: u64,
    pub trust: WriteTrust,
}

impl Database {
    /// Opens the database `number` of those at `base`, or sets it aside where that fails.
    pub fn open(
        base: &Path,
        number: u64,
        options: &SledOptions,
        open: Opener,
    ) -> Result<Option<Self>, SledError> {
        let path = &path_of(base, number);

        // An earlier process found it damaged. sled may hang in it, so it is not opened again.
        let condemned = std::fs::read_to_string(path.join(CONDEMNED)).ok();
        let failure = match condemned {
            Some(reason) => OpenAttempt::Failed(format!("it was condemned: {reason}")),
            None => match foreign_reason(path, number, options.cluster) {
                Ok(None) => attempt(path, options, open),
                Ok(Some(reason)) => OpenAttempt::Failed(reason),
                Err(source) => OpenAttempt::Refused(source),
            },
        };
        let (reason, hangs) = match failure {
            OpenAttempt::Opened(db) => return Ok(Some(Self::new(db, number, path))),
            OpenAttempt::Failed(reason) => (reason, false),
            // The disk or its rights are at fault. The files may be whole, so they stay.
            OpenAttempt::Refused(source) => {
                return Err(SledError::Io {
                    path: path.to_owned(),
                    source,
                });
            }
            OpenAttempt::Hangs => ("it did not open in time".to_owned(), true),
        };
        let moved_to = move_aside(path, base).map_err(|source| SledError::Io {
            path: path.to_owned(),
            source,
        })?;
        tracing::warn!(path = %path.display(), moved_to = %moved_to.display(), %reason, "the map \
            database was moved aside: all trees are rebuilt");

        // The thread that hangs keeps the files open, so only another process can begin anew.
        if hangs {
            Err(SledError::Hangs { moved_to })
        } else {
            Ok(None)
        }
    }

    /// Begins the database `number` of those at `base`, where there is none. A failure leaves
    /// nothing, unless a thread of sled still hangs in it.
    pub fn create(
        base: &Path,
        number: u64,
        options: &SledOptions,
        open: Opener,
    ) -> Result<Self, SledError> {
        let path = &path_of(base, number);
        let attempted = match begin_directory(path, number, options.cluster) {
            Ok(()) => attempt(path, options, open),
            Err(source) => OpenAttempt::Refused(source),
        };
        let error = match attempted {
            OpenAttempt::Opened(db) => return Ok(Self::new(db, number, path)),
            OpenAttempt::Failed(reason) => SledError::Fresh {
                path: path.to_owned(),
                reason,
            },
            OpenAttempt::Refused(source) => SledError::Io {
                path: path.to_owned(),
                source,
            },
            OpenAttempt::Hangs => {
                return Err(SledError::Fresh {
                    path: path.to_owned(),
                    reason: "it hangs".into(),
                });
            }
        };
        // sled makes directories before it finds that it cannot go on, and the next attempt takes
        // another number.
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "what was begun of a map database \
                    stays");
            }
            Ok(()) | Err(_) => {}
        }
        Err(error)
    }

    fn new(db: sled::Db, number: u64, path: &Path) -> Self {
        begin_io_threads(&db);
        let trust = WriteTrust {
            db: db.clone(),
            lost: Arc::default(),
        };
        Self {
            db,
            path: path.to_owned(),
            number,
            trust,
        }
    }

    /// Names of its trees, sorted.
    pub fn names(&self) -> Result<Vec<String>, StoreError> {
        let names = self
            .trust
            .read("listing the trees", || Ok(self.db.tree_names()))?;
        let mut names: Vec<String> = names
            .iter()
            .filter_map(|name| String::from_utf8(name.to_vec()).ok())
            .collect();
        names.retain(|name| name != DEFAULT_TREE);
        names.sort();
        Ok(names)
    }

    pub fn holds(&self, name: &str) -> Result<bool, StoreError> {
        Ok(self.names()?.iter().any(|held| held == name))
    }

    /// Makes all that was written survive a power cut.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.trust.write("flushing the trees", || self.db.flush())?;
        let io_error = |source| StoreError::Io {
            context: format!("syncing {}", self.path.display()),
            source,
        };

        // sled's own flush does not fsync on Linux.
        for file in files_below(&self.path) {
            let opened = patiently("sync the maps", || File::open(&file));
            match opened.and_then(|file| file.sync_all()) {
                // sled removes files of its own meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(io_error)?,
            }
        }
        let opened = patiently("sync the maps", || File::open(&self.path));
        opened
            .and_then(|directory| directory.sync_all())
            .map_err(io_error)
    }

    /// Has the next start set it aside.
    pub fn condemn(&self, reason: &str) {
        let path = self.path.join(CONDEMNED);
        tracing::error!(path = %self.path.display(), %reason, "the map database is given up: the \
            next start begins a fresh one");
        let written = File::create(&path).and_then(|mut file| {
            io::Write::write_all(&mut file, reason.as_bytes())?;
            file.sync_all()
        });
        if let Err(error) = written {
            tracing::error!(path = %path.display(), %error, "cannot mark the map database: remove \
                its directory by hand");
        }
    }

    pub fn disk_bytes(&self) -> u64 {
        bytes_below(&self.path)
    }

    /// Removes its directory: nobody needs a tree of it any more. What is left of it after a crash
    /// is found by the next start.
    pub fn remove(self: Arc<Self>) -> io::Result<()> {
        // Closing it syncs its file, which would hold up the syncs of the log for as long as the
        // file is large.
        let _ = File::options()
            .write(true)
            .open(self.path.join(SLED_FILE))
            .and_then(|file| file.set_len(0));
        std::fs::remove_dir_all(&self.path)
    }
}

/// The directories of databases at `path`, by their numbers: it is the first itself, the others are
/// `<path>.<number>`.
pub(super) fn numbered(path: &Path) -> Vec<(u64, PathBuf)> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let number_of = |found: &str| match found.strip_prefix(&name)? {
        "" => Some(0),
        rest => {
            let number = rest.strip_prefix('.')?.parse().ok()?;

            // Only names as this program writes them: `state.01` is not ours.
            (path_of(path, number).file_name()?.to_str() == Some(found)).then_some(number)
        }
    };
    let entries = path
        .parent()
        .map(std::fs::read_dir)
        .into_iter()
        .flatten()
        .flatten()
        .flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut numbered: Vec<(u64, PathBuf)> = directories
        .filter_map(|entry| Some((number_of(entry.file_name().to_str()?)?, entry.path())))
        .collect();
    numbered.sort();
    numbered
}

/// The directory of the database `number` at `path`.
pub(super) fn path_of(path: &Path, number: u64) -> PathBuf {
    if number == 0 {
        return path.to_owned();
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{number}"));
    path.with_file_name(name)
}

/// Returns why a database that was begun beside another is none of this cluster.
fn foreign_reason(path: &Path, number: u64, cluster: ClusterId) -> io::Result<Option<String>> {
    // Every program knows the first one, and empties it for another cluster.
    if number == 0 {
        return Ok(None);
    }
    match sealed::read::<ClusterId>(&RealDisk, &path.join(OWNER), OWNER_FORMAT) {
        Ok(Some(owner)) if owner == cluster => Ok(None),
        Ok(Some(owner)) => Ok(Some(format!(
            "it was begun for cluster {owner}, and this is {cluster}"
        ))),
        Ok(None) => Ok(Some("it does not say of which cluster it is".to_owned())),
        Err(SealedError::Io { source, .. }) => Err(source),
        Err(error @ (SealedError::Damaged { .. } | SealedError::Newer { .. })) => {
            Ok(Some(error.to_string()))
        }
    }
}

/// Makes the directory of a database beside another, and says whose it is before there is anything
/// in it.
fn begin_directory(path: &Path, number: u64, cluster: ClusterId) -> io::Result<()> {
    if number == 0 {
        return Ok(());
    }
    ensure_dir(&RealDisk, path)?;
    sealed::write(&RealDisk, path, OWNER, OWNER_FORMAT, &cluster).map_err(io::Error::other)
}

/// Tracks whether sled is still trusted to write: until its first error that is not about damaged
/// files.
#[derive(Clone)]
pub(super) struct WriteTrust {
    db: sled::Db,
    /// The first error, and what it was about.
    lost: Arc<OnceLock<(io::ErrorKind, String)>>,
}

impl WriteTrust {
    /// Reads. That there is no descriptor to open a file by says nothing of the disk, and a read
    /// leaves nothing half done.
    pub fn read<T>(
        &self,
        doing: &str,
        call: impl FnOnce() -> sled::Result<T>,
    ) -> Result<T, StoreError> {
        let noting = || {
            call().inspect_err(|error| {
                if !lacks_descriptors(error) {
                    self.note(error)
                }
            })
        };
        guarded(doing, noting)
    }

    pub fn is_kept(&self) -> bool {
        self.lost.get().is_none()
    }

    /// Returns the error since which nothing is written.
    pub fn write_error(&self) -> Option<&str> {
        self.lost.get().map(|(_, error)| error.as_str())
    }

    fn note(&self, error: &sled::Error) {
        let kind = match error {
            sled::Error::Io(error) => error.kind(),
            _ => io::ErrorKind::Other,
        };
        if is_about_disk(error) && self.lost.set((kind, error.to_string())).is_ok() {
            // One handle that is never dropped keeps the database from being closed.
            std::mem::forget(self.db.clone());
        }
    }

    pub fn write<T>(
        &self,
        doing: &str,
        call: impl FnOnce() -> sled::Result<T>,
    ) -> Result<T, StoreError> {
        match self.lost.get() {
            Some((kind, error)) => {
                let reason = format!("the database is not written to any more, since {error}");
                let source = io::Error::new(*kind, reason);
                Err(StoreError::Io {
                    context: doing.to_owned(),
                    source,
                })
            }
            None => guarded(doing, || call().inspect_err(|error| self.note(error))),
        }
    }
}

pub(super) fn lacks_descriptors(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if descriptors::are_exhausted(error))
}

enum OpenAttempt {
    Opened(sled::Db),
    /// For a reason that is not in its files.
    Refused(io::Error),
    Failed(String),
    Hangs,
}

/// Opens the database: sled, or in a test a function that fails like it.
pub(super) type Opener = fn(&Path, u64) -> sled::Result<sled::Db>;

pub(super) fn open_database(path: &Path, cache_bytes: u64) -> sled::Result<sled::Db> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(cache_bytes)
        .mode(sled::Mode::HighThroughput);
    config
        .flush_every_ms(None)
        .print_profile_on_drop(false)
        .open()
}

/// sled starts its threads when it first writes, and they stay. They are to have the priority of
/// this thread, and not that of one which steps back: everybody waits for them. What fails here
/// fails at the next write too.
fn begin_io_threads(db: &sled::Db) {
    if let Err(error) = db.insert("opened", "").and_then(|_| db.flush()) {
        tracing::warn!(%error, "the map database was not written to after it was opened");
    }
}

/// Tries to open the database, in a thread that may never come back.
fn attempt(path: &Path, options: &SledOptions, open: Opener) -> OpenAttempt {
    let (sender, receiver) = mpsc::sync_channel(1);
    let (cache_bytes, own_path) = (options.cache_bytes, path.to_owned());
    let run = move || {
        let opened = std::panic::catch_unwind(AssertUnwindSafe(|| open(&own_path, cache_bytes)));
        // Nobody listens any more if it took too long.
        let _ = sender.send(opened);
    };

    // A larger database takes longer to open, and must not be taken for one that hangs.
    let limit = options.patience + Duration::from_secs(bytes_below(path) >> 24);
    if let Err(error) = std::thread::Builder::new()
        .name("open-trees".into())
        .spawn(run)
    {
        return OpenAttempt::Failed(format!("no thread to open it in: {error}"));
    }
    match receiver.recv_timeout(limit) {
        Ok(Ok(Ok(db))) => OpenAttempt::Opened(db),
        Ok(Ok(Err(sled::Error::Io(error)))) if !is_about_files(&error) => {
            OpenAttempt::Refused(error)
        }
        Ok(Ok(Err(error))) => OpenAttempt::Failed(error.to_string()),
        Ok(Err(panic)) => OpenAttempt::Failed(format!("it panicked: {}", panic_text(&*panic))),
        Err(RecvTimeoutError::Disconnected) => OpenAttempt::Failed("its thread died".into()),
        Err(RecvTimeoutError::Timeout) => OpenAttempt::Hangs,
    }
}

/// Returns true if an error is about the files, and not about the system around them or another
/// handle that still has them.
fn is_about_files(error: &io::Error) -> bool {
    use io::ErrorKind::{
        OutOfMemory, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    let around = matches!(
        error.kind(),
        OutOfMemory | PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull
    ) || descriptors::are_exhausted(error);
    // sled gives the error of its lock a text and no kind.
    !around && !error.to_string().contains("acquire lock")
}

/// Returns whether the disk failed, rather than that what is on it makes no sense.
fn is_about_disk(error: &sled::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(
        error,
        sled::Error::Io(error)
            if !matches!(error.kind(), InvalidData | NotFound | UnexpectedEof)
    )
}

/// Returns the path at which a database of `base` that did not open is kept.
fn aside_of(base: &Path) -> PathBuf {
    let mut name = base.file_name().unwrap_or_default().to_owned();
    name.push(".damaged");
    base.with_file_name(name)
}

/// Bytes that must be free on the disk, besides room for the rebuilt maps, for a damaged database
/// to be kept: the log goes on, and sled writes values several times.
const ROOM_BESIDE_DAMAGED_BYTES: u64 = 64 << 20;

/// Returns whether a database of so many bytes that did not open may be kept for people to look at,
/// with so many bytes free. Maps of about its size will be rebuilt beside it.
fn has_room_for_damaged(free: u64, bytes: u64) -> bool {
    free >= bytes
        .saturating_mul(2)
        .saturating_add(ROOM_BESIDE_DAMAGED_BYTES)
}

/// Has the directory out of the way: moved into the place of an earlier one, so that one is kept of
/// the same base at most, or removed where there is no room for it.
fn move_aside(path: &Path, base: &Path) -> io::Result<PathBuf> {
    let aside = aside_of(base);
    remove_if_there(&aside)?;
    let has_room = has_room_for_damaged(free_bytes(base)?, bytes_below(path));
    std::fs::rename(path, &aside)?;

    // Durable, or a power cut could put the damaged one back in its place.
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    if !has_room {
        give_up_damaged(&aside)?;
    }
    Ok(aside)
}

/// Removes the database that an earlier start set aside, where the disk has no room for it any
/// more.
pub(super) fn trim_damaged(base: &Path) {
    let aside = aside_of(base);
    let has_room = || free_bytes(base).is_ok_and(|free| has_room_for_damaged(free, 0));
    if !aside.exists() || has_room() {
        return;
    }
    if let Err(error) = give_up_damaged(&aside) {
        tracing::warn!(path = %aside.display(), %error, "a damaged map database stays");
    }
}

fn give_up_damaged(aside: &Path) -> io::Result<()> {
    remove_if_there(aside)?;
    tracing::warn!(path = %aside.display(), "a damaged map database is not kept: the disk has no \
        room for it");
    Ok(())
}

fn remove_if_there(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Returns what is left on the disk of a file or directory, or of the one that it will be in.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let found = if path.exists() {
        path
    } else {
        path.parent().unwrap_or(path)
    };
    let disk = rustix::fs::statvfs(found)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Bytes of the files in and below a directory, as far as they can be seen.
fn bytes_below(path: &Path) -> u64 {
    files_below(path)
        .iter()
        .filter_map(|file| file.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}

/// The files in and below a directory.
fn files_below(path: &Path) -> Vec<PathBuf> {
    let (mut files, mut directories) = (Vec::new(), vec![path.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                Ok(_) => files.push(entry.path()),
                Err(_) => {}
            }
        }
    }
    files
}

/// Calls sled; its errors and its panics become ours. The database may be left in any state by a
/// panic: the callers stop using what failed, and what is on disk is checked at the next start.
fn guarded<T>(doing: &str, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StoreError> {
    let source = match std::panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(sled::Error::Io(error))) => error,
        Ok(Err(error)) => io::Error::new(io::ErrorKind::InvalidData, error),
        Err(panic) => io::Error::other(format!("sled panicked: {}", panic_text(&*panic))),
    };
    Err(StoreError::Io {
        context: doing.to_owned(),
        source,
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "for a reason that is no text".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_is_kept_only_where_the_maps_can_be_rebuilt_beside_it() {
        const GIB: u64 = 1 << 30;
        assert!(has_room_for_damaged(3 * GIB, GIB));
        assert!(!has_room_for_damaged(2 * GIB, GIB));
        assert!(!has_room_for_damaged(0, 0));
        assert!(!has_room_for_damaged(u64::MAX - 1, u64::MAX));
    }
}
