//! Finds out to which peers this node can't connect though they live, and hands over what is led
//! here where the others can't connect to this node.
//!
//! Nobody is looked for without a doubt: a request that was passed on and is not answered raises
//! one. Requests then go by the connections that there are: by another node, which passes them on,
//! or, once most voters of a group say that they can't connect to its leader, to the next leader.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::node::context::NodeContext;
use crate::raft::transport::Resolver as _;
use crate::raft::{Replica, TransferError};
use crate::sm::reach::should_hand_over;
use crate::telemetry::rarely;
use crate::types::{GroupId, NodeId};

/// Between two looks for a peer that can't be connected to.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// The least between two looks: requests to a peer that is slow doubt it all the time.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks for peers that can't connect to this node.
const TICK: Duration = Duration::from_millis(100);
/// Time that a connection may take. One lost packet is not yet a closed way, so it is tried twice.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);
const ATTEMPTS: usize = 2;
/// Peers looked for at once.
const ASKED_AT_ONCE: usize = 32;
/// A peer that was last heard of longer ago is none to go on with.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
const HAND_OVER_TIMEOUT: Duration = Duration::from_millis(150);
/// Time that nodes have to say who leads now.
const ASK_TIMEOUT: Duration = Duration::from_millis(300);
const HANDED_OVER_AT_ONCE: usize = 16;

/// Looks for peers in doubt.
pub struct ReachabilityProbe {
    context: Arc<NodeContext>,
}

impl ReachabilityProbe {
    pub fn new(context: Arc<NodeContext>) -> Self {
        Self { context }
    }

    pub async fn run(self, shutdown: &CancellationToken) {
        let (look, hand_over) = (self.look_around(), self.hand_over());
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = look => {}
            () = hand_over => {}
        }
    }

    /// Looks for the peers in doubt, and again and again for those that were not found.
    async fn look_around(&self) {
        let reachability = self.context.registry.reachability();
        loop {
            tokio::select! {
                biased;
                () = reachability.suspected() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
            let looks = reachability
                .take_suspects()
                .into_iter()
                .map(|node| self.look_for(node));
            futures::stream::iter(looks)
                .buffer_unordered(ASKED_AT_ONCE)
                .collect::<()>()
                .await;
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    async fn look_for(&self, node: NodeId) {
        let reachability = self.context.registry.reachability();
        let Some(peer) = self.context.views().resolve(node) else {
            // It is in no view any more: there is nothing to reach.
            reachability.set_unreachable(node, false);
            return;
        };

        // More than once, since a single attempt may fail by chance.
        let mut is_open = false;
        for _ in 0..ATTEMPTS {
            is_open = is_open
                || self
                    .context
                    .peers
                    .connects(&peer.address, CONNECT_TIMEOUT)
                    .await;
        }
        let is_news = reachability.set_unreachable(node, !is_open);
        let is_heard = self.context.heard_within(node, HEARD_WITHIN);
        match is_open {
            // One that is not heard of either is down, which others tell.
            false if is_news && is_heard => rarely!(
                warn,
                "no connection can be made to {node} at {}, though it is heard of: what is asked \
                of it goes by others",
                peer.address
            ),
            true if is_news => rarely!(
                info,
                "connections to {node} at {} can be made again",
                peer.address
            ),
            true | false => {}
        }
    }

    /// Hands leads over where most of the others can't connect to this node.
    async fn hand_over(&self) {
        let mut given_up: BTreeSet<GroupId> = BTreeSet::new();
        loop {
            tokio::time::sleep(TICK).await;
            given_up.retain(|group| {
                self.context
                    .registry
                    .get(*group)
                    .is_some_and(|group| group.leads())
            });
            let cut_off = self.context.registry.reachability().unreachable_from();
            if cut_off.is_empty() && given_up.is_empty() {
                continue;
            }

            let led = self
                .context
                .registry
                .groups()
                .into_iter()
                .filter(|group| group.leads());
            let (left, led): (Vec<_>, Vec<_>) =
                led.partition(|group| given_up.contains(&group.key().group));

            // Their new leaders can't connect to this node, so its replicas have to ask who leads.
            for some in left.chunks(HANDED_OVER_AT_ONCE) {
                join_all(some.iter().map(|group| self.find_successor(group))).await;
            }
            let due: Vec<Arc<Replica>> = led
                .into_iter()
                .filter(|group| self.is_cut_off(group, &cut_off))
                .collect();
            for some in due.chunks(HANDED_OVER_AT_ONCE) {
                let ended = join_all(some.iter().map(|group| self.give_up(group, &cut_off))).await;
                given_up.extend(ended.into_iter().flatten());
            }
        }
    }

    fn is_cut_off(&self, group: &Replica, cut_off: &BTreeSet<NodeId>) -> bool {
        let voters = group.watch().borrow().membership.voters.clone();
        let others: Vec<NodeId> = voters
            .into_values()
            .filter(|node| *node != self.context.node)
            .collect();
        should_hand_over(&others, cut_off, |node| {
            self.context.heard_within(node, HEARD_WITHIN)
        })
    }

    /// Hands a lead to one of those that can't connect to this node: another might bring it back.
    /// Returns the group if it was told to go on without this node.
    async fn give_up(&self, group: &Replica, cut_off: &BTreeSet<NodeId>) -> Option<GroupId> {
        let id = group.key().group;
        let to = group.best_successor_among(|node| cut_off.contains(&node))?;
        match group.transfer_leader_within(to, HAND_OVER_TIMEOUT).await {
            // Late: it may have been taken over, and nobody can say so.
            Ok(()) | Err(TransferError::Late { .. }) => {}
            Err(error) => {
                rarely!(
                    warn,
                    "most can't connect to this node, and group {id} is not handed over: {error}"
                );
                return None;
            }
        }
        rarely!(
            warn,
            "group {id} is handed over: most can't connect to this node"
        );
        self.find_successor(group).await;
        Some(id)
    }

    /// Has this node's replica follow whoever leads now.
    async fn find_successor(&self, group: &Replica) {
        let voters = group.watch().borrow().membership.voters.clone();
        let deadline = Instant::now() + ASK_TIMEOUT;
        let asked = voters
            .into_iter()
            .filter(|(_, node)| *node != self.context.node);
        join_all(asked.map(|(replica, node)| group.discover_leader(replica, node, deadline))).await;
    }
}
