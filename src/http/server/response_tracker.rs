//! Tracks the answers of one HTTP/2 connection until they are on the wire.
//!
//! Each stream of HTTP/2 has a window of its own: a client can keep a thousand answers from going
//! out while its connection is alive and well, so the socket does not show it. Answers go out in
//! chunks, and each is noted here until it is sent. The connection checks now and then how old they
//! are, and ends if one is too old: hyper has no way to end one stream.
//!
//! Many streams over a slow line are slow together, and no client is at fault: there a chunk is too
//! old only once so much else has gone out that its turn must have come.
//!
//! Lanes are left out: their peers watch them, and a lane with nothing to send is normal.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Instant;

use super::slow_clients::{SendRate, SlowClientLimit};
use crate::budget::UNCHARGED_BYTES_MAX;

/// Bytes handed over at once, to wait for the stream's window.
const CHUNK_BYTES: usize = 64 << 10;

/// Bytes of a stream that HTTP/2 buffers at most, our chunks included: it sends all streams in
/// turn.
const BUFFERED_BYTES_MAX: u64 = 512 << 10;

/// A connection that takes less of all its answers within the time for a piece is not slow, but
/// stuck.
const TAKEN_BYTES_MIN: u128 = 64 << 10;

/// However many share a line, a piece is out within so many times the time for one.
const SHARED_LINE_FACTOR: u32 = 10;

/// The answers of one connection that are under way.
#[derive(Debug, Default)]
pub struct ResponseTracker {
    state: Mutex<TrackerState>,
    /// Bytes that the socket has taken of this connection.
    written_bytes: AtomicU64,
}

/// A piece of an answer that the client has to take.
#[derive(Debug)]
struct UnsentChunk {
    since: Instant,
    /// Bytes that the socket had taken by then.
    written_before: u64,
}

#[derive(Debug, Default)]
struct TrackerState {
    /// Requests that have no answer yet, or one that is not over.
    streams: usize,
    /// The time at which the last of them ended.
    idle_since: Option<Instant>,
    last_id: u64,
    /// Chunks that wait for the client, and since when.
    unsent: BTreeMap<u64, UnsentChunk>,
    /// Rates of large answers, until all of each was handed over.
    rates: HashMap<u64, SendRate>,
}

impl TrackerState {
    fn add_unsent(&mut self, written_before: u64) -> u64 {
        self.last_id += 1;
        self.unsent.insert(
            self.last_id,
            UnsentChunk {
                since: Instant::now(),
                written_before,
            },
        );
        self.last_id
    }
}

impl ResponseTracker {
    /// Counts a request as under way until what this returns is dropped.
    pub fn begin(self: &Arc<Self>) -> StreamGuard {
        self.lock().streams += 1;
        StreamGuard(Arc::clone(self))
    }

    /// Returns since when there is nothing under way. None: there is something, or there was never
    /// anything.
    pub fn idle_since(&self) -> Option<Instant> {
        let state = self.lock();
        state.idle_since.filter(|_| state.streams == 0)
    }

