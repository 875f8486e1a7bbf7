//! What the source of a move reads for its destination: chunk after chunk, first every pair of the
//! slots in key order, then what was changed since the move began, in the order of the log.
//!
//! Any replica of the source may read, at any time, as far as it has applied the beginning of the
//! move; a replica that is behind, or whose leader was deposed, does no harm:
//! - the destination takes only the chunk that follows on the one it has, so each chunk is read
//!   from the cursor that the chunks before it led to, and no part is left out;
//! - every change after the beginning is marked. Whatever a chunk of the first reading missed, or
//!   read in an older form, is among the changes that come after it;
//! - a chunk of changes holds values at least as new as its marks, and its cursor goes no further
//!   than them. A change that the reader had not applied has a mark with a higher index, behind the
//!   cursor. An older value can overwrite a newer one only until that mark is read;
//! - the install is complete only when a replica that has applied the freeze finds no mark after
//!   the cursor, for just that number of chunks: by then every mark was read by someone after the
//!   change it stands for.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes, BytesMut};

use super::command::{ChunkCursor, Install, MovePhase, OpenMove};
use crate::sm::ports::{Direction, KeyRange, Read, StoreError};
use crate::sm::requests::group_time_ms;
use crate::sm::slots::{
    SlotContents, SlotState, change_range, change_weight, data_range, misplaced, parse_change_key,
    request_range,
};
use crate::types::{MoveId, Slot};

/// A part of the slots, read at the source for the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub pairs: Vec<(Bytes, Option<Bytes>)>,
    /// Position at which the next chunk begins.
    pub cursor: Bytes,
    /// The group time that the source has stored.
    pub source_ms: u64,
    /// Nothing is left after it in the map that it was read from.
    pub done: bool,
}

impl Chunk {
    /// As what the destination is to install as number `chunk`.
    pub fn install(self, id: MoveId, chunk: u64) -> Install {
        Install {
            id,
            chunk,
            cursor: self.cursor,
            source_ms: self.source_ms,
            pairs: self.pairs,
        }
    }
}

/// The chunk from `cursor` on, of about `bytes_max`: it ends with the pair or mark that reaches it.
/// None where the map does not have the move open as its source.
pub fn move_chunk(
    read: &impl Read,
    id: MoveId,
    cursor: &[u8],
    bytes_max: usize,
) -> Result<Option<Chunk>, StoreError> {
    let Some(OpenMove {
        slots,
        phase: MovePhase::Copying { .. } | MovePhase::Frozen { .. },
    }) = OpenMove::read(read, id)?
    else {
        return Ok(None);
    };
    let mut reading = ChunkReader {
        read,
        bytes_left: bytes_max.max(1),
        pairs: BTreeMap::new(),
    };

    // First all pairs, then the changes marked meanwhile, until the chunk is full.
    let mut cursor = ChunkCursor::decode(cursor)?;
    let mut done = false;
    while !done && reading.bytes_left > 0 {
        (cursor, done) = match cursor {
            ChunkCursor::Pairs { after } => match reading.read_pairs(&slots, after)? {
                Some(after) => (ChunkCursor::Pairs { after }, false),
                None => (
                    ChunkCursor::Changes {
                        after: Bytes::new(),
                    },
                    false,
                ),
            },
            ChunkCursor::Changes { after } => {
                let (after, done) = reading.read_changes(id, after)?;
                (ChunkCursor::Changes { after }, done)
            }
        };
    }

    // A key that was read twice is in the chunk once, with its newest value.
    let pairs = reading.pairs.into_iter().collect();
    Ok(Some(Chunk {
        pairs,
        cursor: cursor.encode(),
        source_ms: group_time_ms(read)?,
        done,
    }))
}

struct ChunkReader<'a, R> {
    read: &'a R,
    /// Counts bytes read, not bytes returned: many marks of one key make one pair.
    bytes_left: usize,
    pairs: BTreeMap<Bytes, Option<Bytes>>,
}

impl<R: Read> ChunkReader<'_, R> {
    fn count(&mut self, bytes: usize) {
        self.bytes_left = self.bytes_left.saturating_sub(bytes.max(1));
    }

    /// Reads on in the pairs of `slots`. The last key where there is no more room; none when all
    /// were read.
    fn read_pairs(
        &mut self,
        slots: &BTreeSet<Slot>,
        after: Bytes,
    ) -> Result<Option<Bytes>, StoreError> {
        // Keys of requests sort before those of data: so one cursor goes through both.
        let requests = slots.iter().map(|slot| request_range(*slot));
        let data = slots.iter().map(|slot| data_range(*slot, &KeyRange::all()));
        for range in requests.chain(data) {
            let range = range_after(range, &after);
            if range.is_empty() {
                continue;
            }
            for pair in self.read.scan(&range, Direction::Forward) {
                let (key, value) = pair?;
                self.count(key.len() + value.len());
                self.pairs.insert(key.clone(), Some(value));
                if self.bytes_left == 0 {
                    return Ok(Some(key));
                }
            }
        }
        Ok(None)
    }

    /// Reads on in the marks. The last one, and whether it is the last of all.
    fn read_changes(&mut self, id: MoveId, after: Bytes) -> Result<(Bytes, bool), StoreError> {
        let mut last = after.clone();
        for mark in self
            .read
            .scan(&range_after(change_range(id), &after), Direction::Forward)
        {
            if self.bytes_left == 0 {
                return Ok((last, false));
            }
            let (mark, _) = mark?;
            let (_, key) = parse_change_key(&mark).ok_or_else(|| misplaced(&mark))?;
            self.count(mark.len());

            // It was read from this very map, so that it has its newest value already.
            if !self.pairs.contains_key(&key) {
                let value = self.read.get(&key)?;
                self.count(key.len() + value.as_ref().map_or(0, Bytes::len));
                self.pairs.insert(key, value);
            }
            last = mark;
        }
        Ok((last, true))
    }
}

/// Returns the part of `range` that comes after a key.
fn range_after(range: KeyRange, after: &[u8]) -> KeyRange {
    if *after < *range.start {
        return range;
    }
    let mut start = BytesMut::with_capacity(after.len() + 1);
    start.put_slice(after);
    start.put_u8(0);
    KeyRange {
        start: start.freeze(),
        end: range.end,
    }
}

/// Returns the weight of the changes after a cursor, counted until it reaches `bytes_max`. None
/// while not all pairs have been read.
pub(super) fn remaining_change_bytes(
    read: &impl Read,
    id: MoveId,
    cursor: &ChunkCursor,
    bytes_max: u64,
) -> Result<Option<u64>, StoreError> {
    let ChunkCursor::Changes { after } = cursor else {
        return Ok(None);
    };
    let mut bytes = 0;
    for mark in read.scan(&range_after(change_range(id), after), Direction::Forward) {
        bytes += change_weight(&mark?.1)?;

        // More need not be counted: nothing depends on how much more it is.
        if bytes >= bytes_max {
            break;
        }
    }
    Ok(Some(bytes))
}

/// Returns the contents of each slot of the move once the map has it frozen, so that they no longer
/// change.
pub fn final_contents(
    read: &impl Read,
    id: MoveId,
) -> Result<Option<BTreeMap<Slot, SlotContents>>, StoreError> {
    let Some(OpenMove {
        slots,
        phase: MovePhase::Frozen { .. },
    }) = OpenMove::read(read, id)?
    else {
        return Ok(None);
    };
    let contents = slots
        .into_iter()
        .map(|slot| Ok((slot, SlotState::read(read, slot)?.contents)));
    contents.collect::<Result<_, StoreError>>().map(Some)
}
