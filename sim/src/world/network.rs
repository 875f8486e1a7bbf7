//! [`Network`]: what nodes and clients say to each other, with delays, partitions and broken
//! connections.
//!
//! Each request, and each lane, is a connection of its own with two ordered directions. What is
//! sent is queued until its time, and given by the world to the runtime of the other side. A link
//! that is cut holds what is on it, as TCP does, until it is healed or a side gives up; a process
//! that is killed resets its connections; a machine without power says nothing.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use quorate::raft::transport::{Dial, Incoming, Lane, LaneError, Outgoing, Peer};
use quorate::routing::transport::{NodeCall, NodeReply, SendError, SendErrorKind, Transport};
use quorate::types::{Address, NodeId};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tower::ServiceExt;

use super::random::SimRng;

/// Keep-alives of lanes notice a silent peer after about so long.
const LANE_PATIENCE_MS: u64 = 4000;
/// How long connections wait to be made.
const CONNECT_TIMEOUT_MS: u64 = 800;
/// What a slow link adds to each delivery, at most.
const SLOW_MS_MAX: u64 = 1200;
/// Of so many deliveries one breaks its connection where that is flaky, and one of so many requests
/// that may be repeated is, within so long.
const BREAKS_ONE_IN: u64 = 40;
const REPEATS_ONE_IN: u64 = 3;
const REPEAT_MS_MAX: u64 = 2000;

/// A process of the simulated world, by its place in the list of all.
pub type HostIndex = usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Direction {
    /// From the side that made the connection.
    Forward,
    Back,
}

enum Packet {
    /// A connection is made, with the request if that is no stream.
    Begin(Option<Request<Bytes>>),
    /// Nobody listens there.
    Refused,
    /// A whole reply.
    Reply(Response<Bytes>),
    /// The head of a streamed reply, or the end of a connection's making.
    Accepted,
    Data(Bytes),
    /// The stream of this direction has ended.
    End,
    /// The connection is broken by the sender.
    Reset,
    /// Made by the network itself: the connection was to be there by now.
    ConnectTimeout,
}

impl Packet {
    /// Adds what is to be the same in two runs of one seed.
    fn trace(&self, hasher: &mut impl Hasher) {
        match self {
            Packet::Begin(Some(request)) => {
                (0u8, request.uri().to_string(), request.body()).hash(hasher);
            }
            Packet::Begin(None) => 1u8.hash(hasher),
            Packet::Refused => 2u8.hash(hasher),
            Packet::Reply(response) => {
                (3u8, response.status().as_u16(), response.body()).hash(hasher);
            }
            Packet::Accepted => 4u8.hash(hasher),
            Packet::Data(bytes) => (5u8, bytes).hash(hasher),
            Packet::End => 6u8.hash(hasher),
            Packet::Reset => 7u8.hash(hasher),
            Packet::ConnectTimeout => 8u8.hash(hasher),
        }
    }
}

struct Delivery {
    connection: u64,
    direction: Direction,
    packet: Packet,
}

/// What is at the sides of a connection.
enum Purpose {
    Call {
        reply: Option<oneshot::Sender<Result<Response<Bytes>, SendError>>>,
    },
    Probe {
        reply: Option<oneshot::Sender<bool>>,
    },
    Lane {
        lane: Lane,
        accepted: Option<oneshot::Sender<Result<(), LaneError>>>,
        to_client: Option<mpsc::UnboundedSender<Result<Bytes, LaneError>>>,
        to_server: Option<mpsc::UnboundedSender<Bytes>>,
    },
}

struct Connection {
    from: (HostIndex, u64),
    to: HostIndex,
    /// The start of the process that took it, once one has.
    taken_by: Option<u64>,
    purpose: Purpose,
    /// The task that serves it.
    server: Option<AbortHandle>,
    /// Deliveries of one direction keep their order.
    last_due: BTreeMap<Direction, u64>,
    /// What waits on a cut link, and since when.
    held: Vec<(Direction, Packet)>,
    held_since: Option<u64>,
}

/// Where a process is reached.
struct Port {
    handle: Handle,
    router: axum::Router,
}

struct NetworkHost {
    /// Counts its starts.
    start: u64,
    has_power: bool,
    port: Option<Port>,
}

