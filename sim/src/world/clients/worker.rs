//! [`Client`]: one who reads and writes, by one way or another.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use quorate::client::remote::RemoteStore;
use quorate::types::Address;
use tokio::time::Instant;

use super::book::{Book, Times};
use super::http::HttpClient;
use super::writes::Way;
use crate::world::random::SimRng;

/// Half of all requests are about so many keys.
const HOT_KEYS: u64 = 3;
/// Counts of one client. Each is compared with the history of every key.
const COUNTS_MAX: u32 = 2;

pub struct Client {
    pub id: usize,
    pub store: RemoteStore,
    pub http: HttpClient,
    /// The nodes, and the gateway as the last.
    pub servers: Vec<Address>,
    /// The numbers of keys that have a slot in common.
    pub groups: Vec<Vec<usize>>,
    pub book: Arc<Mutex<Book>>,
    pub began: Instant,
    pub random: SimRng,
    pub counts: u32,
}

impl Client {
    pub async fn run(mut self) {
        while !self.book.lock().is_over {
            self.act().await;
            let pause = self.random.between(1, 40);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.book.lock().working -= 1;
    }

    async fn act(&mut self) {
        let key = self.draw_key();
        match self.random.below(100) {
            0..30 => self.get(key).await,
            30..60 => {
                let intent = self.intend(key, false);
                self.write(vec![intent], false).await;
            }
            60..70 => {
                let keys = self.draw_group();
                let reads_only = self.random.percent(30);
                let intents = keys
                    .into_iter()
                    .map(|key| match reads_only {
                        true => super::writes::Intent::get(key),
                        false => self.intend(key, true),
                    })
                    .collect();
                self.write(intents, true).await;
            }
            70..74 => {
                let keys = self.draw_keys();
                let intents = keys.into_iter().map(|key| self.intend(key, true));
                let intents = intents.collect();
                self.write(intents, false).await;
            }
            74..77 => {
                let keys = self.draw_keys();
                self.get_many(&keys).await;
            }
            77..80 => self.list().await,
            80..82 if self.counts < COUNTS_MAX => {
                self.counts += 1;
                self.count().await;
            }
            80..86 => self.get_stale(key).await,
            86..92 => self.use_kvs(key).await,
            92..96 => {
                let keys = self.draw_keys();
                self.use_encoded_batch(&keys).await;
            }
            _ => {
                let keys = self.draw_keys();
                self.use_plain_batch(&keys).await;
            }
        }
    }

    /// Draws a key, half of the time one of the few that are hot.
    fn draw_key(&mut self) -> usize {
        let count = self.book.lock().key_count();
        match self.random.percent(50) {
            true => self.random.below(HOT_KEYS) as usize % count,
            false => self.random.below(count as u64) as usize,
        }
    }

    /// Draws some keys, none of them twice.
    fn draw_keys(&mut self) -> Vec<usize> {
        let count = self.random.between(1, 6);
        let mut keys: Vec<usize> = (0..count).map(|_| self.draw_key()).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Draws keys that have a slot in common.
    fn draw_group(&mut self) -> Vec<usize> {
        let mut keys = self.random.pick(&self.groups).clone();
        if self.random.percent(30) {
            let left_out = self.random.below(keys.len() as u64) as usize;
            keys.remove(left_out);
        }
        keys
    }

    /// Draws the way of a request.
    pub fn way(&mut self) -> Way {
        match self.random.percent(50) {
            true => Way::Store,
            false => Way::Http(self.random.pick(&self.servers).clone()),
        }
    }

    /// Returns the times of what was called then, and is answered now.
    pub fn times(&self, called: Duration) -> Times {
        Times {
            client: self.id,
            called,
            returned: self.began.elapsed(),
        }
    }

    pub fn key(&self, key: usize) -> Bytes {
        let book = self.book.lock();
        Bytes::copy_from_slice(book.keys()[key].as_bytes())
    }
}

/// Returns a key as it stands in a path.
pub fn in_path(key: &[u8]) -> String {
    key.iter()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => char::from(*byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}
