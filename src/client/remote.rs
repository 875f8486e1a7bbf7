//! The remote cluster as a [`Store`](super::store::Store): a router over HTTP calls to the shards' leaders.
//!
//! [`HttpAccess`] learns the shard map from `GET /v1/cluster` of any node that it knows, and leaders from the map and from nodes that say
//! "elsewhere", and follows them: it sends nobody elsewhere itself. Nothing here retries what may have been done: that is the router's
//! decision.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::address_book::AddressBook;
use super::call::{CallError, ShardCaller, describe, failure_of, time_to_answer_ms};
use super::contact::Contacts;
use super::enquiry;
use super::peer::SetUpError;
use super::protocol::{ClusterStatus, ShardBody, ShardReply, ShardRequest};
use super::reply::{self, SMALL_BYTES_MAX};
use super::router::{Router, ShardAccess};
use super::shard_map::ShardMap;
use super::store::{Consistency, Failure, Options};
use super::view_change::{self, ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::budget::Budget;
use crate::sm::kv::{Action, Write};
use crate::types::{Address, GroupId, MapVersion, NodeId, PlanEpoch};

/// How long one node is waited for where another could be asked, or half of the time that is left if that is more.
const ATTEMPT_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Nodes without a map that are asked for others.
const REFERRING_MAX: usize = 20;
/// The map is asked for at most this often: a lost leader makes every waiting request ask.
const REFRESH_INTERVAL_MIN: Duration = Duration::from_millis(50);
/// Nodes asked in one call: each replica once, and where they point to.
const HOPS_MAX: usize = 12;
/// The shortest that a server can be told to wait.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);
/// Between two rounds over all members.
const ROUND_PAUSE: Duration = Duration::from_millis(200);

/// A cluster, by way of the network.
pub type RemoteStore = Router<HttpAccess>;

impl RemoteStore {
    /// A store that knows these nodes at first. Nothing is asked before the first request.
    ///
    /// # Errors
    ///
    /// When the HTTP client can't be set up.
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
    leaders: Mutex<HashMap<GroupId, Hint>>,
    contacts: Contacts,
    /// Held while the map is asked for; when that was last.
    refreshing: tokio::sync::Mutex<Option<Instant>>,
}

/// What the last call says of who leads a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Hint {
    /// It answered.
    Leads(Address),
    /// It did not answer: the others first.
    Silent(Address),
}

#[derive(Serialize)]
struct Transfer {
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<Address>,
}

#[derive(Deserialize)]
struct Transferred {
    leader: Address,
}

impl HttpAccess {
    pub fn new(seeds: Vec<Address>, caller: ShardCaller) -> Self {
        let (map, leaders, contacts) = (RwLock::default(), Mutex::default(), Contacts::new(caller.clone()));
        let book = AddressBook::new(seeds);
        Self { caller, book, map, leaders, contacts, refreshing: tokio::sync::Mutex::default() }
    }

    fn members(&self) -> Vec<Address> {
        self.book.members(self.map().as_deref())
    }

    /// The nodes to ask about a shard, in order.
    fn candidates(&self, shard: GroupId, map: &ShardMap) -> VecDeque<Address> {
        let hint = self.leaders.lock().expect("no panic with the lock held").get(&shard).cloned();
        let mut addresses: VecDeque<Address> =
            map.candidates(shard).into_iter().map(|node| self.book.address(node).clone()).collect();
        match hint {
            Some(Hint::Leads(leader)) => addresses.push_front(leader),
            Some(Hint::Silent(silent)) => {
                addresses.retain(|address| *address != silent);
                addresses.push_back(silent);
            }
            None => {}
        }
        addresses
    }

    /// Who answered last for the shard.
    fn leader(&self, shard: GroupId, map: &ShardMap) -> Option<NodeId> {
        match self.leaders.lock().expect("no panic with the lock held").get(&shard) {
            Some(Hint::Leads(address)) => {
                map.nodes().find(|(_, place)| self.book.address(place) == address).map(|(node, _)| node)
            }
            Some(Hint::Silent(_)) | None => map.shard(shard)?.leader,
        }
    }

    fn remember(&self, shard: GroupId, hint: Option<Hint>) {
        let mut leaders = self.leaders.lock().expect("no panic with the lock held");
        match hint {
            Some(hint) => drop(leaders.insert(shard, hint)),
            None => drop(leaders.remove(&shard)),
        }
    }

