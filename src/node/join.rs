//! Performs what [`bootstrap`](super::bootstrap) decides: asks the nodes of the `VIEW`, promises,
//! founds, adopts, or waits as a spare.
//!
//! [`Joining`] also answers the questions of others while this node itself still waits. The stamp
//! is durable before anything is said or done that rests on it.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::bootstrap::{self, BootstrapStep, OwnFacts, PeerAnswer, WaitReason};
use super::platform::Platform;
use crate::api::peer::{
    FailedReplica, HostedReplica, Hosting, Identity, PromiseReply, PromiseRequest,
};
use crate::blocking;
use crate::config::NodeConfig;
use crate::raft::transport::lanes::{DirectoryRejection, PeerDirectories};
use crate::routing::peer_caller::PeerCaller;
use crate::sm::cluster::view::{self, View};
use crate::sm::level::TooOld;
use crate::sm::placement::{PlacementError, first_view};
use crate::storage::directory::{DataDirectory, DirectoryError, Stamp};
use crate::supervisor::Supervisor;
use crate::telemetry::rarely;
use crate::types::{Address, ClusterId, DirectoryId, NodeId, StartId};

/// Time that one node has to say who it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two rounds of asking, while something may change soon and there are few to ask.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// As many as that. Nodes of a larger `VIEW` ask less often, or a hundred on one machine would do
/// nothing but answer each other. The founder is but one, and all wait for it.
const FEW_NODES: usize = 10;
const FEW_NODES_OF_FOUNDER: usize = 50;
/// Between two rounds of asking, for a spare: it may wait for days.
const SPARE_INTERVAL: Duration = Duration::from_secs(1);
/// Members that a node which waits is told of at once.
const INVITERS_MAX: usize = 16;
/// Processes with a copy of this directory that are told of.
const DOUBLES_MAX: usize = 64;
/// Interval at which the log repeats what this node waits for.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// A reason why a node can't become part of a cluster, whatever it waits for.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    TooOld(#[from] TooOld),
    #[error("the cluster can't be founded as asked: {0}")]
    Placement(#[from] PlacementError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
}

/// The cluster that a node belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    pub node: NodeId,
    /// The newest view that this node's own disk, or the node it adopted from, knows.
    pub view: Box<View>,
}

/// A node's standing, before and after it joined.
pub struct Joining {
    config: NodeConfig,
    view_set: Vec<Address>,
    directory_id: DirectoryId,
    platform: Arc<dyn Platform>,
    supervisor: Supervisor,
    directory: DataDirectory,
    caller: PeerCaller,
    waiting: watch::Sender<Option<WaitReason>>,
    /// Members that have called this node while it waits.
    invited: Mutex<Vec<Address>>,
    called: Notify,
    /// Rounds in which everyone was asked.
    rounds: AtomicUsize,
    /// Since this node began to start as a member.
    peer_directories: OnceLock<Arc<PeerDirectories>>,
    /// Processes that ran with a copy of this directory, which were told of.
    doubles: Mutex<BTreeSet<Address>>,
}

impl Joining {
    pub fn new(
        config: NodeConfig,
        platform: Arc<dyn Platform>,
        directory: DataDirectory,
        caller: PeerCaller,
    ) -> Self {
        let view_set = config.view_set();
        let directory_id = directory.id();
        let supervisor = platform.supervisor();
        Self {
            config,
            view_set,
            directory_id,
            platform,
            supervisor,
            directory,
            caller,
            waiting: watch::Sender::new(None),
            invited: Mutex::default(),
            called: Notify::new(),
            rounds: AtomicUsize::new(0),
            peer_directories: OnceLock::new(),
            doubles: Mutex::default(),
        }
    }

    pub fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    pub fn directory_id(&self) -> DirectoryId {
        self.directory_id
    }

    /// Returns the data directory, as an absolute path.
    pub fn directory_path(&self) -> &std::path::Path {
        self.directory.path()
    }

