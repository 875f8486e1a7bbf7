//! The tests of the meta group: what its commands do to the view, and how they are written.

use std::collections::BTreeMap;

use super::*;
use crate::sm::cluster::view::PlacementSpec;
use crate::sm::level;
use crate::sm::placement::{first_view, plan};
use crate::sm::testing::{Meta, node, view_of};
use crate::types::{ClusterId, GroupId, LogId, MapVersion, Slot};

type Map = BTreeMap<Bytes, Bytes>;

/// Applies `command` and returns what it answered.
fn run(map: &mut Map, command: MetaCommand) -> MetaOutcome {
    let decoded = MetaCommand::decode(&command.encode()).expect("own encoding");
    let (outcome, batch) = apply(map, 1, decoded).expect("applied");
    for (key, value) in batch {
        match value {
            Some(value) => map.insert(key, value),
            None => map.remove(&key),
        };
    }
    MetaOutcome::decode(&outcome.encode()).expect("own encoding")
}

fn founded() -> Map {
    let mut map = Map::new();
    assert_eq!(
        run(
            &mut map,
            MetaCommand::Found {
                view: Box::new(view_of(3))
            }
        ),
        MetaOutcome::Done
    );
    map
}

fn announce(number: u64, directory: u128, address: &str) -> MetaCommand {
    let address = address.parse().expect("an address");
    MetaCommand::Announce {
        node: NodeId(number),
        directory: DirectoryId(directory),
        address,
        public_address: None,
    }
}

#[test]
fn a_cluster_is_founded_once() {
    let mut map = Map::new();
    assert_eq!(read_view(&map).expect("readable"), None);
    assert_eq!(
        run(&mut map, announce(1, 1, "n1:1")),
        MetaOutcome::Rejected(MetaRejection::NotFounded)
    );
    assert_eq!(
        run(
            &mut map,
            MetaCommand::Found {
                view: Box::new(view_of(3))
            }
        ),
        MetaOutcome::Done
    );
    assert_eq!(read_view(&map).expect("readable"), Some(view_of(3)));
    let second = View {
        cluster: ClusterId(10),
        ..view_of(3)
    };
    let outcome = run(
        &mut map,
        MetaCommand::Found {
            view: Box::new(second),
        },
    );
    assert_eq!(
        outcome,
        MetaOutcome::Rejected(MetaRejection::AlreadyFounded)
    );
    assert_eq!(read_view(&map).expect("readable"), Some(view_of(3)));
}

#[test]
fn a_view_that_does_not_fit_together_is_rejected() {
    type Break = fn(&mut View);
    let table: [(&str, Break); 9] = [
        ("NoMetaGroup", |view| {
            drop(view.groups.remove(&GroupId::META))
        }),
        ("NodeIdNotGivenOut", |view| view.next_node = NodeId(3)),
        ("GroupIdNotGivenOut", |view| view.next_group = GroupId(3)),
        ("ReplicaIdNotGivenOut", |view| view.next_replica.0 -= 1),
        ("AddressTwice", |view| {
            view.nodes.get_mut(&NodeId(1)).expect("a node").address = node(2).address
        }),
        ("NodeTwiceInGroup", |view| {
            view.groups
                .get_mut(&GroupId(1))
                .expect("a shard")
                .replicas
                .values_mut()
                .for_each(|at| *at = NodeId(1));
        }),
        ("ReplicaOnUnknownNode", |view| {
            drop(view.nodes.remove(&NodeId(2)))
        }),
        ("HomeWithoutReplica", |view| {
            view.groups.get_mut(&GroupId(1)).expect("a shard").home = NodeId(7)
        }),
        ("SlotWithoutShard", |view| {
            view.slots
                .set_owner(Slot::new(5).expect("a slot"), GroupId(8))
        }),
    ];
    for (name, damage) in table {
        let mut view = view_of(3);
        damage(&mut view);
        let mut map = Map::new();
        let outcome = run(
            &mut map,
            MetaCommand::Found {
                view: Box::new(view),
            },
        );
        assert!(
            matches!(
                &outcome,
                MetaOutcome::Rejected(MetaRejection::Inconsistent(_))
            ),
            "{name}: {outcome:?}"
        );
        assert!(format!("{outcome:?}").contains(name), "{name}: {outcome:?}");
        assert!(map.is_empty());
    }
}

