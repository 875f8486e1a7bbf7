//! Writes everything that a node counts to the metrics page.

use std::collections::BTreeMap;
use std::fmt;

use super::context::NodeContext;
use super::controllers::scrub::ScrubCounts;
use super::controllers::watchdog::Findings;
use super::group_metrics;
use super::move_counters::Moved;
use super::replica_failures::FailureCounts;
use crate::budget::Budget;
use crate::metrics::{DescriptorEncoder, EncodeFamilies, HistogramCounts, Labels, seconds};
use crate::routing::reply;
use crate::sm::recovery::FailureCause;
use crate::sm::scrub::ScrubKind;
use crate::storage::log::{Log, LogMetrics, SYNC_BUCKETS_US};
use crate::storage::map::{MapMetrics, MapStore};

/// Writes everything that the node counts.
pub fn encode(
    encoder: &mut DescriptorEncoder<'_>,
    context: &NodeContext,
    log: &Log,
    states: &MapStore,
    findings: &Findings,
    scrubs: &ScrubCounts,
) -> fmt::Result {
    let (log_metrics, maps) = (log.metrics(), states.metrics());
    of_log(encoder, &log_metrics)?;
    of_maps(encoder, &maps)?;
    of_the_disk(encoder, &log_metrics, &maps)?;
    of_disk_room(encoder, log)?;
    of_moves(encoder, &context.moves.now())?;
    of_rooms(encoder, context)?;
    group_metrics::encode(encoder, context)?;
    of_failures(encoder, &context.failures.counts())?;
    encoder.gauge(
        "quorate_level",
        "The cluster's feature level, as this node knows it.",
        u64::from(context.view().level),
    )?;
    of_stalls(encoder, findings)?;
    of_scrubs(encoder, scrubs)
}

/// Writes what scrubs have read and found.
fn of_scrubs(encoder: &mut DescriptorEncoder<'_>, scrubs: &ScrubCounts) -> fmt::Result {
    encoder.counter(
        "quorate_scrubs_total",
        "Scrubs that have ended since the start.",
        scrubs.ended,
    )?;
    encoder.gauge(
        "quorate_scrub_last_end_timestamp_seconds",
        "When the last scrub ended; zero before the first has.",
        scrubs.last_end_seconds(),
    )?;
    encoder.counter(
        "quorate_scrub_read_bytes_total",
        "Bytes that scrubs have read.",
        scrubs.bytes,
    )?;
    encoder.counters(
        "quorate_scrub_damaged_total",
        "What scrubs found damaged.",
        by_kind(&scrubs.damaged),
    )?;
    encoder.counters(
        "quorate_scrub_mended_total",
        "What was mended of that.",
        by_kind(&scrubs.mended),
    )
}

/// Returns a sample for each kind, also for those without a count: a series that appears with its
/// first count hides that one from rates.
fn by_kind(counts: &BTreeMap<ScrubKind, u64>) -> impl Iterator<Item = (Labels<1>, u64)> {
    ScrubKind::ALL.into_iter().map(|kind| {
        let count = counts.get(&kind).copied().unwrap_or(0);
        (label("kind", kind.name()), count)
    })
}

fn label(name: &'static str, value: &str) -> Labels<1> {
    [(name, value.to_owned())]
}

fn of_log(encoder: &mut DescriptorEncoder<'_>, log: &LogMetrics) -> fmt::Result {
    let syncs =
        HistogramCounts::of_microseconds(&SYNC_BUCKETS_US, &log.sync_buckets, log.sync_us_total);
    encoder.histogram(
        "quorate_log_sync_duration_seconds",
        "How long the syncs of the log took.",
        &syncs,
    )?;
    encoder.histogram(
        "quorate_log_sync_seconds",
        "Deprecated, and to go after the next release: see quorate_log_sync_duration_seconds.",
        &syncs,
    )?;
    encoder.counter(
        "quorate_log_batches_total",
        "Batches written to the log: one sync each.",
        log.batches,
    )?;
    encoder.counter(
        "quorate_log_records_total",
        "Records written to the log; entries of all groups are among them.",
        log.records,
    )?;
    encoder.counter(
        "quorate_log_written_bytes_total",
        "Bytes written to the log.",
        log.bytes_written,
    )?;
    encoder.counter(
        "quorate_log_rebases_total",
        "Idle replicas rewritten so that old segments could be reused.",
        log.rebases,
    )?;
    encoder.gauge(
        "quorate_log_segments",
        "Segment files of the log.",
        log.segments,
    )?;
    encoder.gauge(
        "quorate_log_live_bytes",
        "Bytes of entries that are not purged.",
        log.live_bytes,
    )?;
    encoder.gauge(
        "quorate_log_queue_bytes",
        "Bytes that wait to be written to the log.",
        log.queue_bytes,
    )
}

