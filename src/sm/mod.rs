//! The pure core: what a shard and the meta group do with a command, decided without a clock, a
//! disk, a network or a random number.
//!
//! Everything here is a function of its arguments, so that every replica that applies the same log
//! holds the same map. Effects (proposing, storing, sending) live in the layers above;
//! `tests/architecture.rs` holds that.

pub mod agreement;
pub mod cluster;
pub mod codec;
pub mod disk_level;
#[cfg(test)]
pub(crate) mod fuzz;
pub mod kv;
pub mod level;
pub mod log_space;
#[cfg(test)]
mod meaning;
pub mod moves;
pub mod naming;
pub mod placement;
pub mod ports;
pub mod reach;
pub mod recovery;
pub mod requests;
pub mod scrub;
pub mod slots;
pub mod stalls;
pub mod starts;
#[cfg(test)]
pub(crate) mod testing;
