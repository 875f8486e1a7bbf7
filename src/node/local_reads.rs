//! Reads the map of a local replica: one key, many, a page, a count, and the gets of a write.
//!
//! What is read is charged to the budget of the answers. What may wait for the disk is read on
//! another thread, and long reads let entries be applied between their parts. `local_shards` has
//! made sure before that the map is as new as the request asks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::unreadable::tell_unreadable;
use crate::api::protocol::{ShardPage, ShardReply};
use crate::api::store::{Failure, GetOutcome, Item, Staleness};
use crate::budget::{Budget, Share, UNCHARGED_BYTES_MAX};
use crate::raft::Replica;
use crate::sm::kv::{self, ANSWER_BYTES_MAX, FindOutcome, PageRequest};
use crate::sm::ports::StoreError;
use crate::storage::map::{MapRead, ReadKind};

/// Keys of a long list that are read under one guard: entries can't be applied meanwhile.
const KEYS_PER_GUARD: usize = 64;

/// Time for which a page keeps entries from being applied in one go, and the keys between two looks
/// at the clock.
const TIME_PER_GUARD: Duration = Duration::from_millis(2);
const LOOKS_PER_CLOCK: u32 = 16;

/// Keys that one request of a router can ask a shard for.
pub const KEYS_MAX: usize = 10_000;

/// Time after which to try again when a shard has no leader: an election takes about this long.
pub const RETRY_AFTER_MS: u64 = 500;

/// Returns what became of a write, as others are told. What its gets return stays charged to
/// `share`.
pub fn written_reply(outcome: kv::WriteOutcome, share: Option<Share>) -> ShardReply {
    match outcome {
        kv::WriteOutcome::Unanswered => {
            let reason = "it was done, and what its gets return is too large to be told".to_owned();
            ShardReply::Failed(Failure::Unknown { reason })
        }
        kv::WriteOutcome::Rejected(kv::WriteRejection::AnswerTooLarge { bytes }) => {
            ShardReply::Failed(Failure::of_answer(bytes))
        }
        outcome => match share {
            None => ShardReply::Written(outcome),
            Some(mut share) => {
                // Values may have grown since they were weighed. What was done must be told all the
                // same.
                let bytes = bytes_got(&outcome);
                share.grow(bytes.saturating_sub(share.bytes()));
                share.shrink_to(bytes);
                ShardReply::Written(outcome).held(share)
            }
        },
    }
}

fn bytes_got(outcome: &kv::WriteOutcome) -> usize {
    let got = |outcome: &kv::OperationOutcome| match outcome {
        kv::OperationOutcome::Got(Some(record)) => record.value.len(),
        kv::OperationOutcome::Got(None)
        | kv::OperationOutcome::Put { .. }
        | kv::OperationOutcome::Deleted { .. } => 0,
    };
    match outcome {
        kv::WriteOutcome::Applied(outcomes) => outcomes.iter().map(got).sum(),
        kv::WriteOutcome::Mixed(results) => results.iter().flatten().map(got).sum(),
        kv::WriteOutcome::Rejected(_) | kv::WriteOutcome::Unanswered => 0,
    }
}

