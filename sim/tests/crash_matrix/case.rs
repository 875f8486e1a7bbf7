//! One run: a cluster is founded and filled, its view is changed while clients write and read, and
//! one node ends after a step.

use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::{pending, ready};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::history::{History, options};
use super::host::{Host, addresses};
use super::machine::End;
use super::probe;
use quorate::api::store::Store;
use quorate::api::view_change::{ReplicationFactor, Shards, ViewChange};
use quorate::client::remote::RemoteStore;
use quorate::node::platform::Stepped;
use quorate::sm::cluster::membership;
use quorate::sm::cluster::view::PlacementSpec;
use quorate::types::{Address, GroupId, PlanEpoch, ReplicaId, SLOTS};

/// Long enough for a loaded machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(180);
/// Keys written before the change, over all slots.
const OLD_KEYS: usize = 40;
/// Keys written all the time, several of them in one slot.
const BUSY_KEYS: [&str; 6] = ["{p}1", "{p}2", "{q}1", "{q}2", "{r}1", "{s}1"];

/// What is changed, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Grow,
    Shrink,
    Replace,
    Replicas,
    Shards,
    ReplaceAll,
    /// All nodes are to be replaced, and before they are they are to stay.
    TakeBack,
    /// Two replicas and a witness instead of three, and back.
    Even,
}

/// Who ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// Who took the step: the leader of the group, or of the shard that slots move from.
    Driver,
    MetaLeader,
    /// The leader of the shard that slots move to, or the replica that the step is about.
    Destination,
}

impl Kind {
    pub const ALL: [Kind; 8] = [
        Kind::Grow,
        Kind::Shrink,
        Kind::Replace,
        Kind::Replicas,
        Kind::Shards,
        Kind::ReplaceAll,
        Kind::TakeBack,
        Kind::Even,
    ];

    /// The nodes at first, and the nodes after all changes, of six.
    fn nodes(self) -> (&'static [usize], &'static [usize]) {
        match self {
            Kind::Grow => (&[0, 1, 2], &[0, 1, 2, 3]),
            Kind::Shrink => (&[0, 1, 2, 3], &[0, 1, 2]),
            Kind::Replace => (&[0, 1, 2], &[0, 1, 3]),
            Kind::Replicas | Kind::Shards | Kind::TakeBack | Kind::Even => (&[0, 1, 2], &[0, 1, 2]),
            Kind::ReplaceAll => (&[0, 1, 2], &[3, 4, 5]),
        }
    }

    fn changes(self, all: &[Address]) -> Vec<ViewChange> {
        let nodes = |nodes: &[usize]| {
            let nodes = nodes.iter().map(|n| all[*n].clone()).collect();
            ViewChange {
                nodes: Some(nodes),
                ..ViewChange::default()
            }
        };
        let factor = |factor| ViewChange {
            replication_factor: Some(ReplicationFactor::Fixed(factor)),
            ..ViewChange::default()
        };
        let shards = |shards| ViewChange {
            shards: Some(Shards::Fixed(shards)),
            ..ViewChange::default()
        };
        match self {
            Kind::Grow | Kind::Shrink | Kind::Replace | Kind::ReplaceAll => {
                vec![nodes(self.nodes().1)]
            }
            Kind::Replicas => vec![factor(1), factor(3)],
            Kind::Even => vec![factor(2), factor(3)],
            Kind::Shards => vec![shards(5), shards(2)],
            Kind::TakeBack => vec![nodes(&[3, 4, 5]), nodes(&[0, 1, 2])],
        }
    }
}

/// A case to be run.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub kind: Kind,
    pub victim: Victim,
    /// The victim ends after this step; the first is 1. After 0: when the change was accepted.
    pub step: usize,
    pub seed: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}, {:?} ends after step {}, seed {}",
            self.kind, self.victim, self.step, self.seed
        )
    }
}

/// How a case went.
#[derive(Debug, Clone)]
pub struct Ran {
    /// Steps that were taken in all.
    pub steps: usize,
    /// The step after which a node ended; none: the change was over before.
    pub ended_after: Option<String>,
    pub acknowledged: usize,
}

