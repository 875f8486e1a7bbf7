//! Gives the work of nodes that stay away, or have lost their disks, to others. Decided in `sm::repair` from what the leader of the meta
//! group sees; a new leader begins to count anew.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::member::Member;
use crate::client::peer::Standing;
use crate::raft::Group;
use crate::sm::meta;
use crate::sm::repair::{Seen, next_plan};
use crate::sm::view::View;
use crate::types::{DirectoryId, GroupId, NodeId};

const TICK: Duration = Duration::from_secs(1);
/// A node that was heard of longer ago than this is away.
const HEARD_WITHIN: Duration = Duration::from_secs(3);
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Watches the nodes, and plans without those that stay away.
pub struct Repair {
    member: Arc<Member>,
    replace_after: Duration,
    /// How each node is seen, and since when.
    seen: BTreeMap<NodeId, Sight>,
}

#[derive(Debug, Clone, Copy)]
struct Sight {
    is_here: bool,
    since: Instant,
    /// Another directory answers under its address.
    lost_to: Option<DirectoryId>,
}

impl Repair {
    pub fn new(member: Arc<Member>, replace_after: Duration) -> Self {
        Self { member, replace_after, seen: BTreeMap::new() }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        while super::waited(shutdown, TICK).await {
            let meta = self.member.registry.get(GroupId::META).filter(|meta| meta.leads());
            let Some(meta) = meta else {
                self.seen.clear();
                continue;
            };
            let view = self.member.view();
            self.look(&view).await;
            if let Some(planned) = next_plan(&view, &self.seen(), as_ms(self.replace_after)) {
                self.install(&meta, &view, planned.view).await;
            }
        }
    }

    /// Looks at every node, and asks those away whether another directory answers in their place.
    async fn look(&mut self, view: &View) {
        let now = Instant::now();
        self.seen.retain(|node, _| view.nodes.contains_key(node));
        let (here, away): (Vec<NodeId>, Vec<NodeId>) =
            view.staying().map(|(id, _)| id).partition(|id| self.member.is_in_reach(*id, HEARD_WITHIN));
        let (peers, cluster) = (&self.member.peers, self.member.cluster);
        let asked = away.iter().filter_map(|id| Some((*id, view.nodes.get(id)?))).map(|(id, node)| async move {
            let identity = peers.identity(&node.address, ASK_TIMEOUT).await.ok()?;
            // Only one that belongs nowhere takes the place: another cluster's node at the same address is a mistake.
            let is_free = match &identity.standing {
                Standing::Fresh { .. } => true,
                Standing::Retired { cluster: left, .. } => *left == cluster,
                Standing::Promised { .. } | Standing::Member { .. } => false,
            };
            (identity.directory != node.directory && is_free).then_some((id, identity.directory))
        });
        let lost: BTreeMap<NodeId, DirectoryId> = join_all(asked).await.into_iter().flatten().collect();
        let sights = here.into_iter().map(|id| (id, true)).chain(away.into_iter().map(|id| (id, false)));
        for (id, is_here) in sights {
            let sight = self.seen.entry(id).or_insert(Sight { is_here, since: now, lost_to: None });
            if sight.is_here != is_here {
                *sight = Sight { is_here, since: now, lost_to: None };
            }
            sight.lost_to = lost.get(&id).copied();
        }
    }

    fn seen(&self) -> BTreeMap<NodeId, Seen> {
        let told = |sight: &Sight| {
            let for_ms = as_ms(sight.since.elapsed());
            match sight.lost_to {
                Some(to) => Seen::Lost { to },
                None if sight.is_here => Seen::Here { for_ms },
                None => Seen::Away { for_ms },
            }
        };
        self.seen.iter().map(|(id, sight)| (*id, told(sight))).collect()
    }

    async fn install(&self, meta: &Group, view: &View, next: View) {
        let named = |ids: &mut dyn Iterator<Item = &NodeId>| -> Vec<String> {
            ids.filter_map(|id| next.nodes.get(id)).map(|node| node.address.to_string()).collect()
        };
        let out = named(&mut next.out.difference(&view.out));
        let back = named(&mut view.out.difference(&next.out));
        let lost = named(&mut next.leaving.difference(&view.leaving));
        let epoch = next.epoch;
        let command = meta::Command::InstallPlan { base: view.version, next: Box::new(next) };
        match meta.propose_meta(command, Instant::now() + PROPOSE_TIMEOUT).await {
            Ok(meta::Outcome::Done | meta::Outcome::MoveOpened { .. }) => tracing::warn!(
                "plan {epoch}: the work of nodes that stay away ({}) or lost their disk ({}) goes to others; back at work: {}",
                in_words(&out),
                in_words(&lost),
                in_words(&back)
            ),
            Ok(meta::Outcome::Rejected(rejection)) => tracing::debug!("a repair was not accepted: {rejection:?}"),
            Err(error) => tracing::debug!("a repair was not accepted: {error}"),
        }
    }
}

fn in_words(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
