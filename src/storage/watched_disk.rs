//! [`WatchedDisk`]: a simulated disk that tells a test what is about to be done to it.

use parking_lot::Mutex;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::disk::{Disk, DiskFile, Open};
use super::sim_disk::SimDisk;
use crate::sm::disk_level::DiskRoom;

/// A change that is about to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskChange<'a> {
    Create(&'a Path),
    Write,
    Sync,
    Rename { to: &'a Path },
    Remove(&'a Path),
    SyncDir(&'a Path),
}

type Watcher = Box<dyn FnMut(DiskChange<'_>) + Send>;

/// Clones are the same disk.
#[derive(Clone)]
pub struct WatchedDisk {
    pub disk: SimDisk,
    watcher: Arc<Mutex<Option<Watcher>>>,
}

struct WatchedFile {
    file: Box<dyn DiskFile>,
    disk: WatchedDisk,
}

impl WatchedDisk {
    pub fn new(disk: SimDisk) -> Self {
        Self {
            disk,
            watcher: Arc::default(),
        }
    }

    /// Has `watcher` told of every change from now on, but for those that it makes itself.
    pub fn watch(&self, watcher: impl FnMut(DiskChange<'_>) + Send + 'static) {
        *self.watcher.lock() = Some(Box::new(watcher));
    }

    fn tell(&self, change: DiskChange<'_>) {
        let watcher = self.watcher.lock().take();
        if let Some(mut watcher) = watcher {
            watcher(change);
            self.watcher.lock().get_or_insert(watcher);
        }
    }
}

impl Disk for WatchedDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>> {
        if how != Open::Existing {
            self.tell(DiskChange::Create(path));
        }
        Ok(Box::new(WatchedFile {
            file: self.disk.open(path, how)?,
            disk: self.clone(),
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.tell(DiskChange::Rename { to });
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.tell(DiskChange::Remove(path));
        self.disk.remove(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.tell(DiskChange::Create(path));
        self.disk.create_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.tell(DiskChange::SyncDir(path));
        self.disk.sync_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.disk.list(path)
    }

    fn room(&self, path: &Path) -> io::Result<DiskRoom> {
        self.disk.room(path)
    }
}

impl DiskFile for WatchedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.tell(DiskChange::Write);
        self.file.write_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.tell(DiskChange::Write);
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.tell(DiskChange::Sync);
        self.file.sync()
    }
}
