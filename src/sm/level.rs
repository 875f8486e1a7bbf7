//! Feature levels: what every node of a cluster must be able to read before a leader may propose
//! it.
//!
//! The view carries a level. Level 0 is the program of the first release, which knew none. A leader
//! proposes a variant of a later level only once
//! [`View::allows`](super::cluster::view::View::allows) it; until then it does what the programs of
//! the level before did, and those can take its place.
//!
//! # To add something that older programs do not read
//! 1. Add a [`Feature`] with its level: [`LEVEL`], or one more if a release with that is out
//!    already.
//! 2. Add the variant of the command at the end of its enum, and name the feature in its `needs`.
//! 3. Propose it only where `allows(feature)`, as `GroupSpec` and `Member` have it; keep the old
//!    way for a lower level, also in `apply`: what is in a log is applied as it was meant.
//! 4. Add the variant to the golden table of its `apply`.

/// The level that this program knows: it reads and applies all that leaders propose up to here.
pub const LEVEL: u16 = 2;

/// Something that a leader may propose only where every node of the cluster can read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Replicas of a shard compare digests of their maps at an entry of the log.
    CompareDigests,
    /// Writes of an entry whose gets return too much are rejected.
    BoundedAnswers,
    /// That nothing is written to a shard is in its log, and outlives its leader.
    ReadOnlyEntries,
}

impl Feature {
    pub const ALL: [Feature; 3] = [
        Feature::CompareDigests,
        Feature::BoundedAnswers,
        Feature::ReadOnlyEntries,
    ];

    /// Returns the first level whose programs all know it.
    pub const fn level(self) -> u16 {
        match self {
            Feature::CompareDigests | Feature::BoundedAnswers => 1,
            Feature::ReadOnlyEntries => 2,
        }
    }

    /// Returns a name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Feature::CompareDigests => "comparison of replicas",
            Feature::BoundedAnswers => "bound on what gets return",
            Feature::ReadOnlyEntries => "record that a shard is read-only",
        }
    }
}

/// This program knows less than the cluster uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this cluster uses level {uses}, this program knows {knows}: start a newer one")]
pub struct TooOld {
    pub uses: u16,
    pub knows: u16,
}

impl TooOld {
    pub fn new(uses: u16, knows: u16) -> Self {
        Self { uses, knows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_brought_something_and_none_is_unknown() {
        for feature in Feature::ALL {
            assert!((1..=LEVEL).contains(&feature.level()), "{feature:?}");
        }
        for level in 1..=LEVEL {
            assert!(
                Feature::ALL.iter().any(|feature| feature.level() == level),
                "{level}"
            );
        }
    }
}
