//! [`Fault`]: what may go wrong in a world, and how it strikes.
//!
//! `run` says when, and heals what is left of it.

use quorate::api::view_change::{ReplicationFactor, Shards, ViewChange};

use quorate::raft::{RaftStatus, Role};
use quorate::types::GroupId;

use super::host::{End, Host};
use super::run::{Event, World};

/// Names what may go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Fault {
    /// A process is killed, and started again.
    Kill,
    /// The power of a machine fails, and comes back.
    Power,
    /// A process stands still for a while.
    Pause,
    /// Links are cut: one machine off, a partition, one way only.
    Partition,
    /// Links are slow.
    Slow,
    /// A connection breaks.
    Reset,
    /// Connections break while something is on its way, and what may be repeated is.
    Flaky,
    /// A sync fails.
    DiskSync,
    /// Syncs, and all else that waits for a disk, take long.
    DiskSlow,
    /// A disk is full, and has room again later.
    DiskFull,
    /// A bit rots of what one node has.
    Rot,
    /// A node comes back with an empty disk.
    LostDisk,
    /// A node comes back with its disk as it was some time ago.
    OldCopy,
    /// The view is changed.
    View,
}

impl Fault {
    /// Strike where nothing is named. The others are younger, and not every life with them is clean
    /// yet.
    pub const USUAL: [Fault; 7] = [
        Fault::Kill,
        Fault::Power,
        Fault::Pause,
        Fault::Partition,
        Fault::Slow,
        Fault::Reset,
        Fault::View,
    ];
}

impl World {
    pub(super) fn resume(&mut self, index: usize, since_ms: u64) {
        if std::mem::take(&mut self.paused[index]) {
            self.tell(&format!("resume node {index}"));
            self.hosts[index].jump(self.now_ms - since_ms);
        }
    }

    pub(super) fn strike(&mut self, fault: Fault) {
        let nodes = self.hosts.len();
        let index = self.random.below(nodes as u64) as usize;
        match fault {
            Fault::Kill | Fault::Power => {
                if !self.hosts[index].is_up() || self.paused[index] {
                    return;
                }
                let end = match fault {
                    Fault::Power => End::PowerCut,
                    _ => End::Kill,
                };
                // Power may fail for all at once.
                let is_blackout = fault == Fault::Power && self.random.percent(30);
                let struck = match is_blackout {
                    true => 0..nodes,
                    false => index..index + 1,
                };
                for index in struck {
                    if self.hosts[index].is_up() && !self.paused[index] {
                        self.tell(&format!("{end:?} node {index}"));
                        self.hosts[index].end(end);
                        let down_ms = self.random.between(50, 6000);
                        self.plan(down_ms, Event::Restart(index));
                    }
                }
            }
            Fault::Pause => {
                if !self.hosts[index].is_up() || self.paused[index] {
                    return;
                }
                self.tell(&format!("pause node {index}"));
                self.paused[index] = true;
                let pause_ms = self.random.between(20, 5000);
                self.plan(pause_ms, Event::Resume(index, self.now_ms));
            }
            Fault::Partition => self.partition(index),
            Fault::Slow => {
                self.tell(&format!("slow links of node {index}"));
                for other in 0..nodes {
                    self.network.slow_down(index, other);
                    self.network.slow_down(other, index);
                }
                let slow_ms = self.random.between(200, 4000);
                self.plan(slow_ms, Event::Heal);
            }
            Fault::Reset => {
                if !self.network.reset_one() {
                    return;
                }
                self.tell("reset a connection");
            }
            Fault::Flaky => {
                self.tell(&format!("connections of node {index} are flaky"));
                self.network.make_flaky(index);
                let flaky_ms = self.random.between(200, 4000);
                self.plan(flaky_ms, Event::Heal);
            }
            Fault::DiskSync | Fault::DiskSlow | Fault::DiskFull => self.trouble(fault, index),
            Fault::Rot | Fault::LostDisk | Fault::OldCopy => {
                if !self.take_away(fault, index) {
                    return;
                }
            }
            Fault::View => self.change_view(),
        }
        self.life.faults += u64::from(fault != Fault::View);
    }