    /// Asks node after node, as long as nothing can have been done.
    async fn ask(&self, map: &ShardMap, shard: GroupId, body: ShardBody, options: Options) -> ShardReply {
        let deadline = Instant::now() + options.timeout;
        let kind = Kind::of(&body);
        let mut request = ShardRequest { cluster: map.cluster, shard, timeout_ms: 0, body };
        let mut next = self.candidates(shard, map);
        let mut asked: Vec<Address> = Vec::new();
        let mut last = unavailable(format!("no node of shard {shard} is known"));
        while let Some(address) = next.pop_front() {
            if asked.contains(&address) {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || asked.len() >= HOPS_MAX {
                break;
            }
            let timeout = kind.attempt_timeout(left);
            request.timeout_ms = time_to_answer_ms(timeout);
            asked.push(address.clone());
            last = match self.caller.call(&address, &request, timeout).await {
                Ok(ShardReply::Failed(Failure::Elsewhere { shard: at, address: leader })) => {
                    next.push_front(self.book.of_public(map, leader.clone()));
                    Failure::Elsewhere { shard: at, address: leader }
                }
                Ok(ShardReply::Failed(failure @ Failure::Unavailable { .. })) => failure,
                Ok(reply) => {
                    self.remember(shard, Some(Hint::Leads(address)).filter(|_| options.consistency == Consistency::Linearizable));
                    return reply;
                }
                Err(error @ CallError::NoAnswer { .. }) => {
                    self.remember(shard, Some(Hint::Silent(address)));
                    match kind {
                        Kind::Read => error.into(),
                        // Whether it may be done again is for the router to know.
                        Kind::Write | Kind::RepeatableWrite => return ShardReply::Failed(error.into()),
                    }
                }
                Err(CallError::Refused { failure: failure @ Failure::Unavailable { .. }, .. }) => failure,
                Err(CallError::Refused { failure, .. }) => return ShardReply::Failed(failure),
                Err(error @ CallError::NotConnected { .. }) => {
                    self.remember(shard, Some(Hint::Silent(address)));
                    error.into()
                }
            };
        }
        ShardReply::Failed(match last {
            Failure::Elsewhere { shard, address } => {
                unavailable(format!("shard {shard} is changing its leader, perhaps to {address}"))
            }
            last => last,
        })
    }

    /// The status as the first node tells it that answers, and at once the newest map.
    async fn fetch_from_any(&self) -> Result<ClusterStatus, Failure> {
        let mut last = unavailable("no node is known".into());
        let mut next: VecDeque<Address> = self.members().into();
        let mut asked: Vec<Address> = Vec::new();
        while let Some(address) = next.pop_front() {
            if asked.contains(&address) {
                continue;
            }
            last = match enquiry::status(self.caller.http(), &address).await.and_then(|status| self.learn(status, &address)) {
                Ok(status) => {
                    self.book.has_answered(&address);
                    return Ok(status);
                }
                Err(failure) => failure,
            };
            self.book.was_silent(&address);
            // To begin with, who left the cluster can tell who stayed. Later the map does.
            if self.map().is_none() && asked.len() < REFERRING_MAX {
                next.extend(enquiry::referrals(self.caller.http(), &address).await);
            }
            asked.push(address);
        }
        Err(last)
    }

    /// Believes a map that is no older than the known one: it knows the leaders better.
    ///
    /// # Errors
    ///
    /// When it is that of another cluster. It may be empty, or hold other values under the same keys: it is never changed over to.
    fn learn(&self, status: ClusterStatus, teller: &Address) -> Result<ClusterStatus, Failure> {
        let mut known = self.map.write().expect("no panic with the lock held");
        if let Some(known) = known.as_ref().filter(|known| known.cluster != status.cluster) {
            return Err(unavailable(format!("a node answers for cluster {}, not for {}", status.cluster, known.cluster)));
        }
        if known.as_ref().is_none_or(|known| known.version <= status.version) {
            let map = ShardMap::from_status(&status);
            self.book.learn(&map, teller);
            *known = Some(Arc::new(map));
        }
        Ok(status)
    }

    /// Whether the node answers at all, within `timeout`.
    pub async fn answers(&self, node: NodeId, timeout: Duration) -> bool {
        let Some(address) = self.map().and_then(|map| Some(self.book.address(map.node(node)?).clone())) else { return false };
        let lives = enquiry::lives(self.caller.http(), &address, timeout).await;
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
    ) -> Result<Address, Failure> {
        let url = format!("http://{address}/v1/cluster/shards/{}/leader", shard.0);
        let response = match self.caller.http().post(url).json(&Transfer { to }).timeout(timeout).send().await {
            Ok(response) => response,
            Err(error) if error.is_connect() => return Err(unavailable(describe(&error))),
            Err(error) => return Err(Failure::Unknown { reason: describe(&error) }),
        };
        if !response.status().is_success() {
            return Err(failure_of(response).await);
        }
        let transferred: Result<Transferred, _> = reply::read_json(response, SMALL_BYTES_MAX).await;
        let transferred = transferred.map_err(|error| Failure::Unknown { reason: error.to_string() })?;
        Ok(transferred.leader)
    }
}

impl ShardAccess for HttpAccess {
    fn answers(&self) -> Arc<Budget> {
        Arc::clone(self.caller.answers())
    }

    fn map(&self) -> Option<Arc<ShardMap>> {
        self.map.read().expect("no panic with the lock held").clone()
    }

    async fn refresh(&self, older_than: MapVersion) {
        let mut last = self.refreshing.lock().await;
        let is_newer = |map: Arc<ShardMap>| map.version > older_than;
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
            None => ShardReply::Failed(unavailable("the shards of the cluster are not known yet".into())),
        }
    }

