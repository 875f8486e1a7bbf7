//! [`serve_lane`], the serving side of a lane: a stream of replies that reads the frames as it is
//! polled.
//!
//! No task and no channel stands between the connection and the groups. Frames are begun in the
//! order in which they came: an append is in its group's own queue before the next frame is looked
//! at. Replies go out as they are ready. A group that stalls holds its own frames only, and past a
//! bound further ones of it are refused ([`PeerRefusal::Busy`]), so it can't fill the lane.
//!
//! Before its hello a lane may be anybody's: no more is read than a hello takes, and only for a
//! while. Large frames are received a few at a time on the whole node; the others wait in their
//! connections.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, Sleep};

use super::client::{CANNOT_CONNECT_SEQUENCE, HELLO_SEQUENCE};
use super::limiter::{LaneOwner, LanePermit};
use super::peer_directories::PeerSession;
use crate::raft::election::leases::LeaseTimings;
use crate::raft::registry::Registry;
use crate::raft::transport::Lane;
use crate::raft::transport::wire::{
    self, FRAME_BYTES_MAX, FrameReader, HELLO_BYTES_MAX, Hello, PeerRefusal, PeerReply,
    ReceivedFrame,
};
use crate::telemetry::rarely;
use crate::types::NodeId;

/// Frames of one lane that are handled at once. Reached only if hundreds of groups stall together;
/// then the lane waits.
const FRAMES_MAX: usize = 8 << 10;
/// Size from which frames wait for their turn to be received. An append is about a mebibyte, unless
/// an entry alone is larger.
const LARGE_FRAME_BYTES: usize = 4 << 20;
/// Time that a hello, or the next piece of a large frame, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Replies go out in chunks of about this size.
const CHUNK_BYTES: usize = 64 << 10;

/// Serves one connection of a lane: `incoming` is what the peer sends, and the returned stream goes
/// back to it. Ends when `incoming` does, or with a refusal if the peer's first frame is not from a
/// peer to this node.
pub fn serve_lane<I, E>(
    registry: Arc<Registry>,
    lane: Lane,
    incoming: I,
) -> impl Stream<Item = Bytes> + Send + 'static
where
    I: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    // Only its hello says whose lane it is, so it begins among the unknown ones.
    let permit = registry.lane_limiter().take(LaneOwner::Unknown);
    LaneServer {
        registry,
        lane,
        incoming: Box::pin(incoming),
        reader: FrameReader::with_limit(HELLO_BYTES_MAX),
        ended: permit.is_none(),
        permit: permit.map(PermitGuard::new),
        patience: Box::pin(tokio::time::sleep(PATIENCE)),
        turn: LargeFrameTurn::None,
        peer: None,
        greeting: None,
        session: None,
        is_used: false,
        working: FuturesUnordered::new(),
        out: BytesMut::new(),
    }
}

type Working = BoxFuture<'static, (u64, PeerReply)>;
type PendingGreeting = BoxFuture<'static, (NodeId, Result<PeerSession, PeerRefusal>)>;

/// The permit of a lane, and the signal that it has to be given up.
struct PermitGuard {
    permit: LanePermit,
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl PermitGuard {
    fn new(permit: LanePermit) -> Self {
        let ended = Box::pin(permit.ended.clone().cancelled_owned());
        Self { permit, ended }
    }
}

/// The turn of a large frame to be received.
enum LargeFrameTurn {
    None,
    Awaited(BoxFuture<'static, Option<OwnedSemaphorePermit>>),
    Taken { _permit: OwnedSemaphorePermit },
}

struct LaneServer<I> {
    registry: Arc<Registry>,
    lane: Lane,
    incoming: Pin<Box<I>>,
    reader: FrameReader,
    permit: Option<PermitGuard>,
    /// Runs while a hello or the rest of a large frame is awaited.
    patience: Pin<Box<Sleep>>,
    turn: LargeFrameTurn,
    /// Known once its hello was accepted.
    peer: Option<NodeId>,
    /// Set while its hello is checked; nothing more is read until then.
    greeting: Option<PendingGreeting>,
    /// Set if its start was accepted; None for a peer that announces none.
    session: Option<PeerSession>,
    /// True once a request has arrived.
    is_used: bool,
    working: FuturesUnordered<Working>,
    out: BytesMut,
    /// True if nothing more is read. Requests that are being handled are dropped, because nobody
    /// would hear the reply.
    ended: bool,
}

impl<I, E> Stream for LaneServer<I>
where
    I: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    type Item = Bytes;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let this = self.get_mut();
        this.ended |= this.has_lost_patience(context);
        while !this.ended
            && this.working.len() < FRAMES_MAX
            && this.is_greeted(context)
            && this.may_receive(context)
        {
            match this.incoming.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(chunk))) => this.take(chunk),
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(lane = this.lane.name(), peer = ?this.peer, %error, "a lane \
                        from a peer broke");
                    this.ended = true;
                }
                Poll::Ready(None) => this.ended = true,
                Poll::Pending => break,
            }
        }
        while this.out.len() < CHUNK_BYTES {
            match this.working.poll_next_unpin(context) {
                Poll::Ready(Some((sequence, reply))) => {
                    wire::encode_reply(&mut this.out, sequence, &reply)
                }
                Poll::Ready(None) | Poll::Pending => break,
            }
        }

        // Told with replies that go out anyway, because there is no other way to reach this peer.
        if !this.out.is_empty()
            && this
                .peer
                .is_some_and(|peer| this.registry.reachability().is_unreachable(peer))
        {
            wire::encode_reply(&mut this.out, CANNOT_CONNECT_SEQUENCE, &PeerReply::Noted);
        }

        match (this.out.is_empty(), this.ended) {
            (false, _) => Poll::Ready(Some(this.out.split().freeze())),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }
}

