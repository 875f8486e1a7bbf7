//! Every answer of these dialects, with its fields in the order of the contract.

use axum::response::Response;
use http::{HeaderValue, Method, StatusCode, header};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::http::dialects::error::DialectError;
use crate::http::dialects::response::json;
use crate::types::Address;

/// The members of an answer, without those that may be added to any.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged, rename_all_fields = "kebab-case")]
pub enum ResponseContent {
    Stored {
        message: &'static str,
        replaced: bool,
    },
    #[serde(rename_all = "camelCase")]
    Retrieved {
        does_exist: bool,
        message: &'static str,
        value: Box<RawValue>,
    },
    #[serde(rename_all = "camelCase")]
    Deleted {
        does_exist: bool,
        message: &'static str,
    },
    #[serde(rename_all = "camelCase")]
    Missing {
        does_exist: bool,
        error: &'static str,
        message: String,
    },
    KeyCount {
        message: &'static str,
        key_count: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        shard_id: Option<String>,
    },
    Shards {
        message: &'static str,
        shards: Vec<String>,
    },
    Shard {
        message: &'static str,
        #[serde(flatten)]
        shard: ShardJson,
    },
    ViewChanged {
        message: &'static str,
        shards: Vec<PartJson>,
    },
    Failed {
        error: String,
        message: String,
    },
    Nothing {},
}

/// A part of the store: of C, what is at home on a node, of C4, a shard.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum PartJson {
    #[serde(rename_all = "kebab-case")]
    Node {
        address: Address,
        key_count: u64,
    },
    Shard(ShardJson),
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ShardJson {
    pub shard_id: String,
    pub key_count: u64,
    pub replicas: Vec<Address>,
}

/// An answer on its way to a client.
#[derive(Debug, Clone)]
pub struct KvsResponse {
    status: StatusCode,
    content: ResponseContent,
    /// The node to ask about the key instead.
    address: Option<Address>,
    pub causal_context: Option<Box<RawValue>>,
    retry_after_s: Option<u64>,
    allow: Option<&'static str>,
}

#[derive(Serialize)]
struct AnswerJson<'a> {
    #[serde(flatten)]
    content: &'a ResponseContent,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<&'a Address>,
    #[serde(rename = "causal-context", skip_serializing_if = "Option::is_none")]
    causal_context: Option<&'a RawValue>,
}

impl KvsResponse {
    pub fn new(status: StatusCode, content: ResponseContent) -> Self {
        Self {
            status,
            content,
            address: None,
            causal_context: None,
            retry_after_s: None,
            allow: None,
        }
    }

    /// Returns `{"error":"...","message":"Error in PUT"}`.
    pub fn failed(status: StatusCode, error: impl Into<String>, method: &Method) -> Self {
        Self::new(
            status,
            ResponseContent::Failed {
                error: error.into(),
                message: error_in(method),
            },
        )
    }

    pub fn refused(refusal: DialectError, method: &Method) -> Self {
        let retry_after_s = refusal.retry_after_s;
        Self {
            retry_after_s,
            ..Self::failed(refusal.status, refusal.error, method)
        }
    }

    pub fn not_allowed(method: &Method, allowed: &'static str) -> Self {
        Self {
            allow: Some(allowed),
            ..Self::failed(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed", method)
        }
    }

    pub fn missing(method: &Method) -> Self {
        let content = ResponseContent::Missing {
            does_exist: false,
            error: "Key does not exist",
            message: error_in(method),
        };
        Self::new(StatusCode::NOT_FOUND, content)
    }

    pub fn at(self, address: Option<Address>) -> Self {
        Self { address, ..self }
    }

    pub fn with_context(self, causal_context: Option<Box<RawValue>>) -> Self {
        Self {
            causal_context,
            ..self
        }
    }

    pub fn respond(self) -> Response {
        let body = AnswerJson {
            content: &self.content,
            address: self.address.as_ref(),
            causal_context: self.causal_context.as_deref(),
        };
        let mut response = json(self.status, &body);
        let headers = response.headers_mut();
        if let Some(wait_s) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait_s));
        }
        if let Some(allowed) = self.allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(allowed));
        }
        response
    }
}

/// Returns the message of an error. HEAD counts as GET: its answer is only cut off.
fn error_in(method: &Method) -> String {
    let method = if *method == Method::HEAD {
        &Method::GET
    } else {
        method
    };
    format!("Error in {method}")
}
