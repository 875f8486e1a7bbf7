//! [`SimRng`]: the random numbers of a simulated world. Every part of it has a source of its own,
//! so that a change in one leaves the others alike.

use super::determinism::split_mix;

#[derive(Debug, Clone)]
pub struct SimRng(u64);

impl SimRng {
    /// Returns the source of the part with this name in the world of a seed.
    pub fn new(seed: u64, part: &str) -> Self {
        let mut state = seed;
        for byte in part.bytes() {
            state ^= u64::from(byte);
            split_mix(&mut state);
        }
        Self(state)
    }

    pub fn next(&mut self) -> u64 {
        split_mix(&mut self.0)
    }

    /// Below `bound`; zero for zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// From `low` to below `high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low))
    }

    /// True so many times in a hundred.
    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    /// Picks one of a list that is not empty.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        let at = self.below(list.len() as u64) as usize;
        &list[at]
    }
}
