//! Reading sealed segments again finds what a start would, and says who keeps a segment.

use super::*;
use crate::storage::Checked;

const REPLICA: (u64, u64) = (1, 1);

/// A log with several sealed segments, all of them live.
fn filled(disk: &SimDisk) -> (Log, LogWriter) {
    let (log, mut writer) = open(disk, &small()).expect("a log");
    let outcomes = Outcomes::default();
    log.create(key(REPLICA.0, REPLICA.1), outcomes.done());
    let replica = log.replica(key(REPLICA.0, REPLICA.1)).expect("created");
    for index in 0..40 {
        replica
            .append(vec![entry(1, index, 300)], outcomes.done())
            .expect("an append");
        pump(&mut writer);
    }
    assert_eq!(outcomes.good(), 41);
    (log, writer)
}

fn path_of(number: u64) -> PathBuf {
    dir().join(format!("{number:020}.segment"))
}

#[test]
fn a_flipped_bit_anywhere_in_a_sealed_segment_is_found() {
    let disk = SimDisk::new(1);
    let (log, _writer) = filled(&disk);
    let sealed = log.sealed_segments();
    assert!(sealed.len() >= 3, "{sealed:?}");
    for number in sealed {
        let mut read = 0;
        let mut pace = |bytes: u64| {
            read += bytes;
            true
        };
        assert_eq!(log.check_segment(number, &mut pace), Checked::Whole);
        let path = path_of(number);
        for at in (0..read).step_by(7) {
            let bit = (at % 8) as u8;
            assert!(disk.flip_bit(&path, at, bit));
            let checked = log.check_segment(number, &mut |_| true);
            let told = matches!(
                &checked,
                Checked::Damaged(what) if what.contains(&*path.to_string_lossy())
            );
            assert!(told, "byte {at} of {}: {checked:?}", path.display());
            assert!(disk.flip_bit(&path, at, bit));
        }
        disk.fail_reads(&path);
        assert!(
            matches!(
                log.check_segment(number, &mut |_| true),
                Checked::Damaged(_)
            ),
            "what cannot be read"
        );
        disk.heal();
        assert_eq!(
            log.check_segment(number, &mut |_| false),
            Checked::Unread,
            "it was broken off"
        );
    }
}

#[test]
fn a_segment_goes_once_its_holders_have_purged_as_much() {
    let disk = SimDisk::new(2);
    let (log, mut writer) = filled(&disk);
    let damaged = log.sealed_segments()[1];
    let [(holder, upto)] = log.holders(damaged)[..] else {
        panic!("one replica holds it")
    };
    assert_eq!(holder, key(REPLICA.0, REPLICA.1));
    let replica = log.replica(holder).expect("it is there");
    let outcomes = Outcomes::default();
    replica.purge(id(1, upto - 1), outcomes.done());
    pump(&mut writer);
    assert!(log.has_segment(damaged), "its last entry is live");
    replica.purge(id(1, upto), outcomes.done());
    pump(&mut writer);
    assert_eq!(outcomes.good(), 2);
    assert!(!log.has_segment(damaged) && log.holders(damaged).is_empty());
    assert_eq!(
        log.check_segment(damaged, &mut |_| true),
        Checked::Unread,
        "it is gone"
    );
    assert!(
        log.sealed_segments().iter().all(|number| *number > damaged),
        "and those before it"
    );
}
