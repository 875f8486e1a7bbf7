//! Where the program's own log goes: to standard error, one line an event, or one JSON object.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// What is logged where neither `--log` nor `QUORATE_LOG` says otherwise. openraft tells of every heartbeat that fails at levels that are
/// ours to decide: what it means for a group is logged by us.
const FILTER_DEFAULT: &str = "info,openraft=off,sled=warn,hyper=warn,h2=warn,reqwest=warn";

/// Starts logging for this process. A second call changes nothing.
pub fn start(filter: Option<&str>, format: LogFormat) {
    let filter = EnvFilter::try_new(filter.unwrap_or(FILTER_DEFAULT)).unwrap_or_else(|error| {
        eprintln!("quorate: the log filter is not understood ({error}); logging at the default level");
        EnvFilter::new(FILTER_DEFAULT)
    });
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let started = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    drop(started);
}
