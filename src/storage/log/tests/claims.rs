//! One claim each.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::blocking::testing::{self as blocking, DiskPace};
use crate::storage::disk::Open;
use crate::storage::testing::{hex, unhex};
use crate::storage::watched_disk::WatchedDisk;

/// A log on a fresh simulated disk with replica g1-r1 created.
fn one(options: &LogOptions) -> (SimDisk, Log, LogWriter, ReplicaLog, Outcomes) {
    let disk = SimDisk::new(1);
    ensure_dir(&disk, Path::new("/node")).expect("a directory");
    let (log, mut writer) = open(&disk, options).expect("a new log");
    let outcomes = Outcomes::default();
    log.create(key(1, 1), outcomes.done());
    pump(&mut writer);
    assert_eq!(outcomes.good(), 1);
    let replica = log.replica(key(1, 1)).expect("it was created");
    (disk, log, writer, replica, outcomes)
}

fn run_of(term: u64, indexes: std::ops::Range<u64>, len: usize) -> Vec<LogEntry> {
    indexes.map(|index| entry(term, index, len)).collect()
}

#[test]
fn entries_are_read_at_once_and_acknowledged_after_the_sync() {
    let (_disk, _log, mut writer, replica, outcomes) = one(&LogOptions::default());
    let entries = run_of(1, 0..5, 10);
    replica
        .append(entries.clone(), outcomes.done())
        .expect("an append");
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
    replica
        .append(run_of(1, 0..2, 10), outcomes.done())
        .expect("an append");
    replica.on_synced(id(1, 1), outcomes.done());
    disk.fail_sync_after(0);
    while writer.pump() {}
    assert_eq!(outcomes.bad().len(), 2);
    let failed = log.failed();
    let reason = failed.borrow().clone().expect("the log failed").to_string();
    assert!(
        reason.contains("sync /node/log/") && reason.contains("simulated"),
        "{reason}"
    );
    replica
        .append(run_of(1, 2..3, 10), outcomes.done())
        .expect_err("a failed log");
    replica.save_vote(
        Vote {
            term: 1,
            voted_for: None,
            committed: false,
        },
        outcomes.done(),
    );
    replica.on_synced(id(1, 1), outcomes.done());
    log.create(key(2, 1), outcomes.done());
    log.wipe(key(1, 1), outcomes.done());
    assert!(!writer.pump());
    assert_eq!(outcomes.bad().len(), 4);
}

#[test]
fn a_full_disk_fails_the_log_and_loses_nothing_acknowledged() {
    let options = small();
    let (disk, log, mut writer, replica, outcomes) = one(&options);
    disk.set_capacity(Some(20_000));
    let mut acked = 0;
    for index in 0.. {
        if replica
            .append(vec![entry(1, index, 100)], outcomes.done())
            .is_err()
        {
            break;
        }
        pump(&mut writer);
        acked += outcomes
            .take()
            .iter()
            .filter(|outcome| outcome.is_ok())
            .count();
    }
    let failure = log.failed().borrow().clone().expect("the log failed");
    assert_eq!(failure.kind, io::ErrorKind::StorageFull, "{failure}");
    drop((log, writer));
    disk.crash();
    let (log, _writer) = open(&disk, &options).expect("there is room again");
    let found = observe(&log, key(1, 1))
        .expect("it was created")
        .entries
        .len();
    assert!(found >= acked && acked > 50, "{found} of {acked}");
}

