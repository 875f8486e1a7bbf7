//! A cluster of real processes of the real binary, on this machine: started, killed, paused and
//! stopped one by one.
//!
//! One cluster at a time, whatever the number of test threads: the tests measure and overload, and
//! the machine may be small. Processes are killed and directories removed when it is dropped; when
//! a test panics, the ends of the logs are printed and the directories are kept.

use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::damage::files;
use super::http::{Answer, Client, Request};
use super::{eventually, say};

/// How long a node may take to be ready. Generous: it bounds a broken test, and measures nothing.
pub const READY_LIMIT: Duration = Duration::from_secs(90);

/// Ports come in blocks below the range from which the kernel gives out ports to those who connect.
const PORTS: Range<u16> = 10_000..32_000;
const PORTS_PER_CLUSTER: u16 = 20;

static TURN: LazyLock<Arc<Mutex<()>>> = LazyLock::new(Arc::default);

/// The binary under test: the one that was built with the tests, unless `QUORATE_TEST_BIN` names
/// another.
pub fn binary() -> String {
    std::env::var("QUORATE_TEST_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_quorate").to_owned())
}

/// Waits until no other test of this program has a cluster.
pub async fn take_turn() -> OwnedMutexGuard<()> {
    Arc::clone(&TURN).lock_owned().await
}

/// How a cluster is to be started.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    pub nodes: usize,
    /// Further flags of `quorate serve`, for every node.
    pub arguments: Vec<String>,
    /// Where the data of a node is, for those that don't have it beside the others'.
    pub data: Vec<(usize, PathBuf)>,
    /// Where the nodes are, if it is not for the cluster to choose.
    pub addresses: Vec<String>,
    /// Without `--view`: for a cluster of one.
    pub no_view: bool,
}

impl Setup {
    pub fn nodes(nodes: usize) -> Self {
        Self {
            nodes,
            ..Self::default()
        }
    }

    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }
}

pub struct Cluster {
    pub nodes: Vec<Node>,
    pub client: Client,
    /// The last of the ports is for what else a test listens with.
    ports: Range<u16>,
    dir: TempDir,
    /// Locked for as long as the ports are ours, among all test processes of this machine.
    _ports: File,
    _turn: OwnedMutexGuard<()>,
}

pub struct Node {
    pub address: String,
    pub data: PathBuf,
    pub log: PathBuf,
    /// `serve`, or `gateway`.
    command: &'static str,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    /// Put before the binary: a program that runs it in another environment.
    pub wrapper: Vec<String>,
    child: Option<Child>,
}

impl Cluster {
    /// Starts every node and waits until all are ready.
    pub async fn start(setup: Setup) -> Self {
        let mut cluster = Self::prepare(setup).await;
        for node in &mut cluster.nodes {
            node.start();
        }
        cluster.wait_ready().await;
        cluster
    }

    /// Takes ports and directories, and starts nothing yet.
    pub async fn prepare(setup: Setup) -> Self {
        let turn = take_turn().await;
        let dir = TempDir::with_prefix_in("cluster-", env!("CARGO_TARGET_TMPDIR"))
            .expect("a directory for the cluster");
        let (ports, lock) = take_ports();
        let chosen = || {
            ports
                .clone()
                .take(setup.nodes)
                .map(|port| format!("127.0.0.1:{port}"))
                .collect()
        };
        let addresses: Vec<String> = if setup.addresses.is_empty() {
            chosen()
        } else {
            setup.addresses.clone()
        };
        assert_eq!(
            addresses.len(),
            setup.nodes,
            "a cluster of at most {PORTS_PER_CLUSTER} nodes"
        );
        let view = addresses.join(",");
        let node = |(id, address): (usize, &String)| {
            let elsewhere = setup
                .data
                .iter()
                .find(|(node, _)| *node == id)
                .map(|(_, path)| path.clone());
            let data = elsewhere.unwrap_or_else(|| dir.path().join(format!("node-{id}")));
            let mut arguments = vec![
                "--address".to_owned(),
                address.clone(),
                "--data-dir".to_owned(),
                data.display().to_string(),
            ];
            if !setup.no_view {
                arguments.extend(["--view".to_owned(), view.clone()]);
            }
            arguments.extend(setup.arguments.iter().cloned());
            let log = dir.path().join(format!("node-{id}.log"));
            Node {
                address: address.clone(),
                data,
                log,
                command: "serve",
                arguments,
                environment: Vec::new(),
                wrapper: Vec::new(),
                child: None,
            }
        };
        let nodes = addresses.iter().enumerate().map(node).collect();
        Self {
            nodes,
            client: Client::default(),
            ports,
            dir,
            _ports: lock,
            _turn: turn,
        }
    }

