//! Reading sealed segments again, to find what has rotted while the entries in it can still be had
//! from elsewhere.
//!
//! Nobody waits for it: it takes the lock of the segments to look up a file, and reads without any.

use std::path::PathBuf;
use std::sync::Arc;

use super::Log;
use super::record::{self, HEADER_BYTES, RecordPlace};
use crate::storage::disk::DiskFile;
use crate::storage::{Checked, ReadPace, ReplicaKey};

/// Bytes read at a time, unless a record is larger.
const SLICE_BYTES: usize = 256 << 10;

impl Log {
    /// Returns the numbers of the segments that are written no more, in order.
    pub fn sealed_segments(&self) -> Vec<u64> {
        let segments = self.shared().segments.read();
        let mut numbers: Vec<u64> = segments.keys().copied().collect();

        // The last segment is still written to.
        numbers.pop();
        numbers
    }

    /// Returns the bytes of these segments.
    pub fn sealed_bytes(&self) -> u64 {
        let segments = self.shared().segments.read();
        segments
            .values()
            .rev()
            .skip(1)
            .map(|segment| segment.end)
            .sum()
    }

    /// Returns whether this segment is a part of the log.
    pub fn has_segment(&self, number: u64) -> bool {
        let segments = self.shared().segments.read();
        segments.contains_key(&number)
    }

    /// Reads a sealed segment, and checks every record in it as a start does. Blocking.
    pub fn check_segment(&self, number: u64, pace: &mut ReadPace<'_>) -> Checked {
        let Some((file, path, end)) = self.sealed_file(number) else {
            return Checked::Unread;
        };
        let place = RecordPlace {
            binding: self.shared().binding,
            segment: number,
            offset: 0,
        };

        // The page cache would hide what has rotted on the disk.
        file.forget_cached();
        match check_records(&*file, place, end, pace) {
            Ok(true) => Checked::Whole,
            Ok(false) => Checked::Unread,
            // Its file is another segment's once it is none of the log any more.
            Err(_) if !self.has_segment(number) => Checked::Unread,
            Err(reason) => Checked::Damaged(format!("{} {reason}", path.display())),
        }
    }

    /// Returns the replicas that keep a segment in the log: those with live entries in it or in one
    /// before it, with the index of the last of these. Once they have purged as much, the segment
    /// goes.
    pub fn holders(&self, number: u64) -> Vec<(ReplicaKey, u64)> {
        let replicas: Vec<_> = self.shared().roster().replicas.values().cloned().collect();
        let holder = |replica: Arc<super::replica_state::ReplicaLogInner>| {
            let upto = replica.lock().written.last_through(number)?;
            Some((replica.key, upto))
        };
        replicas.into_iter().filter_map(holder).collect()
    }

    fn sealed_file(&self, number: u64) -> Option<(Arc<dyn DiskFile>, PathBuf, u64)> {
        let segments = self.shared().segments.read();
        let is_sealed = segments
            .last_key_value()
            .is_some_and(|(active, _)| number < *active);
        let segment = segments.get(&number).filter(|_| is_sealed)?;
        Some((segment.file.clone(), segment.path.clone(), segment.end))
    }
}

/// Checks the records up to `end`. False: `pace` broke it off.
fn check_records(
    file: &dyn DiskFile,
    start: RecordPlace,
    end: u64,
    pace: &mut ReadPace<'_>,
) -> Result<bool, String> {
    // What is in the buffer begins with a record, at `at`.
    let (mut buffer, mut at) = (Vec::new(), 0_u64);
    while at < end {
        let mut used = 0;
        let wanted = loop {
            let rest = &buffer[used..];
            let place = RecordPlace {
                offset: at,
                ..start
            };
            let bad = |error: record::BadRecord| format!("at byte {at}: {error}");
            let len = if rest.len() < HEADER_BYTES {
                HEADER_BYTES
            } else {
                record::record_len(rest, place).map_err(bad)?
            };
            if at + len as u64 > end {
                return Err(format!(
                    "at byte {at}: a record goes past the end of the segment, which is {end}"
                ));
            }
            if rest.len() < len {
                break len;
            }
            record::decode(rest, place).map_err(bad)?;
            used += len;
            at += len as u64;
            if at == end {
                return Ok(true);
            }
        };

        // The start of a record that the slice cut is kept, and the rest is read after it.
        buffer.drain(..used);
        let have = buffer.len();
        let left = usize::try_from(end - at).unwrap_or(usize::MAX);
        buffer.resize(wanted.max(SLICE_BYTES).min(left), 0);
        let read = file.read_at(&mut buffer[have..], at + have as u64);
        let read = read.map_err(|error| format!("at byte {at}: it cannot be read: {error}"))?;
        buffer.truncate(have + read);
        if buffer.len() < wanted {
            return Err(format!(
                "is cut at byte {}: it was synced to {end}",
                at + buffer.len() as u64
            ));
        }
        if !pace(read as u64) {
            return Ok(false);
        }
    }
    Ok(true)
}