#[test]
fn a_log_that_may_wait_for_room_goes_on_when_there_is_some() {
    let options = LogOptions {
        waits_for_room: true,
        ..small()
    };
    let (disk, log, writer, replica, outcomes) = one(&options);
    disk.set_capacity(Some(20_000));
    let writer = std::thread::spawn(move || writer.run());
    let mut appended = 0;
    while !log.waits_for_room() {
        replica
            .append(vec![entry(1, appended, 100)], outcomes.done())
            .expect("a full disk is no failure");
        appended += 1;
        assert!(appended < 1_000_000, "the disk is never full");
    }
    assert!(log.failed().borrow().is_none());

    disk.set_capacity(None);
    let mut acknowledged = 0;
    while acknowledged < appended {
        acknowledged += outcomes.good() as u64;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(!log.waits_for_room());
    log.close();
    writer.join().expect("it ended well");
    drop((log, replica));
    disk.crash();
    let (log, _writer) = open(&disk, &options).expect("it is whole");
    let found = observe(&log, key(1, 1))
        .expect("it was created")
        .entries
        .len();
    assert_eq!(found as u64, appended);
}

#[test]
fn a_log_that_waits_for_room_can_be_closed() {
    let options = LogOptions {
        waits_for_room: true,
        ..small()
    };
    let (disk, log, writer, replica, outcomes) = one(&options);
    disk.set_capacity(Some(0));
    let writer = std::thread::spawn(move || writer.run());
    replica
        .append(vec![entry(1, 0, 100_000)], outcomes.done())
        .expect("taken");
    while !log.waits_for_room() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    log.close();
    writer.join().expect("it ended well");
    assert_eq!(outcomes.bad(), [io::ErrorKind::StorageFull]);
}

#[test]
fn what_waits_for_room_fails_once_the_node_stops() {
    let options = LogOptions {
        waits_for_room: true,
        ..small()
    };
    let (disk, log, writer, replica, outcomes) = one(&options);
    disk.set_capacity(Some(0));
    let writer = std::thread::spawn(move || writer.run());
    replica
        .append(vec![entry(1, 0, 100_000)], outcomes.done())
        .expect("taken");
    while !log.waits_for_room() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }

    // Those who wait for it are to end before it is closed.
    log.give_up_room();
    let began = std::time::Instant::now();
    while !writer.is_finished() && began.elapsed() < std::time::Duration::from_secs(60) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(outcomes.bad(), [io::ErrorKind::StorageFull]);
    writer.join().expect("it ended well");
}

#[test]
fn a_replica_id_is_never_created_twice() {
    let options = small();
    let (disk, log, mut writer, replica, outcomes) = one(&options);
    log.create(key(1, 1), outcomes.done());
    log.create(key(1, 0), outcomes.done());
    assert_eq!(outcomes.bad(), [io::ErrorKind::AlreadyExists; 2]);
    log.create(key(1, 5), outcomes.done());
    log.wipe(key(1, 5), outcomes.done());
    log.wipe(key(1, 5), outcomes.done());
    log.create(key(1, 5), outcomes.done());
    pump(&mut writer);
    assert_eq!(
        outcomes
            .take()
            .iter()
            .filter(|outcome| outcome.is_err())
            .count(),
        1
    );
    log.create(key(1, 4), outcomes.done());
    assert_eq!(outcomes.bad(), [io::ErrorKind::AlreadyExists]);
    // So much that the segments in which it was created are gone.
    for index in 0..200 {
        replica
            .append(vec![entry(1, index, 100)], outcomes.done())
            .expect("an append");
        replica.purge(id(1, index), outcomes.done());
        pump(&mut writer);
    }
    assert_eq!(outcomes.good(), 400);
    assert!(
        disk.contents(&dir().join(format!("{:020}.segment", 1)))
            .is_none()
    );
    drop((log, replica, writer));
    let (log, mut writer) = open(&disk, &options).expect("a log");
    assert_eq!(log.replicas(), [key(1, 1)]);
    log.create(key(1, 5), outcomes.done());
    assert_eq!(outcomes.bad(), [io::ErrorKind::AlreadyExists]);
    log.create(key(1, 6), outcomes.done());
    pump(&mut writer);
    assert_eq!(outcomes.good(), 1);
}

#[test]
fn a_wiped_replica_refuses_and_tells_who_waited() {
    let (_disk, log, mut writer, replica, outcomes) = one(&LogOptions::default());
    replica
        .append(run_of(1, 0..2, 10), outcomes.done())
        .expect("an append");
    pump(&mut writer);
    assert_eq!(outcomes.good(), 1);
    replica.on_synced(id(1, 9), outcomes.done());
    let wiped = Outcomes::default();
    log.wipe(key(1, 1), wiped.done());
    assert_eq!(outcomes.bad(), [io::ErrorKind::NotFound]);
    assert!(log.replica(key(1, 1)).is_none());
    replica
        .append(run_of(1, 2..3, 10), outcomes.done())
        .expect_err("a wiped replica");
    replica.save_vote(
        Vote {
            term: 1,
            voted_for: None,
            committed: false,
        },
        outcomes.done(),
    );
    replica.on_synced(id(1, 1), outcomes.done());
    assert_eq!(outcomes.bad(), [io::ErrorKind::NotFound; 2]);
    pump(&mut writer);
    assert_eq!(wiped.good(), 1);
    assert_eq!(replica.read(0..9, usize::MAX).expect("a read"), []);
}

