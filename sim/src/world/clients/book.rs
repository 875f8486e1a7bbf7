//! [`Book`]: what was asked of each key, and answered, by whatever way.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use quorate::sm::slots::slot_of;
use quorate::types::Slot;
use quorate_sim::history::{Action, Operation, Outcome, Value};
use quorate_sim::linearizable;
use quorate_sim::revisions::{Change, SlotHistory, Snapshot};

use super::reads::Page;

/// Holds what was asked of each key, and answered.
#[derive(Debug, Default)]
pub struct Book {
    keys: Vec<String>,
    histories: Vec<Vec<Operation>>,
    slots: BTreeMap<Slot, SlotHistory>,
    /// Places of the operations of each batch of one slot, in the histories of their keys.
    batches: Vec<Vec<(usize, usize)>>,
    counts: Vec<KeyCount>,
    /// The last that was read of each key, for conditions.
    known: BTreeMap<usize, (Value, u64)>,
    /// Answers that may not be.
    absurd: Vec<String>,
    next_value: u64,
    pub answered: u64,
    pub unanswered: u64,
    pub refused: u64,
    pub is_over: bool,
    pub working: usize,
}

/// Holds how many keys there were, as a client was told.
#[derive(Debug, Clone, Copy)]
struct KeyCount {
    called: Duration,
    returned: Duration,
    keys: u64,
}

/// Holds when something was asked, and answered.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub client: usize,
    pub called: Duration,
    pub returned: Duration,
}

/// Tells what came of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Told(Outcome),
    /// It was deleted, as this change of its slot.
    DeletedAt(u64),
    /// It certainly did not happen.
    Refused,
}

impl Book {
    pub fn new(keys: Vec<String>) -> Self {
        Self {
            histories: vec![Vec::new(); keys.len()],
            keys,
            ..Self::default()
        }
    }

    pub fn keys(&self) -> &[String] {
        &self.keys
    }

    pub fn key_count(&self) -> usize {
        self.keys.len()
    }

    /// Returns a value that was never used before.
    pub fn new_value(&mut self) -> Value {
        self.next_value += 1;
        Value(self.next_value)
    }

    /// Returns what was last read of a key.
    pub fn known(&self, key: usize) -> Option<(Value, u64)> {
        self.known.get(&key).copied()
    }

    /// Returns the number of a key, if it is one of ours.
    pub fn number_of(&self, key: &[u8]) -> Option<usize> {
        self.keys.iter().position(|known| known.as_bytes() == key)
    }

    /// Returns whether nobody has a request under way any more.
    pub fn are_over(&self) -> bool {
        self.working == 0
    }

    /// Notes an answer that must not be.
    pub fn complain(&mut self, what: String) {
        self.absurd.push(what);
    }

    /// Notes a request of which certainly nothing was done.
    pub fn refuse(&mut self) {
        self.refused += 1;
    }

    /// Notes what came of an operation on a key. Returns where it stands in the key's history.
    pub fn record(
        &mut self,
        key: usize,
        times: Times,
        action: Action,
        answer: Answer,
    ) -> Option<usize> {
        let (outcome, deleted_at) = match answer {
            Answer::Refused => {
                self.refused += 1;
                return None;
            }
            Answer::DeletedAt(revision) => (Outcome::Deleted { existed: true }, Some(revision)),
            Answer::Told(outcome) => (outcome, None),
        };
        match outcome {
            Outcome::Unknown => self.unanswered += 1,
            _ => self.answered += 1,
        }
        match outcome {
            Outcome::Got(Some(known)) => drop(self.known.insert(key, known)),
            Outcome::Got(None) => drop(self.known.remove(&key)),
            _ => {}
        }
        self.note_change(key, times, action, outcome, deleted_at);
        self.histories[key].push(Operation {
            client: times.client,
            called: times.called,
            returned: times.returned,
            action,
            outcome,
        });
        Some(self.histories[key].len() - 1)
    }

    /// Notes what an operation tells of the revisions of its slot.
    fn note_change(
        &mut self,
        key: usize,
        times: Times,
        action: Action,
        outcome: Outcome,
        deleted_at: Option<u64>,
    ) {
        let slot = self.slots.entry(slot_of(self.keys[key].as_bytes()));
        let slot = slot.or_default();
        let (value, revision) = match (action, outcome) {
            (Action::Put { value, .. }, Outcome::Put { revision, .. }) => {
                (Some(value), Some(revision))
            }
            (Action::Delete { .. }, Outcome::Deleted { existed: true }) => (None, deleted_at),
            (Action::Put { value, .. }, Outcome::Stored { .. } | Outcome::Unknown) => {
                (Some(value), None)
            }
            (Action::Delete { .. }, Outcome::Unknown) => (None, None),
            _ => return,
        };
        match revision {
            Some(revision) => slot.changes.push(Change {
                key,
                value,
                revision,
                called: times.called,
                returned: times.returned,
            }),
            None => {
                slot.untold += 1;
                if value.is_none() {
                    slot.untold_deletions.insert(key);
                }
            }
        }
    }

