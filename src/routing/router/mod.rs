//! Routes requests to shards: key → slot → shard by the map, a write split over shards, the
//! pages of a scan merged, counts summed.
//!
//! Generic over [`ShardAccess`], which knows how to reach a shard: a node answers for the shards
//! that it leads and forwards the rest, a remote client calls the leader. What is certainly not
//! done is tried again until the deadline; an unknown write never is, unless it has an idempotency
//! key. What an attempt calls for is decided in `attempt`, apart from doing it.
//!
//! Invariant: an answer that says "certainly nothing happened" is only given when no attempt of
//! that write ended unknown.

mod attempt;
mod count;
mod coverage;
mod get_many;
mod pause;
mod queues;
mod scan;
#[cfg(test)]
mod tests;
mod write;

pub use write::check_operations;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use self::attempt::{Retry, RetryState};
use self::queues::{AwaitedAccess, LeaderQueues};
use crate::api::protocol::{ClusterStatus, ShardBody, ShardReply};
use crate::api::shard_map::ShardMap;
use crate::api::store::{
    Consistency, Failure, GetManyRequest, GetOutcome, MergedPage, Options, Routing, ScanRequest,
    Store, Written,
};
use crate::api::view_change::{ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::budget::{ANSWERS_BYTES_MAX, Budget};
use crate::sm::kv::{Operation, Record, WriteOutcome};
use crate::types::{Address, GroupId, KEY_BYTES_MAX, MapVersion, NodeId, PlanEpoch};

/// Requests that wait for another attempt at once. Past it they fail: a cluster without a quorum
/// must not collect requests for ever.
const WAITING_MAX: usize = 10_000;

/// An attempt with less time than this would hardly end before the deadline, and its outcome not be
/// known.
const ATTEMPT_MIN: Duration = Duration::from_millis(5);

/// Every so many attempts a newer map is waited for in earnest.
const PATIENT_EVERY: u32 = 8;

/// Reaches shards for a router. Write the futures as `async fn`.
pub trait ShardAccess: Send + Sync + 'static {
    /// Returns the newest map that is known.
    fn map(&self) -> Option<Arc<ShardMap>>;

    /// Tries to get a map newer than this one. Returns soon, whether or not there is one; may be
    /// dropped before.
    fn refresh(&self, older_than: MapVersion) -> impl Future<Output = ()> + Send;

    /// Makes one attempt (or a few, of what is certainly not done) at the shard's leader, or for
    /// stale reads at any of its replicas. Answers within `options.timeout`; a future that is
    /// dropped before leaves the outcome unknown.
    fn call(
        &self,
        shard: GroupId,
        body: ShardBody,
        options: Options,
    ) -> impl Future<Output = ShardReply> + Send;

    /// Returns when somebody else leads the shard than before, as far as that is heard of without
    /// asking.
    fn lead_changed(&self, _: GroupId) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Returns whether a client need not be sent elsewhere with a write for this shard, as soon as
    /// that is known.
    ///
    /// # Errors
    ///
    /// Fails as [`ShardAccess::call`] would, if that is known before.
    fn locate(
        &self,
        _shard: GroupId,
        _options: Options,
    ) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }

    /// As [`Store::answers`].
    fn answers(&self) -> Arc<Budget> {
        Budget::new(ANSWERS_BYTES_MAX)
    }

    /// As [`Store::this_node`].
    fn this_node(&self) -> Option<NodeId> {
        None
    }

    /// As [`Store::contact`].
    fn contact(&self, shard: GroupId) -> impl Future<Output = Option<Address>> + Send;

    fn status(&self) -> impl Future<Output = Result<ClusterStatus, Failure>> + Send;

    /// As [`Store::transfer_leader`].
    fn transfer_leader(
        &self,
        shard: GroupId,
        to: Option<Address>,
        options: Options,
    ) -> impl Future<Output = Result<Address, Failure>> + Send;

    /// As [`Store::change_view`].
    fn change_view(
        &self,
        change: ViewChange,
        only_if: Option<PlanEpoch>,
        options: Options,
    ) -> impl Future<Output = Result<ChangeInProgress, ViewChangeFailure>> + Send;

    /// As [`Store::plan_view`].
    fn plan_view(
        &self,
        change: ViewChange,
        options: Options,
    ) -> impl Future<Output = Result<PlannedChange, ViewChangeFailure>> + Send;

    /// As [`Store::operation`].
    fn operation(
        &self,
        id: PlanEpoch,
        options: Options,
    ) -> impl Future<Output = Result<Option<ChangeInProgress>, Failure>> + Send;

    /// As [`Store::await_change`], for who knows no more than what it asks others.
    fn await_change(
        &self,
        _: PlanEpoch,
        at_most: Duration,
    ) -> impl Future<Output = Option<bool>> + Send {
        async move {
            sleep(at_most).await;
            None
        }
    }
}

