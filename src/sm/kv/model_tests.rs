//! Random entries against a naive model, which remembers whole requests and keeps nothing in bytes.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::tests::Shard;
use super::*;
use crate::sm::ports::{Direction, KeyRange, Overlay, WriteBatch};
use crate::sm::requests::{REMEMBERED_MS, group_time_ms};
use crate::sm::slots::{Ownership, slot_of};
use crate::types::{Revision, Slot};
use bytes::Bytes;

/// Keys of three slots.
const KEYS: [&str; 7] = ["{a}", "{a}1", "{a}2", "{b}", "{b}1", "{c}", "{c}1"];
pub(in crate::sm) const TAGS: [&str; 3] = ["a", "b", "c"];

/// An event in the life of a shard.
#[derive(Debug, Clone)]
enum Event {
    Entry(KvCommand),
    /// The hold on a slot changes, as a move would change it.
    Hold(Slot, Ownership),
}

/// The answer that a slot of a request got; the model keeps the operations themselves.
#[derive(Debug, Clone)]
pub(in crate::sm) struct Answered {
    time_ms: u64,
    pub operations: Vec<Operation>,
    results: Vec<Result<OperationOutcome, Failed>>,
}

/// A failed condition, by the slot and the place in it of the operation.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Failed {
    slot: Slot,
    nth: usize,
    current: Option<Revision>,
}

#[derive(Debug, Clone, Default)]
pub(in crate::sm) struct Model {
    pub holds: BTreeMap<Slot, Ownership>,
    pub keys: BTreeMap<Bytes, Record>,
    pub revisions: BTreeMap<Slot, u64>,
    pub answered: BTreeMap<(Slot, Bytes), Answered>,
    time_ms: u64,
    /// The group time that the shard must at least have stored.
    time_ms_min: u64,
}

impl Model {
    fn hold(&self, slot: Slot) -> Ownership {
        self.holds.get(&slot).copied().unwrap_or_default()
    }

    fn revision(&self, key: &Bytes) -> Option<Revision> {
        self.keys.get(key).map(|record| record.revision)
    }

    fn do_operation(&mut self, operation: &Operation) -> OperationOutcome {
        let existing = self.keys.get(&operation.key).cloned();
        let counter = self.revisions.entry(slot_of(&operation.key)).or_default();
        match &operation.action {
            Action::Get => OperationOutcome::Got(existing),
            Action::Put { media, value } => {
                *counter += 1;
                let revision = Revision(*counter);
                self.keys.insert(
                    operation.key.clone(),
                    Record {
                        revision,
                        media: media.clone(),
                        value: value.clone(),
                    },
                );
                OperationOutcome::Put {
                    revision,
                    created: existing.is_none(),
                }
            }
            Action::Delete if existing.is_none() => OperationOutcome::Deleted { revision: None },
            Action::Delete => {
                *counter += 1;
                self.keys.remove(&operation.key);
                OperationOutcome::Deleted {
                    revision: Some(Revision(*counter)),
                }
            }
        }
    }

