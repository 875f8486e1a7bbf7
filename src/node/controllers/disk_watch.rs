//! [`DiskWatch`]: looks at how much of the disk is left. Where it is little, this node takes no
//! writes of clients (`Replica::propose`), tells the others, and its leads go to nodes that have
//! more; when there is room again it takes writes by itself, and what waited for room goes on.
//! Where a majority of a shard's voters have told so, its leader takes no writes either.
//!
//! Another node is asked before it is given a lead, and leads come home only to one with room
//! (`leader_placement`): so where all disks are full, leads stay where they are.
//!
//! Invariant: the looks wait for no other node. Reports go out beside them, one at a time to each
//! node, and so do leads ([`DiskHandOver`]).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::peer::DiskReport;
use crate::blocking;
use crate::node::context::NodeContext;
use crate::node::pause;
use crate::raft::Replica;
use crate::sm::disk_level::DiskLevel;
use crate::storage::log::Log;
use crate::storage::map::MapStore;
use crate::telemetry::Rarely;
use crate::types::{DirectoryId, GroupId, NodeId};

/// At the rate of a fast disk, so long takes what is left some way below the reserve and no
/// further.
const TICK: Duration = Duration::from_millis(500);
/// Between two attempts to hand a shard over.
const HAND_OVER_EVERY: Duration = Duration::from_secs(30);
/// Between two reports to the others of a disk that is nearly full.
const REPORT_EVERY: Duration = Duration::from_secs(2);
/// A node that was last heard of longer ago than this is given no lead.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(3);

/// Looks at the disk.
pub struct DiskWatch {
    context: Arc<NodeContext>,
    log: Log,
    states: Arc<MapStore>,
    level: DiskLevel,
    reports: DiskReports,
    directory: DirectoryId,
    unseen: Rarely,
}

/// Remembers what each other node was told, and the reports that are under way.
#[derive(Default)]
struct DiskReports {
    /// The level that each node was told last, and when.
    told: HashMap<NodeId, (DiskLevel, Instant)>,
    /// Ends with the node that each was for.
    under_way: JoinSet<NodeId>,
    busy: BTreeSet<NodeId>,
}

/// Gives the shards that are led here to nodes with more room, while there is little here.
pub struct DiskHandOver {
    context: Arc<NodeContext>,
    log: Log,
    not_before: HashMap<GroupId, Instant>,
}

