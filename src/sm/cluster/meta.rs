//! What the meta group understands: its commands, what it answers, and [`apply`].
//!
//! Its map holds the [`View`] under one key. Kept out: planning (`placement`). Called by the state
//! machine of group 0, and by whoever reads the view from a replica of it.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::view::{self, Inconsistency, NodeSpec, ReportedMembership, SlotMove, View};
use crate::sm::codec;
use crate::sm::level::Feature;
use crate::sm::ports::{Read, StoreError, WriteBatch};
use crate::types::{
    Address, DirectoryId, GroupId, MapVersion, MoveId, NodeId, PlanEpoch, ReplicaId, Slot,
};

/// One entry of the meta group's log. Part of the disk format: variants are only ever added, at the
/// end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaCommand {
    /// The first view, by the founder. Accepted once.
    Found { view: Box<View> },
    /// A node says under which address it now runs. Accepted only from the directory that the view
    /// names.
    Announce {
        node: NodeId,
        directory: DirectoryId,
        address: Address,
        public_address: Option<Address>,
    },
    /// Another plan: the view `next`, drawn up from the view of version `base`. Accepted only while
    /// that is still the view, and only if nothing that is there is taken away by it: owners of
    /// slots, open moves and replicas end otherwise.
    InstallPlan { base: MapVersion, next: Box<View> },
    /// The leader of `from` begins to move slots to where they should be.
    OpenMove {
        slots: BTreeSet<Slot>,
        from: GroupId,
        to: GroupId,
    },
    /// `to` serves the slots of the move.
    CommitMove { id: MoveId },
    /// `from` goes on serving the slots of the move.
    AbortMove { id: MoveId },
    /// The leader of a group tells of a membership that is committed and uniform. Replicas on their
    /// way out that are not in it are retired. Accepted only from one that knew this plan when it
    /// looked: what an earlier look did not find may have joined since.
    Report {
        group: GroupId,
        reported: ReportedMembership,
        plan: PlanEpoch,
    },
    /// Every node of the view of this version reads all up to this level. Accepted only over that
    /// version.
    RaiseLevel { level: u16, over: MapVersion },
}

/// The outcome of applying a [`MetaCommand`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaOutcome {
    Done,
    Rejected(MetaRejection),
    MoveOpened { id: MoveId },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaRejection {
    AlreadyFounded,
    NotFounded,
    UnknownNode(NodeId),
    /// The node's replicas belong to another data directory.
    OtherDirectory {
        node: NodeId,
        directory: DirectoryId,
    },
    AddressTaken {
        address: Address,
        by: NodeId,
    },
    /// The parts of the view don't fit together.
    Inconsistent(Inconsistency),
    /// The view has changed since the plan was drawn up.
    Outdated {
        version: MapVersion,
    },
    /// The plan takes away what it must not.
    NotASuccessor(PlanViolation),
    /// Not where it should be moved from, or not to be moved there, or being moved.
    NotToBeMoved(Slot),
    /// The move is not open: it has ended.
    NoSuchMove(MoveId),
    UnknownGroup(GroupId),
}

/// A change that a plan may not make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum PlanViolation {
    #[error("it is not the next version and plan of the same cluster")]
    Numbers,
    #[error("it gives ids out again")]
    Ids,
    #[error("it changes who serves which slot, or the moves under way")]
    Slots,
    #[error("it leaves out or changes group {0}")]
    Group(GroupId),
    #[error("it leaves out or moves replica {0}")]
    Replica(ReplicaId),
    #[error("it leaves out or changes node {0}")]
    Node(NodeId),
}

/// Key under which the meta group keeps the view. `slots` does not reserve its first byte for the
/// storage layer.
const VIEW_KEY: &[u8] = b"\x01view";

