//! The meaning of entries, held for ever: for each entry and the map that it met, what `apply`
//! answered and changed.
//!
//! What is in a log was acknowledged for what it meant when it was written, and a replica that
//! applies it anew must come to the same map as the others. So no line of a golden file is ever
//! changed. `goldens/*-level-0.txt` were written by the code of commit 0bbd823 (`level_0.rs` ran
//! there), and hold since. A changed meaning is a new variant, of a new level, with lines of its
//! own.
//!
//! To add lines for a new variant: add a scenario to `level_1.rs` (or that of a later level), and
//! write its file with `QUORATE_MEANING=kv-level-1 cargo test --lib meaning` (or another name
//! without `.txt`); look at what is in it, and commit it. The file of a level whose program is out
//! is never written again.
//!
//! A line is `map pair KEY VALUE`, or `map do|try INDEX ENTRY -> OUTCOME BATCH` with bytes in
//! hexadecimal; what is tried is not kept. A run of equal bytes is written `(xx*count)`. A batch is
//! `key=value` or `key-` for each key, or of a long one its count and hash.

mod level_0;
mod level_1;
mod level_2;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_128;

use super::cluster::meta;
use super::kv::{self};
use super::moves::MoveCommand;
use super::ports::WriteBatch;

/// A batch that would be longer is written as its hash.
const BATCH_TEXT_MAX: usize = 800;
/// Equal bytes from this many on are written as one.
const RUN_MIN: usize = 8;

/// Tells whose maps a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MapKind {
    Shard,
    Meta,
}

impl MapKind {
    /// Applies an entry as it stands in a log. Returns what it answered, encoded, and its changes.
    fn apply(self, map: &Map, index: u64, entry: &[u8]) -> (Bytes, WriteBatch) {
        match self {
            MapKind::Shard => {
                let command = kv::KvCommand::decode(entry).expect("an entry");
                let (outcome, batch) = kv::apply(map, index, command).expect("applied");
                (outcome.encode(), batch)
            }
            MapKind::Meta => {
                let command = meta::MetaCommand::decode(entry).expect("an entry");
                let (outcome, batch) = meta::apply(map, index, command).expect("applied");
                (outcome.encode(), batch)
            }
        }
    }
}

type Map = BTreeMap<Bytes, Bytes>;

/// Applies entries to maps, and writes down what came of it.
struct Script {
    kind: MapKind,
    maps: BTreeMap<&'static str, Map>,
    index: u64,
    text: String,
}

impl Script {
    fn new(kind: MapKind) -> Self {
        Self {
            kind,
            maps: BTreeMap::new(),
            index: 0,
            text: String::new(),
        }
    }

    fn map(&mut self, name: &'static str) -> &mut Map {
        self.maps.entry(name).or_default()
    }

    /// Puts a pair into a map, as if an entry had.
    fn pair(&mut self, name: &'static str, key: Bytes, value: Bytes) {
        let line = format!("{name} pair {} {}\n", hex(&key), hex(&value));
        self.text.push_str(&line);
        self.map(name).insert(key, value);
    }

    /// Applies an entry. Returns what it answered, encoded.
    fn run(&mut self, name: &'static str, entry: &Bytes) -> Bytes {
        let (outcome, batch) = self.note(name, "do", entry);
        put(self.map(name), batch);
        outcome
    }

    /// Applies an entry and keeps nothing of it.
    fn attempt(&mut self, name: &'static str, entry: &Bytes) {
        self.note(name, "try", entry);
    }

    fn note(&mut self, name: &'static str, verb: &str, entry: &Bytes) -> (Bytes, WriteBatch) {
        self.index += 1;
        let (index, kind) = (self.index, self.kind);
        let (outcome, batch) = kind.apply(self.map(name), index, entry);
        let line = format!(
            "{name} {verb} {index} {} -> {} {}\n",
            hex(entry),
            hex(&outcome),
            batch_text(&batch)
        );
        self.text.push_str(&line);
        (outcome, batch)
    }
}

fn put(map: &mut Map, batch: WriteBatch) {
    for (key, value) in batch {
        match value {
            Some(value) => map.insert(key, value),
            None => map.remove(&key),
        };
    }
}

