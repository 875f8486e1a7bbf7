//! The tests of the trees over sled: what fails, panics, hangs or wastes space, and what becomes of
//! it.

use super::*;

fn path_with_a_database(home: &Path) -> PathBuf {
    let path = home.join("trees");
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    trees.open("t").expect("created");
    path
}

#[test]
fn a_database_that_panics_is_moved_aside_and_a_fresh_one_opened() {
    let home = tempfile::tempdir().expect("a directory");
    let path = path_with_a_database(home.path());
    let panics_on_the_old = |path: &Path, cache_bytes: u64| match path.join("db").exists() {
        true => panic!("index out of bounds"),
        false => open_database(path, cache_bytes),
    };
    let trees =
        SledTrees::open_by(&path, &SledOptions::default(), panics_on_the_old).expect("a fresh one");
    assert!(trees.names().expect("listed").is_empty());
    assert!(home.path().join("trees.damaged/db").exists());
}

#[test]
fn a_database_that_hangs_is_moved_aside_and_the_process_told_to_end() {
    let home = tempfile::tempdir().expect("a directory");
    let path = path_with_a_database(home.path());
    let hangs = |_: &Path, _: u64| loop {
        std::thread::park();
    };
    let options = SledOptions {
        patience: Duration::from_millis(1),
        ..SledOptions::default()
    };
    let error = SledTrees::open_by(&path, &options, hangs)
        .err()
        .expect("it hangs");
    assert!(
        matches!(
            &error,
            SledError::Hangs { moved_to } if *moved_to == home.path().join("trees.damaged")
        ),
        "{error}"
    );
    let trees =
        SledTrees::open(&path, &SledOptions::default()).expect("the next start has a fresh one");
    assert!(trees.names().expect("listed").is_empty());
}

#[test]
fn a_database_that_is_still_open_or_not_allowed_is_refused_and_left() {
    let home = tempfile::tempdir().expect("a directory");
    let path = path_with_a_database(home.path());
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    let error = SledTrees::open(&path, &SledOptions::default())
        .err()
        .expect("it is open");
    assert!(matches!(error, SledError::Io { .. }), "{error}");
    drop(trees);
    let full = |_: &Path, _: u64| Err(sled::Error::Io(io::ErrorKind::StorageFull.into()));
    let error = SledTrees::open_by(&path, &SledOptions::default(), full)
        .err()
        .expect("the disk is full");
    assert!(matches!(error, SledError::Io { .. }), "{error}");
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    assert_eq!(trees.names().expect("listed"), ["t"]);
}

#[test]
fn a_condemned_database_is_not_opened_again() {
    let home = tempfile::tempdir().expect("a directory");
    let path = path_with_a_database(home.path());
    std::fs::create_dir_all(home.path().join("trees.damaged/earlier")).expect("created");
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    assert_eq!(trees.names().expect("listed"), ["t"]);
    trees.condemn("a test");
    drop(trees);
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    assert!(trees.names().expect("listed").is_empty());
    assert!(
        !home.path().join("trees.damaged/earlier").exists(),
        "the older of two stays"
    );
}

fn put(trees: &SledTrees, tree: &str, value: &str) {
    let tree = trees.open(tree).expect("opened");
    tree.write(b"k", Some(value.as_bytes())).expect("written");
    tree.flush().expect("flushed");
}

fn get(trees: &SledTrees, tree: &str) -> Option<Bytes> {
    trees.open(tree).expect("opened").get(b"k").expect("read")
}

