//! Decides how a node with a data directory comes to belong to a cluster: it goes on from its data,
//! founds, adopts, or waits as a spare.
//!
//! Decisions only: [`next_step`] says what to do after the nodes of the `VIEW` were asked who they
//! are, and [`answer_promise`] what to say to a node that wants to found. `node::join` performs
//! them. The invariant: **a cluster is founded only by the first node of the sorted `VIEW`, and
//! only with a durable, exclusive promise from the data directory of every node in it.** So two
//! nodes never found two clusters out of one `VIEW`, and a node that lost its disk never founds a
//! second one: its peers promised another directory, or belong already.

use std::collections::BTreeMap;
use std::fmt;

use crate::api::peer::{Identity, PromiseRequest, Standing};
use crate::sm::cluster::view::View;
use crate::sm::level::TooOld;
use crate::storage::directory::Stamp;
use crate::types::{Address, ClusterId, DirectoryId, NodeId};

/// The facts that a node knows of itself.
#[derive(Debug, Clone, Copy)]
pub struct OwnFacts<'a> {
    pub address: &'a Address,
    pub directory: DirectoryId,
    /// Its `VIEW` as a set: sorted, without duplicates.
    pub view: &'a [Address],
    /// It founds no cluster and helps to found none.
    pub join_only: bool,
    pub stamp: &'a Stamp,
    /// The level that this program knows.
    pub speaks: u16,
}

/// Answer of a node to the question who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerAnswer {
    Silent { reason: String },
    Identity(Identity),
}

/// The next thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootstrapStep {
    /// This directory belongs to a cluster, or is about to found one: start from it.
    Start,
    /// Every node of the `VIEW` answers and may promise: ask each for its promise, then found.
    AskPromises,
    /// A cluster names this directory as this node.
    Adopt { view: Box<View>, node: NodeId },
    /// Ask again in a while.
    Wait(WaitReason),
    /// Asking again will not help: another program has to be started here.
    Refuse(TooOld),
}

/// A reason for a node to wait. Its `Display` is in the log and in `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WaitReason {
    /// To found, every node of the `VIEW` must answer.
    ForNodes(Vec<(Address, String)>),
    /// The first of the sorted `VIEW` founds.
    ForFounder { founder: Address },
    /// It was told to found nothing, and no node of the `VIEW` knows of a cluster.
    ForCluster { view: Vec<Address> },
    /// A cluster exists that does not name this node: a view change may.
    Spare {
        cluster: Option<ClusterId>,
        members: Vec<Address>,
    },
    /// The cluster names this address, with the data directory that was lost.
    LostDirectory {
        cluster: ClusterId,
        node: NodeId,
        members: Vec<Address>,
    },
    /// Another node has to be started otherwise, or this one.
    Mismatch(Mismatch),
}

/// A reason why nodes can't found a cluster together until one of them is started otherwise. The
/// others need not be: they ask again and again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    #[error(
        "waiting: the VIEWs differ: mine is {}, that of {other} is {}; restart one of the two, so \
         that both have the same set of addresses", list(.mine), list(.theirs)
    )]
    ViewsDiffer {
        mine: Vec<Address>,
        other: Address,
        theirs: Vec<Address>,
    },
    #[error(
        "waiting: {other} has promised to be founded by another data directory ({founder}); if \
         that cluster was never founded, stop {other}, empty its data directory and start it \
         again"
    )]
    PromisedElsewhere {
        other: Address,
        founder: DirectoryId,
    },
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WaitReason::ForNodes(nodes) => {
                let nodes: Vec<String> = nodes
                    .iter()
                    .map(|(address, reason)| format!("{address} ({reason})"))
                    .collect();
                write!(
                    f,
                    "waiting to found the cluster: no answer yet from {}",
                    nodes.join(", ")
                )
            }
            WaitReason::ForCluster { view } => write!(
                f,
                "waiting for a cluster to join: of {} none that answers belongs to one, and with \
                 --join-only this node founds none. If a cluster was here, start a node that still \
                 has its data; to found a new one, start every node without --join-only",
                list(view)
            ),
            WaitReason::ForFounder { founder } => write!(
                f,
                "waiting for {founder}, the first of the VIEW, to found the cluster"
            ),
            WaitReason::Spare { cluster, members } => {
                let cluster =
                    cluster.map_or("the cluster".to_owned(), |id| format!("cluster {id}"));
                write!(
                    f,
                    "spare: waiting for a view change of {cluster} to name this node; members: {}",
                    list(members)
                )
            }
            WaitReason::LostDirectory {
                cluster,
                node,
                members,
            } => write!(
                f,
                "cluster {cluster} knows this address as node {node} with another data directory, \
                 which counts as lost; this one waits as a spare; members: {}",
                list(members)
            ),
            WaitReason::Mismatch(mismatch) => mismatch.fmt(f),
        }
    }
}

