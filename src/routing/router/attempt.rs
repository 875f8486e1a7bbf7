//! Decides what a failed attempt calls for: its failure goes to the caller, or it is tried again.
//! The router does it.

use std::time::Duration;

use tokio::time::Instant;

use super::pause::pause_after;
use super::queues::AwaitedAccess;
use crate::api::shard_map::ShardMap;
use crate::api::store::{Failure, Options, Routing};
use crate::types::{GroupId, Slot};

/// State of the attempts at one request (or at one shard's part of it).
#[derive(Debug, Clone)]
pub(super) struct RetryState {
    options: Options,
    deadline: Instant,
    /// Doing it twice does no harm: a read, or a write with an idempotency key.
    repeatable: bool,
    single_key: bool,
    /// Access that it needs of its shards.
    want: AwaitedAccess,
    attempts: u32,
    /// An earlier attempt ended unknown.
    maybe_done: bool,
}

/// An attempt that may be followed by another.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Retry {
    /// Failure that the caller is told if there is no time for another attempt.
    pub failure: Failure,
    /// Look for a newer map first.
    pub refresh: bool,
    /// The map was wrong: with a newer one there is nothing to wait for.
    pub map_is_old: bool,
    pub maybe_done: bool,
    /// The shard that the slot was given to, as the last shard said.
    pub hint: Option<(Slot, GroupId)>,
    /// The shard that did not answer: who waits for it waits for its leader.
    pub leader_of: Option<GroupId>,
}

impl Retry {
    fn certainly_not_done(failure: Failure) -> Self {
        Self {
            failure,
            refresh: true,
            map_is_old: false,
            maybe_done: false,
            hint: None,
            leader_of: None,
        }
    }

    pub fn no_map() -> Self {
        let failure = unavailable("the shards of the cluster are not known yet".into());
        Self {
            map_is_old: true,
            ..Self::certainly_not_done(failure)
        }
    }

    pub fn unowned() -> Self {
        let failure = unavailable("no shard owns the slot of this key".into());
        Self {
            map_is_old: true,
            ..Self::certainly_not_done(failure)
        }
    }

    pub fn not_owned(slot: Slot) -> Self {
        Self {
            map_is_old: true,
            ..Self::certainly_not_done(unavailable(format!(
                "slot {slot} is moving to another shard"
            )))
        }
    }

    pub fn moved(slot: Slot, to: Option<GroupId>) -> Self {
        Self {
            hint: to.map(|to| (slot, to)),
            ..Self::not_owned(slot)
        }
    }

    pub fn frozen(slot: Slot) -> Self {
        let failure = unavailable(format!(
            "slot {slot} is moving to another shard, which holds writes back"
        ));
        Self {
            refresh: false,
            ..Self::certainly_not_done(failure)
        }
    }
}

impl RetryState {
    /// Begins the attempts at a request. The deadline counts from now.
    pub fn new(options: Options) -> Self {
        let deadline = Instant::now() + options.timeout;
        Self {
            options,
            deadline,
            repeatable: false,
            single_key: false,
            want: AwaitedAccess::Read,
            attempts: 0,
            maybe_done: false,
        }
    }

    pub fn repeatable(self) -> Self {
        Self {
            repeatable: true,
            ..self
        }
    }

    pub fn single_key(self) -> Self {
        Self {
            single_key: true,
            ..self
        }
    }

    /// Says that the request changes something, for which it is not enough that its shard is read.
    pub fn writing(self) -> Self {
        Self {
            want: AwaitedAccess::Write,
            ..self
        }
    }

    pub fn want(&self) -> AwaitedAccess {
        self.want
    }

    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Returns the options of the next attempt: with the time that is left. A client is sent
    /// elsewhere only with a single key, and only while nothing can have happened: what it hears
    /// there need not be true of an attempt made here.
    pub fn options(&self) -> Options {
        let routing = if self.single_key && !self.maybe_done {
            self.options.routing
        } else {
            Routing::Proxy
        };
        Options {
            timeout: self.deadline.saturating_duration_since(Instant::now()),
            routing,
            ..self.options
        }
    }

    /// As [`RetryState::options`], of an attempt at this key: nobody is sent elsewhere with one
    /// whose slot is on its way.
    pub fn options_at(&self, key: &[u8], map: Option<&ShardMap>) -> Options {
        let mut options = self.options();
        if map.is_some_and(|map| map.is_moving(key)) {
            options.routing = Routing::Proxy;
        }
        options
    }

    /// Decides what the failure of an attempt at `shard` calls for.
    ///
    /// # Errors
    ///
    /// Says what to tell the caller, if another attempt would not help or not be safe.
    pub fn classify(&self, shard: GroupId, failure: Failure) -> Result<Retry, Failure> {
        let retry = self.weigh(failure)?;
        Ok(Retry {
            leader_of: Some(shard),
            ..retry
        })
    }

