//! Concurrent clients that work on a cluster and remember what they asked and what they were told.
//!
//! Two kinds of keys: a few **registers**, read and written by all with every kind of condition,
//! judged by the checker; and the **ledger**, keys that are written once and must be there in the
//! end if, and with what, they were acknowledged, and absent if they were rejected.

use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use reqwest::Method;
use tokio::task::JoinSet;

use quorate_sim::history::{Action, Condition, Operation, Outcome, Value};
use quorate_sim::linearizable::check;

use super::cluster::Cluster;
use super::http::{Answer, Client, Failure, Request};
use super::{eventually, say, seed};

/// What a client waits for one answer. Below the server's own deadline, so that both kinds of
/// silence come up.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// Nodes are picked by a number below this, so that a client need not know how many there are now.
const NODES_MAX: usize = 5040;

/// After a refusal, so that a dead node is not asked in a busy loop.
const PAUSE: Duration = Duration::from_millis(10);

/// How often a write with an idempotency key is sent again while its outcome is unknown.
const RETRIES_MAX: usize = 3;

#[derive(Debug, Clone)]
pub struct Load {
    /// Makes its keys differ from those of another load on the same cluster.
    pub name: &'static str,
    pub clients: usize,
    pub registers: usize,
    /// What a client waits for one answer.
    pub answer_limit: Duration,
    /// How long a client asks again what was certainly not done. Zero: it asks once.
    pub retry_for: Duration,
}

impl Load {
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            clients: 6,
            registers: 5,
            answer_limit: ANSWER_LIMIT,
            retry_for: Duration::ZERO,
        }
    }

    /// Clients with a deadline, who ask again until it is over when something was certainly not
    /// done. What then has no answer is an error that a user sees: see
    /// [`History::assert_no_errors`].
    pub fn deadline(self, deadline: Duration) -> Self {
        Self {
            answer_limit: deadline,
            retry_for: deadline,
            ..self
        }
    }

    /// Lets the clients loose on all nodes of a cluster.
    pub fn start(self, cluster: &Cluster) -> Running {
        self.start_at(cluster.addresses(), cluster.client.clone())
    }

    pub fn start_at(self, addresses: Vec<String>, http: Client) -> Running {
        let shared = Arc::new(Shared {
            load: self,
            addresses: Mutex::new(addresses),
            http,
            start: Instant::now(),
            stop: AtomicBool::new(false),
            acknowledged: Mutex::default(),
            ledger: Mutex::default(),
        });
        let mut clients = JoinSet::new();
        for id in 0..shared.load.clients {
            clients.spawn(Worker::new(id, Arc::clone(&shared)).run());
        }
        Running { shared, clients }
    }
}

struct Shared {
    load: Load,
    addresses: Mutex<Vec<String>>,
    http: Client,
    start: Instant,
    stop: AtomicBool,
    /// When each acknowledged write was called and when it returned.
    acknowledged: Mutex<Vec<(Duration, Duration)>>,
    /// The keys of the ledger that were acknowledged, as soon as they were.
    ledger: Mutex<Vec<(String, Value)>>,
}

impl Shared {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Any number stands for a node.
    fn address(&self, number: usize) -> String {
        let addresses = self.addresses.lock();
        addresses[number % addresses.len()].clone()
    }

    fn register(&self, number: usize) -> String {
        format!("/v1/kv/{}-register-{number}", self.load.name)
    }
}

/// Clients at work.
pub struct Running {
    shared: Arc<Shared>,
    clients: JoinSet<Notes>,
}

impl Running {
    /// How long after now the first write that is begun from now on is acknowledged.
    pub async fn next_write(&self, limit: Duration) -> Duration {
        let from = self.shared.now();
        let found = eventually(limit, async || {
            let writes = self.shared.acknowledged.lock();
            writes
                .iter()
                .rev()
                .take(1000)
                .filter(|(called, _)| *called >= from)
                .map(|(_, returned)| *returned - from)
                .min()
        });
        found
            .await
            .unwrap_or_else(|| panic!("no write was acknowledged for {limit:?}"))
    }

    /// Waits until `count` more writes are acknowledged.
    pub async fn writes(&self, count: usize) {
        let done = || self.shared.acknowledged.lock().len();
        let target = done() + count;
        let limit = Duration::from_secs(60);
        let reached = eventually(limit, async || (done() >= target).then_some(())).await;
        assert!(
            reached.is_some(),
            "only {} of {count} writes were acknowledged in {limit:?}",
            done() + count - target
        );
    }

