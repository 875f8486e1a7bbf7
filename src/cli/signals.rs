//! The signals that ask a process to stop.

use std::future::Future;
use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Resolves with the name of the first signal that asks this process to stop. A second one ends it
/// at once.
///
/// # Errors
///
/// Fails if signals can't be listened for.
pub fn stop() -> io::Result<impl Future<Output = &'static str>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, receiver) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        let _ = sender.send(name);
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("told twice: stopping at once; nothing that was acknowledged is lost");
        std::process::exit(130);
    });
    Ok(async { receiver.await.unwrap_or("the signal handler ended") })
}
