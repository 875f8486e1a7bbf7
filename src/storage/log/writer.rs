//! The one writer: takes what waits, writes it as one batch, syncs, calls back; and keeps the
//! segments in order.
//!
//! Everything here happens on one thread: [`LogWriter::run`] in production,
//! [`LogWriter::run_in_task`] or [`LogWriter::pump`] in a simulation. The ledger (with each
//! replica's [`super::index::LogIndex`]) is what a replay of the segments up to the active offset
//! would give.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::activity::WriterPhase;
use super::change::LogChange;
use super::disk_room::LogDiskRoom;
use super::handle::{Log, LogHandle, LogInner, Roster, SegmentView};
use super::index::{Contradiction, EntryLocation, LiveBytes};
use super::queue::{LogOp, QueuedWork, call};
use super::record::{
    self, HEADER_BYTES, LogRecord, NOBODY, RecordPlace, SMALL_RECORD_BYTES_MAX, SegmentHead,
};
use super::replay::{Replayed, replay};
use super::replica_state::ReplicaLogInner;
use super::segment::{ActiveSegment, PreparedSegment, SegmentFiles};
use super::{Done, Expect, LogEntry, LogFailure, LogOptions, OpenLogError, with_context};
use crate::blocking;
use crate::mutants::{self, Mutant};
use crate::storage::ReplicaKey;
use crate::storage::disk::{Disk, ensure_dir};
use crate::types::{GroupId, LogId, ReplicaId};

/// Larger segments would not be addressed by 32 bits together with the largest append.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Files kept to become segments again. One is enough: the next is prepared while it is written.
const PREPARED_MAX: usize = 1;
/// More segments than this, left by earlier openings and mostly empty, are cleaned: many restarts
/// leave many small ones.
const FRAGMENTS_MAX: usize = 8;
/// At least what a rebase writes beside the entries: a mark and what it restates.
const REBASE_OVERHEAD_BYTES: u64 = 256;
/// Between two looks for room on a full disk.
const ROOM_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of memory that one cached operation takes besides its own.
const CACHED_OP_BYTES: usize = 64;

/// The writing end of a log. Dropping it without [`LogWriter::run`] having ended is what a crash of
/// the process is: nothing more is written, and all that waits gets an error.
pub struct LogWriter {
    shared: Arc<LogInner>,
    files: SegmentFiles,
    options: LogOptions,
    ledger: LogLedger,
    active: ActiveSegment,
    sealed: BTreeMap<u64, SealedSegment>,
    prepared: Vec<PreparedSegment>,
    /// True if anything was written since the last closing mark.
    unmarked: bool,
    /// Operations appended to the caches, oldest first, and their bytes.
    cached: VecDeque<CachedOp>,
    cached_bytes: usize,
    buffer: Vec<u8>,
    stopped: bool,
}

/// A segment that is full.
struct SealedSegment {
    /// Bytes of its records without the head, which restates what is elsewhere.
    bytes: u64,
    /// Length of the file known to be written and synced; None if it was not written since this log
    /// was opened.
    allocated: Option<u64>,
}

struct CachedOp {
    replica: Arc<ReplicaLogInner>,
    seq: u64,
    bytes: usize,
}

/// The state that the segments amount to, up to the active offset.
struct LogLedger {
    replicas: BTreeMap<ReplicaKey, Arc<ReplicaLogInner>>,
    highest: BTreeMap<GroupId, ReplicaId>,
    live: LiveBytes,
}

/// A batch as it is encoded.
struct EncodedBatchRecords<'a> {
    buffer: &'a mut Vec<u8>,
    start: RecordPlace,
    records: u64,
}

impl EncodedBatchRecords<'_> {
    fn put(&mut self, key: ReplicaKey, record: &LogRecord) -> io::Result<EntryLocation> {
        let at = self.buffer.len();
        record::encode(self.buffer, self.start, key, record);
        self.records += 1;
        let too_far = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        Ok(EntryLocation {
            segment: self.start.segment,
            offset: u32::try_from(self.start.offset + at as u64).map_err(too_far)?,
            len: u32::try_from(self.buffer.len() - at).map_err(too_far)?,
        })
    }
}

