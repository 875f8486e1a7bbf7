//! Deletes, a bounded number of keys and bytes per entry, what moves leave behind: at a source the
//! slots it released, at a destination those whose install was given up, and marks of changes.
//!
//! It touches no slot that this shard serves, that a newer move installs, or that the move itself
//! has open.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::command::{MoveOutcome, MoveRejection};
use super::decision::overtaken;
use super::destination::{give_up, miscounted};
use crate::sm::kv::entry::EntryTransaction;
use crate::sm::ports::{KeyRange, Read, StoreError};
use crate::sm::requests::forget;
use crate::sm::slots::{
    Ownership, change_range, data_range, misplaced, parse_data_key, parse_request_key,
    request_range,
};
use crate::types::{MoveId, Slot};

/// With so many bytes of keys and values deleted an entry ends, whatever its limit of keys: nothing
/// else is applied meanwhile. Part of what an entry means: replicas must agree on it.
const BYTES_MAX: usize = 1 << 20;

/// Bounds what one entry may still delete.
struct ClearBudget {
    keys: usize,
    bytes: usize,
}

impl ClearBudget {
    fn is_used_up(&self) -> bool {
        self.keys == 0 || self.bytes == 0
    }

    fn use_up(&mut self, bytes: usize) {
        self.keys = self.keys.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

pub(in crate::sm) fn clear<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    slots: &BTreeSet<Slot>,
    limit: u32,
) -> Result<MoveOutcome, StoreError> {
    // An open move still needs its marks, and what is in its slots.
    if entry.open_move(id)?.is_some() {
        return Ok(MoveRejection::Open { id }.into());
    }
    let mut unfinished = BTreeSet::new();
    for slot in slots {
        let state = entry.state(*slot)?;
        if state.generation > id {
            return Ok(overtaken(*slot, &state).into());
        }
        if state.serves_reads() {
            return Ok(MoveRejection::Owned { slot: *slot }.into());
        }
        if state.ownership == Ownership::Arriving {
            unfinished.insert(state.generation);
        }
    }
    // A move is only opened when the ones before it of its slots have ended: what an older one
    // installs here will never be served.
    for older in unfinished {
        if let Some(open) = entry.open_move(older)? {
            give_up(entry, older, &open.slots)?;
        }
    }
    let mut left = ClearBudget {
        keys: limit as usize,
        bytes: BYTES_MAX,
    };
    clear_changes(entry, id, &mut left)?;
    for slot in slots {
        clear_requests(entry, *slot, &mut left)?;
        clear_data(entry, *slot, &mut left)?;
    }
    Ok(MoveOutcome::Cleared {
        more: left.is_used_up(),
    })
}

/// Returns as many keys of `range` as are left to be deleted, and the length of what each has.
fn take_keys<R: Read>(
    entry: &EntryTransaction<'_, R>,
    range: &KeyRange,
    left: &mut ClearBudget,
) -> Result<Vec<(Bytes, usize)>, StoreError> {
    let mut found = Vec::new();
    if !left.is_used_up() {
        entry.scan_lengths(range, |key, len| {
            left.use_up(key.len() + len);
            found.push((key, len));
            Ok(!left.is_used_up())
        })?;
    }
    Ok(found)
}

fn clear_changes<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    id: MoveId,
    left: &mut ClearBudget,
) -> Result<(), StoreError> {
    for (key, _) in take_keys(entry, &change_range(id), left)? {
        entry.delete(key);
    }
    Ok(())
}

fn clear_requests<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    slot: Slot,
    left: &mut ClearBudget,
) -> Result<(), StoreError> {
    for (key, _) in take_keys(entry, &request_range(slot), left)? {
        let (_, key) = parse_request_key(&key).ok_or_else(|| misplaced(&key))?;
        forget(entry, slot, &key)?;
    }
    Ok(())
}

fn clear_data<R: Read>(
    entry: &mut EntryTransaction<'_, R>,
    slot: Slot,
    left: &mut ClearBudget,
) -> Result<(), StoreError> {
    for (key, len) in take_keys(entry, &data_range(slot, &KeyRange::all()), left)? {
        let (_, user_key) = parse_data_key(&key).ok_or_else(|| misplaced(&key))?;
        let contents = &mut entry.state_mut(slot)?.contents;
        contents
            .recount(user_key.len(), Some(len), None)
            .ok_or_else(|| miscounted(slot))?;
        entry.delete(key);
    }
    Ok(())
}
