//! Calls the node that leads a shard: `POST /peer/shard`, postcard over pooled HTTP/1.1
//! connections. What nodes forward with, and what the remote client stands on.
//!
//! Invariant: a [`CallError`] says "not done" only when the request was certainly not taken up.

use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::problem;
use super::transport::{HttpTransport, NodeCall, NodeReply, SendError, SetUpError, Transport};
use crate::api::protocol::{Hop, RELAY_QUERY, ShardReply, ShardRequest};
use crate::api::store::Failure;
use crate::budget::{ANSWERS_BYTES_MAX, Budget, UNCHARGED_BYTES_MAX};
use crate::descriptors::Shares;
use crate::sm::codec;
use crate::types::Address;

/// A node that does not even take a connection in this time is passed over.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(800);
/// Shorter than servers wait for the next request of a connection, so that none meets a connection
/// that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Idle connections kept per node, and fewer where there are few descriptors. More are made when
/// they are needed, and closed afterwards.
const IDLE_CONNECTIONS_MAX: usize = 256;

/// An address gets no more calls than so many times those that are free besides. One that hangs
/// alone has half of all then, because a quarter is kept; each more that hangs a third of the one
/// before.
const FREE_TIMES: usize = 2;

/// Calls that an address may have under way however many others hang.
const CALLS_IN_ANY_CASE: usize = 2;

/// Kept back from the time that a node is given, so that its own "not in time" still arrives.
const REPLY_MARGIN_MAX: Duration = Duration::from_millis(100);

/// A reply: what the gets of a batch return, or a page, with keys and one item more than was asked
/// for.
const REPLY_BYTES_MAX: usize = 64 << 20;
/// An error answer: a problem with its texts, or what a server that is no node says.
const FAILURE_BYTES_MAX: usize = 1 << 20;

/// Calls shards at addresses. Clones share their connections.
#[derive(Debug, Clone)]
pub struct ShardCaller {
    transport: Arc<dyn Transport>,
    room: Arc<CallRoom>,
    /// Budget of the replies.
    answers: Arc<Budget>,
}

/// A reason why a call has no reply.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No connection: certainly not done.
    #[error("no connection to {address}: {source}")]
    NotConnected {
        address: Address,
        #[source]
        source: SendError,
    },
    /// The node refused it before looking at it: certainly not done.
    #[error("{address} refused: {failure}")]
    Refused { address: Address, failure: Failure },
    /// It was sent, and nothing came back that says what happened.
    #[error("no answer from {address}: {reason}")]
    NoAnswer { address: Address, reason: String },
}

impl CallError {
    pub fn certainly_not_done(&self) -> bool {
        match self {
            CallError::NotConnected { .. } | CallError::Refused { .. } => true,
            // Here the answer is lost and not the request, so it may have been applied.
            CallError::NoAnswer { .. } => false,
        }
    }
}

/// As an answer to a request: the last word of a router that forwarded it.
impl From<CallError> for Failure {
    fn from(error: CallError) -> Failure {
        let reason = describe(&error);
        match error {
            CallError::NotConnected { .. } => Failure::Unavailable {
                reason,
                retry_after_ms: 1000,
            },
            CallError::Refused { failure, .. } => failure,
            CallError::NoAnswer { .. } => Failure::Unknown { reason },
        }
    }
}

impl ShardCaller {
    /// # Errors
    ///
    /// Fails if the HTTP client can't be set up.
    pub fn new() -> Result<Self, SetUpError> {
        Self::with_room(Shares::now().calls)
    }

    fn with_room(calls: usize) -> Result<Self, SetUpError> {
        let http = reqwest::Client::builder()
            // With HTTP/1 each call has a connection of its own, which is what `CallRoom` counts.
            .http1_only()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            // Idle connections to a few nodes must not take the descriptors meant for all.
            .pool_max_idle_per_host((calls / 8).clamp(1, IDLE_CONNECTIONS_MAX));
        Ok(Self::over(HttpTransport::build(http)?, calls))
    }

