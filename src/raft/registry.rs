//! [`Registry`]: the live replicas of this node by group, and what they share: the log, the maps,
//! the lanes.
//!
//! At most one replica of a group lives here at a time. Frames find their replica here; they never
//! create one.

use parking_lot::RwLock;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::context::RaftContext;
use super::election::counters::ElectionCounters;
use super::election::leases::LeaseTimings;
use super::election::liveness::PeerLiveness;
use super::election::step_down::ReplicaPosition;
use super::election::timer;
use super::errors::OpenError;
use super::fair_budget::RaftBudgets;
use super::log_recovery::recover_log;
use super::replica::Replica;
use super::replica_store::ReplicaStore;
use super::timings::RaftTimings;
use super::transport::lanes::{LaneLimiter, Lanes, LanesParts, Reachability};
use super::transport::wire::{FrameHeader, PeerRefusal, PeerReply, PeerRequest};
use super::transport::{Dial, Lane, NodeIdentity, Resolver};
use super::witness::{self, WitnessReplica};
use super::witness_store::WitnessStore;
use crate::blocking;
use crate::mutants::{self, Mutant};
use crate::storage::ReplicaKey;
use crate::storage::background;
use crate::storage::log::{Log, ReplicaLog};
use crate::storage::map::{Applied, MapStore};
use crate::supervisor::Supervisor;
use crate::types::{DirectoryId, GroupId, NodeId, ReplicaKind};

/// Snapshots that are written at a time: each reads a whole map and syncs a large file.
const SNAPSHOT_TURNS: usize = 1;

/// KiB of large frames that may be received at once. The largest frame fits.
const LARGE_FRAMES_KIB: usize = 128 << 10;

/// Time that a failed replica may take to hand over its lead before it is closed.
const FAILED_HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);

/// The parts that a registry is made of.
pub struct RegistryParts {
    pub identity: Arc<NodeIdentity>,
    pub resolver: Arc<dyn Resolver>,
    pub dial: Arc<dyn Dial>,
    pub timings: RaftTimings,
    pub log: Log,
    pub states: Arc<MapStore>,
    pub budgets: RaftBudgets,
    pub supervisor: Supervisor,
}

/// Records the replicas that were opened, and whether more may be.
#[derive(Default)]
struct Opening {
    is_closed: bool,
    /// Number of times that this process has opened each replica, or tried to.
    tried: BTreeMap<ReplicaKey, u64>,
}

/// The groups of this node.
pub struct Registry {
    identity: Arc<NodeIdentity>,
    liveness: Arc<PeerLiveness>,
    reachability: Arc<Reachability>,
    lane_limiter: Arc<LaneLimiter>,
    large_frames: Arc<Semaphore>,
    context: Arc<RaftContext>,
    states: Arc<MapStore>,
    groups: RwLock<BTreeMap<GroupId, Arc<Replica>>>,
    /// Locked while a replica is opened or closed: both take time, and two replicas of a group must
    /// not meet.
    opening: Mutex<Opening>,
    election_timer: OnceLock<AbortOnDropHandle<()>>,
    closing: AtomicBool,
}

impl Registry {
    pub fn new(parts: RegistryParts) -> Arc<Self> {
        let liveness = Arc::new(PeerLiveness::default());
        let reachability = Arc::new(Reachability::default());
        let budgets = Arc::new(parts.budgets);

        let lanes = Arc::new(Lanes::new(LanesParts {
            identity: parts.identity.clone(),
            resolver: parts.resolver.clone(),
            dial: parts.dial,
            liveness: liveness.clone(),
            reachability: reachability.clone(),
            budgets: budgets.clone(),
            lease_timings: LeaseTimings::from(&parts.timings),
            supervisor: parts.supervisor.clone(),
        }));

        let context = Arc::new(RaftContext {
            log: parts.log,
            lanes,
            resolver: parts.resolver,
            timings: parts.timings,
            snapshot_turns: Semaphore::new(SNAPSHOT_TURNS),
            budgets,
            supervisor: parts.supervisor,
            elections: Arc::default(),
        });

        Arc::new(Self {
            identity: parts.identity,
            liveness,
            reachability,
            lane_limiter: Arc::default(),
            large_frames: Arc::new(Semaphore::new(LARGE_FRAMES_KIB)),
            context,
            states: parts.states,
            groups: RwLock::default(),
            opening: Mutex::default(),
            election_timer: OnceLock::new(),
            closing: AtomicBool::new(false),
        })
    }

