//! Opening, recovery's writes, closing.
//!
//! The daemon calls it through `Volume`. Order of recovery's writes (I4): data and the journal's tail are
//! synced, RESTART is appended and synced, only then the superblock takes the new boot id and
//! incarnation, only then I/O begins.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::adopt::{base_length, format, io};
use crate::checkpoint::Turn;
use crate::error::{FileName, Result, StoreError};
use crate::index_room::IndexRoom;
use crate::io::AlignedBuffer;
use crate::journal::{Journal, Record, region_start};
use crate::layout::RECORD_BYTES;
use crate::pins::Pins;
use crate::recover::{Loaded, load};
use crate::scan::Scan;
use crate::settle::Settle;
use crate::snapshot::Hold;
use crate::space::Space;
use crate::superblock::Superblock;
use crate::units::{BLOCK_BYTES, BootId, LogBlock, in_memory};
use crate::volume::{
    Core, Counters, Gate, Maintenance, OpenOptions, Shared, Sweep, Volume, VolumeFiles, lock,
};

/// What opening a volume found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RecoveryReport {
    /// The volume was adopted just now.
    pub created: bool,
    /// It had been closed in order.
    pub clean: bool,
    /// The machine has not booted since it was last open.
    pub same_boot: bool,
    /// Journal records replayed onto the index.
    pub replayed_records: u64,
    /// Of these: acknowledged by a daemon that was killed, and in no commit.
    pub tail_records: u64,
    /// Records dropped, because the machine went down before they were committed.
    pub dropped_records: u64,
    /// One superblock slot did not verify; it has been rewritten.
    pub superblock_slot_damaged: bool,
}

/// The kernel's boot id.
pub(crate) fn kernel_boot_id() -> Result<BootId> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(io("read boot id", FileName::Directory))?;
    let id = uuid::Uuid::try_parse(text.trim()).map_err(|_| StoreError::Corrupted {
        file: FileName::Directory,
        offset_bytes: 0,
        what: "the kernel's boot id is no UUID",
    })?;
    Ok(BootId(*id.as_bytes()))
}

/// Compares the base with what the superblock remembers; the size the volume has from now on.
fn check_base(files: &VolumeFiles, loaded: &Loaded, options: &OpenOptions) -> Result<u64> {
    let length_bytes = base_length(files)?;
    let superblock = &loaded.superblock;
    let plain = loaded.state.table.is_empty() && loaded.state.index.is_empty();
    if plain && (superblock.clean || is_to_be_cut(superblock, length_bytes).is_none()) {
        // Nothing depends on the base: it may have been used, or resized, without us.
        return Ok(length_bytes);
    }
    let fits = superblock.base_fits(length_bytes, files.base.is_device());
    let forced = options.force_base && length_bytes >= superblock.size_bytes;
    if !fits && !forced {
        return Err(StoreError::BaseChanged { what: "its size" });
    }
    if let Some(then) = superblock.base_modified
        && superblock.clean
        && !options.force_base
        && files
            .base
            .modified()
            .map_err(io("stat", FileName::Base))?
            .is_some_and(|now| now != then)
    {
        return Err(StoreError::BaseChanged {
            what: "its modification time",
        });
    }
    Ok(superblock.size_bytes)
}

/// Where the base is to be cut off: the volume did not get the size, or gave it up, and the base has it still (I11).
fn is_to_be_cut(superblock: &Superblock, length_bytes: u64) -> Option<u64> {
    let announced = superblock.size_bytes < length_bytes && length_bytes <= superblock.base_bytes;
    announced.then_some(superblock.size_bytes)
}

/// Makes durable what recovery decided (I4), and returns the journal to append to.
fn finish_recovery(
    files: &VolumeFiles,
    loaded: &mut Loaded,
    size_bytes: u64,
    boot_id: BootId,
) -> Result<Journal> {
    let incarnation = loaded.incarnation.next();
    let mut journal = loaded.journal(incarnation);
    let end = is_to_be_cut(&loaded.superblock, base_length(files)?);
    let end = end.filter(|end| *end == size_bytes && !files.base.is_device());
    if loaded.tail_records + loaded.dropped_records > 0
        || loaded.unconfirmed
        || !loaded.superblock.clean
    {
        files.base.sync_data().map_err(io("sync", FileName::Base))?;
        rewrite_copies(files, loaded)?;
        files.log.sync_data().map_err(io("sync", FileName::Log))?;
        rewrite_journal(files, loaded)?;
        journal.append(
            &*files.journal,
            &[Record::Restart {
                through: loaded.kept_through,
            }],
        )?;
        files.log.sync_data().map_err(io("sync", FileName::Log))?;
        journal.all_is_durable();
    }
    loaded.superblock = Superblock {
        generation: loaded.superblock.generation.next(),
        base_bytes: end.map_or(0, |_| loaded.superblock.base_bytes),
        boot_id,
        incarnation,
        clean: false,
        base_modified: None,
        ..loaded.superblock.clone()
    };
    loaded.superblock.store(&*files.superblock)?;
    journal.superblock = loaded.superblock.generation;
    if let Some(end) = end {
        // Only now: of the slot that gave it up, a killed daemon may have left no more than the page cache knows.
        files.base.set_len(end).map_err(io("cut", FileName::Base))?;
        files.base.sync_data().map_err(io("sync", FileName::Base))?;
        loaded.superblock.base_bytes = 0;
    }
    Ok(journal)
}

