//! [`SledTrees`]: the trees of a node in one sled database. The only file that names sled.
//!
//! What is known about sled 0.34.7, and how it is kept from hurting:
//! - it may fail, panic or hang when it opens or reads damaged files: opening and walking go on in threads of their own under a limit
//!   of time, panics become errors, and what will not open is moved aside for a fresh database (its trees can all be rebuilt);
//! - `flush` does not reach the disk through a power cut: [`Trees::sync`] syncs file by file, and the digest of the state module
//!   tells a torn tree;
//! - a batch holds back all readers of the process until it is done (50 ms for a mebibyte of small pairs), and leaves thousands of old nodes that are
//!   freed a few at a time by later uses: so pairs are written one by one, and the state module sees to it that this does no harm;
//! - what is not flushed piles up in memory: the callers flush often;
//! - a dead thread of sled would be met as an error of a later call, which stops the replica;
//! - after an error of the disk, as a full one, which a read may meet as well, the next flush may wait for ever, and closing flushes: from then
//!   on whatever is there to write fails at once, and the database is not closed before the process ends.

use std::any::Any;
use std::fs::File;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;

use super::tree::{Tree, Trees, Walk};
use crate::descriptors::{self, patiently};
use crate::sm::ports::{Direction, Items, KeyRange, Pairs, StoreError, ValueStart};

/// The file in the database's directory that has the next start move it aside.
const CONDEMNED: &str = "CONDEMNED";

/// sled writes larger values to files of their own. It may begin to a little above this.
const LARGE_BYTES: usize = 100 << 10;

/// sled's own tree, which it always has.
const DEFAULT_TREE: &str = "__sled__default";

/// How sled is run.
#[derive(Debug, Clone)]
pub struct SledOptions {
    pub cache_bytes: u64,
    /// How long opening, or one step of a walk, may take; opening has a second more for every 16 MiB of files.
    pub patience: Duration,
}

impl Default for SledOptions {
    fn default() -> Self {
        Self { cache_bytes: 64 << 20, patience: Duration::from_secs(60) }
    }
}

/// Why there is no database.
#[derive(Debug, thiserror::Error)]
pub enum SledError {
    #[error("the map database {path} cannot be used: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// A thread of this process still hangs in the damaged files, which are out of the way now: start the process again.
    #[error("the map database did not open in time and was moved to {moved_to}; the process must be started again")]
    Hangs { moved_to: PathBuf },
    #[error("a fresh map database {path} does not open: {reason}")]
    Fresh { path: PathBuf, reason: String },
}

/// Whether the next [`SledTrees::open`] will set the database at `path` aside.
pub fn is_condemned(path: &Path) -> bool {
    path.join(CONDEMNED).exists()
}

/// The trees of a node.
pub struct SledTrees {
    db: sled::Db,
    path: PathBuf,
    patience: Duration,
    trust: Trust,
}

/// Whether sled is still trusted to write: until its first error that is not about damaged files.
#[derive(Clone)]
struct Trust {
    db: sled::Db,
    lost: Arc<OnceLock<String>>,
}

impl Trust {
    /// Reads. That there is no descriptor to open a file by says nothing of the disk, and a read leaves nothing half done.
    fn read<T>(&self, doing: &str, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StoreError> {
        let noting = || {
            call().inspect_err(|error| {
                if !lacks_descriptors(error) {
                    self.note(error)
                }
            })
        };
        guarded(doing, noting)
    }

    fn note(&self, error: &sled::Error) {
        if is_of_the_disk(error) && self.lost.set(error.to_string()).is_ok() {
            // One handle that is never dropped keeps the database from being closed.
            std::mem::forget(self.db.clone());
        }
    }

    fn write<T>(&self, doing: &str, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StoreError> {
        match self.lost.get() {
            Some(error) => {
                let source = io::Error::other(format!("the database is not written to any more, since {error}"));
                Err(StoreError::Io { context: doing.to_owned(), source })
            }
            None => guarded(doing, || call().inspect_err(|error| self.note(error))),
        }
    }
}

/// Calls sled again while it has no descriptor to open a file by. Only for reads: a write that lacks one is never finished.
fn waiting<T>(doing: &str, call: impl FnMut() -> sled::Result<T>) -> sled::Result<T> {
    descriptors::retry(doing, call, lacks_descriptors)
}

fn lacks_descriptors(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if descriptors::are_exhausted(error))
}

/// Waits until there is a descriptor for the file of its own that sled writes a large value to.
fn await_descriptor(path: &Path) -> Result<(), StoreError> {
    let opened = descriptors::patiently("write a large value", || File::open(path));
    opened.map(drop).map_err(|source| StoreError::Io { context: format!("opening {}", path.display()), source })
}

impl SledTrees {
    /// Opens the database at `path`. One that does not open is moved to `<path>.damaged` (in the place of an earlier one) and a fresh
    /// one is begun. Blocking.
    pub fn open(path: &Path, options: &SledOptions) -> Result<Self, SledError> {
        Self::open_by(path, options, open_database)
    }

