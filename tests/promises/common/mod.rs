//! What the tests of this folder share: a cluster of real processes, a client that tells lost from
//! refused, load that records its history, and the checker that judges it.

pub mod cluster;
pub mod damage;
pub mod fill;
pub mod firewall;
pub mod history;
pub mod http;
pub mod linearizable;
pub mod load;
pub mod mounts;
pub mod net;

use std::sync::OnceLock;
use std::time::Duration;

/// The seed of this run: `QUORATE_TEST_SEED`, or a new one. Printed once, past the capture of the
/// test runner.
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let seed = from_environment("QUORATE_TEST_SEED").unwrap_or_else(rand::random);
        say(&format!(
            "seed {seed} (to repeat it: QUORATE_TEST_SEED={seed})"
        ));
        seed
    })
}

/// A number from the environment, for longer campaigns.
pub fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is '{text}', not a number")),
    )
}

/// Prints a line that is seen of passing tests too.
pub fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "\n    {line}");
}

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
