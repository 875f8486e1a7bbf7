//! [`ServerStats`], the counters that a server keeps of its connections.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::descriptors;
use crate::metrics::{Collector, DescriptorEncoder, EncodeFamilies};

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

impl Collector for ServerStats {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
        encoder.gauge(
            "quorate_http_connections",
            "Connections open.",
            now(&self.clients) + now(&self.peers) + now(&self.overflow),
        )?;
        encoder.gauge(
            "quorate_http_peer_connections",
            "Of these, connections of other nodes and of gateways.",
            now(&self.peers),
        )?;
        encoder.gauge(
            "quorate_http_connections_max",
            "Connections that clients can have.",
            now(&self.clients_max),
        )?;
        encoder.counter(
            "quorate_http_connections_accepted_total",
            "Connections served.",
            now(&self.accepted),
        )?;
        encoder.counter(
            "quorate_http_connections_refused_total",
            "Connections past the limit.",
            now(&self.refused),
        )?;
        encoder.counter(
            "quorate_http_connections_stalled_total",
            "Connections ended because their client did not take its answers.",
            now(&self.stalled),
        )?;
        encoder.counter(
            "quorate_http_accept_errors_total",
            "Failed accepts.",
            now(&self.accept_errors),
        )?;

        encoder.gauge(
            "quorate_open_files_max",
            "Descriptors that this process may have.",
            descriptors::limit(),
        )?;
        match descriptors::in_use() {
            Some(count) => encoder.gauge(
                "quorate_open_files",
                "Descriptors that this process has.",
                count,
            ),
            None => Ok(()),
        }
    }
}