/// A [`Store`] over shards.
#[derive(Debug)]
pub struct Router<A> {
    access: A,
    waiting: AtomicUsize,
    queues: LeaderQueues,
    jitter: AtomicU64,
}

impl<A: ShardAccess> Router<A> {
    /// Makes a router. `seed` is that of the jitter in the pauses between attempts.
    pub fn new(access: A, seed: u64) -> Self {
        Self {
            access,
            waiting: AtomicUsize::new(0),
            queues: LeaderQueues::default(),
            jitter: AtomicU64::new(seed),
        }
    }

    pub fn access(&self) -> &A {
        &self.access
    }

    /// Makes one attempt at a shard. An answer is news to those who wait for one.
    async fn call(&self, shard: GroupId, body: ShardBody, options: Options) -> ShardReply {
        let writes = !body.is_read();
        let reply = self.access.call(shard, body, options).await;
        if options.consistency == Consistency::Linearizable
            && !matches!(reply, ShardReply::Failed(_))
        {
            // A shard that takes no writes reads, and may say all the same that a slot has moved.
            let is_taken = matches!(
                reply,
                ShardReply::Written(WriteOutcome::Applied(_) | WriteOutcome::Mixed(_))
            );
            self.queues.answered(
                shard,
                if is_taken && writes {
                    AwaitedAccess::Write
                } else {
                    AwaitedAccess::Read
                },
            );
        }
        reply
    }

    async fn get_from_shard(&self, key: Bytes, options: Options) -> Result<GetOutcome, Failure> {
        check_key(&key)?;
        let mut retry_state = RetryState::new(options).repeatable().single_key();

        // The map is read anew for each attempt: the pause may have brought a newer one.
        loop {
            let map = self.access.map();
            let retry = match map.as_deref().map(|map| map.owner_of(&key)) {
                None => Retry::no_map(),
                Some(GroupId::META) => Retry::unowned(),
                Some(shard) => {
                    let body = ShardBody::Get {
                        key: key.clone(),
                        consistency: options.consistency,
                    };
                    let options = retry_state.options_at(&key, map.as_deref());
                    match self.call(shard, body, options).await {
                        ShardReply::Got(found) => return Ok(found),
                        ShardReply::NotOwned { slot } => Retry::not_owned(slot),
                        ShardReply::Failed(failure) => retry_state.classify(shard, failure)?,
                        ShardReply::Written(_)
                        | ShardReply::Page(_)
                        | ShardReply::Counted { .. }
                        | ShardReply::GotMany(_)
                        | ShardReply::Moved(_)
                        | ShardReply::MoveState(_) => return Err(misfit(shard)),
                    }
                }
            };
            self.pause(&mut retry_state, retry, version(map.as_deref()))
                .await?;
        }
    }

    async fn locate_key(&self, key: Bytes, options: Options) -> Result<(), Failure> {
        check_key(&key)?;
        let mut retry_state = RetryState::new(options).repeatable().single_key();
        loop {
            let map = self.access.map();
            let retry = match map.as_deref().map(|map| map.owner_of(&key)) {
                None => Retry::no_map(),
                Some(GroupId::META) => Retry::unowned(),
                Some(shard) => {
                    let options = retry_state.options_at(&key, map.as_deref());
                    if options.routing == Routing::Proxy {
                        return Ok(());
                    }
                    match self.access.locate(shard, options).await {
                        // Not that there is a leader: those who wait for one go on waiting.
                        Ok(()) => return Ok(()),
                        Err(failure) => retry_state.classify(shard, failure)?,
                    }
                }
            };
            self.pause(&mut retry_state, retry, version(map.as_deref()))
                .await?;
        }
    }