    pub fn platform(&self) -> &Arc<dyn Platform> {
        &self.platform
    }

    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    /// Returns what this directory knows of the cluster that it is in.
    pub fn stamp(&self) -> Stamp {
        self.directory.stamp()
    }

    /// Returns the `VIEW` as a set.
    pub fn view_set(&self) -> &[Address] {
        &self.view_set
    }

    pub fn caller(&self) -> &PeerCaller {
        &self.caller
    }

    /// Returns what this node knows of starts, its own among them; none before it begins to start
    /// as a member.
    pub fn peer_directories(&self) -> Option<&Arc<PeerDirectories>> {
        self.peer_directories.get()
    }

    /// Begins another start of this directory's node, once. Blocks on the disk: it is durable when
    /// it returns.
    ///
    /// # Errors
    ///
    /// When that can't be written: the node may say nothing then.
    pub fn begin_start(&self, id: StartId) -> Result<(), DirectoryError> {
        if self.peer_directories.get().is_none() {
            let book = self.directory.begin_start(id)?;
            self.peer_directories
                .get_or_init(|| PeerDirectories::new(book));
        }
        Ok(())
    }

    /// Resolves when this directory turns out to be none to go on with.
    pub fn rejection(&self) -> impl Future<Output = DirectoryRejection> + use<> {
        let rejection = self
            .peer_directories
            .get()
            .map(|peer_directories| peer_directories.rejection());
        async move {
            match rejection {
                Some(rejection) => rejection.await,
                None => std::future::pending().await,
            }
        }
    }

    /// Says on disk that this directory is an old copy. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// When that can't be written.
    pub fn mark_outdated(&self, reason: &str) -> Result<(), DirectoryError> {
        self.directory.mark_outdated(reason)
    }

    /// Returns whether anything was put aside of old copies.
    pub fn has_aside(&self) -> bool {
        self.directory.has_aside()
    }

    /// Deletes what was put aside of directories that this view has no more. Blocks on the disk.
    pub fn clear_aside(&self, view: &View) {
        self.directory.clear_aside(view);
    }

    /// Returns the cluster and node that this directory is of, with the view as it knows it; None
    /// if it is of none.
    pub fn membership(&self) -> Option<(ClusterId, NodeId, Box<View>)> {
        match self.directory.stamp() {
            Stamp::Member {
                cluster,
                node,
                view,
                ..
            } => Some((cluster, node, view)),
            Stamp::Founding { .. }
            | Stamp::Fresh
            | Stamp::Promised { .. }
            | Stamp::Retired { .. } => None,
        }
    }

    /// Tells of a process that runs with a copy of this directory, once for each address.
    pub fn tell_double(&self, address: &Address) {
        let mut doubles = self.doubles.lock();
        if doubles.len() < DOUBLES_MAX && doubles.insert(address.clone()) {
            tracing::warn!(
                "a process at {address} was started with a copy of this data directory: it is \
                refused"
            );
        }
    }

    /// Returns what this node waits for; None before it has asked, and once it has joined.
    pub fn waiting(&self) -> Option<WaitReason> {
        self.waiting.borrow().clone()
    }

    /// Says who this node is.
    pub fn identity(&self) -> Identity {
        self.identity_of(&self.directory.stamp())
    }

    fn identity_of(&self, stamp: &Stamp) -> Identity {
        Identity {
            speaks: self.config.speaks(),
            level: stamp.level(),
            start: self
                .peer_directories()
                .map(|peer_directories| peer_directories.own().running()),
            holds_level: self.holds_level(stamp),
            directory: self.directory_id,
            address: self.config.address.clone(),
            public_address: self.config.public_address.clone(),
            standing: bootstrap::standing(self.own(stamp)),
        }
    }

