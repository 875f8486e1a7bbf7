//! [`AddressBook`]: the nodes that a remote client asks for the map, in which order, and by which
//! of their two addresses.
//!
//! Every look at the cluster begins with another node, so that none whose map stands still (it is
//! cut off, or was removed and has not heard of it) is believed for long; one that did not answer a
//! moment ago comes last. Nothing here is a promise: every address may be wrong.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::api::shard_map::{NodePlace, ShardMap};
use crate::types::Address;

/// Time for which a node that did not answer is asked last.
const SUSPECT_FOR: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct AddressBook {
    /// The addresses that the client was started with.
    seeds: Vec<Address>,
    /// Nodes are called by what their peers call them, not by what clients are sent to.
    is_among_peers: AtomicBool,
    turn: AtomicUsize,
    suspects: Mutex<BTreeMap<Address, Instant>>,
}

impl AddressBook {
    pub fn new(seeds: Vec<Address>) -> Self {
        Self {
            seeds,
            is_among_peers: AtomicBool::new(false),
            turn: AtomicUsize::new(0),
            suspects: Mutex::default(),
        }
    }

    /// Sees by which of their addresses the nodes are known here: who was told a node's address
    /// among its peers, or was answered there, can follow the others'.
    pub fn learn(&self, map: &ShardMap, teller: &Address) {
        let is_known = |address: &Address| address == teller || self.seeds.contains(address);
        let told = |address: fn(&NodePlace) -> &Address| {
            map.nodes().any(|(_, node)| is_known(address(node)))
        };
        let (as_peer, as_public) = (told(|node| &node.address), told(|node| &node.public));
        // Once all nodes that it was started with are replaced, neither is: what was seen before
        // still holds.
        if as_peer != as_public {
            self.is_among_peers.store(as_peer, Ordering::Relaxed);
        }
    }

    /// Returns the address by which to reach a node.
    pub fn address<'a>(&self, node: &'a NodePlace) -> &'a Address {
        if self.is_among_peers.load(Ordering::Relaxed) {
            &node.address
        } else {
            &node.public
        }
    }

    /// Returns the address by which to reach the node that others are sent to by this name.
    pub fn of_name(&self, map: &ShardMap, name: Address) -> Address {
        map.node_named(&name)
            .and_then(|node| map.node(node))
            .map_or(name, |node| self.address(node).clone())
    }

    /// Returns every node that may answer for the cluster, each once, in the order to ask them:
    /// those of the map, then the seeds.
    pub fn members(&self, map: Option<&ShardMap>) -> Vec<Address> {
        let mapped: Vec<&NodePlace> = map
            .iter()
            .flat_map(|map| map.nodes())
            .map(|(_, node)| node)
            .collect();
        let mut members: Vec<Address> = mapped
            .iter()
            .map(|node| self.address(node).clone())
            .collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);

        // Another node each time, so that none with an old map is believed for long.
        rotate(&mut members, turn);

        // A seed is in the map under either of its addresses, and would be asked twice.
        let is_mapped = |seed: &Address| {
            mapped
                .iter()
                .any(|node| node.address == *seed || node.public == *seed)
        };
        let mut seeds: Vec<Address> = self
            .seeds
            .iter()
            .filter(|seed| !is_mapped(seed))
            .cloned()
            .collect();
        rotate(&mut seeds, turn);
        members.extend(seeds);
        let suspects = self.suspects.lock();

        // The sort is stable: the order of the turn stays among those that answer.
        members.sort_by_key(|member| {
            suspects
                .get(member)
                .is_some_and(|since| since.elapsed() < SUSPECT_FOR)
        });
        members
    }

    /// Notes that a node was asked, and could not be reached, or could not tell.
    pub fn was_silent(&self, address: &Address) {
        let mut suspects = self.suspects.lock();
        suspects.retain(|_, since| since.elapsed() < SUSPECT_FOR);
        suspects.insert(address.clone(), Instant::now());
    }

    pub fn has_answered(&self, address: &Address) {
        self.suspects.lock().remove(address);
    }
}

fn rotate(addresses: &mut [Address], turn: usize) {
    if let Some(by) = turn.checked_rem(addresses.len()) {
        addresses.rotate_left(by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::status;

    fn address(text: &str) -> Address {
        text.parse().expect("an address")
    }

    /// A map of nodes 10.0.0.N:1, which clients call as `public` says.
    fn map(public: fn(usize) -> String) -> ShardMap {
        let peers: Vec<Address> = (0..3)
            .map(|node| address(&format!("10.0.0.{node}:1")))
            .collect();
        let mut status = status(1, Some(0), &peers);
        for (at, node) in status.nodes.iter_mut().enumerate() {
            node.public_address = address(&public(at));
        }
        ShardMap::from_status(&status)
    }

    fn texts(addresses: &[Address]) -> Vec<&str> {
        addresses.iter().map(Address::as_str).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_take_turns_and_silent_ones_come_last_for_a_while() {
        let book = AddressBook::new(vec![address("a:1"), address("b:2"), address("c:3")]);
        assert_eq!(texts(&book.members(None)), ["a:1", "b:2", "c:3"]);
        assert_eq!(texts(&book.members(None)), ["b:2", "c:3", "a:1"]);
        book.was_silent(&address("c:3"));
        assert_eq!(texts(&book.members(None)), ["a:1", "b:2", "c:3"]);
        tokio::time::advance(SUSPECT_FOR).await;
        book.members(None);
        book.members(None);
        assert_eq!(texts(&book.members(None)), ["c:3", "a:1", "b:2"]);
        book.was_silent(&address("a:1"));
        book.has_answered(&address("a:1"));
        assert_eq!(texts(&book.members(None)), ["a:1", "b:2", "c:3"]);
    }

    #[tokio::test]
    async fn the_map_comes_before_the_seeds_and_names_no_node_twice() {
        let map = map(|node| format!("node-{node}:1"));
        let book = AddressBook::new(vec![
            address("old:9"),
            address("node-1:1"),
            address("10.0.0.2:1"),
        ]);
        assert_eq!(
            texts(&book.members(Some(&map))),
            ["node-0:1", "node-1:1", "node-2:1", "old:9"]
        );
    }

    #[tokio::test]
    async fn who_was_told_an_address_among_peers_goes_on_with_those() {
        let with_publics = map(|node| format!("127.0.0.1:1380{node}"));
        let book = AddressBook::new(vec![address("10.0.0.1:1")]);
        book.learn(&with_publics, &address("10.0.0.1:1"));
        assert_eq!(
            book.of_name(&with_publics, address("127.0.0.1:13802"))
                .as_str(),
            "10.0.0.2:1"
        );
        // All nodes that it was started with are replaced.
        let replaced = map(|node| format!("127.0.0.1:1390{node}"));
        let later = AddressBook::new(vec![address("10.0.0.9:1")]);
        later.learn(&replaced, &address("10.0.0.0:1"));
        assert_eq!(
            texts(&later.members(Some(&replaced))),
            ["10.0.0.0:1", "10.0.0.1:1", "10.0.0.2:1", "10.0.0.9:1"]
        );
        let outside = AddressBook::new(vec![address("127.0.0.1:13801")]);
        outside.learn(&with_publics, &address("127.0.0.1:13801"));
        assert_eq!(
            outside
                .of_name(&with_publics, address("127.0.0.1:13802"))
                .as_str(),
            "127.0.0.1:13802"
        );
        assert_eq!(
            outside.of_name(&with_publics, address("gone:1")).as_str(),
            "gone:1"
        );
    }
}
