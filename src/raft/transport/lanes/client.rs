//! [`Lanes`], the sending side of all lanes of this node.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Reachability;
use super::peer_directories::PeerSession;
use crate::raft::election::leases::LeaseTimings;
use crate::raft::election::liveness::PeerLiveness;
use crate::raft::fair_budget::{HeldBytes, RaftBudgets, Reservation};
use crate::raft::transport::wire::{
    self, FrameReader, Hello, PeerRefusal, PeerReply, ReceivedFrame, UnsealedFrame,
};
use crate::raft::transport::{
    Dial, Incoming, Lane, LaneError, NodeIdentity, Outgoing, Peer, Resolver,
};
use crate::sm::starts::Starts;
use crate::supervisor::Supervisor;
use crate::telemetry::rarely;
use crate::types::NodeId;

/// Bytes that may be queued in one lane: several windows of appends of a few groups. More is
/// refused, and Raft tries again.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Calls in flight on one lane. Each group has at most a window of them.
const CALLS_MAX: usize = 32 << 10;
/// Size of the chunks in which small frames go out together, and of the pieces in which large ones
/// do: each that the connection accepts shows that the peer accepts what came before.
const CHUNK_BYTES: usize = 256 << 10;
/// Size from which a frame is a chunk of its own: it is not worth copying.
const ALONE_BYTES: usize = 16 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause between attempts to reach a peer, doubled from the shortest to the longest. Calls in
/// between fail at once.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Silence after which a lane is cut while a call waits, on top of the time that its bytes may
/// take: the peer or the connection is gone, and TCP would not notice for minutes.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// Slowest connection that groups can live on: 8 Mbit/s.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;
/// Bytes that a connection accepts whether the peer is there or not.
const CONNECTION_BYTES_MAX: usize = 8 << 20;
/// Interval at which silence and abandoned calls are looked for.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Resolves to the reply to a call.
pub type PendingReply = oneshot::Receiver<Result<ReceivedFrame, LaneError>>;

/// A frame that is in flight.
pub struct Call {
    /// The peer's reply.
    pub answer: PendingReply,
    /// Bytes in flight on its lane when it was sent, with its own.
    under_way: usize,
}

impl Call {
    /// Returns the extra time that the bytes before it and its own may take.
    pub fn allowance(&self) -> Duration {
        time_for(self.under_way)
    }
}

/// Returns the time that `bytes` take on the slowest connection.
fn time_for(bytes: usize) -> Duration {
    Duration::from_millis(bytes as u64 * 1000 / BYTES_PER_SECOND_MIN)
}

/// The lanes to all peers. They are dialled when first used.
pub struct Lanes {
    parts: Arc<LanesParts>,
    lanes: Mutex<HashMap<(NodeId, Lane), Arc<PeerLane>>>,
    tasks: Mutex<Option<JoinSet<()>>>,
}

/// The parts that the lanes of a node are made of.
pub struct LanesParts {
    pub identity: Arc<NodeIdentity>,
    pub resolver: Arc<dyn Resolver>,
    pub dial: Arc<dyn Dial>,
    pub liveness: Arc<PeerLiveness>,
    pub reachability: Arc<Reachability>,
    pub budgets: Arc<RaftBudgets>,
    pub lease_timings: LeaseTimings,
    pub supervisor: Supervisor,
}

impl Lanes {
    pub fn new(parts: LanesParts) -> Self {
        Self {
            parts: Arc::new(parts),
            lanes: Mutex::default(),
            tasks: Mutex::new(Some(JoinSet::new())),
        }
    }

    /// Sends a frame. Frames of one lane leave in the order of the calls. The reply is read by
    /// [`read_reply`]; the caller decides how long to wait for it.
    pub fn call(&self, to: NodeId, lane: Lane, frame: UnsealedFrame) -> Result<Call, LaneError> {
        let peer = self
            .parts
            .resolver
            .resolve(to)
            .ok_or(LaneError::Unresolved(to))?;
        let lane = self.lane(to, lane)?;
        // Reserved before the lane is locked; a frame that is not queued gives it back. Heartbeats
        // are small, and must not wait for the entries of others.
        let place = match lane.lane {
            Lane::Heartbeat => None,
            Lane::Log | Lane::Snapshot => {
                let bytes = frame.bytes_len();
                Some(
                    self.parts
                        .budgets
                        .outbox
                        .take(&lane.queued, bytes)
                        .ok_or(LaneError::Full(bytes))?,
                )
            }
        };
        lane.call(&peer, frame, place)
    }

