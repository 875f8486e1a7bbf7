//! [`StallingDisk`]: a simulated disk whose syncs and reads can be made to take as long as the test
//! wants.

use parking_lot::{Condvar, Mutex};
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::sm::disk_level::DiskRoom;
use crate::storage::disk::{Disk, DiskFile, Open};
use crate::storage::mem_trees;
use crate::storage::sim_disk::SimDisk;

#[derive(Clone)]
pub struct StallingDisk {
    pub disk: SimDisk,
    gate: Arc<Gate>,
    /// What reads of files pass.
    pub reads: Arc<mem_trees::Gate>,
}

#[derive(Default)]
struct Gate {
    is_closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut is_closed = self.is_closed.lock();
        self.opened
            .wait_while(&mut is_closed, |is_closed| *is_closed);
    }
}

impl StallingDisk {
    pub fn new(seed: u64) -> Self {
        Self {
            disk: SimDisk::new(seed),
            gate: Arc::default(),
            reads: Arc::default(),
        }
    }

    /// Syncs wait from now on, or no longer.
    pub fn stall(&self, is_stalled: bool) {
        *self.gate.is_closed.lock() = is_stalled;
        self.gate.opened.notify_all();
    }
}

impl Disk for StallingDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>> {
        let (file, gate, reads) = (
            self.disk.open(path, how)?,
            self.gate.clone(),
            self.reads.clone(),
        );
        Ok(Box::new(StallingFile { file, gate, reads }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.gate.pass();
        self.disk.sync_dir(path)
    }

    fn room(&self, path: &Path) -> io::Result<DiskRoom> {
        self.disk.room(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.disk.list(path)
    }
}

struct StallingFile {
    file: Box<dyn DiskFile>,
    gate: Arc<Gate>,
    reads: Arc<mem_trees::Gate>,
}

impl DiskFile for StallingFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.reads.pass();
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn sync(&self) -> io::Result<()> {
        self.gate.pass();
        self.file.sync()
    }
}
