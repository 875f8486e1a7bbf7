//! Finds out who leads a shard, for requests that are sent there or passed on.
//!
//! A replica that hears its leader knows. Everybody else asks: nodes without a replica, those whose
//! replica has stopped or that hear nothing. Invariant: a node is named only if it has shown within
//! two heartbeats that it leads, to this node itself. What came through a relay shows nothing, and
//! what others say of a third one is no more than a hint.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::{BoxFuture, select_all};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::context::{LeaderQuestion, NodeContext, PeerPlace};
use crate::api::protocol::{Hop, ShardBody, ShardReply, ShardRequest};
use crate::api::store::{Consistency, Failure};
use crate::raft::Replica;
use crate::routing::backoff::Backoff;
use crate::routing::call::{CallError, time_to_answer_ms};
use crate::types::{GroupId, NodeId};

/// Requests of a node that wait for a leader at once, whichever shard it is of. Past it they are
/// refused: each keeps its body, and a cluster without a quorum must not collect requests for ever.
const WAITING_MAX: usize = 10_000;

/// Time for which the leader is looked for in one go. Another is elected by then, and whoever still
/// waits looks again.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// Time that the likeliest node has to answer before the others are asked too.
const OTHERS_AFTER: Duration = Duration::from_millis(200);

/// Pauses before a node that does not lead is asked again. Another is elected within a second.
const ASK_AGAIN: Backoff = Backoff {
    first: Duration::from_millis(50),
    longest: Duration::from_millis(400),
};

/// Those who have waited for a leader go on spread by so much each: it has just begun.
const SPREAD_EACH: Duration = Duration::from_micros(10);

/// Finds the leaders of shards.
pub struct Locator {
    searcher: Arc<LeaderSearcher>,
    /// Searches under way, as long as anybody waits for them.
    searches: Mutex<HashMap<GroupId, Weak<LeaderSearch>>>,
    places: Semaphore,
}

/// A search for the leader of a shard, which several wait for.
struct LeaderSearch {
    /// Locked by the one who carries it on. The others are woken when it is over, and not by each
    /// answer; and when that one gives up, the next goes on from there.
    asking: tokio::sync::Mutex<BoxFuture<'static, Option<NodeId>>>,
    /// Holds what it has found, once it is over.
    outcome: watch::Sender<Option<Option<NodeId>>>,
}

/// Asks other nodes whether they lead.
struct LeaderSearcher {
    context: Arc<NodeContext>,
}

/// Answer of a node to the question whether it leads.
enum Answer {
    Yes(LeaderQuestion),
    No,
    /// Another does, to which this node can't connect.
    OutOfReach,
}

impl Locator {
    pub fn new(context: Arc<NodeContext>) -> Self {
        Self {
            searcher: Arc::new(LeaderSearcher { context }),
            searches: Mutex::default(),
            places: Semaphore::new(WAITING_MAX),
        }
    }

    fn context(&self) -> &NodeContext {
        &self.searcher.context
    }

    /// Returns the replica of the shard here that hears of its leaders: none on its way out, and
    /// none that has stopped.
    fn replica(&self, shard: GroupId) -> Option<Arc<Replica>> {
        let group = self.context().staying_replica(shard)?;
        let has_failed = group.watch().borrow().failure.is_some();
        Some(group).filter(|_| !has_failed)
    }

    /// Returns the node that leads the shard, this one too, if that is known without asking.
    pub fn known(&self, shard: GroupId) -> Option<NodeId> {
        let Some(group) = self.replica(shard) else {
            return self.context().shown_leader(shard, None);
        };
        if group.leads() {
            return Some(self.context().node);
        }
        group
            .leader_to_name()
            .or_else(|| self.context().shown_leader(shard, Some(&group)))
    }

