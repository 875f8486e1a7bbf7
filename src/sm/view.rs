//! The view: what the operator asked for, the nodes, the groups with their replicas, and which shard owns which slot.
//!
//! The meta group holds it; each node reads it from its own replica. A plain value: planning is in `placement`, changing it in `meta`.
//! [`View::check`] says what must hold of every view; the meta group accepts no other.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::codec;
use super::ports::StoreError;
use crate::types::{Address, ClusterId, DirectoryId, GroupId, MapVersion, NodeId, PlanEpoch, ReplicaId, Slot};

/// What was agreed. Part of the disk format (inside the meta group's map).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    pub cluster: ClusterId,
    pub epoch: PlanEpoch,
    pub version: MapVersion,
    pub asked: Asked,
    pub nodes: BTreeMap<NodeId, Node>,
    /// Every group, the meta group among them.
    pub groups: BTreeMap<GroupId, Group>,
    pub slots: SlotTable,
    /// The next ids to give out. Ids only grow.
    pub next_node: NodeId,
    pub next_group: GroupId,
    pub next_replica: ReplicaId,
}

/// What the operator asked for. A field left out of a change keeps the asking, not its result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
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

impl Asked {
    /// What an operator asks for by a replication factor, a number of shards, both or neither: a replication factor without a number
    /// of shards means that each node is a replica of exactly one shard.
    pub fn from_flags(replication_factor: Option<u8>, shards: Option<u16>) -> Self {
        let exclusive = replication_factor.is_some() && shards.is_none();
        let layout = if exclusive { Layout::Exclusive } else { Layout::Spread };
        Self { layout, replication_factor, shards }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// What it is called in a `VIEW`, and where its peers reach it.
    pub address: Address,
    /// What a client is sent to; the address where none was given.
    pub public_address: Option<Address>,
    pub directory: DirectoryId,
}

impl Node {
    pub fn public(&self) -> &Address {
        self.public_address.as_ref().unwrap_or(&self.address)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The node that should lead it.
    pub home: NodeId,
    /// Where each replica is.
    pub replicas: BTreeMap<ReplicaId, NodeId>,
    /// The voters it was created with. Never changed: a group is only ever initialized from this.
    pub creation: BTreeMap<ReplicaId, NodeId>,
}

/// Which shard owns each slot.
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

    pub fn of(&self, group: GroupId) -> impl Iterator<Item = Slot> {
        Slot::all().filter(move |slot| self.owner(*slot) == group)
    }
}

/// Runs of slots with one owner: (how many, owner).
impl From<SlotTable> for Vec<(u16, GroupId)> {
    fn from(table: SlotTable) -> Self {
        let runs = table.0.chunk_by(|a, b| a == b);
        runs.map(|run| (u16::try_from(run.len()).expect("a run is at most all slots"), run[0])).collect()
    }
}

impl From<Vec<(u16, GroupId)>> for SlotTable {
    /// Runs that do not add up to all slots leave the rest with the meta group, which owns no keys: nothing is served there.
    fn from(runs: Vec<(u16, GroupId)>) -> Self {
        let mut owners: Vec<GroupId> = runs.iter().flat_map(|(n, owner)| std::iter::repeat_n(*owner, usize::from(*n))).collect();
        owners.resize(usize::from(crate::types::SLOTS), GroupId::META);
        Self(owners)
    }
}

impl View {
    pub fn encode(&self) -> Bytes {
        codec::encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode(bytes, "a view")
    }

    pub fn shards(&self) -> impl Iterator<Item = (GroupId, &Group)> {
        self.groups.iter().filter(|(id, _)| !id.is_meta()).map(|(id, group)| (*id, group))
    }

    pub fn node_of(&self, group: GroupId, replica: ReplicaId) -> Option<NodeId> {
        self.groups.get(&group)?.replicas.get(&replica).copied()
    }

    /// The replica that `node` has of `group`.
    pub fn replica_on(&self, group: GroupId, node: NodeId) -> Option<ReplicaId> {
        let group = self.groups.get(&group)?;
        group.replicas.iter().find(|(_, at)| **at == node).map(|(replica, _)| *replica)
    }

    pub fn node_at(&self, address: &Address) -> Option<NodeId> {
        self.nodes.iter().find(|(_, node)| node.address == *address).map(|(id, _)| *id)
    }

    /// Whether the parts of the view fit together; if not, the first that does not.
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
            if let Some(replica) = group.replicas.keys().find(|replica| !replicas.insert(**replica)) {
                return Err(Inconsistency::ReplicaTwice(*replica));
            }
        }
        let astray = Slot::all().find(|slot| {
            let owner = self.slots.owner(*slot);
            owner.is_meta() || !self.groups.contains_key(&owner)
        });
        astray.map_or(Ok(()), |slot| Err(Inconsistency::SlotWithoutShard { slot, owner: self.slots.owner(slot) }))
    }

    fn check_nodes(&self) -> Result<(), Inconsistency> {
        let mut addresses = BTreeSet::new();
        let mut directories = BTreeSet::new();
        for (id, node) in &self.nodes {
            if *id >= self.next_node {
                return Err(Inconsistency::NodeIdNotGivenOut(*id));
            }
            if !addresses.insert(&node.address) {
                return Err(Inconsistency::AddressTwice(node.address.clone()));
            }
            if !directories.insert(node.directory) {
                return Err(Inconsistency::DirectoryTwice(node.directory));
            }
        }
        Ok(())
    }

    fn check_group(&self, id: GroupId, group: &Group) -> Result<(), Inconsistency> {
        let mut nodes = BTreeSet::new();
        for (replica, node) in &group.replicas {
            if !self.nodes.contains_key(node) {
                return Err(Inconsistency::ReplicaOnUnknownNode { group: id, replica: *replica, node: *node });
            }
            if !nodes.insert(*node) {
                return Err(Inconsistency::NodeTwiceInGroup { group: id, node: *node });
            }
        }
        // The node that a group was created on may have left since: of the creation record only the ids are looked at.
        let not_given_out = |replica: &&ReplicaId| **replica >= self.next_replica;
        if let Some(replica) = group.replicas.keys().chain(group.creation.keys()).find(not_given_out) {
            return Err(Inconsistency::ReplicaIdNotGivenOut(*replica));
        }
        if group.creation.is_empty() {
            return Err(Inconsistency::GroupWithoutVoters(id));
        }
        if !nodes.contains(&group.home) {
            return Err(Inconsistency::HomeWithoutReplica { group: id, home: group.home });
        }
        Ok(())
    }
}

/// What does not fit together in a view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Inconsistency {
    #[error("there is no meta group")]
    NoMetaGroup,
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
    ReplicaOnUnknownNode { group: GroupId, replica: ReplicaId, node: NodeId },
    #[error("group {group} has two replicas on node {node}")]
    NodeTwiceInGroup { group: GroupId, node: NodeId },
    #[error("group {0} was created without voters")]
    GroupWithoutVoters(GroupId),
    #[error("the home of group {group}, node {home}, has no replica of it")]
    HomeWithoutReplica { group: GroupId, home: NodeId },
    #[error("slot {slot} is owned by {owner}, which is not a shard of the view")]
    SlotWithoutShard { slot: Slot, owner: GroupId },
}
