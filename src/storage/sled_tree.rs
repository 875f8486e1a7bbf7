//! [`SledTrees`]: the trees of a node in sled databases. Only this file and `sled_database` name
//! sled.
//!
//! Large values are cut into pieces (`pieces`).
//!
//! There is one database, at first in the directory `state`. sled gives little of its space back: a
//! page that outgrows an eighth of a mebibyte goes to a file of its own, and those files stay. So
//! now and then a fresh one is begun beside it, `state.1` and so on; trees are copied there by
//! whoever uses them, one by one, and a database without trees is removed, at the latest by the
//! next start. Which of two copies of a tree is the right one is not known here: trees are not
//! trusted, and have generations for that.
//!
//! What is known about sled 0.34.7, and how it is kept from hurting:
//! - it may fail, panic or hang when it opens or reads damaged files: opening and walking go on in
//!   threads of their own under a limit of time, panics become errors, and what will not open is
//!   moved aside for a fresh database (its trees can all be rebuilt);
//! - `flush` does not reach the disk through a power cut: [`Trees::sync`] syncs file by file, and
//!   the digest of the state module tells a torn tree;
//! - a batch holds back all readers of the process until it is done (50 ms for a mebibyte of small
//!   pairs), and leaves thousands of old nodes that are freed a few at a time by later uses: so
//!   pairs are written one by one, and the state module sees to it that this does no harm;
//! - what is not flushed piles up in memory: the callers flush often;
//! - a dead thread of sled would be met as an error of a later call, which stops the replica;
//! - after an error of the disk, as a full one, which a read may meet as well, the next flush may
//!   wait for ever, and closing flushes: from then on whatever is there to write fails at once, and
//!   the database is not closed before the process ends.

use parking_lot::RwLock;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use bytes::Bytes;

use super::pieces::{self, Stub};
use super::sled_database::{
    Database, Opener, WriteTrust, free_bytes, lacks_descriptors, numbered, open_database,
    trim_damaged,
};
pub use super::sled_database::{SledError, SledOptions, is_condemned, is_there};
use super::tree::{Tree, Trees, Walk};
use crate::descriptors::{self, patiently};
use crate::sm::ports::{Direction, Items, KeyRange, Pairs, StoreError, ValueStart};

/// Multiple of a map's size that must be free for a copy: sled writes values several times.
const ROOM_FACTOR: u64 = 4;

/// Fresh databases that met a full disk and stay open until the process ends. Each keeps what was
/// copied to it, and its share of the memory, so no more are begun than this.
const FAILED_MAX: usize = 2;

/// sled writes larger values to files of their own. It may begin to a little above this.
const LARGE_BYTES: usize = 100 << 10;

/// Most bytes reserved at once for a value that is put together: a damaged stub may state any
/// length.
const RESERVED_BYTES_MAX: usize = 16 << 20;

/// The trees of a node.
pub struct SledTrees {
    path: PathBuf,
    options: SledOptions,
    open: Opener,
    /// The newest last. There is always one.
    databases: RwLock<Vec<Arc<Database>>>,
}

/// Calls sled again while it has no descriptor to open a file by. Only for reads: a write that
/// lacks one is never finished.
fn waiting<T>(doing: &str, call: impl FnMut() -> sled::Result<T>) -> sled::Result<T> {
    descriptors::retry(doing, call, lacks_descriptors)
}

/// Waits until there is a descriptor for the file of its own that sled writes a large value to.
fn await_descriptor(path: &Path) -> Result<(), StoreError> {
    let opened = patiently("write a large value", || File::open(path));
    opened.map(drop).map_err(|source| StoreError::Io {
        context: format!("opening {}", path.display()),
        source,
    })
}

impl SledTrees {
    /// Opens the databases at `path`. One that does not open is moved to `<path>.damaged` (in the
    /// place of an earlier one); if none does, a fresh one is begun. Blocking.
    pub fn open(path: &Path, options: &SledOptions) -> Result<Self, SledError> {
        Self::open_by(path, options, open_database)
    }

