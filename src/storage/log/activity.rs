//! [`ActivityTracker`]: what the writer does, for those who watch whether it hangs.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Phases of the writer's loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriterPhase {
    /// Waits for something to do.
    Waits,
    /// Writes and syncs, and keeps the segments in order: at the mercy of the disk.
    Writes,
    /// Tells those who waited.
    CallsBack,
}

/// A look at the writer at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriterActivity {
    pub phase: WriterPhase,
    /// Grows with every phase that it enters: it hangs where this stays while it should do
    /// something.
    pub steps: u64,
    /// Something waits for it.
    pub has_work: bool,
}

/// Written by the writer alone.
#[derive(Debug, Default)]
pub(super) struct ActivityTracker {
    phase: AtomicU8,
    steps: AtomicU64,
}

impl ActivityTracker {
    pub fn enter(&self, phase: WriterPhase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    pub fn observe(&self, has_work: bool) -> WriterActivity {
        let phase = match self.phase.load(Ordering::Relaxed) {
            phase if phase == WriterPhase::Writes as u8 => WriterPhase::Writes,
            phase if phase == WriterPhase::CallsBack as u8 => WriterPhase::CallsBack,
            _ => WriterPhase::Waits,
        };
        WriterActivity {
            phase,
            steps: self.steps.load(Ordering::Relaxed),
            has_work,
        }
    }
}
