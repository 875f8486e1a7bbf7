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

use super::dice::{Chooser, Dice};
use super::options::{Kind, Plan, Workload};
use super::pace::Pace;
use super::routes::{Atlas, Routes};
use super::tally::{Progress, Tally, Trouble};
use super::template::Template;
use crate::cli::CliError;
use crate::client::native::{KEY_ESCAPES, NativeClient, location};
use crate::client::shard_map::ShardMap;
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

/// What all workers have in common.
pub struct Shared {
    pub plan: Plan,
    chooser: Chooser,
    values: Bytes,
    /// Of the native dialect.
    atlas: Option<Atlas>,
}

impl Shared {
    /// # Errors
    ///
    /// When no server tells the shard map.
    pub async fn prepare(plan: Plan) -> Result<Self, CliError> {
        let atlas = match plan.kind {
            Kind::Template(_) => None,
            Kind::Native(_) => {
                let mut client = NativeClient::new(plan.servers.clone(), plan.timeout);
                let map = ShardMap::from_status(&client.cluster().await?);
                Some(Atlas::new(Routes::of(&map), client))
            }
        };
        let mut dice = Dice::new(plan.seed);
        let letters = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_";
        let values: Vec<u8> = (0..plan.value_size + VALUE_SPREAD_BYTES)
            .map(|_| letters[dice.below(64) as usize])
            .collect();
        Ok(Self {
            chooser: Chooser::new(plan.distribution, plan.keys),
            values: values.into(),
            atlas,
            plan,
        })
    }

    fn key(&self, number: u64) -> String {
        format!("{}{number:09}", self.plan.key_prefix)
    }

    fn value(&self, dice: &mut Dice) -> Bytes {
        let start = dice.below(VALUE_SPREAD_BYTES as u64) as usize;
        self.values.slice(start..start + self.plan.value_size)
    }
}

/// What one request asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Put,
    Get,
    StaleGet,
}

pub struct Worker {
    number: usize,
    shared: Arc<Shared>,
    progress: Arc<Progress>,
    dice: Dice,
    tally: Tally,
    connections: BTreeMap<Address, Link>,
    /// The routes as of a generation of the atlas.
    routes: Option<(u64, Arc<Routes>)>,
}

/// A connection, and the header that goes with it.
struct Link {
    connection: Connection,
    host: HeaderValue,
}

/// How a request ended that was answered.
enum Answered {
    Done,
    Missing,
}

impl Worker {
    pub fn new(number: u32, shared: Arc<Shared>, progress: Arc<Progress>) -> Self {
        // Far apart in the sequence, whatever the seed.
        let mut dice = Dice::new(
            shared.plan.seed ^ (u64::from(number) + 1).wrapping_mul(0xD134_2543_DE82_EF95),
        );
        dice.roll();
        Self {
            number: number as usize,
            shared,
            progress,
            dice,
            tally: Tally::new(),
            connections: BTreeMap::new(),
            routes: None,
        }
    }

    /// Sends requests as they are due; counts those due from `measured_from` on.
    pub async fn run(mut self, pace: Arc<Pace>, measured_from: Instant) -> Tally {
        while let Some(due) = pace.next().await {
            let redirects = self.tally.redirects;
            let number = self.shared.chooser.choose(&mut self.dice);
            let ended = self.request(number).await;
            let measured = due >= measured_from;
            if !measured {
                self.tally.redirects = redirects;
            }
            match ended {
                Ok(answered) => {
                    self.progress.done.fetch_add(1, Ordering::Relaxed);
                    if measured {
                        self.tally.done(due.elapsed());
                        self.tally.missing += u64::from(matches!(answered, Answered::Missing));
                    }
                }
                Err(trouble) => {
                    self.progress.errors.fetch_add(1, Ordering::Relaxed);
                    if measured {
                        self.tally.error(trouble);
                    }
                    self.recover(trouble).await;
                }
            }
        }
        self.tally
    }