/// Writes the journals' valid bytes over themselves: a sync that failed before the daemon died may have
/// left them in the page cache, marked clean, and not on the disk.
fn rewrite_journal(files: &VolumeFiles, loaded: &Loaded) -> Result<()> {
    let older_records = loaded
        .chain
        .iter()
        .filter(|entry| entry.sequence < loaded.first)
        .count();
    let older_bytes = (older_records * RECORD_BYTES) as u64;
    let mut parts = vec![(loaded.generation, loaded.end_bytes)];
    if older_bytes > 0 {
        parts.push((loaded.superblock.journal_generation, older_bytes));
    }
    for (generation, length_bytes) in parts {
        let start = region_start(loaded.superblock.journal_region_bytes, generation);
        let mut bytes = vec![0; in_memory(length_bytes.min(1 << 20))];
        let mut at = start;
        while at < start + length_bytes {
            let part = in_memory((start + length_bytes - at).min(bytes.len() as u64));
            files
                .journal
                .read_at(&mut bytes[..part], at)
                .map_err(io("read", FileName::Journal))?;
            files
                .journal
                .write_at(&bytes[..part], at)
                .map_err(io("write", FileName::Journal))?;
            at += part as u64;
        }
    }
    Ok(())
}

/// The same for preserved copies: the guest was told of its write's failure, but the snapshot's reader was not.
fn rewrite_copies(files: &VolumeFiles, loaded: &Loaded) -> Result<()> {
    for run in &loaded.copies {
        let offset_bytes = run.start.offset_bytes();
        let mut bytes = AlignedBuffer::new(in_memory(run.count * BLOCK_BYTES));
        let failed = |op| {
            move |source| StoreError::Io {
                op,
                file: FileName::Log,
                offset_bytes,
                source,
            }
        };
        files
            .log
            .read_at(&mut bytes, offset_bytes)
            .map_err(failed("read"))?;
        files
            .log
            .write_at(&bytes, offset_bytes)
            .map_err(failed("write"))?;
    }
    Ok(())
}

/// What is named in the log is there. Memory for the allocation bitmap is taken only behind this.
fn check_log(files: &VolumeFiles, loaded: &Loaded) -> Result<()> {
    let length_bytes = files
        .log
        .len_bytes()
        .map_err(io("measure", FileName::Log))?;
    match loaded.named.iter().max() {
        Some(last) if last.0 >= length_bytes.div_ceil(BLOCK_BYTES) => Err(StoreError::Corrupted {
            file: FileName::Log,
            offset_bytes: last.offset_bytes(),
            what: "it ends before a block that a record names (I2)",
        }),
        Some(_) | None => Ok(()),
    }
}

impl Volume {
    /// Adopts `base` with a new shadow storage directory, or opens the one that is there and recovers.
    /// The base is never converted: its bytes stay where they are.
    pub fn adopt(
        base: &Path,
        shadow_storage: &Path,
        options: &OpenOptions,
    ) -> Result<(Volume, RecoveryReport)> {
        let files = VolumeFiles::open(base, shadow_storage, options)?;
        Volume::open_files(files, options)
    }

    /// The same over files that are open already.
    pub fn open_files(
        files: VolumeFiles,
        options: &OpenOptions,
    ) -> Result<(Volume, RecoveryReport)> {
        let boot_id = match options.boot_id {
            Some(boot_id) => boot_id,
            None => kernel_boot_id()?,
        };
        let mut created = false;
        let mut loaded = match load(&files, boot_id, options.cache_pages)? {
            Some(loaded) => loaded,
            None if options.read_only => return Err(StoreError::ReadOnly),
            None => {
                format(&files, base_length(&files)?, options)?;
                created = true;
                load(&files, boot_id, options.cache_pages)?.ok_or(StoreError::Corrupted {
                    file: FileName::Superblock,
                    offset_bytes: 0,
                    what: "what was written does not read back",
                })?
            }
        };
        let id = loaded.superblock.volume_id;
        if options.volume_id.is_some_and(|wanted| wanted != id) {
            return Err(StoreError::WrongVolume(id));
        }
        check_log(&files, &loaded)?;
        let size_bytes = check_base(&files, &loaded, options)?;
        let report = RecoveryReport {
            created,
            clean: loaded.superblock.clean,
            same_boot: loaded.same_boot,
            replayed_records: loaded.replayed_records,
            tail_records: loaded.tail_records,
            dropped_records: loaded.dropped_records,
            superblock_slot_damaged: loaded.other_slot_damaged,
        };
        let journal = if options.read_only {
            loaded.state.resize(size_bytes);
            loaded.superblock.size_bytes = size_bytes;
            loaded.journal(loaded.incarnation)
        } else {
            finish_recovery(&files, &mut loaded, size_bytes, boot_id)?
        };
        let volume = Volume::from_loaded(files, options, loaded, journal);
        if volume.size_bytes() != size_bytes {
            volume.shared.follow_base(size_bytes)?;
        }
        Ok((volume, report))
    }

