//! [`HomeProbe`]: names the node that a client is to ask about a shard: its home, or, while that
//! does not answer, the node that leads instead.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::call::ShardCaller;
use super::reply::{self, VIEW_BYTES_MAX};
use super::transport::NodeCall;
use crate::api::peer::{Identity, Standing};
use crate::api::shard_map::{NodePlace, ShardMap};
use crate::types::{Address, GroupId, NodeId};

/// Time that a home has to answer which does not lead. Whoever asks waits too.
const ASK_TIMEOUT: Duration = Duration::from_millis(300);
/// TTL of an answer, and of silence.
const FRESH_FOR: Duration = Duration::from_secs(1);

/// Tells whom to ask, and remembers for a moment which homes answered.
#[derive(Debug)]
pub struct HomeProbe {
    caller: ShardCaller,
    ask_timeout: Duration,
    /// Answers to the question whether a node is a member.
    members: ProbeCache,
}

/// Answers of nodes to one question, for a moment. Those who ask about one node meanwhile share
/// the answer; a node that says nothing holds up nobody who asks about another.
#[derive(Debug, Default)]
struct ProbeCache {
    nodes: Mutex<HashMap<Address, Arc<ProbeCell>>>,
}

/// Held while its node is asked.
type ProbeCell = tokio::sync::Mutex<Option<ProbeAnswer>>;

#[derive(Debug, Clone, Copy)]
struct ProbeAnswer {
    at: Instant,
    yes: bool,
}

impl ProbeCache {
    /// Returns what a node answered a moment ago, or asks it.
    async fn recall(&self, address: &Address, ask: impl Future<Output = bool>) -> bool {
        let cell = self.cell(address);

        // Held while the node is asked, so that all who ask about it meanwhile share one question.
        let mut heard = cell.lock().await;
        if let Some(known) = heard.filter(Self::is_fresh) {
            return known.yes;
        }

        let yes = ask.await;
        *heard = Some(ProbeAnswer {
            at: Instant::now(),
            yes,
        });
        yes
    }

    fn cell(&self, address: &Address) -> Arc<ProbeCell> {
        let mut nodes = self.nodes.lock();
        // One that is locked is in use.
        nodes.retain(|_, cell| {
            cell.try_lock().map_or(true, |heard| {
                heard.is_some_and(|heard| Self::is_fresh(&heard))
            })
        });
        nodes.entry(address.clone()).or_default().clone()
    }

    fn is_fresh(heard: &ProbeAnswer) -> bool {
        heard.at.elapsed() < FRESH_FOR
    }
}

impl HomeProbe {
    pub fn new(caller: ShardCaller) -> Self {
        Self {
            caller,
            ask_timeout: ASK_TIMEOUT,
            members: ProbeCache::default(),
        }
    }

    /// Returns the name in the view of the node to ask about `shard`; None if there is no such
    /// shard. `leader` is who answered for it last, if that is known; only where it is not the
    /// home, the home is asked, by the address to reach it by, whether it is there.
    pub async fn node_to_ask(
        &self,
        map: &ShardMap,
        shard: GroupId,
        leader: Option<NodeId>,
        reach: impl Fn(&NodePlace) -> &Address,
    ) -> Option<Address> {
        let home = map.shard(shard)?.home;
        let at_home = map.node(home);
        let instead = leader
            .filter(|leader| *leader != home)
            .and_then(|leader| map.node(leader));
        let named = match (at_home, instead) {
            // The home is named while it answers, although another leads: it will lead again.
            (Some(at_home), Some(instead)) if !self.is_member(reach(at_home)).await => instead,
            (at_home, instead) => at_home.or(instead)?,
        };
        Some(named.address.clone())
    }

    async fn is_member(&self, address: &Address) -> bool {
        self.members.recall(address, self.ask(address)).await
    }

