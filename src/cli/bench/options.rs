//! The arguments of `quorate bench`, and the plan that they make.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use http::Method;

use super::rng::Distribution;
use super::template::Template;
use crate::cli::servers::{Servers, seconds};
use crate::cli::{CliError, EXIT_CODES};
use crate::types::Address;

/// The largest value that servers take.
const VALUE_BYTES_MAX: usize = 8 << 20;

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct BenchArguments {
    #[command(flatten)]
    servers: Servers,
    /// put, get, stale-get, mixed or mixed=READ% (50 if not given)
    #[arg(short, long, default_value = "put")]
    workload: Workload,
    /// Workers, each with a request in flight and a connection per node
    #[arg(
        short,
        long,
        default_value_t = 64,
        value_parser = clap::value_parser!(u32).range(1..=10_000)
    )]
    connections: u32,
    /// Requests per second of all workers together, latency counted from when each was due
    /// [default: as fast as they are answered]
    #[arg(short, long)]
    rate: Option<f64>,
    /// Number of different keys
    #[arg(
        short,
        long,
        default_value_t = 100_000,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000)
    )]
    keys: u64,
    /// uniform, zipfian or zipfian=THETA
    #[arg(long, default_value = "uniform")]
    distribution: Distribution,
    /// Bytes per value
    #[arg(long, default_value_t = 100, value_name = "BYTES")]
    value_size: usize,
    /// Prefix of all keys
    #[arg(long, default_value = "bench-")]
    key_prefix: String,
    /// Seconds to measure
    #[arg(short, long, default_value = "10", value_parser = seconds, value_name = "SECONDS")]
    duration: Duration,
    /// Seconds to run before that
    #[arg(long, default_value = "0", value_parser = seconds_or_none, value_name = "SECONDS")]
    warm_up: Duration,
    /// The same seed draws the same keys and values
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write every key once before
    #[arg(long)]
    preload: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// Threads of the generator
    #[arg(
        long,
        default_value_t = 1,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=64)
    )]
    pub threads: usize,
    /// Drive any HTTP server: the URL of each request, with {server} (each worker takes one),
    /// {key}, {key_b64}, {value}, {value_b64} replaced
    #[arg(long, value_name = "URL")]
    url_template: Option<String>,
    /// The method that goes with --url-template [default: POST with a body, else GET]
    #[arg(long, requires = "url_template")]
    method: Option<Method>,
    /// The body that goes with --url-template
    #[arg(long, requires = "url_template", value_name = "TEXT")]
    body_template: Option<String>,
    /// The Content-Type that goes with --body-template
    #[arg(
        long,
        requires = "url_template",
        default_value = "application/json",
        value_name = "TYPE"
    )]
    content_type: String,
}

/// The mix of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    Put,
    Get,
    StaleGet,
    /// Percent of reads.
    Mixed(u8),
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=').unwrap_or((text, "")) {
            ("put", "") => Ok(Workload::Put),
            ("get", "") => Ok(Workload::Get),
            ("stale-get", "") => Ok(Workload::StaleGet),
            ("mixed", "") => Ok(Workload::Mixed(50)),
            ("mixed", percent) => match percent.trim_end_matches('%').parse() {
                Ok(percent @ 0..=100) => Ok(Workload::Mixed(percent)),
                _ => Err("the percentage of reads is from 0 to 100".into()),
            },
            _ => Err("expected put, get, stale-get, mixed or mixed=READ%".into()),
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Workload::Put => f.write_str("put"),
            Workload::Get => f.write_str("get"),
            Workload::StaleGet => f.write_str("stale-get"),
            Workload::Mixed(reads) => write!(f, "mixed={reads}%"),
        }
    }
}

/// The interface that the load goes to.
#[derive(Debug)]
pub enum LoadTarget {
    Native(Workload),
    Template(Template),
}

/// Arguments that fit together.
#[derive(Debug)]
pub struct BenchPlan {
    pub target: LoadTarget,
    /// The name in the report.
    pub name: String,
    pub servers: Vec<Address>,
    pub timeout: Duration,
    pub connections: u32,
    pub rate: Option<f64>,
    pub keys: u64,
    pub key_prefix: String,
    pub distribution: Distribution,
    pub value_size: usize,
    pub duration: Duration,
    pub warm_up: Duration,
    pub seed: u64,
    pub preload: bool,
}

impl BenchPlan {
    /// Returns the plan that the arguments make.
    ///
    /// # Errors
    ///
    /// Fails if the arguments do not fit together.
    pub fn check(arguments: BenchArguments) -> Result<Self, CliError> {
        let usage = |text: &str| Err(CliError::Usage(text.to_owned()));
        if arguments
            .rate
            .is_some_and(|rate| !rate.is_finite() || rate <= 0.0)
        {
            return usage("--rate is above 0");
        }
        if arguments.value_size > VALUE_BYTES_MAX {
            return usage(&format!("--value-size is at most {VALUE_BYTES_MAX}"));
        }
        if arguments.url_template.is_some() && arguments.preload {
            return usage(
                "--preload can't be used with --url-template: run it once with a template that \
                writes",
            );
        }
        let servers = arguments.servers.addresses();
        let (target, name) = match &arguments.url_template {
            None => (
                LoadTarget::Native(arguments.workload),
                arguments.workload.to_string(),
            ),
            Some(url) => {
                let body = arguments.body_template.as_deref();
                let template = Template::new(
                    url,
                    arguments.method.clone(),
                    body,
                    &arguments.content_type,
                    &servers,
                );
                let template = template.map_err(CliError::Usage)?;
                (LoadTarget::Template(template), url.clone())
            }
        };
        Ok(Self {
            target,
            name,
            servers,
            timeout: arguments.servers.timeout(),
            connections: arguments.connections,
            rate: arguments.rate,
            keys: arguments.keys,
            key_prefix: arguments.key_prefix,
            distribution: arguments.distribution,
            value_size: arguments.value_size,
            duration: arguments.duration,
            warm_up: arguments.warm_up,
            seed: arguments.seed,
            preload: arguments.preload,
        })
    }
}

fn seconds_or_none(text: &str) -> Result<Duration, String> {
    if matches!(text, "0" | "0s") {
        Ok(Duration::ZERO)
    } else {
        seconds(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_parse() {
        assert_eq!("mixed=95%".parse(), Ok(Workload::Mixed(95)));
        assert_eq!("mixed".parse(), Ok(Workload::Mixed(50)));
        assert_eq!("stale-get".parse(), Ok(Workload::StaleGet));
        assert_eq!(
            Workload::Mixed(95).to_string().parse(),
            Ok(Workload::Mixed(95))
        );
        for bad in ["mixed=101", "get=5", "delete", ""] {
            assert!(bad.parse::<Workload>().is_err(), "{bad}");
        }
    }
}
