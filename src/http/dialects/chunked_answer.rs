//! Answers that are made while they are sent, piece by piece, so that memory does not grow with
//! them.
//!
//! An answer that is short is held back until it is complete: then a failure on the way is still a
//! 503. A long one that fails is broken off, and never ends well-formed.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use http::StatusCode;

use super::error::DialectError;
use super::json_list::BudgetedVec;
use super::request::options;
use super::response::{JSON, answer};
use crate::api::store::{Failure, GetManyRequest, Item, ScanRange, ScanRequest, Store};
use crate::budget::{Budget, UNCHARGED_BYTES_MAX};
use crate::http::answer_budget::{AlreadyCharged, charge_chunk};
use crate::sm::kv::Record;
use crate::telemetry::rarely;

/// An answer up to this size is held back.
const BUFFERED_BYTES_MAX: usize = 8 << 20;
/// About how large a piece is; one value may be larger.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Keys and values that are read at once.
const READ_BYTES: usize = 4 << 20;
const READ_KEYS_MAX: usize = 10_000;
const READ_KEYS_MIN: usize = 16;
/// Items of a page of all that is stored.
const PAGE_ITEMS: usize = 2000;

/// A JSON text in pieces.
pub trait JsonChunks: Send + 'static {
    /// Returns the next chunk; None after the last.
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, Failure>>;
}

/// Answers 200 with the text. Every chunk is charged to `answers` until it is sent.
pub async fn respond(
    answers: &Arc<Budget>,
    chunks: impl JsonChunks,
) -> Result<Response, DialectError> {
    let initial = (chunks, Arc::clone(answers));
    let mut rest = futures::stream::try_unfold(initial, |(mut chunks, answers)| async move {
        let Some(chunk) = chunks.next().await? else {
            return Ok::<_, Failure>(None);
        };
        let chunk = charge_chunk(chunk, &answers)?;
        Ok(Some((chunk, (chunks, answers))))
    })
    .boxed();
    let (mut buffered, mut bytes) = (Vec::new(), 0);
    while let Some(chunk) = rest.try_next().await? {
        bytes += chunk.len();
        buffered.push(chunk);
        // Too long to hold back: from here on a failure can only break the answer off.
        if bytes > BUFFERED_BYTES_MAX {
            let rest =
                rest.inspect_err(|failure| rarely!(warn, %failure, "a long answer is broken off"));
            let whole = futures::stream::iter(buffered).map(Ok).chain(rest);
            return Ok(answer(StatusCode::OK, JSON, Body::from_stream(whole)));
        }
    }
    let mut response = answer(StatusCode::OK, JSON, join(buffered, answers)?);
    response.extensions_mut().insert(AlreadyCharged);
    Ok(response)
}

/// Joins charged pieces. They go when they are joined; while there is both, both is charged.
fn join(mut chunks: Vec<Bytes>, answers: &Arc<Budget>) -> Result<Bytes, Failure> {
    if chunks.len() == 1 {
        return Ok(chunks.swap_remove(0));
    }
    let bytes: usize = chunks.iter().map(Bytes::len).sum();
    if bytes <= UNCHARGED_BYTES_MAX {
        return Ok(Bytes::from(chunks.concat()));
    }
    let share = answers
        .take(bytes)
        .ok_or_else(|| Failure::no_room(answers))?;
    Ok(share.hold(Bytes::from(chunks.concat())))
}

/// Appends a string to a JSON text, quoted and escaped.
pub fn push_text(json: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(json, text).expect("writing a string to memory does not fail");
}

/// Looks keys up in their order, many at a time.
pub struct KeyLookup {
    store: Arc<dyn Store>,
    keys: BudgetedVec<Bytes>,
    keys_only: bool,
    /// Keys asked for next: fewer where values are large.
    window: usize,
    read: std::vec::IntoIter<Option<Record>>,
    next: usize,
}

impl KeyLookup {
    /// An empty key stands for one that can't exist.
    pub fn new(store: Arc<dyn Store>, keys: BudgetedVec<Bytes>, keys_only: bool) -> Self {
        Self {
            store,
            keys,
            keys_only,
            window: READ_KEYS_MAX,
            read: Vec::new().into_iter(),
            next: 0,
        }
    }

    pub fn key(&self, index: usize) -> &Bytes {
        &self.keys[index]
    }

    /// Returns the index of the next key, and what is stored under it.
    pub async fn next(&mut self) -> Result<Option<(usize, Option<Record>)>, Failure> {
        let index = self.next;
        let Some(key) = self.keys.get(index) else {
            return Ok(None);
        };
        self.next += 1;

        // It is not asked for, but has its place in the answer.
        if key.is_empty() {
            return Ok(Some((index, None)));
        }
        if self.read.len() == 0 {
            self.read_from(index).await?;
        }
        let unanswered = || Failure::Unknown {
            reason: "the store gave no answer".to_owned(),
        };
        let record = self.read.next().ok_or_else(unanswered)?;
        Ok(Some((index, record)))
    }

    async fn read_from(&mut self, index: usize) -> Result<(), Failure> {
        // The first key is taken whatever its length, or the lookup would get no further.
        let (mut bytes, mut count) = (0, 0);
        let wanted = self.keys[index..].iter().filter(|key| !key.is_empty());
        let keys: Vec<Bytes> = wanted
            .take(self.window)
            .take_while(|key| {
                count += 1;
                bytes += key.len();
                count == 1 || bytes <= READ_BYTES
            })
            .cloned()
            .collect();
        let requested = keys.len();
        let request = GetManyRequest {
            keys,
            bytes_max: READ_BYTES,
            keys_only: self.keys_only,
        };
        let records = self.store.get_many(request, options()).await?;

        // Values are large where fewer came than were asked for: what did not fit is asked for
        // twice.
        self.window = if records.len() < requested {
            2 * records.len()
        } else {
            2 * self.window
        };
        self.window = self.window.clamp(READ_KEYS_MIN, READ_KEYS_MAX);
        self.read = records.into_iter();
        Ok(())
    }
}

/// Everything that is stored, in key order.
pub struct FullScan {
    store: Arc<dyn Store>,
    page: std::vec::IntoIter<Item>,
    /// Start of the next page; None after the last.
    start: Option<Bytes>,
}

impl FullScan {
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            page: Vec::new().into_iter(),
            start: Some(Bytes::new()),
        }
    }

    pub async fn next(&mut self) -> Result<Option<Item>, Failure> {
        loop {
            if let Some(item) = self.page.next() {
                return Ok(Some(item));
            }
            let Some(start) = self.start.take() else {
                return Ok(None);
            };
            let range = ScanRange { start, end: None };
            let request = ScanRequest {
                range,
                reverse: false,
                limit: PAGE_ITEMS,
                keys_only: false,
            };
            let page = self.store.scan(request, options()).await?;
            self.start = match (page.more, page.items.last()) {
                (false, _) => None,
                (true, Some(last)) => Some(Bytes::from([&last.key[..], &[0]].concat())),
                // Nothing to go on from. To end here would hide keys.
                (true, None) => {
                    return Err(Failure::Unavailable {
                        reason: "no shard gave a page".to_owned(),
                        retry_after_ms: 1000,
                    });
                }
            };
            self.page = page.items.into_iter();
        }
    }
}
