//! The judge can be trusted: load on a correct store is accepted, however many answers get lost,
//! and every kind of wrong store is found.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use http::{HeaderMap, Method, StatusCode, Uri};
use quorate::http::{Limits, Server};
use rand::Rng;
use tokio_util::sync::CancellationToken;

use crate::common::http::Client;
use crate::common::load::Load;

/// What is wrong with a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nothing: it only loses answers, of writes that were done and of writes that were not.
    None,
    ReadsThePast,
    ForgetsWrites,
    DoesWhatItRejects,
    /// A write whose answer was lost happens once more when the next comes.
    RepeatsWrites,
    /// A retry under an idempotency key is done again.
    IgnoresIdempotencyKeys,
    IgnoresConditions,
    MixesBytes,
}

/// One in so many requests gets the store's special treatment.
const RARELY: u32 = 25;

#[derive(Debug)]
struct Fake {
    fault: Fault,
    values: HashMap<String, (u64, Bytes)>,
    /// The value before the current one.
    past: HashMap<String, (u64, Bytes)>,
    revision: u64,
    /// The status and the revision that were answered under an idempotency key.
    answered: HashMap<String, (StatusCode, u64)>,
    /// To be done once more.
    again: Vec<(String, Bytes)>,
}

impl Fake {
    fn handle(&mut self, method: &Method, key: &str, headers: &HeaderMap, body: Bytes) -> Response {
        let strikes = rand::rng().random_range(0..RARELY) == 0;
        let current = self.values.get(key).cloned();
        if method == Method::GET {
            let found = match self.fault {
                Fault::ReadsThePast if strikes => self.past.get(key).cloned().or(current),
                Fault::MixesBytes if strikes => {
                    current.map(|(revision, value)| (revision, [&value[..], b"x"].concat().into()))
                }
                _ => current,
            };
            return found.map_or(
                StatusCode::NOT_FOUND.into_response(),
                |(revision, value)| answer(StatusCode::OK, revision, value),
            );
        }
        let idempotency_key = headers
            .get("idempotency-key")
            .and_then(|key| key.to_str().ok());
        if let Some((status, revision)) = idempotency_key
            .and_then(|key| self.answered.get(key))
            .copied()
            && self.fault != Fault::IgnoresIdempotencyKeys
        {
            return answer(status, revision, Bytes::new());
        }
        let asked = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let holds = asked("if-none-match").is_none_or(|_| current.is_none())
            && asked("if-match").is_none_or(|etag| {
                current
                    .as_ref()
                    .is_some_and(|(revision, _)| etag == format!("\"{revision}\""))
            });
        let loses_answer = rand::rng().random_range(0..RARELY) == 0;
        if loses_answer && rand::rng().random() {
            return StatusCode::GATEWAY_TIMEOUT.into_response();
        }
        let ignored = self.fault == Fault::IgnoresConditions && strikes;
        let status = if !(holds || ignored) {
            StatusCode::PRECONDITION_FAILED
        } else if method == Method::DELETE {
            let existed = if self.fault == Fault::ForgetsWrites && strikes {
                current
            } else {
                self.values.remove(key)
            };
            self.revision += 1;
            if existed.is_some() {
                StatusCode::OK
            } else {
                StatusCode::NOT_FOUND
            }
        } else {
            self.revision += 1;
            if !(self.fault == Fault::ForgetsWrites && strikes) {
                let before = self
                    .values
                    .insert(key.to_owned(), (self.revision, body.clone()));
                self.past
                    .extend(before.map(|before| (key.to_owned(), before)));
            }
            if current.is_some() {
                StatusCode::OK
            } else {
                StatusCode::CREATED
            }
        };
        if let Some(key) = idempotency_key {
            self.answered
                .insert(key.to_owned(), (status, self.revision));
        }
        for (key, value) in std::mem::take(&mut self.again) {
            self.revision += 1;
            self.values.insert(key, (self.revision, value));
        }
        if self.fault == Fault::DoesWhatItRejects && strikes {
            return StatusCode::SERVICE_UNAVAILABLE.into_response();
        }
        if loses_answer {
            if self.fault == Fault::RepeatsWrites && method == Method::PUT && status.is_success() {
                self.again.push((key.to_owned(), body));
            }
            return StatusCode::GATEWAY_TIMEOUT.into_response();
        }
        answer(status, self.revision, Bytes::new())
    }
}

fn answer(status: StatusCode, revision: u64, body: Bytes) -> Response {
    (status, [("etag", format!("\"{revision}\""))], body).into_response()
}

/// What the judge says of a store with this fault.
async fn judge(fault: Fault) -> Result<(), String> {
    let fake = Fake {
        fault,
        values: HashMap::new(),
        past: HashMap::new(),
        revision: 0,
        answered: HashMap::new(),
        again: Vec::new(),
    };
    let handler =
        async |State(fake): State<Arc<Mutex<Fake>>>,
               method: Method,
               uri: Uri,
               headers: HeaderMap,
               body: Bytes| { fake.lock().handle(&method, uri.path(), &headers, body) };
    let router = Router::new()
        .fallback(handler)
        .with_state(Arc::new(Mutex::new(fake)));
    let server = Server::bind(&["127.0.0.1:0"]).await.expect("a free port");
    let address = server.addresses()[0].to_string();
    let serving = tokio::spawn(async move {
        server
            .serve(router, CancellationToken::new(), &Limits::default())
            .await
    });
    let load = Load {
        registers: 3,
        ..Load::new("harness")
    }
    .start_at(vec![address.clone()], Client::default());
    load.writes(4000).await;
    let verdict = AssertUnwindSafe(load.stop().await.judge_at(&[address]))
        .catch_unwind()
        .await;
    serving.abort();
    verdict.map_err(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_correct_store_is_accepted_and_wrong_ones_are_not() {
    assert_eq!(judge(Fault::None).await, Ok(()));
    let faults = [
        Fault::ReadsThePast,
        Fault::ForgetsWrites,
        Fault::DoesWhatItRejects,
        Fault::RepeatsWrites,
        Fault::IgnoresIdempotencyKeys,
        Fault::IgnoresConditions,
        Fault::MixesBytes,
    ];
    for fault in faults {
        let verdict = judge(fault).await;
        let reason = verdict.expect_err(&format!("a store that {fault:?} was accepted"));
        assert!(
            reason.contains("seed"),
            "{fault:?}: the verdict does not tell the seed: {reason}"
        );
    }
}
