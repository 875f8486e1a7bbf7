//! The one map from an error to a response: RFC 9457 `application/problem+json` with a stable
//! `code`.
//!
//! Kept out: the fixed dialects' own error bodies; they match on [`Code`] and write their own.
//!
//! | code | status | what it says |
//! | --- | --- | --- |
//! | `invalid_request` | 400 | the request can't be done as it is, whoever is asked |
//! | `invalid_key` | 400 | a key that is empty, too long, or wrongly escaped |
//! | `invalid_query` | 400 | a query parameter that is unknown, given twice or out of range |
//! | `invalid_header` | 400 | a header that can't be understood |
//! | `invalid_body` | 400 | a body that is cut short, or not what the route expects |
//! | `key_not_found` | 404 | there is no such key |
//! | `unknown_route` | 404 | there is no such path |
//! | `unknown_operation` | 404 | no change of the view was accepted under this id |
//! | `method_not_allowed` | 405 | the path has other methods: see `Allow` |
//! | `body_timeout` | 408 | the body came too slowly |
//! | `view_refused` | 409 | the view can't be changed so as it is now |
//! | `condition_failed` | 412 | `If-Match` or `If-None-Match` did not hold |
//! | `epoch_changed` | 412 | another change of the view was accepted: `epoch` is its plan |
//! | `too_large` | 413 | past a limit, which `detail` names |
//! | `idempotency_key_reused` | 422 | the `Idempotency-Key` was used for another request |
//! | `not_applied` | 424 | only of an item of a batch: another of its shard was refused |
//! | `overloaded` | 429 | a limit is reached; see `Retry-After` |
//! | `unavailable` | 503 | nobody could do it in time; see `Retry-After` |
//! | `node_not_ready` | 503 | a node that is to join does not answer, or is of another cluster |
//! | `unknown_outcome` | 504 | it may have happened, or may yet happen |
//!
//! Under 409 to 503 nothing was changed; under 424, nothing of the item's shard. A
//! `condition_failed` comes with the current `ETag`, if the key exists.
//!
//! A request for a shard that another node leads is not an error: it is answered 307 with a
//! `Location` (see [`redirect`]). `/readyz` has codes of its own, given by what is not ready.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use serde_json::{Map, Value};

use crate::api::store::Failure;
use crate::api::view_change::{
    EPOCH_CHANGED, NODE_NOT_READY, UNKNOWN_OPERATION, VIEW_REFUSED, ViewChangeFailure,
};
use crate::routing::problem::{MEDIA_TYPE, TYPE_PREFIX};
use crate::sm::kv::WriteRejection;
use crate::types::{Address, PlanEpoch, Revision};

/// Stable codes by which clients tell errors apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    InvalidRequest,
    InvalidKey,
    InvalidQuery,
    InvalidHeader,
    InvalidBody,
    KeyNotFound,
    UnknownRoute,
    UnknownOperation,
    MethodNotAllowed,
    BodyTimeout,
    ViewRefused,
    ConditionFailed,
    EpochChanged,
    TooLarge,
    IdempotencyKeyReused,
    NotApplied,
    Overloaded,
    Unavailable,
    NodeNotReady,
    UnknownOutcome,
}

impl Code {
    pub const ALL: [Code; 20] = [
        Code::InvalidRequest,
        Code::InvalidKey,
        Code::InvalidQuery,
        Code::InvalidHeader,
        Code::InvalidBody,
        Code::KeyNotFound,
        Code::UnknownRoute,
        Code::UnknownOperation,
        Code::MethodNotAllowed,
        Code::BodyTimeout,
        Code::ViewRefused,
        Code::ConditionFailed,
        Code::EpochChanged,
        Code::TooLarge,
        Code::IdempotencyKeyReused,
        Code::NotApplied,
        Code::Overloaded,
        Code::Unavailable,
        Code::NodeNotReady,
        Code::UnknownOutcome,
    ];

