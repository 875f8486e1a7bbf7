use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::*;
use crate::campaign::seed;
use crate::history::Condition;

const FOREVER: u64 = u64::MAX;
const LOST: Duration = Duration::from_millis(FOREVER);

fn operation(called: u64, returned: u64, action: Action, outcome: Outcome) -> Operation {
    let (called, returned) = (
        Duration::from_millis(called),
        Duration::from_millis(returned),
    );
    Operation {
        client: 0,
        called,
        returned,
        action,
        outcome,
    }
}

fn put(called: u64, returned: u64, value: u64, created: bool, revision: u64) -> Operation {
    let action = Action::Put {
        value: Value(value),
        condition: Condition::None,
    };
    operation(called, returned, action, Outcome::Put { created, revision })
}

fn put_if(
    called: u64,
    returned: u64,
    value: u64,
    condition: Condition,
    outcome: Outcome,
) -> Operation {
    operation(
        called,
        returned,
        Action::Put {
            value: Value(value),
            condition,
        },
        outcome,
    )
}

fn lost_put(called: u64, value: u64) -> Operation {
    put_if(called, FOREVER, value, Condition::None, Outcome::Unknown)
}

fn get(called: u64, returned: u64, got: Option<(u64, u64)>) -> Operation {
    operation(
        called,
        returned,
        Action::Get,
        Outcome::Got(got.map(|(value, revision)| (Value(value), revision))),
    )
}

fn delete(called: u64, returned: u64, existed: bool) -> Operation {
    operation(
        called,
        returned,
        Action::Delete {
            condition: Condition::None,
        },
        Outcome::Deleted { existed },
    )
}

fn lost_delete(called: u64) -> Operation {
    operation(
        called,
        FOREVER,
        Action::Delete {
            condition: Condition::None,
        },
        Outcome::Unknown,
    )
}

const FAILED: Outcome = Outcome::ConditionFailed;

#[track_caller]
fn accepts(history: &[Operation]) {
    if let Err(violation) = check(history) {
        panic!("refused a good history: {violation}");
    }
}

#[track_caller]
fn refuses(history: &[Operation]) {
    assert!(
        check(history).is_err(),
        "accepted a bad history: {history:#?}"
    );
}

#[test]
fn sequences_that_a_register_gives_are_accepted() {
    accepts(&[]);
    accepts(&[
        get(0, 1, None),
        put(2, 3, 1, true, 1),
        get(4, 5, Some((1, 1))),
        delete(6, 7, true),
        get(8, 9, None),
    ]);
    accepts(&[
        delete(0, 1, false),
        put(2, 3, 1, true, 5),
        put(4, 5, 2, false, 9),
        get(6, 7, Some((2, 9))),
    ]);
    let created = Outcome::Put {
        created: true,
        revision: 1,
    };
    let replaced = Outcome::Put {
        created: false,
        revision: 2,
    };
    accepts(&[
        put_if(0, 1, 1, Condition::Absent, created),
        put_if(2, 3, 2, Condition::Absent, FAILED),
        put_if(4, 5, 3, Condition::Holds(Value(1)), replaced),
        put_if(6, 7, 4, Condition::Holds(Value(1)), FAILED),
        get(8, 9, Some((3, 2))),
    ]);
}

#[test]
fn concurrent_operations_may_take_effect_in_either_order() {
    accepts(&[
        put(0, 10, 1, true, 1),
        get(1, 2, None),
        get(3, 4, Some((1, 1))),
    ]);
    accepts(&[
        put(0, 10, 1, true, 1),
        put(0, 10, 2, false, 2),
        get(11, 12, Some((2, 2))),
    ]);
    accepts(&[
        put(0, 10, 1, false, 2),
        put(0, 10, 2, true, 1),
        get(11, 12, Some((1, 2))),
    ]);
}