    fn partition(&mut self, index: usize) {
        let nodes = self.hosts.len();
        let kind = self.random.below(4);
        let other = (index + 1 + self.random.below(nodes as u64 - 1) as usize) % nodes;
        match kind {
            0 => {
                self.tell(&format!("cut node {index} off"));
                for other in (0..nodes).filter(|other| *other != index) {
                    self.network.cut(index, other);
                    self.network.cut(other, index);
                }
            }
            1 => {
                self.tell(&format!("cut what node {index} sends"));
                for other in (0..nodes).filter(|other| *other != index) {
                    self.network.cut(index, other);
                }
            }
            2 => {
                self.tell(&format!("cut between node {index} and node {other}"));
                self.network.cut(index, other);
                self.network.cut(other, index);
            }
            _ => {
                self.tell(&format!("cut from node {index} to node {other}"));
                self.network.cut(index, other);
            }
        }
        let cut_ms = self.random.between(100, 8000);
        self.plan(cut_ms, Event::Heal);
    }

    fn change_view(&mut self) {
        let nodes = self.hosts.len();
        let change = match self.random.below(4) {
            0 => ViewChange {
                shards: Some(Shards::Fixed(self.random.between(1, 6) as u16)),
                ..ViewChange::default()
            },
            1 => ViewChange {
                replication_factor: Some(ReplicationFactor::Fixed(
                    *self.random.pick(&[1, 2, 3, 3]),
                )),
                ..ViewChange::default()
            },
            _ => {
                let leaves_out = self.random.below(nodes as u64) as usize;
                let named = (0..nodes)
                    .filter(|index| nodes <= 3 || *index != leaves_out)
                    .map(|index| self.hosts[index].address.clone());
                ViewChange {
                    nodes: Some(named.collect()),
                    ..ViewChange::default()
                }
            }
        };
        self.tell(&format!("change the view: {change:?}"));
        let accepted = self.clients.change(change);
        self.changes.push(accepted);
    }

    /// Has something be wrong with a disk for a while.
    fn trouble(&mut self, fault: Fault, index: usize) {
        self.tell(&format!("{fault:?} at node {index}"));
        let disk = &mut self.hosts[index].disk;
        match fault {
            Fault::DiskSync => return disk.fail_sync(),
            Fault::DiskFull => disk.fill(),
            _ => disk.slow_down(),
        }
        let troubled_ms = self.random.between(200, 8000);
        self.plan(troubled_ms, Event::HealDisk(index));
    }

    /// Takes something away from a node that the others can give back. Returns whether it did, or
    /// has begun to.
    fn take_away(&mut self, fault: Fault, index: usize) -> bool {
        let copied_at = self.hosts[index].disk.copied_at();
        let is_first_copy = fault == Fault::OldCopy && copied_at.is_none();
        if is_first_copy {
            // Only a later start tells it from the original.
            self.tell(&format!("copy the disk of node {index}"));
            let start = self.hosts[index].starts();
            self.hosts[index].disk.keep_copy(start);
            let until_kill_ms = self.random.between(50, 1500);
            let until_ms = until_kill_ms + self.random.between(1500, 5000);
            self.plan(until_kill_ms, Event::KillForCopy(index));
            self.plan(until_ms, Event::PutBack(index));
            return true;
        }
        if fault == Fault::OldCopy || !self.can_do_without(index) {
            return false;
        }
        match fault {
            Fault::Rot => {
                // A process reads nothing of the disk a second time, and a page of a tree
                // has a checksum there, which the trees of a simulation lack: only a start finds
                // what has rotted in them.
                let is_tree = self.random.percent(30);
                if is_tree {
                    self.hosts[index].end(End::Kill);
                    let down_ms = self.random.between(50, 3000);
                    self.plan(down_ms, Event::Restart(index));
                }
                let Some(kind) = self.hosts[index].disk.rot(is_tree) else {
                    return false;
                };
                self.tell(&format!("a {kind:?} of node {index} rots"));
            }
            _ => {
                self.tell(&format!("node {index} loses its disk"));
                self.hosts[index].end(End::PowerCut);
                self.hosts[index].disk.lose();
                let down_ms = self.random.between(50, 6000);
                self.plan(down_ms, Event::Restart(index));
            }
        }
        self.is_wounded = true;
        true
    }

