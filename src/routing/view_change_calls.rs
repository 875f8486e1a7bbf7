//! Asks one node for a change of the view, for a plan of it, and how it gets on, over the native
//! dialect. The JSON is `api::view_change`.

use std::time::Duration;

use http::header::IF_MATCH;
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::call::silence;
use super::problem;
use super::reply::{self, VIEW_BYTES_MAX};
use super::retry::{Effect, FailureSource, server_timeout_ms};
use super::transport::{NodeCall, NodeReply, SendError, Transport};
use crate::api::failure::Failure;
use crate::api::store::Options;
use crate::api::view_change::{
    ChangeInProgress, EPOCH_CHANGED, NODE_NOT_READY, PlannedChange, UNKNOWN_OPERATION,
    VIEW_REFUSED, ViewChange, ViewChangeFailure,
};
use crate::types::{Address, PlanEpoch};

/// A node's own "not in time" is waited for this much longer.
const PATIENCE: Duration = Duration::from_millis(400);

/// A reason why a node has not changed the view, and whether it said so itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsettled {
    pub by: FailureSource,
    pub failure: ViewChangeFailure,
}

impl From<Unsettled> for ViewChangeFailure {
    fn from(unsettled: Unsettled) -> Self {
        unsettled.failure
    }
}

impl From<Unsettled> for Failure {
    fn from(unsettled: Unsettled) -> Self {
        unsettled.failure.into()
    }
}

/// Asks the node at `address` for the change. With `only_if` it may be asked for again.
///
/// # Errors
///
/// See [`ViewChangeFailure`].
pub async fn change(
    transport: &dyn Transport,
    address: Address,
    change: &ViewChange,
    only_if: Option<PlanEpoch>,
    options: Options,
) -> Result<ChangeInProgress, Unsettled> {
    let timeout_ms = server_timeout_ms(options.timeout);
    let path = format!("/v1/cluster/view?timeout={timeout_ms}ms");
    let mut put = NodeCall::put(&address, path, options.timeout + PATIENCE).json(change);
    if let Some(epoch) = only_if {
        let etag = HeaderValue::try_from(format!("\"{epoch}\"")).expect("digits in quotes");
        put = put.header(IF_MATCH, etag);
    }
    let sent = transport.send(put).await;
    read(sent, &address, effect(only_if)).await
}

/// Returns what it does to ask for a change twice: with a guard it is accepted once at most.
pub fn effect(only_if: Option<PlanEpoch>) -> Effect {
    if only_if.is_some() {
        Effect::Idempotent
    } else {
        Effect::Once
    }
}

/// Asks the node at `address` what the change would take.
///
/// # Errors
///
/// See [`ViewChangeFailure`].
pub async fn plan(
    transport: &dyn Transport,
    address: Address,
    change: &ViewChange,
    options: Options,
) -> Result<PlannedChange, Unsettled> {
    let timeout_ms = server_timeout_ms(options.timeout);
    let path = format!("/v1/cluster/view?dry_run=true&timeout={timeout_ms}ms");
    let put = NodeCall::put(&address, path, options.timeout + PATIENCE).json(change);
    let sent = transport.send(put).await;
    read(sent, &address, Effect::Safe).await
}

/// Asks the node at `address` how a change gets on.
///
/// # Errors
///
/// Only [`ViewChangeFailure::Failed`].
pub async fn operation(
    transport: &dyn Transport,
    address: Address,
    id: PlanEpoch,
    options: Options,
) -> Result<Option<ChangeInProgress>, Unsettled> {
    let timeout_ms = server_timeout_ms(options.timeout);
    let path = format!("/v1/cluster/operations/{id}?timeout={timeout_ms}ms");
    let get = NodeCall::get(&address, path, options.timeout + PATIENCE);
    let sent = transport.send(get).await;
    match answer(sent, &address, Effect::Safe).await? {
        // A program in front of a node, or in its place, may answer 404 to anything.
        CallAnswer::Problem { code, .. } if code == UNKNOWN_OPERATION => Ok(None),
        answer => settle(answer, Effect::Safe).map(Some),
    }
}

/// An answer to a question about the view.
enum CallAnswer<T> {
    Done(T),
    /// A refusal. The code is empty where no node has written it.
    Problem {
        code: String,
        failure: ViewChangeFailure,
    },
}

async fn read<T: DeserializeOwned>(
    sent: Result<NodeReply, SendError>,
    address: &Address,
    effect: Effect,
) -> Result<T, Unsettled> {
    settle(answer(sent, address, effect).await?, effect)
}

fn settle<T>(answer: CallAnswer<T>, effect: Effect) -> Result<T, Unsettled> {
    let failure = match answer {
        CallAnswer::Done(done) => return Ok(done),
        CallAnswer::Problem { failure, .. } => failure,
    };
    let failure = match failure {
        ViewChangeFailure::Failed(failure) => ViewChangeFailure::Failed(effect.report(failure)),
        failure => failure,
    };
    let by = FailureSource::Server;
    Err(Unsettled { by, failure })
}

