//! The verbs that change the view: what each asks for, what that would take, and having it
//! accepted.
//!
//! A change is drawn up from the status, shown as a plan and sent with the epoch of the plan that
//! was shown: what was confirmed is what is done, or nothing.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::{Args, Subcommand};
use tokio::time::{Instant, sleep};

use super::client::ClusterClient;
use super::output::{CHANGE_EXIT_CODES, as_json, bytes, print, print_error_line};
use super::progress::ChangeFollower;
use crate::api::protocol::ClusterStatus;
use crate::api::store::Store;
use crate::api::view_change::{
    Auto, ChangeInProgress, PerNode, PlannedChange, ReplicationFactor, Shards, ViewChange,
    ViewChangeFailure,
};
use crate::cli::{CliError, Exit};
use crate::types::Address;

/// Drafts of a plan before giving up because the view has changed meanwhile. Others would have to
/// be quick to do that thrice.
const DRAFTS_MAX: usize = 3;
/// Between two looks at a node that is not ready to join.
const NOT_READY_PAUSE: Duration = Duration::from_millis(300);

/// The change that is asked for.
#[derive(Debug, Subcommand)]
pub enum ChangeCommand<O: Args> {
    /// Take started nodes into the cluster
    #[command(after_help = CHANGE_EXIT_CODES)]
    Add {
        /// The addresses of started nodes that are in no cluster: spares
        #[arg(required = true, value_name = "HOST:PORT")]
        nodes: Vec<Address>,
        #[command(flatten)]
        options: O,
    },
    /// Take nodes out of the cluster, living or dead
    #[command(after_help = CHANGE_EXIT_CODES)]
    Remove {
        /// The addresses of nodes, as `quorate cluster status` shows them
        #[arg(required = true, value_name = "HOST:PORT")]
        nodes: Vec<Address>,
        #[command(flatten)]
        options: O,
    },
    /// Give the place of a node, living or dead, to a started one
    #[command(after_help = CHANGE_EXIT_CODES)]
    Replace {
        /// The address of the node that goes; the same as NEW if its disk was lost
        #[arg(value_name = "OLD")]
        old: Address,
        /// The address of the node that takes its place
        #[arg(value_name = "NEW")]
        new: Address,
        #[command(flatten)]
        options: O,
    },
    /// Set the number of replicas of each shard
    #[command(after_help = CHANGE_EXIT_CODES)]
    SetReplication {
        /// A number, or `auto`: three, as far as there are nodes
        #[arg(value_name = "NUMBER", value_parser = replication_factor)]
        replicas: ReplicationFactor,
        #[command(flatten)]
        options: O,
    },
    /// Set the number of shards
    #[command(after_help = CHANGE_EXIT_CODES)]
    SetShards {
        /// A number, or `per-node`: one for each node
        #[arg(value_name = "NUMBER", value_parser = shards)]
        shards: Shards,
        #[command(flatten)]
        options: O,
    },
    /// Plan again what was asked for already: replicas, leaders and slots are spread evenly over
    /// the nodes that are there
    #[command(after_help = CHANGE_EXIT_CODES)]
    Rebalance {
        #[command(flatten)]
        options: O,
    },
}

/// Of a change that is carried out.
#[derive(Debug, Args)]
pub struct ExecuteOptions {
    /// Do not ask for confirmation
    #[arg(short, long)]
    yes: bool,
    /// Return as soon as the change is accepted
    #[arg(long)]
    no_wait: bool,
    /// Print how it ended (with --no-wait: how it began) as JSON
    #[arg(long)]
    json: bool,
}

/// Of a change that is planned only.
#[derive(Debug, Args)]
pub struct PlanOptions {
    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
}

impl<O: Args> ChangeCommand<O> {
    fn options(&self) -> &O {
        match self {
            ChangeCommand::Add { options, .. }
            | ChangeCommand::Remove { options, .. }
            | ChangeCommand::Replace { options, .. }
            | ChangeCommand::SetReplication { options, .. }
            | ChangeCommand::SetShards { options, .. }
            | ChangeCommand::Rebalance { options } => options,
        }
    }

