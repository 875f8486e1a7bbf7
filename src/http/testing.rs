//! Helps to test the serving side: a store in memory, whose failures can be chosen, and peers that
//! echo. `site` serves it on a port of its own, for a client that sends raw bytes.

mod site;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, ready};
use futures::stream::{BoxStream, StreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::timeout;

pub use self::site::{Reply, Site, Wire, request, router};
use super::{NotReady, PeerService, Readiness};
use crate::api::peer::{
    Announcement, DiskReport, FailureReport, Greeting, GreetingReply, HoldRequest, Hosting,
    Identity, PromiseReply, PromiseRequest, Standing,
};
use crate::api::protocol::{
    ClusterStatus, Hop, NodeStatus, ReplicaHealth, ReplicaStatus, ScrubStatus, ShardReply,
    ShardRequest, ShardStatus,
};
use crate::api::shard_map::ShardMap;
use crate::api::store::*;
use crate::api::view_change::{
    ChangeInProgress, Phase, PlannedChange, ReplicationFactor, ViewChange, ViewChangeFailure,
};
use crate::budget::{ANSWERS_BYTES_MAX, Budget};
use crate::sm::cluster::meta;
use crate::sm::cluster::view::{GroupSpec, NodeSpec, PlacementSpec, View};
use crate::sm::kv::{Action, Condition, Operation, OperationOutcome, Record, WriteRejection};
use crate::sm::level::LEVEL;
use crate::sm::placement::first_view;
use crate::sm::slots::slot_of;
use crate::types::{
    Address, ClusterId, DirectoryId, GroupId, MapVersion, NodeId, PlanEpoch, ReplicaId, Revision,
};

/// Longest wait of a test for something that should come at once.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Values of a page together.
const PAGE_BYTES_MAX: usize = 8 << 20;

/// A store of two shards in memory: keys whose first byte is below `n` are in shard 1, the others
/// in shard 2.
pub struct FakeStore {
    state: Mutex<State>,
    /// Of changes of the view, as far as it knows without being asked.
    are_over: watch::Sender<Option<bool>>,
    pub answers: Arc<Budget>,
}

impl Default for FakeStore {
    fn default() -> Self {
        let answers = Budget::new(ANSWERS_BYTES_MAX);
        let store = FakeStore {
            state: Mutex::default(),
            are_over: watch::Sender::new(None),
            answers,
        };
        store.set_nodes(&["a:1", "b:2", "c:3"]);
        store
    }
}

#[derive(Default)]
struct State {
    records: BTreeMap<Bytes, Record>,
    revision: u64,
    answered: HashMap<Bytes, (Vec<Operation>, Vec<Written>)>,
    failing: HashMap<GroupId, Failure>,
    running: u64,
    serves_stale: bool,
    /// So many requests are served before all fail so.
    failing_later: Option<(usize, Failure)>,
    failing_write: Option<Failure>,
    writes_take: Duration,
    reads_take: Duration,
    asked: Vec<Options>,
    nodes: Vec<Address>,
    asked_of_view: PlacementSpec,
    here: Option<NodeId>,
    cluster: Option<Arc<FakeStore>>,
    is_superseded: bool,
    /// Counts how often somebody asked how a change gets on.
    looks: usize,
    /// Of the plan that [`Store::status`] tells; none: the first.
    epoch: Option<PlanEpoch>,
}

fn shard(key: &[u8]) -> GroupId {
    GroupId(if key.first().is_none_or(|first| *first < b'n') {
        1
    } else {
        2
    })
}

impl FakeStore {
    /// Everything that shard is asked fails so from now on.
    pub fn fail(&self, shard: u64, failure: Failure) {
        self.state.lock().failing.insert(GroupId(shard), failure);
    }

    /// Returns how often somebody asked how a change gets on.
    pub fn looks(&self) -> usize {
        self.state.lock().looks
    }

    /// It knows by itself whether changes are over, from now on.
    pub fn hear_of_ends(&self, are_over: bool) {
        self.are_over.send_replace(Some(are_over));
    }

    /// The next so many who ask how a change gets on are told that it runs.
    pub fn take_time(&self, questions: u64) {
        self.state.lock().running = questions;
    }

    /// Everything fails so after so many more questions to a shard.
    pub fn fail_after(&self, questions: usize, failure: Failure) {
        self.state.lock().failing_later = Some((questions, failure));
    }

    /// The next write fails so, as a whole.
    pub fn fail_next_write(&self, failure: Failure) {
        self.state.lock().failing_write = Some(failure);
    }

    /// The answer to a write comes so late from now on, or not in time.
    pub fn slow_down_writes(&self, by: Duration) {
        self.state.lock().writes_take = by;
    }

    /// The same of the value of a key.
    pub fn slow_down_reads(&self, by: Duration) {
        self.state.lock().reads_take = by;
    }

    /// Nothing fails from now on.
    pub fn heal(&self) {
        let mut state = self.state.lock();
        state.failing_later = None;
        state.failing.clear();
    }

    /// Stale reads succeed from now on, whatever fails.
    pub fn serve_stale(&self) {
        self.state.lock().serves_stale = true;
    }

    /// The options of the last request.
    pub fn last_options(&self) -> Options {
        *self.state.lock().asked.last().expect("a request came")
    }

    /// The options of all requests, in their order.
    pub fn asked(&self) -> Vec<Options> {
        self.state.lock().asked.clone()
    }

    /// Returns how many requests came.
    pub fn requests(&self) -> usize {
        self.state.lock().asked.len()
    }

    fn in_progress(&self, id: PlanEpoch) -> ChangeInProgress {
        let mut state = self.state.lock();
        let left = state.running;
        state.running = left.saturating_sub(1);
        let phase = match left {
            0 if state.is_superseded && id == PlanEpoch(2) => Phase::Superseded,
            0 => Phase::Done,
            _ => Phase::Running,
        };
        ChangeInProgress {
            id,
            phase,
            replicas_left: left,
            slots_left: 0,
            bytes_left: 0,
            bytes_per_s: None,
            left_s: None,
            waiting_for: vec![],
        }
    }

    /// From now on the plan of the last change counts as overtaken by the next one.
    pub fn supersede(&self) {
        self.state.lock().is_superseded = true;
        self.set_epoch(3);
    }

    /// The plan that the view is said to be of.
    pub fn set_epoch(&self, epoch: u64) {
        self.state.lock().epoch = Some(PlanEpoch(epoch));
    }

    /// Sets what was asked of the view.
    pub fn set_asked(&self, asked: PlacementSpec) {
        self.state.lock().asked_of_view = asked;
    }

    /// This store is the node with this number; none: a client's.
    pub fn set_here(&self, here: Option<u64>) {
        self.state.lock().here = here.map(NodeId);
    }

    /// The cluster is this one, by way of the network.
    pub fn set_network(&self, cluster: Arc<FakeStore>) {
        self.state.lock().cluster = Some(cluster);
    }

    /// The nodes of [`Store::map`]: with up to three, each shard has a replica on every one.
    pub fn set_nodes(&self, addresses: &[&str]) {
        let nodes = addresses
            .iter()
            .map(|address| address.parse().expect("an address"))
            .collect();
        self.state.lock().nodes = nodes;
    }

    pub fn nodes(&self) -> Vec<String> {
        self.state
            .lock()
            .nodes
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    /// The shard of [`Store::map`] that owns the slot of `key`.
    pub fn owner(&self, key: &[u8]) -> GroupId {
        self.state.lock().view().slots.owner(slot_of(key))
    }

    fn adopt(&self, change: &ViewChange) {
        let mut state = self.state.lock();
        state.nodes = change.nodes.clone().unwrap_or_else(|| state.nodes.clone());
        let asked = &mut state.asked_of_view;
        asked.layout = change.layout.unwrap_or(asked.layout);
        if let Some(ReplicationFactor::Fixed(factor)) = change.replication_factor {
            asked.replication_factor = Some(factor);
        }
    }

    pub fn record(&self, key: &[u8]) -> Option<Record> {
        self.state.lock().records.get(key).cloned()
    }
}

impl State {
    fn view(&self) -> View {
        let node = |(address, id): (Address, u128)| NodeSpec {
            address,
            public_address: None,
            directory: DirectoryId(id),
        };
        let nodes = self.nodes.iter().cloned().zip(1..).map(node).collect();
        first_view(ClusterId(7), self.asked_of_view, nodes).expect("a view")
    }

    fn keys_of(&self, shard: GroupId) -> u64 {
        let view = self.view();
        self.records
            .keys()
            .filter(|key| view.slots.owner(slot_of(key)) == shard)
            .count() as u64
    }

    fn ask(&mut self, shard: GroupId, options: Options) -> Result<(), Failure> {
        self.asked.push(options);
        match &mut self.failing_later {
            Some((0, failure)) => return Err(failure.clone()),
            Some((left, _)) => *left -= 1,
            None => {}
        }
        if self.serves_stale && options.consistency == Consistency::Stale {
            return Ok(());
        }
        self.failing
            .get(&shard)
            .map_or(Ok(()), |failure| Err(failure.clone()))
    }

    fn holds(&self, operation: &Operation) -> Result<(), Option<Revision>> {
        let current = self
            .records
            .get(&operation.key)
            .map(|record| record.revision);
        let holds = match &operation.condition {
            Condition::None => true,
            Condition::Absent => current.is_none(),
            Condition::Present => current.is_some(),
            Condition::RevisionIn(these) => current.is_some_and(|current| these.contains(&current)),
            Condition::RevisionNotIn(these) => {
                current.is_none_or(|current| !these.contains(&current))
            }
        };
        if holds { Ok(()) } else { Err(current) }
    }

    fn apply(&mut self, operation: &Operation) -> OperationOutcome {
        let exists = self.records.contains_key(&operation.key);
        match &operation.action {
            Action::Get => OperationOutcome::Got(self.records.get(&operation.key).cloned()),
            Action::Put { media, value } => {
                self.revision += 1;
                let revision = Revision(self.revision);
                let record = Record {
                    revision,
                    media: media.clone(),
                    value: value.clone(),
                };
                self.records.insert(operation.key.clone(), record);
                OperationOutcome::Put {
                    revision,
                    created: !exists,
                }
            }
            Action::Delete if exists => {
                self.revision += 1;
                self.records.remove(&operation.key);
                OperationOutcome::Deleted {
                    revision: Some(Revision(self.revision)),
                }
            }
            Action::Delete => OperationOutcome::Deleted { revision: None },
        }
    }

    fn write(&mut self, operations: &[Operation], options: Options) -> Vec<Written> {
        let mut verdicts: HashMap<GroupId, WriteFailure> = HashMap::new();
        for (position, operation) in operations.iter().enumerate() {
            let shard = shard(&operation.key);
            let failure = match (self.ask(shard, options), self.holds(operation)) {
                (Err(failure), _) => WriteFailure::Failed(failure),
                (Ok(()), Err(current)) => WriteFailure::Rejected(WriteRejection::ConditionFailed {
                    operation: position,
                    current,
                }),
                (Ok(()), Ok(())) => continue,
            };
            verdicts.entry(shard).or_insert(failure);
        }
        let written =
            operations
                .iter()
                .map(|operation| match verdicts.get(&shard(&operation.key)) {
                    Some(failure) => Err(failure.clone()),
                    None => Ok(self.apply(operation)),
                });
        written.collect()
    }
}

impl Store for FakeStore {
    fn answers(&self) -> Arc<Budget> {
        Arc::clone(&self.answers)
    }

    fn get(&self, key: Bytes, options: Options) -> BoxFuture<'_, Result<GetOutcome, Failure>> {
        let mut state = self.state.lock();
        let staleness =
            (options.consistency == Consistency::Stale).then_some(Staleness::AtMost { age_ms: 12 });
        let found = state.ask(shard(&key), options).map(|()| GetOutcome {
            record: state.records.get(&key).cloned(),
            staleness,
        });
        let takes = state.reads_take;
        Box::pin(async move {
            let late = || {
                Err(Failure::Unavailable {
                    reason: "not in time".into(),
                    retry_after_ms: 1000,
                })
            };
            if in_time(takes, options).await {
                found
            } else {
                late()
            }
        })
    }

    fn get_many(
        &self,
        request: GetManyRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<Vec<Option<Record>>, Failure>> {
        let mut state = self.state.lock();
        let (mut records, mut bytes) = (Vec::new(), 0);
        for key in &request.keys {
            if let Err(failure) = state.ask(shard(key), options) {
                return Box::pin(ready(Err(failure)));
            }
            let mut record = state.records.get(key).cloned();
            if let Some(record) = record.as_mut().filter(|_| request.keys_only) {
                record.value = Bytes::new();
            }
            bytes += record.as_ref().map_or(0, |record| record.value.len());
            records.push(record);
            if bytes >= request.bytes_max {
                break;
            }
        }
        Box::pin(ready(Ok(records)))
    }

    fn write(
        &self,
        operations: Vec<Operation>,
        idempotency_key: Option<Bytes>,
        options: Options,
    ) -> BoxFuture<'_, Vec<Written>> {
        let mut state = self.state.lock();
        let Some(key) = idempotency_key else {
            let count = operations.len();
            let failed = move |failure| vec![Err(WriteFailure::Failed(failure)); count];
            let written = state
                .failing_write
                .take()
                .map_or_else(|| state.write(&operations, options), failed);
            let takes = state.writes_take;
            return Box::pin(async move {
                let late = || {
                    failed(Failure::Unknown {
                        reason: "not in time".into(),
                    })
                };
                if in_time(takes, options).await {
                    written
                } else {
                    late()
                }
            });
        };
        let written = match state.answered.get(&key) {
            Some((before, written)) if *before == operations => written.clone(),
            Some(_) => {
                let slot = crate::types::Slot::all().next().expect("there are slots");
                vec![
                    Err(WriteFailure::Rejected(WriteRejection::KeyReused { slot }));
                    operations.len()
                ]
            }
            None => {
                let written = state.write(&operations, options);
                state.answered.insert(key, (operations, written.clone()));
                written
            }
        };
        Box::pin(ready(written))
    }

    fn locate(&self, key: Bytes, options: Options) -> BoxFuture<'_, Result<(), Failure>> {
        let state = self.state.lock();
        let failure = state.failing.get(&shard(&key)).cloned();
        let sent_away = failure.filter(|failure| matches!(failure, Failure::Elsewhere { .. }));
        Box::pin(ready(match (options.routing, sent_away) {
            (Routing::Redirect, Some(failure)) => Err(failure),
            (Routing::Redirect | Routing::Proxy, _) => Ok(()),
        }))
    }

    fn scan(
        &self,
        request: ScanRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<MergedPage, Failure>> {
        let mut state = self.state.lock();
        let asked = state.ask(GroupId(1), options);
        let range = request.range;
        let inside =
            |key: &Bytes| *key >= range.start && range.end.as_ref().is_none_or(|end| key < end);
        let items = state
            .records
            .iter()
            .filter(|(key, _)| inside(key))
            .map(|(key, record)| {
                let value = if request.keys_only {
                    Bytes::new()
                } else {
                    record.value.clone()
                };
                Item {
                    key: key.clone(),
                    record: Record {
                        value,
                        ..record.clone()
                    },
                }
            });
        let mut items: Vec<Item> = items.collect();
        if request.reverse {
            items.reverse();
        }
        let mut bytes = 0;
        let fits = |item: &&Item| {
            let first = bytes == 0;
            bytes += item.record.value.len();
            first || bytes <= PAGE_BYTES_MAX
        };
        let fitting = items.iter().take(request.limit).take_while(fits).count();
        let more = items.len() > fitting;
        items.truncate(fitting);
        Box::pin(ready(asked.map(|()| MergedPage { items, more })))
    }

    fn count(&self, _: Options) -> BoxFuture<'_, Result<Vec<(GroupId, u64)>, Failure>> {
        let state = self.state.lock();
        let counts = state
            .view()
            .shards()
            .map(|(shard, _)| (shard, state.keys_of(shard)))
            .collect();
        Box::pin(ready(Ok(counts)))
    }

    fn count_shard(&self, shard: GroupId, options: Options) -> BoxFuture<'_, Result<u64, Failure>> {
        let mut state = self.state.lock();
        Box::pin(ready(
            state.ask(shard, options).map(|()| state.keys_of(shard)),
        ))
    }

    fn this_node(&self) -> Option<NodeId> {
        self.state.lock().here
    }

    fn contact(&self, shard: GroupId) -> BoxFuture<'_, Option<Address>> {
        let view = self.state.lock().view();
        let home = view
            .groups
            .get(&shard)
            .and_then(|group| view.nodes.get(&group.home));
        Box::pin(ready(home.map(|home| home.address.clone())))
    }

    fn by_network(&self, _: &[Address]) -> Option<Arc<dyn Store>> {
        let cluster = self.state.lock().cluster.clone()?;
        Some(cluster)
    }

    /// Shards as they would be at the nodes, which has nothing to do with where this store keeps
    /// its keys.
    fn map(&self, _: Options) -> BoxFuture<'_, Result<Arc<ShardMap>, Failure>> {
        let state = self.state.lock();
        let map = ShardMap::from_view(&state.view(), |_| None);
        Box::pin(ready(Ok::<_, Failure>(Arc::new(map))))
    }

    fn status(&self) -> BoxFuture<'_, Result<ClusterStatus, Failure>> {
        let View {
            nodes,
            groups,
            placement: asked,
            slots,
            ..
        } = self.state.lock().view();
        let node = |(id, node): (NodeId, NodeSpec)| NodeStatus {
            id,
            public_address: node.public().clone(),
            address: node.address,
            directory: node.directory,
            reachable: true,
            leaving: false,
            speaks: None,
            holds_level: false,
            failed: vec![],
        };
        let replica = |(id, node): (&ReplicaId, &NodeId)| ReplicaStatus {
            id: *id,
            node: *node,
            health: ReplicaHealth::Following,
            applied: None,
            leaving: false,
        };
        let shard = |(id, group): (&GroupId, &GroupSpec)| ShardStatus {
            id: *id,
            home: group.home,
            leader: None,
            term: None,
            keys: None,
            bytes: None,
            slots: slots.slots_of(*id).count() as u64,
            replicas: group.replicas.iter().map(replica).collect(),
            witness: None,
            alarm: None,
        };
        Box::pin(ready(Ok(ClusterStatus {
            cluster: ClusterId(7),
            epoch: self.state.lock().epoch.unwrap_or(PlanEpoch(1)),
            version: MapVersion(2),
            level: 0,
            asked,
            answered_by: NodeId(1),
            meta_leader: None,
            nodes: nodes.into_iter().map(node).collect(),
            shards: groups
                .iter()
                .filter(|(id, _)| !id.is_meta())
                .map(shard)
                .collect(),
            moves: vec![],
            slots_astray: 0,
            settled: true,
            slots: slots.clone(),
        })))
    }

    fn transfer_leader(
        &self,
        shard: GroupId,
        to: Option<Address>,
        _: Options,
    ) -> BoxFuture<'_, Result<Address, Failure>> {
        let home = || "home:1".parse().expect("an address");
        Box::pin(ready(match shard {
            GroupId(1) => Ok(to.unwrap_or_else(home)),
            other => Err(Failure::Invalid {
                reason: format!("there is no shard {other}"),
            }),
        }))
    }

    fn change_view(
        &self,
        change: ViewChange,
        only_if: Option<PlanEpoch>,
        _: Options,
    ) -> BoxFuture<'_, Result<ChangeInProgress, ViewChangeFailure>> {
        let current = PlanEpoch(1);
        let answer = match (change.nodes.as_deref(), only_if) {
            (_, Some(epoch)) if epoch != current => {
                Err(ViewChangeFailure::EpochChanged { current })
            }
            (Some([]), _) => Err(ViewChangeFailure::Refused {
                reason: "there are no nodes".into(),
            }),
            (Some([node, ..]), _) if node.host() == "silent" => Err(ViewChangeFailure::NotReady {
                reason: format!("{node} does not answer"),
            }),
            _ => {
                self.adopt(&change);
                Ok(self.in_progress(PlanEpoch(2)))
            }
        };
        Box::pin(ready(answer))
    }

    fn plan_view(
        &self,
        _: ViewChange,
        _: Options,
    ) -> BoxFuture<'_, Result<PlannedChange, ViewChangeFailure>> {
        Box::pin(ready(Ok(PlannedChange {
            base: PlanEpoch(1),
            is_same: true,
            nodes_added: vec![],
            nodes_removed: vec![],
            replicas_added: 0,
            replicas_removed: 0,
            shards_added: 0,
            shards_removed: 0,
            slots_moved: 0,
            slots_kept: 4096,
            bytes_moved: 0,
        })))
    }

    fn operation(
        &self,
        id: PlanEpoch,
        _: Options,
    ) -> BoxFuture<'_, Result<Option<ChangeInProgress>, Failure>> {
        let newest = {
            let mut state = self.state.lock();
            state.looks += 1;
            state.epoch.map_or(2, |epoch| epoch.0.max(2))
        };
        Box::pin(ready(Ok((id.0 <= newest).then(|| self.in_progress(id)))))
    }

    fn await_change(&self, _: PlanEpoch, at_most: Duration) -> BoxFuture<'_, Option<bool>> {
        let mut are_over = self.are_over.subscribe();
        Box::pin(async move {
            let told = timeout(
                at_most,
                are_over.wait_for(|are_over| *are_over == Some(true)),
            )
            .await;
            told.map_or_else(|_| *self.are_over.borrow(), |_| Some(true))
        })
    }
}

