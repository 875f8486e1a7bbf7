//! Targets for `fuzzing`: what the core reads of logs, maps and other nodes.

use bytes::Bytes;

use super::cluster::meta::{MetaCommand, MetaOutcome};
use super::cluster::view::View;
use super::kv::{self, KvCommand, KvOutcome, decode_record, encode_record};
use super::meaning::bytes;
use super::moves::command::{ChunkCursor, OpenMove};
use super::ports::StoreError;
use super::requests::RequestRecord;
use super::slots::{self, SlotState};

/// Returns the bytes that the lines of a golden file have: entries and what they are answered.
fn words(text: &str) -> impl Iterator<Item = Vec<u8>> + '_ {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| line.split(' ').skip(3))
        .filter_map(read_word)
}

/// Returns what stands there in the form of golden files; none if it is something else.
fn read_word(word: &str) -> Option<Vec<u8>> {
    let is_of_form = word
        .bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'(' | b'*' | b')'));
    // Of a run in parentheses the digits of the count do not matter.
    let outside = word.split('(').map(|part| match part.split_once(')') {
        Some((_, after)) => after.len(),
        None => part.len(),
    });
    let is_even = outside.sum::<usize>().is_multiple_of(2);
    (!word.is_empty() && is_of_form && is_even).then(|| bytes(word).to_vec())
}

/// A few of each length, because most lines of a golden file are alike.
fn some(mut all: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    all.sort_by_key(|bytes| (bytes.len(), bytes.clone()));
    all.dedup();
    let step = (all.len() / 200).max(1);
    all.into_iter().step_by(step).collect()
}

/// Entries of the log of a shard, and what they are answered.
pub mod shard_commands {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let files = [
            include_str!("meaning/goldens/kv-level-0.txt"),
            include_str!("meaning/goldens/kv-level-1.txt"),
            include_str!("meaning/goldens/kv-level-2.txt"),
        ];
        some(files.into_iter().flat_map(words).collect())
    }

    pub fn read(bytes: &[u8]) {
        if let Ok(command) = KvCommand::decode(bytes) {
            let again = KvCommand::decode(&command.encode()).expect("own encoding");
            assert_eq!(again, command);
            // An entry that can be read must do no harm to the map that it meets.
            let empty = std::collections::BTreeMap::<Bytes, Bytes>::new();
            let _ = kv::apply(&empty, 1, command);
        }
        if let Ok(outcome) = KvOutcome::decode(bytes) {
            let again = KvOutcome::decode(&outcome.encode()).expect("own encoding");
            assert_eq!(again, outcome);
        }
    }
}

/// Entries of the log of the meta group, and what they are answered.
pub mod meta_commands {
    use super::super::cluster::meta;
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let files = [
            include_str!("meaning/goldens/meta-level-0.txt"),
            include_str!("meaning/goldens/meta-level-1.txt"),
        ];
        some(files.into_iter().flat_map(words).collect())
    }

    pub fn read(bytes: &[u8]) {
        if let Ok(command) = MetaCommand::decode(bytes) {
            // A command may name a level that its own encoding did not say it needs.
            match MetaCommand::decode(&command.encode()) {
                Ok(again) => assert_eq!(again, command),
                Err(error) => assert!(matches!(error, StoreError::TooOld { .. }), "{error}"),
            }
            let empty = std::collections::BTreeMap::<Bytes, Bytes>::new();
            let _ = meta::apply(&empty, 1, command);
        }
        if let Ok(outcome) = MetaOutcome::decode(bytes) {
            let again = MetaOutcome::decode(&outcome.encode()).expect("own encoding");
            assert_eq!(again, outcome);
        }
    }
}

