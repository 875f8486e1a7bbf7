//! [`Watchdog`]: notices what does not get any further on this node, and does what `sm/stalls`
//! decides.
//!
//! It looks at the writer of the log, the checkpointer, every replica and the controllers. What it
//! finds is told at once in the log, in `/readyz` and in the metrics; a leader that is held up
//! steps down; and where a new start is all that helps, the process ends. A thread of its own
//! watches whether tasks run at all, since this is one of them.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::blocking;
use crate::node::context::NodeContext;
use crate::node::pause;
use crate::raft::ReplicaPosition;
use crate::sm::stalls::{
    self, DISK_BEHIND_MS, ReplicaStalls, StallVerdict, StepDownCause, StepDowns, Still,
    judge_apply, judge_checkpointer, judge_runtime, judge_writer,
};
use crate::storage::ReplicaKey;
use crate::storage::log::{Log, WriterActivity, WriterPhase};
use crate::storage::map::MapStore;
use crate::supervisor::{Beat, ProcessEnd, Supervisor};
use crate::telemetry::rarely;
use crate::types::GroupId;

const TICK: Duration = Duration::from_millis(250);
/// Time beyond this between two looks is not counted: the whole node did not run, and nothing hangs
/// because of that.
const TICK_MAX: Duration = Duration::from_secs(1);
/// The controllers are looked at once in so many ticks.
const CONTROLLERS_EVERY: u64 = 40;
/// Time that a controller may take for one round, most of which ask other nodes.
const ROUND_MAX_MS: u64 = 2 * 60_000;
/// Those that read or write whole maps in one.
const SLOW_CONTROLLERS: [&str; 3] = ["compactor", "janitor", "reconciler"];
const SLOW_ROUND_MAX_MS: u64 = 60 * 60_000;
/// Between two times that the same is told.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// Time that leaderships may take to be handed over before the process ends.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval at which the thread looks whether tasks run.
const RUNTIME_LOOK: Duration = Duration::from_secs(1);

/// The findings, for metrics and readiness.
#[derive(Debug, Default)]
pub struct Findings {
    stalled: Mutex<Option<String>>,
    writer_ms: AtomicU64,
    checkpointer_ms: AtomicU64,
    step_downs: AtomicU64,
}

impl Findings {
    /// Returns what does not get any further now, if anything.
    pub fn stalled(&self) -> Option<String> {
        self.stalled.lock().clone()
    }

