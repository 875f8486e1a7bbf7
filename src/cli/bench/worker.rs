//! One worker: its connections, its random numbers, its counts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use percent_encoding::percent_encode;
use tokio::time::{Instant, sleep, timeout_at};

use super::options::{BenchPlan, LoadTarget, Workload};
use super::rng::{KeyChooser, Rng};
use super::route_table::{RouteTable, SlotRoutes};
use super::schedule::RequestSchedule;
use super::tally::{BenchProgress, RequestError, Tally};
use super::template::Template;
use crate::api::shard_map::ShardMap;
use crate::cli::CliError;
use crate::client::native::{KEY_ESCAPES, NativeClient, location};
use crate::client::wire::Connection;
use crate::sm::slots::slot_of;
use crate::types::Address;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Redirects followed in a row, without a pause.
const REDIRECTS_MAX: u32 = 3;
/// After a request that could not be sent, so that a dead server does not make a busy loop of
/// errors.
const ERROR_PAUSE: Duration = Duration::from_millis(10);
/// Values are cut from this many bytes more than one needs, so that they differ.
const VALUE_SPREAD_BYTES: usize = 64 << 10;

/// Shared by all workers.
pub struct BenchContext {
    pub plan: BenchPlan,
    chooser: KeyChooser,
    values: Bytes,
    /// Used by the native dialect alone.
    route_table: Option<RouteTable>,
}

impl BenchContext {
    /// Makes the values, and asks for the shard map where the load is of the native dialect.
    ///
    /// # Errors
    ///
    /// Fails if no server tells the shard map.
    pub async fn prepare(plan: BenchPlan) -> Result<Self, CliError> {
        let route_table = match plan.target {
            LoadTarget::Template(_) => None,
            LoadTarget::Native(_) => {
                let mut client = NativeClient::new(plan.servers.clone(), plan.timeout);
                let map = ShardMap::from_status(&client.cluster().await?);
                Some(RouteTable::new(SlotRoutes::of(&map), client))
            }
        };

        // Values come from the seed, so that two runs with one seed send the same.
        let mut rng = Rng::new(plan.seed);
        let letters = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_";
        let values: Vec<u8> = (0..plan.value_size + VALUE_SPREAD_BYTES)
            .map(|_| letters[rng.below(64) as usize])
            .collect();
        Ok(Self {
            chooser: KeyChooser::new(plan.distribution, plan.keys),
            values: values.into(),
            route_table,
            plan,
        })
    }

    fn key(&self, number: u64) -> String {
        format!("{}{number:09}", self.plan.key_prefix)
    }

    fn value(&self, rng: &mut Rng) -> Bytes {
        let start = rng.below(VALUE_SPREAD_BYTES as u64) as usize;
        self.values.slice(start..start + self.plan.value_size)
    }
}

/// A request of the native dialect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RequestKind {
    Put,
    Get,
    StaleGet,
}

pub struct Worker {
    number: usize,
    context: Arc<BenchContext>,
    progress: Arc<BenchProgress>,
    rng: Rng,
    tally: Tally,
    connections: BTreeMap<Address, PooledConnection>,
    /// The routes as of a generation of the atlas.
    routes: Option<(u64, Arc<SlotRoutes>)>,
}

/// A connection, and the header that goes with it.
struct PooledConnection {
    connection: Connection,
    host: HeaderValue,
}

/// An answered request.
enum RequestOutcome {
    Done,
    Missing,
}

impl Worker {
    pub fn new(number: u32, context: Arc<BenchContext>, progress: Arc<BenchProgress>) -> Self {
        // Far apart in the sequence, whatever the seed.
        let mut rng = Rng::new(
            context.plan.seed ^ (u64::from(number) + 1).wrapping_mul(0xD134_2543_DE82_EF95),
        );
        rng.next_u64();
        Self {
            number: number as usize,
            context,
            progress,
            rng,
            tally: Tally::new(),
            connections: BTreeMap::new(),
            routes: None,
        }
    }

