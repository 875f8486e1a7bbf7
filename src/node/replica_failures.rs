//! [`ReplicaFailures`]: which replicas of this node do not run, why and since when, and when each
//! is tried again. How long that takes is decided in `sm::recovery`; `reconciler` notes here what
//! it meets, and status, metrics and readiness are told from here.
//!
//! The log is told of the first failures at once, and then once a minute of how many there are.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::api::peer::FailedReplica;
use crate::sm::recovery::{FailureCause, retry_pause_ms};
use crate::storage::ReplicaKey;

/// A replica that has run for so long has recovered: its next failure is the first of a row again.
const RECOVERED_AFTER: Duration = Duration::from_secs(60);
/// Interval at which the log repeats how many replicas have failed.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// Failures that are told at once within that time. A disk that fails takes a thousand replicas
/// along.
const TOLD_AT_ONCE_MAX: u32 = 16;

/// The replicas of this node that do not run, or have begun to again.
#[derive(Default)]
pub struct ReplicaFailures(Mutex<FailureLedger>);

#[derive(Default)]
struct FailureLedger {
    rows: BTreeMap<ReplicaKey, FailureRow>,
    /// Since the start.
    failed_total: u64,
    recovered_total: u64,
    telling: LoggedFailures,
}

/// Failures of one replica in a row.
struct FailureRow {
    cause: FailureCause,
    reason: String,
    since: Instant,
    failures: u32,
    retry_at: Instant,
    /// The time when it was opened again; None while it does not run.
    runs_since: Option<Instant>,
}

#[derive(Default)]
struct LoggedFailures {
    since: Option<Instant>,
    told: u32,
    left_out: u64,
}

/// A replica that does not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaFailure {
    pub key: ReplicaKey,
    pub cause: FailureCause,
    pub reason: String,
    pub for_time: Duration,
    pub retry_in: Duration,
}

/// Counts for the metrics page.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FailureCounts {
    pub now: BTreeMap<FailureCause, u64>,
    pub longest: Duration,
    pub failed_total: u64,
    pub recovered_total: u64,
}

impl ReplicaFailures {
    /// Notes that a replica could not be opened, or has stopped.
    pub fn failed(&self, key: ReplicaKey, cause: FailureCause, reason: String) {
        let now = Instant::now();
        let mut ledger = self.lock();
        ledger.failed_total += 1;
        let row = ledger.rows.entry(key).or_insert_with(|| FailureRow {
            cause,
            reason: String::new(),
            since: now,
            failures: 0,
            retry_at: now,
            runs_since: None,
        });

        // Told once, not with each try that ends alike.
        let is_news = row.failures == 0 || row.runs_since.is_some() || row.cause != cause;
        row.cause = cause;
        row.reason.clone_from(&reason);
        row.failures += 1;
        row.runs_since = None;
        let pause = Duration::from_millis(retry_pause_ms(cause, row.failures));
        row.retry_at = now + pause;
        if is_news && ledger.telling.may_tell(now) {
            tracing::error!(
                "replica {key} has failed: {reason}; it is tried again in {pause:?}{}",
                advice(cause)
            );
        }
    }

    /// Notes that a replica runs.
    pub fn runs(&self, key: ReplicaKey) {
        let now = Instant::now();
        let mut ledger = self.lock();
        let Some(row) = ledger.rows.get_mut(&key) else {
            return;
        };
        match row.runs_since {
            // Its row stays for now: one that soon fails again goes on with its long pauses.
            None => {
                row.runs_since = Some(now);
                let after = row.since.elapsed();
                ledger.recovered_total += 1;
                if ledger.telling.may_tell(now) {
                    tracing::warn!("replica {key} runs again, {after:.1?} after it failed");
                }
            }
            Some(since) if now.duration_since(since) >= RECOVERED_AFTER => {
                ledger.rows.remove(&key);
            }
            Some(_) => {}
        }
    }

    /// Forgets all but these: the others are not of this node any more.
    pub fn retain(&self, keys: &BTreeSet<ReplicaKey>) {
        self.lock().rows.retain(|key, _| keys.contains(key));
    }

    /// Returns whether a replica may be opened, or closed and opened again, now.
    pub fn is_due(&self, key: ReplicaKey) -> bool {
        self.lock()
            .rows
            .get(&key)
            .is_none_or(|row| row.retry_at <= Instant::now())
    }

    /// Returns whether a replica was opened before and failed.
    pub fn has_failed_before(&self, key: ReplicaKey) -> bool {
        self.lock().rows.contains_key(&key)
    }

    pub fn of(&self, key: ReplicaKey) -> Option<ReplicaFailure> {
        self.lock().rows.get(&key).and_then(|row| row.failure(key))
    }

    /// Returns every replica that does not run, in order.
    pub fn now(&self) -> Vec<ReplicaFailure> {
        self.lock()
            .rows
            .iter()
            .filter_map(|(key, row)| row.failure(*key))
            .collect()
    }

    /// Returns the same, as other nodes are told of it.
    pub fn to_messages(&self) -> Vec<FailedReplica> {
        let told = |failure: ReplicaFailure| FailedReplica {
            group: failure.key.group,
            replica: failure.key.replica,
            cause: failure.cause,
            for_ms: u64::try_from(failure.for_time.as_millis()).unwrap_or(u64::MAX),
            reason: failure.reason,
        };
        self.now().into_iter().map(told).collect()
    }

