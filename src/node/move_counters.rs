//! [`MoveCounters`]: what the drivers of slot moves on this node did since the start.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[derive(Debug, Default)]
pub struct MoveCounters {
    moves: AtomicU64,
    slots: AtomicU64,
    bytes: AtomicU64,
    frozen_us_total: AtomicU64,
    frozen_us_max: AtomicU64,
}

/// Counts at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Moves that were committed, and their slots.
    pub moves: u64,
    pub slots: u64,
    /// Of keys and values in chunks that a destination has installed.
    pub bytes: u64,
    /// For how long slots were frozen: writes to them waited.
    pub frozen_us_total: u64,
    pub frozen_us_max: u64,
}

impl MoveCounters {
    pub fn count_chunk(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts that the slots of one move were frozen for so long.
    pub fn count_freeze(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.frozen_us_total.fetch_add(us, Ordering::Relaxed);
        self.frozen_us_max.fetch_max(us, Ordering::Relaxed);
    }

    pub fn count_move(&self, slots: usize) {
        self.moves.fetch_add(1, Ordering::Relaxed);
        self.slots.fetch_add(slots as u64, Ordering::Relaxed);
    }

    pub fn now(&self) -> Moved {
        Moved {
            moves: self.moves.load(Ordering::Relaxed),
            slots: self.slots.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            frozen_us_total: self.frozen_us_total.load(Ordering::Relaxed),
            frozen_us_max: self.frozen_us_max.load(Ordering::Relaxed),
        }
    }
}
