//! `quorate serve`: runs a node until it is told to stop.
//!
//! Listens first, so that a busy port is named before anything is touched; then opens the data directory and runs the node while its
//! routes are served. A stop hands leaderships over while requests are still answered, then drains, then closes log and maps.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::client::peer::{HostedReplica, Identity, PromiseReply, PromiseRequest};
use crate::client::protocol::{ShardReply, ShardRequest};
use crate::client::store::Failure;
use crate::config::{DATA_DIR_DEFAULT, NodeConfig, PORT_DEFAULT};
use crate::http::metrics::Kind;
use crate::http::{App, BindError, Exposition, Limits, MetricSource, Metrics, NotReady, PeerService, Readiness, Server, router};
use crate::node::{FamilyKind, Node, NodeError};
use crate::raft::lanes::serve_lane;
use crate::raft::transport::Lane;
use crate::sm::meta;
use crate::sm::view::Asked;
use crate::telemetry::{self, LogFormat};
use crate::types::{Address, ParseError};

/// How long leaderships may take to be handed over at a stop.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);

/// What `quorate serve` is told. Flags beat the environment.
#[derive(Debug, Args)]
pub struct Arguments {
    /// What others call this node (host:port); it listens there unless told otherwise [default: 127.0.0.1:13800]
    #[arg(long, env = "ADDRESS", value_name = "HOST:PORT")]
    pub address: Option<Address>,
    /// The nodes of the cluster to found or to join, this one among them, separated by commas [default: this node alone]
    #[arg(short, long, env = "VIEW", value_name = "HOST:PORT,...", value_delimiter = ',')]
    pub view: Option<Vec<Address>>,
    /// Nodes per shard. Without --shards each node then belongs to exactly one shard; else each has one shard with up to 3 replicas
    #[arg(long, env = "REPL_FACTOR", value_name = "R", value_parser = clap::value_parser!(u8).range(1..=7))]
    pub repl_factor: Option<u8>,
    /// Number of shards [default: one per node]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub shards: Option<u16>,
    /// Where the data is [default: ./quorate-data, or ./quorate-data/PORT where a port or address is given]
    #[arg(short, long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Listen here instead of on the address; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Vec<Address>,
    /// What clients are redirected to, if that is another address
    #[arg(long, value_name = "HOST:PORT")]
    pub public_address: Option<Address>,
    /// Listen on this IP address (0.0.0.0: on all)
    #[arg(short, long, value_name = "IP")]
    pub ip: Option<IpAddr>,
    /// The port to listen on, and of the address where none is given
    #[arg(short, long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Memory for the cache of the map database, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub cache_mib: u64,
    /// Multiplies heartbeat and election times: for very many groups on few cores
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub timing_factor: u64,
    /// Read by the leader's lease, without a round to a quorum; clocks may drift by MS within an election timeout. The clock must not
    /// stop (a suspended virtual machine breaks linearizability)
    #[arg(long, value_name = "MS")]
    pub lease_reads: Option<u64>,
    /// How long a stop may take to answer what is in flight, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stop_timeout: u64,
    /// What is logged, in the syntax of the `tracing` filters, such as `info` or `quorate=debug`
    #[arg(long, env = "QUORATE_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

/// Why the node does not run any more, or never did.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Address(#[from] ParseError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("the process can't be started again: {0}; start it by hand")]
    Restart(#[source] io::Error),
    #[error("signals can't be listened for: {0}")]
    Signals(#[source] io::Error),
}

impl Arguments {
    /// # Errors
    ///
    /// When the parts of an address given apart do not make one.
    pub fn config(&self) -> Result<NodeConfig, ParseError> {
        let given_port = self.port.or_else(|| self.address.as_ref().map(Address::port));
        let address = match &self.address {
            Some(address) => address.clone(),
            None => default_address(self.ip, self.port.unwrap_or(PORT_DEFAULT)).parse()?,
        };
        let data_dir = self.data_dir.clone().unwrap_or_else(|| match given_port {
            None => PathBuf::from(DATA_DIR_DEFAULT),
            Some(port) => PathBuf::from(DATA_DIR_DEFAULT).join(port.to_string()),
        });
        Ok(NodeConfig {
            listen: self.listening_on(&address)?,
            address,
            public_address: self.public_address.clone(),
            view: self.view.clone().filter(|view| !view.is_empty()),
            asked: Asked::from_flags(self.repl_factor, self.shards),
            data_dir,
            cache_bytes: self.cache_mib.saturating_mul(1 << 20),
            stop_timeout: Duration::from_secs(self.stop_timeout),
            timing_factor: self.timing_factor,
            lease_drift_ms: self.lease_reads,
        })
    }

    fn listening_on(&self, address: &Address) -> Result<Vec<Address>, ParseError> {
        if !self.listen.is_empty() {
            return Ok(self.listen.clone());
        }
        let port = self.port.unwrap_or(address.port());
        match self.ip {
            Some(ip) => Ok(vec![host_port(ip, port).parse()?]),
            None if self.port.is_some() => Ok(vec![format!("{}:{port}", address.host()).parse()?]),
            None => Ok(vec![address.clone()]),
        }
    }
}

fn host_port(ip: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

/// A wildcard address can be listened on and not be called: the node is then known by the loopback address.
fn default_address(ip: Option<IpAddr>, port: u16) -> String {
    match ip.filter(|ip| !ip.is_unspecified()) {
        Some(ip) => host_port(ip, port),
        None => format!("127.0.0.1:{port}"),
    }
}

/// Runs a node until SIGTERM or SIGINT.
///
/// # Errors
///
/// Why it could not start, or had to stop.
pub async fn run(arguments: Arguments) -> Result<(), ServeError> {
    telemetry::start(arguments.log.as_deref(), arguments.log_format);
    let config = arguments.config()?;
    let listen: Vec<String> = config.listen.iter().map(ToString::to_string).collect();
    let server = Server::bind(&listen).await?;
    let limits = Limits { drain_timeout: config.stop_timeout, ..Limits::default() };
    let told = signals().map_err(ServeError::Signals)?;
    tracing::info!("quorate {} at {}, data in {}", env!("CARGO_PKG_VERSION"), config.address, config.data_dir.display());
    let node = Node::open(config)?;
    let face = Arc::new(Face { node: node.clone(), closing: CancellationToken::new() });
    let metrics = Arc::new(Metrics::new(vec![server.stats(), face.clone()]));
    let app = App::new(node.clone(), face.clone(), metrics, Some(face.clone()), limits.clone());
    let (stop_server, stop_node) = (CancellationToken::new(), CancellationToken::new());
    let serving = tokio::spawn({
        let stop = stop_server.clone();
        async move { server.serve(router(app), stop, &limits).await }
    });
    let mut running = tokio::spawn({
        let (node, stop) = (node.clone(), stop_node.clone());
        async move { node.run(&stop).await }
    });
    let ended = tokio::select! {
        ended = &mut running => Some(ended),
        name = told => {
            tracing::info!("{name}: stopping");
            None
        }
    };
    if ended.is_none() {
        node.hand_over(HAND_OVER_TIMEOUT).await;
    }
    stop_server.cancel();
    face.closing.cancel();
    if let Err(error) = serving.await {
        tracing::error!("the server was broken off: {error}");
    }
    stop_node.cancel();
    let ended = match ended {
        Some(ended) => ended,
        None => running.await,
    };
    match ended {
        Ok(Err(error)) if error.wants_restart() => return Err(restart(&error)),
        Ok(result) => result?,
        Err(error) => tracing::error!("the node was broken off: {error}"),
    }
    tracing::info!("stopped");
    Ok(())
}

/// Starts this process again, with the same arguments. Returns only if that fails.
fn restart(why: &NodeError) -> ServeError {
    use std::os::unix::process::CommandExt;
    tracing::warn!("{why}: starting again");
    let again =
        std::env::current_exe().map(|program| std::process::Command::new(program).args(std::env::args_os().skip(1)).exec());
    ServeError::Restart(again.unwrap_or_else(|error| error))
}

/// Resolves with the name of the first signal that asks this process to stop. A second one ends it at once.
fn signals() -> io::Result<impl Future<Output = &'static str>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, receiver) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        let _ = sender.send(name);
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("told twice: stopping at once; nothing that was acknowledged is lost");
        std::process::exit(130);
    });
    Ok(async { receiver.await.unwrap_or("the signal handler ended") })
}

