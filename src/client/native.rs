//! A small client of the native dialect: what `curl -L` does, for any key and for more than one
//! server.
//!
//! It follows redirects to the leader, asks the next server when one can't be reached or can't
//! help, and goes on until the timeout. A write that was sent and not answered is unknown; it is
//! sent again only with an idempotency key.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, ETAG, HOST, IF_MATCH, IF_NONE_MATCH, LOCATION};
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode};
use http_body_util::Full;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use serde::Deserialize;
use tokio::time::{Instant, sleep, timeout_at};

use super::wire::Connection;
use crate::api::protocol::{ClusterStatus, ScrubStatus};
use crate::api::store::Failure;
use crate::routing::problem;
use crate::routing::retry::{Effect, FailureHistory, FailureSource, server_timeout_ms};
use crate::types::{Address, Revision};

/// Characters that stand in a path as themselves: unreserved characters (RFC 3986, section 2.3) and
/// the slash.
pub const KEY_ESCAPES: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~')
    .remove(b'/');
/// In a query, slashes too are escaped.
const QUERY_ESCAPES: &AsciiSet = &KEY_ESCAPES.add(b'/');

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two rounds over all servers.
const PAUSE: Duration = Duration::from_millis(100);
/// Redirects followed in a row: leaders change, but not that often.
const REDIRECTS_MAX: usize = 5;

/// A client of some servers of one cluster.
#[derive(Debug)]
pub struct NativeClient {
    servers: Vec<Address>,
    timeout: Duration,
    /// The last connection, for the next request to the same node.
    connection: Option<(Address, Connection)>,
}

/// A reason why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// Nothing was changed.
    #[error("{detail}")]
    ConditionFailed { detail: String },
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// Headers of a write.
#[derive(Debug, Clone, Default)]
pub struct WriteHeaders {
    pub content_type: Option<String>,
    pub if_match: Option<String>,
    pub if_none_match: Option<String>,
    pub idempotency_key: Option<String>,
}

impl WriteHeaders {
    /// Returns what it does to send a write with these twice.
    fn effect(&self) -> Effect {
        if self.idempotency_key.is_some() {
            Effect::Idempotent
        } else {
            Effect::Once
        }
    }
}

/// A value as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    pub bytes: Bytes,
    pub content_type: String,
    pub revision: Revision,
    /// Of a stale read: what the server says of its age.
    pub staleness: Option<String>,
}

/// Outcome of a write. Only a put says `created`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct WriteAnswer {
    pub revision: Revision,
    pub created: Option<bool>,
}

/// Asks for one page of a listing.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    pub prefix: Bytes,
    pub reverse: bool,
    pub keys_only: bool,
    pub stale: bool,
    pub limit: usize,
    pub cursor: Option<String>,
}

/// A page of a listing, its items as the server wrote them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ListPage {
    pub items: Vec<serde_json::Value>,
    pub next_cursor: Option<String>,
}

struct Exchange {
    method: Method,
    path_and_query: String,
    headers: HeaderMap,
    body: Bytes,
    effect: Effect,
    /// Returns true if the answer of a server is what was asked for; else another is asked, if it
    /// may be.
    is_awaited: fn(&Response<Bytes>) -> bool,
}

/// Outcome of one attempt.
enum Attempt {
    Answer(Response<Bytes>),
    /// Certainly not done here: ask there, or the next server.
    Redirect(Address),
    NotDone(FailureSource, Failure),
    Unknown(FailureSource, Failure),
}

impl NativeClient {
    pub fn new(servers: Vec<Address>, timeout: Duration) -> Self {
        Self {
            servers,
            timeout,
            connection: None,
        }
    }

    /// Returns the value of a key, if there is one.
    ///
    /// # Errors
    ///
    /// Fails if nobody could tell in time.
    pub async fn get(&mut self, key: &[u8], stale: bool) -> Result<Option<Value>, NativeError> {
        let consistency = if stale { "&consistency=stale" } else { "" };
        let path = self.key_path(key, consistency, Effect::Safe);
        let response = self.exchange(Exchange::read(path)).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let response = checked(response)?;
        let header = |name: HeaderName| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let revision = header(ETAG).and_then(|tag| tag.trim_matches('"').parse().ok());
        Ok(Some(Value {
            content_type: header(CONTENT_TYPE).unwrap_or_default(),
            revision: Revision(
                revision.ok_or_else(|| strange("an answer without a revision in its ETag"))?,
            ),
            staleness: header(HeaderName::from_static("quorate-staleness")),
            bytes: response.into_body(),
        }))
    }

