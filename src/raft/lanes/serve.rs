//! [`serve_lane`], the serving side of a lane: a stream of replies that reads the frames as it is polled.
//!
//! No task and no channel stands between the connection and the groups. Frames are begun in the order in which they came: for each an
//! append is in the group's own queue before the next is looked at. Replies go out as they are ready. A group that stalls holds its own
//! frames only, and past a bound further ones of it are refused ([`Refusal::Busy`]), so it can't fill the lane.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt};
use tokio::task::coop::unconstrained;

use super::client::HELLO_SEQUENCE;
use crate::raft::registry::Registry;
use crate::raft::transport::Lane;
use crate::raft::wire::{self, Arrived, FrameReader, Hello, Refusal, Reply};
use crate::types::NodeId;

/// Frames of one lane that are being worked on. Reached only if hundreds of groups stall at once; then the lane waits for them.
const FRAMES_MAX: usize = 8 << 10;
/// Replies go out in chunks of about this size.
const CHUNK_BYTES: usize = 64 << 10;

/// Serves one connection of a lane: `incoming` is what the peer sends, the stream that is returned goes back to it. It ends when `incoming`
/// does, or with a refusal when the peer's first frame names other ends than itself and us.
pub fn serve_lane<I, E>(registry: Arc<Registry>, lane: Lane, incoming: I) -> impl Stream<Item = Bytes> + Send + 'static
where
    I: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    Serving {
        registry,
        lane,
        incoming: Box::pin(incoming),
        reader: FrameReader::default(),
        peer: None,
        is_used: false,
        working: FuturesUnordered::new(),
        out: BytesMut::new(),
        ended: false,
    }
}

type Working = BoxFuture<'static, (u64, Reply)>;

struct Serving<I> {
    registry: Arc<Registry>,
    lane: Lane,
    incoming: Pin<Box<I>>,
    reader: FrameReader,
    /// Known once its hello was accepted.
    peer: Option<NodeId>,
    /// A request has come.
    is_used: bool,
    working: FuturesUnordered<Working>,
    out: BytesMut,
    /// Nothing more is read. What is being worked on is dropped: nobody would hear the reply.
    ended: bool,
}

impl<I, E> Stream for Serving<I>
where
    I: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    type Item = Bytes;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let this = self.get_mut();
        while !this.ended && this.working.len() < FRAMES_MAX {
            match this.incoming.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(chunk))) => this.take(chunk),
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(lane = this.lane.name(), peer = ?this.peer, %error, "a lane from a peer broke");
                    this.ended = true;
                }
                Poll::Ready(None) => this.ended = true,
                Poll::Pending => break,
            }
        }
        while this.out.len() < CHUNK_BYTES {
            match this.working.poll_next_unpin(context) {
                Poll::Ready(Some((sequence, reply))) => wire::encode_reply(&mut this.out, sequence, &reply),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        match (this.out.is_empty(), this.ended) {
            (false, _) => Poll::Ready(Some(this.out.split().freeze())),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }
}

/// The server drops it when the connection ends, mostly without having said so before.
impl<I> Drop for Serving<I> {
    fn drop(&mut self) {
        if let Some(peer) = self.peer.filter(|_| self.is_used) {
            self.registry.lane_ended(peer);
        }
    }
}

impl<I> Serving<I> {
    fn take(&mut self, chunk: Bytes) {
        if let Some(peer) = self.peer {
            self.registry.heard().note(peer);
        }
        self.reader.push(chunk);
        loop {
            match self.reader.next() {
                Ok(Some(arrived)) => self.begin(&arrived),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(lane = self.lane.name(), peer = ?self.peer, %error, "a peer sent what is no frame");
                    self.ended = true;
                    return;
                }
            }
            if self.ended {
                return;
            }
        }
    }

    fn begin(&mut self, arrived: &Arrived) {
        if self.peer.is_none() {
            match arrived.hello().map_err(|_| Refusal::Unreadable).and_then(|hello| self.greet(&hello)) {
                Ok(peer) => {
                    self.registry.heard().note(peer);
                    self.peer = Some(peer);
                }
                Err(refusal) => {
                    wire::encode_reply(&mut self.out, HELLO_SEQUENCE, &Reply::Refused(refusal));
                    self.ended = true;
                }
            }
            return;
        }
        let sequence = arrived.sequence;
        let begun = match arrived.request() {
            Ok((head, request, tail)) => {
                // One that is good for a hello only would break again and again, and its peer pass for ended each time.
                if let Some(peer) = self.peer.filter(|_| !std::mem::replace(&mut self.is_used, true)) {
                    self.registry.heard().lane_began(peer);
                }
                self.registry.handle(self.lane, head, request, tail)
            }
            Err(error) => {
                tracing::warn!(lane = self.lane.name(), peer = ?self.peer, %error, "a peer sent a request that can't be read");
                Err(Refusal::Unreadable)
            }
        };
        match begun {
            // Tokio makes a task that has done much wait, and wakes what waited last first: appends would overtake one another on their way
            // to the group, and a follower would refuse what it is about to have.
            Ok(reply) => self.working.push(Box::pin(unconstrained(async move { (sequence, reply.await) }))),
            Err(refusal) => wire::encode_reply(&mut self.out, sequence, &Reply::Refused(refusal)),
        }
    }

    /// Whether the lane is from a node of our cluster to this very node.
    fn greet(&self, hello: &Hello) -> Result<NodeId, Refusal> {
        let identity = self.registry.identity();
        if hello.to_directory != identity.directory {
            return Err(Refusal::OtherDirectory(identity.directory));
        }
        let (cluster, node) = identity.get().ok_or(Refusal::NoCluster)?;
        if hello.cluster != cluster {
            return Err(Refusal::OtherCluster);
        }
        if hello.to != node {
            return Err(Refusal::OtherNode(node));
        }
        Ok(hello.from)
    }
}