/// Counts the steps, and ends the victim.
struct Plot {
    case: Case,
    hosts: Vec<Arc<Host>>,
    end: End,
    state: Mutex<PlotState>,
    struck: Notify,
}

#[derive(Default)]
struct PlotState {
    is_armed: bool,
    steps: Vec<String>,
    /// The victim, and the step that it was.
    victim: Option<(usize, String)>,
}

impl Plot {
    /// A step was taken on host `by`. True: it goes on.
    fn stepped(&self, by: usize, step: &Stepped<'_>) -> bool {
        let mut state = self.state.lock();
        if state.is_armed && self.hosts[by].is_up() {
            let text = format!("node {by}: {}", describe(step));
            state.steps.push(text.clone());
            if state.steps.len() == self.case.step {
                self.strike(&mut state, by, Some(step), text);
            }
        }
        self.hosts[by].is_up()
    }

    fn strike(&self, state: &mut PlotState, by: usize, step: Option<&Stepped<'_>>, text: String) {
        let meta_leader = || self.leader(GroupId::META);
        let victim = match self.case.victim {
            Victim::Driver => None,
            Victim::MetaLeader => meta_leader(),
            Victim::Destination => step.and_then(|step| self.destination(step)),
        };
        let victim = victim.unwrap_or(by);
        if self.hosts[victim].end(self.end) {
            state.victim = Some((victim, text));
            self.struck.notify_one();
        }
    }

    /// Waits until the victim has ended, or there is nothing left that it could end after.
    async fn until_struck(&self, store: &RemoteStore, epoch: PlanEpoch) -> Result<(), String> {
        tokio::select! {
            settled = settle(store, epoch) => settled,
            () = async {
                while self.state.lock().victim.is_none() {
                    sleep(Duration::from_millis(5)).await;
                }
            } => Ok(()),
        }
    }

    fn leader(&self, group: GroupId) -> Option<usize> {
        (0..self.hosts.len()).find(|n| self.hosts[*n].leads(group))
    }

    fn destination(&self, step: &Stepped<'_>) -> Option<usize> {
        match step {
            Stepped::Moved { slot_move, .. } => self.leader(slot_move.to),
            Stepped::Opened { to, .. } => self.leader(*to),
            Stepped::Cleared { shard } => self.leader(*shard),
            Stepped::Members { group, step } => {
                let replica =
                    |id: ReplicaId| (0..self.hosts.len()).find(|n| self.hosts[*n].has(*group, id));
                match step {
                    membership::MembershipStep::AddLearner(id)
                    | membership::MembershipStep::HandOver(id) => replica(*id),
                    // The youngest: who came last, or is the last to go.
                    membership::MembershipStep::SetVoters(ids)
                    | membership::MembershipStep::RemoveLearners(ids) => {
                        ids.iter().rev().find_map(|id| replica(*id))
                    }
                    membership::MembershipStep::Report(told) => {
                        told.voters.iter().rev().find_map(|id| replica(*id))
                    }
                    _ => None,
                }
            }
        }
    }
}

fn describe(step: &Stepped<'_>) -> String {
    match step {
        Stepped::Moved { slot_move, step } => format!(
            "move {} {}->{}: {step:?}",
            slot_move.id, slot_move.from, slot_move.to
        ),
        Stepped::Opened { from, to } => format!("move {from}->{to} opened"),
        Stepped::Cleared { shard } => format!("shard {shard}: cleared"),
        Stepped::Members { group, step } => format!("group {group}: {step:?}"),
    }
}

/// A node for each address, to found a cluster of `view`. None is started.
pub fn hosts(all: &[Address], view: &[Address], seed: u64) -> Vec<Arc<Host>> {
    let host = |(n, address): (usize, &Address)| {
        Host::new(
            address.clone(),
            view.to_vec(),
            PlacementSpec::default(),
            seed.wrapping_mul(1000) + n as u64,
        )
    };
    all.iter().enumerate().map(host).collect()
}

