//! What clients asked of one key and what they were told: the input of the checker in
//! `linearizable`.
//!
//! Rejected requests are not here (they changed nothing); a request whose answer was lost is, with
//! [`Outcome::Unknown`].

use std::fmt;
use std::time::Duration;

/// A value. Unique over a history, so that a value names the write that stored it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u64);

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Get,
    Put { value: Value, condition: Condition },
    Delete { condition: Condition },
}

/// What must hold of the key for a write to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Condition {
    None,
    /// `If-None-Match: *`
    Absent,
    /// `If-Match: *`
    Present,
    /// `If-Match` with the ETag that was read with, or answered for, this value.
    Holds(Value),
}

impl Condition {
    pub fn holds(self, current: Option<Value>) -> bool {
        match self {
            Condition::None => true,
            Condition::Absent => current.is_none(),
            Condition::Present => current.is_some(),
            Condition::Holds(value) => current == Some(value),
        }
    }

    /// Returns the value that it asks for.
    pub fn named(self) -> Option<Value> {
        match self {
            Condition::None | Condition::Absent | Condition::Present => None,
            Condition::Holds(value) => Some(value),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The value and its revision.
    Got(Option<(Value, u64)>),
    /// The value, of which no revision was told.
    Read(Option<Value>),
    /// Tells whether there is a value.
    Found(bool),
    Put {
        created: bool,
        revision: u64,
    },
    /// It was put, and no revision was told, nor perhaps whether the key was new.
    Stored {
        created: Option<bool>,
    },
    Deleted {
        existed: bool,
    },
    ConditionFailed,
    /// It may have happened, may yet happen, or never.
    Unknown,
}

/// One request for one key. Instants are of one clock, counted from the start of the run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    pub client: usize,
    pub called: Duration,
    /// When its answer came. Not looked at where the outcome is unknown: such a write has no end.
    pub returned: Duration,
    pub action: Action,
    pub outcome: Outcome,
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (called, returned) = (self.called.as_secs_f64(), self.returned.as_secs_f64());
        write!(
            f,
            "[{called:.6} .. {returned:.6}] client {}: {:?} -> {:?}",
            self.client, self.action, self.outcome
        )
    }
}
