//! Pauses between attempts at a shard.

use std::time::Duration;

use crate::routing::backoff::Backoff;

/// The first and the longest pause between attempts. A leader is elected within a second, so there
/// is no point in longer ones.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(4);
pub(super) const PAUSE_MAX: Duration = Duration::from_millis(100);

const BACKOFF: Backoff = Backoff {
    first: PAUSE_MIN,
    longest: PAUSE_MAX,
};

/// Returns how long to wait after so many attempts, and the one that has just failed.
pub(super) fn pause_after(attempts: u32, random: u64) -> Duration {
    BACKOFF.pause_after(attempts, random)
}
