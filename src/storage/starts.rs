//! [`StartBook`]: the starts of this node that its directory remembers, and the last start of each
//! peer that it has heard of.
//!
//! Two [`sealed`] files beside the stamp, which programs of the first release pass over. What is
//! remembered of peers is durable before a frame of theirs is looked at, so that no end of this
//! process makes it forget.

use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::sealed::{self, SealedError};
use crate::mutants::{self, Mutant};
use crate::sm::starts::{Start, Starts};
use crate::types::{DirectoryId, StartId};

/// The file with this node's own starts.
pub const STARTS: &str = "starts";
const PEERS: &str = "peers";
const FORMAT: u64 = 1;
/// Directories that are remembered. Far more than a cluster has nodes: what comes later is taken,
/// and not remembered.
const PEERS_MAX: usize = 4096;

/// Remembers the starts of this node and of its peers.
pub struct StartBook {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    own: Starts,
    known: Mutex<Known>,
    /// Held while the file is replaced, which takes as long as the disk does. Who only judges does
    /// not wait for it: that happens on threads which carry heartbeats.
    writing: Mutex<()>,
}

#[derive(Default)]
struct Known {
    starts: BTreeMap<DirectoryId, Start>,
    /// The starts that peers told last, as heard by this process.
    told: BTreeMap<DirectoryId, Starts>,
}

#[derive(Default, Serialize, Deserialize)]
struct PeersFile {
    known: BTreeMap<DirectoryId, Start>,
}

/// A directory lacks a start of its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lacking {
    pub start: Start,
    /// It is no copy that lacks it: its process was started again, and this is what it said before,
    /// read late.
    pub is_late: bool,
}

impl StartBook {
    /// Opens the book of the data directory at `path` and begins another start of its node. Durable
    /// when it returns. Blocking.
    ///
    /// # Errors
    ///
    /// When a file can't be read or written: then the node may not say anything.
    pub fn open(disk: Arc<dyn Disk>, path: &Path, id: StartId) -> Result<Self, SealedError> {
        let before: Option<Starts> = sealed::read(&*disk, &path.join(STARTS), FORMAT)?;
        let known: PeersFile = sealed::read(&*disk, &path.join(PEERS), FORMAT)?.unwrap_or_default();
        let own = before.map_or_else(|| Starts::first(id), |before| before.followed_by(id));

        // Durable before a word is said: peers refuse a directory that lacks a start they heard of.
        sealed::write(&*disk, path, STARTS, FORMAT, &own)?;
        let known = Mutex::new(Known {
            starts: known.known,
            told: BTreeMap::new(),
        });
        Ok(Self {
            disk,
            path: path.to_owned(),
            own,
            known,
            writing: Mutex::new(()),
        })
    }

    pub fn own(&self) -> &Starts {
        &self.own
    }

    /// Returns whether `starts` of a directory are those of the start that was last heard of.
    pub fn is_known(&self, directory: DirectoryId, starts: &Starts) -> bool {
        let mut known = self.lock();
        let is_known = known.starts.get(&directory) == Some(&starts.running());
        if is_known && !known.told.contains_key(&directory) {
            known.told.insert(directory, starts.clone());
        }
        is_known
    }

    /// Refuses a directory that lacks what was heard of it.
    ///
    /// # Errors
    ///
    /// The start that it lacks.
    pub fn judge(&self, directory: DirectoryId, starts: &Starts) -> Result<(), Lacking> {
        self.lock().judge(directory, starts)
    }

    /// Remembers the running start of a directory, unless that lacks what was heard of it before.
    /// Durable when it returns. Blocking.
    ///
    /// # Errors
    ///
    /// When it can't be written; the inner error, when the directory is refused.
    pub fn learn(
        &self,
        directory: DirectoryId,
        starts: &Starts,
    ) -> Result<Result<(), Lacking>, SealedError> {
        // One at a time, or the second would overwrite what the first has learnt.
        let _writing = self.writing.lock();
        if let Err(lacking) = self.judge(directory, starts) {
            return Ok(Err(lacking));
        }
        self.write(directory, starts.running())?;

        let mut known = self.lock();
        if known.starts.contains_key(&directory) {
            known.told.insert(directory, starts.clone());
        }
        Ok(Ok(()))
    }

    /// Remembers a start that the directory must have been through to be taken. Durable when it
    /// returns. Blocking.
    ///
    /// # Errors
    ///
    /// When it can't be written: it is refused until this process ends.
    pub fn require(&self, directory: DirectoryId, start: Start) -> Result<(), SealedError> {
        let _writing = self.writing.lock();
        let written = self.write(directory, start);

        // Also if it could not be written: the directory is refused until this process ends.
        let mut known = self.lock();
        known.starts.insert(directory, start);
        known.told.remove(&directory);
        written
    }

    /// Writes what is known with this start, and then knows it. The caller holds `writing`.
    fn write(&self, directory: DirectoryId, start: Start) -> Result<(), SealedError> {
        let mut next = self.lock().starts.clone();
        let before = next.insert(directory, start);
        // Whoever makes up directories must not have those of members forgotten.
        if before == Some(start) || (before.is_none() && next.len() > PEERS_MAX) {
            return Ok(());
        }

        let file = PeersFile { known: next };
        sealed::write(&*self.disk, &self.path, PEERS, FORMAT, &file)?;
        self.lock().starts = file.known;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock()
    }
}

