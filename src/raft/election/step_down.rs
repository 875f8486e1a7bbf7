//! How a leader that is held up by its own node gives its group to a replica that is not.
//!
//! openraft saves its vote before it does anything else, and a disk that hangs never saves it: once
//! another replica asks for the vote of this one, its core waits for the disk, and what it says of
//! itself is of before. So a leader that steps down says that it leads no more from the moment on
//! at which it has asked another to lead, for as long as its term is the same; clients are then
//! sent away at once instead of waiting for a core that does not answer.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::task::coop::unconstrained;
use tokio::time::Instant;

use crate::raft::errors::TransferError;
use crate::raft::registry::Registry;
use crate::raft::replica::Replica;
use crate::raft::status::{ReplicaWatch, Role};
use crate::raft::types::from_raft;
use crate::sm::ports::{Direction, Items, KeyRange, Pairs, Read, StoreError, ValueStart};
use crate::storage::ReplicaKey;
use crate::types::{LogId, ReplicaId};

/// How long the next leader may take.
const STEP_DOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// A successor was heard of within this.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// Until what the core has just done is seen by those who watch it.
const SEEN_AFTER: Duration = Duration::from_millis(200);

/// How far a replica is, for who watches whether it gets further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaProgress {
    pub key: ReplicaKey,
    pub leads: bool,
    pub committed: u64,
    /// On the disk of this node.
    pub synced: u64,
    pub applied: u64,
    /// Nothing is to be applied: another map takes the place of this one, or the replica has
    /// failed, which is told elsewhere.
    pub is_held: bool,
    /// For how long one entry has been applied that is not done, since it last read something of
    /// the map.
    pub applying: Option<Duration>,
}

impl Registry {
    /// Returns how far every replica of this node is, witnesses too.
    pub fn progress(&self) -> Vec<ReplicaProgress> {
        let mut all = Vec::new();
        self.with_groups(|group| all.push(group.progress()));
        all
    }
}

impl Replica {
    fn progress(&self) -> ReplicaProgress {
        let index = |id: Option<LogId>| id.map_or(0, |id| id.index);
        let committed = self
            .raft
            .data_metrics()
            .borrow_watched()
            .local_committed
            .as_ref()
            .map(from_raft);
        ReplicaProgress {
            key: self.key(),
            leads: self.leads(),
            committed: index(committed),
            synced: index(self.log.synced()),
            applied: index(self.apply_state.store.applied().log_id),
            is_held: self.apply_state.hold.is_set()
                || self.apply_state.is_installing()
                || self.apply_state.failure().is_some(),
            applying: self.apply_state.applying(),
        }
    }

    /// Returns whether this replica has given up its lead, as far as `watch` goes.
    pub(in crate::raft) fn has_stepped_down(&self, watch: &ReplicaWatch) -> bool {
        watch.role == Role::Leader && self.stepped_down.load(Ordering::Relaxed) == watch.term
    }

    /// Returns the voter with a map that has synced all that is committed and was heard of most
    /// lately, if one was.
    pub fn faster_successor(&self) -> Option<ReplicaId> {
        let complete = self.complete();
        let (key, watch) = (self.key(), self.watch.borrow());
        let membership = &watch.membership;
        let others = membership.voters.iter().filter(|(replica, _)| {
            **replica != key.replica
                && !membership.is_witness(**replica)
                && complete.contains(replica)
        });
        let heard = others
            .filter_map(|(replica, node)| Some((self.context.lanes.last_heard(*node)?, *replica)));
        heard
            .filter(|(at, _)| at.elapsed() < HEARD_WITHIN)
            .max()
            .map(|(_, replica)| replica)
    }

    /// Has that replica lead, and leads no more itself from here on.
    ///
    /// # Errors
    ///
    /// When it is not known to lead within some time. This replica then leads on, if its core still
    /// answers.
    pub async fn step_down(&self, to: ReplicaId) -> Result<(), TransferError> {
        let term = self.watch.borrow().term;
        let mut transfer = pin!(self.transfer_leader_within(to, STEP_DOWN_TIMEOUT));
        // The first poll looks whether it leads, and begins.
        if let Some(ended) = unconstrained(transfer.as_mut()).now_or_never() {
            return ended;
        }
        self.stepped_down.store(term, Ordering::Relaxed);
        let Err(error) = transfer.await else {
            return Ok(());
        };

        // It waits for the disk, or has failed to hand over. In the first case nobody hears of it
        // until the disk is back.
        let _ = self.raft.with_raft_state(|_| ()).await;
        tokio::time::sleep(SEEN_AFTER).await;
        let now = self.watch.borrow().clone();
        if now.term == term && now.role == Role::Leader {
            self.stepped_down.store(0, Ordering::Relaxed);
            return Err(error);
        }
        Ok(())
    }
}

/// Marks that an entry is being applied, until it is dropped. Each read of the map counts as a step
/// of it: a disk that is slow takes long for many, and a new start would begin with a cold cache.
pub(in crate::raft) struct ApplyProgress<'a>(&'a parking_lot::Mutex<Option<Instant>>);

impl<'a> ApplyProgress<'a> {
    pub fn begin(since: &'a parking_lot::Mutex<Option<Instant>>) -> Self {
        let applying = Self(since);
        applying.step();
        applying
    }

    fn step(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    fn counted<'b, V: 'b>(&'b self, items: Items<'b, V>) -> Items<'b, V> {
        Box::new(items.inspect(|_| self.step()))
    }
}

/// What an entry reads, each of which is a step of applying it.
pub(in crate::raft) struct ProgressRead<'a, R> {
    pub read: &'a R,
    pub applying: &'a ApplyProgress<'a>,
}

impl<R: Read> Read for ProgressRead<'_, R> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let value = self.read.get(key);
        self.applying.step();
        value
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        let start = self.read.start_of(key, bytes_max);
        self.applying.step();
        start
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        self.applying.counted(self.read.scan(range, direction))
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        self.applying
            .counted(self.read.scan_starts(range, direction, bytes_max))
    }
}

impl Drop for ApplyProgress<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_entry_that_reads_its_map_slowly_gets_further_with_each_read() {
        let since = parking_lot::Mutex::new(None);
        let still = || since.lock().map(|since: Instant| since.elapsed());
        let map = ["a", "b"]
            .map(|key| (Bytes::from(key), Bytes::from("v")))
            .into_iter()
            .collect::<BTreeMap<_, _>>();
        let later = Duration::from_secs(50);
        let applying = ApplyProgress::begin(&since);
        let read = ProgressRead {
            read: &map,
            applying: &applying,
        };
        let all = KeyRange {
            start: Bytes::new(),
            end: None,
        };

        tokio::time::advance(later).await;
        assert_eq!(still(), Some(later));
        read.get(b"a").expect("a map in memory");
        assert_eq!(still(), Some(Duration::ZERO));
        tokio::time::advance(later).await;
        read.start_of(b"a", 1).expect("a map in memory");
        assert_eq!(still(), Some(Duration::ZERO));
        for _ in read.scan(&all, Direction::Forward) {
            assert_eq!(still(), Some(Duration::ZERO));
            tokio::time::advance(later).await;
        }
        for _ in read.scan_starts(&all, Direction::Reverse, 1) {
            assert_eq!(still(), Some(Duration::ZERO));
            tokio::time::advance(later).await;
        }
        assert_eq!(still(), Some(later));
        drop(applying);
        assert_eq!(still(), None);
    }
}
