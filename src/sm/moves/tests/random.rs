//! Moves back and forth between three shards, driven by several drivers at once that crash, lag
//! behind, lose steps, delay them and repeat them, under random writes, against a model that knows
//! of no shards.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::sm::kv::model_tests::{Model, TAGS, operation, write};
use crate::sm::moves::{Move, MoveLimits, MoveSide, MoveStep, next_step};
use crate::sm::ports::{Direction, Read};
use crate::sm::slots::{all_data, change_range_from, parse_data_key};

type Map = BTreeMap<Bytes, Bytes>;

/// By how many entries what is read of a shard may be behind.
const LAG_MAX: usize = 24;

#[derive(Debug, Clone)]
enum Event {
    /// `shard`: where the client believes the first key to be; none: where it is.
    Write {
        shard: Option<u64>,
        elapsed_ms: u64,
        writes: Vec<Write>,
    },
    /// The meta group opens a move of those of the slots that are together.
    Open { slots: Vec<Slot>, to: GroupId },
    /// So many steps.
    Drive(usize, Drive),
    /// A delayed entry comes after all.
    Deliver(usize),
    /// An entry that was once proposed comes again: which, from the newest.
    Repeat(usize),
    /// A shard clears something that was left behind.
    Clear { shard: u64, limit: u32 },
    /// A shard claims what the meta group says is its own.
    Claim { shard: u64 },
}

/// One look and one step of a driver.
#[derive(Debug, Clone)]
struct Drive {
    /// Index among the open moves; or, where the driver has not heard of a move's end, among all
    /// moves ever, newest first.
    which: Result<usize, usize>,
    /// By how many entries the driver's replica is behind.
    source_lag: usize,
    /// By how many entries the answer of the destination is behind; none: there is no answer.
    destination_lag: Option<usize>,
    /// By how many entries it is behind when it reads for the step.
    reading_lag: usize,
    budget: MoveLimits,
    bytes_max: usize,
    fate: Fate,
}

#[derive(Debug, Clone, Copy)]
enum Fate {
    Applied,
    Lost,
    Delayed,
}

#[derive(Default)]
struct Cluster {
    world: World,
    /// Of each shard the last maps, the newest last.
    history: [VecDeque<Map>; 3],
    model: Model,
    time_ms: u64,
    /// The meta group's.
    owners: BTreeMap<Slot, GroupId>,
    moves: Vec<Move>,
    open: BTreeSet<MoveId>,
    sent: Vec<(GroupId, KvCommand)>,
    delayed: Vec<(GroupId, KvCommand)>,
}

impl Cluster {
    fn new() -> Self {
        let mut cluster = Self {
            history: [(); 3].map(|()| VecDeque::from([Map::new()])),
            ..Self::default()
        };
        for (tag, owner) in TAGS.iter().zip([1, 1, 2]) {
            let slot = slot_of(tag.as_bytes());
            cluster.owners.insert(slot, GroupId(owner));
            cluster.model.holds.insert(slot, Ownership::Owned);
        }
        cluster
    }

    fn map(&self, shard: GroupId, lag: usize) -> &Map {
        let history = &self.history[shard.0 as usize - 1];
        &history[history.len().saturating_sub(lag + 1)]
    }

    /// The clocks of the shards are far apart.
    fn time_of(&self, shard: GroupId) -> u64 {
        self.time_ms + (4 - shard.0) * 1_000_000
    }

    fn apply(&mut self, shard: GroupId, command: KvCommand) -> KvOutcome {
        let outcome = self.world.shard(shard.0).apply(command);
        let map = self.world.shard(shard.0).map.clone();
        let history = &mut self.history[shard.0 as usize - 1];
        history.push_back(map);
        if history.len() > LAG_MAX {
            history.pop_front();
        }
        outcome
    }

    fn send(&mut self, shard: GroupId, command: KvCommand, fate: Fate) {
        self.sent.push((shard, command.clone()));
        match fate {
            Fate::Applied => drop(self.apply(shard, command)),
            Fate::Lost => {}
            Fate::Delayed => self.delayed.push((shard, command)),
        }
    }

    fn run(&mut self, event: Event) {
        match event {
            Event::Write {
                shard,
                elapsed_ms,
                writes,
            } => {
                let first = writes.iter().flat_map(|write| &write.operations).next();
                let server = || first.and_then(|operation| self.server(slot_of(&operation.key)));
                let shard = shard.map(GroupId).or_else(server).unwrap_or(GroupId(1));
                self.write(shard, elapsed_ms, writes);
            }
            Event::Open { slots, to } => self.open(&slots, to),
            Event::Drive(steps, drive) => {
                for _ in 0..steps {
                    self.drive(&drive);
                    self.check();
                }
            }
            Event::Deliver(which) => {
                if !self.delayed.is_empty() {
                    let (shard, command) = self.delayed.swap_remove(which % self.delayed.len());
                    self.apply(shard, command);
                }
            }
            Event::Repeat(which) => {
                if !self.sent.is_empty() {
                    let (shard, command) =
                        self.sent[self.sent.len() - 1 - which % self.sent.len()].clone();
                    self.apply(shard, command);
                }
            }
            Event::Clear { shard, limit } => self.clear(shard, limit, Fate::Applied),
            Event::Claim { shard } => self.claim(GroupId(shard)),
        }
    }

