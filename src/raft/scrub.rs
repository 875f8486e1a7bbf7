//! How a replica repairs damage that was found in its files.

use super::replica::Replica;
use super::witness::WitnessReplica;
use crate::blocking;
use crate::sm::ports::StoreError;
use crate::storage::{Checked, background};

impl Replica {
    /// Rewrites the snapshot file, though it is of the same entry, because its bytes on the disk
    /// are damaged.
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
        let written =
            blocking::start(move || background::run("scrub", || state.rewrite_snapshot())).await;
        written
            .map_err(|error| failed(std::io::Error::other(error)))?
            .map_err(failed)??;
        // openraft takes the file that was just written.
        let _ = self.raft.trigger().snapshot().await;
        Ok(())
    }
}

impl WitnessReplica {
    /// Reads the file of the witness again, and compares it with what it should say. Blocking.
    pub fn check_file(&self) -> Checked {
        self.0
            .apply_state
            .store
            .witness()
            .map_or(Checked::Unread, |state| state.check_file())
    }

    /// Rewrites the file of the witness. Blocking.
    pub fn rewrite_file(&self) -> Result<(), StoreError> {
        self.0
            .apply_state
            .store
            .witness()
            .map_or(Ok(()), |state| state.rewrite_file())
    }
}