    /// From now on these nodes are asked.
    pub fn use_nodes(&self, addresses: Vec<String>) {
        assert!(!addresses.is_empty(), "somebody must be asked");
        *self.shared.addresses.lock() = addresses;
    }

    /// What the cluster has promised to keep until now.
    pub fn acknowledged_ledger(&self) -> Ledger {
        Ledger(self.shared.ledger.lock().clone())
    }

    /// Stops the clients, each after the answer that it waits for.
    pub async fn stop(mut self) -> History {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut notes = Notes::default();
        while let Some(client) = self.clients.join_next().await {
            let client = client.unwrap_or_else(|error| panic!("a client of the load: {error}"));
            notes.registers.extend(client.registers);
            notes.ledger.extend(client.ledger);
            for (kind, count) in client.failures {
                *notes.failures.entry(kind).or_default() += count;
            }
            notes.absurd.extend(client.absurd);
            notes.errors.extend(client.errors);
            notes.slowest = notes.slowest.max(client.slowest);
        }
        History {
            shared: self.shared,
            notes,
        }
    }
}

/// What became of a key of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Acknowledged,
    Rejected,
    Unknown,
}

#[derive(Default)]
struct Notes {
    /// By the number of the register.
    registers: Vec<(usize, Operation)>,
    ledger: Vec<(String, Value, Fate)>,
    /// Why there was no answer, or a rejection, and how often.
    failures: BTreeMap<String, usize>,
    /// Answers that no correct server gives.
    absurd: Vec<String>,
    /// What a user was told instead of an answer, after all retries.
    errors: Vec<String>,
    /// From the first call to the last return of one operation.
    slowest: Duration,
}

/// What the clients asked, and what they were told.
pub struct History {
    shared: Arc<Shared>,
    notes: Notes,
}

impl History {
    /// Panics if a client was given no answer by its deadline. What had to be asked more than once
    /// is printed.
    pub fn assert_no_errors(&self) {
        let Notes {
            failures,
            errors,
            slowest,
            ..
        } = &self.notes;
        let name = self.shared.load.name;
        say(&format!(
            "{name}: slowest operation {slowest:?}; asked again: {failures:#?}"
        ));
        assert!(
            errors.is_empty(),
            "{name}, seed {}: clients saw {} errors: {:#?}",
            seed(),
            errors.len(),
            &errors[..errors.len().min(20)]
        );
    }

    /// Panics unless the whole cluster, healed, tells a story that explains every answer.
    pub async fn judge(self, cluster: &Cluster) {
        self.judge_at(&cluster.addresses()).await;
    }

    /// As [`History::judge`], of a cluster of which only these addresses answer: reads every
    /// register at each of them once more, looks for every key of the ledger, and checks that each
    /// register was linearizable.
    pub async fn judge_at(mut self, addresses: &[String]) {
        self.read_registers(addresses).await;
        let missing = self.ledger_faults(addresses).await;
        let Notes {
            registers,
            ledger,
            failures,
            absurd,
            ..
        } = &self.notes;
        let unknown = registers
            .iter()
            .filter(|(_, operation)| operation.outcome == Outcome::Unknown)
            .count();
        let name = self.shared.load.name;
        let (operations, keys) = (registers.len(), ledger.len());
        say(&format!(
            "{name}: {operations} register operations ({unknown} unknown), {keys} ledger keys"
        ));
        for (kind, count) in failures {
            println!("{count} times: {kind}");
        }
        let seed = seed();
        assert!(
            absurd.is_empty(),
            "{name}, seed {seed}: answers that make no sense: {:#?}",
            &absurd[..absurd.len().min(20)]
        );
        assert!(
            missing.is_empty(),
            "{name}, seed {seed}: the ledger is wrong: {:#?}",
            &missing[..missing.len().min(20)]
        );
        for register in 0..self.shared.load.registers {
            let of = |(number, operation): &(usize, Operation)| {
                (*number == register).then_some(*operation)
            };
            let operations: Vec<Operation> = registers.iter().filter_map(of).collect();
            if let Err(violation) = check(&operations) {
                panic!("{name}, seed {seed}: register {register} is not linearizable: {violation}");
            }
        }
    }

    /// The keys of the ledger that were acknowledged.
    pub fn acknowledged_ledger(&self) -> Ledger {
        Ledger(self.shared.ledger.lock().clone())
    }

