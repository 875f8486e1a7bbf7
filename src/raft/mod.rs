//! Everything that knows openraft: replicas of groups over the log and the maps of `storage`, and
//! the transport to their peers.
//!
//! A write, step by step:
//! 1. [`Replica::propose`] (`proposal/admission`) checks that it may be written and queues it;
//!    `proposal/proposer` merges the writes that are queued into one entry, encoded once.
//! 2. openraft appends it: `log_store` hands it to the log, whose writer syncs it; at the same time
//! 3. openraft sends it to each follower: `transport/append_stream` turns it into a frame
//!    (`transport/wire`), and the lanes carry it (`transport/lanes`).
//! 4. The follower's lane hands the frame to its [`Registry`], which finds the replica
//!    (`transport/request_handler`); that appends it likewise and answers when it is synced.
//! 5. With a quorum synced it is committed; `state_machine` decodes it, `apply_state` applies it by
//!    the core, and the callers of step 1 are answered.
//!
//! A read: [`Replica::read_barrier`] joins the next ReadIndex round (`proposal/read_index`); then
//! [`Replica::state`] may be read.
//!
//! A leader that fails: `election/timer` decides when to campaign; `election/liveness` and
//! `election/failover` make that soon if the leader's process has died.
//!
//! What holds here: no frame creates a replica; a frame for another cluster, directory, group or
//! replica is refused; every queue is bounded; every wait has a deadline; after an error of a
//! proposal other than `Unknown` the proposal has certainly not been applied. No file imports
//! another in a circle.
//!
//! Kept out: which replicas there should be, where slots are, and HTTP (which mounts
//! [`transport::lanes::serve_lane`]).

mod apply_progress;
mod apply_state;
mod compaction;
mod context;
mod election;
mod errors;
mod fair_budget;
#[cfg(test)]
pub(crate) mod fuzz;
mod log_recovery;
mod log_store;
mod map_hold;
mod membership;
mod proposal;
mod rebuild;
mod registry;
mod replica;
mod replica_store;
mod runtime;
mod scrub;
mod state_machine;
mod status;
#[cfg(test)]
mod tests;
mod timings;
pub mod transport;
mod types;
mod witness;
mod witness_store;

pub use election::counters::ElectionCounters;
pub use election::step_down::ReplicaPosition;
pub use errors::{MembershipError, OpenError, ProposeError, ReadError, TransferError};
pub use fair_budget::{FairBudget, RaftBudgets};
pub use registry::{Registry, RegistryParts};
pub use replica::Replica;
pub use runtime::seed_this_thread;
pub use status::{GroupMembership, Leader, RaftStatus, ReplicaWatch, Role};
pub use timings::{LeaseReads, RaftTimings};
pub use transport::wire::{PeerRefusal, WireError};
pub use witness::WitnessReplica;
