//! One replica's part of the log: its state as issued, as written and as synced, and the handle
//! that its group holds.
//!
//! Everything is issued in memory first, so it can be read at once, and then queued under the same
//! lock. The cache holds the last entries without a gap and all that are not yet written; the
//! writer alone evicts from it, and only what is synced. So an entry that is not in the cache is
//! where [`LogIndex`] says.

use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::handle::Log;
use super::index::{Contradiction, EntryLocation, LogIndex, index_after};
use super::queue::{LogChange, LogOp, call, invalid};
use super::record::{ReplicaHead, entry_len};
use super::{Done, LogEntry, Vote};
use crate::storage::ReplicaKey;
use crate::types::LogId;

/// One append may take so much at most: offsets within a segment stay below 4 GiB.
const APPEND_BYTES_MAX: usize = 1 << 30;

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
        self.log
            .shared()
            .queue
            .push(op)
            .map_err(|(_, failure)| failure.to_io())?;
        state.seq = seq;
        state.append(entries);
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
        let log = self.clone();
        let turn = self.log.shared().readers.clone().acquire_owned().await;
        let turn = turn.map_err(io::Error::other)?;
        // The turn lasts as long as the read, also if nobody waits for that any more.
        let read = tokio::task::spawn_blocking(move || {
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

    /// Calls `f` once the log is synced through `id`: at once if it is, with an error if it never
    /// will be because the replica was wiped or the log failed or was closed.
    pub fn on_synced(&self, id: LogId, f: Done) {
        let mut state = self.replica.lock();
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
        let pushed = self.log.shared().queue.push(op);
        drop(state);
        if let Err((op, failure)) = pushed {
            call(op.done, Some(&failure));
        }
    }
}

pub(super) struct ReplicaLogInner {
    pub key: ReplicaKey,
    state: Mutex<ReplicaLogState>,
}

/// Source that an entry is read from.
pub(super) enum EntrySource {
    Memory(LogEntry),
    Disk(LogId, EntryLocation),
}

impl EntrySource {
    fn in_memory(self) -> Option<LogEntry> {
        match self {
            EntrySource::Memory(entry) => Some(entry),
            EntrySource::Disk(..) => None,
        }
    }
}

struct CachedEntry {
    entry: LogEntry,
    seq: u64,
    end_bytes: u64,
}

pub(super) struct ReplicaLogState {
    issued: ReplicaHead,
    wiped: bool,
    /// The entries up to the last one; from which on is decided by eviction.
    cached: VecDeque<CachedEntry>,
    end_bytes: u64,
    purged_bytes: u64,
    seq: u64,
    pub written: LogIndex,
    synced: Option<LogId>,
    /// The latest truncation that may not be synced, and the least that one of those kept.
    truncated: Option<(u64, Option<LogId>)>,
    waiters: Vec<(LogId, Done)>,
}

impl ReplicaLogInner {
    /// A replica as the disk has it.
    pub fn new(key: ReplicaKey, written: LogIndex) -> Self {
        let (purged_bytes, end_bytes) = written.byte_counts();
        let state = ReplicaLogState {
            issued: ReplicaHead {
                committed: written.committed(),
                ..written.head()
            },
            wiped: false,
            cached: VecDeque::new(),
            end_bytes,
            purged_bytes,
            seq: 0,
            synced: written.head().last,
            written,
            truncated: None,
            waiters: Vec::new(),
        };
        Self {
            key,
            state: Mutex::new(state),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, ReplicaLogState> {
        self.state.lock()
    }
}

fn wiped(key: ReplicaKey) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        format!("the log of replica {key} was wiped"),
    )
}

impl ReplicaLogState {
    fn check_append(&self, entries: &[LogEntry]) -> io::Result<()> {
        if self.wiped {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the log of this replica was wiped",
            ));
        }
        let mut last = self.issued.last;
        for entry in entries {
            let id = entry.id;
            if id.index != index_after(last)
                || id.index == u64::MAX
                || last.is_some_and(|last| id.term < last.term)
            {
                return Err(invalid(Contradiction::Entry { id, last }.to_string()));
            }
            last = Some(id);
        }
        let bytes: usize = entries.iter().map(entry_len).sum();
        if bytes > APPEND_BYTES_MAX {
            return Err(invalid(format!(
                "an append of {bytes} bytes: at most {APPEND_BYTES_MAX} are written at once"
            )));
        }
        Ok(())
    }

    fn append(&mut self, entries: Vec<LogEntry>) {
        for entry in entries {
            self.end_bytes += entry_len(&entry) as u64;
            self.issued.last = Some(entry.id);
            self.cached.push_back(CachedEntry {
                entry,
                seq: self.seq,
                end_bytes: self.end_bytes,
            });
        }
    }

    fn truncate_after(&mut self, index: Option<u64>) -> io::Result<LogChange> {
        let ReplicaHead { purged, last, .. } = self.issued;
        let next = index.map_or(0, |index| index.saturating_add(1));
        if next < index_after(purged) {
            return Err(invalid(format!(
                "a truncation after {index:?} of a log that is purged to {purged:?}"
            )));
        }
        if next >= index_after(last) {
            return Ok(LogChange::Nothing);
        }
        let to = index.and_then(|index| self.id(index));
        self.end_bytes = to.map_or(self.purged_bytes, |to| self.end_bytes_at(to.index));
        let kept =
            (next.saturating_sub(self.cached_first())).min(self.cached.len() as u64) as usize;
        self.cached.truncate(kept);
        self.issued.last = to;
        self.synced = earlier(self.synced, to);
        let limit = self.truncated.map_or(to, |(_, limit)| earlier(limit, to));
        self.truncated = Some((self.seq + 1, limit));
        Ok(LogChange::Truncate(to))
    }

    fn purge(&mut self, upto: LogId) -> io::Result<LogChange> {
        let ReplicaHead { purged, last, .. } = self.issued;
        if upto.index < index_after(purged) {
            return Ok(LogChange::Nothing);
        }
        let known = self.id(upto.index);
        if upto.index == u64::MAX || known.is_some_and(|known| known != upto) {
            return Err(invalid(format!(
                "a purge to {upto} of a log that ends at {last:?} and has {known:?} there"
            )));
        }
        self.purged_bytes = self.end_bytes_at(upto.index);
        let next = upto.index + 1;
        let gone = next
            .saturating_sub(self.cached_first())
            .min(self.cached.len() as u64) as usize;
        self.cached.drain(..gone);
        self.issued.purged = Some(upto);
        if index_after(last) <= next {
            self.issued.last = Some(upto);
        }
        Ok(LogChange::Purge(upto))
    }

    fn cached_first(&self) -> u64 {
        index_after(self.issued.last) - self.cached.len() as u64
    }

    fn cached(&self, index: u64) -> Option<&CachedEntry> {
        let at = index.checked_sub(self.cached_first())?;
        self.cached.get(usize::try_from(at).ok()?)
    }

    fn has(&self, index: u64) -> bool {
        (index_after(self.issued.purged)..index_after(self.issued.last)).contains(&index)
    }

    fn id(&self, index: u64) -> Option<LogId> {
        if let Some(purged) = self.issued.purged.filter(|purged| purged.index == index) {
            return Some(purged);
        }
        if !self.has(index) {
            return None;
        }
        match self.cached(index) {
            Some(cached) => Some(cached.entry.id),
            None => self.written.located(index).map(|located| LogId {
                term: located.term,
                index,
            }),
        }
    }

    fn end_bytes_at(&self, index: u64) -> u64 {
        if index < index_after(self.issued.purged) {
            return self.purged_bytes;
        }
        if !self.has(index) {
            return self.end_bytes;
        }
        let written = || self.written.located(index).map(|located| located.end_bytes);
        self.cached(index)
            .map(|cached| cached.end_bytes)
            .or_else(written)
            .unwrap_or(self.end_bytes)
    }

    fn bytes_since(&self, index: u64) -> u64 {
        self.end_bytes.saturating_sub(self.end_bytes_at(index))
    }

    pub fn live_bytes(&self) -> u64 {
        self.end_bytes.saturating_sub(self.purged_bytes)
    }

    fn plan_read(&self, range: Range<u64>, bytes_max: usize) -> Vec<EntrySource> {
        let mut plan = Vec::new();
        let mut bytes = 0;
        for index in range.start..range.end.min(index_after(self.issued.last)) {
            if !self.has(index) {
                break;
            }
            let (source, len) = match (self.cached(index), self.written.located(index)) {
                (Some(cached), _) => (
                    EntrySource::Memory(cached.entry.clone()),
                    entry_len(&cached.entry),
                ),
                (None, Some(located)) => (
                    EntrySource::Disk(
                        LogId {
                            term: located.term,
                            index,
                        },
                        located.spot,
                    ),
                    located.spot.len as usize,
                ),
                (None, None) => break,
            };
            bytes += len;
            if bytes > bytes_max && !plan.is_empty() {
                break;
            }
            plan.push(source);
        }
        plan
    }

    fn reads_from(&self, id: LogId, spot: EntryLocation) -> bool {
        self.has(id.index)
            && self
                .written
                .located(id.index)
                .is_some_and(|located| located.term == id.term && located.spot == spot)
    }

    fn is_synced(&self, id: LogId) -> bool {
        self.synced
            .is_some_and(|synced| synced.index >= id.index && synced >= id)
    }

    /// Notes that all that is written is synced, up to the operation `seq` of this replica. Returns
    /// who waited for that.
    pub fn set_synced(&mut self, seq: u64) -> Vec<Done> {
        if self.wiped {
            return Vec::new();
        }
        let mut synced = self.written.head().last;
        match self.truncated {
            Some((at, limit)) if at > seq => synced = earlier(synced, limit),
            _ => self.truncated = None,
        }
        self.synced = synced;
        let waiters = std::mem::take(&mut self.waiters);
        let (ready, waiting): (Vec<_>, Vec<_>) =
            waiters.into_iter().partition(|(id, _)| self.is_synced(*id));
        self.waiters = waiting;
        ready.into_iter().map(|(_, done)| done).collect()
    }

    /// Those who wait for what will never be synced.
    pub fn take_waiters(&mut self) -> Vec<Done> {
        std::mem::take(&mut self.waiters)
            .into_iter()
            .map(|(_, done)| done)
            .collect()
    }

    /// Drops cached entries of operations up to `seq`, which are synced.
    pub fn evict(&mut self, seq: u64) {
        let old = self
            .cached
            .iter()
            .take_while(|cached| cached.seq <= seq)
            .count();
        self.cached.drain(..old);
    }

    /// From here on every operation is refused. Returns the number of the wiping and who waited.
    pub fn wipe(&mut self) -> (u64, Vec<Done>) {
        self.wiped = true;
        self.cached.clear();
        self.issued = ReplicaHead::default();
        self.synced = None;
        self.purged_bytes = self.end_bytes;
        self.seq += 1;
        (self.seq, self.take_waiters())
    }
}

/// The one that ends earlier.
fn earlier(a: Option<LogId>, b: Option<LogId>) -> Option<LogId> {
    if index_after(a) <= index_after(b) {
        a
    } else {
        b
    }
}
