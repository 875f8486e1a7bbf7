//! [`HttpDial`]: a lane as one long-lived `POST /peer/lane/{lane}` over HTTP/2 with prior
//! knowledge, a streaming body each way.
//!
//! Every dial makes a connection of its own, so that lanes never share one and a dead connection is
//! never used again. The serving side mounts `serve_lane` at that path, answers 200 at once, and
//! must have nodelay set on its sockets.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;

use crate::raft::transport::{Dial, Incoming, Lane, LaneError, Outgoing, Peer};
use crate::types::NodeId;

/// Room for several windows of appends of about 1 MiB each.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
const HTTP_FRAME_BYTES: u32 = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval of keep-alive frames; a peer that vanishes is noticed within about twice this.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Dials peers over HTTP/2.
#[derive(Debug, Clone, Copy, Default)]
pub struct HttpDial;

impl Dial for HttpDial {
    fn dial(
        &self,
        _to: NodeId,
        peer: Peer,
        lane: Lane,
        outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<Incoming, LaneError>> {
        Box::pin(async move {
            let client = connection().map_err(|error| LaneError::Down(error.to_string()))?;
            let body = reqwest::Body::wrap_stream(outgoing.map(Ok::<Bytes, Infallible>));
            let request = client
                .post(format!("http://{}/peer/lane/{}", peer.address, lane.name()))
                .body(body);

            // The peer answers at once, before it has read a frame: the answer's body carries the
            // replies.
            let response = request
                .send()
                .await
                .map_err(|error| LaneError::Down(with_causes(&error)))?;
            if !response.status().is_success() {
                return Err(LaneError::Down(format!(
                    "the peer answered {}",
                    response.status()
                )));
            }
            let chunks = response
                .bytes_stream()
                .map(|chunk| chunk.map_err(|error| LaneError::Broken(with_causes(&error))));
            Ok(Box::pin(chunks) as Incoming)
        })
    }
}

fn connection() -> reqwest::Result<reqwest::Client> {
    // Keep-alive notices a peer that vanished without closing, as after a power cut, within
    // seconds.
    reqwest::Client::builder()
        .no_proxy()
        .http2_prior_knowledge()
        .tcp_nodelay(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_frame_size(HTTP_FRAME_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .http2_keep_alive_timeout(KEEP_ALIVE)
        .http2_keep_alive_while_idle(true)
        .build()
}

/// Formats an error with its causes: reqwest's own text says what failed, and only the causes say
/// why.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
