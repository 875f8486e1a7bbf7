//! Is the history of a key linearizable? A register with put, get, delete and conditional writes.
//!
//! Just-in-time linearization (Lowe, "Testing for linearizability", 2017, after Wing & Gong): the
//! events are walked in time order with the set of all configurations that could explain them so
//! far. What keeps that set small:
//! - an operation that changes nothing and fits a configuration's state is linearized there at
//!   once: waiting gains nothing;
//! - revisions only grow, so writes whose revision was seen have one order, and a configuration
//!   that has passed one of them by is dead;
//! - an unknown write whose value somebody read did happen, before that read returned: it is
//!   treated like an answered one;
//! - the other unknown writes may take effect at any time after their call, or never, and nobody
//!   can tell those of one kind apart: they are counted, not named, and of two configurations that
//!   are else the same the one that spent fewer can explain all that the other can.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::time::Duration;

use crate::history::{Action, Condition, Operation, Outcome, Value};

/// Past this many configurations after one event, the checker gives up rather than run for hours.
const CONFIGURATIONS_MAX: usize = 200_000;

/// How many operations before the impossible one are shown.
const CONTEXT: usize = 25;

/// What a key holds after an unknown write whose value nobody ever read.
const UNSEEN: Value = Value(u64::MAX);

/// Why no order of the operations explains the answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// A value was read that no write of the history stored.
    NeverWritten(Box<Operation>),
    /// One value was seen at two revisions.
    TwoRevisions { value: Value, revisions: (u64, u64) },
    /// Whatever came before, this answer can't be. `values`: what the key could have held just
    /// before it returned.
    Impossible {
        operation: Box<Operation>,
        values: Vec<Option<Value>>,
        before: Vec<Operation>,
    },
    /// Too many possibilities: neither proven nor refuted.
    Undecided(Box<Operation>),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::NeverWritten(operation) => {
                write!(f, "a value that nobody wrote: {operation:?}")
            }
            Violation::TwoRevisions { value, revisions } => {
                write!(f, "{value:?} was seen at two revisions: {revisions:?}")
            }
            Violation::Undecided(operation) => {
                write!(f, "undecided: too many possibilities at {operation:?}")
            }
            Violation::Impossible {
                operation,
                values,
                before,
            } => {
                writeln!(f, "no order explains {operation:?}")?;
                writeln!(f, "  the key could have held {values:?}; before it came:")?;
                before
                    .iter()
                    .try_for_each(|operation| writeln!(f, "  {operation:?}"))
            }
        }
    }
}