    fn open_by(path: &Path, options: &SledOptions, open: Opener) -> Result<Self, SledError> {
        // First, because the maps may need the room that it takes.
        trim_damaged(path);
        let mut databases = Vec::new();
        for (number, _) in numbered(path) {
            databases.extend(Database::open(path, number, options, open)?.map(Arc::new));
        }
        if databases.is_empty() {
            databases.push(Arc::new(Database::create(path, 0, options, open)?));
        }
        let databases = RwLock::new(databases);
        let trees = Self {
            path: path.to_owned(),
            options: options.clone(),
            open,
            databases,
        };
        trees.remove_empty();
        Ok(trees)
    }

    fn databases(&self) -> Vec<Arc<Database>> {
        self.databases.read().clone()
    }

    /// Returns where new trees go.
    fn newest(&self) -> Arc<Database> {
        newest_of(&self.databases()).clone()
    }

    /// Those before it.
    fn older(&self) -> Vec<Arc<Database>> {
        let mut databases = self.databases();
        let newest = newest_of(&databases).number;
        databases.retain(|database| database.number < newest);
        databases
    }

    /// Drops a tree, which reads some of its pages: damaged ones may hang. Then it fails, in a
    /// thread that never ends.
    fn drop_in(&self, database: &Arc<Database>, name: &str) -> Result<(), StoreError> {
        let (own, own_name) = (Arc::clone(database), name.to_owned());
        let work = move || {
            own.trust
                .write("dropping a tree", || own.db.drop_tree(&own_name))
                .map(drop)
        };
        let more = || Duration::from_secs(database.disk_bytes() >> 24);
        in_time("dropping a tree", self.options.patience, more, work)
    }

    /// Removes the older databases in which there is no tree any more.
    fn remove_empty(&self) {
        let is_empty =
            |database: &Arc<Database>| database.names().is_ok_and(|names| names.is_empty());
        // Under the lock: nobody may be about to create a tree in one of them.
        let mut databases = self.databases.write();
        let newest = newest_of(&databases).number;
        let older = databases.iter().filter(|database| database.number < newest);
        let empty: Vec<_> = older
            .filter(|database| is_empty(database))
            .cloned()
            .collect();
        databases.retain(|database| !empty.iter().any(|empty| empty.number == database.number));
        drop(databases);
        for database in empty {
            let path = database.path.clone();
            match database.remove() {
                Ok(()) => {
                    tracing::info!(path = %path.display(), "an old map database was removed: its \
                        trees are in a newer one")
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "an old map database stays \
                        until the next start")
                }
            }
        }
    }
}

/// The newest that is still written to: one that met a full disk while trees were copied to it
/// holds up nobody.
fn newest_of(databases: &[Arc<Database>]) -> &Arc<Database> {
    let last = databases.last().expect("there is always one");
    databases
        .iter()
        .rev()
        .find(|database| database.trust.is_kept())
        .unwrap_or(last)
}

/// Does `work` to each of them, also to those behind one that fails. Returns the first error.
fn in_each(
    databases: &[Arc<Database>],
    work: impl FnMut(&Arc<Database>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    databases
        .iter()
        .map(work)
        .reduce(Result::and)
        .unwrap_or(Ok(()))
}

/// Does `work` in a thread of its own, and waits for it for `patience`, and then for what `more`
/// says. A failure of kind `TimedOut` says that it hangs.
fn in_time<T: Send + 'static>(
    doing: &str,
    patience: Duration,
    more: impl FnOnce() -> Duration,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let failed = |source| StoreError::Io {
        context: doing.to_owned(),
        source,
    };
    let (sender, receiver) = mpsc::sync_channel(1);
    // Nobody listens any more if it took too long.
    let run = move || drop(sender.send(work()));
    std::thread::Builder::new()
        .name("drop-tree".into())
        .spawn(run)
        .map_err(failed)?;
    let done = receiver
        .recv_timeout(patience)
        .or_else(|error| match error {
            RecvTimeoutError::Timeout => receiver.recv_timeout(more()),
            RecvTimeoutError::Disconnected => Err(error),
        });
    done.unwrap_or_else(|error| Err(failed(unresponsive(error))))
}

