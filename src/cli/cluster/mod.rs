//! `quorate cluster`: how a cluster is, changing its view, and handing leaderships over.
//!
//! `status` shows, `change` says what is to be changed and has it accepted, `progress` waits for
//! its end.

mod change;
mod client;
mod level;
mod output;
mod progress;
mod scrub;
mod status;

use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::{Args, Subcommand};

use self::change::{ChangeCommand, ExecuteOptions, PlanOptions};
use self::client::ClusterClient;
use self::output::{CHANGE_EXIT_CODES, SCRUB_EXIT_CODES, as_json, print};
use self::progress::ChangeFollower;
use self::scrub::ScrubBegin;
use super::servers::{Servers, seconds};
use super::{CliError, EXIT_CODES, Exit, print_error};
use crate::api::store::Store;
use crate::types::{Address, PlanEpoch};

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

/// Runs one command about a cluster.
///
/// # Errors
///
/// Fails if nobody answers, a change is refused, or standard output is closed.
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
    // The status is shown without it too.
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
