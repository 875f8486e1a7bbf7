//! Watches what comes over one connection: heads must be complete in time, and over HTTP/1 a client
//! that has gone is noticed.
//!
//! A client that sends a byte now and then could keep its place for as long as it likes, so a head
//! that has begun has a time in which it must be complete. hyper's own limit runs from the answer
//! before, so it has to be as long as a connection may be idle.
//!
//! A client may close its sending side once it has sent its request (`nc -N` does) and is still
//! owed the answer (RFC 9112, section 9.6). A client that has gone looks the same, and its request
//! would be worked on for nobody. So a client that has closed that side is sent `100 Continue` now
//! and then while it waits. Any client of HTTP/1.1 passes over that (RFC 9110, section 15.2.1), and
//! a machine without that client answers it by a reset.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Version;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

/// The first bytes of a connection over HTTP/2.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Time after which a client that has closed its sending side is first probed; doubled each time,
/// up to the longest.
const PROBE_MIN: Duration = Duration::from_secs(1);
const PROBE_MAX: Duration = Duration::from_secs(30);

/// A client of HTTP/1.0 can't be asked. It is waited for as long as a request may take.
const HTTP10_WAIT_MAX: Duration = Duration::from_secs(60);

const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Tells the socket of a connection over HTTP/1 about its requests.
#[derive(Debug, Default)]
pub struct RequestActivity {
    /// Heads that were read.
    heads: AtomicU64,
    /// Bodies that are thrown away.
    discarded: AtomicU64,
    /// A request has no answer yet.
    is_pending: AtomicBool,
    /// Its client knows no interim answers.
    is_http10: AtomicBool,
}

impl RequestActivity {
    /// Notes a request, which has no answer until what this returns is dropped.
    pub fn begin(self: &Arc<Self>, version: Version) -> PendingRequest {
        self.is_http10
            .store(version < Version::HTTP_11, Ordering::Relaxed);
        self.is_pending.store(true, Ordering::Relaxed);
        self.heads.fetch_add(1, Ordering::Relaxed);
        PendingRequest(Arc::clone(self))
    }

    /// Notes that the rest of a body is read until what this returns is dropped.
    pub fn discard(self: &Arc<Self>) -> DiscardGuard {
        self.discarded.fetch_add(1, Ordering::Relaxed);
        DiscardGuard(Arc::clone(self))
    }

    fn is_pending(&self) -> bool {
        self.is_pending.load(Ordering::Relaxed)
    }

    /// Returns whether what comes now is of the body of a request that was read.
    pub fn reads_body(&self) -> bool {
        self.is_pending() || self.discarded.load(Ordering::Relaxed) > 0
    }
}

/// A request without an answer.
#[derive(Debug)]
pub struct PendingRequest(Arc<RequestActivity>);

impl Drop for PendingRequest {
    fn drop(&mut self) {
        self.0.is_pending.store(false, Ordering::Relaxed);
    }
}

/// A body that is thrown away.
#[derive(Debug)]
pub struct DiscardGuard(Arc<RequestActivity>);

