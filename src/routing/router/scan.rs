//! Scans: pages of all shards, merged in key order.
//!
//! A scan goes by rounds. In each, every shard is asked for a page from the same key on; what lies
//! before the end of the shortest page is complete, and the next round begins there. A slot's keys
//! are taken from one page alone: a slot that moves while it is scanned may be in two of them, or
//! in none, and then its owner is asked again.

use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::attempt::{Retry, RetryState};
use super::coverage::Coverage;
use super::{Router, ShardAccess, misfit, version};
use crate::api::protocol::{ShardBody, ShardPage, ShardReply};
use crate::api::shard_map::ShardMap;
use crate::api::store::{Failure, Item, MergedPage, Options, ScanRange, ScanRequest};
use crate::sm::slots::slot_of;
use crate::types::GroupId;

/// Keys and values of a page together; a page has at least one item, however large. It bounds what
/// a scan holds in memory.
const PAGE_BYTES_MAX: usize = 8 << 20;
/// The least that a shard is asked for, so that many shards make no tiny pages.
const SHARD_PAGE_BYTES_MIN: usize = 16 << 10;
/// Shards asked at once: with more, memory and connections would grow with the number of shards.
/// Each gives one item at least, which may have 8 MiB, and is there twice while a reply is read: so
/// fewer are asked for values than for keys.
const PARALLEL_MAX: usize = 8;
const PARALLEL_KEYS_MAX: usize = 32;

impl<A: ShardAccess> Router<A> {
    pub(super) async fn scan_shards(
        &self,
        request: ScanRequest,
        options: Options,
    ) -> Result<MergedPage, Failure> {
        let mut retry_state = RetryState::new(options).repeatable();
        let limit = request.limit.max(1);
        let mut range = Some(request.range);
        let mut items: Vec<Item> = Vec::new();
        let mut bytes = 0;

        while let Some(asked) = range.take().filter(|range| !is_empty(range)) {
            assert!(items.len() < limit, "a full page asks for no more");
            let plan = RoundPlan {
                range: asked,
                reverse: request.reverse,
                limit: limit - items.len(),
                keys_only: request.keys_only,
            };

            // Only what lies before the end of the shortest page is complete: beyond it, that
            // page's shard may have keys that it has not sent.
            let round = self.scan_round(&plan, &mut retry_state).await?;
            let complete = round.take(request.reverse);
            range = complete.rest(&plan);
            bytes += complete
                .items
                .iter()
                .map(|item| item.key.len() + item.record.value.len())
                .sum::<usize>();
            items.extend(complete.items);

            // Shards are asked for more than their share, so together they may exceed the limit.
            if items.len() > limit {
                items.truncate(limit);
                return Ok(MergedPage { items, more: true });
            }

            // A page is bounded, and so is memory. The caller asks for the rest with its next page.
            if items.len() == limit || (bytes >= PAGE_BYTES_MAX && !items.is_empty()) {
                return Ok(MergedPage {
                    items,
                    more: range.is_some(),
                });
            }
        }
        Ok(MergedPage { items, more: false })
    }

    /// Asks until every slot is covered.
    async fn scan_round(
        &self,
        plan: &RoundPlan,
        retry_state: &mut RetryState,
    ) -> Result<Round, Failure> {
        // Pages are kept over attempts: only slots that none of them covers are asked for again.
        let mut round = Round::default();
        loop {
            let map = self.access.map();
            let retry = match map.as_deref() {
                None => Retry::no_map(),
                Some(map) => match self
                    .ask_uncovered(map, plan, retry_state, &mut round)
                    .await?
                {
                    None => return Ok(round),
                    Some(retry) => retry,
                },
            };
            self.pause(retry_state, retry, version(map.as_deref()))
                .await?;
        }
    }

