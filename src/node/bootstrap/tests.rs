//! The tests of bootstrapping: which nodes found a cluster, join one or wait, by what is answered.

use super::*;
use crate::sm::cluster::view::{NodeSpec, PlacementSpec};
use crate::sm::level::LEVEL;
use crate::sm::placement::first_view;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn address(n: usize) -> Address {
    format!("10.0.0.{n}:1").parse().expect("an address")
}

/// A node as the protocol sees it: a directory with a stamp.
#[derive(Debug, Clone)]
struct Actor {
    address: Address,
    directory: DirectoryId,
    view: Vec<Address>,
    join_only: bool,
    stamp: Stamp,
}

impl Actor {
    fn own(&self) -> OwnFacts<'_> {
        OwnFacts {
            address: &self.address,
            directory: self.directory,
            view: &self.view,
            join_only: self.join_only,
            stamp: &self.stamp,
            speaks: LEVEL,
        }
    }

    fn identity(&self) -> Identity {
        Identity {
            directory: self.directory,
            address: self.address.clone(),
            public_address: None,
            standing: standing(self.own()),
            speaks: LEVEL,
            level: 0,
            start: None,
            holds_level: false,
        }
    }
}

fn actors(n: usize) -> Vec<Actor> {
    let view: Vec<Address> = (0..n).map(address).collect();
    let actor = |i: usize| Actor {
        address: address(i),
        directory: DirectoryId(i as u128 + 1),
        view: view.clone(),
        join_only: false,
        stamp: Stamp::Fresh,
    };
    (0..n).map(actor).collect()
}

fn answers(
    actors: &[Actor],
    by: usize,
    reachable: impl Fn(usize) -> bool,
) -> BTreeMap<Address, PeerAnswer> {
    let others = actors.iter().enumerate().filter(|(i, _)| *i != by);
    let hear = |(i, actor): (usize, &Actor)| {
        let silent = PeerAnswer::Silent {
            reason: "connection refused".into(),
        };
        (
            actor.address.clone(),
            if reachable(i) {
                PeerAnswer::Identity(actor.identity())
            } else {
                silent
            },
        )
    };
    others.map(hear).collect()
}

fn found(actors: &[Actor]) -> View {
    let node = |actor: &Actor| NodeSpec {
        address: actor.address.clone(),
        public_address: None,
        directory: actor.directory,
    };
    first_view(
        ClusterId(7),
        PlacementSpec::default(),
        actors.iter().map(node).collect(),
    )
    .expect("a view")
}

#[test]
fn the_first_of_the_view_founds_once_everyone_answers() {
    let actors = actors(3);
    let step = next_step(actors[0].own(), &answers(&actors, 0, |i| i != 2));
    assert_eq!(
        step,
        BootstrapStep::Wait(WaitReason::ForNodes(vec![(
            address(2),
            "connection refused".into()
        )]))
    );
    assert_eq!(
        next_step(actors[0].own(), &answers(&actors, 0, |_| true)),
        BootstrapStep::AskPromises
    );
    let waits = BootstrapStep::Wait(WaitReason::ForFounder {
        founder: address(0),
    });
    assert_eq!(
        next_step(actors[1].own(), &answers(&actors, 1, |_| true)),
        waits
    );
}

#[test]
fn a_program_that_knows_less_than_the_cluster_uses_is_refused() {
    let mut actors = actors(3);
    let view = Box::new(View {
        level: 4,
        ..found(&actors)
    });
    actors[0].stamp = Stamp::Founding { view };
    let answers = answers(&actors, 1, |_| true);
    for (stamp, by) in [(Stamp::Fresh, 1), (actors[0].stamp.clone(), 0)] {
        let step = |speaks| {
            next_step(
                OwnFacts {
                    stamp: &stamp,
                    speaks,
                    ..actors[by].own()
                },
                &answers,
            )
        };
        let BootstrapStep::Refuse(refusal) = step(3) else {
            panic!("not refused")
        };
        assert_eq!(
            refusal.to_string(),
            "this cluster uses level 4, this program knows 3: start a newer one"
        );
        assert!(matches!(
            step(4),
            BootstrapStep::Start | BootstrapStep::Adopt { .. }
        ));
    }
}

#[test]
fn a_node_adopts_the_cluster_that_names_its_directory() {
    let mut actors = actors(3);
    let view = Box::new(found(&actors));
    actors[0].stamp = Stamp::Founding { view: view.clone() };
    let node = view.node_at(&address(1)).expect("a member");
    assert_eq!(
        next_step(actors[1].own(), &answers(&actors, 1, |_| true)),
        BootstrapStep::Adopt { view, node }
    );
}