    /// # Errors
    ///
    /// Fails if a condition does not hold, or the write failed; [`Failure::Unknown`] leaves open
    /// whether it happened.
    pub async fn put(
        &mut self,
        key: &[u8],
        value: Bytes,
        headers: &WriteHeaders,
    ) -> Result<WriteAnswer, NativeError> {
        let exchange = Exchange::write(
            Method::PUT,
            self.key_path(key, "", headers.effect()),
            headers,
            value,
        )?;
        read_json(&checked(self.exchange(exchange).await?)?)
    }

    /// Returns None if there was no such key.
    ///
    /// # Errors
    ///
    /// As of [`NativeClient::put`].
    pub async fn delete(
        &mut self,
        key: &[u8],
        headers: &WriteHeaders,
    ) -> Result<Option<WriteAnswer>, NativeError> {
        let exchange = Exchange::write(
            Method::DELETE,
            self.key_path(key, "", headers.effect()),
            headers,
            Bytes::new(),
        )?;
        let response = self.exchange(exchange).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        read_json(&checked(response)?).map(Some)
    }

    /// # Errors
    ///
    /// Fails if nobody could tell in time.
    pub async fn list(&mut self, query: &ListQuery) -> Result<ListPage, NativeError> {
        let prefix = percent_encode(&query.prefix, QUERY_ESCAPES);
        let mut path = format!(
            "/v1/kv?{}&prefix={prefix}&limit={}",
            self.wait(Effect::Safe),
            query.limit
        );
        let flags = [
            (query.reverse, "&reverse=true"),
            (query.keys_only, "&keys_only=true"),
            (query.stale, "&consistency=stale"),
        ];
        flags
            .into_iter()
            .filter(|(set, _)| *set)
            .for_each(|(_, flag)| path.push_str(flag));
        if let Some(cursor) = &query.cursor {
            path.push_str(&format!(
                "&cursor={}",
                percent_encode(cursor.as_bytes(), QUERY_ESCAPES)
            ));
        }
        read_json(&checked(self.exchange(Exchange::read(path)).await?)?)
    }

    /// Returns the answer to `GET /v1/cluster`.
    ///
    /// # Errors
    ///
    /// Fails if no server answers in time.
    pub async fn cluster(&mut self) -> Result<ClusterStatus, NativeError> {
        let is_awaited = |response: &Response<Bytes>| {
            is_ours(response)
                && (!response.status().is_success() || read_json::<ClusterStatus>(response).is_ok())
        };
        let exchange = Exchange {
            is_awaited,
            ..Exchange::read("/v1/cluster".into())
        };
        read_json(&checked(self.exchange(exchange).await?)?)
    }

    /// Hands a shard's leadership to the replica on that node, or to its home; the address of the
    /// new leader.
    ///
    /// # Errors
    ///
    /// Fails if there is no such shard or replica, or it did not happen in time.
    pub async fn transfer_leader(
        &mut self,
        shard: u64,
        to: Option<&Address>,
    ) -> Result<Address, NativeError> {
        #[derive(Deserialize)]
        struct Transferred {
            leader: Address,
        }
        let body = to
            .map(|to| serde_json::json!({ "to": to }).to_string())
            .unwrap_or_default();
        // It names who is to lead: done twice it is done once.
        let effect = Effect::Idempotent;
        let path = format!("/v1/cluster/shards/{shard}/leader?{}", self.wait(effect));
        let exchange = Exchange {
            effect,
            ..Exchange::write(Method::POST, path, &WriteHeaders::default(), body.into())?
        };
        let transferred: Transferred = read_json(&checked(self.exchange(exchange).await?)?)?;
        Ok(transferred.leader)
    }

