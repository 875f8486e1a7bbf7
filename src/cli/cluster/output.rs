//! Prints for the commands, and puts their exit codes in words.

use std::io::{self, Write};

use crate::cli::{CliError, Exit};

/// The exit codes of a change, in its help.
pub const CHANGE_EXIT_CODES: &str = "Exit codes: 0 done, 1 refused, not confirmed or overtaken by \
a later change, 2 usage, 3 unavailable or of unknown outcome, 130 interrupted: a change that was \
accepted goes on by itself.";

/// The exit codes of a scrub, in its help.
pub const SCRUB_EXIT_CODES: &str = "Exit codes: 0 nothing is damaged, 1 something was, mended or \
not, 2 usage, 3 a node did not answer or stopped, 130 interrupted: a scrub that has begun goes on \
by itself.";

/// Returns the value as indented JSON with a newline.
pub fn as_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value)
        .map_or_else(|error| format!("{error}\n"), |text| format!("{text}\n"))
}

/// Writes a result to standard output.
pub fn print(text: &str) -> Result<Exit, CliError> {
    let mut output = io::stdout().lock();
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
        .map_err(CliError::output)?;
    Ok(Exit::Done)
}

/// Writes a line for people to standard error: standard output is for results.
pub fn print_error_line(text: &str) {
    drop(writeln!(io::stderr(), "{text}"));
}

/// Returns a size in words: `1.5 KiB`.
pub fn bytes(count: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) => format!("{}.{} {unit}", count / size, count % size * 10 / size),
        None => format!("{count} B"),
    }
}

/// Returns a number with its noun: `1 slot`, `2 slots`.
pub fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(
            [bytes(7), bytes(1536), bytes(3 << 30)],
            ["7 B", "1.5 KiB", "3.0 GiB"]
        );
        assert_eq!([count(1, "slot"), count(0, "slot")], ["1 slot", "0 slots"]);
    }
}