/// Others of those that left with it may not have heard the news yet.
#[test]
fn a_retired_node_is_not_taken_back_by_an_old_view() {
    let mut actors = actors(3);
    let view = Box::new(found(&actors));
    let node = view.node_at(&address(1)).expect("a member");
    actors[0].stamp = Stamp::Founding { view: view.clone() };
    actors[1].stamp = Stamp::Retired {
        cluster: view.cluster,
        node,
        members: vec![address(9)],
    };
    let step = next_step(actors[1].own(), &answers(&actors, 1, |_| true));
    assert!(
        matches!(&step, BootstrapStep::Wait(WaitReason::Spare { .. })),
        "{step:?}"
    );
    // Under another id it is a newcomer.
    let mut later = view.clone();
    let place = later.nodes.remove(&node).expect("it was there");
    later.nodes.insert(NodeId(9), place);
    actors[0].stamp = Stamp::Founding {
        view: later.clone(),
    };
    assert_eq!(
        next_step(actors[1].own(), &answers(&actors, 1, |_| true)),
        BootstrapStep::Adopt {
            view: later,
            node: NodeId(9)
        }
    );
}

#[test]
fn a_retired_node_knows_where_it_belonged_and_tells_others() {
    let mut actors = actors(2);
    let members = vec![address(8), address(9)];
    actors[1].stamp = Stamp::Retired {
        cluster: ClusterId(7),
        node: NodeId(3),
        members: members.clone(),
    };
    let spare = BootstrapStep::Wait(WaitReason::Spare {
        cluster: Some(ClusterId(7)),
        members,
    });
    assert_eq!(
        next_step(actors[1].own(), &answers(&actors, 1, |_| false)),
        spare,
        "by itself"
    );
    assert_eq!(
        next_step(actors[0].own(), &answers(&actors, 0, |_| true)),
        spare,
        "a fresh node that hears of nobody else"
    );
}

#[test]
fn a_lost_disk_waits_and_a_stranger_is_a_spare() {
    let mut actors = actors(3);
    let view = Box::new(found(&actors));
    actors[1].stamp = Stamp::Founding { view };
    actors[0].directory = DirectoryId(99);
    let step = next_step(actors[0].own(), &answers(&actors, 0, |_| true));
    assert!(
        matches!(step, BootstrapStep::Wait(WaitReason::LostDirectory { .. })),
        "{step:?}"
    );
    actors[0].address = address(9);
    let step = next_step(actors[0].own(), &answers(&actors, 0, |_| true));
    assert!(
        matches!(step, BootstrapStep::Wait(WaitReason::Spare { .. })),
        "{step:?}"
    );
}

#[test]
fn views_that_differ_are_waited_for_naming_both() {
    let mut actors = actors(3);
    assert_eq!(unnamed(actors[0].own()), None);
    let stranger = OwnFacts {
        address: &address(7),
        ..actors[0].own()
    };
    assert!(unnamed(stranger).is_some_and(|said| said.contains("cluster add 10.0.0.7:1")));
    actors[1].view = vec![address(0), address(1)];
    let BootstrapStep::Wait(waiting) = next_step(actors[0].own(), &answers(&actors, 0, |_| true))
    else {
        panic!("it ends")
    };
    assert_eq!(
        (waiting.code(), waiting.is_spare()),
        ("views-differ", false)
    );
    let text = waiting.to_string();
    assert!(
        text.contains("10.0.0.0:1,10.0.0.1:1,10.0.0.2:1")
            && text.contains("is 10.0.0.0:1,10.0.0.1:1;"),
        "{text}"
    );
    let request = PromiseRequest {
        view: actors[0].view.clone(),
        founder: DirectoryId(1),
        founder_address: address(0),
    };
    let reason = answer_promise(actors[1].own(), &request).expect_err("refused");
    assert!(
        reason.contains("10.0.0.0:1,10.0.0.1:1,10.0.0.2:1"),
        "{reason}"
    );
    // The other is started again as it should have been: this one need not be.
    actors[1].view = actors[0].view.clone();
    assert_eq!(
        next_step(actors[0].own(), &answers(&actors, 0, |_| true)),
        BootstrapStep::AskPromises
    );
}

/// With every directory empty, whoever starts the nodes may not know that there was data
/// once.
#[test]
fn a_node_that_only_joins_founds_nothing_and_helps_to_found_nothing() {
    let mut actors = actors(3);
    actors.iter_mut().for_each(|actor| actor.join_only = true);
    for i in 0..3 {
        let step = next_step(actors[i].own(), &answers(&actors, i, |_| true));
        assert_eq!(
            step,
            BootstrapStep::Wait(WaitReason::ForCluster {
                view: actors[i].view.clone()
            }),
            "node {i}"
        );
    }
    actors[0].join_only = false;
    assert_eq!(
        next_step(actors[0].own(), &answers(&actors, 0, |_| true)),
        BootstrapStep::AskPromises
    );
    let request = PromiseRequest {
        view: actors[0].view.clone(),
        founder: DirectoryId(1),
        founder_address: address(0),
    };
    let reason = answer_promise(actors[1].own(), &request).expect_err("refused");
    assert!(reason.contains("--join-only"), "{reason}");

    let view = Box::new(found(&actors));
    actors[0].stamp = Stamp::Founding { view: view.clone() };
    let node = view.node_at(&address(1)).expect("a member");
    assert_eq!(
        next_step(actors[1].own(), &answers(&actors, 1, |_| true)),
        BootstrapStep::Adopt { view, node },
        "it joins"
    );
}

