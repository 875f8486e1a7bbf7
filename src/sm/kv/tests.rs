//! Scripts that read like the protocol: a line is an entry and what it answers.
//!
//! `t=MS key=K op; op | op -> outcomes`: writes are parted by `|`, operations by `;`. Operations
//! are `get K`, `put K V`, `del K`, the last two with a condition: `absent`, `present`, `at:1,2`,
//! `not-at:1,2`. Outcomes: `@3+` put at revision 3 and created, `@3` put, `-@3` deleted, `-`
//! nothing to delete, `V@3` got, `none` got nothing. `claim TAG..`, `freeze TAG`, `thaw TAG` and
//! `lose TAG` change the slot of a hash tag, `all` claims every slot. The counters of all slots are
//! checked after each line.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::*;
use crate::sm::ports::{Direction, KeyRange, Read};
use crate::sm::requests::{REMEMBERED_MS, REQUESTS_BYTES_MAX, RequestRecord, group_time_ms};
use crate::sm::slots::{
    Ownership, SlotContents, SlotState, all_data, data_key, expiry_range, parse_data_key,
    parse_expiry_key, parse_request_key, request_range, slot_of, state_key,
};
use crate::types::{GroupId, MoveId, Revision, Slot};

/// A shard's map, by itself.
#[derive(Debug, Clone, Default)]
pub(in crate::sm) struct Shard {
    pub map: BTreeMap<Bytes, Bytes>,
    /// Of the last entry.
    pub index: u64,
}

/// Asserts that a write which was refused before it became an entry would have been answered so by
/// one, and no other was refused.
fn assert_refused_alike(write: &Write, refused: Option<WriteRejection>, outcome: &WriteOutcome) {
    let by_place = match outcome {
        WriteOutcome::Rejected(
            rejection @ (WriteRejection::WrongOwner { .. } | WriteRejection::Frozen { .. }),
        ) => Some(rejection),
        _ => None,
    };
    // What is remembered of a request may just have been forgotten when it is applied.
    if refused.is_some() || write.idempotency_key.is_none() {
        assert_eq!(refused.as_ref(), by_place, "{write:?}");
    }
}

impl Shard {
    /// A shard that owns every slot.
    pub fn owning_all() -> Self {
        let mut shard = Self::default();
        assert_eq!(
            shard.apply(KvCommand::Claim {
                slots: Slot::all().collect()
            }),
            KvOutcome::Claimed
        );
        shard
    }

    /// Applies what the encoding of `command` says, and returns the outcome by way of its encoding.
    pub fn apply(&mut self, command: KvCommand) -> KvOutcome {
        let decoded = KvCommand::decode(&command.encode()).expect("own encoding");
        assert_eq!(decoded, command);
        self.index += 1;
        let refused = match &command {
            KvCommand::Write { writes, .. } if writes.len() == 1 => Some((
                &writes[0],
                refused_by_place(&self.map, &writes[0]).expect("readable"),
            )),
            _ => None,
        };
        let (outcome, batch) = apply(&self.map, self.index, decoded).expect("applied");
        if let (Some((write, refused)), KvOutcome::Written(outcomes)) = (refused, &outcome) {
            assert_refused_alike(write, refused, &outcomes[0]);
        }
        for (key, value) in batch {
            match value {
                Some(value) => self.map.insert(key, value),
                None => self.map.remove(&key),
            };
        }
        KvOutcome::decode(&outcome.encode()).expect("own encoding")
    }

    pub fn state(&self, slot: Slot) -> SlotState {
        SlotState::read(&self.map, slot).expect("readable")
    }

    pub fn set_state(&mut self, slot: Slot, change: impl FnOnce(&mut SlotState)) {
        let mut state = self.state(slot);
        change(&mut state);
        self.map
            .insert(Bytes::copy_from_slice(&state_key(slot)), state.encode());
    }

    /// The records of requests in `slot`.
    pub fn requests(&self, slot: Slot) -> Vec<(Bytes, Bytes)> {
        let pairs = self.map.scan(&request_range(slot), Direction::Forward);
        pairs.map(|pair| pair.expect("readable")).collect()
    }

