//! A disk in memory that fails like a real one, from a seed: the simulated implementation of
//! [`Disk`].
//!
//! It keeps apart what was written and what was synced, for contents and for names.
//! [`SimDisk::crash`] is a power cut: of what was not synced each 512-byte sector is found as it
//! was at some moment since the last sync, lengths and names likewise, and every file that was open
//! gives errors from then on. A killed process is simulated by dropping its files: nothing is lost
//! then. A sync that fails loses writes as the Linux page cache does: they can still be read, and
//! no later sync makes them durable.
//!
//! Directories are names like those of files: one whose parent was not synced may be gone after a
//! crash, with all that is in it.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::disk::{Disk, DiskFile, Open};
use crate::sm::disk_level::DiskRoom;

/// Bytes that a disk writes atomically.
const SECTOR_BYTES: u64 = 512;

/// A simulated disk. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<SimDiskState>>,
}

/// Counts the calls since the disk was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SimCounts {
    pub writes: u64,
    pub syncs: u64,
}

#[derive(Clone)]
struct SimDiskState {
    random: StdRng,
    inodes: BTreeMap<u64, Inode>,
    inode_next: u64,
    names: SimNames,
    names_synced: SimNames,
    names_pending: Vec<NameChange>,
    power_cuts: u64,
    counts: SimCounts,
    faults: SimFaults,
}

/// Contents of the directories.
#[derive(Clone)]
struct SimNames {
    files: BTreeMap<PathBuf, u64>,
    directories: BTreeSet<PathBuf>,
}

impl SimNames {
    fn root() -> Self {
        Self {
            files: BTreeMap::new(),
            directories: BTreeSet::from([PathBuf::from("/")]),
        }
    }

    fn has_parent(&self, path: &Path) -> bool {
        path.parent()
            .is_some_and(|parent| self.directories.contains(parent))
    }

    /// Forgets what is in directories that are not there.
    fn drop_orphans(&mut self) {
        // A directory comes after its parent.
        for directory in std::mem::take(&mut self.directories) {
            if directory == Path::new("/") || self.has_parent(&directory) {
                self.directories.insert(directory);
            }
        }
        let Self { files, directories } = self;
        files.retain(|path, _| {
            path.parent()
                .is_some_and(|parent| directories.contains(parent))
        });
    }
}

#[derive(Clone, Default)]
struct SimFaults {
    /// Syncs, of files and directories, that still succeed before one fails.
    syncs_left: Option<u64>,
    writes_left: Option<u64>,
    unreadable: BTreeSet<u64>,
    capacity_bytes: Option<u64>,
}

#[derive(Clone, Default)]
struct Inode {
    current: Vec<u8>,
    synced: Vec<u8>,
    pending: Vec<InodeChange>,
    handles: u64,
}

#[derive(Clone)]
enum InodeChange {
    Write { offset: u64, bytes: Vec<u8> },
    Length(u64),
}

#[derive(Clone)]
enum NameChange {
    Directory {
        path: PathBuf,
    },
    Link {
        path: PathBuf,
        inode: u64,
    },
    Unlink {
        path: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
        inode: u64,
    },
}

