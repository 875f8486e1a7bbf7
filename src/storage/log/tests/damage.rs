//! Every byte cut, every byte flipped: opening gives the right answer or says that the log is
//! damaged, and never anything else.

use super::*;
use crate::storage::disk::Open;

/// A history whose log is closed or whose last batch is behind the last mark, on a disk where
/// everything is synced.
struct Image {
    attack: Attack,
    segments: Vec<(PathBuf, u64)>,
    /// The offset of the last mark, in the last segment.
    last_mark: u64,
    /// Number of entries that each replica had acknowledged below the last mark.
    acked_below: BTreeMap<ReplicaKey, usize>,
}

fn tiny() -> LogOptions {
    LogOptions {
        segment_bytes: 1200,
        grow_bytes: 400,
        cache_bytes: 0,
        rebase_bytes_max: 200,
        batch_bytes_max: 500,
        ..LogOptions::default()
    }
}

fn image(seed: u64, closed: bool) -> Image {
    let mut attack = Attack::new(seed, tiny());
    for _ in 0..30 {
        attack.issue();
        if attack.random.random_bool(0.4) {
            attack.writer.pump();
        }
    }
    pump(&mut attack.writer);
    let acked_below = attack
        .histories
        .iter()
        .map(|(key, history)| (*key, history.acked()))
        .collect();
    let keys = attack.log.replicas();
    for key in keys {
        attack.vote(key);
        attack.append(key);
    }
    while attack.log.queue_bytes() > 0 {
        attack.writer.pump();
    }
    if closed {
        pump(&mut attack.writer);
    }
    attack.check_issued(&format!("seed {seed}"));
    let segments: Vec<(PathBuf, u64)> = attack
        .disk
        .files()
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|kind| kind == "segment"))
        .collect();
    let (path, _) = segments.last().expect("a segment");
    let bytes = attack.disk.contents(path).expect("it is listed");
    let number = path
        .file_stem()
        .and_then(|stem| stem.to_str()?.parse().ok())
        .expect("segments are numbered");
    let mut last_mark = 0;
    let place = record::RecordPlace {
        binding: 0,
        segment: number,
        offset: 0,
    };
    while let Some(mark) = record::find_mark(&bytes, last_mark as usize + 1, place) {
        last_mark = mark;
    }
    Image {
        attack,
        segments,
        last_mark,
        acked_below,
    }
}

impl Image {
    /// Opens a disk that was damaged at a byte of a segment. Returns whether that was called
    /// damage.
    fn check(&self, disk: &SimDisk, what: &str, behind_mark: bool) -> bool {
        let log = match open(disk, &self.attack.options) {
            Ok((log, _writer)) => log,
            Err(OpenLogError::Damaged { .. }) => return true,
            Err(error) => panic!("{what}: {error}"),
        };
        if behind_mark {
            // The last batch may be cut, and nothing else.
            let mut below = self.acked_below.clone();
            for (key, history) in &self.attack.histories {
                let acked = below.remove(key).unwrap_or(0);
                assert!(
                    history.states[acked..].contains(&observe(&log, *key)),
                    "{what}: {key}"
                );
            }
        } else {
            self.attack.check_found(&log, what, |_, last| last);
        }
        false
    }

    fn flip_all(&self, seed: u64) -> (u64, u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut damaged, mut opened) = (0, 0);
        for (at, (path, len)) in self.segments.iter().enumerate() {
            for offset in 0..*len {
                let disk = self.attack.disk.fork();
                let bit = random.random_range(0..8);
                assert!(disk.flip_bit(path, offset, bit));
                let behind_mark = at + 1 == self.segments.len() && offset >= self.last_mark;
                let what = format!(
                    "seed {seed}, bit {bit} of byte {offset} of {} flipped",
                    path.display()
                );
                *if self.check(&disk, &what, behind_mark) {
                    &mut damaged
                } else {
                    &mut opened
                } += 1;
            }
        }
        (damaged, opened)
    }

    fn cut_all(&self, seed: u64) -> (u64, u64) {
        let (mut damaged, mut opened) = (0, 0);
        for (path, len) in &self.segments {
            for offset in 0..*len {
                let disk = self.attack.disk.fork();
                disk.cut(path, offset);
                let what = format!("seed {seed}, {} cut to {offset} bytes", path.display());
                // Pre-written room tells a cut file from a short log: nothing is lost to it, not
                // even behind the last mark.
                *if self.check(&disk, &what, false) {
                    &mut damaged
                } else {
                    &mut opened
                } += 1;
            }
        }
        (damaged, opened)
    }
}

