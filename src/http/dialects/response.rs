//! Makes the answers of the fixed dialects: a status, a type and a body.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

pub const JSON: &str = "application/json";
pub const TEXT: &str = "text/plain; charset=utf-8";

/// Flask's: without the charset, clients take text for Latin-1.
pub const HTML: &str = "text/html; charset=utf-8";

/// Answers with JSON.
pub fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let text = serde_json::to_vec(body)
        .expect("maps with text keys, numbers and strings always serialize");
    answer(status, JSON, text)
}

/// Answers with a body of any type.
pub fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
