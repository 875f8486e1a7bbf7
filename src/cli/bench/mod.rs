//! `quorate bench`: a load generator.
//!
//! Workers, each a task with connections of its own, send one request at a time: in a closed loop,
//! or in an open one at a rate, where latency counts from when a request was due. It speaks the
//! native dialect, to the leader of each key's shard, or whatever a template says. The generator
//! competes with the servers for the same cores, so the loop is lean: bare hyper connections,
//! values made beforehand, histograms per worker that are merged at the end.

mod options;
mod report;
mod rng;
mod route_table;
mod schedule;
mod tally;
mod template;
mod worker;

pub use options::BenchArguments;

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::join_all;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

use self::options::BenchPlan;
use self::report::Report;
use self::schedule::RequestSchedule;
use self::tally::{BenchProgress, RequestError, Tally};
use self::worker::{BenchContext, Worker};
use super::{CliError, Exit};

/// Runs the load and prints the report.
///
/// # Errors
///
/// Fails if the arguments do not fit together, no server answers at first, or the output is closed.
pub fn run(arguments: BenchArguments) -> Result<Exit, CliError> {
    let json = arguments.json;
    let threads = arguments.threads;
    let plan = BenchPlan::check(arguments)?;
    let report = runtime(threads)?.block_on(measure(plan))?;
    let text = if json {
        report.json()
    } else {
        report.to_string()
    };
    let mut output = io::stdout().lock();
    writeln!(output, "{text}")
        .and_then(|()| output.flush())
        .map_err(CliError::output)?;
    Ok(Exit::Done)
}

fn runtime(threads: usize) -> Result<Runtime, CliError> {
    let mut builder = if threads == 1 {
        Builder::new_current_thread()
    } else {
        Builder::new_multi_thread()
    };
    let built = builder.worker_threads(threads).enable_all().build();
    built.map_err(|source| CliError::Io {
        what: "the runtime".into(),
        source,
    })
}

async fn measure(plan: BenchPlan) -> Result<Report, CliError> {
    let context = Arc::new(BenchContext::prepare(plan).await?);
    if context.plan.preload {
        preload(&context).await?;
    }
    let start = Instant::now();
    let measured_from = start + context.plan.warm_up;
    let end = measured_from + context.plan.duration;
    let schedule = Arc::new(RequestSchedule::new(
        start,
        end,
        context.plan.rate,
        context.plan.timeout,
    ));
    let progress = Arc::new(BenchProgress::default());
    let workers = (0..context.plan.connections).map(|number| {
        let worker = Worker::new(number, Arc::clone(&context), Arc::clone(&progress));
        tokio::spawn(worker.run(Arc::clone(&schedule), measured_from))
    });
    let workers: Vec<JoinHandle<Tally>> = workers.collect();
    let showing = tokio::spawn(show(Arc::clone(&progress), start, measured_from));
    let tallies = join_all(workers).await;

    // Requests in flight at the end are waited for and counted, so their time counts too.
    let took = measured_from.elapsed().max(context.plan.duration);
    hide(showing);
    let mut total = Tally::new();
    for tally in tallies {
        let tally =
            tally.map_err(|error| CliError::Usage(format!("a worker ended early: {error}")))?;
        total.merge(&tally);
    }

    // A request that was due and never sent is an error: the load was more than the servers take.
    total.errors_of(RequestError::Unsent, schedule.unsent());
    Ok(Report::new(&context.plan, took, &total))
}

/// Writes every key once, as fast as the connections take it.
async fn preload(context: &Arc<BenchContext>) -> Result<(), CliError> {
    let progress = Arc::new(BenchProgress::default());
    let workers = (0..context.plan.connections).map(|number| {
        let worker = Worker::new(number, Arc::clone(context), Arc::clone(&progress));
        tokio::spawn(worker.preload(context.plan.connections))
    });
    let workers: Vec<JoinHandle<Result<(), String>>> = workers.collect();
    let start = Instant::now();
    let showing = tokio::spawn(show(
        Arc::clone(&progress),
        start,
        start + Duration::from_secs(1 << 30),
    ));
    let ended = join_all(workers).await;
    hide(showing);
    for worker in ended {
        let result =
            worker.map_err(|error| CliError::Usage(format!("a worker ended early: {error}")))?;
        result.map_err(|reason| {
            CliError::Usage(format!("the keys could not be written first: {reason}"))
        })?;
    }
    Ok(())
}

