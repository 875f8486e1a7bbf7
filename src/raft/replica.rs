//! [`Replica`]: one live replica of one group: its log, its map, and openraft between them.
//!
//! Callers ask it by what concerns them: proposals and reads (`proposal/admission`), transfers of
//! its lead (`election/transfer`), members (`membership`), snapshots and the log (`compaction`).
//! Besides openraft's own tasks a replica has three: the proposer, the ReadIndex rounds, and a
//! monitor that publishes changes and logs once why a replica stopped. They end with the replica.
//! The leader is always the one that this replica knows.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::error::{Fatal, InitializeError, RaftError};
use openraft::{Instant as _, ServerState};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::apply_state::ApplyState;
use super::context::RaftContext;
use super::election::counters::ElectionCounters;
use super::election::timer::ElectionTimer;
use super::errors::{OpenError, SHUT_DOWN};
use super::fair_budget::HeldBytes;
use super::log_store::LogStore;
use super::proposal::proposer::Proposer;
use super::proposal::read_index::ReadIndex;
use super::replica_store::ReplicaStore;
use super::state_machine::{RaftHandle, StateMachine};
use super::status::{Freshness, GroupMembership, Leader, RaftStatus, ReplicaWatch, Role};
use super::timings::RaftTimings;
use super::transport::peer_client::Network;
use super::transport::snapshots::SnapshotInbox;
use super::types::{GroupMember, from_raft};
use crate::sm::disk_level::DiskLevel;
use crate::storage::ReplicaKey;
use crate::storage::log::ReplicaLog;
use crate::storage::map::ReplicaMap;
use crate::types::{NodeId, ReplicaId, ReplicaKind};

/// One replica of one group.
pub struct Replica {
    pub(super) key: ReplicaKey,
    pub(super) raft: RaftHandle,
    pub(super) apply_state: Arc<ApplyState>,
    pub(super) log: ReplicaLog,
    pub(super) proposer: Arc<Proposer>,
    pub(super) reads: Arc<ReadIndex>,
    pub(super) inbox: SnapshotInbox,
    pub(super) network: Network,
    pub(super) freshness: Freshness,
    pub(super) timer: ElectionTimer,
    /// The purge index that was last sent to the witnesses.
    pub(super) advertised_purge_index: AtomicU64,
    /// Frames of the group that are being handled.
    pub(super) frames: Arc<AtomicUsize>,
    /// Bytes of those frames.
    pub(super) frame_bytes: HeldBytes,
    pub(super) opened: Instant,
    pub(super) timings: RaftTimings,
    pub(super) context: Arc<RaftContext>,
    pub(super) watch: watch::Receiver<ReplicaWatch>,
    tasks: Mutex<Option<JoinSet<()>>>,
    is_stopping: Arc<AtomicBool>,
    /// The reason why this leader refuses writes.
    pub(super) alarm: Mutex<Option<String>>,
    pub(super) is_read_only: AtomicBool,
    /// The fill of the disks of a majority of the voters, while this replica leads.
    pub(super) voters_disk_level: Mutex<DiskLevel>,
    /// The term in which this replica gave up its lead; zero for none.
    pub(super) stepped_down: AtomicU64,
}

