//! What the tests of this folder share: a cluster of real processes, a client that tells lost from
//! refused, load that records its history, and the checker that judges it.

pub mod cluster;
pub mod damage;
pub mod fill;
pub mod firewall;
pub mod http;
pub mod load;
pub mod mounts;
pub mod net;

use std::time::Duration;

pub use quorate_sim::campaign::{from_environment, say, seed};

/// Waits until `probe` gives something, asking every few milliseconds; none once `limit` is over.
pub async fn eventually<T>(
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Option<T>,
) -> Option<T> {
    let end = tokio::time::Instant::now() + limit;
    loop {
        if let Some(found) = probe().await {
            return Some(found);
        }
        if tokio::time::Instant::now() >= end {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The most memory that the process has ever had resident.
pub fn memory_peak_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .expect("the status of a process that runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("VmHWM");
    let kilobytes: u64 = line
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number of kB");
    kilobytes << 10
}
