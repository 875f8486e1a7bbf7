//! Admission of connections: clients up to a limit, and past it the peers that others depend on.
//!
//! A connection counts as a client's until its first request shows otherwise. A peer can't be told
//! before it has asked for something, so once clients have all their places, further connections
//! are overflow: each waits for its first request for a moment, and only so many at a time, the
//! oldest being evicted when another comes. If that request is for a peer route, the connection
//! gets one of the places kept for peers; `/healthz`, `/readyz` and `/metrics` are answered; all
//! others get 503.
//!
//! Groups live by their lanes, so calls of peers (and of gateways, which call like them) leave some
//! places to lanes.
//!
//! Counting costs a connection a few relaxed atomic additions, and a request one look at a byte.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use http::Method;
use tokio_util::sync::CancellationToken;

use super::stats::ServerStats;
use crate::descriptors::Shares;
use crate::http::limits::Limits;
use crate::http::peer::{LANE_PREFIX, is_peer_route};

/// Connections past the limit that may wait for their first request. A peer's comes with the next
/// packet, so only a crowd that opens this many connections within a round trip can keep it out.
const OVERFLOW_MAX: usize = 32;

/// Answered to connections past the limit too: monitoring must not take a node for dead because it
/// is full.
const ALWAYS_ANSWERED: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// Connections past the limit that have yet to show whether they are peers'.
#[derive(Debug, Default)]
struct OverflowQueue {
    /// Number of connections that have waited here.
    came: u64,
    /// In the order in which they came, each with its number and its eviction.
    waiting: VecDeque<(u64, CancellationToken)>,
}

impl OverflowQueue {
    /// Adds a connection, and evicts the oldest where too many wait then. Returns its number.
    fn push(&mut self, eviction: CancellationToken) -> u64 {
        let number = self.came;
        self.came += 1;
        self.waiting.push_back((number, eviction));

        // A peer sends its request at once, so who has waited longest is likely no peer.
        if self.waiting.len() > OVERFLOW_MAX
            && let Some((_, first)) = self.waiting.pop_front()
        {
            first.cancel();
        }
        assert!(self.waiting.len() <= OVERFLOW_MAX);
        number
    }

    /// Gives back the place of a connection, if it has one yet.
    fn remove(&mut self, number: u64) {
        self.waiting.retain(|(other, _)| *other != number);
    }
}

/// Counts the connections of a server.
#[derive(Debug)]
pub struct Admission {
    stats: Arc<ServerStats>,
    clients_max: u64,
    peers_max: u64,
    overflow_queue: Mutex<OverflowQueue>,
}

impl Admission {
    /// Returns one with the limits of `limits`, or lower ones where the limit of open files leaves
    /// no more.
    pub fn new(stats: Arc<ServerStats>, limits: &Limits, shares: Shares) -> Arc<Self> {
        let clients_max = limits.connections_max.min(shares.clients) as u64;
        stats.clients_max.store(clients_max, Ordering::Relaxed);
        Arc::new(Self {
            stats,
            clients_max,
            peers_max: shares.peers as u64,
            overflow_queue: Mutex::default(),
        })
    }

    /// Returns how many places are kept for peers.
    pub fn peers_max(&self) -> u64 {
        self.peers_max
    }

    /// Returns how many connections clients can have.
    pub fn clients_max(&self) -> u64 {
        self.clients_max
    }

    /// Returns whether more than half of what clients can have is taken.
    pub fn is_crowded(&self) -> bool {
        self.stats.clients.load(Ordering::Relaxed) > self.clients_max / 2
    }

    /// Gives a place to the connection that has this descriptor. None if there is no room even to
    /// wait for a first request.
    pub fn admit(self: &Arc<Self>, descriptor: RawFd) -> Option<AdmissionPermit> {
        // The limit may be changed while we run.
        self.admit_by(&Shares::now(), descriptor)
    }

