//! What was answered over one HTTP/2 connection and has not gone out yet.
//!
//! Each stream of HTTP/2 has a window of its own: a client can keep a thousand answers from going out while its connection is alive
//! and well, so the socket does not show it. Answers go out in pieces, and each is noted here until it is on the wire. The connection
//! looks now and then how old the oldest is, and ends if it is too old: HTTP/2 as we have it knows no way to end one stream.
//!
//! Lanes are left out: their peers watch them, and a lane that has nothing to say is no sign of anything.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Instant;

use super::haste::{Course, Haste};
use crate::budget::UNCHARGED_BYTES_MAX;

/// What is handed over at once, to wait for the stream's window.
const PIECE_BYTES: usize = 64 << 10;

/// The answers of one connection that are under way.
#[derive(Debug, Default)]
pub struct Outbox {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Requests that have no answer yet, or one that is not over.
    streams: usize,
    /// When the last of them ended.
    idle_since: Option<Instant>,
    last_id: u64,
    /// What waits for the client, and since when.
    waiting: BTreeMap<u64, Instant>,
    /// Of large answers, as long as not all of them was handed over.
    courses: HashMap<u64, Course>,
}

impl State {
    fn wait(&mut self) -> u64 {
        self.last_id += 1;
        self.waiting.insert(self.last_id, Instant::now());
        self.last_id
    }
}

impl Outbox {
    /// Counts a request as under way until what this returns is dropped.
    pub fn begin(self: &Arc<Self>) -> Exchange {
        self.lock().streams += 1;
        Exchange(Arc::clone(self))
    }

    /// Returns since when there is nothing under way. None: there is something, or there was never anything.
    pub fn idle_since(&self) -> Option<Instant> {
        let state = self.lock();
        state.idle_since.filter(|_| state.streams == 0)
    }

    /// Returns since when the oldest piece waits for the client.
    pub fn oldest(&self) -> Option<Instant> {
        self.lock().waiting.values().min().copied()
    }

    /// Returns whether HTTP/2 is spoken.
    pub fn has_streams(&self) -> bool {
        let state = self.lock();
        state.streams > 0 || state.idle_since.is_some()
    }

    /// Returns whether an answer is taken too slowly.
    pub fn misses(&self, haste: &Haste) -> bool {
        self.lock().courses.values().any(|course| haste.is_missed_by(course))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}

/// A request that is under way.
#[derive(Debug)]
pub struct Exchange(Arc<Outbox>);

impl Exchange {
    /// Returns the answer's body, which takes this with it. `is_timed`: the client has to take it in time.
    pub fn answer(self, body: Body, is_timed: bool) -> Body {
        let is_small = body.size_hint().upper().is_some_and(|bytes| bytes <= UNCHARGED_BYTES_MAX as u64);
        let (mut waits, mut course) = (None, None);
        if is_timed {
            let mut state = self.0.lock();
            let id = state.wait();
            if !is_small {
                state.courses.insert(id, Course::new());
                course = Some(id);
            }
            waits = Some(id);
        }
        Body::new(Answer { body, rest: Bytes::new(), is_timed, waits, course, exchange: self })
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.streams -= 1;
        if state.streams == 0 {
            state.idle_since = Some(Instant::now());
        }
    }
}

/// The body of an answer, in pieces.
struct Answer {
    body: Body,
    /// What is left of the last frame of `body`.
    rest: Bytes,
    is_timed: bool,
    /// While it is for the client to ask for more.
    waits: Option<u64>,
    /// What it goes by in [`State::courses`].
    course: Option<u64>,
    exchange: Exchange,
}

impl Answer {
    fn waits_no_more(&mut self) {
        if let Some(id) = self.waits.take() {
            self.exchange.0.lock().waiting.remove(&id);
        }
    }

    /// Begins to count again how fast it is taken.
    fn begin_anew(&self) {
        if let Some(id) = self.course {
            self.exchange.0.lock().courses.insert(id, Course::new());
        }
    }

    /// Hands the next piece over: until it is asked for more, the answer waits for the client.
    fn next_piece(&mut self) -> Bytes {
        let bytes = self.rest.split_to(self.rest.len().min(PIECE_BYTES));
        let outbox = &self.exchange.0;
        let mut state = outbox.lock();
        self.waits = Some(state.wait());
        let id = state.wait();
        drop(state);
        Bytes::from_owner(Piece { bytes, id, course: self.course, outbox: Arc::clone(outbox) })
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.waits_no_more();
        while self.rest.is_empty() {
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                // It is not the client who is waited for.
                self.begin_anew();
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
        Poll::Ready(Some(Ok(Frame::data(self.next_piece()))))
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

impl Drop for Answer {
    fn drop(&mut self) {
        self.waits_no_more();
        if let Some(id) = self.course {
            self.exchange.0.lock().courses.remove(&id);
        }
    }
}

/// A piece on its way to the socket.
struct Piece {
    bytes: Bytes,
    id: u64,
    /// That of its answer.
    course: Option<u64>,
    outbox: Arc<Outbox>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut state = self.outbox.lock();
        state.waiting.remove(&self.id);
        let course = self.course.and_then(|id| state.courses.get_mut(&id));
        course.into_iter().for_each(|course| course.take(self.bytes.len()));
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_answered_waits_until_it_is_dropped() {
        let outbox = Arc::new(Outbox::default());
        assert_eq!((outbox.idle_since(), outbox.oldest()), (None, None));
        let whole = Bytes::from(vec![7; PIECE_BYTES + 1]);
        let mut body = outbox.begin().answer(Body::from(whole.clone()), true);
        assert_eq!(body.size_hint().exact(), Some(whole.len() as u64));
        let began = Instant::now();
        assert_eq!(outbox.oldest(), Some(began), "nobody has asked for it yet");

        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        let first = body.frame().await.expect("a frame").expect("no error").into_data().expect("data");
        assert_eq!((first.len(), outbox.oldest()), (PIECE_BYTES, Some(Instant::now())));
        assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(1), false));
        let rest = body.frame().await.expect("a frame").expect("no error").into_data().expect("data");
        assert!(body.frame().await.is_none());
        assert_eq!(Bytes::from([&first[..], &rest[..]].concat()), whole);
        drop(rest);
        assert!(outbox.oldest().is_some(), "the first piece has not gone out");
        drop(first);
        assert_eq!((outbox.oldest(), outbox.idle_since()), (None, None));
        drop(body);
        assert_eq!(outbox.idle_since(), Some(Instant::now()));
    }

    #[tokio::test]
    async fn an_answer_that_has_nothing_to_say_yet_does_not_wait_for_the_client() {
        let outbox = Arc::new(Outbox::default());
        let silent = futures::stream::pending::<Result<Bytes, std::io::Error>>();
        let mut body = outbox.begin().answer(Body::from_stream(silent), true);
        assert!(futures::poll!(body.frame()).is_pending());
        assert_eq!((outbox.oldest(), outbox.idle_since()), (None, None));
    }
}
