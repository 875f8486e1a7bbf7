//! [`Transport`], the one way of all calls to a node: a request goes to an address, a reply comes
//! back.
//!
//! The questions, and the meaning of answers, are the business of the callers: `call` of shards,
//! `peer_caller` of nodes, `discovery` and `view_change_calls` of clusters. [`HttpTransport`] is
//! the way over the network; a simulation puts one in its place that has delays and partitions, and
//! no sockets. Lanes, which stream, have a seam of their own (`raft::transport::Dial`).

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::types::Address;

/// Sends requests to nodes.
pub trait Transport: fmt::Debug + Send + Sync + 'static {
    /// Sends a request, and returns the head of its reply. Dropping what is returned ends the wait,
    /// and perhaps the work of the other side.
    fn send(&self, call: NodeCall) -> BoxFuture<'static, Result<NodeReply, SendError>>;

    /// Returns whether a connection can be made within `at_most`. Nothing is sent over it.
    fn connects(&self, address: Address, at_most: Duration) -> BoxFuture<'static, bool>;
}

/// A request to the node at an address.
#[derive(Debug, Clone)]
pub struct NodeCall {
    pub address: Address,
    pub method: Method,
    /// With its query. It is sent as it is.
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// Until the whole reply is there.
    pub timeout: Duration,
}

impl NodeCall {
    pub fn new(
        method: Method,
        address: &Address,
        path: impl Into<String>,
        timeout: Duration,
    ) -> Self {
        Self {
            address: address.clone(),
            method,
            path: path.into(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            timeout,
        }
    }

    pub fn get(address: &Address, path: impl Into<String>, timeout: Duration) -> Self {
        Self::new(Method::GET, address, path, timeout)
    }

    pub fn post(address: &Address, path: impl Into<String>, timeout: Duration) -> Self {
        Self::new(Method::POST, address, path, timeout)
    }

    pub fn put(address: &Address, path: impl Into<String>, timeout: Duration) -> Self {
        Self::new(Method::PUT, address, path, timeout)
    }

    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// Sends these bytes.
    pub fn octets(self, body: Bytes) -> Self {
        let octets = HeaderValue::from_static("application/octet-stream");
        Self {
            body,
            ..self.header(CONTENT_TYPE, octets)
        }
    }

    /// Sends a message as JSON.
    pub fn json(self, message: &(impl Serialize + ?Sized)) -> Self {
        let body = serde_json::to_vec(message)
            .expect("messages of nodes have keys that are text or numbers");
        let json = HeaderValue::from_static("application/json");
        Self {
            body: body.into(),
            ..self.header(CONTENT_TYPE, json)
        }
    }
}

/// A reason why a request has no reply.
#[derive(Debug)]
pub struct SendError {
    kind: SendErrorKind,
    source: Box<dyn Error + Send + Sync>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendErrorKind {
    /// No connection was made: nothing was sent.
    NotConnected,
    /// No connection was made in time: nothing was sent.
    NotConnectedInTime,
    /// The reply was not there in time.
    Late,
    /// The connection broke, or what came over it was no reply.
    Broken,
}

impl SendError {
    pub fn new(kind: SendErrorKind, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            kind,
            source: source.into(),
        }
    }

    /// Returns whether nothing was sent, because there was no connection.
    pub fn is_connect(&self) -> bool {
        matches!(
            self.kind,
            SendErrorKind::NotConnected | SendErrorKind::NotConnectedInTime
        )
    }

    pub fn is_timeout(&self) -> bool {
        matches!(
            self.kind,
            SendErrorKind::NotConnectedInTime | SendErrorKind::Late
        )
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

/// It stands for its cause, whose text it has.
impl Error for SendError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.source()
    }
}

impl From<reqwest::Error> for SendError {
    fn from(error: reqwest::Error) -> Self {
        let kind = match (error.is_connect(), error.is_timeout()) {
            (true, false) => SendErrorKind::NotConnected,
            (true, true) => SendErrorKind::NotConnectedInTime,
            (false, true) => SendErrorKind::Late,
            (false, false) => SendErrorKind::Broken,
        };
        Self::new(kind, error)
    }
}

/// The head of a reply, and what reads its body.
#[derive(Debug)]
pub struct NodeReply(ReplySource);

#[derive(Debug)]
enum ReplySource {
    Http(reqwest::Response),
    Whole {
        head: http::response::Parts,
        /// None once it was read.
        body: Option<Bytes>,
    },
}

impl NodeReply {
    pub fn status(&self) -> StatusCode {
        match &self.0 {
            ReplySource::Http(response) => response.status(),
            ReplySource::Whole { head, .. } => head.status,
        }
    }

    pub fn headers(&self) -> &HeaderMap {
        match &self.0 {
            ReplySource::Http(response) => response.headers(),
            ReplySource::Whole { head, .. } => &head.headers,
        }
    }

    /// Returns how long the body is, as far as the other side has said.
    pub fn content_length(&self) -> Option<u64> {
        match &self.0 {
            ReplySource::Http(response) => response.content_length(),
            ReplySource::Whole { body, .. } => body.as_ref().map(|body| body.len() as u64),
        }
    }

    /// Returns the next piece of the body; none at its end.
    ///
    /// # Errors
    ///
    /// Fails if the connection breaks, or time is up.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, SendError> {
        match &mut self.0 {
            ReplySource::Http(response) => Ok(response.chunk().await?),
            ReplySource::Whole { body, .. } => Ok(body.take().filter(|body| !body.is_empty())),
        }
    }
}

impl From<http::Response<Bytes>> for NodeReply {
    fn from(response: http::Response<Bytes>) -> Self {
        let (head, body) = response.into_parts();
        Self(ReplySource::Whole {
            head,
            body: Some(body),
        })
    }
}

/// The reason why the HTTP client can't be set up.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SetUpError(#[from] reqwest::Error);

/// Sends over HTTP, by connections that it keeps.
#[derive(Debug, Clone)]
pub struct HttpTransport(reqwest::Client);

impl HttpTransport {
    /// # Errors
    ///
    /// Fails if the HTTP client can't be set up.
    pub fn build(builder: reqwest::ClientBuilder) -> Result<Arc<dyn Transport>, SetUpError> {
        // Nagle's algorithm would hold small requests back. A proxy named in the environment is for
        // the web, not for calls between nodes.
        let client = builder.tcp_nodelay(true).no_proxy().build()?;
        Ok(Arc::new(Self(client)))
    }
}

impl Transport for HttpTransport {
    fn send(&self, call: NodeCall) -> BoxFuture<'static, Result<NodeReply, SendError>> {
        let url = format!("http://{}{}", call.address, call.path);
        let mut request = self
            .0
            .request(call.method, url)
            .headers(call.headers)
            .timeout(call.timeout);
        if !call.body.is_empty() {
            request = request.body(call.body);
        }
        Box::pin(async move {
            let response = request.send().await?;
            Ok(NodeReply(ReplySource::Http(response)))
        })
    }

    fn connects(&self, address: Address, at_most: Duration) -> BoxFuture<'static, bool> {
        Box::pin(async move {
            let connected = timeout(at_most, TcpStream::connect(address.as_str())).await;
            connected.is_ok_and(|connected| connected.is_ok())
        })
    }
}
