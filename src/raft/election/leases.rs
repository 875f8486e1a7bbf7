//! [`LeaseTimings`]: the timings that leases rest on, which nodes compare before anything else.
//!
//! A leader that reads by its lease counts on followers that vote for no other for as long. Were
//! the times not the same on both sides, it could read what another leader has changed, and nobody
//! would see it.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

use crate::raft::timings::{LeaseReads, RaftTimings};

/// What a node tells of its timings in the hello of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTimings {
    /// By how much clocks may drift within a lease; none where reads rest on no lease.
    pub lease_drift_ms: Option<u64>,
    /// Also how long a lease is.
    pub election_ms_max: u64,
}

impl LeaseTimings {
    /// Returns whether two nodes can be in one cluster. Without leases other times cost no more
    /// than elections.
    pub fn fits(&self, other: &LeaseTimings) -> bool {
        self == other || (self.lease_drift_ms.is_none() && other.lease_drift_ms.is_none())
    }
}

impl From<&RaftTimings> for LeaseTimings {
    fn from(timings: &RaftTimings) -> Self {
        let lease_drift_ms = match timings.lease {
            LeaseReads::Off => None,
            LeaseReads::On { drift_ms } => Some(drift_ms),
        };
        Self {
            lease_drift_ms,
            election_ms_max: timings.election_ms_max,
        }
    }
}

impl Display for LeaseTimings {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        match self.lease_drift_ms {
            Some(drift_ms) => write!(to, "with --lease-reads {drift_ms}")?,
            None => write!(to, "without --lease-reads")?,
        }
        write!(
            to,
            " and an election timeout of {} ms",
            self.election_ms_max
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_need_the_same_times_on_both_sides() {
        let pace = |lease_drift_ms, election_ms_max| LeaseTimings {
            lease_drift_ms,
            election_ms_max,
        };
        assert!(
            pace(None, 420).fits(&pace(None, 840)),
            "no lease rests on them"
        );
        assert!(pace(Some(50), 420).fits(&pace(Some(50), 420)));
        let leased = pace(Some(50), 420);
        for other in [pace(None, 420), pace(Some(60), 420), pace(Some(50), 840)] {
            assert!(!leased.fits(&other) && !other.fits(&leased), "{other}");
        }
        assert_eq!(
            leased.to_string(),
            "with --lease-reads 50 and an election timeout of 420 ms"
        );
    }
}
