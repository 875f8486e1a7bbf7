//! `quorate cluster scrub`: has nodes read again what is on their disks, and shows how that gets on
//! and what it has found.
//!
//! Each node is asked for its own; a scrub goes on by itself, whoever waits for it.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep};

use super::client::ClusterClient;
use super::output::{bytes, count, print, print_error_line};
use super::progress::{StatusLine, bar};
use crate::api::protocol::ScrubStatus;
use crate::api::store::Failure;
use crate::cli::{CliError, Exit, print_error};
use crate::client::native::{NativeClient, NativeError};
use crate::types::Address;

const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A node that has not answered for so long is waited for no more: a restart takes less, and ends
/// its scrub.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// True if scrubs are begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubBegin {
    Yes,
    No,
}

/// A node that is scrubbed.
struct Scrubbed {
    node: Address,
    client: NativeClient,
    /// The number of the scrub that is followed.
    number: u64,
    state: ScrubState,
    heard: Instant,
}

/// The last known state of the scrub of a node.
enum ScrubState {
    Known(ScrubStatus),
    /// It can't be told how it ended, and why.
    Lost(String),
}

impl Scrubbed {
    async fn begin(node: Address, timeout: Duration, begin: ScrubBegin) -> Self {
        let mut client = NativeClient::new(vec![node.clone()], timeout);
        let asked = client.scrub(begin == ScrubBegin::Yes).await;
        let (number, state) = match asked {
            Ok(status) => (status.number, ScrubState::Known(status)),
            Err(error) => (0, ScrubState::Lost(error.to_string())),
        };
        Self {
            node,
            client,
            number,
            state,
            heard: Instant::now(),
        }
    }

    fn runs(&self) -> bool {
        matches!(&self.state, ScrubState::Known(status) if status.is_running)
    }

    async fn look(&mut self) {
        if !self.runs() {
            return;
        }
        let asked = self.client.scrub(false).await;
        self.hear(asked);
    }

    fn hear(&mut self, asked: Result<ScrubStatus, NativeError>) {
        match asked {
            Ok(status) if status.number == self.number => {
                self.state = ScrubState::Known(status);
                self.heard = Instant::now();
            }
            // It counts anew from each start.
            Ok(_) => self.state = ScrubState::Lost("it was started again meanwhile".to_owned()),
            // A node may be busy or between two connections, so one failed look says little.
            Err(error) if self.heard.elapsed() > SILENCE_MAX => {
                self.state = ScrubState::Lost(error.to_string());
            }
            Err(_) => {}
        }
    }
}

/// # Errors
///
/// Fails if the nodes are not known, one did not answer, or standard output is closed.
pub async fn run(
    cluster: &mut ClusterClient,
    node: Option<Address>,
    begin: ScrubBegin,
) -> Result<Exit, CliError> {
    let nodes = match node {
        Some(node) => BTreeSet::from([node]),
        None => {
            let status = cluster.client.cluster().await?;
            status.nodes.into_iter().map(|node| node.address).collect()
        }
    };
    let timeout = cluster.options.timeout;

    // All at once: each node reads its own disk, so none slows another down.
    let begun = nodes
        .into_iter()
        .map(|node| Scrubbed::begin(node, timeout, begin));
    let mut scrubbed = join_all(begun).await;
    tokio::select! {
        () = follow(&mut scrubbed) => {}
        interrupted = tokio::signal::ctrl_c() => {
            drop(interrupted);
            print_error_line("the scrubs go on; to follow them: quorate cluster scrub --watch");
            return Ok(Exit::Interrupted);
        }
    }

    let states = || scrubbed.iter().map(|node| (&node.node, &node.state));
    for (node, state) in states() {
        if let ScrubState::Lost(reason) = state {
            print_error(&format!("{node}: {reason}"));
        }
    }
    print(&states().filter_map(result).collect::<String>())?;
    conclude(states().map(|(_, state)| state))
}

/// Waits until none of them runs any more.
async fn follow(nodes: &mut [Scrubbed]) {
    let mut line = StatusLine::new(io::stderr().is_terminal());
    while nodes.iter().any(Scrubbed::runs) {
        let known = nodes.iter().filter_map(|node| match &node.state {
            ScrubState::Known(status) => Some(status),
            ScrubState::Lost(_) => None,
        });
        line.show(&progress(known));
        sleep(LOOK_INTERVAL).await;
        join_all(nodes.iter_mut().map(Scrubbed::look)).await;
    }
    line.clear();
}

/// Returns how far scrubs are, all together.
fn progress<'a>(scrubs: impl Iterator<Item = &'a ScrubStatus>) -> String {
    let (mut read, mut total, mut rate, mut running, mut damaged) = (0, 0, 0, 0, 0);
    for scrub in scrubs {
        // The bytes to read were counted at the beginning, and are written to meanwhile.
        let its_total = match scrub.is_running {
            true => scrub.bytes_total.max(scrub.bytes_read),
            false => scrub.bytes_read,
        };
        read += scrub.bytes_read;
        total += its_total;
        damaged += scrub.damaged;
        if scrub.is_running {
            running += 1;
            rate += scrub.bytes_read.saturating_mul(1000) / scrub.elapsed_ms.max(1);
        }
    }
    format!(
        "{} {} of about {}, {}/s, {} to go, {damaged} damaged",
        bar(read, total),
        bytes(read),
        bytes(total),
        bytes(rate),
        count(running, "node")
    )
}

