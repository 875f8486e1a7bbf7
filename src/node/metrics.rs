//! Counts everything of a node, as families of samples; how they look on a page is the business of
//! `http`.

use std::collections::BTreeMap;

use super::context::NodeContext;
use super::controllers::scrub::ScrubCounts;
use super::controllers::watchdog::Findings;
use super::group_metrics;
use super::metric_family::{Family, FamilyKind, Sample, family, one};
use super::move_counters::Moved;
use super::replica_failures::FailureCounts;
use crate::budget::Budget;
use crate::raft::FairBudget;
use crate::routing::reply;
use crate::sm::recovery::FailureCause;
use crate::sm::scrub::ScrubKind;
use crate::storage::log::{Log, LogMetrics, SYNC_BUCKETS_US};
use crate::storage::map::{MapMetrics, MapStore};

/// Everything that the node counts.
pub fn families(
    context: &NodeContext,
    log: &Log,
    states: &MapStore,
    findings: &Findings,
    scrubs: &ScrubCounts,
) -> Vec<Family> {
    let of_room = of_disk_room(log);
    let (log, maps) = (log.metrics(), states.metrics());
    let mut all = of_log(&log);
    all.extend(of_states(&maps));
    all.push(of_the_disk(&log, &maps));
    all.extend(of_room);
    all.extend(of_moves(&context.moves.now()));
    all.extend(of_rooms(context));
    all.extend(group_metrics::families(context));
    all.extend(of_failures(&context.failures.counts()));
    all.push(of_level(context));
    all.extend(of_stalls(findings));
    all.extend(of_scrubs(scrubs));
    all
}

/// Returns what scrubs have read and found.
fn of_scrubs(scrubs: &ScrubCounts) -> Vec<Family> {
    use FamilyKind::{Counter, Gauge};
    let by_kind = |counts: &BTreeMap<ScrubKind, u64>| {
        let sample = |kind: ScrubKind| {
            let value = counts.get(&kind).copied().unwrap_or(0) as f64;
            Sample {
                suffix: "",
                labels: vec![("kind", kind.name().to_owned())],
                value,
            }
        };

        // Kinds without a count too: a series that appears with its first count hides that one
        // from rates.
        ScrubKind::ALL.into_iter().map(sample).collect::<Vec<_>>()
    };
    vec![
        one(
            "quorate_scrubs_total",
            Counter,
            "Scrubs that have ended since the start.",
            scrubs.ended as f64,
        ),
        one(
            "quorate_scrub_last_end_timestamp_seconds",
            Gauge,
            "When the last scrub ended; zero before the first has.",
            scrubs.last_end_seconds(),
        ),
        one(
            "quorate_scrub_read_bytes_total",
            Counter,
            "Bytes that scrubs have read.",
            scrubs.bytes as f64,
        ),
        family(
            "quorate_scrub_damaged_total",
            Counter,
            "What scrubs found damaged.",
            by_kind(&scrubs.damaged),
        ),
        family(
            "quorate_scrub_mended_total",
            Counter,
            "What was mended of that.",
            by_kind(&scrubs.mended),
        ),
    ]
}

const SECONDS_PER_US: f64 = 1e-6;

fn of_log(log: &LogMetrics) -> Vec<Family> {
    use FamilyKind::{Counter, Gauge};
    vec![
        family(
            "quorate_log_sync_duration_seconds",
            FamilyKind::Histogram,
            "How long the syncs of the log took.",
            syncs(log),
        ),
        family(
            "quorate_log_sync_seconds",
            FamilyKind::Histogram,
            "Deprecated, and to go after the next release: see quorate_log_sync_duration_seconds.",
            syncs(log),
        ),
        one(
            "quorate_log_batches_total",
            Counter,
            "Batches written to the log: one sync each.",
            log.batches as f64,
        ),
        one(
            "quorate_log_records_total",
            Counter,
            "Records written to the log; entries of all groups are among them.",
            log.records as f64,
        ),
        one(
            "quorate_log_written_bytes_total",
            Counter,
            "Bytes written to the log.",
            log.bytes_written as f64,
        ),
        one(
            "quorate_log_rebases_total",
            Counter,
            "Idle replicas rewritten so that old segments could be reused.",
            log.rebases as f64,
        ),
        one(
            "quorate_log_segments",
            Gauge,
            "Segment files of the log.",
            log.segments as f64,
        ),
        one(
            "quorate_log_live_bytes",
            Gauge,
            "Bytes of entries that are not purged.",
            log.live_bytes as f64,
        ),
        one(
            "quorate_log_queue_bytes",
            Gauge,
            "Bytes that wait to be written to the log.",
            log.queue_bytes as f64,
        ),
    ]
}

fn seconds(us: u64) -> f64 {
    us as f64 * SECONDS_PER_US
}

