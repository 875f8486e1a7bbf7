//! Writes: one part per shard, in parallel, each tried again on its own; answers at the positions
//! of the caller's list.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::attempt::{Retry, RetryState};
use super::{Router, ShardAccess, check_key, misfit, version};
use crate::api::protocol::{ShardBody, ShardReply};
use crate::api::shard_map::ShardMap;
use crate::api::store::{Failure, Options, WriteFailure, Written};
use crate::sm::kv::{Action, Condition, Media, Operation, Write, WriteOutcome, WriteRejection};
use crate::sm::slots::slot_of;
use crate::types::{GroupId, KEY_BYTES_MAX, Slot};

/// Operations of one shard in one write: they become one entry of its log.
pub const SHARD_OPERATIONS_MAX: usize = 10_000;
/// The largest value, under the longest key, and something for media types and conditions.
pub const SHARD_BYTES_MAX: usize = (8 << 20) + KEY_BYTES_MAX + (64 << 10);

/// The operations of a write that fall to one shard.
#[derive(Debug)]
struct WritePart {
    operations: Vec<Operation>,
    /// Position of each in the caller's list.
    positions: Vec<usize>,
    retry_state: RetryState,
    /// The shard that a slot was given to, as the last shard said. Believed where the map says
    /// nothing newer; the shard named checks it itself.
    hint: Option<OwnerHint>,
}

#[derive(Debug, Clone, Copy)]
struct OwnerHint {
    slot: Slot,
    owner: GroupId,
    /// The shard that the map named, and that said so.
    instead_of: GroupId,
}

/// Progress of a part by one attempt.
struct Progress {
    /// With positions in the caller's list.
    answered: Vec<(usize, Written)>,
    /// Rest that is to be routed anew; the pause is over.
    left: Option<WritePart>,
}

impl<A: ShardAccess> Router<A> {
    pub(super) async fn write_to_shards(
        &self,
        operations: Vec<Operation>,
        key: Option<Bytes>,
        options: Options,
    ) -> Vec<Written> {
        let count = operations.len();
        self.write_checked(operations, key, options)
            .await
            .unwrap_or_else(|failure| vec![Err(failure); count])
    }

    /// # Errors
    ///
    /// Fails only if nothing at all was sent, or for a write of one operation.
    async fn write_checked(
        &self,
        operations: Vec<Operation>,
        key: Option<Bytes>,
        options: Options,
    ) -> Result<Vec<Written>, WriteFailure> {
        // Before anything is sent, so that a bad key leaves no write half done.
        operations
            .iter()
            .try_for_each(|operation| check_key(&operation.key))
            .map_err(WriteFailure::Failed)?;
        let mut retry_state = RetryState::new(options);
        let is_read = operations
            .iter()
            .all(|operation| operation.action == Action::Get);
        // A shard with a full disk answers reads only, so the two wait in different queues.
        if !is_read {
            retry_state = retry_state.writing();
        }

        // Without a key a shard can't tell a repeated write from a new one, and does it again.
        if key.is_some() || is_read {
            retry_state = retry_state.repeatable();
        }

        // A redirect leads to one node. The shards of a batch may have different leaders.
        if operations.len() == 1 {
            retry_state = retry_state.single_key();
        }
        let map = self
            .map_in_time(&mut retry_state)
            .await
            .map_err(WriteFailure::Failed)?;
        let whole = WritePart {
            positions: (0..operations.len()).collect(),
            operations,
            retry_state,
            hint: None,
        };

        // All parts are checked before any is sent: a write that is too large does nothing.
        let parts = split(whole, Some(&map));
        parts
            .iter()
            .try_for_each(|(_, part)| check_operations(&part.operations))
            .map_err(WriteFailure::Failed)?;
        Ok(self.write_parts(parts, key).await)
    }

    pub(super) async fn map_in_time(
        &self,
        retry_state: &mut RetryState,
    ) -> Result<Arc<ShardMap>, Failure> {
        // A node that has just started, or a gateway, may have no map yet.
        loop {
            match self.access.map() {
                Some(map) => return Ok(map),
                None => {
                    self.pause(retry_state, Retry::no_map(), version(None))
                        .await?
                }
            }
        }
    }

