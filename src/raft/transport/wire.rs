//! The frames between peers, as bytes. Their meaning is in `network`, `snapshots` and
//! `request_handler`; `lanes` carries them.
//!
//! ```text
//! length u32 LE (of all that follows) | format u8 | sequence u64 LE | envelope (postcard) | tail
//! ```
//! The tail carries the payloads of log entries, or a chunk of a snapshot, as raw bytes: they are
//! encoded once, by whoever made them, and never again. Everything here comes from the network:
//! reading it yields an error or a valid value, and allocates no more than arrived.

use bytes::{Buf, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::raft::election::leases::LeaseTimings;
use crate::sm::starts::Starts;
use crate::storage::log::{LogEntry, LogPayload, Vote};
use crate::storage::map::Applied;
use crate::types::{ClusterId, DirectoryId, GroupId, LogId, NodeId, ReplicaId};

/// Format of frames.
const FORMAT: u8 = 1;
const LENGTH_BYTES: usize = 4;
/// Format of the starts that follow a hello.
const STARTS_FORMAT: u8 = 1;
/// Format of the timings that follow the starts.
const LEASE_TIMINGS_FORMAT: u8 = 1;
/// Length of the format and the sequence.
const PREFIX_BYTES: usize = 9;

const NO_TAIL: &[Bytes] = &[];

/// Longest frame in bytes. An append carries about 1 MiB of entries, and at least one; an entry is
/// as large as a command may be, which the largest HTTP body bounds.
pub const FRAME_BYTES_MAX: usize = 80 << 20;

/// Longest hello in bytes. A peer that has not said who it is must not make this node keep more.
pub const HELLO_BYTES_MAX: usize = 64 << 10;

/// An error of bytes that are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a frame of {0} bytes is longer than any")]
    TooLong(usize),
    #[error("format {0} is unknown to this version")]
    Format(u8),
    #[error("a frame can't be read: {0}")]
    Malformed(String),
}

/// The first frame of a lane, which names both ends. Everything after it is between these two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub cluster: ClusterId,
    pub from: NodeId,
    pub from_directory: DirectoryId,
    pub to: NodeId,
    pub to_directory: DirectoryId,
}

/// The group and the replicas that a frame is between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameHeader {
    pub group: GroupId,
    pub sender: ReplicaId,
    pub target: ReplicaId,
}

/// A request of one replica to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerRequest {
    /// The payloads of the entries follow one another in the tail.
    Append {
        vote: Vote,
        previous: Option<LogId>,
        commit: Option<LogId>,
        entries: Vec<EntryHead>,
    },
    Vote {
        vote: Vote,
        last: Option<LogId>,
        leadership_transfer: bool,
    },
    PreVote {
        vote: Vote,
        last: Option<LogId>,
    },
    TransferLeader {
        from: Vote,
        to: ReplicaId,
        last: Option<LogId>,
    },
    /// Begins to send a snapshot, or resumes it.
    SnapshotOpen {
        vote: Vote,
        snapshot: SnapshotName,
    },
    /// Carries a part of the snapshot in the tail.
    SnapshotChunk {
        snapshot: SnapshotName,
        offset: u64,
    },
    /// Asks to install the snapshot, all of which was sent.
    SnapshotInstall {
        vote: Vote,
        snapshot: SnapshotName,
    },
    /// To a witness in place of a snapshot: the log that is still there begins after this.
    Watermark {
        vote: Vote,
        applied: Applied,
    },
    /// To a witness: every replica with a map has the entries through this index durably, and they
    /// are committed.
    PurgeIndex {
        index: u64,
    },
    /// To a replica whose map differs from a majority: hold the map, for a snapshot of the leader's
    /// to take its place. From level 1 on.
    Rebuild {
        vote: Vote,
    },
}

/// The head of a log entry, whose payload is in the tail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryHead {
    pub id: LogId,
    pub kind: PayloadKind,
    /// Length of its payload in the tail.
    pub bytes_len: u32,
}

