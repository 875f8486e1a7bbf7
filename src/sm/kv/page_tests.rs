//! Pages that are read step by step while the map changes.

use bytes::Bytes;

use super::tests::Shard;
use super::*;
use crate::sm::ports::{Direction, KeyRange};

fn request(direction: Direction, limit: usize) -> PageRequest {
    PageRequest {
        range: KeyRange::all(),
        direction,
        limit,
        bytes_max: 10_000,
        keys_only: false,
    }
}

fn shard() -> Shard {
    let mut shard = Shard::owning_all();
    for n in 0..20 {
        shard.step(&format!("put k{n:02} v{n:02}"));
    }
    shard
}

fn shown(page: &ScanPage) -> Vec<String> {
    let text = |bytes: &Bytes| bytes.escape_ascii().to_string();
    page.items
        .iter()
        .map(|(key, record)| format!("{}={}", text(key), text(&record.value)))
        .collect()
}

/// Reads a page with a pause after each key, and changes the shard in each.
fn paused(
    shard: &mut Shard,
    request: &PageRequest,
    mut between: impl FnMut(&mut Shard, u32),
) -> (ScanPage, bool) {
    let mut scan = PageScan::new(request);
    while !scan.step(&shard.map, |_| true, || true).expect("readable") {
        between(shard, scan.steps());
    }
    let owns = scan.still_owns(&shard.map).expect("readable");
    (scan.into_page(), owns)
}

#[test]
fn a_page_in_steps_is_that_of_one_moment_where_nothing_changes() {
    let mut shard = shard();
    for direction in [Direction::Forward, Direction::Reverse] {
        for limit in [1, 7, 20, 50] {
            let request = request(direction, limit);
            let whole = scan_page(&shard.map, &request).expect("readable");
            assert_eq!(paused(&mut shard, &request, |_, _| {}), (whole, true));
        }
    }
}

#[test]
fn what_is_there_all_the_time_is_in_the_page_and_what_changes_is_as_it_was_at_some_moment() {
    for direction in [Direction::Forward, Direction::Reverse] {
        let mut shard = shard();
        // Keys 0 to 9 stay; of the others, each is overwritten and then deleted.
        let change = |shard: &mut Shard, step: u32| {
            let line = match step {
                1..=10 => format!("put k{} {}", 9 + step, "w".repeat(700)),
                11..=20 => format!("del k{}", step - 1),
                _ => return,
            };
            shard.step(&line);
        };
        let (page, owns) = paused(&mut shard, &request(direction, 50), change);
        let shown = shown(&page);
        let stay: Vec<String> = (0..10).map(|n| format!("k{n:02}=v{n:02}")).collect();
        assert!(stay.iter().all(|item| shown.contains(item)), "{shown:?}");
        let keys: Vec<&Bytes> = page.items.iter().map(|(key, _)| key).collect();
        let is_sorted = match direction {
            Direction::Forward => keys.is_sorted(),
            Direction::Reverse => keys.iter().rev().is_sorted(),
        };
        assert!(is_sorted && owns && !page.more, "{keys:?}");
    }
}

#[test]
fn a_slot_that_changes_hands_meanwhile_is_noticed() {
    let mut shard = shard();
    let lose = |shard: &mut Shard, step: u32| {
        if step == 3 {
            shard.run("lose k05");
        }
    };
    let (_, owns) = paused(&mut shard, &request(Direction::Forward, 50), lose);
    assert!(!owns);
}
