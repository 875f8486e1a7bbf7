//! Keeps the lanes of peers open while a stopping server has requests to answer.
//!
//! A request under way may need what only a lane brings: which node leads now, or that the entry of
//! a write is committed. So lanes end last: when the server takes no more connections and none is
//! left that carries requests.

use parking_lot::Mutex;
use std::sync::Arc;

use tokio_util::sync::{CancellationToken, DropGuard};

/// Ends the lanes when its last clone is dropped. The listeners have one each, and so has every
/// connection until it turns out to carry lanes.
#[derive(Debug, Clone)]
pub struct DrainGuard {
    _guard: Arc<DropGuard>,
}

impl DrainGuard {
    /// Returns one, and what is cancelled when the last of its clones is gone.
    pub fn new() -> (Self, CancellationToken) {
        let drained = CancellationToken::new();
        (
            Self {
                _guard: Arc::new(drained.clone().drop_guard()),
            },
            drained,
        )
    }
}

/// The attendance of one connection.
#[derive(Debug)]
pub struct ConnectionDrainGuard(Mutex<Option<DrainGuard>>);

impl ConnectionDrainGuard {
    /// Returns that of a connection that has asked for nothing yet.
    pub fn new(attendance: DrainGuard) -> Self {
        Self(Mutex::new(Some(attendance)))
    }

    /// Notes that the connection carries lanes: they do not wait for it.
    pub fn release_for_lanes(&self) {
        self.0.lock().take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_end_when_all_else_is_over() {
        let (listener, drained) = DrainGuard::new();
        let (client, peer) = (
            ConnectionDrainGuard::new(listener.clone()),
            ConnectionDrainGuard::new(listener.clone()),
        );
        peer.release_for_lanes();
        drop(listener);
        assert!(!drained.is_cancelled(), "a client is still there");
        drop(client);
        assert!(drained.is_cancelled());
    }
}
