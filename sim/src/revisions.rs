//! Judges the revisions of a slot. All changes of a slot, whatever their key, have one row of
//! revisions, without gaps; so they also tell whether operations on several of its keys happened at
//! one moment.
//!
//! Kept out: each key by itself, which is for `linearizable`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::history::Value;

/// An answered change of a key: the value that it has since, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// The number of the key.
    pub key: usize,
    pub value: Option<Value>,
    pub revision: u64,
    pub called: Duration,
    pub returned: Duration,
}

/// Holds what was read of several keys at one moment, if all is well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub called: Duration,
    pub returned: Duration,
    /// Of each key the value and its revision.
    pub read: Vec<(usize, Option<(Value, u64)>)>,
}

/// Holds what clients were told of a slot.
#[derive(Debug, Default)]
pub struct SlotHistory {
    pub changes: Vec<Change>,
    pub snapshots: Vec<Snapshot>,
    /// The revisions of what was done together.
    pub batches: Vec<Vec<u64>>,
    /// Changes that may have happened, or of which no revision was told.
    pub untold: u64,
    /// Keys that may have been deleted without a revision being told.
    pub untold_deletions: BTreeSet<usize>,
}

impl SlotHistory {
    /// Looks whether it can all be true. `last`: the revision of the slot at the end, if known.
    ///
    /// # Errors
    ///
    /// Names what cannot.
    pub fn check(&self, last: Option<u64>) -> Result<(), String> {
        let mut row: BTreeMap<u64, Change> = BTreeMap::new();
        for change in &self.changes {
            if let Some(other) = row.insert(change.revision, *change) {
                return Err(format!("one revision for two: {other:?} and {change:?}"));
            }
        }
        in_real_time(&row)?;
        for batch in &self.batches {
            if batch.windows(2).any(|pair| pair[0] + 1 != pair[1]) {
                return Err(format!("a batch was not done in one go: {batch:?}"));
            }
        }
        for snapshot in &self.snapshots {
            if !self.is_of_a_moment(&row, snapshot) {
                return Err(format!("at no moment it was as in {snapshot:?}: {row:?}"));
            }
        }
        self.has_no_gaps(&row, last)
    }

    /// Each revision belongs to a change, and each change has one.
    fn has_no_gaps(&self, row: &BTreeMap<u64, Change>, last: Option<u64>) -> Result<(), String> {
        let Some(last) = last else {
            return Ok(());
        };
        let told = row.len() as u64;
        let past_the_end = row.keys().next_back().is_some_and(|most| *most > last);
        if past_the_end || told > last {
            return Err(format!("{told} changes were told, and it is at {last}"));
        }
        if last > told + self.untold {
            return Err(format!(
                "it is at {last} after {told} changes, and {} that may have been",
                self.untold
            ));
        }
        Ok(())
    }

    /// Returns whether the slot was so after one of its changes, at the time of the read.
    fn is_of_a_moment(&self, row: &BTreeMap<u64, Change>, snapshot: &Snapshot) -> bool {
        let before = row.values().filter(|c| c.returned < snapshot.called);
        let mut low = before.map(|c| c.revision).max().unwrap_or(0);
        let after = row.values().filter(|c| c.called > snapshot.returned);
        let mut high = after.map(|c| c.revision - 1).min().unwrap_or(u64::MAX);
        let of_key = |key: usize| row.values().filter(move |c| c.key == key);

        let mut absent = Vec::new();
        for (key, read) in &snapshot.read {
            match read {
                Some((_, revision)) => {
                    low = low.max(*revision);
                    let next = of_key(*key).find(|c| c.revision > *revision);
                    high = high.min(next.map_or(u64::MAX, |c| c.revision - 1));
                }
                None if self.untold_deletions.contains(key) => {}
                None => absent.push(*key),
            }
        }
        let is_absent_at = |key: usize, revision: u64| {
            let last = of_key(key).take_while(|c| c.revision <= revision).last();
            last.is_none_or(|c| c.value.is_none())
        };
        // A key goes only with a change, so it is enough to look right after those.
        let mut moments = vec![low];
        moments.extend(row.keys().filter(|r| (low..=high).contains(r)));
        low <= high
            && moments
                .into_iter()
                .any(|at| absent.iter().all(|key| is_absent_at(*key, at)))
    }
}

