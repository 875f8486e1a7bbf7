//! A node: it comes to belong to a cluster, makes its groups match the view, and answers for the
//! shards that it leads.
//!
//! [`Node::open`] locks the data directory, so that the node can say who it is. [`Node::run`] then
//! joins (`join`, decided by `bootstrap`), opens log, maps and replicas (`running_node`), and
//! starts the controllers (`controllers`), which make what runs match the view until the node is
//! told to stop. `context` is what they share; `local_shards` answers for local shards and asks
//! other nodes for the rest; `operator` carries out changes of the view; `platform` is the seam to
//! disk and database.
//!
//! A node is a [`Store`] from the start: until it belongs to a cluster it answers that nothing was
//! done, and why.

pub mod bootstrap;
mod context;
mod controllers;
mod error;
mod failure_reports;
mod full_disks;
mod group_metrics;
mod introduction;
mod join;
mod leftovers;
mod local_reads;
pub mod local_shards;
mod locator;
mod map_directory;
mod metrics;
mod move_counters;
mod move_destination;
mod operator;
mod pause;
mod plan_proposal;
pub mod platform;
mod quorum;
mod replica_failures;
mod running_node;
#[cfg(test)]
mod testing;
mod unreadable;
mod views;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use crate::api::peer::{
    Announcement, DiskReport, FailureReport, Greeting, GreetingReply, HoldRequest, Hosting,
    Identity, PromiseReply, PromiseRequest,
};
use crate::api::protocol::{ClusterStatus, Hop, ScrubStatus, ShardReply, ShardRequest};
use crate::api::shard_map::ShardMap;
use crate::api::store::{
    Failure, GetManyRequest, GetOutcome, MergedPage, Options, ScanRequest, Store, WriteFailure,
    Written,
};
use crate::api::view_change::{ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::blocking;
use crate::budget::{ANSWERS_BYTES_MAX, Budget};
use crate::client::remote::RemoteStore;
use crate::config::NodeConfig;
use crate::metrics::{Collector, DescriptorEncoder, EncodeFamilies};
use crate::raft::transport::lanes::DirectoryRejection;
use crate::sm::cluster::meta;
use crate::sm::cluster::view::View;
use crate::sm::kv::{Operation, Record};
use crate::sm::recovery::restart_pause_ms;
use crate::supervisor::Supervisor;
use crate::telemetry::rarely;
use crate::types::{Address, GroupId, NodeId, PlanEpoch};

pub use bootstrap::NoStart;
use bootstrap::WaitReason;
#[cfg(any(test, feature = "testing"))]
use controllers::membership::MembershipController;
use controllers::reconciler::ReadinessGap;
pub use error::{NodeError, StartError};
pub use join::JoinError;
use join::Joining;
use platform::{Platform, RealPlatform};
use running_node::RunningNode;

/// Time after which a client should ask a node again that is not part of a cluster yet.
const RETRY_AFTER_MS: u64 = 1000;

/// Sentences in what is said of a node that is ready.
const NOTES_MAX: usize = 5;

/// Time that leaderships may take to be handed over before the process starts again.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);

/// A node, from its start to its stop.
pub struct Node {
    joining: Arc<Joining>,
    running: OnceLock<RunningNode>,
    is_stopping: AtomicBool,
    /// Budget of the answers under way.
    answers: Arc<Budget>,
}

/// A reason why a node should not be given requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unready {
    /// Stable, for scripts: `starting`, `no-cluster`, `spare`, `catching-up`, `replica-failed` or
    /// `stopping`.
    pub code: &'static str,
    pub reason: String,
}

impl Node {
    /// Opens and locks the data directory.
    ///
    /// # Errors
    ///
    /// When the configuration makes no sense, or the directory can't be used.
    pub fn open(config: NodeConfig) -> Result<Arc<Self>, NodeError> {
        Self::open_on(Arc::new(RealPlatform), config)
    }

