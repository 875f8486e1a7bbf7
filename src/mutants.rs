//! Faults that are put into nodes on purpose, to see that the simulation finds them. A release has
//! none: without the feature `testing`, [`is_on`] is false before anything is compiled.
//! `docs/simulation.md` says which oracle catches each.

macro_rules! mutants {
    ($($variant:ident $name:literal $what:literal)*) => {
        /// A fault of a node.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Mutant {
            $(#[doc = $what] $variant,)*
        }

        /// Lists all of them, with their names and what is wrong.
        #[cfg(any(test, feature = "testing"))]
        pub const ALL: &[(&str, Mutant, &str)] = &[$(($name, Mutant::$variant, $what),)*];
    };
}

mutants! {
    AnswerBeforeSync "answer-before-sync"
        "the log does not sync what it writes"
    VoteNotWritten "vote-not-written"
        "a vote is not written to the log"
    CommittedAhead "committed-ahead"
        "the last entry of a log is remembered as committed, whether it is or not"
    TruncationNotLogged "truncation-not-logged"
        "entries that a new leader replaces are cut from memory and not from the log"
    AppliedBehindData "applied-behind-data"
        "a checkpoint writes the data of its entries, and the applied id of those before"
    SnapshotWithoutLastBatch "snapshot-without-last-batch"
        "a snapshot says that it has entries whose changes it lacks"
    BothSnapshotsDeleted "both-snapshots-deleted"
        "the removal of the old snapshot file takes the new one along"
    ReadByDeposedLeader "read-by-deposed-leader"
        "a read asks no quorum whether its leader still leads"
    ReadJoinsRunningRound "read-joins-running-round"
        "a read is confirmed by a round that began before it"
    ResultSpeaksForUnanswered "result-speaks-for-unanswered"
        "the answer to an append is credited to a later request that nobody has answered"
    RetiredReplicaVotes "retired-replica-votes"
        "a node's replica of a group answers frames for the one that it had before"
    RequestsNotRemembered "requests-not-remembered"
        "the answer to a request with an idempotency key is not remembered"
    RequestsNotMoved "requests-not-moved"
        "a slot moves without the memory of its requests"
    GroupTimeByWallClock "group-time-by-wall-clock"
        "a leader takes the time of its group from its wall clock"
    ApplyDiffersBetweenBuilds "apply-differs-between-builds"
        "replicas with an odd id keep what an entry deletes"
    OlderMoveActivates "older-move-activates"
        "a delayed activation is obeyed, though a later move has had the slots"
    ReleasedSlotServed "released-slot-served"
        "a shard goes on serving slots that it has released to another"
    FreezeNotObeyed "freeze-not-obeyed"
        "slots are written to while a move has them frozen"
    RevisionsBeginAnew "revisions-begin-anew"
        "a slot that was moved counts its revisions from the start"
    StrangersViewBelieved "strangers-view-believed"
        "a view of another cluster is taken for a newer one of this"
    OlderCopyAccepted "older-copy-accepted"
        "a node goes on from an older copy of its directory, and nobody refuses it"
    WitnessPurgesWhatOthersLack "witness-purges-what-others-lack"
        "a witness purges its log though a replica with a map lacks it"
}

/// Returns whether the nodes of this thread have the fault.
#[inline(always)]
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
    //! Puts the faults in.

    use std::cell::Cell;

    use super::Mutant;

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