#[test]
fn a_node_announces_a_new_address() {
    let mut map = founded();
    assert_eq!(run(&mut map, announce(2, 2, "n2:1")), MetaOutcome::Done);
    assert_eq!(
        read_view(&map).expect("readable"),
        Some(view_of(3)),
        "nothing new, nothing changed"
    );
    assert_eq!(
        run(&mut map, announce(2, 2, "elsewhere:1")),
        MetaOutcome::Done
    );
    let changed = read_view(&map).expect("readable").expect("founded");
    assert_eq!(changed.version, MapVersion(2));
    assert_eq!(changed.nodes[&NodeId(2)].address.as_str(), "elsewhere:1");
}

#[test]
fn an_announcement_is_believed_only_of_the_right_directory_and_a_free_address() {
    let mut map = founded();
    let before = map.clone();
    let other = MetaRejection::OtherDirectory {
        node: NodeId(2),
        directory: DirectoryId(2),
    };
    assert_eq!(
        run(&mut map, announce(2, 7, "n2:1")),
        MetaOutcome::Rejected(other)
    );
    assert_eq!(
        run(&mut map, announce(4, 4, "n4:1")),
        MetaOutcome::Rejected(MetaRejection::UnknownNode(NodeId(4)))
    );
    let taken = MetaRejection::AddressTaken {
        address: node(3).address,
        by: NodeId(3),
    };
    assert_eq!(
        run(&mut map, announce(2, 2, "n3:1")),
        MetaOutcome::Rejected(taken)
    );
    assert_eq!(map, before);
}

#[test]
fn a_report_from_before_the_plan_retires_nothing() {
    let mut meta = Meta::founded(view_of(3));
    let (group, old) = (GroupId(1), meta.view());
    let members = old.groups[&group].voters();
    let reported = ReportedMembership {
        log_id: LogId { term: 1, index: 5 },
        voters: members,
        learners: BTreeSet::new(),
    };
    let report = |plan| MetaCommand::Report {
        group,
        reported: reported.clone(),
        plan,
    };
    let wanted = vec![node(1), node(2), node(4)];
    meta.install(
        plan(&old, old.placement, &wanted, &BTreeSet::new())
            .expect("a plan")
            .view,
    );
    // The newcomer is planned out again, and may have become a voter meanwhile.
    let back = vec![node(1), node(2), node(3)];
    meta.install(
        plan(&meta.view(), old.placement, &back, &BTreeSet::new())
            .expect("a plan")
            .view,
    );
    let before = meta.view();
    let newcomers = before.groups[&group]
        .leaving
        .keys()
        .filter(|replica| !reported.is_member(**replica))
        .count();
    assert!(newcomers > 0, "{before:?}");
    let outdated = MetaOutcome::Rejected(MetaRejection::Outdated {
        version: before.version,
    });
    assert_eq!(meta.run(report(old.epoch)), outdated);
    assert_eq!(meta.view(), before);
    assert_eq!(meta.run(report(before.epoch)), MetaOutcome::Done);
    assert!(
        meta.view().groups[&group]
            .leaving
            .keys()
            .all(|replica| reported.is_member(*replica))
    );
}

#[test]
fn the_encodings_of_a_view_and_an_announcement_stand() {
    let alone = first_view(
        ClusterId(1),
        PlacementSpec {
            shards: Some(2),
            ..PlacementSpec::default()
        },
        vec![node(1)],
    )
    .expect("a view");
    let body: &[u8] = b"\x2000000000000000000000000000000001\x01\x01\x00\x00\x01\x02\
            \x01\x01\x04n1:1\x00\x2000000000000000000000000000000001\
            \x00\x00\x03\x00\x01\x01\x01\x01\x00\x00\x01\x01\x01\x00\x00\
            \x01\x01\x01\x02\x01\x00\x00\x01\x02\x01\x00\x00\x02\x01\x01\x03\x01\x00\x00\x01\x03\
            \x01\x00\x00\x02\x80\x10\x01\x80\x10\x02\x02\x80\x10\x01\x80\x10\x02\x00\x02\x03\x04\
            \x01";
    let (first, second) = ([b"\x01", body].concat(), [b"\x02", body, b"\x00"].concat());
    assert_eq!(&alone.encode()[..], second);
    assert_eq!(View::decode(&second).expect("own encoding"), alone);
    assert_eq!(
        View::decode(&first).expect("as it was written before there were witnesses"),
        alone
    );
    assert!(
        View::decode(&[b"\x03", body, b"\x00"].concat()).is_err(),
        "a later format"
    );
    let bytes = announce(1, 2, "a:1").encode();
    assert_eq!(
        &bytes[..],
        b"\x01\x01\x01\x2000000000000000000000000000000002\x03a:1\x00"
    );

    let found = MetaCommand::Found {
        view: Box::new(alone.clone()),
    };
    assert_eq!(&found.encode()[..], [b"\x02\x00", body, b"\x00"].concat());
    assert_eq!(
        MetaCommand::decode(&[b"\x01\x00", body].concat()).expect("the first format"),
        found
    );
    let plan = MetaCommand::InstallPlan {
        base: MapVersion(7),
        next: Box::new(alone),
    };
    assert_eq!(
        &plan.encode()[..],
        [b"\x02\x02\x07", body, b"\x00"].concat()
    );
    assert_eq!(
        MetaCommand::decode(&[b"\x01\x02\x07", body].concat()).expect("the first format"),
        plan
    );
}

