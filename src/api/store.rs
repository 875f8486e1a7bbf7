//! The one seam of the HTTP side: [`Store`], with two implementations, the local node (router, then
//! group) and the remote cluster (client).
//!
//! Dialects are written once against it. A store answers a write in one of three ways: applied,
//! rejected (certainly nothing happened) or unknown. Every [`Failure`] says which.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;

pub use super::failure::Failure;
use super::protocol::ClusterStatus;
use super::shard_map::ShardMap;
pub use super::values::{
    Consistency, GetManyRequest, GetOutcome, Item, MergedPage, Options, Routing, ScanRange,
    ScanRequest, Staleness, WriteFailure, Written,
};
use super::view_change::{ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::budget::{ANSWERS_BYTES_MAX, Budget};
use crate::sm::kv::{Operation, Record};
use crate::types::{Address, GroupId, NodeId, PlanEpoch};

/// A linearizable key-value store, spread over shards.
pub trait Store: Send + Sync + 'static {
    /// Returns the value of `key`. Missing is `GetOutcome { record: None, .. }`.
    fn get(&self, key: Bytes, options: Options) -> BoxFuture<'_, Result<GetOutcome, Failure>>;

    /// Returns the records of the first of `request.keys`, in their order: as many as fit, and one
    /// at least. None: there is no such key. Each key is read on its own; a shard is asked once for
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

    /// Returns the keys of `request.range` in key order over all shards, a page of them.
    fn scan(
        &self,
        request: ScanRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<MergedPage, Failure>>;

    /// Returns the number of keys of every shard.
    fn count(&self, options: Options) -> BoxFuture<'_, Result<Vec<(GroupId, u64)>, Failure>>;

    /// Returns the number of keys of one shard, also while others can't be counted.
    fn count_shard(&self, shard: GroupId, options: Options) -> BoxFuture<'_, Result<u64, Failure>>;

    /// Returns what the answers under way are charged to: values that were read, and what is made
    /// of them.
    fn answers(&self) -> Arc<Budget> {
        Budget::new(ANSWERS_BYTES_MAX)
    }

    /// Returns the node that answers here; None for a client's store, or a node that belongs to no
    /// cluster.
    fn this_node(&self) -> Option<NodeId>;

    /// Returns the name in the view of the node to ask about a shard: its home, or, while that does
    /// not answer, its leader.
    fn contact(&self, shard: GroupId) -> BoxFuture<'_, Option<Address>>;

    /// Returns the cluster by way of the network, where this node can't tell how a change to a view
    /// of these nodes ends: a spare is no member yet, and one that they leave out hears no end of
    /// it.
    fn by_network(&self, nodes: &[Address]) -> Option<Arc<dyn Store>>;

    /// Returns which shard owns each slot and where its replicas are, as this store knows it now: a
    /// look at a value at hand, except that one who knows no map yet waits for it. It may be a
    /// moment old; the shards know better.
    fn map(&self, options: Options) -> BoxFuture<'_, Result<Arc<ShardMap>, Failure>>;

    /// Returns the view, and the state of its groups.
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

    /// Returns what such a change would take, and does nothing.
    fn plan_view(
        &self,
        change: ViewChange,
        options: Options,
    ) -> BoxFuture<'_, Result<PlannedChange, ViewChangeFailure>>;

    /// Returns the progress of the change that was accepted as this plan; None if there was no such
    /// plan.
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
