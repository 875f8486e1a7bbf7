//! Which cases are run: a few each time, all of them as a campaign.

use futures::StreamExt;
use futures::stream;
use tokio::time::Instant;

use super::case::{Case, Kind, Ran, Victim, run};

const VICTIMS: [Victim; 3] = [Victim::Driver, Victim::MetaLeader, Victim::Destination];

fn number(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// Runs it, and tells of it.
async fn told(case: Case) -> Result<Ran, String> {
    let begun = Instant::now();
    let ran = run(case).await;
    let seconds = begun.elapsed().as_secs_f64();
    match &ran {
        Ok(ran) => println!(
            "{seconds:5.1} s  {case}: {} of {} steps, {} writes",
            ran.ended_after.as_deref().unwrap_or("nobody ended"),
            ran.steps,
            ran.acknowledged
        ),
        Err(error) => println!("{seconds:5.1} s  FAILED  {error}"),
    }
    ran
}

/// Every step of one kind of change with one victim, until the change is over before the step
/// comes.
async fn all_steps(kind: Kind, victim: Victim, from: usize) -> (usize, Vec<String>) {
    let (mut cases, mut failures, mut unreached) = (0, Vec::new(), 0);
    for step in from.. {
        let seed = number("QUORATE_STEPS_SEED", 1) as u64 * 1_000_000 + step as u64;
        cases += 1;
        match told(Case {
            kind,
            victim,
            step,
            seed,
        })
        .await
        {
            Ok(ran) => unreached += usize::from(ran.ended_after.is_none()),
            Err(error) => failures.push(error),
        }
        // Another run of the change may be a few steps longer.
        if unreached >= 2 {
            break;
        }
    }
    (cases, failures)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_change_ends_well_whoever_ends_after_whichever_step() {
    let asked = std::env::var("QUORATE_STEPS").unwrap_or_default();
    let begun = Instant::now();
    let (cases, failures) = if asked.is_empty() {
        a_few().await
    } else {
        campaign(&asked).await
    };
    println!(
        "{cases} cases in {:.0} s, {} failed",
        begun.elapsed().as_secs_f64(),
        failures.len()
    );
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// One of each kind.
async fn a_few() -> (usize, Vec<String>) {
    let table = [
        (Kind::Grow, Victim::Driver, 14),
        (Kind::Shrink, Victim::MetaLeader, 6),
        (Kind::Replace, Victim::Destination, 3),
        (Kind::Replicas, Victim::Driver, 5),
        (Kind::Shards, Victim::Destination, 8),
        (Kind::ReplaceAll, Victim::Driver, 9),
        (Kind::TakeBack, Victim::Destination, 4),
        (Kind::Even, Victim::Destination, 7),
    ];
    let cases = table.into_iter().map(|(kind, victim, step)| {
        told(Case {
            kind,
            victim,
            step,
            seed: step as u64,
        })
    });
    let ran: Vec<_> = stream::iter(cases).buffer_unordered(2).collect().await;
    (ran.len(), ran.into_iter().filter_map(Result::err).collect())
}

async fn campaign(asked: &str) -> (usize, Vec<String>) {
    let kinds = Kind::ALL
        .into_iter()
        .filter(|kind| asked == "all" || asked.eq_ignore_ascii_case(&format!("{kind:?}")));
    let from = number("QUORATE_STEPS_FROM", 0);
    let runs = kinds.flat_map(|kind| VICTIMS.map(|victim| all_steps(kind, victim, from)));
    let ran: Vec<_> = stream::iter(runs)
        .buffer_unordered(number("QUORATE_STEPS_AT_ONCE", 3))
        .collect()
        .await;
    let cases = ran.iter().map(|(cases, _)| cases).sum();
    (
        cases,
        ran.into_iter().flat_map(|(_, failures)| failures).collect(),
    )
}
