//! Changes of the view that an operator asks for, as the leader of the meta group carries them out:
//! who the nodes are, what the plan is, and that the meta group accepts it. What the plan then
//! takes is done by every node by itself (`reconciler`, `membership`, `slot_moves`).

use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use super::context::{NodeContext, read_applied_view, read_view_now};
use super::plan_proposal::{PlanRefusal, install_plan};
use crate::api::peer::{Identity, Standing};
use crate::api::protocol::ClusterStatus;
use crate::api::store::{Failure, Options};
use crate::api::view_change::{
    ChangeInProgress, Phase, PlannedChange, ReplicationFactor, Shards, ViewChange,
    ViewChangeFailure,
};
use crate::raft::{ProposeError, Replica};
use crate::sm::cluster::meta::MetaRejection;
use crate::sm::cluster::view::{self, PlacementSpec, View};
use crate::sm::level::TooOld;
use crate::sm::placement::{Planned, plan};
use crate::types::{Address, GroupId, NodeId, PlanEpoch};

/// Time that a node has to say who it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two looks at a node that has left and does not know yet.
const LATE_LEAVER_PAUSE: Duration = Duration::from_millis(200);
/// Changes and dry runs that are planned at once: each asks every node, and holds a whole view or
/// two.
const CHANGES_AT_ONCE: usize = 4;
/// Nodes that one change asks at once who they are. Its addresses come out of a request: they must
/// be no way to have a whole network dialled in a moment, nor to keep other changes and what this
/// node asks for itself waiting.
const ASKED_AT_ONCE: usize = 8;
/// Time after which to try again.
const RETRY_AFTER_MS: u64 = 500;
/// Names in one list of what is waited for.
const NAMES_MAX: usize = 8;

/// Carries out changes of the view.
pub struct Operator {
    context: Arc<NodeContext>,
    /// Of the change that was last asked about: when that was first, and what was left then.
    watched: Mutex<Option<TrackedChange>>,
    turns: Semaphore,
}

#[derive(Debug, Clone, Copy)]
struct TrackedChange {
    id: PlanEpoch,
    since: Instant,
    bytes_left: u64,
}

/// Nodes that a change names, and that have left and do not know it yet.
#[derive(Debug)]
struct LateLeavers {
    /// True if there was one.
    any: bool,
    until: Instant,
}

impl LateLeavers {
    fn new(options: Options) -> Self {
        Self {
            any: false,
            until: Instant::now() + options.timeout.mul_f32(0.7),
        }
    }
}

impl Operator {
    pub fn new(context: Arc<NodeContext>) -> Self {
        Self {
            context,
            watched: Mutex::default(),
            turns: Semaphore::new(CHANGES_AT_ONCE),
        }
    }

    /// Has the meta group accept another plan.
    pub async fn change(
        &self,
        change: &ViewChange,
        only_if: Option<PlanEpoch>,
        options: Options,
    ) -> Result<ChangeInProgress, ViewChangeFailure> {
        change
            .ensure_bounded()
            .map_err(|reason| ViewChangeFailure::Refused { reason })?;

        let _turn = self.turn(options).await?;
        let deadline = Instant::now() + options.timeout;
        let meta = self.meta()?;
        let mut leavers = LateLeavers::new(options);

        loop {
            let (view, planned) = self
                .draw_up(&meta, change, only_if, deadline, &mut leavers)
                .await?;
            if planned.is_same {
                return Ok(self.describe(&view, view.epoch, &self.context.status().await));
            }

            let epoch = planned.view.epoch;
            match install_plan(&meta, &view, planned.view, deadline).await {
                Ok(()) => {
                    // Told for all to see where it was asked for, with who did.
                    tracing::debug!("plan {epoch} was accepted");
                    self.context.views().note_end(&view);
                    // Whether this node still leads does not matter any more: the plan may well
                    // take that from it.
                    let unknown = |failure: Failure| Failure::Unknown {
                        reason: failure.to_string(),
                    };
                    let now = read_applied_view(&meta)
                        .map_err(unknown)
                        .map_err(ViewChangeFailure::Failed)?;
                    return Ok(self.describe(&now, epoch, &self.context.status().await));
                }
                // Something else has changed the view meanwhile: the plan is drawn up anew.
                Err(PlanRefusal::Rejected(MetaRejection::Outdated { .. })) => {}
                Err(PlanRefusal::Rejected(rejection)) => {
                    let reason = format!("the meta group does not accept the plan: {rejection:?}");
                    return Err(ViewChangeFailure::Refused { reason });
                }
                Err(PlanRefusal::Failed(ProposeError::Unknown { reason })) => {
                    let failure = self.context.for_want_of_meta(Failure::Unknown { reason });
                    return Err(ViewChangeFailure::Failed(failure));
                }
                Err(PlanRefusal::Failed(error)) => {
                    let failure = Failure::Unavailable {
                        reason: error.to_string(),
                        retry_after_ms: RETRY_AFTER_MS,
                    };
                    return Err(ViewChangeFailure::Failed(
                        self.context.for_want_of_meta(failure),
                    ));
                }
            }
        }
    }

