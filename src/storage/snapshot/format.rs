//! The bytes of a snapshot file, format 1. Numbers are little-endian; every checksum is a CRC-32.
//!
//! ```text
//! head     magic "QRTSNAP\0" · format u32 · length u32 · head (postcard)
//!          · checksum of all before
//! block*   kind 1 · body length u32 · pairs u32 · checksum of the offset and these
//!          · body · checksum of the offset and the body
//!          where body is (key length u32 · value length u32 · key · value)*
//! trailer  kind 2 · pairs u64 · digest u128 · file length u64 · the head's checksum
//!          · checksum of these
//! ```
//!
//! A block that is larger than [`BLOCK_BYTES_MAX`] holds a single pair. Offsets within the
//! checksums find blocks in a wrong place; count, digest and length find missing ones. A reader
//! believes no length before the checksum over it.

use serde::{Deserialize, Serialize};

use crate::rare::{self, RareBranch};
use crate::sm::codec;
use crate::sm::ports::StoreError;
use crate::storage::ReplicaKey;
use crate::storage::disk::DiskFile;
use crate::storage::map::Applied;
use crate::storage::map::digest::{Digest, PairHasher};

const MAGIC: &[u8; 8] = b"QRTSNAP\0";
const FORMAT: u32 = 1;
const HEAD_START_BYTES: usize = MAGIC.len() + 4 + 4;
/// A membership of hundreds of nodes is a few tens of KiB.
const HEAD_BYTES_MAX: usize = 16 << 20;
const BLOCK_START_BYTES: usize = 1 + 4 + 4 + 4;
const TRAILER_BYTES: usize = 1 + 8 + 16 + 8 + 4 + 4;
const CRC_BYTES: usize = 4;
const KIND_BLOCK: u8 = 1;
const KIND_TRAILER: u8 = 2;
/// A file syncs whenever so much of it is written: all at once at its end would hold up the syncs
/// of the log, and so every write of the node.
pub const UNSYNCED_BYTES_MAX: usize = 4 << 20;

/// Largest body of a block with more than one pair: what a reader holds at once.
pub const BLOCK_BYTES_MAX: usize = 256 << 10;

/// Called for each pair that is read.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), StoreError> + 'a;

/// Names the replica whose map it is, and its position in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotHead {
    /// The replica that wrote it. A receiver keeps the file as it is, under a name of its own.
    pub key: ReplicaKey,
    pub applied: Applied,
}

/// Totals at the end of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    pub digest: Digest,
    pub file_bytes: u64,
    head_checksum: u32,
}

/// Writes a snapshot file as a stream.
pub struct SnapshotWriter {
    file: Box<dyn DiskFile>,
    offset: u64,
    head_checksum: u32,
    /// Bytes written since the last sync.
    unsynced: usize,
    body: Vec<u8>,
    body_pairs: u32,
    digest: Digest,
    hasher: PairHasher,
}

