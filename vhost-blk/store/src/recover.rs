//! Reading a volume's state from its files, without writing a byte.
//!
//! `open` uses it and then makes the outcome durable; `check` and `dump` use it as it is.
//! What is kept (I4): everything up to the last COMMIT or RESTART; behind it, the whole valid tail if
//! the machine has not booted since, else nothing.
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use crate::adopt::io;
use crate::error::{FileName, Result, StoreError};
use crate::index::{Index, Location, Run};
use crate::io::AlignedBuffer;
use crate::journal::{Closing, Entry, Journal, Place, Record, Scan, UnverifiedRecord, scan};
use crate::layout::{self, PAGE_BYTES, RECORD_BYTES, Seal};
use crate::scan::Bounds;
use crate::space::LogRun;
use crate::state::{Puts, State};
use crate::superblock::{self, SlotsFound, Superblock};
use crate::units::{BLOCK_BYTES, BootId, Generation, Incarnation, LogBlock, Sequence, in_memory};
use crate::volume::VolumeFiles;

/// A volume as its files describe it.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Length of the log, journals included.
    pub(crate) log_blocks: u64,
    pub(crate) superblock: Superblock,
    /// The other slot, if it verifies.
    pub(crate) previous: Option<Superblock>,
    pub(crate) other_slot_damaged: bool,
    pub(crate) state: State,
    /// Log blocks that a kept record names, superseded or not.
    pub(crate) named: Vec<LogBlock>,
    /// Generation that appends go to, and where.
    pub(crate) generation: Generation,
    pub(crate) first: Sequence,
    pub(crate) end_bytes: u64,
    pub(crate) last: Sequence,
    /// Highest incarnation seen anywhere.
    pub(crate) incarnation: Incarnation,
    /// Last record that holds.
    pub(crate) kept_through: Sequence,
    /// A sealed record that holds is above the watermark: its data must not change before a RESTART.
    pub(crate) unconfirmed: bool,
    /// Preserved copies that hold and that no round has confirmed.
    pub(crate) copies: Vec<LogRun>,
    /// Records kept that no COMMIT covered, and records dropped.
    pub(crate) tail_records: u64,
    pub(crate) dropped_records: u64,
    pub(crate) replayed_records: u64,
    pub(crate) same_boot: bool,
    /// The valid chain, for the dump.
    pub(crate) chain: Vec<Entry>,
}

impl Loaded {
    /// The journal to go on with, in a new incarnation or, to read only, in the old one.
    pub(crate) fn journal(&self, incarnation: Incarnation) -> Journal {
        let place = Place {
            generation: self.generation,
            first: self.first,
            next: self.last.next(),
            end_bytes: self.end_bytes,
        };
        let superblock = &self.superblock;
        Journal::new(
            superblock.volume_id,
            superblock.journal_region_bytes,
            superblock.generation,
            incarnation,
            place,
        )
    }
}

impl Loaded {
    /// What the runs can name.
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            volume_blocks: self.superblock.size_bytes.div_ceil(BLOCK_BYTES),
            log_blocks: self.superblock.first_data_block()..self.log_blocks,
            epoch: self.superblock.epoch.0,
        }
    }
}

fn corrupted(file: FileName, offset_bytes: u64, what: &'static str) -> StoreError {
    StoreError::Corrupted {
        file,
        offset_bytes,
        what,
    }
}

