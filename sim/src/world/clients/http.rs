//! [`HttpClient`]: asks one server after the other as curl does: over HTTP, and where it is sent.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use quorate::routing::transport::{NodeCall, NodeReply, Transport};
use quorate::types::Address;
use serde_json::Value as Json;

use crate::world::network::Ways;

/// Redirects that a client follows.
const REDIRECTS_MAX: usize = 5;

/// Asks servers over HTTP.
#[derive(Clone)]
pub struct HttpClient {
    ways: Arc<Ways>,
    timeout: Duration,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Ask {
    pub method: Method,
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Tells why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// It certainly was not done.
    NotDone,
    /// It may have been.
    Unknown,
}

/// An answer.
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Ask {
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
        }
    }

    pub fn header(mut self, name: HeaderName, value: &str) -> Self {
        let value = HeaderValue::from_str(value).expect("digits and letters");
        self.headers.insert(name, value);
        self
    }

    pub fn text(self, body: String) -> Self {
        Self {
            body: body.into(),
            ..self.header(header::CONTENT_TYPE, "text/plain")
        }
    }

    pub fn json(self, body: &Json) -> Self {
        Self {
            body: body.to_string().into(),
            ..self.header(header::CONTENT_TYPE, "application/json")
        }
    }
}

impl Reply {
    async fn of(mut reply: NodeReply) -> Self {
        let mut body = Vec::new();
        while let Ok(Some(part)) = reply.chunk().await {
            body.extend_from_slice(&part);
        }
        Self {
            status: reply.status(),
            headers: reply.headers().clone(),
            body: body.into(),
        }
    }

    pub fn json(&self) -> Option<Json> {
        serde_json::from_slice(&self.body).ok()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Returns the number that stands in an entity tag.
    pub fn revision(&self) -> Option<u64> {
        let tag = self.header(header::ETAG.as_str())?;
        tag.trim_matches('"').parse().ok()
    }
}

impl HttpClient {
    pub fn new(ways: Ways, timeout: Duration) -> Self {
        Self {
            ways: Arc::new(ways),
            timeout,
        }
    }

    /// Asks a server, and goes where that sends it.
    pub async fn ask(&self, server: &Address, ask: &Ask) -> Result<Reply, Silence> {
        let mut server = server.clone();
        for _ in 0..REDIRECTS_MAX {
            let mut call = NodeCall::new(ask.method.clone(), &server, &ask.path, self.timeout);
            call.headers = ask.headers.clone();
            call.body = ask.body.clone();
            let reply = match self.ways.send(call).await {
                Ok(reply) => Reply::of(reply).await,
                Err(error) if error.is_connect() => return Err(Silence::NotDone),
                Err(_) => return Err(Silence::Unknown),
            };
            if reply.status != StatusCode::TEMPORARY_REDIRECT {
                return Ok(reply);
            }
            let named = reply
                .header(header::LOCATION.as_str())
                .and_then(|location| {
                    let (authority, _) = location.strip_prefix("http://")?.split_once('/')?;
                    authority.parse().ok()
                });
            let Some(named) = named else {
                return Err(Silence::NotDone);
            };
            server = named;
        }
        Err(Silence::NotDone)
    }
}