impl Log {
    /// Opens the log in `dir`, reads it back and begins a new segment. Nothing is written further
    /// until the writer runs.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: LogOptions,
    ) -> Result<(Log, LogWriter), OpenLogError> {
        let (shared, writer) = open(disk, dir, options)?;
        Ok((
            Log {
                handle: Arc::new(LogHandle { shared }),
            },
            writer,
        ))
    }
}

/// Opens a log: see [`super::Log::open`].
fn open(
    disk: Arc<dyn Disk>,
    dir: &Path,
    options: LogOptions,
) -> Result<(Arc<LogInner>, LogWriter), OpenLogError> {
    let failed = |context: String| move |source| OpenLogError::Io { context, source };
    ensure_dir(&*disk, dir).map_err(failed(format!("create {}", dir.display())))?;
    let segment_bytes = options.segment_bytes.min(SEGMENT_BYTES_MAX);
    let files = SegmentFiles {
        disk,
        dir: dir.to_owned(),
        grow_bytes: options.grow_bytes,
        segment_bytes,
    };
    let replayed = replay(&files, options.binding)?;

    // A member's log is never begun anew: it would forget votes, and entries that others count on.
    if replayed.segments.is_empty() && options.expect == Expect::Existing {
        return Err(OpenLogError::Missing {
            dir: dir.to_owned(),
        });
    }
    begin(files, options, replayed).map_err(failed(format!("begin a segment in {}", dir.display())))
}

fn begin(
    files: SegmentFiles,
    options: LogOptions,
    replayed: Replayed,
) -> io::Result<(Arc<LogInner>, LogWriter)> {
    let Replayed {
        replicas,
        highest,
        live,
        segments,
        leftover,
        spares,
    } = replayed;
    let replicas: BTreeMap<_, _> = replicas
        .into_iter()
        .map(|(key, written)| (key, Arc::new(ReplicaLogInner::new(key, written))))
        .collect();
    let roster = Roster {
        replicas: replicas.clone(),
        highest: highest.clone(),
    };
    let ledger = LogLedger {
        replicas,
        highest,
        live,
    };
    let last = segments.last().map(|last| (last.number, last.end));
    let number = last.map_or(1, |(number, _)| number + 1);

    // How far a spare was written before a crash is not known, so none is used again.
    for path in spares {
        files.disk.remove(&path)?;
    }

    // The head says where the last segment ends. So a tail that was cut stays cut.
    let head = ledger.head(number, last.map(|(_, end)| end), options.binding);
    let active = files.begin(files.prepare()?, number, &head)?;
    if let Some(last) = segments.last() {
        // What is behind the end is never read again. That it is given back matters to small nodes
        // only: failing to is no error.
        let _ = last.file.set_len(last.end);
    }

    // A crash undid their removal. Replay has found everything live in the segments after them.
    for number in leftover {
        files.remove(number)?;
    }
    let mut views = BTreeMap::new();
    let mut sealed = BTreeMap::new();
    for segment in segments {
        sealed.insert(
            segment.number,
            SealedSegment {
                bytes: segment.end - segment.head_bytes,
                // Never used again: how far it was pre-written is not known.
                allocated: None,
            },
        );
        views.insert(
            segment.number,
            SegmentView {
                file: segment.file,
                path: segment.path,
                end: segment.end,
            },
        );
    }
    views.insert(
        number,
        SegmentView {
            file: active.file.clone(),
            path: active.path.clone(),
            end: active.offset,
        },
    );
    let room = LogDiskRoom::new(files.disk.clone(), files.dir.clone(), options.reserve_bytes);
    let shared = Arc::new(LogInner::new(roster, views, &options, room));
    let mut writer = LogWriter {
        shared: shared.clone(),
        files,
        options,
        ledger,
        active,
        sealed,
        prepared: Vec::new(),
        unmarked: false,
        cached: VecDeque::new(),
        cached_bytes: 0,
        buffer: Vec::new(),
        stopped: false,
    };
    writer.reclaim()?;

    // An unmarked log cleans when it is idle: many small segments do not wait for the next write.
    writer.unmarked = writer.has_fragments();
    Ok((shared, writer))
}