    fn admit_by(self: &Arc<Self>, shares: &Shares, descriptor: RawFd) -> Option<AdmissionPermit> {
        // The number of the descriptor tells how many are in use, also by those beyond their share.
        if shares.leaves_enough(descriptor)
            && ServerStats::take(&self.stats.clients, self.clients_max)
        {
            self.stats.accepted.fetch_add(1, Ordering::Relaxed);
            return Some(AdmissionPermit::new(self, AdmissionClass::Client, None));
        }

        // Past this, log and maps would lack descriptors, and a peer is worth less than those.
        if !shares.leaves_enough_of_peers(descriptor) {
            self.stats.refuse();
            return None;
        }

        let eviction = CancellationToken::new();
        self.stats.overflow.fetch_add(1, Ordering::Relaxed);
        let place = OverflowPlace {
            number: self.overflow_queue.lock().push(eviction.clone()),
            eviction,
        };
        Some(AdmissionPermit::new(
            self,
            AdmissionClass::Overflow,
            Some(place),
        ))
    }

    /// Takes a place that is kept for peers.
    fn take_peer_slot(&self, path: &str) -> bool {
        let is_lane = path.starts_with(LANE_PREFIX);

        // Groups live by their lanes, so other calls of peers can't take the last places.
        let max = if is_lane {
            self.peers_max
        } else {
            self.peers_max / 2
        };
        ServerStats::take(&self.stats.peers, max)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum AdmissionClass {
    Client,
    /// A client's that turned out to be a peer's.
    Peer,
    /// A peer's that came when there was no more room for clients.
    PeerOnly,
    Overflow,
}

impl AdmissionClass {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Client,
            1 => Self::Peer,
            2 => Self::PeerOnly,
            _ => Self::Overflow,
        }
    }
}

/// The treatment of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdmissionDecision {
    Serve,
    /// Serve it as the last of its connection.
    ServeLast,
    /// Tell it that there are too many connections, and close.
    Refuse,
}

/// The place of one connection. It is given back when this is dropped.
#[derive(Debug)]
pub struct AdmissionPermit {
    admission: Arc<Admission>,
    class: AtomicU8,
    /// Of a connection that came past the limit.
    overflow: Option<OverflowPlace>,
}

/// The place of a connection in the queue past the limit.
#[derive(Debug)]
struct OverflowPlace {
    number: u64,
    eviction: CancellationToken,
}

impl AdmissionPermit {
    fn new(
        admission: &Arc<Admission>,
        class: AdmissionClass,
        overflow: Option<OverflowPlace>,
    ) -> Self {
        Self {
            admission: Arc::clone(admission),
            class: AtomicU8::new(class as u8),
            overflow,
        }
    }

    fn class(&self) -> AdmissionClass {
        AdmissionClass::of(self.class.load(Ordering::Relaxed))
    }

    /// Returns true if it is past the limit and has not shown yet that it is a peer's.
    pub fn is_overflow(&self) -> bool {
        self.class() == AdmissionClass::Overflow
    }