    /// Says what this node hosts.
    pub fn hosting(
        &self,
        replicas: Vec<HostedReplica>,
        failed: Vec<FailedReplica>,
        lacks_room: bool,
    ) -> Hosting {
        let (speaks, holds_level) = (self.config.speaks(), self.is_level_held());
        Hosting {
            directory: self.directory_id,
            replicas,
            failed,
            speaks,
            holds_level,
            lacks_room,
            is_stopping: false,
        }
    }

    /// Returns whether this node holds the level of the cluster that it is a member of.
    pub fn is_level_held(&self) -> bool {
        self.holds_level(&self.directory.stamp())
    }

    fn holds_level(&self, stamp: &Stamp) -> bool {
        match stamp {
            Stamp::Member { cluster, .. } => self.directory.holds_level(*cluster),
            Stamp::Fresh
            | Stamp::Promised { .. }
            | Stamp::Founding { .. }
            | Stamp::Retired { .. } => false,
        }
    }

    /// Holds the level of the cluster where it is, or does so no more. Blocks on the disk: it is
    /// durable when it returns.
    ///
    /// # Errors
    ///
    /// When that can't be written.
    pub fn hold_level(&self, cluster: ClusterId, hold: bool) -> Result<(), DirectoryError> {
        self.directory.hold_level(cluster, hold)
    }

    /// Answers a node that wants to found. Blocks on the disk: the promise is durable when it is
    /// given.
    pub fn promise(&self, request: &PromiseRequest) -> PromiseReply {
        let mut refusal = None;

        // Decided and written under one lock: two founders must not both get a promise.
        let stamped = self.directory.update_stamp(|stamp| {
            bootstrap::answer_promise(self.own(stamp), request).unwrap_or_else(|reason| {
                refusal = Some(reason);
                None
            })
        });
        match (refusal, stamped) {
            (None, Ok(stamp)) => PromiseReply::Promised {
                identity: self.identity_of(&stamp),
            },
            (None, Err(error)) => PromiseReply::Refused {
                reason: format!("{} can't write its promise: {error}", self.config.address),
            },
            (Some(reason), _) => {
                rarely!(
                    warn,
                    "refused to promise {}: {reason}",
                    request.founder_address
                );
                PromiseReply::Refused { reason }
            }
        }
    }

    /// Records on disk that this node is `node` of the cluster with this view. Call it whenever the
    /// view has changed.
    ///
    /// # Errors
    ///
    /// When the stamp can't be written: the node may not go on as a member.
    pub fn stamp_member(&self, node: NodeId, view: &View) -> Result<(), DirectoryError> {
        let meta_replica = view
            .runs_on(crate::types::GroupId::META, node)
            .unwrap_or_default();
        let stamp = Stamp::Member {
            cluster: view.cluster,
            node,
            meta_replica,
            view: Box::new(view.clone()),
        };
        self.directory.set_stamp(stamp)
    }

    /// Records on disk that this node is none of its cluster's any more, and where that is.
    ///
    /// # Errors
    ///
    /// When the stamp can't be written: the node is still a member then.
    pub fn stamp_retired(&self, node: NodeId, view: &View) -> Result<(), DirectoryError> {
        let members = view
            .staying()
            .map(|(_, node)| node.address.clone())
            .collect();
        self.directory.set_stamp(Stamp::Retired {
            cluster: view.cluster,
            node,
            members,
        })
    }

    /// Notes that members of a cluster have called: they are asked too from now on. What they say
    /// counts, not who calls.
    pub fn invited(&self, members: Vec<Address>) {
        let mut invited = self.invited.lock();
        invited.clear();
        invited.extend(members.into_iter().take(INVITERS_MAX));
        drop(invited);
        self.called.notify_one();
    }

    /// Returns true if this directory was a member when it was opened, or has become one: its log
    /// must hold its meta replica.
    pub fn is_stamped_member(&self) -> bool {
        matches!(self.directory.stamp(), Stamp::Member { .. })
    }

