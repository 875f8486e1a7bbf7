//! [`Scrubber`]: reads again what the node keeps on its disk, now and then: sealed segments of the
//! log, files of witnesses, snapshot files, and the trees of maps. What has rotted is told,
//! counted, and mended while it can still be had from elsewhere. How fast and how often is decided
//! in `sm::scrub`.
//!
//! A tree that is damaged has its replica stopped, as one that any other reader finds damaged: the
//! reconciler opens it again, and that rebuilds the tree. Snapshots are read before trees, so that
//! there is a whole one to rebuild it from.
//!
//! It reads in a thread that steps back behind all others, and holds no lock that an append needs.

use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::protocol::{ScrubDamage, ScrubStatus};
use crate::blocking;
use crate::node::context::NodeContext;
use crate::node::pause;
use crate::raft::Replica;
use crate::sm::scrub::{ScrubKind, first_after_ms, next_after_ms, rest_ms};
use crate::storage::log::Log;
use crate::storage::{Checked, ReadPace, ReplicaKey, background};
use crate::supervisor;
use crate::telemetry::rarely;
use crate::types::GroupId;

/// Between two looks at whether a scrub is due.
const TICK_MAX: Duration = Duration::from_secs(1);
/// Bytes between two rests, and how long a rest is at most before a stop is looked for.
const SLICE_BYTES: u64 = 64 << 10;
const REST_MAX: Duration = Duration::from_millis(50);
/// Number of looks, and the pause between them, for a damaged segment to be gone.
const LET_GO_TRIES: u32 = 20;
const LET_GO_PAUSE: Duration = Duration::from_millis(500);
/// Number of looks, and the pause between them, for a replica to be opened again: its tree is
/// filled anew, which takes time with its size.
const REBUILT_LOOKS: u32 = 1800;
const REBUILT_PAUSE: Duration = Duration::from_millis(500);

/// Damages of one scrub that are told one by one: a disk that fails damages thousands of things.
const DAMAGES_TOLD_MAX: usize = 100;

/// Counts of all scrubs since the start, and the progress of the last one.
#[derive(Debug, Default)]
pub struct Scrubs {
    ledger: Mutex<ScrubLedger>,
    /// Told when one is to begin at once.
    asked: Notify,
}

#[derive(Debug, Default)]
struct ScrubLedger {
    counts: ScrubCounts,
    last: ScrubProgress,
    /// One is to begin at once.
    is_asked: bool,
}

/// Progress of the last scrub that was begun.
#[derive(Debug, Default)]
struct ScrubProgress {
    /// Zero before the first.
    number: u64,
    began: Option<Instant>,
    /// None while it runs.
    took: Option<Duration>,
    was_broken_off: bool,
    bytes: u64,
    bytes_total: u64,
    damaged: u64,
    mended: u64,
    damages: Vec<ScrubDamage>,
}

/// The same, at one time.
#[derive(Debug, Clone, Default)]
pub struct ScrubCounts {
    pub ended: u64,
    pub last_end: Option<SystemTime>,
    pub bytes: u64,
    pub damaged: BTreeMap<ScrubKind, u64>,
    pub mended: BTreeMap<ScrubKind, u64>,
}

impl Scrubs {
    pub fn now(&self) -> ScrubCounts {
        self.lock().counts.clone()
    }

    /// Returns how the last scrub gets on, or the one that is about to begin.
    pub fn status(&self) -> ScrubStatus {
        self.lock().status()
    }

    /// Has a scrub begin at once, unless one runs or is about to begin. Returns how that is.
    pub fn begin_now(&self) -> ScrubStatus {
        let mut ledger = self.lock();
        if !ledger.last.runs() {
            ledger.is_asked = true;
            self.asked.notify_one();
        }
        ledger.status()
    }

    fn lock(&self) -> MutexGuard<'_, ScrubLedger> {
        self.ledger.lock()
    }

    fn begin(&self, bytes_total: u64) {
        let mut ledger = self.lock();
        ledger.is_asked = false;
        ledger.last = ScrubProgress {
            number: ledger.last.number + 1,
            began: Some(Instant::now()),
            bytes_total,
            ..ScrubProgress::default()
        };
    }

    fn end(&self, was_broken_off: bool) {
        let mut ledger = self.lock();

        // One that was broken off has not read everything: metrics must not count it.
        if !was_broken_off {
            ledger.counts.ended += 1;
            ledger.counts.last_end = Some(SystemTime::now());
        }
        ledger.last.was_broken_off = was_broken_off;
        ledger.last.took = ledger.last.began.map(|began| began.elapsed());
    }

    fn count_bytes(&self, bytes: u64) {
        let mut ledger = self.lock();
        ledger.counts.bytes += bytes;
        ledger.last.bytes += bytes;
    }

    fn count_damaged(&self, kind: ScrubKind) {
        let mut ledger = self.lock();
        *ledger.counts.damaged.entry(kind).or_default() += 1;
        ledger.last.damaged += 1;
    }

    fn conclude(&self, kind: ScrubKind, damage: &str, mended: &Result<(), String>) {
        let mut ledger = self.lock();
        if mended.is_ok() {
            *ledger.counts.mended.entry(kind).or_default() += 1;
            ledger.last.mended += 1;
        }
        if ledger.last.damages.len() < DAMAGES_TOLD_MAX {
            ledger.last.damages.push(ScrubDamage {
                kind: kind.name().to_owned(),
                what: damage.to_owned(),
                not_mended: mended.as_ref().err().cloned(),
            });
        }
    }
}

