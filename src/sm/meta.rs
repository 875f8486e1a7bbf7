//! What the meta group understands: its commands, what it answers, and [`apply`].

use serde::{Deserialize, Serialize};

use super::view::View;
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
}
