//! [`ClientInfo`] goes with a request and describes its connection.

use std::net::SocketAddr;
use std::sync::Arc;

use super::read_monitor::RequestActivity;

/// The client of a request. Every request has one among its extensions.
#[derive(Debug, Clone)]
pub struct ClientInfo {
    pub address: SocketAddr,
    pub activity: Arc<RequestActivity>,
}