    /// Plans the change, from the view as it is. A node that has just left notices in a moment, and
    /// is away for another while it starts again: it is waited for.
    async fn draw_up(
        &self,
        meta: &Replica,
        change: &ViewChange,
        only_if: Option<PlanEpoch>,
        deadline: Instant,
        leavers: &mut LateLeavers,
    ) -> Result<(View, Planned), ViewChangeFailure> {
        loop {
            let view = self.current(meta, deadline).await?;
            if only_if.is_some_and(|epoch| epoch != view.epoch) {
                return Err(ViewChangeFailure::EpochChanged {
                    current: view.epoch,
                });
            }
            match self.plan(&view, change).await {
                Ok(planned) => return Ok((view, planned)),
                Err(ViewChangeFailure::NotReady { reason }) => {
                    // Nothing else makes a node ready in a moment, so only such a node is waited
                    // for.
                    leavers.any = leavers.any || self.is_leaving_late(&view, change).await;
                    if !leavers.any || Instant::now() >= leavers.until {
                        return Err(ViewChangeFailure::NotReady { reason });
                    }
                    tokio::time::sleep(LATE_LEAVER_PAUSE).await;
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Returns true if a node that is to be in the view has left it, and does not know yet. Such a
    /// node is told to look.
    async fn is_leaving_late(&self, view: &View, change: &ViewChange) -> bool {
        let members: Vec<Address> = view
            .staying()
            .map(|(_, node)| node.address.clone())
            .collect();
        let strangers = change
            .nodes
            .iter()
            .flatten()
            .filter(|address| view.node_at(address).is_none());
        let peers = &self.context.peers.with_turns(ASKED_AT_ONCE);
        let asked = strangers.map(|address| {
            let members = &members;
            async move {
                let identity = peers.identity(address, ASK_TIMEOUT).await.ok()?;
                let is_ours = matches!(
                    &identity.standing,
                    Standing::Member { view: known } if known.cluster == view.cluster
                );

                // It may not hear from its leaders any more, so it is told whom to ask.
                if is_ours {
                    self.context
                        .peers
                        .invite(address, members, ASK_TIMEOUT)
                        .await
                        .ok()?;
                }
                is_ours.then_some(())
            }
        });
        join_all(asked).await.into_iter().flatten().next().is_some()
    }

    /// Returns what such a change would take.
    pub async fn preview(
        &self,
        change: &ViewChange,
        options: Options,
    ) -> Result<PlannedChange, ViewChangeFailure> {
        change
            .ensure_bounded()
            .map_err(|reason| ViewChangeFailure::Refused { reason })?;
        let _turn = self.turn(options).await?;
        let (meta, deadline) = (self.meta()?, Instant::now() + options.timeout);
        let (view, planned) = self
            .draw_up(
                &meta,
                change,
                None,
                deadline,
                &mut LateLeavers::new(options),
            )
            .await?;
        Ok(compare(&view, &planned, &self.context.status().await))
    }

    /// Returns the progress of the change that was accepted as plan `id`; None if there was no such
    /// plan.
    pub async fn operation(
        &self,
        id: PlanEpoch,
        options: Options,
    ) -> Result<Option<ChangeInProgress>, Failure> {
        let meta = self.meta()?;
        let view = self
            .current(&meta, Instant::now() + options.timeout)
            .await?;
        if id > view.epoch || id.0 == 0 {
            return Ok(None);
        }
        let status = self.context.status().await;
        Ok(Some(self.describe(&view, id, &status)))
    }

    /// Waits until few enough other changes are worked on.
    async fn turn(&self, options: Options) -> Result<SemaphorePermit<'_>, ViewChangeFailure> {
        match timeout(options.timeout, self.turns.acquire()).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) | Err(_) => Err(ViewChangeFailure::Failed(Failure::Overloaded {
                limit: format!("{CHANGES_AT_ONCE} changes of the view are planned at once"),
                retry_after_ms: RETRY_AFTER_MS,
            })),
        }
    }

    /// Returns the meta group, if this node leads it.
    fn meta(&self) -> Result<Arc<Replica>, ViewChangeFailure> {
        let meta = self
            .context
            .registry
            .get(GroupId::META)
            .filter(|meta| meta.leads());
        meta.ok_or_else(|| unavailable("this node does not lead the meta group".into()))
    }

    /// Reads the view as it is, not as it may have been.
    async fn current(&self, meta: &Replica, deadline: Instant) -> Result<View, ViewChangeFailure> {
        let read = read_view_now(meta, deadline).await;
        read.map_err(|failure| ViewChangeFailure::Failed(self.context.for_want_of_meta(failure)))
    }

    async fn plan(&self, view: &View, change: &ViewChange) -> Result<Planned, ViewChangeFailure> {
        let wanted = self.identify(view, change).await?;
        // A node that is out of reach now is not given anything again.
        let out: BTreeSet<NodeId> = view
            .evicted
            .iter()
            .filter(|id| !self.is_in_reach(**id))
            .copied()
            .collect();
        plan(view, merged(view.placement, change), &wanted, &out).map_err(|error| {
            ViewChangeFailure::Refused {
                reason: error.to_string(),
            }
        })
    }

    fn is_in_reach(&self, node: NodeId) -> bool {
        self.context.is_in_reach(node, ASK_TIMEOUT)
    }

    /// Returns the nodes that the view is to have. One that is in it already need not answer; but
    /// if another directory answers under its address, its own is lost.
    async fn identify(
        &self,
        view: &View,
        change: &ViewChange,
    ) -> Result<Vec<view::NodeSpec>, ViewChangeFailure> {
        let mut addresses: Vec<Address> = match &change.nodes {
            Some(nodes) => nodes.clone(),
            None => view
                .staying()
                .map(|(_, node)| node.address.clone())
                .collect(),
        };
        // Newcomers have to answer, so they have their turn before members, which may be away.
        addresses.sort_by_cached_key(|address| view.node_at(address).is_some());

        let peers = &self.context.peers.with_turns(ASKED_AT_ONCE);
        let asked = addresses.iter().map(|address| async move {
            if *address == self.own_address(view) {
                return Ok(None);
            }
            peers.identity(address, ASK_TIMEOUT).await.map(Some)
        });
        let answers = join_all(asked).await;

        // Members are believed to be who they were; a newcomer has to say who it is.
        let mut wanted = Vec::with_capacity(addresses.len());
        for (address, answer) in addresses.iter().zip(answers) {
            let known = view.node_at(address).and_then(|id| view.nodes.get(&id));
            wanted.push(match (answer, known) {
                (Ok(None), Some(known)) | (Err(_), Some(known)) => known.clone(),
                (Ok(Some(identity)), Some(known)) if identity.directory == known.directory => {
                    known.clone()
                }
                (Ok(Some(identity)), _) => newcomer(view, address, identity)?,
                (Ok(None), None) => {
                    return Err(unavailable(format!(
                        "{address} is this node, and not in the view"
                    )));
                }
                (Err(error), None) => {
                    return Err(ViewChangeFailure::NotReady {
                        reason: format!("{address} can't be asked who it is: {error}"),
                    });
                }
            });
        }
        Ok(wanted)
    }

    fn own_address(&self, view: &View) -> Address {
        view.nodes
            .get(&self.context.node)
            .map_or_else(|| self.context.address.clone(), |node| node.address.clone())
    }

    fn describe(&self, view: &View, id: PlanEpoch, status: &ClusterStatus) -> ChangeInProgress {
        let over = |phase| ChangeInProgress {
            id,
            phase,
            replicas_left: 0,
            slots_left: 0,
            bytes_left: 0,
            bytes_per_s: None,
            left_s: None,
            waiting_for: Vec::new(),
        };
        let was_done = if id < view.epoch {
            self.context.views().was_done(id)
        } else {
            None
        };

        // This node may not have seen the plan end: then the view says whether all is as it should
        // be.
        match was_done {
            Some(true) => return over(Phase::Done),
            Some(false) => return over(Phase::Superseded),
            None if view.is_settled() => return over(Phase::Done),
            None if id < view.epoch => return over(Phase::Superseded),
            None => {}
        }
        let slots_left = view.misplaced_slots().count() as u64;
        let bytes_left = bytes_to_move(view, &view.targets, status);
        let rate = self.rate(id, bytes_left);
        ChangeInProgress {
            replicas_left: view.groups.values().map(replicas_left).sum(),
            slots_left,
            bytes_left,
            bytes_per_s: rate,
            left_s: rate
                .filter(|rate| *rate > 0)
                .map(|rate| bytes_left.div_ceil(rate)),
            waiting_for: self.waiting_for(view),
            ..over(Phase::Running)
        }
    }

    fn rate(&self, id: PlanEpoch, bytes_left: u64) -> Option<u64> {
        let mut watched = self.watched.lock();
        let first = match *watched {
            // Writes of clients can add to what is left: then the rate is measured anew.
            Some(first) if first.id == id && first.bytes_left >= bytes_left => first,
            _ => *watched.insert(TrackedChange {
                id,
                since: Instant::now(),
                bytes_left,
            }),
        };
        let elapsed_ms = u64::try_from(first.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        (elapsed_ms >= 1000)
            .then(|| (first.bytes_left - bytes_left).saturating_mul(1000) / elapsed_ms)
    }

    fn waiting_for(&self, view: &View) -> Vec<String> {
        let mut reasons = Vec::new();
        let unsettled = view.groups.iter().filter(|(_, group)| !group.is_settled());
        for (id, group) in unsettled.take(NAMES_MAX) {
            let name = id.named();

            // A node out of reach is the likelier reason, so it is named first.
            let silent: Vec<String> = group
                .wanted()
                .filter(|(_, node)| !self.is_in_reach(*node))
                .filter_map(|(_, node)| view.nodes.get(&node))
                .map(|node| node.address.to_string())
                .collect();
            reasons.push(match (silent.is_empty(), group.draining) {
                (false, _) => format!("{name}: no sign of {}", silent.join(", ")),
                (true, true) => format!("{name}: its slots move away"),
                (true, false) => format!("{name}: its replicas change"),
            });
        }
        let slots = view.misplaced_slots().count();
        if slots > 0 {
            reasons.push(format!(
                "{slots} slots to move, {} under way",
                view.moves
                    .values()
                    .map(|open| open.slots.len())
                    .sum::<usize>()
            ));
        }
        reasons
    }
}

/// Admits a node that the view does not know under this address.
fn newcomer(
    view: &View,
    address: &Address,
    identity: Identity,
) -> Result<view::NodeSpec, ViewChangeFailure> {
    // Leaders may propose what it could not read, and it would stop at the first such entry.
    if identity.speaks < view.level {
        let reason = format!(
            "{address} can't be added: {}",
            TooOld::new(view.level, identity.speaks)
        );
        return Err(ViewChangeFailure::Refused { reason });
    }
    let not_ready = |reason: String| Err(ViewChangeFailure::NotReady { reason });
    let is_known = view
        .nodes
        .values()
        .any(|node| node.directory == identity.directory);
    match identity.standing {
        Standing::Member { view: other } if other.cluster != view.cluster => {
            return not_ready(format!("{address} belongs to cluster {}", other.cluster));
        }
        // Its promise holds for ever: the other cluster may already be founded.
        Standing::Promised { founder, .. } => {
            return not_ready(format!(
                "{address} has promised to be founded by the node with directory {founder}"
            ));
        }
        // It was one of ours, and has not noticed yet that it is retired.
        Standing::Member { .. } if !is_known => {
            return not_ready(format!(
                "{address} has yet to notice that it left the cluster: try again in some seconds"
            ));
        }
        Standing::Member { .. } | Standing::Fresh { .. } | Standing::Retired { .. } => {}
    }
    Ok(view::NodeSpec {
        address: address.clone(),
        public_address: identity.public_address,
        directory: identity.directory,
    })
}

/// Returns what is asked for now. What the change leaves out stays.
fn merged(asked: PlacementSpec, change: &ViewChange) -> PlacementSpec {
    PlacementSpec {
        layout: change.layout.unwrap_or(asked.layout),
        replication_factor: match change.replication_factor {
            None => asked.replication_factor,
            Some(ReplicationFactor::Default(_)) => None,
            Some(ReplicationFactor::Fixed(factor)) => Some(factor),
        },
        shards: match change.shards {
            None => asked.shards,
            Some(Shards::Default(_)) => None,
            Some(Shards::Fixed(shards)) => Some(shards),
        },
    }
}

/// Replicas of the plan that are not members yet, or not as they should be, and replicas out of it
/// that are not retired.
fn replicas_left(group: &view::GroupSpec) -> u64 {
    let settled = |replica: &crate::types::ReplicaId| match &group.reported {
        None => group.creation.contains_key(replica),
        Some(reported) if group.learners.contains(replica) => reported.learners.contains(replica),
        Some(reported) => reported.voters.contains(replica),
    };
    (group
        .wanted()
        .filter(|(replica, _)| !settled(replica))
        .count()
        + group.leaving.len()) as u64
}

/// Estimates the bytes in the slots that are not where `targets` has them: a slot counts for its
/// share of its shard.
fn bytes_to_move(view: &View, targets: &view::SlotTable, status: &ClusterStatus) -> u64 {
    let mut bytes = 0;
    for (id, _) in view.shards() {
        let (mut owned, mut leaving) = (0u64, 0u64);
        for slot in view.slots.slots_of(id) {
            owned += 1;
            leaving += u64::from(targets.owner(slot) != id);
        }
        let held = status
            .shards
            .iter()
            .find(|shard| shard.id == id)
            .and_then(|shard| shard.bytes)
            .unwrap_or(0);
        bytes += held.saturating_mul(leaving) / owned.max(1);
    }
    bytes
}

fn compare(view: &View, planned: &Planned, status: &ClusterStatus) -> PlannedChange {
    let next = &planned.view;
    let replicas = |of: &View| -> BTreeSet<_> {
        of.groups
            .values()
            .flat_map(|group| group.replicas.keys().copied())
            .collect()
    };
    let shards = |of: &View| -> BTreeSet<_> {
        of.shards()
            .filter(|(_, group)| !group.draining)
            .map(|(id, _)| id)
            .collect()
    };
    let nodes = |of: &View| -> BTreeSet<NodeId> { of.staying().map(|(id, _)| id).collect() };
    let addresses = |of: &View, ids: &mut dyn Iterator<Item = NodeId>| -> Vec<Address> {
        ids.filter_map(|id| of.nodes.get(&id))
            .map(|node| node.address.clone())
            .collect()
    };
    let (had, has) = (nodes(view), nodes(next));
    let slots_moved = crate::types::Slot::all()
        .filter(|slot| view.slots.owner(*slot) != next.targets.owner(*slot))
        .count() as u64;
    PlannedChange {
        base: view.epoch,
        is_same: planned.is_same,
        nodes_added: addresses(next, &mut has.difference(&had).copied()),
        nodes_removed: addresses(view, &mut had.difference(&has).copied()),
        replicas_added: replicas(next).difference(&replicas(view)).count() as u64,
        replicas_removed: replicas(view).difference(&replicas(next)).count() as u64,
        shards_added: shards(next).difference(&shards(view)).count() as u64,
        shards_removed: shards(view).difference(&shards(next)).count() as u64,
        slots_moved,
        slots_kept: u64::from(crate::types::SLOTS) - slots_moved,
        bytes_moved: bytes_to_move(view, &next.targets, status),
    }
}

fn unavailable(reason: String) -> ViewChangeFailure {
    ViewChangeFailure::Failed(Failure::Unavailable {
        reason,
        retry_after_ms: RETRY_AFTER_MS,
    })
}
