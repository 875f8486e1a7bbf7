//! Attacks on the log. Here: the model that every history is compared with. A replica found after a
//! crash must be what it was after some of its issued operations, in order, among them all that
//! were acknowledged.

mod claims;
mod damage;
mod histories;
mod scrub;

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::storage::ReplicaKey;
use crate::storage::disk::{Disk, ensure_dir};
use crate::storage::sim_disk::SimDisk;
use crate::types::{GroupId, LogId, ReplicaId};

pub(super) fn dir() -> PathBuf {
    PathBuf::from("/node/log")
}

pub(super) fn small() -> LogOptions {
    LogOptions {
        segment_bytes: 3000,
        grow_bytes: 1024,
        cache_bytes: 600,
        rebase_bytes_max: 600,
        batch_bytes_max: 1500,
        ..LogOptions::default()
    }
}

pub(super) fn key(group: u64, replica: u64) -> ReplicaKey {
    ReplicaKey {
        group: GroupId(group),
        replica: ReplicaId(replica),
    }
}

pub(super) fn id(term: u64, index: u64) -> LogId {
    LogId { term, index }
}

pub(super) fn entry(term: u64, index: u64, len: usize) -> LogEntry {
    let payload = match (term + index) % 5 {
        0 => LogPayload::Blank,
        1 => LogPayload::Membership(Bytes::from(vec![index as u8; len])),
        _ => LogPayload::Normal(Bytes::from(vec![(term * 7 + index) as u8; len])),
    };
    LogEntry {
        id: id(term, index),
        payload,
    }
}

/// Collects the outcomes that callbacks were given.
#[derive(Clone, Default)]
pub(super) struct Outcomes(Arc<Mutex<Vec<io::Result<()>>>>);

impl Outcomes {
    pub fn done(&self) -> Done {
        let outcomes = self.0.clone();
        Box::new(move |outcome| outcomes.lock().push(outcome))
    }

    pub fn take(&self) -> Vec<io::Result<()>> {
        std::mem::take(&mut self.0.lock())
    }

    /// Returns the number of outcomes, all of which must be good.
    pub fn good(&self) -> usize {
        let outcomes = self.take();
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        outcomes.len()
    }

    /// The kinds of the errors, all of them bad.
    pub fn bad(&self) -> Vec<io::ErrorKind> {
        self.take()
            .into_iter()
            .map(|outcome| {
                outcome
                    .expect_err("a success where only errors are right")
                    .kind()
            })
            .collect()
    }
}

pub(super) fn pump(writer: &mut LogWriter) {
    for _ in 0..1000 {
        if !writer.pump() {
            return;
        }
    }
    panic!("the writer never rests");
}

/// Model of one replica's log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Model {
    pub purged: Option<LogId>,
    pub vote: Option<Vote>,
    pub entries: Vec<LogEntry>,
}

impl Model {
    pub fn last(&self) -> Option<LogId> {
        self.entries.last().map(|entry| entry.id).or(self.purged)
    }

    pub fn next(&self) -> u64 {
        self.last().map_or(0, |last| last.index + 1)
    }

    fn first(&self) -> u64 {
        self.purged.map_or(0, |purged| purged.index + 1)
    }
}

/// A replica's states after each operation issued since the log was opened; none where it does not
/// exist.
#[derive(Default)]
pub(super) struct History {
    pub states: Vec<Option<Model>>,
    pub acked: Arc<Mutex<usize>>,
    committed: Vec<Option<LogId>>,
}

impl History {
    fn now(&self) -> Option<Model> {
        self.states.last().cloned().flatten()
    }

    /// Notes the next state. The callback notes that it was acknowledged.
    fn push(&mut self, state: Option<Model>) -> Done {
        self.states.push(state);
        let (acked, number) = (self.acked.clone(), self.states.len() - 1);
        Box::new(move |outcome| {
            if outcome.is_ok() {
                let mut acked = acked.lock();
                assert!(*acked < number, "acknowledged out of order");
                *acked = number;
            }
        })
    }

    fn acked(&self) -> usize {
        *self.acked.lock()
    }
}

/// Reads back everything that the log holds of a replica.
pub(super) fn observe(log: &Log, key: ReplicaKey) -> Option<Model> {
    let replica = log.replica(key)?;
    let LogState { purged, last, vote } = replica.state();
    let first = purged.map_or(0, |purged| purged.index + 1);
    let end = last.map_or(0, |last| last.index + 1);
    let mut entries = Vec::new();
    while first + (entries.len() as u64) < end {
        let more = replica
            .read(first + entries.len() as u64..end, 300)
            .expect("entries that the log says it has");
        assert!(
            !more.is_empty(),
            "{key}: nothing is read at {} of {purged:?}..={last:?}",
            first + entries.len() as u64
        );
        entries.extend(more);
    }
    let model = Model {
        purged,
        vote,
        entries,
    };
    assert_eq!(model.last(), last, "{key}");
    for entry in &model.entries {
        assert_eq!(replica.entry_id(entry.id.index), Some(entry.id));
    }
    let bytes: usize = model.entries.iter().map(record::entry_len).sum();
    assert_eq!(
        replica.bytes_since(purged.map_or(0, |purged| purged.index)) + first_if_unpurged(&model),
        bytes as u64,
        "{key}"
    );
    Some(model)
}

