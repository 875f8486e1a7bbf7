//! [`RunningNode`]: everything of a node that belongs to a cluster, brought up in order and closed
//! in the reverse one.
//!
//! The order matters. The log opens first, and must not be new where the stamp says that this node
//! was a member: a replica whose log was lost has forgotten its votes. The meta replica is marked
//! in the log before the stamp calls the node a member.

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::context::{NodeContext, read_view_now};
use super::controllers::agreement::Agreement;
use super::controllers::disk_watch::{DiskHandOver, DiskWatch};
use super::controllers::failure_reporter::FailureReporter;
use super::controllers::leader_placement::LeaderPlacement;
use super::controllers::levels::{Levels, outgrown};
use super::controllers::log_compactor::LogCompactor;
use super::controllers::map_compactor::MapCompactor;
use super::controllers::membership::MembershipController;
use super::controllers::node_replacement::NodeReplacement;
use super::controllers::reachability_probe::ReachabilityProbe;
use super::controllers::reconciler::{ReadinessGap, Reconciler};
use super::controllers::scrub::{Scrubber, Scrubs};
use super::controllers::slot_moves::SlotMoveController;
use super::controllers::view_refresh::StaleViewRefresh;
use super::controllers::watchdog::{Findings, Watchdog};
use super::error::StartError;
use super::introduction::Greeter;
use super::join::{Joined, Joining};
use super::leftovers;
use super::local_shards::LocalShards;
use super::map_directory::{MAPS_DIR, are_maps_condemned};
use super::metrics;
use super::views::Views;
use crate::api::peer::Announcement;
use crate::api::store::Failure;
use crate::blocking;
use crate::budget::Budget;
use crate::config::NodeConfig;
use crate::metrics::DescriptorEncoder;
use crate::raft::Replica;
use crate::raft::transport::NodeIdentity;
use crate::raft::{LeaseReads, RaftTimings};
use crate::raft::{RaftBudgets, Registry, RegistryParts};
use crate::rare::{self, RareBranch};
use crate::routing::router::Router;
use crate::sm::cluster::meta;
use crate::sm::cluster::view::View;
use crate::sm::level::TooOld;
use crate::sm::log_space::segment_bytes;
use crate::storage::ReplicaKey;
use crate::storage::directory::{DirectoryError, Stamp};
use crate::storage::log::{Expect, Log, LogOptions};
use crate::storage::map::{MapOptions, MapStore};
use crate::storage::sled_tree::SledOptions;
use crate::supervisor::Supervisor;
use crate::telemetry::rarely;
use crate::types::{Address, ClusterId, DirectoryId, GroupId};

/// Between two attempts to open the replica of the meta group while there is no descriptor for it.
const OPEN_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Time that the meta group has to apply the announcement of a node.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(3);
/// Time that the meta group has to confirm that a view is the newest.
const VIEW_TIMEOUT: Duration = Duration::from_secs(1);
/// Time after which to try a meta leader again that was none.
const RETRY_AFTER_MS: u64 = 500;

/// A process that starts again on a full disk meets the same again.
const RESTART_ROOM_BYTES: u64 = 16 << 20;
/// Between two looks at whether there is room.
const ROOM_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// A node of a cluster, with its groups.
pub struct RunningNode {
    router: Router<LocalShards>,
    context: Arc<NodeContext>,
    reconciler: Arc<Reconciler>,
    view_refresh: Arc<StaleViewRefresh>,
    findings: Arc<Findings>,
    scrubs: Arc<Scrubs>,
    storage: NodeStorage,
    stop: CancellationToken,
    tasks: Mutex<JoinSet<()>>,
    speaks: u16,
}

