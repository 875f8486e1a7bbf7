//! How much room there is on the disk of the log: looked at by [`Log::look_for_room`], and told to
//! whoever is about to write more.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::Log;
use crate::sm::disk_level::DiskLevel;
use crate::storage::disk::Disk;

/// Caches the last look at the free space of the disk.
pub(super) struct LogDiskRoom {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    asked: Option<u64>,
    free_bytes: AtomicU64,
    reserve_bytes: AtomicU64,
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

    fn look(&self) -> io::Result<()> {
        let room = self.disk.room(&self.dir)?;
        let reserve_bytes = room.reserve_bytes(self.asked);
        let level = self.level().next(room.free_bytes, reserve_bytes);
        self.free_bytes.store(room.free_bytes, Ordering::Relaxed);
        self.reserve_bytes.store(reserve_bytes, Ordering::Relaxed);
        self.level.store(level as u8, Ordering::Relaxed);
        Ok(())
    }

    fn level(&self) -> DiskLevel {
        match self.level.load(Ordering::Relaxed) {
            0 => DiskLevel::Ample,
            1 => DiskLevel::Low,
            _ => DiskLevel::Spent,
        }
    }
}

impl Log {
    /// Looks at how much of the disk is left. Blocking.
    ///
    /// # Errors
    ///
    /// When the disk does not say. What was seen before stands then.
    pub fn look_for_room(&self) -> io::Result<()> {
        self.shared().room.look()
    }

    /// Returns how full the disk was at the last look.
    pub fn disk_level(&self) -> DiskLevel {
        self.shared().room.level()
    }

    /// Returns what was left of the disk at the last look, and below which of it writes are
    /// refused.
    pub fn free_bytes(&self) -> (u64, u64) {
        let room = &self.shared().room;
        (
            room.free_bytes.load(Ordering::Relaxed),
            room.reserve_bytes.load(Ordering::Relaxed),
        )
    }

    /// Returns why nothing should be proposed for lack of room, if nothing should be.
    pub fn lacks_room(&self) -> Option<String> {
        if self.disk_level() == DiskLevel::Ample {
            return None;
        }
        let (free, reserve) = self.free_bytes();
        Some(format!(
            "its disk has {} MiB left, and {} MiB are kept free",
            free >> 20,
            reserve >> 20
        ))
    }

    /// Has the writer wait for room no more: what does not fit fails, and the log with it. For a
    /// node that stops, whose parts may all wait for the log before it is closed.
    pub fn give_up_room(&self) {
        self.shared()
            .room
            .is_given_up
            .store(true, Ordering::Relaxed);
    }

    /// Returns whether the writer waits for room.
    pub fn waits_for_room(&self) -> bool {
        self.shared().room.is_waited_for.load(Ordering::Relaxed)
    }
}
