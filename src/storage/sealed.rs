//! Small files of JSON that say by themselves whether they are whole: a format, a checksum, and a
//! value.
//!
//! A file is replaced in one step: written beside, synced, renamed, directory synced. The checksum
//! is over the text of the value as it was written, without the white space between its parts; so
//! it holds whatever this version would write, and a field that this version does not know, or that
//! came later, makes no file damaged. It is what every version has written: earlier ones summed up
//! the value as compact JSON, which is the same text.

use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_128;

use super::disk::{Disk, Open};
use crate::sm::level::{LEVEL, TooOld};

/// The reason why a file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "{path} was written by a newer version of this program ({reason}): start this node with \
         that version. Nothing is wrong with its data"
    )]
    Newer { path: PathBuf, reason: String },
}

/// The frame around a value, with the value as text.
#[derive(Serialize, Deserialize)]
struct SealedFrame<T> {
    format: u64,
    /// The level that a program must know to read the value.
    #[serde(default, skip_serializing_if = "is_zero")]
    level: u16,
    /// Of the value without white space between its parts, in hexadecimal.
    checksum: String,
    value: T,
}

fn is_zero(level: &u16) -> bool {
    *level == 0
}

/// Reads what [`write()`] wrote, in any format up to `newest_format`. Returns none if there is no
/// such file.
///
/// # Errors
///
/// When the file can't be read, does not match its checksum, or is of a newer version.
pub fn read<T: DeserializeOwned>(
    disk: &dyn Disk,
    path: &Path,
    newest_format: u64,
) -> Result<Option<T>, SealedError> {
    let io_error = |source| SealedError::Io {
        path: path.to_owned(),
        source,
    };
    let damaged = |reason: String| SealedError::Damaged {
        path: path.to_owned(),
        reason,
    };
    let newer = |reason: String| SealedError::Newer {
        path: path.to_owned(),
        reason,
    };

    let file = match disk.open(path, Open::Existing) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io_error)?,
    };
    let bytes_len = usize::try_from(file.len().map_err(io_error)?)
        .map_err(|error| damaged(error.to_string()))?;
    let mut bytes = vec![0; bytes_len];
    let read = file.read_at(&mut bytes, 0).map_err(io_error)?;
    bytes.truncate(read);

    // Format and level first: what a newer one has around the value is not known here.
    #[derive(Deserialize)]
    struct Format {
        format: Option<u64>,
        #[serde(default)]
        level: u16,
    }
    let format: Format =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    match format.format {
        None | Some(0) => return Err(damaged("it does not say its format".into())),
        Some(_) if format.level > LEVEL => {
            return Err(newer(TooOld::new(format.level, LEVEL).to_string()));
        }
        Some(format) if format > newest_format => {
            return Err(newer(format!("its format is {format}")));
        }
        Some(_) => {}
    }

    let sealed: SealedFrame<&RawValue> =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if checksum(sealed.value.get()) != sealed.checksum {
        return Err(damaged("it does not match its checksum".into()));
    }
    // It is as somebody wrote it, so what can't be understood is no damage.
    serde_json::from_str(sealed.value.get())
        .map(Some)
        .map_err(|error| newer(error.to_string()))
}

/// Replaces a file in one step; durable when it returns.
///
/// # Errors
///
/// When the disk fails: the file is then as it was, or as it should be.
pub fn write<T: Serialize>(
    disk: &dyn Disk,
    directory: &Path,
    name: &str,
    format: u64,
    value: &T,
) -> Result<(), SealedError> {
    write_leveled(disk, directory, name, (format, 0), value)
}

/// As [`write()`], of what only programs read that know the level.
///
/// # Errors
///
/// When the disk fails: the file is then as it was, or as it should be.
pub fn write_leveled<T: Serialize>(
    disk: &dyn Disk,
    directory: &Path,
    name: &str,
    (format, level): (u64, u16),
    value: &T,
) -> Result<(), SealedError> {
    let path = directory.join(name);
    let beside = directory.join(format!("{name}.part"));
    let compact = serde_json::to_string(value).expect("JSON of our own types, in memory");
    let sealed = SealedFrame {
        format,
        level,
        checksum: checksum(&compact),
        value,
    };
    let mut bytes = serde_json::to_vec_pretty(&sealed).expect("JSON of our own types, in memory");
    bytes.push(b'\n');

    // Written beside and renamed: a crash leaves the old file or the new one, and never a part.
    let written = (|| {
        let file = disk.open(&beside, Open::Truncated)?;
        file.write_at(&bytes, 0)?;
        file.sync()?;
        disk.rename(&beside, &path)?;
        disk.sync_dir(directory)
    })();
    written.map_err(|source| SealedError::Io { path, source })
}