    pub fn status(self) -> StatusCode {
        match self {
            Code::InvalidRequest
            | Code::InvalidKey
            | Code::InvalidQuery
            | Code::InvalidHeader
            | Code::InvalidBody => StatusCode::BAD_REQUEST,
            Code::KeyNotFound | Code::UnknownRoute | Code::UnknownOperation => {
                StatusCode::NOT_FOUND
            }
            Code::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Code::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Code::ViewRefused => StatusCode::CONFLICT,
            Code::ConditionFailed | Code::EpochChanged => StatusCode::PRECONDITION_FAILED,
            Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Code::IdempotencyKeyReused => StatusCode::UNPROCESSABLE_ENTITY,
            Code::NotApplied => StatusCode::FAILED_DEPENDENCY,
            Code::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Code::Unavailable | Code::NodeNotReady => StatusCode::SERVICE_UNAVAILABLE,
            Code::UnknownOutcome => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Code::InvalidRequest => "invalid_request",
            Code::InvalidKey => "invalid_key",
            Code::InvalidQuery => "invalid_query",
            Code::InvalidHeader => "invalid_header",
            Code::InvalidBody => "invalid_body",
            Code::KeyNotFound => "key_not_found",
            Code::UnknownRoute => "unknown_route",
            Code::UnknownOperation => UNKNOWN_OPERATION,
            Code::MethodNotAllowed => "method_not_allowed",
            Code::BodyTimeout => "body_timeout",
            Code::ViewRefused => VIEW_REFUSED,
            Code::ConditionFailed => "condition_failed",
            Code::EpochChanged => EPOCH_CHANGED,
            Code::TooLarge => "too_large",
            Code::IdempotencyKeyReused => "idempotency_key_reused",
            Code::NotApplied => "not_applied",
            Code::Overloaded => "overloaded",
            Code::Unavailable => "unavailable",
            Code::NodeNotReady => NODE_NOT_READY,
            Code::UnknownOutcome => "unknown_outcome",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Code::InvalidRequest => "The request cannot be done",
            Code::InvalidKey => "The key is not valid",
            Code::InvalidQuery => "The query is not valid",
            Code::InvalidHeader => "A header is not valid",
            Code::InvalidBody => "The body is not valid",
            Code::KeyNotFound => "The key does not exist",
            Code::UnknownRoute => "The path does not exist",
            Code::UnknownOperation => "There was no such change of the view",
            Code::MethodNotAllowed => "The path does not take this method",
            Code::BodyTimeout => "The body came too slowly",
            Code::ViewRefused => "The view cannot be changed so",
            Code::ConditionFailed => "The condition does not hold",
            Code::EpochChanged => "The view was changed meanwhile",
            Code::TooLarge => "The request is too large",
            Code::IdempotencyKeyReused => "The idempotency key belongs to another request",
            Code::NotApplied => "Another operation of the shard was refused",
            Code::Overloaded => "A limit is reached",
            Code::Unavailable => "Nobody can do it now",
            Code::NodeNotReady => "A node that is to join is not ready",
            Code::UnknownOutcome => "The outcome is not known",
        }
    }
}

