//! `quorate completions`: a completion script.

use std::io::{self, Write};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, CliError, Exit};

#[derive(Debug, Args)]
pub struct Arguments {
    shell: Shell,
}

/// # Errors
///
/// When standard output can't be written.
pub fn run(arguments: &Arguments) -> Result<Exit, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "quorate", &mut script);
    io::stdout().write_all(&script).map_err(CliError::output)?;
    Ok(Exit::Done)
}