#[test]
fn the_encodings_that_have_a_level_stand_and_a_later_one_says_so() {
    let alone = first_view(
        ClusterId(1),
        PlacementSpec {
            shards: Some(2),
            ..PlacementSpec::default()
        },
        vec![node(1)],
    )
    .expect("a view");
    let old = alone.encode();
    let view = View { level: 1, ..alone };
    let body = [&old[1..], b"\x01"].concat();
    assert_eq!(view.encode()[..], [b"\x03\x01", &body[..]].concat());
    let plan = MetaCommand::InstallPlan {
        base: MapVersion(7),
        next: Box::new(view.clone()),
    };
    assert_eq!(plan.encode()[..], [b"\x03\x01\x02\x07", &body[..]].concat());
    let raise = MetaCommand::RaiseLevel {
        level: 1,
        over: MapVersion(8),
    };
    assert_eq!(raise.encode()[..], *b"\x03\x01\x07\x01\x08");
    for command in [
        plan,
        raise,
        MetaCommand::Found {
            view: Box::new(view.clone()),
        },
    ] {
        assert_eq!(
            MetaCommand::decode(&command.encode()).expect("own encoding"),
            command
        );
    }
    assert_eq!(View::decode(&view.encode()).expect("own encoding"), view);

    for format in [codec::LEVELED, codec::LEVELED + 1] {
        for rest in [&b"\x04"[..], b"\x04\xff\xff\xff"] {
            let bytes = [&[format], rest].concat();
            let sentence = format!(
                "this cluster uses level 4, this program knows {}: start a newer one",
                level::LEVEL
            );
            let view = View::decode(&bytes).expect_err("a later level").to_string();
            assert_eq!(view, format!("cannot read a view: {sentence}"));
            let command = MetaCommand::decode(&bytes)
                .expect_err("a later level")
                .to_string();
            assert_eq!(
                command,
                format!("cannot read a command of the meta group: {sentence}")
            );
        }
    }
    assert!(
        matches!(
            View::decode(b"\x04\x01"),
            Err(StoreError::Undecodable { .. })
        ),
        "a format of a known level"
    );
    assert!(View::decode(b"\x03").is_err());
}

#[test]
fn a_level_is_raised_over_the_view_that_was_asked_and_never_lowered() {
    let mut map = founded();
    let level = |map: &Map| read_view(map).expect("readable").expect("founded").level;
    let raise = |level, over| MetaCommand::RaiseLevel {
        level,
        over: MapVersion(over),
    };
    assert_eq!(
        run(&mut Map::new(), raise(1, 1)),
        MetaOutcome::Rejected(MetaRejection::NotFounded)
    );
    let outdated = MetaOutcome::Rejected(MetaRejection::Outdated {
        version: MapVersion(1),
    });
    assert_eq!((run(&mut map, raise(1, 2)), level(&map)), (outdated, 0));
    assert_eq!(
        (run(&mut map, raise(1, 1)), level(&map)),
        (MetaOutcome::Done, 1)
    );
    assert_eq!(
        (run(&mut map, raise(0, 2)), level(&map)),
        (MetaOutcome::Done, 1)
    );
    let view = read_view(&map).expect("readable").expect("founded");
    assert_eq!(view.version, MapVersion(2), "nothing new, nothing changed");
    let wanted = vec![node(1), node(2), node(4)];
    let next = plan(&view, view.placement, &wanted, &BTreeSet::new())
        .expect("a plan")
        .view;
    let lowered = View {
        level: 0,
        ..next.clone()
    };
    let install = |next| MetaCommand::InstallPlan {
        base: MapVersion(2),
        next: Box::new(next),
    };
    assert_eq!(
        run(&mut map, install(lowered)),
        MetaOutcome::Rejected(MetaRejection::NotASuccessor(PlanViolation::Numbers))
    );
    assert_eq!(
        (run(&mut map, install(next)), level(&map)),
        (MetaOutcome::Done, 1)
    );
}

