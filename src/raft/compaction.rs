//! How a replica writes snapshots of its map, and purges the log that they cover.
//!
//! Kept out: when a snapshot is due, which the node decides by bytes. The log is never purged past
//! the last snapshot.

use std::time::Duration;

use tokio::time::Instant;

use super::replica::Replica;
use super::state_machine;
use super::status::Role;
use super::transport::snapshot_transfers::entries_behind;
use crate::sm::ports::StoreError;
use crate::types::LogId;

/// Log that is kept for followers that are nearly up to date when a new snapshot covers it: sending
/// them the log costs no more than this.
const NEAR_BYTES_MAX: u64 = 64 << 20;

/// A follower heard from within this time will fetch the rest of the log by itself.
const NEAR_WITHIN: Duration = Duration::from_secs(2);

/// Time that openraft may take to learn of a snapshot file that was written.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(10);

impl Replica {
    /// Writes a snapshot file of what is applied, then purges the log that it covers, except for a
    /// tail. One replica of a node does this at a time. An error leaves everything as it was.
    pub async fn build_snapshot(&self) -> Result<(), StoreError> {
        let _turn = self.context.snapshot_turns.acquire().await;
        let snapshot = state_machine::build(self.state()).await?;
        // openraft takes the file that was just written.
        let _ = self.raft.trigger().snapshot().await;
        if let Some(snapshot) = snapshot.applied().log_id {
            self.purge_behind(snapshot).await;
        }
        Ok(())
    }

    /// Returns the bytes of the log that no snapshot covers.
    pub fn log_bytes_since_snapshot(&self) -> u64 {
        let snapshot = self.state().current_snapshot();
        self.log.bytes_since(
            snapshot
                .and_then(|snapshot| snapshot.applied().log_id)
                .map_or(0, |id| id.index),
        )
    }

    /// Returns the bytes of the log that the last snapshot covers.
    pub fn log_bytes_behind_snapshot(&self) -> u64 {
        let purged = self.log.state().purged.map_or(0, |id| id.index);
        self.log
            .bytes_since(purged)
            .saturating_sub(self.log_bytes_since_snapshot())
    }

    /// Returns the size of the last snapshot file; zero if there is none.
    pub fn snapshot_bytes(&self) -> u64 {
        self.state()
            .current_snapshot()
            .map_or(0, |snapshot| snapshot.bytes_len())
    }

    /// Purges the log through `index`, but not past the last snapshot. While the node has room for
    /// log, keeps what a follower will need that is being sent a snapshot.
    pub async fn purge_log(&self, index: u64) {
        let status = self.status();
        let last = status.last_log.map_or(0, |id| id.index);
        let matched = |replica| status.matched.get(&replica).copied().flatten();
        let purgeable = match status.role {
            Role::Leader if self.context.log.lacks_room().is_none() => self
                .network
                .transfers
                .purgeable(last, matched, |index| self.log.bytes_since(index)),
            Role::Leader | Role::Follower | Role::Candidate | Role::Learner | Role::Stopped => {
                u64::MAX
            }
        };
        self.purge_log_of_all(index.min(purgeable)).await;
    }

    /// Purges the log through `upto`, but not past the last snapshot, without regard to followers
    /// that are being sent one. For a log that has reached its limit.
    pub async fn purge_log_of_all(&self, upto: u64) {
        if upto > self.status().purged.map_or(0, |id| id.index) {
            let _ = self.raft.trigger().purge_log(upto).await;
        }
    }

    /// Purges what the snapshot at `snapshot`, which was just written, covers, except for what
    /// followers that are nearly up to date may need.
    pub(in crate::raft) async fn purge_behind(&self, snapshot: LogId) {
        let deadline = Instant::now() + SNAPSHOT_PATIENCE;

        // openraft purges only up to the snapshot that it knows of.
        while self.status().snapshot < Some(snapshot) {
            if Instant::now() > deadline || self.watch.borrow().failure.is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }

        // Members that are nearly up to date are sent the log that they lack, if that is not too
        // much; to all others a snapshot costs less.
        let status = self.status();
        let lanes = &self.context.lanes;
        let is_near = |node| {
            let is_recent = lanes
                .last_heard(node)
                .is_some_and(|at| at.elapsed() < NEAR_WITHIN);
            is_recent && !lanes.is_disconnected(node)
        };
        let behind = snapshot.index.saturating_sub(entries_behind());
        let needed = status.purgeable(is_near).unwrap_or(0);
        let is_worth_it = self.log.bytes_since(needed) <= NEAR_BYTES_MAX;
        self.purge_log(if is_worth_it {
            behind.min(needed)
        } else {
            behind
        })
        .await;
    }
}