/// Whether the operations of one key, which was absent at first, can be put into one order that
/// explains every answer and keeps real time.
pub fn check(operations: &[Operation]) -> Result<(), Violation> {
    let seen = Seen::collect(operations)?;
    let events = events(operations, &seen);
    let start = Configuration {
        value: None,
        revision: 0,
        done: Vec::new(),
        spent: BTreeMap::new(),
    };
    let mut search = Search {
        operations,
        seen,
        pending: Vec::new(),
        unseen: BTreeMap::new(),
        configurations: vec![start],
    };
    for event in events {
        match event {
            Event::Call(id) => search.pending.push(id),
            Event::CallUnseen(kind) => *search.unseen.entry(kind).or_default() += 1,
            Event::Return(id) => search.returned(id)?,
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Call(usize),
    /// An unknown write is under way whose value nobody ever read.
    CallUnseen(Unseen),
    Return(usize),
}

/// The kinds of unknown writes that can't be told apart by their effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Unseen {
    /// `named`: the value, where the condition of another operation asks for it.
    Put {
        condition: Condition,
        named: Option<Value>,
    },
    Delete {
        condition: Condition,
    },
}

/// Calls and returns in time order; at one instant calls come first, which assumes the least.
/// Unknown reads say nothing.
fn events(operations: &[Operation], seen: &Seen) -> Vec<Event> {
    let mut events = Vec::with_capacity(operations.len() * 2);
    for (id, operation) in operations.iter().enumerate() {
        let returned = match (operation.action, operation.outcome) {
            (Action::Get, Outcome::Unknown) => continue,
            (Action::Put { value, condition }, Outcome::Unknown) => {
                match seen.first_read.get(&value) {
                    Some(first_read) => *first_read,
                    None => {
                        let named = seen.named.contains(&value).then_some(value);
                        events.push((
                            operation.called,
                            0,
                            id,
                            Event::CallUnseen(Unseen::Put { condition, named }),
                        ));
                        continue;
                    }
                }
            }
            (Action::Delete { condition }, Outcome::Unknown) => {
                events.push((
                    operation.called,
                    0,
                    id,
                    Event::CallUnseen(Unseen::Delete { condition }),
                ));
                continue;
            }
            _ => operation.returned,
        };
        events.push((operation.called, 0, id, Event::Call(id)));
        // A value that was read before its write was called: the return of that read comes first,
        // and finds nothing to explain it.
        events.push((returned.max(operation.called), 1, id, Event::Return(id)));
    }
    events.sort_unstable_by_key(|(at, kind, id, _)| (*at, *kind, *id));
    events.into_iter().map(|(_, _, _, event)| event).collect()
}

/// What the answers tell of each value.
struct Seen {
    /// Its revision.
    revisions: HashMap<Value, u64>,
    /// When the first read of it returned.
    first_read: HashMap<Value, Duration>,
    /// The values that a condition asks for.
    named: HashSet<Value>,
}

impl Seen {
    /// Refuses values out of nowhere and values with two revisions.
    fn collect(operations: &[Operation]) -> Result<Self, Violation> {
        let written = |operation: &Operation| match operation.action {
            Action::Put { value, .. } => Some(value),
            Action::Get | Action::Delete { .. } => None,
        };
        let writes: HashSet<Value> = operations.iter().filter_map(written).collect();
        let mut seen = Seen {
            revisions: HashMap::new(),
            first_read: HashMap::new(),
            named: HashSet::new(),
        };
        for operation in operations {
            if let Action::Put {
                condition: Condition::Holds(value),
                ..
            }
            | Action::Delete {
                condition: Condition::Holds(value),
            } = operation.action
            {
                seen.named.insert(value);
            }
            match (operation.action, operation.outcome) {
                (_, Outcome::Got(Some((value, revision)))) => {
                    if !writes.contains(&value) {
                        return Err(Violation::NeverWritten(Box::new(*operation)));
                    }
                    let first = seen.first_read.entry(value).or_insert(operation.returned);
                    *first = operation.returned.min(*first);
                    seen.note(value, revision)?;
                }
                (Action::Put { value, .. }, Outcome::Put { revision, .. }) => {
                    seen.note(value, revision)?
                }
                _ => {}
            }
        }
        Ok(seen)
    }

    fn note(&mut self, value: Value, revision: u64) -> Result<(), Violation> {
        match self.revisions.insert(value, revision) {
            Some(earlier) if earlier != revision => Err(Violation::TwoRevisions {
                value,
                revisions: (earlier, revision),
            }),
            _ => Ok(()),
        }
    }
}

/// One way in which the past may have gone.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Configuration {
    value: Option<Value>,
    /// The highest revision that was seen of a write done so far.
    revision: u64,
    /// Pending operations that have taken effect already, sorted.
    done: Vec<usize>,
    /// How many unseen writes of each kind have taken effect.
    spent: BTreeMap<Unseen, usize>,
}

impl Configuration {
    /// Everything that `other` can still explain, this can too. Both have the same value and the
    /// same pending operations done.
    fn dominates(&self, other: &Configuration) -> bool {
        let fewer = |(kind, count): (&Unseen, &usize)| {
            other.spent.get(kind).is_some_and(|others| count <= others)
        };
        self.revision <= other.revision && self.spent.iter().all(fewer)
    }
}

/// Configurations of which none dominates another.
#[derive(Default)]
struct Front {
    by_state: HashMap<(Option<Value>, Vec<usize>), Vec<Configuration>>,
    len: usize,
}

impl Front {
    /// Whether it was kept, that is: not dominated by one that is there.
    fn insert(&mut self, configuration: Configuration) -> bool {
        let peers = self
            .by_state
            .entry((configuration.value, configuration.done.clone()))
            .or_default();
        if peers.iter().any(|peer| peer.dominates(&configuration)) {
            return false;
        }
        let before = peers.len();
        peers.retain(|peer| !configuration.dominates(peer));
        self.len = self.len + peers.len() + 1 - before;
        peers.push(configuration);
        true
    }

    fn into_vec(self) -> Vec<Configuration> {
        self.by_state.into_values().flatten().collect()
    }
}

struct Search<'a> {
    operations: &'a [Operation],
    seen: Seen,
    /// Called, and to return.
    pending: Vec<usize>,
    /// How many unseen writes of each kind were called.
    unseen: BTreeMap<Unseen, usize>,
    configurations: Vec<Configuration>,
}

