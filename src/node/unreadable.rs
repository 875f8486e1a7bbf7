//! [`tell_unreadable`]: logs that a map can't be read.

use crate::raft::Replica;
use crate::sm::ports::StoreError;
use crate::telemetry::rarely;

/// Logs that a map can't be read, for an operator to look at, unless the replica has just been
/// retired.
pub fn tell_unreadable(group: &Replica, error: &StoreError) {
    if group.state().is_wiped() {
        tracing::debug!("the map of {} is gone: {error}", group.key());
    } else {
        rarely!(error, "the map of {} cannot be read: {error}", group.key());
    }
}
