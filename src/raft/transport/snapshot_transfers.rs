//! [`SnapshotTransfers`]: records which followers are being sent a snapshot, and how much of the
//! log they will need after it.
//!
//! openraft purges the log without regard to them. A follower that takes longer to install a
//! snapshot than writers take to cause the next would find, when it is done, that the log begins
//! later, and would be sent another, forever. So a leader keeps the log from the snapshot on until
//! the follower has caught up.
//!
//! That is limited. The log may weigh as much as the snapshot itself ([`LOG_BYTES_FLOOR`] at
//! least); past that the follower installs a snapshot more slowly than writers write one, and
//! sending the next costs no more than the log would. Each further snapshot that a follower needs
//! before it has caught up doubles the limit, up to eight times. And nothing is kept for it while
//! the node's log has reached its limit, or its disk is nearly full.

use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::rare::{self, RareBranch};
use crate::types::{LogId, ReplicaId};

/// Log that is kept for a follower however small its snapshot is.
const LOG_BYTES_FLOOR: u64 = 256 << 20;
/// Number of times that the amount kept may be doubled.
const DOUBLINGS_MAX: u32 = 3;
/// Time that a follower has to ask for the log after its snapshot was sent, or could not be.
const PATIENCE: Duration = Duration::from_secs(60);
/// Entries behind a snapshot that are kept for followers that were away for a moment.
const ENTRIES_BEHIND: u64 = 4096;

/// Returns how many entries behind a snapshot are kept for followers that were away for a moment.
pub fn entries_behind() -> u64 {
    rare::or(RareBranch::EagerSnapshots, 2, ENTRIES_BEHIND)
}

/// The followers of a group that are being sent snapshots. Clones share the same records.
#[derive(Debug, Clone, Default)]
pub struct SnapshotTransfers(Arc<Mutex<BTreeMap<ReplicaId, SnapshotTransfer>>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SnapshotTransfer {
    /// The last entry that is in the snapshot.
    index: u64,
    snapshot_bytes: u64,
    /// Time at which it was sent; None while it is being sent.
    ended: Option<Instant>,
    /// Number of snapshots since the follower had last caught up.
    times: u32,
}

impl SnapshotTransfer {
    fn log_bytes_max(&self) -> u64 {
        assert!(self.times > 0, "a snapshot was sent");
        let doublings = (self.times - 1).min(DOUBLINGS_MAX);
        self.snapshot_bytes.max(LOG_BYTES_FLOOR) << doublings
    }

    fn is_over(&self) -> bool {
        self.ended.is_some_and(|ended| ended.elapsed() > PATIENCE)
    }
}

/// Marks that a snapshot is being sent, until it is dropped.
pub struct TransferGuard {
    transfers: SnapshotTransfers,
    to: ReplicaId,
}

impl Drop for TransferGuard {
    fn drop(&mut self) {
        if let Some(transfer) = self.transfers.lock().get_mut(&self.to) {
            transfer.ended = Some(Instant::now());
        }
    }
}

impl SnapshotTransfers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ReplicaId, SnapshotTransfer>> {
        self.0.lock()
    }

    /// Notes that a snapshot as of `index` is being sent.
    pub fn begin(&self, to: ReplicaId, index: u64, snapshot_bytes: u64) -> TransferGuard {
        let mut transfers = self.lock();
        let before = transfers.get(&to).filter(|transfer| !transfer.is_over());
        let times = match before {
            // The connection broke, and the same snapshot goes on.
            Some(before) if before.index == index => before.times,
            Some(before) => before.times + 1,
            None => 1,
        };
        transfers.insert(
            to,
            SnapshotTransfer {
                index,
                snapshot_bytes,
                ended: None,
                times,
            },
        );
        TransferGuard {
            transfers: self.clone(),
            to,
        }
    }

    /// Returns the index through which the log may be purged for the sake of followers that are
    /// sent snapshots. `matched` returns how far a follower's log is known to match the leader's,
    /// `bytes_since` the bytes of log after an entry.
    pub fn purgeable(
        &self,
        last: u64,
        matched: impl Fn(ReplicaId) -> Option<LogId>,
        bytes_since: impl Fn(u64) -> u64,
    ) -> u64 {
        let mut index = u64::MAX;
        self.lock().retain(|replica, transfer| {
            let follower_index = matched(*replica)
                .map_or(0, |id| id.index)
                .max(transfer.index);
            let has_caught_up = transfer.ended.is_some()
                && follower_index > transfer.index
                && follower_index + entries_behind() > last;
            let needs_it = !has_caught_up && !transfer.is_over();
            if needs_it && bytes_since(follower_index) <= transfer.log_bytes_max() {
                index = index.min(follower_index);
            }
            needs_it
        });
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOLLOWER: ReplicaId = ReplicaId(2);

    fn id(index: u64) -> Option<LogId> {
        Some(LogId { term: 1, index })
    }

    #[tokio::test(start_paused = true)]
    async fn the_log_after_a_snapshot_is_kept_until_its_follower_has_caught_up() {
        let transfers = SnapshotTransfers::default();
        let upto = |last, matched| transfers.purgeable(last, |_| matched, |_| 1);
        assert_eq!(upto(5000, None), u64::MAX, "nobody is sent one");
        let guard = transfers.begin(FOLLOWER, 1000, 10);
        tokio::time::advance(PATIENCE * 100).await;
        assert_eq!(
            upto(50_000, None),
            1000,
            "it is on its way for as long as it takes"
        );
        drop(guard);
        assert_eq!(upto(60_000, id(1000)), 1000, "it has just been installed");
        assert_eq!(upto(60_000, id(20_000)), 20_000, "it is being sent the log");
        assert_eq!(upto(60_000, id(59_000)), u64::MAX, "it has caught up");
        assert_eq!(upto(60_000, None), u64::MAX, "and nothing is remembered");

        drop(transfers.begin(FOLLOWER, 1000, 10));
        tokio::time::advance(PATIENCE / 2).await;
        assert_eq!(upto(5000, None), 1000);
        tokio::time::advance(PATIENCE).await;
        assert_eq!(upto(5000, None), u64::MAX, "it did not come for more");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_is_bounded_and_grows_with_each_snapshot_that_did_not_do() {
        let transfers = SnapshotTransfers::default();
        let is_kept = |bytes| transfers.purgeable(1 << 40, |_| None, |_| bytes) < u64::MAX;
        drop(transfers.begin(FOLLOWER, 1000, 10));
        assert!(is_kept(LOG_BYTES_FLOOR) && !is_kept(LOG_BYTES_FLOOR + 1));
        drop(transfers.begin(FOLLOWER, 1000, 10));
        assert!(!is_kept(LOG_BYTES_FLOOR + 1), "the same again");
        for (n, factor) in [2, 4, 8, 8].into_iter().enumerate() {
            drop(transfers.begin(FOLLOWER, 2000 + n as u64, 10));
            assert!(is_kept(LOG_BYTES_FLOOR * factor) && !is_kept(LOG_BYTES_FLOOR * factor + 1));
        }
        let large = LOG_BYTES_FLOOR * 5;
        drop(transfers.begin(ReplicaId(3), 1000, large));
        assert!(is_kept(large), "as much as the snapshot");
    }
}
