//! [`Proposer`]: merges concurrent writes into entries.
//!
//! An entry costs about the same whether it carries one write or two hundred: a record and its
//! share of a sync on every replica, two frames and their replies, and openraft's bookkeeping. So a
//! write that finds [`ENTRIES_EAGER`] entries in flight waits, and goes in the next one with all
//! others that came meanwhile. An idle group therefore answers at the latency of one entry, and a
//! busy one makes its entries as large as its load, without a timer. Full entries gain nothing by
//! waiting; of these [`ENTRIES_MAX`] may be in flight.
//!
//! Writes that are queued or in flight are charged to the node's budget for proposals, even if
//! their callers have given up, because openraft keeps an entry until it is committed or another
//! replica leads.
//!
//! Every write ends in exactly one of three ways: an outcome, a certain no, or unknown. Its outcome
//! is unknown from the moment its entry is handed to openraft until openraft answers it.

use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{ClientWriteError, ForwardReason, ForwardToLeader};
use openraft::raft::ClientWriteResult;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::raft::apply_state::ApplyState;
use crate::raft::errors::ProposeError;
use crate::raft::fair_budget::{HeldBytes, RaftBudgets, Reservation};
use crate::raft::state_machine::RaftHandle;
use crate::raft::transport::Resolver;
use crate::raft::types::{ApplyOutcome, Proposal, ResponderFn, Types};
use crate::sm::kv;
use crate::sm::level::Feature;

/// Writes in one entry. With more, a slow entry would hold up the next for a noticeable time.
const WRITES_PER_ENTRY: usize = 256;
/// Bytes of keys and values in one entry; a larger write goes alone.
const ENTRY_BYTES: usize = 1 << 20;
/// Entries that may be in flight before writes wait for one another: one being synced, one behind
/// it.
const ENTRIES_EAGER: usize = 2;
/// Full entries that may be in flight: enough for a long round trip to the followers.
const ENTRIES_MAX: usize = 8;
/// Writes that may be queued: at the rate of a small machine a tenth of a second.
const QUEUE_WRITES_MAX: usize = 8192;
const QUEUE_BYTES_MAX: usize = 32 << 20;
/// Bytes charged for a write on top of its own.
const WRITE_OVERHEAD_BYTES: usize = 64;
/// Pause between attempts while the leader's lease has expired, as it has right after an election.
const LEASE_PAUSE: Duration = Duration::from_millis(5);
/// Extra time that a caller waits after its deadline, so that a write that was never proposed gets
/// a certain answer.
const GRACE: Duration = Duration::from_millis(50);

type WriteResult = Result<kv::WriteOutcome, ProposeError>;

struct QueuedWrite {
    write: kv::Write,
    waiter: Waiter,
}

/// The caller of a write, and the memory that it holds until it is answered.
struct Waiter {
    /// Bytes charged for the write, with what its gets return.
    bytes: usize,
    deadline: Instant,
    answer: oneshot::Sender<WriteResult>,
    place: Reservation,
}

impl Waiter {
    fn tell(self, answer: WriteResult) {
        drop(self.place);
        let _ = self.answer.send(answer);
    }
}

#[derive(Default)]
struct ProposalQueue {
    waiting: VecDeque<QueuedWrite>,
    bytes: usize,
    /// Entries that openraft has and has not answered.
    in_flight: usize,
    /// Earliest time of the next entry, after the leader's lease had expired.
    not_before: Option<Instant>,
    /// The reason why writes are refused, once the replica has stopped.
    closed: Option<String>,
}

impl ProposalQueue {
    fn is_entry_full(&self) -> bool {
        self.waiting.len() >= WRITES_PER_ENTRY || self.bytes >= ENTRY_BYTES
    }

    fn may_propose(&self) -> bool {
        let limit = if self.is_entry_full() {
            ENTRIES_MAX
        } else {
            ENTRIES_EAGER
        };
        !self.waiting.is_empty() && self.in_flight < limit
    }
}

/// Merges the writes of one group into entries.
pub struct Proposer {
    queue: Mutex<ProposalQueue>,
    changed: Notify,
    budgets: Arc<RaftBudgets>,
    held: HeldBytes,
}

