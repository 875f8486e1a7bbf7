//! [`Supervisor`]: sees the end of every thread and task that lives as long as the node, or as a
//! replica.
//!
//! A part that panics leaves the rest half dead: a leader that sends heartbeats and applies
//! nothing, a queue that nobody empties, a lock that is poisoned. Nobody can say what of its state
//! still holds. So a panic ends the process at once, with one line and [`EXIT_STATUS`], and the
//! other nodes go on; whoever starts the process again finds what was synced. What may panic
//! without that, because nothing rests on it, is not started here: one connection, one request, one
//! step of a view change (`node/chores`). The panic of applying an entry would be the same on every
//! replica: it stops the replica (see `raft/state_machine`).
//!
//! All such threads and tasks are started by this room (held by `tests/architecture.rs`). Each has
//! a [`Beat`] that counts what it does, so that others can see whether it hangs: who looks is
//! `node/controllers/watchdog`.
//!
//! A task that is started by a supervised one through [`inherit`] is supervised as well: that is
//! how the tasks of openraft are, which it starts by itself.

use parking_lot::Mutex;
use std::any::Any;
use std::fmt;
use std::future::Future;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use futures::FutureExt;
use tokio::task::JoinSet;

/// With what the process ends when a part of it has panicked or hangs: starting it again is all
/// that there is to do.
pub const EXIT_STATUS: i32 = 4;

/// Time that writing the last line may take: its reader may hang too.
const LAST_LINE_TIMEOUT: Duration = Duration::from_secs(1);

/// The reason why a process cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessEnd {
    pub part: &'static str,
    pub reason: String,
}

impl ProcessEnd {
    fn panicked(part: &'static str, panic: &(dyn Any + Send)) -> Self {
        Self {
            part,
            reason: format!("it panicked: {}", message(panic)),
        }
    }
}

impl fmt::Display for ProcessEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { part, reason } = self;
        write!(
            f,
            "this node ends, because a part of it does not work: {part}: {reason}; what was \
            acknowledged is kept"
        )
    }
}

/// Returns what a panic said.
pub fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("it did not say why")
}

/// Counts the steps of a part, for its watchdog.
#[derive(Debug, Default)]
pub struct Beat(AtomicU64);

