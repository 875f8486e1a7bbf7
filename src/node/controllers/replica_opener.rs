//! [`ReplicaOpener`]: opens the replicas that the view gives this node; one that could not be
//! opened, or has stopped, again after a pause. `replica_failures` knows which those are, and how
//! long each rests.
//!
//! What has failed before is opened beside everything else, since it may read a whole map each
//! time.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};

use super::view_replicas::{may_create, replicas_of};
use crate::node::context::NodeContext;
use crate::node::replica_failures::ReplicaFailures;
use crate::raft::{OpenError, Registry};
use crate::sm::cluster::view::{self, View};
use crate::sm::recovery::FailureCause;
use crate::storage::ReplicaKey;

/// Time that a replica that has failed may take to end, before it is opened again.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

/// Opens replicas.
#[derive(Default)]
pub struct ReplicaOpener {
    tasks: ReplicaTasks<Result<(), OpenError>>,
}

/// Tasks about replicas, one at most for each.
pub struct ReplicaTasks<T> {
    tasks: JoinSet<T>,
    keys: HashMap<Id, ReplicaKey>,
}

/// As what a replica is opened.
#[derive(Debug, Clone, Copy)]
enum OpenAs {
    Map {
        may_create: bool,
    },
    Witness {
        may_create: bool,
    },
    /// As what it was before: the view says it only of those that stay.
    Before,
}

impl OpenAs {
    fn of(group: &view::GroupSpec, key: ReplicaKey) -> Self {
        // A member's first replica of the meta group was opened before it was one.
        let is_first_of_meta = key.group.is_meta() && group.creation.contains_key(&key.replica);
        let may_create = may_create(group, key.replica) && !is_first_of_meta;
        if group.is_witness(key.replica) {
            OpenAs::Witness { may_create }
        } else if group.replicas.contains_key(&key.replica) {
            OpenAs::Map { may_create }
        } else {
            OpenAs::Before
        }
    }

    async fn open(self, registry: &Arc<Registry>, key: ReplicaKey) -> Result<(), OpenError> {
        match self {
            OpenAs::Map { may_create } => registry.open_replica(key, may_create).await.map(|_| ()),
            OpenAs::Witness { may_create } => {
                registry.open_witness(key, may_create).await.map(|_| ())
            }
            OpenAs::Before => registry.reopen(key).await,
        }
    }
}

/// State in which a replica of this node is found.
enum ReplicaPresence {
    Runs,
    /// It is open, and applies nothing more.
    Stopped(String),
    Absent,
    /// Another one of its group is open: it goes first.
    InTheWay,
}

impl ReplicaOpener {
    /// Opens what is due, but for replicas that are being `wiped`. Returns whether there was
    /// nothing to do.
    pub async fn open(
        &mut self,
        context: &NodeContext,
        view: &View,
        is_wiped: impl Fn(ReplicaKey) -> bool,
    ) -> bool {
        let failures = &context.failures;
        while let Some((key, ended)) = self.tasks.try_ended() {
            let opened = ended.unwrap_or_else(|error| Err(OpenError::Raft(error.to_string())));
            note(context, key, opened);
        }
        let wanted: BTreeSet<ReplicaKey> = replicas_of(view, context.node).collect();
        failures.retain(&wanted);

        let mut is_idle = true;
        for key in replicas_of(view, context.node) {
            if self.tasks.has(key) || is_wiped(key) || !is_to_be_opened(context, failures, key) {
                continue;
            }
            let Some(group) = view.groups.get(&key.group) else {
                continue;
            };
            let kind = OpenAs::of(group, key);
            is_idle = false;
            if !failures.has_failed_before(key) {
                note(context, key, kind.open(&context.registry, key).await);
                continue;
            }

            // What has failed once may take long to close and to open: no other replica waits for
            // it.
            let registry = Arc::clone(&context.registry);
            self.tasks.begin(key, async move {
                let closed = tokio::time::timeout(CLOSE_TIMEOUT, registry.close_failed(key)).await;
                closed
                    .map_err(|_| OpenError::Raft("what is left of it does not end".to_owned()))?;
                kind.open(&registry, key).await
            });
        }
        failures.remind();
        is_idle
    }