    pub fn write(&mut self, write: &Write) -> WriteOutcome {
        let slot = |operation: &Operation| slot_of(&operation.key);
        let operations = &write.operations;
        if let Some(operation) = operations
            .iter()
            .find(|operation| self.hold(slot(operation)) == Ownership::NotOwned)
        {
            return WriteOutcome::Rejected(WriteRejection::WrongOwner {
                slot: slot(operation),
                moved_to: None,
            });
        }
        let of_slot = |slot: Slot| {
            operations
                .iter()
                .filter(move |operation| slot_of(&operation.key) == slot)
                .cloned()
        };
        let slots: BTreeSet<Slot> = operations.iter().map(slot).collect();
        let mut results: BTreeMap<Slot, Vec<Result<OperationOutcome, Failed>>> = BTreeMap::new();
        if let Some(key) = &write.idempotency_key {
            for slot in &slots {
                let answered = self.answered.get(&(*slot, key.clone()));
                let Some(answered) =
                    answered.filter(|answered| self.time_ms - answered.time_ms < REMEMBERED_MS)
                else {
                    continue;
                };
                if answered.operations != of_slot(*slot).collect::<Vec<_>>() {
                    return WriteOutcome::Rejected(WriteRejection::KeyReused { slot: *slot });
                }
                results.insert(*slot, answered.results.clone());
            }
        }
        let fresh: Vec<Operation> = operations
            .iter()
            .filter(|operation| !results.contains_key(&slot(operation)))
            .cloned()
            .collect();
        if let Some(operation) = fresh
            .iter()
            .find(|operation| self.hold(slot(operation)) == Ownership::Frozen)
        {
            return WriteOutcome::Rejected(WriteRejection::Frozen {
                slot: slot(operation),
            });
        }
        let mut nths: BTreeMap<Slot, usize> = BTreeMap::new();
        let mut failed = None;
        for operation in &fresh {
            let nth = nths.entry(slot(operation)).or_default();
            let current = self.revision(&operation.key);
            if failed.is_none() && !holds(&operation.condition, current) {
                failed = Some(Failed {
                    slot: slot(operation),
                    nth: *nth,
                    current,
                });
            }
            *nth += 1;
        }
        let fresh_slots: BTreeSet<Slot> = fresh.iter().map(slot).collect();
        for operation in &fresh {
            let result = failed.map_or_else(|| Ok(self.do_operation(operation)), Err);
            results.entry(slot(operation)).or_default().push(result);
        }
        if let Some(key) = &write.idempotency_key {
            for slot in fresh_slots {
                let (results, operations) = (results[&slot].clone(), of_slot(slot).collect());
                self.answered.insert(
                    (slot, key.clone()),
                    Answered {
                        time_ms: self.time_ms,
                        operations,
                        results,
                    },
                );
                self.time_ms_min = self.time_ms;
            }
        }
        outcome(operations, results)
    }

    fn entry(&mut self, time_ms: u64, writes: &[Write]) -> KvOutcome {
        self.time_ms = self.time_ms.max(time_ms);
        KvOutcome::Written(writes.iter().map(|write| self.write(write)).collect())
    }
}

fn holds(condition: &Condition, current: Option<Revision>) -> bool {
    match (condition, current) {
        (Condition::None, _) | (Condition::Absent | Condition::RevisionNotIn(_), None) => true,
        (Condition::Present, current) => current.is_some(),
        (Condition::Absent, Some(_)) | (Condition::RevisionIn(_), None) => false,
        (Condition::RevisionIn(list), Some(revision)) => list.contains(&revision),
        (Condition::RevisionNotIn(list), Some(revision)) => !list.contains(&revision),
    }
}

fn outcome(
    operations: &[Operation],
    results: BTreeMap<Slot, Vec<Result<OperationOutcome, Failed>>>,
) -> WriteOutcome {
    let positions = |slot: Slot| -> Vec<usize> {
        (0..operations.len())
            .filter(|position| slot_of(&operations[*position].key) == slot)
            .collect()
    };
    let mut nths: BTreeMap<Slot, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for operation in operations {
        let slot = slot_of(&operation.key);
        let nth = nths.entry(slot).or_default();
        let result = results[&slot][*nth].clone().map_err(|failed| {
            let named = positions(failed.slot)
                .get(failed.nth)
                .copied()
                .unwrap_or(positions(slot)[0]);
            WriteRejection::ConditionFailed {
                operation: named,
                current: failed.current,
            }
        });
        all.push(result);
        *nth += 1;
    }
    if all.iter().all(Result::is_ok) {
        return WriteOutcome::Applied(all.into_iter().flatten().collect());
    }
    match &all[0] {
        Err(rejection) if all.iter().all(|result| *result == all[0]) => {
            WriteOutcome::Rejected(rejection.clone())
        }
        _ => WriteOutcome::Mixed(all),
    }
}

