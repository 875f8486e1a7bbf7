//! The real binary in a real cluster: one file per promise.
//!
//! All are one program, so that it is built once; `cargo test --test promises kill` runs one file.
//! Each test has its cluster to itself, one after another. What is random follows from one seed,
//! which is printed: `QUORATE_TEST_SEED=n` repeats it. Longer campaigns:
//! - `QUORATE_TEST_ROUNDS`: how often a fault is repeated (`kill`, `crash`, `pause`);
//! - `QUORATE_TEST_WRITES`: how much a follower misses (`lagging`);
//! - `QUORATE_TEST_KEYS`: how much one node holds (`big`);
//! - `QUORATE_TEST_SECONDS`: how long faults of every kind are made (`faults`);
//! - `QUORATE_TEST_LARGE`: how many values of a mebibyte there are to attack with (`memory`).
//!
//! `QUORATE_TEST_BIN` names another binary to be tested, such as a release build.
//!
//! What needs root (mounts, iptables) says so in a line and is left out where it can't be had.

mod alone;
mod big;
mod cluster_sh;
mod common;
mod crash;
mod descriptors;
mod dialect_kills;
mod dialects;
mod disk_full;
mod disk_hang;
mod docker;
mod faults;
mod fixtures;
mod gateway;
mod harness;
mod hostile;
mod identity;
mod kill;
mod kvs;
mod lagging;
mod limits;
mod memory;
mod pause;
mod power_cut;
mod redirects;
mod rolling_restart;
mod scripts;
mod space;
mod tour;
mod view_change;
mod ways;
mod witness;
