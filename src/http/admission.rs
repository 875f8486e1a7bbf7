//! Who is let in: clients up to a limit, and past it those of whom others depend.
//!
//! A connection counts as a client's until its first request shows otherwise. Nobody can tell a
//! peer before it has asked for something, so once clients have taken all that is theirs, further
//! connections wait at the door: for a moment, and only so many at a time, of whom the one that
//! came first has to go when another comes. Whoever asks for a peer route there gets one of the
//! places that are kept for peers, whoever asks how the node is gets an answer, and all others are
//! told 503.
//!
//! Lanes are what groups live by, so calls and questions of peers (and of gateways, which call like
//! them) leave some places to them.
//!
//! Counting costs a connection a few relaxed atomic additions, and a request one look at a byte.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use http::Method;
use tokio_util::sync::CancellationToken;

use super::limits::Limits;
use super::metrics::{Exposition, Kind, MetricSource};
use super::peer::{self, LANE_PREFIX};
use crate::descriptors::{self, Shares};

/// Connections that may wait at the door for their first request. A peer's comes with the next
/// packet, so that it gets in needs a crowd to open this many connections within a round trip.
const AT_THE_DOOR_MAX: usize = 32;

/// What is answered at the door: those who watch over a node must not take it for dead because it
/// is full.
const ANSWERED_AT_THE_DOOR: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// What a server counts.
#[derive(Debug, Default)]
pub struct ServerStats {
    clients: AtomicU64,
    peers: AtomicU64,
    at_the_door: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    stalled: AtomicU64,
    accept_errors: AtomicU64,
    clients_max: AtomicU64,
}

