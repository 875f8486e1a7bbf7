//! A cluster in a box: whole nodes in one thread, from one seed.
//!
//! - `determinism`: time and entropy of the thread.
//! - `random`: random numbers, a source for each part.
//! - `network`: what is between processes.
//! - `setting`: what the nodes of a world are like.
//! - `host`: a machine, and the process of a node on it; `host_disk`: its disk.
//! - `clients`: who reads and writes, and what they were told.
//! - `oracles`: what must hold in every moment.
//! - `faults`: what goes wrong, and how.
//! - `run`: a life of the world: it is founded, goes wrong, and is healed.

#[cfg(not(tokio_unstable))]
compile_error!("the simulator needs RUSTFLAGS='--cfg tokio_unstable': see scripts/simulate.sh");

mod clients;
pub mod determinism;
mod faults;
mod host;
mod host_disk;
mod network;
mod oracles;
mod random;
pub mod run;
mod setting;
