//! Scans and counts: merged over shards, page by page, while slots move.

use super::*;

async fn scan_all(
    router: &Router<Fake>,
    range: ScanRange,
    reverse: bool,
    limit: usize,
) -> Vec<Bytes> {
    let (mut keys, mut range) = (Vec::new(), range);
    loop {
        let request = ScanRequest {
            range: range.clone(),
            reverse,
            limit,
            keys_only: false,
        };
        let page = router.scan(request, options()).await.expect("a page");
        assert!(
            page.items.len() == limit || !page.more,
            "a page is full unless it is the last"
        );
        keys.extend(page.items.into_iter().map(|item| item.key));
        let Some(last) = keys.last().filter(|_| page.more) else {
            return keys;
        };
        match reverse {
            true => range.end = Some(last.clone()),
            false => range.start = [last, &[0u8][..]].concat().into(),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn scans_merge_the_shards_in_order_page_by_page() {
    let router = filled(5, 200).await;
    let all: Vec<Bytes> = (0..200).map(key).collect();
    let reversed: Vec<Bytes> = all.iter().rev().cloned().collect();
    let everything = ScanRange {
        start: Bytes::new(),
        end: None,
    };
    for limit in [1, 3, 40, 199, 200, 1000] {
        assert_eq!(
            scan_all(&router, everything.clone(), false, limit).await,
            all,
            "pages of {limit}"
        );
        assert_eq!(
            scan_all(&router, everything.clone(), true, limit).await,
            reversed,
            "pages of {limit} in reverse"
        );
    }
    let part = ScanRange {
        start: key(17),
        end: Some(key(120)),
    };
    assert_eq!(
        scan_all(&router, part.clone(), false, 10).await,
        all[17..120]
    );
    assert_eq!(scan_all(&router, part, true, 10).await, reversed[80..183]);
    let before = calls(&router);
    let nothing = ScanRange {
        start: key(9),
        end: Some(key(3)),
    };
    assert!(scan_all(&router, nothing, false, 10).await.is_empty());
    assert_eq!(calls(&router), before);
}

#[tokio::test(start_paused = true)]
async fn a_scan_loses_and_doubles_nothing_when_a_slot_moves_under_it() {
    let all: Vec<Bytes> = (0..100).map(key).collect();
    let everything = ScanRange {
        start: Bytes::new(),
        end: None,
    };
    for (after, n, limit) in (0..6).flat_map(|after| {
        [
            (after, 3, 1000),
            (after, 60, 1000),
            (after, 60, 7),
            (after, 99, 30),
        ]
    }) {
        let router = filled(3, 100).await;
        let slot = slot_of(&key(n));
        // Every way: to a shard asked before, to one asked later, and to one that the map does not
        // name yet.
        for to in 1..=4 {
            router.access().state().calls.clear();
            router.access().state().move_after = Some((after, slot, GroupId(to)));
            let found = scan_all(&router, everything.clone(), false, limit).await;
            assert_eq!(
                found, all,
                "slot of key {n} moved to {to} after {after} calls, pages of {limit}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn scans_and_counts_outlast_an_election_and_say_when_there_is_no_quorum() {
    let router = filled(3, 50).await;
    script(&router, 2, &[failed(unavailable()), failed(unknown())]);
    assert_eq!(
        scan_all(
            &router,
            ScanRange {
                start: Bytes::new(),
                end: None
            },
            false,
            100
        )
        .await
        .len(),
        50
    );
    assert_eq!(calls(&router), 5, "only the missing shard was asked again");
    script(&router, 2, &[failed(unavailable())]);
    let counts = router.count(options()).await.expect("counted");
    assert_eq!(counts.iter().map(|(_, keys)| keys).sum::<u64>(), 50);
    assert_eq!(
        counts.iter().map(|(shard, _)| shard.0).collect::<Vec<_>>(),
        [1, 2, 3, 4]
    );
    script(&router, 2, &vec![failed(unavailable()); 10_000]);
    assert_eq!(router.count(options()).await, Err(unavailable()));
    script(&router, 2, &vec![failed(unavailable()); 10_000]);
    let request = ScanRequest {
        range: ScanRange {
            start: Bytes::new(),
            end: None,
        },
        reverse: false,
        limit: 10,
        keys_only: true,
    };
    assert_eq!(router.scan(request, options()).await, Err(unavailable()));
}

#[tokio::test(start_paused = true)]
async fn one_shard_is_counted_while_another_has_no_quorum() {
    let router = filled(2, 50).await;
    script(&router, 1, &[failed(unavailable()), failed(elsewhere())]);
    script(&router, 2, &vec![failed(unavailable()); 1000]);
    let own = (0..50)
        .filter(|n| slot_of(&key(*n)).number().is_multiple_of(2))
        .count();
    assert_eq!(
        router.count_shard(GroupId(1), options()).await,
        Ok(own as u64)
    );
    assert_eq!(
        router.count_shard(GroupId(2), options()).await,
        Err(unavailable())
    );
    assert_eq!(
        router.count_shard(GroupId(3), options()).await,
        Ok(0),
        "it owns nothing"
    );
    assert!(matches!(
        router.count_shard(GroupId(9), options()).await,
        Err(Failure::Invalid { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn every_key_is_counted_once_when_a_slot_moves_meanwhile() {
    for after in 0..4 {
        for to in 1..=4 {
            let router = filled(3, 50).await;
            router.access().state().move_after = Some((after, slot_of(&key(1)), GroupId(to)));
            let counts = router.count(options()).await.expect("counted");
            assert_eq!(
                counts.iter().map(|(_, keys)| keys).sum::<u64>(),
                50,
                "moved to {to} after {after} calls: {counts:?}"
            );
        }
    }
}
