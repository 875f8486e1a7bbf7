//! [`RaftTimings`]: how fast a group notices that its leader is gone, and what that costs when it
//! is not.
//!
//! A leader whose process has died is recognised by its broken lanes, and replaced after a round of
//! votes: well below 0.1 s. One that falls silent otherwise is replaced after the lease that its
//! followers gave it (`election_ms_max`, counted from its last heartbeat) plus the shorter of the
//! survivors' random timeouts (`election_ms_min` to `election_ms_max`), a pre-vote and a vote. With
//! the defaults that is 420 + about 280 − 60 + 50, so about 0.7 s. A leader must be silent for at
//! least 630 ms to be replaced, which a loaded machine that syncs its disk does not reach, because
//! heartbeats do not wait for the leader's disk.
//!
//! An idle group costs its heartbeats and no more (see `election`). With thousands of groups on a
//! small machine use longer times.

use std::sync::Arc;
use std::time::Duration;

use openraft::{Config, SnapshotPolicy};

use crate::storage::ReplicaKey;

/// Timings of the groups of a node. All nodes of a cluster should have the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftTimings {
    pub heartbeat_ms: u64,
    /// Time that an acknowledged append stands for a heartbeat.
    pub heartbeat_skip_ms: u64,
    pub election_ms_min: u64,
    /// Longest election timeout, which is also the length of a leader's lease.
    pub election_ms_max: u64,
    /// Time that an append may be without a reply.
    pub append_timeout_ms: u64,
    /// Time that one step of sending a snapshot may take.
    pub snapshot_step_ms: u64,
    /// Extra time that a witness waits before it campaigns, so that replicas that can serve go
    /// first.
    pub witness_patience_ms: u64,
    pub lease: LeaseReads,
}

/// Selects how linearizable reads are confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseReads {
    /// Every read is confirmed by a quorum.
    Off,
    /// A read needs no quorum while one has answered within the lease less this margin, for clocks
    /// that drift apart. A replica that starts neither votes nor campaigns for a lease and this
    /// margin, because it may have granted a lease before.
    On { drift_ms: u64 },
}

impl Default for RaftTimings {
    fn default() -> Self {
        Self {
            heartbeat_ms: 120,
            heartbeat_skip_ms: 60,
            election_ms_min: 210,
            election_ms_max: 420,
            append_timeout_ms: 2000,
            snapshot_step_ms: 5000,
            witness_patience_ms: 4 * 420,
            lease: LeaseReads::Off,
        }
    }
}

impl RaftTimings {
    /// Returns timings that are `factor` times as long, except for deadlines of a connection to a
    /// peer.
    pub fn slower(&self, factor: u64) -> Self {
        Self {
            heartbeat_ms: self.heartbeat_ms * factor,
            heartbeat_skip_ms: self.heartbeat_skip_ms * factor,
            election_ms_min: self.election_ms_min * factor,
            election_ms_max: self.election_ms_max * factor,
            witness_patience_ms: self.witness_patience_ms * factor,
            ..self.clone()
        }
    }

    /// Returns how often the node checks whether a group has something to do.
    pub fn tick_interval(&self) -> Duration {
        Duration::from_millis((self.heartbeat_ms / 6).clamp(5, 100))
    }

    /// Returns how long a leader may be silent until nobody is sent to it: its next heartbeat is
    /// late by a whole one then.
    pub fn silence_ms_max(&self) -> u64 {
        2 * self.heartbeat_ms
    }

    pub fn append_timeout(&self) -> Duration {
        Duration::from_millis(self.append_timeout_ms)
    }

    pub fn snapshot_step_timeout(&self) -> Duration {
        Duration::from_millis(self.snapshot_step_ms)
    }

    /// Returns how recent the answers of a quorum must be for a read to rest on them; None if every
    /// read needs a round.
    pub fn lease_age_max(&self) -> Option<Duration> {
        match self.lease {
            LeaseReads::Off => None,
            LeaseReads::On { drift_ms } => Some(Duration::from_millis(
                self.election_ms_max.saturating_sub(drift_ms),
            )),
        }
    }

    /// Returns the length of a leader's lease, where reads rest on leases.
    pub fn lease(&self) -> Option<Duration> {
        match self.lease {
            LeaseReads::Off => None,
            LeaseReads::On { .. } => Some(Duration::from_millis(self.election_ms_max)),
        }
    }

    pub fn witness_patience(&self) -> Duration {
        Duration::from_millis(self.witness_patience_ms)
    }

    /// Returns how long after its start a replica may be bound by a lease that it has forgotten.
    pub fn forgotten_lease(&self) -> Duration {
        match self.lease {
            LeaseReads::Off => Duration::ZERO,
            LeaseReads::On { drift_ms } => Duration::from_millis(self.election_ms_max + drift_ms),
        }
    }

    /// Returns the configuration of openraft for one replica.
    pub(super) fn config(&self, key: ReplicaKey) -> Result<Arc<Config>, openraft::ConfigError> {
        let config = Config {
            cluster_name: key.to_string(),
            heartbeat_interval: self.heartbeat_ms,
            heartbeat_min_interval: Some(self.heartbeat_skip_ms),
            election_timeout_min: self.election_ms_min,
            election_timeout_max: self.election_ms_max,
            enable_pre_vote: Some(true),
            // A restarted leader must be elected: it can't know what was committed since.
            enable_leader_restore: Some(false),
            // Without it a leader that reaches its followers but is not reached by them would lead
            // forever (openraft #2080).
            quorum_loss_probe_interval: Some(self.election_ms_max * 3),
            install_snapshot_timeout: self.snapshot_step_ms,
            // The log store bounds an append in bytes; this only bounds the number of entries.
            max_payload_entries: 1024,
            // The node's election timer replaces ticks.
            enable_tick: false,
            // The node decides when a snapshot is due, by bytes.
            snapshot_policy: SnapshotPolicy::Never,
            // openraft would ignore snapshots that are on their way to followers, who need the log
            // that follows them (`transport/snapshot_transfers`). And a witness must purge only
            // what it is told to, because the log is all that it can bring others up to date with.
            max_in_snapshot_log_to_keep: u64::MAX,
            // Lag within which a learner that is added counts as caught up.
            replication_lag_threshold: 1024,
            // The defaults are sized for one group per process; the proposer keeps few entries in
            // flight.
            api_batch_capacity: 256,
            api_channel_size: Some(1024),
            notification_channel_size: Some(1024),
            state_machine_channel_size: Some(64),
            backoff: "50ms 100ms 200ms ...500ms".into(),
            ..Config::default()
        };
        Ok(Arc::new(config.validate()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{GroupId, ReplicaId};

    #[test]
    fn the_defaults_are_valid_and_stay_so_when_slowed_down() {
        let key = ReplicaKey {
            group: GroupId(1),
            replica: ReplicaId(1),
        };
        for factor in [1, 2, 5, 10] {
            RaftTimings::default()
                .slower(factor)
                .config(key)
                .expect("valid timings");
        }
        let config = RaftTimings::default().config(key).expect("valid timings");
        assert_eq!(
            config.max_in_snapshot_log_to_keep,
            u64::MAX,
            "nothing is purged that nobody asked for"
        );
        let bad = RaftTimings {
            election_ms_min: 100,
            ..RaftTimings::default()
        };
        assert!(bad.config(key).is_err());
    }
}
