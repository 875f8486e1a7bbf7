//! How a leader that transfers its lead, and that nobody can connect to, finds out who leads now.
//!
//! From the moment of the transfer it sends nothing, so no reply tells it of a later term; and the
//! next leader can't send it anything either. It would take itself for the leader as long as that
//! lasts.

use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::AppendEntriesRequest;
use tokio::time::Instant;

use crate::raft::replica::Replica;
use crate::raft::transport::wire::{PeerReply, PeerRequest};
use crate::raft::types::{Types, vote_from_raft, vote_to_raft};
use crate::types::{NodeId, ReplicaId};

impl Replica {
    /// Asks another voter for its vote, and follows the leader of a later term that it names, as if
    /// that had sent a heartbeat. Returns true if there is one.
    pub async fn discover_leader(
        &self,
        replica: ReplicaId,
        node: NodeId,
        deadline: Instant,
    ) -> bool {
        let own = vote_from_raft(&self.raft.server_metrics().borrow_watched().vote);
        // A reply to a pre-vote with our own term grants nothing; it only tells the vote of the
        // other.
        let request = PeerRequest::PreVote {
            vote: own,
            last: None,
        };
        let client = self.network.log_client(replica, node);
        let Ok(PeerReply::Vote { vote, .. }) = client.ask(&request, &[], deadline).await else {
            return false;
        };

        let is_later = vote.committed && vote.term > own.term;
        let Some(vote) = vote_to_raft(&vote).filter(|_| is_later) else {
            return false;
        };
        let heartbeat = AppendEntriesRequest::<Types> {
            vote,
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        };
        self.raft.append_entries(heartbeat).await.is_ok()
    }
}
