//! [`ChangeWaiters`]: clients that wait for the end of a change of the view, and the polling that
//! they share.
//!
//! A wait is long and costs its client nothing, so the number of waiters is bounded: one more is
//! refused before anything is done. They do not ask the leader of the meta group one by one. A node
//! hears of the end by itself (`Store::await_change`); the waiter that then looks, or looks because
//! nothing was heard for a while, shares the result with all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::readiness::Readiness;
use crate::api::store::{Failure, Options, Store};
use crate::api::view_change::ChangeInProgress;
use crate::types::PlanEpoch;

/// Between two looks at a change: small changes are done in a moment, large ones take minutes.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(25);
const LOOK_INTERVAL_MAX: Duration = Duration::from_millis(500);
/// Between two looks while a view that is known here says that the change runs: this node may be
/// leaving, and hear nothing more.
const LOOK_ANYWAY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct ChangeWaiters {
    places: Semaphore,
    places_max: usize,
    refused: AtomicU64,
    /// Locked while one of them looks.
    last: Mutex<Option<ObservedChange>>,
}

/// The result of the last look at a change.
#[derive(Debug)]
struct ObservedChange {
    began: Instant,
    id: PlanEpoch,
    found: ChangeResult,
}

type ChangeResult = Result<Option<ChangeInProgress>, Failure>;

/// One of those who wait.
#[derive(Debug)]
pub struct WaiterPermit<'a> {
    changes: &'a ChangeWaiters,
    _permit: SemaphorePermit<'a>,
}

impl ChangeWaiters {
    /// Returns one where so many can wait at once.
    pub fn new(places_max: usize) -> Self {
        Self {
            places: Semaphore::new(places_max),
            places_max,
            refused: AtomicU64::new(0),
            last: Mutex::default(),
        }
    }

    /// Takes a place among those who wait. To be had before anything is done that is to be waited
    /// for.
    ///
    /// # Errors
    ///
    /// Fails if all places are taken.
    pub fn acquire(&self) -> Result<WaiterPermit<'_>, Failure> {
        match self.places.try_acquire() {
            Ok(permit) => Ok(WaiterPermit {
                changes: self,
                _permit: permit,
            }),
            Err(_) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                let limit = format!(
                    "{} requests wait for the end of a change of the view already",
                    self.places_max
                );
                Err(Failure::Overloaded {
                    limit,
                    retry_after_ms: 1000,
                })
            }
        }
    }

    /// Returns how many wait.
    pub fn waiting(&self) -> usize {
        self.places_max
            .saturating_sub(self.places.available_permits())
    }

    /// Returns how many found no place.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Returns what a look found that did not begin before `since`.
    pub async fn look(
        &self,
        store: &dyn Store,
        id: PlanEpoch,
        since: Instant,
        options: Options,
    ) -> ChangeResult {
        // Held during the look: of hundreds that wait, one asks, and the others find its answer
        // here.
        let mut last = self.last.lock().await;
        if let Some(look) = last
            .as_ref()
            .filter(|look| look.id == id && look.began >= since)
        {
            return look.found.clone();
        }

        let began = Instant::now();
        let found = store.operation(id, options).await;
        *last = Some(ObservedChange {
            began,
            id,
            found: found.clone(),
        });
        found
    }
}

impl WaiterPermit<'_> {
    /// Waits until the change is over, the time is up or this server stops, and returns what was
    /// last heard of it.
    pub async fn follow(
        &self,
        store: &dyn Store,
        readiness: &dyn Readiness,
        mut change: ChangeInProgress,
        wait: Duration,
        options: Options,
    ) -> ChangeInProgress {
        let deadline = Instant::now() + wait;
        let mut schedule = PollSchedule::new(deadline);

        while !change.is_over()
            && let Some(since) = schedule.next(readiness, store, change.id).await
        {
            // No answer now (an election, a node on its way out) says nothing about the change: it
            // is asked for again.
            let seen = timeout_at(
                deadline,
                self.changes.look(store, change.id, since, options),
            )
            .await;
            change = seen.ok().and_then(|seen| seen.ok()?).unwrap_or(change);
        }
        change
    }
}

/// Decides when to look at a change again.
#[derive(Debug)]
pub struct PollSchedule {
    deadline: Instant,
    interval: Duration,
    looked: Instant,
    was_notified: bool,
}

impl PollSchedule {
    pub fn new(deadline: Instant) -> Self {
        Self {
            deadline,
            interval: LOOK_INTERVAL_MIN,
            looked: Instant::now(),
            was_notified: false,
        }
    }

