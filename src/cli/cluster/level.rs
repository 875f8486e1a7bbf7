//! The feature level of a cluster, and having its nodes hold it where it is.

use std::time::Duration;

use futures::future::join_all;

use super::client::ClusterClient;
use super::output::print_error_line;
use crate::api::peer::HoldRequest;
use crate::api::protocol::{ClusterStatus, NodeStatus};
use crate::api::store::Failure;
use crate::cli::CliError;
use crate::routing::peer_caller::PeerCaller;

/// Looks at the status, after the nodes were told, until it shows that.
const LOOKS_MAX: usize = 20;
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Time for the answer of one node.
const HOLD_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns what the level is, and what becomes of it.
pub fn render(status: &ClusterStatus) -> String {
    let level = status.level;
    let next = status
        .nodes
        .iter()
        .map(|node| node.speaks.unwrap_or(0))
        .min()
        .unwrap_or(0);
    let named = |pick: &dyn Fn(&NodeStatus) -> bool| {
        let picked = status
            .nodes
            .iter()
            .filter(|node| pick(node))
            .map(|node| node.address.to_string());
        picked.collect::<Vec<_>>().join(", ")
    };
    let (holding, behind) = (
        named(&|node| node.holds_level),
        named(&|node| node.speaks.unwrap_or(0) <= level),
    );
    let becomes = match (holding.is_empty(), next > level, behind.is_empty()) {
        (false, _, _) => format!("it is held by {holding}"),
        (true, true, _) => {
            format!("it is raised to {next} once every node has spoken that for a while")
        }
        (true, false, false) => {
            format!("it stays while {behind} know no later one, or do not answer")
        }
        (true, false, true) => "it has no nodes".to_owned(),
    };
    format!("level {level}: {becomes}\n")
}

/// Has every node hold the level, or do so no more. One that holds is enough to hold it.
pub async fn hold(cluster: &mut ClusterClient, hold: bool) -> Result<(), CliError> {
    let broken = |reason: String| {
        CliError::from(Failure::Unavailable {
            reason,
            retry_after_ms: 0,
        })
    };
    let peers = PeerCaller::new().map_err(|error| broken(error.to_string()))?;
    let status = cluster.client.cluster().await?;
    let request = HoldRequest {
        cluster: status.cluster,
        hold,
    };
    let asked = status
        .nodes
        .iter()
        .map(|node| peers.hold_level(&node.address, &request, HOLD_TIMEOUT));
    let answers = join_all(asked).await;
    let (mut taken, mut silent) = (0, Vec::new());
    for (node, answer) in status.nodes.iter().zip(answers) {
        match answer {
            Ok(()) => taken += 1,
            // A program that knows no levels holds none.
            Err(_) if !hold && node.speaks == Some(0) => {}
            Err(error) => silent.push(error.to_string()),
        }
    }
    for reason in &silent {
        print_error_line(&format!("not taken: {reason}"));
    }
    await_news(cluster, hold, taken).await?;
    match (hold, taken, silent.is_empty()) {
        (true, 0, _) => Err(broken(
            "no node took it: only one that runs the newer program can hold the level".into(),
        )),
        (false, _, false) => Err(broken(
            "the level is still held where it was not taken: try again".into(),
        )),
        (true | false, _, _) => Ok(()),
    }
}

/// Waits until the status says that so many nodes hold the level, or that none does: it may be as
/// old as a moment.
async fn await_news(cluster: &mut ClusterClient, hold: bool, taken: usize) -> Result<(), CliError> {
    for _ in 0..LOOKS_MAX {
        let status = cluster.client.cluster().await?;
        let holding = status.nodes.iter().filter(|node| node.holds_level).count();
        if if hold { holding >= taken } else { holding == 0 } {
            break;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing;

    #[test]
    fn what_becomes_of_the_level_is_told() {
        let nodes = ["a:1", "b:2"].map(|node| node.parse().expect("an address"));
        let mut status = testing::status(1, Some(0), &nodes);
        let shown = |status: &ClusterStatus| render(status);
        assert_eq!(
            shown(&status),
            "level 0: it stays while a:1, b:2 know no later one, or do not answer\n"
        );
        status.nodes[0].speaks = Some(1);
        assert_eq!(
            shown(&status),
            "level 0: it stays while b:2 know no later one, or do not answer\n"
        );
        status.nodes[1].speaks = Some(2);
        assert_eq!(
            shown(&status),
            "level 0: it is raised to 1 once every node has spoken that for a while\n"
        );
        status.nodes[1].holds_level = true;
        assert_eq!(shown(&status), "level 0: it is held by b:2\n");
    }
}
