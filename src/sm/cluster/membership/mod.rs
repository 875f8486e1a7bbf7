//! Which step brings the members of a group nearer to those that the view wants. Asked by the
//! leader of the group, again after each step.
//!
//! A replica is added without a vote, catches up, and then votes. Voters are exchanged so that as
//! many vote as before wherever that can be, and never for a set of which a majority is not up and
//! caught up. A leader that is to go hands over first. Members that the view does not want, or does
//! not know, leave in the end; the report of that to the meta group is what retires them.
//!
//! A witness votes for entries that it can bring others only from its log. So it becomes a voter
//! only when every voter with a map has all that is committed, and one with a map becomes a voter
//! beside it only when it has that too: its log, wherever it begins, then reaches back to where
//! each of them is. There is never more than one that votes, and none is handed the lead.

use std::collections::{BTreeMap, BTreeSet};

use super::view::{GroupSpec, ReportedMembership};
use crate::types::{LogId, NodeId, ReplicaId};

type Replicas = BTreeSet<ReplicaId>;

/// The members of a group as its leader knows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedMembership {
    /// The leader itself.
    pub me: ReplicaId,
    /// Of the entry with the membership in effect.
    pub log_id: LogId,
    pub voters: Replicas,
    pub learners: Replicas,
    /// It is committed, and not in the middle of a change of voters.
    pub is_settled: bool,
    /// Heard of just now. The leader is among them.
    pub alive: Replicas,
    /// Replicas with, but for a few entries, the leader's log. The leader is among them.
    pub caught_up: Replicas,
    /// Replicas that have all that is committed.
    pub complete: Replicas,
    /// Members that keep the log and no map.
    pub witnesses: Replicas,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipStep {
    /// Everything is as the view wants it, and the meta group knows.
    Nothing,
    /// Something is to be done, and can't be yet.
    Wait,
    AddLearner(ReplicaId),
    /// Voters that are none of these go on as learners.
    SetVoters(Replicas),
    RemoveLearners(Replicas),
    /// This leader is to go: to another voter first.
    HandOver(ReplicaId),
    Report(ReportedMembership),
}

/// Returns the next step of a group that the view wants to be `group`.
pub fn next_step(group: &GroupSpec, now: &ObservedMembership) -> MembershipStep {
    let step = decide(group, now);
    check_step(&step, now);
    step
}

fn decide(group: &GroupSpec, now: &ObservedMembership) -> MembershipStep {
    let wanted: Replicas = group.wanted().map(|(replica, _)| replica).collect();
    let members: Replicas = now.voters.union(&now.learners).copied().collect();
    let missing = || wanted.difference(&members);
    let blocked = blocked(group);
    if !now.is_settled {
        // A change that another leader began is brought to its end by the next one.
        let voters = next_voters(group, now).unwrap_or_else(|| now.voters.clone());
        return MembershipStep::SetVoters(with_me(voters, now));
    }
    if let Some(replica) =
        missing().find(|replica| now.alive.contains(replica) && !blocked.contains_key(replica))
    {
        return MembershipStep::AddLearner(*replica);
    }
    if let Some(voters) = next_voters(group, now) {
        return exchange(voters, now);
    }

    // A voter that goes becomes a learner first, so learners are removed after voters are
    // exchanged.
    let surplus: Replicas = now.learners.difference(&wanted).copied().collect();
    if !surplus.is_empty() {
        return MembershipStep::RemoveLearners(surplus);
    }
    let committed = ReportedMembership {
        log_id: now.log_id,
        voters: now.voters.clone(),
        learners: now.learners.clone(),
    };

    // Only a report retires replicas, so it comes last: by now those that go are no members any
    // more.
    if is_new_report(group, &committed) {
        return MembershipStep::Report(committed);
    }

    // A draining group is never settled: it is only to have its members, until its slots are gone.
    if group.is_settled() || group.draining && missing().next().is_none() {
        MembershipStep::Nothing
    } else {
        MembershipStep::Wait
    }
}

