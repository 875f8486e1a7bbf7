//! The records of the log as bytes: a fixed framed header with a checksum of its own, and a body
//! with another.
//!
//! Both checksums are seeded with the log's binding, the segment number and the offset. So a record
//! is valid in one place of one log only: what an earlier use of a recycled segment left, or a copy
//! in another place, is never taken for a record. Kept out: what records mean ([`super::index`])
//! and which of them are damage ([`super::replay`]).
//!
//! ```text
//! 0  magic "QL"    2  format    3  kind    4  body length u32    8  group u64    16  replica u64
//! 24  crc of the body    28  crc of 0..28
//! ```
//! Numbers are little-endian. The body of an entry is written by hand (it is hot): term u64, index
//! u64, payload kind u8, payload. The other bodies are postcard.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{LogEntry, LogPayload, Vote};
use crate::storage::ReplicaKey;
use crate::types::{GroupId, LogId, ReplicaId};

/// The format written today.
pub(super) const FORMAT: u8 = 1;
pub(super) const HEADER_BYTES: usize = 32;
/// Bytes of an entry's body before its payload.
const ENTRY_PREFIX_BYTES: usize = 17;
const MAGIC: [u8; 2] = *b"QL";
/// The key of records that are of no replica.
pub(super) const NOBODY: ReplicaKey = ReplicaKey {
    group: GroupId(0),
    replica: ReplicaId(0),
};

/// Position of a record; its checksums are bound to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordPlace {
    pub binding: u128,
    pub segment: u64,
    pub offset: u64,
}

impl RecordPlace {
    fn seed(self) -> crc32fast::Hasher {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.binding.to_le_bytes());
        hasher.update(&self.segment.to_le_bytes());
        hasher.update(&self.offset.to_le_bytes());
        hasher
    }
}

/// One record of the log, about the replica that its header names (none for [`LogRecord::Head`] and
/// [`LogRecord::Mark`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LogRecord {
    /// First in every segment: what all that came before it amounts to.
    Head(SegmentHead),
    /// First in every batch: all before it was synced when it was written.
    Mark,
    Create,
    Wipe,
    Vote(Vote),
    /// The log ends at this id from here on.
    Truncate(Option<LogId>),
    /// Nothing up to this id is live from here on.
    Purge(LogId),
    Committed(Option<LogId>),
    Entry(LogEntry),
    /// Begins a rebase: followed at once by every live entry as [`LogRecord::Restated`].
    Restate(ReplicaHead),
    Restated(LogEntry),
}

/// The body of [`LogRecord::Head`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SegmentHead {
    pub segment: u64,
    /// End of the segment before this one, all of it synced. None in the first segment of a log.
    pub previous_end: Option<u64>,
    pub replicas: Vec<(ReplicaKey, ReplicaHead)>,
    /// The highest replica id that ever was created, for every group that ever had one here.
    pub highest: Vec<(GroupId, ReplicaId)>,
}

/// State of a replica in the log, without its entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReplicaHead {
    pub vote: Option<Vote>,
    pub purged: Option<LogId>,
    pub last: Option<LogId>,
    pub committed: Option<LogId>,
}

/// A record found in a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FoundRecord {
    pub record: LogRecord,
    pub key: ReplicaKey,
    /// Header and body.
    pub len: usize,
}

/// The reason why there is no record at a place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadRecord {
    #[error("the file ends before the header of a record")]
    NoRoom,
    #[error("no record header is here")]
    Header,
    #[error("the file ends before the body of the record, which is {len} bytes long")]
    CutBody { len: u64 },
    #[error("the checksum of the body does not match")]
    Body,
    #[error("the record has format {0}, which this version does not know")]
    Format(u8),
    #[error("the record is checksummed but makes no sense: {0}")]
    Senseless(String),
}

/// Bytes that an entry takes in the log.
pub(super) fn entry_len(entry: &LogEntry) -> usize {
    HEADER_BYTES + ENTRY_PREFIX_BYTES + entry.payload.bytes().len()
}

/// At least as many bytes as any record takes that is neither a head nor an entry.
pub(super) const SMALL_RECORD_BYTES_MAX: usize = HEADER_BYTES + 96;

/// Appends a record to `buffer`, which begins at the offset of `start`.
pub(super) fn encode(
    buffer: &mut Vec<u8>,
    start: RecordPlace,
    key: ReplicaKey,
    record: &LogRecord,
) {
    let at = buffer.len();
    let place = RecordPlace {
        offset: start.offset + at as u64,
        ..start
    };

    // The header holds the body's length and checksum, so it is filled in afterwards.
    buffer.extend_from_slice(&[0; HEADER_BYTES]);
    let kind = encode_body(buffer, record);
    seal(&mut buffer[at..], place, key, kind);
}