    /// Returns how the last scrub of a node gets on, after one was begun if `begin` says so.
    ///
    /// # Errors
    ///
    /// Fails if it doesn't answer in time, or is none that has a scrub.
    pub async fn scrub(&mut self, begin: bool) -> Result<ScrubStatus, NativeError> {
        // While one runs, no other begins.
        let effect = Effect::Idempotent;
        let path = format!("/v1/node/scrub?{}", self.wait(effect));
        let exchange = if begin {
            Exchange {
                effect,
                ..Exchange::write(Method::POST, path, &WriteHeaders::default(), Bytes::new())?
            }
        } else {
            Exchange::read(path)
        };
        read_json(&checked(self.exchange(exchange).await?)?)
    }

    fn key_path(&self, key: &[u8], more: &str, effect: Effect) -> String {
        format!(
            "/v1/kv/{}?{}{more}",
            percent_encode(key, KEY_ESCAPES),
            self.wait(effect)
        )
    }

    /// Returns the parameter that tells a server how long to wait, which may be less than this
    /// client does.
    fn wait(&self, effect: Effect) -> String {
        format!(
            "timeout={}ms",
            server_timeout_ms(effect.attempt_timeout(self.timeout))
        )
    }

    /// Asks server after server until one settles it, or the time is up.
    async fn exchange(&mut self, exchange: Exchange) -> Result<Response<Bytes>, Failure> {
        let deadline = Instant::now() + self.timeout;
        let mut last = FailureHistory::new(exchange.effect);
        loop {
            for server in self.servers.clone() {
                // One server is asked in any case, so that there is a reason to tell.
                if Instant::now() >= deadline && last.failure().is_some() {
                    break;
                }
                let (by, failure) = match self.follow(server, &exchange, deadline).await {
                    // It was refused here, which says nothing of who has not answered.
                    Attempt::Answer(response)
                        if last.may_be_done() && is_refusal(response.status()) =>
                    {
                        return Err(last.final_failure(failure_of(&response)));
                    }
                    Attempt::Answer(response) => return Ok(response),
                    Attempt::Redirect(address) => (
                        FailureSource::Server,
                        unavailable(format!("the leader is changing, perhaps to {address}")),
                    ),
                    Attempt::NotDone(by, failure) | Attempt::Unknown(by, failure) => (by, failure),
                };
                if !exchange.effect.goes_on_after(&failure) {
                    return Err(last.final_failure(failure));
                }
                last.note(by, failure);
            }
            if self.servers.is_empty() || Instant::now() + PAUSE >= deadline {
                let failure = last.failure().cloned();
                return Err(failure.unwrap_or_else(|| unavailable("no server is given".into())));
            }
            sleep(PAUSE).await;
        }
    }

    async fn follow(&mut self, server: Address, exchange: &Exchange, deadline: Instant) -> Attempt {
        let mut address = server;
        for _ in 0..REDIRECTS_MAX {
            match self.attempt(&address, exchange, deadline).await {
                Attempt::Redirect(to) => address = to,
                settled => return settled,
            }
        }
        Attempt::Redirect(address)
    }

    async fn attempt(
        &mut self,
        address: &Address,
        exchange: &Exchange,
        deadline: Instant,
    ) -> Attempt {
        let left = deadline.saturating_duration_since(Instant::now());
        let give_up = Instant::now() + exchange.effect.attempt_timeout(left);

        // Taken out: after a request that is broken off its connection can't be used again.
        let reusable = self
            .connection
            .take()
            .filter(|(to, connection)| to == address && connection.is_open());
        let mut connection = match reusable {
            Some((_, connection)) => connection,
            None => match Connection::open(address, left.min(CONNECT_TIMEOUT)).await {
                Ok(connection) => connection,
                Err(error) => {
                    let failure = unavailable(format!("no connection to {address}: {error}"));
                    return Attempt::NotDone(FailureSource::Nobody, failure);
                }
            },
        };
        let request = match exchange.request(address) {
            Ok(request) => request,
            Err(failure) => return Attempt::NotDone(FailureSource::Nobody, failure),
        };
        match timeout_at(give_up, connection.exchange(request)).await {
            Ok(Ok(response)) => {
                self.connection = Some((address.clone(), connection));
                judge(address, response, exchange)
            }
            // The kept connection was closed meanwhile: nothing was sent.
            Ok(Err(error)) if error.is_not_sent() => Attempt::NotDone(
                FailureSource::Nobody,
                unavailable(format!("{address}: {error}")),
            ),
            // Sent, at least in part: the server may have done it.
            Ok(Err(error)) => unanswered(format!("no answer from {address}: {error}")),
            Err(_) => unanswered(format!("{address} did not answer in time")),
        }
    }
}

