//! Decides which requests are sent again, and which failure the caller is given in the end. One
//! rule for every client here.
//!
//! A request that changes nothing is tried at server after server until the time is up: that one of
//! them broke the connection says nothing about the others, and leaves nothing open. The same goes
//! for what does no harm when it is done twice, except that in the end it may have been done.
//! Anything else ends with the first answer that does not come.

use std::time::Duration;

use super::call::time_to_answer_ms;
use crate::api::store::Failure;

/// Time that one server has where another could be asked, or half of the time that is left
/// if that is more.
const ATTEMPT_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// The longest that a server lets itself be told to wait. Who has more time asks again.
const SERVER_TIMEOUT_MAX_MS: u64 = 60_000;

/// Returns for how many milliseconds a server is told to wait, by one that waits for it so long.
pub fn server_timeout_ms(timeout: Duration) -> u64 {
    time_to_answer_ms(timeout).min(SERVER_TIMEOUT_MAX_MS)
}

/// Effect of sending a request twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It changes nothing: a read, a dry run, a look at how a change gets on.
    Safe,
    /// Twice is as good as once: it has an idempotency key or a guard, or names what is to be so.
    Idempotent,
    /// Twice may be once too often.
    Once,
}

impl Effect {
    /// Returns whether another server is to be asked after this failure, or the same one again.
    pub fn goes_on_after(self, failure: &Failure) -> bool {
        match failure {
            Failure::Elsewhere { .. } | Failure::Unavailable { .. } => true,
            Failure::Unknown { .. } => self != Effect::Once,
            Failure::Overloaded { .. } | Failure::Invalid { .. } | Failure::TooLarge { .. } => {
                false
            }
        }
    }

    /// Returns how long one server is waited for when so much time is left. It has all of that only
    /// if no other will be asked.
    pub fn attempt_timeout(self, left: Duration) -> Duration {
        let timeout = match self {
            Effect::Once => left,
            Effect::Safe | Effect::Idempotent => left.min((left / 2).max(ATTEMPT_TIMEOUT_MIN)),
        };
        assert!(timeout <= left, "an attempt ends before its request does");
        timeout
    }

    /// Returns the failure as it is told: nothing was done by what changes nothing.
    pub fn report(self, failure: Failure) -> Failure {
        match (self, failure) {
            (Effect::Safe, Failure::Unknown { reason }) => Failure::Unavailable {
                reason,
                retry_after_ms: 1000,
            },
            (Effect::Safe | Effect::Idempotent | Effect::Once, failure) => failure,
        }
    }
}

/// The source of a failure: the more it can know, the greater it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureSource {
    /// There was no connection, or no answer on it.
    Nobody,
    /// It says what it lacks.
    Server,
}

/// The failure to be told of those that a request met at one server after the other.
#[derive(Debug)]
pub struct FailureHistory {
    effect: Effect,
    last: Option<(FailureSource, Failure)>,
    /// The first that leaves open whether it was done.
    maybe_done: Option<Failure>,
}

impl FailureHistory {
    pub fn new(effect: Effect) -> Self {
        Self {
            effect,
            last: None,
            maybe_done: None,
        }
    }

    /// Notes a failure that the request is not ended by.
    ///
    /// That a server has no quorum is worth more than that another, which may be dead for weeks,
    /// takes no connection; of two that are worth the same, the later counts.
    pub fn note(&mut self, by: FailureSource, failure: Failure) {
        let failure = self.effect.report(failure);
        if matches!(failure, Failure::Unknown { .. }) {
            self.maybe_done.get_or_insert_with(|| failure.clone());
        }
        if self.last.as_ref().is_none_or(|(known, _)| *known <= by) {
            self.last = Some((by, failure));
        }
    }

    /// Returns whether some server may have done it.
    pub fn may_be_done(&self) -> bool {
        self.maybe_done.is_some()
    }

    /// Returns what is told when `failure` ends the request: none unsays that it may have been done
    /// before.
    pub fn final_failure(&self, failure: Failure) -> Failure {
        self.maybe_done.clone().unwrap_or(failure)
    }

    /// Returns what it does to send the request twice.
    pub fn effect(&self) -> Effect {
        self.effect
    }

    /// Returns what is told when the time is up; none where nobody was asked.
    pub fn failure(&self) -> Option<&Failure> {
        self.maybe_done
            .as_ref()
            .or(self.last.as_ref().map(|(_, failure)| failure))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable(reason: &str) -> Failure {
        Failure::Unavailable {
            reason: reason.into(),
            retry_after_ms: 1000,
        }
    }

    fn unknown(reason: &str) -> Failure {
        Failure::Unknown {
            reason: reason.into(),
        }
    }

    #[test]
    fn only_what_may_be_done_twice_goes_on_after_an_answer_that_does_not_come() {
        for (effect, goes_on, told) in [
            (Effect::Safe, true, unavailable("reset")),
            (Effect::Idempotent, true, unknown("reset")),
            (Effect::Once, false, unknown("reset")),
        ] {
            assert_eq!(
                effect.goes_on_after(&unknown("reset")),
                goes_on,
                "{effect:?}"
            );
            assert_eq!(effect.report(unknown("reset")), told, "{effect:?}");
            assert!(
                effect.goes_on_after(&unavailable("no quorum")),
                "{effect:?}"
            );
            assert!(
                !effect.goes_on_after(&Failure::Invalid {
                    reason: String::new()
                }),
                "{effect:?}"
            );
        }
    }

    #[test]
    fn a_server_is_given_less_time_than_there_is_and_no_more_than_it_takes() {
        let half = |effect: Effect| effect.attempt_timeout(Duration::from_secs(8)).as_secs();
        assert_eq!(
            [Effect::Safe, Effect::Idempotent, Effect::Once].map(half),
            [4, 4, 8]
        );
        assert_eq!(
            Effect::Safe
                .attempt_timeout(Duration::from_millis(900))
                .as_millis(),
            900
        );
        let told = |ms: u64| server_timeout_ms(Duration::from_millis(ms));
        assert_eq!(
            [0, 1, 100, 5000, 60_000, 90_000].map(told),
            [1, 1, 90, 4900, 59_900, 60_000]
        );
    }

    #[test]
    fn what_a_server_says_counts_for_more_than_one_that_is_silent() {
        let told = |effect: Effect, heard: &[(FailureSource, Failure)]| {
            let mut last = FailureHistory::new(effect);
            heard
                .iter()
                .for_each(|(by, failure)| last.note(*by, failure.clone()));
            last.failure().cloned()
        };
        let no_quorum = (FailureSource::Server, unavailable("no quorum"));
        let dead = (FailureSource::Nobody, unavailable("connection refused"));
        let reset = (FailureSource::Nobody, unknown("reset"));
        assert_eq!(told(Effect::Safe, &[]), None);
        assert_eq!(
            told(Effect::Safe, &[no_quorum.clone(), dead.clone()]),
            Some(no_quorum.1.clone())
        );
        assert_eq!(
            told(Effect::Safe, &[reset.clone(), dead.clone()]),
            Some(dead.1.clone())
        );
        assert_eq!(
            told(Effect::Safe, &[reset.clone(), no_quorum.clone()]),
            Some(no_quorum.1.clone())
        );
        assert_eq!(
            told(Effect::Idempotent, &[reset.clone(), no_quorum.clone()]),
            Some(reset.1.clone())
        );
    }
}
