//! Serves one connection, from its first byte to its end.
//!
//! It ends by itself when its client sends nothing for too long, does not read its answers, or has
//! no place here; and in order when the server stops. Over HTTP/1, hyper times the pauses between
//! requests; over HTTP/2, where streams come and go, this does.
//!
//! Timers and notices have a waker of their own ([`WakeGate`]), so a request does not poll them.

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

use super::admission::{AdmissionDecision, AdmissionPermit};
use super::client_info::ClientInfo;
use super::drain::ConnectionDrainGuard;
use super::framing;
use super::head_budget::{HeadBudget, HeadLimitedStream};
use super::protocol::BUFFER_BYTES_MIN;
use super::read_monitor::{ReadMonitor, RequestActivity};
use super::response_tracker::ResponseTracker;
use super::slow_clients::SlowClientLimit;
use super::stats::ServerStats;
use super::timed_stream::TimedStream;
use super::wake_gate::WakeGate;
use crate::budget::Budget;
use crate::http::body;
use crate::http::limits::Limits;
use crate::http::problem::{Code, Problem};

/// Once a server stops, its answers over HTTP/1 say that they are the last of their connection. One
/// that is idle, or was only just made, may be used just then, and its client could not tell
/// whether that request was done if it were closed: so it is closed only after this.
const IDLE_LINGER: Duration = Duration::from_millis(300);

/// Time for the first request of a connection past the limit: peers send theirs at once.
const OVERFLOW_TIMEOUT: Duration = Duration::from_secs(1);

/// Time for a connection that was asked to end. A client that does not play along is cut.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for the first request while more than half of the places are taken.
const FIRST_REQUEST_TIMEOUT_CROWDED: Duration = Duration::from_secs(10);

/// Handed to a connection when it is let in.
pub struct AdmittedConnection {
    pub permit: AdmissionPermit,
    pub drain_guard: ConnectionDrainGuard,
    pub is_crowded: bool,
}

/// Shared by all connections of a server.
pub struct ConnectionContext {
    pub router: Router,
    pub http: Builder<TokioExecutor>,
    pub stats: Arc<ServerStats>,
    pub shutdown: CancellationToken,
    pub limits: Limits,
    pub slow_clients: SlowClientLimit,
    /// The budget of the heads of requests.
    pub heads: Arc<Budget>,
}

/// Shared by a connection and its requests.
struct ConnectionState {
    permit: AdmissionPermit,
    /// A clone of the server's takes its lock: so this is not cloned for a request.
    shutdown: CancellationToken,
    drain_guard: ConnectionDrainGuard,
    /// True once there was a request.
    has_requested: AtomicBool,
    /// True if it can be used again and closing it is the only way to say otherwise: HTTP/1.
    may_be_reused: AtomicBool,
    activity: Arc<RequestActivity>,
    tracker: Arc<ResponseTracker>,
    head_budget: Arc<HeadBudget>,
    /// The client's address.
    address: SocketAddr,
    /// Notified of streams: they have to be looked at from then on.
    streams: Notify,
    /// Notified when an answer was the last of this connection.
    last_answer_sent: Notify,
}

impl ConnectionContext {
    /// Serves one connection until it ends.
    pub async fn serve(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        admitted: AdmittedConnection,
    ) {
        let AdmittedConnection {
            permit,
            drain_guard,
            is_crowded,
        } = admitted;
        let is_overflow = permit.is_overflow();
        // Past the limit a first byte must come at once; hyper would wait for a head much longer.
        if is_overflow && !self.wait_for_first_byte(&stream, &permit).await {
            permit.refuse();
            return refuse_over_limit(stream);
        }

        // The fewer places are left, the less time one is held by a client that asks for nothing.
        let first_request = match (is_overflow, is_crowded) {
            (true, _) => OVERFLOW_TIMEOUT,
            (false, true) => FIRST_REQUEST_TIMEOUT_CROWDED.min(self.limits.head_timeout),
            (false, false) => self.limits.head_timeout,
        };
        let state = Arc::new(ConnectionState {
            permit,
            shutdown: self.shutdown.clone(),
            drain_guard,
            has_requested: AtomicBool::new(false),
            may_be_reused: AtomicBool::new(false),
            activity: Arc::default(),
            tracker: Arc::default(),
            head_budget: Arc::new(HeadBudget::new(
                &self.heads,
                self.limits.head_bytes_max.max(BUFFER_BYTES_MIN),
            )),
            address,
            streams: Notify::new(),
            last_answer_sent: Notify::new(),
        });
        self.state(stream, &state, first_request).await;
    }