impl Search<'_> {
    /// Keeps the configurations in which `id` has taken effect by now, in every order of what may
    /// have taken effect before it.
    fn returned(&mut self, id: usize) -> Result<(), Violation> {
        let mut visited = Front::default();
        let mut kept = Front::default();
        let mut open = VecDeque::new();
        for configuration in std::mem::take(&mut self.configurations) {
            self.visit(configuration, &mut visited, &mut open);
        }
        while let Some(mut configuration) = open.pop_front() {
            if let Ok(position) = configuration.done.binary_search(&id) {
                configuration.done.remove(position);
                kept.insert(configuration);
                continue;
            }
            for next in self.successors(&configuration) {
                self.visit(next, &mut visited, &mut open);
            }
            if visited.len > CONFIGURATIONS_MAX {
                return Err(Violation::Undecided(Box::new(self.operations[id])));
            }
        }
        self.pending.retain(|pending| *pending != id);
        self.configurations = kept.into_vec();
        if self.configurations.is_empty() {
            Err(self.impossible(id, visited))
        } else {
            Ok(())
        }
    }

    /// Takes the pending operations that change nothing into `configuration`, and remembers it
    /// unless it is dead or was known.
    fn visit(
        &self,
        mut configuration: Configuration,
        visited: &mut Front,
        open: &mut VecDeque<Configuration>,
    ) {
        for id in &self.pending {
            if let Err(position) = configuration.done.binary_search(id) {
                if self.fits_unchanged(*id, configuration.value) {
                    configuration.done.insert(position, *id);
                } else if self
                    .revision_of(*id)
                    .is_some_and(|revision| revision <= configuration.revision)
                {
                    return;
                }
            }
        }
        if visited.insert(configuration.clone()) {
            open.push_back(configuration);
        }
    }

    /// `from` after one more write.
    fn successors(&self, from: &Configuration) -> Vec<Configuration> {
        let mut successors = Vec::new();
        for id in &self.pending {
            if let Err(position) = from.done.binary_search(id)
                && let Some((value, revision)) = self.effect(*id, from)
            {
                let mut next = Configuration {
                    value,
                    revision,
                    ..from.clone()
                };
                next.done.insert(position, *id);
                successors.push(next);
            }
        }
        for (kind, called) in &self.unseen {
            let value = match *kind {
                Unseen::Put { condition, .. } | Unseen::Delete { condition }
                    if !condition.holds(from.value) =>
                {
                    continue;
                }
                Unseen::Put { named, .. } => named.or(Some(UNSEEN)),
                Unseen::Delete { .. } => None,
            };
            let spent = from.spent.get(kind).copied().unwrap_or(0);
            if spent < *called && value != from.value {
                let mut next = Configuration {
                    value,
                    ..from.clone()
                };
                next.spent.insert(*kind, spent + 1);
                successors.push(next);
            }
        }
        successors
    }

    /// Whether the operation changes nothing, and its answer is right for `value`.
    fn fits_unchanged(&self, id: usize, value: Option<Value>) -> bool {
        let operation = &self.operations[id];
        match (operation.action, operation.outcome) {
            (Action::Get, Outcome::Got(got)) => got.map(|(got, _)| got) == value,
            (
                Action::Put { condition, .. } | Action::Delete { condition },
                Outcome::ConditionFailed,
            ) => !condition.holds(value),
            // A deletion under a condition may be told of an absent key that it is absent, or that
            // the condition failed.
            (Action::Delete { .. }, Outcome::Deleted { existed: false }) => value.is_none(),
            _ => false,
        }
    }

    /// The revision of the value that the operation stored; none where it stored nothing.
    fn revision_of(&self, id: usize) -> Option<u64> {
        let operation = &self.operations[id];
        match (operation.action, operation.outcome) {
            (Action::Put { value, .. }, Outcome::Put { .. } | Outcome::Unknown) => {
                self.seen.revisions.get(&value).copied()
            }
            _ => None,
        }
    }

    /// The value and the highest known revision after the pending write has taken effect; none
    /// where it can't have.
    fn effect(&self, id: usize, from: &Configuration) -> Option<(Option<Value>, u64)> {
        let operation = &self.operations[id];
        match (operation.action, operation.outcome) {
            (
                Action::Put { value, condition },
                outcome @ (Outcome::Put { .. } | Outcome::Unknown),
            ) => {
                let created_fits = match outcome {
                    Outcome::Put { created, .. } => created == from.value.is_none(),
                    _ => true,
                };
                let revision = self
                    .revision_of(id)
                    .filter(|revision| *revision > from.revision)?;
                (condition.holds(from.value) && created_fits).then_some((Some(value), revision))
            }
            (Action::Delete { condition }, Outcome::Deleted { existed: true }) => {
                (condition.holds(from.value) && from.value.is_some())
                    .then_some((None, from.revision))
            }
            _ => None,
        }
    }

    fn impossible(&self, id: usize, visited: Front) -> Violation {
        let operation = self.operations[id];
        let mut values: Vec<Option<Value>> = visited
            .by_state
            .into_keys()
            .map(|(value, _)| value)
            .collect();
        values.sort_unstable();
        values.dedup();
        let mut before: Vec<Operation> = self
            .operations
            .iter()
            .filter(|other| other.called <= operation.returned)
            .copied()
            .collect();
        before.sort_by_key(|other| other.called);
        let before = before.split_off(before.len().saturating_sub(CONTEXT));
        Violation::Impossible {
            operation: Box::new(operation),
            values,
            before,
        }
    }
}

#[cfg(test)]
mod tests {
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
            let condition = match random.random_range(0..4) {
                0 => Condition::Absent,
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
                history[id].outcome = outcome;
            }
        }
        history
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
            && matches!(history[id].outcome, Outcome::Put { .. })
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
                            Outcome::Put { created, .. } if created != value.is_none()
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
}
