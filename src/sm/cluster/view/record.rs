//! [`ViewRecord`]: a view as it is written. What came later stands at its end, so that what was
//! written before can still be read.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{GroupSpec, NodeSpec, PlacementSpec, SlotMove, SlotTable, View, WitnessSpec};
use crate::types::{ClusterId, GroupId, MapVersion, MoveId, NodeId, PlanEpoch, ReplicaId};

#[derive(Serialize, Deserialize)]
pub struct ViewRecord {
    cluster: ClusterId,
    epoch: PlanEpoch,
    version: MapVersion,
    asked: PlacementSpec,
    nodes: BTreeMap<NodeId, NodeSpec>,
    leaving: BTreeSet<NodeId>,
    out: BTreeSet<NodeId>,
    groups: BTreeMap<GroupId, GroupSpec>,
    slots: SlotTable,
    targets: SlotTable,
    moves: BTreeMap<MoveId, SlotMove>,
    next_node: NodeId,
    next_group: GroupId,
    next_replica: ReplicaId,
    next_move: MoveId,
    /// Since the second format. Those of groups that are not there are passed over.
    #[serde(default)]
    witnesses: BTreeMap<GroupId, WitnessSpec>,
    /// Since the third format. Left out at level 0, so that programs that know no level read it.
    #[serde(default, skip_serializing_if = "is_zero")]
    level: u16,
}

fn is_zero(level: &u16) -> bool {
    *level == 0
}

impl From<View> for ViewRecord {
    fn from(view: View) -> Self {
        Self {
            // Kept beside the groups: a view without a witness is then written as in the first
            // format.
            witnesses: view
                .groups
                .iter()
                .filter_map(|(id, group)| Some((*id, group.witness?)))
                .collect(),
            cluster: view.cluster,
            epoch: view.epoch,
            version: view.version,
            asked: view.placement,
            nodes: view.nodes,
            leaving: view.leaving,
            out: view.evicted,
            groups: view.groups,
            slots: view.slots,
            targets: view.targets,
            moves: view.moves,
            next_node: view.next_node,
            next_group: view.next_group,
            next_replica: view.next_replica,
            next_move: view.next_move,
            level: view.level,
        }
    }
}

impl From<ViewRecord> for View {
    fn from(record: ViewRecord) -> Self {
        let mut groups = record.groups;

        // A witness without its group has nothing to belong to, and is passed over.
        for (id, witness) in record.witnesses {
            if let Some(group) = groups.get_mut(&id) {
                group.witness = Some(witness);
            }
        }
        Self {
            cluster: record.cluster,
            epoch: record.epoch,
            version: record.version,
            level: record.level,
            placement: record.asked,
            nodes: record.nodes,
            leaving: record.leaving,
            evicted: record.out,
            groups,
            slots: record.slots,
            targets: record.targets,
            moves: record.moves,
            next_node: record.next_node,
            next_group: record.next_group,
            next_replica: record.next_replica,
            next_move: record.next_move,
        }
    }
}
