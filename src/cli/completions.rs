//! `quorate completions`: a completion script.

use std::io::{self, Write};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, CliError, Exit};

#[derive(Debug, Args)]
pub struct CompletionsArguments {
    shell: Shell,
}

/// Prints the completion script.
///
/// # Errors
///
/// Fails if standard output can't be written.
pub fn run(arguments: &CompletionsArguments) -> Result<Exit, CliError> {
    io::stdout()
        .write_all(&script(arguments.shell))
        .map_err(CliError::output)?;
    Ok(Exit::Done)
}

fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "quorate", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_shell_is_told_of_every_verb() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(script(*shell)).expect("a script is text");
            for verb in [
                "set-replication",
                "rebalance",
                "plan",
                "status",
                "--no-wait",
            ] {
                // Some shells are told of options without their dashes.
                assert!(
                    script.contains(verb.trim_start_matches('-')),
                    "{shell} is not told of {verb}"
                );
            }
        }
    }
}
