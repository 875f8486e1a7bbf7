//! What comes over one connection: the heads of requests in time, and over HTTP/1 the end of it.
//!
//! A client that sends a byte now and then keeps its place for as long as it likes, unless a head
//! that has begun has a time in which it must be complete. hyper's own limit will not do: it runs
//! from the answer before, so it is as long as a connection may be idle.
//!
//! A client may close its sending side once it has sent its request (`nc -N` does), and is owed the
//! answer all the same (RFC 9112, section 9.6). A client that is gone looks the same, and what it
//! asked for would be worked on for nobody. So who has closed that side is sent `100 Continue` now
//! and then while it waits, which any client of HTTP/1.1 passes over (RFC 9110, section 15.2.1),
//! and which a machine without that client answers by a reset.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Version;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

/// What a connection over HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a client that has closed its sending side waits before it is first asked whether it is
/// there; doubled each time, up to the longest.
const PROBE_MIN: Duration = Duration::from_secs(1);
const PROBE_MAX: Duration = Duration::from_secs(30);

/// A client of HTTP/1.0 can't be asked. It is waited for as long as a request may take.
const UNASKED_MAX: Duration = Duration::from_secs(60);

const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What the requests of a connection over HTTP/1 tell its socket.
#[derive(Debug, Default)]
pub struct Inbox {
    /// Heads that were read.
    heads: AtomicU64,
    /// Bodies that are thrown away.
    discarded: AtomicU64,
    /// A request has no answer yet.
    is_asked: AtomicBool,
    /// Its client knows no interim answers.
    is_plain: AtomicBool,
}

impl Inbox {
    /// Notes a request, which has no answer until what this returns is dropped.
    pub fn begin(self: &Arc<Self>, version: Version) -> Asked {
        self.is_plain
            .store(version < Version::HTTP_11, Ordering::Relaxed);
        self.is_asked.store(true, Ordering::Relaxed);
        self.heads.fetch_add(1, Ordering::Relaxed);
        Asked(Arc::clone(self))
    }

    /// Notes that the rest of a body is read until what this returns is dropped.
    pub fn discard(self: &Arc<Self>) -> Discarding {
        self.discarded.fetch_add(1, Ordering::Relaxed);
        Discarding(Arc::clone(self))
    }

    fn is_asked(&self) -> bool {
        self.is_asked.load(Ordering::Relaxed)
    }

    /// Returns whether what comes now is of the body of a request that was read.
    pub fn reads_body(&self) -> bool {
        self.is_asked() || self.discarded.load(Ordering::Relaxed) > 0
    }
}

/// A request without an answer.
#[derive(Debug)]
pub struct Asked(Arc<Inbox>);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.is_asked.store(false, Ordering::Relaxed);
    }
}

/// A body that is thrown away.
#[derive(Debug)]
pub struct Discarding(Arc<Inbox>);

impl Drop for Discarding {
    fn drop(&mut self) {
        self.0.discarded.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a connection speaks, as its first bytes tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoken {
    /// So many bytes were those of the preface of HTTP/2.
    Unknown(usize),
    Http1,
    Http2,
}

impl Spoken {
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
            () if common == expected.len() => Self::Http2,
            () if common == bytes.len() => Self::Unknown(matched + common),
            () => Self::Http1,
        }
    }
}

/// What was seen of the sending side of a connection.
#[derive(Debug)]
pub struct Arrivals {
    inbox: Arc<Inbox>,
    head_limit: Duration,
    spoken: Spoken,
    /// As [`Inbox::heads`] was when something last came.
    heads: u64,
    /// Something has come since then that is of no body.
    has_begun: bool,
    /// Runs while a part of a head has come.
    head: Option<Pin<Box<Sleep>>>,
    ended: Option<Ended>,
}

/// The sending side of a client was closed while it waits for an answer.
#[derive(Debug)]
struct Ended {
    since: Instant,
    pause: Duration,
    probe: Pin<Box<Sleep>>,
}

impl Arrivals {
    /// Returns those of a new connection. A head has to be complete within `head_limit`.
    pub fn new(inbox: Arc<Inbox>, head_limit: Duration) -> Self {
        let spoken = Spoken::Unknown(0);
        Self {
            inbox,
            head_limit,
            spoken,
            heads: 0,
            has_begun: false,
            head: None,
            ended: None,
        }
    }

    /// Notes what came.
    pub fn came(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.spoken = self.spoken.after(bytes);
        self.note_heads();
        self.has_begun = !self.inbox.reads_body();
    }

    /// Forgets the part of a head that has become a request.
    fn note_heads(&mut self) {
        let heads = self.inbox.heads.load(Ordering::Relaxed);
        if heads != self.heads {
            (self.heads, self.has_begun, self.head) = (heads, false, None);
        }
    }