    /// Returns the change that this command asks of a cluster with this status.
    fn change(&self, status: &ClusterStatus) -> Result<ViewChange, CliError> {
        let mut members = MemberList::of(status);
        match self {
            ChangeCommand::Add { nodes, .. } => {
                nodes.iter().try_for_each(|node| members.add(node))?
            }
            ChangeCommand::Remove { nodes, .. } => {
                nodes.iter().try_for_each(|node| members.remove(node))?
            }
            ChangeCommand::Replace { old, new, .. } => members.replace(old, new)?,
            ChangeCommand::SetReplication { replicas, .. } => {
                return Ok(ViewChange {
                    replication_factor: Some(*replicas),
                    ..ViewChange::default()
                });
            }
            ChangeCommand::SetShards { shards, .. } => {
                return Ok(ViewChange {
                    shards: Some(*shards),
                    ..ViewChange::default()
                });
            }
            // Nothing is asked for anew: the plan alone brings back what has drifted.
            ChangeCommand::Rebalance { .. } => return Ok(ViewChange::default()),
        }
        Ok(ViewChange {
            nodes: Some(members.addresses()),
            ..ViewChange::default()
        })
    }
}

/// The nodes that are to stay, each by the address that the view knows it by and the one that
/// clients use.
struct MemberList(Vec<(Address, Address)>);

impl MemberList {
    fn of(status: &ClusterStatus) -> Self {
        let staying = status.nodes.iter().filter(|node| !node.leaving);
        Self(
            staying
                .map(|node| (node.address.clone(), node.public_address.clone()))
                .collect(),
        )
    }

    fn position(&self, node: &Address) -> Option<usize> {
        self.0
            .iter()
            .position(|(address, public)| address == node || public == node)
    }

    fn add(&mut self, node: &Address) -> Result<(), CliError> {
        if self.position(node).is_some() {
            return Err(CliError::Refused(format!(
                "{node} is a node of the cluster already"
            )));
        }
        self.0.push((node.clone(), node.clone()));
        Ok(())
    }

    fn remove(&mut self, node: &Address) -> Result<(), CliError> {
        let at = self
            .position(node)
            .ok_or_else(|| CliError::Refused(format!("{node} is no node of the cluster")))?;
        self.0.remove(at);
        Ok(())
    }

    fn replace(&mut self, old: &Address, new: &Address) -> Result<(), CliError> {
        // One that lost its disk comes back under its old address.
        self.remove(old)?;
        self.add(new)
    }

    fn addresses(self) -> Vec<Address> {
        self.0.into_iter().map(|(address, _)| address).collect()
    }
}

/// Runs `quorate cluster plan ...`: prints what a change would take.
///
/// # Errors
///
/// Fails if the change is refused, or nobody answers.
pub async fn plan(
    cluster: &mut ClusterClient,
    command: &ChangeCommand<PlanOptions>,
) -> Result<Exit, CliError> {
    let (_, planned) = draft(cluster, command).await?;
    if command.options().json {
        print(&as_json(&planned))
    } else {
        print(&describe(&planned))
    }
}

/// Plans the change, asks for confirmation, sends it and waits for its end.
///
/// # Errors
///
/// Fails if it is refused or not confirmed, a later plan takes over, or nobody answers.
pub async fn execute(
    cluster: &mut ClusterClient,
    command: &ChangeCommand<ExecuteOptions>,
) -> Result<Exit, CliError> {
    let options = command.options();

    // Checked first: a script must not get as far as a question that nobody answers.
    if !options.yes && !io::stdin().is_terminal() {
        let reason = "there is no terminal to ask for confirmation: say --yes, or look first with \
            'quorate cluster plan'";
        return Err(CliError::Usage(reason.into()));
    }
    let (change, planned) = draft(cluster, command).await?;
    print_error_line(describe(&planned).trim_end());
    // If at most the placement asked for changes, no second thought is needed.
    if !options.yes && !planned.is_same && !confirmed()? {
        return Err(CliError::Refused(
            "not confirmed: nothing was changed".into(),
        ));
    }

    // Guarded by the epoch of the plan that was shown: what was confirmed is what is done.
    let accepted = cluster
        .store
        .change_view(change, Some(planned.base), cluster.options)
        .await?;
    if options.no_wait {
        return began(&accepted, options.json);
    }
    ChangeFollower::new(cluster, options.json)
        .follow(accepted)
        .await
}

fn began(accepted: &ChangeInProgress, json: bool) -> Result<Exit, CliError> {
    let id = accepted.id;
    if json {
        print(&as_json(accepted))
    } else {
        print(&format!(
            "plan {id} is accepted; to follow it: quorate cluster wait {id}\n"
        ))
    }
}