impl ScrubLedger {
    fn status(&self) -> ScrubStatus {
        // Told as one that runs, so that nobody takes the last one for what was asked for.
        if self.is_asked {
            return ScrubStatus {
                number: self.last.number + 1,
                is_running: true,
                ..ScrubStatus::default()
            };
        }
        let last = &self.last;
        let elapsed = || last.began.map(|began| began.elapsed());
        ScrubStatus {
            number: last.number,
            is_running: last.runs(),
            was_broken_off: last.was_broken_off,
            bytes_read: last.bytes,
            bytes_total: last.bytes_total,
            elapsed_ms: millis(last.took.or_else(elapsed).unwrap_or_default()),
            damaged: last.damaged,
            mended: last.mended,
            damages: last.damages.clone(),
        }
    }
}

impl ScrubProgress {
    fn runs(&self) -> bool {
        self.began.is_some() && self.took.is_none()
    }
}

impl ScrubCounts {
    /// Returns when the last one ended, in seconds since 1970; zero before the first has.
    pub fn last_end_seconds(&self) -> f64 {
        let since = self
            .last_end
            .and_then(|end| end.duration_since(UNIX_EPOCH).ok());
        since.map_or(0.0, |since| since.as_secs_f64())
    }
}

/// Begins scrubs.
pub struct Scrubber {
    context: Arc<NodeContext>,
    log: Log,
    scrubs: Arc<Scrubs>,
    every: Duration,
}

impl Scrubber {
    /// Makes a scrubber that reads everything once in `every`; zero is never.
    pub fn new(context: Arc<NodeContext>, log: Log, scrubs: Arc<Scrubs>, every: Duration) -> Self {
        Self {
            context,
            log,
            scrubs,
            every,
        }
    }

    pub async fn run(self, shutdown: &CancellationToken) {
        let every_ms = millis(self.every);
        let mut due = first_after_ms(every_ms).map(after);
        let tick = match self.every {
            Duration::ZERO => TICK_MAX,
            every => TICK_MAX.min(every.max(REST_MAX)),
        };
        let mut running: Option<JoinHandle<bool>> = None;
        while self.waited(shutdown, tick).await {
            if let Some(ended) = running.take_if(|running| running.is_finished()) {
                let is_all_mended = ended.await.unwrap_or(false);
                due = next_after_ms(every_ms, is_all_mended).map(after);
            }
            let is_due = due.is_some_and(|due| due <= Instant::now());
            if running.is_none() && (is_due || self.scrubs.lock().is_asked) {
                let parts = (self.context.clone(), self.log.clone(), self.scrubs.clone());
                let pass = Pass {
                    context: parts.0,
                    log: parts.1,
                    scrubs: parts.2,
                    shutdown: shutdown.clone(),
                };
                running = Some(tokio::spawn(supervisor::inherit(pass.run())));
            }
        }

        // It reads log and maps, which are closed next.
        if let Some(running) = running {
            let _ = running.await;
        }
    }

