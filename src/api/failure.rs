//! [`Failure`] says why there is no answer, and whether a write may have happened.

use serde::{Deserialize, Serialize};

use crate::budget::Budget;
use crate::sm::kv::{ANSWER_BYTES_MAX, GetsWeight};
use crate::sm::requests::REQUESTS_BYTES_MAX;
use crate::types::{Address, GroupId};

/// A reason why there is no answer. Only [`Failure::Unknown`] leaves open whether a write happened;
/// after every other it certainly did not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// Ask there: the leader, or a node that knows it. `address` is what a client is sent to.
    #[error("shard {shard:#} is led by {address}")]
    Elsewhere { shard: GroupId, address: Address },
    /// A limit is reached; try again after a while.
    #[error("overloaded: {limit}")]
    Overloaded { limit: String, retry_after_ms: u64 },
    /// Nothing was done, and nobody could do it in time: no quorum, no leader, a move under way.
    #[error("unavailable: {reason}")]
    Unavailable { reason: String, retry_after_ms: u64 },
    /// The answer is not known: it may have happened, or may yet happen.
    #[error("unknown outcome: {reason}")]
    Unknown { reason: String },
    /// The request can't be done as it is, whoever is asked.
    #[error("invalid request: {reason}")]
    Invalid { reason: String },
    /// The request is larger than a limit allows.
    #[error("too large: {limit}")]
    TooLarge { limit: String },
}

impl Failure {
    /// Returns the failure of a request for whose answer there is no room.
    pub fn no_room(answers: &Budget) -> Self {
        let limit = format!(
            "answers under way have at most {} bytes together",
            answers.bytes_max()
        );
        Failure::Overloaded {
            limit,
            retry_after_ms: 1000,
        }
    }

    /// Refuses a write whose gets would return more than can be told, or can be remembered with an
    /// idempotency key: however often it is sent, it never fits.
    ///
    /// # Errors
    ///
    /// [`Failure::TooLarge`], with the limit.
    pub fn of_gets(weight: GetsWeight) -> Result<(), Self> {
        if weight.bytes > ANSWER_BYTES_MAX {
            return Err(Self::of_answer(weight.bytes as u64));
        }
        if weight.remembered_bytes_max as u64 > REQUESTS_BYTES_MAX {
            return Err(Failure::TooLarge {
                limit: format!(
                    "the gets of a batch with an Idempotency-Key return at most \
                     {REQUESTS_BYTES_MAX} bytes per slot, because its answer is remembered, these \
                     {}: send them without the key, or in a batch of their own",
                    weight.remembered_bytes_max
                ),
            });
        }
        Ok(())
    }

    /// Returns the failure of a write whose gets would return so many bytes, and of which nothing
    /// was done.
    pub fn of_answer(bytes: u64) -> Self {
        if bytes > ANSWER_BYTES_MAX as u64 {
            let limit = format!(
                "the gets of a batch return at most {ANSWER_BYTES_MAX} bytes per shard, these \
                {bytes}"
            );
            return Failure::TooLarge { limit };
        }
        Failure::Overloaded {
            limit: "what the gets of batches return at once".into(),
            retry_after_ms: 1000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_can_never_be_remembered_is_too_large() {
        let weigh = |bytes, remembered_bytes_max| match Failure::of_gets(GetsWeight {
            bytes,
            remembered_bytes_max,
        }) {
            Ok(()) => "fits".to_owned(),
            Err(Failure::TooLarge { limit }) => limit,
            Err(other) => panic!("{other}"),
        };
        let mib = 1 << 20;
        assert_eq!(
            (weigh(16 * mib, 0), weigh(3 * mib, mib)),
            ("fits".into(), "fits".into())
        );
        assert!(weigh(16 * mib + 1, 0).contains("16777216 bytes per shard"));
        assert!(weigh(3 * mib, mib + 1).contains("1048576 bytes per slot"));
    }
}