    /// Waits for the first byte of a connection past the limit. Returns false if none comes, or the
    /// connection has to go.
    async fn wait_for_first_byte(&self, stream: &TcpStream, permit: &AdmissionPermit) -> bool {
        let mut first = [0];
        tokio::select! {
            peeked = stream.peek(&mut first) => peeked.is_ok_and(|bytes| bytes > 0),
            () = permit.evicted() => false,
            () = sleep(OVERFLOW_TIMEOUT) => false,
            () = self.shutdown.cancelled() => false,
        }
    }

    async fn state(
        &self,
        stream: TcpStream,
        state: &Arc<ConnectionState>,
        first_request: Duration,
    ) {
        let service = service_fn(|request: Request<Incoming>| {
            Arc::clone(state).answer(self.router.clone(), request)
        });
        let (stats, tracker) = (Arc::clone(&self.stats), Arc::clone(&state.tracker));
        let read_monitor = ReadMonitor::new(
            Arc::clone(&state.activity),
            self.limits.head_arrival_timeout,
        );
        let stream = TimedStream::new(
            stream,
            self.limits.write_timeout,
            stats,
            self.slow_clients.clone(),
            tracker,
            read_monitor,
        );
        let stream = HeadLimitedStream::new(
            stream,
            Arc::clone(&state.head_budget),
            Arc::clone(&state.activity),
            Arc::clone(&state.tracker),
        );
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        let mut timers = ConnectionTimers {
            // hyper's own timeout does not run until it knows which version of HTTP is spoken.
            first_request_timeout: pin!(sleep(first_request)),
            server_stop: pin!(state.shutdown.cancelled()),
            linger_timeout: pin!(sleep(IDLE_LINGER)),
            stream_check: pin!(sleep(self.stream_check_interval())),
            shutdown_timeout: pin!(sleep(SHUTDOWN_TIMEOUT)),
            awaits_first_request: true,
            is_stopping: false,
            is_lingering: false,
            has_streams: false,
            is_ending: false,
        };
        let gate = WakeGate::new();

        loop {
            // A new future has registered no waker yet, so it has to be polled once without being
            // woken.
            let mut next = pin!(self.next_event(state, &mut timers));
            gate.open();
            let event = poll_fn(|cx| match connection.as_mut().poll(cx) {
                Poll::Ready(Ok(())) => Poll::Ready(ConnectionEvent::End),
                Poll::Ready(Err(error)) => {
                    tracing::trace!(%error, "a connection ended badly");
                    Poll::Ready(ConnectionEvent::End)
                }
                Poll::Pending => gate.poll(cx, next.as_mut()),
            });
            match event.await {
                ConnectionEvent::End => return,
                ConnectionEvent::ShutDown => connection.as_mut().graceful_shutdown(),
            }
        }
    }