    fn new(db: sled::Db, path: &Path, options: &SledOptions) -> Self {
        begin_io_threads(&db);
        let trust = Trust { db: db.clone(), lost: Arc::default() };
        Self { db, path: path.to_owned(), patience: options.patience, trust }
    }

    fn open_by(path: &Path, options: &SledOptions, open: Opener) -> Result<Self, SledError> {
        let condemned = std::fs::read_to_string(path.join(CONDEMNED)).ok();
        let failure = match condemned {
            Some(reason) => Attempt::Failed(format!("it was condemned: {reason}")),
            None => attempt(path, options, open),
        };
        let (reason, hangs) = match failure {
            Attempt::Opened(db) => return Ok(Self::new(db, path, options)),
            Attempt::Failed(reason) => (reason, false),
            Attempt::Refused(source) => return Err(SledError::Io { path: path.to_owned(), source }),
            Attempt::Hangs => ("it did not open in time".to_owned(), true),
        };
        let moved_to = move_aside(path).map_err(|source| SledError::Io { path: path.to_owned(), source })?;
        tracing::warn!(path = %path.display(), moved_to = %moved_to.display(), %reason, "the map database was moved aside: all trees are rebuilt");
        if hangs {
            return Err(SledError::Hangs { moved_to });
        }
        match attempt(path, options, open) {
            Attempt::Opened(db) => Ok(Self::new(db, path, options)),
            Attempt::Failed(reason) => Err(SledError::Fresh { path: path.to_owned(), reason }),
            Attempt::Refused(source) => Err(SledError::Io { path: path.to_owned(), source }),
            Attempt::Hangs => Err(SledError::Fresh { path: path.to_owned(), reason: "it hangs".into() }),
        }
    }
}

enum Attempt {
    Opened(sled::Db),
    /// For a reason that is not in its files.
    Refused(io::Error),
    Failed(String),
    Hangs,
}

/// What opens the database: sled, or in a test what fails like it.
type Opener = fn(&Path, u64) -> sled::Result<sled::Db>;

fn open_database(path: &Path, cache_bytes: u64) -> sled::Result<sled::Db> {
    let config = sled::Config::new().path(path).cache_capacity(cache_bytes).mode(sled::Mode::HighThroughput);
    config.flush_every_ms(None).print_profile_on_drop(false).open()
}

/// sled starts its threads when it first writes, and they stay. They are to have the priority of this thread, and not that of one which steps
/// back: everybody waits for them. What fails here fails at the next write too.
fn begin_io_threads(db: &sled::Db) {
    if let Err(error) = db.insert("opened", "").and_then(|_| db.flush()) {
        tracing::warn!(%error, "the map database was not written to after it was opened");
    }
}

/// Tries to open the database, in a thread that may never come back.
fn attempt(path: &Path, options: &SledOptions, open: Opener) -> Attempt {
    let (sender, receiver) = mpsc::sync_channel(1);
    let (cache_bytes, own_path) = (options.cache_bytes, path.to_owned());
    let run = move || {
        let opened = std::panic::catch_unwind(AssertUnwindSafe(|| open(&own_path, cache_bytes)));
        // Nobody listens any more if it took too long.
        let _ = sender.send(opened);
    };
    let limit = options.patience + Duration::from_secs(bytes_below(path) >> 24);
    if let Err(error) = std::thread::Builder::new().name("open-trees".into()).spawn(run) {
        return Attempt::Failed(format!("no thread to open it in: {error}"));
    }
    match receiver.recv_timeout(limit) {
        Ok(Ok(Ok(db))) => Attempt::Opened(db),
        Ok(Ok(Err(sled::Error::Io(error)))) if !is_of_the_files(&error) => Attempt::Refused(error),
        Ok(Ok(Err(error))) => Attempt::Failed(error.to_string()),
        Ok(Err(panic)) => Attempt::Failed(format!("it panicked: {}", panic_text(&*panic))),
        Err(RecvTimeoutError::Disconnected) => Attempt::Failed("its thread died".into()),
        Err(RecvTimeoutError::Timeout) => Attempt::Hangs,
    }
}

/// Whether an error says something of the files, and not of the system around them or of another handle that still has them.
fn is_of_the_files(error: &io::Error) -> bool {
    use io::ErrorKind::{OutOfMemory, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let around = matches!(error.kind(), OutOfMemory | PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull)
        || descriptors::are_exhausted(error);
    // sled gives the error of its lock a text and no kind.
    !around && !error.to_string().contains("acquire lock")
}

/// Whether the disk failed, rather than that what is on it makes no sense.
fn is_of_the_disk(error: &sled::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(error, sled::Error::Io(error) if !matches!(error.kind(), InvalidData | NotFound | UnexpectedEof))
}

/// Moves the directory out of the way, in the place of an earlier one.
fn move_aside(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".damaged");
    let aside = path.with_file_name(name);
    match std::fs::remove_dir_all(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    std::fs::rename(path, &aside)?;
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(aside)
}

/// Bytes of the files in and below a directory, as far as they can be seen.
fn bytes_below(path: &Path) -> u64 {
    files_below(path).iter().filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// The files in and below a directory.
fn files_below(path: &Path) -> Vec<PathBuf> {
    let (mut files, mut directories) = (Vec::new(), vec![path.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                Ok(_) => files.push(entry.path()),
                Err(_) => {}
            }
        }
    }
    files
}

impl Trees for SledTrees {
    fn open(&self, name: &str) -> Result<Arc<dyn Tree>, StoreError> {
        let tree = self.trust.write("opening a tree", || self.db.open_tree(name))?;
        Ok(Arc::new(SledTree { tree, path: self.path.clone(), patience: self.patience, trust: self.trust.clone() }))
    }

    fn drop_tree(&self, name: &str) -> Result<(), StoreError> {
        self.trust.write("dropping a tree", || self.db.drop_tree(name)).map(|_| ())
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        let names = self.trust.read("listing the trees", || Ok(self.db.tree_names()))?;
        let mut names: Vec<String> = names.iter().filter_map(|name| String::from_utf8(name.to_vec()).ok()).collect();
        names.retain(|name| name != DEFAULT_TREE);
        names.sort();
        Ok(names)
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.trust.write("flushing the trees", || self.db.flush())?;
        let io_error = |source| StoreError::Io { context: format!("syncing {}", self.path.display()), source };
        for file in files_below(&self.path) {
            let opened = patiently("sync the maps", || File::open(&file));
            match opened.and_then(|file| file.sync_all()) {
                // sled removes files of its own meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(io_error)?,
            }
        }
        let opened = patiently("sync the maps", || File::open(&self.path));
        opened.and_then(|directory| directory.sync_all()).map_err(io_error)
    }

    fn condemn(&self, reason: &str) {
        let path = self.path.join(CONDEMNED);
        tracing::error!(path = %self.path.display(), %reason, "the map database is given up: the next start begins a fresh one");
        let written = File::create(&path).and_then(|mut file| {
            io::Write::write_all(&mut file, reason.as_bytes())?;
            file.sync_all()
        });
        if let Err(error) = written {
            tracing::error!(path = %path.display(), %error, "cannot mark the map database: remove its directory by hand");
        }
    }
}

struct SledTree {
    tree: sled::Tree,
    /// That of the database.
    path: PathBuf,
    patience: Duration,
    trust: Trust,
}

/// Copies the start alone: sled's own value goes as soon as it has been looked at.
fn copied_start(value: &[u8], bytes_max: usize) -> ValueStart {
    ValueStart { start: Bytes::copy_from_slice(&value[..value.len().min(bytes_max)]), len: value.len() }
}

impl SledTree {
    fn scan_as<'a, V: 'a>(&'a self, range: &KeyRange, direction: Direction, seen: impl Fn(&[u8]) -> V + 'a) -> Items<'a, V> {
        if range.is_empty() {
            return Box::new(std::iter::empty());
        }
        let mut iter = self.tree.range::<&[u8], _>(range.bounds());
        let mut ended = false;
        Box::new(std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let mut step = || match direction {
                Direction::Forward => iter.next().transpose(),
                Direction::Reverse => iter.next_back().transpose(),
            };
            let pair = self.trust.read("scanning a tree", || waiting("scan values", &mut step)).transpose();
            ended = !matches!(pair, Some(Ok(_)));
            pair.map(|pair| pair.map(|(key, value)| (Bytes::copy_from_slice(&key), seen(&value))))
        }))
    }
}

