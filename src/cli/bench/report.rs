//! The result, for people and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::options::BenchPlan;
use super::tally::Tally;

/// The result of a run. Latencies are in microseconds, of what was done; errors have none.
#[derive(Debug, Serialize)]
pub struct Report {
    workload: String,
    connections: u32,
    rate: Option<f64>,
    keys: u64,
    distribution: String,
    value_bytes: usize,
    /// With what was still in flight at the end.
    duration_s: f64,
    seed: u64,
    requests: u64,
    requests_per_s: f64,
    missing: u64,
    redirects: u64,
    errors: BTreeMap<String, u64>,
    latency_us: LatencyReport,
}

#[derive(Debug, Serialize)]
struct LatencyReport {
    mean: f64,
    p50: u64,
    p90: u64,
    p99: u64,
    p99_9: u64,
    max: u64,
}

impl Report {
    pub fn new(plan: &BenchPlan, took: Duration, total: &Tally) -> Self {
        let latency_us = LatencyReport {
            mean: total.mean_us(),
            p50: total.latency_us(0.5),
            p90: total.latency_us(0.9),
            p99: total.latency_us(0.99),
            p99_9: total.latency_us(0.999),
            max: total.max_us(),
        };
        Self {
            workload: plan.name.clone(),
            connections: plan.connections,
            rate: plan.rate,
            keys: plan.keys,
            distribution: plan.distribution.to_string(),
            value_bytes: plan.value_size,
            duration_s: took.as_secs_f64(),
            seed: plan.seed,
            requests: total.count(),
            requests_per_s: total.count() as f64 / took.as_secs_f64(),
            missing: total.missing,
            redirects: total.redirects,
            errors: total
                .errors
                .iter()
                .map(|(error, count)| (error.name(), *count))
                .collect(),
            latency_us,
        }
    }

    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|error| error.to_string())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loop_kind = self.rate.map_or_else(
            || "closed loop".to_owned(),
            |rate| format!("open loop at {rate}/s"),
        );
        writeln!(
            f,
            "{}: {} connections, {loop_kind}, {} keys {}, values of {} bytes, {:.1} s, seed {}",
            self.workload,
            self.connections,
            self.keys,
            self.distribution,
            self.value_bytes,
            self.duration_s,
            self.seed
        )?;
        writeln!(
            f,
            "requests   {} ({:.1}/s)",
            self.requests, self.requests_per_s
        )?;
        if self.missing > 0 {
            writeln!(
                f,
                "missing    {} were answered that there is no such key",
                self.missing
            )?;
        }
        if self.redirects > 0 {
            writeln!(f, "redirects  {}", self.redirects)?;
        }
        let errors: u64 = self.errors.values().sum();
        writeln!(f, "errors     {errors}")?;
        for (name, count) in &self.errors {
            writeln!(f, "           {count} {name}")?;
        }
        let ms = |us: u64| us as f64 / 1000.0;
        let LatencyReport {
            mean,
            p50,
            p90,
            p99,
            p99_9,
            max,
        } = &self.latency_us;
        write!(
            f,
            "latency    mean {:.3} ms, p50 {:.3}, p90 {:.3}, p99 {:.3}, p99.9 {:.3}, max {:.3}",
            mean / 1000.0,
            ms(*p50),
            ms(*p90),
            ms(*p99),
            ms(*p99_9),
            ms(*max)
        )
    }
}
