//! Connections: listening, letting in, reading heads, sending answers, and stopping.
//!
//! `listener` accepts and `connection` serves one connection to its end; what a request means
//! is the business of the router that it is given. A connection is wrapped twice:
//! `timed_stream` cuts clients that do not read or send (`read_monitor`, `slow_clients`,
//! `response_tracker`), `head_budget` charges the heads of requests.

mod admission;
mod client_info;
mod connection;
mod drain;
mod framing;
mod head_budget;
mod listener;
mod port_owner;
mod protocol;
mod read_monitor;
mod response_tracker;
mod slow_clients;
mod stats;
mod timed_stream;
mod wake_gate;

pub use client_info::ClientInfo;
pub use listener::{BindError, Server};
pub use protocol::BUFFER_BYTES_MIN;
pub use stats::ServerStats;