#[test]
fn a_database_is_removed_with_its_last_tree_once_there_is_a_fresh_one() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("trees");
    let open = || SledTrees::open(&path, &SledOptions::default()).expect("opened");
    let trees = open();
    put(&trees, "a.1", "old");
    put(&trees, "b.1", "old");
    assert!(trees.outdated().expect("listed").is_empty());
    trees.begin_fresh(0).expect("begun");
    put(&trees, "a.2", "new");
    assert_eq!(trees.outdated().expect("listed"), ["a.1", "b.1"]);
    trees.drop_tree("a.1").expect("dropped");
    drop(trees);

    let trees = open();
    assert_eq!(trees.names().expect("listed"), ["a.2", "b.1"]);
    assert_eq!(trees.outdated().expect("listed"), ["b.1"]);
    assert_eq!(
        (get(&trees, "a.2").as_deref(), get(&trees, "b.1").as_deref()),
        (Some(&b"new"[..]), Some(&b"old"[..]))
    );
    put(&trees, "b.2", "new");
    assert!(path.exists());
    trees.drop_tree("b.1").expect("dropped");
    assert!(!path.exists(), "nobody has a tree in it");
    drop(trees);

    let trees = open();
    assert_eq!(trees.names().expect("listed"), ["a.2", "b.2"]);
    trees.begin_fresh(0).expect("begun again");
    put(&trees, "a.3", "newer");
    assert!(home.path().join("trees.2").exists());

    trees
        .drop_tree("a.2")
        .and_then(|()| trees.drop_tree("a.3"))
        .and_then(|()| trees.drop_tree("b.2"))
        .expect("dropped");
    assert!(!home.path().join("trees.1").exists());
    trees.begin_fresh(0).expect("begun without a tree");
    assert!(
        !home.path().join("trees.2").exists(),
        "nobody would ever have dropped its last tree"
    );
}

/// The program before there was more than one database uses the first directory, whatever is beside
/// it.
#[test]
fn a_tree_in_two_databases_is_that_of_the_newer_and_dropped_in_both() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("trees");
    let open = || SledTrees::open(&path, &SledOptions::default()).expect("opened");
    let trees = open();
    put(&trees, "a.1", "old");
    trees.begin_fresh(0).expect("begun");
    put(&trees, "a.2", "new");
    trees.drop_tree("a.1").expect("dropped");
    drop(trees);
    let earlier =
        Database::create(&path, 0, &SledOptions::default(), open_database).expect("created");
    earlier
        .db
        .open_tree("a.2")
        .and_then(|tree| tree.insert("k", "of an earlier program"))
        .expect("written");
    drop(earlier);

    let trees = open();
    assert_eq!(get(&trees, "a.2").as_deref(), Some(&b"new"[..]));
    trees.drop_tree("a.2").expect("dropped");
    assert!(trees.names().expect("listed").is_empty());
    assert!(!path.exists());
}

#[test]
fn a_damaged_database_leaves_the_other_and_a_condemned_one_takes_all() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("trees");
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    put(&trees, "a.1", "old");
    trees.begin_fresh(0).expect("begun");
    put(&trees, "a.2", "new");
    drop(trees);
    let panics_on_the_newer = |path: &Path, cache_bytes: u64| match path.ends_with("trees.1") {
        true => panic!("index out of bounds"),
        false => open_database(path, cache_bytes),
    };
    let trees = SledTrees::open_by(&path, &SledOptions::default(), panics_on_the_newer)
        .expect("the older opens");
    assert_eq!(trees.names().expect("listed"), ["a.1"]);
    assert!(home.path().join("trees.damaged").exists());
    trees.begin_fresh(0).expect_err("its opener panics");
    drop(trees);
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    trees.condemn("a test");
    drop(trees);
    assert!(is_condemned(&path));
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    assert!(trees.names().expect("listed").is_empty());
    assert!(!is_condemned(&path));
}

#[test]
fn a_fresh_database_that_meets_a_full_disk_holds_up_nobody() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("trees");
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    put(&trees, "a.1", "old");
    trees.begin_fresh(0).expect("begun");
    put(&trees, "a.2", "half");
    let full = || Err::<(), _>(sled::Error::Io(io::ErrorKind::StorageFull.into()));
    trees
        .newest()
        .trust
        .read("trying", full)
        .expect_err("it failed");

    assert!(
        trees.outdated().expect("listed").is_empty(),
        "there is nowhere to copy to"
    );
    put(&trees, "a.1", "on");
    put(&trees, "b.1", "in the old one");
    trees.drop_tree("b.1").expect("dropped");
    trees.begin_fresh(0).expect("begun with room again");
    put(&trees, "a.3", "new");
    assert_eq!(trees.outdated().expect("listed"), ["a.1"]);
    trees.drop_tree("a.1").expect("dropped");
    assert!(!path.exists());
    assert_eq!(get(&trees, "a.3").as_deref(), Some(&b"new"[..]));
}

