//! The typed client, and the seam that the whole HTTP side stands on: [`store::Store`].

pub mod peer;
pub mod protocol;
pub mod store;