/// Loads the volume; `None` if it was never formatted.
pub(crate) fn load(
    files: &VolumeFiles,
    boot_id: BootId,
    cache_pages: usize,
) -> Result<Option<Loaded>> {
    let (mut superblock, previous, other_slot_damaged) = match superblock::load(&*files.superblock)?
    {
        SlotsFound::Blank => return check_unused(files).map(|()| None),
        SlotsFound::Valid {
            current,
            previous,
            other_damaged,
        } => (*current, previous.map(|slot| *slot), other_damaged),
    };
    let log_bytes = files
        .log
        .len_bytes()
        .map_err(io("measure", FileName::Log))?;
    // What was given out and not written when the mark was noted may lie behind the log's end.
    let log_blocks = log_bytes.div_ceil(BLOCK_BYTES);
    superblock.log_high_water = superblock.log_high_water.min(log_blocks);
    let mut runs = Vec::new();
    for place in &superblock.runs {
        let run = Run::load(&*files.index, superblock.volume_id, *place)?;
        runs.push(Arc::new(run));
    }
    let index = Index::new(Arc::clone(&files.index), runs, cache_pages);
    let mut named = Vec::new();
    let mut state = State::new(index, superblock.epoch, superblock.size_bytes);
    load_table(files, &superblock, &mut state)?;

    let (chain, older, younger) = load_chain(files, &superblock)?;
    let last = chain
        .last()
        .map_or(superblock.first_sequence, |entry| entry.sequence);
    let incarnation = chain
        .last()
        .map_or(superblock.incarnation, |entry| entry.incarnation)
        .max(superblock.incarnation);
    let same_boot = superblock.boot_id == boot_id;
    let decided = decide(&chain, &superblock, same_boot, |entry| {
        verify_data(files, log_bytes, &superblock, &entry.record)
    })?;

    let mut replayed_records = 0;
    // Most records are of one block, and half of their changes are versions.
    let mut puts = Puts::with_capacity(2 * decided.kept.len());
    for entry in &decided.kept {
        if entry.sequence <= superblock.applied_through {
            continue;
        }
        state.check_snap(&entry.record)?;
        let first = puts.len();
        state.puts(&entry.record, &mut puts)?;
        for (_, location) in puts.get(first..).unwrap_or_default() {
            if let Location::Log(at) = location {
                if at.0 < superblock.first_data_block() {
                    return Err(corrupted(
                        FileName::Journal,
                        0,
                        "a record names a block of the journal (I2)",
                    ));
                }
                if at.0 >= log_blocks {
                    return Err(corrupted(
                        FileName::Journal,
                        0,
                        "a record names a block behind the log's end (I2)",
                    ));
                }
                named.push(*at);
            }
        }
        state.apply(&entry.record);
        replayed_records += 1;
    }
    state.index.put_all(puts);
    let (generation, first, end_bytes) = match younger {
        Some((scan, first)) => (superblock.journal_generation.next(), first, scan.end_bytes),
        None => (
            superblock.journal_generation,
            superblock.first_sequence,
            older.end_bytes,
        ),
    };
    Ok(Some(Loaded {
        log_blocks,
        superblock,
        previous,
        other_slot_damaged,
        state,
        named,
        generation,
        first,
        end_bytes,
        last,
        incarnation,
        kept_through: decided.through,
        unconfirmed: decided.unconfirmed,
        copies: decided.copies,
        tail_records: decided.tail_records,
        dropped_records: decided.dropped_records,
        replayed_records,
        same_boot,
        chain,
    }))
}

/// A volume that has a history and no superblock has lost it, and must not be adopted anew. An adoption that was
/// not finished leaves a journal of one record.
fn check_unused(files: &VolumeFiles) -> Result<()> {
    let mut start = [0; PAGE_BYTES];
    files
        .journal
        .read_at(&mut start, 0)
        .map_err(|source| StoreError::Io {
            op: "read",
            file: FileName::Journal,
            offset_bytes: 0,
            source,
        })?;
    if start.iter().skip(RECORD_BYTES).any(|byte| *byte != 0) {
        return Err(corrupted(
            FileName::Superblock,
            0,
            "it is blank, and the journal is not: it is lost",
        ));
    }
    Ok(())
}

