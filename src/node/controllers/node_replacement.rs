//! Gives the work of nodes that stay away, or have lost their disks, to others, and has replicas
//! replaced that have failed. Decided in `sm::cluster::repair` from what the leader of the meta
//! group sees, and is told (`failure_reports`); a new leader begins to count anew how long nodes
//! are away, but not how long replicas have failed: that is told by their nodes.
//!
//! A node on which replicas fail because of the node itself, as of its full disk, counts as away.
//!
//! That a disk is lost is believed only of a node that stays away while another data directory
//! answers in its place: under the address that was asked, as one that means to be of this cluster,
//! and the same one for the whole of a grace.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::peer::{Identity, Standing};
use crate::node::context::NodeContext;
use crate::node::failure_reports::{FailedByNode, failing_nodes, failing_replicas};
use crate::node::pause;
use crate::node::plan_proposal::{PlanRefusal, install_plan};
use crate::raft::Replica;
use crate::sm::cluster::repair::{NodePresence, Replacement, next_plan, replace_failed};
use crate::sm::cluster::view::View;
use crate::telemetry::rarely;
use crate::types::{Address, DirectoryId, GroupId, NodeId};

const TICK: Duration = Duration::from_secs(1);
/// A node that was heard of longer ago than this is away.
const HEARD_WITHIN: Duration = Duration::from_secs(3);
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// A directory in a node's place that has said nothing for so long has to begin anew: it may have
/// been a passing mistake.
const CLAIM_SILENCE_MAX: Duration = Duration::from_secs(5);

/// Watches the nodes, and plans without those that stay away.
pub struct NodeReplacement {
    context: Arc<NodeContext>,
    replace_after: Duration,
    /// Time for which another directory must answer in the place of a node before that node's disk
    /// passes for lost.
    lost_disk_after: Duration,
    /// Presence of each node, and since when it is so.
    seen: BTreeMap<NodeId, PresenceRecord>,
    /// Replicas that have failed, as their nodes tell.
    failed: FailedByNode,
}

#[derive(Debug, Clone, Copy)]
struct PresenceRecord {
    is_here: bool,
    since: Instant,
    /// Another directory answers under its address.
    claim: Option<DirectoryClaim>,
}

/// Result of asking the address of a node that is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AddressProbe {
    /// Nobody answered.
    Nothing,
    /// One that takes nobody's place.
    Other,
    /// A data directory that means to be of this cluster and is of none: that of a node which lost
    /// its disk.
    Empty(DirectoryId),
}

/// Another directory in the place of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DirectoryClaim {
    by: DirectoryId,
    /// Since when it, and no other, answered there.
    since: Instant,
    last: Instant,
}

