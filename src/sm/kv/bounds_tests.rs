//! What one request may read of a map and hold at once: bytes are counted as they are handed out,
//! and given back.
//!
//! Every value of these maps has a mebibyte, and there are far more of them than any budget has
//! room for. All share one piece of memory, so that a test which fails only counts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::tests::Shard;
use super::*;
use crate::sm::moves::{MoveCommand, MoveOutcome, move_chunk};
use crate::sm::ports::StoreError;
use crate::sm::ports::{Direction, Items, KeyRange, Pairs, Read, ValueStart, WriteBatch};
use crate::sm::slots::{data_key, slot_of};
use crate::types::{GroupId, MoveId, Revision, Slot};
use bytes::Bytes;
use std::collections::BTreeSet;

const MIB: usize = 1 << 20;
/// For keys, starts of values and states of slots.
const SMALL: usize = 4 * MIB;

/// A map that counts what it hands out of its large values.
struct Counting {
    map: BTreeMap<Bytes, Bytes>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    read: AtomicUsize,
    held: AtomicUsize,
    held_max: AtomicUsize,
}

/// Bytes that were handed out, until they are dropped.
struct HandedOut {
    bytes: Bytes,
    counts: Arc<Counts>,
}

impl AsRef<[u8]> for HandedOut {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for HandedOut {
    fn drop(&mut self) {
        self.counts
            .held
            .fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

impl Counting {
    fn new(shard: Shard) -> Self {
        Self {
            map: shard.map,
            counts: Arc::default(),
        }
    }

    fn hand_out(&self, bytes: Bytes) -> Bytes {
        self.counts.read.fetch_add(bytes.len(), Ordering::Relaxed);
        let held = self.counts.held.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
        self.counts.held_max.fetch_max(held, Ordering::Relaxed);
        Bytes::from_owner(HandedOut {
            bytes,
            counts: self.counts.clone(),
        })
    }

    fn hand_out_start(&self, start: ValueStart) -> ValueStart {
        ValueStart {
            start: self.hand_out(start.start),
            len: start.len,
        }
    }

    /// Applies `command`, and returns what it answers.
    fn apply(&mut self, command: KvCommand, audience: Audience) -> KvOutcome {
        let (outcome, batch) = apply_for(self, 7, command, audience).expect("applied");
        self.take(batch);
        outcome
    }

    fn take(&mut self, batch: WriteBatch) {
        for (key, change) in batch {
            match change {
                Some(value) => drop(self.map.insert(key, value)),
                None => drop(self.map.remove(&key)),
            }
        }
    }

    /// Returns the bytes handed out since the last call, and the most that were held at once.
    fn counted(&self) -> (usize, usize) {
        (
            self.counts.read.swap(0, Ordering::Relaxed),
            self.counts.held_max.swap(0, Ordering::Relaxed),
        )
    }

    #[track_caller]
    fn assert_within(&self, bytes: usize) {
        let (read, held) = self.counted();
        assert!(
            read <= bytes,
            "{read} bytes were read, at most {bytes} may be"
        );
        assert!(
            held <= bytes,
            "{held} bytes were held at once, at most {bytes} may be"
        );
    }
}

impl Read for Counting {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.map.get(key).cloned().map(|value| self.hand_out(value)))
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        Ok(self
            .map
            .start_of(key, bytes_max)?
            .map(|start| self.hand_out_start(start)))
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        let pairs = self.map.scan(range, direction);
        Box::new(pairs.map(|pair| pair.map(|(key, value)| (key, self.hand_out(value)))))
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        let starts = self.map.scan_starts(range, direction, bytes_max);
        Box::new(starts.map(|start| start.map(|(key, start)| (key, self.hand_out_start(start)))))
    }
}

/// A shard with so many keys, in all slots or in that of a hash tag, each of a mebibyte.
fn large_values(tag: &str, count: usize) -> Counting {
    let mut shard = Shard::owning_all();
    let record = Record {
        revision: Revision(1),
        media: Media::Text,
        value: vec![b'v'; MIB].into(),
    };
    let value = encode_record(&record);
    for n in 0..count {
        let key = key(tag, n);
        let slot = slot_of(&key);
        shard.set_state(slot, |state| {
            state.contents.revision = Revision(1);
            state.contents.keys += 1;
            state.contents.bytes += (key.len() + value.len()) as u64;
        });
        shard.map.insert(data_key(slot, &key), value.clone());
    }
    Counting::new(shard)
}

fn key(tag: &str, n: usize) -> Bytes {
    Bytes::from(format!("{tag}{n}"))
}

fn operations(keys: impl Iterator<Item = Bytes>, action: &Action) -> Vec<Operation> {
    keys.map(|key| Operation {
        key,
        condition: Condition::Present,
        action: action.clone(),
    })
    .collect()
}

fn write(operations: Vec<Operation>, idempotency_key: Option<&'static [u8]>) -> Write {
    Write {
        operations,
        idempotency_key: idempotency_key.map(Bytes::from_static),
    }
}

fn put() -> Action {
    Action::Put {
        media: Media::Text,
        value: Bytes::from_static(b"small"),
    }
}

fn entry(writes: Vec<Write>) -> KvCommand {
    KvCommand::Write { time_ms: 1, writes }
}

fn bounded(writes: Vec<Write>) -> KvCommand {
    KvCommand::BoundedWrite { time_ms: 1, writes }
}

#[test]
fn what_is_overwritten_or_deleted_is_not_read() {
    for (action, idempotency_key) in [
        (put(), None),
        (Action::Delete, None),
        (put(), Some(&b"k"[..])),
        (Action::Delete, Some(b"k")),
    ] {
        let mut map = large_values("", 8000);
        let write = write(
            operations((0..8000).map(|n| key("", n)), &action),
            idempotency_key,
        );
        let KvOutcome::Written(outcomes) = map.apply(entry(vec![write]), Audience::Caller) else {
            panic!("no answer")
        };
        assert!(
            matches!(&outcomes[..], [WriteOutcome::Applied(outcomes)] if outcomes.len() == 8000),
            "{idempotency_key:?}"
        );
        map.assert_within(SMALL);
    }
}

#[test]
fn gets_in_an_entry_read_no_more_than_its_answers_may_have() {
    let gets = || operations(std::iter::repeat_n(key("", 0), 8000), &Action::Get);
    let some = |count| {
        [
            operations((0..count).map(|n| key("", n)), &Action::Get),
            operations([key("", 0)].into_iter(), &put()),
        ]
    };
    let mut map = large_values("", 100);
    for idempotency_key in [None, Some(&b"k"[..])] {
        for audience in [Audience::Caller, Audience::Nobody] {
            let before = map.map.clone();
            let KvOutcome::Written(outcomes) =
                map.apply(entry(vec![write(gets(), idempotency_key)]), audience)
            else {
                panic!("no answer")
            };
            let refused = WriteOutcome::Rejected(WriteRejection::RequestsFull {
                slot: slot_of(b"0"),
            });
            let expected = if idempotency_key.is_some() {
                refused
            } else {
                WriteOutcome::Unanswered
            };
            assert_eq!(outcomes, [expected]);
            map.assert_within(SMALL);
            map.map = before;
        }
    }
    let mixed = some(15).concat();
    let KvOutcome::Written(outcomes) =
        map.apply(entry(vec![write(mixed.clone(), None); 3]), Audience::Caller)
    else {
        panic!("no answer")
    };
    assert!(matches!(
        &outcomes[..],
        [
            WriteOutcome::Applied(_),
            WriteOutcome::Unanswered,
            WriteOutcome::Unanswered
        ]
    ));
    map.assert_within(ANSWER_BYTES_MAX + SMALL);

    let mut map = large_values("", 100);
    let too_many = some(17).concat();
    let writes = vec![
        write(too_many, None),
        write(mixed.clone(), None),
        write(mixed, None),
        write(some(1).concat(), None),
    ];
    let KvOutcome::Written(outcomes) = map.apply(bounded(writes.clone()), Audience::Caller) else {
        panic!("no answer")
    };
    let rejected = |outcome: &WriteOutcome| {
        matches!(
            outcome,
            WriteOutcome::Rejected(WriteRejection::AnswerTooLarge { .. })
        )
    };
    assert!(
        rejected(&outcomes[0])
            && !rejected(&outcomes[1])
            && rejected(&outcomes[2])
            && !rejected(&outcomes[3]),
        "{outcomes:?}"
    );
    map.assert_within(ANSWER_BYTES_MAX + SMALL);
    drop(outcomes);

    // Whoever waits: the map is the same, and nothing is read for nobody.
    let [for_caller, for_nobody] = [Audience::Caller, Audience::Nobody].map(|audience| {
        let mut map = large_values("", 100);
        map.apply(bounded(writes.clone()), audience);
        map
    });
    assert_eq!(for_caller.map, for_nobody.map);
    for_nobody.assert_within(SMALL);
}

#[test]
fn answers_that_are_remembered_are_not_all_read_at_once() {
    let mut map = large_values("", 0);
    // A record of the largest size in each of a hundred slots, as one key can leave it over time.
    let keys: BTreeMap<Slot, Bytes> = (0..100)
        .map(|n| key("", n))
        .map(|key| (slot_of(&key), key))
        .collect();
    let value = vec![b'v'; MIB - 1024].into();
    let record = encode_record(&Record {
        revision: Revision(1),
        media: Media::Text,
        value,
    });
    for (slot, key) in &keys {
        map.map.insert(data_key(*slot, key), record.clone());
        let get = operations([key.clone()].into_iter(), &Action::Get);
        map.apply(entry(vec![write(get, Some(b"again"))]), Audience::Nobody);
    }
    map.counted();
    let all = || operations(keys.values().cloned(), &Action::Get);
    for audience in [Audience::Caller, Audience::Nobody] {
        let KvOutcome::Written(outcomes) =
            map.apply(bounded(vec![write(all(), Some(b"again"))]), audience)
        else {
            panic!("no answer")
        };
        assert_eq!(outcomes, [WriteOutcome::Unanswered]);
        map.assert_within(SMALL);
    }
    let charged = AtomicUsize::new(0);
    let charge = |bytes| {
        charged.store(bytes, Ordering::Relaxed);
        false
    };
    assert_eq!(
        answer_gets(&map, &write(all(), Some(b"again")), charge).expect("readable"),
        None
    );
    assert!(charged.into_inner() > 90 * (MIB - 1024));
    map.assert_within(SMALL);
}

#[test]
fn gets_alone_are_charged_before_they_are_read() {
    let map = large_values("", 100);
    let gets = |count: usize| {
        write(
            operations((0..count).map(|n| key("", n)), &Action::Get),
            None,
        )
    };
    assert_eq!(
        answer_gets(&map, &gets(100), |bytes| bytes <= ANSWER_BYTES_MAX).expect("readable"),
        None
    );
    map.assert_within(SMALL);
    assert!(weigh_gets(&map, &gets(100)).expect("readable").bytes > 100 * MIB);
    map.assert_within(SMALL);

    let answer = answer_gets(&map, &gets(15), |bytes| bytes <= ANSWER_BYTES_MAX).expect("readable");
    assert!(matches!(answer, Some(WriteOutcome::Applied(outcomes)) if outcomes.len() == 15));
    map.assert_within(ANSWER_BYTES_MAX + SMALL);
}

#[test]
fn what_a_request_is_remembered_with_is_weighed_by_slot() {
    let map = large_values("", 3);
    let put = Action::Put {
        media: Media::Octets,
        value: Bytes::from(vec![0; MIB / 2]),
    };
    let of = |n, action: &Action| operations([key("", n)].into_iter(), action);
    let get = |n| of(n, &Action::Get);
    let weigh = |operations: Vec<Operation>, key: Option<&'static [u8]>| {
        weigh_gets(&map, &write(operations, key)).expect("readable")
    };