impl Known {
    fn judge(&self, directory: DirectoryId, starts: &Starts) -> Result<(), Lacking> {
        if mutants::is_on(Mutant::OlderCopyAccepted) {
            return Ok(());
        }
        match self.starts.get(&directory) {
            Some(start) if !starts.may_include(*start) => {
                let is_late = self
                    .told
                    .get(&directory)
                    .is_some_and(|told| told.has(starts.running()));
                Err(Lacking {
                    start: *start,
                    is_late,
                })
            }
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::disk::ensure_dir;
    use crate::storage::sim_disk::SimDisk;

    fn open(disk: &SimDisk, id: u64) -> Result<StartBook, SealedError> {
        let path = Path::new("/data");
        // As whoever opens a data directory does: synced, and never created anew.
        if disk.list(path).is_err() {
            ensure_dir(disk, path).map_err(|source| SealedError::Io {
                path: path.to_owned(),
                source,
            })?;
        }
        StartBook::open(Arc::new(disk.clone()), path, StartId(id))
    }

    /// Whatever a power cut leaves: no start that may have been told of is ever missing, and
    /// nothing is forgotten of peers.
    #[test]
    fn a_power_cut_loses_no_start_that_was_told_of_and_none_that_was_heard_of() {
        for seed in 0..200 {
            let disk = SimDisk::new(seed);
            let (mut told, mut heard) = (Vec::new(), None);
            let mut peer = Starts::first(StartId(1000));
            for id in 1..20 {
                disk.fail_sync_after((seed + id * 3) % 11);
                if let Ok(book) = open(&disk, id) {
                    assert!(
                        told.iter().all(|told| book.own().may_include(*told)),
                        "seed {seed}: a start is missing"
                    );
                    told.push(book.own().running());
                    if let Some(heard) = heard {
                        assert_eq!(
                            book.lock().starts.get(&DirectoryId(5)),
                            Some(&heard),
                            "seed {seed}"
                        );
                    }
                    let next = peer.followed_by(StartId(1000 + id));
                    if book
                        .learn(DirectoryId(5), &next)
                        .is_ok_and(|learned| learned.is_ok())
                    {
                        (heard, peer) = (Some(next.running()), next);
                    } else {
                        // It may be there or not; the peer goes on with the same start.
                        disk.crash();
                        let known = open(&disk, id + 100).ok();
                        told.extend(known.as_ref().map(|book| book.own().running()));
                        let known =
                            known.and_then(|book| book.lock().starts.get(&DirectoryId(5)).copied());
                        if known == Some(next.running()) {
                            (heard, peer) = (known, next);
                        }
                    }
                }
                disk.crash();
            }
            assert!(told.len() > 2, "seed {seed}");
        }
    }

    #[test]
    fn who_makes_up_directories_has_none_forgotten() {
        let disk = SimDisk::new(1);
        let book = open(&disk, 1).expect("opened");
        let starts = Starts::first(StartId(1));
        book.learn(DirectoryId(u128::MAX), &starts)
            .expect("written")
            .expect("taken");
        {
            let mut known = book.lock();
            known
                .starts
                .extend((1..PEERS_MAX as u128).map(|id| (DirectoryId(id), starts.running())));
        }
        assert_eq!(
            book.learn(DirectoryId(1 << 100), &starts)
                .expect("nothing is written"),
            Ok(())
        );
        assert_eq!(
            book.judge(DirectoryId(u128::MAX), &Starts::first(StartId(2))),
            Err(Lacking {
                start: starts.running(),
                is_late: false
            })
        );
        book.learn(DirectoryId(5), &starts.followed_by(StartId(3)))
            .expect("written")
            .expect("taken");
        assert!(book.is_known(DirectoryId(5), &starts.followed_by(StartId(3))));
    }

    #[test]
    fn a_directory_that_lacks_what_was_heard_of_is_refused_after_any_restart() {
        let disk = SimDisk::new(1);
        let old = Starts::first(StartId(1));
        let (later, fork) = (old.followed_by(StartId(2)), old.followed_by(StartId(3)));
        let book = open(&disk, 1).expect("opened");
        let directory = DirectoryId(5);
        assert_eq!(book.learn(directory, &old).expect("written"), Ok(()));
        assert_eq!(book.learn(directory, &later).expect("written"), Ok(()));
        drop(book);
        let book = open(&disk, 2).expect("opened again");
        for starts in [&old, &fork, &fork.followed_by(StartId(4))] {
            let lacking = Lacking {
                start: later.running(),
                is_late: false,
            };
            assert_eq!(book.judge(directory, starts), Err(lacking));
            assert_eq!(
                book.learn(directory, starts).expect("nothing is written"),
                Err(lacking)
            );
        }
        assert_eq!(
            book.judge(directory, &later.followed_by(StartId(5))),
            Ok(())
        );
        assert!(book.is_known(directory, &later) && !book.is_known(DirectoryId(6), &later));
    }

    /// A peer that was paused reads what was sent to it meanwhile in any order.
    #[test]
    fn what_a_process_said_before_it_was_started_again_is_late_and_no_copy() {
        let book = open(&SimDisk::new(1), 1).expect("opened");
        let old = Starts::first(StartId(1)).followed_by(StartId(2));
        let (again, fork) = (old.followed_by(StartId(3)), old.followed_by(StartId(4)));
        book.learn(DirectoryId(5), &again)
            .expect("written")
            .expect("taken");
        let late = |starts: &Starts| {
            book.judge(DirectoryId(5), starts)
                .expect_err("it is over")
                .is_late
        };
        assert!(late(&old) && late(&Starts::first(StartId(1))) && !late(&fork));
    }
}