    /// As [`Node::open`], on any machine.
    ///
    /// # Errors
    ///
    /// When the configuration makes no sense, or the directory can't be used.
    pub fn open_on(
        platform: Arc<dyn Platform>,
        config: NodeConfig,
    ) -> Result<Arc<Self>, NodeError> {
        config.check()?;
        let directory = platform.open_directory(&config.data_dir)?;
        let caller = platform.peer_caller().map_err(NodeError::Client)?;
        let joining = Arc::new(Joining::new(config, platform, directory, caller));
        let answers = Budget::new(ANSWERS_BYTES_MAX);
        Ok(Arc::new(Self {
            joining,
            running: OnceLock::new(),
            is_stopping: AtomicBool::new(false),
            answers,
        }))
    }

    /// Joins, serves, and returns after `shutdown`, with everything closed.
    ///
    /// # Errors
    ///
    /// Why the node can't go on: it must stop, and says so.
    pub async fn run(&self, shutdown: &CancellationToken) -> Result<(), NodeError> {
        // First of all: what a retirement has left must not be opened again.
        let finishing = Arc::clone(&self.joining);
        match blocking::start(move || running_node::finish_retirement(&finishing)).await {
            Ok(Ok(true)) => return Err(NodeError::Retired),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(
                "what this node had before it was retired is not forgotten yet: {error}"
            ),
            Err(error) => tracing::warn!(
                "forgetting what this node had before it was retired was broken off: {error}"
            ),
        }

        let Some(joined) = self.joining.join(shutdown).await? else {
            return Ok(());
        };

        // Before anything is opened: by what the members answer this may be an old copy.
        let found = match self.joining.introduce(&joined).await {
            Ok(found) => found,
            Err(NodeError::NoStart(NoStart::Outdated { by, number })) => {
                return Err(self
                    .outdated(format!(
                        "{by} knows of start {number} of it, which is not in it"
                    ))
                    .await);
            }
            Err(error) => return Err(error),
        };
        let running = match RunningNode::start(
            &self.joining,
            joined,
            &found,
            Arc::clone(&self.answers),
        )
        .await
        {
            Ok(running) => running,
            Err(error) => {
                let is_condemned = map_directory::are_maps_condemned(self.joining.directory_path());
                let error = if is_condemned {
                    NodeError::MapsDamaged
                } else {
                    error.into()
                };

                // A process that fails at every start must not start again and again without a
                // pause.
                let is_rested = !error.may_come_back() || self.rested(shutdown).await;
                return if is_rested { Err(error) } else { Ok(()) };
            }
        };

        // Made before the node is published, so that no end goes unseen.
        let failed = running.log_failure();
        let condemned = running.condemned();
        let given_up = running.given_up();
        let retired = running.retired();
        let too_old = running.too_old();
        let rejection = self.joining.rejection();
        let running = self.running.get_or_init(|| running);

        let result = tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            reason = failed => Err(NodeError::LogFailed(reason)),
            () = condemned.cancelled() => Err(NodeError::MapsDamaged),
            reason = given_up => Err(NodeError::MapsFailed(reason)),
            () = retired.cancelled() => Err(NodeError::Retired),
            too_old = too_old => Err(too_old.into()),
            rejection = rejection => Err(match rejection {
                DirectoryRejection::Outdated { by, number } => {
                    let reason = format!("{by} knows of start {number} of it, which is not in it");
                    self.outdated(reason).await
                }
                DirectoryRejection::Doubled { by } => NodeError::Doubled { by },
            }),
        };

        let result = match result {
            Err(error) if error.may_come_back() => {
                self.prepare_restart(running, error, shutdown).await
            }
            result => result,
        };

        if let Err(NodeError::Retired) = result {
            tokio::select! {
                retired = running.retire(&self.joining) => retired?,
                never = running.give_up_room_at(shutdown) => match never {},
            }
        }

