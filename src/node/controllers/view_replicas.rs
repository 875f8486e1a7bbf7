//! Answers what a view says of this node's replicas: which it runs, which may be created, and which
//! are forgotten. Pure; the reconciler and the opener of replicas go by it.

use crate::sm::cluster::view::{self, View};
use crate::storage::ReplicaKey;
use crate::types::{NodeId, ReplicaId};

/// Returns the replicas that `node` is to run, the meta group's first.
pub fn replicas_of(view: &View, node: NodeId) -> impl Iterator<Item = ReplicaKey> {
    view.groups.keys().filter_map(move |group| {
        let replica = view.runs_on(*group, node)?;
        Some(ReplicaKey {
            group: *group,
            replica,
        })
    })
}

/// Returns true if a replica that this node has stored is to be forgotten: the view has had its id,
/// and has it no more.
pub fn is_retired(view: &View, key: ReplicaKey) -> bool {
    key.replica < view.next_replica && view.node_of(key.group, key.replica).is_none()
}

/// Returns true if a replica that this node's log does not hold may be created with nothing in it:
/// only while its group has never counted it as a member. The creation record counts its voters
/// from the first moment, and is what they are made from.
pub fn may_create(group: &view::GroupSpec, replica: ReplicaId) -> bool {
    let was_counted = group
        .reported
        .as_ref()
        .is_some_and(|reported| reported.is_member(replica));
    group.wanted().any(|(wanted, _)| wanted == replica)
        && (group.creation.contains_key(&replica) || !was_counted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::cluster::view::ReportedMembership;
    use crate::sm::testing::view_of;
    use crate::types::{GroupId, LogId};

    const SHARD: GroupId = GroupId(1);

    #[test]
    fn a_replica_is_created_only_while_its_group_never_counted_it() {
        let mut group = view_of(3).groups.remove(&SHARD).expect("a shard");
        let first = *group.creation.keys().next().expect("a voter");
        assert!(may_create(&group, first), "of a new group");
        let new = ReplicaId(77);
        assert!(!may_create(&group, new), "the view does not want it");
        group.replicas.insert(new, NodeId(4));
        assert!(may_create(&group, new), "nothing was reported yet");
        let reported = |voters: &[ReplicaId], learners: &[ReplicaId]| ReportedMembership {
            log_id: LogId { term: 1, index: 5 },
            voters: voters.iter().copied().collect(),
            learners: learners.iter().copied().collect(),
        };
        group.reported = Some(reported(&[first], &[]));
        assert!(may_create(&group, new), "the group has not counted it");
        for counted in [reported(&[first, new], &[]), reported(&[first], &[new])] {
            group.reported = Some(counted);
            assert!(
                !may_create(&group, new),
                "it was counted: {:?}",
                group.reported
            );
        }
        group.reported = None;
        group.replicas.remove(&new);
        group.leaving.insert(new, NodeId(4));
        assert!(!may_create(&group, new), "it is on its way out");
    }

    #[test]
    fn only_what_the_view_has_had_and_has_no_more_is_forgotten() {
        let mut view = view_of(3);
        let next = view.next_replica;
        let key_of = |group, replica| ReplicaKey { group, replica };
        let group = view.groups.get_mut(&SHARD).expect("a shard");
        let (replica, node) = group.replicas.pop_first().expect("a replica");
        assert!(is_retired(&view, key_of(SHARD, replica)));
        view.groups
            .get_mut(&SHARD)
            .expect("a shard")
            .leaving
            .insert(replica, node);
        assert!(
            !is_retired(&view, key_of(SHARD, replica)),
            "it is on its way out"
        );
        let (hosted, _) = view.groups[&SHARD]
            .replicas
            .first_key_value()
            .expect("another replica");
        assert!(!is_retired(&view, key_of(SHARD, *hosted)));
        assert!(
            !is_retired(&view, key_of(SHARD, next)),
            "this view may be an old one, from before its id was given out"
        );
        assert!(
            is_retired(&view, key_of(GroupId(99), replica)),
            "its group is gone"
        );
    }
}
