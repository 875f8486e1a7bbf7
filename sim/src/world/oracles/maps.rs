//! [`MapOracle`]: the maps of a group are equal where the same was applied, count what is in them,
//! and no slot is served by two groups.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use quorate::raft::Replica;
use quorate::sm::ports::{Direction, KeyRange, Read, StoreError};
use quorate::sm::requests::group_time_ms;
use quorate::sm::slots::{SlotState, parse_data_key, slot_of};
use quorate::types::{GroupId, LogId, ReplicaId, Revision, Slot};

use super::Depth;

#[derive(Debug, Default)]
pub struct MapOracle {
    /// Slots of the keys that clients use.
    watched: BTreeSet<Slot>,
    /// Digests of maps as of an applied entry.
    digests: BTreeMap<(GroupId, u64), (ReplicaId, u64)>,
    /// Each shard as of the last entry that any of its replicas was seen to have applied.
    shards: BTreeMap<GroupId, ShardLook>,
    /// The last revision of each slot that was seen where it is served.
    revisions: BTreeMap<Slot, Revision>,
    pub maps_compared: u64,
    pub owners_seen: u64,
}

#[derive(Debug, Clone, Default)]
struct ShardLook {
    index: u64,
    /// As of which entry all slots were looked at, and not those of the keys alone.
    index_of_all: u64,
    time_ms: u64,
    slots: BTreeMap<Slot, SlotState>,
    is_new: bool,
}

/// Counts what is in a slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counted {
    keys: u64,
    bytes: u64,
}

impl MapOracle {
    pub fn watch_keys(&mut self, keys: &[String]) {
        self.watched = keys.iter().map(|key| slot_of(key.as_bytes())).collect();
    }

    pub fn revisions(&self) -> BTreeMap<Slot, u64> {
        let revisions = self.revisions.iter();
        revisions.map(|(slot, last)| (*slot, last.0)).collect()
    }

    pub fn forget(&mut self) {
        self.shards.clear();
        self.revisions.clear();
    }

    pub fn look_at(&mut self, replica: &Replica, depth: Depth) -> Result<(), String> {
        let Some(applied) = replica.state().applied().log_id else {
            return Ok(());
        };
        // The node itself meets, and tells of, what cannot be read.
        if !replica.key().group.is_meta() {
            self.look_at_slots(replica, applied, depth)
                .unwrap_or(Ok(()))?;
        }
        if depth == Depth::Deep {
            self.compare(replica, applied).unwrap_or(Ok(()))?;
        }
        Ok(())
    }

    /// Takes the states of slots from the replica of a shard that has applied most, and looks
    /// whether its clock has gone back.
    fn look_at_slots(
        &mut self,
        replica: &Replica,
        applied: LogId,
        depth: Depth,
    ) -> Result<Result<(), String>, StoreError> {
        let group = replica.key().group;
        let last = self.shards.entry(group).or_default();
        let looks_at_all = depth == Depth::Deep && last.index_of_all < applied.index;
        if applied.index < last.index || (applied.index == last.index && !looks_at_all) {
            return Ok(Ok(()));
        }
        let map = replica.state();
        let map = map.read();
        let time_ms = group_time_ms(&map)?;
        if time_ms < last.time_ms {
            return Ok(Err(format!(
                "the time of group {group} went back from {} to {time_ms} ms, as of {applied}",
                last.time_ms
            )));
        }
        last.time_ms = time_ms;
        last.index = applied.index;
        last.is_new = true;
        if looks_at_all {
            last.index_of_all = applied.index;
            last.slots = SlotState::read_all(&map)?.into_iter().collect();
            return Ok(Ok(()));
        }
        // Others than the watched ones stay as they were at the last deep look: too old to be
        // compared with those of other shards.
        last.slots.clear();
        for slot in &self.watched {
            last.slots.insert(*slot, SlotState::read(&map, *slot)?);
        }
        Ok(Ok(()))
    }

    /// Looks at the states of slots over all shards, each as of the last entry that any replica of
    /// it has applied.
    ///
    /// - No slot is served by two of them. The destination of a move serves only once its entry of
    ///   activation is applied, which is proposed only after a replica of the source has applied
    ///   the release. (A replica that lags may well say of itself that it serves the slot: nobody
    ///   reads there, since it does not lead.)
    /// - The revision of a slot never goes back where it is served, whoever serves it.
    pub fn look_at_owners(&mut self, depth: Depth) -> Result<(), String> {
        let mut owners: BTreeMap<Slot, GroupId> = BTreeMap::new();
        for (group, look) in &mut self.shards {
            let is_new = std::mem::take(&mut look.is_new);
            for (slot, state) in look.slots.iter().filter(|(_, state)| state.serves_reads()) {
                if depth < Depth::Deep && !self.watched.contains(slot) {
                    continue;
                }
                if let Some(other) = owners.insert(*slot, *group) {
                    return Err(format!(
                        "slot {slot} is served by groups {other} and {group}: {state:?}"
                    ));
                }
                self.owners_seen += 1;
                if !is_new {
                    continue;
                }
                let revision = self.revisions.entry(*slot).or_default();
                if state.contents.revision < *revision {
                    return Err(format!(
                        "slot {slot} went back from revision {revision} to {}, in group {group}",
                        state.contents.revision
                    ));
                }
                *revision = state.contents.revision;
            }
        }
        Ok(())
    }

    /// Maps of one group are equal where the same was applied, and count what is in them.
    fn compare(
        &mut self,
        replica: &Replica,
        applied: LogId,
    ) -> Result<Result<(), String>, StoreError> {
        let key = replica.key();
        let map = replica.state();
        let map = map.read();
        let mut hasher = DefaultHasher::new();
        let mut counted: BTreeMap<Slot, Counted> = BTreeMap::new();
        for pair in map.scan(&KeyRange::all(), Direction::Forward) {
            let (name, value) = pair?;
            (&name, &value).hash(&mut hasher);
            if let Some((slot, user_key)) = parse_data_key(&name) {
                let slot = counted.entry(slot).or_default();
                slot.keys += 1;
                slot.bytes += (user_key.len() + value.len()) as u64;
            }
        }
        let digest = hasher.finish();
        let place = (key.group, applied.index);
        match self.digests.get(&place) {
            None => drop(self.digests.insert(place, (key.replica, digest))),
            Some((_, known)) if *known == digest => self.maps_compared += 1,
            Some((other, _)) => {
                return Ok(Err(format!(
                    "the maps of replicas {other} and {} of group {} differ as of entry {}",
                    key.replica, key.group, applied.index
                )));
            }
        }
        if key.group.is_meta() {
            return Ok(Ok(()));
        }
        for (slot, state) in SlotState::read_all(&map)? {
            let found = counted.remove(&slot).unwrap_or_default();
            let contents = state.contents;
            let said = Counted {
                keys: contents.keys,
                bytes: contents.bytes,
            };
            if state.serves_reads() && said != found {
                return Ok(Err(format!(
                    "replica {} of group {} says {said:?} of slot {slot}, and holds {found:?}",
                    key.replica, key.group
                )));
            }
        }
        Ok(Ok(()))
    }
}
