//! A member introduces itself: before it starts from its data, and to each member that has not
//! heard of this start yet.
//!
//! It tells where it runs and which starts its directory remembers. By the answers it learns that
//! its directory is an old copy, that another process runs with a copy of it, or that it is among
//! nodes of another cluster, before anything of it is opened; and where the others run, which its
//! view may not know. Nothing waits for a quorum: who does not answer is asked again while the node
//! runs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::bootstrap::{GreetingOutcome, may_start};
use super::context::NodeContext;
use super::error::NodeError;
use super::join::{Joined, Joining};
use super::pause;
use crate::api::peer::{Greeting, GreetingReply, Identity, Standing};
use crate::blocking;
use crate::raft::transport::lanes::PeerRefusal;
use crate::routing::peer_caller::PeerError;
use crate::sm::cluster::view::View;
use crate::telemetry::rarely;
use crate::types::{Address, ClusterId, DirectoryId, GroupId, NodeId, StartId};

/// Time that a member has to answer.
const GREET_TIMEOUT: Duration = Duration::from_secs(1);
/// Rounds before a start, and as many more as it takes to ask everyone once, while nobody of the
/// `VIEW` has answered as a member of any cluster: nodes may be started together.
const ROUNDS: usize = 4;
const BETWEEN_ROUNDS: Duration = Duration::from_millis(200);
/// Addresses that are asked in one round: all members of a usual cluster.
const ASKED_MAX: usize = 32;
/// Between two looks for members that have not heard of this start, or can't be reached.
const TICK: Duration = Duration::from_secs(1);
/// A member that does not answer is asked again after so long, doubled up to the longest.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A meta group without a sign of its leader for so long may be because nodes have moved.
const SILENCE: Duration = Duration::from_secs(2);

impl Joining {
    /// Begins another start of this directory, and tells the members of it before anything is
    /// opened. Returns where members were found.
    ///
    /// # Errors
    ///
    /// Why this node must not start from its data.
    pub async fn introduce(
        self: &Arc<Self>,
        joined: &Joined,
    ) -> Result<Vec<(DirectoryId, Address)>, NodeError> {
        let was_member = self.is_stamped_member();
        let beginning = Arc::clone(self);
        let begun = blocking::start(move || beginning.begin_start(StartId(rand::random()))).await;
        match begun {
            Ok(begun) => begun?,
            Err(error) => return Err(NodeError::LogFailed(error.to_string())),
        }

        // Nobody knows of an earlier start of a new member.
        if !was_member {
            return Ok(Vec::new());
        }
        let cluster = joined.view.cluster;
        let Some(greeting) = self.greeting(cluster, joined.node) else {
            return Ok(Vec::new());
        };
        let mut silent = self.others(&joined.view);
        let mut met = BTreeMap::new();
        let rounds = ROUNDS.max(silent.len().div_ceil(ASKED_MAX));
        for round in 0..rounds {
            if round > 0 {
                tokio::time::sleep(BETWEEN_ROUNDS).await;
            }
            let asked: Vec<Address> = silent.drain(..silent.len().min(ASKED_MAX)).collect();
            let greeted = asked.iter().map(|address| self.greet(address, &greeting));
            let answers = join_all(greeted).await;
            for (address, answer) in asked.into_iter().zip(answers) {
                // Behind the others: those that say nothing must not keep them from their turn.
                if answer == GreetingOutcome::Silent {
                    silent.push_back(address.clone());
                }
                met.insert(address, answer);
            }

            // As soon as one of the VIEW says which cluster it is of, it is clear whether the flags
            // fit.
            let told = |address: &Address| {
                matches!(
                    met.get(address),
                    Some(
                        GreetingOutcome::Ours { .. }
                            | GreetingOutcome::Stranger { cluster: Some(_) }
                    )
                )
            };
            if silent.is_empty() || self.view_set().iter().any(told) || met.values().any(is_refusal)
            {
                break;
            }
        }
        for (address, theirs) in may_start(cluster, self.view_set(), &met)? {
            tracing::warn!(
                "{address}, which --view names, belongs to cluster {theirs}, and this node to \
                {cluster}"
            );
        }
        let found = met.into_values().filter_map(|met| match met {
            GreetingOutcome::Ours { directory, address } => Some((directory, address)),
            GreetingOutcome::Silent
            | GreetingOutcome::Stranger { .. }
            | GreetingOutcome::Outdated { .. }
            | GreetingOutcome::Doubled { .. } => None,
        });
        Ok(found.collect())
    }

