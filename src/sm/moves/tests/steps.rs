//! What each step does, and what it refuses.

use super::*;
use crate::sm::ports::{Direction, KeyRange, Read};
use crate::sm::slots::{SlotContents, data_range};

#[test]
fn a_move_takes_slots_from_one_shard_to_another() {
    let mut world = run("
        1: put {a}1 x           -> @1+
        1: put {a}2 y           -> @2+
        1: del {a}1             -> -@3
        1: put {b} z            -> @1+
        1: t=5 key=k put {a} w  -> @4+");
    world.run(MOVED);
    world.run(
        "
        2: get {a}1             -> none
        2: get {a}2; get {b}    -> y@2; z@1
        2: key=k put {a} w      -> @4+
        2: key=k put {a} v      -> key reused
        2: put {a}1 x           -> @5+
        2: del {b}              -> -@2
        1: get {a}2             -> wrong owner, g2 by m5
        1: key=k put {a} w      -> wrong owner, g2 by m5
        1: get {c}              -> none
        2: get {c}              -> wrong owner",
    );
    assert_eq!(
        leftovers(&world.shard(1).map).expect("readable"),
        Some((MoveId(5), tags(&["a", "b"])))
    );
    world.run(
        "
        1: m5 clear a b limit 9 -> cleared
        1: get {a}2             -> wrong owner, g2 by m5
        2: get {a}2             -> y@2",
    );
    assert_eq!(leftovers(&world.shard(1).map).expect("readable"), None);
    for tag in ["a", "b"] {
        let range = data_range(slot_of(tag.as_bytes()), &KeyRange::all());
        assert!(
            world
                .shard(1)
                .map
                .scan(&range, Direction::Forward)
                .next()
                .is_none()
        );
    }
}

#[test]
fn a_move_begins_with_all_its_slots_or_none() {
    let mut world = run("
        1: m5 begin a d to 2    -> not owned
        1: m5 begin a b to 2    -> done
        1: m5 begin a b to 2    -> done
        1: m5 begin a b to 3    -> unfit: another move began here under this id
        1: m5 begin a to 2      -> unfit: another move began here under this id
        1: m6 begin b c to 2    -> m5 is open
        1: m4 begin c b to 2    -> overtaken by m5
        1: m6 begin to 2        -> unfit: a move of no slots
        2: m6 prepare from 1    -> unfit: a move of no slots
        1: m7 begin c to 3      -> done");
    let states = ["a", "b", "c"].map(|tag| world.shard(1).state(slot_of(tag.as_bytes())));
    assert_eq!(
        states.map(|state| state.generation),
        [MoveId(5), MoveId(5), MoveId(7)]
    );
    world.run(
        "2: m5 prepare a b from 1 -> 0
               2: m5 prepare a b from 1 -> 0
               2: m5 prepare a b from 3 -> unfit: another move was opened here under this id
               2: m5 prepare a from 1   -> unfit: another move was opened here under this id
               2: m6 prepare b c from 1 -> leftovers
               2: m4 prepare c b from 1 -> overtaken by m5
               1: m8 prepare b from 2   -> owned
               2: m5 begin a b to 1     -> unfit: another move began here under this id
               1: m5 prepare a b from 2 -> unfit: another move was opened here under this id",
    );
}

#[test]
fn every_step_may_come_twice() {
    run("
        1: put {a} x            -> @1+
        2: m5 prepare a from 1  -> 0
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done
        1: m5 begin a to 2      -> done
        2: m5 copy from 1       -> 1
        2: m5 prepare a from 1  -> 1
        1: m5 freeze a          -> done
        1: m5 freeze a          -> done
        1: m5 begin a to 2      -> done
        1: put {a} y            -> frozen
        2: m5 complete from 1   -> complete 1
        2: m5 complete from 1   -> complete 1
        2: m5 copy from 1       -> complete 1
        1: m5 release a         -> done
        1: m5 release a         -> done
        1: m5 freeze a          -> not open
        2: m5 activate a        -> done
        2: m5 activate a        -> done
        2: m5 prepare a from 1  -> overtaken by m5
        1: m5 begin a to 2      -> overtaken by m5
        2: m5 cancel a          -> owned
        2: m5 clear a limit 9   -> owned
        2: get {a}              -> x@1
        1: m5 clear a limit 9   -> cleared
        1: m5 clear a limit 9   -> cleared
        1: m5 release a         -> done");
}

#[test]
fn a_release_comes_only_out_of_the_freeze_and_an_abort_only_before_it() {
    run("
        1: m5 release a         -> not open
        1: m5 begin a to 2      -> done
        1: m5 release a         -> not frozen
        1: m5 freeze a b        -> unfit: the move is open here with other slots
        1: m5 freeze a          -> done
        1: m5 release a b       -> unfit: the move is open here with other slots
        1: m5 abort a b         -> unfit: the move is open here with other slots
        1: m5 release a         -> done
        1: m5 abort a           -> released
        1: put {a} x            -> wrong owner, g2 by m5
        1: m6 begin b to 2      -> done
        1: put {b} x            -> @1+
        1: m6 freeze b          -> done
        1: put {b} y            -> frozen
        1: m6 abort b           -> done
        1: m6 abort b           -> done
        1: put {b} y            -> @2
        1: m6 release b         -> not open
        1: m6 freeze b          -> not open
        1: m6 begin b to 2      -> overtaken by m6");
}

#[test]
fn the_other_side_of_a_move_refuses_its_steps() {
    run("
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done
        2: m5 freeze a          -> unfit: this shard is the destination of the move
        2: m5 release a         -> unfit: this shard is the destination of the move
        2: m5 abort a           -> unfit: this shard is the destination of the move
        1: m5 activate a        -> unfit: this shard is the source of the move
        1: m5 cancel a          -> unfit: this shard is the source of the move
        1: m5 freeze a          -> done
        1: m5 complete from 1   -> unfit: this shard is the source of the move
        1: m5 copy from 1       -> unfit: this shard is the source of the move
        1: m5 clear limit 9     -> m5 is open
        2: m5 clear a limit 9   -> m5 is open");
}

#[test]
fn a_move_that_was_aborted_before_it_began_never_begins() {
    run("
        1: m5 abort a           -> done
        1: m5 begin a to 2      -> overtaken by m5
        1: put {a} x            -> @1+
        1: m4 abort a           -> done
        1: m5 begin a to 2      -> overtaken by m5
        1: m7 begin a b to 2    -> done
        1: m6 abort a           -> done
        1: m8 abort a           -> m7 is open
        1: put {a} y            -> @2
        1: m7 freeze a b        -> done
        1: m6 abort a b         -> done
        1: put {a} z            -> frozen");
}

#[test]
fn an_abort_where_the_slot_was_given_up_before_is_no_release() {
    let mut world = run(MOVED);
    world.run(
        "
        1: m7 abort a b         -> done
        1: m7 abort a b         -> done
        1: m7 release a b       -> not open
        1: m7 begin a b to 3    -> overtaken by m7
        1: m5 abort a b         -> done
        2: put {a} x            -> @1+",
    );
    let seen =
        source_state(&world.shard(1).map, MoveId(7), &tags(&["a", "b"]), b"").expect("readable");
    assert_eq!(seen, SourceState::Aborted);
}

#[test]
fn an_abort_leaves_a_slot_to_its_first_owner() {
    run("
        1: m5 abort d           -> not owned
        1: m5 begin d to 2      -> not owned
        1: claim d              -> claimed
        1: m5 begin d to 2      -> done");
}

#[test]
fn what_a_move_ever_touched_cannot_be_claimed() {
    let mut world = run("
        2: m5 prepare a from 1  -> 0
        2: claim a              -> moved by m5
        1: m5 begin a to 2      -> done
        1: claim a              -> claimed
        2: m5 copy from 1       -> 1
        1: m5 freeze a          -> done
        1: claim a              -> claimed
        1: put {a} x            -> frozen
        2: m5 complete from 1   -> complete 1
        1: m5 release a         -> done
        1: claim a              -> moved by m5
        2: claim a d            -> moved by m5
        2: m5 activate a        -> done
        1: claim a              -> moved by m5
        1: m5 clear a limit 9   -> cleared
        1: claim a              -> moved by m5
        2: put {a} x            -> @1+");
    world.run(
        "
        2: m6 begin b to 1      -> not owned
        3: m7 prepare b from 1  -> 0
        1: m7 begin b to 3      -> done
        1: m7 abort b           -> done
        3: m7 cancel b          -> done
        3: claim b              -> moved by m7",
    );
}

#[test]
fn a_slot_goes_there_and_back_and_its_generation_outlives_the_clearing() {
    let mut world = run("1: put {a} x; put {b} x -> @1+; @1+");
    world.run(MOVED);
    world.run(
        "
        1: m5 clear a b limit 9 -> cleared
        2: put {a} y            -> @2
        1: m4 prepare a b from 2 -> overtaken by m5
        1: m5 prepare a b from 2 -> overtaken by m5
        1: m4 begin a b to 2    -> overtaken by m5
        1: m4 abort a b         -> done
        1: m4 clear a b limit 9 -> overtaken by m5
        2: m4 clear a b limit 9 -> overtaken by m5
        2: m4 begin a b to 1    -> overtaken by m5
        1: m6 prepare a b from 2 -> 0
        1: m5 clear a b limit 9 -> overtaken by m6
        2: m6 begin a b to 1    -> done
        1: m6 copy from 2       -> 1
        1: m5 release a b       -> overtaken by m6
        1: m5 activate a b      -> overtaken by m6
        2: m5 activate a b      -> overtaken by m6
        2: m5 cancel a b        -> done
        2: m6 freeze a b        -> done
        1: m6 complete from 2   -> complete 1
        2: m6 release a b       -> done
        1: m6 activate a b      -> done
        1: get {a}; get {b}     -> y@2; x@1
        1: put {a} z            -> @3
        2: get {a}              -> wrong owner, g1 by m6
        1: m5 abort a b         -> done
        1: m5 release a b       -> overtaken by m6
        1: get {a}              -> z@3",
    );
    let states = [1, 2].map(|number| world.shard(number).state(slot_of(b"a")));
    assert_eq!(states.map(|state| state.generation), [MoveId(6); 2]);
    assert_eq!(
        states.map(|state| state.moved_to),
        [None, Some((MoveId(6), GroupId(1)))]
    );
}

#[test]
fn a_destination_takes_only_empty_slots() {
    let mut world = run("
        1: put {a}1 x           -> @1+
        1: key=k put {a}2 x     -> @2+
        2: m5 prepare a b from 1 -> 0
        1: m5 begin a b to 2    -> done
        2: m5 copy from 1       -> 1
        1: m5 abort a b         -> done
        1: del {a}1             -> -@3
        2: m6 prepare a from 1  -> leftovers
        2: m6 clear a limit 1   -> more
        2: m6 prepare a from 1  -> leftovers
        2: m5 activate a b      -> not open
        2: m5 copy from 1       -> nothing to read
        2: m6 clear a limit 9   -> cleared
        2: m5 prepare b from 1  -> overtaken by m5
        2: m6 prepare a from 1  -> 0
        1: m6 begin a to 2      -> done
        2: m6 copy from 1       -> 1
        1: m6 freeze a          -> done
        2: m6 complete from 1   -> complete 1
        1: m6 release a         -> done
        2: m6 activate a        -> done
        2: get {a}1; get {a}2   -> none; x@2
        2: key=k put {a}2 x     -> @2+
        2: put {a}1 y           -> @4+");
    assert_eq!(
        world.shard(2).state(slot_of(b"b")).ownership,
        Ownership::NotOwned,
        "the older install was given up whole"
    );
}

#[test]
fn an_install_is_given_up_after_an_abort() {
    let mut world = run("
        1: put {a} x            -> @1+
        2: m5 cancel a          -> done
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done
        2: m5 copy from 1       -> 1
        1: m5 freeze a          -> done
        2: m5 complete from 1   -> complete 1
        1: m5 abort a           -> done
        2: m5 cancel a          -> done
        2: m5 cancel a          -> done
        2: m5 activate a        -> not open
        2: m5 prepare a from 1  -> overtaken by m5
        1: put {a} y            -> @2");
    assert_eq!(
        leftovers(&world.shard(2).map).expect("readable"),
        Some((MoveId(5), tags(&["a"])))
    );
    world.run("2: m5 clear a limit 9   -> cleared");
    assert_eq!(leftovers(&world.shard(2).map).expect("readable"), None);
}

#[test]
fn what_is_served_was_counted_alike_on_both_sides() {
    let mut world = run("
        1: put {a}1 x           -> @1+
        1: put {a}2 x           -> @2+
        1: del {a}2             -> -@3
        2: m5 prepare a b from 1 -> 0
        1: m5 begin a b to 2    -> done
        2: m5 activate a b      -> incomplete
        2: m5 copy from 1       -> 1
        2: m5 activate a b      -> incomplete
        1: m5 freeze a b        -> done
        2: m5 activate a b      -> incomplete");
    let contents = final_contents(&world.shard(1).map, MoveId(5))
        .expect("readable")
        .expect("frozen");
    let slots = tags(&["a", "b"]);
    let complete = |world: &mut World, chunk: u64, contents: &BTreeMap<Slot, SlotContents>| {
        let step = MoveCommand::Complete {
            chunk,
            contents: contents.clone(),
        };
        show(world.shard(2).apply(step.into_command(MoveId(5), &slots)))
    };
    let a = slot_of(b"a");
    for (keys, bytes) in [(1, 1), (-1, 0)] {
        let mut wrong = contents.clone();
        let of = wrong.get_mut(&a).expect("a slot of the move");
        of.keys = of.keys.saturating_add_signed(keys);
        of.bytes += bytes;
        assert!(complete(&mut world, 1, &wrong).starts_with("differs"));
    }
    let mut wrong = contents.clone();
    wrong.get_mut(&a).expect("a slot of the move").bytes -= 1;
    assert_eq!(
        complete(&mut world, 1, &wrong),
        "differs 1 1",
        "the same number of keys"
    );
    wrong.remove(&a);
    assert_eq!(
        complete(&mut world, 1, &wrong),
        "unfit: the move is open here with other slots"
    );
    assert_eq!(
        complete(&mut world, 0, &contents),
        "1",
        "another chunk came in between"
    );
    assert_eq!(complete(&mut world, 2, &contents), "1");
    world.run("2: m5 activate a b      -> incomplete");
    assert_eq!(complete(&mut world, 1, &contents), "complete 1");
    world.run(
        "
        1: m5 release a b       -> done
        2: m5 activate a b      -> done
        2: put {a}1 y           -> @4
        2: put {b} x            -> @1+",
    );
}

#[test]
fn clearing_is_bounded_and_counts() {
    let mut world = run("1: put {a}1 x; put {a}2 x; put {a}3 x; put {b} x -> @1+; @2+; @3+; @1+");
    for number in 0..3 {
        world.run(&format!(
            "1: t=1 key=k{number} put {{b}} x -> @{}",
            number + 2
        ));
    }
    world.run(MOVED);
    world.run(
        "
        1: m5 clear limit 9     -> cleared
        2: m5 clear limit 9     -> cleared
        1: m5 clear a b limit 0 -> more",
    );
    let held = |world: &mut World| {
        let states = ["a", "b"].map(|tag| world.shard(1).state(slot_of(tag.as_bytes())));
        let keys: u64 = states.iter().map(|state| state.contents.keys).sum();
        keys as usize + world.shard(1).requests(slot_of(b"b")).len()
    };
    for left in [5, 3, 1] {
        world.run("1: m5 clear a b limit 2 -> more");
        assert_eq!(held(&mut world), left);
    }
    world.run(
        "
        1: m5 clear a b limit 2 -> cleared
        1: m5 clear a c limit 2 -> owned
        2: get {b}; get {a}3    -> x@4; x@3
        2: t=2 key=k1 put {b} x -> @3",
    );
    assert_eq!(held(&mut world), 0);
    assert_eq!(world.shard(1).state(slot_of(b"b")).requests.bytes, 0);
}

#[test]
fn a_slot_that_arrives_is_neither_read_nor_written_nor_counted() {
    let mut world = run("
        1: put {a} x            -> @1+
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done
        2: m5 copy from 1       -> 1
        2: put {a} y            -> wrong owner
        2: get {a}              -> wrong owner");
    let of = slot_of(b"a");
    let none = ReadOutcome::NotOwned {
        slot: of,
        moved_to: None,
    };
    assert_eq!(read(&world.shard(2).map, b"{a}").expect("readable"), none);
    let counts = count(&world.shard(2).map).expect("readable");
    assert_eq!((counts.keys, counts.slots.len()), (0, 0));
    world.run(
        "1: m5 freeze a          -> done
               2: m5 complete from 1   -> complete 1",
    );
    assert_eq!(
        read(&world.shard(2).map, b"{a}").expect("readable"),
        none,
        "the source still serves it"
    );
    assert!(
        matches!(
            read(&world.shard(1).map, b"{a}"),
            Ok(ReadOutcome::Owned(Some(_)))
        ),
        "reads go on in the freeze"
    );
    world.run("1: m5 release a         -> done");
    let moved_to = Some((MoveId(5), GroupId(2)));
    assert_eq!(
        read(&world.shard(1).map, b"{a}").expect("readable"),
        ReadOutcome::NotOwned { slot: of, moved_to }
    );
    assert_eq!(count(&world.shard(1).map).expect("readable").keys, 0);
    world.run("2: m5 activate a        -> done");
    assert_eq!(count(&world.shard(2).map).expect("readable").keys, 1);
}

/// Values are read to be counted: few large ones make an entry as long as many small ones.
#[test]
fn an_entry_deletes_no_more_than_about_a_mebibyte() {
    let mut world = run("1: put {b} x -> @1+");
    let large = "x".repeat(400 << 10);
    for n in 1..=7 {
        world.shard(1).step(&format!("put {{a}}{n} {large}"));
    }
    world.run(
        "
        2: m5 prepare a from 1  -> 0
        1: m5 begin a to 2      -> done",
    );
    for chunk in 1..=7 {
        assert_eq!(
            world.step("2: m5 copy from 1 bytes 4000"),
            chunk.to_string()
        );
    }
    world.run(
        "
        1: m5 freeze a          -> done
        2: m5 copy from 1       -> 8
        2: m5 complete from 1   -> complete 8
        1: m5 release a         -> done
        2: m5 activate a        -> done
        1: m5 clear a limit 1000 -> more
        1: m5 clear a limit 1000 -> more
        1: m5 clear a limit 1000 -> cleared
        1: get {b}              -> x@1",
    );
}
