//! [`PeerService`] answers what other nodes ask of this one.

use std::io;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

use crate::api::peer::{
    Announcement, DiskReport, FailureReport, Greeting, GreetingReply, HoldRequest, Hosting,
    Identity, PromiseReply, PromiseRequest,
};
use crate::api::protocol::{Hop, ScrubStatus, ShardReply, ShardRequest};
use crate::api::store::Failure;
use crate::sm::cluster::meta;
use crate::sm::cluster::view::View;
use crate::types::Address;

/// Answers what other nodes ask of this one.
pub trait PeerService: Send + Sync + 'static {
    /// Serves a lane until the stream it returns ends. `incoming` ends, or fails, when the other
    /// side goes away.
    fn lane(
        &self,
        lane: &str,
        incoming: BoxStream<'static, io::Result<Bytes>>,
    ) -> BoxStream<'static, Bytes>;

    /// Answers for a shard of which this node has a replica, or passes the request on.
    fn shard(&self, request: ShardRequest, hop: Hop) -> BoxFuture<'_, ShardReply>;

    /// Returns who this node is.
    fn identity(&self) -> Identity;

    /// Asks for a durable promise to a founder.
    fn promise(&self, request: PromiseRequest) -> BoxFuture<'_, PromiseReply>;

    /// Returns the replicas that this node hosts, and how they are.
    fn hosting(&self) -> BoxFuture<'_, Hosting>;

    /// Returns the view as it is now, if this node leads the meta group.
    fn view(&self) -> BoxFuture<'_, Result<View, Failure>>;

    /// Hands a waiting node the addresses of members whose view names it.
    fn invite(&self, members: Vec<Address>);

    /// Has this node hold the level of its cluster, or do so no more. Durable when it is answered.
    fn hold_level(&self, request: HoldRequest) -> BoxFuture<'_, Result<(), Failure>>;

    /// Tells how the last scrub of this node gets on.
    fn scrub_status(&self) -> Result<ScrubStatus, Failure>;

    /// Has a scrub of this node begin at once, unless one runs. Tells how that gets on.
    fn begin_scrub(&self) -> Result<ScrubStatus, Failure>;

    /// Hears a member of this cluster, or of another.
    fn greeted(&self, greeting: Greeting) -> BoxFuture<'_, GreetingReply>;

    /// Hears that replicas have failed on another node.
    fn failures_reported(&self, report: FailureReport) -> Result<(), Failure>;

    /// Hears how full the disk of another node is.
    fn disk_reported(&self, report: DiskReport) -> Result<(), Failure>;

    /// Has the meta group, if this node leads it, apply what another node has to tell.
    fn announce(
        &self,
        announcement: Announcement,
    ) -> BoxFuture<'_, Result<meta::MetaOutcome, Failure>>;
}
