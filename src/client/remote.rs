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
use super::call::{CallError, ShardCaller, describe, failure_of};
use super::contact::Contacts;
use super::peer::SetUpError;
use super::protocol::{ClusterStatus, ShardBody, ShardReply, ShardRequest};
use super::router::{Router, ShardAccess};
use super::shard_map::ShardMap;
use super::store::{Consistency, Failure, Options};
use super::view_change::{self, ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::sm::kv::{Action, Write};
use crate::types::{Address, GroupId, MapVersion, NodeId, PlanEpoch};

/// How long one node is waited for where another could be asked, or half of the time that is left if that is more.
const ATTEMPT_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// How long one node is waited for when it is asked for the map.
const STATUS_TIMEOUT: Duration = Duration::from_millis(1500);
/// The map is asked for at most this often: a lost leader makes every waiting request ask.
const REFRESH_INTERVAL_MIN: Duration = Duration::from_millis(50);
/// Nodes asked in one call: each replica once, and where they point to.
const HOPS_MAX: usize = 12;
/// The shortest that a server can be told to wait.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);
/// Between two rounds over all members.
const ROUND_PAUSE: Duration = Duration::from_millis(200);
/// Kept back from the time that a node is given, so that its own "not in time" still arrives.
const REPLY_MARGIN_MAX: Duration = Duration::from_millis(100);

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
            request.timeout_ms = wire_timeout_ms(timeout);
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

    async fn fetch_status(&self, address: &Address) -> Result<ClusterStatus, Failure> {
        let get = self.caller.http().get(format!("http://{address}/v1/cluster")).timeout(STATUS_TIMEOUT);
        let response = get.send().await.map_err(|error| unavailable(describe(&error)))?;
        if !response.status().is_success() {
            return Err(failure_of(response).await);
        }
        response.json().await.map_err(|error| unavailable(format!("{address}: {}", describe(&error))))
    }

    /// The status as the first node tells it that answers, and at once the newest map.
    async fn fetch_from_any(&self) -> Result<ClusterStatus, Failure> {
        let mut last = unavailable("no node is known".into());
        for address in self.members() {
            last = match self.fetch_status(&address).await.and_then(|status| self.learn(status)) {
                Ok(status) => {
                    self.book.has_answered(&address);
                    return Ok(status);
                }
                Err(failure) => failure,
            };
            self.book.was_silent(&address);
        }
        Err(last)
    }

    /// Believes a map that is no older than the known one: it knows the leaders better.
    ///
    /// # Errors
    ///
    /// When it is that of another cluster. It may be empty, or hold other values under the same keys: it is never changed over to.
    fn learn(&self, status: ClusterStatus) -> Result<ClusterStatus, Failure> {
        let mut known = self.map.write().expect("no panic with the lock held");
        if let Some(known) = known.as_ref().filter(|known| known.cluster != status.cluster) {
            return Err(unavailable(format!("a node answers for cluster {}, not for {}", status.cluster, known.cluster)));
        }
        if known.as_ref().is_none_or(|known| known.version <= status.version) {
            let map = ShardMap::from_status(&status);
            self.book.learn(&map);
            *known = Some(Arc::new(map));
        }
        Ok(status)
    }

    /// Whether the node answers at all, within `timeout`.
    pub async fn answers(&self, node: NodeId, timeout: Duration) -> bool {
        let Some(address) = self.map().and_then(|map| Some(self.book.address(map.node(node)?).clone())) else { return false };
        let asked = self.caller.http().get(format!("http://{address}/healthz")).timeout(timeout).send().await;
        let answers = asked.is_ok_and(|answer| answer.status().is_success());
        if !answers {
            self.book.was_silent(&address);
        }
        answers
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
        let transferred: Transferred = response.json().await.map_err(|error| Failure::Unknown { reason: describe(&error) })?;
        Ok(transferred.leader)
    }
}

