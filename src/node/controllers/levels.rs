//! Raises the level of the cluster, where the meta group is led: once every node of the view has
//! said for a while that its program knows a later one, and none of them holds it.
//!
//! Until then each node can go back to its older program. A hold is kept in data directories and
//! not by the meta group, because at level 0 there may be programs that can't read such an entry;
//! one node that holds is enough. A new leader begins to count anew.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::node::context::{NodeContext, read_applied_view};
use crate::node::pause;
use crate::raft::Replica;
use crate::sm::cluster::meta;
use crate::sm::cluster::view::{NodeSpec, View};
use crate::sm::level::TooOld;
use crate::types::{GroupId, MapVersion, NodeId};

/// Between two rounds of asking; more often where the level is raised sooner.
const TICK_MAX: Duration = Duration::from_secs(5);
const TICK_MIN: Duration = Duration::from_millis(50);
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// Nodes that are asked at a time.
const ASKED_AT_ONCE: usize = 16;
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Watches which levels the nodes speak.
pub struct Levels {
    context: Arc<NodeContext>,
    /// The level that this program speaks: it can raise that of the cluster no further.
    speaks: u16,
    raise_after: Duration,
    reports: LevelReports,
}

/// The level that each node speaks, and since when it has said so without a gap.
#[derive(Debug, Default)]
struct LevelReports(BTreeMap<NodeId, LevelReport>);

#[derive(Debug, Clone, Copy)]
struct LevelReport {
    speaks: u16,
    holds: bool,
    since: Instant,
}

impl LevelReports {
    /// Takes what a round of asking brought; a node that did not answer is missing in it.
    fn take(&mut self, now: Instant, answers: BTreeMap<NodeId, (u16, bool)>) {
        // One that did not answer may have been started with another program meanwhile.
        self.0.retain(|node, _| answers.contains_key(node));
        for (node, (speaks, holds)) in answers {
            let said = self.0.entry(node).or_insert(LevelReport {
                speaks,
                holds,
                since: now,
            });
            let since = if said.speaks == speaks {
                said.since
            } else {
                now
            };
            *said = LevelReport {
                speaks,
                holds,
                since,
            };
        }
    }

    /// Returns the level to which that of the view can be raised.
    fn reached(&self, now: Instant, view: &View, after: Duration) -> Option<u16> {
        let said = view
            .nodes
            .keys()
            .map(|node| self.0.get(node))
            .collect::<Option<Vec<_>>>()?;
        let reached = said
            .iter()
            .map(|said| said.speaks)
            .min()
            .filter(|level| *level > view.level)?;
        let is_settled = said
            .iter()
            .all(|said| !said.holds && now.duration_since(said.since) >= after);
        is_settled.then_some(reached)
    }
}

