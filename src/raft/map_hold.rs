//! [`MapHold`]: keeps a map as it is while another is fetched to take its place.
//!
//! A hold ends when the other map is in place, or when its deadline passes; each piece of the other
//! map that arrives extends the deadline. Callers wait for holds by number, because a hold may end
//! and another begin without being seen.

use std::time::Duration;

use futures::future::select;
use tokio::sync::watch;
use tokio::time::Instant;

use super::transport::wire::SnapshotName;

/// Time that a replica waits for another map, or for the next piece of it, before it goes on with
/// its own.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Holds a map as it is while another is fetched to take its place.
pub struct MapHold(watch::Sender<HoldState>);

#[derive(Default)]
struct HoldState {
    /// Number of the last hold: a task that waits for an earlier one must not end a later one.
    number: u64,
    deadline: Option<HoldDeadline>,
    /// The last snapshot that began to arrive, if the map was held then.
    arriving: Option<SnapshotName>,
    /// The last hold ended without another map: a snapshot for it may still be on its way.
    has_lapsed: bool,
}

#[derive(Clone, Copy)]
enum HoldDeadline {
    Until(Instant),
    /// All of another map has arrived, and takes its place as soon as it can.
    Exchanging,
}

impl Default for MapHold {
    fn default() -> Self {
        Self(watch::Sender::new(HoldState::default()))
    }
}

impl MapHold {
    /// Holds the map. Returns the number of the hold; None if the map was held already, whose
    /// deadline is then extended.
    pub fn set(&self) -> Option<u64> {
        if self.renew() {
            return None;
        }
        let mut number = 0;
        self.0.send_modify(|hold| {
            hold.number += 1;
            hold.deadline = Some(HoldDeadline::Until(Instant::now() + PATIENCE));
            hold.has_lapsed = false;
            number = hold.number;
        });
        Some(number)
    }

    /// Extends the deadline, because a piece of the new map has arrived. Returns true if the map is
    /// held.
    pub fn renew(&self) -> bool {
        let mut is_held = false;
        self.0.send_if_modified(|hold| {
            is_held = hold.deadline.is_some();

            // An exchange has no deadline: the new map is here, and filling it may take long.
            if let Some(HoldDeadline::Until(until)) = &mut hold.deadline {
                *until = Instant::now() + PATIENCE;
            }
            false
        });
        is_held
    }

    /// A snapshot begins to arrive; `is_news`: there is something in it that is not applied here.
    /// Returns whether it may: one without news was sent for a hold that has ended before another
    /// map came. Only the first after such a hold is refused, as openraft may send some by itself.
    pub fn note_arriving(&self, name: SnapshotName, is_news: bool) -> bool {
        let is_held = self.renew();
        let mut is_late = false;
        self.0.send_if_modified(|hold| {
            is_late = std::mem::take(&mut hold.has_lapsed) && !is_held && !is_news;
            hold.arriving = is_held.then_some(name);
            false
        });
        !is_late
    }

    /// Returns true if this snapshot began to arrive while the map was held.
    pub fn expects(&self, name: SnapshotName) -> bool {
        self.0.borrow().arriving == Some(name)
    }

    /// Suspends the deadline while another map takes the place of this one. Returns the number of
    /// the hold; None if the map is not held.
    pub fn begin_exchange(&self) -> Option<u64> {
        let mut number = None;
        self.0.send_if_modified(|hold| {
            if hold.deadline.is_some() {
                hold.deadline = Some(HoldDeadline::Exchanging);
                number = Some(hold.number);
            }
            false
        });
        number
    }

    /// Ends the hold of this number, and no later one.
    pub fn end(&self, number: u64) {
        self.0
            .send_if_modified(|hold| hold.number == number && hold.deadline.take().is_some());
    }

    /// Ends the current hold, whichever it is.
    pub fn clear(&self) {
        self.0.send_if_modified(|hold| {
            let was_held = hold.deadline.take().is_some();
            hold.has_lapsed |= was_held;
            was_held
        });
    }

    /// Returns true while the map is held.
    pub fn is_set(&self) -> bool {
        self.0.borrow().deadline.is_some()
    }

    /// Waits until the map is not held.
    pub async fn wait(&self) {
        if self.is_set() {
            // The sender lives as long as this value, so the wait cannot fail.
            drop(
                self.0
                    .subscribe()
                    .wait_for(|hold| hold.deadline.is_none())
                    .await,
            );
        }
    }

    /// Waits until the hold of this number is over, and ends it at its deadline. Returns true if it
    /// did.
    pub async fn outlast(&self, number: u64) -> bool {
        let mut seen = self.0.subscribe();
        let over = seen.wait_for(|hold| hold.number != number || hold.deadline.is_none());
        select(std::pin::pin!(over), std::pin::pin!(self.run_out(number))).await;
        let mut ran_out = false;
        self.0.send_if_modified(|hold| {
            let is_due = matches!(
                hold.deadline,
                Some(HoldDeadline::Until(until)) if until <= Instant::now()
            );
            ran_out = hold.number == number && is_due;
            if ran_out {
                hold.deadline = None;
                hold.has_lapsed = true;
            }
            ran_out
        });
        ran_out
    }

    /// Waits until the deadline of the hold has passed.
    async fn run_out(&self, number: u64) {
        loop {
            let until = match *self.0.borrow() {
                HoldState {
                    number: now,
                    deadline: Some(HoldDeadline::Until(until)),
                    ..
                } if now == number => until,
                HoldState { .. } => Instant::now() + PATIENCE,
            };
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_lasts_while_pieces_arrive_and_ends_no_other_hold() {
        let hold = Arc::new(MapHold::default());
        let outlast = |number| {
            let hold = hold.clone();
            tokio::spawn(async move { hold.outlast(number).await })
        };
        let first = outlast(hold.set().expect("a hold"));
        for _ in 0..5 {
            tokio::time::sleep(PATIENCE / 2).await;
            assert!(hold.renew(), "a piece came in time");
        }
        tokio::time::sleep(PATIENCE * 2).await;
        assert!(!hold.is_set(), "no piece came any more");
        assert!(first.await.expect("it ends"));

        let second = outlast(hold.set().expect("a hold"));
        tokio::time::sleep(PATIENCE / 2).await;
        // Nobody sees that it is not held for a moment.
        hold.clear();
        let number = hold.set().expect("another hold");
        tokio::time::sleep(PATIENCE / 4 * 3).await;
        assert!(hold.is_set(), "the patience of another hold has ended it");
        assert!(!second.await.expect("it ends"));

        let third = outlast(number);
        assert_eq!(hold.begin_exchange(), Some(number));
        tokio::time::sleep(PATIENCE * 5).await;
        assert!(hold.is_set(), "it is being filled");
        hold.end(number - 1);
        assert!(hold.is_set(), "another has ended it");
        hold.end(number);
        assert!(!hold.is_set() && !third.await.expect("it ends"));
        assert_eq!(hold.begin_exchange(), None);
    }
}