    async fn contact(&self, shard: GroupId) -> Option<Address> {
        let map = self.map()?;
        self.contacts.of(&map, shard, self.leader(shard, &map), |node| self.book.address(node)).await
    }

    async fn status(&self) -> Result<ClusterStatus, Failure> {
        self.fetch_from_any().await
    }

    async fn transfer_leader(&self, shard: GroupId, to: Option<Address>, options: Options) -> Result<Address, Failure> {
        if self.map().is_none() {
            self.fetch_from_any().await?;
        }
        let Some(map) = self.map() else { return Err(unavailable("the cluster is not known".into())) };
        if map.shard(shard).is_none() {
            return Err(Failure::Invalid { reason: format!("there is no shard {}", shard.0) });
        }
        let mut last = unavailable(format!("no node of shard {shard} is known"));
        for address in self.candidates(shard, &map) {
            match self.post_transfer(&address, shard, to.clone(), options.timeout).await {
                Err(failure @ Failure::Unavailable { .. }) => last = failure,
                settled => return settled,
            }
        }
        Err(last)
    }

    async fn change_view(
        &self,
        change: ViewChange,
        only_if: Option<PlanEpoch>,
        options: Options,
    ) -> Result<ChangeInProgress, ViewChangeFailure> {
        let http = self.caller.http();
        self.first_to_answer(options, |address, options| view_change::change(http, address, &change, only_if, options)).await
    }

    async fn plan_view(&self, change: ViewChange, options: Options) -> Result<PlannedChange, ViewChangeFailure> {
        let http = self.caller.http();
        self.first_to_answer(options, |address, options| view_change::plan(http, address, &change, options)).await
    }

    async fn operation(&self, id: PlanEpoch, options: Options) -> Result<Option<ChangeInProgress>, Failure> {
        let deadline = Instant::now() + options.timeout;
        let mut last = Ok(None);
        for address in self.answering_first().await? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left < TIMEOUT_MIN {
                break;
            }
            let timeout = Kind::Read.attempt_timeout(left);
            match view_change::operation(self.caller.http(), address, id, Options { timeout, ..options }).await {
                Ok(Some(change)) => return Ok(Some(change)),
                // A node that has left does not know it: the next one may.
                Ok(None) => {}
                Err(failure) => last = Err(failure.into()),
            }
        }
        last
    }
}

impl HttpAccess {
    /// Asks member after member, and all of them again, until one answers or the time is up: while the meta group changes its leader,
    /// nobody does.
    async fn first_to_answer<'a, T, F>(
        &self,
        options: Options,
        ask: impl Fn(Address, Options) -> F,
    ) -> Result<T, ViewChangeFailure>
    where
        F: Future<Output = Result<T, ViewChangeFailure>> + 'a,
    {
        let deadline = Instant::now() + options.timeout;
        loop {
            let mut last = unavailable("no node is known".into());
            let members = self.answering_first().await.unwrap_or_else(|failure| {
                last = failure;
                Vec::new()
            });
            for address in members {
                let timeout = deadline.saturating_duration_since(Instant::now()).max(TIMEOUT_MIN);
                match ask(address, Options { timeout, ..options }).await {
                    Err(ViewChangeFailure::Failed(failure @ Failure::Unavailable { .. })) => last = failure,
                    settled => return settled,
                }
            }
            if Instant::now() + ROUND_PAUSE >= deadline {
                return Err(ViewChangeFailure::Failed(last));
            }
            sleep(ROUND_PAUSE).await;
        }
    }

    /// The members as of now, the one first that has just said so: a change of the view may be asked of any, and changes who they are.
    async fn answering_first(&self) -> Result<Vec<Address>, Failure> {
        let status = self.fetch_from_any().await?;
        let answered = status.nodes.iter().find(|node| node.id == status.answered_by).map(|node| &node.public_address);
        let mut members = self.members();
        members.sort_by_key(|address| Some(address) != answered);
        Ok(members)
    }
}

/// What it does to be done twice.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Read,
    Write,
    /// With an idempotency key, or of reads alone.
    RepeatableWrite,
}

impl Kind {
    fn of(body: &ShardBody) -> Self {
        match body {
            ShardBody::Get { .. }
            | ShardBody::GetMany { .. }
            | ShardBody::Scan { .. }
            | ShardBody::Count
            | ShardBody::MoveState { .. } => Kind::Read,
            // Fenced by the move's id, but the driver looks again itself.
            ShardBody::Move(_) => Kind::Write,
            ShardBody::Write(Write { operations, idempotency_key }) => {
                let repeatable = idempotency_key.is_some() || operations.iter().all(|operation| operation.action == Action::Get);
                if repeatable { Kind::RepeatableWrite } else { Kind::Write }
            }
        }
    }

    /// One node gets all the time only if no other will be asked.
    fn attempt_timeout(self, left: Duration) -> Duration {
        match self {
            Kind::Write => left,
            Kind::Read | Kind::RepeatableWrite => left.min((left / 2).max(ATTEMPT_TIMEOUT_MIN)),
        }
    }
}

fn unavailable(reason: String) -> Failure {
    Failure::Unavailable { reason, retry_after_ms: 1000 }
}

#[cfg(test)]
mod tests;
