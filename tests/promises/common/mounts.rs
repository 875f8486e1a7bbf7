//! File systems of their own for a node: a small one that fills up, and an image that can be copied
//! as a power cut would leave it, or frozen as a disk that hangs.
//!
//! Needs root and the right to mount; where that can't be had, the caller says so and leaves its
//! test out.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Something mounted; unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    pub path: PathBuf,
}

impl Mount {
    /// A file system in memory, of so many bytes.
    pub fn tmpfs(path: &Path, bytes: u64) -> Result<Self, String> {
        mount(
            path,
            &["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"],
        )
    }

    /// The file system in an image file.
    pub fn image(path: &Path, image: &Path) -> Result<Self, String> {
        // Nothing but what the program syncs is to be written for a while: that is what a power cut
        // leaves.
        mount(
            path,
            &["-o", "loop,commit=300", &image.display().to_string()],
        )
    }

    /// The loop device under it.
    pub fn device(&self) -> String {
        run(
            "findmnt",
            &["-n", "-o", "SOURCE", &self.path.display().to_string()],
        )
        .expect("a device")
        .trim()
        .to_owned()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: who still has a file open there keeps it until it ends.
        let _ = run("umount", &["-l", &self.path.display().to_string()]);
    }
}

/// Keeps a file system from being written to, as a disk that hangs. Thawed when dropped: before
/// that, who writes there can't even be killed.
#[derive(Debug)]
pub struct Frozen(PathBuf);

impl Frozen {
    /// Freezes it.
    pub fn freeze(mount: &Mount) -> Result<Self, String> {
        run("fsfreeze", &["-f", &mount.path.display().to_string()])?;
        Ok(Self(mount.path.clone()))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = run("fsfreeze", &["-u", &self.0.display().to_string()]);
    }
}

/// Makes an image file with an empty file system of so many bytes.
pub fn format_image(image: &Path, bytes: u64) -> Result<(), String> {
    let file = std::fs::File::create(image).map_err(|error| error.to_string())?;
    file.set_len(bytes).map_err(|error| error.to_string())?;
    run("mkfs.ext4", &["-q", "-F", &image.display().to_string()]).map(drop)
}

fn mount(path: &Path, arguments: &[&str]) -> Result<Mount, String> {
    std::fs::create_dir_all(path).map_err(|error| error.to_string())?;
    let target = path.display().to_string();
    run("mount", &[arguments, &[&target]].concat())?;
    Ok(Mount {
        path: path.to_owned(),
    })
}

/// Runs a program and returns what it prints, or what it complains of.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!(
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}
