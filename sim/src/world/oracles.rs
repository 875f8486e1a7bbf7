//! [`Oracles`]: what must hold in every moment, over all processes.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use quorate::raft::{Replica, Role};
use quorate::sm::ports::{Direction, KeyRange, Read};
use quorate::types::{GroupId, LogId, ReplicaId};

use super::host::Host;

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Oracles {
    leaders: BTreeMap<(GroupId, u64), ReplicaId>,
    committed: BTreeMap<(GroupId, u64), u64>,
    /// Digests of maps as of an applied entry.
    digests: BTreeMap<(GroupId, u64), (ReplicaId, u64)>,
    pub leaders_seen: u64,
    pub maps_compared: u64,
}

impl Oracles {
    /// Looks at all replicas. `is_deep`: at what is in their maps too.
    ///
    /// # Errors
    ///
    /// What must not be.
    pub fn look(&mut self, hosts: &[Host], is_deep: bool) -> Result<(), String> {
        for host in hosts {
            for replica in host.groups() {
                host.within(|| self.look_at(&replica, is_deep))
                    .unwrap_or(Ok(()))?;
            }
        }
        Ok(())
    }

    fn look_at(&mut self, replica: &Replica, is_deep: bool) -> Result<(), String> {
        let status = replica.status();
        let key = replica.key();
        let group = key.group;
        if status.role == Role::Leader {
            let leader = self.leaders.entry((group, status.term));
            let first = *leader.or_insert_with(|| {
                self.leaders_seen += 1;
                key.replica
            });
            if first != key.replica {
                return Err(format!(
                    "group {group} has two leaders in term {}: {first} and {}",
                    status.term, key.replica
                ));
            }
        }
        for id in [status.committed, status.applied].into_iter().flatten() {
            self.note_committed(group, id)?;
        }
        if is_deep && let Some(applied) = replica.state().applied().log_id {
            self.compare(replica, applied)?;
        }
        Ok(())
    }

    /// A committed entry never changes.
    fn note_committed(&mut self, group: GroupId, id: LogId) -> Result<(), String> {
        let term = *self.committed.entry((group, id.index)).or_insert(id.term);
        match term == id.term {
            true => Ok(()),
            false => Err(format!(
                "entry {} of group {group} is committed in terms {term} and {}",
                id.index, id.term
            )),
        }
    }

    /// Maps of one group are equal where the same was applied.
    fn compare(&mut self, replica: &Replica, applied: LogId) -> Result<(), String> {
        let key = replica.key();
        let state = replica.state();
        let mut hasher = DefaultHasher::new();
        for pair in state.read().scan(&KeyRange::all(), Direction::Forward) {
            // What cannot be read is met, and told of, by the node itself.
            let Ok((name, value)) = pair else {
                return Ok(());
            };
            (name, value).hash(&mut hasher);
        }
        let digest = hasher.finish();
        let place = (key.group, applied.index);
        match self.digests.get(&place) {
            None => drop(self.digests.insert(place, (key.replica, digest))),
            Some((_, known)) if *known == digest => self.maps_compared += 1,
            Some((other, _)) => {
                return Err(format!(
                    "the maps of replicas {other} and {} of group {} differ as of entry {}",
                    key.replica, key.group, applied.index
                ));
            }
        }
        Ok(())
    }
}
