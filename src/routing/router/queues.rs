//! Requests that wait for the leader of a shard: one of them asks for all.
//!
//! Each of thousands that wait would otherwise ask ten times a second, when an answer to any of
//! them says what all want to know. So the attempts at a shard that does not answer are spaced as
//! those of one request are; when one is answered, or the leader is heard of otherwise, all go on.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::pause::pause_after;
use crate::types::GroupId;

/// Those who go on together are spread by so much each, at random: the leader has just begun.
const SPREAD_EACH: Duration = Duration::from_micros(10);

/// Access to a shard that requests wait for. One whose disk is full may read, and not write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum AwaitedAccess {
    Read,
    Write,
}

/// The queues of all shards that requests wait for.
#[derive(Debug, Default)]
pub(super) struct LeaderQueues {
    shards: Mutex<HashMap<(GroupId, AwaitedAccess), Arc<LeaderQueue>>>,
    /// Number of requests that wait, for whichever shard.
    waiting: AtomicUsize,
}

/// Those who wait for one shard.
#[derive(Debug)]
pub(super) struct LeaderQueue {
    state: Mutex<QueueState>,
    /// Held by the one whose turn is next: only that one minds the time.
    scout: tokio::sync::Mutex<()>,
    answered: Notify,
}

#[derive(Debug)]
struct QueueState {
    waiting: usize,
    /// Number of attempts since the shard was last heard of.
    attempts: u32,
    /// Time at which the next may be made.
    next: Instant,
}

/// A place in the queue of a shard.
pub(super) struct QueuePlace<'a> {
    queues: &'a LeaderQueues,
    awaited: (GroupId, AwaitedAccess),
    queue: Arc<LeaderQueue>,
}

impl LeaderQueues {
    /// Begins to wait for a shard, at which so many attempts failed before the last.
    pub fn enter(
        &self,
        awaited: (GroupId, AwaitedAccess),
        attempts: u32,
        random: u64,
    ) -> QueuePlace<'_> {
        let mut shards = self.shards.lock();
        let queue = Arc::clone(
            shards
                .entry(awaited)
                .or_insert_with(|| Arc::new(LeaderQueue::new(attempts, random))),
        );
        queue.state.lock().waiting += 1;
        self.waiting.fetch_add(1, Ordering::Relaxed);
        QueuePlace {
            queues: self,
            awaited,
            queue,
        }
    }

    /// Wakes those who wait for a shard to do what it has done now. Where writes are
    /// taken, reads are too.
    pub fn answered(&self, shard: GroupId, done: AwaitedAccess) {
        // Every answered request comes by here. Nearly always nobody waits: then no lock is taken.
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return;
        }
        let wants: &[AwaitedAccess] = match done {
            AwaitedAccess::Read => &[AwaitedAccess::Read],
            AwaitedAccess::Write => &[AwaitedAccess::Read, AwaitedAccess::Write],
        };
        for want in wants {
            let queue = self.shards.lock().get(&(shard, *want)).cloned();
            let Some(queue) = queue else { continue };

            // The shard lives, so those who wait for it next begin again with short pauses.
            queue.state.lock().attempts = 0;
            queue.answered.notify_waiters();
        }
    }
}

impl LeaderQueue {
    fn new(attempts: u32, random: u64) -> Self {
        let next = Instant::now() + pause_after(attempts, random);
        let state = QueueState {
            waiting: 0,
            attempts: attempts.saturating_add(1),
            next,
        };
        Self {
            state: Mutex::new(state),
            scout: tokio::sync::Mutex::default(),
            answered: Notify::new(),
        }
    }

    /// Takes the next attempt, if it may be made now; else the time when it may.
    fn take_turn(&self, random: u64) -> Result<(), Instant> {
        let now = Instant::now();
        let mut state = self.state.lock();

        // Checked and moved on under one lock: two that wait can't both take the same attempt.
        if now < state.next {
            return Err(state.next);
        }
        state.next = now + pause_after(state.attempts, random);
        state.attempts = state.attempts.saturating_add(1);
        Ok(())
    }
}

impl QueuePlace<'_> {
    /// Returns when an attempt may be made: it is this one's turn, or the shard has answered
    /// another. `lead_changed` ends the wait too.
    pub async fn wait(&self, lead_changed: impl Future<Output = ()>, random: u64) {
        let mut answered = std::pin::pin!(self.queue.answered.notified());

        // Enrolled before anything is awaited, so that an answer that comes just now is not missed.
        answered.as_mut().enable();
        let turn = async {
            // The others wait for the lock and have no timers, however many they are.
            let _scout = self.queue.scout.lock().await;
            while let Err(next) = self.queue.take_turn(random) {
                tokio::time::sleep_until(next).await;
            }
        };
        tokio::select! {
            () = turn => {}
            () = answered => self.spread(random).await,
            () = lead_changed => self.spread(random).await,
        }
    }

    async fn spread(&self, random: u64) {
        // Thousands that come at once would overload a leader in its first moment.
        let waiting = self.queue.state.lock().waiting;
        let span = SPREAD_EACH
            .saturating_mul(u32::try_from(waiting.saturating_sub(1)).unwrap_or(u32::MAX));
        let span_us = u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        if span_us > 0 {
            tokio::time::sleep(Duration::from_micros(random % span_us)).await;
        }
    }
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        self.queues.waiting.fetch_sub(1, Ordering::Relaxed);
        let mut shards = self.queues.shards.lock();
        let mut state = self.queue.state.lock();
        state.waiting -= 1;

        // `enter` takes the lock on `shards` too, so nobody joins a queue that is removed here.
        if state.waiting == 0 {
            shards.remove(&self.awaited);
        }
    }
}
