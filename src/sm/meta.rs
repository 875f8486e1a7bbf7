//! What the meta group understands: its commands, what it answers, and [`apply`].
//!
//! Its map holds the [`View`] under one key. Kept out: planning (`placement`). Called by the state machine of group 0, and by whoever
//! reads the view from a replica of it.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::codec;
use super::ports::{Read, StoreError, WriteBatch};
use super::view::{Inconsistency, Node, Reported, SlotMove, View};
use crate::types::{Address, DirectoryId, GroupId, MapVersion, MoveId, NodeId, PlanEpoch, ReplicaId, Slot};

/// One entry of the meta group's log. Part of the disk format: variants are only ever added, at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The first view, by the founder. Accepted once.
    Found { view: Box<View> },
    /// A node says under which address it now runs. Accepted only from the directory that the view names.
    Announce { node: NodeId, directory: DirectoryId, address: Address, public_address: Option<Address> },
    /// Another plan: the view `next`, drawn up from the view of version `base`. Accepted only while that is still the view, and only if
    /// nothing that is there is taken away by it: owners of slots, open moves and replicas end otherwise.
    InstallPlan { base: MapVersion, next: Box<View> },
    /// The leader of `from` begins to move slots to where they should be.
    OpenMove { slots: BTreeSet<Slot>, from: GroupId, to: GroupId },
    /// `to` serves the slots of the move.
    CommitMove { id: MoveId },
    /// `from` goes on serving the slots of the move.
    AbortMove { id: MoveId },
    /// The leader of a group tells of a membership that is committed and uniform. Replicas on their way out that are not in it are retired.
    /// Accepted only from one that knew this plan when it looked: what an earlier look did not find may have joined since.
    Report { group: GroupId, reported: Reported, plan: PlanEpoch },
}

/// What became of a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Done,
    Rejected(Rejection),
    MoveOpened { id: MoveId },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rejection {
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
    NotASuccessor(Misstep),
    /// Not where it should be moved from, or not to be moved there, or being moved.
    NotToBeMoved(Slot),
    /// The move is not open: it has ended.
    NoSuchMove(MoveId),
    UnknownGroup(GroupId),
}

/// What a plan may not do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Misstep {
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

/// Where the meta group keeps the view. Its first byte is none that `slots` reserves for the storage layer.
const VIEW_KEY: &[u8] = b"\x01view";

/// What `command` does to the meta group's map, and what it answers. The index has no part in it.
///
/// A rejection is an answer, the same on every replica; an error is a broken disk or an undecodable map and stops the group.
pub fn apply(read: &impl Read, _index: u64, command: Command) -> Result<(Outcome, WriteBatch), StoreError> {
    let view = read_view(read)?;
    let decided = match command {
        Command::Found { view: first } => found(view, *first).map(Some),
        Command::Announce { node, directory, address, public_address } => {
            announce(view, node, Node { address, public_address, directory })
        }
        Command::InstallPlan { base, next } => install(view, base, *next).map(Some),
        Command::OpenMove { slots, from, to } => {
            let opened = open_move(view, SlotMove { slots, from, to });
            return Ok(match opened {
                Ok((id, view)) => (Outcome::MoveOpened { id }, written(Some(view))),
                Err(rejection) => (Outcome::Rejected(rejection), WriteBatch::default()),
            });
        }
        Command::CommitMove { id } => end_move(view, id, true).map(Some),
        Command::AbortMove { id } => end_move(view, id, false).map(Some),
        Command::Report { group, reported, plan } => report(view, group, reported, plan),
    };
    Ok(match decided {
        Err(rejection) => (Outcome::Rejected(rejection), WriteBatch::default()),
        Ok(changed) => (Outcome::Done, written(changed)),
    })
}

fn written(view: Option<View>) -> WriteBatch {
    let mut batch = WriteBatch::default();
    if let Some(view) = view {
        batch.put(VIEW_KEY, view.encode());
    }
    batch
}

/// The view in the meta group's map; none before the cluster is founded.
pub fn read_view(read: &impl Read) -> Result<Option<View>, StoreError> {
    read.get(VIEW_KEY)?.map(|bytes| View::decode(&bytes)).transpose()
}

fn found(view: Option<View>, first: View) -> Result<View, Rejection> {
    if view.is_some() {
        return Err(Rejection::AlreadyFounded);
    }
    first.check().map_err(Rejection::Inconsistent)?;
    Ok(first)
}

