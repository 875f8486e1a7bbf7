//! Counts and times requests, and has the registry of `/metrics`.
//!
//! A request costs a few relaxed atomic additions; nothing is allocated and nothing locked. So the
//! times of requests are counted here, because the library's histogram takes a lock, and its
//! families look for their labels. What other parts count, their [`Collector`]s read at the scrape.
//! Series of requests that never came are left out.
//!
//! Names follow Prometheus' conventions, as `exposition` of the member `sim` holds them: base
//! units, counters end in `_total`, histograms of time in `_duration_seconds`. A name is a
//! contract: one that was wrong stays beside the right one until the next release but one.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::Method;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

use super::answer_budget;
use super::change_waiters::ChangeWaiters;
use super::dialect::Dialect;
use super::dialects::no_room;
use super::problem::{Code, Problem, ProblemCode};
use super::process_metrics::{self, ProcessMetrics};
use crate::api::store::Failure;
use crate::budget::Budget;
use crate::metrics::{
    Collector, Counter, DescriptorEncoder, EncodeFamilies, Family, Gauge, HistogramCounts,
    Registry, counter_stem, page,
};
use crate::telemetry::Rarely;

/// Upper bounds of the latency buckets, in microseconds. From a cached read to the longest timeout.
const BUCKETS_US: [u64; 15] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 5_000_000, 60_000_000,
];

/// Clients can send any method: those past the usual ones share a label.
const METHODS: [&str; 6] = ["GET", "HEAD", "PUT", "POST", "DELETE", "other"];

fn method_index(method: &Method) -> usize {
    METHODS
        .iter()
        .position(|name| *name == method.as_str())
        .unwrap_or(METHODS.len() - 1)
}

/// Status classes; the first is a request whose client went away before the answer.
const CLASSES: [&str; 6] = ["cancelled", "1xx", "2xx", "3xx", "4xx", "5xx"];

#[derive(Debug, Default)]
struct RequestSeries {
    classes: [AtomicU64; CLASSES.len()],
    /// Not cumulative; the last holds what is past every bound.
    buckets: [AtomicU64; BUCKETS_US.len() + 1],
    total_us: AtomicU64,
}

impl RequestSeries {
    fn record(&self, class: usize, elapsed: Duration) {
        let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS_US.partition_point(|bound| *bound < elapsed_us);
        self.classes[class].fetch_add(1, Ordering::Relaxed);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.total_us.fetch_add(elapsed_us, Ordering::Relaxed);
    }
}

/// Counts the requests of each dialect and method.
#[derive(Debug, Default)]
struct RequestCounts([[RequestSeries; METHODS.len()]; Dialect::ALL.len()]);

impl RequestCounts {
    fn each(&self) -> impl Iterator<Item = (RequestLabels, &RequestSeries)> {
        Dialect::ALL
            .iter()
            .zip(&self.0)
            .flat_map(|(dialect, methods)| {
                METHODS.iter().zip(methods).map(|(method, series)| {
                    let labels = [("dialect", dialect.label()), ("method", *method)];
                    (labels, series)
                })
            })
    }

    fn times(&self) -> impl Iterator<Item = (RequestLabels, HistogramCounts)> {
        self.each().filter_map(|(labels, series)| {
            let counts = series
                .buckets
                .each_ref()
                .map(|count| count.load(Ordering::Relaxed));
            let sum_us = series.total_us.load(Ordering::Relaxed);
            let came = counts.iter().any(|count| *count > 0);
            came.then(|| {
                let times = HistogramCounts::of_microseconds(&BUCKETS_US, &counts, sum_us);
                (labels, times)
            })
        })
    }
}

type RequestLabels = [(&'static str, &'static str); 2];

