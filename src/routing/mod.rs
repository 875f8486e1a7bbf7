//! The way of a request to the shards: the [`router`] splits and merges over them, [`call`] reaches
//! their leaders, [`retry`] says what is sent again. All calls to nodes go by one [`transport`].
//!
//! [`reply`] and [`problem`] read what comes back, within limits. [`discovery`] asks single nodes
//! about the cluster, [`home_probe`] which node a client is sent to while a shard's home is away.

pub mod backoff;
pub mod call;
pub mod discovery;
pub mod home_probe;
pub mod peer_caller;
pub mod problem;
pub mod reply;
pub mod retry;
pub mod router;
pub mod transport;
pub mod view_change_calls;