async fn answer<T: DeserializeOwned>(
    sent: Result<NodeReply, SendError>,
    address: &Address,
    effect: Effect,
) -> Result<CallAnswer<T>, Unsettled> {
    let failed = |by: FailureSource, failure: Failure| {
        let failure = ViewChangeFailure::Failed(effect.report(failure));
        Unsettled { by, failure }
    };
    let response = match sent {
        Ok(response) => response,
        Err(error) => {
            let reason = silence(address, &error);

            // Without a connection the change was certainly not asked for, so another node may be.
            let failure = match error.is_connect() {
                true => Failure::Unavailable {
                    reason,
                    retry_after_ms: 1000,
                },
                false => Failure::Unknown { reason },
            };
            return Err(failed(FailureSource::Nobody, failure));
        }
    };
    let status = response.status();
    if status.is_success() {
        // A plan names up to a thousand nodes, twice.
        let read = reply::read_json(response, VIEW_BYTES_MAX).await;
        let unknown = |error: reply::ReplyError| Failure::Unknown {
            reason: format!("{address}: {error}"),
        };
        let done = read.map(CallAnswer::Done);
        return done.map_err(|error| failed(FailureSource::Nobody, unknown(error)));
    }
    let headers = response.headers().clone();
    let body = reply::read_problem(response).await;
    Ok(refusal(status, &headers, &body))
}

fn refusal<T>(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> CallAnswer<T> {
    let told: Refusal = problem::of_node(headers, body)
        .and_then(|problem| serde_json::from_value(problem).ok())
        .unwrap_or_default();
    let failure = match (told.code.as_str(), told.epoch) {
        (VIEW_REFUSED, _) => ViewChangeFailure::Refused {
            reason: told.detail,
        },
        (NODE_NOT_READY, _) => ViewChangeFailure::NotReady {
            reason: told.detail,
        },
        (EPOCH_CHANGED, Some(current)) => ViewChangeFailure::EpochChanged { current },
        _ => ViewChangeFailure::Failed(problem::failure(status, headers, body)),
    };
    CallAnswer::Problem {
        code: told.code,
        failure,
    }
}

/// Fields of the problem that refuses a change.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Refusal {
    code: String,
    detail: String,
    epoch: Option<PlanEpoch>,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::api::store::{Consistency, Routing};
    use crate::client::testing::{answer, bind, problem, problem_with, serve};
    use crate::routing::transport::HttpTransport;

    fn refusal(status: u16, code: &str) -> http::Response<bytes::Bytes> {
        let fields = serde_json::json!({ "code": code, "detail": "so it is" });
        problem_with(status, fields)
    }

    fn transport() -> Arc<dyn Transport> {
        HttpTransport::build(reqwest::Client::builder()).expect("a client")
    }

    fn options() -> Options {
        Options {
            consistency: Consistency::Linearizable,
            routing: Routing::Redirect,
            timeout: Duration::from_secs(20),
        }
    }

    async fn ask_about(response: http::Response<bytes::Bytes>) -> Result<bool, Unsettled> {
        let (address, listener) = bind().await;
        serve(listener, move |_| {
            let response = response.clone();
            async move { Some(response) }
        });
        let told = operation(&*transport(), address, PlanEpoch(3), options()).await;
        told.map(|change| change.is_some())
    }

    #[tokio::test]
    async fn nobody_but_a_node_says_that_there_was_no_such_change() {
        assert_eq!(ask_about(refusal(404, UNKNOWN_OPERATION)).await, Ok(false));
        for foreign in [
            answer(404, "<h1>not here</h1>"),
            answer(404, r#"{"code":"unknown_operation","detail":"no"}"#),
        ] {
            let told = ask_about(foreign).await;
            assert!(
                matches!(
                    &told,
                    Err(Unsettled {
                        failure: ViewChangeFailure::Failed(Failure::Unavailable { .. }),
                        ..
                    })
                ),
                "{told:?}"
            );
        }
        let no_route = ask_about(problem(404, "there is no such path")).await;
        assert!(no_route.is_err(), "{no_route:?}");
    }

    #[tokio::test]
    async fn nobody_but_a_node_says_that_a_change_was_refused() {
        let ask = async |response: http::Response<bytes::Bytes>| {
            let (address, listener) = bind().await;
            serve(listener, move |_| {
                let response = response.clone();
                async move { Some(response) }
            });
            let wanted = ViewChange::default();
            let told = change(&*transport(), address, &wanted, None, options()).await;
            told.expect_err("it was refused").failure
        };
        let refused = ask(refusal(409, VIEW_REFUSED)).await;
        assert!(
            matches!(refused, ViewChangeFailure::Refused { .. }),
            "{refused:?}"
        );
        let body = format!(r#"{{"code":"{VIEW_REFUSED}","detail":"no"}}"#);
        for foreign in [answer(409, body), answer(403, "<h1>no</h1>")] {
            let told = ask(foreign).await;
            assert!(
                matches!(told, ViewChangeFailure::Failed(Failure::Unknown { .. })),
                "{told:?}"
            );
        }
    }
}
