//! The words of a slot move: its steps, what they answer, and what a shard keeps of a move that is
//! open in it.
//!
//! A move takes slots from a source shard to a destination shard. Each step is an entry of one of
//! the two, fenced by the move's id: a step of a move that was overtaken, or has ended, changes
//! nothing. What the steps do is in `source`, `destination` and `clear`, which step comes next in
//! `sm::moves`.
//!
//! ```text
//! source       Begin ............. Freeze .................... Release ............. Clear
//! destination         Install ...          Install, Complete            Activate
//! ```
//! The destination is cleared and prepared (`Clear`, `Prepare`) before `Begin`. Up to `Release`,
//! `Abort` at the source and then `Cancel` at the destination end the move instead.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::sm::codec;
use crate::sm::ports::{Direction, KeyRange, Read, StoreError};
use crate::sm::slots::{SlotContents, all_moves, misplaced, move_key, parse_move_key};
use crate::types::{GroupId, MoveId, Slot};

/// A step of a move, for the source or the destination. Part of the disk format: variants are only
/// ever added, at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MoveCommand {
    /// Source: from now on the changes in the slots are marked. All slots or none.
    Begin { to: GroupId },
    /// Source: writes to the slots are held back.
    Freeze,
    /// Source: the slots are given up; they are not read here any more. The point of no return.
    Release,
    /// Source: the slots stay, and this move will never take them. Not after the release.
    Abort,
    /// Destination: opens the move. All slots or none; they must be empty.
    Prepare { from: GroupId },
    /// Destination: everything is here. `chunk` counts the chunks, `contents` is what the frozen
    /// source has in each slot.
    Complete {
        chunk: u64,
        contents: BTreeMap<Slot, SlotContents>,
    },
    /// Destination: serves the slots. Only after the release was applied.
    Activate,
    /// Destination: gives up an install. Only after the abort was applied.
    Cancel,
    /// Either: deletes what is left in slots that this shard does not hold, and the marks of the
    /// move, at most `limit` keys, and about a mebibyte. Of no slots: the marks alone. At the
    /// destination it comes before [`MoveCommand::Prepare`] and ends an older install.
    Clear { limit: u32 },
}

/// A chunk of a move: pairs of the source's map, for the destination. Part of the disk format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Install {
    pub id: MoveId,
    /// Number of chunks before this one; only the next chunk in turn is accepted.
    pub chunk: u64,
    /// Position at which the source reads on after this chunk. Opaque to the destination.
    pub cursor: Bytes,
    /// The source's group time when the chunk was read: the ages of requests are carried over.
    pub source_ms: u64,
    /// Keys of the source's map, each with its value, or none where it was deleted.
    pub pairs: Vec<(Bytes, Option<Bytes>)>,
}

impl Install {
    /// Returns the bytes of its keys and values.
    pub fn bytes(&self) -> usize {
        self.pairs
            .iter()
            .map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len))
            .sum()
    }

    /// Returns true if more pairs of the slots come after it, which means that no frozen slot waits
    /// for it.
    pub fn is_one_of_many(&self) -> bool {
        matches!(
            ChunkCursor::decode(&self.cursor),
            Ok(ChunkCursor::Pairs { .. })
        )
    }
}

/// Position at which the source reads on. It travels in chunks and the destination keeps it, so
/// that the driver needs no memory. Part of the disk format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::sm) enum ChunkCursor {
    /// In the pairs of the slots, after this key of the map; empty: at the start.
    Pairs { after: Bytes },
    /// In the marks of changes, after this one; empty: at the start.
    Changes { after: Bytes },
}

impl ChunkCursor {
    /// The cursor that a destination has kept. It has none before the first chunk.
    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        match bytes {
            [] => Ok(ChunkCursor::Pairs {
                after: Bytes::new(),
            }),
            bytes => codec::decode(bytes, "the cursor of a move"),
        }
    }

    pub(super) fn encode(&self) -> Bytes {
        codec::encode(self)
    }
}

