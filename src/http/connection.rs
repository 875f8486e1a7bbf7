//! One connection, from its first byte to its end.
//!
//! It ends by itself when its client says nothing for too long, does not take what it asked for, or has no place here; and in order
//! when the server stops. HTTP/1 is timed by hyper between requests, HTTP/2, where streams come and go, is timed here.

use std::convert::Infallible;
use std::io::Write;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
use tokio_util::sync::CancellationToken;
use tower::Service;

use super::admission::{Place, ServerStats, Verdict};
use super::haste::Haste;
use super::limits::Limits;
use super::outbox::Outbox;
use super::paced::Paced;
use super::problem::{Code, Problem};

/// When a server stops, its answers over HTTP/1 say that they are the last of their connection. One that is idle may be used again just then, and
/// its client could not tell whether that request was done if it were closed: so it is closed only after this.
const IDLE_KEPT_FOR: Duration = Duration::from_millis(300);

/// How long a connection may stand at the door without a request: peers send theirs at once.
const AT_THE_DOOR_FOR: Duration = Duration::from_secs(1);

/// How long a connection that was asked to end may take. A client that does not play along is cut.
const END_FOR: Duration = Duration::from_secs(5);

/// While more than half of the places are taken, a connection has so long for its first request.
const FIRST_REQUEST_WHILE_CROWDED: Duration = Duration::from_secs(10);

/// What connections are served with.
pub struct Serving {
    pub router: Router,
    pub http: Builder<TokioExecutor>,
    pub stats: Arc<ServerStats>,
    pub shutdown: CancellationToken,
    pub limits: Limits,
    pub haste: Haste,
}

/// What a connection and its requests share.
struct Talk {
    place: Place,
    /// Whether there was a request.
    spoke: AtomicBool,
    /// Whether it can be used again, and there is no other word for its end than closing it.
    may_be_reused: AtomicBool,
    outbox: Arc<Outbox>,
    /// Notified of streams: they have to be looked at from then on.
    streams: Notify,
    /// Notified when an answer was the last of this connection.
    over: Notify,
}

impl Serving {
    /// Serves one connection until it ends.
    pub async fn serve(&self, stream: TcpStream, place: Place, is_crowded: bool) {
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
            spoke: AtomicBool::new(false),
            may_be_reused: AtomicBool::new(false),
            outbox: Arc::default(),
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
            let (router, talk, shutdown) = (self.router.clone(), Arc::clone(talk), self.shutdown.clone());
            talk.answer(router, request, shutdown)
        });
        let (stats, outbox) = (Arc::clone(&self.stats), Arc::clone(&talk.outbox));
        let stream = Paced::new(stream, self.limits.write_timeout, stats, self.haste.clone(), outbox);
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        // hyper's own timeout does not run until it knows which version of HTTP is spoken.
        let mut silence = pin!(sleep(first_request));
        let mut stop = pin!(self.shutdown.cancelled());
        let mut last_use = pin!(sleep(IDLE_KEPT_FOR));
        let mut look = pin!(sleep(self.look_interval()));
        let mut cut = pin!(sleep(END_FOR));
        let (mut waiting, mut stopping, mut lingers) = (true, false, false);
        let (mut has_streams, mut ending) = (false, false);
        loop {
            tokio::select! {
                biased;
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::trace!(%error, "a connection ended badly");
                    }
                    return;
                }
                () = stop.as_mut(), if !stopping => {
                    stopping = true;
                    if talk.may_be_reused.load(Ordering::Relaxed) {
                        lingers = true;
                        last_use.as_mut().reset(Instant::now() + IDLE_KEPT_FOR);
                    } else {
                        connection.as_mut().graceful_shutdown();
                    }
                }
                () = last_use.as_mut(), if lingers => {
                    lingers = false;
                    connection.as_mut().graceful_shutdown();
                }
                () = silence.as_mut(), if waiting => {
                    waiting = false;
                    if talk.place.is_at_the_door() {
                        return;
                    }
                    if !talk.spoke.load(Ordering::Relaxed) {
                        connection.as_mut().graceful_shutdown();
                        end_soon(&mut ending, cut.as_mut());
                    }
                }
                () = talk.place.left(), if waiting && talk.place.is_at_the_door() => return,
                () = talk.over.notified(), if !ending => {
                    connection.as_mut().graceful_shutdown();
                    end_soon(&mut ending, cut.as_mut());
                }
                () = talk.streams.notified(), if !has_streams => {
                    has_streams = true;
                    look.as_mut().reset(Instant::now() + self.look_interval());
                }
                () = look.as_mut(), if has_streams => {
                    look.as_mut().reset(Instant::now() + self.look_interval());
                    if self.is_stalled(talk) {
                        return;
                    }
                    if !ending && self.is_idle(talk) {
                        connection.as_mut().graceful_shutdown();
                        end_soon(&mut ending, cut.as_mut());
                    }
                }
                () = cut.as_mut(), if ending => return,
            }
        }
    }

    /// Returns how often streams are looked at.
    fn look_interval(&self) -> Duration {
        self.limits.head_timeout.min(self.limits.write_timeout) / 4
    }

    fn is_stalled(&self, talk: &Talk) -> bool {
        let is_stalled = talk.outbox.is_stuck(self.limits.write_timeout) || talk.outbox.misses(&self.haste);
        if is_stalled {
            self.stats.stalled();
            tracing::debug!("a connection is cut: its client does not take what it asked for");
        }
        is_stalled
    }

    fn is_idle(&self, talk: &Talk) -> bool {
        talk.outbox.idle_since().is_some_and(|since| since.elapsed() > self.limits.head_timeout)
    }
}