#[test]
fn a_fresh_database_wants_room() {
    let home = tempfile::tempdir().expect("a directory");
    let trees =
        SledTrees::open(&home.path().join("trees"), &SledOptions::default()).expect("opened");
    let error = trees
        .begin_fresh(u64::MAX / 2)
        .expect_err("no disk is so large")
        .to_string();
    assert!(error.contains("no room"), "{error}");
    assert!(!home.path().join("trees.1").exists());
}

#[test]
fn a_failed_disk_ends_the_writes_and_damage_does_not() {
    let home = tempfile::tempdir().expect("a directory");
    let trees =
        SledTrees::open(&home.path().join("trees"), &SledOptions::default()).expect("opened");
    let tree = trees.open("t").expect("created");
    let fail = |error: sled::Error| {
        trees
            .newest()
            .trust
            .read("trying", || Err::<(), _>(error))
            .expect_err("it failed")
    };
    fail(sled::Error::Corruption { at: None, bt: () });
    fail(sled::Error::Io(io::ErrorKind::UnexpectedEof.into()));
    fail(sled::Error::Io(rustix::io::Errno::MFILE.into()));
    tree.write(b"k", Some(b"v"))
        .expect("damage is for the checks of the trees, and descriptors come back");
    fail(sled::Error::Io(io::ErrorKind::StorageFull.into()));
    let error = tree
        .write(b"k", Some(b"v"))
        .expect_err("refused")
        .to_string();
    assert!(error.contains("not written to any more"), "{error}");
    trees.sync().expect_err("refused, where sled might hang");
    assert_eq!(tree.get(b"k").expect("read").as_deref(), Some(&b"v"[..]));
}

#[test]
fn large_values_are_cut_and_come_back_whole() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("trees");
    let value = |n: usize| -> Vec<u8> { (0..n).map(|at| (at * 7 + n) as u8).collect() };
    let sizes = [0, 1, 511, 512, 513, 6144, 6145, 12_288, 12_289, 50_000];
    let mut model = std::collections::BTreeMap::<Bytes, Bytes>::new();
    let check = |tree: &dyn Tree, model: &std::collections::BTreeMap<Bytes, Bytes>| {
        use crate::sm::ports::Read;
        for direction in [Direction::Forward, Direction::Reverse] {
            let found: Result<Vec<_>, _> = tree.scan(&KeyRange::all(), direction).collect();
            let expected: Result<Vec<_>, _> =
                Read::scan(model, &KeyRange::all(), direction).collect();
            assert_eq!(found.expect("readable"), expected.expect("readable"));
            let starts: Result<Vec<_>, _> =
                tree.scan_starts(&KeyRange::all(), direction, 100).collect();
            let expected: Result<Vec<_>, _> =
                Read::scan_starts(model, &KeyRange::all(), direction, 100).collect();
            assert_eq!(starts.expect("readable"), expected.expect("readable"));
        }
        let mut walked = Vec::new();
        let mut visit = |key: &[u8], value: &[u8]| {
            walked.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
            Walk::On
        };
        tree.walk(&mut visit).expect("walked");
        assert!(
            walked.into_iter().eq(model
                .iter()
                .map(|(key, value)| (key.clone(), value.clone())))
        );
        for (key, value) in model {
            assert_eq!(tree.get(key).expect("readable").as_ref(), Some(value));
            assert_eq!(
                tree.start_of(key, 100).expect("readable"),
                Some(ValueStart::from_value(value, 100))
            );
        }
    };

    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    let tree = trees.open("t").expect("created");
    for round in 0..3 {
        for (n, size) in sizes.iter().enumerate() {
            let key = format!("k{n}");
            let value = match (round, n % 3) {
                (1, 0) => None,
                (1, _) => Some(value(sizes[sizes.len() - 1 - n])),
                (_, _) => Some(value(*size + round)),
            };
            tree.write(key.as_bytes(), value.as_deref())
                .expect("written");
            match value {
                Some(value) => drop(model.insert(key.into(), value.into())),
                None => drop(model.remove(key.as_bytes())),
            }
        }
        tree.write(b"m", Some(b"\xff\x01taken for a stub"))
            .expect("written");
        model.insert("m".into(), Bytes::from_static(b"\xff\x01taken for a stub"));
        check(&*tree, &model);
    }
    trees.sync().expect("synced");
    drop((tree, trees));
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    let tree = trees.open("t").expect("opened");
    check(&*tree, &model);
    for key in model.keys() {
        tree.write(key, None).expect("deleted");
    }
    let database = trees.newest();
    assert_eq!(
        database.db.open_tree("t").expect("opened").len(),
        0,
        "no piece is left"
    );
}

