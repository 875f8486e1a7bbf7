//! [`PeerDirectories`]: checks that a peer's data directory is the one that this node has met, and
//! not an old copy or a second one.
//!
//! Both ends of a lane announce their starts (`sm::starts`) before anything else, and each checks
//! the other's. A directory that lacks a start which is known of it is refused, and none of its
//! frames counts. What is learnt is durable before a frame is looked at. This also detects a
//! directory that runs twice: while one start of it is in contact, another is refused as long as
//! the first goes on speaking.
//!
//! Peers of the first release announce no starts, and are accepted as they are.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::blocking;
use crate::raft::transport::wire::PeerRefusal;
use crate::sm::starts::{Start, Starts};
use crate::storage::starts::{Lacking, StartBook};
use crate::types::{DirectoryId, StartId};

/// A start that was heard from within this time still runs. A process that has ended says nothing
/// more, and its lanes break.
const RUNS_FOR: Duration = Duration::from_secs(3);
/// Time of being refused because another process runs with the same directory, after which that
/// process is believed to go on: anything late has been read by then.
const DOUBLE_AFTER: Duration = Duration::from_secs(10);
/// Refusals further apart than this are unrelated.
const DOUBLE_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Refused directories that were logged. Past that number they are logged again.
const REPORTED_MAX: usize = 1024;

/// The reason why peers refuse the data directory of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirectoryRejection {
    /// A peer knows of a later start: this directory is an old copy, or the second of two.
    Outdated { by: String, number: u64 },
    /// Another process runs with a copy of this directory.
    Doubled { by: String },
}

/// The starts of this node, and those of the nodes that it has met.
pub struct PeerDirectories {
    book: Arc<StartBook>,
    contacts: Mutex<BTreeMap<DirectoryId, Arc<PeerContact>>>,
    began: Instant,
    reported: Mutex<BTreeSet<(DirectoryId, StartId)>>,
    /// The first and the last time in a row that a peer said that another process runs with this
    /// directory.
    doubled: Mutex<Option<(Instant, Instant)>>,
    rejection: watch::Sender<Option<DirectoryRejection>>,
}

/// A start of a peer that this node is in contact with.
#[derive(Debug)]
struct PeerContact {
    start: Start,
    /// Number of lanes that are up with it, from either side.
    lanes: AtomicUsize,
    /// Time at which it was last heard from, in milliseconds since this node began.
    heard_ms: AtomicU64,
    /// True once a later start has taken its place.
    is_over: AtomicBool,
}

/// One lane with a peer whose starts were accepted.
#[derive(Debug)]
pub struct PeerSession {
    contact: Arc<PeerContact>,
    began: Instant,
}

impl PeerSession {
    /// Notes that the peer has spoken. Returns false if a later start has taken its place, so that
    /// it is no longer listened to.
    pub fn note(&self) -> bool {
        self.contact
            .heard_ms
            .store(ms_since(self.began), Ordering::Relaxed);
        !self.contact.is_over.load(Ordering::Relaxed)
    }
}

impl Drop for PeerSession {
    fn drop(&mut self) {
        let before = self.contact.lanes.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "a lane ends that never began");
    }
}

impl PeerDirectories {
    /// Returns the directories that `book` knows.
    pub fn new(book: StartBook) -> Arc<Self> {
        Arc::new(Self {
            book: Arc::new(book),
            contacts: Mutex::default(),
            began: Instant::now(),
            reported: Mutex::default(),
            doubled: Mutex::default(),
            rejection: watch::Sender::new(None),
        })
    }

    /// Returns this node's own starts.
    pub fn own(&self) -> &Starts {
        self.book.own()
    }

    /// Accepts or refuses the directory of a peer, and counts a lane with it. What is learnt is
    /// durable when it returns.
    ///
    /// # Errors
    ///
    /// The reason why the peer is refused.
    pub async fn admit(
        &self,
        directory: DirectoryId,
        starts: &Starts,
    ) -> Result<PeerSession, PeerRefusal> {
        self.learn(directory, starts).await?;
        let mut contacts = self.contacts();
        // Checked again: another start may have come in between.
        self.verify(&contacts, directory, starts)?;

        let running = starts.running();
        let contact = contacts
            .entry(directory)
            .or_insert_with(|| Arc::new(PeerContact::new(running)));

        // Lanes of the start before this one are not listened to any more.
        if contact.start != running {
            contact.is_over.store(true, Ordering::Relaxed);
            *contact = Arc::new(PeerContact::new(running));
        }

        contact.lanes.fetch_add(1, Ordering::Relaxed);
        let session = PeerSession {
            contact: contact.clone(),
            began: self.began,
        };
        session.note();
        Ok(session)
    }

