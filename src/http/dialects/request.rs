//! Reads the requests of the fixed dialects and does them.

use std::time::Duration;

use axum::body::Body;
use http::request::Parts;

use super::error::DialectError;
use crate::api::store::{Consistency, Options, Routing};
use crate::http::app::App;
use crate::http::body::{self, BodyBytes, BodyLimit};

/// Timeout of a request. The contracts promise a word within 5 s when there is no quorum.
pub const ANSWER_TIMEOUT: Duration = Duration::from_millis(4500);

/// Returns how every request of a fixed dialect is done.
pub fn options() -> Options {
    Options {
        consistency: Consistency::Linearizable,
        routing: Routing::Proxy,
        timeout: ANSWER_TIMEOUT,
    }
}

/// Reads the whole body, whatever its type is called.
pub async fn read_body(app: &App, parts: &Parts, body: Body) -> Result<BodyBytes, DialectError> {
    let limit = BodyLimit {
        bytes_max: app.limits.body_bytes_max,
        what: "a body",
    };
    body::read(parts, body, limit, &app.limits, &app.bodies)
        .await
        .map_err(DialectError::from)
}
