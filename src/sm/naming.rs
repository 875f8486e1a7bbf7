//! Decides whom a replica that does not lead may name as the leader of its shard.
//!
//! Whoever is named has led in a term that the replica has not promised away, and names in its turn
//! only leaders of later terms. So a client that follows is never sent in a circle, whoever hands
//! over, falls silent or comes back meanwhile.

use crate::types::NodeId;

/// The leader of a shard as one of its replicas knows it.
#[derive(Debug, Clone, Copy)]
pub struct KnownLeader {
    /// The node that it follows.
    pub node: Option<NodeId>,
    /// The term in which it does.
    pub term: u64,
    /// The term of its last vote, for whomever.
    pub promised: u64,
    /// The term of the leader that was heard of last, and for how many milliseconds it has been
    /// silent.
    pub heard: Option<(u64, u64)>,
}

impl KnownLeader {
    /// Returns whom to name: the leader, if it was heard of within `silence_ms_max`, and no vote
    /// was given to anybody since it was elected.
    pub fn to_name(self, silence_ms_max: u64) -> Option<NodeId> {
        let (heard_term, silence_ms) = self.heard?;
        let is_current = heard_term == self.term && self.promised == self.term;
        self.node
            .filter(|_| is_current && silence_ms <= silence_ms_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE_MS_MAX: u64 = 240;

    fn named(
        node: Option<u64>,
        term: u64,
        promised: u64,
        heard: Option<(u64, u64)>,
    ) -> Option<u64> {
        let known = KnownLeader {
            node: node.map(NodeId),
            term,
            promised,
            heard,
        };
        known.to_name(SILENCE_MS_MAX).map(|node| node.0)
    }

    #[test]
    fn a_leader_is_named_that_was_heard_of_within_two_heartbeats() {
        let table = [
            (Some((5, 0)), Some(2)),
            (Some((5, 240)), Some(2)),
            (Some((5, 241)), None),
            (Some((5, 60_000)), None),
            (None, None),
        ];
        for (heard, expected) in table {
            assert_eq!(named(Some(2), 5, 5, heard), expected, "heard: {heard:?}");
        }
        assert_eq!(named(None, 5, 5, Some((5, 0))), None, "nobody leads");
    }

    #[test]
    fn a_leader_is_not_named_by_what_another_said_nor_once_another_has_the_vote() {
        let table = [
            (5, 5, 4, "only the leader before it was heard of"),
            (
                5,
                5,
                6,
                "the next leader was heard of, and is not known yet",
            ),
            (5, 6, 5, "another has this replica's vote, perhaps itself"),
            (6, 5, 6, "its vote for this one is not taken down yet"),
        ];
        for (term, promised, heard, why) in table {
            assert_eq!(
                named(Some(2), term, promised, Some((heard, 0))),
                None,
                "{why}"
            );
        }
    }
}
