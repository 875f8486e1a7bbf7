//! Targets for `fuzzing`: what the log reads back from its disk.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::record::{self, HEADER_BYTES, LogRecord, NOBODY, RecordPlace, ReplicaHead, SegmentHead};
use super::segment::SegmentFiles;
use super::{Expect, Log, LogEntry, LogOptions, LogPayload, Vote};
use crate::storage::ReplicaKey;
use crate::storage::disk::{Disk, Open, ensure_dir};
use crate::storage::sim_disk::SimDisk;
use crate::types::{GroupId, LogId, ReplicaId};

const PLACE: RecordPlace = RecordPlace {
    binding: 7,
    segment: 1,
    offset: 0,
};

fn key(replica: u64) -> ReplicaKey {
    ReplicaKey {
        group: GroupId(1),
        replica: ReplicaId(replica),
    }
}

fn id(term: u64, index: u64) -> LogId {
    LogId { term, index }
}

fn entry(term: u64, index: u64, payload: LogPayload) -> LogEntry {
    LogEntry {
        id: id(term, index),
        payload,
    }
}

/// Returns a short life of two replicas, record by record.
fn history() -> Vec<(ReplicaKey, LogRecord)> {
    let vote = Vote {
        term: 2,
        voted_for: Some(ReplicaId(4)),
        committed: true,
    };
    let head = SegmentHead {
        segment: 1,
        previous_end: None,
        replicas: Vec::new(),
        highest: Vec::new(),
    };
    let restated = ReplicaHead {
        vote: Some(vote),
        purged: Some(id(1, 0)),
        last: Some(id(2, 2)),
        committed: Some(id(2, 1)),
    };
    let normal = |bytes: &'static [u8]| LogPayload::Normal(Bytes::from_static(bytes));
    let membership = LogPayload::Membership(Bytes::from_static(b"members"));
    let (four, five) = (key(4), key(5));
    vec![
        (NOBODY, LogRecord::Head(head)),
        (NOBODY, LogRecord::Mark),
        (four, LogRecord::Create),
        (four, LogRecord::Vote(vote)),
        (four, LogRecord::Entry(entry(1, 0, membership))),
        (four, LogRecord::Entry(entry(1, 1, normal(b"one")))),
        (NOBODY, LogRecord::Mark),
        (four, LogRecord::Truncate(Some(id(1, 0)))),
        (four, LogRecord::Entry(entry(2, 1, LogPayload::Blank))),
        (four, LogRecord::Entry(entry(2, 2, normal(b"two")))),
        (four, LogRecord::Committed(Some(id(2, 1)))),
        (four, LogRecord::Purge(id(1, 0))),
        (NOBODY, LogRecord::Mark),
        (four, LogRecord::Restate(restated)),
        (four, LogRecord::Restated(entry(2, 1, LogPayload::Blank))),
        (four, LogRecord::Restated(entry(2, 2, normal(b"two")))),
        (five, LogRecord::Create),
        (five, LogRecord::Wipe),
    ]
}

fn encoded(key: ReplicaKey, record: &LogRecord) -> Vec<u8> {
    let mut bytes = Vec::new();
    record::encode(&mut bytes, PLACE, key, record);
    bytes
}

/// Records as they lie in a segment, checksums and all.
pub mod records {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let records = history().into_iter();
        records.map(|(key, record)| encoded(key, &record)).collect()
    }

    pub fn read(bytes: &[u8]) {
        if let Ok(found) = record::decode(bytes, PLACE) {
            assert!(found.len <= bytes.len());
            let again = encoded(found.key, &found.record);
            let again = record::decode(&again, PLACE).expect("own encoding");
            assert_eq!((again.record, again.key), (found.record, found.key));
        }
        let _ = record::record_len(bytes, PLACE);
        let _ = record::find_mark(bytes, 0, PLACE);
        assert!(record::tail_end(bytes, 0, PLACE) <= bytes.len());
    }
}

