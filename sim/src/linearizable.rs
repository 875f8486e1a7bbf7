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
            if let Action::Put { condition, .. } | Action::Delete { condition } = operation.action {
                seen.named.extend(condition.named());
            }
            let read = match operation.outcome {
                Outcome::Got(got) => got.map(|(value, _)| value),
                Outcome::Read(read) => read,
                _ => None,
            };
            if let Some(value) = read {
                if !writes.contains(&value) {
                    return Err(Violation::NeverWritten(Box::new(*operation)));
                }
                let first = seen.first_read.entry(value).or_insert(operation.returned);
                *first = operation.returned.min(*first);
            }
            match (operation.action, operation.outcome) {
                (_, Outcome::Got(Some((value, revision)))) => seen.note(value, revision)?,
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
            (Action::Get, Outcome::Read(read)) => read == value,
            (Action::Get, Outcome::Found(found)) => found == value.is_some(),
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

    /// The revision of the value that the operation stored; none where it stored nothing, or nobody
    /// was told.
    fn revision_of(&self, id: usize) -> Option<u64> {
        let operation = &self.operations[id];
        match (operation.action, operation.outcome) {
            (
                Action::Put { value, .. },
                Outcome::Put { .. } | Outcome::Stored { .. } | Outcome::Unknown,
            ) => self.seen.revisions.get(&value).copied(),
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
                outcome @ (Outcome::Put { .. } | Outcome::Stored { .. } | Outcome::Unknown),
            ) => {
                let created = match outcome {
                    Outcome::Put { created, .. } => Some(created),
                    Outcome::Stored { created } => created,
                    _ => None,
                };
                let created_fits = created.is_none_or(|created| created == from.value.is_none());
                let revision = match self.revision_of(id) {
                    Some(revision) if revision <= from.revision => return None,
                    known => known.unwrap_or(from.revision),
                };
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
mod tests;