    async fn write_parts(
        &self,
        mut parts: Vec<(GroupId, WritePart)>,
        key: Option<Bytes>,
    ) -> Vec<Written> {
        let count = parts.iter().map(|(_, part)| part.positions.len()).sum();
        let mut answers: Vec<Written> =
            vec![Err(WriteFailure::Failed(misfit(GroupId::META))); count];

        // Answers go to their positions; what is left is split by the map as it is then.
        let mut fill = |progress: Progress| -> Vec<(GroupId, WritePart)> {
            progress
                .answered
                .into_iter()
                .for_each(|(at, written)| answers[at] = written);
            progress
                .left
                .map(|part| split(part, self.access.map().as_deref()))
                .unwrap_or_default()
        };
        // The hot path: one shard, in place.
        while parts.len() == 1 {
            let (shard, part) = parts.remove(0);
            parts = fill(self.write_part(shard, part, key.clone()).await);
        }

        // Several shards, each at its own pace.
        let attempt =
            |(shard, part): (GroupId, WritePart)| self.write_part(shard, part, key.clone());
        let mut running: FuturesUnordered<_> = parts.into_iter().map(attempt).collect();
        while let Some(progress) = running.next().await {
            running.extend(fill(progress).into_iter().map(attempt));
        }
        answers
    }

    /// Makes one attempt at one shard, and the pause after it where another may follow.
    async fn write_part(
        &self,
        shard: GroupId,
        part: WritePart,
        idempotency_key: Option<Bytes>,
    ) -> Progress {
        let map = self.access.map();
        let known = version(map.as_deref());

        // The map names the meta group for a slot that no shard owns yet.
        let verdict = if shard.is_meta() {
            PartVerdict::retry(Retry::unowned(), &part)
        } else {
            // The operations are kept for another attempt; their keys and values are shared, not
            // copied.
            let write = Write {
                operations: part.operations.clone(),
                idempotency_key,
            };
            // Only those of a single key are sent elsewhere.
            let options = match part.operations.first() {
                Some(first) => part.retry_state.options_at(&first.key, map.as_deref()),
                None => part.retry_state.options(),
            };
            let reply = self.call(shard, ShardBody::Write(write), options).await;
            read_reply(reply, shard, &part)
        };
        verdict.check(&part);

        let (mut answered, mut left) = part.divide(verdict.answers);
        let Some(retry) = verdict.retry else {
            return Progress {
                answered,
                left: None,
            };
        };

        // Without the hint the part would wait until this node has heard of the new map.
        left.hint = retry.hint.map(|(slot, owner)| OwnerHint {
            slot,
            owner,
            instead_of: shard,
        });
        match self.pause(&mut left.retry_state, retry, known).await {
            Ok(()) => Progress {
                answered,
                left: Some(left),
            },
            Err(failure) => {
                // Other parts may have been written already, so each operation has its own answer.
                let failed = Err(WriteFailure::Failed(failure));
                answered.extend(left.positions.into_iter().map(|at| (at, failed.clone())));
                Progress {
                    answered,
                    left: None,
                }
            }
        }
    }
}

impl WritePart {
    fn owner(&self, key: &[u8], map: Option<&ShardMap>) -> GroupId {
        let slot = slot_of(key);
        let owner = map.map_or(GroupId::META, |map| map.owner(slot));
        match self.hint {
            // Once the map names another owner than who gave the hint, the map is newer.
            Some(hint) if hint.slot == slot && hint.instead_of == owner => hint.owner,
            Some(_) | None => owner,
        }
    }