/// The kind of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PayloadKind {
    Blank,
    Normal,
    Membership,
}

/// Names a snapshot file by its author, its last entry and its length. Two files of one name are
/// equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotName {
    pub written_by: ReplicaId,
    pub applied: Option<LogId>,
    pub bytes_len: u64,
}

/// A reply of one replica to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerReply {
    Append(AppendReply),
    Vote {
        vote: Vote,
        last: Option<LogId>,
        granted: bool,
    },
    /// The target's answer to a request to take over.
    TransferLeader(TransferReply),
    /// Bytes of the snapshot that have arrived.
    SnapshotHas {
        bytes_len: u64,
    },
    /// The snapshot has arrived, and was installed or not needed.
    SnapshotInstalled {
        vote: Vote,
    },
    Refused(PeerRefusal),
    /// A witness asks for the watermark in place of the snapshot.
    WatermarkWanted,
    /// The request was noted.
    Noted,
}

/// The answer to an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AppendReply {
    Success,
    Partial(Option<LogId>),
    Conflict,
    HigherVote(Vote),
}

/// The answer to a request to take over the lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransferReply {
    Accepted,
    VoteChanged {
        expected: Vote,
        actual: Vote,
    },
    LogNotFlushed {
        expected: Option<LogId>,
        actual: Option<LogId>,
    },
}

/// The reason why a frame was not looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum PeerRefusal {
    #[error("it belongs to another cluster")]
    OtherCluster,
    #[error("it is {0}")]
    OtherNode(NodeId),
    #[error("its data directory is {0}")]
    OtherDirectory(DirectoryId),
    #[error("it belongs to no cluster yet")]
    NoCluster,
    #[error("it has no replica of {0}")]
    NoReplica(GroupId),
    #[error("its replica of the group is {0}")]
    OtherReplica(ReplicaId),
    #[error("its replica has stopped")]
    Stopped,
    #[error("too much of this group waits there already")]
    Busy,
    #[error("its lease to a leader may not have run out")]
    Leased,
    #[error("it failed: {0}")]
    Failed(String),
    #[error("it could not read the frame")]
    Unreadable,
    /// Sent only to peers that announce their starts.
    #[error(
        "it knows start {number} of this data directory, which is not in it: the directory is an \
        old copy"
    )]
    Outdated { number: u64 },
    /// Sent only to peers that announce their starts.
    #[error("another process runs with a copy of this data directory")]
    Doubled,
    /// Sent only to peers that announce their starts.
    #[error("it runs {0}, which has to be the same on all nodes")]
    OtherTimings(LeaseTimings),
}

/// An encoded frame that has no sequence number yet.
#[derive(Debug, Clone)]
pub struct UnsealedFrame(BytesMut);

impl UnsealedFrame {
    pub fn bytes_len(&self) -> usize {
        self.0.len()
    }

    /// Returns the frame with its sequence number.
    pub fn seal(mut self, sequence: u64) -> Bytes {
        assert!(
            self.0.len() > LENGTH_BYTES + PREFIX_BYTES,
            "a frame has an envelope"
        );
        self.0[LENGTH_BYTES + 1..LENGTH_BYTES + PREFIX_BYTES]
            .copy_from_slice(&sequence.to_le_bytes());
        self.0.freeze()
    }
}

/// Encodes a hello of a node that announces nothing else.
pub fn encode_hello(hello: &Hello) -> Bytes {
    let mut buffer = BytesMut::with_capacity(128);
    write(&mut buffer, 0, hello, NO_TAIL);
    buffer.freeze()
}

/// Encodes a hello that is followed by the sender's starts and its timings. Programs of the first
/// release read the hello alone, and later ones that know no timings the starts as well.
pub fn encode_greeting(hello: &Hello, starts: &Starts, lease_timings: &LeaseTimings) -> Bytes {
    let mut buffer = BytesMut::with_capacity(2048);
    let mut tail = starts_tail(starts);
    tail.push(LEASE_TIMINGS_FORMAT);
    postcard::to_io(lease_timings, &mut tail)
        .expect("writing into memory fails for no type of this module");
    write(&mut buffer, 0, hello, &[tail]);
    buffer.freeze()
}