impl Tree for SledTree {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let value = self.trust.read("reading a tree", || waiting("read a value", || self.tree.get(key)))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        let value = self.trust.read("reading a tree", || waiting("read a value", || self.tree.get(key)))?;
        Ok(value.map(|value| copied_start(&value, bytes_max)))
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        self.scan_as(range, direction, Bytes::copy_from_slice)
    }

    fn scan_starts<'a>(&'a self, range: &KeyRange, direction: Direction, bytes_max: usize) -> Items<'a, ValueStart> {
        self.scan_as(range, direction, move |value| copied_start(value, bytes_max))
    }

    fn write(&self, key: &[u8], change: Option<&[u8]>) -> Result<(), StoreError> {
        if change.is_some_and(|value| value.len() >= LARGE_BYTES) {
            await_descriptor(&self.path)?;
        }
        let call = || match change {
            Some(value) => self.tree.insert(key, value),
            None => self.tree.remove(key),
        };
        self.trust.write("writing a tree", call).map(|_| ())
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.trust.write("flushing a tree", || self.tree.flush()).map(|_| ())
    }

    fn walk(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> Walk) -> Result<(), StoreError> {
        let (sender, receiver) = mpsc::sync_channel(WALK_PAGES_AHEAD);
        let (tree, trust) = (self.tree.clone(), self.trust.clone());
        let spawned = std::thread::Builder::new().name("walk-tree".into()).spawn(move || send_pages(&tree, &trust, &sender));
        spawned.map_err(|source| StoreError::Io { context: "walking a tree".into(), source })?;
        loop {
            match receiver.recv_timeout(self.patience) {
                Ok(Ok(page)) if page.is_empty() => return Ok(()),
                Ok(Ok(page)) => {
                    if page.iter().any(|(key, value)| visit(key, value) == Walk::Stop) {
                        return Ok(());
                    }
                }
                Ok(Err(error)) => return Err(error),
                Err(kind) => {
                    let (kind, text) = match kind {
                        RecvTimeoutError::Timeout => (io::ErrorKind::TimedOut, "sled hangs in it: start the process again"),
                        RecvTimeoutError::Disconnected => (io::ErrorKind::Other, "its thread died"),
                    };
                    return Err(StoreError::Io { context: "walking a tree".into(), source: io::Error::new(kind, text) });
                }
            }
        }
    }
}

