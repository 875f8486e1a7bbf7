//! The route table.
//!
//! Keys stand in paths as any bytes. axum decodes path parameters lossily, so a key route is found
//! by its prefix in the fallback, and its key taken from the raw path. That is the hot path too: it
//! goes through no middleware and no parameter extraction.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use super::app::{App, SharedApp};
use super::dialect::Dialect;
use super::problem::{Code, Problem, shortened};
use super::{body, dialects, health, native, peer};

/// Returns the route table over an app.
pub fn router(app: App) -> Router {
    let mut router = Router::new()
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(health::metrics))
        .route("/v1/kv", get(native::list))
        .route("/v1/batch", post(native::batch))
        .route("/v1/cluster", get(native::cluster))
        .route("/v1/cluster/view", get(native::view).put(native::change))
        .route("/v1/cluster/operations/{id}", get(native::operation))
        .route(
            "/v1/cluster/shards/{id}/leader",
            post(native::transfer_leader),
        )
        .route(
            "/v1/node/scrub",
            get(native::scrub_status).post(native::begin_scrub),
        );
    // A gateway has no replicas, so there is nothing that a node could ask of it.
    if let Some(peers) = &app.peers {
        router = router.merge(peer::routes(Arc::clone(peers)));
    }
    router = router.merge(dialects::routes());
    router
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(dispatch_by_prefix)
        .with_state(Arc::new(app))
}

/// Handles routes whose rest is a key, and everything unknown.
async fn dispatch_by_prefix(State(app): State<SharedApp>, request: Request) -> Response {
    // The native dialect first: it is the hot path.
    if request.uri().path().starts_with(native::KEY_PREFIX) {
        return native::kv(&app, request).await;
    }
    if let Some(route) = dialects::key_route(request.uri().path()) {
        return dialects::by_key(route, &app, request).await;
    }
    let timer = app.start_timer(Dialect::Other, &request);
    let (parts, body) = request.into_parts();
    body::discard(&parts, body);
    let detail = format!("there is nothing at {}", shortened(parts.uri.path()));
    timer.finish(Problem::new(Code::UnknownRoute, detail).into_response())
}

/// Answers 405. The router itself adds `Allow`.
async fn method_not_allowed(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::Other, &request);
    let (parts, body) = request.into_parts();
    body::discard(&parts, body);
    timer.finish(Problem::method_not_allowed(&parts.method).into_response())
}
