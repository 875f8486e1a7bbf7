//! A node that belongs to a cluster: the view as it knows it, its replicas, and whom to ask about
//! the others.
//!
//! [`NodeContext`] is what the other parts of `node` share. It decides nothing: the view comes from
//! the node's own meta replica (set by `reconciler`), leaders from its own replicas, or from what
//! others answered (hints, which may be wrong and are only tried first).

use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::time::Instant;

use super::failure_reports::FailureReports;
use super::full_disks::FullDisks;
use super::join::Joining;
use super::move_counters::MoveCounters;
use super::replica_failures::ReplicaFailures;
use super::views::{Views, place_holder};
use crate::api::peer::{Announcement, FailedReplica, HostedReplica, Hosting, NotedDigest};
use crate::api::protocol::{
    ClusterStatus, Hop, MoveStatus, NodeStatus, ReplicaHealth, ReplicaStatus, ShardStatus,
};
use crate::api::shard_map::ShardMap;
use crate::api::store::Failure;
use crate::raft::ProposeError;
use crate::raft::Replica;
use crate::raft::transport::Resolver;
use crate::raft::{Registry, WitnessReplica};
use crate::rare::{self, RareBranch};
use crate::routing::call::ShardCaller;
use crate::routing::peer_caller::{PeerCaller, PeerError};
use crate::sm::cluster::meta;
use crate::sm::cluster::view::{NodeSpec, View, WitnessSpec as Seat};
use crate::sm::kv;
use crate::sm::level::Feature;
use crate::storage::log::Vote;
use crate::storage::map::ReadKind;
use crate::types::{Address, ClusterId, GroupId, LogId, MapVersion, NodeId, PlanEpoch, ReplicaId};

/// Time after which to try a meta leader again that was none.
const META_RETRY_AFTER_MS: u64 = 500;
/// Time for which a router waits for a newer map before it tries the one it has once more.
const MAP_WAIT: Duration = Duration::from_millis(200);
/// Time for which a node that did not answer is asked last.
const SUSPECT_FOR: Duration = Duration::from_secs(1);
/// Time that the other nodes have to tell of their replicas.
const STATUS_TIMEOUT: Duration = Duration::from_millis(500);
/// Nodes that are asked at once: a connection each.
const STATUS_ASKED_AT_ONCE: usize = 64;
/// An answer about all nodes is shared by who asks within this time: watching a cluster must not
/// load it.
const STATUS_FRESH_FOR: Duration = Duration::from_millis(200);
/// A replica that has applied less than its leader by more than this many entries is lagging.
const LAGGING_ENTRIES: u64 = 1000;

/// A node of a cluster.
pub struct NodeContext {
    pub cluster: ClusterId,
    pub node: NodeId,
    /// The address that clients are sent to for this node.
    pub address: Address,
    pub registry: Arc<Registry>,
    pub caller: ShardCaller,
    pub peers: PeerCaller,
    pub moves: MoveCounters,
    pub failures: ReplicaFailures,
    pub reports: FailureReports,
    pub full_disks: FullDisks,
    /// Since when this node has listened to others.
    pub began_at: Instant,
    /// Counts for each shard that this node led how often its replicas were found to differ.
    differed: Mutex<BTreeMap<GroupId, u64>>,
    joining: Arc<Joining>,
    views: Arc<Views>,
    hints: Mutex<HashMap<GroupId, ShardHint>>,
    status: tokio::sync::Mutex<Option<(Instant, ClusterStatus)>>,
}

/// Remembers who leads a shard that this node has no replica of, or does not lead.
#[derive(Debug, Default)]
struct ShardHint {
    leader: Option<NodeId>,
    /// The question by whose answer it has shown that it leads.
    shown: Option<LeaderQuestion>,
    suspects: Vec<(NodeId, Instant)>,
}

/// A question that nobody but the leader of a shard answers. The answer may have been on its way
/// for long, so it shows no more than that its node led after it was asked.
#[derive(Debug, Clone, Copy)]
pub struct LeaderQuestion {
    /// The time at which it was asked.
    at: Instant,
    /// The vote that this node's replica had given by then, if it has one.
    promise: Option<Vote>,
}