/// The server drops the stream when the connection ends, usually without another poll.
impl<I> Drop for LaneServer<I> {
    fn drop(&mut self) {
        if let Some(peer) = self.peer.filter(|_| self.is_used) {
            self.registry.on_lane_down(peer);
        }
    }
}

impl<I> LaneServer<I> {
    /// Returns true if the lane has to make room for another, or what it owes does not arrive in
    /// time.
    fn has_lost_patience(&mut self, context: &mut Context<'_>) -> bool {
        if let Some(permit) = &mut self.permit
            && permit.ended.as_mut().poll(context).is_ready()
        {
            tracing::debug!(lane = self.lane.name(), peer = ?self.peer, "a silent lane makes room \
                for another");
            return true;
        }

        let owes = self.peer.is_none() || matches!(self.turn, LargeFrameTurn::Taken { .. });
        owes && !self.ended && self.patience.as_mut().poll(context).is_ready()
    }

    /// Returns true if the next piece may be received. While it belongs to a large frame whose turn
    /// has not come it may not; the task is woken when it may.
    fn may_receive(&mut self, context: &mut Context<'_>) -> bool {
        let Some(bytes) = self
            .reader
            .awaited_bytes()
            .filter(|bytes| *bytes > LARGE_FRAME_BYTES)
        else {
            self.turn = LargeFrameTurn::None;
            return true;
        };

        // Until its turn the frame waits in its connection, where it costs this node no memory.
        if let LargeFrameTurn::None = self.turn {
            let kib =
                u32::try_from(bytes.min(FRAME_BYTES_MAX).div_ceil(1 << 10)).unwrap_or(u32::MAX);
            let turns = self.registry.large_frames().clone();
            self.turn = LargeFrameTurn::Awaited(Box::pin(async move {
                turns.acquire_many_owned(kib).await.ok()
            }));
        }
        if let LargeFrameTurn::Awaited(turn) = &mut self.turn {
            let Poll::Ready(permit) = turn.as_mut().poll(context) else {
                return false;
            };
            let Some(_permit) = permit else { return true };
            self.turn = LargeFrameTurn::Taken { _permit };
            self.patience.as_mut().reset(Instant::now() + PATIENCE);
            // Polled once, so that the timer wakes this lane.
            self.ended |= self.patience.as_mut().poll(context).is_ready();
        }
        !self.ended
    }

    /// Returns true if no hello is being checked, and none was refused.
    fn is_greeted(&mut self, context: &mut Context<'_>) -> bool {
        let Some(greeting) = &mut self.greeting else {
            return true;
        };
        let Poll::Ready((peer, admitted)) = greeting.poll_unpin(context) else {
            return false;
        };
        self.greeting = None;
        match admitted {
            Ok(session) => {
                self.session = Some(session);
                self.accept(peer);
                if let Some(peer_directories) = self.registry.identity().peer_directories() {
                    wire::encode_welcome(&mut self.out, HELLO_SEQUENCE, peer_directories.own());
                }
                self.read();
            }
            Err(refusal) => self.refuse(refusal),
        }
        !self.ended
    }

    fn accept(&mut self, peer: NodeId) {
        self.registry.liveness().note_frame(peer);
        self.peer = Some(peer);
        self.reader.set_limit(FRAME_BYTES_MAX);
    }

    fn refuse(&mut self, refusal: PeerRefusal) {
        wire::encode_reply(&mut self.out, HELLO_SEQUENCE, &PeerReply::Refused(refusal));
        self.ended = true;
    }

    fn take(&mut self, chunk: Bytes) {
        // A later start of the same directory has taken over, so this one is not listened to.
        if self.session.as_ref().is_some_and(|session| !session.note()) {
            self.ended = true;
            return;
        }
        if let Some(peer) = self.peer {
            self.registry.liveness().note_frame(peer);
            if let Some(permit) = &self.permit {
                permit.permit.note();
            }
        }
        if let LargeFrameTurn::Taken { .. } = self.turn {
            self.patience.as_mut().reset(Instant::now() + PATIENCE);
        }
        self.reader.push(chunk);
        self.read();
    }

