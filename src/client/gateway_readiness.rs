//! [`GatewayReadiness`]: says whether a gateway should be given requests.
//!
//! [`GatewayReadiness::run`] looks at the cluster every so often: it asks a member for the status
//! (each time another, which keeps the map and the list of members fresh, so that a gateway
//! outlives every node that it was started with) and sees whether the leaders can be reached from
//! here. Asking for the verdict costs nothing; it is as old as the last look.

use parking_lot::RwLock;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::remote::RemoteStore;
use crate::api::protocol::{ClusterStatus, ShardStatus};
use crate::api::store::Store;
use crate::telemetry::Rarely;
use crate::types::NodeId;

/// Between two looks. Every request that fails has the map asked for besides.
const PAUSE: Duration = Duration::from_secs(2);
/// Between two looks while something is wrong: an election takes about as long.
const PAUSE_IN_TROUBLE: Duration = Duration::from_millis(300);
/// Time that a leader may take to answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// A verdict older than this is worth nothing: the looks take too long.
const VERDICT_AGE_MAX: Duration = Duration::from_secs(10);

/// A reason why requests had better go elsewhere for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// Stable, for scripts: `starting`, `no-leader`, `unreachable`.
    pub code: &'static str,
    pub reason: String,
}

/// Result of one check of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterCheck {
    pub at: Instant,
    pub trouble: Option<Trouble>,
    pub nodes: usize,
    pub shards: usize,
    pub map_version: u64,
}