/// A node to ask.
#[derive(Debug, Clone)]
pub struct PeerPlace {
    pub node: NodeId,
    pub address: Address,
    /// The address that others are sent to.
    pub name: Address,
    /// As a relay while one that comes before it can't be connected to.
    pub hop: Hop,
}

impl NodeContext {
    pub fn new(
        node: NodeId,
        joining: Arc<Joining>,
        views: Arc<Views>,
        registry: Arc<Registry>,
        caller: ShardCaller,
        peers: PeerCaller,
    ) -> Option<Self> {
        let view = views.view();
        let address = view.nodes.get(&node)?.public().clone();
        Some(Self {
            cluster: view.cluster,
            node,
            address,
            registry,
            caller,
            peers,
            moves: MoveCounters::default(),
            failures: ReplicaFailures::default(),
            reports: FailureReports::default(),
            full_disks: FullDisks::default(),
            began_at: Instant::now(),
            differed: Mutex::default(),
            joining,
            views,
            hints: Mutex::default(),
            status: tokio::sync::Mutex::default(),
        })
    }

    pub fn view(&self) -> Arc<View> {
        self.views.view()
    }

    /// Counts that replicas of a shard which this node leads differ.
    pub fn differed(&self, shard: GroupId) {
        *self.differed.lock().entry(shard).or_default() += 1;
    }

    /// Returns how often replicas of each shard that this node led were found to differ.
    pub fn differences(&self) -> BTreeMap<GroupId, u64> {
        self.differed.lock().clone()
    }

    /// Returns whether a leader may propose it: every node of the cluster can read it.
    pub fn allows(&self, feature: Feature) -> bool {
        self.views.level() >= feature.level()
    }

    pub fn views(&self) -> &Arc<Views> {
        &self.views
    }

    pub fn map(&self) -> Arc<ShardMap> {
        self.views.map()
    }

    /// Returns true if a peer was heard of lately, on any lane.
    pub fn heard_within(&self, node: NodeId, time: Duration) -> bool {
        self.registry
            .last_heard(node)
            .is_some_and(|at| at.elapsed() < time)
    }

    /// Asks another node whether its disk has room for writes. Returns None if it did not answer.
    /// Programs that do not say are taken to have some.
    pub async fn has_room(&self, node: NodeId, timeout: Duration) -> Option<bool> {
        let place = self.view().nodes.get(&node).cloned()?;
        let hosting = self.peers.hosting(&place, timeout).await.ok()?;
        Some(!hosting.lacks_room)
    }

    /// Asks another node whether it could lead a shard by that replica: the replica runs, the disk
    /// has room, and the node is not stopping. Returns None if it did not answer.
    pub async fn could_lead(
        &self,
        node: NodeId,
        shard: GroupId,
        replica: ReplicaId,
        timeout: Duration,
    ) -> Option<bool> {
        let place = self.view().nodes.get(&node).cloned()?;
        let hosting = self.peers.hosting(&place, timeout).await.ok()?;
        Some(!hosting.lacks_room && !hosting.is_stopping && hosting.runs(shard, replica))
    }

    /// Returns true if a node is this one, or was heard of lately.
    pub fn is_in_reach(&self, node: NodeId, time: Duration) -> bool {
        node == self.node || self.heard_within(node, time)
    }

    /// Waits a moment for a map newer than this one.
    pub async fn wait_for_map(&self, older_than: MapVersion) {
        let mut views = self.views.subscribe();
        // Neither a moment without news nor a node that is stopping is an error: the router goes on
        // with the map it has.
        drop(
            tokio::time::timeout(MAP_WAIT, views.wait_for(|view| view.version > older_than)).await,
        );
    }

    /// Waits until the view that is known here says that the change of this plan is over, for at
    /// most so long. Returns true if it does.
    pub async fn hears_of_end(&self, id: PlanEpoch, at_most: Duration) -> bool {
        let mut views = self.views.subscribe();
        let is_over = |view: &Arc<View>| view.epoch > id || (view.epoch == id && view.is_settled());
        matches!(
            tokio::time::timeout(at_most, views.wait_for(is_over)).await,
            Ok(Ok(_))
        )
    }

    /// Returns the replica of the shard here, if it is to stay: one on its way out hears nothing
    /// any more, also not who leads.
    pub fn staying_replica(&self, shard: GroupId) -> Option<Arc<Replica>> {
        let stays = self.view().replica_on(shard, self.node)?;
        self.registry
            .get(shard)
            .filter(|group| group.key().replica == stays)
    }

