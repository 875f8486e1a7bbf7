//! The view: what the operator asked for, the nodes, the groups with their replicas, and which
//! shard owns which slot.
//!
//! The meta group holds it; each node reads it from its own replica. A plain value: planning is in
//! `placement`, changing it in `meta`. [`View::check`] says what must hold of every view; the meta
//! group accepts no other.

mod record;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::sm::codec;
use crate::sm::level::Feature;
use crate::sm::ports::StoreError;
use crate::types::{
    Address, ClusterId, DirectoryId, GroupId, LogId, MapVersion, MoveId, NodeId, PlanEpoch,
    ReplicaId, Slot,
};

/// The format of views of level 0, and of commands that end with one. The first format ended before
/// the witnesses. Views of a later level are in the format [`codec::LEVELED`].
pub(super) const FORMAT: u8 = 2;

/// Reads what ends with a view in any of its formats: a view itself, or such a command.
pub(super) fn decode_ending<T: for<'a> Deserialize<'a>>(
    bytes: &[u8],
    what: &'static str,
) -> Result<T, StoreError> {
    const NO_WITNESSES: u8 = 0;
    const LEVEL_0: u8 = 0;
    if let Some((_, body)) = codec::split_leveled(bytes, what)? {
        return codec::decode_body(body, what);
    }
    let (format, body) = codec::split(bytes, FORMAT, what)?;

    // Later fields stand at the end, so what an earlier format lacks is put behind it.
    let missing: &[u8] = if format == codec::FORMAT {
        &[NO_WITNESSES, LEVEL_0]
    } else {
        &[LEVEL_0]
    };
    codec::decode_body(&[body, missing].concat(), what)
}

/// Encodes what ends with a view of this level.
pub(super) fn encode_ending<T: Serialize>(level: u16, value: &T) -> Bytes {
    match level {
        0 => codec::encode_as(FORMAT, value),
        level => codec::encode_leveled(level, value, 0),
    }
}

/// The agreed state of the cluster. Part of the disk format (inside the meta group's map).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "record::ViewRecord", into = "record::ViewRecord")]
pub struct View {
    pub cluster: ClusterId,
    pub epoch: PlanEpoch,
    pub version: MapVersion,
    /// The level that every node can read, and so that leaders may propose. Never lowered.
    pub level: u16,
    pub placement: PlacementSpec,
    pub nodes: BTreeMap<NodeId, NodeSpec>,
    /// Nodes on their way out: each stays in `nodes` until the last of its replicas is retired.
    pub leaving: BTreeSet<NodeId>,
    /// Nodes that stay, but whose replicas were given to others because they were out of reach. A
    /// plan that finds one again gives it work.
    pub evicted: BTreeSet<NodeId>,
    /// Every group, the meta group among them.
    pub groups: BTreeMap<GroupId, GroupSpec>,
    /// The shard that serves each slot.
    pub slots: SlotTable,
    /// The shard that should serve each slot.
    pub targets: SlotTable,
    /// Moves under way.
    pub moves: BTreeMap<MoveId, SlotMove>,
    /// The next ids to give out. Ids only grow.
    pub next_node: NodeId,
    pub next_group: GroupId,
    pub next_replica: ReplicaId,
    pub next_move: MoveId,
}

/// A move under way: it ends by a commit or an abort, whatever is planned meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotMove {
    pub slots: BTreeSet<Slot>,
    pub from: GroupId,
    pub to: GroupId,
}

/// The placement that the operator asked for. A field left out of a change keeps the request, not
/// its result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementSpec {
    pub layout: Layout,
    /// None: min(3, nodes).
    pub replication_factor: Option<u8>,
    /// None: one per node (spread), or nodes / replication factor (exclusive).
    pub shards: Option<u16>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Replicas anywhere, even to ±1.
    #[default]
    Spread,
    /// Each node is a replica of exactly one shard.
    Exclusive,
}