pub(in crate::sm) fn operation() -> impl Strategy<Value = Operation> {
    let revisions = || proptest::collection::vec((1..12u64).prop_map(Revision), 0..4);
    let condition = prop_oneof![
        6 => Just(Condition::None),
        1 => Just(Condition::Absent),
        1 => Just(Condition::Present),
        1 => revisions().prop_map(Condition::RevisionIn),
        1 => revisions().prop_map(Condition::RevisionNotIn),
    ];
    let media = prop_oneof![
        Just(Media::Text),
        Just(Media::Json),
        Just(Media::Other("m".into()))
    ];
    let put = (media, proptest::collection::vec(any::<u8>(), 0..5));
    let action = prop_oneof![
        1 => Just(Action::Get),
        3 => put.prop_map(|(media, value)| Action::Put { media, value: value.into() }),
        2 => Just(Action::Delete),
    ];
    (proptest::sample::select(&KEYS[..]), condition, action).prop_map(|(key, condition, action)| {
        Operation {
            key: Bytes::from_static(key.as_bytes()),
            condition,
            action,
        }
    })
}

/// Writes out of a small pool of requests, so that retries come; sometimes with an operation more
/// or less, as another batch would have.
pub(in crate::sm) fn write(pool: Vec<Vec<Operation>>) -> impl Strategy<Value = Write> {
    let count = pool.len();
    (
        0..count,
        proptest::option::weighted(0.7, 0..count),
        operation(),
        0..8usize,
    )
        .prop_map(move |(which, key, extra, cut)| {
            let mut operations = pool[key.unwrap_or(which)].clone();
            match cut {
                0 => operations.push(extra),
                1 => operations.truncate(1),
                2 => operations.retain(|operation| operation.key.starts_with(b"{a}")),
                _ => {}
            }
            let idempotency_key = key.map(|number| Bytes::from(format!("k{number}")));
            Write {
                operations,
                idempotency_key,
            }
        })
}

fn slot() -> impl Strategy<Value = Slot> {
    proptest::sample::select(&TAGS[..]).prop_map(|tag| slot_of(tag.as_bytes()))
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let pool = proptest::collection::vec(proptest::collection::vec(operation(), 1..5), 1..6);
    pool.prop_flat_map(|pool| {
        let steps = prop_oneof![
            6 => 0..2000u64,
            1 => Just(REMEMBERED_MS / 2),
            1 => Just(REMEMBERED_MS),
        ];
        let entry = (steps, proptest::collection::vec(write(pool), 1..4));
        let holds = prop_oneof![
            3 => Just(Ownership::Owned),
            1 => Just(Ownership::Frozen),
            1 => Just(Ownership::NotOwned),
        ];
        let write = |(time_ms, writes)| Event::Entry(KvCommand::Write { time_ms, writes });
        let event = prop_oneof![
            8 => entry.prop_map(write),
            1 => (slot(), holds).prop_map(|(slot, hold)| Event::Hold(slot, hold)),
        ];
        proptest::collection::vec(event, 1..40)
    })
    .prop_map(|mut events| {
        // The times drawn are steps; entries carry the sums.
        let mut now_ms = 0;
        for event in &mut events {
            if let Event::Entry(KvCommand::Write { time_ms, .. }) = event {
                now_ms += *time_ms;
                *time_ms = now_ms;
            }
        }
        events
    })
}

/// All pages of the shard, one after another.
fn scanned(shard: &Shard, direction: Direction, limit: usize) -> Vec<(Bytes, Record)> {
    let mut items: Vec<(Bytes, Record)> = Vec::new();
    loop {
        let range = match (direction, items.last()) {
            (_, None) => KeyRange::all(),
            (Direction::Forward, Some((last, _))) => KeyRange {
                start: [last, &b"\0"[..]].concat().into(),
                end: None,
            },
            (Direction::Reverse, Some((last, _))) => KeyRange {
                start: Bytes::new(),
                end: Some(last.clone()),
            },
        };
        let request = PageRequest {
            range,
            direction,
            limit,
            bytes_max: 20,
            keys_only: false,
        };
        let page = scan_page(&shard.map, &request).expect("readable");
        assert!(page.items.len() <= limit && (!page.items.is_empty() || !page.more));
        items.extend(page.items);
        if !page.more {
            return items;
        }
    }
}

