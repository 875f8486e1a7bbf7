//! [`LaneLimiter`]: limits how many lanes from others are served at once.
//!
//! Anybody who reaches the port can open a lane, and name any node in its hello. So lanes that have
//! said nothing yet, lanes of nodes that the view does not have (it may be an older one) and lanes
//! of each member have a limit each. Silent lanes make room first: a node that is alive is never
//! kept out by connections that are not, and its own do not add up.

use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::raft::transport::Lane;
use crate::types::NodeId;

/// Lanes whose hello has not arrived. It comes with the first bytes, so the oldest of them is the
/// least likely to be one of ours.
const UNKNOWN_MAX: usize = 256;
/// Lanes of nodes that the view known here does not have: leaders that know a newer view call a
/// newcomer first.
const STRANGERS_MAX: usize = 192;
/// Connections of one lane of one member: the one that is used, and leftovers of those that broke
/// on its side alone.
const OF_MEMBER_MAX: usize = 4;
/// Silence after which a lane makes room for another of its kind.
const SILENCE: Duration = Duration::from_secs(5);

/// The owner of a lane, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneOwner {
    Unknown,
    Stranger,
    Member(NodeId, Lane),
}

impl LaneOwner {
    fn max_lanes(self) -> usize {
        match self {
            LaneOwner::Unknown => UNKNOWN_MAX,
            LaneOwner::Stranger => STRANGERS_MAX,
            LaneOwner::Member(..) => OF_MEMBER_MAX,
        }
    }
}

/// The lanes that are served, by owner.
#[derive(Debug, Default)]
pub struct LaneLimiter {
    holders: Mutex<BTreeMap<u64, PermitHolder>>,
    next: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug)]
struct PermitHolder {
    owner: LaneOwner,
    heard: Arc<Mutex<Instant>>,
    ended: CancellationToken,
}

/// The place of one lane, given back when this is dropped.
#[derive(Debug)]
pub struct LanePermit {
    limiter: Arc<LaneLimiter>,
    number: u64,
    heard: Arc<Mutex<Instant>>,
    /// Cancelled when the lane has to make room for another.
    pub ended: CancellationToken,
}

impl LaneLimiter {
    /// Admits a lane, in place of a silent one if need be. Returns None if all places are in use.
    pub fn take(self: &Arc<Self>, owner: LaneOwner) -> Option<LanePermit> {
        let mut holders = self.lock();
        self.make_room(&mut holders, owner)?;

        // Before it has a place, which nobody would give back after a panic.
        assert!(
            holders
                .values()
                .filter(|holder| holder.owner == owner)
                .count()
                < owner.max_lanes(),
            "{owner:?} has more lanes than it may"
        );

        let number = self.next.fetch_add(1, Ordering::Relaxed);

        // A later lane ends this one by its token, wherever it waits.
        let (heard, ended) = (
            Arc::new(Mutex::new(Instant::now())),
            CancellationToken::new(),
        );
        holders.insert(
            number,
            PermitHolder {
                owner,
                heard: heard.clone(),
                ended: ended.clone(),
            },
        );
        Some(LanePermit {
            limiter: self.clone(),
            number,
            heard,
            ended,
        })
    }

    /// Returns the number of lanes that are served.
    pub fn used(&self) -> usize {
        self.lock().len()
    }

    /// Returns the number of lanes that were refused, or had to make room.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn make_room(&self, holders: &mut BTreeMap<u64, PermitHolder>, owner: LaneOwner) -> Option<()> {
        let of_owner = || holders.iter().filter(|(_, holder)| holder.owner == owner);
        if of_owner().count() < owner.max_lanes() {
            return Some(());
        }

        self.refused.fetch_add(1, Ordering::Relaxed);
        let (heard, number) = of_owner()
            .map(|(number, holder)| (heard_at(&holder.heard), *number))
            .min()?;

        // A lane in use stays. Before its hello any lane may be a stranger's, so the oldest gives
        // way.
        if owner != LaneOwner::Unknown && heard.elapsed() < SILENCE {
            return None;
        }
        if let Some(silent) = holders.remove(&number) {
            silent.ended.cancel();
        }
        Some(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, PermitHolder>> {
        self.holders.lock()
    }
}

fn heard_at(heard: &Mutex<Instant>) -> Instant {
    *heard.lock()
}

impl LanePermit {
    /// Notes that something arrived on the lane.
    pub fn note(&self) {
        *self.heard.lock() = Instant::now();
    }
}

impl Drop for LanePermit {
    fn drop(&mut self) {
        self.limiter.lock().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_is_silent_makes_room_and_who_is_not_keeps_its_seat() {
        let limiter = Arc::new(LaneLimiter::default());
        let unknown: Vec<LanePermit> = (0..=UNKNOWN_MAX)
            .map(|_| limiter.take(LaneOwner::Unknown).expect("always"))
            .collect();
        assert!(
            unknown[0].ended.is_cancelled() && !unknown[1].ended.is_cancelled(),
            "the oldest makes room"
        );
        assert_eq!((limiter.used(), limiter.refused()), (UNKNOWN_MAX, 1));
        drop(unknown);
        assert_eq!(limiter.used(), 0);

        let owner = LaneOwner::Member(NodeId(7), Lane::Log);
        let held: Vec<LanePermit> = (0..OF_MEMBER_MAX)
            .map(|_| limiter.take(owner).expect("a seat"))
            .collect();
        assert!(limiter.take(owner).is_none(), "all were heard of just now");
        assert!(
            limiter
                .take(LaneOwner::Member(NodeId(7), Lane::Heartbeat))
                .is_some(),
            "another lane"
        );
        tokio::time::advance(SILENCE).await;
        held[0].note();
        assert!(limiter.take(owner).is_some());
        let ended: Vec<bool> = held
            .iter()
            .map(|permit| permit.ended.is_cancelled())
            .collect();
        assert_eq!(
            ended,
            [false, true, false, false],
            "the one that was silent for longest"
        );
    }
}
