//! [`ClientInfo`]: what a request knows of the connection that it came by.

use std::net::SocketAddr;
use std::sync::Arc;

use super::read_monitor::RequestActivity;

/// The client of a request. Every request has one among its extensions.
#[derive(Debug, Clone)]
pub struct ClientInfo {
    pub address: SocketAddr,
    pub activity: Arc<RequestActivity>,
}
