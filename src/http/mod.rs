//! The serving side: the route table, and what every dialect shares.
//!
//! [`router`] makes an `axum::Router` of an [`App`]; [`server::Server`] serves it. A request goes:
//! `server` (connection, head) → the route table here → a dialect (`native`) → [`Store`] → an
//! answer, or [`problem`], the one map from an error to a response. Node-to-node routes are in
//! [`peer`]. axum is named here alone.
//!
//! Keys stand in paths as any bytes. axum decodes path parameters lossily, so a key route is told
//! by its prefix in the fallback, and its key taken from the raw path. That is the hot path too: it
//! goes through no middleware and no parameter extraction.

mod answer_budget;
mod blocking;
pub mod body;
mod change_waiters;
#[cfg(test)]
mod crowd_tests;
mod dialects;
pub mod health;
pub mod limits;
pub mod media;
pub mod metrics;
mod native;
pub mod peer;
pub mod problem;
mod process_metrics;
pub mod server;
#[cfg(test)]
mod smuggling_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use http::Method;
use tokio_util::sync::CancellationToken;

pub use health::{NotReady, Readiness};
pub use limits::Limits;
pub use metrics::{Exposition, MetricSource, Metrics};
pub use peer::PeerService;
pub use server::{BindError, Server};

use crate::budget::Budget;
use crate::client::store::Store;
use metrics::Dialect;
use problem::{Code, Problem};
use server::ClientInfo;

/// What the routes work on.
pub struct App {
    pub store: Arc<dyn Store>,
    pub readiness: Arc<dyn Readiness>,
    pub metrics: Arc<Metrics>,
    /// None: this is a gateway, which nobody takes for a peer.
    pub peers: Option<Arc<dyn PeerService>>,
    pub limits: Limits,
    bodies: Arc<Budget>,
    answers: Arc<Budget>,
    quorum_timeouts: dialects::QuorumTimeouts,
    changes: change_waiters::ChangeWaiters,
    /// Cancelled when the lanes of peers have to end.
    lanes_end: CancellationToken,
}

type SharedApp = Arc<App>;

impl App {
    pub fn new(
        store: Arc<dyn Store>,
        readiness: Arc<dyn Readiness>,
        metrics: Arc<Metrics>,
        peers: Option<Arc<dyn PeerService>>,
        limits: Limits,
    ) -> Self {
        let changes = change_waiters::ChangeWaiters::new(limits.change_waiters_max);
        let bodies = Budget::new(limits.bodies_bytes_max);
        let answers = store.answers();
        Self {
            store,
            readiness,
            metrics,
            peers,
            limits,
            bodies,
            answers,
            quorum_timeouts: dialects::QuorumTimeouts::default(),
            changes,
            lanes_end: CancellationToken::new(),
        }
    }

    fn start_timer(&self, dialect: Dialect, request: &Request) -> metrics::RequestTimer<'_> {
        let client = request
            .extensions()
            .get::<ClientInfo>()
            .map(|client| client.address);
        let timer = self
            .metrics
            .start_timer(dialect, request.method(), self.limits.slow_request);
        timer.charge_to(&self.answers).from_client(client)
    }
}

/// The route table.
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
    if let Some(peers) = &app.peers {
        router = router.merge(peer::routes(Arc::clone(peers)));
    }
    router = router.merge(dialects::routes());
    router
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(dispatch_by_prefix)
        .with_state(Arc::new(app))
}

/// Routes whose rest is a key, and everything unknown.
async fn dispatch_by_prefix(State(app): State<SharedApp>, request: Request) -> Response {
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

/// The router itself adds `Allow`.
async fn method_not_allowed(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::Other, &request);
    let (parts, body) = request.into_parts();
    body::discard(&parts, body);
    timer.finish(refuse_method(&parts.method))
}

fn refuse_method(method: &Method) -> Response {
    let detail = format!(
        "{} is not a method of this path",
        shortened(method.as_str())
    );
    Problem::new(Code::MethodNotAllowed, detail).into_response()
}

/// What a client sent, for an answer: long enough to be recognized.
fn shortened(text: &str) -> &str {
    text.char_indices()
        .nth(200)
        .map_or(text, |(end, _)| &text[..end])
}
