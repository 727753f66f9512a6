//! `Volume`: the handle the daemon holds, and `Shared`, what all rooms behind it share.
//!
//! The daemon calls it; `open` makes it. The path of a request is in `read_path` and `write_path`, of a
//! snapshot in `snapshot`, the order of syncs in `commit`.
//! Locks, in the order they may be taken: `maintenance`, the round's own, `core`. No data I/O happens
//! under `core`, only journal appends (page cache) and index page reads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ahead::Ahead;
use crate::checkpoint::Checkpoint;
use crate::commit::Rounds;
use crate::confirm::Unconfirmed;
use crate::error::{FileName, Result, StoreError};
use crate::index_room::IndexRoom;
use crate::io::BlockFile;
use crate::journal::{Journal, Record};
use crate::pins::{PinGeneration, Pins};
use crate::reclaim::Reclaim;
use crate::reserve::Reserve;
use crate::scan::Scan;
use crate::settle::Settle;
use crate::snapshot_table::SnapshotInfo;
use crate::space::{LogRun, Space};
use crate::state::{Puts, State};
use crate::superblock::Superblock;
use crate::units::{BLOCK_BYTES, BootId, Epoch, Generation, Sequence, SetId, SnapshotId, VolumeId};

/// The files of a volume.
#[derive(Clone, Debug)]
pub struct VolumeFiles {
    /// The adopted file or block device.
    pub base: Arc<dyn BlockFile>,
    /// Two superblock slots.
    pub superblock: Arc<dyn BlockFile>,
    /// Two journal regions, then data blocks: for the data, and for all syncs.
    pub log: Arc<dyn BlockFile>,
    /// A second handle on the same inode, through the page cache: for the journal regions.
    pub journal: Arc<dyn BlockFile>,
    /// Runs of the index and snapshot tables.
    pub index: Arc<dyn BlockFile>,
}

/// A file whose bytes the caller moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataFile {
    /// The base.
    Base,
    /// The log.
    Log,
}

/// How a volume is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// O_DIRECT for base and log, where the filesystem allows it.
    pub direct: bool,
    /// No writes at all, recovery included: the journal is replayed in memory only.
    pub read_only: bool,
    /// Open although the base was changed by somebody else.
    pub force_base: bool,
    /// How long to wait for the locks: I/O that a killed daemon has under way ends by itself.
    pub lock_wait: Duration,
    /// Id of a newly adopted volume; an existing one must have it. Random if absent.
    pub volume_id: Option<VolumeId>,
    /// The machine's boot id; read from the kernel if absent.
    pub boot_id: Option<BootId>,
    /// Bytes of the log that are set aside, and given back, at a time.
    pub segment_bytes: u64,
    /// Segments of free blocks that are kept ready: written with zeroes in the background, before anything is redirected
    /// or preserved there. 0: one, and only set aside.
    pub segments_ahead: u64,
    /// Most bytes of data the log may grow to; its journal regions come on top.
    pub log_limit_bytes: u64,
    /// Records in memory after which a checkpoint is due; at four times as many, writes wait for it.
    pub memtable_records: usize,
    /// Bytes of a journal after which a checkpoint is due, at most an eighth of its region; at four times as
    /// many, writes wait for it.
    pub journal_bytes: u64,
    /// Bytes of each of the two journal regions, at adoption: a multiple of 4096 from 16 KiB to 1 GiB.
    pub journal_region_bytes: u64,
    /// Index pages kept in memory.
    pub cache_pages: usize,
    /// Zeroes written to each journal at adoption, in bytes, so that appending allocates nothing.
    pub journal_prewritten_bytes: u64,
    /// Old data may be overwritten before its copy and the PRESERVE that names it are durable. Off, but for a measurement of what
    /// that order costs: with it neither I3 nor I10 holds after a power cut, and snapshots may show new data.
    pub relaxed_order: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            direct: true,
            read_only: false,
            force_base: false,
            lock_wait: Duration::from_secs(5),
            volume_id: None,
            boot_id: None,
            segment_bytes: 16 << 20,
            segments_ahead: 4,
            log_limit_bytes: u64::MAX,
            // At four times as many, replay still ends within the time that a start may take.
            memtable_records: 64 << 10,
            journal_bytes: 2 << 20,
            cache_pages: 4096,
            journal_region_bytes: crate::layout::JOURNAL_REGION_BYTES,
            journal_prewritten_bytes: crate::layout::JOURNAL_PREWRITTEN_BYTES,
            relaxed_order: false,
        }
    }
}

