//! Tells what the process takes of the machine, under the names that every Prometheus client
//! library uses, and what it is.
//!
//! Of Linux's `/proc`; what that does not tell is left out.

use std::fmt;
use std::fs;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::descriptors;
use crate::metrics::{Collector, DescriptorEncoder, EncodeFamilies};
use crate::sm::level::LEVEL;

/// The kernel's unit of CPU time towards programs, on any machine (`USER_HZ`).
const TICKS_PER_S: f64 = 100.0;

/// Start of this program. The kernel's own start time stays the same when a node starts itself
/// again, and counters begin anew then.
static STARTED_AT: LazyLock<SystemTime> = LazyLock::new(SystemTime::now);

/// Notes that the program has begun, if that was not yet noted.
pub fn note_start() {
    LazyLock::force(&STARTED_AT);
}

/// Memory and threads, as the kernel tells.
#[derive(Debug, Default, PartialEq, Eq)]
struct ProcessStatus {
    resident_bytes: Option<u64>,
    virtual_bytes: Option<u64>,
    threads: Option<u64>,
}

impl ProcessStatus {
    /// Reads `/proc/self/status`: a name, a colon and a number, of KiB where it has a unit.
    fn parse(text: &str) -> Self {
        let mut status = ProcessStatus::default();
        for line in text.lines() {
            let Some((name, rest)) = line.split_once(':') else {
                continue;
            };
            let number = rest
                .split_whitespace()
                .next()
                .and_then(|number| number.parse::<u64>().ok());
            let bytes = number.and_then(|kib| kib.checked_mul(1024));
            match name {
                "VmRSS" => status.resident_bytes = bytes,
                "VmSize" => status.virtual_bytes = bytes,
                "Threads" => status.threads = number,
                _ => {}
            }
        }
        status
    }
}

/// Reads the process and its runtime at each scrape.
#[derive(Debug)]
pub struct ProcessMetrics;

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let build = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("level_max", LEVEL.to_string()),
        ];
        encoder.gauges(
            "quorate_build_info",
            "1; what runs is told by the labels.",
            [(build, 1_u64)],
        )?;

        // A value that the machine does not tell is left out: a 0 would look like a measurement.
        if let Ok(since) = STARTED_AT.duration_since(UNIX_EPOCH) {
            encoder.gauge(
                "process_start_time_seconds",
                "When the program began, since the epoch; later if it started itself again.",
                since.as_secs_f64(),
            )?;
        }
        of_memory(&mut encoder)?;
        if let Some(count) = descriptors::in_use() {
            encoder.gauge(
                "process_open_fds",
                "Descriptors that the process has.",
                count,
            )?;
        }
        encoder.gauge(
            "process_max_fds",
            "Descriptors that the process may have.",
            descriptors::limit(),
        )?;
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            of_runtime(&mut encoder, &runtime)?;
        }

        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        match cpu_ticks(&stat) {
            Some(ticks) => encoder.counter(
                "process_cpu_seconds_total",
                "Time that the process has had a processor.",
                ticks as f64 / TICKS_PER_S,
            ),
            None => Ok(()),
        }
    }
}

/// Writes the memory and the threads of the process.
fn of_memory(encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let status = ProcessStatus::parse(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    let values = [
        (
            "process_resident_memory_bytes",
            "Memory that the process has resident.",
            status.resident_bytes,
        ),
        (
            "process_virtual_memory_bytes",
            "Address space of the process.",
            status.virtual_bytes,
        ),
        ("quorate_threads", "Threads of the process.", status.threads),
    ];
    for (name, help, value) in values {
        if let Some(value) = value {
            encoder.gauge(name, help, value)?;
        }
    }
    Ok(())
}

fn of_runtime(
    encoder: &mut DescriptorEncoder<'_>,
    runtime: &tokio::runtime::Handle,
) -> fmt::Result {
    let runtime = runtime.metrics();
    encoder.gauge(
        "quorate_runtime_tasks",
        "Tasks that have not ended.",
        runtime.num_alive_tasks(),
    )?;
    encoder.gauge(
        "quorate_runtime_queued_tasks",
        "Tasks that are ready and that no thread has taken yet.",
        runtime.global_queue_depth(),
    )
}

/// Reads the time of `/proc/self/stat` that was spent in the program and for it in the kernel, the
/// 14th and the 15th field. The second, a name in parentheses, may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    ticks()?.checked_add(ticks()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_tells_is_read() {
        let text =
            "Name:\tquorate: x\nVmSize:\t  2048 kB\nVmRSS:\t    12 kB\nThreads:\t7\nVmHWM: odd\n";
        let status = ProcessStatus {
            resident_bytes: Some(12 << 10),
            virtual_bytes: Some(2 << 20),
            threads: Some(7),
        };
        assert_eq!(ProcessStatus::parse(text), status);
        assert_eq!(ProcessStatus::parse(""), ProcessStatus::default());
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 9 0 0 0 250 50 0 0 20 0 7 0 99 2048 3 \
            18446744073709551615";
        assert_eq!((cpu_ticks(stat), cpu_ticks("")), (Some(300), None));
    }
}
