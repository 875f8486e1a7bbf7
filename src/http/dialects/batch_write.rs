//! Writes of many pairs: shard by shard, in log entries of up to a mebibyte.
//!
//! A batch is not atomic. The pairs of one shard are written in their order, one entry after the
//! other, so that of pairs with the same key the last wins; shards are written side by side.
//!
//! A batch has no deadline of its own: it may be long. Each entry is waited for as long as its
//! shard is seen to have a quorum, within bounds; where it has none, that is found out by a read,
//! and the rest of the shard is given up in the time in which the contracts promise a word. What
//! was certainly not done is tried again; of what may have been done nothing is, it is reported.
//! Entries begin small and grow while they are taken quickly, so that a machine that is overloaded
//! takes a little at a time instead of nothing.

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, sleep, timeout};

use super::bit_strings;
use super::error::DialectError;
use super::request::{ANSWER_TIMEOUT, options};
use crate::api::store::{Failure, Options, Store, WriteFailure, Written as Answer};
use crate::sm::kv::{Action, Condition, Media, Operation};
use crate::types::GroupId;

/// Size of one entry: enough to be worth its fsync, and too little to delay what comes after it.
const ENTRY_BYTES: usize = 1 << 20;

/// Small pairs are bounded by their number: it is what an entry takes to be applied. The first
/// entry of a shard has this many at most, those after it more or fewer, as quickly as it takes
/// them.
const OPERATIONS_AT_FIRST: usize = 500;
const OPERATIONS_MIN: usize = 50;
const OPERATIONS_MAX: usize = 2000;
/// An entry that is taken within the first is followed by a larger one, one that takes longer than
/// the second by a smaller one.
const FAST_ENTRY: Duration = Duration::from_millis(250);
const SLOW_ENTRY: Duration = Duration::from_secs(1);

/// An entry without an answer for so long makes us look for the quorum, and how long that is waited
/// for: together [`ANSWER_TIMEOUT`].
const QUORUM_CHECK_AFTER: Duration = Duration::from_millis(3500);
const QUORUM_CHECK_TIMEOUT: Duration = Duration::from_millis(1000);
/// Then it is not known what became of the entry. Its leader may be lost, although there is a
/// quorum.
const ENTRY_TIMEOUT: Duration = Duration::from_secs(10);
/// A shard that has taken nothing for so long is given up, though it has a quorum.
const STALL_MAX: Duration = Duration::from_secs(20);

/// After an entry that was not taken: what refuses at once must not be asked again within a moment.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// A key and the value to be stored under it. Both have a length that the store takes.
#[derive(Debug, Clone)]
pub struct Pair {
    pub key: Bytes,
    pub value: Bytes,
    pub encoding: PairEncoding,
}

/// The media types that batches write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairEncoding {
    Text,
    Bits,
}

/// The outcome of a batch.
#[derive(Debug, Default)]
pub struct BatchOutcome {
    /// The places of pairs that are not known to be stored, in order.
    pub failed: Vec<usize>,
    /// The reason of one of them.
    pub failure: Option<DialectError>,
    /// Shards that took at least one entry.
    pub shards: usize,
}

/// Writes the pairs to their shards, and returns which are not known to be stored.
pub async fn write(store: &dyn Store, pairs: &[Pair]) -> BatchOutcome {
    let map = match store.map(options()).await {
        Ok(map) => map,
        Err(failure) => {
            return BatchOutcome {
                failed: (0..pairs.len()).collect(),
                failure: Some(failure.into()),
                shards: 0,
            };
        }
    };

    // By the map of this moment. Where a slot moves meanwhile, the store splits the entry again.
    let mut shards: BTreeMap<GroupId, Vec<usize>> = BTreeMap::new();
    for (index, pair) in pairs.iter().enumerate() {
        shards
            .entry(map.owner_of(&pair.key))
            .or_default()
            .push(index);
    }
    let shards = shards
        .into_values()
        .map(|indices| write_shard(store, pairs, indices));
    let mut whole = BatchOutcome::default();
    // All at once: where there is no quorum they all wait the same time. Together they hold no more
    // than the batch does.
    let mut parts: FuturesUnordered<_> = shards.collect();
    while let Some(part) = parts.next().await {
        whole.failed.extend(part.failed);
        whole.failure = whole.failure.or(part.failure);
        whole.shards += part.shards;
    }
    whole.failed.sort_unstable();
    assert!(
        whole.failed.is_sorted_by(|one, next| one < next),
        "each pair fails once"
    );
    whole
}

