//! Quorate: a sharded, linearizable key-value store.

pub mod api;
pub mod blocking;
pub mod budget;
pub mod cli;
pub mod client;
pub mod config;
pub mod descriptors;
#[cfg(test)]
mod fuzzing;
pub mod http;
pub mod metrics;
pub mod mutants;
pub mod node;
pub mod raft;
pub mod rare;
pub mod routing;
pub mod sm;
pub mod storage;
pub mod supervisor;
pub mod telemetry;
pub mod types;