impl Replica {
    /// Opens a replica from its log and its store. It takes part in its group at once.
    pub(super) async fn open(
        context: Arc<RaftContext>,
        log: ReplicaLog,
        store: ReplicaStore,
    ) -> Result<Arc<Self>, OpenError> {
        let key = log.key();
        let timings = context.timings.clone();
        let kind = store.kind();
        let config = timings
            .config(key)
            .map_err(|error| OpenError::Timings(error.to_string()))?;
        assert!(
            timings
                .lease_age_max()
                .is_none_or(|age| age.as_millis() <= u128::from(timings.election_ms_max)),
            "a lease outlasts the followers' promise not to vote for another"
        );

        let log_store = LogStore::new(log.clone());
        let network = Network::new(
            key,
            context.lanes.clone(),
            log_store.tip().clone(),
            &timings,
        );
        let apply_state = Arc::new(ApplyState::new(store)?);
        let state_machine = StateMachine::new(apply_state.clone());
        let raft = RaftHandle::build(
            key.replica,
            config,
            network.clone(),
            log_store,
            state_machine,
        )
        .await;
        let raft = raft.map_err(|error| OpenError::Raft(error.to_string()))?;

        let (publish, watch) = watch::channel(look(&raft, None));
        let group = Self {
            key,
            raft,
            apply_state,
            log,
            proposer: Proposer::new(context.budgets.clone()),
            reads: ReadIndex::new(timings.lease_age_max()),
            inbox: SnapshotInbox::default(),
            network,
            freshness: Freshness::default(),
            timer: ElectionTimer::new(&timings, kind),
            advertised_purge_index: AtomicU64::new(0),
            frames: Arc::default(),
            frame_bytes: HeldBytes::default(),
            opened: Instant::now(),
            timings,
            context,
            watch,
            tasks: Mutex::new(Some(JoinSet::new())),
            is_stopping: Arc::default(),
            alarm: Mutex::default(),
            is_read_only: AtomicBool::new(false),
            voters_disk_level: Mutex::default(),
            stepped_down: AtomicU64::new(0),
        };
        let group = Arc::new(group);
        group.start_tasks(publish);

        // openraft starts its tasks here, and they start others.
        let supervisor = &group.context.supervisor;
        supervisor.within("openraft", || group.raft.run());
        Ok(group)
    }

    /// Starts the tasks of this replica. None of them holds the replica, so that it can end.
    fn start_tasks(&self, publish: watch::Sender<ReplicaWatch>) {
        let (raft, apply_state) = (&self.raft, &self.apply_state);
        let propose = self.proposer.clone().run(
            raft.clone(),
            apply_state.clone(),
            self.context.resolver.clone(),
        );
        let confirm_reads = self.reads.clone().run(raft.clone(), apply_state.clone());
        let monitor = monitor(
            self.key,
            raft.clone(),
            apply_state.clone(),
            publish,
            (self.proposer.clone(), self.reads.clone()),
            self.context.elections.clone(),
            self.is_stopping.clone(),
        );

        let supervisor = &self.context.supervisor;
        if let Some(tasks) = &mut *self.tasks.lock() {
            supervisor.start(tasks, "proposer", propose);
            supervisor.start(tasks, "reads", confirm_reads);
            supervisor.start(tasks, "monitor of a replica", monitor);
        }
    }

    /// Returns true if this replica keeps the log and no map. The registry hands none of these out
    /// as a `Replica`.
    pub(super) fn is_witness(&self) -> bool {
        self.apply_state.store.kind() == ReplicaKind::Witness
    }

    pub fn key(&self) -> ReplicaKey {
        self.key
    }

    /// Returns the map. For a linearizable read await [`Replica::read_barrier`] first.
    pub fn state(&self) -> &ReplicaMap {
        self.apply_state
            .store
            .map()
            .expect("the registry gives no witness out as a group")
    }

    /// Returns the log.
    #[cfg(any(test, feature = "testing"))]
    pub fn log(&self) -> &ReplicaLog {
        &self.log
    }

    /// Returns the group time that entries proposed now carry.
    pub fn time_ms(&self) -> u64 {
        self.apply_state.clock.now_ms()
    }

    /// Begins a new group with these voters, of which this replica must be one. Each of them may do
    /// so, with the same voters; a group that has begun is left as it is.
    pub async fn initialize(&self, voters: &BTreeMap<ReplicaId, NodeId>) -> Result<(), OpenError> {
        let members: BTreeMap<ReplicaId, GroupMember> = voters
            .iter()
            .map(|(id, node)| {
                (
                    *id,
                    GroupMember {
                        node: *node,
                        kind: ReplicaKind::Data,
                    },
                )
            })
            .collect();
        match self.raft.initialize(members).await {
            // Another voter may have begun the group first, with the same voters.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(OpenError::Raft(error.to_string())),
        }
    }

    /// Returns how often a snapshot took the place of this replica's map because it differed.
    pub fn rebuilt(&self) -> u64 {
        self.apply_state.rebuilt.load(Ordering::Relaxed)
    }