/// Writes the pairs at `indices`, which one shard owns according to the map.
async fn write_shard(store: &dyn Store, pairs: &[Pair], indices: Vec<usize>) -> BatchOutcome {
    let mut rest = VecDeque::from(indices);
    let mut outcome = BatchOutcome::default();
    let (mut last_progress, mut operations_max) = (Instant::now(), OPERATIONS_AT_FIRST);
    while !rest.is_empty() {
        let len = entry_len(pairs, rest.iter(), operations_max);
        assert!((1..=rest.len()).contains(&len), "each entry takes a pair");
        let entry: Vec<usize> = rest.drain(..len).collect();
        let begun = Instant::now();
        let answers = write_entry(store, entry.iter().map(|index| &pairs[*index])).await;
        let has_answered = answers.is_some();
        let EntryOutcome { retry, unfinished } =
            outcome.record_answers(&entry, answers.unwrap_or_default());
        // Back to the front, in their order: of pairs with one key the last must win.
        for index in retry.into_iter().rev() {
            rest.push_front(index);
        }
        operations_max = next_operations_max(operations_max, begun.elapsed(), unfinished.is_none());

        let Some(failure) = unfinished else {
            last_progress = Instant::now();
            continue;
        };

        // Without a quorum the rest would fail one entry after the other, each after its timeout.
        let Some(next) = rest.front() else { break };
        let patience = ANSWER_TIMEOUT
            .saturating_sub(last_progress.elapsed())
            .max(QUORUM_CHECK_TIMEOUT);
        if !has_answered
            || last_progress.elapsed() > STALL_MAX
            || !has_quorum(store, &pairs[*next].key, patience).await
        {
            rest.drain(..)
                .for_each(|index| outcome.fail(index, failure.clone().into()));
        } else {
            sleep(RETRY_PAUSE).await;
        }
    }
    outcome
}

/// Writes one entry, and waits for it as long as its shard has a quorum. None: it has none, and
/// nobody knows what became of the entry.
async fn write_entry<'a>(
    store: &dyn Store,
    pairs: impl Iterator<Item = &'a Pair>,
) -> Option<Vec<Answer>> {
    let operations: Vec<Operation> = pairs.map(Pair::operation).collect();
    let key = operations.first()?.key.clone();
    let mut write = pin!(store.write(
        operations,
        None,
        Options {
            timeout: ENTRY_TIMEOUT,
            ..options()
        }
    ));

    // While there is a quorum a slow write is waited for: of one that is dropped nobody knows the
    // end.
    loop {
        match timeout(QUORUM_CHECK_AFTER, &mut write).await {
            Ok(answers) => return Some(answers),
            Err(_) if has_quorum(store, &key, QUORUM_CHECK_TIMEOUT).await => {}
            Err(_) => return None,
        }
    }
}

/// Returns true if the shard of a key answers a linearizable read, or has too much to do to answer
/// it.
async fn has_quorum(store: &dyn Store, key: &Bytes, patience: Duration) -> bool {
    match store
        .get(
            key.clone(),
            Options {
                timeout: patience,
                ..options()
            },
        )
        .await
    {
        // A shard that refuses for having too much to do is there, and will take more later.
        Ok(_) | Err(Failure::Overloaded { .. }) => true,
        Err(_) => false,
    }
}

/// The outcome of an entry.
struct EntryOutcome {
    /// Pairs that were certainly not stored.
    retry: Vec<usize>,
    /// The reason why the entry was not taken as a whole.
    unfinished: Option<Failure>,
}