/// Rebuilds the snapshot table from its records.
fn load_table(files: &VolumeFiles, superblock: &Superblock, state: &mut State) -> Result<()> {
    let most = layout::MAX_SNAPSHOTS * (2 + layout::MAX_SET_MEMBERS);
    let start = superblock.table_page * PAGE_BYTES as u64;
    let broken = |what| corrupted(FileName::Index, start, what);
    if superblock.table_records > most as u64 {
        return Err(broken("the snapshot table is too long"));
    }
    let length_bytes = files
        .index
        .len_bytes()
        .map_err(io("measure", FileName::Index))?;
    let end = superblock.table_records * RECORD_BYTES as u64 + start;
    if superblock.table_records > 0 && end > length_bytes {
        return Err(broken("the snapshot table is cut short"));
    }
    let mut bytes = vec![0; in_memory(superblock.table_records) * RECORD_BYTES];
    files
        .index
        .read_at(&mut bytes, start)
        .map_err(|source| StoreError::Io {
            op: "read",
            file: FileName::Index,
            offset_bytes: start,
            source,
        })?;
    for (place, record) in (0..).zip(bytes.as_chunks::<RECORD_BYTES>().0) {
        let seal = Seal::Table(superblock.table_generation);
        let entry = UnverifiedRecord(record)
            .verify(superblock.volume_id, seal)
            .filter(|entry| entry.sequence.0 == place + 1)
            .ok_or(broken("a snapshot table record does not verify"))?;
        match entry.record {
            Record::SnapId { .. }
            | Record::SnapMembers { .. }
            | Record::Snap { .. }
            | Record::Keep { .. } => {}
            Record::Start { .. }
            | Record::Map { .. }
            | Record::Preserve { .. }
            | Record::LeaveOut { .. }
            | Record::Settle { .. }
            | Record::Discard { .. }
            | Record::Delete { .. }
            | Record::Commit { .. }
            | Record::Restart { .. } => {
                return Err(broken("a record that has no place in the snapshot table"));
            }
        }
        state.check_snap(&entry.record)?;
        state.apply(&entry.record);
    }
    if state.floor().is_some_and(|floor| floor >= superblock.epoch) {
        return Err(broken("a snapshot of an epoch that is not closed (I5)"));
    }
    state.epoch = superblock.epoch;
    Ok(())
}

type Chain = (Vec<Entry>, Scan, Option<(Scan, Sequence)>);

/// The valid chain over one or both journal regions.
fn load_chain(files: &VolumeFiles, superblock: &Superblock) -> Result<Chain> {
    let generation = superblock.journal_generation;
    let (file, region_bytes) = (&*files.journal, superblock.journal_region_bytes);
    let volume = superblock.volume_id;
    let mut older = scan(
        file,
        region_bytes,
        volume,
        generation,
        superblock.first_sequence,
        Incarnation(0),
    )?;
    let mut chain = std::mem::take(&mut older.entries);
    let Some((last, incarnation)) = chain.last().map(|e| (e.sequence, e.incarnation)) else {
        // START is durable before the superblock names its generation.
        return Err(corrupted(
            FileName::Journal,
            0,
            "the journal that the superblock names does not begin; is the newer slot lost?",
        ));
    };
    let first = last.next();
    let mut younger = scan(
        file,
        region_bytes,
        volume,
        generation.next(),
        first,
        incarnation,
    )?;
    let end = younger.entries.last().map_or(last, |entry| entry.sequence);
    check_gap(end.next(), &older, &younger)?;
    if younger.entries.is_empty() {
        return Ok((chain, older, None));
    }
    chain.append(&mut younger.entries);
    Ok((chain, older, Some((younger, first))))
}

/// The chain ends before `missing`. A COMMIT behind the gap that was appended when `missing` had been synced
/// shows damage; without one the gap is what a power cut left of the last round.
fn check_gap(missing: Sequence, older: &Scan, younger: &Scan) -> Result<()> {
    for entry in older.behind_gap.iter().chain(&younger.behind_gap) {
        if let Record::Commit { synced, .. } = entry.record
            && synced >= missing
        {
            return Err(corrupted(
                FileName::Journal,
                older.end_bytes,
                "records are missing in the middle of the journal",
            ));
        }
    }
    Ok(())
}

/// Whether the data that a sealed record names is in the log, which has `log_bytes`.
fn verify_data(
    files: &VolumeFiles,
    log_bytes: u64,
    superblock: &Superblock,
    record: &Record,
) -> Result<bool> {
    let (block, run, crc) = match (record, record.data()) {
        (Record::Map { block, .. } | Record::Preserve { block, .. }, Some((run, Some(crc)))) => {
            (*block, run, crc)
        }
        _ => return Ok(true),
    };
    let (start, end) = (block.offset_bytes(), block.plus(run.count).offset_bytes());
    let length_bytes = end.min(superblock.size_bytes).saturating_sub(start);
    let offset_bytes = run.start.offset_bytes();
    if offset_bytes.saturating_add(length_bytes) > log_bytes {
        // The sync of its round would have kept the log's length. What is read there is zeroes, and zeroes may be what was summed.
        return Ok(false);
    }
    let mut bytes = AlignedBuffer::new(in_memory(length_bytes));
    files
        .log
        .read_at(&mut bytes, offset_bytes)
        .map_err(|source| StoreError::Io {
            op: "read",
            file: FileName::Log,
            offset_bytes,
            source,
        })?;
    Ok(crc32c::crc32c(&bytes) == crc)
}

