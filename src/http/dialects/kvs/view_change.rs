//! `PUT /kvs/view-change` and `PUT /proxy/view-change` with `{"view":"a:1,b:2,c:3"}`, and with
//! `"repl-factor":R` for a store whose nodes belong to one shard each. A factor left out stays as
//! it was asked for.
//!
//! Once every key is where it belongs: 200 `{"message":"View change successful","shards":[...]}`,
//! of C with `{"address":"a:1","key-count":5}` for each node, of C4 with
//! `{"shard-id":"1","key-count":4,"replicas":["a:1","b:2"]}` for each shard. What can't be done as
//! it is asked is 400; a newcomer that is not there, or belongs to another cluster, 503. Neither
//! changes anything.
//!
//! A spare has the cluster do it that it waits for, and a node that the change leaves out asks the
//! others how it ends. Nodes carry a change out by themselves: a client that hangs up, or a wait
//! that ends, stops nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join;
use serde_json::value::RawValue;
use tokio::time::{Instant, sleep};

use super::body::{Fields, KvsBody};
use super::refusal;
use super::response::{PartJson, ResponseContent, ShardJson};
use super::shards::{addresses, id_of};
use crate::api::protocol::ClusterStatus;
use crate::api::shard_map::ShardMap;
use crate::api::store::{Failure, Store};
use crate::api::view_change::{
    ChangeInProgress, PerNode, Phase, ReplicationFactor, Shards, ViewChange, ViewChangeFailure,
};
use crate::http::App;
use crate::http::change_waiters::PollSchedule;
use crate::http::dialects::error::DialectError;
use crate::http::dialects::request::options;
use crate::http::metrics::RequestTimer;
use crate::sm::cluster::view::Layout;
use crate::types::{Address, GroupId, PlanEpoch};

/// Time for a change to end.
const WAIT_MAX: Duration = Duration::from_secs(600);
/// Time to count the keys once the change is done.
const COUNT_WAIT_MAX: Duration = Duration::from_secs(10);
/// Between two counts.
const COUNT_INTERVAL: Duration = Duration::from_millis(100);
/// Attempts at a change while others are accepted at the same moment.
const ATTEMPTS_MAX: u32 = 10;

/// Changes the view, waits for the end of it, and counts.
pub async fn change(
    app: &App,
    request_body: &KvsBody<'_>,
    timer: &mut RequestTimer<'_>,
) -> Result<ResponseContent, DialectError> {
    let (nodes, change) = parse(request_body)?;

    // Before anything is changed: a refusal must leave nothing done.
    let _permit = app
        .changes
        .acquire()
        .map_err(|failure| refusal(app, failure))?;
    timer.allow_wait(WAIT_MAX);
    let mut run = ViewChangeRun::new(app, nodes);
    let id = run.accept(change).await?;
    timer.log_change(&format_args!("the change of the view to plan {id}"));
    let done = run.follow(id).await?;
    let shards = run.count(done).await?;
    Ok(ResponseContent::ViewChanged {
        message: "View change successful",
        shards,
    })
}

/// Returns the nodes, and the change to them.
fn parse(request_body: &KvsBody<'_>) -> Result<(Vec<Address>, ViewChange), DialectError> {
    let fields = match request_body {
        KvsBody::Nothing => return Err(DialectError::bad_request("Bad json format")),
        KvsBody::Other => return Err(DialectError::bad_request("View is missing")),
        KvsBody::Object(fields) => fields,
    };
    let nodes = nodes(fields)?;
    let change = ViewChange {
        nodes: Some(nodes.clone()),
        ..ViewChange::default()
    };
    let Some(given) = fields.repl_factor else {
        return Ok((nodes, change));
    };
    let change = ViewChange {
        layout: Some(Layout::Exclusive),
        replication_factor: Some(ReplicationFactor::Fixed(repl_factor(given, nodes.len())?)),
        shards: Some(Shards::Default(PerNode::PerNode)),
        ..change
    };
    Ok((nodes, change))
}