#[test]
fn what_does_not_follow_is_refused_and_changes_nothing() {
    let (_disk, log, mut writer, replica, outcomes) = one(&LogOptions::default());
    replica
        .append(run_of(3, 0..4, 10), outcomes.done())
        .expect("an append");
    replica.purge(id(3, 1), outcomes.done());
    pump(&mut writer);
    assert_eq!(outcomes.good(), 2);
    let before = observe(&log, key(1, 1));
    for bad in [entry(3, 5, 1), entry(3, 3, 1), entry(2, 4, 1)] {
        let error = replica
            .append(vec![bad], outcomes.done())
            .expect_err("it does not follow");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    replica.truncate_after(Some(0), outcomes.done());
    replica.truncate_after(None, outcomes.done());
    replica.purge(id(2, 2), outcomes.done());
    assert_eq!(outcomes.bad(), [io::ErrorKind::InvalidInput; 3]);
    replica.truncate_after(Some(9), outcomes.done());
    replica.purge(id(3, 0), outcomes.done());
    pump(&mut writer);
    assert_eq!(outcomes.good(), 2, "what changes nothing is done");
    assert_eq!(observe(&log, key(1, 1)), before);
}

#[test]
fn entries_past_the_cache_are_read_from_the_disk_and_checked() {
    let options = LogOptions {
        cache_bytes: 2000,
        ..LogOptions::default()
    };
    let (disk, _log, mut writer, replica, outcomes) = one(&options);
    let entries = run_of(2, 0..100, 50);
    for entry in &entries {
        replica
            .append(vec![entry.clone()], outcomes.done())
            .expect("an append");
        pump(&mut writer);
    }
    assert_eq!(outcomes.good(), 100);
    assert_eq!(replica.read(0..100, usize::MAX).expect("a read"), entries);
    let path = dir().join(format!("{:020}.segment", 1));
    disk.fail_reads(&path);
    replica
        .read(0..1, usize::MAX)
        .expect_err("the disk does not read");
    assert_eq!(
        replica.read(90..100, usize::MAX).expect("from the cache"),
        entries[90..]
    );
    disk.heal();
    let at = disk
        .contents(&path)
        .expect("a segment")
        .windows(50)
        .position(|window| window == entries[1].payload.bytes());
    assert!(disk.flip_bit(&path, at.expect("the payload") as u64, 3));
    assert_eq!(replica.read(0..1, 1).expect("a whole entry"), entries[..1]);
    let error = replica.read(0..9, usize::MAX).expect_err("a damaged entry");
    assert!(
        error.kind() == io::ErrorKind::InvalidData
            && error.to_string().contains("entry 2.1 of replica g1-r1"),
        "{error}"
    );
}

#[test]
fn an_idle_replica_does_not_pin_the_log() {
    let options = small();
    let (disk, log, mut writer, idle, outcomes) = one(&options);
    log.create(key(2, 1), outcomes.done());
    let busy = log.replica(key(2, 1)).expect("it was created");
    let vote = Vote {
        term: 3,
        voted_for: Some(ReplicaId(1)),
        committed: true,
    };
    idle.save_vote(vote, outcomes.done());
    let entries = run_of(3, 0..4, 30);
    idle.append(entries.clone(), outcomes.done())
        .expect("an append");
    for index in 0..1000 {
        busy.append(vec![entry(1, index, 100)], outcomes.done())
            .expect("an append");
        busy.purge(id(1, index), outcomes.done());
        pump(&mut writer);
    }
    assert_eq!(outcomes.good(), 2003);
    let metrics = log.metrics();
    assert!(metrics.segments <= 6 && metrics.rebases > 3, "{metrics:?}");
    assert!(disk.files().len() <= 8, "{:?}", disk.files());
    drop((log, idle, busy, writer));
    disk.crash();
    let (log, _writer) = open(&disk, &options).expect("a log");
    assert_eq!(
        observe(&log, key(1, 1)),
        Some(Model {
            purged: None,
            vote: Some(vote),
            entries
        })
    );
}

#[test]
fn a_large_replica_that_pins_the_log_is_named() {
    let options = small();
    let (_disk, log, mut writer, large, outcomes) = one(&options);
    log.create(key(2, 1), outcomes.done());
    let busy = log.replica(key(2, 1)).expect("it was created");
    large
        .append(run_of(3, 0..10, 100), outcomes.done())
        .expect("an append");
    for index in 0..200 {
        busy.append(vec![entry(1, index, 100)], outcomes.done())
            .expect("an append");
        busy.purge(id(1, index), outcomes.done());
        pump(&mut writer);
    }
    let pins = log.segments_pinned_by();
    assert_eq!(
        pins.iter().map(|pin| pin.key).collect::<Vec<_>>(),
        [key(1, 1)]
    );
    assert!(
        pins[0].live_bytes > 1000 && pins[0].held_bytes > 20_000,
        "{pins:?}"
    );
    large.purge(id(3, 9), outcomes.done());
    pump(&mut writer);
    assert_eq!(log.segments_pinned_by(), []);
    assert!(log.metrics().segments <= 3, "{:?}", log.metrics());
}

#[test]
fn many_restarts_leave_few_segments() {
    let options = LogOptions::default();
    let (disk, log, mut writer, replica, outcomes) = one(&options);
    replica
        .append(run_of(1, 0..3, 10), outcomes.done())
        .expect("an append");
    pump(&mut writer);
    drop((log, writer, replica));
    for _ in 0..40 {
        let (log, mut writer) = open(&disk, &options).expect("a log");
        pump(&mut writer);
        assert_eq!(
            observe(&log, key(1, 1))
                .expect("it was created")
                .entries
                .len(),
            3
        );
    }
    assert!(disk.files().len() < 14, "{:?}", disk.files());
    assert!(
        disk.files().iter().map(|(_, len)| len).sum::<u64>() < 3 << 20,
        "{:?}",
        disk.files()
    );
}

#[test]
fn a_log_of_another_directory_or_of_none_is_refused() {
    let options = LogOptions {
        binding: 1,
        ..LogOptions::default()
    };
    let (disk, log, writer, replica, _) = one(&options);
    drop((log, writer, replica));
    let refused = |disk: &SimDisk, options: &LogOptions| match open(disk, options) {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    };
    let other = refused(
        &disk,
        &LogOptions {
            binding: 2,
            ..options.clone()
        },
    );
    assert!(
        matches!(other, OpenLogError::Damaged { offset: 0, .. }),
        "{other}"
    );
    assert!(
        other
            .to_string()
            .contains("move this node's data directory away"),
        "{other}"
    );
    open(
        &disk,
        &LogOptions {
            expect: Expect::Existing,
            ..options.clone()
        },
    )
    .map(drop)
    .expect("its own log");
    let empty = SimDisk::new(0);
    ensure_dir(&empty, Path::new("/node")).expect("a directory");
    let missing = refused(
        &empty,
        &LogOptions {
            expect: Expect::Existing,
            ..options
        },
    );
    assert!(matches!(missing, OpenLogError::Missing { .. }), "{missing}");
}

#[test]
fn proposers_are_told_when_too_much_waits() {
    let options = LogOptions {
        queue_bytes_max: 500,
        ..LogOptions::default()
    };
    let (_disk, log, mut writer, replica, outcomes) = one(&options);
    assert!(!log.is_overloaded());
    replica
        .append(run_of(1, 0..10, 100), outcomes.done())
        .expect("appends are taken all the same");
    assert!(log.is_overloaded() && log.queue_bytes() > 500);
    pump(&mut writer);
    assert!(!log.is_overloaded() && log.queue_bytes() == 0);
}

#[test]
fn a_writer_that_is_gone_leaves_nobody_waiting() {
    let (_disk, log, writer, replica, outcomes) = one(&LogOptions::default());
    replica
        .append(run_of(1, 0..1, 10), outcomes.done())
        .expect("an append");
    replica.on_synced(id(1, 0), outcomes.done());
    drop(writer);
    assert_eq!(outcomes.bad().len(), 2);
    assert!(log.failed().borrow().is_some());
}

#[tokio::test(start_paused = true)]
async fn as_a_task_the_writer_marks_when_idle_and_ends_when_closed() {
    let (disk, log, writer, replica, _) = one(&LogOptions::default());
    let task = tokio::spawn(writer.run_in_task());
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let done: Done = Box::new(move |outcome| sender.send(outcome).expect("the test waits"));
    replica
        .append(run_of(1, 0..3, 10), done)
        .expect("an append");
    receiver.await.expect("a callback").expect("a success");
    let syncs = disk.counts().syncs;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(
        disk.counts().syncs,
        syncs + 1,
        "an idle log syncs its closing mark and nothing else"
    );
    log.close();
    task.await.expect("the writer ends");
    replica
        .append(run_of(1, 3..4, 10), Box::new(|_| ()))
        .expect_err("a closed log");
    assert!(log.failed().borrow().is_none(), "closed is not failed");
}

#[tokio::test(start_paused = true)]
async fn as_a_task_the_writer_lets_others_go_on_between_a_write_and_its_sync() {
    blocking::do_inline();
    let (disk, _log, writer, replica, outcomes) = one(&LogOptions::default());
    let _task = tokio::spawn(writer.run_in_task());
    blocking::pace(Some(DiskPace {
        seed: 7,
        one_in: 1,
        wait_ms_max: 1000,
    }));
    let before = disk.counts();
    replica
        .append(run_of(1, 0..3, 10), outcomes.done())
        .expect("an append");
    while disk.counts().writes == before.writes {
        tokio::task::yield_now().await;
    }
    assert_eq!(disk.counts().syncs, before.syncs, "the sync has to wait");
    assert_eq!(outcomes.good(), 0, "acknowledged before it is synced");

    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(outcomes.good(), 1);
    blocking::pace(None);
}

/// More waits than one batch takes, and the entry that is committed is in the part that does not
/// fit.
#[test]
fn a_committed_id_is_not_durable_before_its_entry() {
    let options = LogOptions {
        batch_bytes_max: 500,
        ..LogOptions::default()
    };
    for batches in 1..12 {
        let (disk, log, mut writer, replica, outcomes) = one(&options);
        for index in 0..20 {
            replica
                .append(vec![entry(1, index, 100)], outcomes.done())
                .expect("an append");
        }
        replica.save_committed(Some(id(1, 19)));
        for _ in 0..batches {
            writer.pump();
        }
        drop((log, writer, replica));

        let (log, _writer) = open(&disk, &options).expect("a log");
        let replica = log.replica(key(1, 1)).expect("it was created");
        assert!(
            replica.committed() <= replica.state().last,
            "{:?} of {:?}",
            replica.committed(),
            replica.state()
        );
        let all_written = replica.state().last == Some(id(1, 19));
        assert_eq!(
            replica.committed().is_some(),
            all_written,
            "the id goes with the batch that ends with its entry"
        );
    }
}

/// Entries that committed ones are about to replace are still in the file when the process ends:
/// they must not be applied in place of the committed ones.
#[test]
fn a_committed_id_never_speaks_for_an_entry_that_it_replaces() {
    let options = LogOptions {
        batch_bytes_max: 500,
        ..LogOptions::default()
    };
    let (disk, log, mut writer, replica, outcomes) = one(&options);
    replica
        .append(run_of(1, 0..10, 100), outcomes.done())
        .expect("an append");
    pump(&mut writer);
    replica
        .append(run_of(1, 10..14, 100), outcomes.done())
        .expect("an append");
    replica.truncate_after(Some(4), outcomes.done());
    replica
        .append(run_of(2, 5..9, 100), outcomes.done())
        .expect("an append");
    replica.save_committed(Some(id(2, 8)));
    assert!(writer.pump());
    drop((log, writer, replica));

    let (log, _writer) = open(&disk, &options).expect("a log");
    let replica = log.replica(key(1, 1)).expect("it was created");
    assert_eq!(
        replica.state().last,
        Some(id(1, 13)),
        "the truncation was meant to be lost"
    );
    assert_eq!(replica.committed(), None);
}

/// Earlier versions could leave such a log.
#[test]
fn a_log_whose_committed_id_is_not_in_it_opens_and_goes_on() {
    let options = small();
    for ahead in [id(1, 9), id(2, 3), id(2, 9)] {
        let (disk, log, mut writer, replica, outcomes) = one(&options);
        replica
            .append(run_of(1, 0..5, 100), outcomes.done())
            .expect("an append");
        replica.purge(id(1, 1), outcomes.done());
        pump(&mut writer);
        drop((log, writer, replica));
        append_record(&disk, key(1, 1), &record::LogRecord::Committed(Some(ahead)));

        for _ in 0..2 {
            let (log, mut writer) =
                open(&disk, &options).unwrap_or_else(|error| panic!("{ahead}: {error}"));
            let replica = log.replica(key(1, 1)).expect("it was created");
            assert_eq!(
                replica.committed(),
                Some(id(1, 1)),
                "{ahead}: what was purged had been committed"
            );
            // So much that segments are begun, whose heads restate the replica, and that it is
            // rebased.
            let next = replica.state().last.map_or(0, |last| last.index + 1);
            log.create(key(7, next), outcomes.done());
            let busy = log.replica(key(7, next)).expect("it was created");
            for index in 0..100 {
                busy.append(vec![entry(1, index, 100)], outcomes.done())
                    .expect("an append");
                busy.purge(id(1, index), outcomes.done());
                pump(&mut writer);
            }
            replica
                .append(vec![entry(1, next, 10)], outcomes.done())
                .expect("an append");
            pump(&mut writer);
        }
        let (log, mut writer) =
            open(&disk, &options).unwrap_or_else(|error| panic!("{ahead}: {error}"));
        let replica = log.replica(key(1, 1)).expect("it was created");
        replica.save_committed(Some(id(1, 4)));
        pump(&mut writer);
        replica.save_vote(
            Vote {
                term: 3,
                voted_for: None,
                committed: false,
            },
            outcomes.done(),
        );
        pump(&mut writer);
        drop((log, writer, replica));
        let (log, _writer) = open(&disk, &options).expect("a log");
        let replica = log.replica(key(1, 1)).expect("it was created");
        assert_eq!(replica.committed(), Some(id(1, 4)), "{ahead}");
    }
}

/// Writes a record behind the last one of the log, as a batch of its own.
fn append_record(disk: &SimDisk, key: ReplicaKey, record: &record::LogRecord) {
    let mut segments = disk
        .files()
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|kind| kind == "segment"));
    let (path, _) = segments.next_back().expect("a segment");
    let bytes = disk.contents(&path).expect("it is listed");
    let number = path
        .file_stem()
        .and_then(|stem| stem.to_str()?.parse().ok())
        .expect("segments are numbered");
    let place = |offset| record::RecordPlace {
        binding: 0,
        segment: number,
        offset,
    };
    let mut at = 0;
    while let Ok(found) = record::decode(&bytes[at..], place(at as u64)) {
        at += found.len;
    }
    let mut batch = Vec::new();
    record::encode(
        &mut batch,
        place(at as u64),
        record::NOBODY,
        &record::LogRecord::Mark,
    );
    record::encode(&mut batch, place(at as u64), key, record);
    let file = disk.open(&path, Open::Existing).expect("it is listed");
    file.write_at(&batch, at as u64).expect("a write");
    file.sync().expect("a sync");
}