    /// Splits into the answers, and the part that has none.
    fn divide(self, answers: Vec<Option<Written>>) -> (Vec<(usize, Written)>, WritePart) {
        let mut left = WritePart {
            operations: Vec::new(),
            positions: Vec::new(),
            ..self
        };
        let mut answered = Vec::with_capacity(answers.len());

        // Only what has no answer is sent again: an operation that was done must not be done twice.
        for ((operation, at), answer) in
            self.operations.into_iter().zip(self.positions).zip(answers)
        {
            match answer {
                Some(written) => answered.push((at, written)),
                None => {
                    left.operations.push(operation);
                    left.positions.push(at);
                }
            }
        }
        (answered, left)
    }
}

/// Reads what a reply says of each operation of a part, and whether those without an answer may be
/// tried again.
struct PartVerdict {
    answers: Vec<Option<Written>>,
    /// Present if and only if an answer is missing.
    retry: Option<Retry>,
}

impl PartVerdict {
    /// Asserts that there is a place for an answer to each operation, and a retry if and only if
    /// one is missing: no operation is done twice, and none is forgotten.
    fn check(&self, part: &WritePart) {
        assert_eq!(self.answers.len(), part.operations.len());
        assert_eq!(
            self.answers.iter().any(Option::is_none),
            self.retry.is_some(),
            "an operation without an answer is tried again, and no other"
        );
    }

    fn retry(retry: Retry, part: &WritePart) -> Self {
        Self {
            answers: vec![None; part.operations.len()],
            retry: Some(retry),
        }
    }

    /// Gives the same verdict for all operations of the part.
    fn of_all(judged: Result<Retry, WriteFailure>, part: &WritePart) -> Self {
        match judged {
            Ok(retry) => Self::retry(retry, part),
            Err(failure) => Self {
                answers: vec![Some(Err(failure)); part.operations.len()],
                retry: None,
            },
        }
    }
}

fn read_reply(reply: ShardReply, shard: GroupId, part: &WritePart) -> PartVerdict {
    match reply {
        ShardReply::Written(WriteOutcome::Applied(outcomes))
            // Else outcomes can't be matched to operations. That ends below as an unknown outcome.
            if outcomes.len() == part.operations.len() =>
        {
            PartVerdict {
                answers: outcomes
                    .into_iter()
                    .map(|outcome| Some(Ok(outcome)))
                    .collect(),
                retry: None,
            }
        }
        ShardReply::Written(WriteOutcome::Rejected(rejection)) => {
            PartVerdict::of_all(judge_rejection(rejection, shard, part), part)
        }

        // Slots that remember the idempotency key answer from their record; others may be rejected.
        ShardReply::Written(WriteOutcome::Mixed(results))
            if results.len() == part.operations.len() =>
        {
            let mut verdict = PartVerdict {
                answers: Vec::with_capacity(results.len()),
                retry: None,
            };
            for result in results {
                let judged = result.map_err(|rejection| judge_rejection(rejection, shard, part));
                verdict.answers.push(match judged {
                    Ok(outcome) => Some(Ok(outcome)),
                    Err(Err(failure)) => Some(Err(failure)),
                    Err(Ok(retry)) => {
                        verdict.retry = Some(retry);
                        None
                    }
                });
            }
            verdict
        }
        ShardReply::NotOwned { slot } => PartVerdict::retry(Retry::not_owned(slot), part),
        ShardReply::Failed(failure) => PartVerdict::of_all(
            part.retry_state
                .classify(shard, failure)
                .map_err(WriteFailure::Failed),
            part,
        ),
        ShardReply::Written(
            WriteOutcome::Applied(_) | WriteOutcome::Mixed(_) | WriteOutcome::Unanswered,
        )
        | ShardReply::Got(_)
        | ShardReply::GotMany(_)
        | ShardReply::Page(_)
        | ShardReply::Counted { .. }
        | ShardReply::Moved(_)
        | ShardReply::MoveState(_) => {
            PartVerdict::of_all(Err(WriteFailure::Failed(misfit(shard))), part)
        }
    }
}

