//! [`LeaseTimings`]: the timings that leases rest on, which nodes compare before anything else.
//!
//! A leader that reads by its lease counts on followers that vote for no other for as long. If the
//! timings differed, it could read what another leader has changed, and nobody would notice.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

use crate::raft::timings::{LeaseReads, RaftTimings};

/// The timings that a node announces in the hello of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTimings {
    /// Allowed drift of clocks within a lease; None if reads rest on no lease.
    pub lease_drift_ms: Option<u64>,
    /// Longest election timeout, which is also the length of a lease.
    pub election_ms_max: u64,
}

impl LeaseTimings {
    /// Returns true if two nodes with these timings can be in one cluster. Without leases a
    /// difference only affects how fast elections are.
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