impl ServerStats {
    /// Counts an accept that failed.
    pub fn accept_failed(&self) {
        self.accept_errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection that was ended because its client did not take what it had asked for.
    pub fn stalled(&self) {
        self.stalled.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection that is told that there are too many.
    fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a place of those that `counter` counts, of which there are `max`. False: there is
    /// none.
    fn take(counter: &AtomicU64, max: u64) -> bool {
        let more = |count: u64| (count < max).then_some(count + 1);
        counter
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }
}

impl MetricSource for ServerStats {
    fn collect(&self, text: &mut Exposition) {
        let open = || {
            [&self.clients, &self.peers, &self.at_the_door]
                .map(|count| count.load(Ordering::Relaxed))
        };
        text.family("quorate_http_connections", Kind::Gauge, "Connections open.");
        text.sample(&[], open().iter().sum::<u64>());
        text.family(
            "quorate_http_peer_connections",
            Kind::Gauge,
            "Of these, connections of other nodes and of gateways.",
        );
        text.sample(&[], self.peers.load(Ordering::Relaxed));

        let families = [
            (
                "quorate_http_connections_max",
                Kind::Gauge,
                "Connections that clients can have.",
                &self.clients_max,
            ),
            (
                "quorate_http_connections_accepted_total",
                Kind::Counter,
                "Connections served.",
                &self.accepted,
            ),
            (
                "quorate_http_connections_refused_total",
                Kind::Counter,
                "Connections past the limit.",
                &self.refused,
            ),
            (
                "quorate_http_connections_stalled_total",
                Kind::Counter,
                "Connections ended because their client did not take its answers.",
                &self.stalled,
            ),
            (
                "quorate_http_accept_errors_total",
                Kind::Counter,
                "Failed accepts.",
                &self.accept_errors,
            ),
        ];
        for (name, kind, help, value) in families {
            text.family(name, kind, help);
            text.sample(&[], value.load(Ordering::Relaxed));
        }

        text.family(
            "quorate_open_files_max",
            Kind::Gauge,
            "Descriptors that this process may have.",
        );
        text.sample(&[], descriptors::limit());
        if let Some(count) = descriptors::in_use() {
            text.family(
                "quorate_open_files",
                Kind::Gauge,
                "Descriptors that this process has.",
            );
            text.sample(&[], count);
        }
    }
}

/// Counts the connections of a server.
#[derive(Debug)]
pub struct Admission {
    stats: Arc<ServerStats>,
    clients_max: u64,
    peers_max: u64,
    /// Those at the door, in the order in which they came. Each goes when it is told to.
    door: Mutex<VecDeque<CancellationToken>>,
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
            door: Mutex::default(),
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

    /// Gives a place to the connection that has this descriptor. None: there is not even one at the
    /// door.
    pub fn admit(self: &Arc<Self>, descriptor: RawFd) -> Option<Place> {
        // The limit may be changed while we run.
        self.admit_by(&Shares::now(), descriptor)
    }

    fn admit_by(self: &Arc<Self>, shares: &Shares, descriptor: RawFd) -> Option<Place> {
        if shares.leaves_enough(descriptor)
            && ServerStats::take(&self.stats.clients, self.clients_max)
        {
            self.stats.accepted.fetch_add(1, Ordering::Relaxed);
            return Some(Place::new(self, Standing::Client, CancellationToken::new()));
        }
        if !shares.leaves_enough_of_peers(descriptor) {
            self.stats.refuse();
            return None;
        }

        let leave = CancellationToken::new();
        self.stats.at_the_door.fetch_add(1, Ordering::Relaxed);
        let mut door = self.door.lock();
        door.retain(|other| !other.is_cancelled());
        door.push_back(leave.clone());
        if door.len() > AT_THE_DOOR_MAX
            && let Some(first) = door.pop_front()
        {
            first.cancel();
        }
        drop(door);
        Some(Place::new(self, Standing::AtTheDoor, leave))
    }

    /// Takes a place that is kept for peers.
    fn take_as_peer(&self, path: &str) -> bool {
        let is_lane = path.starts_with(LANE_PREFIX);
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
enum Standing {
    Client,
    /// A client's that turned out to be a peer's.
    Peer,
    /// A peer's that came when there was no more room for clients.
    PeerAlone,
    AtTheDoor,
}

impl Standing {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Client,
            1 => Self::Peer,
            2 => Self::PeerAlone,
            _ => Self::AtTheDoor,
        }
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Serve,
    /// Serve it as the last of its connection.
    ServeLast,
    /// Tell it that there are too many connections, and close.
    Refuse,
}

/// The place that a connection has. It is given back when this is dropped.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    standing: AtomicU8,
    leave: CancellationToken,
}

impl Place {
    fn new(admission: &Arc<Admission>, standing: Standing, leave: CancellationToken) -> Self {
        Self {
            admission: Arc::clone(admission),
            standing: AtomicU8::new(standing as u8),
            leave,
        }
    }

    fn standing(&self) -> Standing {
        Standing::of(self.standing.load(Ordering::Relaxed))
    }

    /// Returns whether it still has to show that it is a peer.
    pub fn is_at_the_door(&self) -> bool {
        self.standing() == Standing::AtTheDoor
    }

    /// Resolves when a connection at the door has to go.
    pub async fn left(&self) {
        self.leave.cancelled().await;
    }

    /// Says what becomes of a request for `path`. The first for a peer route makes a peer of the
    /// connection.
    pub fn judge(&self, method: &Method, path: &str) -> Verdict {
        let is_of_peers = self.admission.peers_max > 0 && peer::is_asked(method, path);
        match self.standing() {
            Standing::Client if is_of_peers => {
                self.become_peer(Standing::Peer, path);
                Verdict::Serve
            }
            Standing::Client | Standing::Peer => Verdict::Serve,
            Standing::PeerAlone if is_of_peers => Verdict::Serve,
            Standing::AtTheDoor if is_of_peers && self.become_peer(Standing::PeerAlone, path) => {
                Verdict::Serve
            }
            Standing::PeerAlone | Standing::AtTheDoor if ANSWERED_AT_THE_DOOR.contains(&path) => {
                Verdict::ServeLast
            }
            Standing::PeerAlone | Standing::AtTheDoor => {
                self.refuse();
                Verdict::Refuse
            }
        }
    }

    /// Counts that a connection at the door is told that there are too many.
    pub fn refuse(&self) {
        self.admission.stats.refuse();
    }

    /// Moves to the peers, if they have a place left. Requests of one connection may come at the
    /// same time: one of them does it.
    fn become_peer(&self, standing: Standing, path: &str) -> bool {
        let before = self.standing();
        if matches!(before, Standing::Peer | Standing::PeerAlone) {
            return true;
        }
        if !self.admission.take_as_peer(path) {
            return false;
        }
        let moved = self
            .standing
            .compare_exchange(
                before as u8,
                standing as u8,
                Ordering::Relaxed,
                Ordering::Relaxed,
            )
            .is_ok();
        let stats = &self.admission.stats;
        match (moved, before) {
            (false, _) => stats.peers.fetch_sub(1, Ordering::Relaxed),
            (true, Standing::AtTheDoor) => {
                stats.accepted.fetch_add(1, Ordering::Relaxed);
                stats.at_the_door.fetch_sub(1, Ordering::Relaxed)
            }
            (true, _) => stats.clients.fetch_sub(1, Ordering::Relaxed),
        };
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let stats = &self.admission.stats;
        let counter = match self.standing() {
            Standing::Client => &stats.clients,
            Standing::Peer | Standing::PeerAlone => &stats.peers,
            Standing::AtTheDoor => &stats.at_the_door,
        };
        counter.fetch_sub(1, Ordering::Relaxed);
        // Its token must not keep another from the door.
        self.leave.cancel();
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

    fn counts(admission: &Admission) -> [u64; 3] {
        let stats = &admission.stats;
        [&stats.clients, &stats.peers, &stats.at_the_door]
            .map(|count| count.load(Ordering::Relaxed))
    }

    #[test]
    fn past_the_limit_only_peers_get_in() {
        let admission = admission(2, 4);
        let clients: Vec<Place> = (0..2)
            .map(|_| admission.admit(LOW).expect("a client's place"))
            .collect();
        assert!(
            clients
                .iter()
                .all(|place| place.judge(&Method::GET, "/v1/kv/a") == Verdict::Serve)
        );

        let late = admission.admit(LOW).expect("at the door");
        assert!(late.is_at_the_door());
        assert_eq!(late.judge(&Method::GET, "/v1/kv/a"), Verdict::Refuse);
        assert_eq!(late.judge(&Method::GET, "/readyz"), Verdict::ServeLast);

        let peer = admission.admit(LOW).expect("at the door");
        assert_eq!(peer.judge(&Method::GET, "/peer/identity"), Verdict::Serve);
        assert!(!peer.is_at_the_door());
        assert_eq!(
            (
                peer.judge(&Method::POST, "/peer/shard"),
                peer.judge(&Method::GET, "/v1/kv/a")
            ),
            (Verdict::Serve, Verdict::Refuse)
        );
        assert_eq!(counts(&admission), [2, 1, 1]);
        drop((clients, late, peer));
        assert_eq!(counts(&admission), [0, 0, 0]);
    }

    #[test]
    fn a_peer_that_came_in_time_leaves_its_place_to_a_client() {
        let admission = admission(1, 4);
        let peer = admission.admit(LOW).expect("a place");
        assert_eq!(peer.judge(&Method::POST, "/peer/lane/log"), Verdict::Serve);
        let client = admission.admit(LOW).expect("a place");
        assert!(!client.is_at_the_door());
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
                .all(|(method, path)| client.judge(method, path) == Verdict::Serve)
        );
        assert_eq!(counts(&admission), [1, 0, 0]);

        let of_gateway = self::admission(1, 0);
        let client = of_gateway.admit(LOW).expect("a place");
        assert_eq!(client.judge(&Method::POST, "/peer/shard"), Verdict::Serve);
        assert_eq!(counts(&of_gateway), [1, 0, 0]);
    }

    #[test]
    fn calls_leave_places_to_lanes() {
        let admission = admission(0, 4);
        let door = |path: &str| {
            let place = admission.admit(LOW).expect("at the door");
            (place.judge(&Method::POST, path), place)
        };
        let calls: Vec<(Verdict, Place)> = (0..3).map(|_| door("/peer/shard")).collect();
        let verdicts: Vec<Verdict> = calls.iter().map(|(verdict, _)| *verdict).collect();
        assert_eq!(verdicts, [Verdict::Serve, Verdict::Serve, Verdict::Refuse]);
        let lanes: Vec<(Verdict, Place)> = (0..3).map(|_| door("/peer/lane/log")).collect();
        let verdicts: Vec<Verdict> = lanes.iter().map(|(verdict, _)| *verdict).collect();
        assert_eq!(verdicts, [Verdict::Serve, Verdict::Serve, Verdict::Refuse]);
    }

    #[test]
    fn at_the_door_the_first_goes_when_another_comes() {
        let admission = admission(0, 4);
        let crowd: Vec<Place> = (0..=AT_THE_DOOR_MAX)
            .map(|_| admission.admit(LOW).expect("at the door"))
            .collect();
        assert!(crowd[0].leave.is_cancelled());
        assert!(crowd[1..].iter().all(|place| !place.leave.is_cancelled()));
    }

    #[test]
    fn where_descriptors_run_out_nobody_gets_in() {
        let (admission, shares) = (admission(100, 10), Shares::of(220));
        let admit = |descriptor| {
            admission
                .admit_by(&shares, descriptor)
                .map(|place| place.is_at_the_door())
        };
        assert_eq!(
            [100, 165, 200].map(admit),
            [Some(false), Some(true), None],
            "the last are for peers, and for files"
        );
    }
}