impl Beat {
    /// The part has come a step further.
    pub fn step(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn steps(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Is told of each supervised part that ends by a panic. Clones are the same.
#[derive(Clone)]
pub struct Supervisor(Arc<SupervisorInner>);

struct SupervisorInner {
    end: Box<dyn Fn(&ProcessEnd) + Send + Sync>,
    beats: Mutex<Vec<(&'static str, Weak<Beat>)>>,
    #[cfg(any(test, feature = "testing"))]
    faults: testing::PartFaults,
}

/// The identity of a supervised task.
#[derive(Clone)]
struct Current {
    supervisor: Supervisor,
    part: &'static str,
    beat: Arc<Beat>,
}

tokio::task_local! {
    static CURRENT: Current;
}

impl Supervisor {
    /// Returns one that calls `end` for each part that has panicked or hangs.
    pub fn new(end: impl Fn(&ProcessEnd) + Send + Sync + 'static) -> Self {
        let end = Box::new(end);
        Self(Arc::new(SupervisorInner {
            end,
            beats: Mutex::default(),
            #[cfg(any(test, feature = "testing"))]
            faults: testing::PartFaults::default(),
        }))
    }

    /// Returns the one of a program that runs: it ends the process.
    pub fn of_the_process() -> Self {
        Self::new(|ended| end_process(ended))
    }

    /// The node cannot go on.
    pub fn end(&self, ended: &ProcessEnd) {
        (self.0.end)(ended);
    }

    /// Starts a thread.
    ///
    /// # Errors
    ///
    /// Fails if the system has none.
    pub fn start_thread(
        &self,
        part: &'static str,
        run: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let supervisor = self.clone();
        std::thread::Builder::new()
            .name(part.to_owned())
            .spawn(move || {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                    supervisor.end(&ProcessEnd::panicked(part, &*panic));
                    resume_unwind(panic);
                }
            })
    }

    /// Starts a task that `tasks` owns.
    pub fn start<T: Send + 'static>(
        &self,
        tasks: &mut JoinSet<T>,
        part: &'static str,
        task: impl Future<Output = T> + Send + 'static,
    ) {
        tasks.spawn(self.supervised(part, task));
    }

    /// Starts a task that the caller owns.
    pub fn start_alone<T: Send + 'static>(
        &self,
        part: &'static str,
        task: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        tokio::spawn(self.supervised(part, task))
    }

    /// Returns a task that tells this supervisor when it panics.
    fn supervised<T, F>(&self, part: &'static str, task: F) -> impl Future<Output = T> + use<T, F>
    where
        F: Future<Output = T>,
    {
        let beat = Arc::new(Beat::default());
        let mut beats = self.0.beats.lock();
        beats.retain(|(_, beat)| beat.strong_count() > 0);
        beats.push((part, Arc::downgrade(&beat)));
        drop(beats);
        guarded(
            Current {
                supervisor: self.clone(),
                part,
                beat,
            },
            task,
        )
    }

    /// Does `work`, and has the tasks that it starts through [`inherit`] supervised as parts of
    /// this name.
    pub fn within<T>(&self, part: &'static str, work: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(
            Current {
                supervisor: self.clone(),
                part,
                beat: Arc::default(),
            },
            work,
        )
    }

    /// Returns the tasks that run, by name, with how many steps each has counted.
    pub fn beats(&self) -> Vec<(&'static str, Arc<Beat>)> {
        let beats = self.0.beats.lock();
        beats
            .iter()
            .filter_map(|(part, beat)| Some((*part, beat.upgrade()?)))
            .collect()
    }
}

async fn guarded<T>(current: Current, task: impl Future<Output = T>) -> T {
    let Current {
        supervisor, part, ..
    } = current.clone();
    #[cfg(any(test, feature = "testing"))]
    let task = supervisor.0.faults.put_into(part, task);
    let task = CURRENT.scope(current, task);
    match AssertUnwindSafe(task).catch_unwind().await {
        Ok(done) => done,
        Err(panic) => {
            supervisor.end(&ProcessEnd::panicked(part, &*panic));
            resume_unwind(panic)
        }
    }
}

/// Counts a step of the supervised task that calls.
pub fn beat() {
    let _ = CURRENT.try_with(|current| current.beat.step());
}

/// Returns `task` as a part of what supervises the caller; as it is, where nothing does.
pub fn inherit<T>(task: impl Future<Output = T>) -> impl Future<Output = T> {
    match CURRENT.try_with(Current::clone) {
        Ok(current) => futures::future::Either::Left(guarded(current, task)),
        Err(_) => futures::future::Either::Right(task),
    }
}

/// Says why on standard error, as every other end is said, and ends the process.
fn end_process(ended: &ProcessEnd) -> ! {
    let line = format!("quorate: {ended}. Start it again\n");
    let (written, is_written) = mpsc::channel();
    let write = move || {
        let _ = io::stderr().write_all(line.as_bytes());
        let _ = written.send(());
    };
    if std::thread::Builder::new()
        .name("last-line".to_owned())
        .spawn(write)
        .is_ok()
    {
        let _ = is_written.recv_timeout(LAST_LINE_TIMEOUT);
    }
    std::process::exit(EXIT_STATUS)
}

#[cfg(any(test, feature = "testing"))]
pub mod testing {
    //! Puts faults into supervised parts, and notes the ends.

    use std::collections::HashMap;

    use tokio::sync::watch;

    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum PartFault {
        Panics,
        /// It awaits what never comes.
        Hangs,
    }

