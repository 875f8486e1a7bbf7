//! Reading a log back: from segment files to what every replica has, or to the reason why not.
//!
//! The rules are in [`super`]. Nothing here changes a file, except that what is found valid behind
//! the last mark is written again and synced: it may be in the page cache only, left there by a
//! sync that failed.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::OpenLogError;
use super::index::{EntryLocation, LiveBytes, LogIndex};
use super::record::{
    self, BadRecord, FoundRecord, HEADER_BYTES, LogRecord, RecordPlace, SegmentHead,
};
use super::segment::SegmentFiles;
use crate::storage::ReplicaKey;
use crate::storage::disk::{DiskFile, Open};
use crate::types::{GroupId, ReplicaId};

/// Heads beyond this are taken for damage rather than read into memory.
const HEAD_BYTES_MAX: usize = 1 << 30;

/// The state that a replay of the log arrives at.
#[derive(Default)]
pub(super) struct Replayed {
    pub replicas: BTreeMap<ReplicaKey, LogIndex>,
    pub highest: BTreeMap<GroupId, ReplicaId>,
    pub live: LiveBytes,
    pub segments: Vec<ReplayedSegment>,
    /// Segments that were being unlinked, older than a gap in the numbers.
    pub leftover: Vec<u64>,
    pub spares: Vec<PathBuf>,
}

/// A segment and where its records end.
pub(super) struct ReplayedSegment {
    pub number: u64,
    pub file: Arc<dyn DiskFile>,
    pub path: PathBuf,
    pub end: u64,
    pub head_bytes: u64,
    head: SegmentHead,
}

/// Reads every segment, in order.
pub(super) fn replay(files: &SegmentFiles, binding: u128) -> Result<Replayed, OpenLogError> {
    let listing = files.list().map_err(|source| OpenLogError::Io {
        context: format!("list {}", files.dir.display()),
        source,
    })?;
    // Segments are unlinked oldest first. Where a crash undid one unlinking but not the next, there
    // is a gap. That nothing live is lost before it is checked at the end: every entry that the
    // first head names must turn up or be purged.
    let gap = listing
        .segments
        .windows(2)
        .rposition(|pair| pair[1] != pair[0] + 1)
        .map_or(0, |at| at + 1);
    let (leftover, numbers) = listing.segments.split_at(gap);
    let mut replayed = Replayed {
        leftover: leftover.to_vec(),
        spares: listing.spares,
        ..Replayed::default()
    };

    // All heads first: where a segment ends is in the head of the next one.
    for number in numbers {
        let segment = open_segment(files, binding, *number)?;
        replayed.segments.push(segment);
    }
    let mut segments = std::mem::take(&mut replayed.segments);
    for at in 0..segments.len() {
        let sealed_at = segments.get(at + 1).map(|next| next.head.previous_end);
        let end = match sealed_at {
            Some(Some(end)) if end < segments[at].head_bytes => {
                return Err(damaged(
                    &segments[at + 1],
                    0,
                    "it says that the segment before it ended within its head",
                ));
            }
            Some(Some(end)) => replayed.sealed_segment(&segments[at], binding, at == 0, end)?,
            Some(None) => {
                return Err(damaged(
                    &segments[at + 1],
                    0,
                    "it calls itself the first of a log, but is not",
                ));
            }
            None => replayed.last_segment(&segments[at], binding, at == 0)?,
        };
        segments[at].end = end;
    }
    if let Some(first) = segments.first() {
        replayed.check_complete(first)?;
    }
    replayed.segments = segments;
    Ok(replayed)
}

fn open_segment(
    files: &SegmentFiles,
    binding: u128,
    number: u64,
) -> Result<ReplayedSegment, OpenLogError> {
    let path = files.path(number);
    let file: Arc<dyn DiskFile> = match files.disk.open(&path, Open::Existing) {
        Ok(file) => file.into(),
        Err(source) => {
            return Err(OpenLogError::Io {
                context: format!("open {}", path.display()),
                source,
            });
        }
    };
    let mut segment = ReplayedSegment {
        number,
        file,
        path,
        end: 0,
        head_bytes: 0,
        head: SegmentHead::default(),
    };
    let place = RecordPlace {
        binding,
        segment: number,
        offset: 0,
    };

    // The header has its own checksum, so its length is trusted before that much is read.
    let header = read(&segment, HEADER_BYTES)?;
    let len =
        record::record_len(&header, place).map_err(|error| bad_record(&segment, 0, &error))?;
    if len > HEAD_BYTES_MAX {
        return Err(damaged(&segment, 0, format!("a head of {len} bytes")));
    }
    segment.head_bytes = len as u64;
    let bytes = read(&segment, len)?;
    let found = record::decode(&bytes, place).map_err(|error| bad_record(&segment, 0, &error))?;
    match found.record {
        LogRecord::Head(head) if head.segment == number => segment.head = head,
        _ => return Err(damaged(&segment, 0, "it does not begin with its head")),
    }
    Ok(segment)
}