type Page = Vec<(sled::IVec, sled::IVec)>;

/// Pages that a walking thread may be ahead of its reader, and how large they are.
const WALK_PAGES_AHEAD: usize = 4;
const WALK_PAGE_PAIRS: usize = 512;
const WALK_PAGE_BYTES: usize = 1 << 20;

/// Sends all pairs of a tree, and an empty page at the end. Ends early when nobody listens.
fn send_pages(tree: &sled::Tree, trust: &Trust, sender: &mpsc::SyncSender<Result<Page, StoreError>>) {
    let mut pairs = tree.iter();
    loop {
        let page = trust.read("walking a tree", || {
            let (mut page, mut bytes) = (Page::new(), 0);
            while page.len() < WALK_PAGE_PAIRS && bytes < WALK_PAGE_BYTES {
                let Some(pair) = waiting("walk a tree", || pairs.next().transpose())? else { break };
                bytes += pair.0.len() + pair.1.len();
                page.push(pair);
            }
            Ok(page)
        });
        let last = page.as_ref().map_or(true, Vec::is_empty);
        if sender.send(page).is_err() || last {
            return;
        }
    }
}

/// Calls sled; its errors and its panics become ours. The database may be left in any state by a panic: the callers stop using what
/// failed, and what is on disk is checked at the next start.
fn guarded<T>(doing: &str, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StoreError> {
    let source = match std::panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(sled::Error::Io(error))) => error,
        Ok(Err(error)) => io::Error::new(io::ErrorKind::InvalidData, error),
        Err(panic) => io::Error::other(format!("sled panicked: {}", panic_text(&*panic))),
    };
    Err(StoreError::Io { context: doing.to_owned(), source })
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "for a reason that is no text".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_with_a_database(home: &Path) -> PathBuf {
        let path = home.join("trees");
        let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
        trees.open("t").expect("created");
        path
    }

    #[test]
    fn a_database_that_panics_is_moved_aside_and_a_fresh_one_opened() {
        let home = tempfile::tempdir().expect("a directory");
        let path = path_with_a_database(home.path());
        let panics_on_the_old = |path: &Path, cache_bytes: u64| match path.join("db").exists() {
            true => panic!("index out of bounds"),
            false => open_database(path, cache_bytes),
        };
        let trees = SledTrees::open_by(&path, &SledOptions::default(), panics_on_the_old).expect("a fresh one");
        assert!(trees.names().expect("listed").is_empty());
        assert!(home.path().join("trees.damaged/db").exists());
    }

    #[test]
    fn a_database_that_hangs_is_moved_aside_and_the_process_told_to_end() {
        let home = tempfile::tempdir().expect("a directory");
        let path = path_with_a_database(home.path());
        let hangs = |_: &Path, _: u64| loop {
            std::thread::park();
        };
        let options = SledOptions { patience: Duration::from_millis(1), ..SledOptions::default() };
        let error = SledTrees::open_by(&path, &options, hangs).err().expect("it hangs");
        assert!(matches!(&error, SledError::Hangs { moved_to } if *moved_to == home.path().join("trees.damaged")), "{error}");
        let trees = SledTrees::open(&path, &SledOptions::default()).expect("the next start has a fresh one");
        assert!(trees.names().expect("listed").is_empty());
    }

    #[test]
    fn a_database_that_is_still_open_or_not_allowed_is_refused_and_left() {
        let home = tempfile::tempdir().expect("a directory");
        let path = path_with_a_database(home.path());
        let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
        let error = SledTrees::open(&path, &SledOptions::default()).err().expect("it is open");
        assert!(matches!(error, SledError::Io { .. }), "{error}");
        drop(trees);
        let full = |_: &Path, _: u64| Err(sled::Error::Io(io::ErrorKind::StorageFull.into()));
        let error = SledTrees::open_by(&path, &SledOptions::default(), full).err().expect("the disk is full");
        assert!(matches!(error, SledError::Io { .. }), "{error}");
        let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
        assert_eq!(trees.names().expect("listed"), ["t"]);
    }

    #[test]
    fn a_condemned_database_is_not_opened_again() {
        let home = tempfile::tempdir().expect("a directory");
        let path = path_with_a_database(home.path());
        std::fs::create_dir_all(home.path().join("trees.damaged/earlier")).expect("created");
        let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
        assert_eq!(trees.names().expect("listed"), ["t"]);
        trees.condemn("a test");
        drop(trees);
        let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
        assert!(trees.names().expect("listed").is_empty());
        assert!(!home.path().join("trees.damaged/earlier").exists(), "the older of two stays");
    }

    #[test]
    fn a_failed_disk_ends_the_writes_and_damage_does_not() {
        let home = tempfile::tempdir().expect("a directory");
        let trees = SledTrees::open(&home.path().join("trees"), &SledOptions::default()).expect("opened");
        let tree = trees.open("t").expect("created");
        let fail = |error: sled::Error| trees.trust.read("trying", || Err::<(), _>(error)).expect_err("it failed");
        fail(sled::Error::Corruption { at: None, bt: () });
        fail(sled::Error::Io(io::ErrorKind::UnexpectedEof.into()));
        fail(sled::Error::Io(rustix::io::Errno::MFILE.into()));
        tree.write(b"k", Some(b"v")).expect("damage is for the checks of the trees, and descriptors come back");
        fail(sled::Error::Io(io::ErrorKind::StorageFull.into()));
        let error = tree.write(b"k", Some(b"v")).expect_err("refused").to_string();
        assert!(error.contains("not written to any more"), "{error}");
        trees.sync().expect_err("refused, where sled might hang");
        assert_eq!(tree.get(b"k").expect("read").as_deref(), Some(&b"v"[..]));
    }
}
