//! Runs work on large bodies and answers where it delays no other task: the threads that serve also
//! carry heartbeats.

use tokio::runtime::{Handle, RuntimeFlavor};

/// A body from this size on takes milliseconds to read, or to make.
const LARGE_BYTES: usize = 256 << 10;

/// Does what takes long for so many bytes. Other tasks of this thread go on elsewhere meanwhile,
/// those of the same request wait.
pub fn work<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    let has_others = || {
        Handle::try_current()
            .is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::MultiThread)
    };
    if bytes >= LARGE_BYTES && has_others() {
        tokio::task::block_in_place(work)
    } else {
        work()
    }
}
