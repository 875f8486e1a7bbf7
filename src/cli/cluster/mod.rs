//! `quorate cluster`: how a cluster is, changing its view, and handing leaderships over.
//!
//! `status` shows, `change` says what is to be changed and has it accepted, `progress` waits for
//! its end.

mod change;
mod level;
mod progress;
mod scrub;
mod status;

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::{Args, Subcommand};

use self::change::{ChangeCommand, ExecuteOptions, PlanOptions};
use self::progress::ChangeFollower;
use self::scrub::ScrubBegin;
use super::servers::{Servers, seconds};
use super::{CliError, EXIT_CODES, Exit, print_error};
use crate::client::native::NativeClient;
use crate::client::remote::RemoteStore;
use crate::client::store::{Consistency, Failure, Options, Routing, Store};
use crate::types::{Address, PlanEpoch};

/// What the exit codes of a change mean.
const CHANGE_EXIT_CODES: &str = "Exit codes: 0 done, 1 refused, not confirmed or overtaken by a \
later change, 2 usage, 3 unavailable or of unknown outcome, 130 interrupted: a change that was \
accepted goes on by itself.";

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct ClusterArguments {
    #[command(flatten)]
    servers: Servers,
    #[command(subcommand)]
    command: ClusterCommand,
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Nodes, shards, what is under way, and how they are
    #[command(after_help = EXIT_CODES)]
    Status {
        /// Print what `GET /v1/cluster` answers
        #[arg(long)]
        json: bool,
        /// Again every so many seconds, until interrupted
        #[arg(
            short,
            long,
            value_name = "SECONDS",
            num_args = 0..=1,
            default_missing_value = "2",
            value_parser = seconds
        )]
        watch: Option<Duration>,
    },
    #[command(flatten)]
    Change(ChangeCommand<ExecuteOptions>),
    /// Show what a change would take, and change nothing
    #[command(subcommand, after_help = CHANGE_EXIT_CODES)]
    Plan(ChangeCommand<PlanOptions>),
    /// Wait for the end of a change, however long it takes
    #[command(after_help = CHANGE_EXIT_CODES)]
    Wait {
        /// The plan's number [default: that of the last plan]
        plan: Option<u64>,
        /// Print how it ended as JSON
        #[arg(long)]
        json: bool,
    },
    /// The feature level: what all nodes can read. Shows it, or holds it where it is during an
    /// upgrade
    #[command(after_help = EXIT_CODES)]
    Level {
        /// Do not raise it, so that every node can still go back to its older program
        #[arg(long, conflicts_with = "release")]
        hold: bool,
        /// Raise it again once every node has run the newer program for a while
        #[arg(long)]
        release: bool,
    },
    /// Hand the leadership of a shard over, to its home or to another of its replicas
    #[command(after_help = EXIT_CODES)]
    Leader {
        /// The shard's number
        shard: u64,
        /// The node that is to lead it [default: its home]
        #[arg(long, value_name = "HOST:PORT")]
        to: Option<Address>,
    },
    /// Have the nodes read again what is on their disks, now, and wait for what that shows
    #[command(after_help = SCRUB_EXIT_CODES)]
    Scrub {
        /// Only this node [default: all of them]
        #[arg(long, value_name = "HOST:PORT")]
        node: Option<Address>,
        /// Begin none, but show how the scrubs get on that run, or how the last ones ended
        #[arg(long)]
        watch: bool,
    },
}

/// What the exit codes of a scrub mean.
const SCRUB_EXIT_CODES: &str = "Exit codes: 0 nothing is damaged, 1 something was, mended or not, \
2 usage, 3 a node did not answer or stopped, 130 interrupted: a scrub that has begun goes on by \
itself.";

/// The cluster that a command is about.
struct ClusterClient {
    /// Goes on asking until the timeout, but knows no other nodes than those that were named.
    client: NativeClient,
    /// Learns who the nodes are, which a change of the view changes.
    store: RemoteStore,
    options: Options,
}

