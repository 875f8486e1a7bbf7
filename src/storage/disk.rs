//! The disk seam: every byte of the log, the snapshot files and the stamp goes through [`Disk`], so
//! that a simulated disk can drop, tear, rot or refuse it. [`RealDisk`] is the file system; the
//! simulated one is in `sim_disk`.
//!
//! Durable means: [`DiskFile::sync`] returned for the bytes, and [`Disk::sync_dir`] for the name.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::descriptors::patiently;
use crate::sm::disk_level::DiskRoom;
use crate::sm::ports::StoreError;

/// Tells [`Disk::open`] what to do with a file that exists, or does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// It must exist; opened for reading and writing.
    Existing,
    /// It must not exist.
    New,
    /// Created, or emptied where it exists.
    Truncated,
}

/// A file system.
pub trait Disk: Send + Sync + 'static {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>>;
    /// Replaces `to` in one step. Durable only after [`Disk::sync_dir`] of the parent.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Creates the directory in its parent, which must exist. Fine if it exists. Durable only after
    /// [`Disk::sync_dir`] of the parent: see [`ensure_dir`].
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Names of the files in a directory, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Returns what is left of the disk that a directory is on.
    fn room(&self, _path: &Path) -> io::Result<DiskRoom> {
        Ok(DiskRoom::ENDLESS)
    }
}

/// Creates the directory and those above it that are missing, each durable under its name when this
/// returns. Of one that exists the name is made durable too: who created it may have ended before
/// that.
///
/// # Errors
///
/// When the disk fails.
pub fn ensure_dir(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };

    match disk.create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            ensure_dir(disk, parent)?;
            disk.create_dir(path)?;
        }
        created => created?,
    }
    disk.sync_dir(parent)
}

/// Returns the failure of `doing` something to the file or directory at `path`.
pub(super) fn io_error(doing: &str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Io {
        context: format!("{doing} {}", path.display()),
        source,
    }
}

/// An open file, read and written at offsets.
pub trait DiskFile: Send + Sync {
    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`, growing the file where needed.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    fn set_len(&self, len: u64) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Makes every earlier write of this file durable, its length included.
    fn sync(&self) -> io::Result<()>;
    /// Has what the system holds of the file in memory dropped, where it was synced: the next reads
    /// come from the disk. A wish, which the system may leave.
    fn forget_cached(&self) {}
}

/// The file system of this machine. While there is no descriptor left, it waits for one: the disk
/// is well, and who has the descriptors will give some back.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match how {
            Open::Existing => {}
            Open::New => {
                options.create_new(true);
            }
            Open::Truncated => {
                options.create(true).truncate(true);
            }
        }
        let file = patiently(&format!("open {}", path.display()), || options.open(path))?;
        Ok(Box::new(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match std::fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            created => created,
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        patiently(&format!("sync {}", path.display()), || File::open(path))?.sync_all()
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        let entries = patiently(&format!("list {}", path.display()), || {
            std::fs::read_dir(path)
        })?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn room(&self, path: &Path) -> io::Result<DiskRoom> {
        let disk = rustix::fs::statvfs(path)?;
        let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
        Ok(DiskRoom {
            free_bytes: bytes(disk.f_bavail),
            total_bytes: bytes(disk.f_blocks),
        })
    }
}

impl DiskFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match FileExt::read_at(self, &mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        // fdatasync writes the length if it has changed, and saves the write of the times.
        self.sync_data()
    }

    fn forget_cached(&self) {
        #[cfg(target_os = "linux")]
        if let Err(error) = rustix::fs::fadvise(self, 0, None, rustix::fs::Advice::DontNeed) {
            tracing::debug!(%error, "a file stays in memory");
        }
    }
}