    /// Returns one that calls by way of `transport`, so many at a time.
    pub fn over(transport: Arc<dyn Transport>, calls: usize) -> Self {
        Self {
            transport,
            room: Arc::new(CallRoom::new(calls)),
            answers: Budget::new(ANSWERS_BYTES_MAX),
        }
    }

    /// Charges replies to a budget that others share.
    pub fn charged_to(self, answers: Arc<Budget>) -> Self {
        Self { answers, ..self }
    }

    /// Returns what replies are charged to.
    pub fn answers(&self) -> &Arc<Budget> {
        &self.answers
    }

    /// Returns the way of its calls, for the JSON routes.
    pub fn transport(&self) -> &dyn Transport {
        &*self.transport
    }

    /// Makes one attempt at the node at `address`. `timeout` is that of the whole call;
    /// `request.timeout_ms` should be a little below it, so that the node's own "not in time"
    /// arrives.
    ///
    /// # Errors
    ///
    /// See [`CallError`]: not every one means that nothing was done.
    pub async fn call(
        &self,
        address: &Address,
        request: &ShardRequest,
        timeout: Duration,
    ) -> Result<ShardReply, CallError> {
        self.call_by(Hop::Answer, address, request, timeout).await
    }

    /// As [`ShardCaller::call`], of a node that may be asked to pass the request on.
    ///
    /// # Errors
    ///
    /// See [`CallError`]: not every one means that nothing was done.
    pub async fn call_by(
        &self,
        hop: Hop,
        address: &Address,
        request: &ShardRequest,
        timeout: Duration,
    ) -> Result<ShardReply, CallError> {
        // The wait for a place counts too: an answer after the caller's deadline helps nobody.
        let began = Instant::now();
        let _place = self.room.enter(address, timeout).await?;
        let timeout = timeout.saturating_sub(began.elapsed());

        let path = match hop {
            Hop::Answer => "/peer/shard".to_owned(),
            Hop::Relay => format!("/peer/shard?{RELAY_QUERY}"),
        };
        let post = NodeCall::post(address, path, timeout).octets(codec::encode(request));

        let response = match self.transport.send(post).await {
            Ok(response) => response,
            // Without a connection nothing was sent. Any later failure leaves open what was done.
            Err(source) if source.is_connect() => {
                return Err(CallError::NotConnected {
                    address: address.clone(),
                    source,
                });
            }
            Err(source) => {
                return Err(CallError::NoAnswer {
                    address: address.clone(),
                    reason: describe(&source),
                });
            }
        };

        let no_answer = |reason: String| CallError::NoAnswer {
            address: address.clone(),
            reason,
        };
        if response.status() != StatusCode::OK {
            return Err(refusal(address, response).await);
        }
        // Small replies take nothing from the budget, which every call would otherwise change.
        let (mut share, mut read) = (self.answers.empty_share(), 0);
        let charge = |bytes: usize| {
            read += bytes;
            read <= UNCHARGED_BYTES_MAX || share.grow(read - share.bytes())
        };
        let body = match read_reply(response, REPLY_BYTES_MAX, charge).await {
            Ok(body) => body,
            // A read has changed nothing. A write may have been applied, so its outcome is unknown.
            Err(BodyError::NoRoom) if request.body.is_read() => {
                return Err(CallError::Refused {
                    address: address.clone(),
                    failure: Failure::no_room(&self.answers),
                });
            }
            Err(error) => return Err(no_answer(error.to_string())),
        };
        // Until the body goes, everything is there twice. The answer to a write is kept all the
        // same.
        let bytes = body.len();
        if bytes > UNCHARGED_BYTES_MAX && !share.grow(bytes) && request.body.is_read() {
            return Err(CallError::Refused {
                address: address.clone(),
                failure: Failure::no_room(&self.answers),
            });
        }
        let reply: ShardReply = codec::decode(&body, "a shard's reply")
            .map_err(|error| no_answer(error.to_string()))?;
        // Now there is only what was decoded, which is about as large as the body was.
        drop(body);
        share.shrink_to(bytes);
        Ok(reply.held(share))
    }
}

