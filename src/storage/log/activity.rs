//! [`Activity`]: what the writer does, for those who watch whether it hangs.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Phases of the writer's loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waits for something to do.
    Waits,
    /// Writes and syncs, and keeps the segments in order: at the mercy of the disk.
    Writes,
    /// Tells those who waited.
    CallsBack,
}

/// A look at the writer at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub phase: Phase,
    /// Grows with every phase that it enters: it hangs where this stays while it should do
    /// something.
    pub steps: u64,
    /// Something waits for it.
    pub has_work: bool,
}

/// Written by the writer alone.
#[derive(Debug, Default)]
pub(super) struct Activity {
    phase: AtomicU8,
    steps: AtomicU64,
}

impl Activity {
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    pub fn seen(&self, has_work: bool) -> Seen {
        let phase = match self.phase.load(Ordering::Relaxed) {
            phase if phase == Phase::Writes as u8 => Phase::Writes,
            phase if phase == Phase::CallsBack as u8 => Phase::CallsBack,
            _ => Phase::Waits,
        };
        Seen {
            phase,
            steps: self.steps.load(Ordering::Relaxed),
            has_work,
        }
    }
}