    /// Waits until this node belongs to a cluster. Returns None if `shutdown` came first.
    ///
    /// # Errors
    ///
    /// What no waiting mends.
    pub async fn join(
        self: &Arc<Self>,
        shutdown: &CancellationToken,
    ) -> Result<Option<Joined>, JoinError> {
        let mut last_logged: Option<(WaitReason, Instant)> = None;
        if let Some(warning) = bootstrap::unnamed(self.own(&self.directory.stamp())) {
            tracing::warn!("{warning}");
        }
        loop {
            // What has data starts from it, so that nobody need answer.
            let belongs = matches!(
                self.directory.stamp(),
                Stamp::Member { .. } | Stamp::Founding { .. }
            );
            let answers = if belongs {
                BTreeMap::new()
            } else {
                self.ask_everyone().await
            };

            let step = bootstrap::next_step(self.own(&self.directory.stamp()), &answers);
            let waiting = match step {
                BootstrapStep::Start => return Ok(Some(self.as_stamped())),
                BootstrapStep::Adopt { view, node } => {
                    // To run as a node whose directory is another would double that node.
                    let adopted = view.nodes.get(&node).map(|node| node.directory);
                    assert_eq!(adopted, Some(self.directory_id), "node {node} is adopted");
                    self.waiting.send_replace(None);
                    return Ok(Some(Joined { node, view }));
                }
                BootstrapStep::AskPromises => match self.found().await? {
                    Ok(joined) => {
                        self.waiting.send_replace(None);
                        return Ok(Some(joined));
                    }
                    Err(refused) => WaitReason::ForNodes(refused),
                },
                BootstrapStep::Refuse(refusal) => return Err(refusal.into()),
                BootstrapStep::Wait(waiting) => waiting,
            };

            // Who waits for hours should read why, but not with every round.
            if last_logged
                .as_ref()
                .is_none_or(|(last, at)| *last != waiting || at.elapsed() >= TELL_INTERVAL)
            {
                match &waiting {
                    WaitReason::Mismatch(_) => tracing::warn!("{waiting}"),
                    waiting => tracing::info!("{waiting}"),
                }
                last_logged = Some((waiting.clone(), Instant::now()));
            }

            let interval = if waiting.is_spare() {
                SPARE_INTERVAL
            } else {
                self.ask_interval()
            };
            self.waiting.send_replace(Some(waiting));
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(None),
                () = self.called.notified() => {}
                () = tokio::time::sleep(interval) => {}
            }
        }
    }

    fn ask_interval(&self) -> Duration {
        let founds = self.view_set.first() == Some(&self.config.address);
        ask_interval(self.view_set.len(), founds)
    }

    fn as_stamped(&self) -> Joined {
        match self.directory.stamp() {
            Stamp::Member { node, view, .. } => Joined { node, view },
            // Founded, and ended before it could stamp itself a member: it goes on from there.
            Stamp::Founding { view } => {
                let node = view
                    .nodes
                    .iter()
                    .find(|(_, node)| node.directory == self.directory_id)
                    .map(|(id, _)| *id);
                Joined {
                    node: node.unwrap_or_default(),
                    view,
                }
            }
            Stamp::Fresh | Stamp::Promised { .. } | Stamp::Retired { .. } => {
                unreachable!("only a member starts from its stamp")
            }
        }
    }

    async fn ask_everyone(&self) -> BTreeMap<Address, PeerAnswer> {
        // The VIEW of a spare may be an old one: the members that it knows are asked too.
        let members = self
            .waiting()
            .map(|waiting| waiting.members().to_vec())
            .unwrap_or_default();
        let mut asked: Vec<Address> = self.view_set.iter().chain(&members).cloned().collect();
        asked.extend(self.invited.lock().iter().cloned());
        asked.sort();
        asked.dedup();
        asked.retain(|address| *address != self.config.address);
        // Few are asked at a time: those that do not answer must not have the first turns for ever.
        let turn = self.rounds.fetch_add(1, Ordering::Relaxed);
        if let Some(by) = turn.checked_rem(asked.len()) {
            asked.rotate_left(by);
        }
        let answers = asked.into_iter().map(|address| async move {
            let answers = match self.caller.identity(&address, ASK_TIMEOUT).await {
                Ok(identity) => PeerAnswer::Identity(identity),
                Err(error) => PeerAnswer::Silent {
                    reason: short_reason(&error),
                },
            };
            (address, answers)
        });
        join_all(answers).await.into_iter().collect()
    }

    /// Asks every node for its promise; with all of them, stamps the first view. The inner error:
    /// who refused, and why.
    async fn found(self: &Arc<Self>) -> Result<Result<Joined, Vec<(Address, String)>>, JoinError> {
        let request = PromiseRequest {
            view: self.view_set.clone(),
            founder: self.directory_id,
            founder_address: self.config.address.clone(),
        };
        let promises = self
            .view_set
            .iter()
            .map(|address| self.ask_promise(address, &request));

        // The level of the cluster is what the oldest of its programs knows.
        let mut nodes = Vec::new();
        let mut level = self.config.speaks();
        let mut refused = Vec::new();
        for (address, reply) in self.view_set.iter().zip(join_all(promises).await) {
            match reply {
                Ok(identity) => {
                    level = level.min(identity.speaks);
                    nodes.push(view::NodeSpec {
                        address: address.clone(),
                        public_address: identity.public_address,
                        directory: identity.directory,
                    });
                }
                Err(reason) => refused.push((address.clone(), reason)),
            }
        }

        // Without one promise another may found: nothing is begun.
        if !refused.is_empty() {
            return Ok(Err(refused));
        }
        let cluster = ClusterId(rand::random());
        let view = Box::new(View {
            level,
            ..first_view(cluster, self.config.asked, nodes)?
        });

        // Durable before anybody hears of the cluster.
        let node = view.node_at(&self.config.address).unwrap_or_default();
        self.directory
            .set_stamp(Stamp::Founding { view: view.clone() })?;

        tracing::info!(
            "founded cluster {cluster}: {} nodes, {} shards",
            view.nodes.len(),
            view.shards().count()
        );
        Ok(Ok(Joined { node, view }))
    }

    async fn ask_promise(
        self: &Arc<Self>,
        address: &Address,
        request: &PromiseRequest,
    ) -> Result<Identity, String> {
        let reply = if *address == self.config.address {
            let (own, request) = (Arc::clone(self), request.clone());
            blocking::start(move || own.promise(&request))
                .await
                .map_err(|error| error.to_string())?
        } else {
            self.caller
                .promise(address, request, ASK_TIMEOUT)
                .await
                .map_err(|error| short_reason(&error))?
        };
        match reply {
            PromiseReply::Promised { identity } => Ok(identity),
            PromiseReply::Refused { reason } => Err(reason),
        }
    }

    fn own<'a>(&'a self, stamp: &'a Stamp) -> OwnFacts<'a> {
        OwnFacts {
            address: &self.config.address,
            directory: self.directory_id,
            view: &self.view_set,
            join_only: self.config.join_only,
            stamp,
            speaks: self.config.speaks(),
        }
    }
}

/// Returns the innermost cause: "connection refused" says more than the chain that leads to it.
fn short_reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Returns the pause of a node of a `VIEW` of so many between two rounds of asking them all.
fn ask_interval(nodes: usize, founds: bool) -> Duration {
    let few = if founds {
        FEW_NODES_OF_FOUNDER
    } else {
        FEW_NODES
    };
    ASK_INTERVAL * u32::try_from(nodes.div_ceil(few).max(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_a_large_view_ask_less_often() {
        let ms = |nodes: usize, founds: bool| ask_interval(nodes, founds).as_millis();
        assert_eq!(
            [0, 3, 10, 11, 100].map(|nodes| ms(nodes, false)),
            [200, 200, 200, 400, 2000]
        );
        assert_eq!(
            [0, 3, 50, 100].map(|nodes| ms(nodes, true)),
            [200, 200, 200, 400]
        );
    }
}