    /// Starts one more node, which waits as a spare: its VIEW is that of the others. Its position
    /// in `nodes`.
    pub async fn add_spare(&mut self) -> usize {
        let view = self.addresses().join(",");
        let id = self.add_node(&["--view", &view]);
        self.wait_spare(id).await;
        id
    }

    /// Starts one more node, which is a cluster of its own.
    pub async fn add_stranger(&mut self) -> usize {
        let id = self.add_node(&[]);
        self.wait_node_ready(id).await;
        id
    }

    fn add_node(&mut self, arguments: &[&str]) -> usize {
        let id = self.nodes.len();
        assert!(
            id < usize::from(PORTS_PER_CLUSTER) - 2,
            "the last ports are for gateways"
        );
        let address = format!(
            "127.0.0.1:{}",
            self.ports.start + u16::try_from(id).expect("few nodes")
        );
        let data = self.dir.path().join(format!("node-{id}"));
        let path = data.display().to_string();
        let arguments = ["--address", &address, "--data-dir", &path]
            .iter()
            .chain(arguments)
            .map(|word| (*word).to_owned())
            .collect();
        let log = self.dir.path().join(format!("node-{id}.log"));
        let mut node = Node {
            address,
            data,
            log,
            command: "serve",
            arguments,
            environment: Vec::new(),
            wrapper: Vec::new(),
            child: None,
        };
        node.start();
        self.nodes.push(node);
        id
    }

    /// One more node that is not started yet, with these flags and this data: its position in
    /// `nodes`.
    pub fn prepare_node(&mut self, data: PathBuf, arguments: &[&str]) -> usize {
        let id = self.nodes.len();
        let address = format!(
            "127.0.0.1:{}",
            self.ports.start + u16::try_from(id).expect("few nodes")
        );
        let path = data.display().to_string();
        let arguments = ["--address", &address, "--data-dir", &path]
            .iter()
            .chain(arguments)
            .map(|word| (*word).to_owned())
            .collect();
        let log = self.dir.path().join(format!("node-{id}.log"));
        let (environment, wrapper) = (Vec::new(), Vec::new());
        self.nodes.push(Node {
            address,
            data,
            log,
            command: "serve",
            arguments,
            environment,
            wrapper,
            child: None,
        });
        id
    }

    /// One more node that is not started yet, at an address of the caller's choice: its position in
    /// `nodes`.
    pub fn prepare_node_at(&mut self, address: &str, arguments: &[&str]) -> usize {
        let data = self.dir.path().join(format!("node-{}", self.nodes.len()));
        let id = self.prepare_node(data, arguments);
        self.nodes[id].move_to(address);
        id
    }

    /// Waits until a node says that it is a spare.
    pub async fn wait_spare(&self, id: usize) {
        self.wait_for(id, "is a spare", is_spare).await;
    }

