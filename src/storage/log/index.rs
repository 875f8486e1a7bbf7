//! What the records of the log amount to for one replica, and where its live entries are.
//!
//! The writer and the replay both go through [`LogIndex::apply`], record by record, so what is in
//! memory is what a replay would find. The invariant: entries are contiguous from the purge point
//! to the last id; only a truncate record shortens them at the end.

use std::collections::{BTreeMap, VecDeque};

use super::record::{LogRecord, ReplicaHead};
use crate::types::LogId;

/// Location of one record in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EntryLocation {
    pub segment: u64,
    /// Segments stay below 4 GiB: see the sizes that `append` refuses.
    pub offset: u32,
    pub len: u32,
}

/// An entry on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LocatedEntry {
    pub term: u64,
    pub spot: EntryLocation,
    /// Bytes of the replica's entries up to the end of this one, from an arbitrary start: only
    /// differences mean something.
    pub end_bytes: u64,
}

/// Counts the live entries of each segment.
#[derive(Debug, Default)]
pub(super) struct LiveBytes {
    entries: BTreeMap<u64, u64>,
    pub bytes: u64,
}

impl LiveBytes {
    fn add(&mut self, entry: &LocatedEntry) {
        *self.entries.entry(entry.spot.segment).or_default() += 1;
        self.bytes += u64::from(entry.spot.len);
    }

    fn remove(&mut self, entries: impl Iterator<Item = LocatedEntry>) {
        for entry in entries {
            if let Some(count) = self.entries.get_mut(&entry.spot.segment) {
                *count -= 1;
                if *count == 0 {
                    self.entries.remove(&entry.spot.segment);
                }
            }
            self.bytes -= u64::from(entry.spot.len);
        }
    }

    /// The oldest segment that holds a live entry.
    pub fn oldest(&self) -> Option<u64> {
        self.entries.keys().next().copied()
    }
}

/// The reason why a record cannot follow those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Contradiction {
    #[error("entry {id} does not follow {last:?}")]
    Entry { id: LogId, last: Option<LogId> },
    #[error("a truncation to {to:?} of a log that is purged to {purged:?} and ends at {last:?}")]
    Truncate {
        to: Option<LogId>,
        purged: Option<LogId>,
        last: Option<LogId>,
    },
    #[error("a purge to {upto} of a log that is purged to {purged:?} and ends at {last:?}")]
    Purge {
        upto: LogId,
        purged: Option<LogId>,
        last: Option<LogId>,
    },
    #[error("a rebase that does not restate the replica as it was")]
    Restate,
    #[error("a record of another kind within a rebase, or of a rebase outside of one")]
    Interrupted,
}

/// One replica as the log has it.
#[derive(Debug, Default)]
pub(super) struct LogIndex {
    head: ReplicaHead,
    /// The last of the live entries: all from `missing_until` on.
    entries: VecDeque<LocatedEntry>,
    end_bytes: u64,
    purged_bytes: u64,
    /// Entries below this index are in segments that are gone. Only while a replay has not yet come
    /// to what purged or restated them.
    missing_until: u64,
    restating: Option<VecDeque<LocatedEntry>>,
}

pub(super) fn index_after(id: Option<LogId>) -> u64 {
    id.map_or(0, |id| id.index.saturating_add(1))
}

impl LogIndex {
    /// A replica at the begin of the first segment: its entries, if any, are not known.
    pub fn restated(head: ReplicaHead) -> Self {
        Self {
            head,
            missing_until: index_after(head.last),
            ..Self::default()
        }
    }

    pub fn head(&self) -> ReplicaHead {
        self.head
    }

    /// Returns the number of entries that are known to be live but were not found.
    pub fn missing(&self) -> u64 {
        self.missing_until
            .saturating_sub(index_after(self.head.purged))
    }

    pub fn located(&self, index: u64) -> Option<&LocatedEntry> {
        let at = index.checked_sub(self.first())?;
        self.entries.get(usize::try_from(at).ok()?)
    }

    /// The live entries with their indexes.
    pub fn entries(&self) -> impl Iterator<Item = (u64, &LocatedEntry)> {
        (self.first()..).zip(&self.entries)
    }

