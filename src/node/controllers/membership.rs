//! Brings the members of the groups that this node leads to what the view wants. The steps are
//! decided in `sm::cluster::membership`; here they are taken, one at a time per group, each under a
//! limit of time, and looked at anew after it.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::group_tasks::GroupTasks;
use crate::api::peer::HostedReplica;
use crate::node::context::NodeContext;
use crate::node::platform::{Platform, Stepped};
use crate::raft::Replica;
use crate::sm::cluster::membership::{MembershipStep, ObservedMembership, next_step};
use crate::sm::cluster::meta;
use crate::sm::cluster::view::{self, View};
#[cfg(any(test, feature = "testing"))]
use crate::sm::cluster::view::{GroupSpec, ReportedMembership};
use crate::types::{Address, GroupId, NodeId, ReplicaId};

/// Between two looks at the groups.
const TICK: Duration = Duration::from_millis(100);
/// Between two looks at a group that waits for something.
const PAUSE: Duration = Duration::from_millis(250);
/// Time that one step may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// Time that a node has to say which replicas it has.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// A replica that could not be added is not tried again for so long while there are others.
const REFUSED_FOR: Duration = Duration::from_millis(500);
/// A node that was heard of longer ago than this is not up.
const HEARD_WITHIN: Duration = Duration::from_millis(1500);

/// Takes the steps of the groups that this node leads.
pub struct MembershipController {
    shared: Arc<MembershipSteps>,
    tasks: GroupTasks,
}

struct MembershipSteps {
    context: Arc<NodeContext>,
    platform: Arc<dyn Platform>,
    /// Replicas that could not be added, and when: others first.
    refused: Mutex<BTreeMap<ReplicaId, Instant>>,
}

impl MembershipController {
    pub fn new(context: Arc<NodeContext>, platform: Arc<dyn Platform>) -> Self {
        let tasks = GroupTasks::new(&context, TICK);
        Self {
            shared: Arc::new(MembershipSteps {
                context,
                platform,
                refused: Mutex::default(),
            }),
            tasks,
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        while self.tasks.wait_until_due(shutdown).await {
            let view = self.shared.context.view();
            for group in self.shared.context.registry.groups() {
                let id = group.key().group;
                let Some(spec) = view.groups.get(&id).filter(|_| group.leads()) else {
                    continue;
                };
                if is_as_wanted(spec, &group) || self.tasks.is_busy(id) {
                    continue;
                }
                let (shared, view) = (self.shared.clone(), view.clone());
                self.tasks.begin(id, async move {
                    let waits = shared.step(&view, &group).await;
                    if waits {
                        tokio::time::sleep(PAUSE).await;
                    }
                });
            }
        }
    }
}

/// Returns true if nothing is to be done, seen cheaply: idle groups are asked this ten times a
/// second.
fn is_as_wanted(spec: &view::GroupSpec, group: &Replica) -> bool {
    let watch = group.watch();
    let watch = watch.borrow();
    let membership = &watch.committed_membership;
    membership.is_uniform
        && watch.membership.log_id == membership.log_id
        && spec.is_settled()
        && membership.voters.keys().copied().eq(spec.electorate())
        && membership
            .learners
            .keys()
            .copied()
            .eq(spec.learners.iter().copied())
}

impl MembershipSteps {
    /// Takes the next step of a group. Returns true if there is something to wait for.
    async fn step(&self, view: &View, group: &Replica) -> bool {
        let id = group.key().group;
        let Some(spec) = view.groups.get(&id) else {
            return true;
        };
        let Some(observed) = self.observe(spec, group) else {
            return true;
        };
        let step = next_step(spec, &observed);
        match &step {
            MembershipStep::Nothing | MembershipStep::Wait => return true,
            MembershipStep::AddLearner(_)
            | MembershipStep::SetVoters(_)
            | MembershipStep::RemoveLearners(_)
            | MembershipStep::HandOver(_)
            | MembershipStep::Report(_) => {
                tracing::debug!("group {id}: {step:?}");
            }
        }

        // A step may wait for a quorum that is not there: after a while the group is looked at
        // anew.
        let taken =
            tokio::time::timeout(STEP_TIMEOUT, self.take(view, spec, group, step.clone())).await;
        let reason = match taken {
            Ok(Ok(())) => {
                self.platform
                    .stepped(Stepped::Members {
                        group: id,
                        step: &step,
                    })
                    .await;
                return false;
            }
            Ok(Err(reason)) => reason,
            Err(_) => "it took too long".to_owned(),
        };
        tracing::debug!("the members of group {id} were not changed: {reason}");
        true
    }