impl Replayed {
    /// Reads a segment that the next one's head says ended at `end`: all of it was synced.
    fn sealed_segment(
        &mut self,
        segment: &ReplayedSegment,
        binding: u128,
        first: bool,
        end: u64,
    ) -> Result<u64, OpenLogError> {
        let len = usize::try_from(end)
            .map_err(|_| damaged(segment, end, "its end is past what memory holds"))?;
        let bytes = read(segment, len)?;

        // Room is written and synced before the records in it, so no crash makes a segment shorter.
        if bytes.len() < len {
            return Err(damaged(
                segment,
                bytes.len() as u64,
                format!("the file was cut: it was synced to {end}"),
            ));
        }

        // All of it was synced before the next head was written, so any bad record is damage.
        let mut at = 0;
        while at < len {
            let place = RecordPlace {
                binding,
                segment: segment.number,
                offset: at as u64,
            };
            let found = record::decode(&bytes[at..], place)
                .map_err(|error| bad_record(segment, at as u64, &error))?;
            at += self.apply(segment, first, at as u64, found)?;
        }

        // A rebase that a crash cut short is not continued: every opening begins a new segment.
        self.replicas
            .values_mut()
            .for_each(LogIndex::abandon_restating);
        Ok(end)
    }

    /// Reads the last segment, and cuts what was never acknowledged.
    fn last_segment(
        &mut self,
        segment: &ReplayedSegment,
        binding: u128,
        first: bool,
    ) -> Result<u64, OpenLogError> {
        let bytes = read(segment, usize::MAX)?;
        let (mut at, mut marked) = (0, 0);
        loop {
            let place = RecordPlace {
                binding,
                segment: segment.number,
                offset: at as u64,
            };
            match record::decode(&bytes[at..], place) {
                Ok(found) => {
                    if found.record == LogRecord::Mark {
                        marked = at;
                    }
                    at += self.apply(segment, first, at as u64, found)?;
                }
                Err(error @ (BadRecord::Header | BadRecord::Body)) => {
                    // A mark after this place proves that it was synced. Without one nobody was
                    // told of it.
                    if let Some(mark) = record::find_mark(&bytes, at + 1, place) {
                        let reason =
                            format!("{error}, and the mark at {mark} says that it was synced");
                        return Err(damaged(segment, at as u64, reason));
                    }
                    log_truncation(segment, at, record::tail_end(&bytes, at, place));
                    break;
                }
                // The room for every record was written and synced before it.
                Err(
                    error @ (BadRecord::NoRoom
                    | BadRecord::CutBody { .. }
                    | BadRecord::Senseless(_)
                    | BadRecord::Format(_)),
                ) => {
                    return Err(bad_record(segment, at as u64, &error));
                }
            }
        }

        // A failed sync may have left this in the page cache only. It must be durable before it is
        // used.
        let rewritten = segment
            .file
            .write_at(&bytes[marked..at], marked as u64)
            .and_then(|()| segment.file.sync());
        rewritten.map_err(|source| OpenLogError::Io {
            context: format!("sync {}", segment.path.display()),
            source,
        })?;

        // As in a sealed segment: the rest of the rebase was never written.
        self.replicas
            .values_mut()
            .for_each(LogIndex::abandon_restating);
        Ok(at as u64)
    }