    /// Counts what the socket has taken.
    pub fn wrote(&self, bytes: usize) {
        self.written_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns whether the client keeps a piece from going out for longer than `limit`.
    pub fn is_stuck(&self, limit: Duration) -> bool {
        let written = self.written();
        let state = self.lock();

        // HTTP/2 serves streams in turn: by then every other one has sent all that it can have
        // buffered.
        let full_turn_bytes = BUFFERED_BYTES_MAX * state.streams.max(1) as u64;

        state.unsent.values().any(|piece| {
            let (age, written) = (
                piece.since.elapsed(),
                written.saturating_sub(piece.written_before),
            );
            // This client takes nothing at all: it is not just slow.
            let is_idle =
                || u128::from(written) * limit.as_millis() < TAKEN_BYTES_MIN * age.as_millis();
            age > limit
                // Age alone would cut clients on a slow line that many streams share.
                && (is_idle() || written >= full_turn_bytes || age > limit * SHARED_LINE_FACTOR)
        })
    }

    fn written(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    /// Returns whether HTTP/2 is spoken.
    pub fn has_streams(&self) -> bool {
        let state = self.lock();
        state.streams > 0 || state.idle_since.is_some()
    }

    /// Returns whether requests are under way.
    pub fn is_busy(&self) -> bool {
        self.lock().streams > 0
    }

    /// Returns whether an answer is taken too slowly.
    pub fn has_slow_response(&self, slow_clients: &SlowClientLimit) -> bool {
        self.lock()
            .rates
            .values()
            .any(|rate| slow_clients.is_exceeded_by(rate))
    }

    fn lock(&self) -> MutexGuard<'_, TrackerState> {
        self.state.lock()
    }
}

/// A request that is under way.
#[derive(Debug)]
pub struct StreamGuard(Arc<ResponseTracker>);

impl StreamGuard {
    /// Returns the answer's body, which takes this with it. `is_timed`: the client has to take it
    /// in time.
    pub fn track(self, body: Body, is_timed: bool) -> Body {
        let is_small = body
            .size_hint()
            .upper()
            .is_some_and(|bytes| bytes <= UNCHARGED_BYTES_MAX as u64);
        let (mut waiting_id, mut rate) = (None, None);

        // It waits from now on: over a window of zero, the first piece might never be asked for.
        if is_timed {
            let mut state = self.0.lock();
            let id = state.add_unsent(self.0.written());

            // Small answers are not charged to the budget, so how long they take is nobody's loss.
            if !is_small {
                state.rates.insert(id, SendRate::new());
                rate = Some(id);
            }
            waiting_id = Some(id);
        }
        Body::new(TrackedBody {
            body,
            rest: Bytes::new(),
            is_timed,
            waiting_id,
            rate,
            stream_guard: self,
        })
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        assert_ne!(state.streams, 0, "each stream ends once");
        state.streams -= 1;
        if state.streams == 0 {
            state.idle_since = Some(Instant::now());
        }
    }
}

/// The body of an answer, in pieces.
struct TrackedBody {
    body: Body,
    /// The rest of the last frame of `body`.
    rest: Bytes,
    is_timed: bool,
    /// While it is for the client to ask for more.
    waiting_id: Option<u64>,
    /// Its key in [`TrackerState::rates`].
    rate: Option<u64>,
    stream_guard: StreamGuard,
}

impl TrackedBody {
    fn clear_waiting(&mut self) {
        if let Some(id) = self.waiting_id.take() {
            self.stream_guard.0.lock().unsent.remove(&id);
        }
    }

    /// Begins to count again how fast it is taken.
    fn restart_rate(&self) {
        if let Some(id) = self.rate {
            self.stream_guard.0.lock().rates.insert(id, SendRate::new());
        }
    }

