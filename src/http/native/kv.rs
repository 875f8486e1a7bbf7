//! `GET HEAD PUT DELETE /v1/kv/<key>`: one key.

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, header};
use serde::Serialize;
use tokio::time::Instant;

use super::conditions::{Conditions, ReadDecision};
use super::headers::{STALENESS, idempotency_key, staleness};
use super::json::{KeyJson, json};
use super::key;
use super::query::Query;
use crate::api::store::{Consistency, Failure, Options, Routing, WriteFailure, Written};
use crate::budget::UNCHARGED_BYTES_MAX;
use crate::http::answer_budget::AlreadyCharged;
use crate::http::body::{self, BodyLimit};
use crate::http::dialect::Dialect;
use crate::http::problem::{self, Code, Problem};
use crate::http::{App, blocking, media};
use crate::sm::kv::{Action, Condition, Operation, OperationOutcome, WriteRejection};
use crate::types::Revision;

/// The body of the answer to a write.
#[derive(Serialize)]
struct WrittenJson {
    #[serde(flatten)]
    key: KeyJson,
    revision: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<bool>,
}

pub async fn kv(app: &App, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::Native, &request);
    let (parts, body) = request.into_parts();
    let key = match key::of_path(parts.uri.path()) {
        Ok(key) => key,
        Err(problem) => {
            body::discard(&parts, body);
            return timer.finish(problem.into_response());
        }
    };
    timer.key(&key);
    let answer = match parts.method {
        Method::GET | Method::HEAD => get(app, &parts, key).await,
        Method::PUT => put(app, &parts, body, key).await,
        Method::DELETE => delete(app, &parts, key).await,
        // axum adds `Allow` only for the routes in its table, and keys are not among them.
        _ => {
            body::discard(&parts, body);
            let mut response = Problem::method_not_allowed(&parts.method).into_response();
            response.headers_mut().insert(
                header::ALLOW,
                HeaderValue::from_static("GET,HEAD,PUT,DELETE"),
            );
            Ok(response)
        }
    };
    timer.finish(answer.unwrap_or_else(Problem::into_response))
}

async fn get(app: &App, parts: &Parts, key: Bytes) -> Result<Response, Problem> {
    let query = Query::parse(
        parts.uri.query(),
        &["proxy", "consistency", "timeout"],
        &app.limits,
    )?;
    let conditions = Conditions::of_request(&parts.headers)?;
    let found = match app.store.get(key, query.options).await {
        Ok(found) => found,
        Err(failure) => return Ok(problem::respond(failure, &parts.uri)),
    };

    // A missing key is 404 whatever the conditions say (RFC 9110, section 13.2.1).
    let mut response = match found.record {
        None => missing().into_response(),
        Some(record) => match conditions.read_decision(record.revision) {
            ReadDecision::Failed => {
                Problem::condition_failed(Some(record.revision)).into_response()
            }
            ReadDecision::NotModified => {
                tagged(StatusCode::NOT_MODIFIED, record.revision, Body::empty())
            }
            ReadDecision::Answer => {
                // The value was charged when it was read, and its bytes carry that charge to the
                // socket.
                let large = record.value.len() > UNCHARGED_BYTES_MAX;
                let mut response =
                    tagged(StatusCode::OK, record.revision, Body::from(record.value));
                response
                    .headers_mut()
                    .insert(header::CONTENT_TYPE, media::content_type(&record.media));
                if large {
                    response.extensions_mut().insert(AlreadyCharged);
                }
                response
            }
        },
    };
    if query.options.consistency == Consistency::Stale {
        response
            .headers_mut()
            .insert(STALENESS, staleness(found.staleness));
    }
    Ok(response)
}

/// A write's head, parsed.
struct WriteHead {
    condition: Condition,
    idempotency_key: Option<Bytes>,
    options: Options,
}

impl WriteHead {
    fn of_request(app: &App, parts: &Parts) -> Result<Self, Problem> {
        Ok(Self {
            options: Query::parse(parts.uri.query(), &["proxy", "timeout"], &app.limits)?.options,
            condition: Conditions::of_request(&parts.headers)?.condition()?,
            idempotency_key: idempotency_key(&parts.headers)?,
        })
    }
}

