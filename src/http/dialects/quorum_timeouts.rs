//! Remembers which shards had no quorum lately, so that one client waits for that to show and not
//! every one after it.
//!
//! It is a memory of waits in vain, not a verdict: each request asks the quorum again, only less
//! patiently, and the first that hears from it ends the memory. So an answer is as new as it would
//! be without it wherever a quorum answers at all.

use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::types::GroupId;

/// How long one wait in vain makes others impatient. Each renews it; a store that nobody asks for
/// so long may be back.
const TIMEOUT_TTL: Duration = Duration::from_secs(10);

/// When a request last waited in vain for the quorum of a shard.
#[derive(Debug, Default)]
pub struct QuorumTimeouts {
    timed_out_at: Mutex<BTreeMap<GroupId, Instant>>,
}

impl QuorumTimeouts {
    /// Whether somebody has just waited in vain, and nobody has heard from it since.
    pub fn timed_out_recently(&self, shard: GroupId) -> bool {
        self.lock()
            .get(&shard)
            .is_some_and(|timed_out_at| timed_out_at.elapsed() < TIMEOUT_TTL)
    }

    pub fn record_timeout(&self, shard: GroupId) {
        let mut timed_out_at = self.lock();
        // Shards come and go: what is over is not kept.
        timed_out_at.retain(|_, at| at.elapsed() < TIMEOUT_TTL);
        timed_out_at.insert(shard, Instant::now());
    }

    pub fn record_answer(&self, shard: GroupId) {
        self.lock().remove(&shard);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, Instant>> {
        self.timed_out_at.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_is_remembered_for_a_while_and_until_it_ends() {
        let quorums = QuorumTimeouts::default();
        let (one, two) = (GroupId(1), GroupId(2));
        assert!(!quorums.timed_out_recently(one));
        quorums.record_timeout(one);
        assert_eq!(
            [one, two].map(|shard| quorums.timed_out_recently(shard)),
            [true, false]
        );
        tokio::time::advance(TIMEOUT_TTL / 2).await;
        quorums.record_timeout(one);
        quorums.record_timeout(two);
        tokio::time::advance(TIMEOUT_TTL / 2).await;
        assert!(quorums.timed_out_recently(one), "it was renewed");
        quorums.record_answer(two);
        assert_eq!(
            [one, two].map(|shard| quorums.timed_out_recently(shard)),
            [true, false]
        );
        tokio::time::advance(TIMEOUT_TTL).await;
        assert!(!quorums.timed_out_recently(one));
        quorums.record_timeout(two);
        assert_eq!(quorums.lock().len(), 1, "what is over is not kept");
    }
}