    /// Asks the owners of the slots that no page covers yet. Returns None if all are covered now.
    async fn ask_uncovered(
        &self,
        map: &ShardMap,
        plan: &RoundPlan,
        retry_state: &RetryState,
        round: &mut Round,
    ) -> Result<Option<Retry>, Failure> {
        // Slots without an owner have the meta group as theirs, which has no page to give.
        let mut shards: Vec<GroupId> = round
            .coverage
            .missing()
            .map(|slot| map.owner(slot))
            .filter(|id| !id.is_meta())
            .collect();
        shards.sort_unstable();
        shards.dedup();

        let count = map.owners().len();
        let ask = |shard: GroupId| {
            let call = self.call(
                shard,
                plan.body(count, retry_state.options().consistency),
                retry_state.options(),
            );
            async move { (shard, call.await) }
        };

        let mut retry = None;
        let mut rest = shards.into_iter();
        let parallel = if plan.keys_only {
            PARALLEL_KEYS_MAX
        } else {
            PARALLEL_MAX
        };
        let mut running: FuturesUnordered<_> = rest.by_ref().take(parallel).map(ask).collect();

        while let Some((shard, reply)) = running.next().await {
            running.extend(rest.by_ref().take(1).map(ask));
            match reply {
                // Such a page has no last key from which to go on: the scan would never end.
                ShardReply::Page(page) if page.items.is_empty() && page.more => {
                    return Err(misfit(shard));
                }
                ShardReply::Page(page) => round.add(page, plan.reverse),
                // The other replies are still read, so that their slots need not be asked for
                // again.
                ShardReply::NotOwned { slot } => retry = Some(Retry::not_owned(slot)),
                ShardReply::Failed(failure) => retry = Some(retry_state.classify(shard, failure)?),
                ShardReply::Got(_)
                | ShardReply::Written(_)
                | ShardReply::Counted { .. }
                | ShardReply::GotMany(_)
                | ShardReply::Moved(_)
                | ShardReply::MoveState(_) => return Err(misfit(shard)),
            }
        }

        // A slot that no page covers has another owner than the map says.
        let missing = round.coverage.missing().next();
        Ok(missing.map(|slot| retry.unwrap_or_else(|| Retry::not_owned(slot))))
    }
}

/// Plan of one round: what every shard is asked for.
struct RoundPlan {
    range: ScanRange,
    reverse: bool,
    limit: usize,
    keys_only: bool,
}

impl RoundPlan {
    /// Returns the request for one shard. Keys are spread evenly by their hash, so it is asked for
    /// its share, and enough above it that one round nearly always does.
    fn body(&self, shards: usize, consistency: crate::api::store::Consistency) -> ShardBody {
        let share = self.limit.div_ceil(shards.max(1));

        // The spread of a random share is about its square root, so four times that nearly always
        // does.
        let limit = if shards <= 1 {
            self.limit
        } else {
            self.limit.min(share + 4 * share.isqrt() + 8)
        };
        let bytes_max = (PAGE_BYTES_MAX / shards.max(1)).max(SHARD_PAGE_BYTES_MIN);
        let (range, reverse, keys_only) = (self.range.clone(), self.reverse, self.keys_only);
        ShardBody::Scan {
            range,
            reverse,
            limit,
            bytes_max,
            keys_only,
            consistency,
        }
    }
}

struct Round {
    coverage: Coverage,
    items: Vec<Item>,
    /// The last key up to which every page that has more to come is complete.
    bound: Option<Bytes>,
}

impl Default for Round {
    fn default() -> Self {
        Self {
            coverage: Coverage::none(),
            items: Vec::new(),
            bound: None,
        }
    }
}

