//! Everything at once: processes that are killed, paused and stopped, links that are cut one way or
//! both, reset or slow, disks that fill up, and view changes in the middle of it. Nothing that was
//! acknowledged is lost, and no register tells two stories.
//!
//! A campaign is made of episodes. Each has a cluster of its own, whose shape and faults follow
//! from the seed. `QUORATE_TEST_SECONDS` says how long the campaign lasts (one episode if it is not
//! set).

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::common::cluster::{Cluster, Setup, operate};
use crate::common::load::Load;
use crate::common::mounts::Mount;
use crate::common::net::{Cut, Network};
use crate::common::{from_environment, say, seed};

/// How long faults are made in one episode. Longer histories take the checker long, and one cluster
/// teaches less than several.
const EPISODE: Duration = Duration::from_secs(25);

/// How long a fault lasts: short ones end before an election, long ones after it.
const LASTS_MS: std::ops::Range<u64> = 100..5000;

/// Within which a healed cluster writes again. Generous: it bounds a cluster that is stuck.
const HEAL_LIMIT: Duration = Duration::from_secs(60);

/// Within which a healed cluster ends a change of the view.
const CHANGE_LIMIT: Duration = Duration::from_secs(120);

/// A disk that holds what an episode writes, until it is filled up.
const DISK_BYTES: u64 = 1 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Pause,
    Stop,
    /// One node hears nobody, and nobody hears it.
    Isolate,
    /// One node hears nobody, and is heard.
    Deafen,
    /// One node is heard by nobody, and hears.
    Mute,
    CutPair,
    CutPairOneWay,
    ResetPair,
    /// A pair whose connection comes and goes.
    Flap,
    Slow,
    FullDisk,
    ChangeView,
}

const FAULTS: [Fault; 13] = [
    Fault::Kill,
    Fault::Pause,
    Fault::Stop,
    Fault::Isolate,
    Fault::Deafen,
    Fault::Mute,
    Fault::CutPair,
    Fault::CutPairOneWay,
    Fault::ResetPair,
    Fault::Flap,
    Fault::Slow,
    Fault::FullDisk,
    Fault::ChangeView,
];

/// What a cluster looks like.
#[derive(Debug, Clone, Copy)]
struct Shape {
    nodes: usize,
    replicas: usize,
    shards: usize,
    lease_reads: bool,
}

