//! `POST /v1/batch`: several operations, all or none of those that fall to one shard.
//!
//! ```json
//! {"operations": [
//!   {"op": "put", "key": "a", "value": "1", "if_absent": true},
//!   {"op": "put", "key": "/w==", "key_encoding": "base64",
//!    "value": "AAE=", "encoding": "base64", "media_type": "image/png"},
//!   {"op": "delete", "key": "b", "if_revision": 7},
//!   {"op": "get", "key": "c"}
//! ]}
//! ```
//!
//! An operation has at most one condition: `if_absent` or `if_present` (`true`), `if_revision` or
//! `if_none_match` (a revision or a list of at most 1000 of them). The answer has a result per
//! operation, in order, each with a `status` of its own: 200 or 201 done; 404 nothing to get or
//! delete; 412 its condition failed; 424 that of another operation of its shard did; 429 and 503
//! certainly not done; 504 unknown.
//!
//! The answer's own status is that of the worst case a client must act on:
//! - 200: every operation has an answer, be it applied or refused by a condition;
//! - 504: the outcome of one or more is unknown;
//! - 207: some have an answer, and others were certainly not done;
//! - 429, 503, 413, ...: certainly nothing was done, for the same reason everywhere (503 where the
//!   reasons differ).
//!
//! A batch of gets alone is a read: it makes no entry in the log, so an `Idempotency-Key` remembers
//! nothing of it (what an earlier program has remembered is answered again). The gets of a batch
//! return at most 16 MiB per shard: 413 says that they would return more, and that nothing was
//! done.
//!
//! Anything but 200 and 207 is a problem (`application/problem+json`) that has `results` too.

use std::fmt;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::StatusCode;
use http::request::Parts;
use serde::de::{Error, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json as object};

use super::headers::idempotency_key;
use super::json::{ItemJson, LazyList, json};
use super::key;
use super::query::Query;
use crate::api::store::{Failure, Item, Options, Routing, WriteFailure, Written};
use crate::http::app::{App, SharedApp};
use crate::http::blocking;
use crate::http::body::{self, BodyLimit};
use crate::http::dialect::Dialect;
use crate::http::limits::Limits;
use crate::http::media::{self, Encoding};
use crate::http::metrics::RequestTimer;
use crate::http::problem::{Code, Problem};
use crate::sm::kv::{Action, Condition, Operation, OperationOutcome, WriteRejection};
use crate::types::Revision;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchJson {
    operations: Operations,
}

/// The operations, no more of them kept than [`PARSED_MAX`]: they are ten times as large as what
/// they are read from.
struct Operations {
    list: Vec<OperationJson>,
    /// The number of elements.
    count: usize,
}

/// No limit of operations is above this.
const PARSED_MAX: usize = 10_000;

/// Revisions of one condition, as in a header: each is kept in a log entry, and read when that is
/// applied.
const REVISIONS_MAX: usize = 1000;
/// Revisions of all conditions of a batch.
const REVISIONS_IN_ALL_MAX: usize = 100_000;

