//! The developers' side of Quorate. Nothing of it is in the program that is shipped.
//!
//! - [`history`] and [`linearizable`]: records of what clients asked and were answered, and the
//!   checker that judges them.
//! - [`revisions`]: what the revisions of a slot tell of all its keys together.
//! - [`campaign`]: seeds and settings of tests with randomness.
//! - [`exposition`]: a strict reader of metrics.
//! - `tests/crash_matrix`: whole nodes in one process, ended after every step of a view change.
//! - `src/main.rs` and `src/world`, the binary `quorate-sim`: whole nodes in one thread, in a world
//!   that follows from one seed. It is built by `scripts/simulate.sh`, since it needs the unstable
//!   features of tokio.

pub mod campaign;
pub mod exposition;
pub mod history;
pub mod linearizable;
pub mod revisions;
