//! Fuzzes everything that reads bytes from the network or a disk: nothing panics, nothing takes
//! more memory than its input is worth, and what is read is written as it was read.
//!
//! Each target reads what [`edits`] made of valid bytes: of its own samples, which are encoded
//! anew or golden files, and of the files in `fuzz/corpus/NAME`. The targets themselves are in
//! files `fuzz.rs` beside what they read, for the parsers are private there.
//!
//! `cargo test --lib fuzzing` tries some hundred for each target, or goes on for
//! `QUORATE_FUZZ_SECONDS`. An input that did harm is printed; kept in the corpus, it is tried for
//! ever.

mod allocation;
mod edits;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

use self::edits::{Edit, edits};
use crate::{api, client, http, raft, sm, storage};

/// Bytes that a target may hold whatever its input: serde takes up to a mebibyte for a list before
/// it has seen the first element, and lists are in lists.
const HELD_BYTES_MIN: usize = 8 << 20;
/// And for each byte of its input: elements of a list take few encoded bytes.
const HELD_PER_BYTE: usize = 256;
/// Inputs of a target at a time.
const CASES: u32 = 256;

/// A reader of bytes that may be anything.
struct Target {
    name: &'static str,
    read: fn(&[u8]),
    samples: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($test:ident: $room:ident::$($path:ident)::+;)*) => {
        const TARGETS: &[Target] = &[$(Target {
            name: stringify!($test),
            read: $room::$($path)::+::read,
            samples: $room::$($path)::+::samples,
        },)*];

        mod targets {
            $(#[test]
            fn $test() {
                super::fuzz(stringify!($test));
            })*
        }
    };
}

targets! {
    frames: raft::fuzz::frames;
    memberships: raft::fuzz::memberships;
    log_records: storage::log::fuzz::records;
    log_bodies: storage::log::fuzz::bodies;
    log_segments: storage::log::fuzz::segments;
    snapshot_files: storage::fuzz::snapshots;
    snapshot_contents: storage::fuzz::snapshot_contents;
    sealed_files: storage::fuzz::sealed;
    witness_files: storage::fuzz::witnesses;
    redo_files: storage::map::fuzz::redo;
    tree_records: storage::map::fuzz::tree_records;
    pieces: storage::fuzz::pieces;
    shard_commands: sm::fuzz::shard_commands;
    meta_commands: sm::fuzz::meta_commands;
    views: sm::fuzz::views;
    map_keys: sm::fuzz::map_keys;
    map_values: sm::fuzz::map_values;
    shard_calls: api::fuzz::shard_calls;
    peer_messages: api::fuzz::peer_messages;
    answers: client::fuzz::answers;
    http_requests: http::fuzz::requests;
}

/// Reads one input, and looks what that took.
fn try_input(target: &Target, input: &[u8]) {
    let peak = allocation::peak_of(|| (target.read)(input));
    let most = HELD_BYTES_MIN + HELD_PER_BYTE * input.len();
    assert!(
        peak <= most,
        "{}: {} bytes of input took {peak} bytes of memory",
        target.name,
        input.len()
    );
}

fn corpus_of(target: &Target) -> Vec<Vec<u8>> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target.name);
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let read = |path: &PathBuf| std::fs::read(path).expect("a file of the corpus");
    paths.iter().map(read).collect()
}

/// Tries the corpus of a target, and then what edits make of it.
fn fuzz(name: &str) {
    let target = TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("a target of this name");
    let mut seeds = (target.samples)();
    seeds.extend(corpus_of(target));
    assert!(!seeds.is_empty(), "{name} has nothing to begin with");
    seeds.iter().for_each(|seed| try_input(target, seed));
    seeds.push(Vec::new());

    let until = std::env::var("QUORATE_FUZZ_SECONDS").ok().map(|seconds| {
        let seconds: f64 = seconds.parse().expect("QUORATE_FUZZ_SECONDS is a number");
        Instant::now() + Duration::from_secs_f64(seconds / TARGETS.len() as f64)
    });
    // Edits of one sample, perhaps with the end of another.
    let inputs = (
        any::<Index>(),
        edits(),
        proptest::option::of(any::<Index>()),
    );
    let input = |(seed, edits, end): (Index, Vec<Edit>, Option<Index>)| {
        let mut bytes = seeds[seed.index(seeds.len())].clone();
        if let Some(end) = end {
            let other = &seeds[end.index(seeds.len())];
            bytes.truncate(end.index(bytes.len() + 1));
            bytes.extend_from_slice(&other[end.index(other.len() + 1)..]);
        }
        edits.iter().for_each(|edit| edit.apply(&mut bytes));
        bytes
    };
    loop {
        let mut runner = TestRunner::new(Config {
            cases: CASES,
            failure_persistence: None,
            max_shrink_iters: 4096,
            ..Config::default()
        });
        let tried = runner.run(&inputs, |made| {
            let bytes = input(made);
            let tried = std::panic::catch_unwind(|| try_input(target, &bytes));
            tried.map_err(|panic| {
                let why = crate::supervisor::message(&*panic).to_owned();
                TestCaseError::fail(why)
            })
        });
        match tried {
            Ok(()) => {}
            Err(TestError::Fail(reason, made)) => {
                let bytes = input(made);
                panic!(
                    "{name}: {reason}\n{} bytes: {}",
                    bytes.len(),
                    bytes.escape_ascii()
                );
            }
            Err(TestError::Abort(reason)) => panic!("{name}: {reason}"),
        }
        if until.is_none_or(|until| Instant::now() >= until) {
            return;
        }
    }
}

/// Holds that no file lies where no target looks.
#[test]
fn every_corpus_has_a_target() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        assert!(
            TARGETS.iter().any(|target| *target.name == *name),
            "there is no target {}",
            name.to_string_lossy()
        );
    }
}

/// A list of random bytes is no valid anything, but costs nothing to try.
#[test]
fn noise_does_no_harm() {
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::with_cases(CASES)
    });
    let noise = (0..TARGETS.len(), vec(any::<u8>(), 0..300));
    let tried = runner.run(&noise, |(target, bytes)| {
        try_input(&TARGETS[target], &bytes);
        Ok(())
    });
    tried.expect("no harm");
}
