//! Counts the groups of a node and their peers, in a number of series that does not grow
//! with the number of shards.
//!
//! A thousand shards with a series each for everything would be a page of half a mebibyte at every
//! scrape, and more series than a small Prometheus holds of ten such nodes. So most of it is summed
//! up over the groups; what has a series per group has it for at most [`SERIES_MAX`] of them: what
//! an operator is woken for, for those in trouble first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use super::context::NodeContext;
use crate::metrics::{DescriptorEncoder, EncodeFamilies, Labels};
use crate::raft::{GroupMembership, Replica, Role, WitnessReplica};
use crate::sm::cluster::view::View;
use crate::types::{GroupId, NodeId};

/// Groups, or peers, that have a series of their own in one family.
const SERIES_MAX: usize = 100;

/// A replica here, as far as it is counted.
#[derive(Debug, Clone)]
pub struct NodeFacts {
    group: GroupId,
    role: Role,
    term: u64,
    applied: u64,
    purged: u64,
    /// Entries that are known to be committed and not yet applied here.
    unapplied: u64,
    leader: Option<NodeId>,
    members: BTreeSet<NodeId>,
    has_failed: bool,
    is_read_only: bool,
    rebuilt: u64,
    queued_writes: u64,
    queued_reads: u64,
    /// Of a witness: the log that it keeps.
    witness_bytes: Option<u64>,
}

/// A peer that should be heard of all the time.
#[derive(Debug, Clone)]
struct Silence {
    node: NodeId,
    address: String,
    silent: Duration,
}

/// Writes everything of the groups and peers of this node.
pub fn encode(encoder: &mut DescriptorEncoder<'_>, context: &NodeContext) -> fmt::Result {
    let groups = context.registry.groups();
    let witnesses = context.registry.witnesses();
    let facts: Vec<NodeFacts> = groups
        .iter()
        .map(|group| of_group(group))
        .chain(witnesses.iter().map(of_witness))
        .collect();
    let failures = context.failures.now();

    // A replica that is not open has no status: only the failures tell of it.
    let not_open = failures
        .iter()
        .map(|failure| failure.key.group)
        .filter(|group| {
            let is_open = |facts: &NodeFacts| facts.group == *group;
            !facts.iter().any(is_open)
        });
    let not_open = not_open.collect();
    of_facts(encoder, &facts, &not_open, &context.differences())?;

    let elections = context.registry.elections();
    encoder.counter(
        "quorate_elections_total",
        "Times that a replica here asked the others for their votes.",
        elections.campaigns(),
    )?;
    encoder.counter(
        "quorate_leader_changes_total",
        "Times that a replica here saw another leader of its group than before; hand-overs are \
        among them.",
        elections.leader_changes(),
    )?;
    let view = context.view();
    of_silences(encoder, silences(context, &facts, &view))?;
    of_view(encoder, &view)
}

fn of_group(group: &Replica) -> NodeFacts {
    let status = group.status();
    let (queued_writes, queued_reads) = group.queued();
    let applied = status.applied.map_or(0, |id| id.index);
    NodeFacts {
        group: group.key().group,
        role: status.role,
        term: status.term,
        applied,
        purged: status.purged.map_or(0, |id| id.index),
        unapplied: status
            .committed
            .map_or(0, |id| id.index)
            .saturating_sub(applied),
        leader: status.leader,
        members: nodes_of(&status.membership),
        has_failed: status.failed.is_some(),
        is_read_only: group.alarm().is_some(),
        rebuilt: group.rebuilt(),
        queued_writes: queued_writes as u64,
        queued_reads: queued_reads as u64,
        witness_bytes: None,
    }
}

fn of_witness(witness: &WitnessReplica) -> NodeFacts {
    let status = witness.status();
    NodeFacts {
        group: witness.key().group,
        role: status.role,
        term: status.term,
        applied: 0,
        purged: 0,
        unapplied: 0,
        leader: status.leader,
        members: nodes_of(&status.membership),
        has_failed: status.failed.is_some(),
        is_read_only: false,
        rebuilt: 0,
        queued_writes: 0,
        queued_reads: 0,
        witness_bytes: Some(witness.log_bytes()),
    }
}

fn nodes_of(membership: &GroupMembership) -> BTreeSet<NodeId> {
    membership
        .voters
        .values()
        .chain(membership.learners.values())
        .copied()
        .collect()
}

/// A sample of one group.
type GroupSample = (Labels<1>, u64);