#[test]
fn the_encoding_of_witnesses_stands() {
    let asked = PlacementSpec {
        replication_factor: Some(2),
        shards: Some(1),
        ..PlacementSpec::default()
    };
    let view = first_view(ClusterId(1), asked, vec![node(1), node(2), node(3)]).expect("a view");
    let Some(witness) = view.groups[&GroupId(1)].witness else {
        panic!("no witness: {view:?}")
    };
    let without = {
        let mut view = view.clone();
        view.groups
            .values_mut()
            .for_each(|group| group.witness = None);
        view.encode()
    };
    let (bytes, end) = (view.encode(), without.len() - 1);
    assert_eq!((&bytes[..end], without[end]), (&without[..end], 0));
    assert_eq!(
        &bytes[end..],
        [1, 1, witness.replica.0 as u8, witness.node.0 as u8]
    );
    assert_eq!(View::decode(&bytes).expect("own encoding"), view);
}

#[test]
fn a_witness_does_not_become_another_kind_of_replica() {
    let asked = PlacementSpec {
        replication_factor: Some(2),
        shards: Some(1),
        ..PlacementSpec::default()
    };
    let view = first_view(ClusterId(9), asked, vec![node(1), node(2), node(3)]).expect("a view");
    let mut meta = Meta::founded(view.clone());
    let mut turned = View {
        epoch: PlanEpoch(2),
        version: MapVersion(2),
        ..view
    };
    let group = turned.groups.get_mut(&GroupId(1)).expect("a shard");
    let witness = group.witness.take().expect("a witness");
    group.replicas.insert(witness.replica, witness.node);
    let install = MetaCommand::InstallPlan {
        base: MapVersion(1),
        next: Box::new(turned),
    };
    let refused = MetaRejection::NotASuccessor(PlanViolation::Replica(witness.replica));
    assert_eq!(meta.run(install), MetaOutcome::Rejected(refused));
}

#[test]
fn the_encodings_of_moves_and_reports_stand() {
    let slots = [Slot::new(7), Slot::new(300)]
        .into_iter()
        .map(|slot| slot.expect("a slot"))
        .collect();
    let reported = ReportedMembership {
        log_id: LogId {
            term: 3,
            index: 200,
        },
        voters: BTreeSet::from([ReplicaId(4), ReplicaId(5)]),
        learners: BTreeSet::from([ReplicaId(6)]),
    };
    let golden: [(MetaCommand, &[u8]); 4] = [
        (
            MetaCommand::OpenMove {
                slots,
                from: GroupId(1),
                to: GroupId(2),
            },
            b"\x01\x03\x02\x07\xac\x02\x01\x02",
        ),
        (MetaCommand::CommitMove { id: MoveId(9) }, b"\x01\x04\x09"),
        (MetaCommand::AbortMove { id: MoveId(9) }, b"\x01\x05\x09"),
        (
            MetaCommand::Report {
                group: GroupId(1),
                reported,
                plan: PlanEpoch(8),
            },
            b"\x01\x06\x01\x03\xc8\x01\x02\x04\x05\x01\x06\x08",
        ),
    ];
    for (command, bytes) in golden {
        assert_eq!(command.encode()[..], *bytes, "{command:?}");
        assert_eq!(MetaCommand::decode(bytes).expect("decoded"), command);
        for cut in 0..bytes.len() {
            assert!(
                MetaCommand::decode(&bytes[..cut]).is_err(),
                "{command:?} cut to {cut} bytes was taken"
            );
        }
    }
    assert!(
        MetaCommand::decode(b"\x01\x07").is_err(),
        "an unknown command"
    );
    assert!(
        MetaCommand::decode(b"\x63\x04\x09").is_err(),
        "an unknown format"
    );
}