    /// Returns the node that leads the shard, this one too: as soon as it is known, or none when
    /// the time is over or the leader can't be connected to.
    ///
    /// # Errors
    ///
    /// Fails if too many requests wait for leaders already.
    pub async fn find(&self, shard: GroupId, deadline: Instant) -> Result<Option<NodeId>, Failure> {
        // Before the look: a change that comes after it is not missed.
        let mut changed = Box::pin(self.lead_changed(shard));
        if let Some(known) = self.known(shard) {
            return Ok(Some(known));
        }

        let place = self.places.try_acquire();
        let _place = place.map_err(|_| Failure::Overloaded {
            limit: "requests waiting for a leader".to_owned(),
            retry_after_ms: 1000,
        })?;

        let heard = async {
            loop {
                changed.await;
                changed = Box::pin(self.lead_changed(shard));
                if let Some(known) = self.known(shard) {
                    return known;
                }
            }
        };

        // Whatever comes first: word of a leader, or the answer of one that was asked.
        let search = self.search(shard);
        let found = tokio::select! {
            biased;
            known = heard => Some(known),
            found = timeout_at(deadline, search.outcome()) => found.ok().flatten(),
        };
        if found.is_some() {
            spread(&search, deadline).await;
        }
        Ok(found)
    }

    /// Resolves when the replica here hears of another leader than at the call, or of one again;
    /// never where there is none.
    pub fn lead_changed(&self, shard: GroupId) -> impl Future<Output = ()> + Send + use<> {
        let group = self.replica(shard);

        // At the call, not when it is first waited for: a change in between is one.
        let before = group.as_ref().and_then(|group| group.lead());
        async move {
            match group {
                Some(group) => group.lead_changed_since(before).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Returns the search for the leader of a shard that is under way, or a new one.
    fn search(&self, shard: GroupId) -> Arc<LeaderSearch> {
        let mut searches = self.searches.lock();
        let under_way = searches
            .get(&shard)
            .and_then(Weak::upgrade)
            .filter(|search| !search.is_over());
        if let Some(search) = under_way {
            return search;
        }

        searches.retain(|_, search| search.strong_count() > 0);
        let searcher = Arc::clone(&self.searcher);
        let search = Arc::new(LeaderSearch {
            asking: tokio::sync::Mutex::new(Box::pin(async move { searcher.search(shard).await })),
            outcome: watch::Sender::new(None),
        });
        searches.insert(shard, Arc::downgrade(&search));
        search
    }
}

impl LeaderSearch {
    fn is_over(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    /// Returns what is found, once the search is over.
    async fn outcome(&self) -> Option<NodeId> {
        let mut outcome = self.outcome.subscribe();
        let carry_on = async {
            let mut asking = self.asking.lock().await;
            if !self.is_over() {
                let found = asking.as_mut().await;
                self.outcome.send_replace(Some(found));
            }
        };
        tokio::select! {
            biased;
            _ = outcome.wait_for(Option::is_some) => {}
            () = carry_on => {}
        }
        self.outcome.borrow().flatten()
    }
}

/// Waits so that those who waited for the same search don't come to the leader all at once, for no
/// more than half of the time that is left: with none the outcome of a write would not be known.
async fn spread(search: &Arc<LeaderSearch>, deadline: Instant) {
    let others = Arc::strong_count(search).saturating_sub(1);
    let span = SPREAD_EACH.saturating_mul(u32::try_from(others).unwrap_or(u32::MAX));
    let left = deadline.saturating_duration_since(Instant::now());
    let span_us = u64::try_from(span.min(left / 2).as_micros()).unwrap_or(u64::MAX);
    if span_us > 0 {
        sleep(Duration::from_micros(rand::random::<u64>() % span_us)).await;
    }
}

impl LeaderSearcher {
    /// Asks who leads, for a while.
    async fn search(&self, shard: GroupId) -> Option<NodeId> {
        let (leader, question) = self.ask_around(shard).await?;
        self.context.note_leader(shard, leader, question);
        Some(leader)
    }

    /// Asks the likeliest node first, the others a moment later, and each again until one leads.
    async fn ask_around(&self, shard: GroupId) -> Option<(NodeId, LeaderQuestion)> {
        let refused = CancellationToken::new();
        let ask = |(place, peer): (usize, PeerPlace)| {
            let refused = &refused;
            Box::pin(async move {
                // Mostly the likeliest one leads, and each that is asked costs its group a quorum
                // round.
                if place > 0 {
                    let _ = timeout(OTHERS_AFTER, refused.cancelled()).await;
                }
                let mut attempts = 0;
                loop {
                    match self.ask(shard, &peer).await {
                        Answer::Yes(question) => return Some((peer.node, question)),
                        Answer::OutOfReach => return None,
                        Answer::No => {}
                    }

                    // One "no" is enough: the others are asked at once.
                    refused.cancel();
                    sleep(ASK_AGAIN.pause_after(attempts, rand::random())).await;
                    attempts += 1;
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
        let question = self.context.leader_question(shard);
        let call = self
            .context
            .caller
            .call_by(Hop::Answer, &peer.address, &request, LOOK_MAX);
        match call.await {
            Ok(ShardReply::GotMany(_)) => Answer::Yes(question),
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

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures::future::join_all;

    use super::*;
    use crate::node::testing::{ScriptedTransport, TestContext, reply_after, silent};

    const SHARD: GroupId = GroupId(1);

    fn no_leader() -> ShardReply {
        ShardReply::Failed(Failure::Unavailable {
            reason: "no leader".to_owned(),
            retry_after_ms: 1000,
        })
    }

    fn in_time(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_does_not_lead_is_asked_ever_more_seldom() {
        let transport = ScriptedTransport::new(|_| reply_after(Duration::ZERO, &no_leader()));
        let node = TestContext::new(5, &transport);
        let locator = Locator::new(node.context.clone());

        let found = locator.find(SHARD, in_time(60)).await;
        assert_eq!(found, Ok(None));
        for (_, address) in node.replicas_of(SHARD) {
            let asked = transport.calls_to(&address);
            assert!(
                (3..=15).contains(&asked),
                "{address} was asked {asked} times"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_search_goes_on_for_others_when_the_one_who_began_it_gives_up() {
        let answer = ShardReply::GotMany(Vec::new());
        let transport =
            ScriptedTransport::new(move |_| reply_after(Duration::from_millis(150), &answer));
        let node = TestContext::new(5, &transport);
        let locator = Locator::new(node.context.clone());

        let short = locator.find(SHARD, Instant::now() + Duration::from_millis(100));
        let long = async {
            sleep(Duration::from_millis(50)).await;
            locator.find(SHARD, in_time(60)).await
        };
        let (given_up, found) = tokio::join!(short, long);
        assert_eq!(given_up, Ok(None));
        assert!(matches!(found, Ok(Some(_))), "{found:?}");
        assert_eq!(transport.calls().len(), 1, "{:?}", transport.calls());
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_requests_wait_for_a_leader() {
        let transport = ScriptedTransport::new(|_| silent());
        let node = TestContext::new(5, &transport);
        let locator = Locator::new(node.context.clone());

        let mut waiting = Vec::new();
        for _ in 0..WAITING_MAX {
            let mut find = Box::pin(locator.find(SHARD, in_time(60)));
            assert!(futures::poll!(&mut find).is_pending());
            waiting.push(find);
        }
        let refused = futures::poll!(Box::pin(locator.find(SHARD, in_time(60))));
        assert!(
            matches!(refused, Poll::Ready(Err(Failure::Overloaded { .. }))),
            "{refused:?}"
        );

        waiting.pop();
        let mut find = Box::pin(locator.find(SHARD, in_time(60)));
        assert!(
            futures::poll!(&mut find).is_pending(),
            "there is a place again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_waited_do_not_go_on_at_the_same_moment() {
        let answer = ShardReply::GotMany(Vec::new());
        let transport =
            ScriptedTransport::new(move |_| reply_after(Duration::from_millis(100), &answer));
        let node = TestContext::new(5, &transport);
        let locator = Locator::new(node.context.clone());

        let waits = (0..2000).map(|_| async {
            let found = locator.find(SHARD, in_time(60)).await;
            assert!(matches!(found, Ok(Some(_))), "{found:?}");
            Instant::now()
        });
        let moments = join_all(waits).await;
        let (first, last) = (moments.iter().min(), moments.iter().max());
        let spread = last.expect("some").duration_since(*first.expect("some"));
        assert!(spread >= Duration::from_millis(5), "{spread:?}");
        assert_eq!(transport.calls().len(), 1);
    }
}
