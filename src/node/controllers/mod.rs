//! The controllers: tasks that make what runs match the view, each for one thing, again and again.
//!
//! They share a [`NodeContext`](crate::node::context::NodeContext) and nothing else. A controller
//! makes a round, waits, and is ended by its shutdown token; what it decides is decided in `sm`.

pub mod agreement;
pub mod disk_watch;
pub mod failure_reporter;
pub mod group_tasks;
pub mod leader_placement;
pub mod levels;
pub mod log_compactor;
pub mod map_compactor;
pub mod membership;
pub mod node_replacement;
pub mod reachability_probe;
pub mod reconciler;
pub mod replica_opener;
pub mod scrub;
pub mod slot_moves;
pub mod view_refresh;
pub mod view_replicas;
pub mod watchdog;