impl SimDisk {
    /// An empty disk. All that it does by chance follows from `seed` and the calls.
    pub fn new(seed: u64) -> Self {
        let state = SimDiskState {
            random: StdRng::seed_from_u64(seed),
            inodes: BTreeMap::new(),
            inode_next: 0,
            names: SimNames::root(),
            names_synced: SimNames::root(),
            names_pending: Vec::new(),
            power_cuts: 0,
            counts: SimCounts::default(),
            faults: SimFaults::default(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// A copy of this disk as it is now, what is not synced included, that goes its own way from
    /// here. No file of it is open and no fault is set.
    pub fn fork(&self) -> Self {
        let mut state = self.lock().clone();
        state.faults = SimFaults::default();
        state
            .inodes
            .values_mut()
            .for_each(|inode| inode.handles = 0);
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// A power cut: drops or tears what was not synced, closes every file, and clears the faults.
    pub fn crash(&self) {
        let state = &mut *self.lock();
        state.power_cuts += 1;
        state.faults = SimFaults::default();
        for inode in state.inodes.values_mut() {
            inode.tear(&mut state.random);
            inode.current = inode.synced.clone();
            inode.handles = 0;
        }
        let pending = std::mem::take(&mut state.names_pending);
        // A journal keeps a first part of the changes; a file system without one, any of them.
        let kept_first = state.random.random_range(0..=pending.len());
        let journal = state.random.random_bool(0.5);
        for (i, change) in pending.into_iter().enumerate() {
            if if journal {
                i < kept_first
            } else {
                state.random.random_bool(0.5)
            } {
                change.apply(&mut state.names_synced);
            }
        }
        state.names_synced.drop_orphans();
        state.names = state.names_synced.clone();
        state.drop_unnamed();
    }

    /// After `successes` more syncs (of files or directories) one fails.
    pub fn fail_sync_after(&self, successes: u64) {
        self.lock().faults.syncs_left = Some(successes);
    }

    /// After `successes` more writes one fails, having written a part.
    pub fn fail_write_after(&self, successes: u64) {
        self.lock().faults.writes_left = Some(successes);
    }

    /// Reads of the file that now has this name fail, until [`SimDisk::heal`] or a crash.
    pub fn fail_reads(&self, path: &Path) {
        let state = &mut *self.lock();
        state.faults.unreadable.extend(state.names.files.get(path));
    }

    /// Writes that would make all files together longer than this fail as on a full disk, having
    /// written what fits.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.lock().faults.capacity_bytes = bytes;
    }

    /// Takes back every fault that was asked for.
    pub fn heal(&self) {
        self.lock().faults = SimFaults::default();
    }

    /// Rots one bit, of what is read now and what is found after a crash. False if the file has no
    /// such byte.
    pub fn flip_bit(&self, path: &Path, offset: u64, bit: u8) -> bool {
        let mut state = self.lock();
        let Some(inode) = state.inode_of(path) else {
            return false;
        };
        let at = offset as usize;
        let mask = 1u8 << (bit % 8);
        let found = inode
            .current
            .get_mut(at)
            .map(|byte| *byte ^= mask)
            .is_some();
        if let Some(byte) = inode.synced.get_mut(at) {
            *byte ^= mask;
        }
        found
    }

    /// Cuts a file to `len` bytes, durably, as damage would.
    pub fn cut(&self, path: &Path, len: u64) {
        if let Some(inode) = self.lock().inode_of(path) {
            inode.current.truncate(len as usize);
            inode.synced.truncate(len as usize);
        }
    }

    /// The contents of a file as they are read now.
    pub fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        self.lock()
            .inode_of(path)
            .map(|inode| inode.current.clone())
    }

    /// Every file and its length, in path order.
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        let state = self.lock();
        let len = |inode: &u64| {
            state
                .inodes
                .get(inode)
                .map_or(0, |inode| inode.current.len() as u64)
        };
        state
            .names
            .files
            .iter()
            .map(|(path, inode)| (path.clone(), len(inode)))
            .collect()
    }

    /// Returns the lowest place in a file at which something was written and not synced since.
    pub fn unsynced_from(&self, path: &Path) -> Option<u64> {
        let mut state = self.lock();
        let pending = &state.inode_of(path)?.pending;
        let places = pending.iter().filter_map(|change| match change {
            InodeChange::Write { offset, .. } => Some(*offset),
            InodeChange::Length(_) => None,
        });
        places.min()
    }

    pub fn counts(&self) -> SimCounts {
        self.lock().counts
    }

    fn lock(&self) -> MutexGuard<'_, SimDiskState> {
        self.state.lock()
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.lock();
        state.need_directory(path)?;
        let found = state.names.files.get(path).copied();
        let inode = match (found, how) {
            (Some(inode), Open::Existing) => inode,
            (Some(inode), Open::Truncated) => {
                state.change(inode, InodeChange::Length(0));
                inode
            }
            (Some(_), Open::New) => return Err(io::Error::from(io::ErrorKind::AlreadyExists)),
            (None, Open::Existing) => return Err(io::Error::from(io::ErrorKind::NotFound)),
            (None, Open::New | Open::Truncated) => {
                let inode = state.inode_next;
                state.inode_next += 1;
                state.inodes.insert(inode, Inode::default());
                state.change_name(NameChange::Link {
                    path: path.to_owned(),
                    inode,
                });
                inode
            }
        };
        if let Some(inode) = state.inodes.get_mut(&inode) {
            inode.handles += 1;
        }
        let power_cuts = state.power_cuts;
        Ok(Box::new(SimFile {
            disk: self.clone(),
            inode,
            power_cuts,
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if from.parent() != to.parent() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the simulated disk renames within a directory only",
            ));
        }
        let inode = *state.names.files.get(from).ok_or(io::ErrorKind::NotFound)?;
        state.change_name(NameChange::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
            inode,
        });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.names.files.contains_key(path) {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        state.change_name(NameChange::Unlink {
            path: path.to_owned(),
        });
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.names.directories.contains(path) {
            return Ok(());
        }
        state.need_directory(path)?;
        state.change_name(NameChange::Directory {
            path: path.to_owned(),
        });
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.names.directories.contains(path) {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        state.count_sync()?;
        let pending = std::mem::take(&mut state.names_pending);
        for change in pending {
            if change.path().parent() == Some(path) {
                change.apply(&mut state.names_synced);
            } else {
                state.names_pending.push(change);
            }
        }
        state.drop_unnamed();
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.lock();
        if !state.names.directories.contains(path) {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        let here = state
            .names
            .files
            .keys()
            .filter(|file| file.parent() == Some(path));
        Ok(here
            .filter_map(|file| file.file_name()?.to_str().map(str::to_owned))
            .collect())
    }

    fn room(&self, _path: &Path) -> io::Result<DiskRoom> {
        let state = self.lock();
        let Some(total_bytes) = state.faults.capacity_bytes else {
            return Ok(DiskRoom::ENDLESS);
        };
        let used: u64 = state
            .inodes
            .values()
            .map(|inode| inode.current.len() as u64)
            .sum();
        Ok(DiskRoom {
            free_bytes: total_bytes.saturating_sub(used),
            total_bytes,
        })
    }
}

struct SimFile {
    disk: SimDisk,
    inode: u64,
    power_cuts: u64,
}

impl SimFile {
    fn lock(&self) -> io::Result<MutexGuard<'_, SimDiskState>> {
        let state = self.disk.lock();
        if state.power_cuts == self.power_cuts {
            Ok(state)
        } else {
            Err(io::Error::other(
                "the power was cut since this file was opened",
            ))
        }
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut state = self.disk.state.lock();
        if state.power_cuts == self.power_cuts
            && let Some(inode) = state.inodes.get_mut(&self.inode)
        {
            inode.handles -= 1;
            if inode.handles == 0 {
                state.drop_unnamed();
            }
        }
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.lock()?;
        if state.faults.unreadable.contains(&self.inode) {
            return Err(error_io());
        }
        let current = &state.inode(self.inode)?.current;
        let rest = current.get(offset as usize..).unwrap_or_default();
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.lock()?;
        state.counts.writes += 1;
        let (fits, result) = if count_down(&mut state.faults.writes_left) {
            (state.random.random_range(0..=bytes.len()), Err(error_io()))
        } else {
            state.room_for(self.inode, offset, bytes.len())?
        };
        state.change(
            self.inode,
            InodeChange::Write {
                offset,
                bytes: bytes[..fits].to_vec(),
            },
        );
        result
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.lock()?;
        state.change(self.inode, InodeChange::Length(len));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock()?.inode(self.inode)?.current.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.lock()?;
        let result = state.count_sync();
        let SimDiskState { random, inodes, .. } = &mut *state;
        let inode = inodes.get_mut(&self.inode).ok_or(io::ErrorKind::NotFound)?;
        match &result {
            Ok(()) => std::mem::take(&mut inode.pending)
                .iter()
                .for_each(|change| change.apply(&mut inode.synced)),
            Err(_) => inode.tear(random),
        }
        result
    }
}

impl SimDiskState {
    fn inode(&mut self, inode: u64) -> io::Result<&mut Inode> {
        Ok(self.inodes.get_mut(&inode).ok_or(io::ErrorKind::NotFound)?)
    }

