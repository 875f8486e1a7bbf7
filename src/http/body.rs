//! Reads request bodies, within limits: of one body, of all that are in flight, and in time.
//!
//! Invariant: a byte of a body is charged to the common budget before it is kept, and given back when its [`Held`] is dropped.
//! A body that is declared too large is refused before any of it is read, so a client that sent `Expect: 100-continue` never sends it.

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
use crate::budget::{Budget, Share};

/// What is read and thrown away after a refusal, so that a client that sends first and reads then gets to see the answer.
const DISCARD_BYTES_MAX: usize = 64 << 20;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// A body that was read. It stays charged until this is dropped: keep it as long as the request is worked on.
#[derive(Debug)]
pub struct Held {
    /// In an allocation of its own, not in the connection's read buffer: a small value that is kept would keep all of that.
    pub bytes: Bytes,
    share: Share,
}

impl Held {
    /// A part of the same budget, empty as yet: for what is made of the body.
    pub fn new_share(&self) -> Share {
        self.share.new_share()
    }
}

impl Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The largest body that a route takes, and how its error names that.
#[derive(Debug, Clone, Copy)]
pub struct Ceiling {
    pub bytes_max: usize,
    pub what: &'static str,
}

impl Ceiling {
    fn exceeded(self) -> Problem {
        Problem::new(Code::TooLarge, format!("{} is at most {} bytes", self.what, self.bytes_max))
            .extension("limit_bytes", self.bytes_max)
    }
}

/// Reads `body` to its end. A refused one is thrown away in the background, within bounds.
pub async fn read(
    parts: &Parts,
    mut body: Body,
    ceiling: Ceiling,
    limits: &Limits,
    budget: &Arc<Budget>,
) -> Result<Held, Problem> {
    if body.size_hint().lower() > ceiling.bytes_max as u64 {
        discard(parts, body);
        return Err(ceiling.exceeded());
    }
    let mut share = budget.empty_share();
    match collect(&mut body, ceiling, limits, &mut share).await {
        Ok(bytes) => Ok(Held { bytes, share }),
        Err(problem) => {
            drop(share);
            discard(parts, body);
            Err(problem)
        }
    }
}

async fn collect(body: &mut Body, ceiling: Ceiling, limits: &Limits, share: &mut Share) -> Result<Bytes, Problem> {
    let mut buffer = Vec::new();
    let end = Instant::now() + limits.body_timeout;
    loop {
        let slow = || {
            let detail = format!("no data for {:?}, or not complete after {:?}", limits.body_chunk_timeout, limits.body_timeout);
            Problem::new(Code::BodyTimeout, detail)
        };
        let deadline = end.min(Instant::now() + limits.body_chunk_timeout);
        let data = match timeout_at(deadline, body.frame()).await.map_err(|_| slow())? {
            None => return Ok(Bytes::from(buffer.into_boxed_slice())),
            Some(Err(error)) => return Err(Problem::new(Code::InvalidBody, format!("the body broke off: {error}"))),
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
        };
        if buffer.len() + data.len() > ceiling.bytes_max {
            return Err(ceiling.exceeded());
        }
        if !share.grow(data.len()) {
            return Err(overloaded(limits));
        }
        buffer.extend_from_slice(&data);
    }
}

/// There is no room in the common budget.
pub fn overloaded(limits: &Limits) -> Problem {
    let detail = format!("bodies in flight are at most {} bytes together", limits.bodies_bytes_max);
    Problem::new(Code::Overloaded, detail).retry_after_ms(1000)
}

/// Reads on while the answer goes out: closing a connection with unread data resets it, and the client may lose the answer.
///
/// Not for HTTP/2, where a stream can be reset alone, nor for a client that waits for `100 Continue`, which it will not get. The task
/// owns nothing but the body, and ends with the connection, or after a few seconds.
pub fn discard(parts: &Parts, mut body: Body) {
    if parts.version >= Version::HTTP_2 || parts.headers.contains_key(header::EXPECT) || body.is_end_stream() {
        return;
    }
    let drain = async move {
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
    use super::*;

    fn parts() -> Parts {
        http::Request::new(()).into_parts().0
    }

    const SMALL: Ceiling = Ceiling { bytes_max: 10, what: "a test" };

    #[tokio::test]
    async fn the_budget_is_given_back_whatever_happens() {
        let limits = Limits { bodies_bytes_max: 8, ..Limits::default() };
        let budget = Budget::new(8);
        let held = read(&parts(), Body::from("12345"), SMALL, &limits, &budget).await.expect("it fits");
        assert_eq!((&held[..], budget.used()), (&b"12345"[..], 5));
        let refused = read(&parts(), Body::from("6789"), SMALL, &limits, &budget).await.expect_err("it does not fit");
        assert_eq!((refused.code(), budget.used()), ("overloaded", 5));
        drop(held);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_ceiling_holds_with_and_without_a_declared_length() {
        let (limits, budget) = (Limits::default(), Budget::new(100));
        let at_the_limit = read(&parts(), Body::from("0123456789"), SMALL, &limits, &budget).await.expect("it fits");
        assert_eq!(at_the_limit.len(), 10);
        let chunks = futures::stream::iter([Ok::<_, std::io::Error>("012345"), Ok("6789A")]);
        for body in [Body::from("0123456789A"), Body::from_stream(chunks)] {
            let refused = read(&parts(), body, SMALL, &limits, &budget).await.expect_err("it is too large");
            assert_eq!((refused.code(), refused.detail.as_str()), ("too_large", "a test is at most 10 bytes"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_coming_times_out() {
        let (limits, budget) = (Limits::default(), Budget::new(100));
        let stuck = Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>());
        let refused = read(&parts(), stuck, SMALL, &limits, &budget).await.expect_err("it never ends");
        assert_eq!(refused.code(), "body_timeout");
    }
}
