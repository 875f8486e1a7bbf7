//! The mount points of the peer routes: from a request to a call of [`PeerService`], and back.

use std::io;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::future::ready;
use futures::stream::{StreamExt, TryStreamExt};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_64;

use super::service::PeerService;
use crate::api::peer::Identity;
use crate::api::protocol::{Hop, RELAY_QUERY, ShardRequest};
use crate::budget::Share;
use crate::http::app::{App, SharedApp};
use crate::http::blocking;
use crate::http::body::{self, BodyBytes, BodyLimit};
use crate::http::dialect::Dialect;
use crate::http::limits::Limits;
use crate::http::problem::{Code, Problem};
use crate::sm::codec;

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The largest is a view.
const JSON_BODY: BodyLimit = BodyLimit {
    bytes_max: 1 << 20,
    what: "the body of this request",
};

/// Parses the body of a request to a shard. Its operations have some 8 MiB at most,
/// and with all that they may tell beside (10,000 operations, 100,000 revisions) they take half of
/// this.
const SHARD_REQUEST_MADE_MAX: usize = 128 << 20;

/// Returns the peer routes, for an app that has peers.
pub fn routes(peers: Arc<dyn PeerService>) -> Router<SharedApp> {
    let [
        to_lane,
        to_shard,
        to_identity,
        to_promise,
        to_replicas,
        to_view,
        to_announce,
        to_invite,
        to_hold,
        to_greet,
        to_failures,
        to_disk,
    ] = std::array::from_fn(|_| Arc::clone(&peers));
    Router::new()
        .route(
            "/peer/lane/{lane}",
            post(move |State(app), Path(name), request| lane(app, to_lane, name, request)),
        )
        .route(
            "/peer/shard",
            post(move |State(app), request| shard(app, to_shard, request)),
        )
        .route(
            "/peer/identity",
            get(move |headers: HeaderMap| async move {
                identity(&to_identity.identity(), &headers)
            }),
        )
        .route(
            "/peer/promise",
            post(move |State(app), request| promise(app, to_promise, request)),
        )
        .route(
            "/peer/replicas",
            get(move || async move { in_json(&to_replicas.hosting().await) }),
        )
        .route("/peer/view", get(move || view(to_view)))
        .route(
            "/peer/announce",
            post(move |State(app), request| announce(app, to_announce, request)),
        )
        .route(
            "/peer/hold",
            post(move |State(app), request| hold(app, to_hold, request)),
        )
        .route(
            "/peer/greet",
            post(move |State(app), request| greet(app, to_greet, request)),
        )
        .route(
            "/peer/failures",
            post(move |State(app), request| failures(app, to_failures, request)),
        )
        .route(
            "/peer/disk",
            post(move |State(app), request| disk(app, to_disk, request)),
        )
        .route(
            "/peer/invite",
            post(move |State(app), request| invite(app, to_invite, request)),
        )
}

async fn lane(
    app: SharedApp,
    peers: Arc<dyn PeerService>,
    lane: String,
    request: Request,
) -> Response {
    // HTTP/2 ends a body with an empty frame, which is none of the lane's.
    let incoming = request
        .into_body()
        .into_data_stream()
        .map_err(io::Error::other);
    let incoming = incoming.try_filter(|data| ready(!data.is_empty())).boxed();
    let outgoing = peers
        .lane(&lane, incoming)
        // Lanes end last: requests under way may wait for what they bring.
        .take_until(app.lanes_end.clone().cancelled_owned());
    let outgoing = outgoing.map(Ok::<_, std::convert::Infallible>);
    (
        [(header::CONTENT_TYPE, OCTETS)],
        Body::from_stream(outgoing),
    )
        .into_response()
}

async fn shard(app: SharedApp, peers: Arc<dyn PeerService>, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::Peer, &request);
    let hop = if request.uri().query() == Some(RELAY_QUERY) {
        Hop::Relay
    } else {
        Hop::Answer
    };
    let limit = BodyLimit {
        bytes_max: app.limits.body_bytes_max,
        what: "a body",
    };
    let answer = async {
        let body = read(&app, request, limit).await?;
        let mut made = body.new_share();
        let request = blocking::work(body.len(), || {
            read_shard_request(&body, &app.limits, &mut made)
        })?;
        if request.body.is_read() {
            timer.mark_read_only();
        }
        let reply = peers.shard(request, hop).await;

        // A large reply takes milliseconds to encode, and threads that serve carry heartbeats too.
        let reply = blocking::work(reply.value_bytes(), || codec::encode(&reply));
        Ok(([(header::CONTENT_TYPE, OCTETS)], Body::from(reply)).into_response())
    };
    let answer = answer
        .await
        .unwrap_or_else(|problem: Problem| problem.into_response());
    timer.finish(answer)
}