/// Returns the outcome of `command`, and the changes that it makes to the meta group's map. The
/// index plays no part.
///
/// A rejection is an answer, the same on every replica; an error is a broken disk or an undecodable
/// map and stops the group.
pub fn apply(
    read: &impl Read,
    _index: u64,
    command: MetaCommand,
) -> Result<(MetaOutcome, WriteBatch), StoreError> {
    let view = read_view(read)?;
    let version = view.as_ref().map(|view| view.version);
    let decided = match command {
        MetaCommand::Found { view: first } => found(view, *first).map(Some),
        MetaCommand::Announce {
            node,
            directory,
            address,
            public_address,
        } => announce(
            view,
            node,
            NodeSpec {
                address,
                public_address,
                directory,
            },
        ),
        MetaCommand::InstallPlan { base, next } => install(view, base, *next).map(Some),
        // Answered apart, because its outcome carries the id that was given out.
        MetaCommand::OpenMove { slots, from, to } => {
            let opened = open_move(view, SlotMove { slots, from, to });
            return Ok(match opened {
                Ok((id, view)) => (MetaOutcome::MoveOpened { id }, written(version, Some(view))),
                Err(rejection) => (MetaOutcome::Rejected(rejection), WriteBatch::default()),
            });
        }
        MetaCommand::CommitMove { id } => end_move(view, id, true).map(Some),
        MetaCommand::AbortMove { id } => end_move(view, id, false).map(Some),
        MetaCommand::Report {
            group,
            reported,
            plan,
        } => report(view, group, reported, plan),
        MetaCommand::RaiseLevel { level, over } => raise_level(view, level, over),
    };
    Ok(match decided {
        Err(rejection) => (MetaOutcome::Rejected(rejection), WriteBatch::default()),
        Ok(changed) => (MetaOutcome::Done, written(version, changed)),
    })
}

/// Returns the changes that put `view` in the place of the one with this version.
fn written(version: Option<MapVersion>, view: Option<View>) -> WriteBatch {
    let mut batch = WriteBatch::default();
    if let Some(view) = view {
        assert!(
            version.is_none_or(|version| view.version.0 == version.0 + 1),
            "a change of the view is its next version"
        );
        debug_assert_eq!(view.check(), Ok(()), "a change left an unsound view");
        batch.put(VIEW_KEY, view.encode());
    }
    batch
}

/// The view in the meta group's map; none before the cluster is founded.
pub fn read_view(read: &impl Read) -> Result<Option<View>, StoreError> {
    read.get(VIEW_KEY)?
        .map(|bytes| View::decode(&bytes))
        .transpose()
}

fn found(view: Option<View>, first: View) -> Result<View, MetaRejection> {
    if view.is_some() {
        return Err(MetaRejection::AlreadyFounded);
    }
    first.check().map_err(MetaRejection::Inconsistent)?;
    Ok(first)
}

/// The view with `node` as it says it is; none if it is so already.
fn announce(
    view: Option<View>,
    node: NodeId,
    now: NodeSpec,
) -> Result<Option<View>, MetaRejection> {
    let mut view = view.ok_or(MetaRejection::NotFounded)?;

    // A leaving node does not count: one that lost its disk leaves, and its successor has its
    // address.
    let address_holder = view
        .staying()
        .find(|(id, other)| *id != node && other.address == now.address)
        .map(|(id, _)| id);
    let current = view
        .nodes
        .get_mut(&node)
        .ok_or(MetaRejection::UnknownNode(node))?;

    // Another directory has none of this node's replicas: calls to them must not be sent there.
    if current.directory != now.directory {
        return Err(MetaRejection::OtherDirectory {
            node,
            directory: current.directory,
        });
    }
    if let Some(by) = address_holder {
        return Err(MetaRejection::AddressTaken {
            address: now.address,
            by,
        });
    }

    // Said again, it changes nothing, and makes no new version that all would have to take.
    if *current == now {
        return Ok(None);
    }
    *current = now;
    view.version.0 += 1;
    Ok(Some(view))
}

fn install(view: Option<View>, base: MapVersion, next: View) -> Result<View, MetaRejection> {
    let view = view.ok_or(MetaRejection::NotFounded)?;
    if view.version != base {
        return Err(MetaRejection::Outdated {
            version: view.version,
        });
    }

    // The plan comes from another node: it is checked like any input.
    next.check().map_err(MetaRejection::Inconsistent)?;
    check_successor(&view, &next).map_err(MetaRejection::NotASuccessor)?;
    let mut next = next;
    next.prune();
    Ok(next)
}

