//! The remote cluster as a [`Store`](crate::api::store::Store): a router over HTTP calls to the
//! shards' leaders.
//!
//! [`HttpAccess`] learns the shard map from `GET /v1/cluster` of any node that it knows, and
//! leaders from the map and from nodes that say "elsewhere", and follows them: it sends nobody
//! elsewhere itself. Nothing here retries what may have been done: that is the router's decision.

use parking_lot::{Mutex, RwLock};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::address_book::AddressBook;
use crate::api::protocol::{ClusterStatus, Hop, ShardBody, ShardReply, ShardRequest};
use crate::api::shard_map::ShardMap;
use crate::api::store::{Consistency, Failure, Options};
use crate::api::view_change::{ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::budget::Budget;
use crate::routing::call::{CallError, ShardCaller, failure_of, silence, time_to_answer_ms};
use crate::routing::discovery;
use crate::routing::home_probe::HomeProbe;
use crate::routing::reply::{self, SMALL_BYTES_MAX};
use crate::routing::retry::{Effect, FailureHistory, FailureSource};
use crate::routing::router::{Router, ShardAccess};
use crate::routing::transport::{NodeCall, SetUpError};
use crate::routing::view_change_calls::{self, Unsettled};
use crate::sm::kv::{Action, Write};
use crate::types::{Address, GroupId, MapVersion, NodeId, PlanEpoch};

/// Nodes without a map that are asked for others.
const REFERRING_MAX: usize = 20;
/// The map is asked for at most this often: a lost leader makes every waiting request ask.
const REFRESH_INTERVAL_MIN: Duration = Duration::from_millis(50);
/// Nodes asked in one call: each replica once, and where they point to.
const HOPS_MAX: usize = 12;
/// The shortest that a server can be told to wait.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);
/// Time for which requests go by a node that passes them on, before the leader is tried again.
const AROUND_FOR: Duration = Duration::from_secs(5);
/// Between two rounds over all members.
const ROUND_PAUSE: Duration = Duration::from_millis(200);

/// It names who is to lead: done twice it is done once.
const TRANSFER: Effect = Effect::Idempotent;

/// A cluster, by way of the network.
pub type RemoteStore = Router<HttpAccess>;

impl RemoteStore {
    /// Makes a store that knows these nodes at first. Nothing is asked before the first request.
    ///
    /// # Errors
    ///
    /// Fails if the HTTP client can't be set up.
    pub fn connect(seeds: Vec<Address>) -> Result<Self, SetUpError> {
        let access = HttpAccess::new(seeds, ShardCaller::new()?);
        Ok(Router::new(access, rand::random()))
    }
}

/// Reaches shards over HTTP.
#[derive(Debug)]
pub struct HttpAccess {
    caller: ShardCaller,
    book: AddressBook,
    map: RwLock<Option<Arc<ShardMap>>>,
    leaders: Mutex<HashMap<GroupId, LeaderHint>>,
    home_probe: HomeProbe,
    /// Held while the map is asked for; when that was last.
    refreshing: tokio::sync::Mutex<Option<Instant>>,
}

/// Leader of a shard, as far as the last call tells.
#[derive(Debug, Clone, PartialEq, Eq)]
enum LeaderHint {
    /// It answered.
    Leads(Address),
    /// It did not answer: the others first.
    Silent(Address),
    /// The leader could not be connected to, and this node passed a request on to it then.
    Around(Address, Instant),
}

#[derive(Serialize)]
struct Transfer {
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<Address>,
}

#[derive(Deserialize)]
struct TransferAnswer {
    leader: Address,
}

impl HttpAccess {
    pub fn new(seeds: Vec<Address>, caller: ShardCaller) -> Self {
        let (map, leaders, home_probe) = (
            RwLock::default(),
            Mutex::default(),
            HomeProbe::new(caller.clone()),
        );
        let book = AddressBook::new(seeds);
        Self {
            caller,
            book,
            map,
            leaders,
            home_probe,
            refreshing: tokio::sync::Mutex::default(),
        }
    }

    fn members(&self) -> Vec<Address> {
        self.book.members(self.map().as_deref())
    }

    /// Returns the nodes to ask about a shard, in order.
    fn candidates(&self, shard: GroupId, map: &ShardMap) -> VecDeque<Address> {
        self.attempts(shard, map)
            .into_iter()
            .map(|(address, _)| address)
            .collect()
    }

    /// As [`HttpAccess::candidates`], with what each is asked to do.
    fn attempts(&self, shard: GroupId, map: &ShardMap) -> VecDeque<(Address, Hop)> {
        let hint = self.leaders.lock().get(&shard).cloned();
        let known = map
            .candidates(shard)
            .into_iter()
            .map(|node| self.book.address(node).clone());
        let mut attempts: VecDeque<(Address, Hop)> =
            known.map(|address| (address, Hop::Answer)).collect();
        match hint {
            // Leaders change without a new map, so the last answer counts more than the map.
            Some(LeaderHint::Leads(leader)) => attempts.push_front((leader, Hop::Answer)),
            Some(LeaderHint::Silent(silent)) => {
                attempts.retain(|(address, _)| *address != silent);
                attempts.push_back((silent, Hop::Answer));
            }
            Some(LeaderHint::Around(relay, since)) if since.elapsed() < AROUND_FOR => {
                attempts.push_front((relay, Hop::Relay))
            }
            Some(LeaderHint::Around(..)) | None => {}
        }
        attempts
    }

    /// Returns the node that answered last for the shard.
    fn leader(&self, shard: GroupId, map: &ShardMap) -> Option<NodeId> {
        match self.leaders.lock().get(&shard) {
            Some(LeaderHint::Leads(address)) => {
                let mut named = map
                    .nodes()
                    .filter(|(_, place)| self.book.address(place) == address);
                let (node, _) = named.next()?;

                // If several nodes share a public address, it does not tell which of them leads.
                if named.next().is_none() {
                    Some(node)
                } else {
                    map.shard(shard)?.leader
                }
            }
            Some(LeaderHint::Silent(_) | LeaderHint::Around(..)) | None => map.shard(shard)?.leader,
        }
    }

    /// That a node passes requests on, since the first that it did: the leader is tried again after
    /// a while.
    fn around(&self, shard: GroupId, relay: Address) -> LeaderHint {
        match self.leaders.lock().get(&shard) {
            Some(LeaderHint::Around(known, since))
                if *known == relay && since.elapsed() < AROUND_FOR =>
            {
                LeaderHint::Around(relay, *since)
            }
            Some(_) | None => LeaderHint::Around(relay, Instant::now()),
        }
    }

    fn remember(&self, shard: GroupId, hint: Option<LeaderHint>) {
        let mut leaders = self.leaders.lock();
        match hint {
            Some(hint) => drop(leaders.insert(shard, hint)),
            None => drop(leaders.remove(&shard)),
        }
    }

    /// Asks node after node, as long as nothing can have been done.
    async fn ask(
        &self,
        map: &ShardMap,
        shard: GroupId,
        body: ShardBody,
        options: Options,
    ) -> ShardReply {
        let deadline = Instant::now() + options.timeout;
        let effect = effect_of(&body);
        let mut request = ShardRequest {
            cluster: map.cluster,
            shard,
            timeout_ms: 0,
            body,
        };

        // The likeliest leader first. Whoever is named by an answer goes before the others.
        let mut next = self.attempts(shard, map);
        let mut asked: Vec<(Address, Hop)> = Vec::new();
        // To those no connection could be made.
        let mut closed: Vec<Address> = Vec::new();
        let mut last = unavailable(format!("no node of shard {shard:#} is known"));

        while let Some((address, hop)) = next.pop_front() {
            if asked.contains(&(address.clone(), hop)) {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || asked.len() >= HOPS_MAX {
                break;
            }

            // With less than all of the time, so that another can be asked.
            let timeout = effect.attempt_timeout(left);
            request.timeout_ms = time_to_answer_ms(timeout);
            asked.push((address.clone(), hop));

            last = match self.caller.call_by(hop, &address, &request, timeout).await {
                Ok(ShardReply::Failed(Failure::Elsewhere {
                    shard: at,
                    address: leader,
                })) => {
                    let named = self.book.of_name(map, leader.clone());
                    // Several nodes may be behind one address.
                    next.push_front(match closed.contains(&named) || named == address {
                        true => (address, Hop::Relay),
                        false => (named, Hop::Answer),
                    });
                    Failure::Elsewhere {
                        shard: at,
                        address: leader,
                    }
                }
                Ok(ShardReply::Failed(failure @ Failure::Unavailable { .. })) => failure,
                Ok(reply) => {
                    let hint = match hop {
                        Hop::Answer => LeaderHint::Leads(address),
                        Hop::Relay => self.around(shard, address),
                    };
                    self.remember(
                        shard,
                        // A stale read is answered by any replica, so the answer does not tell who
                        // leads.
                        Some(hint).filter(|_| {
                            options.consistency == Consistency::Linearizable
                                && reply.shows_leadership()
                        }),
                    );
                    return reply;
                }
                Err(error @ CallError::NoAnswer { .. }) => {
                    self.remember(shard, Some(LeaderHint::Silent(address)));
                    match effect {
                        Effect::Safe => effect.report(error.into()),
                        // The router knows whether it may be done again.
                        Effect::Once | Effect::Idempotent => {
                            return ShardReply::Failed(error.into());
                        }
                    }
                }
                Err(CallError::Refused {
                    failure: failure @ Failure::Unavailable { .. },
                    ..
                }) => failure,
                // Overloaded, invalid or too large: another attempt would get the same, or add
                // load.
                Err(CallError::Refused { failure, .. }) => return ShardReply::Failed(failure),
                Err(error @ CallError::NotConnected { .. }) => {
                    closed.push(address.clone());
                    self.remember(shard, Some(LeaderHint::Silent(address)));
                    error.into()
                }
            };
        }

        // The caller asked for the answer, not for an address.
        ShardReply::Failed(match last {
            Failure::Elsewhere { shard, address } => unavailable(format!(
                "shard {shard:#} is changing its leader, perhaps to {address}"
            )),
            last => last,
        })
    }

    /// Fetches the status from the first node that answers, and keeps it as the newest map.
    async fn fetch_from_any(&self) -> Result<ClusterStatus, Failure> {
        let mut last = unavailable("no node is known".into());
        let mut next: VecDeque<Address> = self.members().into();

        // Nodes refer to each other, so each is asked only once.
        let mut asked: Vec<Address> = Vec::new();
        while let Some(address) = next.pop_front() {
            if asked.contains(&address) {
                continue;
            }
            last = match discovery::status(self.caller.transport(), &address)
                .await
                .and_then(|status| self.learn(status, &address))
            {
                Ok(status) => {
                    self.book.has_answered(&address);
                    return Ok(status);
                }
                Err(failure) => failure,
            };
            self.book.was_silent(&address);
            // To begin with, who left the cluster can tell who stayed. Later the map does.
            if self.map().is_none() && asked.len() < REFERRING_MAX {
                next.extend(discovery::referrals(self.caller.transport(), &address).await);
            }
            asked.push(address);
        }
        Err(last)
    }

    /// Believes a map that is no older than the known one: it knows the leaders better.
    ///
    /// # Errors
    ///
    /// Fails if it is that of another cluster. It may be empty, or hold other values under the same
    /// keys: it is never changed over to.
    fn learn(&self, status: ClusterStatus, teller: &Address) -> Result<ClusterStatus, Failure> {
        let mut known = self.map.write();
        if let Some(known) = known
            .as_ref()
            .filter(|known| known.cluster != status.cluster)
        {
            return Err(unavailable(format!(
                "a node answers for cluster {}, not for {}",
                status.cluster, known.cluster
            )));
        }

        // A node that is cut off tells an old map, which must not replace a newer one.
        if known
            .as_ref()
            .is_none_or(|known| known.version <= status.version)
        {
            let map = ShardMap::from_status(&status);
            self.book.learn(&map, teller);
            *known = Some(Arc::new(map));
        }
        Ok(status)
    }

    /// Returns true if the node answers at all, within `timeout`.
    pub async fn answers(&self, node: NodeId, timeout: Duration) -> bool {
        let Some(address) = self
            .map()
            .and_then(|map| Some(self.book.address(map.node(node)?).clone()))
        else {
            return false;
        };
        let lives = discovery::lives(self.caller.transport(), &address, timeout).await;
        if !lives {
            self.book.was_silent(&address);
        }
        lives
    }

    async fn post_transfer(
        &self,
        address: &Address,
        shard: GroupId,
        to: Option<Address>,
        timeout: Duration,
    ) -> Result<Address, (FailureSource, Failure)> {
        let path = format!("/v1/cluster/shards/{}/leader", shard.0);
        let post = NodeCall::post(address, path, timeout).json(&Transfer { to });

        let response = match self.caller.transport().send(post).await {
            Ok(response) => response,
            // Nothing was sent, so another node can be asked.
            Err(error) if error.is_connect() => {
                return Err((FailureSource::Nobody, unavailable(silence(address, &error))));
            }
            Err(error) => {
                return Err((
                    FailureSource::Nobody,
                    Failure::Unknown {
                        reason: silence(address, &error),
                    },
                ));
            }
        };

        if !response.status().is_success() {
            return Err((FailureSource::Server, failure_of(response).await));
        }
        let transferred: Result<TransferAnswer, _> =
            reply::read_json(response, SMALL_BYTES_MAX).await;
        match transferred {
            Ok(transferred) => Ok(transferred.leader),
            Err(error) => Err((
                FailureSource::Server,
                Failure::Unknown {
                    reason: error.to_string(),
                },
            )),
        }
    }
}

impl ShardAccess for HttpAccess {
    fn answers(&self) -> Arc<Budget> {
        Arc::clone(self.caller.answers())
    }

    fn map(&self) -> Option<Arc<ShardMap>> {
        self.map.read().clone()
    }

    async fn refresh(&self, older_than: MapVersion) {
        let mut last = self.refreshing.lock().await;
        let is_newer = |map: Arc<ShardMap>| map.version > older_than;

        // Those who waited for the lock find the answer of the one before, and do not ask again.
        let recently = last.is_some_and(|last| last.elapsed() < REFRESH_INTERVAL_MIN);
        if recently || self.map().is_some_and(is_newer) {
            return;
        }
        // A failure shows in what is asked next, with the same cause.
        let _ = self.fetch_from_any().await;
        *last = Some(Instant::now());
    }

    async fn call(&self, shard: GroupId, body: ShardBody, options: Options) -> ShardReply {
        match self.map() {
            Some(map) => self.ask(&map, shard, body, options).await,
            None => ShardReply::Failed(unavailable(
                "the shards of the cluster are not known yet".into(),
            )),
        }
    }

    async fn contact(&self, shard: GroupId) -> Option<Address> {
        let map = self.map()?;
        self.home_probe
            .node_to_ask(&map, shard, self.leader(shard, &map), |node| {
                self.book.address(node)
            })
            .await
    }

    async fn status(&self) -> Result<ClusterStatus, Failure> {
        self.fetch_from_any().await
    }

    async fn transfer_leader(
        &self,
        shard: GroupId,
        to: Option<Address>,
        options: Options,
    ) -> Result<Address, Failure> {
        // The first call of a client may be this one.
        if self.map().is_none() {
            self.fetch_from_any().await?;
        }
        let Some(map) = self.map() else {
            return Err(unavailable("the cluster is not known".into()));
        };
        if map.shard(shard).is_none() {
            return Err(Failure::Invalid {
                reason: format!("there is no shard {}", shard.0),
            });
        }
        let deadline = Instant::now() + options.timeout;
        let mut last = FailureHistory::new(TRANSFER);
        for address in self.candidates(shard, &map) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left < TIMEOUT_MIN && last.failure().is_some() {
                break;
            }

            // Part of the time only: a node that hangs must leave some for the others.
            let timeout = TRANSFER.attempt_timeout(left.max(TIMEOUT_MIN));
            match self
                .post_transfer(&address, shard, to.clone(), timeout)
                .await
            {
                Err((by, failure)) if TRANSFER.goes_on_after(&failure) => last.note(by, failure),
                Err((_, failure)) => return Err(last.final_failure(failure)),
                Ok(leader) => return Ok(leader),
            }
        }
        Err(last
            .failure()
            .cloned()
            .unwrap_or_else(|| unavailable(format!("no node of shard {shard:#} is known"))))
    }

    async fn change_view(
        &self,
        change: ViewChange,
        only_if: Option<PlanEpoch>,
        options: Options,
    ) -> Result<ChangeInProgress, ViewChangeFailure> {
        let (transport, effect) = (self.caller.transport(), view_change_calls::effect(only_if));
        let ask = |address, options| {
            view_change_calls::change(transport, address, &change, only_if, options)
        };
        let mut last = FailureHistory::new(effect);
        match self.first_to_answer(options, &mut last, ask).await {
            // An attempt that nobody answered may be what has changed it.
            Err(ViewChangeFailure::EpochChanged { current }) if last.may_be_done() => {
                self.what_was_done(&change, current, last, options).await
            }
            // That it is refused now says nothing of an attempt that may still be under way.
            Err(
                refusal @ (ViewChangeFailure::Refused { .. } | ViewChangeFailure::NotReady { .. }),
            ) if last.may_be_done() => {
                let reason = format!(
                    "{}; asked again, it was refused: {refusal}",
                    unanswered(&last)
                );
                Err(ViewChangeFailure::Failed(Failure::Unknown { reason }))
            }
            settled => settled,
        }
    }

    async fn plan_view(
        &self,
        change: ViewChange,
        options: Options,
    ) -> Result<PlannedChange, ViewChangeFailure> {
        let transport = self.caller.transport();
        let ask = |address, options| view_change_calls::plan(transport, address, &change, options);
        self.first_to_answer(options, &mut FailureHistory::new(Effect::Safe), ask)
            .await
    }

    async fn operation(
        &self,
        id: PlanEpoch,
        options: Options,
    ) -> Result<Option<ChangeInProgress>, Failure> {
        let transport = self.caller.transport();
        let is_unknown = AtomicBool::new(false);
        let ask = |address, options| {
            let is_unknown = &is_unknown;
            async move {
                let found = view_change_calls::operation(transport, address, id, options).await?;
                // A node that has left does not know it: the next one may.
                found.ok_or_else(|| {
                    is_unknown.store(true, Ordering::Relaxed);
                    let failure =
                        ViewChangeFailure::Failed(unavailable(format!("there is no plan {id}")));
                    Unsettled {
                        by: FailureSource::Server,
                        failure,
                    }
                })
            }
        };
        let mut last = FailureHistory::new(Effect::Safe);
        let unknown = || is_unknown.load(Ordering::Relaxed);
        match self.ask_in_rounds(options, &mut last, ask, unknown).await {
            Err(_) if unknown() => Ok(None),
            settled => Ok(settled.map(Some)?),
        }
    }
}

impl HttpAccess {
    /// Asks member after member, and all of them again, until one answers or the time is up: while
    /// the meta group changes its leader, nobody does.
    async fn first_to_answer<T, F>(
        &self,
        options: Options,
        last: &mut FailureHistory,
        ask: impl Fn(Address, Options) -> F,
    ) -> Result<T, ViewChangeFailure>
    where
        F: Future<Output = Result<T, Unsettled>>,
    {
        self.ask_in_rounds(options, last, ask, || false).await
    }

    /// Does the same until a round has ended with `enough`.
    async fn ask_in_rounds<T, F>(
        &self,
        options: Options,
        last: &mut FailureHistory,
        ask: impl Fn(Address, Options) -> F,
        enough: impl Fn() -> bool,
    ) -> Result<T, ViewChangeFailure>
    where
        F: Future<Output = Result<T, Unsettled>>,
    {
        let deadline = Instant::now() + options.timeout;

        loop {
            // Asked anew in each round: a change of the view also changes who its members are.
            let members = self.answering_first().await.unwrap_or_else(|failure| {
                last.note(FailureSource::Nobody, failure);
                Vec::new()
            });

            for address in members {
                let left = deadline.saturating_duration_since(Instant::now());
                if left < TIMEOUT_MIN && last.failure().is_some() {
                    break;
                }
                let timeout = last.effect().attempt_timeout(left.max(TIMEOUT_MIN));
                match ask(address, Options { timeout, ..options }).await {
                    Err(Unsettled {
                        by,
                        failure: ViewChangeFailure::Failed(failure),
                    }) if last.effect().goes_on_after(&failure) => {
                        last.note(by, failure);
                    }
                    Err(unsettled) => return Err(unsettled.failure),
                    Ok(answer) => return Ok(answer),
                }
            }

            if enough() || Instant::now() + ROUND_PAUSE >= deadline {
                let failure = last.failure().cloned();
                return Err(ViewChangeFailure::Failed(
                    failure.unwrap_or_else(|| unavailable("no node is known".into())),
                ));
            }
            sleep(ROUND_PAUSE).await;
        }
    }

    /// Looks whether the view, which is that of plan `current`, is asked to be as this change has
    /// it, of which nobody said what became.
    async fn what_was_done(
        &self,
        change: &ViewChange,
        current: PlanEpoch,
        last: FailureHistory,
        options: Options,
    ) -> Result<ChangeInProgress, ViewChangeFailure> {
        let status = self.fetch_from_any().await.ok();
        if status.is_some_and(|status| status.epoch == current && change.is_asked_of(&status))
            && let Ok(Some(accepted)) = self.operation(current, options).await
        {
            return Ok(accepted);
        }
        let reason = format!(
            "{}; the view is that of plan {current} by now",
            unanswered(&last)
        );
        Err(ViewChangeFailure::Failed(Failure::Unknown { reason }))
    }

    /// Returns the members as of now, the one first that has just said so: a change of the view may
    /// be asked of any, and changes who they are. Those that nobody reaches come last.
    async fn answering_first(&self) -> Result<Vec<Address>, Failure> {
        let status = self.fetch_from_any().await?;
        let node = |address: &Address| {
            status
                .nodes
                .iter()
                .find(|node| node.public_address == *address || node.address == *address)
        };
        let mut members = self.members();
        members.sort_by_cached_key(|address| match node(address) {
            Some(node) if node.id == status.answered_by => 0,
            Some(node) if node.reachable => 1,
            Some(_) | None => 2,
        });
        Ok(members)
    }
}

/// Returns what it does to send such a request twice.
fn effect_of(body: &ShardBody) -> Effect {
    match body {
        ShardBody::Get { .. }
        | ShardBody::GetMany { .. }
        | ShardBody::Scan { .. }
        | ShardBody::Count
        | ShardBody::MoveState { .. } => Effect::Safe,
        // Fenced by the move's id, but the driver looks again itself.
        ShardBody::Move(_) => Effect::Once,
        ShardBody::Write(Write {
            operations,
            idempotency_key,
        }) => {
            let only_reads = operations
                .iter()
                .all(|operation| operation.action == Action::Get);
            if idempotency_key.is_some() || only_reads {
                Effect::Idempotent
            } else {
                Effect::Once
            }
        }
    }
}

/// Returns why it is not known what became of a request.
fn unanswered(last: &FailureHistory) -> String {
    match last.failure() {
        Some(Failure::Unknown { reason }) => reason.clone(),
        Some(_) | None => "nobody has answered it".to_owned(),
    }
}

fn unavailable(reason: String) -> Failure {
    Failure::Unavailable {
        reason,
        retry_after_ms: 1000,
    }
}

#[cfg(test)]
mod tests;