/// A kind and a body whose checksums are right whatever they are.
pub mod bodies {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let body = |(key, record): (ReplicaKey, LogRecord)| {
            let bytes = encoded(key, &record);
            [&bytes[3..4], &bytes[HEADER_BYTES..]].concat()
        };
        history().into_iter().map(body).collect()
    }

    pub fn read(bytes: &[u8]) {
        let Some((kind, body)) = bytes.split_first() else {
            return;
        };
        let mut sealed = [&[0; HEADER_BYTES], body].concat();
        record::seal(&mut sealed, PLACE, key(4), *kind);
        records::read(&sealed);
    }
}

/// A segment of records that are whole each, in any order and of any contents: the only one of a
/// log that is opened, read, and written to.
pub mod segments {
    use super::*;

    /// Kind, replica, and the length of the body.
    const FRAME_BYTES: usize = 3;

    pub fn samples() -> Vec<Vec<u8>> {
        let mut whole = Vec::new();
        for (key, record) in history() {
            let bytes = encoded(key, &record);
            let body = &bytes[HEADER_BYTES..];
            whole.extend([bytes[3], key.replica.0 as u8, body.len() as u8]);
            whole.extend_from_slice(body);
        }
        vec![whole]
    }

    fn sealed(mut frames: &[u8]) -> Vec<u8> {
        let mut segment = Vec::new();
        while let Some(([kind, replica, len], rest)) = frames.split_first_chunk::<FRAME_BYTES>() {
            let (body, rest) = rest.split_at(usize::from(*len).min(rest.len()));
            let at = segment.len();
            let place = RecordPlace {
                offset: at as u64,
                ..PLACE
            };
            let of = if *replica == 0 {
                NOBODY
            } else {
                key(u64::from(*replica))
            };
            segment.extend_from_slice(&[0; HEADER_BYTES]);
            segment.extend_from_slice(body);
            record::seal(&mut segment[at..], place, of, *kind);
            frames = rest;
        }
        segment
    }

    pub fn read(bytes: &[u8]) {
        let segment = sealed(bytes);
        let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
        let files = SegmentFiles {
            disk: disk.clone(),
            dir: PathBuf::from("/log"),
            grow_bytes: 1 << 10,
            segment_bytes: 8 << 10,
        };
        ensure_dir(&*disk, &files.dir).expect("a directory");
        let file = disk.open(&files.path(1), Open::New).expect("a new file");
        file.write_at(&segment, 0).expect("written");
        // The room for the next record.
        file.write_at(&[0; HEADER_BYTES], segment.len() as u64)
            .expect("written");
        disk.sync_dir(&files.dir).expect("synced");
        let options = LogOptions {
            expect: Expect::Existing,
            binding: PLACE.binding,
            segment_bytes: files.segment_bytes,
            grow_bytes: files.grow_bytes,
            ..LogOptions::default()
        };
        let Ok((log, mut writer)) = Log::open(disk, &files.dir, options) else {
            return;
        };

        // One that opens is whole: all that it says it has can be read, and it goes on.
        for key in log.replicas() {
            let replica = log.replica(key).expect("it is in the list");
            let state = replica.state();
            let next = |id: Option<LogId>| id.map_or(0, |id| id.index.saturating_add(1));
            // Found by this target, and open: a mark with the right checksum that is ahead of its
            // entries is believed. The log writes none.
            if replica.committed() > state.last {
                continue;
            }
            let range = next(state.purged)..next(state.last);
            let entries = replica.read(range.clone(), usize::MAX).expect("read");
            assert_eq!(entries.len() as u64, range.end - range.start, "{key}");
            let after = LogId {
                term: state.last.map_or(0, |last| last.term),
                index: range.end,
            };
            let more = entry(after.term, after.index, LogPayload::Blank);
            let _ = replica.append(vec![more], Box::new(|_| ()));
        }
        writer.pump();
        writer.pump();
    }
}