    /// Ends a process whose disk was copied, so that it goes on from another start.
    pub(super) fn kill_for_copy(&mut self, index: usize) {
        if self.hosts[index].is_up() && !self.paused[index] {
            self.tell(&format!("Kill node {index}"));
            self.hosts[index].end(End::Kill);
            self.plan(50, Event::Restart(index));
        }
    }

    pub(super) fn put_back(&mut self, index: usize) {
        let Some(copied_at) = self.hosts[index].disk.copied_at() else {
            return;
        };
        // A peer that has heard of no later start has nothing against it, as docs say.
        let is_known = self.hosts[index].starts() > copied_at && self.is_heard_by_all(index);
        if !is_known || !self.can_do_without(index) {
            return;
        }
        self.tell(&format!("put back the copy of the disk of node {index}"));
        self.hosts[index].end(End::Kill);
        self.hosts[index].disk.put_back();
        self.is_wounded = true;
        self.plan(50, Event::Restart(index));
    }

    /// A person gives an empty disk to a node that does not start from what it has.
    pub(super) fn give_another_disk_if_damaged(&mut self, index: usize, why: &str) {
        if self.hosts[index].disk.is_rotten() && why.contains("damaged") {
            self.tell(&format!("give node {index} an empty disk"));
            self.hosts[index].disk.lose();
        }
    }

    /// Returns whether nodes that are well know all that this one knows: nothing was lost before,
    /// all run, and each group with a replica here has two more voters at least, in a membership
    /// that does not change just now.
    fn can_do_without(&self, index: usize) -> bool {
        if self.is_wounded || !self.setting.is_replaced_soon() {
            return false;
        }
        let are_all_well =
            self.hosts.iter().enumerate().all(|(other, host)| {
                host.is_up() && !self.paused[other] && !host.disk.is_troubled()
            });
        let Some(node) = self.hosts[index].node_id() else {
            return false;
        };
        let leaders = self.leaders();
        let has_leader = |group: GroupId| leaders.iter().any(|status| status.key.group == group);
        let mut here = self.hosts[index].replicas().into_iter();
        are_all_well
            && here.all(|key| has_leader(key.group))
            && leaders.iter().all(|status| {
                let membership = &status.membership;
                let is_here = membership.voters.values().any(|voter| *voter == node)
                    || membership.learners.values().any(|learner| *learner == node);
                !is_here || membership.is_uniform && membership.voters.len() >= 3
            })
    }

    /// Tells the state of each group, for whoever looks for what was wrong.
    pub(super) fn tell_leaders(&mut self) {
        for status in self.leaders() {
            let membership = &status.membership;
            self.tell(&format!(
                "{} leads in term {}: log to {:?}, committed {:?}, matched {:?}; voters {:?}, \
                 learners {:?}, witnesses {:?}, uniform: {}; a quorum answered {:?} ago",
                status.key,
                status.term,
                status.last_log,
                status.committed,
                status.matched,
                membership.voters,
                membership.learners,
                membership.witnesses,
                membership.is_uniform,
                status.quorum_acked
            ));
        }
    }

    /// Returns the state of each group as its leader has it. Groups without a leader are missing.
    fn leaders(&self) -> Vec<RaftStatus> {
        let replicas = self.hosts.iter().flat_map(Host::groups);
        let statuses = replicas.map(|replica| replica.status());
        statuses
            .filter(|status| status.role == Role::Leader)
            .collect()
    }

    /// Returns whether the last start of a node has been heard of by all others.
    fn is_heard_by_all(&self, index: usize) -> bool {
        let Some(node) = self.hosts[index].node_id() else {
            return false;
        };
        let others = self.hosts.iter().filter(|host| host.index != index);
        others
            .filter_map(Host::node)
            .filter_map(|other| other.registry())
            .all(|registry| !registry.is_disconnected(node))
    }
}
