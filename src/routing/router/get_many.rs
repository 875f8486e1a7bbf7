//! Reads of many keys: one call, and so one quorum round, per shard.
//!
//! Each shard answers for the first of its keys, as many as fit. What counts is the beginning of
//! the caller's list that is then complete; what lies after a gap is dropped, so that an answer is
//! never larger than was asked for.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::StreamExt;

use super::attempt::{Retry, RetryState};
use super::{Router, ShardAccess, check_key, misfit, version};
use crate::api::protocol::{ShardBody, ShardReply};
use crate::api::shard_map::ShardMap;
use crate::api::store::{Failure, GetManyRequest, Options};
use crate::sm::kv::Record;
use crate::types::GroupId;

/// Shards asked at once. Each gives one record at least, which may have 8 MiB: so fewer are asked
/// for values than for keys.
const PARALLEL_MAX: usize = 8;
const PARALLEL_KEYS_MAX: usize = 32;
/// The least that a shard is asked for, so that many shards make no tiny answers.
const SHARD_BYTES_MIN: usize = 16 << 10;

/// The keys of one shard, by their places in the caller's list.
struct KeysPart {
    shard: GroupId,
    places: Vec<usize>,
}

/// The record of each key of the caller's list, as far as it has been read.
type FoundRecords = Vec<Option<Option<Record>>>;

impl<A: ShardAccess> Router<A> {
    pub(super) async fn get_many_from_shards(
        &self,
        request: GetManyRequest,
        options: Options,
    ) -> Result<Vec<Option<Record>>, Failure> {
        request.keys.iter().try_for_each(|key| check_key(key))?;
        let mut retry_state = RetryState::new(options).repeatable();
        let mut answers: FoundRecords = vec![None; request.keys.len()];
        let mut places: Vec<usize> = (0..request.keys.len()).collect();

        // Only the keys without an answer are asked for again. Each key is linearizable by itself,
        // so the answers need not be of one moment.
        while !places.is_empty() {
            let map = self.map_in_time(&mut retry_state).await?;
            let Some((left, retry)) = self
                .ask_parts(&request, &map, &retry_state, places, &mut answers)
                .await?
            else {
                // Keys without an answer did not fit. The caller asks for them in its next request.
                break;
            };
            places = left;
            self.pause(&mut retry_state, retry, version(Some(&map)))
                .await?;
        }
        Ok(answers.into_iter().map_while(|answer| answer).collect())
    }

    /// Asks the owners of the keys at `places`. What it returns are those whose shard has to be
    /// asked again.
    async fn ask_parts(
        &self,
        request: &GetManyRequest,
        map: &ShardMap,
        retry_state: &RetryState,
        places: Vec<usize>,
        answers: &mut FoundRecords,
    ) -> Result<Option<(Vec<usize>, Retry)>, Failure> {
        let parts = split(&request.keys, places, map);

        // The bytes are shared out beforehand: shards know nothing of each other's answers.
        let bytes_max = (request.bytes_max / parts.len().max(1)).max(SHARD_BYTES_MIN);

        let ask = |part: KeysPart| async move {
            // The map names the meta group as the owner of slots that no shard owns.
            if part.shard.is_meta() {
                return (part, None);
            }
            let keys: Vec<Bytes> = part
                .places
                .iter()
                .map(|place| request.keys[*place].clone())
                .collect();
            let options = retry_state.options();
            let body = ShardBody::GetMany {
                keys,
                bytes_max,
                keys_only: request.keys_only,
                consistency: options.consistency,
            };
            let reply = self.call(part.shard, body, options).await;
            (part, Some(reply))
        };

        // Keys are small; values may fill the budget of the answers.
        let parallel = if request.keys_only {
            PARALLEL_KEYS_MAX
        } else {
            PARALLEL_MAX
        };
        let mut replies = futures::stream::iter(parts)
            .map(ask)
            .buffer_unordered(parallel);

        let mut again: Option<(Vec<usize>, Retry)> = None;
        while let Some((part, reply)) = replies.next().await {
            let retry = match reply {
                None => Retry::unowned(),
                Some(ShardReply::GotMany(records))
                    // Without any record the caller would get no further, and ask for ever.
                    if (1..=part.places.len()).contains(&records.len()) =>
                {
                    part.places
                        .iter()
                        .zip(records)
                        .for_each(|(place, record)| answers[*place] = Some(record));
                    continue;
                }
                Some(ShardReply::NotOwned { slot }) => Retry::not_owned(slot),
                Some(ShardReply::Failed(failure)) => retry_state.classify(part.shard, failure)?,
                Some(
                    ShardReply::GotMany(_)
                    | ShardReply::Got(_)
                    | ShardReply::Written(_)
                    | ShardReply::Page(_)
                    | ShardReply::Counted { .. }
                    | ShardReply::Moved(_)
                    | ShardReply::MoveState(_),
                ) => return Err(misfit(part.shard)),
            };

            // There is one pause for all shards that failed, so one reason is enough.
            match &mut again {
                Some((places, _)) => places.extend(part.places),
                None => again = Some((part.places, retry)),
            }
        }
        Ok(again)
    }
}

/// Splits by owner, each part in the order of the caller's list.
fn split(keys: &[Bytes], mut places: Vec<usize>, map: &ShardMap) -> Vec<KeysPart> {
    // Places that are left over come back shard by shard. A shard answers for the first of its
    // keys, and only the beginning of the caller's list counts.
    places.sort_unstable();
    let mut parts: BTreeMap<GroupId, Vec<usize>> = BTreeMap::new();
    for place in places {
        parts
            .entry(map.owner_of(&keys[place]))
            .or_default()
            .push(place);
    }
    parts
        .into_iter()
        .map(|(shard, places)| KeysPart { shard, places })
        .collect()
}
