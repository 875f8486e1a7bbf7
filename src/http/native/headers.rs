//! The headers of the native dialect besides conditions.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};

use crate::api::store::Staleness;
use crate::http::problem::{Code, Problem};

/// The header that tells how old a stale answer may be.
pub const STALENESS: &str = "quorate-staleness";

/// Longest `Idempotency-Key`, in bytes: it is kept in the map, once per slot.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<Bytes>, Problem> {
    let mut given = headers.get_all("idempotency-key").iter();
    let Some(key) = given.next() else {
        return Ok(None);
    };
    let good = (1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&key.len())
        && key.as_bytes().iter().all(u8::is_ascii_graphic);
    if !good || given.next().is_some() {
        let detail = format!(
            "Idempotency-Key is given once, and has 1 to {IDEMPOTENCY_KEY_BYTES_MAX} visible ASCII \
            characters"
        );
        return Err(Problem::new(Code::InvalidHeader, detail));
    }
    Ok(Some(Bytes::copy_from_slice(key.as_bytes())))
}

/// Returns `unknown`, or milliseconds. A stale answer that came without its age is of unknown age.
pub fn staleness(age: Option<Staleness>) -> HeaderValue {
    match age {
        Some(Staleness::AtMost { age_ms }) => HeaderValue::from(age_ms),
        Some(Staleness::Unknown) | None => HeaderValue::from_static("unknown"),
    }
}