/// Checks that `next` takes nothing away from `view` that only its own protocol may end.
fn check_successor(view: &View, next: &View) -> Result<(), PlanViolation> {
    let follows = next.cluster == view.cluster
        && next.epoch.0 == view.epoch.0 + 1
        && next.version.0 == view.version.0 + 1;

    // The level is raised by its own command alone, after every node has been asked.
    if !follows || next.level != view.level {
        return Err(PlanViolation::Numbers);
    }

    // An id that was given out may be in a log or a directory somewhere, so counters never go back.
    let grows = next.next_node >= view.next_node
        && next.next_group >= view.next_group
        && next.next_replica >= view.next_replica
        && next.next_move == view.next_move;
    if !grows {
        return Err(PlanViolation::Ids);
    }

    // Owners of slots and open moves change by the steps of moves alone.
    if next.slots != view.slots || next.moves != view.moves {
        return Err(PlanViolation::Slots);
    }

    // Nodes go by `prune` alone, when they have no replica left.
    for (id, node) in &view.nodes {
        if next.nodes.get(id) != Some(node) {
            return Err(PlanViolation::Node(*id));
        }
    }

    // A replica may still hold votes: only a report of its group retires it.
    for (id, group) in &view.groups {
        let Some(successor) = next.groups.get(id) else {
            return Err(PlanViolation::Group(*id));
        };
        if successor.creation != group.creation || successor.reported != group.reported {
            return Err(PlanViolation::Group(*id));
        }
        if let Some((replica, _)) = group
            .hosted()
            .find(|(replica, node)| next.node_of(*id, *replica) != Some(*node))
        {
            return Err(PlanViolation::Replica(replica));
        }
    }
    check_new_ids(view, next)
}

/// Everything new has an id that was never given out.
fn check_new_ids(view: &View, next: &View) -> Result<(), PlanViolation> {
    // Below the counter and not in the view: it belonged to something that is gone.
    let old_node = |id: &NodeId| *id < view.next_node && !view.nodes.contains_key(id);
    if let Some(id) = next.nodes.keys().find(|id| old_node(id)) {
        return Err(PlanViolation::Node(*id));
    }
    for (id, group) in &next.groups {
        if *id < view.next_group && !view.groups.contains_key(id) {
            return Err(PlanViolation::Group(*id));
        }
        let old = |replica: ReplicaId| {
            replica < view.next_replica && view.node_of(*id, replica).is_none()
        };
        if let Some((replica, _)) = group.hosted().find(|(replica, _)| old(*replica)) {
            return Err(PlanViolation::Replica(replica));
        }
        // Of a replica that is on its way out, only what is known to have a map comes back, and as
        // that.
        let back = |replica: ReplicaId| {
            let was_leaving = view
                .groups
                .get(id)
                .filter(|before| before.leaving.contains_key(&replica));
            was_leaving
                .is_some_and(|before| group.is_witness(replica) || !before.can_return(replica))
        };
        // Nor does one that has a map become a witness, or the other way round.
        let turned = |replica: ReplicaId| {
            view.groups.get(id).is_some_and(|before| {
                before.is_witness(replica) != group.is_witness(replica)
                    && before.wanted().any(|(known, _)| known == replica)
            })
        };
        if let Some((replica, _)) = group
            .wanted()
            .find(|(replica, _)| back(*replica) || turned(*replica))
        {
            return Err(PlanViolation::Replica(replica));
        }
    }
    Ok(())
}

/// The view at the level; none if it has reached that already.
fn raise_level(
    view: Option<View>,
    level: u16,
    over: MapVersion,
) -> Result<Option<View>, MetaRejection> {
    let mut view = view.ok_or(MetaRejection::NotFounded)?;

    // A node that has joined since was not asked, and may not be able to read this level.
    if view.version != over {
        return Err(MetaRejection::Outdated {
            version: view.version,
        });
    }
    if view.level >= level {
        return Ok(None);
    }
    view.level = level;
    view.version.0 += 1;
    Ok(Some(view))
}

fn open_move(view: Option<View>, open: SlotMove) -> Result<(MoveId, View), MetaRejection> {
    let mut view = view.ok_or(MetaRejection::NotFounded)?;

    // One move per slot: with two, two destinations could come to serve it.
    let moving: BTreeSet<Slot> = view
        .moves
        .values()
        .flat_map(|open| open.slots.iter().copied())
        .collect();

    // A plan may have changed the target since the driver looked.
    let is_due =
        |slot: Slot| view.slots.owner(slot) == open.from && view.targets.owner(slot) == open.to;
    if let Some(slot) = open
        .slots
        .iter()
        .find(|slot| !is_due(**slot) || moving.contains(slot))
    {
        return Err(MetaRejection::NotToBeMoved(*slot));
    }
    if open.from == open.to || open.slots.is_empty() {
        return Err(MetaRejection::UnknownGroup(open.to));
    }
    let id = view.next_move;
    view.next_move.0 += 1;
    view.moves.insert(id, open);
    view.version.0 += 1;
    Ok((id, view))
}

