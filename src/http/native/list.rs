//! `GET /v1/kv?prefix=&start=&end=&limit=&cursor=&keys_only=&reverse=`: keys and values in key
//! order over all shards, page by page.
//!
//! In a query `+` is a space: a plus in `prefix`, `start` or `end` is `%2B`.
//!
//! `start` (included) and `end` (not included) bound the keys; with `prefix` too, both hold. A page
//! may be shorter than `limit`; there is more if, and only if, the answer has a `next_cursor`. Each
//! page is taken anew: a change between two pages shows in the later one.

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::StatusCode;
use http::request::Parts;
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

use super::headers::{STALENESS, staleness};
use super::json::{ItemJson, LazyList, json};
use super::query::Query;
use crate::api::store::{Consistency, Item, Routing, ScanRange, ScanRequest};
use crate::http::app::{App, SharedApp};
use crate::http::blocking;
use crate::http::dialect::Dialect;
use crate::http::problem::{self, Code, Problem};
use crate::sm::ports::after_prefix;
use crate::types::RESERVED_PREFIX;

const PARAMETERS: &[&str] = &[
    "prefix",
    "start",
    "end",
    "limit",
    "cursor",
    "keys_only",
    "reverse",
    "proxy",
    "consistency",
    "timeout",
];

#[derive(Serialize)]
struct PageJson<'a> {
    items: LazyList<'a, Item, ItemJson>,
    next_cursor: Option<String>,
}

pub async fn list(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::Native, &request);
    let (parts, _) = request.into_parts();
    timer.finish(
        page(&app, &parts)
            .await
            .unwrap_or_else(Problem::into_response),
    )
}

async fn page(app: &App, parts: &Parts) -> Result<Response, Problem> {
    let query = Query::parse(parts.uri.query(), PARAMETERS, &app.limits)?;
    let whole = range(&query);
    let cursor = Cursor::new(&whole, query.reverse);
    let range = match &query.cursor {
        None => whole,
        Some(text) => cursor.rest(text, whole)?,
    };
    // No single node leads all that a listing spans: this one gathers it, whatever `proxy` says.
    let options = crate::api::store::Options {
        routing: Routing::Proxy,
        ..query.options
    };
    let request = ScanRequest {
        range,
        reverse: query.reverse,
        limit: query.limit,
        keys_only: query.keys_only,
    };
    let page = match app.store.scan(request, options).await {
        Ok(page) => page,
        Err(failure) => return Ok(problem::respond(failure, &parts.uri)),
    };
    let next_cursor = match (page.more, page.items.last()) {
        (false, _) => None,
        (true, Some(last)) => Some(cursor.after(&last.key)),
        // Nothing to go on from. To end the listing here would hide keys.
        (true, None) => {
            return Err(
                Problem::new(Code::Unavailable, "no shard gave a page").retry_after_ms(1000)
            );
        }
    };
    let in_json = |_, item: &Item| ItemJson::new(item, query.keys_only);
    let bytes = page
        .items
        .iter()
        .map(|item| item.key.len() + item.record.value.len())
        .sum();
    let body = PageJson {
        items: LazyList {
            items: &page.items,
            make: &in_json,
        },
        next_cursor,
    };
    let mut response = blocking::work(bytes, || json(StatusCode::OK, &body));
    if query.options.consistency == Consistency::Stale {
        // Each shard has an age of its own, and a page does not carry them.
        response.headers_mut().insert(STALENESS, staleness(None));
    }
    Ok(response)
}

/// Returns the keys that `prefix`, `start` and `end` all allow; never the reserved ones, which are
/// the last of all.
fn range(query: &Query) -> ScanRange {
    let start = query.start.clone().max(query.prefix.clone());
    let reserved = Some(Bytes::from_static(&RESERVED_PREFIX));
    let end = [after_prefix(&query.prefix), query.end.clone(), reserved]
        .into_iter()
        .flatten()
        .min();
    ScanRange { start, end }
}

/// Makes and reads the cursors of one listing: the key that the next page begins after, bound to
/// the range and the direction, so that one that strayed into another listing is refused.
struct Cursor {
    listing: [u8; 8],
    reverse: bool,
}

/// The first byte of a cursor.
const CURSOR_FORMAT: u8 = 1;

impl Cursor {
    fn new(range: &ScanRange, reverse: bool) -> Self {
        let mut hash = Xxh3::new();
        hash.update(&[u8::from(reverse), u8::from(range.end.is_some())]);
        hash.update(&(range.start.len() as u64).to_be_bytes());
        hash.update(&range.start);
        hash.update(range.end.as_deref().unwrap_or_default());
        Self {
            listing: hash.digest().to_be_bytes(),
            reverse,
        }
    }

    /// Returns the cursor of the page after `key`.
    fn after(&self, key: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode([&[CURSOR_FORMAT], &self.listing[..], key].concat())
    }

    /// Returns the part of `range` that is left after the cursor `text`.
    fn rest(&self, text: &[u8], range: ScanRange) -> Result<ScanRange, Problem> {
        let bad = || {
            Problem::new(Code::InvalidQuery, "'cursor' is not one of this listing")
                .extension("parameter", "cursor")
        };
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| bad())?;
        let key = match bytes.split_first() {
            Some((&CURSOR_FORMAT, bound)) => {
                bound.strip_prefix(&self.listing[..]).ok_or_else(bad)?
            }
            _ => return Err(bad()),
        };

        // A client can make up the key in a cursor, so it need not lie in the range.
        let inside = range.start <= *key && range.end.as_ref().is_none_or(|end| *key < **end);
        match (inside, self.reverse) {
            (false, _) => Err(bad()),
            (true, false) => Ok(ScanRange {
                start: Bytes::from([key, &[0]].concat()),
                end: range.end,
            }),
            (true, true) => Ok(ScanRange {
                start: range.start,
                end: Some(Bytes::copy_from_slice(key)),
            }),
        }
    }
}