/// Asserts that a step asks for nothing that Raft would refuse, or that would take the group's
/// quorum away.
fn check_step(step: &MembershipStep, now: &ObservedMembership) {
    match step {
        MembershipStep::AddLearner(replica) => assert!(
            !now.voters.contains(replica) && !now.learners.contains(replica),
            "{replica} is a member already"
        ),
        MembershipStep::SetVoters(voters) => {
            assert!(voters.contains(&now.me), "a leader stays a voter: {step:?}");
        }
        MembershipStep::RemoveLearners(replicas) => assert!(
            replicas.is_subset(&now.learners),
            "only learners are removed: {step:?}"
        ),
        MembershipStep::HandOver(replica) => {
            assert_ne!(*replica, now.me, "a leader hands over to another");
            assert!(
                now.voters.contains(replica) && !now.witnesses.contains(replica),
                "{replica} cannot lead"
            );
        }
        MembershipStep::Report(_) | MembershipStep::Nothing | MembershipStep::Wait => {}
    }
}

fn exchange(voters: Replicas, now: &ObservedMembership) -> MembershipStep {
    if voters.contains(&now.me) {
        return MembershipStep::SetVoters(voters);
    }

    // The next leader must be able to serve at once, and a witness proposes nothing.
    let able = |replica: &&ReplicaId| {
        now.caught_up.contains(replica)
            && now.alive.contains(replica)
            && !now.witnesses.contains(replica)
    };
    match voters.intersection(&now.voters).find(able) {
        Some(successor) => MembershipStep::HandOver(*successor),
        // Nobody can take the lead yet: the others are exchanged first, and this leader stays.
        None => MembershipStep::SetVoters(with_me(voters, now)),
    }
}

fn with_me(mut voters: Replicas, now: &ObservedMembership) -> Replicas {
    voters.insert(now.me);
    voters
}

/// The wanted replicas that can't come yet, each with the one in its way: a node runs one replica
/// of a group at a time.
fn blocked(group: &GroupSpec) -> BTreeMap<ReplicaId, ReplicaId> {
    let before = |node: NodeId| {
        group
            .leaving
            .iter()
            .find(|(_, at)| **at == node)
            .map(|(replica, _)| *replica)
    };
    group
        .wanted()
        .filter_map(|(replica, node)| Some((replica, before(node)?)))
        .collect()
}

/// The voter that goes before its successor comes, because that is to be on its node: one at a
/// time, and only when nobody else comes.
fn makes_way(
    blocked: &BTreeMap<ReplicaId, ReplicaId>,
    now: &ObservedMembership,
) -> Option<ReplicaId> {
    let all_vote = blocked.values().all(|replica| now.voters.contains(replica));
    let mut in_the_way: Vec<ReplicaId> = blocked.values().copied().collect();

    // The leader goes last, because it has to hand over the lead before.
    in_the_way.sort_by_key(|replica| (*replica == now.me, *replica));
    in_the_way.first().copied().filter(|_| all_vote)
}

/// Returns true if a replica may begin to vote.
fn is_ready(replica: ReplicaId, group: &GroupSpec, now: &ObservedMembership) -> bool {
    let has_map = |voter: &ReplicaId| !now.witnesses.contains(voter) && !group.is_witness(*voter);
    let is_safe = match (
        has_map(&replica),
        group.witness.is_some() || now.voters.iter().any(|voter| !has_map(voter)),
    ) {
        // Without a witness any majority has a replica that can bring this one up to date.
        (true, false) => true,
        // A witness that leads sends only what its log holds, which may begin at what is committed
        // now.
        (true, true) => now.complete.contains(&replica),
        // Its log begins at what is committed: each voter with a map must reach as far as that.
        (false, _) => now
            .voters
            .iter()
            .filter(|voter| has_map(voter))
            .all(|voter| now.complete.contains(voter)),
    };
    is_safe && now.caught_up.contains(&replica) && now.alive.contains(&replica)
}