impl Proposer {
    pub fn new(budgets: Arc<RaftBudgets>) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::default(),
            changed: Notify::new(),
            budgets,
            held: HeldBytes::default(),
        })
    }

    /// Reserves memory for a proposal of this group.
    ///
    /// # Errors
    ///
    /// [`ProposeError::Overloaded`] if this group holds its fair share already.
    pub fn reserve(&self, bytes: usize) -> Result<Reservation, ProposeError> {
        let limit = "the proposals of this node that wait or are under way, those";
        self.budgets
            .proposals
            .take(&self.held, bytes)
            .ok_or_else(|| ProposeError::Overloaded {
                limit: limit.to_owned(),
            })
    }

    /// Queues a write, and waits until its entry is answered or its deadline has passed.
    pub async fn propose(
        &self,
        write: kv::Write,
        answer_bytes: usize,
        deadline: Instant,
    ) -> WriteResult {
        let (answer, answered) = oneshot::channel();
        let own_bytes = write.size_hint() + WRITE_OVERHEAD_BYTES;
        let (bytes, place) = (own_bytes + answer_bytes, self.reserve(own_bytes)?);
        self.push(QueuedWrite {
            write,
            waiter: Waiter {
                bytes,
                deadline,
                answer,
                place,
            },
        })?;

        // After the grace a write may still be applied, so its outcome is unknown.
        match tokio::time::timeout_at(deadline + GRACE, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(ProposeError::unknown("the replica stopped")),
            Err(_) => Err(ProposeError::unknown("it was not applied in time")),
        }
    }

    /// Returns the number of writes that are queued.
    pub fn queued_len(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Refuses the writes that are queued, and those to come.
    pub fn close(&self, reason: &str) {
        let waiting = {
            let mut queue = self.lock();
            queue.closed.get_or_insert_with(|| reason.to_owned());
            queue.bytes = 0;
            std::mem::take(&mut queue.waiting)
        };
        for write in waiting {
            write.waiter.tell(Err(ProposeError::Stopped {
                reason: reason.to_owned(),
            }));
        }
        self.changed.notify_one();
    }

    fn push(&self, write: QueuedWrite) -> Result<(), ProposeError> {
        let mut queue = self.lock();
        if let Some(reason) = queue.closed.clone() {
            return Err(ProposeError::Stopped { reason });
        }
        if queue.waiting.len() >= QUEUE_WRITES_MAX {
            return Err(ProposeError::Overloaded {
                limit: format!("{QUEUE_WRITES_MAX} writes wait"),
            });
        }

        // A single write always fits, or a large one could never be made.
        if queue.bytes + write.waiter.bytes > QUEUE_BYTES_MAX && !queue.waiting.is_empty() {
            return Err(ProposeError::Overloaded {
                limit: format!("{QUEUE_BYTES_MAX} bytes of writes wait"),
            });
        }
        queue.bytes += write.waiter.bytes;
        queue.waiting.push_back(write);
        let ready = queue.may_propose();
        drop(queue);
        if ready {
            self.changed.notify_one();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, ProposalQueue> {
        self.queue.lock()
    }

    /// Proposes queued writes until the queue is closed.
    pub async fn run(
        self: Arc<Self>,
        raft: RaftHandle,
        apply_state: Arc<ApplyState>,
        resolver: Arc<dyn Resolver>,
    ) {
        loop {
            match self.next_step() {
                ProposerStep::End => return,
                ProposerStep::Propose(writes) => {
                    let is_bounded = resolver.level() >= Feature::BoundedAnswers.level();
                    self.propose_entry(&raft, &apply_state, writes, is_bounded)
                        .await;
                }
                ProposerStep::Wait { until: None } => self.changed.notified().await,
                ProposerStep::Wait { until: Some(until) } => {
                    let _ = tokio::time::timeout_at(until, self.changed.notified()).await;
                }
            }
        }
    }

    fn next_step(&self) -> ProposerStep {
        let now = Instant::now();
        let mut queue = self.lock();
        if queue.closed.is_some() {
            return ProposerStep::End;
        }

        let paused = queue.not_before.filter(|until| *until > now);

        if queue.may_propose() && paused.is_none() {
            queue.not_before = None;

            let writes = take_entry(&mut queue, now);

            // All that were taken had expired, and others may follow them.
            if writes.is_empty() {
                return ProposerStep::Wait { until: Some(now) };
            }

            queue.in_flight += 1;
            assert!(
                queue.in_flight <= ENTRIES_MAX,
                "too many entries are in flight"
            );
            return ProposerStep::Propose(writes);
        }

        expire(&mut queue, now);
        let first_deadline = queue.waiting.front().map(|write| write.waiter.deadline);
        // An entry that is answered, or a write that fills the next one, wakes this task. Only the
        // passing of time does not.
        let until = match (paused, first_deadline) {
            (Some(pause), Some(deadline)) => Some(pause.min(deadline)),
            (pause, deadline) => pause.or(deadline),
        };
        ProposerStep::Wait { until }
    }

    /// Proposes `writes` as one entry. `is_bounded` tells that every replica knows entries that
    /// reject writes whose gets return too much.
    async fn propose_entry(
        self: &Arc<Self>,
        raft: &RaftHandle,
        apply_state: &ApplyState,
        writes: Vec<QueuedWrite>,
        is_bounded: bool,
    ) {
        let mut answers = Vec::with_capacity(writes.len());
        let writes = writes.into_iter().map(|waiting| {
            answers.push(waiting.waiter);
            waiting.write
        });

        // The time is taken here and not at apply, so that all replicas apply the same.
        let (time_ms, writes) = (apply_state.clock.now_ms(), writes.collect::<Vec<_>>());

        let command = match is_bounded && writes.iter().any(kv::Write::has_gets) {
            true => kv::KvCommand::BoundedWrite { time_ms, writes },
            false => kv::KvCommand::Write { time_ms, writes },
        };
        let entry = command.encode();

        let in_flight = InFlightEntry {
            proposer: self.clone(),
            entry: entry.clone(),
            answers,
        };
        let answer = ResponderFn(Box::new(move |result| in_flight.end(result)));
        // On failure openraft drops the responder, and that tells the callers.
        let _ = raft.client_write_ff(Proposal(entry), Some(answer)).await;
    }

    fn entry_ended(&self) {
        let mut queue = self.lock();
        assert!(queue.in_flight > 0, "an entry ends that never began");
        queue.in_flight -= 1;
        let ready = queue.may_propose();
        drop(queue);
        if ready {
            self.changed.notify_one();
        }
    }

    /// Puts writes that were certainly not proposed back to the front of the queue.
    fn put_back(&self, entry: &Bytes, answers: Vec<Waiter>) {
        // Taken out of the entry again, which is rare, instead of a copy of each write.
        let writes = match kv::KvCommand::decode(entry) {
            Ok(
                kv::KvCommand::Write { writes, .. } | kv::KvCommand::BoundedWrite { writes, .. },
            ) => writes,
            Ok(_) | Err(_) => Vec::new(),
        };
        assert_eq!(
            writes.len(),
            answers.len(),
            "a write is lost or answered twice"
        );

        let mut queue = self.lock();
        if let Some(reason) = queue.closed.clone() {
            drop(queue);
            for waiter in answers {
                waiter.tell(Err(ProposeError::Stopped {
                    reason: reason.clone(),
                }));
            }
            return;
        }

        // In reverse, so that they are at the front in their old order.
        for (write, waiter) in writes.into_iter().zip(answers).rev() {
            queue.bytes += waiter.bytes;
            queue.waiting.push_front(QueuedWrite { write, waiter });
        }
        queue.not_before = Some(Instant::now() + LEASE_PAUSE);
        drop(queue);
        self.changed.notify_one();
    }
}

enum ProposerStep {
    Propose(Vec<QueuedWrite>),
    Wait { until: Option<Instant> },
    End,
}

/// Takes the writes of the next entry from the queue. Drops those whose deadline has passed or
/// whose caller has gone.
fn take_entry(queue: &mut ProposalQueue, now: Instant) -> Vec<QueuedWrite> {
    let mut writes = Vec::with_capacity(queue.waiting.len().min(WRITES_PER_ENTRY));
    let mut bytes = 0;

    // A write that is larger than an entry may be goes alone.
    while writes.len() < WRITES_PER_ENTRY
        && let Some(next) = queue.waiting.front()
        && (bytes + next.waiter.bytes <= ENTRY_BYTES || writes.is_empty())
    {
        let next = queue.waiting.pop_front().expect("it has a front");
        queue.bytes -= next.waiter.bytes;
        if next.waiter.deadline <= now {
            next.waiter.tell(Err(ProposeError::Expired));
        } else if !next.waiter.answer.is_closed() {
            bytes += next.waiter.bytes;
            writes.push(next);
        }
    }
    assert!(
        writes.len() <= WRITES_PER_ENTRY,
        "an entry has too many writes"
    );
    assert!(
        !queue.waiting.is_empty() || queue.bytes == 0,
        "an empty queue has {} bytes",
        queue.bytes
    );
    writes
}

/// Answers writes at the front whose deadline has passed. Deadlines come roughly in order; one that
/// is behind a later one is found when its entry is made.
fn expire(queue: &mut ProposalQueue, now: Instant) {
    while queue
        .waiting
        .front()
        .is_some_and(|write| write.waiter.deadline <= now)
        && let Some(write) = queue.waiting.pop_front()
    {
        queue.bytes -= write.waiter.bytes;
        write.waiter.tell(Err(ProposeError::Expired));
    }
}

/// An entry that openraft has. If it is dropped without an answer, its callers learn that the
/// outcome is unknown.
struct InFlightEntry {
    proposer: Arc<Proposer>,
    entry: Bytes,
    answers: Vec<Waiter>,
}

impl InFlightEntry {
    fn end(mut self, result: ClientWriteResult<Types>) {
        let answers = std::mem::take(&mut self.answers);

        let outcomes = match result {
            Ok(response) => outcomes(response.data, answers.len()),
            // The leader did not append the entry, so it is safe to try again.
            Err(ClientWriteError::ForwardToLeader(ForwardToLeader {
                reason: ForwardReason::LeaseExpired,
                ..
            })) => {
                return self.proposer.put_back(&self.entry, answers);
            }
            Err(error) => Err(propose_error(error)),
        };

        match outcomes {
            Ok(outcomes) => {
                for (waiter, outcome) in answers.into_iter().zip(outcomes) {
                    waiter.tell(Ok(outcome));
                }
            }
            Err(error) => {
                for waiter in answers {
                    waiter.tell(Err(error.clone()));
                }
            }
        }
    }
}

impl Drop for InFlightEntry {
    fn drop(&mut self) {
        self.proposer.entry_ended();
    }
}

fn outcomes(outcome: ApplyOutcome, expected: usize) -> Result<Vec<kv::WriteOutcome>, ProposeError> {
    match outcome {
        ApplyOutcome::Shard(kv::KvOutcome::Written(outcomes)) if outcomes.len() == expected => {
            Ok(outcomes)
        }
        other => Err(ProposeError::unknown(format!(
            "writes were answered by {other:?}"
        ))),
    }
}

/// Translates openraft's refusal of a proposal.
pub fn propose_error(error: ClientWriteError<Types>) -> ProposeError {
    match error {
        // openraft names the target of the transfer, which does not lead yet and may never do so.
        ClientWriteError::ForwardToLeader(ForwardToLeader {
            reason: ForwardReason::LeadershipTransfer,
            ..
        }) => ProposeError::NotLeader { leader: None },
        ClientWriteError::ForwardToLeader(forward) => ProposeError::NotLeader {
            leader: forward.leader_node.and_then(|member| member.serving_node()),
        },
        ClientWriteError::LogEntryDiscarded(_) => ProposeError::unknown("the leader changed"),
        ClientWriteError::ChangeMembershipError(error) => ProposeError::unknown(error.to_string()),
        ClientWriteError::PreconditionFailed(error) => ProposeError::unknown(error.to_string()),
    }
}
