//! [`ServerStats`], the counters that a server keeps of its connections.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::descriptors;
use crate::http::prometheus::{Exposition, MetricKind, MetricSource};

/// The counters of a server.
#[derive(Debug, Default)]
pub struct ServerStats {
    pub(super) clients: AtomicU64,
    pub(super) peers: AtomicU64,
    pub(super) overflow: AtomicU64,
    pub(super) accepted: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) stalled: AtomicU64,
    pub(super) accept_errors: AtomicU64,
    pub(super) clients_max: AtomicU64,
}

impl ServerStats {
    /// Counts an accept that failed.
    pub fn accept_failed(&self) {
        self.accept_errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection that was ended because its client did not take what it had asked for.
    pub fn stalled(&self) {
        self.stalled.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection past the limit that was refused.
    pub(super) fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives a place back that [`Self::take`] has taken.
    pub(super) fn give_back(counter: &AtomicU64) {
        let before = counter.fetch_sub(1, Ordering::Relaxed);
        assert_ne!(before, 0, "no place is given back that was not taken");
    }

    /// Takes a place of those that `counter` counts, of which there are `max`. False: there is
    /// none.
    pub(super) fn take(counter: &AtomicU64, max: u64) -> bool {
        // Compared and counted in one step: connections come on several threads, and must not
        // exceed `max`.
        let more = |count: u64| (count < max).then_some(count + 1);
        counter
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }
}

impl MetricSource for ServerStats {
    fn collect(&self, text: &mut Exposition) {
        let open = || {
            [&self.clients, &self.peers, &self.overflow].map(|count| count.load(Ordering::Relaxed))
        };
        text.family(
            "quorate_http_connections",
            MetricKind::Gauge,
            "Connections open.",
        );
        text.sample(&[], open().iter().sum::<u64>());
        text.family(
            "quorate_http_peer_connections",
            MetricKind::Gauge,
            "Of these, connections of other nodes and of gateways.",
        );
        text.sample(&[], self.peers.load(Ordering::Relaxed));

        let families = [
            (
                "quorate_http_connections_max",
                MetricKind::Gauge,
                "Connections that clients can have.",
                &self.clients_max,
            ),
            (
                "quorate_http_connections_accepted_total",
                MetricKind::Counter,
                "Connections served.",
                &self.accepted,
            ),
            (
                "quorate_http_connections_refused_total",
                MetricKind::Counter,
                "Connections past the limit.",
                &self.refused,
            ),
            (
                "quorate_http_connections_stalled_total",
                MetricKind::Counter,
                "Connections ended because their client did not take its answers.",
                &self.stalled,
            ),
            (
                "quorate_http_accept_errors_total",
                MetricKind::Counter,
                "Failed accepts.",
                &self.accept_errors,
            ),
        ];
        for (name, kind, help, value) in families {
            text.family(name, kind, help);
            text.sample(&[], value.load(Ordering::Relaxed));
        }

        text.family(
            "quorate_open_files_max",
            MetricKind::Gauge,
            "Descriptors that this process may have.",
        );
        text.sample(&[], descriptors::limit());
        if let Some(count) = descriptors::in_use() {
            text.family(
                "quorate_open_files",
                MetricKind::Gauge,
                "Descriptors that this process has.",
            );
            text.sample(&[], count);
        }
    }
}