impl PlacementSpec {
    /// Builds the request for a replication factor, a number of shards, both or neither: a
    /// replication factor without a number of shards means that each node is a replica of exactly
    /// one shard.
    pub fn from_flags(replication_factor: Option<u8>, shards: Option<u16>) -> Self {
        let exclusive = replication_factor.is_some() && shards.is_none();
        let layout = if exclusive {
            Layout::Exclusive
        } else {
            Layout::Spread
        };
        Self {
            layout,
            replication_factor,
            shards,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Its name in a `VIEW`, and where its peers reach it.
    pub address: Address,
    /// The address that clients are redirected to; `address` if None.
    pub public_address: Option<Address>,
    pub directory: DirectoryId,
}

impl NodeSpec {
    pub fn public(&self) -> &Address {
        self.public_address.as_ref().unwrap_or(&self.address)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// The node that should lead it.
    pub home: NodeId,
    /// The node that each replica is on, or should come to be on.
    pub replicas: BTreeMap<ReplicaId, NodeId>,
    /// Those of `replicas` that should have no vote.
    pub learners: BTreeSet<ReplicaId>,
    /// One that votes as well, and keeps the log and no map: none of `replicas`. Written beside the
    /// groups, not within.
    #[serde(skip)]
    pub witness: Option<WitnessSpec>,
    /// Replicas that are planned out, until they are retired: until the group is known to have
    /// committed a membership without them.
    pub leaving: BTreeMap<ReplicaId, NodeId>,
    /// The voters it was created with. Never changed: a group is only ever initialized from this.
    pub creation: BTreeMap<ReplicaId, NodeId>,
    /// The newest committed membership that its leader told of.
    pub reported: Option<ReportedMembership>,
    /// It goes when its last slot has moved away.
    #[serde(rename = "ends")]
    pub draining: bool,
}

/// A replica without a map: with an even number of others it lets their group survive the loss of
/// half of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessSpec {
    pub replica: ReplicaId,
    pub node: NodeId,
}

/// A committed, uniform membership of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedMembership {
    /// Of the entry that says so: an older one tells nothing new.
    pub log_id: LogId,
    pub voters: BTreeSet<ReplicaId>,
    pub learners: BTreeSet<ReplicaId>,
}

impl ReportedMembership {
    pub fn is_member(&self, replica: ReplicaId) -> bool {
        self.voters.contains(&replica) || self.learners.contains(&replica)
    }
}

impl GroupSpec {
    /// A group that begins with these replicas, of which those of `voters` vote.
    pub fn new(
        home: NodeId,
        replicas: BTreeMap<ReplicaId, NodeId>,
        voters: &BTreeSet<ReplicaId>,
    ) -> Self {
        // A group is initialized from this record alone; replicas without a vote join later.
        let creation = replicas
            .iter()
            .filter(|(id, _)| voters.contains(id))
            .map(|(id, node)| (*id, *node))
            .collect();
        let learners = replicas
            .keys()
            .filter(|id| !voters.contains(id))
            .copied()
            .collect();
        Self {
            home,
            replicas,
            learners,
            witness: None,
            leaving: BTreeMap::new(),
            creation,
            reported: None,
            draining: false,
        }
    }

    /// Every replica that is not retired, with its node: the witness too.
    pub fn hosted(&self) -> impl Iterator<Item = (ReplicaId, NodeId)> {
        self.wanted()
            .chain(self.leaving.iter().map(|(replica, node)| (*replica, *node)))
    }

    /// Every replica that is, or should come to be, with its node: the witness too.
    pub fn wanted(&self) -> impl Iterator<Item = (ReplicaId, NodeId)> {
        let witness = self
            .witness
            .iter()
            .map(|witness| (witness.replica, witness.node));
        self.replicas
            .iter()
            .map(|(replica, node)| (*replica, *node))
            .chain(witness)
    }

    /// Returns true if `replica` is the witness.
    pub fn is_witness(&self, replica: ReplicaId) -> bool {
        self.witness
            .is_some_and(|witness| witness.replica == replica)
    }

    /// All that should vote: the voters, and the witness.
    pub fn electorate(&self) -> BTreeSet<ReplicaId> {
        let witness = self.witness.map(|witness| witness.replica);
        self.voters().into_iter().chain(witness).collect()
    }

    /// Returns true if a replica on its way out may be used again: if the group began with it. Of
    /// any other the view does not say whether it has a map or is a witness.
    pub(in crate::sm) fn can_return(&self, replica: ReplicaId) -> bool {
        self.leaving.contains_key(&replica) && self.creation.contains_key(&replica)
    }

    /// Gives the node a replica: the one on its way out that it has and that can come back, else a
    /// new one. A node runs one replica of a group at a time, so a new one would wait until the
    /// other is gone, and that one perhaps for the new one to take its place.
    pub(in crate::sm) fn add_replica_on(&mut self, node: NodeId, next_replica: &mut ReplicaId) {
        let mut leaving = self
            .leaving
            .iter()
            .filter(|(_, at)| **at == node)
            .map(|(replica, _)| *replica);
        let replica = leaving
            .find(|replica| self.can_return(*replica))
            .unwrap_or_else(|| {
                next_replica.0 += 1;
                ReplicaId(next_replica.0 - 1)
            });
        self.leaving.remove(&replica);
        self.replicas.insert(replica, node);
    }

