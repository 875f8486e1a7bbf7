//! The command line: the arguments of each subcommand, and what it does with the layers below.
//!
//! A command returns an [`Exit`] or a [`CliError`]; [`run`] turns both into an exit code and one
//! line on standard error. Output goes through `io::Write`, never `println!`, which panics when a
//! pipe is closed.

pub mod bench;
pub mod cluster;
pub mod completions;
pub mod gateway;
pub mod health;
pub mod kv;
pub mod node_flags;
pub mod serve;
mod servers;
mod signals;

use std::future::Future;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::api::store::Failure;
use crate::api::view_change::ViewChangeFailure;
use crate::cli::serve::ServeError;
use crate::client::native::NativeError;

/// A sharded, linearizable key-value store.
#[derive(Debug, Parser)]
#[command(name = "quorate", version, about, max_term_width = 110, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a node.
    Serve(Box<node_flags::ServeArguments>),
    /// Serve a cluster to clients of any dialect, keeping no data.
    Gateway(gateway::GatewayArguments),
    /// Read and write keys.
    Kv(kv::KvArguments),
    /// Look at a cluster, change its nodes, replicas and shards, and hand leaderships over.
    Cluster(cluster::ClusterArguments),
    /// Ask one node or gateway whether it lives.
    Health(health::HealthArguments),
    /// Load a cluster (or another HTTP key-value server) and measure.
    Bench(Box<bench::BenchArguments>),
    /// Print a completion script for a shell.
    Completions(completions::CompletionsArguments),
}

/// The exit codes, in the help of every command.
pub const EXIT_CODES: &str = "Exit codes: 0 done, 1 no such key or a condition that does not hold, \
2 usage, 3 unavailable or of unknown outcome, 4 (of serve) a part of the node panicked or hung: \
start it again.";

/// The end of a command that did what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Done,
    /// A key that was asked for is not there: said by the exit code, not by a message.
    Missing,
    /// Something is not as it should be: said already, and by the exit code.
    Damaged,
    /// The user did not wait for the end. What goes on was said.
    Interrupted,
}

/// The reason why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Native(#[from] NativeError),
    #[error(transparent)]
    ViewChange(#[from] ViewChangeFailure),
    /// It was not done, as the cluster or the user's answer is.
    #[error("{0}")]
    Refused(String),
    /// A node could not start, or had to stop.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A file of the user's, or standard input or output.
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
}

impl From<Failure> for CliError {
    fn from(failure: Failure) -> Self {
        CliError::Native(failure.into())
    }
}

impl CliError {
    /// Returns the error of a standard output that could not be written.
    pub fn output(source: io::Error) -> Self {
        CliError::Io {
            what: "standard output".into(),
            source,
        }
    }

    fn code(&self) -> u8 {
        match self {
            CliError::Usage(_) => 2,
            CliError::Native(NativeError::ConditionFailed { .. }) => 1,
            CliError::Native(NativeError::Failed(failure))
            | CliError::ViewChange(ViewChangeFailure::Failed(failure)) => match failure {
                Failure::Invalid { .. } | Failure::TooLarge { .. } => 2,
                Failure::Elsewhere { .. }
                | Failure::Overloaded { .. }
                | Failure::Unavailable { .. }
                | Failure::Unknown { .. } => 3,
            },
            CliError::ViewChange(
                ViewChangeFailure::Refused { .. }
                | ViewChangeFailure::NotReady { .. }
                | ViewChangeFailure::EpochChanged { .. },
            )
            | CliError::Refused(_) => 1,
            CliError::Serve(_) | CliError::Io { .. } => 3,
        }
    }

    /// Returns true if the reader of our output went away, which is no error of ours.
    fn is_closed_pipe(&self) -> bool {
        matches!(self, CliError::Io { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Runs one command to its end.
pub fn run(cli: Cli) -> ExitCode {
    let ended = match cli.command {
        Command::Serve(arguments) => on_all_threads(serve::run(*arguments)),
        Command::Gateway(arguments) => on_all_threads(gateway::run(arguments)),
        Command::Kv(arguments) => on_one_thread(kv::run(arguments)),
        Command::Cluster(arguments) => on_one_thread(cluster::run(arguments)),
        Command::Health(arguments) => on_one_thread(health::run(arguments)),
        Command::Bench(arguments) => bench::run(*arguments),
        Command::Completions(arguments) => completions::run(&arguments),
    };
    match ended {
        Ok(Exit::Done) => ExitCode::SUCCESS,
        Ok(Exit::Missing | Exit::Damaged) => ExitCode::from(1),
        // As a shell reports SIGINT.
        Ok(Exit::Interrupted) => ExitCode::from(130),
        Err(error) if error.is_closed_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            print_error(&error);
            ExitCode::from(error.code())
        }
    }
}

/// Writes one line to standard error. If that is closed too, there is nothing left to do.
pub fn print_error(error: &dyn std::fmt::Display) {
    drop(writeln!(io::stderr(), "quorate: {error}"));
}

/// Runs a command that waits for one answer after the other.
fn on_one_thread(command: impl Future<Output = Result<Exit, CliError>>) -> Result<Exit, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .map_err(|source| CliError::Io {
            what: "the runtime".into(),
            source,
        })?
        .block_on(command)
}

/// Runs a node, which answers many requests at once.
fn on_all_threads(node: impl Future<Output = Result<(), ServeError>>) -> Result<Exit, CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| CliError::Io {
        what: "the runtime".into(),
        source,
    })?;
    runtime.block_on(node)?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exit_codes_tell_refused_from_unknown() {
        let failed = |failure| CliError::Native(NativeError::Failed(failure)).code();
        assert_eq!(
            CliError::Native(NativeError::ConditionFailed {
                detail: String::new()
            })
            .code(),
            1
        );
        assert_eq!(
            failed(Failure::Invalid {
                reason: String::new()
            }),
            2
        );
        assert_eq!(
            failed(Failure::Unavailable {
                reason: String::new(),
                retry_after_ms: 0
            }),
            3
        );
        assert_eq!(
            failed(Failure::Unknown {
                reason: String::new()
            }),
            3
        );
        assert_eq!(
            CliError::from(ViewChangeFailure::Refused {
                reason: String::new()
            })
            .code(),
            1
        );
        let unknown = Failure::Unknown {
            reason: String::new(),
        };
        assert_eq!(CliError::from(ViewChangeFailure::Failed(unknown)).code(), 3);
        assert!(CliError::output(io::ErrorKind::BrokenPipe.into()).is_closed_pipe());
    }
}