/// Progress of an install at the destination.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstallProgress {
    /// Number of chunks installed, which is the number of the next.
    pub chunk: u64,
    /// The cursor of the last one; empty before the first.
    pub cursor: Bytes,
    /// Everything is here, and counted.
    pub complete: bool,
}

/// The outcome of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MoveOutcome {
    /// It is so, by this entry or by an earlier one.
    Done,
    /// Of [`MoveCommand::Clear`]. `more`: something is left.
    Cleared { more: bool },
    /// Of [`MoveCommand::Prepare`], [`MoveCommand::Complete`] and [`Install`]: where the install
    /// now stands, whether by this entry or because another driver has come further. Go on from
    /// there.
    Installing(InstallProgress),
    /// Nothing was changed.
    Rejected(MoveRejection),
}

/// The reason why a step changed nothing. The same on every replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MoveRejection {
    /// The source does not own the slot.
    NotOwned { slot: Slot },
    /// The shard owns the slot, and so can neither be given nor clear it.
    Owned { slot: Slot },
    /// The slot saw a move of this id, which is higher, or this same move has ended for it.
    Overtaken { slot: Slot, generation: MoveId },
    /// This move stands in the way: it is open here.
    Open { id: MoveId },
    /// The move is not open here: it never began, or has ended.
    NotOpen,
    /// A release without a freeze.
    NotFrozen,
    /// The source has released the slots: this move can only go forward.
    Released,
    /// Something is left in the slot, to be cleared first.
    Leftovers { slot: Slot },
    /// An activation before everything was there.
    Incomplete,
    /// The destination counts something else in the slot than the source: nothing of this install
    /// may be served.
    Differs {
        slot: Slot,
        source: SlotContents,
        here: SlotContents,
    },
    /// The step does not fit the move as it was opened here, or a pair does not fit the map. The
    /// text says which; it is for people.
    Unfit { why: String },
}

impl From<MoveRejection> for MoveOutcome {
    fn from(rejection: MoveRejection) -> Self {
        MoveOutcome::Rejected(rejection)
    }
}

impl Install {
    /// About as many bytes as the encoding takes.
    pub fn size_hint(&self) -> usize {
        let pairs = self
            .pairs
            .iter()
            .map(|(key, value)| 12 + key.len() + value.as_ref().map_or(0, Bytes::len));
        48 + self.cursor.len() + pairs.sum::<usize>()
    }
}

impl MoveCommand {
    pub(in crate::sm) fn size_hint(&self) -> usize {
        match self {
            MoveCommand::Complete { contents, .. } => 16 + 16 * contents.len(),
            _ => 16,
        }
    }
}

/// A move that is open in a shard. It is in the map for exactly as long; what outlives it is in the
/// states of the slots, whose generation is the move's id. Part of the disk format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenMove {
    pub slots: BTreeSet<Slot>,
    pub phase: MovePhase,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MovePhase {
    /// Source: the slots are served, and their changes are marked.
    Copying { to: GroupId },
    /// Source: the slots are read, and not written.
    Frozen { to: GroupId },
    /// Destination: the slots are not served.
    Installing {
        from: GroupId,
        progress: InstallProgress,
    },
}

impl OpenMove {
    pub fn encode(&self) -> Bytes {
        codec::encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        codec::decode(bytes, "an open move")
    }

    /// The move with this id, if it is open in a shard's map.
    pub fn read(read: &impl Read, id: MoveId) -> Result<Option<Self>, StoreError> {
        read.get(&move_key(id))?
            .map(|bytes| Self::decode(&bytes))
            .transpose()
    }

    /// Every move that is open in a shard's map.
    pub fn read_all(read: &impl Read) -> Result<BTreeMap<MoveId, Self>, StoreError> {
        let range: KeyRange = all_moves();
        let moves = read.scan(&range, Direction::Forward).map(|pair| {
            let (key, value) = pair?;
            let id = parse_move_key(&key).ok_or_else(|| misplaced(&key))?;
            Ok((id, Self::decode(&value)?))
        });
        moves.collect()
    }
}