fn nodes(fields: &Fields<'_>) -> Result<Vec<Address>, DialectError> {
    let view = fields
        .view
        .ok_or_else(|| DialectError::bad_request("View is missing"))?;
    let unreadable =
        |_| DialectError::bad_request("View is not a string of addresses separated by commas");
    let view: String = serde_json::from_str(view.get()).map_err(unreadable)?;
    let mut nodes = Vec::new();
    let mut seen = BTreeSet::new();
    for text in view.split(',') {
        let address: Address = text
            .parse()
            .map_err(|error| DialectError::bad_request(format!("View is malformed: {error}")))?;
        if !seen.insert(address.clone()) {
            return Err(DialectError::bad_request(format!(
                "View names {address} twice"
            )));
        }
        nodes.push(address);
    }
    Ok(nodes)
}

fn repl_factor(given: &RawValue, nodes: usize) -> Result<u8, DialectError> {
    let factor: Option<u8> = serde_json::from_str(given.get()).ok();
    match factor {
        None | Some(0) => Err(DialectError::bad_request(
            "Repl-factor is not a number of nodes",
        )),
        Some(factor) if usize::from(factor) > nodes => Err(DialectError::bad_request(format!(
            "View has fewer nodes than the repl-factor of {factor}"
        ))),
        Some(factor) => Ok(factor),
    }
}

/// A change on its way.
struct ViewChangeRun<'a> {
    app: &'a App,
    /// In the order given.
    nodes: Vec<Address>,
    /// The store to ask about the cluster: this node's, as long as it can tell.
    store: Arc<dyn Store>,
    deadline: Instant,
}

impl<'a> ViewChangeRun<'a> {
    fn new(app: &'a App, nodes: Vec<Address>) -> Self {
        // A spare belongs to no cluster, so it asks the nodes of the change over the network.
        let store = match app.store.this_node() {
            Some(_) => None,
            None => app.store.by_network(&nodes),
        };
        let store = store.unwrap_or_else(|| Arc::clone(&app.store));
        Self {
            app,
            nodes,
            store,
            deadline: Instant::now() + WAIT_MAX,
        }
    }

    /// Turns to whoever can tell from here on how the change gets on.
    fn ask_network(&mut self) {
        if let Some(cluster) = self.app.store.by_network(&self.nodes) {
            self.store = cluster;
        }
    }

    /// Has the change accepted, in a task of its own: a client that hangs up must not break it off
    /// halfway.
    async fn accept(&self, change: ViewChange) -> Result<PlanEpoch, DialectError> {
        let mut attempts = 0;
        loop {
            let (store, change) = (Arc::clone(&self.store), change.clone());
            let accepting =
                tokio::spawn(async move { store.change_view(change, None, options()).await });
            let failure = match accepting.await {
                Ok(Ok(accepted)) => return Ok(accepted.id),
                Ok(Err(failure)) => failure,
                Err(_) => return Err(DialectError::unanswered()),
            };
            attempts += 1;
            match failure {
                ViewChangeFailure::Refused { reason } => {
                    return Err(DialectError::bad_request(reason));
                }
                // The contract has no guard, so another change at the same moment must not fail
                // this one.
                ViewChangeFailure::EpochChanged { .. } if attempts < ATTEMPTS_MAX => {}
                ViewChangeFailure::EpochChanged { .. } => {
                    return Err(self.unavailable("the view changes again and again"));
                }
                ViewChangeFailure::NotReady { reason } => return Err(self.unavailable(&reason)),
                ViewChangeFailure::Failed(failure) => return Err(refusal(self.app, failure)),
            }
        }
    }