impl WaitReason {
    /// Returns the members of the cluster that exists, as far as they are known.
    pub fn members(&self) -> &[Address] {
        match self {
            WaitReason::Spare { members, .. } | WaitReason::LostDirectory { members, .. } => {
                members
            }
            WaitReason::ForNodes(_)
            | WaitReason::ForFounder { .. }
            | WaitReason::ForCluster { .. }
            | WaitReason::Mismatch(_) => &[],
        }
    }

    pub fn is_spare(&self) -> bool {
        match self {
            WaitReason::Spare { .. } | WaitReason::LostDirectory { .. } => true,
            WaitReason::ForNodes(_)
            | WaitReason::ForFounder { .. }
            | WaitReason::ForCluster { .. }
            | WaitReason::Mismatch(_) => false,
        }
    }

    /// Stable, for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            WaitReason::Spare { .. } | WaitReason::LostDirectory { .. } => "spare",
            WaitReason::ForCluster { .. } => "no-cluster",
            WaitReason::ForNodes(_) | WaitReason::ForFounder { .. } => "starting",
            WaitReason::Mismatch(Mismatch::ViewsDiffer { .. }) => "views-differ",
            WaitReason::Mismatch(Mismatch::PromisedElsewhere { .. }) => "promised-elsewhere",
        }
    }
}

/// Decides what the node with `own` does, having heard this from the other nodes of its `VIEW`.
pub fn next_step(own: OwnFacts<'_>, answers: &BTreeMap<Address, PeerAnswer>) -> BootstrapStep {
    match own.stamp {
        // It has data, and starts from it, whatever others say.
        Stamp::Member { view, .. } | Stamp::Founding { view } => {
            return too_old(own, view).unwrap_or(BootstrapStep::Start);
        }
        // It has been in a cluster, and so never founds one: it waits to be wanted again.
        Stamp::Retired {
            cluster, members, ..
        } => {
            let spare = WaitReason::Spare {
                cluster: Some(*cluster),
                members: members.clone(),
            };
            return known_cluster(own, answers).unwrap_or(BootstrapStep::Wait(spare));
        }
        Stamp::Fresh | Stamp::Promised { .. } => {}
    }

    // A cluster that is there comes first: a second one must never be founded beside it.
    if let Some(step) = known_cluster(own, answers) {
        return step;
    }
    if !own.view.contains(own.address) {
        return BootstrapStep::Wait(WaitReason::Spare {
            cluster: None,
            members: own.view.to_vec(),
        });
    }
    if own.join_only {
        return BootstrapStep::Wait(WaitReason::ForCluster {
            view: own.view.to_vec(),
        });
    }
    if let Some(mismatch) = first_mismatch(own, answers) {
        return BootstrapStep::Wait(WaitReason::Mismatch(mismatch));
    }

    // With one of them silent nothing is founded: that one may belong to a cluster.
    let others = own.view.iter().filter(|address| *address != own.address);
    let silent: Vec<(Address, String)> = others
        .filter_map(|address| silence(address, answers))
        .collect();
    match own.view.first() {
        Some(founder) if founder != own.address => BootstrapStep::Wait(WaitReason::ForFounder {
            founder: founder.clone(),
        }),
        _ if silent.is_empty() => BootstrapStep::AskPromises,
        _ => BootstrapStep::Wait(WaitReason::ForNodes(silent)),
    }
}

/// Refuses a cluster whose leaders may propose what this program does not read.
fn too_old(own: OwnFacts<'_>, view: &View) -> Option<BootstrapStep> {
    (view.level > own.speaks).then(|| BootstrapStep::Refuse(TooOld::new(view.level, own.speaks)))
}

fn silence(
    address: &Address,
    answers: &BTreeMap<Address, PeerAnswer>,
) -> Option<(Address, String)> {
    match answers.get(address) {
        Some(PeerAnswer::Identity(_)) => None,
        Some(PeerAnswer::Silent { reason }) => Some((address.clone(), reason.clone())),
        None => Some((address.clone(), "not asked yet".to_owned())),
    }
}

