//! Chunks, marks, ages, and what is left for the freeze.

use super::*;
use crate::sm::ports::{Direction, Read};
use crate::sm::requests::REMEMBERED_MS;
use crate::sm::slots::{
    change_range, change_value, change_weight, data_key, move_key, parse_change_key, request_key,
};

#[test]
fn what_changes_while_a_slot_is_copied_follows() {
    run("
        1: put {a}1 x           -> @1+
        1: put {a}2 x           -> @2+
        1: put {a}3 x           -> @3+
        2: m5 prepare a from 1  -> 0
        2: m5 copy from 1       -> nothing to read
        1: m5 begin a to 2      -> done
        2: m5 copy from 1 bytes 1 -> 1
        1: put {a}1 y           -> @4
        1: del {a}2             -> -@5
        2: m5 copy from 1 bytes 1 -> 2
        1: del {a}3             -> -@6
        1: put {a}0 x; put {c} x -> @7+; @1+
        2: m5 copy from 1       -> 3
        1: t=3 key=k put {a}4 x -> @8+
        2: m5 complete from 1   -> not final
        1: m5 freeze a          -> done
        1: put {a}1 z           -> frozen
        1: get {a}1             -> frozen
        2: m5 complete from 1   -> differs 3 2
        2: m5 copy from 1       -> 4
        2: m5 complete from 1   -> complete 4
        1: m5 release a         -> done
        2: get {a}1             -> wrong owner
        2: m5 activate a        -> done
        2: get {a}0; get {a}1; get {a}2; get {a}3; get {a}4 -> x@7; y@4; none; none; x@8
        2: key=k put {a}4 x     -> @8+
        1: get {c}              -> x@1");
}

#[test]
fn chunks_are_taken_strictly_in_turn() {
    let mut world = run("
        1: put {a}1 x           -> @1+
        1: put {a}2 x           -> @2+
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done");
    let time_ms = 0;
    let install = |world: &mut World, install: &Install| {
        let outcome = show(world.shard(2).apply(KvCommand::Install {
            time_ms,
            install: install.clone(),
        }));
        world.check();
        outcome
    };
    let first = world.chunk(MoveId(5), 1, 2, 1).expect("begun");
    let whole = world.chunk(MoveId(5), 1, 2, 999).expect("begun");
    let early = Install {
        chunk: 1,
        ..first.clone()
    };
    assert_eq!(install(&mut world, &early), "0");
    assert!(
        world.shard(2).map.keys().all(|key| key[0] != 0x10),
        "nothing of it was installed"
    );
    assert_eq!(install(&mut world, &first), "1");
    assert_eq!(
        install(&mut world, &whole),
        "1",
        "another driver's first chunk"
    );
    assert_eq!(install(&mut world, &first), "1");
    let second = world.chunk(MoveId(5), 1, 2, 999).expect("begun");
    assert_eq!(second.pairs.len(), 1, "the rest");
    world.run(
        "1: put {a}1 y -> @3
               1: m5 freeze a -> done",
    );
    assert_eq!(install(&mut world, &second), "2");
    let third = world.chunk(MoveId(5), 1, 2, 999).expect("begun");
    let stale = Install {
        chunk: 3,
        ..second.clone()
    };
    assert_eq!(install(&mut world, &third), "3");
    world.run("2: m5 complete from 1 -> complete 3");
    assert_eq!(
        install(&mut world, &stale),
        "complete 3",
        "nothing is installed after the end"
    );
    world.run(
        "1: m5 release a -> done
               2: m5 activate a -> done",
    );
    assert_eq!(install(&mut world, &stale), "not open");
    world.run("2: get {a}1; get {a}2 -> y@3; x@2");
}

#[test]
fn a_chunk_that_does_not_fit_changes_nothing() {
    let mut world = run("
        1: put {a} x            -> @1+
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done");
    let (a, b) = (slot_of(b"a"), slot_of(b"b"));
    let good = world.chunk(MoveId(5), 1, 2, 999).expect("begun");
    let record = good.pairs[0].1.clone().expect("a value");
    let table: [(Bytes, Bytes, &str); 6] = [
        (data_key(b, b"{b}"), record.clone(), "a key of another slot"),
        (data_key(a, b"{b}"), record.clone(), "a key of another slot"),
        (
            request_key(b, b"k"),
            record.clone(),
            "a request of another slot",
        ),
        (
            data_key(a, b"{a}2"),
            Bytes::from_static(b"\x09"),
            "an undecodable record",
        ),
        (
            request_key(a, b"k"),
            Bytes::from_static(b"\x09"),
            "an undecodable request",
        ),
        (move_key(MoveId(5)), record, "neither data nor a request"),
    ];
    for (key, value, why) in table {
        let mut bad = good.clone();
        bad.pairs.push((key, Some(value)));
        let before = world.shard(2).map.clone();
        let outcome = show(world.shard(2).apply(KvCommand::Install {
            time_ms: 5000,
            install: bad,
        }));
        assert!(outcome.starts_with(&format!("unfit: {why}")), "{outcome}");
        assert_eq!(world.shard(2).map, before);
    }
    world.run("2: m5 copy from 1 -> 1");
}

/// A shard with a request answered at 1000 ms, and its move begun when the shard's time is
/// `now_ms`.
fn with_request(now_ms: u64) -> World {
    let mut world = run("
        1: t=1000 key=k put {a} x -> @1+
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done");
    world.run(&format!("1: t={now_ms} put {{c}} x -> @1+"));
    world
}

/// Brings it over to a destination whose time is `time_ms`.
fn bring(world: &mut World, time_ms: u64) {
    let install = world.chunk(MoveId(5), 1, 2, 999).expect("begun");
    assert_eq!(
        show(
            world
                .shard(2)
                .apply(KvCommand::Install { time_ms, install })
        ),
        "1"
    );
    world.check();
    world.run(
        "
        1: m5 freeze a          -> done
        2: m5 complete from 1   -> complete 1
        1: m5 release a         -> done
        2: m5 activate a        -> done",
    );
}

#[test]
fn requests_keep_their_age() {
    // Two minutes old at the source: eight are left, whatever the destination's time is.
    for there_ms in [10_000_000, 120_000] {
        let mut world = with_request(121_000);
        bring(&mut world, there_ms);
        let last_ms = there_ms + REMEMBERED_MS - 120_000 - 1;
        world.run(&format!("2: t={last_ms} key=k put {{a}} x -> @1+"));
        let past_ms = last_ms + 1;
        world.run(&format!("2: t={past_ms} key=k put {{a}} x -> @2"));
    }
    // A destination that is younger than the request remembers it longer, and never shorter.
    let mut world = with_request(121_000);
    bring(&mut world, 7);
    let last_ms = REMEMBERED_MS - 1;
    world.run(&format!("2: t={last_ms} key=k put {{a}} x -> @1+"));
    let past_ms = last_ms + 1;
    world.run(&format!("2: t={past_ms} key=k put {{a}} x -> @2"));
}

#[test]
fn requests_that_expired_stay_behind() {
    let mut world = with_request(1000 + REMEMBERED_MS - 1);
    bring(&mut world, 5000);
    assert_eq!(world.shard(2).requests(slot_of(b"a")).len(), 1);
    let mut world = run("
        1: t=1000 key=k put {a} x -> @1+
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done");
    let install = world.chunk(MoveId(5), 1, 2, 999).expect("begun");
    let install = Install {
        source_ms: 1000 + REMEMBERED_MS,
        ..install
    };
    world.shard(2).apply(KvCommand::Install {
        time_ms: 5000,
        install,
    });
    world.check();
    assert_eq!(world.shard(2).requests(slot_of(b"a")).len(), 0);
    assert_eq!(world.shard(2).state(slot_of(b"a")).contents.keys, 1);
}

#[test]
fn a_request_that_is_brought_twice_counts_once() {
    let mut world = run("
        1: t=1000 key=k put {a} x -> @1+
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done
        2: m5 copy from 1       -> 1");
    // The record expires and is forgotten, and the key is used anew.
    let later_ms = 1000 + REMEMBERED_MS;
    world.run(&format!(
        "1: t={later_ms} put {{c}} x -> @1+
         1: t={later_ms} key=k put {{a}} y -> @2
         2: m5 copy from 1       -> 2
         2: m5 copy from 1       -> 3
         1: m5 freeze a          -> done
         2: m5 complete from 1   -> complete 3
         1: m5 release a         -> done
         2: m5 activate a        -> done
         2: key=k put {{a}} y    -> @2
         2: key=k put {{a}} x    -> key reused"
    ));
    assert_eq!(world.shard(2).requests(slot_of(b"a")).len(), 1);
}

/// The marks in a shard's map: the text of the changed key.
fn marks(shard: &Shard, id: u64) -> Vec<String> {
    let marks = shard
        .map
        .scan(&change_range(MoveId(id)), Direction::Forward);
    let keys = marks.map(|mark| {
        parse_change_key(&mark.expect("readable").0)
            .expect("a mark")
            .1
    });
    keys.map(|key| key[3..].escape_ascii().to_string())
        .collect()
}

#[test]
fn every_change_in_a_slot_that_is_copied_is_marked() {
    let mut world = run("
        1: t=1000 key=old put {a} x -> @1+
        1: put {a} y            -> @2
        1: m5 begin a b to 2    -> done
        1: m6 begin c to 3      -> done
        1: put {a}1 x; put {b}1 x; put {c}1 x -> @3+; @1+; @1+
        1: put {a}1 y; del {a}1 -> @4; -@5
        1: get {a}              -> y@2
        1: del {a}1             -> -
        1: key=k put {a}2 x absent -> @6+
        1: key=l put {a}2 x absent -> failed 0 @6");
    assert_eq!(marks(world.shard(1), 6), ["{c}1"]);
    let expected = ["{a}1", "{b}1", "{a}1", "k", "{a}2", "l"];
    let mut found = marks(world.shard(1), 5);
    assert_eq!(found.len(), expected.len());
    let sorted = |mut texts: Vec<String>| {
        texts.sort();
        texts
    };
    assert_eq!(
        sorted(found.split_off(0)),
        sorted(expected.map(String::from).to_vec())
    );
    // That old requests are forgotten is not marked.
    let late_ms = 1000 + REMEMBERED_MS;
    let before = world.shard(1).requests(slot_of(b"a")).len();
    world.run(&format!("1: t={late_ms} put {{d}} x -> wrong owner"));
    assert!(world.shard(1).requests(slot_of(b"a")).len() < before);
    assert_eq!(marks(world.shard(1), 5).len(), expected.len());
    // After the end of the move nothing is marked, and the marks are cleared.
    world.run(
        "1: m5 abort a b         -> done
               1: put {a}1 z           -> @7+",
    );
    assert_eq!(marks(world.shard(1), 5).len(), expected.len());
    assert_eq!(
        leftovers(&world.shard(1).map).expect("readable"),
        Some((MoveId(5), BTreeSet::new()))
    );
    world.run(
        "1: m5 clear limit 4     -> more
               1: m5 clear limit 4     -> cleared",
    );
    assert!(marks(world.shard(1), 5).is_empty());
    assert_eq!(
        leftovers(&world.shard(1).map).expect("readable"),
        None,
        "the other move is open"
    );
    assert_eq!(marks(world.shard(1), 6), ["{c}1"]);
}

/// Returns the source's state in a move from shard 1 to 2, as its driver sees it.
fn remaining(world: &mut World) -> SourceState {
    let cursor = world.progress(MoveId(5), 2).cursor;
    source_state(&world.shard(1).map, MoveId(5), &tags(&["a"]), &cursor).expect("readable")
}

#[test]
fn little_is_left_to_the_freeze_however_much_was_written() {
    let mut world = run("
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done");
    for number in 0..500 {
        world.shard(1).step(&format!("put {{a}}{number} {number}"));
    }
    assert_eq!(
        remaining(&mut world),
        SourceState::Copying(Remaining::Pairs)
    );
    let mut chunks = 0;
    while remaining(&mut world) != SourceState::Copying(Remaining::Changes { bytes: 0 }) {
        world.step("2: m5 copy from 1 bytes 4000");
        chunks += 1;
        assert!(chunks < 50, "bounded: {:?}", remaining(&mut world));
    }
    for _ in 0..1000 {
        world.shard(1).step("put {a}hot x");
    }
    let SourceState::Copying(Remaining::Changes { bytes }) = remaining(&mut world) else {
        panic!("the pairs were read")
    };
    assert!((64_000..CHANGES_BYTES_MAX).contains(&bytes), "{bytes}");
    let hot = world.chunk(MoveId(5), 1, 2, 1 << 20).expect("begun");
    assert_eq!(
        hot.pairs.len(),
        1,
        "a key that is written often is brought once"
    );
    world.run(
        "
        1: put {a}last x        -> @1501+
        1: m5 freeze a          -> done",
    );
    assert_eq!(
        show(world.shard(2).apply(KvCommand::Install {
            time_ms: 0,
            install: hot
        })),
        format!("{}", chunks + 1)
    );
    let last = world.chunk(MoveId(5), 1, 2, 1 << 20).expect("begun");
    assert_eq!(last.pairs.len(), 1);
    assert_eq!(
        show(world.shard(2).apply(KvCommand::Install {
            time_ms: 0,
            install: last
        })),
        format!("{}", chunks + 2)
    );
    assert_eq!(
        remaining(&mut world),
        SourceState::Frozen(Remaining::Changes { bytes: 0 })
    );
    world.step("2: m5 complete from 1");
    world.run(
        "
        1: m5 release a         -> done
        2: m5 activate a        -> done
        2: get {a}hot; get {a}499; get {a}last -> x@1500; 499@500; x@1501",
    );
}

#[test]
fn a_reader_that_is_behind_does_no_harm() {
    let mut world = run("
        1: put {a}1 old         -> @1+
        1: put {a}2 old         -> @2+
        2: m5 prepare a from 1  -> 0");
    let before_begin = world.shard(1).clone();
    let id = MoveId(5);
    world.run("1: m5 begin a to 2      -> done");
    let behind = world.shard(1).clone();
    world.run(
        "
        1: put {a}1 new         -> @3
        1: put {a}2 new         -> @4
        1: put {a}3 new         -> @5+",
    );
    assert_eq!(
        move_chunk(&before_begin.map, id, b"", 999).expect("readable"),
        None,
        "its later changes would not be marked"
    );
    let stale = move_chunk(&behind.map, id, b"", 999)
        .expect("readable")
        .expect("begun");
    assert!(stale.done, "all that it knows");
    assert_eq!(
        show(world.shard(2).apply(KvCommand::Install {
            time_ms: 0,
            install: stale.install(id, 0)
        })),
        "1"
    );
    // A fresh reader brings the changes, then again one that is behind: it knows of none after the
    // cursor.
    world.run("2: m5 copy from 1       -> 2");
    let cursor = world.progress(id, 2).cursor;
    let stale = move_chunk(&behind.map, id, &cursor, 999)
        .expect("readable")
        .expect("begun");
    assert!(stale.pairs.is_empty());
    assert_eq!(
        show(world.shard(2).apply(KvCommand::Install {
            time_ms: 0,
            install: stale.install(id, 2)
        })),
        "3"
    );
    world.run(
        "1: put {a}1 newer       -> @6
               1: m5 freeze a          -> done",
    );
    assert_eq!(
        final_contents(&behind.map, id).expect("readable"),
        None,
        "it has not applied the freeze"
    );
    world.run(
        "
        2: m5 copy from 1       -> 4
        2: m5 complete from 1   -> complete 4
        1: m5 release a         -> done
        2: m5 activate a        -> done
        2: get {a}1; get {a}2; get {a}3 -> newer@6; new@4; new@5",
    );
}

#[test]
fn damage_in_what_a_move_keeps_is_an_error() {
    let mut world = run("1: put {a} x -> @1+
                         1: m5 begin a to 2 -> done
                         1: put {a} y -> @2");
    let good = world.shard(1).map.clone();
    let chunk = |map: &BTreeMap<Bytes, Bytes>| move_chunk(map, MoveId(5), b"", 999);
    assert!(chunk(&good).is_ok());
    assert!(
        move_chunk(&good, MoveId(5), b"\x09", 999).is_err(),
        "a cursor of a later version"
    );
    let mut damaged = good.clone();
    damaged.insert(move_key(MoveId(5)), Bytes::from_static(b"\x09"));
    assert!(chunk(&damaged).is_err());
    let freeze = MoveCommand::Freeze.into_command(MoveId(5), &tags(&["a"]));
    assert!(apply(&damaged, 9, freeze).is_err());
    let mut damaged = good.clone();
    damaged.insert(change_range(MoveId(5)).start, change_value(1));
    assert!(chunk(&damaged).is_err(), "a mark of no key");
    assert!(leftovers(&damaged).is_err());
    assert!(
        change_weight(b"").is_err()
            && change_weight(&change_value(300)).is_ok_and(|weight| weight == 364)
    );
}
