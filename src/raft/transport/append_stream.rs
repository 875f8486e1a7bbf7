//! [`AppendStream`]: the pipeline of appends to one follower.

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
use crate::raft::types::{RaftLogId, Types, vote_from_raft};
use crate::telemetry::rarely;

/// Appends of one group to one peer that may be without a reply: enough to fill the way to the
/// peer while its disk syncs.
const WINDOW: usize = 16;

/// Bytes of them. One larger append may always go alone.
const WINDOW_BYTES: usize = 4 << 20;

/// Pipelined appends: requests leave as they come, up to a window; results are handed back in the
/// order of the requests.
///
/// openraft notes when it made a request, and takes that for the time of the follower's answer once
/// a result says that the follower has all up to the end of the request. A request without entries
/// ends where the one before it does: that one's answer, given perhaps before, would pass for the
/// answer to it, and a leader that was paused and deposed would confirm a read by what a follower
/// said before it voted for another. So none is asked for while others are on their way, which also
/// saves as many frames as there are entries: the next one with entries tells what is committed as
/// well. And where one slips through, a result waits until everything is answered that it would
/// speak for.
pub struct AppendStream<'s, S> {
    client: &'s PeerClient,
    input: Option<S>,
    window: VecDeque<InFlightAppend>,
    window_bytes: usize,
    /// Of a request that is small and alone on its way.
    timeout: Duration,
    /// Of the oldest request.
    timer: Pin<Box<Sleep>>,
    /// Done when an entry was appended since it was made.
    grown: Pin<Box<OwnedNotified>>,
    /// Where the last request ended that was taken from the input.
    taken: Option<RaftLogId>,
    /// A request could not be sent; said once the earlier ones are answered.
    failed: Option<LaneError>,
    /// The last that the follower is known to have.
    acknowledged: Option<RaftLogId>,
}

struct InFlightAppend {
    answer: PendingReply,
    bytes: usize,
    /// How long its answer is waited for.
    timeout: Duration,
    due: Instant,
    previous: Option<RaftLogId>,
    last: Option<RaftLogId>,
    /// Of the leader's vote.
    term: u64,
    /// What it follows had been acknowledged when it was sent.
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
        let last = request
            .entries
            .last()
            .map(|entry| entry.log_id)
            .or(previous);
        self.taken = last;
        let term = vote_from_raft(&request.vote).term;
        let follows_acked = match self.client.lane {
            Lane::Log => self.client.acked.has(term, previous),
            // openraft has them follow what was acknowledged to this leader.
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
            Err(error) => {
                self.failed = Some(error);
                self.input = None;
            }
        }
    }

    fn fill_window(&mut self, context: &mut Context<'_>) {
        while self.window.len() < WINDOW && self.window_bytes < WINDOW_BYTES {
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

    /// Whether the log has entries that were not taken yet. If not, this is polled again when it
    /// has.
    fn has_entries(&mut self, context: &mut Context<'_>) -> bool {
        while self.grown.as_mut().poll(context).is_ready() {
            self.grown = Box::pin(self.client.network.tip.grown());
        }
        self.client.network.tip.last() > self.taken.map(|id| id.index)
    }

    /// Whether openraft would take a result that the follower matches up to here for the answer to
    /// a request that it has not answered.
    fn speaks_for_others(&self, matching: Option<RaftLogId>) -> bool {
        let is_failed = self.failed.is_some() && self.taken <= matching;
        is_failed || self.window.iter().any(|later| later.last <= matching)
    }

    /// The oldest request is done with; the timer is now the next one's.
    fn pop(&mut self) -> Option<InFlightAppend> {
        let done = self.window.pop_front()?;
        self.window_bytes -= done.bytes;
        if let Some(next) = self.window.front() {
            self.timer.as_mut().reset(next.due);
        }
        Some(done)
    }

    /// The result of an append that was answered. A conflict where the follower is known to match
    /// can't be: nothing that was acknowledged is lost, and a lane keeps the order of its frames.
    /// openraft does not look: it would search below what matches, and where the log is purged up
    /// to there, send snapshots without end. So it is an error, and tried again.
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
            if matches!(result, Ok(Ok(matching)) if this.speaks_for_others(matching)) {
                continue;
            }
            if result.is_err() {
                // openraft ends the stream at an error; what is still under way is given up.
                this.input = None;
                this.window.clear();
            }
            return Poll::Ready(Some(result));
        }
    }
}
