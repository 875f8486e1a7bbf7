//! Discovery: asks a single node for the status of the cluster, whether it lives, and who took its
//! place.

use std::time::Duration;

use super::call::{failure_of, silence};
use super::reply::{self, VIEW_BYTES_MAX};
use super::transport::{NodeCall, Transport};
use crate::api::peer::{Identity, Standing};
use crate::api::protocol::ClusterStatus;
use crate::api::store::Failure;
use crate::types::Address;

/// Time that one node has where another could be asked.
const TIMEOUT: Duration = Duration::from_millis(1500);

/// Asks for `GET /v1/cluster`.
///
/// # Errors
///
/// Only such as mean that another node may be asked.
pub async fn status(
    transport: &dyn Transport,
    address: &Address,
) -> Result<ClusterStatus, Failure> {
    let unavailable = |reason: String| Failure::Unavailable {
        reason,
        retry_after_ms: 1000,
    };
    let response = transport
        .send(NodeCall::get(address, "/v1/cluster", TIMEOUT))
        .await;
    let response = response.map_err(|error| unavailable(silence(address, &error)))?;
    if !response.status().is_success() {
        return Err(failure_of(response).await);
    }
    reply::read_json(response, VIEW_BYTES_MAX)
        .await
        .map_err(|error| unavailable(format!("{address}: {error}")))
}

/// Returns the nodes to ask instead of one that can't tell of the cluster: the members that took
/// its place, or those that it waits for.
pub async fn referrals(transport: &dyn Transport, address: &Address) -> Vec<Address> {
    let asked = transport
        .send(NodeCall::get(address, "/peer/identity", TIMEOUT))
        .await;
    let Ok(response) = asked else {
        return Vec::new();
    };
    match reply::read_json(response, VIEW_BYTES_MAX)
        .await
        .map(|identity: Identity| identity.standing)
    {
        Ok(Standing::Retired { members, .. }) => members,
        Ok(Standing::Fresh { view }) => view,
        Ok(Standing::Promised { .. } | Standing::Member { .. }) | Err(_) => Vec::new(),
    }
}

/// Returns true if a node answers at all, within `timeout`.
pub async fn lives(transport: &dyn Transport, address: &Address, timeout: Duration) -> bool {
    let asked = transport
        .send(NodeCall::get(address, "/healthz", timeout))
        .await;
    asked.is_ok_and(|answer| answer.status().is_success())
}