    async fn read_registers(&mut self, addresses: &[String]) {
        let mut reader = Worker::new(self.shared.load.clients, Arc::clone(&self.shared));
        for register in 0..self.shared.load.registers {
            for address in addresses {
                let told = eventually(Duration::from_secs(30), async || {
                    let called = self.shared.now();
                    let request = Request::get(self.shared.register(register));
                    let answer = self.shared.http.ask(address, &request).await;
                    let told = understand(Action::Get, answer);
                    let Told::Outcome(outcome) = told else {
                        return None;
                    };
                    let returned = self.shared.now();
                    Some(Operation {
                        client: reader.id,
                        called,
                        returned,
                        action: Action::Get,
                        outcome,
                    })
                });
                let operation = told
                    .await
                    .unwrap_or_else(|| panic!("register {register} can't be read at {address}"));
                reader.notes.registers.push((register, operation));
            }
        }
        self.notes.registers.append(&mut reader.notes.registers);
    }

    async fn ledger_faults(&self, addresses: &[String]) -> Vec<String> {
        let checks = self
            .notes
            .ledger
            .iter()
            .enumerate()
            .map(|(position, (path, value, fate))| {
                let address = &addresses[position % addresses.len()];
                self.ledger_fault(address, path, *value, *fate)
            });
        stream::iter(checks)
            .buffer_unordered(16)
            .filter_map(async |fault| fault)
            .collect()
            .await
    }

    async fn ledger_fault(
        &self,
        address: &str,
        path: &str,
        value: Value,
        fate: Fate,
    ) -> Option<String> {
        let read = eventually(Duration::from_secs(30), async || {
            match self.shared.http.ask(address, &Request::get(path)).await {
                Ok(answer) if answer.status == 404 => Some(None),
                Ok(answer) if answer.status == 200 => Some(Some(answer.body)),
                _ => None,
            }
        });
        let stored = read
            .await
            .unwrap_or_else(|| panic!("{path} can't be read at {address}"));
        match (stored, fate) {
            (Some(stored), Fate::Acknowledged | Fate::Unknown) if stored == encode(value) => None,
            (None, Fate::Rejected | Fate::Unknown) => None,
            (None, Fate::Acknowledged) => Some(format!("{path} was acknowledged and is lost")),
            (Some(_), Fate::Rejected) => Some(format!("{path} was rejected and is there")),
            (Some(stored), _) => Some(format!(
                "{path} holds {:?}",
                String::from_utf8_lossy(&stored)
            )),
        }
    }
}

/// Keys that were acknowledged, with their values.
pub struct Ledger(Vec<(String, Value)>);

impl Ledger {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The keys that the replicas of one node, by themselves, don't hold. The node has a replica of
    /// every shard.
    pub async fn lost(&self, cluster: &Cluster, node: usize) -> Vec<String> {
        let address = &cluster.nodes[node].address;
        let checks = self.0.iter().map(async |(path, value)| {
            let request = Request::get(format!("{path}?consistency=stale"));
            let mut last = String::new();
            let found = eventually(Duration::from_secs(30), async || {
                let answer = cluster.client.ask_only(address, &request).await;
                last = format!("{answer:?}").chars().take(300).collect();
                let answer = answer.ok()?;
                (answer.status == 200 && answer.body == encode(*value)).then_some(())
            });
            found.await.is_none().then(|| format!("{path}: {last}"))
        });
        stream::iter(checks)
            .buffer_unordered(16)
            .filter_map(async |lost| lost)
            .collect()
            .await
    }
}

/// The bytes of a value: its number, and padding of a length that follows from it, so that any
/// mixture is seen.
pub fn encode(value: Value) -> Vec<u8> {
    let padding = match value.0 % 50 {
        0 => 20_000,
        n => n * 7,
    };
    let mut bytes = format!("{}:", value.0).into_bytes();
    bytes.resize(bytes.len() + usize::try_from(padding).expect("small"), b'x');
    bytes
}

fn decode(bytes: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(bytes).ok()?;
    let value = Value(text.split_once(':')?.0.parse().ok()?);
    (encode(value) == bytes).then_some(value)
}

/// What an answer, or its absence, says of an operation.
enum Told {
    Outcome(Outcome),
    /// Certainly nothing happened.
    Rejected(String),
    Unknown(String),
    Absurd(String),
}