    /// Whatever a shard answers, but that it does not take the write, is what the one store of the
    /// model answers.
    fn write(&mut self, shard: GroupId, elapsed_ms: u64, writes: Vec<Write>) {
        self.time_ms += elapsed_ms;
        let command = KvCommand::Write {
            time_ms: self.time_of(shard),
            writes: writes.clone(),
        };
        let KvOutcome::Written(outcomes) = self.apply(shard, command) else {
            panic!("writes are answered as writes")
        };
        for (write, outcome) in writes.iter().zip(outcomes) {
            let refused = matches!(
                outcome,
                WriteOutcome::Rejected(WriteRejection::WrongOwner { .. })
                    | WriteOutcome::Rejected(WriteRejection::Frozen { .. })
            );
            if !refused {
                assert_eq!(outcome, self.model.write(write), "{write:?}");
            }
        }
    }

    fn open(&mut self, slots: &[Slot], to: GroupId) {
        let from = self.owners[&slots[0]];
        let busy: BTreeSet<Slot> = self
            .open_moves()
            .flat_map(|of| of.slots.iter().copied())
            .collect();
        let slots: BTreeSet<Slot> = slots
            .iter()
            .copied()
            .filter(|slot| self.owners[slot] == from && !busy.contains(slot))
            .collect();
        if from != to && !slots.is_empty() {
            let id = MoveId(self.moves.len() as u64 + 1);
            self.open.insert(id);
            self.moves.push(Move {
                id,
                slots,
                from,
                to,
            });
        }
    }

    fn open_moves(&self) -> impl Iterator<Item = &Move> {
        self.moves.iter().filter(|of| self.open.contains(&of.id))
    }

    fn drive(&mut self, drive: &Drive) {
        let Some(of) = self.chosen(drive.which) else {
            return;
        };
        let destination = drive.destination_lag.map(|lag| {
            let map = self.map(of.to, lag);
            destination_state(map, of.id, &of.slots).expect("readable")
        });
        let cursor = match &destination {
            Some(DestinationState::Installing(progress)) => progress.cursor.clone(),
            _ => Bytes::new(),
        };
        let source = source_state(
            self.map(of.from, drive.source_lag),
            of.id,
            &of.slots,
            &cursor,
        )
        .expect("readable");
        let step = next_step(&source, destination.as_ref(), drive.budget);
        let reading = self.map(of.from, drive.reading_lag);
        let command = match &step {
            MoveStep::Copy(progress) => {
                let chunk = move_chunk(reading, of.id, &progress.cursor, drive.bytes_max)
                    .expect("readable");
                let time_ms = self.time_of(of.to);
                chunk.map(|chunk| {
                    (
                        of.to,
                        KvCommand::Install {
                            time_ms,
                            install: chunk.install(of.id, progress.chunk),
                        },
                    )
                })
            }
            MoveStep::Complete { chunk } => {
                let contents = final_contents(reading, of.id).expect("readable");
                contents.map(|contents| {
                    (
                        of.to,
                        MoveCommand::Complete {
                            chunk: *chunk,
                            contents,
                        }
                        .into_command(of.id, &of.slots),
                    )
                })
            }
            step => step.command(&of).map(|(side, command)| match side {
                MoveSide::Source => (of.from, command),
                MoveSide::Destination => (of.to, command),
            }),
        };
        if let Some((shard, command)) = command {
            self.send(shard, command, drive.fate);
        }
        match step {
            MoveStep::Commit => self.close(&of, of.to),
            MoveStep::End => self.close(&of, of.from),
            MoveStep::Over => assert!(!self.open.contains(&of.id), "an open move is not over"),
            _ => {}
        }
    }

    fn chosen(&self, which: Result<usize, usize>) -> Option<Move> {
        let open = |number: usize| self.open_moves().nth(number % self.open.len().max(1));
        let any = |number: usize| {
            self.moves
                .iter()
                .rev()
                .nth(number % self.moves.len().max(1))
        };
        which.map_or_else(any, open).cloned()
    }

    fn close(&mut self, of: &Move, owner: GroupId) {
        if self.open.remove(&of.id) {
            self.owners
                .extend(of.slots.iter().map(|slot| (*slot, owner)));
        }
    }

