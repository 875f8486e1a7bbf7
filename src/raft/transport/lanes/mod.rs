//! The lanes: between two nodes, one ordered stream of frames each way per kind of traffic, shared
//! by all groups.
//!
//! - `client`: [`Lanes`], the sending side. Frames get a sequence number and wait in a bounded
//!   queue; those that wait together go out as one chunk, so the heartbeats of many groups share
//!   one. Replies find their caller by the sequence number. A broken lane is dialled again after a
//!   pause.
//! - `serve`: [`serve_lane`], the serving side, one stream that is polled by whoever sends its
//!   bytes. Frames are handed to their groups in the order in which they came, and replies go out
//!   as they are ready, so a group that stalls holds up no other.
//! - `http`: lanes as one long-lived `POST /peer/lane/{lane}` over HTTP/2, a connection per lane.
//! - `limiter`: limits how many lanes from others are served at once.
//! - `peer_directories`: refuses old copies of a peer's data directory.
//! - `reachability`: records which peers can't be connected to, though they may have lanes to this
//!   node.
//! - `memory`: lanes within the process, with partitions, for tests and simulation.
//!
//! The first frame of a lane is a hello, which names both ends and is checked once. The starts of
//! the side that dialled follow it, and the other answers with its own. Each further frame names
//! its group and both replicas. A frame that does not match is refused with a reason; no frame ever
//! creates a replica. A call without a reply is given up at its caller's deadline; a lane that is
//! silent while calls wait is cut and dialled again.

mod client;
pub mod http;
mod limiter;
pub mod memory;
mod peer_directories;
mod reachability;
mod serve;

pub use super::wire::PeerRefusal;
pub use client::{Call, Lanes, LanesParts, PendingReply, read_reply};
pub use limiter::LaneLimiter;
pub use peer_directories::{DirectoryRejection, PeerDirectories};
pub use reachability::Reachability;
pub use serve::serve_lane;