fn batch_text(batch: &WriteBatch) -> String {
    let changes = batch.iter().map(|(key, value)| match value {
        Some(value) => format!("{}={}", hex(key), hex(value)),
        None => format!("{}-", hex(key)),
    });
    let text = changes.collect::<Vec<_>>().join(",");
    match text.len() {
        0 => "nothing".to_owned(),
        len if len <= BATCH_TEXT_MAX => text,
        _ => format!("#{}:{:032x}", batch.len(), xxh3_128(text.as_bytes())),
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for run in bytes.chunk_by(|one, next| one == next) {
        match run.len() {
            count if count >= RUN_MIN => {
                write!(text, "({:02x}*{count})", run[0]).expect("to memory")
            }
            count => text.push_str(&format!("{:02x}", run[0]).repeat(count)),
        }
    }
    if text.is_empty() {
        "none".to_owned()
    } else {
        text
    }
}

pub(in crate::sm) fn bytes(text: &str) -> Bytes {
    let digit = |at: &str| u8::from_str_radix(at, 16).expect("two digits");
    let (mut bytes, mut rest) = (Vec::new(), if text == "none" { "" } else { text });
    while !rest.is_empty() {
        if let Some(run) = rest.strip_prefix('(') {
            let (run, after) = run.split_once(')').expect("a run ends");
            let (byte, count) = run.split_once('*').expect("a run has a count");
            bytes.extend(std::iter::repeat_n(
                digit(byte),
                count.parse().expect("a count"),
            ));
            rest = after;
        } else {
            bytes.push(digit(&rest[..2]));
            rest = &rest[2..];
        }
    }
    Bytes::from(bytes)
}

/// Applies every line of a golden file, and returns the entries.
fn check(kind: MapKind, name: &str, text: &str) -> Vec<Bytes> {
    let (mut maps, mut entries): (BTreeMap<&str, Map>, _) = (BTreeMap::new(), Vec::new());
    for line in text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let words: Vec<&str> = line.split(' ').collect();

        // A line meets its map as the lines before it have left it.
        let map = maps.entry(words[0]).or_default();
        match words[1..] {
            ["pair", key, value] => drop(map.insert(bytes(key), bytes(value))),
            [verb @ ("do" | "try"), index, entry, "->", outcome, changes] => {
                let entry = bytes(entry);
                let (answered, batch) = kind.apply(map, index.parse().expect("an index"), &entry);
                let of = format!("{name}, entry {index}: {}", describe(kind, &entry));
                assert_eq!(answered, bytes(outcome), "{of}");
                assert_eq!(batch_text(&batch), changes, "{of}");

                // What is tried is not kept, so that one state can meet many entries.
                if verb == "do" {
                    put(map, batch);
                }
                entries.push(entry);
            }
            _ => panic!("{name}: not a line: {line}"),
        }
    }
    entries
}

fn describe(kind: MapKind, entry: &[u8]) -> String {
    let text = match kind {
        MapKind::Shard => format!("{:?}", kv::KvCommand::decode(entry).expect("an entry")),
        MapKind::Meta => format!("{:?}", meta::MetaCommand::decode(entry).expect("an entry")),
    };
    text.chars().take(300).collect()
}

/// Checks a golden file, or writes it if that was asked for.
fn hold(kind: MapKind, name: &str, text: &str, scenario: fn() -> Script) -> Vec<Bytes> {
    // Only by name, so that the file of a released level is never written by chance.
    if std::env::var("QUORATE_MEANING")
        .is_ok_and(|asked| asked.split(',').any(|asked| asked == name))
    {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join(format!("src/sm/meaning/goldens/{name}.txt"));
        std::fs::write(&path, scenario().text).expect("written");
        panic!(
            "{} is written: look at what is in it, and build anew",
            path.display()
        );
    }
    assert!(!text.is_empty(), "{name} is empty");
    check(kind, name, text)
}

/// The kinds of entries of a shard that a golden file must have.
const SHARD_KINDS: [&str; 15] = [
    "write",
    "claim",
    "install",
    "begin",
    "freeze",
    "release",
    "abort",
    "prepare",
    "complete",
    "activate",
    "cancel",
    "clear",
    "bounded write",
    "compare",
    "set read-only",
];

