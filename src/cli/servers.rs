//! The servers that a command talks to.

use std::path::Path;
use std::time::Duration;

use clap::Args;

use crate::client::native::NativeClient;
use crate::config::PORT_DEFAULT;
use crate::types::Address;

/// `cluster.sh` keeps its cluster here, in the current directory, unless this variable names
/// another place.
const CLUSTER_DIR: &str = ".cluster";
const CLUSTER_DIR_VARIABLE: &str = "QUORATE_CLUSTER_DIR";

#[derive(Debug, Args)]
pub struct Servers {
    /// Any nodes of the cluster [default: those of ./.cluster, else 127.0.0.1:13800]
    #[arg(
        short,
        long,
        env = "QUORATE_SERVERS",
        value_name = "HOST:PORT,...",
        value_delimiter = ',',
        global = true
    )]
    server: Vec<Address>,
    /// Seconds to wait for an answer: servers are asked in turn until then
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds, global = true)]
    timeout: Duration,
}

impl Servers {
    pub fn addresses(&self) -> Vec<Address> {
        if !self.server.is_empty() {
            return self.server.clone();
        }
        let local = local_cluster();
        if local.is_empty() {
            default_server().into_iter().collect()
        } else {
            local
        }
    }

    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    pub fn client(&self) -> NativeClient {
        NativeClient::new(self.addresses(), self.timeout)
    }
}

/// Parses a positive number of seconds, perhaps with a fraction.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text
        .strip_suffix('s')
        .unwrap_or(text)
        .parse()
        .map_err(|_| "expected a number of seconds".to_owned())?;
    let duration = Duration::try_from_secs_f64(number)
        .ok()
        .filter(|duration| !duration.is_zero());
    duration.ok_or_else(|| "expected a number of seconds above 0".to_owned())
}

fn default_server() -> Option<Address> {
    format!("127.0.0.1:{PORT_DEFAULT}").parse().ok()
}

/// Returns the addresses of the nodes that `cluster.sh` started here, in order of their ports.
pub fn local_cluster() -> Vec<Address> {
    let dir = std::env::var_os(CLUSTER_DIR_VARIABLE).filter(|dir| !dir.is_empty());
    nodes_of(Path::new(&dir.unwrap_or_else(|| CLUSTER_DIR.into())))
}

fn nodes_of(cluster: &Path) -> Vec<Address> {
    let entries = std::fs::read_dir(cluster.join("nodes"))
        .into_iter()
        .flatten()
        .flatten();
    let address = |entry: std::fs::DirEntry| {
        std::fs::read_to_string(entry.path().join("address"))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let mut addresses: Vec<Address> = entries.filter_map(address).collect();
    addresses.sort_by_key(Address::port);
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_of_a_local_cluster_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(nodes_of(&dir.path().join("none")).is_empty());
        for (name, text) in [
            ("13802", "127.0.0.1:13802\n"),
            ("13801", "127.0.0.1:13801"),
            ("odd", "nonsense"),
        ] {
            let node = dir.path().join("nodes").join(name);
            std::fs::create_dir_all(&node).expect("created");
            std::fs::write(node.join("address"), text).expect("written");
        }
        let found: Vec<String> = nodes_of(dir.path())
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(found, ["127.0.0.1:13801", "127.0.0.1:13802"]);
    }

    #[test]
    fn seconds_are_positive() {
        assert_eq!(seconds("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(seconds("10s"), Ok(Duration::from_secs(10)));
        for bad in ["0", "-1", "x", "", "inf", "NaN"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
