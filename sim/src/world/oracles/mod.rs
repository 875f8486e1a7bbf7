//! [`Oracles`]: what must hold in every moment, over all processes.
//!
//! - `logs`: what is committed, and where it is synced.
//! - `maps`: what is in the maps of replicas, and which of them serves a slot.
//! - `floor`: what a cluster that has nothing to do still holds.

pub mod floor;
mod logs;
mod maps;

use std::collections::BTreeMap;

use quorate::raft::{Replica, Role};
use quorate::types::{GroupId, ReplicaId, Slot};

use self::logs::LogOracle;
use self::maps::MapOracle;
use super::host::Host;

/// Remembers what was seen so far.
#[derive(Debug, Default)]
pub struct Oracles {
    leaders: BTreeMap<(GroupId, u64), ReplicaId>,
    logs: LogOracle,
    maps: MapOracle,
    pub leaders_seen: u64,
}

/// Says how much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// Looks only at what may be over before the next look.
    Shallow,
    /// The roles of replicas, their logs, and what they know of slots.
    Usual,
    /// All that is in maps.
    Deep,
}

impl Oracles {
    /// Watches these keys' slots more closely than others.
    pub fn watch_keys(&mut self, keys: &[String]) {
        self.maps.watch_keys(keys);
    }

    /// Looks at all replicas.
    ///
    /// # Errors
    ///
    /// Names what must not be.
    pub fn look(&mut self, hosts: &[Host], depth: Depth) -> Result<(), String> {
        self.logs.look_at_positions(hosts)?;
        if depth == Depth::Shallow {
            return Ok(());
        }
        self.logs.look_at_disks(hosts)?;
        for host in hosts {
            for replica in host.groups() {
                host.within(|| self.look_at(host, &replica, depth))
                    .unwrap_or(Ok(()))?;
            }
        }
        self.maps.look_at_owners(depth)
    }

    fn look_at(&mut self, host: &Host, replica: &Replica, depth: Depth) -> Result<(), String> {
        let status = replica.status();
        let key = replica.key();
        if status.role == Role::Leader {
            let leader = self.leaders.entry((key.group, status.term));
            let first = *leader.or_insert_with(|| {
                self.leaders_seen += 1;
                key.replica
            });
            if first != key.replica {
                return Err(format!(
                    "group {} has two leaders in term {}: {first} and {}",
                    key.group, status.term, key.replica
                ));
            }
        }
        self.logs.look_at(host, replica, &status)?;
        self.maps.look_at(replica, depth)
    }

    /// Forgets what was seen last of maps, because a process has ended by itself: it may have
    /// applied more before its end.
    pub fn forget(&mut self) {
        self.maps.forget();
    }

    /// Returns the revision of each slot where it is served.
    pub fn revisions(&self) -> BTreeMap<Slot, u64> {
        self.maps.revisions()
    }

    /// Returns how much was compared, for a person to see that it was anything.
    pub fn counts(&self) -> String {
        format!(
            "{} leaders, {} entries and {} maps compared, {} commits found synced, {} owners seen",
            self.leaders_seen,
            self.logs.entries_compared,
            self.maps.maps_compared,
            self.logs.commits_found,
            self.maps.owners_seen
        )
    }
}
