//! Work that blocks its thread: [`start`] has it done where it holds up no task.
//!
//! A simulation runs a node in one thread, where work elsewhere would end at another moment in each
//! run. There such work is done at once by a task of the thread (`testing::do_inline`), and what
//! is a thread for as long as the node runs is a task too.

use tokio::task::JoinHandle;

/// Does `work` on a thread for blocking work. It is done even if what is returned is dropped, but
/// for the end of the runtime.
pub fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    #[cfg(any(test, feature = "testing"))]
    if is_inline() {
        return tokio::spawn(async move { work() });
    }
    tokio::task::spawn_blocking(work)
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

    thread_local! {
        pub(super) static IS_INLINE: Cell<bool> = const { Cell::new(false) };
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
