//! The native dialect, `/v1/...`: HTTP as RFC 9110 means it, over raw bytes.
//!
//! - A key is the percent-decoded rest of the path: any bytes (`%2F`, `%00`, `%FF`), empty
//!   segments, dots and trailing slashes included. Only those that begin with eight bytes `FF` are
//!   refused, and never listed: another dialect has them to itself. In JSON a key or value that is
//!   not UTF-8 stands in base64, and `key_encoding` or `encoding` says so.
//! - A revision is an ETag. Conditions are `If-Match` and `If-None-Match`; `Idempotency-Key` makes
//!   a write safe to repeat.
//! - A key that another node leads is answered 307, before anything of a body is read;
//!   `?proxy=true` has this node fetch the answer. Listings and batches span shards, so this node
//!   always gathers them itself.
//! - `?timeout=2s` (or `500ms`) bounds the wait; `?consistency=stale` reads what is at hand, and
//!   `Quorate-Staleness` says how long ago that was all that its leader had committed: an estimate,
//!   because a leader that is cut off learns late of the next one.
//! - A parameter that a route does not know is an error, not ignored: a misspelt condition must not
//!   pass for none.

mod batch;
mod cluster;
mod conditions;
mod key;
mod kv;
mod list;
mod query;
mod scrub;
#[cfg(test)]
mod tests;
mod view;

pub(super) use batch::batch;
pub(super) use cluster::{cluster, transfer_leader};
pub(super) use key::{PREFIX as KEY_PREFIX, unescape};
pub(super) use kv::kv;
pub(super) use list::list;
pub(super) use scrub::{begin_scrub, scrub_status};
pub(super) use view::{change, operation, view};

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;

use super::media::Encoding;
use super::problem::{Code, Problem};
use crate::client::store::{Item, Staleness};
use crate::http::media;
use bytes::Bytes;

/// What `Quorate-Staleness` is set to.
pub(super) const STALENESS: &str = "quorate-staleness";

/// Longest `Idempotency-Key`, in bytes: it is kept in the map, once per slot.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// A key in JSON: `"key"`, and `"key_encoding": "base64"` where it isn't UTF-8.
#[derive(Debug, Serialize)]
struct KeyJson {
    key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_encoding: Option<Encoding>,
}

impl KeyJson {
    fn new(key: &[u8]) -> Self {
        let (key, encoding) = Encoding::encode(key);
        Self {
            key,
            key_encoding: (encoding != Encoding::Utf8).then_some(encoding),
        }
    }
}

/// A value in JSON, lossless: `"value"` is the text itself or base64, as `"encoding"` says.
#[derive(Debug, Serialize)]
struct ValueJson {
    value: String,
    encoding: Encoding,
}

impl ValueJson {
    fn new(value: &[u8]) -> Self {
        let (value, encoding) = Encoding::encode(value);
        Self { value, encoding }
    }
}

/// An item of a listing. The value is left out where only keys were asked for.
#[derive(Debug, Serialize)]
struct ItemJson {
    #[serde(flatten)]
    key: KeyJson,
    #[serde(flatten)]
    value: Option<ValueJson>,
    media_type: String,
    revision: u64,
}

impl ItemJson {
    fn new(item: &Item, keys_only: bool) -> Self {
        Self {
            key: KeyJson::new(&item.key),
            value: (!keys_only).then(|| ValueJson::new(&item.record.value)),
            media_type: media::name(&item.record.media).to_owned(),
            revision: item.record.revision.0,
        }
    }
}

/// A list in JSON of which each item is made when its turn comes, so that there is no second copy
/// of all of them.
struct LazyList<'a, I, T> {
    items: &'a [I],
    /// Is given the place of the item, too.
    make: &'a dyn Fn(usize, &I) -> T,
}

impl<I, T: Serialize> Serialize for LazyList<'_, I, T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(
            self.items
                .iter()
                .enumerate()
                .map(|(place, item)| (self.make)(place, item)),
        )
    }
}

/// Ends with a newline, for those who read it in a terminal.
fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let mut text = serde_json::to_vec(body)
        .expect("maps with text keys, numbers and strings always serialize");
    text.push(b'\n');
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<Bytes>, Problem> {
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

/// `unknown`, or milliseconds. A stale answer whose age nobody told is of unknown age.
pub(super) fn staleness(age: Option<Staleness>) -> HeaderValue {
    match age {
        Some(Staleness::AtMost { age_ms }) => HeaderValue::from(age_ms),
        Some(Staleness::Unknown) | None => HeaderValue::from_static("unknown"),
    }
}
