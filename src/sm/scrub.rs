//! Decides how fast, and how often, a node reads again what it keeps on its disk.

/// Bytes that a scrub reads in a second.
pub const BYTES_PER_SECOND: u64 = 16 << 20;
/// The first scrub of a process begins so long after its start, or sooner where scrubs are more
/// frequent: one that is started anew each day must not put it off for ever.
const FIRST_AFTER_MS: u64 = 3_600_000;
/// After damage that could not be mended the next begins so soon.
const AGAIN_AFTER_MS: u64 = 600_000;

/// Kinds of files that a scrub reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ScrubKind {
    /// A sealed segment of the log.
    Segment,
    Snapshot,
    /// The file of a witness.
    Witness,
    /// The tree of a map.
    Tree,
}

impl ScrubKind {
    pub const ALL: [Self; 4] = [Self::Segment, Self::Snapshot, Self::Witness, Self::Tree];

    pub fn name(self) -> &'static str {
        match self {
            Self::Segment => "segment",
            Self::Snapshot => "snapshot",
            Self::Witness => "witness",
            Self::Tree => "tree",
        }
    }

    /// Returns what is done about damage of it, as the end of a sentence.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Segment => "the replicas that need it write snapshots and let go of it",
            Self::Snapshot => "it is written anew",
            Self::Witness => "it is written anew from memory",
            Self::Tree => "its replica stops, and rebuilds it from its snapshot and the log",
        }
    }
}

/// Returns how long to rest, having read `bytes` in `elapsed_ms`, so as not to read faster than
/// [`BYTES_PER_SECOND`].
pub fn rest_ms(bytes: u64, elapsed_ms: u64) -> u64 {
    let due_ms = u128::from(bytes) * 1000 / u128::from(BYTES_PER_SECOND);
    u64::try_from(due_ms)
        .unwrap_or(u64::MAX)
        .saturating_sub(elapsed_ms)
}

/// Returns how long after the start of the process the first scrub begins; none: there are none.
pub fn first_after_ms(every_ms: u64) -> Option<u64> {
    (every_ms > 0).then(|| every_ms.min(FIRST_AFTER_MS))
}

/// Returns how long after the end of a scrub the next begins; none: only when it is asked for.
pub fn next_after_ms(every_ms: u64, is_all_mended: bool) -> Option<u64> {
    let after_ms = if is_all_mended {
        every_ms
    } else {
        every_ms.min(AGAIN_AFTER_MS)
    };
    (every_ms > 0).then_some(after_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_no_faster_than_its_rate() {
        assert_eq!(rest_ms(BYTES_PER_SECOND, 0), 1000);
        assert_eq!(rest_ms(BYTES_PER_SECOND, 400), 600);
        assert_eq!(rest_ms(BYTES_PER_SECOND, 5000), 0);
        assert_eq!(rest_ms(u64::MAX, 0) / 1000, u64::MAX / BYTES_PER_SECOND);
    }

    #[test]
    fn a_week_does_not_wait_for_a_process_that_lives_a_day() {
        const WEEK_MS: u64 = 7 * 24 * 3_600_000;
        assert_eq!(first_after_ms(0), None);
        assert_eq!(first_after_ms(500), Some(500));
        assert_eq!(first_after_ms(WEEK_MS), Some(3_600_000));
        assert_eq!(next_after_ms(WEEK_MS, true), Some(WEEK_MS));
        assert_eq!(next_after_ms(WEEK_MS, false), Some(600_000));
        assert_eq!(next_after_ms(500, false), Some(500));
        assert_eq!(next_after_ms(0, true), None);
        assert_eq!(next_after_ms(0, false), None);
    }
}
