//! Runs scenarios: each in a thread of its own, once or twice, and in ever smaller forms.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quorate::mutants;

use crate::world::determinism::real_now;
use crate::world::run::{Fault, Life, Scenario, simulate};

/// A life that takes longer than this hangs.
const LIFE_TIMEOUT: Duration = Duration::from_secs(180);
const LOOK_EVERY: Duration = Duration::from_millis(500);
const STACK_BYTES: usize = 16 << 20;

/// Runs a life in a thread of its own, whose source of entropy nobody has used yet.
pub fn live(scenario: &Scenario) -> Option<Life> {
    let scenario = scenario.clone();
    let thread = std::thread::Builder::new()
        .name(format!("seed-{}", scenario.seed))
        .stack_size(STACK_BYTES)
        .spawn(move || simulate(&scenario));
    thread.ok()?.join().ok()
}

/// Runs a life, and has it told by two processes more. Where these differ, that is the violation.
///
/// Two lives of one process could not be compared: what is static in it outlives the first.
pub fn live_twice(scenario: &Scenario) -> Option<Life> {
    let mut life = live(scenario)?;
    let (first, second) = (told(scenario)?, told(scenario)?);
    if let Some(difference) = difference(&first, &second) {
        life.violation = Some(difference);
    }
    Some(life)
}

/// Returns what a process of its own prints of a life, on both streams.
fn told(scenario: &Scenario) -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let output = Command::new(program)
        .args(arguments(scenario))
        .output()
        .ok()?;
    let streams = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&streams).into_owned())
}

/// Returns the first line in which two runs differ.
fn difference(first: &str, second: &str) -> Option<String> {
    if first == second {
        return None;
    }
    let mut lines = first.lines().zip(second.lines());
    let differing = lines.find(|(one, other)| one != other);
    let (one, other) = differing.unwrap_or(("the end", "more"));
    Some(format!(
        "two runs of one seed differ: once\n  {one}\nand once\n  {other}"
    ))
}

/// Returns the command that shows a life again.
pub fn command(scenario: &Scenario) -> String {
    format!("scripts/simulate.sh {}", arguments(scenario).join(" "))
}

fn arguments(scenario: &Scenario) -> Vec<String> {
    let mut arguments = vec!["--seed".to_owned(), scenario.seed.to_string()];
    if scenario.faults != Fault::USUAL {
        let names: Vec<String> = scenario.faults.iter().map(|fault| name(*fault)).collect();
        arguments.extend(["--faults".to_owned(), names.join(",")]);
    }
    if let Some(work_ms) = scenario.work_ms {
        arguments.extend(["--work-ms".to_owned(), work_ms.to_string()]);
    }
    let mutant = mutants::ALL
        .iter()
        .find(|(_, mutant, _)| Some(*mutant) == scenario.mutant);
    if let Some((name, ..)) = mutant {
        arguments.extend(["--mutant".to_owned(), (*name).to_owned()]);
    }
    arguments
}

fn name(fault: Fault) -> String {
    use clap::ValueEnum;
    fault
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}

/// Looks for a smaller life in which something is wrong too: with less that goes wrong, and less
/// time. Returns the smallest that was found, with what is wrong in it.
pub fn shrink(scenario: &Scenario, violation: &str) -> (Scenario, String) {
    let mut least = (scenario.clone(), violation.to_owned());
    for fault in &scenario.faults {
        let mut fewer = least.0.clone();
        fewer.faults.retain(|kept| kept != fault);
        // A life in which nothing can go wrong has one name only.
        if !fewer.faults.is_empty() {
            least = fails(fewer).unwrap_or(least);
        }
    }
    // Half of the time that it takes, as often as that is enough.
    let mut work_ms = least.0.work_ms.unwrap_or(WORK_MS_MAX) / 2;
    while work_ms >= WORK_MS_MIN {
        let shorter = Scenario {
            work_ms: Some(work_ms),
            ..least.0.clone()
        };
        let Some(found) = fails(shorter) else { break };
        least = found;
        work_ms /= 2;
    }
    least
}

/// No life has its clients work for longer, unless it is told to.
const WORK_MS_MAX: u64 = 20_000;
const WORK_MS_MIN: u64 = 500;

fn fails(scenario: Scenario) -> Option<(Scenario, String)> {
    let _watchdog = Watchdog::of(&scenario);
    let violation = live(&scenario)?.violation?;
    Some((scenario, violation))
}

/// Ends the process if a life does not end before this is dropped.
pub struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    pub fn of(scenario: &Scenario) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (over, began, command) = (is_over.clone(), real_now(), command(scenario));
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK_EVERY);
                if real_now() - began > LIFE_TIMEOUT {
                    eprintln!("a life does not end: {command}");
                    std::process::exit(2);
                }
            }
        });
        Self(is_over)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
