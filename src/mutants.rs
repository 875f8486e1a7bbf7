//! Faults that are put into nodes on purpose, to see that the simulation finds them. A release has
//! none: without the feature `testing`, [`is_on`] is false before anything is compiled.

/// A fault of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The log does not sync what it writes.
    AnswerBeforeSync,
    /// A vote is not written to the log.
    VoteNotWritten,
    /// A read asks no quorum whether this replica still leads.
    ReadByDeposedLeader,
}

/// Returns whether the nodes of this thread have the fault.
pub fn is_on(mutant: Mutant) -> bool {
    #[cfg(any(test, feature = "testing"))]
    return testing::is_on(mutant);
    #[cfg(not(any(test, feature = "testing")))]
    {
        let _ = mutant;
        false
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod testing {
    //! Names the faults, and puts them in.

    use std::cell::Cell;

    use super::Mutant;

    /// All of them, with their names and what is wrong.
    pub const ALL: [(&str, Mutant, &str); 3] = [
        (
            "answer-before-sync",
            Mutant::AnswerBeforeSync,
            "the log does not sync what it writes",
        ),
        (
            "vote-not-written",
            Mutant::VoteNotWritten,
            "a vote is not written to the log",
        ),
        (
            "read-by-deposed-leader",
            Mutant::ReadByDeposedLeader,
            "a read asks no quorum whether its leader still leads",
        ),
    ];

    thread_local! {
        static MUTANT: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Puts the fault into the nodes of this thread.
    pub fn put_in(mutant: Option<Mutant>) {
        MUTANT.set(mutant);
    }

    pub(super) fn is_on(mutant: Mutant) -> bool {
        MUTANT.get() == Some(mutant)
    }
}