/// Returns the parts of a histogram of the log's syncs.
fn syncs(log: &LogMetrics) -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut sum = 0;
    for (index, count) in log.sync_buckets.iter().enumerate() {
        sum += count;
        let bound = SYNC_BUCKETS_US
            .get(index)
            .map_or("+Inf".to_owned(), |us| seconds(*us).to_string());
        samples.push(Sample {
            suffix: "_bucket",
            labels: vec![("le", bound)],
            value: sum as f64,
        });
    }
    samples.push(Sample {
        suffix: "_sum",
        labels: Vec::new(),
        value: seconds(log.sync_us_total),
    });
    samples.push(Sample {
        suffix: "_count",
        labels: Vec::new(),
        value: sum as f64,
    });
    samples
}

/// Returns what is on the disk, by kind: how much of it is live says `quorate_log_live_bytes` and
/// `quorate_map_bytes`.
fn of_the_disk(log: &LogMetrics, maps: &MapMetrics) -> Family {
    let sample = |kind: &str, bytes: u64| Sample {
        suffix: "",
        labels: vec![("kind", kind.to_owned())],
        value: bytes as f64,
    };
    let samples = vec![
        sample("log", log.disk_bytes),
        sample("maps", maps.trees_disk_bytes),
        sample("snapshots", maps.snapshots_disk_bytes),
    ];
    family(
        "quorate_disk_bytes",
        FamilyKind::Gauge,
        "Bytes on the disk; those of the maps as of a few seconds ago.",
        samples,
    )
}

/// Returns what is left of the disk, at the last look, and what that means.
fn of_disk_room(log: &Log) -> Vec<Family> {
    use FamilyKind::Gauge;
    let (free, reserve) = log.free_bytes();
    let takes_writes = f64::from(u8::from(log.lacks_room().is_none()));
    let waits = f64::from(u8::from(log.waits_for_room()));
    vec![
        one(
            "quorate_disk_free_bytes",
            Gauge,
            "Bytes that are left on the disk of the log.",
            free as f64,
        ),
        one(
            "quorate_disk_reserve_bytes",
            Gauge,
            "Free bytes below which writes are refused.",
            reserve as f64,
        ),
        one(
            "quorate_disk_takes_writes",
            Gauge,
            "Whether the disk has room for writes.",
            takes_writes,
        ),
        one(
            "quorate_log_waits_for_room",
            Gauge,
            "Whether the log waits for room on its disk.",
            waits,
        ),
    ]
}

fn of_states(state: &MapMetrics) -> Vec<Family> {
    use FamilyKind::{Counter, Gauge};
    vec![
        one(
            "quorate_map_active_bytes",
            Gauge,
            "Bytes in tables that take writes.",
            state.active_bytes as f64,
        ),
        one(
            "quorate_map_frozen_bytes",
            Gauge,
            "Bytes in tables that wait for a checkpoint.",
            state.frozen_bytes as f64,
        ),
        one(
            "quorate_map_clean_bytes",
            Gauge,
            "Bytes in tables that are written down and kept for gets.",
            state.clean_bytes as f64,
        ),
        one(
            "quorate_map_reads_elsewhere_total",
            Counter,
            "Reads that were done off the threads that serve, because reads waited for the disk.",
            state.reads_elsewhere as f64,
        ),
        one(
            "quorate_map_bytes",
            Gauge,
            "Bytes of keys and values of the maps that are written down.",
            state.map_bytes as f64,
        ),
        one(
            "quorate_map_copies_total",
            Counter,
            "Maps copied to give back the space of what was overwritten and deleted.",
            state.trees_copied as f64,
        ),
        one(
            "quorate_checkpoints_total",
            Counter,
            "Tables written to their trees.",
            state.checkpoints as f64,
        ),
        one(
            "quorate_checkpoint_seconds_total",
            Counter,
            "Time spent on checkpoints.",
            seconds(state.checkpoint_us_total),
        ),
        one(
            "quorate_checkpoint_seconds_max",
            Gauge,
            "The longest checkpoint since the start.",
            seconds(state.checkpoint_us_max),
        ),
        one(
            "quorate_snapshots_built_total",
            Counter,
            "Snapshot files written.",
            state.snapshots_built as f64,
        ),
        one(
            "quorate_snapshots_installed_total",
            Counter,
            "Snapshots received and installed.",
            state.snapshots_installed as f64,
        ),
        one(
            "quorate_snapshot_scans_given_up_total",
            Counter,
            "Scans for a snapshot that were begun anew.",
            state.scans_given_up as f64,
        ),
    ]
}

