//! The lanes: between two nodes, one ordered stream of frames each way per kind of traffic, shared
//! by all groups.
//!
//! - `client`: [`Lanes`], the sending side: frames get a sequence and wait in a bounded queue; what
//!   waits together goes out as one chunk, so the heartbeats of many groups share one; replies find
//!   their caller by sequence; a broken lane is dialled again after a pause.
//! - `serve`: [`serve_lane`], the serving side, as one stream that is polled by whoever sends its
//!   bytes: frames are handed to their groups in the order in which they came, replies go out in
//!   the order in which they are ready, so a group that stalls holds up no other.
//! - `http`: lanes as one long-lived `POST /peer/lane/{lane}` over HTTP/2, a connection per lane.
//! - `limiter`: how many lanes from others are served at once.
//! - `reachability`: which peers can't be connected to, though they may well have lanes to this node.
//! - `memory`: lanes within the process, with partitions, for tests and simulation.
//!
//! The first frame of a lane is a hello, which names both ends and is checked once; behind it stand
//! the starts of the one that dialled, and the other answers with its own (`peer_directories`).
//! Each further frame names its group and both replicas. What does not match is refused with a
//! reason; no frame ever creates a replica. What no reply comes for within its caller's patience is
//! given up; a lane that says nothing while calls wait is cut and dialled again.

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