const SHAPES: [Shape; 5] = [
    Shape {
        nodes: 3,
        replicas: 3,
        shards: 2,
        lease_reads: false,
    },
    Shape {
        nodes: 3,
        replicas: 3,
        shards: 3,
        lease_reads: true,
    },
    Shape {
        nodes: 5,
        replicas: 5,
        shards: 1,
        lease_reads: false,
    },
    Shape {
        nodes: 5,
        replicas: 3,
        shards: 5,
        lease_reads: false,
    },
    // An even number of replicas has a witness.
    Shape {
        nodes: 4,
        replicas: 2,
        shards: 2,
        lease_reads: false,
    },
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_every_kind_lose_nothing() {
    let start = Instant::now();
    let limit =
        from_environment("QUORATE_TEST_SECONDS").map_or(Duration::ZERO, Duration::from_secs);
    for episode in 0.. {
        let shape_seed = seed().wrapping_add(episode);
        if let Err(reason) = Episode::run(shape_seed).await {
            return say(&format!(
                "faults: left out, no network of its own for a node: {reason}"
            ));
        }
        if start.elapsed() >= limit {
            return say(&format!(
                "faults: {} episodes in {:?}",
                episode + 1,
                start.elapsed()
            ));
        }
    }
}

struct Episode {
    random: StdRng,
    cluster: Cluster,
    network: Network,
    disks: Vec<Option<Mount>>,
    shape: Shape,
    /// The node past those that the cluster began with is in the view.
    is_extended: bool,
    change: Option<tokio::task::JoinHandle<(i32, String)>>,
    told: Vec<String>,
}

impl Episode {
    async fn run(seed: u64) -> Result<(), String> {
        let mut random = StdRng::seed_from_u64(seed);
        let shape = *SHAPES.choose(&mut random).expect("some");
        let network = Network::new(shape.nodes + 1)?;
        let place = tempfile::TempDir::with_prefix_in("faults-", env!("CARGO_TARGET_TMPDIR"));
        let place = place.expect("a directory");
        let disk =
            |node: usize| Mount::tmpfs(&place.path().join(node.to_string()), DISK_BYTES).ok();
        let disks: Vec<_> = (0..shape.nodes).map(disk).collect();

        let mut cluster = Cluster::prepare(setup(shape, &network, &disks)).await;
        for (node, process) in cluster.nodes.iter_mut().enumerate() {
            process.wrapper = network.wrapper(node);
            process.start();
        }
        cluster.wait_ready().await;
        let view = cluster.addresses().join(",");
        // As the members are started: nodes whose leases differ refuse each other.
        let arguments = [&["--view", &view], shape.lease_arguments()].concat();
        let spare = cluster.prepare_node_at(&network.address(shape.nodes), &arguments);
        cluster.nodes[spare].wrapper = network.wrapper(spare);
        cluster.nodes[spare].start();
        cluster.wait_up(spare).await;

        let (told, change) = (Vec::new(), None);
        let mut episode = Self {
            random,
            cluster,
            network,
            disks,
            shape,
            is_extended: false,
            change,
            told,
        };
        episode.attack(seed).await;
        Ok(())
    }

    /// Makes faults under load, heals, and has the load judged.
    async fn attack(&mut self, seed: u64) {
        let load = Load::new("faults").start(&self.cluster);
        load.writes(50).await;
        let start = Instant::now();
        while start.elapsed() < EPISODE {
            let fault = *FAULTS.choose(&mut self.random).expect("some");
            self.make(fault).await;
            // Sometimes the next comes before the cluster has got over this one.
            if self.random.random_bool(0.5) {
                load.next_write(HEAL_LIMIT).await;
            }
        }

        for node in 0..self.cluster.nodes.len() {
            self.start_if_ended(node);
        }
        self.end_change().await;
        say(&format!(
            "faults: seed {seed}, {:?}: {}",
            self.shape,
            self.told.join(", ")
        ));
        for node in 0..self.cluster.nodes.len() {
            self.cluster.wait_up(node).await;
        }
        load.writes(50).await;
        // A spare serves nothing.
        let members = self.shape.nodes + usize::from(self.is_extended);
        load.stop()
            .await
            .judge_at(&self.cluster.addresses()[..members])
            .await;
    }

    /// Makes a fault, waits for as long as it lasts, and takes it away.
    async fn make(&mut self, fault: Fault) {
        let count = self.shape.nodes;
        let node = self.random.random_range(0..count);
        let other = (node + self.random.random_range(1..count)) % count;
        let others = (0..=count).filter(|other| *other != node);
        let lasts = Duration::from_millis(self.random.random_range(LASTS_MS));
        self.told
            .push(format!("{fault:?} {node} {other} {} ms", lasts.as_millis()));
        let Self {
            network, cluster, ..
        } = self;
        match fault {
            Fault::Kill => cluster.nodes[node].kill(),
            Fault::Pause => {
                if cluster.nodes[node].exited().is_none() {
                    cluster.nodes[node].pause();
                    tokio::time::sleep(lasts).await;
                    cluster.nodes[node].resume();
                }
                return;
            }
            Fault::Stop => {
                if cluster.nodes[node].exited().is_none() {
                    cluster.nodes[node].stop().await;
                }
            }
            Fault::Isolate => others.for_each(|other| network.part(node, other, Cut::Drop)),
            Fault::Deafen => others.for_each(|other| network.cut(other, node, Cut::Drop)),
            Fault::Mute => others.for_each(|other| network.cut(node, other, Cut::Drop)),
            Fault::CutPair => network.part(node, other, Cut::Drop),
            Fault::CutPairOneWay => network.cut(node, other, Cut::Drop),
            Fault::ResetPair => network.part(node, other, Cut::Reset),
            Fault::Flap => {
                let end = Instant::now() + lasts;
                while Instant::now() < end {
                    network.part(node, other, Cut::Drop);
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    network.heal();
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                return;
            }
            Fault::Slow => network.slow_down(node, 2000),
            Fault::FullDisk => return self.fill_disk(node, lasts).await,
            Fault::ChangeView => return self.change_view().await,
        }
        tokio::time::sleep(lasts).await;
        self.network.heal();
        self.start_if_ended(node);
    }

    /// Takes all room from the disk of a node for a while. Where it has none of its own, nothing.
    async fn fill_disk(&mut self, node: usize, lasts: Duration) {
        let Some(disk) = &self.disks[node] else {
            return;
        };
        let filler = disk.path.join("filler");
        let wanted = usize::try_from(DISK_BYTES).expect("a size in memory");
        // Ends with an error when the disk is full, which is what is wanted.
        let _ = std::fs::write(&filler, vec![0; wanted]);
        tokio::time::sleep(lasts).await;
        std::fs::remove_file(&filler).expect("a file that was just written");
        self.start_if_ended(node);
    }

    /// Adds the spare to the view, or removes it, while the next faults are made.
    async fn change_view(&mut self) {
        if self
            .change
            .as_ref()
            .is_some_and(|change| !change.is_finished())
        {
            return;
        }
        self.end_change().await;
        let servers: Vec<String> = self.cluster.addresses()[..self.shape.nodes].to_vec();
        let spare = self.cluster.nodes[self.shape.nodes].address.clone();
        let verb = if self.is_extended { "remove" } else { "add" };
        self.is_extended = !self.is_extended;
        self.change = Some(tokio::spawn(async move {
            operate(&servers, &[verb, &spare, "--yes"]).await
        }));
    }

    async fn end_change(&mut self) {
        let Some(change) = self.change.take() else {
            return;
        };
        let ended = tokio::time::timeout(CHANGE_LIMIT, change).await;
        let ended =
            ended.unwrap_or_else(|_| panic!("a change of the view is stuck: {:?}", self.told));
        let (code, text) = ended.expect("a command that does not panic");
        // In the middle of faults it may fail, or end with an unknown outcome: what the view is now
        // is asked for.
        if code != 0 {
            let last = text.lines().last().unwrap_or_default().to_owned();
            self.told
                .push(format!("the change of the view ended with {code}: {last}"));
            let spare = self.cluster.nodes[self.shape.nodes].address.clone();
            let status = self.cluster.status().await;
            self.is_extended = status.nodes.iter().any(|node| node.address == spare);
        }
    }

    fn start_if_ended(&mut self, node: usize) {
        let process = &mut self.cluster.nodes[node];
        if !process.is_running() {
            process.kill();
            process.start();
        }
    }
}

impl Shape {
    /// Returns the flags that all nodes of a cluster must share.
    fn lease_arguments(&self) -> &'static [&'static str] {
        match self.lease_reads {
            true => &["--lease-reads", "100"],
            false => &[],
        }
    }
}

fn setup(shape: Shape, network: &Network, disks: &[Option<Mount>]) -> Setup {
    let data =
        |(node, disk): (usize, &Option<Mount>)| Some((node, disk.as_ref()?.path.join("data")));
    let (replicas, shards) = (shape.replicas.to_string(), shape.shards.to_string());
    let mut arguments = vec!["--repl-factor", &replicas, "--shards", &shards];
    arguments.extend(shape.lease_arguments());
    Setup {
        addresses: (0..shape.nodes).map(|node| network.address(node)).collect(),
        data: disks.iter().enumerate().filter_map(data).collect(),
        ..Setup::nodes(shape.nodes).arguments(&arguments)
    }
}