/// Memory that a body takes when it is read, besides copies of its texts: for each of its bytes,
/// and at most. An operation is read from 20 bytes or more.
const MADE_PER_BYTE: usize = 2 * size_of::<OperationJson>() / 20;
const MADE_MAX: usize =
    2 * PARSED_MAX * size_of::<OperationJson>() + REVISIONS_IN_ALL_MAX * size_of::<Revision>();

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Op {
    Get,
    Put,
    Delete,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OperationJson {
    op: Op,
    key: String,
    #[serde(default)]
    key_encoding: Encoding,
    value: Option<String>,
    encoding: Option<Encoding>,
    media_type: Option<String>,
    if_absent: Option<bool>,
    if_present: Option<bool>,
    if_revision: Option<Revisions>,
    if_none_match: Option<Revisions>,
}

/// One revision or a list of them, which is refused as soon as it is too long.
struct Revisions(Vec<Revision>);

impl<'de> Deserialize<'de> for Revisions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrSeveral;
        impl<'de> Visitor<'de> for OneOrSeveral {
            type Value = Revisions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(
                    f,
                    "a revision or a list of at most {REVISIONS_MAX} revisions"
                )
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Revisions, E> {
                Ok(Revisions(vec![Revision(number)]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Revisions, A::Error> {
                let mut revisions = Vec::new();

                // Refused while it is read: a list as long as a body may be would take several
                // times that in memory.
                while let Some(number) = items.next_element()? {
                    if revisions.len() == REVISIONS_MAX {
                        return Err(A::Error::custom(format!(
                            "a condition has at most {REVISIONS_MAX} revisions"
                        )));
                    }
                    revisions.push(Revision(number));
                }
                Ok(Revisions(revisions))
            }
        }
        deserializer.deserialize_any(OneOrSeveral)
    }
}

impl OperationJson {
    fn revisions(&self) -> usize {
        [&self.if_revision, &self.if_none_match]
            .into_iter()
            .flatten()
            .map(|revisions| revisions.0.len())
            .sum()
    }
}

impl<'de> Deserialize<'de> for Operations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bounded;
        impl<'de> Visitor<'de> for Bounded {
            type Value = Operations;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of operations")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Operations, A::Error> {
                let mut list: Vec<OperationJson> = Vec::new();
                let mut revisions = 0;
                while list.len() < PARSED_MAX {
                    let Some(item) = items.next_element()? else {
                        return Ok(Operations {
                            count: list.len(),
                            list,
                        });
                    };
                    list.push(item);

                    // Bounded over the whole batch too: each condition may be within its bound, and
                    // all not.
                    revisions += list.last().map_or(0, OperationJson::revisions);
                    if revisions > REVISIONS_IN_ALL_MAX {
                        let reason = format!(
                            "the conditions of a batch have at most {REVISIONS_IN_ALL_MAX} \
                            revisions"
                        );
                        return Err(A::Error::custom(reason));
                    }
                }

                // The rest is only counted, for the error: kept, it would take ten times the body.
                let mut count = list.len();
                while items.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Operations { list, count })
            }
        }
        deserializer.deserialize_seq(Bounded)
    }
}

pub async fn batch(State(app): State<SharedApp>, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::Native, &request);
    let (parts, body) = request.into_parts();
    let answer = run(&app, &parts, body, &mut timer)
        .await
        .unwrap_or_else(Problem::into_response);
    timer.finish(answer)
}

async fn run(
    app: &App,
    parts: &Parts,
    body: Body,
    timer: &mut RequestTimer<'_>,
) -> Result<Response, Problem> {
    let limit = BodyLimit {
        bytes_max: app.limits.body_bytes_max,
        what: "a body",
    };
    let body = body::read(parts, body, limit, &app.limits, &app.bodies).await?;
    let query = Query::parse(parts.uri.query(), &["proxy", "timeout"], &app.limits)?;
    let idempotency_key = idempotency_key(&parts.headers)?;

    // A parsed body is larger than the body, so it is paid for beforehand.
    let mut made = body.new_share();
    if !made.grow(body.len() + (body.len() * MADE_PER_BYTE).min(MADE_MAX)) {
        return Err(body::overloaded(&app.limits));
    }
    let operations = blocking::work(body.len(), || parse(&body, &app.limits))?;
    if operations
        .iter()
        .all(|operation| operation.action == Action::Get)
    {
        timer.mark_read_only();
    }

    // The store consumes the operations, and the results name their keys.
    let keys: Vec<Bytes> = operations
        .iter()
        .map(|operation| operation.key.clone())
        .collect();
    // A batch may span shards, and no single node leads them all: this one gathers the answers,
    // whatever `proxy` says.
    let options = Options {
        routing: Routing::Proxy,
        ..query.options
    };
    let mut written = if operations.is_empty() {
        Vec::new()
    } else {
        app.store.write(operations, idempotency_key, options).await
    };
    // A store that leaves operations without an answer has broken its promise, and nobody knows
    // what happened to them.
    let broken = || {
        Err(WriteFailure::Failed(Failure::Unknown {
            reason: "the store gave no answer".into(),
        }))
    };
    written.resize_with(keys.len(), broken);
    Ok(blocking::work(got_bytes(&written), || {
        answer(&keys, &written)
    }))
}

