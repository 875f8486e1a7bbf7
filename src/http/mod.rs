//! The serving side: connections, the route table, and the dialects.
//!
//! [`server`] accepts connections and reads heads; `routes` finds the handler; a dialect
//! (`native`, `dialects`) reads the request, calls [`crate::api::store::Store`] and writes
//! the answer. [`problem`] is the one map from an error to a response. [`peer`] has the routes that
//! nodes call on each other. What all routes work on is an [`App`]. axum is named here alone.

mod answer_budget;
mod app;
mod blocking;
pub mod body;
mod change_waiters;
#[cfg(test)]
mod crowd_tests;
mod dialect;
mod dialects;
#[cfg(test)]
pub(crate) mod fuzz;
pub mod health;
pub mod limits;
pub mod media;
mod metrics;
mod native;
pub mod peer;
pub mod problem;
mod process_metrics;
mod readiness;
mod routes;
pub mod server;
#[cfg(test)]
mod smuggling_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use app::App;
pub use limits::Limits;
pub use peer::PeerService;
pub use readiness::{NotReady, Readiness};
pub use routes::router;
pub use server::{BindError, Server};