impl SnapshotWriter {
    /// Begins with the head. `file` is empty.
    pub fn begin(file: Box<dyn DiskFile>, head: &SnapshotHead) -> Result<Self, StoreError> {
        let head = codec::encode(head);
        let mut bytes = Vec::with_capacity(HEAD_START_BYTES + head.len() + CRC_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&length(head.len())?.to_le_bytes());
        bytes.extend_from_slice(&head);
        let head_checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&head_checksum.to_le_bytes());
        let (body, digest, hasher) = (Vec::new(), Digest::default(), PairHasher::default());
        let mut writer = Self {
            file,
            offset: 0,
            unsynced: 0,
            head_checksum,
            body,
            body_pairs: 0,
            digest,
            hasher,
        };
        writer.append(&bytes)?;
        Ok(writer)
    }

    /// Adds a pair. In key order by custom; nothing rests on it.
    pub fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let (key_bytes, value_bytes) = (length(key.len())?, length(value.len())?);
        let pair_bytes = 8 + key.len() + value.len();
        let block_bytes_max = rare::or(RareBranch::SmallBlocks, 1, BLOCK_BYTES_MAX);
        if !self.body.is_empty() && self.body.len() + pair_bytes > block_bytes_max {
            self.write_block()?;
        }
        self.body.extend_from_slice(&key_bytes.to_le_bytes());
        self.body.extend_from_slice(&value_bytes.to_le_bytes());
        self.body.extend_from_slice(key);
        self.body.extend_from_slice(value);
        self.body_pairs += 1;
        self.digest.add(self.hasher.hash(key, value));
        Ok(())
    }

    /// The digest of what was added so far.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Ends with the trailer and makes the file durable (not its name).
    pub fn finish(mut self) -> Result<(Box<dyn DiskFile>, Trailer), StoreError> {
        if !self.body.is_empty() {
            self.write_block()?;
        }

        // The trailer comes last, so that a file that was cut short has none.
        let file_bytes = self.offset + TRAILER_BYTES as u64;
        let trailer = Trailer {
            digest: self.digest,
            file_bytes,
            head_checksum: self.head_checksum,
        };
        self.append(&encode_trailer(&trailer))?;
        assert_eq!(
            self.offset, file_bytes,
            "the trailer states the length of the file"
        );
        self.sync()?;
        Ok((self.file, trailer))
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.unsynced = 0;
        self.file.sync().map_err(|source| StoreError::Io {
            context: "syncing a snapshot file".into(),
            source,
        })
    }

    fn write_block(&mut self) -> Result<(), StoreError> {
        assert!(
            self.body_pairs == 1 || self.body.len() <= BLOCK_BYTES_MAX,
            "a block of several pairs is larger than a reader holds"
        );
        let mut bytes = Vec::with_capacity(BLOCK_START_BYTES + self.body.len() + CRC_BYTES);
        bytes.push(KIND_BLOCK);
        bytes.extend_from_slice(&length(self.body.len())?.to_le_bytes());
        bytes.extend_from_slice(&self.body_pairs.to_le_bytes());
        bytes.extend_from_slice(&placed_checksum(self.offset, &bytes).to_le_bytes());
        bytes.extend_from_slice(&self.body);
        bytes.extend_from_slice(&placed_checksum(self.offset, &self.body).to_le_bytes());
        self.body.clear();
        self.body_pairs = 0;
        self.append(&bytes)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let written = self.file.write_at(bytes, self.offset);
        written.map_err(|source| StoreError::Io {
            context: "writing a snapshot file".into(),
            source,
        })?;
        self.offset += bytes.len() as u64;
        self.unsynced += bytes.len();

        // In parts: one sync of a large file would hold up the syncs of the log.
        if self.unsynced >= UNSYNCED_BYTES_MAX {
            self.sync()
        } else {
            Ok(())
        }
    }
}

/// Reads and checks head and trailer: cheap, and enough to know what the file claims to be.
pub fn inspect(file: &dyn DiskFile) -> Result<(SnapshotHead, Trailer), StoreError> {
    let file_bytes = file.len().map_err(unreadable)?;
    let (head, _, head_checksum) = read_head(file)?;
    let trailer_start = file_bytes
        .checked_sub(TRAILER_BYTES as u64)
        .ok_or_else(|| damaged("it is too short"))?;
    let trailer = decode_trailer(&read_exactly(file, trailer_start, TRAILER_BYTES)?)?;
    if trailer.file_bytes != file_bytes {
        return Err(damaged(&format!(
            "it is {file_bytes} bytes long and should be {}",
            trailer.file_bytes
        )));
    }
    if trailer.head_checksum != head_checksum {
        return Err(damaged("its head and its trailer are of two files"));
    }
    Ok((head, trailer))
}