    /// Returns for how long each thread of the storage has not got any further though it should
    /// have, in milliseconds.
    pub fn threads_ms(&self) -> [(&'static str, u64); 2] {
        let ms = |ms: &AtomicU64| ms.load(Ordering::Relaxed);
        [
            ("log-writer", ms(&self.writer_ms)),
            ("checkpointer", ms(&self.checkpointer_ms)),
        ]
    }

    /// Returns how often a leader here has stepped down because this node held it up.
    pub fn step_downs(&self) -> u64 {
        self.step_downs.load(Ordering::Relaxed)
    }
}

/// Looks at the parts of a node.
pub struct Watchdog {
    context: Arc<NodeContext>,
    log: Log,
    states: Arc<MapStore>,
    supervisor: Supervisor,
    findings: Arc<Findings>,
    /// Counts the time while the node ran.
    now_ms: u64,
    last: Instant,
    ticks: u64,
    writer: Still,
    checkpointer: Still,
    replicas: BTreeMap<ReplicaKey, ReplicaStalls>,
    /// By the address of their beat.
    controllers: BTreeMap<usize, Still>,
    step_downs: StepDowns,
    stepping_down: JoinSet<()>,
    told: BTreeMap<&'static str, Instant>,
    /// The reason why the process ends next.
    ending: Option<ProcessEnd>,
}

impl Watchdog {
    pub fn new(
        context: Arc<NodeContext>,
        log: Log,
        states: Arc<MapStore>,
        supervisor: Supervisor,
        findings: Arc<Findings>,
    ) -> Self {
        Self {
            context,
            log,
            states,
            supervisor,
            findings,
            now_ms: 0,
            last: Instant::now(),
            ticks: 0,
            writer: Still::default(),
            checkpointer: Still::default(),
            replicas: BTreeMap::new(),
            controllers: BTreeMap::new(),
            step_downs: StepDowns::default(),
            stepping_down: JoinSet::new(),
            told: BTreeMap::new(),
            ending: None,
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        let log = self.log.clone();
        let watched = Arc::new(RuntimeActivity {
            tasks: Beat::default(),
            log: Box::new(move || log.activity()),
        });

        // A task can't see that no task runs: a thread does.
        if let Err(error) = watch_runtime(&self.supervisor, &watched, RUNTIME_LOOK) {
            // Said once, at the start.
            tracing::warn!("nothing watches whether tasks run: {error}");
        }
        while pause::waited(shutdown, TICK).await {
            watched.tasks.step();
            self.look();
            if let Some(ended) = self.ending.take() {
                self.end(&ended).await;
            }
        }
    }

    /// Hands over what is led here, as far as this node still can, and ends it.
    async fn end(&self, ended: &ProcessEnd) {
        let handed = self.context.registry.hand_over(HAND_OVER_TIMEOUT);
        drop(tokio::time::timeout(HAND_OVER_TIMEOUT * 2, handed).await);
        self.supervisor.end(ended);
    }

    fn look(&mut self) {
        let now = Instant::now();

        // While the whole process stood still, no part of it hung: a long gap counts as a short
        // one.
        let passed = now.duration_since(self.last).min(TICK_MAX);
        self.now_ms += u64::try_from(passed.as_millis()).unwrap_or(0);
        self.last = now;
        self.ticks += 1;
        while self.stepping_down.try_join_next().is_some() {}

        let progress = self.context.registry.progress();
        let (of_log, log_hangs) = self.look_at_log(&progress);
        let of_checkpointer = self.look_at_checkpointer(log_hangs);
        let mut stalled = of_log.or(of_checkpointer);
        for replica in &progress {
            let of_replica = self.look_at_replica(replica, log_hangs);
            stalled = stalled.or(of_replica);
        }
        self.replicas
            .retain(|key, _| progress.iter().any(|replica| replica.key == *key));
        *self.findings.stalled.lock() = stalled;

        if self.ticks.is_multiple_of(CONTROLLERS_EVERY) {
            self.look_at_controllers();
        }
    }

    /// Returns what is to be said of the log, and whether it hangs at the disk.
    fn look_at_log(&mut self, progress: &[ReplicaPosition]) -> (Option<String>, bool) {
        let writer = self.log.activity();
        let ms = self.writer.observe(
            self.now_ms,
            writer.steps,
            writer.has_work || writer.phase != WriterPhase::Waits,
        );
        self.findings.writer_ms.store(ms, Ordering::Relaxed);
        let is_at_disk = writer.phase == WriterPhase::Writes;

        // A disk may be slow for a time: the process ends only where the group goes on without it.
        let others_go_on = progress
            .iter()
            .any(|replica| replica.committed > replica.synced);
        let what = if is_at_disk {
            "the disk has not written or synced what the log gave it"
        } else {
            "it does nothing"
        };
        let verdict = judge_writer(ms, is_at_disk, others_go_on);
        let said = self.act(verdict, "log-writer", || {
            format!("{what} for {} s", ms / 1000)
        });
        (said, is_at_disk && ms >= DISK_BEHIND_MS)
    }

    fn look_at_checkpointer(&mut self, log_hangs: bool) -> Option<String> {
        let (steps, has_work) = self.states.checkpointer_activity();
        let ms = self.checkpointer.observe(self.now_ms, steps, has_work);
        self.findings.checkpointer_ms.store(ms, Ordering::Relaxed);
        let verdict = judge_checkpointer(ms, log_hangs);
        self.act(verdict, "checkpointer", || {
            format!("no table was written down for {} s", ms / 1000)
        })
    }

    fn look_at_replica(&mut self, replica: &ReplicaPosition, log_hangs: bool) -> Option<String> {
        let key = replica.key;
        let entry = self.replicas.entry(key).or_default();
        let seen = stalls::ReplicaProgress {
            committed: replica.committed,
            synced: replica.synced,
            applied: replica.applied,
            is_held: replica.is_held,
        };
        entry.observe(self.now_ms, &seen);
        let held_up = *entry;

        // Only a leader that falls behind holds up clients.
        if let Some(cause) = held_up.cause().filter(|_| replica.leads) {
            self.step_down(key.group, cause, &held_up);
        }

        let ms = held_up.map_ms;
        let still_ms = replica.applying.map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        });
        let verdict = judge_apply(ms, still_ms, log_hangs);
        self.act(verdict, "apply", || {
            format!(
                "replica {key} has applied nothing of what is committed for {} s",
                ms / 1000
            )
        })
    }

