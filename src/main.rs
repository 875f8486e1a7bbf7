//! The `quorate` program: reads the command line and runs what it says.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    quorate::cli::run(quorate::cli::Cli::parse())
}
