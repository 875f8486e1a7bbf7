//! Writes: of one key or several, with conditions, sent again under an idempotency key where no
//! answer came.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, Method, StatusCode, header};
use quorate::api::store::{Failure, Store, WriteFailure, Written};
use quorate::sm::kv::{self, Media, OperationOutcome, WriteRejection};
use quorate::types::{Address, Revision};
use quorate_sim::history::{Action, Condition, Outcome, Value};
use serde_json::{Value as Json, json};

use super::book::{Answer, Times};
use super::http::{Ask, Reply, Silence};
use super::options;
use super::worker::{Client, in_path};

/// Attempts at a write that has an idempotency key.
const ATTEMPTS_MAX: usize = 5;
const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// The way of a request to the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// A client that knows the shards.
    Store,
    /// A node, which may send the client elsewhere, or a gateway.
    Http(Address),
}

/// An operation that is to be done.
#[derive(Debug, Clone)]
pub struct Intent {
    pub key: usize,
    pub action: Action,
    /// As the cluster knows it.
    condition: kv::Condition,
}

impl Intent {
    pub fn get(key: usize) -> Self {
        Self {
            key,
            action: Action::Get,
            condition: kv::Condition::None,
        }
    }
}

impl Client {
    /// Draws an operation on a key.
    pub fn intend(&mut self, key: usize, has_gets: bool) -> Intent {
        let known = self.book.lock().known(key);
        let (condition, asked) = match (self.random.below(12), known) {
            (0, _) => (Condition::Absent, kv::Condition::Absent),
            (1, _) => (Condition::Present, kv::Condition::Present),
            (2 | 3, Some((value, revision))) => (
                Condition::Holds(value),
                kv::Condition::RevisionIn(vec![Revision(revision)]),
            ),
            _ => (Condition::None, kv::Condition::None),
        };
        let value = self.book.lock().new_value();
        match self.random.below(100) {
            0..20 => Intent {
                key,
                action: Action::Delete { condition },
                condition: asked,
            },
            20..40 if has_gets => Intent::get(key),
            _ => Intent {
                key,
                action: Action::Put { value, condition },
                condition: asked,
            },
        }
    }

