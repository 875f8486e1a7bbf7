//! [`Host`]: a node with all that belongs to it, on a machine of its own and in a runtime of its
//! own. Nodes speak to one another over the loopback interface, each with an address of its own
//! there; when one is ended, its runtime goes with its tasks and sockets.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::machine::{DiskFault, Disks, End, Power, SimMachine, TreeFaults, Trouble, Watcher};
use quorate::cli::serve;
use quorate::config::NodeConfig;
use quorate::http::{Limits, Server};
use quorate::node::{Node, NodeError};
use quorate::raft::Replica;
use quorate::sm::cluster::view::PlacementSpec;
use quorate::storage::ReplicaKey;
use quorate::storage::mem_trees::MemTrees;
use quorate::storage::sim_disk::SimDisk;
use quorate::supervisor::{ProcessEnd, Supervisor};
use quorate::types::{Address, DirectoryId, GroupId, ReplicaId};

const PORT: u16 = 7411;

pub struct Host {
    config: NodeConfig,
    /// The level that its next start speaks at most: that of an older program.
    level_max: Mutex<Option<u16>>,
    directory: DirectoryId,
    disks: Disks,
    is_held: Arc<AtomicBool>,
    disk_fault: DiskFault,
    supervised: Mutex<Option<(Supervisor, watch::Receiver<Option<ProcessEnd>>)>>,
    faults: Arc<TreeFaults>,
    replace_after: Mutex<Option<Duration>>,
    compare_every: Mutex<Option<Duration>>,
    scrub_every: Mutex<Duration>,
    watcher: Mutex<Option<Watcher>>,
    running: Mutex<Option<Incarnation>>,
    /// Why it stopped by itself, where it should not have.
    pub failed: Arc<Mutex<Option<String>>>,
}

/// From a start to the next end.
struct Incarnation {
    power: Arc<Power>,
    node: Arc<Mutex<Option<Arc<Node>>>>,
    /// None once it is being taken down.
    runtime: Option<Runtime>,
}

impl Drop for Incarnation {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Addresses that no other cluster has, of this process or another.
pub fn addresses(count: usize) -> Vec<Address> {
    static CLUSTERS: AtomicU16 = AtomicU16::new(1);
    let cluster = CLUSTERS.fetch_add(1, Ordering::Relaxed);
    let process = 1 + std::process::id() % 250;
    let (high, low) = (process, cluster % 250);
    (1..=count)
        .map(|n| {
            format!("127.{high}.{low}.{n}:{PORT}")
                .parse()
                .expect("an address")
        })
        .collect()
}

impl Host {
    pub fn new(address: Address, view: Vec<Address>, asked: PlacementSpec, seed: u64) -> Arc<Self> {
        let config = NodeConfig {
            view: Some(view),
            asked,
            replace_after: Duration::from_secs(600),
            raise_level_after: Duration::from_millis(500),
            compare_every: Duration::from_millis(500),
            ..NodeConfig::for_tests(address.clone())
        };
        let disks = Disks {
            disk: SimDisk::new(seed),
            trees: MemTrees::new(),
        };
        Arc::new(Self {
            config,
            level_max: Mutex::default(),
            directory: DirectoryId(u128::from(seed) + 1),
            disks,
            is_held: Arc::default(),
            disk_fault: DiskFault::default(),
            supervised: Mutex::default(),
            faults: Arc::default(),
            replace_after: Mutex::default(),
            compare_every: Mutex::default(),
            scrub_every: Mutex::default(),
            watcher: Mutex::default(),
            running: Mutex::default(),
            failed: Arc::default(),
        })
    }

    pub fn address(&self) -> &Address {
        &self.config.address
    }

    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    pub fn directory(&self) -> DirectoryId {
        self.directory
    }

    pub fn watch(&self, watcher: Watcher) {
        *self.watcher.lock() = Some(watcher);
    }

    /// From now on the node can't say anything new of itself on its disk, and waits with what rests
    /// on that.
    pub fn hold(&self) {
        self.is_held.store(true, Ordering::Relaxed);
    }

    /// Whether there is no descriptor for the maps of shards from now on.
    pub fn take_descriptors(&self, are_gone: bool) {
        self.faults
            .lacks_descriptors
            .store(are_gone, Ordering::Relaxed);
    }

    /// The trees of this replica, if any, can't be opened any more, nor can new ones of it.
    pub fn damage(&self, replica: Option<ReplicaKey>) {
        *self.faults.damaged.lock() = replica;
    }

    /// From its next start on it has what has failed for so long replaced.
    pub fn replace_after(&self, time: Duration) {
        *self.replace_after.lock() = Some(time);
    }

    /// From its next start on it speaks this level at most, as an older program would.
    pub fn speak(&self, level_max: Option<u16>) {
        *self.level_max.lock() = level_max;
    }

    /// From its next start on it scrubs so often.
    pub fn scrub_every(&self, time: Duration) {
        *self.scrub_every.lock() = time;
    }

    /// From its next start on it has replicas compared so often.
    pub fn compare_every(&self, time: Duration) {
        *self.compare_every.lock() = Some(time);
    }

