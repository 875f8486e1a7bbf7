//! One connection, from its first byte to its end.
//!
//! It ends by itself when its client says nothing for too long, does not take what it asked for, or
//! has no place here; and in order when the server stops. HTTP/1 is timed by hyper between
//! requests, HTTP/2, where streams come and go, is timed here.
//!
//! What a connection is watched by is asked only when it has something to say ([`Apart`]), not with
//! every request.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::Write;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::CONNECTION;
use http::{HeaderValue, Request, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};
use tower::Service;

use super::admission::{Place, ServerStats, Verdict};
use super::apart::Apart;
use super::drain::Attending;
use super::haste::Haste;
use super::heads::{HeadMeter, Metered};
use super::inbox::{Arrivals, Inbox};
use super::limits::Limits;
use super::outbox::Outbox;
use super::paced::Paced;
use super::problem::{Code, Problem};
use super::server::BUFFER_BYTES_MIN;
use super::{body, framing};
use crate::budget::Budget;

/// When a server stops, its answers over HTTP/1 say that they are the last of their connection. One
/// that is idle, or was only just made, may be used just then, and its client could not tell
/// whether that request was done if it were closed: so it is closed only after this.
const IDLE_KEPT_FOR: Duration = Duration::from_millis(300);

/// How long a connection may stand at the door without a request: peers send theirs at once.
const AT_THE_DOOR_FOR: Duration = Duration::from_secs(1);

/// How long a connection that was asked to end may take. A client that does not play along is cut.
const END_FOR: Duration = Duration::from_secs(5);

/// While more than half of the places are taken, a connection has so long for its first request.
const FIRST_REQUEST_WHILE_CROWDED: Duration = Duration::from_secs(10);

/// What a connection was given when it was let in.
pub struct Admitted {
    pub place: Place,
    pub attending: Attending,
    pub is_crowded: bool,
}

/// What connections are served with.
pub struct Serving {
    pub router: Router,
    pub http: Builder<TokioExecutor>,
    pub stats: Arc<ServerStats>,
    pub shutdown: CancellationToken,
    pub limits: Limits,
    pub haste: Haste,
    /// What heads of requests take.
    pub heads: Arc<Budget>,
}

/// Where a request came from. Every request has one among its extensions.
#[derive(Debug, Clone)]
pub struct Caller {
    pub address: SocketAddr,
    pub inbox: Arc<Inbox>,
}

/// What a connection and its requests share.
struct Talk {
    place: Place,
    /// A clone of the server's takes its lock: so this is not cloned for a request.
    shutdown: CancellationToken,
    attending: Attending,
    /// Whether there was a request.
    spoke: AtomicBool,
    /// Whether it can be used again, and there is no other word for its end than closing it.
    may_be_reused: AtomicBool,
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    meter: Arc<HeadMeter>,
    /// Where its client is.
    address: SocketAddr,
    /// Notified of streams: they have to be looked at from then on.
    streams: Notify,
    /// Notified when an answer was the last of this connection.
    over: Notify,
}

impl Serving {
    /// Serves one connection until it ends.
    pub async fn serve(&self, stream: TcpStream, address: SocketAddr, admitted: Admitted) {
        let Admitted {
            place,
            attending,
            is_crowded,
        } = admitted;
        let is_at_the_door = place.is_at_the_door();
        if is_at_the_door && !self.speaks(&stream, &place).await {
            place.refuse();
            return tell_too_many(stream);
        }

        let first_request = match (is_at_the_door, is_crowded) {
            (true, _) => AT_THE_DOOR_FOR,
            (false, true) => FIRST_REQUEST_WHILE_CROWDED.min(self.limits.head_timeout),
            (false, false) => self.limits.head_timeout,
        };
        let talk = Arc::new(Talk {
            place,
            shutdown: self.shutdown.clone(),
            attending,
            spoke: AtomicBool::new(false),
            may_be_reused: AtomicBool::new(false),
            inbox: Arc::default(),
            outbox: Arc::default(),
            meter: Arc::new(HeadMeter::new(
                &self.heads,
                self.limits.head_bytes_max.max(BUFFER_BYTES_MIN),
            )),
            address,
            streams: Notify::new(),
            over: Notify::new(),
        });
        self.talk(stream, &talk, first_request).await;
    }

    /// Waits until somebody at the door says something. False: it says nothing, or has to go.
    async fn speaks(&self, stream: &TcpStream, place: &Place) -> bool {
        let mut first = [0];
        tokio::select! {
            peeked = stream.peek(&mut first) => peeked.is_ok_and(|bytes| bytes > 0),
            () = place.left() => false,
            () = sleep(AT_THE_DOOR_FOR) => false,
            () = self.shutdown.cancelled() => false,
        }
    }