struct NetworkState {
    now_ms: u64,
    random: SimRng,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Delivery>,
    connections: BTreeMap<u64, Connection>,
    hosts: Vec<NetworkHost>,
    by_address: BTreeMap<Address, HostIndex>,
    /// Milliseconds that each link takes.
    delays: BTreeMap<(HostIndex, HostIndex), u64>,
    cut: BTreeSet<(HostIndex, HostIndex)>,
    slow: BTreeSet<(HostIndex, HostIndex)>,
    flaky: BTreeSet<HostIndex>,
    trace: DefaultHasher,
    delivered: u64,
}

/// Clones are the same network.
#[derive(Clone)]
pub struct Network(Arc<Mutex<NetworkState>>);

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Network")
    }
}

impl Network {
    pub fn new(addresses: &[Address], mut random: SimRng) -> Self {
        let mut delays = BTreeMap::new();
        for from in 0..addresses.len() {
            for to in 0..addresses.len() {
                delays.insert((from, to), 1 + random.below(4));
            }
        }
        let hosts = addresses
            .iter()
            .map(|_| NetworkHost {
                start: 0,
                has_power: true,
                port: None,
            })
            .collect();
        let by_address = addresses
            .iter()
            .enumerate()
            .map(|(index, address)| (address.clone(), index))
            .collect();
        Self(Arc::new(Mutex::new(NetworkState {
            now_ms: 0,
            random,
            sequence: 0,
            queue: BTreeMap::new(),
            connections: BTreeMap::new(),
            hosts,
            by_address,
            delays,
            cut: BTreeSet::new(),
            slow: BTreeSet::new(),
            flaky: BTreeSet::new(),
            trace: DefaultHasher::new(),
            delivered: 0,
        })))
    }

    /// Returns the way of a process to others.
    pub fn ways_of(&self, host: HostIndex) -> Ways {
        Ways {
            network: self.clone(),
            host,
        }
    }

    /// A process begins on a host. It takes connections once it has a port.
    pub fn begin(&self, host: HostIndex) {
        let mut state = self.0.lock();
        let host = &mut state.hosts[host];
        host.start += 1;
        host.has_power = true;
    }

    /// The process of the host serves these routes in this runtime from now on.
    pub fn listen(&self, host: HostIndex, handle: Handle, router: axum::Router) {
        self.0.lock().hosts[host].port = Some(Port { handle, router });
    }

    /// The process of the host is gone. Its connections are reset, unless the whole machine is.
    pub fn end(&self, host: HostIndex, is_power_cut: bool) {
        let mut state = self.0.lock();
        state.hosts[host].port = None;
        state.hosts[host].has_power = !is_power_cut;
        let now_ms = state.now_ms;
        let ids: Vec<u64> = state.connections.keys().copied().collect();
        for id in ids {
            let Some(connection) = state.connections.get_mut(&id) else {
                continue;
            };
            let direction = if connection.from.0 == host {
                Direction::Forward
            } else if connection.to == host {
                Direction::Back
            } else {
                continue;
            };
            match is_power_cut {
                true => drop(connection.held_since.get_or_insert(now_ms)),
                false => state.send(id, direction, Packet::Reset),
            }
        }
    }

    /// What `from` sends to `to` does not arrive until it is healed.
    pub fn cut(&self, from: HostIndex, to: HostIndex) {
        self.0.lock().cut.insert((from, to));
    }

    pub fn slow_down(&self, from: HostIndex, to: HostIndex) {
        self.0.lock().slow.insert((from, to));
    }

    /// Connections of this host break while something is on its way, and requests to it that may be
    /// repeated are.
    pub fn make_flaky(&self, host: HostIndex) {
        self.0.lock().flaky.insert(host);
    }

    /// Takes away everything that is wrong with links.
    pub fn heal(&self) {
        let mut state = self.0.lock();
        state.cut.clear();
        state.slow.clear();
        state.flaky.clear();
        let ids: Vec<u64> = state.connections.keys().copied().collect();
        for id in ids {
            let Some(connection) = state.connections.get_mut(&id) else {
                continue;
            };
            connection.held_since = None;
            for (direction, packet) in std::mem::take(&mut connection.held) {
                state.send(id, direction, packet);
            }
        }
    }