    /// Notes operations on keys of one slot that happened all at one moment, or not at all.
    pub fn record_batch(&mut self, times: Times, operations: &[(usize, Action, Answer)]) {
        let mut places = Vec::new();
        let (mut revisions, mut read) = (Vec::new(), Vec::new());
        for (key, action, answer) in operations {
            match answer {
                Answer::Told(Outcome::Put { revision, .. }) | Answer::DeletedAt(revision) => {
                    revisions.push(*revision);
                }
                // Its gets, which are before its own writes, are of one moment only if it has none.
                Answer::Told(Outcome::Got(got)) => read.push((*key, *got)),
                _ => {}
            }
            if let Some(place) = self.record(*key, times, *action, *answer) {
                places.push((*key, place));
            }
        }
        let Some((key, ..)) = operations.first() else {
            return;
        };
        let slot = self.slots.entry(slot_of(self.keys[*key].as_bytes()));
        let slot = slot.or_default();
        if read.len() == operations.len() {
            slot.snapshots.push(Snapshot {
                called: times.called,
                returned: times.returned,
                read,
            });
        } else if revisions.len() > 1 {
            slot.batches.push(revisions);
        }
        self.batches.push(places);
    }

    /// Notes a read that may be of the past: `times` begin as early as it may be.
    pub fn record_stale(&mut self, key: usize, times: Times, answer: Answer) {
        let known = self.known(key);
        self.record(key, times, Action::Get, answer);
        match known {
            Some(known) => drop(self.known.insert(key, known)),
            None => drop(self.known.remove(&key)),
        }
    }

    /// Notes a page of a listing: what is in it of the keys behind `after`, up to its last if there
    /// are more, and what is not.
    pub fn record_page(
        &mut self,
        times: Times,
        after: Option<&Bytes>,
        page: &Page,
        keys_only: bool,
    ) {
        let last = page.items.last().map(|(key, _)| key.clone());
        let is_in_order = page.items.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let first = page.items.first().map(|(key, _)| key);
        if !is_in_order || first.is_some_and(|first| after.is_some_and(|after| first <= after)) {
            self.complain(format!("a page is out of order: {:?}", page.items));
        }
        let stranger = page
            .items
            .iter()
            .find(|(key, _)| self.number_of(key).is_none());
        if let Some((key, _)) = stranger {
            self.complain(format!("nobody wrote {key:?}, which is listed"));
        }
        for key in 0..self.keys.len() {
            let name = self.keys[key].as_bytes();
            let is_behind = after.is_none_or(|after| name > &after[..]);
            let is_before_end = last.as_ref().is_none_or(|last| name <= &last[..]);
            if !is_behind || (page.has_more && !is_before_end) {
                continue;
            }
            let item = page.items.iter().find(|(item, _)| &item[..] == name);
            let outcome = match (item, keys_only) {
                (item, true) => Outcome::Found(item.is_some()),
                (Some((_, found)), false) => Outcome::Got(*found),
                (None, false) => Outcome::Got(None),
            };
            self.record(key, times, Action::Get, Answer::Told(outcome));
        }
    }

    pub fn record_count(&mut self, times: Times, keys: u64) {
        self.answered += 1;
        self.counts.push(KeyCount {
            called: times.called,
            returned: times.returned,
            keys,
        });
    }

    /// Looks whether all that clients were told can be true. `revisions`: those of slots at the
    /// end.
    ///
    /// # Errors
    ///
    /// Names what cannot.
    pub fn check(&mut self, revisions: &BTreeMap<Slot, u64>) -> Result<(), String> {
        if let Some(absurd) = self.absurd.first() {
            return Err(absurd.clone());
        }
        self.settle_batches();
        for (key, operations) in self.keys.iter().zip(&self.histories) {
            linearizable::check(operations).map_err(|violation| format!("{key}: {violation}"))?;
        }
        for (slot, history) in &self.slots {
            history
                .check(revisions.get(slot).copied())
                .map_err(|what| format!("slot {slot}: {what}"))?;
        }
        self.check_counts()
    }

    /// Of a batch without an answer, all was done once anything of it was seen.
    fn settle_batches(&mut self) {
        for places in &self.batches {
            let seen = places
                .iter()
                .filter_map(|(key, place)| {
                    let Action::Put { value, .. } = self.histories[*key][*place].action else {
                        return None;
                    };
                    first_read(&self.histories[*key], value)
                })
                .min();
            let Some(seen) = seen else { continue };
            for (key, place) in places {
                let operation = &mut self.histories[*key][*place];
                if operation.outcome == Outcome::Unknown
                    && matches!(operation.action, Action::Put { .. })
                {
                    operation.outcome = Outcome::Stored { created: None };
                    operation.returned = seen.max(operation.called);
                }
            }
        }
    }

    /// Each count is at least the number of keys that were there all the time, and at most that of
    /// keys that were there at any time of it.
    fn check_counts(&self) -> Result<(), String> {
        for count in &self.counts {
            let (mut least, mut most) = (0, 0);
            for history in &self.histories {
                let could_be = |found: bool| {
                    let mut history = history.clone();
                    history.push(Operation {
                        client: usize::MAX,
                        called: count.called,
                        returned: count.returned,
                        action: Action::Get,
                        outcome: Outcome::Found(found),
                    });
                    linearizable::check(&history).is_ok()
                };
                least += u64::from(!could_be(false));
                most += u64::from(could_be(true));
            }
            if !(least..=most).contains(&count.keys) {
                return Err(format!(
                    "{count:?}, but there were at least {least} and at most {most}"
                ));
            }
        }
        Ok(())
    }
}

/// Returns when a value was first read.
fn first_read(operations: &[Operation], value: Value) -> Option<Duration> {
    let read = operations.iter().filter(|operation| {
        matches!(operation.outcome,
            Outcome::Got(Some((got, _))) | Outcome::Read(Some(got)) if got == value)
    });
    read.map(|operation| operation.returned).min()
}
