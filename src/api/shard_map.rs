//! [`ShardMap`], which a router goes by: which shard owns each slot, and where the replicas of each
//! shard are.
//!
//! An immutable value, made from the view (on a node) or from `GET /v1/cluster` (elsewhere), and
//! replaced as a whole. Newer is what has the higher version; leaders are hints, which come and go
//! within one version.

use std::collections::{BTreeMap, BTreeSet};

use super::protocol::ClusterStatus;
use crate::sm::cluster::view::{Layout, SlotTable, View};
use crate::sm::slots::slot_of;
use crate::types::{Address, ClusterId, GroupId, MapVersion, NodeId, Slot};

#[derive(Debug, Clone, PartialEq)]
pub struct ShardMap {
    pub cluster: ClusterId,
    pub version: MapVersion,
    pub layout: Layout,
    slots: SlotTable,
    /// Shards that own at least one slot, in order.
    owners: Vec<GroupId>,
    shards: BTreeMap<GroupId, ShardPlace>,
    nodes: BTreeMap<NodeId, NodePlace>,
    /// Slots on their way to another shard; of the map of a node only.
    moving: BTreeSet<Slot>,
}

/// The nodes of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlace {
    pub home: NodeId,
    /// The nodes that have a replica which can serve: not that of the witness.
    pub replicas: Vec<NodeId>,
    /// Its leader when the map was made, if that was known.
    pub leader: Option<NodeId>,
}

/// The addresses of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlace {
    /// The address that peers use.
    pub address: Address,
    /// The address that clients are sent to.
    pub public: Address,
}

impl ShardMap {
    /// Makes the map of a node: `leader` says who leads a shard as far as the node knows.
    pub fn from_view(view: &View, leader: impl Fn(GroupId) -> Option<NodeId>) -> Self {
        let shards = view.shards().map(|(id, group)| {
            let replicas = group.replicas.values().copied().collect();
            (
                id,
                ShardPlace {
                    home: group.home,
                    replicas,
                    leader: leader(id),
                },
            )
        });
        let place = |node: &crate::sm::cluster::view::NodeSpec| NodePlace {
            address: node.address.clone(),
            public: node.public().clone(),
        };
        Self {
            cluster: view.cluster,
            version: view.version,
            layout: view.placement.layout,
            slots: view.slots.clone(),
            owners: owners(&view.slots),
            shards: shards.collect(),
            nodes: view
                .nodes
                .iter()
                .map(|(id, node)| (*id, place(node)))
                .collect(),
            moving: view
                .moves
                .values()
                .flat_map(|held| held.slots.iter().copied())
                .collect(),
        }
    }

    /// Makes the map of a client, as some node told it.
    pub fn from_status(status: &ClusterStatus) -> Self {
        let shards = status
            .shards
            .iter()
            // The status lists the meta group too, which owns no slots.
            .filter(|shard| !shard.id.is_meta())
            .map(|shard| {
                let replicas = shard
                    .replicas
                    .iter()
                    .filter(|replica| !replica.leaving)
                    .map(|replica| replica.node)
                    .collect();
                (
                    shard.id,
                    ShardPlace {
                        home: shard.home,
                        replicas,
                        leader: shard.leader,
                    },
                )
            });
        let nodes = status.nodes.iter().map(|node| {
            let place = NodePlace {
                address: node.address.clone(),
                public: node.public_address.clone(),
            };
            (node.id, place)
        });
        Self {
            cluster: status.cluster,
            version: status.version,
            layout: status.asked.layout,
            slots: status.slots.clone(),
            owners: owners(&status.slots),
            shards: shards.collect(),
            nodes: nodes.collect(),
            // Only who sends clients elsewhere has to know these, and a client sends nobody.
            moving: BTreeSet::new(),
        }
    }

    /// Returns the shard that owns `slot`; [`GroupId::META`] where none does.
    pub fn owner(&self, slot: Slot) -> GroupId {
        self.slots.owner(slot)
    }

    pub fn owner_of(&self, key: &[u8]) -> GroupId {
        self.owner(slot_of(key))
    }

    #[cfg(test)]
    pub fn with_moving(self, moving: BTreeSet<Slot>) -> Self {
        Self { moving, ..self }
    }

    /// Returns whether the slot of a key is on its way to another shard. Nodes may differ about
    /// where it is then, and would send a client to one another.
    pub fn is_moving(&self, key: &[u8]) -> bool {
        !self.moving.is_empty() && self.moving.contains(&slot_of(key))
    }

    /// Returns the shards that own slots, in order.
    pub fn owners(&self) -> &[GroupId] {
        &self.owners
    }

    pub fn shards(&self) -> impl Iterator<Item = (GroupId, &ShardPlace)> {
        self.shards.iter().map(|(id, place)| (*id, place))
    }