impl Collector for RequestCounts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let classes = self.each().flat_map(|([dialect, method], series)| {
            CLASSES
                .iter()
                .zip(&series.classes)
                .map(move |(class, count)| {
                    let labels = [dialect, method, ("status", *class)];
                    (labels, count.load(Ordering::Relaxed))
                })
        });

        // Most of dialect, method and class never occur together, and each series costs its
        // readers.
        encoder.counters(
            "quorate_http_requests_total",
            "Requests answered, by dialect, method and class of status.",
            classes.filter(|(_, count)| *count > 0),
        )?;
        encoder.histograms(
            "quorate_http_request_duration_seconds",
            "Time from a request's head to its answer, by dialect and method.",
            self.times(),
        )?;
        encoder.histograms(
            "quorate_http_request_seconds",
            "Deprecated, and to go after the next release: see \
            quorate_http_request_duration_seconds.",
            self.times(),
        )
    }
}

/// Reads what requests hold at the scrape.
#[derive(Debug)]
pub struct RoomMetrics {
    pub bodies: Arc<Budget>,
    pub answers: Arc<Budget>,
    pub changes: Arc<ChangeWaiters>,
}

impl Collector for RoomMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        encoder.gauge(
            "quorate_http_body_bytes_in_flight",
            "Bytes of request bodies being worked on.",
            self.bodies.used(),
        )?;
        encoder.counter(
            "quorate_http_body_refusals_total",
            "Bodies that were refused for want of room.",
            self.bodies.refused(),
        )?;
        encoder.gauge(
            "quorate_answer_bytes_in_flight",
            "Bytes of values and answers that are charged now.",
            self.answers.used(),
        )?;
        encoder.gauge(
            "quorate_answer_bytes_max",
            "Bytes that values and answers may have together.",
            self.answers.bytes_max(),
        )?;
        encoder.counter(
            "quorate_answer_refusals_total",
            "Times that there was no room for a value or an answer.",
            self.answers.refused(),
        )?;
        encoder.gauge(
            "quorate_change_waiters",
            "Clients that wait for the end of a change of the view.",
            self.changes.waiting(),
        )?;
        encoder.counter(
            "quorate_change_waiters_refused_total",
            "Clients for which there was no place to wait.",
            self.changes.refused(),
        )
    }
}

/// The counters of the serving side, and the registry on which all others stand too.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Arc<RequestCounts>,
    /// By their places in [`Code::ALL`].
    problems: [Counter; Code::ALL.len()],
    in_flight: Gauge,
}

impl Metrics {
    pub fn new(rooms: RoomMetrics, collectors: Vec<Box<dyn Collector>>) -> Self {
        process_metrics::note_start();
        let mut registry = Registry::default();
        let requests = Arc::<RequestCounts>::default();
        registry.register_collector(Box::new(requests.clone()));

        // Those without a count too: a series that appears with its first count hides that one from
        // rates. The library puts the full stop behind the help of what is registered by itself.
        let problems = Family::<[(&'static str, &'static str); 1], Counter>::default();
        registry.register(
            counter_stem("quorate_http_problems_total"),
            "Requests that were refused or failed, by the code that they were told. The fixed \
            dialects have no codes",
            problems.clone(),
        );
        let in_flight = Gauge::default();
        registry.register(
            "quorate_http_requests_in_flight",
            "Requests being worked on",
            in_flight.clone(),
        );

        let own: [Box<dyn Collector>; 2] = [Box::new(rooms), Box::new(ProcessMetrics)];
        for collector in own.into_iter().chain(collectors) {
            registry.register_collector(collector);
        }
        Self {
            registry,
            requests,
            problems: Code::ALL
                .map(|code| problems.get_or_create_owned(&[("code", code.as_str())])),
            in_flight,
        }
    }

    /// Begins to time a request. It counts as cancelled unless its [`RequestTimer`] is finished.
    pub fn start_timer(
        &self,
        dialect: Dialect,
        method: &Method,
        slow: Duration,
    ) -> RequestTimer<'_> {
        self.in_flight.inc();
        let is_read = matches!(*method, Method::GET | Method::HEAD);
        let method = method_index(method);
        RequestTimer {
            metrics: self,
            dialect,
            method,
            slow,
            started: Instant::now(),
            client: None,
            key_hash: None,
            class: 0,
            problem: None,
            answers: None,
            is_read,
        }
    }

    /// Returns the text of `/metrics`.
    pub fn page(&self) -> String {
        page(&self.registry)
    }
}

