//! What the meta group understands: its commands, what it answers, and [`apply`].
//!
//! Its map holds the [`View`] under one key. Kept out: planning (`placement`). Called by the state machine of group 0, and by whoever
//! reads the view from a replica of it.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::codec;
use super::ports::{Read, StoreError, WriteBatch};
use super::view::{Inconsistency, Node, View};
use crate::types::{Address, DirectoryId, NodeId};

/// One entry of the meta group's log. Part of the disk format: variants are only ever added, at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The first view, by the founder. Accepted once.
    Found { view: Box<View> },
    /// A node says under which address it now runs. Accepted only from the directory that the view names.
    Announce { node: NodeId, directory: DirectoryId, address: Address, public_address: Option<Address> },
}

/// What became of a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Done,
    Rejected(Rejection),
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
    /// The parts of the first view don't fit together.
    Inconsistent(Inconsistency),
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
    };
    let mut batch = WriteBatch::default();
    Ok(match decided {
        Err(rejection) => (Outcome::Rejected(rejection), batch),
        Ok(changed) => {
            if let Some(view) = changed {
                batch.put(VIEW_KEY, view.encode());
            }
            (Outcome::Done, batch)
        }
    })
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
    let taken = view.nodes.iter().find(|(id, other)| **id != node && other.address == now.address).map(|(id, _)| *id);
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
    use crate::sm::placement::first_view;
    use crate::sm::view::Asked;
    use crate::types::{ClusterId, GroupId, MapVersion, Slot};

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
    fn the_encodings_of_a_view_and_an_announcement_stand() {
        let alone = first_view(ClusterId(1), Asked { shards: Some(2), ..Asked::default() }, vec![node(1)]).expect("a view");
        let golden: &[u8] = b"\x01\x2000000000000000000000000000000001\x01\x01\x00\x00\x01\x02\
            \x01\x01\x04n1:1\x00\x2000000000000000000000000000000001\
            \x03\x00\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x02\x01\x01\x02\x01\x02\x01\x01\x03\x01\x01\x03\x01\
            \x02\x80\x10\x01\x80\x10\x02\x02\x03\x04";
        assert_eq!(&alone.encode()[..], golden);
        assert_eq!(View::decode(&alone.encode()).expect("own encoding"), alone);
        let bytes = announce(1, 2, "a:1").encode();
        assert_eq!(&bytes[..], b"\x01\x01\x01\x2000000000000000000000000000000002\x03a:1\x00");
    }
}
