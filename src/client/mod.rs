//! The typed client, and the seam that the whole HTTP side stands on: [`store::Store`].

mod address_book;
pub mod call;
pub mod discovery;
pub mod gateway_readiness;
pub mod health;
pub mod home_probe;
pub mod native;
pub mod peer;
pub mod problem;
pub mod protocol;
pub mod remote;
pub mod reply;
pub mod retry;
pub mod router;
pub mod shard_map;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;
pub mod view_change;
pub mod wire;