    /// Begins to handle what has arrived, as far as it may.
    fn read(&mut self) {
        loop {
            match self.reader.next() {
                Ok(Some(frame)) => self.begin(&frame),
                Ok(None) => return,
                Err(error) => {
                    let (lane, peer) = (self.lane.name(), self.peer);
                    rarely!(warn, lane, ?peer, %error, "what a peer sent is no frame");
                    self.ended = true;
                    return;
                }
            }
            if self.ended || self.greeting.is_some() {
                return;
            }
        }
    }

    fn begin(&mut self, frame: &ReceivedFrame) {
        if self.peer.is_none() {
            let greeted = frame.hello().map_err(|_| PeerRefusal::Unreadable).and_then(
                |(hello, starts, lease_timings)| {
                    let peer = self.grant_permit(&hello)?;
                    self.compare_timings(peer, lease_timings)?;
                    Ok((peer, hello.from_directory, starts))
                },
            );

            match greeted {
                Ok((peer, directory, Some(starts))) => {
                    match self.registry.identity().peer_directories().cloned() {
                        Some(peer_directories) => {
                            let admitted = async move {
                                (peer, peer_directories.admit(directory, &starts).await)
                            };
                            self.greeting = Some(Box::pin(admitted));
                        }
                        None => self.accept(peer),
                    }
                }
                Ok((peer, _, None)) => self.accept(peer),
                Err(refusal) => self.refuse(refusal),
            }
            return;
        }

        let sequence = frame.sequence;
        let begun = match frame.request() {
            Ok((header, request, tail)) => {
                // Counted as up only now: a lane that gets no further than its hello would break
                // again and again, and its peer would pass for dead each time.
                if let Some(peer) = self
                    .peer
                    .filter(|_| !std::mem::replace(&mut self.is_used, true))
                {
                    self.registry.liveness().on_lane_up(peer);
                }
                self.registry.handle(self.lane, header, request, tail)
            }
            Err(error) => {
                let (lane, peer) = (self.lane.name(), self.peer);
                rarely!(warn, lane, ?peer, %error, "a peer sent a request that can't be read");
                Err(PeerRefusal::Unreadable)
            }
        };

        match begun {
            // Not subject to tokio's budget: tokio makes a task that has done much wait, and wakes
            // the one that waited last first. Appends would overtake one another on their way to
            // the group, and the follower would refuse them.
            Ok(reply) => {
                self.working.push(Box::pin(unconstrained(
                    async move { (sequence, reply.await) },
                )))
            }
            Err(refusal) => {
                wire::encode_reply(&mut self.out, sequence, &PeerReply::Refused(refusal))
            }
        }
    }

    /// Checks the hello, and takes the permit that the peer is entitled to.
    fn grant_permit(&mut self, hello: &Hello) -> Result<NodeId, PeerRefusal> {
        let peer = self.greet(hello)?;

        // Nodes that are not in the view share a few places, as anybody could claim to be one.
        let is_known = self.registry.knows(peer, hello.from_directory);
        let owner = if is_known {
            LaneOwner::Member(peer, self.lane)
        } else {
            LaneOwner::Stranger
        };
        let permit = self
            .registry
            .lane_limiter()
            .take(owner)
            .ok_or(PeerRefusal::Busy)?;
        self.permit = Some(PermitGuard::new(permit));
        Ok(peer)
    }

    /// Refuses a peer whose lease timings differ from this node's. Programs that announce none are
    /// accepted.
    fn compare_timings(
        &self,
        peer: NodeId,
        lease_timings: Option<LeaseTimings>,
    ) -> Result<(), PeerRefusal> {
        let own = self.registry.lease_timings();
        let Some(theirs) = lease_timings.filter(|theirs| *theirs != own) else {
            return Ok(());
        };

        let fits = own.fits(&theirs);
        let what = if fits {
            "does not keep time with this node"
        } else {
            "is refused"
        };
        // Logged rarely, because each lane finds it again.
        rarely!(
            error,
            "{peer} {what}: it runs {theirs}, and this node {own}; give all nodes the same \
             --lease-reads and --timing-factor"
        );

        if fits {
            Ok(())
        } else {
            Err(PeerRefusal::OtherTimings(own))
        }
    }

    /// Checks that the hello is from a node of our cluster to this very node.
    fn greet(&self, hello: &Hello) -> Result<NodeId, PeerRefusal> {
        let identity = self.registry.identity();

        // An address may have changed hands, and the frames may be meant for the node before.
        if hello.to_directory != identity.directory {
            return Err(PeerRefusal::OtherDirectory(identity.directory));
        }
        let (cluster, node) = identity.get().ok_or(PeerRefusal::NoCluster)?;
        if hello.cluster != cluster {
            return Err(PeerRefusal::OtherCluster);
        }
        if hello.to != node {
            return Err(PeerRefusal::OtherNode(node));
        }
        Ok(hello.from)
    }
}