/// Returns true if a voter keeps a witness away: that votes only once every voter with a map has
/// all that is committed, and this one is not up.
fn keeps_witness_away(
    voter: ReplicaId,
    behind: &Replicas,
    group: &GroupSpec,
    now: &ObservedMembership,
) -> bool {
    let waits = |replica: &ReplicaId| {
        group.is_witness(*replica) && now.alive.contains(replica) && now.caught_up.contains(replica)
    };
    let has_map = !now.witnesses.contains(&voter) && !group.is_witness(voter);
    has_map && !now.alive.contains(&voter) && behind.iter().any(waits)
}

/// The voters to go on with; none: those of now.
fn next_voters(group: &GroupSpec, now: &ObservedMembership) -> Option<Replicas> {
    let wanted = group.electorate();
    let (staying, rest): (Replicas, Replicas) = now
        .voters
        .iter()
        .copied()
        .partition(|voter| wanted.contains(voter));
    let (ready, behind): (Replicas, Replicas) = wanted
        .difference(&now.voters)
        .copied()
        .partition(|voter| is_ready(*voter, group, now));
    let mut next: Replicas = staying.union(&ready).copied().collect();
    if !behind.is_empty() {
        let is_whole = now.voters.is_subset(&now.alive);
        let blocked = blocked(group);
        let some_come = behind
            .iter()
            .any(|replica| now.alive.contains(replica) && !blocked.contains_key(replica));

        // Nobody is missing, so nothing presses: newcomers and outgoing ones are exchanged in one
        // step.
        if is_whole && some_come {
            return None;
        }
        // Those that are still to go stand in for those that are not there yet, the live ones
        // first.
        let outgoing = makes_way(&blocked, now).filter(|_| !some_come);

        // One witness at most, so that in every majority all voters but one have a map.
        let has_witness = next.iter().any(|replica| group.is_witness(*replica));

        // One whose disk is lost would stand in for a witness that waits for it.
        let may = |replica: &ReplicaId| {
            Some(*replica) != outgoing
                && !(has_witness && now.witnesses.contains(replica))
                && !keeps_witness_away(*replica, &behind, group, now)
        };
        let mut standing_in: Vec<ReplicaId> = rest.into_iter().filter(may).collect();
        standing_in.sort_by_key(|replica| {
            (
                *replica != now.me,
                !now.alive.contains(replica),
                now.witnesses.contains(replica),
            )
        });
        let missing = wanted.len().saturating_sub(next.len());
        next.extend(standing_in.into_iter().take(missing));
        // An even number survives no more than the odd one below.
        if next.len() > now.voters.len() && next.len().is_multiple_of(2) {
            return None;
        }
    }

    // A set without a majority that is up could not commit even the change to it.
    let up = next
        .iter()
        .filter(|replica| now.alive.contains(replica) && now.caught_up.contains(replica))
        .count();
    (next != now.voters && !next.is_empty() && up * 2 > next.len()).then_some(next)
}

