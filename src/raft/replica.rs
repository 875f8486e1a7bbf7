//! [`Replica`]: one replica of one group, alive: its log, its map, openraft between them, and what
//! callers may ask.
//!
//! Around openraft's own tasks a group has three: the proposer, the reads, and a monitor that
//! publishes changes and says once why a replica stopped. They end with the group. Who leads is
//! always as this replica knows it.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::error::{ClientWriteError, Fatal, InitializeError, RaftError};
use openraft::errors::{ForwardReason, ForwardToLeader};
use openraft::raft::{ClientWriteResult, TransferLeaderRequest};
use openraft::{Instant as _, ServerState};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::task::coop::unconstrained;
use tokio::time::Instant;

use super::election::counters::Elections;
use super::election::timer::{ElectionRole, ElectionTimer, TimerAction};
use super::errors::{OpenError, ProposeError, ReadError, SHUT_DOWN, TransferError};
use super::fair_budget::HeldBytes;
use super::log_store::LogStore;
use super::proposal::proposer::{Proposer, propose_error};
use super::proposal::read_index::ReadIndex;
use super::registry::RaftContext;
use super::state_machine::{self, ApplyState, ReplicaStore, StateMachine};
use super::status::{Freshness, GroupMembership, Leader, RaftStatus, ReplicaWatch, Role};
use super::timings::{LeaseReads, RaftTimings};
use super::transport::network::Network;
use super::transport::snapshot_transfers::SnapshotTransfers;
use super::transport::snapshots::SnapshotInbox;
use super::types::{ApplyOutcome, GroupMember, Proposal, ResponderFn, Types, from_raft};
use super::witness;
use crate::sm::level::Feature;
use crate::sm::ports::StoreError;
use crate::sm::{kv, meta};
use crate::storage::ReplicaKey;
use crate::storage::log::{ReplicaLog, Vote};
use crate::storage::state::ReplicaMap;
use crate::types::{LogId, NodeId, ReplicaId};

pub(super) type RaftHandle = openraft::Raft<Types, StateMachine>;

/// A target this close to the end of the log may be handed the leadership: openraft lets it catch
/// up while nothing is written.
const TRANSFER_LAG_MAX: u64 = 256;
/// How long a transfer is waited for by default.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(2);
/// Between attempts of a proposal while the leader's lease has run out.
const LEASE_PAUSE: Duration = Duration::from_millis(5);

/// One replica of one group.
pub struct Replica {
    key: ReplicaKey,
    pub(super) raft: RaftHandle,
    pub(super) apply_state: Arc<ApplyState>,
    pub(super) log: ReplicaLog,
    proposer: Arc<Proposer>,
    reads: Arc<ReadIndex>,
    pub(super) inbox: SnapshotInbox,
    pub(super) network: Network,
    pub(super) freshness: Freshness,
    pub(super) timer: ElectionTimer,
    /// What the witnesses were last told that they need not keep.
    pub(super) advertised_purge_index: AtomicU64,
    /// Frames of the group that are being worked on.
    pub(super) frames: Arc<AtomicUsize>,
    /// And their bytes.
    pub(super) frame_bytes: HeldBytes,
    opened: Instant,
    timings: RaftTimings,
    pub(super) context: Arc<RaftContext>,
    pub(super) watch: watch::Receiver<ReplicaWatch>,
    tasks: Mutex<Option<JoinSet<()>>>,
    is_stopping: Arc<AtomicBool>,
    /// Why nothing is written.
    alarm: Mutex<Option<String>>,
    is_read_only: AtomicBool,
    /// The term in which this replica led and gave up the lead; zero for none.
    pub(super) stepped_down: AtomicU64,
}

