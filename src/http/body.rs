//! Reads request bodies, within limits: of one body, of all that are in flight, and in time.
//!
//! Invariant: a byte of a body is charged to the common budget before it is kept, and given back
//! when its [`BodyBytes`] is dropped. A body that is declared too large is refused before any of it
//! is read, so a client that sent `Expect: 100-continue` never sends it.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use bytes::Bytes;
use http::request::Parts;
use http::{Version, header};

use http_body_util::BodyExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::limits::Limits;
use super::problem::{Code, Problem};
use super::server::ClientInfo;
use crate::budget::{Budget, Share};

/// Bytes that are read and thrown away after a refusal, so that a client that sends first and reads
/// then gets to see the answer.
const DISCARD_BYTES_MAX: usize = 64 << 20;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// So much of a body, or all that is left of it, comes within [`Limits::body_chunk_timeout`]: a
/// byte now and then holds what came before it.
const CHUNK_BYTES: usize = 16 << 10;

/// A body that is longer than its first piece gets so much room at first, if it may be as long.
const FIRST_BYTES: usize = 16 << 10;

/// A body that was read. It stays charged until this is dropped: keep it as long as the request is
/// worked on.
#[derive(Debug)]
pub struct BodyBytes {
    /// In an allocation of its own, not in the connection's read buffer: a small value that is kept
    /// would keep all of that.
    pub bytes: Bytes,
    share: Share,
}

impl BodyBytes {
    /// Returns an empty share of the same budget, for what is made of the body.
    pub fn new_share(&self) -> Share {
        self.share.new_share()
    }
}

impl Deref for BodyBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The largest body that a route takes, and how its error names that.
#[derive(Debug, Clone, Copy)]
pub struct BodyLimit {
    pub bytes_max: usize,
    pub what: &'static str,
}

impl BodyLimit {
    fn exceeded(self) -> Problem {
        Problem::new(
            Code::TooLarge,
            format!("{} is at most {} bytes", self.what, self.bytes_max),
        )
        .extension("limit_bytes", self.bytes_max)
    }
}

/// Returns `body` unless it is declared too large. Nothing of it is read.
pub fn admit(parts: &Parts, body: Body, limit: BodyLimit) -> Result<Body, Problem> {
    // The lower bound is the stated length, or 0 for a body in chunks, which is bounded as it is
    // read.
    if body.size_hint().lower() > limit.bytes_max as u64 {
        discard(parts, body);
        return Err(limit.exceeded());
    }
    Ok(body)
}

/// Reads `body` to its end. A refused one is thrown away in the background, within bounds.
pub async fn read(
    parts: &Parts,
    body: Body,
    limit: BodyLimit,
    limits: &Limits,
    budget: &Arc<Budget>,
) -> Result<BodyBytes, Problem> {
    let mut body = admit(parts, body, limit)?;
    let mut share = budget.empty_share();
    match collect(&mut body, limit, limits, &mut share).await {
        Ok(bytes) => Ok(BodyBytes { bytes, share }),
        Err(problem) => {
            // The bytes that were read are gone already: their room must not wait until the rest
            // is thrown away.
            drop(share);
            discard(parts, body);
            Err(problem)
        }
    }
}

