//! The state of a cluster, for people.

use std::collections::BTreeMap;

use super::output::{bytes, count};
use super::progress::what_is_left;
use crate::api::protocol::{ClusterStatus, NodeStatus, ReplicaHealth, ReplicaStatus, ShardStatus};
use crate::api::view_change::ChangeInProgress;
use crate::sm::cluster::view::Layout;
use crate::types::{Address, NodeId};

/// Shards that are named in one line.
const SHARDS_NAMED_MAX: usize = 8;

/// Returns the tables of nodes and shards, and what is under way. `running` says how the change of
/// the last plan gets on, as far as that is known.
pub fn render(status: &ClusterStatus, running: Option<&ChangeInProgress>) -> String {
    let addresses: BTreeMap<NodeId, &Address> = status
        .nodes
        .iter()
        .map(|node| (node.id, &node.public_address))
        .collect();
    let name = |id: NodeId| {
        addresses
            .get(&id)
            .map_or_else(|| id.to_string(), |address| address.to_string())
    };
    let led = |id: NodeId| {
        status
            .shards
            .iter()
            .filter(|shard| !shard.id.is_meta() && shard.leader == Some(id))
            .count()
    };
    let held = |id: NodeId| {
        let replicas = status
            .shards
            .iter()
            .filter(|shard| !shard.id.is_meta())
            .flat_map(|shard| &shard.replicas);
        replicas.filter(|replica| replica.node == id).count()
    };
    let nodes = status.nodes.iter().map(|node| {
        let reachable = if node.reachable { "yes" } else { "NO" };
        let cells = [
            node.public_address.to_string(),
            node.id.to_string(),
            reachable.into(),
            led(node.id).to_string(),
        ];
        cells
            .into_iter()
            .chain([held(node.id).to_string(), remarks(status, node)])
            .collect()
    });
    let shards = status
        .shards
        .iter()
        .filter(|shard| !shard.id.is_meta())
        .map(|shard| {
            let number = |number: Option<u64>| {
                number.map_or_else(|| "?".to_owned(), |number| number.to_string())
            };
            let leader = shard.leader.map_or_else(|| "NONE".to_owned(), name);
            let cells = [
                shard.id.0.to_string(),
                name(shard.home),
                leader,
                number(shard.term),
                number(shard.keys),
            ];
            let replicas = replicas(shard, &name);
            cells
                .into_iter()
                .chain([
                    shard.bytes.map_or_else(|| "?".into(), bytes),
                    shard.slots.to_string(),
                    replicas,
                ])
                .collect()
        });
    let layout = match status.asked.layout {
        Layout::Spread => "spread",
        Layout::Exclusive => "exclusive",
    };
    let tables = format!(
        "cluster {}  plan {}  map {}  level {}  layout {layout}  told by {}\n\n{}\n{}",
        status.cluster,
        status.epoch,
        status.version,
        status.level,
        name(status.answered_by),
        table(
            &["NODE", "ID", "REACHED", "LEADS", "REPLICAS", ""],
            nodes.collect()
        ),
        table(
            &[
                "SHARD", "HOME", "LEADER", "TERM", "KEYS", "BYTES", "SLOTS", "REPLICAS"
            ],
            shards.collect()
        ),
    );
    tables
        + &without_quorum(status)
        + &failures(status)
        + &alarms(status)
        + &unwitnessed(status)
        + &under_way(status, running)
}

/// Replicas named one by one; of more only the number is told.
const FAILURES_NAMED_MAX: usize = 20;

/// Returns a line for each replica that does not run: since when and why.
fn failures(status: &ClusterStatus) -> String {
    let all = status
        .nodes
        .iter()
        .flat_map(|node| node.failed.iter().map(move |failed| (node, failed)));
    let named = all.clone().take(FAILURES_NAMED_MAX).map(|(node, failed)| {
        let group = match failed.group.is_meta() {
            true => "the meta group".to_owned(),
            false => format!("shard {}", failed.group.0),
        };
        let (address, seconds) = (&node.public_address, failed.for_ms / 1000);
        format!(
            "\nREPLICA {} OF {group} AT {address} HAS FAILED, {seconds} s ago: {}\n",
            failed.replica, failed.reason
        )
    });
    let mut text: String = named.collect();
    let more = all.count().saturating_sub(FAILURES_NAMED_MAX);
    if more > 0 {
        text.push_str(&format!("\n{more} more replicas have failed\n"));
    }
    text
}

