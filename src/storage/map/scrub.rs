//! Reading the snapshot file of a map again, to find what has rotted while it can still be had from
//! elsewhere.
//!
//! What the system holds of a file in memory is dropped first: what is on the disk is to be seen.

use super::ReplicaMap;
use super::scan;
use crate::sm::ports::StoreError;
use crate::storage::snapshot::Snapshot;
use crate::storage::{Checked, ReadPace};

impl ReplicaMap {
    /// Reads the current snapshot file as one that arrives is read: every byte of it. Blocking.
    pub fn check_snapshot(&self, pace: &mut ReadPace<'_>) -> Checked {
        let Some(current) = self.current_snapshot() else {
            return Checked::Unread;
        };
        let path = current.path();
        let mut is_broken_off = false;
        let mut visit = |key: &[u8], value: &[u8]| {
            // A replica that has stopped is opened again once nobody holds it any more.
            let is_wanted = self.replica.check().is_ok();
            if pace((key.len() + value.len()) as u64) && is_wanted {
                return Ok(());
            }
            is_broken_off = true;
            Err(StoreError::Damaged("it was not read to its end".into()))
        };
        // Opened again: the file that a start would find.
        let read = Snapshot::open(&self.replica.shared.files, &path).and_then(|again| {
            if again.trailer() != current.trailer() || again.applied() != current.applied() {
                return Err(StoreError::Damaged(format!(
                    "snapshot {}: it is another file",
                    path.display()
                )));
            }
            again.forget_cached();
            again.for_each(&mut visit)
        });
        let is_current = || self.current_snapshot().is_some_and(|now| now.is(&current));
        match read {
            Ok(()) => Checked::Whole,
            Err(_) if is_broken_off || !is_current() => Checked::Unread,
            // Not of the file: the process may have no descriptor for it.
            Err(StoreError::Io { source, .. }) if source.kind() != std::io::ErrorKind::NotFound => {
                Checked::Unread
            }
            Err(error) => Checked::Damaged(format!("replica {}: {error}", self.key())),
        }
    }

    /// Writes a snapshot file of what is applied and durable, also where the current one is as new,
    /// whose place it takes. Blocking.
    ///
    /// # Errors
    ///
    /// The current one stays.
    pub fn rewrite_snapshot(&self) -> Result<(), StoreError> {
        scan::rewrite_snapshot(&self.replica).map(|_| ())
    }
}
