//! [`Clients`]: who reads and writes while the world goes wrong, and what they were told.
//!
//! All of them share a runtime whose clock is that of the world, and each has a place of its own on
//! the network. What certainly did not happen is not recorded, as `history` asks.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use quorate::api::store::{
    Consistency, Failure, Options, Routing, ScanRange, ScanRequest, Store, WriteFailure,
};
use quorate::api::view_change::ViewChange;
use quorate::client::remote::{HttpAccess, RemoteStore};
use quorate::routing::call::ShardCaller;
use quorate::routing::router::Router;
use quorate::sm::kv::{Action, Condition, Media, OperationOutcome, WriteRejection};
use quorate::types::Address;
use quorate_sim::history::{self, Operation, Outcome, Value};
use tokio::runtime::{Builder, RngSeed, Runtime};
use tokio::time::Instant;

use super::network::{HostIndex, Network};
use super::random::SimRng;

/// How long one request is waited for.
const TIMEOUT: Duration = Duration::from_secs(3);
/// How long it is tried to do what must succeed at the end.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(90);
const RETRY_PAUSE: Duration = Duration::from_millis(200);
const CALLS_MAX: usize = 64;

/// What was asked of each key, and answered.
#[derive(Debug, Default)]
pub struct Book {
    pub operations: BTreeMap<String, Vec<Operation>>,
    pub answered: u64,
    pub unanswered: u64,
    pub refused: u64,
    /// Of the last read, for conditions.
    known: BTreeMap<String, (Value, u64)>,
    next_value: u64,
    is_over: bool,
    working: usize,
}

pub struct Clients {
    runtime: Runtime,
    began: Instant,
    elapsed_ms: u64,
    book: Arc<Mutex<Book>>,
    random: SimRng,
    network: Network,
    seeds: Vec<Address>,
    first_host: HostIndex,
    count: usize,
    /// Asks for view changes, and what is awaited of the cluster.
    operator: Arc<RemoteStore>,
}

pub fn options() -> Options {
    Options {
        consistency: Consistency::Linearizable,
        routing: Routing::Proxy,
        timeout: TIMEOUT,
    }
}

impl Clients {
    /// Clients on the hosts from `first_host` on, the first of which is the operator.
    pub fn new(
        network: &Network,
        seeds: &[Address],
        first_host: HostIndex,
        count: usize,
        seed: u64,
    ) -> Self {
        let mut random = SimRng::new(seed, "clients");
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .rng_seed(RngSeed::from_bytes(&random.next().to_le_bytes()))
            .build()
            .expect("a runtime without sockets");
        let began = {
            let _within = runtime.enter();
            Instant::now()
        };
        for host in first_host..=first_host + count {
            network.begin(host);
        }
        let operator = Arc::new(store(network, seeds, first_host, random.next()));
        Self {
            runtime,
            began,
            elapsed_ms: 0,
            book: Arc::default(),
            random,
            network: network.clone(),
            seeds: seeds.to_vec(),
            first_host,
            count,
            operator,
        }
    }

    /// Has all of them work from now on.
    pub fn begin(&mut self, keys: &Arc<Vec<String>>) {
        for client in 1..=self.count {
            let host = self.first_host + client;
            let store = store(&self.network, &self.seeds, host, self.random.next());
            let client = Client {
                id: client,
                store,
                book: self.book.clone(),
                began: self.began,
                random: SimRng::new(self.random.next(), "client"),
                keys: keys.clone(),
            };
            self.book.lock().working += 1;
            self.runtime.spawn(client.run());
        }
    }

    /// Tells all of them to end after the request that they have under way.
    pub fn end(&self) {
        self.book.lock().is_over = true;
    }

    /// Runs them for a millisecond of the world.
    pub fn step(&mut self) {
        self.elapsed_ms += 1;
        let until = self.began + Duration::from_millis(self.elapsed_ms);
        self.runtime
            .block_on(async { tokio::time::sleep_until(until).await });
    }

    pub fn book(&self) -> Arc<Mutex<Book>> {
        self.book.clone()
    }

    /// Has something done among the clients. It is there once it is done.
    fn have_done<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Arc<Mutex<Option<T>>> {
        let place: Arc<Mutex<Option<T>>> = Arc::default();
        let done = place.clone();
        self.runtime.spawn(async move {
            let result = task.await;
            *done.lock() = Some(result);
        });
        place
    }

