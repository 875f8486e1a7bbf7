//! The one queue between all replicas and the writer.
//!
//! Bounded by its users: an append is never refused for room, since Raft could not bear that, but
//! [`LogQueue::bytes`] is published so that proposers wait. The invariant: once a refusal is set,
//! nothing enters, and its reason is what everyone gets.

use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use super::change::LogChange;
use super::replica_state::ReplicaLogInner;
use super::{Done, LogFailure};
use crate::storage::ReplicaKey;
use crate::types::LogId;

/// An operation that waits for the writer.
pub(super) struct LogOp {
    pub replica: Arc<ReplicaLogInner>,
    /// Counts the operations of the replica.
    pub seq: u64,
    pub change: LogChange,
    pub done: Done,
}

/// The operations that the writer takes from the queue at once.
#[derive(Default)]
pub(super) struct QueuedWork {
    pub ops: Vec<LogOp>,
    /// Committed ids that wait for any write to go along with.
    pub committed: BTreeMap<ReplicaKey, Option<LogId>>,
}

#[derive(Default)]
struct LogQueueState {
    ops: VecDeque<LogOp>,
    bytes: usize,
    committed: BTreeMap<ReplicaKey, Option<LogId>>,
    closing: bool,
    refusal: Option<LogFailure>,
}

#[derive(Default)]
pub(super) struct LogQueue {
    state: Mutex<LogQueueState>,
    wake_thread: Condvar,
    wake_task: Notify,
}

impl LogQueue {
    /// Queues an operation, or gives it back with the reason. The caller holds the replica, so that
    /// its operations keep their order.
    pub fn push(&self, op: LogOp) -> Result<(), (LogOp, LogFailure)> {
        let mut state = self.lock();
        if let Some(refusal) = &state.refusal {
            return Err((op, refusal.clone()));
        }
        state.bytes += op.change.bytes();
        state.ops.push_back(op);
        drop(state);
        self.wake();
        Ok(())
    }

    /// Keeps the id until something else is written.
    pub fn set_committed(&self, key: ReplicaKey, id: Option<LogId>) {
        let mut state = self.lock();
        if state.refusal.is_none() {
            state.committed.insert(key, id);
        }
    }

    /// Takes back an id whose entry is not written yet, unless there is a newer one.
    pub fn return_committed(&self, key: ReplicaKey, id: LogId) {
        self.lock().committed.entry(key).or_insert(Some(id));
    }

    /// Bytes that wait for the writer.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    pub fn refusal(&self) -> Option<LogFailure> {
        self.lock().refusal.clone()
    }

    /// Refuses what comes from now on. What waits is still written.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closing = true;

        // A failure that came before is the true reason, and stays.
        state.refusal.get_or_insert_with(LogFailure::closed);
        drop(state);
        self.wake();
    }

    /// Refuses everything for `reason`, and hands back what waited.
    pub fn fail(&self, reason: LogFailure) -> Vec<LogOp> {
        let mut state = self.lock();
        state.refusal = Some(reason);
        state.closing = true;
        state.bytes = 0;
        state.committed.clear();
        let ops = std::mem::take(&mut state.ops).into();
        drop(state);
        self.wake();
        ops
    }

    pub fn is_closing(&self) -> bool {
        self.lock().closing
    }

    pub fn is_empty(&self) -> bool {
        self.lock().ops.is_empty()
    }

    /// Takes operations of at most `bytes_max` together, but at least one if there is one.
    pub fn take(&self, bytes_max: usize) -> QueuedWork {
        let mut state = self.lock();

        // Small, and nobody waits for them: they go along with any batch.
        let committed = std::mem::take(&mut state.committed);
        let mut bytes = 0;
        let fits = |op: &LogOp| {
            bytes += op.change.bytes();
            bytes <= bytes_max
        };

        // At least one is taken, however large: it would wait for ever otherwise.
        let count = state
            .ops
            .iter()
            .map(fits)
            .take_while(|fits| *fits)
            .count()
            .max(1)
            .min(state.ops.len());
        let ops: Vec<LogOp> = state.ops.drain(..count).collect();
        state.bytes -= ops.iter().map(|op| op.change.bytes()).sum::<usize>();
        assert!(
            state.bytes == 0 || !state.ops.is_empty(),
            "an empty queue counts {} bytes",
            state.bytes
        );
        QueuedWork { ops, committed }
    }

    /// Blocks until an operation waits or the log is closing, at most for `timeout` if there is
    /// one.
    pub fn wait(&self, timeout: Option<Duration>) {
        let mut state = self.lock();
        let idle = |state: &mut LogQueueState| state.ops.is_empty() && !state.closing;
        match timeout {
            Some(timeout) => {
                self.wake_thread.wait_while_for(&mut state, idle, timeout);
            }
            None => self.wake_thread.wait_while(&mut state, idle),
        }
    }

    /// The same for a task. May return early.
    pub async fn wait_in_task(&self) {
        let waits = {
            let state = self.lock();
            state.ops.is_empty() && !state.closing
        };
        if waits {
            self.wake_task.notified().await;
        }
    }

    fn wake(&self) {
        // The writer is a thread, or a task in a simulation.
        self.wake_thread.notify_one();
        self.wake_task.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, LogQueueState> {
        self.state.lock()
    }
}

/// Calls back with success or the failure.
pub(super) fn call(done: Done, failure: Option<&LogFailure>) {
    done(failure.map_or(Ok(()), |failure| Err(failure.to_io())));
}