impl Exchange {
    fn read(path_and_query: String) -> Self {
        Self {
            method: Method::GET,
            path_and_query,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            effect: Effect::Safe,
            is_awaited: is_ours,
        }
    }

    fn write(
        method: Method,
        path_and_query: String,
        write: &WriteHeaders,
        body: Bytes,
    ) -> Result<Self, Failure> {
        let mut headers = HeaderMap::new();
        let given = [
            (CONTENT_TYPE, &write.content_type),
            (IF_MATCH, &write.if_match),
            (IF_NONE_MATCH, &write.if_none_match),
            (
                HeaderName::from_static("idempotency-key"),
                &write.idempotency_key,
            ),
        ];

        // Checked before anything is sent: what can't stand in a header would be no request at all.
        for (name, value) in given {
            let Some(value) = value else { continue };
            let bad = |_| Failure::Invalid {
                reason: format!("'{value}' can't stand in the header {name}"),
            };
            headers.insert(name.clone(), value.parse().map_err(bad)?);
        }
        Ok(Self {
            method,
            path_and_query,
            headers,
            body,
            effect: write.effect(),
            is_awaited: is_ours,
        })
    }

    fn request(&self, address: &Address) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::builder()
            .method(&self.method)
            .uri(&self.path_and_query)
            .header(HOST, address.as_str());
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.headers.clone());
        }
        let invalid = |error: http::Error| Failure::Invalid {
            reason: error.to_string(),
        };
        request.body(Full::new(self.body.clone())).map_err(invalid)
    }
}

fn unanswered(reason: String) -> Attempt {
    Attempt::Unknown(FailureSource::Nobody, Failure::Unknown { reason })
}

fn judge(address: &Address, response: Response<Bytes>, exchange: &Exchange) -> Attempt {
    match response.status() {
        // A node redirects before it does anything, so the request can be sent elsewhere.
        StatusCode::TEMPORARY_REDIRECT => match location(response.headers()) {
            Some(address) => Attempt::Redirect(address),
            None => Attempt::NotDone(
                FailureSource::Server,
                unavailable(format!("{address} redirects without an address")),
            ),
        },
        status if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT => {
            match failure_of(&response) {
                failure @ Failure::Unknown { .. } => {
                    Attempt::Unknown(FailureSource::Server, failure)
                }
                failure => Attempt::NotDone(FailureSource::Server, failure),
            }
        }
        // A proxy, or another program at that address, may answer anything. It settles nothing.
        _ if !(exchange.is_awaited)(&response) => {
            let status = response.status();
            let reason = format!(
                "{address} answered {status} in a way that no quorate node does; is it one?"
            );
            Attempt::Unknown(FailureSource::Server, Failure::Unknown { reason })
        }
        _ => Attempt::Answer(response),
    }
}

/// Returns whether an answer says that nothing was done, and not because of what is stored.
fn is_refusal(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS
    )
}

/// Returns whether an answer looks like one of ours: errors are problems. What stands in front of a
/// node, or in its place, may answer 404 to anything.
fn is_ours(response: &Response<Bytes>) -> bool {
    let is_bodiless = response.status() == StatusCode::NOT_MODIFIED;
    response.status().is_success()
        || is_bodiless
        || problem::is_of_node(response.headers(), response.body())
}

/// Returns the node that a `Location` names.
pub fn location(headers: &HeaderMap) -> Option<Address> {
    let location = headers
        .get(LOCATION)?
        .to_str()
        .ok()?
        .strip_prefix("http://")?;
    location.split(['/', '?']).next()?.parse().ok()
}

fn checked(response: Response<Bytes>) -> Result<Response<Bytes>, NativeError> {
    match response.status() {
        status if status.is_success() => Ok(response),
        StatusCode::PRECONDITION_FAILED => Err(NativeError::ConditionFailed {
            detail: problem::detail(response.status(), response.body()),
        }),
        _ => Err(NativeError::Failed(failure_of(&response))),
    }
}

fn failure_of(response: &Response<Bytes>) -> Failure {
    problem::failure(response.status(), response.headers(), response.body())
}

fn read_json<T: serde::de::DeserializeOwned>(response: &Response<Bytes>) -> Result<T, NativeError> {
    serde_json::from_slice(response.body())
        .map_err(|error| strange(&format!("an answer that can't be read: {error}")).into())
}

