//! [`simulate`]: one life of a world. It is founded, goes wrong while clients work, and is healed;
//! then it must get on, and everything that clients were told must be true.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use parking_lot::Mutex;
use quorate::mutants::Mutant;
use quorate::sm::cluster::view::PlacementSpec;
use quorate::types::Address;

use super::clients::Clients;
use super::determinism;
pub use super::faults::Fault;
use super::host::{End, Ended, Host};
use super::network::Network;
use super::oracles::{Depth, Oracles, floor};
use super::random::SimRng;
use super::setting::Setting;

/// How long the world may take to be founded, or to get on after it was healed.
const PROGRESS_MS_MAX: u64 = 120_000;
/// Between two looks at replicas, and at their maps.
const LOOK_EVERY_MS: u64 = 20;
const LOOK_DEEP_EVERY_MS: u64 = 1000;
/// Between two looks whether nodes hold no more than they need.
const FLOOR_EVERY_MS: u64 = 200;

/// Says what is simulated. The life follows from it, to the last byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenario {
    pub seed: u64,
    /// Kinds of faults that strike.
    pub faults: Vec<Fault>,
    /// For how long clients work; None: the seed says.
    pub work_ms: Option<u64>,
    /// Fault of the nodes themselves.
    pub mutant: Option<Mutant>,
}

/// How a life went.
#[derive(Debug, Default)]
pub struct Life {
    pub operations: u64,
    pub faults: u64,
    pub view_changes: u64,
    pub simulated_ms: u64,
    pub violation: Option<String>,
    /// What happened, line by line, as a person reads it.
    pub story: String,
    /// Equal in two runs of one seed.
    pub trace: u64,
    pub messages: u64,
}

impl Life {
    pub fn summary(&self) -> String {
        format!(
            "{} operations, {} faults, {} view changes, {}.{:03} simulated seconds, {} messages, \
             trace {:016x}",
            self.operations,
            self.faults,
            self.view_changes,
            self.simulated_ms / 1000,
            self.simulated_ms % 1000,
            self.messages,
            self.trace
        )
    }
}

/// Events, each at a time that was planned.
#[derive(Debug)]
pub(super) enum Event {
    Strike,
    Restart(usize),
    Resume(usize, u64),
    Heal,
    /// The disk of a node has room again, and is as fast as ever.
    HealDisk(usize),
    /// The process of a disk that was copied goes on from another start.
    KillForCopy(usize),
    /// The copy of a disk is put back, if all have heard that its node went on since.
    PutBack(usize),
}

/// Whether a change of the view was accepted, once that is known.
pub(super) type Accepted = Arc<Mutex<Option<bool>>>;

/// Holds the world of a seed: its machines, what is between them, and who looks on.
pub(super) struct World {
    pub(super) now_ms: u64,
    pub(super) hosts: Vec<Host>,
    pub(super) network: Network,
    pub(super) clients: Clients,
    oracles: Oracles,
    pub(super) random: SimRng,
    faults: Vec<Fault>,
    work_ms: Option<u64>,
    events: BTreeMap<(u64, u64), Event>,
    events_planned: u64,
    pub(super) paused: Vec<bool>,
    pub(super) setting: Setting,
    /// True once something that a node had was lost or is rotten: nothing else may be.
    pub(super) is_wounded: bool,
    pub(super) changes: Vec<Accepted>,
    pub(super) life: Life,
}

/// Runs a life in this thread, which must be a new one.
pub fn simulate(scenario: &Scenario) -> Life {
    determinism::begin(scenario.seed);
    quorate::blocking::testing::do_inline();
    quorate::mutants::testing::put_in(scenario.mutant);
    let mut world = World::new(scenario);
    if let Err(violation) = world.live() {
        world.tell(&format!("violation: {violation}"));
        world.tell_leaders();
        world.life.violation = Some(violation);
    }
    world.end()
}