    pub fn shard(&self, id: GroupId) -> Option<&ShardPlace> {
        self.shards.get(&id)
    }

    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &NodePlace)> {
        self.nodes.iter().map(|(id, place)| (*id, place))
    }

    pub fn node(&self, id: NodeId) -> Option<&NodePlace> {
        self.nodes.get(&id)
    }

    /// Returns the name under which others are sent to a node: that of clients, or that of its
    /// peers do where several nodes share that, as behind one load balancer.
    pub fn name_of(&self, id: NodeId) -> Option<&Address> {
        let place = self.node(id)?;
        let is_shared = self
            .nodes()
            .any(|(other, node)| other != id && node.public == place.public);
        Some(if is_shared {
            &place.address
        } else {
            &place.public
        })
    }

    /// Returns the one node that peers call so, or else clients; None where several are.
    pub fn node_named(&self, name: &Address) -> Option<NodeId> {
        let as_peer = self.nodes().find(|(_, node)| node.address == *name);
        let mut as_public = self.nodes().filter(|(_, node)| node.public == *name);
        let (found, _) =
            as_peer.or_else(|| as_public.next().filter(|_| as_public.next().is_none()))?;
        Some(found)
    }

    /// Returns true if clients use this name for a node: a name of [`ShardMap::name_of`] that they
    /// don't is for peers alone.
    pub fn is_public(&self, name: &Address) -> bool {
        self.nodes().any(|(_, node)| node.public == *name)
    }

    /// Returns the nodes to ask about a shard, the likeliest leader first, each once.
    pub fn candidates(&self, shard: GroupId) -> Vec<&NodePlace> {
        let Some(place) = self.shard(shard) else {
            return Vec::new();
        };
        let mut ids: Vec<NodeId> = Vec::with_capacity(place.replicas.len() + 1);
        for id in place
            .leader
            .into_iter()
            .chain([place.home])
            .chain(place.replicas.iter().copied())
        {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids.into_iter().filter_map(|id| self.node(id)).collect()
    }
}

fn owners(slots: &SlotTable) -> Vec<GroupId> {
    let mut owners: Vec<GroupId> = Slot::all()
        .map(|slot| slots.owner(slot))
        .filter(|owner| !owner.is_meta())
        .collect();
    owners.sort_unstable();
    owners.dedup();
    owners
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::protocol::{NodeStatus, ReplicaHealth, ReplicaStatus, ShardStatus};
    use crate::sm::cluster::view::PlacementSpec;
    use crate::types::{DirectoryId, PlanEpoch, ReplicaId};

    fn status() -> ClusterStatus {
        let node = |id: u64| NodeStatus {
            id: NodeId(id),
            address: format!("10.0.0.{id}:1").parse().expect("an address"),
            public_address: format!("node-{id}:1").parse().expect("an address"),
            directory: DirectoryId(0),
            reachable: true,
            leaving: false,
            speaks: None,
            holds_level: false,
            failed: vec![],
        };
        let replica = |id, node| ReplicaStatus {
            id: ReplicaId(id),
            node: NodeId(node),
            health: ReplicaHealth::Following,
            applied: None,
            leaving: false,
        };
        let shard = |id, home, leader: Option<u64>| ShardStatus {
            id: GroupId(id),
            home: NodeId(home),
            leader: leader.map(NodeId),
            term: None,
            keys: None,
            bytes: None,
            slots: 0,
            replicas: vec![replica(1, 1), replica(2, 2), replica(3, 3)],
            witness: Some(replica(4, 4)),
            alarm: None,
        };
        ClusterStatus {
            cluster: ClusterId(7),
            epoch: PlanEpoch(1),
            version: MapVersion(4),
            level: 0,
            asked: PlacementSpec::default(),
            answered_by: NodeId(1),
            meta_leader: None,
            nodes: vec![node(1), node(2), node(3)],
            shards: vec![
                shard(0, 1, None),
                shard(1, 1, Some(3)),
                shard(2, 2, None),
                shard(3, 3, None),
            ],
            moves: vec![],
            slots_astray: 0,
            settled: true,
            slots: SlotTable::new(|slot| GroupId(1 + u64::from(slot.number() % 2))),
        }
    }

    #[test]
    fn a_status_makes_a_map() {
        let map = ShardMap::from_status(&status());
        assert_eq!((map.cluster, map.version), (ClusterId(7), MapVersion(4)));
        assert_eq!(
            map.owners(),
            [GroupId(1), GroupId(2)],
            "shard 3 owns nothing, the meta group is no shard"
        );
        assert_eq!(map.shards().count(), 3);
        let key = b"some key";
        assert_eq!(
            map.owner_of(key),
            GroupId(1 + u64::from(slot_of(key).number() % 2))
        );
    }

    #[test]
    fn nodes_that_share_a_public_address_are_called_by_their_own() {
        let mut status = status();
        let address = |text: &str| -> Address { text.parse().expect("an address") };
        status.nodes[1].public_address = address("balancer:1");
        status.nodes[2].public_address = address("balancer:1");
        let map = ShardMap::from_status(&status);
        let names = [1, 2, 3].map(|node| map.name_of(NodeId(node)).expect("a node").as_str());
        assert_eq!(names, ["node-1:1", "10.0.0.2:1", "10.0.0.3:1"]);
        for node in 1..=3 {
            let name = map.name_of(NodeId(node)).expect("a node");
            assert_eq!(map.node_named(name), Some(NodeId(node)));
            assert_eq!(map.is_public(name), node == 1);
        }
        assert_eq!(map.node_named(&address("10.0.0.1:1")), Some(NodeId(1)));
        assert_eq!(
            map.node_named(&address("balancer:1")),
            None,
            "it may be either"
        );
        assert_eq!(map.name_of(NodeId(9)), None);
    }

    #[test]
    fn the_leader_is_asked_first_then_the_home_and_nobody_twice() {
        let map = ShardMap::from_status(&status());
        let asked = |shard| {
            map.candidates(GroupId(shard))
                .iter()
                .map(|node| node.public.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(asked(1), ["node-3:1", "node-1:1", "node-2:1"]);
        assert_eq!(asked(2), ["node-2:1", "node-1:1", "node-3:1"]);
        assert!(asked(9).is_empty());
    }
}