    /// Returns the addresses of the `VIEW` and then of the other members, but for this node's own:
    /// there nobody but this node answers.
    fn others(&self, view: &View) -> VecDeque<Address> {
        let mut others: VecDeque<Address> = self.view_set().iter().cloned().collect();
        let is_news = |address: &Address| !self.view_set().contains(address);
        let members = view.nodes.values().map(|node| node.address.clone());
        others.extend(members.filter(is_news));
        others.retain(|address| *address != self.config().address);
        others
    }

    /// Returns what this node says of itself; none before it has begun a start.
    fn greeting(&self, cluster: ClusterId, node: NodeId) -> Option<Greeting> {
        Some(Greeting {
            cluster,
            node,
            directory: self.directory_id(),
            address: self.config().address.clone(),
            starts: self.peer_directories()?.own().clone(),
        })
    }

    /// Greets whoever is at an address.
    async fn greet(&self, address: &Address, greeting: &Greeting) -> GreetingOutcome {
        match self.caller().greet(address, greeting, GREET_TIMEOUT).await {
            Ok(GreetingReply::Welcome(other)) => self.met(greeting.cluster, other).await,
            Ok(GreetingReply::Stranger { cluster }) => GreetingOutcome::Stranger { cluster },
            Ok(GreetingReply::Outdated { number }) => GreetingOutcome::Outdated { number },
            Ok(GreetingReply::Doubled { at }) => GreetingOutcome::Doubled { at },
            Ok(GreetingReply::Failed { reason }) => {
                tracing::debug!("{address} has not heard of this start yet: {reason}");
                GreetingOutcome::Silent
            }
            // It knows no greetings, but says who it is.
            Err(PeerError::Status { .. }) => {
                match self.caller().identity(address, GREET_TIMEOUT).await {
                    Ok(identity) => match identity.standing {
                        Standing::Member { view } if view.cluster == greeting.cluster => {
                            GreetingOutcome::Ours {
                                directory: identity.directory,
                                address: address.clone(),
                            }
                        }
                        Standing::Member { view } => GreetingOutcome::Stranger {
                            cluster: Some(view.cluster),
                        },
                        Standing::Fresh { .. }
                        | Standing::Promised { .. }
                        | Standing::Retired { .. } => GreetingOutcome::Stranger { cluster: None },
                    },
                    Err(_) => GreetingOutcome::Silent,
                }
            }
            Err(
                PeerError::NoAnswer { .. }
                | PeerError::NotAsked { .. }
                | PeerError::Unreadable { .. }
                | PeerError::TooOld { .. }
                | PeerError::Strange { .. }
                | PeerError::AnotherNode { .. },
            ) => GreetingOutcome::Silent,
        }
    }

    /// Judges a member by what it has answered.
    async fn met(&self, cluster: ClusterId, other: Greeting) -> GreetingOutcome {
        if other.cluster != cluster {
            return GreetingOutcome::Stranger {
                cluster: Some(other.cluster),
            };
        }
        let Some(peer_directories) = self.peer_directories() else {
            return GreetingOutcome::Silent;
        };
        match peer_directories.learn(other.directory, &other.starts).await {
            Ok(()) => GreetingOutcome::Ours {
                directory: other.directory,
                address: other.address,
            },
            // It is told so when it greets this node.
            Err(_) => GreetingOutcome::Stranger { cluster: None },
        }
    }

