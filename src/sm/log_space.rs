//! How much log a node keeps, of all its replicas together.
//!
//! The log goes back to the oldest entry that any replica still needs, whoever wrote how much of
//! it: so one number bounds it, and a replica that holds back more than that has to write a
//! snapshot and purge. How soon depends on what a snapshot costs. Where the snapshots are small,
//! the log is kept small too; where they outweigh the log that was asked for, it may grow as large
//! as they are, within limits, or the node would write its whole data anew again and again.

/// A snapshot costs at least as much as writing this many bytes, because its file is synced.
const SNAPSHOT_COST_MIN: u64 = 256 << 10;

/// However large the snapshots are, the log may grow to so many times of what was asked for.
const GROWTH_MAX: u64 = 8;

const SEGMENT_BYTES_MIN: u64 = 1 << 20;
const SEGMENT_BYTES_MAX: u64 = 16 << 20;

/// The least that can be asked for: fewer segments than these leave nothing to be given back.
pub const LOG_BYTES_MIN: u64 = 16 * SEGMENT_BYTES_MIN;

/// Limits on the disk space of a node's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSpace {
    /// Upper limit: as many bytes as were asked for, or more for the sake of large maps. What is
    /// written while snapshots are made comes on top, and what members that are behind still need,
    /// up to as much again.
    pub bytes_max: u64,
    /// A replica that holds back more than this has to let go of it.
    pub pinned_bytes_max: u64,
}

impl LogSpace {
    /// Returns that of a node which was asked to keep `log_bytes`, and has snapshot files of these
    /// sizes.
    pub fn for_snapshots(log_bytes: u64, snapshots: impl IntoIterator<Item = u64>) -> Self {
        let (mut bytes, mut cost) = (0u64, 0u64);
        for snapshot in snapshots {
            bytes = bytes.saturating_add(snapshot);
            cost = cost.saturating_add(snapshot.max(SNAPSHOT_COST_MIN));
        }
        let bytes_max = bytes.clamp(log_bytes, log_bytes.saturating_mul(GROWTH_MAX));
        // The rest is for the segments that are written next, and for the time that snapshots take.
        let is_cheap = cost <= bytes_max / 16;
        Self {
            bytes_max,
            pinned_bytes_max: if is_cheap {
                bytes_max / 4
            } else {
                bytes_max / 2
            },
        }
    }

    /// Returns whether a replica that holds back so much must let go also of what members that are
    /// behind still need: they are sent a snapshot instead.
    pub fn is_spent_by(self, held_bytes: u64) -> bool {
        held_bytes > self.bytes_max + self.pinned_bytes_max
    }
}

/// Returns how large the segments of a log are of which `log_bytes` are to be kept: space is given
/// back by whole segments.
pub fn segment_bytes(log_bytes: u64) -> u64 {
    (log_bytes / 16).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_log_is_bounded_for_the_node_whatever_the_number_of_its_replicas() {
        for replicas in [1, 3, 100, 1000] {
            let space = LogSpace::for_snapshots(256 * MIB, vec![1000; replicas]);
            assert_eq!(space.bytes_max, 256 * MIB, "{replicas} replicas");
            assert!(space.pinned_bytes_max <= 128 * MIB, "{replicas} replicas");
        }
    }

    #[test]
    fn small_snapshots_come_sooner_and_large_ones_let_the_log_grow() {
        let of = |snapshots: &[u64]| {
            let space = LogSpace::for_snapshots(256 * MIB, snapshots.iter().map(|mib| mib * MIB));
            (space.bytes_max / MIB, space.pinned_bytes_max / MIB)
        };
        assert_eq!(of(&[]), (256, 64));
        assert_eq!(of(&[5, 5]), (256, 64));
        assert_eq!(of(&[10, 10, 10]), (256, 128));
        assert_eq!(of(&[300, 200]), (500, 250));
        assert_eq!(of(&[100_000]), (2048, 1024));
        assert_eq!(
            LogSpace::for_snapshots(u64::MAX, [u64::MAX, u64::MAX]).bytes_max,
            u64::MAX
        );
    }

    #[test]
    fn members_that_are_behind_hold_back_a_bounded_amount() {
        let space = LogSpace::for_snapshots(256 * MIB, []);
        assert!(!space.is_spent_by(320 * MIB));
        assert!(space.is_spent_by(321 * MIB));
    }

    #[test]
    fn a_small_log_has_small_segments() {
        assert_eq!(
            [1, 16, 64, 256, 10_000].map(|mib| segment_bytes(mib * MIB) / MIB),
            [1, 1, 4, 16, 16]
        );
    }
}