/// Returns the change that the command asks for and its plan, both of the same view. Waits until
/// the timeout for a node that is not ready to join, because it has just been started or has yet to
/// notice that it left.
async fn draft<O: Args>(
    cluster: &mut ClusterClient,
    command: &ChangeCommand<O>,
) -> Result<(ViewChange, PlannedChange), CliError> {
    let deadline = Instant::now() + cluster.options.timeout;
    let mut drafts = 0;
    loop {
        let status = cluster.client.cluster().await?;
        let change = command.change(&status)?;
        let failure = match cluster
            .store
            .plan_view(change.clone(), cluster.options)
            .await
        {
            Ok(planned) if planned.base == status.epoch => return Ok((change, planned)),
            // The view has changed since the first question: draw the change up anew.
            Ok(planned) => {
                drafts += 1;
                if drafts >= DRAFTS_MAX {
                    return Err(ViewChangeFailure::EpochChanged {
                        current: planned.base,
                    }
                    .into());
                }
                continue;
            }
            Err(failure) => failure,
        };

        // A node that was just started becomes ready by itself; nothing else does.
        let is_worth_waiting = matches!(failure, ViewChangeFailure::NotReady { .. });
        if !is_worth_waiting || Instant::now() + NOT_READY_PAUSE >= deadline {
            return Err(failure.into());
        }
        sleep(NOT_READY_PAUSE).await;
    }
}