/// Returns a series for each of these groups: at most [`SERIES_MAX`], those with the largest values
/// where there are more.
fn largest(mut values: Vec<(GroupId, u64)>) -> Vec<GroupSample> {
    if values.len() > SERIES_MAX {
        values.sort_by_key(|(group, value)| (Reverse(*value), *group));
        values.truncate(SERIES_MAX);
        values.sort();
    }
    values
        .into_iter()
        .map(|(group, value)| ([("group", group.0.to_string())], value))
        .collect()
}

/// Returns a series for each of these groups: at most [`SERIES_MAX`], those with the lowest numbers
/// where there are more.
fn first(mut values: Vec<(GroupId, u64)>) -> Vec<GroupSample> {
    values.sort();
    values.truncate(SERIES_MAX);
    largest(values)
}

/// Writes what is counted of the groups. Of those in `not_open` no replica runs here, though one
/// should.
fn of_facts(
    encoder: &mut DescriptorEncoder<'_>,
    facts: &[NodeFacts],
    not_open: &BTreeSet<GroupId>,
    differences: &BTreeMap<GroupId, u64>,
) -> fmt::Result {
    of_all_groups(encoder, facts)?;
    of_queues(encoder, facts)?;
    of_each_group(encoder, facts)?;
    of_trouble(encoder, facts, not_open, differences)
}

/// Writes how many of the groups are how.
fn of_all_groups(encoder: &mut DescriptorEncoder<'_>, facts: &[NodeFacts]) -> fmt::Result {
    let count = |is_so: fn(&NodeFacts) -> bool| facts.iter().filter(|facts| is_so(facts)).count();
    encoder.gauges(
        "quorate_groups",
        "Replicas here, witnesses among them, by what they are in their group.",
        by_role(facts),
    )?;
    encoder.gauge(
        "quorate_groups_leaderless",
        "Replicas here that know of no leader of their group.",
        count(|facts| facts.leader.is_none()),
    )?;
    encoder.gauge(
        "quorate_groups_read_only",
        "Shards with a replica here that take no writes: see quorate_group_read_only.",
        count(|facts| facts.is_read_only),
    )
}

/// Writes what waits in all groups together, and in the one with the most.
fn of_queues(encoder: &mut DescriptorEncoder<'_>, facts: &[NodeFacts]) -> fmt::Result {
    let sum = |value: fn(&NodeFacts) -> u64| facts.iter().map(value).sum::<u64>();
    let max = |value: fn(&NodeFacts) -> u64| facts.iter().map(value).max().unwrap_or(0);
    encoder.gauge(
        "quorate_writes_queued",
        "Writes that wait to be proposed here.",
        sum(|facts| facts.queued_writes),
    )?;
    encoder.gauge(
        "quorate_writes_queued_max",
        "Of these, those of the shard with the most. At 8192 more are refused.",
        max(|facts| facts.queued_writes),
    )?;
    encoder.gauge(
        "quorate_reads_queued",
        "Reads that wait for a quorum here.",
        sum(|facts| facts.queued_reads),
    )?;
    encoder.gauge(
        "quorate_unapplied_entries",
        "Committed entries to be applied here.",
        sum(|facts| facts.unapplied),
    )?;
    encoder.gauge(
        "quorate_unapplied_entries_max",
        "Of these, those of the replica with the most.",
        max(|facts| facts.unapplied),
    )
}

/// Returns a value of each replica that has a map. A witness applies nothing: its zeros would look
/// like a replica that is far behind.
fn of_maps(facts: &[NodeFacts], value: fn(&NodeFacts) -> u64) -> Vec<(GroupId, u64)> {
    facts
        .iter()
        .filter(|facts| facts.witness_bytes.is_none())
        .map(|facts| (facts.group, value(facts)))
        .collect()
}

/// Writes how far single groups are.
fn of_each_group(encoder: &mut DescriptorEncoder<'_>, facts: &[NodeFacts]) -> fmt::Result {
    let witness_bytes = facts
        .iter()
        .filter_map(|facts| Some((facts.group, facts.witness_bytes?)));
    encoder.gauges(
        "quorate_witness_log_bytes",
        "Bytes of log that the group's witness here keeps for replicas that may lack them. The 100 \
        largest.",
        largest(witness_bytes.collect()),
    )?;
    encoder.gauges(
        "quorate_group_leads",
        "1 where this node leads the group. Of the first 100 groups here; for all: quorate_groups.",
        first(of_maps(facts, |facts| {
            u64::from(facts.role == Role::Leader)
        })),
    )?;
    encoder.gauges(
        "quorate_group_term",
        "The group's term. Of the first 100 groups here.",
        first(of_maps(facts, |facts| facts.term)),
    )?;
    encoder.gauges(
        "quorate_group_applied_index",
        "Index of the last entry applied here. Of the first 100 groups here.",
        first(of_maps(facts, |facts| facts.applied)),
    )?;
    encoder.gauges(
        "quorate_group_purged_index",
        "Index of the last entry that is no longer in the log here. Of the first 100 groups here.",
        first(of_maps(facts, |facts| facts.purged)),
    )
}