    async fn talk(&self, stream: TcpStream, talk: &Arc<Talk>, first_request: Duration) {
        let service = service_fn(|request: Request<Incoming>| {
            Arc::clone(talk).answer(self.router.clone(), request)
        });
        let (stats, outbox) = (Arc::clone(&self.stats), Arc::clone(&talk.outbox));
        let arrivals = Arrivals::new(Arc::clone(&talk.inbox), self.limits.head_arrival_timeout);
        let stream = Paced::new(
            stream,
            self.limits.write_timeout,
            stats,
            self.haste.clone(),
            outbox,
            arrivals,
        );
        let stream = Metered::new(
            stream,
            Arc::clone(&talk.meter),
            Arc::clone(&talk.inbox),
            Arc::clone(&talk.outbox),
        );
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        let mut watch = Watch {
            // hyper's own timeout does not run until it knows which version of HTTP is spoken.
            silence: pin!(sleep(first_request)),
            stop: pin!(talk.shutdown.cancelled()),
            last_use: pin!(sleep(IDLE_KEPT_FOR)),
            look: pin!(sleep(self.look_interval())),
            cut: pin!(sleep(END_FOR)),
            waits: true,
            is_stopping: false,
            lingers: false,
            has_streams: false,
            is_ending: false,
        };
        let apart = Apart::new();

        loop {
            let mut next = pin!(self.next_step(talk, &mut watch));
            apart.ring();
            let step = poll_fn(|cx| match connection.as_mut().poll(cx) {
                Poll::Ready(Ok(())) => Poll::Ready(Step::End),
                Poll::Ready(Err(error)) => {
                    tracing::trace!(%error, "a connection ended badly");
                    Poll::Ready(Step::End)
                }
                Poll::Pending => apart.poll(cx, next.as_mut()),
            });
            match step.await {
                Step::End => return,
                Step::ShutDown => connection.as_mut().graceful_shutdown(),
            }
        }
    }

    /// Waits until something is to be done about a connection, and says what.
    async fn next_step(&self, talk: &Talk, watch: &mut Watch<'_, '_>) -> Step {
        loop {
            tokio::select! {
                biased;
                () = watch.stop.as_mut(), if !watch.is_stopping => {
                    watch.is_stopping = true;
                    if !talk.may_be_used() {
                        return Step::ShutDown;
                    }
                    watch.lingers = true;
                    watch.last_use.as_mut().reset(Instant::now() + IDLE_KEPT_FOR);
                }
                () = watch.last_use.as_mut(), if watch.lingers => {
                    watch.lingers = false;
                    return Step::ShutDown;
                }
                () = watch.silence.as_mut(), if watch.waits => {
                    watch.waits = false;
                    if talk.place.is_at_the_door() {
                        return Step::End;
                    }
                    if !talk.spoke.load(Ordering::Relaxed) {
                        watch.end_soon();
                        return Step::ShutDown;
                    }
                }
                () = talk.place.left(), if watch.waits && talk.place.is_at_the_door() => {
                    return Step::End;
                }
                () = talk.over.notified(), if !watch.is_ending => {
                    watch.end_soon();
                    return Step::ShutDown;
                }
                () = talk.streams.notified(), if !watch.has_streams => {
                    watch.has_streams = true;
                    watch.look.as_mut().reset(Instant::now() + self.look_interval());
                }
                () = watch.look.as_mut(), if watch.has_streams => {
                    watch.look.as_mut().reset(Instant::now() + self.look_interval());
                    if self.is_stalled(talk) {
                        return Step::End;
                    }
                    if !watch.is_ending && self.is_idle(talk) {
                        watch.end_soon();
                        return Step::ShutDown;
                    }
                }
                () = watch.cut.as_mut(), if watch.is_ending => return Step::End,
            }
        }
    }

    /// Returns how often streams are looked at.
    fn look_interval(&self) -> Duration {
        self.limits.head_timeout.min(self.limits.write_timeout) / 4
    }

    fn is_stalled(&self, talk: &Talk) -> bool {
        let is_stalled =
            talk.outbox.is_stuck(self.limits.write_timeout) || talk.outbox.misses(&self.haste);
        if is_stalled {
            self.stats.stalled();
            tracing::debug!("a connection is cut: its client does not take what it asked for");
        }
        is_stalled
    }

    fn is_idle(&self, talk: &Talk) -> bool {
        talk.outbox
            .idle_since()
            .is_some_and(|since| since.elapsed() > self.limits.head_timeout)
    }
}