    /// Waits until something is to be done about a connection, and returns what.
    async fn next_event(
        &self,
        state: &ConnectionState,
        timers: &mut ConnectionTimers<'_, '_>,
    ) -> ConnectionEvent {
        loop {
            tokio::select! {
                biased;
                // Once the stop has come it stays ready, and would be found first on every turn.
                () = timers.server_stop.as_mut(), if !timers.is_stopping => {
                    timers.is_stopping = true;
                    if !state.may_be_used() {
                        return ConnectionEvent::ShutDown;
                    }
                    timers.is_lingering = true;
                    timers.linger_timeout.as_mut().reset(Instant::now() + IDLE_LINGER);
                }
                () = timers.linger_timeout.as_mut(), if timers.is_lingering => {
                    timers.is_lingering = false;
                    return ConnectionEvent::ShutDown;
                }
                () = timers.first_request_timeout.as_mut(), if timers.awaits_first_request => {
                    timers.awaits_first_request = false;

                    // It has not shown that it is a peer's, and others wait for its place.
                    if state.permit.is_overflow() {
                        return ConnectionEvent::End;
                    }

                    // Once there was a request, hyper times the pauses between them, or the stream
                    // check does.
                    if !state.has_requested.load(Ordering::Relaxed) {
                        timers.start_shutdown();
                        return ConnectionEvent::ShutDown;
                    }
                }

                // A newer connection past the limit takes the place: that one may be the peer's.
                () = state.permit.evicted(),
                    if timers.awaits_first_request && state.permit.is_overflow() =>
                {
                    return ConnectionEvent::End;
                }
                () = state.last_answer_sent.notified(), if !timers.is_ending => {
                    timers.start_shutdown();
                    return ConnectionEvent::ShutDown;
                }
                () = state.streams.notified(), if !timers.has_streams => {
                    timers.has_streams = true;
                    timers.check_streams_in(self.stream_check_interval());
                }
                // The next look is set first: a timer that has fired would be ready again at once.
                () = timers.stream_check.as_mut(), if timers.has_streams => {
                    timers.check_streams_in(self.stream_check_interval());

                    // Cut rather than shut down: in order, it would wait for the answers that the
                    // client does not take.
                    if self.is_stalled(state) {
                        return ConnectionEvent::End;
                    }
                    if !timers.is_ending && self.is_idle(state) {
                        timers.start_shutdown();
                        return ConnectionEvent::ShutDown;
                    }
                }
                () = timers.shutdown_timeout.as_mut(), if timers.is_ending => {
                    return ConnectionEvent::End;
                }
            }
        }
    }

    /// Returns how often streams are looked at.
    fn stream_check_interval(&self) -> Duration {
        self.limits.head_timeout.min(self.limits.write_timeout) / 4
    }

    fn is_stalled(&self, state: &ConnectionState) -> bool {
        // hyper can't end a single stream, so the whole connection goes.
        let is_stalled = state.tracker.is_stuck(self.limits.write_timeout)
            || state.tracker.has_slow_response(&self.slow_clients);
        if is_stalled {
            self.stats.stalled();
            tracing::debug!("a connection is cut: its client does not take what it asked for");
        }
        is_stalled
    }

    fn is_idle(&self, state: &ConnectionState) -> bool {
        state
            .tracker
            .idle_since()
            .is_some_and(|since| since.elapsed() > self.limits.head_timeout)
    }
}

/// The next step for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ConnectionEvent {
    /// Let it finish what is in flight.
    ShutDown,
    /// It is over, or cut.
    End,
}

/// The timers of a connection.
struct ConnectionTimers<'a, 's> {
    /// Whoever has asked for nothing by then has to go.
    first_request_timeout: Pin<&'a mut Sleep>,
    awaits_first_request: bool,
    server_stop: Pin<&'a mut WaitForCancellationFuture<'s>>,
    is_stopping: bool,
    /// The end of a connection that may be used again while the server stops.
    linger_timeout: Pin<&'a mut Sleep>,
    is_lingering: bool,
    /// The next look at the streams of HTTP/2.
    stream_check: Pin<&'a mut Sleep>,
    has_streams: bool,
    /// The end of one that was asked to end.
    shutdown_timeout: Pin<&'a mut Sleep>,
    is_ending: bool,
}

impl ConnectionTimers<'_, '_> {
    /// Gives a connection that was asked to end some time for it.
    fn start_shutdown(&mut self) {
        self.is_ending = true;
        self.shutdown_timeout
            .as_mut()
            .reset(Instant::now() + SHUTDOWN_TIMEOUT);
    }

    /// Schedules the next check of the streams of HTTP/2.
    fn check_streams_in(&mut self, interval: Duration) {
        self.stream_check.as_mut().reset(Instant::now() + interval);
    }
}

impl ConnectionState {
    /// Returns whether its client may send a request before it can know that the server stops: one
    /// that has just connected is about to, and over HTTP/1 one may come on any connection.
    fn may_be_used(&self) -> bool {
        !self.has_requested.load(Ordering::Relaxed) || self.may_be_reused.load(Ordering::Relaxed)
    }

