//! [`Starts`]: which starts of its node a data directory remembers, and by that whether it is an
//! old copy.
//!
//! Every start of a node as a member gets a number and a random id, which its directory keeps
//! before the node says its first word. A peer remembers the last start that it heard of, for ever.
//! A directory that was copied before that start does not have it: what the node has said since,
//! promises and acknowledgements among it, is not in it, and the peer refuses it. So does it refuse
//! the second of two copies that both went on. Nothing else refuses a directory: one that was
//! started again, moved or restored to where it was has every start that anybody ever heard of,
//! after a power cut too.
//!
//! Kept out: files (`storage::starts`), and telling a copy from its original while both run
//! (`raft::transport::lanes`).

use serde::{Deserialize, Serialize};

use crate::types::StartId;

/// Starts that a directory remembers. A peer that heard of none of them for so many can't tell a
/// copy any more, and takes it for right: no directory may ever be refused by mistake.
pub const STARTS_MAX: usize = 128;

/// One start of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Start {
    /// The first is 1.
    pub number: u64,
    pub id: StartId,
}

/// The last starts of a node, the running one among them. Part of the disk format, and of what
/// lanes begin with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StartsRecord", into = "StartsRecord")]
pub struct Starts {
    /// The number of the first of `ids`.
    first: u64,
    /// Of starts that followed one another. The last is the one that runs.
    ids: Vec<StartId>,
}

#[derive(Serialize, Deserialize)]
struct StartsRecord {
    first: u64,
    ids: Vec<StartId>,
}

/// The reason why a list of starts is invalid.
#[derive(Debug, thiserror::Error)]
#[error("a list of starts is empty, too long or wrongly numbered")]
pub struct UnsoundStarts;

impl Starts {
    /// The starts of a directory that was started for the first time.
    pub fn first(id: StartId) -> Self {
        Self {
            first: 1,
            ids: vec![id],
        }
    }

    /// Returns these starts with one more, which runs now. The oldest is left out where there are
    /// too many.
    pub fn followed_by(&self, id: StartId) -> Self {
        let mut next = self.clone();
        next.ids.push(id);

        // The list goes along with each hello of a lane, so its length is bounded.
        if next.ids.len() > STARTS_MAX {
            next.ids.remove(0);
            next.first += 1;
        }
        assert!(
            next.ids.len() <= STARTS_MAX,
            "one start is forgotten for each new one"
        );
        assert_eq!(next.running().number, self.running().number + 1);
        next
    }

    /// Returns the start that runs.
    pub fn running(&self) -> Start {
        let id = self.ids.last().copied().unwrap_or_default();
        Start {
            number: self.first + self.ids.len() as u64 - 1,
            id,
        }
    }

    /// Returns whether this start is one of these.
    pub fn has(&self, start: Start) -> bool {
        start.number >= self.first && self.may_include(start)
    }

    /// Returns true if a directory with these starts has been through `known`, or may have: nothing
    /// can be said of a start before the oldest.
    pub fn may_include(&self, start: Start) -> bool {
        // Older than what is remembered: that can't be held against the directory.
        let Some(place) = start.number.checked_sub(self.first) else {
            return true;
        };
        let id = usize::try_from(place)
            .ok()
            .and_then(|place| self.ids.get(place));
        id.is_some_and(|id| *id == start.id)
    }
}

impl TryFrom<StartsRecord> for Starts {
    type Error = UnsoundStarts;

    fn try_from(record: StartsRecord) -> Result<Self, UnsoundStarts> {
        let StartsRecord { first, ids } = record;

        // It comes from a file or a peer: numbers that could overflow are refused.
        let is_sound = first > 0
            && !ids.is_empty()
            && ids.len() <= STARTS_MAX
            && first.checked_add(STARTS_MAX as u64).is_some();
        if is_sound {
            Ok(Self { first, ids })
        } else {
            Err(UnsoundStarts)
        }
    }
}

