//! Listens, accepts and serves: HTTP/1.1 and HTTP/2 with prior knowledge on the same ports.
//!
//! Kept out: routes. Every connection is a task of the accept loop that took it; when the shutdown
//! token is cancelled, a loop takes what the kernel has accepted already and stops listening, lets
//! its connections finish what is in flight for [`Limits::drain_timeout`], and then drops them. So
//! a client that was let in gets an answer. Lanes of peers end last (`drain`).
//!
//! Lanes of peers need their small frames sent at once and many of them in flight, hence no Nagle's
//! algorithm and large windows.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::admission::Admission;
use super::connection::{self, AdmittedConnection, ConnectionContext};
use super::drain::{ConnectionDrainGuard, DrainGuard};
use super::port_owner::{self, PortOwner};
use super::protocol::protocol;
use super::slow_clients::SlowClientLimit;
use super::stats::ServerStats;
use crate::budget::{ANSWERS_BYTES_MAX, Budget};
use crate::descriptors::{self, Shares};
use crate::http::limits::Limits;
use crate::http::{App, router};
use crate::telemetry::rarely;

/// Connections that the kernel keeps for us between two accepts; it lowers this to its own limit.
const BACKLOG: u32 = 4096;

/// Bytes of an unread answer that the kernel keeps. By default it would take megabytes for each
/// client, which no budget of ours sees. Bytes that are on their way do not count, so this slows
/// nobody down. Connections inherit it from their listener.
const UNSENT_BYTES_MAX: u32 = 128 << 10;

/// Waits after a failed accept. The usual cause is that file descriptors ran out, which only time
/// cures.
const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(20);
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// The reason why a server does not listen.
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
    #[error("cannot listen on {address}: {source}{}", .holder.as_ref().map(|holder| format!("; it \
        is held by {holder}")).unwrap_or_default())]
    Listen {
        address: SocketAddr,
        /// The process that has the port, where that can be found out.
        holder: Option<PortOwner>,
        #[source]
        source: io::Error,
    },
}

/// Listening sockets that nobody accepts from yet.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<TcpListener>,
    stats: Arc<ServerStats>,
}

impl Server {
    /// Listens on every address that each `host:port` of `listen` resolves to, and lets the process
    /// have as many open files as it may. Of a name with several addresses, those of a family that
    /// this machine does not have are left out.
    pub async fn bind<A: AsRef<str>>(listen: &[A]) -> Result<Server, BindError> {
        // Before anything is opened: how many connections there may be follows from that limit.
        descriptors::raise();
        let mut listeners: Vec<TcpListener> = Vec::new();
        for listen in listen.iter().map(AsRef::as_ref) {
            let resolved = lookup_host(listen).await;
            let resolved = resolved.map_err(|source| BindError::Resolve {
                listen: listen.to_owned(),
                source,
            })?;

            // `localhost` may resolve to ::1 on a machine without IPv6, which is no reason to fail.
            let (mut bound, mut missing) = (0, None);
            for address in resolved {
                match self::listen(address) {
                    Ok(listener) => {
                        listeners.push(listener);
                        bound += 1;
                    }
                    Err(source) if is_address_unavailable(&source) => {
                        missing = Some(BindError::Listen {
                            address,
                            holder: None,
                            source,
                        })
                    }
                    Err(source) => {
                        let busy = source.kind() == io::ErrorKind::AddrInUse;
                        return Err(BindError::Listen {
                            address,
                            holder: busy.then(|| port_owner::find(address)).flatten(),
                            source,
                        });
                    }
                }
            }
            if bound == 0 {
                return Err(missing.unwrap_or_else(|| BindError::NoAddress {
                    listen: listen.to_owned(),
                }));
            }
        }
        Ok(Server {
            listeners,
            stats: Arc::default(),
        })
    }

    /// Returns the addresses that it listens on; where port 0 was asked for, the port that was
    /// chosen.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners
            .iter()
            .filter_map(|listener| listener.local_addr().ok())
            .collect()
    }

    /// Returns the counters, which the metrics of HTTP show.
    pub fn stats(&self) -> Arc<ServerStats> {
        Arc::clone(&self.stats)
    }

    /// Serves an app until `shutdown` is cancelled and what was in flight has ended, or the drain
    /// timeout has.
    pub async fn serve_app(self, mut app: App, shutdown: CancellationToken, limits: &Limits) {
        let (answers, has_peers) = (Arc::clone(&app.answers), app.peers.is_some());
        let (drain_guard, drained) = DrainGuard::new();
        app.lanes_end = drained;
        let routes = ServedRoutes {
            router: router(app),
            answers,
            has_peers,
            drain_guard,
        };
        self.serve_routes(routes, shutdown, limits).await;
    }

    /// Serves routes whose answers are charged to nothing, in the same way.
    pub async fn serve(self, router: Router, shutdown: CancellationToken, limits: &Limits) {
        let (drain_guard, _) = DrainGuard::new();
        let answers = Budget::new(ANSWERS_BYTES_MAX);
        let routes = ServedRoutes {
            router,
            answers,
            has_peers: true,
            drain_guard,
        };
        self.serve_routes(routes, shutdown, limits).await;
    }

    async fn serve_routes(
        self,
        routes: ServedRoutes,
        shutdown: CancellationToken,
        limits: &Limits,
    ) {
        let ServedRoutes {
            router,
            answers,
            has_peers,
            drain_guard,
        } = routes;
        let mut shares = Shares::now();
        // A gateway keeps no places for peers.
        if !has_peers {
            shares.peers = 0;
        }
        let admission = Admission::new(Arc::clone(&self.stats), limits, shares);
        tracing::info!(
            "connections: up to {} of clients, and {} more of other nodes; the limit of open files \
            is {}",
            admission.clients_max(),
            admission.peers_max(),
            shares.limit
        );
        let slow_clients = SlowClientLimit::new(answers, limits.answer_rate_min);
        let heads = Budget::new(limits.heads_bytes_max);
        let (http, limits) = (protocol(limits), limits.clone());
        let context = Arc::new(ConnectionContext {
            router,
            http,
            stats: self.stats,
            shutdown,
            limits,
            slow_clients,
            heads,
        });
        let accepting = |listener| {
            let (context, admission) = (Arc::clone(&context), Arc::clone(&admission));
            AcceptLoop {
                context,
                admission,
                drain_guard: drain_guard.clone(),
            }
            .run(listener)
        };

        // The loops hold the guard from here on: lanes end when the last of them has.
        let loops: Vec<_> = self.listeners.into_iter().map(accepting).collect();
        drop(drain_guard);
        futures::future::join_all(loops).await;
    }
}