    let all = [get(0), get(1), get(2)].concat();
    let kept = weigh(all.clone(), Some(b"k"));
    assert!(
        kept.bytes >= 3 * MIB && (MIB..2 * MIB).contains(&kept.remembered_bytes_max),
        "{kept:?}"
    );
    assert_eq!(
        weigh(all, None).remembered_bytes_max,
        0,
        "nothing is remembered of it"
    );

    let found = weigh([of(7, &put), get(7), get(7)].concat(), Some(b"k"));
    assert!((MIB..MIB + SMALL).contains(&found.bytes), "{found:?}");
    let gone = weigh([of(0, &Action::Delete), get(0)].concat(), Some(b"k"));
    assert_eq!(gone.bytes, 0, "{gone:?}");
    map.assert_within(SMALL);
}

#[test]
fn a_page_reads_what_it_shows() {
    for (tag, count) in [("", 5000), ("{one}", 5000)] {
        let map = large_values(tag, count);
        for direction in [Direction::Forward, Direction::Reverse] {
            let page = |limit, bytes_max, keys_only| {
                let request = PageRequest {
                    range: KeyRange::all(),
                    direction,
                    limit,
                    bytes_max,
                    keys_only,
                };
                let page = scan_page(&map, &request).expect("readable");
                assert!(page.more);
                page.items.len()
            };
            assert_eq!(page(1, usize::MAX, true), 1);
            assert_eq!(page(1000, usize::MAX, true), 1000);
            map.assert_within(SMALL);
            assert_eq!(page(1, usize::MAX, false), 1);
            map.assert_within(2 * MIB + SMALL);
            assert_eq!(
                page(1000, 8 * MIB, false),
                7,
                "the eighth would go past the limit"
            );
            map.assert_within(9 * MIB + SMALL);
            assert_eq!(page(1000, 10, false), 1, "the first is always there");
            map.assert_within(2 * MIB + SMALL);
        }
        assert_eq!(super::count(&map).expect("readable").keys, count as u64);
        map.assert_within(SMALL);
    }
}