    fn inode_of(&mut self, path: &Path) -> Option<&mut Inode> {
        let inode = self.names.files.get(path)?;
        self.inodes.get_mut(inode)
    }

    fn need_directory(&self, path: &Path) -> io::Result<()> {
        if self.names.has_parent(path) {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::NotFound))
        }
    }

    fn change(&mut self, inode: u64, change: InodeChange) {
        if let Some(inode) = self.inodes.get_mut(&inode) {
            change.apply(&mut inode.current);
            inode.pending.push(change);
        }
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.names_pending.push(change);
    }

    fn count_sync(&mut self) -> io::Result<()> {
        self.counts.syncs += 1;
        if count_down(&mut self.faults.syncs_left) {
            Err(error_io())
        } else {
            Ok(())
        }
    }

    /// Returns how many of `len` bytes fit on the disk at `offset` of a file, and the result of the
    /// write.
    fn room_for(
        &mut self,
        inode: u64,
        offset: u64,
        len: usize,
    ) -> io::Result<(usize, io::Result<()>)> {
        let Some(capacity) = self.faults.capacity_bytes else {
            return Ok((len, Ok(())));
        };
        let used: u64 = self
            .inodes
            .values()
            .map(|inode| inode.current.len() as u64)
            .sum();
        let file_len = self.inode(inode)?.current.len() as u64;
        let file_len_max = file_len + capacity.saturating_sub(used);
        let fits = file_len_max.saturating_sub(offset).min(len as u64) as usize;
        let result = if fits < len {
            Err(io::Error::from(io::ErrorKind::StorageFull))
        } else {
            Ok(())
        };
        Ok((fits, result))
    }

    /// Forgets the contents of files that are neither open nor found under a name, now or after a
    /// crash.
    fn drop_unnamed(&mut self) {
        let mut named: BTreeSet<u64> = self
            .names
            .files
            .values()
            .chain(self.names_synced.files.values())
            .copied()
            .collect();
        named.extend(self.names_pending.iter().filter_map(NameChange::inode));
        self.inodes
            .retain(|number, inode| inode.handles > 0 || named.contains(number));
    }
}