/// Visits every pair, block by block; none is shown before the checksum of its block held. Fails at
/// the end if the whole is not what the trailer says: only its success makes what was visited
/// believable.
pub fn read_pairs(
    file: &dyn DiskFile,
    trailer: &Trailer,
    visit: &mut Visit<'_>,
) -> Result<(), StoreError> {
    let (_, mut offset, head_checksum) = read_head(file)?;
    let end = trailer.file_bytes.saturating_sub(TRAILER_BYTES as u64);
    let (mut digest, mut hasher) = (Digest::default(), PairHasher::default());
    while offset < end {
        let (body, pairs) = read_block(file, offset, end)?;
        let mut rest = &body[..];
        for _ in 0..pairs {
            let (key, value) =
                split_pair(&mut rest).ok_or_else(|| damaged("a pair does not fit its block"))?;
            digest.add(hasher.hash(key, value));
            visit(key, value)?;
        }
        if !rest.is_empty() {
            return Err(damaged("a block has bytes left over"));
        }
        offset += (BLOCK_START_BYTES + body.len() + CRC_BYTES) as u64;
    }

    // Read once more, because the file that was inspected must be the one that was read.
    let again = decode_trailer(&read_exactly(file, end, TRAILER_BYTES)?)?;
    if again != *trailer || again.head_checksum != head_checksum {
        return Err(damaged("its trailer is of another file"));
    }
    if digest != trailer.digest {
        return Err(damaged("its pairs do not match its digest"));
    }
    Ok(())
}

/// The head, where it ends, and its checksum.
fn read_head(file: &dyn DiskFile) -> Result<(SnapshotHead, u64, u32), StoreError> {
    let start = read_exactly(file, 0, HEAD_START_BYTES)?;
    if start[..8] != *MAGIC {
        return Err(damaged("it does not begin like one"));
    }
    let head_bytes = u32_at(&start, 12) as usize;

    // The checksum comes after the head, so its length is bounded before it is believed.
    let whole_bytes = (HEAD_START_BYTES + head_bytes + CRC_BYTES) as u64;
    if head_bytes > HEAD_BYTES_MAX || whole_bytes > file.len().map_err(unreadable)? {
        return Err(damaged("the length of its head is impossible"));
    }
    let bytes = read_exactly(file, 0, HEAD_START_BYTES + head_bytes + CRC_BYTES)?;
    let (checked, checksum) = bytes.split_at(HEAD_START_BYTES + head_bytes);
    let checksum = u32_at(checksum, 0);
    if crc32fast::hash(checked) != checksum {
        return Err(damaged("its head does not match its checksum"));
    }

    // After the checksum: damage must not pass for a newer version.
    let format = u32_at(&start, 8);
    if format != FORMAT {
        let reason = format!("format {format} is unknown to this version");
        return Err(StoreError::Undecodable {
            what: "a snapshot file",
            reason,
        });
    }
    let head = codec::decode(&checked[HEAD_START_BYTES..], "the head of a snapshot file")?;
    Ok((head, bytes.len() as u64, checksum))
}

/// The body of the block at `offset`, and how many pairs it holds.
fn read_block(file: &dyn DiskFile, offset: u64, end: u64) -> Result<(Vec<u8>, u32), StoreError> {
    let start = read_exactly(file, offset, BLOCK_START_BYTES)?;
    let (checked, checksum) = start.split_at(BLOCK_START_BYTES - CRC_BYTES);
    if placed_checksum(offset, checked) != u32_at(checksum, 0) || checked[0] != KIND_BLOCK {
        return Err(damaged(&format!(
            "the block at {offset} does not match its checksum"
        )));
    }
    let (body_bytes, pairs) = (u32_at(checked, 1), u32_at(checked, 5));
    let body_start = offset + BLOCK_START_BYTES as u64;
    if body_start + u64::from(body_bytes) + CRC_BYTES as u64 > end {
        return Err(damaged(&format!("the block at {offset} goes past the end")));
    }
    let mut body = read_exactly(file, body_start, body_bytes as usize + CRC_BYTES)?;
    let checksum = u32_at(&body, body_bytes as usize);
    body.truncate(body_bytes as usize);
    if placed_checksum(offset, &body) != checksum {
        return Err(damaged(&format!(
            "the block at {offset} does not match its checksum"
        )));
    }
    Ok((body, pairs))
}

