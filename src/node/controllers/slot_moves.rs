//! Moves slots to where the view wants them: the leader of the shard that has them opens moves and
//! drives them.
//!
//! What to do next is decided in `sm::moves`, from what source and destination are observed to be;
//! here it is done. A driver keeps nothing that another could not find out, so a new leader of the
//! source takes a move up at any point, and two drivers do no harm.

use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::group_tasks::GroupTasks;
use crate::api::protocol::{ShardBody, ShardReply};
use crate::api::store::{Consistency, Options, Routing};
use crate::node::context::NodeContext;
use crate::node::local_shards::LocalShards;
use crate::node::move_destination::wait_ample_room;
use crate::node::platform::{Platform, Stepped};
use crate::node::unreadable::tell_unreadable;
use crate::raft::{ProposeError, Replica};
use crate::rare::{self, RareBranch};
use crate::routing::router::ShardAccess;
use crate::sm::cluster::meta;
use crate::sm::cluster::view::View;
use crate::sm::kv::{KvCommand, KvOutcome};
use crate::sm::moves::{
    self, DestinationState, InstallProgress, MoveCommand, MoveOutcome, Remaining, SourceState,
};
use crate::sm::moves::{CLEAR_KEYS_MAX, Move, MoveLimits, MoveSide, MoveStep, next_step};
use crate::sm::ports::StoreError;
use crate::sm::slots::SlotState;
use crate::storage::map::{MapRead, ReadKind};
use crate::telemetry::rarely;
use crate::types::{GroupId, MapVersion, Slot};

/// Between two looks for something to move.
const TICK: Duration = Duration::from_millis(100);
/// Slots that one move takes along. More would be frozen together for longer.
const SLOTS_PER_MOVE: usize = 64;
/// Keys and values that one move takes along, if it takes more than one slot.
const BYTES_PER_MOVE: u64 = 8 << 20;
/// Keys and values in a chunk: an entry of the destination.
const CHUNK_BYTES: usize = 128 << 10;
/// With so little left to copy the slots are frozen: what one chunk carries in a few milliseconds.
const FREEZE_BYTES_MAX: u64 = 64 << 10;
/// Time after which slots whose changes alone are copied are frozen with a little more
/// left.
const FREEZE_NOW_AFTER: Duration = Duration::from_secs(20);
/// A freeze is given up after this: writes have waited.
const FREEZE_TIME_MAX: Duration = Duration::from_secs(1);
/// Time that a step may take; it is looked at again then.
const STEP_TIMEOUT: Duration = Duration::from_secs(3);
/// Between two looks while there is something to wait for.
const WAIT: Duration = Duration::from_millis(25);
/// A driver rests after a chunk for as long as that took, so that a machine that is busy already
/// has at least half of its time for others; but no longer than this. Not once only changes are
/// left: they come in meanwhile.
const REST_MAX: Duration = Duration::from_millis(500);
/// Moves of a node that copy, or rest from it, at once. The others wait with their chunks, but not
/// with what is left of them after the pairs.
const COPYING_MAX: usize = 2;
/// After some of what moves have left over was deleted, it rests so much longer than that took.
/// Nobody waits for it.
const CLEAR_RESTS: u32 = 3;
/// After a move that was aborted, this shard opens no other for so long; nor deletes it more, after
/// a deletion that failed.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Opens and drives the moves of the shards that this node leads.
pub struct SlotMoveController {
    shared: Arc<MoveDriver>,
    tasks: GroupTasks,
    /// The shards with slots that should be elsewhere, by the view of this version: looked up once
    /// per view, not per shard and tick.
    sources: (MapVersion, BTreeSet<GroupId>),
    /// The shards that moves under way go to, by that view.
    destinations: BTreeSet<GroupId>,
}

struct MoveDriver {
    context: Arc<NodeContext>,
    platform: Arc<dyn Platform>,
    access: LocalShards,
    /// Shards that open no move before this.
    not_before: Mutex<BTreeMap<GroupId, Instant>>,
    /// In which term nothing was left over in a shard's map from moves that have ended.
    clean: Mutex<BTreeMap<GroupId, u64>>,
    copying: Semaphore,
}