    /// Waits for a tick, or until a scrub is asked for. Returns whether to go on.
    async fn waited(&self, shutdown: &CancellationToken, tick: Duration) -> bool {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => false,
            () = self.scrubs.asked.notified() => true,
            () = tokio::time::sleep(tick) => true,
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn after(ms: u64) -> Instant {
    // A flag may ask for more than the clock holds.
    Instant::now() + Duration::from_millis(ms.min(1 << 40))
}

/// One scrub.
struct Pass {
    context: Arc<NodeContext>,
    log: Log,
    scrubs: Arc<Scrubs>,
    shutdown: CancellationToken,
}

impl Pass {
    /// Returns whether nothing is left that is damaged.
    async fn run(self) -> bool {
        self.scrubs.begin(self.bytes_total());
        let is_all_mended = self.read_all().await;

        // A scrub that a stop has ended need not be repeated early: it has left no damage behind.
        let was_broken_off = self.shutdown.is_cancelled();
        self.scrubs.end(was_broken_off);
        is_all_mended || was_broken_off
    }

    /// Returns about how many bytes there are to be read.
    fn bytes_total(&self) -> u64 {
        let maps = self.context.registry.groups();
        let maps = maps
            .iter()
            .map(|group| group.snapshot_bytes() + group.state().map_bytes());
        self.log.sealed_bytes() + maps.sum::<u64>()
    }

    async fn read_all(&self) -> bool {
        let mut is_all_mended = true;
        for number in self.log.sealed_segments() {
            let log = self.log.clone();
            let Some(damage) = self
                .read(ScrubKind::Segment, move |pace| {
                    log.check_segment(number, pace)
                })
                .await
            else {
                continue;
            };
            is_all_mended &= self.conclude(ScrubKind::Segment, &damage, self.let_go(number).await);
        }

        // A replica that stops meanwhile can be opened again only once nobody holds it: each is
        // looked up when its turn comes.
        let registry = &self.context.registry;
        let witnesses: Vec<GroupId> = registry
            .witnesses()
            .iter()
            .map(|it| it.key().group)
            .collect();
        for witness in witnesses.into_iter().filter_map(|id| registry.witness(id)) {
            let reading = witness.clone();
            let check = move |_: &mut ReadPace<'_>| reading.check_file();
            let Some(damage) = self.read(ScrubKind::Witness, check).await else {
                continue;
            };
            let rewritten =
                blocking::start(move || witness.rewrite_file().map_err(|error| error.to_string()));
            let rewritten = rewritten
                .await
                .unwrap_or_else(|error| Err(error.to_string()));
            is_all_mended &= self.conclude(ScrubKind::Witness, &damage, rewritten);
        }

        let groups: Vec<GroupId> = registry.groups().iter().map(|it| it.key().group).collect();
        for group in groups.iter().filter_map(|id| registry.get(*id)) {
            is_all_mended &= self.read_snapshot(&group).await;
        }
        for group in groups.iter().filter_map(|id| registry.get(*id)) {
            is_all_mended &= self.read_tree(group).await;
        }
        is_all_mended
    }

    async fn read_snapshot(&self, group: &Arc<Replica>) -> bool {
        let mut is_all_mended = true;
        let state = group.state().clone();
        if let Some(damage) = self
            .read(ScrubKind::Snapshot, move |pace| state.check_snapshot(pace))
            .await
        {
            let rewritten = group
                .rewrite_snapshot()
                .await
                .map_err(|error| error.to_string());
            is_all_mended &= self.conclude(ScrubKind::Snapshot, &damage, rewritten);
        }
        is_all_mended
    }

    async fn read_tree(&self, group: Arc<Replica>) -> bool {
        let state = group.state().clone();
        let Some(damage) = self
            .read(ScrubKind::Tree, move |pace| state.check_tree(pace))
            .await
        else {
            return true;
        };
        let rebuilt = self.rebuild(group, &damage).await;
        self.conclude(ScrubKind::Tree, &damage, rebuilt)
    }

    /// Has a replica stop whose tree is damaged, and waits until it runs again with another.
    async fn rebuild(&self, group: Arc<Replica>, damage: &str) -> Result<(), String> {
        let key = group.key();
        if !self.can_be_rebuilt(&group).await {
            return Err("this is the only replica, and its snapshot is damaged too".to_owned());
        }
        group.state().give_up(damage);
        // It is opened again once nobody holds it.
        drop(group);

        // The reconciler opens it again. Here it is only waited for, to tell whether that was done.
        for _ in 0..REBUILT_LOOKS {
            let runs = self
                .context
                .registry
                .get(key.group)
                .is_some_and(|group| group.key() != key || group.failure().is_none());
            if runs {
                return Ok(());
            }
            if !pause::waited(&self.shutdown, REBUILT_PAUSE).await {
                break;
            }
        }
        Err(format!("replica {key} does not run again yet"))
    }

    /// Returns whether what is in a tree can be had from elsewhere: from other replicas, or from
    /// the snapshot of this one and its log.
    async fn can_be_rebuilt(&self, group: &Replica) -> bool {
        let (own, membership) = (group.key().replica, group.status().membership);
        let mut members = membership.voters.keys().chain(membership.learners.keys());
        if members.any(|replica| *replica != own && !membership.is_witness(*replica)) {
            return true;
        }
        let state = group.state().clone();
        let read = blocking::start(move || state.check_snapshot(&mut |_| true)).await;
        // Where there is none yet, the log has all.
        !matches!(read, Ok(Checked::Damaged(_)) | Err(_))
    }

    /// Reads one thing again. Returns what is wrong with it, having told of it.
    async fn read(
        &self,
        kind: ScrubKind,
        check: impl FnOnce(&mut ReadPace<'_>) -> Checked + Send + 'static,
    ) -> Option<String> {
        if self.shutdown.is_cancelled() {
            return None;
        }
        let (scrubs, shutdown) = (self.scrubs.clone(), self.shutdown.clone());

        // Off the threads that serve, and at a low priority: nobody waits for a scrub.
        let read = blocking::start(move || {
            background::run("scrub", || {
                let mut resting = Resting::new(&scrubs, &shutdown);
                let checked = check(&mut |bytes| resting.read(bytes));
                resting.count();
                checked
            })
        });
        match read.await.map(|read| read.unwrap_or(Checked::Unread)) {
            Ok(Checked::Damaged(damage)) => {
                // Said once a scrub, of each place.
                self.scrubs.count_damaged(kind);
                tracing::error!("a scrub has found damage: {damage}; {}", kind.remedy());
                Some(damage)
            }
            Ok(Checked::Whole | Checked::Unread) => None,
            Err(error) => {
                rarely!(
                    error,
                    "a scrub of a {} was broken off: {error}",
                    kind.name()
                );
                None
            }
        }
    }

    fn conclude(&self, kind: ScrubKind, damage: &str, mended: Result<(), String>) -> bool {
        self.scrubs.conclude(kind, damage, &mended);
        match &mended {
            // Said once a scrub, of each damage.
            Ok(()) => tracing::warn!("that is done: {damage}"),
            Err(reason) => tracing::error!(
                "that was not done, and is tried again by the next scrub: {damage}; {reason}"
            ),
        }
        mended.is_ok()
    }

    /// Has the replicas that keep a segment let go of it. Those that lack what is in it are sent a
    /// snapshot.
    async fn let_go(&self, number: u64) -> Result<(), String> {
        let mut holders = Vec::new();
        for _ in 0..LET_GO_TRIES {
            if !self.log.has_segment(number) {
                return Ok(());
            }

            // Looked up in each round: a segment that is let go of may be kept by others meanwhile.
            holders = self.log.holders(number);
            for (key, upto) in &holders {
                self.let_go_of(*key, *upto).await;
            }
            if !pause::waited(&self.shutdown, LET_GO_PAUSE).await {
                break;
            }
        }
        if !self.log.has_segment(number) {
            return Ok(());
        }
        let list: Vec<String> = holders.iter().map(|(key, _)| key.to_string()).collect();
        Err(format!("it is still kept by {}", list.join(", ")))
    }

    async fn let_go_of(&self, key: ReplicaKey, upto: u64) {
        let registry = &self.context.registry;
        if let Some(group) = registry.get(key.group).filter(|group| group.key() == key) {
            let covers = || {
                group
                    .status()
                    .snapshot
                    .is_some_and(|snapshot| snapshot.index >= upto)
            };
            if !covers()
                && let Err(error) = group.build_snapshot().await
            {
                rarely!(warn, "snapshot of {key} was not written: {error}");
            }

            // Log is let go of only behind a durable snapshot, also log of a damaged segment.
            if covers() {
                group.purge_log(upto).await;
            }
        } else if let Some(witness) = registry
            .witness(key.group)
            .filter(|witness| witness.key() == key)
            && let Err(error) = witness.release_log(true).await
        {
            rarely!(warn, "the log of witness {key} was not purged: {error}");
        }
    }
}

/// Rests after what was read.
struct Resting<'a> {
    scrubs: &'a Scrubs,
    shutdown: &'a CancellationToken,
    began: Instant,
    bytes: u64,
    uncounted: u64,
}

impl<'a> Resting<'a> {
    fn new(scrubs: &'a Scrubs, shutdown: &'a CancellationToken) -> Self {
        Self {
            scrubs,
            shutdown,
            began: Instant::now(),
            bytes: 0,
            uncounted: 0,
        }
    }

    fn read(&mut self, bytes: u64) -> bool {
        self.bytes += bytes;
        self.uncounted += bytes;

        // In slices: small reads cost neither a lock nor a look at the clock.
        if self.uncounted < SLICE_BYTES {
            return true;
        }
        self.count();

        // A simulation has one thread for everything: it would wait for itself.
        if blocking::is_inline() {
            return !self.shutdown.is_cancelled();
        }
        loop {
            if self.shutdown.is_cancelled() {
                return false;
            }
            match Duration::from_millis(rest_ms(self.bytes, millis(self.began.elapsed()))) {
                Duration::ZERO => return true,
                // In short rests, so that a stop is soon seen.
                rest => std::thread::sleep(rest.min(REST_MAX)),
            }
        }
    }

    fn count(&mut self) {
        let bytes = std::mem::take(&mut self.uncounted);
        self.scrubs.count_bytes(bytes);
    }
}
