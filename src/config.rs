//! The settings that a node starts with: by flags, which beat the environment.
//!
//! A plain value, checked once ([`NodeConfig::check`]); reading flags is in `cli::serve`.

use std::path::PathBuf;
use std::time::Duration;

use crate::sm::cluster::view::PlacementSpec;
use crate::sm::level::LEVEL;
use crate::types::Address;

/// The port of a node that was given none.
pub const PORT_DEFAULT: u16 = 13800;

/// The data directory of a node that was given none; with a port or an address given, a directory
/// named by the port in it.
pub const DATA_DIR_DEFAULT: &str = "quorate-data";

/// Configures a node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeConfig {
    /// The address that other nodes call, and the node's name in a `VIEW`.
    pub address: Address,
    /// The address that clients are redirected to; `address` if None.
    pub public_address: Option<Address>,
    /// Addresses to listen on.
    pub listen: Vec<Address>,
    /// The nodes of the cluster to found or to join; none: a cluster of one.
    pub view: Option<Vec<Address>>,
    /// It founds no cluster and helps to found none.
    pub join_only: bool,
    pub asked: PlacementSpec,
    pub data_dir: PathBuf,
    /// Bytes of map held in memory by sled's cache.
    pub cache_bytes: u64,
    /// Target size on disk of the log of all replicas together: see
    /// [`LogSpace`](crate::sm::log_space::LogSpace).
    pub log_bytes: u64,
    /// So much of the disk is kept free: with less, no writes are taken. None: as
    /// [`DiskRoom`](crate::sm::disk_level::DiskRoom) says.
    pub disk_reserve_bytes: Option<u64>,
    /// Time that a stop may take to hand leadership over and to answer what is in flight.
    pub stop_timeout: Duration,
    /// A node that is out of reach for so long has its work given to others, where there are
    /// enough.
    pub replace_after: Duration,
    /// An empty directory must answer in the place of a node for so long before that node's disk
    /// passes for lost.
    pub lost_disk_after: Duration,
    /// Multiplies the election timeout and the heartbeat interval, for thousands of groups on few
    /// cores.
    pub timing_factor: u64,
    /// Reads rest on the leader's lease, without a round to a quorum. Clocks may drift apart by
    /// this within a lease.
    pub lease_drift_ms: Option<u64>,
    /// The level that this node speaks at most; none: all that its program knows.
    pub level_max: Option<u16>,
    /// The level is raised once every node has said for so long that it speaks a later one.
    pub raise_level_after: Duration,
    /// The replicas of each shard compare their maps so often.
    pub compare_every: Duration,
    /// Interval at which everything on the disk is read again (scrub); zero turns scrubs off.
    pub scrub_every: Duration,
    /// Number of times in a row that this process has restarted itself.
    pub restarts: u32,
}

/// Names what makes a configuration invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("VIEW names {0} twice")]
    DuplicateInView(Address),
    #[error("VIEW is empty: name at least one address, or leave it out for a cluster of one")]
    EmptyView,
    #[error(
        "{0} can be listened on but is no address that others can call: give --address or \
        --public-address"
    )]
    Unspecified(Address),
}

impl NodeConfig {
    /// Returns the settings of a node in a test: small caches, short waits, nothing in the
    /// background that is not asked for.
    #[cfg(any(test, feature = "testing"))]
    pub fn for_tests(address: Address) -> Self {
        Self {
            listen: vec![address.clone()],
            address,
            public_address: None,
            view: None,
            join_only: false,
            asked: PlacementSpec::default(),
            data_dir: PathBuf::from("/node"),
            cache_bytes: 1 << 20,
            log_bytes: 256 << 20,
            disk_reserve_bytes: None,
            stop_timeout: Duration::from_secs(1),
            replace_after: Duration::from_secs(300),
            lost_disk_after: Duration::from_secs(30),
            timing_factor: 1,
            lease_drift_ms: None,
            level_max: None,
            raise_level_after: Duration::from_secs(60),
            compare_every: Duration::from_secs(600),
            scrub_every: Duration::ZERO,
            restarts: 0,
        }
    }

    /// # Errors
    ///
    /// Names what can't work, whatever the state of the disk and of other nodes.
    pub fn check(&self) -> Result<(), ConfigError> {
        for address in std::iter::once(&self.address)
            .chain(&self.public_address)
            .chain(self.view.iter().flatten())
        {
            if is_unspecified(address) {
                return Err(ConfigError::Unspecified(address.clone()));
            }
        }
        let Some(view) = &self.view else {
            return Ok(());
        };
        if view.is_empty() {
            return Err(ConfigError::EmptyView);
        }
        let mut sorted = view.clone();
        sorted.sort();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ConfigError::DuplicateInView(pair[0].clone())),
            None => Ok(()),
        }
    }

    /// Returns the level that this node speaks: it joins no cluster that uses a later one.
    pub fn speaks(&self) -> u16 {
        self.level_max.unwrap_or(LEVEL).min(LEVEL)
    }

    /// The `VIEW` as a set: sorted, without duplicates. Of a node without one: itself.
    pub fn view_set(&self) -> Vec<Address> {
        let mut view = self
            .view
            .clone()
            .unwrap_or_else(|| vec![self.address.clone()]);
        view.sort();
        view.dedup();
        view
    }

    /// A node that founds or joins, rather than wait as a spare.
    pub fn names_itself(&self) -> bool {
        self.view_set().contains(&self.address)
    }
}

/// 0.0.0.0 and its like: fine to listen on, never advertised.
pub fn is_unspecified(address: &Address) -> bool {
    let host = address.host().trim_start_matches('[').trim_end_matches(']');
    host.parse::<std::net::IpAddr>()
        .is_ok_and(|ip| ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(view: Option<&[&str]>) -> NodeConfig {
        let address = |text: &str| text.parse::<Address>().expect("an address");
        NodeConfig {
            view: view.map(|view| view.iter().map(|text| address(text)).collect()),
            ..NodeConfig::for_tests(address("127.0.0.1:1"))
        }
    }

    #[test]
    fn a_view_is_a_set() {
        assert_eq!(
            config(Some(&["b:2", "127.0.0.1:1", "b:2"]))
                .view_set()
                .len(),
            2
        );
        assert_eq!(
            config(None).view_set(),
            vec!["127.0.0.1:1".parse().expect("an address")]
        );
        assert!(config(Some(&["b:2", "127.0.0.1:1"])).names_itself());
        assert!(!config(Some(&["b:2"])).names_itself());
    }

    #[test]
    fn what_cannot_work_is_refused() {
        assert_eq!(config(Some(&[])).check(), Err(ConfigError::EmptyView));
        assert!(matches!(
            config(Some(&["b:2", "b:2"])).check(),
            Err(ConfigError::DuplicateInView(_))
        ));
        assert!(matches!(
            config(Some(&["0.0.0.0:2", "127.0.0.1:1"])).check(),
            Err(ConfigError::Unspecified(_))
        ));
        assert_eq!(config(Some(&["b:2", "127.0.0.1:1"])).check(), Ok(()));
    }
}
