//! The one seam of the HTTP side: [`Store`], with two implementations, the local node (router, then
//! group) and the remote cluster (client).
//!
//! Dialects are written once against it. A store answers a write in one of three ways: applied,
//! rejected (certainly nothing happened) or unknown. Every [`Failure`] says which.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::protocol::ClusterStatus;
use super::shard_map::ShardMap;
use super::view_change::{ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::budget::{ANSWERS_BYTES_MAX, Budget};
use crate::sm::kv::{
    ANSWER_BYTES_MAX, GetsWeight, Operation, OperationOutcome, Record, WriteRejection,
};
use crate::sm::ports::KeyRange;
use crate::sm::requests::REQUESTS_BYTES_MAX;
use crate::types::{Address, GroupId, NodeId, PlanEpoch};

/// A linearizable key-value store, spread over shards.
pub trait Store: Send + Sync + 'static {
    /// The value of `key`. Missing is `GetOutcome { record: None, .. }`.
    fn get(&self, key: Bytes, options: Options) -> BoxFuture<'_, Result<GetOutcome, Failure>>;

    /// The records of the first of `request.keys`, in their order: as many as fit, and one at
    /// least. None: there is no such key. Each key is read on its own; a shard is asked once for
    /// all of its keys.
    fn get_many(
        &self,
        request: GetManyRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<Vec<Option<Record>>, Failure>>;

    /// Does `operations`, all or none of those that fall to one shard. One answer each, in order.
    fn write(
        &self,
        operations: Vec<Operation>,
        idempotency_key: Option<Bytes>,
        options: Options,
    ) -> BoxFuture<'_, Vec<Written>>;

    /// Returns when a write of `key` can be taken here: what the write itself would find out,
    /// before its value is read. With [`Routing::Proxy`] that is always so.
    ///
    /// # Errors
    ///
    /// [`Failure::Elsewhere`] above all. Nothing was done.
    fn locate(&self, _key: Bytes, _options: Options) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async { Ok(()) })
    }

    /// The keys of `request.range` in key order over all shards, a page of them.
    fn scan(
        &self,
        request: ScanRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<MergedPage, Failure>>;

    /// The number of keys of every shard.
    fn count(&self, options: Options) -> BoxFuture<'_, Result<Vec<(GroupId, u64)>, Failure>>;

    /// The number of keys of one shard, also while others can't be counted.
    fn count_shard(&self, shard: GroupId, options: Options) -> BoxFuture<'_, Result<u64, Failure>>;

    /// Returns what the answers under way are charged to: values that were read, and what is made
    /// of them.
    fn answers(&self) -> Arc<Budget> {
        Budget::new(ANSWERS_BYTES_MAX)
    }

    /// The node that answers here; none: a client's store, or a node that belongs to no cluster.
    fn this_node(&self) -> Option<NodeId>;

    /// What the node to ask about a shard is called in the view: its home, or, while that does not
    /// answer, its leader.
    fn contact(&self, shard: GroupId) -> BoxFuture<'_, Option<Address>>;

    /// The cluster by way of the network, where this node can't tell how a change to a view of
    /// these nodes ends: a spare is no member yet, and one that they leave out hears no end of it.
    fn by_network(&self, nodes: &[Address]) -> Option<Arc<dyn Store>>;

    /// Which shard owns each slot and where its replicas are, as this store knows it now: a look at
    /// a value at hand, except that one who knows no map yet waits for it. It may be a moment old;
    /// the shards know better.
    fn map(&self, options: Options) -> BoxFuture<'_, Result<Arc<ShardMap>, Failure>>;

    /// The view, and how its groups are.
    fn status(&self) -> BoxFuture<'_, Result<ClusterStatus, Failure>>;

    /// Hands the leadership of a shard to its replica on the node with this address (none: its
    /// home).
    fn transfer_leader(
        &self,
        shard: GroupId,
        to: Option<Address>,
        options: Options,
    ) -> BoxFuture<'_, Result<Address, Failure>>;

    /// Has the cluster change its view, if it is still that of `only_if`. Returns when the plan is
    /// accepted; [`Store::operation`] tells how it gets on.
    fn change_view(
        &self,
        change: ViewChange,
        only_if: Option<PlanEpoch>,
        options: Options,
    ) -> BoxFuture<'_, Result<ChangeInProgress, ViewChangeFailure>>;

    /// What such a change would take.
    fn plan_view(
        &self,
        change: ViewChange,
        options: Options,
    ) -> BoxFuture<'_, Result<PlannedChange, ViewChangeFailure>>;

    /// How the change that was accepted as this plan gets on; none: there was no such plan.
    fn operation(
        &self,
        id: PlanEpoch,
        options: Options,
    ) -> BoxFuture<'_, Result<Option<ChangeInProgress>, Failure>>;

    /// Waits until the change that was accepted as this plan is over, for at most so long, and
    /// returns whether it is, as far as is known here without asking anybody; none where nothing
    /// is.
    fn await_change(&self, id: PlanEpoch, at_most: Duration) -> BoxFuture<'_, Option<bool>>;
}

