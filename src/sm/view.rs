//! The view: what the operator asked for, the nodes, the groups with their replicas, and which shard owns which slot.
//!
//! The meta group holds it; each node reads it from its own replica. A plain value: planning is in `placement`, changing it in `meta`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
}
