//! [`Clients`]: who reads and writes while the world goes wrong, and what they were told.
//!
//! All of them share a runtime whose clock is that of the world, and each has a place of its own on
//! the network; so has a gateway, which some of them ask. What certainly did not happen is not
//! recorded, as `history` asks.
//!
//! - `worker`: what a client does next; `reads`, `writes` and `dialects`: how.
//! - `http`: requests such as curl sends.
//! - `book`: what all of them were told, and whether it can be true.

mod book;
mod dialects;
mod http;
mod reads;
mod worker;
mod writes;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use quorate::api::store::{Consistency, Failure, Options, Routing, Store};
use quorate::api::view_change::ViewChange;
use quorate::cli::gateway;
use quorate::client::remote::{HttpAccess, RemoteStore};
use quorate::http::{Limits, router};
use quorate::routing::call::ShardCaller;
use quorate::routing::router::Router;
use quorate::types::Address;
use quorate_sim::history::{Action, Outcome};
use tokio::runtime::{Builder, RngSeed, Runtime};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::book::{Answer, Book, Times};
use self::http::HttpClient;
use self::worker::Client;
use super::network::{HostIndex, Network};
use super::random::SimRng;

/// Time that one request is waited for.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Time in which what must succeed at the end is tried.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(90);
const RETRY_PAUSE: Duration = Duration::from_millis(200);
const CALLS_MAX: usize = 64;
/// Keys that the last listing takes at once.
const LAST_PAGE: usize = 1000;

/// Says what clients work on.
#[derive(Debug, Clone)]
pub struct Workload {
    pub keys: Vec<String>,
    /// The numbers of keys that have a slot in common.
    groups: Vec<Vec<usize>>,
}

pub struct Clients {
    runtime: Runtime,
    began: Instant,
    elapsed_ms: u64,
    book: Arc<Mutex<Book>>,
    workload: Workload,
    random: SimRng,
    network: Network,
    nodes: Vec<Address>,
    gateway: Address,
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

impl Workload {
    /// Draws keys: some by themselves, and some that have a slot in common.
    pub fn draw(random: &mut SimRng) -> Self {
        let count = random.between(6, 16) as usize;
        let mut keys: Vec<String> = (0..count).map(|n| format!("key-{n:02}")).collect();
        let mut groups = Vec::new();
        for tag in 0..random.between(1, 4) {
            let members = 0..random.between(2, 5);
            let names = members.map(|member| format!("{{tag-{tag}}}-{member}"));
            let first = keys.len();
            keys.extend(names);
            groups.push((first..keys.len()).collect());
        }
        Self { keys, groups }
    }
}

impl Clients {
    /// Returns the names of the hosts that so many clients have: that of the operator, theirs, and
    /// the gateway's.
    pub fn host_names(count: usize) -> Vec<String> {
        let clients = (1..=count).map(|client| format!("client-{client}:1"));
        std::iter::once("operator:1".to_owned())
            .chain(clients)
            .chain(std::iter::once("gateway:1".to_owned()))
            .collect()
    }

    /// Clients of these nodes, on the hosts from `first_host` on.
    pub fn new(
        network: &Network,
        nodes: &[Address],
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
        let names = Self::host_names(count);
        for host in 0..names.len() {
            network.begin(first_host + host);
        }
        let gateway = names.last().map(|name| name.parse());
        let gateway = gateway.and_then(Result::ok).expect("a good name");
        let operator = Arc::new(store(network, nodes, first_host, random.next()));
        let workload = Workload::draw(&mut random);
        let book = Book::new(workload.keys.clone());
        let clients = Self {
            runtime,
            began,
            elapsed_ms: 0,
            book: Arc::new(Mutex::new(book)),
            workload,
            random,
            network: network.clone(),
            nodes: nodes.to_vec(),
            gateway,
            first_host,
            count,
            operator,
        };
        clients.serve_gateway()
    }

    /// Has a gateway serve, as `quorate gateway` does.
    fn serve_gateway(mut self) -> Self {
        let host = self.first_host + self.count + 1;
        let store = store(&self.network, &self.nodes, host, self.random.next());
        let within = self.runtime.enter();
        let (app, lookout) = gateway::served(Arc::new(store), Vec::new(), Limits::default());
        drop(within);
        let handle = self.runtime.handle().clone();
        self.network.listen(host, handle, router(app));
        self.runtime
            .spawn(async move { lookout.run(&CancellationToken::new()).await });
        self
    }

    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// Has all of them work from now on.
    pub fn begin(&mut self) {
        let mut servers = self.nodes.clone();
        servers.push(self.gateway.clone());
        for client in 1..=self.count {
            let host = self.first_host + client;
            let client = Client {
                id: client,
                store: store(&self.network, &self.nodes, host, self.random.next()),
                http: HttpClient::new(self.network.ways_of(host), TIMEOUT),
                servers: servers.clone(),
                groups: self.workload.groups.clone(),
                book: self.book.clone(),
                began: self.began,
                random: SimRng::new(self.random.next(), "client"),
                counts: 0,
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
                    // Without its table of slots, which is thousands of lines.
                    Ok(status) => format!(
                        "plan {}, nodes {:?}, shards {:?}, moves {:?}, {} slots astray",
                        status.epoch,
                        status.nodes,
                        status.shards,
                        status.moves,
                        status.slots_astray
                    ),
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

    /// Reads every key, each until it is answered, and lists and counts them all; what is read is
    /// recorded.
    pub fn read_all(&self) -> Arc<Mutex<Option<Result<(), String>>>> {
        let (store, book, began) = (self.operator.clone(), self.book.clone(), self.began);
        self.have_done(async move {
            let deadline = Instant::now() + PROGRESS_TIMEOUT;
            let names = book.lock().keys().to_vec();
            let times = |called: Duration| Times {
                client: 0,
                called,
                returned: began.elapsed(),
            };
            let mut present = 0;
            for (key, name) in names.iter().enumerate() {
                let called = began.elapsed();
                let name = Bytes::copy_from_slice(name.as_bytes());
                let read = || -> BoxFuture<'_, _> { Box::pin(reads::get(&store, name.clone())) };
                let found = until(deadline, read).await;
                let found = found.map_err(|error| format!("{name:?} cannot be read: {error}"))?;
                present += u64::from(found.is_some());
                let answer = Answer::Told(Outcome::Got(found));
                book.lock().record(key, times(called), Action::Get, answer);
            }
            let called = began.elapsed();
            let list =
                || -> BoxFuture<'_, _> { Box::pin(reads::page(&store, None, LAST_PAGE, false)) };
            let listed = until(deadline, list).await;
            let listed = listed.map_err(|error| format!("keys cannot be listed: {error}"))?;
            book.lock().record_page(times(called), None, &listed, false);
            match until(deadline, || Box::pin(reads::count(&store))).await {
                Ok(counted) if counted == present => Ok(()),
                Ok(counted) => Err(format!("{present} keys are there, {counted} counted")),
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
