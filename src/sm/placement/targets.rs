//! Which shard is to own each slot.

use std::collections::{BTreeMap, BTreeSet};

use crate::sm::cluster::view::{SlotTable, View};
use crate::types::{GroupId, SLOTS, Slot};

/// The slots dealt out evenly to `shards`: each slot stays with its owner where that is even, else
/// it goes where it already was to go, else to whoever lacks some, in runs.
///
/// The owner of a slot that is being moved is the shard that it is moved to: that is where it most
/// likely is before anything else is done.
pub fn even_targets(view: &View, shards: &BTreeSet<GroupId>) -> SlotTable {
    let mut owners = view.slots.clone();
    for open in view.moves.values() {
        open.slots
            .iter()
            .for_each(|slot| owners.set_owner(*slot, open.to));
    }
    let (owned, aimed) = (by_owner(&owners), by_owner(&view.targets));
    let count = |slots_by_owner: &BTreeMap<GroupId, Vec<Slot>>, id: &GroupId| {
        slots_by_owner.get(id).map_or(0, Vec::len)
    };

    let (least, over) = (
        usize::from(SLOTS) / shards.len(),
        usize::from(SLOTS) % shards.len(),
    );
    // One slot more goes to shards that have it already, and of those to the ones that were to have
    // it.
    let mut ranked: Vec<GroupId> = shards.iter().copied().collect();
    ranked.sort_by_key(|id| (count(&owned, id) <= least, count(&aimed, id) <= least, *id));

    let mut targets = view.targets.clone();
    let mut room: BTreeMap<GroupId, usize> = BTreeMap::new();
    let mut kept: BTreeSet<Slot> = BTreeSet::new();
    for (rank, id) in ranked.into_iter().enumerate() {
        let share = least + usize::from(rank < over);
        let mut own = owned.get(&id).cloned().unwrap_or_default();

        // What was to stay anyway is kept first, so that few targets change.
        own.sort_by_key(|slot| (view.targets.owner(*slot) != id, *slot));
        own.truncate(share);
        own.iter().for_each(|slot| targets.set_owner(*slot, id));
        room.insert(id, share - own.len());
        kept.extend(own);
    }
    let mut take = |id: GroupId| {
        room.get_mut(&id)
            .filter(|left| **left > 0)
            .map(|left| *left -= 1)
            .is_some()
    };

    // A slot that was already to go somewhere still goes there, if there is room.
    let homeless: Vec<Slot> = Slot::all()
        .filter(|slot| !kept.contains(slot))
        .filter(|slot| !take(targets.owner(*slot)))
        .collect();

    // In runs, because the table is written as runs of slots with one owner.
    let takers = room
        .iter()
        .flat_map(|(id, left)| std::iter::repeat_n(*id, *left));
    for (slot, id) in homeless.into_iter().zip(takers) {
        targets.set_owner(slot, id);
    }
    targets
}

fn by_owner(table: &SlotTable) -> BTreeMap<GroupId, Vec<Slot>> {
    let mut slots: BTreeMap<GroupId, Vec<Slot>> = BTreeMap::new();
    for slot in Slot::all() {
        slots.entry(table.owner(slot)).or_default().push(slot);
    }
    slots
}