/// Fills in the header of a record whose body is behind it.
pub(super) fn seal(record: &mut [u8], place: RecordPlace, key: ReplicaKey, kind: u8) {
    let (header, body) = record.split_at_mut(HEADER_BYTES);
    let mut hasher = place.seed();
    hasher.update(body);
    let body_crc = hasher.finalize();
    let body_len = u32::try_from(body.len()).expect("appends beyond this are refused");

    // A checksum of its own lets a reader trust the length before it has read the body.
    header[..2].copy_from_slice(&MAGIC);
    header[2] = FORMAT;
    header[3] = kind;
    header[4..8].copy_from_slice(&body_len.to_le_bytes());
    header[8..16].copy_from_slice(&key.group.0.to_le_bytes());
    header[16..24].copy_from_slice(&key.replica.0.to_le_bytes());
    header[24..28].copy_from_slice(&body_crc.to_le_bytes());
    let mut hasher = place.seed();
    hasher.update(&header[..28]);
    let header_crc = hasher.finalize();
    header[28..].copy_from_slice(&header_crc.to_le_bytes());
}

fn encode_body(buffer: &mut Vec<u8>, record: &LogRecord) -> u8 {
    // The numbers are part of the disk format and never get another meaning.
    match record {
        LogRecord::Head(head) => postcard_body(buffer, head, 1),
        LogRecord::Mark => 2,
        LogRecord::Create => 3,
        LogRecord::Wipe => 4,
        LogRecord::Vote(vote) => postcard_body(buffer, vote, 5),
        LogRecord::Truncate(last) => postcard_body(buffer, last, 6),
        LogRecord::Purge(upto) => postcard_body(buffer, upto, 7),
        LogRecord::Committed(id) => postcard_body(buffer, id, 8),
        LogRecord::Entry(entry) => entry_body(buffer, entry, 9),
        LogRecord::Restate(head) => postcard_body(buffer, head, 10),
        LogRecord::Restated(entry) => entry_body(buffer, entry, 11),
    }
}

fn postcard_body<T: Serialize>(buffer: &mut Vec<u8>, value: &T, kind: u8) -> u8 {
    let bytes = postcard::to_extend(value, std::mem::take(buffer));
    *buffer = bytes.expect("encoding into memory fails for no record");
    kind
}

fn entry_body(buffer: &mut Vec<u8>, entry: &LogEntry, kind: u8) -> u8 {
    buffer.extend_from_slice(&entry.id.term.to_le_bytes());
    buffer.extend_from_slice(&entry.id.index.to_le_bytes());
    buffer.push(match entry.payload {
        LogPayload::Blank => 0,
        LogPayload::Normal(_) => 1,
        LogPayload::Membership(_) => 2,
    });
    buffer.extend_from_slice(entry.payload.bytes());
    kind
}

/// The header and body length of the record at the start of `bytes`, if its header is whole.
fn check_header(bytes: &[u8], place: RecordPlace) -> Result<usize, BadRecord> {
    let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(BadRecord::NoRoom)?;
    if header[..2] != MAGIC {
        return Err(BadRecord::Header);
    }
    let mut hasher = place.seed();
    hasher.update(&header[..28]);
    if hasher.finalize() != u32_at(header, 28) {
        return Err(BadRecord::Header);
    }

    // After the checksum: a flipped bit must not pass for a newer version.
    match header[2] {
        FORMAT => Ok(u32_at(header, 4) as usize),
        format => Err(BadRecord::Format(format)),
    }
}

/// The length, with its header, of the record whose header is at the start of `header`.
pub(super) fn record_len(header: &[u8], place: RecordPlace) -> Result<usize, BadRecord> {
    Ok(HEADER_BYTES + check_header(header, place)?)
}