/// Returns what is to be said of a thread in sled that does not answer.
fn unresponsive(error: RecvTimeoutError) -> io::Error {
    match error {
        RecvTimeoutError::Timeout => io::Error::new(
            io::ErrorKind::TimedOut,
            "sled hangs in it: start the process again",
        ),
        RecvTimeoutError::Disconnected => io::Error::other("its thread died"),
    }
}

impl Trees for SledTrees {
    fn open(&self, name: &str) -> Result<Arc<dyn Tree>, StoreError> {
        // Locked until the tree is there: its database might be removed as empty in between.
        let databases = self.databases.read();
        let mut database = newest_of(&databases);
        for candidate in databases.iter().rev() {
            if candidate.holds(name)? {
                database = candidate;
                break;
            }
        }
        let tree = database
            .trust
            .write("opening a tree", || database.db.open_tree(name))?;
        let (path, trust) = (database.path.clone(), database.trust.clone());
        Ok(Arc::new(SledTree {
            tree,
            path,
            patience: self.options.patience,
            trust,
        }))
    }

    fn drop_tree(&self, name: &str) -> Result<(), StoreError> {
        let drop_where_held = |database: &Arc<Database>| match database.holds(name)? {
            true => self.drop_in(database, name),
            false => Ok(()),
        };
        let dropped = in_each(&self.databases(), drop_where_held);
        self.remove_empty();
        dropped
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        let mut names = BTreeSet::new();
        for database in self.databases() {
            names.extend(database.names()?);
        }
        Ok(names.into_iter().collect())
    }

    fn outdated(&self) -> Result<Vec<String>, StoreError> {
        let mut names = BTreeSet::new();
        // From one that met a full disk nothing can be dropped before the next start.
        for database in self
            .older()
            .iter()
            .filter(|database| database.trust.is_kept())
        {
            names.extend(database.names()?);
        }
        Ok(names.into_iter().collect())
    }

    fn ensure_room(&self, bytes: u64) -> Result<(), StoreError> {
        let failed = |source| StoreError::Io {
            context: "copying maps to a fresh database".to_owned(),
            source,
        };
        if free_bytes(&self.path).map_err(failed)? / ROOM_FACTOR >= bytes {
            return Ok(());
        }
        let reason = format!(
            "there is no room for a copy of {} MiB on the disk",
            bytes >> 20
        );
        Err(failed(io::Error::new(io::ErrorKind::StorageFull, reason)))
    }

    fn begin_fresh(&self, live_bytes: u64) -> Result<(), StoreError> {
        self.ensure_room(live_bytes)?;
        let failed = |source| StoreError::Io {
            context: "beginning a fresh map database".to_owned(),
            source,
        };
        if self
            .databases()
            .iter()
            .filter(|database| !database.trust.is_kept())
            .count()
            >= FAILED_MAX
        {
            let reason = "the last ones met a failing disk: mend it, or free space, and start this \
                node again";
            return Err(failed(io::Error::other(reason)));
        }
        // The number of one that was moved aside or could not be removed is not used again.
        let numbers = numbered(&self.path).into_iter().map(|(number, _)| number);
        let number = numbers.chain([self.newest().number]).max().unwrap_or(0) + 1;
        let created = Database::create(&self.path, number, &self.options, self.open);
        let database = created.map_err(|error| failed(io::Error::other(error)))?;
        self.databases.write().push(Arc::new(database));
        self.remove_empty();
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        self.databases()
            .iter()
            .map(|database| database.disk_bytes())
            .sum()
    }

    fn sync(&self) -> Result<(), StoreError> {
        in_each(&self.databases(), |database| database.sync())
    }

    fn condemn(&self, reason: &str) {
        self.databases()
            .iter()
            .for_each(|database| database.condemn(reason));
    }

    fn given_up(&self) -> Option<String> {
        let databases = self.databases();
        databases
            .iter()
            .find_map(|database| database.trust.write_error().map(str::to_owned))
    }
}

struct SledTree {
    tree: sled::Tree,
    /// That of the database.
    path: PathBuf,
    patience: Duration,
    trust: WriteTrust,
}

