//! Whom a replica names as its leader, and when that changes.
//!
//! The rule is `sm::naming`; here is what it is asked about. Who hears of no leader names nobody,
//! and whoever asks has to look elsewhere or to wait.

use crate::raft::replica::Replica;
use crate::sm::naming::KnownLeader;
use crate::storage::log::Vote;
use crate::types::NodeId;

/// Tells who leads, as one replica knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownLead {
    term: u64,
    /// This replica itself.
    leads: bool,
    /// The node that it names.
    leader: Option<NodeId>,
}

impl Replica {
    /// Returns the node that others may be told to ask: it leads as far as this replica knows, has
    /// shown so a moment ago, and nobody else has asked for this replica's vote since.
    pub fn leader_to_name(&self) -> Option<NodeId> {
        let known = {
            let watch = self.watch.borrow();
            KnownLeader {
                node: watch
                    .leader
                    .filter(|leader| leader.replica != self.key.replica)
                    .and_then(|leader| leader.node),
                term: watch.term,
                promised: self.promise().map_or(0, |vote| vote.term),
                heard: self.timer.last_word(),
            }
        };
        let leader = known.to_name(self.timings.silence_ms_max())?;
        Some(leader).filter(|leader| !self.context.lanes.is_disconnected(*leader))
    }

    /// Returns the last vote of this replica, whether or not it is on the disk yet: before it is,
    /// nobody hears of it.
    pub fn promise(&self) -> Option<Vote> {
        self.log.state().vote
    }

    /// Returns who leads as far as this replica knows; none while it would name nobody.
    pub fn lead(&self) -> Option<KnownLead> {
        let leads = self.leads();
        let leader = self.leader_to_name();
        (leads || leader.is_some()).then(|| KnownLead {
            term: self.watch.borrow().term,
            leads,
            leader,
        })
    }

    /// Resolves when this replica leads, or would name a leader, and not as it was `before`.
    pub async fn lead_changed_since(&self, before: Option<KnownLead>) {
        let mut watch = self.watch();
        loop {
            // Before the look: a word that comes after it is not missed.
            let word = self.timer.next_word();
            let now = self.lead();
            if now.is_some() && now != before {
                return;
            }
            tokio::select! {
                changed = watch.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                },
                () = word, if now.is_none() => {}
            }
        }
    }
}