    /// Waits before the next attempt, and asks for a map newer than `known` where the last one may
    /// be to blame.
    ///
    /// # Errors
    ///
    /// Says what to tell the caller if there is no time left, or too many wait already.
    async fn pause(
        &self,
        retry_state: &mut RetryState,
        retry: Retry,
        known: MapVersion,
    ) -> Result<(), Failure> {
        // Each request that waits keeps its body in memory, so only so many may.
        let Some(_waiting) = WaitPermit::enter(&self.waiting) else {
            retry_state.failed_attempt(retry.maybe_done);
            return Err(retry_state.final_failure(Failure::Overloaded {
                limit: "requests waiting for another attempt".into(),
                retry_after_ms: 1000,
            }));
        };
        match retry.leader_of {
            Some(shard) => {
                self.pause_for_leader(retry_state, shard, retry, known)
                    .await
            }
            None => self.pause_alone(retry_state, retry, known).await,
        }
    }

    /// Waits with the others that wait for the leader of `shard`.
    async fn pause_for_leader(
        &self,
        retry_state: &mut RetryState,
        shard: GroupId,
        retry: Retry,
        known: MapVersion,
    ) -> Result<(), Failure> {
        let place = self.queues.enter(
            (shard, retry_state.want()),
            retry_state.attempts(),
            self.next_jitter(),
        );
        retry_state.failed_attempt(retry.maybe_done);
        let turn = place.wait(self.access.lead_changed(shard), self.next_jitter());
        // The map may know a leader that is not heard of otherwise. It is looked for on the side,
        // now and then for as long as it takes: the network may be slower than the pauses are long.
        let is_patient = retry_state.attempts().is_multiple_of(PATIENT_EVERY);
        let in_time = timeout_at(retry_state.deadline(), async {
            let mut refresh = std::pin::pin!(self.access.refresh(known));
            let mut turn = std::pin::pin!(turn);
            tokio::select! {
                () = &mut turn => {
                    if is_patient {
                        refresh.await;
                    }
                }
                () = &mut refresh => turn.await,
            }
        });
        match in_time.await {
            Ok(()) if Instant::now() + ATTEMPT_MIN < retry_state.deadline() => Ok(()),
            Ok(()) | Err(_) => Err(retry_state.final_failure(retry.failure)),
        }
    }

    /// Waits where no news can be had but a newer map: twice as long each time.
    async fn pause_alone(
        &self,
        retry_state: &mut RetryState,
        retry: Retry,
        known: MapVersion,
    ) -> Result<(), Failure> {
        let step = retry_state.next_pause(retry.maybe_done, self.next_jitter());
        let until = Instant::now() + step;
        // If the map is to blame there is nothing better to do than to wait for a newer one.
        // Else it is looked for on the side; but now and then for as long as it takes, because the
        // network may be slower than the pauses are long.
        let patient = (retry.map_is_old && retry.hint.is_none())
            || retry_state.attempts().is_multiple_of(PATIENT_EVERY);
        if retry.refresh {
            let look_until = if patient {
                retry_state.deadline()
            } else {
                until.min(retry_state.deadline())
            };
            drop(timeout_at(look_until, self.access.refresh(known)).await);
        }

        // A pause that outlasts the deadline is not begun: the caller is told now.
        if Instant::now().max(until) >= retry_state.deadline() {
            return Err(retry_state.final_failure(retry.failure));
        }
        let map_is_newer = self.access.map().is_some_and(|map| map.version > known);
        if !(retry.map_is_old && map_is_newer) {
            sleep_until(until).await;
        }
        Ok(())
    }

