//! [`AppendStream`]: the pipeline of appends from a leader to one follower.
//!
//! The window bounds what is in flight. Results come in the order of the requests, and each has a
//! deadline.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, StreamAppendResult};
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep};

use super::lanes::{PendingReply, read_reply};
use super::peer_client::{PeerClient, RpcResult, network_error, read_append_reply, rpc_error};
use super::wire::PeerReply;
use super::{Lane, LaneError};
use crate::mutants::{self, Mutant};
use crate::raft::types::{RaftLogId, Types, vote_from_raft};
use crate::telemetry::rarely;

/// Appends of one group to one peer that may be in flight: enough to fill the connection while the
/// peer's disk syncs.
const WINDOW: usize = 16;

/// Bytes of those appends. One larger append may always go alone.
const WINDOW_BYTES: usize = 4 << 20;

/// Sends appends in a pipeline: requests leave as they come, up to a window, and results are handed
/// back in the order of the requests.
///
/// openraft notes when it made a request, and credits the follower with an answer as of then once a
/// result says that the follower has all up to the end of the request. A request without entries
/// ends where the one before it does. The answer to that one, perhaps given earlier, would pass for
/// an answer to both, and a leader that was paused and deposed would confirm a read by what a
/// follower said before it voted for another. So no request without entries is taken while others
/// are in flight; this also saves a frame for each entry, because the next request with entries
/// carries the commit index as well. If one slips through, a result is held back until every
/// request is answered that it would be credited to.
pub struct AppendStream<'s, S> {
    client: &'s PeerClient,
    input: Option<S>,
    window: VecDeque<InFlightAppend>,
    window_bytes: usize,
    /// Timeout of a small request that is alone in flight.
    timeout: Duration,
    /// Runs out at the deadline of the oldest request.
    timer: Pin<Box<Sleep>>,
    /// Resolves when an entry was appended to the log since it was made.
    grown: Pin<Box<OwnedNotified>>,
    /// The end of the last request that was taken from the input.
    taken: Option<RaftLogId>,
    /// A request that could not be sent, reported once the earlier ones are answered.
    failed: Option<LaneError>,
    /// The last entry that the follower is known to have.
    acknowledged: Option<RaftLogId>,
}

struct InFlightAppend {
    answer: PendingReply,
    bytes: usize,
    /// Time that its answer may take.
    timeout: Duration,
    due: Instant,
    previous: Option<RaftLogId>,
    last: Option<RaftLogId>,
    /// Term of the leader's vote.
    term: u64,
    /// True if the entry before it had been acknowledged when it was sent.
    follows_acked: bool,
}

impl<'s, S> AppendStream<'s, S>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Unpin,
{
    /// Returns the stream of the results of `input`. A small append that is alone on its way may be
    /// without a reply for `timeout`.
    pub fn new(client: &'s PeerClient, input: S, timeout: Duration) -> Self {
        Self {
            client,
            input: Some(input),
            window: VecDeque::with_capacity(WINDOW),
            window_bytes: 0,
            timeout,
            timer: Box::pin(tokio::time::sleep(timeout)),
            grown: Box::pin(client.network.tip.grown()),
            taken: None,
            failed: None,
            acknowledged: None,
        }
    }

    fn send(&mut self, mut request: AppendEntriesRequest<Types>) {
        let previous = request.prev_log_id;
        assert!(self.window.len() < WINDOW, "the window is full");
        assert!(
            request.entries.first().is_none_or(|first| {
                first.log_id.index() == previous.map_or(0, |id| id.index() + 1)
            }),
            "the entries of an append follow the one before them"
        );
        let last = request
            .entries
            .last()
            .map(|entry| entry.log_id)
            .or(previous);
        self.taken = last;

        let term = vote_from_raft(&request.vote).term;

        // A conflict with what was acknowledged means that the follower's disk is an older copy.
        let follows_acked = match self.client.lane {
            Lane::Log => self.client.acked.has(term, previous),
            // openraft sends heartbeats after what was acknowledged to this leader.
            Lane::Heartbeat => previous.is_some(),
            Lane::Snapshot => false,
        };

        let frame = self.client.append_frame(&mut request);
        let bytes = frame.bytes_len();

        match self
            .client
            .lanes
            .call(self.client.to, self.client.lane, frame)
        {
            Ok(call) => {
                let allowance = match self.client.lane {
                    Lane::Log => call.allowance(),
                    Lane::Heartbeat | Lane::Snapshot => Duration::ZERO,
                };

                let timeout = self.timeout + allowance;
                let due = Instant::now() + timeout;

                // The timer is that of the oldest request.
                if self.window.is_empty() {
                    self.timer.as_mut().reset(due);
                }

                self.window_bytes += bytes;
                let answer = call.answer;
                self.window.push_back(InFlightAppend {
                    answer,
                    bytes,
                    timeout,
                    due,
                    previous,
                    last,
                    term,
                    follows_acked,
                });
            }
            // Reported after the earlier requests, so that results keep their order.
            Err(error) => {
                self.failed = Some(error);
                self.input = None;
            }
        }
    }