#[test]
fn a_stale_read_is_refused() {
    refuses(&[
        put(0, 1, 1, true, 1),
        put(2, 3, 2, false, 2),
        get(4, 5, Some((1, 1))),
    ]);
    refuses(&[put(0, 1, 1, true, 1), get(2, 3, None)]);
    // Two reads, one after the other, that see a concurrent write and then don't.
    refuses(&[
        put(0, 100, 1, true, 1),
        get(1, 2, Some((1, 1))),
        get(3, 4, None),
    ]);
}

#[test]
fn a_lost_update_is_refused() {
    refuses(&[put(0, 1, 1, true, 1), get(2, 3, None), get(4, 5, None)]);
    let replaced = |revision| Outcome::Put {
        created: false,
        revision,
    };
    // Two conditional writes on the same value can't both succeed.
    refuses(&[
        put(0, 1, 1, true, 1),
        put_if(2, 10, 2, Condition::Holds(Value(1)), replaced(2)),
        put_if(2, 10, 3, Condition::Holds(Value(1)), replaced(3)),
    ]);
    let created = |revision| Outcome::Put {
        created: true,
        revision,
    };
    refuses(&[
        put_if(0, 10, 1, Condition::Absent, created(1)),
        put_if(0, 10, 2, Condition::Absent, created(2)),
    ]);
}

#[test]
fn a_resurrected_value_is_refused() {
    refuses(&[
        put(0, 1, 1, true, 1),
        delete(2, 3, true),
        get(4, 5, Some((1, 1))),
    ]);
    refuses(&[
        put(0, 1, 1, true, 1),
        delete(2, 3, true),
        delete(4, 5, true),
    ]);
    refuses(&[
        lost_put(0, 1),
        put(2, 3, 2, true, 2),
        get(4, 5, Some((1, 1))),
    ]);
}

#[test]
fn a_read_from_the_future_is_refused() {
    refuses(&[get(0, 1, Some((1, 1))), put(2, 3, 1, true, 1)]);
    refuses(&[get(0, 1, Some((1, 1))), lost_put(2, 1)]);
    refuses(&[get(0, 1, Some((7, 1)))]);
}

#[test]
fn an_unknown_write_may_show_up_late_or_never() {
    accepts(&[
        lost_put(0, 1),
        get(1000, 1001, None),
        get(2000, 2001, Some((1, 4))),
    ]);
    accepts(&[
        lost_put(0, 1),
        get(1000, 1001, None),
        put(1002, 1003, 2, true, 1),
    ]);
    accepts(&[
        put(0, 1, 1, true, 1),
        lost_delete(2),
        get(3, 4, Some((1, 1))),
        get(5, 6, None),
    ]);
    accepts(&[
        put(0, 1, 1, true, 1),
        lost_delete(2),
        get(3, 4, Some((1, 1))),
    ]);
    let never = operation(0, FOREVER, Action::Get, Outcome::Unknown);
    accepts(&[never, put(1, 2, 1, true, 1)]);
}

#[test]
fn an_unknown_write_happens_at_most_once() {
    refuses(&[
        lost_put(0, 1),
        get(1, 2, Some((1, 1))),
        put(3, 4, 2, false, 2),
        get(5, 6, Some((1, 1))),
    ]);
    refuses(&[
        put(0, 1, 1, true, 1),
        lost_delete(2),
        get(3, 4, None),
        put(5, 6, 2, true, 2),
        get(7, 8, None),
    ]);
}

#[test]
fn an_unknown_conditional_write_needs_its_condition() {
    let cas = |value, expected| {
        put_if(
            2,
            FOREVER,
            value,
            Condition::Holds(Value(expected)),
            Outcome::Unknown,
        )
    };
    accepts(&[
        put(0, 1, 1, true, 1),
        cas(2, 1),
        get(3, 4, Some((1, 1))),
        get(5, 6, Some((2, 2))),
    ]);
    accepts(&[
        put(0, 1, 1, true, 1),
        cas(2, 1),
        cas(3, 2),
        get(5, 6, Some((3, 3))),
    ]);
    refuses(&[put(0, 1, 1, true, 1), cas(3, 2), get(5, 6, Some((3, 3)))]);
    refuses(&[
        put(0, 1, 1, true, 1),
        cas(2, 1),
        put(3, 4, 3, false, 2),
        get(5, 6, Some((2, 3))),
    ]);
}