    /// Sends requests as they are due; counts those due from `measured_from` on.
    pub async fn run(mut self, schedule: Arc<RequestSchedule>, measured_from: Instant) -> Tally {
        while let Some(due) = schedule.next().await {
            // A request counts by when it was due. What the warm-up adds is taken back.
            let redirects = self.tally.redirects;
            let number = self.context.chooser.choose(&mut self.rng);
            let ended = self.request(number).await;
            let measured = due >= measured_from;
            if !measured {
                self.tally.redirects = redirects;
            }
            match ended {
                Ok(outcome) => {
                    self.progress.done.fetch_add(1, Ordering::Relaxed);
                    if measured {
                        self.tally.done(due.elapsed());
                        self.tally.missing += u64::from(matches!(outcome, RequestOutcome::Missing));
                    }
                }
                Err(error) => {
                    self.progress.errors.fetch_add(1, Ordering::Relaxed);
                    if measured {
                        self.tally.error(error);
                    }
                    self.recover(error).await;
                }
            }
        }
        self.tally
    }

    /// Writes the keys of this worker, one of `workers`, each until it is written.
    pub async fn preload(mut self, workers: u32) -> Result<(), String> {
        let deadline = Duration::from_secs(30);
        for number in (self.number as u64..self.context.plan.keys).step_by(workers as usize) {
            let start = Instant::now();

            // A key that is missing would turn gets into misses, which are cheaper than what is to
            // be measured.
            while let Err(error) = self.native(number, RequestKind::Put).await {
                if start.elapsed() > deadline {
                    return Err(error.name());
                }
                self.recover(error).await;
            }
            self.progress.done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn request(&mut self, number: u64) -> Result<RequestOutcome, RequestError> {
        let context = Arc::clone(&self.context);
        match &context.plan.target {
            LoadTarget::Template(template) => self.templated(template, number).await,
            LoadTarget::Native(Workload::Put) => self.native(number, RequestKind::Put).await,
            LoadTarget::Native(Workload::Get) => self.native(number, RequestKind::Get).await,
            LoadTarget::Native(Workload::StaleGet) => {
                self.native(number, RequestKind::StaleGet).await
            }
            LoadTarget::Native(Workload::Mixed(reads)) => {
                let kind = if self.rng.below(100) < u64::from(*reads) {
                    RequestKind::Get
                } else {
                    RequestKind::Put
                };
                self.native(number, kind).await
            }
        }
    }

    /// Refreshes the routes and pauses: the map may be wrong, and errors must not come faster than
    /// answers.
    async fn recover(&mut self, error: RequestError) {
        self.refresh().await;
        match error {
            RequestError::Timeout => {}
            RequestError::Connect
            | RequestError::Broken
            | RequestError::Redirects
            | RequestError::Status(_)
            | RequestError::Unsent => sleep(ERROR_PAUSE).await,
        }
    }

    async fn templated(
        &mut self,
        template: &Template,
        number: u64,
    ) -> Result<RequestOutcome, RequestError> {
        let deadline = Instant::now() + self.context.plan.timeout;
        let (key, value) = (self.context.key(number), self.context.value(&mut self.rng));
        let address = template.server(self.number).clone();
        let request = template
            .request(self.number, key.as_bytes(), &value)
            .map_err(|_| RequestError::Status(0))?;
        let status = self
            .exchange(&address, deadline, |_| request)
            .await?
            .status();
        if status.is_success() {
            Ok(RequestOutcome::Done)
        } else {
            Err(RequestError::Status(status.as_u16()))
        }
    }

    async fn native(
        &mut self,
        number: u64,
        kind: RequestKind,
    ) -> Result<RequestOutcome, RequestError> {
        let deadline = Instant::now() + self.context.plan.timeout;
        let key = self.context.key(number);
        let mut address = self
            .route(key.as_bytes(), kind)
            .ok_or(RequestError::Connect)?;
        let query = if kind == RequestKind::StaleGet {
            "?consistency=stale"
        } else {
            ""
        };
        let uri = Bytes::from(format!(
            "/v1/kv/{}{query}",
            percent_encode(key.as_bytes(), KEY_ESCAPES)
        ));
        let uri = Uri::from_maybe_shared(uri).map_err(|_| RequestError::Status(0))?;
        let value = if kind == RequestKind::Put {
            self.context.value(&mut self.rng)
        } else {
            Bytes::new()
        };
        let mut hops = 0;
        loop {
            // A request not sent, or redirected, is certainly not done: a client goes on, and its
            // wait shows as latency.
            let error = match self
                .exchange(&address, deadline, |host| {
                    native_request(&uri, kind, &value, host)
                })
                .await
            {
                Err(RequestError::Connect) => RequestError::Connect,
                Err(error) => return Err(error),
                Ok(response) => match response.status() {
                    StatusCode::TEMPORARY_REDIRECT => {
                        self.tally.redirects += 1;
                        hops += 1;
                        address = location(response.headers()).ok_or(RequestError::Redirects)?;
                        self.refresh().await;
                        RequestError::Redirects
                    }
                    StatusCode::NOT_FOUND if kind != RequestKind::Put => {
                        return Ok(RequestOutcome::Missing);
                    }
                    status if status.is_success() => return Ok(RequestOutcome::Done),
                    status => return Err(RequestError::Status(status.as_u16())),
                },
            };
            // The map may name a node that is gone.
            if error == RequestError::Connect {
                self.refresh().await;
                address = self
                    .route_past(key.as_bytes(), &address)
                    .ok_or(RequestError::Connect)?;
            }
            if error == RequestError::Connect || hops > REDIRECTS_MAX {
                hops = 0;
                sleep(ERROR_PAUSE).await;
            }
            if Instant::now() >= deadline {
                return Err(error);
            }
        }
    }

    async fn refresh(&self) {
        if let (Some(route_table), Some((generation, _))) =
            (&self.context.route_table, &self.routes)
        {
            route_table.refresh(*generation).await;
        }
    }

    /// Returns another node of the key's shard than one that can't be reached.
    fn route_past(&mut self, key: &[u8], unreachable: &Address) -> Option<Address> {
        let nodes = self.routes()?.nodes(slot_of(key));
        let at = nodes
            .iter()
            .position(|node| node == unreachable)
            .map_or(0, |at| at + 1);
        nodes.get(at % nodes.len().max(1)).cloned()
    }

    /// Returns the leader of the key's shard; for stale reads any of its nodes, another for each
    /// worker.
    fn route(&mut self, key: &[u8], kind: RequestKind) -> Option<Address> {
        let worker = self.number;
        let nodes = self.routes()?.nodes(slot_of(key));
        match kind {
            RequestKind::Put | RequestKind::Get => nodes.first().cloned(),
            RequestKind::StaleGet => nodes.get(worker % nodes.len().max(1)).cloned(),
        }
    }

    /// Returns the newest routes that are known.
    fn routes(&mut self) -> Option<&SlotRoutes> {
        let route_table = self.context.route_table.as_ref()?;

        // A generation is one atomic read. The routes are fetched only when it has changed.
        let generation = route_table.generation();
        if self
            .routes
            .as_ref()
            .is_none_or(|(known, _)| *known != generation)
        {
            self.routes = Some((generation, route_table.routes()));
        }
        self.routes.as_ref().map(|(_, routes)| routes.as_ref())
    }

    /// Sends one request and reads its whole answer. The connection is kept only if it is good for
    /// another.
    async fn exchange(
        &mut self,
        address: &Address,
        deadline: Instant,
        request: impl FnOnce(&HeaderValue) -> Request<Full<Bytes>>,
    ) -> Result<Response<()>, RequestError> {
        // Taken out for the time of the request: after a timeout its answer may still come, so it
        // is dropped.
        let mut link = match self
            .connections
            .remove(address)
            .filter(|link| link.connection.is_open())
        {
            Some(link) => link,
            None => {
                let connection = Connection::open(address, CONNECT_TIMEOUT)
                    .await
                    .map_err(|_| RequestError::Connect)?;
                let host =
                    HeaderValue::from_str(address.as_str()).map_err(|_| RequestError::Connect)?;
                PooledConnection { connection, host }
            }
        };
        let request = request(&link.host);
        let outcome = async { drain(link.connection.send(request).await?).await };
        let response = timeout_at(deadline, outcome)
            .await
            .map_err(|_| RequestError::Timeout)?
            .map_err(|_| RequestError::Broken)?;
        self.connections.insert(address.clone(), link);
        Ok(response)
    }
}

/// Reads a body to its end and forgets it.
async fn drain(response: Response<Incoming>) -> hyper::Result<Response<()>> {
    let (parts, mut body) = response.into_parts();
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(Response::from_parts(parts, ()))
}

fn native_request(
    uri: &Uri,
    kind: RequestKind,
    value: &Bytes,
    host: &HeaderValue,
) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(value.clone()));
    *request.uri_mut() = uri.clone();
    request.headers_mut().insert(HOST, host.clone());
    if kind == RequestKind::Put {
        *request.method_mut() = Method::PUT;
        request.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
    }
    request
}