/// Routes, and what goes with them.
struct ServedRoutes {
    router: Router,
    /// The budget that answers are charged to.
    answers: Arc<Budget>,
    has_peers: bool,
    drain_guard: DrainGuard,
}

/// Opens a listening socket.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // A restarted server must not wait for the old connections' TIME_WAIT to pass.
    socket.set_reuseaddr(true)?;
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT_BYTES_MAX)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Returns true if this machine lacks the address, as opposed to another process having it.
fn is_address_unavailable(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported
    ) || { error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error()) }
}

/// The accept loop of one listener, and its connections.
struct AcceptLoop {
    context: Arc<ConnectionContext>,
    admission: Arc<Admission>,
    drain_guard: DrainGuard,
}

impl AcceptLoop {
    async fn run(self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        let mut pause = ACCEPT_PAUSE_MIN;
        loop {
            let accepted = tokio::select! {
                () = self.context.shutdown.cancelled() => break,
                // Ended tasks are taken out of the set as they end, or it would grow with every
                // connection.
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => {
                    pause = ACCEPT_PAUSE_MIN;
                    self.admit(stream, address, &mut connections);
                }
                // The client went away before it was accepted: that says nothing of the next one.
                Err(error) if is_connection_error(&error) => {}
                Err(error) => {
                    rarely!(warn, %error, "cannot accept connections; trying again");
                    self.context.stats.accept_failed();
                    let waited = self
                        .context
                        .shutdown
                        .run_until_cancelled(sleep(pause))
                        .await;
                    pause = (pause * 2).min(ACCEPT_PAUSE_MAX);
                    if waited.is_none() {
                        break;
                    }
                }
            }
        }

        self.accept_rest(listener, &mut connections);
        let Self {
            context,
            drain_guard,
            ..
        } = self;

        // From here on only connections with requests hold lanes open.
        drop(drain_guard);

        let drained = async { while connections.join_next().await.is_some() {} };
        let drained = timeout(context.limits.drain_timeout, drained).await;
        if drained.is_err() {
            // Said once, at the stop.
            tracing::warn!(
                connections = connections.len(),
                "connections did not end in time and are cut"
            );
        }
        connections.shutdown().await;
    }

    /// Takes the connections that the kernel has made already: with the listener it would reset
    /// them, and their clients could not tell whether their requests were done.
    fn accept_rest(&self, listener: TcpListener, connections: &mut JoinSet<()>) {
        let Ok(listener) = listener.into_std() else {
            return;
        };
        for _ in 0..BACKLOG {
            let taken = listener.accept().and_then(|(stream, address)| {
                // A socket that is accepted by hand blocks by default.
                stream.set_nonblocking(true)?;
                Ok((TcpStream::from_std(stream)?, address))
            });
            match taken {
                Ok((stream, address)) => self.admit(stream, address, connections),
                Err(error) if is_connection_error(&error) => {}
                Err(_) => return,
            }
        }
    }

    fn admit(&self, stream: TcpStream, address: SocketAddr, connections: &mut JoinSet<()>) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection was gone before it was served");
            return;
        }
        let Some(permit) = self.admission.admit(stream.as_raw_fd()) else {
            return connection::refuse_over_limit(stream);
        };
        let (context, is_crowded) = (Arc::clone(&self.context), self.admission.is_crowded());
        let drain_guard = ConnectionDrainGuard::new(self.drain_guard.clone());
        let admitted = AdmittedConnection {
            permit,
            drain_guard,
            is_crowded,
        };
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        connections.spawn(async move { context.serve(stream, address, admitted).await });
    }
}

/// Returns true if an error of accept concerns one connection, which went away while it waited.
fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_busy_port_is_named_with_its_holder() {
        let first = Server::bind(&["127.0.0.1:0"]).await.expect("a free port");
        let address = first.addresses()[0].to_string();
        let error = Server::bind(&[&address])
            .await
            .expect_err("the port is taken")
            .to_string();
        assert!(error.contains(&address), "{error}");
        if cfg!(target_os = "linux") {
            assert!(
                error.contains(&format!("process {} (", std::process::id())),
                "{error}"
            );
        }
        for bad in ["nonsense", "127.0.0.1:99999", "host.invalid:1"] {
            let error = Server::bind(&[bad])
                .await
                .expect_err("it is no address")
                .to_string();
            assert!(error.contains(bad), "{error}");
        }
    }
}
