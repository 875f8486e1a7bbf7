//! `GET /v1/cluster` and `POST /v1/cluster/shards/<id>/leader`.

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{StatusCode, header};
use serde::Deserialize;
use serde_json::json as object;

use super::json::json;
use super::query::Query;
use crate::http::app::{App, SharedApp};
use crate::http::body::{self, BodyLimit};
use crate::http::dialect::Dialect;
use crate::http::metrics::RequestTimer;
use crate::http::problem::{self, Code, Problem};
use crate::types::{Address, GroupId};

/// The body of a leader transfer names one address.
const TRANSFER_BODY: BodyLimit = BodyLimit {
    bytes_max: 64 << 10,
    what: "the body of this request",
};

/// Around the shard's number in the path of a leader transfer.
const SHARD_PREFIX: &str = "/v1/cluster/shards/";
const LEADER_SUFFIX: &str = "/leader";

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TransferBody {
    /// None: to the shard's home.
    to: Option<Address>,
}

pub async fn cluster(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::Native, &request);
    let answer = match Query::parse(request.uri().query(), &[], &app.limits) {
        Ok(_) => match app.store.status().await {
            Ok(status) => {
                let mut response = json(StatusCode::OK, &status);
                response
                    .headers_mut()
                    .insert(header::ETAG, problem::epoch_etag(status.epoch));
                response
            }
            Err(failure) => problem::respond(failure, request.uri()),
        },
        Err(problem) => problem.into_response(),
    };
    timer.finish(answer)
}

pub async fn transfer_leader(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::Native, &request);
    let (parts, body) = request.into_parts();
    let answer = transfer(&app, &parts, body, &timer)
        .await
        .unwrap_or_else(Problem::into_response);
    timer.finish(answer)
}

async fn transfer(
    app: &App,
    parts: &Parts,
    body: axum::body::Body,
    timer: &RequestTimer<'_>,
) -> Result<Response, Problem> {
    let body = body::read(parts, body, TRANSFER_BODY, &app.limits, &app.bodies).await?;
    let query = Query::parse(parts.uri.query(), &["proxy", "timeout"], &app.limits)?;
    let shard = shard(parts.uri.path())?;

    // Without a body it is the usual request: the shard goes back to its home.
    let transfer: TransferBody = if body.is_empty() {
        TransferBody::default()
    } else {
        serde_json::from_slice(&body)
            .map_err(|error| Problem::new(Code::InvalidBody, error.to_string()))?
    };
    match app
        .store
        .transfer_leader(shard, transfer.to, query.options)
        .await
    {
        Ok(leader) => {
            timer.log_change(&format_args!("the transfer of shard {shard} to {leader}"));
            Ok(json(StatusCode::OK, &object!({ "leader": leader })))
        }
        Err(failure) => Ok(problem::respond(failure, &parts.uri)),
    }
}

fn shard(path: &str) -> Result<GroupId, Problem> {
    let name = path
        .strip_prefix(SHARD_PREFIX)
        .and_then(|rest| rest.strip_suffix(LEADER_SUFFIX))
        .unwrap_or_default();

    // Rust's parser would take a plus sign too.
    let digits = name.bytes().all(|byte| byte.is_ascii_digit());
    let number = if digits { name.parse().ok() } else { None };
    number.map(GroupId).ok_or_else(|| {
        Problem::new(
            Code::InvalidRequest,
            "a shard's id is a number: see /v1/cluster",
        )
    })
}
