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
const REMEMBERED_FOR: Duration = Duration::from_secs(10);

/// When a request last waited in vain for the quorum of a shard.
#[derive(Debug, Default)]
pub struct SilentQuorums {
    waited: Mutex<BTreeMap<GroupId, Instant>>,
}

impl SilentQuorums {
    /// Whether somebody has just waited in vain, and nobody has heard from it since.
    pub fn is_silent(&self, shard: GroupId) -> bool {
        self.lock()
            .get(&shard)
            .is_some_and(|waited| waited.elapsed() < REMEMBERED_FOR)
    }

    pub fn waited_in_vain(&self, shard: GroupId) {
        let mut waited = self.lock();
        // Shards come and go: what is over is not kept.
        waited.retain(|_, at| at.elapsed() < REMEMBERED_FOR);
        waited.insert(shard, Instant::now());
    }

    pub fn answered(&self, shard: GroupId) {
        self.lock().remove(&shard);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, Instant>> {
        self.waited.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_is_remembered_for_a_while_and_until_it_ends() {
        let quorums = SilentQuorums::default();
        let (one, two) = (GroupId(1), GroupId(2));
        assert!(!quorums.is_silent(one));
        quorums.waited_in_vain(one);
        assert_eq!(
            [one, two].map(|shard| quorums.is_silent(shard)),
            [true, false]
        );
        tokio::time::advance(REMEMBERED_FOR / 2).await;
        quorums.waited_in_vain(one);
        quorums.waited_in_vain(two);
        tokio::time::advance(REMEMBERED_FOR / 2).await;
        assert!(quorums.is_silent(one), "it was renewed");
        quorums.answered(two);
        assert_eq!(
            [one, two].map(|shard| quorums.is_silent(shard)),
            [true, false]
        );
        tokio::time::advance(REMEMBERED_FOR).await;
        assert!(!quorums.is_silent(one));
        quorums.waited_in_vain(two);
        assert_eq!(quorums.lock().len(), 1, "what is over is not kept");
    }
}
