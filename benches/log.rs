//! Synced appends per second of the shared log on a real disk, beside what the disk does when the
//! same bytes are written and synced with nothing around them.
//! `cargo bench --bench log [directory]`; the directory must be on the disk that is meant.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate::storage::ReplicaKey;
use quorate::storage::disk::{Disk, Open, RealDisk};
use quorate::storage::log::{Log, LogEntry, LogMetrics, LogOptions, LogPayload, ReplicaLog};
use quorate::types::{GroupId, LogId, ReplicaId};

const GROUPS: u64 = 64;
const PAYLOAD_BYTES: usize = 128;
const SECONDS: u64 = 5;
/// Entries of a group that are kept before they are purged, as after a snapshot.
const KEPT: u64 = 20_000;

struct Group {
    replica: ReplicaLog,
    next: u64,
}

impl Group {
    fn append(&mut self, number: usize, synced: &Sender<usize>) {
        let payload = LogPayload::Normal(Bytes::from(vec![self.next as u8; PAYLOAD_BYTES]));
        let entry = LogEntry {
            id: LogId {
                term: 1,
                index: self.next,
            },
            payload,
        };
        let synced = synced.clone();
        let done = move |outcome: io::Result<()>| {
            outcome.expect("a synced append");
            // The bench may have ended.
            let _ = synced.send(number);
        };
        self.replica
            .append(vec![entry], Box::new(done))
            .expect("an append");
        if self.next % KEPT == KEPT - 1 {
            self.replica.purge(
                LogId {
                    term: 1,
                    index: self.next - KEPT / 2,
                },
                Box::new(|_| ()),
            );
        }
        self.next += 1;
    }
}

fn main() {
    let base = std::env::args()
        .skip(1)
        .find(|arg| !arg.starts_with('-'))
        .map_or_else(std::env::temp_dir, PathBuf::from);
    for in_flight in [1, 16] {
        let dir = base.join(format!("quorate-bench-log-{}", std::process::id()));
        let (appends, metrics) = run_log(&dir, in_flight);
        let batch_bytes = metrics.bytes_written / metrics.batches.max(1);
        let raw = run_raw(&dir.join("raw"), batch_bytes);
        std::fs::remove_dir_all(&dir).expect("the bench's own directory");
        let per_second = |count: u64| count / SECONDS;
        let batch = appends / metrics.batches.max(1);
        println!(
            "{GROUPS} groups, {in_flight} in flight each, {PAYLOAD_BYTES} byte payloads: {} \
            appends/s in {} syncs/s of {batch} appends, {} us each, slowest {} us",
            per_second(appends),
            per_second(metrics.syncs),
            metrics.sync_us_total / metrics.syncs.max(1),
            metrics.sync_us_max,
        );
        println!(
            "  raw: {} syncs/s of {batch_bytes} bytes, so {} appends/s at most",
            per_second(raw),
            per_second(raw * batch)
        );
    }
}

fn run_log(dir: &Path, in_flight: usize) -> (u64, LogMetrics) {
    let (log, writer) =
        Log::open(Arc::new(RealDisk), &dir.join("log"), LogOptions::default()).expect("a new log");
    let writing = std::thread::spawn(move || writer.run());
    let (synced, receive) = channel();
    let mut groups = Vec::new();
    for number in 0..GROUPS {
        let key = ReplicaKey {
            group: GroupId(number),
            replica: ReplicaId(1),
        };
        log.create(key, Box::new(|outcome| outcome.expect("a new replica")));
        groups.push(Group {
            replica: log.replica(key).expect("it was created"),
            next: 0,
        });
    }
    for (number, group) in groups.iter_mut().enumerate() {
        (0..in_flight).for_each(|_| group.append(number, &synced));
    }
    let begin = Instant::now();
    let mut appends = 0;
    while begin.elapsed() < Duration::from_secs(SECONDS) {
        let number = receive.recv().expect("a sender is kept");
        appends += 1;
        groups[number].append(number, &synced);
    }
    let metrics = log.metrics();
    log.close();
    writing.join().expect("the writer ends");
    (appends, metrics)
}

/// Writes and syncs pieces of this size into a pre-written file. Returns how many.
fn run_raw(path: &Path, bytes: u64) -> u64 {
    const FILE_BYTES: u64 = 64 << 20;
    let file = RealDisk.open(path, Open::New).expect("a new file");
    file.write_at(&vec![0; FILE_BYTES as usize], 0)
        .and_then(|()| file.sync())
        .expect("a pre-written file");
    let piece = vec![1; bytes as usize];
    let begin = Instant::now();
    let (mut count, mut at) = (0, 0);
    while begin.elapsed() < Duration::from_secs(SECONDS) {
        if at + bytes > FILE_BYTES {
            at = 0;
        }
        file.write_at(&piece, at)
            .and_then(|()| file.sync())
            .expect("a synced write");
        at += bytes;
        count += 1;
    }
    count
}
