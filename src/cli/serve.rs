//! `quorate serve`: runs a node until a signal stops it.
//!
//! Listens first, so that a busy port is named before anything is touched; then opens the data
//! directory and runs the node while its routes are served. A stop hands leaderships over while
//! requests are still answered, then drains, then closes log and maps.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use tokio_util::sync::CancellationToken;

use super::node_flags::ServeArguments;
use super::signals;
use crate::api::peer::{
    Announcement, DiskReport, FailureReport, Greeting, GreetingReply, HoldRequest, Hosting,
    Identity, PromiseReply, PromiseRequest,
};
use crate::api::protocol::{Hop, ScrubStatus, ShardReply, ShardRequest};
use crate::api::store::Failure;
use crate::config::NodeConfig;
use crate::http::{App, BindError, Limits, NotReady, PeerService, Readiness, Server};
use crate::metrics::Collector;
use crate::node::{Node, NodeError};
use crate::raft::transport::Lane;
use crate::raft::transport::lanes::serve_lane;
use crate::routing::transport::SetUpError;
use crate::sm::cluster::meta;
use crate::sm::cluster::view::View;
use crate::telemetry;
use crate::types::{Address, ParseError};

/// Time to transfer leaderships at a stop.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);

/// Tells a process that was started by itself how often that was in a row.
const RESTARTS: &str = "QUORATE_RESTARTS";
/// A process that has run for so long begins to count anew.
const LASTS: Duration = Duration::from_secs(600);