    /// SplitMix64: cheap, and the same from the same seed.
    fn next_jitter(&self) -> u64 {
        let mut z = self
            .jitter
            .fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

impl<A: ShardAccess> Store for Router<A> {
    fn get(&self, key: Bytes, options: Options) -> BoxFuture<'_, Result<GetOutcome, Failure>> {
        Box::pin(self.get_from_shard(key, options))
    }

    fn get_many(
        &self,
        request: GetManyRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<Vec<Option<Record>>, Failure>> {
        Box::pin(self.get_many_from_shards(request, options))
    }

    fn write(
        &self,
        operations: Vec<Operation>,
        idempotency_key: Option<Bytes>,
        options: Options,
    ) -> BoxFuture<'_, Vec<Written>> {
        Box::pin(self.write_to_shards(operations, idempotency_key, options))
    }

    fn locate(&self, key: Bytes, options: Options) -> BoxFuture<'_, Result<(), Failure>> {
        match options.routing {
            Routing::Proxy => Box::pin(async { Ok(()) }),
            Routing::Redirect => Box::pin(self.locate_key(key, options)),
        }
    }

    fn scan(
        &self,
        request: ScanRequest,
        options: Options,
    ) -> BoxFuture<'_, Result<MergedPage, Failure>> {
        Box::pin(self.scan_shards(request, options))
    }

    fn count(&self, options: Options) -> BoxFuture<'_, Result<Vec<(GroupId, u64)>, Failure>> {
        Box::pin(self.count_shards(options))
    }

    fn count_shard(&self, shard: GroupId, options: Options) -> BoxFuture<'_, Result<u64, Failure>> {
        Box::pin(self.count_one(shard, options))
    }

    fn answers(&self) -> Arc<Budget> {
        self.access.answers()
    }

    fn this_node(&self) -> Option<NodeId> {
        self.access.this_node()
    }

    fn contact(&self, shard: GroupId) -> BoxFuture<'_, Option<Address>> {
        Box::pin(self.access.contact(shard))
    }

    fn by_network(&self, _: &[Address]) -> Option<Arc<dyn Store>> {
        None
    }

    fn map(&self, options: Options) -> BoxFuture<'_, Result<Arc<ShardMap>, Failure>> {
        Box::pin(async move { self.map_in_time(&mut RetryState::new(options)).await })
    }

    fn status(&self) -> BoxFuture<'_, Result<ClusterStatus, Failure>> {
        Box::pin(self.access.status())
    }

    fn transfer_leader(
        &self,
        shard: GroupId,
        to: Option<Address>,
        options: Options,
    ) -> BoxFuture<'_, Result<Address, Failure>> {
        Box::pin(self.access.transfer_leader(shard, to, options))
    }

    fn change_view(
        &self,
        change: ViewChange,
        only_if: Option<PlanEpoch>,
        options: Options,
    ) -> BoxFuture<'_, Result<ChangeInProgress, ViewChangeFailure>> {
        Box::pin(self.access.change_view(change, only_if, options))
    }

    fn plan_view(
        &self,
        change: ViewChange,
        options: Options,
    ) -> BoxFuture<'_, Result<PlannedChange, ViewChangeFailure>> {
        Box::pin(self.access.plan_view(change, options))
    }

    fn operation(
        &self,
        id: PlanEpoch,
        options: Options,
    ) -> BoxFuture<'_, Result<Option<ChangeInProgress>, Failure>> {
        Box::pin(self.access.operation(id, options))
    }

    fn await_change(&self, id: PlanEpoch, at_most: Duration) -> BoxFuture<'_, Option<bool>> {
        Box::pin(self.access.await_change(id, at_most))
    }
}

/// One of the [`WAITING_MAX`] requests that wait.
struct WaitPermit<'a>(&'a AtomicUsize);

impl<'a> WaitPermit<'a> {
    fn enter(count: &'a AtomicUsize) -> Option<Self> {
        let entered = Self(count);
        (count.fetch_add(1, Ordering::Relaxed) < WAITING_MAX).then_some(entered)
    }
}

impl Drop for WaitPermit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn check_key(key: &[u8]) -> Result<(), Failure> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        let reason = format!(
            "a key is 1 to {KEY_BYTES_MAX} bytes long, this one {}",
            key.len()
        );
        return Err(Failure::Invalid { reason });
    }
    Ok(())
}

fn version(map: Option<&ShardMap>) -> MapVersion {
    map.map_or(MapVersion(0), |map| map.version)
}

/// Returns the failure of a reply of another kind than the request's: a bug, or another program.
/// Nothing is known of what it did.
fn misfit(shard: GroupId) -> Failure {
    Failure::Unknown {
        reason: format!("shard {shard:#} sent a reply that does not fit the request"),
    }
}
