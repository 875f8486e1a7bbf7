//! The flags of `quorate serve`, and the [`NodeConfig`] that it makes of them.
//!
//! Flags beat the environment; a variable that is set and empty, as compose files pass them on,
//! counts as not set. The node is called by its address, and listens on it unless it is told
//! otherwise. A wildcard such as 0.0.0.0 is listened on and never advertised.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use crate::config::{DATA_DIR_DEFAULT, NodeConfig, PORT_DEFAULT, is_unspecified};
use crate::sm::cluster::view::PlacementSpec;
use crate::sm::log_space::LOG_BYTES_MIN;
use crate::telemetry::LogFormat;
use crate::types::{Address, ParseError};

/// Replicas of a shard. More would only slow its writes down.
const REPL_FACTOR_MAX: u8 = 7;

/// A node without an address listens here.
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Size of the log of a node, in MiB.
const LOG_MIB_DEFAULT: u64 = 256;

/// Connections of clients, of a node and of a gateway.
pub const CONNECTIONS_MAX: usize = 20_000;

/// Flags of `quorate serve`.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Address of this node for others (host:port); it listens there unless told otherwise
    /// [default: 127.0.0.1:13800]
    #[arg(long, env = "ADDRESS", value_name = "HOST:PORT")]
    pub address: Option<OptionalValue<Address>>,
    /// The nodes of the cluster to found or to join, this one among them, separated by commas
    /// [default: this node alone]
    #[arg(short, long, env = "VIEW", value_name = "HOST:PORT,...")]
    pub view: Option<OptionalValue<Addresses>>,
    /// Join a cluster and never found one: where every node of the view is empty, wait. For nodes
    /// of a cluster that is there
    #[arg(
        long,
        env = "JOIN_ONLY",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = switch
    )]
    pub join_only: Option<bool>,
    /// Nodes per shard. Without --shards each node then belongs to exactly one shard; else each has
    /// one shard with up to 3 replicas
    #[arg(long, env = "REPL_FACTOR", value_name = "R", value_parser = repl_factor)]
    pub repl_factor: Option<OptionalValue<u8>>,
    /// Number of shards [default: one per node]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub shards: Option<u16>,
    /// Directory of the data [default: ./quorate-data, or ./quorate-data/PORT where a port or
    /// address is given]
    #[arg(short, long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Listen here instead of on the address; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Vec<Address>,
    /// Address that clients are redirected to, if that is another
    #[arg(long, env = "PUBLIC_ADDRESS", value_name = "HOST:PORT")]
    pub public_address: Option<OptionalValue<Address>>,
    /// Listen on this IP address (0.0.0.0: on all)
    #[arg(short, long, value_name = "IP")]
    pub ip: Option<IpAddr>,
    /// The port to listen on, and of the address where none is given
    #[arg(short, long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Memory for the cache of the map database, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub cache_mib: u64,
    /// MiB that the log of all shards together takes on the disk. It may grow as large as the
    /// snapshots of the node, up to eight times this, and by what members that are behind still
    /// need, up to as much again
    #[arg(long, value_name = "MIB", default_value_t = LOG_MIB_DEFAULT, value_parser = log_mib)]
    pub log_mib: u64,
    /// So many MiB of the disk are kept free: with less, writes are refused (503) and leads go to
    /// other nodes, while reads go on [default: 256, or a quarter of a disk of less than 1 GiB]
    #[arg(long, value_name = "MIB")]
    pub disk_reserve_mib: Option<u64>,
    /// A node that is out of reach for so many seconds has its replicas rebuilt on others, where
    /// there are enough; a replica that has failed for so long on a node in reach is replaced
    /// there. All nodes should have the same
    #[arg(
        long,
        env = "REPLACE_AFTER",
        value_name = "SECONDS",
        default_value_t = 300,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub replace_after: u64,
    /// An empty data directory that answers at the address of a node that is away takes its place
    /// after so many seconds: until then it may be a mistake. All nodes should have the same
    #[arg(
        long,
        env = "LOST_DISK_AFTER",
        value_name = "SECONDS",
        default_value_t = 30
    )]
    pub lost_disk_after: u64,
    /// Multiplies heartbeat and election times: for very many groups on few cores. All nodes should
    /// have the same
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(1..=100)
    )]
    pub timing_factor: u64,
    /// Read by the leader's lease, without a round to a quorum; clocks may drift by MS within an
    /// election timeout. The clock must not stop (a suspended virtual machine breaks
    /// linearizability). All nodes must have the same, with the same --timing-factor: those with
    /// others are refused
    #[arg(long, value_name = "MS")]
    pub lease_reads: Option<u64>,
    /// Speak no later feature level than this, as an older program would: a cluster is not raised
    /// past it while this node is in it
    #[arg(long, value_name = "LEVEL")]
    pub level_max: Option<u16>,
    /// Connections of clients at a time: fewer where the limit of open files (ulimit -n) leaves no
    /// room for so many beside log, maps and other nodes
    #[arg(long, value_name = "N", default_value_t = CONNECTIONS_MAX, value_parser = connections)]
    pub max_connections: usize,
    /// The cluster's feature level is raised once every node has run a newer program for so many
    /// seconds; until then each can go back to the older one
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub raise_level_after: u64,
    /// The replicas of each shard compare what they hold every so many seconds; one that differs
    /// from a majority is rebuilt
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 600,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub compare_every: u64,
    /// Seconds between two scrubs: all that is on the disk is read again, at 16 MiB per second, and
    /// mended where it has rotted; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = 604_800)]
    pub scrub_every: u64,
    /// Seconds that a stop may take to answer what is in flight
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stop_timeout: u64,
    /// Filter of the log, in the syntax of the `tracing` filters, such as `info` or `quorate=debug`
    #[arg(long, env = "QUORATE_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Format of log lines
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