/// Log and maps, with the threads that write them; tasks in a simulation.
struct NodeStorage {
    log: Log,
    states: Arc<MapStore>,
    threads: parking_lot::Mutex<Vec<JoinHandle<()>>>,
    tasks: parking_lot::Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

impl RunningNode {
    /// Opens everything and starts the controllers. `found`: where members were found to run, which
    /// the view may not say yet. Answers are charged to `answers`.
    pub async fn start(
        joining: &Arc<Joining>,
        joined: Joined,
        found: &[(DirectoryId, Address)],
        answers: Arc<Budget>,
    ) -> Result<Self, StartError> {
        let opening = Arc::clone(joining);
        let cluster = joined.view.cluster;
        let opened = blocking::start(move || NodeStorage::open(&opening, cluster)).await;
        let storage = opened.map_err(|error| StartError::BrokenOff(error.to_string()))??;

        // The meta replica is in the log before the stamp calls this node a member.
        let context = Self::open_context(joining, &joined, found, answers, &storage)?;
        Self::join_meta(joining, &context).await?;
        tracing::info!(
            "this is node {} of cluster {}",
            context.node,
            context.cluster
        );

        let reconciler = Arc::new(Reconciler::new(
            context.clone(),
            joining.clone(),
            joined.view,
        ));
        let stop = CancellationToken::new();
        let view_refresh = Arc::new(StaleViewRefresh::new(context.clone()));

        let mut tasks = ControllerTasks {
            supervisor: joining.supervisor().clone(),
            stop: stop.clone(),
            running: JoinSet::new(),
        };
        let (reconciling, asking) = (reconciler.clone(), view_refresh.clone());
        tasks.start(
            "reconciler",
            |stop| async move { reconciling.run(&stop).await },
        );
        tasks.start("news", |stop| async move { asking.run(&stop).await });
        tasks.start_housekeeping(joining, &context, &storage);
        tasks.start_planning(joining, &context);
        let (findings, scrubs) = tasks.start_checks(joining, &context, &storage);

        let router = Router::new(LocalShards::new(context.clone()), rand::random());
        Ok(Self {
            router,
            context,
            reconciler,
            view_refresh,
            findings,
            scrubs,
            storage,
            stop,
            tasks: Mutex::new(tasks.running),
            speaks: joining.config().speaks(),
        })
    }

    /// Brings up what all parts of the node share: the views, the registry of replicas, and the
    /// callers of other nodes.
    fn open_context(
        joining: &Arc<Joining>,
        joined: &Joined,
        found: &[(DirectoryId, Address)],
        answers: Arc<Budget>,
        storage: &NodeStorage,
    ) -> Result<Arc<NodeContext>, StartError> {
        let config = joining.config();
        let identity =
            NodeIdentity::member(joining.directory_id(), joined.view.cluster, joined.node);
        let identity = Arc::new(match joining.peer_directories() {
            Some(peer_directories) => identity.with_peer_directories(peer_directories.clone()),
            None => identity,
        });

        let views = Arc::new(Views::new((*joined.view).clone()));

        // Members that have moved are called where they were met, before the view says so.
        for (directory, address) in found {
            views.found_at(*directory, address);
        }

        let registry = Registry::new(RegistryParts {
            budgets: RaftBudgets::default(),
            supervisor: joining.supervisor().clone(),
            identity,
            resolver: views.clone(),
            dial: joining.platform().dial(),
            timings: timings(config),
            log: storage.log.clone(),
            states: storage.states.clone(),
        });

        let caller = joining
            .platform()
            .shard_caller()
            .map_err(|error| StartError::Client(error.to_string()))?
            .charged_to(answers);
        let peers = joining
            .platform()
            .peer_caller()
            .map_err(|error| StartError::Client(error.to_string()))?;
        let context =
            NodeContext::new(joined.node, joining.clone(), views, registry, caller, peers)
                .ok_or(StartError::NoMetaReplica)?;
        Ok(Arc::new(context))
    }

    /// Opens the replica of the meta group, and only then calls this directory a member. One that
    /// was a member goes on without it where it can't be opened: it has its view in its stamp and
    /// hears newer ones from others, is told of as failed, and replaced.
    async fn join_meta(joining: &Arc<Joining>, context: &NodeContext) -> Result<(), StartError> {
        let view = context.view();
        let replica = view
            .runs_on(GroupId::META, context.node)
            .ok_or(StartError::NoMetaReplica)?;
        let key = ReplicaKey {
            group: GroupId::META,
            replica,
        };
        // Once stamped a member, the directory has had its meta replica: it is never begun anew.
        let may_create = !joining.is_stamped_member();
        loop {
            match context.registry.open_replica(key, may_create).await {
                Ok(_) => break,
                // Descriptors come back as others close: that is no failure of the replica.
                Err(error) if error.lacks_descriptors() => {
                    rarely!(
                        warn,
                        "the replica of the meta group is not open yet: {error}; it is tried again"
                    );
                    tokio::time::sleep(OPEN_AGAIN_AFTER).await;
                }
                // A directory that never was a member has nothing to go on with, and condemned maps
                // need another process.
                Err(error) if may_create || are_maps_condemned(joining.directory_path()) => {
                    return Err(StartError::Meta(error));
                }
                Err(error) => {
                    context.failures.failed(
                        key,
                        error.cause(),
                        format!("it cannot be opened: {error}"),
                    );
                    return Ok(());
                }
            }
        }
        joining.stamp_member(context.node, &view)?;
        Ok(())
    }