    /// Does what the verdict says. Returns what there is to say.
    fn act(
        &mut self,
        verdict: StallVerdict,
        part: &'static str,
        reason: impl FnOnce() -> String,
    ) -> Option<String> {
        match verdict {
            StallVerdict::Works => None,
            StallVerdict::Stalls => {
                let line = format!("{part}: {}", reason());
                self.tell(part, &line);
                Some(line)
            }
            StallVerdict::Hangs => {
                let ended = ProcessEnd {
                    part,
                    reason: reason(),
                };
                let line = ended.to_string();
                self.ending = Some(ended);
                Some(line)
            }
        }
    }

    fn tell(&mut self, about: &'static str, line: &str) {
        if self
            .told
            .get(about)
            .is_none_or(|last| last.elapsed() >= TELL_EVERY)
        {
            // Said once in a while, of each part.
            self.told.insert(about, Instant::now());
            tracing::error!("a part of this node stalls: {line}");
        }
    }

    /// Has another replica lead the group, if one is known to be faster.
    fn step_down(&mut self, id: GroupId, cause: StepDownCause, held_up: &ReplicaStalls) {
        // A witness that leads hands over anyway.
        let Some(group) = self.context.registry.get(id) else {
            return;
        };

        // A slow disk still serves, so only a faster one is better; a map that stands still serves
        // nobody.
        let successor = match cause {
            StepDownCause::Disk => group.faster_successor(),
            StepDownCause::Map => group.faster_successor().or_else(|| group.best_successor()),
        };
        let Some(to) = successor else { return };
        if !self.step_downs.take(self.now_ms, id) {
            return;
        }
        let why = match cause {
            StepDownCause::Disk => format!(
                "the disk lacks what others synced {} ms ago",
                held_up.disk_ms
            ),
            StepDownCause::Map => format!(
                "nothing of what is committed was applied for {} ms",
                held_up.map_ms
            ),
        };
        rarely!(warn, "group {id} is handed over to replica {to}: {why}");
        self.findings.step_downs.fetch_add(1, Ordering::Relaxed);
        let step_down = async move {
            if let Err(error) = group.step_down(to).await {
                rarely!(
                    warn,
                    "group {id} was not handed over, and is led on: {error}"
                );
            }
        };
        self.supervisor
            .start(&mut self.stepping_down, "step-down", step_down);
    }

    /// Those that hang hold up no client, so that it is enough to tell of them.
    fn look_at_controllers(&mut self) {
        let mut seen = BTreeMap::new();
        for (part, beat) in self.supervisor.beats() {
            // Not every task counts its rounds.
            if beat.steps() == 0 {
                continue;
            }
            let place = Arc::as_ptr(&beat) as usize;
            let mut still = self.controllers.get(&place).copied().unwrap_or_default();
            let ms = still.observe(self.now_ms, beat.steps(), true);
            seen.insert(place, still);
            let max = if SLOW_CONTROLLERS.contains(&part) {
                SLOW_ROUND_MAX_MS
            } else {
                ROUND_MAX_MS
            };
            if ms >= max {
                self.tell(
                    part,
                    &format!("the {part} has been at one round for {} s", ms / 1000),
                );
            }
        }
        self.controllers = seen;
    }
}

