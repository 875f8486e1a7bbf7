//! Segment files: their names, how one is prepared, begun, pre-written and used again.
//!
//! The invariants that replay builds on: a file has a segment's name only once its head is synced;
//! and every byte of a segment, and room for one more header behind its last record, is written and
//! synced before a record goes there. So syncing a batch changes no metadata of the file, which
//! makes it cheaper, and a file that ends within a record was cut by damage, never by a crash.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::HEADER_BYTES;
use super::with_context;
use crate::storage::disk::{Disk, DiskFile, Open};

const SUFFIX: &str = ".segment";
/// Suffix of files that are not yet, or no longer, segments. Removed on opening.
const SUFFIX_SPARE: &str = ".spare";
const NAME_NEXT: &str = "next.spare";
/// Pre-writing never stops the batches for longer than this takes.
const GROW_BYTES_MAX: u64 = 8 << 20;
const ZEROS_BYTES: u64 = 256 << 10;

/// The directory of the segments.
pub(super) struct SegmentFiles {
    pub disk: Arc<dyn Disk>,
    pub dir: PathBuf,
    pub grow_bytes: u64,
    pub segment_bytes: u64,
}

/// A file that can become the next segment.
pub(super) struct PreparedSegment {
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    allocated: u64,
}

/// The segment that is written.
pub(super) struct ActiveSegment {
    pub number: u64,
    pub file: Arc<dyn DiskFile>,
    pub path: PathBuf,
    pub offset: u64,
    /// Up to here the file is written and synced, with records or with anything else.
    pub allocated: u64,
    /// Offset at which its first batch begins.
    pub first_batch: u64,
}

/// Files found in the directory.
#[derive(Debug, Default)]
pub(super) struct SegmentListing {
    pub segments: Vec<u64>,
    pub spares: Vec<PathBuf>,
}