    /// Does operations, and notes what came of them. `is_atomic`: all at once, or none of them.
    pub async fn write(&mut self, intents: Vec<Intent>, is_atomic: bool) {
        let number = self.book.lock().new_value();
        let idempotency = self.random.percent(40).then(|| format!("{}", number.0));
        let called = self.began.elapsed();
        let mut answers = vec![Answer::Refused; intents.len()];
        for attempt in 0..ATTEMPTS_MAX {
            let way = self.way();
            let told = self.attempt(&way, &intents, idempotency.as_deref()).await;
            for (answer, told) in answers.iter_mut().zip(told) {
                *answer = joined(*answer, told);
            }
            let is_told = !answers.contains(&Answer::Told(Outcome::Unknown));
            if is_told || idempotency.is_none() || attempt + 1 == ATTEMPTS_MAX {
                break;
            }
            let pause = self.random.between(20, 1500);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        let times = Times {
            client: self.id,
            called,
            returned: self.began.elapsed(),
        };
        let operations: Vec<(usize, Action, Answer)> = intents
            .iter()
            .zip(&answers)
            .map(|(intent, answer)| (intent.key, intent.action, *answer))
            .collect();
        {
            let mut book = self.book.lock();
            if is_atomic {
                book.record_batch(times, &operations);
            } else {
                for (key, action, answer) in &operations {
                    book.record(*key, times, *action, *answer);
                }
            }
        }
        // A refusal is not remembered: the write would be done now.
        if let Some(idempotency) = idempotency
            && !answers.contains(&Answer::Refused)
            && self.random.percent(30)
        {
            self.ask_again(&intents, &answers, &idempotency, is_atomic)
                .await;
        }
    }

    /// Sends once more what was answered: the answer must be the same.
    async fn ask_again(
        &mut self,
        intents: &[Intent],
        answers: &[Answer],
        idempotency: &str,
        is_atomic: bool,
    ) {
        // Of gets alone nothing is remembered, nor of those that go to a shard of their own.
        let is_get = |intent: &Intent| intent.action == Action::Get;
        if intents.iter().all(is_get) {
            return;
        }
        let way = self.way();
        let again = self.attempt(&way, intents, Some(idempotency)).await;
        for ((intent, first), second) in intents.iter().zip(answers).zip(again) {
            if (is_atomic || !is_get(intent)) && !may_follow(*first, second) {
                self.book.lock().complain(format!(
                    "a write was answered {first:?} and then {second:?}: {intent:?}, under the \
                     key {idempotency}, by {way:?}"
                ));
            }
        }
    }

    async fn attempt(
        &self,
        way: &Way,
        intents: &[Intent],
        idempotency: Option<&str>,
    ) -> Vec<Answer> {
        match (way, intents) {
            (Way::Store, _) => self.attempt_by_store(intents, idempotency).await,
            (Way::Http(server), [intent]) if intent.action != Action::Get => {
                vec![self.attempt_one(server, intent, idempotency).await]
            }
            (Way::Http(server), _) => self.attempt_batch(server, intents, idempotency).await,
        }
    }

    async fn attempt_by_store(&self, intents: &[Intent], idempotency: Option<&str>) -> Vec<Answer> {
        let operations = intents
            .iter()
            .map(|intent| kv::Operation {
                key: self.key(intent.key),
                condition: intent.condition.clone(),
                action: match intent.action {
                    Action::Get => kv::Action::Get,
                    Action::Put { value, .. } => kv::Action::Put {
                        media: Media::Text,
                        value: value.0.to_string().into(),
                    },
                    Action::Delete { .. } => kv::Action::Delete,
                },
            })
            .collect();
        let idempotency = idempotency.map(|key| Bytes::copy_from_slice(key.as_bytes()));
        let written = self.store.write(operations, idempotency, options()).await;
        let mut answers: Vec<Answer> = written
            .iter()
            .zip(intents)
            .enumerate()
            .map(|(position, (written, intent))| self.told(position, intent, written))
            .collect();
        answers.resize(intents.len(), Answer::Told(Outcome::Unknown));
        answers
    }

    fn told(&self, position: usize, intent: &Intent, written: &Written) -> Answer {
        match written {
            Ok(OperationOutcome::Put { revision, created }) => Answer::Told(Outcome::Put {
                created: *created,
                revision: revision.0,
            }),
            Ok(OperationOutcome::Deleted {
                revision: Some(revision),
            }) => Answer::DeletedAt(revision.0),
            Ok(OperationOutcome::Deleted { revision: None }) => {
                Answer::Told(Outcome::Deleted { existed: false })
            }
            Ok(OperationOutcome::Got(record)) => Answer::Told(Outcome::Got(
                record
                    .as_ref()
                    .map(|record| (value_of(&record.value), record.revision.0)),
            )),
            Err(WriteFailure::Rejected(WriteRejection::ConditionFailed { operation, .. }))
                if *operation == position =>
            {
                failed_condition(intent)
            }
            Err(WriteFailure::Rejected(WriteRejection::KeyReused { slot })) => {
                let what = format!("an idempotency key of slot {slot} was taken for another's");
                self.book.lock().complain(what);
                Answer::Refused
            }
            Err(WriteFailure::Failed(Failure::Unknown { .. })) => Answer::Told(Outcome::Unknown),
            Err(WriteFailure::Rejected(_) | WriteFailure::Failed(_)) => Answer::Refused,
        }
    }

    async fn attempt_one(
        &self,
        server: &Address,
        intent: &Intent,
        idempotency: Option<&str>,
    ) -> Answer {
        let path = format!("/v1/kv/{}?timeout=3s", in_path(&self.key(intent.key)));
        let mut ask = match intent.action {
            Action::Put { value, .. } => Ask::new(Method::PUT, path).text(value.0.to_string()),
            Action::Get | Action::Delete { .. } => Ask::new(Method::DELETE, path),
        };
        ask = match &intent.condition {
            kv::Condition::Absent => ask.header(header::IF_NONE_MATCH, "*"),
            kv::Condition::Present => ask.header(header::IF_MATCH, "*"),
            kv::Condition::RevisionIn(revisions) => {
                let revision = revisions.first().copied().unwrap_or_default();
                ask.header(header::IF_MATCH, &format!("\"{}\"", revision.0))
            }
            kv::Condition::None | kv::Condition::RevisionNotIn(_) => ask,
        };
        if let Some(key) = idempotency {
            ask = ask.header(HeaderName::from_static(IDEMPOTENCY_KEY), key);
        }
        match self.http.ask(server, &ask).await {
            Ok(reply) => self.answer_of(intent, reply.status, reply.json().as_ref()),
            Err(Silence::NotDone) => Answer::Refused,
            Err(Silence::Unknown) => Answer::Told(Outcome::Unknown),
        }
    }

    /// Returns what an answer, or a part of the answer to a batch, says of an operation.
    fn answer_of(&self, intent: &Intent, status: StatusCode, body: Option<&Json>) -> Answer {
        let member = |name: &str| body.and_then(|body| body.get(name));
        let revision = member("revision").and_then(Json::as_u64);
        match (intent.action, status.as_u16(), revision) {
            (Action::Put { .. }, 200 | 201, Some(revision)) => Answer::Told(Outcome::Put {
                created: status == StatusCode::CREATED,
                revision,
            }),
            (Action::Delete { .. }, 200, Some(revision)) => Answer::DeletedAt(revision),
            (Action::Delete { .. }, 404, _) => Answer::Told(Outcome::Deleted { existed: false }),
            (Action::Get, 200, Some(revision)) => {
                let value = member("value").and_then(Json::as_str).unwrap_or_default();
                let value = value_of(value.as_bytes());
                Answer::Told(Outcome::Got(Some((value, revision))))
            }
            (Action::Get, 404, _) => Answer::Told(Outcome::Got(None)),
            (_, 412, _) => failed_condition(intent),
            // Another operation of its shard was refused; too much to do; nobody to do it.
            (_, 424 | 429 | 503, _) => Answer::Refused,
            // Of 500 nothing is known: a stream that broke off passes for one here.
            (_, 500 | 504, _) => Answer::Told(Outcome::Unknown),
            _ => {
                let body = body.map(Json::to_string).unwrap_or_default();
                self.book
                    .lock()
                    .complain(format!("{intent:?} was answered {status}: {body}"));
                Answer::Told(Outcome::Unknown)
            }
        }
    }

    async fn attempt_batch(
        &self,
        server: &Address,
        intents: &[Intent],
        idempotency: Option<&str>,
    ) -> Vec<Answer> {
        let operations: Vec<Json> = intents.iter().map(|intent| self.in_json(intent)).collect();
        let mut ask = Ask::new(Method::POST, "/v1/batch?timeout=3s")
            .json(&json!({ "operations": operations }));
        if let Some(key) = idempotency {
            ask = ask.header(HeaderName::from_static(IDEMPOTENCY_KEY), key);
        }
        let unknown = vec![Answer::Told(Outcome::Unknown); intents.len()];
        let reply = match self.http.ask(server, &ask).await {
            Ok(reply) => reply,
            Err(Silence::NotDone) => return vec![Answer::Refused; intents.len()],
            Err(Silence::Unknown) => return unknown,
        };
        match results(&reply) {
            Some(results) if results.len() == intents.len() => intents
                .iter()
                .zip(results)
                .map(|(intent, (status, result))| self.answer_of(intent, status, Some(&result)))
                .collect(),
            _ if matches!(reply.status.as_u16(), 429 | 503) => {
                vec![Answer::Refused; intents.len()]
            }
            _ => unknown,
        }
    }

    fn in_json(&self, intent: &Intent) -> Json {
        let key = String::from_utf8_lossy(&self.key(intent.key)).into_owned();
        let mut operation = match intent.action {
            Action::Get => json!({ "op": "get", "key": key }),
            Action::Put { value, .. } => {
                json!({ "op": "put", "key": key, "value": value.0.to_string() })
            }
            Action::Delete { .. } => json!({ "op": "delete", "key": key }),
        };
        match &intent.condition {
            kv::Condition::Absent => operation["if_absent"] = true.into(),
            kv::Condition::Present => operation["if_present"] = true.into(),
            kv::Condition::RevisionIn(revisions) => {
                operation["if_revision"] = revisions.iter().map(|r| r.0).collect();
            }
            kv::Condition::None | kv::Condition::RevisionNotIn(_) => {}
        }
        operation
    }
}

/// Returns what it means that the condition of an operation did not hold. One without a condition
/// was not done either: a refusal that is remembered names a place in the batch as it was split
/// then, and after a move of slots it may be split otherwise.
fn failed_condition(intent: &Intent) -> Answer {
    match intent.condition {
        kv::Condition::None => Answer::Refused,
        _ => Answer::Told(Outcome::ConditionFailed),
    }
}

/// Returns the results in the answer to a batch, with their statuses.
fn results(reply: &Reply) -> Option<Vec<(StatusCode, Json)>> {
    let body = reply.json()?;
    let results = body.get("results")?.as_array()?;
    results
        .iter()
        .map(|result| {
            let status = result.get("status")?.as_u64()?;
            let status = StatusCode::from_u16(u16::try_from(status).ok()?).ok()?;
            Some((status, result.clone()))
        })
        .collect()
}

/// Returns the value that these bytes stand for: each of ours is a number.
pub fn value_of(bytes: &[u8]) -> Value {
    let text = String::from_utf8_lossy(bytes);
    Value(text.parse().unwrap_or(u64::MAX - 1))
}

/// Joins what two attempts of a write were told. What was told stays; what may have been done once
/// may have been done.
fn joined(first: Answer, second: Answer) -> Answer {
    match (first, second) {
        (Answer::Refused, second) => second,
        (Answer::Told(Outcome::Unknown), Answer::Refused) => first,
        (Answer::Told(Outcome::Unknown), second) => second,
        (first, _) => first,
    }
}

/// Returns whether a write may be answered so, after it was answered as at first.
fn may_follow(first: Answer, second: Answer) -> bool {
    let is_open = |answer| matches!(answer, Answer::Refused | Answer::Told(Outcome::Unknown));
    // Of a deletion under a condition where nothing is, both are said, by different ways.
    let is_failed = |answer| {
        matches!(
            answer,
            Answer::Told(Outcome::ConditionFailed | Outcome::Deleted { existed: false })
        )
    };
    is_open(first) || is_open(second) || first == second || (is_failed(first) && is_failed(second))
}