    /// Hands the next piece over: until it is asked for more, the answer waits for the client.
    fn next_chunk(&mut self) -> Bytes {
        let bytes = self.rest.split_to(self.rest.len().min(CHUNK_BYTES));
        let tracker = &self.stream_guard.0;
        let mut state = tracker.lock();
        let written_before = tracker.written();

        // Two waits begin: for the client to ask for more, and for this piece to leave for the
        // socket.
        self.waiting_id = Some(state.add_unsent(written_before));
        let id = state.add_unsent(written_before);
        drop(state);
        Bytes::from_owner(TrackedChunk {
            bytes,
            id,
            rate: self.rate,
            tracker: Arc::clone(tracker),
        })
    }
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.clear_waiting();
        while self.rest.is_empty() {
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                // It is not the client who is waited for.
                self.restart_rate();
                return Poll::Pending;
            };
            let frame = match frame {
                Some(Ok(frame)) if self.is_timed => frame,
                other => return Poll::Ready(other),
            };
            match frame.into_data() {
                Ok(data) => self.rest = data,
                Err(frame) => return Poll::Ready(Some(Ok(frame))),
            }
        }
        Poll::Ready(Some(Ok(Frame::data(self.next_chunk()))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.body.size_hint();
        let rest = self.rest.len() as u64;
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}

impl Drop for TrackedBody {
    fn drop(&mut self) {
        self.clear_waiting();
        if let Some(id) = self.rate {
            self.stream_guard.0.lock().rates.remove(&id);
        }
    }
}

/// A piece on its way to the socket.
struct TrackedChunk {
    bytes: Bytes,
    id: u64,
    /// That of its answer.
    rate: Option<u64>,
    tracker: Arc<ResponseTracker>,
}

impl AsRef<[u8]> for TrackedChunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for TrackedChunk {
    fn drop(&mut self) {
        let mut state = self.tracker.lock();
        state.unsent.remove(&self.id);
        let rate = self.rate.and_then(|id| state.rates.get_mut(&id));
        rate.into_iter()
            .for_each(|rate| rate.add_sent(self.bytes.len()));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use http_body_util::BodyExt;

    use super::*;

    impl ResponseTracker {
        /// Since when the oldest piece waits.
        fn oldest(&self) -> Option<Instant> {
            self.lock().unsent.values().map(|piece| piece.since).min()
        }
    }

    const LIMIT: Duration = Duration::from_secs(30);

    /// Answers under way, with as many pieces of each as HTTP/2 has at once.
    async fn answers(tracker: &Arc<ResponseTracker>, count: usize) -> Vec<(Body, VecDeque<Bytes>)> {
        let mut answers = Vec::new();
        for _ in 0..count {
            let body = tracker.begin().track(Body::from(vec![7; 2 << 20]), true);
            let mut answer = (body, VecDeque::new());
            for _ in 0..6 {
                hand_over(&mut answer).await;
            }
            answers.push(answer);
        }
        answers
    }

    async fn hand_over((body, pieces): &mut (Body, VecDeque<Bytes>)) {
        if let Some(frame) = body.frame().await {
            pieces.push_back(frame.expect("no error").into_data().expect("data"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_streams_over_a_slow_line_are_not_cut() {
        let tracker = Arc::new(ResponseTracker::default());
        let mut answers = answers(&tracker, 60).await;
        let (mut oldest, mut rounds) = (Duration::ZERO, 0);
        while answers.iter().any(|(_, pieces)| !pieces.is_empty()) {
            // 128 KiB a second, in frames of 16 KiB: a piece of each stream is out when its last
            // frame is.
            for is_last in [false, false, false, true] {
                for answer in &mut answers {
                    tracker.wrote(16 << 10);
                    tokio::time::advance(Duration::from_millis(125)).await;
                    if is_last {
                        answer.1.pop_front();
                        hand_over(answer).await;
                    }
                }
                oldest = oldest.max(
                    tracker
                        .oldest()
                        .map_or(Duration::ZERO, |since| since.elapsed()),
                );
                assert!(!tracker.is_stuck(LIMIT), "cut after {rounds} rounds");
            }
            rounds += 1;
        }
        assert!(oldest > LIMIT * 4, "the line was too fast: {oldest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_is_not_taken_beside_others_is_noticed() {
        let tracker = Arc::new(ResponseTracker::default());
        let mut answers = answers(&tracker, 2).await;
        for _ in 0..31 {
            tracker.wrote(CHUNK_BYTES);
            tokio::time::advance(Duration::from_secs(1)).await;
            answers[0].1.pop_front();
            hand_over(&mut answers[0]).await;
        }
        assert!(
            tracker.is_stuck(LIMIT),
            "one stream had a turn after the other"
        );

        drop(answers);
        let tracker = Arc::new(ResponseTracker::default());
        let _answers = self::answers(&tracker, 1000).await;
        tokio::time::advance(LIMIT + Duration::from_secs(1)).await;
        assert!(tracker.is_stuck(LIMIT), "nothing goes out");
        for _ in 0..300 {
            tracker.wrote(TAKEN_BYTES_MIN as usize);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!(tracker.is_stuck(LIMIT), "that long is nobody waited for");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_answered_waits_until_it_is_dropped() {
        let tracker = Arc::new(ResponseTracker::default());
        assert_eq!((tracker.idle_since(), tracker.oldest()), (None, None));
        let whole = Bytes::from(vec![7; CHUNK_BYTES + 1]);
        let mut body = tracker.begin().track(Body::from(whole.clone()), true);
        assert_eq!(body.size_hint().exact(), Some(whole.len() as u64));
        let began = Instant::now();
        assert_eq!(tracker.oldest(), Some(began), "nobody has asked for it yet");

        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        let first = body
            .frame()
            .await
            .expect("a frame")
            .expect("no error")
            .into_data()
            .expect("data");
        assert_eq!(
            (first.len(), tracker.oldest()),
            (CHUNK_BYTES, Some(Instant::now()))
        );
        assert_eq!(
            (body.size_hint().exact(), body.is_end_stream()),
            (Some(1), false)
        );
        let rest = body
            .frame()
            .await
            .expect("a frame")
            .expect("no error")
            .into_data()
            .expect("data");
        assert!(body.frame().await.is_none());
        assert_eq!(Bytes::from([&first[..], &rest[..]].concat()), whole);
        drop(rest);
        assert!(
            tracker.oldest().is_some(),
            "the first piece has not gone out"
        );
        drop(first);
        assert_eq!((tracker.oldest(), tracker.idle_since()), (None, None));
        drop(body);
        assert_eq!(tracker.idle_since(), Some(Instant::now()));
    }

    #[tokio::test]
    async fn an_answer_that_has_nothing_to_say_yet_does_not_wait_for_the_client() {
        let tracker = Arc::new(ResponseTracker::default());
        let silent = futures::stream::pending::<Result<Bytes, std::io::Error>>();
        let mut body = tracker.begin().track(Body::from_stream(silent), true);
        assert!(futures::poll!(body.frame()).is_pending());
        assert_eq!((tracker.oldest(), tracker.idle_since()), (None, None));
    }
}