    /// Breaks one of the connections. Returns whether there was one.
    pub fn reset_one(&self) -> bool {
        let mut state = self.0.lock();
        let count = state.connections.len() as u64;
        if count == 0 {
            return false;
        }
        let nth = state.random.below(count) as usize;
        let id = state.connections.keys().nth(nth).copied();
        if let Some(connection) = id.and_then(|id| state.connections.remove(&id)) {
            connection.break_off("the connection was reset");
        }
        true
    }

    /// Delivers all that is due at `now_ms`.
    pub fn advance(&self, now_ms: u64) {
        let mut state = self.0.lock();
        state.now_ms = now_ms;
        while let Some(entry) = state.queue.first_entry() {
            if entry.key().0 > now_ms {
                break;
            }
            let delivery = entry.remove();
            self.deliver(&mut state, delivery);
        }
        if now_ms.is_multiple_of(100) {
            state.give_up_silent();
        }
    }

    /// Returns a number that two runs of one seed share, and how much was delivered.
    pub fn trace(&self) -> (u64, u64) {
        let state = self.0.lock();
        (state.trace.finish(), state.delivered)
    }

    /// Adds to what two runs of one seed share.
    pub fn note(&self, text: &str) {
        text.hash(&mut self.0.lock().trace);
    }

    fn deliver(&self, state: &mut NetworkState, delivery: Delivery) {
        let Delivery {
            connection: id,
            direction,
            packet,
        } = delivery;
        let now_ms = state.now_ms;
        (now_ms, id, direction == Direction::Forward).hash(&mut state.trace);
        packet.trace(&mut state.trace);
        state.delivered += 1;
        let Some(connection) = state.connections.get_mut(&id) else {
            return;
        };
        let way = connection.way(direction);
        let is_made_here = matches!(packet, Packet::ConnectTimeout);
        if state.cut.contains(&way) && !is_made_here {
            connection.held_since.get_or_insert(now_ms);
            connection.held.push((direction, packet));
            return;
        }
        let receiver = &state.hosts[way.1];
        if direction == Direction::Back && receiver.start != connection.from.1 {
            if let Some(connection) = state.connections.remove(&id) {
                connection.break_off("its process is gone");
            }
            return;
        }
        let is_taken_elsewhere = connection
            .taken_by
            .is_some_and(|start| start != state.hosts[connection.to].start);
        if direction == Direction::Forward && is_taken_elsewhere {
            // A machine that has come back knows nothing of it.
            if receiver.has_power {
                state.send(id, Direction::Back, Packet::Reset);
            }
            return;
        }
        let packet = match state.flaky.contains(&way.0) || state.flaky.contains(&way.1) {
            true => match state.spoil(id, direction, packet) {
                Some(packet) => packet,
                None => return,
            },
            false => packet,
        };
        match packet {
            Packet::Begin(request) => self.begin_serving(state, id, request),
            packet => state.take(id, direction, packet),
        }
    }

    fn begin_serving(&self, state: &mut NetworkState, id: u64, request: Option<Request<Bytes>>) {
        let Some(connection) = state.connections.get_mut(&id) else {
            return;
        };
        let host = &state.hosts[connection.to];
        if !host.has_power {
            return;
        }
        let Some(port) = &host.port else {
            return state.send(id, Direction::Back, Packet::Refused);
        };
        connection.taken_by = Some(host.start);
        let (network, router) = (self.clone(), port.router.clone());
        match &mut connection.purpose {
            Purpose::Probe { .. } => state.send(id, Direction::Back, Packet::Accepted),
            Purpose::Call { .. } => {
                let request = request.unwrap_or_default().map(Body::from);
                let serving = port.handle.spawn(async move {
                    let response = answer(router, request).await;
                    network.send(id, Direction::Back, Packet::Reply(response));
                });
                connection.server = Some(serving.abort_handle());
            }
            Purpose::Lane {
                lane, to_server, ..
            } => {
                let (sender, received) = mpsc::unbounded_channel();
                *to_server = Some(sender);
                let lane = *lane;
                let serving = port.handle.spawn(async move {
                    serve_lane(&network, id, lane, router, received).await;
                });
                connection.server = Some(serving.abort_handle());
            }
        }
    }

