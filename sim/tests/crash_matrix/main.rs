//! Whole nodes of a cluster in one process, over simulated disks, while the view changes: one is
//! ended after a given step, and starts again from its disk. What is held: every change comes to
//! its end, no acknowledged write is lost, and no slot is ever served twice.
//!
//! Everything of a node is what runs in production, and so is the way between nodes; only disk and
//! database are simulated, so that what was not synced is lost. Steps are counted over all nodes,
//! in the order in which they are taken, so the same number may be another step in another run:
//! time is the real one. All of it, every kind of change with every victim after every step:
//!
//! `QUORATE_STEPS=all cargo test -p quorate-sim --test crash_matrix steps -- --nocapture`, or with
//! the name of a kind of change; `QUORATE_STEPS_FROM=n` to begin later, `QUORATE_STEPS_AT_ONCE=n`
//! for how many clusters run at a time.

mod agreement;
mod case;
mod descriptors;
mod failing;
mod frozen;
mod history;
mod host;
mod levels;
mod machine;
mod old_view;
mod operators;
mod probe;
mod retired;
mod steps;
mod strangers;
mod supervision;