/// Returns what the scrub of a node has shown, a line for each thing that was damaged.
fn result((node, state): (&Address, &ScrubState)) -> Option<String> {
    let ScrubState::Known(scrub) = state else {
        return None;
    };
    if scrub.number == 0 {
        return Some(format!("{node}: not scrubbed since its start\n"));
    }
    let end = match (scrub.was_broken_off, scrub.damaged) {
        (true, _) => "broken off".to_owned(),
        (false, 0) => "nothing is damaged".to_owned(),
        (false, damaged) => format!("{damaged} damaged, {} of these mended", scrub.mended),
    };
    let mut text = format!(
        "{node}: {} read in {} s, {end}\n",
        bytes(scrub.bytes_read),
        scrub.elapsed_ms / 1000
    );
    for damage in &scrub.damages {
        let mended = match &damage.not_mended {
            None => "mended".to_owned(),
            Some(reason) => format!("not mended: {reason}"),
        };
        text.push_str(&format!("  {}: {} ({mended})\n", damage.kind, damage.what));
    }
    let more = scrub.damaged.saturating_sub(scrub.damages.len() as u64);
    if more > 0 {
        text.push_str(&format!("  and {more} more: see the log of the node\n"));
    }
    Some(text)
}

/// Returns the outcome of all nodes: damage weighs more than that something is not known.
fn conclude<'a>(states: impl Iterator<Item = &'a ScrubState>) -> Result<Exit, CliError> {
    let mut unknown = 0;
    for state in states {
        match state {
            ScrubState::Known(scrub) if scrub.damaged > 0 => return Ok(Exit::Damaged),
            ScrubState::Known(scrub) if !scrub.was_broken_off => {}
            ScrubState::Known(_) | ScrubState::Lost(_) => unknown += 1,
        }
    }
    if unknown == 0 {
        return Ok(Exit::Done);
    }
    let reason = format!("it is not known how {} ended", count(unknown, "scrub"));
    Err(CliError::from(Failure::Unavailable {
        reason,
        retry_after_ms: 0,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::protocol::ScrubDamage;

    fn scrub() -> ScrubStatus {
        ScrubStatus {
            number: 2,
            bytes_read: 3 << 20,
            bytes_total: 4 << 20,
            elapsed_ms: 1500,
            ..ScrubStatus::default()
        }
    }

    fn damaged() -> ScrubStatus {
        let damage = |what: &str, not_mended: Option<&str>| ScrubDamage {
            kind: "tree".into(),
            what: what.into(),
            not_mended: not_mended.map(str::to_owned),
        };
        ScrubStatus {
            damaged: 3,
            mended: 1,
            damages: vec![
                damage("that of g1-r1", None),
                damage("that of g2-r4", Some("no")),
            ],
            ..scrub()
        }
    }

    #[test]
    fn how_far_they_are_is_shown_of_all_nodes_together() {
        let running = ScrubStatus {
            is_running: true,
            ..scrub()
        };
        let all = [running, damaged()];
        assert_eq!(
            progress(all.iter()),
            "[#################---] 6.0 MiB of about 7.0 MiB, 2.0 MiB/s, 1 node to go, 3 damaged"
        );
        assert_eq!(
            progress([].iter()),
            "[--------------------] 0 B of about 0 B, 0 B/s, 0 nodes to go, 0 damaged"
        );
    }

    #[test]
    fn what_was_found_is_told_and_decides_how_the_command_ends() {
        let node: Address = "a:1".parse().expect("an address");
        let told = |status: &ScrubStatus| result((&node, &ScrubState::Known(status.clone())));
        assert_eq!(
            told(&scrub()).expect("told"),
            "a:1: 3.0 MiB read in 1 s, nothing is damaged\n"
        );
        assert_eq!(
            told(&damaged()).expect("told"),
            "a:1: 3.0 MiB read in 1 s, 3 damaged, 1 of these mended\n  tree: that of g1-r1 \
             (mended)\n  tree: that of g2-r4 (not mended: no)\n  and 1 more: see the log of the \
             node\n"
        );
        let none = ScrubStatus::default();
        assert_eq!(
            told(&none).expect("told"),
            "a:1: not scrubbed since its start\n"
        );

        let broken_off = ScrubStatus {
            was_broken_off: true,
            ..scrub()
        };
        let lost = || ScrubState::Lost("no answer".into());
        let ends = |states: &[ScrubState]| conclude(states.iter());
        let known = ScrubState::Known;
        assert_eq!(ends(&[known(scrub()), known(none)]).ok(), Some(Exit::Done));
        assert_eq!(ends(&[lost(), known(damaged())]).ok(), Some(Exit::Damaged));
        assert!(ends(&[known(scrub()), lost()]).is_err());
        assert!(ends(&[known(broken_off)]).is_err());
    }
}