    /// Waits until it is time for another look, and returns how old one may be that somebody else
    /// has had; none once the time is up or the server stops.
    pub async fn next(
        &mut self,
        readiness: &dyn Readiness,
        store: &dyn Store,
        id: PlanEpoch,
    ) -> Option<Instant> {
        while Instant::now() < self.deadline && !is_stopping(readiness) {
            let began = Instant::now();
            let end = self.deadline.min(began + self.interval);

            // A node hears of the end with the view, so most waits need no question to another
            // node.
            let is_over = store.await_change(id, end - began).await;

            let now = Instant::now();
            let since = match is_over {
                Some(true) => Some(now),
                Some(false) => (now - self.looked >= LOOK_ANYWAY).then(|| now - LOOK_ANYWAY),
                None => Some(now - self.interval / 2),
            };
            if is_over == Some(true) && std::mem::replace(&mut self.was_notified, true) {
                // A look after that could not tell: so it does not help to hurry.
                sleep_until(end).await;
            }
            self.interval = (self.interval * 2).min(LOOK_INTERVAL_MAX);
            if since.is_some() {
                self.looked = now;
                return since;
            }
        }
        None
    }
}

/// Returns true if the server stops: a wait must not hold that up.
fn is_stopping(readiness: &dyn Readiness) -> bool {
    readiness
        .ready()
        .is_err_and(|unready| unready.code == "stopping")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::future::join_all;

    use super::*;
    use crate::api::store::{Consistency, Routing};
    use crate::http::testing::{FakeStore, Site, Switch};
    use crate::http::{App, Limits};

    const WAITERS: usize = 200;

    fn app(store: &Arc<FakeStore>) -> App {
        App::new(
            store.clone(),
            Arc::new(Switch::default()),
            Vec::new(),
            None,
            Limits::default(),
        )
    }

    /// Many clients that wait so long for a change that runs; what they are told.
    async fn follow(app: &App, wait: Duration) -> Vec<ChangeInProgress> {
        let options = Options {
            consistency: Consistency::Linearizable,
            routing: Routing::Proxy,
            timeout: Duration::from_secs(1),
        };
        let running = app
            .store
            .operation(PlanEpoch(2), options)
            .await
            .expect("an answer")
            .expect("a change");
        assert!(!running.is_over());
        let one = || async {
            let place = app.changes.acquire().expect("a place");
            place
                .follow(&*app.store, &*app.readiness, running.clone(), wait, options)
                .await
        };
        join_all((0..WAITERS).map(|_| one())).await
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_wait_look_as_often_as_one() {
        let store = Arc::new(FakeStore::default());
        store.take_time(u64::MAX);
        let app = app(&store);
        let is_over = follow(&app, Duration::from_secs(60)).await;
        assert!(is_over.iter().all(|change| !change.is_over()));
        assert!(
            (100..=150).contains(&store.looks()),
            "{} looks in a minute",
            store.looks()
        );
        assert_eq!(
            app.changes.places.available_permits(),
            app.limits.change_waiters_max,
            "their places are free again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_hears_of_the_end_by_itself_hardly_looks_and_knows_at_once() {
        let store = Arc::new(FakeStore::default());
        store.take_time(u64::MAX);
        store.hear_of_ends(false);
        let app = app(&store);
        let ended_after = Duration::from_secs(10);
        let ending = async {
            tokio::time::sleep(ended_after).await;
            store.take_time(0);
            store.hear_of_ends(true);
        };
        let began = Instant::now();
        let (is_over, ()) = futures::join!(follow(&app, Duration::from_secs(3600)), ending);
        assert!(is_over.iter().all(ChangeInProgress::is_over));
        assert_eq!(began.elapsed(), ended_after);
        assert!(
            store.looks() <= 10,
            "{} looks in ten seconds",
            store.looks()
        );
    }

    #[tokio::test]
    async fn one_more_than_may_wait_is_refused_before_anything_is_done() {
        let site = Site::with(Limits {
            change_waiters_max: 0,
            ..Limits::default()
        })
        .await;
        site.store.take_time(u64::MAX);
        let refused = site
            .put("/v1/cluster/view?wait=1s", r#"{"nodes":["x:1"]}"#)
            .await;
        assert_eq!(
            (refused.verdict(), refused.header("retry-after")),
            ((429, "overloaded".into()), "1")
        );
        let kvs = site.put("/kvs/view-change", r#"{"view":"x:1"}"#).await;
        assert_eq!(kvs.status, 503);
        assert!(
            !site.get("/v1/cluster/view").await.json()["nodes"]
                .to_string()
                .contains("x:1"),
            "nothing was changed"
        );
        assert_eq!(
            site.get("/v1/cluster/operations/2?wait=1s").await.status,
            429
        );
        assert_eq!(site.get("/v1/cluster/operations/2").await.status, 200);
        assert_eq!(site.put("/v1/cluster/view", "{}").await.status, 202);
        site.stop().await;
    }
}