/// Returns the metrics of slot moves, by the node that led the shard which the slots left.
fn of_moves(moved: &Moved) -> Vec<Family> {
    use FamilyKind::{Counter, Gauge};
    vec![
        one(
            "quorate_moves_total",
            Counter,
            "Moves of slots that this node has driven to their end.",
            moved.moves as f64,
        ),
        one(
            "quorate_moved_slots_total",
            Counter,
            "Slots of these moves.",
            moved.slots as f64,
        ),
        one(
            "quorate_moved_bytes_total",
            Counter,
            "Bytes of keys and values that it has sent to where they belong.",
            moved.bytes as f64,
        ),
        one(
            "quorate_move_frozen_seconds_total",
            Counter,
            "Time that writes to moving slots had to wait.",
            seconds(moved.frozen_us_total),
        ),
        one(
            "quorate_move_frozen_seconds_max",
            Gauge,
            "The longest such time of one move since the start.",
            seconds(moved.frozen_us_max),
        ),
    ]
}

/// Returns what groups and lanes hold together, and how often there was no room.
fn of_rooms(context: &NodeContext) -> Vec<Family> {
    use FamilyKind::{Counter, Gauge};
    let budgets = context.registry.budgets().named();
    let samples = |value: fn(&Budget) -> f64| {
        let sample = |(name, fair): &(&'static str, &FairBudget)| Sample {
            suffix: "",
            labels: vec![("room", (*name).to_owned())],
            value: value(fair.budget()),
        };
        budgets.iter().map(sample).collect()
    };
    let used = samples(|budget| budget.used() as f64);
    let max = samples(|budget| budget.bytes_max() as f64);
    let refused = samples(|budget| budget.refused() as f64);
    let lanes = context.registry.lane_limiter();
    vec![
        family(
            "quorate_room_bytes",
            Gauge,
            "Bytes that groups hold together: proposals, frames of peers, frames to be sent.",
            used,
        ),
        family("quorate_room_bytes_max", Gauge, "What they may hold.", max),
        family(
            "quorate_room_refused_total",
            Counter,
            "Proposals and frames for which there was no room; they are tried again.",
            refused,
        ),
        one(
            "quorate_reply_bytes",
            Gauge,
            "Bytes of replies of other nodes that are being read.",
            reply::budget().used() as f64,
        ),
        one(
            "quorate_reply_refused_total",
            Counter,
            "Replies for which there was no room.",
            reply::budget().refused() as f64,
        ),
        one(
            "quorate_lanes_served",
            Gauge,
            "Lanes from other nodes, and connections that may become some.",
            lanes.used() as f64,
        ),
        one(
            "quorate_lanes_refused_total",
            Counter,
            "Lanes that found no place, or gave theirs up.",
            lanes.refused() as f64,
        ),
    ]
}

/// Returns how many replicas do not run, by cause: as many samples as there are causes.
fn of_failures(counts: &FailureCounts) -> Vec<Family> {
    use FamilyKind::{Counter, Gauge};
    let sample = |cause: FailureCause| Sample {
        suffix: "",
        labels: vec![("cause", cause.name().to_owned())],
        value: counts.now.get(&cause).copied().unwrap_or(0) as f64,
    };
    vec![
        family(
            "quorate_replicas_failed",
            Gauge,
            "Replicas of this node that could not be opened, or have stopped, and do not run now.",
            FailureCause::ALL.into_iter().map(sample).collect(),
        ),
        one(
            "quorate_replica_failed_seconds",
            Gauge,
            "For how long the one of them that failed first has not run.",
            counts.longest.as_secs_f64(),
        ),
        one(
            "quorate_replica_failures_total",
            Counter,
            "How often a replica of this node could not be opened, or stopped.",
            counts.failed_total as f64,
        ),
        one(
            "quorate_replicas_recovered_total",
            Counter,
            "How often a replica that had failed was opened again.",
            counts.recovered_total as f64,
        ),
    ]
}

fn of_level(context: &NodeContext) -> Family {
    let level = f64::from(context.view().level);
    one(
        "quorate_level",
        FamilyKind::Gauge,
        "The cluster's feature level, as this node knows it.",
        level,
    )
}

/// Returns what the watchdog has found.
fn of_stalls(findings: &Findings) -> Vec<Family> {
    use FamilyKind::{Counter, Gauge};
    let sample = |(part, ms): (&str, u64)| Sample {
        suffix: "",
        labels: vec![("part", part.to_owned())],
        value: ms as f64 / 1000.0,
    };
    let stalled = findings.threads_ms().into_iter().map(sample).collect();
    vec![
        family(
            "quorate_stalled_seconds",
            Gauge,
            "For how long a part of this node has not got any further though it had something to \
            do.",
            stalled,
        ),
        one(
            "quorate_step_downs_total",
            Counter,
            "Leaderships that were handed over because the disk or a map of this node held them \
            up.",
            findings.step_downs() as f64,
        ),
    ]
}