/// The reason why the node does not run any more, or never did.
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
    #[error("the HTTP client can't be set up: {0}")]
    Client(#[from] SetUpError),
    #[error("{0} is where this gateway itself listens: name members of the cluster")]
    OwnMember(Address),
    #[error("signals can't be listened for: {0}")]
    Signals(#[source] io::Error),
}

/// Runs a node until SIGTERM or SIGINT.
///
/// # Errors
///
/// Says why it could not start, or had to stop.
pub async fn run(arguments: ServeArguments) -> Result<(), ServeError> {
    telemetry::start(arguments.log.as_deref(), arguments.log_format);
    let started = Instant::now();
    let config = NodeConfig {
        restarts: restarts(),
        ..arguments.config()?
    };
    let restarts = config.restarts;
    let listen: Vec<String> = config.listen.iter().map(ToString::to_string).collect();

    // First the ports: one that is taken ends the start before anything on the disk is touched.
    let server = Server::bind(&listen).await?;
    let limits = Limits {
        drain_timeout: config.stop_timeout,
        connections_max: arguments.max_connections,
        ..Limits::default()
    };
    let told = signals::stop().map_err(ServeError::Signals)?;
    tracing::info!(
        "quorate {} at {}, data in {}",
        env!("CARGO_PKG_VERSION"),
        config.address,
        config.data_dir.display()
    );
    let node = Node::open(config)?;
    let app = app(&node, &server, limits.clone());

    // Two stops: requests under way need the node until the last of them is answered.
    let (stop_server, stop_node) = (CancellationToken::new(), CancellationToken::new());
    let serving = node.supervisor().start_alone("server", {
        let stop = stop_server.clone();
        async move { server.serve_app(app, stop, &limits).await }
    });
    let mut running = node.supervisor().start_alone("node", {
        let (node, stop) = (node.clone(), stop_node.clone());
        async move { node.run(&stop).await }
    });

    // The node can end by itself, on a broken disk for instance. Then the server stops too.
    let ended = tokio::select! {
        ended = &mut running => Some(ended),
        name = told => {
            tracing::info!("{name}: stopping");
            None
        }
    };

    // Other nodes take over the leads before the server stops, so that clients hardly notice.
    if ended.is_none() {
        node.hand_over(HAND_OVER_TIMEOUT).await;
    }

    // The stop cuts the lanes, which must not pass for the end of the leaders at their other ends.
    node.registry()
        .inspect(|registry| registry.begin_to_close());
    stop_server.cancel();
    if let Err(error) = serving.await {
        tracing::error!("the server was broken off: {error}");
    }
    stop_node.cancel();
    let ended = match ended {
        Some(ended) => ended,
        None => running.await,
    };
    match ended {
        Ok(Err(error)) if error.wants_restart() => {
            // A node that fails soon after each start must not start itself again for ever.
            let in_a_row = if started.elapsed() < LASTS {
                restarts
            } else {
                0
            };
            return Err(restart(&error, in_a_row.saturating_add(1)));
        }
        Ok(result) => result?,
        Err(error) => tracing::error!("the node was broken off: {error}"),
    }
    tracing::info!("stopped");
    Ok(())
}

/// Returns the app that serves a node.
pub fn app(node: &Arc<Node>, server: &Server, limits: Limits) -> App {
    served(node, vec![Box::new(server.stats())], limits)
}

/// Returns a node as [`app`] does, with the metrics of whatever serves it.
pub fn served(node: &Arc<Node>, mut metrics: Vec<Box<dyn Collector>>, limits: Limits) -> App {
    let face = Arc::new(NodeService { node: node.clone() });
    metrics.push(Box::new(node.clone()));
    App::new(node.clone(), face.clone(), metrics, Some(face), limits)
}

/// Returns how often the process has started again by itself in a row.
fn restarts() -> u32 {
    std::env::var(RESTARTS)
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(0)
}

/// Starts this process again, with the same arguments and under the same id, so that whoever looks
/// after it sees no end. `restarts`: how often that makes it in a row. Returns only if that fails.
fn restart(why: &NodeError, restarts: u32) -> ServeError {
    use std::os::unix::process::CommandExt;
    tracing::warn!("{why}: starting again");
    let again = program(std::env::current_exe(), std::env::args_os().next()).map(|program| {
        let mut command = std::process::Command::new(program);
        command
            .args(std::env::args_os().skip(1))
            .env(RESTARTS, restarts.to_string())
            .exec()
    });
    ServeError::Restart(again.unwrap_or_else(|error| error))
}

/// Returns the program to execute anew: the one that runs, or where another file took its place
/// since the start, which leaves it no name, what it was started as.
fn program(running: io::Result<PathBuf>, started_as: Option<OsString>) -> io::Result<PathBuf> {
    match (running, started_as) {
        (Ok(running), _) if running.exists() => Ok(running),
        (_, Some(started_as)) => Ok(started_as.into()),
        (running, None) => running,
    }
}

/// A node as the HTTP side sees it.
struct NodeService {
    node: Arc<Node>,
}

impl Readiness for NodeService {
    fn ready(&self) -> Result<(), NotReady> {
        self.node.ready().map_err(|unready| NotReady {
            code: unready.code,
            reason: unready.reason,
        })
    }

    fn note(&self) -> Option<String> {
        self.node.note()
    }
}

impl PeerService for NodeService {
    fn lane(
        &self,
        lane: &str,
        incoming: BoxStream<'static, io::Result<Bytes>>,
    ) -> BoxStream<'static, Bytes> {
        match (Lane::from_name(lane), self.node.registry()) {
            (Some(lane), Some(registry)) => serve_lane(registry, lane, incoming).boxed(),
            // The peer sees its lane end at once, and dials again in a while.
            (None, _) | (_, None) => stream::empty().boxed(),
        }
    }

    fn shard(&self, request: ShardRequest, hop: Hop) -> BoxFuture<'_, ShardReply> {
        Box::pin(self.node.answer(request, hop))
    }

    fn identity(&self) -> Identity {
        self.node.identity()
    }

    fn promise(&self, request: PromiseRequest) -> BoxFuture<'_, PromiseReply> {
        Box::pin(self.node.promise(request))
    }

    fn hosting(&self) -> BoxFuture<'_, Hosting> {
        Box::pin(self.node.hosting())
    }

    fn view(&self) -> BoxFuture<'_, Result<View, Failure>> {
        Box::pin(self.node.view())
    }

    fn invite(&self, members: Vec<Address>) {
        self.node.invited(members);
    }

    fn hold_level(&self, request: HoldRequest) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(self.node.hold_level(request))
    }

    fn disk_reported(&self, report: DiskReport) -> Result<(), Failure> {
        self.node.disk_reported(report)
    }

    fn scrub_status(&self) -> Result<ScrubStatus, Failure> {
        self.node.scrub_status()
    }

    fn begin_scrub(&self) -> Result<ScrubStatus, Failure> {
        self.node.begin_scrub()
    }

    fn greeted(&self, greeting: Greeting) -> BoxFuture<'_, GreetingReply> {
        Box::pin(self.node.greeted(greeting))
    }

    fn failures_reported(&self, report: FailureReport) -> Result<(), Failure> {
        self.node.failures_reported(report)
    }

    fn announce(
        &self,
        announcement: Announcement,
    ) -> BoxFuture<'_, Result<meta::MetaOutcome, Failure>> {
        Box::pin(self.node.announce(announcement))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_replaced_starts_again_as_what_it_was_started_as() {
        let here = std::env::current_exe().expect("it runs");
        let gone = PathBuf::from("/no/such/quorate (deleted)");
        let started_as = || Some(OsString::from("./quorate"));
        let found = |running, started_as| program(running, started_as).ok();
        assert_eq!(found(Ok(here.clone()), started_as()), Some(here));
        assert_eq!(
            found(Ok(gone.clone()), started_as()),
            Some("./quorate".into())
        );
        assert_eq!(
            found(Err(io::ErrorKind::NotFound.into()), started_as()),
            Some("./quorate".into())
        );
        assert_eq!(found(Ok(gone.clone()), None), Some(gone));
    }
}