#[test]
fn a_directory_starts_where_its_cluster_is_and_not_among_others() {
    let (own, other) = (ClusterId(1), ClusterId(2));
    let view: Vec<Address> = (0..3).map(address).collect();
    let ours = GreetingOutcome::Ours {
        directory: DirectoryId(7),
        address: address(0),
    };
    let stranger = |cluster| GreetingOutcome::Stranger { cluster };
    let decide = |met: &[(usize, GreetingOutcome)]| {
        let met = met
            .iter()
            .map(|(at, met)| (address(*at), met.clone()))
            .collect();
        may_start(own, &view, &met)
    };
    assert_eq!(decide(&[]), Ok(Vec::new()));
    assert_eq!(
        decide(&[(0, GreetingOutcome::Silent), (1, stranger(None))]),
        Ok(Vec::new()),
        "nobody who knows better"
    );
    let among_others = NoStart::OtherCluster {
        own,
        at: address(1),
        theirs: other,
    };
    assert_eq!(
        decide(&[(0, GreetingOutcome::Silent), (1, stranger(Some(other)))]),
        Err(among_others.clone())
    );
    assert_eq!(
        decide(&[(9, ours.clone()), (1, stranger(Some(other)))]),
        Err(among_others),
        "an address of the VIEW counts"
    );
    assert_eq!(
        decide(&[(0, ours.clone()), (1, stranger(Some(other)))]),
        Ok(vec![(address(1), other)]),
        "it is said"
    );
    assert_eq!(
        decide(&[(0, ours.clone()), (9, stranger(Some(other)))]),
        Ok(Vec::new())
    );
    let doubled = decide(&[
        (0, ours.clone()),
        (2, GreetingOutcome::Doubled { at: address(5) }),
    ]);
    assert_eq!(doubled, Err(NoStart::Doubled { at: address(5) }));
    let outdated = decide(&[(0, ours), (2, GreetingOutcome::Outdated { number: 9 })]);
    assert_eq!(
        outdated,
        Err(NoStart::Outdated {
            by: address(2),
            number: 9
        })
    );
}

#[test]
fn a_promise_is_exclusive() {
    let mut actors = actors(2);
    let request = |founder| PromiseRequest {
        view: actors[0].view.clone(),
        founder: DirectoryId(founder),
        founder_address: address(0),
    };
    let (first, second) = (request(1), request(2));
    let stamp = answer_promise(actors[1].own(), &first)
        .expect("promised")
        .expect("a stamp");
    actors[1].stamp = stamp;
    assert_eq!(answer_promise(actors[1].own(), &first), Ok(None));
    assert!(answer_promise(actors[1].own(), &second).is_err());
}

/// One step of the founder: it asks everyone, some answers get lost. True if it founded.
fn ask_promises(actors: &mut [Actor], founder: usize, random: &mut StdRng) -> bool {
    let request = PromiseRequest {
        view: actors[founder].view.clone(),
        founder: actors[founder].directory,
        founder_address: address(founder),
    };
    for actor in actors.iter_mut() {
        match answer_promise(actor.own(), &request) {
            Ok(stamp) => actor.stamp = stamp.unwrap_or(actor.stamp.clone()),
            Err(_) => return false,
        }
        if random.random_bool(0.2) {
            return false;
        }
    }
    let mut view = found(actors);
    view.cluster = ClusterId(u128::from(random.random::<u64>()));
    actors[founder].stamp = Stamp::Founding {
        view: Box::new(view),
    };
    true
}

/// Random schedules with wiped disks, lost answers and silent nodes: no directory ever belongs
/// to two clusters.
#[test]
fn a_lost_disk_never_founds_a_second_cluster() {
    let mut clusters = 0;
    for seed in 0..400u64 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut actors = actors(3);
        let mut founded: Vec<Vec<DirectoryId>> = Vec::new();
        let mut next_directory = 100;
        for _ in 0..60 {
            let i = random.random_range(0..3usize);
            if random.random_bool(0.05) {
                actors[i].directory = DirectoryId(next_directory);
                actors[i].stamp = Stamp::Fresh;
                next_directory += 1;
                continue;
            }
            let up: Vec<bool> = (0..3).map(|_| random.random_bool(0.8)).collect();
            match next_step(actors[i].own(), &answers(&actors, i, |n| up[n])) {
                BootstrapStep::AskPromises if ask_promises(&mut actors, i, &mut random) => {
                    founded.push(actors.iter().map(|actor| actor.directory).collect());
                }
                BootstrapStep::Adopt { view, .. } => actors[i].stamp = Stamp::Founding { view },
                BootstrapStep::AskPromises
                | BootstrapStep::Start
                | BootstrapStep::Wait(_)
                | BootstrapStep::Refuse(_) => {}
            }
        }
        clusters += founded.len();
        let mut directories: Vec<DirectoryId> = founded.concat();
        directories.sort();
        let all = directories.len();
        directories.dedup();
        assert_eq!(
            directories.len(),
            all,
            "seed {seed}: a directory in two clusters: {founded:?}"
        );
    }
    assert!(
        clusters > 100,
        "the schedules found too few clusters to show anything: {clusters}"
    );
}
