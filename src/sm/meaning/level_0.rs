//! What the first programs could write: every command and step, met by every state that it may
//! find.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::{Map, MapKind, Script};
use crate::sm::cluster::meta;
use crate::sm::cluster::view::{NodeSpec, PlacementSpec, ReportedMembership, View};
use crate::sm::kv::{Action, Condition, KvCommand, Media, Operation, Write};
use crate::sm::moves::{
    Install, InstallProgress, MoveCommand, MovePhase, OpenMove, final_contents, move_chunk,
};
use crate::sm::placement::{first_view, plan};
use crate::sm::requests::{REMEMBERED_MS, REQUESTS_BYTES_MAX};
use crate::sm::slots::{SlotState, slot_of, state_key};
use crate::types::{
    ClusterId, DirectoryId, GroupId, LogId, MapVersion, MoveId, NodeId, PlanEpoch, ReplicaId,
    Revision, Slot,
};

const SOURCE: GroupId = GroupId(1);
const DESTINATION: GroupId = GroupId(2);

fn slots(tags: &[&str]) -> BTreeSet<Slot> {
    tags.iter().map(|tag| slot_of(tag.as_bytes())).collect()
}

fn operation(key: &str, condition: Condition, action: Action) -> Operation {
    Operation {
        key: Bytes::copy_from_slice(key.as_bytes()),
        condition,
        action,
    }
}

fn value(value: impl Into<Bytes>) -> Action {
    Action::Put {
        media: Media::Text,
        value: value.into(),
    }
}

fn write(time_ms: u64, key: Option<&'static str>, operations: Vec<Operation>) -> Bytes {
    let write = Write {
        operations,
        idempotency_key: key.map(|key| Bytes::from_static(key.as_bytes())),
    };
    KvCommand::Write {
        time_ms,
        writes: vec![write],
    }
    .encode()
}

fn put(key: &str, text: &'static str) -> Bytes {
    write(0, None, vec![operation(key, Condition::None, value(text))])
}

pub fn shard() -> Script {
    let mut script = Script::new(MapKind::Shard);
    script.text =
        "# What commit 0bbd823 answered to each entry, and changed. Never written again.\n"
            .to_owned();
    claims(&mut script);
    writes(&mut script);
    requests(&mut script);
    whole_move(&mut script);
    aborted_move(&mut script);
    clears(&mut script);
    script
}

fn claims(script: &mut Script) {
    let claim = |tags: &[&str]| {
        KvCommand::Claim {
            slots: slots(tags).into_iter().collect(),
        }
        .encode()
    };
    script.attempt("c", &claim(&[]));
    script.run("c", &claim(&["a", "b"]));
    script.run("c", &claim(&["b", "c"]));
    script.run(
        "c",
        &MoveCommand::Begin { to: DESTINATION }
            .into_command(MoveId(3), &slots(&["a"]))
            .encode(),
    );
    script.attempt("c", &claim(&["a", "d"]));
    script.attempt(
        "c",
        &KvCommand::Claim {
            slots: Slot::all().collect(),
        }
        .encode(),
    );
}

fn own(script: &mut Script, name: &'static str, tags: &[&str]) {
    script.run(
        name,
        &KvCommand::Claim {
            slots: slots(tags).into_iter().collect(),
        }
        .encode(),
    );
}