#[test]
fn a_value_that_was_written_whole_is_read_and_a_lost_piece_is_damage() {
    let home = tempfile::tempdir().expect("a directory");
    let trees =
        SledTrees::open(&home.path().join("trees"), &SledOptions::default()).expect("opened");
    let tree = trees.open("t").expect("created");
    let sled_tree = trees.newest().db.open_tree("t").expect("opened");
    sled_tree
        .insert("old", vec![1; 300_000])
        .expect("as earlier programs did");
    assert_eq!(
        tree.get(b"old").expect("readable").map(|value| value.len()),
        Some(300_000)
    );
    assert_eq!(
        tree.start_of(b"old", 5)
            .expect("readable")
            .map(|start| start.len),
        Some(300_000)
    );
    tree.write(b"old", Some(&[2; 20_000])).expect("written");
    assert_eq!(sled_tree.len(), 5, "four pieces and a stub");

    let piece = sled_tree
        .range(pieces::first_piece()..)
        .next()
        .expect("a piece")
        .expect("readable")
        .0;
    sled_tree.remove(piece).expect("removed");
    tree.get(b"old").expect_err("a piece is gone");
    assert!(
        tree.scan(&KeyRange::all(), Direction::Forward)
            .next()
            .expect("an error")
            .is_err()
    );
    tree.walk(&mut |_, _| Walk::On)
        .expect_err("a piece is gone");
    assert_eq!(
        tree.start_of(b"old", 5)
            .expect("readable")
            .map(|start| start.len),
        Some(20_000)
    );
}

#[test]
fn what_hangs_is_not_waited_for_and_what_answers_is() {
    let hangs = || loop {
        std::thread::park();
    };
    let error =
        in_time::<()>("trying", Duration::ZERO, || Duration::ZERO, hangs).expect_err("it hangs");
    assert!(
        matches!(&error, StoreError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut),
        "{error}"
    );
    let hour = Duration::from_secs(3600);
    assert_eq!(
        in_time("trying", Duration::ZERO, || hour, || Ok(7)).expect("done"),
        7
    );
    in_time::<()>("trying", hour, || hour, || panic!("as sled might"))
        .expect_err("its thread died");
}

#[test]
fn a_damaged_stub_takes_neither_memory_nor_time_for_what_it_says() {
    let home = tempfile::tempdir().expect("a directory");
    let trees =
        SledTrees::open(&home.path().join("trees"), &SledOptions::default()).expect("opened");
    let tree = trees.open("t").expect("created");
    let sled_tree = trees.newest().db.open_tree("t").expect("opened");
    let stub = [
        &b"\xff\x01"[..],
        &[1; 8],
        &(1u64 << 46).to_be_bytes(),
        &[7; 512],
    ]
    .concat();
    sled_tree.insert("k", stub).expect("written");
    tree.get(b"k").expect_err("it has no pieces");
    tree.write(b"k", Some(b"v")).expect("written");
    assert_eq!(
        tree.get(b"k").expect("readable").as_deref(),
        Some(&b"v"[..])
    );
}