    pub fn router(&self) -> &Router<LocalShards> {
        &self.router
    }

    pub fn context(&self) -> &Arc<NodeContext> {
        &self.context
    }

    pub fn registry(&self) -> &Arc<Registry> {
        &self.context.registry
    }

    /// Returns why this node takes no writes for lack of room on its disk, if it takes none.
    pub fn lacks_room(&self) -> Option<String> {
        self.storage.log.lacks_room()
    }

    pub fn scrubs(&self) -> &Scrubs {
        &self.scrubs
    }

    pub fn unready(&self) -> Option<ReadinessGap> {
        self.findings
            .stalled()
            .map(ReadinessGap::Late)
            .or_else(|| self.reconciler.unready())
    }

    /// Writes what is counted here.
    pub fn encode_metrics(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        metrics::encode(
            encoder,
            &self.context,
            &self.storage.log,
            &self.storage.states,
            &self.findings,
            &self.scrubs.now(),
        )
    }

    /// Cancelled when a replica could not be opened because the map database is beyond mending in
    /// this process.
    pub fn condemned(&self) -> CancellationToken {
        self.reconciler.condemned().clone()
    }

    /// Resolves, with the reason, when a replica has failed because this process cannot write to
    /// the maps any more.
    pub fn given_up(&self) -> impl Future<Output = String> + use<> {
        let (given_up, states) = (
            self.reconciler.given_up().clone(),
            self.storage.states.clone(),
        );
        async move {
            given_up.cancelled().await;
            states
                .given_up()
                .unwrap_or_else(|| "it is not known why".to_owned())
        }
    }

    /// Resolves once the disk has room for what a start of the process writes.
    pub async fn room_for_restart(&self) {
        let mut is_told = false;
        while !self.storage.states.has_room(RESTART_ROOM_BYTES) {
            if !is_told {
                tracing::error!("the disk is full: the process starts again once there is room");
                is_told = true;
            }
            tokio::time::sleep(ROOM_AGAIN_AFTER).await;
        }
    }

    /// Notes that members of the cluster have called.
    pub fn called_by(&self, members: Vec<Address>) {
        self.view_refresh.called_by(members);
    }

    /// Resolves when the cluster uses more than this program knows.
    pub fn too_old(&self) -> impl Future<Output = TooOld> + use<> {
        outgrown(self.context.views().subscribe(), self.speaks)
    }

    /// Cancelled when this node turns out not to be in the view any more.
    pub fn retired(&self) -> CancellationToken {
        self.view_refresh.retired().clone()
    }

    /// Says on disk that this node is retired, and then forgets its replicas: the view has none of
    /// them.
    ///
    /// # Errors
    ///
    /// When that can't be said on disk: then nothing is forgotten.
    pub async fn retire(&self, joining: &Arc<Joining>) -> Result<(), DirectoryError> {
        let Some(view) = self.view_refresh.view_without_us() else {
            return Ok(());
        };
        // Nothing may stamp or open anything as a member from here on.
        self.end_tasks().await;
        let (stamping, node) = (Arc::clone(joining), self.context.node);
        let stamped = blocking::start(move || stamping.stamp_retired(node, &view)).await;
        match stamped {
            Ok(stamped) => stamped?,
            Err(error) => {
                tracing::error!("the stamp was not written: {error}");
                return Ok(());
            }
        }
        let mut is_cleared = true;
        for key in self.registry().stored() {
            if let Err(error) = self.registry().wipe_replica(key).await {
                tracing::warn!(
                    "retired replica {key} could not be wiped: {error}; the next start tries again"
                );
                is_cleared = false;
            }
        }
        if is_cleared {
            let (joining, cluster) = (Arc::clone(joining), self.context.cluster);
            let note = move || {
                let disk = joining.platform().disk();
                leftovers::note_cleared(&*disk, joining.directory_path(), &joining.stamp(), cluster)
            };
            // Without the note the next start looks for itself.
            drop(blocking::start(note).await);
        }
        Ok(())
    }

