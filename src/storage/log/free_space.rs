//! What a [`Log`] says of the room on its disk: how full it is, and whether proposals should wait.

use std::io;
use std::sync::atomic::Ordering;

use super::handle::Log;
use crate::sm::disk_level::DiskLevel;

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