impl World {
    fn new(scenario: &Scenario) -> Self {
        let (seed, faults) = (scenario.seed, &scenario.faults);
        let mut random = SimRng::new(seed, "world");
        let has_views = faults.contains(&Fault::View);
        let spares = if has_views { random.below(3) } else { 0 };
        let members = *random.pick(&[3, 3, 3, 5]);
        let nodes = members + spares as usize;
        let clients = random.between(3, 6) as usize;
        let address = |name: String| -> Address { name.parse().expect("an address") };
        let addresses: Vec<Address> = (0..nodes)
            .map(|node| address(format!("node-{node}:1")))
            .chain(Clients::host_names(clients).into_iter().map(address))
            .collect();
        let network = Network::new(&addresses, SimRng::new(seed, "network"));
        let view = addresses[..members].to_vec();
        let setting = Setting::of(seed);
        let asked = PlacementSpec {
            replication_factor: setting.replication_factor,
            shards: Some(random.between(1, 4) as u16),
            ..PlacementSpec::default()
        };
        let hosts = (0..nodes)
            .map(|index| {
                let address = addresses[index].clone();
                let view = Some(view.clone());
                Host::new(index, address, view, asked, &setting, network.clone(), seed)
            })
            .collect();
        let clients = Clients::new(&network, &addresses[..nodes], nodes, clients, seed);
        Self {
            now_ms: 0,
            hosts,
            network,
            clients,
            oracles: Oracles::default(),
            random,
            faults: faults.clone(),
            work_ms: scenario.work_ms,
            events: BTreeMap::new(),
            events_planned: 0,
            paused: vec![false; nodes],
            setting,
            is_wounded: false,
            changes: Vec::new(),
            life: Life::default(),
        }
    }

    fn live(&mut self) -> Result<(), String> {
        self.tell(&self.setting.summary());
        quorate::rare::testing::take(&self.setting.rare);
        for host in 0..self.hosts.len() {
            self.hosts[host].start();
        }
        let settled = self.clients.settle();
        self.until("the cluster is founded", || settled.lock().is_some())?;
        settled.lock().take().unwrap_or(Ok(()))?;
        self.tell("founded");
        self.oracles.watch_keys(&self.clients.workload().keys);

        self.clients.begin();
        if !self.faults.is_empty() {
            self.plan(1000, Event::Strike);
        }
        // Drawn in any case, so that all else stays as it was.
        let drawn_ms = self.random.between(8_000, 20_000);
        let until = self.now_ms + self.work_ms.unwrap_or(drawn_ms);
        while self.now_ms < until {
            self.tick()?;
        }

        self.heal_all();
        self.tell("healed");
        self.clients.end();
        let book = self.clients.book();
        self.until("the requests end", || book.lock().are_over())?;
        let read = self.clients.read_all();
        self.until("all is read", || read.lock().is_some())?;
        read.lock().take().unwrap_or(Ok(()))?;
        self.await_replacement()?;
        let settled = self.clients.settle();
        self.until("the cluster settles", || settled.lock().is_some())?;
        settled.lock().take().unwrap_or(Ok(()))?;
        self.oracles.look(&self.hosts, Depth::Deep)?;
        self.tell("read");
        self.check_histories()?;
        self.await_floor()
    }

    /// Waits until nodes hold no more than they need.
    fn await_floor(&mut self) -> Result<(), String> {
        let deadline = self.now_ms + PROGRESS_MS_MAX;
        while let Err(what) = floor::check(&self.hosts) {
            if self.now_ms > deadline {
                return Err(format!("nothing is asked for, and yet {what}"));
            }
            for _ in 0..FLOOR_EVERY_MS {
                self.tick()?;
            }
        }
        self.tell("idle");
        Ok(())
    }

    /// Waits until the cluster goes on without a disk that was lost.
    fn await_replacement(&mut self) -> Result<(), String> {
        let deadline = self.now_ms + PROGRESS_MS_MAX;
        while let Some(index) = self.missed() {
            if self.now_ms > deadline {
                return Err(format!(
                    "no progress: node {index} is in no view as it is now"
                ));
            }
            self.tick()?;
        }
        Ok(())
    }

    /// Returns a node that the newest view names with another directory than it has, if any is.
    fn missed(&self) -> Option<usize> {
        let standings: Vec<_> = self.hosts.iter().map(Host::standing).collect();
        let views = standings
            .iter()
            .flatten()
            .filter_map(|(_, view)| view.as_ref());
        let newest = views.max_by_key(|view| (view.epoch, view.version))?;
        let is_missed = |host: &Host| {
            let named = newest.node_at(&host.address)?;
            let named = newest.nodes.get(&named)?.directory;
            let has = standings[host.index]
                .as_ref()
                .map(|(directory, _)| *directory);
            (has != Some(named)).then_some(host.index)
        };
        self.hosts.iter().find_map(is_missed)
    }

    fn check_histories(&self) -> Result<(), String> {
        let book = self.clients.book();
        book.lock().check(&self.oracles.revisions())
    }

    fn until(&mut self, what: &str, is_done: impl Fn() -> bool) -> Result<(), String> {
        let deadline = self.now_ms + PROGRESS_MS_MAX;
        while !is_done() {
            if self.now_ms > deadline {
                return Err(format!("no progress: {what} was awaited in vain"));
            }
            self.tick()?;
        }
        Ok(())
    }

