//! [`App`], the state that all routes work on.

use std::sync::Arc;

use axum::extract::Request;
use tokio_util::sync::CancellationToken;

use super::change_waiters::ChangeWaiters;
use super::dialect::Dialect;
use super::dialects::QuorumTimeouts;
use super::limits::Limits;
use super::metrics::{Metrics, RequestTimer};
use super::peer::PeerService;
use super::readiness::Readiness;
use super::server::ClientInfo;
use crate::api::store::Store;
use crate::budget::Budget;

/// The state that all routes work on.
pub struct App {
    pub store: Arc<dyn Store>,
    pub readiness: Arc<dyn Readiness>,
    pub metrics: Arc<Metrics>,
    /// None: this is a gateway, which nobody takes for a peer.
    pub peers: Option<Arc<dyn PeerService>>,
    pub limits: Limits,
    pub(super) bodies: Arc<Budget>,
    pub(super) answers: Arc<Budget>,
    pub(super) quorum_timeouts: QuorumTimeouts,
    pub(super) changes: ChangeWaiters,
    /// Cancelled when the lanes of peers have to end.
    pub(super) lanes_end: CancellationToken,
}

pub(super) type SharedApp = Arc<App>;

impl App {
    pub fn new(
        store: Arc<dyn Store>,
        readiness: Arc<dyn Readiness>,
        metrics: Arc<Metrics>,
        peers: Option<Arc<dyn PeerService>>,
        limits: Limits,
    ) -> Self {
        let changes = ChangeWaiters::new(limits.change_waiters_max);
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
        timer.charge_to(&self.answers).from_client(client)
    }
}
