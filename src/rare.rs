//! Sizes and moments that a simulation makes common: [`or`] returns the rare one where it does. A
//! release has none of them: without the feature `testing` the usual one is all there is.

/// A branch of a node that large data or bad luck takes otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RareBranch {
    /// Segments of the log hold a few records, and no entry stays in memory.
    SmallSegments,
    /// Tables of maps hold a few pairs before they are written down, and trees are often copied.
    SmallTables,
    /// A snapshot is worth a few entries, and the log behind it is let go of.
    EagerSnapshots,
    /// Blocks of snapshot files, and what is sent of them at once, hold a pair or less.
    SmallBlocks,
    /// A chunk of a slot move holds one pair.
    OnePairChunks,
    /// Slots that are moved are frozen as soon as it is allowed.
    EarlyFreeze,
    /// Hints of who leads elsewhere are lost.
    LostHints,
}

/// Returns `rare` where the nodes of this thread take the branch, else `usual`.
pub fn or<T>(branch: RareBranch, rare: T, usual: T) -> T {
    match is_taken(branch) {
        true => rare,
        false => usual,
    }
}

/// Returns whether the nodes of this thread take the branch.
pub fn is_taken(branch: RareBranch) -> bool {
    #[cfg(any(test, feature = "testing"))]
    return testing::is_taken(branch);
    #[cfg(not(any(test, feature = "testing")))]
    {
        let _ = branch;
        false
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod testing {
    //! Has branches taken.

    use std::cell::Cell;

    use super::RareBranch;

    pub const ALL: [RareBranch; 7] = [
        RareBranch::SmallSegments,
        RareBranch::SmallTables,
        RareBranch::EagerSnapshots,
        RareBranch::SmallBlocks,
        RareBranch::OnePairChunks,
        RareBranch::EarlyFreeze,
        RareBranch::LostHints,
    ];

    thread_local! {
        static TAKEN: Cell<u32> = const { Cell::new(0) };
    }

    /// Has the nodes of this thread take these branches from now on, and no others.
    pub fn take(branches: &[RareBranch]) {
        TAKEN.set(branches.iter().map(|branch| 1 << *branch as u32).sum());
    }

    pub(super) fn is_taken(branch: RareBranch) -> bool {
        TAKEN.get() & (1 << branch as u32) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_branch_is_taken_only_where_a_simulation_says_so() {
        for branch in testing::ALL {
            assert_eq!(or(branch, 1, 2), 2, "{branch:?}");
        }
        testing::take(&[RareBranch::EarlyFreeze]);
        let taken: Vec<RareBranch> = testing::ALL
            .into_iter()
            .filter(|branch| is_taken(*branch))
            .collect();
        testing::take(&[]);
        assert_eq!(taken, [RareBranch::EarlyFreeze]);
    }
}