/// Writes what is on the disk, by kind: how much of it is live says `quorate_log_live_bytes` and
/// `quorate_map_bytes`.
fn of_the_disk(
    encoder: &mut DescriptorEncoder<'_>,
    log: &LogMetrics,
    maps: &MapMetrics,
) -> fmt::Result {
    let bytes = [
        ("log", log.disk_bytes),
        ("maps", maps.trees_disk_bytes),
        ("snapshots", maps.snapshots_disk_bytes),
    ];
    encoder.gauges(
        "quorate_disk_bytes",
        "Bytes on the disk; those of the maps as of a few seconds ago.",
        bytes.map(|(kind, bytes)| (label("kind", kind), bytes)),
    )
}

/// Writes what is left of the disk, at the last look, and what that means.
fn of_disk_room(encoder: &mut DescriptorEncoder<'_>, log: &Log) -> fmt::Result {
    let (free, reserve) = log.free_bytes();
    encoder.gauge(
        "quorate_disk_free_bytes",
        "Bytes that are left on the disk of the log.",
        free,
    )?;
    encoder.gauge(
        "quorate_disk_reserve_bytes",
        "Free bytes below which writes are refused.",
        reserve,
    )?;
    encoder.gauge(
        "quorate_disk_takes_writes",
        "Whether the disk has room for writes.",
        u64::from(log.lacks_room().is_none()),
    )?;
    encoder.gauge(
        "quorate_log_waits_for_room",
        "Whether the log waits for room on its disk.",
        u64::from(log.waits_for_room()),
    )
}

fn of_maps(encoder: &mut DescriptorEncoder<'_>, maps: &MapMetrics) -> fmt::Result {
    encoder.gauge(
        "quorate_map_active_bytes",
        "Bytes in tables that take writes.",
        maps.active_bytes,
    )?;
    encoder.gauge(
        "quorate_map_frozen_bytes",
        "Bytes in tables that wait for a checkpoint.",
        maps.frozen_bytes,
    )?;
    encoder.gauge(
        "quorate_map_clean_bytes",
        "Bytes in tables that are written down and kept for gets.",
        maps.clean_bytes,
    )?;
    encoder.counter(
        "quorate_map_reads_elsewhere_total",
        "Reads that were done off the threads that serve, because reads waited for the disk.",
        maps.reads_elsewhere,
    )?;
    encoder.gauge(
        "quorate_map_bytes",
        "Bytes of keys and values of the maps that are written down.",
        maps.map_bytes,
    )?;
    encoder.counter(
        "quorate_map_copies_total",
        "Maps copied to give back the space of what was overwritten and deleted.",
        maps.trees_copied,
    )?;
    encoder.counter(
        "quorate_checkpoints_total",
        "Tables written to their trees.",
        maps.checkpoints,
    )?;
    encoder.counter(
        "quorate_checkpoint_seconds_total",
        "Time spent on checkpoints.",
        seconds(maps.checkpoint_us_total),
    )?;
    encoder.gauge(
        "quorate_checkpoint_seconds_max",
        "The longest checkpoint since the start.",
        seconds(maps.checkpoint_us_max),
    )?;
    encoder.counter(
        "quorate_snapshots_built_total",
        "Snapshot files written.",
        maps.snapshots_built,
    )?;
    encoder.counter(
        "quorate_snapshots_installed_total",
        "Snapshots received and installed.",
        maps.snapshots_installed,
    )?;
    encoder.counter(
        "quorate_snapshot_scans_given_up_total",
        "Scans for a snapshot that were begun anew.",
        maps.scans_given_up,
    )
}

