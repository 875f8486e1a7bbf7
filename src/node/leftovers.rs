//! Clears a directory of the data of another cluster, or of an earlier life in this one.
//!
//! A node that was retired stamps its directory, forgets its replicas and waits as a spare. It may
//! be killed between the two, and it may join another cluster, whose groups and replicas have the
//! same small numbers: votes, entries and maps that are left would pass for its own. So a directory
//! that is not stamped a member is looked at before anything in it is opened. A small file,
//! `owner`, says for which cluster it was cleared since its stamp was written; where that is
//! another, or there is none, it is cleared first:
//! - of another cluster nothing is kept, not even which ids were used: the log is removed, file by
//!   file;
//! - of this one the log keeps which ids were used, and forgets all replicas.
//!
//! A retirement that was cut short is finished by the next start, also if the node is to wait for
//! long. Maps, snapshots and marks of replicas that the log does not have are removed at every
//! start. The file is written last, so what a crash cuts short is done again; and with it there,
//! what is found belongs to the cluster that is joined, and is kept.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::StartError;
use crate::storage::directory::Stamp;
use crate::storage::disk::Disk;
use crate::storage::log::{self, Log, LogOptions, LogWriter, OpenLogError};
use crate::storage::map::MapStore;
use crate::storage::sealed;
use crate::types::{ClusterId, NodeId};

const LOG: &str = "log";
const OWNER: &str = "owner";
/// The newest format of the file that this version reads, and the one that it writes.
const FORMAT: u64 = 1;

/// For which cluster a directory was cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct OwnerFile {
    cluster: ClusterId,
    /// The cluster that it had left by its stamp then. Where the stamp says something else now,
    /// this file is out of date.
    left: Option<LeftCluster>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct LeftCluster {
    cluster: ClusterId,
    node: NodeId,
}

/// Data that must go before a directory serves a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clearing {
    Nothing,
    /// The replicas of an earlier life in the same cluster.
    Replicas,
    Everything,
}

/// Decides what must go, by the stamp and by what the file says.
fn clearing(stamp: &Stamp, cluster: ClusterId, owner: Option<OwnerFile>) -> Clearing {
    if matches!(stamp, Stamp::Member { .. }) {
        return Clearing::Nothing;
    }
    let left = left(stamp);
    match (owner.filter(|owner| owner.left == left), left) {
        (Some(owner), _) if owner.cluster == cluster => Clearing::Nothing,
        (Some(_), _) => Clearing::Everything,
        (None, Some(left)) if left.cluster == cluster => Clearing::Replicas,
        (None, Some(_)) => Clearing::Everything,
        // Never in a cluster, or of an earlier version that was ended before it could stamp itself
        // a member: of this one, then.
        (None, None) => Clearing::Nothing,
    }
}

fn left(stamp: &Stamp) -> Option<LeftCluster> {
    match stamp {
        Stamp::Retired { cluster, node, .. } => Some(LeftCluster {
            cluster: *cluster,
            node: *node,
        }),
        Stamp::Fresh | Stamp::Promised { .. } | Stamp::Founding { .. } | Stamp::Member { .. } => {
            None
        }
    }
}

/// Returns whether the directory was cleared, for whichever cluster, since this stamp was written.
///
/// # Errors
///
/// When the file can't be read.
pub fn is_cleared(disk: &dyn Disk, directory: &Path, stamp: &Stamp) -> Result<bool, StartError> {
    let owner: Option<OwnerFile> =
        sealed::read(disk, &directory.join(OWNER), FORMAT).map_err(sealed_error)?;
    Ok(owner.is_some_and(|owner| owner.left == left(stamp)))
}

/// Says that the directory was cleared for `cluster` since this stamp was written; durable when it
/// returns.
///
/// # Errors
///
/// When the disk fails.
pub fn note_cleared(
    disk: &dyn Disk,
    directory: &Path,
    stamp: &Stamp,
    cluster: ClusterId,
) -> Result<(), StartError> {
    let owner = OwnerFile {
        cluster,
        left: left(stamp),
    };
    sealed::write(disk, directory, OWNER, FORMAT, &owner).map_err(sealed_error)
}

/// Opens the log of a directory that is to serve `cluster`, with nothing of another life in it.
/// Blocking: reads the log back.
///
/// # Errors
///
/// When the disk fails or the log is damaged. What was begun is done again by the next start.
pub fn open_log(
    disk: &Arc<dyn Disk>,
    directory: &Path,
    stamp: &Stamp,
    cluster: ClusterId,
    options: LogOptions,
) -> Result<(Log, LogWriter), StartError> {
    let owner: Option<OwnerFile> =
        sealed::read(&**disk, &directory.join(OWNER), FORMAT).map_err(sealed_error)?;
    let path = directory.join(LOG);
    let clearing = clearing(stamp, cluster, owner);

    // Another cluster has groups with the same ids: its log must not be read as this one's.
    if clearing == Clearing::Everything {
        tracing::info!("this directory served another cluster: what is left of that is removed");
        let failed = |source| OpenLogError::Io {
            context: format!("remove the log in {}", path.display()),
            source,
        };
        log::discard(disk.clone(), &path).map_err(failed)?;
    }

    let (log, mut writer) = Log::open(disk.clone(), &path, options)?;
    if clearing == Clearing::Replicas && !log.replicas().is_empty() {
        tracing::info!("this node was retired: the replicas that it had are forgotten");
        forget_all(&log, &mut writer)?;
    }

    // Noted only now, so that a start that is cut short before clears again.
    if owner
        != Some(OwnerFile {
            cluster,
            left: left(stamp),
        })
        && !matches!(stamp, Stamp::Member { .. })
    {
        note_cleared(&**disk, directory, stamp, cluster)?;
    }
    Ok((log, writer))
}