    /// Has the log wait for room no more once `shutdown` comes. Never resolves.
    pub async fn give_up_room_at(&self, shutdown: &CancellationToken) -> std::convert::Infallible {
        shutdown.cancelled().await;
        self.storage.log.give_up_room();
        std::future::pending().await
    }

    /// Resolves, with the reason, when the log has failed.
    pub fn log_failure(&self) -> impl Future<Output = String> + use<> {
        let mut failed = self.storage.log.failed();
        async move {
            let failure = failed
                .wait_for(Option::is_some)
                .await
                .ok()
                .and_then(|failure| failure.as_ref().map(ToString::to_string));
            match failure {
                Some(reason) => reason,
                // The log is closed: that is no failure.
                None => std::future::pending().await,
            }
        }
    }

    /// Has the meta group, if this node leads it, apply what another node has to tell.
    pub async fn announce(&self, announcement: Announcement) -> Result<meta::MetaOutcome, Failure> {
        let Announcement { cluster, command } = announcement;
        self.context.ensure_ours(cluster)?;

        // A peer tells of itself and of groups that it leads; plans and levels are decided by the
        // leader.
        match command {
            meta::MetaCommand::Announce { .. }
            | meta::MetaCommand::OpenMove { .. }
            | meta::MetaCommand::CommitMove { .. }
            | meta::MetaCommand::AbortMove { .. }
            | meta::MetaCommand::Report { .. } => {}
            meta::MetaCommand::Found { .. } | meta::MetaCommand::InstallPlan { .. } => {
                return Err(Failure::Invalid {
                    reason: "views are not taken from a peer".to_owned(),
                });
            }
            meta::MetaCommand::RaiseLevel { .. } => {
                return Err(Failure::Invalid {
                    reason: "a level is not taken from a peer".to_owned(),
                });
            }
        }
        self.led_meta()?;
        self.context.take_address(command, ANNOUNCE_TIMEOUT).await
    }

    /// Reads the view as it is now, if this node leads the meta group.
    pub async fn view(&self) -> Result<View, Failure> {
        read_view_now(&*self.led_meta()?, Instant::now() + VIEW_TIMEOUT).await
    }

    fn led_meta(&self) -> Result<Arc<Replica>, Failure> {
        let meta = self
            .registry()
            .get(GroupId::META)
            .filter(|meta| meta.leads());
        let reason = || "this node does not lead the meta group".to_owned();
        meta.ok_or_else(|| Failure::Unavailable {
            reason: reason(),
            retry_after_ms: RETRY_AFTER_MS,
        })
    }

    async fn end_tasks(&self) {
        self.stop.cancel();
        let mut tasks = std::mem::take(&mut *self.tasks.lock().await);
        while tasks.join_next().await.is_some() {}
    }