fn writes(script: &mut Script) {
    own(script, "w", &["a", "b", "e"]);
    for media in [
        Media::Text,
        Media::Octets,
        Media::Json,
        Media::Other("image/png".into()),
    ] {
        let put = Action::Put {
            media,
            value: Bytes::from_static(b"\x00v"),
        };
        script.run(
            "w",
            &write(5, None, vec![operation("{a}1", Condition::None, put)]),
        );
    }
    script.run("w", &put("{a}2", ""));
    script.run("w", &put("", "the empty key"));
    script.attempt("w", &put("{z}1", "of a slot that is not owned"));

    // Each condition with each action: of a key with a value, with an empty one, and with none.
    let conditions = [
        Condition::None,
        Condition::Absent,
        Condition::Present,
        Condition::RevisionIn(vec![Revision(4)]),
        Condition::RevisionIn(vec![]),
        Condition::RevisionIn(vec![Revision(1), Revision(5), Revision(5)]),
        Condition::RevisionNotIn(vec![Revision(4)]),
        Condition::RevisionNotIn(vec![]),
        Condition::RevisionNotIn(vec![Revision(7)]),
    ];
    for condition in conditions {
        for key in ["{a}1", "{a}2", "{a}3"] {
            for action in [Action::Get, Action::Delete, value("x")] {
                script.attempt(
                    "w",
                    &write(6, None, vec![operation(key, condition.clone(), action)]),
                );
            }
        }
    }

    // A write sees what it has done so far, and one condition that fails undoes all of it.
    let mixed = |last: Condition| {
        vec![
            operation("{a}1", Condition::Present, Action::Get),
            operation("{a}1", Condition::None, value("one")),
            operation("{a}1", Condition::None, Action::Get),
            operation("{b}1", Condition::Absent, value("two")),
            operation("{b}1", Condition::None, Action::Delete),
            operation("{b}1", Condition::None, Action::Delete),
            operation("{a}3", Condition::None, Action::Delete),
            operation("{a}2", last, Action::Get),
        ]
    };
    script.attempt("w", &write(7, None, mixed(Condition::Absent)));
    script.run("w", &write(7, None, mixed(Condition::Present)));
    script.run("w", &write(7, None, vec![]));

    // Writes of one entry see each other's changes, and a rejected one holds up none.
    let several = ["{a}1", "{z}1", "{a}1"].map(|key| Write {
        operations: vec![operation(
            key,
            Condition::RevisionIn(vec![Revision(6)]),
            value("once"),
        )],
        idempotency_key: None,
    });
    script.run(
        "w",
        &KvCommand::Write {
            time_ms: 8,
            writes: several.into(),
        }
        .encode(),
    );
    script.run(
        "w",
        &KvCommand::Write {
            time_ms: 9,
            writes: vec![],
        }
        .encode(),
    );
    script.run(
        "w",
        &write(
            0,
            None,
            vec![operation(
                "{e}big",
                Condition::None,
                value(vec![7; 300_000]),
            )],
        ),
    );
    script.attempt(
        "w",
        &write(
            0,
            None,
            vec![operation(
                "{e}big",
                Condition::None,
                value(vec![8; 300_000]),
            )],
        ),
    );
    script.attempt(
        "w",
        &write(
            0,
            None,
            vec![operation("{e}big", Condition::None, Action::Delete)],
        ),
    );
}