    /// Follows one record. Returns its length.
    fn apply(
        &mut self,
        segment: &ReplayedSegment,
        first: bool,
        offset: u64,
        found: FoundRecord,
    ) -> Result<usize, OpenLogError> {
        let contradiction = |reason: String| damaged(segment, offset, reason);
        let FoundRecord { record, key, len } = found;
        let no_spot = || contradiction("a segment of more than 4 GiB".into());
        let spot = EntryLocation {
            segment: segment.number,
            offset: u32::try_from(offset).map_err(|_| no_spot())?,
            len: u32::try_from(len).map_err(|_| no_spot())?,
        };
        match record {
            LogRecord::Head(_) if offset != 0 => {
                return Err(contradiction("a head in the middle of a segment".into()));
            }
            // The segments before are gone, so their state is known from here alone.
            LogRecord::Head(head) if first => {
                self.highest = head.highest.into_iter().collect();
                self.replicas = head
                    .replicas
                    .into_iter()
                    .map(|(key, head)| (key, LogIndex::restated(head)))
                    .collect();
            }
            // The head repeats what replay must have found. If they differ, records are missing.
            LogRecord::Head(head) => {
                let replicas = self
                    .replicas
                    .iter()
                    .map(|(key, written)| (*key, written.head()));
                if !head.replicas.iter().copied().eq(replicas)
                    || !head.highest.into_iter().eq(self.highest.clone())
                {
                    return Err(contradiction(
                        "the head does not agree with the segments before".into(),
                    ));
                }
            }
            LogRecord::Mark => {}
            // Ids are never used twice, so a second creation shows that the log is not the one
            // written.
            LogRecord::Create => {
                if self
                    .highest
                    .get(&key.group)
                    .is_some_and(|highest| *highest >= key.replica)
                {
                    return Err(contradiction(format!(
                        "replica {key} is created, but its id was used before"
                    )));
                }
                self.highest.insert(key.group, key.replica);
                self.replicas.insert(key, LogIndex::default());
            }
            LogRecord::Wipe => {
                let mut written = self
                    .replicas
                    .remove(&key)
                    .ok_or_else(|| contradiction(format!("replica {key} is not known")))?;
                written.wipe(&mut self.live);
            }
            LogRecord::Vote(_)
            | LogRecord::Truncate(_)
            | LogRecord::Purge(_)
            | LogRecord::Committed(_) => {
                self.follow(key, &record, spot).map_err(contradiction)?;
            }
            LogRecord::Entry(_) | LogRecord::Restate(_) | LogRecord::Restated(_) => {
                self.follow(key, &record, spot).map_err(contradiction)?
            }
        }
        Ok(len)
    }

    fn follow(
        &mut self,
        key: ReplicaKey,
        record: &LogRecord,
        spot: EntryLocation,
    ) -> Result<(), String> {
        let written = self
            .replicas
            .get_mut(&key)
            .ok_or_else(|| format!("replica {key} is not known"))?;
        written
            .apply(record, spot, &mut self.live)
            .map_err(|error| format!("replica {key}: {error}"))
    }

    fn check_complete(&self, first: &ReplayedSegment) -> Result<(), OpenLogError> {
        // The first head names where each log ends. An entry that is in no segment was lost with
        // one.
        match self
            .replicas
            .iter()
            .find(|(_, written)| written.missing() > 0)
        {
            None => Ok(()),
            Some((key, written)) => {
                let reason = format!(
                    "{} live entries of replica {key} are in no segment",
                    written.missing()
                );
                Err(damaged(first, 0, reason))
            }
        }
    }
}

fn log_truncation(segment: &ReplayedSegment, at: usize, end: usize) {
    let bytes = end - at;
    if bytes > 0 {
        tracing::info!(
            "cut {bytes} bytes at {at} from {}: they were never acknowledged",
            segment.path.display()
        );
    }
}

/// The first `len_max` bytes of a segment, or all there are.
fn read(segment: &ReplayedSegment, len_max: usize) -> Result<Vec<u8>, OpenLogError> {
    let read = || -> io::Result<Vec<u8>> {
        let len = usize::try_from(segment.file.len()?).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut bytes = vec![0; len.min(len_max)];
        let n = segment.file.read_at(&mut bytes, 0)?;
        bytes.truncate(n);
        Ok(bytes)
    };
    read().map_err(|source| OpenLogError::Io {
        context: format!("read {}", segment.path.display()),
        source,
    })
}

fn bad_record(segment: &ReplayedSegment, offset: u64, error: &BadRecord) -> OpenLogError {
    match error {
        BadRecord::Format(format) => OpenLogError::UnknownFormat {
            segment: segment.path.clone(),
            format: *format,
        },
        _ => damaged(segment, offset, error.to_string()),
    }
}

fn damaged(segment: &ReplayedSegment, offset: u64, reason: impl Into<String>) -> OpenLogError {
    OpenLogError::Damaged {
        segment: segment.path.clone(),
        offset,
        reason: reason.into(),
    }
}
