//! Charges answers to the budget of the node, until the socket has taken them.
//!
//! A value is charged when it is read (`node::local_shards`, `routing::call`). What is made of it,
//! as JSON, is larger and has a life of its own: it is charged here when the answer is whole, in
//! the same step in which it was made, so that no more of them are uncharged at once than there are
//! threads. Answers that are streamed are charged piece by piece (`dialects::pieces`).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use crate::api::store::Failure;
use crate::budget::{Budget, Share, UNCHARGED_BYTES_MAX};

/// Marks an answer that is charged: by [`charge`], or because its body is a value that is.
#[derive(Debug, Clone, Copy)]
pub struct AlreadyCharged;

/// Charges the body of an answer, if it is whole and not small.
///
/// # Errors
///
/// The answer again, where there is no room for it.
pub fn charge(response: Response, answers: &Arc<Budget>) -> Result<Response, Box<Response>> {
    let bytes = response
        .body()
        .size_hint()
        .exact()
        .and_then(|bytes| usize::try_from(bytes).ok());

    // A body without an exact length is streamed, and its pieces are charged as they are made.
    let Some(bytes) = bytes.filter(|bytes| *bytes > UNCHARGED_BYTES_MAX) else {
        return Ok(response);
    };

    // Charged twice, a large value would take its room twice over.
    if response.extensions().get::<AlreadyCharged>().is_some() {
        return Ok(response);
    }
    match answers.take(bytes) {
        Some(share) => {
            let mut response = response.map(|inner| {
                Body::new(ChargedBody {
                    inner,
                    share: Some(share),
                })
            });
            response.extensions_mut().insert(AlreadyCharged);
            Ok(response)
        }
        None => Err(Box::new(response)),
    }
}

/// Charges a piece of an answer.
///
/// # Errors
///
/// Fails if there is no room for it.
pub fn charge_chunk(piece: Bytes, answers: &Arc<Budget>) -> Result<Bytes, Failure> {
    if piece.len() <= UNCHARGED_BYTES_MAX {
        return Ok(piece);
    }
    let share = answers
        .take(piece.len())
        .ok_or_else(|| Failure::no_room(answers))?;
    Ok(share.hold(piece))
}

/// A body of one piece. Its share goes with the piece, which outlives the body on its way to the
/// socket.
struct ChargedBody {
    inner: Body,
    share: Option<Share>,
}

impl HttpBody for ChargedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(context));
        let hold = |data: Bytes| match this.share.take() {
            Some(share) => {
                assert!(share.bytes() >= data.len(), "an answer is charged whole");
                share.hold(data)
            }
            None => data,
        };
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(hold))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn an_answer_is_charged_until_its_bytes_are_gone_and_small_ones_are_not() {
        let answers = Budget::new(10_000);
        let answer = |bytes: usize| Response::new(Body::from(vec![b'x'; bytes]));
        let small = charge(answer(UNCHARGED_BYTES_MAX), &answers).expect("it is small");
        let large = charge(answer(8000), &answers).expect("there is room");
        assert_eq!(
            (answers.used(), large.body().size_hint().exact()),
            (8000, Some(8000))
        );
        assert!(charge(answer(5000), &answers).is_err());
        let mut valued = answer(5000);
        valued.extensions_mut().insert(AlreadyCharged);
        assert!(charge(valued, &answers).is_ok());

        let bytes = large
            .into_body()
            .collect()
            .await
            .expect("a body")
            .to_bytes();
        assert_eq!(
            (bytes.len(), answers.used()),
            (8000, 8000),
            "the body is gone, and its bytes are not"
        );
        drop((bytes, small));
        assert_eq!(answers.used(), 0);
        assert!(charge_chunk(Bytes::from(vec![0; 20_000]), &answers).is_err());
        drop(charge_chunk(Bytes::from(vec![0; 10_000]), &answers).expect("all of it"));
        assert_eq!(answers.used(), 0);
    }
}
