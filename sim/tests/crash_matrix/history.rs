//! What clients wrote and read, and whether it can all be true: each key a register, each slot with
//! one row of revisions.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use quorate::api::store::{Consistency, Options, Routing, Store};
use quorate::sm::kv::{Action, Condition, Media, Operation, OperationOutcome};
use quorate::sm::slots::slot_of;
use quorate::types::Slot;

/// How long one request is waited for.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Something that a client was told of a key.
#[derive(Debug, Clone)]
struct Told {
    key: String,
    begun: Instant,
    ended: Instant,
    revision: u64,
    value: String,
    is_write: bool,
}

#[derive(Debug, Default)]
pub struct History {
    told: Mutex<Vec<Told>>,
    /// Values of writes whose outcome is not known.
    unknown: Mutex<BTreeSet<(String, String)>>,
}

pub fn options() -> Options {
    Options {
        consistency: Consistency::Linearizable,
        routing: Routing::Proxy,
        timeout: TIMEOUT,
    }
}

impl History {
    /// Writes, and remembers what was told of it. True: it was acknowledged.
    pub async fn put(&self, store: &impl Store, key: &str, value: &str) -> bool {
        let action = Action::Put {
            media: Media::Text,
            value: Bytes::copy_from_slice(value.as_bytes()),
        };
        let operation = Operation {
            key: Bytes::copy_from_slice(key.as_bytes()),
            condition: Condition::None,
            action,
        };
        // Before it is sent: a reader may see it before its writer hears of it.
        self.unknown
            .lock()
            .insert((key.to_owned(), value.to_owned()));
        let begun = Instant::now();
        let written = store.write(vec![operation], None, options()).await;
        let ended = Instant::now();
        let Some(Ok(OperationOutcome::Put { revision, .. })) = written.first() else {
            return false;
        };
        let (key, value) = (key.to_owned(), value.to_owned());
        self.tell(Told {
            key,
            begun,
            ended,
            revision: revision.0,
            value,
            is_write: true,
        });
        true
    }

    /// Reads, and remembers what was told. True: there was an answer.
    pub async fn get(&self, store: &impl Store, key: &str) -> bool {
        let begun = Instant::now();
        let found = store
            .get(Bytes::copy_from_slice(key.as_bytes()), options())
            .await;
        let ended = Instant::now();
        let Ok(found) = found else { return false };
        let (revision, value) = match found.record {
            None => (0, String::new()),
            Some(record) => (
                record.revision.0,
                String::from_utf8_lossy(&record.value).into_owned(),
            ),
        };
        self.tell(Told {
            key: key.to_owned(),
            begun,
            ended,
            revision,
            value,
            is_write: false,
        });
        true
    }

    fn tell(&self, told: Told) {
        self.told.lock().push(told);
    }

    pub fn acknowledged(&self) -> usize {
        self.told.lock().iter().filter(|told| told.is_write).count()
    }

    /// What can't be, if anything.
    pub fn check(&self) -> Result<(), String> {
        let told = self.told.lock().clone();
        let unknown = self.unknown.lock().clone();
        let mut keys: BTreeMap<&str, Vec<&Told>> = BTreeMap::new();
        let mut slots: BTreeMap<Slot, Vec<&Told>> = BTreeMap::new();
        for one in &told {
            keys.entry(&one.key).or_default().push(one);
            if one.is_write {
                slots
                    .entry(slot_of(one.key.as_bytes()))
                    .or_default()
                    .push(one);
            }
        }
        slots.values().try_for_each(|writes| check_order(writes))?;
        keys.values().try_for_each(|of| check_order(of))?;
        keys.iter()
            .try_for_each(|(key, of)| check_values(key, of, &unknown))
    }
}