fn parse(body: &[u8], limits: &Limits) -> Result<Vec<Operation>, Problem> {
    let batch: BatchJson = serde_json::from_slice(body)
        .map_err(|error| Problem::new(Code::InvalidBody, error.to_string()))?;
    let Operations { list, count } = batch.operations;
    let count_max = limits.batch_operations_max.min(PARSED_MAX);

    // The count and not the list: the list ends at the bound.
    if count > count_max {
        let detail = format!("a batch is at most {count_max} operations, and this one has {count}");
        return Err(Problem::new(Code::TooLarge, detail).extension("limit_operations", count_max));
    }
    let operations = list.into_iter().enumerate();
    operations
        .map(|(position, item)| operation(item, limits).map_err(|problem| at(problem, position)))
        .collect()
}

fn at(mut problem: Problem, position: usize) -> Problem {
    problem.detail = format!("operation {position}: {}", problem.detail);
    problem.extension("operation", position)
}

fn operation(mut item: OperationJson, limits: &Limits) -> Result<Operation, Problem> {
    let invalid = |detail: String| Problem::new(Code::InvalidBody, detail);
    let condition = condition(&mut item)?;
    let key = item
        .key_encoding
        .decode(item.key)
        .map_err(|reason| invalid(format!("key {reason}")))?;
    key::check(&key)?;
    let action = match (item.op, item.value) {
        (Op::Put, Some(value)) => put(value, item.encoding, item.media_type, limits)?,
        (Op::Put, None) => return Err(invalid("put without a value".into())),
        (Op::Get | Op::Delete, None) if item.encoding.is_none() && item.media_type.is_none() => {
            match item.op {
                Op::Get => Action::Get,
                Op::Put | Op::Delete => Action::Delete,
            }
        }
        (Op::Get | Op::Delete, _) => {
            return Err(invalid(
                "value, encoding and media_type are for put alone".into(),
            ));
        }
    };
    Ok(Operation {
        key,
        condition,
        action,
    })
}

fn put(
    value: String,
    encoding: Option<Encoding>,
    media_type: Option<String>,
    limits: &Limits,
) -> Result<Action, Problem> {
    let invalid = |detail: String| Problem::new(Code::InvalidBody, detail);
    let encoding = encoding.unwrap_or_default();
    let value = encoding
        .decode(value)
        .map_err(|reason| invalid(format!("value {reason}")))?;
    if value.len() > limits.value_bytes_max {
        let detail = format!("a value is at most {} bytes", limits.value_bytes_max);
        return Err(
            Problem::new(Code::TooLarge, detail).extension("limit_bytes", limits.value_bytes_max)
        );
    }
    let media = match media_type {
        Some(name) => {
            media::named(&name, &value).map_err(|reason| invalid(format!("media_type {reason}")))?
        }
        None => media::guess(&value),
    };
    Ok(Action::Put { media, value })
}

fn condition(item: &mut OperationJson) -> Result<Condition, Problem> {
    let flag = |name: &str, given: Option<bool>, condition: Condition| match given {
        Some(false) => Err(Problem::new(
            Code::InvalidBody,
            format!("{name} is true or left out"),
        )),
        Some(true) => Ok(Some(condition)),
        None => Ok(None),
    };
    let given = [
        flag("if_absent", item.if_absent, Condition::Absent)?,
        flag("if_present", item.if_present, Condition::Present)?,
        item.if_revision
            .take()
            .map(|revisions| Condition::RevisionIn(revisions.0)),
        item.if_none_match
            .take()
            .map(|revisions| Condition::RevisionNotIn(revisions.0)),
    ];

    // Two could contradict each other, and an operation in the log carries one.
    let mut given = given.into_iter().flatten();
    match (given.next(), given.next()) {
        (None, _) => Ok(Condition::None),
        (Some(condition), None) => Ok(condition),
        (Some(_), Some(_)) => Err(Problem::new(
            Code::InvalidBody,
            "an operation has at most one condition",
        )),
    }
}

/// The scope in which a batch is done all or not at all.
const ATOMIC: &str = "per shard";

#[derive(Serialize)]
struct ResultsJson<'a> {
    atomic: &'static str,
    results: LazyList<'a, Written, Value>,
}

/// Returns the bytes of the values that were got.
fn got_bytes(written: &[Written]) -> usize {
    let got = |written: &Written| match written {
        Ok(OperationOutcome::Got(Some(record))) => record.value.len(),
        Ok(
            OperationOutcome::Got(None)
            | OperationOutcome::Put { .. }
            | OperationOutcome::Deleted { .. },
        )
        | Err(_) => 0,
    };
    written.iter().map(got).sum()
}