    /// Returns how long ago the map was last known to hold all that its leader had committed; None
    /// if it never was since the start.
    ///
    /// A leader's own map is complete as long as nobody else can lead: always if it is the only
    /// voter, and for the length of its lease where reads rest on leases. Otherwise it is as old as
    /// the last answer of a quorum, so that a leader that is cut off does not pass for fresh.
    pub fn staleness(&self) -> Option<Duration> {
        let fresh = self
            .freshness
            .fresh_at(*self.apply_state.applied.borrow())
            .map(|at| at.elapsed());

        let watch = self.watch.borrow();
        match watch.role {
            Role::Leader => {
                let acked = self
                    .raft
                    .data_metrics()
                    .borrow_watched()
                    .last_quorum_acked
                    .map(|at| at.elapsed());
                let acked = self.quorum_acked(&watch, acked).or(fresh)?;
                let is_leased = self
                    .timings
                    .lease_age_max()
                    .is_some_and(|lease| acked < lease);
                Some(if is_leased { Duration::ZERO } else { acked })
            }
            Role::Follower | Role::Candidate | Role::Learner | Role::Stopped => fresh,
        }
    }

    /// Returns how long ago a quorum answered this leader: `acked`, as openraft has it. The only
    /// voter is its own quorum, for which openraft records no time.
    ///
    /// Takes what it needs of the metrics as an argument, because its caller may be reading them: a
    /// second read would wait behind a writer that waits for the first, forever.
    fn quorum_acked(&self, watch: &ReplicaWatch, acked: Option<Duration>) -> Option<Duration> {
        let is_alone =
            watch.role == Role::Leader && watch.membership.voters.keys().eq([&self.key.replica]);
        if is_alone {
            Some(Duration::ZERO)
        } else {
            acked
        }
    }

    /// Returns the state of this replica at this moment.
    pub fn status(&self) -> RaftStatus {
        let data = self.raft.data_metrics();
        let data = data.borrow_watched();
        let watch = self.watch.borrow();

        let matched = data.replication.as_ref().map(|replication| {
            replication
                .iter()
                .map(|(replica, matched)| (*replica, matched.as_ref().map(from_raft)))
                .collect()
        });

        // A leader that has stepped down reports itself as a follower, though openraft does not
        // know it yet.
        let has_stepped_down = self.has_stepped_down(&watch);
        let role = if has_stepped_down {
            Role::Follower
        } else {
            watch.role
        };
        let leader = watch.leader.filter(|_| !has_stepped_down);

        let leader_heard = match role {
            Role::Leader => Some(Duration::ZERO),
            Role::Follower | Role::Candidate | Role::Learner | Role::Stopped => {
                self.freshness.last_heard().map(|at| at.elapsed())
            }
        };
        let status = RaftStatus {
            key: self.key,
            role,
            leader: leader.and_then(|leader| leader.node),
            leader_replica: leader.map(|leader| leader.replica),
            term: watch.term,
            last_log: data.last_log.as_ref().map(from_raft),
            committed: data.local_committed.as_ref().map(from_raft),
            applied: self.apply_state.store.applied().log_id,
            snapshot: data.snapshot.as_ref().map(from_raft),
            purged: data.purged.as_ref().map(from_raft),
            membership: watch.membership.clone(),
            failed: self.failure_of(&watch),
            quorum_acked: self.quorum_acked(&watch, data.last_quorum_acked.map(|at| at.elapsed())),
            leader_heard,
            matched: matched.unwrap_or_default(),
        };
        status.check();
        status
    }

    /// Returns the reason why this replica applies nothing more, if it was not asked to stop.
    /// Includes a failure of the map that only the next entry would meet.
    pub fn failure(&self) -> Option<String> {
        self.failure_of(&self.watch.borrow())
    }

    fn failure_of(&self, watch: &ReplicaWatch) -> Option<String> {
        let of_map = || self.apply_state.store.map().and_then(ReplicaMap::failure);
        watch
            .failure
            .clone()
            .or_else(|| self.apply_state.failure())
            .or_else(of_map)
    }

    /// Returns the number of writes that are queued here, and of reads.
    pub fn queued(&self) -> (usize, usize) {
        (self.proposer.queued_len(), self.reads.queued_len())
    }

    /// Watches what changes seldom: the leader, the membership, a failure.
    pub fn watch(&self) -> watch::Receiver<ReplicaWatch> {
        self.watch.clone()
    }

    /// Returns true if this replica leads, as far as it knows.
    pub fn leads(&self) -> bool {
        let watch = self.watch.borrow();
        watch.role == Role::Leader && !self.has_stepped_down(&watch)
    }