/// The records of a log's only segment, of format 1, as they were written first and are read for
/// ever: two replicas of which one is wiped, a vote, entries of every kind, a truncation, a purge,
/// a committed id, and the closing mark.
const GOLDEN: &str = "\
    514c010104000000000000000000000000000000000000009fcdddebd6b3ec1501000000514c010200000000\
    0000000000000000000000000000000005bacb7296e0ac7e514c010300000000010000000000000001000000\
    00000000be1a20a2b22ca327514c01020000000000000000000000000000000000000000e878565b94d2287d\
    514c01020000000000000000000000000000000000000000895d86d8939d6678514c01030000000002000000\
    000000000600000000000000df3ff021f0c7dcf9514c01050400000001000000000000000100000000000000\
    9b8da87dd0f937c803010101514c01091400000001000000000000000100000000000000a5970a12777f9071\
    02000000000000000000000000000000010e0e0e514c01091400000001000000000000000100000000000000\
    afe44b1487f3cf1302000000000000000100000000000000010f0f0f514c0109140000000100000000000000\
    0100000000000000a58afa52dee24d270200000000000000020000000000000001101010514c010911000000\
    0100000000000000010000000000000090e30e44afc4a0460200000000000000030000000000000000514c01\
    09140000000100000000000000010000000000000026eb7506988b52a1020000000000000004000000000000\
    0002040404514c010914000000010000000000000001000000000000000f36046d3f332b8f02000000000000\
    00050000000000000001131313514c01060300000001000000000000000100000000000000892f5d88a5ddc6\
    5c010204514c010702000000010000000000000001000000000000007b10d1a42b35f8d10201514c01040000\
    0000020000000000000006000000000000004660a60a52afdc09514c01080300000001000000000000000100\
    000000000000b8bfd65c32a9c55d010203514c01020000000000000000000000000000000000000000682ec5\
    7a788c506b";

