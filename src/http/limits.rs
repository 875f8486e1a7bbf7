//! Every limit of the serving side, in one value. All are configurable; the defaults are what the
//! documentation promises.

use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections of clients served at once, if the limit of open files leaves room for so many.
    /// One more is answered 503 and closed.
    pub connections_max: usize,
    /// A connection that has not sent a whole request head in this time, idle or slow, is closed.
    /// Longer than the idle time of common client pools (reqwest: 90 s), so that it is the client
    /// who closes, and no request meets a connection that is just going away.
    pub head_timeout: Duration,
    /// Time for a request's head from its first byte to its last, over HTTP/1.
    pub head_arrival_timeout: Duration,
    /// Request line and headers together, and what one HTTP/1.1 connection buffers.
    pub head_bytes_max: usize,
    /// The heads of all requests together, of those that are larger than 4 KiB.
    pub heads_bytes_max: usize,
    /// Requests in flight on one HTTP/2 connection.
    pub streams_max: u32,
    /// The body of any request.
    pub body_bytes_max: usize,
    /// The bodies of all requests in flight together.
    pub bodies_bytes_max: usize,
    /// The time in which a client has to take more of its answer: 64 KiB of each stream over
    /// HTTP/2, and over HTTP/1 what the kernel waits for before it takes more, also about 64 KiB.
    /// Then its connection is cut, and the memory of its answers comes back. Streams of HTTP/2 that
    /// share a slow line have up to ten times as long, as long as their turn has not come.
    pub write_timeout: Duration,
    /// While more than half of the room for answers is taken, large ones have to go out at this
    /// rate, in bytes a second. Clients that are slower are cut.
    pub answer_rate_min: u64,
    /// The longest wait for the next 16 KiB of a body, or for what is left of it.
    pub body_chunk_timeout: Duration,
    /// The longest time that a whole body may take.
    pub body_timeout: Duration,
    /// One value.
    pub value_bytes_max: usize,
    /// The operations of one batch.
    pub batch_operations_max: usize,
    /// Items of a page of a listing where the client asks for no number.
    pub page_items_default: usize,
    pub page_items_max: usize,
    /// Time for an answer where the client says nothing.
    pub request_timeout_default: Duration,
    pub request_timeout_max: Duration,
    /// The longest wait for the end of a change of the view that a client can ask for.
    pub change_wait_max: Duration,
    /// Clients that are kept waiting for the end of a change of the view at once.
    pub change_waiters_max: usize,
    /// Requests that take longer are logged.
    pub slow_request: Duration,
    /// Time that a stopping server gives requests in flight.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 20_000,
            head_timeout: Duration::from_secs(100),
            head_arrival_timeout: Duration::from_secs(10),
            head_bytes_max: 64 << 10,
            heads_bytes_max: 128 << 20,
            streams_max: 1024,
            body_bytes_max: 64 << 20,
            bodies_bytes_max: 512 << 20,
            write_timeout: Duration::from_secs(30),
            answer_rate_min: 64 << 10,
            body_chunk_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(300),
            value_bytes_max: 8 << 20,
            batch_operations_max: 10_000,
            page_items_default: 100,
            page_items_max: 1000,
            request_timeout_default: Duration::from_secs(5),
            request_timeout_max: Duration::from_secs(60),
            change_wait_max: Duration::from_secs(3600),
            change_waiters_max: 256,
            slow_request: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(10),
        }
    }
}