    /// Waits until everything is as the view says.
    pub fn settle(&self) -> Arc<Mutex<Option<Result<(), String>>>> {
        let store = self.operator.clone();
        self.have_done(async move {
            let deadline = Instant::now() + PROGRESS_TIMEOUT;
            loop {
                let last = match store.status().await {
                    Ok(status) if status.settled => return Ok(()),
                    Ok(status) => format!("{status:?}"),
                    Err(error) => error.to_string(),
                };
                if Instant::now() > deadline {
                    return Err(format!("the cluster does not settle: {last}"));
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        })
    }

    /// Asks for a change of the view. Returns whether it was accepted.
    pub fn change(&self, change: ViewChange) -> Arc<Mutex<Option<bool>>> {
        let store = self.operator.clone();
        self.have_done(async move { store.change_view(change, None, options()).await.is_ok() })
    }

    /// Reads every key, each until it is answered, and lists them all; what is read is recorded.
    pub fn read_all(&self, keys: &Arc<Vec<String>>) -> Arc<Mutex<Option<Result<(), String>>>> {
        let (store, keys, book) = (self.operator.clone(), keys.clone(), self.book.clone());
        let began = self.began;
        self.have_done(async move {
            let deadline = Instant::now() + PROGRESS_TIMEOUT;
            let mut present = Vec::new();
            for key in keys.iter() {
                let read = || -> BoxFuture<'_, _> { Box::pin(get(&store, &book, began, 0, key)) };
                let found = until(deadline, read).await;
                let found = found.map_err(|error| format!("{key} cannot be read: {error}"))?;
                present.extend(found.then(|| key.clone()));
            }
            let listed = until(deadline, || Box::pin(list(&store))).await;
            let listed = listed.map_err(|error| format!("keys cannot be listed: {error}"))?;
            present.sort();
            if listed != present {
                return Err(format!("read are {present:?}, but listed {listed:?}"));
            }
            let counted = until(deadline, || Box::pin(count(&store)));
            match counted.await {
                Ok(counted) if counted == present.len() as u64 => Ok(()),
                Ok(counted) => Err(format!(
                    "{} keys are there, {counted} counted",
                    present.len()
                )),
                Err(error) => Err(format!("keys cannot be counted: {error}")),
            }
        })
    }
}

/// Tries something until it is answered, or there is no more time.
async fn until<'a, T>(
    deadline: Instant,
    mut attempt: impl FnMut() -> BoxFuture<'a, Result<T, Failure>>,
) -> Result<T, String> {
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() > deadline => return Err(error.to_string()),
            Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
        }
    }
}

fn store(network: &Network, seeds: &[Address], host: HostIndex, seed: u64) -> RemoteStore {
    let caller = ShardCaller::over(Arc::new(network.ways_of(host)), CALLS_MAX);
    Router::new(HttpAccess::new(seeds.to_vec(), caller), seed)
}

async fn list(store: &RemoteStore) -> Result<Vec<String>, Failure> {
    let request = ScanRequest {
        range: ScanRange {
            start: Bytes::new(),
            end: None,
        },
        reverse: false,
        limit: 1000,
        keys_only: true,
    };
    let page = store.scan(request, options()).await?;
    let keys = page.items.iter();
    Ok(keys
        .map(|item| String::from_utf8_lossy(&item.key).into_owned())
        .collect())
}

async fn count(store: &RemoteStore) -> Result<u64, Failure> {
    let counts = store.count(options()).await?;
    Ok(counts.iter().map(|(_, count)| *count).sum())
}

/// Reads a key, and records what was read. Returns whether it is there.
async fn get(
    store: &RemoteStore,
    book: &Mutex<Book>,
    began: Instant,
    client: usize,
    key: &str,
) -> Result<bool, Failure> {
    let called = began.elapsed();
    let found = store
        .get(Bytes::copy_from_slice(key.as_bytes()), options())
        .await;
    let mut book = book.lock();
    let record = match found {
        Ok(found) => found.record,
        Err(failure) => {
            book.refused += 1;
            return Err(failure);
        }
    };
    let got = record.map(|record| {
        let text = String::from_utf8_lossy(&record.value).into_owned();
        let value = Value(text.parse().unwrap_or(u64::MAX - 1));
        (value, record.revision.0)
    });
    match got {
        Some(known) => drop(book.known.insert(key.to_owned(), known)),
        None => drop(book.known.remove(key)),
    }
    book.answered += 1;
    book.record(
        key,
        Operation {
            client,
            called,
            returned: began.elapsed(),
            action: history::Action::Get,
            outcome: Outcome::Got(got),
        },
    );
    Ok(got.is_some())
}