impl Replica {
    /// Brings a replica to life from its log and what it keeps besides. It takes part at once.
    pub(super) async fn open(
        context: Arc<RaftContext>,
        log: ReplicaLog,
        store: ReplicaStore,
    ) -> Result<Arc<Self>, OpenError> {
        let key = log.key();
        let timings = context.timings.clone();
        let is_witness = store.witness().is_some();
        let config = timings
            .config(key)
            .map_err(|error| OpenError::Timings(error.to_string()))?;
        let log_store = LogStore::new(log.clone());
        let network = Network {
            key,
            lanes: context.lanes.clone(),
            tip: log_store.tip().clone(),
            transfers: SnapshotTransfers::default(),
            append_timeout: timings.append_timeout(),
            snapshot_step_timeout: timings.snapshot_step_timeout(),
            lease: timings.lease(),
        };
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
        let (proposer, reads) = (
            Proposer::new(context.budgets.clone()),
            ReadIndex::new(timings.lease_age_max()),
        );
        let is_stopping = Arc::new(AtomicBool::new(false));
        let (publish, watch) = watch::channel(look(&raft, None));
        let mut tasks = JoinSet::new();
        let supervisor = context.supervisor.clone();
        let propose =
            proposer
                .clone()
                .run(raft.clone(), apply_state.clone(), context.resolver.clone());
        supervisor.start(&mut tasks, "proposer", propose);
        supervisor.start(
            &mut tasks,
            "reads",
            reads.clone().run(raft.clone(), apply_state.clone()),
        );
        let (waiting, elections) = ((proposer.clone(), reads.clone()), context.elections.clone());
        let monitor = monitor(
            key,
            raft.clone(),
            apply_state.clone(),
            publish,
            waiting,
            elections,
            is_stopping.clone(),
        );
        supervisor.start(&mut tasks, "monitor of a replica", monitor);
        let group = Self {
            key,
            raft,
            apply_state,
            log,
            proposer,
            reads,
            inbox: SnapshotInbox::default(),
            network,
            freshness: Freshness::default(),
            timer: ElectionTimer::new(&timings, is_witness),
            advertised_purge_index: AtomicU64::new(0),
            frames: Arc::default(),
            frame_bytes: HeldBytes::default(),
            opened: Instant::now(),
            timings,
            context,
            watch,
            tasks: Mutex::new(Some(tasks)),
            is_stopping,
            alarm: Mutex::default(),
            is_read_only: AtomicBool::new(false),
            stepped_down: AtomicU64::new(0),
        };
        let group = Arc::new(group);
        if is_witness {
            group.supervise(witness::transfer_leadership_when_ready(Arc::downgrade(
                &group,
            )));
        }
        // Its tasks are started here, and start others.
        supervisor.within("openraft", || group.raft.run());
        Ok(group)
    }

    /// It keeps the log and no map. The registry gives none out as a `Replica`.
    pub(super) fn is_witness(&self) -> bool {
        self.apply_state.store.witness().is_some()
    }

    pub fn key(&self) -> ReplicaKey {
        self.key
    }

    /// The map. For a linearizable read await [`Replica::read_barrier`] first.
    pub fn state(&self) -> &ReplicaMap {
        self.apply_state
            .store
            .map()
            .expect("the registry gives no witness out as a group")
    }

    /// Group time: what entries that are proposed now carry.
    pub fn time_ms(&self) -> u64 {
        self.apply_state.clock.now_ms()
    }

