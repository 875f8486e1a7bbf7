//! What runs: how a node comes to belong to a cluster, makes its groups match the view, and answers for the shards that it leads.
pub mod bootstrap;
pub mod join;
