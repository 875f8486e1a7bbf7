//! Caches how much room the disk of the log has. [`super::Log::look_for_room`] looks; whoever is
//! about to write more asks here.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::sm::disk_level::DiskLevel;
use crate::storage::disk::Disk;

/// Caches the last look at the free space of the disk.
pub(super) struct LogDiskRoom {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    asked: Option<u64>,
    pub free_bytes: AtomicU64,
    pub reserve_bytes: AtomicU64,
    level: AtomicU8,
    /// The writer has no room for a batch, and waits for it.
    pub is_waited_for: AtomicBool,
    /// It does so no more: the node stops.
    pub is_given_up: AtomicBool,
}

impl LogDiskRoom {
    pub fn new(disk: Arc<dyn Disk>, dir: PathBuf, asked: Option<u64>) -> Self {
        Self {
            disk,
            dir,
            asked,
            free_bytes: AtomicU64::new(u64::MAX),
            reserve_bytes: AtomicU64::new(0),
            level: AtomicU8::new(DiskLevel::Ample as u8),
            is_waited_for: AtomicBool::new(false),
            is_given_up: AtomicBool::new(false),
        }
    }

    pub fn look(&self) -> io::Result<()> {
        let room = self.disk.room(&self.dir)?;
        let reserve_bytes = room.reserve_bytes(self.asked);
        let level = self.level().next(room.free_bytes, reserve_bytes);
        self.free_bytes.store(room.free_bytes, Ordering::Relaxed);
        self.reserve_bytes.store(reserve_bytes, Ordering::Relaxed);
        self.level.store(level as u8, Ordering::Relaxed);
        Ok(())
    }

    pub fn level(&self) -> DiskLevel {
        match self.level.load(Ordering::Relaxed) {
            0 => DiskLevel::Ample,
            1 => DiskLevel::Low,
            _ => DiskLevel::Spent,
        }
    }
}
