//! [`ReplicaStore`]: what a replica keeps of the entries that it applies. [`SnapshotData`]: what
//! replicas send each other in place of the beginning of the log.

use super::witness_store::WitnessStore;
use crate::storage::ReplicaKey;
use crate::storage::map::{Applied, ReplicaMap};
use crate::storage::snapshot::Snapshot;
use crate::types::ReplicaKind;

/// The state that a replica keeps of the entries that it applies.
pub enum ReplicaStore {
    Map(ReplicaMap),
    /// A witness keeps only how far it is.
    Witness(WitnessStore),
}

impl ReplicaStore {
    pub fn key(&self) -> ReplicaKey {
        match self {
            ReplicaStore::Map(state) => state.key(),
            ReplicaStore::Witness(state) => state.key(),
        }
    }

    /// Returns the kind of the replica.
    pub fn kind(&self) -> ReplicaKind {
        match self {
            ReplicaStore::Map(_) => ReplicaKind::Data,
            ReplicaStore::Witness(_) => ReplicaKind::Witness,
        }
    }

    /// Returns how far entries are applied.
    pub fn applied(&self) -> Applied {
        match self {
            ReplicaStore::Map(state) => state.applied(),
            ReplicaStore::Witness(state) => state.applied(),
        }
    }

    /// Returns the map, if the replica has one.
    pub fn map(&self) -> Option<&ReplicaMap> {
        match self {
            ReplicaStore::Map(state) => Some(state),
            ReplicaStore::Witness(_) => None,
        }
    }

    /// Returns the store of a witness.
    pub fn witness(&self) -> Option<&WitnessStore> {
        match self {
            ReplicaStore::Map(_) => None,
            ReplicaStore::Witness(state) => Some(state),
        }
    }
}

/// The state that replicas send each other in place of the beginning of the log.
#[derive(Debug, Clone)]
pub enum SnapshotData {
    Map(Snapshot),
    /// From a witness, or for one: holds no data.
    Watermark(Applied),
}
