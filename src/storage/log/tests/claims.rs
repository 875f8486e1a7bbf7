//! One claim each.

use super::*;

/// A log on a fresh simulated disk with replica g1-r1 created.
fn one(options: &LogOptions) -> (SimDisk, Log, LogWriter, ReplicaLog, Outcomes) {
    let disk = SimDisk::new(1);
    disk.create_dir(Path::new("/node")).expect("a directory");
    let (log, mut writer) = open(&disk, options).expect("a new log");
    let outcomes = Outcomes::default();
    log.create(key(1, 1), outcomes.done());
    pump(&mut writer);
    assert_eq!(outcomes.good(), 1);
    let replica = log.replica(key(1, 1)).expect("it was created");
    (disk, log, writer, replica, outcomes)
}

fn run_of(term: u64, indexes: std::ops::Range<u64>, len: usize) -> Vec<Entry> {
    indexes.map(|index| entry(term, index, len)).collect()
}

#[test]
fn entries_are_read_at_once_and_acknowledged_after_the_sync() {
    let (_disk, _log, mut writer, replica, outcomes) = one(&LogOptions::default());
    let entries = run_of(1, 0..5, 10);
    replica.append(entries.clone(), outcomes.done()).expect("an append");
    replica.on_synced(id(1, 3), outcomes.done());
    assert_eq!(replica.read(0..9, usize::MAX).expect("a read"), entries);
    assert_eq!((outcomes.take().len(), replica.synced()), (0, None));
    assert!(writer.pump());
    assert_eq!((outcomes.good(), replica.synced()), (2, Some(id(1, 4))));
    replica.on_synced(id(1, 4), outcomes.done());
    assert_eq!(outcomes.good(), 1, "what is synced is told at once");
    assert_eq!(replica.read(1..4, 1).expect("a read"), entries[1..2]);
    assert_eq!(replica.read(5..9, usize::MAX).expect("a read"), []);
}

#[test]
fn after_a_failed_sync_nothing_ever_succeeds() {
    let (disk, log, mut writer, replica, outcomes) = one(&LogOptions::default());
    replica.append(run_of(1, 0..2, 10), outcomes.done()).expect("an append");
    replica.on_synced(id(1, 1), outcomes.done());
    disk.fail_sync_after(0);
    while writer.pump() {}
    assert_eq!(outcomes.bad().len(), 2);
    let failed = log.failed();
    let reason = failed.borrow().clone().expect("the log failed").to_string();
    assert!(reason.contains("sync /node/log/") && reason.contains("simulated"), "{reason}");
    replica.append(run_of(1, 2..3, 10), outcomes.done()).expect_err("a failed log");
    replica.save_vote(Vote { term: 1, voted_for: None, committed: false }, outcomes.done());
    replica.on_synced(id(1, 1), outcomes.done());
    log.create(key(2, 1), outcomes.done());
    log.wipe(key(1, 1), outcomes.done());
    assert!(!writer.pump());
    assert_eq!(outcomes.bad().len(), 4);
}