/// Writes the metrics of slot moves, by the node that led the shard which the slots left.
fn of_moves(encoder: &mut DescriptorEncoder<'_>, moved: &Moved) -> fmt::Result {
    encoder.counter(
        "quorate_moves_total",
        "Moves of slots that this node has driven to their end.",
        moved.moves,
    )?;
    encoder.counter(
        "quorate_moved_slots_total",
        "Slots of these moves.",
        moved.slots,
    )?;
    encoder.counter(
        "quorate_moved_bytes_total",
        "Bytes of keys and values that it has sent to where they belong.",
        moved.bytes,
    )?;
    encoder.counter(
        "quorate_move_frozen_seconds_total",
        "Time that writes to moving slots had to wait.",
        seconds(moved.frozen_us_total),
    )?;
    encoder.gauge(
        "quorate_move_frozen_seconds_max",
        "The longest such time of one move since the start.",
        seconds(moved.frozen_us_max),
    )
}

/// Writes what groups and lanes hold together, and how often there was no room.
fn of_rooms(encoder: &mut DescriptorEncoder<'_>, context: &NodeContext) -> fmt::Result {
    let budgets = context.registry.budgets().named();
    let rooms = |value: fn(&Budget) -> u64| {
        budgets
            .iter()
            .map(move |(name, fair)| (label("room", name), value(fair.budget())))
    };
    encoder.gauges(
        "quorate_room_bytes",
        "Bytes that groups hold together: proposals, frames of peers, frames to be sent.",
        rooms(|budget| budget.used() as u64),
    )?;
    encoder.gauges(
        "quorate_room_bytes_max",
        "What they may hold.",
        rooms(|budget| budget.bytes_max() as u64),
    )?;
    encoder.counters(
        "quorate_room_refused_total",
        "Proposals and frames for which there was no room; they are tried again.",
        rooms(|budget| budget.refused()),
    )?;

    let lanes = context.registry.lane_limiter();
    encoder.gauge(
        "quorate_reply_bytes",
        "Bytes of replies of other nodes that are being read.",
        reply::budget().used(),
    )?;
    encoder.counter(
        "quorate_reply_refused_total",
        "Replies for which there was no room.",
        reply::budget().refused(),
    )?;
    encoder.gauge(
        "quorate_lanes_served",
        "Lanes from other nodes, and connections that may become some.",
        lanes.used(),
    )?;
    encoder.counter(
        "quorate_lanes_refused_total",
        "Lanes that found no place, or gave theirs up.",
        lanes.refused(),
    )
}

/// Writes how many replicas do not run, by cause: as many samples as there are causes.
fn of_failures(encoder: &mut DescriptorEncoder<'_>, counts: &FailureCounts) -> fmt::Result {
    encoder.gauges(
        "quorate_replicas_failed",
        "Replicas of this node that could not be opened, or have stopped, and do not run now.",
        FailureCause::ALL.map(|cause| {
            let count = counts.now.get(&cause).copied().unwrap_or(0);
            (label("cause", cause.name()), count)
        }),
    )?;
    encoder.gauge(
        "quorate_replica_failed_seconds",
        "For how long the one of them that failed first has not run.",
        counts.longest.as_secs_f64(),
    )?;
    encoder.counter(
        "quorate_replica_failures_total",
        "How often a replica of this node could not be opened, or stopped.",
        counts.failed_total,
    )?;
    encoder.counter(
        "quorate_replicas_recovered_total",
        "How often a replica that had failed was opened again.",
        counts.recovered_total,
    )
}

/// Writes what the watchdog has found.
fn of_stalls(encoder: &mut DescriptorEncoder<'_>, findings: &Findings) -> fmt::Result {
    encoder.gauges(
        "quorate_stalled_seconds",
        "For how long a part of this node has not got any further though it had something to do.",
        findings
            .threads_ms()
            .map(|(part, ms)| (label("part", part), ms as f64 / 1000.0)),
    )?;
    encoder.counter(
        "quorate_step_downs_total",
        "Leaderships that were handed over because the disk or a map of this node held them \
        up.",
        findings.step_downs(),
    )
}