impl ServeArguments {
    /// Returns the configuration that the flags and variables make.
    ///
    /// # Errors
    ///
    /// Fails if the parts of an address given apart do not make one.
    pub fn config(&self) -> Result<NodeConfig, ParseError> {
        let view = given(self.view.as_ref()).map(|view| view.0.clone());
        let address = match given(self.address.as_ref()) {
            Some(address) => address.clone(),
            None => self.unnamed(view.as_deref())?,
        };
        Ok(NodeConfig {
            listen: self.listening_on(&address)?,
            data_dir: self
                .data_dir
                .clone()
                .unwrap_or_else(|| self.default_data_dir(&address)),
            address,
            public_address: given(self.public_address.as_ref()).cloned(),
            view,
            join_only: self.join_only.unwrap_or(false),
            asked: PlacementSpec::from_flags(
                given(self.repl_factor.as_ref()).copied(),
                self.shards,
            ),
            cache_bytes: self.cache_mib.saturating_mul(1 << 20),
            log_bytes: self.log_mib.saturating_mul(1 << 20),
            disk_reserve_bytes: self.disk_reserve_mib.map(|mib| mib.saturating_mul(1 << 20)),
            stop_timeout: Duration::from_secs(self.stop_timeout),
            replace_after: Duration::from_secs(self.replace_after),
            lost_disk_after: Duration::from_secs(self.lost_disk_after),
            timing_factor: self.timing_factor,
            lease_drift_ms: self.lease_reads,
            level_max: self.level_max,
            raise_level_after: Duration::from_secs(self.raise_level_after),
            compare_every: Duration::from_secs(self.compare_every),
            scrub_every: Duration::from_secs(self.scrub_every),
            restarts: 0,
        })
    }

    /// Returns the address of a node that was given none: the one that it listens on, or the
    /// loopback address of a wildcard.
    fn unnamed(&self, view: Option<&[Address]>) -> Result<Address, ParseError> {
        let listened = match (self.ip, self.port, self.listen.first()) {
            (None, None, Some(listen)) => listen.clone(),
            (ip, port, _) => host_port(ip.unwrap_or(LOOPBACK), port.unwrap_or(PORT_DEFAULT))?,
        };
        let called = if is_unspecified(&listened) {
            host_port(LOOPBACK, listened.port())?
        } else {
            listened
        };
        // People write both, and addresses are compared as text.
        let localhost: Address = format!("localhost:{}", called.port()).parse()?;
        let is_localhost =
            view.is_some_and(|view| !view.contains(&called) && view.contains(&localhost));
        Ok(
            if is_localhost && called == host_port(LOOPBACK, called.port())? {
                localhost
            } else {
                called
            },
        )
    }

    fn listening_on(&self, address: &Address) -> Result<Vec<Address>, ParseError> {
        let port = self.port.unwrap_or(address.port());
        let asked = match self.ip {
            Some(ip) => Some(host_port(ip, port)?),
            None if self.port.is_some() => Some(format!("{}:{port}", address.host()).parse()?),
            None => None,
        };
        let mut listen: Vec<Address> = asked
            .into_iter()
            .chain(self.listen.iter().cloned())
            .collect();
        if listen.is_empty() {
            listen.push(address.clone());
        }
        listen.sort();
        listen.dedup();
        Ok(listen)
    }

