//! Slot moves: their steps one by one, the copying, the driver stopped at every step, and moves
//! back and forth under random writes.
//!
//! Scripts run over three shards. A line is `SHARD: step -> what it answers`. A step is one of
//! `kv::tests`, or of a move: `m5 begin TAG.. to 2`, `m5 prepare TAG.. from 1`,
//! `m5 clear TAG.. limit 9`, and `freeze`, `release`, `abort`, `activate`, `cancel` with tags
//! alone. `m5 copy from 1 bytes 9` reads the next chunk at shard 1 and installs it here,
//! `m5 complete from 1` tells this shard what shard 1 counts. After each line the counters are
//! checked, and that no slot is served twice.

mod copying;
mod driver;
mod formats;
mod random;
mod steps;

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::sm::kv::tests::Shard;
use crate::sm::kv::*;
use crate::sm::requests::group_time_ms;
use crate::sm::slots::{Ownership, SlotState, slot_of};
use crate::types::{GroupId, MoveId, Revision, Slot};
use bytes::Bytes;

/// Shards 1, 2 and 3.
#[derive(Debug, Clone, Default)]
struct World {
    pub shards: [Shard; 3],
}

impl World {
    pub fn shard(&mut self, number: u64) -> &mut Shard {
        let index = usize::try_from(number - 1).expect("a small number");
        &mut self.shards[index]
    }

    /// Runs the lines of a script.
    pub fn run(&mut self, script: &str) {
        for line in script
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            let (step, expected) = line
                .split_once("->")
                .map_or((line, ""), |(step, expected)| (step, expected.trim()));
            assert_eq!(self.step(step.trim()), expected, "{line}");
            self.check();
        }
    }

    pub fn step(&mut self, line: &str) -> String {
        let (number, step) = line.split_once(": ").expect("a shard before each step");
        let number = number.parse().expect("the number of a shard");
        let words: Vec<&str> = step.split_whitespace().collect();
        let Some(id) = words[0]
            .strip_prefix('m')
            .and_then(|id| id.parse().ok())
            .map(MoveId)
        else {
            return self.shard(number).step(step);
        };
        let at = words
            .iter()
            .position(|word| ["to", "from", "limit"].contains(word))
            .unwrap_or(words.len());
        let slots: BTreeSet<Slot> = words[2..at]
            .iter()
            .map(|tag| slot_of(tag.as_bytes()))
            .collect();
        let argument: u64 = words
            .get(at + 1)
            .map_or(0, |word| word.parse().expect("a number"));
        let step = match words[1] {
            "begin" => MoveCommand::Begin {
                to: GroupId(argument),
            },
            "freeze" => MoveCommand::Freeze,
            "release" => MoveCommand::Release,
            "abort" => MoveCommand::Abort,
            "prepare" => MoveCommand::Prepare {
                from: GroupId(argument),
            },
            "activate" => MoveCommand::Activate,
            "cancel" => MoveCommand::Cancel,
            "clear" => MoveCommand::Clear {
                limit: argument as u32,
            },
            "complete" => return self.complete(id, argument, number),
            "copy" => {
                let bytes_max = words
                    .get(at + 3)
                    .map_or(usize::MAX, |word| word.parse().expect("a number"));
                return self.copy(id, argument, number, bytes_max);
            }
            other => panic!("no step: {other}"),
        };
        show(self.shard(number).apply(step.into_command(id, &slots)))
    }

    fn complete(&mut self, id: MoveId, from: u64, to: u64) -> String {
        let Some(contents) = final_contents(&self.shard(from).map, id).expect("readable") else {
            return "not final".into();
        };
        let slots = contents.keys().copied().collect();
        let chunk = self.progress(id, to).chunk;
        show(
            self.shard(to)
                .apply(MoveCommand::Complete { chunk, contents }.into_command(id, &slots)),
        )
    }

    /// Returns the progress of a destination.
    pub fn progress(&mut self, id: MoveId, number: u64) -> InstallProgress {
        match OpenMove::read(&self.shard(number).map, id).expect("readable") {
            Some(OpenMove {
                phase: MovePhase::Installing { progress, .. },
                ..
            }) => progress,
            _ => InstallProgress::default(),
        }
    }

    /// The next chunk of a move at its source, for what the destination has.
    pub fn chunk(&mut self, id: MoveId, from: u64, to: u64, bytes_max: usize) -> Option<Install> {
        let progress = self.progress(id, to);
        let chunk =
            move_chunk(&self.shard(from).map, id, &progress.cursor, bytes_max).expect("readable");
        chunk.map(|chunk| chunk.install(id, progress.chunk))
    }

    fn copy(&mut self, id: MoveId, from: u64, to: u64, bytes_max: usize) -> String {
        let Some(install) = self.chunk(id, from, to, bytes_max) else {
            return "nothing to read".into();
        };
        let time_ms = group_time_ms(&self.shard(to).map).expect("readable");
        show(
            self.shard(to)
                .apply(KvCommand::Install { time_ms, install }),
        )
    }

    /// Asserts what must hold of all shards at any time.
    pub fn check(&self) {
        let mut served = BTreeSet::new();
        for shard in &self.shards {
            shard.assert_counted();
            let mut in_moves = BTreeMap::new();
            for (slot, state) in SlotState::read_all(&shard.map).expect("readable") {
                assert!(
                    !state.serves_reads() || served.insert(slot),
                    "slot {slot} is served twice"
                );
                if matches!(
                    state.ownership,
                    Ownership::Leaving | Ownership::Frozen | Ownership::Arriving
                ) {
                    in_moves.insert(slot, (state.generation, state.ownership));
                }
            }
            let mut open = BTreeMap::new();
            for (id, of) in OpenMove::read_all(&shard.map).expect("readable") {
                let ownership = match of.phase {
                    MovePhase::Copying { .. } => Ownership::Leaving,
                    MovePhase::Frozen { .. } => Ownership::Frozen,
                    MovePhase::Installing { .. } => Ownership::Arriving,
                };
                for slot in of.slots {
                    assert_eq!(
                        open.insert(slot, (id, ownership)),
                        None,
                        "slot {slot} is in two moves"
                    );
                }
            }
            assert_eq!(
                in_moves, open,
                "slots in moves, and the moves that are open"
            );
        }
    }
}

