//! Remembers which shards had no quorum lately, so that one client waits for the timeout and not
//! every client after it.
//!
//! A remembered timeout shortens only the next wait: each request still asks the quorum, and the
//! first answer clears the memory. So an answer is as fresh as without it wherever a quorum answers
//! at all.

use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::types::GroupId;

/// A timeout is remembered for so long; each further one renews it. A store that is not asked for
/// so long may be back.
const TIMEOUT_TTL: Duration = Duration::from_secs(10);

/// The last time that a request timed out waiting for the quorum of a shard.
#[derive(Debug, Default)]
pub struct QuorumTimeouts {
    timed_out_at: Mutex<BTreeMap<GroupId, Instant>>,
}

impl QuorumTimeouts {
    /// Returns true if a request has just timed out on this shard and none has been answered since.
    pub fn timed_out_recently(&self, shard: GroupId) -> bool {
        self.lock()
            .get(&shard)
            .is_some_and(|timed_out_at| timed_out_at.elapsed() < TIMEOUT_TTL)
    }

    /// Notes that a request timed out waiting for the quorum of a shard.
    pub fn record_timeout(&self, shard: GroupId) {
        let mut timed_out_at = self.lock();
        // Shards come and go: what is over is not kept.
        timed_out_at.retain(|_, at| at.elapsed() < TIMEOUT_TTL);
        timed_out_at.insert(shard, Instant::now());
    }

    /// Forgets the timeout of a shard that has answered.
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
