//! Work that nobody waits for with a request: it takes the processor when there is nothing else to
//! do.

use std::io;

use crate::blocking;

/// Nice value of background threads on Linux: a third of the normal share of the processor is left.
/// Not less, because a map that is written to meanwhile must be filled before the log that it goes
/// on from is purged.
#[cfg(target_os = "linux")]
const NICENESS: i32 = 5;

/// Does `work` in a thread of its own that steps back behind all others of the machine, and waits
/// for it; in a simulation, in the caller's. Blocking. A panic of `work` goes on here.
pub fn run<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    if blocking::is_inline() {
        return Ok(work());
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, || {
                step_back();
                work()
            })?;
        Ok(thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Elsewhere than on Linux only a whole process could.
fn step_back() {
    #[cfg(target_os = "linux")]
    if let Err(error) = more_nice() {
        tracing::debug!(%error, "a thread has the same priority as the others");
    }
}

#[cfg(target_os = "linux")]
fn more_nice() -> rustix::io::Result<()> {
    use rustix::process::{getpriority_process, setpriority_process};
    let thread = Some(rustix::thread::gettid());
    setpriority_process(thread, getpriority_process(thread)? + NICENESS)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn only_the_thread_of_the_work_steps_back() {
        let niceness = || {
            rustix::process::getpriority_process(Some(rustix::thread::gettid()))
                .expect("a thread has one")
        };
        let before = niceness();
        let within = run("test", niceness).expect("there can be one more thread");
        assert_eq!((within, niceness()), ((before + NICENESS).min(19), before));
    }
}