    /// Returns true if a member answers: a process at the address that belongs to no cluster is not
    /// the home.
    async fn ask(&self, address: &Address) -> bool {
        let get = NodeCall::get(address, "/peer/identity", self.ask_timeout);
        let Ok(response) = self.caller.transport().send(get).await else {
            return false;
        };
        let identity: Result<Identity, _> = reply::read_json(response, VIEW_BYTES_MAX).await;
        identity.is_ok_and(|identity| matches!(identity.standing, Standing::Member { .. }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::net::TcpListener;

    use super::*;
    use crate::client::testing::{bind, json, nobody, serve, status};
    use crate::sm::testing::view_of;
    use crate::types::{ClusterId, DirectoryId};

    /// Serves the identity of a node that was in a cluster once, or is in one; counts how often it
    /// is asked.
    fn node(
        address: &Address,
        listener: TcpListener,
        standing: fn() -> Standing,
    ) -> Arc<AtomicUsize> {
        let asked = Arc::new(AtomicUsize::new(0));
        let (count, address) = (Arc::clone(&asked), address.clone());
        serve(listener, move |request| {
            assert_eq!(request.uri().path(), "/peer/identity");
            count.fetch_add(1, Ordering::Relaxed);
            let identity = Identity {
                directory: DirectoryId(1),
                address: address.clone(),
                public_address: None,
                standing: standing(),
                speaks: 0,
                level: 0,
                start: None,
                holds_level: false,
            };
            async move { Some(json(&identity)) }
        });
        asked
    }

    fn member() -> Standing {
        Standing::Member {
            view: Box::new(view_of(1)),
        }
    }

    fn retired() -> Standing {
        Standing::Retired {
            cluster: ClusterId(1),
            members: Vec::new(),
        }
    }

    async fn named(home: &Address, leader: Option<u64>) -> (Option<Address>, Address) {
        let other = nobody().await;
        let map = ShardMap::from_status(&status(1, None, &[home.clone(), other.clone()]));
        let contacts = HomeProbe::new(ShardCaller::new().expect("a client"));
        let first = contacts
            .node_to_ask(&map, GroupId(1), leader.map(NodeId), |node| &node.public)
            .await;
        assert_eq!(
            contacts
                .node_to_ask(&map, GroupId(1), leader.map(NodeId), |node| &node.public)
                .await,
            first
        );
        (first, other)
    }

    #[tokio::test]
    async fn a_home_is_named_while_it_is_there_whoever_leads() {
        let (home, listener) = bind().await;
        let asked = node(&home, listener, member);
        for (leader, times) in [(None, 0), (Some(1), 0), (Some(9), 0), (Some(2), 1)] {
            assert_eq!(named(&home, leader).await.0.as_ref(), Some(&home));
            assert_eq!(asked.load(Ordering::Relaxed), times, "{leader:?} leads");
        }
    }

    #[tokio::test]
    async fn the_leader_is_named_while_the_home_is_away() {
        let (left, listener) = bind().await;
        node(&left, listener, retired);
        for home in [left, nobody().await] {
            let (leader, other) = named(&home, Some(2)).await;
            assert_eq!(leader, Some(other));
            assert_eq!(
                named(&home, None).await.0,
                Some(home),
                "nobody else is known"
            );
        }
    }

    #[tokio::test]
    async fn a_home_that_hangs_holds_up_no_question_about_another() {
        let (hung, listener) = bind().await;
        serve(listener, |_| std::future::pending());
        let (well, listener) = bind().await;
        node(&well, listener, member);
        let contacts = HomeProbe::new(ShardCaller::new().expect("a client"));
        let contacts = HomeProbe {
            ask_timeout: Duration::from_secs(20),
            ..contacts
        };

        let mut hanging = std::pin::pin!(contacts.is_member(&hung));
        assert!(futures::poll!(hanging.as_mut()).is_pending());
        tokio::select! {
            biased;
            _ = &mut hanging => panic!("it hangs"),
            is_member = contacts.is_member(&well) => assert!(is_member),
        }
    }

    #[tokio::test]
    async fn nobody_is_named_for_a_shard_that_is_not_there() {
        let map = ShardMap::from_status(&status(1, None, &[nobody().await]));
        let contacts = HomeProbe::new(ShardCaller::new().expect("a client"));
        assert_eq!(
            contacts
                .node_to_ask(&map, GroupId(9), Some(NodeId(1)), |node| &node.public)
                .await,
            None
        );
    }
}