#[test]
fn a_chunk_of_a_move_and_a_deletion_hold_one_value_beyond_their_size() {
    let mut map = large_values("{one}", 200);
    let slots = BTreeSet::from([slot_of(b"one")]);
    let step = |step: MoveCommand| step.into_command(MoveId(3), &slots);
    let done = KvOutcome::Moved(MoveOutcome::Done);
    assert_eq!(
        map.apply(
            step(MoveCommand::Begin { to: GroupId(2) }),
            Audience::Nobody
        ),
        done
    );
    let rewrite = entry(vec![write(
        operations((0..200).map(|n| key("{one}", n)), &Action::Delete),
        None,
    )]);
    let before = map.map.clone();
    map.counted();

    let pairs = move_chunk(&map, MoveId(3), &[], MIB / 8)
        .expect("readable")
        .expect("it is open");
    assert_eq!(pairs.pairs.len(), 1);
    map.assert_within(2 * MIB + SMALL);
    map.apply(rewrite, Audience::Nobody);
    map.map = before;

    for then in [MoveCommand::Freeze, MoveCommand::Release] {
        assert_eq!(map.apply(step(then), Audience::Nobody), done);
    }
    map.counted();
    let cleared = map.apply(step(MoveCommand::Clear { limit: 1000 }), Audience::Nobody);
    assert_eq!(
        cleared,
        KvOutcome::Moved(MoveOutcome::Cleared { more: true })
    );
    assert!(crate::sm::moves::observed::holds_anything(&map, slot_of(b"one")).expect("readable"));
    map.assert_within(SMALL);
}
