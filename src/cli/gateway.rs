//! `quorate gateway`: serves a cluster's every dialect without keeping any data.
//!
//! It holds the shard map alone, so any number of them may run, and any may be lost. It fetches the
//! answer where a node would redirect: its clients need not reach the nodes.

use std::fmt;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::node_flags::{CONNECTIONS_MAX, connections};
use super::serve::ServeError;
use super::servers::local_cluster;
use super::{EXIT_CODES, signals};
use crate::client::gateway_readiness::GatewayReadiness;
use crate::client::remote::RemoteStore;
use crate::http::{App, Limits, NotReady, Readiness, Server};
use crate::metrics::{Collector, DescriptorEncoder, EncodeFamilies};
use crate::telemetry::{self, LogFormat};
use crate::types::{Address, ParseError};

/// The ports of the proxies of the systems whose dialects it serves.
const PORTS_DEFAULT: [u16; 2] = [8080, 8081];
/// The ports of their servers, asked where no member is named and no cluster was started here.
const MEMBER_PORTS_DEFAULT: [u16; 2] = [9000, 9001];
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Flags of `quorate gateway`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct GatewayArguments {
    /// Any members of the cluster; the others are learned from them [default: those of ./.cluster,
    /// else 127.0.0.1:9000 and 9001]
    #[arg(
        value_name = "HOST:PORT",
        env = "QUORATE_SERVERS",
        value_delimiter = ','
    )]
    members: Vec<Address>,
    /// Listen here; may be given several times [default: 127.0.0.1:8080 and 127.0.0.1:8081]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Vec<Address>,
    /// Listen on this IP address (0.0.0.0: on all) instead of 127.0.0.1
    #[arg(short, long, value_name = "IP")]
    ip: Option<IpAddr>,
    /// Listen on this port instead; may be given several times
    #[arg(short, long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Vec<u16>,
    /// Connections of clients at a time: fewer where the limit of open files (ulimit -n) leaves no
    /// room for so many beside those to the nodes
    #[arg(long, value_name = "N", default_value_t = CONNECTIONS_MAX, value_parser = connections)]
    max_connections: usize,
    /// Seconds that a stop may take to answer what is in flight
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    stop_timeout: u64,
    /// Filter of the log, in the syntax of the `tracing` filters, such as `info` or `quorate=debug`
    #[arg(long, env = "QUORATE_LOG", value_name = "FILTER")]
    log: Option<String>,
    /// Format of log lines
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

impl GatewayArguments {
    fn listening_on(&self) -> Vec<String> {
        let mut listen: Vec<String> = self.listen.iter().map(ToString::to_string).collect();
        if listen.is_empty() || self.ip.is_some() || !self.port.is_empty() {
            let ports = if self.port.is_empty() {
                &PORTS_DEFAULT[..]
            } else {
                &self.port
            };
            let ip = self.ip.unwrap_or(LOOPBACK);
            listen.extend(
                ports
                    .iter()
                    .map(|port| SocketAddr::new(ip, *port).to_string()),
            );
        }
        listen.sort();
        listen.dedup();
        listen
    }

    /// Returns the members to ask: those named, those of a cluster started here, or the default
    /// ports.
    ///
    /// # Errors
    ///
    /// Fails if one of them is this gateway: it would ask itself.
    fn members(&self, local: Vec<Address>, listen: &[String]) -> Result<Vec<Address>, ServeError> {
        let ports = MEMBER_PORTS_DEFAULT.iter();
        let members = match (self.members.is_empty(), local.is_empty()) {
            (false, _) => self.members.clone(),
            (true, false) => local,
            (true, true) => ports
                .map(|port| format!("127.0.0.1:{port}").parse())
                .collect::<Result<_, ParseError>>()?,
        };
        match members
            .iter()
            .find(|member| listen.iter().any(|listen| listen == member.as_str()))
        {
            Some(member) => Err(ServeError::OwnMember(member.clone())),
            None => Ok(members),
        }
    }
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// Says why it could not start.
pub async fn run(arguments: GatewayArguments) -> Result<(), ServeError> {
    telemetry::start(arguments.log.as_deref(), arguments.log_format);
    let listen = arguments.listening_on();
    let members = arguments.members(local_cluster(), &listen)?;
    let server = Server::bind(&listen).await?;
    let limits = Limits {
        drain_timeout: Duration::from_secs(arguments.stop_timeout),
        connections_max: arguments.max_connections,
        ..Limits::default()
    };

    // From here on a signal ends the gateway in order, also while it starts.
    let told = signals::stop().map_err(ServeError::Signals)?;
    let names: Vec<&str> = members.iter().map(Address::as_str).collect();
    tracing::info!(
        "quorate {}, a gateway to the cluster of {}",
        env!("CARGO_PKG_VERSION"),
        names.join(", ")
    );
    announce(&server.addresses());
    let store = Arc::new(RemoteStore::connect(members)?);
    let (app, lookout) = served(store, vec![Box::new(server.stats())], limits.clone());
    let stop = CancellationToken::new();
    let stopping = async {
        tracing::info!("{}: stopping", told.await);
        stop.cancel();
    };
    tokio::join!(
        server.serve_app(app, stop.clone(), &limits),
        lookout.run(&stop),
        stopping
    );
    tracing::info!("stopped");
    Ok(())
}

/// Returns the app that serves a cluster, with the metrics of whatever serves it, and what is to
/// watch the cluster meanwhile.
pub fn served(
    store: Arc<RemoteStore>,
    mut metrics: Vec<Box<dyn Collector>>,
    limits: Limits,
) -> (App, Arc<GatewayReadiness>) {
    let lookout = Arc::new(GatewayReadiness::new(Arc::clone(&store)));
    let health = Arc::new(GatewayHealth(lookout.clone()));
    metrics.push(Box::new(health.clone()));
    (App::new(store, health, metrics, None, limits), lookout)
}

/// Prints the ports on standard output, for scripts that wait for it. A closed output is no error.
fn announce(addresses: &[SocketAddr]) {
    let mut ports: Vec<u16> = addresses.iter().map(SocketAddr::port).collect();
    ports.dedup();
    let mut output = io::stdout().lock();
    let written = ports
        .iter()
        .try_for_each(|port| writeln!(output, "Listening on port {port}..."));
    drop(written.and_then(|()| output.flush()));
}

/// A [`GatewayReadiness`] as the HTTP side sees it.
struct GatewayHealth(Arc<GatewayReadiness>);

impl Readiness for GatewayHealth {
    fn ready(&self) -> Result<(), NotReady> {
        self.0.ready().map_err(|trouble| NotReady {
            code: trouble.code,
            reason: trouble.reason,
        })
    }
}

impl fmt::Debug for GatewayHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GatewayHealth").finish_non_exhaustive()
    }
}