    /// Returns the identity of this node.
    pub fn identity(&self) -> &NodeIdentity {
        &self.identity
    }

    /// Returns when each peer was last heard from.
    pub fn liveness(&self) -> &PeerLiveness {
        &self.liveness
    }

    /// Returns which peers this node can't connect to, and which can't connect to this node.
    pub fn reachability(&self) -> &Reachability {
        &self.reachability
    }

    /// Returns how long a leader may be silent until nobody is sent to it.
    pub fn silence_max(&self) -> Duration {
        Duration::from_millis(self.context.timings.silence_ms_max())
    }

    /// Returns the timings that all peers must share.
    pub(super) fn lease_timings(&self) -> LeaseTimings {
        LeaseTimings::from(&self.context.timings)
    }

    /// Returns the memory budgets that the groups of this node share.
    pub fn budgets(&self) -> &RaftBudgets {
        &self.context.budgets
    }

    /// Returns counts of campaigns and changes of leaders.
    pub fn elections(&self) -> &ElectionCounters {
        &self.context.elections
    }

    /// Returns the limits of the lanes that are served.
    pub fn lane_limiter(&self) -> &Arc<LaneLimiter> {
        &self.lane_limiter
    }

    /// Returns the permits for receiving large frames, in KiB.
    pub(super) fn large_frames(&self) -> &Arc<Semaphore> {
        &self.large_frames
    }

    /// Returns true if `node` has this directory in the newest view that this node knows.
    pub(super) fn knows(&self, node: NodeId, directory: DirectoryId) -> bool {
        self.context
            .resolver
            .resolve(node)
            .is_some_and(|peer| peer.directory == directory)
    }

    /// Returns the replica of a group that lives here, if it has a map.
    pub fn get(&self, group: GroupId) -> Option<Arc<Replica>> {
        self.replica(group).filter(|group| !group.is_witness())
    }

    /// Returns every live replica that has a map, by group.
    pub fn groups(&self) -> Vec<Arc<Replica>> {
        self.replicas()
            .into_iter()
            .filter(|group| !group.is_witness())
            .collect()
    }

    /// Returns the witness of a group that lives here.
    pub fn witness(&self, group: GroupId) -> Option<WitnessReplica> {
        self.replica(group)
            .filter(|group| group.is_witness())
            .map(WitnessReplica)
    }

    /// Returns every live witness, by group.
    pub fn witnesses(&self) -> Vec<WitnessReplica> {
        self.replicas()
            .into_iter()
            .filter(|group| group.is_witness())
            .map(WitnessReplica)
            .collect()
    }

    fn replica(&self, group: GroupId) -> Option<Arc<Replica>> {
        self.groups.read().get(&group).cloned()
    }

    fn replicas(&self) -> Vec<Arc<Replica>> {
        self.groups.read().values().cloned().collect()
    }

    /// Calls `visit`, which must be quick, with each live replica.
    pub(super) fn for_each_replica(&self, visit: impl FnMut(&Arc<Replica>)) {
        self.groups.read().values().for_each(visit);
    }

    /// Returns the positions of every replica of this node, witnesses too.
    pub fn progress(&self) -> Vec<ReplicaPosition> {
        let mut all = Vec::new();
        self.for_each_replica(|group| all.push(group.progress()));
        all
    }

