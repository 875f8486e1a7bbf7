//! `/v1/cluster/view` and `/v1/cluster/operations/<id>`: what was asked of the view, changing it,
//! and how a change gets on.
//!
//! - `PUT /v1/cluster/view` takes a [`ViewChange`]; a field left out stays as it was asked for. It
//!   is answered 202 when the plan is accepted, with the operation and its `Location`. `?wait=60s`
//!   waits for its end: 200, or 202 where the time is up before.
//! - `?dry_run=true` answers 200 with what it would take, and changes nothing.
//! - `If-Match: "<epoch>"`, the ETag of `/v1/cluster` and `/v1/cluster/view`, guards against a
//!   change in between: 412 `epoch_changed`.
//! - What can't be done is 409 `view_refused`: whether the same body can be depends on the view as
//!   it is. A newcomer that is not there is 503 `node_not_ready`.
//!
//! Nodes carry a change out by themselves: a client that hangs up, or a wait that ends, stops
//! nothing.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderValue, StatusCode, Uri, header};

use super::conditions::Conditions;
use super::json::json;
use super::query::{Query, digits};
use crate::api::store::{Failure, Options, Routing};
use crate::api::view_change::{
    Auto, ChangeInProgress, PerNode, ReplicationFactor, Shards, ViewChange, ViewChangeFailure,
};
use crate::http::app::{App, SharedApp};
use crate::http::blocking;
use crate::http::body::{self, BodyLimit};
use crate::http::dialect::Dialect;
use crate::http::metrics::RequestTimer;
use crate::http::problem::{self, Code, Problem};
use crate::types::{ParseError, PlanEpoch};

/// Room for tens of thousands of addresses.
const CHANGE_BODY: BodyLimit = BodyLimit {
    bytes_max: 1 << 20,
    what: "the body of a change of the view",
};

/// Before the id in the path of an operation.
const OPERATIONS: &str = "/v1/cluster/operations/";

/// Handles `GET /v1/cluster/view`: what was asked for, in the form in which a change is asked for.
pub async fn view(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::Native, &request);
    timer.finish(
        requested_view(&app, request.uri())
            .await
            .unwrap_or_else(Problem::into_response),
    )
}

async fn requested_view(app: &App, uri: &Uri) -> Result<Response, Problem> {
    Query::parse(uri.query(), &[], &app.limits)?;
    let status = match app.store.status().await {
        Ok(status) => status,
        Err(failure) => return Ok(problem::respond(failure, uri)),
    };
    let replication_factor = status.asked.replication_factor;

    // As it was asked for, not as it came out: sent back as a change, it must not fix what was
    // left open.
    let requested_view = ViewChange {
        nodes: Some(
            status
                .nodes
                .into_iter()
                .filter(|node| !node.leaving)
                .map(|node| node.address)
                .collect(),
        ),
        layout: Some(status.asked.layout),
        replication_factor: Some(replication_factor.map_or(
            ReplicationFactor::Default(Auto::Auto),
            ReplicationFactor::Fixed,
        )),
        shards: Some(
            status
                .asked
                .shards
                .map_or(Shards::Default(PerNode::PerNode), Shards::Fixed),
        ),
    };
    let mut response = json(StatusCode::OK, &requested_view);
    response
        .headers_mut()
        .insert(header::ETAG, problem::epoch_etag(status.epoch));
    Ok(response)
}

/// Handles `PUT /v1/cluster/view`.
pub async fn change(State(app): State<SharedApp>, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::Native, &request);
    let (parts, body) = request.into_parts();
    let answer = put(&app, &parts, body, &mut timer)
        .await
        .unwrap_or_else(Problem::into_response);
    timer.finish(answer)
}

/// Handles `GET /v1/cluster/operations/<id>`.
pub async fn operation(State(app): State<SharedApp>, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::Native, &request);
    let answer = look(&app, request.uri(), &mut timer)
        .await
        .unwrap_or_else(Problem::into_response);
    timer.finish(answer)
}

/// A change's head, parsed.
struct ChangeHead {
    query: Query,
    only_if: Option<PlanEpoch>,
}

impl ChangeHead {
    fn of_request(app: &App, parts: &Parts) -> Result<Self, Problem> {
        let query = Query::parse(
            parts.uri.query(),
            &["dry_run", "wait", "timeout"],
            &app.limits,
        )?;
        if query.dry_run && query.wait.is_some() {
            return Err(
                Problem::new(Code::InvalidQuery, "a dry run has no end to wait for")
                    .extension("parameter", "wait"),
            );
        }
        let only_if = Conditions::of_request(&parts.headers)?.epoch()?;
        Ok(Self { query, only_if })
    }
}

