//! Writes and reads of clients on their way through a replica.
//!
//! - `proposer`: merges concurrent writes into entries, and proposes them.
//! - `read_index`: confirms linearizable reads, many with one ReadIndex request.

pub(super) mod proposer;
pub(super) mod read_index;