    /// Waits until a node is not ready for this reason.
    pub async fn wait_code(&self, id: usize, code: &str) {
        let code = format!(r#""code":"{code}""#);
        self.wait_for(id, &format!("says {code}"), |answer| {
            answer.status == 503 && answer.text().contains(&code)
        })
        .await;
    }

    /// Waits until a node is ready, or says that it is a spare.
    pub async fn wait_up(&self, id: usize) {
        self.wait_for(id, "is up", |answer| {
            answer.status == 200 || is_spare(answer)
        })
        .await;
    }

    async fn wait_for(&self, id: usize, what: &str, holds: impl Fn(&Answer) -> bool) {
        let address = &self.nodes[id].address;
        let mut last = String::new();
        let found = eventually(READY_LIMIT, async || {
            let answer = self
                .client
                .ask_only(
                    address,
                    &Request::get("/readyz").timeout(Duration::from_secs(2)),
                )
                .await;
            last = format!("{answer:?}");
            answer.is_ok_and(|answer| holds(&answer)).then_some(())
        });
        assert!(
            found.await.is_some(),
            "not after {READY_LIMIT:?}: node {id} ({address}) {what}; /readyz: {last}"
        );
    }

    /// A gateway to these members, not started yet: the `number`th of the cluster, for a port of
    /// its own.
    pub fn gateway(&self, number: u16, members: &[&str]) -> Node {
        let address = format!("127.0.0.1:{}", self.ports.end - 1 - number);
        let arguments = ["--listen", &address]
            .iter()
            .chain(members)
            .map(|word| (*word).to_owned())
            .collect();
        let log = self.dir.path().join(format!("gateway-{number}.log"));
        Node {
            address,
            data: PathBuf::new(),
            log,
            command: "gateway",
            arguments,
            environment: Vec::new(),
            wrapper: Vec::new(),
            child: None,
        }
    }

    /// The first of the ports that are this cluster's alone.
    pub fn first_port(&self) -> u16 {
        self.ports.start
    }

    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.address.clone()).collect()
    }

    /// Waits until every node that runs is ready: each group that it hosts has a leader and is
    /// caught up.
    pub async fn wait_ready(&mut self) {
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        self.wait_ready_of(&all).await;
    }

    /// Waits until those of these nodes that run are ready.
    pub async fn wait_ready_of(&mut self, ids: &[usize]) {
        for id in ids.iter().copied() {
            if self.nodes[id].child.is_some() {
                self.wait_node_ready(id).await;
            }
        }
    }

    pub async fn wait_node_ready(&mut self, id: usize) {
        let Self { nodes, client, .. } = self;
        let node = &mut nodes[id];
        let mut last = String::new();
        let ready = eventually(READY_LIMIT, async || {
            if let Some(status) = node.exited() {
                panic!(
                    "node {id} ({}) ended while it was waited for: {status}\n{}",
                    node.address,
                    node.log_tail()
                );
            }
            let answer = client
                .ask_only(
                    &node.address,
                    &Request::get("/readyz").timeout(Duration::from_secs(2)),
                )
                .await;
            last = format!("{answer:?}");
            answer
                .is_ok_and(|answer| answer.status == 200)
                .then_some(())
        });
        if ready.await.is_none() {
            panic!(
                "node {id} ({}) is not ready after {READY_LIMIT:?}; /readyz: {last}",
                self.nodes[id].address
            );
        }
    }

    /// What a node that runs tells of the cluster.
    pub async fn status(&self) -> Status {
        let answered = eventually(READY_LIMIT, async || {
            for node in self.nodes.iter().filter(|node| node.child.is_some()) {
                let request = Request::get("/v1/cluster").timeout(Duration::from_secs(2));
                if let Ok(answer) = self.client.ask(&node.address, &request).await
                    && answer.status == 200
                {
                    let parsed = serde_json::from_slice(&answer.body);
                    return Some(parsed.unwrap_or_else(|error| {
                        panic!("GET /v1/cluster: {error}: {}", answer.text())
                    }));
                }
            }
            None
        });
        answered.await.expect("no node answers GET /v1/cluster")
    }

    /// Waits until a node has written a snapshot file.
    pub async fn wait_for_snapshot(&self, id: usize) {
        let snapshots = self.nodes[id].data.join("snapshots");
        let is_snapshot = |path: &PathBuf| {
            path.extension()
                .is_some_and(|extension| extension == "snap")
        };
        let found = eventually(READY_LIMIT, async || {
            files(&snapshots).iter().any(is_snapshot).then_some(())
        })
        .await;
        found.unwrap_or_else(|| panic!("node {id} has written no snapshot"));
    }

    /// Waits until a node has purged the beginning of a log. A leader does so only between attempts
    /// to reach a follower that needs it.
    pub async fn wait_for_purge(&self, id: usize) {
        let purged =
            async || (self.metric(id, "quorate_group_purged_index").await > 0.0).then_some(());
        eventually(READY_LIMIT, purged)
            .await
            .unwrap_or_else(|| panic!("node {id} has purged nothing"));
    }

    /// A metric without labels, or the sum over its labels.
    pub async fn metric(&self, id: usize, name: &str) -> f64 {
        let answer = self
            .client
            .ask_only(&self.nodes[id].address, &Request::get("/metrics"))
            .await
            .expect("the metrics");
        let text = answer.text();
        let of_name = |line: &&str| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with([' ', '{']))
        };
        let values = text
            .lines()
            .filter(of_name)
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        values.sum()
    }

    /// The position in `nodes` of the leader of the shard at this position of the status, once all
    /// that run agree that it leads.
    pub async fn leader(&self, shard: usize) -> usize {
        let found = eventually(READY_LIMIT, async || {
            let status = self.status().await;
            let leader = status.shards[shard].leader?;
            let address = &status.nodes.iter().find(|node| node.id == leader)?.address;
            let id = self
                .nodes
                .iter()
                .position(|node| node.address == *address)?;
            self.nodes[id].child.is_some().then_some(id)
        });
        found
            .await
            .unwrap_or_else(|| panic!("shard {shard} has no living leader after {READY_LIMIT:?}"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.kill();
        }
        if std::thread::panicking() {
            for (id, node) in self.nodes.iter().enumerate() {
                say(&format!(
                    "node {id} ({}), the end of {}:\n{}",
                    node.address,
                    node.log.display(),
                    node.log_tail()
                ));
            }
            self.dir.disable_cleanup(true);
            say(&format!(
                "directories kept in {}",
                self.dir.path().display()
            ));
        }
    }
}