    /// Opens every replica that the log knows. Returns those that do not open, and why.
    pub async fn open_all(self: &Arc<Self>) -> Vec<(ReplicaKey, OpenError)> {
        let mut failed = Vec::new();
        for key in self.context.log.replicas() {
            if let Err(error) = self.reopen(key).await {
                failed.push((key, error));
            }
        }
        failed
    }

    /// Returns when this peer was last heard from, on any lane.
    pub fn last_heard(&self, node: NodeId) -> Option<Instant> {
        self.liveness.last_heard(node)
    }

    /// Returns true if the peer was heard of within this time, and its process has not died since,
    /// as far as can be seen from here.
    pub fn is_up(&self, node: NodeId, within: Duration) -> bool {
        self.liveness.is_up(node, within)
    }

    /// Ignores broken lanes from now on, because this node is about to cut them itself.
    pub fn begin_to_close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    /// Notes that a lane from this peer broke.
    pub(super) fn on_lane_down(&self, node: NodeId) {
        if !self.closing.load(Ordering::Relaxed) && self.liveness.on_lane_down(node) {
            self.for_each_replica(|group| group.on_leader_disconnected(node));
        }
    }

    /// Returns true if the process of the peer has probably died: all of its lanes broke, and
    /// nothing was heard from it since.
    pub fn is_disconnected(&self, node: NodeId) -> bool {
        self.liveness.is_disconnected(node)
    }

    /// Opens a replica with a map. If the log does not know it and `may_create` is set, creates it;
    /// that is durable before its first answer.
    pub async fn open_replica(
        self: &Arc<Self>,
        key: ReplicaKey,
        may_create: bool,
    ) -> Result<Arc<Replica>, OpenError> {
        self.open(key, Some(ReplicaKind::Data), may_create).await
    }

    /// Opens a witness, otherwise like [`Registry::open_replica`].
    pub async fn open_witness(
        self: &Arc<Self>,
        key: ReplicaKey,
        may_create: bool,
    ) -> Result<WitnessReplica, OpenError> {
        self.open(key, Some(ReplicaKind::Witness), may_create)
            .await
            .map(WitnessReplica)
    }

    /// Opens a replica that this node has, whatever its kind.
    pub async fn reopen(self: &Arc<Self>, key: ReplicaKey) -> Result<(), OpenError> {
        self.open(key, None, false).await.map(|_| ())
    }

    /// Opens a replica. Without a `kind`, as the kind that it was created as.
    async fn open(
        self: &Arc<Self>,
        key: ReplicaKey,
        kind: Option<ReplicaKind>,
        may_create: bool,
    ) -> Result<Arc<Replica>, OpenError> {
        let mut synced = 0;
        let (_opening, log) = loop {
            let mut opening = self.opening.lock().await;
            if opening.is_closed {
                return Err(OpenError::ShuttingDown);
            }

            if let Some(open) = self.replica(key.group) {
                return Err(OpenError::AlreadyOpen(open.key()));
            }
            let log = match self.context.log.replica(key) {
                Some(log) => log,
                None if !may_create => return Err(OpenError::Missing(key)),
                None => self.create(key, kind).await?,
            };

            // A replica that has run in this process may have acknowledged what its log has not
            // synced. So it is synced without the lock, and opened only if nobody else has tried in
            // between.
            let tried = opening.tried.entry(key).or_default();
            if *tried == synced {
                *tried += 1;
                break (opening, log);
            }
            // Syncing may take long, and other replicas are opened and closed meanwhile. If this
            // one is, it is synced once more.
            synced = *tried;
            drop(opening);
            sync_vote(&log).await?;
        };

        let store = self.open_state(key, log.clone()).await?;

        // A replica never changes its kind: a witness lacks the data that the other kind is counted
        // on for.
        if kind.is_some_and(|kind| kind != store.kind()) {
            return Err(OpenError::OtherKind(key));
        }

        recover_log(key, &log, &store).await?;
        let group = Replica::open(self.context.clone(), log, store).await?;

        if group.is_witness() {
            group.supervise(witness::transfer_leadership_when_ready(Arc::downgrade(
                &group,
            )));
        }
        let previous = self.groups.write().insert(key.group, group.clone());
        assert!(
            previous.is_none(),
            "two replicas of {} live here",
            key.group
        );

        // The first replica starts the timer of all.
        self.election_timer
            .get_or_init(|| self.start_election_timer());
        Ok(group)
    }