/// A node as the HTTP side sees it.
struct Face {
    node: Arc<Node>,
    /// Lanes end when this is cancelled: they would hold up the drain.
    closing: CancellationToken,
}

impl Readiness for Face {
    fn ready(&self) -> Result<(), NotReady> {
        self.node.ready().map_err(|unready| NotReady { code: unready.code, reason: unready.reason })
    }
}

impl MetricSource for Face {
    fn collect(&self, text: &mut Exposition) {
        for family in self.node.families() {
            let kind = match family.kind {
                FamilyKind::Counter => Kind::Counter,
                FamilyKind::Gauge => Kind::Gauge,
                FamilyKind::Histogram => Kind::Histogram,
            };
            text.family(family.name, kind, family.help);
            for sample in &family.samples {
                let labels: Vec<(&str, &str)> = sample.labels.iter().map(|(name, value)| (*name, value.as_str())).collect();
                text.part(sample.suffix, &labels, sample.value);
            }
        }
    }
}

impl PeerService for Face {
    fn lane(&self, lane: &str, incoming: BoxStream<'static, io::Result<Bytes>>) -> BoxStream<'static, Bytes> {
        match (Lane::from_name(lane), self.node.registry()) {
            (Some(lane), Some(registry)) => {
                let closing = self.closing.clone();
                serve_lane(registry, lane, incoming).take_until(closing.cancelled_owned()).boxed()
            }
            // The peer sees its lane end at once, and dials again in a while.
            (None, _) | (_, None) => stream::empty().boxed(),
        }
    }

    fn shard(&self, request: ShardRequest) -> BoxFuture<'_, ShardReply> {
        Box::pin(self.node.answer(request))
    }

