//! The router over a fake cluster of shards in memory, whose replies can be scripted. Time is
//! paused.

use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};

use super::pause::PAUSE_MAX;
use super::write::{SHARD_BYTES_MAX, SHARD_OPERATIONS_MAX};
use super::*;
use crate::api::protocol::{NodeStatus, ReplicaHealth, ReplicaStatus, ShardPage, ShardStatus};
use crate::api::store::{Consistency, Item, Routing, ScanRange, WriteFailure};
use crate::api::view_change::{ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::sm::cluster::view::{PlacementSpec, SlotTable};
use crate::sm::kv::{
    Action, Condition, Media, OperationOutcome, Record, Write, WriteOutcome, WriteRejection,
};
use crate::sm::slots::slot_of;
use crate::types::{ClusterId, DirectoryId, MoveId, NodeId, PlanEpoch, ReplicaId, Revision, Slot};

/// A scripted call does this instead of being served.
#[derive(Clone)]
enum Script {
    Reply(ShardReply),
    /// Is served, but the reply is lost.
    ServeAndLose,
}

#[derive(Default)]
struct State {
    /// The truth, which the map may lag behind.
    owner: BTreeMap<Slot, GroupId>,
    shards: BTreeMap<GroupId, BTreeMap<Bytes, Record>>,
    scripts: BTreeMap<GroupId, VecDeque<Script>>,
    remembered: BTreeMap<Bytes, WriteOutcome>,
    map: Option<Arc<ShardMap>>,
    /// The map that a refresh finds.
    next_map: Option<Arc<ShardMap>>,
    calls: Vec<(GroupId, Options)>,
    /// The time that a refresh waits for news.
    refresh_takes: Duration,
    /// Moves a slot once, after this many calls.
    move_after: Option<(usize, Slot, GroupId)>,
    /// No shard has a leader.
    is_leaderless: bool,
    /// Shards read, and take no writes.
    is_full: bool,
}

#[derive(Default)]
struct Fake {
    state: Mutex<State>,
    /// Told when there is another leader.
    elected: tokio::sync::Notify,
}

impl Fake {
    fn state(&self) -> parking_lot::MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn serve(&mut self, shard: GroupId, body: ShardBody) -> ShardReply {
        match body {
            ShardBody::Get { key, .. } => {
                let slot = slot_of(&key);
                if self.owner[&slot] != shard {
                    return ShardReply::NotOwned { slot };
                }
                ShardReply::Got(GetOutcome {
                    record: self.shards[&shard].get(&key).cloned(),
                    staleness: None,
                })
            }
            ShardBody::GetMany {
                keys, bytes_max, ..
            } => {
                let (mut records, mut bytes) = (Vec::new(), 0);
                for key in keys {
                    let slot = slot_of(&key);
                    match self.owner[&slot] == shard {
                        false if records.is_empty() => return ShardReply::NotOwned { slot },
                        false => break,
                        true => records.push(self.shards[&shard].get(&key).cloned()),
                    }
                    bytes += records
                        .last()
                        .and_then(Option::as_ref)
                        .map_or(0, |record| record.value.len());
                    if bytes >= bytes_max {
                        break;
                    }
                }
                ShardReply::GotMany(records)
            }
            ShardBody::Write(write) => ShardReply::Written(self.write(shard, write)),
            ShardBody::Scan {
                range,
                reverse,
                limit,
                ..
            } => ShardReply::Page(self.page(shard, &range, reverse, limit)),
            ShardBody::Count => {
                let slots = self.slots_of(shard);
                let keys = self.shards[&shard]
                    .keys()
                    .filter(|key| self.owner[&slot_of(key)] == shard)
                    .count();
                ShardReply::Counted {
                    keys: keys as u64,
                    slots,
                }
            }
            ShardBody::Move(_) | ShardBody::MoveState { .. } => ShardReply::Failed(unavailable()),
        }
    }

    fn slots_of(&self, shard: GroupId) -> Vec<Slot> {
        self.owner
            .iter()
            .filter(|(_, owner)| **owner == shard)
            .map(|(slot, _)| *slot)
            .collect()
    }

    fn write(&mut self, shard: GroupId, write: Write) -> WriteOutcome {
        if let Some(slot) = write
            .operations
            .iter()
            .map(|op| slot_of(&op.key))
            .find(|slot| self.owner[slot] != shard)
        {
            let moved_to = Some((MoveId(1), self.owner[&slot]));
            return WriteOutcome::Rejected(WriteRejection::WrongOwner { slot, moved_to });
        }
        if let Some(outcome) = write
            .idempotency_key
            .as_ref()
            .and_then(|key| self.remembered.get(key))
        {
            return outcome.clone();
        }
        let map = self.shards.get_mut(&shard).expect("a shard");
        for (operation, op) in write.operations.iter().enumerate() {
            if op.condition == Condition::Absent && map.contains_key(&op.key) {
                let current = Some(map[&op.key].revision);
                return WriteOutcome::Rejected(WriteRejection::ConditionFailed {
                    operation,
                    current,
                });
            }
        }
        let apply = |op: &Operation| match &op.action {
            Action::Get => OperationOutcome::Got(map.get(&op.key).cloned()),
            Action::Delete => OperationOutcome::Deleted {
                revision: map.remove(&op.key).map(|record| record.revision),
            },
            Action::Put { media, value } => {
                let revision = Revision(map.get(&op.key).map_or(1, |record| record.revision.0 + 1));
                let record = Record {
                    revision,
                    media: media.clone(),
                    value: value.clone(),
                };
                OperationOutcome::Put {
                    revision,
                    created: map.insert(op.key.clone(), record).is_none(),
                }
            }
        };
        let outcome = WriteOutcome::Applied(write.operations.iter().map(apply).collect());
        if let Some(key) = write.idempotency_key {
            self.remembered.insert(key, outcome.clone());
        }
        outcome
    }

    fn page(&self, shard: GroupId, range: &ScanRange, reverse: bool, limit: usize) -> ShardPage {
        let owned = |key: &Bytes| self.owner[&slot_of(key)] == shard;
        let within =
            |key: &Bytes| *key >= range.start && range.end.as_ref().is_none_or(|end| key < end);
        let mut items: Vec<Item> = self.shards[&shard]
            .iter()
            .filter(|(key, _)| owned(key) && within(key))
            .map(|(key, record)| Item {
                key: key.clone(),
                record: record.clone(),
            })
            .collect();
        if reverse {
            items.reverse();
        }
        let more = items.len() > limit;
        items.truncate(limit);
        ShardPage {
            items,
            more,
            slots: self.slots_of(shard),
        }
    }

    /// Moves a slot with its keys; the map does not know it yet.
    fn move_slot(&mut self, slot: Slot, to: GroupId) {
        let from = self.owner.insert(slot, to).expect("a slot");
        let keys = std::mem::take(self.shards.get_mut(&from).expect("a shard"));
        let (moved, kept) = keys.into_iter().partition(|(key, _)| slot_of(key) == slot);
        let mut moved: BTreeMap<Bytes, Record> = moved;
        self.shards.insert(from, kept);
        self.shards
            .get_mut(&to)
            .expect("a shard")
            .append(&mut moved);
        let newest = [&self.map, &self.next_map]
            .into_iter()
            .flatten()
            .map(|map| map.version.0)
            .max();
        self.next_map = Some(Arc::new(map_of(self, newest.unwrap_or(0) + 1)));
    }
}

impl ShardAccess for Fake {
    fn map(&self) -> Option<Arc<ShardMap>> {
        self.state().map.clone()
    }

    async fn refresh(&self, older_than: MapVersion) {
        let takes = self.state().refresh_takes;
        tokio::time::sleep(takes).await;
        let mut state = self.state();
        if let Some(next) = state
            .next_map
            .clone()
            .filter(|next| next.version > older_than)
        {
            state.map = Some(next);
        }
    }

    async fn call(&self, shard: GroupId, body: ShardBody, options: Options) -> ShardReply {
        let mut state = self.state();
        state.calls.push((shard, options));
        let calls = state.calls.len();
        if let Some((_, slot, to)) = state.move_after.take_if(|(after, _, _)| calls > *after) {
            state.move_slot(slot, to);
        }
        if state.is_leaderless || (state.is_full && !body.is_read()) {
            return ShardReply::Failed(unavailable());
        }
        match state.scripts.get_mut(&shard).and_then(VecDeque::pop_front) {
            None => state.serve(shard, body),
            Some(Script::Reply(reply)) => reply,
            Some(Script::ServeAndLose) => {
                state.serve(shard, body);
                ShardReply::Failed(unknown())
            }
        }
    }

    async fn lead_changed(&self, _: GroupId) {
        self.elected.notified().await;
    }

    async fn contact(&self, _: GroupId) -> Option<Address> {
        None
    }

    async fn status(&self) -> Result<ClusterStatus, Failure> {
        Ok(status_of(&self.state(), 1))
    }

    async fn transfer_leader(
        &self,
        _: GroupId,
        _: Option<Address>,
        _: Options,
    ) -> Result<Address, Failure> {
        Err(unavailable())
    }

    async fn change_view(
        &self,
        _: ViewChange,
        _: Option<PlanEpoch>,
        _: Options,
    ) -> Result<ChangeInProgress, ViewChangeFailure> {
        Err(ViewChangeFailure::Failed(unavailable()))
    }

    async fn plan_view(
        &self,
        _: ViewChange,
        _: Options,
    ) -> Result<PlannedChange, ViewChangeFailure> {
        Err(ViewChangeFailure::Failed(unavailable()))
    }

    async fn operation(
        &self,
        _: PlanEpoch,
        _: Options,
    ) -> Result<Option<ChangeInProgress>, Failure> {
        Err(unavailable())
    }
}

fn status_of(state: &State, version: u64) -> ClusterStatus {
    let address: Address = "a:1".parse().expect("an address");
    let replica = ReplicaStatus {
        id: ReplicaId(1),
        node: NodeId(1),
        health: ReplicaHealth::Leading,
        applied: None,
        leaving: false,
    };
    let shard = |id: &GroupId| ShardStatus {
        id: *id,
        home: NodeId(1),
        leader: None,
        term: None,
        keys: None,
        bytes: None,
        slots: 0,
        replicas: vec![replica.clone()],
        witness: None,
        alarm: None,
    };
    ClusterStatus {
        cluster: ClusterId(1),
        epoch: PlanEpoch(1),
        version: MapVersion(version),
        level: 0,
        asked: PlacementSpec::default(),
        answered_by: NodeId(1),
        meta_leader: None,
        nodes: vec![NodeStatus {
            id: NodeId(1),
            address: address.clone(),
            public_address: address,
            directory: DirectoryId(1),
            reachable: true,
            leaving: false,
            speaks: None,
            holds_level: false,
            failed: vec![],
        }],
        shards: state.shards.keys().map(shard).collect(),
        moves: vec![],
        slots_astray: 0,
        settled: true,
        slots: SlotTable::new(|slot| state.owner[&slot]),
    }
}

fn map_of(state: &State, version: u64) -> ShardMap {
    ShardMap::from_status(&status_of(state, version))
}

/// `shards` shards that own the slots in turn, and one more that owns none.
fn router(shards: u64) -> Router<Fake> {
    let mut state = State::default();
    state.owner = Slot::all()
        .map(|slot| (slot, GroupId(1 + u64::from(slot.number()) % shards)))
        .collect();
    state.shards = (1..=shards + 1)
        .map(|id| (GroupId(id), BTreeMap::new()))
        .collect();
    state.map = Some(Arc::new(map_of(&state, 1)));
    Router::new(
        Fake {
            state: Mutex::new(state),
            ..Fake::default()
        },
        1,
    )
}

fn options() -> Options {
    Options {
        consistency: Consistency::Linearizable,
        routing: Routing::Proxy,
        timeout: Duration::from_secs(5),
    }
}

fn redirect() -> Options {
    Options {
        routing: Routing::Redirect,
        ..options()
    }
}

fn unknown() -> Failure {
    Failure::Unknown {
        reason: "lost".into(),
    }
}

fn unavailable() -> Failure {
    Failure::Unavailable {
        reason: "no leader".into(),
        retry_after_ms: 1000,
    }
}

fn elsewhere() -> Failure {
    Failure::Elsewhere {
        shard: GroupId(1),
        address: "b:1".parse().expect("an address"),
    }
}

fn key(number: usize) -> Bytes {
    Bytes::from(format!("key-{number:04}"))
}

fn put(key: Bytes, value: &'static str) -> Operation {
    Operation {
        key,
        condition: Condition::None,
        action: Action::Put {
            media: Media::Text,
            value: Bytes::from_static(value.as_bytes()),
        },
    }
}

/// The number of the first key whose slot this shard of `shards` owns.
fn key_of(shard: u64, shards: u64) -> Bytes {
    let owner = |key: &Bytes| 1 + u64::from(slot_of(key).number()) % shards;
    (0..)
        .map(key)
        .find(|key| owner(key) == shard)
        .expect("a key")
}

async fn filled(shards: u64, keys: usize) -> Router<Fake> {
    let router = router(shards);
    let answers = router
        .write(
            (0..keys).map(|n| put(key(n), "v")).collect(),
            None,
            options(),
        )
        .await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    router.access().state().calls.clear();
    router
}

fn calls(router: &Router<Fake>) -> usize {
    router.access().state().calls.len()
}

fn script(router: &Router<Fake>, shard: u64, steps: &[Script]) {
    router
        .access()
        .state()
        .scripts
        .insert(GroupId(shard), steps.iter().cloned().collect());
}

fn failed(failure: Failure) -> Script {
    Script::Reply(ShardReply::Failed(failure))
}

#[tokio::test(start_paused = true)]
async fn a_write_is_split_by_shard_and_answered_in_order() {
    let router = filled(3, 30).await;
    let mut operations: Vec<_> = (0..60).map(|n| put(key(n), "w")).collect();
    operations.push(Operation {
        key: key(7),
        condition: Condition::None,
        action: Action::Get,
    });
    let answers = router.write(operations, None, options()).await;
    for (n, answer) in answers.iter().take(60).enumerate() {
        assert!(
            matches!(answer, Ok(OperationOutcome::Put { created, .. }) if *created == (n >= 30)),
            "{n}: {answer:?}"
        );
    }
    assert!(matches!(
        &answers[60],
        Ok(OperationOutcome::Got(Some(record))) if record.revision == Revision(2)
    ));
    assert_eq!(calls(&router), 3, "one write per shard");
    let found = router.get(key(59), options()).await.expect("served");
    assert_eq!(found.record.expect("stored").value, "w");
    assert!(router.write(Vec::new(), None, options()).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_failed_condition_rejects_its_shard_alone_and_names_the_callers_position() {
    let router = filled(2, 1).await;
    let own = u64::from(slot_of(&key(0)).number()) % 2 + 1;
    let other = key_of(3 - own, 2);
    let guarded = Operation {
        condition: Condition::Absent,
        ..put(key(0), "w")
    };
    let answers = router
        .write(
            vec![put(other.clone(), "w"), put(other, "x"), guarded],
            None,
            options(),
        )
        .await;
    assert!(answers[0].is_ok() && answers[1].is_ok(), "{answers:?}");
    let rejection = WriteRejection::ConditionFailed {
        operation: 2,
        current: Some(Revision(1)),
    };
    assert_eq!(answers[2], Err(WriteFailure::Rejected(rejection)));
}

#[tokio::test(start_paused = true)]
async fn limits_are_per_shard_and_nothing_is_sent_past_them() {
    let router = router(2);
    let (a, b) = (key_of(1, 2), key_of(2, 2));
    let mut many = vec![put(a.clone(), "v"); SHARD_OPERATIONS_MAX];
    many.extend(vec![put(b.clone(), "v"); SHARD_OPERATIONS_MAX]);
    assert!(
        router
            .write(many.clone(), None, options())
            .await
            .iter()
            .all(Result::is_ok)
    );
    many.push(put(a.clone(), "v"));
    let before = calls(&router);
    let answers = router.write(many, None, options()).await;
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Err(WriteFailure::Failed(Failure::TooLarge { .. }))))
    );
    let large = |bytes| Operation {
        action: Action::Put {
            media: Media::Octets,
            value: vec![0; bytes].into(),
        },
        ..put(a.clone(), "")
    };
    let answers = router
        .write(vec![put(b, "v"), large(SHARD_BYTES_MAX)], None, options())
        .await;
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Err(WriteFailure::Failed(Failure::TooLarge { .. })))),
        "{answers:?}"
    );
    for bad in [Bytes::new(), vec![b'k'; KEY_BYTES_MAX + 1].into()] {
        assert!(matches!(
            router.get(bad.clone(), options()).await,
            Err(Failure::Invalid { .. })
        ));
        let answers = router
            .write(vec![put(key(0), "v"), put(bad, "v")], None, options())
            .await;
        assert!(
            answers
                .iter()
                .all(|answer| matches!(answer, Err(WriteFailure::Failed(Failure::Invalid { .. }))))
        );
    }
    assert_eq!(calls(&router), before, "nothing was sent");
}

