//! Finds out who leads a shard, for requests that are sent there or passed on.
//!
//! A replica that hears its leader knows. Everybody else asks: nodes without a replica, those whose
//! replica has stopped or that hear nothing. Invariant: a node is named only if it has shown within
//! two heartbeats that it leads, to this node itself. What came through a relay shows nothing, and
//! what others say of a third one is no more than a hint.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::select_all;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::context::{NodeContext, PeerPlace};
use crate::api::protocol::{Hop, ShardBody, ShardReply, ShardRequest};
use crate::api::store::{Consistency, Failure};
use crate::raft::Replica;
use crate::routing::call::{CallError, time_to_answer_ms};
use crate::types::{GroupId, NodeId};

/// Time for which the leader is looked for in one go. Another is elected by then, and whoever still
/// waits looks again.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// Time that the likeliest node has to answer before the others are asked too.
const OTHERS_AFTER: Duration = Duration::from_millis(200);

/// Pause before a node that does not lead is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Finds the leaders of shards.
pub struct Locator {
    context: Arc<NodeContext>,
    looks: Mutex<HashMap<GroupId, Arc<LeaderSearch>>>,
}

/// Result of the last search for the leader of a shard, and when it ended; locked while one is
/// under way.
type LeaderSearch = tokio::sync::Mutex<Option<(Instant, Option<NodeId>)>>;

/// Answer of a node to the question whether it leads.
enum Answer {
    Yes,
    No,
    /// Another does, to which this node can't connect.
    OutOfReach,
}

impl Locator {
    pub fn new(context: Arc<NodeContext>) -> Self {
        Self {
            context,
            looks: Mutex::default(),
        }
    }

    /// Returns the replica of the shard here that hears of its leaders: none on its way out, and
    /// none that has stopped.
    fn replica(&self, shard: GroupId) -> Option<Arc<Replica>> {
        let group = self.context.staying_replica(shard)?;
        let has_failed = group.watch().borrow().failure.is_some();
        Some(group).filter(|_| !has_failed)
    }

    /// Returns the node that leads the shard, this one too, if that is known without asking.
    pub fn known(&self, shard: GroupId) -> Option<NodeId> {
        let Some(group) = self.replica(shard) else {
            return self.context.shown_leader(shard, None);
        };
        if group.leads() {
            return Some(self.context.node);
        }
        group
            .leader_to_name()
            .or_else(|| self.context.shown_leader(shard, Some(&group)))
    }

    /// Returns the node that leads the shard, this one too: as soon as it is known, or none when
    /// the time is over or the leader can't be connected to.
    pub async fn find(&self, shard: GroupId, deadline: Instant) -> Option<NodeId> {
        if let Some(known) = self.known(shard) {
            return Some(known);
        }
        let heard = async {
            loop {
                self.lead_changed(shard).await;
                if let Some(known) = self.known(shard) {
                    return known;
                }
            }
        };

        // Whatever comes first: word of a leader, or the answer of one that was asked.
        tokio::select! {
            biased;
            known = heard => Some(known),
            found = timeout_at(deadline, self.look(shard)) => found.ok().flatten(),
        }
    }

    /// Resolves when the replica here hears of another leader than at the call, or of one again;
    /// never where there is none.
    pub async fn lead_changed(&self, shard: GroupId) {
        match self.replica(shard) {
            Some(group) => group.lead_changed().await,
            None => std::future::pending().await,
        }
    }

    /// Asks who leads, or waits for the answer to another request that asks.
    async fn look(&self, shard: GroupId) -> Option<NodeId> {
        let began = Instant::now();
        let look = {
            let mut looks = self.looks.lock();
            // One that is held elsewhere is in use.
            looks.retain(|_, look| Arc::strong_count(look) > 1);
            Arc::clone(looks.entry(shard).or_default())
        };
        let mut last = look.lock().await;

        // A search that ended after this request began answers it too.
        if let Some((_, found)) = last.filter(|(at, _)| *at > began) {
            return found;
        }

        let found = self.ask_around(shard).await;
        if let Some(leader) = found {
            self.context.note_leader(shard, leader);
        }
        *last = Some((Instant::now(), found));
        found
    }

    /// Asks the likeliest node first, the others a moment later, and each again until one leads.
    async fn ask_around(&self, shard: GroupId) -> Option<NodeId> {
        let refused = CancellationToken::new();
        let ask = |(place, peer): (usize, PeerPlace)| {
            let refused = &refused;
            Box::pin(async move {
                // Mostly the likeliest one leads, and each that is asked costs its group a quorum
                // round.
                if place > 0 {
                    let _ = timeout(OTHERS_AFTER, refused.cancelled()).await;
                }
                loop {
                    match self.ask(shard, &peer).await {
                        Answer::Yes => return Some(peer.node),
                        Answer::OutOfReach => return None,
                        Answer::No => {}
                    }

                    // One "no" is enough: the others are asked at once.
                    refused.cancel();
                    sleep(ASK_AGAIN).await;
                }
            })
        };
        let asked: Vec<_> = self
            .context
            .peers_of(shard)
            .into_iter()
            .enumerate()
            .map(ask)
            .collect();
        if asked.is_empty() {
            return None;
        }
        let (found, ..) = timeout(LOOK_MAX, select_all(asked)).await.ok()?;
        found
    }

    /// Asks a node whether it leads the shard: only a leader can read nothing of it, if that is
    /// confirmed by a quorum.
    async fn ask(&self, shard: GroupId, peer: &PeerPlace) -> Answer {
        let request = ShardRequest {
            cluster: self.context.cluster,
            shard,
            timeout_ms: time_to_answer_ms(LOOK_MAX),
            body: ShardBody::GetMany {
                keys: Vec::new(),
                bytes_max: 0,
                keys_only: true,
                consistency: Consistency::Linearizable,
            },
        };
        let reachability = self.context.registry.reachability();
        let call = self
            .context
            .caller
            .call_by(Hop::Answer, &peer.address, &request, LOOK_MAX);
        match call.await {
            Ok(ShardReply::GotMany(_)) => Answer::Yes,
            Ok(ShardReply::Failed(Failure::Elsewhere { address, .. })) => {
                let leader = self.context.map().node_named(&address);
                match leader.is_some_and(|leader| reachability.is_unreachable(leader)) {
                    true => Answer::OutOfReach,
                    false => Answer::No,
                }
            }
            Ok(_) | Err(CallError::Refused { .. }) => Answer::No,
            Err(CallError::NotConnected { .. } | CallError::NoAnswer { .. }) => {
                // It may be out of reach for this node alone: that is looked into.
                reachability.suspect(peer.node);
                Answer::No
            }
        }
    }
}