    /// Accepts or refuses the directory of a peer like [`PeerDirectories::admit`], without a lane.
    ///
    /// # Errors
    ///
    /// The reason why the peer is refused.
    pub async fn learn(&self, directory: DirectoryId, starts: &Starts) -> Result<(), PeerRefusal> {
        self.verify(&self.contacts(), directory, starts)?;
        if self.book.is_known(directory, starts) {
            return Ok(());
        }

        // Learning syncs a file, so it is done on a thread that may block.
        let (book, learning) = (self.book.clone(), starts.clone());
        let learned = blocking::start(move || book.learn(directory, &learning)).await;
        match learned {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(lacking))) => Err(self.refuse(directory, starts, lacking)),
            Ok(Err(error)) => Err(PeerRefusal::Failed(error.to_string())),
            Err(error) => Err(PeerRefusal::Failed(error.to_string())),
        }
    }

    /// Returns true if this start of the directory is the latest that was learnt.
    pub fn knows(&self, directory: DirectoryId, starts: &Starts) -> bool {
        self.book.is_known(directory, starts)
    }

    /// Checks a directory like [`PeerDirectories::learn`], but records nothing, because anybody
    /// could have said so.
    ///
    /// # Errors
    ///
    /// The reason why the peer is refused.
    pub fn check(&self, directory: DirectoryId, starts: &Starts) -> Result<(), PeerRefusal> {
        self.verify(&self.contacts(), directory, starts)
    }

    fn verify(
        &self,
        contacts: &BTreeMap<DirectoryId, Arc<PeerContact>>,
        directory: DirectoryId,
        starts: &Starts,
    ) -> Result<(), PeerRefusal> {
        self.book
            .judge(directory, starts)
            .map_err(|lacking| self.refuse(directory, starts, lacking))?;
        match contacts.get(&directory) {
            Some(contact) if contact.start != starts.running() && self.runs(contact) => {
                Err(PeerRefusal::Doubled)
            }
            Some(_) | None => Ok(()),
        }
    }

    fn runs(&self, contact: &PeerContact) -> bool {
        let heard = Duration::from_millis(contact.heard_ms.load(Ordering::Relaxed));
        contact.lanes.load(Ordering::Relaxed) > 0
            && self.began.elapsed().saturating_sub(heard) < RUNS_FOR
    }

    /// Refuses a directory, and logs that once for each start of it.
    fn refuse(&self, directory: DirectoryId, starts: &Starts, lacking: Lacking) -> PeerRefusal {
        let missing_start = lacking.start;
        // What the process said before its restart may be read late; that is no copy.
        if lacking.is_late {
            tracing::debug!(
                "start {} of data directory {directory} is over: it is not listened to",
                starts.running().number
            );
            return PeerRefusal::Outdated {
                number: missing_start.number,
            };
        }

        let mut reported = self.reported.lock();
        if reported.len() >= REPORTED_MAX {
            reported.clear();
        }
        if reported.insert((directory, starts.running().id)) {
            // Said once for each start.
            tracing::warn!(
                "refused data directory {directory}: it is an old copy, for its node was started \
                 later ({}) than this copy knows ({}); what it said since is not in there",
                missing_start.number,
                starts.running().number
            );
        }
        PeerRefusal::Outdated {
            number: missing_start.number,
        }
    }

    /// Refuses a directory from now on, whatever it says, because it lacks what its node has
    /// acknowledged.
    pub fn reject(&self, directory: DirectoryId) {
        let Some(contact) = self.contacts().get(&directory).cloned() else {
            return;
        };
        if contact.is_over.swap(true, Ordering::Relaxed) {
            return;
        }
        // Said once for each start.
        tracing::warn!(
            "data directory {directory} lacks entries that it has acknowledged: it is an old copy, \
            from before them, and is refused"
        );
        // Requires a start that the directory never made.
        let start = Start {
            number: contact.start.number,
            id: StartId(rand::random()),
        };
        let book = self.book.clone();
        blocking::start(move || {
            if let Err(error) = book.require(directory, start) {
                // Said once for each start.
                tracing::error!(
                    "that data directory {directory} is refused cannot be written down: {error}"
                );
            }
        });
    }

    /// Notes that a peer has refused this node.
    pub fn refused_by(&self, peer: &str, refusal: &PeerRefusal) {
        match refusal {
            PeerRefusal::Outdated { number } => self.reject_self(DirectoryRejection::Outdated {
                by: peer.to_owned(),
                number: *number,
            }),
            PeerRefusal::Doubled => {
                let now = Instant::now();
                let mut doubled = self.doubled.lock();

                // A single refusal may be about a process that has just ended, so only a row of
                // them counts.
                let since = match *doubled {
                    Some((since, last)) if now.duration_since(last) < DOUBLE_PAUSE_MAX => since,
                    Some(_) | None => now,
                };
                *doubled = Some((since, now));
                if now.duration_since(since) >= DOUBLE_AFTER {
                    self.reject_self(DirectoryRejection::Doubled {
                        by: peer.to_owned(),
                    });
                }
            }
            // These say nothing about this directory.
            PeerRefusal::OtherCluster
            | PeerRefusal::OtherNode(_)
            | PeerRefusal::OtherDirectory(_)
            | PeerRefusal::NoCluster
            | PeerRefusal::NoReplica(_)
            | PeerRefusal::OtherReplica(_)
            | PeerRefusal::Stopped
            | PeerRefusal::Busy
            | PeerRefusal::Leased
            | PeerRefusal::Failed(_)
            | PeerRefusal::Unreadable
            | PeerRefusal::OtherTimings(_) => {}
        }
    }

    fn reject_self(&self, rejection: DirectoryRejection) {
        self.rejection.send_if_modified(|reason| {
            let is_first = reason.is_none();
            reason.get_or_insert(rejection);
            is_first
        });
    }

    /// Resolves when peers refuse this node's directory for good.
    pub fn rejection(&self) -> impl Future<Output = DirectoryRejection> + use<> {
        let mut rejection = self.rejection.subscribe();
        async move {
            match rejection
                .wait_for(Option::is_some)
                .await
                .ok()
                .and_then(|rejection| rejection.clone())
            {
                Some(rejection) => rejection,
                None => std::future::pending().await,
            }
        }
    }

    fn contacts(&self) -> MutexGuard<'_, BTreeMap<DirectoryId, Arc<PeerContact>>> {
        self.contacts.lock()
    }
}

