//! The harness: [`TestNode`]s that can be killed and started again from their disks, and what tests
//! say to their groups.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::stalling_disk::StallingDisk;
use crate::raft::election::leases::LeaseTimings;
use crate::raft::transport::lanes::memory::MemoryHub;
use crate::raft::transport::{Dial, NodeIdentity, Resolver};
use crate::raft::{
    ProposeError, RaftBudgets, RaftTimings, ReadError, Registry, RegistryParts, Replica,
    WitnessReplica,
};
use crate::sm::kv::{
    self, Action, Condition, Media, Operation, OperationOutcome, Write, WriteOutcome,
};
use crate::storage::ReplicaKey;
use crate::storage::log::{Log, LogOptions};
use crate::storage::map::{MapOptions, MapStore};
use crate::storage::mem_trees::MemTrees;
use crate::supervisor::Supervisor;
use crate::types::{ClusterId, DirectoryId, GroupId, NodeId, ReplicaId, Slot};

pub const CLUSTER: ClusterId = ClusterId(7);

/// That of the default timings.
pub const PACE: LeaseTimings = LeaseTimings {
    lease_drift_ms: None,
    election_ms_max: 420,
};

pub fn key(group: u64, replica: u64) -> ReplicaKey {
    ReplicaKey {
        group: GroupId(group),
        replica: ReplicaId(replica),
    }
}

pub fn directory(node: NodeId) -> DirectoryId {
    DirectoryId(u128::from(node.0) + 1000)
}

/// Long enough for a loaded machine; only a failing test waits for it.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// What survives a node's process.
#[derive(Clone)]
pub struct Disks {
    pub disk: StallingDisk,
    pub trees: MemTrees,
    /// Of each room of the node.
    pub room_bytes: usize,
}

impl Disks {
    pub fn new(seed: u64) -> Self {
        Self {
            disk: StallingDisk::new(seed),
            trees: MemTrees::new(),
            room_bytes: 128 << 20,
        }
    }
}

pub struct TestNode {
    pub registry: Arc<Registry>,
    pub log: Log,
    pub states: Arc<MapStore>,
    threads: Vec<JoinHandle<()>>,
}

impl TestNode {
    pub fn start(
        node: NodeId,
        disks: &Disks,
        resolver: Arc<dyn Resolver>,
        dial: Arc<dyn Dial>,
        timings: RaftTimings,
    ) -> Self {
        let disk = Arc::new(disks.disk.clone());
        let options = LogOptions {
            segment_bytes: 64 << 10,
            grow_bytes: 16 << 10,
            ..LogOptions::default()
        };
        let (log, writer) = Log::open(disk.clone(), Path::new("/log"), options).expect("a log");
        let trees = Arc::new(disks.trees.clone());
        let (states, checkpointer) =
            MapStore::open(trees, disk, Path::new("/"), MapOptions::default()).expect("maps");
        let threads = vec![
            std::thread::spawn(move || writer.run()),
            std::thread::spawn(move || checkpointer.run()),
        ];
        let identity = Arc::new(NodeIdentity::member(directory(node), CLUSTER, node));
        let states = Arc::new(states);
        let parts = RegistryParts {
            identity,
            resolver,
            dial,
            timings,
            log: log.clone(),
            states: states.clone(),
            budgets: RaftBudgets::new(disks.room_bytes),
            supervisor: Supervisor::noting().0,
        };
        Self {
            registry: Registry::new(parts),
            log,
            states,
            threads,
        }
    }

    /// Stops it as a kill would as far as others can see; what was written stays written. No handle
    /// of its registry may be left.
    pub async fn stop(self) {
        self.registry.shutdown().await;
        self.log.close();
        drop((self.registry, self.log, self.states));
        let threads = self.threads;
        tokio::task::spawn_blocking(move || {
            threads
                .into_iter()
                .for_each(|thread| thread.join().expect("it ended well"))
        })
        .await
        .expect("joined");
    }
}