    fn weigh(&self, failure: Failure) -> Result<Retry, Failure> {
        match failure {
            // The client follows the redirect itself where it may. Else the leader is looked for
            // from here.
            Failure::Elsewhere { shard, address } => {
                if self.options().routing == Routing::Redirect {
                    return Err(Failure::Elsewhere { shard, address });
                }
                Ok(Retry::certainly_not_done(unavailable(format!(
                    "shard {shard:#} is changing its leader, perhaps to {address}"
                ))))
            }
            // The shard says that it did nothing, so another attempt can't do it twice.
            Failure::Unavailable { .. } => Ok(Retry::certainly_not_done(failure)),
            // A shard answers a known idempotency key from its record, and a read changes nothing.
            Failure::Unknown { .. } if self.repeatable => Ok(Retry {
                maybe_done: true,
                ..Retry::certainly_not_done(failure)
            }),
            Failure::Unknown { .. } => Err(failure),
            // Trying again would add load to a shard that has too much, or get the same answer.
            Failure::Overloaded { .. } | Failure::Invalid { .. } | Failure::TooLarge { .. } => {
                Err(self.final_failure(failure))
            }
        }
    }

    /// Returns what the caller is told in the end: no attempt's failure unsays that an earlier one
    /// may have happened.
    pub fn final_failure(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Unknown { .. } => failure,
            _ if !self.maybe_done => failure,
            other => Failure::Unknown {
                reason: format!("an attempt got no answer; the last one: {other}"),
            },
        }
    }

    /// Returns the number of attempts that have failed.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Notes that an attempt failed, while others look for when the next may be made.
    pub fn failed_attempt(&mut self, maybe_done: bool) {
        self.maybe_done |= maybe_done;
        self.attempts = self.attempts.saturating_add(1);
    }

    pub fn maybe_done(&self) -> bool {
        self.maybe_done
    }

    /// Returns the pause before the next attempt: doubling, with half of it random, so that those
    /// who failed together don't come back together.
    pub fn next_pause(&mut self, maybe_done: bool, random: u64) -> Duration {
        let pause = pause_after(self.attempts, random);
        self.failed_attempt(maybe_done);
        pause
    }
}

fn unavailable(reason: String) -> Failure {
    Failure::Unavailable {
        reason,
        retry_after_ms: 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::super::pause::{PAUSE_MAX, PAUSE_MIN};
    use super::*;
    use crate::api::store::Consistency;

    fn options(routing: Routing) -> Options {
        Options {
            consistency: Consistency::Linearizable,
            routing,
            timeout: Duration::from_secs(5),
        }
    }

    fn elsewhere() -> Failure {
        Failure::Elsewhere {
            shard: GroupId(1),
            address: "a:1".parse().expect("an address"),
        }
    }

    fn unknown() -> Failure {
        Failure::Unknown {
            reason: "no answer".into(),
        }
    }

    #[tokio::test]
    async fn only_what_is_safe_is_tried_again() {
        let proxy = RetryState::new(options(Routing::Proxy));
        let redirect = RetryState::new(options(Routing::Redirect));
        let again = [
            (proxy.clone(), elsewhere()),
            (proxy.clone().single_key(), elsewhere()),
            (redirect.clone(), elsewhere()),
            (proxy.clone(), unavailable(String::new())),
            (redirect.clone().single_key(), unavailable(String::new())),
            (proxy.clone().repeatable(), unknown()),
        ];
        for (retry_state, failure) in again {
            assert!(
                retry_state.classify(GroupId(1), failure.clone()).is_ok(),
                "{failure:?} of {retry_state:?}"
            );
        }
        let given_up = [
            (redirect.clone().single_key(), elsewhere()),
            (proxy.clone(), unknown()),
            (
                proxy.clone().repeatable(),
                Failure::Overloaded {
                    limit: String::new(),
                    retry_after_ms: 1,
                },
            ),
            (
                proxy.clone().repeatable(),
                Failure::Invalid {
                    reason: String::new(),
                },
            ),
            (
                proxy.clone().repeatable(),
                Failure::TooLarge {
                    limit: String::new(),
                },
            ),
        ];
        for (retry_state, failure) in given_up {
            assert_eq!(
                retry_state.classify(GroupId(1), failure.clone()),
                Err(failure),
                "{retry_state:?}"
            );
        }
    }

    #[tokio::test]
    async fn once_unknown_a_write_stays_unknown_until_it_is_answered() {
        let mut retry_state = RetryState::new(options(Routing::Redirect))
            .repeatable()
            .single_key();
        let retry = retry_state
            .classify(GroupId(1), unknown())
            .expect("it is repeatable");
        assert!(retry.maybe_done);
        retry_state.next_pause(retry.maybe_done, 0);
        assert!(matches!(
            retry_state.final_failure(unavailable(String::new())),
            Failure::Unknown { .. }
        ));
        assert!(matches!(
            retry_state.classify(
                GroupId(1),
                Failure::TooLarge {
                    limit: String::new()
                }
            ),
            Err(Failure::Unknown { .. })
        ));
        assert!(
            retry_state.classify(GroupId(1), elsewhere()).is_ok(),
            "the client is not sent away with what may have happened here"
        );
        assert_eq!(retry_state.options().routing, Routing::Proxy);
    }

    #[tokio::test]
    async fn pauses_grow_to_a_bound() {
        let mut retry_state = RetryState::new(options(Routing::Proxy));
        let pauses: Vec<_> = (0..40)
            .map(|n| retry_state.next_pause(false, u64::MAX / 41 * n))
            .collect();
        assert!(pauses[0] >= PAUSE_MIN / 2 && pauses[0] <= PAUSE_MIN);
        assert!(
            pauses[10..]
                .iter()
                .all(|pause| *pause >= PAUSE_MAX / 2 && *pause <= PAUSE_MAX)
        );
    }
}
