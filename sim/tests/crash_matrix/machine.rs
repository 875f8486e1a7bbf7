//! [`SimMachine`]: a machine with a simulated disk and database. When it is switched off, whatever
//! still runs on it can change nothing any more, and reads nothing.

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;

use quorate::node::platform::{Platform, Stepped};
use quorate::sm::disk_level::DiskRoom;
use quorate::sm::ports::StoreError;
use quorate::storage::ReplicaKey;
use quorate::storage::directory::{DataDirectory, DirectoryError};
use quorate::storage::disk::{Disk, DiskFile, Open};
use quorate::storage::mem_trees::{Crash, MemTrees};
use quorate::storage::sim_disk::SimDisk;
use quorate::storage::sled_tree::{SledError, SledOptions};
use quorate::storage::tree::{Tree, Trees};
use quorate::supervisor::Supervisor;
use quorate::types::DirectoryId;

/// What is left of a node while it does not run.
#[derive(Clone)]
pub struct Disks {
    pub disk: SimDisk,
    pub trees: MemTrees,
}

/// How a node ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The process is killed: all that was written stays.
    Kill,
    /// The power fails: what was not synced is lost, or torn.
    PowerCut { seed: u64 },
}

const SLOW_SYNC: Duration = Duration::from_secs(3);

/// On from a start of the node to its end.
pub struct Power {
    is_on: RwLock<bool>,
    /// The stamp is not replaced for as long: nothing that a node says of itself on disk changes.
    is_held: Arc<AtomicBool>,
    faults: Arc<TreeFaults>,
    disk_fault: DiskFault,
}

/// What keeps trees from being opened, whatever starts and ends meanwhile.
#[derive(Default)]
pub struct TreeFaults {
    /// There is no descriptor for the trees of shards.
    pub lacks_descriptors: AtomicBool,
    /// The trees of this replica are damaged, also those that are begun anew.
    pub damaged: Mutex<Option<ReplicaKey>>,
}

impl TreeFaults {
    fn check(&self, name: &str) -> io::Result<()> {
        if self.lacks_descriptors.load(Ordering::Relaxed) && !is_of_meta(name) {
            return Err(rustix::io::Errno::MFILE.into());
        }
        let damaged = self.damaged.lock();
        match *damaged {
            Some(key) if name.starts_with(&format!("{key}.")) => {
                Err(io::ErrorKind::InvalidData.into())
            }
            _ => Ok(()),
        }
    }
}

/// What is wrong with a disk, below the directories of this name.
pub type DiskFault = Arc<Mutex<Option<(Trouble, &'static str)>>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// A write does not return.
    Hangs,
    /// A write takes [`SLOW_SYNC`].
    IsSlow,
    /// Whoever writes panics.
    Panics,
}

impl Power {
    pub fn on(
        is_held: Arc<AtomicBool>,
        faults: Arc<TreeFaults>,
        disk_fault: DiskFault,
    ) -> Arc<Self> {
        Arc::new(Self {
            is_on: RwLock::new(true),
            is_held,
            faults,
            disk_fault,
        })
    }