    /// Has the oracles look. `is_before_event`: before something happens that may hide what is.
    fn look(&mut self, is_before_event: bool) -> Result<(), String> {
        let depth = match self.now_ms {
            _ if is_before_event => Depth::Usual,
            now_ms if now_ms.is_multiple_of(LOOK_DEEP_EVERY_MS) => Depth::Deep,
            now_ms if now_ms.is_multiple_of(LOOK_EVERY_MS) => Depth::Usual,
            _ => Depth::Shallow,
        };
        self.oracles.look(&self.hosts, depth)
    }

    /// A millisecond of the world.
    fn tick(&mut self) -> Result<(), String> {
        self.now_ms += 1;
        determinism::set_now_ms(self.now_ms);
        self.network.advance(self.now_ms);
        let mut looked = false;
        while let Some(entry) = self.events.first_entry() {
            if entry.key().0 > self.now_ms {
                break;
            }
            let event = entry.remove();
            if !std::mem::replace(&mut looked, true) {
                self.look(true)?;
            }
            self.happen(event);
        }
        for index in 0..self.hosts.len() {
            if self.paused[index] {
                continue;
            }
            self.hosts[index].step(self.now_ms);
            match self.hosts[index].take_end() {
                None => {}
                Some(Ended::Again(why)) => {
                    self.oracles.forget();
                    self.tell(&format!("node {index} starts again: {why}"));
                    // The real platform puts the replicas aside, and makes the directory another.
                    if why.contains("is an old copy") {
                        self.hosts[index].disk.lose();
                    }
                    self.plan(100, Event::Restart(index));
                }
                Some(Ended::Failed(why)) if self.hosts[index].disk.is_troubled() => {
                    self.tell(&format!("node {index} gives up: {why}"));
                    self.give_another_disk_if_damaged(index, &why);
                    self.plan(400, Event::Restart(index));
                }
                Some(Ended::Failed(why) | Ended::Broken(why)) => {
                    return Err(format!("node {index} ended: {why}"));
                }
            }
        }
        self.clients.step();
        self.look(false)
    }

    pub(super) fn plan(&mut self, in_ms: u64, event: Event) {
        self.events_planned += 1;
        let key = (self.now_ms + in_ms, self.events_planned);
        self.events.insert(key, event);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Strike => {
                let fault = *self.random.pick(&self.faults.clone());
                self.strike(fault);
                let pause = self.random.between(100, 3000);
                self.plan(pause, Event::Strike);
            }
            Event::Restart(index) => {
                if !self.hosts[index].is_up() {
                    self.tell(&format!("start node {index}"));
                    self.hosts[index].start();
                }
            }
            Event::Resume(index, since_ms) => self.resume(index, since_ms),
            Event::Heal => {
                self.tell("heal the links");
                self.network.heal();
            }
            Event::HealDisk(index) => {
                self.tell(&format!("heal the disk of node {index}"));
                self.hosts[index].disk.heal();
            }
            Event::KillForCopy(index) => self.kill_for_copy(index),
            Event::PutBack(index) => self.put_back(index),
        }
    }

    fn heal_all(&mut self) {
        self.events.clear();
        self.network.heal();
        for index in 0..self.hosts.len() {
            // How long it stood still is of no matter any more.
            self.paused[index] = false;
            self.hosts[index].disk.heal();
            if !self.hosts[index].is_up() {
                self.hosts[index].start();
            }
        }
    }

    pub(super) fn tell(&mut self, what: &str) {
        let (s, ms) = (self.now_ms / 1000, self.now_ms % 1000);
        let _ = writeln!(self.life.story, "[{s:>4}.{ms:03}] {what}");
        self.network.note(what);
    }

    fn end(mut self) -> Life {
        let accepted = |change: &&Accepted| *change.lock() == Some(true);
        self.life.view_changes = self.changes.iter().filter(accepted).count() as u64;
        self.life.simulated_ms = self.now_ms;
        let book = self.clients.book();
        let book = book.lock();
        self.life.operations = book.answered + book.unanswered;
        let counts = format!(
            "{} answered, {} of unknown outcome, {} refused; {}",
            book.answered,
            book.unanswered,
            book.refused,
            self.oracles.counts()
        );
        drop(book);
        self.tell(&counts);
        (self.life.trace, self.life.messages) = self.network.trace();
        for host in &mut self.hosts {
            host.end(End::Kill);
        }
        self.life
    }
}