    /// The index by age of `slot`.
    fn indexed(&self, slot: Slot) -> BTreeSet<(u64, Bytes)> {
        let pairs = self.map.scan(&expiry_range(slot), Direction::Forward);
        let entries =
            pairs.map(|pair| parse_expiry_key(&pair.expect("readable").0).expect("an index key"));
        entries.map(|(_, time_ms, key)| (time_ms, key)).collect()
    }

    /// Asserts that the counters of every slot are what is there.
    pub fn assert_counted(&self) {
        let mut contents: BTreeMap<Slot, SlotContents> = BTreeMap::new();
        for pair in self.map.scan(&all_data(), Direction::Forward) {
            let (key, value) = pair.expect("readable");
            let (slot, user_key) = parse_data_key(&key).expect("a data key");
            assert_eq!(slot, slot_of(&user_key));
            let counted = contents.entry(slot).or_default();
            counted.keys += 1;
            counted.bytes += (user_key.len() + value.len()) as u64;
        }
        for (slot, state) in SlotState::read_all(&self.map).expect("readable") {
            let counted = contents.remove(&slot).unwrap_or_default();
            assert_eq!(
                (state.contents.keys, state.contents.bytes),
                (counted.keys, counted.bytes),
                "slot {slot}"
            );
            let requests = self.requests(slot);
            let cost = requests
                .iter()
                .map(|(key, value)| 2 * key.len() + 8 + value.len())
                .sum::<usize>();
            assert_eq!(state.requests.bytes, cost as u64, "requests of slot {slot}");
            let times = requests.iter().map(|(key, value)| {
                let (_, key) = parse_request_key(key).expect("a request key");
                (
                    RequestRecord::decode(value).expect("own encoding").time_ms,
                    key,
                )
            });
            let times: BTreeSet<(u64, Bytes)> = times.collect();
            assert!(
                times
                    .first()
                    .is_none_or(|(oldest_ms, _)| *oldest_ms >= state.requests.since_ms)
            );
            assert_eq!(
                self.indexed(slot),
                times,
                "an index entry for each record, and no other"
            );
        }
        assert!(
            contents.is_empty(),
            "keys in slots without a state: {contents:?}"
        );
        assert!(
            self.map
                .keys()
                .all(|key| key[0] != crate::sm::slots::TAG_RESERVED)
        );
    }

    /// Runs the lines of a script against it.
    pub fn run(&mut self, script: &str) {
        for line in script
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            let (step, expected) = line
                .split_once("->")
                .map_or((line, ""), |(step, expected)| (step, expected.trim()));
            assert_eq!(self.step(step.trim()), expected, "{line}");
            self.assert_counted();
        }
    }

    pub fn step(&mut self, step: &str) -> String {
        let (verb, rest) = step.split_once(' ').unwrap_or((step, ""));
        let tags = || rest.split_whitespace().map(|tag| slot_of(tag.as_bytes()));
        let mut set = |change: fn(&mut SlotState)| {
            tags().for_each(|slot| self.set_state(slot, change));
            String::new()
        };
        match verb {
            "all" => show(&self.apply(KvCommand::Claim {
                slots: Slot::all().collect(),
            })),
            "claim" => show(&self.apply(KvCommand::Claim {
                slots: tags().collect(),
            })),
            "freeze" => set(|state| state.ownership = Ownership::Frozen),
            "thaw" => set(|state| state.ownership = Ownership::Owned),
            "lose" => set(|state| {
                state.ownership = Ownership::NotOwned;
                state.generation = MoveId(4);
                state.moved_to = Some((MoveId(4), GroupId(2)));
            }),
            _ => show(&self.apply(parse_entry(step))),
        }
    }
}

fn parse_entry(mut line: &str) -> KvCommand {
    let mut time_ms = 0;
    if let Some((time, rest)) = line
        .strip_prefix("t=")
        .and_then(|rest| rest.split_once(' '))
    {
        time_ms = time.parse().expect("a time");
        line = rest;
    }
    KvCommand::Write {
        time_ms,
        writes: line
            .split('|')
            .map(|write| parse_write(write.trim()))
            .collect(),
    }
}