        // Everything is written down only at a stop that was asked for: after a failure the disk
        // may hang.
        running.stop(result.is_ok()).await;
        result
    }

    /// Hands over what this node leads, and waits until the process may start again: what still
    /// runs here runs on until then. Returns why the node stops, if it was not told to meanwhile.
    async fn prepare_restart(
        &self,
        running: &RunningNode,
        error: NodeError,
        shutdown: &CancellationToken,
    ) -> Result<(), NodeError> {
        tracing::error!("{error}; the process starts again by itself");
        running.registry().hand_over(HAND_OVER_TIMEOUT).await;
        tokio::select! {
            biased;
            reason = running.log_failure() => return Err(NodeError::LogFailed(reason)),
            is_rested = self.rested(shutdown) => if !is_rested { return Ok(()) },
        }
        tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            reason = running.log_failure() => Err(NodeError::LogFailed(reason)),
            () = running.room_for_restart() => {
                // It may have been elected again meanwhile.
                running.registry().hand_over(HAND_OVER_TIMEOUT).await;
                Err(error)
            }
        }
    }

    /// Waits as long as this process should before it starts again. Returns false if `shutdown`
    /// came first.
    async fn rested(&self, shutdown: &CancellationToken) -> bool {
        let restarts = self.joining.config().restarts;
        let pause = Duration::from_millis(restart_pause_ms(restarts));
        if !pause.is_zero() {
            tracing::warn!(
                "this process has started again by itself {restarts} times in a row: the next \
                start is in {pause:?}"
            );
        }
        pause::waited(shutdown, pause).await
    }

    /// Marks the directory as an old copy, durably. Returns why the node stops.
    async fn outdated(&self, reason: String) -> NodeError {
        let (joining, why) = (Arc::clone(&self.joining), reason.clone());
        match blocking::start(move || joining.mark_outdated(&why)).await {
            Ok(Ok(())) => NodeError::Outdated { reason },
            Ok(Err(error)) => error.into(),
            Err(error) => NodeError::LogFailed(error.to_string()),
        }
    }

    /// Hears a member of this cluster, or of another.
    pub async fn greeted(&self, greeting: Greeting) -> GreetingReply {
        let views = self.running.get().map(|running| running.context().views());
        let is_news =
            views.is_some_and(|views| views.leads_elsewhere(greeting.directory, &greeting.address));
        let reply = self
            .joining
            .greeted(&greeting, views.is_some(), is_news)
            .await;

        // Only what was confirmed: anybody can send a greeting.
        if let (GreetingReply::Welcome(_), Some(views)) = (&reply, views) {
            views.found_at(greeting.directory, &greeting.address);
        }
        reply
    }

    /// Returns the supervisor, which is told when a part of this node panics or hangs.
    pub fn supervisor(&self) -> &Supervisor {
        self.joining.supervisor()
    }

    /// Hands every leadership over to another replica, as far as there is one within the time: the
    /// first step of a clean stop, while requests are still answered.
    pub async fn hand_over(&self, timeout: Duration) {
        // Said first, so that no other node hands a shard over to this one meanwhile.
        self.is_stopping.store(true, Ordering::Relaxed);
        if let Some(running) = self.running.get() {
            running.registry().hand_over(timeout).await;
        }
    }

    /// # Errors
    ///
    /// Why this node should not be given requests.
    pub fn ready(&self) -> Result<(), Unready> {
        let unready = |code, reason| Err(Unready { code, reason });
        if self.is_stopping.load(Ordering::Relaxed) {
            return unready("stopping", "this node is stopping".to_owned());
        }
        match self.running.get() {
            None => unready(self.waiting_code(), self.waiting_reason()),
            Some(running) => match running.unready() {
                None => Ok(()),
                Some(ReadinessGap::Failed(reason)) => unready("replica-failed", reason),
                Some(ReadinessGap::Late(reason)) => unready("catching-up", reason),
            },
        }
    }

    /// Returns what is to be said of a node that is ready: why it takes no writes, if it takes
    /// none, and which shards with a replica here take none. They are read, so the node is to be
    /// given requests.
    pub fn note(&self) -> Option<String> {
        let room = self.running.get().and_then(|running| running.lacks_room());
        let room = room.map(|reason| format!("it takes no writes: {reason}"));
        let notes: Vec<String> = room
            .into_iter()
            .chain(self.warnings())
            .take(NOTES_MAX)
            .collect();
        (!notes.is_empty()).then(|| notes.join("; "))
    }

    /// Returns which shards with a replica here take no writes, and why.
    pub fn warnings(&self) -> Vec<String> {
        let groups = self
            .running
            .get()
            .map(|running| running.registry().groups())
            .unwrap_or_default();
        let warning = |group: &Arc<crate::raft::Replica>| {
            Some(format!(
                "shard {} is read-only: {}",
                group.key().group.0,
                group.alarm()?
            ))
        };
        groups.iter().filter_map(warning).collect()
    }

    fn waiting_code(&self) -> &'static str {
        self.joining
            .waiting()
            .map_or("starting", |waiting| waiting.code())
    }

    fn waiting_reason(&self) -> String {
        self.joining.waiting().map_or_else(
            || "this node is starting".to_owned(),
            |waiting| waiting.to_string(),
        )
    }

    /// Returns who this node is.
    pub fn identity(&self) -> Identity {
        self.joining.identity()
    }

    /// Answers a founder.
    pub async fn promise(&self, request: PromiseRequest) -> PromiseReply {
        let joining = Arc::clone(&self.joining);
        let promised = blocking::start(move || joining.promise(&request)).await;
        promised.unwrap_or_else(|error| PromiseReply::Refused {
            reason: error.to_string(),
        })
    }

    /// Is told whom to ask: a node that waits what cluster there is, a member that may have missed
    /// something how it stands.
    pub fn invited(&self, members: Vec<Address>) {
        match self.running.get() {
            Some(running) => running.called_by(members),
            None => self.joining.invited(members),
        }
    }

    /// Returns what this node says of its own replicas.
    pub async fn hosting(&self) -> Hosting {
        match self.running.get() {
            Some(running) => {
                let hosting = running
                    .context()
                    .hosting(running.lacks_room().is_some())
                    .await;
                Hosting {
                    is_stopping: self.is_stopping.load(Ordering::Relaxed),
                    ..hosting
                }
            }
            None => self.joining.hosting(Vec::new(), Vec::new(), false),
        }
    }

    /// Holds the level of its cluster where it is, or does so no more.
    ///
    /// # Errors
    ///
    /// When this node is none of that cluster, or can't write it down.
    pub async fn hold_level(&self, request: HoldRequest) -> Result<(), Failure> {
        let Some(running) = self.running.get() else {
            return Err(self.unavailable());
        };
        running.context().ensure_ours(request.cluster)?;
        let (joining, HoldRequest { cluster, hold }) = (Arc::clone(&self.joining), request);
        let written = blocking::start(move || joining.hold_level(cluster, hold)).await;
        let failed = |reason: String| Failure::Unknown { reason };
        written
            .map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(error.to_string()))
    }

    /// Hears how full the disk of another node is.
    ///
    /// # Errors
    ///
    /// When that node is none of this cluster, as far as is known here.
    pub fn disk_reported(&self, report: DiskReport) -> Result<(), Failure> {
        let Some(running) = self.running.get() else {
            return Err(self.unavailable());
        };
        let context = running.context();
        context.ensure_ours(report.cluster)?;
        match context
            .full_disks
            .take(&context.view(), report.directory, report.level)
        {
            true => Ok(()),
            false => Err(Failure::Invalid {
                reason: "the view has no node with that directory".to_owned(),
            }),
        }
    }

    /// Returns how the last scrub of this node gets on.
    ///
    /// # Errors
    ///
    /// When this node belongs to no cluster.
    pub fn scrub_status(&self) -> Result<ScrubStatus, Failure> {
        let running = self.running.get().ok_or_else(|| self.unavailable())?;
        Ok(running.scrubs().status())
    }

    /// Has a scrub of this node begin at once, unless one runs. Returns how that gets on.
    ///
    /// # Errors
    ///
    /// When this node belongs to no cluster.
    pub fn begin_scrub(&self) -> Result<ScrubStatus, Failure> {
        let running = self.running.get().ok_or_else(|| self.unavailable())?;
        Ok(running.scrubs().begin_now())
    }

    /// Hears that replicas have failed on another node.
    ///
    /// # Errors
    ///
    /// When that node is none of this cluster, as far as is known here.
    pub fn failures_reported(&self, report: FailureReport) -> Result<(), Failure> {
        let Some(running) = self.running.get() else {
            return Err(self.unavailable());
        };
        let context = running.context();
        context.ensure_ours(report.cluster)?;
        match context.reports.take(&context.view(), report.directory) {
            true => Ok(()),
            false => Err(Failure::Invalid {
                reason: "the view has no node with that directory".to_owned(),
            }),
        }
    }

    /// Has the meta group, if this node leads it, apply the announcement of another node.
    pub async fn announce(&self, announcement: Announcement) -> Result<meta::MetaOutcome, Failure> {
        match self.running.get() {
            Some(running) => running.announce(announcement).await,
            None => Err(self.unavailable()),
        }
    }

    /// Reads the view as it is now, if this node leads the meta group.
    pub async fn view(&self) -> Result<View, Failure> {
        match self.running.get() {
            Some(running) => running.view().await,
            None => Err(self.unavailable()),
        }
    }

    /// Answers for a shard that this node should lead, or has the request answered.
    pub async fn answer(&self, request: ShardRequest, hop: Hop) -> ShardReply {
        match self.running.get() {
            Some(running) => running.router().access().answer(request, hop).await,
            None => ShardReply::Failed(self.unavailable()),
        }
    }

    /// Returns its replicas, for the lanes of peers; None while it has none.
    pub fn registry(&self) -> Option<Arc<crate::raft::Registry>> {
        self.running
            .get()
            .map(|running| Arc::clone(running.registry()))
    }

    fn unavailable(&self) -> Failure {
        Failure::Unavailable {
            reason: self.waiting_reason(),
            retry_after_ms: RETRY_AFTER_MS,
        }
    }
}