/// Of two where one had ended before the other began, the later has no lower revision, and a higher
/// one if it is a write. Two writes never have one revision.
fn check_order(told: &[&Told]) -> Result<(), String> {
    for (earlier, later) in told
        .iter()
        .flat_map(|earlier| told.iter().map(move |later| (earlier, later)))
    {
        let goes_back = later.revision < earlier.revision
            || later.is_write && later.revision == earlier.revision;
        if earlier.ended < later.begun && goes_back {
            return Err(format!(
                "revisions go back: {earlier:?}, and after it {later:?}"
            ));
        }
    }
    let mut written = BTreeMap::new();
    let mut writes = told.iter().filter(|one| one.is_write);
    writes.try_for_each(|one| match written.insert(one.revision, *one) {
        Some(other) => Err(format!("one revision twice: {other:?} and {one:?}")),
        None => Ok(()),
    })
}

/// What is read at a revision is what was written there, or what may have been.
fn check_values(
    key: &str,
    told: &[&Told],
    unknown: &BTreeSet<(String, String)>,
) -> Result<(), String> {
    let mut at: BTreeMap<u64, &Told> = BTreeMap::new();
    for one in told {
        if let Some(other) = at.insert(one.revision, one)
            && other.value != one.value
        {
            return Err(format!("two values at one revision: {other:?} and {one:?}"));
        }
        if one.revision > 0 && !unknown.contains(&(key.to_owned(), one.value.clone())) {
            return Err(format!("nobody wrote {one:?}"));
        }
    }
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    for one in told.iter().filter(|one| one.revision > 0) {
        if seen
            .insert(&one.value, one.revision)
            .is_some_and(|revision| revision != one.revision)
        {
            return Err(format!("one write at two revisions: {one:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Key, begin, end, revision, value, and whether it is a write.
    type Line = (&'static str, u64, u64, u64, &'static str, bool);

    fn history(told: &[Line]) -> History {
        let (history, start) = (History::default(), Instant::now());
        for (key, begun, ended, revision, value, is_write) in told {
            let at = |ms: &u64| start + Duration::from_millis(*ms);
            let (key, value) = ((*key).to_owned(), (*value).to_owned());
            history.unknown.lock().insert((key.clone(), value.clone()));
            history.tell(Told {
                key,
                begun: at(begun),
                ended: at(ended),
                revision: *revision,
                value,
                is_write: *is_write,
            });
        }
        history
    }

    #[test]
    fn what_can_be_is_believed_and_what_cannot_is_not() {
        let good: &[Line] = &[
            ("{a}1", 0, 5, 1, "x", true),
            ("{a}2", 3, 9, 2, "y", true),
            ("{a}1", 4, 6, 1, "x", false),
            ("{a}1", 5, 6, 3, "z", false),
        ];
        assert_eq!(history(good).check(), Ok(()));
        for (bad, why) in [
            (
                vec![("{a}1", 0, 5, 2, "x", true), ("{a}2", 6, 9, 1, "y", true)],
                "a later write of the slot, and a lower revision",
            ),
            (
                vec![("{a}1", 0, 5, 2, "x", true), ("{a}2", 0, 5, 2, "y", true)],
                "one revision twice",
            ),
            (
                vec![("{a}1", 0, 5, 1, "x", true), ("{a}1", 6, 9, 0, "", false)],
                "an acknowledged write is lost",
            ),
            (
                vec![("{a}1", 0, 5, 2, "x", false), ("{a}1", 6, 9, 1, "y", false)],
                "reads go back",
            ),
            (
                vec![("{a}1", 6, 9, 2, "x", true), ("{a}1", 0, 5, 2, "x", false)],
                "read before it was written",
            ),
            (
                vec![("{a}1", 0, 9, 2, "x", true), ("{a}1", 0, 9, 2, "y", false)],
                "two values at one revision",
            ),
            (
                vec![("{a}1", 0, 9, 1, "x", true), ("{a}1", 0, 9, 2, "x", false)],
                "one write at two revisions",
            ),
        ] {
            assert!(history(&bad).check().is_err(), "{why}");
        }
    }
}
