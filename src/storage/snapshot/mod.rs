//! Snapshot files: a replica's map at one applied log id, the durable half of what a tree can be
//! rebuilt from.
//!
//! - `format`: the bytes, written and read as a stream, every one of them under a checksum;
//! - `files`: the directory of them: names, publishing by rename, leftovers;
//! - [`Snapshot`]: one that is open, for installing and for sending; [`SnapshotReceiver`]: one that
//!   is arriving.
//!
//! A published file is never changed. The file that it replaces is removed only after the new name
//! is durable.

pub mod files;
pub mod format;

use parking_lot::Mutex;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::files::SnapshotFiles;
use self::format::{SnapshotHead, Trailer, UNSYNCED_BYTES_MAX, Visit};
use crate::sm::ports::StoreError;
use crate::storage::ReplicaKey;
use crate::storage::disk::{DiskFile, io_error};
use crate::storage::map::Applied;

/// An open snapshot file. Cheap to clone; stays readable when a newer one replaces it.
///
/// One that was received and never installed removes its file when the last clone goes.
#[derive(Clone)]
pub struct Snapshot {
    inner: Arc<SnapshotInner>,
}

struct SnapshotInner {
    file: Box<dyn DiskFile>,
    head: SnapshotHead,
    trailer: Trailer,
    files: SnapshotFiles,
    /// Changes once, when a received file is published.
    place: Mutex<SnapshotPlace>,
}

struct SnapshotPlace {
    path: PathBuf,
    published: bool,
}

impl Snapshot {
    /// Opens a published file, checking its head and trailer but not what is between.
    pub(crate) fn open(files: &SnapshotFiles, path: &Path) -> Result<Self, StoreError> {
        let file = files.open_file(path)?;
        let (head, trailer) = format::inspect(&*file).map_err(|error| named(path, error))?;
        Ok(Self::new(
            files,
            file,
            head,
            trailer,
            SnapshotPlace {
                path: path.to_owned(),
                published: true,
            },
        ))
    }

    /// A file that was just written or received, still under its temporary name.
    pub(crate) fn unpublished(
        files: &SnapshotFiles,
        file: Box<dyn DiskFile>,
        head: SnapshotHead,
        trailer: Trailer,
        path: PathBuf,
    ) -> Self {
        Self::new(
            files,
            file,
            head,
            trailer,
            SnapshotPlace {
                path,
                published: false,
            },
        )
    }

    fn new(
        files: &SnapshotFiles,
        file: Box<dyn DiskFile>,
        head: SnapshotHead,
        trailer: Trailer,
        place: SnapshotPlace,
    ) -> Self {
        Self {
            inner: Arc::new(SnapshotInner {
                file,
                head,
                trailer,
                files: files.clone(),
                place: Mutex::new(place),
            }),
        }
    }

    /// Returns whether both are the same open file.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub fn applied(&self) -> &Applied {
        &self.inner.head.applied
    }

    /// The replica that wrote it: of the same group, but not necessarily of this node.
    pub fn written_by(&self) -> ReplicaKey {
        self.inner.head.key
    }

    pub fn trailer(&self) -> &Trailer {
        &self.inner.trailer
    }

    /// Length of the file.
    pub fn bytes_len(&self) -> u64 {
        self.inner.trailer.file_bytes
    }

    pub fn path(&self) -> PathBuf {
        self.inner.place.lock().path.clone()
    }

    /// Reads the file's own bytes, for sending. Fewer than asked for only at the end.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, StoreError> {
        let read = self.inner.file.read_at(buffer, offset);
        read.map_err(|source| StoreError::Io {
            context: format!("reading snapshot {}", self.path().display()),
            source,
        })
    }

    /// Has the next reads of it come from the disk, as far as the system allows.
    pub fn forget_cached(&self) {
        self.inner.file.forget_cached();
    }

    /// Visits every pair, each checked before it is shown; an error at the end takes back the
    /// belief in all of them.
    pub fn for_each(&self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        let result = format::read_pairs(&*self.inner.file, &self.inner.trailer, visit);
        result.map_err(|error| named(&self.path(), error))
    }

    /// Makes it the replica's snapshot file under its final name, durably. Does nothing if it is.
    pub(crate) fn publish(&self, key: ReplicaKey) -> Result<(), StoreError> {
        let mut place = self.inner.place.lock();
        if !place.published {
            place.path = self.inner.files.publish(&place.path, key, self.applied())?;
            place.published = true;
        }
        Ok(())
    }
}