    fn send(&self, id: u64, direction: Direction, packet: Packet) {
        self.0.lock().send(id, direction, packet);
    }

    fn connect(
        &self,
        from: HostIndex,
        to: &Address,
        purpose: Purpose,
        request: Option<Request<Bytes>>,
    ) -> Option<u64> {
        let mut state = self.0.lock();
        let to = *state.by_address.get(to)?;
        state.sequence += 1;
        let id = state.sequence;
        let connection = Connection {
            from: (from, state.hosts[from].start),
            to,
            taken_by: None,
            purpose,
            server: None,
            last_due: BTreeMap::new(),
            held: Vec::new(),
            held_since: None,
        };
        state.connections.insert(id, connection);
        state.send(id, Direction::Forward, Packet::Begin(request));
        state.sequence += 1;
        let key = (state.now_ms + CONNECT_TIMEOUT_MS, state.sequence);
        let delivery = Delivery {
            connection: id,
            direction: Direction::Back,
            packet: Packet::ConnectTimeout,
        };
        state.queue.insert(key, delivery);
        Some(id)
    }

    /// The side that made it wants no more of it.
    fn abandon(&self, id: u64) {
        let mut state = self.0.lock();
        if state.connections.contains_key(&id) {
            state.send(id, Direction::Forward, Packet::Reset);
        }
    }
}

impl NetworkState {
    /// Queues a packet, behind those that were sent before it in its direction.
    fn send(&mut self, id: u64, direction: Direction, packet: Packet) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let way = connection.way(direction);
        let mut delay = self.delays.get(&way).copied().unwrap_or(1) + self.random.below(2);
        if self.random.below(200) == 0 {
            delay += self.random.below(50);
        }
        if self.slow.contains(&way) {
            delay += self.random.below(SLOW_MS_MAX);
        }
        let last = connection.last_due.entry(direction).or_default();
        let due = (self.now_ms + delay).max(*last);
        *last = due;
        self.sequence += 1;
        let delivery = Delivery {
            connection: id,
            direction,
            packet,
        };
        self.queue.insert((due, self.sequence), delivery);
    }

    /// Hands a packet to the side that it was sent to.
    fn take(&mut self, id: u64, direction: Direction, packet: Packet) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let is_over = match (packet, &mut connection.purpose) {
            (Packet::Reset, _) => {
                if let Some(connection) = self.connections.remove(&id) {
                    connection.break_off("the connection was reset");
                }
                return;
            }
            (Packet::Refused, _) => {
                if let Some(connection) = self.connections.remove(&id) {
                    connection.fail(SendErrorKind::NotConnected, "connection refused");
                }
                return;
            }
            (Packet::ConnectTimeout, _) => {
                if connection.taken_by.is_none()
                    && let Some(connection) = self.connections.remove(&id)
                {
                    connection.fail(SendErrorKind::NotConnectedInTime, "no connection in time");
                }
                return;
            }
            (Packet::Reply(response), Purpose::Call { reply }) => {
                if let Some(reply) = reply.take() {
                    let _ = reply.send(Ok(response));
                }
                true
            }
            (Packet::Accepted, Purpose::Probe { reply }) => {
                if let Some(reply) = reply.take() {
                    let _ = reply.send(true);
                }
                true
            }
            (Packet::Accepted, Purpose::Lane { accepted, .. }) => {
                if let Some(accepted) = accepted.take() {
                    let _ = accepted.send(Ok(()));
                }
                false
            }
            (
                Packet::Data(bytes),
                Purpose::Lane {
                    to_client,
                    to_server,
                    ..
                },
            ) => {
                match direction {
                    Direction::Forward => drop(to_server.as_ref().map(|to| to.send(bytes))),
                    Direction::Back => drop(to_client.as_ref().map(|to| to.send(Ok(bytes)))),
                }
                false
            }
            (
                Packet::End,
                Purpose::Lane {
                    to_client,
                    to_server,
                    ..
                },
            ) => {
                match direction {
                    Direction::Forward => *to_server = None,
                    Direction::Back => *to_client = None,
                }
                to_client.is_none()
            }
            // Nothing else is sent over connections of a kind.
            _ => false,
        };
        if is_over {
            self.connections.remove(&id);
        }
    }

    /// Does to a packet what flaky links do. Returns what is left of it.
    fn spoil(&mut self, id: u64, direction: Direction, packet: Packet) -> Option<Packet> {
        if let Packet::Begin(Some(request)) = &packet
            && may_be_repeated(request)
            && self.random.below(REPEATS_ONE_IN) == 0
        {
            let again = request.clone();
            self.repeat(id, again);
        }
        if self.random.below(BREAKS_ONE_IN) != 0 || matches!(packet, Packet::ConnectTimeout) {
            return Some(packet);
        }
        // The first part of a stream may have arrived.
        if let Packet::Data(mut bytes) = packet {
            let arrived = self.random.below(bytes.len() as u64 + 1) as usize;
            self.take(id, direction, Packet::Data(bytes.split_to(arrived)));
        }
        if let Some(connection) = self.connections.remove(&id) {
            connection.break_off("the connection broke on the way");
        }
        None
    }

    /// Has a request arrive a second time, later. Nobody waits for the answer.
    fn repeat(&mut self, id: u64, request: Request<Bytes>) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let again = Connection {
            from: connection.from,
            to: connection.to,
            taken_by: None,
            purpose: Purpose::Call { reply: None },
            server: None,
            last_due: BTreeMap::new(),
            held: Vec::new(),
            held_since: None,
        };
        self.sequence += 1;
        let id = self.sequence;
        self.connections.insert(id, again);
        self.sequence += 1;
        let due = self.now_ms + self.random.below(REPEAT_MS_MAX);
        let delivery = Delivery {
            connection: id,
            direction: Direction::Forward,
            packet: Packet::Begin(Some(request)),
        };
        self.queue.insert((due, self.sequence), delivery);
    }

    fn give_up_silent(&mut self) {
        let now_ms = self.now_ms;
        let silent: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| {
                matches!(connection.purpose, Purpose::Lane { .. })
                    && connection
                        .held_since
                        .is_some_and(|since| since + LANE_PATIENCE_MS < now_ms)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in silent {
            if let Some(connection) = self.connections.remove(&id) {
                connection.break_off("nothing was heard for too long");
            }
        }
    }
}