    /// Returns whether that replica is being opened.
    pub fn are_busy_with(&self, key: ReplicaKey) -> bool {
        self.tasks.has(key)
    }

    /// Waits for those that are being opened.
    pub async fn end(&mut self) {
        self.tasks.end().await;
    }
}

/// Notes how a replica is. Returns whether it is to be opened now.
fn is_to_be_opened(context: &NodeContext, failures: &ReplicaFailures, key: ReplicaKey) -> bool {
    match look(&context.registry, key) {
        ReplicaPresence::Runs => {
            failures.runs(key);
            false
        }
        ReplicaPresence::InTheWay => false,
        ReplicaPresence::Stopped(reason) if failures.of(key).is_none() => {
            // A database that takes no writes any more stops all replicas, and only a new process
            // mends that.
            let is_given_up = context.registry.maps_given_up().is_some();
            let cause = if is_given_up {
                FailureCause::Database
            } else {
                FailureCause::Other
            };
            failures.failed(key, cause, format!("it has stopped: {reason}"));
            false
        }
        ReplicaPresence::Stopped(_) | ReplicaPresence::Absent => failures.is_due(key),
    }
}

fn look(registry: &Registry, key: ReplicaKey) -> ReplicaPresence {
    let map = registry
        .get(key.group)
        .map(|group| (group.key(), group.failure()));
    let witness = || {
        let witness = registry.witness(key.group)?;
        Some((witness.key(), witness.status().failed))
    };
    match map.or_else(witness) {
        None => ReplicaPresence::Absent,
        Some((open, _)) if open != key => ReplicaPresence::InTheWay,
        Some((_, None)) => ReplicaPresence::Runs,
        Some((_, Some(reason))) => ReplicaPresence::Stopped(reason),
    }
}

/// Notes what became of opening a replica.
fn note(context: &NodeContext, key: ReplicaKey, opened: Result<(), OpenError>) {
    let error = match opened {
        Ok(()) | Err(OpenError::ShuttingDown | OpenError::AlreadyOpen(_)) => return,
        Err(error) => error,
    };

    // Whatever is said of this replica: with the database given up, that is the cause.
    let cause = match error.cause() {
        FailureCause::DiskFull | FailureCause::Other
            if context.registry.maps_given_up().is_some() =>
        {
            FailureCause::Database
        }
        cause => cause,
    };
    context
        .failures
        .failed(key, cause, format!("it cannot be opened: {error}"));
}

impl<T> Default for ReplicaTasks<T> {
    fn default() -> Self {
        Self {
            tasks: JoinSet::new(),
            keys: HashMap::new(),
        }
    }
}

impl<T: Send + 'static> ReplicaTasks<T> {
    /// Starts the task of a replica that has none.
    pub fn begin(&mut self, key: ReplicaKey, task: impl Future<Output = T> + Send + 'static) {
        assert!(
            !self.has(key),
            "replica {key} has a task: it is opened or wiped once at a time"
        );
        let id = self.tasks.spawn(task).id();
        self.keys.insert(id, key);
    }

    pub fn has(&self, key: ReplicaKey) -> bool {
        self.keys.values().any(|busy| *busy == key)
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Returns one that has ended, also by a panic.
    pub fn try_ended(&mut self) -> Option<(ReplicaKey, Result<T, JoinError>)> {
        let ended = self.tasks.try_join_next_with_id()?;
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let key = self
            .keys
            .remove(&id)
            .expect("each task is noted with its replica");
        Some((key, ended.map(|(_, result)| result)))
    }

    pub async fn end(&mut self) {
        while self.tasks.join_next().await.is_some() {}
        self.keys.clear();
    }
}
