//! Work that blocks its thread: [`start`] has it done where it holds up no task.
//!
//! A simulation runs a node in one thread, where work elsewhere would end at another moment in each
//! run. There such work is done at once by a task of the thread (`testing::do_inline`), and what
//! is a thread for as long as the node runs is a task too.

use std::future::Future;
use std::time::Duration;

use futures::FutureExt;
use tokio::task::JoinHandle;

/// Does `work` on a thread for blocking work. It is done even if what is returned is dropped, but
/// for the end of the runtime.
pub fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    #[cfg(any(test, feature = "testing"))]
    if is_inline() {
        return tokio::spawn(async move {
            wait_for_the_disk().await;
            work()
        });
    }
    tokio::task::spawn_blocking(work)
}

/// Does work that pauses nothing but its thread, as [`pause`] does. Within it a simulation has
/// nothing pause.
pub fn at_once<T>(work: impl Future<Output = T>) -> T {
    #[cfg(any(test, feature = "testing"))]
    let _hold = testing::PauseHold::begin();
    work.now_or_never()
        .expect("outside of a simulation it is the thread that pauses")
}

/// Returns whether what runs now may [`pause`].
pub fn may_pause() -> bool {
    #[cfg(any(test, feature = "testing"))]
    return !(is_inline() && testing::IS_HELD.get());
    #[cfg(not(any(test, feature = "testing")))]
    true
}

/// Pauses the thread; in a simulation, the task.
pub async fn pause(pause: Duration) {
    #[cfg(any(test, feature = "testing"))]
    if is_inline() {
        return tokio::time::sleep(pause).await;
    }
    std::thread::sleep(pause);
}

/// Waits in a simulation for as long as the disk is to take for what comes next. Elsewhere the disk
/// itself takes its time.
pub async fn wait_for_the_disk() {
    #[cfg(any(test, feature = "testing"))]
    if let Some(pause) = testing::next_wait() {
        tokio::time::sleep(pause).await;
    }
}

/// Returns whether the caller is in a simulation, which has one thread for everything.
pub fn is_inline() -> bool {
    #[cfg(any(test, feature = "testing"))]
    return testing::IS_INLINE.get();
    #[cfg(not(any(test, feature = "testing")))]
    false
}

#[cfg(any(test, feature = "testing"))]
pub mod testing {
    //! For simulations only.

    use std::cell::Cell;
    use std::time::Duration;

    thread_local! {
        pub(super) static IS_INLINE: Cell<bool> = const { Cell::new(false) };
        pub(super) static IS_HELD: Cell<bool> = const { Cell::new(false) };
        static DISK_PACE: Cell<Option<DiskPace>> = const { Cell::new(None) };
    }

    /// Says how long the disk of the nodes in this thread takes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct DiskPace {
        /// Each wait follows from it.
        pub seed: u64,
        /// One in so many has to wait; 0 is taken for 1.
        pub one_in: u64,
        /// The longest wait.
        pub wait_ms_max: u64,
    }

    /// Has the disk take so long from now on, or no time at all.
    pub fn pace(pace: Option<DiskPace>) {
        DISK_PACE.set(pace);
    }

    /// Has nothing of this thread pause, for as long as it is there.
    pub(super) struct PauseHold {
        was_held: bool,
    }

    impl PauseHold {
        pub fn begin() -> Self {
            Self {
                was_held: IS_HELD.replace(true),
            }
        }
    }

    impl Drop for PauseHold {
        fn drop(&mut self) {
            IS_HELD.set(self.was_held);
        }
    }

    pub(super) fn next_wait() -> Option<Duration> {
        if IS_HELD.get() {
            return None;
        }
        let mut pace = DISK_PACE.get()?;
        // xorshift64 (Marsaglia), which zero would stop.
        let mut seed = pace.seed.max(1);
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        pace.seed = seed;
        DISK_PACE.set(Some(pace));
        let has_to_wait = (seed >> 32).is_multiple_of(pace.one_in.max(1));
        let wait_ms = (seed & 0xffff_ffff) % (pace.wait_ms_max + 1);
        has_to_wait.then(|| Duration::from_millis(wait_ms))
    }

    /// Has blocking work of nodes in this thread done by their tasks from now on.
    pub fn do_inline() {
        IS_INLINE.set(true);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn the_waits_of_a_disk_follow_from_its_pace() {
        assert_eq!(
            testing::next_wait(),
            None,
            "a disk takes no time by default"
        );
        let waits = |one_in: u64| -> Vec<Option<Duration>> {
            testing::pace(Some(testing::DiskPace {
                seed: 5,
                one_in,
                wait_ms_max: 20,
            }));
            (0..100).map(|_| testing::next_wait()).collect()
        };
        assert_eq!(waits(1), waits(1));
        let all = waits(1);
        assert!(all.iter().flatten().all(|wait| wait.as_millis() <= 20));
        assert!(all.iter().all(Option::is_some) && all.iter().any(|wait| *wait != all[0]));
        let some = waits(4).iter().flatten().count();
        assert!((1..60).contains(&some), "{some} of 100");
        testing::pace(None);
    }

    #[test]
    fn what_is_done_at_once_does_not_wait_for_the_disk_of_a_simulation() {
        let run = || {
            testing::do_inline();
            testing::pace(Some(testing::DiskPace {
                seed: 5,
                one_in: 1,
                wait_ms_max: 20,
            }));
            at_once(async {
                wait_for_the_disk().await;
                assert!(!may_pause());
            });
            assert!(may_pause() && testing::next_wait().is_some());
        };
        thread::spawn(run).join().expect("no panic");
    }

    async fn thread_of_work() -> thread::ThreadId {
        start(|| thread::current().id()).await.expect("it is done")
    }

    #[test]
    fn work_is_done_elsewhere_and_in_a_simulation_by_the_only_thread() {
        let run = |is_simulated: bool| {
            let thread = thread::spawn(move || {
                if is_simulated {
                    testing::do_inline();
                }
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .build()
                    .expect("a runtime");
                runtime.block_on(thread_of_work()) == thread::current().id()
            });
            thread.join().expect("no panic")
        };
        assert!(run(true) && !run(false));
    }
}
