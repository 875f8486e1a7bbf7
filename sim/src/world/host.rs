//! [`Host`]: a machine of the world, and the process of a node on it.
//!
//! A process has a runtime of its own, which the world has run for a moment after the other, in
//! this one thread. So it ends at any moment, with all its tasks, by losing its runtime; it is
//! paused by not being run; and its clock goes at a rate of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorate::api::peer::Standing;
use quorate::cli::serve;
use quorate::config::NodeConfig;
use quorate::http::{self, Limits};
use quorate::node::platform::Platform;
use quorate::node::{Node, NodeError};
use quorate::raft::transport::Dial;
use quorate::raft::{Replica, seed_this_thread};
use quorate::routing::call::ShardCaller;
use quorate::routing::peer_caller::PeerCaller;
use quorate::routing::transport::SetUpError;
use quorate::sm::cluster::view::{PlacementSpec, View};
use quorate::storage::ReplicaKey;
use quorate::storage::directory::{DataDirectory, DirectoryError};
use quorate::storage::disk::Disk;
use quorate::storage::mem_trees::MemTrees;
use quorate::storage::sim_disk::SimDisk;
use quorate::storage::sled_tree::{SledError, SledOptions};
use quorate::storage::tree::Trees;
use quorate::supervisor::{ProcessEnd, Supervisor};
use quorate::types::{Address, DirectoryId, NodeId};
use tokio::runtime::{Builder, RngSeed, Runtime};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::host_disk::HostDisk;
use super::network::{HostIndex, Network, Ways};
use super::random::SimRng;
use super::setting::Setting;

/// Calls that a process may have under way.
const CALLS_MAX: usize = 256;

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is killed: all that was written stays.
    Kill,
    /// The power fails: what was not synced is lost, or torn.
    PowerCut,
}

pub struct Host {
    pub index: HostIndex,
    pub address: Address,
    config: NodeConfig,
    pub disk: HostDisk,
    network: Network,
    random: SimRng,
    seed: u64,
    /// Nanoseconds of its clock in a millisecond of the world.
    rate_ns: u64,
    starts: u64,
    process: Option<Process>,
}

struct Process {
    runtime: Runtime,
    node: Arc<Mutex<Option<Arc<Node>>>>,
    ended: Arc<Mutex<Option<NodeError>>>,
    supervised: watch::Receiver<Option<ProcessEnd>>,
    began: Instant,
    elapsed_ns: u64,
}

/// Why a process is not there any more, by itself.
#[derive(Debug)]
pub enum Ended {
    /// It wants to be started again.
    Again(String),
    /// It cannot go on, and says why.
    Failed(String),
    /// A part of it panicked, or hangs.
    Broken(String),
}

/// What a process stands on.
struct SimPlatform {
    disk: SimDisk,
    trees: MemTrees,
    ways: Ways,
    directory_if_new: DirectoryId,
    supervisor: Supervisor,
}

impl Platform for SimPlatform {
    fn open_directory(&self, path: &Path) -> Result<DataDirectory, DirectoryError> {
        DataDirectory::open_unlocked(self.disk(), path, self.directory_if_new)
    }

    fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.disk.clone())
    }

    fn open_trees(
        &self,
        _path: &Path,
        _options: SledOptions,
        _is_expected: bool,
    ) -> Result<Arc<dyn Trees>, SledError> {
        self.trees.begin();
        Ok(Arc::new(self.trees.clone()))
    }

    fn peer_caller(&self) -> Result<PeerCaller, SetUpError> {
        Ok(PeerCaller::over(Arc::new(self.ways.clone())))
    }

    fn shard_caller(&self) -> Result<ShardCaller, SetUpError> {
        Ok(ShardCaller::over(Arc::new(self.ways.clone()), CALLS_MAX))
    }

    fn dial(&self) -> Arc<dyn Dial> {
        Arc::new(self.ways.clone())
    }

    fn supervisor(&self) -> Supervisor {
        self.supervisor.clone()
    }
}

impl Host {
    pub fn new(
        index: HostIndex,
        address: Address,
        view: Option<Vec<Address>>,
        asked: PlacementSpec,
        setting: &Setting,
        network: Network,
        seed: u64,
    ) -> Self {
        let mut random = SimRng::new(seed, &format!("host {index}"));
        let config = NodeConfig {
            join_only: view.is_none(),
            view,
            asked,
            log_bytes: setting.log_bytes,
            replace_after: setting.replace_after,
            lost_disk_after: setting.lost_disk_after,
            lease_drift_ms: setting.lease_drift_ms,
            level_max: setting.level_at_first,
            raise_level_after: Duration::from_millis(500),
            compare_every: Duration::from_secs(2),
            scrub_every: setting.scrub_every,
            ..NodeConfig::for_tests(address.clone())
        };
        Self {
            index,
            address,
            config,
            disk: HostDisk::new(index, setting.disk_pace, seed),
            network,
            rate_ns: random.between(setting.rate_ns.0, setting.rate_ns.1),
            random,
            seed,
            starts: 0,
            process: None,
        }
    }

    pub fn is_up(&self) -> bool {
        self.process.is_some()
    }