    /// Starts the task that ticks the election timers of all replicas, for as long as this lives.
    fn start_election_timer(self: &Arc<Self>) -> AbortOnDropHandle<()> {
        // Weak, so that the timer does not keep the registry alive.
        let registry = Arc::downgrade(self);
        let tick_all = move |pause: Option<Duration>| {
            let Some(registry) = registry.upgrade() else {
                return false;
            };
            registry.for_each_replica(|group| {
                // A pause of this node is no silence of the leaders.
                if let Some(pause) = pause {
                    group.timer.skip_pause(pause);
                }
                group.tick();
            });
            true
        };
        let run = timer::run_election_timers(self.context.timings.tick_interval(), tick_all);
        AbortOnDropHandle::new(self.context.supervisor.start_alone("election timer", run))
    }

    /// Creates a replica in the log. The file of a witness is written first: a crash in between
    /// would otherwise leave a replica of another kind.
    async fn create(
        &self,
        key: ReplicaKey,
        kind: Option<ReplicaKind>,
    ) -> Result<ReplicaLog, OpenError> {
        let files = self.states.witnesses().clone();
        let begun = blocking::start(move || match kind {
            Some(ReplicaKind::Witness) => files.write(key, &Applied::default()),
            Some(ReplicaKind::Data) | None => files.remove(key),
        });
        begun
            .await
            .map_err(|error| OpenError::Raft(format!("creating a replica panicked: {error}")))??;
        let (done, created) = oneshot::channel();
        self.context
            .log
            .create(key, Box::new(move |result| drop(done.send(result))));
        let closed = || OpenError::Log(std::io::Error::other("it was closed"));
        created
            .await
            .map_err(|_| closed())?
            .map_err(OpenError::Log)?;
        self.context.log.replica(key).ok_or_else(closed)
    }

    async fn open_state(
        &self,
        key: ReplicaKey,
        log: ReplicaLog,
    ) -> Result<ReplicaStore, OpenError> {
        let states = self.states.clone();
        let opened = blocking::start(move || match states.witnesses().read(key)? {
            Some(watermark) => Ok(ReplicaStore::Witness(WitnessStore::new(
                key,
                states.witnesses().clone(),
                Arc::new(log),
                watermark,
            ))),
            None => states.replica(key, Arc::new(log)).map(ReplicaStore::Map),
        });
        let opened = opened
            .await
            .map_err(|error| OpenError::Raft(format!("opening the map panicked: {error}")))?;
        Ok(opened?)
    }

    /// Stops a replica. Its data stays.
    pub async fn close_replica(&self, key: ReplicaKey) {
        let _opening = self.opening.lock().await;
        let group = self.replica(key.group).filter(|group| group.key() == key);
        if let Some(group) = group {
            // Ended before it is taken out, so that it never meets the next replica of its group.
            group.shutdown().await;
            self.groups.write().remove(&key.group);
        }
    }

    /// Closes a failed replica, if it is open. It first hands over its lead, so that others can go
    /// on.
    pub async fn close_failed(&self, key: ReplicaKey) {
        let Some(group) = self.replica(key.group).filter(|group| group.key() == key) else {
            return;
        };
        if let (true, Some(to)) = (group.leads(), group.best_successor())
            && let Err(error) = group
                .transfer_leader_within(to, FAILED_HAND_OVER_TIMEOUT)
                .await
        {
            tracing::info!(group = %key.group, %error, "the leadership of a replica that failed \
                was not handed over");
        }
        drop(group);
        self.close_replica(key).await;
    }

