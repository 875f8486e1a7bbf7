//! [`LogOracle`]: committed entries never change, and what is applied anywhere is synced on a
//! majority.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use quorate::raft::{GroupMembership, RaftStatus, Replica};
use quorate::storage::ReplicaKey;
use quorate::storage::log::{LogEntry, LogPayload, ReplicaLog};
use quorate::types::{GroupId, LogId, ReplicaId};

use crate::world::host::Host;

/// Entries that are read in one go.
const READ_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Default)]
pub struct LogOracle {
    /// Terms of committed entries, and digests of those that were read.
    committed: BTreeMap<(GroupId, u64), (u64, Option<u64>)>,
    /// Through where the log of each replica was compared, since a start of its process.
    compared: BTreeMap<(ReplicaKey, u64), u64>,
    /// End of what is synced of each replica's log, or was when it was last seen.
    synced: BTreeMap<(GroupId, ReplicaId), LogId>,
    /// Through where each group's entries were found on a majority.
    found: BTreeMap<GroupId, u64>,
    /// The last entry that changed the members of a group, on any replica.
    memberships: BTreeMap<GroupId, u64>,
    pub entries_compared: u64,
    pub commits_found: u64,
}

impl LogOracle {
    /// Looks how far logs are synced and applied. Done after each step of the world, so that
    /// nothing is synced, and then lost to sight by the end of its process.
    pub fn look_at_positions(&mut self, hosts: &[Host]) -> Result<(), String> {
        let mut applied = Vec::new();
        for host in hosts {
            let Some(registry) = host.node().and_then(|node| node.registry()) else {
                continue;
            };
            for witness in registry.witnesses() {
                self.note_synced(witness.log());
            }
            for replica in registry.groups() {
                self.note_synced(replica.log());
                let index = *replica.watch_applied().borrow();
                if self.found.get(&replica.key().group).copied() < Some(index) {
                    applied.push(replica);
                }
            }
        }
        for replica in applied {
            self.look_for_majority(&replica)?;
        }
        Ok(())
    }

    /// Looks whether a disk keeps through a power cut what its log holds for synced.
    pub fn look_at_disks(&self, hosts: &[Host]) -> Result<(), String> {
        for host in hosts {
            // Any replica will do: all of a node share a log.
            let groups = host.groups();
            let Some(replica) = groups.first() else {
                continue;
            };
            for (path, end) in replica.log().synced_files() {
                let unsynced = host.disk().unsynced_from(&path);
                if let Some(unsynced) = unsynced.filter(|unsynced| *unsynced < end) {
                    return Err(format!(
                        "node {} holds {} for synced through {end}, and it is not from {unsynced}",
                        host.index,
                        path.display()
                    ));
                }
            }
        }
        Ok(())
    }

    fn note_synced(&mut self, log: &ReplicaLog) {
        let key = log.key();
        // A truncation takes back what was synced: so it is as it is, and not the most ever.
        match log.synced() {
            Some(id) => drop(self.synced.insert((key.group, key.replica), id)),
            None => drop(self.synced.remove(&(key.group, key.replica))),
        }
    }

    /// What any replica has applied, a majority of the voters has synced: so no crash of a
    /// minority takes it away, nor one of all at once.
    ///
    /// Voters that have ended count with what they had: that it is there when they come back is the
    /// claim. Who the voters are is not asked while that changes: an entry may have been committed
    /// by those before.
    fn look_for_majority(&mut self, replica: &Replica) -> Result<(), String> {
        let group = replica.key().group;
        let watch = replica.watch();
        let members = watch.borrow().membership.clone();
        let Some(id) = replica.state().applied().log_id else {
            return Ok(());
        };
        let changed = members.log_id.map_or(0, |id| id.index);
        let newest = self.memberships.entry(group).or_default();
        *newest = changed.max(*newest);
        if !members.is_uniform || *newest > id.index || *newest > changed {
            return Ok(());
        }
        if !self.is_on_majority(group, &members, id) {
            let synced: Vec<String> = members
                .voters
                .keys()
                .map(|voter| {
                    let synced = self.synced.get(&(group, *voter));
                    let synced = synced.map_or("nothing".to_owned(), LogId::to_string);
                    format!("{voter} {synced}")
                })
                .collect();
            return Err(format!(
                "replica {} of group {group} has applied {id}, which no majority has synced: {}",
                replica.key().replica,
                synced.join(", ")
            ));
        }
        self.commits_found += 1;
        let found = self.found.entry(group).or_default();
        *found = id.index.max(*found);
        Ok(())
    }

    fn is_on_majority(&self, group: GroupId, members: &GroupMembership, id: LogId) -> bool {
        let has = |voter: &&ReplicaId| {
            let synced = self.synced.get(&(group, **voter));
            synced.is_some_and(|synced| synced.index >= id.index && *synced >= id)
        };
        2 * members.voters.keys().filter(has).count() > members.voters.len()
    }

    /// Compares what is committed on this replica with what is on others, and was before.
    pub fn look_at(
        &mut self,
        host: &Host,
        replica: &Replica,
        status: &RaftStatus,
    ) -> Result<(), String> {
        let key = replica.key();
        for id in [status.committed, status.applied].into_iter().flatten() {
            self.note(key.group, id, None)?;
        }
        let Some(committed) = status.committed.or(status.applied) else {
            return Ok(());
        };
        let log = replica.log();
        let purged = log.state().purged.map_or(0, |id| id.index);
        let compared = self.compared.entry((key, host.starts())).or_default();
        let mut next = (*compared).max(purged) + 1;
        *compared = committed.index.max(*compared);
        while next <= committed.index {
            // The node itself meets, and tells of, what cannot be read.
            let Ok(entries) = log.read(next..committed.index + 1, READ_BYTES_MAX) else {
                return Ok(());
            };
            let Some(last) = entries.last() else {
                return Ok(());
            };
            next = last.id.index + 1;
            for entry in &entries {
                self.note(key.group, entry.id, Some(digest(entry)))?;
            }
            self.entries_compared += entries.len() as u64;
        }
        Ok(())
    }

    /// A committed entry never changes.
    fn note(&mut self, group: GroupId, id: LogId, digest: Option<u64>) -> Result<(), String> {
        let known = self.committed.entry((group, id.index));
        let (term, known) = known.or_insert((id.term, digest));
        if *term != id.term {
            return Err(format!(
                "entry {} of group {group} is committed in terms {term} and {}",
                id.index, id.term
            ));
        }
        match (*known, digest) {
            (Some(one), Some(other)) if one != other => Err(format!(
                "entry {id} of group {group} is not the same everywhere, or was changed"
            )),
            (None, Some(_)) => {
                *known = digest;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn digest(entry: &LogEntry) -> u64 {
    let mut hasher = DefaultHasher::new();
    let kind = match &entry.payload {
        LogPayload::Blank => 0u8,
        LogPayload::Normal(_) => 1,
        LogPayload::Membership(_) => 2,
    };
    (kind, entry.payload.bytes()).hash(&mut hasher);
    hasher.finish()
}