    /// The replicas with a map that should vote.
    pub fn voters(&self) -> BTreeSet<ReplicaId> {
        self.replicas
            .keys()
            .filter(|id| !self.learners.contains(id))
            .copied()
            .collect()
    }

    /// Returns true if the group is known to have the members that it should have.
    pub fn is_settled(&self) -> bool {
        let members_match = match &self.reported {
            // Nothing reported yet: the group has the members that it was created with.
            None => {
                self.replicas.len() == self.creation.len()
                    && self.learners.is_empty()
                    && self.witness.is_none()
                    && self.voters().iter().eq(self.creation.keys())
            }
            Some(reported) => {
                reported.voters == self.electorate() && reported.learners == self.learners
            }
        };
        members_match && self.leaving.is_empty() && !self.draining
    }
}

/// Maps each slot to the shard that owns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u16, GroupId)>", into = "Vec<(u16, GroupId)>")]
pub struct SlotTable(Vec<GroupId>);

impl SlotTable {
    /// A table with every slot at `owner(slot)`.
    pub fn new(owner: impl FnMut(Slot) -> GroupId) -> Self {
        Self(Slot::all().map(owner).collect())
    }

    pub fn owner(&self, slot: Slot) -> GroupId {
        self.0[slot.index()]
    }

    pub fn set_owner(&mut self, slot: Slot, owner: GroupId) {
        self.0[slot.index()] = owner;
    }