#[tokio::test(start_paused = true)]
async fn what_is_certainly_not_done_is_tried_again_and_no_more() {
    let frozen = Script::Reply(ShardReply::Written(WriteOutcome::Rejected(
        WriteRejection::Frozen {
            slot: slot_of(&key(0)),
        },
    )));
    let keyed = Some(Bytes::from_static(b"request-1"));
    let full = Failure::Overloaded {
        limit: "queue".into(),
        retry_after_ms: 5,
    };
    // The first acts of the shard, the idempotency key, the expected number of calls, and true if
    // the write succeeds.
    let table = [
        (
            "an election",
            vec![failed(unavailable()), failed(unavailable())],
            None,
            3,
            true,
        ),
        (
            "a leader elsewhere",
            vec![failed(elsewhere())],
            None,
            2,
            true,
        ),
        ("a frozen slot", vec![frozen.clone(), frozen], None, 3, true),
        ("a lost reply", vec![Script::ServeAndLose], None, 1, false),
        (
            "a lost reply to a write with an idempotency key",
            vec![Script::ServeAndLose, failed(unavailable())],
            keyed,
            3,
            true,
        ),
        ("overload", vec![failed(full)], None, 1, false),
        (
            "a reply that does not fit",
            vec![Script::Reply(ShardReply::Counted {
                keys: 1,
                slots: vec![],
            })],
            None,
            1,
            false,
        ),
    ];
    for (what, steps, idempotency_key, expected_calls, applied) in table {
        let router = router(1);
        script(&router, 1, &steps);
        let answers = router
            .write(vec![put(key(0), "v")], idempotency_key, options())
            .await;
        assert_eq!(
            (calls(&router), answers[0].is_ok()),
            (expected_calls, applied),
            "{what}: {answers:?}"
        );
        let stored = router.access().state().shards[&GroupId(1)]
            .get(&key(0))
            .map(|record| record.revision);
        assert!(
            stored.is_none_or(|revision| revision == Revision(1)),
            "{what}: done twice"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn requests_that_wait_for_another_attempt_are_bounded() {
    let router = router(1);
    let frozen = Script::Reply(ShardReply::Written(WriteOutcome::Rejected(
        WriteRejection::Frozen {
            slot: slot_of(&key(0)),
        },
    )));
    for (waiting, is_served) in [(WAITING_MAX, false), (WAITING_MAX - 1, true)] {
        script(&router, 1, std::slice::from_ref(&frozen));
        router.waiting.store(waiting, Ordering::Relaxed);
        let answers = router.write(vec![put(key(0), "v")], None, options()).await;
        assert_eq!(answers[0].is_ok(), is_served, "{waiting}: {answers:?}");
        let refused = matches!(
            &answers[0],
            Err(WriteFailure::Failed(Failure::Overloaded { .. }))
        );
        assert_eq!(refused, !is_served, "{waiting}: {answers:?}");
        assert_eq!(
            router.waiting.load(Ordering::Relaxed),
            waiting,
            "nobody waits any more"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_that_may_have_happened_is_never_called_undone() {
    let router = router(1);
    let mut steps = vec![Script::ServeAndLose];
    steps.extend(vec![failed(unavailable()); 10_000]);
    script(&router, 1, &steps);
    let answers = router
        .write(
            vec![put(key(0), "v")],
            Some(Bytes::from_static(b"k")),
            options(),
        )
        .await;
    assert!(
        matches!(
            &answers[0],
            Err(WriteFailure::Failed(Failure::Unknown { .. }))
        ),
        "{answers:?}"
    );
    script(&router, 1, &steps[1..]);
    let answers = router
        .write(
            vec![put(key(0), "v")],
            Some(Bytes::from_static(b"k2")),
            options(),
        )
        .await;
    assert_eq!(answers[0], Err(WriteFailure::Failed(unavailable())));
}

#[tokio::test(start_paused = true)]
async fn reads_are_tried_again_within_the_deadline() {
    let router = filled(1, 1).await;
    script(
        &router,
        1,
        &[
            failed(unknown()),
            failed(unavailable()),
            failed(elsewhere()),
        ],
    );
    assert!(
        router
            .get(key(0), options())
            .await
            .expect("served in the end")
            .record
            .is_some()
    );
    assert_eq!(calls(&router), 4);
    let start = Instant::now();
    script(&router, 1, &vec![failed(unavailable()); 10_000]);
    assert_eq!(router.get(key(0), options()).await, Err(unavailable()));
    assert!(start.elapsed() <= Duration::from_secs(5) && start.elapsed() > Duration::from_secs(4));
    let timeouts: Vec<_> = router
        .access()
        .state()
        .calls
        .iter()
        .map(|(_, options)| options.timeout)
        .collect();
    assert!(
        timeouts[4..].is_sorted_by(|a, b| a >= b),
        "each attempt gets the time that is left"
    );
}

#[tokio::test(start_paused = true)]
async fn a_redirect_is_passed_up_for_single_keys_only() {
    let router = router(2);
    let (a, b) = (key_of(1, 2), key_of(2, 2));
    script(
        &router,
        1,
        &[
            failed(elsewhere()),
            failed(elsewhere()),
            failed(elsewhere()),
        ],
    );
    assert_eq!(router.get(a.clone(), redirect()).await, Err(elsewhere()));
    let single = router
        .write(vec![put(a.clone(), "v")], None, redirect())
        .await;
    assert_eq!(single, [Err(WriteFailure::Failed(elsewhere()))]);
    let batch = router
        .write(vec![put(a, "v"), put(b, "v")], None, redirect())
        .await;
    assert!(batch.iter().all(Result::is_ok), "{batch:?}");
    let routings: Vec<_> = router
        .access()
        .state()
        .calls
        .iter()
        .map(|(_, options)| options.routing)
        .collect();
    assert_eq!(routings[..2], [Routing::Redirect; 2]);
    assert!(
        routings[2..]
            .iter()
            .all(|routing| *routing == Routing::Proxy)
    );
}

#[tokio::test(start_paused = true)]
async fn a_moved_slot_is_found_by_a_newer_map() {
    let router = filled(2, 40).await;
    let slot = slot_of(&key(5));
    router.access().state().move_slot(slot, GroupId(3));
    assert!(
        router
            .get(key(5), options())
            .await
            .expect("served")
            .record
            .is_some()
    );
    assert_eq!(
        calls(&router),
        2,
        "there is nothing to wait for once the map is newer"
    );
}

#[tokio::test(start_paused = true)]
async fn a_write_follows_a_slot_that_moved_and_splits_anew() {
    let router = filled(1, 40).await;
    let slot = slot_of(&key(5));
    router.access().state().move_slot(slot, GroupId(2));
    let answers = router
        .write((0..40).map(|n| put(key(n), "w")).collect(), None, options())
        .await;
    assert!(
        answers.iter().all(|answer| matches!(
            answer,
            Ok(OperationOutcome::Put {
                revision: Revision(2),
                ..
            })
        )),
        "{answers:?}"
    );
    assert_eq!(
        calls(&router),
        3,
        "rejected by the first shard, then one part each"
    );
}

#[tokio::test(start_paused = true)]
async fn a_hint_is_followed_while_no_map_knows_the_move() {
    let router = filled(1, 40).await;
    let slot = slot_of(&key(5));
    router.access().state().move_slot(slot, GroupId(2));
    router.access().state().next_map = None;
    let answers = router.write(vec![put(key(5), "w")], None, options()).await;
    assert!(answers[0].is_ok(), "{answers:?}");
    let answers = router
        .write((0..40).map(|n| put(key(n), "w")).collect(), None, options())
        .await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
}

#[tokio::test(start_paused = true)]
async fn a_mixed_outcome_is_answered_by_operation() {
    let router = router(1);
    let outcome = OperationOutcome::Put {
        revision: Revision(9),
        created: true,
    };
    let frozen = WriteRejection::Frozen {
        slot: slot_of(&key(1)),
    };
    let condition = WriteRejection::ConditionFailed {
        operation: 2,
        current: None,
    };
    let mixed = WriteOutcome::Mixed(vec![
        Ok(outcome.clone()),
        Err(frozen),
        Err(condition.clone()),
    ]);
    script(&router, 1, &[Script::Reply(ShardReply::Written(mixed))]);
    let operations = (0..3).map(|n| put(key(n), "v")).collect();
    let answers = router
        .write(operations, Some(Bytes::from_static(b"k")), options())
        .await;
    assert_eq!(answers[0], Ok(outcome));
    assert_eq!(
        answers[1],
        Ok(OperationOutcome::Put {
            revision: Revision(1),
            created: true
        }),
        "tried again alone"
    );
    assert_eq!(answers[2], Err(WriteFailure::Rejected(condition)));
}

async fn scan_all(
    router: &Router<Fake>,
    range: ScanRange,
    reverse: bool,
    limit: usize,
) -> Vec<Bytes> {
    let (mut keys, mut range) = (Vec::new(), range);
    loop {
        let request = ScanRequest {
            range: range.clone(),
            reverse,
            limit,
            keys_only: false,
        };
        let page = router.scan(request, options()).await.expect("a page");
        assert!(
            page.items.len() == limit || !page.more,
            "a page is full unless it is the last"
        );
        keys.extend(page.items.into_iter().map(|item| item.key));
        let Some(last) = keys.last().filter(|_| page.more) else {
            return keys;
        };
        match reverse {
            true => range.end = Some(last.clone()),
            false => range.start = [last, &[0u8][..]].concat().into(),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn scans_merge_the_shards_in_order_page_by_page() {
    let router = filled(5, 200).await;
    let all: Vec<Bytes> = (0..200).map(key).collect();
    let reversed: Vec<Bytes> = all.iter().rev().cloned().collect();
    let everything = ScanRange {
        start: Bytes::new(),
        end: None,
    };
    for limit in [1, 3, 40, 199, 200, 1000] {
        assert_eq!(
            scan_all(&router, everything.clone(), false, limit).await,
            all,
            "pages of {limit}"
        );
        assert_eq!(
            scan_all(&router, everything.clone(), true, limit).await,
            reversed,
            "pages of {limit} in reverse"
        );
    }
    let part = ScanRange {
        start: key(17),
        end: Some(key(120)),
    };
    assert_eq!(
        scan_all(&router, part.clone(), false, 10).await,
        all[17..120]
    );
    assert_eq!(scan_all(&router, part, true, 10).await, reversed[80..183]);
    let before = calls(&router);
    let nothing = ScanRange {
        start: key(9),
        end: Some(key(3)),
    };
    assert!(scan_all(&router, nothing, false, 10).await.is_empty());
    assert_eq!(calls(&router), before);
}

#[tokio::test(start_paused = true)]
async fn a_scan_loses_and_doubles_nothing_when_a_slot_moves_under_it() {
    let all: Vec<Bytes> = (0..100).map(key).collect();
    let everything = ScanRange {
        start: Bytes::new(),
        end: None,
    };
    for (after, n, limit) in (0..6).flat_map(|after| {
        [
            (after, 3, 1000),
            (after, 60, 1000),
            (after, 60, 7),
            (after, 99, 30),
        ]
    }) {
        let router = filled(3, 100).await;
        let slot = slot_of(&key(n));
        // Every way: to a shard asked before, to one asked later, and to one that the map does not
        // name yet.
        for to in 1..=4 {
            router.access().state().calls.clear();
            router.access().state().move_after = Some((after, slot, GroupId(to)));
            let found = scan_all(&router, everything.clone(), false, limit).await;
            assert_eq!(
                found, all,
                "slot of key {n} moved to {to} after {after} calls, pages of {limit}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn scans_and_counts_outlast_an_election_and_say_when_there_is_no_quorum() {
    let router = filled(3, 50).await;
    script(&router, 2, &[failed(unavailable()), failed(unknown())]);
    assert_eq!(
        scan_all(
            &router,
            ScanRange {
                start: Bytes::new(),
                end: None
            },
            false,
            100
        )
        .await
        .len(),
        50
    );
    assert_eq!(calls(&router), 5, "only the missing shard was asked again");
    script(&router, 2, &[failed(unavailable())]);
    let counts = router.count(options()).await.expect("counted");
    assert_eq!(counts.iter().map(|(_, keys)| keys).sum::<u64>(), 50);
    assert_eq!(
        counts.iter().map(|(shard, _)| shard.0).collect::<Vec<_>>(),
        [1, 2, 3, 4]
    );
    script(&router, 2, &vec![failed(unavailable()); 10_000]);
    assert_eq!(router.count(options()).await, Err(unavailable()));
    script(&router, 2, &vec![failed(unavailable()); 10_000]);
    let request = ScanRequest {
        range: ScanRange {
            start: Bytes::new(),
            end: None,
        },
        reverse: false,
        limit: 10,
        keys_only: true,
    };
    assert_eq!(router.scan(request, options()).await, Err(unavailable()));
}

#[tokio::test(start_paused = true)]
async fn one_shard_is_counted_while_another_has_no_quorum() {
    let router = filled(2, 50).await;
    script(&router, 1, &[failed(unavailable()), failed(elsewhere())]);
    script(&router, 2, &vec![failed(unavailable()); 1000]);
    let own = (0..50)
        .filter(|n| slot_of(&key(*n)).number().is_multiple_of(2))
        .count();
    assert_eq!(
        router.count_shard(GroupId(1), options()).await,
        Ok(own as u64)
    );
    assert_eq!(
        router.count_shard(GroupId(2), options()).await,
        Err(unavailable())
    );
    assert_eq!(
        router.count_shard(GroupId(3), options()).await,
        Ok(0),
        "it owns nothing"
    );
    assert!(matches!(
        router.count_shard(GroupId(9), options()).await,
        Err(Failure::Invalid { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn every_key_is_counted_once_when_a_slot_moves_meanwhile() {
    for after in 0..4 {
        for to in 1..=4 {
            let router = filled(3, 50).await;
            router.access().state().move_after = Some((after, slot_of(&key(1)), GroupId(to)));
            let counts = router.count(options()).await.expect("counted");
            assert_eq!(
                counts.iter().map(|(_, keys)| keys).sum::<u64>(),
                50,
                "moved to {to} after {after} calls: {counts:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_look_for_a_newer_map_does_not_hold_up_a_failover() {
    let router = filled(1, 1).await;
    router.access().state().refresh_takes = Duration::from_secs(3600);
    script(&router, 1, &vec![failed(unavailable()); 7]);
    let start = Instant::now();
    assert!(router.get(key(0), options()).await.is_ok());
    assert!(
        start.elapsed() < Duration::from_millis(400),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn without_a_map_requests_wait_for_one() {
    let router = filled(1, 1).await;
    let map = router.access().state().map.take();
    assert!(matches!(
        router.get(key(0), options()).await,
        Err(Failure::Unavailable { .. })
    ));
    router.access().state().next_map = map;
    assert!(
        router
            .get(key(0), options())
            .await
            .expect("served")
            .record
            .is_some()
    );
}

#[tokio::test(start_paused = true)]
async fn many_keys_are_read_by_one_call_per_shard_and_answered_in_order() {
    let router = filled(3, 30).await;
    let keys: Vec<Bytes> = (0..40).rev().map(key).chain([key(7)]).collect();
    let request = GetManyRequest {
        keys: keys.clone(),
        bytes_max: 1 << 20,
        keys_only: false,
    };
    let records = router.get_many(request, options()).await.expect("served");
    let there: Vec<bool> = records.iter().map(Option::is_some).collect();
    let expected: Vec<bool> = (0..40).rev().map(|n| n < 30).chain([true]).collect();
    assert_eq!((there, calls(&router)), (expected, 3));
    let none = GetManyRequest {
        keys: Vec::new(),
        bytes_max: 1,
        keys_only: false,
    };
    assert_eq!(router.get_many(none, options()).await, Ok(vec![]));
    let bad = GetManyRequest {
        keys: vec![key(1), Bytes::new()],
        bytes_max: 1,
        keys_only: false,
    };
    assert!(matches!(
        router.get_many(bad, options()).await,
        Err(Failure::Invalid { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_many_keys_is_bounded_and_goes_on_where_it_ended() {
    let router = router(2);
    let value: &'static str = "v".repeat(20 << 10).leak();
    router
        .write(
            (0..20).map(|n| put(key(n), value)).collect(),
            None,
            options(),
        )
        .await;
    let mut keys: Vec<Bytes> = (0..20).map(key).collect();
    while !keys.is_empty() {
        let request = GetManyRequest {
            keys: keys.clone(),
            bytes_max: 100 << 10,
            keys_only: false,
        };
        let records = router.get_many(request, options()).await.expect("served");
        assert!((1..=6).contains(&records.len()), "{}", records.len());
        assert!(records.iter().all(Option::is_some));
        keys.drain(..records.len());
    }
}

#[tokio::test(start_paused = true)]
async fn many_keys_are_found_after_a_move_and_not_without_their_shard() {
    let router = filled(2, 30).await;
    router
        .access()
        .state()
        .move_slot(slot_of(&key(3)), GroupId(3));
    let keys: Vec<Bytes> = (0..30).map(key).collect();
    let mut found = 0;
    while found < keys.len() {
        let request = GetManyRequest {
            keys: keys[found..].to_vec(),
            bytes_max: 1 << 20,
            keys_only: false,
        };
        let records = router.get_many(request, options()).await.expect("served");
        assert!(
            !records.is_empty() && records.iter().all(Option::is_some),
            "{records:?}"
        );
        found += records.len();
    }
    script(&router, 1, &vec![failed(unavailable()); 1000]);
    let request = GetManyRequest {
        keys,
        bytes_max: 1 << 20,
        keys_only: false,
    };
    let before = Instant::now();
    assert_eq!(
        router.get_many(request, options()).await,
        Err(unavailable())
    );
    assert!(before.elapsed() <= options().timeout);
}

/// Has so many ask for a key of a shard without a leader, and elects one after three seconds, of
/// which they hear by themselves or not. How often the shard was asked until then, and how long the
/// last waited after it.
async fn wait_for_leader(requests: usize, is_heard_of: bool) -> (usize, Duration) {
    const LEADERLESS: Duration = Duration::from_secs(3);
    let router = filled(1, 1).await;
    router.access().state().is_leaderless = true;
    let start = Instant::now();
    let gets = futures::future::join_all((0..requests).map(|_| router.get(key(0), options())));
    let elect = async {
        sleep(LEADERLESS).await;
        router.access().state().is_leaderless = false;
        if is_heard_of {
            router.access().elected.notify_waiters();
        }
        calls(&router)
    };
    let (answers, asked) = futures::future::join(gets, elect).await;
    assert!(
        answers.iter().all(Result::is_ok),
        "they were answered by the leader in the end"
    );
    (asked, start.elapsed() - LEADERLESS)
}

#[tokio::test(start_paused = true)]
async fn one_of_those_who_wait_for_a_leader_asks_for_all() {
    const REQUESTS: usize = 1000;
    // The pauses of one request grow to 50 to 100 ms.
    let (alone, _) = wait_for_leader(1, false).await;
    assert!(
        (30..=70).contains(&alone),
        "one request asked {alone} times in three seconds"
    );
    let (asked, waited) = wait_for_leader(REQUESTS, false).await;
    assert!(
        asked <= REQUESTS + 70,
        "{REQUESTS} requests asked {asked} times"
    );
    assert!(
        waited <= PAUSE_MAX + Duration::from_millis(20),
        "the last waited for {waited:?} more"
    );
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_not_woken_by_a_client_that_need_not_go_elsewhere() {
    const REQUESTS: usize = 1000;
    let router = filled(1, 1).await;
    router.access().state().is_leaderless = true;
    let writes = (0..REQUESTS).map(|_| router.write(vec![put(key(0), "v")], None, options()));
    let others = async {
        for _ in 0..100 {
            sleep(Duration::from_millis(20)).await;
            router
                .locate(key(0), redirect())
                .await
                .expect("nobody is sent elsewhere");
        }
        router.access().state().is_leaderless = false;
        calls(&router)
    };
    let (answers, asked) = futures::future::join(futures::future::join_all(writes), others).await;
    assert!(
        answers.iter().flatten().all(Result::is_ok),
        "they were answered in the end"
    );
    assert!(
        asked <= REQUESTS + 70,
        "{REQUESTS} requests asked {asked} times"
    );
}

#[tokio::test(start_paused = true)]
async fn those_whose_writes_are_refused_are_not_woken_by_reads() {
    const WRITES: usize = 1000;
    const READS: usize = 100;
    let router = filled(1, 1).await;
    router.access().state().is_full = true;
    let writes = (0..WRITES).map(|_| router.write(vec![put(key(0), "v")], None, options()));
    let reads = async {
        for _ in 0..READS {
            sleep(Duration::from_millis(20)).await;
            router.get(key(0), options()).await.expect("it reads");
        }
        router.access().state().is_full = false;
        calls(&router) - READS
    };
    let (answers, asked) = futures::future::join(futures::future::join_all(writes), reads).await;
    assert!(
        answers.iter().flatten().all(Result::is_ok),
        "they were taken in the end"
    );
    assert!(asked <= WRITES + 70, "{WRITES} writes asked {asked} times");
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_woken_by_a_leader_that_is_heard_of() {
    let (_, waited) = wait_for_leader(1, true).await;
    assert!(
        waited <= Duration::from_millis(1),
        "one waited for {waited:?} more"
    );
    let (_, waited) = wait_for_leader(1000, true).await;
    assert!(
        waited <= Duration::from_millis(20),
        "the last of many waited for {waited:?} more"
    );
}

/// The nodes may differ about who owns it, and would send a client to one another.
#[tokio::test(start_paused = true)]
async fn nobody_is_sent_elsewhere_with_a_key_that_is_on_its_way() {
    let router = filled(1, 2).await;
    {
        let mut state = router.access().state();
        let map = map_of(&state, 9).with_moving([slot_of(&key(0))].into());
        state.map = Some(Arc::new(map));
    }
    router.locate(key(0), redirect()).await.expect("it stays");
    router.get(key(0), redirect()).await.expect("read");
    router.write(vec![put(key(0), "v")], None, redirect()).await;
    router.get(key(1), redirect()).await.expect("read");
    let calls = &router.access().state().calls;
    let routings: Vec<Routing> = calls.iter().map(|(_, options)| options.routing).collect();
    assert_eq!(
        routings,
        [Routing::Proxy, Routing::Proxy, Routing::Redirect]
    );
}