/// Returns a file with this value and its checksum, whether it is JSON or not.
#[cfg(test)]
pub(super) fn assembled(format: u64, value: &str) -> String {
    let checksum = checksum(value);
    format!(r#"{{"format":{format},"checksum":"{checksum}","value":{value}}}"#)
}

/// The checksum of a JSON text, whatever white space is between its parts.
fn checksum(json: &str) -> String {
    let mut compact = Vec::with_capacity(json.len());
    let (mut in_string, mut is_escaped) = (false, false);
    for byte in json.bytes() {
        if in_string {
            in_string = is_escaped || byte != b'"';
            is_escaped = !is_escaped && byte == b'\\';
        } else if matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
            continue;
        } else {
            in_string = byte == b'"';
        }
        compact.push(byte);
    }
    format!("{:032x}", xxh3_128(&compact))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::sim_disk::SimDisk;
    use std::collections::BTreeMap;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Known {
        text: String,
        #[serde(default)]
        later: Option<u64>,
    }

    fn directory() -> (SimDisk, &'static Path) {
        let disk = SimDisk::new(1);
        disk.create_dir(Path::new("/data")).expect("created");
        (disk, Path::new("/data"))
    }

    fn put(disk: &SimDisk, path: &Path, bytes: &[u8]) {
        disk.open(path, Open::Truncated)
            .and_then(|file| file.write_at(bytes, 0))
            .expect("written");
    }

    #[test]
    fn a_file_of_a_version_with_more_fields_or_fewer_is_read() {
        let (disk, path) = directory();
        let nasty = "a \" b \\ c\n\t\\\" {\"x\": 1} ü";
        for later in [None, Some(3)] {
            let more =
                serde_json::json!({ "unheard-of": { "a": [1, 2] }, "text": nasty, "later": later });
            write(&disk, path, "file", 1, &more).expect("written");
            let read: Option<Known> = read(&disk, &path.join("file"), 1).expect("read");
            assert_eq!(
                read,
                Some(Known {
                    text: nasty.to_owned(),
                    later
                })
            );
        }
        write(&disk, path, "file", 1, &BTreeMap::from([("text", nasty)])).expect("written");
        let read: Option<Known> = read(&disk, &path.join("file"), 1).expect("read");
        assert_eq!(
            read,
            Some(Known {
                text: nasty.to_owned(),
                later: None
            })
        );
    }

    #[test]
    fn what_a_newer_version_wrote_is_refused_and_not_called_damaged() {
        let (disk, path) = directory();
        let file = path.join("file");
        let read_it = || read::<Known>(&disk, &file, 1);
        write(&disk, path, "file", 2, &"anything").expect("written");
        let error = read_it().expect_err("a newer format");
        assert!(
            matches!(error, SealedError::Newer { .. }) && error.to_string().contains("format is 2"),
            "{error}"
        );

        write_leveled(&disk, path, "file", (1, LEVEL + 3), &"anything").expect("written");
        let error = read_it().expect_err("a later level").to_string();
        let sentence = format!(
            "this cluster uses level {}, this program knows {LEVEL}: start a newer one",
            LEVEL + 3
        );
        assert!(error.contains(&sentence), "{error}");

        // Another frame around the value.
        put(&disk, &file, br#"{"format": 7, "seal": "x"}"#);
        assert!(matches!(read_it(), Err(SealedError::Newer { .. })));

        // A value that is whole, and of a kind that is not known here.
        write(&disk, path, "file", 1, &BTreeMap::from([("other", 1)])).expect("written");
        assert!(matches!(read_it(), Err(SealedError::Newer { .. })));
    }

    #[test]
    fn white_space_between_the_parts_is_no_damage_and_within_a_text_it_is() {
        let (disk, path) = directory();
        let file = path.join("file");
        write(&disk, path, "file", 1, &BTreeMap::from([("text", "a b")])).expect("written");
        let text = String::from_utf8(disk.contents(&file).expect("there")).expect("text");
        put(&disk, &file, text.replace('\n', " \t\r\n").as_bytes());
        assert!(read::<Known>(&disk, &file, 1).expect("read").is_some());
        put(&disk, &file, text.replace("a b", "a  b").as_bytes());
        assert!(matches!(
            read::<Known>(&disk, &file, 1),
            Err(SealedError::Damaged { .. })
        ));
    }
}