/// Returns what can't be done now because a quorum is missing, and which nodes are away.
fn without_quorum(status: &ClusterStatus) -> String {
    let mut lines = String::new();
    let here = status.nodes.iter().filter(|node| node.reachable).count();
    if status.meta_leader.is_none() || here * 2 <= status.nodes.len() {
        let nodes = status.nodes.len();
        lines.push_str(&format!(
            "\nNO QUORUM: {here} of {nodes} nodes answer: the view can't be changed\n"
        ));
    }
    let shards = status
        .shards
        .iter()
        .filter(|shard| !shard.id.is_meta() && lacks_quorum(shard));
    let shards: Vec<String> = shards.map(|shard| shard.id.0.to_string()).collect();
    if !shards.is_empty() {
        let first = shards
            .iter()
            .take(SHARDS_NAMED_MAX)
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ");
        let more = shards.len().saturating_sub(SHARDS_NAMED_MAX);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        lines.push_str(&format!(
            "\nNO QUORUM of shard {first}{more}: its keys are neither read nor written\n"
        ));
    }
    let away: Vec<String> = status
        .nodes
        .iter()
        .filter(|node| !node.reachable)
        .map(|node| node.public_address.to_string())
        .collect();

    // Nodes that are away matter here only where they are missed.
    if !lines.is_empty() && !away.is_empty() {
        lines.push_str(&format!("No answer from {}\n", away.join(", ")));
    }
    lines
}

/// Returns true if the shard has no leader, or half of its voters are away. A leader that says so
/// itself may have no followers.
fn lacks_quorum(shard: &ShardStatus) -> bool {
    let is_away = |replica: &&ReplicaStatus| {
        matches!(
            replica.health,
            ReplicaHealth::Unreachable | ReplicaHealth::Failed
        )
    };
    let voters = || {
        shard
            .replicas
            .iter()
            .filter(|replica| !replica.leaving)
            .chain(&shard.witness)
    };
    shard.leader.is_none() || voters().filter(is_away).count() * 2 >= voters().count()
}

/// Shards that take no writes, and why.
fn alarms(status: &ClusterStatus) -> String {
    let alarm = |shard: &ShardStatus| {
        Some(format!(
            "\nSHARD {} IS READ-ONLY: {}\n",
            shard.id.0,
            shard.alarm.as_ref()?
        ))
    };
    status.shards.iter().filter_map(alarm).collect()
}

/// Returns a warning where shards have an even number of replicas and no witness.
fn unwitnessed(status: &ClusterStatus) -> String {
    let is_even = |shard: &&ShardStatus| {
        let replicas = shard
            .replicas
            .iter()
            .filter(|replica| !replica.leaving)
            .count();
        !shard.id.is_meta() && shard.witness.is_none() && replicas > 0 && replicas % 2 == 0
    };
    let Some(shard) = status
        .shards
        .iter()
        .find(is_even)
        .filter(|_| status.settled)
    else {
        return String::new();
    };
    let replicas = shard.replicas.len();
    let lost = match replicas {
        2 => "either of them is".to_owned(),
        _ => format!("{} of them are", replicas / 2),
    };
    format!(
        "\nShards of {replicas} replicas without a witness: there is no node for one. While {lost} \
         away, writes wait; reads with consistency=stale go on.\n"
    )
}

