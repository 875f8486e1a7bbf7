//! [`StaleViewRefresh`]: asks other nodes for a newer view when this node's own replica of the meta
//! group hears nothing any more. The others may have been replaced while it was away, its replica
//! may have been, or the node may have been taken out of the view itself.
//!
//! Only silence makes it ask. What it believes is a view of its own cluster that is newer than its
//! own: views are told only when they are committed. A node that such a view does not have is
//! retired: that is final for its id.

use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::api::peer::Standing;
use crate::mutants::{self, Mutant};
use crate::node::context::NodeContext;
use crate::sm::cluster::view::View;
use crate::supervisor;
use crate::types::{Address, GroupId};

const TICK: Duration = Duration::from_secs(1);
/// A meta group that was heard of within this time tells the news itself.
const SILENCE: Duration = Duration::from_secs(3);
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Nodes asked at once. Any one that is up to date will do.
const ASKED_MAX: usize = 16;
/// Addresses kept of those that callers and retired nodes told of. Anybody can call: what is more
/// is left out, and fewer of them are asked at once than can be, so that the nodes of the view have
/// their turn too.
const ELSEWHERE_MAX: usize = ASKED_MAX / 2;

/// Asks around when the meta group is silent.
pub struct StaleViewRefresh {
    context: Arc<NodeContext>,
    /// Addresses to ask besides: members that retired nodes told of.
    elsewhere: Mutex<BTreeSet<Address>>,
    /// The view that does not have this node.
    without_us: Mutex<Option<Box<View>>>,
    retired: CancellationToken,
    /// A member called.
    called: Notify,
}

impl StaleViewRefresh {
    pub fn new(context: Arc<NodeContext>) -> Self {
        Self {
            context,
            elsewhere: Mutex::default(),
            without_us: Mutex::default(),
            retired: CancellationToken::new(),
            called: Notify::new(),
        }
    }

    /// Cancelled when this node turns out not to be in the view any more.
    pub fn retired(&self) -> &CancellationToken {
        &self.retired
    }

    /// Returns the view that does not have this node, once there is one.
    pub fn view_without_us(&self) -> Option<Box<View>> {
        self.without_us.lock().clone()
    }

    pub async fn run(&self, shutdown: &CancellationToken) {
        loop {
            supervisor::beat();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = self.retired.cancelled() => return,
                () = self.called.notified() => self.ask().await,
                () = tokio::time::sleep(TICK) => {}
            }
            if self.is_silent() {
                self.ask().await;
            }
        }
    }

    /// Notes that members of the cluster have called: they are asked at once. What they say counts,
    /// not who calls.
    pub fn called_by(&self, members: Vec<Address>) {
        self.add_elsewhere(members);
        self.called.notify_one();
    }

    fn is_silent(&self) -> bool {
        let Some(meta) = self.context.registry.get(GroupId::META) else {
            return true;
        };
        let status = meta.status();

        // A replica that is no member any more is told nothing: it would take its old view for the
        // last.
        let is_member = status.membership.is_member(status.key.replica);
        let heard = if meta.leads() {
            status.quorum_acked
        } else {
            status.leader_heard
        };
        !is_member || heard.is_none_or(|ago| ago > SILENCE)
    }

    async fn ask(&self) {
        let known = self.context.view();
        let elsewhere = std::mem::take(&mut *self.elsewhere.lock());
        let others = known
            .nodes
            .iter()
            .filter(|(id, _)| **id != self.context.node)
            .map(|(_, node)| node.address.clone());
        let asked = choose(elsewhere, others.collect());
        let answers = asked
            .iter()
            .map(|address| self.context.peers.identity(address, ASK_TIMEOUT));

        // Answers may be of different age: the newest view counts.
        let mut newest: Option<Box<View>> = None;
        for identity in join_all(answers).await.into_iter().flatten() {
            match identity.standing {
                Standing::Member { view }
                    if view.cluster == self.context.cluster
                        || mutants::is_on(Mutant::StrangersViewBelieved) =>
                {
                    if newest
                        .as_ref()
                        .is_none_or(|newest| view.version > newest.version)
                    {
                        newest = Some(view);
                    }
                }
                Standing::Retired { cluster, members } if cluster == self.context.cluster => {
                    // It was a member, and knows where the cluster has gone on: those are asked
                    // next.
                    self.add_elsewhere(members);
                }
                Standing::Member { .. }
                | Standing::Retired { .. }
                | Standing::Fresh { .. }
                | Standing::Promised { .. } => {}
            }
        }
        if let Some(view) = newest.filter(|view| view.version > known.version) {
            self.take(view);
        }
    }

    fn add_elsewhere(&self, members: Vec<Address>) {
        let mut elsewhere = self.elsewhere.lock();
        let room = ELSEWHERE_MAX.saturating_sub(elsewhere.len());
        elsewhere.extend(members.into_iter().take(room));
    }

    fn take(&self, view: Box<View>) {
        if view.nodes.contains_key(&self.context.node) {
            tracing::info!(
                "heard of a newer view, version {}, from another node",
                view.version
            );
            self.context.views().advance(*view);
            return;
        }

        // The cluster has gone on without this node, and its leaders call it no more.
        // Said once: the node stops.
        tracing::warn!(
            "this node is not in the view any more (version {}): it is retired",
            view.version
        );
        *self.without_us.lock() = Some(view);
        self.retired.cancel();
    }
}

/// Chooses the addresses to ask: all that were told of elsewhere, and of the others as many as
/// there is room for. Which of many does not matter, but it should not be the same ones for ever.
fn choose(elsewhere: BTreeSet<Address>, mut others: Vec<Address>) -> Vec<Address> {
    others.retain(|address| !elsewhere.contains(address));
    let room = ASKED_MAX.saturating_sub(elsewhere.len());
    if others.len() > room {
        let turn = rand::random_range(0..others.len());
        others.rotate_left(turn);
        others.truncate(room);
    }
    elsewhere.into_iter().chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_calls_often_keeps_nobody_from_being_asked() {
        let address = |host: &str, node: usize| -> Address {
            format!("{host}{node}:1").parse().expect("an address")
        };
        let others: Vec<Address> = (0..100).map(|node| address("member", node)).collect();
        let elsewhere: BTreeSet<Address> = (0..ELSEWHERE_MAX)
            .map(|node| address("caller", node))
            .collect();
        let asked = choose(elsewhere.clone(), others.clone());
        assert_eq!(asked.len(), ASKED_MAX);
        assert_eq!(
            asked
                .iter()
                .filter(|address| others.contains(address))
                .count(),
            ASKED_MAX - ELSEWHERE_MAX
        );

        let few = choose(elsewhere.clone(), elsewhere.iter().cloned().collect());
        assert_eq!(few.len(), ELSEWHERE_MAX, "nobody twice");
    }
}