    fn clear(&mut self, shard: u64, limit: u32, fate: Fate) {
        if let Some((id, slots)) = leftovers(&self.world.shard(shard).map).expect("readable") {
            self.send(
                GroupId(shard),
                MoveCommand::Clear { limit }.into_command(id, &slots),
                fate,
            );
        }
    }

    fn claim(&mut self, shard: GroupId) {
        let untouched = |slot: Slot| {
            let state = SlotState::read(self.map(shard, 0), slot).expect("readable");
            !state.serves_reads() && state.generation == MoveId(0)
        };
        let mine = self
            .owners
            .iter()
            .filter(|(slot, owner)| **owner == shard && untouched(**slot));
        let slots = mine.map(|(slot, _)| *slot).collect();
        self.send(shard, KvCommand::Claim { slots }, Fate::Applied);
    }

    /// Returns the shard that serves a slot.
    fn server(&self, slot: Slot) -> Option<GroupId> {
        (1..=3).map(GroupId).find(|shard| {
            let map = self.map(*shard, 0);
            SlotState::read(map, slot).expect("readable").serves_reads()
        })
    }

    /// The slots of each shard are as in the model, where it serves them; and a slot that nobody
    /// serves is whole at its destination.
    fn check(&self) {
        self.world.check();
        for slot in TAGS.map(|tag| slot_of(tag.as_bytes())) {
            let Some(shard) = self.server(slot) else {
                let touched = (1..=3).any(|shard| {
                    SlotState::read(self.map(GroupId(shard), 0), slot)
                        .is_ok_and(|s| s.moved_to.is_some())
                });
                assert!(!touched || self.arrived(slot), "slot {slot} is nowhere");
                continue;
            };
            let map = self.map(shard, 0);
            let revision = SlotState::read(map, slot)
                .expect("readable")
                .contents
                .revision
                .0;
            assert_eq!(
                revision,
                self.model.revisions.get(&slot).copied().unwrap_or(0),
                "the revisions of slot {slot}"
            );
            let pairs = map
                .scan(&all_data(), Direction::Forward)
                .map(|pair| pair.expect("readable"));
            let found = pairs.filter_map(|(key, value)| {
                let (of, user_key) = parse_data_key(&key).expect("a data key");
                (of == slot).then(|| (user_key, decode_record(&value).expect("own encoding")))
            });
            let expected = self
                .model
                .keys
                .iter()
                .filter(|(key, _)| slot_of(key) == slot);
            assert!(
                found.eq(expected.map(|(key, record)| (key.clone(), record.clone()))),
                "the keys of slot {slot}"
            );
        }
    }

    fn arrived(&self, slot: Slot) -> bool {
        let arrived = |of: &Move| {
            let destination =
                destination_state(self.map(of.to, 0), of.id, &of.slots).expect("readable");
            of.slots.contains(&slot)
                && matches!(
                    destination,
                    DestinationState::Installing(progress) if progress.complete
                )
        };
        self.open_moves().any(arrived)
    }

    /// Everything answers again, and whoever drives is patient: all moves end.
    fn heal(&mut self) {
        for shard in 1..=3 {
            self.claim(GroupId(shard));
        }
        for step in 0.. {
            let Some(of) = self.open_moves().next() else {
                break;
            };
            assert!(step < 200, "the move ends: {of:?}");
            let which = Ok(0);
            let budget = MoveLimits {
                freeze_bytes_max: 500,
                freeze_now: false,
                freeze_overdue: false,
                give_up: false,
            };
            let fate = Fate::Applied;
            let bytes_max = 100;
            self.drive(&Drive {
                which,
                source_lag: 0,
                destination_lag: Some(0),
                reading_lag: 0,
                budget,
                bytes_max,
                fate,
            });
            self.check();
        }
        self.assert_whole();
        self.clean();
    }

    /// Every slot is served by its owner, and every request is still remembered.
    fn assert_whole(&mut self) {
        for (slot, owner) in self.owners.clone() {
            assert_eq!(self.server(slot), Some(owner));
        }
        for ((slot, key), answered) in self.model.answered.clone() {
            let write = Write {
                operations: answered.operations,
                idempotency_key: Some(key),
            };
            self.write(self.owners[&slot], 0, vec![write]);
        }
        self.check();
    }