    /// Refuses what comes from a node of another cluster, at an address that has changed hands.
    pub fn ensure_ours(&self, cluster: ClusterId) -> Result<(), Failure> {
        if cluster == self.cluster {
            return Ok(());
        }
        Err(Failure::Invalid {
            reason: format!(
                "this node belongs to cluster {}, not to {cluster}",
                self.cluster
            ),
        })
    }

    /// Returns the node to ask about a shard that this one does not lead: its leader where that is
    /// known, else its home, else any with a replica; one that did not answer a moment ago, has
    /// just ended, or can't be connected to, only if there is no other.
    pub fn peer_for(&self, shard: GroupId) -> Option<PeerPlace> {
        let candidates = self.candidates(shard);
        let is_closed = |node: &NodeId| self.registry.reachability().is_unreachable(*node);
        let chosen = candidates
            .iter()
            .find(|(_, is_suspect)| !is_suspect)
            .or(candidates.first())
            .map(|(node, _)| *node)?;

        // A likelier node comes before it and can't be connected to: this one may reach it.
        let is_around = candidates
            .iter()
            .take_while(|(node, _)| *node != chosen)
            .any(|(node, _)| is_closed(node));
        let hop = if is_around || is_closed(&chosen) {
            Hop::Relay
        } else {
            Hop::Answer
        };
        self.place_of(chosen, hop)
    }

    /// Returns the other nodes that may lead a shard, each once: the likeliest first, those behind
    /// the rest that [`NodeContext::peer_for`] would only ask if there were no other, and none that
    /// can't be connected to.
    pub fn peers_of(&self, shard: GroupId) -> Vec<PeerPlace> {
        let mut candidates = self.candidates(shard);
        candidates.sort_by_key(|(_, is_suspect)| *is_suspect);
        let mut asked: Vec<NodeId> = Vec::with_capacity(candidates.len());
        for (node, _) in candidates {
            if !asked.contains(&node) && !self.registry.reachability().is_unreachable(node) {
                asked.push(node);
            }
        }
        let place = |node| self.place_of(node, Hop::Answer);
        asked.into_iter().filter_map(place).collect()
    }

    /// Returns the nodes that may lead a shard, but for this one, and which of them are suspect:
    /// the leader where that is known, the home, and the others with a replica, perhaps again.
    fn candidates(&self, shard: GroupId) -> Vec<(NodeId, bool)> {
        let map = self.map();
        let Some(place) = map.shard(shard) else {
            return Vec::new();
        };
        let local_leader = self
            .staying_replica(shard)
            .and_then(|group| group.status().leader);
        let hints = self.hints.lock();
        let hint = hints.get(&shard);
        let hinted = hint.and_then(|hint| hint.leader);
        let suspect = |node: NodeId| {
            let suspects = hint
                .map(|hint| hint.suspects.as_slice())
                .unwrap_or_default();
            let is_silent = suspects
                .iter()
                .any(|(suspect, since)| *suspect == node && since.elapsed() < SUSPECT_FOR);
            // Who showed that it leads is asked, whatever the lanes say.
            is_silent
                || self.registry.reachability().is_unreachable(node)
                || (hinted != Some(node) && self.registry.is_disconnected(node))
        };
        let replicas = place.replicas.iter().copied();
        local_leader
            .into_iter()
            .chain(hinted)
            .chain([place.home])
            .chain(replicas)
            .filter(|node| *node != self.node && map.node(*node).is_some())
            .map(|node| (node, suspect(node)))
            .collect()
    }

    /// Returns the address at which a node is to be asked, if it is in the view.
    pub fn place_of(&self, node: NodeId, hop: Hop) -> Option<PeerPlace> {
        let map = self.map();
        // Where it was found, which the view may not say yet.
        let address = self.views.resolve(node).map(|peer| peer.address);
        let address = address.or_else(|| map.node(node).map(|place| place.address.clone()))?;
        Some(PeerPlace {
            node,
            address,
            name: map.name_of(node)?.clone(),
            hop,
        })
    }

