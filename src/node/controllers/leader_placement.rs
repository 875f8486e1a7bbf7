//! Leaders drift home: a node that leads a shard whose home is another node hands it over, once the
//! home replica has caught up.
//!
//! Only the leader acts, one shard at a time, and only for a home that was heard of lately: a
//! transfer to a replica that is not there stops the shard until an election.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::node::context::NodeContext;
use crate::node::pause;
use crate::raft::Replica;
use crate::types::{GroupId, LogId, ReplicaId};

const TICK: Duration = Duration::from_secs(1);
/// Time for which the home must have been in reach before it is given the lead: a node that comes
/// and goes should not lead.
const STEADY_FOR: Duration = Duration::from_secs(3);
/// After a transfer that failed, this shard is left alone for so long.
const RETRY_AFTER: Duration = Duration::from_secs(30);
/// A home that was last heard of longer ago than this is not in reach.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// Time that a home has to say whether it could lead.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(3);

/// Hands leaderships over to their homes, unless these lack room on their disks, are stopping, or
/// have replicas that do not run.
pub struct LeaderPlacement {
    context: Arc<NodeContext>,
    /// The homes of shards that this node leads that have been good enough to lead, without a
    /// break.
    steady: HashMap<GroupId, Steady>,
    not_before: HashMap<GroupId, Instant>,
}

/// Since when a home has been in reach, and kept up.
#[derive(Debug, Clone, Copy)]
struct Steady {
    since: Instant,
    /// The log id that was committed in the last round: by the next the home has it on its disk.
    committed: Option<LogId>,
}

impl LeaderPlacement {
    pub fn new(context: Arc<NodeContext>) -> Self {
        Self {
            context,
            steady: HashMap::new(),
            not_before: HashMap::new(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        while pause::waited(shutdown, TICK).await {
            self.tick().await;
        }
    }

    async fn tick(&mut self) {
        let view = self.context.view();
        let mut due = None;
        for group in self.context.registry.groups() {
            let id = group.key().group;
            let home = view
                .groups
                .get(&id)
                .map(|spec| spec.home)
                .filter(|home| *home != self.context.node && !id.is_meta());
            let target = home.and_then(|home| Some((home, view.replica_on(id, home)?)));
            let Some((home, replica)) = target.filter(|_| group.leads()) else {
                self.steady.remove(&id);
                continue;
            };

            let is_in_reach = self.context.heard_within(home, HEARD_WITHIN)
                && !self.context.registry.reachability().is_unreachable(home);
            if !is_in_reach || !group.is_caught_up(replica) {
                self.steady.remove(&id);
                continue;
            }

            let status = group.status();
            let steady = self.steady.entry(id).or_insert(Steady {
                since: Instant::now(),
                committed: None,
            });
            // One whose disk hangs, or is slow, would hand the shard back at once, if it could be
            // elected at all.
            if status.matched.get(&replica).copied().flatten() < steady.committed {
                self.steady.remove(&id);
                continue;
            }

            steady.committed = status.committed;
            let since = steady.since;
            let held_back = self
                .not_before
                .get(&id)
                .is_some_and(|at| Instant::now() < *at);
            if since.elapsed() >= STEADY_FOR && !held_back && due.is_none() {
                due = Some((group, replica));
            }
        }

        // One at a time: each costs its shard a moment without a leader.
        if let Some((group, replica)) = due {
            self.transfer(&group, replica).await;
        }
    }

    async fn transfer(&mut self, group: &Replica, replica: ReplicaId) {
        let id = group.key().group;
        assert!(!id.is_meta(), "the meta group has no home");
        assert_ne!(
            replica,
            group.key().replica,
            "shard {id} is at home here already"
        );

        self.steady.remove(&id);
        let home = group.status().membership.node_of(replica);
        if let Some(home) = home
            && self
                .context
                .could_lead(home, id, replica, ASK_TIMEOUT)
                .await
                == Some(false)
        {
            // It would only hand the shard on, or not lead it at all.
            self.not_before.insert(id, Instant::now() + RETRY_AFTER);
            return;
        }

        let reason =
            match tokio::time::timeout(TRANSFER_TIMEOUT, group.transfer_leader(replica)).await {
                Ok(Ok(())) => {
                    tracing::info!("shard {id} is led by its home again");
                    return;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it took too long".to_owned(),
            };
        tracing::info!("shard {id} was not handed over to its home: {reason}");
        self.not_before.insert(id, Instant::now() + RETRY_AFTER);
    }
}