/// Returns the failure of an answer that no node gives: perhaps none was asked.
fn strange(what: &str) -> Failure {
    Failure::Unknown {
        reason: format!("the server gave {what}; is it a quorate node?"),
    }
}

fn unavailable(reason: String) -> Failure {
    Failure::Unavailable {
        reason,
        retry_after_ms: 1000,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::client::testing::{answer, bind, nobody, problem, serve};

    fn client(servers: &[&Address]) -> NativeClient {
        NativeClient::new(
            servers.iter().copied().cloned().collect(),
            Duration::from_secs(20),
        )
    }

    #[tokio::test]
    async fn a_put_goes_past_a_dead_server_and_on_to_the_leader() {
        let (leader, leading) = bind().await;
        let (follower, following) = bind().await;
        serve(leading, |request| async move {
            assert_eq!(request.method(), Method::PUT);
            assert!(
                request
                    .uri()
                    .path_and_query()
                    .is_some_and(|path| path.as_str().starts_with("/v1/kv/a%20b/../%FF?timeout="))
            );
            assert_eq!(
                (request.headers()[IF_MATCH].as_bytes(), &request.body()[..]),
                (&b"\"3\""[..], &b"value"[..])
            );
            Some(answer(200, r#"{"key":"x","revision":4,"created":false}"#))
        });
        serve(following, move |request| {
            let leader = leader.clone();
            async move {
                let mut response = answer(307, "");
                let location = format!("http://{leader}{}", request.uri());
                response
                    .headers_mut()
                    .insert(LOCATION, location.parse().expect("a header"));
                Some(response)
            }
        });
        let headers = WriteHeaders {
            if_match: Some("\"3\"".into()),
            ..WriteHeaders::default()
        };
        let mut client = client(&[&nobody().await, &follower]);
        let written = client
            .put(b"a b/../\xff", Bytes::from_static(b"value"), &headers)
            .await
            .expect("written");
        assert_eq!(
            written,
            WriteAnswer {
                revision: Revision(4),
                created: Some(false)
            }
        );
    }

    #[tokio::test]
    async fn an_unanswered_write_is_sent_again_only_with_an_idempotency_key() {
        let (server, listener) = bind().await;
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        serve(listener, move |_| {
            let first = count.fetch_add(1, Ordering::Relaxed) < 2;
            async move { (!first).then(|| answer(201, r#"{"revision":1,"created":true}"#)) }
        });
        let mut client = client(&[&server]);
        let lost = client
            .put(b"k", Bytes::new(), &WriteHeaders::default())
            .await;
        assert!(
            matches!(lost, Err(NativeError::Failed(Failure::Unknown { .. }))),
            "{lost:?}"
        );
        assert_eq!(requests.load(Ordering::Relaxed), 1);
        let headers = WriteHeaders {
            idempotency_key: Some("once".into()),
            ..WriteHeaders::default()
        };
        client
            .put(b"k", Bytes::new(), &headers)
            .await
            .expect("written in the end");
        assert_eq!(requests.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn a_refusal_does_not_unsay_that_an_earlier_attempt_may_have_done_it() {
        for status in [400, 413, 429] {
            let (dropping, dropped) = bind().await;
            serve(dropped, |_| async { None });
            let (refusing, refused) = bind().await;
            serve(refused, move |_| async move {
                Some(problem(status, "not here"))
            });
            let headers = WriteHeaders {
                idempotency_key: Some("once".into()),
                ..WriteHeaders::default()
            };
            let told = client(&[&dropping, &refusing])
                .put(b"k", Bytes::new(), &headers)
                .await;
            assert!(
                matches!(told, Err(NativeError::Failed(Failure::Unknown { .. }))),
                "{status}: {told:?}"
            );
            let told = client(&[&refusing, &dropping])
                .put(b"k", Bytes::new(), &headers)
                .await;
            assert!(
                !matches!(told, Err(NativeError::Failed(Failure::Unknown { .. }))),
                "{status}: {told:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_proxy_that_gives_up_says_nothing_of_what_was_done() {
        let requests = Arc::new(AtomicUsize::new(0));
        let put = async |status: u16, is_of_node: bool| {
            let (server, listener) = bind().await;
            let count = Arc::clone(&requests);
            count.store(0, Ordering::Relaxed);
            serve(listener, move |_| {
                let first = count.fetch_add(1, Ordering::Relaxed) == 0;
                let refusal = if is_of_node {
                    problem(status, "no leader")
                } else {
                    answer(status, "busy")
                };
                let answer = if first {
                    refusal
                } else {
                    answer(201, r#"{"revision":1,"created":true}"#)
                };
                async move { Some(answer) }
            });
            client(&[&server])
                .put(b"k", Bytes::new(), &WriteHeaders::default())
                .await
        };
        for status in [408, 502, 503, 504] {
            let unknown = put(status, false).await;
            assert!(
                matches!(unknown, Err(NativeError::Failed(Failure::Unknown { .. }))),
                "{status}: {unknown:?}"
            );
            assert_eq!(
                requests.load(Ordering::Relaxed),
                1,
                "{status}: it was sent again"
            );
        }
        for status in [408, 503] {
            put(status, true)
                .await
                .expect("a node that refused it has not done it");
            assert_eq!(requests.load(Ordering::Relaxed), 2, "{status}");
        }
    }

    #[tokio::test]
    async fn a_read_goes_past_servers_that_drop_it_or_are_none() {
        let reply = |status: u16, body: &'static str| async move {
            let (address, listener) = bind().await;
            serve(listener, move |_| async move {
                (status > 0).then(|| answer(status, body))
            });
            address
        };
        let dropping = reply(0, "").await;
        let (page, missing) = (
            reply(200, "<h1>hello</h1>").await,
            reply(404, "<h1>not here</h1>").await,
        );
        let nodes = std::slice::from_ref(&dropping);
        let status =
            serde_json::to_vec(&crate::client::testing::status(1, None, nodes)).expect("JSON");
        let (node, listener) = bind().await;
        serve(listener, move |request| {
            let is_status = request.uri().path() == "/v1/cluster";
            let answer = if is_status {
                answer(200, status.clone())
            } else {
                problem(404, "there is no such key")
            };
            async move { Some(answer) }
        });
        let mut told = client(&[&dropping, &page, &missing, &node]);
        assert_eq!(
            told.cluster().await.expect("a status").epoch,
            crate::types::PlanEpoch(1)
        );
        let mut told = client(&[&dropping, &missing, &node]);
        assert_eq!(told.get(b"k", false).await.expect("an answer"), None);

        let mut none = NativeClient::new(vec![dropping, missing], Duration::from_millis(300));
        let failed = none.get(b"k", false).await.expect_err("nobody can tell");
        assert!(
            matches!(failed, NativeError::Failed(Failure::Unavailable { .. })),
            "{failed}"
        );
    }

    #[tokio::test]
    async fn answers_are_told_apart() {
        let (server, listener) = bind().await;
        serve(listener, |request| async move {
            Some(match request.uri().path() {
                "/v1/kv/missing" => problem(404, "there is no such key"),
                "/v1/kv/guarded" => problem(412, "the key is at revision 9"),
                "/v1/kv/long" => problem(400, "too long"),
                "/v1/kv/busy" => problem(429, "queue"),
                _ => answer(200, "not what was asked for"),
            })
        });
        let mut client = client(&[&server]);
        assert_eq!(
            client.get(b"missing", false).await.expect("an answer"),
            None
        );
        let headers = WriteHeaders::default();
        assert_eq!(
            client
                .delete(b"missing", &headers)
                .await
                .expect("an answer"),
            None
        );
        let error = client
            .put(b"guarded", Bytes::new(), &headers)
            .await
            .expect_err("412");
        assert!(
            matches!(&error, NativeError::ConditionFailed { detail } if detail == "the key is at \
                revision 9")
        );
        let failure = |error| match error {
            Err(NativeError::Failed(failure)) => failure,
            other => panic!("{other:?}"),
        };
        assert!(matches!(
            failure(client.put(b"long", Bytes::new(), &headers).await),
            Failure::Invalid { .. }
        ));
        assert!(matches!(
            failure(client.put(b"busy", Bytes::new(), &headers).await),
            Failure::Overloaded { .. }
        ));
        assert!(matches!(
            failure(client.put(b"x", Bytes::new(), &headers).await),
            Failure::Unknown { .. }
        ));
    }
}