    /// Faults to inject into parts, by name.
    pub(super) struct PartFaults(watch::Sender<HashMap<&'static str, PartFault>>);

    impl Default for PartFaults {
        fn default() -> Self {
            Self(watch::Sender::new(HashMap::new()))
        }
    }

    impl PartFaults {
        pub(super) fn put_into<T, F>(
            &self,
            part: &'static str,
            task: F,
        ) -> impl Future<Output = T> + use<T, F>
        where
            F: Future<Output = T>,
        {
            let mut faults = self.0.subscribe();
            async move {
                let fault = async move {
                    // The supervisor may be gone: then there is no fault any more.
                    if faults
                        .wait_for(|faults| faults.contains_key(part))
                        .await
                        .is_err()
                    {
                        futures::future::pending::<()>().await;
                    }
                    faults.borrow().get(part).copied()
                };
                tokio::select! {
                    biased;
                    fault = fault => match fault {
                        Some(PartFault::Panics) => panic!("put in by a test"),
                        Some(PartFault::Hangs) | None => futures::future::pending().await,
                    },
                    done = task => done,
                }
            }
        }
    }

    impl Supervisor {
        /// Returns one that only notes the first end.
        pub fn noting() -> (Self, watch::Receiver<Option<ProcessEnd>>) {
            let (sender, ended) = watch::channel(None);
            let note = move |end: &ProcessEnd| {
                sender.send_if_modified(|first| {
                    let is_first = first.is_none();
                    first.get_or_insert_with(|| end.clone());
                    is_first
                });
            };
            (Self::new(note), ended)
        }

        /// Has every part of this name, also those that start later, meet with the fault.
        pub fn put_in(&self, part: &'static str, fault: PartFault) {
            self.0.faults.0.send_modify(|faults| {
                faults.insert(part, fault);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::PartFault;
    use super::*;

    #[tokio::test]
    async fn the_panic_of_a_task_and_of_what_it_starts_is_told_with_its_name() {
        let (supervisor, mut ended) = Supervisor::noting();
        let mut tasks = JoinSet::new();
        supervisor.start(&mut tasks, "parent", async {
            let child = tokio::spawn(inherit(async { panic!("of the child") }));
            child.await.unwrap_or(())
        });
        let first = ended
            .wait_for(Option::is_some)
            .await
            .expect("it is told")
            .clone();
        assert_eq!(
            first,
            Some(ProcessEnd {
                part: "parent",
                reason: "it panicked: of the child".to_owned()
            })
        );
        assert!(tasks.join_next().await.expect("one task").is_ok());

        let (supervisor, mut ended) = Supervisor::noting();
        let alone = supervisor.start_alone("alone", async { assert_eq!(1 + 1, 3) });
        assert!(alone.await.is_err_and(|error| error.is_panic()));
        assert!(ended.wait_for(Option::is_some).await.is_ok());
    }

    #[test]
    fn the_panic_of_a_thread_is_told_with_its_name() {
        let (supervisor, ended) = Supervisor::noting();
        let thread = supervisor
            .start_thread("writer", || panic!("of the {}", "thread"))
            .expect("a thread");
        assert!(thread.join().is_err());
        let expected = ProcessEnd {
            part: "writer",
            reason: "it panicked: of the thread".to_owned(),
        };
        assert_eq!(*ended.borrow(), Some(expected));
    }

    #[tokio::test]
    async fn a_task_that_hangs_counts_no_steps() {
        let (supervisor, ended) = Supervisor::noting();
        let mut tasks = JoinSet::new();
        supervisor.start(&mut tasks, "ticking", async {
            loop {
                beat();
                tokio::task::yield_now().await;
            }
        });
        let ticking = supervisor.beats().pop().expect("it runs").1;
        while ticking.steps() < 10 {
            tokio::task::yield_now().await;
        }
        supervisor.put_in("ticking", PartFault::Hangs);
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        let steps = ticking.steps();
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!((ticking.steps(), ended.borrow().clone()), (steps, None));
        drop((tasks, ticking));
        tokio::task::yield_now().await;
        assert!(
            supervisor.beats().is_empty(),
            "what has ended is not watched"
        );
    }
}