fn end_move(view: Option<View>, id: MoveId, committed: bool) -> Result<View, MetaRejection> {
    let mut view = view.ok_or(MetaRejection::NotFounded)?;
    let ended = view
        .moves
        .remove(&id)
        .ok_or(MetaRejection::NoSuchMove(id))?;
    if committed {
        for slot in ended.slots {
            view.slots.set_owner(slot, ended.to);
        }
    }

    // The move may have been the last thing that held a draining group.
    view.prune();
    view.version.0 += 1;
    Ok(view)
}

/// The view with what a leader tells of its group; none if that is nothing new.
fn report(
    view: Option<View>,
    group: GroupId,
    reported: ReportedMembership,
    plan: PlanEpoch,
) -> Result<Option<View>, MetaRejection> {
    let mut view = view.ok_or(MetaRejection::NotFounded)?;

    // What an earlier look did not find may have joined since: to retire it would wipe a member.
    if view.epoch != plan {
        return Err(MetaRejection::Outdated {
            version: view.version,
        });
    }
    let known = view
        .groups
        .get_mut(&group)
        .ok_or(MetaRejection::UnknownGroup(group))?;

    // Reports may overtake each other, and one from before a change would undo what a later one
    // told.
    if known
        .reported
        .as_ref()
        .is_some_and(|known| known.log_id > reported.log_id)
    {
        return Ok(None);
    }
    // A replica that was planned in and out again may never have become a member: then the report
    // is not a newer one.
    let retires = known
        .leaving
        .keys()
        .any(|replica| !reported.is_member(*replica));
    if !retires && known.reported.as_ref() == Some(&reported) {
        return Ok(None);
    }

    // Retired for good, so that their nodes may wipe them: the group has committed that they are
    // gone.
    known
        .leaving
        .retain(|replica, _| reported.is_member(*replica));
    known.reported = Some(reported);
    view.prune();
    view.version.0 += 1;
    Ok(Some(view))
}

impl MetaCommand {
    /// Returns what a view must allow before it is proposed; none: every program reads it.
    ///
    /// A view or a raised level say by themselves what must be known to read them.
    pub fn needs(&self) -> Option<Feature> {
        match self {
            MetaCommand::Found { .. }
            | MetaCommand::Announce { .. }
            | MetaCommand::InstallPlan { .. }
            | MetaCommand::OpenMove { .. }
            | MetaCommand::CommitMove { .. }
            | MetaCommand::AbortMove { .. }
            | MetaCommand::Report { .. }
            | MetaCommand::RaiseLevel { .. } => None,
        }
    }

    /// Those that end with a view are written in its format, later ones with the level that must be
    /// known, the others in the first.
    pub fn encode(&self) -> Bytes {
        if let Some(feature) = self.needs() {
            return codec::encode_leveled(feature.level(), self, 0);
        }
        match self {
            MetaCommand::Found { view } => view::encode_ending(view.level, self),
            MetaCommand::InstallPlan { next, .. } => view::encode_ending(next.level, self),
            MetaCommand::RaiseLevel { level, .. } => codec::encode_leveled(*level, self, 0),
            MetaCommand::Announce { .. }
            | MetaCommand::OpenMove { .. }
            | MetaCommand::CommitMove { .. }
            | MetaCommand::AbortMove { .. }
            | MetaCommand::Report { .. } => codec::encode(self),
        }
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        let what = "a command of the meta group";
        /// Variant numbers, which follow the format byte, of the commands that end with a view.
        const FOUND: u8 = 0;
        const INSTALL_PLAN: u8 = 2;
        if matches!(
            bytes,
            [codec::FORMAT | view::FORMAT, FOUND | INSTALL_PLAN, ..]
        ) {
            return view::decode_ending(bytes, what);
        }
        match codec::split_leveled(bytes, what)? {
            Some((_, body)) => codec::decode_body(body, what),
            None => codec::decode_body(codec::split(bytes, view::FORMAT, what)?.1, what),
        }
    }
}

impl MetaOutcome {
    pub fn encode(&self) -> Bytes {
        codec::encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode(bytes, "an outcome of the meta group")
    }
}

#[cfg(test)]
mod tests;