impl Drop for SnapshotInner {
    fn drop(&mut self) {
        let place = self.place.get_mut();
        if !place.published {
            self.files.discard(&place.path);
        }
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("path", &self.path())
            .field("applied", self.applied())
            .finish_non_exhaustive()
    }
}

fn named(path: &Path, error: StoreError) -> StoreError {
    match error {
        StoreError::Damaged(reason) => {
            StoreError::Damaged(format!("snapshot {}: {reason}", path.display()))
        }
        other => other,
    }
}

/// A snapshot file that is arriving from another replica, in order. Dropped before
/// [`SnapshotReceiver::finish`], it leaves nothing.
pub struct SnapshotReceiver {
    files: SnapshotFiles,
    key: ReplicaKey,
    path: PathBuf,
    file: Option<Box<dyn DiskFile>>,
    bytes_len: u64,
    unsynced: usize,
}

impl SnapshotReceiver {
    pub(crate) fn begin(files: &SnapshotFiles, key: ReplicaKey) -> Result<Self, StoreError> {
        let (path, file) = files.create_temporary(key)?;
        Ok(Self {
            files: files.clone(),
            key,
            path,
            file: Some(file),
            bytes_len: 0,
            unsynced: 0,
        })
    }

    /// Returns the number of bytes that have arrived: a broken transfer goes on there.
    pub fn bytes_len(&self) -> u64 {
        self.bytes_len
    }

    /// Takes the next bytes. What arrives twice is passed over; a gap is an error. Blocking: now
    /// and then it syncs.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let known = self.bytes_len.checked_sub(offset).ok_or_else(|| {
            let reason = format!(
                "a snapshot chunk at {offset} was sent where {} was due",
                self.bytes_len
            );
            StoreError::Undecodable {
                what: "snapshot transfer",
                reason,
            }
        })?;
        let known = usize::try_from(known)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let new = &bytes[known..];
        if let Some(file) = &self.file
            && !new.is_empty()
        {
            file.write_at(new, self.bytes_len)
                .map_err(|source| io_error("writing", &self.path, source))?;
            self.bytes_len += new.len() as u64;
            self.unsynced += new.len();

            // In parts: one sync of a large file would hold up the syncs of the log.
            if self.unsynced >= UNSYNCED_BYTES_MAX {
                self.unsynced = 0;
                file.sync()
                    .map_err(|source| io_error("syncing", &self.path, source))?;
            }
        }
        Ok(())
    }

    /// Makes it durable and verifies every byte. It is not yet the replica's snapshot: installing
    /// makes it so. Blocking.
    pub fn finish(mut self) -> Result<Snapshot, StoreError> {
        let file = self
            .file
            .take()
            .expect("only finishing takes it, and consumes the receiver");
        // From here on its guardian is the snapshot, or the check below.
        let path = std::mem::take(&mut self.path);

        // All of it is read before a map is given up for it.
        let checked = file
            .sync()
            .map_err(|source| io_error("syncing", &path, source))
            .and_then(|()| {
                let (head, trailer) = format::inspect(&*file)?;
                if head.key.group != self.key.group {
                    return Err(StoreError::Damaged(format!(
                        "it is of {}, not of {}",
                        head.key.group, self.key.group
                    )));
                }
                format::read_pairs(&*file, &trailer, &mut |_, _| Ok(()))?;
                Ok((head, trailer))
            });
        match checked {
            Ok((head, trailer)) => Ok(Snapshot::unpublished(
                &self.files,
                file,
                head,
                trailer,
                path,
            )),
            Err(error) => {
                self.files.discard(&path);
                Err(named(&path, error))
            }
        }
    }
}

impl Drop for SnapshotReceiver {
    fn drop(&mut self) {
        if self.file.is_some() {
            self.files.discard(&self.path);
        }
    }
}
