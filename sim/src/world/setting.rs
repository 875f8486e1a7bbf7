//! [`Setting`]: what the nodes of a world are like, drawn from the seed before anything happens.
//!
//! Drawn whatever may go wrong, so that a seed has the same nodes where fewer faults are let in.

use std::time::Duration;

use quorate::blocking::testing::DiskPace;
use quorate::rare::RareBranch;
use quorate::rare::testing as rare;
use quorate::sm::level::LEVEL;

use super::random::SimRng;

/// Nanoseconds of the slowest and the fastest clock in a millisecond of the world.
const RATE_NS_MIN: u64 = 900_000;
const RATE_NS_MAX: u64 = 1_100_000;
/// The longest election timeout, which is the length of a lease.
const LEASE_MS: u64 = 420;

/// Holds what is drawn for a world.
#[derive(Debug, Clone)]
pub struct Setting {
    pub rare: Vec<RareBranch>,
    /// Clocks go at rates between these two.
    pub rate_ns: (u64, u64),
    pub lease_drift_ms: Option<u64>,
    pub replication_factor: Option<u8>,
    pub replace_after: Duration,
    pub lost_disk_after: Duration,
    pub scrub_every: Duration,
    pub log_bytes: u64,
    /// Pace of disks with which nothing is wrong; None: they take no time.
    pub disk_pace: Option<DiskPace>,
    /// The level that nodes speak until they are started again.
    pub level_at_first: Option<u16>,
}

impl Setting {
    pub fn of(seed: u64) -> Self {
        let mut random = SimRng::new(seed, "setting");
        let mut rare = rare::ALL.to_vec();
        match random.below(3) {
            0 => rare.clear(),
            1 => rare.retain(|_| random.percent(30)),
            _ => rare.retain(|_| random.percent(70)),
        }
        // A leader trusts its lease while the slowest follower's promise lasts, so the margin must
        // hold what the fastest and the slowest clock drift apart within a lease: see
        // `drift_within_a_lease_ms`.
        let lease_drift_ms = random.percent(40).then(|| *random.pick(&[50, 100]));
        let apart_ns = match lease_drift_ms {
            Some(50) => 50_000,
            _ => 100_000,
        };
        let rate_ns = (1_000_000 - apart_ns, 1_000_000 + apart_ns);
        let drift_ms = drift_within_a_lease_ms(rate_ns);
        assert!(RATE_NS_MIN <= rate_ns.0 && rate_ns.1 <= RATE_NS_MAX);
        assert!(lease_drift_ms.is_none_or(|margin_ms| drift_ms <= margin_ms));
        let replication_factor = *random.pick(&[None, None, Some(2), Some(3)]);
        let short = |random: &mut SimRng| Duration::from_millis(random.between(1_500, 6_000));
        let is_replaced_soon = random.percent(60);
        let (replace_after, lost_disk_after) = match is_replaced_soon {
            true => (short(&mut random), short(&mut random)),
            false => (Duration::from_secs(600), Duration::from_secs(30)),
        };
        let disk_pace = random.percent(50).then(|| DiskPace {
            seed: 0,
            one_in: random.between(1, 6),
            wait_ms_max: random.between(1, 12),
        });
        Self {
            rare,
            rate_ns,
            lease_drift_ms,
            replication_factor,
            replace_after,
            lost_disk_after,
            scrub_every: Duration::from_millis(random.between(1_500, 4_000)),
            log_bytes: *random.pick(&[64 << 20, 64 << 20, 128 << 10]),
            disk_pace,
            level_at_first: random
                .percent(20)
                .then(|| random.between(1, LEVEL.into()) as u16),
        }
    }

    /// Returns whether the cluster soon goes on without a node that stays away.
    pub fn is_replaced_soon(&self) -> bool {
        self.replace_after < Duration::from_secs(60)
    }

    pub fn summary(&self) -> String {
        let Self {
            rare,
            rate_ns,
            lease_drift_ms,
            replication_factor,
            replace_after,
            lost_disk_after,
            disk_pace,
            level_at_first,
            ..
        } = self;
        format!(
            "rare branches {rare:?}; clocks from {} to {} ns in 1 ms; lease drift \
             {lease_drift_ms:?} ms; replication factor {replication_factor:?}; replace after \
             {replace_after:?}, a lost disk after {lost_disk_after:?}; disk pace {disk_pace:?}; \
             level at first {level_at_first:?}",
            rate_ns.0, rate_ns.1
        )
    }
}

/// Returns how far the clocks of a leader and of a follower drift apart within a lease at most, in
/// milliseconds: a leader with the slowest clock thinks it valid for so much longer than a follower
/// with the fastest.
fn drift_within_a_lease_ms((slowest, fastest): (u64, u64)) -> u64 {
    (LEASE_MS * (fastest - slowest)).div_ceil(fastest)
}