impl TestNode {
    /// The clean stop, whoever still holds its registry.
    pub async fn close(self) {
        self.registry.shutdown().await;
        let (states, log, threads) = (self.states, self.log, self.threads);
        let close = move || {
            states.close().expect("a clean stop");
            log.close();
            threads
                .into_iter()
                .for_each(|thread| thread.join().expect("it ended well"));
        };
        tokio::task::spawn_blocking(close).await.expect("closed");
    }
}

/// Nodes 1 to n over lanes in memory; replica r of each group is on node r.
pub struct TestCluster {
    pub hub: Arc<MemoryHub>,
    pub nodes: BTreeMap<NodeId, TestNode>,
    pub disks: BTreeMap<NodeId, Disks>,
    pub timings: RaftTimings,
}

impl TestCluster {
    pub fn new(nodes: u64) -> Self {
        Self::with_timings(nodes, RaftTimings::default())
    }

    pub fn with_timings(nodes: u64, timings: RaftTimings) -> Self {
        Self::with_disks(
            (1..=nodes).map(|id| (NodeId(id), Disks::new(id))).collect(),
            timings,
        )
    }

    /// Returns a cluster of nodes of whose budgets each has so many bytes.
    pub fn with_rooms<const NODES: usize>(
        room_bytes: [usize; NODES],
        timings: RaftTimings,
    ) -> Self {
        let disks = |(id, room_bytes)| {
            (
                NodeId(id),
                Disks {
                    room_bytes,
                    ..Disks::new(id)
                },
            )
        };
        Self::with_disks((1..).zip(room_bytes).map(disks).collect(), timings)
    }

    fn with_disks(disks: BTreeMap<NodeId, Disks>, timings: RaftTimings) -> Self {
        let ids: Vec<NodeId> = disks.keys().copied().collect();
        let mut cluster = Self {
            hub: MemoryHub::new(),
            nodes: BTreeMap::new(),
            disks,
            timings,
        };
        for id in ids {
            cluster.start(id);
        }
        cluster
    }

    /// Starts a node on its disks. Its replicas are not open yet.
    pub fn start(&mut self, id: NodeId) {
        let node = TestNode::start(
            id,
            &self.disks[&id],
            self.hub.clone(),
            self.hub.dial_from(id),
            self.timings.clone(),
        );
        self.hub.add(id, node.registry.clone());
        self.nodes.insert(id, node);
    }

    pub async fn restart(&mut self, id: NodeId) {
        self.start(id);
        let failed = self.nodes[&id].registry.open_all().await;
        assert!(failed.is_empty(), "{failed:?}");
    }

    pub async fn stop(&mut self, id: NodeId) {
        self.hub.remove(id);
        self.nodes.remove(&id).expect("it runs").stop().await;
    }