#[test]
fn the_format_of_a_segment_stands_still() {
    let options = LogOptions {
        binding: 7,
        ..LogOptions::default()
    };
    let (disk, log, mut writer, replica, outcomes) = one(&options);
    let vote = Vote {
        term: 3,
        voted_for: Some(ReplicaId(1)),
        committed: true,
    };
    log.create(key(2, 6), outcomes.done());
    replica.save_vote(vote, outcomes.done());
    replica
        .append(run_of(2, 0..6, 3), outcomes.done())
        .expect("an append");
    replica.truncate_after(Some(4), outcomes.done());
    replica.purge(id(2, 1), outcomes.done());
    replica.save_committed(Some(id(2, 3)));
    log.wipe(key(2, 6), outcomes.done());
    pump(&mut writer);
    drop((log, writer, replica));
    let path = dir().join(format!("{:020}.segment", 1));
    let mut written = disk.contents(&path).expect("a segment");
    let end = written
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    written.truncate(end);
    assert_eq!(
        hex(&written),
        GOLDEN,
        "write a new format beside the old one"
    );

    // As the pre-written room leaves it.
    let mut bytes = unhex(GOLDEN);
    bytes.resize(4096, 0);
    let disk = SimDisk::new(1);
    ensure_dir(&disk, &dir()).expect("a directory");
    disk.open(&path, Open::New)
        .expect("a file")
        .write_at(&bytes, 0)
        .expect("written");
    let (log, _writer) = open(&disk, &options).expect("a log of the first format");
    let expected = Model {
        purged: Some(id(2, 1)),
        vote: Some(vote),
        entries: run_of(2, 2..5, 3),
    };
    assert_eq!(observe(&log, key(1, 1)), Some(expected));
    assert_eq!(
        log.replica(key(1, 1)).expect("it is there").committed(),
        Some(id(2, 3))
    );
    let outcomes = Outcomes::default();
    log.create(key(2, 6), outcomes.done());
    assert_eq!(
        outcomes.bad(),
        [io::ErrorKind::AlreadyExists],
        "a wiped replica's id stays used"
    );
}

