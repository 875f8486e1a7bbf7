//! Writes and reads of clients on their way through a replica.
//!
//! - `admission`: what a replica checks before it takes a proposal or a read.
//! - `proposer`: merges concurrent writes into entries, and proposes them.
//! - `read_index`: confirms linearizable reads, many with one ReadIndex request.

mod admission;
pub(super) mod proposer;
pub(super) mod read_index;