fn check(shard: &Shard, model: &Model, limit: usize) {
    shard.assert_counted();
    let owned = |key: &Bytes| model.hold(slot_of(key)) != Ownership::NotOwned;
    let expected: Vec<(Bytes, Record)> = model
        .keys
        .iter()
        .filter(|(key, _)| owned(key))
        .map(|(key, record)| (key.clone(), record.clone()))
        .collect();
    assert_eq!(scanned(shard, Direction::Forward, limit), expected);
    let mut reversed = scanned(shard, Direction::Reverse, limit);
    reversed.reverse();
    assert_eq!(reversed, expected);
    let counts = count(&shard.map).expect("readable");
    assert_eq!(counts.keys, expected.len() as u64);
    let slots = model
        .holds
        .iter()
        .filter(|(_, hold)| **hold != Ownership::NotOwned)
        .map(|(slot, _)| *slot);
    assert_eq!(counts.slots, slots.collect::<Vec<_>>());
    for key in KEYS.map(|key| Bytes::from_static(key.as_bytes())) {
        let outcome = match owned(&key) {
            true => ReadOutcome::Owned(model.keys.get(&key).cloned()),
            false => ReadOutcome::NotOwned {
                slot: slot_of(&key),
                moved_to: None,
            },
        };
        assert_eq!(read(&shard.map, &key).expect("readable"), outcome);
    }
    let stored = group_time_ms(&shard.map).expect("readable");
    assert!(
        stored >= model.time_ms_min && stored <= model.time_ms && model.time_ms - stored < 1000
    );
}

fn run_event(shard: &mut Shard, model: &mut Model, event: &Event) {
    match event {
        Event::Hold(slot, hold) => {
            shard.set_state(*slot, |state| state.ownership = *hold);
            model.holds.insert(*slot, *hold);
        }
        Event::Entry(command) => {
            let KvCommand::Write { time_ms, writes } = command else {
                unreachable!("only writes are drawn")
            };
            assert_eq!(
                shard.apply(command.clone()),
                model.entry(*time_ms, writes),
                "{command:?}"
            );
        }
    }
}

fn claimed() -> (Shard, Model) {
    let (mut shard, mut model) = (Shard::default(), Model::default());
    let slots: Vec<Slot> = TAGS.iter().map(|tag| slot_of(tag.as_bytes())).collect();
    model
        .holds
        .extend(slots.iter().map(|slot| (*slot, Ownership::Owned)));
    assert_eq!(shard.apply(KvCommand::Claim { slots }), KvOutcome::Claimed);
    (shard, model)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_shard_does_what_the_model_does(events in events(), limit in 1..5usize) {
        let (mut shard, mut model) = claimed();
        for event in &events {
            run_event(&mut shard, &mut model, event);
        }
        check(&shard, &model, limit);
    }

    #[test]
    fn the_same_log_makes_the_same_map_however_it_is_batched(
        events in events(),
        together in 1..6usize,
    ) {
        let (mut alone, _) = claimed();
        let mut batched = alone.clone();
        let commands: Vec<KvCommand> = events
            .iter()
            .filter_map(|event| match event {
                Event::Entry(command) => Some(command.clone()),
                Event::Hold(..) => None,
            })
            .collect();
        for chunk in commands.chunks(together) {
            let mut batch = WriteBatch::default();
            for (index, command) in (7..).zip(chunk) {
                let map = Overlay { base: &batched.map, batch: &batch };
                let (outcome, later) = apply(&map, index, command.clone()).expect("applied");
                batch.merge(later);
                assert_eq!(outcome, alone.apply(command.clone()));
            }
            for (key, value) in batch {
                match value {
                    Some(value) => batched.map.insert(key, value),
                    None => batched.map.remove(&key),
                };
            }
            assert_eq!(batched.map, alone.map);
        }
    }
}