    /// Begins a new group with these voters, of which this replica must be one. Fine if it has
    /// begun: each may do it, with the same ones.
    pub async fn initialize(&self, voters: &BTreeMap<ReplicaId, NodeId>) -> Result<(), OpenError> {
        let members: BTreeMap<ReplicaId, GroupMember> = voters
            .iter()
            .map(|(id, node)| {
                (
                    *id,
                    GroupMember {
                        node: *node,
                        is_witness: false,
                    },
                )
            })
            .collect();
        match self.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(OpenError::Raft(error.to_string())),
        }
    }

    /// Writes, as part of an entry with what else waits. `Unknown` is the only error after which it
    /// may have happened.
    pub async fn propose(
        &self,
        write: kv::Write,
        deadline: Instant,
    ) -> Result<kv::WriteOutcome, ProposeError> {
        self.propose_with_gets(write, 0, deadline).await
    }

    /// As [`Replica::propose`], for a write whose gets return about so many bytes: an entry is
    /// filled by these too.
    pub async fn propose_with_gets(
        &self,
        write: kv::Write,
        answer_bytes: usize,
        deadline: Instant,
    ) -> Result<kv::WriteOutcome, ProposeError> {
        self.ensure_proposes()?;
        self.await_own_term(deadline).await?;
        self.ensure_writable()?;
        if self.context.log.overloaded() {
            return Err(ProposeError::Overloaded {
                limit: "the log's disk does not keep up".into(),
            });
        }
        self.proposer.propose(write, answer_bytes, deadline).await
    }

    /// Proposes a command of a shard as an entry of its own.
    pub async fn propose_command(
        &self,
        command: kv::KvCommand,
        deadline: Instant,
    ) -> Result<kv::KvOutcome, ProposeError> {
        self.ensure_allowed(command.needs())?;
        if !command.is_of_agreement() {
            self.await_own_term(deadline).await?;
            self.ensure_writable()?;
        }
        match self.propose_entry(command.encode(), deadline).await? {
            ApplyOutcome::Shard(outcome) => Ok(outcome),
            other => Err(ProposeError::unknown(format!(
                "a command of a shard was answered by {other:?}"
            ))),
        }
    }

    /// Proposes a command of the meta group.
    pub async fn propose_meta(
        &self,
        command: meta::MetaCommand,
        deadline: Instant,
    ) -> Result<meta::MetaOutcome, ProposeError> {
        self.ensure_allowed(command.needs())?;
        match self.propose_entry(command.encode(), deadline).await? {
            ApplyOutcome::Meta(outcome) => Ok(outcome),
            other => Err(ProposeError::unknown(format!(
                "a command of the meta group was answered by {other:?}"
            ))),
        }
    }

    /// Returns whether a leader may propose it: every node of the cluster can read it.
    pub fn allows(&self, feature: Feature) -> bool {
        self.context.resolver.level() >= feature.level()
    }

    fn ensure_allowed(&self, needs: Option<Feature>) -> Result<(), ProposeError> {
        match needs.filter(|feature| !self.allows(*feature)) {
            Some(needs) => Err(ProposeError::NotYet { needs }),
            None => Ok(()),
        }
    }

    /// Waits until a leader has applied an entry of its own term, and with it all that was decided
    /// before: until then its map may not say yet that nothing is written. That entry is under way,
    /// and a write would be applied only after it anyway.
    async fn await_own_term(&self, deadline: Instant) -> Result<(), ProposeError> {
        if !self.allows(Feature::ReadOnlyEntries) {
            return Ok(());
        }
        let mut watch = self.watch();
        let (role, term) = {
            let watch = watch.borrow();
            (watch.role, watch.term)
        };
        if role != Role::Leader || self.apply_state.applied_term() >= term {
            return Ok(());
        }
        let mut applied = self.watch_applied();
        let leads_no_more = watch.wait_for(|now| now.role != Role::Leader || now.term != term);
        tokio::select! {
            _ = applied.wait_for(|_| self.apply_state.applied_term() >= term) => Ok(()),
            _ = leads_no_more => Ok(()),
            () = tokio::time::sleep_until(deadline) => Err(ProposeError::Expired),
        }
    }

    /// Has nothing written from now on as long as this replica leads, for that reason, or lets it
    /// be written again, unless the map says that nothing is.
    pub fn set_alarm(&self, alarm: Option<String>) {
        let mut now = self.alarm.lock();
        self.is_read_only.store(alarm.is_some(), Ordering::Relaxed);
        *now = alarm;
    }

    /// Returns why nothing is written, if nothing is.
    pub fn alarm(&self) -> Option<String> {
        let own = self.alarm.lock().clone();
        own.or_else(|| self.recorded_alarm())
    }

    /// Returns why nothing is written, as the map says: for this leader and those to come.
    pub fn recorded_alarm(&self) -> Option<String> {
        self.apply_state.read_only()
    }

    fn ensure_writable(&self) -> Result<(), ProposeError> {
        if let Some(reason) = self.context.log.lacks_room() {
            return Err(ProposeError::NoRoom { reason });
        }
        if !self.is_read_only.load(Ordering::Relaxed) && !self.apply_state.is_read_only() {
            return Ok(());
        }
        Err(ProposeError::ReadOnly {
            reason: self.alarm().unwrap_or_default(),
        })
    }

    /// Returns how often another map took the place of this replica's, which differed.
    pub fn rebuilt(&self) -> u64 {
        self.apply_state.rebuilt.load(Ordering::Relaxed)
    }

    /// A witness proposes nothing, also when it leads; nor does a leader that has stepped down.
    fn ensure_proposes(&self) -> Result<(), ProposeError> {
        let is_none = self.is_witness() || self.has_stepped_down(&self.watch.borrow());
        if is_none {
            Err(ProposeError::NotLeader { leader: None })
        } else {
            Ok(())
        }
    }

    async fn propose_entry(
        &self,
        entry: bytes::Bytes,
        deadline: Instant,
    ) -> Result<ApplyOutcome, ProposeError> {
        self.ensure_proposes()?;
        loop {
            if Instant::now() >= deadline {
                return Err(ProposeError::Expired);
            }
            let (sender, answered) = oneshot::channel::<ClientWriteResult<Types>>();
            let place = self.proposer.reserve(entry.len())?;
            let answer = ResponderFn(Box::new(move |result| {
                drop(place);
                drop(sender.send(result));
            }));
            if self
                .raft
                .client_write_ff(Proposal(entry.clone()), Some(answer))
                .await
                .is_err()
            {
                return Err(ProposeError::Stopped {
                    reason: self.stop_reason(),
                });
            }
            match tokio::time::timeout_at(deadline, answered).await {
                Ok(Ok(Ok(response))) => return Ok(response.data),
                Ok(Ok(Err(ClientWriteError::ForwardToLeader(ForwardToLeader {
                    reason: ForwardReason::LeaseExpired,
                    ..
                })))) => {
                    tokio::time::sleep(LEASE_PAUSE).await;
                }
                Ok(Ok(Err(error))) => return Err(propose_error(error)),
                Ok(Err(_)) => return Err(ProposeError::unknown("the replica stopped")),
                Err(_) => return Err(ProposeError::unknown("it was not applied in time")),
            }
        }
    }

    /// Returns when whatever was acknowledged before the call can be read from [`Replica::state`].
    pub async fn read_barrier(&self, deadline: Instant) -> Result<(), ReadError> {
        if self.is_witness() || self.has_stepped_down(&self.watch.borrow()) {
            return Err(ReadError::NotLeader { leader: None });
        }
        self.reads.confirm(deadline).await
    }

    /// Returns how long ago the map was last known to hold all that its leader had committed; none
    /// if that was not since the start.
    ///
    /// A leader's own is complete for as long as nobody else can lead: for ever where it is the
    /// only voter, and for the length of its lease where reads rest on leases. Else it is as old as
    /// the last answer of a quorum: one that is cut off must not pass for fresh.
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

    /// Returns how long ago a quorum answered what this replica, which leads, sent then: `acked`,
    /// as openraft has it. The only voter is its own quorum, and openraft notes no time for that.
    ///
    /// It is given what it needs of the metrics, because its caller may be reading them: a second
    /// read would wait for ever, behind a writer that waits for the first.
    fn quorum_acked(&self, watch: &ReplicaWatch, acked: Option<Duration>) -> Option<Duration> {
        let is_alone =
            watch.role == Role::Leader && watch.membership.voters.keys().eq([&self.key.replica]);
        if is_alone {
            Some(Duration::ZERO)
        } else {
            acked
        }
    }

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
        RaftStatus {
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
        }
    }

    /// Returns why this replica applies nothing more, if it was not asked to stop. A map may have
    /// failed that is applied to only with the next entry.
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

    /// Returns how many writes wait to be proposed here, and how many reads to be confirmed.
    pub fn queued(&self) -> (usize, usize) {
        (self.proposer.queued_len(), self.reads.queued_len())
    }

    /// What changes seldom: the leader, the membership, a failure.
    pub fn watch(&self) -> watch::Receiver<ReplicaWatch> {
        self.watch.clone()
    }

    /// As far as this replica knows.
    pub fn leads(&self) -> bool {
        let watch = self.watch.borrow();
        watch.role == Role::Leader && !self.has_stepped_down(&watch)
    }

    pub fn leader(&self) -> Option<Leader> {
        let watch = self.watch.borrow();
        watch.leader.filter(|_| !self.has_stepped_down(&watch))
    }

    /// Index of the last applied entry, as it grows.
    pub fn watch_applied(&self) -> watch::Receiver<u64> {
        self.apply_state.applied.subscribe()
    }

    /// Whether the group has begun, as this replica knows.
    pub fn is_initialized(&self) -> bool {
        self.watch.borrow().membership.log_id.is_some()
    }

    /// Whether this replica leads and knows of the other that it has, but for a few entries, the
    /// same log.
    pub fn is_caught_up(&self, replica: ReplicaId) -> bool {
        let status = self.status();
        let is_known = replica == self.key.replica
            || status.matched.get(&replica).is_some_and(Option::is_some);
        status.role == Role::Leader && is_known && lag(&status, replica) <= TRANSFER_LAG_MAX
    }

    /// The members that have all that is committed, as far as this replica knows, which leads.
    pub fn complete(&self) -> BTreeSet<ReplicaId> {
        let status = self.status();
        let has_all =
            |matched: &Option<LogId>| status.role == Role::Leader && *matched >= status.committed;
        status
            .matched
            .iter()
            .filter(|(_, matched)| has_all(matched))
            .map(|(replica, _)| *replica)
            .collect()
    }

    /// Hands the leadership to a voter with a map that has, but for a few entries, what this
    /// replica has, and waits until it leads. From the first moment on nothing is written here.
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), TransferError> {
        self.transfer_leader_within(to, TRANSFER_TIMEOUT).await
    }

    pub async fn transfer_leader_within(
        &self,
        to: ReplicaId,
        timeout: Duration,
    ) -> Result<(), TransferError> {
        let status = self.status();
        if status.role != Role::Leader {
            return Err(TransferError::NotLeader {
                leader: status.leader,
            });
        }
        if to == self.key.replica {
            return Ok(());
        }
        if !status.membership.voters.contains_key(&to) || status.membership.is_witness(to) {
            return Err(TransferError::NoVoter(to));
        }
        let entries = lag(&status, to);
        if entries > TRANSFER_LAG_MAX {
            return Err(TransferError::Behind {
                replica: to,
                entries,
            });
        }
        let mut watch = self.watch();
        self.raft
            .trigger()
            .transfer_leader(to)
            .await
            .map_err(|_| TransferError::Stopped)?;
        let taken = watch.wait_for(|now| {
            now.failure.is_some() || now.leader.is_some_and(|leader| leader.replica == to)
        });
        match tokio::time::timeout(timeout, taken).await {
            Ok(Ok(now)) if now.failure.is_none() => Ok(()),
            Ok(_) => Err(TransferError::Stopped),
            Err(_) => Err(TransferError::Late { to, timeout }),
        }
    }

    /// All lanes from this node broke. If it leads, it has probably just ended, and another is
    /// elected soon, unless it is heard of before. Not where reads rest on leases.
    pub(super) fn on_leader_disconnected(&self, node: NodeId) {
        if self.timings.lease != LeaseReads::Off {
            return;
        }
        let watch = self.watch.borrow();
        let leader = watch
            .leader
            .filter(|leader| leader.replica != self.key.replica);
        if let Some(leader) =
            leader.filter(|leader| watch.membership.node_of(leader.replica) == Some(node))
        {
            self.timer
                .on_leader_disconnected(watch.membership.rank_after(leader.replica, self.key));
        }
    }

    /// Takes the lease of a leader that has probably just ended for ended too, so that this replica
    /// may campaign, and may vote. Were the leader alive after all, an election would cost the
    /// group a moment, and nothing that was acknowledged.
    ///
    /// False if it is not, and holds a lease: then there is no vote for others. openraft would say
    /// the same, but renews no lease that it was once told to take for ended.
    pub(super) fn end_lease_if_disconnected(&self) -> bool {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = GroupMembership::from(&*metrics.membership_config);
        let Some(leader) = metrics
            .current_leader
            .filter(|leader| *leader != self.key.replica)
        else {
            return true;
        };
        let is_disconnected = membership
            .node_of(leader)
            .is_some_and(|node| self.context.lanes.is_disconnected(node));
        if is_disconnected && self.timings.lease == LeaseReads::Off {
            // A replica that is told of another's lead than its own does no more than that.
            let request = TransferLeaderRequest::<Types>::new(metrics.vote, leader, None);
            let _ = unconstrained(self.raft.handle_transfer_leader(request)).now_or_never();
            return true;
        }
        !self.timer.is_leased()
    }

    /// Returns whom to hand over to when it does not matter to whom.
    pub fn best_successor(&self) -> Option<ReplicaId> {
        self.best_successor_among(|_| true)
    }

    /// Returns the voter with a map that has what is committed, was heard of most lately and has
    /// most of the log, among those on nodes that `may_lead`.
    pub fn best_successor_among(&self, may_lead: impl Fn(NodeId) -> bool) -> Option<ReplicaId> {
        let status = self.status();
        let others = status
            .membership
            .voters
            .iter()
            .filter(|(replica, _)| {
                **replica != self.key.replica && !status.membership.is_witness(**replica)
            })
            .filter(|(_, node)| may_lead(**node));
        let candidates = others.filter(|(replica, _)| lag(&status, **replica) <= TRANSFER_LAG_MAX);
        // One whose disk hangs lacks little of a group that is idle, and can't be elected.
        let has_all = |replica: &ReplicaId| {
            status
                .matched
                .get(replica)
                .is_some_and(|matched| *matched >= status.committed)
        };
        let best = candidates.max_by_key(|(replica, node)| {
            (
                has_all(replica),
                self.context.lanes.last_heard(**node),
                std::cmp::Reverse(lag(&status, **replica)),
            )
        });
        best.map(|(replica, _)| *replica)
    }

    /// Writes a snapshot file of what is applied, and purges what it covers but for a tail. At most
    /// one replica of a node does this at a time; an error leaves everything as it was.
    pub async fn build_snapshot(&self) -> Result<(), StoreError> {
        let _turn = self.context.snapshot_turns.acquire().await;
        let snapshot = state_machine::build(self.state()).await?;
        // It takes the file that was just written.
        let _ = self.raft.trigger().snapshot().await;
        if let Some(snapshot) = snapshot.applied().log_id {
            self.purge_behind(snapshot).await;
        }
        Ok(())
    }

    /// Bytes in the log that no snapshot covers.
    pub fn log_bytes_since_snapshot(&self) -> u64 {
        let snapshot = self.state().current_snapshot();
        self.log.bytes_since(
            snapshot
                .and_then(|snapshot| snapshot.applied().log_id)
                .map_or(0, |id| id.index),
        )
    }

    /// Bytes in the log that the last snapshot covers.
    pub fn log_bytes_behind_snapshot(&self) -> u64 {
        let purged = self.log.state().purged.map_or(0, |id| id.index);
        self.log
            .bytes_since(purged)
            .saturating_sub(self.log_bytes_since_snapshot())
    }

    /// Bytes of the last snapshot file; zero if there is none.
    pub fn snapshot_bytes(&self) -> u64 {
        self.state()
            .current_snapshot()
            .map_or(0, |snapshot| snapshot.bytes_len())
    }

    fn stop_reason(&self) -> String {
        self.apply_state
            .failure()
            .unwrap_or_else(|| SHUT_DOWN.to_owned())
    }

    /// It may have promised a leader, before it was started, not to vote for another yet.
    pub(super) fn may_be_leased(&self) -> bool {
        self.opened.elapsed() < self.timings.forgotten_lease()
    }

    /// Does what is due. If openraft is too busy to be told, it is not needed or will be due again.
    pub(super) fn tick(&self) {
        let due = {
            let watch = self.watch.borrow();
            let is_voter =
                |membership: &GroupMembership| membership.voters.contains_key(&self.key.replica);
            let is_voter = is_voter(&watch.membership) || is_voter(&watch.committed_membership);
            self.timer.take_action(ElectionRole::of(
                watch.role,
                is_voter,
                watch.membership.voters.len(),
            ))
        };
        match due {
            TimerAction::Nothing => {}
            TimerAction::Heartbeat => {
                drop(unconstrained(self.raft.trigger().heartbeat()).now_or_never())
            }
            TimerAction::Campaign => {
                self.context.elections.count_campaign();
                self.end_lease_if_disconnected();
                drop(unconstrained(self.raft.trigger().elect(true)).now_or_never());
            }
        }
    }

    /// Whether a vote of this term may be the leader's, as far as is known here.
    pub(super) fn is_current(&self, vote: &Vote) -> bool {
        vote.committed && vote.term >= self.watch.borrow().term
    }

    /// Whether entries wait for the disk.
    pub(super) fn has_unsynced(&self) -> bool {
        self.log.state().last > self.log.synced()
    }

    /// Runs something that belongs to the group, until the group ends.
    pub(super) fn supervise(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(tasks) = &mut *self.tasks.lock() {
            self.context.supervisor.start(tasks, "replica", task);
        }
    }

    /// Stops the replica. What waits is told so; entries under way are unknown.
    pub async fn shutdown(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        self.proposer.close(SHUT_DOWN);
        self.reads.close(SHUT_DOWN);
        // Else openraft would wait for a map that does not come any more.
        self.apply_state.hold.clear();
        let _ = self.raft.shutdown().await;
        let tasks = self.tasks.lock().take();
        if let Some(mut tasks) = tasks {
            tasks.shutdown().await;
        }
    }
}

fn lag(status: &RaftStatus, replica: ReplicaId) -> u64 {
    let last = status.last_log.map_or(0, |id| id.index);
    let matched = status.matched.get(&replica).copied().flatten();
    last.saturating_sub(matched.map_or(0, |id| id.index))
}

/// What the watchers of a group see now.
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

/// Publishes changes until openraft ends, and then why it did.
async fn monitor(
    key: ReplicaKey,
    raft: RaftHandle,
    apply_state: Arc<ApplyState>,
    publish: watch::Sender<ReplicaWatch>,
    (proposer, reads): (Arc<Proposer>, Arc<ReadIndex>),
    elections: Arc<Elections>,
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