/// Runs a case.
///
/// # Errors
///
/// What did not hold, with the steps that were taken.
pub async fn run(case: Case) -> Result<Ran, String> {
    let (mut random, all) = (StdRng::seed_from_u64(case.seed), addresses(6));
    let (first, last) = case.kind.nodes();
    let view: Vec<Address> = first.iter().map(|n| all[*n].clone()).collect();
    let hosts = hosts(&all, &view, case.seed);
    let end = if random.random_bool(0.3) {
        End::Kill
    } else {
        End::PowerCut {
            seed: random.random(),
        }
    };
    let plot = Arc::new(Plot {
        case,
        hosts: hosts.clone(),
        end,
        state: Mutex::default(),
        struck: Notify::new(),
    });
    for (n, host) in hosts.iter().enumerate() {
        let weak = Arc::downgrade(&plot);
        host.watch(Arc::new(move |step| {
            match weak.upgrade().is_none_or(|plot| plot.stepped(n, &step)) {
                true => Box::pin(ready(())),
                // The driver is dead.
                false => Box::pin(pending()),
            }
        }));
        if first.contains(&n) || last.contains(&n) || case.kind == Kind::TakeBack {
            host.start();
        }
    }
    let ran = drive(&plot, &all, last, &mut random).await;
    for host in &hosts {
        host.end(End::Kill);
        host.bury();
    }
    ran.map_err(|reason| {
        let state = plot.state.lock();
        format!(
            "{case} ({end:?}): {reason}\nvictim: {:?}\n{}",
            state.victim,
            state.steps.join("\n")
        )
    })
}

async fn drive(
    plot: &Arc<Plot>,
    all: &[Address],
    last: &[usize],
    random: &mut StdRng,
) -> Result<Ran, String> {
    let (case, hosts) = (plot.case, &plot.hosts);
    let members: Vec<Address> = case
        .kind
        .nodes()
        .0
        .iter()
        .map(|n| all[*n].clone())
        .collect();
    let store = Arc::new(RemoteStore::connect(members).map_err(|error| error.to_string())?);
    let history = Arc::new(History::default());
    let old_keys: Vec<String> = (0..OLD_KEYS).map(|n| format!("old-{n}")).collect();
    for key in &old_keys {
        until(&format!("{key} is written"), async || {
            history.put(&*store, key, &format!("of {key}")).await
        })
        .await?;
    }
    let (over, trouble) = (CancellationToken::new(), Arc::new(Mutex::new(None)));
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..3 {
        tasks.spawn(work(n, store.clone(), history.clone(), over.clone()));
    }
    tasks.spawn(watch(hosts.clone(), over.clone(), trouble.clone()));
    let fate = Fate::draw(random);
    tasks.spawn(mourn(plot.clone(), last.to_vec(), fate, over.clone()));

    plot.state.lock().is_armed = true;
    let mut changed = Ok(());
    for (n, change) in case.kind.changes(all).into_iter().enumerate() {
        changed = carry_out(plot, &store, &change, n == 0).await;
        if changed.is_err() {
            break;
        }
    }
    plot.state.lock().is_armed = false;
    over.cancel();
    while tasks.join_next().await.is_some() {}
    changed?;
    trouble.lock().take().map_or(Ok(()), Err)?;
    for key in old_keys.iter().map(String::as_str).chain(BUSY_KEYS) {
        until(&format!("{key} is read"), async || {
            history.get(&*store, key).await
        })
        .await?;
    }
    history.check()?;
    let served = AtomicUsize::new(0);
    until("every slot is served", async || {
        match probe::check(hosts).await {
            Ok(count) => {
                served.fetch_max(count, Ordering::Relaxed).max(count) == usize::from(SLOTS)
            }
            Err(_) => false,
        }
    })
    .await
    .map_err(|error| format!("{error}: {served:?} of {SLOTS}"))?;
    if let Some(failed) = hosts.iter().find_map(|host| host.failed.lock().clone()) {
        return Err(format!("a node stopped by itself: {failed}"));
    }
    let state = plot.state.lock();
    let ended_after = state
        .victim
        .as_ref()
        .map(|(victim, step)| format!("{step}; node {victim} ended"));
    Ok(Ran {
        steps: state.steps.len(),
        ended_after,
        acknowledged: history.acknowledged(),
    })
}