/// Writes what an operator is woken for, of those groups first that are in trouble.
fn of_trouble(
    encoder: &mut DescriptorEncoder<'_>,
    facts: &[NodeFacts],
    not_open: &BTreeSet<GroupId>,
    differences: &BTreeMap<GroupId, u64>,
) -> fmt::Result {
    encoder.gauges(
        "quorate_group_read_only",
        "1 where the replicas of a shard hosted here differ without a majority of one mind: \
        nothing is written to it. Of 100 groups, such first.",
        largest(of_maps(facts, |facts| u64::from(facts.is_read_only))),
    )?;
    encoder.counters(
        "quorate_group_rebuilt_total",
        "How often the map of the replica here differed from a majority and was rebuilt, since the \
        start. Of 100 groups, such first.",
        largest(of_maps(facts, |facts| facts.rebuilt)),
    )?;
    let differences = differences.iter().map(|(group, count)| (*group, *count));
    encoder.counters(
        "quorate_replicas_differ_total",
        "How often replicas of a shard that this node led were found to differ, since the start. \
        Of 100 groups at most.",
        largest(differences.collect()),
    )?;

    let failed = facts
        .iter()
        .map(|facts| (facts.group, u64::from(facts.has_failed)))
        .chain(not_open.iter().map(|group| (*group, 1)));
    encoder.gauges(
        "quorate_group_failed",
        "1 where the replica on this node could not be opened, or has stopped by itself. Of 100 \
        groups, such first.",
        largest(failed.collect()),
    )
}

fn by_role(facts: &[NodeFacts]) -> [(Labels<1>, usize); 5] {
    let roles = [
        ("leader", Role::Leader),
        ("follower", Role::Follower),
        ("candidate", Role::Candidate),
        ("learner", Role::Learner),
        ("stopped", Role::Stopped),
    ];
    roles.map(|(name, role)| {
        let count = facts.iter().filter(|facts| facts.role == role).count();
        ([("role", name.to_owned())], count)
    })
}

/// Returns the peers that should be heard of all the time: members of groups that are led here
/// answer heartbeats, leaders send some, and where nobody leads all are asked for their votes.
/// Others may well be silent.
fn talkative(facts: &[NodeFacts], own: NodeId) -> BTreeSet<NodeId> {
    let mut nodes = BTreeSet::new();
    for facts in facts {
        match (facts.role, facts.leader) {
            (Role::Stopped, _) => {}
            (Role::Leader, _) | (_, None) => nodes.extend(facts.members.iter().copied()),
            (_, Some(leader)) => drop(nodes.insert(leader)),
        }
    }
    nodes.remove(&own);
    nodes
}

fn silences(context: &NodeContext, facts: &[NodeFacts], view: &View) -> Vec<Silence> {
    let now = Instant::now();
    let silent = |node: NodeId| {
        now.saturating_duration_since(
            context
                .registry
                .last_heard(node)
                .unwrap_or(context.began_at),
        )
    };
    let named = |node: NodeId| {
        let address = view.nodes.get(&node)?.address.to_string();
        Some(Silence {
            node,
            address,
            silent: silent(node),
        })
    };
    talkative(facts, context.node)
        .into_iter()
        .filter_map(named)
        .collect()
}

fn of_silences(encoder: &mut DescriptorEncoder<'_>, mut silences: Vec<Silence>) -> fmt::Result {
    silences.sort_by_key(|silence| (Reverse(silence.silent), silence.node));
    silences.truncate(SERIES_MAX);
    let samples = silences.into_iter().map(
        |Silence {
             node,
             address,
             silent,
         }| {
            let labels: Labels<2> = [("node", node.to_string()), ("address", address)];
            (labels, silent.as_secs_f64())
        },
    );
    encoder.gauges(
        "quorate_peer_silence_seconds",
        "Time since a node was last heard of that leads a group here or has a replica of one led \
        here. The 100 most silent.",
        samples,
    )
}