    /// Returns the group as it is; None while this replica has yet to learn the membership.
    fn observe(&self, spec: &view::GroupSpec, group: &Replica) -> Option<ObservedMembership> {
        let me = group.key().replica;
        let watch = group.watch().borrow().clone();
        let membership = watch.membership;
        let mut refused = self.refused.lock();
        refused.retain(|_, at| at.elapsed() < REFUSED_FOR);

        // Of a node that is no member of anything yet nothing was heard: it is asked when it is to
        // be added.
        let is_up = |replica: &ReplicaId, node: &NodeId| {
            // Not only heard of: for one that has died since, what its vote is counted on for would
            // wait for ever if its disk is lost.
            let is_running = || self.context.registry.is_up(*node, HEARD_WITHIN);
            *replica == me
                || is_running()
                || !membership.is_member(*replica) && !refused.contains_key(replica)
        };

        let members = membership
            .voters
            .iter()
            .chain(&membership.learners)
            .map(|(replica, node)| (*replica, *node));
        let known = spec.hosted().chain(members);
        let alive = known
            .filter(|(replica, node)| is_up(replica, node))
            .map(|(replica, _)| replica)
            .collect();
        let members = membership.voters.keys().chain(membership.learners.keys());

        Some(ObservedMembership {
            me,
            log_id: membership.log_id?,
            is_settled: membership.is_uniform
                && membership.log_id == watch.committed_membership.log_id,
            alive,
            caught_up: members
                .clone()
                .copied()
                .filter(|replica| group.is_caught_up(*replica))
                .collect(),
            complete: group.complete(),
            witnesses: members
                .copied()
                .filter(|replica| membership.is_witness(*replica))
                .collect(),
            voters: membership.voters.keys().copied().collect(),
            learners: membership.learners.keys().copied().collect(),
        })
    }

    async fn take(
        &self,
        view: &View,
        spec: &view::GroupSpec,
        group: &Replica,
        step: MembershipStep,
    ) -> Result<(), String> {
        let id = group.key().group;
        match step {
            MembershipStep::Nothing | MembershipStep::Wait => Ok(()),
            MembershipStep::AddLearner(replica) => {
                let wanted = spec.wanted().find(|(wanted, _)| *wanted == replica);
                let node = wanted
                    .map(|(_, node)| node)
                    .ok_or("the replica is not in the view")?;
                if let Err(reason) = self.ensure_created(view, id, replica, node).await {
                    // Asked again only after a while, so that other replicas of the group are not
                    // held up by it.
                    self.refused.lock().insert(replica, Instant::now());
                    return Err(reason);
                }

                // The answer counts in this term alone: a later leader may have the replica
                // retired.
                let term = group.watch().borrow().term;
                self.ensure_wanted(id, replica, node).await?;
                if group.watch().borrow().term != term {
                    return Err("another has led meanwhile".into());
                }

                let added = match spec.is_witness(replica) {
                    true => group.add_witness(replica, node).await,
                    false => group.add_learner(replica, node).await,
                };
                added.map_err(|error| error.to_string())
            }
            MembershipStep::SetVoters(voters) => group
                .change_voters(voters)
                .await
                .map_err(|error| error.to_string()),
            MembershipStep::RemoveLearners(learners) => group
                .remove_learners(learners)
                .await
                .map_err(|error| error.to_string()),
            MembershipStep::HandOver(successor) => group
                .transfer_leader(successor)
                .await
                .map_err(|error| error.to_string()),
            MembershipStep::Report(reported) => {
                // Only a leader that a quorum follows still knows the members; by now it knew this
                // plan.
                group
                    .read_barrier(Instant::now() + STEP_TIMEOUT)
                    .await
                    .map_err(|error| error.to_string())?;
                if group.watch().borrow().committed_membership.log_id != Some(reported.log_id) {
                    return Err("the members have changed meanwhile".into());
                }

                let known = view.version;
                let report = meta::MetaCommand::Report {
                    group: id,
                    reported,
                    plan: view.epoch,
                };
                match self.context.tell_meta(report, STEP_TIMEOUT).await {
                    Ok(meta::MetaOutcome::Done | meta::MetaOutcome::MoveOpened { .. }) => {
                        self.context.wait_for_map(known).await;
                        Ok(())
                    }
                    Ok(meta::MetaOutcome::Rejected(rejection)) => Err(format!("{rejection:?}")),
                    Err(failure) => Err(failure.to_string()),
                }
            }
        }
    }

