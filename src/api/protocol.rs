//! The messages between a client, a gateway or a node and the node that leads a shard,
//! apart from the native dialect.
//!
//! [`ShardRequest`] and [`ShardReply`] travel as postcard behind the format byte of `sm::codec`, in
//! the body of `POST /peer/shard`. [`ClusterStatus`] is the JSON of `GET /v1/cluster`: for people,
//! for scripts, and the shard map of the typed client.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::peer::FailedReplica;
use super::values::{Consistency, GetOutcome, Item, ScanRange};
use crate::budget::{Share, UNCHARGED_BYTES_MAX, hold_together};
use crate::sm::cluster::view::{PlacementSpec, SlotTable};
use crate::sm::kv::{KvCommand, OperationOutcome, Record, Write, WriteOutcome, WriteRejection};
use crate::sm::moves::{DestinationState, MoveOutcome};
use crate::types::{
    Address, ClusterId, DirectoryId, GroupId, LogId, MapVersion, MoveId, NodeId, PlanEpoch,
    ReplicaId, Slot,
};

/// Says whether a node may pass a request for a shard on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    /// To answer it, or to say who would.
    Answer,
    /// To pass it on, once, if it does not lead the shard: who asks can't connect to the leader.
    Relay,
}

/// Query of the route that asks for a relay. Programs that do not know it answer themselves.
pub const RELAY_QUERY: &str = "relay=1";