impl Round {
    fn add(&mut self, page: ShardPage, reverse: bool) {
        if page.more {
            let end = page.items.last().map(|item| item.key.clone());

            // The page that ends first decides: beyond it, its shard may have keys that are not
            // here.
            self.bound = match (self.bound.take(), end) {
                (Some(a), Some(b)) => Some(if reverse { a.max(b) } else { a.min(b) }),
                (a, b) => a.or(b),
            };
        }
        // Keys beyond it are asked for again by the next round. Of many shards with large values
        // they would be more than all else.
        let mut items = page.items;
        if let Some(bound) = &self.bound {
            let is_complete = |item: &Item| {
                if reverse {
                    item.key >= *bound
                } else {
                    item.key <= *bound
                }
            };
            items.retain(is_complete);
            if page.more {
                self.items.retain(is_complete);
            }
        }
        let asked = page.slots.len();
        let mut fresh = page.slots;
        fresh.retain(|slot| self.coverage.insert(*slot));

        // Nearly always no slot has moved. Then no key has to be hashed.
        if fresh.len() == asked {
            self.items.extend(items);
            return;
        }

        // A slot that moved may be in pages of its source and its destination, of two moments. Only
        // the first is taken for it: both together could show a key twice.
        let mut taken = Coverage::none();
        fresh.into_iter().for_each(|slot| {
            taken.insert(slot);
        });
        self.items.extend(
            items
                .into_iter()
                .filter(|item| taken.contains(slot_of(&item.key))),
        );
    }

    /// Items that are complete, in order.
    fn take(mut self, reverse: bool) -> Complete {
        // Stable: the pages are sorted runs, which it merges.
        self.items.sort_by(|a, b| {
            if reverse {
                b.key.cmp(&a.key)
            } else {
                a.key.cmp(&b.key)
            }
        });
        if let Some(bound) = &self.bound {
            let complete = self.items.partition_point(|item| {
                if reverse {
                    item.key >= *bound
                } else {
                    item.key <= *bound
                }
            });
            self.items.truncate(complete);
        }
        Complete {
            items: self.items,
            bound: self.bound,
        }
    }
}

struct Complete {
    items: Vec<Item>,
    bound: Option<Bytes>,
}

impl Complete {
    /// Rest of the range after them.
    fn rest(&self, plan: &RoundPlan) -> Option<ScanRange> {
        let bound = self.bound.as_ref()?;

        // Ends are exclusive and starts inclusive. So backwards the bound itself is left out, and
        // forwards the next key after it is the start.
        let rest = match plan.reverse {
            true => ScanRange {
                start: plan.range.start.clone(),
                end: Some(bound.clone()),
            },
            false => ScanRange {
                start: after(bound),
                end: plan.range.end.clone(),
            },
        };
        Some(rest).filter(|rest| !is_empty(rest))
    }
}

/// Returns the least key after this one.
fn after(key: &Bytes) -> Bytes {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.put_u8(0);
    next.freeze()
}

fn is_empty(range: &ScanRange) -> bool {
    range.end.as_ref().is_some_and(|end| *end <= range.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::kv::{Media, Record};
    use crate::types::{Revision, Slot};

    /// A page of one key, of a shard with one slot.
    fn page(n: u16, more: bool) -> ShardPage {
        let record = Record {
            revision: Revision(1),
            media: Media::Text,
            value: Bytes::from_static(b"large"),
        };
        let key = Bytes::from(format!("k{n:02}"));
        ShardPage {
            slots: Slot::new(n).into_iter().collect(),
            items: vec![Item { key, record }],
            more,
        }
    }

    #[test]
    fn a_round_keeps_nothing_that_the_next_one_asks_for_again() {
        for (reverse, first) in [(false, "k10"), (true, "k89")] {
            let mut round = Round::default();
            for n in (10..90).map(|n| n * 37 % 80 + 10) {
                round.add(page(n, true), reverse);
                assert_eq!(round.items.len(), 1, "the key of the page that ends first");
            }
            // A page without more to come ends where the others do.
            round.add(page(95, false), reverse);
            round.add(page(5, false), reverse);
            assert_eq!(round.items.len(), 2);
            let complete = round.take(reverse);
            assert!(
                complete.items.iter().any(|item| item.key == first),
                "{reverse}"
            );
        }
    }
}