/// What is to be done about a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Let it finish what is in flight.
    ShutDown,
    /// It is over, or cut.
    End,
}

/// What a connection is watched by, beside what comes over it.
struct Watch<'a, 's> {
    /// Whoever has asked for nothing by then has to go.
    silence: Pin<&'a mut Sleep>,
    waits: bool,
    stop: Pin<&'a mut WaitForCancellationFuture<'s>>,
    is_stopping: bool,
    /// The end of a connection that may be used again while the server stops.
    last_use: Pin<&'a mut Sleep>,
    lingers: bool,
    /// The next look at the streams of HTTP/2.
    look: Pin<&'a mut Sleep>,
    has_streams: bool,
    /// The end of one that was asked to end.
    cut: Pin<&'a mut Sleep>,
    is_ending: bool,
}

impl Watch<'_, '_> {
    /// Gives a connection that was asked to end some time for it.
    fn end_soon(&mut self) {
        self.is_ending = true;
        self.cut.as_mut().reset(Instant::now() + END_FOR);
    }
}

impl Talk {
    /// Returns whether its client may send a request before it can know that the server stops: one
    /// that has just connected is about to, and over HTTP/1 one may come on any connection.
    fn may_be_used(&self) -> bool {
        !self.spoke.load(Ordering::Relaxed) || self.may_be_reused.load(Ordering::Relaxed)
    }

    /// Answers one request of this connection.
    async fn answer(
        self: Arc<Self>,
        mut router: Router,
        mut request: Request<Incoming>,
    ) -> Result<Response, Infallible> {
        self.spoke.store(true, Ordering::Relaxed);
        // HTTP/2 has a word for a connection that takes no more requests.
        let is_old = request.version() <= Version::HTTP_11;
        self.may_be_reused.store(is_old, Ordering::Relaxed);

        let in_flight = self.meter.begin(&request);
        let verdict = self.place.judge(request.method(), request.uri().path());
        request.extensions_mut().insert(Caller {
            address: self.address,
            inbox: Arc::clone(&self.inbox),
        });
        if !is_old {
            return Ok(self.answer_stream(router, request, verdict).await);
        }
        let _asked = self.inbox.begin(request.version());
        let checked = framing::check(request.version(), request.headers());
        let is_last = verdict != Verdict::Serve || checked.is_err();
        let mut response = match (checked, verdict) {
            (Err(problem), _) => {
                tracing::debug!(client = %self.address, %problem.detail, "a request's head is \
                    refused");
                let (parts, body) = request.into_parts();
                body::discard(&parts, Body::new(body));
                problem.into_response()
            }
            (Ok(()), Verdict::Serve | Verdict::ServeLast) => router
                .call(request)
                .await
                .unwrap_or_else(|never| match never {}),
            (Ok(()), Verdict::Refuse) => too_many().into_response(),
        };
        drop(in_flight);
        if is_last || self.shutdown.is_cancelled() {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    /// Answers a request over HTTP/2.
    async fn answer_stream(
        &self,
        mut router: Router,
        request: Request<Incoming>,
        verdict: Verdict,
    ) -> Response<Body> {
        self.streams.notify_one();
        let exchange = self.outbox.begin();
        let Some(_head) = self.meter.take(&request) else {
            return no_room_for_heads()
                .into_response()
                .map(|body| exchange.answer(body, true));
        };
        let is_lane = request.uri().path().starts_with(super::peer::LANE_PREFIX);
        if is_lane {
            self.attending.carries_lanes();
        }
        let response = match verdict {
            Verdict::Serve | Verdict::ServeLast => router
                .call(request)
                .await
                .unwrap_or_else(|never| match never {}),
            Verdict::Refuse => too_many().into_response(),
        };
        if verdict != Verdict::Serve {
            self.over.notify_one();
        }
        response.map(|body| exchange.answer(body, !is_lane))
    }
}

/// What a request is told whose head there is no room for.
fn no_room_for_heads() -> Problem {
    Problem::new(
        Code::Overloaded,
        "the heads of requests in flight take all that they may together",
    )
    .retry_after_ms(1000)
}

fn too_many() -> Problem {
    Problem::new(Code::Unavailable, "too many connections").retry_after_ms(1000)
}

/// Tells a connection that nothing was read of that there is no place for it. Best effort, and
/// never waited for: the socket's buffer is empty, so it takes this or is broken.
pub fn tell_too_many(stream: TcpStream) {
    let body = too_many().body().to_string();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: \
        application/problem+json\r\nretry-after: 1\r\nconnection: close";
    let told = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let _ = stream
        .into_std()
        .and_then(|mut stream| stream.write_all(told.as_bytes()));
}