/// Times that a value is looked for whose pieces are being replaced: whoever reads sees each newer
/// value at most once.
const ATTEMPTS_MAX: usize = 1000;

fn torn() -> sled::Error {
    sled::Error::Corruption { at: None, bt: () }
}

/// Returns the value that is `stored` so under `key`, put together again where it was cut. None: it
/// is not there any more.
fn assemble(tree: &sled::Tree, key: &[u8], mut stored: sled::IVec) -> sled::Result<Option<Bytes>> {
    for _ in 0..ATTEMPTS_MAX {
        let Some(stub) = Stub::decode(&stored) else {
            return Ok(Some(Bytes::copy_from_slice(&stored)));
        };
        if let Some(value) = gather(tree, &stub)? {
            return Ok(Some(value));
        }

        // A piece is gone: the value was replaced in between, or the tree is damaged.
        match tree.get(key)? {
            None => return Ok(None),
            Some(newer) if newer == stored => return Err(torn()),
            Some(newer) => stored = newer,
        }
    }
    Err(torn())
}

/// Returns the value of a stub. None: not all of its pieces are there.
fn gather(tree: &sled::Tree, stub: &Stub) -> sled::Result<Option<Bytes>> {
    let mut value = Vec::with_capacity(stub.len.min(RESERVED_BYTES_MAX));
    for key in stub.piece_keys() {
        let Some(piece) = tree.get(key)? else {
            return Ok(None);
        };
        value.extend_from_slice(&piece);
    }
    Ok((value.len() == stub.len).then(|| Bytes::from(value)))
}

/// Returns the start of a value, or as much of it as a stub has.
fn start_of(stored: &[u8], bytes_max: usize) -> ValueStart {
    match Stub::decode(stored) {
        Some(stub) => ValueStart {
            start: stub.start.slice(..stub.start.len().min(bytes_max)),
            len: stub.len,
        },
        None => ValueStart {
            start: Bytes::copy_from_slice(&stored[..stored.len().min(bytes_max)]),
            len: stored.len(),
        },
    }
}

impl SledTree {
    /// `seen` makes of what is stored what the caller is to see; none: it has gone meanwhile.
    fn scan_as<'a, V: 'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        seen: impl Fn(&[u8], sled::IVec) -> sled::Result<Option<V>> + 'a,
    ) -> Items<'a, V> {
        if range.is_empty() {
            return Box::new(std::iter::empty());
        }
        let mut iter = self.tree.range::<&[u8], _>(range.bounds());
        let mut ended = false;
        Box::new(std::iter::from_fn(move || {
            let mut step = || {
                loop {
                    let next = match direction {
                        Direction::Forward => iter.next(),
                        Direction::Reverse => iter.next_back(),
                    };
                    let Some((key, stored)) = next.transpose()? else {
                        return Ok(None);
                    };

                    // Pieces are read with the value they belong to.
                    if pieces::is_piece(&key) {
                        continue;
                    }
                    if let Some(value) = waiting("read a value", || seen(&key, stored.clone()))? {
                        return Ok(Some((Bytes::copy_from_slice(&key), value)));
                    }
                }
            };
            if ended {
                return None;
            }
            let pair = self
                .trust
                .read("scanning a tree", || waiting("scan values", &mut step))
                .transpose();
            ended = !matches!(pair, Some(Ok(_)));
            pair
        }))
    }

    /// A value that is cut has its pieces before its stub, and those of the one before go after it.
    fn change(&self, key: &[u8], change: Option<&[u8]>) -> sled::Result<()> {
        let old = match change {
            Some(value) if pieces::is_split(value) => {
                // The set is random, so new pieces never overwrite those of the value before.
                let stub = Stub::new(rand::random(), value);
                for (key, piece) in stub.piece_keys().zip(value.chunks(pieces::PIECE_BYTES)) {
                    self.tree.insert(key, piece)?;
                }
                self.tree.insert(key, stub.encode())?
            }
            Some(value) => self.tree.insert(key, value)?,
            None => self.tree.remove(key)?,
        };
        for key in old
            .as_deref()
            .and_then(Stub::decode)
            .iter()
            .flat_map(Stub::piece_keys)
        {
            // A damaged stub may say that there are thousands of millions.
            if self.tree.remove(key)?.is_none() {
                break;
            }
        }
        Ok(())
    }
}

