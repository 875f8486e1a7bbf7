//! The routes between nodes: `POST /peer/lane/{lane}`, `POST /peer/shard`,
//! `GET /peer/identity`, `POST /peer/promise`, `GET /peer/replicas`, `GET /peer/view`,
//! `POST /peer/announce`, `POST /peer/invite`, `POST /peer/greet`, `POST /peer/hold`,
//! `POST /peer/failures`, `POST /peer/disk`. The messages are those of `api::peer` and
//! `api::protocol`.
//!
//! Only the mount points: what is said on them is a [`PeerService`]'s business, which knows nothing
//! of HTTP. A lane is one request whose body and answer both stream for as long as it lives, frame
//! by frame; it ends when either side ends its stream, and after all other requests when the server
//! stops. Bodies of lanes have no limit and no time limit here.

mod paths;
mod routes;
mod service;

pub(super) use paths::{LANE_PREFIX, is_peer_route};
pub(super) use routes::routes;
pub use service::PeerService;