fn remarks(status: &ClusterStatus, node: &NodeStatus) -> String {
    let leads = (status.meta_leader == Some(node.id)).then_some("meta leader");
    let leaves = node.leaving.then_some("leaving");
    leads
        .into_iter()
        .chain(leaves)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Returns what is being carried out. Empty where everything is as the plan says.
fn under_way(status: &ClusterStatus, running: Option<&ChangeInProgress>) -> String {
    if status.settled {
        return String::new();
    }
    let mut text = match running {
        Some(change) => format!(
            "\nplan {} is carried out: {}\n",
            change.id,
            what_is_left(change)
        ),
        None => format!("\nplan {} is carried out\n", status.epoch),
    };
    for held in &status.moves {
        text.push_str(&format!(
            "  move {}: {} from shard {} to {}\n",
            held.id,
            count(held.slots, "slot"),
            held.from.0,
            held.to.0
        ));
    }
    for reason in running.into_iter().flat_map(|change| &change.waiting_for) {
        text.push_str(&format!("  waits for {reason}\n"));
    }
    text
}

fn replicas(shard: &ShardStatus, name: &dyn Fn(NodeId) -> String) -> String {
    let remark = |replica: &ReplicaStatus| match replica.health {
        ReplicaHealth::Leading | ReplicaHealth::Following if replica.leaving => Some("leaves"),
        ReplicaHealth::Leading | ReplicaHealth::Following => None,
        ReplicaHealth::Lagging => Some("lags"),
        ReplicaHealth::Failed => Some("FAILED"),
        ReplicaHealth::Unreachable => Some("UNREACHABLE"),
    };
    let with = |replica: &ReplicaStatus, role: Option<&'static str>| {
        let remarks: Vec<&str> = role.into_iter().chain(remark(replica)).collect();
        let remarks = if remarks.is_empty() {
            String::new()
        } else {
            format!(" ({})", remarks.join(", "))
        };
        format!("{}{remarks}", name(replica.node))
    };
    let witness = shard
        .witness
        .iter()
        .map(|witness| with(witness, Some("witness")));
    shard
        .replicas
        .iter()
        .map(|replica| with(replica, None))
        .chain(witness)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Returns a table with columns as wide as their widest cell; the last is not padded.
fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let width = |column: usize| {
        let cells = rows.iter().chain([&head]).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    std::iter::once(&head).chain(&rows).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::peer::FailedReplica;
    use crate::api::protocol::MoveStatus;
    use crate::api::view_change::Phase;
    use crate::client::testing;
    use crate::sm::recovery::FailureCause;
    use crate::types::{GroupId, MoveId, PlanEpoch, ReplicaId};

    #[test]
    fn columns_line_up() {
        let rows = vec![
            vec!["a".into(), "long one".into()],
            vec!["wider".into(), String::new()],
        ];
        assert_eq!(
            table(&["X", "Y"], rows),
            "X      Y\na      long one\nwider\n"
        );
    }

    #[test]
    fn replicas_that_have_failed_are_named_with_the_reason() {
        let nodes = ["a:1", "b:2"].map(|node| node.parse().expect("an address"));
        let mut status = testing::status(1, Some(0), &nodes);
        assert!(!render(&status, None).contains("FAILED"));
        let failed = |group: u64| FailedReplica {
            group: GroupId(group),
            replica: ReplicaId(7),
            cause: FailureCause::Damaged,
            for_ms: 12_300,
            reason: "it is broken".to_owned(),
        };
        status.nodes[1].failed = vec![failed(0), failed(3)];
        let shown = render(&status, None);
        for part in [
            "REPLICA r7 OF the meta group AT b:2 HAS FAILED, 12 s ago: it is broken\n",
            "REPLICA r7 OF shard 3 AT b:2 HAS FAILED",
        ] {
            assert!(shown.contains(part), "{part}\nis not in\n{shown}");
        }
        status.nodes[1].failed = (0..1000).map(failed).collect();
        let shown = render(&status, None);
        assert!(
            shown.contains("\n980 more replicas have failed\n"),
            "{shown}"
        );
    }

    #[test]
    fn what_has_no_quorum_is_said_with_who_is_missing() {
        let nodes = ["a:1", "b:2", "c:3"].map(|node| node.parse().expect("an address"));
        let mut status = testing::status(1, Some(0), &nodes);
        let lose = |at: usize, status: &mut ClusterStatus| {
            status.nodes[at].reachable = false;
            status.shards[0].replicas[at].health = ReplicaHealth::Unreachable;
        };
        lose(1, &mut status);
        assert!(
            !render(&status, None).contains("QUORUM"),
            "two of three are one"
        );
        lose(2, &mut status);
        let shown = render(&status, None);
        for part in [
            "\nNO QUORUM: 1 of 3 nodes answer: the view can't be changed\n",
            "\nNO QUORUM of shard 1: its keys are neither read nor written\n",
            "\nNo answer from b:2, c:3\n",
        ] {
            assert!(shown.contains(part), "{part}\nis not in\n{shown}");
        }
    }

    #[test]
    fn what_is_under_way_is_shown_until_it_is_done() {
        let nodes = ["a:1", "b:2"].map(|node| node.parse().expect("an address"));
        let mut status = testing::status(1, Some(0), &nodes);
        let settled = render(&status, None);
        assert!(
            settled.contains("4096   a:1 b:2\n") && settled.contains("  meta leader\n"),
            "{settled}"
        );
        assert!(
            settled.contains("\nShards of 2 replicas without a witness"),
            "{settled}"
        );
        status.settled = false;
        status.nodes[0].leaving = true;
        status.shards[0].replicas[0].leaving = true;
        status.moves = vec![MoveStatus {
            id: MoveId(7),
            from: GroupId(1),
            to: GroupId(2),
            slots: 1,
        }];
        let change = ChangeInProgress {
            id: PlanEpoch(4),
            phase: Phase::Running,
            replicas_left: 1,
            slots_left: 2,
            bytes_left: 2048,
            bytes_per_s: None,
            left_s: None,
            waiting_for: vec!["b:2 to answer".into()],
        };
        let shown = render(&status, Some(&change));
        for part in [
            "  meta leader, leaving\n",
            "  a:1 (leaves) b:2\n",
            "\nplan 4 is carried out: 1 replica and 2 slots (2.0 KiB) left\n  move m7: 1 slot from \
            shard 1 to 2\n  waits for b:2 to answer\n",
        ] {
            assert!(shown.contains(part), "{part}\nis not in\n{shown}");
        }
        assert!(render(&status, None).contains("\nplan 1 is carried out\n"));
        status.shards[0].replicas[0].leaving = false;
        let mut witness = status.shards[0].replicas.pop().expect("b:2");
        status.shards[0].witness = Some(witness.clone());
        assert!(render(&status, None).contains("  a:1 b:2 (witness)\n"));
        witness.health = ReplicaHealth::Unreachable;
        status.shards[0].witness = Some(witness);
        assert!(render(&status, None).contains(" b:2 (witness, UNREACHABLE)\n"));
    }
}