/// Writes the answer to a hello that was accepted: the starts of this side.
pub fn encode_welcome(buffer: &mut BytesMut, sequence: u64, starts: &Starts) {
    write(buffer, sequence, &PeerReply::Noted, &[starts_tail(starts)]);
}

fn starts_tail(starts: &Starts) -> Vec<u8> {
    let mut tail = vec![STARTS_FORMAT];
    postcard::to_io(starts, &mut tail)
        .expect("writing into memory fails for no type of this module");
    tail
}

/// Returns the starts in the tail of a hello or of its answer, and the bytes behind them; None if
/// there are none, or in a format that this version does not know.
fn read_starts(tail: &[u8]) -> Result<Option<(Starts, &[u8])>, WireError> {
    read_part(STARTS_FORMAT, tail)
}

fn read_part<T: DeserializeOwned>(
    format: u8,
    tail: &[u8],
) -> Result<Option<(T, &[u8])>, WireError> {
    match tail.split_first() {
        Some((found, body)) if *found == format => match postcard::take_from_bytes(body) {
            Ok(read) => Ok(Some(read)),
            Err(error) => Err(WireError::Malformed(error.to_string())),
        },
        Some(_) | None => Ok(None),
    }
}

/// Encodes a request with a tail, which may be empty.
pub fn encode_request(header: FrameHeader, request: &PeerRequest, tail: &[u8]) -> UnsealedFrame {
    let mut buffer = BytesMut::with_capacity(128 + tail.len());
    write(&mut buffer, 0, &(header, request), &[tail]);
    UnsealedFrame(buffer)
}

/// Encodes an append of these entries.
pub fn encode_append(
    header: FrameHeader,
    vote: Vote,
    previous: Option<LogId>,
    commit: Option<LogId>,
    entries: &[LogEntry],
) -> UnsealedFrame {
    let payload = |entry: &LogEntry| match &entry.payload {
        LogPayload::Blank => (PayloadKind::Blank, Bytes::new()),
        LogPayload::Normal(bytes) => (PayloadKind::Normal, bytes.clone()),
        LogPayload::Membership(bytes) => (PayloadKind::Membership, bytes.clone()),
    };

    // Payloads lie apart from the heads, so that the receiver cuts them out without copying.
    let mut heads = Vec::with_capacity(entries.len());
    let mut payloads = Vec::with_capacity(entries.len());
    for entry in entries {
        let (kind, bytes) = payload(entry);
        let bytes_len = u32::try_from(bytes.len()).expect("a log record is far below 4 GiB");
        heads.push(EntryHead {
            id: entry.id,
            kind,
            bytes_len,
        });
        payloads.push(bytes);
    }

    let tail_bytes: usize = payloads.iter().map(Bytes::len).sum();
    let mut buffer = BytesMut::with_capacity(128 + 24 * heads.len() + tail_bytes);
    write(
        &mut buffer,
        0,
        &(
            header,
            PeerRequest::Append {
                vote,
                previous,
                commit,
                entries: heads,
            },
        ),
        &payloads,
    );
    UnsealedFrame(buffer)
}

/// Appends a reply to `buffer`.
pub fn encode_reply(buffer: &mut BytesMut, sequence: u64, reply: &PeerReply) {
    write(buffer, sequence, reply, NO_TAIL);
}

fn write(
    buffer: &mut BytesMut,
    sequence: u64,
    envelope: &impl Serialize,
    tail: &[impl AsRef<[u8]>],
) {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; LENGTH_BYTES]);
    buffer.extend_from_slice(&[FORMAT]);
    buffer.extend_from_slice(&sequence.to_le_bytes());
    postcard::to_io(envelope, Writer(buffer))
        .expect("writing into memory fails for no type of this module");
    for part in tail {
        buffer.extend_from_slice(part.as_ref());
    }
    let length =
        u32::try_from(buffer.len() - start - LENGTH_BYTES).expect("a frame is far below 4 GiB");
    buffer[start..start + LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
}