/// Limits the log of slow requests, of which a client can make any number: one a minute for each
/// dialect, with the number of the others.
static SLOW: [Rarely; Dialect::ALL.len()] = [const { Rarely::new() }; Dialect::ALL.len()];

/// One request being timed.
pub struct RequestTimer<'a> {
    metrics: &'a Metrics,
    dialect: Dialect,
    method: usize,
    slow: Duration,
    started: Instant,
    /// The client that asks.
    client: Option<SocketAddr>,
    key_hash: Option<u64>,
    class: usize,
    problem: Option<usize>,
    /// The budget that the answer is charged to.
    answers: Option<&'a Arc<Budget>>,
    is_read: bool,
}

impl<'a> RequestTimer<'a> {
    /// Charges the answer to a budget.
    pub fn charge_to(mut self, answers: &'a Arc<Budget>) -> Self {
        // Not by a new one made of this: that would be dropped, and count as a request.
        self.answers = Some(answers);
        self
    }

    /// Names who asks in the log.
    pub fn with_client(mut self, client: Option<SocketAddr>) -> Self {
        self.client = client;
        self
    }

    /// Says who asked for a change of the cluster that is accepted.
    pub fn log_change(&self, what: &dyn fmt::Display) {
        let client = self.client.map(tracing::field::display);
        tracing::info!(client, "{what} was asked for, and is accepted");
    }

    /// Returns who asks, as far as it is known.
    pub fn client(&self) -> Option<SocketAddr> {
        self.client
    }

    /// Notes that the request changes nothing: if there is no room for its answer, it can be sent
    /// again.
    pub fn mark_read_only(&mut self) {
        self.is_read = true;
    }

    /// Names the key in the log by its hash: keys may be secrets.
    pub fn key(&mut self, key: &[u8]) {
        self.key_hash = Some(xxh3_64(key));
    }

    /// Notes that the client asked to be kept waiting, so that so long is not slow.
    pub fn allow_wait(&mut self, wait: Duration) {
        self.slow += wait;
    }

    /// Sets the dialect, where only the body tells it.
    pub fn dialect(&mut self, dialect: Dialect) {
        self.dialect = dialect;
    }

    /// Ends the request with its answer, or with a refusal where there is no room for that.
    pub fn finish(mut self, response: Response) -> Response {
        let response = match self.answers {
            Some(answers) => answer_budget::charge(response, answers)
                .unwrap_or_else(|unfit| self.refuse(*unfit, answers)),
            None => response,
        };

        // The fixed dialects have no codes, so only problems are counted.
        let code = response.extensions().get::<ProblemCode>();
        self.problem = code.and_then(|ProblemCode(code)| {
            Code::ALL.iter().position(|known| known.as_str() == *code)
        });
        self.class = usize::from(response.status().as_u16() / 100).min(CLASSES.len() - 1);
        assert_ne!(self.class, 0, "a request with an answer is not cancelled");
        response
    }
}

impl RequestTimer<'_> {
    /// Returns what is answered if the budget has no room for the answer. That of a write says that
    /// it may have been done; where the contract has no word for that, and the answer holds no
    /// values, it is given without being charged.
    fn refuse(&self, unfit: Response, answers: &Budget) -> Response {
        let failure = Failure::no_room(answers);
        match (self.dialect, self.is_read) {
            (Dialect::Native | Dialect::Peer | Dialect::Other, true) => {
                Problem::from(failure).into_response()
            }
            // The write may have been done, so the client must not take this for "not done".
            (Dialect::Native | Dialect::Peer, false) => {
                let reason = format!("there was no room to tell the answer: {failure}");
                Problem::from(Failure::Unknown { reason }).into_response()
            }
            (
                Dialect::Kvs | Dialect::LoadBalancer | Dialect::PlainBatch | Dialect::EncodedBatch,
                true,
            ) => no_room(self.dialect, failure),
            (
                Dialect::Kvs
                | Dialect::LoadBalancer
                | Dialect::PlainBatch
                | Dialect::EncodedBatch
                | Dialect::Other,
                false,
            ) => unfit,
        }
    }
}