fn hide(showing: JoinHandle<()>) {
    showing.abort();
    if io::stderr().is_terminal() {
        drop(write!(io::stderr(), "\r\x1b[K"));
    }
}

/// Shows progress once a second: overwritten on a terminal, one line below the other elsewhere.
async fn show(progress: Arc<BenchProgress>, start: Instant, measured_from: Instant) {
    let terminal = io::stderr().is_terminal();
    let (before, after) = if terminal {
        ("\r\x1b[K", "")
    } else {
        ("", "\n")
    };
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks.tick().await;
    let (mut last, mut last_at) = (0, start);
    loop {
        let now = ticks.tick().await;
        let done = progress.done.load(Ordering::Relaxed);
        let rate = (done - last) as f64 / (now - last_at).as_secs_f64().max(0.001);
        (last, last_at) = (done, now);
        let phase = if now < measured_from {
            "before"
        } else {
            "      "
        };
        let errors = progress.errors.load(Ordering::Relaxed);
        let line = format!(
            "{:>5}s {phase} {rate:>10.0} requests/s  {done} done  {errors} errors",
            (now - start).as_secs()
        );
        drop(write!(io::stderr(), "{before}{line}{after}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use crate::client::testing::{answer, bind, json, serve, status};
    use clap::Parser;
    use http::Method;

    fn plan(arguments: &[&str]) -> BenchPlan {
        match Cli::parse_from(["quorate", "bench"].iter().chain(arguments)).command {
            crate::cli::Command::Bench(arguments) => BenchPlan::check(*arguments).expect("a plan"),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_run_follows_the_leader_and_counts_what_was_done() {
        let (first, first_listener) = bind().await;
        let (leader, leader_listener) = bind().await;
        let nodes = [first.clone(), leader.clone()];
        // The map calls the first one the leader, which sends everybody on.
        let known = status(1, Some(0), &nodes);
        serve(first_listener, move |request| {
            let (known, leader) = (known.clone(), leader.clone());
            async move {
                if request.uri().path() == "/v1/cluster" {
                    return Some(json(&known));
                }
                let mut response = answer(307, "");
                let location = format!("http://{leader}{}", request.uri());
                response
                    .headers_mut()
                    .insert(http::header::LOCATION, location.parse().expect("a header"));
                Some(response)
            }
        });
        serve(leader_listener, |request| async move {
            let path = request.uri().path().to_owned();
            assert!(path.starts_with("/v1/kv/bench-00000000"), "{path}");
            let put = request.method() == Method::PUT;
            assert_eq!(request.body().len(), if put { 10 } else { 0 });
            Some(if put {
                answer(200, "{}")
            } else {
                answer(404, "{}")
            })
        });
        let server = first.to_string();
        let line = [
            "--server",
            &server,
            "-w",
            "mixed=50",
            "-c",
            "4",
            "--keys",
            "5",
            "--value-size",
            "10",
            "-d",
            "0.2",
            "--preload",
        ];
        let report = measure(plan(&line)).await.expect("a report");
        let result: serde_json::Value = serde_json::from_str(&report.json()).expect("json");
        assert_eq!(result["errors"], serde_json::json!({}), "{result}");
        let (requests, missing) = (result["requests"].as_u64(), result["missing"].as_u64());
        assert!(missing > Some(0) && requests > missing, "{result}");
        assert_eq!(
            result["redirects"].as_u64(),
            requests,
            "the map never changes: {result}"
        );
        assert!(report.to_string().contains("p99.9"));
    }

    #[tokio::test]
    async fn errors_are_counted_by_kind_and_do_not_stop_the_run() {
        let (server, listener) = bind().await;
        serve(listener, |_| async move { Some(answer(503, "busy")) });
        let url = format!("http://{server}/{{key}}");
        let report = measure(plan(&[
            "--url-template",
            &url,
            "-c",
            "2",
            "-d",
            "0.1",
            "--rate",
            "100",
        ]))
        .await
        .expect("a report");
        let result: serde_json::Value = serde_json::from_str(&report.json()).expect("json");
        assert_eq!(result["requests"], 0);
        assert!(
            result["errors"]["status 503"].as_u64() > Some(0),
            "{result}"
        );
    }
}