/// Answered requests: retries, other requests under the same key, what is forgotten, and a full
/// memory.
fn requests(script: &mut Script) {
    own(script, "r", &["a", "b", "f"]);
    let two = || {
        vec![
            operation("{a}1", Condition::None, value("1")),
            operation("{b}1", Condition::Absent, value("2")),
            operation("{a}1", Condition::None, Action::Get),
        ]
    };

    // Sent again it is answered as before; other operations under its key are rejected.
    script.run("r", &write(1000, Some("k"), two()));
    script.run("r", &write(1001, Some("k"), two()));
    script.attempt(
        "r",
        &write(
            1002,
            Some("k"),
            vec![operation("{a}1", Condition::None, value("other"))],
        ),
    );
    script.attempt("r", &write(1002, Some(""), two()));
    let failing = || {
        vec![
            operation("{b}1", Condition::Absent, value("3")),
            operation("{b}2", Condition::None, Action::Delete),
        ]
    };
    script.run("r", &write(1003, Some("l"), failing()));
    script.run("r", &write(1004, Some("l"), failing()));
    // Slots that come together only at the second try: one is remembered, the other decided now.
    script.run(
        "r",
        &write(
            1005,
            Some("m"),
            vec![operation("{a}5", Condition::None, value("5"))],
        ),
    );
    let mixed = vec![
        operation("{a}5", Condition::None, value("5")),
        operation("{b}1", Condition::Absent, value("5")),
    ];
    script.attempt("r", &write(1006, Some("m"), mixed));
    script.run("r", &put("{a}1", "between"));

    // Before, at and after the time when records expire, and a time that goes back.
    for time_ms in [
        900,
        2000,
        1000 + REMEMBERED_MS - 1,
        1000 + REMEMBERED_MS,
        2000 + 2 * REMEMBERED_MS,
    ] {
        script.attempt("r", &write(time_ms, Some("k"), two()));
        script.attempt(
            "r",
            &write(
                time_ms,
                Some("n"),
                vec![operation("{a}6", Condition::None, Action::Get)],
            ),
        );
        script.attempt(
            "r",
            &write(
                time_ms,
                None,
                vec![operation("{a}6", Condition::None, value("6"))],
            ),
        );
    }
    script.run(
        "r",
        &write(
            1003 + REMEMBERED_MS,
            Some("o"),
            vec![operation("{a}7", Condition::None, value("7"))],
        ),
    );
    script.run(
        "r",
        &write(
            9000 + 3 * REMEMBERED_MS,
            None,
            vec![operation("{a}7", Condition::None, value("8"))],
        ),
    );

    // A full memory rejects what has a key, and takes the rest.
    let full = slot_of(b"f");
    let mut state = SlotState::read(script.map("r"), full).expect("readable");
    state.requests.bytes = REQUESTS_BYTES_MAX - 100;
    script.pair(
        "r",
        Bytes::copy_from_slice(&state_key(full)),
        state.encode(),
    );
    script.attempt(
        "r",
        &write(
            9001 + 3 * REMEMBERED_MS,
            Some("p"),
            vec![operation("{f}1", Condition::None, value("1"))],
        ),
    );
    script.attempt(
        "r",
        &write(
            9001 + 3 * REMEMBERED_MS,
            None,
            vec![operation("{f}1", Condition::None, value("1"))],
        ),
    );
}

/// Tries every step, of this move and of others, on both sides as they are.
fn try_all(script: &mut Script, of: MoveId, moved: &BTreeSet<Slot>) {
    let (source, destination) = ("s", "d");
    let contents = final_contents(script.map(source), of)
        .expect("readable")
        .unwrap_or_default();
    let others = slots(&["a"]);
    for side in [source, destination] {
        // Under the ids before and after it too: what was overtaken, and what is not open.
        for id in [of, MoveId(of.0 - 1), MoveId(of.0 + 1)] {
            let steps = |set: &BTreeSet<Slot>| {
                [
                    MoveCommand::Begin { to: DESTINATION },
                    MoveCommand::Freeze,
                    MoveCommand::Release,
                    MoveCommand::Abort,
                    MoveCommand::Prepare { from: SOURCE },
                    MoveCommand::Complete {
                        chunk: 2,
                        contents: contents.clone(),
                    },
                    MoveCommand::Activate,
                    MoveCommand::Cancel,
                    MoveCommand::Clear { limit: 3 },
                ]
                .map(|step| step.into_command(id, set).encode())
            };
            for entry in steps(moved) {
                script.attempt(side, &entry);
            }

            // Its own id with other slots, and with none.
            if id == of {
                for entry in steps(&others).into_iter().chain(steps(&BTreeSet::new())) {
                    script.attempt(side, &entry);
                }
            }
        }

        // Clients meet the slots as the last step has left them.
        for key in ["{a}1", "{b}9"] {
            script.attempt(
                side,
                &write(
                    50,
                    Some("q"),
                    vec![operation(key, Condition::None, value("now"))],
                ),
            );
            script.attempt(
                side,
                &write(50, None, vec![operation(key, Condition::None, Action::Get)]),
            );
        }

        // A pair that is neither data nor a request.
        let pairs = vec![(Bytes::from_static(b"\x07odd"), Some(Bytes::new()))];
        let odd = Install {
            id: of,
            chunk: 0,
            cursor: Bytes::new(),
            source_ms: 7,
            pairs,
        };
        script.attempt(
            side,
            &KvCommand::Install {
                time_ms: 50,
                install: odd,
            }
            .encode(),
        );
    }
}