impl ClusterClient {
    fn new(servers: &Servers) -> Result<Self, CliError> {
        let broken = |error| Failure::Unavailable {
            reason: format!("no HTTP client: {error}"),
            retry_after_ms: 0,
        };
        let store = RemoteStore::connect(servers.addresses()).map_err(broken)?;
        let options = Options {
            consistency: Consistency::Linearizable,
            routing: Routing::Proxy,
            timeout: servers.timeout(),
        };
        Ok(Self {
            client: servers.client(),
            store,
            options,
        })
    }
}

/// # Errors
///
/// When nobody answers, a change is refused, or standard output is closed.
pub async fn run(arguments: ClusterArguments) -> Result<Exit, CliError> {
    let mut cluster = ClusterClient::new(&arguments.servers)?;
    match arguments.command {
        ClusterCommand::Leader { shard, to } => {
            let leader = cluster.client.transfer_leader(shard, to.as_ref()).await?;
            print(&format!("shard {shard} is led by {leader}\n"))
        }
        ClusterCommand::Level { hold, release } => {
            if hold || release {
                level::hold(&mut cluster, hold).await?;
            }
            print(&level::render(&cluster.client.cluster().await?))
        }
        ClusterCommand::Status { json, watch: None } => print(&show(&mut cluster, json).await?),
        ClusterCommand::Status {
            json,
            watch: Some(pause),
        } => loop {
            match show(&mut cluster, json).await {
                Ok(text) => {
                    // Home, and clear the rest: less flicker than clearing first.
                    let clear = if io::stdout().is_terminal() {
                        "\x1b[H\x1b[J"
                    } else {
                        ""
                    };
                    print(&format!("{clear}{text}\n"))?;
                }
                Err(error) => print_error(&error),
            }
            tokio::time::sleep(pause).await;
        },
        ClusterCommand::Scrub { node, watch } => {
            let begin = if watch {
                ScrubBegin::No
            } else {
                ScrubBegin::Yes
            };
            scrub::run(&mut cluster, node, begin).await
        }
        ClusterCommand::Change(command) => change::execute(&mut cluster, &command).await,
        ClusterCommand::Plan(command) => change::plan(&mut cluster, &command).await,
        ClusterCommand::Wait { plan, json } => {
            let epoch = match plan {
                Some(epoch) => PlanEpoch(epoch),
                None => cluster.client.cluster().await?.epoch,
            };
            match cluster.store.operation(epoch, cluster.options).await? {
                Some(change) => ChangeFollower::new(&cluster, json).follow(change).await,
                None => Err(CliError::Refused(format!("there was no plan {epoch}"))),
            }
        }
    }
}

async fn show(cluster: &mut ClusterClient, json: bool) -> Result<String, CliError> {
    let status = cluster.client.cluster().await?;
    if json {
        return Ok(as_json(&status));
    }
    // Without it the status is shown all the same.
    let running = match status.settled {
        true => None,
        false => cluster
            .store
            .operation(status.epoch, cluster.options)
            .await
            .ok()
            .flatten(),
    };
    Ok(status::render(&status, running.as_ref()))
}

fn as_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value)
        .map_or_else(|error| format!("{error}\n"), |text| format!("{text}\n"))
}

fn print(text: &str) -> Result<Exit, CliError> {
    let mut output = io::stdout().lock();
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
        .map_err(CliError::output)?;
    Ok(Exit::Done)
}

/// A line for people, on standard error: standard output is for results.
fn print_error_line(text: &str) {
    drop(writeln!(io::stderr(), "{text}"));
}

fn bytes(count: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) => format!("{}.{} {unit}", count / size, count % size * 10 / size),
        None => format!("{count} B"),
    }
}

/// "1 slot", "2 slots".
fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(
            [bytes(7), bytes(1536), bytes(3 << 30)],
            ["7 B", "1.5 KiB", "3.0 GiB"]
        );
        assert_eq!([count(1, "slot"), count(0, "slot")], ["1 slot", "0 slots"]);
    }
}