fn split_pair<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let (lengths, after) = rest.split_first_chunk::<8>()?;
    let (key_bytes, value_bytes) = (u32_at(lengths, 0) as usize, u32_at(lengths, 4) as usize);
    let (key, after) = after.split_at_checked(key_bytes)?;
    let (value, after) = after.split_at_checked(value_bytes)?;
    *rest = after;
    Some((key, value))
}

fn encode_trailer(trailer: &Trailer) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(TRAILER_BYTES);
    bytes.push(KIND_TRAILER);
    bytes.extend_from_slice(&trailer.digest.pairs.to_le_bytes());
    bytes.extend_from_slice(&trailer.digest.sum.to_le_bytes());
    bytes.extend_from_slice(&trailer.file_bytes.to_le_bytes());
    bytes.extend_from_slice(&trailer.head_checksum.to_le_bytes());
    let checksum = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

fn decode_trailer(bytes: &[u8]) -> Result<Trailer, StoreError> {
    let (checked, checksum) = bytes.split_at(TRAILER_BYTES - CRC_BYTES);
    if crc32fast::hash(checked) != u32_at(checksum, 0) || checked[0] != KIND_TRAILER {
        return Err(damaged("its trailer does not match its checksum"));
    }
    let sum = u128::from_le_bytes(checked[9..25].try_into().expect("sixteen bytes"));
    let digest = Digest {
        pairs: u64_at(checked, 1),
        sum,
    };
    Ok(Trailer {
        digest,
        file_bytes: u64_at(checked, 25),
        head_checksum: u32_at(checked, 33),
    })
}

/// Returns a file with this head and these blocks, each with so many pairs, and a trailer that fits
/// them, whether any of it makes sense or not.
#[cfg(test)]
pub(in crate::storage) fn assembled(head: &[u8], blocks: &[(u32, &[u8])]) -> Vec<u8> {
    let mut file = [
        MAGIC,
        &FORMAT.to_le_bytes()[..],
        &(head.len() as u32).to_le_bytes(),
    ]
    .concat();
    file.extend_from_slice(head);
    let head_checksum = crc32fast::hash(&file);
    file.extend_from_slice(&head_checksum.to_le_bytes());
    let (mut digest, mut hasher) = (Digest::default(), PairHasher::default());
    for (pairs, body) in blocks {
        let offset = file.len() as u64;
        let mut start = vec![KIND_BLOCK];
        start.extend_from_slice(&(body.len() as u32).to_le_bytes());
        start.extend_from_slice(&pairs.to_le_bytes());
        start.extend_from_slice(&placed_checksum(offset, &start).to_le_bytes());
        file.extend_from_slice(&start);
        file.extend_from_slice(body);
        file.extend_from_slice(&placed_checksum(offset, body).to_le_bytes());
        let mut rest = *body;
        while let Some((key, value)) = split_pair(&mut rest) {
            digest.add(hasher.hash(key, value));
        }
    }
    let file_bytes = (file.len() + TRAILER_BYTES) as u64;
    file.extend_from_slice(&encode_trailer(&Trailer {
        digest,
        file_bytes,
        head_checksum,
    }));
    file
}

/// A checksum that also holds where the bytes are.
fn placed_checksum(offset: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&offset.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

fn read_exactly(file: &dyn DiskFile, offset: u64, bytes: usize) -> Result<Vec<u8>, StoreError> {
    let mut buffer = vec![0; bytes];
    match file.read_at(&mut buffer, offset).map_err(unreadable)? {
        read if read == bytes => Ok(buffer),
        _ => Err(damaged("it ends too early")),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn length(bytes: usize) -> Result<u32, StoreError> {
    let too_long = |_| StoreError::Undecodable {
        what: "a pair",
        reason: format!("{bytes} bytes do not fit a snapshot file"),
    };
    u32::try_from(bytes).map_err(too_long)
}

fn damaged(reason: &str) -> StoreError {
    StoreError::Damaged(reason.to_owned())
}

/// An open file that can't be read is a bad medium: as good as damaged.
fn unreadable(error: std::io::Error) -> StoreError {
    StoreError::Damaged(format!("it cannot be read: {error}"))
}
