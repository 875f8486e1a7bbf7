//! [`ClusterClient`]: the cluster that a command is about.

use crate::api::store::{Consistency, Failure, Options, Routing};
use crate::cli::CliError;
use crate::cli::servers::Servers;
use crate::client::native::NativeClient;
use crate::client::remote::RemoteStore;

/// The cluster that a command is about.
pub struct ClusterClient {
    /// Goes on asking until the timeout, but knows no other nodes than those that were named.
    pub client: NativeClient,
    /// Learns who the nodes are, which a change of the view changes.
    pub store: RemoteStore,
    pub options: Options,
}

impl ClusterClient {
    pub fn new(servers: &Servers) -> Result<Self, CliError> {
        let broken = |error| Failure::Unavailable {
            reason: format!("no HTTP client: {error}"),
            retry_after_ms: 0,
        };
        let store = RemoteStore::connect(servers.addresses()).map_err(broken)?;
        let options = Options {
            consistency: Consistency::Linearizable,
            routing: Routing::Proxy,
            timeout: servers.timeout(),
        };
        Ok(Self {
            client: servers.client(),
            store,
            options,
        })
    }
}
