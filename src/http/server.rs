//! Listens, accepts and serves: HTTP/1.1 and HTTP/2 with prior knowledge on the same ports.
//!
//! Kept out: routes. Every connection is a task of the accept loop that took it; when the shutdown token is cancelled, a loop stops
//! accepting, lets its connections finish what is in flight for [`Limits::drain_timeout`], and then drops them.
//!
//! Lanes of peers need their small frames sent at once and many of them in flight, hence no Nagle's algorithm and large windows.

use std::convert::Infallible;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use http::HeaderValue;
use http::header::CONNECTION;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::Service;

use super::holder::{self, Holder};
use super::limits::Limits;
use super::metrics::{Exposition, Kind, MetricSource};
use super::problem::{Code, Problem};

/// Connections that the kernel keeps for us between two accepts; it lowers this to its own limit.
const BACKLOG: u32 = 4096;

/// HTTP/2 flow control: a lane's frames must not wait for window updates.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// How often a silent HTTP/2 connection is asked whether it still lives, and how long that may take.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Waits after a failed accept. The usual cause is that file descriptors ran out, which only time cures.
const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(20);
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// When a server stops, its answers over HTTP/1 say that they are the last of their connection. One that is idle may be used again just then, and
/// its client could not tell whether that request was done if it were closed: so it is closed only after this.
const IDLE_KEPT_FOR: Duration = Duration::from_millis(300);

/// hyper refuses to buffer less than this.
const BUFFER_BYTES_MIN: usize = 8 << 10;

/// Why a server does not listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("cannot resolve '{listen}', which should be host:port: {source}")]
    Resolve {
        listen: String,
        #[source]
        source: io::Error,
    },
    #[error("'{listen}' resolves to no address")]
    NoAddress { listen: String },
    #[error("cannot listen on {address}: {source}{}", .holder.as_ref().map(|holder| format!("; it is held by {holder}")).unwrap_or_default())]
    Listen {
        address: SocketAddr,
        /// Who has the port, where that can be found out.
        holder: Option<Holder>,
        #[source]
        source: io::Error,
    },
}

/// What a server counts.
#[derive(Debug, Default)]
pub struct ServerStats {
    open: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    accept_errors: AtomicU64,
}

impl ServerStats {
    /// Connections being served.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }
}

impl MetricSource for ServerStats {
    fn collect(&self, text: &mut Exposition) {
        let families = [
            ("quorate_http_connections", Kind::Gauge, "Connections open.", &self.open),
            ("quorate_http_connections_accepted_total", Kind::Counter, "Connections served.", &self.accepted),
            ("quorate_http_connections_refused_total", Kind::Counter, "Connections past the limit.", &self.refused),
            ("quorate_http_accept_errors_total", Kind::Counter, "Failed accepts.", &self.accept_errors),
        ];
        for (name, kind, help, value) in families {
            text.family(name, kind, help);
            text.sample(&[], value.load(Ordering::Relaxed));
        }
    }
}

/// Listening sockets that nobody accepts from yet.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<TcpListener>,
    stats: Arc<ServerStats>,
}

impl Server {
    /// Listens on every address that each `host:port` of `listen` resolves to, and lets the process have as many open files as it may.
    /// Of a name with several addresses, those of a family that this machine does not have are left out.
    pub async fn bind<A: AsRef<str>>(listen: &[A]) -> Result<Server, BindError> {
        raise_open_files();
        let mut listeners: Vec<TcpListener> = Vec::new();
        for listen in listen.iter().map(AsRef::as_ref) {
            let resolved = lookup_host(listen).await;
            let resolved = resolved.map_err(|source| BindError::Resolve { listen: listen.to_owned(), source })?;
            let (mut bound, mut missing) = (0, None);
            for address in resolved {
                match self::listen(address) {
                    Ok(listener) => {
                        listeners.push(listener);
                        bound += 1;
                    }
                    Err(source) if is_missing(&source) => missing = Some(BindError::Listen { address, holder: None, source }),
                    Err(source) => {
                        let busy = source.kind() == io::ErrorKind::AddrInUse;
                        return Err(BindError::Listen { address, holder: busy.then(|| holder::find(address)).flatten(), source });
                    }
                }
            }
            if bound == 0 {
                return Err(missing.unwrap_or_else(|| BindError::NoAddress { listen: listen.to_owned() }));
            }
        }
        Ok(Server { listeners, stats: Arc::default() })
    }

    /// Where it listens: the ports that were chosen, where port 0 was asked for.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// To be given to [`super::Metrics`].
    pub fn stats(&self) -> Arc<ServerStats> {
        Arc::clone(&self.stats)
    }

    /// Serves until `shutdown` is cancelled and what was in flight has ended, or the drain timeout has.
    pub async fn serve(self, router: Router, shutdown: CancellationToken, limits: &Limits) {
        let http = Arc::new(protocol(limits));
        let loops = self.listeners.into_iter().map(|listener| {
            let accepting = Accepting {
                router: router.clone(),
                http: Arc::clone(&http),
                stats: Arc::clone(&self.stats),
                shutdown: shutdown.clone(),
                limits: limits.clone(),
            };
            accepting.run(listener)
        });
        futures::future::join_all(loops).await;
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A restarted server must not wait for the old connections' TIME_WAIT to pass.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Whether this machine lacks the address, rather than somebody having it.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported) || {
        error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
    }
}

