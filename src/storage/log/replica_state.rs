//! What is issued of one replica's log: its ids, the entries that are cached, and who waits for the
//! disk. The handles change it, the writer says how far it is synced.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use parking_lot::{Mutex, MutexGuard};

use super::change::{LogChange, invalid};
use super::index::{Contradiction, EntryLocation, LogIndex, index_after};
use super::record::{ReplicaHead, entry_len};
use super::{Done, LogEntry};
use crate::mutants::{self, Mutant};
use crate::storage::ReplicaKey;
use crate::types::LogId;

/// One append may take so much at most: offsets within a segment stay below 4 GiB.
const APPEND_BYTES_MAX: usize = 1 << 30;

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
    pub fn in_memory(self) -> Option<LogEntry> {
        match self {
            EntrySource::Memory(entry) => Some(entry),
            EntrySource::Disk(..) => None,
        }
    }
}

struct CachedEntry {
    entry: LogEntry,
    pub seq: u64,
    end_bytes: u64,
}

pub(super) struct ReplicaLogState {
    pub issued: ReplicaHead,
    pub wiped: bool,
    /// The entries up to the last one; from which on is decided by eviction.
    cached: VecDeque<CachedEntry>,
    end_bytes: u64,
    purged_bytes: u64,
    pub seq: u64,
    pub written: LogIndex,
    pub synced: Option<LogId>,
    /// The latest truncation that may not be synced, and the least that one of those kept.
    truncated: Option<(u64, Option<LogId>)>,
    pub waiters: Vec<(LogId, Done)>,
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

pub(super) fn wiped(key: ReplicaKey) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        format!("the log of replica {key} was wiped"),
    )
}

impl ReplicaLogState {
    /// Asserts that the cache ends with the last entry and lies behind the purge point, and that
    /// nothing is held for durable that is not there.
    pub fn check_invariants(&self) {
        let ReplicaHead { purged, last, .. } = self.issued;
        assert!(
            index_after(purged) <= index_after(last),
            "purged to {purged:?} past the last entry {last:?}"
        );
        assert!(
            self.cached.len() as u64 <= index_after(last) - index_after(purged),
            "more entries cached than there are"
        );
        if let Some(newest) = self.cached.back() {
            assert_eq!(Some(newest.entry.id), last, "the cache ends before the log");
            assert!(
                newest.seq <= self.seq,
                "an operation of the future is cached"
            );
        }
        assert!(
            index_after(self.synced) <= index_after(last),
            "synced to {:?} past the last entry {last:?}",
            self.synced
        );
        assert!(self.purged_bytes <= self.end_bytes);
    }

    pub fn check_append(&self, entries: &[LogEntry]) -> io::Result<()> {
        if self.wiped {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the log of this replica was wiped",
            ));
        }
        let mut last = self.issued.last;

        // Replay takes a gap or a falling term for damage, so neither may be written.
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

    pub fn append(&mut self, entries: Vec<LogEntry>) {
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

    pub fn truncate_after(&mut self, index: Option<u64>) -> io::Result<LogChange> {
        let ReplicaHead { purged, last, .. } = self.issued;
        let next = index.map_or(0, |index| index.saturating_add(1));

        // What was purged is committed, and Raft never removes that.
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

        // What was synced past the cut is no longer in the log.
        self.synced = earlier(self.synced, to);
        let limit = self.truncated.map_or(to, |(_, limit)| earlier(limit, to));
        self.truncated = Some((self.seq + 1, limit));
        if mutants::is_on(Mutant::TruncationNotLogged) {
            return Ok(LogChange::Nothing);
        }
        Ok(LogChange::Truncate(to))
    }

    pub fn purge(&mut self, upto: LogId) -> io::Result<LogChange> {
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

        // A snapshot may be ahead of the log, which then continues after it.
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

    pub fn id(&self, index: u64) -> Option<LogId> {
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

    pub fn bytes_since(&self, index: u64) -> u64 {
        self.end_bytes.saturating_sub(self.end_bytes_at(index))
    }

    pub fn live_bytes(&self) -> u64 {
        self.end_bytes.saturating_sub(self.purged_bytes)
    }

    pub fn plan_read(&self, range: Range<u64>, bytes_max: usize) -> Vec<EntrySource> {
        let mut plan = Vec::new();
        let mut bytes = 0;
        for index in range.start..range.end.min(index_after(self.issued.last)) {
            if !self.has(index) {
                break;
            }

            // Under the lock only the place is noted: a read would hold up the writer.
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

            // At least one entry, or a follower would never get one above the limit.
            if bytes > bytes_max && !plan.is_empty() {
                break;
            }
            plan.push(source);
        }
        plan
    }

    pub fn reads_from(&self, id: LogId, spot: EntryLocation) -> bool {
        self.has(id.index)
            && self
                .written
                .located(id.index)
                .is_some_and(|located| located.term == id.term && located.spot == spot)
    }

    pub fn is_synced(&self, id: LogId) -> bool {
        self.synced
            .is_some_and(|synced| synced.index >= id.index && synced >= id)
    }

    /// Notes that all that is written is synced, up to the operation `seq` of this replica. Returns
    /// who waited for that.
    pub fn set_synced(&mut self, seq: u64) -> Vec<Done> {
        if self.wiped {
            return Vec::new();
        }
        assert!(
            seq <= self.seq,
            "an operation was synced before it was issued"
        );
        let mut synced = self.written.head().last;

        // A truncation that is still on its way: what it kept is all that may be relied on.
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