    /// Returns the node that showed a moment ago that it leads the shard. `replica` is that of this
    /// node: once it has given another vote, what was shown before counts no more, and while that
    /// is for itself it may lead by now.
    pub fn shown_leader(&self, shard: GroupId, replica: Option<&Replica>) -> Option<NodeId> {
        let hints = self.hints.lock();
        let hint = hints.get(&shard)?;
        let LeaderQuestion { at, promise } = hint.shown?;
        let now = replica.and_then(Replica::promise);
        let is_own = replica.is_some_and(|group| {
            now.is_some_and(|vote| vote.voted_for == Some(group.key().replica))
        });
        let is_fresh = at.elapsed() <= self.registry.silence_max();
        hint.leader
            .filter(|_| is_fresh && promise == now && !is_own)
    }

    /// Returns the leader of the shard: this node, or who answered for it last, or whom its replica
    /// here follows.
    pub fn known_leader(&self, shard: GroupId) -> Option<NodeId> {
        let local = self.registry.get(shard);
        if local.as_ref().is_some_and(|group| group.leads()) {
            return Some(self.node);
        }
        let hinted = self.hints.lock().get(&shard).and_then(|hint| hint.leader);
        hinted.or_else(|| local.and_then(|group| group.status().leader))
    }

    /// Another node said that the one at this address leads the shard.
    pub fn learn_leader(&self, shard: GroupId, address: &Address) {
        self.set_hint(shard, self.map().node_named(address), None);
    }

    /// Returns what an answer of a leader of the shard will show. Made before it is asked.
    pub fn leader_question(&self, shard: GroupId) -> LeaderQuestion {
        let replica = self.staying_replica(shard);
        LeaderQuestion {
            at: Instant::now(),
            promise: replica.and_then(|group| group.promise()),
        }
    }

    /// Notes that a node has shown, by its answer to this question, that it leads the shard.
    pub fn note_leader(&self, shard: GroupId, leader: NodeId, question: LeaderQuestion) {
        let is_old = |hint: &ShardHint| hint.shown.is_some_and(|shown| shown.at > question.at);

        // An answer that took long must not take the place of one to a later question.
        if !self.hints.lock().get(&shard).is_some_and(is_old) {
            self.set_hint(shard, Some(leader), Some(question));
        }
    }

    fn set_hint(&self, shard: GroupId, leader: Option<NodeId>, shown: Option<LeaderQuestion>) {
        // Nothing may rest on hints but the order in which nodes are asked.
        if rare::is_taken(RareBranch::LostHints) {
            return;
        }
        let map = self.map();
        let mut hints = self.hints.lock();

        // Shards that have ended leave their hints behind.
        if hints.len() > map.shards().count() {
            hints.retain(|shard, _| map.shard(*shard).is_some());
        }
        let hint = hints.entry(shard).or_default();
        hint.leader = leader;
        hint.shown = shown;
        hint.suspects
            .retain(|(node, since)| Some(*node) != leader && since.elapsed() < SUSPECT_FOR);
    }

    /// Notes that a node did not answer for the shard.
    pub fn forget_leader(&self, shard: GroupId, node: NodeId) {
        let mut hints = self.hints.lock();
        let hint = hints.entry(shard).or_default();
        if hint.leader == Some(node) {
            hint.leader = None;
        }
        hint.suspects
            .retain(|(suspect, since)| *suspect != node && since.elapsed() < SUSPECT_FOR);
        hint.suspects.push((node, Instant::now()));
    }

    /// Has the meta group apply a command, wherever it is led.
    ///
    /// # Errors
    ///
    /// Why there is no answer. After [`Failure::Unknown`] it may have been applied.
    pub async fn tell_meta(
        &self,
        command: meta::MetaCommand,
        timeout: Duration,
    ) -> Result<meta::MetaOutcome, Failure> {
        let meta = self.meta()?;
        if meta.leads() {
            return match meta.propose_meta(command, Instant::now() + timeout).await {
                Ok(outcome) => Ok(outcome),
                Err(ProposeError::Unknown { reason }) => Err(Failure::Unknown { reason }),
                Err(error) => Err(unavailable(error.to_string())),
            };
        }
        let leader = self.leader_of(&meta)?;
        let announcement = Announcement {
            cluster: self.cluster,
            command,
        };
        self.peers
            .announce(&leader, &announcement, timeout)
            .await
            .map_err(|error| match error {
                // Without a connection nothing was sent, so nothing can have been applied.
                PeerError::NoAnswer { source, .. } if source.is_connect() => {
                    unavailable(source.to_string())
                }
                error => Failure::Unknown {
                    reason: error.to_string(),
                },
            })
    }