/// Reads a request, and has `made` pay for what is made of it.
fn read_shard_request(
    body: &[u8],
    limits: &Limits,
    made: &mut Share,
) -> Result<ShardRequest, Problem> {
    let mut refusal = None;

    // The decoder asks before it makes anything, so that nothing is made without being paid for.
    let mut charge = |bytes: usize| {
        if made.bytes() + bytes > SHARD_REQUEST_MADE_MAX {
            let detail = format!(
                "a request to a shard takes at most {SHARD_REQUEST_MADE_MAX} bytes in memory: send \
                fewer operations"
            );
            refusal = Some(Problem::new(Code::TooLarge, detail));
        } else if !made.grow(bytes) {
            refusal = Some(body::overloaded(limits));
        }
        refusal.is_none()
    };
    let request = codec::decode_charged(body, "a shard request", &mut charge);
    request.map_err(|error| {
        refusal.unwrap_or_else(|| Problem::new(Code::InvalidBody, error.to_string()))
    })
}

/// Says who this node is. Whoever knows already is told that it is as it was (304): the whole view
/// is in it, and spares ask again and again.
fn identity(identity: &Identity, headers: &HeaderMap) -> Response {
    let text = in_text(identity);

    // By the content: it changes exactly when something in the identity does.
    let etag = format!("\"{:016x}\"", xxh3_64(&text));
    let etag = HeaderValue::from_str(&etag).expect("hexadecimal digits between quotes");
    if headers.get(header::IF_NONE_MATCH) == Some(&etag) {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response();
    }
    ([(header::CONTENT_TYPE, JSON), (header::ETAG, etag)], text).into_response()
}

async fn promise(app: SharedApp, peers: Arc<dyn PeerService>, request: Request) -> Response {
    match read_json(&app, request).await {
        Ok(asked) => in_json(&peers.promise(asked).await),
        Err(problem) => problem.into_response(),
    }
}

async fn announce(app: SharedApp, peers: Arc<dyn PeerService>, request: Request) -> Response {
    match read_json(&app, request).await {
        Ok(announcement) => match peers.announce(announcement).await {
            Ok(outcome) => in_json(&outcome),
            Err(failure) => Problem::from(failure).into_response(),
        },
        Err(problem) => problem.into_response(),
    }
}

async fn hold(app: SharedApp, peers: Arc<dyn PeerService>, request: Request) -> Response {
    match read_json(&app, request).await {
        Ok(asked) => match peers.hold_level(asked).await {
            Ok(()) => in_json(&()),
            Err(failure) => Problem::from(failure).into_response(),
        },
        Err(problem) => problem.into_response(),
    }
}

async fn failures(app: SharedApp, peers: Arc<dyn PeerService>, request: Request) -> Response {
    match read_json(&app, request)
        .await
        .and_then(|report| Ok(peers.failures_reported(report)?))
    {
        Ok(()) => in_json(&()),
        Err(problem) => problem.into_response(),
    }
}

async fn disk(app: SharedApp, peers: Arc<dyn PeerService>, request: Request) -> Response {
    match read_json(&app, request)
        .await
        .and_then(|report| Ok(peers.disk_reported(report)?))
    {
        Ok(()) => in_json(&()),
        Err(problem) => problem.into_response(),
    }
}

async fn greet(app: SharedApp, peers: Arc<dyn PeerService>, request: Request) -> Response {
    match read_json(&app, request).await {
        Ok(greeting) => in_json(&peers.greeted(greeting).await),
        Err(problem) => problem.into_response(),
    }
}

async fn view(peers: Arc<dyn PeerService>) -> Response {
    match peers.view().await {
        Ok(view) => in_json(&view),
        Err(failure) => Problem::from(failure).into_response(),
    }
}

async fn invite(app: SharedApp, peers: Arc<dyn PeerService>, request: Request) -> Response {
    match read_json(&app, request).await {
        Ok(members) => {
            peers.invite(members);
            in_json(&())
        }
        Err(problem) => problem.into_response(),
    }
}

async fn read_json<T: DeserializeOwned>(app: &App, request: Request) -> Result<T, Problem> {
    let body = read(app, request, JSON_BODY).await?;
    serde_json::from_slice(&body)
        .map_err(|error| Problem::new(Code::InvalidBody, error.to_string()))
}

async fn read(app: &App, request: Request, limit: BodyLimit) -> Result<BodyBytes, Problem> {
    let (parts, body) = request.into_parts();
    body::read(&parts, body, limit, &app.limits, &app.bodies).await
}

fn in_json(answer: &impl Serialize) -> Response {
    ([(header::CONTENT_TYPE, JSON)], in_text(answer)).into_response()
}

fn in_text(answer: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(answer).expect("peer messages have keys that are text or numbers")
}