#[derive(Debug)]
pub struct GatewayReadiness {
    store: Arc<RemoteStore>,
    last: RwLock<Option<ClusterCheck>>,
    /// Keeps each kind of trouble from being logged with every check: its reason may be another
    /// each time.
    said: [(&'static str, Rarely); CODES.len()],
    /// Trouble was said, and not yet that it is over.
    is_trouble_said: AtomicBool,
}

/// The codes of trouble that looks find.
const CODES: [&str; 2] = ["no-leader", "unreachable"];

/// A line in the log about a check.
#[derive(Debug, PartialEq, Eq)]
enum ReadinessMessage {
    /// With how often it was left out.
    Trouble(String, u64),
    Ready,
}

impl GatewayReadiness {
    pub fn new(store: Arc<RemoteStore>) -> Self {
        let said = CODES.map(|code| (code, Rarely::new()));
        Self {
            store,
            last: RwLock::default(),
            said,
            is_trouble_said: AtomicBool::new(false),
        }
    }

    /// Returns the result of the last check; None until the first is over.
    pub fn last(&self) -> Option<ClusterCheck> {
        self.last.read().clone()
    }

    /// # Errors
    ///
    /// Says why not every request can be expected to be answered.
    pub fn ready(&self) -> Result<(), Trouble> {
        match self.last() {
            None => Err(Trouble {
                code: "starting",
                reason: "no member has answered yet".into(),
            }),
            Some(ClusterCheck {
                trouble: Some(trouble),
                ..
            }) => Err(trouble),
            Some(look) if look.at.elapsed() > VERDICT_AGE_MAX => Err(Trouble {
                code: "unreachable",
                reason: "the members of the cluster answer too slowly".into(),
            }),
            Some(_) => Ok(()),
        }
    }

    /// Looks, again and again, until it is told to stop.
    pub async fn run(&self, shutdown: &CancellationToken) {
        let looks = async {
            loop {
                let look = self.look().await;
                let pause = if look.trouble.is_none() {
                    PAUSE
                } else {
                    PAUSE_IN_TROUBLE
                };
                self.note(look);
                sleep(pause).await;
            }
        };
        shutdown.run_until_cancelled(looks).await;
    }

    async fn look(&self) -> ClusterCheck {
        let status = match self.store.status().await {
            Ok(status) => status,
            Err(failure) => {
                let trouble = Trouble {
                    code: "unreachable",
                    reason: format!("no member of the cluster can tell: {failure}"),
                };

                // The counts of the last look stay: a gauge at 0 would look like an empty cluster.
                let before = self.last();
                let (nodes, shards, map_version) = before.map_or((0, 0, 0), |look| {
                    (look.nodes, look.shards, look.map_version)
                });
                return ClusterCheck {
                    at: Instant::now(),
                    trouble: Some(trouble),
                    nodes,
                    shards,
                    map_version,
                };
            }
        };

        // Members may reach a leader that this gateway does not, so each is asked from here.
        let leaders: BTreeSet<NodeId> = owners(&status).filter_map(|shard| shard.leader).collect();
        let probed = leaders.into_iter().map(|leader| async move {
            let answers = self.store.access().answers(leader, PROBE_TIMEOUT).await;
            (leader, answers)
        });
        let silent = join_all(probed)
            .await
            .into_iter()
            .filter(|(_, answers)| !answers)
            .map(|(leader, _)| leader)
            .collect();
        ClusterCheck {
            at: Instant::now(),
            trouble: judge(&status, &silent),
            nodes: status.nodes.len(),
            shards: owners(&status).count(),
            map_version: status.version.0,
        }
    }

    /// Keeps it, and says what is worth a line.
    fn note(&self, look: ClusterCheck) {
        match self.line(&look) {
            Some(ReadinessMessage::Trouble(reason, left_out)) => {
                tracing::warn!(left_out, "not ready: {reason}")
            }
            Some(ReadinessMessage::Ready) => {
                tracing::info!(nodes = look.nodes, shards = look.shards, "ready")
            }
            None => {}
        }
        *self.last.write() = Some(look);
    }

    /// Returns what to say of a look: of each kind of trouble at first, and then once a minute.
    fn line(&self, look: &ClusterCheck) -> Option<ReadinessMessage> {
        let Some(trouble) = &look.trouble else {
            // "Ready" is said at the start and after a trouble that was said, or the log would tell
            // of an end without a beginning.
            let was_said = self.is_trouble_said.swap(false, Ordering::Relaxed);
            return (was_said || self.last().is_none()).then_some(ReadinessMessage::Ready);
        };
        let (_, said) = self.said.iter().find(|(code, _)| *code == trouble.code)?;
        let left_out = said.due()?;
        self.is_trouble_said.store(true, Ordering::Relaxed);
        Some(ReadinessMessage::Trouble(trouble.reason.clone(), left_out))
    }
}

/// Returns the shards that own keys.
fn owners(status: &ClusterStatus) -> impl Iterator<Item = &ShardStatus> {
    status
        .shards
        .iter()
        .filter(|shard| !shard.id.is_meta() && shard.slots > 0)
}

/// Returns what is wrong with a cluster of which these nodes do not answer from here.
fn judge(status: &ClusterStatus, silent: &BTreeSet<NodeId>) -> Option<Trouble> {
    owners(status).find_map(|shard| match shard.leader {
        None => Some(Trouble {
            code: "no-leader",
            reason: format!("shard {:#} has no leader", shard.id),
        }),
        Some(leader) if silent.contains(&leader) => {
            let node = status
                .nodes
                .iter()
                .find(|node| node.id == leader)
                .map(|node| format!(" ({})", node.public_address));
            let reason = format!(
                "shard {:#} is led by {leader}{}, which does not answer here",
                shard.id,
                node.unwrap_or_default()
            );
            Some(Trouble {
                code: "unreachable",
                reason,
            })
        }
        Some(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::{answer, bind, json, nobody, serve, status};
    use std::sync::atomic::AtomicU64;

    #[tokio::test]
    async fn a_cluster_is_ready_when_every_leader_can_be_reached() {
        let (address, listener) = bind().await;
        let nodes = [address.clone(), nobody().await];
        // The leader, by the map's version: nobody, the dead node, the live one.
        let leader = Arc::new(AtomicU64::new(0));
        let told = Arc::clone(&leader);
        serve(listener, move |request| {
            let led = told.load(Ordering::Relaxed);
            let status = status(led, [None, Some(1), Some(0)][led as usize], &nodes);
            async move {
                Some(if request.uri().path() == "/healthz" {
                    answer(200, "ok")
                } else {
                    json(&status)
                })
            }
        });
        let store = Arc::new(RemoteStore::connect(vec![address]).expect("a client"));
        let lookout = GatewayReadiness::new(store);
        assert_eq!(
            lookout.ready().expect_err("it has not looked").code,
            "starting"
        );
        for (led, code) in [(0, Some("no-leader")), (1, Some("unreachable")), (2, None)] {
            leader.store(led, Ordering::Relaxed);
            lookout.note(lookout.look().await);
            assert_eq!(lookout.ready().err().map(|trouble| trouble.code), code);
            assert_eq!(
                lookout
                    .last()
                    .map(|look| (look.nodes, look.shards, look.map_version)),
                Some((2, 1, led))
            );
        }
    }

    #[tokio::test]
    async fn nodes_of_another_cluster_are_not_believed() {
        let (address, listener) = bind().await;
        let asked = Arc::new(AtomicU64::new(0));
        let nodes = [address.clone()];
        serve(listener, move |request| {
            let mut status = status(1, Some(0), &nodes);
            if request.uri().path() == "/v1/cluster" && asked.fetch_add(1, Ordering::Relaxed) > 0 {
                status.cluster = crate::types::ClusterId(2);
            }
            async move { Some(json(&status)) }
        });
        let lookout = GatewayReadiness::new(Arc::new(
            RemoteStore::connect(vec![address]).expect("a client"),
        ));
        lookout.note(lookout.look().await);
        assert_eq!(lookout.ready(), Ok(()));
        lookout.note(lookout.look().await);
        let trouble = lookout.ready().expect_err("it is another cluster");
        assert!(trouble.reason.contains("00000002"), "{trouble:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn trouble_that_stays_is_said_once_however_its_reason_reads() {
        let lookout = GatewayReadiness::new(Arc::new(
            RemoteStore::connect(Vec::new()).expect("a client"),
        ));
        let look = |trouble: Option<(&'static str, String)>| {
            let trouble = trouble.map(|(code, reason)| Trouble { code, reason });
            ClusterCheck {
                at: Instant::now(),
                trouble,
                nodes: 1,
                shards: 1,
                map_version: 1,
            }
        };
        let mut lines = Vec::new();
        for member in 0..100 {
            let look = look(Some((
                "unreachable",
                format!("member {member} does not answer"),
            )));
            lines.extend(lookout.line(&look));
            lookout.note(look);
        }
        assert_eq!(
            lines,
            [ReadinessMessage::Trouble(
                "member 0 does not answer".to_owned(),
                0
            )]
        );
        assert!(
            lookout
                .line(&look(Some(("no-leader", String::new()))))
                .is_some(),
            "that is another"
        );
        assert_eq!(lookout.line(&look(None)), Some(ReadinessMessage::Ready));
        assert_eq!(
            lookout.line(&look(Some(("unreachable", String::new())))),
            None,
            "it comes and goes"
        );
        lookout.note(look(None));
        assert_eq!(lookout.line(&look(None)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_verdict_is_worth_nothing() {
        let lookout = GatewayReadiness::new(Arc::new(
            RemoteStore::connect(Vec::new()).expect("a client"),
        ));
        lookout.note(ClusterCheck {
            at: Instant::now(),
            trouble: None,
            nodes: 1,
            shards: 1,
            map_version: 1,
        });
        assert_eq!(lookout.ready(), Ok(()));
        tokio::time::advance(VERDICT_AGE_MAX + Duration::from_millis(1)).await;
        assert!(lookout.ready().is_err());
    }
}
