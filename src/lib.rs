//! Quorate: a sharded, linearizable key-value store.

pub mod client;
pub mod raft;
pub mod sm;
pub mod storage;
pub mod types;
