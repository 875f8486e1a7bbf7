//! Where the program's own log goes: to standard error, one line an event, or one JSON object.

use parking_lot::Mutex;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;

/// Format of log lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Default filter, unless `--log` or `QUORATE_LOG` is given. openraft is off because it logs every
/// failed heartbeat at high levels; what that means for a group is logged by this program.
const FILTER_DEFAULT: &str = "info,openraft=off,sled=warn,hyper=warn,h2=warn,reqwest=warn";

/// Starts logging for this process. A second call changes nothing.
pub fn start(filter: Option<&str>, format: LogFormat) {
    let filter = EnvFilter::try_new(filter.unwrap_or(FILTER_DEFAULT)).unwrap_or_else(|error| {
        eprintln!(
            "quorate: the log filter is not understood ({error}); logging at the default level"
        );
        EnvFilter::new(FILTER_DEFAULT)
    });
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    let started = match format {
        LogFormat::Text => builder
            .with_ansi(std::io::stderr().is_terminal())
            .try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    drop(started);
}

/// Interval during which a repeated message is not logged again.
const RARELY: Duration = Duration::from_secs(60);

/// Keeps a line that others can provoke from filling the log: it is said at once, and then each
/// minute, with how often it was due since.
#[derive(Debug)]
pub struct Rarely(Mutex<Option<(Instant, u64)>>);

impl Rarely {
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Returns how often the line was left out since it was said last, if it is to be said now.
    pub fn due(&self) -> Option<u64> {
        self.due_at(Instant::now())
    }

    fn due_at(&self, now: Instant) -> Option<u64> {
        let mut last = self.0.lock();
        match &mut *last {
            Some((said, left_out)) if now.duration_since(*said) < RARELY => {
                *left_out += 1;
                None
            }
            _ => Some(last.replace((now, 0)).map_or(0, |(_, left_out)| left_out)),
        }
    }
}

/// Says a line at once, and then at most once a minute, with how often it was left out since: what
/// stands in a loop, or can be provoked by others. Takes the level, and then what the macro of
/// `tracing` for it takes.
macro_rules! rarely {
    ($level:ident, $($line:tt)+) => {{
        static LINE: $crate::telemetry::Rarely = $crate::telemetry::Rarely::new();
        if let Some(left_out) = LINE.due() {
            ::tracing::$level!(left_out, $($line)+);
        }
    }};
}
pub(crate) use rarely;

impl Default for Rarely {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_often_is_said_once_a_minute_with_its_number() {
        let (line, start) = (Rarely::new(), Instant::now());
        assert_eq!(line.due_at(start), Some(0));
        for second in 1..60 {
            assert_eq!(line.due_at(start + Duration::from_secs(second)), None);
        }
        assert_eq!(line.due_at(start + RARELY), Some(59));
        assert_eq!(line.due_at(start + RARELY * 3), Some(0));
    }
}
