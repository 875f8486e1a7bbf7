//! The directory of the map database within a data directory.

use std::path::Path;

use crate::storage::sled_tree::is_condemned;

/// The map database, in the data directory.
pub const MAPS_DIR: &str = "state";

/// Returns true if the next start will set the map database aside, and rebuild every map.
pub fn are_maps_condemned(data_dir: &Path) -> bool {
    is_condemned(&data_dir.join(MAPS_DIR))
}
