//! The words between the layers: the [`Store`](store::Store) that HTTP stands on, its values
//! and failures, the shard map, the status, and the messages between nodes.
//!
//! Types and their formats alone: nothing here opens a connection. `routing` carries requests,
//! `node` and `client` answer them.

pub mod failure;
#[cfg(test)]
pub(crate) mod fuzz;
pub mod peer;
pub mod protocol;
pub mod shard_map;
pub mod store;
pub mod values;
pub mod view_change;
