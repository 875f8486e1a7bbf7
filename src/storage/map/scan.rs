//! Building a snapshot file: a scan of the standing tree, with the writer locked.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::record::RESERVED;
use super::replica::{ReplicaMap, ReplicaMapInner, TreeWriter};
use crate::mutants::{self, Mutant};
use crate::sm::ports::StoreError;
use crate::storage::snapshot::Snapshot;
use crate::storage::snapshot::format::{SnapshotHead, SnapshotWriter};
use crate::storage::tree::Walk;

/// Scans given up because tables piled up meanwhile. After that many the scan goes through and the
/// writers wait, so that a map that takes longer to scan than its tables take to fill gets a
/// snapshot at all.
const SCANS_GIVEN_UP_MAX: u32 = 2;

/// Pairs between two looks at whether to give up.
const PAIRS_BETWEEN_LOOKS: u64 = 256;

enum Scan {
    Done(SnapshotWriter),
    /// The tables crowd, or another waits for the writer.
    GivenUp {
        crowded: bool,
    },
}

/// A snapshot of all that is applied and durable in the log.
pub(super) enum Scanned {
    /// The one that the replica has is as new.
    Current(Snapshot),
    /// In a file of its own, not yet the replica's.
    New(Snapshot),
}

impl ReplicaMap {
    /// Writes a snapshot file of what is applied and durable in the log (await
    /// [`ReplicaMap::settle`] first for all of it), durable when it returns; older files are
    /// removed. The current one is returned if it is as new. Blocking: call it in a worker.
    pub fn build_snapshot(&self) -> Result<Snapshot, StoreError> {
        build_snapshot(&self.replica)
    }
}

/// See [`super::ReplicaMap::build_snapshot`].
fn build_snapshot(replica: &Arc<ReplicaMapInner>) -> Result<Snapshot, StoreError> {
    match scan(replica, SnapshotTrust::Current)? {
        Scanned::Current(snapshot) => Ok(snapshot),
        Scanned::New(snapshot) => publish(replica, snapshot),
    }
}

/// As [`build_snapshot`], also where the current one is as new: it takes the place of that one's
/// file in one step.
pub(super) fn rewrite_snapshot(replica: &Arc<ReplicaMapInner>) -> Result<Snapshot, StoreError> {
    match scan(replica, SnapshotTrust::Nothing)? {
        Scanned::Current(snapshot) => Ok(snapshot),
        Scanned::New(snapshot) => publish(replica, snapshot),
    }
}

/// Tells whether the current snapshot may be reused where it is as new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SnapshotTrust {
    Current,
    Nothing,
}

/// Copies the map to a file.
pub(super) fn scan(
    replica: &Arc<ReplicaMapInner>,
    trust: SnapshotTrust,
) -> Result<Scanned, StoreError> {
    let mut crowded_scans = 0;
    loop {
        // While the writer is locked the tree stands still, so the scan shows one moment.
        let mut writer = replica.lock_writer_last();
        if !mutants::is_on(Mutant::SnapshotWithoutLastBatch) {
            replica.freeze_rest();
            replica.checkpoint_ready(&mut writer)?;
        }
        replica.check()?;
        let is_as_new = |current: &&Snapshot| *current.applied() == writer.record.applied;
        if trust == SnapshotTrust::Current
            && let Some(current) = replica.lock_current_snapshot().as_ref().filter(is_as_new)
        {
            return Ok(Scanned::Current(current.clone()));
        }

        // Written under a temporary name: a file that was cut short must never be found.
        let head = SnapshotHead {
            key: replica.key,
            applied: match mutants::is_on(Mutant::SnapshotWithoutLastBatch) {
                true => replica.read_memtables().applied.clone(),
                false => writer.record.applied.clone(),
            },
        };
        let files = &replica.shared.files;
        let (path, file) = files.create_temporary(replica.key)?;
        let scanned = scan_tree(
            replica,
            &writer,
            SnapshotWriter::begin(file, &head),
            crowded_scans < SCANS_GIVEN_UP_MAX,
        );
        drop(writer);
        let written = match scanned {
            Ok(Scan::Done(writer)) => writer.finish(),
            Ok(Scan::GivenUp { crowded }) => {
                files.discard(&path);
                crowded_scans += u32::from(crowded);
                replica
                    .shared
                    .counters
                    .scans_given_up
                    .fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Err(error) => Err(error),
        };
        let (file, trailer) = written.inspect_err(|_| files.discard(&path))?;
        return Ok(Scanned::New(Snapshot::unpublished(
            files, file, head, trailer, path,
        )));
    }
}

/// Copies the tree's pairs, and holds them against the tree's own digest: a snapshot must not make
/// durable what rotted in the tree.
fn scan_tree(
    replica: &ReplicaMapInner,
    tree_writer: &TreeWriter,
    writer: Result<SnapshotWriter, StoreError>,
    may_give_up: bool,
) -> Result<Scan, StoreError> {
    let mut writer = writer?;
    let tree = replica.read_memtables().tree.clone();
    let (mut failed, mut given_up, mut pairs) = (None, None, 0u64);
    tree.walk(&mut |key, value| {
        if key.first().is_none_or(|byte| *byte == RESERVED) {
            return Walk::On;
        }

        // Looked at rarely: both looks take a lock.
        pairs += 1;
        if pairs.is_multiple_of(PAIRS_BETWEEN_LOOKS) {
            let crowded = may_give_up && replica.is_crowded();
            if crowded || replica.is_writer_wanted() {
                given_up = Some(Scan::GivenUp { crowded });
                return Walk::Stop;
            }
        }
        match writer.add(key, value) {
            Ok(()) => Walk::On,
            Err(error) => {
                failed = Some(error);
                Walk::Stop
            }
        }
    })?;
    match (failed, given_up) {
        (Some(error), _) => Err(error),
        (None, Some(given_up)) => Ok(given_up),
        (None, None) if writer.digest() != tree_writer.record.digest => {
            let error = StoreError::Damaged(format!(
                "the tree of {} no longer matches its digest",
                replica.key
            ));
            replica.fail(&error.to_string());
            Err(error)
        }
        (None, None) => Ok(Scan::Done(writer)),
    }
}

/// Makes it the current snapshot, unless a newer one was installed meanwhile.
pub(super) fn publish(
    replica: &ReplicaMapInner,
    snapshot: Snapshot,
) -> Result<Snapshot, StoreError> {
    let mut current_snapshot = replica.lock_current_snapshot();

    // Wiping takes this lock too, so no file appears of a replica that is gone.
    replica.check()?;
    if let Some(newer) = current_snapshot
        .as_ref()
        .filter(|current| current.applied().log_id > snapshot.applied().log_id)
    {
        return Ok(newer.clone());
    }
    snapshot.publish(replica.key)?;
    *current_snapshot = Some(snapshot.clone());
    let kept = snapshot.path();
    let kept = (!mutants::is_on(Mutant::BothSnapshotsDeleted)).then_some(&*kept);
    replica.shared.files.remove_others(replica.key, kept)?;
    replica
        .shared
        .counters
        .snapshots_built
        .fetch_add(1, Ordering::Relaxed);
    Ok(snapshot)
}
