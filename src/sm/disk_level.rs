//! Whether a node still takes writes, by what is left of its disk.
//!
//! A log that can't be written ends its node. So writes are refused before that, while there is
//! room for what is on its way already; and where others go on writing, a follower takes no more
//! entries while there is still room for what its groups live by.

use serde::{Deserialize, Serialize};

/// Bytes kept free by default, unless the disk is small. They hold what may be under way when the
/// first write is refused: proposals (128 MiB on a node), the segments that the log prepares (two
/// of 16 MiB), and a part of the tables that have to be written down before log can be given back.
const RESERVE_BYTES: u64 = 256 << 20;

/// On a small disk that is a part of it: the reserve must not be most of what there is.
const RESERVE_PART: u64 = 4;

/// Free space and size of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRoom {
    pub free_bytes: u64,
    pub total_bytes: u64,
}

impl DiskRoom {
    /// That of a disk that never fills up.
    pub const ENDLESS: Self = Self {
        free_bytes: u64::MAX,
        total_bytes: u64::MAX,
    };

    /// Returns below how many free bytes writes are refused; `asked` is what the operator said.
    pub fn reserve_bytes(self, requested: Option<u64>) -> u64 {
        requested.unwrap_or_else(|| RESERVE_BYTES.min(self.total_bytes / RESERVE_PART))
    }
}

/// Degrees of how full a disk is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskLevel {
    /// Writes are taken.
    #[default]
    Ample,
    /// Clients are refused, but for deletions, and leads are handed over. Followers go on.
    Low,
    /// Followers take no entries either.
    Spent,
}

impl DiskLevel {
    /// Returns the next level. It takes some more to be back than not to go, so that a disk at the
    /// limit does not go to and fro.
    pub fn next(self, free_bytes: u64, reserve_bytes: u64) -> Self {
        let is_below =
            |limit: u64, was: bool| free_bytes < if was { limit + limit / 8 } else { limit };
        if is_below(reserve_bytes / 2, self >= Self::Spent) {
            Self::Spent
        } else if is_below(reserve_bytes, self >= Self::Low) {
            Self::Low
        } else {
            Self::Ample
        }
    }

    /// Returns that of a shard whose voters have these: a majority of them is no fuller.
    pub fn of_majority(voters: impl IntoIterator<Item = Self>) -> Self {
        let mut levels: Vec<Self> = voters.into_iter().collect();
        levels.sort_unstable();
        levels.get(levels.len() / 2).copied().unwrap_or_default()
    }

    /// Returns whether a write is taken; `frees`: it does nothing but delete.
    pub fn takes_write(self, frees: bool) -> bool {
        match self {
            Self::Ample => true,
            Self::Low => frees,
            Self::Spent => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn writes_are_refused_below_the_reserve_and_taken_again_when_there_is_a_little_more() {
        use DiskLevel::{Ample, Low, Spent};
        let mut level = Ample;
        let seen = [
            300, 256, 255, 256, 287, 288, 255, 128, 127, 128, 143, 144, 0, 300,
        ]
        .map(|mib| {
            level = level.next(mib * MIB, 256 * MIB);
            level
        });
        let expected = [
            Ample, Ample, Low, Low, Low, Ample, Low, Low, Spent, Spent, Spent, Low, Spent, Ample,
        ];
        assert_eq!(seen, expected);
        assert_eq!(
            Ample.next(0, 0),
            Ample,
            "without a reserve nothing is refused"
        );
    }

    #[test]
    fn a_shard_is_as_full_as_a_majority_of_its_voters() {
        use DiskLevel::{Ample, Low, Spent};
        let of = |levels: &[DiskLevel]| DiskLevel::of_majority(levels.iter().copied());
        assert_eq!(of(&[]), Ample);
        assert_eq!(of(&[Low]), Low);
        assert_eq!(of(&[Ample, Low]), Low, "of two both are needed");
        assert_eq!(of(&[Ample, Spent, Ample]), Ample);
        assert_eq!(of(&[Spent, Ample, Low]), Low);
        assert_eq!(of(&[Spent, Ample, Spent]), Spent);
        assert_eq!(of(&[Ample, Low, Ample, Spent]), Low);
    }

    #[test]
    fn what_frees_space_is_taken_until_the_disk_is_full() {
        use DiskLevel::{Ample, Low, Spent};
        let taken =
            [Ample, Low, Spent].map(|level| [false, true].map(|frees| level.takes_write(frees)));
        assert_eq!(taken, [[true, true], [false, true], [false, false]]);
    }

    #[test]
    fn a_small_disk_has_a_small_reserve() {
        let of = |mib: u64, asked| {
            DiskRoom {
                free_bytes: 0,
                total_bytes: mib * MIB,
            }
            .reserve_bytes(asked)
                / MIB
        };
        assert_eq!(
            (of(160, None), of(1024, None), of(1 << 20, None)),
            (40, 256, 256)
        );
        assert_eq!(of(160, Some(100 * MIB)), 100);
        assert_eq!(
            DiskLevel::Ample.next(DiskRoom::ENDLESS.free_bytes, 256 * MIB),
            DiskLevel::Ample
        );
    }
}