    /// Returns the memory budgets that frames are charged to.
    pub fn budgets(&self) -> &RaftBudgets {
        &self.parts.budgets
    }

    /// Returns when this peer was last heard from.
    pub fn last_heard(&self, node: NodeId) -> Option<Instant> {
        self.parts.liveness.last_heard(node)
    }

    /// Returns true if the process of the peer has probably died.
    pub fn is_disconnected(&self, node: NodeId) -> bool {
        self.parts.liveness.is_disconnected(node)
    }

    /// Refuses a peer from now on that lacks what it has acknowledged: its directory is an old
    /// copy.
    pub fn lost_acknowledged(&self, node: NodeId) {
        let Some(peer) = self.parts.resolver.resolve(node) else {
            return;
        };
        if let Some(peer_directories) = self.parts.identity.peer_directories() {
            peer_directories.reject(peer.directory);
        }
    }

    /// Cuts all lanes. Calls in flight and later ones fail.
    pub async fn close(&self) {
        // The tasks first, because they would dial again.
        let tasks = self.tasks.lock().take();
        if let Some(mut tasks) = tasks {
            tasks.shutdown().await;
        }
        let lanes = std::mem::take(&mut *self.lanes.lock());
        for lane in lanes.into_values() {
            lane.lock().end(&LaneError::Closed, LinkState::Closed);
        }
    }

    fn lane(&self, to: NodeId, lane: Lane) -> Result<Arc<PeerLane>, LaneError> {
        let mut lanes = self.lanes.lock();
        if let Some(found) = lanes.get(&(to, lane)) {
            return Ok(found.clone());
        }
        let mut tasks = self.tasks.lock();
        let tasks = tasks.as_mut().ok_or(LaneError::Closed)?;
        let new = Arc::new(PeerLane {
            to,
            lane,
            state: Mutex::default(),
            called: Notify::new(),
            queued: HeldBytes::default(),
        });
        self.parts
            .supervisor
            .start(tasks, "lane", keep_up(self.parts.clone(), new.clone()));
        lanes.insert((to, lane), new.clone());
        Ok(new)
    }
}

/// Returns the peer's reply, or its refusal as an error.
pub fn read_reply(frame: &ReceivedFrame) -> Result<PeerReply, LaneError> {
    match frame.reply()? {
        PeerReply::Refused(refusal) => Err(LaneError::Refused(refusal)),
        reply => Ok(reply),
    }
}

struct PeerLane {
    to: NodeId,
    lane: Lane,
    state: Mutex<LaneState>,
    /// Notified when there is something to dial for, and when the peer has moved.
    called: Notify,
    /// Bytes that are queued.
    queued: HeldBytes,
}

#[derive(Default)]
struct LaneState {
    link: LinkState,
    /// The connection that the queue belongs to: the stream of an earlier one takes nothing from
    /// it.
    generation: u64,
    queue: VecDeque<(Bytes, Option<Reservation>)>,
    queue_bytes: usize,
    calls: HashMap<u64, PendingCall>,
    /// Bytes of the frames that are not answered yet.
    unanswered_bytes: usize,
    next_sequence: u64,
    /// Since when a call has waited without a sign of life of the peer.
    waiting_since: Option<Instant>,
    /// Bytes that the connection has accepted since the last sign of life.
    taken_bytes: usize,
    waker: Option<Waker>,
}

/// A caller that waits for a reply.
struct PendingCall {
    caller: oneshot::Sender<Result<ReceivedFrame, LaneError>>,
    bytes: usize,
}

#[derive(Debug, Default)]
enum LinkState {
    /// Nothing was sent yet, or the last pause is over.
    #[default]
    Idle,
    /// Dialled or up, to this peer.
    Up(Peer),
    /// Failed a moment ago; a pause follows.
    Down(LaneError),
    Closed,
}