impl Levels {
    pub fn new(context: Arc<NodeContext>, speaks: u16, raise_after: Duration) -> Self {
        Self {
            context,
            speaks,
            raise_after,
            reports: LevelReports::default(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        let tick = (self.raise_after / 4).clamp(TICK_MIN, TICK_MAX);
        while pause::waited(shutdown, tick).await {
            let meta = self
                .context
                .registry
                .get(GroupId::META)
                .filter(|meta| meta.leads());
            let Some(meta) = meta.filter(|_| self.context.view().level < self.speaks) else {
                // Whoever leads next asks for the whole time again: it can't know who was away
                // before.
                self.reports.0.clear();
                continue;
            };
            let Ok(view) = read_applied_view(&meta) else {
                continue;
            };
            let answers = self.ask(&view).await;
            let now = Instant::now();
            self.reports.take(now, answers);
            if let Some(level) = self.reports.reached(now, &view, self.raise_after) {
                self.raise(&meta, level.min(self.speaks), view.version)
                    .await;
            }
        }
    }

    /// Asks every node of the view what it speaks, and whether it holds the level.
    async fn ask(&self, view: &View) -> BTreeMap<NodeId, (u16, bool)> {
        let nodes: Vec<(NodeId, NodeSpec)> = view
            .nodes
            .iter()
            .map(|(id, node)| (*id, node.clone()))
            .collect();
        let mut answers = BTreeMap::new();
        for some in nodes.chunks(ASKED_AT_ONCE) {
            let asked = some.iter().map(|(id, node)| async move {
                let identity = self
                    .context
                    .peers
                    .identity_of(node, ASK_TIMEOUT)
                    .await
                    .ok()?;
                Some((*id, (identity.speaks, identity.holds_level)))
            });
            answers.extend(join_all(asked).await.into_iter().flatten());
        }
        answers
    }

    async fn raise(&self, meta: &Replica, level: u16, over: MapVersion) {
        let command = meta::MetaCommand::RaiseLevel { level, over };
        match meta
            .propose_meta(command, Instant::now() + PROPOSE_TIMEOUT)
            .await
        {
            Ok(meta::MetaOutcome::Done | meta::MetaOutcome::MoveOpened { .. }) => tracing::info!(
                "the cluster is at level {level} now: every node knows it. An older program can't \
                take part any more"
            ),
            // The view has changed meanwhile: all are asked again.
            Ok(meta::MetaOutcome::Rejected(rejection)) => {
                tracing::debug!("the level was not raised: {rejection:?}")
            }
            Err(error) => tracing::debug!("the level was not raised: {error}"),
        }
    }
}

/// Resolves when the view is of a level that this node does not speak.
pub async fn outgrown(mut views: watch::Receiver<Arc<View>>, speaks: u16) -> TooOld {
    let outgrown = views
        .wait_for(|view| view.level > speaks)
        .await
        .map(|view| TooOld::new(view.level, speaks));
    match outgrown {
        Ok(too_old) => too_old,
        // The node is stopping.
        Err(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::testing::view_of;

    const AFTER: Duration = Duration::from_secs(60);

    #[test]
    fn the_level_is_raised_once_every_node_has_spoken_it_for_a_while_without_a_gap() {
        let (view, start) = (view_of(2), Instant::now());
        let mut reports = LevelReports::default();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut round = |seconds: u64, said: &[(u64, u16, bool)]| {
            reports.take(
                at(seconds),
                said.iter()
                    .map(|(node, speaks, holds)| (NodeId(*node), (*speaks, *holds)))
                    .collect(),
            );
            reports.reached(at(seconds), &view, AFTER)
        };
        assert_eq!(
            round(0, &[(1, 2, false), (2, 0, false)]),
            None,
            "one is old"
        );
        assert_eq!(
            round(100, &[(1, 2, false), (2, 1, false)]),
            None,
            "it was old a moment ago"
        );
        assert_eq!(round(159, &[(1, 2, false), (2, 1, false)]), None);
        assert_eq!(
            round(160, &[(1, 2, false), (2, 1, false)]),
            Some(1),
            "the least of them"
        );
        assert_eq!(
            round(170, &[(1, 2, false), (2, 1, true)]),
            None,
            "it is held"
        );
        assert_eq!(round(180, &[(1, 2, false), (2, 1, false)]), Some(1));
        assert_eq!(round(190, &[(1, 2, false)]), None, "one is silent");
        assert_eq!(
            round(200, &[(1, 2, false), (2, 1, false)]),
            None,
            "it was silent a moment ago"
        );
        assert_eq!(round(260, &[(1, 2, false), (2, 1, false)]), Some(1));
        assert_eq!(
            round(270, &[(1, 2, false), (2, 0, false)]),
            None,
            "it went back"
        );
    }

    #[test]
    fn a_level_that_is_reached_is_not_raised_again() {
        let (view, now) = (
            View {
                level: 1,
                ..view_of(2)
            },
            Instant::now(),
        );
        let mut reports = LevelReports::default();
        reports.take(
            now,
            BTreeMap::from([(NodeId(1), (1, false)), (NodeId(2), (1, false))]),
        );
        assert_eq!(reports.reached(now, &view, Duration::ZERO), None);
    }
}
