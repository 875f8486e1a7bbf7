//! What a node hears of its cluster when its own replica of the meta group hears nothing any more: that the others were replaced while it
//! was away, that its replica was, or that it was taken out of the view itself.
//!
//! Only silence makes it ask. What it believes is a view of its own cluster that is newer than its own: views are told only when they are
//! committed. A node that such a view does not have is retired: that is final for its id.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::member::Member;
use crate::client::peer::Standing;
use crate::sm::view::View;
use crate::types::{Address, GroupId};

const TICK: Duration = Duration::from_secs(1);
/// A meta group that was heard of within this time tells the news itself.
const SILENCE: Duration = Duration::from_secs(3);
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Nodes asked at once. Any one that is up to date will do.
const ASKED_MAX: usize = 16;

/// Asks around when the meta group is silent.
pub struct News {
    member: Arc<Member>,
    /// Where else to ask: members that retired nodes told of.
    elsewhere: Mutex<BTreeSet<Address>>,
    /// The view that does not have this node.
    without_us: Mutex<Option<Box<View>>>,
    retired: CancellationToken,
    /// A member called.
    called: Notify,
}

impl News {
    pub fn new(member: Arc<Member>) -> Self {
        Self {
            member,
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

    /// The view that does not have this node, once there is one.
    pub fn view_without_us(&self) -> Option<Box<View>> {
        self.without_us.lock().expect("no holder panics").clone()
    }

    pub async fn run(&self, shutdown: &CancellationToken) {
        loop {
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

    /// Members of the cluster have called: they are asked at once. What they say counts, not who calls.
    pub fn called_by(&self, members: Vec<Address>) {
        self.elsewhere.lock().expect("no holder panics").extend(members.into_iter().take(ASKED_MAX));
        self.called.notify_one();
    }

    fn is_silent(&self) -> bool {
        let Some(meta) = self.member.registry.get(GroupId::META) else { return true };
        let status = meta.status();
        let is_member = status.membership.is_member(status.key.replica);
        let heard = if meta.leads() { status.quorum_acked } else { status.leader_heard };
        !is_member || heard.is_none_or(|ago| ago > SILENCE)
    }

    async fn ask(&self) {
        let known = self.member.view();
        let mut addresses = std::mem::take(&mut *self.elsewhere.lock().expect("no holder panics"));
        let others = known.nodes.iter().filter(|(id, _)| **id != self.member.node);
        addresses.extend(others.map(|(_, node)| node.address.clone()));
        // Which of many is asked does not matter, but it should not be the same ones for ever.
        let mut asked: Vec<Address> = addresses.into_iter().collect();
        if asked.len() > ASKED_MAX {
            let turn = rand::random_range(0..asked.len());
            asked.rotate_left(turn);
            asked.truncate(ASKED_MAX);
        }
        let answers = asked.iter().map(|address| self.member.peers.identity(address, ASK_TIMEOUT));
        let mut newest: Option<Box<View>> = None;
        for identity in join_all(answers).await.into_iter().flatten() {
            match identity.standing {
                Standing::Member { view } if view.cluster == self.member.cluster => {
                    if newest.as_ref().is_none_or(|newest| view.version > newest.version) {
                        newest = Some(view);
                    }
                }
                Standing::Retired { cluster, members } if cluster == self.member.cluster => {
                    self.elsewhere.lock().expect("no holder panics").extend(members);
                }
                Standing::Member { .. } | Standing::Retired { .. } | Standing::Fresh { .. } | Standing::Promised { .. } => {}
            }
        }
        if let Some(view) = newest.filter(|view| view.version > known.version) {
            self.take(view);
        }
    }

    fn take(&self, view: Box<View>) {
        if view.nodes.contains_key(&self.member.node) {
            tracing::info!("heard of a newer view, version {}, from another node", view.version);
            self.member.views().advance(*view);
            return;
        }
        tracing::warn!("this node is not in the view any more (version {}): it is retired", view.version);
        *self.without_us.lock().expect("no holder panics") = Some(view);
        self.retired.cancel();
    }
}
