//! How a [`Record`] is stored. Part of the disk format.

use bytes::Bytes;
use serde::Deserialize;

use super::command::{Condition, Media, Record};
use crate::sm::codec;
use crate::sm::ports::StoreError;
use crate::types::Revision;

const WHAT: &str = "a record";

/// The stored form of a record.
pub fn encode_record(record: &Record) -> Bytes {
    // The format, the revision, and the length of the value take at most 21 bytes.
    codec::encode_sized(record, 21 + record.media.size_hint() + record.value.len())
}

/// Reads what [`encode_record`] wrote. The value shares the bytes.
pub fn decode_record(bytes: &Bytes) -> Result<Record, StoreError> {
    #[derive(Deserialize)]
    struct BorrowedRecord<'a>(
        Revision,
        Media,
        #[serde(borrow, with = "serde_bytes")] &'a [u8],
    );
    let BorrowedRecord(revision, media, value) = codec::decode(bytes, WHAT)?;
    Ok(Record {
        revision,
        media,
        value: bytes.slice_ref(value),
    })
}

/// The revision of a stored record, without a look at the rest of it.
pub(super) fn stored_revision(bytes: &[u8]) -> Result<Revision, StoreError> {
    codec::decode_first(bytes, WHAT).map(|(revision, _)| revision)
}

/// Reads a record without its value from the beginning of its stored form. None: the beginning is
/// too short for its media type.
pub(super) fn decode_head(start: &[u8]) -> Result<Option<Record>, StoreError> {
    stored_revision(start)?;
    let head = codec::decode_first::<(Revision, Media)>(start, WHAT).ok();
    Ok(head.map(|((revision, media), _)| Record {
        revision,
        media,
        value: Bytes::new(),
    }))
}

impl Condition {
    /// Returns true if it holds for a key at this revision, or for a key that does not exist
    /// (None).
    pub fn holds(&self, current: Option<Revision>) -> bool {
        match self {
            Condition::None => true,
            Condition::Absent => current.is_none(),
            Condition::Present => current.is_some(),
            Condition::RevisionIn(revisions) => {
                current.is_some_and(|revision| revisions.contains(&revision))
            }
            Condition::RevisionNotIn(revisions) => {
                current.is_none_or(|revision| !revisions.contains(&revision))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encoding_of_a_record_stands() {
        let table: [(Media, &[u8]); 4] = [
            (Media::Text, b"\x01\xac\x02\x00\x02hi"),
            (Media::Octets, b"\x01\xac\x02\x01\x02hi"),
            (Media::Json, b"\x01\xac\x02\x02\x02hi"),
            (Media::Other("a/b".into()), b"\x01\xac\x02\x03\x03a/b\x02hi"),
        ];
        for (media, golden) in table {
            let record = Record {
                revision: Revision(300),
                media,
                value: Bytes::from_static(b"hi"),
            };
            let bytes = encode_record(&record);
            assert_eq!(&bytes[..], golden);
            assert_eq!(decode_record(&bytes).expect("own encoding"), record);
            assert_eq!(
                codec::decode::<Record>(&bytes, WHAT).expect("the derived form is the same"),
                record
            );
            assert_eq!(
                stored_revision(&bytes).expect("own encoding"),
                record.revision
            );
            assert!(decode_record(&bytes.slice(..bytes.len() - 1)).is_err());
        }
    }
}
