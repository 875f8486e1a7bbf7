//! Pauses between attempts: they grow with each, and are spread at random.

use std::time::Duration;

/// The first and the longest pause between attempts. A leader is elected within a second, so there
/// is no point in longer ones.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(4);
pub(super) const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Returns how long to wait after so many attempts, and the one that has just failed.
pub(super) fn pause_after(attempts: u32, random: u64) -> Duration {
    let whole = PAUSE_MIN
        .saturating_mul(1 << attempts.min(16))
        .min(PAUSE_MAX);
    let half = whole / 2;
    let half_us = u64::try_from(half.as_micros()).unwrap_or(u64::MAX).max(1);
    half + Duration::from_micros(random % half_us)
}