async fn collect(
    body: &mut Body,
    limit: BodyLimit,
    limits: &Limits,
    share: &mut Share,
) -> Result<Bytes, Problem> {
    let mut buffer = Vec::new();
    let end = Instant::now() + limits.body_timeout;
    let mut chunk_deadline = ChunkDeadline::new(limits.body_chunk_timeout);
    loop {
        let slow = || {
            let (least, most) = (limits.body_chunk_timeout, limits.body_timeout);
            let detail = format!(
                "less than {CHUNK_BYTES} bytes, or what was left, in {least:?}, or not complete \
                after {most:?}"
            );
            Problem::new(Code::BodyTimeout, detail)
        };
        let data = match timeout_at(end.min(chunk_deadline.deadline), body.frame())
            .await
            .map_err(|_| slow())?
        {
            None => return Ok(Bytes::from(buffer.into_boxed_slice())),
            Some(Err(error)) => {
                return Err(Problem::new(
                    Code::InvalidBody,
                    format!("the body broke off: {error}"),
                ));
            }
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
        };
        let bytes = buffer.len() + data.len();

        // A body in chunks states no length, so its bound is held at each piece.
        if bytes > limit.bytes_max {
            return Err(limit.exceeded());
        }

        if bytes > buffer.capacity() {
            // If the length is known, the buffer grows no further than that and the limit.
            let left =
                usize::try_from(body.size_hint().upper().unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
            let capacity = buffer_capacity(bytes, buffer.len(), left.min(limit.bytes_max - bytes));
            if !share.grow(capacity - buffer.capacity()) {
                return Err(overloaded(limits));
            }
            buffer.reserve_exact(capacity - buffer.len());
        }
        buffer.extend_from_slice(&data);
        assert!(buffer.len() <= limit.bytes_max, "a body within its limit");
        assert!(
            share.bytes() >= buffer.len(),
            "a body is paid for before it is kept"
        );
        chunk_deadline.note(data.len());
    }
}

/// Returns what a buffer of `had` bytes should have room for, when it is to hold `bytes` and at
/// most `left` may follow. All of it is paid for, so it grows by a quarter, not to the double.
fn buffer_capacity(bytes: usize, had: usize, left: usize) -> usize {
    bytes + (had / 4).max(FIRST_BYTES.saturating_sub(bytes)).min(left)
}

/// The time by which the next [`CHUNK_BYTES`] of a body must have come.
struct ChunkDeadline {
    deadline: Instant,
    patience: Duration,
    bytes: usize,
}

impl ChunkDeadline {
    fn new(patience: Duration) -> Self {
        Self {
            deadline: Instant::now() + patience,
            patience,
            bytes: 0,
        }
    }

    fn note(&mut self, bytes: usize) {
        self.bytes += bytes;
        if self.bytes >= CHUNK_BYTES {
            *self = Self::new(self.patience);
        }
    }
}

/// Returns the problem of a body for which the common budget has no room.
pub fn overloaded(limits: &Limits) -> Problem {
    let detail = format!(
        "bodies in flight are at most {} bytes together",
        limits.bodies_bytes_max
    );
    Problem::new(Code::Overloaded, detail).retry_after_ms(1000)
}

/// Reads on while the answer goes out: closing a connection with unread data resets it, and the
/// client may lose the answer.
///
/// Not for HTTP/2, where a stream can be reset alone, nor for a client that waits for
/// `100 Continue`, which it will not get. The task owns nothing but the body, and ends with the
/// connection, or after a few seconds.
pub fn discard(parts: &Parts, mut body: Body) {
    if parts.version >= Version::HTTP_2
        || parts.headers.contains_key(header::EXPECT)
        || body.is_end_stream()
    {
        return;
    }

    // The connection must not take what is thrown away for the head of its next request.
    let discarding = parts
        .extensions
        .get::<ClientInfo>()
        .map(|client| client.activity.discard());
    let drain = async move {
        let _discarding = discarding;
        let mut left = DISCARD_BYTES_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    tokio::spawn(timeout(DISCARD_TIMEOUT, drain));
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    fn parts() -> Parts {
        http::Request::new(()).into_parts().0
    }

    const SMALL: BodyLimit = BodyLimit {
        bytes_max: 10,
        what: "a test",
    };

    #[tokio::test]
    async fn the_budget_is_given_back_whatever_happens() {
        let limits = Limits {
            bodies_bytes_max: 8,
            ..Limits::default()
        };
        let budget = Budget::new(8);
        let held = read(&parts(), Body::from("12345"), SMALL, &limits, &budget)
            .await
            .expect("it fits");
        assert_eq!((&held[..], budget.used()), (&b"12345"[..], 5));
        let refused = read(&parts(), Body::from("6789"), SMALL, &limits, &budget)
            .await
            .expect_err("it does not fit");
        assert_eq!((refused.code(), budget.used()), ("overloaded", 5));
        drop(held);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_ceiling_holds_with_and_without_a_declared_length() {
        let (limits, budget) = (Limits::default(), Budget::new(100));
        let at_the_limit = read(&parts(), Body::from("0123456789"), SMALL, &limits, &budget)
            .await
            .expect("it fits");
        assert_eq!(at_the_limit.len(), 10);
        let chunks = futures::stream::iter([Ok::<_, std::io::Error>("012345"), Ok("6789A")]);
        for body in [Body::from("0123456789A"), Body::from_stream(chunks)] {
            let refused = read(&parts(), body, SMALL, &limits, &budget)
                .await
                .expect_err("it is too large");
            assert_eq!(
                (refused.code(), refused.detail.as_str()),
                ("too_large", "a test is at most 10 bytes")
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_coming_or_trickles_times_out() {
        let (limits, budget) = (Limits::default(), Budget::new(1 << 20));
        let large = BodyLimit {
            bytes_max: 1 << 20,
            what: "a test",
        };
        let every = |wait: Duration, bytes: usize, count: usize| {
            let pieces = futures::stream::iter(0..count).then(move |_| async move {
                tokio::time::sleep(wait).await;
                Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; bytes]))
            });
            Body::from_stream(pieces)
        };
        let stuck = Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>());
        for body in [
            stuck,
            every(Duration::from_secs(9), 1, 1000),
            every(Duration::from_secs(9), CHUNK_BYTES / 2, 1000),
        ] {
            let began = Instant::now();
            let refused = read(&parts(), body, large, &limits, &budget)
                .await
                .expect_err("it is too slow");
            assert_eq!(
                (refused.code(), began.elapsed()),
                ("body_timeout", limits.body_chunk_timeout)
            );
            assert_eq!(budget.used(), 0);
        }
        let slow = every(Duration::from_secs(9), CHUNK_BYTES, 20);
        let held = read(&parts(), slow, large, &limits, &budget)
            .await
            .expect("it comes in time");
        assert_eq!(held.len(), 20 * CHUNK_BYTES);
        let endless = every(Duration::from_secs(9), CHUNK_BYTES, 60);
        assert_eq!(
            read(&parts(), endless, large, &limits, &budget)
                .await
                .expect_err("it takes too long")
                .code(),
            "body_timeout"
        );
    }

    #[tokio::test]
    async fn all_that_is_allocated_for_a_body_is_paid_for() {
        let (limits, budget) = (Limits::default(), Budget::new(1 << 20));
        let large = BodyLimit {
            bytes_max: 1 << 20,
            what: "a test",
        };
        let pieces =
            futures::stream::iter((0..100).map(|_| Ok::<_, std::io::Error>(vec![b'x'; 1000])));
        let held = read(&parts(), Body::from_stream(pieces), large, &limits, &budget)
            .await
            .expect("it fits");
        assert!(
            (held.len()..held.len() * 5 / 4 + 1000).contains(&budget.used()),
            "{}",
            budget.used()
        );
        drop(held);
        let declared = read(
            &parts(),
            Body::from(vec![b'x'; 5000]),
            large,
            &limits,
            &budget,
        )
        .await
        .expect("it fits");
        assert_eq!(
            (declared.len(), budget.used()),
            (5000, 5000),
            "no more than it has"
        );
    }

    #[test]
    fn room_grows_with_what_may_come() {
        for ((bytes, had, left), room) in [
            ((100, 0, 0), 100),
            ((100, 0, 50), 150),
            ((100, 0, usize::MAX - 100), FIRST_BYTES),
            ((100_000, 80_000, usize::MAX - 100_000), 120_000),
            ((100_000, 80_000, 5), 100_005),
        ] {
            assert_eq!(
                buffer_capacity(bytes, had, left),
                room,
                "{bytes} after {had}, {left} left"
            );
        }
    }
}