fn confirmed() -> Result<bool, CliError> {
    let failed = |source| CliError::Io {
        what: "standard input".into(),
        source,
    };
    drop(write!(io::stderr(), "Go ahead? [y/N] "));
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(failed)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

fn describe(planned: &PlannedChange) -> String {
    if planned.is_same {
        return format!(
            "Nothing would move: the view is as it should be, after plan {}.\n",
            planned.base
        );
    }
    let mut text = format!("A change of plan {}:\n", planned.base);
    let mut line = |what: &str, words: String| text.push_str(&format!("  {what:<9} {words}\n"));
    let named = |sign: &str, nodes: &[Address]| {
        nodes
            .iter()
            .map(|node| format!("{sign}{node}"))
            .collect::<Vec<_>>()
    };
    let nodes = [
        named("+", &planned.nodes_added),
        named("-", &planned.nodes_removed),
    ]
    .concat();
    if !nodes.is_empty() {
        line("nodes", nodes.join(" "));
    }
    if planned.shards_added + planned.shards_removed > 0 {
        line(
            "shards",
            format!(
                "{} new, {} to end",
                planned.shards_added, planned.shards_removed
            ),
        );
    }
    line(
        "replicas",
        format!(
            "{} to fill, {} to take away",
            planned.replicas_added, planned.replicas_removed
        ),
    );
    line(
        "slots",
        match planned.slots_moved {
            0 => "all stay where they are".into(),
            moved => format!(
                "{moved} of {} to move, {}",
                moved + planned.slots_kept,
                bytes(planned.bytes_moved)
            ),
        },
    );
    text
}

fn replication_factor(text: &str) -> Result<ReplicationFactor, String> {
    match text {
        "auto" => Ok(ReplicationFactor::Default(Auto::Auto)),
        number => number
            .parse()
            .map(ReplicationFactor::Fixed)
            .map_err(|_| "expected a number of replicas, or auto".to_owned()),
    }
}

fn shards(text: &str) -> Result<Shards, String> {
    match text {
        "per-node" => Ok(Shards::Default(PerNode::PerNode)),
        number => number
            .parse()
            .map(Shards::Fixed)
            .map_err(|_| "expected a number of shards, or per-node".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use clap::Parser;
    use http::Method;
    use http::header::IF_MATCH;
    use serde_json::json as object;

    use super::*;
    use crate::cli::Cli;
    use crate::cli::cluster::{ClusterArguments, ClusterCommand, run};
    use crate::client::testing::{answer, bind, json, problem_with, serve, status};

    fn arguments(line: &str) -> ClusterArguments {
        match Cli::try_parse_from(["quorate", "cluster"].into_iter().chain(line.split(' ')))
            .map(|cli| cli.command)
        {
            Ok(crate::cli::Command::Cluster(arguments)) => arguments,
            other => panic!("{line}: {other:?}"),
        }
    }

    /// Returns the change that a line asks of a cluster of a:1, b:2 and, on its way out, c:3.
    fn asked(line: &str) -> Result<String, String> {
        let nodes = ["a:1", "b:2", "c:3"].map(|node| node.parse().expect("an address"));
        let mut status = status(1, Some(0), &nodes);
        status.nodes[1].public_address = "public:2".parse().expect("an address");
        status.nodes[2].leaving = true;
        let ClusterCommand::Change(command) = arguments(line).command else {
            panic!("{line} changes nothing")
        };
        let change = command.change(&status).map_err(|error| error.to_string())?;
        Ok(serde_json::to_string(&change).expect("JSON"))
    }

    #[test]
    fn a_verb_asks_for_what_it_names_and_nothing_else() {
        for (line, expected) in [
            ("add d:4 e:5", r#"{"nodes":["a:1","b:2","d:4","e:5"]}"#),
            ("add c:3", r#"{"nodes":["a:1","b:2","c:3"]}"#),
            ("remove a:1", r#"{"nodes":["b:2"]}"#),
            ("remove public:2", r#"{"nodes":["a:1"]}"#),
            ("replace a:1 d:4", r#"{"nodes":["b:2","d:4"]}"#),
            ("replace a:1 a:1", r#"{"nodes":["b:2","a:1"]}"#),
            ("set-replication 5", r#"{"replication_factor":5}"#),
            ("set-replication auto", r#"{"replication_factor":"auto"}"#),
            ("set-shards 12", r#"{"shards":12}"#),
            ("set-shards per-node", r#"{"shards":"per-node"}"#),
            ("rebalance", "{}"),
        ] {
            assert_eq!(asked(line).as_deref(), Ok(expected), "{line}");
        }
        for (line, expected) in [
            ("add d:4 b:2", "b:2 is a node of the cluster already"),
            ("add d:4 d:4", "d:4 is a node of the cluster already"),
            ("remove c:3", "c:3 is no node of the cluster"),
            ("replace d:4 e:5", "d:4 is no node of the cluster"),
            ("replace a:1 b:2", "b:2 is a node of the cluster already"),
        ] {
            assert_eq!(
                asked(line).map_err(|error| error.to_string()),
                Err(expected.to_owned()),
                "{line}"
            );
        }
    }

    #[test]
    fn a_plan_is_shown_in_a_few_lines() {
        let mut planned = PlannedChange {
            base: crate::types::PlanEpoch(3),
            is_same: false,
            nodes_added: vec!["d:4".parse().expect("an address")],
            nodes_removed: vec!["a:1".parse().expect("an address")],
            replicas_added: 3,
            replicas_removed: 2,
            shards_added: 0,
            shards_removed: 0,
            slots_moved: 96,
            slots_kept: 4000,
            bytes_moved: 1 << 20,
        };
        let expected = "A change of plan 3:\n  nodes     +d:4 -a:1\n  replicas  3 to fill, 2 to \
                        take away\n  slots     96 of 4096 to move, 1.0 MiB\n";
        assert_eq!(describe(&planned), expected);
        planned.shards_added = 1;
        assert!(describe(&planned).contains("  shards    1 new, 0 to end\n"));
        planned.slots_moved = 0;
        assert!(describe(&planned).ends_with("  slots     all stay where they are\n"));
        planned.is_same = true;
        assert!(describe(&planned).starts_with("Nothing would move"));
    }

    /// A node that plans and accepts changes of plan 1; a change is done when it was looked at
    /// twice. Its address, and how many it accepted.
    async fn node() -> (Address, Arc<AtomicUsize>) {
        let (address, listener) = bind().await;
        let (accepted, looks) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
        let (count, status) = (
            Arc::clone(&accepted),
            status(1, Some(0), std::slice::from_ref(&address)),
        );
        let operation = |phase: &str| {
            object!({
                "id": 2, "phase": phase, "replicas_left": 1, "slots_left": 0, "bytes_left": 0,
                "waiting_for": []
            })
        };
        serve(listener, move |request| {
            let path = request
                .uri()
                .path_and_query()
                .map(ToString::to_string)
                .unwrap_or_default();
            let reply = match (request.method(), path.split('?').next().unwrap_or_default()) {
                (&Method::GET, "/v1/cluster") => json(&status),
                (&Method::PUT, "/v1/cluster/view") if path.contains("dry_run=true") => {
                    json(&object!({
                        "base": 1, "is_same": false,
                        "nodes_added": [], "nodes_removed": [],
                        "replicas_added": 1, "replicas_removed": 0,
                        "shards_added": 0, "shards_removed": 0,
                        "slots_moved": 0, "slots_kept": 4096, "bytes_moved": 0
                    }))
                }
                (&Method::PUT, "/v1/cluster/view") => {
                    assert_eq!(request.headers()[IF_MATCH], "\"1\"");
                    let refused = object!({ "code": "view_refused", "detail": "too few nodes" });
                    match &request.body()[..] {
                        br#"{"replication_factor":7}"# => problem_with(409, refused),
                        _ => {
                            count.fetch_add(1, Ordering::Relaxed);
                            answer(202, operation("running").to_string())
                        }
                    }
                }
                (&Method::GET, "/v1/cluster/operations/2") => {
                    match looks.fetch_add(1, Ordering::Relaxed) {
                        0 => json(&operation("running")),
                        _ => json(&operation("done")),
                    }
                }
                (&Method::GET, "/v1/cluster/operations/3") => json(&operation("superseded")),
                other => problem_with(
                    404,
                    object!({ "code": "unknown_operation", "detail": format!("{other:?}") }),
                ),
            };
            async move { Some(reply) }
        });
        (address, accepted)
    }

    #[tokio::test]
    async fn a_change_is_planned_sent_and_waited_for() {
        let (address, accepted) = node().await;
        let ran = async |line: &str| {
            let ran = run(arguments(&format!("--server {address} {line}"))).await;
            ran.map_err(|error| (error.code(), error.to_string()))
        };
        assert_eq!(ran("plan add d:4").await, Ok(Exit::Done));
        assert_eq!(
            accepted.load(Ordering::Relaxed),
            0,
            "a plan changes nothing"
        );
        assert_eq!(ran("add d:4 --yes --no-wait").await, Ok(Exit::Done));
        assert_eq!(ran("add d:4 --yes").await, Ok(Exit::Done));
        assert_eq!(accepted.load(Ordering::Relaxed), 2);
        assert_eq!(
            ran("set-replication 7 --yes").await,
            Err((1, "too few nodes".into()))
        );
        assert_eq!(ran("wait 2 --json").await, Ok(Exit::Done));
        let overtaken = ran("wait 3").await.expect_err("another plan took over");
        assert!(
            overtaken.0 == 1 && overtaken.1.contains("later plan"),
            "{overtaken:?}"
        );
        assert_eq!(ran("wait 9").await, Err((1, "there was no plan 9".into())));
        assert_eq!(
            ran("remove d:4 --yes").await,
            Err((1, "d:4 is no node of the cluster".into()))
        );
        assert_eq!(accepted.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_wait_outlasts_servers_that_have_just_started() {
        let (address, listener) = bind().await;
        let (told, asked) = (
            status(2, Some(0), std::slice::from_ref(&address)),
            AtomicUsize::new(0),
        );
        serve(listener, move |request| {
            let done = object!({
                "id": 1, "phase": "done", "replicas_left": 0, "slots_left": 0, "bytes_left": 0,
                "waiting_for": []
            });
            let starting = object!({ "code": "unavailable", "detail": "unavailable: the meta group \
                has no leader now" });
            let answer = match request.uri().path() {
                "/v1/cluster" => json(&told),
                _ if asked.fetch_add(1, Ordering::Relaxed) < 3 => {
                    problem_with(503, starting.clone())
                }
                _ => json(&done),
            };
            async move { Some(answer) }
        });
        let line = format!("--timeout 30 --server {address} wait");
        assert_eq!(
            run(arguments(&line))
                .await
                .map_err(|error| error.to_string()),
            Ok(Exit::Done)
        );
    }

    #[tokio::test]
    async fn a_node_that_is_not_ready_to_join_is_waited_for() {
        let (address, listener) = bind().await;
        let (told, asked) = (
            status(1, Some(0), std::slice::from_ref(&address)),
            AtomicUsize::new(0),
        );
        serve(listener, move |request| {
            let late = object!({ "code": "node_not_ready", "detail": "d:4 has yet to notice that \
                it left the cluster" });
            let same = object!({
                "base": 1, "is_same": true,
                "nodes_added": [], "nodes_removed": [],
                "replicas_added": 0, "replicas_removed": 0,
                "shards_added": 0, "shards_removed": 0,
                "slots_moved": 0, "slots_kept": 4096, "bytes_moved": 0
            });
            let answer = match request.uri().path() {
                "/v1/cluster" => json(&told),
                _ if asked.fetch_add(1, Ordering::Relaxed) < 2 => problem_with(503, late.clone()),
                _ => json(&same),
            };
            async move { Some(answer) }
        });
        let ran = async |timeout: &str| {
            let line = format!("--timeout {timeout} --server {address} plan add d:4");
            run(arguments(&line)).await.map_err(|error| error.code())
        };
        assert_eq!(ran("0.1").await, Err(1), "as long as there is time");
        assert_eq!(ran("30").await, Ok(Exit::Done));
    }

    #[test]
    fn words_and_numbers_are_told_apart() {
        for bad in [
            "set-replication many",
            "set-replication 256",
            "set-shards -1",
            "add",
            "add a",
            "plan",
            "plan status",
        ] {
            let line = ["quorate", "cluster"].into_iter().chain(bad.split(' '));
            assert!(Cli::try_parse_from(line).is_err(), "{bad}");
        }
    }
}