    /// Has the meta group, which this node leads, take the address that a node announces. Where
    /// another node had it that was found elsewhere since, that one gives it up: two nodes that
    /// have changed places could announce nothing else.
    ///
    /// # Errors
    ///
    /// As of [`NodeContext::tell_meta`].
    pub async fn take_address(
        &self,
        announce: meta::MetaCommand,
        timeout: Duration,
    ) -> Result<meta::MetaOutcome, Failure> {
        let outcome = self.tell_meta(announce.clone(), timeout).await?;
        let meta::MetaOutcome::Rejected(meta::MetaRejection::AddressTaken { address, by }) =
            &outcome
        else {
            return Ok(outcome);
        };

        // The address may be given away only if its owner has shown that it runs elsewhere.
        let Some(directory) = self.view().nodes.get(by).map(|node| node.directory) else {
            return Ok(outcome);
        };
        let Some(found) = self
            .views
            .moved_to(directory)
            .filter(|found| found != address)
        else {
            return Ok(outcome);
        };

        tracing::info!(
            "node {by} is at {found} now: its old address {address} is given to the node that runs \
            there"
        );
        let place_holder = place_holder(*by).map_err(|error| unavailable(error.to_string()))?;
        let away = meta::MetaCommand::Announce {
            node: *by,
            directory,
            address: place_holder,
            public_address: None,
        };

        match self.tell_meta(away, timeout).await? {
            meta::MetaOutcome::Done | meta::MetaOutcome::MoveOpened { .. } => {
                self.tell_meta(announce, timeout).await
            }
            rejected @ meta::MetaOutcome::Rejected(_) => Ok(rejected),
        }
    }

    /// Reads the view as it is now, wherever the meta group is led, and not as this node may still
    /// know it.
    ///
    /// # Errors
    ///
    /// When the leader of the meta group does not say so in time.
    pub async fn view_now(&self, timeout: Duration) -> Result<View, Failure> {
        let meta = self.meta()?;
        if meta.leads() {
            return read_view_now(&meta, Instant::now() + timeout).await;
        }
        let leader = self.leader_of(&meta)?;
        self.peers
            .view(&leader, self.cluster, timeout)
            .await
            .map_err(|error| unavailable(error.to_string()))
    }

    fn meta(&self) -> Result<Arc<Replica>, Failure> {
        self.registry
            .get(GroupId::META)
            .ok_or_else(|| unavailable("the meta group is not open here".into()))
    }

    /// Returns the address of the leader of the meta group.
    fn leader_of(&self, meta: &Replica) -> Result<Address, Failure> {
        let leader = meta
            .status()
            .leader
            .and_then(|leader| self.views.resolve(leader))
            .map(|peer| peer.address);
        leader.ok_or_else(|| {
            unavailable(format!(
                "the meta group has no leader{}",
                self.missing_of(GroupId::META)
            ))
        })
    }

    /// Returns what this node says of itself and its replicas.
    pub async fn hosting(&self, lacks_room: bool) -> Hosting {
        self.joining
            .hosting(self.hosted().await, self.failures.to_messages(), lacks_room)
    }

    async fn hosted(&self) -> Vec<HostedReplica> {
        let groups = self.registry.groups();
        let mut replicas = Vec::with_capacity(groups.len());
        for group in groups {
            replicas.push(hosted(&group).await);
        }
        replicas.extend(self.registry.witnesses().iter().map(hosted_witness));
        replicas
    }

