//! What the tests of this folder share.

pub mod history;
pub mod linearizable;

use std::sync::OnceLock;

/// The seed of this run: `QUORATE_TEST_SEED`, or a new one. Printed once, past the capture of the test runner.
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let seed = std::env::var("QUORATE_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
        say(&format!("seed {seed} (to repeat it: QUORATE_TEST_SEED={seed})"));
        seed
    })
}

/// Prints a line that is seen of passing tests too.
pub fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}