/// Writes what was asked of the cluster, and whether it is so.
fn of_view(encoder: &mut DescriptorEncoder<'_>, view: &View) -> fmt::Result {
    encoder.gauge(
        "quorate_view_epoch",
        "The last plan, as this node knows it.",
        view.epoch.0,
    )?;
    encoder.gauge("quorate_view_nodes", "Nodes of the view.", view.nodes.len())?;
    encoder.gauge(
        "quorate_view_shards",
        "Shards of the view.",
        view.shards().count(),
    )?;
    encoder.gauge(
        "quorate_view_settled",
        "1 where everything is as the last plan says.",
        u64::from(view.is_settled()),
    )?;
    encoder.gauge(
        "quorate_view_slots_astray",
        "Slots that are to move.",
        view.misplaced_slots().count(),
    )
}

#[cfg(test)]
mod tests {
    use quorate_sim::exposition::{Family, Sample};

    use super::*;
    use crate::metrics::written;

    fn facts(group: u64) -> NodeFacts {
        NodeFacts {
            group: GroupId(group),
            role: if group.is_multiple_of(3) {
                Role::Leader
            } else {
                Role::Follower
            },
            term: group,
            applied: 1 << 40,
            purged: 1 << 39,
            unapplied: group,
            leader: Some(NodeId(1)),
            members: [1, 2, 3].map(NodeId).into(),
            has_failed: group == 999,
            is_read_only: group == 998,
            rebuilt: 0,
            queued_writes: 2,
            queued_reads: 0,
            witness_bytes: (group % 10 == 9).then_some(1 << 30),
        }
    }

    fn value(families: &[Family], name: &str, label: &str) -> Option<f64> {
        let family = families.iter().find(|family| family.name == name)?;
        let is_it = |sample: &&Sample| {
            sample
                .labels
                .first()
                .is_none_or(|(_, value)| value == label)
        };
        family.samples.iter().find(is_it).map(|sample| sample.value)
    }

    #[test]
    fn thousands_of_shards_have_no_more_series_than_hundreds() {
        let series = |groups: u64| {
            let facts: Vec<NodeFacts> = (0..groups).map(facts).collect();
            let differences = facts.iter().map(|facts| (facts.group, 1)).collect();
            let silence = |node| Silence {
                node: NodeId(node),
                address: format!("n{node}:1"),
                silent: Duration::from_secs(node),
            };
            written(move |encoder| {
                of_facts(encoder, &facts, &[GroupId(1_000_000)].into(), &differences)?;
                of_silences(encoder, (1..=groups).map(silence).collect())
            })
        };
        let count = |families: &[Family]| {
            families
                .iter()
                .map(|family| family.samples.len())
                .sum::<usize>()
        };
        let (many, more) = (series(1001), series(4001));
        assert!(
            count(&many) == count(&more) && count(&many) < 1100,
            "{} and {} series",
            count(&many),
            count(&more)
        );

        assert_eq!(
            value(&many, "quorate_group_failed", "999"),
            Some(1.0),
            "what an operator is woken for is there"
        );
        assert_eq!(
            value(&many, "quorate_group_failed", "1000000"),
            Some(1.0),
            "also of one that is not open"
        );
        assert_eq!(value(&many, "quorate_group_read_only", "998"), Some(1.0));
        assert_eq!(value(&many, "quorate_group_leads", "0"), Some(1.0));
        assert_eq!(value(&many, "quorate_groups", "leader"), Some(334.0));
        assert_eq!(value(&many, "quorate_groups_read_only", ""), Some(1.0));
        assert_eq!(value(&many, "quorate_writes_queued", ""), Some(2002.0));
        assert_eq!(
            value(&many, "quorate_unapplied_entries_max", ""),
            Some(1000.0)
        );
        assert_eq!(
            value(&many, "quorate_peer_silence_seconds", "n1001"),
            Some(1001.0)
        );
        assert_eq!(value(&many, "quorate_peer_silence_seconds", "n1"), None);
    }

    #[test]
    fn only_who_should_be_heard_of_counts_as_silent() {
        let follower = NodeFacts {
            role: Role::Follower,
            ..facts(1)
        };
        assert_eq!(
            talkative(std::slice::from_ref(&follower), NodeId(2)),
            [NodeId(1)].into(),
            "other followers say nothing"
        );
        let leader = NodeFacts {
            role: Role::Leader,
            ..facts(1)
        };
        assert_eq!(talkative(&[leader], NodeId(1)), [2, 3].map(NodeId).into());
        let lost = NodeFacts {
            leader: None,
            ..follower.clone()
        };
        assert_eq!(talkative(&[lost], NodeId(2)), [1, 3].map(NodeId).into());
        assert!(
            talkative(
                &[NodeFacts {
                    role: Role::Stopped,
                    ..follower
                }],
                NodeId(2)
            )
            .is_empty()
        );
    }
}