impl Drop for DiscardGuard {
    fn drop(&mut self) {
        self.0.discarded.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The protocol, as far as the first bytes tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WireProtocol {
    /// So many bytes were those of the preface of HTTP/2.
    Unknown(usize),
    Http1,
    Http2,
}

impl WireProtocol {
    fn after(self, bytes: &[u8]) -> Self {
        let Self::Unknown(matched) = self else {
            return self;
        };
        let expected = &PREFACE[matched..];
        let common = expected
            .iter()
            .zip(bytes)
            .take_while(|(expected, byte)| expected == byte)
            .count();
        match () {
            // A client of HTTP/2 may send its preface in several packets.
            () if common == expected.len() => Self::Http2,
            () if common == bytes.len() => Self::Unknown(matched + common),
            () => Self::Http1,
        }
    }
}

/// Watches the sending side of a client.
#[derive(Debug)]
pub struct ReadMonitor {
    activity: Arc<RequestActivity>,
    head_limit: Duration,
    protocol: WireProtocol,
    /// As [`RequestActivity::heads`] was when something last came.
    heads: u64,
    /// Something has come since then that is of no body.
    has_begun: bool,
    /// Runs while a part of a head has come.
    head: Option<Pin<Box<Sleep>>>,
    half_closed: Option<HalfClosed>,
}

/// The sending side of a client was closed while it waits for an answer.
#[derive(Debug)]
struct HalfClosed {
    since: Instant,
    pause: Duration,
    probe: Pin<Box<Sleep>>,
}

impl ReadMonitor {
    /// Returns those of a new connection. A head has to be complete within `head_limit`.
    pub fn new(activity: Arc<RequestActivity>, head_limit: Duration) -> Self {
        let protocol = WireProtocol::Unknown(0);
        Self {
            activity,
            head_limit,
            protocol,
            heads: 0,
            has_begun: false,
            head: None,
            half_closed: None,
        }
    }

    /// Notes what came.
    pub fn on_read(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.protocol = self.protocol.after(bytes);
        self.note_heads();
        self.has_begun = !self.activity.reads_body();
    }

    /// Forgets the part of a head that has become a request.
    fn note_heads(&mut self) {
        let heads = self.activity.heads.load(Ordering::Relaxed);

        // hyper may read several requests at once, so only the count of heads says what was
        // completed.
        if heads != self.heads {
            (self.heads, self.has_begun, self.head) = (heads, false, None);
        }
    }

    /// Polls the timer of a head that has begun, when nothing more has come. Ready if it took too
    /// long.
    pub fn poll_head_timeout(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.note_heads();

        // HTTP/2 multiplexes, so bytes there need not be of a head; bodies have limits of their
        // own.
        if self.protocol == WireProtocol::Http2 || !self.has_begun || self.activity.reads_body() {
            return Poll::Pending;
        }
        let limit = self.head_limit;
        let head = self.head.get_or_insert_with(|| Box::pin(sleep(limit)));
        head.as_mut().poll(cx).map(|()| {
            let reason = format!("a request's head was not complete {limit:?} after it began");
            io::Error::new(io::ErrorKind::TimedOut, reason)
        })
    }

    /// Checks that the client is still there, while a request is worked on and all that was written
    /// has gone out. Ready if it is gone.
    pub fn poll_disconnected(
        &mut self,
        stream: &TcpStream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Error> {
        if self.protocol != WireProtocol::Http1 || !self.activity.is_pending() {
            self.half_closed = None;
            return Poll::Pending;
        }
        // A peek that returns nothing is the only sign of a closed sending side.
        if self.half_closed.is_none() {
            let mut byte = [0];
            match stream.poll_peek(cx, &mut tokio::io::ReadBuf::new(&mut byte)) {
                Poll::Ready(Ok(0)) => {}
                Poll::Ready(Ok(_)) | Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(error),
            }
        }

        let half_closed = self.half_closed.get_or_insert_with(HalfClosed::now);
        while half_closed.probe.as_mut().poll(cx).is_ready() {
            if let Err(error) =
                half_closed.probe_client(stream, self.activity.is_http10.load(Ordering::Relaxed))
            {
                return Poll::Ready(error);
            }
        }
        Poll::Pending
    }
}

impl HalfClosed {
    fn now() -> Self {
        Self {
            since: Instant::now(),
            pause: PROBE_MIN,
            probe: Box::pin(sleep(PROBE_MIN)),
        }
    }

    /// Asks whether the client is there, and looks at what became of it the last time.
    fn probe_client(&mut self, stream: &TcpStream, is_http10: bool) -> io::Result<()> {
        // The reset that the last probe caused arrives later, so it is seen at the next one.
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        if !is_http10 {
            match stream.try_write(INTERIM) {
                Ok(bytes) if bytes == INTERIM.len() => {}
                // An answer behind a part of this could not be read.
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                // The answer before fills the socket. Whether it is taken is timed elsewhere.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        } else if self.since.elapsed() >= HTTP10_WAIT_MAX {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.probe.as_mut().reset(Instant::now() + self.pause);

        // Ever more seldom, so that a long request does not send its client hundreds of these.
        self.pause = (self.pause * 2).min(PROBE_MAX);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[test]
    fn the_first_bytes_tell_what_is_spoken() {
        for (pieces, protocol) in [
            (&[PREFACE][..], WireProtocol::Http2),
            (
                &[b"PRI * HT", b"TP/2.0\r\n\r\nSM\r\n\r\nmore"],
                WireProtocol::Http2,
            ),
            (&[b"P"], WireProtocol::Unknown(1)),
            (&[b"P", b"UT /"], WireProtocol::Http1),
            (&[b"PRI * HTTP/1.1\r\n"], WireProtocol::Http1),
            (&[b"GET /", PREFACE], WireProtocol::Http1),
        ] {
            let found = pieces
                .iter()
                .fold(WireProtocol::Unknown(0), |protocol, bytes| {
                    protocol.after(bytes)
                });
            assert_eq!(found, protocol, "{pieces:?}");
        }
    }

    async fn is_late(read_monitor: &mut ReadMonitor) -> bool {
        poll_fn(|cx| Poll::Ready(read_monitor.poll_head_timeout(cx).is_ready())).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_has_begun_has_a_time_and_nothing_else_has() {
        let (activity, limit) = (
            Arc::new(RequestActivity::default()),
            Duration::from_secs(10),
        );
        let mut read_monitor = ReadMonitor::new(Arc::clone(&activity), limit);
        let long = limit * 9;
        let idle = async |read_monitor: &mut ReadMonitor, what: &str| {
            for _ in 0..3 {
                assert!(!is_late(read_monitor).await, "{what}");
                tokio::time::advance(long).await;
            }
        };
        idle(&mut read_monitor, "nothing has come").await;

        read_monitor.on_read(b"PUT / HTTP/1.1\r\n\r\nbo");
        let asked = activity.begin(Version::HTTP_11);
        idle(&mut read_monitor, "its body may take longer").await;
        read_monitor.on_read(b"dy");
        drop(asked);
        idle(&mut read_monitor, "all was answered").await;

        let discarding = activity.discard();
        read_monitor.on_read(b"the rest of a body");
        drop(discarding);
        idle(&mut read_monitor, "that was no head").await;

        for _ in 0..9 {
            read_monitor.on_read(b"a");
            assert!(!is_late(&mut read_monitor).await);
            tokio::time::advance(limit / 9).await;
        }
        tokio::time::advance(Duration::from_millis(10)).await;
        read_monitor.on_read(b"a");
        assert!(
            is_late(&mut read_monitor).await,
            "a byte now and then is not enough"
        );

        let mut streams = ReadMonitor::new(activity, limit);
        streams.on_read(PREFACE);
        idle(&mut streams, "HTTP/2 has its own").await;
    }
}