fn show(outcome: KvOutcome) -> String {
    let KvOutcome::Moved(outcome) = outcome else {
        panic!("not of a move: {outcome:?}")
    };
    show_moved(&outcome)
}

pub(in crate::sm) fn show_moved(outcome: &MoveOutcome) -> String {
    let rejection = match outcome {
        MoveOutcome::Done => return "done".into(),
        MoveOutcome::Cleared { more } => {
            return if *more {
                "more".into()
            } else {
                "cleared".into()
            };
        }
        MoveOutcome::Installing(InstallProgress {
            chunk, complete, ..
        }) => {
            return format!("{}{chunk}", if *complete { "complete " } else { "" });
        }
        MoveOutcome::Rejected(rejection) => rejection,
    };
    match rejection {
        MoveRejection::NotOwned { .. } => "not owned".into(),
        MoveRejection::Owned { .. } => "owned".into(),
        MoveRejection::Overtaken { generation, .. } => format!("overtaken by {generation}"),
        MoveRejection::Open { id } => format!("{id} is open"),
        MoveRejection::NotOpen => "not open".into(),
        MoveRejection::NotFrozen => "not frozen".into(),
        MoveRejection::Released => "released".into(),
        MoveRejection::Leftovers { .. } => "leftovers".into(),
        MoveRejection::Incomplete => "incomplete".into(),
        MoveRejection::Differs { source, here, .. } => {
            format!("differs {} {}", source.keys, here.keys)
        }
        MoveRejection::Unfit { why } => format!("unfit: {why}"),
    }
}

/// Shard 1 owns the slots of `a`, `b` and `c`, and then a script is run.
fn run(script: &str) -> World {
    let mut world = World::default();
    world.run("1: claim a b c -> claimed");
    world.run(script);
    world
}

fn tags(tags: &[&str]) -> BTreeSet<Slot> {
    tags.iter().map(|tag| slot_of(tag.as_bytes())).collect()
}

/// A whole move.
const MOVED: &str = "
    2: m5 prepare a b from 1 -> 0
    1: m5 begin a b to 2     -> done
    2: m5 copy from 1        -> 1
    1: m5 freeze a b         -> done
    2: m5 copy from 1        -> 2
    2: m5 complete from 1    -> complete 2
    1: m5 release a b        -> done
    2: m5 activate a b       -> done";