#[test]
fn a_plan_is_accepted_over_the_view_it_was_drawn_up_from_and_takes_nothing_away() {
    type Break = fn(&mut View);
    let mut meta = Meta::founded(view_of(3));
    let old = meta.view();
    let wanted = vec![node(1), node(2), node(4)];
    let next = plan(&old, old.placement, &wanted, &BTreeSet::new())
        .expect("a plan")
        .view;
    let install = |base, next: &View| MetaCommand::InstallPlan {
        base,
        next: Box::new(next.clone()),
    };
    let outdated = MetaOutcome::Rejected(MetaRejection::Outdated {
        version: old.version,
    });
    assert_eq!(
        meta.run(install(MapVersion(old.version.0 + 1), &next)),
        outdated
    );
    let table: [(Break, PlanViolation); 10] = [
        (|next| next.cluster = ClusterId(1), PlanViolation::Numbers),
        (|next| next.epoch.0 += 1, PlanViolation::Numbers),
        (|next| next.version.0 += 1, PlanViolation::Numbers),
        (|next| next.next_move.0 += 1, PlanViolation::Ids),
        (
            |next| {
                next.slots
                    .set_owner(Slot::all().next().expect("a slot"), GroupId(3))
            },
            PlanViolation::Slots,
        ),
        (
            |next| next.nodes.get_mut(&NodeId(3)).expect("a node").directory = DirectoryId(99),
            PlanViolation::Node(NodeId(3)),
        ),
        (
            |next| {
                next.groups
                    .get_mut(&GroupId(1))
                    .expect("a group")
                    .creation
                    .clear()
            },
            PlanViolation::Group(GroupId(1)),
        ),
        (
            |next| {
                next.groups
                    .get_mut(&GroupId(1))
                    .expect("a group")
                    .creation
                    .extend([(ReplicaId(0), NodeId(1))])
            },
            PlanViolation::Group(GroupId(1)),
        ),
        (
            |next| next.groups.get_mut(&GroupId(1)).expect("a group").reported = None,
            PlanViolation::Group(GroupId(1)),
        ),
        (
            |next| {
                next.groups
                    .get_mut(&GroupId(1))
                    .expect("a group")
                    .leaving
                    .clear()
            },
            PlanViolation::Replica(ReplicaId(0)),
        ),
    ];
    let told = |meta: &mut Meta, group| {
        let members = meta.view().groups[&group].voters();
        let reported = ReportedMembership {
            log_id: LogId { term: 1, index: 5 },
            voters: members,
            learners: BTreeSet::new(),
        };
        assert_eq!(
            meta.run(MetaCommand::Report {
                group,
                reported,
                plan: old.epoch
            }),
            MetaOutcome::Done
        );
    };
    told(&mut meta, GroupId(1));
    let before = meta.view();
    let next = plan(&before, old.placement, &wanted, &BTreeSet::new())
        .expect("a plan")
        .view;
    for (change, misstep) in &table {
        let mut broken = next.clone();
        change(&mut broken);
        let outcome = meta.run(install(before.version, &broken));
        let is_right = match (&outcome, misstep) {
            (
                MetaOutcome::Rejected(MetaRejection::NotASuccessor(PlanViolation::Replica(_))),
                PlanViolation::Replica(_),
            ) => true,
            (MetaOutcome::Rejected(MetaRejection::NotASuccessor(found)), misstep) => {
                found == misstep
            }
            // What does not fit together is found before.
            (MetaOutcome::Rejected(MetaRejection::Inconsistent(_)), PlanViolation::Group(_)) => {
                true
            }
            _ => false,
        };
        assert!(is_right, "{misstep:?}: {outcome:?}");
        assert_eq!(meta.view(), before);
    }
    assert_eq!(meta.run(install(before.version, &next)), MetaOutcome::Done);
    assert_eq!(meta.view(), next);
    let twice = MetaOutcome::Rejected(MetaRejection::Outdated {
        version: next.version,
    });
    assert_eq!(meta.run(install(before.version, &next)), twice);
}

