//! Makes what runs on this node match the view: opens the replicas that the view gives it, and does
//! for each group that it leads what the group still needs.
//!
//! It makes no choices: every step says "ensure", reads what is there, and may be repeated. What it
//! ensures, each tick:
//! - the view of this node is that of its meta replica, and its stamp says so;
//! - every replica of the view that is this node's is open (`opener`); a new one is created only
//!   from the group's creation record, and only if this node's log has never held it (▸ no frame
//!   ever creates a replica); one that fails is tried again;
//! - a group that was never initialized is, from its creation record: the same on every member, so
//!   it doesn't matter who does it;
//! - a replica that the view has retired is forgotten;
//! - a meta group without a view gets the first one;
//! - a shard that owns nothing claims the slots that the view gives it and that were never moved;
//! - this node's address in the view is the one under which it runs.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::replica_opener::{ReplicaOpener, ReplicaTasks};
use super::view_replicas::{is_retired, replicas_of};
use crate::api::peer::Announcement;
use crate::blocking;
use crate::node::context::NodeContext;
use crate::node::join::Joining;
use crate::node::map_directory::are_maps_condemned;
use crate::node::unreadable::tell_unreadable;
use crate::raft::transport::Resolver as _;
use crate::raft::{OpenError, ProposeError, Replica};
use crate::sm::cluster::meta;
use crate::sm::cluster::view::View;
use crate::sm::kv;
use crate::sm::recovery::FailureCause;
use crate::sm::slots::SlotState;
use crate::storage::ReplicaKey;
use crate::storage::map::ReadKind;
use crate::supervisor;
use crate::telemetry::rarely;
use crate::types::{GroupId, NodeId, Slot};

/// Between two ticks while something is still to be done.
const TICK_BUSY: Duration = Duration::from_millis(50);
/// Between two ticks of a node that has nothing to do: groups cost nothing much when idle.
const TICK_IDLE: Duration = Duration::from_millis(500);
/// Entries of the meta group that come within this time are looked at together.
const ENTRIES_TOGETHER: Duration = Duration::from_millis(10);
/// Time that a proposal of ours has; a later tick makes it again.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for which members other than the first leave initializing a group to it.
const INITIALIZE_AFTER: Duration = Duration::from_secs(3);
/// Pause before a retired replica that could not be wiped is tried again.
const WIPE_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Between two announcements of an address that the view does not take; doubled from the first to
/// the last.
const ANNOUNCE_PAUSE_MIN: Duration = Duration::from_millis(200);
const ANNOUNCE_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Interval at which the log repeats that an announcement is rejected.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// A node that was last heard of longer ago passes nothing on.
const HEARD: Duration = Duration::from_secs(10);
/// A replica that knows how its leader stood within this time is caught up.
const FRESH: Duration = Duration::from_secs(5);

/// Makes what runs match the view.
pub struct Reconciler {
    context: Arc<NodeContext>,
    joining: Arc<Joining>,
    /// The view that the founder drew up, for a meta group that has none yet.
    first_view: Box<View>,
    started: Instant,
    /// Steps that are known to be done: looked at again only after a change.
    done: Mutex<DoneSteps>,
    announcing: Mutex<Announcing>,
    condemned: CancellationToken,
    given_up: CancellationToken,
}

/// State of telling the meta group where this node runs.
#[derive(Default)]
struct Announcing {
    last: Option<Instant>,
    pause: Duration,
    /// Number of rejections, and when the log last said so.
    rejected: u64,
    told: Option<Instant>,
}

#[derive(Default)]
struct DoneSteps {
    meta_applied: Option<crate::types::LogId>,
    initialized: BTreeSet<GroupId>,
    claimed: BTreeSet<GroupId>,
}

/// Replicas that are being forgotten, which takes a while for a large map: nothing else waits for
/// it.
#[derive(Default)]
struct Wipes {
    tasks: ReplicaTasks<Result<(), OpenError>>,
    /// Those that could not be wiped, and when.
    failed: BTreeMap<ReplicaKey, Instant>,
}

/// Work that goes on beside the ticks.
#[derive(Default)]
struct PendingTasks {
    wipes: Wipes,
    opener: ReplicaOpener,
}

