//! What moves write to log and disk, byte for byte.

use super::super::command::ChunkCursor;
use super::*;
use crate::sm::slots::{
    SlotContents, all_moves, change_key, change_range, change_value, move_key, parse_change_key,
    parse_move_key,
};

fn slot(number: u16) -> Slot {
    Slot::new(number).expect("a slot")
}

fn slots(numbers: &[u16]) -> BTreeSet<Slot> {
    numbers.iter().map(|number| slot(*number)).collect()
}

fn encoded(step: MoveCommand) -> Bytes {
    let command = step.into_command(MoveId(5), &slots(&[300]));
    let bytes = command.encode();
    assert_eq!(KvCommand::decode(&bytes).expect("own encoding"), command);
    bytes
}

#[test]
fn the_encodings_of_move_steps_stand() {
    let contents = BTreeMap::from([(
        slot(300),
        SlotContents {
            revision: Revision(9),
            keys: 1,
            bytes: 2,
        },
    )]);
    let table: [(MoveCommand, &[u8]); 9] = [
        (
            MoveCommand::Begin { to: GroupId(2) },
            b"\x01\x02\x05\x01\xac\x02\x00\x02",
        ),
        (MoveCommand::Freeze, b"\x01\x02\x05\x01\xac\x02\x01"),
        (MoveCommand::Release, b"\x01\x02\x05\x01\xac\x02\x02"),
        (MoveCommand::Abort, b"\x01\x02\x05\x01\xac\x02\x03"),
        (
            MoveCommand::Prepare { from: GroupId(1) },
            b"\x01\x02\x05\x01\xac\x02\x04\x01",
        ),
        (
            MoveCommand::Complete { chunk: 7, contents },
            b"\x01\x02\x05\x01\xac\x02\x05\x07\x01\xac\x02\x09\x01\x02",
        ),
        (MoveCommand::Activate, b"\x01\x02\x05\x01\xac\x02\x06"),
        (MoveCommand::Cancel, b"\x01\x02\x05\x01\xac\x02\x07"),
        (
            MoveCommand::Clear { limit: 300 },
            b"\x01\x02\x05\x01\xac\x02\x08\xac\x02",
        ),
    ];
    for (step, golden) in table {
        assert_eq!(&encoded(step)[..], golden);
    }
    let install = Install {
        id: MoveId(5),
        chunk: 7,
        cursor: Bytes::from_static(b"c"),
        source_ms: 300,
        pairs: vec![("k".into(), Some("v".into())), ("l".into(), None)],
    };
    let command = KvCommand::Install {
        time_ms: 8,
        install,
    };
    let bytes = command.encode();
    assert_eq!(
        &bytes[..],
        b"\x01\x03\x08\x05\x07\x01c\xac\x02\x02\x01k\x01\x01v\x01l\x00"
    );
    assert_eq!(KvCommand::decode(&bytes).expect("own encoding"), command);
}

