//! A socket whose client has to read its answers in time, and to send what it begins
//! ([`ReadMonitor`]).
//!
//! A client that asks and does not read holds its answers in our memory. Once the kernel takes no
//! more, the client has a time in which it must take some; otherwise writing fails, and the
//! connection ends with all that it held. No timer runs while the kernel takes what it is given, so
//! this costs a connection in use nothing.
//!
//! While the budget of answers is short, an answer over HTTP/1 also has to be taken at a minimum
//! rate ([`SlowClientLimit`]). Streams of HTTP/2 have theirs in [`ResponseTracker`].

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use super::read_monitor::ReadMonitor;
use super::response_tracker::ResponseTracker;
use super::slow_clients::{SendRate, SlowClientLimit};
use super::stats::ServerStats;

/// Bytes to be taken within the time. Linux says that a socket takes more once half of the unsent
/// bytes (`listener::UNSENT_BYTES_MAX`) are gone, so a slow client has to take 64 KiB: over the
/// slowest lines in use this takes a few seconds.
const TAKEN_BYTES_MIN: usize = 16 << 10;

/// Checks of a stalled socket within the time for [`TAKEN_BYTES_MIN`].
const STALL_CHECKS: u32 = 4;

/// Once all was taken, what is written after this is another answer. Pieces of one follow each
/// other at once.
const NEXT_ANSWER_GAP: Duration = Duration::from_secs(1);

/// A socket under a time limit for writing.
pub struct TimedStream {
    stream: TcpStream,
    limit: Duration,
    stats: Arc<ServerStats>,
    slow_clients: SlowClientLimit,
    tracker: Arc<ResponseTracker>,
    read_monitor: ReadMonitor,
    stall: Option<WriteStall>,
}

/// A client that has not taken all that there was.
struct WriteStall {
    timer: Pin<Box<Sleep>>,
    /// Of the time for [`TAKEN_BYTES_MIN`].
    since: Instant,
    /// Since then.
    sent_bytes: usize,
    /// Of the whole answer.
    rate: SendRate,
    /// The time at which all was taken, if it is.
    drained_at: Option<Instant>,
}

impl WriteStall {
    fn new(check_interval: Duration) -> Self {
        let timer = Box::pin(sleep(check_interval));
        Self {
            timer,
            since: Instant::now(),
            sent_bytes: 0,
            rate: SendRate::new(),
            drained_at: None,
        }
    }

    /// Begins the time for [`TAKEN_BYTES_MIN`].
    fn restart(&mut self) {
        (self.since, self.sent_bytes, self.drained_at) = (Instant::now(), 0, None);
    }
}

impl TimedStream {
    /// Returns `stream` with `limit` for taking [`TAKEN_BYTES_MIN`].
    pub fn new(
        stream: TcpStream,
        limit: Duration,
        stats: Arc<ServerStats>,
        slow_clients: SlowClientLimit,
        tracker: Arc<ResponseTracker>,
        read_monitor: ReadMonitor,
    ) -> Self {
        Self {
            stream,
            limit,
            stats,
            slow_clients,
            tracker,
            read_monitor,
            stall: None,
        }
    }