impl LogWriter {
    /// Writes what is issued until the log is closed or all its handles are dropped, then the
    /// closing mark. Blocks: it wants a thread of its own. Returns early if the log fails.
    pub fn run(mut self) {
        let idle = Duration::from_millis(self.options.idle_ms);
        while !self.stopped {
            // Only a log without its closing mark has something to do when idle: others sleep.
            self.shared.queue.wait(self.unmarked.then_some(idle));
            blocking::at_once(self.step());
        }
    }

    /// The same as a task, on a runtime with a clock: for simulation, where it waits as long as the
    /// disk is said to take.
    pub async fn run_in_task(mut self) {
        let idle = Duration::from_millis(self.options.idle_ms);
        while !self.stopped {
            let queue = &self.shared.queue;
            let elapsed = if self.unmarked {
                tokio::time::timeout(idle, queue.wait_in_task())
                    .await
                    .is_err()
            } else {
                queue.wait_in_task().await;
                false
            };
            if elapsed || !queue.is_empty() || queue.is_closing() {
                self.step().await;
            }
        }
    }

    async fn step(&mut self) {
        self.shared.activity.enter(WriterPhase::Writes);
        if !self.pump_in_task().await && self.shared.queue.is_closing() {
            // Nothing is synced from here on, so those who wait for an entry would wait for ever.
            self.stopped = true;
            let closed = LogFailure::closed();
            self.take_waiters()
                .into_iter()
                .for_each(|waiter| call(waiter, Some(&closed)));
        }
        self.shared.activity.enter(WriterPhase::Waits);
    }

    /// Writes and syncs what waits, and calls back. With nothing waiting, does what an idle log
    /// does: writes the closing mark, then cleans. False if there was nothing to do.
    pub fn pump(&mut self) -> bool {
        blocking::at_once(self.pump_in_task())
    }

    async fn pump_in_task(&mut self) -> bool {
        if self.stopped {
            return false;
        }
        if !self.unmarked && self.shared.queue.is_empty() {
            return false;
        }
        // Decided by what was taken: an operation may have come since the look above, and is not
        // marked yet then.
        let taken = self.shared.queue.take(self.options.batch_bytes_max);
        let idle = taken.ops.is_empty();
        self.unmarked = !idle;
        let segment = self.active.number;
        self.write_taken(taken).await;
        if self.stopped {
            return true;
        }
        let mut kept_up = self.reclaim();
        // Cleaning costs writes and a sync. Appends must not wait for it with every batch.
        if kept_up.is_ok() && (idle || segment != self.active.number) {
            kept_up = self.clean().await;
        }
        if let Err(error) = kept_up.and_then(|()| self.prepare_next()) {
            self.fail(&error, Vec::new());
        }
        true
    }

    /// Writes one batch and calls back, also where that fails.
    async fn write_taken(&mut self, taken: QueuedWork) {
        let QueuedWork { mut ops, committed } = taken;
        let need = ops.iter().map(|op| op.change.bytes()).sum::<usize>()
            + committed.len() * SMALL_RECORD_BYTES_MAX;
        let shared = self.shared.clone();
        let written = self.write_batch(need, |ledger, batch| {
            ops.iter_mut()
                .try_for_each(|op| ledger.write_op(op, batch))?;
            committed.into_iter().try_for_each(|(key, id)| {
                // A committed id is written only after its entry. A crash in between would leave an
                // id without one.
                match id.filter(|id| ledger.is_append_pending(key, *id)) {
                    Some(early) => {
                        shared.queue.return_committed(key, early);
                        Ok(())
                    }
                    None => ledger.write_committed(key, id, batch),
                }
            })
        });
        if let Err(error) = written.await {
            return self.fail(&error, ops);
        }

        // Waiters are called after the locks are released: a callback may issue the next operation.
        let mut last_seqs: BTreeMap<ReplicaKey, (Arc<ReplicaLogInner>, u64)> = BTreeMap::new();
        let mut dones = Vec::with_capacity(ops.len());
        for op in ops {
            // Apply and followers read the newest entries next, so these stay in memory.
            if let LogChange::Append(entries) = &op.change {
                let bytes = op.change.bytes() + CACHED_OP_BYTES * entries.len();
                self.cached_bytes += bytes;
                self.cached.push_back(CachedOp {
                    replica: op.replica.clone(),
                    seq: op.seq,
                    bytes,
                });
            }
            last_seqs.insert(op.replica.key, (op.replica, op.seq));
            dones.push(op.done);
        }
        for (replica, seq) in last_seqs.into_values() {
            dones.extend(replica.lock().set_synced(seq));
        }
        self.evict();
        self.shared.activity.enter(WriterPhase::CallsBack);
        dones.into_iter().for_each(|done| call(done, None));
        self.shared.activity.enter(WriterPhase::Writes);
    }