#[test]
fn answers_that_tell_the_wrong_past_are_refused() {
    refuses(&[put(0, 1, 1, false, 1)]);
    refuses(&[put(0, 1, 1, true, 1), put(2, 3, 2, true, 2)]);
    refuses(&[delete(0, 1, true)]);
    refuses(&[
        put(0, 1, 1, true, 1),
        put_if(2, 3, 2, Condition::Holds(Value(1)), FAILED),
    ]);
    refuses(&[put_if(0, 1, 1, Condition::Absent, FAILED)]);
}

#[test]
fn revisions_must_grow_and_stay() {
    refuses(&[put(0, 1, 1, true, 2), put(2, 3, 2, false, 2)]);
    refuses(&[
        put(0, 1, 1, true, 2),
        delete(2, 3, true),
        put(4, 5, 2, true, 1),
    ]);
    refuses(&[put(0, 1, 1, true, 1), get(2, 3, Some((1, 2)))]);
}

/// Fifty clients in flight and hundreds of unknown writes must not blow up.
#[test]
fn many_unknown_writes_are_decided_quickly() {
    let mut history: Vec<Operation> = (0..300).map(|i| lost_put(i, 10_000 + i)).collect();
    let writes = (0..50).map(|i| {
        put_if(
            400,
            500,
            20_000 + i,
            Condition::None,
            Outcome::Put {
                created: false,
                revision: 1 + i,
            },
        )
    });
    history.extend(writes);
    history.extend((0..50).map(|i| get(600 + i, 700 + i, Some((10_000 + i, 100 + i)))));
    accepts(&history);
    history.push(get(800, 801, Some((20_000, 1))));
    refuses(&history);
}

/// Draws histories of a correct register, where some answers are lost and some of those writes
/// happen late or never.
fn draw(random: &mut StdRng, operations: usize, clients: u64) -> Vec<Operation> {
    let mut history: Vec<Operation> = Vec::new();
    let mut effects: Vec<(u64, usize)> = Vec::new();
    let mut clocks = vec![0_u64; clients as usize];
    for id in 0..operations {
        let client = random.random_range(0..clients as usize);
        let called = clocks[client] + random.random_range(1..10);
        let effect = called + random.random_range(0..10);
        let returned = effect + random.random_range(0..10);
        clocks[client] = returned + 1;
        let condition = match random.random_range(0..5) {
            0 => *[Condition::Absent, Condition::Present]
                .choose(random)
                .expect("two"),
            1 if operations < 10 => {
                Condition::Holds(Value(random.random_range(0..operations as u64)))
            }
            // Nobody can ask for the revision of a write without having seen it.
            1 => match history.get(random.random_range(id.saturating_sub(20)..=id)) {
                Some(Operation {
                    action: Action::Put { value, .. },
                    returned,
                    ..
                }) if *returned < LOST => Condition::Holds(*value),
                _ => Condition::None,
            },
            _ => Condition::None,
        };
        let action = match random.random_range(0..10) {
            0..5 => Action::Get,
            5..9 => Action::Put {
                value: Value(id as u64),
                condition,
            },
            _ => Action::Delete { condition },
        };
        let unknown = random.random_range(0..8) == 0;
        let late = if unknown {
            random.random_range(0..40)
        } else {
            0
        };
        if !(unknown && random.random_range(0..3) == 0) {
            effects.push((effect + late, id));
        }
        history.push(Operation {
            client,
            ..operation(called, returned, action, Outcome::Unknown)
        });
        if unknown {
            history[id].returned = LOST;
        }
    }
    effects.sort_unstable();
    let (mut value, mut revision) = (None, 0);
    let mut revisions = HashMap::new();
    for (_, id) in effects {
        let outcome = match history[id].action {
            Action::Get => Outcome::Got(value.map(|value| (value, revisions[&value]))),
            Action::Put { condition, .. } | Action::Delete { condition }
                if !condition.holds(value) =>
            {
                FAILED
            }
            Action::Put { value: new, .. } => {
                revision += 1;
                revisions.insert(new, revision);
                let created = value.replace(new).is_none();
                Outcome::Put { created, revision }
            }
            Action::Delete { .. } => Outcome::Deleted {
                existed: value.take().is_some(),
            },
        };
        if history[id].returned != LOST {
            // Of many writes under way, without their revisions, each order would have to be tried.
            let is_put = matches!(outcome, Outcome::Put { .. });
            history[id].outcome = match is_put && operations >= 10 {
                true => outcome,
                false => blurred(random, outcome),
            };
        }
    }
    history
}

