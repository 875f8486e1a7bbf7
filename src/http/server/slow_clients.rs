//! The rate at which large answers have to go out while there is little room for them.
//!
//! A value is charged whole until its last byte is out, so a few dozen clients that read slowly can
//! take all that is set aside for the answers of a node. As long as half of that is left, any rate
//! will do. From then on, a client below the rate since its answer began is cut, whether it means
//! harm or has a bad line: otherwise no other client would get a large answer.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::budget::Budget;

/// Bytes that may be missing: kernels report in steps of tens of KiB what the other side took.
const SLACK_BYTES: u64 = 256 << 10;

/// Knows when answers have to be taken fast.
#[derive(Debug, Clone)]
pub struct SlowClientLimit {
    answers: Arc<Budget>,
    /// In a second.
    rate_bytes: u64,
}

impl SlowClientLimit {
    /// Returns one for `answers` and a rate of so many bytes in a second.
    pub fn new(answers: Arc<Budget>, rate_bytes: u64) -> Self {
        Self {
            answers,
            rate_bytes,
        }
    }

    /// Returns whether there is limit, and an answer that went so is too slow.
    pub fn is_exceeded_by(&self, rate: &SendRate) -> bool {
        self.answers.used() > self.answers.bytes_max() / 2 && rate.is_below(self.rate_bytes)
    }
}

/// The rate at which an answer is taken.
#[derive(Debug, Clone, Copy)]
pub struct SendRate {
    since: Instant,
    sent_bytes: u64,
}

impl SendRate {
    /// Returns that of an answer that begins now.
    pub fn new() -> Self {
        Self {
            since: Instant::now(),
            sent_bytes: 0,
        }
    }

    /// Counts what was taken.
    pub fn add_sent(&mut self, bytes: usize) {
        self.sent_bytes = self.sent_bytes.saturating_add(bytes as u64);
    }

    /// Leaves out a time in which nobody waited for the other side.
    pub fn exclude(&mut self, pause: Duration) {
        self.since += pause;
    }

    fn is_below(&self, rate_bytes: u64) -> bool {
        let millis = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let due = millis.saturating_mul(rate_bytes) / Duration::from_secs(1).as_millis() as u64;
        self.sent_bytes.saturating_add(SLACK_BYTES) < due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn slow_is_good_enough_while_half_of_the_room_is_left() {
        let answers = Budget::new(100);
        let limit = SlowClientLimit::new(Arc::clone(&answers), 64 << 10);
        let (mut slow, mut fast) = (SendRate::new(), SendRate::new());
        for _ in 0..20 {
            tokio::time::advance(Duration::from_secs(1)).await;
            slow.add_sent(4 << 10);
            fast.add_sent(64 << 10);
        }
        let mut share = answers.take(50).expect("there is room");
        assert!(!limit.is_exceeded_by(&slow));
        assert!(share.grow(1));
        assert!(limit.is_exceeded_by(&slow) && !limit.is_exceeded_by(&fast));
        assert!(!limit.is_exceeded_by(&SendRate::new()), "it has just begun");
        slow.exclude(Duration::from_secs(15));
        assert!(!limit.is_exceeded_by(&slow));
    }
}