impl Collector for GatewayHealth {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        encoder.gauge(
            "quorate_gateway_ready",
            "Whether every shard has a leader that answers here.",
            u64::from(self.0.ready().is_ok()),
        )?;

        // Before the first look nothing is known, and zeros would look like an empty cluster.
        let Some(look) = self.0.last() else {
            return Ok(());
        };
        encoder.gauge("quorate_gateway_nodes", "Nodes of the view.", look.nodes)?;
        encoder.gauge(
            "quorate_gateway_shards",
            "Shards that own keys.",
            look.shards,
        )?;
        encoder.gauge(
            "quorate_gateway_map_version",
            "Version of the shard map as it was last told.",
            look.map_version,
        )?;
        encoder.gauge(
            "quorate_gateway_look_age_seconds",
            "Time since the cluster was last looked at.",
            look.at.elapsed().as_secs_f64(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: GatewayArguments,
    }

    fn arguments(line: &[&str]) -> GatewayArguments {
        let line = Line::try_parse_from(std::iter::once(&"gateway").chain(line));
        line.unwrap_or_else(|error| panic!("{error}")).arguments
    }

    #[test]
    fn it_listens_where_it_is_told_to() {
        let cases: &[(&[&str], &[&str])] = &[
            (&[], &["127.0.0.1:8080", "127.0.0.1:8081"]),
            (&["-i", "0.0.0.0"], &["0.0.0.0:8080", "0.0.0.0:8081"]),
            (&["-p", "9090"], &["127.0.0.1:9090"]),
            (&["-i", "::", "-p", "1", "-p", "2"], &["[::]:1", "[::]:2"]),
            (
                &["--listen", "0.0.0.0:80", "--listen", "[::1]:81"],
                &["0.0.0.0:80", "[::1]:81"],
            ),
            (
                &["--listen", "0.0.0.0:80", "-p", "90"],
                &["0.0.0.0:80", "127.0.0.1:90"],
            ),
        ];
        for (line, listen) in cases {
            assert_eq!(arguments(line).listening_on(), *listen, "{line:?}");
        }
    }

    #[test]
    fn members_are_those_named_or_those_at_hand_and_never_itself() {
        let members = |line: &[&str], local: &[&str]| {
            let arguments = arguments(line);
            let local = local
                .iter()
                .map(|text| text.parse().expect("an address"))
                .collect();
            let members = arguments.members(local, &arguments.listening_on())?;
            Ok::<_, ServeError>(members.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(
            members(&["a:1", "b:2,c:3"], &["l:1"]).expect("members"),
            ["a:1", "b:2", "c:3"]
        );
        assert_eq!(
            members(&["-p", "90", "a:1"], &[]).expect("members"),
            ["a:1"]
        );
        assert_eq!(
            members(&[], &["l:1", "l:2"]).expect("members"),
            ["l:1", "l:2"]
        );
        assert_eq!(
            members(&[], &[]).expect("members"),
            ["127.0.0.1:9000", "127.0.0.1:9001"]
        );
        let error = members(&["127.0.0.1:8081"], &[])
            .expect_err("it is the gateway itself")
            .to_string();
        assert!(error.contains("127.0.0.1:8081"), "{error}");
    }
}