fn progress(map: &Map, id: MoveId) -> InstallProgress {
    match OpenMove::read(map, id).expect("readable") {
        Some(OpenMove {
            phase: MovePhase::Installing { progress, .. },
            ..
        }) => progress,
        Some(_) | None => InstallProgress::default(),
    }
}

/// Reads the next chunk at the source and installs it; also too early, too late and twice.
fn copy(script: &mut Script, id: MoveId, bytes_max: usize) {
    let progress = progress(script.map("d"), id);
    let chunk = move_chunk(script.map("s"), id, &progress.cursor, bytes_max)
        .expect("readable")
        .expect("it is open");
    let install = chunk.install(id, progress.chunk);
    for chunk in [progress.chunk + 1, progress.chunk.saturating_sub(1)] {
        let other = Install {
            chunk,
            ..install.clone()
        };
        script.attempt(
            "d",
            &KvCommand::Install {
                time_ms: 60,
                install: other,
            }
            .encode(),
        );
    }
    script.attempt(
        "s",
        &KvCommand::Install {
            time_ms: 60,
            install: install.clone(),
        }
        .encode(),
    );
    let entry = KvCommand::Install {
        time_ms: 60,
        install,
    }
    .encode();
    script.run("d", &entry);
    script.attempt("d", &entry);
}

fn begin(script: &mut Script, id: MoveId, moved: &BTreeSet<Slot>) {
    script.run(
        "d",
        &MoveCommand::Clear { limit: 100 }
            .into_command(id, moved)
            .encode(),
    );
    script.run(
        "d",
        &MoveCommand::Prepare { from: SOURCE }
            .into_command(id, moved)
            .encode(),
    );
    script.run(
        "s",
        &MoveCommand::Begin { to: DESTINATION }
            .into_command(id, moved)
            .encode(),
    );
}

fn whole_move(script: &mut Script) {
    let (id, moved) = (MoveId(5), slots(&["a", "b"]));
    own(script, "s", &["a", "b", "c"]);
    own(script, "d", &["d"]);
    for key in ["{a}1", "{a}2", "{a}3", "{b}1", "{c}1"] {
        script.run(
            "s",
            &write(
                10,
                Some("kept"),
                vec![operation(key, Condition::None, value("first"))],
            ),
        );
    }
    try_all(script, id, &moved);
    begin(script, id, &moved);
    try_all(script, id, &moved);
    copy(script, id, 10);

    // While pairs are copied one key is overwritten, one is deleted and one is new.
    script.run("s", &put("{a}2", "changed"));
    script.run(
        "s",
        &write(
            20,
            Some("late"),
            vec![operation("{a}3", Condition::None, Action::Delete)],
        ),
    );
    script.run("s", &put("{b}9", "new"));
    try_all(script, id, &moved);

    // In small chunks, so that cursors stand among the pairs and among the changes.
    loop {
        let cursor = progress(script.map("d"), id).cursor;
        let chunk = move_chunk(script.map("s"), id, &cursor, 60)
            .expect("readable")
            .expect("it is open");
        if chunk.done {
            break;
        }
        copy(script, id, 60);
    }
    script.run("s", &MoveCommand::Freeze.into_command(id, &moved).encode());
    try_all(script, id, &moved);
    copy(script, id, 1 << 20);
    let contents = final_contents(script.map("s"), id)
        .expect("readable")
        .expect("frozen");
    let chunk = progress(script.map("d"), id).chunk;

    // One key more than was installed: that must not pass.
    let mut wrong = contents.clone();
    if let Some(first) = wrong.values_mut().next() {
        first.keys += 1;
    }
    script.attempt(
        "d",
        &MoveCommand::Complete {
            chunk,
            contents: wrong,
        }
        .into_command(id, &moved)
        .encode(),
    );
    script.attempt(
        "d",
        &MoveCommand::Complete {
            chunk: chunk + 1,
            contents: contents.clone(),
        }
        .into_command(id, &moved)
        .encode(),
    );
    script.run(
        "d",
        &MoveCommand::Complete { chunk, contents }
            .into_command(id, &moved)
            .encode(),
    );
    try_all(script, id, &moved);
    script.run("s", &MoveCommand::Release.into_command(id, &moved).encode());
    try_all(script, id, &moved);
    script.run(
        "d",
        &MoveCommand::Activate.into_command(id, &moved).encode(),
    );
    try_all(script, id, &moved);
    for _ in 0..4 {
        script.run(
            "s",
            &MoveCommand::Clear { limit: 5 }
                .into_command(id, &moved)
                .encode(),
        );
    }
    try_all(script, id, &moved);
}