/// Views, as the meta group's map has them and as nodes tell each other.
pub mod views {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let commands = meta_commands::samples();
        let views = commands
            .iter()
            .filter_map(|bytes| match MetaCommand::decode(bytes).ok()? {
                MetaCommand::Found { view } | MetaCommand::InstallPlan { next: view, .. } => {
                    Some(*view)
                }
                _ => None,
            });
        let views: Vec<View> = views.collect();
        let stored = views.iter().map(|view| view.encode().to_vec());
        let told = views
            .iter()
            .filter_map(|view| serde_json::to_vec(view).ok());
        some(stored.chain(told).collect())
    }

    pub fn read(bytes: &[u8]) {
        let decoded = [
            View::decode(bytes).ok(),
            serde_json::from_slice::<View>(bytes).ok(),
        ];
        for view in decoded.into_iter().flatten() {
            match View::decode(&view.encode()) {
                Ok(again) => assert_eq!(again, view),
                Err(error) => assert!(matches!(error, StoreError::TooOld { .. }), "{error}"),
            }
            // Whoever gets a view asks it these.
            let _ = view.check();
            let _ = view.is_settled();
        }
    }
}

/// Keys of a shard's map.
pub mod map_keys {
    use super::*;
    use crate::types::{MoveId, Slot};

    pub fn samples() -> Vec<Vec<u8>> {
        let slot = Slot::new(300).expect("a slot");
        [
            slots::data_key(slot, b"key"),
            slots::state_key(slot).to_vec().into(),
            slots::request_key(slot, b"once"),
            slots::expiry_key(slot, 77, b"once"),
            slots::change_key(MoveId(3), 9, &slots::data_key(slot, b"{tag}key")),
            slots::move_key(MoveId(3)),
        ]
        .into_iter()
        .map(Vec::from)
        .collect()
    }

    pub fn read(bytes: &[u8]) {
        let key = Bytes::copy_from_slice(bytes);
        if let Some((slot, user)) = slots::parse_data_key(&key) {
            assert_eq!(slots::data_key(slot, &user), key);
        }
        if let Some(slot) = slots::parse_state_key(&key) {
            assert_eq!(slots::state_key(slot)[..], key[..]);
        }
        if let Some((slot, request)) = slots::parse_request_key(&key) {
            assert_eq!(slots::request_key(slot, &request), key);
        }
        if let Some((slot, time_ms, request)) = slots::parse_expiry_key(&key) {
            assert_eq!(slots::expiry_key(slot, time_ms, &request), key);
        }
        if let Some(id) = slots::parse_move_key(&key) {
            assert_eq!(slots::move_key(id), key);
        }
        let _ = slots::parse_change_key(&key);
        let _ = slots::slot_of_copied(&key);
        let _ = slots::slot_of(&key);
    }
}

/// Values of a shard's map.
pub mod map_values {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let lines = [
            include_str!("meaning/goldens/kv-level-0.txt"),
            include_str!("meaning/goldens/kv-level-1.txt"),
        ];
        let changes = lines.into_iter().flat_map(|text| {
            text.lines()
                .flat_map(|line| line.split([' ', ',']))
                .filter_map(|change| read_word(change.split_once('=')?.1))
        });
        some(changes.collect())
    }

    pub fn read(bytes: &[u8]) {
        let shared = Bytes::copy_from_slice(bytes);
        if let Ok(record) = decode_record(&shared) {
            let again = decode_record(&encode_record(&record)).expect("own encoding");
            assert_eq!(again, record);
        }
        if let Ok(state) = SlotState::decode(bytes) {
            assert_eq!(SlotState::decode(&state.encode()).expect("own"), state);
        }
        if let Ok(record) = RequestRecord::decode(bytes) {
            assert_eq!(
                RequestRecord::decode(&record.encode()).expect("own"),
                record
            );
        }
        if let Ok(open) = OpenMove::decode(bytes) {
            assert_eq!(OpenMove::decode(&open.encode()).expect("own"), open);
        }
        let _ = ChunkCursor::decode(bytes);
        let _ = slots::change_weight(bytes);
    }
}