impl SegmentFiles {
    pub fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:020}{SUFFIX}"))
    }

    pub fn list(&self) -> io::Result<SegmentListing> {
        let mut listing = SegmentListing::default();
        for name in self.disk.list(&self.dir)? {
            if let Some(number) = name
                .strip_suffix(SUFFIX)
                .and_then(|number| number.parse().ok())
            {
                listing.segments.push(number);
            } else if name.ends_with(SUFFIX_SPARE) {
                listing.spares.push(self.dir.join(name));
            }
        }
        listing.segments.sort_unstable();
        Ok(listing)
    }

    /// A new file, pre-written.
    pub fn prepare(&self) -> io::Result<PreparedSegment> {
        let path = self.dir.join(NAME_NEXT);
        let file = self
            .disk
            .open(&path, Open::Truncated)
            .map_err(|error| with_context(error, format_args!("create {}", path.display())))?;
        let mut prepared = PreparedSegment {
            path,
            file: file.into(),
            allocated: 0,
        };

        // Not the whole segment at once: batches wait while it is written.
        let grow = self.grow_bytes.min(self.segment_bytes);
        prepared.allocated = pre_write(&*prepared.file, &prepared.path, 0, grow)?;
        Ok(prepared)
    }

    /// Gives the space back that preparing a file took before the disk was full.
    pub fn discard_next(&self) {
        let _ = self.disk.remove(&self.dir.join(NAME_NEXT));
    }

    /// Makes `prepared` the segment `number` that begins with `head`. Both are durable when this
    /// returns.
    pub fn begin(
        &self,
        prepared: PreparedSegment,
        number: u64,
        head: &[u8],
    ) -> io::Result<ActiveSegment> {
        let PreparedSegment {
            path,
            file,
            allocated,
        } = prepared;
        let target = self.path(number);
        let mut active = ActiveSegment {
            number,
            file,
            path,
            offset: 0,
            allocated,
            first_batch: head.len() as u64,
        };
        self.reserve(&mut active, head.len() as u64)?;
        let writing = |error| {
            with_context(
                error,
                format_args!("write the head of {}", target.display()),
            )
        };
        active
            .file
            .write_at(head, 0)
            .and_then(|()| active.file.sync())
            .map_err(writing)?;

        // The name comes last, so that every file with a segment's name has a whole head.
        let renamed = self
            .disk
            .rename(&active.path, &target)
            .and_then(|()| self.disk.sync_dir(&self.dir));
        renamed.map_err(|error| with_context(error, format_args!("name {}", target.display())))?;
        active.path = target;
        active.offset = head.len() as u64;
        Ok(active)
    }

    /// Makes room in the file for `bytes` more.
    pub fn reserve(&self, active: &mut ActiveSegment, bytes: u64) -> io::Result<()> {
        let need = active.offset + bytes + HEADER_BYTES as u64;
        if need <= active.allocated {
            return Ok(());
        }

        // Steps grow with the segment, because each of them costs a sync of its own.
        let step = self
            .grow_bytes
            .max(active.allocated / 2)
            .min(GROW_BYTES_MAX);
        let target = (active.allocated + step).min(self.segment_bytes).max(need);
        active.allocated = match pre_write(&*active.file, &active.path, active.allocated, target) {
            // A disk that is nearly full may have room for this and no more.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                pre_write(&*active.file, &active.path, active.allocated, need)?
            }
            written => written?,
        };
        Ok(())
    }

    /// Takes a segment that is no longer needed out of the log, durably, and keeps its file for
    /// another use.
    pub fn retire(
        &self,
        number: u64,
        file: Arc<dyn DiskFile>,
        allocated: u64,
    ) -> io::Result<PreparedSegment> {
        let from = self.path(number);
        let path = self.dir.join(format!("{number:020}{SUFFIX_SPARE}"));

        // Durable before the file is written again: a crash must not give it back its old name.
        let renamed = self
            .disk
            .rename(&from, &path)
            .and_then(|()| self.disk.sync_dir(&self.dir));
        renamed.map_err(|error| {
            with_context(
                error,
                format_args!("take {} out of the log", from.display()),
            )
        })?;
        Ok(PreparedSegment {
            path,
            file,
            allocated,
        })
    }

    /// Removes a segment that is no longer needed, durably.
    pub fn remove(&self, number: u64) -> io::Result<()> {
        let path = self.path(number);
        let removed = self
            .disk
            .remove(&path)
            .and_then(|()| self.disk.sync_dir(&self.dir));
        removed.map_err(|error| with_context(error, format_args!("remove {}", path.display())))
    }
}

/// Removes every segment and spare in a directory, durably. Fine if it is not there.
pub(super) fn remove_all(disk: Arc<dyn Disk>, dir: &Path) -> io::Result<()> {
    let files = SegmentFiles {
        disk,
        dir: dir.to_owned(),
        grow_bytes: 0,
        segment_bytes: 0,
    };
    let listing = match files.list() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listing => listing?,
    };
    for path in listing
        .segments
        .iter()
        .map(|number| files.path(*number))
        .chain(listing.spares)
    {
        files
            .disk
            .remove(&path)
            .map_err(|error| with_context(error, format_args!("remove {}", path.display())))?;
    }

    // Without this a power cut could bring old segments back under a new log.
    files.disk.sync_dir(dir)
}

/// Writes zeros from `from` to `to` and syncs them. Returns `to`.
fn pre_write(file: &dyn DiskFile, path: &Path, from: u64, to: u64) -> io::Result<u64> {
    let zeros = vec![0; ZEROS_BYTES.min(to.saturating_sub(from)) as usize];
    let mut at = from;
    let result = loop {
        if at >= to {
            break file.sync();
        }
        let n = (to - at).min(ZEROS_BYTES);
        if let Err(error) = file.write_at(&zeros[..n as usize], at) {
            break Err(error);
        }
        at += n;
    };
    result.map_err(|error| {
        with_context(
            error,
            format_args!("pre-write {} to {to} bytes", path.display()),
        )
    })?;
    Ok(to)
}