impl SlotMoveController {
    pub fn new(context: Arc<NodeContext>, platform: Arc<dyn Platform>) -> Self {
        let (access, tasks) = (
            LocalShards::new(context.clone()),
            GroupTasks::new(&context, TICK),
        );
        let shared = MoveDriver {
            context,
            platform,
            access,
            not_before: Mutex::default(),
            clean: Mutex::default(),
            copying: Semaphore::new(COPYING_MAX),
        };
        Self {
            shared: Arc::new(shared),
            tasks,
            sources: Default::default(),
            destinations: BTreeSet::new(),
        }
    }

    pub async fn run(mut self, shutdown: &CancellationToken) {
        while self.tasks.wait_until_due(shutdown).await {
            let view = self.shared.context.view();
            if self.sources.0 != view.version {
                self.sources = (
                    view.version,
                    view.misplaced_slots()
                        .map(|slot| view.slots.owner(slot))
                        .collect(),
                );
                // A move that was taken back leaves something at its destination.
                let destinations = view.moves.values().map(|open| open.to).collect();
                for shard in std::mem::replace(&mut self.destinations, destinations) {
                    self.shared.lock_clean().remove(&shard);
                }
            }
            for group in self.shared.context.registry.groups() {
                let id = group.key().group;
                if !id.is_meta() && group.leads() && !self.tasks.is_busy(id) {
                    self.begin(&view, group);
                }
            }
        }
    }

    /// Gives the shard a task for what it has to do, if there is anything.
    fn begin(&mut self, view: &View, group: Arc<Replica>) {
        let id = group.key().group;
        let term = group.watch().borrow().term;
        let open = view.moves.iter().find(|(_, open)| open.from == id);
        let shared = self.shared.clone();
        if let Some((move_id, open)) = open {
            let slot_move = Move {
                id: *move_id,
                slots: open.slots.clone(),
                from: open.from,
                to: open.to,
            };

            // The slots that it releases are to be deleted here afterwards.
            shared.lock_clean().remove(&id);
            self.tasks
                .begin(id, async move { shared.drive(&group, &slot_move).await });
        } else if self.sources.1.contains(&id) {
            // Nothing is cleared while there is something to move: a task that only finds that out
            // would end at once, and the next would follow it without a pause.
            if shared.may_open(id) {
                shared.lock_clean().remove(&id);
                self.tasks
                    .begin(id, async move { shared.open(&group).await });
            }
        } else if shared.lock_clean().get(&id) != Some(&term) {
            self.tasks.begin(id, async move {
                if shared.clear(&group).await {
                    shared.lock_clean().insert(id, term);
                }
            });
        }
    }
}

/// A reason why a driver can't go on for now.
enum StepError {
    /// This replica does not lead any more, or has stopped.
    NotLeader,
    /// Look again after a moment.
    Later(String),
    Broken(StoreError),
}

impl From<StoreError> for StepError {
    fn from(error: StoreError) -> Self {
        StepError::Broken(error)
    }
}

impl From<ProposeError> for StepError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::NotLeader { .. } | ProposeError::Stopped { .. } => StepError::NotLeader,
            other => StepError::Later(other.to_string()),
        }
    }
}

/// State of a driver between two steps; losing it costs time, nothing else.
struct DriveState {
    /// Since when only changes are left to copy.
    catching_up: Option<Instant>,
    /// Since when nobody serves writes to the slots.
    frozen: Option<Instant>,
    /// The last answer of the destination.
    destination: Option<DestinationState>,
}

impl MoveDriver {
    fn may_open(&self, shard: GroupId) -> bool {
        let not_before = self.not_before.lock();
        not_before
            .get(&shard)
            .is_none_or(|until| Instant::now() >= *until)
    }