impl LaneState {
    /// Notes that the connection has accepted `bytes`. Beyond what it buffers itself, it accepts
    /// more only while the peer does.
    fn note_taken(&mut self, bytes: usize) {
        self.taken_bytes += bytes;
        if self.taken_bytes > CONNECTION_BYTES_MAX && self.waiting_since.is_some() {
            self.waiting_since = Some(Instant::now());
        }
    }

    /// Fails every call and empties the queue.
    fn end(&mut self, error: &LaneError, link: LinkState) {
        self.generation += 1;
        self.queue.clear();
        self.queue_bytes = 0;
        for (_, call) in self.calls.drain() {
            let _ = call.caller.send(Err(error.clone()));
        }
        (self.unanswered_bytes, self.taken_bytes) = (0, 0);
        self.waiting_since = None;
        self.link = link;
        // Wakes the stream of the old connection, to see that it has ended.
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl PeerLane {
    fn lock(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock()
    }

    fn call(
        &self,
        peer: &Peer,
        frame: UnsealedFrame,
        place: Option<Reservation>,
    ) -> Result<Call, LaneError> {
        let mut state = self.lock();
        match &state.link {
            // The view has another address or directory for the node by now.
            LinkState::Up(current) if current != peer => {
                state.end(
                    &LaneError::Broken("the peer has moved".into()),
                    LinkState::Idle,
                );
                self.called.notify_one();
            }
            LinkState::Down(error) => return Err(LaneError::Down(error.to_string())),
            LinkState::Closed => return Err(LaneError::Closed),
            LinkState::Idle | LinkState::Up(_) => {}
        }

        // One frame always fits, however large, so that every valid entry can be sent.
        if state.queue_bytes + frame.bytes_len() > QUEUE_BYTES_MAX && !state.queue.is_empty()
            || state.calls.len() >= CALLS_MAX
        {
            return Err(LaneError::Full(state.queue_bytes));
        }

        let sequence = state.next_sequence;
        assert!(
            sequence < CANNOT_CONNECT_SEQUENCE,
            "a call has a reserved sequence number"
        );
        state.next_sequence += 1;
        let (caller, answer) = oneshot::channel();
        let bytes = frame.bytes_len();
        state.calls.insert(sequence, PendingCall { caller, bytes });

        state.waiting_since.get_or_insert_with(Instant::now);
        state.unanswered_bytes += bytes;
        state.queue_bytes += bytes;
        // Frames of callers that have given up are still in the queue.
        let under_way = state.unanswered_bytes.max(state.queue_bytes);
        state.queue.push_back((frame.seal(sequence), place));

        // Woken after the lock is released.
        let waker = state.waker.take();
        let idle = matches!(state.link, LinkState::Idle);
        drop(state);
        match waker {
            Some(waker) => waker.wake(),
            None if idle => self.called.notify_one(),
            None => {}
        }

        Ok(Call { answer, under_way })
    }
}

/// The stream of the bytes that go out over one connection of a lane.
struct OutgoingFrames {
    lane: Arc<PeerLane>,
    generation: u64,
    hello: Option<Bytes>,
}

impl Stream for OutgoingFrames {
    type Item = Bytes;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if let Some(hello) = self.hello.take() {
            return Poll::Ready(Some(hello));
        }

        let mut state = self.lane.lock();
        if state.generation != self.generation {
            return Poll::Ready(None);
        }
        assert!(
            !state.queue.is_empty() || state.queue_bytes == 0,
            "an empty queue has {} bytes",
            state.queue_bytes
        );
        let Some((mut first, place)) = state.queue.pop_front() else {
            state.waker = Some(context.waker().clone());
            return Poll::Pending;
        };

        // A large frame goes out in pieces. Its reservation stays with the rest.
        if first.len() > CHUNK_BYTES {
            let piece = first.split_to(CHUNK_BYTES);
            state.queue_bytes -= piece.len();
            state.note_taken(piece.len());
            state.queue.push_front((first, place));
            return Poll::Ready(Some(piece));
        }

        drop(place);
        state.queue_bytes -= first.len();
        state.note_taken(first.len());

        let small = |frame: &Bytes| frame.len() < ALONE_BYTES;
        if !small(&first) || !state.queue.front().is_some_and(|(next, _)| small(next)) {
            return Poll::Ready(Some(first));
        }

        // Small frames that wait together share a chunk, and so a packet.
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES.min(first.len() + state.queue_bytes));
        chunk.extend_from_slice(&first);
        while chunk.len() < CHUNK_BYTES
            && state.queue.front().is_some_and(|(next, _)| small(next))
            && let Some((next, _)) = state.queue.pop_front()
        {
            state.queue_bytes -= next.len();
            chunk.extend_from_slice(&next);
        }
        Poll::Ready(Some(chunk.freeze()))
    }
}

