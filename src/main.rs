//! The `quorate` program: reads the command line and runs what it says.

use std::process::ExitCode;

use clap::Parser;

/// Trees, tables and frames are many small pieces that one thread allocates and another frees: the
/// C library's allocator is slow at that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    quorate::cli::run(quorate::cli::Cli::parse())
}