/// Returns how long a node may take that is called for so long: its own "not done" is to arrive
/// before the caller gives it up, and does not know what was done.
pub fn time_to_answer_ms(timeout: Duration) -> u64 {
    let left = timeout.saturating_sub((timeout / 10).min(REPLY_MARGIN_MAX));
    u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// The connections that calls may use at a time: each takes a descriptor, and log and maps need
/// some too. A node that takes connections and does not answer keeps each for the whole time of a
/// call.
///
/// So an address gets no more of them than twice those that are free besides, and a few in any
/// case, so that the others are called however many nodes hang.
#[derive(Debug)]
struct CallRoom {
    calls: usize,
    /// Kept for the few that each address may have in any case.
    kept: usize,
    state: Mutex<RoomState>,
}

#[derive(Debug, Default)]
struct RoomState {
    used: usize,
    addresses: HashMap<Address, AddressRoom>,
}

/// The share of one address in the room. Forgotten when it has nothing and nobody waits.
#[derive(Debug, Default)]
struct AddressRoom {
    used: usize,
    waiting: usize,
    /// Told when there may be room for one call more.
    freed: Arc<Notify>,
}

/// One call's place.
#[derive(Debug)]
struct CallPlace<'a> {
    room: &'a CallRoom,
    address: &'a Address,
}

impl CallRoom {
    fn new(calls: usize) -> Self {
        Self {
            calls,
            kept: calls / 4,
            state: Mutex::default(),
        }
    }

    /// Waits until there is a connection for one call more to this address.
    async fn enter<'a>(
        &'a self,
        address: &'a Address,
        timeout: Duration,
    ) -> Result<CallPlace<'a>, CallError> {
        // Most calls find room at once and need no entry in the list of those that wait.
        if let Some(place) = self.try_enter(address) {
            return Ok(place);
        }

        let waiting = QueuedCall::begin(self, address);

        // A notice may be for room that another has taken by the time this runs: so it looks again.
        let entered = async {
            loop {
                if let Some(place) = self.try_enter(address) {
                    return place;
                }
                waiting.freed.notified().await;
            }
        };
        if let Ok(place) = tokio::time::timeout(timeout, entered).await {
            return Ok(place);
        }

        // They have different remedies: to look at that node, or to raise the limit of open files.
        let limit = match self.is_full() {
            false => "the calls to one node, which are as many as are left for all others",
            true => "the calls to other nodes that the limit of open files leaves room for",
        };
        let failure = Failure::Overloaded {
            limit: limit.to_owned(),
            retry_after_ms: 1000,
        };
        Err(CallError::Refused {
            address: address.clone(),
            failure,
        })
    }

    fn try_enter<'a>(&'a self, address: &'a Address) -> Option<CallPlace<'a>> {
        let mut state = self.lock();

        // The bound shrinks as others use up the room, so nodes that hang can't take all of it.
        let of_address = state.addresses.get(address).map_or(0, |room| room.used);
        let free = (self.calls - self.kept).saturating_sub(state.used);
        let is_free = of_address < FREE_TIMES * free
            || (of_address < CALLS_IN_ANY_CASE && state.used < self.calls);
        if !is_free {
            return None;
        }

        // Checked in the same lock as it is counted, so that two calls can't take the last place;
        // and before anything is counted, as a request may panic and the others go on.
        assert!(
            state.used < self.calls,
            "{} calls at once: log and maps would lack descriptors",
            state.used + 1
        );
        state.used += 1;
        match state.addresses.get_mut(address) {
            Some(room) => room.used += 1,
            None => {
                let room = AddressRoom {
                    used: 1,
                    ..AddressRoom::default()
                };
                state.addresses.insert(address.clone(), room);
            }
        }
        Some(CallPlace {
            room: self,
            address,
        })
    }

    fn is_full(&self) -> bool {
        self.lock().used >= self.calls
    }

    fn lock(&self) -> MutexGuard<'_, RoomState> {
        self.state.lock()
    }
}

