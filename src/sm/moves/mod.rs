//! A slot move: everything that takes slots from a source shard to a destination shard.
//!
//! `command` has the entries of a move, their outcomes, and what a shard stores of an open move.
//! `source`, `destination` and `clear` apply them, by what is decided alike at both sides
//! (`decision`); `chunk` reads at the source for the destination.
//! `observed` tells how far a shard is with a move, and `step` decides what comes next. Kept out:
//! proposing the steps, which the node's controller does.

mod chunk;
pub(in crate::sm) mod clear;
pub(in crate::sm) mod command;
mod decision;
pub(in crate::sm) mod destination;
pub(in crate::sm) mod observed;
pub(in crate::sm) mod source;
mod step;
#[cfg(test)]
pub(in crate::sm) mod tests;

pub use self::chunk::{Chunk, final_contents, move_chunk};
pub use self::command::{
    Install, InstallProgress, MoveCommand, MoveOutcome, MovePhase, MoveRejection, OpenMove,
};
pub use self::observed::{
    CHANGES_BYTES_MAX, DestinationState, Remaining, SourceState, destination_state, leftovers,
    source_state,
};
pub use self::step::{
    AbortReason, CLEAR_KEYS_MAX, Move, MoveLimits, MoveSide, MoveStep, MoveWait, next_step,
};
