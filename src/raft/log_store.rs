//! [`LogStore`]: the shared log as openraft sees it, one replica's part of it.
//!
//! The log keeps the order of a replica's operations, in memory at once and on the disk later. So
//! votes and truncations are awaited, and an append tells openraft by its callback. A purge needs
//! neither, because nothing that follows it can become durable before it, and a failed sync fails
//! everything after it. A truncation is awaited because a snapshot may follow it, whose file is not
//! in the log.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{Stream, TryStreamExt, stream};
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, oneshot};

use super::types::{
    RaftEntry, RaftLogId, RaftVoteOf, Types, entry_from_raft, entry_to_raft, from_raft, to_raft,
    vote_from_raft, vote_to_raft,
};
use crate::mutants::{self, Mutant};
use crate::storage::log::{Done, ReplicaLog};
use crate::storage::map::{OnSynced, Synced};
use crate::types::LogId;

/// Bytes of entries in one append to a follower, and in one read for apply. At least one entry is
/// always read.
const READ_BYTES_MAX: usize = 1 << 20;

/// The log of one replica. Clones are the same log.
#[derive(Clone)]
pub struct LogStore {
    log: ReplicaLog,
    tip: Arc<Tip>,
}

/// The end of a replica's log, for tasks that wait until it grows.
#[derive(Debug)]
pub struct Tip {
    /// The last index plus one; zero if there is none.
    next: AtomicU64,
    grown: Arc<Notify>,
}

impl Tip {
    pub fn new(last: Option<u64>) -> Arc<Self> {
        let tip = Self {
            next: AtomicU64::new(0),
            grown: Arc::default(),
        };
        tip.set(last);
        Arc::new(tip)
    }

    /// Sets the last index, and wakes those that wait.
    pub fn set(&self, last: Option<u64>) {
        self.next
            .store(last.map_or(0, |last| last + 1), Ordering::Release);
        self.grown.notify_waiters();
    }

    /// Returns the last index.
    pub fn last(&self) -> Option<u64> {
        self.next.load(Ordering::Acquire).checked_sub(1)
    }

    /// Resolves when the log has grown after this call.
    pub fn grown(&self) -> OwnedNotified {
        self.grown.clone().notified_owned()
    }
}

impl LogStore {
    pub fn new(log: ReplicaLog) -> Self {
        let tip = Tip::new(log.state().last.map(|last| last.index));
        Self { log, tip }
    }

    /// Returns the end of the log, to wait on.
    pub fn tip(&self) -> &Arc<Tip> {
        &self.tip
    }

    /// Returns every entry of `range` that is in the log.
    async fn read_all(&self, range: Range<u64>) -> io::Result<Vec<RaftEntry>> {
        let mut entries = Vec::new();
        let mut next = range.start;
        while next < range.end {
            let part = self
                .log
                .read_elsewhere(next..range.end, READ_BYTES_MAX)
                .await?;
            let Some(last) = part.last() else { break };
            next = last.id.index + 1;
            entries.extend(
                part.into_iter()
                    .map(readable)
                    .collect::<io::Result<Vec<_>>>()?,
            );
        }
        Ok(entries)
    }

    /// Returns the part of `range` that the log holds.
    fn clamp(&self, range: &impl RangeBounds<u64>) -> Range<u64> {
        let state = self.log.state();
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(end) => end.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        let after = |id: Option<LogId>| id.map_or(0, |id| id.index + 1);
        start.max(after(state.purged))..end.min(after(state.last))
    }
}

/// Issues an operation and waits until it is durable.
async fn ended(operation: impl FnOnce(Done)) -> io::Result<()> {
    let (done, ended) = oneshot::channel();
    operation(Box::new(move |result| drop(done.send(result))));
    ended
        .await
        .map_err(|_| io::Error::other("the log was closed before that was done"))?
}

/// Issues an operation without waiting until it is durable. An error that is there at once is a
/// refusal.
fn issued(operation: impl FnOnce(Done)) -> io::Result<()> {
    let (done, mut ended) = oneshot::channel();
    operation(Box::new(move |result| drop(done.send(result))));
    ended.try_recv().unwrap_or(Ok(()))
}

fn readable(entry: crate::storage::log::LogEntry) -> io::Result<RaftEntry> {
    entry_to_raft(entry).map_err(io::Error::other)
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<R>(&mut self, range: R) -> io::Result<Vec<RaftEntry>>
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.read_all(self.clamp(&range)).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVoteOf>> {
        Ok(self.log.state().vote.as_ref().and_then(vote_to_raft))
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> io::Result<Vec<RaftEntry>> {
        let entries = self.log.read_elsewhere(start..end, READ_BYTES_MAX).await?;
        entries.into_iter().map(readable).collect()
    }

    /// Reads piece by piece, so that a long log is never in memory at once.
    async fn entries_stream<R>(
        &mut self,
        range: R,
    ) -> impl Stream<Item = io::Result<RaftEntry>> + OptionalSend
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let parts = stream::try_unfold(
            (self.clone(), self.clamp(&range)),
            |(store, rest)| async move {
                if rest.is_empty() {
                    return Ok(None);
                }
                let part = store
                    .log
                    .read_elsewhere(rest.clone(), READ_BYTES_MAX)
                    .await?;
                let Some(next) = part.last().map(|last| last.id.index + 1) else {
                    return Ok(None);
                };
                Ok::<_, io::Error>(Some((
                    stream::iter(part.into_iter().map(readable)),
                    (store, next..rest.end),
                )))
            },
        );
        Box::pin(parts.try_flatten())
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let state = self.log.state();
        Ok(LogState {
            last_purged_log_id: state.purged.map(to_raft),
            last_log_id: state.last.or(state.purged).map(to_raft),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVoteOf) -> io::Result<()> {
        if mutants::is_on(Mutant::VoteNotWritten) {
            return Ok(());
        }
        let vote = vote_from_raft(vote);

        // A vote that goes back would let this replica vote twice in one term.
        let saved = self.log.state().vote;
        assert!(
            saved.is_none_or(|saved| (saved.term, saved.committed) <= (vote.term, vote.committed)),
            "a vote only grows: {vote:?} after {saved:?}"
        );
        ended(|done| self.log.save_vote(vote, done)).await
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> io::Result<()> {
        let committed = match mutants::is_on(Mutant::CommittedAhead) {
            true => self.log.state().last,
            false => committed.as_ref().map(from_raft),
        };
        self.log.save_committed(committed);
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<RaftLogId>> {
        Ok(self.log.committed().map(to_raft))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries.into_iter().map(entry_from_raft).collect();
        assert!(
            entries
                .windows(2)
                .all(|pair| pair[0].id.index + 1 == pair[1].id.index
                    && pair[0].id.term <= pair[1].id.term),
            "an append has a gap, or a term that falls"
        );

        let last = entries.last().map(|last| last.id.index);
        self.log.append(
            entries,
            Box::new(move |result| callback.io_completed(result)),
        )?;

        // After the append, because those who are woken read the entries at once.
        if last.is_some() {
            self.tip.set(last);
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<RaftLogId>) -> io::Result<()> {
        ended(|done| self.log.truncate_after(last.map(|id| id.index()), done)).await
    }

    async fn purge(&mut self, log_id: RaftLogId) -> io::Result<()> {
        issued(|done| self.log.purge(from_raft(&log_id), done))
    }
}

/// Lets a checkpoint wait until the log is durable.
impl Synced for ReplicaLog {
    fn on_synced(&self, log_id: LogId, done: OnSynced) {
        ReplicaLog::on_synced(self, log_id, done);
    }
}
