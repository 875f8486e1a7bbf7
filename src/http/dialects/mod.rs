//! The fixed dialects: the HTTP of other stores, spoken over this one, so that their clients and
//! scripts go on working.
//!
//! - [`encoded_batch`] is A, "encoded batch": `PUT /set`, `POST /fetch`, `GET /fetch`,
//!   `POST /query`.
//! - [`load_balancer`] is B, "load balancer": `POST /set/<key>`, `GET /get/<key>`, `GET /` as text.
//! - [`kvs`] is C, "kvs", C4, "kvs replicated", and D, "kvs by proxy": `/kvs/...`,
//!   `PUT /proxy/view-change`.
//! - [`plain_batch`] is E, "plain batch": `POST /set`, `POST /get`.
//!
//! A value written through one dialect is read through every other: a stored value is bytes and a
//! media type, and [`DisplayValue`] is what the dialects make of it. They all proxy: the node asked
//! fetches the answer. An answer that nobody can give comes within five seconds, as 503 in the
//! dialect's own form; a write may have happened all the same, which these dialects have no word
//! for.
//!
//! Kept here is what they share. Paths that end in a key are told by their prefix ([`key_route`]),
//! for the reason given in `http`.

mod batch_write;
mod bit_strings;
mod chunked_answer;
mod encoded_batch;
mod json_list;
mod kvs;
mod load_balancer;
mod plain_batch;
mod python;
mod quorum_timeouts;
mod set;

use std::borrow::Cow;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use axum::routing::{get, put};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, header};
use serde::{Deserialize, Serialize};

pub(super) use self::quorum_timeouts::QuorumTimeouts;
use super::body::{self, BodyBytes, BodyLimit};
use super::problem::{Code, Problem};
use super::{App, SharedApp, media};
use crate::client::store::{Consistency, Failure, Options, Routing};
use crate::sm::kv::Media;

/// How long an answer is waited for. The contracts promise a word within 5 s when there is no
/// quorum.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(4500);

/// Dialects with a key at the end of the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyRoute {
    LoadBalancer,
    Kvs,
}

/// The dialects' routes without a key in the path.
pub(super) fn routes() -> Router<SharedApp> {
    Router::new()
        .route("/", get(load_balancer::front_page))
        .route("/set", put(set::set).post(set::set))
        .route(
            "/fetch",
            get(encoded_batch::everything)
                .put(encoded_batch::fetch)
                .post(encoded_batch::fetch),
        )
        .route(
            "/query",
            put(encoded_batch::query).post(encoded_batch::query),
        )
        .route("/get", put(plain_batch::get).post(plain_batch::get))
}

/// The dialect whose key route this path is.
pub(super) fn key_route(path: &str) -> Option<KeyRoute> {
    if kvs::owns(path) {
        return Some(KeyRoute::Kvs);
    }
    load_balancer::owns(path).then_some(KeyRoute::LoadBalancer)
}

pub(super) async fn by_key(route: KeyRoute, app: &App, request: Request) -> Response {
    match route {
        KeyRoute::LoadBalancer => load_balancer::by_key(app, request).await,
        KeyRoute::Kvs => kvs::serve(app, request).await,
    }
}

/// The answer to a read for whose answer there is no room.
pub(super) fn no_room(dialect: super::metrics::Dialect, failure: Failure) -> Response {
    match dialect {
        super::metrics::Dialect::LoadBalancer => {
            load_balancer::respond(&failure.into(), &Method::GET)
        }
        _ => DialectError::from(failure).respond(&Method::GET),
    }
}

/// How every request of a fixed dialect is done.
fn options() -> Options {
    Options {
        consistency: Consistency::Linearizable,
        routing: Routing::Proxy,
        timeout: ANSWER_TIMEOUT,
    }
}

/// The whole body, whatever its type is called.
async fn read_body(app: &App, parts: &Parts, body: Body) -> Result<BodyBytes, DialectError> {
    let limit = BodyLimit {
        bytes_max: app.limits.body_bytes_max,
        what: "a body",
    };
    body::read(parts, body, limit, &app.limits, &app.bodies)
        .await
        .map_err(DialectError::from)
}