async fn put(
    app: &App,
    parts: &Parts,
    body: Body,
    timer: &mut RequestTimer<'_>,
) -> Result<Response, Problem> {
    let ChangeHead { query, only_if } = match ChangeHead::of_request(app, parts) {
        Ok(head) => head,
        Err(problem) => {
            body::discard(parts, body);
            return Err(problem);
        }
    };
    let body = body::read(parts, body, CHANGE_BODY, &app.limits, &app.bodies).await?;
    let change = blocking::work(body.len(), || parse(&body))?;

    // Only the leader of the meta group can accept a plan, so any node passes the change on.
    let options = Options {
        routing: Routing::Proxy,
        ..query.options
    };
    if query.dry_run {
        return plan(app, &parts.uri, change, only_if, options).await;
    }

    // Before anything is changed: a refusal must leave nothing done.
    let permit = query
        .wait
        .map(|wait| Ok::<_, Failure>((app.changes.acquire()?, wait)))
        .transpose()?;

    let accepted = match accept(app, change, only_if, options).await {
        Ok(accepted) => accepted,
        Err(failure) => return refused(failure, &parts.uri),
    };
    timer.log_change(&format_args!(
        "the change of the view to plan {}",
        accepted.id
    ));
    let location = format!("{OPERATIONS}{}", accepted.id);
    let last = match permit {
        Some((permit, wait)) => {
            timer.allow_wait(wait);
            permit
                .follow(&*app.store, &*app.readiness, accepted, wait, options)
                .await
        }
        None => accepted,
    };

    let status = if last.is_over() {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    let mut response = json(status, &last);
    let location = HeaderValue::try_from(location).expect("a path of ASCII is a header value");
    response.headers_mut().insert(header::LOCATION, location);
    Ok(response)
}

fn parse(body: &[u8]) -> Result<ViewChange, Problem> {
    let invalid = |detail: String| Problem::new(Code::InvalidBody, detail);
    // serde would take a list for the fields in their order.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(invalid(
            "a change of the view is a JSON object: {} plans again".into(),
        ));
    }
    let change: ViewChange =
        serde_json::from_slice(body).map_err(|error| invalid(error.to_string()))?;
    change.ensure_bounded().map_err(invalid)?;
    // Views that are stored may have such addresses, so reading JSON does not refuse them.
    let zoned = change
        .nodes
        .iter()
        .flatten()
        .find(|node| node.as_str().contains('%'));
    if let Some(node) = zoned {
        return Err(invalid(ParseError::Zone(node.to_string()).to_string()));
    }
    Ok(change)
}

async fn plan(
    app: &App,
    uri: &Uri,
    change: ViewChange,
    only_if: Option<PlanEpoch>,
    options: Options,
) -> Result<Response, Problem> {
    match app.store.plan_view(change, options).await {
        // A dry run has no entry that would check the epoch, so it is checked here.
        Ok(planned) if only_if.is_some_and(|epoch| epoch != planned.base) => refused(
            ViewChangeFailure::EpochChanged {
                current: planned.base,
            },
            uri,
        ),
        Ok(planned) => Ok(json(StatusCode::OK, &planned)),
        Err(failure) => refused(failure, uri),
    }
}

/// Has the change accepted, in a task of its own: a client that hangs up must not break it off
/// halfway.
async fn accept(
    app: &App,
    change: ViewChange,
    only_if: Option<PlanEpoch>,
    options: Options,
) -> Result<ChangeInProgress, ViewChangeFailure> {
    let store = Arc::clone(&app.store);
    let accepting = tokio::spawn(async move { store.change_view(change, only_if, options).await });
    let lost = |error: tokio::task::JoinError| {
        Err(ViewChangeFailure::Failed(Failure::Unknown {
            reason: format!("the change broke off: {error}"),
        }))
    };
    accepting.await.unwrap_or_else(lost)
}

fn refused(failure: ViewChangeFailure, uri: &Uri) -> Result<Response, Problem> {
    match failure {
        ViewChangeFailure::Failed(failure) => Ok(problem::respond(failure, uri)),
        other => Err(other.into()),
    }
}