/// Asks the node that leads `shard` (or, for stale reads, one that has a replica).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRequest {
    pub cluster: ClusterId,
    pub shard: GroupId,
    /// Time for which the answer is waited for, in milliseconds from receipt.
    pub timeout_ms: u64,
    pub body: ShardBody,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShardBody {
    Get {
        key: Bytes,
        consistency: Consistency,
    },
    Write(Write),
    Scan {
        range: ScanRange,
        reverse: bool,
        limit: usize,
        bytes_max: usize,
        keys_only: bool,
        consistency: Consistency,
    },
    /// The number of keys in the slots that the shard owns.
    Count,
    /// A step of a slot move, or a chunk of one, from the leader of its source.
    Move(KvCommand),
    /// Asks how far the shard is with a move of slots to it.
    MoveState {
        id: MoveId,
        slots: BTreeSet<Slot>,
    },
    /// The first of these keys: as many as fit into `bytes_max`, and one at least.
    GetMany {
        keys: Vec<Bytes>,
        bytes_max: usize,
        keys_only: bool,
        consistency: Consistency,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShardReply {
    Got(GetOutcome),
    /// The slot of the key is not this shard's: look at a newer map.
    NotOwned {
        slot: Slot,
    },
    Written(WriteOutcome),
    Page(ShardPage),
    Counted {
        keys: u64,
        slots: Vec<Slot>,
    },
    Failed(Failure),
    Moved(MoveOutcome),
    MoveState(DestinationState),
    /// The records of the first of the keys.
    GotMany(Vec<Option<Record>>),
}

impl ShardReply {
    /// Returns true if only a leader answers so to a request that is not for a stale read. That a
    /// slot is elsewhere, or frozen, is read from the map without asking a quorum.
    pub fn shows_leadership(&self) -> bool {
        use WriteRejection::{Frozen, WrongOwner};
        !matches!(
            self,
            ShardReply::Failed(_)
                | ShardReply::Written(WriteOutcome::Rejected(Frozen { .. } | WrongOwner { .. }))
        )
    }
}

impl ShardBody {
    /// Returns whether it changes nothing, so that it can be asked again.
    pub fn is_read(&self) -> bool {
        match self {
            ShardBody::Write(write) => write.is_read(),
            ShardBody::Move(_) => false,
            ShardBody::Get { .. }
            | ShardBody::Scan { .. }
            | ShardBody::Count
            | ShardBody::MoveState { .. }
            | ShardBody::GetMany { .. } => true,
        }
    }

    /// Returns whether it may be asked again where nobody knows whether it was done.
    pub fn is_repeatable(&self) -> bool {
        match self {
            ShardBody::Write(write) => write.idempotency_key.is_some() || write.is_read(),
            body => body.is_read(),
        }
    }
}

impl ShardReply {
    /// Returns the bytes of the values in it, nearly: what it takes to encode it.
    pub fn value_bytes(&self) -> usize {
        let got = |outcome: &OperationOutcome| match outcome {
            OperationOutcome::Got(Some(record)) => record.value.len(),
            _ => 0,
        };
        match self {
            ShardReply::Got(found) => found.record.as_ref().map_or(0, |record| record.value.len()),
            ShardReply::GotMany(records) => records
                .iter()
                .flatten()
                .map(|record| record.value.len())
                .sum(),
            ShardReply::Page(page) => page
                .items
                .iter()
                .map(|item| item.key.len() + item.record.value.len())
                .sum(),
            ShardReply::Written(WriteOutcome::Applied(outcomes)) => outcomes.iter().map(got).sum(),
            ShardReply::Written(WriteOutcome::Mixed(results)) => {
                results.iter().flatten().map(got).sum()
            }
            ShardReply::Written(WriteOutcome::Rejected(_) | WriteOutcome::Unanswered)
            | ShardReply::NotOwned { .. }
            | ShardReply::Counted { .. }
            | ShardReply::Failed(_)
            | ShardReply::Moved(_)
            | ShardReply::MoveState(_) => 0,
        }
    }

    /// Returns the same reply, whose values stay charged to `share` until the last of them is
    /// dropped; those of a page with their keys.
    pub fn held(mut self, share: Share) -> Self {
        if share.bytes() <= UNCHARGED_BYTES_MAX {
            return self;
        }

        // The values outlive the reply, each on its own way to a socket: the charge ends with the
        // last.
        let share = Arc::new(share);
        let hold = |bytes: &mut Bytes| *bytes = hold_together(std::mem::take(bytes), &share);
        let hold_got = |outcome: &mut OperationOutcome| {
            if let OperationOutcome::Got(Some(record)) = outcome {
                hold(&mut record.value);
            }
        };
        match &mut self {
            ShardReply::Got(found) => found
                .record
                .iter_mut()
                .for_each(|record| hold(&mut record.value)),
            ShardReply::GotMany(records) => records
                .iter_mut()
                .flatten()
                .for_each(|record| hold(&mut record.value)),
            ShardReply::Page(page) => page.items.iter_mut().for_each(|item| hold(&mut item.key)),
            ShardReply::Written(WriteOutcome::Applied(outcomes)) => {
                outcomes.iter_mut().for_each(hold_got)
            }
            ShardReply::Written(WriteOutcome::Mixed(results)) => {
                results.iter_mut().flatten().for_each(hold_got)
            }
            ShardReply::Written(WriteOutcome::Rejected(_) | WriteOutcome::Unanswered)
            | ShardReply::NotOwned { .. }
            | ShardReply::Counted { .. }
            | ShardReply::Failed(_)
            | ShardReply::Moved(_)
            | ShardReply::MoveState(_) => {}
        }
        self
    }
}

/// A page of one shard, taken at one applied index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPage {
    pub items: Vec<Item>,
    /// There may be more in the range after the last item.
    pub more: bool,
    /// The slots that the shard owned: keys of others are not in it.
    pub slots: Vec<Slot>,
}

/// Answers `GET /v1/cluster`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterStatus {
    pub cluster: ClusterId,
    pub epoch: PlanEpoch,
    pub version: MapVersion,
    /// The level that every node can read, so that leaders may propose it.
    #[serde(default)]
    pub level: u16,
    pub asked: PlacementSpec,
    /// The node that answered.
    pub answered_by: NodeId,
    /// The leader of the meta group, as the answering node knows it.
    pub meta_leader: Option<NodeId>,
    pub nodes: Vec<NodeStatus>,
    pub shards: Vec<ShardStatus>,
    /// Moves under way.
    pub moves: Vec<MoveStatus>,
    /// Slots that are not yet where the plan wants them.
    pub slots_astray: u64,
    /// Everything is as the plan says.
    pub settled: bool,
    /// Runs of slots in slot order: how many, and the shard that owns them.
    pub slots: SlotTable,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub id: NodeId,
    pub address: Address,
    pub public_address: Address,
    pub directory: DirectoryId,
    /// True if the answering node reached it within the last seconds.
    pub reachable: bool,
    /// On its way out: it goes when the last of its replicas is retired.
    pub leaving: bool,
    /// The level that its program knows; None if it did not say.
    #[serde(default)]
    pub speaks: Option<u16>,
    /// As long as one node holds it, the cluster's level is not raised.
    #[serde(default)]
    pub holds_level: bool,
    /// Its replicas that do not run, those of the meta group too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<FailedReplica>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardStatus {
    pub id: GroupId,
    pub home: NodeId,
    pub leader: Option<NodeId>,
    pub term: Option<u64>,
    /// Keys in the shard, as its leader (or the replica at hand) has applied.
    pub keys: Option<u64>,
    pub bytes: Option<u64>,
    pub slots: u64,
    pub replicas: Vec<ReplicaStatus>,
    /// One that only keeps the log: it lets an even number of replicas survive the loss of half of
    /// them, and serves nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<ReplicaStatus>,
    /// The reason why nothing is written to it: its replicas differ, and no majority of them is of
    /// one mind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    pub id: ReplicaId,
    pub node: NodeId,
    pub health: ReplicaHealth,
    pub applied: Option<LogId>,
    /// On its way out: it goes when its shard has committed a membership without it.
    pub leaving: bool,
}

/// Slots going from a shard to another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveStatus {
    pub id: MoveId,
    pub from: GroupId,
    pub to: GroupId,
    pub slots: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaHealth {
    Leading,
    /// Applies what its leader commits.
    Following,
    /// Behind its leader by more than a moment.
    Lagging,
    /// Stopped, and says why in its node's log.
    Failed,
    /// Its node does not answer.
    Unreachable,
}

/// Progress of the last scrub of a node that was begun since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Zero before the first.
    pub number: u64,
    pub is_running: bool,
    /// The node stopped before the end.
    pub was_broken_off: bool,
    pub bytes_read: u64,
    /// About how many there are to be read, as it was at the beginning.
    pub bytes_total: u64,
    pub elapsed_ms: u64,
    /// Number of files and trees that were found damaged, and of these that are mended.
    pub damaged: u64,
    pub mended: u64,
    /// The first of them.
    pub damages: Vec<ScrubDamage>,
}

/// Something that a scrub has found damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubDamage {
    /// `segment`, `snapshot`, `witness`, `tree`, or what later programs read.
    pub kind: String,
    pub what: String,
    /// The reason why it was not mended; None if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_mended: Option<String>,
}