impl Drop for RequestTimer<'_> {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        self.metrics.in_flight.dec();
        self.metrics.requests.0[self.dialect as usize][self.method].record(self.class, elapsed);
        if let Some(problem) = self.problem {
            self.metrics.problems[problem].inc();
        }
        let (dialect, method, status) = (
            self.dialect.label(),
            METHODS[self.method],
            CLASSES[self.class],
        );
        let key_hash = self.key_hash.map(tracing::field::display);
        let client = self.client.map(tracing::field::display);

        // A client can make any number of slow requests, and the log must not grow with them.
        let left_out = if elapsed > self.slow {
            SLOW[self.dialect as usize].due()
        } else {
            None
        };
        if let Some(left_out) = left_out {
            tracing::warn!(
                dialect,
                method,
                status,
                client,
                key_hash,
                ?elapsed,
                left_out,
                "slow request"
            );
        } else {
            tracing::debug!(
                dialect,
                method,
                status,
                client,
                key_hash,
                ?elapsed,
                "request"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_sim::exposition::check;

    #[derive(Debug)]
    struct Odd;

    impl Collector for Odd {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            let labels = [("name", "a \"b\"\\\n")];
            encoder.gauges("odd", "Line one\nline two", [(labels, 1.5)])
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_are_counted_and_timed() {
        let rooms = RoomMetrics {
            bodies: Budget::new(1),
            answers: Budget::new(1),
            changes: Arc::new(ChangeWaiters::new(1)),
        };
        let metrics = Metrics::new(rooms, vec![Box::new(Odd)]);
        let slow = Duration::from_secs(1);
        let timer = metrics.start_timer(Dialect::Native, &Method::PUT, slow);
        tokio::time::advance(Duration::from_millis(3)).await;
        let mut response = Response::default();
        *response.status_mut() = http::StatusCode::CREATED;
        timer.finish(response);
        drop(metrics.start_timer(Dialect::Native, &Method::PATCH, slow));
        let refused = Problem::new(Code::Overloaded, "a queue").into_response();
        metrics
            .start_timer(Dialect::Native, &Method::DELETE, slow)
            .finish(refused);
        let text = metrics.page();
        for line in [
            "# TYPE quorate_http_requests_total counter",
            r#"quorate_http_requests_total{dialect="native",method="PUT",status="2xx"} 1"#,
            r#"quorate_http_requests_total{dialect="native",method="other",status="cancelled"} 1"#,
            r#"quorate_http_request_seconds_bucket{dialect="native",method="PUT",le="0.0025"} 0"#,
            r#"quorate_http_request_seconds_bucket{dialect="native",method="PUT",le="0.005"} 1"#,
            r#"quorate_http_request_seconds_bucket{dialect="native",method="PUT",le="+Inf"} 1"#,
            r#"quorate_http_request_seconds_sum{dialect="native",method="PUT"} 0.003"#,
            concat!(
                "quorate_http_request_duration_seconds_bucket",
                r#"{dialect="native",method="PUT",le="0.005"} 1"#
            ),
            r#"quorate_http_problems_total{code="overloaded"} 1"#,
            r#"quorate_http_problems_total{code="unavailable"} 0"#,
            r#"quorate_http_request_seconds_count{dialect="native",method="PUT"} 1"#,
            "quorate_http_requests_in_flight 0",
            r"# HELP odd Line one\nline two",
            r#"odd{name="a \"b\"\\\n"} 1.5"#,
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line}\nis not in\n{text}"
            );
        }
        let families = check(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"));
        for name in [
            "process_cpu_seconds_total",
            "process_resident_memory_bytes",
            "process_open_fds",
            "quorate_build_info",
        ] {
            assert!(
                families
                    .iter()
                    .any(|family| family.name == name && !family.samples.is_empty()),
                "{name}\nis not in\n{text}"
            );
        }
    }
}