    fn lock_clean(&self) -> MutexGuard<'_, BTreeMap<GroupId, u64>> {
        self.clean.lock()
    }

    fn pause(&self, shard: GroupId) {
        self.not_before
            .lock()
            .insert(shard, Instant::now() + PAUSE_AFTER_FAILURE);
    }

    /// Opens a move of slots that should be elsewhere.
    async fn open(&self, group: &Replica) {
        let from = group.key().group;
        let view = self.context.view();
        let (to, slots) = match next_slots(group, &view).await {
            Ok(Some(chosen)) => chosen,
            Ok(None) => return,
            Err(error) => return tell_unreadable(group, &error),
        };
        assert_ne!(from, to, "a move from a shard to itself would never end");
        assert!(
            (1..=SLOTS_PER_MOVE).contains(&slots.len()),
            "a move takes between 1 and {SLOTS_PER_MOVE} slots along, not {}",
            slots.len()
        );

        match self
            .context
            .tell_meta(
                meta::MetaCommand::OpenMove { slots, from, to },
                STEP_TIMEOUT,
            )
            .await
        {
            Ok(meta::MetaOutcome::MoveOpened { id }) => {
                tracing::debug!("move {id} from shard {from} to {to} is open");
                self.platform.stepped(Stepped::Opened { from, to }).await;
            }
            Ok(meta::MetaOutcome::Rejected(rejection)) => {
                tracing::debug!("no move from shard {from} to {to} was opened: {rejection:?}");
                self.pause(from);
            }
            Ok(meta::MetaOutcome::Done) => {}
            Err(error) => {
                tracing::debug!("no move from shard {from} to {to} was opened: {error}");
                self.pause(from);
            }
        }
        // The view with it is on its way.
        self.context.wait_for_map(view.version).await;
    }

    /// Takes steps until the move has ended, or this replica leads no more.
    async fn drive(&self, group: &Replica, slot_move: &Move) {
        let mut state = DriveState {
            catching_up: None,
            frozen: None,
            destination: None,
        };
        loop {
            let error = match self.step(group, slot_move, &mut state).await {
                Ok(true) => return,
                Ok(false) => continue,
                Err(error) => error,
            };

            // After a step that failed nobody knows how far the destination is: it is asked again.
            state.destination = None;
            match error {
                StepError::NotLeader => return,
                StepError::Later(reason) => {
                    tracing::debug!("move {} waits: {reason}", slot_move.id)
                }
                StepError::Broken(error) => return tell_unreadable(group, &error),
            }

            // A step whose answer was lost, or another driver, may have ended the move.
            if !self.context.view().moves.contains_key(&slot_move.id) {
                return;
            }
            tokio::time::sleep(WAIT).await;
        }
    }

    /// Looks, decides and takes one step. Returns true if the move has ended.
    async fn step(
        &self,
        group: &Replica,
        slot_move: &Move,
        state: &mut DriveState,
    ) -> Result<bool, StepError> {
        let begun = Instant::now();
        let step = self.decide(group, slot_move, state).await?;

        // Once only changes are left it waits for no turn: new ones would come while it does.
        let waits_for_none = state.catching_up.is_none() && state.frozen.is_none();
        let turn = match &step {
            MoveStep::Copy(_) | MoveStep::Clear if waits_for_none => Some(self.turn().await?),
            _ => None,
        };
        let waited = begun.elapsed();
        let has_ended = self.take(group, slot_move, &step, state).await?;
        self.platform
            .stepped(Stepped::Moved {
                slot_move,
                step: &step,
            })
            .await;

        // It rests for as long as it worked, so that clients have the node to themselves half of
        // the time.
        if turn.is_some() {
            tokio::time::sleep((begun.elapsed() - waited).min(REST_MAX)).await;
        }
        Ok(has_ended)
    }

    /// Waits until this driver may burden the node.
    async fn turn(&self) -> Result<SemaphorePermit<'_>, StepError> {
        self.copying
            .acquire()
            .await
            .map_err(|_| StepError::NotLeader)
    }

    async fn decide(
        &self,
        group: &Replica,
        slot_move: &Move,
        state: &mut DriveState,
    ) -> Result<MoveStep, StepError> {
        // What is read here must be what a leader has applied.
        group
            .read_barrier(Instant::now() + STEP_TIMEOUT)
            .await
            .map_err(|error| match group.leads() {
                true => StepError::Later(error.to_string()),
                false => StepError::NotLeader,
            })?;
        if state.destination.is_none() {
            state.destination = self.observe(slot_move).await;
        }
        let cursor = match &state.destination {
            Some(DestinationState::Installing(progress)) => progress.cursor.clone(),
            Some(_) | None => bytes::Bytes::new(),
        };
        let (id, slots) = (slot_move.id, slot_move.slots.clone());
        let look = move |read: &MapRead<'_>| moves::source_state(read, id, &slots, &cursor);
        let source = group.state().read_in(ReadKind::Page, look).await?;
        if let SourceState::Copying(Remaining::Changes { .. }) = source {
            state.catching_up.get_or_insert_with(Instant::now);
        }

        // A freeze of an earlier leader counts from this first look: when it began is not known
        // here.
        match &source {
            SourceState::Frozen(_) => drop(state.frozen.get_or_insert_with(Instant::now)),
            // Writes wait until the activation, so that the freeze is not over yet.
            SourceState::Released => {}
            _ => state.frozen = None,
        }
        Ok(next_step(
            &source,
            state.destination.as_ref(),
            self.budget(slot_move, state),
        ))
    }

    /// Takes a decided step. Returns true if the move has ended.
    async fn take(
        &self,
        group: &Replica,
        slot_move: &Move,
        step: &MoveStep,
        state: &mut DriveState,
    ) -> Result<bool, StepError> {
        match step {
            MoveStep::Copy(progress) => self.copy(group, slot_move, progress, state).await?,
            MoveStep::Complete { chunk } => self.complete(group, slot_move, *chunk, state).await?,
            MoveStep::Commit => {
                if self
                    .end(
                        slot_move,
                        meta::MetaCommand::CommitMove { id: slot_move.id },
                    )
                    .await?
                {
                    self.context.moves.count_move(slot_move.slots.len());
                }
                return Ok(true);
            }
            MoveStep::End => {
                // What has ended this move would end the next one just as soon.
                self.pause(slot_move.from);
                self.end(slot_move, meta::MetaCommand::AbortMove { id: slot_move.id })
                    .await?;
                return Ok(true);
            }
            MoveStep::Over => return Ok(true),
            MoveStep::Wait(reason) => return Err(StepError::Later(format!("{reason:?}"))),
            step => {
                if let MoveStep::Abort(reason) = step {
                    tracing::info!(
                        "move {} of {} slots to shard {} is taken back: {reason:?}",
                        slot_move.id,
                        slot_move.slots.len(),
                        slot_move.to
                    );
                }

                // Counted from before the entry is proposed: the limit must hold for the first
                // write that waits.
                if *step == MoveStep::Freeze {
                    state.frozen = Some(Instant::now());
                }
                if let Some((side, command)) = step.command(slot_move) {
                    self.send(group, slot_move, side, command, state).await?;
                }
                if let (MoveStep::Activate, Some(since)) = (step, state.frozen) {
                    self.context.moves.count_freeze(since.elapsed());
                }
            }
        }
        Ok(false)
    }

    fn budget(&self, slot_move: &Move, state: &DriveState) -> MoveLimits {
        let view = self.context.view();
        MoveLimits {
            freeze_bytes_max: rare::or(
                RareBranch::EarlyFreeze,
                moves::CHANGES_BYTES_MAX - 1,
                FREEZE_BYTES_MAX,
            ),
            freeze_now: state
                .catching_up
                .is_some_and(|since| since.elapsed() > FREEZE_NOW_AFTER),
            freeze_overdue: state
                .frozen
                .is_some_and(|since| since.elapsed() > FREEZE_TIME_MAX),
            // A move can't be split: while one of its slots is wanted there, all of them go on.
            give_up: slot_move
                .slots
                .iter()
                .all(|slot| view.targets.owner(*slot) != slot_move.to),
        }
    }

    async fn copy(
        &self,
        group: &Replica,
        slot_move: &Move,
        progress: &InstallProgress,
        state: &mut DriveState,
    ) -> Result<(), StepError> {
        let (id, cursor) = (slot_move.id, progress.cursor.clone());
        let bytes_max = rare::or(RareBranch::OnePairChunks, 1, CHUNK_BYTES);
        let look = move |read: &MapRead<'_>| moves::move_chunk(read, id, &cursor, bytes_max);
        let chunk = group.state().read_in(ReadKind::Page, look).await?;
        let Some(chunk) = chunk else {
            return Err(StepError::Later("the move is not open here yet".into()));
        };
        let install = chunk.install(slot_move.id, progress.chunk);
        let bytes = install.bytes();
        self.send(
            group,
            slot_move,
            MoveSide::Destination,
            // The time is that of the destination's group: its leader puts it in.
            KvCommand::Install {
                time_ms: 0,
                install,
            },
            state,
        )
        .await?;
        self.context.moves.count_chunk(bytes);
        Ok(())
    }

    async fn complete(
        &self,
        group: &Replica,
        slot_move: &Move,
        chunk: u64,
        state: &mut DriveState,
    ) -> Result<(), StepError> {
        let id = slot_move.id;
        let look = move |read: &MapRead<'_>| moves::final_contents(read, id);
        let contents = group.state().read_in(ReadKind::Page, look).await?;
        let Some(contents) = contents else {
            return Err(StepError::Later("the move is not frozen here yet".into()));
        };
        let step =
            MoveCommand::Complete { chunk, contents }.into_command(slot_move.id, &slot_move.slots);
        self.send(group, slot_move, MoveSide::Destination, step, state)
            .await
    }

    /// Has one side apply an entry, and goes on from what it answered.
    async fn send(
        &self,
        group: &Replica,
        slot_move: &Move,
        side: MoveSide,
        command: KvCommand,
        state: &mut DriveState,
    ) -> Result<(), StepError> {
        let outcome = match side {
            MoveSide::Source => match group
                .propose_command(command, Instant::now() + STEP_TIMEOUT)
                .await?
            {
                KvOutcome::Moved(outcome) => outcome,
                other => {
                    return Err(StepError::Later(format!(
                        "a step was answered by {other:?}"
                    )));
                }
            },
            MoveSide::Destination => {
                // Without an answer nobody knows whether the step was taken.
                state.destination = None;
                match self.call(slot_move.to, ShardBody::Move(command)).await {
                    ShardReply::Moved(outcome) => outcome,
                    ShardReply::Failed(failure) => {
                        return Err(StepError::Later(failure.to_string()));
                    }
                    other => {
                        return Err(StepError::Later(format!(
                            "a step was answered by {other:?}"
                        )));
                    }
                }
            }
        };

        // What the destination answered saves the next step from asking it.
        match outcome {
            MoveOutcome::Done => {}
            MoveOutcome::Installing(progress) => {
                state.destination = Some(DestinationState::Installing(progress))
            }
            MoveOutcome::Cleared { .. } => state.destination = None,
            // Nothing was released yet: the slots are whole at the source, and stay there.
            MoveOutcome::Rejected(moves::MoveRejection::Differs { slot, source, here }) => {
                rarely!(
                    error,
                    "move {} is taken back: slot {slot} holds {source:?} in shard {}, and {here:?} \
                    was counted in shard {}",
                    slot_move.id,
                    slot_move.from,
                    slot_move.to
                );
                let abort = MoveCommand::Abort.into_command(slot_move.id, &slot_move.slots);
                group
                    .propose_command(abort, Instant::now() + STEP_TIMEOUT)
                    .await?;
            }
            MoveOutcome::Rejected(rejection) => {
                state.destination = None;
                return Err(StepError::Later(format!("{rejection:?}")));
            }
        }
        Ok(())
    }

    /// Has the meta group end the move. Returns false if it had ended before.
    async fn end(&self, slot_move: &Move, command: meta::MetaCommand) -> Result<bool, StepError> {
        let known = self.context.view().version;
        let is_news = match self.context.tell_meta(command, STEP_TIMEOUT).await {
            Ok(meta::MetaOutcome::Done) => true,
            // Ended already: the answer to an earlier try was lost.
            Ok(meta::MetaOutcome::Rejected(meta::MetaRejection::NoSuchMove(_))) => false,
            Ok(other) => {
                return Err(StepError::Later(format!(
                    "the meta group answered {other:?}"
                )));
            }
            Err(failure) => return Err(StepError::Later(failure.to_string())),
        };
        tracing::debug!(
            "move {} of {} slots to shard {} has ended",
            slot_move.id,
            slot_move.slots.len(),
            slot_move.to
        );

        // With the old view the move would be driven once more.
        self.context.wait_for_map(known).await;
        Ok(is_news)
    }

    /// Asks the destination what it has of the move.
    async fn observe(&self, slot_move: &Move) -> Option<DestinationState> {
        match self
            .call(
                slot_move.to,
                ShardBody::MoveState {
                    id: slot_move.id,
                    slots: slot_move.slots.clone(),
                },
            )
            .await
        {
            ShardReply::MoveState(state) => Some(state),
            other => {
                tracing::debug!(
                    "move {}: shard {} does not say how far it is: {other:?}",
                    slot_move.id,
                    slot_move.to
                );
                None
            }
        }
    }

    async fn call(&self, shard: GroupId, body: ShardBody) -> ShardReply {
        let options = Options {
            consistency: Consistency::Linearizable,
            routing: Routing::Proxy,
            timeout: STEP_TIMEOUT,
        };
        self.access.call(shard, body, options).await
    }

    fn has_more_to_move(&self, shard: GroupId) -> bool {
        let view = self.context.view();
        view.moves.values().any(|open| open.from == shard)
            || view
                .misplaced_slots()
                .any(|slot| view.slots.owner(slot) == shard)
    }

    /// Deletes, step by step, what moves that have ended have left in the shard's map; until there
    /// is something to move again. Returns true if nothing is left that this replica could delete.
    async fn clear(&self, group: &Replica) -> bool {
        let shard = group.key().group;

        // What is to be moved goes first: the plan waits for it, and nobody for a deletion.
        while group.leads() && !self.has_more_to_move(shard) {
            let left = match group
                .state()
                .read_in(ReadKind::Page, |read| moves::leftovers(read))
                .await
            {
                Ok(left) => left,
                Err(error) => {
                    tell_unreadable(group, &error);
                    return true;
                }
            };
            let Some((id, slots)) = left else { return true };
            let step = MoveCommand::Clear {
                limit: CLEAR_KEYS_MAX,
            }
            .into_command(id, &slots);
            wait_ample_room(group, &step).await;
            let begun = Instant::now();
            match group
                .propose_command(step, Instant::now() + STEP_TIMEOUT)
                .await
            {
                Ok(KvOutcome::Moved(MoveOutcome::Cleared { .. })) => {
                    self.platform.stepped(Stepped::Cleared { shard }).await;
                    tokio::time::sleep((begun.elapsed() * CLEAR_RESTS).min(REST_MAX)).await;
                }
                other => {
                    tracing::debug!("shard {shard} keeps what move {id} left for now: {other:?}");
                    tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
                }
            }
        }
        false
    }
}

