//! Counts of all shards, such that each slot is counted exactly once; and of one.

use futures::StreamExt;

use super::attempt::{Retry, RetryState};
use super::coverage::Coverage;
use super::{Router, ShardAccess, misfit, version};
use crate::api::protocol::{ShardBody, ShardReply};
use crate::api::shard_map::ShardMap;
use crate::api::store::{Failure, Options};
use crate::types::GroupId;

/// Shards that are asked at once: a connection each, where they are led by others.
const PARALLEL_MAX: usize = 32;

impl<A: ShardAccess> Router<A> {
    /// Counts anew when a slot was counted twice or not at all, because it moved in between.
    pub(super) async fn count_shards(
        &self,
        options: Options,
    ) -> Result<Vec<(GroupId, u64)>, Failure> {
        let mut retry_state = RetryState::new(options).repeatable();
        loop {
            let map = self.access.map();

            // A shard's count is one sum, from which a slot that has moved since can't be taken
            // out: so after any failure all shards are counted anew.
            let retry = match map.as_deref() {
                None => Retry::no_map(),
                Some(map) => match self.count_once(map, &retry_state).await? {
                    Ok(counts) => return Ok(counts),
                    Err(retry) => retry,
                },
            };
            self.pause(&mut retry_state, retry, version(map.as_deref()))
                .await?;
        }
    }

    /// Counts one shard. Slots on their way to or from it may be left out for as long as they move.
    pub(super) async fn count_one(&self, shard: GroupId, options: Options) -> Result<u64, Failure> {
        let mut retry_state = RetryState::new(options).repeatable();
        loop {
            let map = self.access.map();
            let retry = match map.as_deref().map(|map| map.shard(shard)) {
                None => Retry::no_map(),
                Some(None) => {
                    return Err(Failure::Invalid {
                        reason: format!("there is no shard {shard:#}"),
                    });
                }
                Some(Some(_)) => match self
                    .call(shard, ShardBody::Count, retry_state.options())
                    .await
                {
                    ShardReply::Counted { keys, .. } => return Ok(keys),
                    ShardReply::NotOwned { slot } => Retry::not_owned(slot),
                    ShardReply::Failed(failure) => retry_state.classify(shard, failure)?,
                    ShardReply::Got(_)
                    | ShardReply::Written(_)
                    | ShardReply::Page(_)
                    | ShardReply::GotMany(_)
                    | ShardReply::Moved(_)
                    | ShardReply::MoveState(_) => return Err(misfit(shard)),
                },
            };
            self.pause(&mut retry_state, retry, version(map.as_deref()))
                .await?;
        }
    }

    async fn count_once(
        &self,
        map: &ShardMap,
        retry_state: &RetryState,
    ) -> Result<Result<Vec<(GroupId, u64)>, Retry>, Failure> {
        let ask = |shard: GroupId| self.call(shard, ShardBody::Count, retry_state.options());
        let replies: Vec<ShardReply> = futures::stream::iter(map.owners().to_vec())
            .map(ask)
            .buffered(PARALLEL_MAX)
            .collect()
            .await;
        let mut coverage = Coverage::none();
        // A shard without slots has no keys, and need not be asked.
        let mut counts: Vec<(GroupId, u64)> = map.shards().map(|(shard, _)| (shard, 0)).collect();
        for (shard, reply) in map.owners().iter().copied().zip(replies) {
            match reply {
                ShardReply::Counted { keys, slots } => {
                    // Source and destination were asked at different moments of a move, and both
                    // counted the slot.
                    if let Some(twice) = slots.into_iter().find(|slot| !coverage.insert(*slot)) {
                        return Ok(Err(Retry::not_owned(twice)));
                    }
                    match counts.binary_search_by_key(&shard, |(id, _)| *id) {
                        Ok(at) => counts[at].1 = keys,
                        Err(at) => counts.insert(at, (shard, keys)),
                    }
                }
                ShardReply::NotOwned { slot } => return Ok(Err(Retry::not_owned(slot))),
                ShardReply::Failed(failure) => {
                    return retry_state.classify(shard, failure).map(Err);
                }
                ShardReply::Got(_)
                | ShardReply::Written(_)
                | ShardReply::Page(_)
                | ShardReply::GotMany(_)
                | ShardReply::Moved(_)
                | ShardReply::MoveState(_) => return Err(misfit(shard)),
            }
        }

        // The source had released the slot already, and the destination had not activated it yet.
        let missing = coverage.missing().next();
        Ok(match missing {
            None => Ok(counts),
            Some(slot) => Err(Retry::not_owned(slot)),
        })
    }
}