    /// Stops every group and closes log and maps. `is_clean`: with everything written down, for a
    /// quick start.
    pub async fn stop(&self, is_clean: bool) {
        // First, since all that is awaited here may wait for the log, and the log for room.
        self.storage.log.give_up_room();
        self.end_tasks().await;
        // Its group is all that keeps a map open.
        let maps = self.storage.states.open_maps();
        self.registry().shutdown().await;
        let states = self.storage.states.clone();
        let log = self.storage.log.clone();
        let threads = std::mem::take(&mut *self.storage.threads.lock());
        let closed = blocking::start(move || {
            if is_clean && let Err(error) = states.close() {
                tracing::warn!(
                    "the maps were not written down at the stop: {error}; the next start takes \
                    longer"
                );
            }
            drop(maps);
            log.close();
            if is_clean {
                for thread in threads {
                    if thread.join().is_err() {
                        tracing::error!("a storage thread has panicked");
                    }
                }
            }
        });
        if let Err(error) = closed.await {
            tracing::error!("closing log and maps was broken off: {error}");
        }
        if is_clean {
            let tasks = std::mem::take(&mut *self.storage.tasks.lock());
            drop(join_all(tasks).await);
        }
    }
}

/// Forgets what a retirement left that the end of the process has cut short. Returns whether it
/// did: the process must be started again then, since a log and a database were open in it.
/// Blocking.
///
/// # Errors
///
/// When the log or the database does not open: the next start tries again.
pub fn finish_retirement(joining: &Joining) -> Result<bool, StartError> {
    let stamp = joining.stamp();
    let Stamp::Retired { cluster, .. } = &stamp else {
        return Ok(false);
    };
    if leftovers::is_cleared(
        &*joining.platform().disk(),
        joining.directory_path(),
        &stamp,
    )? {
        return Ok(false);
    }
    NodeStorage::open(joining, *cluster)?.close();
    Ok(true)
}

/// The controllers of a node, which run until they are told to stop.
struct ControllerTasks {
    supervisor: Supervisor,
    stop: CancellationToken,
    running: JoinSet<()>,
}

impl ControllerTasks {
    /// Starts the controllers that carry plans out, and draw them up when nodes or replicas fail.
    fn start_planning(&mut self, joining: &Arc<Joining>, context: &Arc<NodeContext>) {
        let (tasks, config) = (self, joining.config());
        let membership = MembershipController::new(context.clone(), joining.platform().clone());
        let slot_moves = SlotMoveController::new(context.clone(), joining.platform().clone());
        tasks.start(
            "memberships",
            |stop| async move { membership.run(&stop).await },
        );
        tasks.start(
            "migrator",
            |stop| async move { slot_moves.run(&stop).await },
        );
        let greeter = Greeter::new(context.clone(), joining.clone());
        tasks.start("greeter", |stop| async move { greeter.run(&stop).await });
        let node_replacement = NodeReplacement::new(
            context.clone(),
            config.replace_after,
            config.lost_disk_after,
        );
        tasks.start(
            "repair",
            |stop| async move { node_replacement.run(&stop).await },
        );
        let reporter = FailureReporter::new(context.clone(), joining.directory_id());
        tasks.start("reporter", |stop| async move { reporter.run(&stop).await });
    }

    /// Starts the controllers that keep leaders, log, maps and connections in order.
    fn start_housekeeping(
        &mut self,
        joining: &Arc<Joining>,
        context: &Arc<NodeContext>,
        storage: &NodeStorage,
    ) {
        let (tasks, config) = (self, joining.config());
        let leader_placement = LeaderPlacement::new(context.clone());
        let log_compactor =
            LogCompactor::new(context.clone(), storage.log.clone(), config.log_bytes);

        // The watchdog knows "janitor" and "compactor" by their names: their rounds may be long.
        tasks.start("balancer", |stop| async move {
            leader_placement.run(&stop).await
        });
        tasks.start(
            "janitor",
            |stop| async move { log_compactor.run(&stop).await },
        );
        let disk_watch = DiskWatch::new(
            context.clone(),
            storage.log.clone(),
            storage.states.clone(),
            joining.directory_id(),
        );
        tasks.start(
            "disk-watch",
            |stop| async move { disk_watch.run(&stop).await },
        );
        let disk_hand_over = DiskHandOver::new(context.clone(), storage.log.clone());
        tasks.start("disk-hand-over", |stop| async move {
            disk_hand_over.run(&stop).await
        });
        let reachability_probe = ReachabilityProbe::new(context.clone());
        tasks.start("scout", |stop| async move {
            reachability_probe.run(&stop).await
        });
        let map_compactor = MapCompactor::new(storage.states.clone(), storage.log.clone());
        tasks.start(
            "compactor",
            |stop| async move { map_compactor.run(&stop).await },
        );
    }

    /// Starts the controllers that look for what is wrong. Returns what they find.
    fn start_checks(
        &mut self,
        joining: &Arc<Joining>,
        context: &Arc<NodeContext>,
        storage: &NodeStorage,
    ) -> (Arc<Findings>, Arc<Scrubs>) {
        let (tasks, config) = (self, joining.config());
        let agreement = Agreement::new(context.clone(), config.compare_every);
        tasks.start(
            "agreement",
            |stop| async move { agreement.run(&stop).await },
        );
        let levels = Levels::new(context.clone(), config.speaks(), config.raise_level_after);
        tasks.start("levels", |stop| async move { levels.run(&stop).await });
        let scrubs = Arc::new(Scrubs::default());
        let scrubber = Scrubber::new(
            context.clone(),
            storage.log.clone(),
            scrubs.clone(),
            config.scrub_every,
        );
        tasks.start("scrubber", |stop| async move { scrubber.run(&stop).await });

        let findings = Arc::new(Findings::default());
        let parts = (
            storage.log.clone(),
            storage.states.clone(),
            joining.supervisor().clone(),
        );
        let watchdog = Watchdog::new(context.clone(), parts.0, parts.1, parts.2, findings.clone());
        tasks.start("watchdog", |stop| async move { watchdog.run(&stop).await });
        (findings, scrubs)
    }