    /// Answers a greeting. `runs`: this node has started. `is_news`: lanes go elsewhere so far.
    ///
    /// Anybody can send a greeting. What is new in it counts once the node at the address that it
    /// names has confirmed it: that it runs there, with this directory, in this start.
    pub async fn greeted(&self, greeting: &Greeting, runs: bool, is_news: bool) -> GreetingReply {
        let Some((cluster, node, view)) = self.membership() else {
            return GreetingReply::Stranger { cluster: None };
        };
        if greeting.cluster != cluster {
            return GreetingReply::Stranger {
                cluster: Some(cluster),
            };
        }

        let Some(own) = self.greeting(cluster, node) else {
            return GreetingReply::Failed {
                reason: "it is starting".to_owned(),
            };
        };

        // The same directory: this node itself, or a copy of it.
        if greeting.directory == own.directory {
            let is_self = greeting.starts == own.starts;
            // Of two that start at once the one at the address in the view goes first.
            let is_first = runs
                || view
                    .nodes
                    .get(&node)
                    .is_some_and(|known| known.address != greeting.address);
            if !is_self && is_first {
                self.tell_double(&greeting.address);
                return GreetingReply::Doubled { at: own.address };
            }
            return GreetingReply::Welcome(own);
        }

        let Some(peer_directories) = self.peer_directories() else {
            return GreetingReply::Failed {
                reason: "it is starting".to_owned(),
            };
        };
        if let Err(refusal) = peer_directories.check(greeting.directory, &greeting.starts) {
            return refused(&refusal);
        }

        // Whoever is new may lie: it is asked at the address that it names.
        if !is_news && peer_directories.knows(greeting.directory, &greeting.starts) {
            return GreetingReply::Welcome(own);
        }
        if !self.is_confirmed(greeting).await {
            let reason = format!(
                "{} did not confirm this greeting when it was asked",
                greeting.address
            );
            return GreetingReply::Failed { reason };
        }

        match peer_directories
            .learn(greeting.directory, &greeting.starts)
            .await
        {
            Ok(()) => GreetingReply::Welcome(own),
            Err(refusal) => refused(&refusal),
        }
    }

    async fn is_confirmed(&self, greeting: &Greeting) -> bool {
        let confirms = |identity: Identity| {
            identity.directory == greeting.directory
                && identity.address == greeting.address
                && identity.start == Some(greeting.starts.running())
        };
        // Less than who greets waits for.
        self.caller()
            .identity(&greeting.address, GREET_TIMEOUT * 3 / 4)
            .await
            .is_ok_and(confirms)
    }
}

fn refused(refusal: &PeerRefusal) -> GreetingReply {
    match refusal {
        PeerRefusal::Outdated { number } => GreetingReply::Outdated { number: *number },
        // The process that was there before may have ended a moment ago: the lanes find out.
        refusal => GreetingReply::Failed {
            reason: refusal.to_string(),
        },
    }
}

fn is_refusal(met: &GreetingOutcome) -> bool {
    match met {
        GreetingOutcome::Outdated { .. } | GreetingOutcome::Doubled { .. } => true,
        GreetingOutcome::Silent
        | GreetingOutcome::Ours { .. }
        | GreetingOutcome::Stranger { .. } => false,
    }
}

/// Tells the members that have not heard of this start, and finds those that have moved.
pub struct Greeter {
    context: Arc<NodeContext>,
    joining: Arc<Joining>,
    /// Members that have heard of this start.
    told: BTreeSet<DirectoryId>,
    /// Times at which an address that did not answer is asked again, and the pause after
    /// that.
    later: BTreeMap<Address, (Instant, Duration)>,
}