    fn identity(&self) -> Identity {
        self.node.identity()
    }

    fn promise(&self, request: PromiseRequest) -> BoxFuture<'_, PromiseReply> {
        Box::pin(self.node.promise(request))
    }

    fn replicas(&self) -> Vec<HostedReplica> {
        self.node.hosted()
    }

    fn announce(&self, command: meta::Command) -> BoxFuture<'_, Result<meta::Outcome, Failure>> {
        Box::pin(self.node.announce(command))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn config(line: &[&str]) -> NodeConfig {
        let line = Line::try_parse_from(std::iter::once(&"serve").chain(line)).expect("a line that parses");
        line.arguments.config().expect("addresses")
    }

    #[test]
    fn without_arguments_it_is_one_node_on_the_default_port() {
        let config = config(&[]);
        assert_eq!((config.address.as_str(), config.data_dir), ("127.0.0.1:13800", PathBuf::from("quorate-data")));
        assert_eq!(config.listen, vec![config.address]);
        assert_eq!(config.view, None);
    }

    #[test]
    fn an_ip_and_a_port_are_listened_on_and_the_wildcard_is_not_advertised() {
        let config = config(&["-i", "0.0.0.0", "-p", "13801"]);
        assert_eq!(config.listen[0].as_str(), "0.0.0.0:13801");
        assert_eq!(config.address.as_str(), "127.0.0.1:13801");
        assert_eq!(config.data_dir, PathBuf::from("quorate-data/13801"));
    }

    #[test]
    fn an_address_is_listened_on_unless_told_otherwise() {
        let at = config(&["--address", "10.0.0.1:80"]);
        assert_eq!(at.listen[0].as_str(), "10.0.0.1:80");
        let elsewhere = config(&["--address", "10.0.0.1:80", "--listen", "0.0.0.0:8080", "--listen", "[::1]:8081"]);
        assert_eq!(elsewhere.listen.len(), 2);
    }
}