/// Ids are never reused: data left behind under an id is met by nobody who comes later.
#[test]
fn ids_are_never_given_out_again_and_open_moves_stay() {
    let mut meta = Meta::founded(view_of(3));
    let old = meta.view();
    let change = |meta: &mut Meta, nodes: &[u32]| {
        let view = meta.view();
        let wanted: Vec<NodeSpec> = nodes.iter().copied().map(node).collect();
        plan(&view, view.placement, &wanted, &BTreeSet::new())
            .expect("a plan")
            .view
    };
    // The fourth comes and goes again, and with it the newest of all ids.
    for nodes in [&[1, 2, 3, 4][..], &[1, 2, 3]] {
        let next = change(&mut meta, nodes);
        meta.install(next);
        meta.settle();
    }
    let before = meta.view();
    assert!(before.is_settled() && before.nodes.len() == 3, "{before:?}");
    let gone_node = NodeId(before.next_node.0 - 1);
    let gone_group = GroupId(before.next_group.0 - 1);
    let of = &before.groups[&GroupId(1)];
    let hosted: BTreeSet<ReplicaId> = before
        .groups
        .values()
        .flat_map(|of| of.hosted().map(|(id, _)| id))
        .collect();
    let used = (old.next_replica.0..before.next_replica.0).map(ReplicaId);
    let gone_replica = used
        .rev()
        .find(|id| !hosted.contains(id))
        .expect("a retired replica");
    assert!(!before.nodes.contains_key(&gone_node) && !before.groups.contains_key(&gone_group));
    let refused = |next: &View| match Meta::founded(before.clone()).run(MetaCommand::InstallPlan {
        base: before.version,
        next: Box::new(next.clone()),
    }) {
        MetaOutcome::Rejected(MetaRejection::NotASuccessor(misstep)) => misstep,
        other => panic!("{other:?}"),
    };

    // Nothing new is in this one, so that it is about the counters alone.
    let fewer = plan(
        &before,
        PlacementSpec {
            replication_factor: Some(1),
            ..before.placement
        },
        &[1, 2, 3].map(node),
        &BTreeSet::new(),
    );
    let fewer = fewer.expect("a plan").view;
    for lower in [
        |next: &mut View| next.next_node.0 -= 1,
        |next: &mut View| next.next_group.0 -= 1,
    ] {
        let mut next = fewer.clone();
        lower(&mut next);
        assert_eq!(refused(&next), PlanViolation::Ids);
    }

    let grown = change(&mut Meta::founded(before.clone()), &[1, 2, 3, 5]);
    let (new_node, new_group) = (before.next_node, before.next_group);
    let mut next = grown.clone();
    for of in next.groups.values_mut() {
        of.replicas
            .values_mut()
            .chain(of.creation.values_mut())
            .filter(|at| **at == new_node)
            .for_each(|at| *at = gone_node);
        of.home = if of.home == new_node {
            gone_node
        } else {
            of.home
        };
    }
    let moved = next.nodes.remove(&new_node).expect("it was planned in");
    next.nodes.insert(gone_node, moved);
    assert_eq!(refused(&next), PlanViolation::Node(gone_node));

    let mut next = grown.clone();
    let moved = next.groups.remove(&new_group).expect("it was planned in");
    next.groups.insert(gone_group, moved);
    for slot in Slot::all().filter(|slot| grown.targets.owner(*slot) == new_group) {
        next.targets.set_owner(slot, gone_group);
    }
    assert_eq!(refused(&next), PlanViolation::Group(gone_group));

    let mut next = grown.clone();
    let newcomer = |of: &view::GroupSpec| {
        of.replicas
            .iter()
            .find(|(id, _)| **id >= before.next_replica)
            .map(|(id, at)| (*id, *at))
    };
    let (group, (replica, at)) = next
        .groups
        .iter()
        .filter(|(id, _)| !id.is_meta() && before.groups.contains_key(id))
        .find_map(|(id, of)| Some((*id, newcomer(of)?)))
        .expect("a replica of an old group on the new node");
    let replicas = &mut next.groups.get_mut(&group).expect("a group").replicas;
    replicas.remove(&replica);
    replicas.insert(gone_replica, at);
    assert_eq!(refused(&next), PlanViolation::Replica(gone_replica));
    assert!(of.hosted().all(|(id, _)| id != gone_replica));

    let mut moving = Meta::founded(before.clone());
    moving.install(grown);
    assert!(!moving.open_moves(4).is_empty());
    let mut next = change(&mut moving, &[1, 2, 3]);
    next.moves.clear();
    let base = moving.view().version;
    let outcome = moving.run(MetaCommand::InstallPlan {
        base,
        next: Box::new(next),
    });
    assert_eq!(
        outcome,
        MetaOutcome::Rejected(MetaRejection::NotASuccessor(PlanViolation::Slots))
    );
}