impl DiskWatch {
    pub fn new(
        context: Arc<NodeContext>,
        log: Log,
        states: Arc<MapStore>,
        directory: DirectoryId,
    ) -> Self {
        Self {
            context,
            log,
            states,
            level: DiskLevel::Ample,
            reports: DiskReports::default(),
            directory,
            unseen: Rarely::new(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        loop {
            self.tick().await;
            if !pause::waited(shutdown, TICK).await {
                return;
            }
        }
    }

    async fn tick(&mut self) {
        let log = self.log.clone();
        let looked = blocking::start(move || log.look_for_room()).await;
        if let Ok(Err(error)) = looked
            && let Some(left_out) = self.unseen.due()
        {
            tracing::warn!(%error, left_out, "how much of the disk is left can't be seen");
        }

        let level = self.log.disk_level();
        if level != self.level {
            self.tell(level);
            self.level = level;
        }
        self.report(level);
        self.note_levels_of_voters(level);

        // Checkpoints wait where there is no room: each look lets them try again.
        self.states.write_what_waited_for_room();
    }

    /// Tells the other nodes how full the disk is, as long as that matters, and once more.
    fn report(&mut self, level: DiskLevel) {
        self.reports.note_ends();
        let view = self.context.view();
        self.reports
            .told
            .retain(|node, _| view.nodes.contains_key(node));
        for (id, node) in &view.nodes {
            if *id == self.context.node || !self.reports.is_due(*id, level) {
                continue;
            }
            let (context, id, address) = (self.context.clone(), *id, node.address.clone());
            let report = DiskReport {
                cluster: context.cluster,
                directory: self.directory,
                level,
            };
            self.reports.start(id, level, async move {
                let told = context
                    .peers
                    .report_disk(&address, &report, ASK_TIMEOUT)
                    .await;
                if let Err(error) = told {
                    tracing::debug!("how full the disk is here was not reported: {error}");
                }
                id
            });
        }
    }

    /// Has the leaders here know whether a majority could take what they propose.
    fn note_levels_of_voters(&self, own: DiskLevel) {
        for group in self.context.registry.groups() {
            if group.key().group.is_meta() {
                continue;
            }
            let voters = group.status().membership.voters;
            let levels = voters
                .values()
                .map(|node| match *node == self.context.node {
                    true => own,
                    false => self.context.full_disks.level_of(*node),
                });
            group.set_voters_disk_level(DiskLevel::of_majority(levels));
        }
    }

    fn tell(&self, level: DiskLevel) {
        let (free, reserve) = self.log.free_bytes();
        let (free_mib, reserve_mib) = (free >> 20, reserve >> 20);
        match level {
            DiskLevel::Ample => {
                tracing::info!(free_mib, "the disk has room again: writes are taken")
            }
            DiskLevel::Low => {
                // Said once for each change, and a disk at the limit does not go to and fro.
                tracing::error!(
                    free_mib,
                    reserve_mib,
                    "the disk is nearly full: writes are refused here but for deletions, reads go \
                    on"
                );
            }
            DiskLevel::Spent => {
                // Said once, as above.
                tracing::error!(
                    free_mib,
                    reserve_mib,
                    "the disk is full: this node takes no entries of others either"
                );
            }
        }
    }
}

impl DiskReports {
    /// Returns whether a node is to be told of this level now. A disk with room is no news: an idle
    /// cluster sends nothing. That it has room again is told once.
    fn is_due(&self, node: NodeId, level: DiskLevel) -> bool {
        let is_news = match self.told.get(&node) {
            None => level != DiskLevel::Ample,
            Some((told, at)) => {
                let is_old = at.elapsed() >= REPORT_EVERY;
                *told != level || (level != DiskLevel::Ample && is_old)
            }
        };
        is_news && !self.busy.contains(&node)
    }

    fn start(
        &mut self,
        node: NodeId,
        level: DiskLevel,
        report: impl Future<Output = NodeId> + Send + 'static,
    ) {
        self.told.insert(node, (level, Instant::now()));
        self.busy.insert(node);
        self.under_way.spawn(report);
    }

    fn note_ends(&mut self) {
        while let Some(ended) = self.under_way.try_join_next() {
            match ended {
                Ok(node) => drop(self.busy.remove(&node)),
                // Ends the process, as if it had panicked here.
                Err(error) => {
                    if let Ok(panic) = error.try_into_panic() {
                        std::panic::resume_unwind(panic);
                    }
                }
            }
        }
    }
}

impl DiskHandOver {
    pub fn new(context: Arc<NodeContext>, log: Log) -> Self {
        Self {
            context,
            log,
            not_before: HashMap::new(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        while pause::waited(shutdown, TICK).await {
            // As of the last look.
            if self.log.disk_level() == DiskLevel::Ample {
                self.not_before.clear();
            } else {
                self.hand_over().await;
            }
        }
    }

    /// Gives the shards that are led here to nodes with more room, one after another.
    async fn hand_over(&mut self) {
        let mut asked: HashMap<NodeId, bool> = HashMap::new();
        for group in self.context.registry.groups() {
            let id = group.key().group;
            let is_due = self
                .not_before
                .get(&id)
                .is_none_or(|at| Instant::now() >= *at);
            if id.is_meta() || !group.leads() || !is_due {
                continue;
            }
            self.not_before.insert(id, Instant::now() + HAND_OVER_EVERY);
            self.hand_over_group(&group, &mut asked).await;
        }
    }

    async fn hand_over_group(&self, group: &Replica, asked: &mut HashMap<NodeId, bool>) {
        let (id, status) = (group.key().group, group.status());
        for (replica, node) in &status.membership.voters {
            let is_other = *node != self.context.node && !status.membership.is_witness(*replica);
            if !is_other
                || !self.context.heard_within(*node, HEARD_WITHIN)
                || !group.is_caught_up(*replica)
            {
                continue;
            }

            // A node is asked once in a round, whatever the number of its shards.
            let has_room = match asked.get(node) {
                Some(has_room) => *has_room,
                None => self.context.has_room(*node, ASK_TIMEOUT).await == Some(true),
            };
            asked.insert(*node, has_room);
            if !has_room {
                continue;
            }
            match tokio::time::timeout(TRANSFER_TIMEOUT, group.transfer_leader(*replica)).await {
                Ok(Ok(())) => {
                    return tracing::info!(
                        "shard {id} was handed over to node {node}, whose disk has room"
                    );
                }
                Ok(Err(error)) => {
                    tracing::info!("shard {id} was not handed over to node {node}: {error}")
                }
                Err(_) => tracing::info!(
                    "shard {id} was not handed over to node {node}: it took too long"
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::{ScriptedTransport, TestContext, respond, silent};

    #[tokio::test(start_paused = true)]
    async fn a_node_that_says_nothing_holds_up_neither_the_looks_nor_other_reports() {
        let dead: crate::types::Address = "10.0.0.1:1".parse().expect("an address");
        let hangs = dead.clone();
        let transport = ScriptedTransport::new(move |call| match call.address == hangs {
            true => silent(),
            false => respond(200, "null"),
        });
        let node = TestContext::new(3, &transport);
        let (context, directory) = (node.context.clone(), node.joining.directory_id());
        let (log, states) = (node.log.clone(), node.states.clone());
        let mut watch = DiskWatch::new(context, log, states, directory);
        let other = "10.0.0.2:1".parse().expect("an address");

        let (began, mut rounds) = (Instant::now(), 0);
        while began.elapsed() < REPORT_EVERY * 5 {
            watch.report(DiskLevel::Low);
            tokio::time::sleep(TICK).await;
            rounds += 1;
        }
        assert_eq!(rounds, 20, "each look came in time");
        assert_eq!(transport.calls_to(&other), 5);

        watch.report(DiskLevel::Ample);
        tokio::time::sleep(TICK).await;
        assert_eq!(
            transport.calls_to(&other),
            6,
            "that it has room again is told"
        );
        watch.report(DiskLevel::Ample);
        tokio::time::sleep(TICK).await;
        assert_eq!(transport.calls_to(&other), 6, "once");
    }
}
