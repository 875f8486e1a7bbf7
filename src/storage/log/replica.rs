//! One replica's part of the log: its state as issued, as written and as synced, and the handle
//! that its group holds.
//!
//! Everything is issued in memory first, so it can be read at once, and then queued under the same
//! lock. The cache holds the last entries without a gap and all that are not yet written; the
//! writer alone evicts from it, and only what is synced. So an entry that is not in the cache is
//! where [`LogIndex`] says.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::change::LogChange;
use super::handle::Log;
use super::queue::{LogOp, call};
use super::record::ReplicaHead;
use super::replica_state::{EntrySource, ReplicaLogInner, ReplicaLogState, wiped};
use super::{Done, LogEntry, Vote};
use crate::blocking;
use crate::storage::ReplicaKey;
use crate::types::LogId;

/// The state that a replica starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogState {
    /// Nothing up to here is in the log any more.
    pub purged: Option<LogId>,
    /// The last entry, or `purged` if there is none.
    pub last: Option<LogId>,
    pub vote: Option<Vote>,
}

/// The log of one replica. Clones are the same log. It blocks on nothing but short locks, except
/// for reads past the cache.
#[derive(Clone)]
pub struct ReplicaLog {
    pub(super) log: Log,
    pub(super) replica: Arc<ReplicaLogInner>,
}

impl ReplicaLog {
    pub fn key(&self) -> ReplicaKey {
        self.replica.key
    }

    pub fn state(&self) -> LogState {
        let ReplicaHead {
            purged, last, vote, ..
        } = self.replica.lock().issued;
        LogState { purged, last, vote }
    }

    /// Appends entries that follow the last one. They can be read when this returns; `done` is
    /// called after the fsync.
    ///
    /// # Errors
    /// If they don't follow, are more than 1 GiB, the replica was wiped or the log has failed or is
    /// closed. `done` is dropped then.
    pub fn append(&self, entries: Vec<LogEntry>, done: Done) -> io::Result<()> {
        let mut state = self.replica.lock();
        state.check_append(&entries)?;
        let seq = state.seq + 1;
        let op = LogOp {
            replica: self.replica.clone(),
            seq,
            change: LogChange::Append(entries.clone()),
            done,
        };

        // Queued first: if the log refuses, this replica stays as it was.
        self.log
            .shared()
            .queue
            .push(op)
            .map_err(|(_, failure)| failure.to_io())?;
        state.seq = seq;
        state.append(entries);
        if cfg!(debug_assertions) {
            state.check_invariants();
        }
        Ok(())
    }

    /// Replaces the vote. `done` is called after the fsync.
    pub fn save_vote(&self, vote: Vote, done: Done) {
        self.issue(done, |state| {
            state.issued.vote = Some(vote);
            Ok(LogChange::Vote(vote))
        });
    }

    /// Removes every entry after `last`; all of them for none. Refused below the purge point.
    pub fn truncate_after(&self, last: Option<u64>, done: Done) {
        self.issue(done, |state| state.truncate_after(last));
    }

    /// Removes every entry up to `upto`, which may lie past the last one: the log then goes on
    /// after it.
    pub fn purge(&self, upto: LogId, done: Done) {
        self.issue(done, |state| state.purge(upto));
    }

    /// Remembers how far is committed. Written with whatever is written next, so a crash may lose
    /// it.
    pub fn save_committed(&self, id: Option<LogId>) {
        let mut state = self.replica.lock();
        if !state.wiped && state.issued.committed != id {
            state.issued.committed = id;
            self.log.shared().queue.set_committed(self.replica.key, id);
        }
    }

    pub fn committed(&self) -> Option<LogId> {
        self.replica.lock().issued.committed
    }

    /// Entries from `range.start` on without a gap: as many as fit in `bytes_max`, but one at
    /// least. None if the first of the range is not in the log, purged or not yet there. Reads past
    /// the cache block on the disk.
    pub fn read(&self, range: Range<u64>, bytes_max: usize) -> io::Result<Vec<LogEntry>> {
        loop {
            let plan = self.replica.lock().plan_read(range.clone(), bytes_max);
            match self.fetch(plan)? {
                Some(entries) => return Ok(entries),
                // The writer moved what was to be read, which it does a bounded number of times.
                None => continue,
            }
        }
    }

