//! [`HostDisk`]: the disk of a machine with the trees on it, and all that may be wrong with them.

use std::path::{Path, PathBuf};

use quorate::blocking::testing::{self as blocking, DiskPace};
use quorate::storage::mem_trees::{Crash, MemTrees};
use quorate::storage::sim_disk::SimDisk;
use quorate::storage::tree::Trees;
use quorate::types::DirectoryId;

use super::network::HostIndex;
use super::random::SimRng;

/// Folders of segments of the log, of snapshot files and of what witnesses have.
const LOG: &str = "/node/log";
const SNAPSHOTS: &str = "/node/snapshots";

/// Kinds of what rots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotKind {
    Segment,
    Snapshot,
    Tree,
}

/// Holds a disk, and how it is.
pub struct HostDisk {
    pub disk: SimDisk,
    pub trees: MemTrees,
    index: HostIndex,
    random: SimRng,
    /// Counts the disks that were in this machine before.
    lost: u64,
    usual_pace: Option<DiskPace>,
    pace: Option<DiskPace>,
    /// A sync is to fail, or has failed since the last start.
    is_failing: bool,
    is_full: bool,
    is_rotten: bool,
    /// An earlier state of it, and the start of the process then.
    copy: Option<(SimDisk, MemTrees, u64)>,
}

impl HostDisk {
    pub fn new(index: HostIndex, pace: Option<DiskPace>, seed: u64) -> Self {
        let mut random = SimRng::new(seed, &format!("disk {index}"));
        Self {
            disk: SimDisk::new(random.next()),
            trees: MemTrees::new(),
            index,
            random,
            lost: 0,
            usual_pace: pace,
            pace,
            is_failing: false,
            is_full: false,
            is_rotten: false,
            copy: None,
        }
    }

    /// Returns the id of the directory that would be made on it.
    pub fn directory_if_new(&self) -> DirectoryId {
        DirectoryId((u128::from(self.lost) << 32) + self.index as u128 + 1)
    }

    /// Says to the thread how long the disk takes, before the process runs in it.
    pub fn set_pace(&self, seed: u64) {
        blocking::pace(self.pace.map(|pace| DiskPace { seed, ..pace }));
    }

    pub fn crash(&mut self, is_power_cut: bool) {
        if !is_power_cut {
            return self.trees.crash(Crash::Kill, 0);
        }
        self.disk.crash();
        let crash = match self.random.percent(50) {
            true => Crash::Power,
            false => Crash::Torn,
        };
        self.trees.crash(crash, self.random.next());
        // It comes back as a disk that works.
        self.is_failing = false;
        self.is_full = false;
        self.trees.set_room(None);
    }

    /// Takes away what is wrong with it, but for what was lost.
    pub fn heal(&mut self) {
        self.disk.heal();
        self.trees.set_room(None);
        // Its process may yet give up for what it has met.
        self.is_failing |= std::mem::take(&mut self.is_full);
        self.pace = self.usual_pace;
    }

    /// Returns whether a process may give up for what is wrong with the disk.
    pub fn is_troubled(&self) -> bool {
        self.is_failing || self.is_full || self.is_rotten
    }

    pub fn is_rotten(&self) -> bool {
        self.is_rotten
    }

    /// A process begins on it.
    pub fn begin(&mut self) {
        if !self.is_full {
            self.disk.heal();
        }
        self.is_failing = false;
    }

    /// Has one of the next syncs fail.
    pub fn fail_sync(&mut self) {
        self.is_failing = true;
        let successes = self.random.below(12);
        self.disk.fail_sync_after(successes);
    }

    pub fn slow_down(&mut self) {
        self.pace = Some(DiskPace {
            seed: 0,
            one_in: self.random.between(1, 5),
            wait_ms_max: *self.random.pick(&[30, 300, 3000]),
        });
    }

    /// Leaves room for so many bytes more.
    pub fn fill(&mut self) {
        let free = self.random.below(96 << 10);
        let used: u64 = self.disk.files().iter().map(|(_, len)| len).sum();
        self.disk.set_capacity(Some(used + free));
        self.trees.set_room(Some(free));
        self.is_full = true;
    }

    /// Flips a bit of something that was synced long ago, in a tree or in a file. Returns what it
    /// is of.
    pub fn rot(&mut self, is_tree: bool) -> Option<RotKind> {
        let kind = match is_tree {
            true => RotKind::Tree,
            false => *self.random.pick(&[RotKind::Segment, RotKind::Snapshot]),
        };
        let is_flipped = match kind {
            RotKind::Segment => self.rot_file(LOG, "segment", 1),
            RotKind::Snapshot => self.rot_file(SNAPSHOTS, "snap", 0),
            RotKind::Tree => self.rot_tree(),
        };
        self.is_rotten |= is_flipped;
        is_flipped.then_some(kind)
    }

    /// Flips a bit of a file in a directory, but not of the last `spared` ones, which are written.
    fn rot_file(&mut self, directory: &str, extension: &str, spared: usize) -> bool {
        let mut files: Vec<(PathBuf, u64)> = self.disk.files();
        files.retain(|(path, len)| {
            path.parent() == Some(Path::new(directory))
                && path.extension().is_some_and(|found| found == extension)
                && *len > 0
        });
        files.truncate(files.len().saturating_sub(spared));
        if files.is_empty() {
            return false;
        }
        let (path, len) = self.random.pick(&files).clone();
        let (offset, bit) = (self.random.below(len), self.random.below(8) as u8);
        self.disk.flip_bit(&path, offset, bit)
    }

    fn rot_tree(&mut self) -> bool {
        let names = self.trees.names().unwrap_or_default();
        if names.is_empty() {
            return false;
        }
        let tree = self.random.pick(&names).clone();
        self.trees.flip(&tree, self.random.next() as usize)
    }

    /// Another disk takes its place, with nothing on it.
    pub fn lose(&mut self) {
        self.lost += 1;
        self.disk = SimDisk::new(self.random.next());
        self.trees = MemTrees::new();
        self.is_failing = false;
        self.is_full = false;
        self.is_rotten = false;
        self.copy = None;
    }

    /// Keeps a copy of all that is on it now, as of a start of the process.
    pub fn keep_copy(&mut self, start: u64) {
        self.copy = Some((self.disk.fork(), self.trees.fork(), start));
    }

    /// Returns the start of the process at which a copy was made, if there is one.
    pub fn copied_at(&self) -> Option<u64> {
        self.copy.as_ref().map(|(.., start)| *start)
    }

    /// Puts the copy in the place of what is there.
    pub fn put_back(&mut self) {
        if let Some((disk, trees, _)) = self.copy.take() {
            self.disk = disk;
            self.trees = trees;
            self.is_failing = false;
            self.is_full = false;
        }
    }
}