impl Node {
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.address);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .expect("the log of a node");
        let mut words = self
            .wrapper
            .iter()
            .cloned()
            .chain([binary(), self.command.to_owned()])
            .chain(self.arguments.iter().cloned());
        let mut command = Command::new(words.next().expect("the binary at least"));
        // What the tests were started with must not configure the nodes.
        for name in [
            "ADDRESS",
            "PUBLIC_ADDRESS",
            "VIEW",
            "REPL_FACTOR",
            "LOST_DISK_AFTER",
            "JOIN_ONLY",
            "QUORATE_SERVERS",
            "QUORATE_CLUSTER_DIR",
        ] {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
            .args(words)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log);
        self.child = Some(
            command
                .spawn()
                .unwrap_or_else(|error| panic!("{command:?}: {error}")),
        );
    }

    /// Gives a flag another value for the next start, or gives it in the first place.
    pub fn set_flag(&mut self, flag: &str, value: &str) {
        match self.arguments.iter().position(|argument| argument == flag) {
            Some(at) => value.clone_into(&mut self.arguments[at + 1]),
            None => self.arguments.extend([flag.to_owned(), value.to_owned()]),
        }
    }

    /// Moves it to another address for the next start.
    pub fn move_to(&mut self, address: &str) {
        address.clone_into(&mut self.address);
        self.set_flag("--address", address);
    }

    /// Sets a variable for the next starts.
    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    fn signal(&self, signal: Signal) {
        let child = self
            .child
            .as_ref()
            .unwrap_or_else(|| panic!("{} does not run", self.address));
        // A child that has ended and was not waited for still has its id: the signal reaches nobody
        // else.
        kill_process(Pid::from_child(child), signal).expect("a signal to a child");
    }

    /// kill -9, and waits until it is gone. Fine if it does not run.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Asks it to stop and waits for its end.
    pub async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.end(Duration::from_secs(60)).await
    }

    /// Starts it again, after asking it to stop if it still runs.
    pub async fn restart(&mut self) {
        if self.exited().is_none() {
            self.stop().await;
        }
        self.child = None;
        self.start();
    }

    /// Waits until it ends by itself.
    pub async fn end(&mut self, limit: Duration) -> ExitStatus {
        let status = eventually(limit, async || self.exited()).await;
        let status = status.unwrap_or_else(|| {
            panic!(
                "{} has not ended after {limit:?}:\n{}",
                self.address,
                self.log_tail()
            )
        });
        self.child = None;
        status
    }

    /// How it ended, if it did.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child
            .as_mut()?
            .try_wait()
            .expect("to wait for a child")
    }

    /// Returns false of a node that was never started, was killed, or has ended by itself.
    pub fn is_running(&mut self) -> bool {
        self.child.is_some() && self.exited().is_none()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running node").id()
    }

    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn log_tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

fn is_spare(answer: &Answer) -> bool {
    answer.status == 503 && answer.text().contains(r#""code":"spare""#)
}

/// Runs `quorate cluster` with these words, told of these nodes: its exit code and what it printed.
pub async fn operate(servers: &[String], words: &[&str]) -> (i32, String) {
    let mut command = tokio::process::Command::new(binary());
    command
        .args(["cluster", "--server", &servers.join(",")])
        .args(words)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = command
        .output()
        .await
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A block of ports that nobody listens on and no other test process takes while the file is
/// locked.
fn take_ports() -> (Range<u16>, File) {
    let locks = std::env::temp_dir().join("quorate-test-ports");
    fs::create_dir_all(&locks).expect("a directory for port locks");
    let blocks = (PORTS.end - PORTS.start) / PORTS_PER_CLUSTER;
    let first = rand::random_range(0..blocks);
    for block in (0..blocks).map(|offset| (first + offset) % blocks) {
        let start = PORTS.start + block * PORTS_PER_CLUSTER;
        let file = File::create(locks.join(start.to_string())).expect("a port lock");
        let ports = start..start + PORTS_PER_CLUSTER;
        if file.try_lock().is_ok()
            && ports
                .clone()
                .all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        {
            return (ports, file);
        }
    }
    panic!("no free block of {PORTS_PER_CLUSTER} ports in {PORTS:?}");
}

/// What the tests look at in the answer of `GET /v1/cluster`.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    pub epoch: u64,
    pub version: u64,
    pub meta_leader: Option<u64>,
    pub settled: bool,
    pub nodes: Vec<StatusNode>,
    pub shards: Vec<StatusShard>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct StatusNode {
    pub id: u64,
    pub address: String,
}

#[derive(Debug, Clone, Deserialize)]
pub struct StatusReplica {
    pub node: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct StatusShard {
    pub slots: u64,
    pub replicas: Vec<StatusReplica>,
    pub leader: Option<u64>,
    pub keys: Option<u64>,
}
