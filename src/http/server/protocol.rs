//! Sets up HTTP/1.1 and HTTP/2: windows, buffers, pings and the time for a head.

use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::conn::auto::Builder;

use crate::http::limits::Limits;

/// HTTP/2 flow control: a lane's frames must not wait for window updates.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// Interval of pings on a silent HTTP/2 connection, and the time to answer one.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// hyper refuses to buffer less than this.
pub const BUFFER_BYTES_MIN: usize = 8 << 10;

/// Returns what serves both versions of HTTP within `limits`.
pub fn protocol(limits: &Limits) -> Builder<TokioExecutor> {
    let mut http = Builder::new(TokioExecutor::new());
    http.http1()
        .timer(TokioTimer::new())
        .keep_alive(true)
        // Its client is owed the answer. Whether it is still there, the socket finds out (`inbox`).
        .half_close(true)
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(limits.head_bytes_max.max(BUFFER_BYTES_MIN));
    http.http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(limits.streams_max)
        .max_header_list_size(u32::try_from(limits.head_bytes_max).unwrap_or(u32::MAX))
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    http
}
