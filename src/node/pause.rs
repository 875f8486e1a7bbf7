//! [`waited`]: the pause between two rounds of a controller, which a shutdown ends.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::supervisor;

/// Waits for `pause`. Returns false if `shutdown` came first.
pub async fn waited(shutdown: &CancellationToken, pause: Duration) -> bool {
    supervisor::beat();
    tokio::select! {
        biased;
        () = shutdown.cancelled() => false,
        () = tokio::time::sleep(pause) => true,
    }
}