/// Keeps a lane up as long as it is used.
async fn keep_up(parts: Arc<LanesParts>, lane: Arc<PeerLane>) {
    let mut pause = PAUSE_MIN;
    loop {
        // Dialled only for a call, so peers that are not needed cost no connection.
        while !matches!(lane.lock().link, LinkState::Idle) || lane.lock().calls.is_empty() {
            lane.called.notified().await;
        }

        let started = Instant::now();
        let error = connect_and_run(&parts, &lane).await;

        // A lane whose peer has moved is dialled again at once.
        let moved = matches!(lane.lock().link, LinkState::Idle);
        if moved {
            continue;
        }

        tracing::debug!(peer = %lane.to, lane = lane.lane.name(), %error, "a lane broke");
        lane.lock().end(&error, LinkState::Down(error.clone()));
        // A lane that worked for a while starts over with the shortest pause.
        if started.elapsed() > PAUSE_MAX {
            pause = PAUSE_MIN;
        }

        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
        lane.lock().link = LinkState::Idle;
    }
}

/// Dials the peer and delivers replies until the connection ends. Returns the reason why it did.
async fn connect_and_run(parts: &LanesParts, lane: &Arc<PeerLane>) -> LaneError {
    let Some((cluster, from)) = parts.identity.get() else {
        return LaneError::Down("this node belongs to no cluster yet".into());
    };
    let Some(peer) = parts.resolver.resolve(lane.to) else {
        return LaneError::Unresolved(lane.to);
    };

    let hello = Hello {
        cluster,
        from,
        from_directory: parts.identity.directory,
        to: lane.to,
        to_directory: peer.directory,
    };

    let generation = {
        let mut state = lane.lock();
        state.link = LinkState::Up(peer.clone());
        state.generation
    };

    let peer_directories = parts.identity.peer_directories();
    let hello = match peer_directories {
        Some(peer_directories) => {
            wire::encode_greeting(&hello, peer_directories.own(), &parts.lease_timings)
        }
        None => wire::encode_hello(&hello),
    };
    let outbox = OutgoingFrames {
        lane: lane.clone(),
        generation,
        hello: Some(hello),
    };

    let outgoing: Outgoing = Box::pin(outbox);

    let dialled = tokio::time::timeout(
        CONNECT_TIMEOUT,
        parts.dial.dial(lane.to, peer.clone(), lane.lane, outgoing),
    )
    .await;
    match dialled {
        Ok(Ok(incoming)) => {
            let error = deliver(parts, lane, &peer, generation, incoming).await;
            if let LaneError::Refused(PeerRefusal::OtherTimings(theirs)) = &error {
                let (peer, own) = (lane.to, parts.lease_timings);
                // Logged rarely, because each dial finds it again.
                rarely!(
                    error,
                    "{peer} refuses this node: it runs {theirs}, and this node {own}; give all \
                     nodes the same --lease-reads and --timing-factor"
                );
            }
            if let (Some(peer_directories), LaneError::Refused(refusal)) =
                (peer_directories, &error)
            {
                peer_directories.refused_by(peer.address.as_str(), refusal);
            }
            error
        }
        Ok(Err(error)) => error,
        Err(_) => LaneError::Down(format!("no connection within {CONNECT_TIMEOUT:?}")),
    }
}