/// Also after an operation that comes just when the writer has seen that the log is idle.
#[test]
fn the_closing_mark_comes_after_whatever_was_written_last() {
    const ROUNDS: usize = 4_000;
    let (disk, _log, mut writer, replica, _) = one(&LogOptions::default());
    let (begun, acked) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let vote = || {
        let acked = acked.clone();
        let done = move |_| {
            acked.fetch_add(1, Ordering::Release);
        };
        replica.save_vote(
            Vote {
                term: 1,
                voted_for: None,
                committed: true,
            },
            Box::new(done),
        );
    };
    let unmarked = std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                while begun.load(Ordering::Acquire) < round {
                    std::thread::yield_now();
                }
                vote();
            }
        });
        let unmarked = (1..=ROUNDS).find(|round| {
            vote();
            writer.pump();
            begun.store(*round, Ordering::Release);
            while acked.load(Ordering::Acquire) < 2 * round {
                if !writer.pump() {
                    std::thread::yield_now();
                }
            }
            let syncs = disk.counts().syncs;
            writer.pump();
            disk.counts().syncs == syncs
        });
        // The other thread is not to wait for rounds that never come.
        begun.store(ROUNDS, Ordering::Release);
        unmarked
    });
    assert_eq!(
        unmarked, None,
        "a round that left no mark behind the last vote"
    );
}