fn forget_all(log: &Log, writer: &mut LogWriter) -> Result<(), StartError> {
    for key in log.replicas() {
        log.wipe(key, Box::new(drop));
    }

    // The writer has no thread yet: what waits for it is written here.
    while writer.pump() {}
    match &*log.failed().borrow() {
        None => Ok(()),
        Some(failure) => {
            let source = io::Error::new(failure.kind, failure.clone());
            Err(OpenLogError::Io {
                context: "forget the replicas of an earlier life".to_owned(),
                source,
            }
            .into())
        }
    }
}

/// Removes what the maps hold of replicas that the log does not have.
///
/// # Errors
///
/// When the disk or the database fails.
pub fn clear_maps(log: &Log, states: &MapStore) -> Result<(), StartError> {
    let known: BTreeSet<_> = log.replicas().into_iter().collect();
    Ok(states.keep_only(&known)?)
}

fn sealed_error(error: sealed::SealedError) -> StartError {
    StartError::Directory(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sm::cluster::view::View;
    use crate::sm::ports::WriteBatch;
    use crate::sm::testing::view_of;
    use crate::storage::ReplicaKey;
    use crate::storage::log::{Expect, Vote};
    use crate::storage::map::{Applied, MapOptions, OnSynced, Origin, Synced};
    use crate::storage::mem_trees::{Crash, MemTrees};
    use crate::storage::sim_disk::SimDisk;
    use crate::types::{GroupId, LogId, ReplicaId};

    const DIRECTORY: &str = "/data";
    const META: ReplicaKey = ReplicaKey {
        group: GroupId(0),
        replica: ReplicaId(1),
    };
    const WITNESS: ReplicaKey = ReplicaKey {
        group: GroupId(1),
        replica: ReplicaId(2),
    };
    const LATER: ReplicaKey = ReplicaKey {
        group: GroupId(0),
        replica: ReplicaId(9),
    };

    struct AlwaysSynced;

    impl Synced for AlwaysSynced {
        fn on_synced(&self, _log_id: LogId, done: OnSynced) {
            done(Ok(()));
        }
    }

    fn retired(cluster: u128) -> Stamp {
        Stamp::Retired {
            cluster: ClusterId(cluster),
            node: NodeId(3),
            members: Vec::new(),
        }
    }

    fn open(
        disk: &SimDisk,
        trees: &MemTrees,
        stamp: &Stamp,
        cluster: u128,
    ) -> Result<(Log, LogWriter, MapStore), StartError> {
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let options = LogOptions {
            expect: Expect::NewOrExisting,
            segment_bytes: 4000,
            grow_bytes: 1000,
            ..LogOptions::default()
        };
        let (log, writer) = open_log(
            &shared,
            Path::new(DIRECTORY),
            stamp,
            ClusterId(cluster),
            options,
        )?;
        let (states, _) = MapStore::open(
            Arc::new(trees.clone()),
            shared,
            Path::new(DIRECTORY),
            MapOptions::default(),
        )?;
        clear_maps(&log, &states)?;
        Ok((log, writer, states))
    }

    fn create(log: &Log, writer: &mut LogWriter, key: ReplicaKey) -> io::Result<()> {
        let (sender, created) = std::sync::mpsc::channel();
        log.create(
            key,
            Box::new(move |result| sender.send(result).expect("it is waited for")),
        );
        while writer.pump() {}
        created.recv().expect("an outcome")
    }

    /// Serves a cluster with a replica of the meta group, which votes and has a snapshot, and with
    /// a witness.
    fn live(disk: &SimDisk, trees: &MemTrees, stamp: &Stamp, cluster: u128) {
        let (log, mut writer, states) = open(disk, trees, stamp, cluster).expect("opened");
        let applied = Applied {
            log_id: Some(LogId { term: 1, index: 5 }),
            ..Applied::default()
        };
        states.witnesses().write(WITNESS, &applied).expect("marked");
        for key in [META, WITNESS] {
            create(&log, &mut writer, key).expect("created");
        }
        let vote = Vote {
            term: 7,
            voted_for: None,
            committed: true,
        };
        log.replica(META)
            .expect("it was created")
            .save_vote(vote, Box::new(|saved| saved.expect("saved")));
        while writer.pump() {}
        let state = states.replica(META, Arc::new(AlwaysSynced)).expect("a map");
        let mut batch = WriteBatch::default();
        batch.put("k", "v");
        state.apply(batch, applied).expect("applied");
        state.build_snapshot().expect("built");
        states.close().expect("closed");
    }

    /// Nothing of an earlier life is there: not in the log, nor beside it.
    fn assert_new(log: &Log, states: &MapStore, context: &str) {
        assert!(log.replicas().is_empty(), "{context}: {:?}", log.replicas());
        assert_eq!(
            states.witnesses().read(WITNESS).expect("readable"),
            None,
            "{context}"
        );
        let state = states.replica(META, Arc::new(AlwaysSynced)).expect("a map");
        assert_eq!(state.opened().origin, Origin::New, "{context}");
    }

    #[test]
    fn nothing_of_a_cluster_that_was_left_is_met_in_the_next() {
        for (stamp, left) in [(retired(1), 1), (Stamp::Fresh, 1)] {
            let (disk, trees) = (SimDisk::new(1), MemTrees::new());
            live(&disk, &trees, &Stamp::Fresh, left);
            let (log, mut writer, states) = open(&disk, &trees, &stamp, 2).expect("opened");
            assert_new(&log, &states, "in another cluster");
            create(&log, &mut writer, META).expect("another cluster's ids are its own");
        }
    }

    #[test]
    fn a_life_that_was_left_in_the_same_cluster_leaves_only_its_ids() {
        let (disk, trees) = (SimDisk::new(1), MemTrees::new());
        live(&disk, &trees, &Stamp::Fresh, 1);
        let (log, mut writer, states) = open(&disk, &trees, &retired(1), 1).expect("opened");
        assert_new(&log, &states, "in the same cluster");
        create(&log, &mut writer, META).expect_err("an id is never used twice");
        create(&log, &mut writer, LATER).expect("a later one");
    }

    /// A replica may have voted before its node is stamped a member.
    #[test]
    fn what_was_begun_in_the_next_cluster_is_kept() {
        for cluster in [1, 2] {
            let (disk, trees) = (SimDisk::new(1), MemTrees::new());
            live(&disk, &trees, &Stamp::Fresh, 1);
            let (log, mut writer, states) =
                open(&disk, &trees, &retired(1), cluster).expect("opened");
            create(&log, &mut writer, LATER).expect("created");
            drop((log, writer, states));
            let (log, ..) = open(&disk, &trees, &retired(1), cluster).expect("opened");
            assert_eq!(log.replicas(), [LATER]);
        }
    }

    #[test]
    fn a_member_keeps_what_it_has_whatever_the_file_says() {
        let (disk, trees) = (SimDisk::new(1), MemTrees::new());
        live(&disk, &trees, &Stamp::Fresh, 1);
        let view = View {
            cluster: ClusterId(2),
            ..view_of(1)
        };
        let stamp = Stamp::Member {
            cluster: ClusterId(2),
            node: NodeId(1),
            meta_replica: META.replica,
            view: Box::new(view),
        };
        let (log, ..) = open(&disk, &trees, &stamp, 2).expect("opened");
        assert_eq!(log.replicas(), [META, WITNESS]);
    }

    /// Ended at every sync, by a power cut or not, and started again.
    #[test]
    fn a_clearing_that_is_cut_short_is_done_again() {
        for cluster in [1, 2] {
            let mut whole = 0;
            for syncs in 0.. {
                for is_power_cut in [false, true] {
                    let context =
                        format!("cluster {cluster}, {syncs} syncs, power cut: {is_power_cut}");
                    let (disk, trees) = (SimDisk::new(syncs), MemTrees::new());
                    live(&disk, &trees, &Stamp::Fresh, 1);
                    disk.fail_sync_after(syncs);
                    let opened = open(&disk, &trees, &retired(1), cluster);
                    let created = opened.and_then(|(log, mut writer, _states)| {
                        create(&log, &mut writer, LATER).map_err(|source| {
                            StartError::Log(OpenLogError::Io {
                                context: "create".to_owned(),
                                source,
                            })
                        })
                    });
                    disk.heal();
                    trees.crash(
                        if is_power_cut {
                            Crash::Power
                        } else {
                            Crash::Kill
                        },
                        syncs,
                    );
                    if is_power_cut {
                        disk.crash();
                    }
                    let (log, _writer, states) = open(&disk, &trees, &retired(1), cluster)
                        .unwrap_or_else(|error| panic!("{context}: {error}"));
                    assert!(!log.replicas().contains(&META), "{context}");
                    assert!(
                        created.is_err() || log.replicas() == [LATER],
                        "{context}: {:?}",
                        log.replicas()
                    );
                    assert_eq!(
                        states.witnesses().read(WITNESS).expect("readable"),
                        None,
                        "{context}"
                    );
                    whole += u32::from(created.is_ok());
                }
                if whole > 0 {
                    assert!(syncs > 5, "it has hardly any steps");
                    break;
                }
            }
        }
    }
}
