//! What a group does about damage that was found in what it keeps on the disk.

use super::replica::Replica;
use super::witness::WitnessReplica;
use crate::sm::ports::StoreError;
use crate::storage::{Checked, background};

impl Replica {
    /// Writes the snapshot file anew, though it is of the same entry: what is on the disk has
    /// rotted.
    ///
    /// # Errors
    ///
    /// The file stays as it is.
    pub async fn rewrite_snapshot(&self) -> Result<(), StoreError> {
        let _turn = self.context.snapshot_turns.acquire().await;
        self.state().settle().await;
        let state = self.state().clone();
        let failed = |source| StoreError::Io {
            context: "writing a snapshot anew".into(),
            source,
        };
        let written = tokio::task::spawn_blocking(move || {
            background::run("scrub", || state.rewrite_snapshot())
        })
        .await;
        written
            .map_err(|error| failed(std::io::Error::other(error)))?
            .map_err(failed)??;
        // It takes the file that was just written.
        let _ = self.raft.trigger().snapshot().await;
        Ok(())
    }
}

impl WitnessReplica {
    /// Reads its file again. Blocking.
    pub fn check_file(&self) -> Checked {
        self.0
            .apply_state
            .store
            .witness()
            .map_or(Checked::Unread, |state| state.check_file())
    }

    /// Has its file say again what it says. Blocking.
    pub fn rewrite_file(&self) -> Result<(), StoreError> {
        self.0
            .apply_state
            .store
            .witness()
            .map_or(Ok(()), |state| state.rewrite_file())
    }
}