/// Returns true if this report would tell the meta group something new.
fn is_new_report(group: &GroupSpec, here: &ReportedMembership) -> bool {
    let known = match &group.reported {
        Some(reported) => reported.voters == here.voters && reported.learners == here.learners,
        None => here.learners.is_empty() && here.voters.iter().eq(group.creation.keys()),
    };

    // A replica that is on its way out and no member is retired by a report, though nothing else is
    // new.
    !known
        || group
            .leaving
            .keys()
            .any(|replica| !here.is_member(*replica))
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::cluster::view::WitnessSpec;

    fn set(ids: &[u64]) -> Replicas {
        ids.iter().map(|id| ReplicaId(*id)).collect()
    }

    /// Replica n is on node n; the first ids of `created` began the group, `wanted` are to vote.
    fn group(created: &[u64], wanted: &[u64]) -> GroupSpec {
        let place = |ids: &[u64]| -> BTreeMap<ReplicaId, NodeId> {
            ids.iter().map(|id| (ReplicaId(*id), NodeId(*id))).collect()
        };
        let mut group = GroupSpec::new(NodeId(wanted[0]), place(wanted), &set(wanted));
        group.creation = place(created);
        group.leaving = place(created)
            .into_iter()
            .filter(|(id, _)| !wanted.contains(&id.0))
            .collect();
        group
    }

    fn now(
        me: u64,
        voters: &[u64],
        learners: &[u64],
        alive: &[u64],
        caught_up: &[u64],
    ) -> ObservedMembership {
        ObservedMembership {
            me: ReplicaId(me),
            log_id: LogId::default(),
            voters: set(voters),
            learners: set(learners),
            is_settled: true,
            alive: set(alive),
            caught_up: set(caught_up),
            complete: set(caught_up),
            witnesses: set(&[]),
        }
    }

    /// With these as witnesses, and these with all that is committed.
    fn with(now: ObservedMembership, witnesses: &[u64], complete: &[u64]) -> ObservedMembership {
        ObservedMembership {
            witnesses: set(witnesses),
            complete: set(complete),
            ..now
        }
    }

    fn with_witness(mut group: GroupSpec, witness: u64) -> GroupSpec {
        group.leaving.remove(&ReplicaId(witness));
        GroupSpec {
            witness: Some(WitnessSpec {
                replica: ReplicaId(witness),
                node: NodeId(witness),
            }),
            ..group
        }
    }

    #[test]
    fn a_witness_votes_once_both_replicas_have_all_that_is_committed() {
        let group = with_witness(group(&[1, 2], &[1, 2]), 3);
        let all = [1, 2, 3];
        assert_eq!(
            next(&group, &now(1, &[1, 2], &[], &all, &[1, 2])),
            MembershipStep::AddLearner(ReplicaId(3))
        );
        let learns = |caught_up: &[u64], complete: &[u64]| {
            next(
                &group,
                &with(now(1, &[1, 2], &[3], &all, caught_up), &[3], complete),
            )
        };
        assert_eq!(
            learns(&[1, 2], &[1, 2]),
            MembershipStep::Wait,
            "it has not caught up"
        );
        assert_eq!(
            learns(&all, &[1, 3]),
            MembershipStep::Wait,
            "its log may begin behind what 2 has"
        );
        assert_eq!(learns(&all, &[1, 2]), MembershipStep::SetVoters(set(&all)));
        assert_eq!(
            next(&group, &with(now(1, &all, &[], &all, &all), &[3], &all)),
            MembershipStep::Nothing
        );
    }

    #[test]
    fn a_replica_votes_beside_a_witness_once_it_has_all_that_is_committed() {
        let group = with_witness(group(&[1, 2], &[1, 4]), 3);
        let step = |complete: &[u64]| {
            next(
                &group,
                &with(
                    now(1, &[1, 2, 3], &[4], &[1, 2, 3, 4], &[1, 2, 3, 4]),
                    &[3],
                    complete,
                ),
            )
        };
        assert_eq!(step(&[1, 2, 3]), MembershipStep::Wait);
        assert_eq!(
            step(&[1, 2, 3, 4]),
            MembershipStep::SetVoters(set(&[1, 3, 4]))
        );
        // Without a witness a few entries behind are few enough.
        let plain = super::tests::group(&[1, 2, 5], &[1, 4, 5]);
        let observed = with(
            now(1, &[1, 2, 5], &[4], &[1, 2, 4, 5], &[1, 2, 4, 5]),
            &[],
            &[1, 2, 5],
        );
        assert_eq!(
            next(&plain, &observed),
            MembershipStep::SetVoters(set(&[1, 4, 5]))
        );
    }

    #[test]
    fn one_witness_gives_way_to_another_and_two_never_vote() {
        let mut group = with_witness(group(&[1, 2], &[1, 2]), 4);
        group.leaving.insert(ReplicaId(3), NodeId(3));
        let all = [1, 2, 3, 4];
        let step = |voters: &[u64], learners: &[u64], caught_up: &[u64]| {
            next(
                &group,
                &with(
                    now(1, voters, learners, &all, caught_up),
                    &[3, 4],
                    caught_up,
                ),
            )
        };
        assert_eq!(
            step(&[1, 2, 3], &[], &[1, 2, 3]),
            MembershipStep::AddLearner(ReplicaId(4))
        );
        assert_eq!(step(&[1, 2, 3], &[4], &[1, 2, 3]), MembershipStep::Wait);
        assert_eq!(
            step(&[1, 2, 3], &[4], &all),
            MembershipStep::SetVoters(set(&[1, 2, 4]))
        );
        assert_eq!(
            step(&[1, 2, 4], &[3], &all),
            MembershipStep::RemoveLearners(set(&[3]))
        );
        // With one of the replicas to be replaced as well, and its successor not there yet.
        let mut both = group.clone();
        both.replicas = BTreeMap::from([(ReplicaId(1), NodeId(1)), (ReplicaId(5), NodeId(5))]);
        both.leaving.insert(ReplicaId(2), NodeId(2));
        let alive = [1, 3, 4, 5];
        let observed = with(
            now(1, &[1, 2, 3], &[4, 5], &alive, &[1, 3, 4]),
            &[3, 4],
            &[1, 2, 3, 4],
        );
        assert_eq!(
            next(&both, &observed),
            MembershipStep::SetVoters(set(&[1, 2, 4])),
            "2 stands in, and not the old witness"
        );
    }

    #[test]
    fn a_dead_voter_that_goes_keeps_no_witness_away() {
        let group = with_witness(group(&[1, 2, 3], &[1, 3]), 4);
        let all = [1, 3, 4];
        let alone = with(now(1, &[1, 2, 3], &[4], &all, &all), &[4], &all);
        assert_eq!(
            next(&group, &alone),
            MembershipStep::SetVoters(set(&[1, 3]))
        );
        let rid_of = with(now(1, &[1, 3], &[2, 4], &all, &all), &[4], &all);
        assert_eq!(next(&group, &rid_of), MembershipStep::SetVoters(set(&all)));
        let behind = with(now(1, &[1, 2, 3], &[4], &all, &[1, 3]), &[4], &[1, 3]);
        assert_eq!(
            next(&group, &behind),
            MembershipStep::Wait,
            "the witness is not there yet"
        );
    }

    /// The disk of 2 is lost. 4 is to be where the witness 3 is, and 5 is the next witness.
    #[test]
    fn a_witness_is_moved_when_a_disk_is_lost() {
        let mut group = with_witness(group(&[1, 2, 3], &[1, 4]), 5);
        group.replicas = BTreeMap::from([(ReplicaId(1), NodeId(1)), (ReplicaId(4), NodeId(3))]);
        let all = [1, 3, 4, 5];
        let step = |voters: &[u64], learners: &[u64]| {
            let now = now(1, voters, learners, &all, &[1, 3, 5]);
            next(&group, &with(now, &[3, 5], &[1, 3, 5]))
        };
        assert_eq!(
            step(&[1, 2, 3], &[5]),
            MembershipStep::SetVoters(set(&[1, 3]))
        );
        assert_eq!(
            step(&[1, 3], &[2, 5]),
            MembershipStep::SetVoters(set(&[1, 5]))
        );
        assert_eq!(
            step(&[1, 5], &[2, 3]),
            MembershipStep::RemoveLearners(set(&[2, 3]))
        );
    }

    #[test]
    fn no_witness_is_handed_the_lead() {
        let group = with_witness(group(&[1, 2], &[2, 4]), 3);
        let all = [1, 2, 3, 4];
        let step = |caught_up: &[u64]| {
            next(
                &group,
                &with(now(1, &[1, 2, 3], &[4], &all, caught_up), &[3], &all),
            )
        };
        assert_eq!(step(&all), MembershipStep::HandOver(ReplicaId(2)));
        assert_eq!(
            step(&[1, 3, 4]),
            MembershipStep::SetVoters(set(&[1, 2, 3, 4])),
            "this one stays until another can take over"
        );
    }

    #[test]
    fn a_witness_makes_way_for_a_third_replica() {
        let mut group = group(&[1, 2], &[1, 2, 4]);
        group.leaving.insert(ReplicaId(3), NodeId(3));
        let all = [1, 2, 3, 4];
        let step = |caught_up: &[u64]| {
            next(
                &group,
                &with(now(1, &[1, 2, 3], &[4], &all, caught_up), &[3], caught_up),
            )
        };
        assert_eq!(step(&[1, 2, 3]), MembershipStep::Wait);
        assert_eq!(step(&all), MembershipStep::SetVoters(set(&[1, 2, 4])));
        // On its own node it goes first.
        group.replicas.insert(ReplicaId(4), NodeId(3));
        let observed = with(
            now(1, &[1, 2, 3], &[], &[1, 2, 3], &[1, 2, 3]),
            &[3],
            &[1, 2, 3],
        );
        assert_eq!(
            next(&group, &observed),
            MembershipStep::SetVoters(set(&[1, 2]))
        );
    }

    /// The next step where the meta group knows the members as they are.
    fn next(group: &GroupSpec, now: &ObservedMembership) -> MembershipStep {
        let reported = ReportedMembership {
            log_id: now.log_id,
            voters: now.voters.clone(),
            learners: now.learners.clone(),
        };
        let mut group = group.clone();
        group
            .leaving
            .retain(|replica, _| reported.is_member(*replica));
        next_step(
            &GroupSpec {
                reported: Some(reported),
                ..group
            },
            now,
        )
    }

    #[test]
    fn all_replicas_are_replaced_by_others() {
        let group = group(&[1, 2, 3], &[4, 5, 6]);
        let all = [1, 2, 3, 4, 5, 6];
        let step = |observed| next(&group, &observed);
        assert_eq!(
            step(now(1, &[1, 2, 3], &[], &all, &[1, 2, 3])),
            MembershipStep::AddLearner(ReplicaId(4))
        );
        assert_eq!(
            step(now(1, &[1, 2, 3], &[4, 5, 6], &all, &[1, 2, 3, 4])),
            MembershipStep::Wait
        );
        assert_eq!(
            step(now(1, &[1, 2, 3], &[4, 5, 6], &all, &all)),
            MembershipStep::SetVoters(set(&[1, 4, 5, 6]))
        );
        assert_eq!(
            step(now(1, &[1, 4, 5, 6], &[2, 3], &all, &all)),
            MembershipStep::HandOver(ReplicaId(4))
        );
        assert_eq!(
            step(now(4, &[1, 4, 5, 6], &[2, 3], &all, &all)),
            MembershipStep::SetVoters(set(&[4, 5, 6]))
        );
        assert_eq!(
            step(now(4, &[4, 5, 6], &[1, 2, 3], &all, &all)),
            MembershipStep::RemoveLearners(set(&[1, 2, 3]))
        );
        let report = ReportedMembership {
            log_id: LogId::default(),
            voters: set(&[4, 5, 6]),
            learners: set(&[]),
        };
        assert_eq!(
            next_step(&group, &now(4, &[4, 5, 6], &[], &all, &all)),
            MembershipStep::Report(report)
        );
        assert_eq!(
            step(now(4, &[4, 5, 6], &[], &all, &all)),
            MembershipStep::Nothing
        );
    }

    #[test]
    fn a_dead_voter_is_replaced_as_soon_as_there_is_one_for_it() {
        let group = group(&[1, 2, 3], &[1, 2, 4]);
        assert_eq!(
            next(&group, &now(1, &[1, 2, 3], &[4], &[1, 2, 4], &[1, 2])),
            MembershipStep::Wait
        );
        assert_eq!(
            next(&group, &now(1, &[1, 2, 3], &[4], &[1, 2, 4], &[1, 2, 4])),
            MembershipStep::SetVoters(set(&[1, 2, 4]))
        );
        let dead_newcomer = now(1, &[1, 2, 3], &[4], &[1, 2, 3], &[1, 2, 3]);
        assert_eq!(next(&group, &dead_newcomer), MembershipStep::Wait);
    }

    #[test]
    fn one_grows_to_three_and_back_without_two() {
        let grown = group(&[1], &[1, 2, 3]);
        assert_eq!(
            next(&grown, &now(1, &[1], &[2, 3], &[1, 2, 3], &[1, 2])),
            MembershipStep::Wait
        );
        assert_eq!(
            next(&grown, &now(1, &[1], &[2, 3], &[1, 2], &[1, 2])),
            MembershipStep::Wait,
            "two voters survive no more than one"
        );
        assert_eq!(
            next(&grown, &now(1, &[1], &[2, 3], &[1, 2, 3], &[1, 2, 3])),
            MembershipStep::SetVoters(set(&[1, 2, 3]))
        );
        let shrunk = group(&[1, 2, 3], &[1]);
        assert_eq!(
            next(&shrunk, &now(2, &[1, 2, 3], &[], &[1, 2, 3], &[1, 2, 3])),
            MembershipStep::HandOver(ReplicaId(1))
        );
        assert_eq!(
            next(&shrunk, &now(1, &[1, 2, 3], &[], &[1, 2, 3], &[1, 2, 3])),
            MembershipStep::SetVoters(set(&[1]))
        );
    }

    /// A plan took 2 and 3 away, and the next one wants replicas on their nodes again before they
    /// are gone.
    #[test]
    fn replicas_make_way_one_by_one_for_others_on_their_nodes() {
        let mut group = group(&[1, 2, 3], &[1]);
        group
            .replicas
            .extend([(ReplicaId(4), NodeId(2)), (ReplicaId(5), NodeId(3))]);
        let all = [1, 2, 3, 4, 5];
        let step = |group: &GroupSpec, voters: &[u64], learners: &[u64], caught_up: &[u64]| {
            next(group, &now(1, voters, learners, &all, caught_up))
        };
        assert_eq!(
            step(&group, &[1, 2, 3], &[], &[1, 2, 3]),
            MembershipStep::SetVoters(set(&[1, 3]))
        );
        assert_eq!(
            step(&group, &[1, 3], &[2], &[1, 2, 3]),
            MembershipStep::RemoveLearners(set(&[2]))
        );
        let known = now(1, &[1, 3], &[], &all, &[1, 3]);
        assert!(
            matches!(next_step(&group, &known), MembershipStep::Report(_)),
            "so that 2 is retired"
        );
        group.leaving.remove(&ReplicaId(2));
        assert_eq!(
            step(&group, &[1, 3], &[], &[1, 3]),
            MembershipStep::AddLearner(ReplicaId(4))
        );
        assert_eq!(step(&group, &[1, 3], &[4], &[1, 3]), MembershipStep::Wait);
        assert_eq!(
            step(&group, &[1, 3], &[4], &[1, 3, 4]),
            MembershipStep::SetVoters(set(&[1, 4]))
        );
        assert_eq!(
            step(&group, &[1, 4], &[3], &[1, 3, 4]),
            MembershipStep::RemoveLearners(set(&[3]))
        );
        group.leaving.remove(&ReplicaId(3));
        assert_eq!(
            step(&group, &[1, 4], &[5], &[1, 4, 5]),
            MembershipStep::SetVoters(set(&[1, 4, 5]))
        );
        // With nobody else to stand in, the last one stays.
        let mut single = super::tests::group(&[1], &[6]);
        single.replicas = BTreeMap::from([(ReplicaId(6), NodeId(1))]);
        assert_eq!(
            next(&single, &now(1, &[1], &[], &[1, 6], &[1])),
            MembershipStep::Wait
        );
    }

    #[test]
    fn voters_are_never_a_set_without_a_live_majority() {
        let group = group(&[1, 2, 3], &[3, 4, 5]);
        let step = next(&group, &now(1, &[1, 2, 3], &[4, 5], &[1, 2], &[1, 2]));
        assert_eq!(step, MembershipStep::Wait, "of 3, 4 and 5 none is up");
    }

    #[test]
    fn what_was_created_so_is_no_news_and_a_replica_that_never_joined_is() {
        let whole = group(&[1, 2, 3], &[1, 2, 3]);
        assert_eq!(
            next_step(&whole, &now(1, &[1, 2, 3], &[], &[1, 2, 3], &[1, 2, 3])),
            MembershipStep::Nothing
        );
        let mut unborn = whole.clone();
        unborn.leaving.insert(ReplicaId(9), NodeId(9));
        assert!(matches!(
            next_step(&unborn, &now(1, &[1, 2, 3], &[], &[1, 2, 3], &[1, 2, 3])),
            MembershipStep::Report(_)
        ));
    }
}