fn judge_rejection(
    rejection: WriteRejection,
    shard: GroupId,
    part: &WritePart,
) -> Result<Retry, WriteFailure> {
    match rejection {
        WriteRejection::WrongOwner { slot, moved_to } => {
            Ok(Retry::moved(slot, moved_to.map(|(_, to)| to)))
        }
        WriteRejection::Frozen { slot } => Ok(Retry::frozen(slot)),
        // The shard counts within its part; the caller knows only its own list.
        WriteRejection::ConditionFailed { operation, current } => {
            Err(match part.positions.get(operation) {
                Some(at) => WriteFailure::Rejected(WriteRejection::ConditionFailed {
                    operation: *at,
                    current,
                }),
                None => WriteFailure::Failed(misfit(shard)),
            })
        }
        // "Full" means that nothing was done. After an attempt without an answer nobody knows that.
        WriteRejection::RequestsFull { .. } if part.retry_state.maybe_done() => {
            let full = Failure::Overloaded {
                limit: "remembered requests".into(),
                retry_after_ms: 1000,
            };
            Err(WriteFailure::Failed(part.retry_state.final_failure(full)))
        }
        WriteRejection::AnswerTooLarge { bytes } => Err(WriteFailure::Failed(
            part.retry_state.final_failure(Failure::of_answer(bytes)),
        )),
        WriteRejection::KeyReused { .. } | WriteRejection::RequestsFull { .. } => {
            Err(WriteFailure::Rejected(rejection))
        }
    }
}

/// Splits by owner, each part in the order of the caller's list.
fn split(whole: WritePart, map: Option<&ShardMap>) -> Vec<(GroupId, WritePart)> {
    assert_eq!(
        whole.operations.len(),
        whole.positions.len(),
        "each operation has its position in the caller's list"
    );
    let mut parts: BTreeMap<GroupId, WritePart> = BTreeMap::new();

    // Nearly all writes are of one shard. They are passed on without being copied.
    let owners: Vec<GroupId> = whole
        .operations
        .iter()
        .map(|operation| whole.owner(&operation.key, map))
        .collect();
    if owners.windows(2).all(|pair| pair[0] == pair[1]) {
        return owners
            .first()
            .map(|owner| (*owner, whole))
            .into_iter()
            .collect();
    }
    for ((operation, position), owner) in whole
        .operations
        .into_iter()
        .zip(whole.positions)
        .zip(owners)
    {
        let part = parts.entry(owner).or_insert_with(|| WritePart {
            operations: Vec::new(),
            positions: Vec::new(),
            retry_state: whole.retry_state.clone(),
            hint: whole.hint,
        });
        part.operations.push(operation);
        part.positions.push(position);
    }
    parts.into_iter().collect()
}

/// Checks that operations are not too many or too large for an entry.
///
/// # Errors
///
/// [`Failure::TooLarge`], with the limit.
pub fn check_operations(operations: &[Operation]) -> Result<(), Failure> {
    let too_large = |limit: String| Err(Failure::TooLarge { limit });
    if operations.len() > SHARD_OPERATIONS_MAX {
        return too_large(format!(
            "a write has at most {SHARD_OPERATIONS_MAX} operations per shard, this one {}",
            operations.len()
        ));
    }
    let bytes: usize = operations.iter().map(bytes_of).sum();
    if bytes > SHARD_BYTES_MAX {
        let limit = format!(
            "a write has at most {SHARD_BYTES_MAX} bytes of keys, values and conditions per shard, \
            this one {bytes}"
        );
        return too_large(limit);
    }
    Ok(())
}

fn bytes_of(operation: &Operation) -> usize {
    let value = match &operation.action {
        Action::Put {
            media: Media::Other(name),
            value,
        } => name.len() + value.len(),
        Action::Put {
            media: Media::Text | Media::Octets | Media::Json,
            value,
        } => value.len(),
        Action::Get | Action::Delete => 0,
    };
    let condition = match &operation.condition {
        Condition::None | Condition::Absent | Condition::Present => 0,
        Condition::RevisionIn(revisions) | Condition::RevisionNotIn(revisions) => {
            size_of_val(&revisions[..])
        }
    };
    operation.key.len() + value + condition
}
