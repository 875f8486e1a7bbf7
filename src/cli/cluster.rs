//! `quorate cluster`: how a cluster is, and handing leaderships over.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::{Args, Subcommand};

use super::servers::{Servers, seconds};
use super::{CliError, EXIT_CODES, Exit, complain};
use crate::client::protocol::{ClusterStatus, ReplicaHealth, ShardStatus};
use crate::sm::view::Layout;
use crate::types::{Address, NodeId};

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Arguments {
    #[command(flatten)]
    servers: Servers,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Nodes, shards, and how they are
    Status {
        /// Print what `GET /v1/cluster` answers
        #[arg(long)]
        json: bool,
        /// Again every so many seconds, until interrupted
        #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = seconds)]
        watch: Option<Duration>,
    },
    /// Hand the leadership of a shard over, to its home or to another of its replicas
    Leader {
        /// The shard's number
        shard: u64,
        /// The node that is to lead it [default: its home]
        #[arg(long, value_name = "HOST:PORT")]
        to: Option<Address>,
    },
}

/// # Errors
///
/// When nobody answers, or standard output is closed.
pub async fn run(arguments: Arguments) -> Result<Exit, CliError> {
    let mut client = arguments.servers.client();
    match arguments.command {
        Command::Leader { shard, to } => {
            let leader = client.transfer_leader(shard, to.as_ref()).await?;
            print(&format!("shard {shard} is led by {leader}\n"))
        }
        Command::Status { json, watch: None } => print(&render(&client.cluster().await?, json)),
        Command::Status { json, watch: Some(pause) } => loop {
            match client.cluster().await {
                Ok(status) => {
                    // Home, and clear the rest: less flicker than clearing first.
                    let clear = if io::stdout().is_terminal() { "\x1b[H\x1b[J" } else { "" };
                    print(&format!("{clear}{}\n", render(&status, json)))?;
                }
                Err(error) => complain(&error),
            }
            tokio::time::sleep(pause).await;
        },
    }
}

fn print(text: &str) -> Result<Exit, CliError> {
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).map_err(CliError::output)?;
    Ok(Exit::Done)
}

fn render(status: &ClusterStatus, json: bool) -> String {
    if json {
        return serde_json::to_string_pretty(status).map_or_else(|error| format!("{error}\n"), |text| format!("{text}\n"));
    }
    let addresses: BTreeMap<NodeId, &Address> = status.nodes.iter().map(|node| (node.id, &node.public_address)).collect();
    let name = |id: NodeId| addresses.get(&id).map_or_else(|| id.to_string(), |address| address.to_string());
    let led = |id: NodeId| status.shards.iter().filter(|shard| !shard.id.is_meta() && shard.leader == Some(id)).count();
    let held = |id: NodeId| {
        let replicas = status.shards.iter().filter(|shard| !shard.id.is_meta()).flat_map(|shard| &shard.replicas);
        replicas.filter(|replica| replica.node == id).count()
    };
    let nodes = status.nodes.iter().map(|node| {
        let reachable = if node.reachable { "yes" } else { "NO" };
        let meta = if status.meta_leader == Some(node.id) { "meta leader" } else { "" };
        let cells = [node.public_address.to_string(), node.id.to_string(), reachable.into(), led(node.id).to_string()];
        cells.into_iter().chain([held(node.id).to_string(), meta.into()]).collect()
    });
    let shards = status.shards.iter().filter(|shard| !shard.id.is_meta()).map(|shard| {
        let number = |number: Option<u64>| number.map_or_else(|| "?".to_owned(), |number| number.to_string());
        let leader = shard.leader.map_or_else(|| "NONE".to_owned(), name);
        let cells = [shard.id.0.to_string(), name(shard.home), leader, number(shard.term), number(shard.keys)];
        let replicas = replicas(shard, &name);
        cells.into_iter().chain([shard.bytes.map_or_else(|| "?".into(), bytes), shard.slots.to_string(), replicas]).collect()
    });
    let layout = match status.asked.layout {
        Layout::Spread => "spread",
        Layout::Exclusive => "exclusive",
    };
    format!(
        "cluster {}  plan {}  map {}  layout {layout}  told by {}\n\n{}\n{}",
        status.cluster,
        status.epoch,
        status.version,
        name(status.answered_by),
        table(&["NODE", "ID", "REACHED", "LEADS", "REPLICAS", ""], nodes.collect()),
        table(&["SHARD", "HOME", "LEADER", "TERM", "KEYS", "BYTES", "SLOTS", "REPLICAS"], shards.collect()),
    )
}

fn replicas(shard: &ShardStatus, name: &dyn Fn(NodeId) -> String) -> String {
    let replicas = shard.replicas.iter().map(|replica| match replica.health {
        ReplicaHealth::Leading | ReplicaHealth::Following => name(replica.node),
        ReplicaHealth::Lagging => format!("{} (lags)", name(replica.node)),
        ReplicaHealth::Failed => format!("{} (FAILED)", name(replica.node)),
        ReplicaHealth::Unreachable => format!("{} (UNREACHABLE)", name(replica.node)),
    });
    replicas.collect::<Vec<_>>().join(" ")
}

fn bytes(count: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) => format!("{}.{} {unit}", count / size, count % size * 10 / size),
        None => format!("{count} B"),
    }
}

/// Columns as wide as their widest cell; the last is not padded.
fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let width = |column: usize| {
        let cells = rows.iter().chain([&head]).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    std::iter::once(&head).chain(&rows).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "long one".into()], vec!["wider".into(), String::new()]];
        assert_eq!(table(&["X", "Y"], rows), "X      Y\na      long one\nwider\n");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!([bytes(7), bytes(1536), bytes(3 << 30)], ["7 B", "1.5 KiB", "3.0 GiB"]);
    }
}