fn understand(action: Action, answer: Result<Answer, Failure>) -> Told {
    let answer = match answer {
        Ok(answer) => answer,
        Err(Failure::NotSent(reason)) => return Told::Rejected(format!("not sent: {reason}")),
        Err(Failure::Lost(reason)) => return Told::Unknown(format!("lost: {reason}")),
    };
    let text = || {
        format!(
            "{} {:?}",
            answer.status,
            answer.text().chars().take(300).collect::<String>()
        )
    };
    let absurd = || Told::Absurd(format!("{action:?}: {}", text()));
    let revision = answer.revision();
    match (action, answer.status, revision) {
        (Action::Get, 200, Some(revision)) => match decode(&answer.body) {
            Some(value) => Told::Outcome(Outcome::Got(Some((value, revision)))),
            None => absurd(),
        },
        (Action::Get, 404, _) => Told::Outcome(Outcome::Got(None)),
        (Action::Put { .. }, 200 | 201, Some(revision)) => Told::Outcome(Outcome::Put {
            created: answer.status == 201,
            revision,
        }),
        (Action::Delete { .. }, 200 | 204, _) => Told::Outcome(Outcome::Deleted { existed: true }),
        (Action::Delete { .. }, 404, _) => Told::Outcome(Outcome::Deleted { existed: false }),
        (
            Action::Put {
                condition: Condition::Absent | Condition::Holds(_),
                ..
            }
            | Action::Delete {
                condition: Condition::Absent | Condition::Holds(_),
            },
            412,
            _,
        ) => Told::Outcome(Outcome::ConditionFailed),
        (_, 429 | 503, _) => Told::Rejected(text()),
        (_, 500..=599, _) => Told::Unknown(text()),
        _ => absurd(),
    }
}

/// One client.
struct Worker {
    id: usize,
    shared: Arc<Shared>,
    random: StdRng,
    /// The node that is asked; another after a failure.
    node: usize,
    count: u64,
    /// By register: a value that was seen there, and its revision.
    seen: HashMap<usize, (Value, u64)>,
    notes: Notes,
}

impl Worker {
    fn new(id: usize, shared: Arc<Shared>) -> Self {
        let mut random = StdRng::seed_from_u64(seed().wrapping_add(id as u64));
        let node = random.random_range(0..NODES_MAX);
        Self {
            id,
            shared,
            random,
            node,
            count: 0,
            seen: HashMap::new(),
            notes: Notes::default(),
        }
    }