/// Returns whether what sends a request may send it twice: it changes nothing, or has an
/// idempotency key.
fn may_be_repeated(request: &Request<Bytes>) -> bool {
    request.method() == http::Method::GET || request.headers().contains_key("idempotency-key")
}

impl Connection {
    fn way(&self, direction: Direction) -> (HostIndex, HostIndex) {
        match direction {
            Direction::Forward => (self.from.0, self.to),
            Direction::Back => (self.to, self.from.0),
        }
    }

    fn break_off(self, reason: &str) {
        if let Some(server) = &self.server {
            server.abort();
        }
        self.fail(SendErrorKind::Broken, reason);
    }

    fn fail(self, kind: SendErrorKind, reason: &str) {
        match self.purpose {
            Purpose::Call { reply } => {
                if let Some(reply) = reply {
                    let _ = reply.send(Err(SendError::new(kind, reason)));
                }
            }
            Purpose::Probe { reply } => {
                if let Some(reply) = reply {
                    let _ = reply.send(false);
                }
            }
            Purpose::Lane {
                accepted,
                to_client,
                ..
            } => {
                if let Some(accepted) = accepted {
                    let _ = accepted.send(Err(LaneError::Down(reason.to_owned())));
                }
                if let Some(to_client) = to_client {
                    let _ = to_client.send(Err(LaneError::Broken(reason.to_owned())));
                }
            }
        }
    }
}

async fn answer(router: axum::Router, request: Request<Body>) -> Response<Bytes> {
    let response = match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let (head, body) = response.into_parts();
    match body.collect().await {
        Ok(body) => Response::from_parts(head, body.to_bytes()),
        Err(_) => {
            let mut broken = Response::new(Bytes::new());
            *broken.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            broken
        }
    }
}

