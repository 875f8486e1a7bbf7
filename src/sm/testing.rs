//! For tests: the view of a few nodes, and, for those of the core, a meta group that is one map and
//! whose groups do what the view says when they are told to.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::cluster::meta::{self, MetaCommand, MetaOutcome};
use super::cluster::view::{NodeSpec, PlacementSpec, ReportedMembership, View};
use super::placement::first_view;
use crate::types::{ClusterId, DirectoryId, GroupId, LogId, MoveId, Slot};

/// Returns a node whose address and directory are made of its number.
pub fn node(number: u32) -> NodeSpec {
    NodeSpec {
        address: format!("n{number}:1").parse().expect("an address"),
        public_address: None,
        directory: DirectoryId(u128::from(number)),
    }
}

/// Returns the first view of the nodes 1 to `nodes`, which asks for nothing in particular.
pub fn view_of(nodes: u32) -> View {
    let nodes = (1..=nodes).map(node).collect();
    first_view(ClusterId(9), PlacementSpec::default(), nodes).expect("a view")
}

/// The meta group's map, changed by its commands alone.
pub struct Meta {
    pub map: BTreeMap<Bytes, Bytes>,
    index: u64,
}

impl Meta {
    pub fn empty() -> Self {
        Self {
            map: BTreeMap::new(),
            index: 0,
        }
    }

    pub fn founded(view: View) -> Self {
        let mut meta = Self::empty();
        assert_eq!(
            meta.run(MetaCommand::Found {
                view: Box::new(view)
            }),
            MetaOutcome::Done
        );
        meta
    }

    /// Applies `command` and returns what it answered.
    pub fn run(&mut self, command: MetaCommand) -> MetaOutcome {
        self.index += 1;
        let decoded = MetaCommand::decode(&command.encode()).expect("own encoding");
        let (outcome, batch) = meta::apply(&self.map, self.index, decoded).expect("applied");
        for (key, value) in batch {
            match value {
                Some(value) => self.map.insert(key, value),
                None => self.map.remove(&key),
            };
        }
        MetaOutcome::decode(&outcome.encode()).expect("own encoding")
    }

    pub fn view(&self) -> View {
        meta::read_view(&self.map)
            .expect("readable")
            .expect("founded")
    }

    pub fn install(&mut self, next: View) {
        let base = self.view().version;
        assert_eq!(
            self.run(MetaCommand::InstallPlan {
                base,
                next: Box::new(next)
            }),
            MetaOutcome::Done
        );
    }

    /// Every group of which the view knows less tells that its members are those of the view.
    pub fn report_all(&mut self) {
        let mut view = self.view();
        for group in self.view().groups.into_keys() {
            // What an earlier one told may have changed it, or taken it away.
            let Some(now) = view.groups.remove(&group).filter(|now| !now.is_settled()) else {
                continue;
            };
            let log_id = LogId {
                term: 1,
                index: now
                    .reported
                    .as_ref()
                    .map_or(1, |known| known.log_id.index + 1),
            };
            let reported = ReportedMembership {
                log_id,
                voters: now.electorate(),
                learners: now.learners,
            };
            assert_eq!(
                self.run(MetaCommand::Report {
                    group,
                    reported,
                    plan: view.epoch
                }),
                MetaOutcome::Done
            );
            view = self.view();
        }
    }

    /// Opens moves of up to so many misplaced slots that are not on the move.
    pub fn open_moves(&mut self, count: usize) -> Vec<MoveId> {
        let view = self.view();
        let moving: BTreeSet<Slot> = view
            .moves
            .values()
            .flat_map(|open| open.slots.clone())
            .collect();
        let mut runs: BTreeMap<(GroupId, GroupId), BTreeSet<Slot>> = BTreeMap::new();
        for slot in view
            .misplaced_slots()
            .filter(|slot| !moving.contains(slot))
            .take(count)
        {
            runs.entry((view.slots.owner(slot), view.targets.owner(slot)))
                .or_default()
                .insert(slot);
        }
        let open = |((from, to), slots)| match self.run(MetaCommand::OpenMove { slots, from, to }) {
            MetaOutcome::MoveOpened { id } => id,
            outcome => panic!("a move was not opened: {outcome:?}"),
        };
        runs.into_iter().map(open).collect()
    }

    /// Moves up to so many misplaced slots to where they should be.
    pub fn move_slots(&mut self, count: usize) {
        for id in self.open_moves(count) {
            assert_eq!(self.run(MetaCommand::CommitMove { id }), MetaOutcome::Done);
        }
    }

    /// Carries out all that is planned.
    pub fn settle(&mut self) {
        // Moves that were open, those to where the slots should be, members, then the nodes that
        // only the last of these set free.
        for _ in 0..4 {
            if self.view().is_settled() {
                return;
            }
            for id in self.view().moves.into_keys() {
                assert_eq!(self.run(MetaCommand::CommitMove { id }), MetaOutcome::Done);
            }
            self.move_slots(usize::MAX);
            self.report_all();
        }
        assert!(self.view().is_settled(), "not settled: {:?}", self.view());
    }
}
