//! What an error of a map says: of the machine, or of the data.

use std::io;

use crate::descriptors;
use crate::sm::ports::StoreError;

/// Returns whether an error is about what the machine has left, or what it allows, and says nothing
/// of the trees.
pub(super) fn is_about_machine(error: &StoreError) -> bool {
    use io::ErrorKind::{
        OutOfMemory, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull, WouldBlock,
    };
    let StoreError::Io { source, .. } = error else {
        return false;
    };
    let kinds = [
        OutOfMemory,
        PermissionDenied,
        QuotaExceeded,
        ReadOnlyFilesystem,
        StorageFull,
        WouldBlock,
    ];
    kinds.contains(&source.kind()) || descriptors::are_exhausted(source)
}