async fn look(app: &App, uri: &Uri, timer: &mut RequestTimer<'_>) -> Result<Response, Problem> {
    let query = Query::parse(uri.query(), &["wait", "timeout"], &app.limits)?;
    let options = Options {
        routing: Routing::Proxy,
        ..query.options
    };

    // An id that is no number names no change, just as a number that was never given.
    let id = uri.path().strip_prefix(OPERATIONS).unwrap_or_default();
    let found = match digits(id.as_bytes()) {
        Some(number) => app.store.operation(PlanEpoch(number), options).await,
        None => Ok(None),
    };
    match (found, query.wait) {
        (Ok(Some(change)), Some(wait)) if !change.is_over() => {
            timer.allow_wait(wait);
            Ok(json(
                StatusCode::OK,
                &app.changes
                    .acquire()?
                    .follow(&*app.store, &*app.readiness, change, wait, options)
                    .await,
            ))
        }
        (Ok(Some(change)), _) => Ok(json(StatusCode::OK, &change)),
        (Ok(None), _) => Err(Problem::new(
            Code::UnknownOperation,
            "no change of the view was accepted under this id",
        )),
        (Err(failure), _) => Ok(problem::respond(failure, uri)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::api::store::{Consistency, Store};
    use crate::api::view_change::{NODES_MAX, Phase, PlannedChange};
    use crate::client::remote::RemoteStore;
    use crate::http::NotReady;
    use crate::http::testing::Site;
    use crate::types::Address;

    #[tokio::test]
    async fn a_change_is_accepted_and_followed() {
        let site = Site::start().await;
        site.store.take_time(3);
        let accepted = site
            .put(
                "/v1/cluster/view",
                r#"{"nodes":["a:1","b:2"],"replication_factor":"auto"}"#,
            )
            .await;
        assert_eq!(
            (accepted.status, accepted.header("location")),
            (202, "/v1/cluster/operations/2")
        );
        assert_eq!(
            (&accepted.json()["id"], &accepted.json()["phase"]),
            (&json!(2), &json!("running"))
        );
        let running = site.get("/v1/cluster/operations/2").await;
        assert_eq!(
            (running.status, &running.json()["phase"]),
            (200, &json!("running"))
        );
        let waited = site.get("/v1/cluster/operations/2?wait=20s").await;
        assert_eq!(
            (waited.status, &waited.json()["phase"]),
            (200, &json!("done"))
        );
        for unknown in [
            "3",
            "x",
            "-1",
            "+2",
            "%32",
            "",
            "99999999999999999999",
            "1/2",
        ] {
            assert_eq!(
                site.get(&format!("/v1/cluster/operations/{unknown}"))
                    .await
                    .status,
                404,
                "{unknown}"
            );
        }
        site.stop().await;
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_change_the_time_or_the_server() {
        let site = Site::start().await;
        site.store.take_time(4);
        let done = site.put("/v1/cluster/view?wait=20s", "{}").await;
        assert_eq!((done.status, &done.json()["phase"]), (200, &json!("done")));
        site.store.take_time(u64::MAX);
        let in_vain = site.put("/v1/cluster/view?wait=60ms", "{}").await;
        assert_eq!(
            (in_vain.status, in_vain.header("location")),
            (202, "/v1/cluster/operations/2")
        );
        assert_eq!(in_vain.json()["phase"], "running");
        assert_eq!(
            site.get("/v1/cluster/operations/1?wait=60ms").await.json()["phase"],
            "running"
        );
        *site.readiness.0.lock() = Some(NotReady {
            code: "stopping",
            reason: String::new(),
        });
        assert_eq!(
            site.put("/v1/cluster/view?wait=1h", "{}").await.status,
            400,
            "hours are no unit"
        );
        assert_eq!(
            site.put("/v1/cluster/view?wait=3600s", "{}").await.status,
            202
        );
        site.stop().await;
    }

    #[tokio::test]
    async fn what_was_asked_is_shown_in_the_form_of_a_change() {
        let site = Site::start().await;
        let shown = site.get("/v1/cluster/view").await;
        assert_eq!((shown.status, shown.header("etag")), (200, "\"1\""));
        let change: ViewChange = serde_json::from_slice(&shown.body).expect("a change");
        assert_eq!(serde_json::to_value(&change).expect("JSON"), shown.json());
        assert_eq!(shown.json()["shards"], "per-node");
        assert_eq!(site.get("/v1/cluster").await.header("etag"), "\"1\"");
        site.stop().await;
    }

    #[tokio::test]
    async fn a_guard_holds_and_a_bad_request_reaches_no_store() {
        let site = Site::start().await;
        for query in ["", "?dry_run=true"] {
            let path = format!("/v1/cluster/view{query}");
            let late = site
                .ask(&format!("PUT {path}\nif-match: \"7\""), "{}")
                .await;
            assert_eq!(
                (late.verdict(), late.header("etag")),
                ((412, "epoch_changed".into()), "\"1\"")
            );
            assert_eq!(late.json()["epoch"], 1);
            for guard in ["\"1\"", "*"] {
                let taken = site
                    .ask(&format!("PUT {path}\nif-match: {guard}"), "{}")
                    .await;
                assert!(matches!(taken.status, 200 | 202), "{taken:?}");
            }
        }
        for header in ["if-match: 1", "if-match: \"1\", \"2\"", "if-none-match: *"] {
            let answer = site
                .ask(&format!("PUT /v1/cluster/view\n{header}"), "{}")
                .await;
            assert_eq!(answer.verdict(), (400, "invalid_header".into()), "{header}");
        }
        for query in [
            "proxy=true",
            "wait=0s",
            "wait=3601s",
            "dry_run=1",
            "dry_run=true&wait=1s",
            "if_match=1",
        ] {
            let answer = site.put(&format!("/v1/cluster/view?{query}"), "{}").await;
            assert_eq!(answer.verdict(), (400, "invalid_query".into()), "{query}");
        }
        for body in [
            "",
            "[]",
            r#"{"nodes":["[fe80::1%1]:80"]}"#,
            r#"[["a:1"]]"#,
            "7",
            "{",
            r#"{"node":[]}"#,
            r#"{"nodes":["a"]}"#,
            r#"{"shards":70000}"#,
            r#"{} x"#,
        ] {
            let answer = site.put("/v1/cluster/view", body).await;
            assert_eq!(answer.verdict(), (400, "invalid_body".into()), "{body}");
        }
        let many: Vec<String> = (0..=NODES_MAX).map(|node| format!("n{node}:1")).collect();
        let (all, fewer) = (json!({ "nodes": many }), json!({ "nodes": many[1..] }));
        for query in ["", "?dry_run=true"] {
            let path = format!("/v1/cluster/view{query}");
            assert_eq!(
                site.put(&path, all.to_string()).await.verdict(),
                (400, "invalid_body".into()),
                "{query}"
            );
            let taken = site.put(&path, fewer.to_string()).await;
            assert!(matches!(taken.status, 200 | 202), "{query}: {taken:?}");
        }
        let large = format!("{{}}{}", " ".repeat(1 << 20));
        assert_eq!(
            site.put("/v1/cluster/view", large).await.verdict(),
            (413, "too_large".into())
        );
        site.stop().await;
    }

    /// The reader in `client::view_change` takes an answer of this file for what the store said.
    #[tokio::test]
    async fn the_client_reads_what_the_route_writes() {
        let site = Site::start().await;
        let client =
            RemoteStore::connect(vec![site.address.to_string().parse().expect("an address")])
                .expect("a client");
        let options = Options {
            consistency: Consistency::Linearizable,
            routing: Routing::Proxy,
            timeout: Duration::from_secs(20),
        };
        let naming = |nodes: &[&str]| {
            let nodes = nodes
                .iter()
                .map(|node| node.parse::<Address>().expect("an address"))
                .collect();
            ViewChange {
                nodes: Some(nodes),
                ..ViewChange::default()
            }
        };
        for (change, only_if) in [
            (naming(&[]), None),
            (naming(&["silent:1"]), Some(PlanEpoch(1))),
            (ViewChange::default(), Some(PlanEpoch(7))),
            (naming(&["a:1", "b:2"]), Some(PlanEpoch(1))),
        ] {
            let said = site
                .store
                .change_view(change.clone(), only_if, options)
                .await;
            assert_eq!(client.change_view(change, only_if, options).await, said);
        }
        site.store.set_nodes(&[&site.address.to_string()]);
        let planned: PlannedChange = client
            .plan_view(ViewChange::default(), options)
            .await
            .expect("a plan");
        assert_eq!(
            Ok(planned),
            site.store.plan_view(ViewChange::default(), options).await
        );
        let done = client
            .operation(PlanEpoch(2), options)
            .await
            .expect("an answer")
            .expect("there was such a plan");
        assert_eq!(done.phase, Phase::Done);
        assert_eq!(client.operation(PlanEpoch(3), options).await, Ok(None));
        let silent = site
            .put("/v1/cluster/view", r#"{"nodes":["silent:1"]}"#)
            .await;
        assert_eq!(
            (silent.verdict(), silent.header("retry-after")),
            ((503, "node_not_ready".into()), "1")
        );
        assert_eq!(
            site.put("/v1/cluster/view", r#"{"nodes":[]}"#)
                .await
                .verdict(),
            (409, "view_refused".into())
        );
        site.stop().await;
    }
}