impl NodeReplacement {
    pub fn new(
        context: Arc<NodeContext>,
        replace_after: Duration,
        lost_disk_after: Duration,
    ) -> Self {
        Self {
            context,
            replace_after,
            lost_disk_after,
            seen: BTreeMap::new(),
            failed: FailedByNode::new(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        while pause::waited(shutdown, TICK).await {
            let meta = self
                .context
                .registry
                .get(GroupId::META)
                .filter(|meta| meta.leads());
            let Some(meta) = meta else {
                // What was seen before another led is too old to count on.
                self.seen.clear();
                continue;
            };
            let view = self.context.view();
            self.look(&view).await;
            let (seen, replace_after_ms) = (self.seen(), as_ms(self.replace_after));
            if let Some(planned) = next_plan(&view, &seen, replace_after_ms) {
                self.repair(&meta, &view, planned.view).await;
                continue;
            }
            let failing = failing_replicas(&view, &self.failed);
            if let Some((next, replaced)) = replace_failed(&view, &seen, &failing, replace_after_ms)
            {
                replace(&meta, &view, next, &replaced).await;
            }
        }
    }

    /// Asks the nodes that say so which replicas have failed there.
    async fn ask_failing(&mut self, view: &View) {
        let context = &self.context;
        let nodes = context.reports.nodes().into_iter();
        let nodes = nodes.filter_map(|id| Some((id, view.nodes.get(&id)?)));
        let asked = nodes.map(|(id, node)| async move {
            if id == context.node {
                return (id, Some(context.failures.to_messages()));
            }
            let hosting = context.peers.hosting(node, ASK_TIMEOUT).await.ok();
            (id, hosting.map(|hosting| hosting.failed))
        });
        let told = join_all(asked).await;

        // One that does not answer in time still says that something has failed.
        let mut before = std::mem::take(&mut self.failed);
        let failed = told
            .into_iter()
            .filter_map(|(id, failed)| Some((id, failed.or_else(|| before.remove(&id))?)));
        self.failed = failed.collect();
    }

    /// Looks at every node, and asks those away whether another directory answers in their place.
    async fn look(&mut self, view: &View) {
        let now = Instant::now();
        self.seen.retain(|node, _| view.nodes.contains_key(node));
        self.ask_failing(view).await;

        // A node on which no replica can run counts as away, though it answers.
        let failing = failing_nodes(&self.failed);
        let is_here =
            |id: &NodeId| self.context.is_in_reach(*id, HEARD_WITHIN) && !failing.contains(id);
        let (here, away): (Vec<NodeId>, Vec<NodeId>) =
            view.staying().map(|(id, _)| id).partition(is_here);
        let peers = &self.context.peers;
        let asked = away
            .iter()
            .filter_map(|id| Some((*id, view.nodes.get(id)?)))
            .map(|(id, node)| async move {
                let found = match peers.identity(&node.address, ASK_TIMEOUT).await {
                    Ok(identity) => found_at(view, id, &node.address, &identity),
                    Err(_) => AddressProbe::Nothing,
                };
                (id, found)
            });
        let found: BTreeMap<NodeId, AddressProbe> = join_all(asked).await.into_iter().collect();

        let sights = here
            .into_iter()
            .map(|id| (id, true))
            .chain(away.into_iter().map(|id| (id, false)));
        for (id, is_here) in sights {
            let sight = self.seen.entry(id).or_insert(PresenceRecord {
                is_here,
                since: now,
                claim: None,
            });
            let before = sight.claim;

            // It has come or gone: time counts from now, and no claim to its place outlasts that.
            if sight.is_here != is_here {
                *sight = PresenceRecord {
                    is_here,
                    since: now,
                    claim: None,
                };
            }
            let found = found.get(&id).copied().unwrap_or(AddressProbe::Other);
            sight.claim = next_claim(sight.claim, found, Instant::now());
            let address = view
                .nodes
                .get(&id)
                .map_or_else(|| id.to_string(), |node| node.address.to_string());
            tell_claim(&address, before, sight.claim, self.lost_disk_after);
        }
    }

    fn seen(&self) -> BTreeMap<NodeId, NodePresence> {
        let presence_of = |sight: &PresenceRecord| {
            let for_ms = as_ms(sight.since.elapsed());
            match sight.claim {
                // A wrong directory may be there for a moment, so a disk is lost only after the
                // whole grace.
                Some(claim) if claim.last.duration_since(claim.since) >= self.lost_disk_after => {
                    NodePresence::Lost { to: claim.by }
                }
                Some(_) | None if sight.is_here => NodePresence::Here { for_ms },
                Some(_) | None => NodePresence::Away { for_ms },
            }
        };
        self.seen
            .iter()
            .map(|(id, sight)| (*id, presence_of(sight)))
            .collect()
    }

    /// Has the work of nodes that stay away given to others.
    async fn repair(&self, meta: &Replica, view: &View, next: View) {
        let named = |ids: &mut dyn Iterator<Item = &NodeId>| -> Vec<String> {
            ids.filter_map(|id| next.nodes.get(id))
                .map(|node| node.address.to_string())
                .collect()
        };
        let out = named(&mut next.evicted.difference(&view.evicted));
        let back = named(&mut view.evicted.difference(&next.evicted));
        let lost = named(&mut next.leaving.difference(&view.leaving));
        let epoch = next.epoch;
        if install(meta, view, next, "repair").await {
            // Said once a plan.
            tracing::warn!(
                "plan {epoch}: the work of nodes that stay away ({}) or lost their disk ({}) goes \
                to others; back at work: {}",
                in_words(&out),
                in_words(&lost),
                in_words(&back)
            );
        }
    }
}

/// Returns true if the meta group has accepted `next` as the plan that follows `view`. One that is
/// refused is drawn up anew at the next look.
async fn install(meta: &Replica, view: &View, next: View, what: &str) -> bool {
    let deadline = Instant::now() + PROPOSE_TIMEOUT;
    match install_plan(meta, view, next, deadline).await {
        Ok(()) => return true,
        Err(PlanRefusal::Rejected(rejection)) => {
            tracing::debug!("a {what} was not accepted: {rejection:?}");
        }
        Err(PlanRefusal::Failed(error)) => tracing::debug!("a {what} was not accepted: {error}"),
    }
    false
}

/// Has failed replicas replaced by new ones.
async fn replace(meta: &Replica, view: &View, next: View, replaced: &[Replacement]) {
    let epoch = next.epoch;
    if !install(meta, view, next, "replacement").await {
        return;
    }
    for Replacement {
        group,
        node,
        failed,
        new,
    } in replaced
    {
        let address = view
            .nodes
            .get(node)
            .map_or_else(|| node.to_string(), |node| node.address.to_string());
        // Said once a plan, of each replica.
        tracing::warn!(
            "plan {epoch}: replica {failed} of group {group} has failed at {address} for too \
            long: {new} takes its place there"
        );
    }
}

/// Returns what the answer of whoever sits at the address of a node that is away says of that node.
fn found_at(view: &View, node: NodeId, asked: &Address, identity: &Identity) -> AddressProbe {
    // A directory of the view is a member that has moved here, not one in the place of another.
    let is_known = view
        .nodes
        .values()
        .any(|known| known.directory == identity.directory);
    if is_known || identity.address != *asked {
        return AddressProbe::Other;
    }
    // Only one that belongs nowhere takes the place: another cluster's node at the same address is
    // a mistake.
    let is_free = match &identity.standing {
        Standing::Fresh { view: named } => means_us(view, node, named),
        Standing::Retired { cluster, .. } => *cluster == view.cluster,
        Standing::Promised { .. } | Standing::Member { .. } => false,
    };
    if is_free {
        AddressProbe::Empty(identity.directory)
    } else {
        AddressProbe::Other
    }
}

/// Returns true if a `VIEW` is one of this cluster: it names another node of it than the one whose
/// address was asked. That of a cluster of one names nobody else.
fn means_us(view: &View, asked: NodeId, named: &[Address]) -> bool {
    let mut others = view.staying().filter(|(id, _)| *id != asked).peekable();
    others.peek().is_none() || others.any(|(_, node)| named.contains(&node.address))
}

/// Returns the claim to a node's place after its address was asked once more.
fn next_claim(
    claim: Option<DirectoryClaim>,
    found: AddressProbe,
    now: Instant,
) -> Option<DirectoryClaim> {
    match (claim, found) {
        (_, AddressProbe::Other) => None,
        // After a longer silence another may have answered there unseen: then time counts anew.
        (Some(claim), AddressProbe::Empty(by))
            if claim.by == by && now.duration_since(claim.last) < CLAIM_SILENCE_MAX =>
        {
            Some(DirectoryClaim { last: now, ..claim })
        }
        (_, AddressProbe::Empty(by)) => Some(DirectoryClaim {
            by,
            since: now,
            last: now,
        }),
        (claim, AddressProbe::Nothing) => {
            claim.filter(|claim| now.duration_since(claim.last) < CLAIM_SILENCE_MAX)
        }
    }
}

/// Tells of a claim when it begins and when it ends.
fn tell_claim(
    address: &str,
    before: Option<DirectoryClaim>,
    now: Option<DirectoryClaim>,
    lost_disk_after: Duration,
) {
    let grace = lost_disk_after.as_secs();
    match (before, now) {
        (before, Some(claim)) if before.is_none_or(|before| before.since != claim.since) => {
            rarely!(
                warn,
                "an empty data directory ({}) answers at {address} in the place of the node there: \
             if it still does in {grace} s and the node stays away, its disk counts as lost, and \
             its replicas are rebuilt",
                claim.by
            )
        }
        (Some(before), Some(claim)) => {
            // Told once, at the look with which the grace has passed.
            let passed =
                |claim: &DirectoryClaim| claim.last.duration_since(claim.since) >= lost_disk_after;
            if passed(&claim) && !passed(&before) {
                // Said once a claim, which is some seconds old by then.
                tracing::warn!(
                    "the disk of the node at {address} counts as lost: data directory {} takes its \
                    place",
                    claim.by
                );
            }
        }
        (Some(before), None) => {
            tracing::info!(
                "the empty data directory {} does not answer at {address} any more: it takes \
                nobody's place",
                before.by
            );
        }
        (None, _) => {}
    }
}

fn in_words(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::testing::view_of;
    use crate::types::ClusterId;

    fn address(number: u32) -> Address {
        format!("n{number}:1").parse().expect("an address")
    }

    fn identity(at: u32, directory: u128, standing: Standing) -> Identity {
        Identity {
            directory: DirectoryId(directory),
            address: address(at),
            public_address: None,
            speaks: 0,
            level: 0,
            start: None,
            holds_level: false,
            standing,
        }
    }

    /// Whoever got the address, or says another, or is of something else, is no reason to give a
    /// node up.
    #[test]
    fn a_disk_is_lost_only_to_one_that_says_so_under_the_address_that_was_asked() {
        let view = view_of(3);
        let fresh = |named: &[u32]| Standing::Fresh {
            view: named.iter().copied().map(address).collect(),
        };
        let retired = |cluster| Standing::Retired {
            cluster: ClusterId(cluster),
            members: Vec::new(),
        };
        let member = Standing::Member {
            view: Box::new(view.clone()),
        };
        let promised = Standing::Promised {
            view: vec![address(1)],
            founder: DirectoryId(1),
        };
        let table = [
            (
                identity(3, 77, fresh(&[1, 2, 3])),
                AddressProbe::Empty(DirectoryId(77)),
                "with the flags of the node",
            ),
            (
                identity(3, 77, retired(9)),
                AddressProbe::Empty(DirectoryId(77)),
                "that was of this cluster",
            ),
            (
                identity(4, 77, fresh(&[1, 2, 3])),
                AddressProbe::Other,
                "that is called otherwise",
            ),
            (
                identity(3, 77, fresh(&[3, 8])),
                AddressProbe::Other,
                "that is to be of another cluster",
            ),
            (
                identity(3, 77, fresh(&[3])),
                AddressProbe::Other,
                "that is to be a cluster of its own",
            ),
            (
                identity(3, 77, retired(8)),
                AddressProbe::Other,
                "that was of another cluster",
            ),
            (
                identity(3, 77, member),
                AddressProbe::Other,
                "that belongs to a cluster",
            ),
            (
                identity(3, 77, promised),
                AddressProbe::Other,
                "that has promised",
            ),
            (
                identity(3, 2, fresh(&[1, 2, 3])),
                AddressProbe::Other,
                "that the view knows",
            ),
        ];
        for (identity, expected, what) in table {
            assert_eq!(
                found_at(&view, NodeId(3), &address(3), &identity),
                expected,
                "a directory {what}"
            );
        }
    }

    #[test]
    fn a_claim_counts_from_its_first_answer_and_ends_with_any_other() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (one, two) = (
            AddressProbe::Empty(DirectoryId(1)),
            AddressProbe::Empty(DirectoryId(2)),
        );
        let mut claim = None;
        let mut step = |found, seconds| {
            claim = next_claim(claim, found, at(seconds));
            claim.map(|claim| (claim.by.0, claim.since.duration_since(start).as_secs()))
        };
        assert_eq!(step(AddressProbe::Nothing, 0), None);
        assert_eq!(step(one, 1), Some((1, 1)));
        assert_eq!(step(one, 2), Some((1, 1)));
        assert_eq!(
            step(AddressProbe::Nothing, 4),
            Some((1, 1)),
            "one answer may be lost"
        );
        assert_eq!(step(one, 6), Some((1, 1)));
        assert_eq!(step(two, 7), Some((2, 7)), "another directory");
        assert_eq!(
            step(AddressProbe::Other, 8),
            None,
            "the node itself, or nobody's successor"
        );
        assert_eq!(step(two, 9), Some((2, 9)));
        assert_eq!(step(AddressProbe::Nothing, 14), None, "silence");
        assert_eq!(step(two, 20), Some((2, 20)));
        assert_eq!(step(two, 26), Some((2, 26)), "nobody asked in between");
    }
}