/// Waits as long as it takes, or as the caller does at most. Returns true if it is done by then.
async fn in_time(takes: Duration, options: Options) -> bool {
    if !takes.is_zero() {
        tokio::time::sleep(takes.min(options.timeout)).await;
    }
    takes <= options.timeout
}

/// Ready until told otherwise.
#[derive(Default)]
pub struct Switch(pub Mutex<Option<NotReady>>);

impl Readiness for Switch {
    fn ready(&self) -> Result<(), NotReady> {
        self.0.lock().clone().map_or(Ok(()), Err)
    }
}

/// Echoes: lanes in capitals, everything else as it is.
struct Echo;

impl PeerService for Echo {
    fn lane(
        &self,
        lane: &str,
        incoming: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> BoxStream<'static, Bytes> {
        let hello = Bytes::from(format!("lane {lane}\n"));
        let echoed = incoming
            .filter_map(|data| ready(data.ok()))
            .map(|data| Bytes::from(data.to_ascii_uppercase()));
        futures::stream::iter([hello]).chain(echoed).boxed()
    }

    fn shard(&self, request: ShardRequest, _: Hop) -> BoxFuture<'_, ShardReply> {
        Box::pin(ready(ShardReply::Counted {
            keys: request.timeout_ms,
            slots: vec![],
        }))
    }

    fn identity(&self) -> Identity {
        identity()
    }

    fn invite(&self, _: Vec<Address>) {}

    fn hold_level(&self, request: HoldRequest) -> BoxFuture<'_, Result<(), Failure>> {
        let other = || {
            Err(Failure::Invalid {
                reason: "another cluster".into(),
            })
        };
        Box::pin(ready(if request.cluster == ClusterId(7) {
            Ok(())
        } else {
            other()
        }))
    }

    fn disk_reported(&self, _: DiskReport) -> Result<(), Failure> {
        Ok(())
    }

    fn scrub_status(&self) -> Result<ScrubStatus, Failure> {
        Ok(ScrubStatus::default())
    }

    fn begin_scrub(&self) -> Result<ScrubStatus, Failure> {
        Ok(ScrubStatus {
            number: 1,
            is_running: true,
            ..ScrubStatus::default()
        })
    }

    fn view(&self) -> BoxFuture<'_, Result<View, Failure>> {
        Box::pin(ready(Err(Failure::Unavailable {
            reason: "it leads nothing".to_owned(),
            retry_after_ms: 1,
        })))
    }

    fn promise(&self, request: PromiseRequest) -> BoxFuture<'_, PromiseReply> {
        Box::pin(ready(PromiseReply::Refused {
            reason: format!("not to {}", request.founder_address),
        }))
    }

    fn hosting(&self) -> BoxFuture<'_, Hosting> {
        Box::pin(ready(Hosting {
            directory: identity().directory,
            replicas: vec![],
            failed: vec![],
            speaks: LEVEL,
            holds_level: false,
            lacks_room: false,
            is_stopping: false,
        }))
    }

    fn failures_reported(&self, report: FailureReport) -> Result<(), Failure> {
        match report.cluster {
            ClusterId(7) => Ok(()),
            _ => Err(Failure::Invalid {
                reason: "another cluster".into(),
            }),
        }
    }

    fn greeted(&self, greeting: Greeting) -> BoxFuture<'_, GreetingReply> {
        Box::pin(ready(GreetingReply::Welcome(greeting)))
    }

    fn announce(
        &self,
        announcement: Announcement,
    ) -> BoxFuture<'_, Result<meta::MetaOutcome, Failure>> {
        Box::pin(ready(match announcement.command {
            meta::MetaCommand::Announce { .. } => Ok(meta::MetaOutcome::Done),
            _ => Err(Failure::Unavailable {
                reason: "not the meta leader".into(),
                retry_after_ms: 1,
            }),
        }))
    }
}

/// A member's, whose view has maps with numbers for keys.
pub fn identity() -> Identity {
    let address: Address = "a:1".parse().expect("an address");
    let node = NodeSpec {
        address: address.clone(),
        public_address: None,
        directory: DirectoryId(5),
    };
    let view =
        first_view(ClusterId(7), PlacementSpec::default(), vec![node]).expect("a view of one node");
    let standing = Standing::Member {
        view: Box::new(view),
    };
    Identity {
        directory: DirectoryId(5),
        address,
        public_address: None,
        standing,
        speaks: LEVEL,
        level: 0,
        start: None,
        holds_level: false,
    }
}