impl Greeter {
    pub fn new(context: Arc<NodeContext>, joining: Arc<Joining>) -> Self {
        Self {
            context,
            joining,
            told: BTreeSet::new(),
            later: BTreeMap::new(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        while pause::waited(shutdown, TICK).await {
            self.greet_round().await;
            self.clear_aside().await;
        }
    }

    async fn greet_round(&mut self) {
        let Some(greeting) = self
            .joining
            .greeting(self.context.cluster, self.context.node)
        else {
            return;
        };

        let targets = self.targets();
        let greeted = targets
            .iter()
            .map(|address| self.joining.greet(address, &greeting));
        for (address, met) in targets.iter().zip(join_all(greeted).await) {
            // Each is asked again until it has heard, with longer and longer pauses.
            let (now, before) = (
                Instant::now(),
                self.later
                    .get(address)
                    .map_or(PAUSE_MIN, |(_, pause)| *pause),
            );
            self.later
                .insert(address.clone(), (now + before, (before * 2).min(PAUSE_MAX)));

            match met {
                GreetingOutcome::Ours {
                    directory,
                    address: at,
                } => {
                    self.told.insert(directory);
                    if self.context.views().found_at(directory, &at) {
                        tracing::info!(
                            "the member with data directory {directory} runs at {at}, where the \
                            view does not have it yet"
                        );
                    }
                }
                GreetingOutcome::Outdated { number } => {
                    self.refused(address, &PeerRefusal::Outdated { number })
                }
                GreetingOutcome::Doubled { at } => self.refused(&at, &PeerRefusal::Doubled),
                GreetingOutcome::Silent | GreetingOutcome::Stranger { .. } => {}
            }
        }
    }

    fn refused(&self, by: &Address, refusal: &PeerRefusal) {
        if let Some(peer_directories) = self.joining.peer_directories() {
            peer_directories.refused_by(by.as_str(), refusal);
        }
    }

    /// Returns the addresses to ask: members that have not heard of this start; and while nothing
    /// is heard of the meta group, wherever one may be.
    fn targets(&mut self) -> Vec<Address> {
        let view = self.context.view();
        self.told
            .retain(|directory| view.nodes.values().any(|node| node.directory == *directory));
        let is_silent = self.is_silent();
        let others = view
            .nodes
            .iter()
            .filter(|(id, _)| **id != self.context.node);
        let untold = others.filter(|(_, node)| is_silent || !self.told.contains(&node.directory));

        // At both addresses: it may have gone back, or on, since it was found elsewhere.
        let known = untold.flat_map(|(_, node)| {
            let moved = self.context.views().moved_to(node.directory);
            [Some(node.address.clone()), moved].into_iter().flatten()
        });
        let mut targets: BTreeSet<Address> = known.collect();
        if is_silent {
            targets.extend(self.joining.view_set().iter().cloned());
        }
        targets.remove(&self.joining.config().address);
        let now = Instant::now();
        self.later.retain(|address, _| targets.contains(address));

        // Without the meta group this node learns nothing, so it can't wait for long pauses.
        let pause_max = if is_silent { TICK } else { PAUSE_MAX };
        let is_due = |address: &Address| {
            self.later
                .get(address)
                .is_none_or(|(due, pause)| *due <= now + pause.saturating_sub(pause_max))
        };
        let mut due: Vec<Address> = targets.into_iter().filter(is_due).collect();
        // Those that were asked last go behind the others: else the first that say nothing would
        // keep the rest from their turn.
        due.sort_by_key(|address| self.later.get(address).map(|(due, _)| *due));
        due.truncate(ASKED_MAX);
        due
    }

    fn is_silent(&self) -> bool {
        let Some(meta) = self.context.registry.get(GroupId::META) else {
            return true;
        };
        let status = meta.status();
        let heard = if meta.leads() {
            status.quorum_acked
        } else {
            status.leader_heard
        };
        heard.is_none_or(|ago| ago > SILENCE)
    }

    /// Deletes the old copies that the cluster goes on without.
    async fn clear_aside(&self) {
        let (joining, view) = (self.joining.clone(), self.context.view());
        if joining.has_aside()
            && let Err(error) = blocking::start(move || joining.clear_aside(&view)).await
        {
            rarely!(error, "deleting what was put aside was broken off: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::{ScriptedTransport, TestContext, refused};

    /// Asserts that each of the other nodes was called at least once.
    fn assert_all_called(node: &TestContext, transport: &ScriptedTransport) {
        let view = node.context.view();
        let others = view
            .nodes
            .iter()
            .filter(|(id, _)| **id != node.context.node);
        let missed: Vec<&Address> = others
            .map(|(_, node)| &node.address)
            .filter(|address| transport.calls_to(address) == 0)
            .collect();
        assert!(missed.is_empty(), "never asked: {missed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn before_a_start_every_member_is_greeted_though_the_first_say_nothing() {
        let transport = ScriptedTransport::new(|_| refused());
        let node = TestContext::new(200, &transport);
        let joined = Joined {
            node: node.context.node,
            view: Box::new((*node.context.view()).clone()),
        };
        node.joining
            .stamp_member(joined.node, &joined.view)
            .expect("a stamp");
        let met = node.joining.introduce(&joined).await.expect("it may start");
        assert!(met.is_empty());
        assert_all_called(&node, &transport);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_meta_group_every_member_is_greeted_again_and_again() {
        let transport = ScriptedTransport::new(|_| refused());
        let node = TestContext::new(100, &transport);
        node.joining
            .begin_start(StartId(1))
            .expect("a start in the book");
        let mut greeter = Greeter::new(node.context.clone(), node.joining.clone());
        for _ in 0..8 {
            greeter.greet_round().await;
            tokio::time::advance(TICK).await;
        }
        assert_all_called(&node, &transport);
    }
}