    /// Encodes what `fill` puts into a batch, writes it behind a mark, and syncs. `need` is at
    /// least what it takes.
    async fn write_batch(
        &mut self,
        need: usize,
        fill: impl FnOnce(&mut LogLedger, &mut EncodedBatchRecords) -> io::Result<()>,
    ) -> io::Result<()> {
        self.make_room((HEADER_BYTES + need) as u64).await?;
        let start = RecordPlace {
            binding: self.options.binding,
            segment: self.active.number,
            offset: self.active.offset,
        };

        // One large append must not keep its memory for as long as the process runs.
        self.buffer.clear();
        self.buffer.shrink_to(2 * self.options.batch_bytes_max);
        let mut batch = EncodedBatchRecords {
            buffer: &mut self.buffer,
            start,
            records: 0,
        };

        // The mark says that all before it was synced. Replay tells damage from a torn tail by it.
        batch.put(NOBODY, &LogRecord::Mark)?;
        fill(&mut self.ledger, &mut batch)?;

        let records = batch.records;
        let end = start.offset + self.buffer.len() as u64;
        assert!(
            self.active.first_batch <= start.offset && start.offset < end,
            "a batch begins behind the last one"
        );
        assert!(
            end + HEADER_BYTES as u64 <= self.active.allocated,
            "a batch is larger than the room that was made for it"
        );
        let context =
            |error| with_context(error, format_args!("write {}", self.active.path.display()));
        self.active
            .file
            .write_at(&self.buffer, start.offset)
            .map_err(context)?;

        // A failed sync is final: the kernel may drop the pages, and the next sync would succeed
        // without them.
        let began = Instant::now();
        blocking::wait_for_the_disk().await;
        if !mutants::is_on(Mutant::AnswerBeforeSync) {
            self.active.file.sync().map_err(|error| {
                with_context(error, format_args!("sync {}", self.active.path.display()))
            })?;
        }
        self.shared
            .count_batch(records, self.buffer.len() as u64, began.elapsed());

        // Readers see the batch only now that it is durable.
        self.active.offset = end;
        let mut segments = self.shared.segments.write();
        if let Some(view) = segments.get_mut(&self.active.number) {
            view.end = end;
        }
        Ok(())
    }

    /// Makes room for `bytes` in the active segment, or in a new one; waits where the disk is full.
    async fn make_room(&mut self, bytes: u64) -> io::Result<()> {
        let mut made = self.try_make_room(bytes);
        while let Err(error) = &made
            && self.may_wait_for_room(error)
        {
            if !self.shared.room.is_waited_for.swap(true, Ordering::Relaxed) {
                tracing::error!(%error, "the log waits for room on its disk: free some, and it \
                    goes on by itself");
            }
            // It does not hang: it looks, and tells of it by itself.
            self.shared.activity.enter(WriterPhase::Writes);
            blocking::pause(ROOM_PAUSE).await;
            made = self.try_make_room(bytes);
        }
        if self
            .shared
            .room
            .is_waited_for
            .swap(false, Ordering::Relaxed)
            && made.is_ok()
        {
            tracing::info!("there is room for the log again: it goes on");
        }
        made
    }