    /// Returns a directory named by the port: several nodes may be started in one place, each with
    /// a port.
    fn default_data_dir(&self, address: &Address) -> PathBuf {
        let is_told = self.port.is_some()
            || !self.listen.is_empty()
            || given(self.address.as_ref()).is_some();
        let dir = PathBuf::from(DATA_DIR_DEFAULT);
        if is_told {
            dir.join(self.port.unwrap_or(address.port()).to_string())
        } else {
            dir
        }
    }
}

fn host_port(ip: IpAddr, port: u16) -> Result<Address, ParseError> {
    SocketAddr::new(ip, port).to_string().parse()
}

/// A value that may be empty, which counts as not given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionalValue<T>(Option<T>);

impl<T: FromStr> FromStr for OptionalValue<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        let text = text.trim();
        if text.is_empty() {
            Ok(OptionalValue(None))
        } else {
            text.parse().map(|value| OptionalValue(Some(value)))
        }
    }
}

/// Returns the value if it was given and is not empty.
pub fn given<T>(value: Option<&OptionalValue<T>>) -> Option<&T> {
    value.and_then(|given| given.0.as_ref())
}

/// Addresses separated by commas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses(Vec<Address>);

impl FromStr for Addresses {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.split(',')
            .map(|address| address.trim().parse())
            .collect::<Result<_, _>>()
            .map(Addresses)
    }
}

/// Reads a number of connections.
pub fn connections(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|count| *count > 0)
        .ok_or_else(|| "expected a number, at least 1".to_owned())
}

/// Reads the size of a log.
fn log_mib(text: &str) -> Result<u64, String> {
    let least = LOG_BYTES_MIN >> 20;
    let expected = || format!("expected a number of MiB, at least {least}");
    text.parse()
        .ok()
        .filter(|mib| *mib >= least)
        .ok_or_else(expected)
}

/// Reads the value of a switch. An empty one is off, as for all variables.
fn switch(text: &str) -> Result<bool, String> {
    match text.trim() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "" | "false" | "0" | "no" | "off" => Ok(false),
        other => Err(format!("expected true or false, not '{other}'")),
    }
}