    pub fn counts(&self) -> FailureCounts {
        let ledger = self.lock();
        let mut counts = FailureCounts {
            failed_total: ledger.failed_total,
            recovered_total: ledger.recovered_total,
            ..FailureCounts::default()
        };
        for row in ledger.rows.values().filter(|row| row.runs_since.is_none()) {
            *counts.now.entry(row.cause).or_default() += 1;
            counts.longest = counts.longest.max(row.since.elapsed());
        }
        counts
    }

    /// Tells the log, once a minute, how many replicas do not run.
    pub fn remind(&self) {
        let failing = self.now();
        let mut ledger = self.lock();
        let now = Instant::now();
        let is_due = ledger
            .telling
            .since
            .is_some_and(|since| now.duration_since(since) >= TELL_EVERY);
        let Some(longest) = failing.iter().max_by_key(|failure| failure.for_time) else {
            return;
        };
        if !is_due {
            return;
        }
        let left_out = std::mem::take(&mut ledger.telling.left_out);
        ledger.telling = LoggedFailures {
            since: Some(now),
            told: 1,
            left_out: 0,
        };
        tracing::error!(
            "{} of this node's replicas do not run; replica {} for {:.0?}: {}{}; {left_out} lines \
            were left out",
            failing.len(),
            longest.key,
            longest.for_time,
            longest.reason,
            advice(longest.cause),
        );
    }

    fn lock(&self) -> MutexGuard<'_, FailureLedger> {
        self.0.lock()
    }
}

impl FailureRow {
    fn failure(&self, key: ReplicaKey) -> Option<ReplicaFailure> {
        self.runs_since.is_none().then(|| ReplicaFailure {
            key,
            cause: self.cause,
            reason: self.reason.clone(),
            for_time: self.since.elapsed(),
            retry_in: self.retry_at.saturating_duration_since(Instant::now()),
        })
    }
}

impl LoggedFailures {
    /// Returns whether one more line may be written now.
    fn may_tell(&mut self, now: Instant) -> bool {
        if self
            .since
            .is_none_or(|since| now.duration_since(since) >= TELL_EVERY)
        {
            *self = Self {
                since: Some(now),
                told: 0,
                left_out: self.left_out,
            };
        }
        let may = self.told < TOLD_AT_ONCE_MAX;
        match may {
            true => self.told += 1,
            false => self.left_out += 1,
        }
        may
    }
}

/// Returns what an operator can do about it, as the end of a sentence.
fn advice(cause: FailureCause) -> &'static str {
    match cause {
        FailureCause::Descriptors => ". Raise the limit of open files (ulimit -n, LimitNOFILE)",
        FailureCause::DiskFull => ". Free space on the disk of its data directory",
        FailureCause::Database => ". The process starts again by itself",
        FailureCause::Damaged => {
            ". If it does not recover, the cluster replaces it after --replace-after"
        }
        FailureCause::Program => ". Start a newer program",
        FailureCause::Other => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{GroupId, ReplicaId};

    const KEY: ReplicaKey = ReplicaKey {
        group: GroupId(3),
        replica: ReplicaId(7),
    };

    async fn pass(ms: u64) {
        tokio::time::advance(Duration::from_millis(ms)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_tried_again_more_and_more_rarely_and_told_since_when() {
        let failures = ReplicaFailures::default();
        assert!(failures.is_due(KEY));
        for pause_ms in [250, 500, 1000, 2000] {
            failures.failed(KEY, FailureCause::Other, "why".to_owned());
            pass(pause_ms - 1).await;
            assert!(!failures.is_due(KEY), "{pause_ms}");
            pass(1).await;
            assert!(failures.is_due(KEY), "{pause_ms}");
        }
        let failure = failures.of(KEY).expect("it has failed");
        assert_eq!(
            (failure.reason.as_str(), failure.for_time),
            ("why", Duration::from_millis(3750))
        );
        let counts = failures.counts();
        assert_eq!(
            (counts.now, counts.failed_total),
            (BTreeMap::from([(FailureCause::Other, 1)]), 4)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_runs_for_a_moment_only_goes_on_where_it_was() {
        let failures = ReplicaFailures::default();
        for _ in 0..4 {
            failures.failed(KEY, FailureCause::Other, "why".to_owned());
        }
        failures.runs(KEY);
        assert_eq!(failures.of(KEY), None, "it runs");
        pass(10_000).await;
        failures.runs(KEY);
        failures.failed(KEY, FailureCause::Other, "again".to_owned());
        let failure = failures.of(KEY).expect("it has failed");
        assert_eq!(
            failure.retry_in,
            Duration::from_secs(4),
            "the fifth in a row"
        );
        assert_eq!(failure.for_time, Duration::from_secs(10), "since the first");

        failures.runs(KEY);
        pass(60_000).await;
        failures.runs(KEY);
        failures.failed(KEY, FailureCause::Other, "much later".to_owned());
        let failure = failures.of(KEY).expect("it has failed");
        assert_eq!(
            (failure.retry_in, failure.for_time),
            (Duration::from_millis(250), Duration::ZERO)
        );
        assert_eq!(failures.counts().recovered_total, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_failures_are_few_lines() {
        let mut telling = LoggedFailures::default();
        let lines = (0..1000)
            .filter(|_| telling.may_tell(Instant::now()))
            .count();
        assert_eq!((lines, telling.left_out), (16, 984));
        pass(60_000).await;
        assert!(telling.may_tell(Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_of_this_node_any_more_is_forgotten() {
        let failures = ReplicaFailures::default();
        failures.failed(KEY, FailureCause::Damaged, "why".to_owned());
        assert_eq!(failures.to_messages().len(), 1);
        failures.retain(&BTreeSet::new());
        assert!(failures.to_messages().is_empty() && !failures.has_failed_before(KEY));
    }
}