impl RoomState {
    fn forget_unused(&mut self, address: &Address) {
        if self
            .addresses
            .get(address)
            .is_some_and(|room| room.used == 0 && room.waiting == 0)
        {
            self.addresses.remove(address);
        }
    }
}

impl Drop for CallPlace<'_> {
    fn drop(&mut self) {
        let mut state = self.room.lock();
        state.used -= 1;
        if let Some(room) = state.addresses.get_mut(self.address) {
            room.used -= 1;
        }
        state.forget_unused(self.address);
        // For each address the bound has grown.
        for room in state.addresses.values().filter(|room| room.waiting > 0) {
            room.freed.notify_one();
        }
    }
}

/// A call that waits for a place.
struct QueuedCall<'a> {
    room: &'a CallRoom,
    address: &'a Address,
    freed: Arc<Notify>,
}

impl<'a> QueuedCall<'a> {
    fn begin(room: &'a CallRoom, address: &'a Address) -> Self {
        let mut state = room.lock();
        let of_address = state.addresses.entry(address.clone()).or_default();
        of_address.waiting += 1;
        let freed = Arc::clone(&of_address.freed);
        drop(state);
        Self {
            room,
            address,
            freed,
        }
    }
}

impl Drop for QueuedCall<'_> {
    fn drop(&mut self) {
        let mut state = self.room.lock();
        if let Some(room) = state.addresses.get_mut(self.address) {
            room.waiting -= 1;
            // The last notice to it may have been for the next one.
            room.freed.notify_one();
        }
        state.forget_unused(self.address);
    }
}

/// Reads an answer that is not 200. The peer route itself answers 200: another status comes from
/// before it.
async fn refusal(address: &Address, response: NodeReply) -> CallError {
    let status = response.status();
    let failure = failure_of(response).await;
    match failure {
        Failure::Unknown { reason } => CallError::NoAnswer {
            address: address.clone(),
            reason: format!("{status}: {reason}"),
        },
        // No peer route, so no node, or one of another version: others may be.
        Failure::Invalid { reason } if status == StatusCode::NOT_FOUND => {
            let failure = Failure::Unavailable {
                reason,
                retry_after_ms: 1000,
            };
            CallError::Refused {
                address: address.clone(),
                failure,
            }
        }
        failure => CallError::Refused {
            address: address.clone(),
            failure,
        },
    }
}

/// Returns the failure that an error answer means.
pub async fn failure_of(response: NodeReply) -> Failure {
    let (status, headers) = (response.status(), response.headers().clone());
    let body = read_reply(response, FAILURE_BYTES_MAX, |_| true)
        .await
        .unwrap_or_default();
    problem::failure(status, &headers, &body)
}