/// Sequence number up to which the chain says that data was durable, or may have changed since.
fn watermark(chain: &[Entry], superblock: &Superblock) -> Sequence {
    let known = chain.iter().filter_map(|entry| {
        Some(match entry.record.closing()? {
            Closing::Commit {
                through,
                ordered: true,
                ..
            } => through,
            Closing::Commit {
                synced,
                ordered: false,
                ..
            } => synced,
            Closing::Restart { .. } => entry.sequence,
        })
    });
    known
        .max()
        .unwrap_or(superblock.first_sequence)
        .max(superblock.first_sequence)
        .max(superblock.applied_through)
}

struct Decided {
    kept: Vec<Entry>,
    through: Sequence,
    unconfirmed: bool,
    copies: Vec<LogRun>,
    tail_records: u64,
    dropped_records: u64,
}

/// Which records of the chain hold. `verifies` tells of a record whether its data is there.
fn decide(
    chain: &[Entry],
    superblock: &Superblock,
    same_boot: bool,
    verifies: impl Fn(&Entry) -> Result<bool>,
) -> Result<Decided> {
    let watermark = watermark(chain, superblock);
    let mut decided = Decided {
        kept: Vec::new(),
        through: superblock.first_sequence,
        unconfirmed: false,
        copies: Vec::new(),
        tail_records: 0,
        dropped_records: 0,
    };
    let mut pending: Vec<Entry> = Vec::new();
    let broken = |what| corrupted(FileName::Journal, 0, what);
    for (number, entry) in chain.iter().enumerate() {
        let closing = entry.record.closing();
        if let Some(Closing::Commit {
            superblock: named, ..
        }) = closing
            && named > superblock.generation
        {
            return Err(corrupted(
                FileName::Superblock,
                0,
                "the journal names a newer superblock slot: it is lost",
            ));
        }
        let restart = matches!(closing, Some(Closing::Restart { .. }));
        if entry.incarnation > superblock.incarnation && !restart {
            return Err(broken(
                "records of an opening that the superblock does not know",
            ));
        }
        let through = match closing {
            Some(Closing::Commit { through, .. } | Closing::Restart { through }) => through,
            None => {
                pending.push(entry.clone());
                continue;
            }
        };
        if through >= entry.sequence {
            return Err(broken("a COMMIT of records that come after it"));
        }
        let split = pending.partition_point(|entry| entry.sequence <= through);
        let killed = same_boot && entry.incarnation == superblock.incarnation;
        if !restart && !killed {
            let mut doubtful = pending
                .iter()
                .take(split)
                .filter(|entry| entry.sequence > watermark);
            if !doubtful.try_fold(true, |so_far, entry| Ok(so_far && verifies(entry)?))? {
                // That round never returned: neither it nor anything behind it was acknowledged.
                decided.dropped_records += (pending.len() + chain.len() - number) as u64;
                return Ok(decided);
            }
        }
        let rest = pending.split_off(split);
        if restart {
            // All between `through` and here was dropped by an earlier recovery, COMMITs included.
            decided.kept.retain(|entry| entry.sequence <= through);
            decided.kept.append(&mut pending);
            decided.kept.push(entry.clone());
            decided.through = entry.sequence;
        } else {
            decided.kept.append(&mut pending);
            decided.through = decided.through.max(through);
            pending = rest;
        }
    }
    // The tail: acknowledged by a daemon that was killed, or unflushed before a power cut.
    for entry in pending {
        if same_boot && entry.incarnation == superblock.incarnation {
            decided.through = decided.through.max(entry.sequence);
            decided.tail_records += 1;
            decided.kept.push(entry);
        } else {
            decided.dropped_records += 1;
        }
    }
    decided.copies = decided
        .kept
        .iter()
        .filter(|entry| {
            entry.sequence > watermark && matches!(entry.record, Record::Preserve { .. })
        })
        .filter_map(|entry| entry.record.data().map(|(run, _)| run))
        .collect();
    decided.unconfirmed = decided
        .kept
        .iter()
        .any(|entry| entry.sequence > watermark && entry.record.data().is_some());
    Ok(decided)
}

#[cfg(all(test, feature = "sim"))]
mod tests;
