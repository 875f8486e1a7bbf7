//! [`Backoff`]: pauses between attempts, which grow with each and are spread at random.

use std::time::Duration;

/// The first and the longest pause between attempts.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    pub first: Duration,
    pub longest: Duration,
}

impl Backoff {
    /// Returns how long to wait after so many attempts, and the one that has just failed: doubling,
    /// with half of it random, so that those who failed together don't come back together.
    pub fn pause_after(self, attempts: u32, random: u64) -> Duration {
        let doubled = self.first.saturating_mul(1 << attempts.min(16));
        let half = doubled.min(self.longest) / 2;
        let half_us = u64::try_from(half.as_micros()).unwrap_or(u64::MAX).max(1);
        half + Duration::from_micros(random % half_us)
    }
}