/// Decides what follows from a cluster that a node of the `VIEW` belongs, or belonged, to. The
/// newest view that anyone knows counts.
fn known_cluster(
    own: OwnFacts<'_>,
    answers: &BTreeMap<Address, PeerAnswer>,
) -> Option<BootstrapStep> {
    let standings = || {
        answers.values().filter_map(|answer| match answer {
            PeerAnswer::Identity(identity) => Some(&identity.standing),
            PeerAnswer::Silent { .. } => None,
        })
    };

    let views = standings().filter_map(|standing| match standing {
        Standing::Member { view } => Some(view),
        Standing::Fresh { .. } | Standing::Promised { .. } | Standing::Retired { .. } => None,
    });

    let Some(view) = views.max_by_key(|view| view.version) else {
        return standings().find_map(|standing| match standing {
            Standing::Retired { cluster, members } => {
                Some(BootstrapStep::Wait(WaitReason::Spare {
                    cluster: Some(*cluster),
                    members: members.clone(),
                }))
            }
            Standing::Fresh { .. } | Standing::Promised { .. } | Standing::Member { .. } => None,
        });
    };

    // A retired id is final: a view that has it is an old one, of a node that has yet to hear the
    // news.
    let retired = match own.stamp {
        Stamp::Retired { cluster, node, .. } if *cluster == view.cluster => Some(*node),
        Stamp::Retired { .. }
        | Stamp::Fresh
        | Stamp::Promised { .. }
        | Stamp::Founding { .. }
        | Stamp::Member { .. } => None,
    };

    // Named by its directory, this node is a member; by its address alone, its disk was lost.
    let is_new = |id: &NodeId| retired.is_none_or(|retired| *id > retired);
    if let Some((node, _)) = view
        .nodes
        .iter()
        .find(|(id, node)| node.directory == own.directory && is_new(id))
    {
        return too_old(own, view).or_else(|| {
            Some(BootstrapStep::Adopt {
                view: view.clone(),
                node: *node,
            })
        });
    }

    let members = view
        .nodes
        .values()
        .map(|node| node.address.clone())
        .collect();
    let waiting = match view.node_at(own.address).filter(is_new) {
        Some(node) => WaitReason::LostDirectory {
            cluster: view.cluster,
            node,
            members,
        },
        None => WaitReason::Spare {
            cluster: Some(view.cluster),
            members,
        },
    };
    Some(BootstrapStep::Wait(waiting))
}

fn first_mismatch(own: OwnFacts<'_>, answers: &BTreeMap<Address, PeerAnswer>) -> Option<Mismatch> {
    let i_found = own.view.first() == Some(own.address);
    answers.iter().find_map(|(address, answers)| {
        let PeerAnswer::Identity(identity) = answers else {
            return None;
        };
        match &identity.standing {
            Standing::Fresh { view } | Standing::Promised { view, .. }
                if view != own.view && view.contains(own.address) =>
            {
                Some(Mismatch::ViewsDiffer {
                    mine: own.view.to_vec(),
                    other: address.clone(),
                    theirs: view.clone(),
                })
            }
            // Only the founder needs the promise, and so only it is kept back by one.
            Standing::Promised { founder, .. } if i_found && *founder != own.directory => {
                Some(Mismatch::PromisedElsewhere {
                    other: address.clone(),
                    founder: *founder,
                })
            }
            Standing::Fresh { .. }
            | Standing::Promised { .. }
            | Standing::Member { .. }
            | Standing::Retired { .. } => None,
        }
    })
}

/// Decides whether to promise, and returns the stamp that must be durable before the promise is
/// sent (None: it already is).
///
/// A promise holds for one founding directory for ever. The same directory may ask again with
/// another `VIEW`: had it founded with the first, it would not ask.
///
/// # Errors
///
/// Why not, for the operator of the asking node.
pub fn answer_promise(
    own: OwnFacts<'_>,
    request: &PromiseRequest,
) -> Result<Option<Stamp>, String> {
    if request.view != own.view {
        return Err(format!(
            "the VIEWs differ: mine is {}, yours is {}",
            list(own.view),
            list(&request.view)
        ));
    }
    let promise = Stamp::Promised {
        view: request.view.clone(),
        founder: request.founder,
    };
    match own.stamp {
        Stamp::Fresh if own.join_only => Err(format!(
            "{} was started with --join-only: it joins a cluster that is there, and helps to found \
            none",
            own.address
        )),
        Stamp::Fresh => Ok(Some(promise)),
        Stamp::Promised { founder, .. } if *founder != request.founder => Err(format!(
            "{} has promised to be founded by the data directory {founder}, not by {}; if that \
             cluster was never founded, empty the data directory of {}",
            own.address, request.founder, own.address
        )),
        Stamp::Promised { view, .. } => Ok((*view != request.view).then_some(promise)),
        Stamp::Founding { view } | Stamp::Member { view, .. } => Err(format!(
            "{} belongs to cluster {}",
            own.address, view.cluster
        )),
        Stamp::Retired { cluster, .. } => {
            Err(format!("{} belonged to cluster {cluster}", own.address))
        }
    }
}