fn shard_kind(command: &kv::KvCommand) -> &'static str {
    match command {
        kv::KvCommand::Write { .. } => SHARD_KINDS[0],
        kv::KvCommand::BoundedWrite { .. } => SHARD_KINDS[12],
        kv::KvCommand::Compare => SHARD_KINDS[13],
        kv::KvCommand::SetReadOnly { .. } => SHARD_KINDS[14],
        kv::KvCommand::Claim { .. } => SHARD_KINDS[1],
        kv::KvCommand::Install { .. } => SHARD_KINDS[2],
        kv::KvCommand::Move { step, .. } => match step {
            MoveCommand::Begin { .. } => SHARD_KINDS[3],
            MoveCommand::Freeze => SHARD_KINDS[4],
            MoveCommand::Release => SHARD_KINDS[5],
            MoveCommand::Abort => SHARD_KINDS[6],
            MoveCommand::Prepare { .. } => SHARD_KINDS[7],
            MoveCommand::Complete { .. } => SHARD_KINDS[8],
            MoveCommand::Activate => SHARD_KINDS[9],
            MoveCommand::Cancel => SHARD_KINDS[10],
            MoveCommand::Clear { .. } => SHARD_KINDS[11],
        },
    }
}

/// Those of the meta group.
const META_KINDS: [&str; 8] = [
    "found",
    "announce",
    "install plan",
    "open move",
    "commit move",
    "abort move",
    "report",
    "raise level",
];

fn meta_kind(command: &meta::MetaCommand) -> &'static str {
    match command {
        meta::MetaCommand::Found { .. } => META_KINDS[0],
        meta::MetaCommand::Announce { .. } => META_KINDS[1],
        meta::MetaCommand::InstallPlan { .. } => META_KINDS[2],
        meta::MetaCommand::OpenMove { .. } => META_KINDS[3],
        meta::MetaCommand::CommitMove { .. } => META_KINDS[4],
        meta::MetaCommand::AbortMove { .. } => META_KINDS[5],
        meta::MetaCommand::Report { .. } => META_KINDS[6],
        meta::MetaCommand::RaiseLevel { .. } => META_KINDS[7],
    }
}

#[test]
fn every_entry_of_a_shard_means_what_it_meant() {
    let mut entries = hold(
        MapKind::Shard,
        "kv-level-0",
        include_str!("goldens/kv-level-0.txt"),
        level_0::shard,
    );
    entries.extend(hold(
        MapKind::Shard,
        "kv-level-1",
        include_str!("goldens/kv-level-1.txt"),
        level_1::shard,
    ));
    entries.extend(hold(
        MapKind::Shard,
        "kv-level-2",
        include_str!("goldens/kv-level-2.txt"),
        level_2::shard,
    ));
    let kinds: BTreeSet<&str> = entries
        .iter()
        .map(|entry| shard_kind(&kv::KvCommand::decode(entry).expect("an entry")))
        .collect();
    assert_eq!(kinds, SHARD_KINDS.into_iter().collect());
}

#[test]
fn every_entry_of_the_meta_group_means_what_it_meant() {
    let mut entries = hold(
        MapKind::Meta,
        "meta-level-0",
        include_str!("goldens/meta-level-0.txt"),
        level_0::meta,
    );
    entries.extend(hold(
        MapKind::Meta,
        "meta-level-1",
        include_str!("goldens/meta-level-1.txt"),
        level_1::meta,
    ));
    let kinds: BTreeSet<&str> = entries
        .iter()
        .map(|entry| meta_kind(&meta::MetaCommand::decode(entry).expect("an entry")))
        .collect();
    assert_eq!(kinds, META_KINDS.into_iter().collect());
}

#[test]
fn bytes_are_written_as_they_are() {
    for of in [
        &b""[..],
        b"\x00",
        b"\x00\x00\x00\x00\x00\x00\x00\x00",
        b"ab(\x10\x10",
        &[7; 3000],
    ] {
        assert_eq!(bytes(&hex(of)), of);
    }
}