/// Returns the whole answer: a result for each operation, and the status that says what a client
/// must do.
fn answer(keys: &[Bytes], written: &[Written]) -> Response {
    let make = |place: usize, written: &Written| {
        result(place, keys.get(place).unwrap_or(&Bytes::new()), written)
    };
    let body = ResultsJson {
        atomic: ATOMIC,
        results: LazyList {
            items: written,
            make: &make,
        },
    };
    let undone: Vec<Problem> = written.iter().filter_map(undone).collect();
    let unknown = undone
        .iter()
        .find(|problem| problem.code() == Code::UnknownOutcome.as_str());

    // An unknown outcome outweighs all else: a client that sends the batch again may do it twice.
    let mut problem = match (unknown, undone.first()) {
        (_, None) => return json(StatusCode::OK, &body),
        (Some(unknown), _) => unknown.clone(),
        (None, Some(_)) if undone.len() < written.len() => {
            return json(StatusCode::MULTI_STATUS, &body);
        }
        (None, Some(first)) if undone.iter().all(|problem| problem.code() == first.code()) => {
            first.clone()
        }
        (None, Some(_)) => Problem::new(
            Code::Unavailable,
            "no operation was done: see the results for the reasons",
        )
        .retry_after_ms(1000),
    };

    // The longest wait of all shards, so that one retry is enough.
    if let Some(longest_s) = undone.iter().filter_map(Problem::wait_s).max() {
        problem = problem.retry_after_ms(longest_s * 1000);
    }
    let results = serde_json::to_value(&body.results).unwrap_or_default();
    problem
        .extension("atomic", ATOMIC)
        .extension("results", results)
        .into_response()
}

/// Returns the problem of an operation that has no answer, as opposed to one that was applied, or
/// refused by a condition.
fn undone(written: &Written) -> Option<Problem> {
    match written {
        Ok(_) | Err(WriteFailure::Rejected(WriteRejection::ConditionFailed { .. })) => None,
        Err(WriteFailure::Rejected(rejection)) => Some(rejection.clone().into()),
        Err(WriteFailure::Failed(failure)) => Some(failure.clone().into()),
    }
}

fn result(position: usize, key: &Bytes, written: &Written) -> Value {
    match written {
        Ok(OperationOutcome::Got(Some(record))) => {
            let item = ItemJson::new(
                &Item {
                    key: key.clone(),
                    record: record.clone(),
                },
                false,
            );
            merged(200, serde_json::to_value(item).unwrap_or_default())
        }
        Ok(OperationOutcome::Got(None) | OperationOutcome::Deleted { revision: None }) => {
            failed(Code::KeyNotFound, Value::Null)
        }
        Ok(OperationOutcome::Put { revision, created }) => merged(
            if *created { 201 } else { 200 },
            object!({ "revision": revision, "created": created }),
        ),
        Ok(OperationOutcome::Deleted {
            revision: Some(revision),
        }) => merged(200, object!({ "revision": revision })),
        Err(WriteFailure::Rejected(WriteRejection::ConditionFailed { operation, .. }))
            // Another operation's condition failed, and a shard does all of its operations or none.
            if *operation != position =>
        {
            failed(Code::NotApplied, object!({ "failed_operation": operation }))
        }
        Err(WriteFailure::Rejected(WriteRejection::ConditionFailed { current, .. })) => failed(
            Code::ConditionFailed,
            object!({ "current_revision": current }),
        ),
        Err(WriteFailure::Rejected(rejection)) => item_problem(rejection.clone().into()),
        Err(WriteFailure::Failed(failure)) => item_problem(failure.clone().into()),
    }
}

fn failed(code: Code, members: Value) -> Value {
    let mut result = merged(code.status().as_u16(), members);
    result["code"] = code.as_str().into();
    result
}

fn item_problem(problem: Problem) -> Value {
    let members = object!({ "code": problem.code(), "detail": problem.detail });
    merged(problem.status().as_u16(), members)
}

fn merged(status: u16, members: Value) -> Value {
    let mut result = match members {
        Value::Object(members) => members,
        _ => Map::new(),
    };
    result.insert("status".into(), status.into());
    Value::Object(result)
}