impl Tree for SledTree {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let read = || match self.tree.get(key)? {
            Some(stored) => assemble(&self.tree, key, stored),
            None => Ok(None),
        };
        self.trust
            .read("reading a tree", || waiting("read a value", read))
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        let value = self.trust.read("reading a tree", || {
            waiting("read a value", || self.tree.get(key))
        })?;
        Ok(value.map(|stored| start_of(&stored, bytes_max)))
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        self.scan_as(range, direction, |key, stored| {
            assemble(&self.tree, key, stored)
        })
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        self.scan_as(range, direction, move |_, stored| {
            Ok(Some(start_of(&stored, bytes_max)))
        })
    }

    fn write(&self, key: &[u8], change: Option<&[u8]>) -> Result<(), StoreError> {
        // sled never finishes a write that finds no descriptor for its file.
        if change.is_some_and(|value| value.len() >= LARGE_BYTES) {
            await_descriptor(&self.path)?;
        }
        self.trust
            .write("writing a tree", || self.change(key, change))
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.trust
            .write("flushing a tree", || self.tree.flush())
            .map(|_| ())
    }

    fn walk(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> Walk) -> Result<(), StoreError> {
        // On a thread of its own: sled may hang in damaged pages, and the caller must be able to
        // give up.
        let (sender, receiver) = mpsc::sync_channel(WALK_PAGES_AHEAD);
        let (tree, trust) = (self.tree.clone(), self.trust.clone());
        let spawned = std::thread::Builder::new()
            .name("walk-tree".into())
            .spawn(move || send_pages(&tree, &trust, &sender));
        spawned.map_err(|source| StoreError::Io {
            context: "walking a tree".into(),
            source,
        })?;
        loop {
            match receiver.recv_timeout(self.patience) {
                Ok(Ok(page)) if page.is_empty() => return Ok(()),
                Ok(Ok(page)) => {
                    if page
                        .iter()
                        .any(|(key, value)| visit(key, value) == Walk::Stop)
                    {
                        return Ok(());
                    }
                }
                Ok(Err(error)) => return Err(error),
                Err(error) => {
                    return Err(StoreError::Io {
                        context: "walking a tree".into(),
                        source: unresponsive(error),
                    });
                }
            }
        }
    }
}

type PairPage = Vec<(sled::IVec, sled::IVec)>;

/// Pages that a walking thread may be ahead of its reader, and how large they are.
const WALK_PAGES_AHEAD: usize = 4;
const WALK_PAGE_PAIRS: usize = 512;
const WALK_PAGE_BYTES: usize = 1 << 20;

/// Sends all pairs of a tree, and an empty page at the end. Ends early when nobody listens.
fn send_pages(
    tree: &sled::Tree,
    trust: &WriteTrust,
    sender: &mpsc::SyncSender<Result<PairPage, StoreError>>,
) {
    // Pieces are read with their values.
    let mut pairs = tree
        .range(..pieces::first_piece())
        .chain(tree.range(pieces::AFTER_PIECES..));
    loop {
        let page = trust.read("walking a tree", || {
            let (mut page, mut bytes) = (PairPage::new(), 0);
            while page.len() < WALK_PAGE_PAIRS && bytes < WALK_PAGE_BYTES {
                let Some((key, stored)) = waiting("walk a tree", || pairs.next().transpose())?
                else {
                    break;
                };
                let value = match Stub::decode(&stored) {
                    None => stored,
                    Some(_) => {
                        match waiting("walk a tree", || assemble(tree, &key, stored.clone()))? {
                            Some(value) => sled::IVec::from(&value[..]),
                            None => continue,
                        }
                    }
                };
                bytes += key.len() + value.len();
                page.push((key, value));
            }
            Ok(page)
        });
        let last = page.as_ref().map_or(true, Vec::is_empty);
        if sender.send(page).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
