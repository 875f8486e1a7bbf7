//! `/healthz`, `/readyz`, `/metrics`, and the page at `/`.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};

use super::app::SharedApp;
use super::problem::Problem;
use super::readiness::NotReady;
use crate::metrics::CONTENT_TYPE;

/// Answers 200 as long as the process answers at all.
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

pub(super) async fn readyz(State(app): State<SharedApp>) -> Response {
    match app.readiness.ready() {
        Ok(()) => match app.readiness.note() {
            None => "ready\n".into_response(),
            Some(note) => format!("ready, but {note}\n").into_response(),
        },
        Err(NotReady { code, reason }) => {
            Problem::with_code(code, StatusCode::SERVICE_UNAVAILABLE, "Not ready", reason)
                .retry_after_ms(1000)
                .into_response()
        }
    }
}

pub(super) async fn metrics(State(app): State<SharedApp>) -> Response {
    let content_type = [(header::CONTENT_TYPE, CONTENT_TYPE)];
    (content_type, app.metrics.page()).into_response()
}

/// The page that a browser is shown.
pub(super) const FRONT_PAGE: &str = concat!(
    "Quorate ",
    env!("CARGO_PKG_VERSION"),
    ", a sharded, linearizable key-value store\n\n",
    "GET PUT DELETE /v1/kv/<key>             a value, as raw bytes; ETag, If-Match, If-None-Match, \
    Idempotency-Key\n",
    "GET  /v1/kv?prefix=&start=&end=&limit=  pages of keys and values, in key order\n",
    "POST /v1/batch                          several operations, atomic per shard\n",
    "GET  /v1/cluster                        the view, its shards and how they are\n",
    "GET PUT /v1/cluster/view                what was asked of the view; ask for another: \
    ?dry_run=true, ?wait=60s\n",
    "GET  /v1/cluster/operations/<id>        how a change of the view gets on\n",
    "POST /v1/cluster/shards/<id>/leader     hand a shard's leadership over\n",
    "GET POST /v1/node/scrub                 how this node's scrub gets on; begin one\n",
    "GET  /healthz /readyz /metrics\n\n",
    "As other stores' clients speak:\n\n",
    "PUT  /set, POST /fetch, GET /fetch, POST /query   lists of encoded keys and values\n",
    "POST /set, POST /get                              lists of plain ones\n",
    "POST /set/<key>, GET /get/<key>                   a JSON value\n",
    "GET PUT DELETE /kvs/keys/<key>                    a JSON value; /kvs/key-count, /kvs/shards, \
    /kvs/view-change\n\n",
    "A request for a key that another node leads is answered 307: use curl -L, or ?proxy=true.\n",
);
