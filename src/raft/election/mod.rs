//! Elections, and the fast failover, which is confined to this folder.
//!
//! - `timer`: decides when leaders send heartbeats and when followers campaign.
//! - `liveness`: records when each peer was last heard from, and whether its process has died.
//! - `failover`: makes a replica do what its timer says, and campaign early when the process of its
//!   leader has died.
//! - `leases`: the timings that leases rest on, which peers compare before anything else.
//! - `transfer`: hands a group to another voter, and chooses which.
//! - `step_down`: how a leader whose own node holds it up gives its group to another replica.
//! - `leader_naming`: whom a replica names as its leader, and when that changes.
//! - `leader_discovery`: how a former leader that nobody can connect to finds out who leads.
//! - `counters`: counts campaigns and changes of leaders.

pub(super) mod counters;
mod failover;
mod leader_discovery;
mod leader_naming;
pub(super) mod leases;
pub(super) mod liveness;
pub(super) mod step_down;
pub(super) mod timer;
mod transfer;