/// Figures of a volume.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct VolumeStatus {
    /// The open epoch.
    pub epoch: Epoch,
    /// Number of snapshots.
    pub snapshots: usize,
    /// Records of the index: versions and redirected blocks, upper bound.
    pub index_records: u64,
    /// Runs on disk that a look-up may have to go through.
    pub index_runs: usize,
    /// It is not known yet which blocks of the log are free: until it is, all count as used, and the log grows.
    pub scanning: bool,
    /// Bytes of the log in use.
    pub log_used_bytes: u64,
    /// Bytes of the log set aside.
    pub log_backed_bytes: u64,
    /// Zeroes written to the log ahead of its use since the volume was opened, in bytes.
    pub log_ahead_bytes: u64,
    /// Journal records that no commit covers.
    pub pending_records: u64,
    /// Whether a failed sync made the volume refuse writes.
    pub poisoned: bool,
    /// Whether the base alone is the disk.
    pub plain: bool,
    /// fdatasync calls on base and log since the volume was opened.
    pub syncs: SyncCounters,
}

/// How often each file was synced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SyncCounters {
    /// The base.
    pub base: u64,
    /// The log, with the journal in it.
    pub log: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) base_syncs: AtomicU64,
    pub(crate) log_syncs: AtomicU64,
    pub(crate) ahead_bytes: AtomicU64,
}

/// The flags that a request looks at before it takes any lock.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// No snapshot, empty index: everything is in the base.
    pub(crate) plain: AtomicBool,
    pub(crate) poisoned: AtomicBool,
    pub(crate) closed: AtomicBool,
    /// The reserve's space is with the index: no write takes any more from the file system.
    pub(crate) reserve_lent: AtomicBool,
    /// New writes are refused while a snapshot is taken.
    pub(crate) held: AtomicBool,
    pub(crate) writes_in_flight: AtomicU64,
    /// Completed writes that no sync covers.
    pub(crate) base_dirty: AtomicBool,
    pub(crate) log_dirty: AtomicBool,
}

/// How far the sweep of the log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sweep {
    /// None is under way.
    #[default]
    Idle,
    /// A checkpoint is noting what is in use.
    Marking,
    /// That checkpoint is durable; I/O planned before it must end first (I6).
    Waiting(PinGeneration),
    /// What is left is freed, from this segment on.
    Freeing(u64),
}

/// What is behind the lock that requests take.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) state: State,
    pub(crate) space: Space,
    pub(crate) journal: Journal,
    pub(crate) pins: Pins,
    /// Blocks whose location a write in flight changes: first to last.
    pub(crate) busy: BTreeMap<u64, u64>,
    /// Blocks being settled; a write takes its block out.
    pub(crate) settling: BTreeSet<u64>,
    /// Log blocks allocated by plans that no record names yet.
    pub(crate) reserved: BTreeMap<u64, u64>,
    /// Records that plans in flight may append: they find room.
    pub(crate) promised_records: u64,
    /// Data that must not change yet.
    pub(crate) unconfirmed: Unconfirmed,
    /// The sweep that frees what checkpoints dropped.
    pub(crate) sweep: Sweep,
    /// Something was dropped that only a checkpoint gives back.
    pub(crate) reclaim: bool,
    /// Blocks were settled since the last sweep began.
    pub(crate) settled: bool,
    /// Blocks whose log space a discard gave up since the last checkpoint.
    pub(crate) discarded_blocks: u64,
    /// Counts changes of the index.
    pub(crate) changes: u64,
}

/// What control operations and background steps share.
#[derive(Debug)]
pub(crate) struct Maintenance {
    pub(crate) superblock: Superblock,
    /// Free pages of the index file.
    pub(crate) room: IndexRoom,
    /// Of the next run or snapshot table.
    pub(crate) next_generation: Generation,
    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) reclaim: Option<Reclaim>,
    /// A sweep has begun; when no checkpoint is under way any more, the merge that ends it is due.
    pub(crate) sweep_due: bool,
    pub(crate) scan: Option<Scan>,
    pub(crate) settle: Settle,
    pub(crate) ahead: Ahead,
    pub(crate) reserve: Reserve,
    /// The base has this length for a growth, and zeroes behind the volume's end; 0: it has none to come.
    pub(crate) extended_bytes: u64,
}