impl ShardAccess for HttpAccess {
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
                Err(ViewChangeFailure::Failed(failure)) => last = Err(failure),
                Err(other) => last = Err(unavailable(other.to_string())),
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

fn wire_timeout_ms(timeout: Duration) -> u64 {
    let left = timeout.saturating_sub((timeout / 10).min(REPLY_MARGIN_MAX));
    u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
}

fn unavailable(reason: String) -> Failure {
    Failure::Unavailable { reason, retry_after_ms: 1000 }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use bytes::Bytes;
    use http::Response;
    use tokio::net::TcpListener;

    use super::*;
    use crate::client::store::{Found, Routing, Store, WriteFailure};
    use crate::client::testing::{answer, bind, json, nobody, serve, status};
    use crate::sm::codec;
    use crate::sm::kv::{Condition, Media, Operation, OperationOutcome, WriteOutcome};
    use crate::types::Revision;

    fn options() -> Options {
        Options { consistency: Consistency::Linearizable, routing: Routing::Proxy, timeout: Duration::from_secs(20) }
    }

    fn put() -> Vec<Operation> {
        let action = Action::Put { media: Media::Text, value: Bytes::from_static(b"v") };
        vec![Operation { key: Bytes::from_static(b"k"), condition: Condition::None, action }]
    }

    /// A node that tells this status, and answers the shard's requests so; none: drops the connection.
    fn node(
        listener: TcpListener,
        status: ClusterStatus,
        reply: impl Fn(ShardRequest) -> Option<ShardReply> + Send + Sync + 'static,
    ) {
        let reply = Arc::new(reply);
        serve(listener, move |request| {
            let (status, reply) = (status.clone(), Arc::clone(&reply));
            async move {
                if request.uri().path() == "/v1/cluster" {
                    return Some(json(&status));
                }
                assert_eq!(request.uri().path(), "/peer/shard");
                let asked: ShardRequest = codec::decode(request.body(), "a shard request").expect("a request");
                assert_eq!((asked.cluster, asked.shard), (status.cluster, GroupId(1)));
                assert!(asked.timeout_ms > 0 && asked.timeout_ms < 20_000);
                reply(asked).map(|reply| Response::new(codec::encode(&reply)))
            }
        });
    }

    fn written() -> ShardReply {
        let outcome = OperationOutcome::Put { revision: Revision(1), created: true };
        ShardReply::Written(WriteOutcome::Applied(vec![outcome]))
    }

    #[tokio::test]
    async fn a_request_finds_the_leader_past_dead_nodes_and_old_hints() {
        let (follower, following) = bind().await;
        let (leader, leading) = bind().await;
        let nodes = [nobody().await, follower.clone(), leader.clone()];
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        // The map says that the dead one leads.
        node(following, status(1, Some(0), &nodes), move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Some(ShardReply::Failed(Failure::Elsewhere { shard: GroupId(1), address: leader.clone() }))
        });
        node(leading, status(1, Some(0), &nodes), |request| match request.body {
            ShardBody::Write(_) => Some(written()),
            _ => Some(ShardReply::Got(Found { record: None, staleness: None })),
        });
        let store = RemoteStore::connect(vec![nobody().await, follower]).expect("a client");
        assert!(store.write(put(), None, options()).await[0].is_ok());
        assert_eq!(store.get(Bytes::from_static(b"k"), options()).await.expect("served").record, None);
        assert_eq!(asked.load(Ordering::Relaxed), 1, "the leader is remembered");
    }

    #[tokio::test]
    async fn an_unanswered_write_is_unknown_and_repeated_only_with_a_key() {
        let (address, listener) = bind().await;
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let nodes = [address.clone()];
        node(listener, status(1, Some(0), &nodes), move |_| (count.fetch_add(1, Ordering::Relaxed) > 1).then(written));
        let store = RemoteStore::connect(vec![address]).expect("a client");
        let lost = store.write(put(), None, options()).await;
        assert!(matches!(&lost[0], Err(WriteFailure::Failed(Failure::Unknown { .. }))), "{lost:?}");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        let kept = store.write(put(), Some(Bytes::from_static(b"once")), options()).await;
        assert!(kept[0].is_ok(), "{kept:?}");
        assert_eq!(asked.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn a_change_is_followed_past_nodes_that_have_left() {
        let (left, leaving) = bind().await;
        let (member, staying) = bind().await;
        for (listener, status, knows) in [
            (leaving, status(1, None, std::slice::from_ref(&left)), false),
            (staying, status(2, None, &[nobody().await, member.clone()]), true),
        ] {
            serve(listener, move |request| {
                let status = status.clone();
                async move {
                    Some(match request.uri().path() {
                        "/v1/cluster" => json(&status),
                        "/v1/cluster/operations/4" if knows => answer(200, DONE),
                        _ => answer(404, "{}"),
                    })
                }
            });
        }
        let store = RemoteStore::connect(vec![left, member]).expect("a client");
        let found = store.operation(PlanEpoch(4), options()).await.expect("an answer").expect("it is known");
        assert!(found.is_over());
        assert_eq!(store.operation(PlanEpoch(5), options()).await, Ok(None));
    }

    const DONE: &str = r#"{"id":4,"phase":"done","replicas_left":0,"slots_left":0,"bytes_left":0,"waiting_for":[]}"#;

    #[tokio::test]
    async fn calls_say_whether_they_can_have_done_anything() {
        let caller = ShardCaller::new().expect("a client");
        let body = ShardBody::Count;
        let request = ShardRequest { cluster: crate::types::ClusterId(1), shard: GroupId(1), timeout_ms: 1000, body };
        let dead = caller.call(&nobody().await, &request, Duration::from_secs(20)).await.expect_err("nobody is there");
        assert!(dead.certainly_not_done(), "{dead}");
        for (code, certain) in [(429, true), (503, true), (404, true), (413, true), (500, false), (504, false), (200, false)] {
            let (address, listener) = bind().await;
            serve(listener, move |_| async move { Some(answer(code, "not a reply")) });
            let error = caller.call(&address, &request, Duration::from_secs(20)).await.expect_err("no reply");
            assert_eq!(error.certainly_not_done(), certain, "{code}: {error}");
        }
    }
}