#[test]
fn the_encodings_of_move_outcomes_stand() {
    let contents = SlotContents {
        revision: Revision(9),
        keys: 1,
        bytes: 2,
    };
    let slot = slot(300);
    let progress = InstallProgress {
        chunk: 3,
        cursor: Bytes::from_static(b"c"),
        complete: true,
    };
    let table: [(MoveOutcome, &[u8]); 14] = [
        (MoveOutcome::Done, b"\x00"),
        (MoveOutcome::Cleared { more: true }, b"\x01\x01"),
        (MoveOutcome::Installing(progress), b"\x02\x03\x01c\x01"),
        (MoveRejection::NotOwned { slot }.into(), b"\x03\x00\xac\x02"),
        (MoveRejection::Owned { slot }.into(), b"\x03\x01\xac\x02"),
        (
            MoveRejection::Overtaken {
                slot,
                generation: MoveId(6),
            }
            .into(),
            b"\x03\x02\xac\x02\x06",
        ),
        (
            MoveRejection::Open { id: MoveId(6) }.into(),
            b"\x03\x03\x06",
        ),
        (MoveRejection::NotOpen.into(), b"\x03\x04"),
        (MoveRejection::NotFrozen.into(), b"\x03\x05"),
        (MoveRejection::Released.into(), b"\x03\x06"),
        (
            MoveRejection::Leftovers { slot }.into(),
            b"\x03\x07\xac\x02",
        ),
        (MoveRejection::Incomplete.into(), b"\x03\x08"),
        (
            MoveRejection::Differs {
                slot,
                source: contents,
                here: SlotContents::default(),
            }
            .into(),
            b"\x03\x09\xac\x02\x09\x01\x02\x00\x00\x00",
        ),
        (
            MoveRejection::Unfit { why: "w".into() }.into(),
            b"\x03\x0a\x01w",
        ),
    ];
    for (outcome, golden) in table {
        let bytes = KvOutcome::Moved(outcome.clone()).encode();
        assert_eq!(&bytes[..], [b"\x01\x03", golden].concat());
        assert_eq!(
            KvOutcome::decode(&bytes).expect("own encoding"),
            KvOutcome::Moved(outcome)
        );
    }
}

#[test]
fn the_encodings_of_an_open_move_and_its_marks_stand() {
    let to = GroupId(2);
    let progress = InstallProgress {
        chunk: 3,
        cursor: Bytes::from_static(b"c"),
        complete: false,
    };
    let table: [(MovePhase, &[u8]); 3] = [
        (MovePhase::Copying { to }, b"\x01\x02\x01\xac\x02\x00\x02"),
        (MovePhase::Frozen { to }, b"\x01\x02\x01\xac\x02\x01\x02"),
        (
            MovePhase::Installing {
                from: GroupId(1),
                progress,
            },
            b"\x01\x02\x01\xac\x02\x02\x01\x03\x01c\x00",
        ),
    ];
    for (phase, golden) in table {
        let open = OpenMove {
            slots: slots(&[1, 300]),
            phase,
        };
        assert_eq!(&open.encode()[..], golden);
        assert_eq!(OpenMove::decode(golden).expect("own encoding"), open);
    }
    let id = MoveId(0x0102_0304_0506_0708);
    assert_eq!(&move_key(id)[..], b"\x06\x01\x02\x03\x04\x05\x06\x07\x08");
    assert_eq!(parse_move_key(&move_key(id)), Some(id));
    assert!(all_moves().start <= move_key(id));
    let mark = change_key(MoveId(1), 300, b"\x10\x00\x05k");
    assert_eq!(
        &mark[..],
        b"\x05\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\x01\x2c\x10\x00\x05k"
    );
    assert_eq!(
        parse_change_key(&mark),
        Some((MoveId(1), Bytes::from_static(b"\x10\x00\x05k")))
    );
    assert_eq!(
        parse_change_key(&mark.slice(..17)),
        None,
        "a mark of no key"
    );
    assert_eq!(&change_value(300)[..], b"\x01\xac\x02");
    let range = change_range(MoveId(1));
    assert!(
        range.start <= mark
            && range
                .end
                .is_some_and(|end| mark < end && end == change_range(MoveId(2)).start)
    );
}

#[test]
fn the_encoding_of_a_cursor_stands() {
    let pairs = ChunkCursor::Pairs {
        after: Bytes::from_static(b"k"),
    };
    let changes = ChunkCursor::Changes {
        after: Bytes::from_static(b"k"),
    };
    assert_eq!(
        ChunkCursor::decode(b"\x01\x00\x01k").expect("a cursor"),
        pairs
    );
    assert_eq!(
        ChunkCursor::decode(b"\x01\x01\x01k").expect("a cursor"),
        changes
    );
    assert_eq!(
        ChunkCursor::decode(b"").expect("the start"),
        ChunkCursor::Pairs {
            after: Bytes::new()
        }
    );
    assert!(ChunkCursor::decode(b"\x01\x02").is_err());
}