/// Gives a connection that was asked to end some time for it.
fn end_soon(ending: &mut bool, cut: Pin<&mut Sleep>) {
    *ending = true;
    cut.reset(Instant::now() + END_FOR);
}

impl Talk {
    /// Answers one request of this connection.
    async fn answer(
        self: Arc<Self>,
        mut router: Router,
        request: Request<Incoming>,
        shutdown: CancellationToken,
    ) -> Result<Response, Infallible> {
        self.spoke.store(true, Ordering::Relaxed);
        // HTTP/2 has a word for a connection that takes no more requests.
        let is_old = request.version() <= Version::HTTP_11;
        self.may_be_reused.store(is_old, Ordering::Relaxed);

        let verdict = self.place.judge(request.method(), request.uri().path());
        if !is_old {
            return Ok(self.answer_stream(router, request, verdict).await);
        }
        let mut response = match verdict {
            Verdict::Serve | Verdict::ServeLast => router.call(request).await.unwrap_or_else(|never| match never {}),
            Verdict::Refuse => too_many().into_response(),
        };
        if verdict != Verdict::Serve || shutdown.is_cancelled() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    /// Answers a request over HTTP/2.
    async fn answer_stream(&self, mut router: Router, request: Request<Incoming>, verdict: Verdict) -> Response<Body> {
        self.streams.notify_one();
        let exchange = self.outbox.begin();
        let is_timed = !request.uri().path().starts_with(super::peer::LANE_PREFIX);
        let response = match verdict {
            Verdict::Serve | Verdict::ServeLast => router.call(request).await.unwrap_or_else(|never| match never {}),
            Verdict::Refuse => too_many().into_response(),
        };
        if verdict != Verdict::Serve {
            self.over.notify_one();
        }
        response.map(|body| exchange.answer(body, is_timed))
    }
}

fn too_many() -> Problem {
    Problem::new(Code::Unavailable, "too many connections").retry_after_ms(1000)
}

/// Tells a connection that nothing was read of that there is no place for it. Best effort, and never waited for: the socket's buffer is
/// empty, so it takes this or is broken.
pub fn tell_too_many(stream: TcpStream) {
    let body = too_many().body().to_string();
    let head =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\nconnection: close";
    let told = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let _ = stream.into_std().and_then(|mut stream| stream.write_all(told.as_bytes()));
}
