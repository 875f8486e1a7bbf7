//! Decides when requests are due.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Hands out the moments at which requests are due, to all workers together.
#[derive(Debug)]
pub struct RequestSchedule {
    start: Instant,
    end: Instant,
    /// None: as soon as the worker is free.
    rate: Option<f64>,
    /// Requests that are due and could not be sent are given up from here on: a rate above what the
    /// servers take would never end.
    give_up: Instant,
    issued: AtomicU64,
    sent: AtomicU64,
}

impl RequestSchedule {
    /// Returns the schedule from `start` to `end`. Late requests are sent for `grace` after the
    /// end.
    pub fn new(start: Instant, end: Instant, rate: Option<f64>, grace: Duration) -> Self {
        Self {
            start,
            end,
            rate,
            give_up: end + grace,
            issued: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }

    /// Returns how many requests were due and never sent.
    pub fn unsent(&self) -> u64 {
        let due = self.rate.map_or(0.0, |rate| {
            (rate * (self.end - self.start).as_secs_f64()).ceil()
        });
        (due as u64).saturating_sub(self.sent.load(Ordering::Relaxed))
    }

    /// Waits until the next request is due, and says from when its latency counts; none when the
    /// time is up.
    ///
    /// In an open loop a request that finds every worker busy counts from when it was due, so that
    /// a stall shows in all that it held up. One that a free worker waited for counts from when the
    /// worker woke: timers are late by up to a millisecond, which is not the server's.
    pub async fn next(&self) -> Option<Instant> {
        let now = Instant::now();
        let Some(rate) = self.rate else {
            return (now < self.end).then_some(now);
        };
        let ticket = self.issued.fetch_add(1, Ordering::Relaxed);
        let due = self.start + Duration::from_secs_f64(ticket as f64 / rate);
        if due >= self.end || now >= self.give_up {
            return None;
        }
        self.sent.fetch_add(1, Ordering::Relaxed);
        if due <= now {
            return Some(due);
        }
        sleep_until(due).await;
        Some(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_open_loop_counts_from_when_a_request_was_due() {
        let start = Instant::now();
        let schedule = RequestSchedule::new(
            start,
            start + Duration::from_secs(1),
            Some(10.0),
            Duration::from_secs(100),
        );
        let due = |n: u64| start + Duration::from_millis(100 * n);
        let close = |at: Instant, expected: Instant| {
            assert!(
                at >= expected && at - expected < Duration::from_millis(3),
                "{:?}",
                at - expected
            );
        };
        close(schedule.next().await.expect("time is left"), due(0));
        close(schedule.next().await.expect("time is left"), due(1));
        // The server stalls for a while: what was due meanwhile is late from the start.
        tokio::time::advance(Duration::from_millis(350)).await;
        for n in [2, 3, 4] {
            assert_eq!(schedule.next().await, Some(due(n)));
        }
        close(schedule.next().await.expect("time is left"), due(5));
        // However late: everything that was due is sent.
        tokio::time::advance(Duration::from_secs(60)).await;
        for n in [6, 7, 8, 9] {
            assert_eq!(schedule.next().await, Some(due(n)));
        }
        assert_eq!(schedule.next().await, None);
        assert_eq!(schedule.unsent(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_that_nobody_can_keep_comes_to_an_end() {
        let start = Instant::now();
        let schedule = RequestSchedule::new(
            start,
            start + Duration::from_secs(1),
            Some(100.0),
            Duration::from_secs(5),
        );
        assert!(schedule.next().await.is_some());
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!((schedule.next().await, schedule.unsent()), (None, 99));
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_loop_is_always_due_until_the_end() {
        let start = Instant::now();
        let schedule =
            RequestSchedule::new(start, start + Duration::from_secs(1), None, Duration::ZERO);
        assert_eq!(schedule.next().await, Some(start));
        tokio::time::advance(Duration::from_millis(999)).await;
        assert!(schedule.next().await.is_some());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(schedule.next().await, None);
    }
}