/// A reason why this node should not be given requests yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadinessGap {
    /// A replica of it does not run.
    Failed(String),
    /// Something is on its way.
    Late(String),
}

impl Reconciler {
    pub fn new(context: Arc<NodeContext>, joining: Arc<Joining>, first_view: Box<View>) -> Self {
        Self {
            context,
            joining,
            first_view,
            started: Instant::now(),
            done: Mutex::default(),
            announcing: Mutex::default(),
            condemned: CancellationToken::new(),
            given_up: CancellationToken::new(),
        }
    }

    /// Cancelled when a replica could not be opened, and only a start of the process can mend that.
    pub fn condemned(&self) -> &CancellationToken {
        &self.condemned
    }

    /// Cancelled when a replica has failed because this process cannot write to maps any more.
    pub fn given_up(&self) -> &CancellationToken {
        &self.given_up
    }

    pub async fn run(&self, shutdown: &CancellationToken) {
        let mut pending = PendingTasks::default();
        loop {
            supervisor::beat();
            let idle = self.tick(&mut pending).await;
            let interval = if idle { TICK_IDLE } else { TICK_BUSY };
            let meta = self
                .context
                .registry
                .get(GroupId::META)
                .map(|meta| meta.watch_applied());
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {
                    // Log and maps are closed next.
                    pending.wipes.tasks.end().await;
                    pending.opener.end().await;
                    return;
                }
                () = another_entry(meta, self.seen_index()) => {}
                () = tokio::time::sleep(interval) => {}
            }
        }
    }

    /// Through where the meta group's entries are in the view that this node goes by.
    fn seen_index(&self) -> u64 {
        self.done
            .lock()
            .meta_applied
            .map_or(0, |applied| applied.index)
    }

    /// Returns the reason why this node should not be given requests yet; None if it is ready.
    pub fn unready(&self) -> Option<ReadinessGap> {
        let view = self.context.view();
        let done = self.done.lock();
        let failed = self
            .context
            .failures
            .now()
            .into_iter()
            .max_by_key(|failure| failure.for_time);
        if let Some(failure) = failed {
            return Some(ReadinessGap::Failed(format!(
                "replica {} has failed {:.0?} ago: {}; it is tried again in {:.0?}",
                failure.key, failure.for_time, failure.reason, failure.retry_in
            )));
        }
        let lack = replicas_of(&view, self.context.node).find_map(|key| {
            // A witness serves nobody: no request waits for one.
            if self.context.registry.witness(key.group).is_some() {
                return None;
            }
            let Some(group) = self.context.registry.get(key.group) else {
                return Some(format!("replica {key} is not open yet"));
            };
            unready_group(&group)
                .or_else(|| self.out_of_reach(&group))
                .or_else(|| {
                    let unclaimed = !key.group.is_meta() && !done.claimed.contains(&key.group);
                    unclaimed.then(|| format!("shard {:#} does not own its slots yet", key.group))
                })
        });
        lack.map(ReadinessGap::Late)
    }

    /// Returns the reason why requests for a group can't be passed to its leader, though that is
    /// heard of.
    fn out_of_reach(&self, group: &Replica) -> Option<String> {
        let status = group.status();
        let registry = &self.context.registry;
        let leader = status
            .leader
            .filter(|leader| registry.reachability().is_unreachable(*leader))?;
        let mut others = status
            .membership
            .voters
            .values()
            .filter(|node| **node != leader && **node != self.context.node);
        // Another node passes it on.
        let has_relay = others.any(|node| {
            self.context.heard_within(*node, HEARD)
                && !registry.reachability().is_unreachable(*node)
        });
        let group = group.key().group;
        (!has_relay)
            .then(|| format!("this node can't connect to {leader}, which leads group {group}"))
    }

    /// Makes one round over everything. Returns true if there was nothing to do.
    async fn tick(&self, pending: &mut PendingTasks) -> bool {
        self.follow_view().await;
        let view = self.context.view();
        let PendingTasks { wipes, opener } = pending;

        // Those that go come first: a new replica waits until the old one of its group is gone
        // here.
        let mut idle = self.wipe_retired(&view, wipes, opener);
        idle &= opener
            .open(&self.context, &view, |key| wipes.tasks.has(key))
            .await;
        self.look_at_maps();
        for group in self.context.registry.groups() {
            idle &= self.ensure_initialized(&view, &group).await;
            if group.key().group.is_meta() {
                idle &= self.ensure_meta(&view, &group).await;
            } else {
                idle &= self.ensure_claimed(&view, &group).await;
            }
        }
        // A replica that has failed is not tried again sooner by looking more often.
        idle && !matches!(self.unready(), Some(ReadinessGap::Late(_)))
    }

    /// Sees whether only another process can mend what has failed.
    fn look_at_maps(&self) {
        let failed = self.context.failures.counts().now;
        if failed.is_empty() {
            return;
        }
        if are_maps_condemned(self.joining.directory_path()) {
            self.condemned.cancel();
        }
        if failed.contains_key(&FailureCause::Database) {
            self.given_up.cancel();
        }
    }

    /// Takes the view that the meta replica of this node has applied.
    async fn follow_view(&self) {
        let Some(meta) = self.context.registry.get(GroupId::META) else {
            return;
        };
        let applied = meta.status().applied;

        // Nothing was applied since the last round: the view need not be read again.
        if self.done.lock().meta_applied == applied {
            return;
        }
        let read = meta::read_view(&meta.state().read());
        let view = match read {
            Ok(Some(view)) => view,
            Ok(None) => return,
            Err(error) => {
                rarely!(error, "the view cannot be read: {error}");
                return;
            }
        };
        self.context.views().advance(view);
        let (joining, view, node) = (
            Arc::clone(&self.joining),
            self.context.view(),
            self.context.node,
        );

        // Taken note of only once the stamp is durable: else the next round writes it again.
        match blocking::start(move || joining.stamp_member(node, &view)).await {
            Ok(Ok(())) => self.done.lock().meta_applied = applied,
            Ok(Err(error)) => rarely!(error, "the stamp cannot be written: {error}"),
            Err(error) => rarely!(error, "writing the stamp was broken off: {error}"),
        }
    }

    /// Forgets the replicas that the view has retired. One that it does not know yet stays: this
    /// view may be an old one.
    fn wipe_retired(&self, view: &View, wipes: &mut Wipes, opener: &ReplicaOpener) -> bool {
        while let Some((key, ended)) = wipes.tasks.try_ended() {
            let mut done = self.done.lock();

            // A later replica of the group on this node begins from nothing.
            done.claimed.remove(&key.group);
            done.initialized.remove(&key.group);
            let wiped = ended.unwrap_or_else(|error| Err(OpenError::Raft(error.to_string())));
            match wiped {
                Ok(()) => {
                    wipes.failed.remove(&key);
                    tracing::info!("replica {key} is retired: its data is gone from this node");
                }
                Err(error) => {
                    wipes.failed.insert(key, Instant::now());
                    rarely!(
                        warn,
                        "retired replica {key} could not be wiped: {error}; it is tried again"
                    );
                }
            }
        }

        let hosted: BTreeSet<ReplicaKey> = replicas_of(view, self.context.node).collect();
        let rests = |key: &ReplicaKey| {
            wipes
                .failed
                .get(key)
                .is_some_and(|at| at.elapsed() < WIPE_AGAIN_AFTER)
        };
        let is_to_go = |key: &ReplicaKey| {
            // The last replica of the meta group goes with the node, not before.
            let is_last_of_meta =
                key.group.is_meta() && !hosted.iter().any(|other| other.group.is_meta());
            let is_busy = wipes.tasks.has(*key) || opener.are_busy_with(*key) || rests(key);
            is_retired(view, *key) && !is_last_of_meta && !is_busy
        };

        let stored = self.context.registry.stored();
        let to_go: Vec<ReplicaKey> = stored.into_iter().filter(is_to_go).collect();
        for key in to_go {
            let registry = self.context.registry.clone();
            wipes
                .tasks
                .begin(key, async move { registry.wipe_replica(key).await });
        }
        wipes.tasks.is_empty()
    }

    async fn ensure_initialized(&self, view: &View, group: &Replica) -> bool {
        let key = group.key();
        if self.done.lock().initialized.contains(&key.group) {
            return true;
        }
        if group.is_initialized() {
            self.done.lock().initialized.insert(key.group);
            return true;
        }
        let Some(creation) = view.groups.get(&key.group).map(|group| &group.creation) else {
            return true;
        };
        let home = view.groups.get(&key.group).map(|group| group.home);
        let mine = creation.contains_key(&key.replica);

        // Whoever initializes a group leads it first: so the home does, and others only if it does
        // not come.
        let first = home == Some(self.context.node)
            || home.is_none_or(|home| !creation.values().any(|node| *node == home));
        if mine
            && (first || self.started.elapsed() > INITIALIZE_AFTER)
            && let Err(error) = group.initialize(creation).await
        {
            rarely!(warn, "group {} was not initialized: {error}", key.group);
        }
        false
    }

    async fn ensure_meta(&self, view: &View, meta: &Replica) -> bool {
        if !meta.leads() {
            let leader = meta.status().leader;
            if let (false, Some(leader)) = (self.announced(view), leader)
                && self.may_announce()
            {
                self.announce(view, leader).await;
                return false;
            }
            return true;
        }

        let read = meta::read_view(&meta.state().read());
        match read {
            // It is accepted once, so that each leader may propose it until one has been heard.
            Ok(None) => {
                let command = meta::MetaCommand::Found {
                    view: self.first_view.clone(),
                };
                self.propose_meta(meta, command).await;
                return false;
            }
            Ok(Some(_)) => {}
            Err(error) => {
                rarely!(error, "the view cannot be read: {error}");
                return true;
            }
        }

        if !self.announced(view) && self.may_announce() {
            match self
                .context
                .take_address(self.announcement(), PROPOSE_TIMEOUT)
                .await
            {
                Ok(outcome) => self.announced_with(view, &outcome),
                Err(error) => {
                    tracing::debug!("the address of this node could not be announced yet: {error}")
                }
            }
            return false;
        }
        true
    }

    /// Returns true if the view names this node as it runs.
    fn announced(&self, view: &View) -> bool {
        let config = self.joining.config();
        let named = view.nodes.get(&self.context.node);
        let is_named = named.is_some_and(|node| {
            node.address == config.address && node.public_address == config.public_address
        });
        if is_named {
            *self.announcing.lock() = Announcing::default();
        }
        is_named
    }

    /// Has the meta leader put this node's new address into the view.
    async fn announce(&self, view: &View, leader: NodeId) {
        let Some(leader) = self.context.views().resolve(leader) else {
            return;
        };
        let announcement = Announcement {
            cluster: self.context.cluster,
            command: self.announcement(),
        };
        match self
            .context
            .peers
            .announce(&leader.address, &announcement, PROPOSE_TIMEOUT)
            .await
        {
            Ok(outcome) => self.announced_with(view, &outcome),
            Err(error) => {
                tracing::debug!("the address of this node could not be announced yet: {error}")
            }
        }
    }

    /// Tells what became of an announcement: of a rejected one at first, and then now and then.
    fn announced_with(&self, view: &View, outcome: &meta::MetaOutcome) {
        let own = &self.joining.config().address;
        let rejection = match outcome {
            meta::MetaOutcome::Done | meta::MetaOutcome::MoveOpened { .. } => {
                tracing::info!("announced the address {own} of this node");
                return;
            }
            meta::MetaOutcome::Rejected(rejection) => rejection,
        };
        let mut announcing = self.announcing.lock();
        announcing.rejected += 1;
        if announcing
            .told
            .is_some_and(|told| told.elapsed() < TELL_AGAIN)
        {
            return;
        }
        announcing.told = Some(Instant::now());
        let times = announcing.rejected;
        drop(announcing);
        match rejection {
            // Said once a minute, with the number.
            meta::MetaRejection::AddressTaken { address, by } => tracing::warn!(
                "the view has node {by} at {address}, where this node ({}) runs now: {times} \
                 announcements were rejected. Start {by} where it is to be; if it is gone for \
                 good, remove it with 'quorate cluster remove {address}'",
                self.context.node
            ),
            rejection => {
                let known = view
                    .nodes
                    .get(&self.context.node)
                    .map_or("no address", |node| node.address.as_str());
                // Said once a minute, as above.
                tracing::warn!(
                    "the view has this node at {known} and not at {own}: {times} announcements \
                    were rejected: {rejection:?}"
                );
            }
        }
    }

    /// Returns whether it is time to announce this node's address, again if it was announced
    /// before.
    fn may_announce(&self) -> bool {
        let mut announcing = self.announcing.lock();
        let pause = announcing.pause;
        if announcing.last.is_some_and(|last| last.elapsed() < pause) {
            return false;
        }
        announcing.last = Some(Instant::now());
        announcing.pause = (pause * 2).clamp(ANNOUNCE_PAUSE_MIN, ANNOUNCE_PAUSE_MAX);
        true
    }

    fn announcement(&self) -> meta::MetaCommand {
        let config = self.joining.config();
        meta::MetaCommand::Announce {
            node: self.context.node,
            directory: self.joining.directory_id(),
            address: config.address.clone(),
            public_address: config.public_address.clone(),
        }
    }

    async fn propose_meta(&self, meta: &Replica, command: meta::MetaCommand) {
        match meta
            .propose_meta(command, Instant::now() + PROPOSE_TIMEOUT)
            .await
        {
            Ok(meta::MetaOutcome::Done | meta::MetaOutcome::MoveOpened { .. }) => {}
            Ok(meta::MetaOutcome::Rejected(meta::MetaRejection::AlreadyFounded))
            | Err(ProposeError::NotLeader { .. }) => {}
            Ok(meta::MetaOutcome::Rejected(rejection)) => {
                rarely!(warn, "the meta group rejected a command: {rejection:?}")
            }
            Err(error) => rarely!(warn, "a command to the meta group got no answer: {error}"),
        }
    }

    /// Has the shard own every slot that the view gives it and that no move ever touched.
    async fn ensure_claimed(&self, view: &View, group: &Replica) -> bool {
        let shard = group.key().group;
        if self.done.lock().claimed.contains(&shard) {
            return true;
        }

        let read = group
            .state()
            .read_in(ReadKind::Page, |read| SlotState::read_all(read))
            .await;
        let held: BTreeSet<Slot> = match read {
            Ok(states) => states
                .into_iter()
                .filter(|(_, state)| state.serves_reads() || state.generation.0 > 0),
            Err(error) => {
                tell_unreadable(group, &error);
                return true;
            }
        }
        .map(|(slot, _)| slot)
        .collect();

        // What has ever been moved is claimed by nobody: its move gave it an owner.
        let missing: Vec<Slot> = view
            .slots
            .slots_of(shard)
            .filter(|slot| !held.contains(slot))
            .collect();
        if missing.is_empty() {
            self.done.lock().claimed.insert(shard);
            return true;
        }

        if group.leads() {
            let command = kv::KvCommand::Claim { slots: missing };
            match group
                .propose_command(command, Instant::now() + PROPOSE_TIMEOUT)
                .await
            {
                Ok(kv::KvOutcome::ClaimRejected { slot, generation }) => {
                    rarely!(
                        warn,
                        "shard {shard} cannot claim slot {slot}: it was moved by {generation}"
                    );
                }
                Ok(_) | Err(ProposeError::NotLeader { .. }) => {}
                Err(error) => rarely!(warn, "the claim of shard {shard} got no answer: {error}"),
            }
        }
        false
    }
}

/// Resolves when the meta group has applied an entry after this one. A little later, so that what
/// comes together is taken together.
async fn another_entry(applied: Option<watch::Receiver<u64>>, seen: u64) {
    let Some(mut applied) = applied else {
        return std::future::pending().await;
    };
    if applied.wait_for(|index| *index > seen).await.is_err() {
        // The replica is closed: time will tell of another.
        return std::future::pending().await;
    }
    tokio::time::sleep(ENTRIES_TOGETHER).await;
}

fn unready_group(group: &Replica) -> Option<String> {
    let status = group.status();
    let key = group.key();
    if let Some(reason) = status.failed {
        return Some(format!("replica {key} has stopped: {reason}"));
    }
    if status.leader.is_none() {
        return Some(format!("{} has no leader", key.group.named()));
    }
    match group.staleness() {
        Some(age) if age <= FRESH => None,
        Some(_) | None => Some(format!("replica {key} is catching up")),
    }
}