struct Writer<'a>(&'a mut BytesMut);

impl std::io::Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A frame as it arrived: its sequence number, and the bytes of its envelope and tail.
#[derive(Debug, Clone)]
pub struct ReceivedFrame {
    pub sequence: u64,
    body: Bytes,
}

impl ReceivedFrame {
    /// Returns the hello, and the starts and timings that its sender announces.
    pub fn hello(&self) -> Result<(Hello, Option<Starts>, Option<LeaseTimings>), WireError> {
        let (hello, tail): (Hello, Bytes) = self.envelope()?;
        let Some((starts, rest)) = read_starts(&tail)? else {
            return Ok((hello, None, None));
        };
        let lease_timings =
            read_part(LEASE_TIMINGS_FORMAT, rest)?.map(|(lease_timings, _)| lease_timings);
        Ok((hello, Some(starts), lease_timings))
    }

    /// Returns the starts in the answer to a hello.
    pub fn welcome(&self) -> Result<Option<Starts>, WireError> {
        let (_, tail): (PeerReply, Bytes) = self.envelope()?;
        Ok(read_starts(&tail)?.map(|(starts, _)| starts))
    }

    /// Returns the request and its tail.
    pub fn request(&self) -> Result<(FrameHeader, PeerRequest, Bytes), WireError> {
        let ((header, request), tail) = self.envelope()?;
        Ok((header, request, tail))
    }

    /// Returns the reply.
    pub fn reply(&self) -> Result<PeerReply, WireError> {
        Ok(self.envelope()?.0)
    }

    fn envelope<T: DeserializeOwned>(&self) -> Result<(T, Bytes), WireError> {
        match postcard::take_from_bytes(&self.body) {
            Ok((envelope, tail)) => Ok((envelope, self.body.slice(self.body.len() - tail.len()..))),
            Err(error) => Err(WireError::Malformed(error.to_string())),
        }
    }
}

/// Joins the heads of entries with their payloads in the tail.
pub fn entries(heads: &[EntryHead], mut tail: Bytes) -> Result<Vec<LogEntry>, WireError> {
    let mut entries = Vec::with_capacity(heads.len());
    for header in heads {
        let bytes_len = header.bytes_len as usize;
        if tail.len() < bytes_len {
            return Err(WireError::Malformed(format!(
                "the payload of entry {} is cut off",
                header.id
            )));
        }

        let bytes = tail.split_to(bytes_len);
        let payload = match header.kind {
            PayloadKind::Blank => LogPayload::Blank,
            PayloadKind::Normal => LogPayload::Normal(bytes),
            PayloadKind::Membership => LogPayload::Membership(bytes),
        };
        entries.push(LogEntry {
            id: header.id,
            payload,
        });
    }

    // If lengths and payloads do not add up, no entry can be trusted to have its own bytes.
    if tail.has_remaining() {
        return Err(WireError::Malformed(format!(
            "{} bytes too many",
            tail.len()
        )));
    }
    Ok(entries)
}

/// Cuts the bytes that arrive into frames.
#[derive(Debug)]
pub struct FrameReader {
    /// Longest frame that is accepted; a longer one is refused before its bytes are kept.
    frame_bytes_max: usize,
    /// The beginning of a frame whose rest has not arrived.
    partial: BytesMut,
    /// Bytes that arrived and were not looked at. Whole frames in it are handed out without
    /// copying.
    rest: Bytes,
}

impl Default for FrameReader {
    /// Returns a reader of frames of any kind.
    fn default() -> Self {
        Self::with_limit(FRAME_BYTES_MAX)
    }
}

impl FrameReader {
    /// Returns a reader of frames of at most this length.
    pub fn with_limit(frame_bytes_max: usize) -> Self {
        Self {
            frame_bytes_max,
            partial: BytesMut::new(),
            rest: Bytes::new(),
        }
    }

