//! Waits for the end of a change of the view, and shows how it gets on: a line on a terminal that
//! is written anew, elsewhere a line now and then.
//!
//! The change needs nobody to wait for it: an interrupt ends the wait alone, and says so.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::client::ClusterClient;
use super::output::{as_json, bytes, count, print, print_error_line};
use crate::api::store::{Failure, Options, Store};
use crate::api::view_change::{ChangeInProgress, Phase};
use crate::cli::{CliError, Exit};

/// Between two looks: small changes are done in a moment.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(50);
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// Timeout of one look: the line should say soon that nobody answers.
const LOOK_TIMEOUT_MAX: Duration = Duration::from_secs(3);
/// Between two lines where they are not written over each other.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// The wait is given up after so much silence, or the `--timeout` if that is longer. An election
/// takes a second, a restart less than a minute.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Signs in a full bar.
const BAR_WIDTH: u64 = 20;
/// A line must not wrap, or it can't be written anew; where the terminal does not say how wide it
/// is, it is so wide.
const COLUMNS_DEFAULT: u16 = 80;

/// Waits for one change.
pub struct ChangeFollower<'a> {
    cluster: &'a ClusterClient,
    json: bool,
    line: StatusLine,
}

impl<'a> ChangeFollower<'a> {
    pub fn new(cluster: &'a ClusterClient, json: bool) -> Self {
        Self {
            cluster,
            json,
            line: StatusLine::new(io::stderr().is_terminal()),
        }
    }

    /// Waits for the end of a change and shows how it gets on.
    ///
    /// # Errors
    ///
    /// Fails if a later plan has taken over, or nobody answers any more.
    pub async fn follow(mut self, change: ChangeInProgress) -> Result<Exit, CliError> {
        let id = change.id;

        // Nodes carry the change out by themselves, so an interrupt ends only the watching.
        let ended = tokio::select! {
            ended = self.wait_for_end(change) => Some(ended),
            interrupted = tokio::signal::ctrl_c() => {
                drop(interrupted);
                None
            }
        };
        self.line.clear();
        match ended {
            None => {
                print_error_line(&format!(
                    "plan {id} is carried out all the same; to follow it: quorate cluster wait \
                    {id}"
                ));
                Ok(Exit::Interrupted)
            }
            Some(Err(failure)) => Err(failure.into()),
            Some(Ok(change)) => {
                if self.json {
                    print(&as_json(&change))?;
                }
                match change.phase {
                    Phase::Superseded => Err(CliError::Refused(format!(
                        "a later plan has taken over before plan {id} was done"
                    ))),
                    Phase::Running | Phase::Done if self.json => Ok(Exit::Done),
                    Phase::Running | Phase::Done => print(&format!("plan {id} is done\n")),
                }
            }
        }
    }

    async fn wait_for_end(
        &mut self,
        mut change: ChangeInProgress,
    ) -> Result<ChangeInProgress, Failure> {
        let asked_for = self.cluster.options.timeout;
        let patience = SILENCE_MAX.max(asked_for);
        let options = Options {
            timeout: LOOK_TIMEOUT_MAX.min(asked_for),
            ..self.cluster.options
        };
        let mut meter = ProgressBar::default();
        let mut heard = Instant::now();
        let mut interval = LOOK_INTERVAL_MIN;
        self.line.show(&meter.line(&change));

        while !change.is_over() {
            sleep(interval).await;
            interval = (interval * 2).min(LOOK_INTERVAL_MAX);
            let silence = match self.cluster.store.operation(change.id, options).await {
                Ok(Some(newer)) => {
                    (change, heard) = (newer, Instant::now());
                    self.line.show(&meter.line(&change));
                    continue;
                }
                Ok(None) => "no node knows the plan".to_owned(),
                Err(Failure::Unavailable { reason, .. }) => reason,
                Err(failure) => failure.to_string(),
            };

            let silent_s = heard.elapsed().as_secs();
            self.line.show(&format!(
                "plan {}: no answer for {silent_s} s ({silence})",
                change.id
            ));
            if heard.elapsed() > patience {
                let reason = format!(
                    "nobody has told of plan {} for {silent_s} s ({silence}); it is carried out by \
                     itself once its nodes are back",
                    change.id
                );
                return Err(Failure::Unavailable {
                    reason,
                    retry_after_ms: 0,
                });
            }
        }
        Ok(change)
    }
}

/// Draws how far a change is, from what is left and the most that ever was left.
#[derive(Default)]
struct ProgressBar {
    most: u64,
}

