//! Which reads wait for the disk, and how many of each kind may at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::blocking;

/// A read that takes no longer has not waited for a disk, or not so that it matters.
const QUICK: Duration = Duration::from_micros(500);
/// Slow reads may take one part in this many of the time of serving threads.
const SHARE: u32 = 10;
/// Time that slow reads may take at once.
const BURST: Duration = Duration::from_millis(30);
/// For how long reads go elsewhere after they took more; renewed for as long as they are slow
/// there.
const ELSEWHERE_FOR: Duration = Duration::from_secs(5);

/// Reads of each kind that wait for the disk at a time. A disk that has much to do at once does it
/// faster; each costs a thread.
const KEYS_AT_ONCE: usize = 32;
const PAGES_AT_ONCE: usize = 4;
const ENTRIES_AT_ONCE: usize = 16;

/// Purpose of a read of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadKind {
    /// One key, or a few.
    Keys,
    /// Many of them: a listing, a count, a chunk of a move.
    Page,
    /// Keys that an entry changes.
    Entry,
}

/// The threads that reads wait for the disk on.
pub(super) struct Readers {
    keys: Arc<Semaphore>,
    pages: Arc<Semaphore>,
    entries: Arc<Semaphore>,
    count: AtomicU64,
}

impl Default for Readers {
    fn default() -> Self {
        Self {
            keys: Arc::new(Semaphore::new(KEYS_AT_ONCE)),
            pages: Arc::new(Semaphore::new(PAGES_AT_ONCE)),
            entries: Arc::new(Semaphore::new(ENTRIES_AT_ONCE)),
            count: AtomicU64::new(0),
        }
    }
}

impl Readers {
    /// Returns how many reads of single keys, and of what entries change, were done here.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Does `work` on one of the threads. A panic of it goes on here.
    pub async fn run<T: Send + 'static>(
        &self,
        kind: ReadKind,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let turns = match kind {
            ReadKind::Keys => &self.keys,
            ReadKind::Page => &self.pages,
            ReadKind::Entry => &self.entries,
        };
        let turn = turns
            .clone()
            .acquire_owned()
            .await
            .expect("nobody closes it");
        self.count
            .fetch_add(u64::from(kind != ReadKind::Page), Ordering::Relaxed);
        // The turn lasts as long as the work, also if nobody waits for that any more.
        let work = move || {
            let _turn = turn;
            work()
        };
        match blocking::start(work).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and this task with it.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

/// Estimates from their durations whether reads of single keys wait for the disk.
///
/// It is an account: slow reads fill it, time empties it. Past its limit reads go elsewhere for a
/// while.
pub(super) struct DiskWaits {
    start: Instant,
    /// Microseconds after `start` at which the account is empty again.
    empty_at_us: AtomicU64,
    /// Until when reads go elsewhere, likewise. Zero: they do not.
    elsewhere_until_us: AtomicU64,
}

impl Default for DiskWaits {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Self {
            start: Instant::now(),
            empty_at_us: zero(),
            elsewhere_until_us: zero(),
        }
    }
}

impl DiskWaits {
    pub fn now_us(&self) -> u64 {
        micros(self.start.elapsed())
    }

    /// Notes how long a read took. Returns whether they take too much by now.
    pub fn note(&self, took: Duration) -> bool {
        if took < QUICK {
            return false;
        }
        let now = self.now_us();
        let filled = |empty_at: u64| empty_at.max(now).saturating_add(micros(took * SHARE));
        let update = self
            .empty_at_us
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |at| Some(filled(at)));
        let empty_at = update.map_or_else(filled, filled);
        empty_at - now > micros(BURST * SHARE)
    }

    pub fn go_elsewhere(&self) {
        let now = self.now_us();
        self.elsewhere_until_us
            .store(now + micros(ELSEWHERE_FOR), Ordering::Relaxed);
        // What led to it is paid for; reads that are slow there fill it again.
        self.empty_at_us.store(now, Ordering::Relaxed);
    }

    pub fn is_elsewhere(&self) -> bool {
        let until = self.elsewhere_until_us.load(Ordering::Relaxed);
        if until == 0 {
            return false;
        }
        let is_elsewhere = self.now_us() < until;
        if !is_elsewhere {
            let _ = self.elsewhere_until_us.compare_exchange(
                until,
                0,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        is_elsewhere
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
