//! Budgets of memory: bytes that many requests share, taken before they are used.
//!
//! A [`Share`] is what one request has taken. It is given back when it is dropped, and can be tied
//! to bytes ([`Share::hold`]), so that they stay charged for as long as anybody has them: through a
//! router, in an answer, until the socket has taken them. Nobody waits for a budget. Where it is
//! spent, the request is refused (429), and nothing was done.
//!
//! Kept out: who takes how much, and what a refusal is called to a client.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;

/// The answers under way on a node, or in a gateway: values that were read for them, and what was
/// made of these. A value has at most 8 MiB and a page of a listing about as much, so some thirty
/// of the largest fit.
pub const ANSWERS_BYTES_MAX: usize = 256 << 20;

/// An answer up to this size is not charged: the connection and the request that it belongs to cost
/// as much, and there is a bound on these. So the hot path takes nothing from a budget.
pub const UNCHARGED_BYTES_MAX: usize = 4 << 10;

/// Bytes that requests share.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    bytes_max: usize,
    refused: AtomicU64,
}

impl Budget {
    /// Returns a budget of which nothing is used.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            bytes_max,
            refused: AtomicU64::new(0),
        })
    }

    /// Returns the bytes that are taken now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns the bytes that can be taken together.
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Returns how often it was spent when something was to be taken.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Takes `bytes`; none where fewer are left, and then nothing was taken.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Option<Share> {
        let mut share = self.empty_share();
        share.grow(bytes).then_some(share)
    }

    /// Returns a share of nothing, which can grow.
    pub fn empty_share(self: &Arc<Self>) -> Share {
        Share {
            budget: Arc::clone(self),
            bytes: 0,
        }
    }

    fn try_add(&self, bytes: usize) -> bool {
        let add = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.bytes_max);
        let added = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .is_ok();

        if !added {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        added
    }
}

/// A part of a budget, given back when it is dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Share {
    /// Returns the bytes that it has taken.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns another share of the same budget, empty as yet.
    pub fn new_share(&self) -> Share {
        self.budget.empty_share()
    }

    /// Takes `bytes` more. False: there are not as many left, and nothing was taken.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let granted = self.budget.try_add(bytes);
        self.bytes += if granted { bytes } else { 0 };
        granted
    }

    /// Gives back what it has above `bytes`.
    pub fn shrink_to(&mut self, bytes: usize) {
        let excess = self.bytes.saturating_sub(bytes);
        self.give_back(excess);
        self.bytes -= excess;
    }

    /// An empty share leaves the counter alone, which others write to.
    fn give_back(&self, bytes: usize) {
        if bytes > 0 {
            let used = self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
            debug_assert!(used >= bytes, "more is given back than was taken");
        }
    }

    /// Returns the same bytes, which stay charged until the last handle of them is dropped.
    pub fn hold(self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Charged {
            bytes,
            _share: self,
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back(self.bytes);
    }
}

/// Bytes with what is paid for them: a [`Share`], or one that several have in common.
struct Charged<S> {
    bytes: Bytes,
    _share: S,
}

impl<S> AsRef<[u8]> for Charged<S> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Returns the same bytes. Those that were given the same share keep it together, until the last of
/// them is dropped.
pub fn hold_together(bytes: Bytes, share: &Arc<Share>) -> Bytes {
    Bytes::from_owner(Charged {
        bytes,
        _share: Arc::clone(share),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_is_given_back_with_the_last_handle_of_it() {
        let budget = Budget::new(10);
        let mut share = budget.take(4).expect("there are 10");
        assert!(share.grow(5) && !share.grow(2));
        assert_eq!((share.bytes(), budget.used(), budget.refused()), (9, 9, 1));
        share.shrink_to(6);

        let held = share.hold(Bytes::from_static(b"value"));
        let part = held.slice(1..3);
        drop(held);
        assert_eq!((&part[..], budget.used()), (&b"al"[..], 6));
        assert!(budget.take(5).is_none() && budget.take(usize::MAX).is_none());
        drop(part);
        assert_eq!(budget.used(), 0);

        let share = Arc::new(budget.take(10).expect("all of it"));
        let held = [b"a", b"b"].map(|bytes| hold_together(Bytes::from_static(bytes), &share));
        drop(share);
        let [first, second] = held;
        drop(first);
        assert_eq!(budget.used(), 10);
        drop(second);
        assert_eq!((budget.used(), budget.refused()), (0, 3));
    }
}