    /// Resolves when a connection past the limit has to go.
    pub async fn evicted(&self) {
        match &self.overflow {
            Some(place) => place.eviction.cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// Leaves the queue past the limit: its place must not keep another from the door.
    fn leave_overflow_queue(&self) {
        if let Some(place) = &self.overflow {
            self.admission.overflow_queue.lock().remove(place.number);
        }
    }

    /// Decides about a request for `path`. The first for a peer route makes a peer of the
    /// connection.
    pub fn decide(&self, method: &Method, path: &str) -> AdmissionDecision {
        let is_peer_request = self.admission.peers_max > 0 && is_peer_route(method, path);
        match self.class() {
            // If peers have no place left it stays a client's, and is served as that.
            AdmissionClass::Client if is_peer_request => {
                self.become_peer(AdmissionClass::Peer, path);
                AdmissionDecision::Serve
            }
            AdmissionClass::Client | AdmissionClass::Peer => AdmissionDecision::Serve,
            // It came past the clients' limit, so it is not served as a client's afterwards.
            AdmissionClass::PeerOnly if is_peer_request => AdmissionDecision::Serve,
            AdmissionClass::Overflow
                if is_peer_request && self.become_peer(AdmissionClass::PeerOnly, path) =>
            {
                AdmissionDecision::Serve
            }
            AdmissionClass::PeerOnly | AdmissionClass::Overflow
                if ALWAYS_ANSWERED.contains(&path) =>
            {
                AdmissionDecision::ServeLast
            }
            AdmissionClass::PeerOnly | AdmissionClass::Overflow => {
                self.refuse();
                AdmissionDecision::Refuse
            }
        }
    }

    /// Counts that a connection past the limit was refused.
    pub fn refuse(&self) {
        self.admission.stats.refuse();
    }

    /// Moves to the peers, if they have a place left. Requests of one connection may come at the
    /// same time: one of them does it.
    fn become_peer(&self, class: AdmissionClass, path: &str) -> bool {
        // Over HTTP/2 another request of the connection may have made it a peer's already.
        let before = self.class();
        if matches!(before, AdmissionClass::Peer | AdmissionClass::PeerOnly) {
            return true;
        }
        if !self.admission.take_peer_slot(path) {
            return false;
        }

        // The place is taken before the class changes: in between it counts twice, which
        // is safe.
        let moved = self
            .class
            .compare_exchange(
                before as u8,
                class as u8,
                Ordering::Relaxed,
                Ordering::Relaxed,
            )
            .is_ok();
        let stats = &self.admission.stats;
        match (moved, before) {
            // Another request was faster, and holds a place for the connection.
            (false, _) => ServerStats::give_back(&stats.peers),
            (true, AdmissionClass::Overflow) => {
                stats.accepted.fetch_add(1, Ordering::Relaxed);
                ServerStats::give_back(&stats.overflow);
                self.leave_overflow_queue();
            }
            (true, _) => ServerStats::give_back(&stats.clients),
        };
        true
    }
}

impl Drop for AdmissionPermit {
    fn drop(&mut self) {
        let stats = &self.admission.stats;
        let counter = match self.class() {
            AdmissionClass::Client => &stats.clients,
            AdmissionClass::Peer | AdmissionClass::PeerOnly => &stats.peers,
            AdmissionClass::Overflow => &stats.overflow,
        };
        ServerStats::give_back(counter);
        self.leave_overflow_queue();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A descriptor far from the limit.
    const LOW: RawFd = 10;

    fn admission(clients: usize, peers: usize) -> Arc<Admission> {
        let shares = Shares {
            limit: 1000,
            files: 1,
            calls: 1,
            peers,
            clients,
        };
        Admission::new(Arc::default(), &Limits::default(), shares)
    }

    fn is_evicted(permit: &AdmissionPermit) -> bool {
        let place = permit.overflow.as_ref();
        place.is_some_and(|place| place.eviction.is_cancelled())
    }

    fn counts(admission: &Admission) -> [u64; 3] {
        let stats = &admission.stats;
        [&stats.clients, &stats.peers, &stats.overflow].map(|count| count.load(Ordering::Relaxed))
    }

    #[test]
    fn past_the_limit_only_peers_get_in() {
        let admission = admission(2, 4);
        let clients: Vec<AdmissionPermit> = (0..2)
            .map(|_| admission.admit(LOW).expect("a client's place"))
            .collect();
        assert!(
            clients
                .iter()
                .all(|permit| permit.decide(&Method::GET, "/v1/kv/a") == AdmissionDecision::Serve)
        );

        let late = admission.admit(LOW).expect("at the door");
        assert!(late.is_overflow());
        assert_eq!(
            late.decide(&Method::GET, "/v1/kv/a"),
            AdmissionDecision::Refuse
        );
        assert_eq!(
            late.decide(&Method::GET, "/readyz"),
            AdmissionDecision::ServeLast
        );

        let peer = admission.admit(LOW).expect("at the door");
        assert_eq!(
            peer.decide(&Method::GET, "/peer/identity"),
            AdmissionDecision::Serve
        );
        assert!(!peer.is_overflow());
        assert_eq!(
            (
                peer.decide(&Method::POST, "/peer/shard"),
                peer.decide(&Method::GET, "/v1/kv/a")
            ),
            (AdmissionDecision::Serve, AdmissionDecision::Refuse)
        );
        assert_eq!(counts(&admission), [2, 1, 1]);
        drop((clients, late, peer));
        assert_eq!(counts(&admission), [0, 0, 0]);
    }

    #[test]
    fn a_peer_that_came_in_time_leaves_its_place_to_a_client() {
        let admission = admission(1, 4);
        let peer = admission.admit(LOW).expect("a place");
        assert_eq!(
            peer.decide(&Method::POST, "/peer/lane/log"),
            AdmissionDecision::Serve
        );
        let client = admission.admit(LOW).expect("a place");
        assert!(!client.is_overflow());
        assert_eq!(counts(&admission), [1, 1, 0]);
    }

    #[test]
    fn a_place_of_a_peer_is_for_what_peers_ask() {
        let admission = admission(1, 4);
        let client = admission.admit(LOW).expect("a place");
        let nothing_of_peers = [
            (Method::GET, "/peer/lane/log"),
            (Method::POST, "/peer/lane/"),
            (Method::POST, "/peer/lane/a/b"),
            (Method::GET, "/peer/shard"),
            (Method::GET, "/peer/nothing"),
            (Method::POST, "/peer/identity"),
        ];
        assert!(
            nothing_of_peers
                .iter()
                .all(|(method, path)| client.decide(method, path) == AdmissionDecision::Serve)
        );
        assert_eq!(counts(&admission), [1, 0, 0]);

        let of_gateway = self::admission(1, 0);
        let client = of_gateway.admit(LOW).expect("a place");
        assert_eq!(
            client.decide(&Method::POST, "/peer/shard"),
            AdmissionDecision::Serve
        );
        assert_eq!(counts(&of_gateway), [1, 0, 0]);
    }

    #[test]
    fn calls_leave_places_to_lanes() {
        let admission = admission(0, 4);
        let overflow_queue = |path: &str| {
            let permit = admission.admit(LOW).expect("at the door");
            (permit.decide(&Method::POST, path), permit)
        };
        let calls: Vec<(AdmissionDecision, AdmissionPermit)> =
            (0..3).map(|_| overflow_queue("/peer/shard")).collect();
        let decisions: Vec<AdmissionDecision> =
            calls.iter().map(|(decision, _)| *decision).collect();
        assert_eq!(
            decisions,
            [
                AdmissionDecision::Serve,
                AdmissionDecision::Serve,
                AdmissionDecision::Refuse
            ]
        );
        let lanes: Vec<(AdmissionDecision, AdmissionPermit)> =
            (0..3).map(|_| overflow_queue("/peer/lane/log")).collect();
        let decisions: Vec<AdmissionDecision> =
            lanes.iter().map(|(decision, _)| *decision).collect();
        assert_eq!(
            decisions,
            [
                AdmissionDecision::Serve,
                AdmissionDecision::Serve,
                AdmissionDecision::Refuse
            ]
        );
    }

    #[test]
    fn at_the_door_the_first_goes_when_another_comes() {
        let admission = admission(0, 4);
        let crowd: Vec<AdmissionPermit> = (0..=OVERFLOW_MAX)
            .map(|_| admission.admit(LOW).expect("at the door"))
            .collect();
        assert!(is_evicted(&crowd[0]));
        assert!(crowd[1..].iter().all(|permit| !is_evicted(permit)));
    }

    #[test]
    fn a_peer_that_was_let_in_leaves_its_place_at_the_door() {
        let admission = admission(0, 4);
        let first = admission.admit(LOW).expect("at the door");
        let peer = admission.admit(LOW).expect("at the door");
        assert_eq!(
            peer.decide(&Method::GET, "/peer/identity"),
            AdmissionDecision::Serve
        );

        let crowd: Vec<AdmissionPermit> = (1..OVERFLOW_MAX)
            .map(|_| admission.admit(LOW).expect("at the door"))
            .collect();
        assert_eq!(counts(&admission), [0, 1, OVERFLOW_MAX as u64]);
        assert!(!is_evicted(&first), "no more wait than may");

        let _one_more = admission.admit(LOW).expect("at the door");
        assert!(is_evicted(&first));
        assert!(!is_evicted(&crowd[0]));
    }

    #[test]
    fn where_descriptors_run_out_nobody_gets_in() {
        let (admission, shares) = (admission(100, 10), Shares::of(220));
        let admit = |descriptor| {
            admission
                .admit_by(&shares, descriptor)
                .map(|permit| permit.is_overflow())
        };
        assert_eq!(
            [100, 165, 200].map(admit),
            [Some(false), Some(true), None],
            "the last are for peers, and for files"
        );
    }
}