fn repl_factor(text: &str) -> Result<OptionalValue<u8>, String> {
    let expected = || format!("expected a number from 1 to {REPL_FACTOR_MAX}");
    let factor: OptionalValue<u8> = text.parse().map_err(|_| expected())?;
    if factor
        .0
        .is_none_or(|factor| (1..=REPL_FACTOR_MAX).contains(&factor))
    {
        Ok(factor)
    } else {
        Err(expected())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::cluster::view::Layout;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: ServeArguments,
    }

    /// The environment of the tests must not configure what they look at: an empty flag is as good
    /// as none.
    fn config(line: &[&str]) -> NodeConfig {
        let mut words = vec!["serve"];
        for flag in ["--address", "-v", "--repl-factor", "--public-address"] {
            if !line.contains(&flag) {
                words.extend([flag, ""]);
            }
        }
        words.extend(line);
        Line::try_parse_from(words)
            .unwrap_or_else(|error| panic!("{line:?}: {error}"))
            .arguments
            .config()
            .expect("addresses")
    }

    fn texts(addresses: &[Address]) -> Vec<&str> {
        addresses.iter().map(Address::as_str).collect()
    }

    #[test]
    fn where_a_node_listens_what_it_is_called_and_where_its_data_is() {
        type Case<'a> = (&'a [&'a str], &'a str, &'a [&'a str], &'a str);
        let cases: &[Case] = &[
            (&[], "127.0.0.1:13800", &["127.0.0.1:13800"], "quorate-data"),
            (
                &["-p", "13801"],
                "127.0.0.1:13801",
                &["127.0.0.1:13801"],
                "quorate-data/13801",
            ),
            (
                &["-i", "0.0.0.0"],
                "127.0.0.1:13800",
                &["0.0.0.0:13800"],
                "quorate-data",
            ),
            (
                &["-i", "0.0.0.0", "-p", "13801"],
                "127.0.0.1:13801",
                &["0.0.0.0:13801"],
                "quorate-data/13801",
            ),
            (
                &["-i", "::", "-p", "13801"],
                "127.0.0.1:13801",
                &["[::]:13801"],
                "quorate-data/13801",
            ),
            (
                &["-i", "10.0.0.1"],
                "10.0.0.1:13800",
                &["10.0.0.1:13800"],
                "quorate-data",
            ),
            (
                &["-i", "::1", "-p", "81"],
                "[::1]:81",
                &["[::1]:81"],
                "quorate-data/81",
            ),
            (
                &["--address", "10.0.0.1:80"],
                "10.0.0.1:80",
                &["10.0.0.1:80"],
                "quorate-data/80",
            ),
            (
                &["--address", "kvs-1:80", "-i", "0.0.0.0"],
                "kvs-1:80",
                &["0.0.0.0:80"],
                "quorate-data/80",
            ),
            (
                &["--address", "10.0.0.1:80", "-p", "90"],
                "10.0.0.1:80",
                &["10.0.0.1:90"],
                "quorate-data/90",
            ),
            (
                &["--listen", "10.0.0.1:90"],
                "10.0.0.1:90",
                &["10.0.0.1:90"],
                "quorate-data/90",
            ),
            (
                &["--listen", "localhost:90"],
                "localhost:90",
                &["localhost:90"],
                "quorate-data/90",
            ),
            (
                &["--listen", "0.0.0.0:90"],
                "127.0.0.1:90",
                &["0.0.0.0:90"],
                "quorate-data/90",
            ),
            (
                &[
                    "--address",
                    "a:80",
                    "--listen",
                    "0.0.0.0:8080",
                    "--listen",
                    "[::1]:8081",
                ],
                "a:80",
                &["0.0.0.0:8080", "[::1]:8081"],
                "quorate-data/80",
            ),
            (
                &[
                    "-p",
                    "80",
                    "--listen",
                    "0.0.0.0:90",
                    "--listen",
                    "127.0.0.1:80",
                ],
                "127.0.0.1:80",
                &["0.0.0.0:90", "127.0.0.1:80"],
                "quorate-data/80",
            ),
            (
                &["-d", "/data", "-p", "80"],
                "127.0.0.1:80",
                &["127.0.0.1:80"],
                "/data",
            ),
        ];
        for (line, address, listen, data_dir) in cases {
            let config = config(line);
            assert_eq!(config.address.as_str(), *address, "{line:?}");
            assert_eq!(texts(&config.listen), *listen, "{line:?}");
            assert_eq!(config.data_dir, PathBuf::from(data_dir), "{line:?}");
            assert_eq!(config.check(), Ok(()), "{line:?}");
        }
    }

    #[test]
    fn a_view_is_read_however_it_is_spaced_and_names_localhost() {
        let config = config(&["-p", "13801", "-v", " localhost:13800, localhost:13801 "]);
        assert_eq!(
            texts(&config.view.clone().expect("a view")),
            ["localhost:13800", "localhost:13801"]
        );
        assert!(config.names_itself());
        assert_eq!(config.address.as_str(), "localhost:13801");
    }

    #[test]
    fn a_replication_factor_alone_puts_each_node_into_one_shard() {
        let asked = config(&["--repl-factor", "2"]).asked;
        assert_eq!(
            (asked.layout, asked.replication_factor),
            (Layout::Exclusive, Some(2))
        );
        assert_eq!(
            config(&["--repl-factor", "2", "--shards", "4"])
                .asked
                .layout,
            Layout::Spread
        );
    }

    #[test]
    fn what_is_set_and_empty_is_not_given() {
        let config = config(&[
            "--address",
            "",
            "-v",
            " ",
            "--repl-factor",
            "",
            "--public-address",
            "",
        ]);
        assert_eq!(
            (config.address.as_str(), config.view, config.asked),
            ("127.0.0.1:13800", None, PlacementSpec::default())
        );
        assert_eq!(config.public_address, None);
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_starts() {
        for line in [
            &["-v", "a:1,,b:2"][..],
            &["-v", "a:1,b"],
            &["--address", "10.0.0.1"],
            &["--repl-factor", "0"],
            &["--repl-factor", "8"],
            &["--repl-factor", "two"],
            &["--max-connections", "0"],
            &["--log-mib", "15"],
            &["-p", "0"],
            &["-i", "localhost"],
        ] {
            assert!(
                Line::try_parse_from(std::iter::once(&"serve").chain(line)).is_err(),
                "{line:?}"
            );
        }
        assert!(config(&["--address", "0.0.0.0:13800"]).check().is_err());
    }
}
