//! Everything that knows openraft: replicas of groups over the log and the maps of `storage`, and
//! the way to their peers.
//!
//! A write, step by step:
//! 1. [`Replica::propose`] queues it; the `proposer` merges what waits into one entry, encoded
//!    once.
//! 2. openraft appends it: the `log_store` hands it to the log, whose writer syncs it; at the same
//!    time
//! 3. openraft sends it to each follower: a `network` client turns it into a frame (`wire`), and
//!    the `lanes` carry it.
//! 4. The follower's lane hands the frame to its [`Registry`], which finds the replica (`frames`);
//!    that appends it likewise and answers when it is synced.
//! 5. With a quorum synced it is committed; the `state_machine` decodes it, applies it by the core,
//!    and answers the callers of step 1.
//!
//! A read: [`Replica::read_barrier`] joins the next round of `reads`; then [`Replica::state`] may
//! be read.
//!
//! What holds here: no frame creates a replica; a frame for another cluster, directory, group or
//! replica is refused; every queue is bounded; every wait has a deadline; an error of a proposal
//! other than `Unknown` means that it certainly did not happen. Kept out: which replicas there
//! should be, where slots are, and HTTP (which mounts [`lanes::serve_lane`]).

mod elections;
mod errors;
mod feeds;
mod fit;
mod frames;
mod group;
pub mod lanes;
mod log_store;
mod membership;
mod network;
mod pace;
mod proposer;
mod pulse;
mod reads;
mod rebuild;
mod registry;
mod room;
mod runtime;
mod scrub;
mod snapshots;
mod state_machine;
mod status;
mod step_down;
mod successor;
#[cfg(test)]
mod tests;
mod timings;
pub mod transport;
mod types;
mod wire;
mod witness;

pub use elections::Elections;
pub use errors::{MembershipError, OpenError, ProposeError, ReadError, TransferError};
pub use group::Replica;
pub use registry::{Registry, RegistryParts};
pub use room::{FairBudget, RaftBudgets};
pub use runtime::seed_this_thread;
pub use status::{GroupMembership, Leader, RaftStatus, ReplicaWatch, Role};
pub use step_down::ReplicaProgress;
pub use timings::{LeaseReads, RaftTimings};
pub use wire::{PeerRefusal, WireError};
pub use witness::WitnessReplica;