/// The view with `node` as it says it is; none if it is so already.
fn announce(view: Option<View>, node: NodeId, now: Node) -> Result<Option<View>, Rejection> {
    let mut view = view.ok_or(Rejection::NotFounded)?;
    let taken = view.staying().find(|(id, other)| *id != node && other.address == now.address).map(|(id, _)| id);
    let known = view.nodes.get_mut(&node).ok_or(Rejection::UnknownNode(node))?;
    if known.directory != now.directory {
        return Err(Rejection::OtherDirectory { node, directory: known.directory });
    }
    if let Some(by) = taken {
        return Err(Rejection::AddressTaken { address: now.address, by });
    }
    if *known == now {
        return Ok(None);
    }
    *known = now;
    view.version.0 += 1;
    Ok(Some(view))
}

fn install(view: Option<View>, base: MapVersion, next: View) -> Result<View, Rejection> {
    let view = view.ok_or(Rejection::NotFounded)?;
    if view.version != base {
        return Err(Rejection::Outdated { version: view.version });
    }
    next.check().map_err(Rejection::Inconsistent)?;
    check_successor(&view, &next).map_err(Rejection::NotASuccessor)?;
    let mut next = next;
    next.clear_away();
    Ok(next)
}

/// Whether `next` takes nothing away from `view` that must end otherwise.
fn check_successor(view: &View, next: &View) -> Result<(), Misstep> {
    let follows = next.cluster == view.cluster && next.epoch.0 == view.epoch.0 + 1 && next.version.0 == view.version.0 + 1;
    if !follows {
        return Err(Misstep::Numbers);
    }
    let grows = next.next_node >= view.next_node
        && next.next_group >= view.next_group
        && next.next_replica >= view.next_replica
        && next.next_move == view.next_move;
    if !grows {
        return Err(Misstep::Ids);
    }
    if next.slots != view.slots || next.moves != view.moves {
        return Err(Misstep::Slots);
    }
    for (id, node) in &view.nodes {
        if next.nodes.get(id) != Some(node) {
            return Err(Misstep::Node(*id));
        }
    }
    for (id, group) in &view.groups {
        let Some(of) = next.groups.get(id) else { return Err(Misstep::Group(*id)) };
        if of.creation != group.creation || of.reported != group.reported {
            return Err(Misstep::Group(*id));
        }
        if let Some((replica, _)) = group.hosted().find(|(replica, node)| next.node_of(*id, *replica) != Some(*node)) {
            return Err(Misstep::Replica(replica));
        }
    }
    check_new_ids(view, next)
}

/// Everything new has an id that was never given out.
fn check_new_ids(view: &View, next: &View) -> Result<(), Misstep> {
    let old_node = |id: &NodeId| *id < view.next_node && !view.nodes.contains_key(id);
    if let Some(id) = next.nodes.keys().find(|id| old_node(id)) {
        return Err(Misstep::Node(*id));
    }
    for (id, group) in &next.groups {
        if *id < view.next_group && !view.groups.contains_key(id) {
            return Err(Misstep::Group(*id));
        }
        let old = |replica: ReplicaId| replica < view.next_replica && view.node_of(*id, replica).is_none();
        if let Some((replica, _)) = group.hosted().find(|(replica, _)| old(*replica)) {
            return Err(Misstep::Replica(replica));
        }
        // A replica that is on its way out does not come back: it may have been told already.
        let back = |replica: &&ReplicaId| view.groups.get(id).is_some_and(|group| group.leaving.contains_key(replica));
        if let Some(replica) = group.replicas.keys().find(back) {
            return Err(Misstep::Replica(*replica));
        }
    }
    Ok(())
}

fn open_move(view: Option<View>, open: SlotMove) -> Result<(MoveId, View), Rejection> {
    let mut view = view.ok_or(Rejection::NotFounded)?;
    let moving: BTreeSet<Slot> = view.moves.values().flat_map(|open| open.slots.iter().copied()).collect();
    let is_due = |slot: Slot| view.slots.owner(slot) == open.from && view.targets.owner(slot) == open.to;
    if let Some(slot) = open.slots.iter().find(|slot| !is_due(**slot) || moving.contains(slot)) {
        return Err(Rejection::NotToBeMoved(*slot));
    }
    if open.from == open.to || open.slots.is_empty() {
        return Err(Rejection::UnknownGroup(open.to));
    }
    let id = view.next_move;
    view.next_move.0 += 1;
    view.moves.insert(id, open);
    view.version.0 += 1;
    Ok((id, view))
}

fn end_move(view: Option<View>, id: MoveId, committed: bool) -> Result<View, Rejection> {
    let mut view = view.ok_or(Rejection::NotFounded)?;
    let ended = view.moves.remove(&id).ok_or(Rejection::NoSuchMove(id))?;
    if committed {
        for slot in ended.slots {
            view.slots.set_owner(slot, ended.to);
        }
    }
    view.clear_away();
    view.version.0 += 1;
    Ok(view)
}