#[test]
fn what_is_rebased_is_read_at_every_moment_of_it() {
    let options = LogOptions {
        cache_bytes: 0,
        ..small()
    };
    let disk = SimDisk::new(1);
    ensure_dir(&disk, Path::new("/node")).expect("a directory");
    let watched = WatchedDisk::new(disk);
    let (log, mut writer) =
        Log::open(Arc::new(watched.clone()), &dir(), options).expect("a new log");
    let outcomes = Outcomes::default();
    let [idle, busy] = [key(1, 1), key(2, 1)].map(|key| {
        log.create(key, outcomes.done());
        log.replica(key).expect("it was created")
    });
    let entries = run_of(3, 0..4, 30);
    idle.append(entries.clone(), outcomes.done())
        .expect("an append");
    pump(&mut writer);
    let reads = Arc::new(AtomicUsize::new(0));
    let counted = reads.clone();
    watched.watch(move |_| {
        assert_eq!(idle.read(0..4, usize::MAX).expect("a read"), entries);
        counted.fetch_add(1, Ordering::Relaxed);
    });
    for index in 0..300 {
        busy.append(vec![entry(1, index, 100)], outcomes.done())
            .expect("an append");
        busy.purge(id(1, index), outcomes.done());
        pump(&mut writer);
    }
    assert!(
        log.metrics().rebases > 3 && reads.load(Ordering::Relaxed) > 600,
        "{:?}",
        log.metrics()
    );
}