impl ProgressBar {
    fn line(&mut self, change: &ChangeInProgress) -> String {
        let left = change.replicas_left + change.slots_left;

        // The rest can grow, when a move begins anew: then the bar is measured anew too.
        self.most = self.most.max(left);
        let done = self.most - left;
        let mut line = format!(
            "plan {} {} {}",
            change.id,
            bar(done, self.most),
            what_is_left(change)
        );
        if let Some(reason) = change.waiting_for.first() {
            let more = change.waiting_for.len() - 1;
            let more = if more > 0 {
                format!(" (and {more} more)")
            } else {
                String::new()
            };
            line.push_str(&format!("; waits for {reason}{more}"));
        }
        line
    }
}

/// Returns a bar that is as full as `done` is of `most`.
pub(super) fn bar(done: u64, most: u64) -> String {
    let signs = u128::from(done) * u128::from(BAR_WIDTH) / u128::from(most.max(1));
    let full = signs.min(u128::from(BAR_WIDTH)) as usize;
    let empty = BAR_WIDTH as usize - full;
    format!("[{}{}]", "#".repeat(full), "-".repeat(empty))
}

/// Returns what is left to do, in words.
pub fn what_is_left(change: &ChangeInProgress) -> String {
    let mut parts = Vec::new();
    if change.replicas_left > 0 {
        parts.push(count(change.replicas_left, "replica"));
    }
    if change.slots_left > 0 {
        parts.push(format!(
            "{} ({})",
            count(change.slots_left, "slot"),
            bytes(change.bytes_left)
        ));
    }
    if parts.is_empty() {
        return "nothing left to move".into();
    }
    let mut text = format!("{} left", parts.join(" and "));
    if let Some(rate) = change.bytes_per_s.filter(|rate| *rate > 0) {
        text.push_str(&format!(", {}/s", bytes(rate)));
    }
    if let Some(left_s) = change.left_s {
        text.push_str(&format!(", about {left_s} s"));
    }
    text
}

/// The line that is shown.
pub(super) struct StatusLine {
    is_terminal: bool,
    shown: String,
    shown_at: Option<Instant>,
}

impl StatusLine {
    pub fn new(is_terminal: bool) -> Self {
        Self {
            is_terminal,
            shown: String::new(),
            shown_at: None,
        }
    }

    pub fn show(&mut self, text: &str) {
        if self.shown == text {
            return;
        }

        // A log file or a pipe gets whole lines, and few of them.
        if self.is_terminal {
            let line: String = text
                .chars()
                .take(columns().saturating_sub(1).into())
                .collect();
            drop(write!(io::stderr(), "\r\x1b[K{line}"));
        } else if self.shown_at.is_none_or(|at| at.elapsed() >= LINE_INTERVAL) {
            print_error_line(text);
            self.shown_at = Some(Instant::now());
        } else {
            return;
        }
        text.clone_into(&mut self.shown);
    }

    pub fn clear(&self) {
        if self.is_terminal {
            drop(write!(io::stderr(), "\r\x1b[K"));
        }
    }
}

fn columns() -> u16 {
    let size = rustix::termios::tcgetwinsize(io::stderr());
    size.ok()
        .map(|size| size.ws_col)
        .filter(|columns| *columns > 0)
        .unwrap_or(COLUMNS_DEFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::PlanEpoch;

    fn change(replicas_left: u64, slots_left: u64) -> ChangeInProgress {
        ChangeInProgress {
            id: PlanEpoch(4),
            phase: Phase::Running,
            replicas_left,
            slots_left,
            bytes_left: slots_left << 10,
            bytes_per_s: None,
            left_s: None,
            waiting_for: vec![],
        }
    }

    #[test]
    fn the_bar_fills_as_less_is_left() {
        let mut meter = ProgressBar::default();
        assert_eq!(
            meter.line(&change(2, 98)),
            "plan 4 [--------------------] 2 replicas and 98 slots (98.0 KiB) left"
        );
        let mut half = ChangeInProgress {
            bytes_per_s: Some(2048),
            left_s: Some(24),
            ..change(1, 49)
        };
        let line = "plan 4 [##########----------] 1 replica and 49 slots (49.0 KiB) left, 2.0 \
            KiB/s, about 24 s";
        assert_eq!(meter.line(&half), line);
        half.waiting_for = vec!["n4 to answer".into(), "n5 to answer".into()];
        assert_eq!(
            meter.line(&half),
            format!("{line}; waits for n4 to answer (and 1 more)")
        );
        assert_eq!(
            meter.line(&change(0, 0)),
            "plan 4 [####################] nothing left to move"
        );
        assert_eq!(
            ProgressBar::default().line(&change(0, 0)),
            "plan 4 [--------------------] nothing left to move"
        );
    }
}