fn brief(model: &Option<Model>) -> String {
    match model {
        None => "nothing".into(),
        Some(model) => {
            let ids: Vec<String> = model
                .entries
                .iter()
                .map(|entry| format!("{}:{}", entry.id, entry.payload.bytes().len()))
                .collect();
            format!(
                "purged {:?} vote {:?} entries {}",
                model.purged,
                model.vote,
                ids.join(" ")
            )
        }
    }
}

/// `bytes_since` counts what is after an index: with nothing purged, entry 0 is not after 0.
fn first_if_unpurged(model: &Model) -> u64 {
    let first = model.entries.first().filter(|_| model.purged.is_none());
    first.map_or(0, |entry| record::entry_len(entry) as u64)
}

/// A log under attack, with the model of every replica.
pub(super) struct Attack {
    pub disk: SimDisk,
    pub options: LogOptions,
    pub random: StdRng,
    pub log: Log,
    pub writer: LogWriter,
    pub histories: BTreeMap<ReplicaKey, History>,
}

pub(super) fn open(disk: &SimDisk, options: &LogOptions) -> Result<(Log, LogWriter), OpenLogError> {
    Log::open(Arc::new(disk.clone()), &dir(), options.clone())
}

impl Attack {
    pub fn new(seed: u64, options: LogOptions) -> Self {
        let disk = SimDisk::new(seed);
        ensure_dir(&disk, Path::new("/node")).expect("a directory");
        let (log, writer) = open(&disk, &options).expect("a new log");
        Self {
            disk,
            options,
            random: StdRng::seed_from_u64(seed),
            log,
            writer,
            histories: BTreeMap::new(),
        }
    }

    /// Issues one random operation of one replica.
    pub fn issue(&mut self) {
        let group = self.random.random_range(0..4);
        let alive: Vec<ReplicaKey> = self
            .log
            .replicas()
            .into_iter()
            .filter(|key| key.group.0 == group)
            .collect();
        let Some(key) = alive.last().copied() else {
            return self.create(group);
        };
        match self.random.random_range(0..100) {
            0..=1 => self.create(group),
            2..=3 => self.wipe(key),
            4..=13 => self.vote(key),
            14..=19 => self.truncate(key),
            20..=29 => self.purge(key),
            30..=34 => self.commit(key),
            _ => self.append(key),
        }
    }

    fn create(&mut self, group: u64) {
        let used = self
            .histories
            .keys()
            .filter(|key| key.group.0 == group)
            .map(|key| key.replica.0)
            .max();
        let key = key(
            group,
            used.map_or(1, |used| used + self.random.random_range(1..3)),
        );
        let history = self.histories.entry(key).or_default();
        history.states.push(None);
        let done = history.push(Some(Model::default()));
        self.log.create(key, done);
    }

    fn wipe(&mut self, key: ReplicaKey) {
        let done = self.history(key).push(None);
        self.log.wipe(key, done);
    }

    /// Purges all that the replica has.
    pub fn purge_all(&mut self, key: ReplicaKey) {
        if let Some(entry) = self.model(key).entries.last() {
            let upto = entry.id;
            let change = |model: &mut Model| {
                *model = Model {
                    purged: Some(upto),
                    vote: model.vote,
                    entries: Vec::new(),
                }
            };
            self.change(key, change, |replica, done| replica.purge(upto, done));
        }
    }

    pub fn vote(&mut self, key: ReplicaKey) {
        let term = self.random.random_range(1..1000);
        let voted_for = self.random.random_bool(0.5).then_some(ReplicaId(term));
        let vote = Vote {
            term,
            voted_for,
            committed: self.random.random_bool(0.5),
        };
        self.change(
            key,
            |model| model.vote = Some(vote),
            |replica, done| replica.save_vote(vote, done),
        );
    }

    fn truncate(&mut self, key: ReplicaKey) {
        let model = self.model(key);
        let next = self.random.random_range(model.first()..=model.next());
        let last = next.checked_sub(1);
        let change = |model: &mut Model| model.entries.retain(|entry| entry.id.index < next);
        self.change(key, change, |replica, done| {
            replica.truncate_after(last, done)
        });
    }

