//! Decides when a replica writes a snapshot: when the log since its last outweighs it, or when it holds back old segments of the log.
//!
//! One at a time on a node: a snapshot reads the whole map, and the log is purged behind it.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::member::Member;
use crate::raft::Group;
use crate::storage::log::Log;

const TICK: Duration = Duration::from_secs(1);
/// Less log than this is never worth a snapshot.
const LOG_BYTES_FLOOR: u64 = 64 << 20;
/// More log than this always is: it is what a restart may have to replay.
const LOG_BYTES_CEILING: u64 = 512 << 20;
/// A replica that holds back this much of the log that others have no more need of is snapshotted, however little of it is its own.
const PINNED_BYTES_MAX: u64 = 256 << 20;

/// Triggers snapshots.
pub struct Janitor {
    member: Arc<Member>,
    log: Log,
}

impl Janitor {
    pub fn new(member: Arc<Member>, log: Log) -> Self {
        Self { member, log }
    }

    pub async fn run(self, shutdown: &CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(TICK) => {}
            }
            self.tick().await;
        }
    }

    async fn tick(&self) {
        let pinned = self.log.pinning();
        for group in self.member.registry.groups() {
            let pins = pinned.iter().any(|pin| pin.key == group.key() && pin.held_bytes > PINNED_BYTES_MAX);
            if !pins && !is_due(group.log_bytes_since_snapshot(), group.snapshot_bytes()) {
                continue;
            }
            self.snapshot(&group).await;
        }
    }

    async fn snapshot(&self, group: &Group) {
        let started = tokio::time::Instant::now();
        match group.build_snapshot().await {
            Ok(()) => tracing::debug!("snapshot of {} written in {:?}", group.key(), started.elapsed()),
            Err(error) => tracing::warn!("snapshot of {} was not written: {error}", group.key()),
        }
    }
}

/// Whether the log since the last snapshot, in bytes, outweighs that snapshot.
fn is_due(log_bytes: u64, snapshot_bytes: u64) -> bool {
    log_bytes > snapshot_bytes.clamp(LOG_BYTES_FLOOR, LOG_BYTES_CEILING)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_due_when_the_log_outweighs_it() {
        assert!(!is_due(LOG_BYTES_FLOOR, 0));
        assert!(is_due(LOG_BYTES_FLOOR + 1, 0));
        assert!(!is_due(100 << 20, 200 << 20));
        assert!(is_due(201 << 20, 200 << 20));
        assert!(is_due(LOG_BYTES_CEILING + 1, 1 << 40));
    }
}
