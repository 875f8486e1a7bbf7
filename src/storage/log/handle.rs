//! [`Log`]: the handle that the node holds, and what handles and writer share.
//!
//! Locks are taken in this order: roster, one replica, queue or segments. No callback is called
//! under any of them.

use parking_lot::{Mutex, MutexGuard, RwLock};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use super::activity::{ActivityTracker, WriterActivity};
use super::change::LogChange;
use super::disk_room::LogDiskRoom;
use super::index::{EntryLocation, LogIndex};
use super::queue::{LogOp, LogQueue, call};
use super::record::{self, LogRecord, RecordPlace};
use super::replica_state::ReplicaLogInner;
use super::{Done, LogEntry, LogFailure, LogOptions};
use crate::storage::ReplicaKey;
use crate::storage::disk::DiskFile;
use crate::types::{GroupId, LogId, ReplicaId};

/// Upper bounds of the buckets in [`LogMetrics::sync_buckets`], in microseconds. Slower syncs are
/// in one bucket more.
pub const SYNC_BUCKETS_US: [u64; 12] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 500_000, 2_000_000,
];

/// Reads of entries from the disk at a time.
const READERS_MAX: usize = 16;

/// Counters since the log was opened, and its current sizes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogMetrics {
    pub syncs: u64,
    pub sync_us_total: u64,
    pub sync_us_max: u64,
    /// Syncs of batches by latency: see [`SYNC_BUCKETS_US`].
    pub sync_buckets: [u64; SYNC_BUCKETS_US.len() + 1],
    pub batches: u64,
    pub records: u64,
    pub bytes_written: u64,
    /// Replicas whose live entries were rewritten because they pinned old segments.
    pub rebases: u64,
    pub segments: u64,
    /// Bytes of records in all segments, live or not.
    pub disk_bytes: u64,
    pub live_bytes: u64,
    pub queue_bytes: u64,
    /// Bytes of live entries of each replica.
    pub replicas: Vec<(ReplicaKey, u64)>,
}

/// A replica that keeps sealed segments from being used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    pub key: ReplicaKey,
    /// Bytes of its live entries.
    pub live_bytes: u64,
    /// Bytes of all sealed segments from its first live entry on.
    pub held_bytes: u64,
}

/// The log of a node. Clones are the same log; it closes when all of them, and all
/// [`ReplicaLog`](crate::storage::log::ReplicaLog)s, are dropped.
#[derive(Clone)]
pub struct Log {
    pub(super) handle: Arc<LogHandle>,
}

pub(super) struct LogHandle {
    pub shared: Arc<LogInner>,
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        self.shared.queue.close();
    }
}

impl Log {
    /// Those that were created and not wiped, in order.
    pub fn replicas(&self) -> Vec<ReplicaKey> {
        self.shared().roster().replicas.keys().copied().collect()
    }

    /// Marks durably that a replica was created, with an empty log. An id at or below one that this
    /// node ever had in the group is refused with [`io::ErrorKind::AlreadyExists`]. The replica
    /// must not act before `done`.
    pub fn create(&self, key: ReplicaKey, done: Done) {
        let mut roster = self.shared().roster();
        let used = roster
            .highest
            .get(&key.group)
            .copied()
            .filter(|highest| *highest >= key.replica);
        if let Some(highest) = used {
            drop(roster);
            let reason = format!(
                "replica {key} is refused: this node already had {highest} of that group, and ids \
                are never reused"
            );
            return done(Err(io::Error::new(io::ErrorKind::AlreadyExists, reason)));
        }
        roster.highest.insert(key.group, key.replica);
        let replica = Arc::new(ReplicaLogInner::new(key, LogIndex::default()));

        // Queued under the roster's lock, so that a wiping of it can only come behind it in the
        // log.
        let pushed = self.push(&replica, LogChange::Create, done);
        roster.replicas.insert(key, replica);
        drop(roster);
        refuse(pushed);
    }