    fn from_loaded(
        files: VolumeFiles,
        options: &OpenOptions,
        loaded: Loaded,
        journal: Journal,
    ) -> Volume {
        let first_block = loaded.superblock.first_data_block();
        let limit_bytes = options
            .log_limit_bytes
            .saturating_add(LogBlock(first_block).offset_bytes());
        let mut space = Space::new(options.segment_bytes, limit_bytes, first_block);
        let named = loaded.named.iter().map(|named| named.0 + 1).max();
        space.begin_scan(loaded.superblock.log_high_water.max(named.unwrap_or(0)));
        for named in &loaded.named {
            space.note_named(*named);
        }
        let runs = loaded.state.index.runs();
        let scan = if runs.is_empty() {
            space.end_scan();
            None
        } else {
            Some(Scan::new(runs, loaded.bounds()))
        };
        let mut settle = Settle::default();
        settle.note_checkpoint();
        let superblock = loaded.superblock;
        let mut room = IndexRoom::new(&superblock, loaded.previous.as_ref());
        // The slot of this opening took the place of the older one.
        let gone = match options.read_only {
            true => Vec::new(),
            false => room.slot_written(&superblock),
        };
        let core = Core {
            state: loaded.state,
            space,
            journal,
            pins: Pins::default(),
            busy: Default::default(),
            settling: Default::default(),
            reserved: Default::default(),
            promised_records: 0,
            unconfirmed: Default::default(),
            sweep: Sweep::Idle,
            // What replayed records superseded, a sweep finds.
            reclaim: loaded.replayed_records > 0 || superblock.unswept,
            settled: false,
            discarded_blocks: 0,
            changes: 0,
        };
        let shared = Shared {
            id: superblock.volume_id,
            size_bytes: AtomicU64::new(superblock.size_bytes),
            options: options.clone(),
            gate: Gate::default(),
            counters: Counters::default(),
            rounds: Default::default(),
            base_sync: Mutex::default(),
            maintenance: Mutex::new(Maintenance {
                room,
                next_generation: superblock.next_generation,
                superblock,
                checkpoint: None,
                reclaim: None,
                sweep_due: false,
                scan,
                settle,
                ahead: Default::default(),
                extended_bytes: 0,
                reserve: Default::default(),
            }),
            files,
            core: Mutex::new(core),
        };
        shared.note_plain(&shared.core());
        shared.release_pages(&gone);
        Volume {
            shared: Arc::new(shared),
        }
    }

    /// Makes everything durable, merges what is in memory, marks the volume clean, and refuses all writes
    /// from then on. `Busy` if a write is in flight: drain and try again. The locks go with the last handle.
    /// Dropping a volume without closing it is what a killed daemon does.
    pub fn close(&self) -> Result<()> {
        let shared = &self.shared;
        if shared.options.read_only || shared.gate.closed.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut work = lock(&shared.maintenance);
        let _hold = Hold::begin(shared)?;
        shared.flush()?;
        shared.abandon_reclaim(&mut work);
        shared.run_checkpoint(&mut work)?;
        if shared.core().state.index.memtable_records() > 0 {
            shared.begin_checkpoint(&mut work, Turn::Keep)?;
            shared.run_checkpoint(&mut work)?;
        }
        shared.cut_base(&mut work)?;
        let base = &shared.files.base;
        // The time that is compared at the next opening must not go back with a power cut.
        let alone = lock(&shared.base_sync);
        base.sync_all().map_err(|source| {
            shared.poison();
            io("sync", FileName::Base)(source)
        })?;
        drop(alone);
        let (log_high_water, unswept) = {
            let core = shared.core();
            (core.space.high_water(), core.is_unswept())
        };
        let closed = Superblock {
            generation: work.superblock.generation.next(),
            clean: true,
            base_modified: base.modified().map_err(io("stat", FileName::Base))?,
            log_high_water,
            unswept,
            ..work.superblock.clone()
        };
        closed
            .store(&*shared.files.superblock)
            .inspect_err(|_| shared.poison())?;
        work.superblock = closed;
        shared.gate.closed.store(true, Ordering::SeqCst);
        Ok(())
    }
}