    /// Called when nothing more has come. Ready: the head that has begun took too long.
    pub fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.note_heads();
        if self.spoken == Spoken::Http2 || !self.has_begun || self.inbox.reads_body() {
            return Poll::Pending;
        }
        let limit = self.head_limit;
        let head = self.head.get_or_insert_with(|| Box::pin(sleep(limit)));
        head.as_mut().poll(cx).map(|()| {
            let reason = format!("a request's head was not complete {limit:?} after it began");
            io::Error::new(io::ErrorKind::TimedOut, reason)
        })
    }

    /// Called now and then while a request is worked on and all that was written has gone out.
    /// Ready: its client is gone.
    pub fn poll_gone(&mut self, stream: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.spoken != Spoken::Http1 || !self.inbox.is_asked() {
            self.ended = None;
            return Poll::Pending;
        }
        if self.ended.is_none() {
            let mut byte = [0];
            match stream.poll_peek(cx, &mut tokio::io::ReadBuf::new(&mut byte)) {
                Poll::Ready(Ok(0)) => {}
                Poll::Ready(Ok(_)) | Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(error),
            }
        }

        let ended = self.ended.get_or_insert_with(Ended::now);
        while ended.probe.as_mut().poll(cx).is_ready() {
            if let Err(error) = ended.ask(stream, self.inbox.is_plain.load(Ordering::Relaxed)) {
                return Poll::Ready(error);
            }
        }
        Poll::Pending
    }
}

impl Ended {
    fn now() -> Self {
        Self {
            since: Instant::now(),
            pause: PROBE_MIN,
            probe: Box::pin(sleep(PROBE_MIN)),
        }
    }

    /// Asks whether the client is there, and looks at what became of it the last time.
    fn ask(&mut self, stream: &TcpStream, is_plain: bool) -> io::Result<()> {
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        if !is_plain {
            match stream.try_write(INTERIM) {
                Ok(bytes) if bytes == INTERIM.len() => {}
                // An answer behind a part of this could not be read.
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        } else if self.since.elapsed() >= UNASKED_MAX {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.probe.as_mut().reset(Instant::now() + self.pause);
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
        for (pieces, spoken) in [
            (&[PREFACE][..], Spoken::Http2),
            (
                &[b"PRI * HT", b"TP/2.0\r\n\r\nSM\r\n\r\nmore"],
                Spoken::Http2,
            ),
            (&[b"P"], Spoken::Unknown(1)),
            (&[b"P", b"UT /"], Spoken::Http1),
            (&[b"PRI * HTTP/1.1\r\n"], Spoken::Http1),
            (&[b"GET /", PREFACE], Spoken::Http1),
        ] {
            let found = pieces
                .iter()
                .fold(Spoken::Unknown(0), |spoken, bytes| spoken.after(bytes));
            assert_eq!(found, spoken, "{pieces:?}");
        }
    }

    async fn is_late(arrivals: &mut Arrivals) -> bool {
        poll_fn(|cx| Poll::Ready(arrivals.poll_late(cx).is_ready())).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_has_begun_has_a_time_and_nothing_else_has() {
        let (inbox, limit) = (Arc::new(Inbox::default()), Duration::from_secs(10));
        let mut arrivals = Arrivals::new(Arc::clone(&inbox), limit);
        let long = limit * 9;
        let idle = async |arrivals: &mut Arrivals, what: &str| {
            for _ in 0..3 {
                assert!(!is_late(arrivals).await, "{what}");
                tokio::time::advance(long).await;
            }
        };
        idle(&mut arrivals, "nothing has come").await;

        arrivals.came(b"PUT / HTTP/1.1\r\n\r\nbo");
        let asked = inbox.begin(Version::HTTP_11);
        idle(&mut arrivals, "its body may take longer").await;
        arrivals.came(b"dy");
        drop(asked);
        idle(&mut arrivals, "all was answered").await;

        let discarding = inbox.discard();
        arrivals.came(b"the rest of a body");
        drop(discarding);
        idle(&mut arrivals, "that was no head").await;

        for _ in 0..9 {
            arrivals.came(b"a");
            assert!(!is_late(&mut arrivals).await);
            tokio::time::advance(limit / 9).await;
        }
        tokio::time::advance(Duration::from_millis(10)).await;
        arrivals.came(b"a");
        assert!(
            is_late(&mut arrivals).await,
            "a byte now and then is not enough"
        );

        let mut streams = Arrivals::new(inbox, limit);
        streams.came(PREFACE);
        idle(&mut streams, "HTTP/2 has its own").await;
    }
}
