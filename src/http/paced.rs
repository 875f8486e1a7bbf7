//! A socket whose other side has to take what it asked for.
//!
//! A client that asks and does not read holds its answers in our memory. Once the kernel takes no more, the client has a time in
//! which it must take some; else writing fails, and the connection ends with all that it held. Nothing is timed while the kernel takes
//! what it is given, so this costs a connection in use nothing.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use super::admission::ServerStats;

/// What must be taken within the time: over the slowest lines in use this takes a second or two.
const TAKEN_BYTES_MIN: usize = 16 << 10;

/// A socket under a time limit for writing.
pub struct Paced {
    stream: TcpStream,
    limit: Duration,
    stats: Arc<ServerStats>,
    stall: Option<Stall>,
}

/// Since when the kernel does not take all that there is.
struct Stall {
    timer: Pin<Box<Sleep>>,
    /// Since the timer was set.
    taken_bytes: usize,
}

impl Paced {
    /// Returns `stream` with `limit` for taking [`TAKEN_BYTES_MIN`].
    pub fn new(stream: TcpStream, limit: Duration, stats: Arc<ServerStats>) -> Self {
        Self { stream, limit, stats, stall: None }
    }

    /// Notes what became of an attempt to write `wanted` bytes.
    fn note(&mut self, cx: &mut Context<'_>, wanted: usize, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Ok(bytes)) => {
                if bytes >= wanted {
                    self.stall = None;
                } else if let Some(stall) = &mut self.stall {
                    stall.taken_bytes += bytes;
                }
                Poll::Ready(Ok(bytes))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => self.wait(cx),
        }
    }

    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let limit = self.limit;
        let stall = self.stall.get_or_insert_with(|| Stall { timer: Box::pin(sleep(limit)), taken_bytes: 0 });
        while stall.timer.as_mut().poll(cx).is_ready() {
            if stall.taken_bytes < TAKEN_BYTES_MIN {
                self.stats.stalled();
                let reason = format!("the other side took nothing of its answer for {limit:?}");
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, reason)));
            }
            stall.taken_bytes = 0;
            stall.timer.as_mut().reset(Instant::now() + limit);
        }
        Poll::Pending
    }
}

impl AsyncRead for Paced {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Paced {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note(cx, bytes.len(), written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let wanted = slices.iter().map(|slice| slice.len()).sum();
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.note(cx, wanted, written)
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