/// Reads the record at the start of `bytes`, which go on to the end of the file.
pub(super) fn decode(bytes: &[u8], place: RecordPlace) -> Result<FoundRecord, BadRecord> {
    let len = record_len(bytes, place)?;
    let body = bytes.get(HEADER_BYTES..len).ok_or(BadRecord::CutBody {
        len: (len - HEADER_BYTES) as u64,
    })?;
    let mut hasher = place.seed();
    hasher.update(body);
    if hasher.finalize() != u32_at(bytes, 24) {
        return Err(BadRecord::Body);
    }
    let key = ReplicaKey {
        group: GroupId(u64_at(bytes, 8)),
        replica: ReplicaId(u64_at(bytes, 16)),
    };
    let record = match bytes[3] {
        1 => LogRecord::Head(from_postcard(body)?),
        2 => empty(body, LogRecord::Mark)?,
        3 => empty(body, LogRecord::Create)?,
        4 => empty(body, LogRecord::Wipe)?,
        5 => LogRecord::Vote(from_postcard(body)?),
        6 => LogRecord::Truncate(from_postcard(body)?),
        7 => LogRecord::Purge(from_postcard(body)?),
        8 => LogRecord::Committed(from_postcard(body)?),
        9 => LogRecord::Entry(decode_entry(body)?),
        10 => LogRecord::Restate(from_postcard(body)?),
        11 => LogRecord::Restated(decode_entry(body)?),
        // Its checksum holds, so it is no torn tail.
        kind => return Err(BadRecord::Senseless(format!("kind {kind} is unknown"))),
    };
    Ok(FoundRecord { record, key, len })
}

fn empty(body: &[u8], record: LogRecord) -> Result<LogRecord, BadRecord> {
    if body.is_empty() {
        Ok(record)
    } else {
        Err(BadRecord::Senseless(format!(
            "{} bytes too many",
            body.len()
        )))
    }
}

fn from_postcard<T: DeserializeOwned>(body: &[u8]) -> Result<T, BadRecord> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(BadRecord::Senseless(format!(
            "{} bytes too many",
            rest.len()
        ))),
        Err(error) => Err(BadRecord::Senseless(error.to_string())),
    }
}

fn decode_entry(body: &[u8]) -> Result<LogEntry, BadRecord> {
    let Some((prefix, payload)) = body.split_at_checked(ENTRY_PREFIX_BYTES) else {
        return Err(BadRecord::Senseless(format!(
            "an entry of {} bytes",
            body.len()
        )));
    };
    let id = LogId {
        term: u64_at(prefix, 0),
        index: u64_at(prefix, 8),
    };
    let payload = match prefix[16] {
        0 => empty(payload, LogRecord::Mark).map(|_| LogPayload::Blank)?,
        1 => LogPayload::Normal(Bytes::copy_from_slice(payload)),
        2 => LogPayload::Membership(Bytes::copy_from_slice(payload)),
        kind => {
            return Err(BadRecord::Senseless(format!(
                "payload kind {kind} is unknown"
            )));
        }
    };
    Ok(LogEntry { id, payload })
}

/// The offset of the first mark that lies at or after `from` in a segment's `bytes`. It is looked
/// for at every byte, since what is before it is damaged.
pub(super) fn find_mark(bytes: &[u8], from: usize, place: RecordPlace) -> Option<u64> {
    let candidates = bytes.get(from..)?.windows(HEADER_BYTES).enumerate();
    let mut marks = candidates
        .filter(|(_, window)| window[..2] == MAGIC && window[3] == 2)
        .filter_map(|(i, window)| {
            let offset = (from + i) as u64;
            decode(window, RecordPlace { offset, ..place })
                .ok()
                .map(|_| offset)
        });
    marks.next()
}