#[test]
fn a_fresh_database_that_does_not_open_leaves_nothing() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("trees");
    let fails_for_a_newer = |path: &Path, cache_bytes: u64| match path.ends_with("trees") {
        true => open_database(path, cache_bytes),
        false => {
            std::fs::create_dir_all(path.join("blobs")).expect("created");
            Err(sled::Error::Io(rustix::io::Errno::MFILE.into()))
        }
    };
    let trees =
        SledTrees::open_by(&path, &SledOptions::default(), fails_for_a_newer).expect("opened");
    for _ in 0..2 {
        trees.begin_fresh(0).expect_err("its opener fails");
        assert_eq!(numbered(&path), [(0, path.clone())]);
    }
}

#[test]
fn fresh_databases_that_failed_do_not_pile_up() {
    let home = tempfile::tempdir().expect("a directory");
    let trees =
        SledTrees::open(&home.path().join("trees"), &SledOptions::default()).expect("opened");
    put(&trees, "a.1", "old");
    let full = || Err::<(), _>(sled::Error::Io(io::ErrorKind::StorageFull.into()));
    for n in 0..FAILED_MAX {
        trees.begin_fresh(0).expect("begun");
        put(&trees, &format!("a.{}", n + 2), "half");
        trees
            .newest()
            .trust
            .read("trying", full)
            .expect_err("it failed");
    }
    let error = trees.begin_fresh(0).expect_err("enough").to_string();
    assert!(error.contains("start this node again"), "{error}");
    put(&trees, "a.1", "on");
    assert_eq!(trees.databases().len(), FAILED_MAX + 1);
}

/// A program that knows one database only may have served the other cluster meanwhile.
#[test]
fn a_fresh_database_is_met_in_no_other_cluster() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("trees");
    let open = |cluster| {
        let options = SledOptions {
            cluster: crate::types::ClusterId(cluster),
            ..SledOptions::default()
        };
        SledTrees::open(&path, &options).expect("opened")
    };
    let trees = open(1);
    put(&trees, "a.1", "old");
    trees.begin_fresh(0).expect("begun");
    put(&trees, "a.7", "of the first cluster");
    drop(trees);
    let trees = open(1);
    assert_eq!(trees.names().expect("listed"), ["a.1", "a.7"]);
    drop(trees);
    let trees = open(2);
    assert_eq!(trees.names().expect("listed"), ["a.1"]);
    assert!(
        home.path().join("trees.damaged/owner").exists(),
        "it is set aside"
    );
}

#[test]
fn the_form_of_an_owner_stands() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("trees");
    let trees = SledTrees::open(&path, &SledOptions::default()).expect("opened");
    trees.begin_fresh(0).expect("begun");
    let text = std::fs::read_to_string(home.path().join("trees.1/owner")).expect("there");
    assert!(
        text.contains("\"format\": 1") && text.contains(&"0".repeat(32)),
        "{text}"
    );
}

#[test]
fn one_that_is_written_to_no_more_is_in_the_way_of_no_other() {
    let home = tempfile::tempdir().expect("a directory");
    let trees =
        SledTrees::open(&home.path().join("trees"), &SledOptions::default()).expect("opened");
    put(&trees, "a.1", "old");
    let old = trees.newest();
    trees.begin_fresh(0).expect("begun");
    trees.newest().db.open_tree("a.1").expect("in both");
    let full = || Err::<(), _>(sled::Error::Io(io::ErrorKind::StorageFull.into()));
    old.trust.read("trying", full).expect_err("it failed");
    trees.drop_tree("a.1").expect_err("not in the old one");
    assert!(
        !trees.newest().holds("a.1").expect("listed"),
        "it was not dropped in the newer one"
    );
}
