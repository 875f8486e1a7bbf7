//! The messages that nodes send each other before they have a group in common: who one is, and
//! whether it promises to be founded by another.
//!
//! An address may have changed hands, so whatever counts says whose it is: the cluster, or the
//! directory. JSON over the one port: `GET /peer/identity`, `POST /peer/promise`,
//! `GET /peer/replicas`, `GET /peer/view`, `POST /peer/announce`, `POST /peer/invite`,
//! `POST /peer/greet`, `POST /peer/failures`.

use serde::{Deserialize, Serialize};

use crate::sm::cluster::meta;
use crate::sm::cluster::view::View;
use crate::sm::disk_level::DiskLevel;
use crate::sm::recovery::FailureCause;
use crate::sm::starts::{Start, Starts};
use crate::types::{Address, ClusterId, DirectoryId, GroupId, LogId, NodeId, ReplicaId};

/// Answers `GET /peer/identity`: the node as it sees itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub directory: DirectoryId,
    pub address: Address,
    pub public_address: Option<Address>,
    pub standing: Standing,
    /// The level that its program knows: what it can read and apply. The first programs do not say.
    #[serde(default)]
    pub speaks: u16,
    /// The level of its cluster, which a program finds here that can't read the view.
    #[serde(default)]
    pub level: u16,
    /// Its running start, once it has begun one. The first programs have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// Its operator wants the level of its cluster to stay.
    #[serde(default)]
    pub holds_level: bool,
}

/// The standing of a node towards clusters. Not internally tagged: serde would buffer the view, and
/// lose that its keys are numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It belongs to none and has promised nothing. `view`: its own `VIEW` as a set.
    Fresh { view: Vec<Address> },
    /// It will be founded by the node with that directory, with that `VIEW`, or not at all.
    Promised {
        view: Vec<Address>,
        founder: DirectoryId,
    },
    /// It belongs to a cluster. `view`: the newest that it knows.
    Member { view: Box<View> },
    /// It belonged to one.
    Retired {
        cluster: ClusterId,
        members: Vec<Address>,
    },
}

/// Asks a node for its durable, exclusive promise to be founded by the asker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromiseRequest {
    pub view: Vec<Address>,
    pub founder: DirectoryId,
    pub founder_address: Address,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromiseReply {
    /// Durable when this is sent.
    Promised {
        identity: Identity,
    },
    Refused {
        reason: String,
    },
}

/// Introduces a member at its start, and to each member that has not heard of this start yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub directory: DirectoryId,
    /// The address under which it runs now, which the view may not have yet.
    pub address: Address,
    pub starts: Starts,
}

/// Answers a [`Greeting`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GreetingReply {
    /// The other is a member of the same cluster, and has heard it.
    Welcome(Greeting),
    /// The other belongs to another cluster, or to none yet.
    Stranger { cluster: Option<ClusterId> },
    /// The other knows of this later start of the directory, which lacks it: it is an old copy.
    Outdated { number: u64 },
    /// Another process, at this address if that is known, runs with a copy of the directory.
    Doubled { at: Address },
    /// Nothing came of it: try again.
    Failed { reason: String },
}

/// Has the meta group of a cluster apply a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    pub cluster: ClusterId,
    pub command: meta::MetaCommand,
}

/// Answers `GET /peer/replicas`: the replicas that a node hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hosting {
    /// The directory of the node that hosts them.
    pub directory: DirectoryId,
    pub replicas: Vec<HostedReplica>,
    /// Those that do not run. They are apart, as whoever finds a replica among the others may take
    /// it for a member.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<FailedReplica>,
    /// As in [`Identity`].
    #[serde(default)]
    pub speaks: u16,
    #[serde(default)]
    pub holds_level: bool,
    /// Its disk is nearly full, and it takes no writes.
    #[serde(default)]
    pub lacks_room: bool,
    /// It hands over what it leads, and is given nothing more to lead.
    #[serde(default)]
    pub is_stopping: bool,
}

impl Hosting {
    /// Returns whether that replica is open there, and applies what is committed.
    pub fn runs(&self, group: GroupId, replica: ReplicaId) -> bool {
        self.replicas.iter().any(|hosted| {
            hosted.group == group && hosted.replica == replica && hosted.failed.is_none()
        })
    }
}

/// A replica that could not be opened on its node, or has stopped there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedReplica {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub cause: FailureCause,
    /// For so long it has not run, but perhaps for moments.
    pub for_ms: u64,
    pub reason: String,
}

/// Says that replicas of a node have failed, and is repeated as long as that is so. Which they are,
/// that node is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureReport {
    pub cluster: ClusterId,
    pub directory: DirectoryId,
}

/// Says how full the disk of a node is, and is repeated as long as it is nearly full.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    pub cluster: ClusterId,
    pub directory: DirectoryId,
    pub level: DiskLevel,
}

/// Asks a node to hold the level of its cluster where it is, or to do so no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldRequest {
    pub cluster: ClusterId,
    pub hold: bool,
}

/// One replica, as its node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostedReplica {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub leader: Option<NodeId>,
    pub term: u64,
    pub applied: Option<LogId>,
    pub keys: u64,
    pub bytes: u64,
    pub failed: Option<String>,
    /// It keeps the log and no map, and has no counts.
    #[serde(default)]
    pub is_witness: bool,
    /// The digest of its map as of the entry at which all replicas compare theirs.
    #[serde(default)]
    pub digest: Option<NotedDigest>,
    /// The reason why nothing is written to its shard, as far as it knows.
    #[serde(default)]
    pub alarm: Option<String>,
}

/// The digest of a replica's map as of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotedDigest {
    pub at: LogId,
    /// As text, which is only compared.
    pub digest: String,
}

impl NotedDigest {
    pub fn new(at: LogId, pairs: u64, sum: u128) -> Self {
        Self {
            at,
            digest: format!("{pairs}-{sum:032x}"),
        }
    }
}