    /// Returns whether an error says that the disk is full, and there is time to wait.
    fn may_wait_for_room(&self, error: &io::Error) -> bool {
        let is_full = matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        );
        let is_ending =
            self.shared.queue.is_closing() || self.shared.room.is_given_up.load(Ordering::Relaxed);
        is_full && self.options.waits_for_room && !is_ending && blocking::may_pause()
    }

    fn try_make_room(&mut self, bytes: u64) -> io::Result<()> {
        let fits = self.active.offset + bytes + HEADER_BYTES as u64 <= self.files.segment_bytes;

        // An empty segment is not left: a batch that does not fit makes it larger.
        if !fits && self.active.offset > self.active.first_batch {
            self.next_segment()?;
        }
        self.files.reserve(&mut self.active, bytes)
    }

    fn next_segment(&mut self) -> io::Result<()> {
        let prepared = match self.prepared.pop() {
            Some(prepared) => prepared,
            None => self.files.prepare()?,
        };
        let number = self.active.number + 1;

        // The head restates all replicas, so older segments may go without losing a vote or a purge
        // point.
        let head = self
            .ledger
            .head(number, Some(self.active.offset), self.options.binding);
        let next = self.files.begin(prepared, number, &head)?;
        let sealed = std::mem::replace(&mut self.active, next);
        self.sealed.insert(
            sealed.number,
            SealedSegment {
                bytes: sealed.offset - sealed.first_batch,
                allocated: Some(sealed.allocated),
            },
        );

        // Readers must know the segment before an entry is located in it.
        let view = SegmentView {
            file: self.active.file.clone(),
            path: self.active.path.clone(),
            end: self.active.offset,
        };
        self.shared.segments.write().insert(number, view);
        Ok(())
    }

    /// Prepares the next segment when this one is three quarters full.
    fn prepare_next(&mut self) -> io::Result<()> {
        if self.prepared.is_empty() && self.active.offset > self.files.segment_bytes / 4 * 3 {
            match self.files.prepare() {
                Ok(prepared) => self.prepared.push(prepared),
                // There is room in this one yet: it is prepared when it is needed.
                Err(error) if self.may_wait_for_room(&error) => self.files.discard_next(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes the oldest segments out of the log while no live entry is in them. All that is encoded
    /// is synced here.
    fn reclaim(&mut self) -> io::Result<()> {
        // In order from the oldest: a gap in the numbers then shows replay what a crash brought
        // back.
        let oldest_live = self.ledger.live.oldest().unwrap_or(self.active.number);
        while let Some(entry) = self.sealed.first_entry()
            && *entry.key() < oldest_live
        {
            let (number, sealed) = entry.remove_entry();

            // Hidden from readers before the file is used again. Those that have it open see a
            // checksum fail.
            let view = self.shared.segments.write().remove(&number);

            // A file that one huge batch made large would hold its space for ever.
            let reusable = sealed
                .allocated
                .filter(|allocated| *allocated <= 2 * self.files.segment_bytes);
            match (view, reusable) {
                (Some(view), Some(allocated)) if self.prepared.len() < PREPARED_MAX => {
                    self.prepared
                        .push(self.files.retire(number, view.file, allocated)?);
                }
                _ => self.files.remove(number)?,
            }
        }
        Ok(())
    }

    /// Rebases small replicas that pin the oldest segment, while most of the log is dead.
    async fn clean(&mut self) -> io::Result<()> {
        // Bounded, because appends wait while entries are moved.
        let mut budget = self.files.segment_bytes / 4;
        while self.wants_cleaning() {
            let oldest = self.sealed.keys().next().copied();
            let Some(pinning) = oldest.and_then(|oldest| {
                self.ledger
                    .small_replicas_in(oldest, self.options.rebase_bytes_max)
            }) else {
                break;
            };
            for (replica, live_bytes) in pinning {
                if !self.rebase(&replica).await? {
                    return Ok(());
                }
                self.unmarked = true;
                match budget.checked_sub(live_bytes) {
                    Some(rest) => budget = rest,
                    None => return self.reclaim(),
                }
            }
            self.reclaim()?;

            // Nothing was freed, so another pass would rewrite the same entries again.
            if self.sealed.keys().next().copied() == oldest {
                break;
            }
        }
        Ok(())
    }

    /// Dead bytes are allowed to be as many as live ones, and two segments. What a rebase writes is
    /// within that, so cleaning ends.
    fn wants_cleaning(&self) -> bool {
        let sealed_bytes: u64 = self.sealed.values().map(|sealed| sealed.bytes).sum();
        let live_bytes =
            self.ledger.live.bytes + REBASE_OVERHEAD_BYTES * self.ledger.replicas.len() as u64;
        sealed_bytes > 2 * live_bytes + 2 * self.files.segment_bytes || self.has_fragments()
    }

    /// Returns true if earlier openings left many small segments.
    fn has_fragments(&self) -> bool {
        let replayed = || {
            self.sealed
                .values()
                .filter(|sealed| sealed.allocated.is_none())
        };
        let count = replayed().count();
        count > FRAGMENTS_MAX
            && replayed().map(|sealed| sealed.bytes).sum::<u64>()
                < count as u64 * self.files.segment_bytes / 4
    }

    /// Writes the replica's whole live state at the end of the log, in one synced batch. Readers
    /// are sent there only after that. False if an entry can't be read: it then stays where it is,
    /// and who needs it meets the error.
    async fn rebase(&mut self, replica: &Arc<ReplicaLogInner>) -> io::Result<bool> {
        // Only this thread changes what is written, so the lock need not be held while the disk is
        // read.
        let (head, located) = {
            let state = replica.lock();
            let ids = state.written.entries().map(|(index, entry)| {
                (
                    LogId {
                        term: entry.term,
                        index,
                    },
                    entry.spot,
                )
            });
            (state.written.head(), ids.collect::<Vec<_>>())
        };
        let read = located
            .into_iter()
            .map(|(id, spot)| self.shared.read_entry(replica.key, id, spot));
        let Ok(entries) = read.collect::<io::Result<Vec<LogEntry>>>() else {
            return Ok(false);
        };
        let need = SMALL_RECORD_BYTES_MAX + entries.iter().map(record::entry_len).sum::<usize>();
        let records = std::iter::once(LogRecord::Restate(head))
            .chain(entries.into_iter().map(LogRecord::Restated));
        let mut placed = Vec::new();
        self.write_batch(need, |_, batch| {
            for record in records {
                let spot = batch.put(replica.key, &record)?;
                placed.push((record, spot));
            }
            Ok(())
        })
        .await?;

        self.ledger.follow(replica, &placed)?;
        self.shared.counters().rebases += 1;
        Ok(true)
    }

    /// Keeps of what is synced only the latest in memory.
    fn evict(&mut self) {
        while self.cached_bytes > self.options.cache_bytes
            && let Some(oldest) = self.cached.pop_front()
        {
            self.cached_bytes -= oldest.bytes;
            oldest.replica.lock().evict(oldest.seq);
        }
    }

    /// The log is dead from here on: everyone who waits or comes gets the reason.
    fn fail(&mut self, error: &io::Error, ops: Vec<LogOp>) {
        self.stopped = true;
        let failure = LogFailure::new(error);

        // The queue refuses first. Whoever comes after that sees the refusal and is not left
        // waiting.
        let waiting = self.shared.queue.fail(failure.clone());
        self.shared.failed.send_replace(Some(failure.clone()));
        let waiters = self.take_waiters();
        let dones = ops
            .into_iter()
            .chain(waiting)
            .map(|op| op.done)
            .chain(waiters);
        dones.for_each(|done| call(done, Some(&failure)));
    }

    fn take_waiters(&self) -> Vec<Done> {
        // A replica just created is in the roster alone; one whose wiping waits is in the ledger
        // alone.
        let mut replicas: Vec<Arc<ReplicaLogInner>> =
            self.shared.roster().replicas.values().cloned().collect();
        replicas.extend(self.ledger.replicas.values().cloned());
        replicas
            .iter()
            .flat_map(|replica| replica.lock().take_waiters())
            .collect()
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        if !self.stopped {
            self.fail(
                &io::Error::new(io::ErrorKind::BrokenPipe, "its writer is gone"),
                Vec::new(),
            );
        }
    }
}

impl LogLedger {
    /// The encoded head of a segment.
    fn head(&self, segment: u64, previous_end: Option<u64>, binding: u128) -> Vec<u8> {
        let replicas = self
            .replicas
            .iter()
            .map(|(key, replica)| (*key, replica.lock().written.head()))
            .collect();
        let highest = self
            .highest
            .iter()
            .map(|(group, replica)| (*group, *replica))
            .collect();
        let mut bytes = Vec::new();
        let record = LogRecord::Head(SegmentHead {
            segment,
            previous_end,
            replicas,
            highest,
        });
        record::encode(
            &mut bytes,
            RecordPlace {
                binding,
                segment,
                offset: 0,
            },
            NOBODY,
            &record,
        );
        bytes
    }

    fn write_op(&mut self, op: &mut LogOp, batch: &mut EncodedBatchRecords) -> io::Result<()> {
        let key = op.replica.key;
        match &op.change {
            LogChange::Nothing => {}
            LogChange::Create => {
                batch.put(key, &LogRecord::Create)?;
                self.highest.insert(key.group, key.replica);
                self.replicas.insert(key, op.replica.clone());
            }
            LogChange::Wipe => {
                batch.put(key, &LogRecord::Wipe)?;

                // It stays in `highest`: a replica id is never used twice.
                self.replicas.remove(&key);
                op.replica.lock().written.wipe(&mut self.live);
            }
            LogChange::Append(entries) => {
                for entry in entries {
                    self.write_change(&op.replica, &LogRecord::Entry(entry.clone()), batch)?;
                }
            }
            LogChange::Vote(vote) => {
                self.write_change(&op.replica, &LogRecord::Vote(*vote), batch)?
            }
            LogChange::Truncate(to) => {
                self.write_change(&op.replica, &LogRecord::Truncate(*to), batch)?
            }
            LogChange::Purge(upto) => {
                self.write_change(&op.replica, &LogRecord::Purge(*upto), batch)?
            }
        }
        Ok(())
    }

    fn write_committed(
        &mut self,
        key: ReplicaKey,
        id: Option<LogId>,
        batch: &mut EncodedBatchRecords,
    ) -> io::Result<()> {
        match self.replicas.get(&key).cloned() {
            Some(replica) => self.write_change(&replica, &LogRecord::Committed(id), batch),
            // Wiped in this batch or before.
            None => Ok(()),
        }
    }

    /// Returns whether an operation that still waits is to write the entry with this id.
    fn is_append_pending(&self, key: ReplicaKey, id: LogId) -> bool {
        self.replicas
            .get(&key)
            .is_some_and(|replica| !replica.lock().written.has_entry(id))
    }

    /// Follows records that are written, as replay would. Nobody sees a part of them.
    fn follow(
        &mut self,
        replica: &ReplicaLogInner,
        records: &[(LogRecord, EntryLocation)],
    ) -> io::Result<()> {
        let mut state = replica.lock();
        let mut follow = |(record, spot): &(LogRecord, EntryLocation)| {
            state.written.apply(record, *spot, &mut self.live)
        };
        records
            .iter()
            .try_for_each(&mut follow)
            .map_err(|error| contradicts(replica.key, &error))
    }

    /// Encodes a record and follows it, as replay would.
    fn write_change(
        &mut self,
        replica: &ReplicaLogInner,
        record: &LogRecord,
        batch: &mut EncodedBatchRecords,
    ) -> io::Result<()> {
        let spot = batch.put(replica.key, record)?;
        let followed = replica.lock().written.apply(record, spot, &mut self.live);
        followed.map_err(|error| contradicts(replica.key, &error))
    }

    /// Those whose first live entry is in the segment, with their live bytes. None if one of them
    /// is larger than `bytes_max`.
    fn small_replicas_in(
        &self,
        segment: u64,
        bytes_max: u64,
    ) -> Option<Vec<(Arc<ReplicaLogInner>, u64)>> {
        let mut pinning = Vec::new();
        for replica in self.replicas.values() {
            let state = replica.lock();
            let first = state
                .written
                .entries()
                .next()
                .map(|(_, entry)| entry.spot.segment);
            let live_bytes = state.written.live_bytes();
            drop(state);
            if first == Some(segment) {
                if live_bytes > bytes_max {
                    // Moving the others would not free the segment.
                    return None;
                }
                pinning.push((replica.clone(), live_bytes));
            }
        }
        Some(pinning)
    }
}

fn contradicts(key: ReplicaKey, error: &Contradiction) -> io::Error {
    io::Error::other(format!("replica {key}: {error}"))
}
