//! [`ReadIndex`]: confirms linearizable reads, many in one round.
//!
//! A round asks a quorum whether this replica still leads, and then waits until everything that was
//! committed when it began is applied here (ReadIndex: Ongaro's thesis, section 6.4). Reads that
//! come during a round share the next one. A read never joins a round that began before it, because
//! what was acknowledged in between might be missing from it.

use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::time::Duration;

use openraft::LinearizerOption;
use openraft::errors::{ForwardReason, LinearizableReadError, RaftError};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::mutants::{self, Mutant};
use crate::raft::apply_state::ApplyState;
use crate::raft::errors::{ReadError, SHUT_DOWN};
use crate::raft::state_machine::RaftHandle;

/// Reads that may be queued for a round.
const QUEUED_MAX: usize = 16 << 10;
/// Time that a round may take to be applied. After that it has failed: what is committed is not
/// being applied.
const APPLY_TIMEOUT: Duration = Duration::from_secs(5);

type RoundResult = Result<(), RoundError>;

/// An error of a round.
#[derive(Debug, Clone)]
enum RoundError {
    /// No quorum answered, or nothing is being applied; the next round may do better.
    Again,
    Final(ReadError),
}

#[derive(Default)]
struct ReadQueue {
    queued: Vec<oneshot::Sender<RoundResult>>,
    /// The reason why reads are refused, once the replica has stopped.
    closed: Option<String>,
}

/// Confirms the linearizable reads of one group.
pub struct ReadIndex {
    queue: Mutex<ReadQueue>,
    arrived: Notify,
    /// A round is skipped if a quorum has answered within this time.
    lease_age_max: Option<Duration>,
}

impl ReadIndex {
    pub fn new(lease_age_max: Option<Duration>) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::default(),
            arrived: Notify::new(),
            lease_age_max,
        })
    }

    /// Waits until everything that was acknowledged before the call can be read here.
    pub async fn confirm(&self, deadline: Instant) -> Result<(), ReadError> {
        if mutants::is_on(Mutant::ReadByDeposedLeader) {
            return Ok(());
        }
        loop {
            let confirmed = self.join()?;
            match tokio::time::timeout_at(deadline, confirmed).await {
                Ok(Ok(Ok(()))) => return Ok(()),
                Ok(Ok(Err(RoundError::Final(error)))) => return Err(error),
                // It may last a moment only, so the read joins the next round.
                Ok(Ok(Err(RoundError::Again))) => {}
                Ok(Err(_)) => return Err(self.stopped()),
                Err(_) => return Err(ReadError::Expired),
            }
        }
    }

    /// Queues a read for the next round.
    fn join(&self) -> Result<oneshot::Receiver<RoundResult>, ReadError> {
        let mut queue = self.lock();
        if let Some(reason) = queue.closed.clone() {
            return Err(ReadError::Stopped { reason });
        }
        if queue.queued.len() >= QUEUED_MAX {
            return Err(ReadError::Overloaded {
                limit: format!("{QUEUED_MAX} reads wait"),
            });
        }
        let (sender, receiver) = oneshot::channel();
        let first = queue.queued.is_empty();
        queue.queued.push(sender);
        drop(queue);
        if first {
            self.arrived.notify_one();
        }
        Ok(receiver)
    }

    /// Returns the number of reads that are queued for the next round.
    pub fn queued_len(&self) -> usize {
        self.lock().queued.len()
    }

    /// Refuses the reads that are queued, and those to come.
    pub fn close(&self, reason: &str) {
        let mut queue = self.lock();
        queue.closed.get_or_insert_with(|| reason.to_owned());
        queue.queued.clear();
        drop(queue);
        self.arrived.notify_one();
    }

    fn stopped(&self) -> ReadError {
        ReadError::Stopped {
            reason: self
                .lock()
                .closed
                .clone()
                .unwrap_or_else(|| SHUT_DOWN.to_owned()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ReadQueue> {
        self.queue.lock()
    }

    /// Runs one round after another as long as reads are queued.
    pub async fn run(self: Arc<Self>, raft: RaftHandle, apply_state: Arc<ApplyState>) {
        loop {
            // Taken before the round begins: a later read might miss what was acknowledged in
            // between.
            let queued = {
                let mut queue = self.lock();
                if queue.closed.is_some() {
                    return;
                }
                std::mem::take(&mut queue.queued)
            };
            if queued.is_empty() {
                self.arrived.notified().await;
                continue;
            }
            let confirmed = self.round(&raft, &apply_state).await;
            let late = match mutants::is_on(Mutant::ReadJoinsRunningRound) {
                true => std::mem::take(&mut self.lock().queued),
                false => Vec::new(),
            };
            for read in queued.into_iter().chain(late) {
                let _ = read.send(confirmed.clone());
            }
        }
    }

    async fn round(&self, raft: &RaftHandle, apply_state: &ApplyState) -> RoundResult {
        let option =
            LinearizerOption::new(Some(self.lease_age_max.unwrap_or(Duration::ZERO)), true);

        let index = match raft.get_read_linearizer(option).await {
            Ok(linearizer) => linearizer.read_log_id().index(),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                // A leader that transfers its lead names the target, which does not lead yet and
                // may never do so.
                let names = forward
                    .leader_node
                    .filter(|_| forward.reason != ForwardReason::LeadershipTransfer);
                let leader = names.and_then(|member| member.serving_node());
                return Err(RoundError::Final(ReadError::NotLeader { leader }));
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                return Err(RoundError::Again);
            }
            Err(RaftError::Fatal(_)) => return Err(RoundError::Final(self.stopped())),
        };

        // The read is linearizable once everything that was committed at its start is applied.
        let mut applied = apply_state.applied.subscribe();
        let reached =
            tokio::time::timeout(APPLY_TIMEOUT, applied.wait_for(|applied| *applied >= index))
                .await;
        match reached {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(RoundError::Final(self.stopped())),
            Err(_) => Err(RoundError::Again),
        }
    }
}
