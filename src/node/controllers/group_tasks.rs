//! [`GroupTasks`]: what a node does for the groups that it leads, one task at a time for each
//! group.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::node::context::NodeContext;
use crate::sm::cluster::view::View;
use crate::supervisor;
use crate::telemetry::rarely;
use crate::types::GroupId;

/// The tasks that run, and when to look for more.
pub struct GroupTasks {
    views: watch::Receiver<Arc<View>>,
    tick: Duration,
    running: JoinSet<()>,
    busy: HashMap<Id, GroupId>,
}

impl GroupTasks {
    /// Makes a set without tasks. While nothing changes, a round is made every `tick`.
    pub fn new(context: &NodeContext, tick: Duration) -> Self {
        Self {
            views: context.views().subscribe(),
            tick,
            running: JoinSet::new(),
            busy: HashMap::new(),
        }
    }

    /// Waits until there may be something to do: a task has ended, the view has changed, or a tick
    /// has passed. Returns false if `shutdown` came first, and ends the tasks then.
    pub async fn wait_until_due(&mut self, shutdown: &CancellationToken) -> bool {
        supervisor::beat();
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {
                self.running.shutdown().await;
                return false;
            }
            Some(ended) = self.running.join_next_with_id() => self.note_end(ended),
            Ok(()) = self.views.changed() => {}
            () = tokio::time::sleep(self.tick) => {}
        }
        while let Some(ended) = self.running.try_join_next_with_id() {
            self.note_end(ended);
        }
        true
    }

    /// Returns true while a task for the group runs.
    pub fn is_busy(&self, group: GroupId) -> bool {
        self.busy.values().any(|busy| *busy == group)
    }

    /// Starts the task of a group that has none.
    pub fn begin(&mut self, group: GroupId, task: impl Future<Output = ()> + Send + 'static) {
        assert!(
            !self.is_busy(group),
            "group {group} has a task: two would take steps side by side"
        );
        let id = self.running.spawn(task).id();
        self.busy.insert(id, group);
    }

    /// Forgets a task that has ended, also by a panic: it kept nothing in memory that another could
    /// not find out, so it is begun again with the next look, and a view change that meets it at
    /// every node ends none of them.
    fn note_end(&mut self, ended: Result<(Id, ()), JoinError>) {
        let id = ended
            .as_ref()
            .map_or_else(|error| error.id(), |(id, ())| *id);
        let group = self.busy.remove(&id);
        if let Err(error) = ended
            && let Ok(panic) = error.try_into_panic()
        {
            let group = group.map_or_else(String::new, |group| format!(" of group {group}"));
            rarely!(
                error,
                "a step{group} panicked, and is taken again: {}",
                supervisor::message(&*panic)
            );
        }
    }
}
