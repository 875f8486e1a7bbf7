//! The counts of one worker, merged at the end.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Longer ones count as this.
const LATENCY_US_MAX: u64 = 120_000_000;
const SIGNIFICANT_DIGITS: u8 = 3;

/// For the line that is shown each second.
#[derive(Debug, Default)]
pub struct BenchProgress {
    pub done: AtomicU64,
    pub errors: AtomicU64,
}

/// The reason why a request is not counted as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RequestError {
    /// No connection.
    Connect,
    /// The connection broke before the answer.
    Broken,
    /// No answer in time.
    Timeout,
    /// More redirects in a row than a client follows.
    Redirects,
    Status(u16),
    /// It was due in an open loop, and every worker was busy to the end and beyond.
    Unsent,
}

impl RequestError {
    pub fn name(self) -> String {
        match self {
            RequestError::Connect => "no connection".into(),
            RequestError::Broken => "connection broken".into(),
            RequestError::Timeout => "timeout".into(),
            RequestError::Redirects => "too many redirects".into(),
            RequestError::Status(status) => format!("status {status}"),
            RequestError::Unsent => "never sent".into(),
        }
    }
}

/// Latencies of what was done, and the count of what was not, by kind.
#[derive(Debug)]
pub struct Tally {
    latencies_us: Histogram<u64>,
    pub errors: BTreeMap<RequestError, u64>,
    /// Answered "no such key", which counts as done.
    pub missing: u64,
    /// Followed within a request.
    pub redirects: u64,
}

impl Tally {
    pub fn new() -> Self {
        let latencies_us = Histogram::new_with_bounds(1, LATENCY_US_MAX, SIGNIFICANT_DIGITS);
        Self {
            latencies_us: latencies_us.expect("fixed bounds"),
            errors: BTreeMap::new(),
            missing: 0,
            redirects: 0,
        }
    }

    pub fn done(&mut self, latency: Duration) {
        self.latencies_us
            .saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
    }

    pub fn error(&mut self, error: RequestError) {
        self.errors_of(error, 1);
    }

    pub fn errors_of(&mut self, error: RequestError, count: u64) {
        if count > 0 {
            *self.errors.entry(error).or_default() += count;
        }
    }

    pub fn merge(&mut self, other: &Tally) {
        self.latencies_us
            .add(&other.latencies_us)
            .expect("all have the same bounds");
        for (error, count) in &other.errors {
            self.errors_of(*error, *count);
        }
        self.missing += other.missing;
        self.redirects += other.redirects;
    }

    /// Returns the number of requests done.
    pub fn count(&self) -> u64 {
        self.latencies_us.len()
    }

    pub fn latency_us(&self, quantile: f64) -> u64 {
        self.latencies_us.value_at_quantile(quantile)
    }

    pub fn mean_us(&self) -> f64 {
        self.latencies_us.mean()
    }

    pub fn max_us(&self) -> u64 {
        self.latencies_us.max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_tallies_have_the_quantiles_of_the_whole() {
        let (mut a, mut b) = (Tally::new(), Tally::new());
        (1..=500).for_each(|ms| a.done(Duration::from_millis(ms)));
        (501..=1000).for_each(|ms| b.done(Duration::from_millis(ms)));
        b.error(RequestError::Timeout);
        a.error(RequestError::Timeout);
        a.error(RequestError::Status(503));
        a.merge(&b);
        assert_eq!(a.count(), 1000);
        for (quantile, ms) in [(0.5, 500), (0.99, 990), (0.999, 999)] {
            let off = a.latency_us(quantile).abs_diff(ms * 1000);
            assert!(off <= ms, "p{quantile} is off by {off} us");
        }
        assert_eq!(
            a.errors,
            BTreeMap::from([(RequestError::Timeout, 2), (RequestError::Status(503), 1)])
        );
    }

    #[test]
    fn what_takes_for_ever_is_counted_at_the_bound() {
        let mut tally = Tally::new();
        tally.done(Duration::from_secs(1_000_000));
        assert!(tally.max_us() >= LATENCY_US_MAX);
    }
}