/// Answers by what `work` finds in the map of a replica; see [`ReplicaMap::read_in`].
///
/// [`ReplicaMap::read_in`]: crate::storage::map::ReplicaMap::read_in
pub async fn read_map(
    group: &Replica,
    kind: ReadKind,
    deadline: Instant,
    work: impl Fn(&MapRead<'_>) -> ShardReply + Send + 'static,
) -> ShardReply {
    let state = group.state();
    if !state.reads_wait(kind) {
        return state.read_here(work);
    }
    in_time(group, deadline, state.read_elsewhere(kind, work))
        .await
        .unwrap_or_else(ShardReply::Failed)
}

/// Returns what was read of the map of a replica.
///
/// # Errors
///
/// Fails if the read still waits for the disk when the deadline passes.
pub async fn in_time<T>(
    group: &Replica,
    deadline: Instant,
    read: impl Future<Output = T>,
) -> Result<T, Failure> {
    timeout_at(deadline, read)
        .await
        .map_err(|_| unavailable(format!("the map of {} waits for the disk", group.key())))
}

/// Charges what the gets of a write return, if that is not more than they may.
pub async fn charge_gets(
    group: &Replica,
    answers: &Arc<Budget>,
    write: &kv::Write,
    deadline: Instant,
) -> Result<Share, Failure> {
    let weigh = |read: &MapRead<'_>, write: &kv::Write| kv::weigh_gets(read, write);
    let weighed = match group.state().reads_wait(ReadKind::Keys) {
        false => group.state().read_here(|read| weigh(read, write)),
        true => {
            let write = write.clone();
            let read = group
                .state()
                .read_elsewhere(ReadKind::Keys, move |read| weigh(read, &write));
            in_time(group, deadline, read).await?
        }
    };
    let weight = weighed.map_err(|error| broken(group, &error))?;
    Failure::of_gets(weight)?;
    answers
        .take(weight.bytes)
        .ok_or_else(|| Failure::no_room(answers))
}

/// Answers a write that only reads, all of it from the map as it is at one moment.
pub fn answer_gets(
    group: &Replica,
    answers: &Arc<Budget>,
    read: &MapRead<'_>,
    write: &kv::Write,
) -> ShardReply {
    let mut share = answers.empty_share();
    let mut refusal = Failure::no_room(answers);

    // What is larger than any answer may be is refused as that, not for lack of room.
    let charge = |bytes: usize| {
        if bytes > ANSWER_BYTES_MAX {
            refusal = Failure::of_answer(bytes as u64);
            return false;
        }
        share.grow(bytes)
    };
    let answer = kv::answer_gets(read, write, charge);
    match answer {
        Ok(Some(outcome)) => written_reply(outcome, Some(share)),
        Ok(None) => ShardReply::Failed(refusal),
        Err(error) => ShardReply::Failed(broken(group, &error)),
    }
}

/// Returns the record of one key.
pub fn read_key(
    group: &Replica,
    answers: &Arc<Budget>,
    read: &MapRead<'_>,
    key: &Bytes,
    staleness: Option<Staleness>,
) -> ShardReply {
    let found = match kv::find(read, key) {
        Ok(FindOutcome::Owned(Some(found))) => found,
        Ok(FindOutcome::Owned(None)) => {
            return ShardReply::Got(GetOutcome {
                record: None,
                staleness,
            });
        }
        Ok(FindOutcome::NotOwned { slot, .. }) => return ShardReply::NotOwned { slot },
        Err(error) => return ShardReply::Failed(broken(group, &error)),
    };

    // Charged before the value is read; small ones cost no more than the request itself.
    let share = match found.bytes() {
        ..=UNCHARGED_BYTES_MAX => None,
        bytes => match answers.take(bytes) {
            Some(share) => Some(share),
            None => return ShardReply::Failed(Failure::no_room(answers)),
        },
    };
    match (found.load(read, false), share) {
        (Ok(record), None) => ShardReply::Got(GetOutcome {
            record: Some(record),
            staleness,
        }),
        (Ok(record), Some(share)) => ShardReply::Got(GetOutcome {
            record: Some(record),
            staleness,
        })
        .held(share),
        (Err(error), _) => ShardReply::Failed(broken(group, &error)),
    }
}

/// Request for many keys of a shard.
pub struct ManyKeys {
    pub keys: Vec<Bytes>,
    pub bytes_max: usize,
    pub keys_only: bool,
}

/// Returns the records of keys, read on another thread where that may wait for the disk.
pub async fn read_keys(
    group: &Arc<Replica>,
    answers: &Arc<Budget>,
    many: ManyKeys,
    deadline: Instant,
) -> ShardReply {
    let state = group.state();
    if !state.reads_wait(ReadKind::Keys) {
        return read_runs(group, answers, &many, false);
    }
    let (replica, answers) = (group.clone(), answers.clone());
    let read = state.elsewhere(ReadKind::Keys, move || {
        read_runs(&replica, &answers, &many, true)
    });
    in_time(group, deadline, read)
        .await
        .unwrap_or_else(ShardReply::Failed)
}

/// Reads keys up to the first that is not owned here: the router looks for its owner when it asks
/// for the rest. So it does where the answer is full, or there is no room for more.
fn read_runs(
    group: &Replica,
    answers: &Arc<Budget>,
    many: &ManyKeys,
    looks_ahead: bool,
) -> ShardReply {
    let ManyKeys {
        keys,
        bytes_max,
        keys_only,
    } = many;
    let keys = &keys[..keys.len().min(KEYS_MAX)];

    let (mut records, mut share) = (Vec::with_capacity(keys.len()), answers.empty_share());

    for run in keys.chunks(KEYS_PER_GUARD) {
        // First without the lock that apply needs: what has to come from the disk is in the cache
        // after.
        if looks_ahead {
            group.state().preview(|read| look_at(read, run, *keys_only));
        }
        let read = |read: &MapRead<'_>| -> Result<bool, ShardReply> {
            for key in run {
                let found = match kv::find(read, key) {
                    Ok(FindOutcome::Owned(found)) => found,
                    Ok(FindOutcome::NotOwned { slot, .. }) if records.is_empty() => {
                        return Err(ShardReply::NotOwned { slot });
                    }
                    Ok(FindOutcome::NotOwned { .. }) => return Ok(true),
                    Err(error) => return Err(ShardReply::Failed(broken(group, &error))),
                };
                let bytes = found
                    .as_ref()
                    .filter(|_| !keys_only)
                    .map_or(0, |found| found.bytes());

                // The first is taken whatever its size, so that the router gets on.
                if share.bytes() + bytes > *bytes_max && !records.is_empty() {
                    return Ok(true);
                }
                if !share.grow(bytes) {
                    return match records.is_empty() {
                        true => Err(ShardReply::Failed(Failure::no_room(answers))),
                        false => Ok(true),
                    };
                }
                match found.map(|found| found.load(read, *keys_only)).transpose() {
                    Ok(record) => records.push(record),
                    Err(error) => return Err(ShardReply::Failed(broken(group, &error))),
                }
            }
            Ok(false)
        };

        match group.state().read_here(read) {
            Ok(false) => {}
            Ok(true) => break,
            Err(reply) => return reply,
        }
    }
    // The router takes record for key, in order.
    assert!(
        records.len() <= keys.len(),
        "{} records of {} keys",
        records.len(),
        keys.len()
    );
    ShardReply::GotMany(records).held(share)
}