    /// What is wrong with its disk from now on, and below the directories of which name.
    pub fn set_disk_fault(&self, fault: Option<(Trouble, &'static str)>) {
        *self.disk_fault.lock() = fault;
    }

    /// Who supervises what runs since the last start.
    pub fn supervisor(&self) -> Supervisor {
        self.supervised
            .lock()
            .as_ref()
            .expect("it was started")
            .0
            .clone()
    }

    /// What has ended it since the last start.
    pub fn ended(&self) -> watch::Receiver<Option<ProcessEnd>> {
        self.supervised
            .lock()
            .as_ref()
            .expect("it was started")
            .1
            .clone()
    }

    pub fn start(&self) {
        let power = Power::on(
            self.is_held.clone(),
            self.faults.clone(),
            self.disk_fault.clone(),
        );
        let (supervisor, ended) = Supervisor::noting();
        *self.supervised.lock() = Some((supervisor.clone(), ended));
        let watcher = self.watcher.lock().clone().expect("it is watched");
        let machine = SimMachine {
            disks: self.disks.clone(),
            power: power.clone(),
            directory_if_new: self.directory,
            watcher,
            supervisor,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let node: Arc<Mutex<Option<Arc<Node>>>> = Arc::default();
        let level_max = *self.level_max.lock();
        let replace_after = *self.replace_after.lock();
        let replace_after = replace_after.unwrap_or(self.config.replace_after);
        let compare_every = *self.compare_every.lock();
        let scrub_every = *self.scrub_every.lock();
        let compare_every = compare_every.unwrap_or(self.config.compare_every);
        let config = NodeConfig {
            level_max,
            replace_after,
            compare_every,
            scrub_every,
            ..self.config.clone()
        };
        let serving = serve(Arc::new(machine), config, node.clone());
        let (failed, is_on) = (self.failed.clone(), power.clone());
        runtime.spawn(async move {
            let error = serving.await;
            if is_on.is_on() {
                failed.lock().get_or_insert(error);
            }
        });
        let before = self.running.lock().replace(Incarnation {
            power,
            node,
            runtime: Some(runtime),
        });
        assert!(
            before.is_none_or(|before| !before.power.is_on()),
            "two of a node"
        );
    }

    /// Ends the node at once: from here on it changes nothing on its disk. What runs of it is taken
    /// down by [`Host::bury`].
    pub fn end(&self, end: End) -> bool {
        let running = self.running.lock();
        running
            .as_ref()
            .is_some_and(|incarnation| incarnation.power.cut(&self.disks, end))
    }

    /// Takes down what is left of a node that was ended. Not from within its own runtime.
    pub fn bury(&self) {
        let mut running = self.running.lock();
        if running
            .as_ref()
            .is_some_and(|incarnation| !incarnation.power.is_on())
        {
            *running = None;
        }
    }

    pub fn is_up(&self) -> bool {
        self.running
            .lock()
            .as_ref()
            .is_some_and(|incarnation| incarnation.power.is_on())
    }

    pub fn node(&self) -> Option<Arc<Node>> {
        let running = self.running.lock();
        let incarnation = running
            .as_ref()
            .filter(|incarnation| incarnation.power.is_on())?;
        incarnation.node.lock().clone()
    }

    pub fn groups(&self) -> Vec<Arc<Replica>> {
        self.node()
            .and_then(|node| node.registry())
            .map(|registry| registry.groups())
            .unwrap_or_default()
    }

    pub fn group(&self, id: GroupId) -> Option<Arc<Replica>> {
        self.groups()
            .into_iter()
            .find(|group| group.key().group == id)
    }

    /// Whether the replica, or witness, is open here.
    pub fn has(&self, group: GroupId, replica: ReplicaId) -> bool {
        let key = ReplicaKey { group, replica };
        let Some(registry) = self.node().and_then(|node| node.registry()) else {
            return false;
        };
        registry
            .get(group)
            .map(|group| group.key())
            .or_else(|| registry.witness(group).map(|witness| witness.key()))
            == Some(key)
    }

    pub fn leads(&self, id: GroupId) -> bool {
        self.group(id).is_some_and(|group| group.leads())
    }
}

/// Runs the node as `quorate serve` does, and again where it wants to be started again. Returns why
/// it does not run any more.
async fn serve(
    machine: Arc<SimMachine>,
    config: NodeConfig,
    place: Arc<Mutex<Option<Arc<Node>>>>,
) -> String {
    loop {
        match serve_once(machine.clone(), config.clone(), &place).await {
            Err(error) if error.wants_restart() => {}
            Err(error) => return error.to_string(),
            Ok(()) => return "it stopped".to_owned(),
        }
    }
}

async fn serve_once(
    machine: Arc<SimMachine>,
    config: NodeConfig,
    place: &Mutex<Option<Arc<Node>>>,
) -> Result<(), NodeError> {
    // What ran there before may still have the port for a moment.
    let server = loop {
        match Server::bind(&[config.address.as_str()]).await {
            Ok(server) => break server,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let limits = Limits {
        drain_timeout: Duration::from_millis(500),
        ..Limits::default()
    };
    let node = Node::open_on(machine, config)?;
    let stop = CancellationToken::new();
    let app = serve::app(&node, &server, limits.clone());
    *place.lock() = Some(node.clone());
    let serving = tokio::spawn({
        let stop = stop.clone();
        async move { server.serve_app(app, stop, &limits).await }
    });
    let ended = node.run(&CancellationToken::new()).await;
    *place.lock() = None;
    node.registry()
        .inspect(|registry| registry.begin_to_close());
    stop.cancel();
    if let Err(error) = serving.await {
        tracing::debug!("the server was broken off: {error}");
    }
    ended
}