fn parse_write(mut text: &str) -> Write {
    let mut idempotency_key = None;
    if let Some((key, rest)) = text
        .strip_prefix("key=")
        .and_then(|rest| rest.split_once(' '))
    {
        idempotency_key = Some(Bytes::copy_from_slice(key.as_bytes()));
        text = rest;
    }
    Write {
        operations: text.split(';').map(parse_operation).collect(),
        idempotency_key,
    }
}

fn parse_operation(text: &str) -> Operation {
    let words: Vec<&str> = text.split_whitespace().collect();
    let bytes = |word: &str| Bytes::copy_from_slice(word.as_bytes());
    let (action, condition) = match words[..] {
        ["get", _, ref rest @ ..] => (Action::Get, rest),
        ["put", _, value, ref rest @ ..] => (
            Action::Put {
                media: Media::Text,
                value: bytes(value),
            },
            rest,
        ),
        ["del", _, ref rest @ ..] => (Action::Delete, rest),
        _ => panic!("no operation: {text}"),
    };
    let revisions = |list: &str| {
        list.split(',')
            .map(|number| Revision(number.parse().expect("a revision")))
            .collect()
    };
    let condition = match condition
        .first()
        .map(|word| word.split_once(':').unwrap_or((word, "")))
    {
        None => Condition::None,
        Some(("absent", _)) => Condition::Absent,
        Some(("present", _)) => Condition::Present,
        Some(("at", list)) => Condition::RevisionIn(revisions(list)),
        Some(("not-at", list)) => Condition::RevisionNotIn(revisions(list)),
        Some(other) => panic!("no condition: {other:?}"),
    };
    Operation {
        key: bytes(words[1]),
        condition,
        action,
    }
}

fn show(outcome: &KvOutcome) -> String {
    match outcome {
        KvOutcome::Written(writes) => writes
            .iter()
            .map(show_write)
            .collect::<Vec<_>>()
            .join(" | "),
        KvOutcome::Claimed => "claimed".into(),
        KvOutcome::Compared => "compared".into(),
        KvOutcome::ClaimRejected { generation, .. } => format!("moved by {generation}"),
        KvOutcome::Moved(outcome) => crate::sm::moves::tests::show_moved(outcome),
        KvOutcome::ReadOnlySet => "read-only set".to_owned(),
    }
}

fn show_write(outcome: &WriteOutcome) -> String {
    let joined = |parts: Vec<String>| parts.join("; ");
    match outcome {
        WriteOutcome::Applied(outcomes) => joined(outcomes.iter().map(show_operation).collect()),
        WriteOutcome::Rejected(rejection) => show_rejection(rejection),
        WriteOutcome::Unanswered => "unanswered".into(),
        WriteOutcome::Mixed(results) => {
            let show =
                |result: &Result<_, _>| result.as_ref().map_or_else(show_rejection, show_operation);
            format!("mixed: {}", joined(results.iter().map(show).collect()))
        }
    }
}

fn show_operation(outcome: &OperationOutcome) -> String {
    match outcome {
        OperationOutcome::Got(None) => "none".into(),
        OperationOutcome::Got(Some(record)) => {
            format!("{}@{}", record.value.escape_ascii(), record.revision)
        }
        OperationOutcome::Put { revision, created } => {
            format!("@{revision}{}", if *created { "+" } else { "" })
        }
        OperationOutcome::Deleted {
            revision: Some(revision),
        } => format!("-@{revision}"),
        OperationOutcome::Deleted { revision: None } => "-".into(),
    }
}

fn show_rejection(rejection: &WriteRejection) -> String {
    match rejection {
        WriteRejection::WrongOwner { moved_to: None, .. } => "wrong owner".into(),
        WriteRejection::WrongOwner {
            moved_to: Some((by, to)),
            ..
        } => format!("wrong owner, {to} by {by}"),
        WriteRejection::Frozen { .. } => "frozen".into(),
        WriteRejection::ConditionFailed {
            operation,
            current: None,
        } => format!("failed {operation} none"),
        WriteRejection::ConditionFailed {
            operation,
            current: Some(current),
        } => format!("failed {operation} @{current}"),
        WriteRejection::KeyReused { .. } => "key reused".into(),
        WriteRejection::RequestsFull { .. } => "full".into(),
        WriteRejection::AnswerTooLarge { bytes } => format!("{bytes} bytes"),
    }
}