/// Leaves some of an answer out, sometimes.
fn blurred(random: &mut StdRng, outcome: Outcome) -> Outcome {
    match (outcome, random.random_range(0..6)) {
        (Outcome::Got(got), 0) => Outcome::Read(got.map(|(value, _)| value)),
        (Outcome::Got(got), 1) => Outcome::Found(got.is_some()),
        (Outcome::Put { created, .. }, 0) => Outcome::Stored {
            created: Some(created),
        },
        (Outcome::Put { .. }, 1) => Outcome::Stored { created: None },
        _ => outcome,
    }
}

/// Changes one answer of the history.
fn mutate(random: &mut StdRng, history: &mut [Operation]) {
    let values: Vec<Value> = history
        .iter()
        .filter_map(|o| {
            if let Action::Put { value, .. } = o.action {
                Some(value)
            } else {
                None
            }
        })
        .collect();
    let Some(id) = (0..history.len())
        .filter(|id| history[*id].outcome != Outcome::Unknown)
        .collect::<Vec<_>>()
        .choose(random)
        .copied()
    else {
        return;
    };
    let outcome = &mut history[id].outcome;
    *outcome = match *outcome {
        Outcome::Got(_) => Outcome::Got(
            values
                .choose(random)
                .map(|value| (*value, random.random_range(1..5))),
        ),
        Outcome::Read(_) => Outcome::Read(values.choose(random).copied()),
        Outcome::Found(found) => Outcome::Found(!found),
        Outcome::Stored { created } => Outcome::Stored {
            created: Some(!created.unwrap_or_default()),
        },
        Outcome::Put { created, revision } if random.random() => Outcome::Put {
            created: !created,
            revision,
        },
        Outcome::Put { created, .. } => Outcome::Put {
            created,
            revision: random.random_range(1..5),
        },
        Outcome::Deleted { existed } => Outcome::Deleted { existed: !existed },
        Outcome::ConditionFailed | Outcome::Unknown => Outcome::Put {
            created: random.random(),
            revision: random.random_range(1..5),
        },
    };
    if matches!(history[id].action, Action::Delete { .. })
        && matches!(
            history[id].outcome,
            Outcome::Put { .. } | Outcome::Stored { .. }
        )
    {
        history[id].outcome = Outcome::Deleted { existed: true };
    }
}