/// What becomes of the victim.
#[derive(Debug, Clone, Copy)]
struct Fate {
    back_after: Duration,
    /// It does not come back at all, if it is to leave anyway.
    stays_dead: bool,
}

impl Fate {
    fn draw(random: &mut StdRng) -> Self {
        let back_after = Duration::from_millis(if random.random_bool(0.5) {
            0
        } else {
            random.random_range(500..2500)
        });
        Self {
            back_after,
            stays_dead: random.random_bool(0.5),
        }
    }
}

/// Waits until `holds` does.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        if Instant::now() > deadline {
            return Err(format!("never: {what}"));
        }
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Has the change accepted. Returns the epoch of its plan.
pub async fn accept(store: &RemoteStore, change: &ViewChange) -> Result<PlanEpoch, String> {
    let (said, epoch) = (Mutex::new(String::new()), Mutex::new(PlanEpoch::default()));
    let accepted = until("the change is accepted", async || {
        match store.change_view(change.clone(), None, options()).await {
            Ok(accepted) => {
                *epoch.lock() = accepted.id;
                true
            }
            Err(error) => {
                *said.lock() = error.to_string();
                false
            }
        }
    });
    accepted
        .await
        .map_err(|error| format!("{error}: {said:?}"))?;
    Ok(epoch.into_inner())
}

/// Has the change accepted, and waits for its end.
async fn carry_out(
    plot: &Plot,
    store: &RemoteStore,
    change: &ViewChange,
    is_first: bool,
) -> Result<(), String> {
    let epoch = accept(store, change).await?;
    if is_first && plot.case.step == 0 {
        let by = plot.leader(GroupId::META).unwrap_or(0);
        plot.strike(
            &mut plot.state.lock(),
            by,
            None,
            "the change was accepted".to_owned(),
        );
    }
    if is_first && plot.case.kind == Kind::TakeBack {
        plot.until_struck(store, epoch).await
    } else {
        settle(store, epoch).await
    }
}

/// Waits until everything is as this plan, or a later one, says.
pub async fn settle(store: &RemoteStore, epoch: PlanEpoch) -> Result<(), String> {
    let said = Mutex::new(String::new());
    let settled = until("the change ends", async || match store.status().await {
        Ok(status) => {
            *said.lock() = format!("{status:#?}");
            status.settled && status.epoch >= epoch
        }
        Err(error) => {
            *said.lock() = error.to_string();
            false
        }
    });
    settled
        .await
        .map_err(|error| format!("{error}: {}", said.lock()))
}

/// A client that writes and reads until it is over.
async fn work(
    client: usize,
    store: Arc<RemoteStore>,
    history: Arc<History>,
    over: CancellationToken,
) {
    let mut random = StdRng::seed_from_u64(client as u64);
    for n in 0.. {
        if over.is_cancelled() {
            return;
        }
        let key = BUSY_KEYS[random.random_range(0..BUSY_KEYS.len())];
        if random.random_bool(0.6) {
            history.put(&*store, key, &format!("{client}-{n}")).await;
        } else {
            history.get(&*store, key).await;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Looks for slots that are served twice.
async fn watch(
    hosts: Vec<Arc<Host>>,
    over: CancellationToken,
    trouble: Arc<Mutex<Option<String>>>,
) {
    while !over.is_cancelled() {
        if let Err(error) = probe::check(&hosts).await {
            trouble.lock().get_or_insert(error);
        }
        sleep(Duration::from_millis(40)).await;
    }
}

/// Takes down what is left of the victim, and starts it again.
async fn mourn(plot: Arc<Plot>, last: Vec<usize>, fate: Fate, over: CancellationToken) {
    if over
        .run_until_cancelled(plot.struck.notified())
        .await
        .is_none()
    {
        return;
    }
    let victim = plot.state.lock().victim.clone();
    let Some((victim, _)) = victim else { return };
    plot.hosts[victim].bury();
    if fate.stays_dead && !last.contains(&victim) {
        return;
    }
    sleep(fate.back_after).await;
    plot.hosts[victim].start();
}