    /// As [`ReplicaLog::read`], without blocking: what must come from the disk is read on a thread
    /// of its own, of which there is a bounded number.
    pub async fn read_elsewhere(
        &self,
        range: Range<u64>,
        bytes_max: usize,
    ) -> io::Result<Vec<LogEntry>> {
        let plan = self.replica.lock().plan_read(range.clone(), bytes_max);
        let cached: Option<Vec<LogEntry>> = plan.into_iter().map(EntrySource::in_memory).collect();
        if let Some(entries) = cached {
            return Ok(entries);
        }

        // Threads that serve carry the heartbeats of all groups, so they never wait for the disk.
        let log = self.clone();
        let turn = self.log.shared().readers.clone().acquire_owned().await;
        let turn = turn.map_err(io::Error::other)?;
        // The turn lasts as long as the read, also if nobody waits for that any more.
        let read = blocking::start(move || {
            let _turn = turn;
            log.read(range, bytes_max)
        });
        read.await.map_err(io::Error::other)?
    }

    /// None if an entry was moved or removed meanwhile.
    fn fetch(&self, plan: Vec<EntrySource>) -> io::Result<Option<Vec<LogEntry>>> {
        let mut entries = Vec::with_capacity(plan.len());
        for source in plan {
            match source {
                EntrySource::Memory(entry) => entries.push(entry),
                EntrySource::Disk(id, spot) => {
                    match self.log.shared().read_entry(self.replica.key, id, spot) {
                        Ok(entry) => entries.push(entry),
                        // The place is still the right one, so the error is true. Otherwise the
                        // writer moved it.
                        Err(error) if self.replica.lock().reads_from(id, spot) => {
                            return Err(error);
                        }
                        Err(_) => return Ok(None),
                    }
                }
            }
        }
        Ok(Some(entries))
    }

    /// The last id that is durable, with all before it.
    pub fn synced(&self) -> Option<LogId> {
        self.replica.lock().synced
    }

    /// The files of the log that this replica is in, and how far each of them is held for synced.
    #[cfg(any(test, feature = "testing"))]
    pub fn synced_files(&self) -> Vec<(std::path::PathBuf, u64)> {
        let segments = self.log.shared().segments.read();
        let views = segments.values();
        views.map(|view| (view.path.clone(), view.end)).collect()
    }

    /// Calls `f` once the log is synced through `id`: at once if it is, with an error if it never
    /// will be because the replica was wiped or the log failed or was closed.
    pub fn on_synced(&self, id: LogId, f: Done) {
        let mut state = self.replica.lock();

        // Decided under the replica's lock, under which the writer collects waiters: none is
        // missed.
        let outcome = if state.is_synced(id) {
            Ok(())
        } else if let Some(failure) = self.log.shared().queue.refusal() {
            Err(failure.to_io())
        } else if state.wiped {
            Err(wiped(self.replica.key))
        } else {
            state.waiters.push((id, f));
            return;
        };
        drop(state);
        f(outcome);
    }

    /// Bytes that the entries after `index` take in the log.
    pub fn bytes_since(&self, index: u64) -> u64 {
        self.replica.lock().bytes_since(index)
    }

    /// The id of the entry with this index, or of the purge point. None if it is not known.
    pub fn entry_id(&self, index: u64) -> Option<LogId> {
        self.replica.lock().id(index)
    }

    /// Issues an operation: `change` does it in memory.
    fn issue(
        &self,
        done: Done,
        change: impl FnOnce(&mut ReplicaLogState) -> io::Result<LogChange>,
    ) {
        let mut state = self.replica.lock();
        let refused = match (state.wiped, self.log.shared().queue.refusal()) {
            (_, Some(failure)) => Err(failure.to_io()),
            (true, None) => Err(wiped(self.replica.key)),
            (false, None) => change(&mut state),
        };
        let change = match refused {
            Ok(change) => change,
            Err(error) => {
                drop(state);
                return done(Err(error));
            }
        };
        state.seq += 1;
        let op = LogOp {
            replica: self.replica.clone(),
            seq: state.seq,
            change,
            done,
        };

        // Under the same lock, so that the disk sees the operations in the order of memory.
        let pushed = self.log.shared().queue.push(op);
        drop(state);
        if let Err((op, failure)) = pushed {
            call(op.done, Some(&failure));
        }
    }
}

impl Log {
    pub fn replica(&self, key: ReplicaKey) -> Option<ReplicaLog> {
        let replica = self.shared().roster().replicas.get(&key).cloned()?;
        Some(ReplicaLog {
            log: self.clone(),
            replica,
        })
    }
}