fn aborted_move(script: &mut Script) {
    let (id, moved) = (MoveId(9), slots(&["c"]));
    for key in ["{c}2", "{c}3"] {
        script.run(
            "s",
            &write(
                2_000,
                Some("again"),
                vec![operation(key, Condition::None, value("more"))],
            ),
        );
    }
    begin(script, id, &moved);
    copy(script, id, 20);
    script.run("s", &put("{c}2", "changed"));
    script.run("s", &MoveCommand::Abort.into_command(id, &moved).encode());
    try_all(script, id, &moved);
    script.run("d", &MoveCommand::Cancel.into_command(id, &moved).encode());
    try_all(script, id, &moved);
    script.run(
        "d",
        &MoveCommand::Clear { limit: 1 }
            .into_command(id, &moved)
            .encode(),
    );
    script.run(
        "s",
        &MoveCommand::Clear { limit: 0 }
            .into_command(id, &moved)
            .encode(),
    );
    // A newer move takes over from one that was never given up at the destination.
    let newer = MoveId(12);
    begin(script, MoveId(11), &moved);
    copy(script, MoveId(11), 20);
    script.run(
        "s",
        &MoveCommand::Abort.into_command(MoveId(11), &moved).encode(),
    );
    script.run(
        "d",
        &MoveCommand::Clear { limit: 100 }
            .into_command(newer, &moved)
            .encode(),
    );
    try_all(script, newer, &moved);
}

/// Scripts the limits of one clearing entry: by keys, and by bytes, where each value counts that it
/// had to read.
fn clears(script: &mut Script) {
    let (id, moved) = (MoveId(4), slots(&["g", "h"]));
    own(script, "g", &["g", "h"]);

    // More than the mebibyte that one entry may delete.
    for n in 0..9 {
        let text = vec![n; 200_000];
        script.run(
            "g",
            &write(
                30,
                None,
                vec![operation(
                    &format!("{{g}}{n}"),
                    Condition::None,
                    value(text),
                )],
            ),
        );
    }

    // Small ones are bounded by the number of keys, not by bytes.
    for n in 0..4 {
        script.run(
            "g",
            &write(
                30,
                Some("c"),
                vec![operation(
                    &format!("{{h}}{n}"),
                    Condition::None,
                    value("small"),
                )],
            ),
        );
    }
    script.run(
        "g",
        &MoveCommand::Begin { to: DESTINATION }
            .into_command(id, &moved)
            .encode(),
    );
    script.run("g", &put("{h}1", "marked"));
    script.run("g", &MoveCommand::Freeze.into_command(id, &moved).encode());
    script.run("g", &MoveCommand::Release.into_command(id, &moved).encode());

    // All limits meet the same state, since nothing is kept.
    for limit in [0, 1, 2, 3, 5, 7, 1000] {
        script.attempt(
            "g",
            &MoveCommand::Clear { limit }
                .into_command(id, &moved)
                .encode(),
        );
        script.attempt(
            "g",
            &MoveCommand::Clear { limit }
                .into_command(id, &slots(&["h"]))
                .encode(),
        );
    }
    for _ in 0..5 {
        script.run(
            "g",
            &MoveCommand::Clear { limit: 1000 }
                .into_command(id, &moved)
                .encode(),
        );
    }
}