    /// Returns the leader that this replica knows.
    pub fn leader(&self) -> Option<Leader> {
        let watch = self.watch.borrow();
        watch.leader.filter(|_| !self.has_stepped_down(&watch))
    }

    /// Watches the index of the last applied entry.
    pub fn watch_applied(&self) -> watch::Receiver<u64> {
        self.apply_state.applied.subscribe()
    }

    /// Returns true if the group has begun, as far as this replica knows.
    pub fn is_initialized(&self) -> bool {
        self.watch.borrow().membership.log_id.is_some()
    }

    /// Returns true if entries wait to be synced.
    pub(super) fn has_unsynced(&self) -> bool {
        self.log.state().last > self.log.synced()
    }

    /// Runs a task until the replica stops.
    pub(super) fn supervise(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(tasks) = &mut *self.tasks.lock() {
            self.context.supervisor.start(tasks, "replica", task);
        }
    }

    /// Stops the replica. Callers that are queued are told so; entries in flight have an unknown
    /// outcome.
    pub async fn shutdown(&self) {
        // First, or the monitor would take the end of openraft for a failure.
        self.is_stopping.store(true, Ordering::Relaxed);
        self.proposer.close(SHUT_DOWN);
        self.reads.close(SHUT_DOWN);
        // Otherwise openraft would wait for a map that will not come.
        self.apply_state.hold.clear();
        let _ = self.raft.shutdown().await;

        let tasks = self.tasks.lock().take();
        if let Some(mut tasks) = tasks {
            tasks.shutdown().await;
        }
    }
}

/// Returns what the watchers of a replica see now.
fn look(raft: &RaftHandle, failure: Option<String>) -> ReplicaWatch {
    let metrics = raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let membership = GroupMembership::from(&*metrics.membership_config);

    let role = match metrics.state {
        _ if failure.is_some() => Role::Stopped,
        ServerState::Leader => Role::Leader,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Learner => Role::Learner,
        ServerState::Shutdown => Role::Stopped,
    };

    // A witness that leads is not named: it serves nobody, and clients would ask it.
    let leader = metrics.current_leader.map(|replica| {
        let node = membership
            .node_of(replica)
            .filter(|_| !membership.is_witness(replica));
        Leader { replica, node }
    });

    ReplicaWatch {
        role,
        leader,
        term: metrics.vote.leader_id.term,
        membership,
        committed_membership: GroupMembership::from(&*metrics.committed_membership_config),
        failure,
    }
}

/// Publishes changes until openraft ends, and then the reason why it did.
async fn monitor(
    key: ReplicaKey,
    raft: RaftHandle,
    apply_state: Arc<ApplyState>,
    publish: watch::Sender<ReplicaWatch>,
    (proposer, reads): (Arc<Proposer>, Arc<ReadIndex>),
    elections: Arc<ElectionCounters>,
    is_stopping: Arc<AtomicBool>,
) {
    let mut changes = raft.server_metrics();

    let mut led_by = None;
    loop {
        let now = look(&raft, None);
        if let Some(leader) = now.leader.map(|leader| leader.replica) {
            if led_by.is_some_and(|before| before != leader) {
                elections.count_leader_change();
            }
            led_by = Some(leader);
        }

        publish.send_if_modified(|before| {
            let changed = *before != now;
            *before = now;
            changed
        });
        // The senders end with openraft's core; `raft` holds only receivers.
        if changes.changed().await.is_err() {
            break;
        }
    }

    let stopped = match &raft.metrics().borrow_watched().running_state {
        Ok(()) | Err(Fatal::Stopped) => None,
        Err(error @ (Fatal::StorageError(_) | Fatal::Panicked)) => Some(error.to_string()),
    };

    // openraft ended though nobody asked it to: that is a failure, even if it names none.
    if !is_stopping.load(Ordering::Relaxed) || stopped.is_some() {
        let reason = apply_state
            .failure()
            .or(stopped)
            .unwrap_or_else(|| "its core ended".into());
        tracing::error!(group = %key.group, replica = %key.replica, %reason, "a replica has \
            stopped");
        apply_state.fail(reason.clone());
        publish.send_modify(|now| {
            now.role = Role::Stopped;
            now.failure = Some(reason);
        });
    }
    let reason = apply_state
        .failure()
        .unwrap_or_else(|| SHUT_DOWN.to_owned());
    proposer.close(&reason);
    reads.close(&reason);
}