/// Has the keys in the cache of the map's tree.
fn look_at(read: &MapRead<'_>, keys: &[Bytes], keys_only: bool) {
    for key in keys {
        if let Ok(FindOutcome::Owned(Some(found))) = kv::find(read, key) {
            // Whoever reads it in earnest is told.
            drop(found.load(read, keys_only));
        }
    }
}

/// Returns a page, read on another thread where that may wait for the disk.
pub async fn read_page(
    group: &Arc<Replica>,
    answers: &Arc<Budget>,
    request: PageRequest,
    deadline: Instant,
) -> ShardReply {
    let state = group.state();
    if !state.reads_wait(ReadKind::Page) {
        return read_steps(group, answers, &request);
    }
    let (replica, answers) = (group.clone(), answers.clone());
    let read = move || {
        // First without the lock that apply needs: what has to come from the disk is in the cache
        // after.
        let mut ahead = answers.empty_share();
        replica
            .state()
            .preview(|read| kv::scan_page_charged(read, &request, |bytes| ahead.grow(bytes)));
        drop(ahead);
        read_steps(&replica, &answers, &request)
    };
    in_time(group, deadline, state.elsewhere(ReadKind::Page, read))
        .await
        .unwrap_or_else(ShardReply::Failed)
}

/// Reads a page, which ends early where there is no room for more. Entries are applied between its
/// steps; where a slot changes hands meanwhile, all of it is read at one moment.
fn read_steps(group: &Replica, answers: &Arc<Budget>, request: &PageRequest) -> ShardReply {
    let state = group.state();
    let (mut share, mut scan) = (answers.empty_share(), kv::PageScan::new(request));

    // In steps, so that entries are applied between them.
    loop {
        let (begun, mut looks) = (std::time::Instant::now(), 0u32);
        let pauses = || {
            looks += 1;
            looks.is_multiple_of(LOOKS_PER_CLOCK) && begun.elapsed() > TIME_PER_GUARD
        };
        match state.read_here(|read| scan.step(read, |bytes| share.grow(bytes), pauses)) {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => return ShardReply::Failed(broken(group, &error)),
        }
    }

    // The page holds only if its slots were owned all the while; else it is read in one go.
    let owns =
        scan.steps() == 1 || matches!(state.read_here(|read| scan.still_owns(read)), Ok(true));
    let read = match owns {
        true => Ok(scan.into_page()),
        false => {
            // The charge of the steps is given back: their items are thrown away.
            share.shrink_to(0);
            state.read_here(|read| kv::scan_page_charged(read, request, |bytes| share.grow(bytes)))
        }
    };

    match read {
        Ok(page) if page.items.is_empty() && page.more => {
            ShardReply::Failed(Failure::no_room(answers))
        }
        Ok(page) => {
            let items = page
                .items
                .into_iter()
                .map(|(key, record)| Item { key, record })
                .collect();
            ShardReply::Page(ShardPage {
                items,
                more: page.more,
                slots: page.slots,
            })
            .held(share)
        }
        Err(error) => ShardReply::Failed(broken(group, &error)),
    }
}

pub fn read_count(group: &Replica, read: &MapRead<'_>) -> ShardReply {
    match kv::count(read) {
        Ok(count) => ShardReply::Counted {
            keys: count.keys,
            slots: count.slots,
        },
        Err(error) => ShardReply::Failed(broken(group, &error)),
    }
}

/// Returns the failure of a map that can't be read: the replica stops serving, and says why.
pub fn broken(group: &Replica, error: &StoreError) -> Failure {
    tell_unreadable(group, error);
    unavailable(format!(
        "the map of {} cannot be read: {error}",
        group.key()
    ))
}

pub fn unavailable(reason: String) -> Failure {
    Failure::Unavailable {
        reason,
        retry_after_ms: RETRY_AFTER_MS,
    }
}