    pub async fn stop_all(mut self) {
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.stop(id).await;
        }
    }

    /// Opens replica r of `group` on every node r, and begins the group.
    pub async fn found(&self, group: u64) {
        for (id, node) in &self.nodes {
            node.registry
                .open_replica(key(group, id.0), true)
                .await
                .expect("a replica");
        }
        let voters: BTreeMap<ReplicaId, NodeId> =
            self.nodes.keys().map(|id| (ReplicaId(id.0), *id)).collect();
        // Spread over the nodes: whoever begins usually leads.
        let first = 1 + group % self.nodes.len() as u64;
        self.group(first, group)
            .initialize(&voters)
            .await
            .expect("a new group");
        self.claim_all(group).await;
    }

    /// Begins `group` with replicas 1 and 2, and replica 3 on node 3 as their witness.
    pub async fn found_with_witness(&self, group: u64) {
        let voters: BTreeMap<ReplicaId, NodeId> =
            (1..=2).map(|id| (ReplicaId(id), NodeId(id))).collect();
        for node in voters.values() {
            self.nodes[node]
                .registry
                .open_replica(key(group, node.0), true)
                .await
                .expect("a replica");
        }
        self.group(1, group)
            .initialize(&voters)
            .await
            .expect("a new group");
        self.claim_all(group).await;
        self.nodes[&NodeId(3)]
            .registry
            .open_witness(key(group, 3), true)
            .await
            .expect("a witness");
        self.join_witness(group, 3).await;
    }

    /// Has replica r on node r, which is open, become the witness of the group of replicas 1 and 2.
    pub async fn join_witness(&self, group: u64, witness: u64) {
        let leader = self.group(self.leader(group).await.0, group);
        leader
            .add_witness(ReplicaId(witness), NodeId(witness))
            .await
            .expect("a learner");
        until("the witness catches up", || {
            leader.is_caught_up(ReplicaId(witness))
        })
        .await;
        leader
            .change_voters([1, 2, witness].map(ReplicaId).into())
            .await
            .expect("a voter");
    }

    pub fn witness(&self, group: u64) -> WitnessReplica {
        self.nodes[&NodeId(3)]
            .registry
            .witness(GroupId(group))
            .expect("an open witness")
    }

    async fn claim_all(&self, group: u64) {
        let claim = kv::KvCommand::Claim {
            slots: Slot::all().collect(),
        };
        let leader = self.leader(group).await;
        match self
            .group(leader.0, group)
            .propose_command(claim, soon())
            .await
        {
            Ok(kv::KvOutcome::Claimed) => {}
            other => panic!("the slots were not claimed: {other:?}"),
        }
    }

    pub fn group(&self, node: u64, group: u64) -> Arc<Replica> {
        self.nodes[&NodeId(node)]
            .registry
            .get(GroupId(group))
            .expect("an open replica")
    }

    /// Waits until a running node leads, confirmed by a quorum.
    pub async fn leader(&self, group: u64) -> NodeId {
        let deadline = soon();
        loop {
            for (id, node) in &self.nodes {
                let group = node
                    .registry
                    .get(GroupId(group))
                    .filter(|group| group.leads());
                if let Some(group) = group
                    && group
                        .read_barrier(Instant::now() + Duration::from_secs(1))
                        .await
                        .is_ok()
                {
                    return *id;
                }
            }
            assert!(Instant::now() < deadline, "group {group} has no leader");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Writes by way of whoever leads, trying again after each certain no.
    pub async fn put(&self, group: u64, key: &str, value: &str) {
        let deadline = soon();
        loop {
            let leader = self.leader(group).await;
            match self
                .group(leader.0, group)
                .propose(put(key, value), deadline)
                .await
            {
                Ok(outcome) => return assert_put(&outcome),
                Err(ProposeError::NotLeader { .. }) => {}
                // Until others are done with: certainly not done, so a client would try again too.
                Err(ProposeError::Overloaded { .. } | ProposeError::NoRoom { .. })
                    if Instant::now() < deadline =>
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => panic!("the put of {key} failed: {error}"),
            }
        }
    }

    /// Reads linearizably from whoever leads.
    pub async fn get(&self, group: u64, key: &str) -> Option<String> {
        let deadline = soon();
        loop {
            let leader = self.leader(group).await;
            let group = self.group(leader.0, group);
            match group.read_barrier(deadline).await {
                Ok(()) => return read(&group, key),
                Err(ReadError::NotLeader { .. }) => {}
                Err(error) => panic!("the read of {key} failed: {error}"),
            }
        }
    }
}

pub fn put(key: &str, value: &str) -> Write {
    let action = Action::Put {
        media: Media::Text,
        value: Bytes::copy_from_slice(value.as_bytes()),
    };
    let operation = Operation {
        key: Bytes::copy_from_slice(key.as_bytes()),
        condition: Condition::None,
        action,
    };
    Write {
        operations: vec![operation],
        idempotency_key: None,
    }
}

pub fn assert_put(outcome: &WriteOutcome) {
    match outcome {
        WriteOutcome::Applied(outcomes)
            if matches!(outcomes[..], [OperationOutcome::Put { .. }]) => {}
        other => panic!("not a put: {other:?}"),
    }
}

/// What a replica's map holds now.
pub fn read(group: &Replica, key: &str) -> Option<String> {
    match kv::read(&group.state().read(), key.as_bytes()).expect("a readable map") {
        kv::ReadOutcome::Owned(record) => {
            record.map(|record| String::from_utf8(record.value.to_vec()).expect("text"))
        }
        // A follower may not have applied the claim yet.
        kv::ReadOutcome::NotOwned { .. } => None,
    }
}

/// Waits until `holds` does, failing after a while.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = soon();
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