async fn deliver(
    parts: &LanesParts,
    lane: &PeerLane,
    peer: &Peer,
    generation: u64,
    mut incoming: Incoming,
) -> LaneError {
    let mut reader = FrameReader::default();
    let mut session: Option<PeerSession> = None;
    let mut check = tokio::time::interval(CHECK_EVERY);
    check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);

    loop {
        let chunk = tokio::select! {
            biased;
            chunk = incoming.next() => chunk,
            _ = check.tick() => {
                let mut state = lane.lock();
                if state.generation != generation {
                    return LaneError::Broken("the peer has moved".into());
                }

                // Calls whose callers have given up no longer count as waiting.
                state.calls.retain(|_, call| !call.caller.is_closed());
                state.unanswered_bytes = state.calls.values().map(|call| call.bytes).sum();
                let silence_max =
                    SILENCE_MAX + time_for(state.unanswered_bytes.min(CONNECTION_BYTES_MAX));
                if state.waiting_since.is_some_and(|since| since.elapsed() > silence_max) {
                    return LaneError::Late(silence_max);
                }
                continue;
            }
        };

        match chunk {
            None => return LaneError::Broken("the peer ended it".into()),
            Some(Err(error)) => return error,
            // HTTP/2 may end a body with an empty chunk, which is no sign of life.
            Some(Ok(chunk)) if chunk.is_empty() => continue,
            Some(Ok(chunk)) => reader.push(chunk),
        }

        if session.as_ref().is_some_and(|session| !session.note()) {
            return LaneError::Broken("a later start of the peer has taken its place".into());
        }
        loop {
            match hand_out(lane, generation, &mut reader, &parts.reachability) {
                Ok(None) => break,
                // Checked before the first reply: no reply of an old copy may count.
                Ok(Some(starts)) => {
                    if let Some(peer_directories) = parts.identity.peer_directories() {
                        match peer_directories.admit(peer.directory, &starts).await {
                            Ok(admitted) => session = Some(admitted),
                            Err(refusal) => {
                                return LaneError::Broken(format!(
                                    "the peer is not taken: {refusal}"
                                ));
                            }
                        }
                    }
                }
                Err(error) => return error,
            }
        }
        // Noted only now, because another directory that answers under the address, and refuses, is
        // not the node.
        parts.liveness.note_reply(lane.to);
    }
}

/// Hands each reply that has arrived to its caller. A reply to the hello refuses the whole lane, or
/// announces the peer's starts; those are returned before anything else is read.
fn hand_out(
    lane: &PeerLane,
    generation: u64,
    reader: &mut FrameReader,
    reachability: &Reachability,
) -> Result<Option<Starts>, LaneError> {
    let mut state = lane.lock();

    // A reply on an old connection must not answer a call on the next.
    if state.generation != generation {
        return Err(LaneError::Broken("the peer has moved".into()));
    }

    while let Some(frame) = reader.next()? {
        if frame.sequence == CANNOT_CONNECT_SEQUENCE {
            reachability.note_unreachable_from(lane.to);
            continue;
        }

        if frame.sequence == HELLO_SEQUENCE {
            read_reply(&frame)?;
            match frame.welcome()? {
                Some(starts) => return Ok(Some(starts)),
                None => continue,
            }
        }

        // A reply without a call is late: its caller has given up.
        if let Some(call) = state.calls.remove(&frame.sequence) {
            state.unanswered_bytes = state.unanswered_bytes.saturating_sub(call.bytes);
            let _ = call.caller.send(Ok(frame));
        }
    }

    state.waiting_since = (!state.calls.is_empty()).then(Instant::now);
    state.taken_bytes = 0;
    Ok(None)
}

/// The sequence number of replies to a hello, by which a whole lane is refused.
pub(super) const HELLO_SEQUENCE: u64 = u64::MAX;

/// The sequence number under which the serving side says that it can't connect to the one that
/// dialled. No call ever has it, so programs that do not know it ignore the frame.
pub(super) const CANNOT_CONNECT_SEQUENCE: u64 = u64::MAX - 1;