fn node(number: u32) -> NodeSpec {
    let address = format!("n{number}:1").parse().expect("an address");
    NodeSpec {
        address,
        public_address: None,
        directory: DirectoryId(u128::from(number)),
    }
}

fn founding(nodes: &[u32], asked: PlacementSpec) -> View {
    first_view(
        ClusterId(9),
        asked,
        nodes.iter().copied().map(node).collect(),
    )
    .expect("a view")
}

fn announce(number: u64, directory: u128, address: &str) -> Bytes {
    let address = address.parse().expect("an address");
    meta::MetaCommand::Announce {
        node: NodeId(number),
        directory: DirectoryId(directory),
        address,
        public_address: None,
    }
    .encode()
}

fn view(script: &mut Script) -> View {
    meta::read_view(script.map("m"))
        .expect("readable")
        .expect("founded")
}

fn next(view: &View, asked: PlacementSpec, nodes: &[u32]) -> View {
    let wanted: Vec<NodeSpec> = nodes.iter().copied().map(node).collect();
    plan(view, asked, &wanted, &BTreeSet::new())
        .expect("a plan")
        .view
}

fn install(base: MapVersion, next: &View) -> Bytes {
    meta::MetaCommand::InstallPlan {
        base,
        next: Box::new(next.clone()),
    }
    .encode()
}

/// Every group tells that its members are those of the view; first one of them tells what is
/// outdated, or of nothing.
fn report_all(script: &mut Script) {
    for group in view(script).groups.into_keys().collect::<Vec<_>>() {
        let now = view(script);
        let Some(of) = now.groups.get(&group) else {
            continue;
        };
        let index = of
            .reported
            .as_ref()
            .map_or(10, |known| known.log_id.index + 10);
        let told = |index| ReportedMembership {
            log_id: LogId { term: 1, index },
            voters: of.electorate(),
            learners: of.learners.clone(),
        };
        let report = |group, reported, plan| {
            meta::MetaCommand::Report {
                group,
                reported,
                plan,
            }
            .encode()
        };

        // Of the plan before, of an older entry, and of a group that is not there.
        script.attempt("m", &report(group, told(index), PlanEpoch(now.epoch.0 - 1)));
        script.attempt("m", &report(group, told(1), now.epoch));
        script.attempt("m", &report(GroupId(77), told(index), now.epoch));

        // A membership that leaves members out.
        let some = ReportedMembership {
            voters: BTreeSet::from([ReplicaId(1)]),
            ..told(index)
        };
        script.attempt("m", &report(group, some, now.epoch));
        script.run("m", &report(group, told(index), now.epoch));
    }
}

fn move_all(script: &mut Script) {
    let now = view(script);
    let mut runs: BTreeMap<(GroupId, GroupId), BTreeSet<Slot>> = BTreeMap::new();
    for slot in now.misplaced_slots() {
        runs.entry((now.slots.owner(slot), now.targets.owner(slot)))
            .or_default()
            .insert(slot);
    }
    for ((from, to), slots) in runs {
        let open = |from, to, slots: &BTreeSet<Slot>| {
            meta::MetaCommand::OpenMove {
                from,
                to,
                slots: slots.clone(),
            }
            .encode()
        };

        // Against the plan, and of no slots.
        script.attempt("m", &open(to, from, &slots));
        script.attempt("m", &open(from, to, &BTreeSet::new()));

        // After an abort the slots are still to move, and a second move takes them.
        for abort in [true, false] {
            let id = view(script).next_move;
            script.run("m", &open(from, to, &slots));
            script.attempt("m", &open(from, to, &slots));
            script.attempt(
                "m",
                &meta::MetaCommand::CommitMove {
                    id: MoveId(id.0 + 1),
                }
                .encode(),
            );
            script.attempt("m", &meta::MetaCommand::CommitMove { id }.encode());
            script.attempt("m", &meta::MetaCommand::AbortMove { id }.encode());
            let end = if abort {
                meta::MetaCommand::AbortMove { id }
            } else {
                meta::MetaCommand::CommitMove { id }
            };
            script.run("m", &end.encode());
            script.attempt("m", &end.encode());
        }
    }
}

