//! [`Coverage`]: the slots that have been answered for.

use crate::types::{SLOTS, Slot};

/// A set of slots.
#[derive(Debug, Clone)]
pub(super) struct Coverage {
    words: [u64; SLOTS as usize / 64],
}

impl Coverage {
    pub fn none() -> Self {
        Self {
            words: [0; SLOTS as usize / 64],
        }
    }

    pub fn contains(&self, slot: Slot) -> bool {
        self.words[slot.index() / 64] & (1 << (slot.index() % 64)) != 0
    }

    /// Returns true if it was not in it before.
    pub fn insert(&mut self, slot: Slot) -> bool {
        let fresh = !self.contains(slot);
        self.words[slot.index() / 64] |= 1 << (slot.index() % 64);
        fresh
    }

    pub fn missing(&self) -> impl Iterator<Item = Slot> {
        Slot::all().filter(|slot| !self.contains(*slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_complete_when_every_slot_is_in_it() {
        let mut coverage = Coverage::none();
        for slot in Slot::all().skip(1) {
            assert!(coverage.insert(slot) && !coverage.insert(slot));
        }
        assert_eq!(
            coverage.missing().map(Slot::number).collect::<Vec<_>>(),
            [0]
        );
        assert!(Slot::new(0).is_some_and(|slot| coverage.insert(slot)));
        assert_eq!(coverage.missing().count(), 0);
    }
}
