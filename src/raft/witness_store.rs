//! [`WitnessStore`]: what a witness keeps instead of a map, namely how far it is, and the
//! membership then.
//!
//! In memory it follows the log. Its file, the watermark, is written only when the log is durable
//! up to there, and before the log is purged.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::sm::ports::StoreError;
use crate::storage::map::{Applied, Synced};
use crate::storage::witness::WitnessFiles;
use crate::storage::{Checked, ReplicaKey};

/// The state that a witness keeps instead of a map.
pub struct WitnessStore {
    key: ReplicaKey,
    files: WitnessFiles,
    synced: Arc<dyn Synced>,
    applied: Mutex<Applied>,
    /// The state that its file records.
    watermark: Mutex<Applied>,
    /// The index through which it need not keep the log.
    purge_index: AtomicU64,
}

impl WitnessStore {
    /// Returns the store of a witness whose file says `watermark`. `synced` is the log of the same
    /// replica.
    pub fn new(
        key: ReplicaKey,
        files: WitnessFiles,
        synced: Arc<dyn Synced>,
        watermark: Applied,
    ) -> Self {
        Self {
            key,
            files,
            synced,
            applied: Mutex::new(watermark.clone()),
            watermark: Mutex::new(watermark),
            purge_index: AtomicU64::new(0),
        }
    }

    pub fn key(&self) -> ReplicaKey {
        self.key
    }

    /// Returns how far its log is applied.
    pub fn applied(&self) -> Applied {
        self.applied.lock().clone()
    }

    /// Returns what its file says.
    pub fn watermark(&self) -> Applied {
        self.watermark.lock().clone()
    }

    /// Notes what is applied, in memory: the log makes it durable.
    pub fn apply(&self, applied: Applied) {
        assert!(
            self.applied().log_id <= applied.log_id,
            "what a witness has applied goes back"
        );
        *self.applied.lock() = applied;
    }

    /// Returns what is applied, once the log holds it durably.
    pub async fn settled(&self) -> Result<Applied, StoreError> {
        let applied = self.applied();
        let Some(log_id) = applied.log_id else {
            return Ok(applied);
        };
        let (done, synced) = oneshot::channel();
        self.synced
            .on_synced(log_id, Box::new(move |result| drop(done.send(result))));
        let failed = |source| StoreError::Io {
            context: "waiting for the log of a witness".into(),
            source,
        };
        synced
            .await
            .map_err(|_| failed(std::io::Error::other("it was closed")))?
            .map_err(failed)?;
        Ok(applied)
    }

    /// Writes `applied` to the file, unless that says something newer. The log must be synced
    /// through it, or begin after it. Blocking.
    pub fn write_watermark(&self, applied: &Applied) -> Result<(), StoreError> {
        let mut watermark = self.watermark.lock();
        if watermark.log_id < applied.log_id {
            self.files.write(self.key, applied)?;
            *watermark = applied.clone();
        }
        Ok(())
    }

    /// Reads the file again, and compares it with what it should say. Blocking.
    pub fn check_file(&self) -> Checked {
        let watermark = self.watermark.lock();
        match self.files.read(self.key) {
            Ok(Some(found)) if found == *watermark => Checked::Whole,
            Ok(found) => Checked::Damaged(format!(
                "the file of witness {} says {found:?}, not {:?}",
                self.key, *watermark
            )),
            // This says nothing about the file: the process may have run out of descriptors.
            Err(StoreError::Io { .. }) => Checked::Unread,
            Err(error) => Checked::Damaged(format!("witness {}: {error}", self.key)),
        }
    }

    /// Rewrites the file as it was. Blocking.
    pub fn rewrite_file(&self) -> Result<(), StoreError> {
        let watermark = self.watermark.lock();
        self.files.write(self.key, &watermark)
    }

    /// Takes over what a leader has sent in place of the log before it. Durable when it returns.
    /// Blocking.
    pub fn install(&self, applied: &Applied) -> Result<(), StoreError> {
        self.write_watermark(applied)?;
        self.apply(applied.clone());
        Ok(())
    }

    /// Notes that every replica with a map has the entries through `index` durably, and that they
    /// are committed.
    pub fn raise_purge_index(&self, index: u64) {
        self.purge_index.fetch_max(index, Ordering::Relaxed);
    }

    /// Returns the index through which it need not keep the log.
    pub fn purge_index(&self) -> u64 {
        self.purge_index.load(Ordering::Relaxed)
    }
}
