//! The router over a fake cluster of shards in memory, whose replies can be scripted. Time is
//! paused.

mod fake;
mod leaders;
mod scans;

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;

use self::fake::*;
use super::pause::PAUSE_MAX;
use super::write::{SHARD_BYTES_MAX, SHARD_OPERATIONS_MAX};
use super::*;
use crate::api::protocol::{ShardPage, ShardStatus};
use crate::api::store::{Consistency, Item, Routing, ScanRange, WriteFailure};
use crate::api::view_change::{ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::sm::cluster::view::SlotTable;
use crate::sm::kv::{
    Action, Condition, Media, OperationOutcome, Record, Write, WriteOutcome, WriteRejection,
};
use crate::sm::slots::slot_of;
use crate::types::{MoveId, PlanEpoch, Revision, Slot};

#[tokio::test(start_paused = true)]
async fn a_write_is_split_by_shard_and_answered_in_order() {
    let router = filled(3, 30).await;
    let mut operations: Vec<_> = (0..60).map(|n| put(key(n), "w")).collect();
    operations.push(Operation {
        key: key(7),
        condition: Condition::None,
        action: Action::Get,
    });
    let answers = router.write(operations, None, options()).await;
    for (n, answer) in answers.iter().take(60).enumerate() {
        assert!(
            matches!(answer, Ok(OperationOutcome::Put { created, .. }) if *created == (n >= 30)),
            "{n}: {answer:?}"
        );
    }
    assert!(matches!(
        &answers[60],
        Ok(OperationOutcome::Got(Some(record))) if record.revision == Revision(2)
    ));
    assert_eq!(calls(&router), 3, "one write per shard");
    let found = router.get(key(59), options()).await.expect("served");
    assert_eq!(found.record.expect("stored").value, "w");
    assert!(router.write(Vec::new(), None, options()).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_failed_condition_rejects_its_shard_alone_and_names_the_callers_position() {
    let router = filled(2, 1).await;
    let own = u64::from(slot_of(&key(0)).number()) % 2 + 1;
    let other = key_of(3 - own, 2);
    let guarded = Operation {
        condition: Condition::Absent,
        ..put(key(0), "w")
    };
    let answers = router
        .write(
            vec![put(other.clone(), "w"), put(other, "x"), guarded],
            None,
            options(),
        )
        .await;
    assert!(answers[0].is_ok() && answers[1].is_ok(), "{answers:?}");
    let rejection = WriteRejection::ConditionFailed {
        operation: 2,
        current: Some(Revision(1)),
    };
    assert_eq!(answers[2], Err(WriteFailure::Rejected(rejection)));
}

#[tokio::test(start_paused = true)]
async fn limits_are_per_shard_and_nothing_is_sent_past_them() {
    let router = router(2);
    let (a, b) = (key_of(1, 2), key_of(2, 2));
    let mut many = vec![put(a.clone(), "v"); SHARD_OPERATIONS_MAX];
    many.extend(vec![put(b.clone(), "v"); SHARD_OPERATIONS_MAX]);
    assert!(
        router
            .write(many.clone(), None, options())
            .await
            .iter()
            .all(Result::is_ok)
    );
    many.push(put(a.clone(), "v"));
    let before = calls(&router);
    let answers = router.write(many, None, options()).await;
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Err(WriteFailure::Failed(Failure::TooLarge { .. }))))
    );
    let large = |bytes| Operation {
        action: Action::Put {
            media: Media::Octets,
            value: vec![0; bytes].into(),
        },
        ..put(a.clone(), "")
    };
    let answers = router
        .write(vec![put(b, "v"), large(SHARD_BYTES_MAX)], None, options())
        .await;
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Err(WriteFailure::Failed(Failure::TooLarge { .. })))),
        "{answers:?}"
    );
    for bad in [Bytes::new(), vec![b'k'; KEY_BYTES_MAX + 1].into()] {
        assert!(matches!(
            router.get(bad.clone(), options()).await,
            Err(Failure::Invalid { .. })
        ));
        let answers = router
            .write(vec![put(key(0), "v"), put(bad, "v")], None, options())
            .await;
        assert!(
            answers
                .iter()
                .all(|answer| matches!(answer, Err(WriteFailure::Failed(Failure::Invalid { .. }))))
        );
    }
    assert_eq!(calls(&router), before, "nothing was sent");
}