    async fn run(mut self) -> Notes {
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.random.random_range(0..5) == 0 {
                self.write_ledger().await;
            } else {
                self.use_register().await;
            }
        }
        self.notes
    }

    fn next_value(&mut self) -> Value {
        self.count += 1;
        Value(((self.id as u64) << 32) | self.count)
    }

    async fn write_ledger(&mut self) {
        let value = self.next_value();
        let path = format!("/v1/kv/{}-ledger-{}", self.shared.load.name, value.0);
        let action = Action::Put {
            value,
            condition: Condition::None,
        };
        let (_, told) = self.perform(&path, action, None).await;
        let fate = match told {
            Told::Outcome(_) => {
                self.shared.ledger.lock().push((path.clone(), value));
                Fate::Acknowledged
            }
            Told::Rejected(_) => Fate::Rejected,
            Told::Unknown(_) => Fate::Unknown,
            Told::Absurd(what) => return self.notes.absurd.push(what),
        };
        self.notes.ledger.push((path, value, fate));
    }

    async fn use_register(&mut self) {
        let register = self.random.random_range(0..self.shared.load.registers);
        let (action, revision) = self.choose(register);
        let path = self.shared.register(register);
        let ((called, returned), told) = self.perform(&path, action, revision).await;
        let outcome = match told {
            Told::Outcome(outcome) => outcome,
            Told::Rejected(_) => return,
            Told::Unknown(_) => Outcome::Unknown,
            Told::Absurd(what) => return self.notes.absurd.push(what),
        };
        match (action, outcome) {
            (_, Outcome::Got(Some(seen))) => _ = self.seen.insert(register, seen),
            (Action::Put { value, .. }, Outcome::Put { revision, .. }) => {
                _ = self.seen.insert(register, (value, revision))
            }
            _ => {}
        }
        self.notes.registers.push((
            register,
            Operation {
                client: self.id,
                called,
                returned,
                action,
                outcome,
            },
        ));
    }

    /// What to do next, and the revision that goes with its condition.
    fn choose(&mut self, register: usize) -> (Action, Option<u64>) {
        let kind = self.random.random_range(0..20);
        if kind < 9 {
            return (Action::Get, None);
        }
        let (condition, revision) = match (self.random.random_range(0..5), self.seen.get(&register))
        {
            (0, _) => (Condition::Absent, None),
            (1 | 2, Some((value, revision))) => (Condition::Holds(*value), Some(*revision)),
            _ => (Condition::None, None),
        };
        match kind {
            // Nobody asks for the deletion of what must be absent.
            19 if condition != Condition::Absent => (Action::Delete { condition }, revision),
            _ => (
                Action::Put {
                    value: self.next_value(),
                    condition,
                },
                revision,
            ),
        }
    }

    /// Asks until there is an answer or no more to be had; one operation, from the first call to
    /// the last return.
    async fn perform(
        &mut self,
        path: &str,
        action: Action,
        revision: Option<u64>,
    ) -> ((Duration, Duration), Told) {
        let writes = action != Action::Get;
        let idempotency_key = (writes && self.random.random_range(0..3) == 0)
            .then(|| self.next_value().0.to_string());
        let request = self.request(path, action, revision, idempotency_key.as_deref());
        let called = self.shared.now();
        let mut told = self.ask(&request, action).await;
        while matches!(told, Told::Rejected(_))
            && self.shared.now() - called < self.shared.load.retry_for
        {
            told = self.ask(&request, action).await;
        }
        if idempotency_key.is_some() && matches!(told, Told::Unknown(_)) {
            for _ in 0..RETRIES_MAX {
                match self.ask(&request, action).await {
                    // What came of the first attempt is as unknown as before.
                    Told::Rejected(_) | Told::Unknown(_) => {}
                    definite => {
                        told = definite;
                        break;
                    }
                }
            }
        }
        let returned = self.shared.now();
        self.notes.slowest = self.notes.slowest.max(returned - called);
        if let Told::Rejected(reason) | Told::Unknown(reason) = &told {
            self.notes.errors.push(format!(
                "[{:.3} .. {:.3}] {path}: {reason}",
                called.as_secs_f64(),
                returned.as_secs_f64()
            ));
        }
        if writes && matches!(told, Told::Outcome(_)) {
            self.shared.acknowledged.lock().push((called, returned));
        }
        ((called, returned), told)
    }

    fn request(
        &mut self,
        path: &str,
        action: Action,
        revision: Option<u64>,
        idempotency_key: Option<&str>,
    ) -> Request {
        let query = *["", "", "", "?proxy=true"]
            .choose(&mut self.random)
            .expect("some");
        let path = format!("{path}{query}");
        let (mut request, condition) = match action {
            Action::Get => (Request::get(path), Condition::None),
            Action::Put { value, condition } => (Request::put(path, encode(value)), condition),
            Action::Delete { condition } => (Request::new(Method::DELETE, path), condition),
        };
        request = match (condition, revision) {
            (Condition::None, _) => request,
            (Condition::Absent, _) => request.header("if-none-match", "*"),
            (Condition::Present, _) => request.header("if-match", "*"),
            (Condition::Holds(_), revision) => request.header(
                "if-match",
                format!("\"{}\"", revision.expect("chosen with it")),
            ),
        };
        if let Some(key) = idempotency_key {
            // A name of our own: the loads of one cluster must not meet in the server's memory.
            request = request.header(
                "idempotency-key",
                format!("\"{}-{key}\"", self.shared.load.name),
            );
        }
        request.timeout(self.shared.load.answer_limit)
    }

    async fn ask(&mut self, request: &Request, action: Action) -> Told {
        let told = understand(
            action,
            self.shared
                .http
                .ask(&self.shared.address(self.node), request)
                .await,
        );
        if let Told::Rejected(reason) | Told::Unknown(reason) = &told {
            // Without the numbers, so that reasons of one kind are counted together.
            let kind: String = reason.chars().filter(|c| !c.is_ascii_digit()).collect();
            *self.notes.failures.entry(kind).or_default() += 1;
            self.node = self.random.random_range(0..NODES_MAX);
            tokio::time::sleep(PAUSE).await;
        } else if self.random.random_range(0..20) == 0 {
            self.node = self.random.random_range(0..NODES_MAX);
        }
        told
    }
}