    /// Forgets the replica's entries and vote, durably. That its id was used stays known. Every
    /// handle of it is refused from here on.
    pub fn wipe(&self, key: ReplicaKey, done: Done) {
        let mut roster = self.shared().roster();
        let (pushed, waiters) = match roster.replicas.remove(&key) {
            Some(replica) => {
                // Marked and queued under one lock: no append can come behind the wiping.
                let mut state = replica.lock();
                let (seq, waiters) = state.wipe();
                let op = LogOp {
                    replica: replica.clone(),
                    seq,
                    change: LogChange::Wipe,
                    done,
                };
                (self.shared().queue.push(op), waiters)
            }
            // Perhaps its wiping still waits to be synced: done when that is.
            None => (
                self.push(
                    &Arc::new(ReplicaLogInner::new(key, LogIndex::default())),
                    LogChange::Nothing,
                    done,
                ),
                Vec::new(),
            ),
        };
        drop(roster);

        // After the locks, because a callback may call the log again.
        let gone = || {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("the log of replica {key} was wiped"),
            )
        };
        waiters.into_iter().for_each(|waiter| waiter(Err(gone())));
        refuse(pushed);
    }

    fn push(
        &self,
        replica: &Arc<ReplicaLogInner>,
        change: LogChange,
        done: Done,
    ) -> Result<(), (LogOp, LogFailure)> {
        self.shared().queue.push(LogOp {
            replica: replica.clone(),
            seq: 0,
            change,
            done,
        })
    }

    /// Bytes of operations that wait to be written.
    pub fn queue_bytes(&self) -> usize {
        self.shared().queue.bytes()
    }

    /// Returns true if so much waits that no more should be proposed. Appends are still accepted.
    pub fn is_overloaded(&self) -> bool {
        self.queue_bytes() > self.shared().queue_bytes_max
    }

    /// Returns what the writer does now.
    pub fn activity(&self) -> WriterActivity {
        self.shared()
            .activity
            .observe(!self.shared().queue.is_empty())
    }

    /// Holds the reason once the log has failed for good: then this node must stop.
    pub fn failed(&self) -> watch::Receiver<Option<LogFailure>> {
        self.shared().failed.subscribe()
    }

    /// Refuses what comes from now on. The writer writes what waits and the closing mark, and ends.
    pub fn close(&self) {
        self.shared().queue.close();
    }

    pub fn metrics(&self) -> LogMetrics {
        let replicas: Vec<Arc<ReplicaLogInner>> =
            self.shared().roster().replicas.values().cloned().collect();
        let mut metrics = self.shared().counters().clone();
        metrics.replicas = replicas
            .iter()
            .map(|replica| (replica.key, replica.lock().live_bytes()))
            .collect();
        metrics.live_bytes = metrics.replicas.iter().map(|(_, bytes)| bytes).sum();
        metrics.queue_bytes = self.queue_bytes() as u64;
        let segments = self.shared().segments.read();
        metrics.segments = segments.len() as u64;
        metrics.disk_bytes = segments.values().map(|segment| segment.end).sum();
        metrics
    }

    /// The replicas with live entries in sealed segments, those that hold the oldest first. Small
    /// ones are rebased by the log itself; the others let go when they purge, so they want a
    /// snapshot.
    pub fn segments_pinned_by(&self) -> Vec<Pin> {
        let replicas: Vec<Arc<ReplicaLogInner>> =
            self.shared().roster().replicas.values().cloned().collect();
        let mut first_segments: Vec<(u64, Arc<ReplicaLogInner>, u64)> = Vec::new();

        // Entries lie in log order, so the first one shows how far back a replica holds the log.
        for replica in replicas {
            let state = replica.lock();
            let first = state
                .written
                .entries()
                .next()
                .map(|(_, entry)| entry.spot.segment);
            let live_bytes = state.live_bytes();
            drop(state);
            first_segments.extend(first.map(|segment| (segment, replica, live_bytes)));
        }
        first_segments.sort_by_key(|(segment, replica, _)| (*segment, replica.key));
        let segments = self.shared().segments.read();

        // Nobody pins the active segment: it is kept in any case.
        let Some((active, _)) = segments.last_key_value() else {
            return Vec::new();
        };
        let sealed = first_segments
            .into_iter()
            .filter(|(first, _, _)| first < active);
        let pin = |(first, replica, live_bytes): (u64, Arc<ReplicaLogInner>, u64)| {
            let held_bytes = segments
                .range(first..*active)
                .map(|(_, segment)| segment.end)
                .sum();
            Pin {
                key: replica.key,
                live_bytes,
                held_bytes,
            }
        };
        sealed.map(pin).collect()
    }

    pub(super) fn shared(&self) -> &LogInner {
        &self.handle.shared
    }
}