pub fn meta() -> Script {
    let mut script = Script::new(MapKind::Meta);
    script.text =
        "# What commit 0bbd823 answered to each entry, and changed. Never written again.\n"
            .to_owned();
    let found = |view: &View| {
        meta::MetaCommand::Found {
            view: Box::new(view.clone()),
        }
        .encode()
    };
    let first = founding(&[1, 2, 3], PlacementSpec::default());

    // Before there is a view all is rejected, and so is a first view that is not sound.
    for entry in [
        announce(1, 1, "n1:1"),
        install(MapVersion(1), &first),
        meta::MetaCommand::OpenMove {
            slots: slots(&["a"]),
            from: SOURCE,
            to: DESTINATION,
        }
        .encode(),
        meta::MetaCommand::CommitMove { id: MoveId(1) }.encode(),
        found(&View {
            next_node: NodeId(2),
            ..first.clone()
        }),
    ] {
        script.attempt("m", &entry);
    }
    script.run("m", &found(&first));
    script.attempt("m", &found(&first));

    // As it is, from another directory, of an unknown node, at a taken address, and elsewhere.
    for (number, directory, address) in [
        (1, 1, "n1:1"),
        (1, 2, "n1:1"),
        (9, 9, "n9:1"),
        (1, 1, "n2:1"),
        (1, 1, "elsewhere:1"),
        (2, 2, "n2:2"),
    ] {
        script.attempt("m", &announce(number, directory, address));
    }
    script.run("m", &announce(2, 2, "n2:1"));

    let asked = PlacementSpec::default();
    let steps: [(&[u32], PlacementSpec); 5] = [
        (&[1, 2, 3, 4], asked),
        (
            &[1, 2, 3, 4],
            PlacementSpec {
                replication_factor: Some(2),
                shards: Some(2),
                ..asked
            },
        ),
        (&[1, 2, 3], asked),
        (
            &[4, 5, 6],
            PlacementSpec {
                shards: Some(3),
                ..asked
            },
        ),
        (
            &[4],
            PlacementSpec {
                replication_factor: Some(1),
                ..asked
            },
        ),
    ];
    for (nodes, asked) in steps {
        let now = view(&mut script);
        let planned = next(&now, asked, nodes);

        // Plans over another version, and with numbers, ids or owners that are not the next.
        script.attempt("m", &install(MapVersion(now.version.0 + 1), &planned));
        script.attempt(
            "m",
            &install(
                now.version,
                &View {
                    epoch: PlanEpoch(planned.epoch.0 + 1),
                    ..planned.clone()
                },
            ),
        );
        script.attempt(
            "m",
            &install(
                now.version,
                &View {
                    next_move: MoveId(planned.next_move.0 + 1),
                    ..planned.clone()
                },
            ),
        );
        script.attempt(
            "m",
            &install(
                now.version,
                &View {
                    slots: planned.targets.clone(),
                    ..planned.clone()
                },
            ),
        );
        script.run("m", &install(now.version, &planned));
        script.attempt("m", &install(now.version, &planned));
        report_all(&mut script);
        move_all(&mut script);
        report_all(&mut script);
        report_all(&mut script);
    }
    script
}
