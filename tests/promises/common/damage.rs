//! What happens to files: bits that flip, ends that are torn, directories that vanish. The node
//! that owns them does not run meanwhile.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::Rng;
use rand::rngs::StdRng;

/// Lists every file below `directory`, largest first. A node that runs may create and remove some
/// meanwhile: what is gone is left out, and each length is read once, since a sort needs one order.
pub fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => panic!("{}: {error}", directory.display()),
        };
        for entry in entries {
            let path = entry.expect("a directory entry").path();
            match fs::metadata(&path) {
                Ok(data) if data.is_dir() => open.push(path),
                Ok(data) => files.push((data.len(), path)),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => panic!("{}: {error}", path.display()),
            }
        }
    }
    files.sort_by(|one, other| other.cmp(one));
    files.into_iter().map(|(_, path)| path).collect()
}

/// The segment of the log that was written last.
pub fn last_segment(data: &Path) -> PathBuf {
    let mut segments = files(&data.join("log"));
    segments.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "segment")
    });
    segments.sort();
    segments.pop().expect("a log has a segment")
}

/// One past the last byte of a pre-written file that is not zero.
pub fn written(path: &Path) -> u64 {
    let bytes = fs::read(path).expect("a readable file");
    bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |position| position as u64 + 1)
}

/// Flips one bit of the byte at `offset`.
pub fn flip(path: &Path, offset: u64, random: &mut StdRng) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("a writable file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)
        .expect("an offset within the file");
    byte[0] ^= 1 << random.random_range(0..8);
    file.write_all_at(&byte, offset).expect("a byte written");
}

/// Flips a bit in every few hundred bytes of each file below `directory`.
pub fn rot(directory: &Path, random: &mut StdRng) {
    for path in files(directory) {
        let mut offset = random.random_range(0..400);
        while offset < fs::metadata(&path).expect("a file").len() {
            flip(&path, offset, random);
            offset += random.random_range(1..400);
        }
    }
}

/// Cuts each file below `directory` to half.
pub fn truncate(directory: &Path) {
    for path in files(directory) {
        let file = OpenOptions::new()
            .write(true)
            .open(&path)
            .expect("a writable file");
        file.set_len(file.metadata().expect("a file").len() / 2)
            .expect("a file cut");
    }
}

/// One past the last record of a segment: a header of 32 bytes says how long its body is. A record
/// may well end with zeros.
fn end_of_records(segment: &Path) -> u64 {
    let bytes = fs::read(segment).expect("a readable file");
    let mut end = 0;
    while let Some([b'Q', b'L', _, _, length @ ..]) = bytes.get(end..end + 8) {
        let length: [u8; 4] = length.try_into().expect("four bytes");
        end += 32 + u32::from_le_bytes(length) as usize;
    }
    end as u64
}

/// Writes noise where a record that was under way at a crash would begin. What is before it was
/// synced, and stays as it is.
pub fn tear(segment: &Path, random: &mut StdRng) {
    let file = OpenOptions::new()
        .write(true)
        .open(segment)
        .expect("a writable file");
    let noise: Vec<u8> = (0..100).map(|_| random.random_range(1..=255)).collect();
    let end = written(segment).max(end_of_records(segment));
    let room = file.metadata().expect("a file").len().saturating_sub(end);
    let len = noise
        .len()
        .min(usize::try_from(room).expect("a small file"));
    file.write_all_at(&noise[..len], end)
        .expect("noise written");
}