impl BatchOutcome {
    fn record_answers(&mut self, entry: &[usize], answers: Vec<Answer>) -> EntryOutcome {
        let mut entry_outcome = EntryOutcome {
            retry: Vec::new(),
            unfinished: None,
        };
        let unanswered = || Failure::Unknown {
            reason: "there was no answer".to_owned(),
        };
        for (at, index) in entry.iter().enumerate() {
            let failure = match answers.get(at) {
                Some(Ok(_)) => {
                    self.shards = 1;
                    continue;
                }
                Some(Err(WriteFailure::Failed(failure))) => failure.clone(),
                // Without conditions and idempotency keys no rejection is final, so none is
                // expected here.
                Some(Err(WriteFailure::Rejected(_))) | None => unanswered(),
            };
            match &failure {
                // Certainly not done, so it can be tried again.
                Failure::Overloaded { .. }
                | Failure::Unavailable { .. }
                | Failure::Elsewhere { .. } => entry_outcome.retry.push(*index),
                // An unknown pair may be stored after a later one of the same key, so it is only
                // reported.
                Failure::Unknown { .. } | Failure::Invalid { .. } | Failure::TooLarge { .. } => {
                    self.fail(*index, failure.clone().into());
                }
            }
            entry_outcome.unfinished.get_or_insert(failure);
        }
        entry_outcome
    }

    fn fail(&mut self, index: usize, failure: DialectError) {
        self.failed.push(index);
        self.failure.get_or_insert(failure);
    }
}

impl Pair {
    fn operation(&self) -> Operation {
        let media = match self.encoding {
            PairEncoding::Text => Media::Text,
            PairEncoding::Bits => bit_strings::media(),
        };
        let action = Action::Put {
            media,
            value: self.value.clone(),
        };
        Operation {
            key: self.key.clone(),
            condition: Condition::None,
            action,
        }
    }
}

/// Returns how many operations the next entry may have, after one with `current` that took so long
/// and was taken or not.
fn next_operations_max(current: usize, took: Duration, was_taken: bool) -> usize {
    let next = match took {
        _ if !was_taken => current / 2,
        took if took < FAST_ENTRY => current * 2,
        took if took > SLOW_ENTRY => current / 2,
        _ => current,
    };
    next.clamp(OPERATIONS_MIN, OPERATIONS_MAX)
}

