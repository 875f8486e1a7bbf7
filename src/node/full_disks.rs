//! [`FullDisks`]: which nodes say that their disks are nearly full.
//!
//! A node says so to every other node of the view, again and again as long as it is so, and once
//! when it is so no more (`disk_watch`). A leader then knows when a majority of its shard's voters
//! could not take an entry, and refuses writes rather than have them end as unknown. Nodes with
//! room say nothing, so a healthy cluster pays nothing.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::sm::cluster::view::View;
use crate::sm::disk_level::DiskLevel;
use crate::types::{DirectoryId, NodeId};

/// TTL of a report: it counts no more unless it is repeated.
const REPORT_LASTS: Duration = Duration::from_secs(10);

/// Levels of the disks of other nodes, as they said lately.
#[derive(Default)]
pub struct FullDisks(Mutex<BTreeMap<NodeId, (DiskLevel, Instant)>>);

impl FullDisks {
    /// Takes the report of the node with that directory. Returns false if the view has none.
    pub fn take(&self, view: &View, directory: DirectoryId, level: DiskLevel) -> bool {
        let mut nodes = view.nodes.iter();
        let Some((node, _)) = nodes.find(|(_, node)| node.directory == directory) else {
            return false;
        };
        let mut reports = self.0.lock();
        reports.retain(|_, (_, at)| at.elapsed() < REPORT_LASTS);
        if level == DiskLevel::Ample {
            reports.remove(node);
        } else {
            reports.insert(*node, (level, Instant::now()));
        }
        true
    }

    /// Returns how full the disk of a node is; one that has said nothing lately has room.
    pub fn level_of(&self, node: NodeId) -> DiskLevel {
        match self.0.lock().get(&node) {
            Some((level, at)) if at.elapsed() < REPORT_LASTS => *level,
            Some(_) | None => DiskLevel::Ample,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::testing::view_of;

    #[tokio::test(start_paused = true)]
    async fn what_was_not_repeated_or_was_taken_back_counts_no_more() {
        let view = view_of(3);
        let id_of = |directory: u128| {
            let mut nodes = view.nodes.iter();
            let found = nodes.find(|(_, node)| node.directory == DirectoryId(directory));
            *found.expect("a node").0
        };
        let disks = FullDisks::default();
        assert!(!disks.take(&view, DirectoryId(77), DiskLevel::Low));
        assert!(disks.take(&view, DirectoryId(1), DiskLevel::Low));
        assert!(disks.take(&view, DirectoryId(2), DiskLevel::Spent));
        let levels = || [1, 2, 3].map(|directory| disks.level_of(id_of(directory)));
        use DiskLevel::{Ample, Low, Spent};
        assert_eq!(levels(), [Low, Spent, Ample]);
        assert!(disks.take(&view, DirectoryId(1), Ample));
        assert_eq!(levels(), [Ample, Spent, Ample]);
        tokio::time::sleep(REPORT_LASTS).await;
        assert_eq!(levels(), [Ample; 3]);
    }
}
