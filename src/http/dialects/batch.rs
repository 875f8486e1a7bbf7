//! Writes of many pairs: shard by shard, in log entries of about a mebibyte.
//!
//! A batch is not atomic. The pairs of one shard are written in their order, one entry after the other, so that of pairs with the same key
//! the last wins; shards are written side by side. A shard whose leader is lost on the way goes on with the next entry; one that has taken
//! nothing for as long as an answer is waited for is given up, so that without a quorum all its entries cost one wait.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, sleep};

use super::{PATIENCE, Refusal, bits, options};
use crate::client::store::{Options, Store, WriteFailure};
use crate::sm::kv::{Action, Condition, Media, Operation};
use crate::types::GroupId;

/// What goes into one entry: enough to be worth its fsync, and too little to hold up what comes after it. Small pairs are bounded by their
/// number: it is what an entry takes to be applied, and each must be answered in time.
const ENTRY_BYTES: usize = 1 << 20;
const ENTRY_OPERATIONS: usize = 2000;

/// After an entry that failed: what refuses at once must not refuse the whole rest within a moment.
const PAUSE: Duration = Duration::from_millis(200);

/// What is to be stored, and under which key. Both have a length that the store takes.
#[derive(Debug, Clone)]
pub struct Pair {
    pub key: Bytes,
    pub value: Bytes,
    pub kind: Kind,
}

/// The media types that batches write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Bits,
}

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Written {
    /// The places of pairs that are not known to be stored, in order.
    pub failed: Vec<usize>,
    /// Why, of one of them.
    pub failure: Option<Refusal>,
    /// Shards that took at least one entry.
    pub shards: usize,
}

pub async fn write(store: &dyn Store, pairs: &[Pair]) -> Written {
    let map = match store.map(options()).await {
        Ok(map) => map,
        Err(failure) => return Written { failed: (0..pairs.len()).collect(), failure: Some(failure.into()), shards: 0 },
    };
    let mut shards: BTreeMap<GroupId, Vec<usize>> = BTreeMap::new();
    for (place, pair) in pairs.iter().enumerate() {
        shards.entry(map.owner_of(&pair.key)).or_default().push(place);
    }
    let shards = shards.into_values().map(|places| write_shard(store, pairs, places));
    let mut whole = Written::default();
    // All at once: where there is no quorum they all wait the same time. Together they hold no more than the batch does.
    let mut parts: FuturesUnordered<_> = shards.collect();
    while let Some(part) = parts.next().await {
        whole.failed.extend(part.failed);
        whole.failure = whole.failure.or(part.failure);
        whole.shards += part.shards;
    }
    whole.failed.sort_unstable();
    whole
}

/// The pairs at `places`, which one shard owns as far as is known.
async fn write_shard(store: &dyn Store, pairs: &[Pair], places: Vec<usize>) -> Written {
    let mut rest = &places[..];
    let mut written = Written::default();
    let mut taken = Instant::now();
    while !rest.is_empty() {
        let timeout = PATIENCE.saturating_sub(taken.elapsed());
        if timeout.is_zero() {
            written.failed.extend(rest);
            return written;
        }
        let (entry, after) = rest.split_at(entry_len(pairs, rest));
        let operations = entry.iter().map(|place| pairs[*place].operation()).collect();
        let answers = store.write(operations, None, Options { timeout, ..options() }).await;
        let failed_before = written.failed.len();
        for (at, place) in entry.iter().enumerate() {
            match answers.get(at) {
                Some(Ok(_)) => written.shards = 1,
                Some(Err(WriteFailure::Failed(failure))) => written.fail(*place, failure.clone().into()),
                Some(Err(WriteFailure::Rejected(_))) | None => written.fail(*place, Refusal::unanswered()),
            }
        }
        if written.failed.len() == failed_before {
            taken = Instant::now();
        } else {
            sleep(PAUSE).await;
        }
        rest = after;
    }
    written
}

impl Written {
    fn fail(&mut self, place: usize, failure: Refusal) {
        self.failed.push(place);
        self.failure.get_or_insert(failure);
    }
}

impl Pair {
    fn operation(&self) -> Operation {
        let media = match self.kind {
            Kind::Text => Media::Text,
            Kind::Bits => bits::media(),
        };
        let action = Action::Put { media, value: self.value.clone() };
        Operation { key: self.key.clone(), condition: Condition::None, action }
    }
}

/// How many of the pairs at `places` make the next entry: one at least.
fn entry_len(pairs: &[Pair], places: &[usize]) -> usize {
    let mut bytes = 0;
    let fits = |place: &usize| {
        bytes += pairs[*place].key.len() + pairs[*place].value.len();
        bytes <= ENTRY_BYTES
    };
    let fitting = places.iter().take(ENTRY_OPERATIONS).map(fits).take_while(|fits| *fits).count();
    fitting.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(values: &[usize]) -> Vec<Pair> {
        let pair = |bytes: &usize| Pair { key: Bytes::from_static(b"k"), value: vec![b'v'; *bytes].into(), kind: Kind::Text };
        values.iter().map(pair).collect()
    }

    #[test]
    fn an_entry_is_about_a_mebibyte_and_has_one_pair_at_least() {
        let half = ENTRY_BYTES / 2 - 1;
        for (values, len) in
            [(vec![half, half, 1], 2), (vec![8 << 20, 1], 1), (vec![1, 8 << 20], 1), (vec![0; 20_000], ENTRY_OPERATIONS)]
        {
            let places: Vec<usize> = (0..values.len()).collect();
            assert_eq!(entry_len(&pairs(&values), &places), len);
        }
    }
}
