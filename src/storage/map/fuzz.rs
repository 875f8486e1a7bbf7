//! Targets for `fuzzing`: what a map reads of itself.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use super::Applied;
use super::digest::Digest;
use super::record::TreeRecord;
use super::redo::{Redo, RedoFiles};
use crate::sm::codec;
use crate::storage::ReplicaKey;
use crate::storage::fuzz::disk_with;
use crate::types::{GroupId, LogId, ReplicaId};

const KEY: ReplicaKey = ReplicaKey {
    group: GroupId(1),
    replica: ReplicaId(5),
};

fn record() -> TreeRecord {
    TreeRecord {
        key: KEY,
        generation: 3,
        applied: Applied {
            log_id: Some(LogId { term: 2, index: 9 }),
            membership: "m".into(),
        },
        digest: Digest { pairs: 1, sum: 7 },
    }
}

/// Redo files, and their contents with the right checksum.
pub mod redo {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let redo = Redo {
            record: record(),
            changes: vec![("key".into(), Some("value".into())), ("gone".into(), None)],
        };
        let body = codec::encode(&redo).to_vec();
        vec![whole(&body), body]
    }

    fn whole(body: &[u8]) -> Vec<u8> {
        let (len, checksum) = (body.len() as u64, xxh3_64(body));
        [
            b"QRTREDO\0",
            &len.to_le_bytes()[..],
            &checksum.to_le_bytes(),
            body,
        ]
        .concat()
    }

    pub fn read(bytes: &[u8]) {
        for bytes in [bytes, &whole(bytes)] {
            let disk = disk_with("g1-r5.redo", bytes);
            let files = RedoFiles::open(disk, Path::new("/node")).expect("opened");
            if let Some(redo) = files.read(KEY).expect("a disk without faults") {
                let mut file = files.file(KEY).expect("opened");
                file.write(&redo).expect("written");
                assert_eq!(files.read(KEY).expect("read"), Some(redo));
            }
        }
    }
}

/// Reads what trees say of themselves, and the same with the right checksum.
pub mod tree_records {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let whole = record().encode().to_vec();
        vec![whole[..whole.len() - 8].to_vec(), whole]
    }

    pub fn read(bytes: &[u8]) {
        let sealed = [bytes, &xxh3_64(bytes).to_le_bytes()].concat();
        for bytes in [bytes, &sealed] {
            if let Ok(record) = TreeRecord::decode(bytes) {
                let again = TreeRecord::decode(&record.encode()).expect("own encoding");
                assert_eq!(again, record);
            }
        }
    }
}