impl Inode {
    /// Makes a part of what is pending durable, and forgets the rest: each sector is as it was at
    /// some moment since the last sync, and so is the length.
    fn tear(&mut self, random: &mut StdRng) {
        let pending = std::mem::take(&mut self.pending);
        if pending.is_empty() {
            return;
        }
        let moments = pending.len();
        match random.random_range(0..4) {
            0 => return,
            1 => {
                return pending
                    .iter()
                    .for_each(|change| change.apply(&mut self.synced));
            }
            _ => {}
        }
        let len_kept = random.random_range(0..=moments);
        let mut kept: BTreeMap<u64, usize> = BTreeMap::new();
        let mut len = self.synced.len() as u64;
        for (i, change) in pending.iter().enumerate() {
            change.apply_by_sector(&mut self.synced, |sector| {
                i < *kept
                    .entry(sector)
                    .or_insert_with(|| random.random_range(0..=moments))
            });
            if i < len_kept {
                len = change.len_after(len);
            }
        }
        self.synced.resize(len as usize, 0);
    }
}

impl InodeChange {
    fn apply(&self, contents: &mut Vec<u8>) {
        self.apply_by_sector(contents, |_| true);
        contents.resize(self.len_after(contents.len() as u64) as usize, 0);
    }

    /// Applies the change to the sectors that `keep` names, and leaves the length too long rather
    /// than too short.
    fn apply_by_sector(&self, contents: &mut Vec<u8>, mut keep: impl FnMut(u64) -> bool) {
        match self {
            InodeChange::Write { offset, bytes } => {
                let end = *offset + bytes.len() as u64;
                if contents.len() < end as usize {
                    contents.resize(end as usize, 0);
                }
                let mut at = *offset;
                while at < end {
                    let next = ((at / SECTOR_BYTES + 1) * SECTOR_BYTES).min(end);
                    if keep(at / SECTOR_BYTES) {
                        let piece = &bytes[(at - offset) as usize..(next - offset) as usize];
                        contents[at as usize..next as usize].copy_from_slice(piece);
                    }
                    at = next;
                }
            }
            InodeChange::Length(len) => {
                for at in *len..contents.len() as u64 {
                    if keep(at / SECTOR_BYTES) {
                        contents[at as usize] = 0;
                    }
                }
            }
        }
    }