    /// Answers one request of this connection.
    async fn answer(
        self: Arc<Self>,
        mut router: Router,
        mut request: Request<Incoming>,
    ) -> Result<Response, Infallible> {
        self.has_requested.store(true, Ordering::Relaxed);
        // HTTP/2 has a word for a connection that takes no more requests.
        let is_http1 = request.version() <= Version::HTTP_11;
        self.may_be_reused.store(is_http1, Ordering::Relaxed);

        let in_flight = self.head_budget.begin(&request);
        let decision = self.permit.decide(request.method(), request.uri().path());
        request.extensions_mut().insert(ClientInfo {
            address: self.address,
            activity: Arc::clone(&self.activity),
        });

        // Streams of HTTP/2 are watched and charged one by one.
        if !is_http1 {
            return Ok(self.answer_stream(router, request, decision).await);
        }
        let _pending = self.activity.begin(request.version());

        // After a head that is ambiguous the next byte may be anything: the connection must end.
        let checked = framing::check(request.version(), request.headers());
        let is_last = decision != AdmissionDecision::Serve || checked.is_err();

        // The head is judged first: a request with an ambiguous end must not reach a handler.
        let mut response = match (checked, decision) {
            (Err(problem), _) => {
                tracing::debug!(client = %self.address, %problem.detail, "a request's head is \
                    refused");
                // A body left unread would make the kernel reset the connection, and the answer
                // could be lost.
                let (parts, body) = request.into_parts();
                body::discard(&parts, Body::new(body));
                problem.into_response()
            }
            (Ok(()), AdmissionDecision::Serve | AdmissionDecision::ServeLast) => router
                .call(request)
                .await
                .unwrap_or_else(|never| match never {}),
            (Ok(()), AdmissionDecision::Refuse) => over_limit_problem().into_response(),
        };

        // The next bytes are the next request's head, and are charged as one.
        drop(in_flight);

        // Only this tells a client of HTTP/1 not to send its next request here.
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
        decision: AdmissionDecision,
    ) -> Response<Body> {
        self.streams.notify_one();
        let stream_guard = self.tracker.begin();

        // Over HTTP/2 many heads can come at once, so each is charged apart and refused by itself.
        let Some(_head) = self.head_budget.take(&request) else {
            return heads_over_budget()
                .into_response()
                .map(|body| stream_guard.track(body, true));
        };
        // Requests may wait for what lanes bring, so lanes must not wait for this connection.
        let is_lane = request
            .uri()
            .path()
            .starts_with(crate::http::peer::LANE_PREFIX);
        if is_lane {
            self.drain_guard.release_for_lanes();
        }
        let response = match decision {
            AdmissionDecision::Serve | AdmissionDecision::ServeLast => router
                .call(request)
                .await
                .unwrap_or_else(|never| match never {}),
            AdmissionDecision::Refuse => over_limit_problem().into_response(),
        };
        // HTTP/2 has no header for it: the connection itself is shut down.
        if decision != AdmissionDecision::Serve {
            self.last_answer_sent.notify_one();
        }

        // A lane is silent for as long as there is nothing to send, which is no fault of the peer.
        response.map(|body| stream_guard.track(body, !is_lane))
    }
}

/// Returns the problem of a request whose head there is no room for.
fn heads_over_budget() -> Problem {
    Problem::new(
        Code::Overloaded,
        "the heads of requests in flight take all that they may together",
    )
    .retry_after_ms(1000)
}

fn over_limit_problem() -> Problem {
    Problem::new(Code::Unavailable, "too many connections").retry_after_ms(1000)
}

/// Tells a connection that nothing was read of that there is no place for it. Best effort, and
/// never waited for: the socket's buffer is empty, so it takes this or is broken.
pub fn refuse_over_limit(stream: TcpStream) {
    let body = over_limit_problem().body().to_string();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: \
        application/problem+json\r\nretry-after: 1\r\nconnection: close";
    let response = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let _ = stream
        .into_std()
        .and_then(|mut stream| stream.write_all(response.as_bytes()));
}