#[cfg(any(test, feature = "testing"))]
impl Node {
    /// Adds a replica to a group that this node leads, as if `view` were the newest that it knows.
    pub async fn add_by(
        &self,
        view: &View,
        group: GroupId,
        replica: crate::types::ReplicaId,
    ) -> Result<(), String> {
        self.membership()?.add(view, group, replica).await
    }

    /// Reports the members of a group that this node leads, or takes itself to lead.
    pub async fn report(&self, view: &View, group: GroupId) -> Result<(), String> {
        self.membership()?.report(view, group).await
    }

    fn membership(&self) -> Result<MembershipController, String> {
        let context = self
            .running
            .get()
            .ok_or("it belongs to no cluster")?
            .context()
            .clone();
        Ok(MembershipController::new(
            context,
            self.joining.platform().clone(),
        ))
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

impl Collector for Node {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        encoder.gauge(
            "quorate_ready",
            "1 where /readyz is 200.",
            u64::from(self.ready().is_ok()),
        )?;
        match self.running.get() {
            Some(running) => running.encode_metrics(&mut encoder),
            None => Ok(()),
        }
    }
}

impl Store for Node {
    fn answers(&self) -> Arc<Budget> {
        Arc::clone(&self.answers)
    }

    fn get(&self, key: Bytes, options: Options) -> BoxFuture<'_, Result<GetOutcome, Failure>> {
        match self.running.get() {
            Some(running) => running.router().get(key, options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn get_many(
        &self,
        request: GetManyRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<Vec<Option<Record>>, Failure>> {
        match self.running.get() {
            Some(running) => running.router().get_many(request, options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn write(
        &self,
        operations: Vec<Operation>,
        idempotency_key: Option<Bytes>,
        options: Options,
    ) -> BoxFuture<'_, Vec<Written>> {
        match self.running.get() {
            Some(running) => running.router().write(operations, idempotency_key, options),
            None => Box::pin(async move {
                vec![Err(WriteFailure::Failed(self.unavailable())); operations.len()]
            }),
        }
    }

    fn locate(&self, key: Bytes, options: Options) -> BoxFuture<'_, Result<(), Failure>> {
        match self.running.get() {
            Some(running) => running.router().locate(key, options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn scan(
        &self,
        request: ScanRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<MergedPage, Failure>> {
        match self.running.get() {
            Some(running) => running.router().scan(request, options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn count(&self, options: Options) -> BoxFuture<'_, Result<Vec<(GroupId, u64)>, Failure>> {
        match self.running.get() {
            Some(running) => running.router().count(options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn count_shard(&self, shard: GroupId, options: Options) -> BoxFuture<'_, Result<u64, Failure>> {
        match self.running.get() {
            Some(running) => running.router().count_shard(shard, options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn map(&self, options: Options) -> BoxFuture<'_, Result<Arc<ShardMap>, Failure>> {
        match self.running.get() {
            Some(running) => running.router().map(options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn this_node(&self) -> Option<NodeId> {
        self.running
            .get()
            .and_then(|running| running.router().this_node())
    }

    fn contact(&self, shard: GroupId) -> BoxFuture<'_, Option<Address>> {
        match self.running.get() {
            Some(running) => running.router().contact(shard),
            None => Box::pin(async { None }),
        }
    }

    fn by_network(&self, nodes: &[Address]) -> Option<Arc<dyn Store>> {
        let own = &self.joining.config().address;
        let known = match self.running.get() {
            // It stays a member, and hears itself how the change ends.
            Some(_) if nodes.contains(own) => return None,
            Some(running) => running
                .context()
                .view()
                .nodes
                .values()
                .map(|node| node.address.clone())
                .collect(),
            None => self
                .joining
                .waiting()
                .filter(WaitReason::is_spare)?
                .members()
                .to_vec(),
        };
        let seeds = nodes
            .iter()
            .chain(&known)
            .filter(|address| *address != own)
            .cloned()
            .collect();
        match RemoteStore::connect(seeds) {
            Ok(cluster) => Some(Arc::new(cluster)),
            Err(error) => {
                rarely!(warn, "the cluster can't be asked over the network: {error}");
                None
            }
        }
    }

    fn status(&self) -> BoxFuture<'_, Result<ClusterStatus, Failure>> {
        match self.running.get() {
            Some(running) => running.router().status(),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn transfer_leader(
        &self,
        shard: GroupId,
        to: Option<Address>,
        options: Options,
    ) -> BoxFuture<'_, Result<Address, Failure>> {
        match self.running.get() {
            Some(running) => running.router().transfer_leader(shard, to, options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn change_view(
        &self,
        change: ViewChange,
        only_if: Option<PlanEpoch>,
        options: Options,
    ) -> BoxFuture<'_, Result<ChangeInProgress, ViewChangeFailure>> {
        match self.running.get() {
            Some(running) => running.router().change_view(change, only_if, options),
            None => Box::pin(async { Err(ViewChangeFailure::Failed(self.unavailable())) }),
        }
    }

    fn plan_view(
        &self,
        change: ViewChange,
        options: Options,
    ) -> BoxFuture<'_, Result<PlannedChange, ViewChangeFailure>> {
        match self.running.get() {
            Some(running) => running.router().plan_view(change, options),
            None => Box::pin(async { Err(ViewChangeFailure::Failed(self.unavailable())) }),
        }
    }

    fn operation(
        &self,
        id: PlanEpoch,
        options: Options,
    ) -> BoxFuture<'_, Result<Option<ChangeInProgress>, Failure>> {
        match self.running.get() {
            Some(running) => running.router().operation(id, options),
            None => Box::pin(async { Err(self.unavailable()) }),
        }
    }

    fn await_change(&self, id: PlanEpoch, at_most: Duration) -> BoxFuture<'_, Option<bool>> {
        match self.running.get() {
            Some(running) => running.router().await_change(id, at_most),
            None => Box::pin(async move {
                tokio::time::sleep(at_most).await;
                None
            }),
        }
    }
}
