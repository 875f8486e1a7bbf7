//! Targets for `fuzzing`: what storage reads from the files of a data directory.

use std::path::Path;
use std::sync::Arc;

use super::ReplicaKey;
use super::directory::Stamp;
use super::disk::{Disk, DiskFile, Open, ensure_dir};
use super::map::Applied;
use super::sealed as sealed_file;
use super::sim_disk::SimDisk;
use super::snapshot::format;
use super::testing::unhex;
use super::witness::WitnessFiles;
use crate::sm::codec;
use crate::sm::starts::Starts;
use crate::types::{ClusterId, DirectoryId, GroupId, LogId, ReplicaId};

const KEY: ReplicaKey = ReplicaKey {
    group: GroupId(1),
    replica: ReplicaId(5),
};

/// Returns a disk with a directory `/node` in which one file has these bytes.
pub(super) fn disk_with(name: &str, bytes: &[u8]) -> Arc<dyn Disk> {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new(1));
    ensure_dir(&*disk, Path::new("/node")).expect("a directory");
    let path = Path::new("/node").join(name);
    let file = disk.open(&path, Open::New).expect("a new file");
    file.write_at(bytes, 0).expect("written");
    disk
}

fn file_with(bytes: &[u8]) -> Box<dyn DiskFile> {
    disk_with("file", bytes)
        .open(Path::new("/node/file"), Open::Existing)
        .expect("it is there")
}

/// Snapshot files as they are on the disk, or come from another node.
pub mod snapshots {
    use super::*;

    /// The file of format 1 that `snapshot::files` holds the format against.
    const GOLDEN: &str = "\
        515254534e415000010000000f00000001010501028407076d656d6265727334207022011400000002000000\
        da7b55f10100000001000000613102000000000000006263f82488a20202000000000000001167a3fb6c3c16\
        31ffefabc3639957d57100000000000000342070227b4c1ea1";

    pub fn samples() -> Vec<Vec<u8>> {
        vec![unhex(GOLDEN)]
    }

    pub fn read(bytes: &[u8]) {
        let file = file_with(bytes);
        let Ok((_, trailer)) = format::inspect(&*file) else {
            return;
        };
        let mut pairs = 0;
        let all = format::read_pairs(&*file, &trailer, &mut |_, _| {
            pairs += 1;
            Ok(())
        });
        if all.is_ok() {
            assert_eq!(pairs, trailer.digest.pairs);
        }
    }
}

/// Parts of a snapshot file: a head, and blocks, whose checksums are right whatever they are.
pub mod snapshot_contents {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let head = codec::encode(&(
            KEY,
            Applied {
                log_id: Some(LogId { term: 2, index: 9 }),
                membership: "members".into(),
            },
        ));
        let block = b"\x01\0\0\0\x01\0\0\0a1\x02\0\0\0\0\0\0\0bc";
        let part = |pairs: u8, body: &[u8]| [&[pairs, body.len() as u8], body].concat();
        vec![
            [part(0, &head), part(2, block)].concat(),
            [part(0, &head), part(2, block), part(1, &block[..10])].concat(),
        ]
    }

    pub fn read(bytes: &[u8]) {
        let (mut parts, mut rest) = (Vec::new(), bytes);
        while let Some(([pairs, len], after)) = rest.split_first_chunk::<2>() {
            let (body, after) = after.split_at(usize::from(*len).min(after.len()));
            parts.push((u32::from(*pairs), body));
            rest = after;
        }
        if let Some(((_, head), blocks)) = parts.split_first() {
            snapshots::read(&format::assembled(head, blocks));
        }
    }
}

/// Stamps, identities and the like: as files, and as values whose checksum is right.
pub mod sealed {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let starts = serde_json::to_vec(&Starts::first(crate::types::StartId(9)));
        let values = [
            serde_json::to_vec(&Stamp::Fresh),
            serde_json::to_vec(&DirectoryId(7)),
            serde_json::to_vec(&ClusterId(8)),
            starts,
        ];
        let mut samples: Vec<Vec<u8>> = [
            &include_bytes!("goldens/identity.json")[..],
            include_bytes!("goldens/stamp-before-witnesses.json"),
            include_bytes!("goldens/stamp-member.json"),
            include_bytes!("goldens/stamp-retired.json"),
        ]
        .map(<[u8]>::to_vec)
        .into();
        samples.extend(values.into_iter().flatten());
        samples
    }

    pub fn read(bytes: &[u8]) {
        read_all(bytes);
        if let Ok(value) = std::str::from_utf8(bytes) {
            for format in [1, 2] {
                read_all(sealed_file::assembled(format, value).as_bytes());
            }
        }
    }

    fn read_all(bytes: &[u8]) {
        let disk = disk_with("file", bytes);
        let path = Path::new("/node/file");
        let stamp = sealed_file::read::<Stamp>(&*disk, path, 2);
        if let Ok(Some(stamp)) = stamp {
            sealed_file::write(&*disk, Path::new("/node"), "again", 1, &stamp).expect("written");
            let again = sealed_file::read::<Stamp>(&*disk, Path::new("/node/again"), 1);
            assert_eq!(again.expect("own encoding"), Some(stamp));
        }
        let _ = sealed_file::read::<DirectoryId>(&*disk, path, 1);
        let _ = sealed_file::read::<ClusterId>(&*disk, path, 1);
        let _ = sealed_file::read::<Starts>(&*disk, path, 1);
    }
}

/// Files of witnesses, and their contents with the right checksum.
pub mod witnesses {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let whole = unhex("5152544d41524b000103070102ac02076d656d62657273169db059");
        let applied = Applied {
            log_id: Some(LogId { term: 2, index: 9 }),
            membership: "members".into(),
        };
        vec![whole, codec::encode(&(KEY, applied)).to_vec()]
    }

    pub fn read(bytes: &[u8]) {
        let mut sealed = [b"QRTMARK\0", bytes].concat();
        sealed.extend_from_slice(&crc32fast::hash(&sealed).to_le_bytes());
        for bytes in [bytes, &sealed] {
            let disk = disk_with("g1-r5.mark", bytes);
            let files = WitnessFiles::open(disk, Path::new("/node")).expect("opened");
            if let Ok(Some(applied)) = files.read(KEY) {
                files.write(KEY, &applied).expect("written");
                assert_eq!(files.read(KEY).expect("own encoding"), Some(applied));
            }
        }
    }
}

/// Stubs of values that are cut into pieces.
pub mod pieces {
    use super::super::pieces::Stub;

    pub fn samples() -> Vec<Vec<u8>> {
        let values = [b"\xff".to_vec(), vec![7; 20_000]];
        values.map(|value| Stub::new(3, &value).encode()).into()
    }

    pub fn read(bytes: &[u8]) {
        if let Some(stub) = Stub::decode(bytes) {
            assert_eq!(stub.encode(), bytes);
            assert!(stub.piece_keys().take(3).count() <= 3);
        }
    }
}