/// Serves a lane by the route that serves it over HTTP.
async fn serve_lane(
    network: &Network,
    id: u64,
    lane: Lane,
    router: axum::Router,
    received: mpsc::UnboundedReceiver<Bytes>,
) {
    let incoming = stream::unfold(received, |mut received| async move {
        let bytes = received.recv().await?;
        Some((Ok::<_, Infallible>(bytes), received))
    });
    let request = Request::post(format!("/peer/lane/{}", lane.name()))
        .body(Body::from_stream(incoming))
        .expect("a valid path");
    let response = match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    network.send(id, Direction::Back, Packet::Accepted);
    let mut replies = response.into_body().into_data_stream();
    while let Some(Ok(bytes)) = replies.next().await {
        network.send(id, Direction::Back, Packet::Data(bytes));
    }
    network.send(id, Direction::Back, Packet::End);
}

/// The way of one process to all others.
#[derive(Debug, Clone)]
pub struct Ways {
    network: Network,
    host: HostIndex,
}

/// Ends a connection when nobody waits for it any more.
struct ConnectionGuard {
    network: Network,
    id: u64,
    sender: Option<AbortHandle>,
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        if let Some(sender) = &self.sender {
            sender.abort();
        }
        self.network.abandon(self.id);
    }
}

impl Ways {
    fn guard(&self, id: u64) -> ConnectionGuard {
        ConnectionGuard {
            network: self.network.clone(),
            id,
            sender: None,
        }
    }
}

impl Transport for Ways {
    fn send(&self, call: NodeCall) -> BoxFuture<'static, Result<NodeReply, SendError>> {
        let ways = self.clone();
        Box::pin(async move {
            let mut request = Request::new(call.body);
            *request.method_mut() = call.method;
            *request.uri_mut() = call.path.parse().map_err(|error: http::uri::InvalidUri| {
                SendError::new(SendErrorKind::Broken, error)
            })?;
            *request.headers_mut() = call.headers;
            let (reply, replied) = oneshot::channel();
            let purpose = Purpose::Call { reply: Some(reply) };
            let id = ways
                .network
                .connect(ways.host, &call.address, purpose, Some(request))
                .ok_or_else(|| SendError::new(SendErrorKind::NotConnected, "no such host"))?;
            let _guard = ways.guard(id);
            match tokio::time::timeout(call.timeout, replied).await {
                Ok(Ok(replied)) => replied.map(NodeReply::from),
                Ok(Err(_)) => Err(SendError::new(
                    SendErrorKind::Broken,
                    "the connection broke",
                )),
                Err(late) => Err(SendError::new(SendErrorKind::Late, late)),
            }
        })
    }

    fn connects(&self, address: Address, at_most: Duration) -> BoxFuture<'static, bool> {
        let ways = self.clone();
        Box::pin(async move {
            let (reply, replied) = oneshot::channel();
            let purpose = Purpose::Probe { reply: Some(reply) };
            let Some(id) = ways.network.connect(ways.host, &address, purpose, None) else {
                return false;
            };
            let _guard = ways.guard(id);
            matches!(tokio::time::timeout(at_most, replied).await, Ok(Ok(true)))
        })
    }
}

impl Dial for Ways {
    fn dial(
        &self,
        _to: NodeId,
        peer: Peer,
        lane: Lane,
        mut outgoing: Outgoing,
    ) -> BoxFuture<'static, Result<Incoming, LaneError>> {
        let ways = self.clone();
        Box::pin(async move {
            let (accepted, is_accepted) = oneshot::channel();
            let (to_client, mut received) = mpsc::unbounded_channel();
            let purpose = Purpose::Lane {
                lane,
                accepted: Some(accepted),
                to_client: Some(to_client),
                to_server: None,
            };
            let id = ways
                .network
                .connect(ways.host, &peer.address, purpose, None)
                .ok_or_else(|| LaneError::Down("no such host".to_owned()))?;
            let mut guard = ways.guard(id);
            let network = ways.network.clone();
            // Sent from the start, as the body of a request is.
            let sending = tokio::spawn(async move {
                while let Some(bytes) = outgoing.next().await {
                    network.send(id, Direction::Forward, Packet::Data(bytes));
                }
                network.send(id, Direction::Forward, Packet::End);
            });
            guard.sender = Some(sending.abort_handle());
            match is_accepted.await {
                Ok(accepted) => accepted?,
                Err(_) => return Err(LaneError::Down("the connection broke".to_owned())),
            }
            let incoming = stream::poll_fn(move |context| {
                let _ = &guard;
                received.poll_recv(context)
            });
            Ok(Box::pin(incoming) as Incoming)
        })
    }
}
