//! Reads: of one key or many, listings, counts, and such as may be old.

use std::time::Duration;

use bytes::Bytes;
use http::Method;
use quorate::api::store::{Failure, GetManyRequest, ScanRange, ScanRequest, Store};
use quorate::client::remote::RemoteStore;
use quorate::types::Address;
use quorate_sim::history::{Action, Outcome, Value};
use serde_json::Value as Json;

use super::book::{Answer, Times};
use super::http::Ask;
use super::options;
use super::worker::{Client, in_path};
use super::writes::{Way, value_of};

/// Pages that a listing may take.
const PAGES_MAX: usize = 60;
/// Added to the number of a client, to tell such reads apart in a history.
const STALE_READERS: usize = 1000;

/// Holds what was found of a key: the value and its revision, as far as they were asked for.
pub type Found = Option<(Value, u64)>;

/// A page of a listing.
pub struct Page {
    pub items: Vec<(Bytes, Found)>,
    pub has_more: bool,
}

impl Client {
    pub async fn get(&mut self, key: usize) {
        let called = self.began.elapsed();
        let way = self.way();
        let got = match &way {
            Way::Store => get(&self.store, self.key(key)).await.ok(),
            Way::Http(server) => self.get_over_http(server, key, "").await,
        };
        let answer = got.map_or(Answer::Refused, |got| Answer::Told(Outcome::Got(got)));
        let times = self.times(called);
        self.book.lock().record(key, times, Action::Get, answer);
    }

    /// Reads what the replica at hand has: what the key held at some time.
    ///
    /// The replica says, too, how old that is. It is not looked at: a follower counts from when it
    /// was told by its leader, and what it was told may have been on its way for long.
    pub async fn get_stale(&mut self, key: usize) {
        let server = self.random.pick(&self.servers).clone();
        let got = self.get_over_http(&server, key, "&consistency=stale").await;
        let answer = got.map_or(Answer::Refused, |got| Answer::Told(Outcome::Got(got)));
        let times = Times {
            client: STALE_READERS + self.id,
            ..self.times(Duration::ZERO)
        };
        self.book.lock().record_stale(key, times, answer);
    }

    async fn get_over_http(&self, server: &Address, key: usize, query: &str) -> Option<Found> {
        let path = format!("/v1/kv/{}?timeout=3s{query}", in_path(&self.key(key)));
        let reply = self.http.ask(server, &Ask::new(Method::GET, path)).await;
        let reply = reply.ok()?;
        match reply.status.as_u16() {
            200 => Some(Some((value_of(&reply.body), reply.revision()?))),
            404 => Some(None),
            _ => None,
        }
    }

    /// Reads several keys, each by itself.
    pub async fn get_many(&mut self, keys: &[usize]) {
        let called = self.began.elapsed();
        let request = GetManyRequest {
            keys: keys.iter().map(|key| self.key(*key)).collect(),
            bytes_max: 1 << 20,
            keys_only: false,
        };
        let found = self.store.get_many(request, options()).await;
        let times = self.times(called);
        let mut book = self.book.lock();
        match found {
            Ok(records) => {
                for (key, record) in keys.iter().zip(records) {
                    let got = record.map(|record| (value_of(&record.value), record.revision.0));
                    let answer = Answer::Told(Outcome::Got(got));
                    book.record(*key, times, Action::Get, answer);
                }
            }
            Err(_) => book.refuse(),
        }
    }

    /// Lists all keys, page by page. Each page is of one time.
    pub async fn list(&mut self) {
        let keys_only = self.random.percent(50);
        let limit = self.random.between(1, 12) as usize;
        let way = self.way();
        let (mut after, mut cursor) = (None, None);
        for _ in 0..PAGES_MAX {
            let called = self.began.elapsed();
            let page = match &way {
                Way::Store => page(&self.store, after.clone(), limit, keys_only)
                    .await
                    .ok(),
                Way::Http(server) => {
                    let query = format!("limit={limit}&keys_only={keys_only}&timeout=3s");
                    self.page_over_http(server, &query, &mut cursor).await
                }
            };
            let times = self.times(called);
            let mut book = self.book.lock();
            let Some(page) = page else {
                return book.refuse();
            };
            let last = page.items.last().map(|(key, _)| key.clone());
            book.record_page(times, after.as_ref(), &page, keys_only);
            if !page.has_more {
                return;
            }
            after = last;
        }
    }

    async fn page_over_http(
        &self,
        server: &Address,
        query: &str,
        cursor: &mut Option<String>,
    ) -> Option<Page> {
        let mut path = format!("/v1/kv?{query}");
        if let Some(cursor) = cursor {
            path += &format!("&cursor={cursor}");
        }
        let reply = self.http.ask(server, &Ask::new(Method::GET, path)).await;
        let reply = reply.ok().filter(|reply| reply.status.as_u16() == 200)?;
        let body = reply.json()?;
        *cursor = body
            .get("next_cursor")
            .and_then(Json::as_str)
            .map(str::to_owned);
        let items = body.get("items")?.as_array()?;
        let items = items.iter().map(|item| {
            let key = Bytes::copy_from_slice(item.get("key")?.as_str()?.as_bytes());
            let value = item.get("value").and_then(Json::as_str).unwrap_or_default();
            let revision = item.get("revision")?.as_u64()?;
            Some((key, Some((value_of(value.as_bytes()), revision))))
        });
        Some(Page {
            items: items.collect::<Option<_>>()?,
            has_more: cursor.is_some(),
        })
    }

    pub async fn count(&mut self) {
        let called = self.began.elapsed();
        let counted = count(&self.store).await;
        let times = self.times(called);
        let mut book = self.book.lock();
        match counted {
            Ok(keys) => book.record_count(times, keys),
            Err(_) => book.refuse(),
        }
    }
}

/// Reads a key.
pub async fn get(store: &RemoteStore, key: Bytes) -> Result<Found, Failure> {
    let found = store.get(key, options()).await?;
    let record = found.record;
    Ok(record.map(|record| (value_of(&record.value), record.revision.0)))
}

/// Lists keys behind one of them.
pub async fn page(
    store: &RemoteStore,
    after: Option<Bytes>,
    limit: usize,
    keys_only: bool,
) -> Result<Page, Failure> {
    let start = after.map_or(Bytes::new(), |key| Bytes::from([&key[..], &[0]].concat()));
    let request = ScanRequest {
        range: ScanRange { start, end: None },
        reverse: false,
        limit,
        keys_only,
    };
    let page = store.scan(request, options()).await?;
    let items = page.items.into_iter().map(|item| {
        let found = (value_of(&item.record.value), item.record.revision.0);
        (item.key, Some(found))
    });
    Ok(Page {
        items: items.collect(),
        has_more: page.more,
    })
}

/// Counts all keys.
pub async fn count(store: &RemoteStore) -> Result<u64, Failure> {
    let counts = store.count(options()).await?;
    Ok(counts.iter().map(|(_, count)| *count).sum())
}
