//! Looks all the time whether two groups serve one slot.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::host::Host;
use quorate::raft::Replica;
use quorate::sm::slots::SlotState;
use quorate::types::{GroupId, MoveId, Slot};

/// How long a leader is given to show that it leads.
const CONFIRM_TIMEOUT: Duration = Duration::from_millis(300);

/// The slots that a group serves, each with the move that brought it there.
type Served = BTreeMap<Slot, MoveId>;

/// Which slots each group serves, by leaders that a quorum follows. Each group as at some moment
/// while this ran.
async fn look(hosts: &[Arc<Host>]) -> BTreeMap<GroupId, Served> {
    let mut served = BTreeMap::new();
    for group in hosts
        .iter()
        .flat_map(|host| host.groups())
        .filter(|group| !group.key().group.is_meta() && group.leads())
    {
        if let Some(slots) = served_by(&group).await {
            served.insert(group.key().group, slots);
        }
    }
    served
}

async fn served_by(group: &Replica) -> Option<Served> {
    // The runtime of an ended node says nothing any more.
    let confirmed = tokio::time::timeout(
        CONFIRM_TIMEOUT * 2,
        group.read_barrier(Instant::now() + CONFIRM_TIMEOUT),
    )
    .await;
    confirmed.ok()?.ok()?;
    let states = SlotState::read_all(&group.state().read()).ok()?;
    Some(
        states
            .into_iter()
            .filter(|(_, state)| state.serves_reads())
            .map(|(slot, state)| (slot, state.generation))
            .collect(),
    )
}

/// Looks once. Returns how many slots were found served.
///
/// A slot may be found with two groups when it moved in between. It was with both at a time only if
/// the first has it still, by the same move: a slot comes back by a later one.
///
/// # Errors
///
/// Which slot two groups served.
pub async fn check(hosts: &[Arc<Host>]) -> Result<usize, String> {
    let first = look(hosts).await;
    let mut owners: BTreeMap<Slot, (GroupId, MoveId)> = BTreeMap::new();
    let mut twice = Vec::new();
    for (group, slots) in &first {
        for (slot, id) in slots {
            if let Some((other, other_id)) = owners.insert(*slot, (*group, *id)) {
                twice.push((*slot, (other, other_id), (*group, *id)));
            }
        }
    }
    if twice.is_empty() {
        return Ok(owners.len());
    }
    let second = look(hosts).await;
    let still = |slot: &Slot, (group, id): &(GroupId, MoveId)| {
        second.get(group).and_then(|slots| slots.get(slot)) == Some(id)
    };
    match twice
        .iter()
        .find(|(slot, one, other)| still(slot, one) && still(slot, other))
    {
        Some((slot, one, other)) => Err(format!(
            "slot {slot} is served by two groups: {one:?} and {other:?}"
        )),
        None => Ok(owners.len()),
    }
}
