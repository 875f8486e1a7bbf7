//! Seeds and settings of tests with randomness, from the environment.

use std::sync::OnceLock;

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