/// Many groups append, read back and purge at once, over segments that are used again and again.
#[test]
fn groups_run_beside_each_other_on_a_real_disk() {
    let root = tempfile::tempdir().expect("a directory");
    let options = LogOptions {
        segment_bytes: 16 << 10,
        grow_bytes: 4096,
        cache_bytes: 4096,
        rebase_bytes_max: 2048,
        ..LogOptions::default()
    };
    let disk = Arc::new(crate::storage::disk::RealDisk);
    let path = root.path().join("log");
    let (log, writer) = Log::open(disk.clone(), &path, options.clone()).expect("a new log");
    let writing = std::thread::spawn(move || writer.run());
    let groups: Vec<_> = (0..8)
        .map(|group| (group, log.clone()))
        .map(|(group, log)| std::thread::spawn(move || live(&log, group)))
        .collect();
    let expected: Vec<Model> = groups
        .into_iter()
        .map(|group| group.join().expect("a group"))
        .collect();
    assert!(log.failed().borrow().is_none());
    drop(log);
    writing
        .join()
        .expect("the writer ends once every handle is dropped");
    let (log, writer) = Log::open(disk, &path, options).expect("a log");
    for (group, expected) in expected.into_iter().enumerate() {
        assert_eq!(observe(&log, key(group as u64, 1)), Some(expected));
    }
    drop(writer);
}

fn live(log: &Log, group: u64) -> Model {
    let key = key(group, 1);
    let wait = |issue: &dyn Fn(Done)| {
        let (sender, receiver) = std::sync::mpsc::channel();
        issue(Box::new(move |outcome| {
            sender.send(outcome).expect("the test waits")
        }));
        receiver.recv().expect("a callback").expect("a success");
    };
    wait(&|done| log.create(key, done));
    let replica = log.replica(key).expect("it was created");
    let mut model = Model::default();
    // One group stays small and idle, so that it is rebased while it is read.
    let count = if group == 0 { 5 } else { 150 };
    for index in 0..count {
        let entry = entry(1, index, 40 + (index as usize * 13) % 60);
        wait(&|done| {
            replica
                .append(vec![entry.clone()], done)
                .expect("an append")
        });
        model.entries.push(entry);
        let first = model.entries[0].id.index;
        assert_eq!(
            replica.read(first..index + 1, usize::MAX).expect("a read"),
            model.entries
        );
        if index % 20 == 19 {
            let upto = model.entries[15].id;
            wait(&|done| replica.purge(upto, done));
            model.entries.drain(..16);
            model.purged = Some(upto);
        }
    }
    if group == 0 {
        for _ in 0..500 {
            assert_eq!(
                replica.read(0..count, usize::MAX).expect("a read"),
                model.entries
            );
        }
    }
    model
}