#[test]
fn a_move_is_opened_once_where_it_is_due_and_ends_once() {
    let mut meta = Meta::founded(view_of(3));
    let old = meta.view();
    let wanted = vec![node(1), node(2), node(3), node(4)];
    meta.install(
        plan(&old, old.placement, &wanted, &BTreeSet::new())
            .expect("a plan")
            .view,
    );
    let before = meta.view();
    let due = before.misplaced_slots().next().expect("slots are to move");
    let (from, to) = (before.slots.owner(due), before.targets.owner(due));
    let still = before
        .slots
        .slots_of(from)
        .find(|slot| before.targets.owner(*slot) == from)
        .expect("some stay");
    let open = |slots: &[Slot], from, to| MetaCommand::OpenMove {
        slots: slots.iter().copied().collect(),
        from,
        to,
    };
    let not_due = |slot| MetaOutcome::Rejected(MetaRejection::NotToBeMoved(slot));
    for (command, outcome) in [
        (open(&[still], from, to), not_due(still)),
        (open(&[due], from, from), not_due(due)),
        (open(&[due], to, from), not_due(due)),
        (
            open(&[], from, to),
            MetaOutcome::Rejected(MetaRejection::UnknownGroup(to)),
        ),
        (
            MetaCommand::CommitMove {
                id: before.next_move,
            },
            MetaOutcome::Rejected(MetaRejection::NoSuchMove(before.next_move)),
        ),
        (
            MetaCommand::AbortMove {
                id: before.next_move,
            },
            MetaOutcome::Rejected(MetaRejection::NoSuchMove(before.next_move)),
        ),
    ] {
        assert_eq!(meta.run(command.clone()), outcome, "{command:?}");
        assert_eq!(meta.view(), before);
    }
    let id = before.next_move;
    assert_eq!(
        meta.run(open(&[due], from, to)),
        MetaOutcome::MoveOpened { id }
    );
    assert_eq!(
        meta.run(open(&[due], from, to)),
        not_due(due),
        "one move of a slot at a time"
    );
    assert_eq!(meta.run(MetaCommand::AbortMove { id }), MetaOutcome::Done);
    assert_eq!(meta.view().slots.owner(due), from);
    assert_eq!(
        meta.run(MetaCommand::CommitMove { id }),
        MetaOutcome::Rejected(MetaRejection::NoSuchMove(id))
    );
    let again = MoveId(id.0 + 1);
    assert_eq!(
        meta.run(open(&[due], from, to)),
        MetaOutcome::MoveOpened { id: again },
        "ids are never given out again"
    );
    assert_eq!(
        meta.run(MetaCommand::CommitMove { id: again }),
        MetaOutcome::Done
    );
    assert_eq!(meta.view().slots.owner(due), to);
    assert_eq!(meta.run(open(&[due], from, to)), not_due(due));
}

#[test]
fn a_report_of_an_unknown_group_is_rejected_and_an_older_one_changes_nothing() {
    let mut meta = Meta::founded(view_of(3));
    let view = meta.view();
    let report = |group, index, learners: &[u64]| {
        let voters = view.groups[&GroupId(1)].voters();
        let learners = learners.iter().map(|id| ReplicaId(*id)).collect();
        let reported = ReportedMembership {
            log_id: LogId { term: 1, index },
            voters,
            learners,
        };
        MetaCommand::Report {
            group,
            reported,
            plan: view.epoch,
        }
    };
    let unknown = MetaOutcome::Rejected(MetaRejection::UnknownGroup(GroupId(77)));
    assert_eq!(meta.run(report(GroupId(77), 5, &[])), unknown);
    assert_eq!(meta.view(), view);
    assert_eq!(meta.run(report(GroupId(1), 5, &[])), MetaOutcome::Done);
    let known = meta.view();
    assert_eq!(known.version.0, view.version.0 + 1);
    for same_or_older in [report(GroupId(1), 5, &[]), report(GroupId(1), 4, &[99])] {
        assert_eq!(meta.run(same_or_older), MetaOutcome::Done);
        assert_eq!(meta.view(), known);
    }
}
