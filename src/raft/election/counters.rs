//! [`ElectionCounters`]: counts how steadily the groups of a node are led.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts over all replicas of a node, since its start.
#[derive(Debug, Default)]
pub struct ElectionCounters {
    campaigns: AtomicU64,
    leader_changes: AtomicU64,
}

impl ElectionCounters {
    /// Counts that a replica here asks for votes.
    pub fn count_campaign(&self) {
        self.campaigns.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts that a replica here follows another leader than before.
    pub fn count_leader_change(&self) {
        self.leader_changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns how often a replica here asked for votes.
    pub fn campaigns(&self) -> u64 {
        self.campaigns.load(Ordering::Relaxed)
    }

    /// Returns how often a replica here saw another leader than the one before. That there is none
    /// for a while is not counted.
    pub fn leader_changes(&self) -> u64 {
        self.leader_changes.load(Ordering::Relaxed)
    }
}