    /// Returns the reason why this process no longer writes to maps, if it does not.
    pub fn maps_given_up(&self) -> Option<String> {
        self.states.given_up()
    }

    /// Returns the replicas that this node's log has, open or not.
    pub fn stored(&self) -> Vec<ReplicaKey> {
        self.context.log.replicas()
    }

    /// Stops a replica and deletes its data, but not the record that its id was used. Only for a
    /// replica that is retired: its vote is lost.
    pub async fn wipe_replica(&self, key: ReplicaKey) -> Result<(), OpenError> {
        self.close_replica(key).await;
        let states = self.states.clone();
        let wiped = blocking::start(move || background::run("wipe-map", || states.wipe(key))).await;
        wiped
            .map_err(|error| OpenError::Raft(format!("wiping the map panicked: {error}")))?
            .map_err(OpenError::Log)??;

        // The map goes before the log: a map without its log would not open.
        let (done, forgotten) = oneshot::channel();
        self.context
            .log
            .wipe(key, Box::new(move |result| drop(done.send(result))));
        let closed = || OpenError::Log(std::io::Error::other("it was closed"));
        forgotten
            .await
            .map_err(|_| closed())?
            .map_err(OpenError::Log)?;

        // Deleted last: the log of a witness without this file would open as a replica with a map.
        let witnesses = self.states.witnesses().clone();
        let unmarked = blocking::start(move || witnesses.remove(key)).await;
        unmarked
            .map_err(|error| OpenError::Raft(format!("wiping a mark panicked: {error}")))?
            .map_err(OpenError::State)
    }

    /// Transfers every leadership that another replica can take, all at once.
    pub async fn hand_over(&self, timeout: Duration) {
        let led = self.replicas().into_iter().filter(|group| group.leads());
        let with_successors = led.filter_map(|group| Some((group.best_successor()?, group)));
        let handed = with_successors.map(|(to, group)| async move {
            if let Err(error) = group.transfer_leader_within(to, timeout).await {
                let group = group.key().group;
                tracing::info!(%group, %error, "the leadership was not handed over");
            }
        });

        join_all(handed).await;
    }

    /// Stops every replica and cuts the lanes. Call [`Registry::hand_over`] first if others are to
    /// go on without a pause.
    pub async fn shutdown(&self) {
        // First, so that none is opened after those here were stopped.
        self.opening.lock().await.is_closed = true;
        let groups = std::mem::take(&mut *self.groups.write());
        join_all(groups.values().map(|group| group.shutdown())).await;
        self.context.lanes.close().await;
    }

    /// Begins to handle a request of another replica, if it is for one that lives here.
    pub(super) fn handle(
        &self,
        lane: Lane,
        header: FrameHeader,
        request: PeerRequest,
        tail: Bytes,
    ) -> Result<BoxFuture<'static, PeerReply>, PeerRefusal> {
        let group = self
            .replica(header.group)
            .ok_or(PeerRefusal::NoReplica(header.group))?;

        // A frame for an earlier replica of this group must not reach its successor.
        if group.key().replica != header.target && !mutants::is_on(Mutant::RetiredReplicaVotes) {
            return Err(PeerRefusal::OtherReplica(group.key().replica));
        }
        group.handle(lane, header.sender, request, tail)
    }
}

/// Waits until the log of a replica that has run before in this process is durable, including its
/// vote. A replica that is opened from a log takes everything in it for synced, and answers others
/// on the strength of that.
async fn sync_vote(log: &ReplicaLog) -> Result<(), OpenError> {
    // The log syncs everything that was issued before this vote first.
    let Some(vote) = log.state().vote else {
        return Ok(());
    };
    let (done, synced) = oneshot::channel();
    log.save_vote(vote, Box::new(move |result| drop(done.send(result))));
    let closed = || OpenError::Log(std::io::Error::other("it was closed"));
    synced.await.map_err(|_| closed())?.map_err(OpenError::Log)
}