    /// Returns the view and the state of its groups: asks every node about its replicas.
    pub async fn status(&self) -> ClusterStatus {
        let mut cached = self.status.lock().await;
        let view = self.view();

        // The lock is held while nodes are asked, so that one round answers all who wait.
        if let Some((at, status)) = cached.as_ref()
            && at.elapsed() < STATUS_FRESH_FOR
            && status.version == view.version
        {
            return status.clone();
        }
        let ask = |(id, node): (NodeId, NodeSpec)| async move {
            if id == self.node {
                return (id, Some(self.hosting(false).await));
            }
            (id, self.peers.hosting(&node, STATUS_TIMEOUT).await.ok())
        };
        let nodes: Vec<(NodeId, NodeSpec)> = view
            .nodes
            .iter()
            .map(|(id, node)| (*id, node.clone()))
            .collect();
        let asked = futures::stream::iter(nodes)
            .map(ask)
            .buffer_unordered(STATUS_ASKED_AT_ONCE);
        let answers: HashMap<NodeId, Option<Hosting>> = asked.collect().await;
        let status = self.describe(&view, &answers);
        *cached = Some((Instant::now(), status.clone()));
        status
    }

    fn describe(&self, view: &View, answers: &HashMap<NodeId, Option<Hosting>>) -> ClusterStatus {
        let told = |id: &NodeId| answers.get(id).and_then(Option::as_ref);
        let nodes = view.nodes.iter().map(|(id, node)| NodeStatus {
            id: *id,
            address: node.address.clone(),
            public_address: node.public().clone(),
            directory: node.directory,
            reachable: answers.get(id).is_some_and(Option::is_some),
            leaving: view.leaving.contains(id),
            speaks: told(id).map(|hosting| hosting.speaks),
            holds_level: told(id).is_some_and(|hosting| hosting.holds_level),
            failed: told(id)
                .map(|hosting| hosting.failed.clone())
                .unwrap_or_default(),
        });

        let moves = view.moves.iter().map(|(id, held)| MoveStatus {
            id: *id,
            from: held.from,
            to: held.to,
            slots: held.slots.len() as u64,
        });
        let shards = view
            .shards()
            .map(|(id, group)| describe_shard(view, id, group, answers));

        ClusterStatus {
            cluster: view.cluster,
            epoch: view.epoch,
            version: view.version,
            level: view.level,
            asked: view.placement,
            answered_by: self.node,
            meta_leader: self
                .registry
                .get(GroupId::META)
                .and_then(|meta| meta.status().leader),
            nodes: nodes.collect(),
            shards: shards.collect(),
            moves: moves.collect(),
            slots_astray: view.misplaced_slots().count() as u64,
            settled: view.is_settled(),
            slots: view.slots.clone(),
        }
    }
}

fn unavailable(reason: String) -> Failure {
    Failure::Unavailable {
        reason,
        retry_after_ms: META_RETRY_AFTER_MS,
    }
}

/// Reads the view as it is now, from the replica that leads the meta group.
///
/// # Errors
///
/// When no quorum confirms in time that it does, or there is no view yet.
pub async fn read_view_now(meta: &Replica, deadline: Instant) -> Result<View, Failure> {
    meta.read_barrier(deadline)
        .await
        .map_err(|error| unavailable(error.to_string()))?;
    read_applied_view(meta)
}

/// Reads the view that a replica of the meta group has applied.
///
/// # Errors
///
/// When there is none yet, or it can't be read.
pub fn read_applied_view(meta: &Replica) -> Result<View, Failure> {
    let read = meta::read_view(&meta.state().read());
    let view = read.map_err(|error| unavailable(format!("the view cannot be read: {error}")))?;
    view.ok_or_else(|| unavailable("the cluster is not founded yet".into()))
}

async fn hosted(group: &Replica) -> HostedReplica {
    let status = group.status();
    let key = group.key();
    // A map that can't be read is told by `failed`, and has no counts.
    let read = group
        .state()
        .read_in(ReadKind::Page, |read| kv::count(read))
        .await;
    let (count, damage) = match read {
        Ok(count) => (Some(count), None),
        Err(error) => (None, Some(error.to_string())),
    };
    HostedReplica {
        group: key.group,
        replica: key.replica,
        leader: status.leader,
        term: status.term,
        applied: status.applied,
        keys: count.as_ref().map_or(0, |count| count.keys),
        bytes: count.as_ref().map_or(0, |count| count.bytes),
        failed: status.failed.or(damage),
        is_witness: false,
        digest: group
            .state()
            .noted_digest()
            .map(|(at, digest)| NotedDigest::new(at, digest.pairs, digest.sum)),
        alarm: group.alarm(),
    }
}