impl Book {
    /// Returns whether nobody has a request under way any more.
    pub fn are_over(&self) -> bool {
        self.working == 0
    }

    fn record(&mut self, key: &str, operation: Operation) {
        self.operations
            .entry(key.to_owned())
            .or_default()
            .push(operation);
    }
}

struct Client {
    id: usize,
    store: RemoteStore,
    book: Arc<Mutex<Book>>,
    began: Instant,
    random: SimRng,
    keys: Arc<Vec<String>>,
}

impl Client {
    async fn run(mut self) {
        while !self.book.lock().is_over {
            self.act().await;
            let pause = self.random.between(1, 40);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.book.lock().working -= 1;
    }

    async fn act(&mut self) {
        // Half of all on the few first ones.
        let key = match self.random.percent(50) {
            true => self.keys[self.random.below(3) as usize % self.keys.len()].clone(),
            false => self.random.pick(&self.keys).clone(),
        };
        match self.random.below(100) {
            0..45 => drop(get(&self.store, &self.book, self.began, self.id, &key).await),
            45..85 => self.write(&key, false).await,
            _ => self.write(&key, true).await,
        }
    }

    async fn write(&mut self, key: &str, is_delete: bool) {
        let (condition, asked) = self.condition(key);
        let value = {
            let mut book = self.book.lock();
            book.next_value += 1;
            Value(book.next_value)
        };
        let (action, recorded) = match is_delete {
            true => (Action::Delete, history::Action::Delete { condition }),
            false => (
                Action::Put {
                    media: Media::Text,
                    value: value.0.to_string().into(),
                },
                history::Action::Put { value, condition },
            ),
        };
        let operation = quorate::sm::kv::Operation {
            key: Bytes::copy_from_slice(key.as_bytes()),
            condition: asked,
            action,
        };
        let idempotency = self
            .random
            .percent(30)
            .then(|| Bytes::from(format!("{}-{}", self.id, value.0)));
        let called = self.began.elapsed();
        let written = self
            .store
            .write(vec![operation], idempotency, options())
            .await;
        let outcome = match written.into_iter().next() {
            Some(Ok(OperationOutcome::Put { revision, created })) => Outcome::Put {
                created,
                revision: revision.0,
            },
            Some(Ok(OperationOutcome::Deleted { revision })) => Outcome::Deleted {
                existed: revision.is_some(),
            },
            Some(Err(WriteFailure::Rejected(WriteRejection::ConditionFailed { .. }))) => {
                Outcome::ConditionFailed
            }
            Some(Ok(OperationOutcome::Got(_)))
            | Some(Err(WriteFailure::Failed(Failure::Unknown { .. })))
            | None => Outcome::Unknown,
            // It certainly did not happen.
            Some(Err(WriteFailure::Rejected(_) | WriteFailure::Failed(_))) => {
                self.book.lock().refused += 1;
                return;
            }
        };
        let mut book = self.book.lock();
        match outcome {
            Outcome::Unknown => book.unanswered += 1,
            _ => book.answered += 1,
        }
        book.record(
            key,
            Operation {
                client: self.id,
                called,
                returned: self.began.elapsed(),
                action: recorded,
                outcome,
            },
        );
    }

    fn condition(&mut self, key: &str) -> (history::Condition, Condition) {
        let known = self.book.lock().known.get(key).copied();
        match (self.random.below(10), known) {
            (0, _) => (history::Condition::Absent, Condition::Absent),
            (1 | 2, Some((value, revision))) => {
                let revision = quorate::types::Revision(revision);
                (
                    history::Condition::Holds(value),
                    Condition::RevisionIn(vec![revision]),
                )
            }
            _ => (history::Condition::None, Condition::None),
        }
    }
}
