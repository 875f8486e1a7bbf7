//! `quorate health`: asks one node or gateway how it is. For the health checks of containers, whose
//! images need no curl.

use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use super::node_flags::{OptionalValue, given};
use super::servers::seconds;
use super::{CliError, Exit, print_error};
use crate::client::health;
use crate::config::PORT_DEFAULT;
use crate::types::{Address, ParseError};

#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 it lives (with --ready: it is ready), 1 it does not, 2 usage."
)]
pub struct HealthArguments {
    /// The node or gateway to ask [default: the node of this machine, at the port of ADDRESS or
    /// 13800]
    #[arg(value_name = "HOST:PORT")]
    asked: Option<Address>,
    /// Address of the node of this machine
    #[arg(long, env = "ADDRESS", value_name = "HOST:PORT", hide = true)]
    address: Option<OptionalValue<Address>>,
    /// Ask whether it should be given requests, not only whether it lives
    #[arg(long)]
    ready: bool,
    /// Seconds to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    timeout: Duration,
}

impl HealthArguments {
    /// Returns the addresses to ask, one after the other. A node that listens on every address is
    /// asked by the loopback address first: the others come and go with the networks.
    fn candidates(&self) -> Result<Vec<Address>, ParseError> {
        if let Some(asked) = &self.asked {
            return Ok(vec![asked.clone()]);
        }
        let own = given(self.address.as_ref());
        let loopback = format!("127.0.0.1:{}", own.map_or(PORT_DEFAULT, Address::port)).parse()?;
        Ok(std::iter::once(loopback).chain(own.cloned()).collect())
    }
}

/// Asks until one of the addresses answers that it is well.
///
/// # Errors
///
/// Fails if the address can't be made out.
pub async fn run(arguments: HealthArguments) -> Result<Exit, CliError> {
    let path = if arguments.ready {
        "/readyz"
    } else {
        "/healthz"
    };
    let candidates = arguments
        .candidates()
        .map_err(|error| CliError::Usage(error.to_string()))?;
    for address in candidates {
        let reason = match timeout(
            arguments.timeout,
            health::ask(&address, path, arguments.timeout),
        )
        .await
        {
            Ok(Ok(())) => return Ok(Exit::Done),
            Ok(Err(reason)) => reason,
            Err(_) => format!("no answer within {:?}", arguments.timeout),
        };
        print_error(&format!("{address}: {reason}"));
    }
    Ok(Exit::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: HealthArguments,
    }

    #[test]
    fn the_node_of_this_machine_is_asked_unless_another_is_named() {
        let candidates = |line: &[&str]| {
            let line = Line::try_parse_from(std::iter::once(&"health").chain(line))
                .expect("a line that parses");
            let candidates = line.arguments.candidates().expect("addresses");
            candidates
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(candidates(&["--address", ""]), ["127.0.0.1:13800"]);
        assert_eq!(
            candidates(&["--address", "10.10.0.4:13801"]),
            ["127.0.0.1:13801", "10.10.0.4:13801"]
        );
        assert_eq!(
            candidates(&["--address", "10.10.0.4:13801", "gateway:8080"]),
            ["gateway:8080"]
        );
    }
}
