//! [`App`], the state that all routes work on.

use std::sync::Arc;

use axum::extract::Request;
use tokio_util::sync::CancellationToken;

use super::change_waiters::ChangeWaiters;
use super::dialect::Dialect;
use super::dialects::QuorumTimeouts;
use super::limits::Limits;
use super::metrics::{Metrics, RequestTimer, RoomMetrics};
use super::peer::PeerService;
use super::readiness::Readiness;
use super::server::ClientInfo;
use crate::api::store::Store;
use crate::budget::Budget;
use crate::metrics::Collector;

/// The state that all routes work on.
pub struct App {
    pub store: Arc<dyn Store>,
    pub readiness: Arc<dyn Readiness>,
    pub metrics: Metrics,
    /// None: this is a gateway, which nobody takes for a peer.
    pub peers: Option<Arc<dyn PeerService>>,
    pub limits: Limits,
    pub(super) bodies: Arc<Budget>,
    pub(super) answers: Arc<Budget>,
    pub(super) quorum_timeouts: QuorumTimeouts,
    pub(super) changes: Arc<ChangeWaiters>,
    /// Cancelled when the lanes of peers have to end.
    pub(super) lanes_end: CancellationToken,
}

pub(super) type SharedApp = Arc<App>;

impl App {
    /// Returns the app of a store. Its metrics are those of HTTP, and what `collectors` read.
    pub fn new(
        store: Arc<dyn Store>,
        readiness: Arc<dyn Readiness>,
        collectors: Vec<Box<dyn Collector>>,
        peers: Option<Arc<dyn PeerService>>,
        limits: Limits,
    ) -> Self {
        let changes = Arc::new(ChangeWaiters::new(limits.change_waiters_max));
        let bodies = Budget::new(limits.bodies_bytes_max);
        let answers = store.answers();
        let rooms = RoomMetrics {
            bodies: bodies.clone(),
            answers: answers.clone(),
            changes: changes.clone(),
        };
        let metrics = Metrics::new(rooms, collectors);
        Self {
            store,
            readiness,
            metrics,
            peers,
            limits,
            bodies,
            answers,
            quorum_timeouts: QuorumTimeouts::default(),
            changes,
            lanes_end: CancellationToken::new(),
        }
    }

    pub(super) fn start_timer(&self, dialect: Dialect, request: &Request) -> RequestTimer<'_> {
        let client = request
            .extensions()
            .get::<ClientInfo>()
            .map(|client| client.address);
        let timer = self
            .metrics
            .start_timer(dialect, request.method(), self.limits.slow_request);
        timer.charge_to(&self.answers).with_client(client)
    }
}