    /// Accepts frames up to this length from now on.
    pub fn set_limit(&mut self, frame_bytes_max: usize) {
        self.frame_bytes_max = frame_bytes_max;
    }

    /// Returns the length of the frame whose beginning has arrived; None if there is no incomplete
    /// frame.
    pub fn awaited_bytes(&self) -> Option<usize> {
        let length = self.partial.first_chunk::<LENGTH_BYTES>()?;
        Some(LENGTH_BYTES + u32::from_le_bytes(*length) as usize)
    }

    /// Takes bytes that have arrived.
    pub fn push(&mut self, chunk: Bytes) {
        // Whole frames are handed out without copying. Only one that is cut has to be gathered.
        if self.partial.is_empty() && self.rest.is_empty() {
            self.rest = chunk;
        } else {
            self.partial
                .extend_from_slice(&std::mem::take(&mut self.rest));
            self.partial.extend_from_slice(&chunk);
        }
    }

    /// Returns the next whole frame, if it has arrived. After an error the stream can't be read any
    /// further.
    pub fn next(&mut self) -> Result<Option<ReceivedFrame>, WireError> {
        if self.partial.is_empty() {
            let Some(total) = frame_bytes(&self.rest, self.frame_bytes_max)? else {
                self.partial
                    .extend_from_slice(&std::mem::take(&mut self.rest));
                return Ok(None);
            };
            return parse(self.rest.split_to(total)).map(Some);
        }
        match frame_bytes(&self.partial, self.frame_bytes_max)? {
            Some(total) => parse(self.partial.split_to(total).freeze()).map(Some),
            None => Ok(None),
        }
    }
}

/// Returns the length of the frame that `bytes` begin with, if all of it is there.
fn frame_bytes(bytes: &[u8], bytes_max: usize) -> Result<Option<usize>, WireError> {
    let Some(length) = bytes.first_chunk::<LENGTH_BYTES>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*length) as usize;

    // Refused by its length alone, before memory is taken for it.
    if length > bytes_max {
        return Err(WireError::TooLong(length));
    }
    let total = LENGTH_BYTES + length;
    Ok((bytes.len() >= total).then_some(total))
}

