//! Has the replicas of each shard that is led here compare their maps now and then, and does what
//! follows: who differs from a majority is rebuilt, a leader that differs hands over first, and
//! without a majority of one mind nothing is written any more. Decided in `sm::agreement`.
//!
//! An entry has every replica note the digest of its map as of that entry, which its next
//! checkpoint knows anyway; nothing is read for it, and nothing waits. What is noted is told with
//! what a node says of its replicas.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::peer::{HostedReplica, NotedDigest};
use crate::node::context::NodeContext;
use crate::node::pause;
use crate::raft::Replica;
use crate::sm::agreement::{AgreementVerdict, is_majority_of_one_mind, judge};
use crate::sm::cluster::view::NodeSpec;
use crate::sm::kv::{KvCommand, KvOutcome};
use crate::sm::level::Feature;
use crate::telemetry::rarely;
use crate::types::{GroupId, LogId, NodeId, ReplicaId};

/// Between two looks; more often where maps are compared more often.
const TICK_MAX: Duration = Duration::from_secs(1);
const TICK_MIN: Duration = Duration::from_millis(50);
/// A comparison that not all have answered after so many intervals is judged by those who have; a
/// replica that is filled, or away, has nothing to tell of that entry.
const PATIENCE: u32 = 2;
/// After something was found, and under a new leader, maps are compared again after this part of
/// the interval.
const SOON: u32 = 10;
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// Compares the maps of the shards that are led here.
pub struct Agreement {
    context: Arc<NodeContext>,
    every: Duration,
    shards: BTreeMap<GroupId, Comparing>,
    /// Answers of the nodes in this round: each is asked at most once, for all shards.
    hosted: BTreeMap<NodeId, Vec<HostedReplica>>,
}

/// State of the comparison of one shard.
#[derive(Debug, Clone, Copy)]
enum Comparing {
    /// The next begins then. `settled`: the entry of the one before, if it found nothing that must
    /// be looked at again.
    Due { at: Instant, settled: Option<LogId> },
    /// The entry is proposed. `before`: that of the last digest that was noted here until then,
    /// which is none of this comparison.
    Asked {
        since: Instant,
        before: Option<LogId>,
    },
}

/// Digests that members have told of the comparison at one entry.
struct DigestAnswers {
    at: LogId,
    members: BTreeMap<ReplicaId, NodeId>,
    digests: BTreeMap<ReplicaId, String>,
}

