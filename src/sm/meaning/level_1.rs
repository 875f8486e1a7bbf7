//! What came with level 1.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{MapKind, Script, bytes};
use crate::sm::cluster::meta::{self, MetaCommand};
use crate::sm::cluster::view::{NodeSpec, PlacementSpec, View};
use crate::sm::kv::{self, Action, Condition, Media, Operation, Write};
use crate::sm::placement::{first_view, plan};
use crate::sm::slots::slot_of;
use crate::types::{ClusterId, DirectoryId, MapVersion};

pub fn shard() -> Script {
    let mut script = Script::new(MapKind::Shard);
    bounded_as_plain(&mut script);
    answers_past_the_bound(&mut script);
    script.run("b", &kv::KvCommand::Compare.encode());
    script
}

/// The writes of level 0, bounded: within the bound they mean the same.
fn bounded_as_plain(script: &mut Script) {
    for line in include_str!("goldens/kv-level-0.txt").lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let name = match words.first() {
            Some(&"w") => "w",
            Some(&"r") => "r",
            _ => continue,
        };
        match words[1..] {
            ["pair", key, value] => script.pair(name, bytes(key), bytes(value)),
            [verb, _, entry, ..] => {
                let entry = match kv::KvCommand::decode(&bytes(entry)).expect("an entry") {
                    kv::KvCommand::Write { time_ms, writes } => {
                        kv::KvCommand::BoundedWrite { time_ms, writes }
                    }
                    other => other,
                };
                match verb {
                    "do" => drop(script.run(name, &entry.encode())),
                    _ => script.attempt(name, &entry.encode()),
                }
            }
            _ => {}
        }
    }
}

fn answers_past_the_bound(script: &mut Script) {
    script.run(
        "b",
        &kv::KvCommand::Claim {
            slots: vec![slot_of(b"b")],
        }
        .encode(),
    );
    let large = |n: u8| Bytes::from(vec![n; 3_000_000]);
    let of = |action: Action| Operation {
        key: "{b}large".into(),
        condition: Condition::None,
        action,
    };
    let write = |operations: Vec<Operation>| Write {
        operations,
        idempotency_key: None,
    };
    let entry = |writes: Vec<Write>| kv::KvCommand::BoundedWrite { time_ms: 7, writes }.encode();
    script.run(
        "b",
        &entry(vec![write(vec![of(Action::Put {
            media: Media::Octets,
            value: large(1),
        })])]),
    );
    let gets = |count: usize, then: Action| {
        let gets = std::iter::repeat_n(of(Action::Get), count);
        write(gets.chain([of(then)]).collect())
    };

    // Five times three megabytes fit into 16 MiB, six times do not.
    for count in [1, 5, 6] {
        script.attempt("b", &entry(vec![gets(count, Action::Delete)]));
    }
    // What the first took is not left for the second, and one that is rejected takes nothing.
    let put = || Action::Put {
        media: Media::Text,
        value: "small".into(),
    };
    script.attempt(
        "b",
        &entry(vec![gets(3, Action::Get), gets(3, put()), gets(1, put())]),
    );
    script.attempt(
        "b",
        &entry(vec![
            gets(6, put()),
            gets(4, put()),
            gets(5, Action::Delete),
        ]),
    );
}

fn node(number: u32) -> NodeSpec {
    let address = format!("n{number}:1").parse().expect("an address");
    NodeSpec {
        address,
        public_address: None,
        directory: DirectoryId(u128::from(number)),
    }
}

pub fn meta() -> Script {
    let mut script = Script::new(MapKind::Meta);
    let raise = |level, over| {
        MetaCommand::RaiseLevel {
            level,
            over: MapVersion(over),
        }
        .encode()
    };
    script.attempt("m", &raise(1, 0));
    let first = first_view(
        ClusterId(9),
        PlacementSpec::default(),
        vec![node(1), node(2)],
    )
    .expect("a view");
    script.attempt(
        "m",
        &MetaCommand::Found {
            view: Box::new(View {
                level: 1,
                ..first.clone()
            }),
        }
        .encode(),
    );
    script.run(
        "m",
        &MetaCommand::Found {
            view: Box::new(first),
        }
        .encode(),
    );
    for (level, over) in [(0, 1), (1, 0), (1, 2), (1, 1)] {
        script.attempt("m", &raise(level, over));
    }
    script.run("m", &raise(1, 1));
    for (level, over) in [(0, 2), (1, 2), (1, 1)] {
        script.attempt("m", &raise(level, over));
    }
    let view = meta::read_view(script.map("m"))
        .expect("readable")
        .expect("founded");
    let wanted = [1, 2, 3].map(node);
    let next = plan(&view, view.placement, &wanted, &BTreeSet::new())
        .expect("a plan")
        .view;
    let install = |next: &View| {
        MetaCommand::InstallPlan {
            base: MapVersion(2),
            next: Box::new(next.clone()),
        }
        .encode()
    };

    // A plan must not lower the level.
    script.attempt(
        "m",
        &install(&View {
            level: 0,
            ..next.clone()
        }),
    );
    script.run("m", &install(&next));
    script
}