    fn fill_window(&mut self, context: &mut Context<'_>) {
        while self.window.len() < WINDOW && self.window_bytes < WINDOW_BYTES {
            // Without entries a request is not sent behind others: see the type for what that would
            // break.
            if !self.window.is_empty() && !self.has_entries(context) {
                return;
            }

            let Some(input) = &mut self.input else { return };
            match input.poll_next_unpin(context) {
                Poll::Ready(Some(request)) => self.send(request),
                Poll::Ready(None) => self.input = None,
                Poll::Pending => return,
            }
        }
    }

    /// Returns true if the log has entries that were not taken yet. Otherwise the task is woken
    /// when it has.
    fn has_entries(&mut self, context: &mut Context<'_>) -> bool {
        if mutants::is_on(Mutant::ResultSpeaksForUnanswered) {
            return true;
        }
        // Polled until it is pending, so that the next entry wakes this task.
        while self.grown.as_mut().poll(context).is_ready() {
            self.grown = Box::pin(self.client.network.tip.grown());
        }
        self.client.network.tip.last() > self.taken.map(|id| id.index)
    }

    /// Returns true if reporting `matching` now would make openraft credit a request that is still
    /// in flight.
    fn speaks_for_others(&self, matching: Option<RaftLogId>) -> bool {
        if mutants::is_on(Mutant::ResultSpeaksForUnanswered) {
            return false;
        }
        let is_failed = self.failed.is_some() && self.taken <= matching;
        is_failed || self.window.iter().any(|later| later.last <= matching)
    }

    /// Removes the oldest request, and sets the timer for the next one.
    fn pop(&mut self) -> Option<InFlightAppend> {
        let done = self.window.pop_front()?;
        self.window_bytes -= done.bytes;
        assert!(
            !self.window.is_empty() || self.window_bytes == 0,
            "an empty window has {} bytes",
            self.window_bytes
        );
        if let Some(next) = self.window.front() {
            self.timer.as_mut().reset(next.due);
        }
        Some(done)
    }

    /// Returns the result of an append that was answered.
    ///
    /// A conflict where the follower is known to match is impossible, because nothing that was
    /// acknowledged is lost, and a lane keeps the order of its frames. openraft would not notice:
    /// it would search below what matches, and send snapshots without end where the log is purged
    /// up to there. So it is reported as an error, and tried again.
    fn read(
        &mut self,
        done: &InFlightAppend,
        reply: &PeerReply,
    ) -> RpcResult<StreamAppendResult<Types>> {
        let response = read_append_reply(reply)?;

        // Heartbeats follow what was acknowledged.
        let is_known = self.client.lane == Lane::Heartbeat || done.previous <= self.acknowledged;
        if matches!(response, AppendEntriesResponse::Conflict) && (is_known || done.follows_acked) {
            rarely!(
                warn,
                to = %self.client.to,
                group = %self.client.header.group,
                previous = ?done.previous,
                "a conflict that can't be"
            );
            if done.follows_acked {
                self.client.note_missing();
            }
            return Err(network_error(
                "a conflict where the logs are known to match",
            ));
        }

        let result = response.into_stream_result(done.previous, done.last);
        if let Ok(matching) = &result {
            self.acknowledged = self.acknowledged.max(*matching);
            self.client.acked.note(done.term, *matching);
        }
        Ok(result)
    }
}

impl<S> Stream for AppendStream<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Unpin,
{
    type Item = RpcResult<StreamAppendResult<Types>>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            this.fill_window(context);
            let Some(oldest) = this.window.front_mut() else {
                return match (this.failed.take(), &this.input) {
                    (Some(error), _) => Poll::Ready(Some(Err(rpc_error(error)))),
                    (None, None) => Poll::Ready(None),
                    (None, Some(_)) => Poll::Pending,
                };
            };

            let reply = match oldest.answer.poll_unpin(context) {
                Poll::Ready(Ok(frame)) => frame.and_then(|frame| read_reply(&frame)),
                Poll::Ready(Err(_)) => Err(LaneError::Closed),
                Poll::Pending => match this.timer.poll_unpin(context) {
                    Poll::Ready(()) => Err(LaneError::Late(oldest.timeout)),
                    Poll::Pending => return Poll::Pending,
                },
            };

            let done = this.pop().expect("the window was not empty");
            let result = reply
                .map_err(rpc_error)
                .and_then(|reply| this.read(&done, &reply));

            // Held back until the requests are answered that it would be credited to.
            if matches!(result, Ok(Ok(matching)) if this.speaks_for_others(matching)) {
                continue;
            }

            if result.is_err() {
                // openraft ends the stream at an error, so requests that are still in flight are
                // given up.
                this.input = None;
                this.window.clear();
            }
            return Poll::Ready(Some(result));
        }
    }
}
