//! `GET /v1/node/scrub` and `POST /v1/node/scrub`: the scrub of the node that answers.
//!
//! Of this node alone: whoever wants all of them scrubbed asks each, as `quorate cluster scrub`
//! does. The scrub goes on by itself; nobody needs to wait for it.

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;

use super::json::json;
use super::query::Query;
use crate::api::protocol::ScrubStatus;
use crate::api::store::Failure;
use crate::http::app::{App, SharedApp};
use crate::http::body::{self, BodyLimit};
use crate::http::dialect::Dialect;
use crate::http::peer::PeerService;
use crate::http::problem::{Code, Problem};

/// Nothing is said in it.
const NO_BODY: BodyLimit = BodyLimit {
    bytes_max: 1 << 10,
    what: "the body of this request",
};

/// Tells how the last scrub gets on.
pub async fn scrub_status(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::Native, &request);
    let answer = match query_node(&app, &request, |node| node.scrub_status()) {
        Ok(status) => json(StatusCode::OK, &status),
        Err(problem) => problem.into_response(),
    };
    timer.finish(answer)
}

/// Has a scrub begin, and tells how it gets on: 202. Where one runs already, it is that one.
pub async fn begin_scrub(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::Native, &request);
    let (parts, body) = request.into_parts();
    let answer = async {
        body::read(&parts, body, NO_BODY, &app.limits, &app.bodies).await?;
        let request = Request::from_parts(parts, axum::body::Body::empty());
        query_node(&app, &request, |node| node.begin_scrub())
    };
    let answer = match answer.await {
        Ok(status) => {
            timer.log_change(&format_args!("scrub {} of this node", status.number));
            json(StatusCode::ACCEPTED, &status)
        }
        Err(problem) => problem.into_response(),
    };
    timer.finish(answer)
}

fn query_node(
    app: &App,
    request: &Request,
    ask: impl FnOnce(&dyn PeerService) -> Result<ScrubStatus, Failure>,
) -> Result<ScrubStatus, Problem> {
    Query::parse(request.uri().query(), &["timeout"], &app.limits)?;
    let node = app.peers.as_deref().ok_or_else(|| {
        let detail = "a gateway has nothing on a disk: ask a node";
        Problem::new(Code::UnknownRoute, detail)
    })?;
    Ok(ask(node)?)
}