    /// Returns the index of the last live entry in this segment or one before it.
    pub fn last_through(&self, segment: u64) -> Option<u64> {
        let count = self
            .entries
            .partition_point(|entry| entry.spot.segment <= segment) as u64;
        (count > 0).then(|| self.first() + count - 1)
    }

    pub fn live_bytes(&self) -> u64 {
        self.end_bytes - self.purged_bytes
    }

    /// Returns whether the entry with this id is here, or was and is purged.
    pub fn has_entry(&self, id: LogId) -> bool {
        id.index < index_after(self.head.purged)
            || self
                .located(id.index)
                .is_some_and(|entry| entry.term == id.term)
    }

    /// The id through which the entries that are here are known to be committed. The one that a
    /// record states counts only while its entry is here: earlier versions could write it before
    /// that, and what is in the entry's place may be another, to be replaced.
    pub fn committed(&self) -> Option<LogId> {
        self.head
            .committed
            .filter(|id| self.has_entry(*id))
            .or(self.head.purged)
    }

    /// Returns the byte counts of a replica at its purge point and at its end.
    pub fn byte_counts(&self) -> (u64, u64) {
        (self.purged_bytes, self.end_bytes)
    }

    fn first(&self) -> u64 {
        index_after(self.head.last) - self.entries.len() as u64
    }

    /// Asserts that the entries are contiguous up to the last, and what is counted of them. Looks
    /// at both ends only, since it runs after every record.
    fn check_invariants(&self) {
        let ReplicaHead { purged, last, .. } = self.head;
        assert!(
            index_after(purged) <= index_after(last),
            "purged to {purged:?} past the last entry {last:?}"
        );
        assert!(
            self.entries.len() as u64 <= index_after(last) - index_after(purged),
            "more live entries than between {purged:?} and {last:?}"
        );
        assert!(
            index_after(self.committed()) <= index_after(last),
            "committed past the last entry {last:?}"
        );
        assert!(self.purged_bytes <= self.end_bytes);
        if let (Some(front), Some(back)) = (self.entries.front(), self.entries.back()) {
            assert_eq!(Some(back.term), last.map(|last| last.term));
            assert_eq!(back.end_bytes, self.end_bytes, "bytes up to the last entry");
            assert!(front.term <= back.term, "terms go down in a log");
        }
    }

    /// Follows one record of this replica, other than its creation and wiping.
    pub fn apply(
        &mut self,
        record: &LogRecord,
        spot: EntryLocation,
        live: &mut LiveBytes,
    ) -> Result<(), Contradiction> {
        self.follow(record, spot, live)?;
        if cfg!(debug_assertions) {
            self.check_invariants();
        }
        Ok(())
    }

    fn follow(
        &mut self,
        record: &LogRecord,
        spot: EntryLocation,
        live: &mut LiveBytes,
    ) -> Result<(), Contradiction> {
        // A rebase is written in one batch, so no other record can be inside it.
        match record {
            LogRecord::Restated(entry) => return self.restate_entry(entry.id, spot, live),
            _ if self.restating.is_some() => return Err(Contradiction::Interrupted),
            _ => {}
        }
        match record {
            LogRecord::Vote(vote) => self.head.vote = Some(*vote),
            LogRecord::Committed(id) => self.head.committed = *id,
            LogRecord::Entry(entry) => self.append(entry.id, spot, live)?,
            LogRecord::Truncate(to) => self.truncate(*to, live)?,
            LogRecord::Purge(upto) => self.purge(*upto, live)?,
            LogRecord::Restate(head) => {
                if *head != self.head {
                    return Err(Contradiction::Restate);
                }
                self.restating = Some(VecDeque::new());

                // A replica without live entries is complete at once.
                self.finish_restating(live);
            }
            LogRecord::Head(_)
            | LogRecord::Mark
            | LogRecord::Create
            | LogRecord::Wipe
            | LogRecord::Restated(_) => {
                return Err(Contradiction::Interrupted);
            }
        }
        Ok(())
    }

    /// Gives up a rebase whose last entries were never written: what it would have replaced still
    /// stands.
    pub fn abandon_restating(&mut self) {
        self.restating = None;
    }

    /// Takes all its entries out of `live`.
    pub fn wipe(&mut self, live: &mut LiveBytes) {
        live.remove(self.entries.drain(..));
    }