    /// Shards give up what the meta group does not know as open, and clear what is left: then
    /// nothing is.
    fn clean(&mut self) {
        for shard in 1..=3 {
            for (id, of) in OpenMove::read_all(&self.world.shard(shard).map).expect("readable") {
                assert!(!self.open.contains(&id));
                assert!(
                    matches!(of.phase, MovePhase::Installing { .. }),
                    "a source that aborted, or released, has nothing open"
                );
                self.send(
                    GroupId(shard),
                    MoveCommand::Cancel.into_command(id, &of.slots),
                    Fate::Applied,
                );
            }
            for round in 0.. {
                if leftovers(&self.world.shard(shard).map)
                    .expect("readable")
                    .is_none()
                {
                    break;
                }
                assert!(round < 100, "all is cleared");
                self.clear(shard, 7, Fate::Applied);
                self.check();
            }
            let map = &self.world.shards[shard as usize - 1].map;
            assert!(
                map.scan(&change_range_from(MoveId(0)), Direction::Forward)
                    .next()
                    .is_none()
            );
            for pair in map.scan(&all_data(), Direction::Forward) {
                let (slot, _) = parse_data_key(&pair.expect("readable").0).expect("a data key");
                assert_eq!(self.owners[&slot], GroupId(shard));
            }
        }
        self.check();
    }
}

fn shard() -> impl Strategy<Value = u64> {
    1..=3u64
}

fn drive() -> impl Strategy<Value = Drive> {
    let lag = || prop_oneof![6 => Just(0), 1 => 0..LAG_MAX];
    let which = prop_oneof![8 => (0..4usize).prop_map(Ok), 1 => (0..20usize).prop_map(Err)];
    let destination_lag = prop_oneof![9 => lag().prop_map(Some), 1 => Just(None)];
    let budget = (
        prop_oneof![Just(0u64), Just(300)],
        proptest::bool::weighted(0.1),
        proptest::bool::weighted(0.05),
    );
    let budget = (budget, proptest::bool::weighted(0.01)).prop_map(
        |((freeze_bytes_max, freeze_now, freeze_overdue), give_up)| MoveLimits {
            freeze_bytes_max,
            freeze_now,
            freeze_overdue,
            give_up,
        },
    );
    let fate =
        prop_oneof![8 => Just(Fate::Applied), 1 => Just(Fate::Lost), 1 => Just(Fate::Delayed)];
    (
        which,
        lag(),
        destination_lag,
        lag(),
        budget,
        prop_oneof![3 => Just(1usize), 1 => Just(60), 1 => Just(400)],
        fate,
    )
        .prop_map(
            |(which, source_lag, destination_lag, reading_lag, budget, bytes_max, fate)| Drive {
                which,
                source_lag,
                destination_lag,
                reading_lag,
                budget,
                bytes_max,
                fate,
            },
        )
}

/// A write with its key, or without: then it is done again.
fn sometimes_bare((write, bare): (Write, bool)) -> Write {
    let idempotency_key = write.idempotency_key.filter(|_| !bare);
    Write {
        idempotency_key,
        ..write
    }
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let pool = proptest::collection::vec(proptest::collection::vec(operation(), 1..4), 4..12);
    pool.prop_flat_map(|pool| {
        let slots = Just(TAGS.map(|tag| slot_of(tag.as_bytes())).to_vec()).prop_shuffle();
        let open = (slots, 1..=3usize, shard()).prop_map(|(mut slots, count, to)| {
            slots.truncate(count);
            Event::Open {
                slots,
                to: GroupId(to),
            }
        });
        let client = prop_oneof![3 => Just(None), 1 => shard().prop_map(Some)];
        let write = (write(pool), any::<bool>()).prop_map(sometimes_bare);
        let writes = (client, 0..2000u64, proptest::collection::vec(write, 1..3));
        let steps = prop_oneof![2 => Just(1usize), 1 => 2..8usize];
        let event = prop_oneof![
            8 => writes.prop_map(|(shard, elapsed_ms, writes)| {
                Event::Write { shard, elapsed_ms, writes }
            }),
            2 => open,
            16 => (steps, drive()).prop_map(|(steps, drive)| Event::Drive(steps, drive)),
            1 => (0..100usize).prop_map(Event::Deliver),
            3 => prop_oneof![2 => 0..8usize, 1 => 0..1000usize].prop_map(Event::Repeat),
            2 => (shard(), 0..5u32).prop_map(|(shard, limit)| Event::Clear { shard, limit }),
            1 => shard().prop_map(|shard| Event::Claim { shard }),
        ];
        proptest::collection::vec(event, 1..150)
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_slot_is_served_twice_and_nothing_acknowledged_is_lost(
        events in events(),
        early in any::<bool>(),
    ) {
        let mut cluster = Cluster::new();
        if early {
            (1..=3).for_each(|shard| cluster.claim(GroupId(shard)));
        }
        for event in events {
            cluster.run(event);
            cluster.check();
        }
        cluster.heal();
        // Whatever was ever sent may still come, and changes nothing of it.
        for (shard, command) in cluster.sent.clone().into_iter().chain(cluster.delayed.clone()) {
            cluster.apply(shard, command);
            cluster.check();
        }
        cluster.assert_whole();
        cluster.clean();
    }
}
