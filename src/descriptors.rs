//! Descriptors of this process: how many it may have, who may take how many, and waiting for one
//! where there is none.
//!
//! Connections, the files of log and maps, and calls to other nodes all take from the one limit of
//! open files. What clients can take is kept so low that the others never run out; where they do
//! all the same (somebody lowered the limit, or the whole machine has none left), that is no error
//! of a disk: [`patiently`] waits until there is one again.
//!
//! Kept out: who counts connections (`http`) and calls (`client`).

use parking_lot::Mutex;
use std::fmt::Display;
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Handle;

/// For a process without a limit: more than any default below makes use of.
const UNLIMITED: u64 = 1 << 30;

/// Between two attempts to get a descriptor: closing a connection takes no longer.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Time that a thread of a runtime waits for a descriptor.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(2);
/// Interval between log lines that say that no descriptor is free.
const SAY_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Divides the descriptors that a process may have among its users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// The limit of open files.
    pub limit: usize,
    /// Log, maps, snapshots, and what the runtime has: a few dozen, and one more for each segment
    /// that the log can't let go of.
    pub files: usize,
    /// Connections to other nodes.
    pub calls: usize,
    /// Connections of other nodes that come when clients have taken all of theirs.
    pub peers: usize,
    /// Connections of clients.
    pub clients: usize,
}

impl Shares {
    /// Shares out `limit` descriptors.
    pub fn of(limit: usize) -> Self {
        let files = (limit / 8).clamp(48, 1024);
        let peers = (limit / 16).clamp(16, 512);
        let calls = (limit / 4).clamp(32, 8192);
        // A limit so low that nothing is left is one with which no node can run. Eight connections
        // are enough to ask it why.
        let clients = limit.saturating_sub(files + peers + calls).max(8);
        Self {
            limit,
            files,
            calls,
            peers,
            clients,
        }
    }

    /// Returns the shares of the limit as it is now.
    pub fn now() -> Self {
        Self::of(limit())
    }

    /// Returns true if enough descriptors are left for others after a client got this one. The
    /// kernel hands out the lowest free number, so the number bounds how many are in use.
    pub fn leaves_enough(&self, given: RawFd) -> bool {
        let given = usize::try_from(given).unwrap_or(usize::MAX);
        given
            < self
                .limit
                .saturating_sub((self.files + self.calls + self.peers) / 2)
    }

    /// The same of a peer.
    pub fn leaves_enough_of_peers(&self, given: RawFd) -> bool {
        let given = usize::try_from(given).unwrap_or(usize::MAX);
        given < self.limit.saturating_sub((self.files + self.calls) / 2)
    }
}

/// Returns how many descriptors this process may have.
pub fn limit() -> usize {
    let limit = getrlimit(Resource::Nofile)
        .current
        .unwrap_or(UNLIMITED)
        .min(UNLIMITED);
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// Lets this process have as many as it may: the usual limit, 1024, is low only so that old
/// programs don't fail.
pub fn raise() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    match setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    ) {
        Ok(()) => {
            tracing::debug!(from = ?limit.current, to = ?limit.maximum, "raised the limit of open \
                files")
        }
        Err(error) => {
            tracing::warn!(limit = ?limit.current, %error, "the limit of open files can't be \
                raised")
        }
    }
}

/// Returns how many this process has now. None: the system does not tell.
pub fn in_use() -> Option<usize> {
    // One of them is that of the directory.
    fs::read_dir("/proc/self/fd")
        .ok()
        .map(|entries| entries.count().saturating_sub(1))
}

/// Returns whether an error says that there is no descriptor left, in this process or on the
/// machine.
pub fn are_exhausted(error: &io::Error) -> bool {
    let numbers =
        [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE].map(rustix::io::Errno::raw_os_error);
    error
        .raw_os_error()
        .is_some_and(|number| numbers.contains(&number))
}

/// Does `call`, again and again while there is no descriptor for it: that passes, and says nothing
/// of what was to be done. Blocking. `what` is the end of a sentence for the log.
///
/// # Errors
///
/// Any other of `call`; and that there is none, as [`retry`] says.
pub fn patiently<T>(what: &str, call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    retry(what, call, are_exhausted)
}

/// The same for any error: `lacks` says whether it is that there is no descriptor left.
///
/// A thread of a runtime waits for two seconds only, because it may be one of those that would
/// close connections; then the error is returned. The threads of log and checkpoints wait for as
/// long as it takes.
///
/// # Errors
///
/// That of `call`.
pub fn retry<T, E: Display>(
    what: &str,
    mut call: impl FnMut() -> Result<T, E>,
    lacks: impl Fn(&E) -> bool,
) -> Result<T, E> {
    // Almost always there is one: no clock is read then.
    let mut result = call();
    let began = Instant::now();
    let mut pause = PAUSE_MIN;

    while let Err(error) = &result
        && lacks(error)
    {
        if is_to_be_said() {
            tracing::warn!(
                limit = limit(),
                waited = ?began.elapsed(),
                "no descriptor is left to {what} ({error}); it is tried until there is one. Raise \
                 the limit of open files (ulimit -n, LimitNOFILE), or lower --max-connections"
            );
        }
        if began.elapsed() >= RUNTIME_PATIENCE && Handle::try_current().is_ok() {
            break;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
        result = call();
    }
    result
}

/// Returns whether nobody has said so for a while: many may wait at a time.
fn is_to_be_said() -> bool {
    static SAID: Mutex<Option<Instant>> = Mutex::new(None);
    let mut said = SAID.lock();
    let is_due = said.is_none_or(|said| said.elapsed() >= SAY_AGAIN_AFTER);
    if is_due {
        *said = Some(Instant::now());
    }
    is_due
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_any_limit_leave_room_for_files_and_peers() {
        for limit in [220, 256, 1024, 4096, 20_000, 1 << 20] {
            let shares = Shares::of(limit);
            let all = shares.files + shares.calls + shares.peers + shares.clients;
            assert!(
                all <= limit && shares.files >= 48 && shares.peers >= 16,
                "{shares:?}"
            );
            assert!(shares.clients >= limit / 3, "{shares:?}");
        }
        assert!(Shares::of(20_000).clients > 10_000);
        assert_eq!(Shares::of(10).clients, 8);
    }

    #[test]
    fn the_number_of_a_descriptor_tells_how_many_are_left() {
        let shares = Shares::of(220);
        let last = RawFd::try_from(shares.limit - (shares.files + shares.calls + shares.peers) / 2)
            .expect("a small number");
        assert!(shares.leaves_enough(last - 1) && !shares.leaves_enough(last));
        assert!(shares.leaves_enough_of_peers(last) && !shares.leaves_enough_of_peers(219));
    }

    #[test]
    fn a_call_is_repeated_while_there_is_no_descriptor_and_only_then() {
        let mut left = 3;
        let mut call = || {
            left -= 1;
            let number = if left % 2 == 0 {
                rustix::io::Errno::MFILE
            } else {
                rustix::io::Errno::NFILE
            };
            if left > 0 { Err(number.into()) } else { Ok(7) }
        };
        assert_eq!(patiently("test", &mut call).expect("in the end"), 7);
        let other = patiently("test", || Err::<(), _>(io::ErrorKind::NotFound.into()));
        assert_eq!(
            other.expect_err("another error").kind(),
            io::ErrorKind::NotFound
        );
    }
}
