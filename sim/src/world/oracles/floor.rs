//! [`check`]: what a cluster that has nothing to do still holds: what it was given, and no more.

use std::collections::{BTreeMap, BTreeSet};

use quorate::api::store::Store;
use quorate::raft::Replica;
use quorate::sm::ports::{Direction, KeyRange, Read, StoreError};
use quorate::sm::slots::SlotState;
use quorate::types::{SLOTS, Slot};

use crate::world::host::Host;

/// A log has a part that is written to, one that is sealed, and one or two to go on with.
const LOG_BYTES_MAX: u64 = 5 * (16 << 20);

/// Looks whether memory and disk of all nodes are back to their floor.
///
/// # Errors
///
/// Names what is still held that nobody needs.
pub fn check(hosts: &[Host]) -> Result<(), String> {
    for host in hosts {
        check_host(host).map_err(|what| format!("node {}: {what}", host.index))?;
    }
    Ok(())
}

fn check_host(host: &Host) -> Result<(), String> {
    let Some(node) = host.node() else {
        return Err("it is down".to_owned());
    };
    let answers = node.answers().used();
    if answers > 0 {
        return Err(format!("{answers} bytes of answers are held"));
    }
    check_files(host)?;
    for replica in host.groups() {
        let key = replica.key();
        let queued = replica.queued();
        if queued != (0, 0) {
            return Err(format!(
                "replica {key} has queued writes and reads: {queued:?}"
            ));
        }
        if !key.group.is_meta() {
            check_map(&replica)
                // The node itself meets, and tells of, what cannot be read.
                .unwrap_or(Ok(()))
                .map_err(|what| format!("replica {key} {what}"))?;
        }
    }
    Ok(())
}

/// Files of snapshots are those of the replicas that live there, two each at most; the log has no
/// more parts than it goes on with.
fn check_files(host: &Host) -> Result<(), String> {
    let alive: BTreeSet<String> = host
        .groups()
        .iter()
        .map(|replica| replica.key().to_string())
        .collect();
    let mut snapshots: BTreeMap<String, usize> = BTreeMap::new();
    let mut log_bytes = 0;
    for (path, bytes) in host.disk().files() {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.unwrap_or_default();
        if name.ends_with(".part") {
            return Err(format!("{} is left over", path.display()));
        }
        if name.ends_with(".segment") || name.ends_with(".spare") {
            log_bytes += bytes;
        }
        let Some(snapshot) = name.strip_suffix(".snap") else {
            continue;
        };
        // Of two or three parts: those of the replica, and how far it had applied.
        let key: Vec<&str> = snapshot.splitn(3, '-').take(2).collect();
        let key = key.join("-");
        if !alive.contains(&key) {
            return Err(format!("{} is of no replica", path.display()));
        }
        *snapshots.entry(key).or_default() += 1;
    }
    if let Some((key, count)) = snapshots.iter().find(|(_, count)| **count > 2) {
        return Err(format!("replica {key} has {count} snapshots"));
    }
    match log_bytes > LOG_BYTES_MAX {
        true => Err(format!("its log takes {log_bytes} bytes")),
        false => Ok(()),
    }
}

/// Looks whether all that is in a map belongs to slots that are served there.
fn check_map(replica: &Replica) -> Result<Result<(), String>, StoreError> {
    let map = replica.state();
    let map = map.read();
    let mut is_served = [false; SLOTS as usize];
    for (slot, state) in SlotState::read_all(&map)? {
        is_served[usize::from(slot.number())] = state.serves_reads();
    }
    for pair in map.scan(&KeyRange::all(), Direction::Forward) {
        let (key, _) = pair?;
        let place = match key.as_ref() {
            // Clock, states of slots, whether it may be written to.
            [0x01 | 0x02 | 0x07, ..] => continue,
            [0x03 | 0x04 | 0x10, high, low, ..] => Slot::new(u16::from_be_bytes([*high, *low])),
            _ => None,
        };
        if !place.is_some_and(|slot| is_served[usize::from(slot.number())]) {
            return Ok(Err(format!("still holds {}", key.escape_ascii())));
        }
    }
    Ok(Ok(()))
}
