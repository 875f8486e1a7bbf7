//! What follows from the digests that the replicas of a shard have of their maps at one entry of
//! its log.
//!
//! Replicas that apply the same entries have the same map; where they do not, a program, a machine
//! or a disk has erred, and every answer depends on whom one asks. Decided where the shard is led.
//! The rule: only those are rebuilt that differ from a majority of one mind, and without one nobody
//! is believed.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::ReplicaId;

/// The conclusion drawn from the digests of a group's replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgreementVerdict {
    /// Nobody differs from another, as far as they have answered.
    Agree,
    /// These differ from what more than half of all have.
    Minority(BTreeSet<ReplicaId>),
    /// Some differ, and no more than half of all are of one mind.
    NoMajority,
}

/// Returns whether more than half of all `members` that have a map have told the same. Only they
/// can end what [`AgreementVerdict::NoMajority`] began: that nobody contradicts may mean that
/// nobody has answered.
pub fn is_majority_of_one_mind<D: Ord>(
    members: &BTreeSet<ReplicaId>,
    digests: &BTreeMap<ReplicaId, D>,
) -> bool {
    let told = digests
        .iter()
        .filter(|(replica, _)| members.contains(replica));

    // Counted against all members: those that have not answered may be of the other mind.
    let mut minds: BTreeMap<&D, usize> = BTreeMap::new();
    for (_, digest) in told {
        *minds.entry(digest).or_default() += 1;
    }
    minds
        .values()
        .any(|of_one_mind| of_one_mind * 2 > members.len())
}

/// Compares what replicas have told, of all `members` that have a map.
pub fn judge<D: Ord>(
    members: &BTreeSet<ReplicaId>,
    told: &BTreeMap<ReplicaId, D>,
) -> AgreementVerdict {
    let mut minds: BTreeMap<&D, BTreeSet<ReplicaId>> = BTreeMap::new();
    for (replica, digest) in told.iter().filter(|(replica, _)| members.contains(replica)) {
        minds.entry(digest).or_default().insert(*replica);
    }
    if minds.len() <= 1 {
        return AgreementVerdict::Agree;
    }

    // A majority of all members, not of those that answered: two that agree may be the two that
    // erred.
    let majority = minds
        .values()
        .find(|of_one_mind| of_one_mind.len() * 2 > members.len());
    match majority {
        None => AgreementVerdict::NoMajority,
        Some(majority) => AgreementVerdict::Minority(
            minds
                .values()
                .flatten()
                .filter(|id| !majority.contains(id))
                .copied()
                .collect(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdict on so many members, of which the first ones have told these digests, `-` for
    /// none.
    fn verdict(members: u64, told: &str) -> AgreementVerdict {
        let told = (1..)
            .map(ReplicaId)
            .zip(told.chars())
            .filter(|(_, digest)| *digest != '-')
            .collect();
        judge(&(1..=members).map(ReplicaId).collect(), &told)
    }

    fn minority(ids: &[u64]) -> AgreementVerdict {
        AgreementVerdict::Minority(ids.iter().copied().map(ReplicaId).collect())
    }

    #[test]
    fn few_that_agree_are_no_majority() {
        let is_majority = |members: u64, told: &str| {
            let told = (1..)
                .map(ReplicaId)
                .zip(told.chars())
                .filter(|(_, digest)| *digest != '-');
            is_majority_of_one_mind(&(1..=members).map(ReplicaId).collect(), &told.collect())
        };
        for (members, told) in [(3, "aa-"), (3, "aba"), (2, "aa"), (1, "a"), (5, "aaab-")] {
            assert!(is_majority(members, told), "{told} of {members}");
        }
        for (members, told) in [
            (3, "a--"),
            (3, "abc"),
            (2, "ab"),
            (2, "a-"),
            (4, "aabb"),
            (3, "---"),
        ] {
            assert!(!is_majority(members, told), "{told} of {members}");
        }
    }

    #[test]
    fn only_who_differs_from_a_majority_of_all_is_rebuilt() {
        for told in ["", "a", "aaa", "a--", "aa-"] {
            assert_eq!(verdict(3, told), AgreementVerdict::Agree, "{told}");
        }
        assert_eq!(verdict(3, "aba"), minority(&[2]));
        assert_eq!(verdict(3, "baa"), minority(&[1]));
        assert_eq!(verdict(5, "aabca"), minority(&[3, 4]));
        assert_eq!(verdict(5, "aab-a"), minority(&[3]));
        for (members, told) in [
            (2, "ab"),
            (3, "abc"),
            (3, "ab-"),
            (4, "aabb"),
            (5, "aab--"),
            (5, "aabbc"),
        ] {
            assert_eq!(
                verdict(members, told),
                AgreementVerdict::NoMajority,
                "{told} of {members}"
            );
        }
        assert_eq!(
            verdict(2, "aab"),
            AgreementVerdict::Agree,
            "the third is none of them any more"
        );
    }
}
