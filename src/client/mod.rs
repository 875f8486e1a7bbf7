//! For programs outside of the cluster: the typed client ([`remote`]), the client of the
//! native dialect ([`native`]), and what gateways and health checks ask.

mod address_book;
#[cfg(test)]
pub(crate) mod fuzz;
pub mod gateway_readiness;
pub mod health;
pub mod native;
pub mod remote;
#[cfg(test)]
pub(crate) mod testing;
pub mod wire;