/// The view with what a leader tells of its group; none if that is nothing new.
fn report(view: Option<View>, group: GroupId, reported: Reported, plan: PlanEpoch) -> Result<Option<View>, Rejection> {
    let mut view = view.ok_or(Rejection::NotFounded)?;
    if view.epoch != plan {
        return Err(Rejection::Outdated { version: view.version });
    }
    let known = view.groups.get_mut(&group).ok_or(Rejection::UnknownGroup(group))?;
    if known.reported.as_ref().is_some_and(|known| known.log_id > reported.log_id) {
        return Ok(None);
    }
    // A replica that was planned in and out again may never have become a member: then the report is not a newer one.
    let retires = known.leaving.keys().any(|replica| !reported.is_member(*replica));
    if !retires && known.reported.as_ref() == Some(&reported) {
        return Ok(None);
    }
    known.leaving.retain(|replica, _| reported.is_member(*replica));
    known.reported = Some(reported);
    view.clear_away();
    view.version.0 += 1;
    Ok(Some(view))
}

impl Command {
    pub fn encode(&self) -> Bytes {
        codec::encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode(bytes, "a command of the meta group")
    }
}

impl Outcome {
    pub fn encode(&self) -> Bytes {
        codec::encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode(bytes, "an outcome of the meta group")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::sm::placement::{first_view, plan};
    use crate::sm::testing::Meta;
    use crate::sm::view::Asked;
    use crate::types::{ClusterId, GroupId, LogId, MapVersion, Slot};

    type Map = BTreeMap<Bytes, Bytes>;

    fn node(number: u32) -> Node {
        let address = format!("n{number}:1").parse().expect("an address");
        Node { address, public_address: None, directory: DirectoryId(u128::from(number)) }
    }

    fn view() -> View {
        first_view(ClusterId(9), Asked::default(), vec![node(1), node(2), node(3)]).expect("a view")
    }

    /// Applies `command` and returns what it answered.
    fn run(map: &mut Map, command: Command) -> Outcome {
        let decoded = Command::decode(&command.encode()).expect("own encoding");
        let (outcome, batch) = apply(map, 1, decoded).expect("applied");
        for (key, value) in batch {
            match value {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
        Outcome::decode(&outcome.encode()).expect("own encoding")
    }

    fn founded() -> Map {
        let mut map = Map::new();
        assert_eq!(run(&mut map, Command::Found { view: Box::new(view()) }), Outcome::Done);
        map
    }

    fn announce(number: u64, directory: u128, address: &str) -> Command {
        let address = address.parse().expect("an address");
        Command::Announce { node: NodeId(number), directory: DirectoryId(directory), address, public_address: None }
    }

    #[test]
    fn a_cluster_is_founded_once() {
        let mut map = Map::new();
        assert_eq!(read_view(&map).expect("readable"), None);
        assert_eq!(run(&mut map, announce(1, 1, "n1:1")), Outcome::Rejected(Rejection::NotFounded));
        assert_eq!(run(&mut map, Command::Found { view: Box::new(view()) }), Outcome::Done);
        assert_eq!(read_view(&map).expect("readable"), Some(view()));
        let second = View { cluster: ClusterId(10), ..view() };
        let outcome = run(&mut map, Command::Found { view: Box::new(second) });
        assert_eq!(outcome, Outcome::Rejected(Rejection::AlreadyFounded));
        assert_eq!(read_view(&map).expect("readable"), Some(view()));
    }

    #[test]
    fn a_view_that_does_not_fit_together_is_rejected() {
        type Break = fn(&mut View);
        let table: [(&str, Break); 9] = [
            ("NoMetaGroup", |view| drop(view.groups.remove(&GroupId::META))),
            ("NodeIdNotGivenOut", |view| view.next_node = NodeId(3)),
            ("GroupIdNotGivenOut", |view| view.next_group = GroupId(3)),
            ("ReplicaIdNotGivenOut", |view| view.next_replica.0 -= 1),
            ("AddressTwice", |view| view.nodes.get_mut(&NodeId(1)).expect("a node").address = node(2).address),
            ("NodeTwiceInGroup", |view| {
                view.groups.get_mut(&GroupId(1)).expect("a shard").replicas.values_mut().for_each(|at| *at = NodeId(1));
            }),
            ("ReplicaOnUnknownNode", |view| drop(view.nodes.remove(&NodeId(2)))),
            ("HomeWithoutReplica", |view| view.groups.get_mut(&GroupId(1)).expect("a shard").home = NodeId(7)),
            ("SlotWithoutShard", |view| view.slots.set_owner(Slot::new(5).expect("a slot"), GroupId(8))),
        ];
        for (name, damage) in table {
            let mut view = view();
            damage(&mut view);
            let mut map = Map::new();
            let outcome = run(&mut map, Command::Found { view: Box::new(view) });
            assert!(matches!(&outcome, Outcome::Rejected(Rejection::Inconsistent(_))), "{name}: {outcome:?}");
            assert!(format!("{outcome:?}").contains(name), "{name}: {outcome:?}");
            assert!(map.is_empty());
        }
    }

    #[test]
    fn a_node_announces_a_new_address() {
        let mut map = founded();
        assert_eq!(run(&mut map, announce(2, 2, "n2:1")), Outcome::Done);
        assert_eq!(read_view(&map).expect("readable"), Some(view()), "nothing new, nothing changed");
        assert_eq!(run(&mut map, announce(2, 2, "elsewhere:1")), Outcome::Done);
        let changed = read_view(&map).expect("readable").expect("founded");
        assert_eq!(changed.version, MapVersion(2));
        assert_eq!(changed.nodes[&NodeId(2)].address.as_str(), "elsewhere:1");
    }

    #[test]
    fn an_announcement_is_believed_only_of_the_right_directory_and_a_free_address() {
        let mut map = founded();
        let before = map.clone();
        let other = Rejection::OtherDirectory { node: NodeId(2), directory: DirectoryId(2) };
        assert_eq!(run(&mut map, announce(2, 7, "n2:1")), Outcome::Rejected(other));
        assert_eq!(run(&mut map, announce(4, 4, "n4:1")), Outcome::Rejected(Rejection::UnknownNode(NodeId(4))));
        let taken = Rejection::AddressTaken { address: node(3).address, by: NodeId(3) };
        assert_eq!(run(&mut map, announce(2, 2, "n3:1")), Outcome::Rejected(taken));
        assert_eq!(map, before);
    }

    #[test]
    fn a_report_from_before_the_plan_retires_nothing() {
        let mut meta = Meta::founded(view());
        let (group, old) = (GroupId(1), meta.view());
        let members = old.groups[&group].voters();
        let reported = Reported { log_id: LogId { term: 1, index: 5 }, voters: members, learners: BTreeSet::new() };
        let report = |plan| Command::Report { group, reported: reported.clone(), plan };
        let wanted = vec![node(1), node(2), node(4)];
        meta.install(plan(&old, old.asked, &wanted, &BTreeSet::new()).expect("a plan").view);
        // The newcomer is planned out again, and may have become a voter meanwhile.
        let back = vec![node(1), node(2), node(3)];
        meta.install(plan(&meta.view(), old.asked, &back, &BTreeSet::new()).expect("a plan").view);
        let before = meta.view();
        let newcomers = before.groups[&group].leaving.keys().filter(|replica| !reported.is_member(**replica)).count();
        assert!(newcomers > 0, "{before:?}");
        let outdated = Outcome::Rejected(Rejection::Outdated { version: before.version });
        assert_eq!(meta.run(report(old.epoch)), outdated);
        assert_eq!(meta.view(), before);
        assert_eq!(meta.run(report(before.epoch)), Outcome::Done);
        assert!(meta.view().groups[&group].leaving.keys().all(|replica| reported.is_member(*replica)));
    }

    #[test]
    fn the_encodings_of_a_view_and_an_announcement_stand() {
        let alone = first_view(ClusterId(1), Asked { shards: Some(2), ..Asked::default() }, vec![node(1)]).expect("a view");
        let golden: &[u8] = b"\x01\x2000000000000000000000000000000001\x01\x01\x00\x00\x01\x02\
            \x01\x01\x04n1:1\x00\x2000000000000000000000000000000001\
            \x00\x00\x03\x00\x01\x01\x01\x01\x00\x00\x01\x01\x01\x00\x00\
            \x01\x01\x01\x02\x01\x00\x00\x01\x02\x01\x00\x00\x02\x01\x01\x03\x01\x00\x00\x01\x03\x01\x00\x00\
            \x02\x80\x10\x01\x80\x10\x02\x02\x80\x10\x01\x80\x10\x02\x00\x02\x03\x04\x01";
        assert_eq!(&alone.encode()[..], golden);
        assert_eq!(View::decode(&alone.encode()).expect("own encoding"), alone);
        let bytes = announce(1, 2, "a:1").encode();
        assert_eq!(&bytes[..], b"\x01\x01\x01\x2000000000000000000000000000000002\x03a:1\x00");
    }
}