    fn purge(&mut self, key: ReplicaKey) {
        let model = self.model(key);
        let upto = if self.random.random_range(0..8) == 0 {
            id(
                model.last().map_or(1, |last| last.term),
                model.next() + self.random.random_range(0..5),
            )
        } else if model.entries.is_empty() {
            return;
        } else {
            model.entries[self.random.random_range(0..model.entries.len())].id
        };
        let change = |model: &mut Model| {
            model.purged = Some(upto);
            model.entries.retain(|entry| entry.id.index > upto.index);
        };
        self.change(key, change, |replica, done| replica.purge(upto, done));
    }

    fn commit(&mut self, key: ReplicaKey) {
        let id = self.model(key).last();
        self.history(key).committed.push(id);
        let replica = self.log.replica(key).expect("a replica");
        replica.save_committed(id);
        assert_eq!(replica.committed(), id);
    }

    pub fn append(&mut self, key: ReplicaKey) {
        let model = self.model(key);
        let term = model.last().map_or(1, |last| last.term)
            + u64::from(self.random.random_range(0..5) == 0);
        let mut entries = Vec::new();
        for index in model.next()..model.next() + self.random.random_range(1..4) {
            let len_max = if self.random.random_range(0..10) == 0 {
                900
            } else {
                90
            };
            let made = entry(term, index, self.random.random_range(0..len_max));
            entries.push(made);
        }
        let (last, first) = entries
            .split_last()
            .map(|(last, first)| (last.clone(), first.to_vec()))
            .expect("at least one");
        // A first part of an append may be found, like a first part of the operations.
        let mut model = model;
        for entry in first {
            model.entries.push(entry);
            drop(self.history(key).push(Some(model.clone())));
        }
        let change = |model: &mut Model| model.entries.push(last);
        self.change(key, change, |replica, done| {
            replica.append(entries, done).unwrap_or(())
        });
    }

    fn model(&mut self, key: ReplicaKey) -> Model {
        self.history(key).now().expect("a replica that exists")
    }

    fn history(&mut self, key: ReplicaKey) -> &mut History {
        self.histories
            .get_mut(&key)
            .expect("a replica that the log has was created")
    }

    fn change(
        &mut self,
        key: ReplicaKey,
        change: impl FnOnce(&mut Model),
        issue: impl FnOnce(ReplicaLog, Done),
    ) {
        let mut model = self.model(key);
        change(&mut model);
        let done = self.history(key).push(Some(model));
        issue(self.log.replica(key).expect("a replica"), done);
    }

    /// The log in use has exactly what was issued.
    pub fn check_issued(&self, what: &str) {
        for (key, history) in &self.histories {
            assert_eq!(observe(&self.log, *key), history.now(), "{what}: {key}");
        }
    }

    /// Compares a log that was opened with the histories. Each replica must be found as it was
    /// after one of the operations from `least` (given those acknowledged) on.
    pub fn check_found(&self, log: &Log, what: &str, least: impl Fn(usize, usize) -> usize) {
        for (key, history) in &self.histories {
            let found = observe(log, *key);
            let least = least(history.acked(), history.states.len() - 1);
            let allowed = &history.states[least..];
            assert!(
                allowed.contains(&found),
                "{what}: {key} was found as {}\nallowed from {least} on:\n{}",
                brief(&found),
                history
                    .states
                    .iter()
                    .map(brief)
                    .collect::<Vec<_>>()
                    .join("\n")
            );
            if let Some(committed) = log.replica(*key).and_then(|replica| replica.committed()) {
                let model = found.as_ref().expect("it is in the log");
                // Where the entry of the last one was lost, what is purged is known to have been
                // committed.
                let is_said =
                    history.committed.contains(&Some(committed)) || model.purged == Some(committed);
                assert!(is_said, "{what}: {key} committed {committed}");
                let is_purged = model
                    .purged
                    .is_some_and(|purged| purged.index >= committed.index);
                let is_there = model.entries.iter().any(|entry| entry.id == committed);
                assert!(
                    is_purged || is_there,
                    "{what}: {key} committed {committed} and has {}",
                    brief(&found)
                );
            }
        }
        let created = |key: &ReplicaKey| self.histories.contains_key(key);
        assert!(
            log.replicas().iter().all(created),
            "{what}: {:?}",
            log.replicas()
        );
    }

    /// Goes on with a log that was opened: what it has is where every history begins anew.
    pub fn go_on(&mut self, log: Log, writer: LogWriter) {
        for (key, history) in &mut self.histories {
            let committed = log.replica(*key).and_then(|replica| replica.committed());
            let said = history
                .committed
                .iter()
                .copied()
                .chain([committed])
                .collect();
            *history = History {
                states: vec![observe(&log, *key)],
                acked: Arc::default(),
                committed: said,
            };
        }
        (self.log, self.writer) = (log, writer);
    }
}