    fn append(
        &mut self,
        id: LogId,
        spot: EntryLocation,
        live: &mut LiveBytes,
    ) -> Result<(), Contradiction> {
        let last = self.head.last;
        if id.index != index_after(last) || last.is_some_and(|last| id.term < last.term) {
            return Err(Contradiction::Entry { id, last });
        }
        self.end_bytes += u64::from(spot.len);
        let located = LocatedEntry {
            term: id.term,
            spot,
            end_bytes: self.end_bytes,
        };
        live.add(&located);
        self.entries.push_back(located);
        self.head.last = Some(id);
        Ok(())
    }

    fn truncate(&mut self, to: Option<LogId>, live: &mut LiveBytes) -> Result<(), Contradiction> {
        let ReplicaHead { purged, last, .. } = self.head;

        // Entries from before the first segment are unknown during replay and can't be compared.
        let is_known = to
            .and_then(|to| self.located(to.index))
            .map(|entry| entry.term);
        let agrees = is_known.is_none_or(|term| to.is_some_and(|to| to.term == term));
        if index_after(to) < index_after(purged) || index_after(to) > index_after(last) || !agrees {
            return Err(Contradiction::Truncate { to, purged, last });
        }
        let first = self.first();
        let next_index = index_after(to)
            .saturating_sub(first)
            .min(self.entries.len() as u64) as usize;
        live.remove(self.entries.drain(next_index..));
        self.missing_until = self.missing_until.min(index_after(to));
        self.end_bytes = self
            .entries
            .back()
            .map_or(self.purged_bytes, |entry| entry.end_bytes);
        self.head.last = to;
        Ok(())
    }

    fn purge(&mut self, upto: LogId, live: &mut LiveBytes) -> Result<(), Contradiction> {
        let ReplicaHead { purged, last, .. } = self.head;
        let known = self.located(upto.index).map(|entry| entry.term);
        if upto.index < index_after(purged) || known.is_some_and(|term| term != upto.term) {
            return Err(Contradiction::Purge { upto, purged, last });
        }
        let first = self.first();
        let gone = (upto.index.saturating_add(1))
            .saturating_sub(first)
            .min(self.entries.len() as u64) as usize;
        if let Some(entry) = gone.checked_sub(1).and_then(|at| self.entries.get(at)) {
            self.purged_bytes = entry.end_bytes;
        }
        live.remove(self.entries.drain(..gone));

        // A snapshot may purge past the end: the log then goes on behind it.
        self.head.purged = Some(upto);
        if index_after(last) <= upto.index.saturating_add(1) {
            self.head.last = Some(upto);
        }
        Ok(())
    }

    fn restate_entry(
        &mut self,
        id: LogId,
        spot: EntryLocation,
        live: &mut LiveBytes,
    ) -> Result<(), Contradiction> {
        let start = index_after(self.head.purged);
        let known = self.located(id.index).map(|entry| entry.term);
        let Some(restating) = &mut self.restating else {
            return Err(Contradiction::Interrupted);
        };

        // Other entries, or another order, would replace this log by a different one.
        if id.index != start + restating.len() as u64 || known.is_some_and(|term| term != id.term) {
            return Err(Contradiction::Restate);
        }
        let end_bytes = restating
            .back()
            .map_or(self.purged_bytes, |entry| entry.end_bytes)
            + u64::from(spot.len);
        restating.push_back(LocatedEntry {
            term: id.term,
            spot,
            end_bytes,
        });
        self.finish_restating(live);
        Ok(())
    }

    fn finish_restating(&mut self, live: &mut LiveBytes) {
        let count = index_after(self.head.last).saturating_sub(index_after(self.head.purged));
        if let Some(restated) = self
            .restating
            .take_if(|restated| restated.len() as u64 == count)
        {
            // Only a complete rebase counts. Until then the old places hold, so a crash loses
            // nothing.
            live.remove(self.entries.drain(..));
            restated.iter().for_each(|entry| live.add(entry));
            self.end_bytes = restated
                .back()
                .map_or(self.purged_bytes, |entry| entry.end_bytes);
            self.entries = restated;

            // Every live entry is now at a known place, whatever older segments are gone.
            self.missing_until = 0;
        }
    }
}
