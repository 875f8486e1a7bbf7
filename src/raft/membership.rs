//! Changes of a group's membership. Each waits for its commit, but not forever: a leader that has
//! lost its quorum commits nothing, and does not say so.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::error::{ClientWriteError, RaftError};

use super::errors::MembershipError;
use super::replica::Replica;
use super::types::{GroupMember, Types};
use crate::types::{NodeId, ReplicaId, ReplicaKind};

/// Time that a change may take. It takes a commit or two.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

impl Replica {
    /// Adds a replica that applies entries and has no vote. Returns when that is committed, or at
    /// once if it is a member already.
    pub async fn add_learner(
        &self,
        replica: ReplicaId,
        node: NodeId,
    ) -> Result<(), MembershipError> {
        self.add(
            replica,
            GroupMember {
                node,
                kind: ReplicaKind::Data,
            },
        )
        .await
    }

    /// Adds a replica that only keeps the log, and has no vote yet. Otherwise like
    /// [`Replica::add_learner`].
    pub async fn add_witness(
        &self,
        replica: ReplicaId,
        node: NodeId,
    ) -> Result<(), MembershipError> {
        self.add(
            replica,
            GroupMember {
                node,
                kind: ReplicaKind::Witness,
            },
        )
        .await
    }

    async fn add(&self, replica: ReplicaId, member: GroupMember) -> Result<(), MembershipError> {
        self.ensure_changes()?;

        // Only what is committed counts: the next leader may not have the rest.
        if self.watch.borrow().committed_membership.is_member(replica) {
            return Ok(());
        }
        committed(self.raft.add_learner(replica, member, false)).await
    }

    /// Refuses changes on a witness: it leaves them to the leader that it hands over to.
    fn ensure_changes(&self) -> Result<(), MembershipError> {
        if self.is_witness() {
            Err(MembershipError::NotLeader { leader: None })
        } else {
            Ok(())
        }
    }

    /// Makes `voters` the voters of the group; all must be members. Voters that are not among them
    /// become learners. Returns when that is committed. Does not check that learners among them
    /// have caught up. After `Unknown` the group may be between the old voters and the new, and the
    /// change is to be requested again.
    pub async fn change_voters(&self, voters: BTreeSet<ReplicaId>) -> Result<(), MembershipError> {
        self.ensure_changes()?;
        committed(self.raft.change_membership(voters, true)).await
    }

    /// Removes learners from the group.
    pub async fn remove_learners(
        &self,
        learners: BTreeSet<ReplicaId>,
    ) -> Result<(), MembershipError> {
        self.ensure_changes()?;
        committed(
            self.raft
                .change_membership(ChangeMembers::RemoveNodes(learners), false),
        )
        .await
    }
}

/// Waits for `change`, which begins at its first poll, until a deadline.
async fn committed<T>(
    change: impl Future<Output = Result<T, RaftError<Types, ClientWriteError<Types>>>>,
) -> Result<(), MembershipError> {
    match tokio::time::timeout(CHANGE_TIMEOUT, change).await {
        Ok(changed) => changed.map(|_| ()).map_err(membership_error),
        Err(_) => Err(MembershipError::Unknown(format!(
            "it was not committed within {CHANGE_TIMEOUT:?}, and may still be"
        ))),
    }
}

fn membership_error(error: RaftError<Types, ClientWriteError<Types>>) -> MembershipError {
    use openraft::errors::ChangeMembershipError as Refused;
    match error {
        RaftError::Fatal(_) => MembershipError::Stopped,
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
            MembershipError::NotLeader {
                leader: forward.leader_node.and_then(|member| member.serving_node()),
            }
        }
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => {
            MembershipError::Unknown("the leader changed".into())
        }
        RaftError::APIError(ClientWriteError::ChangeMembershipError(
            // Another change is under way: this one can be asked for again after it.
            error @ (Refused::InProgress(_) | Refused::UncommittedLeaderLog(_)),
        )) => MembershipError::Conflict(error.to_string()),
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => {
            MembershipError::Invalid(error.to_string())
        }
        RaftError::APIError(ClientWriteError::PreconditionFailed(error)) => {
            MembershipError::Conflict(error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_change_that_is_not_committed_in_time_may_still_be() {
        let never = std::future::pending::<Result<(), RaftError<Types, ClientWriteError<Types>>>>();
        let error = committed(never).await.expect_err("it was not committed");
        assert!(matches!(error, MembershipError::Unknown(_)), "{error}");
        assert_eq!(
            error.to_string(),
            "its outcome is unknown: it was not committed within 10s, and may still be"
        );
    }
}