/// The definition, without any cleverness: tries every order of every subset of the unknown
/// writes.
fn check_by_force(history: &[Operation]) -> bool {
    fn go(
        history: &[Operation],
        left: &mut Vec<usize>,
        value: Option<Value>,
        revision: u64,
    ) -> bool {
        if left
            .iter()
            .all(|id| history[*id].outcome == Outcome::Unknown)
        {
            return true;
        }
        let answered = left
            .iter()
            .filter(|id| history[**id].outcome != Outcome::Unknown);
        let deadline = answered
            .map(|id| history[*id].returned)
            .min()
            .expect("one has an answer");
        for position in 0..left.len() {
            let id = left[position];
            if history[id].called > deadline {
                continue;
            }
            let known = |value: Value| {
                history.iter().find_map(|o| match (o.action, o.outcome) {
                    (Action::Put { value: put, .. }, Outcome::Put { revision, .. })
                        if put == value =>
                    {
                        Some(revision)
                    }
                    (_, Outcome::Got(Some((got, revision)))) if got == value => Some(revision),
                    _ => None,
                })
            };
            let next = match (history[id].action, history[id].outcome) {
                (Action::Get, Outcome::Got(got)) => {
                    (got.map(|(got, _)| got) == value).then_some((value, revision))
                }
                (Action::Get, Outcome::Read(read)) => (read == value).then_some((value, revision)),
                (Action::Get, Outcome::Found(found)) => {
                    (found == value.is_some()).then_some((value, revision))
                }
                (Action::Get, _) => Some((value, revision)),
                (
                    Action::Put { condition, .. } | Action::Delete { condition },
                    Outcome::ConditionFailed,
                ) => (!condition.holds(value)).then_some((value, revision)),
                (Action::Delete { .. }, Outcome::Deleted { existed: false }) => {
                    value.is_none().then_some((None, revision))
                }
                (Action::Put { condition, .. } | Action::Delete { condition }, _)
                    if !condition.holds(value) =>
                {
                    None
                }
                (Action::Put { value: new, .. }, outcome) => {
                    let created = !matches!(
                        outcome,
                        Outcome::Put { created, .. } | Outcome::Stored { created: Some(created) }
                            if created != value.is_none()
                    );
                    let new_revision = known(new).unwrap_or(revision);
                    let grows = known(new).is_none_or(|new| new > revision);
                    (created && grows).then_some((Some(new), new_revision))
                }
                (Action::Delete { .. }, outcome) => {
                    let existed = !matches!(
                        outcome,
                        Outcome::Deleted { existed } if existed != value.is_some()
                    );
                    existed.then_some((None, revision))
                }
            };
            if let Some((value, revision)) = next {
                left.remove(position);
                let found = go(history, left, value, revision);
                left.insert(position, id);
                if found {
                    return true;
                }
            }
        }
        false
    }
    Seen::collect(history).is_ok() && go(history, &mut (0..history.len()).collect(), None, 0)
}

#[test]
fn it_agrees_with_the_definition_on_small_histories() {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let (mut good, mut bad) = (0, 0);
    for round in 0..6000 {
        let operations = random.random_range(1..8);
        let mut history = draw(&mut random, operations, 3);
        for _ in 0..random.random_range(0..3) {
            mutate(&mut random, &mut history);
        }
        let expected = check_by_force(&history);
        assert_eq!(
            check(&history).is_ok(),
            expected,
            "seed {seed}, round {round}: {history:#?}"
        );
        if expected { good += 1 } else { bad += 1 }
    }
    assert!(
        good > 1000 && bad > 1000,
        "seed {seed}: {good} good and {bad} bad histories prove little"
    );
}

#[test]
fn long_histories_of_a_correct_register_are_accepted() {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    for clients in [1, 8, 30] {
        let history = draw(&mut random, 4000, clients);
        if let Err(violation) = check(&history) {
            panic!("seed {seed}, {clients} clients: refused a good history: {violation}");
        }
    }
}

/// A checker that accepts everything would pass all else: one read of an older value in a long
/// history must be found.
#[test]
fn one_stale_read_in_a_long_history_is_found() {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let mut found = 0;
    for _ in 0..20 {
        let mut history = draw(&mut random, 1000, 4);
        let reads: Vec<usize> = (500..1000)
            .filter(|id| matches!(history[*id].outcome, Outcome::Got(Some(_))))
            .collect();
        let old = history[..100]
            .iter()
            .find_map(|o| match (o.action, o.outcome) {
                (Action::Put { value, .. }, Outcome::Put { revision, .. }) => {
                    Some((value, revision))
                }
                _ => None,
            });
        if let (Some(id), Some(old)) = (reads.choose(&mut random), old) {
            history[*id].outcome = Outcome::Got(Some(old));
            assert!(
                check(&history).is_err(),
                "seed {seed}: a stale read was accepted"
            );
            found += 1;
        }
    }
    assert!(
        found > 10,
        "seed {seed}: only {found} histories had a read to spoil"
    );
}