#[test]
fn a_flipped_bit_below_the_last_mark_is_damage_or_harmless() {
    let image = image(0, true);
    let (damaged, opened) = image.flip_all(0);
    assert!(
        damaged > 1000 && opened > 300,
        "{damaged} of {} were damage",
        damaged + opened
    );
}

#[test]
fn a_flipped_bit_behind_the_last_mark_cuts_the_last_batch_at_most() {
    image(10, false).flip_all(10);
}

#[test]
fn a_cut_file_is_damage_or_harmless() {
    for (seed, closed) in [(20, true), (21, false)] {
        let (damaged, _) = image(seed, closed).cut_all(seed);
        assert!(damaged > 1000, "seed {seed}: {damaged}");
    }
}

#[test]
fn a_closing_mark_covers_all_before_it() {
    let image = image(30, true);
    let (path, _) = image.segments.last().expect("a segment");
    for offset in 0..image.last_mark {
        let disk = image.attack.disk.fork();
        disk.flip_bit(path, offset, 0);
        assert!(
            image.check(&disk, &format!("byte {offset}"), false),
            "byte {offset} of a marked log was flipped and not missed"
        );
    }
}

#[test]
fn a_missing_segment_is_damage_unless_nothing_in_it_is_live() {
    let mut damaged = 0;
    for seed in 40..60 {
        let image = image(seed, true);
        for (path, _) in image.segments.split_last().expect("a segment").1 {
            let disk = image.attack.disk.fork();
            disk.remove(path).expect("it is listed");
            damaged += u64::from(image.check(
                &disk,
                &format!("seed {seed}, {} removed", path.display()),
                false,
            ));
        }
    }
    assert!(damaged > 10);
}

#[test]
fn a_torn_last_batch_is_cut_wherever_it_was_torn_and_never_comes_back() {
    for seed in 70..73 {
        let image = image(seed, false);
        let (path, _) = image.segments.last().expect("a segment");
        for offset in (image.last_mark..image.segments[image.segments.len() - 1].1).step_by(7) {
            let disk = image.attack.disk.fork();
            let file = disk.open(path, Open::Existing).expect("it is listed");
            file.write_at(&[0xa5; 5], offset).expect("a write");
            file.sync().expect("a sync");
            let what = format!("seed {seed}, torn at {offset}");
            let (log, mut writer) = open(&disk, &image.attack.options)
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let found: Vec<Option<Model>> = log
                .replicas()
                .into_iter()
                .map(|key| observe(&log, key))
                .collect();
            // Something else is written where the torn batch was.
            let replica = log.replica(log.replicas()[0]).expect("it is listed");
            let outcomes = Outcomes::default();
            replica.save_vote(
                Vote {
                    term: 5000,
                    voted_for: None,
                    committed: true,
                },
                outcomes.done(),
            );
            pump(&mut writer);
            assert_eq!(outcomes.good(), 1);
            drop(writer);
            let (log, _writer) = open(&disk, &image.attack.options)
                .unwrap_or_else(|error| panic!("{what}, again: {error}"));
            for (at, key) in log.replicas().into_iter().enumerate() {
                let mut expected = found[at].clone().expect("it was observed");
                if at == 0 {
                    expected.vote = Some(Vote {
                        term: 5000,
                        voted_for: None,
                        committed: true,
                    });
                }
                assert_eq!(observe(&log, key), Some(expected), "{what}: {key}");
            }
        }
    }
}