/// Asserts that what was called after another had returned has the higher revision.
fn in_real_time(row: &BTreeMap<u64, Change>) -> Result<(), String> {
    let mut latest: Option<&Change> = None;
    for change in row.values() {
        if let Some(earlier) = latest.filter(|earlier| earlier.called > change.returned) {
            return Err(format!("revisions against time: {earlier:?}, {change:?}"));
        }
        if latest.is_none_or(|latest| latest.called < change.called) {
            latest = Some(change);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: u64) -> Duration {
        Duration::from_millis(time)
    }

    fn change(key: usize, value: Option<u64>, revision: u64, times: (u64, u64)) -> Change {
        Change {
            key,
            value: value.map(Value),
            revision,
            called: at(times.0),
            returned: at(times.1),
        }
    }

    fn read(times: (u64, u64), read: &[(usize, Option<(u64, u64)>)]) -> Snapshot {
        let valued = |read: &(usize, Option<(u64, u64)>)| {
            let (key, found) = *read;
            (key, found.map(|(value, revision)| (Value(value), revision)))
        };
        Snapshot {
            called: at(times.0),
            returned: at(times.1),
            read: read.iter().map(valued).collect(),
        }
    }

    /// Key 0 is put twice, key 1 between them and deleted at the end.
    fn history() -> SlotHistory {
        SlotHistory {
            changes: vec![
                change(0, Some(10), 1, (0, 5)),
                change(1, Some(11), 2, (10, 30)),
                change(0, Some(12), 3, (10, 30)),
                change(1, None, 4, (40, 45)),
            ],
            ..SlotHistory::default()
        }
    }

    fn with_snapshot(snapshot: Snapshot) -> Result<(), String> {
        SlotHistory {
            snapshots: vec![snapshot],
            ..history()
        }
        .check(None)
    }

    #[test]
    fn a_row_that_follows_time_is_accepted() {
        assert_eq!(history().check(Some(4)), Ok(()));
    }

    #[test]
    fn a_revision_is_given_once() {
        let mut twice = history();
        twice.changes.push(change(2, Some(13), 3, (10, 50)));
        assert!(twice.check(None).is_err());
    }

    #[test]
    fn a_later_change_has_a_higher_revision() {
        let mut late = history();
        late.changes.push(change(2, Some(13), 0, (50, 60)));
        assert!(late.check(None).is_err());
    }

    #[test]
    fn a_row_has_no_gaps_but_for_what_was_not_told() {
        assert!(history().check(Some(5)).is_err());
        let untold = SlotHistory {
            untold: 1,
            ..history()
        };
        assert_eq!(untold.check(Some(5)), Ok(()));
        assert!(untold.check(Some(6)).is_err());
        assert!(untold.check(Some(3)).is_err());
    }

    #[test]
    fn a_batch_has_revisions_in_a_row() {
        let batches = |revisions: &[u64]| SlotHistory {
            batches: vec![revisions.to_vec()],
            ..history()
        };
        assert_eq!(batches(&[2, 3]).check(None), Ok(()));
        assert!(batches(&[1, 3]).check(None).is_err());
    }

    #[test]
    fn what_was_read_together_was_there_together() {
        let good = [
            read((10, 30), &[(0, Some((10, 1))), (1, None)]),
            read((10, 30), &[(0, Some((10, 1))), (1, Some((11, 2)))]),
            read((10, 60), &[(0, Some((12, 3))), (1, Some((11, 2)))]),
            read((10, 60), &[(0, Some((12, 3))), (1, None)]),
        ];
        for snapshot in good {
            assert_eq!(with_snapshot(snapshot), Ok(()));
        }
        let torn = read((10, 30), &[(0, Some((12, 3))), (1, None)]);
        assert!(with_snapshot(torn).is_err(), "key 1 came before");
        let late = read((50, 60), &[(0, Some((12, 3))), (1, Some((11, 2)))]);
        assert!(with_snapshot(late).is_err(), "key 1 was gone by then");
        let early = read((0, 5), &[(0, None), (1, Some((11, 2)))]);
        assert!(with_snapshot(early).is_err(), "nobody had put key 1 yet");
    }
}
