//! A cluster of shards in memory, whose replies can be scripted.

use super::*;
use crate::client::testing as client_testing;

/// A scripted call does this instead of being served.
#[derive(Clone)]
pub enum Script {
    Reply(ShardReply),
    /// Is served, but the reply is lost.
    ServeAndLose,
}

#[derive(Default)]
pub struct State {
    /// The truth, which the map may lag behind.
    pub owner: BTreeMap<Slot, GroupId>,
    pub shards: BTreeMap<GroupId, BTreeMap<Bytes, Record>>,
    pub scripts: BTreeMap<GroupId, VecDeque<Script>>,
    pub remembered: BTreeMap<Bytes, WriteOutcome>,
    pub map: Option<Arc<ShardMap>>,
    /// The map that a refresh finds.
    pub next_map: Option<Arc<ShardMap>>,
    pub calls: Vec<(GroupId, Options)>,
    /// The time that a refresh waits for news.
    pub refresh_takes: Duration,
    /// Moves a slot once, after this many calls.
    pub move_after: Option<(usize, Slot, GroupId)>,
    /// No shard has a leader.
    pub is_leaderless: bool,
    /// Shards read, and take no writes.
    pub is_full: bool,
}

#[derive(Default)]
pub struct Fake {
    pub state: Mutex<State>,
    /// Told when there is another leader.
    pub elected: tokio::sync::Notify,
}

impl Fake {
    pub fn state(&self) -> parking_lot::MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    pub fn serve(&mut self, shard: GroupId, body: ShardBody) -> ShardReply {
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

    pub fn slots_of(&self, shard: GroupId) -> Vec<Slot> {
        self.owner
            .iter()
            .filter(|(_, owner)| **owner == shard)
            .map(|(slot, _)| *slot)
            .collect()
    }

    pub fn write(&mut self, shard: GroupId, write: Write) -> WriteOutcome {
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

    pub fn page(
        &self,
        shard: GroupId,
        range: &ScanRange,
        reverse: bool,
        limit: usize,
    ) -> ShardPage {
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
    pub fn move_slot(&mut self, slot: Slot, to: GroupId) {
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

pub fn status_of(state: &State, version: u64) -> ClusterStatus {
    let base = client_testing::status(version, None, &["a:1".parse().expect("an address")]);
    let shard = |id: &GroupId| ShardStatus {
        id: *id,
        ..base.shards[0].clone()
    };
    ClusterStatus {
        shards: state.shards.keys().map(shard).collect(),
        slots: SlotTable::new(|slot| state.owner[&slot]),
        ..base.clone()
    }
}

pub fn map_of(state: &State, version: u64) -> ShardMap {
    ShardMap::from_status(&status_of(state, version))
}

/// `shards` shards that own the slots in turn, and one more that owns none.
pub fn router(shards: u64) -> Router<Fake> {
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

pub fn options() -> Options {
    Options {
        consistency: Consistency::Linearizable,
        routing: Routing::Proxy,
        timeout: Duration::from_secs(5),
    }
}

pub fn redirect() -> Options {
    Options {
        routing: Routing::Redirect,
        ..options()
    }
}

pub fn unknown() -> Failure {
    Failure::Unknown {
        reason: "lost".into(),
    }
}

pub fn unavailable() -> Failure {
    Failure::Unavailable {
        reason: "no leader".into(),
        retry_after_ms: 1000,
    }
}

pub fn elsewhere() -> Failure {
    Failure::Elsewhere {
        shard: GroupId(1),
        address: "b:1".parse().expect("an address"),
    }
}

pub fn key(number: usize) -> Bytes {
    Bytes::from(format!("key-{number:04}"))
}

pub fn put(key: Bytes, value: &'static str) -> Operation {
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
pub fn key_of(shard: u64, shards: u64) -> Bytes {
    let owner = |key: &Bytes| 1 + u64::from(slot_of(key).number()) % shards;
    (0..)
        .map(key)
        .find(|key| owner(key) == shard)
        .expect("a key")
}

pub async fn filled(shards: u64, keys: usize) -> Router<Fake> {
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

pub fn calls(router: &Router<Fake>) -> usize {
    router.access().state().calls.len()
}

pub fn script(router: &Router<Fake>, shard: u64, steps: &[Script]) {
    router
        .access()
        .state()
        .scripts
        .insert(GroupId(shard), steps.iter().cloned().collect());
}

pub fn failed(failure: Failure) -> Script {
    Script::Reply(ShardReply::Failed(failure))
}