impl Agreement {
    pub fn new(context: Arc<NodeContext>, every: Duration) -> Self {
        Self {
            context,
            every,
            shards: BTreeMap::new(),
            hosted: BTreeMap::new(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        let tick = (self.every / SOON).clamp(TICK_MIN, TICK_MAX);
        while pause::waited(shutdown, tick).await {
            if self.context.allows(Feature::CompareDigests) {
                self.look().await;
            }
        }
    }

    async fn look(&mut self) {
        self.hosted.clear();
        let shards = self
            .context
            .registry
            .groups()
            .into_iter()
            .filter(|group| !group.key().group.is_meta());
        let (led, followed): (Vec<_>, Vec<_>) = shards.partition(|group| group.leads());
        for group in followed {
            // Whoever leads says so, and the log.
            group.set_alarm(None);
        }
        self.shards
            .retain(|id, _| led.iter().any(|group| group.key().group == *id));
        for group in led {
            let id = group.key().group;
            let first = Comparing::Due {
                at: Instant::now() + self.every / SOON,
                settled: None,
            };
            let now = self.shards.get(&id).copied().unwrap_or(first);
            let next = self.step(&group, now).await;
            self.shards.insert(id, next);
        }
    }

    async fn step(&mut self, group: &Replica, now: Comparing) -> Comparing {
        match now {
            Comparing::Due { at, .. } if Instant::now() < at => now,
            // Of an idle shard nothing new is to be found.
            Comparing::Due { settled, .. }
                if settled.is_some() && settled == group.status().applied =>
            {
                Comparing::Due {
                    at: Instant::now() + self.every,
                    settled,
                }
            }
            Comparing::Due { .. } => self.begin(group).await,
            Comparing::Asked { since, before } => {
                let is_late = since.elapsed() > self.every * PATIENCE;

                // This replica may not have applied the entry itself yet.
                let noted = group
                    .state()
                    .noted_digest()
                    .filter(|(at, _)| Some(*at) > before);
                let Some((at, _)) = noted else {
                    return if is_late { self.due_soon() } else { now };
                };
                let answers = self.ask(group, at).await;

                // Whoever is slow may still differ: only after a while the others are judged
                // without it.
                if answers.digests.len() < answers.members.len() && !is_late {
                    return now;
                }
                match self.conclude(group, &answers).await {
                    true => Comparing::Due {
                        at: Instant::now() + self.every,
                        settled: Some(at),
                    },
                    false => self.due_soon(),
                }
            }
        }
    }

    fn due_soon(&self) -> Comparing {
        Comparing::Due {
            at: Instant::now() + self.every / SOON,
            settled: None,
        }
    }

    /// Proposes the entry of a comparison.
    async fn begin(&self, group: &Replica) -> Comparing {
        let before = group.state().noted_digest().map(|(at, _)| at);
        match group
            .propose_command(KvCommand::Compare, Instant::now() + PROPOSE_TIMEOUT)
            .await
        {
            Ok(KvOutcome::Compared) => Comparing::Asked {
                since: Instant::now(),
                before,
            },
            Ok(_) | Err(_) => self.due_soon(),
        }
    }

    /// Asks every member with a map for the digest that it has noted at that entry.
    async fn ask(&mut self, group: &Replica, at: LogId) -> DigestAnswers {
        let (id, own) = (group.key().group, group.key().replica);
        let membership = group.status().membership;
        let all = membership
            .voters
            .iter()
            .chain(&membership.learners)
            .map(|(replica, node)| (*replica, *node));
        let members: BTreeMap<ReplicaId, NodeId> = all
            .filter(|(replica, _)| !membership.is_witness(*replica))
            .collect();
        self.ask_hosted(members.values().copied().collect()).await;
        let answers = members
            .iter()
            .filter(|(replica, _)| **replica != own)
            .filter_map(|(replica, node)| {
                let replica_hosted = self
                    .hosted
                    .get(node)?
                    .iter()
                    .find(|hosted| hosted.group == id && hosted.replica == *replica)?;
                Some((*replica, replica_hosted.digest.clone()?))
            });
        let own = group
            .state()
            .noted_digest()
            .map(|(at, digest)| (own, NotedDigest::new(at, digest.pairs, digest.sum)));

        // Digests say something of each other only as of the same entry.
        let noted = answers.chain(own).filter(|(_, noted)| noted.at == at);
        let digests = noted
            .map(|(replica, noted)| (replica, noted.digest))
            .collect();
        DigestAnswers {
            at,
            members,
            digests,
        }
    }

    /// Asks those of the nodes that were not asked in this look.
    async fn ask_hosted(&mut self, nodes: BTreeSet<NodeId>) {
        let view = self.context.view();
        let new = nodes
            .into_iter()
            .filter(|node| *node != self.context.node && !self.hosted.contains_key(node));
        let new: Vec<(NodeId, NodeSpec)> = new
            .filter_map(|id| Some((id, view.nodes.get(&id)?.clone())))
            .collect();
        let context = &self.context;
        let asked = new.iter().map(|(id, node)| async move {
            (
                *id,
                context
                    .peers
                    .replicas(node, ASK_TIMEOUT)
                    .await
                    .unwrap_or_default(),
            )
        });
        let hosted = join_all(asked).await;
        self.hosted.extend(hosted);
    }

    /// Does what follows. Returns whether nothing more is to be looked after soon.
    async fn conclude(&self, group: &Replica, answers: &DigestAnswers) -> bool {
        let (id, own) = (group.key().group, group.key().replica);
        let members: BTreeSet<ReplicaId> = answers.members.keys().copied().collect();
        match judge(&members, &answers.digests) {
            AgreementVerdict::Agree => {
                if group.alarm().is_none() {
                    return true;
                }

                // That nobody contradicts may mean that nobody has answered: a majority has to
                // agree.
                if !is_majority_of_one_mind(&members, &answers.digests) {
                    return false;
                }
                let is_recorded = self.record(group, None).await;
                if is_recorded {
                    // Said once an alarm.
                    tracing::warn!(
                        "the replicas of shard {id} are of one mind again: it takes writes"
                    );
                    group.set_alarm(None);
                }
                is_recorded
            }
            AgreementVerdict::Minority(differing) => {
                // With a majority of one mind it is known which map is right, and writes may go on.
                if group.alarm().is_some() && self.record(group, None).await {
                    group.set_alarm(None);
                }
                self.context.differed(id);

                let list = differing
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", ");
                rarely!(
                    error,
                    "at {} of shard {id} these replicas differ from a majority: {list}",
                    answers.at
                );

                // A leader that differs can't rebuild others from its own map.
                if differing.contains(&own) {
                    self.hand_over(group, answers, &differing).await;
                } else {
                    self.rebuild(group, answers, &differing).await;
                }
                false
            }
            AgreementVerdict::NoMajority => {
                // Nobody knows which map is right, so nothing more is written until people have
                // decided.
                let reason = format!(
                    "its replicas differ as of entry {}, and no majority is of one mind ({} of {} \
                     answered); bring the others back, or restore the shard",
                    answers.at,
                    answers.digests.len(),
                    answers.members.len()
                );
                if group.alarm().is_none() {
                    // Said once an alarm.
                    self.context.differed(id);
                    tracing::error!("shard {id} is read-only: {reason}");
                }
                group.set_alarm(Some(reason.clone()));
                if group.recorded_alarm().is_none() {
                    self.record(group, Some(reason)).await;
                }
                false
            }
        }
    }

    /// Has the log say that nothing is written, for that reason, or that it is again: for the
    /// leaders to come. Returns whether that is so, which it is at once where programs of the
    /// cluster do not know such entries yet, and the next leader has to find out itself.
    async fn record(&self, group: &Replica, reason: Option<String>) -> bool {
        if !self.context.allows(Feature::ReadOnlyEntries) {
            return true;
        }
        let command = KvCommand::SetReadOnly { reason };
        match group
            .propose_command(command, Instant::now() + PROPOSE_TIMEOUT)
            .await
        {
            Ok(KvOutcome::ReadOnlySet) => true,
            Ok(_) => false,
            Err(error) => {
                rarely!(
                    warn,
                    "whether shard {} is read-only is not in its log yet: {error}",
                    group.key().group
                );
                false
            }
        }
    }

    /// Hands over to a replica that does not differ from the majority, as this one does, and which
    /// then has this one rebuilt.
    async fn hand_over(
        &self,
        group: &Replica,
        answers: &DigestAnswers,
        differing: &BTreeSet<ReplicaId>,
    ) {
        let id = group.key().group;

        // The next leader has to be of the majority: it rebuilds this replica from its own map.
        for replica in answers
            .digests
            .keys()
            .filter(|replica| !differing.contains(replica))
        {
            match group.transfer_leader(*replica).await {
                Ok(()) => {
                    rarely!(
                        error,
                        "the lead of shard {id} is handed over to replica {replica}: the one here \
                        differs"
                    );
                    return;
                }
                Err(error) => rarely!(
                    warn,
                    "the lead of shard {id} was not handed over to replica {replica}: {error}"
                ),
            }
        }
    }

    async fn rebuild(
        &self,
        group: &Replica,
        answers: &DigestAnswers,
        differing: &BTreeSet<ReplicaId>,
    ) {
        for replica in differing {
            let Some(node) = answers.members.get(replica) else {
                continue;
            };
            if let Err(error) = group.rebuild(*replica, *node).await {
                rarely!(
                    warn,
                    "replica {replica} of shard {} was not rebuilt: {error}",
                    group.key().group
                );
            }
        }
    }
}
