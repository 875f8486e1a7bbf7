//! The paths of the peer routes, which tell a peer's connection from a client's.

use http::Method;

/// Before the name of a lane.
pub const LANE_PREFIX: &str = "/peer/lane/";

/// The other routes of peers, by method.
const POSTED: [&str; 8] = [
    "/peer/shard",
    "/peer/promise",
    "/peer/announce",
    "/peer/hold",
    "/peer/greet",
    "/peer/invite",
    "/peer/failures",
    "/peer/disk",
];
const GOT: [&str; 3] = ["/peer/identity", "/peer/replicas", "/peer/view"];

/// Returns whether it is a peer who asks this: nobody else is given the place of one.
pub fn is_peer_route(method: &Method, path: &str) -> bool {
    match *method {
        Method::POST => match path.strip_prefix(LANE_PREFIX) {
            Some(lane) => !lane.is_empty() && !lane.contains('/'),
            None => POSTED.contains(&path),
        },
        Method::GET => GOT.contains(&path),
        _ => false,
    }
}