/// A request that is not done, or not known to be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DialectError {
    status: StatusCode,
    error: String,
    retry_after_s: Option<u64>,
}

impl DialectError {
    fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self {
            status,
            error: error.into(),
            retry_after_s: None,
        }
    }

    fn bad_request(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    /// A store that leaves a request without an answer has broken its promise, and nobody knows
    /// what happened.
    fn unanswered() -> Self {
        Failure::Unknown {
            reason: "the store gave no answer".to_owned(),
        }
        .into()
    }

    /// Of a batch, some is stored and some may not be.
    fn partly_stored() -> Self {
        Failure::Unknown {
            reason: "some of the batch is not known to be stored".to_owned(),
        }
        .into()
    }

    /// `{"error":"...","message":"Error in PUT"}`
    fn respond(&self, method: &Method) -> Response {
        #[derive(Serialize)]
        struct ErrorJson<'a> {
            error: &'a str,
            message: String,
        }
        let mut response = json(
            self.status,
            &ErrorJson {
                error: &self.error,
                message: format!("Error in {method}"),
            },
        );
        self.add_retry_after(&mut response);
        response
    }

    fn add_retry_after(&self, response: &mut Response) {
        if let Some(wait_s) = self.retry_after_s {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(wait_s));
        }
    }
}

impl From<Problem> for DialectError {
    fn from(problem: Problem) -> Self {
        Self {
            status: problem.status(),
            retry_after_s: problem.wait_s(),
            error: problem.detail,
        }
    }
}

impl From<Failure> for DialectError {
    /// That nobody can do it, that it is too much now and that the outcome is not known are all one
    /// to these dialects.
    fn from(failure: Failure) -> Self {
        let retry_after_s = Problem::from(failure.clone()).wait_s();
        match failure {
            Failure::Elsewhere { .. }
            | Failure::Overloaded { .. }
            | Failure::Unavailable { .. }
            | Failure::Unknown { .. } => Self {
                status: StatusCode::SERVICE_UNAVAILABLE,
                error: "Unable to satisfy request".to_owned(),
                retry_after_s,
            },
            Failure::Invalid { .. } => Self::bad_request(failure.to_string()),
            Failure::TooLarge { .. } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, failure.to_string())
            }
        }
    }
}

/// 405, with what the path allows.
fn method_not_allowed(parts: &Parts, allowed: &'static str) -> Response {
    let mut response = DialectError::new(Code::MethodNotAllowed.status(), "Method not allowed")
        .respond(&parts.method);
    response
        .headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static(allowed));
    response
}

/// What a dialect makes of a stored value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DisplayValue<'a> {
    Text(&'a str),
    /// One JSON text.
    Json(&'a str),
    /// Not UTF-8.
    Bytes(&'a [u8]),
}

impl<'a> DisplayValue<'a> {
    fn new(media: &Media, value: &'a [u8]) -> Self {
        match (std::str::from_utf8(value), media) {
            (Err(_), _) => DisplayValue::Bytes(value),
            (Ok(json), Media::Json) => DisplayValue::Json(json),
            (Ok(json), Media::Other(name)) if is_json(name, value) => DisplayValue::Json(json),
            (Ok(text), Media::Text | Media::Octets | Media::Other(_)) => DisplayValue::Text(text),
        }
    }
}

/// Whether a value is what a name with parameters (`application/json; charset=utf-8`) calls it.
fn is_json(name: &str, value: &[u8]) -> bool {
    media::essence(name).eq_ignore_ascii_case("application/json") && media::is_json(value)
}

/// A JSON string, without a copy where it has no escapes.
#[derive(Deserialize)]
struct JsonText<'a>(#[serde(borrow)] Cow<'a, str>);

impl JsonText<'_> {
    /// As a part of `body`, which it was read from, or in an allocation of its own.
    fn into_bytes(self, body: &Bytes) -> Bytes {
        match self.0 {
            Cow::Borrowed(text) => body.slice_ref(text.as_bytes()),
            Cow::Owned(text) => Bytes::from(text),
        }
    }
}

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let text = serde_json::to_vec(body)
        .expect("maps with text keys, numbers and strings always serialize");
    answer(status, JSON, text)
}

fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
