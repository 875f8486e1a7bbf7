//! [`Seeds`]: many lives, of one seed after the other, on all processors.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::scenarios::{Watchdog, command, live, live_twice, shrink};
use crate::world::determinism::real_now;
use crate::world::run::{Life, Scenario};

/// Between two lines of progress, on a terminal and elsewhere.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
const PROGRESS_EVERY_QUIET: Duration = Duration::from_secs(10);
/// So many failures are shrunk. Each takes some ten lives.
const SHRUNK_MAX: u64 = 3;

/// Runs many lives.
pub struct Seeds {
    /// The first. The others differ in their seeds alone.
    pub first: Scenario,
    /// Number of lives; None: until there is no more time.
    pub count: Option<u64>,
    /// For how long; None: until all were run.
    pub time: Option<Duration>,
    /// Runs each twice, to compare the two.
    pub is_twice: bool,
}

#[derive(Debug, Default)]
struct Totals {
    seeds: u64,
    operations: u64,
    faults: u64,
    view_changes: u64,
    simulated_ms: u64,
    violations: u64,
    shrunk: u64,
    /// Lives that could not be run.
    broken: u64,
}

struct Run {
    seeds: Seeds,
    began: Duration,
    next: AtomicU64,
    is_over: AtomicBool,
    totals: Mutex<Totals>,
}

impl Seeds {
    /// Runs them, and tells what was wrong.
    pub fn run(self) -> ExitCode {
        let workers = std::thread::available_parallelism().map_or(1, |count| count.get());
        let run = Run {
            seeds: self,
            began: real_now(),
            next: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            totals: Mutex::default(),
        };
        std::thread::scope(|scope| {
            let working: Vec<_> = (0..workers).map(|_| scope.spawn(|| run.work())).collect();
            let progress = scope.spawn(|| run.tell_progress());
            let panicked = working
                .into_iter()
                .filter_map(|worker| worker.join().err())
                .count();
            run.totals.lock().broken += panicked as u64;
            run.is_over.store(true, Ordering::Relaxed);
            progress.thread().unpark();
        });
        let totals = run.totals.into_inner();
        let took_m = real_now().saturating_sub(run.began).as_secs_f64() / 60.0;
        println!(
            "{} seeds, {} operations, {} faults, {} view changes, {:.1} simulated hours in \
             {took_m:.1} minutes, {} violations",
            totals.seeds,
            totals.operations,
            totals.faults,
            totals.view_changes,
            totals.simulated_ms as f64 / 3_600_000.0,
            totals.violations
        );
        match (totals.broken, totals.violations) {
            (0, 0) => ExitCode::SUCCESS,
            (0, _) => ExitCode::from(1),
            _ => ExitCode::from(2),
        }
    }
}

impl Run {
    fn work(&self) {
        while let Some(scenario) = self.next() {
            let watchdog = Watchdog::of(&scenario);
            let life = match self.seeds.is_twice {
                true => live_twice(&scenario),
                false => live(&scenario),
            };
            drop(watchdog);
            self.note(&scenario, life);
        }
    }

    /// Returns the next life, if there is time for it.
    fn next(&self) -> Option<Scenario> {
        let spent = real_now().saturating_sub(self.began);
        if self.is_over.load(Ordering::Relaxed) || self.seeds.time.is_some_and(|time| spent >= time)
        {
            return None;
        }
        let nth = self.next.fetch_add(1, Ordering::Relaxed);
        self.seeds.count.is_none_or(|count| nth < count).then(|| {
            let first = &self.seeds.first;
            Scenario {
                seed: first.seed.wrapping_add(nth),
                ..first.clone()
            }
        })
    }

    fn note(&self, scenario: &Scenario, life: Option<Life>) {
        let mut totals = self.totals.lock();
        totals.seeds += 1;
        let Some(life) = life else {
            totals.broken += 1;
            println!("seed {} could not be run", scenario.seed);
            return;
        };
        totals.operations += life.operations;
        totals.faults += life.faults;
        totals.view_changes += life.view_changes;
        totals.simulated_ms += life.simulated_ms;
        let Some(violation) = life.violation else {
            return;
        };
        totals.violations += 1;
        println!("seed {}: {violation}", scenario.seed);
        println!("  to see it: {}", command(scenario));

        // One time is enough to catch a mutant, and what two runs differ in is not smaller.
        if scenario.mutant.is_some() {
            self.is_over.store(true, Ordering::Relaxed);
            return;
        }
        if self.seeds.is_twice || totals.shrunk >= SHRUNK_MAX {
            return;
        }
        totals.shrunk += 1;
        drop(totals);
        let (least, violation) = shrink(scenario, &violation);
        if least != *scenario {
            println!("seed {}, with less going wrong: {violation}", least.seed);
            println!("  to see it: {}", command(&least));
        }
    }

    /// Tells on standard error how far it is, again and again until all is over.
    fn tell_progress(&self) {
        let is_terminal = std::io::stderr().is_terminal();
        let (every, start, end) = match is_terminal {
            true => (PROGRESS_EVERY, "\r\x1b[K", ""),
            false => (PROGRESS_EVERY_QUIET, "", "\n"),
        };
        let mut last = self.began;
        while !self.is_over.load(Ordering::Relaxed) {
            std::thread::park_timeout(every);
            if real_now().saturating_sub(last) < every {
                continue;
            }
            last = real_now();
            let totals = self.totals.lock();
            let _ = write!(
                std::io::stderr(),
                "{start}{} seeds in {} s, {} violations{end}",
                totals.seeds,
                last.saturating_sub(self.began).as_secs(),
                totals.violations
            );
        }
        if is_terminal {
            let _ = write!(std::io::stderr(), "{start}");
        }
    }
}