/// What became of one operation of a write.
pub type Written = Result<OperationOutcome, WriteFailure>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum WriteFailure {
    /// Certainly nothing was changed by the operations of this shard. Positions in it are those of
    /// the caller's list.
    #[error("rejected: {0:?}")]
    Rejected(WriteRejection),
    #[error(transparent)]
    Failed(Failure),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    pub consistency: Consistency,
    pub routing: Routing,
    /// How long the caller waits, from now.
    pub timeout: Duration,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    #[default]
    Linearizable,
    /// What the replica at hand has applied, however old.
    Stale,
}

/// What a node does with a request for a shard that it does not lead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Routing {
    /// Fails with [`Failure::Elsewhere`], naming the leader.
    #[default]
    Redirect,
    /// Fetches the answer.
    Proxy,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetOutcome {
    pub record: Option<Record>,
    /// Only of a stale read.
    pub staleness: Option<Staleness>,
}

/// How old a replica's state may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Staleness {
    /// Its leader has not been heard of since the start.
    Unknown,
    /// It was up to date this long ago.
    AtMost { age_ms: u64 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetManyRequest {
    pub keys: Vec<Bytes>,
    /// About how many bytes the answer may hold, values above all.
    pub bytes_max: usize,
    /// Leave the values out.
    pub keys_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanRequest {
    pub range: ScanRange,
    pub reverse: bool,
    /// At most this many items, at least one.
    pub limit: usize,
    /// Leave the values out.
    pub keys_only: bool,
}

/// A half-open range of keys, start included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanRange {
    pub start: Bytes,
    pub end: Option<Bytes>,
}

impl From<ScanRange> for KeyRange {
    fn from(range: ScanRange) -> KeyRange {
        KeyRange {
            start: range.start,
            end: range.end,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergedPage {
    pub items: Vec<Item>,
    /// There may be more in the range, after (or, in reverse, before) the last item.
    pub more: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    pub key: Bytes,
    /// With an empty value where only keys were asked for.
    pub record: Record,
}

/// Why there is no answer. Only [`Failure::Unknown`] leaves open whether a write happened; after
/// every other it certainly did not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// Ask there: the leader, or a node that knows it. `address` is what a client is sent to.
    #[error("shard {shard:#} is led by {address}")]
    Elsewhere { shard: GroupId, address: Address },
    /// A limit is reached; try again after a while.
    #[error("overloaded: {limit}")]
    Overloaded { limit: String, retry_after_ms: u64 },
    /// Nothing was done, and nobody could do it in time: no quorum, no leader, a move under way.
    #[error("unavailable: {reason}")]
    Unavailable { reason: String, retry_after_ms: u64 },
    /// The answer is not known: it may have happened, or may yet happen.
    #[error("unknown outcome: {reason}")]
    Unknown { reason: String },
    /// The request can't be done as it is, whoever is asked.
    #[error("invalid request: {reason}")]
    Invalid { reason: String },
    /// The request is larger than a limit allows.
    #[error("too large: {limit}")]
    TooLarge { limit: String },
}

impl Failure {
    /// Returns the failure of a request for whose answer there is no room.
    pub fn no_room(answers: &Budget) -> Self {
        let limit = format!(
            "answers under way have at most {} bytes together",
            answers.bytes_max()
        );
        Failure::Overloaded {
            limit,
            retry_after_ms: 1000,
        }
    }

    /// Refuses a write whose gets would return more than can be told, or can be remembered with an
    /// idempotency key: however often it is sent, it never fits.
    ///
    /// # Errors
    ///
    /// [`Failure::TooLarge`], with the limit.
    pub fn of_gets(weight: GetsWeight) -> Result<(), Self> {
        if weight.bytes > ANSWER_BYTES_MAX {
            return Err(Self::of_answer(weight.bytes as u64));
        }
        if weight.remembered_bytes_max as u64 > REQUESTS_BYTES_MAX {
            return Err(Failure::TooLarge {
                limit: format!(
                    "the gets of a batch with an Idempotency-Key return at most \
                     {REQUESTS_BYTES_MAX} bytes per slot, because its answer is remembered, these \
                     {}: send them without the key, or in a batch of their own",
                    weight.remembered_bytes_max
                ),
            });
        }
        Ok(())
    }

    /// Returns the failure of a write whose gets would return so many bytes, and of which nothing
    /// was done.
    pub fn of_answer(bytes: u64) -> Self {
        if bytes > ANSWER_BYTES_MAX as u64 {
            let limit = format!(
                "the gets of a batch return at most {ANSWER_BYTES_MAX} bytes per shard, these \
                {bytes}"
            );
            return Failure::TooLarge { limit };
        }
        Failure::Overloaded {
            limit: "what the gets of batches return at once".into(),
            retry_after_ms: 1000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_can_never_be_remembered_is_too_large() {
        let weigh = |bytes, remembered_bytes_max| match Failure::of_gets(GetsWeight {
            bytes,
            remembered_bytes_max,
        }) {
            Ok(()) => "fits".to_owned(),
            Err(Failure::TooLarge { limit }) => limit,
            Err(other) => panic!("{other}"),
        };
        let mib = 1 << 20;
        assert_eq!(
            (weigh(16 * mib, 0), weigh(3 * mib, mib)),
            ("fits".into(), "fits".into())
        );
        assert!(weigh(16 * mib + 1, 0).contains("16777216 bytes per shard"));
        assert!(weigh(3 * mib, mib + 1).contains("1048576 bytes per slot"));
    }
}