/// A reason why the body of a reply was not read to its end.
#[derive(Debug, thiserror::Error)]
enum BodyError {
    #[error("there is no room for its reply now")]
    NoRoom,
    #[error("its reply is larger than {bytes_max} bytes")]
    TooLarge { bytes_max: usize },
    #[error("{}", describe(.0))]
    Broken(#[source] SendError),
}

/// Reads a body, of which every piece is charged before it is kept.
async fn read_reply(
    mut response: NodeReply,
    bytes_max: usize,
    mut charge: impl FnMut(usize) -> bool,
) -> Result<Vec<u8>, BodyError> {
    let declared = response
        .content_length()
        .and_then(|bytes| usize::try_from(bytes).ok())
        .unwrap_or(0);
    if declared > bytes_max {
        return Err(BodyError::TooLarge { bytes_max });
    }
    let mut body = Vec::with_capacity(declared.min(1 << 20));
    while let Some(piece) = response.chunk().await.map_err(BodyError::Broken)? {
        if body.len() + piece.len() > bytes_max {
            return Err(BodyError::TooLarge { bytes_max });
        }
        if !charge(piece.len()) {
            return Err(BodyError::NoRoom);
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

/// Returns why a node has not answered a request, for people.
pub fn silence(address: &Address, error: &SendError) -> String {
    let what = if error.is_connect() {
        "no connection to"
    } else {
        "no answer from"
    };
    let reason = match error.is_timeout() {
        true => "it took too long".to_owned(),
        false => innermost(error).to_string(),
    };
    format!("{what} {address}: {reason}")
}

/// Returns the last cause: "connection refused" says more than the chain that leads to it.
fn innermost<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> &'a (dyn std::error::Error + 'static) {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause
}

/// Returns an error with its causes: reqwest's own text leaves out why a connection failed.
pub(super) fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::protocol::ShardBody;
    use crate::client::testing::{answer, bind, problem, serve};
    use crate::types::{ClusterId, GroupId, Slot};

    #[tokio::test]
    async fn only_a_node_says_that_it_has_not_done_it() {
        for (is_of_node, status) in [
            (true, 503),
            (true, 408),
            (false, 503),
            (false, 408),
            (false, 429),
        ] {
            let (address, listener) = bind().await;
            serve(listener, move |_| async move {
                Some(if is_of_node {
                    problem(status, "it stops")
                } else {
                    answer(status, "<h1>try again</h1>")
                })
            });
            let caller = ShardCaller::with_room(1).expect("a client");
            let request = ShardRequest {
                cluster: ClusterId(1),
                shard: GroupId(1),
                timeout_ms: 1,
                body: ShardBody::Count,
            };
            let refused = caller
                .call(&address, &request, Duration::from_secs(20))
                .await
                .expect_err("no reply");
            assert_eq!(
                refused.certainly_not_done(),
                is_of_node,
                "{status}: {refused}"
            );
        }
    }

    #[test]
    fn a_node_has_a_little_less_time_than_it_is_waited_for() {
        let times = [(5000, 4900), (1000, 900), (200, 180), (1, 1), (0, 1)];
        for (timeout_ms, expected) in times {
            assert_eq!(
                time_to_answer_ms(Duration::from_millis(timeout_ms)),
                expected
            );
        }
    }

    #[tokio::test]
    async fn calls_beyond_the_room_wait_and_are_refused_in_time() {
        let (address, listener) = bind().await;
        serve(listener, |_| std::future::pending());
        let caller = ShardCaller::with_room(1).expect("a client");
        let request = ShardRequest {
            cluster: ClusterId(1),
            shard: GroupId(1),
            timeout_ms: 1,
            body: ShardBody::Count,
        };
        let call = |timeout: Duration| caller.call(&address, &request, timeout);

        let mut first = std::pin::pin!(call(Duration::from_secs(20)));
        assert!(futures::poll!(first.as_mut()).is_pending());
        let second = call(Duration::from_millis(20))
            .await
            .expect_err("there is no room");
        assert!(second.certainly_not_done(), "{second}");
        assert!(
            matches!(
                second,
                CallError::Refused {
                    failure: Failure::Overloaded { .. },
                    ..
                }
            ),
            "{second}"
        );
        assert_eq!(caller.room.lock().used, 1);
    }

    #[tokio::test]
    async fn nodes_that_hang_leave_calls_for_the_others_however_many_they_are() {
        const CALLS: usize = 256;
        const NODES: usize = 16;
        let caller = ShardCaller::with_room(CALLS).expect("a client");
        let mut hung = Vec::new();
        for _ in 1..NODES {
            let (address, listener) = bind().await;
            serve(listener, |_| std::future::pending());
            hung.push(address);
        }
        let (well, listener) = bind().await;
        serve(listener, |_| async {
            Some(answer(
                200,
                codec::encode(&ShardReply::Counted {
                    keys: 3,
                    slots: vec![],
                }),
            ))
        });

        let request = ShardRequest {
            cluster: ClusterId(1),
            shard: GroupId(1),
            timeout_ms: 1,
            body: ShardBody::Count,
        };
        let call = |address| caller.call(address, &request, Duration::from_secs(20));
        let mut hanging: Vec<_> = hung
            .iter()
            .flat_map(|address| std::iter::repeat_n(address, 2 * CALLS))
            .map(|address| Box::pin(call(address)))
            .collect();
        for call in &mut hanging {
            assert!(futures::poll!(call.as_mut()).is_pending());
        }

        let replies = futures::future::join_all((0..CALLS).map(|_| call(&well))).await;
        assert!(
            replies.iter().all(Result::is_ok),
            "others are called: {replies:?}"
        );
        drop(hanging);
        let state = caller.room.lock();
        assert_eq!(
            (state.used, state.addresses.len()),
            (0, 0),
            "nothing is left behind"
        );
    }

    #[tokio::test]
    async fn a_place_that_is_free_again_goes_to_a_call_that_waits() {
        let room = CallRoom::new(8);
        let [one, other]: [Address; 2] =
            ["a:1", "b:2"].map(|text| text.parse().expect("an address"));
        let places: Vec<_> = std::iter::from_fn(|| room.try_enter(&one)).collect();
        assert_eq!(places.len(), 4, "one that is alone gets half of all");
        let mut others: Vec<_> = std::iter::from_fn(|| room.try_enter(&other)).collect();
        assert!(others.len() >= CALLS_IN_ANY_CASE);

        let timeout = Duration::from_secs(20);
        let mut waits: Vec<_> = [&one, &other]
            .map(|address| Box::pin(room.enter(address, timeout)))
            .into();
        for wait in &mut waits {
            assert!(futures::poll!(wait.as_mut()).is_pending());
        }
        drop(places);
        others.clear();
        let entered = futures::future::join_all(waits).await;
        assert!(entered.iter().all(Result::is_ok));
    }

    #[tokio::test]
    async fn small_replies_take_nothing_of_the_budget_and_large_ones_all_that_they_have() {
        let (address, listener) = bind().await;
        serve(listener, |request| async move {
            let ShardRequest { timeout_ms, .. } =
                codec::decode(request.body(), "a request").expect("a request");
            let slots = Slot::all()
                .take(usize::try_from(timeout_ms).expect("few"))
                .collect();
            Some(answer(
                200,
                codec::encode(&ShardReply::Counted { keys: 3, slots }),
            ))
        });
        let caller = ShardCaller::with_room(8)
            .expect("a client")
            .charged_to(Budget::new(UNCHARGED_BYTES_MAX));
        let spent = caller
            .answers
            .take(UNCHARGED_BYTES_MAX)
            .expect("nothing is taken yet");
        let call = async |slots: u64| {
            let request = ShardRequest {
                cluster: ClusterId(1),
                shard: GroupId(1),
                timeout_ms: slots,
                body: ShardBody::Count,
            };
            caller
                .call(&address, &request, Duration::from_secs(20))
                .await
        };

        assert!(
            matches!(call(10).await, Ok(ShardReply::Counted { keys: 3, .. })),
            "a small one"
        );
        let refused = call(4000).await.expect_err("a large one has no room");
        assert!(
            matches!(
                refused,
                CallError::Refused {
                    failure: Failure::Overloaded { .. },
                    ..
                }
            ),
            "{refused}"
        );
        drop(spent);
        let refused = call(4000).await.expect_err("it is larger than the budget");
        assert!(
            refused.certainly_not_done() && caller.answers.used() == 0,
            "{refused}"
        );
    }
}