/// Returns the standing that a node tells others.
pub fn standing(own: OwnFacts<'_>) -> Standing {
    match own.stamp {
        Stamp::Fresh => Standing::Fresh {
            view: own.view.to_vec(),
        },
        Stamp::Promised { view, founder } => Standing::Promised {
            view: view.clone(),
            founder: *founder,
        },
        Stamp::Founding { view } | Stamp::Member { view, .. } => {
            Standing::Member { view: view.clone() }
        }
        Stamp::Retired {
            cluster, members, ..
        } => Standing::Retired {
            cluster: *cluster,
            members: members.clone(),
        },
    }
}

/// Outcome of greeting an address before this node starts from its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GreetingOutcome {
    Silent,
    /// A member of the same cluster.
    Ours {
        directory: DirectoryId,
        address: Address,
    },
    /// One of another cluster, or of none.
    Stranger {
        cluster: Option<ClusterId>,
    },
    /// A member that knows of a later start of this directory.
    Outdated {
        number: u64,
    },
    /// Another process runs with a copy of this directory, at this address.
    Doubled {
        at: Address,
    },
}

/// A reason why a node does not start from its data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoStart {
    #[error(
        "this data directory is of cluster {own}, but {at}, which --view names, belongs to cluster \
         {theirs}, and no address of the view answers as one of {own}: give this node the \
         directory that goes with its flags, or the flags that go with its directory"
    )]
    OtherCluster {
        own: ClusterId,
        at: Address,
        theirs: ClusterId,
    },
    #[error(
        "a node runs at {at} with a copy of this data directory: stop that one first, or give this \
         node an empty directory; it then joins as a new node"
    )]
    Doubled { at: Address },
    #[error("{by} knows of start {number} of this data directory, which is not in it")]
    Outdated { by: Address, number: u64 },
}

/// Decides whether a node may start from data of `cluster`, having met this at other addresses.
/// Returns what is to be said of a `VIEW` that names others as well.
///
/// # Errors
///
/// Why not.
pub fn may_start(
    cluster: ClusterId,
    view: &[Address],
    met: &BTreeMap<Address, GreetingOutcome>,
) -> Result<Vec<(Address, ClusterId)>, NoStart> {
    // One such answer is enough: whatever else answers, two copies must not run.
    for (address, met) in met {
        match met {
            GreetingOutcome::Doubled { at } => return Err(NoStart::Doubled { at: at.clone() }),
            GreetingOutcome::Outdated { number } => {
                return Err(NoStart::Outdated {
                    by: address.clone(),
                    number: *number,
                });
            }
            GreetingOutcome::Silent
            | GreetingOutcome::Ours { .. }
            | GreetingOutcome::Stranger { .. } => {}
        }
    }

    // Only what the flags name counts: any other address may have changed hands.
    let named = || {
        view.iter()
            .filter_map(|address| Some((address, met.get(address)?)))
    };
    let others: Vec<(Address, ClusterId)> = named()
        .filter_map(|(address, met)| match met {
            GreetingOutcome::Stranger {
                cluster: Some(theirs),
            } if *theirs != cluster => Some((address.clone(), *theirs)),
            GreetingOutcome::Stranger { .. }
            | GreetingOutcome::Silent
            | GreetingOutcome::Ours { .. }
            | GreetingOutcome::Outdated { .. }
            | GreetingOutcome::Doubled { .. } => None,
        })
        .collect();

    // One of ours among them shows that flags and directory go together.
    let has_ours = named().any(|(_, met)| matches!(met, GreetingOutcome::Ours { .. }));
    match others.first() {
        Some((at, theirs)) if !has_ours => Err(NoStart::OtherCluster {
            own: cluster,
            at: at.clone(),
            theirs: *theirs,
        }),
        Some(_) | None => Ok(others),
    }
}

/// Returns what is to be said of a `VIEW` without this node's own address, of which it is not told
/// otherwise who it is.
pub fn unnamed(own: OwnFacts<'_>) -> Option<String> {
    let is_new = matches!(own.stamp, Stamp::Fresh | Stamp::Promised { .. });
    (is_new && !own.view.contains(own.address)).then(|| {
        format!(
            "the VIEW ({}) does not have this node's own address, {address}: it founds no cluster, \
             and waits as a spare until a change of the view names it ('quorate cluster add \
             {address}'). If it is to found a cluster with them, start every node with one and the \
             same VIEW that has all of their addresses",
            list(own.view),
            address = own.address
        )
    })
}

/// Addresses as a list for people.
pub fn list(addresses: &[Address]) -> String {
    addresses
        .iter()
        .map(Address::as_str)
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
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
        let BootstrapStep::Wait(waiting) =
            next_step(actors[0].own(), &answers(&actors, 0, |_| true))
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
}
