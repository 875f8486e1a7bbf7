//! [`FairBudget`]: memory that the groups of a node, or its lanes, share for one purpose.
//!
//! A bound of each group alone does not bound a node: a thousand groups on a disk that stalls would
//! hold gigabytes. So what they hold is charged to a budget of the node. And no group may use up
//! all of it, or one without a quorum would stop the others: each may hold as much as is still free
//! (Choudhury and Hahne, "Dynamic queue length thresholds", 1998). One group holds at most half,
//! two at most a third each; something is always free for the next.
//!
//! A little of each group is never refused, so that elections and changes of its members go on. And
//! while nothing at all is held, a request of any size is granted, so that everything valid can be
//! done.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Semaphore;

use crate::budget::{Budget, Share};

/// Bytes that a group may hold whatever the others do; a thousand groups have 16 MiB of it.
const ALWAYS_BYTES: usize = 16 << 10;

/// Bytes that one group, or one lane, holds of a budget.
pub type HeldBytes = Arc<AtomicUsize>;

/// A budget of bytes that those who share it use fairly.
#[derive(Debug)]
pub struct FairBudget {
    budget: Arc<Budget>,
}

/// Bytes taken of a budget, given back when this is dropped.
#[derive(Debug)]
pub struct Reservation {
    held: HeldBytes,
    bytes: usize,
    /// None for what is always granted.
    _share: Option<Share>,
}

impl FairBudget {
    pub fn new(bytes_max: usize) -> Self {
        Self {
            budget: Budget::new(bytes_max),
        }
    }

    /// Returns the budget behind it, for metrics.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Takes `bytes` for the owner of `held`; returns None if that is more than its fair share.
    pub fn take(&self, held: &HeldBytes, bytes: usize) -> Option<Reservation> {
        let before = held.load(Ordering::Relaxed);
        let share = match before.saturating_add(bytes) {
            // Heartbeats and votes pass even if the entries of the group have used up its share.
            _ if bytes == 0 => None,
            0..=ALWAYS_BYTES => None,
            wanted => Some(self.share(wanted, bytes)?),
        };
        held.fetch_add(bytes, Ordering::Relaxed);
        Some(Reservation {
            held: held.clone(),
            bytes,
            _share: share,
        })
    }

    fn share(&self, wanted: usize, bytes: usize) -> Option<Share> {
        let (used, bytes_max) = (self.budget.used(), self.budget.bytes_max());
        let is_fair = used == 0 || wanted <= bytes_max.saturating_sub(used);
        // A request for more than the whole budget takes all of it. One past its fair share is
        // refused by the budget, which counts the refusal.
        let asked = if is_fair {
            bytes.min(bytes_max)
        } else {
            usize::MAX
        };
        self.budget.take(asked)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let before = self.held.fetch_sub(self.bytes, Ordering::Relaxed);
        assert!(before >= self.bytes, "more is given back than was taken");
    }
}

/// The memory budgets of a node.
#[derive(Debug)]
pub struct RaftBudgets {
    /// For writes that wait to be proposed, and entries that openraft has not answered.
    pub proposals: FairBudget,
    /// For frames of peers that are being handled, above all those that wait for the disk.
    pub frames: FairBudget,
    /// For frames that wait in lanes to be sent.
    pub outbox: FairBudget,
    /// Permits to read and send a piece of a snapshot.
    pub snapshot_pieces: Semaphore,
}

/// Bytes of each of the three budgets. A thousand groups that all stall can hold 128 KiB each.
const ROOM_BYTES: usize = 128 << 20;
/// Pieces of snapshots, of about a mebibyte with their frame, that are read and sent at once.
const SNAPSHOT_PIECES: usize = 16;

impl Default for RaftBudgets {
    fn default() -> Self {
        Self::new(ROOM_BYTES)
    }
}

impl RaftBudgets {
    /// Returns budgets of `bytes_max` bytes each.
    pub fn new(bytes_max: usize) -> Self {
        let budget = || FairBudget::new(bytes_max);
        let snapshot_pieces = Semaphore::new(SNAPSHOT_PIECES);
        Self {
            proposals: budget(),
            frames: budget(),
            outbox: budget(),
            snapshot_pieces,
        }
    }

    /// Returns each budget with its name in metrics.
    pub fn named(&self) -> [(&'static str, &FairBudget); 3] {
        [
            ("proposals", &self.proposals),
            ("frames", &self.frames),
            ("outbox", &self.outbox),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_hold_much_leave_room_for_others() {
        let budget = FairBudget::new(1 << 20);
        let fill = |held: &HeldBytes| -> Vec<Reservation> {
            std::iter::from_fn(|| budget.take(held, 1 << 10)).collect()
        };
        let groups: Vec<HeldBytes> = (0..4).map(|_| HeldBytes::default()).collect();
        let mut places: Vec<Vec<Reservation>> = groups.iter().map(fill).collect();
        let held: Vec<usize> = groups
            .iter()
            .map(|held| held.load(Ordering::Relaxed) >> 10)
            .collect();
        assert!(
            held[0] <= 520 && held[1] >= 240 && held[3] >= 60,
            "{held:?} KiB"
        );
        assert!(budget.budget().used() <= 1 << 20 && budget.budget().refused() >= 4);

        assert!(
            budget.take(&groups[0], 0).is_some(),
            "what costs nothing always passes"
        );
        let (late, small) = (HeldBytes::default(), ALWAYS_BYTES);
        assert!(budget.take(&late, 1 << 20).is_none());
        let always: Vec<Option<Reservation>> = (0..1000)
            .map(|_| budget.take(&HeldBytes::default(), small))
            .collect();
        assert!(
            always.iter().all(Option::is_some),
            "a little is never refused"
        );

        places.clear();
        drop(always);
        assert_eq!(
            (budget.budget().used(), groups[0].load(Ordering::Relaxed)),
            (0, 0)
        );
        let all = budget.take(&late, 5 << 20);
        assert!(all.is_some(), "where nothing is held anything is taken");
        assert!(budget.take(&HeldBytes::default(), 1 << 17).is_none());
    }
}
