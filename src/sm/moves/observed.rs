//! How far a shard is with a move, read from its map: what the driver of a move decides by. And
//! what moves have left to be cleared.
//!
//! A map may be behind its log, so what is observed was so, and may have gone on since. The steps
//! are fenced, so a decision on it does no harm. States follow one another in one direction only,
//! as they are ordered here.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::chunk::remaining_change_bytes;
use super::command::{ChunkCursor, InstallProgress, MovePhase, OpenMove};
use super::source::is_released;
use crate::sm::ports::{Direction, KeyRange, Read, StoreError};
use crate::sm::slots::{
    Ownership, SlotState, change_range_from, data_range, expiry_range, misplaced, parse_change_key,
    request_range,
};
use crate::types::{MoveId, Slot};

/// State of a move at its source.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourceState {
    /// It owns the slots, and the move has not begun.
    Ready,
    /// It does not own the slots: not yet, or an older move has them.
    NotReady,
    Copying(Remaining),
    Frozen(Remaining),
    Aborted,
    Released,
    /// A later move has had some of the slots: this one is long over.
    Overtaken,
}

/// Data after the destination's cursor that is still to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remaining {
    /// Some or all of what the slots hold, and the changes since.
    Pairs,
    /// Changes alone, of about so many bytes; counted up to [`CHANGES_BYTES_MAX`]. 0: nothing at
    /// all.
    Changes { bytes: u64 },
}

/// State of a move at its destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DestinationState {
    /// Its slots are empty, and ready to be prepared.
    Free,
    /// Something is left in its slots, to be cleared first.
    Leftovers,
    /// An older move has not been taken from it yet, as far as its map has come.
    StillOwned,
    Installing(InstallProgress),
    /// It serves the slots.
    Active,
    /// The install was given up.
    Cancelled,
    /// A later move has had some of the slots: this one is long over.
    Overtaken,
}

/// Up to where the bytes of changes are counted: enough to see that they are few, and some thousand
/// marks at most.
pub const CHANGES_BYTES_MAX: u64 = 1 << 18;

/// Returns the state of a move of `slots` in the map of its source. `cursor` comes from the
/// destination's progress; empty if there is none.
pub fn source_state(
    read: &impl Read,
    id: MoveId,
    slots: &BTreeSet<Slot>,
    cursor: &[u8],
) -> Result<SourceState, StoreError> {
    if let Some(open) = OpenMove::read(read, id)? {
        let left =
            remaining_change_bytes(read, id, &ChunkCursor::decode(cursor)?, CHANGES_BYTES_MAX)?;
        let remaining = left.map_or(Remaining::Pairs, |bytes| Remaining::Changes { bytes });
        return Ok(match open.phase {
            MovePhase::Copying { .. } => SourceState::Copying(remaining),
            MovePhase::Frozen { .. } => SourceState::Frozen(remaining),
            MovePhase::Installing { .. } => SourceState::NotReady,
        });
    }

    // A later move may have taken some of the slots: the furthest of them tells where the move is.
    let mut furthest = SourceState::Ready;
    for slot in slots {
        let state = SlotState::read(read, *slot)?;
        let now = match state.generation.cmp(&id) {
            std::cmp::Ordering::Greater => SourceState::Overtaken,
            std::cmp::Ordering::Less if state.ownership == Ownership::Owned => SourceState::Ready,
            std::cmp::Ordering::Less => SourceState::NotReady,
            // The move is closed here, and only a release leaves `moved_to` with its id.
            std::cmp::Ordering::Equal if is_released(&state, id) => SourceState::Released,
            std::cmp::Ordering::Equal => SourceState::Aborted,
        };
        furthest = furthest.max(now);
    }
    Ok(furthest)
}

/// Returns the state of a move of `slots` in the map of its destination.
pub fn destination_state(
    read: &impl Read,
    id: MoveId,
    slots: &BTreeSet<Slot>,
) -> Result<DestinationState, StoreError> {
    if let Some(OpenMove {
        phase: MovePhase::Installing { progress, .. },
        ..
    }) = OpenMove::read(read, id)?
    {
        return Ok(DestinationState::Installing(progress));
    }

    // Steps take all slots in one entry: the first slot of this move's generation speaks for all.
    let mut leftovers = false;
    for slot in slots {
        let state = SlotState::read(read, *slot)?;
        match state.generation.cmp(&id) {
            std::cmp::Ordering::Greater => return Ok(DestinationState::Overtaken),
            std::cmp::Ordering::Equal if state.serves_reads() => {
                return Ok(DestinationState::Active);
            }

            // Closed and not served: only a cancellation leaves a slot so.
            std::cmp::Ordering::Equal => return Ok(DestinationState::Cancelled),
            std::cmp::Ordering::Less if state.serves_reads() => {
                return Ok(DestinationState::StillOwned);
            }
            std::cmp::Ordering::Less => {
                leftovers = leftovers
                    || state.ownership == Ownership::Arriving
                    || holds_anything(read, *slot)?;
            }
        }
    }
    Ok(if leftovers {
        DestinationState::Leftovers
    } else {
        DestinationState::Free
    })
}

/// Returns true if the map holds anything in `slot`. Looks at the map itself, not at its counters.
pub(in crate::sm) fn holds_anything(read: &impl Read, slot: Slot) -> Result<bool, StoreError> {
    for range in [
        data_range(slot, &KeyRange::all()),
        request_range(slot),
        expiry_range(slot),
    ] {
        if read
            .scan_starts(&range, Direction::Forward, 0)
            .next()
            .transpose()?
            .is_some()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Most slots named by [`leftovers`] at once.
const LEFTOVER_SLOTS_MAX: usize = 64;

/// Something that ended moves have left in the map, as the move and slots of a
/// [`super::MoveCommand::Clear`] that deletes some of it: the marks of a move, or what is in slots
/// that the shard does not hold. To be asked again after each such step, by the shard's leader.
pub fn leftovers(read: &impl Read) -> Result<Option<(MoveId, BTreeSet<Slot>)>, StoreError> {
    if let Some(id) = ended_with_marks(read)? {
        return Ok(Some((id, BTreeSet::new())));
    }

    // One clear step names one move, so only slots that the same move has left go together.
    let mut states = SlotState::read_all(read)?;
    states.retain(|(_, state)| {
        state.ownership == Ownership::NotOwned
            && (state.contents.keys > 0 || state.requests.bytes > 0)
    });
    let Some((_, first)) = states.first().copied() else {
        return Ok(None);
    };
    let alike = states
        .into_iter()
        .filter(|(_, state)| state.generation == first.generation);
    let slots = alike
        .map(|(slot, _)| slot)
        .take(LEFTOVER_SLOTS_MAX)
        .collect();
    Ok(Some((first.generation, slots)))
}

/// A move that is not open any more, and of which marks are left.
fn ended_with_marks(read: &impl Read) -> Result<Option<MoveId>, StoreError> {
    let mut from = MoveId(0);
    loop {
        let Some((mark, _)) = read
            .scan(&change_range_from(from), Direction::Forward)
            .next()
            .transpose()?
        else {
            return Ok(None);
        };
        let (id, _) = parse_change_key(&mark).ok_or_else(|| misplaced(&mark))?;

        // An open move still needs its marks: all of them are passed over with one seek.
        if OpenMove::read(read, id)?.is_none() {
            return Ok(Some(id));
        }
        from = MoveId(id.0 + 1);
    }
}
