//! The typed client, and the seam that the whole HTTP side stands on: [`store::Store`].

pub mod peer;
pub mod protocol;
pub mod router;
pub mod shard_map;
pub mod store;