fn run(script: &str) -> Shard {
    let mut shard = Shard::default();
    shard.run(script);
    shard
}

#[test]
fn puts_gets_and_deletes_answer_with_revisions() {
    run("all           -> claimed
         get {a}       -> none
         put {a} x     -> @1+
         put {a} y     -> @2
         get {a}       -> y@2
         put {a}2 z    -> @3+
         del {a}       -> -@4
         del {a}       -> -
         get {a}       -> none
         put {b} x     -> @1+");
}

#[test]
fn a_revision_is_never_used_twice() {
    run("all                  -> claimed
         put {a} x            -> @1+
         del {a}              -> -@2
         put {a} x            -> @3+
         del {a} at:1         -> failed 0 @3
         del {a} at:3         -> -@4
         put {a} x absent     -> @5+
         del {a}; put {a} y   -> -@6; @7+
         put {a} z; del {a}; put {a} z -> @8; -@9; @10+");
}

#[test]
fn conditions_decide_whether_a_write_happens() {
    run("all                      -> claimed
         put {a} x present        -> failed 0 none
         put {a} x at:1           -> failed 0 none
         del {a} present          -> failed 0 none
         put {a} x not-at:1       -> @1+
         put {a} y absent         -> failed 0 @1
         put {a} y not-at:1       -> failed 0 @1
         put {a} y at:2,3         -> failed 0 @1
         put {a} y at:2,1         -> @2
         put {a} z not-at:1,3     -> @3
         put {a} z present        -> @4
         del {a} at:3             -> failed 0 @4
         get {a} absent           -> failed 0 @4
         get {a} at:4             -> z@4
         del {a} at:4             -> -@5
         put {a} x absent         -> @6+");
}

#[test]
fn a_write_happens_all_or_not() {
    run("all                                     -> claimed
         put {a}1 x; put {b}1 y absent; del {a}2 -> @1+; @1+; -
         put {a}1 n; put {b}1 n absent           -> failed 1 @1
         get {a}1; get {b}1                      -> x@1; y@1");
}

#[test]
fn conditions_look_at_the_map_before_the_write_and_gets_at_the_write_so_far() {
    run("all                                     -> claimed
         put {a} x absent; get {a}; del {a}; get {a}; put {a} y absent -> @1+; x@1; -@2; none; @3+
         put {a} z at:3; put {a} w at:3          -> @4; @5
         del {a} at:5; get {a}                   -> -@6; none");
}

#[test]
fn writes_of_one_entry_see_each_other_and_fail_alone() {
    run(
        "all                                                 -> claimed
         put {a} x absent | put {a} y absent | get {a}       -> @1+ | failed 0 @1 | x@1
         del {a} | put {a} z absent | put {a} w at:3; del {b} -> -@2 | @3+ | @4; -
         key=k put {b} x | key=k put {b} x | key=k put {b} y  -> @1+ | @1+ | key reused",
    );
}

#[test]
fn only_slots_that_are_owned_are_written() {
    run("put {a} x             -> wrong owner
         claim a c             -> claimed
         put {a} x             -> @1+
         put {a} y; put {b} y  -> wrong owner
         get {a}               -> x@1
         lose a
         put {a} y             -> wrong owner, g2 by m4");
}

#[test]
fn slots_are_claimed_only_where_no_move_ever_was() {
    run("claim a b   -> claimed
         claim a b   -> claimed
         put {a} x   -> @1+
         claim a c   -> claimed
         get {a}     -> x@1
         lose b
         claim d b   -> moved by m4
         put {d} x   -> wrong owner
         freeze a
         claim a d   -> claimed
         put {a} x   -> frozen");
}

#[test]
fn a_frozen_slot_holds_writes_back() {
    let shard = run("all                   -> claimed
         put {a} x             -> @1+
         freeze a
         put {b} y; put {a} y  -> frozen
         get {b}               -> none
         put {a} y absent      -> frozen");
    assert!(
        matches!(read(&shard.map, b"{a}"), Ok(ReadOutcome::Owned(Some(_)))),
        "reads go on"
    );
}

#[test]
fn a_request_with_a_key_is_done_once() {
    run("all                   -> claimed
         t=1 key=k put {a} x    -> @1+
         t=2 put {a} y          -> @2
         t=3 key=k put {a} x    -> @1+
         t=3 key=k put {a} z    -> key reused
         t=3 key=k del {a}      -> key reused
         t=3 key=k put {b} x    -> @1+
         t=3 key=l put {a} x    -> @3
         get {a}                -> x@3
         key=d del {a}          -> -@4
         key=d del {a}          -> -@4
         key=e del {a}          -> -
         put {a} w              -> @5+
         key=e del {a}          -> -
         key=g get {a}          -> w@5
         put {a} v              -> @6
         key=g get {a}          -> w@5");
}

#[test]
fn a_failed_condition_is_remembered() {
    run("all                                         -> claimed
         put {a} x                                   -> @1+
         key=k put {b}1 y; put {b}2 n; put {a} y absent -> failed 2 @1
         del {a}                                     -> -@2
         key=k put {b}1 y; put {b}2 n; put {a} y absent -> failed 2 @1
         get {b}1; get {a}                           -> none; none
         key=k put {a} y absent                      -> failed 0 @1
         key=k put {b}1 y; put {b}2 n                -> failed 0 @1");
}

#[test]
fn ownership_comes_before_memory_and_memory_before_freeze() {
    run("all                              -> claimed
         key=k put {a} x; put {b} x       -> @1+; @1+
         freeze a
         key=k put {a} x; put {b} x       -> @1+; @1+
         key=l put {a} y                  -> frozen
         key=l put {b} y; put {a} y       -> frozen
         thaw a
         key=l put {b} y; put {a} y       -> @2; @2
         lose a
         key=k put {a} x; put {b} x       -> wrong owner, g2 by m4
         key=m put {b} z; put {a} z       -> wrong owner, g2 by m4
         thaw a
         key=m put {b} z; put {a} z       -> @3; @3");
}

#[test]
fn slots_that_answered_before_answer_again_and_the_others_are_done() {
    run("all                                           -> claimed
         key=k put {a} x                               -> @1+
         put {a} y                                     -> @2
         key=k put {b} p; put {a} x; put {b} q         -> @1+; @1+; @2
         key=k put {b} p; put {a} x; put {b} q         -> @1+; @1+; @2
         get {a}; get {b}                              -> y@2; q@2
         key=l put {a} x                               -> @3
         key=l put {b} p absent; put {a} x             -> mixed: failed 0 @2; @3
         del {b}                                       -> -@3
         key=l put {b} p absent; put {a} x             -> mixed: failed 0 @2; @3
         key=m put {a} x absent                        -> failed 0 @3
         key=m put {b} x absent; put {a} x absent      -> mixed: @4+; failed 1 @3
         key=n put {a} x absent                        -> failed 0 @3
         key=n put {b} x absent; put {a} x absent      -> mixed: failed 0 @4; failed 1 @3
         key=o put {a} x                               -> @4
         key=o put {a} x; put {b} z; put {a} x         -> key reused
         get {b}                                       -> x@4");
}

#[test]
fn a_request_is_forgotten_after_ten_minutes_of_group_time() {
    let shard = run("all                         -> claimed
         t=1000 key=k put {a} x       -> @1+
         t=600999 key=k put {a} x     -> @1+
         t=5 key=k put {a} x          -> @1+
         t=601000 key=k put {a} y     -> @2
         t=1201000 key=k put {a} x    -> @3");
    assert_eq!(group_time_ms(&shard.map).expect("readable"), 1_201_000);
}

#[test]
fn group_time_is_stored_when_it_matters() {
    let time = |script: &str| group_time_ms(&run(script).map).expect("readable");
    assert_eq!(time("all -> claimed"), 0);
    assert_eq!(time("t=999 put a x -> wrong owner"), 0, "not for a moment");
    assert_eq!(time("t=1000 put a x -> wrong owner"), 1000);
    assert_eq!(
        time(
            "all -> claimed
                     t=5 key=k put a x -> @1+"
        ),
        5
    );
    assert_eq!(
        time(
            "t=18446744073709551615 put a x -> wrong owner
                     t=1 put a x -> wrong owner"
        ),
        u64::MAX
    );
}

/// Keyed gets of a large value: each record holds the value.
fn fill_with_requests(shard: &mut Shard, time_ms: u64) -> usize {
    let value = Bytes::from(vec![b'v'; 100_000]);
    let put = Operation {
        key: Bytes::from_static(b"{a}"),
        condition: Condition::None,
        action: Action::Put {
            media: Media::Octets,
            value,
        },
    };
    shard.apply(KvCommand::Write {
        time_ms,
        writes: vec![Write {
            operations: vec![put],
            idempotency_key: None,
        }],
    });
    let attempt = |shard: &mut Shard, number: usize| {
        shard.step(&format!("t={time_ms} key=fill{number} get {{a}}"))
    };
    let filled = (0..)
        .find(|number| attempt(shard, *number) == "full")
        .expect("full at last");
    shard.assert_counted();
    filled
}

#[test]
fn a_full_slot_refuses_requests_and_forgets_none() {
    let mut shard = Shard::owning_all();
    let filled = fill_with_requests(&mut shard, 1000);
    assert_eq!(filled, 10);
    let slot = slot_of(b"{a}");
    let used = shard.state(slot).requests.bytes;
    assert!(used <= REQUESTS_BYTES_MAX && used > REQUESTS_BYTES_MAX - 110_000);
    for number in 0..filled {
        assert!(
            shard
                .step(&format!("key=fill{number} get {{a}}"))
                .starts_with("vvv"),
            "request {number} is remembered"
        );
    }
    let before = shard.clone();
    shard.run(
        "t=1000 key=more put {b} x; get {a} -> full
         t=1000 key=more get {a}; put {b} x -> full",
    );
    assert_eq!(
        shard.map, before.map,
        "a refused request changes nothing, in no slot"
    );
    shard.run("t=1000 put {a} small -> @2");
    shard.run("t=1000 key=small put {a} x -> @3");
    // When the records have expired there is room at once.
    shard.run(
        "t=601000 key=big get {a} -> x@3
         t=601000 key=fill0 get {a} -> x@3",
    );
    assert!(shard.state(slot).requests.bytes < used);
}

#[test]
fn an_answer_that_fits_in_no_memory_is_refused() {
    let mut shard = Shard::owning_all();
    let value = Bytes::from(vec![b'v'; REQUESTS_BYTES_MAX as usize]);
    let action = Action::Put {
        media: Media::Octets,
        value,
    };
    let put = Operation {
        key: Bytes::from_static(b"{a}"),
        condition: Condition::None,
        action,
    };
    shard.apply(KvCommand::Write {
        time_ms: 0,
        writes: vec![Write {
            operations: vec![put],
            idempotency_key: None,
        }],
    });
    shard.run(
        "key=k get {a}            -> full
         key=k get {a}; put {a} x -> full
         key=k put {a} x          -> @2",
    );
}

#[test]
fn the_sweep_deletes_what_expired_in_slots_that_nothing_touches() {
    let mut shard = Shard::owning_all();
    for number in 0..300 {
        shard.step(&format!("t=1000 key=k{number} put key{number} x"));
        shard.step(&format!("t=1000 key=l{number} put {{a}} x"));
    }
    let remembered = |shard: &Shard| {
        Slot::all()
            .map(|slot| shard.requests(slot).len())
            .sum::<usize>()
    };
    assert_eq!(remembered(&shard), 600);
    let start = 1000 + REMEMBERED_MS;
    shard.step(&format!("t={} put other x", start - 1));
    assert_eq!(remembered(&shard), 600, "a moment too early");
    for second in 0..20 {
        let before = remembered(&shard);
        shard.step(&format!("t={} put other x", start + second * 1000));
        shard.assert_counted();
        assert!(
            before - remembered(&shard) <= 256,
            "a bounded number per entry"
        );
    }
    assert_eq!(remembered(&shard), 0);
}

#[test]
fn a_read_says_who_owns_the_slot() {
    let mut shard = run("claim a -> claimed
                         put {a} x -> @1+");
    let record = Record {
        revision: Revision(1),
        media: Media::Text,
        value: Bytes::from_static(b"x"),
    };
    assert_eq!(
        read(&shard.map, b"{a}").expect("readable"),
        ReadOutcome::Owned(Some(record))
    );
    assert_eq!(
        read(&shard.map, b"{a}none").expect("readable"),
        ReadOutcome::Owned(None)
    );
    let slot = slot_of(b"b");
    assert_eq!(
        read(&shard.map, b"{b}").expect("readable"),
        ReadOutcome::NotOwned {
            slot,
            moved_to: None
        }
    );
    shard.run("lose a");
    let moved_to = Some((MoveId(4), GroupId(2)));
    assert_eq!(
        read(&shard.map, b"{a}").expect("readable"),
        ReadOutcome::NotOwned {
            slot: slot_of(b"a"),
            moved_to
        }
    );
}

fn page(
    shard: &Shard,
    range: KeyRange,
    direction: Direction,
    limit: usize,
    bytes_max: usize,
) -> (String, bool) {
    let request = PageRequest {
        range,
        direction,
        limit,
        bytes_max,
        keys_only: false,
    };
    let page = scan_page(&shard.map, &request).expect("readable");
    let items: Vec<String> = page
        .items
        .iter()
        .map(|(key, record)| format!("{}={}", key.escape_ascii(), record.value.escape_ascii()))
        .collect();
    (items.join(" "), page.more)
}

#[test]
fn a_page_is_in_key_order_and_leaves_out_what_is_not_owned() {
    let mut shard = Shard::owning_all();
    for key in ["d", "b", "a", "c", "e"] {
        shard.step(&format!("put {key} {key}{key}"));
    }
    let all = KeyRange::all;
    assert_eq!(
        page(&shard, all(), Direction::Forward, 9, 999),
        ("a=aa b=bb c=cc d=dd e=ee".into(), false)
    );
    assert_eq!(
        page(&shard, all(), Direction::Forward, 5, 999),
        ("a=aa b=bb c=cc d=dd e=ee".into(), false)
    );
    assert_eq!(
        page(&shard, all(), Direction::Forward, 2, 999),
        ("a=aa b=bb".into(), true)
    );
    assert_eq!(
        page(&shard, all(), Direction::Reverse, 2, 999),
        ("e=ee d=dd".into(), true)
    );
    assert_eq!(
        page(&shard, all(), Direction::Forward, 9, 14),
        ("a=aa b=bb".into(), true),
        "a record has four bytes more"
    );
    assert_eq!(
        page(&shard, all(), Direction::Forward, 9, 13),
        ("a=aa".into(), true)
    );
    assert_eq!(
        page(&shard, all(), Direction::Forward, 9, 0),
        ("a=aa".into(), true)
    );
    let range = KeyRange {
        start: "b".into(),
        end: Some("d".into()),
    };
    assert_eq!(
        page(&shard, range.clone(), Direction::Forward, 9, 999),
        ("b=bb c=cc".into(), false)
    );
    assert_eq!(
        page(&shard, range, Direction::Reverse, 1, 999),
        ("c=cc".into(), true)
    );
    let nothing = KeyRange {
        start: "d".into(),
        end: Some("b".into()),
    };
    assert_eq!(
        page(&shard, nothing, Direction::Forward, 9, 999),
        (String::new(), false)
    );
    shard.run("lose c");
    assert_eq!(
        page(&shard, all(), Direction::Forward, 9, 999),
        ("a=aa b=bb d=dd e=ee".into(), false)
    );
    let counts = count(&shard.map).expect("readable");
    assert_eq!((counts.keys, counts.slots.len()), (4, 4095));
    let request = PageRequest {
        range: all(),
        direction: Direction::Forward,
        limit: 1,
        bytes_max: 999,
        keys_only: true,
    };
    let page = scan_page(&shard.map, &request).expect("readable");
    assert_eq!(
        (&page.items[0].1.value[..], page.items[0].1.revision),
        (&b""[..], Revision(1))
    );
    assert_eq!(page.slots, counts.slots);
}

#[test]
fn damage_is_an_error_and_not_an_answer() {
    let shard = run("all -> claimed
                     put {a} x -> @1+");
    let slot = slot_of(b"a");
    let mut damaged = shard.map.clone();
    damaged.insert(data_key(slot, b"{a}"), Bytes::from_static(b"\x09"));
    assert!(apply(&damaged, 1, parse_entry("put {a} y")).is_err());
    assert!(read(&damaged, b"{a}").is_err());
    let mut damaged = shard.clone();
    damaged.set_state(slot, |state| state.contents.keys = 0);
    assert!(
        apply(&damaged.map, 1, parse_entry("del {a}")).is_err(),
        "fewer keys than there are"
    );
}

#[test]
fn the_encodings_of_commands_and_outcomes_stand() {
    let command = parse_entry(
        "t=300 key=k put a v at:1,2; del b absent; get c | put d w present; put e x not-at:3",
    );
    let golden: &[u8] = b"\x01\x00\xac\x02\x02\
        \x03\x01a\x03\x02\x01\x02\x01\x00\x01v\x01b\x01\x02\x01c\x00\x00\x01\x01k\
        \x02\x01d\x02\x01\x00\x01w\x01e\x04\x01\x03\x01\x00\x01x\x00";
    assert_eq!(&command.encode()[..], golden);
    let KvCommand::Write { time_ms, writes } = command else {
        panic!("a line is a write")
    };
    let bounded = KvCommand::BoundedWrite { time_ms, writes };
    assert_eq!(
        bounded.encode()[..],
        [b"\x03\x01\x04", &golden[2..]].concat(),
        "format, level and variant differ"
    );
    assert_eq!(
        KvCommand::decode(&bounded.encode()).expect("own encoding"),
        bounded
    );
    let slots = [1, 300]
        .map(|number| Slot::new(number).expect("a slot"))
        .to_vec();
    assert_eq!(
        &KvCommand::Claim { slots }.encode()[..],
        b"\x01\x01\x02\x01\xac\x02"
    );

    let slot = Slot::new(300).expect("a slot");
    let record = Record {
        revision: Revision(1),
        media: Media::Other("m".into()),
        value: Bytes::from_static(b"v"),
    };
    let outcomes = vec![
        OperationOutcome::Got(Some(record)),
        OperationOutcome::Put {
            revision: Revision(2),
            created: true,
        },
        OperationOutcome::Deleted { revision: None },
    ];
    let rejected = WriteOutcome::Rejected;
    let outcome = KvOutcome::Written(vec![
        WriteOutcome::Applied(outcomes.clone()),
        rejected(WriteRejection::WrongOwner {
            slot,
            moved_to: Some((MoveId(1), GroupId(2))),
        }),
        rejected(WriteRejection::Frozen { slot }),
        rejected(WriteRejection::ConditionFailed {
            operation: 1,
            current: Some(Revision(2)),
        }),
        rejected(WriteRejection::KeyReused { slot }),
        rejected(WriteRejection::RequestsFull { slot }),
        WriteOutcome::Mixed(vec![
            Ok(outcomes[2].clone()),
            Err(WriteRejection::Frozen { slot }),
        ]),
    ]);
    let golden: &[u8] = b"\x01\x00\x07\x00\x03\x00\x01\x01\x03\x01m\x01v\x01\x02\x01\x02\x00\
        \x01\x00\xac\x02\x01\x01\x02\x01\x01\xac\x02\x01\x02\x01\x01\x02\x01\x03\xac\x02\x01\x04\
        \xac\x02\x02\x02\x00\x02\x00\x01\x01\xac\x02";
    assert_eq!(&outcome.encode()[..], golden);
    assert_eq!(KvOutcome::decode(golden).expect("own encoding"), outcome);
    assert_eq!(&KvOutcome::Claimed.encode()[..], b"\x01\x01");
    let rejected = KvOutcome::ClaimRejected {
        slot,
        generation: MoveId(1),
    };
    assert_eq!(&rejected.encode()[..], b"\x01\x02\xac\x02\x01");
}

#[test]
fn request_keys_parse_back() {
    let shard = run("all -> claimed
                     key=k put {a} x -> @1+");
    let slot = slot_of(b"a");
    let (key, _) = shard.requests(slot).remove(0);
    assert_eq!(
        parse_request_key(&key),
        Some((slot, Bytes::from_static(b"k")))
    );
}
