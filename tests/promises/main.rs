//! The real binary in a real cluster: one file per promise.

mod common;