/// Returns how many of the pairs at `indices` make the next entry: at least one.
fn entry_len<'a>(
    pairs: &[Pair],
    indices: impl Iterator<Item = &'a usize>,
    operations_max: usize,
) -> usize {
    let mut bytes = 0;
    let fits = |index: &usize| {
        bytes += pairs[*index].key.len() + pairs[*index].value.len();
        bytes <= ENTRY_BYTES
    };
    let fitting = indices
        .take(operations_max)
        .map(fits)
        .take_while(|fits| *fits)
        .count();
    fitting.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::testing::FakeStore;

    fn pairs(values: &[usize]) -> Vec<Pair> {
        let pair = |bytes: &usize| Pair {
            key: Bytes::from_static(b"k"),
            value: vec![b'v'; *bytes].into(),
            encoding: PairEncoding::Text,
        };
        values.iter().map(pair).collect()
    }

    #[test]
    fn an_entry_is_about_a_mebibyte_and_has_one_pair_at_least() {
        let half = ENTRY_BYTES / 2 - 1;
        for (values, len) in [
            (vec![half, half, 1], 2),
            (vec![8 << 20, 1], 1),
            (vec![1, 8 << 20], 1),
            (vec![0; 20_000], OPERATIONS_MAX),
        ] {
            let indices: Vec<usize> = (0..values.len()).collect();
            assert_eq!(
                entry_len(&pairs(&values), indices.iter(), OPERATIONS_MAX),
                len
            );
        }
    }

    #[test]
    fn entries_grow_while_they_are_taken_quickly_and_shrink_while_they_are_not() {
        let ms = Duration::from_millis;
        let sizes = |took: &[u64]| {
            let mut size = OPERATIONS_AT_FIRST;
            let next = |took: &u64| {
                let after = next_operations_max(size, ms(*took), true);
                std::mem::replace(&mut size, after)
            };
            took.iter().map(next).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[1, 1, 1, 1]), [500, 1000, 2000, 2000]);
        assert_eq!(next_operations_max(500, ms(1), false), 250);
        assert_eq!(
            sizes(&[500, 4000, 4000, 500, 4000, 4000, 1]),
            [500, 500, 250, 125, 125, 62, 50]
        );
    }

    /// So many pairs of keys of one shard, each with its number for a value; the keys come round
    /// again after `keys`.
    fn numbered(count: usize, keys: usize) -> Vec<Pair> {
        let pair = |n: usize| Pair {
            key: format!("k{}", n % keys).into(),
            value: n.to_string().into(),
            encoding: PairEncoding::Text,
        };
        (0..count).map(pair).collect()
    }

    fn one_shard() -> FakeStore {
        let store = FakeStore::default();
        store.set_nodes(&["a:1"]);
        store
    }

    /// Returns what becomes of a batch, and how long that takes, by the clock of the test.
    async fn write_timed(store: &FakeStore, pairs: &[Pair]) -> (BatchOutcome, Duration) {
        let begun = Instant::now();
        let outcome = write(store, pairs).await;
        (outcome, begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_moves_is_waited_for_however_slowly() {
        for (slowness_ms, count) in [(3000, 3000), (9000, 700)] {
            let store = one_shard();
            store.slow_down_writes(Duration::from_millis(slowness_ms));
            let (outcome, took) = write_timed(&store, &numbered(count, count)).await;
            assert_eq!(outcome.failed, [0; 0], "{:?}", outcome.failure);
            assert!(took > Duration::from_secs(5), "nothing was slow: {took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_quorum_it_is_given_up_in_the_promised_time() {
        let no_quorum = Failure::Unavailable {
            reason: "no quorum".into(),
            retry_after_ms: 1000,
        };
        let store = one_shard();
        store.slow_down_writes(Duration::from_secs(3600));
        store.slow_down_reads(Duration::from_secs(3600));
        let (all, took) = write_timed(&store, &numbered(3000, 3000)).await;
        assert_eq!((all.failed.len(), took), (3000, ANSWER_TIMEOUT));
        let store = one_shard();
        store.fail(1, no_quorum);
        let (all, _) = write_timed(&store, &numbered(3000, 3000)).await;
        assert_eq!(
            (
                all.failed.len(),
                all.failure.map(|failure| failure.status.as_u16())
            ),
            (3000, Some(503))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_shard_that_only_reads_is_given_up_in_the_end() {
        let store = one_shard();
        store.slow_down_writes(Duration::from_secs(3600));
        let (all, took) = write_timed(&store, &numbered(3000, 3000)).await;
        assert_eq!(all.failed.len(), 3000);
        assert!(
            took < STALL_MAX + ENTRY_TIMEOUT + QUORUM_CHECK_AFTER,
            "{took:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_certainly_not_done_is_done_in_its_turn() {
        for failure in [
            Failure::Overloaded {
                limit: "all".into(),
                retry_after_ms: 1000,
            },
            Failure::Unavailable {
                reason: "no leader".into(),
                retry_after_ms: 1000,
            },
        ] {
            let store = one_shard();
            store.fail_next_write(failure);
            let (all, _) = write_timed(&store, &numbered(2500, 600)).await;
            assert_eq!(all.failed, [0; 0], "{:?}", all.failure);
            let last = store.record(b"k99").expect("it is stored").value;
            assert_eq!(last, "2499", "of pairs with the same key the last wins");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_have_been_done_is_reported_and_not_repeated() {
        let store = one_shard();
        store.fail_next_write(Failure::Unknown {
            reason: "the leader was lost".into(),
        });
        let (all, _) = write_timed(&store, &numbered(2500, 2500)).await;
        assert_eq!(all.failed, (0..OPERATIONS_AT_FIRST).collect::<Vec<_>>());
        assert!(store.record(b"k0").is_none() && store.record(b"k500").is_some());
    }
}
