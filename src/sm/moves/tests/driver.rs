//! Whole moves, driven by what is observed: plain ones, ones that are aborted, and ones whose
//! driver stops at every step.

use super::*;
use crate::sm::moves::{AbortReason, Move, MoveLimits, MoveSide, MoveStep, MoveWait, next_step};

const PATIENT: MoveLimits = MoveLimits {
    freeze_bytes_max: 200,
    freeze_now: false,
    freeze_overdue: false,
    give_up: false,
};

/// Steps after which the driver freezes, however much is left.
const FREEZE_AFTER: usize = 30;

/// A driver's view of a move, and what the meta group decided of it.
struct Driven {
    world: World,
    of: Move,
    /// Entries that were proposed.
    sent: Vec<(GroupId, KvCommand)>,
    /// Committed, or ended by an abort.
    closed: Option<MoveStep>,
    bytes_max: usize,
}

/// Fate of a step that the driver takes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Applied,
    Lost,
    /// Applied, and then everything that was ever sent comes once more.
    AllAgain,
}

impl Driven {
    fn new() -> Self {
        let world = run("
            1: put {a}1 x           -> @1+
            1: key=k put {a}2 x     -> @2+
            1: put {b} x            -> @1+");
        let of = Move {
            id: MoveId(5),
            slots: tags(&["a", "b"]),
            from: GroupId(1),
            to: GroupId(2),
        };
        Self {
            world,
            of,
            sent: Vec::new(),
            closed: None,
            bytes_max: 30,
        }
    }

    fn observe(&mut self, reachable: bool, budget: MoveLimits) -> MoveStep {
        let Move { id, slots, .. } = &self.of;
        let destination =
            destination_state(&self.world.shards[1].map, *id, slots).expect("readable");
        let destination = reachable.then_some(destination);
        let cursor = match &destination {
            Some(DestinationState::Installing(progress)) => progress.cursor.clone(),
            _ => Bytes::new(),
        };
        let source =
            source_state(&self.world.shards[0].map, *id, slots, &cursor).expect("readable");
        next_step(&source, destination.as_ref(), budget)
    }

    fn entry(&mut self, step: &MoveStep) -> Option<(GroupId, KvCommand)> {
        let source = &self.world.shards[0].map;
        match step {
            MoveStep::Copy(progress) => {
                let chunk = move_chunk(source, self.of.id, &progress.cursor, self.bytes_max)
                    .expect("readable")
                    .expect("open");
                let install = chunk.install(self.of.id, progress.chunk);
                Some((
                    self.of.to,
                    KvCommand::Install {
                        time_ms: 0,
                        install,
                    },
                ))
            }
            MoveStep::Complete { chunk } => {
                let contents = final_contents(source, self.of.id)
                    .expect("readable")
                    .expect("frozen");
                Some((
                    self.of.to,
                    MoveCommand::Complete {
                        chunk: *chunk,
                        contents,
                    }
                    .into_command(self.of.id, &self.of.slots),
                ))
            }
            step => step.command(&self.of).map(|(side, command)| match side {
                MoveSide::Source => (self.of.from, command),
                MoveSide::Destination => (self.of.to, command),
            }),
        }
    }

    fn take(&mut self, step: &MoveStep, fate: Fate) {
        if let MoveStep::Commit | MoveStep::End = step {
            self.closed = Some(step.clone());
        }
        let Some((shard, command)) = self.entry(step) else {
            return;
        };
        self.sent.push((shard, command.clone()));
        if fate != Fate::Lost {
            self.world.shard(shard.0).apply(command);
            self.world.check();
        }
        if fate == Fate::AllAgain {
            for (shard, command) in self.sent.clone() {
                self.world.shard(shard.0).apply(command);
                self.world.check();
            }
        }
    }

    /// A write of a client, to whoever takes it.
    fn write(&mut self, number: usize) -> bool {
        let line = format!("put {{a}}w{} {number}", number % 3);
        (1..=2).any(|shard| self.world.shard(shard).step(&line).starts_with('@'))
    }

    /// Drives it to its end with a write between any two steps; the step at `which` meets `fate`.
    /// Returns the steps, and the last value of each key that was written.
    fn drive(&mut self, which: usize, fate: Fate) -> (Vec<MoveStep>, BTreeMap<usize, usize>) {
        let mut steps = Vec::new();
        let mut written = BTreeMap::new();
        while self.closed.is_none() {
            let step = self.observe(
                true,
                MoveLimits {
                    freeze_now: steps.len() > FREEZE_AFTER,
                    ..PATIENT
                },
            );
            self.take(
                &step,
                if steps.len() == which {
                    fate
                } else {
                    Fate::Applied
                },
            );
            steps.push(step);
            assert!(steps.len() < 60, "it ends: {steps:?}");
            if self.write(steps.len()) {
                written.insert(steps.len() % 3, steps.len());
            }
        }
        (steps, written)
    }

    fn assert_moved(&mut self, written: &BTreeMap<usize, usize>) {
        assert_eq!(self.closed, Some(MoveStep::Commit));
        for (key, value) in written {
            let shown = self.world.step(&format!("2: get {{a}}w{key}"));
            assert!(
                shown.starts_with(&format!("{value}@")),
                "{shown} is not {value}"
            );
        }
        self.world.run(
            "
            2: get {a}1; get {b}    -> x@1; x@1
            2: key=k put {a}2 x     -> @2+
            1: get {a}1             -> wrong owner, g2 by m5",
        );
    }
}

#[test]
fn a_move_goes_step_by_step() {
    let mut driven = Driven::new();
    let (steps, written) = driven.drive(usize::MAX, Fate::Applied);
    driven.assert_moved(&written);
    let at = |wanted: &MoveStep| steps.iter().position(|step| step == wanted).expect("taken");
    let order = [
        MoveStep::Prepare,
        MoveStep::Begin,
        MoveStep::Freeze,
        MoveStep::Release,
        MoveStep::Activate,
        MoveStep::Commit,
    ]
    .map(|step| at(&step));
    assert!(order.is_sorted(), "{steps:?}");
    let copies = steps
        .iter()
        .filter(|step| matches!(step, MoveStep::Copy(_)))
        .count();
    assert!(copies > 3, "in small chunks: {steps:?}");
    assert!(matches!(steps[order[3] - 1], MoveStep::Complete { .. }));
}

#[test]
fn a_move_is_taken_up_after_any_step() {
    let steps = Driven::new().drive(usize::MAX, Fate::Applied).0.len();
    for fate in [Fate::Lost, Fate::AllAgain] {
        for which in 0..steps {
            let mut driven = Driven::new();
            let (_, written) = driven.drive(which, fate);
            driven.assert_moved(&written);
        }
    }
}

#[test]
fn a_move_is_given_up_at_any_step_before_its_release() {
    let (steps, _) = Driven::new().drive(usize::MAX, Fate::Applied);
    for which in 0..steps.len() {
        let mut driven = Driven::new();
        let mut taken = 0;
        let mut last = (0, 0);
        while driven.closed.is_none() {
            let step = driven.observe(
                true,
                MoveLimits {
                    give_up: taken >= which,
                    freeze_now: taken > FREEZE_AFTER,
                    ..PATIENT
                },
            );
            driven.take(&step, Fate::AllAgain);
            taken += 1;
            assert!(taken < 60, "it ends");
            if driven.write(taken) {
                last = (taken % 3, taken);
            }
        }
        let complete = steps
            .iter()
            .position(|step| matches!(step, MoveStep::Complete { .. }))
            .expect("taken");
        let owner = if which > complete { 2 } else { 1 };
        assert_eq!(
            driven.closed,
            Some(if owner == 2 {
                MoveStep::Commit
            } else {
                MoveStep::End
            }),
            "given up after {which} steps"
        );
        let shown = driven.world.step(&format!("{owner}: get {{a}}w{}", last.0));
        assert!(shown.starts_with(&format!("{}@", last.1)), "{shown}");
        assert_eq!(
            driven.world.step(&format!("{owner}: key=k put {{a}}2 x")),
            "@2+"
        );
        // What is left can be cleared, on both sides.
        for shard in [1, 2] {
            while let Some((id, slots)) =
                leftovers(&driven.world.shard(shard).map).expect("readable")
            {
                let outcome = driven
                    .world
                    .shard(shard)
                    .apply(MoveCommand::Clear { limit: 2 }.into_command(id, &slots));
                assert!(
                    matches!(outcome, KvOutcome::Moved(MoveOutcome::Cleared { .. })),
                    "{outcome:?}"
                );
                driven.world.check();
            }
        }
    }
}

#[test]
fn a_freeze_that_lasts_too_long_is_given_up() {
    let mut driven = Driven::new();
    loop {
        let step = driven.observe(true, PATIENT);
        driven.take(&step, Fate::Applied);
        if step == MoveStep::Freeze {
            break;
        }
    }
    driven.world.run("1: put {a}1 y -> frozen");
    assert_eq!(
        driven.observe(false, PATIENT),
        MoveStep::Wait(MoveWait::Destination)
    );
    let step = driven.observe(
        false,
        MoveLimits {
            freeze_overdue: true,
            ..PATIENT
        },
    );
    assert_eq!(step, MoveStep::Abort(AbortReason::FrozenTooLong));
    driven.take(&step, Fate::Applied);
    driven.world.run("1: put {a}1 y -> @3");
    assert_eq!(
        driven.observe(false, PATIENT),
        MoveStep::End,
        "a destination that is gone keeps no move open"
    );
    assert_eq!(driven.observe(true, PATIENT), MoveStep::Cancel);
}

#[test]
fn a_destination_is_cleared_before_it_is_prepared() {
    let mut driven = Driven::new();
    driven.world.run(
        "
        2: m4 prepare a b c from 1 -> 0
        1: m4 begin a b c to 2  -> done
        2: m4 copy from 1       -> 1
        1: m4 abort a b c       -> done",
    );
    let (steps, written) = driven.drive(usize::MAX, Fate::Applied);
    assert_eq!(
        steps[..3],
        [MoveStep::Clear, MoveStep::Prepare, MoveStep::Begin]
    );
    driven.assert_moved(&written);
}

#[test]
fn a_source_that_does_not_own_the_slots_yet_is_waited_for() {
    let mut driven = Driven::new();
    driven.of.slots = tags(&["d"]);
    assert_eq!(
        driven.observe(true, PATIENT),
        MoveStep::Wait(MoveWait::Source)
    );
    driven.world.run("1: claim d -> claimed");
    assert_eq!(driven.observe(true, PATIENT), MoveStep::Prepare);
}
