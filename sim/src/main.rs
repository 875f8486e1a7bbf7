//! `quorate-sim`: lives of simulated clusters, one from each seed. Built and run by
//! `scripts/simulate.sh`.
//!
//! Ends with 0 where nothing was wrong, 1 where something was, 2 where it could not run.

mod scenarios;
mod seeds;
mod world;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use quorate::mutants::{self, Mutant};

use scenarios::Watchdog;
use seeds::Seeds;
use world::run::{Fault, Scenario};

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
    /// Lets these go wrong; kill, power, pause, partition, slow, reset and view if none is named.
    #[arg(long, value_enum, value_delimiter = ',')]
    faults: Option<Vec<Fault>>,
    /// For how many milliseconds clients work before all is healed; each seed has its own if this
    /// is not given.
    #[arg(long)]
    work_ms: Option<u64>,
    /// Runs each seed twice: what happens must be the same, byte for byte.
    #[arg(long)]
    twice: bool,
    /// Puts this fault into the nodes, to see whether it is found.
    #[arg(long)]
    mutant: Option<String>,
    /// Lists the faults that can be put into nodes.
    #[arg(long)]
    mutants: bool,
}

impl Arguments {
    /// Returns what is simulated with a seed.
    fn scenario(&self, seed: u64) -> Result<Scenario, String> {
        let mut faults = self.faults.clone().unwrap_or_else(|| Fault::USUAL.to_vec());
        faults.sort();
        faults.dedup();
        let mutant = self.mutant.as_deref().map(mutant_of).transpose()?;
        Ok(Scenario {
            seed,
            faults,
            work_ms: self.work_ms,
            mutant,
        })
    }

    fn seeds(&self) -> Result<Seeds, String> {
        let time = match self.minutes {
            None => None,
            Some(minutes) if minutes.is_finite() && minutes >= 0.0 => {
                Some(Duration::from_secs_f64((minutes * 60.0).min(1e9)))
            }
            Some(_) => return Err("--minutes wants a number of minutes".to_owned()),
        };
        if self.seeds.is_none() && time.is_none() {
            return Err("name --seed, --seeds or --minutes".to_owned());
        }
        Ok(Seeds {
            first: self.scenario(self.first)?,
            count: self.seeds,
            time,
            is_twice: self.twice,
        })
    }
}

fn mutant_of(name: &str) -> Result<Mutant, String> {
    let found = mutants::ALL.iter().find(|(known, ..)| *known == name);
    match found {
        Some((_, mutant, _)) => Ok(*mutant),
        None => Err(format!("there is no mutant {name}: --mutants lists them")),
    }
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
    if arguments.mutants {
        for (name, _, what) in mutants::ALL {
            println!("{name}  {what}");
        }
        return ExitCode::SUCCESS;
    }
    let run = match arguments.seed {
        Some(seed) => arguments
            .scenario(seed)
            .map(|scenario| one(&scenario, arguments.twice)),
        None => arguments.seeds().map(Seeds::run),
    };
    run.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::from(2)
    })
}

/// Runs one life, and tells it.
fn one(scenario: &Scenario, is_twice: bool) -> ExitCode {
    let _watchdog = Watchdog::of(scenario);
    let run = match is_twice {
        true => scenarios::live_twice(scenario),
        false => scenarios::live(scenario),
    };
    let Some(life) = run else {
        eprintln!("seed {} could not be run", scenario.seed);
        return ExitCode::from(2);
    };
    print!("{}", life.story);
    println!("{}", life.summary());
    match life.violation {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::from(1),
    }
}