    /// Waits until the change, or one that has taken over from it, is done. Which it was.
    async fn follow(&mut self, mut id: PlanEpoch) -> Result<PlanEpoch, DialectError> {
        self.ask_network();
        let mut schedule = PollSchedule::new(self.deadline);
        while let Some(since) = schedule.next(&*self.app.readiness, &*self.store, id).await {
            match self.look(id, since).await {
                Ok(Some(change)) if change.phase == Phase::Done => return Ok(id),
                // A later plan goes on from this one. `count` sees whether it has the same nodes.
                Ok(Some(change)) if change.phase == Phase::Superseded => {
                    id = self.store.status().await.map_or(id, |status| status.epoch);
                }
                // It runs, or is not heard of here yet.
                Ok(Some(_) | None) => {}
                // An election, or this node is on its way out: that says nothing about the change.
                Err(_) => self.ask_network(),
            }
        }
        Err(self.unavailable("the change is not done yet"))
    }

    /// Returns how the change gets on. Who asks this node shares the look with the others that do.
    async fn look(
        &self,
        id: PlanEpoch,
        since: Instant,
    ) -> Result<Option<ChangeInProgress>, Failure> {
        if Arc::ptr_eq(&self.store, &self.app.store) {
            return self
                .app
                .changes
                .look(&*self.app.store, id, since, options())
                .await;
        }
        self.store.operation(id, options()).await
    }

    /// Counts the keys of each part of the store, once the change is done where the counting is
    /// asked.
    async fn count(&mut self, done: PlanEpoch) -> Result<Vec<PartJson>, DialectError> {
        let deadline = Instant::now() + COUNT_WAIT_MAX;
        let mut last = None;
        while Instant::now() < deadline && !self.is_stopping() {
            match try_join(self.store.status(), self.store.count(options())).await {
                Ok((status, counts)) => {
                    // The node asked may not have heard of the end of the change.
                    let is_old = status.epoch < done || !status.settled;
                    match parts(&self.nodes, &status, &counts).filter(|_| !is_old) {
                        Some(parts) => return Ok(parts),
                        None => last = None,
                    }
                }
                Err(failure) => {
                    self.ask_network();
                    last = Some(failure);
                }
            }
            sleep(COUNT_INTERVAL).await;
        }
        Err(match last {
            Some(failure) => refusal(self.app, failure),
            None => self.unavailable("another change of the view has taken over"),
        })
    }

    /// Returns true if the server stops: a wait must not hold that up.
    fn is_stopping(&self) -> bool {
        self.app
            .readiness
            .ready()
            .is_err_and(|unready| unready.code == "stopping")
    }

    fn unavailable(&self, reason: &str) -> DialectError {
        tracing::info!("a change of the view was not seen through: {reason}");
        DialectError::from(Failure::Unavailable {
            reason: reason.to_owned(),
            retry_after_ms: 1000,
        })
    }
}

/// Returns the parts of the store, each with its keys. None if the view has other nodes, or other
/// shards than were counted.
fn parts(
    nodes: &[Address],
    status: &ClusterStatus,
    counts: &[(GroupId, u64)],
) -> Option<Vec<PartJson>> {
    let of_view: BTreeSet<&Address> = status.nodes.iter().map(|node| &node.address).collect();
    if of_view != nodes.iter().collect() {
        return None;
    }
    let map = ShardMap::from_status(status);

    // The two were asked one beside the other, so they may be of different views.
    if !map
        .shards()
        .map(|(shard, _)| shard)
        .eq(counts.iter().map(|(shard, _)| *shard))
    {
        return None;
    }
    match map.layout {
        Layout::Spread => {
            let mut at_home: BTreeMap<&Address, u64> = BTreeMap::new();
            for (shard, keys) in counts {
                let home = map.node(map.shard(*shard)?.home)?;
                *at_home.entry(&home.address).or_default() += keys;
            }
            let part = |node: &Address| PartJson::Node {
                address: node.clone(),
                key_count: at_home.get(node).copied().unwrap_or_default(),
            };
            Some(nodes.iter().map(part).collect())
        }
        Layout::Exclusive => {
            let part = |(shard, key_count): &(GroupId, u64)| {
                let replicas = addresses(&map, map.shard(*shard)?);
                Some(PartJson::Shard(ShardJson {
                    shard_id: id_of(*shard),
                    key_count: *key_count,
                    replicas,
                }))
            };
            counts.iter().map(part).collect()
        }
    }
}