/// An error on its way to a client.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    code: &'static str,
    status: StatusCode,
    title: &'static str,
    pub detail: String,
    /// Members beyond those of the RFC.
    pub extensions: Map<String, Value>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self::with_code(code.as_str(), code.status(), code.title(), detail)
    }

    /// Returns a problem whose code is not of the table: `/readyz` alone has such.
    pub fn with_code(
        code: &'static str,
        status: StatusCode,
        title: &'static str,
        detail: impl Into<String>,
    ) -> Self {
        assert!(
            status.is_client_error() || status.is_server_error(),
            "a problem has a status of an error, not {status}"
        );
        Self {
            code,
            status,
            title,
            detail: detail.into(),
            extensions: Map::new(),
            headers: Vec::new(),
        }
    }

    /// Returns 405 for a path that has other methods; the router adds `Allow`.
    pub fn method_not_allowed(method: &Method) -> Self {
        let detail = format!(
            "{} is not a method of this path",
            shortened(method.as_str())
        );
        Self::new(Code::MethodNotAllowed, detail)
    }

    pub fn status(&self) -> StatusCode {
        self.status
    }

    pub fn code(&self) -> &'static str {
        self.code
    }

    /// Sets a header of the answer.
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Returns the seconds that the client should wait, if this problem passes.
    pub fn wait_s(&self) -> Option<u64> {
        let header = self
            .headers
            .iter()
            .rfind(|(name, _)| *name == header::RETRY_AFTER);
        header.and_then(|(_, value)| value.to_str().ok()?.parse().ok())
    }

    pub fn extension(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.extensions.insert(name.to_owned(), value.into());
        self
    }

    pub fn retry_after_ms(self, wait_ms: u64) -> Self {
        self.header(
            header::RETRY_AFTER,
            HeaderValue::from(retry_after_s(wait_ms)),
        )
    }

    pub fn condition_failed(current: Option<Revision>) -> Self {
        match current {
            Some(revision) => Problem::new(
                Code::ConditionFailed,
                format!("the key is at revision {revision}"),
            )
            .extension("current_revision", revision.0)
            .header(header::ETAG, etag(revision)),
            None => Problem::new(Code::ConditionFailed, "the key does not exist"),
        }
    }

    /// Returns the `type`, `title` and the rest of RFC 9457, section 3.
    pub fn body(&self) -> Value {
        let mut members = self.extensions.clone();
        members.insert("type".into(), format!("{TYPE_PREFIX}{}", self.code).into());
        members.insert("title".into(), self.title.into());
        members.insert("status".into(), self.status.as_u16().into());
        members.insert("detail".into(), self.detail.as_str().into());
        members.insert("code".into(), self.code.into());
        Value::Object(members)
    }
}

impl From<Failure> for Problem {
    /// [`Failure::Elsewhere`] becomes `unavailable` here: where a redirect is possible, [`respond`]
    /// makes one first.
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure {
            Failure::Elsewhere { address, .. } => Problem::new(Code::Unavailable, text)
                .extension("leader", address.as_str())
                .retry_after_ms(1000),
            Failure::Overloaded { retry_after_ms, .. } => {
                Problem::new(Code::Overloaded, text).retry_after_ms(retry_after_ms)
            }
            Failure::Unavailable { retry_after_ms, .. } => {
                Problem::new(Code::Unavailable, text).retry_after_ms(retry_after_ms)
            }
            Failure::Unknown { .. } => Problem::new(Code::UnknownOutcome, text),
            Failure::Invalid { .. } => Problem::new(Code::InvalidRequest, text),
            Failure::TooLarge { .. } => Problem::new(Code::TooLarge, text),
        }
    }
}

impl From<ViewChangeFailure> for Problem {
    fn from(failure: ViewChangeFailure) -> Self {
        let text = failure.to_string();
        match failure {
            ViewChangeFailure::Refused { .. } => Problem::new(Code::ViewRefused, text),
            ViewChangeFailure::NotReady { .. } => {
                Problem::new(Code::NodeNotReady, text).retry_after_ms(1000)
            }
            ViewChangeFailure::EpochChanged { current } => Problem::new(Code::EpochChanged, text)
                .extension("epoch", current.0)
                .header(header::ETAG, epoch_etag(current)),
            ViewChangeFailure::Failed(failure) => failure.into(),
        }
    }
}

impl From<WriteRejection> for Problem {
    fn from(rejection: WriteRejection) -> Self {
        // A store tries again elsewhere, or waits, on the first two. One that has given up has
        // changed nothing.
        match rejection {
            WriteRejection::WrongOwner { slot, .. } => Problem::new(
                Code::Unavailable,
                format!("slot {slot} is on its way to another shard"),
            )
            .retry_after_ms(1000),
            WriteRejection::Frozen { slot } => Problem::new(
                Code::Unavailable,
                format!("slot {slot} is frozen by a move"),
            )
            .retry_after_ms(1000),
            WriteRejection::ConditionFailed { current, .. } => Problem::condition_failed(current),
            WriteRejection::KeyReused { .. } => {
                let detail = "this Idempotency-Key was used in the last 10 minutes for a request \
                              with other content to a key of the same slot: a new request takes a \
                              new one";
                Problem::new(Code::IdempotencyKeyReused, detail)
            }
            WriteRejection::AnswerTooLarge { bytes } => Failure::of_answer(bytes).into(),
            WriteRejection::RequestsFull { slot } => Problem::new(
                Code::Overloaded,
                format!("slot {slot} remembers as many idempotency keys as it may"),
            )
            .retry_after_ms(10_000),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(format!("{}\n", self.body())));
        *response.status_mut() = self.status;
        response.headers_mut().extend(self.headers);
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        response.extensions_mut().insert(ProblemCode(self.code));
        response
    }
}

