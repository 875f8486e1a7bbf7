//! The fixed dialects: the HTTP of other stores, spoken over this one, so that their clients and
//! scripts go on working.
//!
//! - [`encoded_batch`] is A, "encoded batch": `PUT /set`, `POST /fetch`, `GET /fetch`,
//!   `POST /query`.
//! - [`load_balancer`] is B, "load balancer": `POST /set/<key>`, `GET /get/<key>`, `GET /` as text.
//! - [`kvs`] is C, "kvs", C4, "kvs replicated", and D, "kvs by proxy": `/kvs/...`,
//!   `PUT /proxy/view-change`.
//! - [`plain_batch`] is E, "plain batch": `POST /set`, `POST /get`.
//!
//! A value written through one dialect is read through every other: a stored value is bytes and a
//! media type, and [`value::DisplayValue`] is what the dialects make of it. They all proxy: the
//! node asked fetches the answer. An answer that nobody can give comes within five seconds, as 503
//! in the dialect's own form; a write may still have happened, which these dialects have no
//! word for.
//!
//! Kept here is what they share. Paths that end in a key are told by their prefix ([`key_route`]),
//! for the reason given in `http`.

mod batch_write;
mod bit_strings;
mod chunked_answer;
mod encoded_batch;
mod error;
mod json_list;
mod kvs;
mod load_balancer;
mod plain_batch;
mod python;
mod quorum_timeouts;
mod request;
mod response;
mod set;
mod value;

use axum::Router;
use axum::extract::Request;
use axum::response::Response;
use axum::routing::{get, put};

pub(super) use self::error::no_room;
pub(super) use self::quorum_timeouts::QuorumTimeouts;
use super::app::{App, SharedApp};

/// Dialects with a key at the end of the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyRoute {
    LoadBalancer,
    Kvs,
}

/// Returns the dialects' routes without a key in the path.
pub(super) fn routes() -> Router<SharedApp> {
    Router::new()
        .route("/", get(load_balancer::front_page))
        .route("/set", put(set::set).post(set::set))
        .route(
            "/fetch",
            get(encoded_batch::everything)
                .put(encoded_batch::fetch)
                .post(encoded_batch::fetch),
        )
        .route(
            "/query",
            put(encoded_batch::query).post(encoded_batch::query),
        )
        .route("/get", put(plain_batch::get).post(plain_batch::get))
}

/// Returns the dialect whose key route this path is.
pub(super) fn key_route(path: &str) -> Option<KeyRoute> {
    if kvs::owns(path) {
        return Some(KeyRoute::Kvs);
    }
    load_balancer::owns(path).then_some(KeyRoute::LoadBalancer)
}

pub(super) async fn by_key(route: KeyRoute, app: &App, request: Request) -> Response {
    match route {
        KeyRoute::LoadBalancer => load_balancer::by_key(app, request).await,
        KeyRoute::Kvs => kvs::serve(app, request).await,
    }
}
