//! Calls the node that leads a shard: `POST /peer/shard`, postcard over pooled HTTP/1.1 connections. What nodes forward with, and what
//! the remote client stands on.
//!
//! Invariant: a [`CallError`] says "not done" only when the request was certainly not taken up.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::CONTENT_TYPE;

use super::problem;
use super::protocol::{ShardReply, ShardRequest};
use super::store::Failure;
use crate::sm::codec;
use crate::types::Address;

/// A node that does not even take a connection in this time is passed over.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(800);
/// Shorter than servers wait for the next request of a connection, so that none meets a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Idle connections kept per node. More are made when they are needed, and closed afterwards.
const IDLE_CONNECTIONS_MAX: usize = 256;

/// Calls shards at addresses. Clones share their connections.
#[derive(Debug, Clone)]
pub struct ShardCaller {
    http: reqwest::Client,
}

/// Why a call has no reply.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No connection: certainly not done.
    #[error("no connection to {address}: {source}")]
    NotConnected {
        address: Address,
        #[source]
        source: reqwest::Error,
    },
    /// The node refused it before looking at it: certainly not done.
    #[error("{address} refused: {failure}")]
    Refused { address: Address, failure: Failure },
    /// It was sent, and nothing came back that says what happened.
    #[error("no answer from {address}: {reason}")]
    NoAnswer { address: Address, reason: String },
}

impl CallError {
    pub fn certainly_not_done(&self) -> bool {
        match self {
            CallError::NotConnected { .. } | CallError::Refused { .. } => true,
            CallError::NoAnswer { .. } => false,
        }
    }
}

/// As an answer to a request: the last word of a router that forwarded it.
impl From<CallError> for Failure {
    fn from(error: CallError) -> Failure {
        let reason = describe(&error);
        match error {
            CallError::NotConnected { .. } => Failure::Unavailable { reason, retry_after_ms: 1000 },
            CallError::Refused { failure, .. } => failure,
            CallError::NoAnswer { .. } => Failure::Unknown { reason },
        }
    }
}

impl ShardCaller {
    /// # Errors
    ///
    /// When the HTTP client can't be set up.
    pub fn new() -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .http1_only()
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .no_proxy()
            .build()?;
        Ok(Self { http })
    }

    /// The HTTP client beneath, for the JSON routes.
    pub fn http(&self) -> &reqwest::Client {
        &self.http
    }

    /// One attempt at the node at `address`. `timeout` is that of the whole call; `request.timeout_ms` should be a little below it, so that the
    /// node's own "not in time" arrives.
    ///
    /// # Errors
    ///
    /// See [`CallError`]: not every one means that nothing was done.
    pub async fn call(&self, address: &Address, request: &ShardRequest, timeout: Duration) -> Result<ShardReply, CallError> {
        let post = self.http.post(format!("http://{address}/peer/shard"));
        let post = post.header(CONTENT_TYPE, "application/octet-stream").body(codec::encode(request)).timeout(timeout);
        let response = match post.send().await {
            Ok(response) => response,
            Err(source) if source.is_connect() => return Err(CallError::NotConnected { address: address.clone(), source }),
            Err(source) => return Err(CallError::NoAnswer { address: address.clone(), reason: describe(&source) }),
        };
        let no_answer = |reason: String| CallError::NoAnswer { address: address.clone(), reason };
        if response.status() != StatusCode::OK {
            return Err(refusal(address, response).await);
        }
        let body = response.bytes().await.map_err(|error| no_answer(describe(&error)))?;
        codec::decode(&body, "a shard's reply").map_err(|error| no_answer(error.to_string()))
    }
}

/// The peer route itself answers 200: another status comes from before it.
async fn refusal(address: &Address, response: reqwest::Response) -> CallError {
    let status = response.status();
    let failure = failure_of(response).await;
    match failure {
        Failure::Unknown { reason } => CallError::NoAnswer { address: address.clone(), reason: format!("{status}: {reason}") },
        // No peer route, so no node, or one of another version: others may be.
        Failure::Invalid { reason } if status == StatusCode::NOT_FOUND => {
            let failure = Failure::Unavailable { reason, retry_after_ms: 1000 };
            CallError::Refused { address: address.clone(), failure }
        }
        failure => CallError::Refused { address: address.clone(), failure },
    }
}

/// What an error answer means.
pub(super) async fn failure_of(response: reqwest::Response) -> Failure {
    let (status, headers) = (response.status(), response.headers().clone());
    let body = response.bytes().await.unwrap_or_default();
    problem::failure(status, &headers, &body)
}

/// An error with its causes: reqwest's own text leaves out why a connection failed.
pub(super) fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = source.source();
    }
    text
}
