//! The state of the cluster, which the meta group agrees on.
//!
//! `view` is the agreed state, a plain value; `meta` the commands that change it; `membership`
//! decides the next step of a group's members, and `repair` which nodes are given up and which
//! replicas are replaced. Kept out: drawing up plans (`placement`), and carrying anything out
//! (the node's controllers).

pub mod membership;
pub mod meta;
pub mod repair;
pub mod view;