impl From<Starts> for StartsRecord {
    fn from(starts: Starts) -> Self {
        Self {
            first: starts.first,
            ids: starts.ids,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::BTreeSet;

    /// A data directory, with what it has really been through.
    #[derive(Clone)]
    struct Directory {
        starts: Option<Starts>,
        lineage: BTreeSet<StartId>,
        /// It was started, and may speak.
        runs: bool,
    }

    /// A peer, with all starts that it really exchanged a frame with.
    #[derive(Default)]
    struct Peer {
        known: Option<Start>,
        met: BTreeSet<StartId>,
    }

    impl Directory {
        /// The process starts; if it is cut off while it writes, the file is the old one or the
        /// new.
        fn start(&mut self, random: &mut StdRng) {
            let id = StartId(random.random());
            let next = self
                .starts
                .as_ref()
                .map_or_else(|| Starts::first(id), |starts| starts.followed_by(id));
            let (is_cut, is_written) = (random.random_bool(0.2), random.random_bool(0.5));
            if !is_cut || is_written {
                self.starts = Some(next);
                self.lineage.insert(id);
            }
            self.runs = !is_cut;
        }

        /// The first frame between the two. Returns whether the peer takes it.
        fn meets(&self, peer: &mut Peer) -> bool {
            let starts = self.starts.as_ref().expect("it runs");
            if peer.known.is_some_and(|known| !starts.may_include(known)) {
                return false;
            }
            // Durable before anything else is said.
            peer.known = Some(starts.running());
            peer.met.insert(starts.running().id);
            true
        }
    }

    /// Random schedules of starts, power cuts, copies, restores and clones that run at once: a peer
    /// refuses exactly the directories that lack a start that it has spoken with.
    #[test]
    fn a_directory_is_refused_if_and_only_if_it_lacks_a_start_that_the_peer_has_met() {
        let (mut refused, mut taken) = (0, 0);
        for seed in 0..2000u64 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut directories = vec![Directory {
                starts: None,
                lineage: BTreeSet::new(),
                runs: false,
            }];
            let mut peers = [Peer::default(), Peer::default(), Peer::default()];
            for step in 0..60 {
                let of = random.random_range(0..directories.len());
                match random.random_range(0..10) {
                    0..4 => directories[of].start(&mut random),
                    4 if directories.len() < 5 => {
                        let copy = Directory {
                            runs: false,
                            ..directories[of].clone()
                        };
                        directories.push(copy);
                    }
                    5 if directories.len() > 1 => drop(directories.remove(of)),
                    _ if directories[of].runs => {
                        let peer = &mut peers[random.random_range(0..3)];
                        let lacks = peer
                            .met
                            .difference(&directories[of].lineage)
                            .next()
                            .is_some();
                        let is_taken = directories[of].meets(peer);
                        assert_eq!(is_taken, !lacks, "seed {seed}, step {step}");
                        if is_taken { taken += 1 } else { refused += 1 }
                    }
                    _ => {}
                }
            }
        }
        assert!(
            refused > 1000 && taken > 1000,
            "{refused} refused, {taken} taken"
        );
    }

    /// However often it was started while a peer was away.
    #[test]
    fn a_directory_that_was_only_started_is_never_refused() {
        let mut starts = Starts::first(StartId(1));
        let mut known = vec![starts.running()];
        for id in 2..1000 {
            starts = starts.followed_by(StartId(id));
            assert!(
                known.iter().all(|known| starts.may_include(*known)),
                "start {id}"
            );
            known.push(starts.running());
        }
        assert_eq!(
            starts.running(),
            Start {
                number: 999,
                id: StartId(999)
            }
        );
        assert!(
            !starts.may_include(Start {
                number: 1000,
                id: StartId(1000)
            }),
            "one that it has yet to make"
        );
        assert!(
            starts.has(starts.running())
                && !starts.has(Start {
                    number: 1,
                    id: StartId(1)
                }),
            "the first is forgotten"
        );
        assert!(
            !starts.may_include(Start {
                number: 990,
                id: StartId(5)
            }),
            "another's"
        );
    }

    #[test]
    fn a_list_that_makes_no_sense_is_not_read() {
        for json in [
            r#"{"first":1,"ids":[]}"#,
            r#"{"first":0,"ids":[1]}"#,
            r#"{"first":18446744073709551615,"ids":[1,2]}"#,
        ] {
            assert!(serde_json::from_str::<Starts>(json).is_err(), "{json}");
        }
        let many = serde_json::json!({ "first": 1, "ids": vec![7; STARTS_MAX + 1] });
        assert!(serde_json::from_value::<Starts>(many).is_err());
        let starts: Starts = serde_json::from_str(r#"{"first":7,"ids":[1,2]}"#).expect("sound");
        assert_eq!(
            starts.running(),
            Start {
                number: 8,
                id: StartId(2)
            }
        );
    }
}