    fn start<F>(&mut self, part: &'static str, run: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.supervisor
            .start(&mut self.running, part, run(self.stop.clone()));
    }
}

fn timings(config: &NodeConfig) -> RaftTimings {
    let lease = config
        .lease_drift_ms
        .map_or(LeaseReads::Off, |drift_ms| LeaseReads::On { drift_ms });
    RaftTimings {
        lease,
        ..RaftTimings::default().slower(config.timing_factor)
    }
}

impl NodeStorage {
    /// Blocking: reads the log back.
    fn open(joining: &Joining, cluster: ClusterId) -> Result<Self, StartError> {
        let config = joining.config();
        let disk = joining.platform().disk();
        let path = joining.directory_path();

        // A member's log that is missing was lost: to begin a new one would forget its votes.
        let expect = if joining.is_stamped_member() {
            Expect::Existing
        } else {
            Expect::NewOrExisting
        };

        let usual = LogOptions::default();
        let small = |rare, usual| rare::or(RareBranch::SmallSegments, rare, usual);
        let options = LogOptions {
            expect,
            binding: joining.directory_id().0,
            segment_bytes: small(4 << 10, segment_bytes(config.log_bytes)),
            grow_bytes: small(1 << 10, usual.grow_bytes),
            cache_bytes: small(0, usual.cache_bytes as u64) as usize,
            reserve_bytes: config.disk_reserve_bytes,
            waits_for_room: true,
            ..usual
        };
        let (log, writer) = leftovers::open_log(&disk, path, &joining.stamp(), cluster, options)?;

        let is_expected = !log.replicas().is_empty();
        let options = SledOptions {
            cache_bytes: config.cache_bytes,
            cluster,
            ..SledOptions::default()
        };
        let trees = joining
            .platform()
            .open_trees(&path.join(MAPS_DIR), options, is_expected)?;

        let usual = MapOptions::default();
        let small = |rare, usual| rare::or(RareBranch::SmallTables, rare, usual);
        let options = MapOptions {
            cache_bytes: config.cache_bytes,
            table_bytes_max: small(400, usual.table_bytes_max),
            frozen_bytes_max: small(4 << 10, usual.frozen_bytes_max),
            node_bytes_max: small(16 << 10, usual.node_bytes_max),
            garbage_bytes_max: small(4 << 10, usual.garbage_bytes_max as usize) as u64,
            copy_page_pairs: small(3, usual.copy_page_pairs),
        };
        let (states, checkpointer) = MapStore::open(trees, disk, path, options)?;
        leftovers::clear_maps(&log, &states)?;

        let supervisor = joining.supervisor();
        let (mut threads, mut tasks) = (Vec::new(), Vec::new());

        // A simulation runs all in one thread: there the two are tasks.
        if blocking::is_inline() {
            tasks.push(supervisor.start_alone("log-writer", writer.run_in_task()));
            tasks.push(supervisor.start_alone("checkpointer", checkpointer.run_in_task()));
        } else {
            let thread = |part, run: Box<dyn FnOnce() + Send>| supervisor.start_thread(part, run);
            let writer = thread("log-writer", Box::new(move || writer.run()));
            threads.push(writer.map_err(StartError::Thread)?);
            let checkpointer = thread("checkpointer", Box::new(move || checkpointer.run()));
            threads.push(checkpointer.map_err(StartError::Thread)?);
        }

        Ok(Self {
            log,
            states: Arc::new(states),
            threads: threads.into(),
            tasks: tasks.into(),
        })
    }

    /// Closes it when nothing of it is in use. Blocking.
    fn close(self) {
        if let Err(error) = self.states.close() {
            tracing::warn!("the maps were not closed well: {error}");
        }
        self.log.close();
        for thread in self.threads.into_inner() {
            if thread.join().is_err() {
                tracing::error!("a storage thread has panicked");
            }
        }
    }
}
