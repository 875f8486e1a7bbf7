//! [`recover_log`]: checks that the log of a replica and what it has applied belong together,
//! before the replica opens.
//!
//! A map is written to disk only when the log is durable through what it holds. So a log that ends
//! below the map was replaced by another, or has lost its end: the replica has forgotten what it
//! promised, and takes no part.
//!
//! There is one exception. A snapshot of another replica becomes durable before the log that it
//! replaces is purged. A process that dies in between leaves a log that ends too early, or holds
//! entries that the group never committed. That log is purged here, before openraft reads it:
//! openraft compares by term first, would take the log for newer than the snapshot, and stop.

use tokio::sync::oneshot;

use super::errors::OpenError;
use super::replica_store::ReplicaStore;
use crate::storage::ReplicaKey;
use crate::storage::log::{LogState, ReplicaLog};
use crate::types::LogId;

/// Purges the log through an installed snapshot, if a crash kept that from being done. Durable when
/// it returns.
///
/// # Errors
///
/// If the log was purged past what is applied, or is not the one that was applied.
pub async fn recover_log(
    key: ReplicaKey,
    log: &ReplicaLog,
    store: &ReplicaStore,
) -> Result<(), OpenError> {
    let LogState { purged, last, .. } = log.state();
    let applied = store.applied().log_id;

    // The log begins behind what is applied: entries are missing in between, and nobody here has
    // them.
    if let Some(purged) =
        purged.filter(|purged| applied.is_none_or(|applied| applied.index < purged.index))
    {
        let damaged = store
            .map()
            .and_then(|state| state.opened().damaged_snapshot.clone());
        let reason = damaged.unwrap_or_else(|| "its snapshot file is missing".to_owned());
        return Err(OpenError::Lost {
            key,
            purged,
            reason,
        });
    }

    let Some(applied) = applied else {
        return Ok(());
    };

    // The ordinary case: the log holds the entry that was applied last.
    let found = log.entry_id(applied.index);
    if found == Some(applied) {
        return Ok(());
    }

    if !is_installed(store, applied) {
        let log = match (found, last) {
            (Some(found), _) => format!("has {found}"),
            (None, Some(last)) => format!("ends at {last}"),
            (None, None) => "ends at nothing".to_owned(),
        };
        return Err(OpenError::OtherLog { key, log, applied });
    }

    match store {
        ReplicaStore::Map(_) => {
            tracing::info!(
                replica = %key, %applied, ?last,
                "the log makes way for the snapshot that was installed before the last end"
            );
        }
        // The watermark of a witness does not tell which of the two cases this is.
        ReplicaStore::Witness(_) => tracing::warn!(
            replica = %key, %applied, ?last,
            "the log of a witness ends before its mark, and makes way for it: the process ended \
             while it took over the mark from its leader, or the log was replaced by an older copy \
             or has lost its end, and this witness has forgotten what it promised since"
        ),
    }

    // The log holds another entry at this index, which the group never committed: all of it goes.
    if found.is_some() {
        ended(|done| log.truncate_after(purged.map(|purged| purged.index), done)).await?;
    }
    ended(|done| log.purge(applied, done)).await
}

/// Returns true if the applied state came as a whole from another replica, and not entry by entry
/// from the log.
fn is_installed(store: &ReplicaStore, applied: LogId) -> bool {
    match store {
        ReplicaStore::Map(state) => state.current_snapshot().is_some_and(|snapshot| {
            snapshot.applied().log_id == Some(applied) && snapshot.written_by() != state.key()
        }),
        // A watermark does not tell where it came from.
        ReplicaStore::Witness(_) => true,
    }
}

async fn ended(issue: impl FnOnce(crate::storage::log::Done)) -> Result<(), OpenError> {
    let (done, ended) = oneshot::channel();
    issue(Box::new(move |result| drop(done.send(result))));
    let closed = || OpenError::Log(std::io::Error::other("it was closed"));
    ended.await.map_err(|_| closed())?.map_err(OpenError::Log)
}