/// Activity that the thread watches which sees whether tasks run.
struct RuntimeActivity {
    /// Counts what one of the tasks does.
    tasks: Beat,
    /// Says what the writer of the log does.
    log: Box<dyn Fn() -> WriterActivity + Send + Sync>,
}

/// Watches from a thread whether tasks run, until `watched` is dropped. Looks are counted, and not
/// time, because a process that is stopped for a while does not hang.
fn watch_runtime(
    supervisor: &Supervisor,
    watched: &Arc<RuntimeActivity>,
    look: Duration,
) -> io::Result<()> {
    // The clock of a simulation is not that of its thread.
    if blocking::is_inline() {
        return Ok(());
    }
    let (ending, watched) = (supervisor.clone(), Arc::downgrade(watched));
    let watch = move || {
        let (mut tasks, mut writer) = (None, None);
        // In a row without a task, and those of them at which the disk did not hang.
        let (mut looks, mut own) = (0, 0);
        let mut is_told = false;
        loop {
            std::thread::sleep(look);
            let Some(watched) = watched.upgrade() else {
                return;
            };
            let log = (watched.log)();
            // Reads of a disk that hangs may block all threads of the tasks.
            let disk_hangs = log.phase == WriterPhase::Writes && writer == Some(log.steps);
            writer = Some(log.steps);
            let steps = Some(watched.tasks.steps());
            if steps != tasks {
                (tasks, looks, own, is_told) = (steps, 0, 0, false);
                continue;
            }

            looks += 1;
            own += u64::from(!disk_hangs);
            match judge_runtime(looks, own) {
                StallVerdict::Works => {}
                StallVerdict::Stalls => {
                    // Said once, until tasks run again.
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::error!(
                            "a part of this node stalls: no task has run for {looks} looks, \
                            {look:?} apart"
                        );
                    }
                }
                StallVerdict::Hangs => {
                    let reason = format!("no task has run for {looks} looks, {look:?} apart");
                    ending.end(&ProcessEnd {
                        part: "runtime",
                        reason,
                    });
                }
            }
        }
    };
    supervisor.start_thread("watchdog", watch).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(20);

    /// Blocks the only thread of a runtime, with the log at what `log` says, until `is_over` or for
    /// long.
    fn block(
        log: impl Fn() -> WriterActivity + Send + Sync + 'static,
        is_over: impl Fn(Option<&ProcessEnd>) -> bool,
    ) -> Option<ProcessEnd> {
        let (supervisor, mut ended) = Supervisor::noting();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let watched = Arc::new(RuntimeActivity {
                tasks: Beat::default(),
                log: Box::new(log),
            });
            watch_runtime(&supervisor, &watched, LOOK).expect("a thread");
            let ticking = watched.clone();
            let ticks = tokio::spawn(async move {
                loop {
                    ticking.tasks.step();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            tokio::time::sleep(LOOK * 4).await;
            assert_eq!(*ended.borrow_and_update(), None);

            let noticed = std::time::Instant::now();
            while !is_over(ended.borrow().as_ref()) && noticed.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(5));
            }
            ticks.abort();
        });
        ended.borrow().clone()
    }

    #[test]
    fn a_runtime_whose_threads_all_hang_is_noticed_by_a_thread() {
        let idle = || WriterActivity {
            phase: WriterPhase::Waits,
            steps: 7,
            has_work: true,
        };
        let ended = block(idle, |ended| ended.is_some());
        assert_eq!(ended.map(|ended| ended.part), Some("runtime"));
    }

    #[test]
    fn a_runtime_that_hangs_with_the_disk_ends_no_process() {
        let looks = Arc::new(AtomicU64::new(0));
        let counted = looks.clone();
        let hangs = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            WriterActivity {
                phase: WriterPhase::Writes,
                steps: 7,
                has_work: true,
            }
        };
        let ended = block(hangs, |_| looks.load(Ordering::Relaxed) > 150);
        assert!(
            looks.load(Ordering::Relaxed) > 150,
            "it was not looked at for long"
        );
        assert_eq!(ended, None);
    }
}