fn refuse(pushed: Result<(), (LogOp, LogFailure)>) {
    if let Err((op, failure)) = pushed {
        call(op.done, Some(&failure));
    }
}

/// State shared by the handles and the writer.
pub(super) struct LogInner {
    pub queue: LogQueue,
    pub segments: RwLock<BTreeMap<u64, SegmentView>>,
    pub failed: watch::Sender<Option<LogFailure>>,
    pub activity: ActivityTracker,
    /// Turns of those who read from the disk.
    pub readers: Arc<Semaphore>,
    roster: Mutex<Roster>,
    counters: Mutex<LogMetrics>,
    pub binding: u128,
    queue_bytes_max: usize,
    pub room: LogDiskRoom,
}

/// A segment as readers see it.
pub(super) struct SegmentView {
    pub file: Arc<dyn DiskFile>,
    pub path: PathBuf,
    pub end: u64,
}

/// The replicas of the log, as issued.
pub(super) struct Roster {
    pub replicas: BTreeMap<ReplicaKey, Arc<ReplicaLogInner>>,
    pub highest: BTreeMap<GroupId, ReplicaId>,
}

impl LogInner {
    pub fn new(
        roster: Roster,
        segments: BTreeMap<u64, SegmentView>,
        options: &LogOptions,
        room: LogDiskRoom,
    ) -> Self {
        Self {
            queue: LogQueue::default(),
            segments: RwLock::new(segments),
            failed: watch::Sender::new(None),
            activity: ActivityTracker::default(),
            readers: Arc::new(Semaphore::new(READERS_MAX)),
            roster: Mutex::new(roster),
            counters: Mutex::new(LogMetrics::default()),
            binding: options.binding,
            queue_bytes_max: options.queue_bytes_max,
            room,
        }
    }

    pub fn roster(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock()
    }

    pub fn counters(&self) -> MutexGuard<'_, LogMetrics> {
        self.counters.lock()
    }

    /// Counts one synced batch.
    pub fn count_batch(&self, records: u64, bytes: u64, sync: Duration) {
        let us = u64::try_from(sync.as_micros()).unwrap_or(u64::MAX);
        let mut counters = self.counters();
        counters.syncs += 1;
        counters.batches += 1;
        counters.records += records;
        counters.bytes_written += bytes;
        counters.sync_us_total = counters.sync_us_total.saturating_add(us);
        counters.sync_us_max = counters.sync_us_max.max(us);
        counters.sync_buckets[SYNC_BUCKETS_US.partition_point(|bound| *bound < us)] += 1;
    }

    /// Reads one entry from the disk and checks that it is the one.
    pub fn read_entry(
        &self,
        key: ReplicaKey,
        id: LogId,
        spot: EntryLocation,
    ) -> io::Result<LogEntry> {
        // Not locked while the disk is read: the writer takes this lock after each batch.
        let segments = self.segments.read();
        let segment = segments.get(&spot.segment).ok_or(io::ErrorKind::NotFound)?;
        let (file, path) = (segment.file.clone(), segment.path.clone());
        drop(segments);
        let mut bytes = vec![0; spot.len as usize];
        let n = file
            .read_at(&mut bytes, u64::from(spot.offset))
            .map_err(|error| super::with_context(error, path.display()))?;
        bytes.truncate(n);
        let place = RecordPlace {
            binding: self.binding,
            segment: spot.segment,
            offset: u64::from(spot.offset),
        };
        let damaged = |reason: String| {
            let reason = format!(
                "{} at byte {}: entry {id} of replica {key} is damaged: {reason}",
                path.display(),
                spot.offset
            );
            io::Error::new(io::ErrorKind::InvalidData, reason)
        };
        let found = record::decode(&bytes, place).map_err(|error| damaged(error.to_string()))?;

        // A valid record may still be another entry, and applying that would make replicas differ.
        match found.record {
            LogRecord::Entry(entry) | LogRecord::Restated(entry)
                if entry.id == id && found.key == key =>
            {
                Ok(entry)
            }
            _ => Err(damaged(format!(
                "another record, of {}, is there",
                found.key
            ))),
        }
    }
}
