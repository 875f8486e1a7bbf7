//! [`DialectError`], the answer of the fixed dialects if a request is not done.

use axum::response::Response;
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, header};
use serde::Serialize;

use super::response::{HTML, answer, json};
use crate::api::store::Failure;
use crate::http::dialect::Dialect;
use crate::http::problem::{Code, Problem};

/// A request that is not done, or not known to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialectError {
    pub status: StatusCode,
    pub error: String,
    pub retry_after_s: Option<u64>,
}

impl DialectError {
    pub fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self {
            status,
            error: error.into(),
            retry_after_s: None,
        }
    }

    pub fn bad_request(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    /// Returns the error for a store that gave no answer: it has broken its promise, and the
    /// outcome is unknown.
    pub fn unanswered() -> Self {
        Failure::Unknown {
            reason: "the store gave no answer".to_owned(),
        }
        .into()
    }

    /// Returns the error for a batch of which some is stored and some may not be.
    pub fn partly_stored() -> Self {
        Failure::Unknown {
            reason: "some of the batch is not known to be stored".to_owned(),
        }
        .into()
    }

    /// Answers with `{"error":"...","message":"Error in PUT"}`.
    pub fn respond(&self, method: &Method) -> Response {
        #[derive(Serialize)]
        struct ErrorJson<'a> {
            error: &'a str,
            message: String,
        }
        let mut response = json(
            self.status,
            &ErrorJson {
                error: &self.error,
                message: format!("Error in {method}"),
            },
        );
        self.add_retry_after(&mut response);
        response
    }

    pub fn add_retry_after(&self, response: &mut Response) {
        if let Some(wait_s) = self.retry_after_s {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(wait_s));
        }
    }
}

impl From<Problem> for DialectError {
    fn from(problem: Problem) -> Self {
        Self {
            status: problem.status(),
            retry_after_s: problem.wait_s(),
            error: problem.detail,
        }
    }
}

impl From<Failure> for DialectError {
    /// That nobody can do it, that it is too much now and that the outcome is not known are all one
    /// to these dialects.
    fn from(failure: Failure) -> Self {
        let retry_after_s = Problem::from(failure.clone()).wait_s();
        match failure {
            Failure::Elsewhere { .. }
            | Failure::Overloaded { .. }
            | Failure::Unavailable { .. }
            | Failure::Unknown { .. } => Self {
                status: StatusCode::SERVICE_UNAVAILABLE,
                error: "Unable to satisfy request".to_owned(),
                retry_after_s,
            },
            Failure::Invalid { .. } => Self::bad_request(failure.to_string()),
            Failure::TooLarge { .. } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, failure.to_string())
            }
        }
    }
}

/// Answers 405, with what the path allows.
pub fn method_not_allowed(parts: &Parts, allowed: &'static str) -> Response {
    let mut response = DialectError::new(Code::MethodNotAllowed.status(), "Method not allowed")
        .respond(&parts.method);
    response
        .headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static(allowed));
    response
}

/// Answers as the load balancer did, which had a page of its own for 503.
pub fn respond_as_load_balancer(refusal: &DialectError, method: &Method) -> Response {
    if refusal.status != StatusCode::SERVICE_UNAVAILABLE {
        return refusal.respond(method);
    }
    let mut response = answer(refusal.status, HTML, "No server is available");
    refusal.add_retry_after(&mut response);
    response
}

/// Answers a read for whose answer there is no room.
pub fn no_room(dialect: Dialect, failure: Failure) -> Response {
    match dialect {
        Dialect::LoadBalancer => respond_as_load_balancer(&failure.into(), &Method::GET),
        _ => DialectError::from(failure).respond(&Method::GET),
    }
}
