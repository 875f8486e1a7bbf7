//! Connections: listening, letting in, reading heads, sending answers, and stopping.
//!
//! [`listener`] accepts and [`connection`] serves one connection to its end; what a request means
//! is the business of the router that it is given. A connection is wrapped twice:
//! [`timed_stream`] cuts clients that do not read or send ([`read_monitor`], [`slow_clients`],
//! [`response_tracker`]), [`head_budget`] charges the heads of requests.

mod admission;
mod connection;
mod drain;
mod framing;
mod head_budget;
mod listener;
mod port_owner;
mod read_monitor;
mod response_tracker;
mod slow_clients;
mod timed_stream;
mod wake_gate;

pub use admission::ServerStats;
pub use connection::ClientInfo;
pub use listener::{BUFFER_BYTES_MIN, BindError, Server};
