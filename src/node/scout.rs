//! Finds out to which peers this node can't connect though they live, and hands over what is led
//! here where the others can't connect to this node.
//!
//! Nobody is looked for without a doubt: a request that was passed on and is not answered raises
//! one. Requests then go by the connections that there are: by another node, which passes them on,
//! or, once most voters of a group say that they can't connect to its leader, to the next leader.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::member::Member;
use crate::client::enquiry::takes_connections;
use crate::raft::Group;
use crate::raft::transport::Resolver as _;
use crate::sm::reach::should_hand_over;
use crate::telemetry::rarely;
use crate::types::{GroupId, NodeId};

/// Between two looks for a peer that can't be connected to.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// The least between two looks: requests to a peer that is slow doubt it all the time.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks for peers that can't connect to this node.
const TICK: Duration = Duration::from_millis(100);
/// How long a connection may take. One lost packet is not yet a closed way, so it is tried twice.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);
const ATTEMPTS: usize = 2;
/// Peers looked for at once.
const ASKED_AT_ONCE: usize = 32;
/// A peer that was last heard of longer ago is none to go on with.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);
const HANDED_OVER_AT_ONCE: usize = 16;
/// A group whose lead could not be handed over is left alone for so long.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Looks for peers in doubt.
pub struct Scout {
    member: Arc<Member>,
}

impl Scout {
    pub fn new(member: Arc<Member>) -> Self {
        Self { member }
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
        let ways = self.member.registry.ways();
        loop {
            tokio::select! {
                biased;
                () = ways.doubted() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
            let looks = ways.take_doubts().into_iter().map(|node| self.look_for(node));
            futures::stream::iter(looks).buffer_unordered(ASKED_AT_ONCE).collect::<()>().await;
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    async fn look_for(&self, node: NodeId) {
        let ways = self.member.registry.ways();
        let Some(peer) = self.member.views().resolve(node) else {
            ways.set_closed(node, false);
            return;
        };

        let mut is_open = false;
        for _ in 0..ATTEMPTS {
            is_open = is_open || takes_connections(&peer.address, CONNECT_TIMEOUT).await;
        }
        let is_news = ways.set_closed(node, !is_open);
        let is_heard = self.member.heard_within(node, HEARD_WITHIN);
        match is_open {
            false if is_news && is_heard => rarely!(
                warn,
                "no connection can be made to {node} at {}, though it is heard of: what is asked of it goes by others",
                peer.address
            ),
            true if is_news => rarely!(info, "connections to {node} at {} can be made again", peer.address),
            true | false => {}
        }
    }

    /// Hands leads over where most of the others can't connect to this node.
    async fn hand_over(&self) {
        let mut tried: HashMap<GroupId, Instant> = HashMap::new();
        loop {
            tokio::time::sleep(TICK).await;
            tried.retain(|_, at| at.elapsed() < RETRY_AFTER);
            let cut_off = self.member.registry.ways().telling();
            if cut_off.is_empty() {
                continue;
            }

            let is_due = |group: &Arc<Group>| group.leads() && !tried.contains_key(&group.key().group);
            let groups = self.member.registry.groups().into_iter().filter(is_due);
            let due: Vec<Arc<Group>> = groups
                .filter(|group| {
                    let voters = group.watch().borrow().membership.voters.clone();
                    let others: Vec<NodeId> = voters.into_values().filter(|node| *node != self.member.node).collect();
                    should_hand_over(&others, &cut_off, |node| self.member.heard_within(node, HEARD_WITHIN))
                })
                .collect();
            tried.extend(due.iter().map(|group| (group.key().group, Instant::now())));
            for some in due.chunks(HANDED_OVER_AT_ONCE) {
                join_all(some.iter().map(|group| self.give_up(group, &cut_off))).await;
            }
        }
    }

    /// Hands a lead to one of those that can't connect to this node: another might bring it back.
    async fn give_up(&self, group: &Group, cut_off: &BTreeSet<NodeId>) {
        let id = group.key().group;
        let Some(to) = group.best_successor_among(|node| cut_off.contains(&node)) else { return };
        match group.transfer_leader_within(to, HAND_OVER_TIMEOUT).await {
            Ok(()) => rarely!(warn, "group {id} is led by another node now: most could not connect to this one"),
            Err(error) => rarely!(warn, "most can't connect to this node, and group {id} was not handed over: {error}"),
        }
    }
}