    /// Makes sure that the meta group still wants a replica. This node's view may be an old one,
    /// and the replica retired since: its node forgets it, votes and all. It is wanted still when
    /// the meta group says so now. What retires it later is the report of a leader that knew a
    /// later plan, with a quorum behind it: that is of a later term, in which this one adds nobody
    /// any more.
    async fn ensure_wanted(
        &self,
        group: GroupId,
        replica: ReplicaId,
        node: NodeId,
    ) -> Result<(), String> {
        let now = self
            .context
            .view_now(ASK_TIMEOUT)
            .await
            .map_err(|error| error.to_string())?;
        let is_wanted = now
            .groups
            .get(&group)
            .is_some_and(|spec| spec.wanted().any(|wanted| wanted == (replica, node)));
        self.context.views().advance(now);
        if is_wanted {
            Ok(())
        } else {
            Err(format!(
                "replica {replica} of group {group} is not wanted any more"
            ))
        }
    }

    /// Makes sure that its node has created a replica, before it is counted as a member: one
    /// that was counted is never created again.
    async fn ensure_created(
        &self,
        view: &View,
        group: GroupId,
        replica: ReplicaId,
        node: NodeId,
    ) -> Result<(), String> {
        if node == self.context.node {
            return Ok(());
        }
        let there = view.nodes.get(&node).ok_or("the node is not in the view")?;
        let address = &there.address;

        let hosted = self
            .context
            .peers
            .replicas(there, ASK_TIMEOUT)
            .await
            .map_err(|error| error.to_string())?;
        if hosted
            .iter()
            .any(|held: &HostedReplica| held.group == group && held.replica == replica)
        {
            return Ok(());
        }
        // It may not know yet that it is in the view.
        let members: Vec<Address> = view
            .staying()
            .map(|(_, node)| node.address.clone())
            .collect();
        self.context
            .peers
            .invite(address, &members, ASK_TIMEOUT)
            .await
            .map_err(|error| error.to_string())?;
        Err(format!(
            "{address} has not created replica {replica} of group {group} yet"
        ))
    }
}

#[cfg(any(test, feature = "testing"))]
impl MembershipController {
    /// Reports the members of a group as a leader that goes by `view` does.
    pub async fn report(&self, view: &View, group: GroupId) -> Result<(), String> {
        let (led, spec) = self.find(view, group)?;
        let observed = self
            .shared
            .observe(spec, &led)
            .ok_or("the membership is unknown")?;
        let reported = ReportedMembership {
            log_id: observed.log_id,
            voters: observed.voters,
            learners: observed.learners,
        };
        self.shared
            .take(view, spec, &led, MembershipStep::Report(reported))
            .await
    }

    fn find<'a>(
        &self,
        view: &'a View,
        group: GroupId,
    ) -> Result<(Arc<Replica>, &'a GroupSpec), String> {
        let led = self.shared.context.registry.get(group);
        Ok((
            led.ok_or("it is not open here")?,
            view.groups
                .get(&group)
                .ok_or("the view has no such group")?,
        ))
    }

    /// Adds a replica as a leader that goes by `view` does.
    pub async fn add(&self, view: &View, group: GroupId, replica: ReplicaId) -> Result<(), String> {
        let (led, spec) = self.find(view, group)?;
        self.shared
            .take(view, spec, &led, MembershipStep::AddLearner(replica))
            .await
    }
}