/// Everything behind a volume.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) files: VolumeFiles,
    pub(crate) id: VolumeId,
    /// Changed under `maintenance` with writes held, and none in flight.
    pub(crate) size_bytes: AtomicU64,
    pub(crate) options: OpenOptions,
    pub(crate) gate: Gate,
    pub(crate) counters: Counters,
    pub(crate) core: Mutex<Core>,
    pub(crate) rounds: Rounds,
    /// Held from a sync of the base until its failure is known to all: the kernel tells of it only once.
    pub(crate) base_sync: Mutex<()>,
    pub(crate) maintenance: Mutex<Maintenance>,
}

/// Takes a lock. A panic elsewhere is no reason for a second one: invariants are re-checked on disk.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// Whether a write in flight moves one of the blocks.
    pub(crate) fn is_busy(&self, first: u64, last: u64) -> bool {
        self.busy
            .range(..=last)
            .next_back()
            .is_some_and(|(_, end)| *end >= first)
    }

    /// Appends records and makes their changes. Only the append can leave the volume poisoned.
    pub(crate) fn record(&mut self, shared: &Shared, records: &[Record]) -> Result<()> {
        let mut puts = Puts::new();
        for record in records {
            debug_assert!(self.state.old_is_live(record), "{record:?}");
            self.state.puts(record, &mut puts)?;
        }
        let mut sequence = self.journal.next;
        self.append(shared, records)?;
        self.changes += puts.len() as u64;
        self.state.index.put_all(puts);
        for record in records {
            self.state.apply(record);
            // Preserved copies are never written again, so nobody has to ask for them.
            if let Record::Map { .. } = record
                && let Some((run, Some(_))) = record.data()
            {
                self.unconfirmed.note_sealed(run, sequence);
            }
            sequence = sequence.next();
        }
        Ok(())
    }

    /// Appends records that change nothing in memory, or whose changes are made by the caller.
    pub(crate) fn append(&mut self, shared: &Shared, records: &[Record]) -> Result<()> {
        let appended = self.journal.append(&*shared.files.journal, records);
        match &appended {
            // Nothing was written.
            Ok(()) | Err(StoreError::NoSpace) => {}
            Err(_) => shared.poison(),
        }
        appended
    }

    /// Nobody lives in `run` any more, since `record`. No sweep may free it: it becomes free by itself.
    pub(crate) fn supersede(&mut self, run: LogRun, record: Sequence) {
        for place in 0..run.count {
            self.space.note_named(run.start.plus(place));
        }
        self.unconfirmed.supersede(run, record);
    }

    /// A round confirmed everything up to `through`.
    pub(crate) fn confirm(&mut self, through: Sequence) {
        self.unconfirmed.confirm(through, &mut self.pins);
        self.free_superseded();
    }

    /// Frees superseded blocks that nobody needs any more (I6).
    pub(crate) fn free_superseded(&mut self) {
        for run in self.unconfirmed.take_free(&mut self.pins) {
            self.space.free(run);
        }
    }

    /// Whether a sweep may find something.
    pub(crate) fn is_unswept(&self) -> bool {
        self.reclaim || self.settled || self.discarded_blocks > 0 || self.sweep != Sweep::Idle
    }

    /// Whether a checkpoint is due; `factor` 4 asks whether writes must wait for it.
    pub(crate) fn is_over_bounds(&self, options: &OpenOptions, factor: u64) -> bool {
        self.state.index.memtable_records() as u64 >= options.memtable_records as u64 * factor
            || self.journal.end_bytes
                >= options.journal_bytes.min(self.journal.region_bytes / 8) * factor
    }

    /// Whether the base alone is the disk.
    pub(crate) fn is_plain(&self) -> bool {
        self.state.table.is_empty() && self.state.index.is_empty() && self.busy.is_empty()
    }
}