async fn put(app: &App, parts: &Parts, body: Body, key: Bytes) -> Result<Response, Problem> {
    let head = match WriteHead::of_request(app, parts) {
        Ok(head) => head,
        Err(problem) => {
            body::discard(parts, body);
            return Err(problem);
        }
    };
    let value_max = BodyLimit {
        bytes_max: app.limits.value_bytes_max.min(app.limits.body_bytes_max),
        what: "a value",
    };
    let body = body::admit(parts, body, value_max)?;

    // Redirect before the value is read: a client that sends from a pipe can't send it again.
    let options = match route(app, key.clone(), head.options).await {
        Ok(options) => options,
        Err(failure) => {
            body::discard(parts, body);
            return Ok(problem::respond(failure, &parts.uri));
        }
    };

    let value = body::read(parts, body, value_max, &app.limits, &app.bodies).await?;
    let media = blocking::work(value.len(), || media::of_request(&parts.headers, &value))?;

    // `value` stays charged until the write is answered.
    let action = Action::Put {
        media,
        value: value.bytes.clone(),
    };
    let operation = Operation {
        key: key.clone(),
        condition: head.condition,
        action,
    };
    let written = app
        .store
        .write(vec![operation], head.idempotency_key, options)
        .await;

    let outcome = match only(written) {
        Ok(outcome) => outcome,
        Err(failure) => return refused(failure, parts),
    };
    match outcome {
        OperationOutcome::Put { revision, created } => {
            let status = if created {
                StatusCode::CREATED
            } else {
                StatusCode::OK
            };
            Ok(done(status, &key, revision, Some(created)))
        }
        other => Err(mismatched(&other)),
    }
}

/// Decides whether this node takes the write of a key, before anything of its value is read: a
/// client that sends from a pipe can't send it again elsewhere. Returns the options for the write,
/// which is done for the client from then on, whoever leads.
async fn route(app: &App, key: Bytes, options: Options) -> Result<Options, Failure> {
    if options.routing == Routing::Proxy {
        return Ok(options);
    }

    // Locating may wait for a leader. The write has what is left of the client's time.
    let began = Instant::now();
    app.store.locate(key, options).await?;
    let timeout = options.timeout.saturating_sub(began.elapsed());
    Ok(Options {
        routing: Routing::Proxy,
        timeout,
        ..options
    })
}

async fn delete(app: &App, parts: &Parts, key: Bytes) -> Result<Response, Problem> {
    let head = WriteHead::of_request(app, parts)?;
    let operation = Operation {
        key: key.clone(),
        condition: head.condition,
        action: Action::Delete,
    };
    let written = app
        .store
        .write(vec![operation], head.idempotency_key, head.options)
        .await;
    match only(written) {
        Ok(OperationOutcome::Deleted {
            revision: Some(revision),
        }) => Ok(done(StatusCode::OK, &key, revision, None)),
        Ok(OperationOutcome::Deleted { revision: None }) => Err(missing()),
        // Without the condition this would be 404, so the condition is not asked (RFC 9110, section
        // 13.2.1).
        Err(WriteFailure::Rejected(WriteRejection::ConditionFailed { current: None, .. })) => {
            Err(missing())
        }
        Ok(other) => Err(mismatched(&other)),
        Err(failure) => refused(failure, parts),
    }
}

/// Returns the answer to a write of one operation. A store that gives none has broken its promise,
/// and the outcome is unknown.
fn only(mut written: Vec<Written>) -> Written {
    let broken = || {
        Err(WriteFailure::Failed(Failure::Unknown {
            reason: "the store gave no answer".into(),
        }))
    };
    written.pop().unwrap_or_else(broken)
}

fn mismatched(outcome: &OperationOutcome) -> Problem {
    Problem::new(
        Code::UnknownOutcome,
        format!("the store answered another operation than was asked: {outcome:?}"),
    )
}

fn refused(failure: WriteFailure, parts: &Parts) -> Result<Response, Problem> {
    match failure {
        WriteFailure::Rejected(rejection) => Err(rejection.into()),
        WriteFailure::Failed(failure) => Ok(problem::respond(failure, &parts.uri)),
    }
}

fn missing() -> Problem {
    Problem::new(Code::KeyNotFound, "there is no such key")
}

fn tagged(status: StatusCode, revision: Revision, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::ETAG, problem::etag(revision));
    response
}

fn done(status: StatusCode, key: &[u8], revision: Revision, created: Option<bool>) -> Response {
    let mut response = json(
        status,
        &WrittenJson {
            key: KeyJson::new(key),
            revision: revision.0,
            created,
        },
    );
    if created.is_some() {
        response
            .headers_mut()
            .insert(header::ETAG, problem::etag(revision));
    }
    response
}