    /// What stands in the way of a write to that path, or a sync of it.
    fn pass(&self, path: &Path) {
        let began = std::time::Instant::now();
        while self.is_on() {
            let fault = *self.disk_fault.lock();
            match fault.filter(|(_, part)| path.iter().any(|name| name == *part)) {
                Some((Trouble::Hangs, _)) => {}
                Some((Trouble::IsSlow, _)) if began.elapsed() < SLOW_SYNC => {}
                Some((Trouble::Panics, _)) => panic!("put in by a test"),
                Some((Trouble::IsSlow, _)) | None => return,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn is_on(&self) -> bool {
        *self.is_on.read()
    }

    /// True: it was on until now.
    pub fn cut(&self, disks: &Disks, end: End) -> bool {
        let mut is_on = self.is_on.write();
        if !std::mem::replace(&mut *is_on, false) {
            return false;
        }
        match end {
            End::Kill => disks.trees.crash(Crash::Kill, 0),
            End::PowerCut { seed } => {
                disks.disk.crash();
                disks.trees.crash(
                    if seed.is_multiple_of(2) {
                        Crash::Power
                    } else {
                        Crash::Torn
                    },
                    seed,
                );
            }
        }
        true
    }

    /// While what is returned lives, the power stays on.
    fn need(&self) -> io::Result<RwLockReadGuard<'_, bool>> {
        let is_on = self.is_on.read();
        if *is_on {
            Ok(is_on)
        } else {
            Err(io::Error::other("this machine is off"))
        }
    }
}

/// Is told of each step, and says when to go on.
pub type Watcher = Arc<dyn Fn(Stepped<'_>) -> BoxFuture<'static, ()> + Send + Sync>;

/// The machine of one node, from a start to the next.
pub struct SimMachine {
    pub disks: Disks,
    pub power: Arc<Power>,
    pub directory_if_new: DirectoryId,
    pub watcher: Watcher,
    pub supervisor: Supervisor,
}

impl Platform for SimMachine {
    fn open_directory(&self, path: &Path) -> Result<DataDirectory, DirectoryError> {
        DataDirectory::open_unlocked(self.disk(), path, self.directory_if_new)
    }

    fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(PoweredDisk {
            disk: self.disks.disk.clone(),
            power: self.power.clone(),
        })
    }

    fn open_trees(
        &self,
        _path: &Path,
        _options: SledOptions,
        _is_expected: bool,
    ) -> Result<Arc<dyn Trees>, SledError> {
        self.disks.trees.begin();
        Ok(Arc::new(PoweredTrees {
            trees: self.disks.trees.clone(),
            power: self.power.clone(),
        }))
    }

    fn supervisor(&self) -> Supervisor {
        self.supervisor.clone()
    }

    fn stepped(&self, step: Stepped<'_>) -> BoxFuture<'static, ()> {
        (self.watcher)(step)
    }
}

struct PoweredDisk {
    disk: SimDisk,
    power: Arc<Power>,
}

impl Disk for PoweredDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>> {
        let _on = self.power.need()?;
        let file = self.disk.open(path, how)?;
        Ok(Box::new(PoweredFile {
            file,
            path: path.to_owned(),
            power: self.power.clone(),
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        while to.ends_with("stamp")
            && self.power.is_held.load(Ordering::Relaxed)
            && self.power.is_on()
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _on = self.power.need()?;
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let _on = self.power.need()?;
        self.disk.remove(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let _on = self.power.need()?;
        self.disk.create_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let _on = self.power.need()?;
        self.disk.sync_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let _on = self.power.need()?;
        self.disk.list(path)
    }

    fn room(&self, path: &Path) -> io::Result<DiskRoom> {
        let _on = self.power.need()?;
        self.disk.room(path)
    }
}

struct PoweredFile {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    power: Arc<Power>,
}

impl DiskFile for PoweredFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let _on = self.power.need()?;
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.power.pass(&self.path);
        let _on = self.power.need()?;
        self.file.write_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _on = self.power.need()?;
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        let _on = self.power.need()?;
        self.file.len()
    }

    fn sync(&self) -> io::Result<()> {
        self.power.pass(&self.path);
        let _on = self.power.need()?;
        self.file.sync()
    }
}

/// Returns whether a tree is that of a replica of the meta group.
fn is_of_meta(name: &str) -> bool {
    name.contains("g0-")
}

/// Open trees need no more than this: a crash of [`MemTrees`] ends their handles.
struct PoweredTrees {
    trees: MemTrees,
    power: Arc<Power>,
}

impl PoweredTrees {
    fn need(&self) -> Result<RwLockReadGuard<'_, bool>, StoreError> {
        self.power.need().map_err(|source| StoreError::Io {
            context: "the map database".to_owned(),
            source,
        })
    }
}

impl Trees for PoweredTrees {
    fn open(&self, name: &str) -> Result<Arc<dyn Tree>, StoreError> {
        let _on = self.need()?;
        let refused = |source| StoreError::Io {
            context: "opening a tree".to_owned(),
            source,
        };
        self.power.faults.check(name).map_err(refused)?;
        self.trees.open(name)
    }

    fn drop_tree(&self, name: &str) -> Result<(), StoreError> {
        let _on = self.need()?;
        self.trees.drop_tree(name)
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        let _on = self.need()?;
        self.trees.names()
    }

    fn begin_fresh(&self, live_bytes: u64) -> Result<(), StoreError> {
        let _on = self.need()?;
        self.trees.begin_fresh(live_bytes)
    }

    fn ensure_room(&self, bytes: u64) -> Result<(), StoreError> {
        let _on = self.need()?;
        self.trees.ensure_room(bytes)
    }

    fn outdated(&self) -> Result<Vec<String>, StoreError> {
        let _on = self.need()?;
        self.trees.outdated()
    }

    fn disk_bytes(&self) -> u64 {
        self.trees.disk_bytes()
    }

    fn sync(&self) -> Result<(), StoreError> {
        let _on = self.need()?;
        self.trees.sync()
    }

    fn condemn(&self, reason: &str) {
        if let Ok(_on) = self.need() {
            self.trees.condemn(reason);
        }
    }

    fn given_up(&self) -> Option<String> {
        self.trees.given_up()
    }
}
