//! A change of the view that an operator asks for, the plan of it, and its progress: the JSON of
//! `PUT /v1/cluster/view` and `GET /v1/cluster/operations/<id>`.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::protocol::ClusterStatus;
use crate::sm::cluster::view::Layout;
use crate::types::{Address, PlanEpoch};

/// The codes of the problems that tell of a refused change.
pub const VIEW_REFUSED: &str = "view_refused";
pub const NODE_NOT_READY: &str = "node_not_ready";
pub const EPOCH_CHANGED: &str = "epoch_changed";
/// The code of the problem that no change was accepted under an id.
pub const UNKNOWN_OPERATION: &str = "unknown_operation";

/// Nodes that a change may name: each is asked who it is, and gets a replica of the meta group. Ten
/// times what was tried.
pub const NODES_MAX: usize = 1000;

/// A change of the view. A field left out stays as it was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewChange {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<Vec<Address>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_factor: Option<ReplicationFactor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards: Option<Shards>,
}

impl ViewChange {
    /// Refuses to work on a list of nodes that no cluster has. Asked wherever a change comes in,
    /// before anything is done for it.
    ///
    /// # Errors
    ///
    /// Names the part of it that is too much, for people.
    pub fn ensure_bounded(&self) -> Result<(), String> {
        match self.nodes.as_ref().map_or(0, Vec::len) {
            0..=NODES_MAX => Ok(()),
            named => Err(format!(
                "a view has at most {NODES_MAX} nodes, and this change names {named}"
            )),
        }
    }

    /// Returns whether the view is asked to be as this change would have it.
    pub fn is_asked_of(&self, status: &ClusterStatus) -> bool {
        let staying: BTreeSet<&Address> = status
            .nodes
            .iter()
            .filter(|node| !node.leaving)
            .map(|node| &node.address)
            .collect();
        let asked = &status.asked;
        let replication_factor = self.replication_factor.map(|factor| match factor {
            ReplicationFactor::Fixed(factor) => Some(factor),
            ReplicationFactor::Default(Auto::Auto) => None,
        });
        let shards = self.shards.map(|shards| match shards {
            Shards::Fixed(shards) => Some(shards),
            Shards::Default(PerNode::PerNode) => None,
        });
        self.nodes
            .as_ref()
            .is_none_or(|nodes| nodes.iter().collect::<BTreeSet<_>>() == staying)
            && self.layout.is_none_or(|layout| layout == asked.layout)
            && replication_factor.is_none_or(|factor| factor == asked.replication_factor)
            && shards.is_none_or(|shards| shards == asked.shards)
    }
}

/// A number, or `"auto"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ReplicationFactor {
    Fixed(u8),
    Default(Auto),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Auto {
    Auto,
}

/// A number, or `"per-node"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Shards {
    Fixed(u16),
    Default(PerNode),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PerNode {
    PerNode,
}

/// The work that a change would take. Nothing has been done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedChange {
    /// The plan that it would follow.
    pub base: PlanEpoch,
    /// Nothing would change.
    pub is_same: bool,
    pub nodes_added: Vec<Address>,
    pub nodes_removed: Vec<Address>,
    /// Replicas that are to be filled, of all groups.
    pub replicas_added: u64,
    pub replicas_removed: u64,
    pub shards_added: u64,
    pub shards_removed: u64,
    pub slots_moved: u64,
    pub slots_kept: u64,
    /// Keys and values in the slots that move.
    pub bytes_moved: u64,
}

/// A change of the view that was accepted. Its id is the epoch of its plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeInProgress {
    pub id: PlanEpoch,
    pub phase: Phase,
    /// Replicas of the plan that are not members yet, and replicas out of it that still are.
    pub replicas_left: u64,
    pub slots_left: u64,
    /// Keys and values in them, as far as it is known.
    pub bytes_left: u64,
    /// Since the answering node has watched: what was moved per second, and how long the rest takes
    /// at that rate.
    pub bytes_per_s: Option<u64>,
    pub left_s: Option<u64>,
    /// Says in words what it waits for.
    pub waiting_for: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Replicas are filled, slots move.
    Running,
    /// A later plan has taken over before this one was done.
    Superseded,
    Done,
}

impl ChangeInProgress {
    pub fn is_over(&self) -> bool {
        self.phase != Phase::Running
    }
}

/// A reason why a change was not accepted. Nothing has changed, but after
/// [`ViewChangeFailure::Failed`] with an unknown outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ViewChangeFailure {
    /// It can't be done as it was asked.
    #[error("{reason}")]
    Refused { reason: String },
    /// A newcomer does not answer, or belongs to another cluster.
    #[error("{reason}")]
    NotReady { reason: String },
    /// Another plan was accepted meanwhile.
    #[error("the view is that of plan {current} by now")]
    EpochChanged { current: PlanEpoch },
    #[error(transparent)]
    Failed(Failure),
}

/// Requests that change nothing meet [`ViewChangeFailure::Failed`] alone: the others say that
/// nothing was done, and are told so.
impl From<ViewChangeFailure> for Failure {
    fn from(failure: ViewChangeFailure) -> Self {
        match failure {
            ViewChangeFailure::Failed(failure) => failure,
            other => Failure::Unavailable {
                reason: other.to_string(),
                retry_after_ms: 1000,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_stays_and_words_stand_for_the_defaults() {
        let read = |text: &str| serde_json::from_str::<ViewChange>(text);
        assert_eq!(read("{}").expect("a change"), ViewChange::default());
        let text = concat!(
            r#"{"nodes":["a:1"],"layout":"exclusive","#,
            r#""replication_factor":"auto","shards":"per-node"}"#
        );
        let change = read(text).expect("a change");
        assert_eq!(
            change.replication_factor,
            Some(ReplicationFactor::Default(Auto::Auto))
        );
        assert_eq!(change.shards, Some(Shards::Default(PerNode::PerNode)));
        assert_eq!(
            read(&serde_json::to_string(&change).expect("JSON")).expect("a change"),
            change
        );
        let change = read(r#"{"replication_factor":3,"shards":7}"#).expect("a change");
        assert_eq!(
            (change.replication_factor, change.shards),
            (Some(ReplicationFactor::Fixed(3)), Some(Shards::Fixed(7)))
        );
        for bad in [
            r#"{"replication_factor":"many"}"#,
            r#"{"shards":-1}"#,
            r#"{"node":[]}"#,
            r#"{"nodes":["a"]}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