/// Returns the end of the last record of this segment that begins at or after `from` in its
/// `bytes`, whole or not; `from` if there is none. The rest is pre-written space: zeros, or records
/// of a segment that the file was before.
pub(super) fn tail_end(bytes: &[u8], from: usize, place: RecordPlace) -> usize {
    let candidates = bytes[from.min(bytes.len())..]
        .windows(HEADER_BYTES)
        .enumerate()
        .filter(|(_, window)| window[..2] == MAGIC);
    let ends = candidates.filter_map(|(i, window)| {
        let at = from + i;
        record_len(
            window,
            RecordPlace {
                offset: at as u64,
                ..place
            },
        )
        .ok()
        .map(|len| (at + len).min(bytes.len()))
    });
    ends.max().unwrap_or(from)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: RecordPlace = RecordPlace {
        binding: 7,
        segment: 3,
        offset: 40,
    };
    const KEY: ReplicaKey = ReplicaKey {
        group: GroupId(5),
        replica: ReplicaId(9),
    };

    fn id(term: u64, index: u64) -> LogId {
        LogId { term, index }
    }

    fn records() -> Vec<LogRecord> {
        let vote = Vote {
            term: u64::MAX,
            voted_for: Some(ReplicaId(u64::MAX)),
            committed: true,
        };
        let most = Some(id(u64::MAX, u64::MAX));
        let replica = ReplicaHead {
            vote: Some(vote),
            purged: most,
            last: most,
            committed: most,
        };
        let head = SegmentHead {
            segment: 3,
            previous_end: Some(80),
            replicas: vec![(KEY, replica)],
            highest: vec![(GroupId(5), ReplicaId(9))],
        };
        vec![
            LogRecord::Head(head),
            LogRecord::Mark,
            LogRecord::Create,
            LogRecord::Wipe,
            LogRecord::Vote(vote),
            LogRecord::Truncate(None),
            LogRecord::Purge(id(u64::MAX, u64::MAX)),
            LogRecord::Committed(most),
            LogRecord::Entry(LogEntry {
                id: id(2, 8),
                payload: LogPayload::Normal(Bytes::from_static(b"abc")),
            }),
            LogRecord::Restate(replica),
            LogRecord::Restated(LogEntry {
                id: id(2, 8),
                payload: LogPayload::Membership(Bytes::from_static(b"m")),
            }),
            LogRecord::Entry(LogEntry {
                id: id(2, 9),
                payload: LogPayload::Blank,
            }),
        ]
    }

    #[test]
    fn what_is_encoded_is_decoded_in_its_place_only() {
        for record in records() {
            let mut bytes = Vec::new();
            encode(&mut bytes, PLACE, KEY, &record);
            let found = decode(&bytes, PLACE).expect("own encoding");
            assert_eq!(
                (&found.record, found.key, found.len),
                (&record, KEY, bytes.len())
            );
            assert!(
                matches!(record, LogRecord::Head(_) | LogRecord::Entry(_))
                    || found.len <= SMALL_RECORD_BYTES_MAX,
                "{record:?}"
            );
            for place in [
                RecordPlace {
                    binding: 8,
                    ..PLACE
                },
                RecordPlace {
                    segment: 4,
                    ..PLACE
                },
                RecordPlace {
                    offset: 41,
                    ..PLACE
                },
            ] {
                assert_eq!(decode(&bytes, place), Err(BadRecord::Header));
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        for record in records() {
            let mut bytes = Vec::new();
            encode(&mut bytes, PLACE, KEY, &record);
            for bit in 0..bytes.len() * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(decode(&bytes, PLACE).is_err(), "bit {bit} of {record:?}");
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn the_format_stands_still() {
        let mut bytes = Vec::new();
        for record in records() {
            encode(&mut bytes, PLACE, KEY, &record);
        }
        assert_eq!(
            (bytes.len(), crc32fast::hash(&bytes)),
            (684, 3940576795),
            "the format changed: write a new format version beside the old"
        );
        let mut entry = Vec::new();
        encode(&mut entry, PLACE, KEY, &records()[8]);
        assert_eq!(
            entry[..24],
            *b"QL\x01\x09\x14\0\0\0\x05\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0"
        );
        assert_eq!(entry[32..], *b"\x02\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x01abc");
    }

    #[test]
    fn a_mark_is_found_behind_damage() {
        let mut bytes = vec![0xff; 13];
        let start = RecordPlace { offset: 0, ..PLACE };
        encode(&mut bytes, start, KEY, &LogRecord::Create);
        let mark_at = bytes.len() as u64;
        encode(&mut bytes, start, NOBODY, &LogRecord::Mark);
        assert_eq!(find_mark(&bytes, 0, start), Some(mark_at));
        assert_eq!(find_mark(&bytes, mark_at as usize + 1, start), None);
        assert_eq!(
            find_mark(
                &bytes,
                0,
                RecordPlace {
                    segment: 4,
                    ..start
                }
            ),
            None
        );
    }

    #[test]
    fn a_tail_ends_where_its_last_record_would() {
        let start = RecordPlace { offset: 0, ..PLACE };
        let mut bytes = Vec::new();
        encode(&mut bytes, start, KEY, &LogRecord::Create);
        let torn_at = bytes.len();
        encode(&mut bytes, start, KEY, &records()[8]);
        let end = bytes.len();
        bytes[end - 1] ^= 1;
        bytes.extend([0; 100]);
        assert_eq!(tail_end(&bytes, torn_at, start), end);
        assert_eq!(tail_end(&bytes, end, start), end, "room is no tail");
        assert_eq!(
            tail_end(
                &bytes,
                torn_at,
                RecordPlace {
                    segment: 4,
                    ..start
                }
            ),
            torn_at,
            "nor is what another segment left"
        );
        assert_eq!(tail_end(&bytes[..end - 1], torn_at, start), end - 1);
        assert_eq!(tail_end(&bytes, bytes.len() + 9, start), bytes.len() + 9);
    }
}