    /// Writes the keys of this worker, one of `workers`, each until it is written.
    pub async fn preload(mut self, workers: u32) -> Result<(), String> {
        let deadline = Duration::from_secs(30);
        for number in (self.number as u64..self.shared.plan.keys).step_by(workers as usize) {
            let start = Instant::now();
            while let Err(trouble) = self.native(number, Ask::Put).await {
                if start.elapsed() > deadline {
                    return Err(trouble.name());
                }
                self.recover(trouble).await;
            }
            self.progress.done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn request(&mut self, number: u64) -> Result<Answered, Trouble> {
        let shared = Arc::clone(&self.shared);
        match &shared.plan.kind {
            Kind::Template(template) => self.templated(template, number).await,
            Kind::Native(Workload::Put) => self.native(number, Ask::Put).await,
            Kind::Native(Workload::Get) => self.native(number, Ask::Get).await,
            Kind::Native(Workload::StaleGet) => self.native(number, Ask::StaleGet).await,
            Kind::Native(Workload::Mixed(reads)) => {
                let ask = if self.dice.below(100) < u64::from(*reads) {
                    Ask::Get
                } else {
                    Ask::Put
                };
                self.native(number, ask).await
            }
        }
    }

    /// What is wrong may be the map; and errors must not come faster than answers.
    async fn recover(&mut self, trouble: Trouble) {
        self.refresh().await;
        match trouble {
            Trouble::Timeout => {}
            Trouble::Connect
            | Trouble::Broken
            | Trouble::Redirects
            | Trouble::Status(_)
            | Trouble::Unsent => sleep(ERROR_PAUSE).await,
        }
    }

    async fn templated(&mut self, template: &Template, number: u64) -> Result<Answered, Trouble> {
        let deadline = Instant::now() + self.shared.plan.timeout;
        let (key, value) = (self.shared.key(number), self.shared.value(&mut self.dice));
        let address = template.server(self.number).clone();
        let request = template
            .request(self.number, key.as_bytes(), &value)
            .map_err(|_| Trouble::Status(0))?;
        let status = self
            .exchange(&address, deadline, |_| request)
            .await?
            .status();
        if status.is_success() {
            Ok(Answered::Done)
        } else {
            Err(Trouble::Status(status.as_u16()))
        }
    }

    async fn native(&mut self, number: u64, ask: Ask) -> Result<Answered, Trouble> {
        let deadline = Instant::now() + self.shared.plan.timeout;
        let key = self.shared.key(number);
        let mut address = self.route(key.as_bytes(), ask).ok_or(Trouble::Connect)?;
        let query = if ask == Ask::StaleGet {
            "?consistency=stale"
        } else {
            ""
        };
        let uri = Bytes::from(format!(
            "/v1/kv/{}{query}",
            percent_encode(key.as_bytes(), KEY_ESCAPES)
        ));
        let uri = Uri::from_maybe_shared(uri).map_err(|_| Trouble::Status(0))?;
        let value = if ask == Ask::Put {
            self.shared.value(&mut self.dice)
        } else {
            Bytes::new()
        };
        let mut hops = 0;
        loop {
            // What was not sent, or was sent elsewhere, is certainly not done: a client goes on,
            // and what it waits for shows as latency.
            let trouble = match self
                .exchange(&address, deadline, |host| {
                    native_request(&uri, ask, &value, host)
                })
                .await
            {
                Err(Trouble::Connect) => Trouble::Connect,
                Err(trouble) => return Err(trouble),
                Ok(response) => match response.status() {
                    StatusCode::TEMPORARY_REDIRECT => {
                        self.tally.redirects += 1;
                        hops += 1;
                        address = location(response.headers()).ok_or(Trouble::Redirects)?;
                        self.refresh().await;
                        Trouble::Redirects
                    }
                    StatusCode::NOT_FOUND if ask != Ask::Put => return Ok(Answered::Missing),
                    status if status.is_success() => return Ok(Answered::Done),
                    status => return Err(Trouble::Status(status.as_u16())),
                },
            };
            if trouble == Trouble::Connect {
                self.refresh().await;
                address = self
                    .route_past(key.as_bytes(), &address)
                    .ok_or(Trouble::Connect)?;
            }
            if trouble == Trouble::Connect || hops > REDIRECTS_MAX {
                hops = 0;
                sleep(ERROR_PAUSE).await;
            }
            if Instant::now() >= deadline {
                return Err(trouble);
            }
        }
    }

    async fn refresh(&self) {
        if let (Some(atlas), Some((generation, _))) = (&self.shared.atlas, &self.routes) {
            atlas.refresh(*generation).await;
        }
    }

    /// Another node of the key's shard than one that can't be reached.
    fn route_past(&mut self, key: &[u8], unreachable: &Address) -> Option<Address> {
        let nodes = self.routes()?.nodes(slot_of(key));
        let at = nodes
            .iter()
            .position(|node| node == unreachable)
            .map_or(0, |at| at + 1);
        nodes.get(at % nodes.len().max(1)).cloned()
    }

    /// The leader of the key's shard; for stale reads any of its nodes, each worker another.
    fn route(&mut self, key: &[u8], ask: Ask) -> Option<Address> {
        let worker = self.number;
        let nodes = self.routes()?.nodes(slot_of(key));
        match ask {
            Ask::Put | Ask::Get => nodes.first().cloned(),
            Ask::StaleGet => nodes.get(worker % nodes.len().max(1)).cloned(),
        }
    }

    /// The newest that are known.
    fn routes(&mut self) -> Option<&Routes> {
        let atlas = self.shared.atlas.as_ref()?;
        let generation = atlas.generation();
        if self
            .routes
            .as_ref()
            .is_none_or(|(known, _)| *known != generation)
        {
            self.routes = Some((generation, atlas.routes()));
        }
        self.routes.as_ref().map(|(_, routes)| routes.as_ref())
    }

    /// One request and its whole answer. The connection is kept only if it is good for another.
    async fn exchange(
        &mut self,
        address: &Address,
        deadline: Instant,
        request: impl FnOnce(&HeaderValue) -> Request<Full<Bytes>>,
    ) -> Result<Response<()>, Trouble> {
        let mut link = match self
            .connections
            .remove(address)
            .filter(|link| link.connection.is_open())
        {
            Some(link) => link,
            None => {
                let connection = Connection::open(address, CONNECT_TIMEOUT)
                    .await
                    .map_err(|_| Trouble::Connect)?;
                let host = HeaderValue::from_str(address.as_str()).map_err(|_| Trouble::Connect)?;
                Link { connection, host }
            }
        };
        let request = request(&link.host);
        let answered = async { drain(link.connection.send(request).await?).await };
        let response = timeout_at(deadline, answered)
            .await
            .map_err(|_| Trouble::Timeout)?
            .map_err(|_| Trouble::Broken)?;
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

fn native_request(uri: &Uri, ask: Ask, value: &Bytes, host: &HeaderValue) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(value.clone()));
    *request.uri_mut() = uri.clone();
    request.headers_mut().insert(HOST, host.clone());
    if ask == Ask::Put {
        *request.method_mut() = Method::PUT;
        request.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
    }
    request
}