    pub fn slots_of(&self, group: GroupId) -> impl Iterator<Item = Slot> {
        Slot::all().filter(move |slot| self.owner(*slot) == group)
    }
}

/// Runs of slots with one owner: (how many, owner).
impl From<SlotTable> for Vec<(u16, GroupId)> {
    fn from(table: SlotTable) -> Self {
        let runs = table.0.chunk_by(|a, b| a == b);
        runs.map(|run| {
            (
                u16::try_from(run.len()).expect("a run is at most all slots"),
                run[0],
            )
        })
        .collect()
    }
}

impl From<Vec<(u16, GroupId)>> for SlotTable {
    /// Runs that do not add up to all slots leave the rest with the meta group, which owns no keys:
    /// nothing is served there.
    fn from(runs: Vec<(u16, GroupId)>) -> Self {
        let mut owners: Vec<GroupId> = runs
            .iter()
            .flat_map(|(n, owner)| std::iter::repeat_n(*owner, usize::from(*n)))
            .collect();
        owners.resize(usize::from(crate::types::SLOTS), GroupId::META);
        Self(owners)
    }
}

impl View {
    pub fn encode(&self) -> Bytes {
        encode_ending(self.level, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        decode_ending(bytes, "a view")
    }

    /// Returns whether a leader may propose it: every node of the cluster can read it.
    pub fn allows(&self, feature: Feature) -> bool {
        self.level >= feature.level()
    }

    pub fn shards(&self) -> impl Iterator<Item = (GroupId, &GroupSpec)> {
        self.groups
            .iter()
            .filter(|(id, _)| !id.is_meta())
            .map(|(id, group)| (*id, group))
    }

    pub fn node_of(&self, group: GroupId, replica: ReplicaId) -> Option<NodeId> {
        self.groups
            .get(&group)?
            .hosted()
            .find(|(hosted, _)| *hosted == replica)
            .map(|(_, node)| node)
    }

    /// The replica with a map that `node` has of `group`, or should come to have.
    pub fn replica_on(&self, group: GroupId, node: NodeId) -> Option<ReplicaId> {
        let group = self.groups.get(&group)?;
        group
            .replicas
            .iter()
            .find(|(_, at)| **at == node)
            .map(|(replica, _)| *replica)
    }

    /// The replica of `group` that `node` is to run now: one on its way out as long as it is not
    /// retired, else the one that it should come to have, be it a witness.
    pub fn runs_on(&self, group: GroupId, node: NodeId) -> Option<ReplicaId> {
        let group = self.groups.get(&group)?;

        // A node runs one replica of a group at a time: the old one goes before the new one comes.
        let leaving = group
            .leaving
            .iter()
            .find(|(_, at)| **at == node)
            .map(|(replica, _)| *replica);
        leaving.or_else(|| {
            group
                .wanted()
                .find(|(_, at)| *at == node)
                .map(|(replica, _)| replica)
        })
    }

    /// The node that is called so, and stays; else one that leaves.
    pub fn node_at(&self, address: &Address) -> Option<NodeId> {
        let mut called = self
            .nodes
            .iter()
            .filter(|(_, node)| node.address == *address)
            .map(|(id, _)| *id)
            .collect::<Vec<_>>();

        // A node that lost its disk leaves, and the one that follows it has the same address.
        called.sort_by_key(|id| self.leaving.contains(id));
        called.first().copied()
    }

    /// The nodes that the view is to have.
    pub fn staying(&self) -> impl Iterator<Item = (NodeId, &NodeSpec)> {
        self.nodes
            .iter()
            .filter(|(id, _)| !self.leaving.contains(id))
            .map(|(id, node)| (*id, node))
    }

    /// Slots that are not where they should be.
    pub fn misplaced_slots(&self) -> impl Iterator<Item = Slot> {
        Slot::all().filter(|slot| self.slots.owner(*slot) != self.targets.owner(*slot))
    }

    /// Returns true if everything is as the plan says.
    pub fn is_settled(&self) -> bool {
        let groups_are = self.groups.values().all(GroupSpec::is_settled);
        groups_are && self.leaving.is_empty() && self.moves.is_empty() && self.slots == self.targets
    }

    /// Takes away what nothing holds any more: groups that end and own nothing, and nodes that
    /// leave and have no replica but the meta group's, then that one, then the node.
    pub(super) fn prune(&mut self) {
        let moving: BTreeSet<GroupId> = self
            .moves
            .values()
            .flat_map(|held| [held.from, held.to])
            .collect();
        let owning: BTreeSet<GroupId> = Slot::all()
            .flat_map(|slot| [self.slots.owner(slot), self.targets.owner(slot)])
            .collect();

        // A draining group goes once no slot is with it, is meant for it or moves from or to it.
        self.groups
            .retain(|id, group| !group.draining || moving.contains(id) || owning.contains(id));

        // The meta group's replica of a leaving node goes last: by it the node learns that it may
        // go.
        let busy: BTreeSet<NodeId> = self
            .shards()
            .flat_map(|(_, group)| group.hosted().map(|(_, node)| node))
            .collect();
        let free: BTreeSet<NodeId> = self
            .leaving
            .iter()
            .filter(|node| !busy.contains(node))
            .copied()
            .collect();
        let Some(meta) = self.groups.get_mut(&GroupId::META) else {
            return;
        };
        let retiring: Vec<ReplicaId> = meta
            .replicas
            .iter()
            .filter(|(_, node)| free.contains(node))
            .map(|(id, _)| *id)
            .collect();
        for replica in retiring {
            meta.learners.remove(&replica);
            let node = meta.replicas.remove(&replica);
            meta.leaving.extend(node.map(|node| (replica, node)));
        }
        let meta_hosts: BTreeSet<NodeId> = meta.hosted().map(|(_, node)| node).collect();
        self.leaving
            .retain(|node| !free.contains(node) || meta_hosts.contains(node));
        self.nodes
            .retain(|node, _| !free.contains(node) || meta_hosts.contains(node));
    }

    /// Checks that the parts of the view fit together; the error names the first that does not.
    pub fn check(&self) -> Result<(), Inconsistency> {
        self.check_nodes()?;
        if !self.groups.contains_key(&GroupId::META) {
            return Err(Inconsistency::NoMetaGroup);
        }
        let mut replicas = BTreeSet::new();
        for (id, group) in &self.groups {
            if *id >= self.next_group {
                return Err(Inconsistency::GroupIdNotGivenOut(*id));
            }
            self.check_group(*id, group)?;
            if let Some((replica, _)) = group
                .hosted()
                .find(|(replica, _)| !replicas.insert(*replica))
            {
                return Err(Inconsistency::ReplicaTwice(replica));
            }
        }
        self.check_moves()?;

        // Every slot is owned by one shard of the view, and meant for one that stays.
        let is_shard = |owner: GroupId| !owner.is_meta() && self.groups.contains_key(&owner);
        let owners = |slot| [self.slots.owner(slot), self.targets.owner(slot)];
        for slot in Slot::all() {
            if let Some(owner) = owners(slot).into_iter().find(|owner| !is_shard(*owner)) {
                return Err(Inconsistency::SlotWithoutShard { slot, owner });
            }
            let target = self.targets.owner(slot);
            if self.groups.get(&target).is_some_and(|group| group.draining) {
                return Err(Inconsistency::SlotWithoutShard {
                    slot,
                    owner: target,
                });
            }
        }
        Ok(())
    }

    fn check_moves(&self) -> Result<(), Inconsistency> {
        let mut moving = BTreeSet::new();
        for (id, held) in &self.moves {
            let sound = *id < self.next_move
                && self.groups.contains_key(&held.to)
                && held.from != held.to
                && !held.slots.is_empty();
            let owned = held
                .slots
                .iter()
                // Two moves of one slot could give it two owners.
                .all(|slot| self.slots.owner(*slot) == held.from && moving.insert(*slot));
            if !sound || !owned {
                return Err(Inconsistency::UnsoundMove(*id));
            }
        }
        Ok(())
    }

    fn check_nodes(&self) -> Result<(), Inconsistency> {
        if let Some(id) = self
            .leaving
            .iter()
            .chain(&self.evicted)
            .find(|id| !self.nodes.contains_key(id))
        {
            return Err(Inconsistency::UnknownNode(*id));
        }
        let mut addresses = BTreeSet::new();
        let mut directories = BTreeSet::new();
        for (id, node) in &self.nodes {
            if *id >= self.next_node {
                return Err(Inconsistency::NodeIdNotGivenOut(*id));
            }
            // A node that lost its disk leaves, and comes back under the same address.
            if !self.leaving.contains(id) && !addresses.insert(&node.address) {
                return Err(Inconsistency::AddressTwice(node.address.clone()));
            }
            if !directories.insert(node.directory) {
                return Err(Inconsistency::DirectoryTwice(node.directory));
            }
        }
        Ok(())
    }

    fn check_group(&self, id: GroupId, group: &GroupSpec) -> Result<(), Inconsistency> {
        let mut nodes = BTreeSet::new();
        for (replica, node) in group.hosted() {
            if !self.nodes.contains_key(&node) {
                return Err(Inconsistency::ReplicaOnUnknownNode {
                    group: id,
                    replica,
                    node,
                });
            }
        }

        // Every node has a replica of the meta group, so no node is left for a witness.
        if id.is_meta() && group.witness.is_some() {
            return Err(Inconsistency::WitnessOfMetaGroup);
        }
        for (_, node) in group.wanted() {
            if !nodes.insert(node) {
                return Err(Inconsistency::NodeTwiceInGroup { group: id, node });
            }
        }

        // A group without voters could never commit anything, not even a change of its members.
        if group.voters().is_empty()
            || !group
                .learners
                .iter()
                .all(|replica| group.replicas.contains_key(replica))
        {
            return Err(Inconsistency::GroupWithoutVoters(id));
        }
        // The node that a group was created on may have left since: of the creation record only the
        // ids are looked at.
        let mut replica_ids = group
            .hosted()
            .map(|(replica, _)| replica)
            .chain(group.creation.keys().copied());
        if let Some(replica) = replica_ids.find(|replica| *replica >= self.next_replica) {
            return Err(Inconsistency::ReplicaIdNotGivenOut(replica));
        }
        if group.creation.is_empty() {
            return Err(Inconsistency::GroupWithoutVoters(id));
        }

        // Only a replica can lead, so such a home would never be reached.
        if !group.replicas.values().any(|node| *node == group.home) {
            return Err(Inconsistency::HomeWithoutReplica {
                group: id,
                home: group.home,
            });
        }
        Ok(())
    }
}

/// A contradiction between parts of a view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Inconsistency {
    #[error("there is no meta group")]
    NoMetaGroup,
    #[error("node {0} is not in the view")]
    UnknownNode(NodeId),
    #[error("move {0} does not fit the slots and shards")]
    UnsoundMove(MoveId),
    #[error("node {0} has an id that was not given out")]
    NodeIdNotGivenOut(NodeId),
    #[error("group {0} has an id that was not given out")]
    GroupIdNotGivenOut(GroupId),
    #[error("replica {0} has an id that was not given out")]
    ReplicaIdNotGivenOut(ReplicaId),
    #[error("two nodes have the address {0}")]
    AddressTwice(Address),
    #[error("two nodes have the data directory {0}")]
    DirectoryTwice(DirectoryId),
    #[error("replica {0} is in two groups")]
    ReplicaTwice(ReplicaId),
    #[error("replica {replica} of group {group} is on node {node}, which is not in the view")]
    ReplicaOnUnknownNode {
        group: GroupId,
        replica: ReplicaId,
        node: NodeId,
    },
    #[error("group {group} has two replicas on node {node}")]
    NodeTwiceInGroup { group: GroupId, node: NodeId },
    #[error("group {0} was created without voters")]
    GroupWithoutVoters(GroupId),
    #[error("the home of group {group}, node {home}, has no replica of it")]
    HomeWithoutReplica { group: GroupId, home: NodeId },
    #[error("slot {slot} is owned by {owner}, which is not a shard of the view")]
    SlotWithoutShard { slot: Slot, owner: GroupId },
    #[error("the meta group has a witness")]
    WitnessOfMetaGroup,
}
