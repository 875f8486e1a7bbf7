//! [`Views`]: the newest view that this node knows, the map made of it, and where nodes were found
//! that are not where it says.
//!
//! A view takes the place of an older one only, so that what is read here never goes back. Who
//! sees a view finds the map that goes with it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use crate::api::shard_map::ShardMap;
use crate::raft::transport::{Peer, Resolver};
use crate::sm::cluster::view::View;
use crate::types::{Address, DirectoryId, NodeId, ParseError, PlanEpoch};

/// Plans of which it is remembered how they ended.
const ENDS_MAX: usize = 256;

/// The newest view that this node knows, and the map made of it.
pub struct Views {
    view: watch::Sender<Arc<View>>,
    /// Of the view: asked for with every entry.
    level: AtomicU16,
    map: RwLock<Arc<ShardMap>>,
    /// Addresses of directories of the view that answer elsewhere than it says.
    moved: RwLock<HashMap<DirectoryId, Address>>,
    /// True if there is any: each frame asks.
    any_moved: AtomicBool,
    /// Of the last plans that another has taken the place of: whether everything was as they said
    /// by then.
    ended: Mutex<BTreeMap<PlanEpoch, bool>>,
}

impl Views {
    pub fn new(view: View) -> Self {
        let map = RwLock::new(Arc::new(ShardMap::from_view(&view, |_| None)));
        let level = AtomicU16::new(view.level);
        Self {
            view: watch::Sender::new(Arc::new(view)),
            level,
            map,
            moved: RwLock::default(),
            any_moved: AtomicBool::new(false),
            ended: Mutex::default(),
        }
    }

    /// Notes that a directory runs at this address, as it has shown. Returns true if the view says
    /// another, or none.
    pub fn found_at(&self, directory: DirectoryId, address: &Address) -> bool {
        let view = self.view();
        let Some(node) = view.nodes.values().find(|node| node.directory == directory) else {
            return false;
        };
        let is_elsewhere = node.address != *address;
        let mut moved = self.moved.write();
        match is_elsewhere {
            true => drop(moved.insert(directory, address.clone())),
            false => drop(moved.remove(&directory)),
        }
        self.any_moved.store(!moved.is_empty(), Ordering::Relaxed);
        is_elsewhere
    }

    /// Returns whether lanes to this directory of a member go to another address than this.
    pub fn leads_elsewhere(&self, directory: DirectoryId, address: &Address) -> bool {
        let view = self.view();
        let known = view
            .nodes
            .values()
            .find(|node| node.directory == directory)
            .map(|node| node.address.clone());
        known.is_some_and(|known| self.moved_to(directory).unwrap_or(known) != *address)
    }

    /// Returns where a directory was found that is not where the view says.
    pub fn moved_to(&self, directory: DirectoryId) -> Option<Address> {
        if !self.any_moved.load(Ordering::Relaxed) {
            return None;
        }
        self.moved.read().get(&directory).cloned()
    }

    /// Forgets where nodes were found whose address in the view has changed: that is newer. That a
    /// node was given a place holder is no news of it.
    fn forget_moved(&self, before: &View, after: &View) {
        if !self.any_moved.load(Ordering::Relaxed) {
            return;
        }
        let mut moved = self.moved.write();
        let address_in = |view: &View, directory: &DirectoryId| {
            view.nodes
                .values()
                .find(|node| node.directory == *directory)
                .map(|node| node.address.clone())
        };
        moved.retain(|directory, address| {
            let now = address_in(after, directory);
            let is_same =
                now == address_in(before, directory) || now.as_ref().is_some_and(is_place_holder);
            now.is_some_and(|now| now != *address) && is_same
        });
        self.any_moved.store(!moved.is_empty(), Ordering::Relaxed);
    }

    pub fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    pub fn map(&self) -> Arc<ShardMap> {
        self.map.read().clone()
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// Notes how the plan of a view ended, over which the next plan was accepted.
    pub fn note_end(&self, last: &View) {
        let mut ended = self.ended.lock();
        ended.insert(last.epoch, last.is_settled());
        while ended.len() > ENDS_MAX {
            ended.pop_first();
        }
    }

    /// Returns whether a plan before this one was done when the next took over; none where this
    /// node was not there to see it.
    pub fn was_done(&self, plan: PlanEpoch) -> Option<bool> {
        self.ended.lock().get(&plan).copied()
    }

    /// Takes a view if it is newer than the one known. Returns true if it was.
    pub fn advance(&self, view: View) -> bool {
        let view = Arc::new(view);
        self.view.send_if_modified(|known| {
            if view.version <= known.version {
                return false;
            }
            // With a version in between nobody knows how the one before stood when the plan was
            // accepted.
            if view.version.0 == known.version.0 + 1 && view.epoch > known.epoch {
                self.note_end(known);
            }

            // Before the view: whoever sees the new view finds the map that goes with it.
            *self.map.write() = Arc::new(ShardMap::from_view(&view, |_| None));
            self.level.fetch_max(view.level, Ordering::Relaxed);
            self.forget_moved(known, &view);
            *known = view.clone();
            true
        })
    }
}

impl Resolver for Views {
    fn resolve(&self, node: NodeId) -> Option<Peer> {
        let (address, directory) = {
            let view = self.view.borrow();
            let node = view.nodes.get(&node)?;
            (node.address.clone(), node.directory)
        };
        let address = self.moved_to(directory).unwrap_or(address);
        Some(Peer { address, directory })
    }

    fn level(&self) -> u16 {
        self.level.load(Ordering::Relaxed)
    }
}

/// Suffix of the host of a place holder. Nobody has such a name (RFC 2606).
const PLACE_HOLDER_SUFFIX: &str = ".moving.invalid";

/// Returns the address of a node that has moved and has yet to announce where to.
pub fn place_holder(node: NodeId) -> Result<Address, ParseError> {
    format!("{node}{PLACE_HOLDER_SUFFIX}:1").parse()
}

/// Returns true if nobody can be reached there: it stands for an address to come.
fn is_place_holder(address: &Address) -> bool {
    address.host().ends_with(PLACE_HOLDER_SUFFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::testing::view_of;
    use crate::types::{GroupId, MapVersion};

    #[test]
    fn a_plan_that_was_taken_over_is_told_from_one_that_was_done() {
        let first = view_of(3);
        let next = |view: &View, epochs: u64, versions: u64| View {
            epoch: PlanEpoch(view.epoch.0 + epochs),
            version: MapVersion(view.version.0 + versions),
            ..view.clone()
        };
        let views = Views::new(first.clone());
        let mut running = next(&first, 1, 1);
        let shard = running.groups.get_mut(&GroupId(1)).expect("a shard");
        shard.draining = true;
        assert!(first.is_settled() && !running.is_settled());
        let taken_over = View {
            groups: first.groups.clone(),
            ..next(&running, 1, 1)
        };
        let unseen = next(&taken_over, 1, 5);
        for view in [running.clone(), taken_over.clone(), unseen] {
            assert!(views.advance(view));
        }
        let ended = |view: &View| views.was_done(view.epoch);
        assert_eq!(
            [ended(&first), ended(&running), ended(&taken_over)],
            [Some(true), Some(false), None]
        );

        (0..2 * ENDS_MAX as u64).for_each(|at| views.note_end(&next(&first, 10 + at, 10)));
        assert_eq!(views.ended.lock().len(), ENDS_MAX);
    }
}
