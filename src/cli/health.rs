//! `quorate health`: asks one node or gateway how it is. For the health checks of containers, whose images need no curl.

use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use super::node_flags::{Given, given};
use super::servers::{default_server, seconds};
use super::{CliError, EXIT_CODES, Exit, complain};
use crate::client::health;
use crate::types::Address;

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Arguments {
    /// The node or gateway to ask [default: 127.0.0.1:13800]
    #[arg(value_name = "HOST:PORT", env = "ADDRESS")]
    address: Option<Given<Address>>,
    /// Ask whether it should be given requests, not only whether it lives
    #[arg(long)]
    ready: bool,
    /// How long the answer is waited for, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    timeout: Duration,
}

/// # Errors
///
/// When the address can't be made out.
pub async fn run(arguments: Arguments) -> Result<Exit, CliError> {
    let address = given(arguments.address.as_ref()).cloned().or_else(default_server);
    let address = address.ok_or_else(|| CliError::Usage("name a node".into()))?;
    let path = if arguments.ready { "/readyz" } else { "/healthz" };
    let reason = match timeout(arguments.timeout, health::ask(&address, path, arguments.timeout)).await {
        Ok(Ok(())) => return Ok(Exit::Done),
        Ok(Err(reason)) => reason,
        Err(_) => format!("no answer within {:?}", arguments.timeout),
    };
    complain(&format!("{address}: {reason}"));
    Ok(Exit::Missing)
}