    pub fn start(&mut self) {
        assert!(self.process.is_none(), "two processes of a node");
        self.starts += 1;
        // A later program is there after the first start.
        if self.starts > 1 {
            self.config.level_max = None;
        }
        self.disk.begin();
        self.network.begin(self.index);
        let seed = RngSeed::from_bytes(&self.random.next().to_le_bytes());
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .rng_seed(seed)
            .build()
            .expect("a runtime without sockets");
        let (supervisor, supervised) = Supervisor::noting();
        let machine = SimPlatform {
            disk: self.disk.disk.clone(),
            trees: self.disk.trees.clone(),
            ways: self.network.ways_of(self.index),
            directory_if_new: self.disk.directory_if_new(),
            supervisor,
        };
        let node: Arc<Mutex<Option<Arc<Node>>>> = Arc::default();
        let ended: Arc<Mutex<Option<NodeError>>> = Arc::default();
        let began = {
            let _within = runtime.enter();
            Instant::now()
        };
        let (place, end, config) = (node.clone(), ended.clone(), self.config.clone());
        let (network, index, handle) = (self.network.clone(), self.index, runtime.handle().clone());
        runtime.spawn(async move {
            let served = async {
                let node = Node::open_on(Arc::new(machine), config)?;
                let app = serve::served(&node, Vec::new(), Limits::default());
                *place.lock() = Some(node.clone());
                network.listen(index, handle, http::router(app));
                node.run(&CancellationToken::new()).await
            };
            if let Err(error) = served.await {
                *end.lock() = Some(error);
            }
        });
        self.process = Some(Process {
            runtime,
            node,
            ended,
            supervised,
            began,
            elapsed_ns: 0,
        });
    }

    /// Ends the process at once, as if it had been killed or the power had failed.
    pub fn end(&mut self, end: End) {
        let Some(process) = self.process.take() else {
            return;
        };
        self.network.end(self.index, end == End::PowerCut);
        self.disk.crash(end == End::PowerCut);
        process.node.lock().take();
        drop(process.runtime);
    }

    /// Runs the process for a millisecond of the world.
    pub fn step(&mut self, tick: u64) {
        let seed = SimRng::new(self.config_seed(), "step").next() ^ tick.rotate_left(32);
        let rate_ns = self.rate_ns;
        let Some(process) = &mut self.process else {
            return;
        };
        seed_this_thread(Some(seed));
        self.disk.set_pace(seed);
        process.elapsed_ns += rate_ns;
        let until = process.began + Duration::from_nanos(process.elapsed_ns);
        process
            .runtime
            .block_on(async { tokio::time::sleep_until(until).await });
    }

    /// Has the clock of the process jump, as after a pause.
    pub fn jump(&mut self, ms: u64) {
        let rate_ns = self.rate_ns;
        let Some(process) = &mut self.process else {
            return;
        };
        process.elapsed_ns += ms * rate_ns;
        let until = process.began + Duration::from_nanos(process.elapsed_ns);
        process.runtime.block_on(async {
            let ahead = until.saturating_duration_since(Instant::now());
            tokio::time::advance(ahead).await;
        });
    }

    /// Returns why the process has ended by itself, if it has, and clears it away.
    pub fn take_end(&mut self) -> Option<Ended> {
        let process = self.process.as_ref()?;
        let panicked = process.supervised.borrow().as_ref().map(|end| {
            let end = format!("{end}");
            Ended::Broken(end)
        });
        let stopped = process.ended.lock().take().map(|error| {
            let text = error.to_string();
            match error.wants_restart() {
                true => Ended::Again(text),
                false => Ended::Failed(text),
            }
        });
        let ended = panicked.or(stopped)?;
        self.end(End::Kill);
        Some(ended)
    }

    pub fn node(&self) -> Option<Arc<Node>> {
        self.process.as_ref()?.node.lock().clone()
    }

    pub fn groups(&self) -> Vec<Arc<Replica>> {
        self.node()
            .and_then(|node| node.registry())
            .map(|registry| registry.groups())
            .unwrap_or_default()
    }

    pub fn disk(&self) -> &SimDisk {
        &self.disk.disk
    }

    /// Returns the replicas that run here, witnesses too.
    pub fn replicas(&self) -> Vec<ReplicaKey> {
        let registry = self.node().and_then(|node| node.registry());
        let Some(registry) = registry else {
            return Vec::new();
        };
        let maps = registry.groups().into_iter().map(|group| group.key());
        let witnesses = registry.witnesses().into_iter();
        maps.chain(witnesses.map(|witness| witness.key())).collect()
    }

    /// Returns which node of the cluster this is, as far as it knows itself.
    pub fn node_id(&self) -> Option<NodeId> {
        let (directory, view) = self.standing()?;
        let view = view?;
        let mut known = view.nodes.iter();
        known
            .find(|(_, node)| node.directory == directory)
            .map(|(id, _)| *id)
    }

    /// Returns the directory of the node, and the view that it knows if it is a member.
    pub fn standing(&self) -> Option<(DirectoryId, Option<View>)> {
        let identity = self.node()?.identity();
        let view = match identity.standing {
            Standing::Member { view } => Some(*view),
            Standing::Fresh { .. } | Standing::Promised { .. } | Standing::Retired { .. } => None,
        };
        Some((identity.directory, view))
    }

    /// Counts the starts of the process.
    pub fn starts(&self) -> u64 {
        self.starts
    }

    /// Looks at the process from within its runtime, where its clock is.
    pub fn within<T>(&self, look: impl FnOnce() -> T) -> Option<T> {
        let process = self.process.as_ref()?;
        let _within = process.runtime.enter();
        Some(look())
    }

    fn config_seed(&self) -> u64 {
        self.seed.rotate_left(17) ^ ((self.index as u64) << 32 | self.starts)
    }
}