fn hosted_witness(witness: &WitnessReplica) -> HostedReplica {
    let (key, status) = (witness.key(), witness.status());
    HostedReplica {
        group: key.group,
        replica: key.replica,
        leader: status.leader,
        term: status.term,
        applied: status.applied,
        keys: 0,
        bytes: 0,
        failed: status.failed,
        is_witness: true,
        digest: None,
        alarm: None,
    }
}

fn describe_shard(
    view: &View,
    id: GroupId,
    group: &crate::sm::cluster::view::GroupSpec,
    answers: &HashMap<NodeId, Option<Hosting>>,
) -> ShardStatus {
    let told = |replica: ReplicaId, node: NodeId| -> Option<&HostedReplica> {
        answers
            .get(&node)?
            .as_ref()?
            .replicas
            .iter()
            .find(|hosted| hosted.group == id && hosted.replica == replica)
    };
    let has_failed = |replica: ReplicaId, node: NodeId| {
        let hosting = answers.get(&node).and_then(Option::as_ref);
        let is_it = |failed: &FailedReplica| failed.group == id && failed.replica == replica;
        hosting.is_some_and(|hosting| hosting.failed.iter().any(is_it))
    };

    let with_told = |(replica, node)| (replica, node, told(replica, node));
    let is_witness = |replica: ReplicaId, hosted: Option<&HostedReplica>| {
        group.is_witness(replica) || hosted.is_some_and(|hosted| hosted.is_witness)
    };
    let all: Vec<(ReplicaId, NodeId, Option<&HostedReplica>)> = group
        .hosted()
        .map(with_told)
        .filter(|(replica, _, hosted)| !is_witness(*replica, *hosted))
        .collect();
    // The leader is who says so itself, in the highest term: what others say may be out of date.
    let leading = all
        .iter()
        .filter_map(|(_, node, hosted)| {
            hosted
                .filter(|hosted| hosted.leader == Some(*node))
                .map(|hosted| (*node, hosted))
        })
        .max_by_key(|(_, hosted)| hosted.term);

    // Without a leader the replica counts that has applied most.
    let newest = leading.map(|(_, hosted)| hosted).or_else(|| {
        all.iter()
            .filter_map(|(_, _, hosted)| *hosted)
            .max_by_key(|h| h.applied)
    });
    let leader = leading.map(|(node, _)| node);
    let applied_index = newest
        .and_then(|hosted| hosted.applied)
        .map_or(0, |applied| applied.index);

    let describe =
        |replica: ReplicaId, node: NodeId, hosted: Option<&HostedReplica>| ReplicaStatus {
            id: replica,
            node,
            health: match has_failed(replica, node) {
                true => ReplicaHealth::Failed,
                false => health(hosted, leader == Some(node), applied_index),
            },
            applied: hosted.and_then(|hosted| hosted.applied),
            leaving: group.leaving.contains_key(&replica),
        };

    let replicas = all
        .iter()
        .map(|(replica, node, hosted)| describe(*replica, *node, *hosted));
    let witness = group
        .witness
        .map(|Seat { replica, node }| describe(replica, node, told(replica, node)));

    ShardStatus {
        id,
        home: group.home,
        leader,
        term: leading.map(|(_, hosted)| hosted.term),
        keys: newest.map(|hosted| hosted.keys),
        bytes: newest.map(|hosted| hosted.bytes),
        slots: view.slots.slots_of(id).count() as u64,
        replicas: replicas.collect(),
        witness,
        alarm: leading
            .and_then(|(_, hosted)| hosted.alarm.clone())
            .or_else(|| {
                // It is in the log, and so known while nobody leads.
                all.iter()
                    .find_map(|(_, _, hosted)| hosted.and_then(|hosted| hosted.alarm.clone()))
            }),
    }
}

fn health(hosted: Option<&HostedReplica>, leads: bool, applied_index: u64) -> ReplicaHealth {
    let index = |applied: Option<LogId>| applied.map_or(0, |applied| applied.index);
    match hosted {
        None => ReplicaHealth::Unreachable,
        Some(hosted) if hosted.failed.is_some() => ReplicaHealth::Failed,
        Some(_) if leads => ReplicaHealth::Leading,
        Some(hosted) if index(hosted.applied) + LAGGING_ENTRIES < applied_index => {
            ReplicaHealth::Lagging
        }
        Some(_) => ReplicaHealth::Following,
    }
}