fn parse(mut frame: Bytes) -> Result<ReceivedFrame, WireError> {
    frame.advance(LENGTH_BYTES);
    if frame.len() < PREFIX_BYTES {
        return Err(WireError::Malformed(format!(
            "{} bytes are too few",
            frame.len()
        )));
    }
    match frame.get_u8() {
        FORMAT => Ok(ReceivedFrame {
            sequence: frame.get_u64_le(),
            body: frame,
        }),
        version => Err(WireError::Format(version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::types::StartId;

    const HEAD: FrameHeader = FrameHeader {
        group: GroupId(3),
        sender: ReplicaId(1),
        target: ReplicaId(2),
    };

    fn append() -> (Vec<LogEntry>, Bytes) {
        let entry = |index, payload| LogEntry {
            id: LogId { term: 2, index },
            payload,
        };
        let entries = vec![
            entry(5, LogPayload::Blank),
            entry(6, LogPayload::Normal(Bytes::from_static(b"six"))),
            entry(7, LogPayload::Membership(Bytes::from_static(b"seven"))),
        ];
        let vote = Vote {
            term: 2,
            voted_for: Some(ReplicaId(1)),
            committed: true,
        };
        let previous = Some(LogId { term: 1, index: 4 });
        let frame = encode_append(HEAD, vote, previous, None, &entries).seal(77);
        (entries, frame)
    }

    fn check(frame: &ReceivedFrame, expected: &[LogEntry]) {
        assert_eq!(frame.sequence, 77);
        let (header, request, tail) = frame.request().expect("a request");
        assert_eq!(header, HEAD);
        let PeerRequest::Append { entries: heads, .. } = request else {
            panic!("not an append: {request:?}")
        };
        assert_eq!(entries(&heads, tail).expect("whole payloads"), expected);
    }

    #[test]
    fn a_hello_with_starts_is_read_by_who_knows_none_and_one_without_by_who_knows_them() {
        let ids = (ClusterId(1), DirectoryId(2), DirectoryId(3));
        let hello = Hello {
            cluster: ids.0,
            from: NodeId(4),
            from_directory: ids.1,
            to: NodeId(5),
            to_directory: ids.2,
        };
        let starts = Starts::first(StartId(6)).followed_by(StartId(300));
        let frame = |frame: Bytes| {
            let mut reader = FrameReader::default();
            reader.push(frame);
            reader.next().expect("a frame").expect("a whole one")
        };
        assert_eq!(frame(encode_hello(&hello)).hello(), Ok((hello, None, None)));
        let lease_timings = LeaseTimings {
            lease_drift_ms: Some(50),
            election_ms_max: 420,
        };
        let greeting = frame(encode_greeting(&hello, &starts, &lease_timings));
        assert_eq!(
            greeting.hello(),
            Ok((hello, Some(starts.clone()), Some(lease_timings)))
        );
        // As programs of the first release read it: what stands behind is none of theirs.
        assert_eq!(
            postcard::take_from_bytes::<Hello>(&greeting.body).map(|(hello, _)| hello),
            Ok(hello)
        );
        let tail = &greeting.body[greeting.body.len() - 11..];
        assert_eq!(
            tail,
            [
                STARTS_FORMAT,
                1,
                2,
                6,
                0xac,
                2,
                LEASE_TIMINGS_FORMAT,
                1,
                50,
                0xa4,
                3
            ],
            "the encoding stands"
        );
        // As programs that know no pace wrote it, and as they read it.
        let mut buffer = BytesMut::new();
        write(&mut buffer, 0, &hello, &[starts_tail(&starts)]);
        assert_eq!(
            frame(buffer.freeze()).hello(),
            Ok((hello, Some(starts.clone()), None))
        );

        let mut buffer = BytesMut::new();
        encode_welcome(&mut buffer, 9, &starts);
        let welcome = frame(buffer.freeze());
        assert_eq!(
            (welcome.reply(), welcome.welcome()),
            (Ok(PeerReply::Noted), Ok(Some(starts)))
        );
        let mut buffer = BytesMut::new();
        write(
            &mut buffer,
            9,
            &PeerReply::Noted,
            &[[STARTS_FORMAT + 1, 7, 7]],
        );
        assert_eq!(
            frame(buffer.freeze()).welcome(),
            Ok(None),
            "of a later version"
        );
        let mut buffer = BytesMut::new();
        write(&mut buffer, 9, &hello, &[[STARTS_FORMAT, 0, 0]]);
        assert!(frame(buffer.freeze()).hello().is_err(), "unsound starts");
    }

    #[test]
    fn frames_are_found_however_the_bytes_are_cut() {
        let (expected, frame) = append();
        let twice = [&frame[..], &frame[..]].concat();
        for cut in 0..twice.len() {
            let mut reader = FrameReader::default();
            let mut found = 0;
            for chunk in [&twice[..cut], &twice[cut..]] {
                reader.push(Bytes::copy_from_slice(chunk));
                while let Some(frame) = reader.next().expect("valid frames") {
                    check(&frame, &expected);
                    found += 1;
                }
            }
            assert_eq!(found, 2, "cut at {cut}");
        }
    }

    #[test]
    fn what_is_no_frame_is_an_error_and_never_a_panic() {
        let (_, frame) = append();
        for position in 0..frame.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = frame.to_vec();
                bytes[position] ^= flip;
                let mut reader = FrameReader::default();
                reader.push(Bytes::from(bytes));
                if let Ok(Some(frame)) = reader.next()
                    && let Ok((_, PeerRequest::Append { entries: heads, .. }, tail)) =
                        frame.request()
                {
                    let _ = entries(&heads, tail);
                }
            }
        }
        let mut reader = FrameReader::default();
        reader.push(Bytes::from_static(b"\xff\xff\xff\xff"));
        assert!(matches!(reader.next(), Err(WireError::TooLong(_))));
    }
}
