//! Charges the heads of requests, line and headers, whole or still on their way.
//!
//! A client may send 64 KiB of head as slowly as it likes, and on thousands of connections. So what
//! a connection has read of a head is charged to a budget of the process, beyond what every
//! connection may have. Over HTTP/1 the charge stays until a smaller head has come, because the
//! buffer of the connection stays as large. Over HTTP/2, where small frames become large heads,
//! each request is charged for its own as long as it is answered.

use parking_lot::Mutex;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use http::Request;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::read_monitor::RequestActivity;
use super::response_tracker::ResponseTracker;
use super::timed_stream::TimedStream;
use crate::budget::{Budget, Share, UNCHARGED_BYTES_MAX};

/// A charge grows by steps, not with every byte.
const STEP_BYTES: usize = 4 << 10;

/// Charges what one connection has read of its next head.
#[derive(Debug)]
pub struct HeadBudget {
    bytes: AtomicUsize,
    /// Requests being answered: what is read meanwhile is a body.
    in_flight: AtomicUsize,
    charged: AtomicUsize,
    share: Mutex<Share>,
    /// A connection buffers no more than this.
    bytes_max: usize,
}

impl HeadBudget {
    /// Returns that of a new connection.
    pub fn new(heads: &Arc<Budget>, bytes_max: usize) -> Self {
        let share = Mutex::new(heads.empty_share());
        let zero = || AtomicUsize::new(0);
        Self {
            bytes: zero(),
            in_flight: zero(),
            charged: zero(),
            share,
            bytes_max,
        }
    }

    /// Counts bytes that were read. False: there is no room for them. `is_busy` says whether they
    /// are of requests that this does not know of, or of one that was answered before its end.
    pub fn read(&self, bytes: usize, is_busy: impl FnOnce() -> bool) -> bool {
        if self.in_flight.load(Ordering::Relaxed) > 0 {
            return true;
        }
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if bytes <= UNCHARGED_BYTES_MAX.max(self.charged.load(Ordering::Relaxed)) {
            return true;
        }
        if is_busy() {
            self.bytes.store(0, Ordering::Relaxed);
            return true;
        }
        self.charge(bytes)
    }

    fn charge(&self, bytes: usize) -> bool {
        let wanted = bytes.next_multiple_of(STEP_BYTES).min(self.bytes_max);
        let mut share = self.share.lock();
        let missing = wanted.saturating_sub(share.bytes());
        let granted = missing == 0 || share.grow(missing);
        assert!(!granted || share.bytes() >= wanted);
        self.charged.store(share.bytes(), Ordering::Relaxed);
        granted
    }

    /// Notes that the head of a request is whole, and that what is read until this is dropped is no
    /// head. What was read with it may be the beginning of a body, which is charged elsewhere.
    pub fn begin<B>(&self, request: &Request<B>) -> RequestInFlight<'_> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
        if self.charged.load(Ordering::Relaxed) > 0 {
            let bytes = bytes_of(request);
            let kept = if bytes <= UNCHARGED_BYTES_MAX {
                0
            } else {
                bytes
            };
            let mut share = self.share.lock();
            share.shrink_to(kept);
            self.charged.store(share.bytes(), Ordering::Relaxed);
        }
        RequestInFlight(self)
    }

    /// Charges the head of one of several requests of this connection. None: there is no room.
    pub fn take<B>(&self, request: &Request<B>) -> Option<Share> {
        let mut share = self.share.lock().new_share();
        let bytes = bytes_of(request);
        (bytes <= UNCHARGED_BYTES_MAX || share.grow(bytes)).then_some(share)
    }
}

/// A request that is answered.
#[derive(Debug)]
pub struct RequestInFlight<'a>(&'a HeadBudget);

impl Drop for RequestInFlight<'_> {
    fn drop(&mut self) {
        let before = self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        assert_ne!(before, 0, "each request ends once");
    }
}

/// A connection whose heads are charged. It ends where there is no room for one.
pub struct HeadLimitedStream {
    stream: TimedStream,
    head_budget: Arc<HeadBudget>,
    activity: Arc<RequestActivity>,
    tracker: Arc<ResponseTracker>,
}

impl HeadLimitedStream {
    /// Returns `stream`, of which `head_budget` knows what is head.
    pub fn new(
        stream: TimedStream,
        head_budget: Arc<HeadBudget>,
        activity: Arc<RequestActivity>,
        tracker: Arc<ResponseTracker>,
    ) -> Self {
        Self {
            stream,
            head_budget,
            activity,
            tracker,
        }
    }
}

impl AsyncRead for HeadLimitedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let bytes = buffer.filled().len() - before;
        // The rest of a body whose request was answered early is no head either.
        if self.head_budget.read(bytes, || {
            self.tracker.is_busy() || self.activity.reads_body()
        }) {
            return Poll::Ready(Ok(()));
        }
        let reason = "there is no room for the heads of more requests";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::QuotaExceeded, reason)))
    }
}

impl AsyncWrite for HeadLimitedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Returns what a head takes, nearly.
fn bytes_of<B>(request: &Request<B>) -> usize {
    let path = request
        .uri()
        .path_and_query()
        .map_or(0, |path| path.as_str().len());
    path + request
        .headers()
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1 << 10;

    fn request(bytes: usize) -> Request<()> {
        Request::get("/")
            .header("a", "b".repeat(bytes))
            .body(())
            .expect("a request")
    }

    #[test]
    fn a_head_is_charged_while_it_comes_and_as_long_as_its_buffer_stays() {
        let heads = Budget::new(100 * KIB);
        let head_budget = HeadBudget::new(&heads, 64 * KIB);
        let read = |bytes: usize| head_budget.read(bytes, || false);
        assert!(read(4 * KIB));
        assert_eq!(heads.used(), 0, "as much as every connection may have");
        assert!(read(1) && read(40 * KIB));
        assert_eq!(heads.used(), 48 * KIB);
        assert!(read(40 * KIB), "no more is buffered than the limit");
        assert_eq!(heads.used(), 64 * KIB);

        let other = HeadBudget::new(&heads, 64 * KIB);
        assert!(other.read(30 * KIB, || false));
        assert!(!other.read(30 * KIB, || false), "there is no room");
        drop(other);
        assert_eq!(heads.used(), 64 * KIB);

        let in_flight = head_budget.begin(&request(60 * KIB));
        assert!(read(1 << 30), "that is a body");
        drop(in_flight);
        assert!(
            (60 * KIB..61 * KIB).contains(&heads.used()),
            "the buffer is as large as before"
        );
        assert!(read(100));
        drop(head_budget.begin(&request(90)));
        assert_eq!(heads.used(), 0, "a small one came");
        assert!(
            head_budget.read(1 << 30, || true),
            "frames of streams that are under way"
        );
        assert_eq!(heads.used(), 0);
    }
}