    /// Notes what became of an attempt to write `wanted` bytes.
    fn on_write(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Ok(bytes)) => {
                assert!(bytes <= wanted, "a socket takes no more than there is");
                self.tracker.wrote(bytes);

                // No state while the kernel takes all that it is given, which is nearly always.
                if let Some(stall) = &mut self.stall {
                    match stall.drained_at {
                        // The counts belong to the answer before.
                        Some(drained_at) if drained_at.elapsed() > NEXT_ANSWER_GAP => {
                            self.stall = None
                        }
                        Some(_) => {}
                        None => {
                            stall.sent_bytes += bytes;
                            stall.rate.add_sent(bytes);
                            stall.drained_at = (bytes >= wanted).then(Instant::now);
                        }
                    }
                }
                Poll::Ready(Ok(bytes))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => self.on_blocked(cx),
        }
    }

    fn on_blocked(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let check_interval = self.limit / STALL_CHECKS;
        let stall = self
            .stall
            .get_or_insert_with(|| WriteStall::new(check_interval));
        match stall.drained_at {
            Some(drained_at) if drained_at.elapsed() > NEXT_ANSWER_GAP => {
                *stall = WriteStall::new(check_interval)
            }
            // All had been taken: the wait until now was ours, not the client's.
            Some(drained_at) => {
                stall.rate.exclude(drained_at.elapsed());
                stall.restart();
            }
            None => {}
        }
        while stall.timer.as_mut().poll(cx).is_ready() {
            let is_silent =
                stall.since.elapsed() >= self.limit && stall.sent_bytes < TAKEN_BYTES_MIN;
            // Over HTTP/2 the rate of the socket is that of all streams: the tracker judges each
            // instead.
            let is_slow =
                !self.tracker.has_streams() && self.slow_clients.is_exceeded_by(&stall.rate);
            if is_silent || is_slow {
                self.stats.stalled();
                let reason = if is_silent {
                    "too little"
                } else {
                    "too slowly, and others wait for room"
                };
                return Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("its answer is taken {reason}"),
                )));
            }

            // It took enough within this time. The next one begins, for the same amount.
            if stall.since.elapsed() >= self.limit {
                stall.restart();
            }
            stall.timer.as_mut().reset(Instant::now() + check_interval);
        }
        Poll::Pending
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buffer) {
            Poll::Ready(Ok(())) => {
                self.read_monitor.on_read(&buffer.filled()[before..]);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            // Only when nothing is left to read: what has come already is not late.
            Poll::Pending => self.read_monitor.poll_head_timeout(cx).map(Err),
        }
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.on_write(cx, bytes.len(), written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wanted = slices.iter().map(|slice| slice.len()).sum();
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.on_write(cx, wanted, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Checks the client too: hyper calls this whenever it was woken while a request is worked on,
    /// with nothing to write.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Poll::Ready(error) = this.read_monitor.poll_disconnected(&this.stream, cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::net::TcpListener;

    use super::*;
    use crate::budget::Budget;

    /// A socket that was given more than the kernels take, and its other side, which reads nothing.
    async fn stalled(answers: &Arc<Budget>) -> (TimedStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let client = TcpStream::connect(listener.local_addr().expect("an address"))
            .await
            .expect("it listens");
        let (stream, _) = listener.accept().await.expect("a connection");
        let slow_clients = SlowClientLimit::new(Arc::clone(answers), 64 << 10);
        let (hour, read_monitor) = (
            Duration::from_secs(3600),
            ReadMonitor::new(Arc::default(), Duration::MAX),
        );
        let mut paced = TimedStream::new(
            stream,
            hour,
            Arc::default(),
            slow_clients,
            Arc::default(),
            read_monitor,
        );
        while write(&mut paced).await.is_ready() {}
        (paced, client)
    }

    async fn write(paced: &mut TimedStream) -> Poll<io::Result<usize>> {
        let bytes = vec![0; 1 << 20];
        poll_fn(|cx| Poll::Ready(Pin::new(&mut *paced).poll_write(cx, &bytes))).await
    }

    #[tokio::test(start_paused = true)]
    async fn who_reads_too_slowly_is_cut_where_there_is_little_room() {
        let answers = Budget::new(100);
        let (mut paced, _client) = stalled(&answers).await;
        tokio::time::advance(Duration::from_secs(1000)).await;
        assert!(write(&mut paced).await.is_pending(), "there is room");
        let _share = answers.take(51).expect("there is room");
        tokio::time::advance(Duration::from_secs(1000)).await;
        assert!(matches!(
            write(&mut paced).await,
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::TimedOut
        ));
    }
}