/// Connections, the log and sled's files all need descriptors, and the usual soft limit is 1024.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        match setrlimit(Resource::Nofile, raised) {
            Ok(()) => tracing::debug!(from = ?limit.current, to = ?limit.maximum, "raised the limit of open files"),
            Err(error) => tracing::warn!(limit = ?limit.current, %error, "the limit of open files can't be raised"),
        }
    }
}

fn protocol(limits: &Limits) -> Builder<TokioExecutor> {
    let mut http = Builder::new(TokioExecutor::new());
    http.http1()
        .timer(TokioTimer::new())
        .keep_alive(true)
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(limits.head_bytes_max.max(BUFFER_BYTES_MIN));
    http.http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(limits.streams_max)
        .max_header_list_size(u32::try_from(limits.head_bytes_max).unwrap_or(u32::MAX))
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    http
}

/// The accept loop of one listener, and its connections.
struct Accepting {
    router: Router,
    http: Arc<Builder<TokioExecutor>>,
    stats: Arc<ServerStats>,
    shutdown: CancellationToken,
    limits: Limits,
}

impl Accepting {
    async fn run(self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        let mut pause = ACCEPT_PAUSE_MIN;
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    pause = ACCEPT_PAUSE_MIN;
                    self.admit(stream, &mut connections);
                }
                Err(error) if is_of_the_connection(&error) => {}
                Err(error) => {
                    if pause == ACCEPT_PAUSE_MIN {
                        tracing::warn!(%error, "cannot accept connections; trying again");
                    }
                    self.stats.accept_errors.fetch_add(1, Ordering::Relaxed);
                    let waited = self.shutdown.run_until_cancelled(sleep(pause)).await;
                    pause = (pause * 2).min(ACCEPT_PAUSE_MAX);
                    if waited.is_none() {
                        break;
                    }
                }
            }
        }
        drop(listener);
        let drained = timeout(self.limits.drain_timeout, async { while connections.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            tracing::warn!(connections = connections.len(), "connections did not end in time and are cut");
        }
        connections.shutdown().await;
    }

    fn admit(&self, stream: TcpStream, connections: &mut JoinSet<()>) {
        if self.stats.open() >= self.limits.connections_max as u64 {
            self.stats.refused.fetch_add(1, Ordering::Relaxed);
            // Best effort, and never waited for: the socket's buffer is empty, so it takes this or is broken.
            let _ = stream.into_std().and_then(|mut stream| stream.write_all(too_many().as_bytes()));
            return;
        }
        let open = Open::new(&self.stats);
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection was gone before it was served");
            return;
        }
        let (router, http) = (self.router.clone(), Arc::clone(&self.http));
        let (shutdown, first_request) = (self.shutdown.clone(), self.limits.head_timeout);
        connections.spawn(async move {
            serve_connection(stream, router, &http, shutdown, first_request).await;
            drop(open);
        });
    }
}

/// What a connection past the limit is told, before anything is read of it.
fn too_many() -> String {
    let body = Problem::new(Code::Unavailable, "too many connections").body().to_string();
    let head =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\nconnection: close";
    format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Counts a connection as open while it lives.
struct Open(Arc<ServerStats>);

impl Open {
    fn new(stats: &Arc<ServerStats>) -> Self {
        stats.open.fetch_add(1, Ordering::Relaxed);
        stats.accepted.fetch_add(1, Ordering::Relaxed);
        Open(Arc::clone(stats))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether an error of accept is that of the one connection, which went away while it waited.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

async fn serve_connection(
    stream: TcpStream,
    router: Router,
    http: &Builder<TokioExecutor>,
    shutdown: CancellationToken,
    first_request: Duration,
) {
    let (spoke, may_be_reused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let service = {
        let (spoke, may_be_reused, shutdown) = (Arc::clone(&spoke), Arc::clone(&may_be_reused), shutdown.clone());
        service_fn(move |request: http::Request<hyper::body::Incoming>| {
            spoke.store(true, Ordering::Relaxed);
            // HTTP/2 has a word for a connection that takes no more requests.
            let is_old = request.version() <= http::Version::HTTP_11;
            may_be_reused.store(is_old, Ordering::Relaxed);
            let (mut router, shutdown) = (router.clone(), shutdown.clone());
            async move {
                let mut response = router.call(request).await.unwrap_or_else(|never| match never {});
                if is_old && shutdown.is_cancelled() {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        })
    };
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    // hyper's own timeout does not run until it knows which version of HTTP is spoken.
    let mut silence = pin!(sleep(first_request));
    let mut stop = pin!(shutdown.cancelled());
    let mut last_use = pin!(sleep(IDLE_KEPT_FOR));
    let (mut waiting, mut stopping, mut lingers) = (true, false, false);
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
                if may_be_reused.load(Ordering::Relaxed) {
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
                if !spoke.load(Ordering::Relaxed) {
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_busy_port_is_named_with_its_holder() {
        let first = Server::bind(&["127.0.0.1:0"]).await.expect("a free port");
        let address = first.addresses()[0].to_string();
        let error = Server::bind(&[&address]).await.expect_err("the port is taken").to_string();
        assert!(error.contains(&address), "{error}");
        if cfg!(target_os = "linux") {
            assert!(error.contains(&format!("process {} (", std::process::id())), "{error}");
        }
        for bad in ["nonsense", "127.0.0.1:99999", "host.invalid:1"] {
            let error = Server::bind(&[bad]).await.expect_err("it is no address").to_string();
            assert!(error.contains(bad), "{error}");
        }
    }
}