impl std::fmt::Debug for PeerDirectories {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerDirectories")
            .field("own", self.own())
            .finish_non_exhaustive()
    }
}

impl PeerContact {
    fn new(start: Start) -> Self {
        Self {
            start,
            lanes: AtomicUsize::new(0),
            heard_ms: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        }
    }
}

fn ms_since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::disk::Disk;
    use crate::storage::sim_disk::SimDisk;
    use std::path::Path;

    const DIRECTORY: DirectoryId = DirectoryId(5);

    fn peer_directories() -> Arc<PeerDirectories> {
        let disk = SimDisk::new(1);
        disk.create_dir(Path::new("/data")).expect("created");
        PeerDirectories::new(
            StartBook::open(Arc::new(disk), Path::new("/data"), StartId(1)).expect("opened"),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_process_with_a_directory_is_refused_while_the_first_speaks() {
        let known = peer_directories();
        let first = Starts::first(StartId(10));
        let (again, copy) = (
            first.followed_by(StartId(11)),
            first.followed_by(StartId(12)),
        );
        let lane = known.admit(DIRECTORY, &first).await.expect("taken");
        assert_eq!(
            known
                .admit(DIRECTORY, &copy)
                .await
                .expect_err("the first runs"),
            PeerRefusal::Doubled
        );
        assert!(lane.note() && known.admit(DIRECTORY, &first).await.is_ok());
        // Its process ends: its lanes break, or say nothing more.
        drop(lane);
        let lane = known.admit(DIRECTORY, &again).await.expect("started again");
        tokio::time::advance(RUNS_FOR).await;
        let later = again.followed_by(StartId(13));
        let second = known
            .admit(DIRECTORY, &later)
            .await
            .expect("the machine of the one before has gone");
        assert!(
            !lane.note() && second.note(),
            "it is not listened to any more"
        );
        assert_eq!(
            known.admit(DIRECTORY, &copy).await.expect_err("a copy"),
            PeerRefusal::Outdated { number: 3 }
        );
    }

    /// One made-up greeting must not keep the true node out, now or after a restart.
    #[tokio::test]
    async fn what_is_only_weighed_is_not_remembered() {
        let known = peer_directories();
        let first = Starts::first(StartId(10));
        drop(known.admit(DIRECTORY, &first).await.expect("taken"));
        let made_up = (0..5).fold(first.clone(), |starts, id| {
            starts.followed_by(StartId(20 + id))
        });
        assert_eq!(known.check(DIRECTORY, &made_up), Ok(()));
        assert_eq!(
            known.check(DIRECTORY, &Starts::first(StartId(9))),
            Err(PeerRefusal::Outdated { number: 1 })
        );
        assert!(
            known
                .admit(DIRECTORY, &first.followed_by(StartId(11)))
                .await
                .is_ok()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_whose_directory_is_an_old_copy_learns_so_and_one_that_runs_twice_after_a_while()
    {
        let outdated = peer_directories();
        outdated.refused_by("a:1", &PeerRefusal::Busy);
        outdated.refused_by("a:1", &PeerRefusal::Outdated { number: 7 });
        assert_eq!(
            outdated.rejection().await,
            DirectoryRejection::Outdated {
                by: "a:1".into(),
                number: 7
            }
        );

        let doubled = peer_directories();
        for _ in 0..10 {
            doubled.refused_by("a:1", &PeerRefusal::Doubled);
            assert_eq!(*doubled.rejection.borrow(), None);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        doubled.refused_by("a:1", &PeerRefusal::Doubled);
        assert_eq!(
            doubled.rejection().await,
            DirectoryRejection::Doubled { by: "a:1".into() }
        );

        let late = peer_directories();
        for _ in 0..10 {
            late.refused_by("a:1", &PeerRefusal::Doubled);
            tokio::time::advance(DOUBLE_PAUSE_MAX).await;
        }
        assert_eq!(
            *late.rejection.borrow(),
            None,
            "each time it was something late"
        );
    }
}
