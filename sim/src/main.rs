//! `quorate-sim`: lives of simulated clusters, one from each seed. Built and run by
//! `scripts/simulate.sh`.
//!
//! Ends with 0 where nothing was wrong, 1 where something was, 2 where it could not run.

mod world;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use clap::Parser;
use quorate::mutants::{self, Mutant};

use world::determinism::real_now;
use world::run::{Fault, Life, simulate};

/// A life that takes longer than this hangs.
const LIFE_TIMEOUT: Duration = Duration::from_secs(180);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Simulates clusters.
#[derive(Debug, Clone, Parser)]
#[command(name = "simulate.sh")]
struct Arguments {
    /// Runs this one, and tells what happened.
    #[arg(long, conflicts_with_all = ["seeds", "minutes"])]
    seed: Option<u64>,
    /// Runs so many.
    #[arg(long)]
    seeds: Option<u64>,
    /// Runs for so long, or until all seeds were run.
    #[arg(long)]
    minutes: Option<f64>,
    /// The first of the seeds.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Puts this fault into the nodes, to see whether it is found.
    #[arg(long)]
    mutant: Option<String>,
    /// Lists the faults that can be put into nodes.
    #[arg(long)]
    mutants: bool,
    /// What may go wrong; all of it if none is named.
    #[arg(long, value_enum, value_delimiter = ',')]
    faults: Option<Vec<Fault>>,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    if let Ok(filter) = std::env::var("QUORATE_SIM_LOG") {
        let filter = tracing_subscriber::EnvFilter::new(filter);
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .init();
    }
    // Without a backtrace, which is not the same in every build.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let mut faults = arguments
        .faults
        .clone()
        .unwrap_or_else(|| Fault::ALL.to_vec());
    faults.sort();
    faults.dedup();
    if arguments.mutants {
        for (name, _, what) in mutants::ALL {
            println!("{name}  {what}");
        }
        return ExitCode::SUCCESS;
    }
    let mutant = match &arguments.mutant {
        None => None,
        Some(asked) => match mutants::ALL.iter().find(|(name, ..)| name == asked) {
            Some((_, mutant, _)) => Some(*mutant),
            None => {
                eprintln!("there is no mutant {asked}: --mutants lists them");
                return ExitCode::from(2);
            }
        },
    };
    match arguments.seed {
        Some(seed) => one(seed, &faults, mutant),
        None => many(&arguments, faults, mutant),
    }
}

/// Runs one seed in a thread of its own, whose source of entropy nobody has used yet.
fn live(seed: u64, faults: &[Fault], mutant: Option<Mutant>) -> Option<Life> {
    let faults = faults.to_vec();
    let thread = std::thread::Builder::new()
        .name(format!("seed-{seed}"))
        .stack_size(16 << 20)
        .spawn(move || simulate(seed, &faults, mutant));
    thread.ok()?.join().ok()
}

fn one(seed: u64, faults: &[Fault], mutant: Option<Mutant>) -> ExitCode {
    let is_over = Arc::new(AtomicBool::new(false));
    watch(seed, &is_over);
    let Some(life) = live(seed, faults, mutant) else {
        eprintln!("seed {seed} could not be run");
        return ExitCode::from(2);
    };
    is_over.store(true, Ordering::Relaxed);
    print!("{}", life.story);
    println!("{}", life.summary());
    match life.violation {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::from(1),
    }
}

/// Ends the process if a life does not end.
fn watch(seed: u64, is_over: &Arc<AtomicBool>) {
    let is_over = is_over.clone();
    let began = real_now();
    std::thread::spawn(move || {
        while !is_over.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK_EVERY);
            if real_now() - began > LIFE_TIMEOUT {
                eprintln!("seed {seed} does not end");
                std::process::exit(2);
            }
        }
    });
}

fn many(arguments: &Arguments, faults: Vec<Fault>, mutant: Option<Mutant>) -> ExitCode {
    let began = real_now();
    let time = match arguments.minutes {
        Some(minutes) if minutes.is_finite() && minutes >= 0.0 => {
            Duration::from_secs_f64((minutes * 60.0).min(1e9))
        }
        Some(_) => {
            eprintln!("--minutes wants a number of minutes");
            return ExitCode::from(2);
        }
        None => Duration::MAX,
    };
    let seeds = match (arguments.seeds, arguments.minutes) {
        (Some(seeds), _) => seeds,
        (None, Some(_)) => u64::MAX,
        (None, None) => {
            eprintln!("name --seed, --seeds or --minutes");
            return ExitCode::from(2);
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, |count| count.get());
    let next = Arc::new(AtomicU64::new(0));
    let is_caught = AtomicBool::new(false);
    let results: Vec<Total> = std::thread::scope(|scope| {
        let work = || {
            let mut total = Total::default();
            while real_now().saturating_sub(began) < time && !is_caught.load(Ordering::Relaxed) {
                let nth = next.fetch_add(1, Ordering::Relaxed);
                if nth >= seeds {
                    break;
                }
                let seed = arguments.first.wrapping_add(nth);
                let is_over = Arc::new(AtomicBool::new(false));
                watch(seed, &is_over);
                total.add(seed, live(seed, &faults, mutant));
                // A mutant is to be caught once.
                if mutant.is_some() && total.violations > 0 {
                    is_caught.store(true, Ordering::Relaxed);
                }
                is_over.store(true, Ordering::Relaxed);
            }
            total
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_default())
            .collect()
    });
    let total = results.into_iter().fold(Total::default(), Total::and);
    let took = real_now().saturating_sub(began).as_secs_f64() / 60.0;
    println!(
        "{} seeds, {} operations, {} faults, {} view changes, {:.1} simulated hours in {took:.1} \
         minutes, {} violations",
        total.seeds,
        total.operations,
        total.faults,
        total.view_changes,
        total.simulated_ms as f64 / 3_600_000.0,
        total.violations
    );
    match (total.broken, total.violations) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(1),
        _ => ExitCode::from(2),
    }
}

#[derive(Debug, Default)]
struct Total {
    seeds: u64,
    operations: u64,
    faults: u64,
    view_changes: u64,
    simulated_ms: u64,
    violations: u64,
    broken: u64,
}

impl Total {
    fn add(&mut self, seed: u64, life: Option<Life>) {
        self.seeds += 1;
        let Some(life) = life else {
            println!("seed {seed} could not be run");
            self.broken += 1;
            return;
        };
        self.operations += life.operations;
        self.faults += life.faults;
        self.view_changes += life.view_changes;
        self.simulated_ms += life.simulated_ms;
        if let Some(violation) = life.violation {
            self.violations += 1;
            println!("seed {seed}: {violation}");
            println!("  to see it: scripts/simulate.sh --seed {seed}");
        }
    }

    fn and(self, other: Total) -> Total {
        Total {
            seeds: self.seeds + other.seeds,
            operations: self.operations + other.operations,
            faults: self.faults + other.faults,
            view_changes: self.view_changes + other.view_changes,
            simulated_ms: self.simulated_ms + other.simulated_ms,
            violations: self.violations + other.violations,
            broken: self.broken + other.broken,
        }
    }
}
