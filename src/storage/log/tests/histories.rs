//! Random histories of many replicas in small segments, ended by crashes of every kind, over and
//! over.

use super::*;

/// End of a log's life; with a power cut after that or not.
#[derive(Debug, Clone, Copy)]
enum End {
    Kill,
    Close,
    FailedSync,
    FailedWrite,
    DiskFull,
}

const ENDS: [End; 5] = [
    End::Kill,
    End::Close,
    End::FailedSync,
    End::FailedWrite,
    End::DiskFull,
];

fn live(attack: &mut Attack, ops: usize) {
    for _ in 0..ops {
        attack.issue();
        match attack.random.random_range(0..12) {
            0..=2 => {
                attack.writer.pump();
            }
            3 => pump(&mut attack.writer),
            _ => {}
        }
    }
}

fn end(attack: &mut Attack, end: End) {
    match end {
        End::Close => {
            attack.log.close();
            pump(&mut attack.writer);
        }
        End::Kill => {}
        End::FailedSync => attack
            .disk
            .fail_sync_after(attack.random.random_range(0..6)),
        End::FailedWrite => attack
            .disk
            .fail_write_after(attack.random.random_range(0..6)),
        End::DiskFull => {
            let used: u64 = attack.disk.files().iter().map(|(_, len)| len).sum();
            attack
                .disk
                .set_capacity(Some(used + attack.random.random_range(0..2000)));
        }
    }
    if matches!(end, End::FailedSync | End::FailedWrite | End::DiskFull) {
        live_failing(attack);
    }
    attack.disk.heal();
}

/// Goes on until the log has failed, and holds that nothing succeeds after that.
fn live_failing(attack: &mut Attack) {
    for _ in 0..300 {
        attack.issue();
        attack.writer.pump();
        if attack.log.failed().borrow().is_some() {
            break;
        }
    }
    let acked = |attack: &Attack| attack.histories.values().map(History::acked).sum::<usize>();
    let failed = attack.log.failed().borrow().is_some();
    let before = acked(attack);
    for _ in 0..10 {
        attack.issue();
        assert!(!failed || !attack.writer.pump(), "a failed log goes on");
    }
    assert!(
        !failed || acked(attack) == before,
        "a failed log acknowledges"
    );
}

fn reopen(attack: &mut Attack, what: &str, power_cut: bool) {
    // The handle that is dropped here must not write.
    let (log, writer) = open(&SimDisk::new(0).with_root(), &attack.options).expect("an empty log");
    let _ = (
        std::mem::replace(&mut attack.log, log),
        std::mem::replace(&mut attack.writer, writer),
    );
    if power_cut {
        attack.disk.crash();
    }
    let (log, writer) =
        open(&attack.disk, &attack.options).unwrap_or_else(|error| panic!("{what}: {error}"));
    attack.check_found(&log, what, |acked, _| acked);
    attack.go_on(log, writer);
    // What an opening found is durable, whatever the page cache held.
    let fork = attack.disk.fork();
    fork.crash();
    let (log, _writer) =
        open(&fork, &attack.options).unwrap_or_else(|error| panic!("{what}, power cut: {error}"));
    attack.check_found(&log, &format!("{what}, power cut"), |_, last| last);
}

trait WithRoot {
    fn with_root(self) -> Self;
}

impl WithRoot for SimDisk {
    fn with_root(self) -> Self {
        ensure_dir(&self, Path::new("/node")).expect("a directory");
        self
    }
}

fn attack(seed: u64, lives: usize) -> Attack {
    let mut attack = Attack::new(seed, small());
    for life in 0..lives {
        let ending = ENDS[attack.random.random_range(0..ENDS.len())];
        let power_cut = attack.random.random_bool(0.5);
        let what = format!("seed {seed}, life {life}, {ending:?}, power cut: {power_cut}");
        let ops = attack.random.random_range(0..120);
        live(&mut attack, ops);
        attack.check_issued(&what);
        end(&mut attack, ending);
        reopen(&mut attack, &what, power_cut);
    }
    attack
}

#[test]
fn after_every_crash_a_log_holds_what_was_acknowledged_and_nothing_else() {
    for seed in 0..170 {
        attack(seed, 8);
    }
}

#[test]
fn a_long_history_keeps_few_segments() {
    for seed in 100..103 {
        let mut attack = Attack::new(seed, small());
        for _ in 0..3000 {
            attack.issue();
            if attack.random.random_bool(0.3) {
                attack.writer.pump();
            }
            let pins = attack.log.segments_pinned_by();
            let held = pins.iter().filter(|pin| {
                pin.held_bytes > 30_000 && pin.live_bytes > attack.options.rebase_bytes_max
            });
            held.map(|pin| pin.key)
                .collect::<Vec<_>>()
                .into_iter()
                .for_each(|key| attack.purge_all(key));
        }
        pump(&mut attack.writer);
        attack.check_issued(&format!("seed {seed}"));
        let metrics = attack.log.metrics();
        assert!(
            metrics.rebases > 0 && metrics.segments < 40,
            "seed {seed}: {metrics:?} {:?}",
            attack.log.segments_pinned_by()
        );
    }
}