/// Returns the next slots to be moved from the group's shard, and where to. As many as one move
/// takes along.
async fn next_slots(
    group: &Replica,
    view: &View,
) -> Result<Option<(GroupId, BTreeSet<Slot>)>, StoreError> {
    let from = group.key().group;
    let states = group
        .state()
        .read_in(ReadKind::Page, |read| SlotState::read_all(read))
        .await?;
    let states: BTreeMap<Slot, SlotState> = states.into_iter().collect();
    let mut chosen: Option<(GroupId, BTreeSet<Slot>)> = None;
    let mut bytes = 0;
    for slot in view
        .misplaced_slots()
        .filter(|slot| view.slots.owner(*slot) == from)
    {
        let to = view.targets.owner(slot);
        let held = states.get(&slot).map_or(0, |state| state.contents.bytes);
        match &mut chosen {
            // The first is taken whatever its size: a large slot has to move as well.
            None => chosen = Some((to, BTreeSet::from([slot]))),
            Some((first, slots)) if *first == to && bytes + held <= BYTES_PER_MOVE => {
                slots.insert(slot);
            }
            Some(_) => continue,
        }
        bytes += held;
        if chosen
            .as_ref()
            .is_some_and(|(_, slots)| slots.len() >= SLOTS_PER_MOVE)
        {
            break;
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_for_which_there_is_no_room_now_is_taken_later() {
        let full = ProposeError::Overloaded {
            limit: "the proposals of this node".to_owned(),
        };
        assert!(
            matches!(StepError::from(full), StepError::Later(reason) if reason.contains("the \
                proposals of this node"))
        );
        assert!(matches!(
            StepError::from(ProposeError::NotLeader { leader: None }),
            StepError::NotLeader
        ));
    }
}
