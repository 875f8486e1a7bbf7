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
mod tests;