    fn len_after(&self, len: u64) -> u64 {
        match self {
            InodeChange::Write { offset, bytes } => len.max(offset + bytes.len() as u64),
            InodeChange::Length(len) => *len,
        }
    }
}

impl NameChange {
    fn path(&self) -> &Path {
        match self {
            NameChange::Directory { path }
            | NameChange::Link { path, .. }
            | NameChange::Unlink { path }
            | NameChange::Rename { to: path, .. } => path,
        }
    }

    fn inode(&self) -> Option<u64> {
        match self {
            NameChange::Link { inode, .. } | NameChange::Rename { inode, .. } => Some(*inode),
            NameChange::Directory { .. } | NameChange::Unlink { .. } => None,
        }
    }

    fn apply(&self, names: &mut SimNames) {
        let SimNames {
            files: names,
            directories,
        } = names;
        match self {
            NameChange::Directory { path } => {
                directories.insert(path.clone());
            }
            NameChange::Link { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            NameChange::Unlink { path } => {
                names.remove(path);
            }
            NameChange::Rename { from, to, inode } => {
                if names.get(from) == Some(inode) {
                    names.remove(from);
                }
                names.insert(to.clone(), *inode);
            }
        }
    }
}

/// Counts a fault down. True when it is due; it then is over.
fn count_down(left: &mut Option<u64>) -> bool {
    match left {
        None => false,
        Some(0) => {
            *left = None;
            true
        }
        Some(n) => {
            *n -= 1;
            false
        }
    }
}

fn error_io() -> io::Error {
    io::Error::other("input/output error (simulated)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::disk::ensure_dir;

    fn disk(seed: u64) -> SimDisk {
        let disk = SimDisk::new(seed);
        ensure_dir(&disk, Path::new("/d")).expect("a directory");
        disk
    }

    #[test]
    fn what_was_synced_survives_a_crash_and_the_rest_is_dropped_or_torn() {
        let path = Path::new("/d/file");
        let mut tails = BTreeSet::new();
        for seed in 0..64 {
            let disk = disk(seed);
            let file = disk.open(path, Open::New).expect("a new file");
            file.write_at(&[1; 1024], 0).expect("a write");
            file.sync().expect("a sync");
            disk.sync_dir(Path::new("/d")).expect("a sync");
            file.write_at(&[2; 1024], 1024).expect("a write");
            disk.crash();
            let found = disk.contents(path).expect("the name was synced");
            assert_eq!(found[..1024], [1; 1024], "seed {seed}");
            tails.insert(
                found[1024..]
                    .iter()
                    .step_by(512)
                    .copied()
                    .collect::<Vec<u8>>(),
            );
            assert!(
                file.read_at(&mut [0], 0).is_err(),
                "a file open before the crash still serves"
            );
        }
        assert!(tails.len() >= 4, "tails: {tails:?}");
    }

    #[test]
    fn a_name_is_durable_once_its_directory_is_synced() {
        let (old, new) = (Path::new("/d/old"), Path::new("/d/new"));
        let mut found = BTreeSet::new();
        for seed in 0..64 {
            let disk = disk(seed);
            disk.open(old, Open::New)
                .expect("a new file")
                .sync()
                .expect("a sync");
            disk.sync_dir(Path::new("/d")).expect("a sync");
            disk.rename(old, new).expect("a rename");
            disk.crash();
            found.insert(disk.list(Path::new("/d")).expect("a list"));
        }
        assert_eq!(found.len(), 2, "{found:?}");
        let disk = disk(0);
        disk.open(old, Open::New).expect("a new file");
        disk.rename(old, new).expect("a rename");
        disk.sync_dir(Path::new("/d")).expect("a sync");
        disk.crash();
        assert_eq!(disk.list(Path::new("/d")).expect("a list"), ["new"]);
    }

    #[test]
    fn a_directory_is_durable_once_its_parent_is_synced() {
        let (outer, inner) = (Path::new("/d/outer"), Path::new("/d/outer/inner"));
        let file = inner.join("file");
        let fill = |disk: &SimDisk| {
            disk.create_dir(outer)
                .and_then(|()| disk.create_dir(inner))
                .expect("directories");
            disk.open(&file, Open::New)
                .expect("a new file")
                .sync()
                .expect("a sync");
            disk.sync_dir(inner).expect("a sync");
        };
        let mut found = BTreeSet::new();
        for seed in 0..64 {
            let disk = disk(seed);
            fill(&disk);
            disk.crash();
            let is_file = disk.contents(&file).is_some();
            assert!(
                !is_file || disk.list(inner).is_ok(),
                "a file in no directory"
            );
            found.insert((disk.list(outer).is_ok(), disk.list(inner).is_ok(), is_file));
        }
        assert_eq!(found.len(), 3, "{found:?}");
        let disk = disk(0);
        fill(&disk);
        ensure_dir(&disk, outer)
            .and_then(|()| ensure_dir(&disk, inner))
            .expect("durable");
        disk.crash();
        assert!(disk.contents(&file).is_some());
        assert!(
            disk.create_dir(Path::new("/e/f")).is_err(),
            "a directory in none"
        );
    }

    #[test]
    fn writes_under_a_failed_sync_are_read_but_never_durable() {
        let path = Path::new("/d/file");
        let mut lost = 0;
        for seed in 0..32 {
            let disk = disk(seed);
            let file = disk.open(path, Open::New).expect("a new file");
            disk.sync_dir(Path::new("/d")).expect("a sync");
            disk.fail_sync_after(0);
            file.write_at(&[7; 600], 0).expect("a write");
            assert!(file.sync().is_err());
            file.sync().expect("the next sync");
            assert_eq!(disk.contents(path), Some(vec![7; 600]));
            disk.crash();
            lost += u64::from(disk.contents(path) != Some(vec![7; 600]));
        }
        assert!(lost > 0);
    }

    #[test]
    fn a_full_disk_takes_what_fits() {
        let disk = disk(0);
        let file = disk
            .open(Path::new("/d/file"), Open::New)
            .expect("a new file");
        disk.set_capacity(Some(10));
        let error = file.write_at(&[1; 16], 0).expect_err("a full disk");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(file.len().expect("a length"), 10);
        file.write_at(&[2; 10], 0)
            .expect("what is there can be written over");
    }
}