#[tokio::test(start_paused = true)]
async fn what_is_certainly_not_done_is_tried_again_and_no_more() {
    let frozen = Script::Reply(ShardReply::Written(WriteOutcome::Rejected(
        WriteRejection::Frozen {
            slot: slot_of(&key(0)),
        },
    )));
    let keyed = Some(Bytes::from_static(b"request-1"));
    let full = Failure::Overloaded {
        limit: "queue".into(),
        retry_after_ms: 5,
    };
    // The first acts of the shard, the idempotency key, the expected number of calls, and true if
    // the write succeeds.
    let table = [
        (
            "an election",
            vec![failed(unavailable()), failed(unavailable())],
            None,
            3,
            true,
        ),
        (
            "a leader elsewhere",
            vec![failed(elsewhere())],
            None,
            2,
            true,
        ),
        ("a frozen slot", vec![frozen.clone(), frozen], None, 3, true),
        ("a lost reply", vec![Script::ServeAndLose], None, 1, false),
        (
            "a lost reply to a write with an idempotency key",
            vec![Script::ServeAndLose, failed(unavailable())],
            keyed,
            3,
            true,
        ),
        ("overload", vec![failed(full)], None, 1, false),
        (
            "a reply that does not fit",
            vec![Script::Reply(ShardReply::Counted {
                keys: 1,
                slots: vec![],
            })],
            None,
            1,
            false,
        ),
    ];
    for (what, steps, idempotency_key, expected_calls, applied) in table {
        let router = router(1);
        script(&router, 1, &steps);
        let answers = router
            .write(vec![put(key(0), "v")], idempotency_key, options())
            .await;
        assert_eq!(
            (calls(&router), answers[0].is_ok()),
            (expected_calls, applied),
            "{what}: {answers:?}"
        );
        let stored = router.access().state().shards[&GroupId(1)]
            .get(&key(0))
            .map(|record| record.revision);
        assert!(
            stored.is_none_or(|revision| revision == Revision(1)),
            "{what}: done twice"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn requests_that_wait_for_another_attempt_are_bounded() {
    let router = router(1);
    let frozen = Script::Reply(ShardReply::Written(WriteOutcome::Rejected(
        WriteRejection::Frozen {
            slot: slot_of(&key(0)),
        },
    )));
    for (waiting, is_served) in [(WAITING_MAX, false), (WAITING_MAX - 1, true)] {
        script(&router, 1, std::slice::from_ref(&frozen));
        router.waiting.store(waiting, Ordering::Relaxed);
        let answers = router.write(vec![put(key(0), "v")], None, options()).await;
        assert_eq!(answers[0].is_ok(), is_served, "{waiting}: {answers:?}");
        let refused = matches!(
            &answers[0],
            Err(WriteFailure::Failed(Failure::Overloaded { .. }))
        );
        assert_eq!(refused, !is_served, "{waiting}: {answers:?}");
        assert_eq!(
            router.waiting.load(Ordering::Relaxed),
            waiting,
            "nobody waits any more"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_that_may_have_happened_is_never_called_undone() {
    let router = router(1);
    let mut steps = vec![Script::ServeAndLose];
    steps.extend(vec![failed(unavailable()); 10_000]);
    script(&router, 1, &steps);
    let answers = router
        .write(
            vec![put(key(0), "v")],
            Some(Bytes::from_static(b"k")),
            options(),
        )
        .await;
    assert!(
        matches!(
            &answers[0],
            Err(WriteFailure::Failed(Failure::Unknown { .. }))
        ),
        "{answers:?}"
    );
    script(&router, 1, &steps[1..]);
    let answers = router
        .write(
            vec![put(key(0), "v")],
            Some(Bytes::from_static(b"k2")),
            options(),
        )
        .await;
    assert_eq!(answers[0], Err(WriteFailure::Failed(unavailable())));
}

#[tokio::test(start_paused = true)]
async fn reads_are_tried_again_within_the_deadline() {
    let router = filled(1, 1).await;
    script(
        &router,
        1,
        &[
            failed(unknown()),
            failed(unavailable()),
            failed(elsewhere()),
        ],
    );
    assert!(
        router
            .get(key(0), options())
            .await
            .expect("served in the end")
            .record
            .is_some()
    );
    assert_eq!(calls(&router), 4);
    let start = Instant::now();
    script(&router, 1, &vec![failed(unavailable()); 10_000]);
    assert_eq!(router.get(key(0), options()).await, Err(unavailable()));
    assert!(start.elapsed() <= Duration::from_secs(5) && start.elapsed() > Duration::from_secs(4));
    let timeouts: Vec<_> = router
        .access()
        .state()
        .calls
        .iter()
        .map(|(_, options)| options.timeout)
        .collect();
    assert!(
        timeouts[4..].is_sorted_by(|a, b| a >= b),
        "each attempt gets the time that is left"
    );
}

#[tokio::test(start_paused = true)]
async fn a_redirect_is_passed_up_for_single_keys_only() {
    let router = router(2);
    let (a, b) = (key_of(1, 2), key_of(2, 2));
    script(
        &router,
        1,
        &[
            failed(elsewhere()),
            failed(elsewhere()),
            failed(elsewhere()),
        ],
    );
    assert_eq!(router.get(a.clone(), redirect()).await, Err(elsewhere()));
    let single = router
        .write(vec![put(a.clone(), "v")], None, redirect())
        .await;
    assert_eq!(single, [Err(WriteFailure::Failed(elsewhere()))]);
    let batch = router
        .write(vec![put(a, "v"), put(b, "v")], None, redirect())
        .await;
    assert!(batch.iter().all(Result::is_ok), "{batch:?}");
    let routings: Vec<_> = router
        .access()
        .state()
        .calls
        .iter()
        .map(|(_, options)| options.routing)
        .collect();
    assert_eq!(routings[..2], [Routing::Redirect; 2]);
    assert!(
        routings[2..]
            .iter()
            .all(|routing| *routing == Routing::Proxy)
    );
}

#[tokio::test(start_paused = true)]
async fn a_moved_slot_is_found_by_a_newer_map() {
    let router = filled(2, 40).await;
    let slot = slot_of(&key(5));
    router.access().state().move_slot(slot, GroupId(3));
    assert!(
        router
            .get(key(5), options())
            .await
            .expect("served")
            .record
            .is_some()
    );
    assert_eq!(
        calls(&router),
        2,
        "there is nothing to wait for once the map is newer"
    );
}

#[tokio::test(start_paused = true)]
async fn a_write_follows_a_slot_that_moved_and_splits_anew() {
    let router = filled(1, 40).await;
    let slot = slot_of(&key(5));
    router.access().state().move_slot(slot, GroupId(2));
    let answers = router
        .write((0..40).map(|n| put(key(n), "w")).collect(), None, options())
        .await;
    assert!(
        answers.iter().all(|answer| matches!(
            answer,
            Ok(OperationOutcome::Put {
                revision: Revision(2),
                ..
            })
        )),
        "{answers:?}"
    );
    assert_eq!(
        calls(&router),
        3,
        "rejected by the first shard, then one part each"
    );
}

#[tokio::test(start_paused = true)]
async fn a_hint_is_followed_while_no_map_knows_the_move() {
    let router = filled(1, 40).await;
    let slot = slot_of(&key(5));
    router.access().state().move_slot(slot, GroupId(2));
    router.access().state().next_map = None;
    let answers = router.write(vec![put(key(5), "w")], None, options()).await;
    assert!(answers[0].is_ok(), "{answers:?}");
    let answers = router
        .write((0..40).map(|n| put(key(n), "w")).collect(), None, options())
        .await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
}

#[tokio::test(start_paused = true)]
async fn a_mixed_outcome_is_answered_by_operation() {
    let router = router(1);
    let outcome = OperationOutcome::Put {
        revision: Revision(9),
        created: true,
    };
    let frozen = WriteRejection::Frozen {
        slot: slot_of(&key(1)),
    };
    let condition = WriteRejection::ConditionFailed {
        operation: 2,
        current: None,
    };
    let mixed = WriteOutcome::Mixed(vec![
        Ok(outcome.clone()),
        Err(frozen),
        Err(condition.clone()),
    ]);
    script(&router, 1, &[Script::Reply(ShardReply::Written(mixed))]);
    let operations = (0..3).map(|n| put(key(n), "v")).collect();
    let answers = router
        .write(operations, Some(Bytes::from_static(b"k")), options())
        .await;
    assert_eq!(answers[0], Ok(outcome));
    assert_eq!(
        answers[1],
        Ok(OperationOutcome::Put {
            revision: Revision(1),
            created: true
        }),
        "tried again alone"
    );
    assert_eq!(answers[2], Err(WriteFailure::Rejected(condition)));
}

#[tokio::test(start_paused = true)]
async fn a_slow_look_for_a_newer_map_does_not_hold_up_a_failover() {
    let router = filled(1, 1).await;
    router.access().state().refresh_takes = Duration::from_secs(3600);
    script(&router, 1, &vec![failed(unavailable()); 7]);
    let start = Instant::now();
    assert!(router.get(key(0), options()).await.is_ok());
    assert!(
        start.elapsed() < Duration::from_millis(400),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn without_a_map_requests_wait_for_one() {
    let router = filled(1, 1).await;
    let map = router.access().state().map.take();
    assert!(matches!(
        router.get(key(0), options()).await,
        Err(Failure::Unavailable { .. })
    ));
    router.access().state().next_map = map;
    assert!(
        router
            .get(key(0), options())
            .await
            .expect("served")
            .record
            .is_some()
    );
}

#[tokio::test(start_paused = true)]
async fn many_keys_are_read_by_one_call_per_shard_and_answered_in_order() {
    let router = filled(3, 30).await;
    let keys: Vec<Bytes> = (0..40).rev().map(key).chain([key(7)]).collect();
    let request = GetManyRequest {
        keys: keys.clone(),
        bytes_max: 1 << 20,
        keys_only: false,
    };
    let records = router.get_many(request, options()).await.expect("served");
    let there: Vec<bool> = records.iter().map(Option::is_some).collect();
    let expected: Vec<bool> = (0..40).rev().map(|n| n < 30).chain([true]).collect();
    assert_eq!((there, calls(&router)), (expected, 3));
    let none = GetManyRequest {
        keys: Vec::new(),
        bytes_max: 1,
        keys_only: false,
    };
    assert_eq!(router.get_many(none, options()).await, Ok(vec![]));
    let bad = GetManyRequest {
        keys: vec![key(1), Bytes::new()],
        bytes_max: 1,
        keys_only: false,
    };
    assert!(matches!(
        router.get_many(bad, options()).await,
        Err(Failure::Invalid { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_many_keys_is_bounded_and_goes_on_where_it_ended() {
    let router = router(2);
    let value: &'static str = "v".repeat(20 << 10).leak();
    router
        .write(
            (0..20).map(|n| put(key(n), value)).collect(),
            None,
            options(),
        )
        .await;
    let mut keys: Vec<Bytes> = (0..20).map(key).collect();
    while !keys.is_empty() {
        let request = GetManyRequest {
            keys: keys.clone(),
            bytes_max: 100 << 10,
            keys_only: false,
        };
        let records = router.get_many(request, options()).await.expect("served");
        assert!((1..=6).contains(&records.len()), "{}", records.len());
        assert!(records.iter().all(Option::is_some));
        keys.drain(..records.len());
    }
}

#[tokio::test(start_paused = true)]
async fn many_keys_are_found_after_a_move_and_not_without_their_shard() {
    let router = filled(2, 30).await;
    router
        .access()
        .state()
        .move_slot(slot_of(&key(3)), GroupId(3));
    let keys: Vec<Bytes> = (0..30).map(key).collect();
    let mut found = 0;
    while found < keys.len() {
        let request = GetManyRequest {
            keys: keys[found..].to_vec(),
            bytes_max: 1 << 20,
            keys_only: false,
        };
        let records = router.get_many(request, options()).await.expect("served");
        assert!(
            !records.is_empty() && records.iter().all(Option::is_some),
            "{records:?}"
        );
        found += records.len();
    }
    script(&router, 1, &vec![failed(unavailable()); 1000]);
    let request = GetManyRequest {
        keys,
        bytes_max: 1 << 20,
        keys_only: false,
    };
    let before = Instant::now();
    assert_eq!(
        router.get_many(request, options()).await,
        Err(unavailable())
    );
    assert!(before.elapsed() <= options().timeout);
}
