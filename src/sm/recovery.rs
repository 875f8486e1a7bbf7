//! What is done about a replica that failed to open, or has stopped: when it is tried again, when
//! the whole process starts again, and whether a new replica is to come here or elsewhere.
//!
//! Decided from why it failed and how often in a row. Kept out: time, and whoever opens replicas
//! (`node::replica_failures`, `node::controllers::reconciler`). Which replicas are replaced is
//! decided in `repair`.

use serde::{Deserialize, Serialize};

/// Between two attempts to open a replica, at first.
const RETRY_MS_MIN: u64 = 250;
/// Descriptors come back when connections close, and looking for them costs nothing.
const RETRY_DESCRIPTORS_MS_MAX: u64 = 5_000;
const RETRY_MS_MAX: u64 = 60_000;
/// Longest pause between attempts on damage: it stays damaged, and each attempt may read the whole
/// map.
const RETRY_DAMAGED_MS_MAX: u64 = 300_000;

/// Between two starts of the process by itself, from the second on.
const RESTART_MS_MIN: u64 = 1_000;
const RESTART_MS_MAX: u64 = 60_000;

/// The reason why a replica does not run, as far as it decides what is done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCause {
    /// There was no descriptor to open a file by.
    Descriptors,
    /// The disk is full.
    DiskFull,
    /// This process cannot write to the map database any more: it must be started again.
    Database,
    /// The replica's data on this disk is damaged, or its parts do not fit together.
    Damaged,
    /// It was written by a later program.
    Program,
    /// Anything else, also what a later program tells of.
    #[serde(other)]
    Other,
}

impl FailureCause {
    pub const ALL: [FailureCause; 6] = [
        FailureCause::Descriptors,
        FailureCause::DiskFull,
        FailureCause::Database,
        FailureCause::Damaged,
        FailureCause::Program,
        FailureCause::Other,
    ];

    /// Returns a name for metrics and for people.
    pub const fn name(self) -> &'static str {
        match self {
            FailureCause::Descriptors => "descriptors",
            FailureCause::DiskFull => "disk-full",
            FailureCause::Database => "database",
            FailureCause::Damaged => "damaged",
            FailureCause::Program => "program",
            FailureCause::Other => "other",
        }
    }

    /// Returns whether a new replica on the same node would meet the same.
    pub const fn is_node_failure(self) -> bool {
        match self {
            FailureCause::Descriptors
            | FailureCause::DiskFull
            | FailureCause::Database
            | FailureCause::Program => true,
            FailureCause::Damaged | FailureCause::Other => false,
        }
    }
}

/// Returns how long a replica rests that has failed so many times in a row.
pub fn retry_pause_ms(cause: FailureCause, failures: u32) -> u64 {
    let pause_ms_max = match cause {
        FailureCause::Descriptors => RETRY_DESCRIPTORS_MS_MAX,
        FailureCause::DiskFull | FailureCause::Database | FailureCause::Other => RETRY_MS_MAX,
        FailureCause::Damaged | FailureCause::Program => RETRY_DAMAGED_MS_MAX,
    };
    doubled(RETRY_MS_MIN, failures.saturating_sub(1)).min(pause_ms_max)
}

/// Returns how long a process waits before it starts again by itself, after so many such starts in
/// a row. The first helps most often, and is made at once.
pub fn restart_pause_ms(restarts: u32) -> u64 {
    match restarts {
        0 => 0,
        restarts => doubled(RESTART_MS_MIN, restarts - 1).min(RESTART_MS_MAX),
    }
}

fn doubled(ms: u64, times: u32) -> u64 {
    ms.saturating_mul(1_u64.checked_shl(times).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_tried_again_soon_and_then_more_and_more_rarely() {
        let pauses =
            |cause| [1, 2, 3, 6, 10, 20, 1000].map(|failures| retry_pause_ms(cause, failures));
        assert_eq!(
            pauses(FailureCause::Descriptors),
            [250, 500, 1000, 5000, 5000, 5000, 5000]
        );
        assert_eq!(
            pauses(FailureCause::Other),
            [250, 500, 1000, 8000, 60_000, 60_000, 60_000]
        );
        assert_eq!(
            pauses(FailureCause::Damaged),
            [250, 500, 1000, 8000, 128_000, 300_000, 300_000]
        );
        assert_eq!(retry_pause_ms(FailureCause::Other, 0), 250);
    }

    #[test]
    fn a_process_that_starts_again_and_again_does_so_more_and_more_rarely() {
        assert_eq!(
            [0, 1, 2, 3, 7, 1000].map(restart_pause_ms),
            [0, 1000, 2000, 4000, 60_000, 60_000]
        );
    }

    #[test]
    fn a_cause_that_a_later_program_tells_of_is_read() {
        let read = |text: &str| serde_json::from_str::<FailureCause>(text).expect("readable");
        assert_eq!(read("\"gravity\""), FailureCause::Other);
        for cause in FailureCause::ALL {
            assert_eq!(read(&format!("\"{}\"", cause.name())), cause);
        }
    }
}