impl Shared {
    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }

    pub(crate) fn poison(&self) {
        self.gate.poisoned.store(true, Ordering::SeqCst);
    }

    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.options.read_only {
            return Err(StoreError::ReadOnly);
        }
        if self.gate.poisoned.load(Ordering::SeqCst) {
            return Err(StoreError::Poisoned);
        }
        if self.gate.closed.load(Ordering::SeqCst) {
            return Err(StoreError::Closed);
        }
        Ok(())
    }

    /// fdatasync of one file; a failure poisons the volume and is never retried (I8).
    pub(crate) fn sync(&self, file: &dyn BlockFile, name: FileName) -> Result<()> {
        let counter = match name {
            FileName::Base => Some(&self.counters.base_syncs),
            FileName::Log => Some(&self.counters.log_syncs),
            FileName::Journal | FileName::Superblock | FileName::Index | FileName::Directory => {
                None
            }
        };
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let _alone = (name == FileName::Base).then(|| lock(&self.base_sync));
        // Somebody else may have been told what was meant for this caller's data.
        self.check_writable()?;
        file.sync_data().map_err(|source| {
            self.poison();
            StoreError::Io {
                op: "sync",
                file: name,
                offset_bytes: 0,
                source,
            }
        })
    }

    /// Size of the volume in bytes. While a write is planned, or maintenance is held, it stays.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::SeqCst)
    }

    /// Byte length of the part of a block that the volume has.
    pub(crate) fn block_length_bytes(&self, offset_bytes: u64) -> u64 {
        self.size_bytes()
            .saturating_sub(offset_bytes)
            .min(BLOCK_BYTES)
    }
}

/// An open volume. All calls may come from any thread.
#[derive(Debug)]
pub struct Volume {
    pub(crate) shared: Arc<Shared>,
}

impl Volume {
    /// Its id.
    pub fn id(&self) -> VolumeId {
        self.shared.id
    }

    /// Its size in bytes, now: see [`Volume::grow`].
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes()
    }

    /// Whether it was opened read-only.
    pub fn is_read_only(&self) -> bool {
        self.shared.options.read_only
    }

    /// Whether the base alone is the disk: it may be used without this program after a clean close.
    pub fn is_plain(&self) -> bool {
        self.shared.core().is_plain()
    }

    /// The file a plan's extents speak of.
    pub fn data_file(&self, which: DataFile) -> &Arc<dyn BlockFile> {
        match which {
            DataFile::Base => &self.shared.files.base,
            DataFile::Log => &self.shared.files.log,
        }
    }

    /// Its snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        let core = self.shared.core();
        core.state.table.all().cloned().collect()
    }

    /// One of them.
    pub fn snapshot(&self, id: SnapshotId) -> Option<SnapshotInfo> {
        self.shared.core().state.table.get(id).cloned()
    }

    /// The one that belongs to a set.
    pub fn snapshot_of_set(&self, set_id: SetId) -> Option<SnapshotInfo> {
        self.shared.core().state.table.of_set(set_id).cloned()
    }

    /// Its figures.
    pub fn status(&self) -> VolumeStatus {
        let core = self.shared.core();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        VolumeStatus {
            epoch: core.state.epoch,
            snapshots: core.state.table.len(),
            index_records: core.state.index.records(),
            index_runs: core.state.index.runs().len(),
            scanning: core.space.is_scanning(),
            log_used_bytes: core.space.used_blocks() * BLOCK_BYTES,
            log_backed_bytes: core.space.backed_blocks() * BLOCK_BYTES,
            log_ahead_bytes: read(&counters.ahead_bytes),
            pending_records: core.journal.pending_records(),
            poisoned: self.shared.gate.poisoned.load(Ordering::SeqCst),
            plain: core.is_plain(),
            syncs: SyncCounters {
                base: read(&counters.base_syncs),
                log: read(&counters.log_syncs),
            },
        }
    }
}

/// A snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its id.
    pub snapshot_id: SnapshotId,
    /// Its set.
    pub set_id: SetId,
    /// All volumes of the set, this one included.
    pub members: Vec<VolumeId>,
    /// Its method.
    pub method: crate::snapshot_table::Method,
    /// Now, in milliseconds since 1970.
    pub created_unix_ms: u64,
}