/// The code of the problem that a response tells of, for those who count.
#[derive(Debug, Clone, Copy)]
pub struct ProblemCode(pub &'static str);

/// Answers a failed request for `uri` with a redirect or a problem.
pub fn respond(failure: Failure, uri: &Uri) -> Response {
    match failure {
        Failure::Elsewhere { address, .. } => redirect(&address, uri),
        other => Problem::from(other).into_response(),
    }
}

/// Answers 307 to the same path and query at `address`.
pub fn redirect(address: &Address, uri: &Uri) -> Response {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let body = format!("leader is at {address}; use curl -L or ?proxy=true\n");
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    match HeaderValue::try_from(format!("http://{address}{path}")) {
        Ok(location) => {
            headers.insert(header::LOCATION, location);
            response
        }
        // An URI that was received holds no byte that a header may not.
        Err(error) => Problem::new(
            Code::InvalidRequest,
            format!("the path fits no Location header: {error}"),
        )
        .into_response(),
    }
}

/// Returns the entity tag of a revision: strong, and nothing but its number.
pub fn etag(revision: Revision) -> HeaderValue {
    quoted(revision.0)
}

/// Returns the entity tag of the view: the epoch of its plan.
pub fn epoch_etag(epoch: PlanEpoch) -> HeaderValue {
    quoted(epoch.0)
}

fn quoted(number: u64) -> HeaderValue {
    HeaderValue::try_from(format!("\"{number}\""))
        .expect("digits between quotes are a header value")
}

/// Returns the beginning of what a client sent, long enough to be recognized in an answer.
pub fn shortened(text: &str) -> &str {
    text.char_indices()
        .nth(200)
        .map_or(text, |(end, _)| &text[..end])
}

/// Returns whole seconds for `Retry-After`, at least 1: with 0 a client would spin.
pub fn retry_after_s(wait_ms: u64) -> u64 {
    wait_ms.div_ceil(1000).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::GroupId;

    #[test]
    fn a_failure_keeps_its_status_and_says_when_to_come_back() {
        let address: Address = "b:2".parse().expect("an address");
        let cases = [
            (
                Failure::Overloaded {
                    limit: "queue".into(),
                    retry_after_ms: 1,
                },
                429,
                Some(1),
            ),
            (
                Failure::Unavailable {
                    reason: "no quorum".into(),
                    retry_after_ms: 1500,
                },
                503,
                Some(2),
            ),
            (
                Failure::Unknown {
                    reason: "lost".into(),
                },
                504,
                None,
            ),
            (
                Failure::Invalid {
                    reason: "no such shard".into(),
                },
                400,
                None,
            ),
            (
                Failure::TooLarge {
                    limit: "8 MiB".into(),
                },
                413,
                None,
            ),
            (
                Failure::Elsewhere {
                    shard: GroupId(1),
                    address,
                },
                503,
                Some(1),
            ),
        ];
        for (failure, status, retry_after) in cases {
            let problem = Problem::from(failure);
            assert_eq!(problem.status().as_u16(), status);
            assert_eq!(problem.wait_s(), retry_after, "{problem:?}");
            assert_eq!(problem.body()["status"], status);
        }
    }

    #[test]
    fn a_redirect_keeps_path_and_query_as_they_were_sent() {
        let address: Address = "b:2".parse().expect("an address");
        let uri: Uri = "http://a:1/v1/kv/a%2Fb//c%20?timeout=1s"
            .parse()
            .expect("an uri");
        let response = redirect(&address, &uri);
        assert_eq!(response.status(), 307);
        assert_eq!(
            response.headers()[header::LOCATION],
            "http://b:2/v1/kv/a%2Fb//c%20?timeout=1s"
        );
    }
}
